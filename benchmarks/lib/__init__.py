"""The machinery behind the benchmarks: methods, workloads, worker processes, and the files that results go to."""
