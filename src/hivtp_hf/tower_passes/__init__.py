"""Runs of the vision tower alone, as a model itself does them. Never travels with checkpoints."""
