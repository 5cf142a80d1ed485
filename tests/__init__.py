"""The tests mirror lomo_ds/; see ranks.py for how a test runs on several ranks."""
