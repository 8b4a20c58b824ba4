"""The small Qwen3 that ships with the package: its folder, its tokenizer, and the config of a new one.

Input: nothing, or the sizes of a new model. Output: a folder that transformers opens without this package.

The tokenizer is byte-level, so it reads any text, and matches the compact text of `codec.py`. A bar `HHLLCCVD ` is two
tokens: `HHLL` (high and low) and `CCVD ` (close, volume, delta; the space distinguishes it from the first). Each mark
and each number of the tail is one token. `token_parts` decomposes each token into its numbers.
"""

from __future__ import annotations

from itertools import product
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast, Qwen3Config

from ctxtrain.data.codec import END, PULSES, STATES

PAD = "<|endoftext|>"
MAX_TOKENS = 2048
TAIL_LETTERS = "ratz"  # of the numbers after the last bar
DELTAS = "0123456789-"
# Number of values of each part of a token: high, low, their distance and their middle; close; volume; delta; a number
# of the tail. All other tokens are a part of their own.
PARTS = {"high": 100, "low": 100, "range": 100, "middle": 199, "close": 100, "volume": 10, "delta": 11, "number": 100}
SPACE = "Ġ"  # how the byte-level alphabet writes a space


def embedded_base() -> Path:
    """Folder of the embedded base model inside the package."""
    return Path(__file__).parents[1] / "assets" / "base"


def base_config(
    tokenizer: PreTrainedTokenizerFast,
    *,
    width: int,
    layers: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    intermediate: int,
) -> Qwen3Config:
    """Config of a Qwen3 for this tokenizer."""
    return Qwen3Config(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=intermediate,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        head_dim=head_dim,
        max_position_embeddings=MAX_TOKENS,
        tie_word_embeddings=True,
        pad_token_id=tokenizer.pad_token_id,
        bos_token_id=None,
        eos_token_id=tokenizer.pad_token_id,
        dtype=torch.float32,
    )


def build_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level tokenizer with a token for each half bar, mark and tail number of the compact codec."""
    vocabulary = {PAD: 0}
    for token in [*_plain_tokens(), *_high_low_tokens(), *_close_tokens()]:
        vocabulary.setdefault(token, len(vocabulary))
    tokenizer = Tokenizer(models.BPE(vocabulary, merges=[], ignore_merges=True))
    compact = rf"[0-9]{{4}}(?=[0-9]{{3}}[{DELTAS}] )|[0-9]{{3}}[{DELTAS}] |[O{TAIL_LETTERS}][0-9]{{2}}|M[0-9]|S[0-9]"
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(rf"(?m:{compact}|.)"), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token=PAD,
        eos_token=PAD,
        split_special_tokens=True,
        model_max_length=MAX_TOKENS,
        clean_up_tokenization_spaces=False,
    )


def _plain_tokens() -> list[str]:
    numbers = [f"{letter}{value:02d}" for letter in f"O{TAIL_LETTERS}" for value in range(100)]
    marks = [mark for values in STATES.values() for mark in values.values()] + list(PULSES.values())
    return [*sorted(pre_tokenizers.ByteLevel.alphabet()), *marks, END, *numbers]


def _high_low_tokens() -> list[str]:
    return [f"{high:02d}{low:02d}" for high in range(100) for low in range(high + 1)]


def _close_tokens() -> list[str]:
    return [f"{close:02d}{volume}{delta}{SPACE}" for close, volume, delta in product(range(100), range(10), DELTAS)]


def token_parts(tokenizer: PreTrainedTokenizerFast) -> tuple[NDArray[np.int64], int]:
    """The parts of each token, as indices of shape (vocabulary, 4) into one table of parts, and the table's size.

    The table holds the values of each entry of `PARTS`, then a zero, then one entry for each letter and plain token.
    Unused columns of a row point to the zero.
    """
    names = list(PARTS)
    start = dict(zip(names, np.cumsum([0, *PARTS.values()]).tolist(), strict=False))
    zero = sum(PARTS.values())
    size = zero + 1
    vocabulary = tokenizer.get_vocab()
    parts = np.full((len(vocabulary), 4), zero, dtype=np.int64)
    for token in _high_low_tokens():
        high, low = int(token[:2]), int(token[2:])
        values = {"high": high, "low": low, "range": high - low, "middle": high + low}
        parts[vocabulary[token]] = [start[name] + value for name, value in values.items()]
    for token in _close_tokens():
        values = {"close": int(token[:2]), "volume": int(token[2]), "delta": DELTAS.index(token[3])}
        parts[vocabulary[token], :3] = [start[name] + value for name, value in values.items()]
    families: dict[str, int] = {}
    for token in [PAD, *_plain_tokens()]:
        family, digits = (token[0], token[1:]) if len(token) == 3 else (token, "")
        if family not in families:
            families[family] = size
            size += 1
        parts[vocabulary[token], 0] = families[family]
        if digits:
            parts[vocabulary[token], 1] = start["number"] + int(digits)
    return parts, size


def is_close_token(tokenizer: PreTrainedTokenizerFast) -> NDArray[np.bool_]:
    """Which tokens end a bar, of shape (vocabulary,)."""
    ends = np.zeros(len(tokenizer), dtype=np.bool_)
    vocabulary = tokenizer.get_vocab()
    ends[[vocabulary[token] for token in _close_tokens()]] = True
    return ends
