"""`pin` and `unpin`: versions that stay available to requests while training goes on."""

from __future__ import annotations

import argparse

from actors.values import VersionChoice
from cluster.backend import Pin
from cluster.commands.options import Subparsers, add_remote, positive
from cluster.commands.output import local_time, print_json, print_line, print_table
from cluster.service.client import MODEL_TIMEOUT_S, Client

NEWEST = "newest"


def add_parsers(subparsers: Subparsers) -> None:
    pin = add_remote(
        subparsers,
        "pin",
        run_pin,
        help="keep the newest version for requests, while training goes on; `status` lists what is pinned",
        timeout_s=MODEL_TIMEOUT_S,
    )
    pin.add_argument("--name", default="", help="to ask for it by (default: v and its number)")
    pin.add_argument(
        "--ttl", type=positive, default=0.0, metavar="SECONDS", help="give it up after so long (default: never)"
    )
    unpin = add_remote(
        subparsers, "unpin", run_unpin, help="give a pinned version up, and its memory", timeout_s=MODEL_TIMEOUT_S
    )
    unpin.add_argument("name", help="as `status` lists it")


def add_version_options(parser: argparse.ArgumentParser) -> None:
    """Of commands that send requests: see `version_of`."""
    version = parser.add_mutually_exclusive_group()
    version.add_argument(
        "--version",
        default=NEWEST,
        metavar="N|NAME",
        help=f"a pinned version's number, or the name of a pin (default: {NEWEST})",
    )
    version.add_argument(
        "--max-behind",
        type=int,
        default=0,
        metavar="K",
        help="the newest, but wait for no expert that is at most so many updates behind (default: %(default)s)",
    )


def version_of(args: argparse.Namespace) -> VersionChoice:
    if args.version == NEWEST:
        return VersionChoice(max_behind=args.max_behind)
    return VersionChoice(pinned=int(args.version)) if args.version.isdecimal() else VersionChoice(pin=args.version)


def run_pin(args: argparse.Namespace, client: Client) -> int:
    pin = client.pin_version(args.name, args.ttl, timeout_s=args.timeout_s)
    if args.json:
        print_json(pin)
    else:
        print_line(f"pinned version {pin.version} as {pin.name}{_until(pin)}")
    return 0


def run_unpin(args: argparse.Namespace, client: Client) -> int:
    client.unpin_version(args.name, timeout_s=args.timeout_s)
    if args.json:
        print_json({"name": args.name})
    else:
        print_line(f"unpinned {args.name}")
    return 0


def print_pins(pins: tuple[Pin, ...]) -> None:
    rows = [
        (pin.name, pin.version, local_time(pin.created_s), local_time(pin.expires_s) if pin.expires_s else "never")
        for pin in pins
    ]
    print_table(("pin", "version", "made", "expires"), rows)


def _until(pin: Pin) -> str:
    return f" until {local_time(pin.expires_s)}" if pin.expires_s else ""
