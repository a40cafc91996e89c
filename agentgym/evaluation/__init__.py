"""Evaluating policies: episodes, statistics, reports."""
