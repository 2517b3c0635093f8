"""A training of a small model whose steps and checkpoints a test takes one by one."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import closing, contextmanager, nullcontext
from pathlib import Path

import torch

from src.config.schema import Lora, Training
from src.distributed import get_distributed
from src.model.numerics import FLOAT32
from src.model.packing import pack
from src.planning.resources import Resources
from src.store.attempt import Attempt
from src.store.lease import Lease
from src.store.store import METRICS_FILE
from src.training import training_state
from src.training.checkpoints import Checkpointer, Votes
from src.training.engine import TrainingEngine
from src.training.strategies import make_engine
from tests.support.small_models import make_model, random_pairs

END = 100  # steps of the training that is checkpointed


class Run:
    """The training of one rank."""

    def __init__(self, engine: TrainingEngine, checkpointer: Checkpointer, attempt: Attempt) -> None:
        self.engine, self.checkpointer, self.attempt, self.step = engine, checkpointer, attempt, 0

    def train(self, steps: int = 1) -> None:
        """Take steps without deciding about checkpoints."""
        for _ in range(steps):
            batch = pack(random_pairs(2, self.step), range(2))
            with self.engine.micro_step(last=True):
                self.engine.backward(-self.engine.policy(batch)[0].sum() / 100)
            self.engine.step()
            self.step += 1
            self.attempt.tokens += 10
            if self.attempt.is_main_process:
                with (self.attempt.out / METRICS_FILE).open("a") as file:
                    file.write(f'{{"step": {self.step}}}\n')

    def resume(self) -> int:
        """Load the newest checkpoint and return its step."""
        self.step = self.checkpointer.resume(END)
        return self.step

    def end_step(self) -> None:
        """Train a step, and decide about checkpoints as the training loop does."""
        self.train()
        votes = torch.tensor(self.checkpointer.votes())
        votes = get_distributed().all_reduce_sum(votes)
        self.checkpointer.end_step(self.step, END, Votes(*votes.tolist()))

    def state(self) -> dict[str, torch.Tensor]:
        """Return weights and moments, whole, on every rank."""
        full: dict[str, torch.Tensor] = {}
        for part, tensors in training_state._state(self.engine.policy, optimizer_of(self.engine)).items():
            for name, value in tensors.items():
                for key, tensor in value.items() if part == "optimizer" else (("", value),):
                    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                    full[f"{part}.{name}.{key}"] = whole.clone()
        return full


def optimizer_of(engine: TrainingEngine) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


@contextmanager
def training(
    folder: Path, strategy: str = "none", minutes: float = 1000.0, lora: Lora | None = None, **model: object
) -> Iterator[Run]:
    """Begin a training of a small model with checkpoints below `folder`."""
    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints").mkdir(exist_ok=True)
    resources = Resources(device="cpu", strategy=strategy)
    with (
        closing(make_engine(resources, Training(lr=1e-3), lora, seed=0)) as engine,
        Lease(folder) if get_distributed().is_main_process else nullcontext() as lease,
    ):
        engine.prepare(lambda: make_model(**model), FLOAT32)
        attempt = Attempt(out, folder / "checkpoints", lease, lambda *_: None, "align", "id", folder)
        with closing(Checkpointer(engine, attempt, minutes)) as checkpointer:
            yield Run(engine, checkpointer, attempt)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("checkpoints/*/step-*"))


def drafts(folder: Path) -> list[Path]:
    return list(folder.glob("checkpoints/*/.draft-*"))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)
