"""The figures of docs/real-qwen.md are those of the memory estimate."""

from collections.abc import Callable
from dataclasses import replace

import pytest

from benchmarks.memory_table import TABLES, TOKENS, gb, needs, training
from ctxtrain.model.shape import Batch, Quantization
from tests.documented import PAGES

PAGE = "docs/real-qwen.md"


@pytest.mark.parametrize("table", TABLES)
def test_the_page_has_the_tables_of_the_estimate(table: Callable[[], list[str]]) -> None:
    assert "\n".join(table()) in PAGES[PAGE], "python -m benchmarks.memory_table prints them"


def test_the_example_of_8b_in_nf4_fits_as_the_page_says() -> None:
    batch = Batch(2048, TOKENS)
    run = training("bfloat16", "cuda", windows=4, quantization="nf4", checkpointing=True)
    peak = needs("8B", replace(run, micro_batch=batch, validation_batch=batch)).peak
    assert f"4 windows then fit, with a peak of {gb(peak)} GB." in " ".join(PAGES[PAGE].split())
    assert peak < 8e9


def test_the_configs_of_the_page_fit_their_cards_with_every_text_at_its_limit() -> None:
    longest = 768
    checked: list[tuple[int, str, Quantization, Batch, Batch]] = [
        (8, "1.5B", "none", Batch.of_rows(8, longest), Batch.of_rows(32, longest)),
        (8, "8B", "nf4", Batch(2048, longest), Batch(2048, longest)),
        (24, "8B", "none", Batch.of_rows(8, longest), Batch.of_rows(32, longest)),
    ]
    for card, name, quantization, micro_batch, validation_batch in checked:
        run = training("bfloat16", "cuda", windows=8, quantization=quantization, checkpointing=True)
        run = replace(run, micro_batch=micro_batch, validation_batch=validation_batch)
        assert needs(name, run).peak < card * 1e9, (card, name)
    assert needs("8B", training("bfloat16", "cuda", windows=8)).peak < 80e9
