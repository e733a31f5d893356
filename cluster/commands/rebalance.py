"""`rebalance`: moves expert groups between actors by their load, or shows what that would bring."""

from __future__ import annotations

import argparse

from cluster.backend import Rebalance
from cluster.commands.options import Subparsers, add_remote
from cluster.commands.output import print_json, print_line, print_table
from cluster.service.client import MODEL_TIMEOUT_S, Client


def add_parsers(subparsers: Subparsers) -> None:
    parser = add_remote(
        subparsers,
        "rebalance",
        run_rebalance,
        help="move expert groups between actors, so that they get even load",
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
        rows = [(move.group, move.source, move.target, _megabytes(move.num_bytes)) for move in result.moves]
        print_table(("group", "from", "to", "MB"), rows)
    after = f" before, {result.balance_after:.2f} after" if result.moves else ""
    print_line(f"balance of the actors: {result.balance_before:.2f}{after}; average over maximum load, 1 is even")
    print_line(_outcome(result, dry_run))


def _outcome(result: Rebalance, dry_run: bool) -> str:
    num_bytes = sum(move.num_bytes for move in result.moves)
    moves = f"{len(result.moves)} {'move' if len(result.moves) == 1 else 'moves'}, {_megabytes(num_bytes)} MB"
    if result.done:
        return f"done: {moves}; placement epoch {result.placement_epoch}"
    if result.message or not result.moves:
        return result.message or "nothing is to be moved"
    return f"it pays: {moves}; nothing is moved {'by a dry run' if dry_run else 'yet'}"


def _megabytes(num_bytes: int) -> str:
    return f"{num_bytes / 1e6:,.1f}"
