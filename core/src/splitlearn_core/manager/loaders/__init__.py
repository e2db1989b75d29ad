"""Loading one model from its configuration, in a worker thread."""
