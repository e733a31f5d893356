"""Pictures of a run: the loss curve and the experts' load, as PNG."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from actors.moe.measures import max_vio
from cluster.backend import LoadStep

if TYPE_CHECKING:
    from cluster.bench import asynchronous
    from cluster.bench.balance import Run
    from cluster.bench.result import Report

Curve = Sequence[tuple[int, float]]
"""(step, loss in nats a token)"""
CURVE_STEPS = 20


def draw_losses(path: Path, training: Curve, heldout: Curve) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(*zip(*training, strict=True), linewidth=1, color="tab:blue", label="training, each step")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), marker="o", color="tab:orange", label="held-out text")
        for step, loss in (heldout[0], heldout[-1]):
            axes.annotate(f"{loss:.2f}", (step, loss), textcoords="offset points", xytext=(4, 6))
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def draw_load(path: Path, load_LE: Sequence[Sequence[int]], group_size: int) -> None:
    """Share of each expert of each layer, 1 being the mean; lines part the expert groups."""
    shares = _shares(load_LE)
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.5 * len(shares)), layout="constrained")
    image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0)
    for group in range(group_size, len(shares[0]), group_size):
        axes.axvline(group - 0.5, color="white", linewidth=1)
    axes.set(xlabel="expert", ylabel="MoE layer", title="Expert load (1 = mean of the layer)")
    axes.set_yticks(range(len(shares)))
    figure.colorbar(image, ax=axes)
    _save(figure, path)


def draw_load_history(path: Path, history: Sequence[LoadStep], group_size: int) -> None:
    """Share of each expert over the steps of a window, summed over the layers; lines part the expert groups."""
    shares = _shares([step.load_E for step in history])
    first, last = history[0].version, history[-1].version
    num_experts = len(shares[0])
    figure, axes = plt.subplots(figsize=(8, min(12.0, 2.5 + 0.1 * num_experts)), layout="constrained")
    extent = (first - 0.5, last + 0.5, num_experts - 0.5, -0.5)
    image = axes.imshow([*zip(*shares, strict=True)], aspect="auto", cmap="viridis", vmin=0, extent=extent)
    for group in range(group_size, num_experts, group_size):
        axes.axhline(group - 0.5, color="white", linewidth=1)
    axes.set(xlabel="version (committed steps)", ylabel="expert", title="Expert load over time (1 = mean of the step)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes)
    _save(figure, path)


def draw_balance(path: Path, runs: Sequence[Run]) -> None:
    """A column a task: MaxVio over the steps under each rule above, held-out loss below, means over the seeds."""
    tasks = list(dict.fromkeys(run.task for run in runs))
    figure, axes = plt.subplots(
        2, len(tasks), figsize=(6.5 * len(tasks), 8), height_ratios=(3, 2), layout="constrained", squeeze=False
    )
    for task, (above, below) in zip(tasks, axes.T, strict=True):
        rules: dict[str, list[Run]] = {}
        for run in runs:
            if run.task == task:
                rules.setdefault(run.rule, []).append(run)
        _draw_max_vio(above, rules)
        _draw_heldout(below, rules)
        above.set_title(task)
    figure.legend(*axes[0, 0].get_legend_handles_labels(), loc="outside upper center", ncols=8)
    _save(figure, path)


def _draw_max_vio(axes: plt.Axes, rules: Mapping[str, Sequence[Run]]) -> None:
    for rule, runs in rules.items():
        axes.plot(*_max_vio_curve(runs), linewidth=1.5, label=rule)
    axes.axhline(0.2, color="gray", linewidth=1, linestyle=":", label="0.2")
    axes.set(xlabel="step", ylabel=f"MaxVio of {CURVE_STEPS} steps, mean of the layers", yscale="log")
    axes.grid(alpha=0.3)


def _max_vio_curve(runs: Sequence[Run]) -> tuple[list[int], list[float]]:
    """Steps, and MaxVio of the load summed over the `CURVE_STEPS` up to each: one batch alone is mostly noise."""
    total_RSLE = np.stack([run.load_SLE for run in runs]).cumsum(1)
    recent_RSLE = total_RSLE[:, CURVE_STEPS:] - total_RSLE[:, :-CURVE_STEPS]
    curve_S = max_vio(recent_RSLE).mean((0, 2))
    return list(range(CURVE_STEPS + 1, total_RSLE.shape[1] + 1)), curve_S.tolist()


def _draw_heldout(axes: plt.Axes, rules: Mapping[str, Sequence[Run]]) -> None:
    """Against the first rule, each seed with its own: the losses themselves differ more by seed than by rule."""
    first, *_ = rules.values()
    for number, (rule, runs) in enumerate(rules.items()):
        percent = [100 * (run.heldout_loss / other.heldout_loss - 1) for run, other in zip(runs, first, strict=True)]
        loss = np.mean([run.heldout_loss for run in runs])
        axes.barh(f"{rule}\n{loss:.3f}", np.mean(percent), color=f"C{number}", alpha=0.6)
        axes.scatter(percent, [number] * len(percent), color=f"C{number}", edgecolor="black", s=20, zorder=3)
    for limit in (-1, 1):
        axes.axvline(limit, color="gray", linewidth=1, linestyle=":")
    axes.axvline(0, color="black", linewidth=1)
    axes.invert_yaxis()
    axes.set(xlabel=f"held-out loss against {next(iter(rules))}, % (a dot is a seed)", ylabel="rule, nats a token")
    axes.grid(alpha=0.3, axis="x")


def draw_async(path: Path, runs: Sequence[asynchronous.Run], speed: Mapping[int, float]) -> None:
    """A column an optimizer: losses of training at equal tokens, at equal time with one actor four times slower, and
    below held-out losses against those without delay. `speed`: of s against s = 0, where time was measured."""
    names = list(dict.fromkeys(run.optimizer for run in runs))
    shape = (4.5 * len(names), 10)
    figure, axes = plt.subplots(3, len(names), figsize=shape, sharey="row", layout="constrained", squeeze=False)
    for name, (by_tokens, by_time, below) in zip(names, axes.T, strict=True):
        by_staleness: dict[int, list[asynchronous.Run]] = {}
        for run in runs:
            if run.optimizer in (name, name.removesuffix("_corrected")) and (
                run.optimizer == name or not run.staleness
            ):
                by_staleness.setdefault(run.staleness, []).append(run)
        for staleness, group in sorted(by_staleness.items()):
            curve_S = np.mean([[run.loss_after(i) for i in range(1, len(run.losses) + 1)] for run in group], axis=0)
            steps_S = np.arange(1, len(curve_S) + 1)
            label = f"s = {staleness}"
            by_tokens.plot(steps_S, curve_S, linewidth=1.2, label=label)
            by_time.plot(steps_S / speed.get(staleness, float("nan")), curve_S, linewidth=1.2, label=label)
        by_tokens.set(title=name, xlabel="step (equal tokens)", ylabel="training loss (nats a token)")
        by_time.set(xlabel="time (steps of s = 0, one actor 4 x slower)", ylabel="training loss (nats a token)")
        _draw_delays(below, by_staleness)
        for each in (by_tokens, by_time):
            each.grid(alpha=0.3)
            each.legend()
    _save(figure, path)


def _draw_delays(axes: plt.Axes, by_staleness: Mapping[int, Sequence[asynchronous.Run]]) -> None:
    """Each seed against its own run without delay."""
    undelayed = {run.seed: run.heldout_loss for run in by_staleness[0]}
    for staleness, runs in sorted(by_staleness.items()):
        percent = [100 * (run.heldout_loss / undelayed[run.seed] - 1) for run in runs]
        position = sorted(by_staleness).index(staleness)
        axes.bar(position, float(np.mean(percent)), alpha=0.6)
        axes.scatter([position] * len(percent), percent, color="black", s=12, zorder=3)
    for limit in (-1, 1):
        axes.axhline(limit, color="gray", linewidth=1, linestyle=":")
    axes.axhline(0, color="black", linewidth=1)
    axes.set_xticks(range(len(by_staleness)), [f"s = {s}" for s in sorted(by_staleness)])
    axes.set(ylabel="held-out loss against s = 0, %")
    axes.grid(alpha=0.3, axis="y")


def draw_compression(path: Path, report: Report) -> None:
    """Held-out loss over how many times fewer bytes the gradients take, a line a method, a point a setting."""
    from cluster.bench.compression import CompressionRow

    lines: dict[str, list[CompressionRow]] = {}
    for row in report.rows:
        if isinstance(row, CompressionRow):
            name = row.case.removeprefix("copies_")
            line = name.partition("_")[0] + (", copies" if name != row.case else "")
            lines.setdefault(line, []).append(row)
    figure, axes = plt.subplots(figsize=(9, 5.5), layout="constrained")
    for method, rows in lines.items():
        rows.sort(key=lambda row: row.ratio)
        axes.plot([r.ratio for r in rows], [100 * r.loss_difference for r in rows], marker="o", label=method)
        for row in rows:
            place = (row.ratio, 100 * row.loss_difference)
            axes.annotate(row.case, place, textcoords="offset points", xytext=(5, 5), fontsize=7)
    axes.axhline(1, color="gray", linewidth=1, linestyle=":", label="1 %")
    axes.axvline(100, color="gray", linewidth=1, linestyle="--", label="100 times")
    axes.set(xscale="log", xlabel="times fewer bytes of gradients on the link", ylabel="held-out loss against none, %")
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def _shares(load_XE: Sequence[Sequence[int]]) -> list[list[float]]:
    """Each row over its mean."""
    return [[load * len(load_E) / max(1, sum(load_E)) for load in load_E] for load_E in load_XE]


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
