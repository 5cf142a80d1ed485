"""Ranks of a job: the process group, collectives, and a watchdog that stops all ranks when one dies."""
