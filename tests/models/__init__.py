"""Tests of lomo_ds/models."""
