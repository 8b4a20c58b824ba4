"""The report in a real browser: it draws, asks nobody for anything, and can be read by everyone on any screen.

Needs a Chromium on the path (Debian: `apt-get install chromium`); without one these tests are skipped and say so.
"""

import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
from axe_playwright_python.sync_playwright import Axe
from playwright.sync_api import sync_playwright

from tests.conftest import Needs
from tests.reported import CHARTS, HOSTILE, SECTIONS, finished_run, summary_of

NAMES = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next((found for found in map(shutil.which, NAMES) if found), None)
PHONE, DESKTOP = 390, 1280
SCREENS = [(scheme, width) for scheme in ("light", "dark") for width in (PHONE, DESKTOP)]
# Contrast of every piece of chart text with the card that it stands on (WCAG 2.2, 1.4.3), for pages of one background.
CONTRASTS = """() => {
  const light = (color) => {
    const [r, g, b] = color.match(/[\\d.]+/g).slice(0, 3).map((v) => v / 255)
      .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
    return 0.2126 * r + 0.7152 * g + 0.0722 * b;
  };
  return [...document.querySelectorAll(".chart text")].filter((text) => text.textContent).map((text) => {
    const card = getComputedStyle(text.closest("section")).backgroundColor;
    const pair = [getComputedStyle(text).fill, card].map(light);
    return [text.textContent, (Math.max(...pair) + 0.05) / (Math.min(...pair) + 0.05)];
  });
}"""

# Of each horizontal axis: the name of its chart, its labels, the smallest gap between two in pixels, where they anchor.
X_AXES = """() => [...document.querySelectorAll(".chart .role-axis-label")].map((axis) => {
  const labels = [...axis.querySelectorAll("text")].filter((label) => label.getAttribute("opacity") !== "0");
  const boxes = labels.map((label) => label.getBoundingClientRect()).sort((a, b) => a.left - b.left);
  return {
    chart: axis.closest(".chart").id,
    level: boxes.every((box) => Math.abs(box.top - boxes[0].top) < 1),
    labels: labels.map((label) => label.textContent),
    gap: Math.min(...boxes.slice(1).map((box, i) => box.left - boxes[i].right)),
    anchors: [...new Set(labels.map((label) => label.getAttribute("text-anchor")))],
  };
}).filter((axis) => axis.level && axis.labels.length > 1)"""


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return finished_run(tmp_path_factory.mktemp("browsed")) if CHROMIUM else Path()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    if CHROMIUM is None:
        yield None
        return
    with sync_playwright() as playwright:
        started = playwright.chromium.launch(executable_path=CHROMIUM)
        yield started
        started.close()


class Heard(list[str]):
    """Everything that a page said or asked for beside its own file."""


Open = Callable[[str, int], tuple[Any, Heard]]


@pytest.fixture
def opened(needs: Needs, browser: Any, run: Path) -> Iterator[Open]:
    """`opened(scheme, width)`: the report with all charts drawn, and what was heard meanwhile and since."""
    needs(browser is not None, f"a browser on the path: {', '.join(NAMES)}")
    contexts = []

    def visit(scheme: str, width: int) -> tuple[Any, Heard]:
        context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900})
        contexts.append(context)
        page, heard, address = context.new_page(), Heard(), (run / "report.html").as_uri()
        page.on("console", lambda message: heard.append(message.text))
        page.on("pageerror", lambda error: heard.append(str(error)))
        page.on("request", lambda request: heard.append(request.url) if request.url != address else None)
        page.goto(address)
        page.wait_for_selector("html[data-charts=drawn]", state="attached")
        return page, heard

    yield visit
    for context in contexts:
        context.close()


@pytest.mark.parametrize(("scheme", "width"), SCREENS)
def test_it_draws_every_chart_in_silence_and_fits_the_screen(opened: Open, scheme: str, width: int) -> None:
    page, heard = opened(scheme, width)
    assert page.eval_on_selector_all("section", "all => all.map((one) => one.id)") == SECTIONS
    marks = page.eval_on_selector_all(".chart", "all => all.map((one) => one.querySelectorAll('svg path').length)")
    assert len(marks) == CHARTS
    assert min(marks) > 5
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    wider = page.eval_on_selector_all(
        ".chart svg", "all => all.filter((one) => one.clientWidth > one.closest('section').clientWidth).length"
    )
    assert wider == 0
    assert heard == []


@pytest.mark.parametrize("width", [PHONE, DESKTOP])
def test_labels_stand_under_their_ticks_apart_from_each_other(opened: Open, width: int) -> None:
    page, _ = opened("light", width)
    axes = page.evaluate(X_AXES)
    assert len(axes) == CHARTS
    assert [axis for axis in axes if axis["anchors"] != ["middle"] or axis["gap"] < 4] == []
    leads = next(axis for axis in axes if axis["chart"] == "chart-leads")
    assert [label for label in leads["labels"] if float(label.replace("\N{MINUS SIGN}", "-")) == 0] != []


def test_on_a_phone_targets_fit_and_wider_tables_show_that_they_scroll(opened: Open) -> None:
    page, _ = opened("light", PHONE)
    wide = page.eval_on_selector_all(
        ".scroll, pre",
        "all => all.filter((one) => one.scrollWidth > one.clientWidth)"
        ".map((one) => [one.ariaLabel, getComputedStyle(one).backgroundAttachment])",
    )
    assert "Scores by class" in dict(wide)
    assert {"Targets", "Command"}.isdisjoint(dict(wide))
    assert {shadow for _, shadow in wide} == {"local, local, scroll, scroll"}


@pytest.mark.parametrize(("scheme", "width"), [("light", PHONE), ("dark", DESKTOP)])
def test_axe_finds_nothing_to_object_to(opened: Open, scheme: str, width: int) -> None:
    page, heard = opened(scheme, width)
    page.eval_on_selector_all("details", "all => all.forEach((one) => { one.open = true; })")
    found = Axe().run(page).response
    assert [(rule["id"], [node["html"] for node in rule["nodes"]]) for rule in found["violations"]] == []
    assert {"color-contrast", "heading-order", "role-img-alt"} <= {rule["id"] for rule in found["passes"]}
    assert heard == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_the_text_of_charts_stands_out_in_both_themes(opened: Open, scheme: str) -> None:
    page, _ = opened(scheme, DESKTOP)
    contrasts = page.evaluate(CONTRASTS)
    assert len(contrasts) > 100
    assert [found for found in contrasts if found[1] < 4.5] == []


def test_charts_follow_a_change_of_theme(opened: Open) -> None:
    page, _ = opened("light", DESKTOP)
    fill = "document.querySelector('#chart-targets .mark-symbol path')"
    before = page.evaluate(f"getComputedStyle({fill}).fill")
    page.emulate_media(color_scheme="dark")
    after = page.evaluate(f"getComputedStyle({fill}).fill")
    assert before.startswith("rgb(")
    assert before != after


def test_pointing_at_a_mark_shows_its_values(opened: Open, run: Path) -> None:
    page, heard = opened("light", DESKTOP)
    page.locator("#chart-targets .mark-symbol path").first.hover()
    tip = page.locator("#vg-tooltip-element.visible")
    tip.wait_for()
    assert f"{summary_of(run)['test']['accuracy']:.3f}" in tip.inner_text()
    page.locator("#chart-mistake-1 .mark-rect.role-mark path").last.hover()
    volume = summary_of(run)["mistakes"][0]["bars"]["volume"][-1]
    page.wait_for_function("document.querySelector('#vg-tooltip-element').innerText.includes('volume')")
    assert f"{volume:g}" in tip.inner_text()
    assert heard == []


def test_the_keyboard_alone_reaches_the_tables(opened: Open) -> None:
    page, _ = opened("light", PHONE)
    page.keyboard.press("Tab")
    assert page.evaluate("document.activeElement.textContent") == "Skip to the results"
    page.keyboard.press("Enter")
    assert page.evaluate("location.hash") == "#targets"
    table = page.locator("#learning details").first
    assert not table.locator("table").is_visible()
    while not page.evaluate("document.activeElement.matches('#learning summary')"):
        page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    assert table.locator("table").is_visible()


def test_hostile_words_stay_words(opened: Open) -> None:
    page, _ = opened("light", DESKTOP)
    assert page.evaluate("window.taken === undefined")
    assert page.locator("#mistakes h3", has_text=HOSTILE).count() == 6
    assert page.locator("img").count() == 0


def test_the_policy_stops_a_script_that_is_not_the_report_s_own(opened: Open) -> None:
    page, heard = opened("light", DESKTOP)
    page.evaluate(
        "document.body.append(Object.assign(document.createElement('script'), { textContent: 'window.taken = 3' }))"
    )
    page.evaluate("document.body.append(Object.assign(document.createElement('img'), { src: 'http://127.0.0.1:9/x' }))")
    page.wait_for_timeout(200)
    assert page.evaluate("window.taken === undefined")
    assert [said for said in heard if "Content Security Policy" in said] == [said for said in heard if " " in said]
    assert len(heard) == 3  # two refusals, and the request that was refused
