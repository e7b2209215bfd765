"""The conditions over the checkpoints of a run."""
