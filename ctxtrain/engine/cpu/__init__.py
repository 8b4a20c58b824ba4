"""Passes of a dense Qwen2 or Qwen3 classifier on CPUs: same results as transformers, fewer walks through memory."""
