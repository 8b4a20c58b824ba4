"""Logits → scores with intervals, baselines beside them, targets met or missed, temperature and thresholds."""
