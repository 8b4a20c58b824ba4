"""The packed path of GPUs on a CPU and on the meta device: the same results, and no number read back."""

import inspect
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import PeftModel
from torch import Tensor, nn

from ctxtrain.engine.cpu import device_attention, dropout
from ctxtrain.engine.cpu.device_attention import DeviceBatch, select_kernel, varlen_attention
from ctxtrain.engine.cpu.layer_parts import ADAPTER
from ctxtrain.engine.cpu.rope_tables import rope_table
from ctxtrain.engine.cpu.training_model import FastClassifier, unsupported_reason
from ctxtrain.model import lora
from ctxtrain.model.agreement import engine_mismatch, make_probe
from ctxtrain.model.embedded import embedded_base
from ctxtrain.model.losses import focal_loss
from tests.engine.test_cpu_engine import ALL, LENGTHS, SETTINGS, assert_same, build, ragged, results
from tests.read_backs import counted_read_backs
from tests.tiny_models import build_tiny

META = torch.device("meta")


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("family", ["qwen2", "qwen3", "embedded"])
def test_blocks_give_the_logits_loss_and_every_gradient_of_plain_peft(
    family: str, setting: str, tmp_path: Path
) -> None:
    model = build(embedded_base() if family == "embedded" else build_tiny(tmp_path, family), **SETTINGS[setting])
    assert model.config.num_attention_heads > model.config.num_key_value_heads
    blocks = FastClassifier(model, "blocks")
    for ids_BT in (ragged(), ragged((3, 2)), ragged((40, 40, 40)), ragged((80, 150, 1, 97, 2, 81))):
        assert_same(results(model, blocks, ids_BT), results(model, model, ids_BT))


@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_blocks_in_bfloat16_are_as_close_as_the_cpus_own_attention(family: str, tmp_path: Path) -> None:
    folder, ids_BT = build_tiny(tmp_path, family), ragged((90, 41, 7))
    model = build(folder, torch.bfloat16, target_modules=ALL)
    exact = build(folder, target_modules=ALL)
    with torch.no_grad():
        for weight, rounded in zip(exact.parameters(), model.parameters(), strict=True):
            weight.copy_(rounded)
    truth = results(exact, exact, ids_BT)
    errors = []
    for kernel in (None, "blocks"):
        found = results(model, FastClassifier(model, kernel), ids_BT)
        assert all(found[2][name].dtype == torch.float32 for name in found[2])
        errors.append([float((found[2][name] - grad).norm() / grad.norm()) for name, grad in truth[2].items()])
        torch.testing.assert_close(found[0], truth[0], atol=0.05, rtol=0.05)
    assert max(errors[1]) < 0.1
    assert np.mean(errors[1]) < 1.5 * np.mean(errors[0])


def test_masks_of_a_device_depend_on_the_seed_alone_and_have_the_right_share() -> None:
    def draw(seed: int) -> Tensor:
        return dropout._draw_on_device(seed, (300, 400), 0.3, torch.float32, torch.device("cpu"))

    torch.manual_seed(0)
    first = draw(5)
    torch.manual_seed(1)
    assert torch.equal(draw(5), first)
    assert not torch.equal(draw(6), first)
    assert set(first.unique().tolist()) == {0, 1}
    assert 1 - float(first.mean()) == pytest.approx(0.3, abs=5 * (0.3 * 0.7 / first.numel()) ** 0.5)
    torch.manual_seed(0)
    masks = dropout.DropoutMasks(META)
    seeds = [masks.draw((2, 2), 0.3, torch.float32)[1].args[0] for _ in range(2)]  # type: ignore[attr-defined]
    assert seeds[0] != seeds[1]


def test_the_probe_accepts_blocks_and_names_another_result(tmp_path: Path) -> None:
    model = build(build_tiny(tmp_path, "qwen3"))
    blocks = FastClassifier(model, "blocks")
    assert engine_mismatch(model, blocks, make_probe(model)) is None
    wrong = FastClassifier(model, "blocks")
    wrong.register_forward_hook(lambda _module, _inputs, output: setattr(output, "logits", output.logits * 1.01))
    assert "its logits on two rows differ" in str(engine_mismatch(model, wrong, make_probe(model)))


def meta_model(folder: Path, dtype: torch.dtype, **settings: Any) -> tuple[PeftModel, FastClassifier]:
    model = build(folder, dtype, **settings).to(META)
    return model, FastClassifier(model)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("setting", ["attention", "last:1", "all, rank 3"])
@pytest.mark.parametrize("family", ["qwen2", "qwen3"])
def test_forward_and_backward_need_no_number_of_the_device(
    family: str, setting: str, dtype: torch.dtype, tmp_path: Path
) -> None:
    """Tensors of the meta device have no numbers: whatever reads one raises."""
    model, network = meta_model(build_tiny(tmp_path, family), dtype, **SETTINGS[setting], dropout=0.1)
    assert unsupported_reason(model, META) is None
    assert network.kernel == "blocks"
    ids_BT = torch.empty(len(LENGTHS), max(LENGTHS), dtype=torch.int64, device=META)
    logits_BC = network(ids_BT, lengths=LENGTHS).logits
    assert logits_BC.shape == (len(LENGTHS), 3)
    labels_B = torch.empty(len(LENGTHS), dtype=torch.int64, device=META)
    loss, _ = focal_loss(logits_BC, labels_B, 2.0, torch.empty(3, device=META))
    loss.backward()
    grads = [weight.grad for weight in lora.trainable_parameters(model).values()]
    assert all(grad is not None and grad.device == META and grad.dtype == torch.float32 for grad in grads)
    with pytest.raises(RuntimeError, match="meta"):
        float(loss)


def test_varlen_gets_where_the_windows_begin_and_how_long_the_longest_is() -> None:
    torch.manual_seed(0)
    rope_TC = torch.polar(torch.ones(8, 4), torch.rand(8, 4))
    batch = DeviceBatch.from_lengths([3, 8, 1], "varlen", rope_TC)
    arguments = batch.varlen_arguments()
    assert arguments["cu_seq_q"].tolist() == arguments["cu_seq_k"].tolist() == [0, 3, 11, 12]
    assert arguments["cu_seq_q"].dtype == torch.int32
    assert (arguments["max_q"], arguments["max_k"]) == (8, 8)
    assert batch.blocks == []
    varlen = varlen_attention()
    assert varlen is not None
    given = {*arguments, *device_attention.VARLEN_ARGUMENTS}
    assert given <= inspect.signature(varlen).parameters.keys()


def test_varlen_runs_forward_and_backward_on_meta(tmp_path: Path) -> None:
    """torch has a fake kernel of varlen for meta tensors, so its arguments and shapes are checked here."""
    model = build(build_tiny(tmp_path, "qwen3"), torch.bfloat16).to(META)
    network = FastClassifier(model, "varlen")
    ids_BT = torch.empty(len(LENGTHS), max(LENGTHS), dtype=torch.int64, device=META)
    logits_BC = network(ids_BT, lengths=LENGTHS).logits
    logits_BC.sum().backward()
    assert all(weight.grad is not None for weight in lora.trainable_parameters(model).values())


@pytest.mark.parametrize(
    ("device", "dtype", "width"),
    [
        ("cpu", torch.bfloat16, 64),
        ("meta", torch.bfloat16, 64),
        ("cuda", torch.float32, 64),
        ("cuda", torch.bfloat16, 60),
    ],
)
def test_blocks_are_taken_where_no_varlen_kernel_fits(device: str, dtype: torch.dtype, width: int) -> None:
    assert select_kernel(torch.device(device), dtype, width) == "blocks"


def test_varlen_is_not_taken_where_torch_cannot_run_it() -> None:
    assert varlen_attention() is not None
    assert not device_attention.does_varlen_agree(torch.device("cpu"), torch.bfloat16, 64)


def test_windows_of_similar_length_share_a_block_and_padding_is_marked() -> None:
    rope_TC = torch.ones(100, 2, dtype=torch.complex64)
    batch = DeviceBatch.from_lengths([10, 100, 11, 90], "blocks", rope_TC, width=120)
    assert batch.blocks == [(2, 11), (2, 100)]
    assert int(batch.is_padding_M.sum()) == 1 + 10
    assert torch.equal(batch.row_M[batch.place_N], torch.arange(211))
    assert torch.equal(batch.all_row_M[batch.all_place_N], torch.arange(211))
    assert batch.token_N[[0, 9, 10, 109, 110]].tolist() == [0, 9, 120, 219, 240]
    assert batch.last_B.tolist() == [9, 109, 120, 210]


def test_the_table_of_rotations_is_that_of_the_model(tmp_path: Path) -> None:
    rotary = build(build_tiny(tmp_path)).get_base_model().model.rotary_emb
    cosines, sines = rotary(torch.zeros(1), torch.arange(300)[None])
    table_TC = rope_table(rotary, 300)
    torch.testing.assert_close(table_TC.real, cosines[0, :, :4], atol=1e-6, rtol=0)
    torch.testing.assert_close(table_TC.imag, sines[0, :, :4], atol=1e-6, rtol=0)


@pytest.mark.parametrize("kernel", [None, "blocks"])
def test_a_pass_with_known_lengths_reads_nothing_back(kernel: Any, tmp_path: Path) -> None:
    model = build(build_tiny(tmp_path, "qwen3"), dropout=0.1)
    network: nn.Module = FastClassifier(model, kernel)
    ids_BT = ragged()
    network(ids_BT, lengths=LENGTHS)
    with counted_read_backs() as found:
        network(ids_BT, lengths=LENGTHS).logits.sum().backward()
    assert found == {}
    assert model.get_base_model().score.modules_to_save[ADAPTER].weight.grad is not None
