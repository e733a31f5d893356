"""`scale` changes the number of expert actors or routers and watches that to its end; `operations` lists them."""

from __future__ import annotations

import argparse
from contextlib import closing

from cluster.backend import Operation, OperationState
from cluster.commands.options import EXIT_FAILED, EXIT_INTERRUPTED, Subparsers, add_remote, complain, reach_options
from cluster.commands.output import local_time, print_json, print_line, print_table
from cluster.commands.progress import open_operation
from cluster.errors import Unavailable
from cluster.service.client import Client


def add_parsers(subparsers: Subparsers) -> None:
    scale = add_remote(
        subparsers, "scale", run_scale, help="change the number of expert actors or routers; steps and requests go on"
    )
    what = scale.add_mutually_exclusive_group(required=True)
    what.add_argument("--experts", type=int, metavar="N", help="expert actors there should be")
    what.add_argument("--routers", type=int, metavar="N", help="routers there should be")
    scale.add_argument(
        "--request-id", metavar="ID", help="the same number with the same id again watches the operation that exists"
    )
    scale.add_argument("--detach", action="store_true", help="start it and return; it goes on")
    operations = add_remote(subparsers, "operations", run_operations, help="list changes of the cluster, newest first")
    operations.add_argument("--cancel", metavar="ID", help="end this one instead, if it still runs")


def run_scale(args: argparse.Namespace, client: Client) -> int:
    if args.routers is not None:
        operation = client.scale_routers(args.routers, request_id=args.request_id)
    else:
        operation = client.scale(args.experts, request_id=args.request_id)
    return watched(operation, args, client)


def watched(operation: Operation, args: argparse.Namespace, client: Client) -> int:
    """Shows an operation that was started, unless it is to go on alone. -> exit code."""
    if args.detach:
        return _report(operation, args, f"{operation.id} is {operation.state.value}; {_how_to_go_on(operation, args)}")
    return carried_out(operation, args, client)


def carried_out(operation: Operation, args: argparse.Namespace, client: Client) -> int:
    """Follows the operation to its end and reports it. -> exit code: 0 only if it succeeded."""
    try:
        operation = _followed(operation, args, client)
    except KeyboardInterrupt:
        complain(f"detached, {operation.id} goes on; {_how_to_go_on(operation, args)}")
        return EXIT_INTERRUPTED
    except Unavailable as error:
        raise Unavailable(f"{error}; {operation.id} may go on: {_how_to_go_on(operation, args)}") from error
    if operation.state is OperationState.SUCCEEDED:
        return _report(operation, args, _outcome(operation))
    if args.json:
        print_json({"operation": operation})
    why = f": {operation.error}" if operation.error else ""
    complain(f"{operation.id} {operation.state.value} at {operation.progress:.0%}{why}")
    return EXIT_FAILED


def run_operations(args: argparse.Namespace, client: Client) -> int:
    if args.cancel is not None:
        operation = client.cancel_operation(args.cancel)
        return _report(operation, args, f"{operation.id} is {operation.state.value} at {operation.progress:.0%}")
    operations = client.operations()
    if args.json:
        print_json({"operations": operations})
    elif operations:
        columns = "operation", "what", "state", "done", "started", "ended", "prepared in s", "stall ms", "message"
        print_table(columns, map(_row, operations))
    else:
        print_line("no operations yet; start one with `moe-cluster scale --experts N`")
    return 0


def _followed(operation: Operation, args: argparse.Namespace, client: Client) -> Operation:
    """Shows the operation until it is final; returns what it came to."""
    with (
        open_operation(operation, stderr=args.json) as show,
        closing(client.watch_operation(operation.id)) as changes,
    ):
        for operation in changes:
            show(operation)
    return operation


def _report(operation: Operation, args: argparse.Namespace, line: str) -> int:
    if args.json:
        print_json({"operation": operation})
    else:
        print_line(line)
    return 0


def _outcome(operation: Operation) -> str:
    return (
        f"done: {_what(operation)}; prepared in {operation.prepare_s:,.1f} s in the background; "
        f"steps waited {operation.stall_s * 1e3:,.1f} ms at most"
    )


def _row(operation: Operation) -> tuple[str, ...]:
    done = operation.state is OperationState.SUCCEEDED
    return (
        operation.id,
        _what(operation),
        operation.state.value,
        f"{operation.progress:.0%}",
        local_time(operation.created_s),
        local_time(operation.ended_s),
        f"{operation.prepare_s:,.1f}" if done else "",
        f"{operation.stall_s * 1e3:,.1f}" if done else "",
        operation.error or operation.message,
    )


def _what(operation: Operation) -> str:
    """`4 expert actors`, `16 experts a layer`, `node-2 is empty`; the kind, for one that a newer cluster has."""
    if operation.kind == "drain_node":
        return f"{operation.node} is empty"
    if operation.kind == "grow_model":
        return f"{operation.target} experts a layer"
    noun = {"scale_experts": "expert actor", "scale_routers": "router"}.get(operation.kind)
    if noun is None:
        return operation.kind
    return f"{operation.target} {noun}{'' if operation.target == 1 else 's'}"


def _how_to_go_on(operation: Operation, args: argparse.Namespace) -> str:
    where = reach_options(args)
    see = f"see it: moe-cluster operations{where}"
    return f"{see}, end it: moe-cluster operations --cancel {operation.id}{where}"
