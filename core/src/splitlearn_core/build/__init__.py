"""Modules: built without memory, pruned to a component, filled with tensors. Reads no files."""
