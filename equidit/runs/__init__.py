"""A training run in a folder: what it was given, what it does, and what can be drawn from it."""
