"""`rebalance`: moves and copies expert groups by their load, or shows what that would bring."""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Sequence

from cluster.backend import GroupMove, Rebalance
from cluster.commands.options import Subparsers, add_remote
from cluster.commands.output import print_json, print_line, print_table
from cluster.service.client import MODEL_TIMEOUT_S, Client


def add_parsers(subparsers: Subparsers) -> None:
    parser = add_remote(
        subparsers,
        "rebalance",
        run_rebalance,
        help="move and copy expert groups between actors, so that they get even load and no copy is missing",
        timeout_s=MODEL_TIMEOUT_S,
    )
    parser.add_argument("--dry-run", action="store_true", help="show what would be moved, and move nothing")


def run_rebalance(args: argparse.Namespace, client: Client) -> int:
    result = client.rebalance(dry_run=args.dry_run, timeout_s=args.timeout_s)
    if args.json:
        print_json(result)
    else:
        _print(result, dry_run=args.dry_run)
    return 0


def _print(result: Rebalance, *, dry_run: bool) -> None:
    if result.moves:
        rows = [(move.group, move.kind, move.source, move.target, _megabytes(move.num_bytes)) for move in result.moves]
        print_table(("group", "kind", "from", "to", "MB"), rows)
    for sentence in result.unmet:
        print_line(f"unmet: {sentence}")
    after = f" before, {result.balance_after:.2f} after" if result.moves else ""
    print_line(f"balance of the actors: {result.balance_before:.2f}{after}; average over maximum load, 1 is even")
    print_line(_outcome(result, dry_run))


def _outcome(result: Rebalance, dry_run: bool) -> str:
    if result.done:
        stall = f"steps waited {result.stall_s * 1e3:,.1f} ms at most"
        return f"done: {_sum(result.moves)}; {stall}; placement epoch {result.placement_epoch}"
    if result.message or not result.moves:
        return result.message or "nothing is to be moved"
    return f"to do: {_sum(result.moves)}; nothing is moved {'by a dry run' if dry_run else 'yet'}"


def _sum(moves: Sequence[GroupMove]) -> str:
    """`1 move, 2 copies, 4.5 MB`"""
    kinds = Counter(move.kind for move in moves)
    counts = [
        f"{kinds[kind]} {kind if kinds[kind] == 1 else plural}"
        for kind, plural in (("move", "moves"), ("copy", "copies"))
        if kinds[kind]
    ]
    return ", ".join([*counts, f"{_megabytes(sum(move.num_bytes for move in moves))} MB"])


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f}"
