"""Build the learner of a run from its config; run one optimizer step; check a checkpoint before resuming."""
