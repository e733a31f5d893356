"""What every bench prints, and how two things are timed fairly on a noisy machine."""

from __future__ import annotations

import os
import platform
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import psutil
import torch

Advance = Callable[[str], None]
"""Told what is being done, as often as the bench says that it will be."""
PACKAGES = ("moe-cluster", "torch", "transformers", "ray", "pyzmq", "grpcio")


@dataclass(frozen=True)
class Row:
    case: str
    value: float
    """Ours, the median over the rounds."""
    unit: str
    peer: str
    peer_value: float
    ratio: float
    """More is better: ours over the peer's for rates, the peer's over ours for times. Median over paired rounds."""
    rounds: int


@dataclass(frozen=True)
class Report:
    bench: str
    rows: Sequence[Row]

    def to_dict(self) -> dict[str, Any]:
        return {
            "bench": self.bench,
            "host": host(),
            "versions": versions(),
            "rows": [asdict(row) for row in self.rows],
        }


def host() -> dict[str, Any]:
    gpus = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "cpu": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "memory_bytes": psutil.virtual_memory().total,
        "gpus": gpus,
        "system": f"{platform.system()} {platform.release()}",
    }


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            found[name] = "not installed"
    return found


def interleaved(candidates: dict[str, Callable[[], None]], rounds: int, warmups: int = 1) -> dict[str, list[float]]:
    """Seconds of every candidate in every round; within a round they follow each other, so they share its noise."""
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for number in range(rounds + warmups):
        for name, run in candidates.items():
            started = time.perf_counter()
            run()
            if number >= warmups:
                seconds[name].append(time.perf_counter() - started)
    return seconds


def rate_row(case: str, unit: str, amount: float, ours: Sequence[float], peer: str, theirs: Sequence[float]) -> Row:
    """`amount` of work a round -> a row of rates."""
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return Row(case, amount / statistics.median(ours), unit, peer, amount / statistics.median(theirs), ratio, len(ours))


def time_row(case: str, unit: str, scale: float, ours: Sequence[float], peer: str, theirs: Sequence[float]) -> Row:
    """Seconds -> a row of times in `unit`, of which `scale` make a second."""
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    return Row(case, statistics.median(ours) * scale, unit, peer, statistics.median(theirs) * scale, ratio, len(ours))
