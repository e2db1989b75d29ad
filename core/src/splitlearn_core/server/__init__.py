"""A manager over HTTP: a page for people, JSON for programs, metrics and health. Needs ``splitlearn-core[serve]``."""
