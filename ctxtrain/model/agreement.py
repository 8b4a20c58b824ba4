"""Whether a model can be used as it is meant to, asked of two rows before anything counts.

Comes in: a model of transformers, the engine that is to stand in for it, and two token rows. Goes out: the reason why
the engine cannot, or None. Gates by name (`why_plain`) know the oddities of today's checkpoints; this one sees those
that nobody has named: it compares the engine's logits with what plain transformers gives with a mask.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from ctxtrain.data.batches import Tokens, collate
from ctxtrain.errors import ConfigError, DataError
from ctxtrain.model.base_config import refusing
from ctxtrain.model.lora import load_classifier, logits
from ctxtrain.model.tokenizer import tokenizer_and_notes

LONGEST = 128  # tokens of a probe row: enough to see any rule of attention, few enough to take no time
# The largest difference of two logits that rounding explains, as a share of the largest logit.
NOISE = {torch.float32: 1e-4, torch.bfloat16: 0.1, torch.float16: 0.02}


def invented_rows(vocabulary: int, pad_id: int) -> Tokens:
    """Two rows of unlike length, of ids spread over the vocabulary, always the same.

    No rows of a user's, so that what only one of them would bring about is not laid on the base.
    """
    ids = np.random.default_rng(0).integers(0, vocabulary, LONGEST, dtype=np.int32)
    ids = np.where(ids == pad_id, (ids + 1) % vocabulary, ids).astype(np.int32)
    rows = [ids, ids[: LONGEST // 4]]
    return Tokens.of_lengths(np.concatenate(rows), np.array([len(row) for row in rows]), pad_id)


def probe_of(model: Any) -> Tokens:
    """`invented_rows` of the vocabulary of a model whose config says which id pads."""
    config = model.config.get_text_config()
    return invented_rows(config.vocab_size, config.pad_token_id)


def try_base(base: str) -> tuple[Tokenizer, list[str]]:
    """The tokenizer of a base and what a user should know of it, after all that a run asks of one.

    Opens it in the precision of its files. Raises ConfigError with what is wrong with it.
    """
    tokenizer, notes = tokenizer_and_notes(base)
    model = load_classifier(base, tokenizer.pad_token_id, dtype=None, say=notes.append)
    probe = invented_rows(len(tokenizer), tokenizer.pad_token_id)
    why_engine_differs(model, model, probe)
    refuse_untrainable(model, probe)
    return tokenizer.backend_tokenizer, notes


@torch.no_grad()
def refuse_untrainable(model: nn.Module, tokens: Tokens) -> None:
    """Raises ConfigError if a forward pass in training mode fails; it has parts, as dropout, that no other pass has."""
    was_training = model.training
    batch = collate(tokens, range(len(tokens)), next(model.parameters()).device)
    try:
        model.train()
        with refusing(ConfigError, "model.base must give logits in training", "Its config.json may be damaged"):
            _masked(model, batch)
    finally:
        model.train(was_training)


@torch.no_grad()
def why_engine_differs(
    model: nn.Module,
    engine: nn.Module,
    tokens: Tokens,
    name: str = "model.base",
    kind: type[ConfigError] | type[DataError] = ConfigError,
) -> str | None:
    """Why the engine cannot stand in for the model, called `name`, on these rows, or None.

    Raises an error of `kind` if the model itself cannot be used: its logits are not finite, or depend on the rows
    beside a row or on tokens after the last one.
    """
    weight = next(model.parameters())
    batch = collate(tokens, range(len(tokens)), weight.device)
    was_training = model.training
    model.eval()
    engine.eval()
    try:
        with refusing(kind, f"{name} must give logits for a row of any tokens", "Its config.json may be damaged"):
            together_BC = _masked(model, batch)
            alone_1C = _masked(model, collate(tokens, [len(tokens) - 1], weight.device))
        allowed = NOISE[_dtype(model)] * float(together_BC.abs().max())
        if not bool(torch.isfinite(together_BC).all()):
            raise kind(
                f"{name} must give finite logits, it gives {together_BC[0].tolist()} for a row of any "
                "tokens. Its config.json or its weights are damaged: copy it anew, or use another base."
            )
        if (distance := _distance(together_BC[-1:], alone_1C)) > allowed:
            raise kind(
                f"{name} must give a row the same logits whatever rows stand beside it, those of one row differ by "
                f"{distance:.1e} alone and beside a longer one (rounding explains {allowed:.1e}). Use another base."
            )
        found = _distance(_unmasked(engine, batch), together_BC)
        if found <= allowed:
            return None
        if engine is model or (distance := _distance(_unmasked(model, batch), together_BC)) > allowed:
            raise kind(
                f"{name} must read a row's last token by the tokens before it alone, but what pads a row changes its "
                f"logits by {found:.1e} (rounding explains {allowed:.1e}). Use a causal base."
            )
        return f"its logits on two rows differ by {found:.1e} from transformers' (rounding explains {allowed:.1e})"
    finally:
        model.train(was_training)
        engine.train(was_training)


def _masked(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with _precision(model):
        output: Tensor = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    return output.float()


def _unmasked(model: Any, batch: dict[str, Tensor]) -> Tensor:
    with _precision(model):
        return logits(model, batch)


def _precision(model: nn.Module) -> torch.autocast:
    """As training calls the model: the head of a bfloat16 base is float32, and autocast brings the two together."""
    weight = next(model.parameters())
    return torch.autocast(weight.device.type, torch.bfloat16, enabled=_dtype(model) == torch.bfloat16)


def _distance(first_BC: Tensor, second_BC: Tensor) -> float:
    return float((first_BC - second_BC).abs().max())


def _dtype(model: nn.Module) -> torch.dtype:
    """The coarsest type of the weights: a bfloat16 base has adapters and head in float32."""
    kinds = {weight.dtype for weight in model.parameters() if weight.dtype in NOISE}
    return max(kinds, key=lambda kind: NOISE[kind], default=torch.float32)
