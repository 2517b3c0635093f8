"""Streams of CUDA as clocks: what runs on one waits for another only where the code that is rehearsed says so.

A kernel takes its seconds on the stream it is launched on. Collectives run beside the kernels, and one after the other,
as those of one NCCL communicator do. What other streams compute takes as long from the default one, as all kernels
share a device. The host is ahead of the device.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch


class Stream:
    """Takes the place of torch.cuda.Stream."""

    priority = device_index = stream_id = cuda_stream = 0

    def __init__(self, *_: Any, **__: Any) -> None:
        self.device = torch.device("cuda", 0)
        self.clock = 0.0  # seconds at which all that was launched on it has ended
        self.waited = 0.0  # of these without a kernel: waiting for another stream, or exchanging

    def wait_until(self, time: float) -> None:
        self.waited += max(0.0, time - self.clock)
        self.clock = max(self.clock, time)

    def wait_stream(self, other: Stream) -> None:
        self.wait_until(other.clock)

    def wait_event(self, event: Event) -> None:
        self.wait_until(event.time)

    def record_event(self, event: Any = None) -> Any:
        event = event or Event(self)
        event.time = self.clock
        return event

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True


class Event:
    """Takes the place of torch.cuda.Event."""

    def __init__(self, stream: Stream) -> None:
        self._stream, self.time = stream, 0.0

    def record(self, stream: Stream | None = None) -> None:
        (stream or self._stream).record_event(self)

    def wait(self, stream: Stream | None = None) -> None:
        (stream or self._stream).wait_event(self)

    def synchronize(self) -> None: ...

    def query(self) -> bool:
        return True

    def elapsed_time(self, *_: Any) -> float:
        return 0.0


class Streams:
    """The streams of a device, and the link on which it exchanges with others."""

    def __init__(self) -> None:
        self.default = self.current = Stream()
        self._link = 0.0  # when the last collective ends

    @contextlib.contextmanager
    def use(self, stream: Stream | None) -> Iterator[Stream | None]:
        """Take the place of torch.cuda.stream."""
        before, self.current = self.current, stream or self.current
        try:
            yield stream
        finally:
            self.current = before

    def event(self, *_: Any, **__: Any) -> Event:
        return Event(self.current)

    def launch(self, seconds: float) -> None:
        """Run a kernel on the current stream."""
        self.current.clock += seconds
        if self.current is not self.default:
            self.default.clock += seconds

    def exchange(self, seconds: float) -> None:
        """Run a collective on the current stream."""
        self._link = max(self._link, self.current.clock) + seconds
        self.current.wait_until(self._link)
