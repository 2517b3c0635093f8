"""Ports of servers that tests start."""

from __future__ import annotations

import itertools
import os
import socket

# Below the range that the kernel takes ports of outgoing connections from (net.ipv4.ip_local_port_range): one that is
# free when it is chosen is then still free when the server binds it. Each process of the suite has a range of its own.
_WORKER = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
_PORTS = itertools.cycle(range(10_000 + 1_000 * (_WORKER % 8), 11_000 + 1_000 * (_WORKER % 8)))


def free_port() -> int:
    """Return a port that nothing listens on, another one at each call."""
    for port in _PORTS:
        with socket.socket() as candidate:
            try:
                candidate.bind(("127.0.0.1", port))
            except OSError:
                continue
            return port
    raise AssertionError("ports are counted for ever")
