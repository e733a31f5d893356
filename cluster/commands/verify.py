"""`verify`: the split against plain transformers, step by step."""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from cluster.commands.options import Subparsers
from cluster.commands.output import print_json, print_table
from cluster.commands.up import Guard, add_config_options
from cluster.config import NO_CHECKPOINTS, ClusterConfig, ModelConfig
from cluster.configfile import find_config, load_cluster, load_model

if TYPE_CHECKING:
    from cluster.verify import ClusterPort


def add_parsers(subparsers: Subparsers, guarded: Guard) -> None:
    parser = subparsers.add_parser("verify", help="train the same model in one process and on a cluster, and compare")
    add_config_options(parser)
    parser.add_argument(
        "--model", metavar="DIR|CONFIG", default="tiny", help="model directory or config (default: tiny)"
    )
    parser.add_argument("--steps", type=int, default=20, help="training steps (default: %(default)s)")
    parser.add_argument("--dtype", choices=("float64", "float32", "bfloat16"), default="float64")
    parser.add_argument("--actors", type=int, default=2, help="expert actors (default: %(default)s)")
    parser.add_argument("--group-size", type=int, default=None, help="experts a group (default: a quarter of them)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="print one JSON document")
    parser.set_defaults(run=guarded(run_verify))


def run_verify(args: argparse.Namespace) -> int:
    from cluster.verify import Settings, verify  # torch and transformers: not for every command

    base = replace(load_cluster(find_config(args.config), dict(args.overrides)), checkpoint=NO_CHECKPOINTS)
    differences = verify(
        _model(args.model),
        lambda model, dtype: _open(base, model, dtype, args),
        Settings(steps=args.steps, dtype=args.dtype, seed=args.seed),
    )
    if args.json:
        print_json(differences.to_dict())
    else:
        print_table(("difference", "largest"), [(k, f"{v:.3g}") for k, v in differences.to_dict().items()])
    return 0


def _model(name: str) -> ModelConfig:
    if Path(name).is_dir():
        return ModelConfig(path=str(Path(name).resolve()))
    return load_model(find_config(name, "models"))


@contextmanager
def _open(base: ClusterConfig, model: ModelConfig, dtype: str, args: argparse.Namespace) -> Iterator[ClusterPort]:
    from actors.trunk.model import skeleton
    from cluster.fabric.launch import launched
    from cluster.fabric.source import model_source

    config = replace(base, model=model, router=replace(base.router, dtype=dtype))  # type: ignore[arg-type]
    group_size = args.group_size or max(1, skeleton(model_source(config)).num_experts // 4)
    config = replace(config, experts=replace(config.experts, actors=args.actors, group_size=group_size))
    with launched(config) as running:
        yield running.router
