"""A rule that reproduces the labels is found and printed; a majority class, a noisy rule and a passing one are not."""

import json
import re
from collections.abc import Callable
from copy import deepcopy
from functools import cache
from pathlib import Path

import numpy as np
import pytest
from sklearn.tree import DecisionTreeClassifier

from ctxtrain.cli.process import main
from ctxtrain.data.check import check_files
from ctxtrain.data.dataset import Inputs, load_dataset
from ctxtrain.data.label_rule import LabelRule, describe_tree, find_label_rule
from ctxtrain.data.profile import survey
from ctxtrain.data.window_file import WindowFile
from ctxtrain.model.tokenizer import load_tokenizer
from ctxtrain.synthetic.sample import write_sample
from tests.helpers import Row, bars_of, make_row, write_rows

Bar = Row
Label = Callable[[Bar], str]
CONDITION = re.compile(r"(?:(\S+) ([<≤]) )?(.+?) ([=<>≤≥]) (\S+)")


def by_flags(bar: Bar) -> str:
    """The direction of the structure, if the pull-back is weak."""
    return {1: "LONG", -1: "SHORT"}.get(bar["ext_dir"], "SKIP") if bar["pb_wave_strength_ok"] else "SKIP"


def by_levels(bar: Bar) -> str:
    return "LONG" if bar["wave_strength"] >= 60 and bar["delta"] < 12 else "SKIP"


def by_body(bar: Bar) -> str:
    return "LONG" if bar["close"] > bar["open"] else "SHORT"


RULES: dict[str, Label] = {"flags": by_flags, "levels": by_levels, "body": by_body}


@cache
def unlabelled(seed: int) -> list[Row]:
    return [make_row(bars=20, seed=seed * 100_000 + n, place=False) for n in range(700)]


def make_rows(count: int, seed: int, label: Label) -> list[Row]:
    """Rows with other labels; the bars of rows with the same seed are the same objects."""
    return [row | {"label": label(row["current_bar"])} for row in unlabelled(seed)[:count]]


def found(folder: Path, **files: list[Row]) -> LabelRule | None:
    paths = {name: write_rows(folder / f"{name}.jsonl", rows) for name, rows in files.items()}
    return find_label_rule({name: survey(WindowFile(path))[0] for name, path in paths.items()})


def follow(lines: list[str], values: dict[str, float]) -> str:
    """The answer of printed rules, read as a person reads them."""
    for line in lines[:-1]:
        conditions, label = line.removeprefix("if ").split(" then ")
        if all(holds(condition, values) for condition in conditions.split(" and ")):
            return label
    return lines[-1].removeprefix("else ")


def holds(condition: str, values: dict[str, float]) -> bool:
    match = CONDITION.fullmatch(condition)
    assert match, condition
    low, low_sign, name, sign, bound = match.groups()
    value, number = values[name], float(bound.replace(",", ""))
    above = low is None or (float(low) < value if low_sign == "<" else float(low) <= value)
    signs = {"=": value == number, "<": value < number, ">": value > number, "≤": value <= number, "≥": value >= number}
    return above and signs[sign]


@pytest.mark.parametrize("name", RULES)
def test_a_rule_is_found_and_its_lines_reproduce_what_they_say(name: str, tmp_path: Path) -> None:
    train, val = (make_rows(count, seed, RULES[name]) for seed, count in ((1, 400), (2, 150)))
    rule = found(tmp_path, train=train, val=val)
    assert rule is not None
    assert (rule.rows, rule.judged_on) == (150, "val rows")
    right = [
        follow(rule.lines, bar | {"close - open": bar["close"] - bar["open"]}) == row["label"]
        for row in val
        for bar in [row["current_bar"]]
    ]
    assert np.mean(right) == rule.share > 0.98


def test_a_rule_is_written_in_the_fewest_lines_with_short_numbers(tmp_path: Path) -> None:
    train = make_rows(400, 1, by_flags)
    for row in train[::50]:  # wrong labels, which a larger tree follows
        row["label"] = "LONG"
    rule = found(tmp_path, train=train, val=make_rows(150, 2, by_flags))
    assert rule is not None
    assert rule.lines == [
        "if ext_dir = 1 and pb_wave_strength_ok = 1 then LONG",
        "if ext_dir = -1 and pb_wave_strength_ok = 1 then SHORT",
        "else SKIP",
    ]
    assert rule.recall == {"LONG": 1.0, "SHORT": 1.0, "SKIP": 1.0}
    assert str(rule).startswith(
        "a decision tree of depth 4 on the values at the event reproduces 100.0 % of the labels of 150 val rows that "
        "it was not fitted on (LONG 100.0 %, SHORT 100.0 %, SKIP 100.0 %). A rule is exact and needs no model"
    )
    rule = found(tmp_path, train=make_rows(400, 1, by_body), val=make_rows(150, 2, by_body))
    assert rule is not None
    assert rule.lines == ["if close - open > 0.1 then LONG", "else SHORT"]


def test_a_class_of_four_rows_takes_no_depth_from_a_rule(tmp_path: Path) -> None:
    def four_deep(bar: Bar) -> str:
        is_long = bar["fvg_up"] and bar["fvg_down"] and bar["pb_wave_strength_ok"] and bar["wave_strength"] >= 50
        return "LONG" if is_long else "SKIP"

    train = make_rows(700, 1, four_deep)
    for row in train[::200]:
        row["label"] = "SHORT"
    rule = found(tmp_path, train=train, val=make_rows(300, 2, four_deep))
    assert rule is not None
    assert rule.lines[-1] == "else SKIP"
    assert len(rule.lines) == 2


def test_a_rule_on_a_feature_is_found(tmp_path: Path) -> None:
    rows = make_rows(200, 1, by_flags)
    for n, row in enumerate(rows):
        spread = 0.001 * (37 * n % 200)
        row |= {"features": {"spread": spread, "noise": n % 7 / 7}, "label": "SKIP" if spread > 0.1234 else "LONG"}
    rule = found(tmp_path, train=rows)
    assert rule is not None
    assert rule.lines == ["if features.spread ≤ 0.1235 then LONG", "else SKIP"]
    assert (rule.rows, rule.judged_on) == (60, "later train rows")


def test_the_most_common_class_is_no_rule_and_a_rare_class_by_a_rule_is_one(tmp_path: Path) -> None:
    def rare(bar: Bar) -> str:
        return "LONG" if bar["wave_strength"] >= 98 else "SKIP"

    rng = np.random.default_rng(0)
    files = {"train": make_rows(700, 1, rare), "val": make_rows(300, 2, rare)}
    assert 0.96 < np.mean([row["label"] == "SKIP" for row in files["train"]]) < 0.985
    rule = found(tmp_path, **files)
    assert rule is not None
    assert rule.lines == ["if wave_strength ≥ 98 then LONG", "else SKIP"]
    missed = [row | {"label": "LONG"} if n % 60 == 1 else row for n, row in enumerate(files["val"])]
    assert np.mean([row["label"] == other["label"] for row, other in zip(missed, files["val"], strict=True)]) > 0.98
    assert found(tmp_path, train=files["train"], val=missed) is None
    for rows in files.values():
        labels = rng.permutation([row["label"] for row in rows]).tolist()
        rows[:] = [row | {"label": label} for row, label in zip(rows, labels, strict=True)]
    assert found(tmp_path, **files) is None


def test_a_rule_with_five_wrong_labels_in_a_hundred_is_not_reported(tmp_path: Path) -> None:
    files = {"train": make_rows(400, 1, by_flags), "val": make_rows(200, 2, by_flags)}
    for row in files["val"][::20]:
        row["label"] = "SHORT" if row["label"] == "LONG" else "LONG"
    assert found(tmp_path, **files) is None


@pytest.mark.parametrize("noise", [0.0, 0.08])
def test_the_sample_needs_the_bars_before_the_event(noise: float, tmp_path: Path) -> None:
    write_sample(tmp_path, train=400, val=150, test=1, noise=noise)
    surveys = {name: survey(WindowFile(tmp_path / f"{name}.jsonl"))[0] for name in ("train", "val")}
    assert find_label_rule(surveys) is None


def test_a_rule_is_judged_on_later_rows_whatever_the_order_of_the_file(tmp_path: Path) -> None:
    """From some day on, rows with a gap are SKIP. Rows of all days together tell this; those before it do not."""
    rows = deepcopy(make_rows(300, 1, lambda bar: "LONG" if bar["fvg_up"] else "SHORT"))
    for n, row in enumerate(rows):
        row["features"] = {"era": float(n >= 210)}
        if n >= 210 and row["current_bar"]["fvg_down"]:
            row["label"] = "SKIP"
    undated = [rows[n] for n in np.random.default_rng(0).permutation(300)]
    rule = found(tmp_path, train=undated)
    assert rule is not None
    assert "features.era" in " ".join(rule.lines)
    for n, row in enumerate(rows):
        for place, bar in enumerate(bars_of(row)):
            bar["time"] = 1_700_000_000 + 3_600 * n + 60 * place
    assert found(tmp_path, train=undated) is None


def test_branches_that_end_in_one_class_are_one_line() -> None:
    values = np.repeat([[0.0], [1.0], [2.0]], 10, axis=0)
    tree = DecisionTreeClassifier(max_depth=2).fit(values, [0] * 17 + [1] * 3 + [2] * 10)
    assert tree.get_n_leaves() == 3
    lines = describe_tree(tree.tree_, tree.tree_.value[:, 0].argmax(axis=1), [0, 1], ["a"], values)
    assert lines == ["if a ≤ 1 then LONG", "else SKIP"]


def test_too_few_rows_are_said_in_check_and_few_val_rows_leave_the_later_train_rows(tmp_path: Path) -> None:
    few = make_rows(60, 1, by_flags)
    report = check_files({"train": write_rows(tmp_path / "train.jsonl", few)})
    assert report["label_rule"] is None
    assert report["unchecked"][-1] == (
        "labels that a small decision tree reproduces: too few rows, needs 30 and two classes of at least 5 to fit a "
        "tree, and as many later train rows to judge it"
    )
    rule = found(tmp_path, train=make_rows(300, 1, by_flags), val=few[:20])
    assert rule is not None
    assert (rule.rows, rule.judged_on) == (90, "later train rows")


def test_text_that_spells_its_label_is_a_rule(tmp_path: Path) -> None:
    labels = ["LONG", "SHORT", "SKIP"]
    rows = [{"context": f"case {n}: the answer is {labels[n % 3]}", "label": labels[n % 3]} for n in range(150)]
    rule = found(tmp_path, train=rows)
    assert rule is not None
    assert rule.share == 1.0
    assert all(line.startswith("if the word ") for line in rule.lines[:-1])


def check(*arguments: str) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["check", *arguments])
    assert ended.value.code == 0


def test_check_prints_a_rule_in_80_columns_and_in_json(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    def long_winded(bar: Bar) -> str:
        if not bar["fvg_up"]:
            return "SHORT"
        is_long = bar["fvg_down"] and bar["pb_wave_strength_ok"] and bar["wave_strength"] >= 30
        return "LONG" if is_long else "SKIP"

    rows = {"train": make_rows(700, 1, long_winded), "val": make_rows(300, 2, long_winded)}
    paths = [str(write_rows(tmp_path / f"{name}.jsonl", part)) for name, part in rows.items()]
    check(*paths)
    lines = capsys.readouterr().out.splitlines()
    start = next(n for n, line in enumerate(lines) if line.startswith("warning: a decision tree of depth 4"))
    printed = lines[start + 1 : start + 5]
    assert all(len(line) <= 80 for line in printed)
    assert printed[0].startswith("  if fvg_down = 1 and fvg_up = 1 and pb_wave_strength_ok = 1")
    assert [printed[1][:4], *printed[2:]] == ["    ", "  if fvg_up = 0 then SHORT", "  else SKIP"]
    check(*paths, "--json")
    report = json.loads(capsys.readouterr().out)["label_rule"]
    assert report["lines"][0] == " ".join(line.strip() for line in printed[:2])
    assert (report["share"], report["rows"], report["judged_on"]) == (1.0, 300, "val rows")


def test_a_run_notes_a_rule_and_the_horizon_of_labels_once(tmp_path: Path) -> None:
    files = {"train": make_rows(300, 1, by_flags), "val": make_rows(60, 2, by_flags)}
    for row in (row for rows in files.values() for row in rows):
        row["label_horizon"] = 2
    inputs = Inputs({name: WindowFile(write_rows(tmp_path / name, rows)) for name, rows in files.items()})
    data = load_dataset(
        inputs,
        load_tokenizer("embedded", None),
        codec="compact",
        max_tokens=512,
        oversampling="auto",
        max_repeat=None,
        weights="auto",
    )
    (note,) = [note for note in data.notes() if "decision tree" in note]
    assert note.startswith("train: a decision tree of depth 4 on the values at the event reproduces 100.0 %")
    assert note.endswith("measures the rule, not the market. ctxtrain check prints the rule")
    (note,) = [note for note in data.notes() if "labels look" in note]
    assert note.startswith("train: labels look 2 bars ahead (the largest label_horizon of the rows), but rows")
