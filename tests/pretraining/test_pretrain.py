"""The base learns statistics that are right, from windows that repeat, into a folder that transformers opens."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.linear_model import Ridge
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer

from ctxtrain.data.batches import collate
from ctxtrain.data.tokens import tokenise
from ctxtrain.errors import ConfigError
from ctxtrain.model.embedded import base_config, build_tokenizer, embedded_base, is_close_token, token_parts
from ctxtrain.pretraining import practice_windows as windows_module
from ctxtrain.pretraining import run as pretrain_module
from ctxtrain.pretraining.muon import orthogonalize
from ctxtrain.pretraining.practice_windows import (
    FLAGS,
    MAX_PRACTICE_BARS,
    MIN_PRACTICE_BARS,
    PracticeWindows,
    practice_windows,
)
from ctxtrain.pretraining.run import PretrainConfig, pretrain
from ctxtrain.pretraining.statistics import bar_statistics, event_statistics
from ctxtrain.pretraining.statistics_model import StatisticsModel
from ctxtrain.pretraining.window_arrays import WindowArrays
from ctxtrain.progress import Reporter
from ctxtrain.synthetic.bars import SYMBOLS, simulate

pytestmark = pytest.mark.slow

TINY = {"width": 16, "layers": 1, "heads": 2, "kv_heads": 1, "head_dim": 8, "intermediate": 16}


def random_stack(seed: int, bars: tuple[int, ...]) -> WindowArrays:
    """Windows of the given lengths, of any shape, with all flags drawn at random."""
    rng = np.random.default_rng(seed)
    shape = (len(bars), MAX_PRACTICE_BARS)
    exists = np.arange(MAX_PRACTICE_BARS)[::-1] < np.array(bars)[:, None]
    close = np.cumsum(rng.standard_normal(shape) / 20, axis=1)
    opens = np.concatenate([close[:, :1], close[:, :-1]], axis=1)
    first = opens[np.arange(len(bars)), MAX_PRACTICE_BARS - np.array(bars)][:, None]
    wick = rng.random(shape) / 20
    paths = {"high": np.maximum(opens, close) + wick, "low": np.minimum(opens, close) - wick}
    paths |= {"open": opens, "close": close}
    prices = {name: np.where(exists, path, first) for name, path in paths.items()}
    flow = {name: np.where(exists, rng.standard_normal(shape), 0.0) for name in ("volume", "delta")}
    flags = {name: np.where(exists, rng.integers(0, 2, shape), 0).astype(float) for name in FLAGS}
    return WindowArrays(**prices, **flow, exists=exists, flags=flags, bar_range_W=np.full(len(bars), 0.05))


@pytest.fixture(scope="module")
def practice() -> PracticeWindows:
    return practice_windows(np.random.default_rng(0), 64)


# Statistics


def test_statistics_at_a_bar_depend_on_no_later_bar() -> None:
    stack, other, now = random_stack(0, (50, 40, 30)), random_stack(1, (50, 40, 30)), 35

    def spliced(name: str) -> np.ndarray:
        return np.concatenate([getattr(stack, name)[:, : now + 1], getattr(other, name)[:, now + 1 :]], axis=1)

    flags = {
        name: np.concatenate([values[:, : now + 1], other.flags[name][:, now + 1 :]], axis=1)
        for name, values in stack.flags.items()
    }
    names = ("open", "high", "low", "close", "volume", "delta")
    mixed = WindowArrays(
        **{name: spliced(name) for name in names}, exists=stack.exists, flags=flags, bar_range_W=stack.bar_range_W
    )
    before, after = bar_statistics(stack), bar_statistics(mixed)
    for name, values in before.items():
        np.testing.assert_allclose(after[name][:, : now + 1], values[:, : now + 1], atol=1e-12, err_msg=name)


def test_statistics_at_a_bar_do_not_depend_on_the_length_of_other_windows() -> None:
    together, alone = random_stack(3, (50, 31)), random_stack(3, (50, 31))
    row = WindowArrays(
        **{name: getattr(alone, name)[1:] for name in ("open", "high", "low", "close", "volume", "delta", "exists")},
        flags={name: values[1:] for name, values in alone.flags.items()},
        bar_range_W=alone.bar_range_W[1:],
    )
    for tables in (
        (bar_statistics(together), bar_statistics(row)),
        (event_statistics(together), event_statistics(row)),
    ):
        for name in tables[0]:
            np.testing.assert_allclose(tables[0][name][1:], tables[1][name], err_msg=name)


def test_statistics_mean_what_their_names_say() -> None:
    stack = random_stack(2, (40,))
    bars, event = bar_statistics(stack), event_statistics(stack)
    close, high, low, volume = (getattr(stack, name)[0, -40:] for name in ("close", "high", "low", "volume"))
    at_last = {name: values[0, -1] for name, values in bars.items()}
    expected = {
        "return_5": close[-1] - close[-6],
        "volume_8": volume[-8:].mean(),
        "below_top_10": high[-10:].max() - close[-1],
        "top_age_20": np.log1p(high[-20:][::-1].argmax()),
        "gap_up": low[-1] - high[-3],
        "count_int_bos": np.log1p(stack.flags["int_bos"].sum()),
    }
    for name, value in expected.items():
        assert at_last[name] == pytest.approx(value), name
    assert event["return[5-10]"][0] == pytest.approx(close[-6] - close[-11])
    assert event["close@3"][0] == close[-4]
    assert event["volume_ago"][0] == pytest.approx(np.log1p(volume[::-1].argmax()))
    assert event["fit_close_50"][0] == pytest.approx(np.corrcoef(np.arange(40), close)[0, 1])
    assert np.isnan(bars["return_5"][0, :10]).all()


def test_a_flag_that_a_window_does_not_have_is_unknown_and_changes_nothing_else() -> None:
    whole, lacking = random_stack(4, (50, 40)), random_stack(4, (50, 40))
    lacking.flags["ext_bos"][1] = np.nan
    before, after = bar_statistics(whole), bar_statistics(lacking)
    about = {name for name in before if "ext_bos" in name}
    assert about == {"is_ext_bos", "is_seen_ext_bos", "count_ext_bos", "age_ext_bos"}
    for name in before:
        np.testing.assert_array_equal(after[name][0], before[name][0], err_msg=name)
        if name in about:
            assert np.isnan(after[name][1]).all(), name
        else:
            np.testing.assert_array_equal(after[name][1], before[name][1], err_msg=name)


def test_legs_turn_at_their_extremes() -> None:
    path = np.concatenate([np.linspace(0, 1, 21), np.linspace(0.95, 0.5, 10), np.linspace(0.55, 0.65, 3)])
    close = np.concatenate([np.zeros(MAX_PRACTICE_BARS - len(path)), path])[None]
    still = np.zeros_like(close)
    flags = dict.fromkeys(FLAGS, still)
    exists = np.ones(close.shape, dtype=np.bool_)
    legs = bar_statistics(WindowArrays(close, close, close, close, still, still, exists, flags, np.array([0.05])))
    assert legs["direction_1.5"][0, -4:].tolist() == [-1, -1, 1, 1]
    assert legs["leg_1.5"][0, -1] == pytest.approx(0.15)
    assert legs["leg_before_1.5"][0, -1] == pytest.approx(-0.5)
    assert legs["retraced_1.5"][0, -1] == pytest.approx(-0.15 / 0.5)


# Windows


def test_practice_windows_repeat_with_their_seed(practice: PracticeWindows) -> None:
    again = practice_windows(np.random.default_rng(0), 64)
    assert again.texts == practice.texts
    np.testing.assert_array_equal(again.bar_WLP, practice.bar_WLP)
    assert practice_windows(np.random.default_rng(1), 64).texts != practice.texts


def test_practice_windows_differ_in_length_and_in_what_they_show(practice: PracticeWindows) -> None:
    tokenizer = build_tokenizer()
    ends_bar = is_close_token(tokenizer)
    bars = np.array([ends_bar[ids].sum() for ids in tokenizer(practice.texts)["input_ids"]])
    assert (bars.min(), bars.max()) >= (MIN_PRACTICE_BARS, MIN_PRACTICE_BARS)
    assert bars.max() <= MAX_PRACTICE_BARS
    assert (~np.isnan(practice.bar_WLP[:, :, 0])).sum(axis=1).tolist() == bars.tolist()
    without_delta = sum("- " in text for text in practice.texts)
    without_flags = sum(not set("DNU") & set(text) for text in practice.texts)
    assert 0 < without_delta < 64
    assert 0 < without_flags < 64


def test_flags_from_elsewhere_are_all_shown_or_unknown() -> None:
    """A question about a flag that neither the text nor the prices can answer would teach the base to guess."""
    windows = windows_module._cut_windows(
        np.random.default_rng(0), simulate(np.random.default_rng(0), 600, SYMBOLS[0]), 200
    )
    foreign = [window for window in windows if window.location == windows_module.FOREIGN]
    shown = [set(windows_module._random_codec(np.random.default_rng(1), window).fields) for window in foreign]
    assert all(fields == set(window.bars) for fields, window in zip(shown, foreign, strict=True))
    stack = windows_module._to_arrays(foreign)
    for name in FLAGS:
        unknown = np.isnan(stack.flags[name][:, -1])
        assert unknown.tolist() == [name not in fields for fields in shown]
        assert 0 < unknown.sum() < len(foreign)


# Model


def test_every_token_but_the_empty_part_has_an_embedding_of_its_own() -> None:
    parts, size = token_parts(build_tokenizer())
    assert parts.max() == size - 1
    assert len(np.unique(parts, axis=0)) == len(parts)


def test_the_plain_model_reads_as_the_reader_does(practice: PracticeWindows) -> None:
    tokenizer = build_tokenizer()
    torch.manual_seed(0)
    reader = StatisticsModel(tokenizer, base_config(tokenizer, **TINY), 3, 5).eval()
    plain = reader.to_qwen().eval()
    long, short = tokenizer(practice.texts[:2])["input_ids"]
    lengths = torch.tensor([len(long), len(short)])
    ids = torch.zeros(2, int(lengths.max()), dtype=torch.long)
    ids[0, : len(long)], ids[1, : len(short)] = torch.tensor(long), torch.tensor(short)
    with torch.no_grad():
        _, guesses = reader(ids, lengths)
        alone = [reader.event_head(plain.model(torch.tensor([row])).last_hidden_state[:, -1]) for row in (long, short)]
    torch.testing.assert_close(guesses, torch.cat(alone), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("shape", [(16, 16), (16, 48), (48, 16)])
def test_orthogonal_evens_out_singular_values(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    values = torch.linalg.svdvals(orthogonalize(torch.randn(3, *shape)))
    assert values.min() > 0.3
    assert values.max() < 1.3


# Runs


@pytest.fixture
def small_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pretrain_module, "CHUNK", 32)


def run(folder: Path, **changes: object) -> dict[str, object]:
    config = {"output_dir": str(folder), "steps": 3, "batch_size": 8, "architecture": TINY, **changes}
    return pretrain(PretrainConfig.model_validate(config), Reporter())


@pytest.mark.usefixtures("small_chunks")
def test_the_same_seed_makes_the_same_base(tmp_path: Path) -> None:
    facts = run(tmp_path / "a")
    run(tmp_path / "b")
    run(tmp_path / "c", seed=1)
    weights = {name: (tmp_path / name / "model.safetensors").read_bytes() for name in "abc"}
    assert weights["a"] == weights["b"] != weights["c"]
    assert facts["windows"] == 24
    assert json.loads((tmp_path / "a" / "pretrain.json").read_text()) == facts


@pytest.mark.usefixtures("small_chunks")
def test_transformers_opens_the_base_in_float32(tmp_path: Path) -> None:
    run(tmp_path / "base", steps=1)
    model, report = AutoModelForSequenceClassification.from_pretrained(tmp_path / "base", output_loading_info=True)
    assert model.dtype == torch.float32
    assert set(report["missing_keys"]) == {"score.weight"}
    assert AutoTokenizer.from_pretrained(tmp_path / "base")("53204187 ?")["input_ids"]


@pytest.mark.usefixtures("small_chunks")
def test_training_lowers_the_loss(tmp_path: Path) -> None:
    before = run(tmp_path / "before", steps=0)["held_out_skill"]
    after = run(tmp_path / "after", steps=60, warmup_steps=5)["held_out_skill"]
    assert isinstance(before, dict)
    assert isinstance(after, dict)
    assert after["numbers"] > before["numbers"] + 0.1


@pytest.mark.usefixtures("small_chunks")
def test_a_base_is_adapted_to_unlabelled_windows(tmp_path: Path) -> None:
    run(tmp_path / "base", steps=0)
    bars = simulate(np.random.default_rng(0), 100, SYMBOLS[0])
    names = ("open", "high", "low", "close", "volume")
    rows = [dict(zip(names, map(float, values), strict=True)) for values in zip(*(bars[n] for n in names), strict=True)]
    windows = tmp_path / "windows.jsonl"
    cuts = [{"context_bars": rows[first : first + 29], "current_bar": rows[first + 29]} for first in range(60)]
    windows.write_text("\n".join(map(json.dumps, cuts)))
    facts = run(
        tmp_path / "own", steps=20, warmup_steps=2, base=str(tmp_path / "base"), data=[str(windows)], learning_rate=0.01
    )
    loss = facts["held_out_loss"]
    assert isinstance(loss, dict)
    assert loss["after"] < loss["before"] - 0.5
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "own").dtype == torch.float32


@pytest.mark.parametrize("half", [{"base": "Qwen/Qwen3-0.6B"}, {"data": ["windows.jsonl"]}])
def test_base_and_data_come_together(half: dict[str, object], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"output_dir": "base", **half}))
    with pytest.raises(ConfigError, match=r"base and data, .*, must be given together"):
        PretrainConfig.load(config)


@pytest.mark.parametrize("sizes", [{"heads": 3}, {"head_dim": 3}])
def test_sizes_that_make_no_qwen_are_refused(sizes: dict[str, int], tmp_path: Path) -> None:
    config = tmp_path / "config.yaml"
    config.write_text(json.dumps({"output_dir": "base", "architecture": sizes}))
    with pytest.raises(ConfigError, match="kv_heads must divide heads, and head_dim must be even"):
        PretrainConfig.load(config)


@pytest.mark.parametrize(
    ("text", "faults"),
    [
        ("", ["{path}: must hold keys of pretrain, got null. See configs/pretrain.yaml."]),
        ("- 1", ["{path}: must hold keys of pretrain, got [1]. See configs/pretrain.yaml."]),
        ("steps: 3", ["output_dir is required. Set it in the config."]),
        (
            "{output_dir: a, batch: 4, steps: many, zzz: 1, architecture: {head: 2, layers: 0}}",
            [
                'steps must be a valid integer, got "many".',
                "architecture.layers must be greater than or equal to 1, got 0.",
                "architecture.head is not a config key; did you mean architecture.heads?",
                "batch is not a config key; did you mean batch_size?",
                "zzz is not a config key; the keys are listed in docs/config.md.",
            ],
        ),
        (
            "{output_dir: a, base: b}",
            ['base and data, the windows that base is adapted to, must be given together, got base "b" and data [].'],
        ),
        (
            "{data: {train: a, val: b}, model: {base: embedded}, output_dir: a}",
            ["{path}: must hold keys of pretrain, got sections of train: data, model. See configs/pretrain.yaml."],
        ),
    ],
)
def test_faults_of_a_recipe_come_at_once_in_the_words_of_a_config(text: str, faults: list[str], tmp_path: Path) -> None:
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        PretrainConfig.load(path)
    assert caught.value.faults == [fault.replace("{path}", str(path)) for fault in faults]


def test_a_recipe_that_is_missing_or_no_text_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no such config file"):
        PretrainConfig.load(tmp_path / "none.yaml")
    (tmp_path / "latin.yaml").write_bytes(b"output_dir: caf\xe9\n")
    with pytest.raises(ConfigError, match="must be UTF-8 text"):
        PretrainConfig.load(tmp_path / "latin.yaml")


# What is shipped


def test_the_embedded_base_is_small_and_has_the_tokenizer_of_the_code() -> None:
    folder = embedded_base()
    assert sum(path.stat().st_size for path in folder.iterdir()) <= 8_000_000
    shipped = AutoTokenizer.from_pretrained(folder, split_special_tokens=True)
    assert shipped.get_vocab() == build_tokenizer().get_vocab()
    assert shipped.backend_tokenizer.to_str() == build_tokenizer().backend_tokenizer.to_str()


def test_the_embedded_base_was_made_by_the_recipe_of_the_repository() -> None:
    facts = json.loads((embedded_base() / "pretrain.json").read_text(encoding="utf-8"))
    recipe = PretrainConfig.load(Path(__file__).parents[2] / "configs" / "pretrain.yaml").model_dump(mode="json")
    where = {"output_dir"}
    assert {k: v for k, v in facts["config"].items() if k not in where} == {
        k: v for k, v in recipe.items() if k not in where
    }
    assert facts["windows"] == recipe["steps"] * recipe["batch_size"]
    model = AutoModelForCausalLM.from_pretrained(embedded_base())
    assert facts["parameters"] == sum(weight.numel() for weight in model.parameters())


def test_the_embedded_base_has_learnt_to_read_windows() -> None:
    """A linear fit on its last state finds the move of the last 21 bars in windows that it never saw."""
    practice = practice_windows(np.random.default_rng(123), 256)
    tokenizer = AutoTokenizer.from_pretrained(embedded_base())
    model = AutoModelForCausalLM.from_pretrained(embedded_base()).model.eval()
    tokens, states = tokenise(practice.texts, tokenizer, 2048), []
    with torch.no_grad():
        for start in range(0, 256, 32):
            batch = collate(tokens, np.arange(start, start + 32))
            ends = batch["attention_mask"].sum(dim=1) - 1
            states.append(model(**batch).last_hidden_state[torch.arange(32), ends])
    read = torch.cat(states).numpy()
    moves = practice.bar_WLP[:, -1, practice.bar_names.index("return_21")]
    assert Ridge(alpha=1.0).fit(read[:192], moves[:192]).score(read[192:], moves[192:]) > 0.9
