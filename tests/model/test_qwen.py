"""Any Qwen text family: adapters and head train, the base does not, and merge and reload keep the logits."""

import json
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from peft import PeftModel
from transformers import AutoConfig, AutoModelForSequenceClassification, AutoTokenizer

from ctxtrain.config.sections import LoraConfig
from ctxtrain.data.batches import collate
from ctxtrain.data.tokens import tokenise
from ctxtrain.errors import ConfigError
from ctxtrain.model import forward, lora
from ctxtrain.model.base import load_classifier
from ctxtrain.model.losses import focal_loss
from ctxtrain.model.tokenizer import load_tokenizer
from tests.helpers import frozen_sha256
from tests.tiny_models import FAMILIES, build_tiny

LORA = LoraConfig().model_dump()
TEXTS = ["short", "a longer text of several tokens", "12345678 23456789 r10a20?"]


def build(folder: Path, **changes: object) -> tuple[PeftModel, dict[str, torch.Tensor]]:
    tokenizer = load_tokenizer(str(folder))
    model = lora.add_lora(load_classifier(str(folder), tokenizer.pad_token_id), **(LORA | changes))
    tokens = tokenise(TEXTS, tokenizer, 64)
    return model, collate(tokens, range(len(TEXTS)))


def train_a_little(model: PeftModel, batch: dict[str, torch.Tensor]) -> None:
    optimizer = torch.optim.AdamW(lora.trainable_parameters(model).values(), lr=1e-2)
    for _ in range(3):
        loss_sum, _ = focal_loss(forward.logits(model, batch), torch.tensor([0, 1, 2]), 2.0, torch.ones(3))
        loss_sum.backward()
        optimizer.step()
        optimizer.zero_grad()
    model.eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_trains_saves_merges_and_reloads(family: str, tmp_path: Path) -> None:
    folder = build_tiny(tmp_path / "base", family)
    model, batch = build(folder)
    frozen = frozen_sha256(model)
    start = lora.trainable_state(model)
    train_a_little(model, batch)
    assert frozen_sha256(model) == frozen
    trained = lora.trainable_state(model)
    assert all(not torch.equal(start[name], trained[name]) for name in trained)

    with torch.no_grad():
        expected = forward.logits(model, batch)
        again, _ = build(folder)
        lora.load_trainable_state(again, trained)
        assert torch.equal(forward.logits(again.eval(), batch), expected)
        model.save_pretrained(str(tmp_path / "adapter"))
        merged = lora.merge(model)
        torch.testing.assert_close(forward.logits(merged.eval(), batch), expected, atol=1e-5, rtol=0)
        merged.save_pretrained(tmp_path / "merged")
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32).eval()
        torch.testing.assert_close(plain(**batch).logits, expected, atol=1e-5, rtol=0)
        assert plain.config.id2label == {0: "LONG", 1: "SHORT", 2: "SKIP"}
        tokenizer = load_tokenizer(str(folder))
        base = load_classifier(str(folder), tokenizer.pad_token_id, seed=1)  # its own head is another one
        adapted = PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
        torch.testing.assert_close(forward.logits(adapted, batch), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_do_not_depend_on_batch_mates_or_padding(family: str, tmp_path: Path) -> None:
    model, batch = build(build_tiny(tmp_path, family))
    model.eval()
    lengths = batch["attention_mask"].sum(dim=1).tolist()
    with torch.no_grad():
        together = forward.logits(model, batch)
        for row, length in enumerate(lengths):
            alone = {name: values[row : row + 1, :length] for name, values in batch.items()}
            torch.testing.assert_close(forward.logits(model, alone)[0], together[row], atol=1e-5, rtol=0)


def test_share_of_trained_parameters_at_the_true_05b_shape() -> None:
    """Qwen2.5-0.5B's published config (hidden 896, 24 layers, 14 heads, 2 key-value heads, 151,936 tokens)."""
    config = AutoConfig.for_model(
        "qwen2",
        vocab_size=151936,
        hidden_size=896,
        intermediate_size=4864,
        num_hidden_layers=24,
        num_attention_heads=14,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        num_labels=3,
    )
    with torch.device("meta"):
        model = lora.add_lora(AutoModelForSequenceClassification.from_config(config, dtype=torch.float32), **LORA)
    counts = lora.parameter_counts(model)
    assert counts["trainable"] == 24 * 8 * (2 * (896 + 896) + 2 * (896 + 128)) + 3 * 896
    print(f"\nQwen2.5-0.5B: {counts['trainable']:,} of {counts['parameters']:,} ({counts['trainable_share']:.3%})")
    assert 0.001 <= counts["trainable_share"] <= 0.003


class PackedWeight(torch.nn.Parameter):
    """A weight as bitsandbytes keeps it in nf4: two numbers in a byte, in one column, and the shape beside it."""

    quant_state: SimpleNamespace


def pack(weight: torch.Tensor) -> PackedWeight:
    packed = PackedWeight(torch.zeros(weight.numel() // 2, 1, dtype=torch.uint8), requires_grad=False)
    packed.quant_state = SimpleNamespace(shape=weight.shape)
    return packed


def test_numbers_that_are_packed_two_in_a_byte_are_counted(tmp_path: Path) -> None:
    folder = build_tiny(tmp_path)
    plain = lora.parameter_counts(build(folder)[0])
    model, _ = build(folder)
    for layer in model.get_base_model().model.layers:
        layer.self_attn.q_proj.base_layer.weight = pack(layer.self_attn.q_proj.base_layer.weight)
        layer.mlp.up_proj.weight = pack(layer.mlp.up_proj.weight)
    assert sum(weight.dtype == torch.uint8 for weight in model.parameters()) == 4
    assert lora.parameter_counts(model) == plain
    assert 0 < plain["trainable"] < plain["parameters"]


def test_only_adapters_and_head_are_trained(tmp_path: Path) -> None:
    model, _ = build(build_tiny(tmp_path))
    names = lora.trainable_parameters(model)
    modules = {match[1] for name in names if (match := re.search(r"\.(\w+)\.lora_[AB]\.", name))}
    assert modules == {"q_proj", "k_proj", "v_proj", "o_proj"}
    assert [name for name in names if "lora_" not in name] == ["base_model.model.score.modules_to_save.default.weight"]


def test_last_n_layers_can_be_adapted_alone(tmp_path: Path) -> None:
    folder = build_tiny(tmp_path)
    names = lora.trainable_parameters(build(folder, layers="last:1")[0])
    assert {name.split(".layers.")[1][0] for name in names if "lora_" in name} == {"1"}
    with pytest.raises(ConfigError, match=r"at most last:2, the layers of the base, got last:3"):
        build(folder, layers="last:3")


def test_an_unknown_target_module_is_refused_with_those_there_are(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"query is not one\. It has .*q_proj"):
        build(build_tiny(tmp_path), target_modules=["q_proj", "query"])


def test_head_and_adapters_depend_on_the_seed_alone(tmp_path: Path) -> None:
    folder = build_tiny(tmp_path)
    tokenizer = load_tokenizer(str(folder))

    def state(seed: int) -> dict[str, torch.Tensor]:
        base = load_classifier(str(folder), tokenizer.pad_token_id, seed=seed)
        return lora.trainable_state(lora.add_lora(base, **LORA, seed=seed))

    first = state(0)
    torch.manual_seed(99)
    second, other = state(0), state(1)
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["base_model.model.score.weight"], other["base_model.model.score.weight"])


def test_a_checkpoint_of_other_weights_is_refused(tmp_path: Path) -> None:
    folder = build_tiny(tmp_path)
    model, _ = build(folder)
    state = lora.trainable_state(model)
    lacking = dict(list(state.items())[1:])
    for wrong in (lacking, state | {"surplus": torch.zeros(1)}, {n: torch.zeros(2, 2) for n in state}):
        with pytest.raises(ConfigError, match="must hold the weights that this config trains"):
            lora.load_trainable_state(model, wrong)


def test_a_base_that_cannot_be_opened_is_named_with_the_reason(tmp_path: Path) -> None:
    remedy = r"\(.*[^.]\)\. Give its folder, its hub id, or embedded\."
    where = f"neither a folder in {Path.cwd()}, from which relative paths count, nor a model that the hub gave"
    rule = rf"model\.base must be a Qwen checkpoint .* 'no/such-model' is {re.escape(where)} {remedy}"
    with pytest.raises(ConfigError, match=rule):
        load_tokenizer("no/such-model")
    with pytest.raises(
        ConfigError, match=rf"and there is no folder '{tmp_path}/none'\. Give such a folder, or an id as"
    ):
        load_tokenizer(f"{tmp_path}/none")
    folder = build_tiny(tmp_path)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ConfigError, match=rf"model\.base must be .* '{folder}' is this folder {remedy}"):
        load_classifier(str(folder), 0)


def test_quantization_without_a_gpu_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.quantization=nf4 needs a GPU"):
        load_classifier(str(build_tiny(tmp_path)), 0, quantization="nf4")


def test_a_base_without_pad_token_takes_its_end_token(tmp_path: Path) -> None:
    folder = build_tiny(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    assert load_tokenizer(str(folder)).pad_token_id == tokenizer.eos_token_id


def test_a_base_whose_config_names_no_pad_id_gets_the_tokenizers(tmp_path: Path) -> None:
    folder = build_tiny(tmp_path)
    config = json.loads((folder / "config.json").read_text()) | {"pad_token_id": None}
    (folder / "config.json").write_text(json.dumps(config))
    model, batch = build(folder)  # a batch of several rows, which transformers refuses without a pad id
    assert forward.logits(model, batch).shape == (3, 3)
