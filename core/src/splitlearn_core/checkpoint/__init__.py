"""Finding the files of a checkpoint, and reading what was planned. Knows no family."""
