"""Entry point: adds every command of this package to the command line."""

from __future__ import annotations

from cluster.commands import checkpoint, drain, grow, heatmap, inference, jobs, ledger, model, rebalance, scale, train
from cluster.commands.options import Subparsers


def add_parsers(subparsers: Subparsers) -> None:
    """Each parser sets `run`, a function from the parsed arguments to the exit code: 0 done, 1 failed, 2 bad input."""
    for module in (model, heatmap, rebalance, scale, drain, grow, ledger, checkpoint, train, jobs, inference):
        module.add_parsers(subparsers)
