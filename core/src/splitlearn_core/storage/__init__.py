"""Components as files: save, load, verify, and merge into one checkpoint."""
