"""Causal attention of windows that lie one after the other, with its backward pass written out.

Comes in: queries, keys and values of the tokens of all windows, and the windows' lengths; rows behind the last window
belong to none. Goes out: the values that each token attends to among the tokens of its own window so far.

Legend: B windows, T tokens of the longest, N rows, H query heads, K key-value heads, G = H/K query heads that share
keys and values, P width of a head, E = H·P, i pairs of a window and a key-value head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn.utils.rnn import pad_sequence

from ml.model.passes import times

QUERY_BLOCK = 80  # queries that are multiplied with all keys before them at a time
SCORES_AT_A_TIME = 1 << 18  # attention scores that stay in a core's cache, in numbers
KEPT_TOKENS = 256  # up to this length attention weights are kept for the backward pass, above they are computed again


class Attention(Function):
    """softmax(q·kᵀ)·v over the window's tokens so far, for q that is scaled already; of shape (N, E).

    Scores are computed for blocks of queries and the keys up to them (Dao 2023, FlashAttention-2, section 3.1), which
    saves most of the half that the causal mask throws away. The mask also keeps a window from its padding, which only
    windows that are computed side by side have.
    """

    @staticmethod
    def forward(ctx: Any, q_NHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, lengths: Sequence[int]) -> Tensor:
        key_heads, shared = k_NKP.shape[1], q_NHP.shape[1] // k_NKP.shape[1]
        ctx.dtype, ctx.lengths, ctx.heads = v_NKP.dtype, lengths, (key_heads, shared)
        out_NHP, saved = torch.zeros_like(q_NHP), []
        for own, its in _neighbours(lengths, key_heads, shared):
            q = _side_by_side(q_NHP[own], its).unflatten(1, (key_heads, shared)).flatten(0, 1)
            k, v = (_side_by_side(x_NKP[own].to(q.dtype), its).flatten(0, 1) for x_NKP in (k_NKP, v_NKP))
            out, kept = torch.empty_like(q), []
            for group, block in _tiles(len(k), shared, max(its)):
                weights = Attention._weights(q, k, group, block)
                out[group, :, block] = _times_each(weights, v[group, : block.stop].mT).unflatten(1, (shared, -1))
                kept.append(weights)
            _one_after_another(out, its, out_NHP[own])
            if any(ctx.needs_input_grad):
                saved += [q, k, v, *(kept if max(its) <= KEPT_TOKENS else [])]
        ctx.save_for_backward(*saved)
        return out_NHP.flatten(1)

    @staticmethod
    def _weights(q: Tensor, k: Tensor, group: slice, block: slice) -> Tensor:
        """Of shape (i, G·queries, keys)."""
        scores = _times_each(q[group, :, block].flatten(1, 2), k[group, : block.stop])
        own = scores.unflatten(1, (q.shape[1], -1))[..., block.start :]
        own += torch.full(own.shape[-2:], -torch.inf, device=q.device).triu(1)
        return torch.softmax(scores, dim=-1, out=scores)

    @staticmethod
    def backward(ctx: Any, g_NE: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        saved, (key_heads, shared) = iter(ctx.saved_tensors), ctx.heads
        g_NHP = g_NE.unflatten(1, (key_heads * shared, -1))
        dq_NHP, dk_NKP, dv_NKP = (
            g_NHP.new_zeros(len(g_NE), heads, g_NHP.shape[2]) for heads in (key_heads * shared, key_heads, key_heads)
        )
        for own, its in _neighbours(ctx.lengths, key_heads, shared):
            q, k, v = next(saved), next(saved), next(saved)
            g = _side_by_side(g_NHP[own], its).view_as(q)
            dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for group, block in _tiles(len(k), shared, max(its)):
                weights = next(saved) if max(its) <= KEPT_TOKENS else Attention._weights(q, k, group, block)
                q_own, g_own = q[group, :, block].flatten(1, 2), g[group, :, block].flatten(1, 2)
                dv[group, : block.stop] += _times_each(weights.mT, g_own.mT)
                dweights = _times_each(g_own, v[group, : block.stop])
                dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
                dq[group, :, block] = _times_each(dscores, k[group, : block.stop].mT).unflatten(1, (shared, -1))
                dk[group, : block.stop] += _times_each(dscores.mT, q_own.mT)
            for grad, grad_NHP in ((dq, dq_NHP), (dk, dk_NKP), (dv, dv_NKP)):
                _one_after_another(grad, its, grad_NHP[own])
        return dq_NHP, dk_NKP, dv_NKP.to(ctx.dtype), None


def _times_each(a: Tensor, b: Tensor) -> Tensor:
    """a_i · b_iᵀ of shape (i, M, N), of (i, M, P) and (i, N, P)."""
    return times(a[0], b[0])[None] if len(a) == 1 else torch.bmm(a, b.mT)


def _tiles(groups: int, shared: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Which i and which queries are worked on together: blocks of queries, each with all keys up to its last."""
    together = _together(shared, tokens)
    blocks = -(-tokens // QUERY_BLOCK)
    edges = [tokens * number // blocks for number in range(blocks + 1)]
    for first in range(0, groups, together):
        for start, stop in pairwise(edges):
            yield slice(first, first + together), slice(start, stop)


def _together(shared: int, tokens: int) -> int:
    """How many i have scores that stay in a core's cache."""
    return max(1, SCORES_AT_A_TIME // (shared * tokens * min(tokens, QUERY_BLOCK)))


def _neighbours(lengths: Sequence[int], key_heads: int, shared: int) -> Iterator[tuple[slice, Sequence[int]]]:
    """Windows whose attention is computed side by side, padded to the longest of them: their tokens and lengths."""
    size = max(1, _together(shared, max(lengths)) // key_heads)
    start = 0
    for first in range(0, len(lengths), size):
        own = lengths[first : first + size]
        yield slice(start, start + sum(own)), own
        start += sum(own)


def _side_by_side(x_NHP: Tensor, lengths: Sequence[int]) -> Tensor:
    """Of shape (B, H, T, P), from windows one after the other; those shorter than the longest end in zeros."""
    if min(lengths) == max(lengths):
        padded_BTHP: Tensor = x_NHP.unflatten(0, (len(lengths), -1))
    else:
        padded_BTHP = pad_sequence(x_NHP.split(lengths), batch_first=True)
    return padded_BTHP.transpose(1, 2).contiguous()


def _one_after_another(x: Tensor, lengths: Sequence[int], out_NHP: Tensor) -> None:
    """Undoes `_side_by_side`, into the rows of these windows."""
    x_BHTP = x.view(len(lengths), out_NHP.shape[1], -1, out_NHP.shape[2])
    for x_HTP, own_THP in zip(x_BHTP, out_NHP.split(lengths), strict=True):
        own_THP.copy_(x_HTP[:, : len(own_THP)].transpose(0, 1))
