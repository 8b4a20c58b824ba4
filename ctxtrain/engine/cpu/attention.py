"""Causal attention over concatenated windows, with a hand-written backward pass.

Input: queries, keys and values of the tokens of all windows, the RoPE table, and groups of windows that are computed
together. Rows after the last window are padding. Output: for each token, the attention over the tokens of its window up
to it.

Legend: B windows, T tokens of the longest, N rows, H query heads, K key-value heads, G = H/K query heads that share
keys and values, P width of a head, C = P/2 pairs of its numbers that are rotated together, E = H·P, i combinations of a
window and a key-value head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Function

from ctxtrain.engine.cpu.layer_parts import apply, matmul_t

LANES = 16  # floats in a CPU's widest vector; softmax is up to twice as slow on rows that do not end with one
QUERY_BLOCK = 48  # queries that are multiplied with all keys up to them at a time
MAX_SCORES = 1 << 20  # attention scores computed together
MAX_SAVED_TOKENS = 256  # attention weights of longer windows are recomputed in the backward pass instead of saved


def attention(
    q_NHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, groups: Sequence[WindowGroup], rope_TC: Tensor, scale: float
) -> Tensor:
    """softmax(scale · q·kᵀ)·v over the tokens of the window so far, of shape (N, E), float32.

    q and k have the order of `interleave_pairs`; this function rotates them first.
    """
    q_NHP, k_NKP, v_NKP = q_NHP.float(), k_NKP.float(), v_NKP.float()
    if torch.is_grad_enabled():
        return cast(Tensor, apply(CausalAttention, q_NHP, k_NKP, v_NKP, groups, rope_TC, scale))
    out_NHP = torch.empty_like(q_NHP)
    for group in groups:
        q, k, v = (x.flatten(0, 1) for x in group.rotated_qkv(q_NHP, k_NKP, v_NKP, rope_TC, scale))
        group.scatter(_attend(q, k, v), out_NHP)
    out_NHP[groups[-1].rows.stop :] = 0
    return out_NHP.flatten(1)


def last_token_attention(
    q_BHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, windows: WindowGroup, rope_TC: Tensor, scale: float
) -> Tensor:
    """`attention` of the last token of each window only, of shape (B, E)."""
    arguments = q_BHP.float(), k_NKP.float(), v_NKP.float(), windows, rope_TC, scale
    return cast(Tensor, apply(LastTokenAttention, *arguments))


def apply_rope(x: Tensor, rope_C: Tensor) -> None:
    """Rotate, in place, heads of shape (..., P) in which the two numbers of each of C pairs are adjacent.

    `rope_C` holds cos + i·sin (Su et al. 2021, RoFormer, section 3.2), possibly times a scale.
    """
    torch.view_as_complex(x.unflatten(-1, (-1, 2))).mul_(rope_C)


class CausalAttention(Function):
    """`attention` with gradients.

    Computes scores for blocks of queries and the keys up to them (Dao 2023, FlashAttention-2, section 3.1), which
    avoids most of the half that the causal mask discards. The causal mask also excludes padding, which lies behind the
    tokens.
    """

    @staticmethod
    def forward(
        ctx: Any, q_NHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, groups: Any, rope_TC: Tensor, scale: float
    ) -> Tensor:
        ctx.shapes, ctx.groups, ctx.scale = (q_NHP.shape, k_NKP.shape, v_NKP.shape), groups, scale
        out_NHP, saved = torch.empty_like(q_NHP), []
        for group in groups:
            q, k, v = (x.flatten(0, 1) for x in group.rotated_qkv(q_NHP, k_NKP, v_NKP, rope_TC, scale))
            saved_weights: list[Tensor] = []
            group.scatter(_attend(q, k, v, saved_weights), out_NHP)
            saved += [q, k, v, *saved_weights]
        ctx.save_for_backward(rope_TC, *saved)
        out_NHP[groups[-1].rows.stop :] = 0
        return out_NHP.flatten(1)

    @staticmethod
    def backward(ctx: Any, g_NE: Tensor) -> tuple[Tensor | None, ...]:
        rope_TC, *tensors = ctx.saved_tensors
        saved, inverse_TC = iter(tensors), rope_TC.conj()
        grads_NHP = [g_NE.new_empty(shape) for shape in ctx.shapes]
        for group in ctx.groups:
            q, k, v = next(saved), next(saved), next(saved)
            g = group.gather_gradient(g_NE.view(ctx.shapes[0])).view_as(q)
            dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
            for tile, block in _tiles(len(k), q.shape[1], group.tokens):
                weights = next(saved) if group.tokens <= MAX_SAVED_TOKENS else _attention_weights(q, k, tile, block)
                q_block, g_block = q[tile, :, block].flatten(1, 2), g[tile, :, block].flatten(1, 2)
                # The block that reaches all keys comes first: it writes every gradient, and later blocks add.
                put = Tensor.copy_ if block.stop == group.tokens else Tensor.add_
                put(dv[tile, : block.stop], _batched_matmul_t(weights.mT, g_block.mT))
                dweights = _batched_matmul_t(g_block, v[tile, : block.stop])
                dscores = torch.ops.aten._softmax_backward_data(dweights, weights, -1, weights.dtype)
                dq_block = _batched_matmul_t(dscores, k[tile, : block.stop].mT)
                dq[tile, :, block] = dq_block.unflatten(1, (q.shape[1], -1))
                put(dk[tile, : block.stop], _batched_matmul_t(dscores.mT, q_block.mT))
            apply_rope(dq, inverse_TC[: group.tokens] * ctx.scale)
            apply_rope(dk, inverse_TC[: group.tokens])
            for grad, grad_NHP in zip((dq, dk, dv), grads_NHP, strict=True):
                group.scatter(grad, grad_NHP)
        for grad_NHP in grads_NHP:
            grad_NHP[ctx.groups[-1].rows.stop :] = 0
        return *grads_NHP, None, None, None


class LastTokenAttention(Function):
    """`last_token_attention` with gradients."""

    @staticmethod
    def forward(
        ctx: Any, q_BHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, windows: WindowGroup, rope_TC: Tensor, scale: float
    ) -> Tensor:
        q_BHP, rope_B1C = q_BHP.clone(), rope_TC[windows.lengths_B - 1, None] * scale
        k_BKTP, v_BKTP = windows.gather(k_NKP), windows.gather(v_NKP)
        apply_rope(q_BHP, rope_B1C)
        apply_rope(k_BKTP, rope_TC)
        q_BKGP = q_BHP.unflatten(1, (k_BKTP.shape[1], -1))
        scores_BKGT = (q_BKGP @ k_BKTP.mT).masked_fill_(~windows.is_token_BT[:, None, None], -torch.inf)
        weights_BKGT = torch.softmax(scores_BKGT, dim=-1, out=scores_BKGT)
        ctx.shape, ctx.windows = k_NKP.shape, windows
        ctx.save_for_backward(q_BKGP, k_BKTP, v_BKTP, weights_BKGT, rope_B1C, rope_TC)
        return (weights_BKGT @ v_BKTP).flatten(1)

    @staticmethod
    def backward(ctx: Any, g_BE: Tensor) -> tuple[Tensor | None, ...]:
        q_BKGP, k_BKTP, v_BKTP, weights_BKGT, rope_B1C, rope_TC = ctx.saved_tensors
        g_BKGP = g_BE.view_as(q_BKGP)
        dweights_BKGT = g_BKGP @ v_BKTP.mT
        dscores_BKGT = torch.ops.aten._softmax_backward_data(dweights_BKGT, weights_BKGT, -1, weights_BKGT.dtype)
        dq_BHP = (dscores_BKGT @ k_BKTP).flatten(1, 2)
        dk_BKTP, dv_BKTP = dscores_BKGT.mT @ q_BKGP, weights_BKGT.mT @ g_BKGP
        apply_rope(dq_BHP, rope_B1C.conj())
        apply_rope(dk_BKTP, rope_TC.conj())
        dk_NKP, dv_NKP = g_BE.new_zeros(ctx.shape), g_BE.new_zeros(ctx.shape)
        ctx.windows.scatter(dk_BKTP, dk_NKP)
        ctx.windows.scatter(dv_BKTP, dv_NKP)
        return dq_BHP, dk_NKP, dv_NKP, None, None, None


def _attend(q: Tensor, k: Tensor, v: Tensor, saved: list[Tensor] | None = None) -> Tensor:
    """Attention of shape (i, G, T, P), for q of that shape and k and v of shape (i, T, P).

    Appends attention weights to `saved` if they are worth saving.
    """
    (_, shared, tokens, _), out = q.shape, torch.empty_like(q)
    for tile, block in _tiles(len(k), shared, tokens):
        weights = _attention_weights(q, k, tile, block)
        out[tile, :, block] = _batched_matmul_t(weights, v[tile, : block.stop].mT).unflatten(1, (shared, -1))
        if saved is not None and tokens <= MAX_SAVED_TOKENS:
            saved.append(weights)
    return out


def _attention_weights(q: Tensor, k: Tensor, tile: slice, block: slice) -> Tensor:
    """Attention weights of shape (i, G·queries, keys)."""
    scores = _batched_matmul_t(q[tile, :, block].flatten(1, 2), k[tile, : block.stop])
    diagonal = scores.unflatten(1, (q.shape[1], -1))[..., block.start :]
    diagonal += _causal_mask(block.stop - block.start, q.device)
    return torch.softmax(scores, dim=-1, out=scores)


class WindowGroup:
    """Windows whose attention is computed together, padded to the same number of tokens.

    Padding repeats the last token of a window. Its results are discarded, and causal attention hides it from the
    tokens.
    """

    def __init__(self, start: int, lengths: Sequence[int]) -> None:
        self.tokens = max(lengths)
        lengths_B = np.asarray(lengths, dtype=np.int64)
        self.rows = slice(start, start + sum(lengths))
        positions_T = np.arange(self.tokens)
        self._is_token_BT = positions_T < lengths_B[:, None]
        first_B = start + lengths_B.cumsum() - lengths_B
        self._row_BT = torch.from_numpy(first_B[:, None] + np.minimum(positions_T, lengths_B[:, None] - 1))
        self.lengths_B, self.is_token_BT = torch.from_numpy(lengths_B), torch.from_numpy(self._is_token_BT)
        self._gather_index: dict[int, Tensor] = {}  # by number of heads
        self._scatter_index: dict[int, Tensor] = {}
        self._padding_index: dict[int, Tensor] = {}

    @classmethod
    def split(cls, lengths: Sequence[int], heads: int) -> list[WindowGroup]:
        """Divide all windows into groups, each as large as `MAX_SCORES` allows."""
        longest = max(lengths)
        size = max(1, MAX_SCORES // (heads * longest * min(longest, QUERY_BLOCK)))
        starts = [0, *accumulate(lengths)]
        return [cls(starts[first], lengths[first : first + size]) for first in range(0, len(lengths), size)]

    def gather(self, x_NHP: Tensor) -> Tensor:
        """Rows of these windows as a padded tensor of shape (B, H, T, P)."""
        _, count, width = x_NHP.shape
        if count not in self._gather_index:
            heads_H = torch.arange(count)
            self._gather_index[count] = (self._row_BT[:, None] * count + heads_H[:, None]).flatten()
        return x_NHP.reshape(-1, width).index_select(0, self._gather_index[count]).view(-1, count, self.tokens, width)

    def rotated_qkv(
        self, q_NHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, rope_TC: Tensor, scale: float
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Rotated and scaled queries (B, K, G, T, P), rotated keys and plain values (B, K, T, P)."""
        q_BHTP, k_BKTP, v_BKTP = (self.gather(x) for x in (q_NHP, k_NKP, v_NKP))
        apply_rope(q_BHTP, rope_TC[: self.tokens] * scale)
        apply_rope(k_BKTP, rope_TC[: self.tokens])
        return q_BHTP.unflatten(1, (k_BKTP.shape[1], -1)), k_BKTP, v_BKTP

    def gather_gradient(self, g_NHP: Tensor) -> Tensor:
        """`gather`, with zeros in the padding."""
        _, count, width = g_NHP.shape
        if count not in self._padding_index:
            self._padding_index[count] = _padded_index(count, ~self._is_token_BT)
        return self.gather(g_NHP).view(-1, width).index_fill_(0, self._padding_index[count], 0)

    def scatter(self, x: Tensor, out_NHP: Tensor) -> None:
        """Inverse of `gather`: write the tokens of x into the rows of these windows."""
        _, count, width = out_NHP.shape
        if count not in self._scatter_index:
            self._scatter_index[count] = _padded_index(count, self._is_token_BT)
        out_MP = out_NHP[self.rows].view(-1, width)
        torch.index_select(x.view(-1, width), 0, self._scatter_index[count], out=out_MP)


def _padded_index(count: int, selected_BT: NDArray[np.bool_]) -> Tensor:
    """Flat positions of the selected tokens in a gathered tensor of `count` heads, token by token."""
    windows, tokens = selected_BT.shape
    index_BHT = np.arange(windows * count * tokens).reshape(windows, count, tokens)
    return torch.from_numpy(index_BHT.transpose(0, 2, 1)[selected_BT].ravel())


def _batched_matmul_t(a: Tensor, b: Tensor) -> Tensor:
    """a_i · b_iᵀ of shape (i, M, N), for a of shape (i, M, P) and b of shape (i, N, P)."""
    return matmul_t(a[0], b[0])[None] if len(a) == 1 else torch.bmm(a, b.mT)


@lru_cache(2 * QUERY_BLOCK)
def _causal_mask(queries: int, device: torch.device) -> Tensor:
    """Mask of shape (queries, queries) with -inf where a key follows its query."""
    return torch.full((queries, queries), -torch.inf, device=device).triu(1)


def _tiles(pairs: int, shared: int, tokens: int) -> Iterator[tuple[slice, slice]]:
    """Slices of i and of queries that are computed together; a block of queries reads all keys up to its last query.

    For each slice of i, the last queries come first.
    """
    size = _pairs_per_tile(shared, tokens)
    for first in range(0, pairs, size):
        for start, stop in reversed(query_blocks(tokens)):
            yield slice(first, first + size), slice(start, stop)


def query_blocks(tokens: int) -> list[tuple[int, int]]:
    """Start and stop of blocks of similar size, with about `QUERY_BLOCK` queries each."""
    blocks = -(-tokens // QUERY_BLOCK)
    return list(pairwise(min(tokens, -(-tokens // LANES) * number // blocks * LANES) for number in range(blocks + 1)))


def _pairs_per_tile(shared: int, tokens: int) -> int:
    """Number of i that together have at most `MAX_SCORES` scores."""
    return max(1, MAX_SCORES // (shared * tokens * min(tokens, QUERY_BLOCK)))
