"""Inputs of every kind that a user gives, drawn at random: a few in ``make test``, minutes of them in ``make fuzz``."""
