"""Part 11: attention over windows of different length, one after the other, against padded SDPA."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from gpu_parts.setting import CheckFailed, Setting, rounded
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention

# query heads, key-value heads, width of a head
SHAPES = {"0.5b": (14, 2, 64), "7b": (28, 4, 128)}
TINY = {"tiny": (4, 2, 16)}
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]


def window_lengths(setting: Setting) -> list[int]:
    least, most, windows = (5, 25, 3) if setting.is_tiny else (440, 523, 32)
    return torch.randint(least, most, (windows,), generator=torch.Generator().manual_seed(0)).tolist()


@dataclass(frozen=True)
class Candidate:
    """`attend` on its own layout; `pack` makes it from rows one after the other, `unpack` is the inverse."""

    attend: Attend
    pack: Callable[[Tensor], Tensor] = lambda x: x
    unpack: Callable[[Tensor], Tensor] = lambda x: x


def padded_sdpa(lengths: list[int], device: str) -> Candidate:
    """SDPA on windows padded on the right; making and removing the padding is not timed."""
    is_token_BT = torch.arange(max(lengths), device=device) < torch.tensor(lengths, device=device)[:, None]

    def pad(x_NHP: Tensor) -> Tensor:
        padded = x_NHP.new_zeros(*is_token_BT.shape, *x_NHP.shape[1:])
        padded[is_token_BT] = x_NHP
        return padded.transpose(1, 2).contiguous()

    def attend(q_BHTP: Tensor, k_BKTP: Tensor, v_BKTP: Tensor) -> Tensor:
        return scaled_dot_product_attention(q_BHTP, k_BKTP, v_BKTP, is_causal=True, enable_gqa=True)

    return Candidate(attend, pad, lambda x: x.transpose(1, 2)[is_token_BT])


def varlen(lengths: list[int], device: str) -> Candidate:
    """torch's own kernels for windows of different length; arguments differ between releases."""
    from torch.nn.attention.varlen import varlen_attn

    names = inspect.signature(varlen_attn).parameters
    starts = torch.tensor([0, *lengths], device=device, dtype=torch.int32).cumsum(0, dtype=torch.int32)
    causal: dict[str, Any] = {"window_size": (-1, 0)} if "window_size" in names else {"is_causal": True}
    has_gqa = "enable_gqa" in names

    def attend(q_NHP: Tensor, k_NKP: Tensor, v_NKP: Tensor) -> Tensor:
        more = {"enable_gqa": True} if has_gqa else {}
        if not has_gqa:
            shared = q_NHP.shape[1] // k_NKP.shape[1]
            k_NKP, v_NKP = (x.repeat_interleave(shared, dim=1) for x in (k_NKP, v_NKP))
        longest = max(lengths)
        out: Tensor = varlen_attn(q_NHP, k_NKP, v_NKP, starts, starts, longest, longest, **causal, **more)
        return out

    return Candidate(attend)


def packed(lengths: list[int], heads: int, width: int) -> Candidate:
    """The fast engine's attention on CPUs, without rotations."""
    from ctxtrain.engine.cpu.attention import WindowGroup, attention

    groups = WindowGroup.split(lengths, heads)
    rope_TC = torch.ones(max(lengths), width // 2, dtype=torch.complex64)

    def attend(q_NHP: Tensor, k_NKP: Tensor, v_NKP: Tensor) -> Tensor:
        out_NE = attention(q_NHP, k_NKP, v_NKP, groups, rope_TC, width**-0.5)
        return out_NE.unflatten(1, (heads, width))

    return Candidate(attend)


def device_batch(kernel: str, lengths: list[int], width: int, device: str) -> Candidate:
    """The fast engine's attention on GPUs, by one of its kernels, without rotations."""
    from ctxtrain.engine.cpu.device_attention import DeviceBatch

    rope_TC = torch.ones(max(lengths), width // 2, dtype=torch.complex64, device=device)
    batch = DeviceBatch.from_lengths(lengths, kernel, rope_TC)

    def attend(q_NHP: Tensor, k_NKP: Tensor, v_NKP: Tensor) -> Tensor:
        return batch.attention(q_NHP, k_NKP, v_NKP, width**-0.5).unflatten(1, (-1, width))

    return Candidate(attend)


def candidates(
    lengths: list[int], heads: int, width: int, device: str
) -> Iterator[tuple[str, Callable[[], Candidate]]]:
    yield "padded_sdpa", partial(padded_sdpa, lengths, device)
    if device == "cpu":
        yield "packed", partial(packed, lengths, heads, width)
    else:
        yield "varlen", partial(varlen, lengths, device)
        yield "packed_varlen", partial(device_batch, "varlen", lengths, width, device)
    yield "packed_blocks", partial(device_batch, "blocks", lengths, width, device)


def exact(lengths: list[int]) -> Attend:
    """Softmax written out in float64, window by window."""

    def attend(q_NHP: Tensor, k_NKP: Tensor, v_NKP: Tensor) -> Tensor:
        parts = []
        for q, k, v in zip(*(x.split(lengths) for x in (q_NHP, k_NKP, v_NKP)), strict=True):
            shared = q.shape[1] // k.shape[1]
            k_HTP, v_HTP = (x.repeat_interleave(shared, dim=1).transpose(0, 1) for x in (k, v))
            scores = q.transpose(0, 1) @ k_HTP.mT * q.shape[-1] ** -0.5
            hidden = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).triu(1)
            parts.append((scores.masked_fill(hidden, -torch.inf).softmax(-1) @ v_HTP).transpose(0, 1))
        return torch.cat(parts)

    return attend


def forward_backward(attend: Attend, inputs: list[Tensor], g_NHP: Tensor) -> list[Tensor]:
    """The output and the gradients of queries, keys and values."""
    leaves = [value.detach().requires_grad_() for value in inputs]
    out = attend(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, g_NHP.to(out.dtype))]


def relative_error(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm())


def measure(candidate: Candidate, inputs: list[Tensor], g_NHP: Tensor, setting: Setting) -> tuple[Any, list[Tensor]]:
    """Milliseconds of forward and backward, whether both repeat to the bit, and the results."""
    packed, g = [candidate.pack(value) for value in inputs], candidate.pack(g_NHP)

    def call() -> list[Tensor]:
        return forward_backward(candidate.attend, packed, g)

    first = call()
    same = all(torch.equal(*pair) for _ in range(3) for pair in zip(first, call(), strict=True))
    milliseconds = 1e3 * setting.median_seconds(call, 2 if setting.is_tiny else 20)
    return {"ms": rounded(milliseconds), "same_bits": same}, [candidate.unpack(value) for value in first]


def compare_attention(setting: Setting) -> Iterator[dict[str, Any]]:
    torch.use_deterministic_algorithms(True, warn_only=True)  # as in a run; what has no such algorithm shows as bits
    dtype, allowed = (torch.bfloat16, 2e-2) if setting.device == "cuda" else (torch.float32, 1e-4)
    lengths, device, wrong = window_lengths(setting), setting.device, []
    for shape, (heads, kv_heads, width) in (TINY if setting.is_tiny else SHAPES).items():
        torch.manual_seed(0)
        sizes = [(sum(lengths), count, width) for count in (heads, kv_heads, kv_heads, heads)]
        *inputs, g_NHP = [torch.randn(size, device=device).to(dtype) for size in sizes]
        truth = forward_backward(exact(lengths), [value.double() for value in inputs], g_NHP.double())
        for name, make in candidates(lengths, heads, width, device):
            try:
                candidate = make()
            except ImportError as error:
                yield {f"{shape}_{name}": f"not available: {error}"}
                continue
            figures, found = measure(candidate, inputs, g_NHP, setting)
            error = max(relative_error(*pair) for pair in zip(found, truth, strict=True))
            yield {f"{shape}_{name}": {"relative_error": rounded(error), **figures}}
            if not error <= allowed:
                wrong.append(f"{shape}_{name}")
    if wrong:
        raise CheckFailed(f"more than {allowed} from the exact attention: {', '.join(wrong)}")
