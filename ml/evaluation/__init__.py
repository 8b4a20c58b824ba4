"""Logits → scores, targets met or missed, temperature."""
