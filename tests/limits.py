"""How long tests wait before they take something for hung: far longer than a slow and busy machine needs."""

HUNG = 600.0  # seconds
