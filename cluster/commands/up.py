"""`up` starts a service and stays with it; `down` ends one that was started in the background."""

from __future__ import annotations

import argparse
import json
import os
import selectors
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil

from cluster.commands.options import Subparsers, default_target, override
from cluster.commands.output import print_json, print_line
from cluster.config import ClusterConfig
from cluster.configfile import find_config, load_cluster
from cluster.errors import NotFound, StartupError

Guard = Callable[[Callable[[argparse.Namespace], int]], Callable[[argparse.Namespace], int]]

START_TIMEOUT_S = 180.0
STOP_TIMEOUT_S = 60.0


def add_parsers(subparsers: Subparsers, guarded: Guard) -> None:
    up = subparsers.add_parser("up", help="start a service from a cluster config")
    add_config_options(up)
    up.add_argument("--detach", action="store_true", help="return when it is ready; end it with `moe-cluster down`")
    up.add_argument("--json", action="store_true", help="print one JSON document when it is ready")
    up.set_defaults(run=guarded(run_up))
    down = subparsers.add_parser("down", help="end a service that was started here with `up`")
    down.add_argument(
        "--target", metavar="HOST:PORT", default=default_target(), help="which one (default: %(default)s)"
    )
    down.add_argument("--json", action="store_true", help="print one JSON document")
    down.set_defaults(run=guarded(run_down))


def add_config_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--config",
        default="local_cpu",
        metavar="FILE",
        help="a cluster config, or a shipped one (default: %(default)s)",
    )
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        type=override,
        metavar="KEY.PATH=VALUE",
        help="replace a value of the config, e.g. --set experts.actors=4; may be given several times",
    )


def run_up(args: argparse.Namespace) -> int:
    config = load_cluster(find_config(args.config), dict(args.overrides))
    if args.detach:
        return _detach(args)
    from cluster.serve import served, terminated_as_interrupted, wait_for_signal

    with terminated_as_interrupted():
        try:
            with served(config) as service:
                record = _Record.write(service.target, _detached(config))
                try:
                    _announce(service.target, args.json, config.ray.detached)
                    wait_for_signal()
                finally:
                    if not config.ray.detached:  # `down` is to find the cluster
                        record.remove()
        except KeyboardInterrupt:
            return 0  # being told to end is how this command ends
    return 0


def run_down(args: argparse.Namespace) -> int:
    record = _Record(args.target)
    process, detached = record.process(), record.detached()
    if process is None and detached is None:
        raise NotFound(f"no service that was started here serves {args.target}; `moe-cluster status` shows any other")
    if process is not None:
        process.terminate()
        try:
            process.wait(STOP_TIMEOUT_S)
        except psutil.TimeoutExpired:
            raise StartupError(f"process {process.pid} did not end within {STOP_TIMEOUT_S:.0f} s") from None
    if detached is not None:
        from cluster.fabric.launch import end_detached

        end_detached(**detached)
    record.remove()
    if args.json:
        print_json({"target": args.target, "pid": process.pid if process else None, "ended": True})
    else:
        print_line(f"{args.target} has ended")
    return 0


def _announce(target: str, as_json: bool, detached: bool) -> None:
    if as_json:
        print_json({"target": target, "pid": os.getpid()})
    elif detached:
        print_line(f"ready at {target} (Ctrl-C ends this front, `moe-cluster down --target {target}` the cluster)")
    else:
        print_line(f"ready at {target} (Ctrl-C ends it)")
    sys.stdout.flush()


def _detached(config: ClusterConfig) -> dict[str, str] | None:
    """How to find a cluster that outlives this process; None if it does not."""
    if not config.ray.detached:
        return None
    from cluster.fabric.attaching import name_of

    return {"address": str(config.ray.address), "cluster": name_of(config)}


def _detach(args: argparse.Namespace) -> int:
    """Runs the same command in a session of its own and waits until it is ready."""
    log = Path(tempfile.gettempdir()) / f"moe-cluster-{os.getpid()}.log"
    command = [
        sys.executable,
        "-m",
        "cluster.cli",
        "-v",
        "up",
        "--json",
        "--config",
        str(find_config(args.config).resolve()),
    ]
    for key, value in args.overrides:
        command += ["--set", f"{key}={json.dumps(value)}"]
    with log.open("wb") as errors:
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=errors, stdin=subprocess.DEVNULL, start_new_session=True
        )
    document = _first_document(process, log)
    if args.json:
        print_json({**document, "log": str(log)})
    else:
        print_line(
            f"ready at {document['target']}; log in {log}; end it with: moe-cluster down --target {document['target']}"
        )
    return 0


def _first_document(process: subprocess.Popen[bytes], log: Path) -> dict[str, Any]:
    """The JSON document that the new process prints when it is ready."""
    assert process.stdout is not None
    selector = selectors.DefaultSelector()
    selector.register(process.stdout, selectors.EVENT_READ)
    deadline, text = time.monotonic() + START_TIMEOUT_S, b""
    while not text.rstrip().endswith(b"}"):
        if not selector.select(max(0.0, deadline - time.monotonic())):
            process.terminate()
            raise StartupError(f"not ready within {START_TIMEOUT_S:.0f} s; see {log}")
        if not (part := os.read(process.stdout.fileno(), 4096)):
            reason = log.read_text(errors="replace").strip().splitlines()
            raise StartupError(reason[-1].removeprefix("moe-cluster: ") if reason else f"it ended; see {log}")
        text += part
    document: dict[str, Any] = json.loads(text)
    return document


class _Record:
    """The process that serves a target, remembered in a file that only this user reads."""

    def __init__(self, target: str) -> None:
        self._path = _directory() / f"{target.replace(':', '_').replace('/', '_')}.json"

    @classmethod
    def write(cls, target: str, detached: dict[str, str] | None) -> _Record:
        record = cls(target)
        own = psutil.Process()
        values = {"pid": own.pid, "created": own.create_time(), "detached": detached}
        record._path.write_text(json.dumps(values))
        return record

    def detached(self) -> dict[str, str] | None:
        """Of a cluster that outlives the process: see `end_detached`."""
        try:
            values = json.loads(self._path.read_text())["detached"]
            return None if values is None else {name: str(values[name]) for name in ("address", "cluster")}
        except (OSError, ValueError, KeyError, TypeError):
            return None

    def process(self) -> psutil.Process | None:
        """None if there is no record, or its process id belongs to another process by now."""
        try:
            values = json.loads(self._path.read_text())
            process = psutil.Process(values["pid"])
            return process if abs(process.create_time() - values["created"]) < 1 else None
        except (OSError, ValueError, KeyError, psutil.NoSuchProcess):
            return None

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _directory() -> Path:
    base = os.environ.get("XDG_STATE_HOME") or Path.home() / ".local" / "state"
    directory = Path(base) / "moe-cluster"
    directory.mkdir(parents=True, exist_ok=True, mode=0o700)
    return directory
