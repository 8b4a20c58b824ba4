"""Probes a model and an engine with two rows before they are used.

Input: a transformers model, the engine that should replace it, and two token rows. Output: the reason why the engine
cannot replace the model, or None. `unsupported_reason` checks for known features of checkpoints by name; this probe
also finds unknown ones, by comparing the engine's logits with those of plain transformers with an attention mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from ctxtrain.data.batches import collate
from ctxtrain.data.tokens import Tokens
from ctxtrain.errors import ConfigError, DataError
from ctxtrain.model.base import load_classifier
from ctxtrain.model.base_config import convert_errors
from ctxtrain.model.forward import logits
from ctxtrain.model.tokenizer import tokenizer_and_notes

PROBE_TOKENS = 128  # enough to detect any attention rule, and too few to take noticeable time
FLOAT32_ROUNDING = 1e-4  # the largest difference of two logits that rounding explains, as a share of the largest logit
# In a coarser type that difference is this multiple of `rounding_noise`. Two engines that round differently differed by
# 0.2 to 1.3 times the noise (48 Qwen2 and Qwen3 of 2 to 24 layers, AMD EPYC, 1 December 2026). The batch size is no
# measure of it: products are summed in float32 and then rounded, so it changed the same logits by 1e-8 to 6e-7 only.
NOISE_FACTOR = 4
NOISE_DRAWS = 2


def probe_rows(vocabulary: int, pad_id: int) -> Tokens:
    """Two rows of different length with ids from the whole vocabulary; the same on every call.

    The probe uses no rows of the user, so that a fault of a single row is not reported as a fault of the base model.
    """
    ids = np.random.default_rng(0).integers(0, vocabulary, PROBE_TOKENS, dtype=np.int32)
    ids = np.where(ids == pad_id, (ids + 1) % vocabulary, ids).astype(np.int32)
    rows = [ids, ids[: PROBE_TOKENS // 4]]
    return Tokens.from_lengths(np.concatenate(rows), np.array([len(row) for row in rows]), pad_id)


def make_probe(model: Any) -> Tokens:
    """`probe_rows` for the vocabulary and pad id in the config of a model."""
    config = model.config.get_text_config()
    return probe_rows(config.vocab_size, config.pad_token_id)


def try_base(base: str) -> tuple[Tokenizer, list[str]]:
    """Run all checks of a base model that a training run needs; return its tokenizer and notes for the user.

    Opens the model in the precision of its files. Raises ConfigError with the faults of the base model.
    """
    tokenizer, notes = tokenizer_and_notes(base)
    model = load_classifier(base, tokenizer.pad_token_id, dtype=None, say=notes.append)
    probe = probe_rows(len(tokenizer), tokenizer.pad_token_id)
    engine_mismatch(model, model, probe)
    check_trainable(model, probe)
    return tokenizer.backend_tokenizer, notes


@torch.no_grad()
def check_trainable(model: nn.Module, tokens: Tokens) -> None:
    """Raise ConfigError if a forward pass in training mode fails; only that mode runs parts such as dropout."""
    was_training = model.training
    batch = collate(tokens, range(len(tokens)), next(model.parameters()).device)
    try:
        model.train()
        with convert_errors(ConfigError, "model.base must give logits in training", "Its config.json may be damaged"):
            _logits_with_mask(model, batch)
    finally:
        model.train(was_training)


@torch.no_grad()
def engine_mismatch(
    model: nn.Module,
    engine: nn.Module,
    tokens: Tokens,
    name: str = "model.base",
    error_type: type[ConfigError] | type[DataError] = ConfigError,
) -> str | None:
    """Why the engine cannot replace the model on these rows, or None. `name` is the model's name in messages.

    Raises `error_type` if the model itself is unusable: its logits are not finite, or depend on other rows of the batch
    or on tokens after the last one.
    """
    weight = next(model.parameters())
    batch = collate(tokens, range(len(tokens)), weight.device)
    was_training = model.training
    model.eval()
    engine.eval()
    try:
        rule = f"{name} must give logits for a row of any tokens"
        with convert_errors(error_type, rule, "Its config.json may be damaged"):
            batched_BC = _logits_with_mask(model, batch)
            alone_1C = _logits_with_mask(model, collate(tokens, [len(tokens) - 1], weight.device))
        allowed = _allowed_difference(model, batch, batched_BC)
        if not bool(torch.isfinite(batched_BC).all()):
            raise error_type(
                f"{name} must give finite logits, it gives {batched_BC[0].tolist()} for a row of any "
                "tokens. Its config.json or its weights are damaged: copy it again, or use another base."
            )
        if (difference := _max_difference(batched_BC[-1:], alone_1C)) > allowed:
            raise error_type(
                f"{name} must give a row the same logits alone and in a batch; beside a longer row they differ by "
                f"{difference:.1e} (rounding explains {allowed:.1e}). Use another base."
            )
        engine_difference = _max_difference(_logits_without_mask(engine, batch), batched_BC)
        if engine_difference <= allowed:
            return None
        if engine is model or _max_difference(_logits_without_mask(model, batch), batched_BC) > allowed:
            raise error_type(
                f"{name} must be causal, but padding after a row changes its logits by {engine_difference:.1e} "
                f"(rounding explains {allowed:.1e}). Use a causal base."
            )
        return (
            f"its logits on two rows differ by {engine_difference:.1e} from transformers' "
            f"(rounding explains {allowed:.1e})"
        )
    finally:
        model.train(was_training)
        engine.train(was_training)


def _logits_with_mask(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with _training_precision(model):
        output: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return output.float()


def _logits_without_mask(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with _training_precision(model):
        return logits(model, batch)


def _training_precision(model: nn.Module) -> torch.autocast:
    """Autocast as in training: a bfloat16 base has a float32 head, and autocast converts between the two."""
    weight = next(model.parameters())
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=_coarsest_dtype(model) == torch.bfloat16)


def _max_difference(first_BC: Tensor, second_BC: Tensor) -> float:
    return float((first_BC - second_BC).abs().max())


def _coarsest_dtype(model: nn.Module) -> torch.dtype:
    """The coarsest type of the weights: a bfloat16 base has adapters and head in float32."""
    dtypes = {weight.dtype for weight in model.parameters() if weight.dtype.is_floating_point}
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float32)


def _allowed_difference(model: nn.Module, batch: dict[str, Tensor], logits_BC: Tensor) -> float:
    """The largest difference between two logits that rounding explains."""
    dtype = _coarsest_dtype(model)
    if dtype == torch.float32:
        return FLOAT32_ROUNDING * float(logits_BC.abs().max())
    return NOISE_FACTOR * rounding_noise(model, batch, logits_BC, dtype)


@torch.no_grad()
def rounding_noise(model: nn.Module, batch: dict[str, Tensor], logits_BC: Tensor, dtype: torch.dtype) -> float:
    """The largest change of a logit if the output of each module is rounded another way.

    Each number changes by up to half a unit in its last place, at random, as another order of operations may change it.
    `logits_BC` are the logits without that.
    """
    generator, unit = torch.Generator().manual_seed(0), torch.finfo(dtype).eps

    def round_differently(_module: nn.Module, _inputs: Any, output: Any) -> Tensor | None:
        if not isinstance(output, Tensor) or output.dtype != dtype:
            return None
        shift = unit * (torch.rand(output.shape, generator=generator) - 0.5).to(output.device)
        return (output.float() * (1 + shift)).to(dtype)

    hooks = [module.register_forward_hook(round_differently) for module in model.modules()]
    try:
        return max(_max_difference(_logits_with_mask(model, batch), logits_BC) for _ in range(NOISE_DRAWS))
    finally:
        for hook in hooks:
            hook.remove()
