"""The merge as a stream: the bits of PEFT's own merge, whatever the files of the base look like, in little memory."""

from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from ctxtrain.errors import ConfigError, ExportError
from ctxtrain.export import merge
from ctxtrain.export.merge import write_merged
from ctxtrain.model import lora
from ctxtrain.model.base import load_classifier
from ctxtrain.model.skeleton import Skeleton
from ctxtrain.model.tokenizer import load_tokenizer, quiet_transformers
from ctxtrain.storage.atomic_files import sha256_file
from tests.tiny_models import FAMILIES, build_tiny

ATTENTION = {"r": 4, "alpha": 8, "dropout": 0.1, "target_modules": ["q_proj", "v_proj", "o_proj"]}


def trained(base: Path, settings: dict[str, Any]) -> PeftModel:
    """The float32 model with adapters and head that are not at their start."""
    pad = load_tokenizer(str(base)).pad_token_id
    model = lora.add_lora(load_classifier(str(base), pad), **settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in lora.trainable_parameters(model).values():
            nn.init.normal_(weight, std=0.3)
    return model.eval()


def streamed(base: Path, path: Path, settings: dict[str, Any], *, dtype: Any = "float32", streams: bool = True) -> str:
    """Write the merge; fails if the whole model is loaded although it should not be, or the other way round."""
    loaded = []

    def load() -> PeftModel:
        loaded.append(1)
        return trained(base, settings)

    weights = lora.trainable_state(trained(base, settings))
    skeleton = Skeleton.of(str(base), load_tokenizer(str(base)).pad_token_id, settings)
    digest = write_merged(path, skeleton, weights, dtype, load)
    assert len(loaded) == (0 if streams else 1)
    return digest.sha256


def save_pretrained(base: Path, folder: Path, settings: dict[str, Any]) -> Path:
    """What PEFT and transformers write."""
    with quiet_transformers():
        lora.merge(trained(base, settings)).save_pretrained(folder)
    return folder / "model.safetensors"


def in_bfloat16(base: Path) -> None:
    weights = {name: weight.bfloat16() for name, weight in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_writes_the_bytes_of_peft_and_transformers(family: str, dtype: str, tmp_path: Path) -> None:
    base = build_tiny(tmp_path / "base", family)
    if dtype == "bfloat16":
        in_bfloat16(base)
    digest = streamed(base, tmp_path / "model.safetensors", ATTENTION)
    expected = save_pretrained(base, tmp_path / "expected", ATTENTION)
    assert (tmp_path / "model.safetensors").read_bytes() == expected.read_bytes()
    assert digest == sha256_file(expected)
    before, after = load_file(base / "model.safetensors"), load_file(expected)
    assert any(not torch.equal(after[name], before[name].float()) for name in after if name in before)


def renamed(base: Path, old: str, new: str) -> None:
    weights = {name.replace(old, new): weight for name, weight in load_file(base / "model.safetensors").items()}
    save_file(weights, base / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("family", ["qwen2", "qwen3_moe", "qwen3_5_text"])
@pytest.mark.parametrize("how", ["shards", "no prefix", "language model", "stacked experts", "a classifier"])
def test_files_of_another_layout_give_the_same_bits(how: str, family: str, tmp_path: Path) -> None:
    base, pad = build_tiny(tmp_path / "base", family), 0
    pad = load_tokenizer(str(base)).pad_token_id
    if how == "shards":
        model = AutoModelForCausalLM.from_pretrained(base)
        (base / "model.safetensors").unlink()
        model.save_pretrained(base, max_shard_size="200KB")
        assert len(list(base.glob("*.safetensors"))) > 2
    elif how == "no prefix":
        renamed(base, "model.", "")
    elif how == "language model":
        renamed(base, "model.", "model.language_model." if family == "qwen3_5_text" else "model.")
    elif how == "stacked experts":
        AutoModelForCausalLM.from_pretrained(base).save_pretrained(base, save_original_format=False)
    else:
        load_classifier(str(base), pad).save_pretrained(base)
    streamed(base, tmp_path / "model.safetensors", ATTENTION)
    expected = save_pretrained(base, tmp_path / "expected", ATTENTION)
    assert (tmp_path / "model.safetensors").read_bytes() == expected.read_bytes()
    opened = AutoModelForSequenceClassification.from_pretrained(expected.parent, dtype=torch.float32)
    assert torch.equal(opened.score.weight, trained(base, ATTENTION).score.weight)


@pytest.mark.parametrize(("family", "streams"), [("qwen3", True), ("qwen2_moe", True), ("qwen3_next", False)])
def test_adapters_of_the_other_layers_merge_alike(family: str, streams: bool, tmp_path: Path) -> None:
    """Of a qwen3_next, PEFT adapts the experts, which are one weight in the model and many tensors in the files."""
    base = build_tiny(tmp_path / "base", family)
    mlp = ["gate_proj", "up_proj", "down_proj"] if streams else ["down_proj"]
    settings = ATTENTION | {"target_modules": ["k_proj", *mlp], "dropout": 0.0}
    streamed(base, tmp_path / "model.safetensors", settings, streams=streams)
    expected = save_pretrained(base, tmp_path / "expected", settings)
    assert (tmp_path / "model.safetensors").read_bytes() == expected.read_bytes()


def test_an_export_in_bfloat16_is_the_merge_rounded_once(tmp_path: Path) -> None:
    base = build_tiny(tmp_path / "base", "qwen3")
    streamed(base, tmp_path / "model.safetensors", ATTENTION, dtype="bfloat16")
    expected = load_file(save_pretrained(base, tmp_path / "expected", ATTENTION))
    actual = load_file(tmp_path / "model.safetensors")
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], weight.bfloat16()) for name, weight in expected.items())
    with safe_open(tmp_path / "model.safetensors", framework="pt") as file:
        assert file.metadata() == {"format": "pt"}


def test_the_base_must_stay_as_it_was_and_the_merge_finite(tmp_path: Path) -> None:
    base = build_tiny(tmp_path / "base")
    weights = lora.trainable_state(trained(base, ATTENTION))
    skeleton = Skeleton.of(str(base), load_tokenizer(str(base)).pad_token_id, ATTENTION)
    name = next(name for name in weights if "lora_B" in name)
    load = partial(trained, base, ATTENTION)
    broken = weights | {name: torch.full_like(weights[name], float("inf"))}
    with pytest.raises(ExportError, match=r"every merged weight must be finite, model\.layers"):
        write_merged(tmp_path / "out", skeleton, broken, "float32", load)
    with pytest.raises(ConfigError, match="must hold the weights that this config trains; 1 differ"):
        write_merged(
            tmp_path / "out", skeleton, {**weights, "other": weights[name]}, "float32", lambda: trained(base, ATTENTION)
        )
    in_bfloat16(base)
    with pytest.raises(ConfigError, match=r"model\.safetensors was changed or removed\. Put the file back"):
        write_merged(tmp_path / "out", skeleton, weights, "float32", load)


def test_a_tensor_is_read_and_written_in_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = build_tiny(tmp_path / "base")
    whole = streamed(base, tmp_path / "whole.safetensors", ATTENTION)
    for name in ("CHUNK_BYTES", "MAPPED_BYTES"):
        monkeypatch.setattr(f"ctxtrain.model.skeleton.{name}", 1000)
    parts = [len(list(entry.parts())) for entry in merge._stream(*skeleton_and_weights(base)).values()]
    assert max(parts) > 100
    assert streamed(base, tmp_path / "parts.safetensors", ATTENTION) == whole


def skeleton_and_weights(base: Path) -> tuple[Skeleton, dict[str, torch.Tensor]]:
    pad = load_tokenizer(str(base)).pad_token_id
    return Skeleton.of(str(base), pad, ATTENTION), lora.trainable_state(trained(base, ATTENTION))
