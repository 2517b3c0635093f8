"""Trackers (W&B, TensorBoard), which a process beside the run syncs with the store."""
