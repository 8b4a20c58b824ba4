"""Makes the embedded base, or adapts a Qwen to a user's own unlabelled windows.

Comes in: a `PretrainConfig`. Goes out: a folder that plain transformers opens, and a dict of what was done.

Without `base`, a small Qwen3 of random weights learns to read statistics off simulated windows: at every bar those of
the bars so far, and at the last token, where a classifier reads, those of the whole window and
random conjunctions of them. What is thrown away at the end are the two linear heads.

With `base` and `data`, that Qwen goes on with next-token prediction on the rendered windows (domain-adaptive
pre-training, Gururangan et al. 2020, "Don't Stop Pretraining"). Labels are not read.

Legend: B windows of a batch, T tokens, L bars, X bars of all windows of a batch, P statistics a bar, E at the event.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from pydantic import Field, ValidationError, model_validator
from pydantic_core import ErrorDetails
from torch import Tensor
from torch.nn.utils import clip_grad_norm_
from torch.optim import AdamW, Optimizer
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from ctxtrain.config.overrides import dotted_keys, explain
from ctxtrain.config.schema import SECTIONS, Section
from ctxtrain.config.strict_yaml import load_yaml
from ctxtrain.config.value_types import Place, Rate
from ctxtrain.data.batches import Tokens, collate, tokenise
from ctxtrain.data.codec import fit_codec
from ctxtrain.data.window_file import load_windows
from ctxtrain.errors import ConfigError, shown
from ctxtrain.limits import MOST_STEPS, MOST_TOKENS
from ctxtrain.memory import needed_for
from ctxtrain.model.base import language_config
from ctxtrain.model.embedded import MAX_TOKENS, base_config, build_tokenizer
from ctxtrain.model.tokenizer import load_tokenizer, open_base, quiet_transformers
from ctxtrain.pretraining.muon import Muon
from ctxtrain.pretraining.objectives import Targets
from ctxtrain.pretraining.practice_windows import practice_windows
from ctxtrain.pretraining.reader import Reader
from ctxtrain.progress import Reporter
from ctxtrain.runtime import Purpose, generator, seed_torch
from ctxtrain.storage.atomic_files import make_folder, new_content, write_json
from ctxtrain.storage.ownership import refuse_taken

CHUNK = 512  # windows simulated at a time; batches are of windows of like length from one chunk
FIRST_CHUNK = 2**31  # places in the stream of chunks that training never reaches
DECAY_SHARE = 0.6  # of the steps, at the end, over which the learning rates fall to 0
HELD_OUT_SHARE = 0.05  # of a user's windows, to measure what adaptation did
LINES = 20  # told to the user over a run
LESS = "Set a smaller batch_size, architecture or max_tokens, and run again"


class Architecture(Section):
    """Sizes of a Qwen3."""

    width: int = Field(128, ge=8, le=65_536, description="Hidden size.")
    layers: int = Field(4, ge=1, le=1_024, description="Decoder layers.")
    heads: int = Field(4, ge=1, le=1_024, description="Attention heads.")
    kv_heads: int = Field(2, ge=1, le=1_024, description="Key and value heads; divides the attention heads.")
    head_dim: int = Field(32, ge=2, le=4_096, description="Size of a head.")
    intermediate: int = Field(256, ge=8, le=1_048_576, description="Width of the feed-forward part.")

    @model_validator(mode="after")
    def _heads_fit(self) -> Self:
        if self.heads % self.kv_heads or self.head_dim % 2:
            found = f"heads {self.heads}, kv_heads {self.kv_heads}, head_dim {self.head_dim}"
            raise ValueError(f"kv_heads must divide heads, and head_dim must be even for the rotation, got {found}")
        return self


class PretrainConfig(Section):
    """What to make and how long to train it."""

    output_dir: Place = Field(description="Folder of the new base; it must be new or empty.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of weights, windows and order.")
    steps: int = Field(2000, ge=0, le=MOST_STEPS, description="Optimizer steps; 0 writes the base as it starts.")
    batch_size: int = Field(24, ge=1, le=CHUNK, description="Windows of a step.")
    learning_rate: Rate | None = Field(
        None,
        description="Peak rate of AdamW; null is 2e-3 for a new base and 5e-5 for one that is adapted.",
    )
    matrix_learning_rate: Rate = Field(0.02, description="Peak rate of Muon, for the layers of a new base.")
    warmup_steps: int = Field(100, ge=0, le=MOST_STEPS, description="Steps of linear warm-up.")
    architecture: Architecture = Field(Architecture(), description="Sizes of a new base.")
    base: Place | None = Field(None, description="Folder or hub id of a Qwen to adapt; null makes a new one.")
    data: list[Place] = Field([], description="Files of windows that `base` is adapted to; labels are not read.")
    max_tokens: int = Field(
        MAX_TOKENS, ge=8, le=MOST_TOKENS, description="Longest text in adaptation; older tokens are cut off."
    )

    @model_validator(mode="after")
    def _base_needs_data(self) -> Self:
        if (self.base is None) != (not self.data):
            found = f"got base {shown(self.base)} and data {shown(self.data)}"
            raise ValueError(f"base and data, the windows that base is adapted to, must be given together, {found}")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Read a YAML file. Raises ConfigError with every fault."""
        tree = load_yaml(path)
        of_train = [name for name in SECTIONS if isinstance(tree, dict) and isinstance(tree.get(name), dict)]
        if not isinstance(tree, dict) or of_train:
            found = f"sections of train: {', '.join(of_train)}" if of_train else shown(tree)
            raise ConfigError(f"{path}: must hold keys of pretrain, got {found}. configs/pretrain.yaml is one.")
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError([_explain(detail) for detail in error.errors(include_url=False)]) from None


def _explain(detail: ErrorDetails) -> str:
    if detail["type"] == "missing":
        return f"{'.'.join(map(str, detail['loc']))} is required. Set it in the config."
    if detail["type"] == "value_error":  # of several keys together: it names them and what they are
        return f"{detail['msg'].removeprefix('Value error, ')}."
    return explain(detail, dotted_keys(PretrainConfig), listed_in="docs/config.md")


def pretrain(config: PretrainConfig, reporter: Reporter) -> dict[str, Any]:
    """Write a base into `output_dir` with `pretrain.json`, the facts that are returned."""
    start, folder = time.monotonic(), Path(config.output_dir)
    refuse_taken(folder, config.base or "")
    make_folder(folder)
    with (
        needed_for(f"while pre-training with batches of {config.batch_size} windows", LESS),
        new_content(folder) as scratch,
    ):
        facts = _adapt(config, reporter, scratch) if config.base else _make(config, reporter, scratch)
        facts = {"config": config.model_dump(mode="json"), **facts, "seconds": round(time.monotonic() - start)}
        write_json(scratch / "pretrain.json", facts)
    return facts


def _make(config: PretrainConfig, reporter: Reporter, folder: Path) -> dict[str, Any]:
    tokenizer = build_tokenizer()
    seed_torch(config.seed, Purpose.HEAD)
    first = practice_windows(generator(config.seed, Purpose.SAMPLING, FIRST_CHUNK), 2 * CHUNK)
    targets = Targets(generator(config.seed, Purpose.SAMPLING, FIRST_CHUNK + 1), first)
    sizes = base_config(tokenizer, **config.architecture.model_dump())
    reader = Reader(tokenizer, sizes, len(targets.bar_names), len(targets.event_names))
    optimizers = [
        AdamW(reader.others(), lr=config.learning_rate or 2e-3, betas=(0.9, 0.98), weight_decay=0.0),
        Muon(reader.matrices(), config.matrix_learning_rate),
    ]
    windows = tokens = 0
    batches = _practice_batches(config, tokenizer)
    with reporter.rows("pre-training", config.steps) as advance:
        for step in range(config.steps):
            batch, bar_BLP, event_BE = next(batches)
            _set_rates(optimizers, step, config)
            lengths_B = batch["attention_mask"].sum(dim=1)
            bar_guesses, event_guesses = reader(batch["input_ids"], lengths_B)
            losses = targets.losses(bar_guesses, event_guesses, bar_BLP, event_BE)
            sum(losses.values(), torch.zeros(())).backward()
            clip_grad_norm_(reader.others(), 1.0)
            _step(optimizers)
            windows, tokens = windows + len(lengths_B), tokens + int(lengths_B.sum())
            advance(1)
            _tell(reporter, step, config.steps, {name: float(loss.detach()) for name, loss in losses.items()})
    skill = _skill(config, reader, targets, tokenizer)
    _save_half(reader, tokenizer, folder)
    parameters = sum(weight.numel() for weight in reader.qwen.parameters())
    return {"parameters": parameters, "windows": windows, "tokens": tokens, "held_out_skill": skill}


def _practice_batches(
    config: PretrainConfig, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Batches without end, each with its statistics; chunk number n depends on the seed and n alone."""
    chunk = 0
    while True:
        rng = generator(config.seed, Purpose.SAMPLING, chunk)
        practice = practice_windows(rng, CHUNK)
        tokens = tokenise(practice.texts, tokenizer, MAX_TOKENS)
        order = np.argsort(tokens.lengths, kind="stable")
        starts = np.arange(0, CHUNK - config.batch_size + 1, config.batch_size)
        for start in rng.permutation(starts).tolist():
            rows = order[start : start + config.batch_size]
            yield (
                collate(tokens, rows),
                torch.from_numpy(practice.bar_WLP[rows]),
                torch.from_numpy(practice.event_WE[rows]),
            )
        chunk += 1


@torch.no_grad()
def _skill(
    config: PretrainConfig, reader: Reader, targets: Targets, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    """Share of the variance of the statistics at the event that is explained, on windows never trained on."""
    practice = practice_windows(generator(config.seed, Purpose.SAMPLING, FIRST_CHUNK + 2), CHUNK)
    tokens = tokenise(practice.texts, tokenizer, MAX_TOKENS)
    guesses = []
    for start in range(0, CHUNK, 32):
        batch = collate(tokens, np.arange(start, start + 32))
        guesses.append(reader(batch["input_ids"], batch["attention_mask"].sum(dim=1))[1])
    return targets.explained(
        torch.cat(guesses), torch.from_numpy(practice.bar_WLP), torch.from_numpy(practice.event_WE)
    )


def _save_half(reader: Reader, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Weights in float16 to save space; the config says float32, so that transformers computes in that."""
    model = reader.plain()
    with quiet_transformers():
        model.half().save_pretrained(folder)
        model.config.dtype = torch.float32
        model.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def _adapt(config: PretrainConfig, reporter: Reporter, folder: Path) -> dict[str, Any]:
    assert config.base is not None
    windows = [window for path in config.data for window in load_windows(path, labelled=False)]
    source = open_base(config.base).folder
    tokenizer = load_tokenizer(config.base)
    tokens = tokenise(fit_codec("compact", windows).render_all(windows), tokenizer, config.max_tokens)
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            source,
            config=language_config(source),
            dtype=torch.float32,
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
        )
    optimizer = AdamW(model.parameters(), lr=config.learning_rate or 5e-5, weight_decay=0.01)
    shuffled = generator(config.seed, Purpose.SAMPLING).permutation(len(tokens))
    held_out, rows = np.split(shuffled, [max(1, round(HELD_OUT_SHARE * len(tokens)))])
    if not len(rows):
        raise ConfigError(f"data must hold at least two windows, got {len(tokens)}.")
    before, seen = _mean_loss(model, tokens, held_out, config.batch_size), 0
    model.train()
    with reporter.rows("adapting", config.steps) as advance:
        for step in range(config.steps):
            rng = generator(config.seed, Purpose.SAMPLING, step)
            batch = collate(tokens, rng.choice(rows, min(config.batch_size, len(rows)), replace=False))
            _set_rates([optimizer], step, config)
            loss = _next_token_loss(model, batch)
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            _step([optimizer])
            seen += int(batch["attention_mask"].sum())
            advance(1)
            _tell(reporter, step, config.steps, {"next token": float(loss.detach())})
    after = _mean_loss(model, tokens, held_out, config.batch_size)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    parameters = sum(weight.numel() for weight in model.parameters())
    return {
        "parameters": parameters,
        "windows": len(windows),
        "tokens": seen,
        "held_out_loss": {"before": before, "after": after},
    }


def _next_token_loss(model: PreTrainedModel, batch: dict[str, Tensor]) -> Tensor:
    labels_BT = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    loss: Tensor = model(**batch, labels=labels_BT).loss
    return loss


@torch.no_grad()
def _mean_loss(model: PreTrainedModel, tokens: Tokens, rows: np.ndarray[Any, Any], batch_size: int) -> float:
    model.eval()
    losses = [
        float(_next_token_loss(model, collate(tokens, rows[start : start + batch_size])))
        for start in range(0, len(rows), batch_size)
    ]
    return float(np.mean(losses))


def _set_rates(optimizers: list[Optimizer], step: int, config: PretrainConfig) -> None:
    """Linear warm-up, constant, then linear decay to 0."""
    warm = (step + 1) / max(config.warmup_steps, 1)
    share = min(warm, 1.0, (config.steps - step) / (DECAY_SHARE * config.steps))
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group.setdefault("peak_lr", group["lr"])
            group["lr"] = group["peak_lr"] * share


def _step(optimizers: list[Optimizer]) -> None:
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()


def _tell(reporter: Reporter, step: int, steps: int, losses: dict[str, float]) -> None:
    if (step + 1) % max(1, steps // LINES) == 0:
        shown = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        reporter.say(f"step {step + 1:,}/{steps:,}  loss: {shown}")
