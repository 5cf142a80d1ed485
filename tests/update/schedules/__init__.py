"""Tests of lomo_ds/update/schedules."""
