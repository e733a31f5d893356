"""`heatmap`: which experts are used, by layer or over time, as text and as a picture."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from pathlib import Path

from rich.console import Console
from rich.live import Live
from rich.text import Text

from actors.errors import InvalidInput
from cluster.backend import LoadReport
from cluster.commands.options import EXIT_FAILED, Subparsers, add_remote, complain
from cluster.commands.output import console, print_json, print_line
from cluster.service.client import Client

NO_LOAD = "no load yet: no training step is committed; submit a job with `moe-cluster train JOB.yaml`"
MAX_CELL = 4
"""Widest an expert is drawn, characters."""

LEVELS = (
    # load over the mean of its row: from, text, shade, the same in ASCII, style
    (0.0, "none", "·", ".", "dim"),
    (1e-9, "below 0.5", "░", "-", "blue"),
    (0.5, "0.5 to 1.5", "▒", "=", "green"),
    (1.5, "1.5 to 3", "▓", "%", "yellow"),
    (3.0, "3 and more", "█", "#", "red"),
)


def add_parsers(subparsers: Subparsers) -> None:
    parser = add_remote(subparsers, "heatmap", run_heatmap, help="show how evenly the experts were used lately")
    parser.add_argument("--output", metavar="FILE.png", type=_png, help="draw it as a picture as well")
    parser.add_argument(
        "--over",
        choices=("layers", "time"),
        default="layers",
        help="a row is a layer, or a step with its layers summed (default: %(default)s)",
    )
    parser.add_argument(
        "--watch",
        dest="interval_s",
        metavar="SECONDS",
        type=float,
        nargs="?",
        const=1.0,
        help="show it again every so many seconds, 0.2 to 60 (default: %(const)s), until Ctrl-C",
    )


def run_heatmap(args: argparse.Namespace, client: Client) -> int:
    if args.interval_s is not None:
        _watch(args, client)
        return 0
    report = client.load()
    if args.json:
        print_json(report)
    elif report.window_steps:
        screen = console()
        _print(screen, render(report, args.over, screen))
    else:
        print_line(NO_LOAD)
    if args.output is None:
        return 0
    if not report.window_steps:
        complain(f"{args.output} is not written: no training step is committed yet")
        return EXIT_FAILED
    _draw(args.output, report, args.over)
    return 0


def render(report: LoadReport, over: str, screen: Console) -> Text:
    """Experts across, layers or steps down, folded to the width of the screen; measures below."""
    rows = _rows(report, over)
    text = Text(f"expert load over {report.window_steps} steps, up to version {report.version}\n")
    label_width = max(len(label) for label, _ in rows) + 1
    num_experts = len(rows[0][1])
    cell = max(1, min(MAX_CELL, (screen.width - label_width) // num_experts))
    across = max(1, (screen.width - label_width) // cell)
    across -= across % report.group_size if across > report.group_size else 0  # whole groups a line
    for start in range(0, num_experts, across):
        stop = min(start + across, num_experts)
        text.append(f"{'':{label_width}}experts {start} to {stop - 1}\n", "bold")
        for label, load_E in rows:
            text.append(f"{label:<{label_width}}").append_text(_shades(load_E, start, stop, cell, screen)).append("\n")
    return text.append_text(_legend(over, screen)).append("\n").append("\n".join(_measures(report)))


def _watch(args: argparse.Namespace, client: Client) -> None:
    with _open_screen(args) as show, closing(client.watch_load(args.interval_s)) as reports:
        for report in reports:
            show(report)
            if args.output is not None and report.window_steps:
                _draw(args.output, report, args.over)


@contextmanager
def _open_screen(args: argparse.Namespace) -> Iterator[Callable[[LoadReport], None]]:
    """Gives the function that shows a report: in place on a terminal, one after the other elsewhere."""
    screen = console()

    def picture(report: LoadReport) -> Text:
        return render(report, args.over, screen) if report.window_steps else Text(NO_LOAD)

    def show(report: LoadReport) -> None:
        if args.json:
            print_json(report)
        else:
            _print(screen, picture(report))
        sys.stdout.flush()

    if args.json or not screen.is_terminal:
        yield show
        return
    with Live(console=screen, auto_refresh=False, vertical_overflow="visible") as live:
        yield lambda report: live.update(picture(report), refresh=True)


def _rows(report: LoadReport, over: str) -> list[tuple[str, Sequence[int]]]:
    if over == "time":
        return [(f"version {step.version}", step.load_E) for step in report.history]
    return [(f"layer {layer}", load_E) for layer, load_E in enumerate(report.load_LE)]


def _shades(load_E: Sequence[int], start: int, stop: int, cell: int, screen: Console) -> Text:
    text, mean = Text(), sum(load_E) / len(load_E)
    for load in load_E[start:stop]:
        share = load / mean if mean else 0.0
        _, _, shade, plain, style = next(level for level in reversed(LEVELS) if share >= level[0])
        text.append((plain if screen.options.ascii_only else shade) * cell, style)
    return text


def _legend(over: str, screen: Console) -> Text:
    text = Text(f"load over the mean of the {'step' if over == 'time' else 'layer'}:")
    for _, name, shade, plain, style in LEVELS:
        text.append("  ").append(plain if screen.options.ascii_only else shade, style).append(f" {name}")
    return text


def _measures(report: LoadReport) -> Iterator[str]:
    """The lines below the picture."""
    for name, worst, values_L in (
        ("max_vio", report.max_vio, report.max_vio_L),
        ("utilisation std", report.utilisation_std, report.utilisation_std_L),
    ):
        mean = sum(values_L) / len(values_L)
        yield f"{name}: {worst:.2f} at worst, in layer {values_L.index(worst)}; {mean:.2f} on average; 0 is even"
    microbatch, step = report.microbatch_tokens_per_expert, report.step_tokens_per_expert
    yield f"tokens an expert: {microbatch:,.1f} a micro-batch, {step:,.1f} a step"
    yield f"actors: {_shares(report.actors)}"
    yield f"nodes: {_shares(report.nodes)}"
    if report.warning:
        yield f"warning: {report.warning}"


def _shares(load: Mapping[str, int]) -> str:
    total = max(1, sum(load.values()))
    return ", ".join(f"{name or '(unknown)'} {value / total:.1%}" for name, value in load.items())


def _print(screen: Console, text: Text) -> None:
    screen.print(text, soft_wrap=True)


def _draw(path: Path, report: LoadReport, over: str) -> None:
    from cluster.report import draw_load, draw_load_history  # matplotlib: not for every command

    try:
        if over == "time":
            draw_load_history(path, report.history, report.group_size)
        else:
            draw_load(path, report.load_LE, report.group_size)
    except OSError as error:
        raise InvalidInput(f"cannot be written: {error}", field="--output", value=str(path)) from error


def _png(text: str) -> Path:
    path = Path(text)
    if path.suffix.lower() != ".png":
        raise argparse.ArgumentTypeError(f"{text!r} is not the name of a .png file")
    return path
