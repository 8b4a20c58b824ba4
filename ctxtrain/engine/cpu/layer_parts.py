"""Parts of a Qwen layer with LoRA, with hand-written backward passes, for models with frozen weights.

Input: states and weights. Output: the results of transformers and PEFT, with gradients for states and adapters only.
The functions save little for the backward pass and make few passes over memory.

Legend: N tokens of all windows, concatenated, D model width, E, F input and output width of a linear layer, P width of
a head, R sum of LoRA ranks, r one rank.
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

from ctxtrain.engine.cpu.dropout import DropoutMasks

ADAPTER = "default"
LARGE_NUMEL = 3 << 19  # norms and masks with more elements are recomputed in the backward pass instead of saved
ONEDNN_MAX_COLUMNS = 32  # for products of so few columns, oneDNN is faster than MKL on any CPU
MKL_IS_WIDE = torch.backends.cpu.get_cpu_capability() != "AVX512"
HAS_ONEDNN = torch.backends.mkldnn.is_available()

Recompute = Callable[[], Tensor] | None


def interleave_pairs(x: Tensor, width: int) -> Tensor:
    """Reorder dimension 0, heads of this width, so that the two numbers that RoPE rotates together are adjacent."""
    return x.view(-1, 2, width // 2, *x.shape[1:]).transpose(1, 2).reshape(x.shape)


@dataclass(frozen=True)
class AdaptedLinear:
    """A frozen linear layer with or without an adapter.

    `rope_width` is the width of heads whose output has `interleave_pairs` order; 0 keeps the order of transformers.
    """

    weight_FE: Tensor
    bias_F: Tensor | None
    a: nn.Linear | None = None
    b: nn.Linear | None = None
    scale: float = 1.0
    drop: nn.Module | None = None
    rope_width: int = 0

    @classmethod
    def from_module(cls, module: Any, rope_width: int = 0) -> AdaptedLinear:
        frozen: nn.Linear = module if isinstance(module, nn.Linear) else module.base_layer
        weight_FE, bias_F = frozen.weight.detach(), None if frozen.bias is None else frozen.bias.detach()
        if rope_width:
            weight_FE = interleave_pairs(weight_FE, rope_width)
            bias_F = None if bias_F is None else interleave_pairs(bias_F, rope_width)
        if frozen is module:
            return cls(weight_FE, bias_F, rope_width=rope_width)
        a, b, drop = (parts[ADAPTER] for parts in (module.lora_A, module.lora_B, module.lora_dropout))
        return cls(weight_FE, bias_F, a, b, float(module.scaling[ADAPTER]), drop, rope_width)

    @property
    def dropout(self) -> float:
        return self.drop.p if isinstance(self.drop, nn.Dropout) else 0.0

    def factors(self) -> list[Tensor]:
        """LoRA's A of shape (rank, E) and B of shape (F, rank); empty without an adapter."""
        return [] if self.a is None or self.b is None else [self.a.weight, self.b.weight]

    def interleave_rows(self, b_Fr: Tensor) -> Tensor:
        """B with its rows in the order of the output."""
        return interleave_pairs(b_Fr, self.rope_width) if self.rope_width else b_Fr

    def deinterleave_rows(self, b_Fr: Tensor) -> Tensor:
        """Inverse of `interleave_rows`."""
        if not self.rope_width:
            return b_Fr
        return b_Fr.reshape(-1, self.rope_width // 2, 2, b_Fr.shape[1]).transpose(1, 2).reshape(b_Fr.shape)


def apply(function: Any, *arguments: Any) -> Any:
    """Result of an autograd `Function`, whose `apply` has no type annotations."""
    return function.apply(*arguments)


def matmul_t(a_NE: Tensor, b_FE: Tensor, bias_F: Tensor | None = None) -> Tensor:
    """The product a · bᵀ + bias, computed by MKL, as torch does, or by oneDNN.

    MKL is faster where vectors hold 8 floats. With vectors of 16 floats it uses half of each vector on processors other
    than Intel's; oneDNN uses the widest vectors of any CPU.
    """
    if _uses_onednn(a_NE, b_FE):
        product: Tensor = torch.ops.mkldnn._linear_pointwise(a_NE, b_FE, bias_F, "none", [], "")
        return product
    return F.linear(a_NE, b_FE, bias_F)


def add_matmul_t(y_NF: Tensor, a_NE: Tensor, b_FE: Tensor) -> Tensor:
    """Add a · bᵀ to y in place."""
    return y_NF.add_(matmul_t(a_NE, b_FE)) if _uses_onednn(a_NE, b_FE) else y_NF.addmm_(a_NE, b_FE.t())


def _uses_onednn(a_NE: Tensor, b_FE: Tensor) -> bool:
    if not HAS_ONEDNN or (MKL_IS_WIDE and len(b_FE) > ONEDNN_MAX_COLUMNS):
        return False
    return a_NE.device.type == "cpu" and a_NE.dtype == torch.float32


def _is_large(x: Tensor) -> bool:
    """Whether saving the memory of tensors derived from x is worth recomputing them."""
    return x.numel() > LARGE_NUMEL


class LoraProjection(Function):
    """y_i = x·W_iᵀ + b_i + s_i · dropout(x)·A_iᵀ·B_iᵀ for several linear layers i of one input; W and b are frozen.

    `parts` are the layers; `factors` alternate between their A and B. Adapters multiply in the dtype of x, as under
    autocast. With adapters, it saves dropout(x), the dropout mask (for a large mask only the means to redraw it) and
    s · dropout(x)·Aᵀ for the backward pass; without adapters, nothing. If `recompute` is given, the backward pass
    recomputes x with it, and dropout(x) is not saved.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x_NE: Tensor,
        parts: Sequence[AdaptedLinear],
        masks: DropoutMasks | None,
        recompute: Recompute,
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        outputs = tuple(matmul_t(x_NE, part.weight_FE, part.bias_F) for part in parts)
        ctx.parts, ctx.recompute, ctx.redraw = parts, recompute, None
        if not factors:
            return outputs
        dropped_NE, mask_NE = x_NE, None
        dropout = max(part.dropout for part in parts) if masks else 0.0
        if masks and dropout:
            mask_NE, ctx.redraw = masks.draw(x_NE.shape, dropout, x_NE.dtype)
            dropped_NE = dropped_NE * mask_NE
        adapted = [(part, y_NF) for part, y_NF in zip(parts, outputs, strict=True) if part.a is not None]
        ctx.dtype, ctx.scales = factors[0].dtype, [part.scale / (1 - dropout) for part, _ in adapted]
        a_RE = torch.cat([a_rE * scale for a_rE, scale in zip(factors[::2], ctx.scales, strict=True)]).to(x_NE.dtype)
        bs_Fr = [
            part.interleave_rows(b_Fr.to(x_NE.dtype)) for (part, _), b_Fr in zip(adapted, factors[1::2], strict=True)
        ]
        low_NR = matmul_t(dropped_NE, a_RE)
        for (_, y_NF), low_Nr, b_Fr in zip(adapted, _split_by_rank(low_NR, bs_Fr), bs_Fr, strict=True):
            y_NF.addmm_(low_Nr, b_Fr.t())
        saved_mask = None if _is_large(x_NE) else mask_NE
        ctx.save_for_backward(dropped_NE if recompute is None else None, saved_mask, low_NR, a_RE, *bs_Fr)
        return outputs

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dx_NE: Tensor | None = None
        if ctx.needs_input_grad[0]:
            for part, g_NF in zip(ctx.parts, grads, strict=True):
                weight_EF = part.weight_FE.t()
                dx_NE = matmul_t(g_NF, weight_EF) if dx_NE is None else add_matmul_t(dx_NE, g_NF, weight_EF)
        if not (saved := ctx.saved_tensors):  # read once, as checkpointing requires
            return dx_NE, None, None, None
        dropped_NE, mask_NE, low_NR, a_RE, *bs_Fr = saved
        if mask_NE is None and ctx.redraw is not None:
            mask_NE = ctx.redraw()
        if ctx.recompute is not None:
            dropped_NE = ctx.recompute()
            dropped_NE = dropped_NE if mask_NE is None else dropped_NE.mul_(mask_NE)
        adapted = [(part, g) for part, g in zip(ctx.parts, grads, strict=True) if part.a is not None]
        dlow_NR = torch.cat([matmul_t(g_NF, b_Fr.t()) for (_, g_NF), b_Fr in zip(adapted, bs_Fr, strict=True)], dim=1)
        dbs = [
            part.deinterleave_rows(matmul_t(low_Nr.t(), g_NF.t()).t())
            for (part, g_NF), low_Nr in zip(adapted, _split_by_rank(low_NR, bs_Fr), strict=True)
        ]
        da_RE = matmul_t(dlow_NR.t(), dropped_NE.t())
        das = [da_rE * scale for da_rE, scale in zip(da_RE.split([b.shape[1] for b in bs_Fr]), ctx.scales, strict=True)]
        if dx_NE is not None:
            adapter_dx_NE = matmul_t(dlow_NR, a_RE.t())
            dx_NE = dx_NE.add_(adapter_dx_NE if mask_NE is None else adapter_dx_NE.mul_(mask_NE))
        factor_grads = [grad.to(ctx.dtype) for pair in zip(das, dbs, strict=True) for grad in pair]
        return dx_NE, None, None, None, *factor_grads


def _split_by_rank(low_NR: Tensor, bs_Fr: Sequence[Tensor]) -> list[Tensor]:
    """The columns of each adapter."""
    return list(low_NR.split([b_Fr.shape[1] for b_Fr in bs_Fr], dim=1))


def rms_norm(x: Tensor, norm: Any, *, interleaved: bool = False) -> Tensor:
    """Apply a norm of transformers to the last dimension: with `interleaved`, a head in `interleave_pairs` order."""
    weight = interleave_pairs(norm.weight, x.shape[-1]) if interleaved else norm.weight
    return cast(Tensor, apply(RmsNorm, x, weight, norm.variance_epsilon))


def recompute_norm(x: Tensor, norm: Any) -> Recompute:
    """A function that recomputes the norm of x, which `rms_norm` saves anyway; None if x is small."""
    if not _is_large(x):
        return None
    return partial(_norm_without_grad, x.detach(), norm.weight.detach(), norm.variance_epsilon)


def _norm_without_grad(x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
    return _scale(x_ND, weight_D, inverse_rms(x_ND.float(), eps))


def _scale(x_ND: Tensor, weight_D: Tensor, inverse_N1: Tensor) -> Tensor:
    if x_ND.dtype == torch.float32:
        return (x_ND * inverse_N1).mul_(weight_D)
    return weight_D * (x_ND.float() * inverse_N1).to(x_ND.dtype)


def inverse_rms(x: Tensor, eps: float) -> Tensor:
    """1 / rms(x) over the last dimension, which stays with size 1."""
    norm: Tensor = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
    return norm.square_().div_(x.shape[-1]).add_(eps).rsqrt_()


def _norm_gradient(g: Tensor, x: Tensor, inverse: Tensor) -> Tensor:
    """Gradient of x / rms(x) over the last dimension; overwrites g."""
    share = (g * x).sum(dim=-1, keepdim=True).mul_(inverse.pow(3)).div_(-x.shape[-1])
    return g.mul_(inverse).addcmul_(x, share)


class RmsNorm(Function):
    """w · x / rms(x) with a frozen w (Zhang & Sennrich 2019)."""

    @staticmethod
    def forward(ctx: Any, x_ND: Tensor, weight_D: Tensor, eps: float) -> Tensor:
        inverse_N1 = inverse_rms(x_ND.float(), eps)
        ctx.save_for_backward(x_ND, weight_D, inverse_N1)
        return _scale(x_ND, weight_D, inverse_N1)

    @staticmethod
    def backward(ctx: Any, g_ND: Tensor) -> tuple[Tensor, None, None]:
        x_ND, weight_D, inverse_N1 = ctx.saved_tensors
        return _norm_gradient(g_ND.float() * weight_D, x_ND.float(), inverse_N1).to(x_ND.dtype), None, None


class SwiGlu(Function):
    """SwiGLU: silu(gate) ∘ up (Shazeer 2020).

    The backward pass overwrites the saved tensors, so it can run only once; torch refuses a second backward pass.
    """

    @staticmethod
    def forward(ctx: Any, gate_NF: Tensor, up_NF: Tensor) -> Tensor:
        ctx.save_for_backward(gate_NF, up_NF)
        return F.silu(gate_NF, inplace=not any(ctx.needs_input_grad)).mul_(up_NF)

    @staticmethod
    def backward(ctx: Any, g_NF: Tensor) -> tuple[Tensor, Tensor]:
        gate_NF, up_NF = ctx.saved_tensors
        return _swiglu_gradients(gate_NF, up_NF, g_NF)


def _swiglu_gradients(gate_NF: Tensor, up_NF: Tensor, g_NF: Tensor) -> tuple[Tensor, Tensor]:
    """Gradients of gate and up, in the memory of up and gate."""
    dgate_NF = up_NF.mul_(g_NF)
    torch.ops.aten.silu_backward(dgate_NF, gate_NF, grad_input=dgate_NF)
    return dgate_NF, F.silu(gate_NF, inplace=True).mul_(g_NF)


class BufferPool:
    """Memory for the largest tensors of a step, reused in the next step.

    Without it the heap has gaps from the second step on: glibc requests a few extra bytes for an aligned block, so the
    space of a freed tensor does not fit another tensor of the same size.
    """

    def __init__(self) -> None:
        self._free: list[Tensor] = []

    def matmul_t(self, a_NE: Tensor, b_FE: Tensor) -> Tensor:
        return torch.mm(a_NE, b_FE.t(), out=self.empty(len(a_NE), len(b_FE)))

    def empty(self, rows: int, columns: int) -> Tensor:
        """An uninitialised tensor of shape (rows, columns). Free buffers that are too small are dropped."""
        count = rows * columns
        while self._free:
            if (memory := self._free.pop()).numel() >= count:
                return memory[:count].view(rows, columns)
        return torch.empty(rows, columns)

    def release(self, *tensors: Tensor) -> None:
        """Return tensors of this pool that are no longer needed."""
        self._free += [torch.empty(0).set_(tensor.untyped_storage()) for tensor in tensors]


class FrozenMlp(Function):
    """(silu(x·W_gateᵀ) ∘ x·W_upᵀ)·W_downᵀ for an MLP whose three weights are frozen and have no bias.

    It saves both inner products for the backward pass, large ones in `buffers` if MKL multiplies on a CPU. For oneDNN,
    the backward pass recomputes the product of up from the x of `recompute`. As with `SwiGlu`, it can run only once.
    """

    @staticmethod
    def forward(
        ctx: Any, x_ND: Tensor, parts: Sequence[AdaptedLinear], recompute: Recompute, buffers: BufferPool
    ) -> Tensor:
        gate_FD, up_FD, down_DF = (part.weight_FE for part in parts)
        if not ctx.needs_input_grad[0]:
            return matmul_t(F.silu(matmul_t(x_ND, gate_FD), inplace=True).mul_(matmul_t(x_ND, up_FD)), down_DF)
        on_cpu = x_ND.device.type == "cpu"
        pooled = on_cpu and _is_large(x_ND) and not _uses_onednn(x_ND, up_FD) and x_ND.dtype == torch.float32
        ctx.parts, ctx.buffers = parts, buffers if pooled else None
        ctx.recompute = recompute if on_cpu and not pooled else None
        product = buffers.matmul_t if pooled else matmul_t
        gate_NF, up_NF = product(x_ND, gate_FD), product(x_ND, up_FD)
        ctx.save_for_backward(gate_NF, up_NF if ctx.recompute is None else None)
        inner_NF = torch.ops.aten.silu(gate_NF, out=buffers.empty(*gate_NF.shape)) if pooled else F.silu(gate_NF)
        out_ND = matmul_t(inner_NF.mul_(up_NF), down_DF)
        if pooled:
            buffers.release(inner_NF)
        return out_ND

    @staticmethod
    def backward(ctx: Any, g_ND: Tensor) -> tuple[Tensor | None, ...]:
        gate_FD, up_FD, down_DF = (part.weight_FE for part in ctx.parts)
        gate_NF, up_NF = ctx.saved_tensors
        if ctx.recompute is not None:
            up_NF = matmul_t(ctx.recompute(), up_FD)
        g_NF = (ctx.buffers.matmul_t if ctx.buffers else matmul_t)(g_ND, down_DF.t())
        dgate_NF, dup_NF = _swiglu_gradients(gate_NF, up_NF, g_NF)
        dx_ND = add_matmul_t(matmul_t(dgate_NF, gate_FD.t()), dup_NF, up_FD.t())
        if ctx.buffers:
            ctx.buffers.release(gate_NF, up_NF, g_NF)
        return dx_ND, None, None, None
