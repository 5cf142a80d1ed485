"""Benchmarks: each file is one command that measures and writes result files."""
