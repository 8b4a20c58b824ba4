"""Engines: the reference engine and faster ones with the same results. Import them through `api.py` only."""
