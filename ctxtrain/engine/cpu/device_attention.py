"""Causal attention over concatenated windows on a GPU, by torch's kernels.

Input: the lengths of the windows, and queries, keys and values of all tokens. Output: as `attention.py`, which holds
the code for CPUs. The host makes all indices from the lengths and copies them once; nothing is read back.

Two ways: `varlen`, one kernel for windows of any lengths, where torch has it for the model; otherwise `blocks`: windows
of similar lengths are padded to the longest of their block, for `scaled_dot_product_attention`. Both run on any device,
and the tests compare `blocks` with transformers on a CPU. Neither was run on a GPU yet: there, `does_varlen_agree`
compares the two, and the probe of `model/agreement.py` compares the engine with transformers.

Legend: B windows, T tokens of the longest, N tokens of all windows, M the same in padded blocks, H query heads, K
key-value heads, G = H/K, P width of a head, C = P/2 pairs of its numbers that are rotated together, E = H·P.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, cast

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from torch.autograd import Function

from ctxtrain.data.batches import copy_to_device
from ctxtrain.engine.cpu.layer_parts import apply

Kernel = Literal["varlen", "blocks"]
Ints = NDArray[np.int64]

MAX_PADDING = 1.25  # longest window of a block by its shortest
VARLEN_WIDTHS = range(8, 257, 8)  # of a head, by FlashAttention's kernels
VARLEN_ARGUMENTS = {"scale", "window_size", "enable_gqa"}


@cache
def varlen_attention() -> Callable[..., Tensor] | None:
    """Torch's attention over windows of any lengths, if this torch has it with the arguments used here."""
    try:
        from torch.nn.attention.varlen import varlen_attn
    except ImportError:
        return None
    has_arguments = inspect.signature(varlen_attn).parameters.keys() >= VARLEN_ARGUMENTS
    return cast(Callable[..., Tensor], varlen_attn) if has_arguments else None


def select_kernel(device: torch.device, dtype: torch.dtype, width: int) -> Kernel:
    """`varlen` where FlashAttention has a kernel for the model: half precision, heads of these widths, a recent GPU."""
    fits = device.type == "cuda" and dtype in (torch.bfloat16, torch.float16) and width in VARLEN_WIDTHS
    if fits and torch.cuda.get_device_capability(device) >= (8, 0) and does_varlen_agree(device, dtype, width):
        return "varlen"
    return "blocks"


@cache
def does_varlen_agree(device: torch.device, dtype: torch.dtype, width: int) -> bool:
    """Whether torch's varlen attention runs on the device, with the outputs and gradients of `blocks`."""
    if varlen_attention() is None:
        return False
    lengths, rope_TC = [5, 70, 33], torch.ones(70, width // 2, dtype=torch.complex64, device=device)
    generator = np.random.default_rng(0)
    q_NHP, k_NKP, v_NKP, g_NHP = (
        torch.from_numpy(generator.standard_normal((sum(lengths), heads, width))).to(device, dtype)
        for heads in (4, 2, 2, 4)
    )
    results = []
    kernels: tuple[Kernel, ...] = ("varlen", "blocks")
    for kernel in kernels:
        q, k, v = inputs = [x.clone().requires_grad_() for x in (q_NHP, k_NKP, v_NKP)]
        try:
            out_NE = DeviceBatch.from_lengths(lengths, kernel, rope_TC).attention(q, k, v, width**-0.5)
            out_NE.backward(g_NHP.flatten(1))
        except RuntimeError:  # torch's answer where it has no such kernel for the device
            return False
        results.append([out_NE.detach(), *(x.grad for x in inputs)])
    return all(
        torch.allclose(cast(Tensor, x).float(), cast(Tensor, y).float(), rtol=0.02, atol=0.05)
        for x, y in zip(*results, strict=True)
    )


@dataclass(frozen=True)
class DeviceBatch:
    """Layout of windows that are concatenated without padding, on a device.

    `token_N` is the position of each token in ids of shape (B, T), `last_B` the row of the last token of each window,
    which the head pools. `row_M` is the row of each place of the padded blocks, and `place_N` the inverse; `all_row_M`
    and `all_place_N` are those of one block of all windows. Padding repeats a window's last token. `rope_NC` holds
    cos + i·sin of each token. `blocks` are the number of windows and of tokens of each block.
    """

    kernel: Kernel
    windows: int
    longest: int
    blocks: list[tuple[int, int]]
    token_N: Tensor
    last_B: Tensor
    ends_B: Tensor
    rope_NC: Tensor
    row_M: Tensor
    place_N: Tensor
    is_padding_M: Tensor
    all_row_M: Tensor
    all_place_N: Tensor
    is_all_padding_M: Tensor

    @classmethod
    def from_lengths(cls, lengths: Sequence[int], kernel: Kernel, rope_TC: Tensor, width: int = 0) -> DeviceBatch:
        """Layout for windows of these lengths, on the device of the RoPE table; ids have `width` columns."""
        length_B = np.asarray(lengths, dtype=np.int64)
        first_B, longest = np.cumsum(length_B) - length_B, int(length_B.max())
        position_N = np.arange(length_B.sum()) - np.repeat(first_B, length_B)
        groups = _similar_lengths(length_B) if kernel == "blocks" else []
        arrays = {
            "token_N": position_N + np.repeat(np.arange(len(length_B)) * (width or longest), length_B),
            "last_B": first_B + length_B - 1,
            "ends_B": np.concatenate([[0], np.cumsum(length_B)]),
            "position_N": position_N,
            **_padded_rows("", first_B, length_B, groups),
            **_padded_rows("all_", first_B, length_B, [np.arange(len(length_B))]),
        }
        moved = copy_to_device(arrays, rope_TC.device)
        return cls(
            kernel,
            len(length_B),
            longest,
            [(len(group), int(length_B[group].max())) for group in groups],
            moved["token_N"],
            moved["last_B"],
            moved["ends_B"].to(torch.int32),
            rope_TC.index_select(0, moved["position_N"]),
            moved["row_M"],
            moved["place_N"],
            moved["is_padding_M"] != 0,
            moved["all_row_M"],
            moved["all_place_N"],
            moved["is_all_padding_M"] != 0,
        )

    def attention(self, q_NHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, scale: float) -> Tensor:
        """softmax(scale · q·kᵀ)·v over the tokens of the window so far, of shape (N, E), after rotating q and k."""
        q_NHP, k_NKP = apply(Rotation, self.rope_NC, q_NHP, k_NKP)
        if self.kernel == "varlen":
            varlen = cast(Callable[..., Tensor], varlen_attention())
            out_NHP = varlen(
                q_NHP, k_NKP, v_NKP, **self.varlen_arguments(), scale=scale, window_size=(-1, 0), enable_gqa=True
            )
            return out_NHP.flatten(1)
        q_M, k_M, v_M = (apply(Move, x, self.row_M, self.place_N, None) for x in (q_NHP, k_NKP, v_NKP))
        sizes = [windows * tokens for windows, tokens in self.blocks]
        outputs = [
            _causal(block, *parts, scale=scale)
            for block, *parts in zip(self.blocks, q_M.split(sizes), k_M.split(sizes), v_M.split(sizes), strict=True)
        ]
        out_M = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return cast(Tensor, apply(Move, out_M, self.place_N, self.row_M, self.is_padding_M)).flatten(1)

    def varlen_arguments(self) -> dict[str, Any]:
        """Where the windows begin and end, and how long the longest is, as `varlen_attn` takes them."""
        ends = {"cu_seq_q": self.ends_B, "cu_seq_k": self.ends_B}
        return ends | {"max_q": self.longest, "max_k": self.longest}

    def last_token_attention(self, q_BHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, scale: float) -> Tensor:
        """`attention` of the last token of each window only, of shape (B, E), in float32."""
        (q_BHP,) = apply(Rotation, self.rope_NC.index_select(0, self.last_B), q_BHP)
        (k_NKP,) = apply(Rotation, self.rope_NC, k_NKP)
        k_BKTP, v_BKTP = (
            apply(Move, x, self.all_row_M, self.all_place_N, None)
            .unflatten(0, (self.windows, self.longest))
            .transpose(1, 2)
            .float()
            for x in (k_NKP, v_NKP)
        )
        q_BKGP = q_BHP.float().unflatten(1, (k_BKTP.shape[1], -1)) * scale
        is_padding_B11T = self.is_all_padding_M.view(self.windows, 1, 1, self.longest)
        weights_BKGT = (q_BKGP @ k_BKTP.mT).masked_fill(is_padding_B11T, -torch.inf).softmax(-1)
        out_BE: Tensor = (weights_BKGT @ v_BKTP).flatten(1)
        return out_BE


def _similar_lengths(length_B: Ints) -> list[Ints]:
    """Window numbers in groups of similar length, shortest first."""
    order, groups, start = np.argsort(length_B, kind="stable"), [], 0
    while start < len(order):
        longest = MAX_PADDING * length_B[order[start]]
        stop = int(np.searchsorted(length_B[order], longest, side="right"))
        groups.append(order[start:stop])
        start = stop
    return groups


def _padded_rows(name: str, first_B: Ints, length_B: Ints, groups: Sequence[Ints]) -> dict[str, Ints]:
    """For each place of blocks of these windows, its row and whether it is padding; and for each row its place."""
    rows, padding, starts, start = [np.zeros(0, np.int64)], [np.zeros(0, np.int64)], np.zeros_like(first_B), 0
    for group in groups:
        position_T = np.arange(length_B[group].max())
        rows.append((first_B[group, None] + np.minimum(position_T, length_B[group, None] - 1)).ravel())
        padding.append((position_T >= length_B[group, None]).ravel().astype(np.int64))
        starts[group] = start + np.arange(len(group)) * len(position_T)
        start += len(group) * len(position_T)
    place_N = np.repeat(starts - first_B, length_B) + np.arange(length_B.sum()) if groups else np.zeros(0, np.int64)
    return {
        f"{name}row_M": np.concatenate(rows),
        f"{name}place_N": place_N,
        f"is_{name}padding_M": np.concatenate(padding),
    }


def _causal(block: tuple[int, int], *qkv_M: Tensor, scale: float) -> Tensor:
    """Attention of shape (M, H, P) within a block of (windows, tokens)."""
    q_BHTP, k_BKTP, v_BKTP = (x.unflatten(0, block).transpose(1, 2) for x in qkv_M)
    shares_keys = q_BHTP.dtype != torch.float32
    if not shares_keys:  # no fast kernel of float32 shares keys among heads; another would keep all scores
        shared = q_BHTP.shape[1] // k_BKTP.shape[1]
        k_BKTP, v_BKTP = (x[:, :, None].expand(-1, -1, shared, -1, -1).flatten(1, 2) for x in (k_BKTP, v_BKTP))
    out_BHTP = F.scaled_dot_product_attention(
        q_BHTP, k_BKTP, v_BKTP, is_causal=True, scale=scale, enable_gqa=shares_keys
    )
    return out_BHTP.transpose(1, 2).flatten(0, 1)


class Move(Function):
    """Rows of x by an index, from packed rows to padded places or back; `inverse` is the index of the other way.

    Padding repeats a token. What follows from it is discarded or masked, so it has no gradient: the way to the places
    passes back that of the tokens' own places, and the way back, with `is_padding_M`, gives padding zeros.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, index: Tensor, inverse: Tensor, is_padding_M: Tensor | None) -> Tensor:
        ctx.save_for_backward(inverse, is_padding_M)
        return x.index_select(0, index)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        inverse, is_padding_M = ctx.saved_tensors
        dx = g.index_select(0, inverse)
        if is_padding_M is not None:
            dx.masked_fill_(is_padding_M[:, None, None], 0)
        return dx, None, None, None


class Rotation(Function):
    """Heads whose pairs of numbers (j, C + j) are rotated, computed in float32 (Su et al. 2021, RoFormer)."""

    @staticmethod
    def forward(ctx: Any, rope_NC: Tensor, *heads: Tensor) -> tuple[Tensor, ...]:
        ctx.save_for_backward(rope_NC)
        return _rotate(rope_NC, heads)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (rope_NC,) = ctx.saved_tensors
        return None, *_rotate(rope_NC.conj(), grads)


def _rotate(rope_NC: Tensor, heads: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """All heads are rotated together: on a GPU the number of operations counts."""
    joined = heads[0] if len(heads) == 1 else torch.cat(list(heads), dim=1)
    first, second = joined.float().chunk(2, dim=-1)
    rotated = torch.complex(first, second).mul_(rope_NC[:, None])
    out = torch.empty_like(joined, memory_format=torch.contiguous_format)
    out.unflatten(-1, (2, -1)).copy_(torch.view_as_real(rotated).mT)
    parts: tuple[Tensor, ...] = out.split([x.shape[1] for x in heads], dim=1)
    return parts
