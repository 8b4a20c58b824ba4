"""A whole epoch: ours on compact texts against transformers' Trainer + PEFT on the JSON of each row. Prints JSON.

    python benchmarks/bench_epoch.py                 # some 20 minutes on 2 CPU cores, nearly all of it the peer's

The model has the embedded base's shape (128 × 4 layers) with Qwen2.5's vocabulary and random weights, float32, the
specification's LoRA on q, k, v and o; both sides have Qwen2.5's tokenizer. An epoch is, on both sides: rows read from
JSONL → texts → tokens → one pass of optimizer steps of 8 windows over the training rows → scores on the validation
rows → a checkpoint with weights and optimizer on disk. Imports and the loading of model and tokenizer are not counted.
Each side lives in a process of its own, and they take turns: A B A B …

ours   TrainingPipeline: load_data, train_epoch, evaluate, save_checkpoint.
peer   json.loads and json.dumps of each row's bars → tokenizer → Trainer with dynamic padding, group_by_length,
       evaluation and saving each epoch, otherwise its defaults. Texts are not cut: what is cut off is not learnt from.

ratio       median over the rounds of our windows per second / the peer's, with the smallest and the largest
tokens      mean tokens of a training window of each side
same_work   both sides train the same number of parameters on the same rows, in the same number of optimizer steps
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
import warnings
from collections.abc import Iterator, Sequence
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from peers import qwen_tokenizer_fast, row_text
from transformers import Qwen3Config, Qwen3ForCausalLM

from ctxtrain.config.schema import Config
from ctxtrain.labels import LABELS
from ctxtrain.model.base import load_classifier
from ctxtrain.model.lora import add_lora, trainable_parameters
from ctxtrain.model.tokenizer import load_tokenizer
from ctxtrain.synthetic.sample import write_sample
from ctxtrain.train import TrainingPipeline

BATCH, RATE = 8, 1.0e-4
VALIDATION = 16


def write_base(folder: Path) -> None:
    tokenizer = qwen_tokenizer_fast()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4,
        num_key_value_heads=2, head_dim=32, pad_token_id=tokenizer.pad_token_id, bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id, max_position_embeddings=32_768,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3ForCausalLM(config).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")


def ours(folder: Path) -> Iterator[dict[str, Any]]:
    config = Config.parse(
        {
            "data": {"train": str(folder / "train.jsonl"), "val": str(folder / "val.jsonl")},
            "model": {"base": str(folder / "base")},
            "oversampling": {"target": "none"},
            "training": {
                "epochs": 1,
                "batch_size": BATCH,
                "gradient_accumulation": 1,
                "learning_rate": RATE,
                "warmup_steps": 0,
            },
            "output_dir": str(folder / "ours"),
        }
    )
    run = TrainingPipeline(config)
    run.load_data()
    run.setup_model()  # the model is loaded outside the clock, and anew for each round
    while True:
        yield {}
        start = time.perf_counter()
        run.load_data()
        run.train_epoch()
        run.save_checkpoint(run.evaluate())
        seconds = time.perf_counter() - start
        yield {
            "seconds": seconds,
            "rows": len(run.data.labels["train"]),
            "steps": run.state.step,
            "parameters": sum(weight.numel() for weight in run.learner.parameters.values()),
            "tokens": float(run.data.tokens["train"].lengths.mean()),
        }
        run = TrainingPipeline(config)
        run.load_data()
        run.setup_model()


def peer(folder: Path) -> Iterator[dict[str, Any]]:
    from transformers import DataCollatorWithPadding, Trainer, TrainingArguments

    tokenizer = load_tokenizer(str(folder / "base"))

    def rows(name: str) -> list[dict[str, Any]]:
        parsed = [json.loads(line) for line in (folder / name).read_text("utf-8").splitlines()]
        ids = tokenizer([row_text(row) for row in parsed])["input_ids"]
        return [
            {"input_ids": each, "labels": LABELS.index(row["label"])} for each, row in zip(ids, parsed, strict=True)
        ]

    while True:
        base = load_classifier(str(folder / "base"), tokenizer.pad_token_id)
        model = add_lora(
            base, r=8, alpha=16, dropout=0.05, target_modules=["q_proj", "k_proj", "v_proj", "o_proj"], layers="all"
        )
        arguments = TrainingArguments(
            str(folder / "peer"), use_cpu=True, num_train_epochs=1, per_device_train_batch_size=BATCH,
            learning_rate=RATE, train_sampling_strategy="group_by_length", eval_strategy="epoch",
            save_strategy="epoch", report_to=[], disable_tqdm=True, logging_strategy="no",
        )  # fmt: skip
        yield {}
        start = time.perf_counter()
        train, val = rows("train.jsonl"), rows("val.jsonl")
        trainer = Trainer(
            model=model, args=arguments, train_dataset=train, eval_dataset=val,
            data_collator=DataCollatorWithPadding(tokenizer),
        )  # fmt: skip
        trainer.train()
        yield {
            "seconds": time.perf_counter() - start,
            "rows": len(train),
            "steps": trainer.state.global_step,
            "parameters": sum(weight.numel() for weight in trainable_parameters(model).values()),
            "tokens": statistics.mean(len(row["input_ids"]) for row in train),
        }


def live(pipe: Any, side: str, folder: Path, threads: int) -> None:
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    task = (ours if side == "ours" else peer)(folder)
    while pipe.recv() != "end":
        next(task)
        pipe.send(next(task))


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--windows", type=int, default=48)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args(arguments)
    context = get_context("spawn")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_sample(folder, train=options.windows, val=VALIDATION, test=10, seed=0)
        write_base(folder)
        pipes = {}
        for side in ("ours", "peer"):
            pipes[side], theirs = context.Pipe()
            context.Process(target=live, args=(theirs, side, folder, options.threads), daemon=True).start()
            theirs.close()
        rounds = []
        for _ in range(options.repeats):
            answers = {}
            for side, pipe in pipes.items():
                pipe.send("epoch")
                answers[side] = pipe.recv()
            rounds.append(answers)
            for what in ("rows", "steps", "parameters"):
                assert answers["ours"][what] == answers["peer"][what], f"both sides must do the same work: {answers}"
        for pipe in pipes.values():
            pipe.send("end")
    ratios = sorted(answers["peer"]["seconds"] / answers["ours"]["seconds"] for answers in rounds)
    print(
        json.dumps(
            {
                "windows": options.windows,
                "threads": options.threads,
                "rounds": options.repeats,
                "ratio": round(statistics.median(ratios), 1),
                "ratio_spread": [round(ratios[0], 1), round(ratios[-1], 1)],
                "windows_a_second": {
                    side: round(options.windows / statistics.median(answers[side]["seconds"] for answers in rounds), 2)
                    for side in pipes
                },
                "tokens": {side: round(rounds[0][side]["tokens"]) for side in pipes},
                "same_work": True,
            }
        )
    )


if __name__ == "__main__":
    main()
