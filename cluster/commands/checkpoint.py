"""`checkpoint` and `checkpoints`: the training state, written now; and what is kept."""

from __future__ import annotations

import argparse

from cluster.backend import Checkpoint
from cluster.commands.options import Subparsers, add_remote
from cluster.commands.output import local_time, print_json, print_line, print_table, size
from cluster.service.client import MODEL_TIMEOUT_S, Client


def add_parsers(subparsers: Subparsers) -> None:
    add_remote(
        subparsers,
        "checkpoint",
        run_checkpoint,
        help="write a checkpoint now, while steps and requests go on",
        timeout_s=MODEL_TIMEOUT_S,
    )
    add_remote(subparsers, "checkpoints", run_checkpoints, help="list the checkpoints that are kept")


def run_checkpoint(args: argparse.Namespace, client: Client) -> int:
    saved = client.save_checkpoint(timeout_s=args.timeout_s)
    if args.json:
        print_json(saved)
    else:
        print_line(f"wrote version {saved.version} to {saved.url}: {size(saved.size_bytes)}")
    return 0


def run_checkpoints(args: argparse.Namespace, client: Client) -> int:
    found = client.checkpoints()
    if args.json:
        print_json(found)
    elif found:
        print_table(("version", "when", "size", "job", "directory"), map(_row, found))
    else:
        print_line("there is no checkpoint yet; `moe-cluster checkpoint` writes one")
    return 0


def _row(found: Checkpoint) -> tuple[object, ...]:
    job = f"{found.job_id}, step {found.job_step}" if found.job_id else ""
    return found.version, local_time(found.created_s), size(found.size_bytes), job, found.url
