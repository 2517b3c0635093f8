"""One file per stage: `run(inputs, resources, upstream, attempt)` writes the stage's artifacts to `attempt.out`."""
