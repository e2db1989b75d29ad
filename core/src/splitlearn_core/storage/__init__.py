"""Components as files: saved, loaded, checked, and merged into a checkpoint again."""
