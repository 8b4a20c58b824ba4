"""Bounds of user-supplied numbers, shared by configs and commands.

A value beyond them is almost certainly a typing error.
"""

MAX_TEXT_TOKENS = 1 << 20
MAX_SAMPLE_ROWS = 10_000_000  # in one file of `ctxtrain sample`
MAX_STEPS = 100_000_000
MAX_EPOCHS = 100_000
MAX_WINDOWS = 10_000_000  # per class and epoch
MAX_BATCH_SIZE = 65_536
MAX_BATCH_TOKENS = 1 << 30  # of a micro-batch, padding included
MAX_SEEDS = 1_000
MAX_FOLDS = 1_000
MIN_PART = 10  # training windows of a point of the learning curve
MAX_PARTS = 20  # points of a learning curve
MIN_GRAD_NORM, MAX_GRAD_NORM = 1e-9, 1_000_000_000  # to which gradients are clipped
MIN_LEARNING_RATE = 1e-12  # below it, no float32 weight changes
MIN_CLASS_WEIGHT, MAX_CLASS_WEIGHT = 1e-6, 1_000_000  # of a class in the loss
