"""The timeline of a run as a PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cluster.chaos.record import Gap, Look, Record, Span
from cluster.chaos.report import MB, tokens_per_s
from cluster.chaos.schedule import KINDS

_TABLEAU = "red", "blue", "green", "purple", "orange", "brown", "pink", "olive"
COLOURS = dict(zip(KINDS, (f"tab:{name}" for name in _TABLEAU), strict=True))


def draw_timeline(path: Path, record: Record) -> None:
    """Training rate, longest waits for a token, expert actors; faults as lines, degraded spans shaded."""
    figure, (rate, waits, actors, memory) = plt.subplots(
        4, 1, figsize=(12, 10), sharex=True, height_ratios=(3, 3, 1, 1.5), layout="constrained"
    )
    first_s, last_s = record.looks[0].time_s, record.looks[-1].time_s
    seconds = [Span(first_s + n, first_s + n + 1) for n in range(int(last_s - first_s) + 1)]
    middles = [span.start_s + 0.5 - first_s for span in seconds]
    rate.plot(middles, [tokens_per_s(record.commits, span) for span in seconds], color="black", linewidth=1)
    if record.reference is not None:
        usual = tokens_per_s(record.commits, record.reference)
        rate.axhline(usual, color="gray", linestyle=":", label="undisturbed")
        rate.axvspan(record.reference.start_s - first_s, record.reference.end_s - first_s, color="gray", alpha=0.15)
    waits.plot(middles, [1e3 * longest_wait_s(record.gaps, span) for span in seconds], color="black", linewidth=1)
    actors.step([look.time_s - first_s for look in record.looks], [look.num_experts for look in record.looks], "k-")
    _draw_memory(memory, record, first_s)
    for axes in (rate, waits, actors, memory):
        for span in degraded(record.looks):
            axes.axvspan(span.start_s - first_s, span.end_s - first_s, color="tab:orange", alpha=0.2, linewidth=0)
        _mark_faults(axes, record, first_s)
        axes.grid(alpha=0.3)
    rate.set(ylabel="trained tokens/s", ylim=(0, None), title="Faults, degraded spans (shaded), and what they cost")
    waits.set(ylabel="longest wait for a token, ms", yscale="log" if record.gaps else "linear")
    actors.set(ylabel="expert actors", ylim=(0, None))
    memory.set(ylabel="more memory, MB", xlabel="seconds")
    if rate.get_legend_handles_labels()[0]:
        rate.legend(loc="upper right", ncols=len(KINDS) + 1)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def longest_wait_s(gaps: Sequence[Gap], span: Span) -> float:
    """Of the waits that ended within; NaN without any, which leaves a hole in a line."""
    return max((gap.seconds for gap in gaps if span.start_s <= gap.end_s < span.end_s), default=float("nan"))


def degraded(looks: Sequence[Look]) -> list[Span]:
    """From the first look that missed something to the next that did not."""
    found: list[Span] = []
    start_s: float | None = None
    for look in looks:
        if look.missing and start_s is None:
            start_s = look.time_s
        elif not look.missing and start_s is not None:
            found.append(Span(start_s, look.time_s))
            start_s = None
    if start_s is not None:
        found.append(Span(start_s, looks[-1].time_s))
    return found


def _draw_memory(axes: plt.Axes, record: Record, first_s: float) -> None:
    """Of each lasting process since the faults began; what it took to start is of no account."""
    since_s = min((span.start_s for span in record.spans.values()), default=first_s)
    vitals = [each for each in record.vitals if each.time_s >= since_s]
    for name in dict.fromkeys(name for each in vitals for name in each.rss_bytes):
        seen = [(each.time_s - first_s, each.rss_bytes[name] / MB) for each in vitals if name in each.rss_bytes]
        axes.plot([time_s for time_s, _ in seen], [value - seen[0][1] for _, value in seen], linewidth=1, label=name)
    if vitals:
        axes.legend(loc="upper left", ncols=3)


def _mark_faults(axes: plt.Axes, record: Record, first_s: float) -> None:
    told: set[str] = set()
    for strike in record.strikes:
        label = None if strike.kind in told else strike.kind
        told.add(strike.kind)
        axes.axvline(strike.started_s - first_s, color=COLOURS[strike.kind], linewidth=1.5, label=label)
