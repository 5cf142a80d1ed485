"""Arithmetic on the values of a shard: fp32, half precision, and blocks of eight-bit weights.

Pure functions over tensors. Nothing here knows of ranks, parameters or schedules.
"""
