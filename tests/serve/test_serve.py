"""The server: real processes, real HTTP, the answers of `ctxtrain predict`, and an end that loses no request."""

import http.client
import json
import os
import random
import re
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any, get_args

import orjson
import pytest
import requests
import schemathesis
from hypothesis import HealthCheck, given, seed, settings
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families
from safetensors.torch import load_file, save_file
from schemathesis import GenerationMode
from schemathesis.core.result import Ok
from schemathesis.specs.openapi.checks import positive_data_acceptance
from transformers import AutoTokenizer

from ctxtrain import Config, TrainingPipeline
from ctxtrain.cli.process import main
from ctxtrain.data.parse_window import parse_row
from ctxtrain.data.row_schema import BAR_FIELDS
from ctxtrain.serve.refusals import Code
from ctxtrain.serve.server import bind_socket
from ctxtrain.storage.atomic_files import sha256_file, write_manifest
from tests.conftest import Amount
from tests.helpers import Row, bars_of, learnable_rows, make_row, write_rows
from tests.reliability.json_corpus import ACCEPTED, REFUSED, TWICE
from tests.tiny_models import build_tiny

pytestmark = pytest.mark.slow

JSON = {"Content-Type": "application/json"}
SECONDS = 60
BODY_LIMIT, QUEUE = 300_000, 40
WALK = 10  # generated requests of one seed
LIMITS = ("--max-body-bytes", str(BODY_LIMIT), "--queue", str(QUEUE))
PATIENT = ("--max-wait-ms", "10000")  # nothing is answered before --max-batch windows wait, or the drain begins


@dataclass
class Reply:
    status: int
    headers: http.client.HTTPMessage
    body: Any  # decoded where it is JSON


@dataclass
class Served:
    """A server process that answers."""

    process: subprocess.Popen[str]
    host: str
    port: int
    version: str
    dtype: str  # as it says when it is ready

    @property
    def url(self) -> str:
        return f"http://{self.host}:{self.port}"

    def ask(self, path: str, value: object = None, **headers: str) -> Reply:
        """POST a value as JSON, or bytes as they are; GET without one."""
        body = value if isinstance(value, bytes) or value is None else orjson.dumps(value)
        return self.send("GET" if body is None else "POST", path, body, JSON | headers)

    def send(self, method: str, path: str, body: Any, headers: dict[str, str]) -> Reply:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=SECONDS)
        try:
            connection.request(method, path, body, headers, encode_chunked="Transfer-Encoding" in headers)
            return reply(connection)
        finally:
            connection.close()

    def metrics(self) -> dict[tuple[str, ...], float]:
        """(name, label value, …) → value."""
        text = self.ask("/metrics").body.decode()
        samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
        return {(sample.name, *map(str, sample.labels.values())): sample.value for sample in samples}

    def until(self, true: Callable[[Any], bool]) -> None:
        """Wait until it holds of what /health says."""
        while not true(self.ask("/health").body):
            time.sleep(0.01)


def reply(connection: http.client.HTTPConnection) -> Reply:
    response = connection.getresponse()
    body = response.read()
    is_json = response.headers["Content-Type"] == "application/json"
    return Reply(response.status, response.headers, orjson.loads(body) if is_json else body)


@contextmanager
def served(model: Path, *options: str) -> Iterator[Served]:
    command = [sys.executable, "-m", "ctxtrain", "serve", str(model), "--port", "0", *options]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            told = re.fullmatch(r"model (\w+) answers in (\w+) at http://([\d.]+):(\d+)\n", process.stdout.readline())
            assert told
            yield Served(process, told[3], int(told[4]), told[1], told[2])
        finally:
            process.kill()


@dataclass
class Trained:
    model: Path
    rows: list[Row]
    predictions: list[dict[str, Any]]  # what `ctxtrain predict` gives for them


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Trained:
    folder = tmp_path_factory.mktemp("trained")
    rows = [make_row(bars=30 + seed % 21, seed=seed, drift=seed % 3 - 1, flags=False) for seed in range(36)]
    config = Config.parse(
        {
            "data": {
                "train": str(write_rows(folder / "train.jsonl", learnable_rows(46, seed=1))),
                "val": str(write_rows(folder / "val.jsonl", learnable_rows(20, seed=2))),
            },
            "model": {"base": str(build_tiny(folder / "base")), "max_tokens": 512},
            "training": {"epochs": 1, "warmup_steps": 1, "learning_rate": 1e-2, "gradient_accumulation": 1},
            "output_dir": str(folder / "run"),
        }
    )
    TrainingPipeline(config).run()
    model, out = folder / "run" / "final_model.zip", folder / "predictions.jsonl"
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(model), str(write_rows(folder / "rows.jsonl", rows)), "-o", str(out)])
    assert ended.value.code == 0
    return Trained(model, rows, [json.loads(line) for line in out.read_text().splitlines()])


@pytest.fixture(scope="module")
def server(trained: Trained) -> Iterator[Served]:
    with served(trained.model, *LIMITS) as server:
        yield server


@pytest.fixture(scope="module")
def text_model(trained: Trained, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same export as a model of text rows, which knows no number for `~`."""
    export = shutil.copytree(trained.model.parent / "export", tmp_path_factory.mktemp("text") / "export")
    (export / "codec.json").write_text(json.dumps({"kind": "text", "version": 1, "fields": [], "features": {}}))
    weights = load_file(export / "model.safetensors")
    (token,) = AutoTokenizer.from_pretrained(export)("~")["input_ids"]
    weights["model.embed_tokens.weight"][token] = float("nan")
    save_file(weights, export / "model.safetensors", {"format": "pt"})
    write_manifest(export)
    return export


@pytest.fixture(scope="module")
def text_server(text_model: Path) -> Iterator[Served]:
    with served(text_model, *LIMITS) as server:
        yield server


def assert_same(answer: dict[str, Any], expected: dict[str, Any]) -> None:
    assert (answer["id"], answer["label"]) == (expected["id"], expected["label"])
    assert answer["confidence"] == pytest.approx(expected["confidence"], abs=1e-6, rel=0)
    assert answer["probabilities"] == pytest.approx(expected["probabilities"], abs=1e-6, rel=0)


# Answers


def test_a_row_gets_the_answer_of_predict(server: Served, trained: Trained) -> None:
    assert len({json.dumps(expected["probabilities"]) for expected in trained.predictions}) == len(trained.rows)
    for row, expected in zip(trained.rows, trained.predictions, strict=True):
        answer = server.ask("/predict", row)
        assert answer.status == 200
        assert answer.body.keys() == expected.keys() | {"processing_time_ms", "model_version"}
        assert_same(answer.body, expected)
        assert answer.body["model_version"] == server.version
        assert answer.body["processing_time_ms"] > 0


def test_a_batch_gets_the_answers_of_predict(server: Served, trained: Trained) -> None:
    answer = server.ask("/predict/batch", {"rows": trained.rows})
    assert (answer.status, answer.body["model_version"]) == (200, server.version)
    for one, expected in zip(answer.body["predictions"], trained.predictions, strict=True):
        assert one.keys() == expected.keys()
        assert_same(one, expected)


def test_concurrent_requests_get_each_its_own_answer(server: Served, trained: Trained) -> None:
    with ThreadPoolExecutor(12) as pool:
        for answer, expected in zip(
            pool.map(lambda row: server.ask("/predict", row), trained.rows * 3), trained.predictions * 3, strict=True
        ):
            assert answer.status == 200
            assert_same(answer.body, expected)


def test_the_version_is_the_start_of_the_hash_of_the_manifest(server: Served, trained: Trained) -> None:
    assert server.version == sha256_file(trained.model.parent / "export" / "manifest.json")[:16]


def test_it_answers_in_the_dtype_that_is_named_and_says_so(trained: Trained, tmp_path: Path) -> None:
    out = tmp_path / "coarse.jsonl"
    rows = write_rows(tmp_path / "rows.jsonl", trained.rows[:4])
    with pytest.raises(SystemExit):
        main(["predict", str(trained.model), str(rows), "-o", str(out), "--dtype", "bfloat16"])
    expected = [json.loads(line) for line in out.read_text().splitlines()]
    with served(trained.model, "--dtype", "bfloat16") as coarse:
        assert coarse.dtype == coarse.ask("/health").body["dtype"] == "bfloat16"
        assert coarse.metrics()["ctxtrain_model", "bfloat16", coarse.version] == 1
        for answer, one, fine in zip(
            coarse.ask("/predict/batch", {"rows": trained.rows[:4]}).body["predictions"],
            expected,
            trained.predictions[:4],
            strict=True,
        ):
            assert_same(answer, one)
            assert abs(answer["confidence"] - fine["confidence"]) > 1e-6


def test_a_request_id_comes_back_and_a_strange_one_is_replaced(server: Served) -> None:
    assert server.ask("/health", **{"X-Request-ID": "order-17.a"}).headers["X-Request-ID"] == "order-17.a"
    assert server.ask("/predict", b"{", **{"X-Request-ID": "order-17.b"}).headers["X-Request-ID"] == "order-17.b"
    strange = [server.ask("/nowhere", **{"X-Request-ID": 'a"b'}).headers["X-Request-ID"] for _ in range(2)]
    assert all(re.fullmatch("[0-9a-f]{32}", name) for name in strange)
    assert strange[0] != strange[1]


# Refusals


def assert_refused(reply: Reply, status: int, code: str) -> list[str]:
    """The details of an error."""
    assert reply.status == status, reply.body
    assert reply.body.keys() == {"error", "code", "details"}
    assert reply.body["code"] == code
    assert reply.body["error"]
    assert reply.headers["X-Request-ID"]
    return reply.body["details"]


def row_bytes(**changes: object) -> bytes:
    return orjson.dumps(make_row(flags=False, **changes))  # type: ignore[arg-type]  # fields of the row


@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"{",
        row_bytes()[:-1],
        row_bytes() + b"{}",
        row_bytes().replace(b'"volume":', b'"volume":NaN,"x":', 1),
        row_bytes().replace(b'"volume":', b'"volume":1,"volume":', 1),
        row_bytes().replace(b'"GC"', b'"\xff"'),
        b"\xef\xbb\xbf" + row_bytes(),
    ],
)
def test_what_is_no_json_is_400(server: Served, body: bytes) -> None:
    for path in ("/predict", "/predict/batch"):
        reply = server.ask(path, body)
        assert assert_refused(reply, 400, "invalid_json") == []
        assert "not valid JSON at line 1, column " in reply.body["error"]


def test_json_is_taken_and_refused_as_predict_does(server: Served) -> None:
    for text in (*REFUSED, *TWICE):
        assert_refused(server.ask("/predict", text), 400, "invalid_json")
    for text in ACCEPTED:
        assert server.ask("/predict", text).status == 422, text[:80]


@pytest.mark.parametrize(
    "headers",
    [
        {},
        {"Content-Type": "text/plain"},
        {"Content-Type": "application/x-www-form-urlencoded"},
        {"Content-Type": "application/json; charset=latin-1"},
        JSON | {"Content-Encoding": "gzip"},
    ],
)
def test_other_content_is_400(server: Served, headers: dict[str, str]) -> None:
    assert_refused(server.send("POST", "/predict", row_bytes(), headers), 400, "unsupported_content")


def test_the_charset_may_be_named(server: Served) -> None:
    for kind in ("application/json; charset=utf-8", "Application/JSON;charset=UTF-8"):
        assert server.send("POST", "/predict", row_bytes(), {"Content-Type": kind}).status == 200


def test_all_faults_of_a_row_come_in_the_words_of_predict(server: Served) -> None:
    row = make_row(flags=False, id=1.5)
    row["context_bars"][3]["low"] = 9e9
    row["current_bar"]["time"] = "yesterday"
    faults = parse_row(row, "row", labelled=False)[1]
    assert len(faults) == 3
    assert assert_refused(server.ask("/predict", row), 422, "invalid_window") == faults


@pytest.mark.parametrize(
    ("row", "detail"),
    [
        (make_row(bars=19, flags=False), "a window must have 20 to 256 bars, current_bar included, got 19"),
        (make_row(bars=257, flags=False), "a window must have 20 to 256 bars, current_bar included, got 257"),
        (make_row(delta=False, flags=False), "lacks delta, which the model was trained on; add it to every bar"),
        ({"context": "up or down?"}, "the model was trained on window rows, got a text row"),
        ([make_row()], "a row must be a JSON object, got [{"),
        (b"[" * 1000 + b"]" * 1000, "a row must be a JSON object, got a value nested too deeply to show"),
        ({}, "a row must have context_bars and current_bar, or features, or context"),
    ],
    ids=["short", "long", "field", "text", "array", "deep", "empty"],
)
def test_a_row_that_is_no_window_of_the_model_is_422(server: Served, row: object, detail: str) -> None:
    assert assert_refused(server.ask("/predict", row), 422, "invalid_window")[0].startswith(detail)


def test_one_bad_row_refuses_its_batch_and_names_its_place(server: Served, trained: Trained) -> None:
    rows = [trained.rows[0], make_row(bars=19, flags=False), trained.rows[1], {"context": "?"}]
    details = assert_refused(server.ask("/predict/batch", {"rows": rows}), 422, "invalid_window")
    assert [detail.partition(":")[0] for detail in details] == ["rows[1]", "rows[3]"]
    values: tuple[object, ...] = ({}, {"rows": []}, {"rows": {}}, [], [make_row()])
    for value in values:
        (detail,) = assert_refused(server.ask("/predict/batch", value), 422, "invalid_window")
        assert detail.startswith('a batch must be {"rows": [row, …]} with at least one row')


def test_only_the_first_hundred_faults_are_listed(server: Served) -> None:
    features = {str(number): "1,5" for number in range(150)}
    for path, value in (("/predict", make_row(features=features)), ("/predict/batch", {"rows": [{}] * 40})):
        details = assert_refused(server.ask(path, value), 422, "invalid_window")
        assert len(details) == (101 if path == "/predict" else 40)
    assert server.ask("/predict", make_row(features=features)).body["details"][-1] == "… and 50 more"


def test_too_much_is_413(server: Served) -> None:
    exactly = row_bytes().ljust(BODY_LIMIT)
    assert server.ask("/predict", exactly).status == 200
    assert_refused(server.ask("/predict", exactly + b" "), 413, "body_too_large")
    pieces = (b" " * 10_000 for _ in range(BODY_LIMIT // 10_000 + 1))
    chunked = server.send("POST", "/predict", pieces, JSON | {"Transfer-Encoding": "chunked"})
    assert_refused(chunked, 413, "body_too_large")
    assert_refused(server.ask("/predict/batch", {"rows": [{}] * (QUEUE + 1)}), 413, "too_many_rows")


def test_an_endless_body_is_refused_before_its_end(server: Served) -> None:
    with socket.create_connection((server.host, server.port), timeout=SECONDS) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        client.sendall(b"Transfer-Encoding: chunked\r\n\r\n")
        client.sendall(b"%x\r\n%s\r\n" % (BODY_LIMIT + 1, b" " * (BODY_LIMIT + 1)))
        assert client.recv(1000).startswith(b"HTTP/1.1 413 ")


def test_a_client_that_leaves_in_the_middle_costs_nobody_anything(server: Served, trained: Trained) -> None:
    key = ("ctxtrain_requests_total", "/predict", "400")
    before = server.metrics().get(key, 0)
    with socket.create_connection((server.host, server.port)) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: 100\r\n\r\n{")
    while server.metrics().get(key, 0) == before:
        time.sleep(0.01)
    assert_same(server.ask("/predict", trained.rows[0]).body, trained.predictions[0])


def test_other_paths_and_methods_have_the_same_shape(server: Served) -> None:
    for path in ("/", "/predict/", "/etc/passwd", "/../../etc/passwd", "/docs/../openapi.json/x", "/%2e%2e/x"):
        assert_refused(server.ask(path), 404, "not_found")
    wrong = server.ask("/predict")
    assert_refused(wrong, 405, "method_not_allowed")
    assert wrong.headers["Allow"] == "POST"


# States, documents, metrics


def test_health_says_what_is_served(server: Served) -> None:
    for path in ("/health", "/health/ready"):
        state = server.ask(path)
        assert state.status == 200
        assert (state.body["status"], state.body["model_version"]) == ("ok", server.version)
        assert state.body["dtype"] == server.dtype == "float32"
        assert state.body["reads"] == {
            "kind": "window", "fields": ["open", "high", "low", "close", "volume", "delta"], "features": []
        }  # fmt: skip


def test_the_document_of_text_rows_is_valid(text_server: Served) -> None:
    document = text_server.ask("/openapi.json").body
    schemathesis.openapi.from_dict(document).validate()
    assert document["components"]["schemas"]["Row"]["required"] == ["context"]
    assert "Bar" not in document["components"]["schemas"]


def test_the_document_is_valid_and_complete(server: Served) -> None:
    document = server.ask("/openapi.json").body
    schemathesis.openapi.from_dict(document).validate()
    assert document["paths"].keys() == {"/predict", "/predict/batch", "/health", "/health/ready", "/metrics"}
    schemas = document["components"]["schemas"]
    assert schemas["Bar"]["properties"].keys() == {*BAR_FIELDS, "bar_index", "time"}
    assert schemas["Bar"]["required"] == ["open", "high", "low", "close", "volume"]
    assert schemas["Bar"]["anyOf"] == [{"required": ["delta"]}, {"required": ["buy_vol", "sell_vol"]}]
    assert schemas["Row"]["properties"].keys() >= {"context_bars", "current_bar", "features", "metadata", "id"}
    assert schemas["ErrorBody"]["required"] == ["error", "code", "details"]
    assert document["paths"]["/predict"]["post"]["responses"].keys() == {"200", "400", "413", "422", "503"}


def test_the_page_of_the_document_loads_nothing_from_elsewhere(server: Served) -> None:
    page = server.ask("/docs")
    assert page.headers["Content-Security-Policy"].startswith("default-src 'none'")
    text = page.body.decode()
    assert "POST /predict/batch" in text
    assert "mgann_leg_index" in text
    assert re.findall("<script|<link|<img|//", text) == []


def test_metrics_count_what_was_answered(server: Served, trained: Trained) -> None:
    before = server.metrics()
    server.ask("/predict/batch", {"rows": trained.rows})
    server.ask("/predict", b"{")
    server.ask("/nowhere/1")
    after = server.metrics()
    grown = {key: value - before.get(key, 0) for key, value in after.items() if key in before or value}
    assert grown["ctxtrain_requests_total", "/predict/batch", "200"] == 1
    assert grown["ctxtrain_requests_total", "/predict", "400"] == 1
    assert grown["ctxtrain_requests_total", "other", "404"] == 1
    assert grown["ctxtrain_request_seconds_count", "/predict/batch"] == 1
    labels = [prediction["label"] for prediction in trained.predictions]
    for label in set(labels):
        assert grown["ctxtrain_predictions_total", label] == labels.count(label)
    assert grown[("ctxtrain_confidence_count",)] == len(labels)
    assert grown[("ctxtrain_pass_windows_sum",)] == len(labels)
    assert grown[("ctxtrain_pass_windows_count",)] == grown[("ctxtrain_pass_seconds_count",)] == 2  # 32 and 4
    assert after["ctxtrain_model", "float32", server.version] == 1
    assert after[("ctxtrain_queue_windows",)] == after[("ctxtrain_draining",)] == 0
    assert after[("process_resident_memory_bytes",)] > 0


# Requests that nobody wrote


def test_generated_requests_get_answers_of_the_document_and_no_5xx(text_server: Served, amount: Amount) -> None:
    assert {200, 400, 422} <= statuses_of_generated(text_server, amount(200, 10_000))


def test_generated_windows_get_answers_of_the_document_and_no_5xx(server: Served, amount: Amount) -> None:
    assert {200, 422} <= statuses_of_generated(server, amount(20, 10_000))  # each takes a tenth of a second to make


def statuses_of_generated(server: Served, wanted: int) -> set[int]:
    """The statuses of at least so many generated requests, after each answer was compared with the document."""
    document = schemathesis.openapi.from_dict(server.ask("/openapi.json").body)
    operations = [result.ok() for result in document.get_all_operations() if isinstance(result, Ok)]
    assert len(operations) == 5
    cases = [operation.as_strategy(mode) for operation in operations for mode in GenerationMode]
    session, statuses, sent = requests.Session(), set[int](), 0

    # Many short walks: of a long one, Hypothesis makes half by changing what it has, which takes longer than new ones.
    @settings(max_examples=WALK, deadline=None, database=None, suppress_health_check=[*HealthCheck])
    @given(case=st.one_of(cases))
    def send(case: schemathesis.Case) -> None:
        nonlocal sent
        sent += 1
        response = case.call(base_url=server.url, session=session, timeout=SECONDS)
        statuses.add(response.status_code)
        assert response.status_code < 500, response.text
        case.validate_response(response, excluded_checks=[positive_data_acceptance])  # rules between fields

    for number in count():
        seed(number)(send)()
        if sent >= wanted:
            break
    return statuses


JUNK: tuple[object, ...] = (
    None,
    True,
    -1,
    0,
    1.5,
    1e15,
    1e16,
    1e308,
    2**63,
    "",
    "1",
    "NaN",
    "\u2028",
    "x" * 999,
    [],
    {},
    [[]],
)


def changed_row(rng: random.Random) -> Row:
    """A window with up to three of its values replaced, dropped or exchanged."""
    row = make_row(bars=rng.randint(29, 51), seed=rng.randrange(10**6), flags=rng.random() < 0.5)
    for _ in range(rng.randint(0, 3)):
        holder = rng.choice([row, rng.choice(bars_of(row))])
        if isinstance(holder, dict) and holder:
            name = rng.choice([*holder])
            if rng.random() < 0.2:
                del holder[name]
            else:
                holder[name] = rng.choice([*JUNK, rng.choice([*holder.values()])])
        if not isinstance(row.get("context_bars"), list) or not isinstance(row.get("current_bar"), dict):
            break
    return row


def test_rows_changed_at_random_are_judged_as_predict_judges_them(server: Served, amount: Amount) -> None:
    rng, statuses = random.Random(5), []
    for _ in range(amount(150, 10_000)):
        body = orjson.dumps(changed_row(rng))
        reply = server.ask("/predict", body)
        window, faults = parse_row(orjson.loads(body), "row", labelled=False)
        assert reply.status == (200 if window and {"volume", "delta"} <= window.bars.keys() else 422), body
        if faults:
            assert reply.body["details"] == faults
        statuses.append(reply.status)
    assert min(statuses.count(200), statuses.count(422)) > len(statuses) // 10


# Passes, the queue, and the end


def test_a_full_queue_and_a_drain(trained: Trained) -> None:
    """Six windows fill a queue whose pass would take eight; a body that is half there keeps the drain open."""
    body = orjson.dumps(trained.rows[9])
    options = (*PATIENT, "--max-batch", "8", "--queue", "6")
    with served(trained.model, *options) as server, ThreadPoolExecutor(6) as pool:
        early = [pool.submit(server.ask, "/predict", row) for row in trained.rows[:6]]
        server.until(lambda health: health["waiting"] == 6)
        full = server.ask("/predict", trained.rows[6])
        assert_refused(full, 503, "queue_full")
        assert full.headers["Retry-After"] == "1"
        assert_refused(server.ask("/predict/batch", {"rows": trained.rows[:2]}), 503, "queue_full")
        late = http.client.HTTPConnection(server.host, server.port, timeout=SECONDS)
        late.putrequest("POST", "/predict")
        for name, value in {**JSON, "Content-Length": str(len(body))}.items():
            late.putheader(name, value)
        late.endheaders(body[:100])
        server.ask("/health")  # so that the other request was read before the signal

        server.process.send_signal(signal.SIGTERM)
        server.until(lambda health: health["status"] == "draining")
        for future, expected in zip(early, trained.predictions[:6], strict=True):
            assert future.result().status == 200
            assert_same(future.result().body, expected)
        refused = server.ask("/predict", trained.rows[7])
        assert_refused(refused, 503, "draining")
        assert (refused.headers["Retry-After"], refused.headers["Connection"]) == ("1", "close")
        assert_refused(server.ask("/health/ready"), 503, "draining")
        assert server.metrics()[("ctxtrain_draining",)] == 1
        assert server.process.poll() is None
        late.send(body[100:])
        answer = reply(late)
        assert answer.status == 200
        late.close()
        assert_same(answer.body, trained.predictions[9])
        assert server.process.wait(SECONDS) == 0


def test_a_drain_under_load_answers_every_request(trained: Trained) -> None:
    """Eight clients ask on until they are refused; whatever they began before the signal gets an answer."""
    with served(trained.model) as server, ThreadPoolExecutor(8) as pool:
        signalled: list[bool] = []

        def ask_on(client: int) -> tuple[int, int]:
            """How many were answered, and the status of the first that was not; 0 once the port is closed."""
            for number in range(10**6):
                one = (client + number) % len(trained.rows)
                before = not signalled
                try:
                    answer = server.ask("/predict", trained.rows[one])
                except (ConnectionError, http.client.HTTPException):
                    assert not before
                    return number, 0
                if answer.status != 200:
                    return number, answer.status
                assert_same(answer.body, trained.predictions[one])
            raise AssertionError

        clients = [pool.submit(ask_on, client) for client in range(8)]
        while server.metrics()[("ctxtrain_pass_windows_count",)] < 20:
            time.sleep(0.01)
        signalled.append(True)
        server.process.send_signal(signal.SIGTERM)
        ends = [client.result() for client in clients]
        assert {status for _, status in ends} <= {0, 503}
        assert min(answered for answered, _ in ends) > 0
        assert server.process.wait(SECONDS) == 0


def test_a_second_signal_ends_at_once(trained: Trained) -> None:
    with served(trained.model) as server, socket.create_connection((server.host, server.port)) as client:
        client.sendall(b"POST /predict HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n")
        client.sendall(b"Content-Length: 100\r\n\r\n{")  # the drain waits for the rest
        server.ask("/health")
        server.process.send_signal(signal.SIGINT)
        server.until(lambda health: health["status"] == "draining")
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(SECONDS) == 143


def test_a_window_that_the_model_cannot_answer_fails_alone(text_model: Path) -> None:
    """Three rows make one pass, and two of them are answered."""
    options = (*PATIENT, "--max-batch", "3", "--min-confidence", "1")
    with served(text_model, *options) as server, ThreadPoolExecutor(3) as pool:
        texts = ["up", "~", "down"]
        up, broken, down = pool.map(lambda text: server.ask("/predict", {"context": text, "id": text}), texts)
        assert assert_refused(broken, 422, "invalid_window") == ["row: the model gives no finite logits"]
        for name, answer in (("up", up), ("down", down)):
            assert (answer.status, answer.body["id"]) == (200, name)
            assert (answer.body["label"], answer.body["abstained"]) == ("SKIP", True)
        assert_refused(server.ask("/predict", make_row()), 422, "invalid_window")
        assert server.metrics()[("ctxtrain_abstentions_total",)] == 2
        rows = [{"context": text} for text in ("~", "up", "~~")]
        details = assert_refused(server.ask("/predict/batch", {"rows": rows}), 422, "invalid_window")
        assert details == [f"rows[{place}]: the model gives no finite logits" for place in (0, 2)]


# What the documentation says


def test_every_command_of_the_page_runs(
    server: Served,
    trained: Trained,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """curl is played here, since not every machine has it; the model is another than the demo's."""
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    (tmp_path / "data" / "sample").mkdir(parents=True)
    write_rows(tmp_path / "data" / "sample" / "test.jsonl", trained.rows)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```(sh|python)\n(.*?)```", page, re.DOTALL)
    lines = [line for language, block in blocks if language == "sh" for line in block.splitlines()]
    install, start, *lines = lines
    assert install == "pip install 'ctxtrain[serve]'"
    assert start == "ctxtrain serve runs/demo/final_model.zip"
    answers = []
    for line in lines:
        if line.startswith("curl "):
            answers.append(curl(server, *shlex.split(line)[1:]))
        else:
            subprocess.run(["sh", "-c", line], check=True)
    assert [answer.status for answer in answers] == [200] * 5
    assert_same(answers[0].body, trained.predictions[0])
    assert len(answers[1].body["predictions"]) == 3
    (code,) = [block for language, block in blocks if language == "python"]
    exec(code.replace("http://127.0.0.1:8000", server.url), {})
    assert capsys.readouterr().out.strip() == trained.predictions[0]["label"]


def curl(server: Served, *words: str) -> Reply:
    """`curl -s URL [-H HEADER] [-d @FILE]`, to this server; -d takes line ends out of a file, as curl does."""
    silent, url, *options = words
    assert silent == "-s"
    given = dict(zip(options[::2], options[1::2], strict=True))
    assert given.keys() <= {"-H", "-d"}
    headers = dict([given["-H"].split(": ")]) if "-H" in given else {}
    body = Path(given["-d"].removeprefix("@")).read_bytes().replace(b"\n", b"") if "-d" in given else None
    return server.send("POST" if body else "GET", url.removeprefix("http://127.0.0.1:8000"), body, headers)


def test_every_code_and_metric_of_the_page_is_there(server: Served) -> None:
    page = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
    table = re.findall(r"^\| (?:\d{3}(?:, )?)+ \| ([^|]+) \|", page, re.MULTILINE)
    assert {code for cell in table for code in re.findall(r"`(\w+)`", cell)} == set(get_args(Code))
    exported = {re.sub("_(bucket|count|sum)$", "", name) for name, *_ in server.metrics()}
    assert set(re.findall(r"`(ctxtrain_\w+)", page)) == {name for name in exported if name.startswith("ctxtrain_")}


# The command


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["{model}", "--port", "{taken}"], "got 127.0.0.1:{taken} (Address already in use). Give another"),
        (["{model}", "--host", "no such host"], "--host must be an address of this machine, got 'no such host'"),
        (["{model}", "--host", "a..b"], "--host must be an address of this machine, got 'a..b'"),
        (["{model}", "--host", "a" * 300], "--host must be an address of this machine, got 'aaa"),
        (["{model}", "--host", "bücher.invalid"], "--host must be an address of this machine, got 'bücher.invalid'"),
        (["{model}", "--host", "\udcff"], "--host must be an address of this machine, got '\\udcff'"),
        (["{model}", "--port", "65536"], "for '--port': Input should be less than or equal to 65535"),
        (["{model}", "--max-wait-ms", "nan"], "for '--max-wait-ms': Input should be less than or equal to 10000"),
        (["{model}", "--max-wait-ms", "1e9"], "for '--max-wait-ms': Input should be less than or equal to 10000"),
        (["{model}", "--queue", "9" * 30], "for '--queue': Input should be less than or equal to 100000"),
        (["{model}", "--min-confidence", "nan"], "min-confidence must be auto or a number from 0 to 1, got nan"),
        (["{model}", "--min-confidence", "2"], "min-confidence must be auto or a number from 0 to 1, got 2.0"),
        (["{model}", "--min-confidence", "most"], "min-confidence must be auto or a number from 0 to 1, got 'most'"),
        (["{model}x"], "no such model. Give a run folder, an export folder or a final_model.zip."),
    ],
)
def test_what_cannot_be_served_ends_with_2(
    trained: Trained, capsys: pytest.CaptureFixture[str], words: list[str], message: str
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        names = {"model": str(trained.model), "taken": str(other.getsockname()[1])}
        with pytest.raises(SystemExit) as ended:
            main(["serve", "--port", "0", *(word.format(**names) for word in words)])
    out, err = capsys.readouterr()
    assert (ended.value.code, out) == (2, "")
    assert message.format(**names) in err


def test_of_two_servers_on_one_port_the_second_ends_at_once_before_it_opens_a_model(tmp_path: Path) -> None:
    empty = tmp_path / "empty.zip"
    empty.write_bytes(b"PK\3\4")  # looks like a model until it is opened
    with bind_socket("127.0.0.1", 0) as first:  # as a server that is still opening its model holds it
        port = first.getsockname()[1]
        command = [sys.executable, "-m", "ctxtrain", "serve", str(empty), "--port", str(port)]
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=SECONDS)
    rule = "--host and --port must be a free address of this machine"
    said = f"error: {rule}, got 127.0.0.1:{port} (Address already in use). Give another --port or --host.\n"
    assert (done.returncode, done.stderr) == (2, f"loading {empty}\n{said}")


@contextmanager
def serving_at_once(model: Path, stdout: Any) -> Iterator[tuple[subprocess.Popen[bytes], int]]:
    """A server that has answered a request which was sent as soon as its port was taken."""
    with bind_socket("127.0.0.1", 0) as one:
        port = one.getsockname()[1]
    command = [sys.executable, "-m", "ctxtrain", "serve", str(model), "--port", str(port)]
    with subprocess.Popen(command, stdout=stdout) as process:
        try:
            status = None
            while status is None and process.poll() is None:
                connection = http.client.HTTPConnection("127.0.0.1", port, timeout=SECONDS)
                try:
                    connection.request("GET", "/health")
                except ConnectionRefusedError:  # the port is not taken yet
                    time.sleep(0.01)
                else:
                    status = connection.getresponse().status
                finally:
                    connection.close()
            assert status == 200
            yield process, port
        finally:
            process.kill()


@pytest.mark.parametrize("stdout", [os.devnull, "/dev/full"])
def test_who_asks_while_the_model_is_opened_is_answered_then_and_a_server_outlives_its_terminal(
    trained: Trained, stdout: str
) -> None:
    with Path(stdout).open("wb") as stream, serving_at_once(trained.model, stream) as (process, port):
        for _ in range(2):
            process.send_signal(signal.SIGHUP)
        body = json.dumps(trained.rows[0]).encode()
        address = f"http://127.0.0.1:{port}/predict"
        assert requests.post(address, body, headers={"Content-Type": "application/json"}, timeout=SECONDS).ok
        process.send_signal(signal.SIGTERM)
        assert process.wait(SECONDS) == 0


def test_without_the_extra_the_command_says_how_to_install_it() -> None:
    code = "import sys; sys.modules['fastapi'] = None\nfrom ctxtrain.cli.process import main\nmain(['serve', 'x.zip'])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: fastapi is not installed. Run pip install 'ctxtrain[serve]'.\n"


def test_a_deeply_nested_row_is_bad_data_to_predict_too(
    trained: Trained, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "deep.jsonl", ['{"context_bars": %s}' % ("[" * 1000 + "]" * 1000)])
    with pytest.raises(SystemExit) as ended:
        main(["predict", str(trained.model), str(rows)])
    assert ended.value.code == 65
    assert "nested too deeply to show" in capsys.readouterr().err


def test_answers_do_not_wait_for_an_acknowledgement() -> None:
    """asyncio switches Nagle's delay off only for sockets that say they are TCP; with it an answer took 40 ms more."""
    with bind_socket("127.0.0.1", 0) as listener:
        assert listener.proto == socket.IPPROTO_TCP
