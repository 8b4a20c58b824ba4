"""One optimizer step: ours against eager PEFT under transformers' Trainer. Prints JSON, one line a shape.

    python benchmarks/bench_step.py                                     # base and wide; some minutes on 2 CPU cores
    python benchmarks/bench_step.py --shapes 0.5b --repeats 3           # 16 GB of memory, some 10 minutes

Both sides train one float32 model of one seed on the same token rows with the specification's LoRA. Each side lives
in a process of its own, so that each has its own allocator settings and its own peak memory, ours in the environment
that our command line sets, and they take turns, one step each: A B A B … A step is, on both sides: batch of token rows
→ forward pass with LoRA dropout → loss → backward pass → clipping at norm 1 → AdamW → gradients cleared.

ours  `Learner.step` as in a training run: padding, seeding of dropout and the checks for finite values included.
peer  `Trainer.training_step` of the installed transformers and what Trainer does after it, with Trainer's own
      optimizer (fused AdamW) and default settings; the padded batch with attention mask and labels is made beforehand.

Shapes: `base` is the embedded base with 16 windows of 124 to 131 tokens; `wide` is a Qwen3 of 512 × 8 layers of random
weights and the same rows; `0.5b` is Qwen2.5-0.5B's shape with random weights and 4 rows of 512 tokens.

ratio             median over the rounds of peer's seconds / our seconds, with the smallest and the largest
losses_agree      largest relative difference of the losses of two steps without dropout, from the same weights
gflops            what the task demands / our seconds: frozen weights in both passes and causal attention, less the last
                  layer's tokens that nothing reads and the first layer's gradient that nobody needs; for the peer,
                  whose time is set against the same work
matmul_gflops     this machine's rate at 2048 × 896 × 4864 in each round, of torch.mm and of the route that we take
of_matmul         our gflops / each of the two, median over the rounds
peak_gb           peak resident memory of each process, Python and weights included; peak_ratio is ours / peer
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import tempfile
import time
import warnings
from multiprocessing import get_context
from typing import Any

import numpy as np
import torch
from accelerate import Accelerator
from peft import PeftModel
from sides import our_environment
from torch import nn
from transformers import Qwen2Config, Qwen2ForSequenceClassification, Qwen3Config, Qwen3ForSequenceClassification

from ctxtrain.config.sections import LoraConfig
from ctxtrain.data.batches import collate, plan_step
from ctxtrain.data.tokens import Tokens
from ctxtrain.engine.cpu.layer_parts import matmul_t
from ctxtrain.engine.tuning import allocator
from ctxtrain.labels import LABELS
from ctxtrain.model.base import load_classifier
from ctxtrain.model.embedded import embedded_base
from ctxtrain.model.lora import add_lora, trainable_parameters
from ctxtrain.model.losses import FocalLoss
from ctxtrain.model.optimizer import make_optimizer
from ctxtrain.model.schedule import make_schedule
from ctxtrain.runtime import make_accelerator
from ctxtrain.training.step import Learner

SHAPES = ("base", "wide", "0.5b")
SIDES = ("ours", "peer")
ROUTES = ("torch.mm", "ours")
RATE, DECAY, CLIP, DROPOUT = 2.0e-4, 0.01, 1.0, 0.05
PAUSE = 0.05  # seconds between turns: threads of a side that is done spin for some ms, and would disturb the next
COMMON = {"pad_token_id": 0, "bos_token_id": None, "num_labels": len(LABELS), "use_cache": False}


def make_model(shape: str) -> PeftModel:
    """The shape's classifier with adapters, the same in every process."""
    torch.manual_seed(0)
    if shape == "base":
        model = load_classifier(str(embedded_base()), 0)
    elif shape == "wide":
        config = Qwen3Config(
            vocab_size=16827, hidden_size=512, intermediate_size=1536, num_hidden_layers=8, num_attention_heads=8,
            num_key_value_heads=4, head_dim=64, **COMMON,
        )  # fmt: skip
        model = Qwen3ForSequenceClassification(config)
    else:
        config = Qwen2Config(
            vocab_size=151936, hidden_size=896, intermediate_size=4864, num_hidden_layers=24, num_attention_heads=14,
            num_key_value_heads=2, rope_theta=1e6, **COMMON,
        )  # fmt: skip
        model = Qwen2ForSequenceClassification(config)
    adapted = add_lora(model, **(LoraConfig().model_dump() | {"dropout": DROPOUT}))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:  # not zero, as after some steps
            nn.init.normal_(weight, std=0.01)
    return adapted


def make_rows(shape: str) -> tuple[Tokens, np.ndarray]:
    rng = np.random.default_rng(0)
    lengths = np.full(4, 512) if shape == "0.5b" else np.sort(rng.integers(124, 132, 16))
    flat = rng.integers(1, 16000, lengths.sum()).astype(np.int32)
    return Tokens.from_lengths(flat, lengths, 0), rng.integers(0, len(LABELS), len(lengths))


def our_learner(model: PeftModel, dtype: torch.dtype = torch.float32) -> Learner:
    """As `build_learner` makes it for a run in this precision."""
    accelerator: Accelerator = make_accelerator(dtype)
    if accelerator.device.type == "cpu":
        allocator.keep_freed_memory()
    optimizer = make_optimizer(trainable_parameters(model).values(), learning_rate=RATE, weight_decay=DECAY)
    schedule = make_schedule(optimizer, "constant", warmup_steps=0, total_steps=10**6)
    loss_fn = FocalLoss([1.0] * len(LABELS), accelerator.device, gamma=0.0)  # the cross-entropy of the peer
    return Learner(accelerator, model, optimizer, schedule, loss_fn, max_grad_norm=CLIP, seed=0)


def our_step(learner: Learner, tokens: Tokens, labels_N: np.ndarray, batch_size: int | None = None) -> Any:
    """A step over all rows, in micro-batches of `batch_size`; called with its number, it returns the loss."""
    size = batch_size or len(tokens)
    plan = plan_step(np.arange(len(tokens)), tokens.lengths, 0, batch_size=size, accumulation=-(-len(tokens) // size))
    return lambda number: learner.step(tokens, labels_N, plan, (0, number))["loss"]


def peer_trainer(model: PeftModel, folder: str, **flags: Any) -> Any:
    from transformers import Trainer, TrainingArguments

    settings = {
        "use_cpu": True, "learning_rate": RATE, "weight_decay": DECAY, "max_grad_norm": CLIP, "warmup_steps": 0,
        "lr_scheduler_type": "constant", "report_to": [], "disable_tqdm": True,
    }  # fmt: skip
    trainer = Trainer(model=model, args=TrainingArguments(folder, **(settings | flags)))
    trainer.create_optimizer_and_scheduler(10**6)
    trainer.model_wrapped = trainer.accelerator.prepare_model(model)
    return trainer


def peer_step(trainer: Any, tokens: Tokens, labels_N: np.ndarray, batch_size: int | None = None) -> Any:
    """The same step by Trainer, its batches of similar lengths, as Trainer groups them, made and moved beforehand."""
    network, order = trainer.model_wrapped, np.argsort(tokens.lengths, kind="stable")
    size = batch_size or len(tokens)
    batches = [
        collate(tokens, rows, trainer.args.device)
        | {"labels": torch.from_numpy(labels_N[rows]).to(trainer.args.device)}
        for rows in (order[start : start + size] for start in range(0, len(order), size))
    ]

    def step(_: int) -> float:
        trainer.current_gradient_accumulation_steps = len(batches)  # as its loop sets it
        loss = sum(trainer.training_step(network, batch) for batch in batches)
        trainer.accelerator.clip_grad_norm_(network.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        trainer.lr_scheduler.step()
        network.zero_grad()
        return float(loss)

    return step


def live(pipe: Any, side: str, shape: str, threads: int) -> None:
    """Build one side, answer `check` with a loss without dropout, `step` with seconds, `end` with memory."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(threads)
    model = make_model(shape)
    drops = [module for module in model.modules() if isinstance(module, nn.Dropout)]
    with tempfile.TemporaryDirectory() as folder:
        rows = make_rows(shape)
        ours = side == "ours"
        step = our_step(our_learner(model), *rows) if ours else peer_step(peer_trainer(model, folder), *rows)
        number = 0
        while (order := pipe.recv()) != "end":
            for drop in drops:
                drop.p = 0.0 if order == "check" else DROPOUT
            start = time.perf_counter()
            loss = step(number)
            pipe.send(loss if order == "check" else time.perf_counter() - start)
            number += 1
    pipe.send(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20)


def live_matmul(pipe: Any, threads: int) -> None:
    """Answer each message with the GFLOP/s of a matrix product, by torch.mm and by our own route."""
    torch.set_num_threads(threads)
    allocator.keep_freed_memory()  # and the next: the settings of a run
    make_accelerator(torch.float32)
    a, b = torch.randn(2048, 896), torch.randn(4864, 896)
    products = dict(zip(ROUTES, (lambda: torch.mm(a, b.t()), lambda: matmul_t(a, b)), strict=True))
    while pipe.recv() != "end":
        seconds: dict[str, list[float]] = {name: [] for name in ROUTES}
        for _ in range(3):
            for name, product in products.items():
                start = time.perf_counter()
                product()
                seconds[name].append(time.perf_counter() - start)
        pipe.send({name: 2 * a.numel() * len(b) / statistics.median(each) / 1e9 for name, each in seconds.items()})


def demanded_flops(model: PeftModel, lengths_N: np.ndarray) -> float:
    """Multiplications and additions of a step, as the docstring above counts them."""
    layers = model.get_base_model().model.layers
    heads, count = model.config.num_attention_heads * layers[0].self_attn.head_dim, len(layers)
    sizes = {
        name.rpartition(".")[2]: getattr(part, "base_layer", part).weight.numel()
        for name, part in layers[0].named_modules()
        if name.endswith("_proj")
    }
    every, qkv = sum(sizes.values()), sizes["q_proj"] + sizes["k_proj"] + sizes["v_proj"]
    tokens, pooled = float(lengths_N.sum()), float(len(lengths_N))
    key_value = qkv - sizes["q_proj"]
    forward = tokens * ((count - 1) * every + key_value) + pooled * (every - key_value)
    products = 2 * forward - tokens * qkv
    attention = 6 * (count - 1) * heads * float((lengths_N * (lengths_N + 1) / 2).sum())
    return 2 * (products + attention)


def compare(shape: str, repeats: int, threads: int) -> dict[str, Any]:
    context = get_context("spawn")
    pipes: dict[str, Any] = {}
    processes: dict[str, Any] = {}

    def start(name: str, target: Any, *arguments: Any) -> None:
        pipes[name], theirs = context.Pipe()
        processes[name] = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        processes[name].start()
        theirs.close()  # so that the end of a process ends the waiting for its answer

    def start_sides() -> None:
        with our_environment():  # ours first, as it depends on what else is running
            start("ours", live, "ours", shape, threads)
        start("peer", live, "peer", shape, threads)

    def ask(name: str, order: str) -> Any:
        time.sleep(PAUSE)
        pipes[name].send(order)
        return pipes[name].recv()

    start_sides()
    losses = [(ask("ours", "check"), ask("peer", "check")) for _ in range(2)]
    for side in SIDES:
        ask(side, "end")
        processes[side].join()  # or our environment would be that of a busy machine
    start_sides()  # anew, since steps without dropout leave gaps of another size in the memory of those that follow
    start("matmul", live_matmul, threads)
    rounds = [(ask("ours", "step"), ask("peer", "step"), ask("matmul", "rate")) for _ in range(repeats + 1)][1:]
    pipes["matmul"].send("end")
    peaks = {side: round(ask(side, "end"), 2) for side in SIDES}
    ratios = sorted(peer / ours for ours, peer, _ in rounds)
    demand = demanded_flops(make_model(shape), make_rows(shape)[0].lengths)
    middle = {side: statistics.median(pair[place] for pair in rounds) for place, side in enumerate(SIDES)}
    gap = max(abs(ours - peer) / abs(peer) for ours, peer in losses)
    assert gap <= 1e-5, f"the two sides must compute the same losses, got {losses}"
    return {
        "shape": shape,
        "threads": threads,
        "rounds": repeats,
        "ratio": round(statistics.median(ratios), 2),
        "ratio_spread": [round(ratios[0], 2), round(ratios[-1], 2)],
        "seconds": {side: round(value, 4) for side, value in middle.items()},
        "losses_agree": gap,
        "gflops": {side: round(demand / value / 1e9, 1) for side, value in middle.items()},
        "matmul_gflops": {name: round(statistics.median(rates[name] for *_, rates in rounds), 1) for name in ROUTES},
        "of_matmul": {
            name: round(statistics.median(demand / ours / 1e9 / rates[name] for ours, _, rates in rounds), 2)
            for name in ROUTES
        },
        "peak_gb": peaks,
        "peak_ratio": round(peaks["ours"] / peaks["peer"], 2),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["base", "wide"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    options = parser.parse_args()
    for shape in options.shapes:
        print(json.dumps(compare(shape, options.repeats, options.threads)), flush=True)


if __name__ == "__main__":
    main()
