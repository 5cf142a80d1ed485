"""Tests of lomo_ds/zero3."""
