"""The config of a run: YAML and overrides → typed, range-checked values."""
