"""Metrics with confidence intervals, baselines, targets, calibration and confidence thresholds."""
