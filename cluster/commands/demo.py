"""`demo`: the whole product on a bare laptop, in about two minutes."""

from __future__ import annotations

import argparse
import json
import shutil
import threading
from contextlib import closing
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from cluster.backend import ClusterStatus, Job, JobEvent, JobState, SamplingParams
from cluster.commands.options import Subparsers
from cluster.commands.output import console, print_json, print_line
from cluster.commands.progress import open_progress
from cluster.commands.up import Guard, add_config_options
from cluster.config import NO_CHECKPOINTS, OWN_FRONT, ClusterConfig
from cluster.configfile import find_config, load_cluster, load_job
from cluster.errors import FailedPrecondition
from cluster.service.client import Client

PROMPT = "def "
SAMPLE = SamplingParams(max_tokens=160, temperature=0.7, top_p=0.9, seed=1)


def add_parsers(subparsers: Subparsers, guarded: Guard) -> None:
    parser = subparsers.add_parser(
        "demo", help="train a small model on this machine, serve it meanwhile, and write a report"
    )
    add_config_options(parser)
    parser.add_argument("--quick", action="store_true", help="fewer steps, under a minute")
    parser.add_argument("--output", default="demo-report", metavar="DIR", help="where to write (default: %(default)s)")
    parser.add_argument("--json", action="store_true", help="print the summary as one JSON document")
    parser.set_defaults(run=guarded(run_demo))


@dataclass
class _Record:
    """What the demo sees go by."""

    losses: list[tuple[int, float]] = field(default_factory=list)
    heldout: list[tuple[int, float]] = field(default_factory=list)
    rates: list[float] = field(default_factory=list)
    tokens_trained: int = 0
    tokens_generated: int = 0
    samples: list[dict[str, Any]] = field(default_factory=list)

    def see(self, event: JobEvent) -> None:
        if event.kind == "step":
            self.losses.append((event.step, event.metrics["loss"]))
            self.rates.append(event.metrics["tokens_per_s"])
            self.tokens_trained += int(event.metrics["tokens"])
        elif event.kind == "eval":
            self.heldout.append((event.step, event.metrics["heldout_loss"]))


def run_demo(args: argparse.Namespace) -> int:
    from cluster.serve import served, terminated_as_interrupted  # torch and ray: not for every command

    output = Path(args.output).resolve()
    output.mkdir(parents=True, exist_ok=True)
    job = load_job(find_config("quick" if args.quick else "demo", "jobs"))
    config = _private(load_cluster(find_config(args.config), dict(args.overrides)), output)
    say = console(stderr=args.json)
    say.print("starting an embedded cluster ...")
    with terminated_as_interrupted(), served(config) as service, Client(service.target) as client:
        status = client.status()
        say.print(_describe(status, service.target), highlight=False)
        record = _Record()
        _train(client, client.submit_job(job), record, stderr=args.json)
        _sample(client, record)
        say.print("exporting the trained model ...")
        exported = client.export_model("model")
        status = client.status()
        _write(output, record, status)
    summary = _summary(record, status)
    (output / "summary.json").write_text(json.dumps(summary, indent=2) + "\n")
    if args.json:
        print_json(summary)
    else:
        print_line(f"\n{PROMPT}{record.samples[-1]['text']}\n")
        print_line(
            f"held-out loss {summary['heldout_loss_first']:.2f} -> {summary['heldout_loss_last']:.2f} nats a byte, "
            f"{summary['tokens_per_s']:,.0f} tokens/s; {summary['tokens_generated']} tokens generated meanwhile"
        )
        print_line(f"report in {output}, model in {exported.path}")
    return 0


def _private(config: ClusterConfig, output: Path) -> ClusterConfig:
    """The demo's front takes any free port, and its export lands in the report."""
    shutil.rmtree(output / "model", ignore_errors=True)
    storage = replace(config.storage, root=str(output))
    return replace(config, front=OWN_FRONT, storage=storage, checkpoint=NO_CHECKPOINTS)


def _train(client: Client, job: Job, record: _Record, *, stderr: bool) -> None:
    """Watches the job to its end; at each evaluation a stream of text is generated beside the training."""
    streams: list[threading.Thread] = []
    try:
        with open_progress(job, stderr=stderr) as show, closing(client.watch_job(job.id)) as events:
            for event in events:
                record.see(event)
                show(event)
                if event.kind == "eval" and 0 < event.step < job.config.steps:
                    streams.append(threading.Thread(target=_sample, args=(client, record), daemon=True))
                    streams[-1].start()
    finally:
        for stream in streams:
            stream.join(60)
    job = client.get_job(job.id)
    if job.state is not JobState.SUCCEEDED:
        raise FailedPrecondition(f"the job {job.state.value}: {job.error}")


def _sample(client: Client, record: _Record) -> None:
    chunks = list(client.generate(PROMPT, SAMPLE, timeout_s=60))
    record.tokens_generated += sum(len(chunk.token_ids) for chunk in chunks)
    versions = [chunk.version for chunk in chunks]
    record.samples.append(
        {"text": "".join(chunk.text for chunk in chunks), "first_version": versions[0], "last_version": versions[-1]}
    )


def _describe(status: ClusterStatus, target: str) -> str:
    experts = [actor for actor in status.actors if actor.role == "expert"]
    homes = ", ".join(f"{actor.id} on {actor.node} (groups {_span(actor.groups)})" for actor in experts)
    return (
        f"{status.model}, {status.num_parameters / 1e6:.1f} M parameters: "
        f"{status.num_experts} experts in each of {status.num_moe_layers} layers\n{homes}; gRPC at {target}"
    )


def _span(groups: tuple[int, ...]) -> str:
    return ", ".join(map(str, groups))


def _write(output: Path, record: _Record, status: ClusterStatus) -> None:
    from cluster.report import draw_load, draw_losses

    draw_losses(output / "loss.png", record.losses, record.heldout)
    draw_load(output / "expert-load.png", status.load_LE, status.group_size)
    (output / "samples.json").write_text(json.dumps(record.samples, indent=2) + "\n")


def _summary(record: _Record, status: ClusterStatus) -> dict[str, Any]:
    experts = [actor for actor in status.actors if actor.role == "expert"]
    rates = sorted(record.rates)
    return {
        "heldout_loss_first": record.heldout[0][1],
        "heldout_loss_last": record.heldout[-1][1],
        "tokens_trained": record.tokens_trained,
        "tokens_generated": record.tokens_generated,
        "tokens_per_s": rates[len(rates) // 2],
        "expert_actors": len(experts),
        "nodes": len({actor.node for actor in experts}),
    }
