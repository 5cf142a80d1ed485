"""Tests of lomo_ds/numerics/int8."""
