"""Connections that Ray itself keeps between the processes of a cluster.

The first time one process asks something of another, Ray opens a connection, and both keep it for as long as they live:
the router to the coordinator when an actor dies, the coordinator to the raylet of each node on which it ends a frozen
process. Their number is bounded by that of the processes, which is watched itself, so that they are no leak. A
connection to a process that is gone, or a third one to the same, is counted with the other handles.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable
from typing import Any, TypeAlias

MOST_EACH = 2
"""Between two processes: either may have asked the other."""

_End: TypeAlias = tuple[str, int]


def num_channels(pid: int, connections: Iterable[Any], members: Collection[int]) -> int:
    """How many of the process's handles they are. `connections`: those of the machine, as `psutil.net_connections`
    gives them; `members`: ids of the cluster's living processes."""
    owners = {(_end(c.laddr), _end(c.raddr)): c.pid for c in connections if c.status == "ESTABLISHED" and c.raddr}
    peers = Counter(owners.get((there, here)) for (here, there), owner in owners.items() if owner == pid)
    return sum(min(count, MOST_EACH) for peer, count in peers.items() if peer in members and peer != pid)


def _end(address: Any) -> _End:
    """The same whether it is told as an IPv4 address or as an IPv6 one that stands for it."""
    return address.ip.removeprefix("::ffff:"), address.port
