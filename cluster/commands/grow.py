"""`grow` adds experts to every MoE layer of the running model and watches that to its end."""

from __future__ import annotations

import argparse

from actors.values import Growth
from cluster.commands.options import Subparsers, add_remote
from cluster.commands.scale import watched
from cluster.service.client import Client

PREPARE_TIMEOUT_S = 120.0
"""The model's new shape is made and checked before the call returns."""
_PLAIN = Growth(0)


def add_parsers(subparsers: Subparsers) -> None:
    grow = add_remote(
        subparsers,
        "grow",
        run_grow,
        help="add experts to the model while steps and requests go on; the loss goes on where it was",
        timeout_s=PREPARE_TIMEOUT_S,
    )
    grow.add_argument(
        "--experts", type=int, required=True, metavar="N", help="experts of every MoE layer there should be"
    )
    grow.add_argument(
        "--mode",
        choices=("copy", "fresh"),
        default=_PLAIN.mode,
        help="copies of the model's experts, or new ones, for which the gate needs a bias (default: %(default)s)",
    )
    grow.add_argument(
        "--perturbation",
        type=float,
        default=_PLAIN.perturbation,
        metavar="SHARE",
        help="noise on copies, as a share of the parameters' size (default: %(default)s)",
    )
    grow.add_argument("--seed", type=int, default=_PLAIN.seed, help="of what is drawn (default: %(default)s)")
    grow.add_argument(
        "--open-steps",
        type=int,
        default=_PLAIN.open_steps,
        metavar="STEPS",
        help="within which experts that a gate's bias keeps out at first are let in (default: %(default)s)",
    )
    grow.add_argument(
        "--request-id", metavar="ID", help="the same number with the same id again watches the operation that exists"
    )
    grow.add_argument("--detach", action="store_true", help="start it and return; it goes on")


def run_grow(args: argparse.Namespace, client: Client) -> int:
    growth = Growth(args.experts, args.mode, args.perturbation, args.seed, args.open_steps)
    return watched(client.grow(growth, request_id=args.request_id), args, client)
