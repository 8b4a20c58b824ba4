"""The fast engine for dense Qwen2 and Qwen3 classifiers on CPUs. It gives the results of transformers."""
