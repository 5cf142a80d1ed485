"""Timeouts of tests, which are far longer than a slow and busy machine needs."""

HUNG = 600.0  # seconds
