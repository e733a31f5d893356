"""Router and expert hosts on a CUDA device give the numbers of plain transformers there."""

from __future__ import annotations

import math
import multiprocessing
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from multiprocessing import Queue
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

from actors.compress.settings import CompressionSettings, Method
from actors.expert.host import ExpertHost
from actors.moe.settings import GateSettings
from actors.optim import OptimizerSettings
from actors.router.roster import Peer, Roster
from actors.router.router import Router
from actors.transport.socket import SocketLink, SocketServer
from actors.trunk.model import ModelSource
from actors.values import Address, Placement, Sampling
from tests.contract.test_copies import copies_agree
from tests.families import FAMILIES, save
from tests.local import cluster

pytestmark = pytest.mark.gpu

BATCHES = [
    [torch.randint(0, 256, (2, 32), generator=torch.Generator().manual_seed(10 * t + m)) for m in range(2)]
    for t in range(4)
]
IDS = torch.randint(0, 256, (1, 24), generator=torch.Generator().manual_seed(99))


def losses(source: ModelSource, device: str, gate: GateSettings | None = None) -> list[float]:
    with cluster(source, 2, device=device, gate=gate) as local:
        local.router.begin_run(OptimizerSettings())
        return [local.router.train_step(b, lr=1e-3, clip_norm=1.0).loss for b in BATCHES]


def serve(source: ModelSource, name: str, groups: tuple[int, ...], addresses: Queue[Address]) -> None:
    host = ExpertHost(name, source, groups, group_size=2, device="cuda")
    server = SocketServer(name, host.handle, max_bytes=1 << 28, idle=host.idle)
    server.start()
    addresses.put(server.address)
    time.sleep(300)


@contextmanager
def host_process(source: ModelSource, name: str, groups: tuple[int, ...]) -> Iterator[Address]:
    """A process of its own, as an actor has: autograd has one thread a device and process, and a router that waits for
    its experts in backward holds it."""
    context = multiprocessing.get_context("spawn")
    addresses = context.Queue()
    process = context.Process(target=serve, args=(source, name, groups, addresses), daemon=True)
    process.start()
    try:
        yield addresses.get(timeout=120)
    finally:
        process.kill()
        process.join(10)


@pytest.mark.parametrize("family", FAMILIES)
def test_losses_equal_those_on_the_cpu(tmp_path: Path, family: str) -> None:
    source = ModelSource(path=str(save(family, tmp_path / "m", torch.float32)))
    torch.testing.assert_close(losses(source, "cuda"), losses(source, "cpu"), rtol=1e-3, atol=0)


@pytest.mark.parametrize("in_flight", [1, 2])
def test_losses_over_sockets_equal_those_on_the_cpu(tmp_path: Path, in_flight: int) -> None:
    source = ModelSource(path=str(save("deepseek_v3", tmp_path / "m", torch.float32)))
    with ExitStack() as stack:
        parts = {"a": (0, 1), "b": (2, 3)}
        addresses = [stack.enter_context(host_process(source, name, groups)) for name, groups in parts.items()]
        peers = {
            name: Peer(partial(SocketLink, name, address, name="router", max_bytes=1 << 28, timeout_s=60))
            for name, address in zip("ab", addresses, strict=True)
        }
        placement = Placement(1, (("a",), ("a",), ("b",), ("b",)), 2)
        router = Router(source, Roster(placement, peers), device="cuda", timeout_s=60, in_flight=in_flight)
        router.begin_run(OptimizerSettings())
        got = [router.train_step(b, lr=1e-3, clip_norm=1.0).loss for b in BATCHES]
        router.close()
    torch.testing.assert_close(got, losses(source, "cpu"), rtol=1e-3, atol=0)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_logits_equal_those_of_transformers(tmp_path: Path, family: str) -> None:
    directory = str(save(family, tmp_path / "m", torch.bfloat16))
    plain = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16, experts_implementation="eager")
    expected = plain.to("cuda").eval()(input_ids=IDS.cuda()).logits.float()
    with cluster(ModelSource(path=directory, dtype="bfloat16"), 2, device="cuda") as local:
        got = local.router.serving.logits(IDS).float()
        torch.testing.assert_close(got, expected, rtol=0.05, atol=0.05 * float(expected.detach().abs().max()))
        tokens = [e.token for e in local.router.serving.generate(IDS[0].tolist(), Sampling(max_tokens=8), timeout_s=60)]
        assert len(tokens) == 8
        local.router.begin_run(OptimizerSettings())
        again = [local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0).loss for _ in range(8)]
        assert again[-1] < again[0]


@pytest.mark.parametrize("kind", ["top_k", "deepseek_moe"])
def test_gates_of_ours_choose_as_on_the_cpu(tmp_path: Path, kind: str) -> None:
    source = ModelSource(path=str(save("deepseek_v3", tmp_path / "m", torch.float32)))
    gate = GateSettings(kind=kind, attention=True, mass=0.3)
    torch.testing.assert_close(losses(source, "cuda", gate=gate), losses(source, "cpu", gate=gate), rtol=1e-3, atol=0)


def test_a_model_goes_out_of_the_device_and_comes_in_again(tmp_path: Path) -> None:
    source = ModelSource(path=str(save("deepseek_v3", tmp_path / "m", torch.float32)))
    with cluster(source, 2, device="cuda") as local:
        local.router.begin_run(OptimizerSettings())
        local.router.train_step(BATCHES[0], lr=1e-2, clip_norm=1.0)
        local.router.export(tmp_path / "out")
        expected = local.router.serving.logits(IDS).cpu()
    with cluster(ModelSource(path=str(tmp_path / "out")), 2) as local:
        torch.testing.assert_close(local.router.serving.logits(IDS), expected, rtol=1e-3, atol=1e-4)


def test_copies_on_the_device_stay_equal_and_take_over(tmp_path: Path) -> None:
    source = ModelSource(path=str(save("deepseek_v3", tmp_path / "m", torch.float32)))
    with cluster(source, 3, device="cuda", redundancy=2, heals=True) as local:
        local.router.begin_run(OptimizerSettings())
        got = []
        for number, batch in enumerate(BATCHES):
            if number == 2:
                local.members["expert-1"].kill()
            got.append(local.router.train_step(batch, lr=1e-3, clip_norm=1.0).loss)
            copies_agree(local)
    torch.testing.assert_close(got, losses(source, "cpu"), rtol=1e-3, atol=0)


@pytest.mark.parametrize("method", ["powersgd", "topk", "int8", "fp8"])
def test_compressed_sums_of_copies_are_the_same_bits_everywhere(tmp_path: Path, method: Method) -> None:
    source = ModelSource(path=str(save("deepseek_v3", tmp_path / "m", torch.float32)))
    settings = CompressionSettings(method, rank=2, share=0.05, copies=True)
    with cluster(source, 2, device="cuda", redundancy=2) as local:
        local.router.begin_run(OptimizerSettings(eps=1e-4), compression=settings)
        for batch in BATCHES:
            assert math.isfinite(local.router.train_step(batch, lr=1e-3, clip_norm=1.0).loss)
            copies_agree(local)
        assert local.hosts[0].state.copies.num_bytes() > 0


def test_a_group_moves_from_device_to_device(tmp_path: Path) -> None:
    source = ModelSource(path=str(save("deepseek_v3", tmp_path / "m", torch.float32)))
    with cluster(source, 2, device="cuda") as local:
        local.router.begin_run(OptimizerSettings())
        got = []
        for number, batch in enumerate(BATCHES):
            if number == 1:
                local.adopt("01", "1", "10", "0")
            got.append(local.router.train_step(batch, lr=1e-3, clip_norm=1.0).loss)
            copies_agree(local)
    torch.testing.assert_close(got, losses(source, "cpu"), rtol=1e-3, atol=0)


def test_losses_with_several_in_flight_equal_those_of_one_after_the_other(tmp_path: Path) -> None:
    """Each backward in its own thread, also on the device."""
    source = ModelSource(path=str(save("deepseek_v3", tmp_path / "m", torch.float32)))
    batches = [batch + BATCHES[0] for batch in BATCHES]
    found: dict[int, list[float]] = {}
    for in_flight in (1, 2, 3):
        with cluster(source, 2, device="cuda", in_flight=in_flight) as local:
            local.router.begin_run(OptimizerSettings())
            reports = [local.router.train_step(b, lr=1e-3, clip_norm=1.0) for b in batches]
            found[in_flight] = [report.loss for report in reports]
            assert not any(report.retries for report in reports)
    # Sums of the same numbers, in an order that atomic additions on the device do not fix.
    torch.testing.assert_close(found[2], found[1], rtol=1e-5, atol=0)
    torch.testing.assert_close(found[3], found[1], rtol=1e-5, atol=0)
