"""The figures of a run: interruption a kind, retained throughput, lost work, equality, leaks. Pure."""

from __future__ import annotations

import itertools
import math
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from statistics import fmean, median
from typing import Any

from cluster.chaos.record import Commit, Phase, Record, Request, Span, Strike, Vitals
from cluster.control.ledger import summed_up

AFTER_S = 2.0
"""A wait that begins so long after all is whole again still counts for the fault."""
MB = 1e6
LOSS_LIMIT = 1e-9
"""Relative, of a model that computes all of itself in float64. Other actors sum in another order, which makes 1e-13 of
it in thousands of steps. Norms and gates of most families compute in float32 whatever the dtype is: there that order
makes 1e-8 of it, and sooner or later a token that is near a tie takes another expert, which makes 1e-3, in undisturbed
runs on 2 and 3 actors too (in float32 at step 358 of 420 of the model `tiny`, in float64 after 1,600)."""


def summary(record: Record) -> dict[str, Any]:
    """As `moe-cluster chaos --json` prints it; what the run did not come to measure is None."""
    return {
        "minutes": round(sum(span.end_s - span.start_s for span in record.spans.values()) / 60, 2),
        "faults": len(record.strikes),
        "interruption_s": _by_kind(record, _training_interruption(record)),
        "serving_interruption_s": _by_kind(record, _serving_interruption(record)),
        "next_step_s": _spread_of(next_steps(record)),
        "next_token_s": _spread_of(next_tokens(record)),
        "recovery_s": _by_kind(record, lambda strike: _recovery_s(strike)),
        "held_back_s": sum(strike.held_back_s for strike in record.strikes),
        "usual": usual(record),
        **throughput(record),
        "requests": _requests(record.requests),
        "tokens_wrong": tokens_wrong(record),
        "steps": len(losses(record)),
        "steps_replayed": sum(commit.retries for commit in record.commits) + len(record.commits) - len(losses(record)),
        "updates_lost": lost_by_ledger(record),
        "updates_missing": updates_missing(record),
        "staleness": staleness(record),
        "loss_rel_diff_max": loss_rel_diff_max(record),
        "loss_rel_diff_mean": loss_rel_diff_mean(record),
        "losses_must_be_equal": losses_must_be_equal(record),
        "leaks": leaks(record),
        "ledger": _ledger(record),
        "problems": problems(record),
        "interrupted": record.interrupted,
    }


# --- Interruptions -----------------------------------------------------------------------------------------------


def interruption_s(waits: Iterable[Span], start_s: float, end_s: float, usual_s: float) -> float | None:
    """Longest of the waits that reach into the time from `start_s` to `end_s`, less what is usual. None without any."""
    touching = [wait.end_s - wait.start_s for wait in waits if wait.end_s >= start_s and wait.start_s <= end_s]
    return max(0.0, max(touching) - usual_s) if touching else None


def step_waits(record: Record) -> list[Span]:
    """From commit to commit, and from the last one to the end of training: a job that hangs is seen there."""
    times = [commit.time_s for commit in record.commits]
    if times and "training" in record.spans:
        times.append(max(times[-1], record.spans["training"].end_s))
    return [Span(a, b) for a, b in itertools.pairwise(times)]


def usual(record: Record) -> dict[str, float | None]:
    """In seconds: median and longest wait for a step in the reference, and for a token, while nothing was disturbed."""
    waits = [wait.end_s - wait.start_s for wait in step_waits(record) if _is_within(wait, record.reference)]
    gaps = [gap.seconds for gap in record.gaps if _is_within(Span(gap.start_s, gap.end_s), record.reference)]
    return {
        "step_s": median(waits) if waits else None,
        "step_longest_s": max(waits, default=None),
        "token_s": median(gaps) if gaps else None,
        "token_longest_s": max(gaps, default=None),
    }


def _training_interruption(record: Record) -> Callable[[Strike], float | None]:
    waits, usual_s = step_waits(record), usual(record)["step_s"] or 0.0

    def measured(strike: Strike) -> float | None:
        if strike.phase != "training":
            return None
        return interruption_s(waits, strike.started_s, _ends_s(record, strike), usual_s)

    return measured


def _serving_interruption(record: Record) -> Callable[[Strike], float | None]:
    waits: dict[Phase, list[Span]] = defaultdict(list)
    for gap in record.gaps:
        waits[gap.phase].append(Span(gap.start_s, gap.end_s))
    usual_s = {phase: median(wait.end_s - wait.start_s for wait in of_phase) for phase, of_phase in waits.items()}

    def measured(strike: Strike) -> float | None:
        if strike.phase not in waits:
            return None
        return interruption_s(waits[strike.phase], strike.started_s, _ends_s(record, strike), usual_s[strike.phase])

    return measured


def _recovery_s(strike: Strike) -> float | None:
    return None if strike.recovered_s is None else strike.recovered_s - strike.started_s


def _ends_s(record: Record, strike: Strike) -> float:
    """Up to when a wait is blamed on it: whole again and a little more, but never beyond the next one."""
    later = [other.started_s for other in record.strikes if other.started_s > strike.started_s]
    end_s = math.inf if strike.recovered_s is None else strike.recovered_s + AFTER_S
    return min([end_s, *later])


def _by_kind(record: Record, measured: Callable[[Strike], float | None]) -> dict[str, dict[str, float | int]]:
    """Kinds in the order in which they first struck."""
    found: dict[str, list[float]] = {}
    for strike in record.strikes:
        if (value := measured(strike)) is not None:
            found.setdefault(strike.kind, []).append(value)
    return _spread_of(found)


def _spread_of(found: Mapping[str, Sequence[float]]) -> dict[str, dict[str, float | int]]:
    return {kind: {"n": len(v), "median": median(v), "max": max(v)} for kind, v in found.items()}


# --- What was due when a fault struck ----------------------------------------------------------------------------


def next_steps(record: Record) -> dict[str, list[float]]:
    """Kind -> seconds from each fault to the step that was due, in training; nothing is subtracted."""
    waits = step_waits(record)
    found: dict[str, list[float]] = {}
    for strike in record.strikes:
        if strike.phase == "training" and (wait_s := longest_due_s(waits, strike.started_s)) is not None:
            found.setdefault(strike.kind, []).append(wait_s)
    return found


def next_tokens(record: Record) -> dict[str, list[float]]:
    """The same of the token that each request which was open then was to have next: one number a request."""
    streams: dict[tuple[Phase, int], list[Span]] = defaultdict(list)
    for gap in record.gaps:
        streams[gap.phase, gap.stream].append(Span(gap.start_s, gap.end_s))
    found: dict[str, list[float]] = {}
    for strike in record.strikes:
        waits = [longest_due_s(of, strike.started_s) for (phase, _), of in streams.items() if phase == strike.phase]
        found.setdefault(strike.kind, []).extend(wait_s for wait_s in waits if wait_s is not None)
    return {kind: waits for kind, waits in found.items() if waits}


def longest_due_s(waits: Sequence[Span], time_s: float) -> float | None:
    """From this time to the end of the wait that it fell into, or the length of the one after it if that is longer, as
    what was due may have been on its way already. `waits`: in order. None if nobody waited then."""
    for number, wait in enumerate(waits):
        if wait.start_s <= time_s <= wait.end_s:
            after = waits[number + 1 : number + 2]
            return max(wait.end_s - time_s, *(each.end_s - each.start_s for each in after), 0.0)
    return None


def _is_within(wait: Span, span: Span | None) -> bool:
    return span is not None and wait.start_s >= span.start_s and wait.end_s <= span.end_s


# --- Throughput --------------------------------------------------------------------------------------------------


def throughput(record: Record) -> dict[str, float | None]:
    """Tokens/s trained; retained: disturbed over undisturbed, and the same over the share of actors that were there.

    `retained_of_calm` is the latter against the rate of the times between the faults instead of the one before them: on
    a machine that others use as well, the two may differ by more than the faults cost.
    """
    before, during = record.reference, record.spans.get("training")
    if before is None or during is None:
        names = ("reference_tokens_per_s", "retained_throughput", "retained_of_capacity", "capacity")
        return dict.fromkeys((*names, "calm_tokens_per_s", "retained_of_calm"))
    reference, disturbed = tokens_per_s(record.commits, before), tokens_per_s(record.commits, during)
    calm = _calm_tokens_per_s(record, during)
    retained = disturbed / reference if reference else None
    share = capacity(record, during)
    return {
        "reference_tokens_per_s": reference,
        "retained_throughput": retained,
        "retained_of_capacity": retained / share if retained is not None and share else None,
        "capacity": share,
        "calm_tokens_per_s": calm,
        "retained_of_calm": disturbed / calm / share if calm and share else None,
    }


def _calm_tokens_per_s(record: Record, span: Span) -> float | None:
    """While nothing was being healed; None if there was no such time."""
    spans = calm_spans(record.strikes, span)
    tokens = sum(tokens_per_s(record.commits, calm) * (calm.end_s - calm.start_s) for calm in spans)
    seconds = sum(calm.end_s - calm.start_s for calm in spans)
    return tokens / seconds if seconds else None


def calm_spans(strikes: Iterable[Strike], span: Span) -> list[Span]:
    """The parts of the span in which no fault was under way, nor what it broke being made whole."""
    found, start_s = [], span.start_s
    for strike in sorted(strikes, key=lambda strike: strike.started_s):
        if strike.started_s < span.end_s:
            if strike.started_s > start_s:
                found.append(Span(start_s, strike.started_s))
            start_s = max(start_s, math.inf if strike.recovered_s is None else strike.recovered_s)
    return [*found, Span(start_s, span.end_s)] if start_s < span.end_s else found


def tokens_per_s(commits: Iterable[Commit], span: Span) -> float:
    tokens = sum(commit.tokens for commit in commits if span.start_s < commit.time_s <= span.end_s)
    return tokens / (span.end_s - span.start_s) if span.end_s > span.start_s else 0.0


def capacity(record: Record, span: Span) -> float:
    """Mean over the time of expert actors there over those at the start; more than at the start count as all."""
    looks = [look for look in record.looks if span.start_s <= look.time_s <= span.end_s]
    return fmean(min(1.0, look.num_experts / record.base) for look in looks) if looks else 1.0


# --- Equality ----------------------------------------------------------------------------------------------------


def loss_rel_diff_max(record: Record) -> float | None:
    """Of the disturbed run's losses against the undisturbed one's, step by step."""
    ours = losses(record)
    pairs = [(ours[step], loss) for step, loss in enumerate(record.undisturbed_losses, 1) if step in ours]
    return max(abs(loss - theirs) / abs(theirs) for loss, theirs in pairs) if pairs else None


def loss_rel_diff_mean(record: Record) -> float | None:
    """Of the mean loss of the last tenth of the steps, over the undisturbed run's, less one."""
    ours, theirs = losses(record), record.undisturbed_losses
    last = [step for step in range(len(theirs) - len(theirs) // 10, len(theirs) + 1) if step in ours]
    return fmean(ours[n] for n in last) / fmean(theirs[n - 1] for n in last) - 1 if last and theirs else None


def losses_must_be_equal(record: Record) -> bool:
    """Whether a larger difference than `LOSS_LIMIT` is a fault. Not of a model with parts in narrow numbers, and not
    with a staleness: there a loss depends on how many updates were made when a forward came, which no two runs have
    alike."""
    return record.is_exact and record.staleness == 0


def losses(record: Record) -> dict[int, float]:
    """Step -> loss; the last one of a step that was done again, after a return to a checkpoint."""
    return {commit.step: commit.loss for commit in record.commits}


def tokens_wrong(record: Record) -> int | None:
    """Tokens of complete streams of the serving phase that differ from the undisturbed cluster's, or are missing."""
    if not record.expected:
        return None
    streams = [r for r in record.requests if r.phase == "serving" and not r.error and r.key in record.expected]
    return sum(_differing(request.tokens, record.expected[request.key]) for request in streams)


def _differing(found: Sequence[int], expected: Sequence[int]) -> int:
    return sum(a != b for a, b in itertools.zip_longest(found, expected))


def _requests(requests: Sequence[Request]) -> dict[str, int]:
    return {"total": len(requests), "failed": sum(bool(request.error) for request in requests)}


# --- Updates -----------------------------------------------------------------------------------------------------


def staleness(record: Record) -> dict[str, float | int | None]:
    """Of all steps that were told of, those that were done again included."""
    seen = [commit.staleness for commit in record.commits]
    return {
        "bound": record.staleness,
        "max": max(seen, default=None),
        "mean_of_max": fmean(seen) if seen else None,
        "steps_beyond": sum(most > record.staleness for most in seen),
        "merged_updates": sum(commit.merged for commit in record.commits),
    }


def lost_by_ledger(record: Record) -> int:
    return sum(entry.updates_lost for entry in record.ledger)


def updates_missing(record: Record) -> int | None:
    """Committed steps of the job that are in no weights."""
    if record.updates_made is None:
        return None
    return max(losses(record), default=0) - record.updates_made


# --- Leaks -------------------------------------------------------------------------------------------------------


def leaks(record: Record) -> dict[str, Any]:
    """Over both phases: processes and handles more than before under the same work, and what outlived the cluster."""
    pairs = list(record.calm.values())
    resident = _slopes(record, lambda vitals: vitals.rss_bytes)
    own = _slopes(record, lambda vitals: vitals.own_bytes)
    return {
        "processes": len(record.left_over) + sum(max(0, b.num_processes - a.num_processes) for a, b in pairs),
        "file_handles": sum(_grown(a, b) for a, b in pairs) if pairs else None,
        "rss_slope_mb_per_min": sum(resident.values()) if resident else None,
        "rss_slope_of_mb_per_min": resident,
        "own_slope_mb_per_min": sum(own.values()) if own else None,
        "own_slope_of_mb_per_min": own,
        "file_handles_of": {
            phase: {name: (count, after.handles.get(name)) for name, count in before.handles.items()}
            for phase, (before, after) in record.calm.items()
        },
    }


def has_grown(before: Vitals, after: Vitals) -> bool:
    return after.num_processes > before.num_processes or _grown(before, after) > 0


def least_of(one: Vitals, other: Vitals) -> Vitals:
    """Of each number the lower one; the time of the later."""
    return Vitals(
        max(one.time_s, other.time_s),
        _least(one.rss_bytes, other.rss_bytes),
        _least(one.own_bytes, other.own_bytes),
        _least(one.handles, other.handles),
        min(one.num_processes, other.num_processes),
    )


def _least(one: Mapping[str, int], other: Mapping[str, int]) -> dict[str, int]:
    return {name: min(count, other.get(name, count)) for name, count in one.items()}


def _grown(before: Vitals, after: Vitals) -> int:
    return sum(max(0, after.handles.get(name, 0) - count) for name, count in before.handles.items())


def _slopes(record: Record, memory: Callable[[Vitals], Mapping[str, int]]) -> dict[str, float]:
    """MB a minute of each process while faults could strike; the work differs by phase, so each phase has its own
    slope, and they are weighed by their time."""
    sums: dict[str, float] = defaultdict(float)
    total_s = 0.0
    for span in record.spans.values():
        seen = [v for v in record.vitals if span.start_s <= v.time_s <= span.end_s]
        if len(seen) < 3:
            continue
        seconds = span.end_s - span.start_s
        total_s += seconds
        for name in set.intersection(*(set(memory(v)) for v in seen)):
            sums[name] += slope([(v.time_s / 60, memory(v)[name] / MB) for v in seen]) * seconds
    return {name: value / total_s for name, value in sorted(sums.items())}


def slope(points: Sequence[tuple[float, float]]) -> float:
    """Of the least-squares line through (x, y); 0 where all x are the same."""
    mean_x, mean_y = fmean(x for x, _ in points), fmean(y for _, y in points)
    spread = sum((x - mean_x) ** 2 for x, _ in points)
    return sum((x - mean_x) * (y - mean_y) for x, y in points) / spread if spread else 0.0


# --- What the cluster says, and what went wrong ------------------------------------------------------------------


def _ledger(record: Record) -> dict[str, dict[str, float | int | None]]:
    return {
        kind: {
            "n": each.n,
            "open": each.num_open,
            "median_s": each.median_s,
            "max_s": each.maximum_s,
            "stall_max_s": max(entry.stall_s for entry in record.ledger if entry.kind == kind),
            "detection_max_s": max(entry.detection_s or 0.0 for entry in record.ledger if entry.kind == kind),
            "steps_replayed": sum(entry.steps_replayed for entry in record.ledger if entry.kind == kind),
        }
        for kind, each in summed_up(record.ledger).items()
    }


def problems(record: Record) -> list[str]:
    """Everything that should not have happened, as sentences; the same thing once."""
    found = list(record.problems)
    for strike in record.strikes:
        name = f"fault {strike.number} ({strike.kind} {strike.subject})"
        if strike.problem:
            found.append(f"{name}: {strike.problem}")
        if strike.recovered_s is None and not record.interrupted:
            found.append(f"{name}: the cluster was never whole again")
    found += [f"a stream failed in the {r.phase} phase: {r.error}" for r in record.requests if r.error]
    if wrong := tokens_wrong(record):
        found.append(f"{wrong} tokens differ from the undisturbed cluster's")
    difference = loss_rel_diff_max(record)
    if losses_must_be_equal(record) and difference is not None and difference > LOSS_LIMIT:
        found.append(f"losses differ from the undisturbed run's by {difference:.2e} relative")
    if sorted(losses(record)) != list(range(1, len(losses(record)) + 1)):
        found.append("steps were skipped")
    if beyond := staleness(record)["steps_beyond"]:
        most, bound = staleness(record)["max"], record.staleness
        found.append(f"{beyond} steps were computed on experts that missed up to {most} updates, {bound} are allowed")
    missing = updates_missing(record)
    if missing is not None and missing != lost_by_ledger(record):
        found.append(f"{missing} updates are in no weights, and the ledger has {lost_by_ledger(record)} as lost")
    found += [f"a process outlived its cluster: {name}" for name in record.left_over]
    counts: dict[str, int] = defaultdict(int)
    for text in found:
        counts[text] += 1
    return [text if count == 1 else f"{text} ({count} times)" for text, count in counts.items()]
