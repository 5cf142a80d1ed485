"""Tests of lomo_ds/numerics."""
