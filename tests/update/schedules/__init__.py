"""Tests of lomo_ds/schedules."""
