"""Files and rows of strangers: nothing of them runs, writes elsewhere or calls home, and each ends in a clear error."""

import ast
import json
import os
import shutil
import stat
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import ctxtrain
from ctxtrain import Config, TrainingPipeline
from ctxtrain.cli.process import main
from ctxtrain.config.strict_yaml import _Loader, parse_yaml
from ctxtrain.errors import ConfigError
from ctxtrain.storage import checkpoint
from ctxtrain.storage.archive import pack
from ctxtrain.storage.atomic_files import write_manifest
from ctxtrain.versions import FIRST_SAFE_VERSIONS
from tests.conftest import Amount, Needs
from tests.helpers import learnable_rows, make_row, write_rows
from tests.reliability import hostile_pt, hostile_zip
from tests.reliability.conftest import Figure
from tests.tiny_models import build_tiny

HERE = Path(__file__).parent
PACKAGE = Path(ctxtrain.__file__).parent


def watched(what: str, scratch: Path, good: Path, paths: list[Path]) -> list[dict[str, Any]]:
    """What became of each file in a process that is watched; the sound one must have been opened."""
    scratch.mkdir(exist_ok=True)
    command = [sys.executable, "-W", "ignore", HERE / "watched.py", what, scratch, good, *paths]
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"ended by {done.returncode}: {done.stderr[-2000:]}"
    sound, *reports = map(json.loads, done.stdout.splitlines())
    assert sound["outcome"] == "opened", sound
    assert len(reports) == len(paths)
    return reports


def sample(paths: list[Path], count: int) -> list[Path]:
    """At most `count` of the paths, evenly chosen."""
    return [paths[round(i)] for i in np.linspace(0, len(paths) - 1, min(count, len(paths)))]


# Checkpoints


@pytest.fixture(scope="module")
def sound_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("sound") / "sound.pt"
    weights = {"a": torch.zeros(100), "b": torch.ones(3, 3)}
    state = {"step": 0, "epochs": []}
    checkpoint.save(path, {"state": state, "learner": {"weights": weights}, "fingerprint": {}, "environment": {}})
    return path


@pytest.mark.promise("F1")
def test_no_checkpoint_runs_anything(tmp_path: Path, sound_checkpoint: Path, amount: Amount, figure: Figure) -> None:
    canary = tmp_path / "canary"
    paths = hostile_pt.write_all(tmp_path / "hostile", canary)
    assert len(paths) >= 200
    reports = watched("checkpoint", tmp_path / "scratch", sound_checkpoint, sample(paths, amount(60, 1_000)))
    for report in reports:
        assert report["outcome"].startswith("DataError: "), report
        assert report["done"] == [], report
        assert report["peak_mb"] < 1_000, report
    assert not canary.exists()
    figure("F1", "{} hostile checkpoints", len(reports))


@pytest.mark.promise("F7")
def test_a_checkpoint_of_changed_bytes_ends_in_a_data_error(
    tmp_path: Path, sound_checkpoint: Path, amount: Amount, figure: Figure
) -> None:
    """The checksum is recomputed, so that the changes reach the reader behind it."""
    sound = sound_checkpoint.read_bytes()
    content = sound[: sound.rindex(b"sha256 ") - 2] + b"\0\0"  # as before it was sealed
    paths = []
    for seed in range(amount(60, 1_500)):
        path = tmp_path / f"{seed}.pt"
        path.write_bytes(hostile_pt.sealed(changed(content, seed)))
        paths.append(path)
    outcomes = watched("checkpoint", tmp_path / "scratch", sound_checkpoint, paths)
    assert {report["outcome"].partition(":")[0] for report in outcomes} <= {"DataError", "opened"}, [
        report for report in outcomes if not report["outcome"].startswith(("DataError", "opened"))
    ]
    assert [report for report in outcomes if report["done"]] == []
    figure("F7", "{} checkpoints", len(paths))


def changed(content: bytes, seed: int) -> bytes:
    """A few bytes changed, cut or doubled."""
    rng = np.random.default_rng(seed)
    data = bytearray(content)
    for _ in range(rng.integers(1, 5)):
        start = int(rng.integers(0, len(data)))
        stop = start + int(rng.integers(1, 9))
        data[start:stop] = [rng.bytes(stop - start), b"", bytes(data[start:stop]) * 2][seed % 3]
    return bytes(data)


# Zips


@pytest.mark.promise("F3")
def test_no_zip_is_unpacked_that_is_no_export(tmp_path: Path, figure: Figure) -> None:
    (tmp_path / "zips").mkdir()
    (tmp_path / "scratch").mkdir()
    good = tmp_path / "good.zip"
    good.write_bytes(hostile_zip.GOOD)
    cases = list(hostile_zip.odd_zips())
    assert len(cases) >= 60
    paths = [tmp_path / "zips" / f"{number}.zip" for number in range(len(cases))]
    for path, (_, content) in zip(paths, cases, strict=True):
        path.write_bytes(content)
    for report, (name, _) in zip(watched("unpack", tmp_path / "scratch", good, paths), cases, strict=True):
        assert report["outcome"].startswith("DataError: "), (name, report)
        assert report["done"] == [], (name, report)
        assert report["wrote"] == [], (name, report)
        assert report["peak_mb"] < 150, (name, report)
    unpacked = {path.name for path in (tmp_path / "scratch" / "unpacked").iterdir()}
    assert unpacked == set(hostile_zip.SOUND)
    assert {path.name for path in tmp_path.iterdir()} == {"zips", "scratch", "good.zip"}
    figure("F3", "{} hostile zips", len(paths))


@pytest.mark.promise("F7")
def test_a_zip_of_changed_bytes_is_unpacked_inside_or_refused(tmp_path: Path, amount: Amount, figure: Figure) -> None:
    good = tmp_path / "good.zip"
    good.write_bytes(hostile_zip.GOOD)
    paths = []
    for seed in range(amount(100, 3_000)):
        path = tmp_path / f"{seed}.zip"
        path.write_bytes(changed(hostile_zip.GOOD, seed))
        paths.append(path)
    for report in watched("unpack", tmp_path / "scratch", good, paths):
        assert report["outcome"].startswith(("DataError: ", "opened")), report
        assert report["done"] == [], report
    figure("F7", "{} zips", len(paths))


# Configs


@pytest.fixture(scope="module")
def export(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The export of a run of one epoch."""
    folder = tmp_path_factory.mktemp("export")
    files = {
        name: str(write_rows(folder / name, learnable_rows(20, seed))) for seed, name in enumerate(("train", "val"))
    }
    config = Config.parse(
        {
            "data": files,
            "model": {"base": str(build_tiny(folder / "base")), "max_tokens": 512},
            "training": {"epochs": 1, "warmup_steps": 0},
            "output_dir": str(folder / "run"),
        }
    )
    assert TrainingPipeline(config).run()
    return folder / "run" / "export"


def edited(**changes: Any) -> Callable[[Path], None]:
    def edit(path: Path) -> None:
        path.write_text(json.dumps(json.loads(path.read_text()) | changes))

    return edit


def written(content: str | bytes) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        path.write_bytes(content.encode() if isinstance(content, str) else content)

    return write


def header(**tensors: dict[str, Any]) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text


def odd_exports() -> Iterator[tuple[str, Callable[[Path], None]]]:
    """The file of an export that is changed, and how."""
    code = {"AutoConfig": "evil.Evil", "AutoModelForSequenceClassification": "evil.Evil"}
    configs: tuple[dict[str, Any], ...] = (
        {"auto_map": code},
        {"auto_map": {}},
        {"text_config": {"auto_map": code}},
        {"_attn_implementation": "evil/kernel"},
        {"_attn_implementation_internal": "evil/kernel"},
        {"attn_implementation": "evil/kernel:run"},
        {"_experts_implementation": "evil/kernel"},
        {"rope_parameters": {"attn_implementation": "evil/kernel"}},
        {"quantization_config": {"quant_method": "evil"}},
        {"trust_remote_code": True},
        {"vocab_file": "/etc/passwd"},
        {"_name_or_path": "https://example.com/model"},
        {"architectures": ["http://example.com"]},
        {"rope_parameters": {"rope_type": "file:///etc/passwd"}},
        {"model_type": "bert"},
        {"model_type": "../qwen2"},
        {"model_type": 5},
        {"model_type": "qwen2_audio"},
        {"num_hidden_layers": 1_000_000_000},
        {"num_hidden_layers": -1},
        {"num_hidden_layers": "2"},
        {"num_hidden_layers": 1},
        {"hidden_size": 1 << 40},
        {"hidden_size": 0},
        {"hidden_size": 64},
        {"vocab_size": 1 << 40},
        {"vocab_size": 10},
        {"intermediate_size": [64]},
        {"num_attention_heads": 0},
        {"layer_types": ["full_attention"] * 100_000},
        {"hidden_act": "os.system"},
        {"rope_parameters": {"rope_type": "evil"}},
        {"rope_parameters": 5},
        {"id2label": {str(i): "x" for i in range(100_000)}},
    )
    yield from (("config.json", edited(**changes)) for changes in configs)
    for content in (
        "",
        "[]",
        "null",
        "{",
        '{"model_type": "qwen2"}',
        '{"a": 1, "a": 2}',
        '{"x": NaN}',
        "\ufeff{}",
        "[" * 9_999,
    ):
        yield "config.json", written(content)
    tokenizers: tuple[dict[str, Any], ...] = (
        {"tokenizer_class": "EvilTokenizer"},
        {"tokenizer_class": None},
        {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}},
        {"tokenizer_file": "/etc/passwd"},
        {"name_or_path": "https://example.com/x"},
        {"model_max_length": "512"},
        {"model_max_length": 1e30},
        {"model_max_length": 0},
        {"pad_token": None},
        {"pad_token": 5},
    )
    yield from (("tokenizer_config.json", edited(**changes)) for changes in tokenizers)
    yield from (("tokenizer.json", written(content)) for content in ("", "{}", "[]", '{"version": "1.0"}', "[" * 9_999))
    yield "tokenizer.json", edited(model={"type": "Evil"})
    yield "tokenizer.json", edited(added_tokens=[{"id": 1 << 31, "content": "another word"}])
    yield "adapter/adapter_config.json", edited(auto_mapping={"base_model_class": "Evil", "parent_library": "os"})
    yield "adapter/adapter_config.json", edited(evil=1)
    yield "adapter/adapter_config.json", edited(base_model_name_or_path="https://example.com/x")
    yield "adapter/adapter_config.json", written("[]")
    yield "adapter_config.json", written('{"peft_type": "LORA", "base_model_name_or_path": "/tmp/evil"}')
    yield "evil.py", written("raise SystemExit('it ran')")
    yield "model.safetensors.index.json", written('{"weight_map": {"a": "../../evil.safetensors"}}')
    yield "pytorch_model.bin", written(hostile_pt.zipped(hostile_pt.call("os.system", "true", 0)))
    large = header(a={"dtype": "F32", "shape": [1 << 40]})
    weights = (b"", b"\xff" * 100, struct.pack("<Q", 1 << 60), header(), large)
    yield from (("model.safetensors", written(content)) for content in weights)
    tensor = {"dtype": "F32", "shape": [1], "data_offsets": [0, 4]}
    yield "model.safetensors", written(header(a=tensor) + b"\0" * 4)
    yield "calibration.json", written("{}")
    yield from (("calibration.json", edited(temperature=value)) for value in (0, -1, "1", None, 1e999, [1]))
    yield from (("codec.json", edited(**change)) for change in ({"kind": "evil"}, {"version": 2}, {"fields": 5}))
    yield "codec.json", written("{}")


@pytest.mark.promise("F4")
def test_no_export_names_code_places_or_more_than_it_holds(
    tmp_path: Path, export: Path, amount: Amount, figure: Figure
) -> None:
    cases = list(odd_exports())
    cases = cases[amount(2, 0) :: amount(3, 1)]
    folders = []
    for number, (name, change) in enumerate(cases):
        folder = tmp_path / f"export{number}"
        shutil.copytree(export, folder, copy_function=os.link)
        path = folder / name
        content = path.read_bytes() if path.exists() else b""
        path.unlink(missing_ok=True)  # not the other folder's
        path.write_bytes(content)
        change(path)
        (folder / "manifest.json").unlink()
        write_manifest(folder)
        folders.append(folder)
    wrong = []
    for report, (name, _) in zip(watched("model", tmp_path / "scratch", export, folders), cases, strict=True):
        clean = report["outcome"].startswith("DataError: ") and not report["done"] and report["peak_mb"] < 1_000
        if not clean:
            wrong.append(
                f"{name} {report['path'].rpartition('export')[2]}: {report['outcome'][:200]} {report['done'][:3]}"
            )
    assert wrong == []
    figure("F4", "{} hostile exports; no call in a run without a network", len(folders))


@pytest.mark.promise("F4")
def test_a_key_that_nobody_knows_never_reaches_transformers(tmp_path: Path, export: Path) -> None:
    from ctxtrain.export.untrusted import open_config

    folder = shutil.copytree(export, tmp_path / "export")
    edited(surprise="import os", rope_theta_scale=0.5, torchscript=True, rope_theta=5e5, rope_parameters=None)(
        folder / "config.json"
    )
    config = open_config(folder)
    assert not any(hasattr(config, name) for name in ("surprise", "rope_theta_scale", "torchscript"))
    assert config.rope_parameters["rope_theta"] == 5e5  # as files of earlier releases name it


OFFLINE = """
import sys
def refuse(event, arguments):
    if event in ("socket.connect", "socket.getaddrinfo", "socket.sendto", "socket.bind"):
        raise SystemExit(f"network: {event} {arguments}")
sys.addaudithook(refuse)
from ctxtrain import Config, TrainingPipeline, load_model
from ctxtrain.data.window_file import load_windows
config = Config.load(sys.argv[1])
assert TrainingPipeline(config).run()
assert TrainingPipeline(config, resume=True).export()
print(len(load_model(config.output_dir + "/final_model.zip").predict_windows(load_windows(config.data.val))))
"""
SECRET = "s3cr3t-of-the-environment-4711"
DEEP_SECRET = "told-in-confidence-0815"


@pytest.fixture(scope="module")
def private_run(
    tmp_path_factory: pytest.TempPathFactory, tiny_base: Path
) -> tuple[Path, subprocess.CompletedProcess[str]]:
    """Training, export and prediction without a network and with secrets in the environment and beside the rows."""
    folder = tmp_path_factory.mktemp("private")
    rows = learnable_rows(40, seed=1)
    for row in rows:
        row |= {"metadata": {"note": DEEP_SECRET}, "label_reason": DEEP_SECRET, "conditions_met": [DEEP_SECRET]}
    train, data = write_rows(folder / "train.jsonl", rows[20:]), write_rows(folder / "rows.jsonl", rows[:20])
    config = folder / "config.yaml"
    config.write_text(
        f"data: {{train: {train}, val: {data}}}\nmodel: {{base: {tiny_base}, max_tokens: 512}}\n"
        f"training: {{epochs: 1, warmup_steps: 0}}\noutput_dir: {folder}/run\n"
    )
    bare = (
        subprocess.run(["unshare", "-rn", "true"], capture_output=True, check=False)
        if shutil.which("unshare")
        else None
    )
    apart = ["unshare", "-rn"] if bare and bare.returncode == 0 else []
    environment = {name: value for name, value in os.environ.items() if not name.startswith("HF_")}
    done = subprocess.run(
        [*apart, sys.executable, "-c", OFFLINE, str(config)],
        env=environment | {"API_TOKEN": SECRET},
        umask=0,
        capture_output=True,
        text=True,
        check=False,
    )
    return folder, done


@pytest.mark.promise("F4")
def test_training_export_and_prediction_from_local_files_make_no_call(
    private_run: tuple[Path, subprocess.CompletedProcess[str]], needs: Needs
) -> None:
    _, done = private_run
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.split()[-1] == "20"
    needs(done.args[0] == "unshare", "unshare -rn, which takes the network away")


# What is logged and said


@pytest.mark.promise("F6")
def test_a_run_leaves_no_secret_behind(private_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    folder, done = private_run
    left = [path for path in (folder / "run").rglob("*") if path.is_file()]
    assert len(left) > 10
    for secret in (SECRET, DEEP_SECRET):
        assert secret not in done.stdout + done.stderr
        assert [path.name for path in left if secret.encode() in path.read_bytes()] == []


@pytest.mark.promise("F6")
def test_what_a_run_writes_only_its_owner_reads(private_run: tuple[Path, subprocess.CompletedProcess[str]]) -> None:
    """Though the process was started with a umask of 0."""
    run = private_run[0] / "run"
    modes = {path: stat.S_IMODE(path.stat().st_mode) for path in (run, *run.rglob("*"))}
    assert {str(path): oct(mode) for path, mode in modes.items() if mode != (0o700 if path.is_dir() else 0o600)} == {}
    with zipfile.ZipFile(run / "final_model.zip") as archive:  # who unpacks it chooses for themselves
        assert {entry.external_attr >> 16 & 0o777 for entry in archive.infolist()} == {0o644}


@pytest.mark.promise("F6")
def test_no_error_carries_a_whole_record(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, figure: Figure
) -> None:
    monkeypatch.setenv("API_TOKEN", SECRET)
    long = "a" * 60 + DEEP_SECRET
    text = {"context": long, "label": "LONG"}
    rows: list[object] = [
        json.dumps(text)[:-1],
        json.dumps(text)[:-1] + f', "{long}": 1, "{long}": 2}}',
        text | {"label": long},
        text | {"label": [long]},
        text | {"id": {"x": long}},
        text | {"context": [long]},
        make_row(note=DEEP_SECRET, label="UP"),
        make_row(features={"x": long}),
        make_row(symbol=[long]),
        make_row(context_bars=long),
        make_row(current_bar={"open": long, "time": long}),
        [long],
        json.dumps(long),
    ]
    path = write_rows(tmp_path / "rows.jsonl", rows)
    config = tmp_path / "config.yaml"
    config.write_text(f"data: {{train: {path}, val: {path}}}\noutput_dir: {tmp_path}/run\n")
    for words in (["check", path], ["check", path, "--json"], ["train", config], ["train", config, "--debug"]):
        with pytest.raises(SystemExit) as ended:
            main([str(word) for word in words])
        out, err = capsys.readouterr()
        assert ended.value.code == 65
        assert f"{path}:13: " in out + err
        assert DEEP_SECRET not in out + err
        assert SECRET not in out + err
    figure("F6", "{} kinds of faulty rows in 4 commands, 1 run", len(rows))


# What the code may not call


def sources() -> dict[str, ast.Module]:
    return {str(path.relative_to(PACKAGE)): ast.parse(path.read_text("utf-8")) for path in PACKAGE.rglob("*.py")}


BANNED_MODULES = {"dill", "cloudpickle", "joblib", "marshal", "shelve", "runpy", "code", "pty", "imp", "telnetlib"}
BANNED_NAMES = {"eval", "exec", "compile", "__import__", "breakpoint", "input"}
BANNED_ATTRIBUTES = {"extractall", "unpack_archive", "load_state", "add_safe_globals", "safe_globals", "read_pickle"}
BANNED_ATTRIBUTES |= {"unsafe_load", "full_load", "system", "popen", "getoutput", "getstatusoutput"}
BANNED_SETTINGS = {"trust_remote_code", "shell", "allow_pickle"}
LOADERS = {"np", "numpy", "pickle", "yaml", "hub", "jit", "joblib", "torch"}  # whose `load` is looked at


def offences(tree: ast.Module) -> Iterator[str]:
    """Each use of what is banned, as text; `torch.load(…, weights_only=True)` and the project's YAML loader are not."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else [node.module or ""]
            yield from (f"import {name}" for name in names if name.split(".")[0] in BANNED_MODULES)
        elif isinstance(node, ast.Name) and node.id in BANNED_NAMES:
            yield node.id
        elif isinstance(node, ast.Attribute) and node.attr in BANNED_ATTRIBUTES:
            yield f".{node.attr}"
        elif isinstance(node, ast.Attribute) and ast.unparse(node.value) == "pickle" and node.attr != "UnpicklingError":
            yield f"pickle.{node.attr}"
        elif isinstance(node, ast.keyword) and node.arg in BANNED_SETTINGS and ast.unparse(node.value) != "False":
            yield f"{node.arg}={ast.unparse(node.value)}"
        if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(".load"):
            owner = ast.unparse(node.func).split(".")[-2]
            given = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
            sound = {"torch": ("weights_only", "True"), "yaml": ("Loader", "_Loader")}.get(owner, ("", ""))
            if owner in LOADERS and given.get(sound[0]) != sound[1]:
                yield ast.unparse(node)


@pytest.mark.promise("F2")
def test_nothing_that_could_run_a_file_is_called(figure: Figure) -> None:
    assert {name: found for name, tree in sources().items() if (found := list(offences(tree)))} == {}
    figure("F2", "{} modules", len(sources()))


@pytest.mark.promise("F2")
def test_one_module_alone_calls_torch_load_and_the_yaml_loader_makes_plain_values() -> None:
    calling = {name for name, tree in sources().items() for node in ast.walk(tree) if is_call(node, "torch.load")}
    assert calling == {"storage/checkpoint.py"}
    assert issubclass(_Loader, yaml.SafeLoader)
    for text in ("!!python/object/apply:os.system ['true']", "!!python/name:os.system", "!!python/module:os"):
        with pytest.raises(ConfigError, match="not valid YAML"):
            parse_yaml(text, "config.yaml")


def is_call(node: ast.AST, name: str) -> bool:
    return isinstance(node, ast.Call) and ast.unparse(node.func) == name


@pytest.mark.promise("F2")
@pytest.mark.parametrize(
    "code",
    [
        *("import joblib", "from dill import loads", "eval('1')", "exec(x)", "pickle.loads(x)", "pickle.load(x)"),
        *("torch.load(x)", "torch.load(x, weights_only=False)", "torch.hub.load(x)", "torch.jit.load(x)", "np.load(x)"),
        *("yaml.load(x, Loader=yaml.Loader)", "yaml.unsafe_load(x)", "archive.extractall(x)", "os.system(x)"),
        *(
            "f(trust_remote_code=True)",
            "run(x, shell=True)",
            "accelerator.load_state(x)",
            "__import__(x)",
            "os.popen(x)",
        ),
        *("torch.serialization.add_safe_globals([x])", "numpy.load(x, allow_pickle=True)", "shutil.unpack_archive(x)"),
    ],
)
def test_the_look_at_the_code_sees_what_is_banned(code: str) -> None:
    assert list(offences(ast.parse(code)))


# Versions


def installed(folder: Path, **versions: str) -> subprocess.CompletedProcess[str]:
    """`ctxtrain --help` with other versions of libraries found first."""
    for name, version in versions.items():
        info = folder / f"{name}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    path = os.pathsep.join([str(folder), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, "-m", "ctxtrain", "--help"]
    return subprocess.run(
        command, env=os.environ | {"PYTHONPATH": path}, cwd=PACKAGE.parent, capture_output=True, text=True, check=False
    )


@pytest.mark.promise("F5")
def test_libraries_with_known_holes_are_refused_all_at_once(tmp_path: Path, figure: Figure) -> None:
    done = installed(tmp_path / "old", torch="2.9.1+cpu", transformers="5.2.9", filelock="3.20.2")
    assert (done.returncode, done.stdout) == (2, "")
    assert [line.split()[1:8] for line in done.stderr.splitlines()] == [
        [name, "must", "be", FIRST_SAFE_VERSIONS[name][0], "or", "newer", f"({FIRST_SAFE_VERSIONS[name][1].split()[0]}"]
        for name in FIRST_SAFE_VERSIONS
    ] or done.stderr.count("must be") == 3
    for found in ("got 2.9.1+cpu.", "got 5.2.9.", "got 3.20.2."):
        assert found in done.stderr
    done = installed(tmp_path / "new", torch="2.10.0+cpu", transformers="5.3.0", filelock="3.20.3")
    assert (done.returncode, done.stderr) == (0, "")
    figure("F5", "{} libraries", len(FIRST_SAFE_VERSIONS))


@pytest.mark.promise("F5")
def test_every_locked_package_has_its_hash_and_none_a_known_hole() -> None:
    for name in ("runtime.txt", "dev.txt"):
        lines = (PACKAGE.parent / "requirements" / name).read_text().splitlines()
        packages = [line for line in lines if "==" in line and not line.startswith((" ", "#"))]
        assert len(packages) > 20
        assert all(line.endswith("\\") for line in packages)
        assert sum("--hash=sha256:" in line for line in lines) >= len(packages)


# Configs of a run


@pytest.mark.promise("F7")
def test_any_config_ends_in_a_config_or_a_config_error(amount: Amount, figure: Figure) -> None:
    text = (PACKAGE.parent / "configs" / "demo.yaml").read_bytes()
    accepted = 0
    for seed in range(amount(300, 5_000)):
        rng = np.random.default_rng(seed)
        data = changed(text, seed) if seed % 2 else bytes(rng.integers(32, 127, rng.integers(0, 60)).astype(np.uint8))
        try:
            Config.model_validate(parse_yaml(data.decode("utf-8", "replace"), "config.yaml") or {})
            accepted += 1
        except (ConfigError, ValueError):
            continue
    assert accepted
    figure("F7", "{} configs", amount(300, 5_000))


def test_the_export_that_is_attacked_is_sound(tmp_path: Path, export: Path) -> None:
    pack(export, tmp_path / "model.zip")
    assert len(ctxtrain.load_model(tmp_path / "model.zip").predict([make_row(flags=False)])) == 1
