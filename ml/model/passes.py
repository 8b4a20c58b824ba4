"""Parts of a Qwen layer with LoRA whose backward passes are written out, for models whose own weights are frozen.

Comes in: states and weights. Goes out: what the parts of transformers and PEFT give, with gradients for states and
adapters alone. Little is kept between the two passes, and little memory is walked through.

Legend: B windows, T tokens of the longest, N tokens of all windows, one window after the other, D model width, E, F
width of what goes into and out of a linear layer, H query heads, K key-value heads, G = H/K query heads that share keys
and values, P width of a head, R sum of LoRA ranks; r one
rank, i pairs of a window and a key-value head.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.utils.rnn import pad_sequence

ADAPTER = "default"
QUERY_BLOCK = 80  # queries that are multiplied with all keys before them at a time
SCORES_AT_A_TIME = 1 << 18  # attention scores that stay in a core's cache, in numbers
KEPT_GATES = 1 << 22  # a product of up_proj that has more numbers is computed again in the backward pass
KEPT_TOKENS = 256  # up to this length attention weights are kept for the backward pass, above they are computed again


@dataclass(frozen=True)
class AdaptedLinear:
    """A frozen linear layer and, if it has one, its adapter."""

    frozen: nn.Linear
    a: nn.Linear | None = None
    b: nn.Linear | None = None
    scale: float = 1.0
    drop: nn.Module | None = None

    @classmethod
    def of(cls, module: Any) -> AdaptedLinear:
        if isinstance(module, nn.Linear):
            return cls(module)
        return cls(
            module.base_layer,
            module.lora_A[ADAPTER],
            module.lora_B[ADAPTER],
            float(module.scaling[ADAPTER]),
            module.lora_dropout[ADAPTER],
        )

    @property
    def dropout(self) -> float:
        return self.drop.p if isinstance(self.drop, nn.Dropout) else 0.0

    def factors(self) -> list[Tensor]:
        """LoRA's A of shape (rank, E) and B of shape (F, rank), or nothing."""
        return [self.a.weight, self.b.weight] if self.a is not None and self.b is not None else []


def apply(function: Any, *arguments: Any) -> Any:
    """What one of the `Function`s below gives."""
    return function.apply(*arguments)


def times(a_NE: Tensor, b_FE: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """The product a · bᵀ + bias. oneDNN uses the widest vectors of any CPU; MKL, which torch asks, only of Intel's."""
    if a_NE.device.type == "cpu" and a_NE.dtype == torch.float32 and torch.backends.mkldnn.is_available():
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a_NE, b_FE, bias_F, "none", [], "")
        return product
    return F.linear(a_NE, b_FE, bias_F)


def keep_mask(like: Tensor, dropout: float) -> Tensor:
    """A mask of ones and, with probability `dropout` to the nearest 1/65,536, zeros; uint8, of the shape of `like`.

    Four 16-bit draws come from one 64-bit draw of torch's generator: drawing is what dropout costs on a CPU.
    """
    draws = torch.empty(-(-like.numel() // 4), dtype=torch.int64, device=like.device).random_(-(2**63), None)
    threshold = round(dropout * 65536) - 32768
    kept = draws.view(torch.int16)[: like.numel()] >= min(threshold, 32767)
    return kept.view(torch.uint8).view(like.shape)


class Project(Function):
    """y_i = x·W_iᵀ + b_i + s_i · dropout(x)·A_iᵀ·B_iᵀ for several linear layers i of one input; W and b are frozen.

    `parts` are the layers, `factors` their A and B in turn. Between the passes it keeps dropout(x), its mask and
    dropout(x)·Aᵀ, and nothing at all without adapters.
    """

    @staticmethod
    def forward(
        ctx: Any, x_NE: Tensor, parts: Sequence[AdaptedLinear], dropout: float, *factors: Tensor
    ) -> tuple[Tensor, ...]:
        outputs = tuple(times(x_NE, part.frozen.weight, part.frozen.bias) for part in parts)
        ctx.parts, ctx.rescale = parts, 1 / (1 - dropout)
        if not factors:
            return outputs
        dropped_NE, keep_NE = x_NE.to(factors[0].dtype), None
        if dropout:
            keep_NE = keep_mask(x_NE, dropout)
            dropped_NE = dropped_NE * keep_NE
        low_NR = times(dropped_NE, torch.cat(factors[::2]))
        for y_NF, low_Nr, b_Fr, scale in _adapted(ctx, parts, outputs, low_NR, factors):
            if y_NF.dtype == low_Nr.dtype:
                y_NF.addmm_(low_Nr, b_Fr.t(), alpha=scale)
            else:
                y_NF.copy_(torch.addmm(y_NF.to(low_Nr.dtype), low_Nr, b_Fr.t(), alpha=scale))
        ctx.save_for_backward(dropped_NE, keep_NE, low_NR, *factors)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx_NE: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for part, g_NF in zip(ctx.parts, grads, strict=True):
                product_NE = times(g_NF, part.frozen.weight.t())
                dx_NE = product_NE if dx_NE is None else dx_NE.add_(product_NE)
        if not ctx.saved_tensors:
            return dx_NE, None, None
        dropped_NE, keep_NE, low_NR, *factors = ctx.saved_tensors
        dlow_NR, dfactors = torch.empty_like(low_NR), []
        dlow = iter(dlow_NR.split([b_Fr.shape[1] for b_Fr in factors[1::2]], dim=1))
        for g_NF, low_Nr, b_Fr, scale in _adapted(ctx, ctx.parts, grads, low_NR, factors):
            wide_NF = g_NF.to(low_NR.dtype)
            torch.mul(times(wide_NF, b_Fr.t()), scale, out=next(dlow))
            dfactors.append(times(low_Nr.t(), wide_NF.t()).t().mul_(scale))
        da_RE = times(dlow_NR.t(), dropped_NE.t())
        if dx_NE is not None:
            extra_NE = times(dlow_NR, torch.cat(factors[::2]).t())
            dx_NE = dx_NE.add_(extra_NE if keep_NE is None else extra_NE.mul_(keep_NE))
        das = da_RE.split([len(a_rE) for a_rE in factors[::2]])
        return dx_NE, None, None, *(grad for pair in zip(das, dfactors, strict=True) for grad in pair)


def _adapted(
    ctx: Any, parts: Sequence[AdaptedLinear], values: Sequence[Tensor], low_NR: Tensor, factors: Sequence[Tensor]
) -> Iterator[tuple[Tensor, Tensor, Tensor, float]]:
    """Of each layer with an adapter: its output or gradient, its columns of dropout(x)·Aᵀ, B, and the factor."""
    pairs = [(part, value) for part, value in zip(parts, values, strict=True) if part.a is not None]
    columns = low_NR.split([b_Fr.shape[1] for b_Fr in factors[1::2]], dim=1)
    for (part, value), low_Nr, b_Fr in zip(pairs, columns, factors[1::2], strict=True):
        yield value, low_Nr, b_Fr, part.scale * ctx.rescale


def norm(x_ND: Tensor, norm: Any) -> Tensor:
    return cast(Tensor, apply(Norm, x_ND, norm.weight, norm.variance_epsilon))


def _inverse_rms(x: Tensor, eps: float) -> Tensor:
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm_gradient(g: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of x / rms(x) over the last dimension; overwrites g."""
    share = (g * x).sum(dim=-1, keepdim=True).mul_(inverse.pow(3)).div_(-x.shape[-1])
    return g.mul_(inverse).addcmul_(x, share)


class Norm(Function):
    """w · x / rms(x) with a frozen w (Zhang & Sennrich 2019)."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        wide_ND = x_ND.float()
        inverse_N1 = _inverse_rms(wide_ND, eps)
        ctx.save_for_backward(x_ND, weight_D, inverse_N1)
        if x_ND.dtype == torch.float32:
            return (wide_ND * inverse_N1).mul_(weight_D)
        return weight_D * (wide_ND * inverse_N1).to(x_ND.dtype)

    @staticmethod
    def backward(ctx: Any, g_ND: Tensor) -> tuple[Tensor, None, None]:
        x_ND, weight_D, inverse_N1 = ctx.saved_tensors
        return _norm_gradient(g_ND.float() * weight_D, x_ND.float(), inverse_N1).to(x_ND.dtype), None, None


def heads(x_NE: Tensor, attention: Any, norm: str, cos_N1P: Tensor, sin_N1P: Tensor, scale: float = 1.0) -> Tensor:
    """Heads of shape (N, H, P), float32: normed where the family has a norm, rotated by place, and scaled."""
    half = cos_N1P.shape[-1] // 2
    sign_P = torch.ones_like(cos_N1P[0, 0])
    sign_P[:half] = -1
    weight_P, eps = torch.ones_like(sign_P), None
    if hasattr(attention, norm):
        weight_P, eps = getattr(attention, norm).weight.float(), getattr(attention, norm).variance_epsilon
    cos_N1P, sin_N1P = cos_N1P * (weight_P * scale), sin_N1P * (sign_P * weight_P.roll(half) * scale)
    return cast(Tensor, apply(Heads, x_NE, eps, cos_N1P, sin_N1P))


class Heads(Function):
    """r · (x ∘ cos + swap(x) ∘ sin), where swap exchanges the halves of a head and r = 1 / rms(x), or 1 without eps.

    Norm weight, scale and the sign of rotate_half are in the tables.
    """

    @staticmethod
    def forward(ctx: Any, x_NE: Tensor, eps: float | None, cos_N1P: Tensor, sin_N1P: Tensor) -> Tensor:
        x_NHP = x_NE.float().unflatten(1, (-1, cos_N1P.shape[-1]))
        out_NHP: Tensor = x_NHP * cos_N1P
        out_NHP.addcmul_(x_NHP.roll(cos_N1P.shape[-1] // 2, -1), sin_N1P)
        ctx.dtype, inverse = x_NE.dtype, None
        if eps is not None:
            inverse = _inverse_rms(x_NHP, eps)
            out_NHP.mul_(inverse)
        ctx.save_for_backward(x_NE if eps is not None else None, inverse, cos_N1P, sin_N1P)
        return out_NHP

    @staticmethod
    def backward(ctx: Any, g_NHP: Tensor) -> tuple[Tensor, None, None, None]:
        x_NE, inverse, cos_N1P, sin_N1P = ctx.saved_tensors
        half = cos_N1P.shape[-1] // 2
        back_NHP = (g_NHP * cos_N1P).addcmul_(g_NHP.roll(half, -1), sin_N1P.roll(half, -1))
        if inverse is not None:
            back_NHP = _norm_gradient(back_NHP, x_NE.float().view_as(back_NHP), inverse)
        return back_NHP.flatten(1).to(ctx.dtype), None, None, None


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
        return x_NHP.view(len(lengths), lengths[0], *x_NHP.shape[1:]).transpose(1, 2).contiguous()
    padded_BTHP: Tensor = pad_sequence(x_NHP.split(lengths), batch_first=True)
    return padded_BTHP.transpose(1, 2).contiguous()


def _one_after_another(x_BHTP: Tensor, lengths: Sequence[int]) -> Tensor:
    """Of shape (N, H, P): undoes `_side_by_side`."""
    return torch.cat([x_HTP[:, :length].transpose(0, 1) for x_HTP, length in zip(x_BHTP, lengths, strict=True)])


class Attention(Function):
    """softmax(q·kᵀ)·v over the window's tokens so far, for q that is scaled already; of shape (N, H·P).

    Scores are computed for blocks of queries and the keys up to them (Dao 2023, FlashAttention-2, section 3.1), which
    saves most of the half that the causal mask throws away. The mask also keeps a window from its padding.
    """

    @staticmethod
    def forward(ctx: Any, q_NHP: Tensor, k_NKP: Tensor, v_NKP: Tensor, lengths: Sequence[int]) -> Tensor:
        (rows, heads, width), key_heads = q_NHP.shape, k_NKP.shape[1]
        shared = heads // key_heads
        ctx.dtype, ctx.lengths, ctx.heads = v_NKP.dtype, lengths, (key_heads, shared)
        out_NE, saved = q_NHP.new_empty(rows, heads * width), []
        for own, its in _neighbours(lengths, key_heads, shared):
            q = _side_by_side(q_NHP[own], its).view(-1, shared, max(its), width)
            k, v = (_side_by_side(x_NKP[own].to(q.dtype), its).flatten(0, 1) for x_NKP in (k_NKP, v_NKP))
            out, kept = torch.empty_like(q), []
            for group, block in _tiles(len(k), shared, max(its)):
                weights = Attention._weights(q, k, group, block)
                out[group, :, block] = _times_each(weights, v[group, : block.stop].mT).unflatten(1, (shared, -1))
                kept.append(weights)
            out_NE[own] = _one_after_another(out.view(len(its), heads, -1, width), its).flatten(1)
            if any(ctx.needs_input_grad):
                saved += [q, k, v, *(kept if max(its) <= KEPT_TOKENS else [])]
        ctx.save_for_backward(*saved)
        return out_NE

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
        grads: list[list[Tensor]] = [[], [], []]
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
            for found, grad in zip(grads, (dq, dk, dv), strict=True):
                found.append(_one_after_another(grad.view(len(its), -1, *q.shape[2:]), its))
        dq_NHP, dk_NKP, dv_NKP = (torch.cat(found) for found in grads)
        return dq_NHP, dk_NKP, dv_NKP.to(ctx.dtype), None


class Gate(Function):
    """SwiGLU: silu(gate) ∘ up (Shazeer 2020).

    With `again`, the frozen layer that made `up` of x, x is kept and `up` is made again. The backward pass works in the
    memory of what was kept, so there is but one; torch refuses a second.
    """

    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor, x_ND: Tensor, again: nn.Linear | None) -> Tensor:
        ctx.again = again
        ctx.save_for_backward(gate_NF, up_NF if again is None else x_ND)
        return F.silu(gate_NF, inplace=not any(ctx.needs_input_grad)).mul_(up_NF)

    @staticmethod
    def backward(ctx: Any, g_NF: Tensor) -> tuple[Tensor | None, ...]:
        gate_NF, up_NF = ctx.saved_tensors
        if ctx.again is not None:
            up_NF = times(up_NF, ctx.again.weight, ctx.again.bias)
        dgate_NF = up_NF.mul_(g_NF)
        torch.ops.aten.silu_backward(dgate_NF, gate_NF, grad_input=dgate_NF)
        return dgate_NF, F.silu(gate_NF, inplace=True).mul_(g_NF), None, None
