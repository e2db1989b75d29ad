"""A manager over HTTP: a page for people, JSON for programs, metrics, health, and the commands ``serve`` and ``ps``."""
