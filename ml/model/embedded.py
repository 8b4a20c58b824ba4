"""The package's own small Qwen3 and the tokenizer that fits the compact text.

The tokenizer is byte-level, so it reads any text; each number of the compact codec is one token, and the numbers of
a bar carry the name of their field: `53204187` becomes `h53 l20 c41 v87`. Both are ordinary transformers files.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

import torch
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from ml.data.codec import END, PULSES, STATES
from ml.runtime import Purpose, seed_torch

PAD = "<|endoftext|>"
WIDTH, LAYERS = 128, 4


def embedded_base(seed: int = 0) -> Path:
    """Folder of the embedded base, built on first use in the user's cache folder."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "ctxtrain"
    folder = cache / f"qwen3-{LAYERS}x{WIDTH}-seed{seed}"
    if not folder.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=cache) as scratch:
            build_base(Path(scratch) / "base", seed)
            try:
                (Path(scratch) / "base").rename(folder)
            except OSError:  # another process was first; its files are the same
                if not folder.exists():
                    raise
    return folder


def build_base(folder: Path, seed: int) -> None:
    """Write a Qwen3 of random weights and its tokenizer."""
    tokenizer = build_tokenizer()
    seed_torch(seed, Purpose.HEAD)
    config = Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=WIDTH,
        intermediate_size=3 * WIDTH,
        num_hidden_layers=LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=WIDTH // 4,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer with a token for every number and mark of the compact codec."""
    numbers = [f"{field}{value:02d}" for field in "hlcOratz" for value in range(100)]
    numbers += [f"v{volume}{delta}" for volume in range(10) for delta in "0123456789-"]
    marks = [mark for values in STATES.values() for mark in values.values()] + list(PULSES.values())
    characters = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {PAD: 0}
    for token in [*characters, *numbers, *marks, END]:
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], ignore_merges=True))
    # Name the four numbers of a bar. A bar ends in seven digits and a digit or -; each rule writes a field's name
    # before the numbers that are 8, 6, 4 and 2 characters from the end of the bar.
    digits = "[0-9]{%d}[0-9-](?![0-9-])"
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Replace(Regex(f"(?={digits % 7})"), "h")]
        + [
            normalizers.Replace(Regex(f"(?<=[a-z][0-9]{{2}})(?={digits % left})"), field)
            for field, left in (("l", 5), ("c", 3), ("v", 1))
        ]
    )
    whole = r"[hlcOratz][0-9]{2}|v[0-9][0-9-]|M[0-9]|S[0-9]"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r" (?=[A-Za-z0-9]*[hO])"), "removed"),
            pre_tokenizers.Split(Regex(f"{whole}|."), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=PAD,
        split_special_tokens=True,
        model_max_length=2048,
    )
