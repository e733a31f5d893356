"""`overlap_m2`: training with several micro-batches in flight, against one after the other. `overlap_3b_m2`: the same
with the model of `cluster.bench.one_gpu` on a GPU, and its experts on another one if there is one.

Router and expert hosts are processes of their own, over sockets, without Ray. Tokens that travel are made by hosts that
leave each question alone for a while before they look at it, whatever they are doing meanwhile: questions travel beside
each other and beside the hosts' work, as on a long wire.
"""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch
from torch import Tensor

from actors.expert.host import ExpertHost
from actors.moe.settings import GateSettings
from actors.optim import OptimizerSettings
from actors.router.roster import Peer, Roster
from actors.router.router import Router
from actors.transport.message import Message
from actors.transport.payload.contract import PayloadSettings
from actors.transport.socket import SocketLink, SocketServer
from actors.trunk.config import config_of
from actors.trunk.model import ModelSource, skeleton
from actors.values import Address, Placement
from cluster.bench.one_gpu import MIN_ROUNDS, WHOLE, has_room, save_model
from cluster.bench.result import Row, interleaved, rate_row
from cluster.bench.steady import torch_threads
from cluster.config import ClusterConfig

IN_FLIGHT = (1, 2, 3)
DELAYS_S = (0.0, 0.01)
"""That tokens are on their way to the experts and back, in addition to what the sockets take."""
START_S, ANSWER_S = 120.0, 60.0
MAX_BYTES = 1 << 30
LR, CLIP_NORM = 1e-3, 1.0


@dataclass(frozen=True)
class Setting:
    """What is trained, and where."""

    source: ModelSource
    group_size: int
    num_hosts: int
    steps: int
    """A round."""
    microbatches: int
    """A step."""
    sequences: int
    length: int
    router_device: str
    expert_device: str
    router_threads: int
    expert_threads: int
    gate: GateSettings | None = None

    @property
    def tokens(self) -> int:
        """A round, that are predicted."""
        return self.steps * self.microbatches * self.sequences * (self.length - 1)

    def batches(self) -> list[list[Tensor]]:
        vocab_size = int(config_of(self.source).get_text_config().vocab_size)
        generator = torch.Generator().manual_seed(0)
        shape = (self.steps, self.microbatches, self.sequences, self.length)
        ids = torch.randint(0, vocab_size, shape, generator=generator).to(self.router_device)
        return [list(batch) for batch in ids]


class Travel:
    """Keeps back every question for `delay_s` from when it has been taken in. For the serving thread alone."""

    def __init__(self, host: ExpertHost) -> None:
        self.delay_s = 0.0
        self._host = host
        self._due: dict[int, float] = {}
        """By question at hand: a `time.monotonic` value."""

    def ready(self, question: Message) -> bool:
        due_s = self._due.setdefault(id(question), time.monotonic() + self.delay_s)
        return time.monotonic() >= due_s and self._host.ready(question)

    def handle(self, peer: str, question: Message) -> Message:
        self._due.pop(id(question), None)
        return self._host.handle(peer, question)


def overlap_rows(config: ClusterConfig, *, rounds: int) -> list[Row]:
    """A row for each number in flight and each delay."""
    setting = Setting(
        source=ModelSource(config.model.path, config.model.values, config.model.seed, config.router.dtype),
        group_size=config.experts.group_size,
        num_hosts=2,
        steps=2,
        microbatches=4,
        sequences=2,
        length=256,
        router_device=config.router.device,
        expert_device=config.experts.device,
        router_threads=config.router.threads,
        expert_threads=config.experts.threads,
        gate=config.model.gate,
    )
    return _rows("overlap", setting, rounds)


def gpu_overlap_rows(rounds: int) -> list[Row]:
    """None where no GPU has room."""
    if not has_room():
        return []
    with tempfile.TemporaryDirectory() as directory:
        save_model(WHOLE, directory)
        torch.cuda.empty_cache()
        setting = Setting(
            source=ModelSource(path=directory, dtype=WHOLE.dtype),
            group_size=WHOLE.group_size,
            num_hosts=1,
            steps=1,
            microbatches=6,
            sequences=8,
            length=1024,
            router_device="cuda:0",
            expert_device=f"cuda:{min(1, torch.cuda.device_count() - 1)}",
            router_threads=torch.get_num_threads(),
            expert_threads=1,
        )
        return _rows("overlap_3b", setting, max(rounds, MIN_ROUNDS))


def _rows(case: str, setting: Setting, rounds: int) -> list[Row]:
    batches, rows = setting.batches(), list[Row]()
    payload = PayloadSettings("auto", setting.router_device)
    with _hosts(setting) as hosts, torch_threads(setting.router_threads):
        peers = {name: Peer(partial(_link, name, address, payload)) for name, (address, _) in hosts.items()}
        num_groups = skeleton(setting.source).num_experts // setting.group_size
        held = tuple((f"expert-{group % setting.num_hosts}",) for group in range(num_groups))
        roster = Roster(Placement(1, held, setting.group_size), peers)
        router = Router(setting.source, roster, gate=setting.gate, device=setting.router_device, timeout_s=ANSWER_S)
        try:
            router.begin_run(OptimizerSettings())
            for delay_s in DELAYS_S:
                for _, control in hosts.values():
                    control.send(delay_s)
                    _heard(control, ANSWER_S)
                rows += rows_of(case, router, batches, setting.tokens, delay_s, rounds)
        finally:
            router.close()
    return rows


def rows_of(
    case: str, router: Router, batches: Sequence[Sequence[torch.Tensor]], tokens: int, delay_s: float, rounds: int
) -> list[Row]:
    def train(in_flight: int) -> None:
        router.steps.accumulation.in_flight = in_flight
        for batch in batches:
            router.train_step(batch, lr=LR, clip_norm=CLIP_NORM)

    candidates: Mapping[int, Callable[[], None]] = {m: partial(train, m) for m in IN_FLIGHT}
    seconds = interleaved({str(m): run for m, run in candidates.items()}, rounds)
    travel = f"m = 1, {1e3 * delay_s:.0f} ms of travel a question" if delay_s else "m = 1"
    ending = f"_{1e3 * delay_s:.0f}ms" if delay_s else ""
    return [
        rate_row(f"{case}_m{m}{ending}", "tokens/s", tokens, seconds[str(m)], travel, seconds["1"])
        for m in IN_FLIGHT
        if m > 1
    ]


def _heard(control: Connection, timeout_s: float) -> Any:
    if not control.poll(timeout_s):
        raise TimeoutError(f"an expert host has not answered within {timeout_s:.0f} s")
    return control.recv()


def _link(name: str, address: Address, payload: PayloadSettings) -> SocketLink:
    return SocketLink(name, address, name="router", max_bytes=MAX_BYTES, timeout_s=ANSWER_S, payload=payload)


@contextmanager
def _hosts(setting: Setting) -> Iterator[dict[str, tuple[Address, Connection]]]:
    """Name -> where it listens, and where to tell it how long questions travel."""
    num_groups = skeleton(setting.source).num_experts // setting.group_size
    with ExitStack() as stack:
        controls = {
            f"expert-{n}": stack.enter_context(_host(f"expert-{n}", setting, range(n, num_groups, setting.num_hosts)))
            for n in range(setting.num_hosts)
        }
        found: dict[str, tuple[Address, Connection]] = {}
        for name, control in controls.items():
            found[name] = _heard(control, START_S), control
        yield found


@contextmanager
def _host(name: str, setting: Setting, groups: Sequence[int]) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    process = context.Process(target=_serve, args=(there, name, setting, list(groups)), daemon=True)
    process.start()
    there.close()
    try:
        yield here
    finally:
        here.close()  # ends it
        process.join(ANSWER_S)
        if process.is_alive():
            process.kill()
            process.join()


def _serve(control: Connection, name: str, setting: Setting, groups: Sequence[int]) -> None:
    torch.set_num_threads(setting.expert_threads)
    device = setting.expert_device
    host = ExpertHost(name, setting.source, groups, group_size=setting.group_size, device=device)
    travel = Travel(host)
    server = SocketServer(
        name,
        travel.handle,
        max_bytes=MAX_BYTES,
        idle=host.idle,
        ready=travel.ready,
        payload=PayloadSettings("auto", device),
    )
    server.start()
    try:
        control.send(server.address)
        while True:
            travel.delay_s = control.recv()
            control.send(travel.delay_s)
    except (EOFError, OSError):  # the bench is over
        server.stop()
        host.close()
        os._exit(0)  # libraries' threads may keep an interpreter that ends by itself
