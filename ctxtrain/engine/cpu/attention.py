"""Causal attention of windows that lie one after the other, with its backward pass written out.

Comes in: queries, keys and values of the tokens of all windows, the rotation of each place, and which windows are
computed side by side; rows behind the last window belong to none. Goes out: the values that each token attends to
among the tokens of its own window so far.

Legend: B windows, T tokens of the longest, N rows, H query heads, K key-value heads, G = H/K query heads that share
keys and values, P width of a head, C = P/2 pairs of its numbers that are rotated together, E = H·P, i pairs of a window
and a key-value head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, cast

import torch
from torch import Tensor
from torch.autograd import Function

from ctxtrain.engine.cpu.layer_parts import apply, times

LANES = 16  # numbers in a CPU's widest vector; softmax is up to twice as slow on rows that do not end with one
QUERIES = 48  # that are multiplied with all keys before them at a time
SCORES_AT_A_TIME = 1 << 20  # attention scores that are worked on together, in numbers
KEPT_TOKENS = 256  # up to this length attention weights are kept for the backward pass, above they are computed again


def attention(
    q_NHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, groups: Sequence[Neighbours], turns_TC: Tensor, scale: float
) -> Tensor:
    """softmax(scale · q·kᵀ)·v over the window's tokens so far, of shape (N, E), float32.

    Before, q and k, whose numbers are `pairs`, are rotated by the turn of each place.
    """
    q_NHP, k_NKP, v_NKP = q_NHP.float(), k_NKP.float(), v_NKP.float()
    if torch.is_grad_enabled():
        return cast(Tensor, apply(Attention, q_NHP, k_NKP, v_NKP, groups, turns_TC, scale))
    out_NHP = torch.empty_like(q_NHP)
    for its in groups:
        q, k, v = (x.flatten(0, 1) for x in its.turned(q_NHP, k_NKP, v_NKP, turns_TC, scale))
        its.one_after_another(_mixed(q, k, v), out_NHP)
    out_NHP[groups[-1].own.stop :] = 0
    return out_NHP.flatten(1)


def attention_of_last(
    q_BHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, everyone: Neighbours, turns_TC: Tensor, scale: float
) -> Tensor:
    """The same for the last token of each window alone, of shape (B, E)."""
    return cast(Tensor, apply(AttentionOfLast, q_BHP.float(), k_NKP.float(), v_NKP.float(), everyone, turns_TC, scale))


def turn(x: Tensor, turns_C: Tensor) -> None:
    """Rotate, in place, heads of shape (..., P) in which the two numbers of each of C pairs are neighbours.

    `turns_C` holds cos + i·sin (Su et al. 2021, RoFormer, section 3.2), or that times a scale.
    """
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(turns_C)


class Attention(Function):
    """The same, with gradients.

    Scores are computed for blocks of queries and the keys up to them (Dao 2023, FlashAttention-2, section 3.1), which
    saves most of the half that the causal mask throws away. The mask also keeps a window from its padding, which only
    windows that are computed side by side have.
    """

    @staticmethod
    def forward(
        ctx: Any, q_NHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, groups: Any, turns_TC: Tensor, scale: float
    ) -> Tensor:
        ctx.shapes, ctx.groups, ctx.scale = (q_NHP.shape, k_NKP.shape, v_NKP.shape), groups, scale
        out_NHP, saved = torch.empty_like(q_NHP), []
        for its in groups:
            q, k, v = (x.flatten(0, 1) for x in its.turned(q_NHP, k_NKP, v_NKP, turns_TC, scale))
            kept: list[Tensor] = []
            its.one_after_another(_mixed(q, k, v, kept), out_NHP)
            saved += [q, k, v, *kept]
        ctx.save_for_backward(turns_TC, *saved)
        out_NHP[groups[-1].own.stop :] = 0
        return out_NHP.flatten(1)

    @staticmethod
    def backward(ctx: Any, g_NE: Tensor) -> tuple[Tensor | None, ...]:
        turns_TC, *kept = ctx.saved_tensors
        saved, back_TC = iter(kept), turns_TC.conj()
        grads_NHP = [g_NE.new_empty(shape) for shape in ctx.shapes]
        for its in ctx.groups:
            q, k, v = next(saved), next(saved), next(saved)
            g = its.gradient_side_by_side(g_NE.view(ctx.shapes[0])).view_as(q)
            dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
            for group, block in _tiles(len(k), q.shape[1], its.tokens):
                weights = next(saved) if its.tokens <= KEPT_TOKENS else _weights(q, k, group, block)
                q_own, g_own = q[group, :, block].flatten(1, 2), g[group, :, block].flatten(1, 2)
                put = Tensor.copy_ if block.stop == its.tokens else Tensor.add_  # the block with all keys comes first
                put(dv[group, : block.stop], _times_each(weights.mT, g_own.mT))
                dweights = _times_each(g_own, v[group, : block.stop])
                dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
                dq[group, :, block] = _times_each(dscores, k[group, : block.stop].mT).unflatten(1, (q.shape[1], -1))
                put(dk[group, : block.stop], _times_each(dscores.mT, q_own.mT))
            turn(dq, back_TC[: its.tokens] * ctx.scale)
            turn(dk, back_TC[: its.tokens])
            for grad, grad_NHP in zip((dq, dk, dv), grads_NHP, strict=True):
                its.one_after_another(grad, grad_NHP)
        for grad_NHP in grads_NHP:
            grad_NHP[ctx.groups[-1].own.stop :] = 0
        return *grads_NHP, None, None, None


class AttentionOfLast(Function):
    """The same for one query of each window, its last."""

    @staticmethod
    def forward(
        ctx: Any, q_BHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, its: Neighbours, turns_TC: Tensor, scale: float
    ) -> Tensor:
        q_BHP, turns_B1C = q_BHP.clone(), turns_TC[its.lengths_B - 1, None] * scale
        k_BKTP, v_BKTP = its.side_by_side(k_NKP), its.side_by_side(v_NKP)
        turn(q_BHP, turns_B1C)
        turn(k_BKTP, turns_TC)
        q_BKGP = q_BHP.unflatten(1, (k_BKTP.shape[1], -1))
        scores_BKGT = (q_BKGP @ k_BKTP.mT).masked_fill_(~its.read_BT[:, None, None], -torch.inf)
        weights_BKGT = torch.softmax(scores_BKGT, dim=-1, out=scores_BKGT)
        ctx.shape, ctx.its = k_NKP.shape, its
        ctx.save_for_backward(q_BKGP, k_BKTP, v_BKTP, weights_BKGT, turns_B1C, turns_TC)
        return (weights_BKGT @ v_BKTP).flatten(1)

    @staticmethod
    def backward(ctx: Any, g_BE: Tensor) -> tuple[Tensor | None, ...]:
        q_BKGP, k_BKTP, v_BKTP, weights_BKGT, turns_B1C, turns_TC = ctx.saved_tensors
        g_BKGP = g_BE.view_as(q_BKGP)
        dweights_BKGT = g_BKGP @ v_BKTP.mT
        dscores_BKGT = torch.ops.aten._softmax_backward_data(dweights_BKGT, weights_BKGT, -1, weights_BKGT.dtype)
        dq_BHP = (dscores_BKGT @ k_BKTP).flatten(1, 2)
        dk_BKTP, dv_BKTP = dscores_BKGT.mT @ q_BKGP, weights_BKGT.mT @ g_BKGP
        turn(dq_BHP, turns_B1C.conj())
        turn(dk_BKTP, turns_TC.conj())
        dk_NKP, dv_NKP = g_BE.new_zeros(ctx.shape), g_BE.new_zeros(ctx.shape)
        ctx.its.one_after_another(dk_BKTP, dk_NKP)
        ctx.its.one_after_another(dv_BKTP, dv_NKP)
        return dq_BHP, dk_NKP, dv_NKP, None, None, None


def _mixed(q: Tensor, k: Tensor, v: Tensor, kept: list[Tensor] | None = None) -> Tensor:
    """Of shape (i, G, T, P), of q of that shape and k and v of shape (i, T, P); `kept` gets weights worth keeping."""
    (_, shared, tokens, _), out = q.shape, torch.empty_like(q)
    for group, block in _tiles(len(k), shared, tokens):
        weights = _weights(q, k, group, block)
        out[group, :, block] = _times_each(weights, v[group, : block.stop].mT).unflatten(1, (shared, -1))
        if kept is not None and tokens <= KEPT_TOKENS:
            kept.append(weights)
    return out


def _weights(q: Tensor, k: Tensor, group: slice, block: slice) -> Tensor:
    """Of shape (i, G·queries, keys)."""
    scores = _times_each(q[group, :, block].flatten(1, 2), k[group, : block.stop])
    own = scores.unflatten(1, (q.shape[1], -1))[..., block.start :]
    own += _future(block.stop - block.start, q.device)
    return torch.softmax(scores, dim=-1, out=scores)


class Neighbours:
    """Windows whose attention is computed side by side, as if all had the same number of tokens.

    A shorter window repeats its last token. What comes of that nobody reads, as causal attention looks back only.
    """

    def __init__(self, start: int, lengths: Sequence[int], device: torch.device) -> None:
        self.tokens = max(lengths)
        self.lengths_B = lengths_B = torch.tensor(lengths, device=device)
        self.own = slice(start, start + sum(lengths))
        places_T = torch.arange(self.tokens, device=device)
        self.read_BT = places_T < lengths_B[:, None]
        first_B = start + lengths_B.cumsum(0) - lengths_B
        self._row_BT = first_B[:, None] + places_T.minimum(lengths_B[:, None] - 1)
        self._there: dict[int, Tensor] = {}
        self._back: dict[int, Tensor] = {}

    @classmethod
    def of(cls, lengths: Sequence[int], heads: int, device: torch.device) -> list[Neighbours]:
        """All windows in groups, each as large as its scores allow."""
        longest = max(lengths)
        size = max(1, SCORES_AT_A_TIME // (heads * longest * min(longest, QUERIES)))
        starts = [0, *accumulate(lengths)]
        return [cls(starts[first], lengths[first : first + size], device) for first in range(0, len(lengths), size)]

    def side_by_side(self, x_NHP: Tensor) -> Tensor:
        """Of shape (B, H, T, P), from the rows of all windows."""
        _, count, width = x_NHP.shape
        if count not in self._there:
            heads_H = torch.arange(count, device=x_NHP.device)
            self._there[count] = (self._row_BT[:, None] * count + heads_H[:, None]).flatten()
        return x_NHP.reshape(-1, width).index_select(0, self._there[count]).view(-1, count, self.tokens, width)

    def turned(
        self, q_NHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, turns_TC: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of shape (B, K, G, T, P), rotated and scaled, rotated keys and values of shape (B, K, T, P)."""
        q_BHTP, k_BKTP, v_BKTP = (self.side_by_side(x) for x in (q_NHP, k_NKP, v_NKP))
        turn(q_BHTP, turns_TC[: self.tokens] * scale)
        turn(k_BKTP, turns_TC[: self.tokens])
        return q_BHTP.unflatten(1, (k_BKTP.shape[1], -1)), k_BKTP, v_BKTP

    def gradient_side_by_side(self, g_NHP: Tensor) -> Tensor:
        """The same with zeros where a window is shorter."""
        _, count, width = g_NHP.shape
        surplus = self._places(count, ~self.read_BT)
        return self.side_by_side(g_NHP).view(-1, width).index_fill_(0, surplus, 0)

    def one_after_another(self, x: Tensor, out_NHP: Tensor) -> None:
        """Undoes `side_by_side`, into the rows of these windows."""
        _, count, width = out_NHP.shape
        if count not in self._back:
            self._back[count] = self._places(count, self.read_BT)
        own_MP = out_NHP[self.own].view(-1, width)
        torch.index_select(x.view(-1, width), 0, self._back[count], out=own_MP)

    def _places(self, count: int, of_BT: Tensor) -> Tensor:
        """Where the tokens `of_BT` stand side by side, token by token."""
        windows, tokens = of_BT.shape
        place_BHT = torch.arange(windows * count * tokens, device=of_BT.device).view(windows, count, tokens)
        return place_BHT.transpose(1, 2)[of_BT].flatten()


def _times_each(a: Tensor, b: Tensor) -> Tensor:
    """a_i · b_iᵀ of shape (i, M, N), of (i, M, P) and (i, N, P)."""
    return times(a[0], b[0])[None] if len(a) == 1 else torch.bmm(a, b.mT)


@lru_cache(2 * QUERIES)
def _future(queries: int, device: torch.device) -> Tensor:
    """-inf where a key lies behind its query: of shape (queries, queries)."""
    return torch.full((queries, queries), -torch.inf, device=device).triu(1)


def _tiles(groups: int, shared: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Which i and which queries are worked on together: blocks of queries, each with all keys up to its last.

    The last queries come first.
    """
    together = _together(shared, tokens)
    for first in range(0, groups, together):
        for start, stop in reversed(_blocks(tokens)):
            yield slice(first, first + together), slice(start, stop)


def _blocks(tokens: int) -> list[tuple[int, int]]:
    """Where blocks of like size, with about as many queries as are wanted, start and stop."""
    blocks = -(-tokens // QUERIES)
    return list(pairwise(min(tokens, -(-tokens // LANES) * number // blocks * LANES) for number in range(blocks + 1)))


def _together(shared: int, tokens: int) -> int:
    """How many i have so many scores."""
    return max(1, SCORES_AT_A_TIME // (shared * tokens * min(tokens, QUERIES)))
