"""Tests of lomo_ds/update/rules."""
