"""A part of the training rows of a run, as a dataset of its own.

Input: the dataset of the run, and numbers of training rows. Output: a `Dataset` with these training rows alone. It is
read from the table of the run: no row is parsed again, and none is tokenised again for an equal codec.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Literal

from ctxtrain.data.class_weights import class_weights
from ctxtrain.data.dataset import Dataset, Ints, fit_codec_of_run
from ctxtrain.data.oversampling import class_counts, oversampled_counts
from ctxtrain.data.profile import survey
from ctxtrain.data.token_store import TokenStore
from ctxtrain.data.training_rows import Augmentation, make_training_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def take_part(
    data: Dataset,
    rows: Ints,
    store: TokenStore,
    tokenizer: PreTrainedTokenizerBase,
    *,
    codec: Literal["compact", "json"],
    oversampling: Literal["auto", "none"] | int,
    max_repeat: float | None,
    weights: Literal["auto", "none"] | Sequence[float],
    augmentation: Augmentation,
) -> Dataset:
    """The dataset with these training rows alone, to which codec, oversampling and class weights are fitted anew.

    Validation and test rows stay; all rows are tokenised again only if the codec is another. Leaks, drift and notices
    are those of all rows. Raises DataError or ConfigError if the rows do not fit the settings or each other.
    """
    train, _ = survey(data.files["train"].take(rows))
    fitted = fit_codec_of_run(train, codec, augmentation)
    files = data.files | {"train": train.file}
    tokens = store.tokens(files, fitted, tokenizer, data.max_tokens)
    training = make_training_rows(train, tokens["train"], store, fitted, tokenizer, data.max_tokens, augmentation)
    counts_C = class_counts(training.labels_R)
    epoch_counts_C = oversampled_counts(counts_C, oversampling, max_repeat)
    return replace(
        data,
        files=files,
        names=data.names | {"train": train.names},
        labels=data.labels | {"train": train.labels_N},
        positions=data.positions | {"train": train.positions},
        tokens=tokens,
        training=training,
        codec=fitted,
        counts_C=counts_C,
        epoch_counts_C=epoch_counts_C,
        class_weights=class_weights(epoch_counts_C, weights),
    )
