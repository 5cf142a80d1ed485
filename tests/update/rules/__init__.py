"""Tests of lomo_ds/rules."""
