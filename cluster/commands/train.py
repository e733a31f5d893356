"""`train`: submits a job and watches it, or watches one that was submitted before."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from contextlib import closing

from actors.errors import InvalidInput
from cluster.backend import Job, JobState
from cluster.commands.options import (
    EXIT_FAILED,
    EXIT_INTERRUPTED,
    Subparsers,
    add_remote,
    complain,
    override,
    reach_options,
)
from cluster.commands.output import print_json, print_line
from cluster.commands.progress import open_progress
from cluster.configfile import load_job
from cluster.errors import Unavailable
from cluster.service.client import Client

Metrics = Mapping[str, float]


def add_parsers(subparsers: Subparsers) -> None:
    parser = add_remote(subparsers, "train", run_train, help="submit a training job and watch it to its end")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("job", nargs="?", metavar="JOB.yaml", help="the job: a file, or the name of a shipped one")
    what.add_argument("--watch", metavar="JOB_ID", help="watch a job that was submitted before")
    parser.add_argument(
        "--set",
        dest="overrides",
        action="append",
        default=[],
        type=override,
        metavar="KEY.PATH=VALUE",
        help="replace a value of the job, e.g. --set optimizer.lr=0.001; may be given several times",
    )
    parser.add_argument(
        "--request-id", metavar="ID", help="submitting the same job with the same id again gives the job that exists"
    )
    parser.add_argument("--detach", action="store_true", help="submit and return; the job goes on")


def run_train(args: argparse.Namespace, client: Client) -> int:
    job = _submit(args, client) if args.watch is None else _attach(args, client)
    if args.detach:
        return _report_detached(job, args)
    try:
        latest = _follow(job, args, client)
    except KeyboardInterrupt:
        complain(f"detached, job {job.id} goes on; {_how_to_go_on(job, args)}")
        return EXIT_INTERRUPTED
    except Unavailable as error:
        raise Unavailable(f"{error}; job {job.id} may go on: {_how_to_go_on(job, args)}") from error
    job = client.get_job(job.id)
    if args.json:
        print_json({"job": job, "metrics": latest.get("step", {}), "eval": latest.get("eval", {})})
    if job.state is JobState.SUCCEEDED:
        return 0
    complain(f"job {job.id} {job.state.value} at step {job.step}{': ' + job.error if job.error else ''}")
    return EXIT_FAILED


def _submit(args: argparse.Namespace, client: Client) -> Job:
    return client.submit_job(load_job(args.job, dict(args.overrides)), request_id=args.request_id)


def _attach(args: argparse.Namespace, client: Client) -> Job:
    if args.overrides or args.request_id or args.detach:
        remedy = "leave out --set, --request-id and --detach"
        raise InvalidInput("the job is submitted already", field="--watch", value=args.watch, remedy=remedy)
    return client.get_job(args.watch)


def _follow(job: Job, args: argparse.Namespace, client: Client) -> dict[str, Metrics]:
    """Shows every event of the job; returns the last metrics of each kind."""
    latest: dict[str, Metrics] = {}
    with open_progress(job, stderr=args.json) as show, closing(client.watch_job(job.id)) as events:
        for event in events:
            latest[event.kind] = event.metrics
            show(event)
    return latest


def _report_detached(job: Job, args: argparse.Namespace) -> int:
    if args.json:
        print_json({"job": job, "metrics": {}, "eval": {}})
    else:
        print_line(f"job {job.id} is {job.state.value}; {_how_to_go_on(job, args)}")
    return 0


def _how_to_go_on(job: Job, args: argparse.Namespace) -> str:
    where = reach_options(args)
    return f"watch it: moe-cluster train --watch {job.id}{where}, end it: moe-cluster cancel {job.id}{where}"
