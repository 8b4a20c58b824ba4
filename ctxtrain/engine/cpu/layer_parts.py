"""Parts of a Qwen layer with LoRA whose backward passes are written out, for models whose own weights are frozen.

Comes in: states and weights. Goes out: what the parts of transformers and PEFT give, with gradients for states and
adapters alone. Little is kept between the two passes, and little memory is walked through.

Legend: N tokens of all windows, one window after the other, D model width, E, F width of what goes into and out of a
linear layer, P width of a head, R sum of LoRA ranks, r one rank.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from ctxtrain.engine.cpu.dropout import Masks

ADAPTER = "default"
LARGE = 3 << 19  # numbers; norms and masks of more are not kept for the backward pass but made again
THIN = 32  # a product of so few columns is done sooner by oneDNN than by MKL on any CPU
MKL_IS_WIDE = torch.backends.cpu.get_cpu_capability() != "AVX512"
HAS_ONEDNN = torch.backends.mkldnn.is_available()

Again = Callable[[], Tensor] | None


def pairs(x: Tensor, width: int) -> Tensor:
    """The numbers of each head, in the first dimension, with those side by side that are rotated together."""
    return x.view(-1, 2, width // 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


@dataclass(frozen=True)
class AdaptedLinear:
    """A frozen linear layer and, if it has one, its adapter.

    With `paired`, the width of heads, its output has the `pairs` of each head side by side.
    """

    weight_FE: Tensor
    bias_F: Tensor | None
    a: nn.Linear | None = None
    b: nn.Linear | None = None
    scale: float = 1.0
    drop: nn.Module | None = None
    paired: int = 0

    @classmethod
    def of(cls, module: Any, paired: int = 0) -> AdaptedLinear:
        frozen: nn.Linear = module if isinstance(module, nn.Linear) else module.base_layer
        weight_FE, bias_F = frozen.weight.detach(), None if frozen.bias is None else frozen.bias.detach()
        if paired:
            weight_FE, bias_F = pairs(weight_FE, paired), None if bias_F is None else pairs(bias_F, paired)
        if frozen is module:
            return cls(weight_FE, bias_F, paired=paired)
        a, b, drop = (of[ADAPTER] for of in (module.lora_A, module.lora_B, module.lora_dropout))
        return cls(weight_FE, bias_F, a, b, float(module.scaling[ADAPTER]), drop, paired)

    @property
    def dropout(self) -> float:
        return self.drop.p if isinstance(self.drop, nn.Dropout) else 0.0

    def factors(self) -> list[Tensor]:
        """LoRA's A of shape (rank, E) and B of shape (F, rank), or nothing."""
        return [] if self.a is None or self.b is None else [self.a.weight, self.b.weight]

    def in_pairs(self, b_Fr: Tensor) -> Tensor:
        """B with its rows in the order of the output's numbers."""
        return pairs(b_Fr, self.paired) if self.paired else b_Fr

    def out_of_pairs(self, b_Fr: Tensor) -> Tensor:
        """Undoes it."""
        if not self.paired:
            return b_Fr
        return b_Fr.reshape(-1, self.paired // 2, 2, b_Fr.shape[1]).transpose(1, 2).reshape(b_Fr.shape)


def apply(function: Any, *arguments: Any) -> Any:
    """What one of the `Function`s below gives."""
    return function.apply(*arguments)


def times(a_NE: Tensor, b_FE: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """The product a · bᵀ + bias, by MKL, which torch asks, or by oneDNN.

    MKL is sooner where vectors have 8 numbers. Of vectors of 16, which only Intel's processors had when it was written,
    it uses half on others; oneDNN uses the widest of any CPU.
    """
    if _by_onednn(a_NE, b_FE):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a_NE, b_FE, bias_F, "none", [], "")
        return product
    return F.linear(a_NE, b_FE, bias_F)


def add_times(y_NF: Tensor, a_NE: Tensor, b_FE: Tensor) -> Tensor:
    """The same added to y, in its memory."""
    return y_NF.add_(times(a_NE, b_FE)) if _by_onednn(a_NE, b_FE) else y_NF.addmm_(a_NE, b_FE.t())


def _by_onednn(a_NE: Tensor, b_FE: Tensor) -> bool:
    if not HAS_ONEDNN or (MKL_IS_WIDE and len(b_FE) > THIN):
        return False
    return a_NE.device.type == "cpu" and a_NE.dtype == torch.float32


def _is_large(x: Tensor) -> bool:
    """Whether saving the memory of what is made of x is worth some work."""
    return x.numel() > LARGE


class Project(Function):
    """y_i = x·W_iᵀ + b_i + s_i · dropout(x)·A_iᵀ·B_iᵀ for several linear layers i of one input; W and b are frozen.

    `parts` are the layers, `factors` their A and B in turn. Between the passes it keeps dropout(x), its mask (or of a
    large one what draws it again) and s · dropout(x)·Aᵀ, and nothing at all without adapters. What `again` makes, x, is
    not kept but made again.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NE: Tensor,
        parts: Sequence[AdaptedLinear],
        masks: Masks | None,
        again: Again,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs = tuple(times(x_NE, part.weight_FE, part.bias_F) for part in parts)
        ctx.parts, ctx.again, ctx.draw = parts, again, None
        if not factors:
            return outputs
        dropped_NE, keep_NE = x_NE.to(factors[0].dtype), None
        dropout = max(part.dropout for part in parts) if masks else 0.0
        if masks and dropout:
            keep_NE, ctx.draw = masks.next(x_NE.shape, dropout, dropped_NE.dtype)
            dropped_NE = dropped_NE * keep_NE
        adapted = [(part, y_NF) for part, y_NF in zip(parts, outputs, strict=True) if part.a is not None]
        ctx.scales = [part.scale / (1 - dropout) for part, _ in adapted]
        a_RE = torch.cat([a_rE * scale for a_rE, scale in zip(factors[::2], ctx.scales, strict=True)])
        bs_Fr = [part.in_pairs(b_Fr) for (part, _), b_Fr in zip(adapted, factors[1::2], strict=True)]
        low_NR = times(dropped_NE, a_RE)
        for (_, y_NF), low_Nr, b_Fr in zip(adapted, _columns(low_NR, bs_Fr), bs_Fr, strict=True):
            if y_NF.dtype == low_Nr.dtype:
                y_NF.addmm_(low_Nr, b_Fr.t())
            else:
                y_NF.copy_(torch.addmm(y_NF.to(low_Nr.dtype), low_Nr, b_Fr.t()))
        kept = None if _is_large(x_NE) else keep_NE
        ctx.save_for_backward(dropped_NE if again is None else None, kept, low_NR, a_RE, *bs_Fr)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx_NE: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for part, g_NF in zip(ctx.parts, grads, strict=True):
                back_EF = part.weight_FE.t()
                dx_NE = times(g_NF, back_EF) if dx_NE is None else add_times(dx_NE, g_NF, back_EF)
        if not ctx.saved_tensors:
            return dx_NE, None, None, None
        dropped_NE, keep_NE, low_NR, a_RE, *bs_Fr = ctx.saved_tensors
        if keep_NE is None and ctx.draw is not None:
            keep_NE = ctx.draw()
        if ctx.again is not None:
            dropped_NE = ctx.again().to(low_NR.dtype)
            dropped_NE = dropped_NE if keep_NE is None else dropped_NE.mul_(keep_NE)
        adapted = [(part, g.to(low_NR.dtype)) for part, g in zip(ctx.parts, grads, strict=True) if part.a is not None]
        dlow_NR = torch.cat([times(g_NF, b_Fr.t()) for (_, g_NF), b_Fr in zip(adapted, bs_Fr, strict=True)], dim=1)
        dbs = [
            part.out_of_pairs(times(low_Nr.t(), g_NF.t()).t())
            for (part, g_NF), low_Nr in zip(adapted, _columns(low_NR, bs_Fr), strict=True)
        ]
        da_RE = times(dlow_NR.t(), dropped_NE.t())
        das = [da_rE * scale for da_rE, scale in zip(da_RE.split([b.shape[1] for b in bs_Fr]), ctx.scales, strict=True)]
        if dx_NE is not None:
            extra_NE = times(dlow_NR, a_RE.t())
            dx_NE = dx_NE.add_(extra_NE if keep_NE is None else extra_NE.mul_(keep_NE))
        return dx_NE, None, None, None, *(grad for pair in zip(das, dbs, strict=True) for grad in pair)


def _columns(low_NR: Tensor, bs_Fr: Sequence[Tensor]) -> list[Tensor]:
    """Those of each adapter."""
    return list(low_NR.split([b_Fr.shape[1] for b_Fr in bs_Fr], dim=1))


def norm(x: Tensor, norm: Any, *, paired: bool = False) -> Tensor:
    """Of the last dimension; with `paired`, that is a head whose numbers are `pairs`."""
    weight = pairs(norm.weight, x.shape[-1]) if paired else norm.weight
    return cast(Tensor, apply(Norm, x, weight, norm.variance_epsilon))


def norm_again(x: Tensor, norm: Any) -> Again:
    """What makes the same again of x, which `norm` keeps anyway; None if x is too small to matter."""
    if not _is_large(x):
        return None
    return partial(_normed, x.detach(), norm.weight.detach(), norm.variance_epsilon)


def _normed(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return _scaled(x_ND, weight_D, inverse_rms(x_ND.float(), eps))


def _scaled(x_ND: Tensor, weight_D: Tensor, inverse_N1: Tensor) -> Tensor:
    if x_ND.dtype == torch.float32:
        return (x_ND * inverse_N1).mul_(weight_D)
    return weight_D * (x_ND.float() * inverse_N1).to(x_ND.dtype)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
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
        inverse_N1 = inverse_rms(x_ND.float(), eps)
        ctx.save_for_backward(x_ND, weight_D, inverse_N1)
        return _scaled(x_ND, weight_D, inverse_N1)

    @staticmethod
    def backward(ctx: Any, g_ND: Tensor) -> tuple[Tensor, None, None]:
        x_ND, weight_D, inverse_N1 = ctx.saved_tensors
        return _norm_gradient(g_ND.float() * weight_D, x_ND.float(), inverse_N1).to(x_ND.dtype), None, None


class Gate(Function):
    """SwiGLU: silu(gate) ∘ up (Shazeer 2020).

    The backward pass works in the memory of what was kept, so there is but one; torch refuses a second.
    """

    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        return F.silu(gate_NF, inplace=not any(ctx.needs_input_grad)).mul_(up_NF)

    @staticmethod
    def backward(ctx: Any, g_NF: Tensor) -> tuple[Tensor, Tensor]:
        gate_NF, up_NF = ctx.saved_tensors
        return _gate_gradients(gate_NF, up_NF, g_NF)


def _gate_gradients(gate_NF: Tensor, up_NF: Tensor, g_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, in the memory of up and gate."""
    dgate_NF = up_NF.mul_(g_NF)
    torch.ops.aten.silu_backward(dgate_NF, gate_NF, grad_input=dgate_NF)
    return dgate_NF, F.silu(gate_NF, inplace=True).mul_(g_NF)


class Shelf:
    """Memory for the largest tensors of a step, kept for the next one.

    A freed tensor's place in glibc's heap does not take another of the same size, as an aligned block is asked for with
    some bytes more; so from the second step on a heap of such tensors has gaps.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def times(self, a_NE: Tensor, b_FE: Tensor) -> Tensor:
        return torch.mm(a_NE, b_FE.t(), out=self.empty(len(a_NE), len(b_FE)))

    def empty(self, rows: int, columns: int) -> Tensor:
        """Of shape (rows, columns); memory that is too small is given up."""
        count = rows * columns
        while self._free:
            if (memory := self._free.pop()).numel() >= count:
                return memory[:count].view(rows, columns)
        return torch.empty(rows, columns)

    def take_back(self, *tensors: Tensor) -> None:
        """From whoever got them here and needs them no longer."""
        self._free += [torch.empty(0).set_(tensor.untyped_storage()) for tensor in tensors]


class FrozenMlp(Function):
    """(silu(x·W_gateᵀ) ∘ x·W_upᵀ)·W_downᵀ for a layer whose three weights are frozen and have no bias.

    Between the passes it keeps both inner products, where MKL multiplies and they are large in memory of the `shelf`,
    which oneDNN cannot write into; there up's is made again of the x that `again` makes. As with `Gate`, there is but
    one backward pass.
    """

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, parts: Sequence[AdaptedLinear], again: Again, shelf: Shelf) -> Tensor:
        gate_FD, up_FD, down_DF = (part.weight_FE for part in parts)
        if not ctx.needs_input_grad[0]:
            return times(F.silu(times(x_ND, gate_FD), inplace=True).mul_(times(x_ND, up_FD)), down_DF)
        shelved = _is_large(x_ND) and not _by_onednn(x_ND, up_FD) and x_ND.dtype == torch.float32
        ctx.parts, ctx.again, ctx.shelf = parts, None if shelved else again, shelf if shelved else None
        product = shelf.times if shelved else times
        gate_NF, up_NF = product(x_ND, gate_FD), product(x_ND, up_FD)
        ctx.save_for_backward(gate_NF, up_NF if ctx.again is None else None)
        inner_NF = torch.ops.aten.silu(gate_NF, out=shelf.empty(*gate_NF.shape)) if shelved else F.silu(gate_NF)
        out_ND = times(inner_NF.mul_(up_NF), down_DF)
        if shelved:
            shelf.take_back(inner_NF)
        return out_ND

    @staticmethod
    def backward(ctx: Any, g_ND: Tensor) -> tuple[Tensor | None, ...]:
        gate_FD, up_FD, down_DF = (part.weight_FE for part in ctx.parts)
        gate_NF, up_NF = ctx.saved_tensors
        if ctx.again is not None:
            up_NF = times(ctx.again(), up_FD)
        g_NF = (ctx.shelf.times if ctx.shelf else times)(g_ND, down_DF.t())
        dgate_NF, dup_NF = _gate_gradients(gate_NF, up_NF, g_NF)
        dx_ND = add_times(times(dgate_NF, gate_FD.t()), dup_NF, up_FD.t())
        if ctx.shelf:
            ctx.shelf.take_back(gate_NF, up_NF, g_NF)
        return dx_ND, None, None, None
