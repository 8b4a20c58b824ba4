"""The memory estimate equals what is kept for a backward pass, and computing layers anew changes no gradient."""

import weakref
from typing import Any

import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AutoConfig, AutoModelForSequenceClassification

from ctxtrain.engine import activations as plain
from ctxtrain.engine.cpu import activations as packed
from ctxtrain.engine.cpu.select import PackedTrainingEngine
from ctxtrain.engine.cpu.training_model import FastClassifier
from ctxtrain.engine.reference import ReferenceNetwork, TrainingEngine
from ctxtrain.model import lora
from ctxtrain.model.forward import logits
from ctxtrain.model.shape import Batch, Device, Dtype, EngineKind, LoraShape, ModelShape, Precision
from ctxtrain.runtime import Purpose, seed_torch
from tests.tiny_models import COMMON, FAMILIES

ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
SIZES = {  # in the proportions of Qwen2.5-0.5B
    "hidden_size": 256,
    "intermediate_size": 1024,
    "num_hidden_layers": 3,
    "num_attention_heads": 8,
    "num_key_value_heads": 2,
    "head_dim": 32,
}
NARROW = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "num_key_value_heads": 1}
FORMULAS: dict[EngineKind, Any] = {"reference": plain, "packed": packed}


def build(family: str, adapters: LoraShape, dtype: Dtype = "float32", **changes: Any) -> PeftModel:
    config = AutoConfig.for_model(family, vocab_size=300, pad_token_id=0, num_labels=3, **(SIZES | changes))
    config.use_cache = False
    torch.manual_seed(0)
    base = AutoModelForSequenceClassification.from_config(config, dtype=getattr(torch, dtype))
    base.score.to(torch.float32)
    settings = {name: getattr(adapters, name) for name in ("r", "dropout", "target_modules", "layers")}
    model = lora.add_lora(base, alpha=16, **settings)
    with torch.no_grad():
        for weight in lora.trainable_parameters(model).values():
            weight.add_(torch.randn_like(weight), alpha=0.05)
    return model.train()


def engine_of(model: PeftModel, kind: EngineKind, *, checkpointing: bool, device: Device = "cpu") -> TrainingEngine:
    """With the device cuda, the fast engine's way for GPUs, which a CPU computes too."""
    if kind == "reference":
        engine = TrainingEngine(ReferenceNetwork(model), "")
    else:
        network = FastClassifier(model, kernel="blocks" if device == "cuda" else None)
        engine = PackedTrainingEngine(network, None, print)
    if checkpointing:
        engine.checkpoint_layers()
    engine.network.train()
    return engine


def forward(engine: TrainingEngine, rows: int, tokens: int, dtype: Dtype) -> Tensor:
    ids_BT = torch.randint(1, 300, (rows, tokens), generator=torch.Generator().manual_seed(0))
    seed_torch(0, Purpose.DROPOUT)
    with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "bfloat16"):
        return logits(engine.network, {"input_ids": ids_BT})


class Saved:
    """A tensor that a node of the graph keeps; it lives as long as the node."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def kept_bytes(engine: TrainingEngine, rows: int, tokens: int, dtype: Dtype) -> int:
    """Bytes that the forward pass keeps besides the model's weights, each storage once."""
    saved: list[weakref.ref[Saved]] = []

    def pack(tensor: Tensor) -> Saved:
        holder = Saved(tensor.detach())
        saved.append(weakref.ref(holder))
        return holder

    with saved_tensors_hooks(pack, lambda holder: holder.tensor):
        logits_BC = forward(engine, rows, tokens, dtype)
    tensors = [holder.tensor for reference in saved if (holder := reference())]
    nodes, seen = [logits_BC.grad_fn], set()
    while nodes:  # functions that compute a norm anew keep its input without the hooks
        if (node := nodes.pop()) is not None and node not in seen:
            seen.add(node)
            nodes += [following for following, _ in node.next_functions]
            if (recompute := getattr(node, "recompute", None)) is not None:
                tensors.append(recompute.args[0])
    weights = {weight.untyped_storage()._cdata for weight in engine.network.parameters()}
    storages = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(count for storage, count in storages.items() if storage not in weights)


class PeakBytes(TorchDispatchMode):
    """Largest sum of bytes of all tensors that were made under this mode and live, besides those of `known`."""

    def __init__(self, known: set[int]) -> None:
        super().__init__()
        self.known, self.live, self.peak = known, dict[int, int](), 0

    def __torch_dispatch__(self, function: Any, _types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, Tensor):
                storage = tensor.untyped_storage()
                if storage._cdata not in self.known and storage._cdata not in self.live:
                    self.live[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.live.pop, storage._cdata, 0)
        self.peak = max(self.peak, sum(self.live.values()))
        return made


def predicted(
    model: PeftModel,
    kind: EngineKind,
    adapters: LoraShape,
    precision: Precision,
    batch: Batch,
    *,
    checkpointing: bool,
) -> Any:
    shape = ModelShape.from_config(model.get_base_model().config)
    return FORMULAS[kind].training_activations(shape, adapters, precision, batch, checkpointing=checkpointing)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
@pytest.mark.parametrize("kind", ["reference", "packed"])
@pytest.mark.parametrize(
    ("adapters", "rows", "tokens", "changes"),
    [
        (LoraShape(), 2, 100, {}),
        (LoraShape(), 46, 270, NARROW),  # norms and masks are computed anew, attention weights too
        (LoraShape(target_modules=ALL), 2, 200, {}),
        (LoraShape(dropout=0.0, layers="last:2"), 2, 100, {}),
        (LoraShape(dropout=0.0, target_modules=("v_proj", "gate_proj")), 2, 100, {}),
    ],
)
def test_the_bytes_kept_for_the_backward_pass_are_those_computed(
    kind: EngineKind, family: str, dtype: Dtype, adapters: LoraShape, rows: int, tokens: int, changes: dict[str, int]
) -> None:
    model = build(family, adapters, dtype, **changes)
    for checkpointing in (False, True):
        counted = kept_bytes(engine_of(model, kind, checkpointing=checkpointing), rows, tokens, dtype)
        batch = Batch(rows * tokens, tokens)
        step = predicted(model, kind, adapters, Precision(dtype), batch, checkpointing=checkpointing)
        assert step.kept == pytest.approx(counted, rel=0.02), checkpointing


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_the_bytes_that_the_fast_engine_keeps_on_a_gpu_are_those_computed(family: str, dtype: Dtype) -> None:
    """Counted on a CPU, which runs the same operations but for the kernel of attention; it keeps the same tensors."""
    adapters, rows, tokens = LoraShape(), 2, 100
    model = build(family, adapters, dtype)
    for checkpointing in (False, True):
        engine = engine_of(model, "packed", checkpointing=checkpointing, device="cuda")
        counted = kept_bytes(engine, rows, tokens, dtype)
        precision, batch = Precision(dtype, "cuda"), Batch(rows * tokens, tokens)
        step = predicted(model, "packed", adapters, precision, batch, checkpointing=checkpointing)
        assert step.kept == pytest.approx(counted, rel=0.02), checkpointing


@pytest.mark.parametrize("family", ["qwen3_moe", "qwen2_moe"])
def test_the_bytes_that_experts_keep_are_near(family: str) -> None:
    adapters = LoraShape()
    model = build(family, adapters, **(SIZES | FAMILIES[family]))
    counted = kept_bytes(engine_of(model, "reference", checkpointing=False), 3, 100, "float32")
    step = predicted(model, "reference", adapters, Precision(), Batch(300, 100), checkpointing=False)
    assert step.kept == pytest.approx(counted, rel=0.1)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("kind", ["reference", "packed"])
def test_the_peak_of_a_step_and_of_a_validation_batch_are_near_those_computed(
    kind: EngineKind, dtype: Dtype, checkpointing: bool
) -> None:
    adapters, rows, tokens = LoraShape(), 2, 100
    model = build("qwen3", adapters, dtype)
    engine = engine_of(model, kind, checkpointing=checkpointing)
    weights = [*model.parameters()]
    for weight in lora.trainable_parameters(model).values():
        weight.grad = torch.zeros_like(weight)
        weights.append(weight.grad)
    if isinstance(engine.network, FastClassifier):  # whose copies of weights are counted with the base
        weights += [linear.weight_FE for layer in engine.network.layers for linear in layer.values()]
    known, batch = {weight.untyped_storage()._cdata for weight in weights}, Batch(rows * tokens, tokens)
    with PeakBytes(known) as step:
        forward(engine, rows, tokens, dtype).sum().backward()
    computed = predicted(model, kind, adapters, Precision(dtype), batch, checkpointing=checkpointing)
    assert 0.97 * step.peak < computed.kept + computed.widest < 1.35 * step.peak
    engine.network.eval()
    with PeakBytes(known) as validation, torch.no_grad():
        forward(engine, rows, tokens, dtype)
    shape = ModelShape.from_config(model.get_base_model().config)
    widest = FORMULAS[kind].evaluation_activations(shape, Precision(dtype), batch).widest
    assert 0.97 * validation.peak < widest < 1.35 * validation.peak


def gradients(engine: TrainingEngine, dtype: Dtype) -> dict[str, Tensor]:
    assert isinstance(engine.network, FastClassifier | ReferenceNetwork)
    model = engine.network.model
    model.zero_grad()
    forward(engine, 3, 70, dtype).square().sum().backward()
    return {name: weight.grad for name, weight in lora.trainable_parameters(model).items() if weight.grad is not None}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("targets", [("q_proj", "k_proj", "v_proj", "o_proj"), ALL])
@pytest.mark.parametrize(
    ("kind", "family"),
    [
        *[(kind, family) for kind in ("reference", "packed") for family in ("qwen2", "qwen3")],
        ("reference", "qwen3_moe"),
        ("reference", "qwen3_5_text"),
    ],
)
def test_gradients_of_layers_computed_anew_are_the_same_bits(
    kind: EngineKind, family: str, targets: tuple[str, ...], dtype: Dtype
) -> None:
    names = targets if family in ("qwen2", "qwen3", "qwen3_5_text") else targets[:4]
    adapters = LoraShape(target_modules=names)
    model = build(family, adapters, dtype, **(COMMON | FAMILIES[family]))
    kept = gradients(engine_of(model, kind, checkpointing=False), dtype)
    computed = gradients(engine_of(model, kind, checkpointing=True), dtype)
    assert kept.keys() == computed.keys() == lora.trainable_parameters(model).keys()
    assert all(bool(gradient.abs().max() > 0) for gradient in kept.values())
    for name, gradient in kept.items():
        assert torch.equal(gradient, computed[name]), name


def test_masks_of_layers_computed_anew_depend_on_the_seed() -> None:
    """The dropout of the comparison above has an effect: another seed gives other gradients."""
    model = build("qwen2", LoraShape(), **COMMON)
    engine = engine_of(model, "packed", checkpointing=True)
    before = gradients(engine, "float32")
    nn.Module.eval(engine.network)
    assert any(not torch.equal(before[name], other) for name, other in gradients(engine, "float32").items())
