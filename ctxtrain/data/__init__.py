"""JSONL → Window → numbers → text → balanced, ordered token batches."""
