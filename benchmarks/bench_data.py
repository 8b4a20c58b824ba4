"""Reading a file of windows, up to tokens: ours against `datasets`. Prints JSON.

    python benchmarks/bench_data.py                                    # 200 MB, both sides
    python benchmarks/bench_data.py --megabytes 2000 --sides ours      # how much memory a large file takes

Both sides get one file of sample rows and Qwen2.5's tokenizer, on as many threads as the machine has cores, and take
turns, each time in a new process: A B A B …

ours  `load_dataset`, as `ctxtrain train` calls it: two walks over the file, every field of every bar checked, labels
      and scales counted, windows rendered and tokenised.
peer  `datasets`: JSON loading, then `map` with the tokenizer over the JSON of each row, `batched=True`, with an empty
      cache, in as many processes as are faster (`--peer-processes`). Nothing is checked.

ratio       median over the rounds of peer's seconds / our seconds, with the smallest and the largest; imports and the
            making of the tokenizer are not counted
peak_gb     peak resident memory of each process; Python, torch and transformers alone take `bare_gb` of it
same_rows   both sides counted the same rows, and the same rows of each label
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import tempfile
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

from ctxtrain.labels import LABELS
from ctxtrain.synthetic.sample import write_sample

DISTINCT = 1200  # rows that the file repeats


def ours(path: str, scratch: str) -> Iterator[Any]:
    from peers import qwen_tokenizer_fast

    from ctxtrain.data.dataset import Inputs, load_dataset
    from ctxtrain.data.window_file import WindowFile

    tokenizer = qwen_tokenizer_fast()
    yield
    data = load_dataset(
        Inputs({"train": WindowFile(path), "val": WindowFile(f"{scratch}/val.jsonl")}),
        tokenizer,
        codec="compact",
        max_tokens=2048,
        oversampling="none",
        max_repeat=None,
        weights="none",
    )
    yield Counter(LABELS[label] for label in data.labels["train"])


def peer(path: str, scratch: str, processes: int) -> Iterator[Any]:
    import datasets
    from peers import qwen_tokenizer_fast, row_text

    datasets.disable_progress_bars()
    tokenizer = qwen_tokenizer_fast()

    def tokenise(batch: dict[str, list[Any]]) -> Any:
        rows = [dict(zip(batch, values, strict=True)) for values in zip(*batch.values(), strict=True)]
        return tokenizer([row_text(row) for row in rows], truncation=True, max_length=32_768)

    yield
    with tempfile.TemporaryDirectory(dir=scratch) as cache:
        data = datasets.load_dataset("json", data_files=path, split="train", cache_dir=cache)
        data = data.map(tokenise, batched=True, batch_size=100, num_proc=processes if processes > 1 else None)
        data = data.select_columns(["input_ids", "label"])
        yield Counter(data["label"])


def live(pipe: Any, side: str, path: str, scratch: str, processes: int) -> None:
    os.environ["HF_HUB_OFFLINE"] = "1"
    task = ours(path, scratch) if side == "ours" else peer(path, scratch, processes)
    next(task)
    bare = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = time.perf_counter()
    classes = next(task)
    seconds = time.perf_counter() - start
    own, children = (resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    pipe.send({"seconds": seconds, "peak_gb": max(own, children) / 2**20, "bare_gb": bare / 2**20, "classes": classes})


def once(*arguments: Any) -> dict[str, Any]:
    context = get_context("spawn")
    mine, theirs = context.Pipe()
    process = context.Process(target=live, args=(theirs, *arguments))
    process.start()
    theirs.close()
    answer: dict[str, Any] = mine.recv()
    process.join()
    return answer


def make_file(folder: Path, megabytes: int) -> Path:
    write_sample(folder, train=DISTINCT, val=60, test=10, seed=0)
    rows = (folder / "train.jsonl").read_bytes()
    path = folder / "rows.jsonl"
    with path.open("wb") as stream:
        for _ in range(max(1, round(megabytes * 1e6 / len(rows)))):
            stream.write(rows)
    return path


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--megabytes", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--sides", nargs="+", choices=("ours", "peer"), default=["ours", "peer"])
    parser.add_argument("--peer-processes", type=int, default=1)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as scratch:
        path = make_file(Path(scratch), options.megabytes)
        rounds = [
            {side: once(side, str(path), scratch, options.peer_processes) for side in options.sides}
            for _ in range(options.repeats)
        ]
        size = path.stat().st_size
    result: dict[str, Any] = {
        "megabytes": round(size / 1e6),
        "rows": sum(rounds[0][options.sides[0]]["classes"].values()),
    }
    for side in options.sides:
        answers = [answers[side] for answers in rounds]
        seconds = statistics.median(answer["seconds"] for answer in answers)
        result[side] = {
            "seconds": round(seconds, 2),
            "megabytes_a_second": round(size / 1e6 / seconds, 1),
            "peak_gb": round(max(answer["peak_gb"] for answer in answers), 2),
            "bare_gb": round(max(answer["bare_gb"] for answer in answers), 2),
        }
    if len(options.sides) == 2:
        ratios = sorted(answers["peer"]["seconds"] / answers["ours"]["seconds"] for answers in rounds)
        result["ratio"] = round(statistics.median(ratios), 2)
        result["ratio_spread"] = [round(ratios[0], 2), round(ratios[-1], 2)]
        result["same_rows"] = all(answers["peer"]["classes"] == answers["ours"]["classes"] for answers in rounds)
        assert result["same_rows"]
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
