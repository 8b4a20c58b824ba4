"""Fill the last column of docs/reliability.md with what `make torture` measured.

python -m tests.reliability.page
"""

from __future__ import annotations

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
FIGURES = ROOT / ".cache" / "figures"
PAGE = ROOT / "docs" / "reliability.md"


def rows(page: str) -> list[list[str]]:
    """The cells of every row of a promise: id, promise, proof, last full run."""
    lines = [line for line in page.splitlines() if line.startswith("| ") and not line.startswith(("| id", "|--"))]
    return [[cell.strip() for cell in line.strip("|").split(" | ")] for line in lines]


def fill(page: str, figures: dict[str, str]) -> str:
    """The page with the figures in their rows; a row without a new figure keeps its old one."""
    lines = []
    for line in page.splitlines():
        cells = rows(line)
        if cells and cells[0][0] in figures:
            line = f"| {' | '.join([*cells[0][:3], figures[cells[0][0]]])} |"  # noqa: PLW2901
        lines.append(line)
    return "\n".join(lines) + "\n"


def main() -> None:
    sums: dict[str, dict[str, list[int]]] = {}
    for file in sorted(FIGURES.glob("*.json")):
        promise, text, counts = json.loads(file.read_text())
        so_far = sums.setdefault(promise, {}).setdefault(text, [0] * len(counts))
        sums[promise][text] = [one + other for one, other in zip(so_far, counts, strict=True)]
    figures = {
        promise: "; ".join(text.format(*(f"{count:,}" for count in counts)) for text, counts in texts.items())
        for promise, texts in sums.items()
    }
    PAGE.write_text(fill(PAGE.read_text(), figures))


if __name__ == "__main__":
    main()
