"""One optimizer step, a scoring pass or a batch of samples of any point, on a GPU that is not there.

The project's own code runs on fake `cuda` tensors, which have shape, dtype and device and no values: see
docs/rehearsal.md for what that finds, what it cannot see, and what stands in the place of kernels.
"""
