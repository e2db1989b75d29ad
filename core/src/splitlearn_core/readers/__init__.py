"""Loading strategies: planned bytes become tensors. Knows no family."""
