"""Environments in which a policy writes code."""
