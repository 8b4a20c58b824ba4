"""The report says what the summary says, each of its charts has a table, and no word of a row is markup."""

import ast
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass, field
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import orjson
import pytest
from altair.utils.schemapi import SchemaValidationError
from scipy.special import softmax

import ctxtrain
from ctxtrain.cli.process import main
from ctxtrain.data.parse_window import Window
from ctxtrain.data.window_file import load_windows
from ctxtrain.evaluation.selective import confidence_histogram
from ctxtrain.evaluation.worst_errors import MAX_TEXT_CHARS, confident_mistakes
from ctxtrain.export.predictor import load_model
from ctxtrain.labels import LABELS
from ctxtrain.reporting import charts, figures
from ctxtrain.reporting.figures import Figure
from ctxtrain.reporting.learning_curve import curve_figure, curve_reading
from ctxtrain.reporting.report import write_report
from ctxtrain.reporting.summary_schema import Summary
from ctxtrain.reporting.verdict import advice, headline, readable
from ctxtrain.storage.run_folder import RunFolder
from tests.helpers import errors, make_row, make_window
from tests.reported import CHARTS, HOSTILE, SECTIONS, finished_run, summary_of

LIMIT = 3_000_000
VOID = {"meta", "img", "br", "link"}


@dataclass
class Page(HTMLParser):
    """What a browser would see: elements with their attributes, text by section, tables, the charts' values."""

    html: str
    elements: list[tuple[str, dict[str, str | None]]] = field(default_factory=list)
    text: str = ""
    tables: dict[str, list[list[str]]] = field(default_factory=dict)
    scripts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.region = ""
        self.feed(self.html)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = dict(attrs)
        self.elements.append((tag, found))
        if tag not in VOID:
            self.open.append(tag)
        if found.get("role") == "region":
            self.region = found["aria-label"] or ""
        if tag == "table":
            self.tables[self.region] = []
        if tag == "tr":
            self.tables[self.region].append([])
        if tag in ("th", "td"):
            self.tables[self.region][-1].append("")
        if tag == "script":
            self.scripts.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, f"{tag} closes another element"

    def handle_data(self, data: str) -> None:
        if "script" in self.open:
            self.scripts[-1] += data
        elif "style" not in self.open:
            data = data.replace("\N{NO-BREAK SPACE}", " ")
            self.text += data
            if self.open and self.open[-1] in ("th", "td"):
                self.tables[self.region][-1][-1] += data

    def specs(self) -> dict[str, Any]:
        specs: dict[str, Any] = json.loads(self.scripts[0])["specs"]
        return specs

    def values(self, chart: str, key: str) -> list[dict[str, Any]]:
        """The most rows with `key` that a chart is given for one of its layers."""
        given = self.specs()[chart]["datasets"].values()
        return max(([row for row in rows if key in row] for rows in given), key=len)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("reported"))


@pytest.fixture(scope="module")
def page(run: Path) -> Page:
    return Page((run / "report.html").read_text(encoding="utf-8"))


Rewritten = Callable[[dict[str, Any] | Summary], Page]


@pytest.fixture
def rewritten(run: Path, tmp_path: Path) -> Rewritten:
    """The page of the run with another summary."""

    def write(summary: dict[str, Any] | Summary) -> Page:
        for name in ("config.yaml", "metrics.jsonl"):
            shutil.copy(run / name, tmp_path / name)
        folder = RunFolder(tmp_path)
        write_report(folder, Summary.model_validate(summary))
        return Page(folder.report.read_text(encoding="utf-8"))

    return write


def test_the_page_is_one_small_file_that_asks_for_nothing(run: Path, page: Page) -> None:
    assert (run / "report.html").stat().st_size < LIMIT
    asking = {"src", "srcset", "data", "action", "background", "poster"}
    assert [(tag, found) for tag, found in page.elements if asking & found.keys()] == []
    links = [found["href"] for _, found in page.elements if "href" in found]
    ids = {f"#{found['id']}" for _, found in page.elements if found.get("id")}
    assert len(links) > 10
    assert set(links) <= ids
    style = page.html.split("<style>")[1].split("</style>")[0]
    assert "url(" not in style
    assert "@import" not in style
    policy = next(found["content"] for tag, found in page.elements if "http-equiv" in found)
    assert policy is not None
    assert policy.startswith("default-src 'none';")
    assert "unsafe-eval" not in policy


def test_sections_stand_in_the_order_of_a_reader_s_questions(page: Page) -> None:
    assert [found["id"] for tag, found in page.elements if tag == "section"] == SECTIONS
    titled = [found["aria-labelledby"] for tag, found in page.elements if tag == "section"]
    assert titled == [found.get("id") for tag, found in page.elements if tag == "h2"]


def test_no_word_of_a_row_becomes_markup(run: Path, page: Page) -> None:
    assert len(page.scripts) == 2
    assert [name for _, found in page.elements for name in found if name.startswith("on")] == []
    assert [tag for tag, _ in page.elements if tag in ("img", "b", "iframe", "svg")] == []
    mistakes = summary_of(run)["mistakes"]
    assert len(mistakes) == 6
    for mistake in mistakes:
        assert mistake["id"].startswith(HOSTILE)
        assert mistake["id"] in page.text
    assert "<b>run" in page.text
    assert "49" not in mistakes[0]["id"]


def test_every_chart_has_a_name_a_sentence_and_a_table(page: Page) -> None:
    drawn = [found["id"] or "" for _, found in page.elements if found.get("class") == "chart"]
    assert sorted(drawn) == sorted(f"chart-{name}" for name in page.specs())
    images = [found for _, found in page.elements if found.get("role") == "img"]
    assert len(images) == len(drawn) == CHARTS
    ids = {found.get("id") for _, found in page.elements}
    for found in images:
        assert found["aria-label"]
        assert found["aria-describedby"] in ids
    for spec in page.specs().values():
        assert spec["width"] == "container"
        assert spec["$schema"].startswith("https://vega.github.io/schema/vega-lite/")


def test_targets_scores_and_confusion_are_those_of_the_summary(run: Path, page: Page) -> None:
    summary = summary_of(run)
    rows = page.tables["Targets"][1:]
    assert [row[2] for row in rows] == [f"{target['value']:.3f}" for target in summary["targets"]]
    assert [row[1] for row in rows] == [target["verdict"] for target in summary["targets"]]
    typed = RunFolder(run).read_summary()
    assert headline(typed) in page.text
    assert page.text.index(advice(typed, brief=True)) < page.text.index(headline(typed))
    drawn = {row["name"]: row for row in page.values("targets", "target")}
    assert drawn["LONG recall"]["value"] == summary["test"]["per_class"]["LONG"]["recall"]
    assert [drawn["macro-F1"]["low"], drawn["macro-F1"]["high"]] == summary["intervals"]["scores"]["macro_f1"]
    counts = {(row["label"], row["called"]): row["rows"] for row in page.values("confusion", "share")}
    assert [[counts[label, called] for called in LABELS] for label in LABELS] == summary["test"]["confusion"]
    judged = summary["test"]["rows"]
    right = round(summary["test"]["accuracy"] * judged)
    assert f"{right} of {judged} windows were predicted right." in page.text
    shares = {(row["label"], row["called"]): row["share"] for row in page.values("confusion", "share")}
    assert shares["SHORT", "SHORT"] == pytest.approx(summary["test"]["per_class"]["SHORT"]["recall"])
    low, high = summary["intervals"]["scores"]["per_class"]["SKIP"]["f1"]
    f1 = summary["test"]["per_class"]["SKIP"]["f1"]
    assert page.tables["Scores by class"][3][3] == f"{f1:.3f} ({low:.3f} to {high:.3f})"
    leads = page.tables["The model and what it is compared with, on the same windows"]
    differences = [scores["difference"]["macro_f1"] for scores in summary["baselines"]["scores"].values()]
    assert [row[0] for row in leads[1:]] == [
        *("the model", "the most common class", "random predictions", "logistic regression", "gradient boosting"),
        *("extremely randomised trees", "CatBoost"),
    ]
    assert [row["name"] for row in page.values("leads", "low")] == [row[0] for row in leads[2:]]
    best = readable(summary["baselines"]["best"])
    assert f"The one to beat has the best score on the validation windows: {best}." in page.text
    lead = leads[0].index("lead in macro-F1")
    assert [row[lead] for row in leads[2:]] == [f"{difference['value']:+.3f}" for difference in differences]


def test_every_chart_is_valid_vega_lite(run: Path, page: Page) -> None:
    """Outside of a run the plotting library checks what it is given."""
    summary = RunFolder(run).read_summary()
    drawn: dict[str, Figure | None] = {**figures.all_figures(summary, RunFolder(run).metrics.read())}
    drawn["curve"] = curve_figure(summary)
    drawn |= {f"mistake-{n}": figures.candles(mistake) for n, mistake in enumerate(summary.mistakes, start=1)}
    assert {name: json.loads(json.dumps(figure.spec)) for name, figure in drawn.items() if figure} == page.specs()
    with pytest.raises(SchemaValidationError, match="colour"):
        charts._spec(alt.Chart(alt.Data(values=[])).mark_bar().encode(x=alt.X("a:Q", scale=alt.Scale(colour=1))), 9)


def test_curves_hold_every_step_and_epoch_and_mark_the_chosen_one(run: Path, page: Page) -> None:
    summary, lines = summary_of(run), RunFolder(run).metrics.read()
    steps = [line for line in lines if line["kind"] == "step"]
    drawn = page.values("loss", "series")
    assert [row["value"] for row in drawn if row["series"] == "training steps"] == [step["loss"] for step in steps]
    validation = [row["value"] for row in drawn if row["series"] == "validation"]
    assert validation == [epoch["loss"] for epoch in summary["epochs"]]
    rates = [row["value"] for row in page.values("rate", "series")]
    assert rates == [step["learning_rate"] for step in steps]
    chosen = summary["best"]["epoch"]
    for name in ("loss", "scores", "rate"):
        assert page.values(name, "text") == [{"epoch": chosen, "text": f"chosen: {chosen}"}]
    assert [row[0] for row in page.tables["Loss (loss)"][1:]][chosen - 1] == f"{chosen} (chosen)"


def test_scores_leave_room_below_the_target_and_draw_accuracy_over_macro_f1(run: Path, page: Page) -> None:
    wanted = next(target["target"] for target in summary_of(run)["targets"] if target["metric"] == "macro_f1")
    drawn = page.values("scores", "series")
    low = min(wanted, *(row["value"] for row in drawn))
    scales = [layer["encoding"].get("y", {}).get("scale", {}) for layer in page.specs()["scores"]["layer"]]
    floors = {scale["domainMin"] for scale in scales if "domainMin" in scale}
    assert len(floors) == 1
    assert 0 <= floors.pop() < low
    assert [row["series"] for row in drawn] == sorted((row["series"] for row in drawn), reverse=True)


def test_the_learning_curve_ends_with_the_run_and_has_no_section_without_the_key(
    run: Path, page: Page, rewritten: Rewritten
) -> None:
    summary = summary_of(run)
    points, best = summary["learning_curve"]["points"], summary["baselines"]["best"]
    model = [point["macro_f1"] for point in points] + [summary["test"]["macro_f1"]]
    baseline = [point["baseline_macro_f1"] for point in points] + [summary["baselines"]["scores"][best]["macro_f1"]]
    drawn = page.values("curve", "series")
    assert [row["windows"] for row in drawn] == [12, 24, 48] * 2
    assert [row["value"] for row in drawn] == model + baseline
    table = page.tables["Macro-F1 by number of training windows (curve)"][1:]
    assert [row[:3] for row in table] == [
        [size, f"{own:.3f}", f"{other:.3f}"]
        for size, own, other in zip(("12", "24", "48"), model, baseline, strict=True)
    ]
    assert table[-1][4] == readable(best)
    assert curve_reading(Summary.model_validate(summary)) in page.text
    assert "Without 5,000 windows: the run itself trains on 48 windows." in page.text
    del summary["learning_curve"]
    page = rewritten(summary)
    assert "curve" not in page.specs()
    assert [found["id"] for tag, found in page.elements if tag == "section"] == [
        name for name in SECTIONS if name != "curve"
    ]


def test_a_long_run_is_drawn_as_means_of_neighbours() -> None:
    from ctxtrain.reporting.figures import CURVE_POINTS, thinned

    steps = [{"step": i + 1, "loss": float(i), "learning_rate": i / 1e6} for i in range(12_345)]
    points = thinned(steps)
    assert CURVE_POINTS / 2 < len(points) <= CURVE_POINTS
    assert points[0] == {"step": 62, "loss": pytest.approx(30.5), "learning_rate": 61 / 1e6}
    assert points[-1]["step"] == 12_345
    assert [point["loss"] for point in thinned(steps[:3])] == [0, 1, 2]
    assert thinned([]) == []


def test_mistakes_are_the_surest_wrong_calls_of_the_exported_model_with_their_bars(run: Path, page: Page) -> None:
    file = run.parent / "test.jsonl"
    windows = load_windows(file)
    calls = load_model(run).predict([json.loads(line) for line in file.read_text().splitlines()])
    wrong = [
        (call["confidence"], window.location, window)
        for call, window in zip(calls, windows, strict=True)
        if call["label"] != LABELS[window.label or 0]
    ]
    expected = sorted(wrong, key=lambda found: -found[0])[:6]
    mistakes = summary_of(run)["mistakes"]
    assert [mistake["place"] for mistake in mistakes] == [place for _, place, _ in expected]
    for number, (mistake, (confidence, _, window)) in enumerate(zip(mistakes, expected, strict=True), start=1):
        assert max(mistake["probabilities"].values()) == pytest.approx(confidence)
        assert mistake["label"] == LABELS[window.label or 0] != mistake["called"]
        candles = page.values(f"mistake-{number}", "open")
        assert [candle["bar"] for candle in candles] == list(range(-29, 1))
        for name in ("open", "high", "low", "close", "volume"):
            assert [candle[name] for candle in candles] == window.bars[name].tolist()
        assert mistake["event"]["ext_dir"] == window.bars["ext_dir"][-1]
        assert re.fullmatch(r"2025-03-\d\dT10:29:00\+00:00", mistake["time"])


def window_of(**changes: Any) -> Window:
    return make_window(make_row(**changes))


def test_mistakes_of_like_confidence_keep_their_order_and_right_calls_stay_out() -> None:
    windows = [window_of(seed=i, id=str(i), place=False) for i in range(9)]
    labels_N = np.array([0, 1, 2, 1, 1, 1, 1, 1, 1])
    probabilities_NC = np.tile([0.6, 0.3, 0.1], (9, 1))
    probabilities_NC[4] = [0.8, 0.1, 0.1]
    found = confident_mistakes(lambda rows: [windows[n] for n in rows], labels_N, probabilities_NC)
    assert [mistake["id"] for mistake in found] == ["4", "1", "2", "3", "5", "6"]
    assert (found[0]["label"], found[0]["called"], found[0]["time"]) == ("SHORT", "LONG", None)
    assert confident_mistakes(lambda rows: [windows[n] for n in rows], labels_N[:1], probabilities_NC[:1]) == []


def test_numbers_that_are_no_moment_and_text_rows_are_no_fault() -> None:
    row = make_row()
    for i, bar in enumerate([*row["context_bars"], row["current_bar"]]):
        bar["time"] = 7e7 + i
    text = make_window({"context": "up " * MAX_TEXT_CHARS, "id": "t"})
    windows = [make_window(row), text]
    found = confident_mistakes(
        lambda rows: [windows[n] for n in rows], np.array([1, 1]), np.tile([0.6, 0.3, 0.1], (2, 1))
    )
    assert [mistake["time"] for mistake in found] == [None, None]
    assert (found[1]["bars"], found[1]["event"], len(found[1]["text"])) == ({}, {}, MAX_TEXT_CHARS)


def test_the_histogram_counts_every_row_once() -> None:
    rng = np.random.default_rng(0)
    probabilities_NC, labels_N = softmax(rng.normal(0, 3, (500, 3)), axis=1), rng.integers(0, 3, 500)
    probabilities_NC[0], labels_N[0] = [1, 0, 0], 0
    bins = confidence_histogram(probabilities_NC, labels_N)
    assert sum(bin_["right"] for bin_ in bins) == (probabilities_NC.argmax(axis=1) == labels_N).sum()
    assert sum(bin_["right"] + bin_["wrong"] for bin_ in bins) == 500
    assert (bins[0]["from"], bins[-1]["to"], len(bins)) == (0.3, 1.0, 14)
    inside = (probabilities_NC.max(axis=1) >= 0.5) & (probabilities_NC.max(axis=1) < 0.55)
    assert bins[4]["right"] + bins[4]["wrong"] == inside.sum()


def test_the_run_folder_alone_gives_the_same_page_again(run: Path, tmp_path: Path) -> None:
    alone = tmp_path / run.name
    alone.mkdir()
    for name in ("config.yaml", "metrics.jsonl", "training_summary.json"):
        shutil.copy(run / name, alone / name)
    write_report(RunFolder(alone), RunFolder(alone).read_summary())
    assert (alone / "report.html").read_bytes() == (run / "report.html").read_bytes()


def test_the_plotting_library_is_loaded_for_a_report_alone() -> None:
    loading = {"altair", "vl_convert", "ctxtrain.reporting.charts", "ctxtrain.reporting.figures"}
    at_once = {
        (path.stem, name)
        for path in Path(ctxtrain.__file__).parent.rglob("*.py")
        for node in ast.parse(path.read_text(encoding="utf-8")).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in imported_names(node) & loading
    }
    assert at_once == {("charts", "altair"), ("charts", "vl_convert"), ("figures", "ctxtrain.reporting.charts")}


def imported_names(node: ast.Import | ast.ImportFrom) -> set[str]:
    names = {alias.name for alias in node.names}
    return names if isinstance(node, ast.Import) else {node.module or "", *(f"{node.module}.{name}" for name in names)}


def test_leaks_are_shown_with_what_to_do(run: Path, rewritten: Rewritten) -> None:
    summary = summary_of(run)
    leaks = {leak["kind"]: leak for leak in summary["data"]["leaks"] if leak["files"] == ["train", "val"]}
    found = leaks["shared bars"]
    page = rewritten(summary)
    assert f"shared bars in train and val: {found['count']}. {found['remedy']}" in page.text
    assert "Do not believe any figure here" not in page.text
    checked = "Checked without a finding: "
    assert f"{checked}identical window; identical text; same id; two labels for one window" in page.text
    summary["data"]["leaks"] = []
    assert f"{checked}identical window;" in (text := rewritten(summary).text)
    assert "shared bars; training on later rows." in text
    summary["data"]["leaks"] = [
        {
            "kind": "identical window",
            "files": ["train", "test"],
            "count": 1234,
            "examples": [[f"train.jsonl:1{HOSTILE}", "test.jsonl:9"]],
            "refused": True,
            "remedy": "Delete them from train.",
        }
    ]
    summary["data"]["leaked"] = "1,234 × identical window in train and test"
    summary["data"]["unchecked"] = ["shared bars, training on later rows: the rest"]
    summary["data"]["purged"] = {"train": 17, "val": 0}
    summary["data"]["drift"] = [
        {"feature": "range", "psi": 0.5, "chance": 0.125, "shifted": True},
        {"feature": "volume", "psi": 0.25, "chance": 0.5, "shifted": False},
    ]
    page = rewritten(summary)
    assert "identical window in train and test: 1,234. Delete them from train." in page.text
    assert f"train.jsonl:1{HOSTILE} and test.jsonl:9" in page.text
    assert "Do not believe any figure here: rows are in two files (1,234 × identical window" in page.text
    assert "Not checked: shared bars, training on later rows: the rest." in page.text
    checked = "Checked without a finding: identical text; same id; two labels for one window; single-field leakage."
    assert checked in page.text
    assert "17 train windows are dropped" in page.text
    assert "1 of 2 features drift between training and validation" in page.text
    assert ["range", "0.50", "0.12", "yes"] in page.tables["The features that drift most"]
    assert len(page.scripts) == 2


def test_the_page_says_which_market_and_which_times_it_is_about(run: Path, rewritten: Rewritten) -> None:
    summary = summary_of(run)
    page = rewritten(summary)
    row = page.tables["Symbols and times"][1]
    extent = summary["data"]["extent"]["train"]
    symbols = ", ".join(extent["symbols"])
    assert row == ["train", symbols, *(extent[end].replace("T", " ")[:19] for end in ("first_event", "last_event"))]
    assert "simulated: no figure here" not in page.text
    for found in summary["data"]["extent"].values():
        found |= {"symbols": ["ES-SIM", "GC-SIM"], "first_event": None}
    page = rewritten(summary)
    assert "The windows are simulated: no figure here is about a real market, and none counts profit." in page.text
    assert page.tables["Symbols and times"][1][1:3] == ["ES-SIM, GC-SIM", "unknown"]


def test_the_page_copes_with_runs_of_every_kind(run: Path, rewritten: Rewritten) -> None:
    lacking = RunFolder(run).read_summary()
    assert lacking.test
    del lacking.test.per_class["SKIP"].f1  # a value that is not there is a fault, not a blank
    with pytest.raises(AttributeError, match="f1"):
        rewritten(lacking)
    summary = summary_of(run)
    summary["mistakes"] = []
    summary["calibration"] = {"method": "none", "temperature": 1.0}
    summary["test"]["absent"] = ["SKIP"]
    summary["intervals"]["scores"]["per_class"]["SKIP"]["recall"] = None
    summary["intervals"] |= {"trusted": False, "doubt": "the windows cover 3 independent periods; use 10 or more"}
    summary["data"]["partial_fields"] = {"delta": 12}
    summary["data"]["rows_cut_to_max_tokens"]["val"] = 7
    text = rewritten(summary).text
    for said in (
        "every test window was predicted right",
        "This run was not calibrated",
        "No windows of SKIP: the F1 counts as 0.",
        "there is no interval: the windows cover 3 independent periods; use 10 or more.",
        "delta is in 12 of 48 training windows",
        "7 val windows were longer than model.max_tokens",
    ):
        assert said in text
    summary = summary_of(run)
    summary["mistakes"][0] |= {"bars": {}, "event": {}, "text": HOSTILE}
    page = rewritten(summary)
    assert HOSTILE in page.text
    assert "mistake-1" not in page.specs()
    assert "mistake-2" in page.specs()


@pytest.mark.parametrize(
    ("verdicts", "test", "said"),
    [
        (["met"] * 6, True, "All 6 targets reached on 60 test windows."),
        (["met, may be luck"] * 6, True, "All 6 targets reached on 60 test windows; all of them may be luck."),
        (
            ["met", "met, may be luck", "met", "met", "met", "met, may be luck"],
            True,
            "All 6 targets reached on 60 test windows; macro-F1 and SHORT recall may be luck.",
        ),
        (["missed", *["met"] * 5], True, "1 of 6 targets missed on 60 test windows: accuracy."),
        (
            ["missed", "missed", "missed", "met", "met, may be luck", "met"],
            False,
            (
                "3 of 6 targets missed on 30 validation windows: accuracy, macro-F1 and LONG precision; LONG recall "
                "may be luck. These rows were also used to choose the epoch, so the scores are optimistic."
            ),
        ),
    ],
)
def test_the_headline_names_targets_missed_and_those_that_may_be_luck(
    run: Path, verdicts: list[str], test: bool, said: str
) -> None:
    summary = summary_of(run)
    for target, verdict in zip(summary["targets"], verdicts, strict=True):
        target |= {"verdict": verdict}
    if not test:
        summary |= {"test": None, "judged_rows_chose_the_epoch": True}
    assert headline(Summary.model_validate(summary)) == said


def test_a_summary_of_an_older_version_is_refused_with_the_way_out(
    run: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    summary = summary_of(run)
    del summary["data"]["extent"]
    (tmp_path / "training_summary.json").write_bytes(orjson.dumps(summary))
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 65
    (line,) = errors(capfd.readouterr().err)
    assert line == (
        f"{tmp_path}/training_summary.json: must be the summary of a finished run, but it lacks data.extent. "
        f"Run ctxtrain export {tmp_path} to write it again."
    )


@pytest.mark.parametrize("content", [b"", b'{"data": {"extent"', b"\xff", b"[]", b"{}", b'{"data": null}'])
def test_a_summary_that_is_damaged_is_refused_by_its_name(
    tmp_path: Path, capfd: pytest.CaptureFixture[str], content: bytes
) -> None:
    (tmp_path / "training_summary.json").write_bytes(content)
    with pytest.raises(SystemExit) as ended:
        main(["report", str(tmp_path)])
    assert ended.value.code == 65
    (line,) = errors(capfd.readouterr().err)
    assert line.startswith(f"{tmp_path}/training_summary.json: must be the summary of a finished run, ")
    assert line.endswith(f"Run ctxtrain export {tmp_path} to write it again.")
