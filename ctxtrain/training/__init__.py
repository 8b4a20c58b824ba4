"""A config becomes a learner; one optimizer step."""
