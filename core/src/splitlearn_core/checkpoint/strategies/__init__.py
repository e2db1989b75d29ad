"""Loading strategies: how planned bytes become tensors. One file for each."""
