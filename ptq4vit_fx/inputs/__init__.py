"""What comes from outside: the inputs of one forward (tensors of any kind, an example, an item of data), and JSON."""
