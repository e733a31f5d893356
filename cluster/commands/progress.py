"""How a watched job or operation looks: a live bar on a terminal, one line an event or a change elsewhere."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.markup import escape
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskProgressColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)

from cluster.backend import Job, JobEvent, Operation, OperationState
from cluster.commands.output import console

Show = Callable[[JobEvent], None]
ShowOperation = Callable[[Operation], None]


@contextmanager
def open_progress(job: Job, *, stderr: bool) -> Iterator[Show]:
    """Gives the function that shows an event. With `stderr`, stdout stays free for a document."""
    screen = console(stderr=stderr)
    if not screen.is_terminal:
        yield lambda event: screen.print(_line(job, event), markup=False, highlight=False, soft_wrap=True)
        return
    with _bar(screen) as bar:
        task = bar.add_task(f"job {job.id}", total=job.config.steps, numbers="")

        def show(event: JobEvent) -> None:
            if event.kind == "step":
                bar.update(task, completed=event.step, numbers=_numbers(event))
            else:
                bar.console.print(escape(_line(job, event)), highlight=False)

        yield show


@contextmanager
def open_operation(operation: Operation, *, stderr: bool) -> Iterator[ShowOperation]:
    """As `open_progress`, for what an operation is after each change."""
    screen = console(stderr=stderr)
    if not screen.is_terminal:
        yield lambda changed: screen.print(_operation_line(changed), markup=False, highlight=False, soft_wrap=True)
        return
    text = TextColumn("{task.description}"), TextColumn("{task.fields[message]}", markup=False)
    with Progress(text[0], BarColumn(), TaskProgressColumn(), TimeElapsedColumn(), text[1], console=screen) as bar:
        task = bar.add_task(operation.id, total=1.0, message="")
        yield lambda changed: bar.update(task, completed=changed.progress, message=_doing(changed))


def _operation_line(operation: Operation) -> str:
    return f"{operation.id}  {operation.progress:4.0%}  {_doing(operation)}".rstrip()


def _doing(operation: Operation) -> str:
    """Its state, unless it simply runs, and the message."""
    state = "" if operation.state is OperationState.RUNNING else operation.state.value
    return "  ".join(part for part in (state, operation.message) if part)


def _bar(screen: Console) -> Progress:
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("{task.fields[numbers]}")
    return Progress(*columns, TimeRemainingColumn(), console=screen)


def _line(job: Job, event: JobEvent) -> str:
    head = f"step {event.step}/{job.config.steps}"
    if event.kind == "state":
        head = f"job {job.id} is {event.state.value} at {head}"
    return "  ".join(part for part in (head, _numbers(event), event.message) if part)


def _numbers(event: JobEvent) -> str:
    """The metrics a person follows; all of them are in the event."""
    shown = [
        f"{label} {event.metrics[name]:{form}}"
        for name, label, form in (
            ("loss", "loss", ".4f"),
            ("grad_norm", "grad norm", ".3f"),
            ("lr", "lr", ".2e"),
            ("tokens_per_s", "tokens/s", ",.0f"),
            ("heldout_loss", "held-out loss", ".4f"),
        )
        if name in event.metrics
    ]
    if event.metrics.get("retries"):
        shown.append(f"retries {event.metrics['retries']:.0f}")
    return "  ".join(shown)
