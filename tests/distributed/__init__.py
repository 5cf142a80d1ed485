"""Tests of lomo_ds/distributed."""
