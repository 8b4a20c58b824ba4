"""The fast path gives the logits, losses and gradients of the plain PEFT modules, and says where it does not apply."""

import io
import json
import sys
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import PeftModel, get_peft_model
from rich.console import Console
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from ctxtrain.config.sections import LoraConfig
from ctxtrain.data.codec import Codec
from ctxtrain.engine.cpu import layer_parts
from ctxtrain.engine.cpu import onnx_inference as graph_module
from ctxtrain.engine.cpu import training_model as fast_module
from ctxtrain.engine.cpu import wide_inference as merged_module
from ctxtrain.engine.cpu.dropout import DropoutMasks
from ctxtrain.engine.cpu.layer_parts import ADAPTER
from ctxtrain.engine.cpu.onnx_inference import OnnxClassifier
from ctxtrain.engine.cpu.training_model import FastClassifier, unsupported_reason
from ctxtrain.engine.cpu.wide_inference import MergedClassifier
from ctxtrain.export.predictor import Predictor
from ctxtrain.model import forward, lora
from ctxtrain.model.agreement import engine_mismatch, probe_rows
from ctxtrain.model.base import load_classifier
from ctxtrain.model.embedded import embedded_base
from ctxtrain.model.losses import focal_loss
from ctxtrain.model.tokenizer import load_tokenizer, quiet_transformers
from ctxtrain.progress import Reporter
from ctxtrain.train import TrainingPipeline
from tests.conftest import MakeConfig
from tests.helpers import frozen_sha256
from tests.tiny_models import FAMILIES, build_tiny

CPU = torch.device("cpu")
PAD = 0
LENGTHS = (150, 97, 81, 80, 2, 1)  # more and fewer than a block of queries, and a single token
ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
Faster = Callable[[PreTrainedModel], nn.Module]
FASTER: tuple[Faster, ...] = (MergedClassifier, OnnxClassifier.from_model)
ONE_LAYER = {"num_hidden_layers": 1, "layer_types": ["full_attention"]}
YARN = {"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}}
SETTINGS: dict[str, dict[str, Any]] = {
    "attention": {},
    "last:1": {"layers": "last:1"},
    "q and v": {"target_modules": ["q_proj", "v_proj"]},
    "MLP": {"target_modules": ["gate_proj", "down_proj"]},
    "all, rank 3": {"target_modules": ALL, "r": 3, "alpha": 7},
}


def build(folder: Path, dtype: torch.dtype = torch.float32, **changes: Any) -> PeftModel:
    """A model none of whose weights is at its start, where LoRA's B is zero and norms are one."""
    settings = LoraConfig().model_dump() | {"dropout": 0.0} | changes
    model = lora.add_lora(load_classifier(str(folder), PAD, dtype=dtype), **settings)
    torch.manual_seed(1)
    with torch.no_grad():
        for weight in model.parameters():
            if weight.requires_grad or weight.ndim == 1:
                weight.add_(torch.randn_like(weight), alpha=0.1)
    return model.train()


def ragged(lengths: tuple[int, ...] = LENGTHS, seed: int = 0) -> Tensor:
    ids_BT = torch.randint(1, 200, (len(lengths), max(lengths)), generator=torch.Generator().manual_seed(seed))
    for row, length in enumerate(lengths):
        ids_BT[row, length:] = PAD
    return ids_BT


def results(model: PeftModel, network: nn.Module, ids_BT: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Logits, loss and the gradient of every trained weight."""
    model.zero_grad()
    logits_BC = forward.logits(network, {"input_ids": ids_BT})
    loss, _ = focal_loss(logits_BC, torch.arange(len(ids_BT)) % 3, 2.0, torch.tensor([1.0, 2.0, 3.0]))
    loss.backward()
    weights = lora.trainable_parameters(model)
    return logits_BC.detach(), loss.detach(), {name: weight.grad for name, weight in weights.items()}  # type: ignore[misc]


def assert_same(fast: tuple[Any, ...], plain: tuple[Any, ...]) -> None:
    torch.testing.assert_close(fast[0], plain[0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(fast[1], plain[1], atol=1e-6, rtol=1e-6)
    assert fast[2].keys() == plain[2].keys()
    for name, grad in plain[2].items():
        assert grad.abs().max() > 1e-4, name
        torch.testing.assert_close(fast[2][name], grad, atol=1e-5 * float(grad.abs().max()), rtol=1e-4, msg=name)


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "embedded"])
def test_logits_loss_and_every_gradient_are_those_of_plain_peft(family: str, setting: str, tmp_path: Path) -> None:
    model = build(embedded_base() if family == "embedded" else build_tiny(tmp_path, family), **SETTINGS[setting])
    assert unsupported_reason(model, CPU) is None
    fast = FastClassifier(model)
    for ids_BT in (ragged(), ragged((3, 2))):
        assert_same(results(model, fast, ids_BT), results(model, model, ids_BT))
    short = ragged((1, 1))
    torch.testing.assert_close(results(model, fast, short)[0], results(model, model, short)[0], atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_long_windows_whose_attention_is_computed_twice_are_the_same_too(family: str, tmp_path: Path) -> None:
    model = build(build_tiny(tmp_path, family))
    ids_BT = ragged((600, 411))
    assert_same(results(model, FastClassifier(model), ids_BT), results(model, model, ids_BT))


def test_rows_are_filled_up_to_few_counts_by_a_32nd_at_most() -> None:
    filled = {rows: len(fast_module.pad_rows(torch.ones(rows, 2))) for rows in range(1, 5000)}
    assert all(rows <= more <= rows + rows / 32 for rows, more in filled.items())
    assert len({filled[rows] for rows in range(2048, 4096)}) <= 33
    assert fast_module.pad_rows(torch.ones(65, 2))[65:].tolist() == [[0.0, 0.0]]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("setting", ["attention", "all, rank 3"])
def test_norms_and_masks_that_are_made_again_and_not_kept_give_the_same_bits(
    setting: str, dropout: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build(build_tiny(tmp_path), **SETTINGS[setting], dropout=dropout)
    network, found = FastClassifier(model), []
    monkeypatch.setattr(layer_parts, "MKL_IS_WIDE", False)  # or large products would be multiplied in another way
    for most in (layer_parts.LARGE_NUMEL, 0):  # the constant is for models of millions of numbers
        monkeypatch.setattr(layer_parts, "LARGE_NUMEL", most)
        torch.manual_seed(5)
        found.append((kept_bytes(model, network, ragged()), results(model, network, ragged())))
    assert found[1][0] < found[0][0]
    torch.testing.assert_close(found[1][1], found[0][1], rtol=0, atol=0)


def test_large_tensors_of_the_mlp_are_those_of_the_step_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(layer_parts, "LARGE_NUMEL", 0)
    monkeypatch.setattr(layer_parts, "MKL_IS_WIDE", True)
    monkeypatch.setattr(layer_parts, "ONEDNN_MAX_COLUMNS", 0)
    model = build(build_tiny(tmp_path))
    fast, memory = FastClassifier(model), []
    free_buffers = fast.mlp_buffers._free
    forward.logits(fast, {"input_ids": ragged()})  # nothing comes back from a step that has no backward pass
    for lengths in (LENGTHS, LENGTHS, (3, 2), (200, *LENGTHS), LENGTHS):
        ids_BT = ragged(lengths)
        assert_same(results(model, fast, ids_BT), results(model, model, ids_BT))
        memory.append({of.data_ptr() for of in free_buffers})
    first, second, shorter, longer, after = memory
    layers = len(model.get_base_model().model.layers)
    assert len(first) == 2 * (layers - 1) + 1  # gate and up of all but the last, and one for what is read at once
    assert first == second == shorter
    assert len(longer) == len(first)
    assert longer == after
    assert max(of.nbytes for of in free_buffers) < 1.1 * (sum(LENGTHS) + 200) * model.config.intermediate_size * 4


@pytest.mark.parametrize("mkl_is_wide", [True, False])
@pytest.mark.parametrize("setting", ["attention", "all, rank 3"])
def test_products_are_the_same_by_mkl_and_by_onednn(
    setting: str, mkl_is_wide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_parts, "MKL_IS_WIDE", mkl_is_wide)
    monkeypatch.setattr(layer_parts, "ONEDNN_MAX_COLUMNS", 0)
    model = build(build_tiny(tmp_path), **SETTINGS[setting])
    assert_same(results(model, FastClassifier(model), ragged()), results(model, model, ragged()))


def test_other_rotary_embeddings_are_the_models_own(tmp_path: Path) -> None:
    folder = build_tiny(tmp_path)
    config = json.loads((folder / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 10000.0}
    (folder / "config.json").write_text(json.dumps(config))
    model = build(folder)
    assert_same(results(model, FastClassifier(model), ragged()), results(model, model, ragged()))


class Given(nn.Module):
    """Dropout whose mask is given, as numbers to multiply with."""

    def __init__(self, mask_BTE: Tensor) -> None:
        super().__init__()
        self.mask_BTE = mask_BTE

    def forward(self, x_BTE: Tensor) -> Tensor:
        return x_BTE * self.mask_BTE


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_dropout_is_that_of_plain_peft_with_the_same_masks(family: str, tmp_path: Path) -> None:
    share = 0.3
    model = build(build_tiny(tmp_path, family), dropout=share)
    fast, ids_BT = FastClassifier(model), ragged()
    torch.manual_seed(5)
    dropped = results(model, fast, ids_BT)

    torch.manual_seed(5)
    batch, tokens, width = *ids_BT.shape, 32
    last_B, drawn = torch.tensor(LENGTHS) - 1, DropoutMasks()

    def draw(rows: int) -> Tensor:
        return drawn.draw((rows, width), share, torch.float32)[0] / (1 - share)

    attentions = [layer.self_attn for layer in model.get_base_model().model.layers]
    # In the order of the draws: layer 0 with q, k, v and o; layer 1 with k and v, and at the pooled tokens q and o.
    read_BT = torch.arange(tokens) <= last_B[:, None]  # padding has no mask, but rows that fill up the products have
    masks = [torch.ones(batch, tokens, width) for _ in range(3)]
    for mask in masks:
        mask[read_BT] = draw(len(fast_module.pad_rows(torch.ones(sum(LENGTHS)))))[: sum(LENGTHS)]
    pooled = [masks[2].clone(), torch.ones_like(masks[2])]
    for mask in pooled:
        mask[torch.arange(batch), last_B] = draw(batch)
    by_name = [
        {"q": masks[0], "k": masks[0], "v": masks[0], "o": masks[1]},
        {"q": pooled[0], "k": masks[2], "v": masks[2], "o": pooled[1]},
    ]
    for attention, given in zip(attentions, by_name, strict=True):
        for name, mask in given.items():
            getattr(attention, f"{name}_proj").lora_dropout[ADAPTER] = Given(mask)
    assert_same(dropped, results(model, model, ids_BT))


@pytest.mark.parametrize("dropout", [0.05, 0.5, 1 / 65536])
def test_masks_have_the_right_share_and_depend_on_the_seed_alone(dropout: float) -> None:
    masks = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        drawn = DropoutMasks()
        for shape in ((7, 3), (999, 1001)):  # the second is drawn in parts, from where the first has ended
            mask, again = drawn.draw(shape, dropout, torch.float32)
            assert torch.equal(again(), mask)
        masks.append(mask)
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])
    assert set(masks[0].unique().tolist()) == {0, 1}
    error = (dropout * (1 - dropout) / masks[0].numel()) ** 0.5
    assert 1 - float(masks[0].double().mean()) == pytest.approx(dropout, abs=5 * error + 1e-5)
    for axis in (0, 1):  # no row and no column is favoured
        shares = masks[0].double().mean(dim=axis)
        assert float(shares.std()) == pytest.approx((dropout * (1 - dropout) / 1000) ** 0.5, rel=0.2)
    first, second = (drawn.draw((300, 300), dropout, torch.float32)[0] for _ in range(2))
    assert not torch.equal(first, second)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_batch_mates_and_padding_do_not_matter(family: str, tmp_path: Path) -> None:
    fast, ids_BT = FastClassifier(build(build_tiny(tmp_path, family))).eval(), ragged()
    with torch.no_grad():
        together = forward.logits(fast, {"input_ids": ids_BT})
        for row, length in enumerate(LENGTHS):
            alone = forward.logits(fast, {"input_ids": ids_BT[row : row + 1, :length]})
            torch.testing.assert_close(alone[0], together[row], atol=1e-5, rtol=0)


def test_evaluation_has_no_dropout_and_draws_nothing(tmp_path: Path) -> None:
    folder, batch = build_tiny(tmp_path), {"input_ids": ragged()}
    model = build(folder, dropout=0.5)
    fast = FastClassifier(model)
    with torch.no_grad():
        expected = forward.logits(FastClassifier(build(folder, dropout=0.0)), batch)
        assert not torch.allclose(forward.logits(fast, batch), expected)
        before = torch.get_rng_state()
        assert torch.equal(forward.logits(fast.eval(), batch), expected)
        assert torch.equal(torch.get_rng_state(), before)
        torch.testing.assert_close(forward.logits(model, batch), expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_what_it_trains_is_the_same_reloaded_in_plain_peft_and_merged(family: str, tmp_path: Path) -> None:
    folder, batch = build_tiny(tmp_path / "base", family), {"input_ids": ragged()}
    model = build(folder, dropout=0.1)
    fast = FastClassifier(model)
    frozen, names = frozen_sha256(model), list(lora.trainable_state(model))
    optimizer = torch.optim.AdamW(lora.trainable_parameters(model).values(), lr=1e-2)
    for _ in range(3):
        results(model, fast, batch["input_ids"])
        optimizer.step()
    assert frozen_sha256(model) == frozen
    trained = lora.trainable_state(model)
    assert list(trained) == names
    with torch.no_grad():
        expected = forward.logits(fast.eval(), batch)
        again = build(folder)
        lora.load_trainable_state(again, trained)
        torch.testing.assert_close(forward.logits(again.eval(), batch), expected, atol=1e-5, rtol=0)
        merged = lora.merge(model)
        merged.save_pretrained(tmp_path / "merged")
        plain = AutoModelForSequenceClassification.from_pretrained(tmp_path / "merged", dtype=torch.float32)
        torch.testing.assert_close(plain.eval()(**batch).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_a_bfloat16_base_with_float32_adapters(family: str, tmp_path: Path) -> None:
    folder = build_tiny(tmp_path, family)
    model, ids_BT = build(folder, torch.bfloat16, target_modules=ALL), ragged((90, 41, 7))
    model.get_base_model().score.modules_to_save[ADAPTER].register_forward_pre_hook(lambda _, x: (x[0].float(),))
    fast, plain = results(model, FastClassifier(model), ids_BT), results(model, model, ids_BT)
    torch.testing.assert_close(fast[0], plain[0], atol=0.05, rtol=0.05)
    for name, grad in plain[2].items():
        assert fast[2][name].dtype == torch.float32
        assert float((fast[2][name] - grad).norm() / grad.norm()) < 0.1, name


def kept_bytes(model: PeftModel, network: nn.Module, ids_BT: Tensor) -> int:
    """Bytes that are kept for the backward pass, weights apart."""
    weights = {weight.untyped_storage().data_ptr() for weight in model.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        forward.logits(network, {"input_ids": ids_BT})
    return sum(kept.values())


def test_little_is_kept_and_nothing_below_the_first_adapter(tmp_path: Path) -> None:
    model = build(embedded_base(), dropout=0.05)
    whole = kept_bytes(model, FastClassifier(model), ragged())
    assert whole < 0.7 * kept_bytes(model, model, ragged())
    top = build(embedded_base(), dropout=0.05, layers="last:1")
    assert kept_bytes(top, FastClassifier(top), ragged()) < 0.25 * whole


class Skewed(FastClassifier):
    """An engine that is wrong by a little, as one that does not know an oddity of a base would be."""

    def forward(self, *inputs: Any, **named: Any) -> Any:
        found = super().forward(*inputs, **named)
        found.logits = found.logits * 1.001
        return found


def test_an_engine_that_gives_other_logits_is_not_used(tiny_base: Path) -> None:
    model, probe = build(tiny_base), probe_rows(16827, PAD)
    assert engine_mismatch(model, FastClassifier(model), probe) is None
    assert "its logits on two rows differ by" in str(engine_mismatch(model, Skewed(model), probe))
    assert model.training


@pytest.mark.parametrize("family", sorted(FAMILIES.keys() - {"qwen2", "qwen3"}))
def test_other_families_take_the_plain_path_and_a_run_says_so_once(
    family: str, tmp_path: Path, make_config: MakeConfig
) -> None:
    said = io.StringIO()
    config = make_config(f"model.base={build_tiny(tmp_path / 'base', family)}")
    pipeline = TrainingPipeline(config, reporter=Reporter(Console(file=said, width=400)))
    pipeline.load_data()
    pipeline.setup_model()
    pipeline.train_epoch()
    note = f"note: training uses the slower reference engine: {family} is neither a dense Qwen2 nor"
    assert said.getvalue().count(note) == 1
    assert not isinstance(pipeline.learner.engine.network, FastClassifier)


def test_a_run_on_a_dense_family_takes_the_fast_path_and_says_nothing(make_config: MakeConfig) -> None:
    said = io.StringIO()
    pipeline = TrainingPipeline(make_config(), reporter=Reporter(Console(file=said, width=400)))
    pipeline.load_data()
    pipeline.setup_model()
    assert isinstance(pipeline.learner.engine.network, FastClassifier)
    assert "slower" not in said.getvalue()


def test_what_it_was_not_made_for_is_named(tmp_path: Path) -> None:
    folder = build_tiny(tmp_path)

    def adapted(**changes: Any) -> PeftModel:
        settings: dict[str, Any] = {"task_type": "SEQ_CLS", "target_modules": ["q_proj"], "modules_to_save": ["score"]}
        model: PeftModel = get_peft_model(load_classifier(str(folder), PAD), PeftConfig(**(settings | changes)))
        return model

    assert unsupported_reason(adapted(), CPU) is None
    assert unsupported_reason(adapted(use_rslora=True), CPU) is None  # another scale, nothing else
    assert unsupported_reason(adapted(), torch.device("cuda")) is None
    reason = "the fast engine is for CPUs and CUDA, and the model is on mps"
    assert unsupported_reason(adapted(), torch.device("mps")) == reason
    reason = "a merged model has a fast engine on CPUs only, and the model is on cuda"
    assert unsupported_reason(lora.merge(adapted()), torch.device("cuda")) == reason
    assert "q_proj has a variant of LoRA" in str(unsupported_reason(adapted(use_dora=True), CPU))
    assert "embed_tokens" in str(unsupported_reason(adapted(target_modules=["q_proj", "embed_tokens"]), CPU))
    two = adapted()
    two.add_adapter("second", PeftConfig(task_type="SEQ_CLS", target_modules=["q_proj"]))
    assert unsupported_reason(two, CPU) == "the model has other adapters than one LoRA"
    trained = adapted()
    trained.get_base_model().model.norm.weight.requires_grad_(True)
    assert str(unsupported_reason(trained, CPU)).endswith("model.norm.weight is trained")
    config = json.loads((folder / "config.json").read_text())
    sliding = config | {"use_sliding_window": True, "sliding_window": 8, "layer_types": ["sliding_attention"] * 2}
    for changed, reason in (
        (sliding, "the model has layers with a sliding window"),
        (config | {"hidden_act": "gelu"}, "another activation than SiLU"),
        (config | {"attention_dropout": 0.1}, "dropout in its attention"),
    ):
        (folder / "config.json").write_text(json.dumps(changed))
        assert reason in str(unsupported_reason(adapted(), CPU))


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("faster", FASTER, ids=["merged", "graph"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "embedded"])
def test_a_merged_model_answers_as_plain_transformers(
    family: str, faster: Faster, threads: int, tmp_path: Path
) -> None:
    model = build(embedded_base() if family == "embedded" else build_tiny(tmp_path, family), target_modules=ALL)
    merged = lora.merge(model).eval()
    assert unsupported_reason(merged, CPU) is None
    fast = faster(merged).eval()
    kept: list[Tensor] = []
    for ids_BT in (ragged(), ragged((1,)), ragged((3, 2)), ragged((79, 80, 81)), ragged((600, 411))):
        masked = merged(input_ids=ids_BT, attention_mask=(ids_BT != PAD).long()).logits
        try:
            torch.set_num_threads(threads)
            with torch.inference_mode(), saved_tensors_hooks(kept.append, lambda x: x):
                torch.testing.assert_close(forward.logits(fast, {"input_ids": ids_BT}), masked, atol=1e-5, rtol=0)
        finally:
            torch.set_num_threads(1)
    assert kept == []


@pytest.mark.parametrize(
    ("faster", "changes"),
    list(product(FASTER, (ONE_LAYER, YARN))),
)
def test_a_merged_model_of_another_config_answers_as_plain_transformers(
    faster: Faster, changes: dict[str, Any], tmp_path: Path
) -> None:
    folder = build_tiny(tmp_path, "qwen3")
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | changes))
    with quiet_transformers():
        AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder)  # without layers that are no longer there
    merged, ids_BT = lora.merge(build(folder)).eval(), ragged((1100, 30, 7))
    masked = merged(input_ids=ids_BT, attention_mask=(ids_BT != PAD).long()).logits
    for context in (torch.inference_mode, torch.no_grad):
        with context():
            torch.testing.assert_close(faster(merged)(ids_BT).logits, masked, atol=1e-5, rtol=0)


def test_a_graph_computes_what_a_large_vocabulary_needs_when_it_is_asked(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    merged, ids_BT = lora.merge(build(build_tiny(tmp_path, "qwen3"))).eval(), ragged()
    tables, answers = [], []
    for largest in (graph_module.LARGEST_TABLE, 0):
        monkeypatch.setattr(graph_module, "LARGEST_TABLE", largest)
        tables.append(sum(node.op_type == "Gather" for node in graph_module.GraphBuilder(merged).build().node))
        answers.append(OnnxClassifier.from_model(merged)(ids_BT).logits)
    assert tables == [4, 1]  # states, queries, keys and values; states alone
    torch.testing.assert_close(*answers, atol=1e-5, rtol=0)


def test_a_graph_adds_what_all_its_layers_add(tmp_path: Path) -> None:
    merged, ids_BT = lora.merge(build(build_tiny(tmp_path, "qwen2"))).eval(), ragged()
    for layer in merged.model.layers:
        for linear in (layer.self_attn.o_proj, layer.self_attn.v_proj):
            linear.bias = nn.Parameter(torch.randn(linear.out_features))  # o_proj's as with `attention_bias` in Qwen3
    expected = merged(input_ids=ids_BT, attention_mask=(ids_BT != PAD).long()).logits
    torch.testing.assert_close(OnnxClassifier.from_model(merged)(ids_BT).logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("changes", "max_tokens", "faster"),
    [
        ({}, 2048, OnnxClassifier),
        ({}, 2049, MergedClassifier),
        ({"hidden_size": 512}, 900, MergedClassifier),
    ],
)
def test_narrow_models_with_short_texts_answer_by_a_graph(
    changes: dict[str, Any], max_tokens: int, faster: type[nn.Module], tmp_path: Path
) -> None:
    folder = build_tiny(tmp_path, "qwen3")
    tokenizer = load_tokenizer(str(folder))
    config = json.loads((folder / "config.json").read_bytes())
    (folder / "config.json").write_text(json.dumps(config | changes))
    torch.manual_seed(0)
    model = (
        AutoModelForSequenceClassification.from_config(AutoConfig.from_pretrained(folder, num_labels=3)).float().eval()
    )
    codec = Codec(kind="text", fields=[], features={})
    assert type(Predictor(model, tokenizer, codec, 1.0, max_tokens).engine.network) is faster


@pytest.mark.parametrize("mkl_is_wide", [True, False])
def test_a_merged_model_answers_the_same_in_blocks_of_rows(
    mkl_is_wide: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(layer_parts, "MKL_IS_WIDE", mkl_is_wide)
    merged, ids_BT = lora.merge(build(build_tiny(tmp_path, "qwen2"))).eval(), ragged()
    output = merged.model.layers[0].self_attn.o_proj
    output.bias = nn.Parameter(torch.randn(output.out_features))  # as with `attention_bias` in Qwen3's config
    expected = merged(input_ids=ids_BT, attention_mask=(ids_BT != PAD).long()).logits
    width = merged.config.intermediate_size
    monkeypatch.setattr(merged_module, "CACHE_NUMEL", 17 * width)
    for fewest, rows in ((17, 17), (18, sys.maxsize)):
        monkeypatch.setattr(merged_module, "MIN_BLOCK_ROWS", fewest)
        assert merged_module._block_rows(width) == rows
        with torch.inference_mode():
            torch.testing.assert_close(MergedClassifier(merged)(ids_BT).logits, expected, atol=1e-5, rtol=0)


def test_a_merged_model_in_another_precision_keeps_its_own_forward_pass(tmp_path: Path) -> None:
    merged = lora.merge(build(build_tiny(tmp_path), dtype=torch.bfloat16)).eval()
    assert unsupported_reason(merged, CPU) is None
    assert unsupported_reason(merged.half(), CPU) == "the merged model is in torch.float16, not in float32 or bfloat16"


@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_a_predictor_answers_as_the_plain_model_for_short_and_long_texts(family: str, tmp_path: Path) -> None:
    folder = build_tiny(tmp_path, family)
    model, tokenizer = load_classifier(str(folder), PAD).eval(), load_tokenizer(str(folder))
    predictor = Predictor(model, tokenizer, Codec(kind="text", fields=[], features={}), 1.0, 900)
    assert isinstance(predictor.engine.network, OnnxClassifier) == (family in ("qwen2", "qwen3"))
    lengths = [3, 850, 20, 40, 900, 700, 1, *range(1, 40)]
    texts = ["".join("abcdefghij"[(place * length + place // 7) % 10] for place in range(length)) for length in lengths]
    answers = predictor.logits([{"context": text} for text in texts])
    for text, answer in zip(texts, answers, strict=True):
        inputs = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            plain = model(input_ids=inputs["input_ids"], attention_mask=inputs["attention_mask"]).logits[0]
        torch.testing.assert_close(torch.tensor(answer).float(), plain, atol=1e-5, rtol=0)
