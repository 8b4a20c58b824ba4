"""The shape of the package: imports go one way, and pieces stay small."""

import ast
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import ctxtrain

PACKAGE = Path(ctxtrain.__file__).parent
MAX_MODULE_LINES = 330
MAX_FUNCTION_LINES = 60


def module_name(path: Path) -> str:
    """ctxtrain/data/codec.py → data.codec; the root of a package has the package's name."""
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


TREES = {module_name(path): ast.parse(path.read_text("utf-8")) for path in sorted(PACKAGE.rglob("*.py"))}
PACKAGES = {module_name(path.parent / "__init__.py") for path in PACKAGE.rglob("__init__.py")}
MODULES = sorted(TREES.keys() - PACKAGES)


def listed() -> list[list[str]]:
    """The names on each line of the list in the docstring of the package, from top to bottom."""
    lines = [line for line in (ctxtrain.__doc__ or "").splitlines() if line.startswith("    ")]
    return [line.strip().partition("  ")[0].split(", ") for line in lines]


def modules_of(name: str) -> list[str]:
    """The modules that a name of the list stands for."""
    return [module for module in MODULES if module == name or module.startswith(f"{name}.")]


def imported(tree: ast.Module) -> set[str]:
    """Modules of this package that a module imports anywhere: in functions and for type checking too."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            module = node.module or ""
            for alias in node.names:
                submodule = f"{module}.{alias.name}"
                found.add(submodule if submodule.removeprefix("ctxtrain.") in TREES else module)
    return {name.removeprefix("ctxtrain").removeprefix(".") for name in found if name.split(".")[0] == "ctxtrain"}


IMPORTS = {module: imported(TREES[module]) for module in MODULES}


def test_the_scan_sees_every_kind_of_import() -> None:
    code = """
import ctxtrain.labels
from ctxtrain import errors
from ctxtrain.data.codec import END
from ctxtrain.model import lora as base
if TYPE_CHECKING:
    from ctxtrain.train import TrainingPipeline
def late():
    import ctxtrain.storage.atomic_files as files, torch
    from ctxtrain import load_model
"""
    assert imported(ast.parse(code)) == {
        *("labels", "errors", "data.codec", "model.lora", "train", "storage.atomic_files"),
        "",  # the package itself, for load_model
    }


def test_the_list_of_modules_names_every_module_and_nothing_else() -> None:
    names = [name for line in listed() for name in line]
    assert [name for name in names if not modules_of(name)] == []
    assert sorted(module for name in names for module in modules_of(name)) == MODULES


def test_a_module_imports_only_from_above_itself_in_the_list() -> None:
    wrong = []
    above: set[str] = set()
    for line in listed():
        for name in line:
            own = set(modules_of(name))
            wrong += [
                f"{module} imports {other or 'the package itself'}"
                for module in sorted(own)
                for other in sorted(IMPORTS[module] - above - own)
            ]
            above |= own
    assert wrong == []


def test_no_imports_run_in_a_circle() -> None:
    try:
        TopologicalSorter(IMPORTS).prepare()
    except CycleError as error:
        raise AssertionError(" → ".join(error.args[1])) from None


def test_pretraining_reads_no_generator_of_labels() -> None:
    reached = {name for name in MODULES if name.startswith("pretraining.")}
    while more := set().union(*(IMPORTS[name] for name in reached)) & set(MODULES) - reached:
        reached |= more
    assert "synthetic.bars" in reached
    assert "synthetic.sample" not in reached
    for path in (PACKAGE / "pretraining").glob("*.py"):
        assert "benchmarks" not in path.read_text(), path.name


def test_the_inits_of_inner_packages_hold_a_docstring_alone() -> None:
    for package in PACKAGES - {""}:
        assert ast.get_docstring(TREES[package]), package
        assert len(TREES[package].body) == 1, package


def test_only_the_pipeline_with_its_builder_and_the_commands_see_a_config() -> None:
    seeing = {
        module
        for module in MODULES
        for node in ast.walk(TREES[module])
        if isinstance(node, ast.ImportFrom) and node.module == "ctxtrain.config.schema"
        if "Config" in [alias.name for alias in node.names]
    }
    assert seeing == {"training.build", "training.inputs", "train", "multi_run", "cli.commands", "cli.first_look"}


def test_no_engine_module_is_imported_outside_the_engine_but_its_door() -> None:
    """Nor an engine by the reference."""
    outside = {
        f"{module} imports {other}"
        for module in MODULES
        for other in IMPORTS[module]
        if other.startswith("engine.") and not module.startswith("engine.") and other != "engine.api"
    }
    assert outside == set()
    shared = {other for module in ("engine.reference", "engine.tuning") for other in IMPORTS[module]}
    assert not [other for other in shared if other.startswith("engine.cpu")]


def test_tests_of_the_reference_import_no_engine() -> None:
    """So they run where the folder of an engine is removed; tests of an engine lie in tests/engine."""
    tests = Path(__file__).parent
    outside = [path for path in sorted(tests.rglob("*.py")) if path.parent != tests / "engine"]
    importing = {
        str(path.relative_to(tests)): statement.lineno
        for path in outside
        for statement in ast.parse(path.read_text("utf-8")).body  # what a function imports concerns one test
        if isinstance(statement, ast.Import | ast.ImportFrom)
        if any(name.startswith("engine.cpu") for name in imported(ast.Module([statement], [])))
    }
    assert importing == {}


def test_every_module_says_what_it_is() -> None:
    assert [module for module in MODULES if not ast.get_docstring(TREES[module])] == []


def test_modules_stay_small() -> None:
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {module_name(path): lines for path, lines in lengths.items() if lines > MAX_MODULE_LINES} == {}


def test_functions_stay_small() -> None:
    lengths = {
        f"{module}.{node.name}": (node.end_lineno or 0) - node.lineno + 1
        for module, tree in TREES.items()
        for node in ast.walk(tree)
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    }
    assert {name: lines for name, lines in lengths.items() if lines > MAX_FUNCTION_LINES} == {}


ABSENT = """
import importlib, sys
for name in ("pyarrow", "catboost", "onnx", "onnxruntime", "datasets", "pandas"):  # the last two need pyarrow
    sys.modules[name] = None
for module in sys.argv[1:]:
    importlib.import_module(module)
"""


def test_what_trains_imports_without_tables_baselines_and_onnx() -> None:
    """Model, engine, optimizer step, checkpoints and merge; of the engine all but what runs ONNX Runtime itself."""
    trains = [module for module in MODULES if module.startswith(("model.", "engine."))]
    trains.remove("engine.cpu.onnx_inference")
    names = [f"ctxtrain.{module}" for module in (*trains, "training.step", "storage.checkpoint")]
    done = subprocess.run([sys.executable, "-c", ABSENT, *names], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]


def test_imports_of_answers_and_of_the_pipeline_load_no_library_of_baselines() -> None:
    """scikit-learn with pandas takes seconds; the leak check and the baselines of a run import it where they begin."""
    code = (
        "import sys, ctxtrain.train, ctxtrain.export.predictor\n"
        "print(sorted({'catboost', 'pandas', 'scipy.stats', 'sklearn', 'altair'} & sys.modules.keys()))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "[]\n"), done.stderr[-2000:]


def test_a_users_own_folder_ml_changes_nothing(tmp_path: Path) -> None:
    """A script finds the folder that it lies in first."""
    (tmp_path / "ml").mkdir()
    for name in ("__init__.py", "train.py"):
        (tmp_path / "ml" / name).write_text("raise SystemExit('the wrong ml')")
    (tmp_path / "mine.py").write_text(
        "from ctxtrain import Config, TrainingPipeline, load_model, run_several\nprint(TrainingPipeline.__module__)"
    )
    done = subprocess.run(
        [sys.executable, "mine.py"], cwd=tmp_path, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (0, "ctxtrain.train\n"), done.stderr[-2000:]
