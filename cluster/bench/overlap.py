"""`overlap_m2`: training with several micro-batches in flight, against one after the other.

Router and expert hosts are processes of their own, over sockets, without Ray. Tokens that travel are made by hosts that
leave each question alone for a while before they look at it, whatever they are doing meanwhile: questions travel beside
each other and beside the hosts' work, as on a long wire.
"""

from __future__ import annotations

import multiprocessing
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing.connection import Connection
from typing import Any

import torch

from actors.expert.host import ExpertHost
from actors.optim import OptimizerSettings
from actors.router.roster import Peer, Roster
from actors.router.router import Router
from actors.transport.message import Message
from actors.transport.socket import SocketLink, SocketServer
from actors.trunk.config import config_of
from actors.trunk.model import ModelSource, skeleton
from actors.values import Address, Placement
from cluster.bench.result import Row, interleaved, rate_row
from cluster.bench.steady import torch_threads
from cluster.config import ClusterConfig

SEQUENCES, LENGTH, MICROBATCHES = 2, 256, 4
STEPS_A_ROUND = 2
IN_FLIGHT = (1, 2, 3)
DELAYS_S = (0.0, 0.01)
"""That tokens are on their way to the experts and back, in addition to what the sockets take."""
START_S, ANSWER_S = 120.0, 60.0
MAX_BYTES = 1 << 30
NUM_HOSTS = 2
LR, CLIP_NORM = 1e-3, 1.0


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


def overlap_rows(config: ClusterConfig, *, rounds: int, delays_s: Sequence[float] = DELAYS_S) -> list[Row]:
    """A row for each number in flight and each delay. On a machine with two GPUs and a config that asks for them the
    router has one and all experts the other."""
    source = ModelSource(config.model.path, config.model.values, config.model.seed, config.router.dtype)
    size = config.experts.group_size
    vocab_size = int(config_of(source).get_text_config().vocab_size)
    generator = torch.Generator().manual_seed(0)
    shape = (STEPS_A_ROUND, MICROBATCHES, SEQUENCES, LENGTH)
    batches = [list(batch) for batch in torch.randint(0, vocab_size, shape, generator=generator)]
    tokens = STEPS_A_ROUND * MICROBATCHES * SEQUENCES * (LENGTH - 1)
    rows: list[Row] = []
    with _hosts(config, source) as hosts, torch_threads(config.router.threads):
        peers = {name: Peer(partial(_link, name, address)) for name, (address, _) in hosts.items()}
        num_groups = _num_experts(source) // size
        held = tuple((f"expert-{group % NUM_HOSTS}",) for group in range(num_groups))
        roster = Roster(Placement(1, held, size), peers)
        router = Router(source, roster, gate=config.model.gate, device=config.router.device, timeout_s=ANSWER_S)
        try:
            router.begin_run(OptimizerSettings())
            for delay_s in delays_s:
                for _, control in hosts.values():
                    control.send(delay_s)
                    _heard(control, ANSWER_S)
                rows += rows_of(router, batches, tokens, delay_s, rounds)
        finally:
            router.close()
    return rows


def rows_of(
    router: Router, batches: Sequence[Sequence[torch.Tensor]], tokens: int, delay_s: float, rounds: int
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
        rate_row(f"overlap_m{m}{ending}", "tokens/s", tokens, seconds[str(m)], travel, seconds["1"])
        for m in IN_FLIGHT
        if m > 1
    ]


def _heard(control: Connection, timeout_s: float) -> Any:
    if not control.poll(timeout_s):
        raise TimeoutError(f"an expert host has not answered within {timeout_s:.0f} s")
    return control.recv()


def _num_experts(source: ModelSource) -> int:
    return skeleton(source).num_experts


def _link(name: str, address: Address) -> SocketLink:
    return SocketLink(name, address, name="router", max_bytes=MAX_BYTES, timeout_s=ANSWER_S)


@contextmanager
def _hosts(config: ClusterConfig, source: ModelSource) -> Iterator[dict[str, tuple[Address, Connection]]]:
    """Name -> where it listens, and where to tell it how long questions travel."""
    size = config.experts.group_size
    num_groups = _num_experts(source) // size
    gpu = "1" if torch.cuda.device_count() > 1 and config.experts.device == "cuda" else ""
    with ExitStack() as stack:
        controls = {
            f"expert-{n}": stack.enter_context(
                _host(f"expert-{n}", source, range(n, num_groups, NUM_HOSTS), size, config, gpu)
            )
            for n in range(NUM_HOSTS)
        }
        found: dict[str, tuple[Address, Connection]] = {}
        for name, control in controls.items():
            found[name] = _heard(control, START_S), control
        yield found


@contextmanager
def _host(
    name: str, source: ModelSource, groups: Sequence[int], size: int, config: ClusterConfig, gpu: str
) -> Iterator[Connection]:
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    arguments = (there, name, source, list(groups), size, config.experts.device, config.experts.threads, gpu)
    process = context.Process(target=_serve, args=arguments, daemon=True)
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


def _serve(
    control: Connection,
    name: str,
    source: ModelSource,
    groups: Sequence[int],
    size: int,
    device: str,
    threads: int,
    gpu: str,
) -> None:
    if gpu:
        os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    torch.set_num_threads(threads)
    host = ExpertHost(name, source, groups, group_size=size, device=device)
    travel = Travel(host)
    server = SocketServer(name, travel.handle, max_bytes=MAX_BYTES, idle=host.idle, ready=travel.ready)
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
