"""Metrics files, and trackers (W&B, TensorBoard) that are mirrored from the store by a process beside the run."""
