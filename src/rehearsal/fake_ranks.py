"""A process group in which this process is rank 0 and the others are not there: collectives change no values."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore

from src.distributed import destroy_distributed


@contextlib.contextmanager
def fake_ranks(ranks: int) -> Iterator[None]:
    """Let `init_distributed` join a group of `ranks` processes that are not there."""
    names = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks)}
    names |= {"MASTER_ADDR": "localhost", "MASTER_PORT": "0"}
    init, new_group = dist.init_process_group, dist.new_group

    def init_fake(*_: Any, **__: Any) -> None:
        init("fake", store=FakeStore(), rank=0, world_size=ranks)

    def new_fake_group(*_: Any, **options: Any) -> Any:
        options.pop("timeout", None)
        return new_group(**{**options, "backend": "fake"})

    with (
        mock.patch.dict(os.environ, names if ranks > 1 else {}),
        mock.patch.object(dist, "init_process_group", init_fake),
        mock.patch.object(dist, "new_group", new_fake_group),
    ):
        try:
            yield
        finally:
            destroy_distributed()
