"""The commands that make and check rows: windows, sample, check.

Heavy imports stay inside the commands, so that --help answers at once. `commands.py` registers them.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from ctxtrain.cli.shared import JsonFlag, announce, parse_fields, parse_mix, print_json
from ctxtrain.engine.api import tune_process
from ctxtrain.errors import ConfigError, DataError
from ctxtrain.limits import MAX_TEXT_TOKENS
from ctxtrain.streams import write_stdout
from ctxtrain.urls import shown


def windows(
    bars_files: Annotated[
        list[Path], typer.Argument(metavar="BARS...", help="Files of bars: CSV, Parquet, Feather, JSON; .gz, .zst.")
    ],
    output: Annotated[
        Path, typer.Option("-o", "--output", metavar="DIR", help="Where train, val and test.jsonl and windows.json go.")
    ],
    events: Annotated[
        str, typer.Option(metavar="every|N|NAME", help="Each bar, every N bars, or where a flag becomes true.")
    ] = "every",
    bars: Annotated[int, typer.Option(metavar="N", help="Bars a window, the event included.")] = 50,
    label: Annotated[
        str, typer.Option(metavar="triple-barrier|COLUMN", help="How events are labelled.")
    ] = "triple-barrier",
    profit: Annotated[
        str | None, typer.Option(metavar="DISTANCE", help="Profit: 1.5atr (the default), 0.4%, or a price.")
    ] = None,
    stop: Annotated[str | None, typer.Option(metavar="DISTANCE", help="Stop, as profit: 1atr is the default.")] = None,
    horizon: Annotated[
        int | None, typer.Option(metavar="N", help="Bars until a trade is closed: 20 is the default.")
    ] = None,
    cost: Annotated[str | None, typer.Option(metavar="DISTANCE", help="Cost of a trade: a price, or 0.01%.")] = None,
    structure: Annotated[bool, typer.Option("--structure", help="Add flags of the market structure to bars.")] = False,
    higher: Annotated[
        int | None, typer.Option(metavar="N", help="Add htf_dir, the direction of bars N times as long.")
    ] = None,
    fields: Annotated[str | None, typer.Option(metavar="A,B", help="Own columns to copy to the bars.")] = None,
    split: Annotated[str, typer.Option(metavar="P,P,P", help="Percent of events for train,val,test.")] = "70,15,15",
    max_gap: Annotated[
        int | None, typer.Option(metavar="N", help="Longest gap in a window, in bars: 4 days is the default.")
    ] = None,
    symbol: Annotated[str | None, typer.Option(help="The market, if the files do not name it.")] = None,
    time_zone: Annotated[
        str | None, typer.Option(metavar="ZONE", help="Zone of times without one, as Europe/Athens.")
    ] = None,
    stamp: Annotated[str | None, typer.Option(metavar="open|close", help="What the time of a bar is.")] = None,
    bar_length: Annotated[str | None, typer.Option(metavar="LENGTH", help="Length of a bar, as 5m, 1h or 1d.")] = None,
    columns: Annotated[
        str | None, typer.Option(metavar="FIELD=COLUMN,...", help="Columns by name or number, as time=Tid,open=2.")
    ] = None,
    decimal: Annotated[str | None, typer.Option(metavar=".|,", help="The decimal mark of text.")] = None,
    separator: Annotated[str | None, typer.Option(metavar="MARK", help="What separates columns; tab is a tab.")] = None,
    dates: Annotated[str | None, typer.Option(metavar="dmy|mdy", help="Whether the day or month is first.")] = None,
) -> None:
    """Make labelled windows of bars, split in time."""
    announce(f"reading {len(bars_files):,} file{'' if len(bars_files) == 1 else 's'} of bars")
    from ctxtrain.bars.card_text import describe_windows
    from ctxtrain.bars.options import parse_read_options, parse_window_options
    from ctxtrain.bars.write import write_windows

    read = parse_read_options(
        symbol=symbol, time_zone=time_zone, stamp=stamp, bar_length=bar_length, columns=columns, decimal=decimal,
        separator=separator, dates=dates, fields=fields,
    )  # fmt: skip
    options = parse_window_options(
        events=events, bars=bars, structure=structure, higher=higher, label=label, profit=profit, stop=stop,
        horizon=horizon, cost=cost, split=split, max_gap=max_gap,
    )  # fmt: skip
    card = write_windows(bars_files, output, read, options, say=lambda line: announce(f"note: {line}"))
    write_stdout(describe_windows(output, card))


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
    announce(f"simulating {train + val + test:,} windows")
    from ctxtrain.synthetic.sample import write_sample
    from ctxtrain.synthetic.sample_files import describe_sample

    try:
        written = write_sample(
            folder, train=train, val=val, test=test, seed=seed, noise=noise, hide_flags=hide_flags,
            mix=parse_mix(mix), shuffle_labels=shuffle_labels,  # type: ignore[arg-type]  # it checks that there are three
        )  # fmt: skip
    except ValueError as error:
        raise ConfigError(str(error)) from None
    write_stdout(describe_sample(folder, written))


def check(
    train: Annotated[str, typer.Argument(metavar="TRAIN", help="Training rows: a file or a URL.")],
    val: Annotated[str | None, typer.Argument(metavar="[VAL]", help="Validation rows.")] = None,
    test: Annotated[str | None, typer.Argument(metavar="[TEST]", help="Test rows.")] = None,
    base: Annotated[str | None, typer.Option(metavar="FOLDER", help="Check this Qwen, and use its tokenizer.")] = None,
    max_tokens: Annotated[
        int, typer.Option(metavar="N", min=8, max=MAX_TEXT_TOKENS, help="Longest text, as model.max_tokens.")
    ] = 2048,
    fields: Annotated[
        str | None, typer.Option(metavar="NAME=KIND,...", help="Your own bar fields, as in data.fields.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Check rows and look for leakage before training on them."""
    own = parse_fields(fields)
    announce(f"checking {', '.join(shown(path) for path in (train, val, test) if path)}")
    from ctxtrain.data.check import check_files

    tokenizer, notes = None, list[str]()
    if base is not None:
        tune_process()
        from ctxtrain.model.agreement import try_base

        tokenizer, notes = try_base(base)
    report = {"base": notes, **check_files({"train": train, "val": val, "test": test}, tokenizer, max_tokens, own)}
    from ctxtrain.cli.console import print_check

    (print_json if as_json else print_check)(report)
    if report["faults"] or any(leak["refused"] for leak in report["leaks"]):
        raise typer.Exit(DataError.exit_code)
