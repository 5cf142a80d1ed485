"""Tests of lomo_ds/train."""
