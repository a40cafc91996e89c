"""Wrappers that work on any environment."""
