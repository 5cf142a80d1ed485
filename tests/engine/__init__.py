"""Tests of lomo_ds/engine."""
