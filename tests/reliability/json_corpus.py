"""Texts that RFC 8259 forbids, and texts that it allows: own ones, of the classes of JSONTestSuite (github.com/nst).

Its files `n_*` are REFUSED here, its `y_*` ACCEPTED; TWICE are the accepted ones with a key twice, which rows may not
have. `json/*.txt` hold a bytes literal a line; those that only count are made here.
"""

from ast import literal_eval
from pathlib import Path


def cases(name: str) -> list[bytes]:
    lines = (Path(__file__).parent / "json" / f"{name}.txt").read_text(encoding="utf-8").splitlines()
    return [literal_eval(line) for line in lines]


REFUSED = [
    *cases("refused"),
    b"[" * 100_000,
    b'[{"":' * 50_000,
    b'{"a":' * 5_000 + b"1" + b"}" * 5_000,
    b"[" * 1_100 + b"]" * 1_100,
]
TWICE = [*cases("twice"), b'{"a":' * 500 + b'{"b":1,"b":2}' + b"}" * 500]
ACCEPTED = [
    *cases("accepted"),
    b"[" * 800 + b"]" * 800,
    b'{"a":' * 800 + b"1" + b"}" * 800,
    b"[" + b",".join([b"1"] * 5_000) + b"]",
]
