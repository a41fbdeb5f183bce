"""Pictures out of whatever they are kept in, read one by one: folders, lists, arrays, archives, tables."""
