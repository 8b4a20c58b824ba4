"""Merge the best adapters, export and check the model, and predict with it."""
