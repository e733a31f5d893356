"""`jobs` and `cancel`."""

from __future__ import annotations

import argparse

from cluster.backend import Job
from cluster.commands.options import Subparsers, add_remote
from cluster.commands.output import local_time, print_json, print_line, print_table
from cluster.service.client import Client


def add_parsers(subparsers: Subparsers) -> None:
    jobs = add_remote(subparsers, "jobs", run_jobs, help="list the training jobs, newest first")
    jobs.add_argument("--limit", type=_count, default=20, help="most jobs to list (default: %(default)s)")
    cancel = add_remote(subparsers, "cancel", run_cancel, help="end a training job after its current step")
    cancel.add_argument("job_id", metavar="JOB_ID")


def run_jobs(args: argparse.Namespace, client: Client) -> int:
    jobs = client.list_jobs(limit=args.limit)
    if args.json:
        print_json({"jobs": jobs})
    elif jobs:
        print_table(("job", "state", "step", "submitted", "ended", "error"), map(_row, jobs))
    else:
        print_line("no jobs yet; submit one with `moe-cluster train JOB.yaml`")
    return 0


def run_cancel(args: argparse.Namespace, client: Client) -> int:
    job = client.cancel_job(args.job_id)
    if args.json:
        print_json({"job": job})
    else:
        print_line(f"job {job.id} is {job.state.value} at step {job.step} of {job.config.steps}")
    return 0


def _row(job: Job) -> tuple[str, ...]:
    step = f"{job.step}/{job.config.steps}"
    return job.id, job.state.value, step, local_time(job.created_s), local_time(job.ended_s), job.error


def _count(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not a positive number")
    return value
