"""The tokenizer of a base, as training, the export and whoever opens it use it.

Comes in: `model.base`. Goes out: a tokenizer of which only tokens and rules are the base's own, or a ConfigError.
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
from ctxtrain.model.base import BaseFacts, check_base, copy_tokenizer, find_base, language_config
from ctxtrain.model.base_config import refusing
from ctxtrain.regular_files import refuse_special

# What windows are made of, and what tokenizers treat in ways of their own.
SPELLED = (
    "UnfgwM3S4624810555 B99980765 C00124- r12a34t56z50?",
    '{"bars":[{"open":4135.7}]}',
    "Ça  va?\n<|im_end|> 上涨",
)


def open_base(base: str, revision: str | None = None) -> BaseFacts:
    """The folder of a base and what its files say. Raises ConfigError with every fault of them."""
    with loading(base):
        folder = find_base(base, revision)
    return check_base(folder)


def load_tokenizer(base: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of `tokenizer_and_notes`."""
    return tokenizer_and_notes(base, revision)[0]


def tokenizer_and_notes(base: str, revision: str | None = None) -> tuple[PreTrainedTokenizerBase, list[str]]:
    """Tokenizer of a base whose files are sound, and what a user should know of the base although a run can use it.

    Texts that spell a special token stay text, padding goes right, and cutting goes left, where the oldest bars are.
    Given here, and not set later, all three are saved with the tokenizer and so hold for whoever opens the export. Of
    the base's own tokenizer only its tokens and rules are kept: no chat template, class or file of it gets into an
    export. Raises ConfigError with every fault of the base.
    """
    facts = open_base(base, revision)
    with loading(base), tempfile.TemporaryDirectory() as scratch:
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
    with loading(base):
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
    return cast(PreTrainedTokenizerBase, tokenizer), facts.notes() + _rule_notes(facts.folder, tokenizer)


def _rule_notes(folder: Path, tokenizer: PreTrainedTokenizerBase) -> list[str]:
    """A note where transformers reads texts by other rules than those of the base's own tokenizer.json.

    It builds the tokenizers of some families from the tokens of that file alone, with the rules of the family.
    """
    if not (folder / "tokenizer.json").is_file():
        return []
    with refusing(ConfigError, f"model.base: {folder}: tokenizer.json cannot be read"):
        own = Tokenizer.from_file(str(folder / "tokenizer.json"))
    own.encode_special_tokens = True
    for text in SPELLED:
        file_ids, ids = own.encode(text, add_special_tokens=False).ids, tokenizer(text)["input_ids"]
        if file_ids != ids:
            note = (
                f"tokenizer.json of the base has rules that transformers replaces by those of its family: {text!r} is "
                f"{len(file_ids)} tokens by the file and {len(ids)} as transformers opens it; training and the export "
                "use the latter"
            )
            return [note]
    return []


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
def loading(base: str) -> Iterator[None]:
    """Turn the many errors of transformers' loaders into one ConfigError; a pipe in the folder is refused unopened."""
    if Path(base).is_dir():
        refuse_special(Path(base).iterdir())
    here = "" if Path(base).is_absolute() else f" in {Path.cwd()}, from which relative paths count,"
    where = "this folder" if Path(base).is_dir() else f"neither a folder{here} nor a model that the hub gave"
    rule = f"model.base must be a Qwen checkpoint that transformers opens as a sequence classifier; {base!r} is {where}"
    with quiet_transformers(), refusing(ConfigError, rule, "Give its folder, its hub id, or embedded"):
        yield
