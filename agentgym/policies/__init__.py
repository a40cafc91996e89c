"""Policies: everything that answers a request with a completion."""
