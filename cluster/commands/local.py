"""The commands that start a cluster of their own, the one that ends it, and what needs none."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from actors.errors import InvalidInput, MoeClusterError
from cluster.commands import bench, chaos, demo, token, up, verify
from cluster.commands.options import EXIT_BAD_INPUT, EXIT_FAILED, EXIT_INTERRUPTED, Subparsers, complain


def add_parsers(subparsers: Subparsers) -> None:
    for module in (up, demo, verify, bench, chaos, token):
        module.add_parsers(subparsers, guarded)


def guarded(run: Callable[[argparse.Namespace], int]) -> Callable[[argparse.Namespace], int]:
    """Errors of our tree become one line and an exit code, as for the commands that talk to a front."""

    def command(args: argparse.Namespace) -> int:
        try:
            return run(args)
        except MoeClusterError as error:
            complain(str(error))
            return EXIT_BAD_INPUT if isinstance(error, InvalidInput) else EXIT_FAILED
        except KeyboardInterrupt:
            return EXIT_INTERRUPTED

    return command
