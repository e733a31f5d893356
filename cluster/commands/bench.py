"""`bench NAME`: what the split costs, measured here and now against a peer in the same run."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.commands.options import Subparsers
from cluster.commands.output import console, print_json, print_table
from cluster.commands.up import Guard, add_config_options
from cluster.configfile import find_config, load_cluster

if TYPE_CHECKING:
    from cluster.bench.balance import Run
    from cluster.bench.result import Report

NAMES = {
    "dispatch": "a small message to an expert actor and back, against a Ray actor call",
    "train": "training tokens a second, against plain transformers in one process",
    "memory": "loading a quarter of the experts, against loading the whole model",
    "planner": "placement of experts by load, against the public EPLB algorithm",
    "experts": "training one expert behind a link, against the same expert in one process",
    "balance": "load and learning under each balance rule, against training without one; a round is a seed",
    "checkpoint": "kill -9 while a checkpoint is saved, against torch.save; a round is a kill",
}


def add_parsers(subparsers: Subparsers, guarded: Guard) -> None:
    bench = subparsers.add_parser("bench", help="measure against a peer in the same run")
    names = bench.add_subparsers(required=True, metavar="NAME", dest="name")
    for name, help_text in NAMES.items():
        parser = names.add_parser(name, help=help_text, description=help_text)
        add_config_options(parser)
        rounds = {"balance": 1, "checkpoint": 200}.get(name, 7)  # a round of balance is many trainings: minutes
        parser.add_argument("--rounds", type=int, default=rounds, help="interleaved rounds (default: %(default)s)")
        parser.add_argument("--json", action="store_true", help="print one JSON document")
        if name == "experts":
            parser.add_argument("--hivemind", metavar="PYTHON", help="an interpreter that has hivemind, timed too")
        if name == "balance":
            parser.add_argument("--output", metavar="FILE.png", type=_png, help="draw it as a picture as well")
        parser.set_defaults(run=guarded(run_bench))


def run_bench(args: argparse.Namespace) -> int:
    report = _run(args)
    if args.json:
        print_json(report.to_dict())
        return 0
    rows = [
        (r.case, f"{r.value:,.3g} {r.unit}", f"{r.peer_value:,.3g} {r.unit}", r.peer, f"{r.ratio:.2f}", r.rounds)
        for r in report.rows
    ]
    print_table(("case", "ours", "peer's", "peer", "ratio", "rounds"), rows, title=f"bench {report.bench}")
    return 0


def _run(args: argparse.Namespace) -> Report:
    if args.name == "memory":
        from cluster.bench.memory import bench_memory

        return bench_memory(rounds=args.rounds)
    if args.name == "planner":
        from cluster.bench.planner import bench_planner

        return bench_planner(rounds=args.rounds)
    if args.name == "checkpoint":
        from cluster.bench.checkpoint import bench_checkpoint

        return bench_checkpoint(rounds=args.rounds)
    if args.name == "balance":
        return _balance(args)
    config = load_cluster(find_config(args.config), dict(args.overrides))
    if args.name == "dispatch":
        from cluster.bench.dispatch import bench_dispatch

        return bench_dispatch(config, rounds=args.rounds)
    if args.name == "train":
        from cluster.bench.train import bench_train

        return bench_train(config, rounds=args.rounds)
    from cluster.bench.experts import bench_experts

    return bench_experts(config, rounds=args.rounds, hivemind=args.hivemind)


def _balance(args: argparse.Namespace) -> Report:
    from cluster.bench.balance import RULES, STEPS, TASKS, bench_balance, report_of

    screen = console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bar:
        task = bar.add_task("balance", total=len(TASKS) * len(RULES) * args.rounds * STEPS)

        def show(run: Run) -> None:
            bar.update(task, advance=1, description=f"{run.task} {run.rule}")
            if not screen.is_terminal and len(run.steps) == 1:
                screen.print(f"training {run.task} {run.rule}, seed {run.seed}", highlight=False)

        runs = bench_balance(rounds=args.rounds, after_step=show)
    if args.output is not None:
        from cluster.report import draw_balance

        draw_balance(args.output, runs)
    return report_of(runs)


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a .png file")
    if not path.parent.is_dir():  # said now, not after minutes of training
        raise argparse.ArgumentTypeError(f"there is no directory {str(path.parent)!r}")
    return path
