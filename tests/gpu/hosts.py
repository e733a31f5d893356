"""Expert hosts as processes of their own."""

from __future__ import annotations

import time
from multiprocessing import Queue

from actors.expert.host import ExpertHost
from actors.transport.payload.contract import PayloadSettings
from actors.transport.socket import SocketServer
from actors.trunk.model import ModelSource
from actors.values import Address
from tests.gpu.test_payload import MAX_BYTES


def serve_host(
    addresses: Queue[Address],
    source: ModelSource,
    name: str,
    groups: tuple[int, ...],
    settings: PayloadSettings,
    device: str = "cuda",
) -> None:
    host = ExpertHost(name, source, groups, group_size=2, device=device)
    server = SocketServer(name, host.handle, max_bytes=MAX_BYTES, idle=host.idle, payload=settings)
    server.start()
    addresses.put(server.address)
    time.sleep(300)
