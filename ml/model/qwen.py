"""A Qwen sequence classifier: frozen base, LoRA adapters, trained 3-class head.

Comes in: a folder or hub id of any Qwen that transformers opens as a sequence classifier. Goes out: a PEFT model whose
`logits(...)` has shape (B, 3), its trainable weights by name, and the merged plain model.

The head is transformers' own `score` (hidden → 3, no bias). It pools the last token whose id is not the pad id, so
texts are padded on the right and `batches.py` refuses a pad id inside a text.
"""

from __future__ import annotations

import hashlib
import string
import tempfile
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

import torch
from peft import (
    LoraConfig,
    PeftModel,
    TaskType,
    get_peft_model,
    get_peft_model_state_dict,
    set_peft_model_state_dict,
)
from tokenizers import processors
from torch import Tensor, nn
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    BitsAndBytesConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.utils import logging as transformers_logging

from ml.errors import ConfigError
from ml.model.base import (
    BaseFacts,
    base_config,
    check_base,
    check_finite,
    copy_tokenizer,
    find_base,
    head_order,
    language_config,
)
from ml.model.plain_config import HEAD, refusing
from ml.regular import refuse_special
from ml.runtime import Purpose, seed_torch

# What windows are made of, and what tokenizers treat in ways of their own.
SPELLED = (
    "UnfgwM3S4624810555 B99980765 C00124- r12a34t56z50?",
    '{"bars":[{"open":4135.7}]}',
    "Ça  va?\n<|im_end|> 上涨",
)


def open_base(base: str, revision: str | None = None) -> BaseFacts:
    """The folder of a base and what its files say. Raises ConfigError with every fault of them."""
    with _loading(base):
        folder = find_base(base, revision)
    return check_base(folder)


def load_tokenizer(base: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Tokenizer of a base whose files are sound.

    Texts that spell a special token stay text, padding goes right, and cutting goes left, where the oldest bars are.
    Given here, and not set later, all three are saved with the tokenizer and so hold for whoever opens the export. Of
    the base's own tokenizer only its tokens and rules are kept: no chat template, class or file of it gets into an
    export. Raises ConfigError with every fault of the base.
    """
    facts = open_base(base, revision)
    with _loading(base), tempfile.TemporaryDirectory() as scratch:
        # transformers chooses a class by these files. What would name code is left out before, as in the export, or
        # it would choose one class here and another there.
        copy_tokenizer(facts.folder, Path(scratch))
        own = AutoTokenizer.from_pretrained(scratch, trust_remote_code=False, local_files_only=True)
    if not own.is_fast:
        raise ConfigError(f"model.base needs a tokenizer.json, {base!r} has a {type(own).__name__} without one.")
    if own.pad_token is None and own.eos_token is None:
        raise ConfigError(
            f"model.base needs a tokenizer with a pad token, {base!r} has none. Add one to its tokenizer."
        )
    special: dict[str, Any] = {
        name: getattr(own, name) for name in ("bos_token", "eos_token", "unk_token") if getattr(own, name)
    }
    named = {own.pad_token, *special.values()}
    if others := [token for token in own.all_special_tokens if token not in named]:
        special["extra_special_tokens"] = others
    backend = own.backend_tokenizer
    if backend.num_special_tokens_to_add(is_pair=False):
        # What a tokenizer puts around a text would be lost where a text is cut, here and not there.
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    with _loading(base):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token=own.pad_token or own.eos_token,
            split_special_tokens=True,
            padding_side="right",
            truncation_side="left",
            clean_up_tokenization_spaces=False,
            **special,
        )
        _check_reopens(facts.folder, tokenizer)
    _check_letters(facts.folder, tokenizer)
    largest = max(tokenizer.get_vocab().values())
    if largest >= facts.embedding_rows:
        raise ConfigError(
            f"model.base: {facts.folder}: the tokenizer's ids must be below the {facts.embedding_rows:,} rows of the "
            f"embedding, it has ids up to {largest:,} ({tokenizer.convert_ids_to_tokens(largest)!r}); its pad token is "
            f"{tokenizer.pad_token!r}, {tokenizer.pad_token_id:,}. Use the tokenizer that belongs to the weights, or "
            "resize the embedding (resize_token_embeddings) and save the base anew."
        )
    return cast(PreTrainedTokenizerBase, tokenizer)


def _check_reopens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError unless the tokenizer, saved and opened as an export's is, gives the same ids."""
    with tempfile.TemporaryDirectory() as scratch:
        language_config(folder).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        reopened = AutoTokenizer.from_pretrained(scratch, trust_remote_code=False, local_files_only=True)
    for text in SPELLED:
        wanted, found = (one(text, split_special_tokens=True)["input_ids"] for one in (tokenizer, reopened))
        if wanted != found:
            raise ConfigError(
                f"model.base: {folder}: the tokenizer must give the same tokens when it is saved and opened again, "
                f"{text!r} becomes {wanted[:8]} here and {found[:8]} there. Use a tokenizer of the base's own family."
            )


def _check_letters(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raises ConfigError unless the tokenizer tells every character of a rendered window from the others."""
    characters = f"{string.ascii_letters}{string.digits}-?"
    ids = {character: tuple(tokenizer(character, split_special_tokens=True)["input_ids"]) for character in characters}
    alike = [one for one in ids if not ids[one] or list(ids.values()).count(ids[one]) > 1]
    if alike:
        raise ConfigError(
            f"model.base: {folder}: the tokenizer must give letters, digits, - and ? tokens of their own, it does not "
            f"tell apart or drops {' '.join(alike[:12])}. A base needs tokenizer.json, or vocab.json with merges.txt, "
            "of its own family: copy them from its source."
        )


def load_classifier(
    base: str,
    pad_id: int,
    *,
    revision: str | None = None,
    dtype: torch.dtype | None = torch.float32,
    quantization: str = "none",
    seed: int = 0,
) -> PreTrainedModel:
    """The base with a 3-class head, drawn from the seed where the base brings none; a dtype of None is the files' own.

    Raises ConfigError if the base cannot be opened as a sequence classifier, lacks more than the head or holds a weight
    that is not finite.
    """
    with _loading(base):
        folder = find_base(base, revision)
        config = base_config(folder)
        config.get_text_config().pad_token_id = config.pad_token_id = pad_id
        config.get_text_config().use_cache = False
        seed_torch(seed, Purpose.HEAD)
        model, report = AutoModelForSequenceClassification.from_pretrained(
            folder,
            config=config,
            dtype=dtype or "auto",
            quantization_config=_quantization(quantization, dtype or torch.float32),
            use_safetensors=True,
            local_files_only=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    missing = sorted(name for name in report["missing_keys"] if not name.startswith(f"{HEAD}."))
    if missing:
        raise ConfigError(
            f"model.base must hold every weight but the head, {base!r} lacks {len(missing)}, first {missing[0]}. "
            "Use a whole checkpoint."
        )
    if beyond := sorted(name for name in report["unexpected_keys"] if ".layers." in name and "mtp" not in name):
        raise ConfigError(
            f"model.base must have a place for every layer of its files, config.json of {base!r} has none for "
            f"{len(beyond)} weights, first {beyond[0]}. Use the config.json and the weights of one checkpoint."
        )
    if (order := head_order(folder)) is not None and f"{HEAD}.weight" not in report["missing_keys"]:
        with torch.no_grad():
            getattr(model, HEAD).weight.copy_(getattr(model, HEAD).weight[order].clone())
    if any(weight.is_floating_point() and not bool(torch.isfinite(weight).all()) for weight in model.parameters()):
        check_finite(folder)
    getattr(model, HEAD).to(torch.float32)  # the head is trained, and trained weights stay float32
    return cast(PreTrainedModel, model)


def add_lora(
    model: PreTrainedModel,
    *,
    r: int,
    alpha: int,
    dropout: float,
    target_modules: Sequence[str],
    layers: str = "all",
    seed: int = 0,
    base_name: str | None = None,
) -> PeftModel:
    """Freeze the base, put adapters on the target modules and make adapters and head trainable, in float32.

    `layers` is all or last:N. Raises ConfigError if a target module or a layer does not exist.
    """
    found = {name.rpartition(".")[2] for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    absent = [name for name in target_modules if name not in found]
    if absent:
        raise ConfigError(
            f"lora.target_modules must name linear layers of the base, {', '.join(absent)} is not one. "
            f"It has {', '.join(sorted(found - {HEAD}))}."
        )
    seed_torch(seed, Purpose.HEAD, 1)
    with warnings.catch_warnings():  # peft reads a deprecated attribute of transformers
        warnings.simplefilter("ignore", FutureWarning)
        adapted = get_peft_model(
            model,
            LoraConfig(
                task_type=TaskType.SEQ_CLS,
                r=r,
                lora_alpha=alpha,
                lora_dropout=dropout,
                target_modules=list(target_modules),
                layers_to_transform=_layer_numbers(layers, model.config.get_text_config().num_hidden_layers),
                modules_to_save=[HEAD],
            ),
        )
    if base_name is not None:
        adapted.peft_config["default"].base_model_name_or_path = base_name
    return cast(PeftModel, adapted)


def logits(model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
    """Uncalibrated scores, float32, of shape (B, 3), of a batch from `batches.collate`, and what else the model takes.

    The mask stays out: behind a causal model, padding on the right reaches no token before it, and attention without a
    mask tensor is faster. The tests compare this with the masked model for every family.
    """
    inputs = {name: value for name, value in batch.items() if name != "attention_mask"}
    output: Tensor = model(**inputs).logits
    return output.float()


def trainable_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    return {name: weight for name, weight in model.named_parameters() if weight.requires_grad}


def trainable_state(model: PeftModel) -> dict[str, Tensor]:
    """Copies of adapters and head by PEFT's names, on the CPU."""
    state = get_peft_model_state_dict(model, save_embedding_layers=False)
    return {name: state[name].detach().cpu().clone() for name in sorted(state)}


def load_trainable_state(model: PeftModel, state: Mapping[str, Tensor]) -> None:
    """Put saved adapters and head back. Raises ConfigError unless exactly the model's own names are there."""
    own = get_peft_model_state_dict(model, save_embedding_layers=False)
    odd = sorted(own.keys() ^ state.keys())
    odd += [name for name in own if name in state and own[name].shape != state[name].shape]
    if odd:
        raise ConfigError(
            f"A checkpoint must hold the weights that this config trains; {len(odd)} differ, the first is {odd[0]}. "
            "Resume with the config of the run."
        )
    set_peft_model_state_dict(model, dict(state))


def merge(model: PeftModel) -> PreTrainedModel:
    """Add the adapters into the base weights (W + α/r · BA) and return the plain model. Consumes `model`."""
    return cast(PreTrainedModel, model.merge_and_unload(safe_merge=True))


def parameter_counts(model: nn.Module) -> dict[str, int | float]:
    """Parameters in all, those that are trained, and their share."""
    total = sum(weight.numel() for weight in model.parameters())
    # PEFT keeps the untrained original of the head beside the trained copy; it is not part of the exported model.
    total -= sum(weight.numel() for name, weight in model.named_parameters() if f"{HEAD}.original_module" in name)
    trained = sum(weight.numel() for weight in trainable_parameters(model).values())
    return {"parameters": total, "trainable": trained, "trainable_share": trained / total}


def frozen_sha256(model: nn.Module) -> str:
    """SHA-256 over name, type, shape and bytes of every frozen weight but the unused original of the head."""
    digest = hashlib.sha256()
    for name, weight in sorted(model.named_parameters()):
        if not weight.requires_grad and f"{HEAD}.original_module" not in name:
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}\n".encode())
            digest.update(weight.detach().cpu().contiguous().view(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _layer_numbers(layers: str, count: int) -> list[int] | None:
    if layers == "all":
        return None
    last = int(layers.removeprefix("last:"))
    if last > count:
        raise ConfigError(f"lora.layers must be at most last:{count}, the layers of the base, got {layers}.")
    return list(range(count - last, count))


def _quantization(name: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Settings of bitsandbytes for the frozen base. Needs a GPU; not run on the machine where this was written."""
    if name == "none":
        return None
    if not torch.cuda.is_available():
        raise ConfigError(f"model.quantization={name} needs a GPU, none was found. Use model.quantization=none.")
    return BitsAndBytesConfig(
        load_in_8bit=name == "int8",
        load_in_4bit=name == "nf4",
        bnb_4bit_quant_type="nf4",
        bnb_4bit_compute_dtype=dtype,
        llm_int8_skip_modules=[HEAD],
    )


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Keep transformers' load report and progress bars off the terminal."""
    verbosity = transformers_logging.get_verbosity()
    bars = transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()


@contextmanager
def _loading(base: str) -> Iterator[None]:
    """Turn the many errors of transformers' loaders into one ConfigError; a pipe in the folder is refused unopened."""
    if Path(base).is_dir():
        refuse_special(Path(base).iterdir())
    here = "" if Path(base).is_absolute() else f" in {Path.cwd()}, from which relative paths count,"
    where = "this folder" if Path(base).is_dir() else f"neither a folder{here} nor a model that the hub gave"
    rule = f"model.base must be a Qwen checkpoint that transformers opens as a sequence classifier; {base!r} is {where}"
    with quiet_transformers(), refusing(ConfigError, rule, "Give its folder, its hub id, or embedded"):
        yield
