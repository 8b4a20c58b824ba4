"""The door to the engine: the reference gives the same losses, and needs no engine at all."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import ctxtrain
from ctxtrain import Config, TrainingPipeline, load_model
from ctxtrain.engine.reference import InferenceEngine, ReferenceNetwork, TrainingEngine
from tests.conftest import MakeConfig
from tests.helpers import learnable_rows

pytestmark = pytest.mark.slow


def losses(config: Config) -> list[float]:
    pipeline = TrainingPipeline(config)
    assert pipeline.run()
    lines = (json.loads(line) for line in pipeline.folder.metrics.path.read_text().splitlines())
    return [line["loss"] for line in lines if line["kind"] == "step"]


def test_the_reference_trains_to_the_same_losses(make_config: MakeConfig) -> None:
    """Without dropout: the engine draws one mask for adapters that read the same input, and PEFT one for each."""
    settings = ("lora.dropout=0", "training.learning_rate=1e-3")  # at 1e-2 rounding has grown to 4e-6 after 21 steps
    plain = losses(make_config("model.engine=reference", *settings, run="plain"))
    assert plain == pytest.approx(losses(make_config(*settings, run="fast")), abs=1e-6, rel=0)


def test_the_reference_is_plain_transformers_and_says_why(make_config: MakeConfig) -> None:
    pipeline = TrainingPipeline(make_config("model.engine=reference"))
    pipeline.load_data()
    pipeline.setup_model()
    assert type(pipeline.learner.engine) is TrainingEngine
    network = pipeline.learner.engine.network
    assert isinstance(network, ReferenceNetwork)
    assert network.model is pipeline.model
    assert pipeline.learner.engine.unsupported_reason == "model.engine is reference"


def test_the_reference_runs_from_rows_to_answers_where_the_engine_is_gone(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    package = Path(ctxtrain.__file__).parent
    shutil.copytree(package, tmp_path / "copy" / "ctxtrain", ignore=shutil.ignore_patterns("cpu", "__pycache__"))
    config, rows = make_config("model.engine=reference", "training.epochs=1"), learnable_rows(4, seed=7)
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    code = (
        "import json, sys; from ctxtrain import Config, TrainingPipeline, load_model\n"
        "assert TrainingPipeline(Config.load(sys.argv[1])).run()\n"
        "model = load_model(sys.argv[2], engine='reference')\n"
        "print(json.dumps(model.logits(json.loads(sys.argv[3])).tolist()))"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "config.yaml"), config.output_dir, json.dumps(rows)]
    done = subprocess.run(words, cwd=tmp_path / "copy", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    fast, plain = load_model(config.output_dir), load_model(config.output_dir, engine="reference")
    assert type(plain.engine) is InferenceEngine
    assert type(fast.engine) is not InferenceEngine
    assert np.array(json.loads(done.stdout.splitlines()[-1])) == pytest.approx(plain.logits(rows), abs=1e-6)
    assert fast.logits(rows) == pytest.approx(plain.logits(rows), abs=1e-5)


def test_without_onnx_runtime_answers_come_from_the_other_engine_and_say_so_once(
    make_config: MakeConfig, tmp_path: Path
) -> None:
    config = make_config("training.epochs=1")
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    code = (
        "import sys, importlib.util as util\n"
        "found = util.find_spec\n"
        "util.find_spec = lambda name, *rest: None if name == 'onnxruntime' else found(name, *rest)\n"
        "sys.modules['onnxruntime'] = sys.modules['onnx'] = None\n"
        "from ctxtrain import Config, TrainingPipeline, load_model\n"
        "assert TrainingPipeline(Config.load(sys.argv[1])).run()\n"
        "print(type(load_model(sys.argv[2]).engine.network).__name__)"
    )
    words = [sys.executable, "-c", code, str(tmp_path / "config.yaml"), config.output_dir]
    done = subprocess.run(words, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "MergedClassifier"
    assert done.stderr.count("pip install 'ctxtrain[onnx]'") == 1
