"""Tests of lomo_ds/config."""
