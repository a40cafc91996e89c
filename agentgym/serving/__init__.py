"""Serving policies and environments to other processes."""
