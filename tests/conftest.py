"""Shared set-up: one torch thread (tests run many small things at once), and a quiet, private Ray."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import cluster  # noqa: F401 - what it sets must be set before gRPC is imported

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["RAY_AUTH_MODE"] = "disabled"
os.environ["RAY_USAGE_STATS_ENABLED"] = "0"
# Without a cluster a call of Ray fails. By default it would start one, whose end ends pytest a minute later.
os.environ["RAY_ENABLE_AUTO_CONNECT"] = "0"
os.environ["TRANSFORMERS_VERBOSITY"] = "error"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("RAY_ADDRESS", None)

import pytest
import torch
from hypothesis import HealthCheck, settings

from actors.router import captured
from actors.router.captured import CapturedForward

# The same examples in every run, however slow; `HYPOTHESIS_PROFILE=explore pytest` looks for new ones.
# Hypothesis's own look at how long drawing takes would fail a test on a busy machine.
PATIENT = settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
settings.register_profile("same", PATIENT, derandomize=True)
settings.register_profile("explore", PATIENT, derandomize=False)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "same"))

torch.set_num_threads(1)


@pytest.fixture
def forwards(monkeypatch: pytest.MonkeyPatch) -> list[CapturedForward]:
    """Those that are made. They capture a step when they see it first, and soon after experts have moved."""
    found: list[CapturedForward] = []
    before = CapturedForward.__init__

    def init(self: CapturedForward, *args: Any, **kwargs: Any) -> None:
        before(self, *args, **kwargs)
        found.append(self)

    monkeypatch.setattr(CapturedForward, "__init__", init)
    monkeypatch.setattr(captured, "SEEN_BEFORE", 0)
    monkeypatch.setattr(captured, "SETTLED_AFTER", 5)
    return found


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items[:] = mixed(items)
    if torch.cuda.is_available():
        return
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))


def mixed(items: list[pytest.Item]) -> list[pytest.Item]:
    """Files that start clusters, evenly among the others: they wait for most of their time, and one of two workers has
    both cores for its computing then. The last files of a run are short ones."""
    files: dict[Path, list[pytest.Item]] = {}
    for item in items:
        files.setdefault(item.path, []).append(item)
    clusters = [path for path in files if path.parent.name == "integration"]
    others = [path for path in files if path.parent.name != "integration"]
    places = {path: number * len(others) / len(clusters) for number, path in enumerate(clusters)}
    places |= {path: number + 0.5 for number, path in enumerate(others)}
    return [item for path in sorted(files, key=places.__getitem__) for item in files[path]]
