"""Tests of lomo_ds/data."""
