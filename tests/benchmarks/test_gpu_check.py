"""benchmarks/gpu_check.py in processes of its own: all parts on a CPU, and parts that cannot end well."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
PARTS = range(1, 12)
NEED_CUDA = {6, 9}


class Checked(NamedTuple):
    """`lines` are those of the parts, by number."""

    code: int
    machine: dict[str, Any]
    lines: dict[int, dict[str, Any]]
    table: list[str]


def check(folder: Path, *words: str, path: Path | None = None, python: tuple[str, ...] = ()) -> Checked:
    """Run the script with a scratch folder of its own, which must be empty afterwards."""
    scratch = folder / "scratch"
    scratch.mkdir()
    environment = os.environ | {"TMPDIR": str(scratch), "OMP_NUM_THREADS": "1"}
    environment |= {"PYTHONPATH": str(path)} if path else {}
    command = [sys.executable, *python, str(ROOT / "benchmarks" / "gpu_check.py"), "--cpu", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=3600)
    printed = done.stdout.splitlines()
    records = [json.loads(line) for line in printed if line.startswith("{")]
    assert records, done.stderr
    assert list(scratch.iterdir()) == []
    numbers = [line["part"] for line in records[1:]]
    assert len(set(numbers)) == len(numbers), "a part has one line"
    return Checked(done.returncode, records[0], dict(zip(numbers, records[1:], strict=True)), printed[len(records) :])


def test_all_parts_without_cuda_pass_at_tiny_size(tmp_path: Path) -> None:
    output = tmp_path / "lines.jsonl"
    found = check(tmp_path, "--size", "tiny", "--output", str(output))
    statuses = {number: line["status"] for number, line in found.lines.items()}
    assert statuses == {number: "not run" if number in NEED_CUDA else "ok" for number in PARTS}, found.lines
    assert found.code == 0
    assert {line["device"] for line in found.lines.values()} == {"cpu"}
    assert {found.lines[number]["why"] for number in NEED_CUDA} == {"needs a GPU with CUDA"}
    assert found.machine["missing"] == []
    assert found.lines[2]["same_bits_resumed"] is True
    assert {found.lines[10][name]["exit_code"] for name in ("ddp", "fsdp2")} == {0}
    assert found.lines[4]["losses_agree"] <= 1e-5
    for number in PARTS:
        assert any(row.startswith(f"{number:>2}  {found.lines[number]['name']}") for row in found.table)
    assert found.table[-1] == "11 parts, 0 failed or timed out"
    assert max(map(len, found.table)) <= 80
    written = [json.loads(line) for line in output.read_text().splitlines()]
    assert written == [found.machine, *found.lines.values()]


def test_a_part_beyond_its_cap_is_ended_and_the_next_runs(tmp_path: Path) -> None:
    found = check(tmp_path, "--parts", "2", "11", "--cap", "2=2")
    assert (found.lines[2]["status"], found.lines[11]["status"]) == ("timed out", "ok")
    assert 2 <= found.lines[2]["seconds"] < 60
    assert found.code == 1
    assert found.table[-1] == "2 parts, 1 failed or timed out"


def test_a_part_that_fails_says_why_and_the_next_runs(tmp_path: Path) -> None:
    broken = tmp_path / "packages" / "transformers" / "__init__.py"
    broken.parent.mkdir(parents=True)
    broken.write_text("raise ImportError('a library of this package is missing')\n")
    found = check(tmp_path, "--parts", "3", "1", path=tmp_path / "packages")
    assert list(found.lines) == [3, 1]
    assert found.lines[3]["status"] == "failed"
    assert found.lines[3]["why"] == "ImportError: a library of this package is missing"
    assert "families.py" in "".join(found.lines[3]["log"])
    assert (found.lines[1]["status"], found.code) == ("ok", 1)


def test_parts_that_need_no_missing_package_run(tmp_path: Path) -> None:
    """Python reads links to all installed packages but two."""
    links, installed = tmp_path / "packages", Path(torch.__file__).parents[1]
    links.mkdir()
    for place in installed.iterdir():
        if not place.name.startswith(("orjson", "pydantic")):
            (links / place.name).symlink_to(place)
    found = check(tmp_path, "--parts", "1", "3", "4", "11", path=links, python=("-S",))
    assert found.machine["missing"] == ["orjson", "pydantic"]
    assert found.machine["install"] == "pip install 'orjson>=3.10' 'pydantic>=2.10'"
    statuses = [(number, line["status"]) for number, line in found.lines.items()]
    assert statuses == [(1, "ok"), (3, "ok"), (4, "not run"), (11, "ok")]
    assert found.lines[4]["why"] == "missing: pydantic, orjson"
    assert found.code == 0
