"""What a run needs by part, and the choice that is made of it."""

from dataclasses import replace

import pytest
from transformers import AutoConfig

from benchmarks.memory_table import SHAPES, training
from ctxtrain.engine.memory_needs import GB, choose_checkpointing, memory_needs
from ctxtrain.model.shape import LoraShape, ModelShape

RUN = training("bfloat16", "cuda", windows=8)


@pytest.fixture(scope="module")
def shape() -> ModelShape:
    return ModelShape.from_config(SHAPES["0.5B"]())


def test_weights_are_those_of_the_published_model(shape: ModelShape) -> None:
    assert shape.weights == 494_032_768  # of Qwen2.5-0.5B; its output layer shares the embeddings
    assert shape.linear_weights == 24 * (2 * 896 * 896 + 2 * 896 * 128 + 3 * 896 * 4864)
    assert LoraShape().adapter_weights(shape) == 24 * 8 * (2 * (896 + 896) + 2 * (896 + 128))
    assert LoraShape(layers="last:2").adapter_weights(shape) == 2 * 8 * (2 * (896 + 896) + 2 * (896 + 128))
    assert LoraShape(layers="last:2").first_layer(shape) == 22
    assert shape.base_bytes("bfloat16") == 2 * shape.weights + 4 * 3 * 896
    assert shape.base_bytes("bfloat16", "nf4") < shape.base_bytes("bfloat16", "int8") < shape.base_bytes("bfloat16")


def test_experts_and_linear_attention_are_said_to_be_estimates() -> None:
    sizes = {"vocab_size": 300, "num_hidden_layers": 2, "num_experts": 4, "moe_intermediate_size": 16}
    moe = ModelShape.from_config(AutoConfig.for_model("qwen3_moe", pad_token_id=0, hidden_size=64, **sizes))
    assert moe.experts_per_token == 8
    assert memory_needs(moe, RUN).approximate == "activations of qwen3_moe are estimated"


def test_auto_computes_layers_anew_only_where_the_step_would_not_fit(shape: ModelShape) -> None:
    plain, checkpointed = (memory_needs(shape, replace(RUN, checkpointing=on)) for on in (False, True))
    assert checkpointed.peak < plain.peak
    ample, short, tiny = plain.peak, plain.peak - 1, checkpointed.peak - 1
    off, on, over = (choose_checkpointing(shape, RUN, "auto", free) for free in (ample, short, tiny))
    assert (off.checkpointing, on.checkpointing, over.checkpointing) == (False, True, True)
    figures = [f"{needed.peak / GB:.1f} GB" for needed in (plain, checkpointed)]
    assert off.notes == (
        f"gradient checkpointing is off: a step needs about {figures[0]} of {figures[0]} that are free",
    )
    said = f"gradient checkpointing is on: a step would need about {figures[0]} without it, {figures[1]} with it, "
    assert on.notes == (said + f"and {figures[0]} are free",)
    assert len(over.notes) == 2
    assert "memory may run out: the run needs about" in over.notes[1]
    assert "smaller training.batch_size, training.tokens_per_batch" in over.notes[1]
    assert over.notes[1].endswith("or model.quantization=nf4")


def test_the_user_decides_where_he_says_so_and_is_warned(shape: ModelShape) -> None:
    assert choose_checkpointing(shape, RUN, True, 10**13).checkpointing
    forced = choose_checkpointing(shape, RUN, False, 10**9)
    assert not forced.checkpointing
    assert forced.notes[0].endswith("or model.gradient_checkpointing=true")
    unknown = choose_checkpointing(shape, RUN, "auto", None)
    assert (unknown.checkpointing, unknown.notes) == (False, ())
