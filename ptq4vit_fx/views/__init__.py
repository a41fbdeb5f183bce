"""How values show themselves to people: in a line, in a notebook, as a DataFrame."""
