"""Training programs for the papers' experiments."""
