"""What a user hands in as the inputs of one forward: tensors of any kind, an example, an item of data."""
