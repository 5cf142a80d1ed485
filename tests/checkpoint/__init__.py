"""Tests of lomo_ds/checkpoint."""
