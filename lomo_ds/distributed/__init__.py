"""The ranks of a job: their process group, the collectives between them, and the watchdog that ends them together."""
