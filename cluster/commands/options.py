"""What the commands share: the options to reach a front, and how an error ends a command."""

from __future__ import annotations

import argparse
import math
import os
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any

import yaml

from actors.errors import InvalidInput, MoeClusterError
from cluster.service.access import Access
from cluster.service.client import Client

Subparsers = Any
"""What `ArgumentParser.add_subparsers` returns; argparse has no public name for it."""
Handler = Callable[[argparse.Namespace, Client], int]

DEFAULT_TARGET = "127.0.0.1:50151"
TARGET_VARIABLE = "MOE_CLUSTER_TARGET"
TOKEN_VARIABLE = "MOE_CLUSTER_TOKEN"
"""The token itself; there is no option for it, since others see the arguments of a process."""
ACCESS_OPTIONS = {
    "token-file": f"file with the token for the front; default: ${{}}, or the token in ${TOKEN_VARIABLE}",
    "ca": "PEM certificates of who signs the front's: talk TLS; default: ${}",
    "cert": "own PEM certificate, for a front that wants one; default: ${}",
    "key": "key of --cert; default: ${}",
    "server-name": "name in the front's certificate, if it is not reached under it; default: ${}",
}
"""Option -> help, which names the environment variable."""
EXIT_FAILED = 1
EXIT_BAD_INPUT = 2
EXIT_INTERRUPTED = 130


def add_remote(
    subparsers: Subparsers, name: str, handler: Handler, *, help: str, timeout_s: float = 30.0
) -> argparse.ArgumentParser:
    """A parser with the options to reach a front, `--timeout` and `--json`, whose `run` calls `handler` with a client
    that is connected."""
    parser: argparse.ArgumentParser = subparsers.add_parser(name, help=help, description=help)
    parser.add_argument(
        "--target",
        metavar="HOST:PORT",
        default=default_target(),
        help=f"the front to talk to; default: ${TARGET_VARIABLE}, or {DEFAULT_TARGET}",
    )
    for option, text in ACCESS_OPTIONS.items():
        variable = _variable(option)
        metavar = "NAME" if option == "server-name" else "FILE"
        parser.add_argument(
            f"--{option}", metavar=metavar, default=os.environ.get(variable, ""), help=text.format(variable)
        )
    parser.add_argument(
        "--timeout",
        dest="timeout_s",
        metavar="SECONDS",
        type=positive,
        default=timeout_s,
        help="longest time for one call (default: %(default)s)",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON document instead of text")
    parser.set_defaults(run=lambda args: run_remote(handler, args))
    return parser


def run_remote(handler: Handler, args: argparse.Namespace) -> int:
    """Runs the handler; an error of our tree becomes one line on stderr and the exit code."""
    try:
        with Client(args.target, timeout_s=args.timeout_s, access=_access(args)) as client:
            return handler(args, client)
    except MoeClusterError as error:
        complain(str(error))
        return EXIT_BAD_INPUT if isinstance(error, InvalidInput) else EXIT_FAILED
    except BrokenPipeError:  # the reader of a pipe has gone; Python would complain once more when it flushes at exit
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return EXIT_FAILED
    except KeyboardInterrupt:
        return EXIT_INTERRUPTED


def complain(message: str) -> None:
    print(f"moe-cluster: {' '.join(message.split())}", file=sys.stderr)


def default_target() -> str:
    return os.environ.get(TARGET_VARIABLE, DEFAULT_TARGET)


def reach_options(args: argparse.Namespace) -> str:
    """What a command that is shown to the reader must carry to reach the same front."""
    defaults = {"target": default_target()} | {
        option: os.environ.get(_variable(option), "") for option in ACCESS_OPTIONS
    }
    values = {option: getattr(args, option.replace("-", "_")) for option in defaults}
    return "".join(f" --{option} {value}" for option, value in values.items() if value != defaults[option])


def _access(args: argparse.Namespace) -> Access:
    token = "" if args.token_file else os.environ.get(TOKEN_VARIABLE, "").strip()
    return Access(token, args.token_file, args.ca, args.cert, args.key, args.server_name)


def _variable(option: str) -> str:
    return "MOE_CLUSTER_" + option.upper().replace("-", "_")


def positive(text: str) -> float:
    value = float(text)
    if not (math.isfinite(value) and value > 0):
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value


def token_ids(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list like 12,7,300") from None


def override(text: str) -> tuple[str, Any]:
    """`optimizer.lr=0.001` as the key and the value."""
    key, equals, value = text.partition("=")
    if not (key and equals):
        raise argparse.ArgumentTypeError(f"{text!r} is not KEY.PATH=VALUE")
    try:
        return key, _scalar(value)
    except yaml.YAMLError:
        raise argparse.ArgumentTypeError(f"{value!r} is not a YAML value") from None


def _scalar(text: str) -> Any:
    """As YAML reads it, but 1e-3 is a number: YAML 1.1 takes it for text."""
    value = yaml.safe_load(text)
    if isinstance(value, str):
        with suppress(ValueError):
            return float(value)
    return value
