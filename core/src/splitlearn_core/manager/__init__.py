"""Many components in one process: loading, watching, lending and freeing them without blocking the event loop."""
