"""Faster passes of the same model: one door (`api.py`) to what a device can do."""
