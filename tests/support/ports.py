"""Ports of servers that tests start."""

from __future__ import annotations

import contextlib
import itertools
import os
import socket

# Below the range that the kernel takes ports of outgoing connections from (net.ipv4.ip_local_port_range): one that is
# free when it is chosen is then still free when the server binds it. Each process of the suite has a range of its own.
_FIRST = 10_000 + 1_000 * (int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")) % 8)
_ports = itertools.cycle(range(_FIRST, _FIRST + 1_000))


def free_port() -> int:
    """Return a port that nothing listens on, another one at each call."""
    while True:
        with socket.socket() as candidate, contextlib.suppress(OSError):  # something listens on it
            candidate.bind(("127.0.0.1", port := next(_ports)))
            return port
