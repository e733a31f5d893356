"""`drain` empties a node that is to be taken away, and watches that to its end."""

from __future__ import annotations

import argparse

from cluster.commands.options import Subparsers, add_remote, positive
from cluster.commands.scale import carried_out
from cluster.service.client import Client
from cluster.service.codec.operations import DEFAULT_DEADLINE_S


def add_parsers(subparsers: Subparsers) -> None:
    drain = add_remote(
        subparsers, "drain", run_drain, help="empty a node that is to be taken away, while steps and requests go on"
    )
    drain.add_argument("--node", required=True, metavar="NAME", help="as `moe-cluster status` names it")
    drain.add_argument(
        "--timeout-s",
        dest="deadline_s",
        type=positive,
        default=DEFAULT_DEADLINE_S,
        metavar="SECONDS",
        help="longest time until the node is empty (default: %(default)s)",
    )
    drain.add_argument(
        "--request-id", metavar="ID", help="the same node with the same id again watches the operation that exists"
    )


def run_drain(args: argparse.Namespace, client: Client) -> int:
    """0 only when the node holds nothing of the cluster any more."""
    operation = client.drain(args.node, args.deadline_s, request_id=args.request_id)
    return carried_out(operation, args, client)
