"""H: the page of promises and the tests that prove them name each other."""

import ast
from collections.abc import Iterator
from pathlib import Path

from tests.reliability.page import PAGE, ROOT, fill, rows

NOT_YET = "not run in full yet"


def marked() -> Iterator[tuple[str, str, str]]:
    """Promise, module and name of every test that is marked with promises."""
    for path in sorted((ROOT / "tests").rglob("test_*.py")):
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.FunctionDef):
                for mark in node.decorator_list:
                    if isinstance(mark, ast.Call) and ast.unparse(mark.func) == "pytest.mark.promise":
                        for promise in mark.args:
                            yield ast.literal_eval(promise), path.stem, node.name


def test_every_promise_has_a_test_and_every_mark_a_promise() -> None:
    promised = [row[0] for row in rows(PAGE.read_text("utf-8"))]
    assert len(promised) == len(set(promised))
    assert {promise for promise, _, _ in marked()} == set(promised)


def test_the_page_names_the_module_of_each_proof() -> None:
    modules: dict[str, set[str]] = {}
    for promise, module, _ in marked():
        modules.setdefault(promise, set()).add(module)
    for promise, _, proof, _ in rows(PAGE.read_text("utf-8")):
        assert {f"`{module}`" for module in modules[promise]} == set(proof.split(", ")), promise


def test_figures_go_into_their_rows_and_nowhere_else() -> None:
    page = (
        "| id | promise | proof | last full run |\n|---|---|---|---|\n| A1 | it holds | `test_x` | old |\ntext | A1 |\n"
    )
    assert fill(page, {"A1": "300 kills"}) == page.replace("| old |", "| 300 kills |")
    assert fill(page, {}) == page


def test_every_row_has_its_figure_or_says_that_it_was_not_run_in_full() -> None:
    silent = [
        row[0] for row in rows(PAGE.read_text("utf-8")) if not any(map(str.isdigit, row[3])) and row[3] != NOT_YET
    ]
    assert silent == []


def test_the_page_is_where_the_tests_look() -> None:
    assert Path("docs/reliability.md") == PAGE.relative_to(ROOT)
