"""Causal attention of windows that lie one after the other, with its backward pass written out.

Comes in: queries, keys and values of the tokens of all windows, and which windows are computed side by side; rows
behind the last window belong to none. Goes out: the values that each token attends to among the tokens of its own
window so far.

Legend: B windows, T tokens of the longest, N rows, H query heads, K key-value heads, G = H/K query heads that share
keys and values, P width of a head, E = H·P, i pairs of a window and a key-value head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.autograd import Function

from ml.model.passes import apply, times

LANES = 16  # numbers in a CPU's widest vector; softmax is up to twice as slow on rows that do not end with one
QUERIES = 48  # that are multiplied with all keys before them at a time
QUERIES_OF_LONG = 96  # the same above KEPT_TOKENS
QUERIES_BY_NUMPY = 32  # the same where numpy multiplies
SCORES_AT_A_TIME = 1 << 18  # attention scores that stay in a core's cache, in numbers
LARGEST_BY_NUMPY = 1 << 18  # multiplications of a product; OpenBLAS gives those that have more to threads of its own
KEPT_TOKENS = 256  # up to this length attention weights are kept for the backward pass, above they are computed again


def attention(q_NHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, groups: Sequence[Neighbours]) -> Tensor:
    """softmax(q·kᵀ)·v over the window's tokens so far, for q that is scaled already; of shape (N, E)."""
    largest = QUERIES_BY_NUMPY * max(its.tokens for its in groups) * q_NHP.shape[2]
    if _answers_alone() and largest <= LARGEST_BY_NUMPY:
        return _by_numpy(q_NHP, k_NKP, v_NKP.to(q_NHP.dtype), groups)
    return cast(Tensor, apply(Attention, q_NHP, k_NKP, v_NKP, groups))


class Attention(Function):
    """The same, with gradients and on all threads.

    Scores are computed for blocks of queries and the keys up to them (Dao 2023, FlashAttention-2, section 3.1), which
    saves most of the half that the causal mask throws away. The mask also keeps a window from its padding, which only
    windows that are computed side by side have.
    """

    @staticmethod
    def forward(ctx: Any, q_NHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, groups: Sequence[Neighbours]) -> Tensor:
        key_heads, shared = k_NKP.shape[1], q_NHP.shape[1] // k_NKP.shape[1]
        ctx.dtype, ctx.groups, ctx.heads = v_NKP.dtype, groups, (key_heads, shared)
        out_NHP, saved = torch.empty_like(q_NHP), []
        for its in groups:
            q = its.side_by_side(q_NHP).unflatten(1, (key_heads, shared)).flatten(0, 1)
            k, v = (its.side_by_side(x_NKP).to(q.dtype).flatten(0, 1) for x_NKP in (k_NKP, v_NKP))
            out, kept = torch.empty_like(q), []
            for group, block in _tiles(len(k), shared, its.tokens):
                weights = Attention._weights(q, k, group, block)
                out[group, :, block] = _times_each(weights, v[group, : block.stop].mT).unflatten(1, (shared, -1))
                kept.append(weights)
            its.one_after_another(out, out_NHP)
            if any(ctx.needs_input_grad):
                saved += [q, k, v, *(kept if its.tokens <= KEPT_TOKENS else [])]
        ctx.save_for_backward(*saved)
        out_NHP[groups[-1].own.stop :] = 0
        return out_NHP.flatten(1)

    @staticmethod
    def _weights(q: Tensor, k: Tensor, group: slice, block: slice) -> Tensor:
        """Of shape (i, G·queries, keys)."""
        scores = _times_each(q[group, :, block].flatten(1, 2), k[group, : block.stop])
        own = scores.unflatten(1, (q.shape[1], -1))[..., block.start :]
        own += _future(block.stop - block.start, q.device)
        return torch.softmax(scores, dim=-1, out=scores)

    @staticmethod
    def backward(ctx: Any, g_NE: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        saved, (key_heads, shared) = iter(ctx.saved_tensors), ctx.heads
        g_NHP = g_NE.unflatten(1, (key_heads * shared, -1))
        dq_NHP, dk_NKP, dv_NKP = (
            g_NHP.new_empty(len(g_NE), heads, g_NHP.shape[2]) for heads in (key_heads * shared, key_heads, key_heads)
        )
        for its in ctx.groups:
            q, k, v = next(saved), next(saved), next(saved)
            g = its.gradient_side_by_side(g_NHP).view_as(q)
            dq, dk, dv = torch.empty_like(q), torch.zeros_like(k), torch.zeros_like(v)
            for group, block in _tiles(len(k), shared, its.tokens):
                weights = next(saved) if its.tokens <= KEPT_TOKENS else Attention._weights(q, k, group, block)
                q_own, g_own = q[group, :, block].flatten(1, 2), g[group, :, block].flatten(1, 2)
                dv[group, : block.stop] += _times_each(weights.mT, g_own.mT)
                dweights = _times_each(g_own, v[group, : block.stop])
                dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
                dq[group, :, block] = _times_each(dscores, k[group, : block.stop].mT).unflatten(1, (shared, -1))
                dk[group, : block.stop] += _times_each(dscores.mT, q_own.mT)
            for grad, grad_NHP in ((dq, dq_NHP), (dk, dk_NKP), (dv, dv_NKP)):
                its.one_after_another(grad, grad_NHP)
        for grad_NHP in (dq_NHP, dk_NKP, dv_NKP):
            grad_NHP[ctx.groups[-1].own.stop :] = 0
        return dq_NHP, dk_NKP, dv_NKP.to(ctx.dtype), None


def _by_numpy(q_NHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, groups: Sequence[Neighbours]) -> Tensor:
    """The same for answers alone, by this thread alone.

    OpenBLAS multiplies many small matrices sooner than MKL, and numpy's calls are short, which matters to threads that
    wait for the interpreter's lock.
    """
    key_heads, out_NHP = k_NKP.shape[1], torch.empty_like(q_NHP)
    for its in groups:
        q_BKGTP = its.side_by_side(q_NHP).unflatten(1, (key_heads, -1)).numpy()
        k_BK1TP, v_BK1TP = (its.side_by_side(x_NKP)[:, :, None].numpy() for x_NKP in (k_NKP, v_NKP))
        out_BKGTP = np.empty_like(q_BKGTP)
        for start, stop in _blocks(its.tokens, QUERIES_BY_NUMPY):
            scores = torch.empty(*q_BKGTP.shape[:3], stop - start, stop)
            np.matmul(q_BKGTP[..., start:stop, :], k_BK1TP[..., :stop, :].mT, out=scores.numpy())
            scores[..., start:] += _future(stop - start, q_NHP.device)
            weights = torch.softmax(scores, dim=-1, out=scores).numpy()
            np.matmul(weights, v_BK1TP[..., :stop, :], out=out_BKGTP[..., start:stop, :])
        its.one_after_another(torch.from_numpy(out_BKGTP), out_NHP)
    out_NHP[groups[-1].own.stop :] = 0
    return out_NHP.flatten(1)


class Neighbours:
    """Windows whose attention is computed side by side, as if all had the same number of tokens.

    A shorter window repeats its last token. What comes of that nobody reads, as causal attention looks back only.
    """

    def __init__(self, start: int, lengths: Sequence[int], head_counts: set[int], device: torch.device) -> None:
        lengths_B = torch.tensor(lengths, device=device)
        windows, self.tokens = len(lengths), max(lengths)
        self.own = slice(start, start + sum(lengths))
        places_BT = torch.arange(self.tokens, device=device).expand(windows, -1)
        read_BT = places_BT < lengths_B[:, None]
        first_B = start + lengths_B.cumsum(0) - lengths_B
        row_BT = first_B[:, None] + places_BT.minimum(lengths_B[:, None] - 1)
        self._there, self._back, self._surplus = {}, {}, {}
        for count in head_counts:
            heads_H = torch.arange(count, device=device)
            self._there[count] = (row_BT[:, None] * count + heads_H[:, None]).flatten()
            place_BHT = torch.arange(windows * count * self.tokens, device=device).view(windows, count, -1)
            self._back[count] = place_BHT.transpose(1, 2)[read_BT].flatten()
            self._surplus[count] = place_BHT.transpose(1, 2)[~read_BT].flatten()

    @classmethod
    def of(cls, lengths: Sequence[int], heads: int, key_heads: int, device: torch.device) -> list[Neighbours]:
        """All windows in groups, each as large as leaves its scores in a core's cache."""
        longest = max(lengths)
        queries = QUERIES_BY_NUMPY if _answers_alone() else _queries(longest)
        size = max(1, SCORES_AT_A_TIME // (heads * longest * min(longest, queries)))
        starts = [0, *accumulate(lengths)]
        return [
            cls(starts[first], lengths[first : first + size], {heads, key_heads}, device)
            for first in range(0, len(lengths), size)
        ]

    def side_by_side(self, x_NHP: Tensor) -> Tensor:
        """Of shape (B, H, T, P), from the rows of all windows."""
        _, count, width = x_NHP.shape
        return x_NHP.reshape(-1, width).index_select(0, self._there[count]).view(-1, count, self.tokens, width)

    def gradient_side_by_side(self, g_NHP: Tensor) -> Tensor:
        """The same with zeros where a window is shorter."""
        _, count, width = g_NHP.shape
        return self.side_by_side(g_NHP).view(-1, width).index_fill_(0, self._surplus[count], 0)

    def one_after_another(self, x: Tensor, out_NHP: Tensor) -> None:
        """Undoes `side_by_side`, into the rows of these windows."""
        _, count, width = out_NHP.shape
        own_MP = out_NHP[self.own].view(-1, width)
        torch.index_select(x.view(-1, width), 0, self._back[count], out=own_MP)


def _answers_alone() -> bool:
    return torch.is_inference_mode_enabled() and torch.get_num_threads() == 1


def _times_each(a: Tensor, b: Tensor) -> Tensor:
    """a_i · b_iᵀ of shape (i, M, N), of (i, M, P) and (i, N, P)."""
    return times(a[0], b[0])[None] if len(a) == 1 else torch.bmm(a, b.mT)


def _future(queries: int, device: torch.device) -> Tensor:
    """-inf where a key lies behind its query: of shape (queries, queries)."""
    return torch.full((queries, queries), -torch.inf, device=device).triu(1)


def _tiles(groups: int, shared: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Which i and which queries are worked on together: blocks of queries, each with all keys up to its last."""
    together = _together(shared, tokens)
    for first in range(0, groups, together):
        for start, stop in _blocks(tokens, _queries(tokens)):
            yield slice(first, first + together), slice(start, stop)


def _blocks(tokens: int, queries: int) -> list[tuple[int, int]]:
    """Where blocks of like size, with about so many queries, start and stop."""
    blocks = -(-tokens // queries)
    return list(pairwise(min(tokens, -(-tokens // LANES) * number // blocks * LANES) for number in range(blocks + 1)))


def _together(shared: int, tokens: int) -> int:
    """How many i have scores that stay in a core's cache."""
    return max(1, SCORES_AT_A_TIME // (shared * tokens * min(tokens, _queries(tokens))))


def _queries(tokens: int) -> int:
    return QUERIES if tokens <= KEPT_TOKENS else QUERIES_OF_LONG
