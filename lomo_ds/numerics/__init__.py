"""Arithmetic on the values of a shard: fp32, half precision, and block-quantized eight-bit weights.

Pure functions over tensors, independent of ranks, parameters and schedules.
"""
