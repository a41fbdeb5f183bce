"""A page of what is known of a quantized model: `collect` finds it, `content` is its numbers, `page` their form."""
