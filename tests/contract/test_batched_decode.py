"""Streams that share forwards: their tokens are those that each gets alone, whoever joins, leaves, trains or dies."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing

import pytest
import torch

from actors.errors import LinkError, MoeClusterError, StepAborted, VersionGone
from actors.moe.settings import GateSettings
from actors.optim import OptimizerSettings
from actors.router.batch import AHEAD
from actors.trunk.model import ModelSource
from actors.values import Growth, Sampling, TokenEvent, VersionChoice
from tests.families import FAMILIES
from tests.local import LocalCluster, cluster

SOURCE = ModelSource(values={"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"], "eos_token_id": None})
BATCHES = [torch.randint(0, 256, (2, 16), generator=torch.Generator().manual_seed(t)) for t in range(4)]
PROMPTS = [BATCHES[0][0, :5].tolist(), BATCHES[0][1].tolist(), BATCHES[1][0, :1].tolist(), BATCHES[2][0, :9].tolist()]
SAMPLINGS = [
    Sampling(max_tokens=9),
    Sampling(max_tokens=14, temperature=0.8, seed=4),
    Sampling(max_tokens=20, temperature=1.2, top_p=0.9, seed=7),
    Sampling(max_tokens=3),
]
WAIT_S = 30.0


def generate(local: LocalCluster, number: int, choice: VersionChoice = VersionChoice()) -> list[TokenEvent]:  # noqa: B008
    return list(local.router.serving.generate(PROMPTS[number], SAMPLINGS[number], timeout_s=WAIT_S, choice=choice))


def together(local: LocalCluster, numbers: Sequence[int] = (0, 1, 2, 3)) -> list[list[int]]:
    with ThreadPoolExecutor(len(numbers)) as pool:
        streams = list(pool.map(lambda number: generate(local, number), numbers))
    assert [stream[-1].finish_reason for stream in streams] == ["length"] * len(numbers)
    return [[event.token for event in stream] for stream in streams]


def in_turns(local: LocalCluster) -> list[list[int]]:
    return [[event.token for event in generate(local, number)] for number in range(4)]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + WAIT_S
    while not condition():
        assert time.monotonic() < deadline, "it never came"
        time.sleep(0.01)


def decode_threads() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "decode"]


def begin(local: LocalCluster) -> None:
    local.router.begin_run(OptimizerSettings())


def train(local: LocalCluster, count: int = 1) -> None:
    for _ in range(count):
        local.router.train_step([BATCHES[local.router.version % 4]], lr=1e-2, clip_norm=1.0)


@pytest.mark.parametrize("links", ["local", "socket"])
def test_tokens_are_those_of_streams_in_turns(links: str) -> None:
    with cluster(SOURCE, links=links, decode_batch=1) as local:
        expected = in_turns(local)
        assert not decode_threads()
    with cluster(SOURCE, links=links, decode_batch=3) as local:  # the fourth is in a batch of its own
        assert together(local) == expected
        assert in_turns(local) == expected


def test_gates_that_look_at_earlier_tokens_keep_them_for_every_stream() -> None:
    gate = GateSettings(kind="top_k", attention=True)

    def trained(decode_batch: int) -> list[list[int]]:
        with cluster(SOURCE, gate=gate, decode_batch=decode_batch) as local:
            begin(local)
            train(local, 2)  # before, their attention adds nothing
            return together(local) if decode_batch > 1 else in_turns(local)

    assert trained(8) == trained(1)


def test_a_closed_stream_frees_its_slot_and_the_others_go_on() -> None:
    with cluster(SOURCE, decode_batch=4, max_sessions=2) as local:
        expected = in_turns(local)
        serving = local.router.serving
        closed = serving.generate(PROMPTS[0], Sampling(max_tokens=100), timeout_s=WAIT_S)
        first = next(closed).token
        with ThreadPoolExecutor(3) as pool:
            others = [pool.submit(generate, local, number) for number in (1, 2)]
            wait_for(lambda: serving.queue()[0] == 1 or any(other.done() for other in others))
            closed.close()
            assert [[event.token for event in other.result(WAIT_S)] for other in others] == expected[1:3]
        assert first == expected[0][0]


def test_a_stream_that_is_not_read_does_not_run_away_and_is_whole_in_the_end() -> None:
    sampling = Sampling(max_tokens=AHEAD + 20)
    with cluster(SOURCE, decode_batch=1) as local:
        expected = [event.token for event in local.router.serving.generate(PROMPTS[0], sampling, timeout_s=WAIT_S)]
    with cluster(SOURCE, decode_batch=4) as local:
        slow = local.router.serving.generate(PROMPTS[0], sampling, timeout_s=WAIT_S)
        tokens = [next(slow).token]
        loop = local.router.serving._engine._loop
        wait_for(lambda: bool(loop._batches[0].streams) and not loop._batches[0].is_read)
        assert together(local, [1, 2])  # others are not held up by it
        stream = loop._batches[0].streams[0]
        assert stream.position == len(PROMPTS[0]) + 1 + AHEAD
        assert [*tokens, *(event.token for event in slow)] == expected


def test_versions_do_not_mix_and_a_pin_keeps_its_tokens() -> None:
    with cluster(SOURCE, decode_batch=4) as local:
        begin(local)
        train(local)
        local.router.pin("kept")
        pinned = VersionChoice(pin="kept")
        before = generate(local, 1, pinned)
        with closing(local.router.serving.generate(PROMPTS[0], Sampling(max_tokens=100), timeout_s=WAIT_S)) as newest:
            assert next(newest).version == 1
            train(local)
            beside = generate(local, 1, pinned)
            wait_for(lambda: next(newest).version == 2)
        assert [e.token for e in beside] == [e.token for e in before]
        assert {e.version for e in before + beside} == {1}
        with closing(
            local.router.serving.generate(PROMPTS[0], Sampling(max_tokens=100), timeout_s=WAIT_S, choice=pinned)
        ) as gone:
            next(gone)
            local.router.keep_pins([])
            with pytest.raises(VersionGone):
                list(gone)


def test_streams_go_on_through_a_growth() -> None:
    with cluster(SOURCE, decode_batch=4) as local:
        begin(local)
        train(local)
        stream = local.router.serving.generate(PROMPTS[0], Sampling(max_tokens=60), timeout_s=WAIT_S)
        tokens = [next(stream)]
        local.grow(Growth(16))
        assert len([*tokens, *stream]) == 60


def test_every_stream_of_a_batch_learns_that_an_actor_is_gone_and_goes_on_where_there_is_a_copy() -> None:
    with cluster(SOURCE, decode_batch=4) as local:
        streams = [local.router.serving.generate(p, Sampling(max_tokens=100), timeout_s=WAIT_S) for p in PROMPTS[:2]]
        for stream in streams:
            next(stream)
        local.members["expert-1"].kill()
        for stream in streams:
            with pytest.raises((LinkError, StepAborted)):
                list(stream)
    with cluster(SOURCE, decode_batch=1) as local:
        expected = in_turns(local)
    with cluster(SOURCE, decode_batch=4, redundancy=2, heals=True) as local:
        stream = local.router.serving.generate(PROMPTS[2], SAMPLINGS[2], timeout_s=WAIT_S)
        first = next(stream).token
        local.members["expert-1"].kill()
        assert [first, *(event.token for event in stream)] == expected[2]


def test_closing_ends_streams_and_the_thread() -> None:
    with cluster(SOURCE, decode_batch=4) as local:
        stream = local.router.serving.generate(PROMPTS[0], Sampling(max_tokens=110), timeout_s=WAIT_S)
        next(stream)
        assert decode_threads()
        local.router.close()
        assert not decode_threads()
        with pytest.raises(MoeClusterError):
            list(stream)
        with pytest.raises(StepAborted):
            next(local.router.serving.generate(PROMPTS[0], Sampling(max_tokens=2), timeout_s=WAIT_S))


def test_the_thread_ends_when_it_is_not_needed_and_comes_back() -> None:
    with cluster(SOURCE, decode_batch=4) as local:
        loop = local.router.serving._engine._loop
        loop._linger_s = 0.01
        first = together(local, [0])
        wait_for(lambda: not decode_threads())
        assert together(local, [0]) == first
