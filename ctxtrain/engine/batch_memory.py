"""How many tokens a batch of answers may have on a GPU, from its free memory and the widths of the model.

Input: the model's config, its dtype, the free bytes and the tokens of the longest text. Output: the tokens of a padded
batch. A forward pass without gradients keeps the states of one layer, so its peak is that of the widest layer; the head
sees pooled states only. Where the estimate is too high, the engine halves a batch that memory does not hold.
"""

from __future__ import annotations

from typing import Any

import torch

SHARE_OF_FREE = 0.7  # the rest is for cuBLAS workspaces and for gaps between the allocator's blocks
MAX_TOKENS = 1 << 16  # products are at their full rate long before, and every tensor has fewer than 2^31 elements


def batch_tokens(config: Any, dtype: torch.dtype, free_bytes: int, longest: int) -> int:
    """Tokens of a padded batch that fit into the free memory of a GPU; at least 1, at most `MAX_TOKENS`."""
    return max(1, min(MAX_TOKENS, int(SHARE_OF_FREE * free_bytes) // peak_bytes_per_token(config, dtype, longest)))


def peak_bytes_per_token(config: Any, dtype: torch.dtype, longest: int) -> int:
    """Bytes per token at the peak of a layer of transformers, the larger one of MLP and attention.

    Both hold the token's id and rotation, the embeddings, the layer's input and a norm; the MLP also holds the sum
    after attention and three inner products at a time. Attention holds queries, keys and values, and four tensors of
    queries while they are rotated, or three in float32 while they are normalised. In float32, where flash attention has
    no kernel, it also holds three tensors of scores, with `longest` numbers per head.
    """
    text, width = config.get_text_config(), dtype.itemsize
    hidden, heads = int(text.hidden_size), int(text.num_attention_heads)
    head_dim = int(getattr(text, "head_dim", None) or hidden // heads)
    queries, keys = heads * head_dim, int(text.num_key_value_heads) * head_dim
    mlp = width * (4 * hidden + 3 * _inner_width(text))
    attention = width * (3 * hidden + queries + 2 * keys) + max(4 * width, 3 * 4) * queries
    if dtype == torch.float32:
        attention += 3 * 4 * heads * longest
    return 8 + 2 * width * head_dim + max(mlp, attention)


def _inner_width(text: Any) -> int:
    """Width of the MLP; with experts, the widths of those that process a token, if that is more."""
    experts = getattr(text, "num_experts_per_tok", 0) * getattr(text, "moe_intermediate_size", 0)
    return max(getattr(text, "intermediate_size", 0), experts + getattr(text, "shared_expert_intermediate_size", 0))
