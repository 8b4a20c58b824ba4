"""Pre-trains the embedded base model, or adapts a Qwen to a user's unlabelled windows.

Input: a `PretrainConfig`. Output: a folder that plain transformers opens, and a dict of facts about the training.

Without `base`, a small Qwen3 with random weights learns to predict statistics of simulated windows. At every bar these
describe the bars so far; at the last token, which a classifier pools, they describe the whole window and include random
conjunctions of statistics. The two linear heads are discarded at the end.

With `base` and `data`, that Qwen continues next-token prediction on the rendered windows (domain-adaptive pre-training,
Gururangan et al. 2020, "Don't Stop Pretraining"). Labels are not read.

Legend: B windows of a batch, T tokens, L bars, X bars of all windows of a batch, P statistics per bar, E at the event.
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

from ctxtrain.config.overrides import describe_error, dotted_keys
from ctxtrain.config.schema import SECTIONS
from ctxtrain.config.sections import Section
from ctxtrain.config.strict_yaml import load_yaml
from ctxtrain.config.value_types import LearningRate, PathText
from ctxtrain.data.batches import collate
from ctxtrain.data.codec_fitter import fit_codec
from ctxtrain.data.tokens import Tokens, tokenise
from ctxtrain.data.window_file import load_windows
from ctxtrain.errors import ConfigError, short_repr
from ctxtrain.limits import MAX_STEPS, MAX_TEXT_TOKENS
from ctxtrain.memory import annotate_memory_errors
from ctxtrain.model.base_files import language_config
from ctxtrain.model.embedded import MAX_TOKENS, base_config, build_tokenizer
from ctxtrain.model.tokenizer import load_tokenizer, open_base, quiet_transformers
from ctxtrain.pretraining.muon import Muon
from ctxtrain.pretraining.objectives import Targets
from ctxtrain.pretraining.practice_windows import practice_windows
from ctxtrain.pretraining.statistics_model import StatisticsModel
from ctxtrain.progress import Reporter
from ctxtrain.runtime import Purpose, generator, seed_torch
from ctxtrain.storage.atomic_files import fill_empty_folder, make_folder, write_json
from ctxtrain.storage.ownership import require_empty_output_dir
from ctxtrain.urls import shown

CHUNK = 512  # windows simulated at a time; a batch has windows of similar length from one chunk
HELD_OUT_CHUNK = 2**31  # first chunk number that training never reaches
DECAY_SHARE = 0.6  # of the steps; the learning rates decay to 0 over these last steps
HELD_OUT_SHARE = 0.05  # of the user's windows, to measure the effect of adaptation
LOG_LINES = 20  # number of progress lines in a run
MEMORY_REMEDY = "Set a smaller batch_size, architecture or max_tokens, and run again"


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
            values = f"heads {self.heads}, kv_heads {self.kv_heads}, head_dim {self.head_dim}"
            raise ValueError(f"kv_heads must divide heads, and head_dim must be even for RoPE, got {values}")
        return self


class PretrainConfig(Section):
    """Config of pre-training: what to train, on what, and for how long."""

    output_dir: PathText = Field(description="Folder of the new base; it must be new or empty.")
    seed: int = Field(0, ge=0, lt=2**32, description="Seed of weights, windows and order.")
    steps: int = Field(2000, ge=0, le=MAX_STEPS, description="Optimizer steps; 0 writes the base as it starts.")
    batch_size: int = Field(24, ge=1, le=CHUNK, description="Windows of a step.")
    learning_rate: LearningRate | None = Field(
        None,
        description="Peak rate of AdamW; null is 2e-3 for a new base and 5e-5 for one that is adapted.",
    )
    matrix_learning_rate: LearningRate = Field(0.02, description="Peak rate of Muon, for the layers of a new base.")
    warmup_steps: int = Field(100, ge=0, le=MAX_STEPS, description="Steps of linear warm-up.")
    architecture: Architecture = Field(Architecture(), description="Sizes of a new base.")
    base: PathText | None = Field(None, description="Folder or hub id of a Qwen to adapt; null makes a new one.")
    data: list[PathText] = Field([], description="Files of windows that `base` is adapted to; labels are not read.")
    max_tokens: int = Field(
        MAX_TOKENS, ge=8, le=MAX_TEXT_TOKENS, description="Longest text in adaptation; older tokens are cut off."
    )

    @model_validator(mode="after")
    def _base_needs_data(self) -> Self:
        if (self.base is None) != (not self.data):
            values = f"got base {short_repr(self.base)} and data {short_repr(self.data)}"
            raise ValueError(f"base and data, the windows that base is adapted to, must be given together, {values}")
        return self

    @classmethod
    def load(cls, path: str | Path) -> Self:
        """Load a YAML file. Raises ConfigError with every fault."""
        tree = load_yaml(path)
        train_sections = [name for name in SECTIONS if isinstance(tree, dict) and isinstance(tree.get(name), dict)]
        if not isinstance(tree, dict) or train_sections:
            value = f"sections of train: {', '.join(train_sections)}" if train_sections else short_repr(tree)
            raise ConfigError(f"{path}: must hold keys of pretrain, got {value}. See configs/pretrain.yaml.")
        try:
            return cls.model_validate(tree)
        except ValidationError as error:
            raise ConfigError([_describe_fault(detail) for detail in error.errors(include_url=False)]) from None


def _describe_fault(detail: ErrorDetails) -> str:
    if detail["type"] == "missing":
        return f"{'.'.join(map(str, detail['loc']))} is required. Set it in the config."
    if detail["type"] == "value_error":  # from a validator of several keys; its message names keys and values
        return f"{detail['msg'].removeprefix('Value error, ')}."
    return describe_error(detail, dotted_keys(PretrainConfig), listed_in="docs/config.md")


def pretrain(config: PretrainConfig, reporter: Reporter) -> dict[str, Any]:
    """Write a base model and `pretrain.json` into `output_dir`; return the facts in that file."""
    start, folder = time.monotonic(), Path(config.output_dir)
    require_empty_output_dir(folder, config.base or "")
    make_folder(folder)
    with (
        annotate_memory_errors(f"while pre-training with batches of {config.batch_size} windows", MEMORY_REMEDY),
        fill_empty_folder(folder) as scratch,
    ):
        facts = _adapt_base(config, reporter, scratch) if config.base else _train_new_base(config, reporter, scratch)
        values = config.model_dump(mode="json") | {"data": [shown(place) for place in config.data]}
        facts = {"config": values, **facts, "seconds": round(time.monotonic() - start)}
        write_json(scratch / "pretrain.json", facts)
    return facts


def _train_new_base(config: PretrainConfig, reporter: Reporter, folder: Path) -> dict[str, Any]:
    tokenizer = build_tokenizer()
    seed_torch(config.seed, Purpose.HEAD)
    first = practice_windows(generator(config.seed, Purpose.SAMPLING, HELD_OUT_CHUNK), 2 * CHUNK)
    targets = Targets(generator(config.seed, Purpose.SAMPLING, HELD_OUT_CHUNK + 1), first)
    sizes = base_config(tokenizer, **config.architecture.model_dump())
    model = StatisticsModel(tokenizer, sizes, len(targets.bar_names), len(targets.event_names))
    optimizers = [
        AdamW(model.other_parameters(), lr=config.learning_rate or 2e-3, betas=(0.9, 0.98), weight_decay=0.0),
        Muon(model.layer_matrices(), config.matrix_learning_rate),
    ]
    windows = tokens = 0
    batches = _practice_batches(config, tokenizer)
    with reporter.track_rows("pre-training", config.steps) as advance:
        for step in range(config.steps):
            batch, bar_BLP, event_BE = next(batches)
            _set_rates(optimizers, step, config)
            lengths_B = batch["attention_mask"].sum(dim=1)
            bar_predictions, event_predictions = model(batch["input_ids"], lengths_B)
            losses = targets.losses(bar_predictions, event_predictions, bar_BLP, event_BE)
            sum(losses.values(), torch.zeros(())).backward()
            clip_grad_norm_(model.other_parameters(), 1.0)
            _step(optimizers)
            windows, tokens = windows + len(lengths_B), tokens + int(lengths_B.sum())
            advance(1)
            _report_losses(reporter, step, config.steps, {name: float(loss.detach()) for name, loss in losses.items()})
    skill = _held_out_skill(config, model, targets, tokenizer)
    _save_float16(model, tokenizer, folder)
    parameters = sum(weight.numel() for weight in model.qwen.parameters())
    return {"parameters": parameters, "windows": windows, "tokens": tokens, "held_out_skill": skill}


def _practice_batches(
    config: PretrainConfig, tokenizer: PreTrainedTokenizerFast
) -> Iterator[tuple[dict[str, Tensor], Tensor, Tensor]]:
    """Endless batches with their statistics. Chunk number n depends only on the seed and n."""
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
def _held_out_skill(
    config: PretrainConfig, model: StatisticsModel, targets: Targets, tokenizer: PreTrainedTokenizerFast
) -> dict[str, float]:
    """Explained variance of the statistics at the event, on windows that training never sees."""
    practice = practice_windows(generator(config.seed, Purpose.SAMPLING, HELD_OUT_CHUNK + 2), CHUNK)
    tokens = tokenise(practice.texts, tokenizer, MAX_TOKENS)
    predictions = []
    for start in range(0, CHUNK, 32):
        batch = collate(tokens, np.arange(start, start + 32))
        predictions.append(model(batch["input_ids"], batch["attention_mask"].sum(dim=1))[1])
    return targets.explained_variance(
        torch.cat(predictions), torch.from_numpy(practice.bar_WLP), torch.from_numpy(practice.event_WE)
    )


def _save_float16(model: StatisticsModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Save weights in float16 for size, with float32 in the config so that transformers computes in float32."""
    qwen = model.to_qwen()
    with quiet_transformers():
        qwen.half().save_pretrained(folder)
        qwen.config.dtype = torch.float32
        qwen.config.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    (folder / "model.safetensors").chmod(0o644)


def _adapt_base(config: PretrainConfig, reporter: Reporter, folder: Path) -> dict[str, Any]:
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
    loss_before, trained_tokens = _mean_loss(model, tokens, held_out, config.batch_size), 0
    model.train()
    with reporter.track_rows("adapting", config.steps) as advance:
        for step in range(config.steps):
            rng = generator(config.seed, Purpose.SAMPLING, step)
            batch = collate(tokens, rng.choice(rows, min(config.batch_size, len(rows)), replace=False))
            _set_rates([optimizer], step, config)
            loss = _next_token_loss(model, batch)
            loss.backward()
            clip_grad_norm_(model.parameters(), 1.0)
            _step([optimizer])
            trained_tokens += int(batch["attention_mask"].sum())
            advance(1)
            _report_losses(reporter, step, config.steps, {"next token": float(loss.detach())})
    loss_after = _mean_loss(model, tokens, held_out, config.batch_size)
    with quiet_transformers():
        model.save_pretrained(folder)
        tokenizer.save_pretrained(folder)
    parameters = sum(weight.numel() for weight in model.parameters())
    return {
        "parameters": parameters,
        "windows": len(windows),
        "tokens": trained_tokens,
        "held_out_loss": {"before": loss_before, "after": loss_after},
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


def _report_losses(reporter: Reporter, step: int, steps: int, losses: dict[str, float]) -> None:
    if (step + 1) % max(1, steps // LOG_LINES) == 0:
        text = "  ".join(f"{name} {loss:.4f}" for name, loss in losses.items())
        reporter.say(f"step {step + 1:,}/{steps:,}  loss: {text}")
