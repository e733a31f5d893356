"""kill -9 in a loop of checkpoint saves, against `torch.save` over one file.

First a process is killed at every disk operation of its first four saves (the third prunes, the fourth saves the same
version again), writes half done; the remaining trials strike at random times. Rows: `kill_trials`; of these
`unreadable`: nothing could be loaded though something was committed; `mixed`: tensors of two saves; `older`: older than
the last commit that was reported; `stuck`: the next save failed or left rubbish. Ratio: (1 + peer's) / (1 + ours).

A process that is killed is a fork of one that has torch and no threads: `python -m cluster.bench.checkpoint TRIALS`.
"""

from __future__ import annotations

import collections
import json
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from actors.errors import MoeClusterError
from cluster.bench.result import Report, Row
from cluster.checkpoint.disk import DISK, Disk
from cluster.checkpoint.manifest import Manifest
from cluster.checkpoint.store import CheckpointStore, open_shards, write_shard

SHARDS = ("expert-0", "expert-1")
TENSORS_PER_SHARD = 3
TENSOR_ITEMS = 10_000
"""float32: 120 kB a shard."""
SWEPT_SAVES = 4
OUTCOMES = ("unreadable", "mixed", "older", "stuck")
SEED = 17
PEER = "torch.save over one file, killed at random times"

Reported = Callable[[int], None]
"""Called with the number of each save after it was committed."""


class KillingDisk(Disk):
    """Kills its own process at operation `at`, counted from 0; a write is done by half."""

    def __init__(self, at: int) -> None:
        self._left = at

    def before(self, operation: str) -> None:
        if self._left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        self._left -= 1

    def write(self, file: int, data: memoryview) -> None:
        if self._left == 0:
            os.write(file, data[: len(data) // 2])
        super().write(file, data)


def save(directory: str, number: int, disk: Disk = DISK) -> None:
    """Save `number`, counted from 1. Every fourth is of the version before it."""
    store = CheckpointStore(directory, disk=disk)
    draft = store.begin(number - number // 4)
    shards = tuple(write_shard(draft, name, _tensors(name, number), {}, disk=disk) for name in SHARDS)
    job = {"save": number}
    store.commit(draft, Manifest(draft.version, time.time(), {"model_type": "bench"}, job, shards))


def _tensors(shard: str, number: int) -> dict[str, Tensor]:
    return {f"{shard}.{i}": torch.full((TENSOR_ITEMS,), float(number)) for i in range(TENSORS_PER_SHARD)}


def outcome(directory: str, committed: int) -> str:
    """One of OUTCOMES, or empty if all is well. `committed`: number of the last save known to be committed, or 0."""
    store = CheckpointStore(directory)
    try:
        found = store.latest()
        if found is None:
            return "unreadable" if committed else _next_save(directory, committed)
        tensors = open_shards(found).read(f"{shard}.{i}" for shard in SHARDS for i in range(TENSORS_PER_SHARD))
    except MoeClusterError:
        traceback.print_exc()
        return "unreadable"
    number = int((found.manifest.job or {})["save"])
    if not _all_of(number, tensors):
        return "mixed"
    return "older" if number < committed else _next_save(directory, number)


def _all_of(number: int, tensors: Mapping[str, Tensor]) -> bool:
    return all(bool((tensor == number).all()) for tensor in tensors.values())


def _next_save(directory: str, number: int) -> str:
    """The next save goes well and leaves checkpoints alone, at most as many as are kept."""
    try:
        save(directory, number + 1)
        found = CheckpointStore(directory).latest("sizes")
    except MoeClusterError:
        traceback.print_exc()
        return "stuck"
    names = os.listdir(directory)
    newest = found is not None and (found.manifest.job or {})["save"] == number + 1
    clean = len(names) <= 2 and all(name.startswith("step-") for name in names)
    return "" if newest and clean else "stuck"


def struck(work: Callable[[Reported], None], kill_after_s: float | None) -> tuple[int, bool]:
    """Runs `work` in a fork, killed after a time unless it kills itself. (last number reported, whether it ended)"""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            work(lambda number: _say(writer, number))
            os._exit(0)
        except BaseException:
            traceback.print_exc()
            os._exit(1)
    os.close(writer)
    if kill_after_s is not None:
        time.sleep(kill_after_s)
        os.kill(child, signal.SIGKILL)
    with os.fdopen(reader) as pipe:
        said = pipe.read().split()
    _, status = os.waitpid(child, 0)
    if os.waitstatus_to_exitcode(status) not in (0, -signal.SIGKILL):
        raise RuntimeError("a save failed by itself")
    return int(said[-1]) if said else 0, status == 0


def _say(writer: int, number: int) -> None:
    os.write(writer, b"%d\n" % number)


def sweep(saves: int, most: int | None = None) -> Iterator[str]:
    """The outcome of a kill at every disk operation of so many saves, at most `most` of them."""
    at = 0
    while most is None or at < most:
        with tempfile.TemporaryDirectory() as directory:
            disk = KillingDisk(at)

            def work(report: Reported, directory: str = directory, disk: Disk = disk) -> None:
                for number in range(1, saves + 1):
                    save(directory, number, disk)
                    report(number)

            committed, ended = struck(work, None)
            if ended:  # there are no more operations to strike at
                return
            yield outcome(directory, committed)
        at += 1


def strike_at_random(count: int, within_s: float) -> Iterator[str]:
    """The outcome of kills at random times of an endless loop of saves."""
    rng = random.Random(SEED)
    for _ in range(count):
        with tempfile.TemporaryDirectory() as directory:

            def work(report: Reported, directory: str = directory) -> None:
                number = 0
                while True:
                    number += 1
                    save(directory, number)
                    report(number)

            committed, _ = struck(work, rng.uniform(0, within_s))
            yield outcome(directory, committed)


def strike_peer(count: int, within_s: float) -> Iterator[str]:
    """The same for `torch.save` over one file."""
    rng = random.Random(SEED)
    for _ in range(count):
        with tempfile.TemporaryDirectory() as directory:
            path = f"{directory}/state.pt"

            def work(report: Reported, path: str = path) -> None:
                number = 0
                while True:
                    number += 1
                    torch.save({key: t for shard in SHARDS for key, t in _tensors(shard, number).items()}, path)
                    report(number)

            committed, _ = struck(work, rng.uniform(0, within_s))
            yield _outcome_of_peer(path, committed)


def _outcome_of_peer(path: str, committed: int) -> str:
    if not committed and not os.path.exists(path):
        return ""
    try:
        tensors = torch.load(path, weights_only=True)
    except Exception:  # whatever a torn file makes of it
        return "unreadable" if committed else ""  # a torn first file loses nothing that was there
    number = int(next(iter(tensors.values()))[0])
    if not _all_of(number, tensors):
        return "mixed"
    return "older" if number < committed else ""


def _seconds_of_saves(count: int) -> float:
    with tempfile.TemporaryDirectory() as directory:
        started = time.perf_counter()
        for number in range(1, count + 1):
            save(directory, number)
        return time.perf_counter() - started


def run_trials(trials: int) -> dict[str, dict[str, int]]:
    """Counts of outcomes, `ours` and the `peer`'s, with `kill_trials`. Forks: to be called without other threads."""
    torch.set_num_threads(1)
    within_s = _seconds_of_saves(SWEPT_SAVES)
    ours = list(sweep(SWEPT_SAVES, trials))
    ours += strike_at_random(trials - len(ours), within_s)
    theirs = list(strike_peer(trials, within_s))
    return {name: _counts(outcomes) for name, outcomes in (("ours", ours), ("peer", theirs))}


def _counts(outcomes: list[str]) -> dict[str, int]:
    counted = collections.Counter(outcomes)
    return {"kill_trials": len(outcomes), **{name: counted[name] for name in OUTCOMES}}


def bench_checkpoint(*, rounds: int) -> Report:
    done = subprocess.run(
        [sys.executable, "-m", "cluster.bench.checkpoint", str(rounds)],
        stdout=subprocess.PIPE, text=True, timeout=60 + 3 * rounds, check=True, cwd=Path(__file__).resolve().parents[2],
    )  # fmt: skip
    counts = json.loads(done.stdout.splitlines()[-1])
    ours, theirs = counts["ours"], counts["peer"]
    rows = [
        Row(name, ours[name], "trials", PEER, theirs[name], (1 + theirs[name]) / (1 + ours[name]), rounds)
        for name in ("kill_trials", *OUTCOMES)
    ]
    return Report("checkpoint", rows)


if __name__ == "__main__":
    print(json.dumps(run_trials(int(sys.argv[1]))))
