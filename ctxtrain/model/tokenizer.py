"""Loads the tokenizer of a base model in the form that training and the export use.

Input: `model.base`. Output: a tokenizer with the tokens and rules of the base model and nothing else, or a ConfigError.
"""

from __future__ import annotations

import string
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, cast

from tokenizers import Tokenizer, processors
from transformers import AutoTokenizer, PreTrainedTokenizerBase, PreTrainedTokenizerFast
from transformers.utils import logging as transformers_logging

from ctxtrain.errors import ConfigError
from ctxtrain.model.base_config import convert_errors
from ctxtrain.model.base_files import BaseFacts, check_base, copy_tokenizer, find_base, language_config
from ctxtrain.regular_files import refuse_special

# Characters of windows, and texts that tokenizers often treat differently.
PROBE_TEXTS = (
    "UnfgwM3S4624810555 B99980765 C00124- r12a34t56z50?",
    '{"bars":[{"open":4135.7}]}',
    "Ça  va?\n<|im_end|> 上涨",
)


def open_base(base: str, revision: str | None = None) -> BaseFacts:
    """Find a base model and check its files. Raises ConfigError with every fault."""
    with convert_load_errors(base):
        folder = find_base(base, revision)
    return check_base(folder)


def load_tokenizer(base: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a base model, as `tokenizer_and_notes` returns it."""
    return tokenizer_and_notes(base, revision)[0]


def tokenizer_and_notes(base: str, revision: str | None = None) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """The tokenizer of a base model, and notes about the base model for the user.

    Text that spells a special token stays text, padding is on the right, and truncation is on the left, where the
    oldest bars are. These three settings are passed to the constructor, so that they are saved and apply wherever the
    export is opened. Only the tokens and rules of the original tokenizer are kept: the export contains no chat
    template, class or file of it. Raises ConfigError with every fault of the base model.
    """
    facts = open_base(base, revision)
    with convert_load_errors(base), tempfile.TemporaryDirectory() as scratch:
        # transformers chooses the tokenizer class by these files. References to code are removed first, as in the
        # export; otherwise it could choose a different class for the export.
        copy_tokenizer(facts.folder, Path(scratch))
        original = AutoTokenizer.from_pretrained(scratch, trust_remote_code=False, local_files_only=True)
    if not original.is_fast:
        raise ConfigError(f"model.base needs a tokenizer.json, {base!r} has a {type(original).__name__} without one.")
    if original.pad_token is None and original.eos_token is None:
        raise ConfigError(
            f"model.base needs a tokenizer with a pad token, {base!r} has none. Add one to its tokenizer."
        )
    special: dict[str, Any] = {
        name: getattr(original, name) for name in ("bos_token", "eos_token", "unk_token") if getattr(original, name)
    }
    named = {original.pad_token, *special.values()}
    if others := [token for token in original.all_special_tokens if token not in named]:
        special["extra_special_tokens"] = others
    backend = original.backend_tokenizer
    if backend.num_special_tokens_to_add(is_pair=False):
        # Truncation would remove the tokens that this adds around a text, here but not in transformers.
        backend.post_processor = processors.ByteLevel(trim_offsets=False)
    with convert_load_errors(base):
        tokenizer = PreTrainedTokenizerFast(
            tokenizer_object=backend,
            pad_token=original.pad_token or original.eos_token,
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
            "resize the embedding (resize_token_embeddings) and save the base again."
        )
    return cast(PreTrainedTokenizerBase, tokenizer), facts.notes() + _rule_notes(facts.folder, tokenizer)


def _rule_notes(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A note if transformers tokenises by other rules than the base model's tokenizer.json.

    For some model families, transformers takes only the tokens of that file, and the rules of the family.
    """
    if not (folder / "tokenizer.json").is_file():
        return []
    with convert_errors(ConfigError, f"model.base: {folder}: tokenizer.json cannot be read"):
        from_file = Tokenizer.from_file(str(folder / "tokenizer.json"))
    from_file.encode_special_tokens = True
    for text in PROBE_TEXTS:
        file_ids, ids = from_file.encode(text, add_special_tokens=False).ids, tokenizer(text)["input_ids"]
        if file_ids != ids:
            note = (
                f"tokenizer.json of the base has rules that transformers replaces by those of its family: {text!r} "
                f"is {len(file_ids)} tokens by the file and {len(ids)} as transformers opens it; training and the "
                "export use the latter"
            )
            return [note]
    return []


def _check_reopens(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError unless the tokenizer gives the same ids after it is saved and opened as in an export."""
    with tempfile.TemporaryDirectory() as scratch:
        language_config(folder).save_pretrained(scratch)
        tokenizer.save_pretrained(scratch)
        reopened = AutoTokenizer.from_pretrained(scratch, trust_remote_code=False, local_files_only=True)
    for text in PROBE_TEXTS:
        ids, reopened_ids = (
            tokenize(text, split_special_tokens=True)["input_ids"] for tokenize in (tokenizer, reopened)
        )
        if ids != reopened_ids:
            raise ConfigError(
                f"model.base: {folder}: the tokenizer must give the same tokens after it is saved and opened, "
                f"{text!r} becomes {ids[:8]} before and {reopened_ids[:8]} after. Use a tokenizer of the base's family."
            )


def _check_letters(folder: Path, tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ConfigError unless the tokenizer has a distinct token for each character of a rendered window."""
    characters = f"{string.ascii_letters}{string.digits}-?"
    ids = {character: tuple(tokenizer(character, split_special_tokens=True)["input_ids"]) for character in characters}
    ambiguous = [character for character in ids if not ids[character] or list(ids.values()).count(ids[character]) > 1]
    if ambiguous:
        raise ConfigError(
            f"model.base: {folder}: the tokenizer must have distinct tokens for letters, digits, - and ?, it confuses "
            f"or drops {' '.join(ambiguous[:12])}. A base needs tokenizer.json, or vocab.json with merges.txt, of its "
            "family: copy them from its source."
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
def convert_load_errors(base: str) -> Iterator[None]:
    """Convert the errors of transformers' loaders into one ConfigError, and refuse a folder with a pipe or device."""
    if Path(base).is_dir():
        refuse_special(Path(base).iterdir())
    here = "" if Path(base).is_absolute() else f" in {Path.cwd()}, from which relative paths count,"
    where = "this folder" if Path(base).is_dir() else f"neither a folder{here} nor a model that the hub gave"
    rule = f"model.base must be a Qwen checkpoint that transformers opens as a sequence classifier; {base!r} is {where}"
    with quiet_transformers(), convert_errors(ConfigError, rule, "Give its folder, its hub id, or embedded"):
        yield
