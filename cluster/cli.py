"""`moe-cluster`: the command line. Every command lives in `cluster.commands`."""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from importlib.metadata import version


def main(argv: Sequence[str] | None = None) -> int:
    # Before transformers is imported: no progress bars of its own, and nothing is ever fetched from a hub.
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    args = parser().parse_args(argv)
    logging.basicConfig(
        level=logging.DEBUG if args.verbose > 1 else logging.INFO if args.verbose else logging.WARNING,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        stream=sys.stderr,
    )
    code: int = args.run(args)
    return code


def parser() -> argparse.ArgumentParser:
    from cluster.commands import local, remote

    root = argparse.ArgumentParser(
        prog="moe-cluster",
        description="Elastic mixture-of-experts service: experts are actors, trained and served together.",
    )
    root.add_argument("--version", action="version", version=f"%(prog)s {version('moe-cluster')}")
    root.add_argument("-v", "--verbose", action="count", default=0, help="log more; twice for debugging")
    subparsers = root.add_subparsers(required=True, metavar="COMMAND")
    local.add_parsers(subparsers)
    remote.add_parsers(subparsers)
    return root


if __name__ == "__main__":
    sys.exit(main())
