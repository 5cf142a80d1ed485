"""Fuzz tests with random user inputs of every kind: a few in ``make test``, minutes of them in ``make fuzz``."""
