"""Tests of lomo_ds/planner."""
