"""The config: defaults, types, ranges, overrides, and the words with which a fault is refused."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from pydantic import BaseModel, ValidationError

from ctxtrain.config.schema import KEYS, Config
from ctxtrain.config.strict_yaml import parse_yaml
from ctxtrain.errors import ConfigError
from ctxtrain.pretraining.run import PretrainConfig

REPOSITORY = Path(__file__).parents[2]


def smallest() -> dict[str, Any]:
    return {"data": {"train": "train.jsonl", "val": "val.jsonl"}, "output_dir": "runs/a"}


def with_overrides(*overrides: str) -> Config:
    return Config.parse(smallest(), overrides)


def faults(*overrides: str, tree: object = None) -> list[str]:
    with pytest.raises(ConfigError) as caught:
        Config.parse(smallest() if tree is None else tree, overrides)
    return caught.value.faults


def value(key: str, override: str) -> object:
    section, _, name = key.partition(".")
    return getattr(getattr(with_overrides(f"{key}={override}"), section), name)


def test_defaults_are_those_of_the_specification() -> None:
    assert Config.parse(smallest()).model_dump() == {
        "data": {
            "train": "train.jsonl", "val": "val.jsonl", "test": None, "codec": "compact", "purge": "auto",
            "embargo": "auto", "label_horizon": None, "allow_leakage": False, "cache": "auto", "fields": {},
        },
        "model": {
            "base": "embedded", "revision": None, "max_tokens": 2048, "dtype": "auto", "engine": "auto",
            "quantization": "none", "gradient_checkpointing": "auto",
        },
        "lora": {
            "r": 8, "alpha": 16, "dropout": 0.05, "target_modules": ["q_proj", "k_proj", "v_proj", "o_proj"],
            "layers": "all",
        },
        "loss": {"focal_gamma": 2.0, "class_weights": "auto"},
        "oversampling": {"target": "auto", "max_repeat": None},
        "training": {
            "epochs": 10, "batch_size": 8, "learning_rate": 1e-4, "warmup_steps": 100, "weight_decay": 0.01,
            "gradient_accumulation": 4, "tokens_per_batch": None, "max_grad_norm": 1.0,
            "schedule": "warmup_stable_decay",
            "skip_nonfinite": 0, "patience": None, "seed": 0, "seeds": None,
        },
        "checkpoints": {"keep": 3, "every_steps": None, "average": 1},
        "augmentation": {"mirror": False, "crop": False},
        "calibration": {"method": "temperature"},
        "export": {"dtype": "float32", "check_device": "auto"},
        "targets": {
            "accuracy": 0.65, "macro_f1": 0.60, "long_precision": 0.60, "short_precision": 0.60,
            "long_recall": 0.55, "short_recall": 0.55,
        },
        "evaluation": {"folds": None, "fold": None, "learning_curve": None},
        "tracking": {"to": []},
        "output_dir": "runs/a",
    }  # fmt: skip


def test_every_key_is_described() -> None:
    def undescribed(model: type[BaseModel]) -> list[str]:
        names = []
        for name, field in model.model_fields.items():
            if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel):
                names += undescribed(field.annotation) + ([] if field.annotation.__doc__ else [name])
            elif not field.description:
                names.append(name)
        return names

    assert undescribed(Config) == []


def test_all_faults_come_in_one_error() -> None:
    tree = smallest() | {"training": {"epochs": 0, "epoch": 3}, "lora": {"dropout": 1}, "output_dir": 4}
    found = faults("loss.focal_gamma=-1", "wrong", tree=tree)
    assert len(found) == 6
    for part in ("training.epochs ", "training.epoch ", "lora.dropout", "output_dir", "loss.focal_gamma", "'wrong'"):
        assert sum(part in fault for fault in found) == 1, part


@pytest.mark.parametrize(
    ("key", "nearest"),
    [
        ("epochs", "training.epochs"),
        ("training.epoch", "training.epochs"),
        ("trainig.epochs", "training"),
        ("trainig", "training"),
        ("model.r", "lora.r"),
        ("training.keep", "checkpoints.keep"),
        ("training.focal_gama", "loss.focal_gamma"),
        ("data.tset", "data.test"),
        ("output_dir.name", "output_dir"),
    ],
)
def test_an_unknown_key_is_refused_with_the_nearest_name(key: str, nearest: str) -> None:
    assert any(fault.endswith(f"did you mean {nearest}?") for fault in faults(f"{key}=1"))
    section, _, name = key.rpartition(".")
    if section != "output_dir":
        tree = smallest()
        (tree.setdefault(section, {}) if section else tree)[name] = 1
        assert any(fault.endswith(f"did you mean {nearest}?") for fault in faults(tree=tree))


def test_a_key_like_no_other_is_refused_with_the_list_of_keys() -> None:
    assert faults("zzz=1") == ["zzz is not a config key; the keys are listed in configs/config.schema.json."]
    assert faults(tree=smallest() | {"loss": {7: 1}}) == [
        "loss.7 is not a config key; the keys are listed in configs/config.schema.json."
    ]


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("training.epochs=many", 'training.epochs must be a valid integer, got "many".'),
        ("training.epochs='3'", 'training.epochs must be a valid integer, got "3".'),
        ("training.epochs=true", "training.epochs must be a valid integer, got true."),
        ("training.epochs=2.5", "training.epochs must be a valid integer, got 2.5."),
        ("training.epochs=null", "training.epochs must be a valid integer, got null."),
        ("training.learning_rate=fast", 'training.learning_rate must be a valid number, got "fast".'),
        ("training.learning_rate=true", "training.learning_rate must be a valid number, got true."),
        ("training.learning_rate=.nan", "training.learning_rate must be a finite number, got NaN."),
        ("training.learning_rate=-1e-4", "training.learning_rate must be greater than 0, got -0.0001."),
        ("training.learning_rate=0", "training.learning_rate must be greater than 0, got 0."),
        ("training.seed=-1", "training.seed must be greater than or equal to 0, got -1."),
        ("lora.r=0", "lora.r must be greater than or equal to 1, got 0."),
        ("lora.dropout=1.0", "lora.dropout must be less than 1, got 1.0."),
        ("lora.target_modules=[]", "lora.target_modules must have at least 1 item, got []."),
        ("lora.target_modules=q_proj", 'lora.target_modules must be a valid list, got "q_proj".'),
        ("oversampling.max_repeat=.inf", "oversampling.max_repeat must be a finite number, got Infinity."),
        ("oversampling.max_repeat=0.5", "oversampling.max_repeat must be greater than or equal to 1, got 0.5."),
        ("targets.accuracy=65", "targets.accuracy must be less than or equal to 1, got 65."),
        ("data.train=''", 'data.train must have at least 1 character, got "".'),
        ("data.codec=xml", "data.codec must be 'compact' or 'json', got \"xml\"."),
        ("tracking.to=[slack]", "tracking.to.0 must be 'tensorboard', 'mlflow' or 'wandb', got \"slack\"."),
        (
            "evaluation.learning_curve=[300, 100]",
            "evaluation.learning_curve must be numbers that ascend strictly, for example [100, 300], got [300, 100].",
        ),
        ("evaluation.learning_curve=[9]", "evaluation.learning_curve.0 must be greater than or equal to 10, got 9."),
        ("evaluation.learning_curve=[50.5]", "evaluation.learning_curve.0 must be a valid integer, got 50.5."),
        ("evaluation.learning_curve=[]", "evaluation.learning_curve must have at least 1 item, got []."),
        ("evaluation.learning_curve=100", "evaluation.learning_curve must be a valid list, got 100."),
        ("training=3", "training must be a section with keys, got 3."),
    ],
)
def test_a_value_is_refused_with_rule_and_value(override: str, message: str) -> None:
    assert faults(override) == [message]


def test_required_keys_are_named() -> None:
    needed = [
        f"{key} is required. Set it in the config or as an override: {key}=…" for key in ("data.train", "data.val")
    ]
    assert faults(tree={"data": None, "output_dir": "runs/a"}) == needed
    folder = "output_dir is required. Set it in the config or as an override: output_dir=…"
    assert faults(tree={}) == [folder, *needed]
    alone = Config.parse({"data": {"train": "train.jsonl"}, "evaluation": {"folds": 3}, "output_dir": "runs/a"})
    assert alone.data.val is None
    assert faults(tree=["a"]) == ['A config must be a mapping of sections, got ["a"].']


def test_an_embargo_that_would_drop_nothing_is_refused() -> None:
    for other in ("data.purge=auto", "evaluation.folds=2"):
        (fault,) = faults("data.embargo=5", "data.purge=false", *([] if "auto" in other else [other]))
        assert fault.startswith("data.embargo needs purging, but data.purge is false.")
        assert with_overrides("data.embargo=5", other).data.embargo == 5


def test_purging_takes_auto_or_a_switch_and_an_embargo_auto_or_a_number_of_bars() -> None:
    assert value("data.purge", "true") is True
    assert value("data.embargo", "12") == 12
    assert faults("data.purge=1") == ["data.purge must be auto, true or false, got 1."]
    rule = "data.embargo must be auto, or a number of bars, at least 0 and at most 10,000,000"
    for given, shown in (("-1", "-1"), ("true", "true"), ("null", "null"), ("1.5", "1.5")):
        assert faults(f"data.embargo={given}") == [f"{rule}, got {shown}."]


@pytest.mark.parametrize(
    ("key", "written", "meant"),
    [
        ("training.learning_rate", "1e-4", 1e-4),
        ("training.learning_rate", "1.0E-4", 1e-4),
        ("training.max_grad_norm", "null", None),
        ("training.max_grad_norm", "2", 2.0),
        ("training.epochs", "3", 3),
        ("data.test", "test.jsonl", "test.jsonl"),
        ("data.test", "a=b.jsonl", "a=b.jsonl"),
        ("lora.target_modules", "[q_proj, v_proj]", ["q_proj", "v_proj"]),
        ("loss.class_weights", "{LONG: 1, SHORT: 2, SKIP: 0.5}", [1.0, 2.0, 0.5]),
        ("loss.class_weights", "{skip: 3, Long: 1, short: 2}", [1.0, 2.0, 3.0]),
        ("loss.class_weights", "[1, 2, 3.5]", [1.0, 2.0, 3.5]),
        ("loss.class_weights", "none", "none"),
        ("oversampling.target", "none", "none"),
        ("oversampling.target", "400", 400),
        ("lora.layers", "last:6", "last:6"),
        ("lora.layers", "all", "all"),
    ],
)
def test_an_override_is_typed_by_the_schema(key: str, written: str, meant: object) -> None:
    found = value(key, written)
    assert found == meant
    assert type(found) is type(meant)


@pytest.mark.parametrize(
    "weights",
    [
        *("null", "balanced", "1.0", "[1, 2]", "[1, 2, 0]", "[1, 2, -3]", "[1, 2, true]", "[1, 2, .inf]"),
        *("{LONG: 1, SHORT: 2}", "{LONG: 1, SHORT: 2, HOLD: 3}", "{LONG: 1, long: 2, SHORT: 1, SKIP: 1}"),
    ],
)
def test_class_weights_are_three_positive_numbers_or_a_word(weights: str) -> None:
    (fault,) = faults(f"loss.class_weights={weights}")
    assert fault.startswith("loss.class_weights must ")


@pytest.mark.parametrize("target", ["null", "0", "-4", "2.5", "true", "max", "[400]"])
def test_the_oversampling_target_is_a_count_or_a_word(target: str) -> None:
    (fault,) = faults(f"oversampling.target={target}")
    rule = "a number of windows per class, at least 1 and at most 10,000,000"
    assert fault.startswith(f"oversampling.target must be auto, none, or {rule}, got ")


@pytest.mark.parametrize("layers", ["last:0", "last:", "last:-1", "first:3", "last:2x", "6", "null"])
def test_lora_layers_are_all_or_the_last_ones(layers: str) -> None:
    (fault,) = faults(f"lora.layers={layers}")
    assert fault.startswith("lora.layers must be all or last:N with N at least 1, for example last:6, got ")


@pytest.mark.parametrize("override", ["training.epochs", "=3", "", "--epochs"])
def test_an_override_without_key_or_value_is_refused(override: str) -> None:
    assert faults(override) == [f"An override must have the form section.key=value, got {override!r}."]


def test_an_override_that_is_no_yaml_is_refused_with_its_key() -> None:
    (fault,) = faults("lora.target_modules=[q_proj")
    assert fault.startswith("lora.target_modules:1:8: not valid YAML: ")


@pytest.mark.parametrize("value", ["9" * 4400, "!!int x", "!!float x", "[" * 3000, "!!binary x"])
def test_a_scalar_that_is_no_value_is_refused_with_its_key(value: str) -> None:
    (fault,) = faults(f"training.seed={value}")
    assert fault.startswith("training.seed")


@pytest.mark.parametrize(
    "text", ["2025-13-01", "2025-01-02", "1:30", "0x10", "0x_", "1_000", "1e-3x", "1e-4", "010", "12", "-.5"]
)
def test_numbers_are_those_of_yaml_1_2_and_a_folder_of_any_name_is_written_as_text(text: str, tmp_path: Path) -> None:
    numbers = {"1e-4": 1e-4, "010": 10, "12": 12, "-.5": -0.5}
    assert parse_yaml(text, "x") == numbers.get(text, text)
    config = Config.parse(smallest() | {"output_dir": text})
    (tmp_path / "config.yaml").write_text(config.to_yaml())
    assert Config.load(tmp_path / "config.yaml") == config
    assert yaml.safe_load(config.to_yaml())["output_dir"] == text


def test_a_mapping_that_holds_itself_is_refused(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("data: &d {train: x, val: *d}\noutput_dir: y\n")
    with pytest.raises(ConfigError, match=r"^data\.val must be a valid string, got"):
        Config.load(tmp_path / "config.yaml")


@pytest.mark.parametrize(
    ("override", "rule"),
    [
        ("oversampling.target=10000001", "at least 1 and at most 10,000,000"),
        ("oversampling.target=1000000000000000000", "at least 1 and at most 10,000,000"),
        (f"loss.class_weights=[{'9' * 400},1,1]", "three numbers from 0.000001 to 1,000,000"),
        ("loss.class_weights=[1e10,1,1]", "three numbers from 0.000001 to 1,000,000"),
        ("loss.class_weights=[1e-320,1,1]", "three numbers from 0.000001 to 1,000,000"),
        ("loss.class_weights={LONG: 1, SHORT: 1, SKIP: 1e-7}", "three numbers from 0.000001 to 1,000,000"),
        ("training.learning_rate=1e-320", "must be at least 1e-12"),
        ("training.max_grad_norm=1e-320", "must be at least 1e-09"),
        ("training.max_grad_norm=1e300", "must be less than or equal to 1000000000"),
        ("lora.layers=last:99999", "N at most 9999"),
    ],
)
def test_a_number_that_no_run_can_use_is_refused(override: str, rule: str) -> None:
    (fault,) = faults(override)
    assert fault.startswith(override.partition("=")[0])
    assert rule in fault


def numbers_of(schema: dict[str, Any], entry: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Every number and list of numbers in a part of a schema, with its bounds."""
    if "$ref" in entry:
        entry = schema["$defs"][entry["$ref"].rpartition("/")[2]]
    if entry.get("type") in ("integer", "number"):
        yield entry
    inner = [*entry.get("anyOf", []), *entry.get("properties", {}).values()]
    inner += [entry[name] for name in ("items", "additionalProperties") if isinstance(entry.get(name), dict)]
    for part in inner:
        yield from numbers_of(schema, part)


@pytest.mark.parametrize("model", [Config, PretrainConfig])
@pytest.mark.promise("D8")
def test_every_number_of_a_config_has_two_bounds_in_its_schema(model: type[BaseModel]) -> None:
    schema = model.model_json_schema()
    found = list(numbers_of(schema, schema))
    assert len(found) > 10
    for entry in found:
        assert {"minimum", "exclusiveMinimum"} & entry.keys(), entry
        assert {"maximum", "exclusiveMaximum"} & entry.keys(), entry


HUGE = ["1" + "0" * 18, "9" * 400, "-1" + "0" * 30]


@pytest.mark.parametrize("value", HUGE)
@pytest.mark.promise("D8")
def test_a_huge_number_is_refused_for_every_key_that_takes_one(value: str) -> None:
    keys = [
        f"{section}.{name}"
        for section, field in Config.model_fields.items()
        if isinstance(field.annotation, type) and issubclass(field.annotation, BaseModel)
        for name, inner in field.annotation.model_json_schema()["properties"].items()
        if any(numbers_of({}, inner)) and inner.get("type") != "array"
    ]
    assert len(keys) > 20
    for key in keys:
        given = f"{key}=[{value},1,1]" if key in ("loss.class_weights", "training.seeds") else f"{key}={value}"
        (fault,) = faults(given)
        assert fault.startswith(key), (given, fault)
        assert len(fault) < 300


def test_a_path_that_no_system_takes_is_refused() -> None:
    for key in ("data.train", "data.val", "data.test", "model.base", "output_dir"):
        (fault,) = faults(f'{key}="a\\0b"')
        assert fault == f'{key} must be a path without NUL characters, got "a\\u0000b".'
        (fault,) = faults(f'{key}="\\ud800"')
        assert fault.startswith(f"{key} must be a valid string, ")


def texts_of(schema: dict[str, Any], entry: dict[str, Any], key: str = "") -> Iterator[str]:
    """Every key of a schema that takes any text; one that takes a list of them ends in []."""
    if "$ref" in entry:
        entry = schema["$defs"][entry["$ref"].rpartition("/")[2]]
    if entry.get("type") == "string" and "enum" not in entry and "const" not in entry:
        yield key
    for part in entry.get("anyOf", []):
        yield from texts_of(schema, part, key)
    if isinstance(entry.get("items"), dict):
        yield from texts_of(schema, entry["items"], f"{key}[]")
    for name, part in entry.get("properties", {}).items():
        yield from texts_of(schema, part, f"{key}.{name}".lstrip("."))


@pytest.mark.parametrize("text", ["\ud800", "a\udfff", "a\0b"])
@pytest.mark.promise("D8")
def test_what_is_no_text_is_refused_for_every_key_that_takes_one(text: str) -> None:
    schema = Config.model_json_schema()
    keys = list(dict.fromkeys(texts_of(schema, schema)))
    assert {"model.revision", "lora.target_modules[]", "data.train", "output_dir"} <= set(keys)
    for key in keys:
        given = json.dumps([text] if key.endswith("[]") else text)
        (fault,) = faults(f"{key.removesuffix('[]')}={given}")
        assert fault.startswith(f"{key.removesuffix('[]')}"), (key, fault)
        assert " must be " in fault, (key, fault)
    schema = PretrainConfig.model_json_schema()
    for key in dict.fromkeys(texts_of(schema, schema)):
        with pytest.raises(ValidationError):
            PretrainConfig.model_validate(
                {"output_dir": "x"} | {key.removesuffix("[]"): [text] if "[" in key else text}
            )


def test_overrides_win_over_the_file_and_leave_the_callers_mapping_alone() -> None:
    tree = smallest() | {"training": {"epochs": 2, "batch_size": 4}}
    config = Config.parse(tree, ["training.epochs=5", "lora.r=4"])
    assert (config.training.epochs, config.training.batch_size, config.lora.r) == (5, 4, 4)
    assert tree == smallest() | {"training": {"epochs": 2, "batch_size": 4}}


def test_a_section_left_empty_has_its_defaults_and_takes_overrides(tmp_path: Path) -> None:
    path = tmp_path / "config.yaml"
    path.write_text("data: {train: a, val: b}\noutput_dir: c\ntraining:\nlora:\n")
    config = Config.load(path, ["training.epochs=5"])
    assert (config.training.epochs, config.lora.r) == (5, 8)


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("lora: {r: 8}\ntraining:\n  epochs: 3\n  seed: 1\n  epochs: 4\n", "5:3", "duplicate key 'epochs'"),
        ("lora: {r: 8}\nlora: {alpha: 3}\n", "2:1", "duplicate key 'lora'"),
        ("data:\n  train: [a\noutput_dir: b\n", "3:11", "expected ',' or ']'"),
        ("data:\n\ttrain: a\n", "2:1", "cannot start any token"),
        ("? [a]\n: b\n", "1:3", "unhashable key"),
        ("a: !!python/object/apply:os.getcwd []\n", "1:4", "could not determine a constructor"),
        ("a: !!timestamp b\n", "1:4", "no config key takes a date"),
    ],
)
def test_broken_yaml_is_refused_with_its_place(tmp_path: Path, text: str, place: str, reason: str) -> None:
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=rf"^{path}:{place}: not valid YAML: .*") as caught:
        Config.load(path)
    assert reason in str(caught.value)


def test_a_config_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    for name, fault in (("none.yaml", "no such config file"), ("", "a config must be a regular file, got a folder")):
        with pytest.raises(ConfigError, match=rf": {fault}\. Give the path of a YAML file\."):
            Config.load(tmp_path / name)
    (tmp_path / "latin.yaml").write_bytes(b"output_dir: caf\xe9\n")
    with pytest.raises(ConfigError, match=r"must be UTF-8 text, got .* at byte 15\."):
        Config.load(tmp_path / "latin.yaml")


def test_a_config_is_frozen() -> None:
    config = Config.parse(smallest())
    with pytest.raises(ValidationError, match="frozen"):
        config.training.epochs = 3  # type: ignore[misc]  # the checker says the same
    with pytest.raises(ValidationError, match="frozen"):
        config.output_dir = "b"  # type: ignore[misc]


def test_the_written_yaml_reads_back_as_the_same_config(tmp_path: Path) -> None:
    config = with_overrides("loss.class_weights=[1, 2, 3]", "training.learning_rate=3e-5", "data.train=é/no.jsonl")
    path = tmp_path / "config.yaml"
    path.write_text(config.to_yaml(), encoding="utf-8")
    assert Config.load(path) == config
    assert yaml.safe_load(config.to_yaml()) == config.model_dump()


def test_absolute_paths_replace_relative_ones_and_hub_ids_stay(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "base").mkdir()
    config = with_overrides("model.base=base").with_absolute_paths()
    assert config.data.train == str(tmp_path / "train.jsonl")
    assert config.data.test is None
    assert config.model.base == str(tmp_path / "base")
    assert config.output_dir == str(tmp_path / "runs" / "a")
    assert with_overrides("model.base=Qwen/Qwen3-0.6B").with_absolute_paths().model.base == "Qwen/Qwen3-0.6B"


def test_the_json_schema_has_every_section() -> None:
    assert Config.model_json_schema()["properties"].keys() == {key for key in KEYS if "." not in key}


def test_the_demo_config_loads() -> None:
    config = Config.load(REPOSITORY / "configs" / "demo.yaml")
    assert config.data.train == "data/sample/train.jsonl"
    assert config.output_dir == "runs/demo"
