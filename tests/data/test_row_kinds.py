"""Every kind of row is trained on, exported, predicted and served by one code: whole runs."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import orjson
import pytest

from ctxtrain import TrainingPipeline, load_model
from ctxtrain.cli.process import main
from ctxtrain.serve.bodies import parse_one
from ctxtrain.serve.schema import row_schemas
from ctxtrain.serve.service import warm_up_window
from tests.conftest import MakeConfig
from tests.data.test_feature_rows import feature_row
from tests.data.test_own_fields import OWN, own_row
from tests.helpers import Row, bars_of, learnable_rows, write_rows

pytestmark = pytest.mark.slow

LABELS = ("LONG", "SHORT", "SKIP")


def without_volume(seed: int) -> Row:
    (row,) = learnable_rows(1, seed, bars=20)
    for bar in bars_of(row):
        bar["volume"] = None
    return row


def request_of_a_strategy(seed: int) -> Row:
    """A window as a strategy posts it: short names, structure under other names, features of every type."""
    (row,) = learnable_rows(1, seed)
    names = {"open": "o", "high": "h", "low": "l", "close": "c", "time": "time_utc"}
    for n, bar in enumerate(bars_of(row)):
        for name, short in names.items():
            bar[short] = bar.pop(name)
        del bar["bar_index"]
        bar |= {"ext_dir": 1, "int_dir": -1, "has_fvg_bull": n % 4 == 0, "has_fvg_bear": False, "atr": 2.5}
        bar |= {"has_ob_bull": True, "has_ob_bear": False}
    row["features"] = {
        "fvg_quality_score": 0.1 * (seed % 7),
        "fvg_retest_type": ("edge", "deep", "no_touch")[seed % 3],
        "mgann_leg_index": seed % 4,
        "pb_wave_strength_ok": seed % 2 == 0,
        "confluence_score": None,
    }
    row["metadata"] = {"symbol": "GC", "timeframe": "M1", "session": "London", "request_time": "2025-11-24T10:30:00Z"}
    return row


KINDS: dict[str, tuple[Callable[[int], Row], dict[str, Any]]] = {
    "features without bars": (feature_row, {}),
    "declared fields": (own_row, dict(OWN)),
    "a request with short names": (request_of_a_strategy, {}),
    "20 bars without volume": (without_volume, {}),
    "120 bars": (lambda seed: learnable_rows(1, seed, bars=120)[0], {}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_a_kind_of_row_is_trained_on_and_its_zip_predicts_and_warms_up(
    kind: str, make_config: MakeConfig, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    make, fields = KINDS[kind]
    rows = [make(seed) | {"id": f"r{seed}", "label": LABELS[seed % 3]} for seed in range(30)]
    files = {
        name: write_rows(tmp_path / f"{name}.jsonl", part) for name, part in (("train", rows[:21]), ("val", rows[21:]))
    }
    config = make_config(
        *(f"data.{name}={path}" for name, path in files.items()),
        "data.test=null",
        f"data.fields={json.dumps(fields)}",
        "training.epochs=1",
        "training.warmup_steps=0",
    )
    summary = TrainingPipeline(config).run()
    assert summary is not None
    model = Path(config.output_dir) / "final_model.zip"
    predictor = load_model(model)
    expected = predictor.predict(rows[21:])
    capfd.readouterr()
    with pytest.raises(SystemExit, match="0"):
        main(["predict", str(model), str(files["val"])])
    predicted = [json.loads(line) for line in capfd.readouterr().out.splitlines()]
    assert [line["id"] for line in predicted] == [f"r{seed}" for seed in range(21, 30)]
    assert [line["probabilities"] for line in predicted] == [
        pytest.approx(line["probabilities"], abs=1e-6) for line in expected
    ]
    assert len(predictor.predict_windows([warm_up_window(predictor.codec)])) == 1
    labels = [LABELS.index(row["label"]) for row in rows[21:]]
    hits = [LABELS.index(line["label"]) == label for line, label in zip(expected, labels, strict=True)]
    assert predictor.evaluate(rows[21:])["accuracy"] == pytest.approx(sum(hits) / len(hits))
    served = [window for row in rows[21:] for window in parse_one(orjson.dumps(row), predictor.codec)]
    assert predictor.predict_windows(served) == predictor.predict(rows[21:])
    assert row_schemas(predictor.codec)["Row"]["properties"]
