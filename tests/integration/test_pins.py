"""A version that is pinned while a job trains, over Ray and gRPC."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from actors.errors import VersionGone
from actors.values import VersionChoice
from cluster.backend import SamplingParams
from cluster.errors import FailedPrecondition, NotFound
from cluster.serve import Service, served
from cluster.service.client import Client
from tests.integration.test_cluster import config_in, job_of

pytestmark = pytest.mark.timeout(600)  # starting processes that import torch takes minutes on a busy machine

WAIT_S = 60.0
PARAMS = SamplingParams(max_tokens=24)
PROD = VersionChoice(pin="prod")


@pytest.fixture(scope="module")
def service(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    with served(config_in(tmp_path_factory.mktemp("storage"), **{"router.max_pins": 1})) as service:
        yield service


@pytest.fixture
def client(service: Service) -> Iterator[Client]:
    with Client(service.target, timeout_s=WAIT_S) as client:
        yield client


def text_of(client: Client, choice: VersionChoice) -> tuple[str, set[int]]:
    chunks = list(client.generate("import ", PARAMS, choice))
    return "".join(chunk.text for chunk in chunks), {chunk.version for chunk in chunks}


def test_pinned_streams_never_change_while_a_job_trains(client: Client) -> None:
    before = text_of(client, VersionChoice())
    pin = client.pin_version("prod")
    with pytest.raises(FailedPrecondition, match=r"router\.max_pins"):
        client.pin_version("test")
    job = client.submit_job(job_of(40))
    texts: list[tuple[str, set[int]]] = []
    has_ended = threading.Event()

    def read() -> None:
        while not has_ended.is_set() or len(texts) < 2:
            texts.append(text_of(client, PROD))

    reader = threading.Thread(target=read, daemon=True)
    reader.start()
    try:
        for event in client.watch_job(job.id):
            assert event.step <= 40
    finally:
        has_ended.set()
        reader.join(2 * WAIT_S)
    assert len(texts) > 1
    assert all(text == before for text in texts)
    assert before[1] == {pin.version} == {0}
    newest = text_of(client, VersionChoice())
    assert newest != before
    assert newest[1] == {40}
    scored = client.score("import os", VersionChoice(pinned=0))
    assert scored.version == 0
    assert scored.logprobs != client.score("import os").logprobs
    assert client.status().pins == (pin,)
    assert all(actor.pinned_bytes > 0 for actor in client.status().actors)


def test_when_it_is_given_up_its_memory_is_and_requests_are_told(client: Client) -> None:
    client.unpin_version("prod")
    with pytest.raises(VersionGone, match=r"pin prod is not kept; there are the newest, 40"):
        client.score("import os", PROD)
    with pytest.raises(NotFound):
        client.unpin_version("prod")
    assert client.status().pins == ()
    deadline = time.monotonic() + WAIT_S
    while any(actor.pinned_bytes for actor in client.status().actors) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not any(actor.pinned_bytes for actor in client.status().actors)


def test_its_time_is_over_by_itself(client: Client) -> None:
    client.pin_version("short", 1.0)
    deadline = time.monotonic() + WAIT_S
    while client.status().pins:
        assert time.monotonic() < deadline
        time.sleep(0.1)
    while not is_gone(client, "short"):  # a router is told when the pin is no longer in the status
        assert time.monotonic() < deadline
        time.sleep(0.1)


def is_gone(client: Client, pin: str) -> bool:
    try:
        client.score("import os", VersionChoice(pin=pin))
    except VersionGone:
        return True
    return False
