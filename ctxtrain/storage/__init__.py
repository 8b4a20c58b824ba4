"""Atomic file writes, checkpoints and the run folder."""
