"""What `hivtp evaluate` found, and what is worked out from it."""
