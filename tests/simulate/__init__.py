"""Tests of lomo_ds/simulate."""
