"""A training job from its arguments to the exported model."""
