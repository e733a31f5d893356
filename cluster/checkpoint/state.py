"""Snapshots of actors as shards of a checkpoint, and back: whoever wrote it, any number of actors can load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Literal, cast

from torch import Tensor

from actors.errors import CheckpointError
from actors.optim import OptimizerSettings
from actors.snapshots import ExpertKey, Key, SavedState, Snapshot
from cluster.checkpoint.manifest import Shard
from cluster.checkpoint.names import Kind, expert_entry, parse_expert_entry
from cluster.checkpoint.reader import Reader
from cluster.checkpoint.store import Draft, Found, open_shards, write_shard

Role = Literal["experts", "router"]
ShardContent = tuple[Mapping[str, Tensor], Mapping[str, str]]
"""Tensors by name, and what is said of them."""


def write_experts(draft: Draft, name: str, snapshot: Snapshot[ExpertKey] | None) -> Shard:
    """`CheckpointError` if this is not the snapshot of the draft, else as `write_shard`."""
    return write_shard(draft, name, *experts_shard(_of_version(draft, name, snapshot)))


def write_router(draft: Draft, name: str, snapshot: Snapshot[str] | None) -> Shard:
    return write_shard(draft, name, *router_shard(_of_version(draft, name, snapshot)))


def experts_shard(snapshot: Snapshot[ExpertKey]) -> ShardContent:
    return {_entry(key): tensor for key, tensor in snapshot.tensors.items()}, _facts("experts", snapshot)


def router_shard(snapshot: Snapshot[str]) -> ShardContent:
    return snapshot.tensors, _facts("router", snapshot)


def read_experts(found: Found, reader: Reader | None = None) -> SavedState[ExpertKey]:
    """`CheckpointError` if a shard is damaged, or the shards are not of one version.

    `reader`: of its shards, where they are not in storage.
    """
    reader = reader or open_shards(found)
    keys = {key: name for name in reader.names() if (key := _key(name)) is not None}

    def read(wanted: Sequence[ExpertKey]) -> list[Tensor]:
        return list(reader.read([keys.get(key) or _entry(key) for key in wanted]).values())

    facts = _common_facts(reader, found, "experts")
    return SavedState(found.manifest.version, int(facts["updates"]), _optimizer(facts), frozenset(keys), read)


def read_router(found: Found, reader: Reader | None = None) -> SavedState[str]:
    """As `read_experts`."""
    reader = reader or open_shards(found)
    names = frozenset(name for name in reader.names() if parse_expert_entry(name) is None)
    facts = _common_facts(reader, found, "router")
    return SavedState(
        found.manifest.version,
        int(facts["updates"]),
        _optimizer(facts),
        names,
        lambda wanted: list(reader.read(wanted).values()),
    )


def _entry(key: ExpertKey) -> str:
    return expert_entry(key.layer, key.expert, key.name, cast(Kind, key.kind))


def _key(name: str) -> ExpertKey | None:
    entry = parse_expert_entry(name)
    return None if entry is None else ExpertKey(entry.layer, entry.expert, entry.name, entry.kind)


def _of_version(draft: Draft, name: str, snapshot: Snapshot[Key] | None) -> Snapshot[Key]:
    if snapshot is None or snapshot.version != draft.version:
        have = "none" if snapshot is None else f"version {snapshot.version}"
        raise CheckpointError(f"{name} has no snapshot of version {draft.version}, but {have}", field=draft.url)
    return snapshot


def _facts(role: Role, snapshot: Snapshot[ExpertKey] | Snapshot[str]) -> dict[str, str]:
    return {
        "role": role,
        "version": str(snapshot.version),
        "run": str(snapshot.run),
        "updates": str(snapshot.updates),
        "optimizer": json.dumps(snapshot.optimizer.to_dict(), sort_keys=True),
    }


def _common_facts(reader: Reader, found: Found, role: Role) -> Mapping[str, str]:
    """What the writers of a role say, all the same."""
    told = [facts for facts in reader.metadata().values() if facts.get("role") == role]
    if not told or any(facts != told[0] for facts in told) or told[0].get("version") != str(found.manifest.version):
        raise CheckpointError(f"its {role} shards are not of one version", field=found.url, value=told)
    return told[0]


def _optimizer(facts: Mapping[str, str]) -> OptimizerSettings:
    return OptimizerSettings(**json.loads(facts["optimizer"]))
