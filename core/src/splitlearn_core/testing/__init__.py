"""Small worlds for tests: tiny checkpoints, a Hub on loopback, and the checks every family passes."""
