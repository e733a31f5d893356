"""Over Ray: groups without a copy come back from the memory of a peer, while the checkpoint on disk is far behind."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from cluster.backend import JobEvent
from cluster.config import BatchConfig
from tests.integration.test_resume import JOB, an_expert_actor, config_in, finish, kill, running, same, watch_to

pytestmark = pytest.mark.timeout(600)  # starting processes that import torch takes minutes on a busy machine
EVERY = 5
SLOW_JOB = replace(JOB, batch=BatchConfig(sequences=4, sequence_length=128))
"""A snapshot is with the peer before the next few steps are done."""


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[JobEvent]:
    with running(config_in(tmp_path_factory.mktemp("s"), **{"checkpoint.every_steps": 0})) as client:
        return finish(client, client.submit_job(SLOW_JOB).id)


SEEN = 4 * EVERY + 3
"""Steps before the death. The job is some steps further by then, and its last snapshot may be on its way."""


def test_groups_without_a_copy_come_back_from_a_peer(tmp_path: Path, unbroken: list[JobEvent]) -> None:
    config = config_in(tmp_path, **{"checkpoint.every_steps": 1000, "experts.snapshot_every_steps": EVERY})
    with running(config) as client:
        actor = an_expert_actor(client)
        job = client.submit_job(SLOW_JOB)
        watch_to(client, job.id, SEEN)
        victim = kill(actor)
        events = finish(client, job.id)
        same(events, unbroken)
        notes = [event.message for event in events if event.kind == "note"]
        assert any("from the memory of the actors" in note for note in notes), notes
        (entry,) = [entry for entry in client.ledger().entries if entry.subject == victim]
        assert entry.steps_replayed < SEEN, "from its first checkpoint all that was seen would have run again"
        assert "from the memory of the actors" in entry.message
        steps = [event.step for event in events if event.kind == "step"]
        assert len(steps) - len(set(steps)) == entry.steps_replayed
