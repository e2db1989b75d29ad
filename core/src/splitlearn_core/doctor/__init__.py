"""Checks that find out why a plugin is not found or a model does not load; each finding has its fix."""
