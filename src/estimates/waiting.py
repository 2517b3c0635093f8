"""How long the accelerators of a stage wait, by arithmetic on a few rates, where no finished stage tells. No torch."""

from __future__ import annotations

import math

from src.data.table_size import num_candidates
from src.estimates.disk import published_bytes
from src.planning.identity import CandidatesInputs, CapabilityInputs, GenerateInputs
from src.planning.model_shape import model_shape
from src.planning.stage import Stage

START_SECONDS = 60.0  # of a job, until its first stage begins: SLURM's prologue, Python, torch and CUDA
READ_RATE = 1e9  # bytes/s at which the processes of a job together read weights of a shared disk
WRITE_RATE = 0.5e9  # bytes/s at which rank 0 publishes a model there, while the others wait
SERVER_START_SECONDS = 60.0  # until a model server answers
_FLOAT32 = 4  # bytes


def lasting_seconds(stage: Stage) -> float:
    """Return the seconds of a stage in which no process computes: weights are read and published.

    NaN for a model of unknown shape.
    """
    model = stage.point.model
    shape = model_shape(model.path, model.revision)
    if shape is None:
        return math.nan
    # Samples of a policy are scored under the model it started from, too.
    num_read = 2 if isinstance(stage.inputs, GenerateInputs) and stage.inputs.role == "policy" else 1
    published = published_bytes(stage) if stage.is_training else 0.0
    match stage.inputs:
        case CandidatesInputs(generation=generation) | GenerateInputs(generation=generation):
            has_server = generation.server is not None
        case CapabilityInputs(server=server):
            has_server = server is not None
        case _:
            has_server = False
    start = SERVER_START_SECONDS if has_server else 0.0
    return start + num_read * _FLOAT32 * shape.num_parameters / READ_RATE + published / WRITE_RATE


def uneven_share(stage: Stage, processes: int) -> float:
    """Return the seconds that processes wait for the one with the most batches, per second of all batches.

    Samples are dealt in batches, or one by one to servers; the micro-batches of other stages are many.
    """
    if not isinstance(stage.inputs, CandidatesInputs | GenerateInputs):
        return 0.0
    inputs = stage.inputs
    in_a_batch = stage.resources.sampling_batch_size if inputs.generation.server is None else 1
    num_samples = inputs.num_samples if isinstance(inputs, GenerateInputs) else num_candidates(stage.point)
    if math.isnan(num_samples):
        return math.nan
    num_batches = math.ceil(num_samples / in_a_batch)
    return processes * math.ceil(num_batches / processes) / num_batches - 1
