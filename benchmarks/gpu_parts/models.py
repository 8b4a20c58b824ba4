"""Classifiers of the true shapes with random weights, made on the device, and rows of tokens.

Tiny shapes have two narrow layers of the same family. On a GPU weights are bfloat16, on a CPU float32.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
from bench_step import DROPOUT
from gpu_parts.setting import Setting
from peft import PeftModel
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from ctxtrain.config.sections import LoraConfig
from ctxtrain.data.tokens import Tokens
from ctxtrain.labels import LABELS
from ctxtrain.model.embedded import build_tokenizer
from ctxtrain.model.lora import add_lora

WINDOWS, LENGTHS = 32, (440, 523)  # of a step; 481 tokens on average, as a real 50-bar window with Qwen2.5's tokenizer
COMMON: dict[str, Any] = {
    "pad_token_id": 0, "bos_token_id": None, "num_labels": len(LABELS), "use_cache": False, "tie_word_embeddings": True,
}  # fmt: skip
# family, width, feed-forward width, layers, heads, key-value heads, vocabulary
SHAPES = {
    "0.5b": ("qwen2", 896, 4864, 24, 14, 2, 151936),
    "1.5b": ("qwen2", 1536, 8960, 28, 12, 2, 151936),
    "7b": ("qwen2", 3584, 18944, 28, 28, 4, 152064),
    "8b": ("qwen3", 4096, 12288, 36, 32, 8, 151936),
}
CHANNELS, OUTLIER = 8, 40.0  # channels of the residual stream that are so many times as large, as in trained Qwens
TINY = (64, 128, 2, 4, 2, 17000)  # the embedded tokenizer has fewer tokens


def config_of(shape: str, setting: Setting) -> Any:
    family, *sizes = SHAPES[shape]
    width, inner, layers, heads, kv_heads, vocabulary = TINY if setting.is_tiny else sizes
    return AutoConfig.for_model(
        family, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers, num_attention_heads=heads,
        num_key_value_heads=kv_heads, vocab_size=vocabulary, head_dim=width // heads, **COMMON,
    )  # fmt: skip


def weight_dtype(setting: Setting) -> torch.dtype:
    return torch.bfloat16 if setting.device == "cuda" else torch.float32


def make_classifier(
    shape: str, setting: Setting, dtype: torch.dtype | None = None, attention: str = "sdpa"
) -> PreTrainedModel:
    """The same weights in every process on this device."""
    torch.manual_seed(0)
    with torch.device(setting.device):
        model: PreTrainedModel = AutoModelForSequenceClassification.from_config(
            config_of(shape, setting), dtype=dtype or weight_dtype(setting), attn_implementation=attention
        )
    return model


def write_base(shape: str, setting: Setting) -> Path:
    """A checkpoint of the shape with the embedded tokenizer, once for all parts."""
    folder = setting.scratch / shape
    if not (folder / "config.json").exists():
        model = make_classifier(shape, setting, torch.bfloat16)
        build_tokenizer().save_pretrained(folder)
        model.save_pretrained(folder)
    return folder


def write_outlier_base(setting: Setting) -> Path:
    """A causal model of the 1.5B shape in bfloat16, some channels of whose residual stream are large."""
    folder = setting.scratch / "outliers"
    torch.manual_seed(0)
    with torch.device(setting.device):
        model = AutoModelForCausalLM.from_config(config_of("1.5b", setting), dtype=torch.bfloat16)
    with torch.no_grad():
        channels = torch.arange(CHANNELS, device=setting.device) * (model.config.hidden_size // CHANNELS)
        model.model.embed_tokens.weight[:, channels] *= OUTLIER
        for layer in model.model.layers:
            layer.mlp.down_proj.weight[channels] *= OUTLIER
    model.save_pretrained(folder)
    build_tokenizer().save_pretrained(folder)
    return folder


def with_adapters(model: PreTrainedModel) -> PeftModel:
    """The specification's LoRA, with an update that is not zero, as after some steps."""
    adapted = add_lora(model, **(LoraConfig().model_dump() | {"dropout": DROPOUT}))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(weight, std=0.01)
    return adapted


def make_rows(setting: Setting, windows: int = WINDOWS) -> tuple[Tokens, np.ndarray]:
    """Rows of random tokens with labels; `windows` counts for the full size."""
    count, (least, most) = (8, (12, 25)) if setting.is_tiny else (windows, LENGTHS)
    rng = np.random.default_rng(0)
    lengths = rng.integers(least, most, count)
    flat = rng.integers(1, 16000, lengths.sum()).astype(np.int32)
    return Tokens.from_lengths(flat, lengths, 0), rng.integers(0, len(LABELS), count)


def set_dropout(model: nn.Module, share: float) -> None:
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = share
