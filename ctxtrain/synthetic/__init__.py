"""Simulated bars, their structure flags, and sample windows with a known labelling rule."""
