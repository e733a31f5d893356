"""`bench NAME`: what the split costs, measured here and now against a peer in the same run."""

from __future__ import annotations

import argparse
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from cluster.commands.options import Subparsers
from cluster.commands.output import console, print_json, print_table
from cluster.commands.up import Guard, add_config_options
from cluster.config import NO_CHECKPOINTS
from cluster.configfile import find_config, load_cluster

if TYPE_CHECKING:
    from cluster.bench.result import Report
    from cluster.config import ClusterConfig

Run = Callable[[argparse.Namespace], "Report"]


def _alone(name: str) -> Run:
    return lambda args: _function(name)(rounds=args.rounds)


def _on_a_cluster(name: str) -> Run:
    return lambda args: _function(name)(_config(args), rounds=args.rounds)


def _experts(args: argparse.Namespace) -> Report:
    from cluster.bench.experts import bench_experts

    return bench_experts(_config(args), rounds=args.rounds, hivemind=args.hivemind)


def _balance(args: argparse.Namespace) -> Report:
    from cluster.bench.balance import RULES, STEPS, TASKS, bench_balance, report_of

    with _progress("balance", len(TASKS) * len(RULES) * args.rounds * STEPS) as advance:
        runs = bench_balance(
            rounds=args.rounds, after_step=lambda run: advance(f"training {run.task} {run.rule}, seed {run.seed}")
        )
    if args.output is not None:
        from cluster.report import draw_balance

        draw_balance(args.output, runs)
    return report_of(runs)


def _async(args: argparse.Namespace) -> Report:
    from cluster.bench.asynchronous import QUICK, WHOLE, bench_async

    extent = QUICK if args.quick else replace(WHOLE, seeds=args.rounds)
    with _progress("sparse updates", extent.num_steps()) as advance:
        report, runs, speed = bench_async(extent, advance)
    if args.output is not None:
        from cluster.report import draw_async

        draw_async(args.output, runs, speed)
    return report


def _compression(args: argparse.Namespace) -> Report:
    from cluster.bench.compression import COPIES, SETTINGS, STEPS, bench_compression, label, report_of

    with _progress("compression", (len(SETTINGS) + len(COPIES)) * args.rounds * STEPS) as advance:
        runs = bench_compression(
            rounds=args.rounds, after_step=lambda run: advance(f"training {label(run.settings)}, seed {run.seed}")
        )
    report = report_of(runs)
    if args.output is not None:
        from cluster.report import draw_compression

        draw_compression(args.output, report)
    return report


def _print_compression(report: Report) -> None:
    from cluster.bench.compression import CompressionRow

    rows = [
        (
            r.case,
            f"{r.value:,.0f}",
            f"{r.ratio:.1f}",
            f"{r.link_ratio:.1f}",
            f"{r.heldout_loss:.4f}",
            f"{100 * r.loss_difference:+.2f} %",
            r.rounds,
        )
        for r in report.rows
        if isinstance(r, CompressionRow)
    ]
    columns = ("compression", "bytes a step", "fewer", "of all on the link", "held-out loss", "difference", "rounds")
    print_table(columns, rows, title="bench compression")


def _rebalance(args: argparse.Namespace) -> Report:
    from cluster.bench.rebalance import bench_rebalance, num_steps

    with _progress("fitting gates, starting the cluster", 2 * num_steps(args.rounds)) as advance:
        return bench_rebalance(_config(args), rounds=args.rounds, after_step=advance)


def _print_metrics(report: Report) -> None:
    from cluster.bench.metrics import CostRow

    rows = []
    for r in report.rows:
        cost = spread = ""
        if isinstance(r, CostRow):
            cost = f"{100 * r.cost_ratio:.2f} %"
            spread = f"{100 * r.low_ratio:.2f} to {100 * r.high_ratio:.2f} %"
        without = f"{r.peer_value:,.3g}" if r.peer else ""
        rows.append((r.case, f"{r.value:,.3g} {r.unit}", without, cost, spread, r.rounds))
    columns = ("case", "with metrics", "without", "cost", "95 % interval", "rounds")
    print_table(columns, rows, title="bench metrics")


@dataclass(frozen=True)
class Bench:
    help: str
    run: Run
    rounds: int = 7
    """Unless told."""


BENCHES = {
    "dispatch": Bench(
        "a small message to an expert actor and back, against a Ray actor call; 4 MB, against copies",
        _on_a_cluster("dispatch"),
    ),
    "links": Bench(
        "a message over an encrypted link between hosts, against the same in the clear; tokens for two actors of "
        "a node over its relay, against a link to each",
        _alone("links"),
    ),
    "train": Bench(
        "training tokens a second, against plain transformers in one process; and with several micro-batches in flight",
        _on_a_cluster("train"),
    ),
    "serve": Bench(
        "training beside 4 light streams, of the newest version and of a pinned one, against training alone",
        _on_a_cluster("serve"),
        rounds=5,
    ),
    "decode": Bench(
        "tokens a second of 32 streams on a GPU, against transformers' generate; without one, of 16 streams together, "
        "against the same in turns, and what a stream notices of a long prompt",
        _on_a_cluster("decode"),
        rounds=5,
    ),
    "metrics": Bench(
        "training while metrics are scraped every second, against without them", _on_a_cluster("metrics"), rounds=20
    ),
    "memory": Bench("loading a quarter of the experts, against loading the whole model", _alone("memory")),
    "planner": Bench("placement of experts by load, against the public EPLB algorithm", _alone("planner")),
    "experts": Bench("training one expert behind a link, against the same expert in one process", _experts),
    "balance": Bench(
        "load and learning under each balance rule, against training without one; a round is a seed",
        _balance,
        rounds=1,  # minutes each
    ),
    "async": Bench(
        "updates of experts beside forwards and late, against each before the next step; a round is a seed",
        _async,
        rounds=3,
    ),
    "compression": Bench(
        "bytes between two routers, or copies of expert groups, and held-out loss by compression; a round is a seed",
        _compression,
        rounds=1,
    ),
    "rebalance": Bench(
        "training under a Zipf load after a rebalance with copies, against before; a round is a step", _rebalance
    ),
    "scale": Bench(
        "expert actors come and go under 16 streams and a training job; a round is every way once",
        _on_a_cluster("scale"),
        rounds=1,
    ),
    "cache": Bench(
        "experts beyond the device's memory, against all of them there, under a Zipf choice", _on_a_cluster("cache")
    ),
    "checkpoint": Bench(
        "kill -9 while a checkpoint is saved, against torch.save; a round is a kill", _alone("checkpoint"), rounds=200
    ),
}


TABLES: dict[str, Callable[[Report], None]] = {"compression": _print_compression, "metrics": _print_metrics}
"""Of those whose rows have more than others'."""


def add_parsers(subparsers: Subparsers, guarded: Guard) -> None:
    parser = subparsers.add_parser("bench", help="measure against a peer in the same run")
    names = parser.add_subparsers(required=True, metavar="NAME", dest="name")
    for name, bench in BENCHES.items():
        parser = names.add_parser(name, help=bench.help, description=bench.help)
        add_config_options(parser)
        parser.add_argument(
            "--rounds", type=int, default=bench.rounds, help="interleaved rounds (default: %(default)s)"
        )
        parser.add_argument("--json", action="store_true", help="print one JSON document")
        if name == "experts":
            parser.add_argument("--hivemind", metavar="PYTHON", help="an interpreter that has hivemind, timed too")
        if name == "async":
            parser.add_argument("--quick", action="store_true", help="one seed and few steps, for a first look")
        if name in ("balance", "async", "compression"):
            parser.add_argument("--output", metavar="FILE.png", type=_png, help="draw it as a picture as well")
        parser.set_defaults(run=guarded(run_bench))


def run_bench(args: argparse.Namespace) -> int:
    report = BENCHES[args.name].run(args)
    if args.json:
        print_json(report.to_dict())
        return 0
    if (show := TABLES.get(args.name)) is not None:
        show(report)
        return 0
    rows = [
        (r.case, f"{r.value:,.3g} {r.unit}", f"{r.peer_value:,.3g} {r.unit}", r.peer, f"{r.ratio:.2f}", r.rounds)
        for r in report.rows
    ]
    print_table(("case", "ours", "peer's", "peer", "ratio", "rounds"), rows, title=f"bench {report.bench}")
    return 0


def _function(name: str) -> Callable[..., Report]:
    """Imported when it is run: others need not wait for torch."""
    function: Callable[..., Report] = getattr(importlib.import_module(f"cluster.bench.{name}"), f"bench_{name}")
    return function


def _config(args: argparse.Namespace) -> ClusterConfig:
    return replace(load_cluster(find_config(args.config), dict(args.overrides)), checkpoint=NO_CHECKPOINTS)


@contextmanager
def _progress(first: str, num_steps: int) -> Iterator[Callable[[str], None]]:
    """Gives the function that counts a step, with what is being done: a bar on a terminal, elsewhere a line when that
    changes. `first` is being done before the first step."""
    screen = console(stderr=True)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeRemainingColumn()
    said = ""
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bar:
        task = bar.add_task(first, total=num_steps)

        def advance(doing: str) -> None:
            nonlocal said
            bar.update(task, advance=1, description=doing)
            if not screen.is_terminal and doing != said:
                screen.print(doing, highlight=False)
            said = doing

        yield advance


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a .png file")
    if not path.parent.is_dir():  # said now, not after minutes of training
        raise argparse.ArgumentTypeError(f"there is no directory {str(path.parent)!r}")
    return path
