"""Upper bounds of numbers that users give, shared by configs and commands: more is a slip of the hand."""

MOST_TOKENS = 1 << 20
MOST_ROWS = 10_000_000  # of a sample's file
MOST_STEPS = 100_000_000
MOST_EPOCHS = 100_000
MOST_WINDOWS = 10_000_000  # of a class, in an epoch
MOST_IN_BATCH = 65_536
MOST_SEEDS = 1_000
MOST_FOLDS = 1_000
LEAST_NORM, MOST_NORM = 1e-9, 1_000_000_000  # of a clipped gradient
LEAST_RATE = 1e-12  # of learning; below it no float32 weight moves
LEAST_WEIGHT, MOST_WEIGHT = 1e-6, 1_000_000  # of a class
