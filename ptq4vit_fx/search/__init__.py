"""The search: operands in, scales out. Tensors and values only; nothing here knows graphs or modules."""
