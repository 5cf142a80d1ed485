"""Shared code of the benchmarks: methods, workloads, worker processes and result files."""
