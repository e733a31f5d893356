"""Which way the payloads of a link go: chosen when it is opened, from where its two ends are and what they want."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from typing import Any

import torch

from actors.errors import InvalidInput, ProtocolError
from actors.transport.payload.contract import Carrier, PayloadSettings
from actors.transport.payload.cuda_ipc import CudaIpcCarrier
from actors.transport.payload.pair import GlooPair, NcclPair, PairCarrier
from actors.transport.payload.shm import ShmCarrier


@dataclass(frozen=True)
class End:
    """What each end of a link tells the other about itself in `hello`."""

    wish: str = "socket"
    pid: int = 0
    gpu: str = ""
    """UUID of the GPU that it computes on; empty: none."""

    @classmethod
    def of(cls, settings: PayloadSettings) -> End:
        return cls(settings.wish, os.getpid(), _gpu_uuid(settings.device))

    def fields(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def told(cls, fields: Any, peer: str) -> End:
        """Counterpart of `fields`; of a peer that says nothing: over the socket."""
        if fields is None:
            return cls()
        try:
            return cls(str(fields["wish"]), int(fields["pid"]), str(fields["gpu"]))
        except (KeyError, TypeError, ValueError):
            raise ProtocolError(f"malformed end of a link {fields!r}", peer=peer) from None


def choose(here: End, there: End, *, on_one_host: bool) -> tuple[str, ...]:
    """Kinds of carriers, the best first; none where payloads cross the socket. `InvalidInput` where a kind is demanded
    and cannot be.

    Two ends on one host share memory of their GPUs, where both have one, or of the host. `nccl` is for who asks for it.
    """
    wishes = {here.wish, there.wish} - {"auto"}
    if wishes == {"socket"}:
        return ()
    possible = {kind: _hindrance(kind, here, there, on_one_host) for kind in ("cuda_ipc", "shm", "nccl", "gloo")}
    if not wishes:
        return tuple(kind for kind in ("cuda_ipc", "shm") if not possible[kind])
    wish = here.wish if here.wish != "auto" else there.wish
    other = (wishes - {wish}) or {""}
    why = f"the other end wants {other.pop()}" if len(wishes) > 1 else possible.get(wish, "there is no such kind")
    if why:
        raise InvalidInput(why, field="links.payload", value=wish, remedy="use auto")
    return (wish,)


def new_carrier(kind: str, settings: PayloadSettings, peer: str, rank: int) -> Carrier:
    """This end's half; `rank` 0 is the link's, 1 the server's. OSError or RuntimeError where the machine does not
    give what it takes."""
    match kind:
        case "shm":
            return ShmCarrier(settings, peer)
        case "cuda_ipc":
            return CudaIpcCarrier(settings, peer)
        case "nccl":
            return PairCarrier(settings, peer, rank, NcclPair(settings.device))
        case "gloo":
            return PairCarrier(settings, peer, rank, GlooPair())
    raise ProtocolError(f"wants payloads over {kind!r}, which is unknown here", peer=peer)


def _hindrance(kind: str, here: End, there: End, on_one_host: bool) -> str:
    """Why this kind is impossible between them; empty if it is possible."""
    if not on_one_host:
        return "the two ends are on different hosts"
    if kind == "cuda_ipc":
        if not here.gpu or not there.gpu:
            return "the two ends do not compute on GPUs"
        return "both ends are in one process" if here.pid == there.pid else ""
    if kind == "nccl" and (not here.gpu or not there.gpu or here.gpu == there.gpu):
        return "the two ends do not compute on two GPUs"
    return ""


def _gpu_uuid(device: str) -> str:
    if not device.startswith("cuda"):
        return ""
    return str(torch.cuda.get_device_properties(torch.device(device)).uuid)
