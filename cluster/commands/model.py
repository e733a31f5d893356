"""`status`, `import` and `export`."""

from __future__ import annotations

import argparse

from cluster.backend import ActorStatus, ClusterStatus, ExpertCache
from cluster.commands.options import Subparsers, add_remote
from cluster.commands.output import print_json, print_line, print_table, size
from cluster.service.client import MODEL_TIMEOUT_S, Client


def add_parsers(subparsers: Subparsers) -> None:
    add_remote(subparsers, "status", run_status, help="show actors, placement, versions, load and jobs")
    load = add_remote(
        subparsers,
        "import",
        run_import,
        help="replace the weights by those of a Hugging Face model directory on the cluster's machine",
        timeout_s=MODEL_TIMEOUT_S,
    )
    load.add_argument("path", help="directory below the cluster's storage root or one of its import roots")
    save = add_remote(
        subparsers,
        "export",
        run_export,
        help="write the model as a Hugging Face directory on the cluster's machine",
        timeout_s=MODEL_TIMEOUT_S,
    )
    save.add_argument("path", help="directory to write, below the cluster's storage root")


def run_status(args: argparse.Namespace, client: Client) -> int:
    status = client.status()
    if args.json:
        print_json(status)
    else:
        _print_status(status)
    return 0


def run_import(args: argparse.Namespace, client: Client) -> int:
    status = client.import_model(args.path, timeout_s=args.timeout_s)
    if args.json:
        print_json(status)
    else:
        print_line(f"imported {args.path}: {status.num_parameters:,} parameters, version {status.version}")
    return 0


def run_export(args: argparse.Namespace, client: Client) -> int:
    directory = client.export_model(args.path, timeout_s=args.timeout_s)
    if args.json:
        print_json(directory)
    else:
        files = f"{len(directory.files)} files, {size(directory.size_bytes)}"
        print_line(f"exported version {directory.version} to {directory.path}: {files}")
    return 0


def _print_status(status: ClusterStatus) -> None:
    print_line(
        f"{'ready' if status.ready else 'not ready'}{': ' + status.message if status.message else ''}\n"
        f"model {status.model}: {status.num_parameters:,} parameters, {status.num_moe_layers} MoE layers of "
        f"{status.num_experts} experts, top-{status.top_k}, {status.shared_share:.1%} in shared experts\n"
        f"version {status.version}, placement epoch {status.placement_epoch}, groups of {status.group_size} experts, "
        f"{len(status.nodes)} nodes"
    )
    columns = ("actor", "role", "state", "node", "pid", "device", "version", "groups", "memory", "tokens", "link")
    print_table(columns, [_row(actor, status) for actor in status.actors])
    if cached := [(actor.id, actor.cache) for actor in status.actors if actor.cache is not None]:
        headers = ("expert cache", "on the device", "hits", "loaded ahead", "loaded", "waited")
        print_table(headers, [_cache_row(name, cache) for name, cache in cached])
    if any(map(sum, status.load_LE)):
        print_table(("MoE layer", "tokens", "busiest expert", "busiest over mean"), _load_rows(status.load_LE))
    if status.staleness_max:
        print_line(
            f"experts of the last step were {status.staleness_mean:.2f} updates behind, at most {status.staleness_max}"
        )
    jobs = ", ".join(f"{number} {state}" for state, number in status.jobs.items() if number)
    print_line(f"jobs: {jobs or 'none'}")


def _row(actor: ActorStatus, status: ClusterStatus) -> tuple[object, ...]:
    node = f"{actor.node} ({actor.zone})" if actor.zone else actor.node
    where = node, actor.pid, actor.device
    return (
        actor.id,
        actor.role,
        actor.state,
        *where,
        actor.version,
        _groups(actor, status),
        size(actor.memory_bytes),
        actor.tokens,
        actor.link,
    )


def _cache_row(name: str, cache: ExpertCache) -> tuple[object, ...]:
    visits = cache.hits + cache.misses
    hits = f"{cache.hits / visits:.1%} of {visits:,}" if visits else "none yet"
    return (
        name,
        size(cache.device_bytes),
        hits,
        f"{cache.loaded_ahead:,}",
        size(cache.loaded_bytes),
        f"{cache.wait_s:.1f} s",
    )


def _groups(actor: ActorStatus, status: ClusterStatus) -> str:
    """Those it owns, then those it has a copy of: `0, 1; copies 4, 6`."""
    copies = [group for group in actor.groups if actor.id in status.copies.get(group, ())]
    owned = ", ".join(str(group) for group in actor.groups if group not in copies)
    return "; ".join(part for part in (owned, f"copies {', '.join(map(str, copies))}" if copies else "") if part)


def _load_rows(load_LE: tuple[tuple[int, ...], ...]) -> list[tuple[object, ...]]:
    rows: list[tuple[object, ...]] = []
    for layer, load_E in enumerate(load_LE):
        total, most = sum(load_E), max(load_E, default=0)
        ratio = most * len(load_E) / total if total else 0.0
        rows.append((layer, f"{total:,}", load_E.index(most), f"{ratio:.2f}"))
    return rows
