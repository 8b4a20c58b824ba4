"""Texts that RFC 8259 forbids, and texts that it allows: the files of JSONTestSuite, and own ones.

SUITE holds the suite's files by name: `n_*` is forbidden, `y_*` allowed, about `i_*` a parser decides. REFUSED, TWICE
and ACCEPTED add what the suite lacks; TWICE are texts with a key twice, which RFC 8259 allows and rows may not have.
`json/*.txt` hold a bytes literal a line; those that only count are made here.
"""

from ast import literal_eval
from pathlib import Path

FOLDER = Path(__file__).parent / "json"


def lines(name: str) -> list[str]:
    read = (FOLDER / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [line for line in read if not line.startswith("#")]


def cases(name: str) -> list[bytes]:
    return [literal_eval(line) for line in lines(name)]


SUITE: dict[str, bytes] = {
    **{name: literal_eval(text) for name, _, text in (line.partition(" ") for line in lines("json_test_suite"))},
    "n_structure_100000_opening_arrays.json": b"[" * 100_000,
    "n_structure_open_array_object.json": b'[{"":' * 50_000 + b"\n",
}
BLANK = "n_single_space.json"  # alone it is no JSON; among rows it is a blank line, which is no row
SUITE_TWICE = ["y_object_duplicated_key.json", "y_object_duplicated_key_and_value.json"]

REFUSED = [
    *(text for name, text in SUITE.items() if name.startswith("n_") and name != BLANK),
    *cases("refused"),
    b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    b"[" * 1_100 + b"]" * 1_100,
]
TWICE = [*(SUITE[name] for name in SUITE_TWICE), *cases("twice"), b'{"a":' * 500 + b'{"b":1,"b":2}' + b"}" * 500]
ACCEPTED = [
    *(text for name, text in SUITE.items() if name.startswith("y_") and name not in SUITE_TWICE),
    *cases("accepted"),
    b"[" * 800 + b"]" * 800,
    b'{"a":' * 800 + b"1" + b"}" * 800,
    b"[" + b",".join([b"1"] * 5_000) + b"]",
]
