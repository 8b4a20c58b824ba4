"""Build the parts of a run from its config: input files, model, learner, fingerprint, and settings of other modules.

Input: a `Config`, and values that depend on the data (pad id, class weights, number of steps). Output: the model with
adapters, or a `Learner` with optimizer, schedule and loss, on its devices.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from ctxtrain.config.schema import Config
from ctxtrain.data.codec import Codec
from ctxtrain.data.dataset import Dataset
from ctxtrain.data.tokens import Tokens
from ctxtrain.engine.api import choose_checkpointing
from ctxtrain.labels import LABELS
from ctxtrain.memory import available_memory
from ctxtrain.model import lora
from ctxtrain.model.averaging import Candidates, concatenate
from ctxtrain.model.base import load_classifier
from ctxtrain.model.base_files import base_config, find_base
from ctxtrain.model.losses import make_loss
from ctxtrain.model.optimizer import make_optimizer
from ctxtrain.model.precision import choose_precision
from ctxtrain.model.schedule import make_schedule
from ctxtrain.model.shape import Batch, LoraShape, ModelShape, Precision, Training
from ctxtrain.model.skeleton import Skeleton, Trained
from ctxtrain.runtime import from_first_process, is_main_process, join_processes, make_accelerator
from ctxtrain.storage import checkpoint
from ctxtrain.storage.atomic_files import DamagedFile
from ctxtrain.storage.ownership import RUN_SUBFOLDER
from ctxtrain.storage.run_folder import RunFolder
from ctxtrain.tracking.trackers import require_trackers
from ctxtrain.training.epoch import Loop
from ctxtrain.training.step import Learner
from ctxtrain.training.validation import EVALUATION_BATCH


def base_name(config: Config) -> str:
    """The base model's name in exports and summaries: its hub id, or the name of its folder without the path."""
    base = config.model.base
    return Path(base).name if Path(base).is_dir() else base


def batch_size(config: Config) -> str:
    """The size of a batch in words, for a message about memory."""
    return f"batches of {config.training.batch_size} windows of at most {config.model.max_tokens} tokens"


def build_model(
    config: Config,
    pad_id: int,
    *,
    dtype: torch.dtype,
    quantization: str,
    say: Callable[[str], None] | None = None,
) -> PeftModel:
    """The base model in the given precision with new adapters and head; `say` reports notes."""
    base = load_classifier(
        config.model.base,
        pad_id,
        revision=config.model.revision,
        dtype=dtype,
        quantization=quantization,
        seed=config.training.seed,
        say=say,
    )
    return lora.add_lora(base, **config.lora.model_dump(), seed=config.training.seed, base_name=base_name(config))


def trained(config: Config, skeleton: Skeleton, weights: Mapping[str, Tensor]) -> Trained:
    """What a run has trained, with a function that loads it whatever precision trained the adapters."""

    def load() -> PeftModel:
        pad_id = skeleton.plain.config.pad_token_id
        model = build_model(config, pad_id, dtype=torch.float32, quantization="none")
        lora.load_trainable_state(model, weights)
        return model

    name, quantization = base_name(config), config.model.quantization
    note = (
        f"the adapters were trained on {name} quantised to {quantization}; the export merges them into the unquantised "
        "base, so its logits differ from those of training"
    )
    return Trained(skeleton, weights, load, [] if quantization == "none" else [note])


def candidates(config: Config, skeleton: Skeleton, weights: Mapping[int, Mapping[str, Tensor]]) -> Candidates:
    """The best epoch and the mean of all, from the `weights` of the best epochs, the best one first."""
    best, wanted = trained(config, skeleton, next(iter(weights.values()))), config.checkpoints.average
    if len(weights) == 1:
        return Candidates(best, list(weights), wanted)
    lora_config = config.lora.model_copy(update={"r": len(weights) * config.lora.r})
    wide = config.model_copy(update={"lora": lora_config})  # the same alpha: see `averaging.py`
    mean = concatenate(list(weights.values()), skeleton.adapted)
    wide_skeleton = build_skeleton(wide, skeleton.plain.config.pad_token_id)
    return Candidates(best, list(weights), wanted, trained(wide, wide_skeleton, mean))


def build_skeleton(config: Config, pad_id: int) -> Skeleton:
    """Names, shapes and source files of the weights of a run's model."""
    settings = config.lora.model_dump() | {"base_name": base_name(config)}
    return Skeleton.of(config.model.base, pad_id, settings, revision=config.model.revision)


def export_settings(config: Config) -> dict[str, Any]:
    """Keyword arguments of `prepare_export` from a config."""
    return {
        "max_tokens": config.model.max_tokens,
        "engine": config.model.engine,
        **config.export.model_dump(),
        "calibrate": config.calibration.method == "temperature",
        "targets": config.targets.model_dump(),
        "seed": config.training.seed,
    }


def training_loop(config: Config) -> Loop:
    """What a config says about the loop of a training."""
    training = config.training
    return Loop(
        epochs=training.epochs,
        patience=training.patience,
        seed=training.seed,
        batch_size=training.batch_size,
        accumulation=training.gradient_accumulation,
        skip_nonfinite=training.skip_nonfinite,
    )


def training_dtype(
    config: Config, start: Path | None, *, is_one_of_several: bool, say: Callable[[str], None]
) -> torch.dtype:
    """The dtype of a run, chosen by the first process for all; `say` receives the reason.

    `start` is the checkpoint that the run resumes from. One of several seeds or folds takes the dtype of the others.
    """
    join_processes()
    name = ""
    if is_main_process():
        base = base_config(find_base(config.model.base, config.model.revision))
        others = _sibling_checkpoints(Path(config.output_dir)) if is_one_of_several else []
        choice = choose_precision(config.model.dtype, base, _stored_dtype([start] if start else others))
        name = str(choice.dtype)
        if choice.line:
            say(choice.line)
    dtype: torch.dtype = getattr(torch, from_first_process(name).removeprefix("torch."))
    return dtype


def _sibling_checkpoints(folder: Path) -> list[Path]:
    """The checkpoints of the runs beside a run of several seeds or folds."""
    siblings = sorted(path for path in folder.parent.glob("*") if RUN_SUBFOLDER.fullmatch(path.name))
    return [path for sibling in siblings for path, _, _ in RunFolder(sibling).checkpoints(0).files()]


def _stored_dtype(checkpoints: Sequence[Path]) -> str | None:
    """The dtype in the first intact checkpoint."""
    for path in checkpoints:
        with suppress(DamagedFile):
            return str(checkpoint.load(path)["fingerprint"].get("dtype"))
    return None


def run_fingerprint(
    config: Config,
    dtype: torch.dtype | None,
    codec: Codec,
    rows: Mapping[str, str],
    tokenizer: PreTrainedTokenizerBase,
    skeleton: Skeleton,
) -> dict[str, Any]:
    """What must be unchanged when a run is resumed; `rows` are digests of the splits."""
    dump = config.model_dump(mode="json")
    # This key decides where a run stops, not what it trains: users may raise it to resume a stopped run.
    del dump["training"]["skip_nonfinite"]
    return {
        "config": {name: dump[name] for name in ("augmentation", "lora", "loss", "oversampling", "training")},
        "dtype": str(dtype),
        "quantization": config.model.quantization,
        "labels": list(LABELS),
        "codec": codec.model_dump(mode="json"),
        "rows": dict(rows),
        "tokenizer_sha256": hashlib.sha256(tokenizer.backend_tokenizer.to_str().encode()).hexdigest(),
        "base_sha256": skeleton.sha256(),
    }


def build_learner(
    config: Config,
    dtype: torch.dtype,
    pad_id: int,
    data: Dataset,
    total_steps: int,
    say: Callable[[str], None],
) -> Learner:
    """Model, optimizer, schedule and loss; `say` reports notes. Raises ConfigError if they do not fit together."""
    training = config.training
    say(f"loading base model {config.model.base}")
    require_trackers(config.tracking.to)
    accelerator = make_accelerator(dtype)
    free = available_memory(accelerator.device)
    model = build_model(
        config, pad_id, dtype=dtype, quantization=config.model.quantization, say=lambda note: say(f"note: {note}")
    )
    optimizer = make_optimizer(lora.trainable_parameters(model).values(), **training.optimizer_settings)
    schedule = make_schedule(optimizer, training.schedule, warmup_steps=training.warmup_steps, total_steps=total_steps)
    loss_fn = make_loss(data.class_weights, accelerator.device, **config.loss.settings)
    learner = Learner(
        accelerator,
        model,
        optimizer,
        schedule,
        loss_fn,
        max_grad_norm=training.max_grad_norm,
        seed=training.seed,
        engine=config.model.engine,
        tokens_per_batch=training.tokens_per_batch,
        say=say,
    )
    run = memory_settings(config, dtype, accelerator.device, data.tokens | {"train": data.training.whole})
    shape = ModelShape.from_config(model.get_base_model().config)
    choose_checkpointing(learner.engine, shape, run, config.model.gradient_checkpointing, free, say)
    return learner


def build_part_learner(
    config: Config, dtype: torch.dtype, pad_id: int, steps_of_run: int, part: Dataset, steps: int
) -> Learner:
    """The learner for a part of the training rows, with `steps` optimizer steps in all.

    Its warm-up has the same share of them as that of the run: the run's own could be longer than the whole training.
    """
    warmup_steps = config.training.warmup_steps * steps // steps_of_run
    training = config.training.model_copy(update={"warmup_steps": warmup_steps})
    return build_learner(config.model_copy(update={"training": training}), dtype, pad_id, part, steps, lambda _: None)


def memory_settings(config: Config, dtype: torch.dtype, device: torch.device, tokens: Mapping[str, Tokens]) -> Training:
    """What the memory of a run depends on besides the model, with its largest batches; the engine is not chosen yet."""
    limit, settings = config.training.tokens_per_batch, config.lora
    longest = {split: int(tokens[split].lengths.max()) for split in ("train", "val")}
    return Training(
        lora=LoraShape(settings.r, settings.dropout, tuple(settings.target_modules), settings.layers),
        precision=Precision(
            "bfloat16" if dtype == torch.bfloat16 else "float32", "cuda" if device.type == "cuda" else "cpu"
        ),
        micro_batch=Batch.of_rows(config.training.batch_size, longest["train"], limit),
        validation_batch=Batch.of_rows(min(EVALUATION_BATCH, len(tokens["val"])), longest["val"], limit),
        quantization=config.model.quantization,
    )


def model_summary(config: Config, base: str, skeleton: Skeleton, fingerprint: Mapping[str, Any]) -> dict[str, Any]:
    """The model's entries in the summary. The counts are those of the unquantised model, as it is exported."""
    return {
        "base": base,
        "revision": config.model.revision,
        "family": skeleton.plain.config.model_type,
        "base_sha256": fingerprint["base_sha256"],
        **lora.parameter_counts(skeleton.adapted),
    }
