"""Tests of lomo_ds/memory."""
