"""Bases as people have them: each ends in an export that opens, or is refused before the first step with the remedy."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, normalizers, pre_tokenizers, processors
from transformers import AutoModelForCausalLM, AutoTokenizer

from ctxtrain import TrainingPipeline, load_model
from ctxtrain.errors import ConfigError
from ctxtrain.model import lora
from ctxtrain.model.agreement import engine_mismatch, probe_rows, try_base
from ctxtrain.model.base import load_classifier
from ctxtrain.model.base_files import check_base
from ctxtrain.model.tokenizer import load_tokenizer, open_base, quiet_transformers, tokenizer_and_notes
from tests.conftest import MakeConfig
from tests.helpers import learnable_rows
from tests.tiny_models import build_tiny

Change = Callable[[Path], None]


@pytest.fixture
def base(tiny_base: Path, tmp_path: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(tiny_base, tmp_path / "base"))


def edit(path: Path, **changes: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def config(**changes: Any) -> Change:
    return lambda folder: edit(folder / "config.json", **changes)


def weights(change: Callable[[dict[str, torch.Tensor]], None]) -> Change:
    def apply(folder: Path) -> None:
        state = load_file(folder / "model.safetensors")
        change(state)
        save_file(state, folder / "model.safetensors", metadata={"format": "pt"})

    return apply


def content(name: str, change: Callable[[bytes], bytes]) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).write_bytes(change((folder / name).read_bytes()))

    return apply


def pointer(name: str) -> Change:
    return content(name, lambda _: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")


def renamed(name: str, other: str) -> Change:
    def apply(folder: Path) -> None:
        (folder / name).rename(folder / other)

    return apply


def adapter(folder: Path) -> None:
    (folder / "adapter_config.json").write_text('{"base_model_name_or_path": "Qwen/Qwen3-0.6B", "peft_type": "LORA"}')


def adapter_alone(folder: Path) -> None:
    adapter(folder)
    (folder / "config.json").unlink()


def tokenizer(folder: Path) -> Any:
    return AutoTokenizer.from_pretrained(folder)


def larger_vocabulary(**special: str) -> Change:
    def apply(folder: Path) -> None:
        own = tokenizer(folder)
        own.add_special_tokens(special) if special else own.add_tokens(["a new word"])
        own.save_pretrained(folder)

    return apply


def without(name: str) -> Change:
    return weights(lambda state: state.__delitem__(name))


def put(name: str, tensor: torch.Tensor) -> Change:
    return weights(lambda state: state.update({name: tensor}))


def with_hole(weight: torch.Tensor, value: float) -> torch.Tensor:
    return weight.flatten().index_fill(0, torch.tensor([3]), value).view_as(weight)


def hole(value: float, name: str) -> Change:
    return weights(lambda state: state.update({name: with_hole(state[name], value)}))


GATE = "model.layers.0.mlp.gate_proj.weight"
REFUSED: dict[str, tuple[Change, str]] = {
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), 'quant_method "gptq". Use the unquant'),
    "awq": (config(quantization_config={"quant_method": "awq"}), 'quant_method "awq". Use the unquantised checkpoint'),
    "unknown quantisation": (config(quantization_config={"a": 1}), "quant_method null. Use the unquantised checkpoint"),
    "fp8 without a word": (
        put(GATE, torch.zeros(64, 32).to(torch.float8_e4m3fn)),
        f"{GATE} must hold plain numbers (F32, F16, BF16, F64), got F8_E4M3. Use the unquantised checkpoint.",
    ),
    "int8 without a word": (put(GATE, torch.zeros(64, 32).to(torch.int8)), "got I8. Use the unquantised checkpoint."),
    "a reward head": (put("score.weight", torch.zeros(1, 32)), "score.weight must have an output for each of LONG"),
    "five classes": (put("score.weight", torch.zeros(5, 32)), "it has 5. Use the language model that it was made from"),
    "pad beyond the table": (larger_vocabulary(pad_token="[PAD]"), "its pad token is '[PAD]', 16,827. Use the tok"),
    "a word beyond the table": (larger_vocabulary(), "it has ids up to 16,827 ('a new word')"),
    "a smaller table": (
        config(vocab_size=16000),
        "first model.embed_tokens.weight: (16827, 32) in the files, (16000, 32) by config.json. Use the config.json",
    ),
    "a narrower layer": (put(GATE, torch.zeros(60, 32)), f"first {GATE}: (60, 32) in the files, (64, 32) by config"),
    "cut weights": (content("model.safetensors", lambda old: old[:-9]), "model.safetensors is cut or damaged"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), "a checkpoint needs config.json and model"),
    "empty weights": (content("model.safetensors", lambda _: b""), "model.safetensors is cut or damaged"),
    "pickled weights": (
        renamed("model.safetensors", "pytorch_model.bin"),
        "weights as pickles (.bin), which could run",
    ),
    "gguf": (renamed("model.safetensors", "q4.gguf"), "it holds a GGUF file. Use the safetensors checkpoint"),
    "pointer for weights": (
        pointer("model.safetensors"),
        "model.safetensors is a Git LFS pointer, not the file itself. Run",
    ),
    "pointer for config": (pointer("config.json"), "config.json is a Git LFS pointer, not the file"),
    "pointer for tokenizer": (pointer("tokenizer.json"), "tokenizer.json is a Git LFS pointer, not the file"),
    "cut tokenizer": (content("tokenizer.json", lambda old: old[: len(old) // 2]), "opens as a sequence classifier"),
    "cut config": (content("config.json", lambda old: old[:99]), "not valid JSON"),
    "a list for config": (content("config.json", lambda _: b"[]"), "config.json must be a JSON object, got []"),
    "no config": (lambda folder: (folder / "config.json").unlink(), "a checkpoint needs config.json and model.safete"),
    "nan": (hole(float("nan"), GATE), f"model.safetensors: every weight must be finite, {GATE} holds a NaN or an inf"),
    "infinity": (
        hole(float("inf"), "model.norm.weight"),
        "model.norm.weight holds a NaN or an infinity. Copy the base",
    ),
    "an adapter": (adapter_alone, "holds an adapter of Qwen/Qwen3-0.6B (adapter_config.json). Merge it"),
    "an adapter beside": (adapter, "holds a checkpoint and an adapter of Qwen/Qwen3-0.6B (adapter_config.json). Merge"),
    "bidirectional": (config(is_causal=False), "attention must be causal, since the class is read at the last token"),
    "bidirectional by its newer name": (
        config(use_bidirectional_attention=True),
        "got use_bidirectional_attention true",
    ),
    "dynamic rope": (
        config(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}),
        "must not depend on the rows beside it, but rope_parameters is dynamic",
    ),
    "a size of zero": (config(intermediate_size=0), "intermediate_size must be a whole number of at least 1, got 0"),
    "heads that are no number": (config(num_attention_heads="4"), "num_attention_heads must be a whole number"),
    "dynamic rope in another key": (
        config(partial_rotary_factor={"rope_type": "dynamic", "factor": 2.0}),
        "but rope_parameters is dynamic",
    ),
    "longrope below another key": (
        config(partial_rotary_factor={"full_attention": {"rope_type": "longrope"}}),
        "but rope_parameters is longrope",
    ),
    "old dynamic rope": (config(rope_scaling={"type": "dynamic", "factor": 2.0}), "but rope_scaling is dynamic"),
    "long rope": (config(rope_scaling={"rope_type": "longrope"}), "but rope_scaling is longrope"),
    "llama": (config(model_type="llama"), "model_type must be a Qwen that transformers opens as a classifier (qwen2, "),
    "no family": (config(model_type=None), "got null. Use a Qwen2, Qwen2.5 or Qwen3 checkpoint"),
    "no embedding": (without("model.embed_tokens.weight"), "the weights must hold embed_tokens.weight, they do not"),
    "a lost weight": (without(GATE), f"lacks 1, first {GATE}. Use a whole checkpoint."),
    "more layers": (config(num_hidden_layers=3, layer_types=None), "lacks 12, first model.layers.2.input_layernorm"),
    "a million layers": (
        config(num_hidden_layers=10**6, layer_types=None),
        "config.json describes more layers than there are weights, the files hold",
    ),
    "wider": (config(hidden_size=10**6), "parameters, the files hold"),
    "fewer layers": (
        config(num_hidden_layers=1, layer_types=None),
        "has no layer for 12 weights, first model.layers.1.input_layernorm.weight. Use the config.json and the weights",
    ),
    "deeply nested": (
        content("config.json", lambda old: b'{"x":' + b"[" * 900 + b"]" * 900 + b"," + old.lstrip()[1:]),
        "its files cannot be read (maximum recursion depth exceeded",
    ),
    "a number that float32 lacks": (
        put("model.norm.weight", torch.full((32,), 1e300, dtype=torch.float64)),
        "model.norm.weight holds a NaN or an infinity",
    ),
    "no tokenizer": (
        lambda folder: (folder / "tokenizer.json").unlink(),
        "the tokenizer must have distinct tokens for letters, digits, - and ?, it confuses or drops",
    ),
    "dropout beyond 1": (config(attention_dropout=5), "attention_dropout must be a number from 0 to 0.99, got 5. Copy"),
    "dropout below 0": (config(attention_dropout=-1.0), "attention_dropout must be a number from 0 to 0.99, got -1.0"),
    "a head of infinities": (
        config(initializer_range=1e30),
        "initializer_range must be a number from 0 to 1, got 1e+30",
    ),
    "layers without a window": (
        config(layer_types=["sliding_attention"] * 2),
        "model.base must give logits in training (Could not find a `sliding_window` argument",
    ),
    "no rotation": (config(rope_parameters={"rope_type": "default", "rope_theta": 0.0}), "must give finite logits"),
}


@pytest.mark.parametrize("kind", REFUSED)
def test_a_base_that_cannot_end_well_is_refused_before_a_step(kind: str, base: Path, make_config: MakeConfig) -> None:
    change, message = REFUSED[kind]
    change(base)
    pipeline = TrainingPipeline(make_config(f"model.base={base}"))
    with pytest.raises(ConfigError) as caught:
        pipeline.run()
    assert message in str(caught.value)
    assert str(base) in str(caught.value) or "must give" in message
    assert not pipeline.folder.metrics.path.exists()
    assert not pipeline.folder.config.exists()


def chat_templates(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{x}}")
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "tool_use.jinja").write_text("{{x}}")


def many(folder: Path) -> None:
    """What a base may bring along, all at once: any of these made a finished run's zip unreadable."""
    chat_templates(folder)
    edit(
        folder / "config.json",
        auto_map={"AutoModel": "modeling_x.X"},
        license_url="https://example.org/licence",
        _attn_implementation_autoset=True,
        attn_implementation="flash_attention_2",
        problem_type="multi_label_classification",
        return_dict=False,
        output_attentions=True,
        output_hidden_states=True,
        id2label={"0": "negative", "1": "neutral", "2": "positive"},
        label2id={"negative": 0, "neutral": 1, "positive": 2},
        note={"source": ["https://example.org"]},
    )
    edit(
        folder / "tokenizer_config.json",
        tokenizer_class="QWenTokenizer",  # of its own code; its tokenizer.json says all that is needed
        auto_map={"AutoTokenizer": ["x.Y", None]},
        model_max_length=1e30,
        homepage="https://example.org",
    )
    state = load_file(folder / "model.safetensors") | {"score.weight": torch.ones(3, 32) / 100}
    save_file(state, folder / "model.safetensors", metadata={"format": "pt"})


def test_what_a_base_brings_along_is_left_out_and_said(base: Path, make_config: MakeConfig) -> None:
    many(base)
    notes = open_base(str(base)).notes()
    assert notes == [
        (
            "config.json of the base model has references to code or URLs under auto_map, license_url, "
            "_attn_implementation_autoset, attn_implementation; they are ignored and removed from the export"
        ),
        (
            "the base model has a head of 3 classes (negative, neutral, positive); training starts from it as LONG, "
            "SHORT, SKIP"
        ),
    ]
    pipeline = TrainingPipeline(make_config(f"model.base={base}", "training.epochs=1"))
    summary = pipeline.run()
    assert summary
    assert summary["export_check"]["max_predict_difference"] <= summary["export_check"]["allowed"]
    exported = json.loads((pipeline.folder.export / "config.json").read_text())
    assert exported.get("problem_type") is None
    assert exported["id2label"] == {"0": "LONG", "1": "SHORT", "2": "SKIP"}
    assert "example.org" not in json.dumps(exported)
    assert len(load_model(pipeline.folder.zip).predict(learnable_rows(3, seed=5))) == 3


def test_code_of_a_base_never_runs(base: Path, tmp_path: Path) -> None:
    """Its family is none of transformers', so that only its own code could open it."""
    trace = tmp_path / "trace"
    (base / "configuration_qwen.py").write_text(f"open({str(trace)!r}, 'w')\n")
    code = {"AutoConfig": "configuration_qwen.QWenConfig", "AutoModelForSequenceClassification": "configuration_qwen.X"}
    for changes in ({"model_type": "qwen", "auto_map": code}, {"model_type": "qwen2", "auto_map": code}):
        edit(base / "config.json", **changes)
        edit(base / "tokenizer_config.json", auto_map={"AutoTokenizer": ["configuration_qwen.T", None]})
        try:
            own = load_tokenizer(str(base))
            load_classifier(str(base), own.pad_token_id)
        except ConfigError:
            assert changes["model_type"] == "qwen"
    assert not trace.exists()


@pytest.mark.parametrize("family", ["qwen3_5_text"])
def test_a_family_with_a_tokenizer_class_of_its_own_ends_in_a_zip_that_opens(
    family: str, make_config: MakeConfig, tmp_path: Path
) -> None:
    folder = build_tiny(tmp_path / "base", family)
    edit(folder / "tokenizer_config.json", tokenizer_class="Qwen3_5Tokenizer")
    pipeline = TrainingPipeline(make_config(f"model.base={folder}", "training.epochs=1"))
    assert pipeline.run()
    assert len(load_model(pipeline.folder.zip).predict(learnable_rows(2, seed=5))) == 2


def test_a_checkpoint_in_parts_is_a_base(base: Path) -> None:
    with quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
        (base / "model.safetensors").unlink()
        model.save_pretrained(base, max_shard_size="1MB")
    assert not (base / "model.safetensors").exists()
    own = load_tokenizer(str(base))
    load_classifier(str(base), own.pad_token_id)
    sorted(base.glob("model-*.safetensors"))[-1].unlink()
    with pytest.raises(ConfigError, match=r"model-0000.-of-0000.\.safetensors is missing"):
        check_base(base)
    index = base / "model.safetensors.index.json"
    index.write_text('{"weight_map": {"a": "../../etc/passwd"}}')
    with pytest.raises(ConfigError, match="weight_map must name files of this folder"):
        check_base(base)


def test_a_file_and_a_run_are_not_taken_for_a_base(base: Path, tmp_path: Path) -> None:
    (tmp_path / "q8.gguf").write_bytes(b"GGUF")
    with pytest.raises(ConfigError, match=r"must be the folder of a checkpoint, '.*q8\.gguf' is a file\. Use the safe"):
        open_base(str(tmp_path / "q8.gguf"))
    (tmp_path / "run").mkdir()
    shutil.copytree(base, tmp_path / "run" / "export")
    with pytest.raises(ConfigError, match=r"a checkpoint lies in .*/run/export\. Give that folder"):
        open_base(str(tmp_path / "run"))


def test_what_a_tokenizer_puts_around_a_text_is_left_out(tmp_path: Path) -> None:
    """It would be lost where a text is cut, here and not in transformers, and the export would differ."""
    base = build_tiny(tmp_path / "base", "qwen3")
    plain = load_tokenizer(str(base))("4821")["input_ids"]
    own = Tokenizer.from_file(str(base / "tokenizer.json"))
    own.post_processor = processors.TemplateProcessing("<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)])
    own.save(str(base / "tokenizer.json"))
    assert tokenizer(base)("4821")["input_ids"] == [0, *plain]
    assert load_tokenizer(str(base))("4821")["input_ids"] == plain


def test_rules_of_a_tokenizer_that_transformers_replaces_are_said(tmp_path: Path) -> None:
    base = build_tiny(tmp_path / "base", "qwen3")
    assert tokenizer_and_notes(str(base))[1] == []
    edit(base / "tokenizer_config.json", tokenizer_class="Qwen2Tokenizer")
    own = Tokenizer.from_file(str(base / "tokenizer.json"))
    for changes in ({"normalizer": normalizers.Lowercase()}, {"pre_tokenizer": pre_tokenizers.ByteLevel()}):
        for name, value in changes.items():
            setattr(own, name, value)
        own.save(str(base / "tokenizer.json"))
        (note,) = tokenizer_and_notes(str(base))[1]
        assert re.search(
            r"rules that transformers replaces .*tokens by the file and \d+ as transformers opens it", note
        )


def test_weights_without_a_place_are_said_but_those_of_other_parts_are_not(tmp_path: Path) -> None:
    base = build_tiny(tmp_path / "base", "qwen3")
    for name in ("lm_head.bias", "visual.blocks.0.weight", "mtp.layers.0.weight"):
        put(name, torch.zeros(2))(base)
    assert try_base(str(base))[1] == []
    put("model.norm.bias", torch.zeros(32))(base)
    put("value_head.weight", torch.zeros(1, 32))(base)
    assert try_base(str(base))[1] == [
        "2 weights of the base model are not part of its classifier and are ignored, first model.norm.bias"
    ]


def test_a_head_with_the_classes_in_another_order_is_put_in_order(base: Path) -> None:
    config(id2label={"2": "SHORT", "0": "SKIP", "1": "long"}, label2id={"SKIP": 0, "long": 1, "SHORT": 2})(base)
    put("score.weight", torch.arange(3.0)[:, None].expand(3, 32).contiguous())(base)
    assert "a head of 3 classes (SKIP, long, SHORT)" in open_base(str(base)).notes()[0]
    model: Any = load_classifier(str(base), 0)
    assert model.score.weight[:, 0].tolist() == [1.0, 2.0, 0.0]


def test_a_model_that_reads_what_comes_after_a_row_is_refused_without_a_word_of_it_in_its_config(base: Path) -> None:
    """Bidirectional in what it computes, under any name: here set on the opened model."""
    classifier = load_classifier(str(base), load_tokenizer(str(base)).pad_token_id)
    model: Any = lora.add_lora(classifier, r=2, alpha=2, dropout=0.0, target_modules=["q_proj"])
    model.config.is_causal = False
    with pytest.raises(ConfigError, match="padding after a row changes its logits by"):
        engine_mismatch(model, model, probe_rows(16827, 0))
