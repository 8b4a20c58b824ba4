"""The commands. Each turns its arguments into one call and its result into text or JSON.

Heavy imports stay inside the commands, so that --help answers at once. Errors go through to `process.py`.
"""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any

import typer

from ctxtrain.cli.answering import least_confidence, progress, question_of
from ctxtrain.cli.first_look import look_at_inputs, look_at_model
from ctxtrain.engine.api import tune_process
from ctxtrain.errors import EXIT_TARGETS_MISSED, ConfigError, DataError
from ctxtrain.limits import MOST_TOKENS
from ctxtrain.memory import needed_for
from ctxtrain.streams import tell, write_out
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
        write_out(f"ctxtrain {version('ctxtrain')}\n")
        raise typer.Exit


@app.callback()
def _main(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version and end.")
    ] = False,
) -> None:
    """Hold the options that stand before a command."""


ModelPath = Annotated[Path, typer.Argument(metavar="MODEL", help="Run folder, export folder or final_model.zip.")]
MinConfidence = Annotated[
    str | None,
    typer.Option(
        metavar="SHARE|auto",
        help="Call a less confident row SKIP, and mark it abstained; auto takes the export's thresholds.",
    ),
]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print one JSON object.")]


@app.command()
def sample(
    folder: Annotated[Path, typer.Argument(metavar="DIR", help="Where train, val and test.jsonl and sample.json go.")],
    train: Annotated[int, typer.Option(help="Training windows.")] = 1200,
    val: Annotated[int, typer.Option(help="Validation windows.")] = 400,
    test: Annotated[int, typer.Option(help="Test windows.")] = 400,
    seed: Annotated[int, typer.Option(help="Same seed, same bytes.")] = 0,
    noise: Annotated[float, typer.Option(help="Share of labels replaced at random.")] = 0.08,
    mix: Annotated[str, typer.Option(help="Shares of LONG,SHORT,SKIP.")] = "0.35,0.35,0.30",
    hide_flags: Annotated[
        bool, typer.Option("--hide-flags", help="Leave only prices, volume and delta in the bars.")
    ] = False,
    shuffle_labels: Annotated[bool, typer.Option("--shuffle-labels", help="Leave nothing to learn.")] = False,
) -> None:
    """Write simulated windows with a known answer."""
    from ctxtrain.synthetic.sample import write_sample
    from ctxtrain.synthetic.sample_files import described

    try:
        shares = tuple(map(float, mix.split(",")))
    except ValueError:
        raise ConfigError(f"mix must be three numbers with commas between, got {mix!r}. Use 0.35,0.35,0.30.") from None
    try:
        written = write_sample(
            folder, train=train, val=val, test=test, seed=seed, noise=noise, hide_flags=hide_flags,
            mix=shares, shuffle_labels=shuffle_labels,  # type: ignore[arg-type]  # it checks that there are three
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from None
    write_out(described(folder, written))


@app.command()
def check(
    train: Annotated[Path, typer.Argument(metavar="TRAIN", help="Training rows.")],
    val: Annotated[Path | None, typer.Argument(metavar="[VAL]", help="Validation rows.")] = None,
    test: Annotated[Path | None, typer.Argument(metavar="[TEST]", help="Test rows.")] = None,
    base: Annotated[
        str | None,
        typer.Option(metavar="FOLDER", help="Look for faults of this Qwen too, and count tokens as it does."),
    ] = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", min=8, max=MOST_TOKENS, help="Longest text, as model.max_tokens.")
    ] = 2048,
    as_json: JsonFlag = False,
) -> None:
    """Check rows and look for leakage before training on them."""
    from ctxtrain.data.check import check_files

    tokenizer, notes = None, list[str]()
    if base is not None:
        tune_process()
        from ctxtrain.model.agreement import try_base

        tokenizer, notes = try_base(base)
    report = {"base": notes, **check_files({"train": train, "val": val, "test": test}, tokenizer, max_tokens)}
    if as_json:
        _print_json(report)
    else:
        from ctxtrain.cli.console import print_check

        print_check(report)
    if report["faults"] or any(leak["refused"] for leak in report["leaks"]):
        raise typer.Exit(DataError.exit_code)


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
    from ctxtrain.cli.console import print_runs, print_summary, stderr, stdout
    from ctxtrain.multi_run import run_several
    from ctxtrain.progress import Reporter
    from ctxtrain.reporting.runs_schema import Runs
    from ctxtrain.reporting.summary_schema import Summary
    from ctxtrain.train import TrainingPipeline
    from ctxtrain.training.build import several

    reporter = Reporter(None if quiet else stderr() if as_json else stdout())
    asking = several(settings)
    if asking:
        summary: dict[str, Any] | None = run_several(settings, resume=resume, reporter=reporter)
    else:
        summary = TrainingPipeline(settings, resume=resume, reporter=reporter).run()
    if summary and as_json:
        _print_json(summary)
    elif summary and not quiet and asking:
        print_runs(Runs.model_validate(summary), settings.output_dir)
    elif summary and not quiet:
        print_summary(Summary.model_validate(summary), settings.output_dir)
    if summary and require_targets and not summary["targets_met"]:
        raise typer.Exit(EXIT_TARGETS_MISSED)


@app.command()
def evaluate(
    model: ModelPath,
    data: Annotated[Path, typer.Argument(metavar="DATA.jsonl", help="Labelled rows.")],
    as_json: JsonFlag = False,
) -> None:
    """Score a model on labelled rows."""
    look_at_model(model, str(data))
    tune_process()
    from ctxtrain.data.window_file import WindowFile
    from ctxtrain.export.predictor import load_model

    predictor = load_model(model)
    question = question_of(predictor, WindowFile(data, keep=False))
    with needed_for("while evaluating"), progress("evaluating", len(question.ids)) as advance:
        metrics = predictor.evaluate(question.tokens, question.labels_N, advance)
    if as_json:
        _print_json(metrics)
    else:
        from ctxtrain.cli.console import print_metrics
        from ctxtrain.storage.metrics_log import Scores

        print_metrics(Scores.model_validate(metrics))


@app.command()
def predict(
    model: ModelPath,
    data: Annotated[str, typer.Argument(metavar="DATA.jsonl|-", help="Rows, labelled or not; - is standard input.")],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", metavar="OUT.jsonl", help="Instead of standard output, which is -.")
    ] = None,
    min_confidence: MinConfidence = None,
) -> None:
    """Label rows, one line a row, in their order."""
    from ctxtrain.storage.ownership import refuse_target
    from ctxtrain.storage.result_file import write_result

    refuse_target(output, model, data)
    least = least_confidence(min_confidence)
    from ctxtrain.data.formats import StandardInput

    piped = StandardInput() if data == "-" else None
    look_at_model(model, data)
    tune_process()
    import orjson

    from ctxtrain.data.window_file import WindowFile
    from ctxtrain.export.predictor import load_model

    rows = piped or WindowFile(data, labelled=False, keep=False)
    question = question_of(predictor := load_model(model), rows)
    with needed_for("while predicting"), progress("predicting", len(question.ids)) as advance:
        answers = predictor.answers(question, advance, min_confidence=least)
        lines = b"".join(orjson.dumps(answer, option=orjson.OPT_APPEND_NEWLINE) for answer in answers)
    write_result(output, lines)


@app.command()
def serve(
    model: ModelPath,
    host: Annotated[str, typer.Option(help="Address to listen at. Nobody is asked who they are.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 takes a free one.")] = 8000,
    max_batch: Annotated[int, typer.Option(min=1, max=1024, help="Windows that the model reads together.")] = 32,
    max_wait_ms: Annotated[float, typer.Option(min=0, max=10_000, help="Wait of an idle model for more.")] = 2.0,
    max_body_bytes: Annotated[int, typer.Option(min=1, max=16 << 20, help="Longer bodies get 413.")] = 1 << 20,
    queue: Annotated[int, typer.Option(min=1, max=100_000, help="Windows that may wait; then 503.")] = 256,
    min_confidence: MinConfidence = None,
    access_log: Annotated[bool, typer.Option("--access-log", help="A line on stderr for each request.")] = False,
) -> None:
    """Answer HTTP requests: docs/serving.md."""
    require_extra("serve", "fastapi", "uvicorn", "prometheus_client")
    least = least_confidence(min_confidence)
    look_at_model(model)
    tune_process()
    from ctxtrain.serve.server import serve as answer
    from ctxtrain.serve.service import Limits

    limits = Limits(max_batch, max_wait_ms / 1000, max_body_bytes, queue)
    answer(model, (host, port), limits, min_confidence=least, access_log=access_log, announce=tell)


@app.command()
def export(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]) -> None:
    """Export the best epoch of a run again."""
    tune_process()
    from ctxtrain.config.schema import Config
    from ctxtrain.storage.ownership import refuse_several

    refuse_several(run)
    from ctxtrain.storage.run_folder import RunFolder

    settings = Config.of_run(RunFolder(run).read_config(), run / "config.yaml").model_copy(
        update={"output_dir": str(run)}
    )
    from ctxtrain.cli.console import print_summary, stdout
    from ctxtrain.progress import Reporter
    from ctxtrain.reporting.summary_schema import Summary
    from ctxtrain.train import TrainingPipeline

    summary = TrainingPipeline(settings, resume=True, reporter=Reporter(stdout())).export()
    print_summary(Summary.model_validate(summary), str(run))


@app.command()
def report(run: Annotated[Path, typer.Argument(metavar="RUN", help="Run folder.")]) -> None:
    """Write the report of a run again."""
    from ctxtrain.storage.ownership import refuse_foreign_page, refuse_several

    refuse_several(run)
    from ctxtrain.reporting.report import write_report
    from ctxtrain.storage.run_folder import RunFolder

    folder = RunFolder(run)
    if not folder.summary.exists():
        raise ConfigError(f"{run}: no finished run, it has no {folder.summary.name}. Finish it with train --resume.")
    summary = folder.read_summary()
    refuse_foreign_page(folder.report)
    write_report(folder, summary, lambda note: typer.echo(note, err=True))
    write_out(f"{folder.report}\n")


@app.command()
def pretrain(
    config: Annotated[
        Path,
        typer.Argument(metavar="CONFIG.yaml", help="As configs/pretrain.yaml; docs/config.md lists every key."),
    ],
) -> None:
    """Make a base, or with base and data adapt a Qwen to unlabelled windows; output_dir says where it goes."""
    tune_process()
    from ctxtrain.pretraining.run import PretrainConfig
    from ctxtrain.pretraining.run import pretrain as make_base

    settings = PretrainConfig.load(config)
    from ctxtrain.cli.console import stderr
    from ctxtrain.progress import Reporter

    _print_json(make_base(settings, Reporter(stderr())))


def _print_json(value: object) -> None:
    from ctxtrain.storage.atomic_files import to_json

    write_out(to_json(value))
