"""`token` makes a bearer token. The front never sees a file with it, and nothing keeps it."""

from __future__ import annotations

import argparse
from collections.abc import Callable

from cluster.commands.options import Subparsers
from cluster.commands.output import print_json, print_line
from cluster.service.tokens import FIELD, ROLES, line_of, new_token

Guard = Callable[[Callable[[argparse.Namespace], int]], Callable[[argparse.Namespace], int]]


def add_parsers(subparsers: Subparsers, guarded: Guard) -> None:
    help_text = "make a token for the front: printed once, with the line that lets it in"
    parser = subparsers.add_parser("token", help=help_text, description=help_text)
    parser.add_argument(
        "--role",
        required=True,
        choices=tuple(ROLES),
        help="infer: inference and status; train: jobs as well, and all that is only looked at; admin: everything",
    )
    parser.add_argument("--name", required=True, help="whose it is; stands in the front's log")
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=guarded(run_token))


def run_token(args: argparse.Namespace) -> int:
    token = new_token()
    line = line_of(token, ROLES[args.role], args.name)
    if args.json:
        print_json({"token": token, "line": line})
    else:
        print_line(f"the token, shown this once:\n{token}\n\nthe line for the file of {FIELD}:\n{line}")
    return 0
