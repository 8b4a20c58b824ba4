"""The commands. Each turns its arguments into one call and its result into text or JSON.

Heavy imports stay inside the commands, so that --help answers at once. Errors go through to `process.py`.
"""

from __future__ import annotations

from collections import Counter
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from ctxtrain.cli.data_commands import check, sample, windows
from ctxtrain.cli.first_look import look_at_inputs, look_at_model
from ctxtrain.cli.shared import (
    Dtype,
    JsonFlag,
    MinConfidence,
    ModelPath,
    Output,
    announce,
    count_labels,
    describe_counts,
    encode_rows,
    open_model,
    parse_min_confidence,
    print_json,
    progress,
    score_rows,
    start_fresh_process,
)
from ctxtrain.engine.api import tune_process
from ctxtrain.errors import EXIT_TARGETS_MISSED, ConfigError
from ctxtrain.memory import annotate_memory_errors
from ctxtrain.streams import print_notice, write_stdout
from ctxtrain.versions import require_extra

app = typer.Typer(
    name="ctxtrain",
    help="Train a Qwen classifier (LONG, SHORT, SKIP) on windows of market bars, and use it.",
    epilog="Add --debug anywhere to see the traceback of an error.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _show_version(wanted: bool) -> None:
    if wanted:
        write_stdout(f"ctxtrain {version('ctxtrain')}\n")
        raise typer.Exit


@app.callback()
def _main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Hold the options that stand before a command."""


for _command in (windows, sample, check):
    app.command()(_command)


@app.command()
def train(
    config: Annotated[Path, typer.Argument(metavar="CONFIG.yaml", help="The config of the run.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="section.key=value", help="Keys to change.")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Continue the run in output_dir at its last checkpoint.")
    ] = False,
    skip_nonfinite: Annotated[
        int | None,
        typer.Option(metavar="N", min=0, help="Skip up to N steps that are not finite, as the config's key."),
    ] = None,
    require_targets: Annotated[
        bool, typer.Option("--require-targets", help="Exit with 3 if a target is missed.")
    ] = False,
    quiet: Annotated[bool, typer.Option("--quiet", help="Show neither progress nor tables.")] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Print the summary as JSON; progress goes to standard error.")
    ] = False,
) -> None:
    """Train, choose, calibrate, export and check."""
    tune_process()
    from ctxtrain.config.schema import Config

    skips = [] if skip_nonfinite is None else [f"training.skip_nonfinite={skip_nonfinite}"]
    settings = Config.load(config, [*(overrides or []), *skips])
    look_at_inputs(settings)
    if not quiet:
        announce(f"training with {config}: loading torch and transformers")
    start_fresh_process()
    from ctxtrain.cli.console import print_runs, print_summary, stderr, stdout
    from ctxtrain.multi_run import run_several
    from ctxtrain.progress import Reporter
    from ctxtrain.reporting.runs_schema import Runs
    from ctxtrain.reporting.summary_schema import Summary
    from ctxtrain.train import TrainingPipeline
    from ctxtrain.training.inputs import multi_run_keys

    reporter = Reporter(None if quiet else stderr() if as_json else stdout())
    asking = multi_run_keys(settings)
    if asking:
        summary: dict[str, Any] | None = run_several(settings, resume=resume, reporter=reporter)
    else:
        summary = TrainingPipeline(settings, resume=resume, reporter=reporter).run()
    if summary and as_json:
        print_json(summary)
    elif summary and not quiet and asking:
        print_runs(Runs.model_validate(summary), settings.output_dir)
    elif summary and not quiet:
        print_summary(Summary.model_validate(summary), settings.output_dir)
    if summary and require_targets and not summary["targets_met"]:
        raise typer.Exit(EXIT_TARGETS_MISSED)


@app.command()
def evaluate(
    model: ModelPath,
    data: Annotated[str, typer.Argument(metavar="DATA", help="Labelled rows: a file or a URL.")],
    dtype: Dtype = "auto",
    compare_dtype: Annotated[
        bool, typer.Option("--compare-dtype", help="Answer in float32 and in bfloat16, and count changed labels.")
    ] = False,
    as_json: JsonFlag = False,
) -> None:
    """Score a model on labelled rows."""
    look_at_model(model, data)
    announce(f"loading {model}")
    tune_process()
    from ctxtrain.data.window_file import WindowFile
    from ctxtrain.evaluation.dtype_comparison import compare_dtypes
    from ctxtrain.evaluation.metrics import evaluate_logits
    from ctxtrain.export.predictor import load_model

    predictor = open_model(model, dtype)
    batch = encode_rows(predictor, WindowFile(data, keep=False, own=predictor.codec.own_fields))
    used, temperature = predictor.dtype, predictor.temperature
    logits = {used: score_rows(predictor, batch)}
    metrics = evaluate_logits(logits[used], batch.labels_N, temperature) | {"dtype": used}
    if compare_dtype:
        del predictor  # one model at a time in memory
        other: Any = "bfloat16" if used == "float32" else "float32"
        announce(f"loading {model} in {other}")
        logits[other] = score_rows(load_model(model, dtype=other), batch)
        metrics["dtype_comparison"] = compare_dtypes(logits, batch.labels_N, temperature)
    if as_json:
        print_json(metrics)
    else:
        from ctxtrain.cli.console import print_evaluation

        print_evaluation(metrics)


@app.command()
def predict(
    model: ModelPath,
    data: Annotated[
        str, typer.Argument(metavar="DATA|-", help="Rows, labelled or not: a file or a URL; - is standard input.")
    ],
    output: Output = None,
    min_confidence: MinConfidence = None,
    dtype: Dtype = "auto",
) -> None:
    """Predict the class of rows: one JSON line per row, in their order."""
    from ctxtrain.storage.ownership import check_output_file
    from ctxtrain.storage.result_file import STANDARD_OUTPUT, write_result

    check_output_file(output, model, data)
    least = parse_min_confidence(min_confidence)
    from ctxtrain.data.sources import StandardInput

    source = StandardInput() if data == "-" else data
    look_at_model(model, data)
    announce(f"loading {model}")
    tune_process()
    import orjson

    from ctxtrain.data.window_file import WindowFile

    predictor = open_model(model, dtype)
    rows = WindowFile(source, labelled=False, keep=False, own=predictor.codec.own_fields)
    batch = encode_rows(predictor, rows)
    announce(f"predicting {len(batch.ids):,} rows")
    with annotate_memory_errors("while predicting"), progress("predicting", len(batch.ids)) as advance:
        counts = Counter[str]()
        predictions = count_labels(predictor.predict_encoded(batch, advance, min_confidence=least), counts)
        lines = b"".join(orjson.dumps(prediction, option=orjson.OPT_APPEND_NEWLINE) for prediction in predictions)
    write_result(output, lines)
    written = describe_counts(counts)
    announce(written if output in (None, STANDARD_OUTPUT) else f"{output}: {written}")


@app.command()
def serve(
    model: ModelPath,
    host: Annotated[str, typer.Option(help="Address to listen at. There is no authentication.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="Largest batch of windows.")] = 32,
    max_wait_ms: Annotated[
        float, typer.Option(min=0, max=10_000, help="How long an idle model waits to fill a batch.")
    ] = 2.0,
    max_body_bytes: Annotated[int, typer.Option(min=1, max=16 << 20, help="Longer bodies get 413.")] = 1 << 20,
    queue: Annotated[int, typer.Option(min=1, max=100_000, help="Windows that may wait; then 503.")] = 256,
    min_confidence: MinConfidence = None,
    dtype: Dtype = "auto",
    access_log: Annotated[bool, typer.Option("--access-log", help="Log each request on stderr.")] = False,
) -> None:
    """Serve predictions over HTTP (docs/serving.md)."""
    require_extra("serve", "fastapi", "uvicorn", "prometheus_client")
    least = parse_min_confidence(min_confidence)
    look_at_model(model)
    announce(f"loading {model}")
    tune_process()
    from ctxtrain.serve.server import serve as run_server
    from ctxtrain.serve.service import Limits

    limits = Limits(max_batch, max_wait_ms / 1000, max_body_bytes, queue)
    run_server(
        lambda: open_model(model, dtype),
        (host, port),
        limits,
        min_confidence=least,
        access_log=access_log,
        announce=print_notice,
    )


@app.command()
def export(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]) -> None:
    """Export the best epoch of a run again."""
    from ctxtrain.config.schema import Config
    from ctxtrain.storage.ownership import refuse_folder_of_runs

    refuse_folder_of_runs(run)
    announce(f"exporting {run}")
    from ctxtrain.storage.run_folder import RunFolder

    settings = Config.from_run(RunFolder(run).read_config(), run / "config.yaml").model_copy(
        update={"output_dir": str(run)}
    )
    start_fresh_process()
    tune_process()
    from ctxtrain.cli.console import print_summary, stdout
    from ctxtrain.progress import Reporter
    from ctxtrain.reporting.summary_schema import Summary
    from ctxtrain.train import TrainingPipeline

    summary = TrainingPipeline(settings, resume=True, reporter=Reporter(stdout())).export()
    print_summary(Summary.model_validate(summary), str(run))


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]) -> None:
    """Write the report of a run again."""
    from ctxtrain.storage.ownership import refuse_folder_of_runs, refuse_foreign_report

    refuse_folder_of_runs(run)
    announce(f"writing the report of {run}")
    from ctxtrain.storage.run_folder import RunFolder

    folder = RunFolder(run)
    if not folder.summary.exists():
        raise ConfigError(f"{run}: no finished run, it has no {folder.summary.name}. Finish it with train --resume.")
    summary = folder.read_summary()
    refuse_foreign_report(folder.report)
    from ctxtrain.reporting.report import write_report

    write_report(folder, summary, announce)
    write_stdout(f"{folder.report}\n")


@app.command()
def pretrain(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG.yaml", help="As configs/pretrain.yaml; docs/config.md lists every key."),
    ],
) -> None:
    """Make a base model, or adapt a Qwen to unlabelled windows; the config's output_dir receives it."""
    announce(f"pretraining with {config}")
    tune_process(cpu_only=True)
    from ctxtrain.pretraining.run import PretrainConfig
    from ctxtrain.pretraining.run import pretrain as make_base

    settings = PretrainConfig.load(config)
    from ctxtrain.cli.console import stderr
    from ctxtrain.progress import Reporter

    print_json(make_base(settings, Reporter(stderr())))
