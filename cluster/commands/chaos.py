"""`chaos`: trains and serves while actors and nodes are killed, frozen and scaled, and says what that cost."""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn

from cluster.chaos.record import PHASES, Phase
from cluster.chaos.schedule import DEFAULT_KINDS, KINDS, Kind
from cluster.commands.options import EXIT_FAILED, EXIT_INTERRUPTED, Subparsers, positive
from cluster.commands.output import console, plain, print_json, print_line, print_table
from cluster.commands.up import Guard, add_config_options
from cluster.config import (
    BatchConfig,
    ClusterConfig,
    DataConfig,
    EvalConfig,
    JobConfig,
    OptimizerConfig,
    ScheduleConfig,
)
from cluster.configcheck import validate_job
from cluster.configfile import find_config, load_cluster, load_job

if TYPE_CHECKING:
    from cluster.chaos.run import Say, Tick

JOB = JobConfig(
    batch=BatchConfig(sequences=4, sequence_length=64),
    optimizer=OptimizerConfig(lr=1e-3),
    schedule=ScheduleConfig("constant"),
    data=DataConfig(heldout_every=0),
    eval=EvalConfig(every_steps=0),
)
UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0}


def add_parsers(subparsers: Subparsers, guarded: Guard) -> None:
    parser = subparsers.add_parser(
        "chaos",
        help="train and serve under faults by a seeded schedule, and report what they cost",
        description="Half of the time trains and serves, half of it serves only (see --phases), while faults strike "
        f"one at a time: {', '.join(KINDS)}. A cluster that is left alone then tells what losses and tokens should be.",
    )
    add_config_options(parser)
    add = parser.add_argument
    add("--minutes", type=positive, default=2.0, help="time with faults (default: %(default)g)")
    add("--mtbf", dest="mtbf_s", metavar="TIME", type=duration, default=20.0, help="mean time between faults, e.g. 30s")
    add("--min-gap", dest="min_gap_s", metavar="TIME", type=duration, default=5.0, help="least time between faults")
    add("--kinds", metavar="LIST", type=kinds, default=DEFAULT_KINDS, help=f"default: {','.join(DEFAULT_KINDS)}")
    add(
        "--phases",
        metavar="LIST",
        type=phases,
        default=PHASES,
        help=f"share the minutes equally, of {','.join(PHASES)} (default: both)",
    )
    add(
        "--faults",
        dest="max_faults",
        type=int,
        default=0,
        metavar="N",
        help="end a phase after so many (default: time)",
    )
    add("--seed", type=int, default=0, help="of the schedule (default: %(default)s)")
    add(
        "--reference",
        dest="reference_s",
        metavar="TIME",
        type=duration,
        default=15.0,
        help="undisturbed training first",
    )
    add("--streams", type=int, default=2, help="streams of text at a time (default: %(default)s)")
    add(
        "--model",
        help="a shipped model, a model file or directory (default: tiny, and with float64 exact, which computes all of "
        "itself in that dtype, so that its losses must be equal)",
    )
    add("--dtype", default="float32", choices=("float32", "float64", "bfloat16"), help="float64 to compare exactly")
    add("--job", metavar="FILE", help="a job file to train by; its steps, schedule and evaluation are left out")
    add(
        "--staleness",
        type=int,
        metavar="STEPS",
        help="that the job's experts may be behind, in place of what the job says; losses need not be equal then",
    )
    add(
        "--slow-updates",
        dest="slow_updates_s",
        metavar="TIME",
        type=duration,
        default=0.0,
        help="that expert actors wait before each update, so that a job with a staleness is behind (default: none)",
    )
    add(
        "--no-comparison",
        dest="compare",
        action="store_false",
        help="without the undisturbed run of the same steps afterwards: losses and tokens are not compared",
    )
    add("--output", default="chaos-report", metavar="DIR", help="where to write (default: %(default)s)")
    add("--json", action="store_true", help="print the summary as one JSON document")
    parser.set_defaults(run=guarded(run_command))


def run_command(args: argparse.Namespace) -> int:
    from cluster.chaos.report import summary
    from cluster.chaos.run import Settings, run_chaos
    from cluster.serve import terminated_as_interrupted

    output = Path(args.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    settings = Settings(
        cluster=cluster_config(args),
        job=job_config(args.job, args.staleness),
        output=output,
        minutes=args.minutes,
        reference_s=args.reference_s,
        mtbf_s=args.mtbf_s,
        min_gap_s=args.min_gap_s,
        kinds=args.kinds,
        seed=args.seed,
        streams=args.streams,
        phases=args.phases,
        max_faults=args.max_faults,
        slow_updates_s=args.slow_updates_s,
        compare=args.compare,
    )
    with terminated_as_interrupted(), _shown(stderr=args.json) as (say, tick):
        record = run_chaos(settings, say, tick)
    document = summary(record)
    text = json.dumps(plain({**document, "strikes": record.strikes, "settings": vars_of(args)}), indent=2)
    (output / "summary.json").write_text(text + "\n")
    (output / "record.json").write_text(json.dumps(plain(record)) + "\n")
    if record.looks:
        from cluster.chaos.picture import draw_timeline

        draw_timeline(output / "timeline.png", record)
    if args.json:
        print_json(document)
    else:
        show(document)
        print_line(f"report in {output}")
    if record.interrupted:
        return EXIT_INTERRUPTED
    return EXIT_FAILED if document["problems"] else 0


def cluster_config(args: argparse.Namespace) -> ClusterConfig:
    """Three expert actors on three nodes with a copy of each group, unless the config or `--set` say otherwise."""
    from cluster.chaos.run import EXACT_MODEL

    model = args.model or (EXACT_MODEL if args.dtype == "float64" else "tiny")
    values: dict[str, Any] = {
        "model": model,
        "experts.actors": 3,
        "experts.redundancy": 2,
        "ray.nodes": 3,
        "router.dtype": args.dtype,
        "front.port": 0,
        "front.auth": {},
        "front.tls": {},
    }
    if model in ("tiny", EXACT_MODEL):
        values["experts.group_size"] = 1  # their 8 experts would be one group
    return load_cluster(find_config(args.config), {**values, **dict(args.overrides)})


def job_config(path: str | None, staleness: int | None = None) -> JobConfig:
    """One whose steps do not depend on how many there will be."""
    job = JOB if path is None else load_job(find_config(path, "jobs"))
    job = replace(job, schedule=ScheduleConfig("constant"), eval=EvalConfig(every_steps=0))
    if staleness is not None:
        job = replace(job, optimizer=replace(job.optimizer, staleness=staleness))
    return validate_job(job, "chaos")


def duration(text: str) -> float:
    """`30s`, `2m`, `1h` or a number of seconds."""
    unit = UNITS.get(text[-1:], 0.0)
    try:
        return positive(text[:-1]) * unit if unit else positive(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a time such as 30s or 2m") from None


def kinds(text: str) -> tuple[Kind, ...]:
    found = tuple(kind for name in text.split(",") for kind in KINDS if kind == name)
    if len(found) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(KINDS)}")
    return found


def phases(text: str) -> tuple[Phase, ...]:
    found = tuple(phase for phase in PHASES if phase in text.split(","))
    if len(found) != len(text.split(",")):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of {', '.join(PHASES)}")
    return found


def vars_of(args: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(args).items() if name not in ("run", "json", "verbose")}


@contextmanager
def _shown(*, stderr: bool) -> Iterator[tuple[Say, Tick]]:
    """A live bar on a terminal, and a line an event everywhere."""
    screen = console(stderr=stderr)
    columns = TextColumn("{task.description}"), BarColumn(), TaskProgressColumn(), TimeElapsedColumn()
    with Progress(*columns, console=screen, disable=not screen.is_terminal) as bar:
        task = bar.add_task("starting", total=1.0)

        def say(text: str) -> None:
            bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

        yield say, lambda doing, share: bar.update(task, description=doing, completed=share)


def show(document: dict[str, Any]) -> None:
    """The figures for people."""
    names = ("interruption_s", "next_step_s", "serving_interruption_s", "next_token_s", "recovery_s")
    seen = dict.fromkeys(kind for name in names for kind in document[name])
    rows = [
        (kind, document["recovery_s"].get(kind, {}).get("n", 0), *(_pair(document[name].get(kind)) for name in names))
        for kind in seen
    ]
    columns = "fault", "healed", "training stopped", "next step", "a stream waited", "next token", "until whole"
    print_table(columns, rows, title="median / worst in ms; what stopped or waited, less what is usual")
    leaks, requests = document["leaks"], document["requests"]
    for line in (
        f"throughput retained: {_number(document['retained_throughput'], '.1%')}; "
        f"of the capacity that was there: {_number(document['retained_of_capacity'], '.1%')}, "
        f"and of the rate between the faults: {_number(document['retained_of_calm'], '.1%')}",
        f"requests: {requests['total']}, failed {requests['failed']}; "
        f"tokens wrong or missing: {_number(document['tokens_wrong'])}",
        f"steps: {document['steps']}, replayed {document['steps_replayed']}; "
        f"updates lost, by the ledger: {document['updates_lost']}, "
        f"by the experts' own count: {_number(document['updates_missing'])}",
        _staleness_line(document["staleness"]),
        _loss_line(document),
        f"leaks: {leaks['processes']} processes, {_number(leaks['file_handles'])} file handles, "
        f"{_number(leaks['rss_slope_mb_per_min'], '+.2f')} MB a minute (front, coordinator and router), "
        f"{_number(leaks['own_slope_mb_per_min'], '+.2f')} without what is shared",
        *(f"PROBLEM: {problem}" for problem in document["problems"]),
    ):
        print_line(line)


def _staleness_line(found: dict[str, Any]) -> str:
    return (
        f"staleness: bound {found['bound']}, most {_number(found['max'])}, steps beyond it {found['steps_beyond']}; "
        f"{found['merged_updates']} updates made as part of others"
    )


def _loss_line(document: dict[str, Any]) -> str:
    rule = "must be equal" if document["losses_must_be_equal"] else "need not be equal here"
    return (
        f"losses against the undisturbed run's, which {rule}: at most "
        f"{_number(document['loss_rel_diff_max'], '.2e')} apart, relative; mean of the last tenth "
        f"{_number(document['loss_rel_diff_mean'], '+.2e')}"
    )


def _pair(values: dict[str, float] | None) -> str:
    return "" if values is None else f"{1e3 * values['median']:,.0f} / {1e3 * values['max']:,.0f}"


def _number(value: float | None, form: str = "") -> str:
    return "not measured" if value is None else format(value, form)
