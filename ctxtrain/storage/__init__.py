"""Files that appear whole or not at all; checkpoints; the run folder."""
