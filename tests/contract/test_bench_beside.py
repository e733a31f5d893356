"""`bench async` times updates beside forwards with an expert actor in a process of its own: a tiny one, once."""

from __future__ import annotations

import os

import torch

from cluster.bench.beside import hidden_rows
from cluster.bench.steady import TrainingShape


def test_an_actor_of_its_own_is_timed_and_all_is_as_before() -> None:
    before = os.sched_getaffinity(0), torch.get_num_threads()
    shape = TrainingShape(
        hidden_size=16, width=16, num_layers=2, num_experts=4, sequences=1, sequence_length=8, warmups=2, steps=2
    )
    said: list[str] = []
    rows = {row.case: row for row in hidden_rows(rounds=1, shape=shape, advance=said.append)}
    assert list(rows) == ["hidden_optimizer_share", "step_s1", "step_without_updates", "update_s0"]
    assert all(rows[case].value > 0 for case in ("step_s1", "step_without_updates", "update_s0"))
    assert len(said) == 2, "the first round is not counted"
    assert (os.sched_getaffinity(0), torch.get_num_threads()) == before
