"""`model.dtype: auto`: measured once, narrow bases in float32, and never another precision within a run."""

import io
import signal
import time
from typing import Any

import pytest
import torch
from rich.console import Console
from torch.overrides import TorchFunctionMode
from transformers import AutoConfig

from ctxtrain.config.schema import Config
from ctxtrain.data.dataset import Inputs
from ctxtrain.errors import ConfigError, Interrupted
from ctxtrain.model import precision
from ctxtrain.model.embedded import embedded_base
from ctxtrain.model.precision import bfloat16_speedup, choose_precision
from ctxtrain.progress import Reporter
from ctxtrain.storage import checkpoint
from ctxtrain.train import TrainingPipeline
from ctxtrain.training.inputs import window_files
from tests.conftest import MakeConfig
from tests.storage.test_resume import Signaller


def config_of(width: int) -> Any:
    return AutoConfig.for_model("qwen2", hidden_size=width, intermediate_size=2 * width)


def test_the_measurement_is_made_once_and_takes_milliseconds() -> None:
    bfloat16_speedup.cache_clear()
    start = time.perf_counter()
    first = bfloat16_speedup(512, 1024)
    assert time.perf_counter() - start < 5
    assert 0.01 < first < 100
    assert bfloat16_speedup(512, 1024) == first
    assert bfloat16_speedup.cache_info().misses == 1


class Products(TorchFunctionMode):
    """Records the dtype of each product."""

    def __init__(self) -> None:
        super().__init__()
        self.dtypes: list[torch.dtype] = []

    def __torch_function__(self, function: Any, _: Any, args: Any = (), kwargs: Any = None) -> Any:
        if function is torch.nn.functional.linear:
            self.dtypes.append(args[0].dtype)
        return function(*args, **(kwargs or {}))


def test_the_tries_alternate_and_the_choice_follows_the_figure_that_is_said() -> None:
    bfloat16_speedup.cache_clear()
    with Products() as made:
        choice = choose_precision("auto", config_of(768), None)
    speedup = bfloat16_speedup(768, 1024)
    tries = len(made.dtypes) // 2 - 1
    assert made.dtypes == [torch.float32, torch.bfloat16] * (1 + tries)
    assert tries == (2 if speedup < 1 else precision.MAX_TRIES)
    assert choice.dtype == (torch.bfloat16 if speedup >= 1.5 else torch.float32)
    assert choice.line.endswith(f": this CPU multiplies bfloat16 {speedup:.1f} times as fast as float32")


def test_a_narrow_base_trains_in_float32_on_a_cpu_and_is_not_measured() -> None:
    bfloat16_speedup.cache_clear()
    choice = choose_precision("auto", AutoConfig.from_pretrained(embedded_base()), None)
    assert choice.dtype == torch.float32
    assert " wide, below 512, gains too little from bfloat16 on a CPU" in choice.line
    assert choose_precision("auto", config_of(511), None).dtype == torch.float32
    assert bfloat16_speedup.cache_info().misses == 0


def test_a_dtype_that_the_user_names_is_taken_without_a_word() -> None:
    for name in ("float32", "bfloat16"):
        assert choose_precision(name, config_of(64), "torch.float32") == precision.Precision(getattr(torch, name))


def interrupted(config: Config) -> None:
    with pytest.raises(Interrupted):
        TrainingPipeline(config, reporter=Signaller(2, signal.SIGTERM)).run()


def test_a_resume_keeps_the_precision_in_which_the_run_began(make_config: MakeConfig) -> None:
    interrupted(make_config("model.dtype=bfloat16"))
    said = io.StringIO()
    resumed = TrainingPipeline(
        make_config("model.dtype=auto"), resume=True, reporter=Reporter(Console(file=said, width=400))
    )
    with resumed._open_run():
        assert resumed.dtype == torch.bfloat16
        assert resumed.model is not None
        assert resumed.model.get_input_embeddings().weight.dtype == torch.bfloat16
        assert resumed.state.step == 2
        resumed.save_checkpoint()
    note = "note: training in bfloat16, in which the run began; a new run would take float32: a base 32 wide"
    assert said.getvalue().count(note) == 1
    stored = [checkpoint.load(path)["fingerprint"]["dtype"] for path, _, _ in resumed.checkpoints.files()]
    assert stored == ["torch.bfloat16"]
    with pytest.raises(ConfigError, match=r"dtype: 'torch.bfloat16' → 'torch.float32'"):
        TrainingPipeline(make_config("model.dtype=float32"), resume=True).run()


def test_one_of_several_runs_takes_the_precision_of_the_others(make_config: MakeConfig) -> None:
    interrupted(make_config("model.dtype=bfloat16", run="seed_0"))
    config = make_config("model.dtype=auto", run="seed_1")
    for inputs, dtype in ((Inputs(window_files(config)), torch.bfloat16), (None, torch.float32)):
        pipeline = TrainingPipeline(config, inputs=inputs)
        pipeline.load_data()
        pipeline.setup_model()
        assert pipeline.dtype == dtype
