"""Print the tables of docs/real-qwen.md: the memory estimate of a run by part, from the shapes of published models.

python -m benchmarks.memory_table

Nothing is measured and nothing is loaded. `tests/docs/test_memory_page.py` compares the page with these tables.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

from transformers import Qwen2Config, Qwen3Config

from ctxtrain.engine.memory_needs import GB, MemoryNeeds, memory_needs
from ctxtrain.model.shape import Batch, Device, Dtype, LoraShape, ModelShape, Precision, Quantization, Training

TOKENS = 481  # of a window: mean of 20 real 50-bar windows with Qwen2.5's tokenizer
VALIDATION_WINDOWS = 32


def _qwen2(width: int, inner: int, layers: int, heads: int, kv_heads: int) -> Callable[[], Any]:
    return lambda: Qwen2Config(
        vocab_size=151_936, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, pad_token_id=0, num_labels=3,
    )  # fmt: skip


def _qwen3(width: int, inner: int, layers: int, heads: int, kv_heads: int) -> Callable[[], Any]:
    return lambda: Qwen3Config(
        vocab_size=151_936, hidden_size=width, intermediate_size=inner, num_hidden_layers=layers,
        num_attention_heads=heads, num_key_value_heads=kv_heads, head_dim=128, pad_token_id=0, num_labels=3,
    )  # fmt: skip


SHAPES: dict[str, Callable[[], Any]] = {  # as in config.json of Qwen2.5-0.5B, Qwen2.5-1.5B, Qwen3-4B and Qwen3-8B
    "0.5B": _qwen2(896, 4864, 24, 14, 2),
    "1.5B": _qwen2(1536, 8960, 28, 12, 2),
    "4B": _qwen3(2560, 9728, 36, 32, 8),
    "8B": _qwen3(4096, 12288, 36, 32, 8),
}


@cache
def shape_of(name: str) -> ModelShape:
    return ModelShape.from_config(SHAPES[name]())


def training(
    dtype: Dtype, device: Device, *, windows: int, quantization: Quantization = "none", checkpointing: bool = False
) -> Training:
    """A run on windows of `TOKENS` tokens, with the default adapters."""
    return Training(
        LoraShape(),
        Precision(dtype, device),
        Batch.of_rows(windows, TOKENS),
        Batch.of_rows(VALIDATION_WINDOWS, TOKENS),
        engine="packed" if quantization == "none" else "reference",
        quantization=quantization,
        checkpointing=checkpointing,
    )


def needs(name: str, run: Training) -> MemoryNeeds:
    return memory_needs(shape_of(name), run)


def gb(count: float) -> str:
    return f"{count / GB:.1f}" if count >= GB else f"{count / GB:.2f}"


def parts_table() -> list[str]:
    """The parts of a run in bfloat16 on a GPU, 8 windows per micro-batch."""
    plain = {name: needs(name, training("bfloat16", "cuda", windows=8)) for name in SHAPES}
    anew = {name: needs(name, training("bfloat16", "cuda", windows=8, checkpointing=True)) for name in SHAPES}
    rows: list[tuple[str, Callable[[str], str]]] = [
        ("base in bfloat16", lambda name: gb(shape_of(name).base_bytes("bfloat16"))),
        ("base in float32", lambda name: gb(shape_of(name).base_bytes("float32"))),
        ("base, linear layers in int8", lambda name: gb(shape_of(name).base_bytes("bfloat16", "int8"))),
        ("base, linear layers in nf4", lambda name: gb(shape_of(name).base_bytes("bfloat16", "nf4"))),
        ("adapters and head, trained", lambda name: gb(plain[name].trained)),
        ("activations kept for the backward pass", lambda name: gb(plain[name].kept)),
        ("activations kept, with gradient checkpointing", lambda name: gb(anew[name].kept)),
        ("largest temporary tensors in the backward pass", lambda name: gb(plain[name].widest)),
        ("largest temporary tensors, with gradient checkpointing", lambda name: gb(anew[name].widest)),
        ("largest temporary tensors of a validation batch", lambda name: gb(plain[name].widest_validation)),
        ("export, in RAM", lambda name: gb(plain[name].export_host)),
        ("export, the check", lambda name: gb(plain[name].export_check)),
    ]
    weights = [f"{name} ({shape_of(name).weights / 1e6:,.0f} M weights)" for name in SHAPES]
    head = ["| GB | " + " | ".join(weights) + " |", "|---|" + "---|" * len(SHAPES)]
    return head + [f"| {label} | " + " | ".join(map(value, SHAPES)) + " |" for label, value in rows]


CARDS = (8, 24, 80)
WAYS: tuple[tuple[str, Dtype, Quantization, bool], ...] = (
    ("bfloat16", "bfloat16", "none", False),
    ("bfloat16, checkpointing", "bfloat16", "none", True),
    ("nf4", "bfloat16", "nf4", False),
    ("nf4, checkpointing", "bfloat16", "nf4", True),
)


def most_windows(name: str, card: int, dtype: Dtype, quantization: Quantization, *, checkpointing: bool) -> int:
    """The largest micro-batch, in windows, that fits a card of so many GB; 0 if not even one window does."""
    count = 0
    for windows in range(1, 33):
        run = training(dtype, "cuda", windows=windows, quantization=quantization, checkpointing=checkpointing)
        if needs(name, run).peak > card * GB:
            break
        count = windows
    return count


def peaks_table() -> list[str]:
    """Peak of a run on a GPU with 1, 4 and 8 windows per micro-batch."""
    head = ["| GB, with 1 / 4 / 8 windows | " + " | ".join(SHAPES) + " |", "|---|" + "---|" * len(SHAPES)]
    rows = []
    for label, dtype, quantization, on in WAYS:
        cells = []
        for name in SHAPES:
            runs = (
                training(dtype, "cuda", windows=windows, quantization=quantization, checkpointing=on)
                for windows in (1, 4, 8)
            )
            cells.append(" / ".join(gb(needs(name, run).peak) for run in runs))
        rows.append(f"| {label} | " + " | ".join(cells) + " |")
    return head + rows


def cards_table() -> list[str]:
    """Largest `batch_size` that fits cards of 8, 24 and 80 GB, up to 32; –: not even 1."""
    head = ["| card | | " + " | ".join(SHAPES) + " |", "|---|---|" + "---|" * len(SHAPES)]
    rows = []
    for card in CARDS:
        for label, dtype, quantization, on in WAYS:
            counts = [most_windows(name, card, dtype, quantization, checkpointing=on) for name in SHAPES]
            cells = ["32 or more" if count == 32 else str(count) if count else "–" for count in counts]
            rows.append(f"| {card} GB | {label} | " + " | ".join(cells) + " |")
    return head + rows


def cpu_table() -> list[str]:
    """Peak of a run on a CPU with the fast engine, 1 and 8 windows per micro-batch."""
    head = ["| GB, with 1 / 8 windows | " + " | ".join(SHAPES) + " |", "|---|" + "---|" * len(SHAPES)]
    rows = []
    for label, dtype, on in (
        ("float32", "float32", False),
        ("float32, checkpointing", "float32", True),
        ("bfloat16", "bfloat16", False),
        ("bfloat16, checkpointing", "bfloat16", True),
    ):
        cells = []
        for name in SHAPES:
            runs = (training(dtype, "cpu", windows=windows, checkpointing=on) for windows in (1, 8))  # type: ignore[arg-type]
            cells.append(" / ".join(gb(needs(name, run).peak) for run in runs))
        rows.append(f"| {label} | " + " | ".join(cells) + " |")
    return head + rows


TABLES = (parts_table, peaks_table, cards_table, cpu_table)

if __name__ == "__main__":
    for table in TABLES:
        print("\n".join([(table.__doc__ or "").strip(), "", *table(), ""]))
