"""`split_cost`: training tokens a second of a router and its expert actors, against one process. `overlap_m2`: of two
and three micro-batches in flight, against one after the other. With GPUs also `one_gpu_3b` and `two_gpu_3b`, of
`cluster.bench.one_gpu`, and `overlap_3b_m2`."""

from __future__ import annotations

import logging
import statistics
import tempfile
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from transformers import AutoModelForCausalLM

from actors.optim import OptimizerSettings
from actors.reference import Reference
from actors.trunk.config import config_of
from actors.trunk.source import ModelSource
from cluster.bench.one_gpu import one_gpu_rows
from cluster.bench.overlap import gpu_overlap_rows, overlap_rows
from cluster.bench.result import Report, interleaved, rate_row
from cluster.config import ClusterConfig, OptimizerConfig
from cluster.fabric.launch import launched

logger = logging.getLogger(__name__)

SEQUENCES, LENGTH = 8, 256
STEPS_A_ROUND = 3
PEERS = ("eager", "grouped_mm")
LR, CLIP_NORM = 1e-3, 1.0


def bench_train(config: ClusterConfig, *, rounds: int) -> Report:
    """The peer is the faster of transformers' two CPU paths, with as many threads as the machine has cores."""
    with tempfile.TemporaryDirectory() as directory:
        torch.manual_seed(0)
        model_config = config_of(ModelSource(config.model.path, config.model.values))
        AutoModelForCausalLM.from_config(model_config).save_pretrained(directory)
        on_disk = replace(config, model=replace(config.model, path=directory, values={}, tokenizer="bytes"))
        vocab_size = int(model_config.get_text_config().vocab_size)
        batches = np.random.default_rng(0).integers(0, vocab_size, (STEPS_A_ROUND, SEQUENCES, LENGTH))
        with launched(on_disk) as running:
            running.router.begin_run(OptimizerConfig(lr=LR))

            def ours() -> None:
                for batch in batches:
                    running.router.train_step([batch], lr=LR, clip_norm=CLIP_NORM)

            candidates: dict[str, Callable[[], None]] = {"ours": ours}
            for name in PEERS:
                candidates[name] = _plain(directory, name, batches)
            seconds = interleaved(candidates, rounds)
    peer = min(PEERS, key=lambda name: statistics.median(seconds[name]))
    tokens = STEPS_A_ROUND * SEQUENCES * (LENGTH - 1)
    row = rate_row("split_cost", "tokens/s", tokens, seconds["ours"], f"transformers {peer}", seconds[peer])
    if not (rows := one_gpu_rows(rounds)):
        logger.warning("no CUDA device with room for both sides: one_gpu_3b, two_gpu_3b and overlap_3b are left out")
    elif len(rows) == 1:
        logger.warning("one CUDA device: two_gpu_3b is left out")
    return Report("train", [row, *overlap_rows(config, rounds=rounds), *rows, *gpu_overlap_rows(rounds)])


def _plain(directory: str, experts: str, batches: np.ndarray) -> Callable[[], None]:
    reference = Reference(directory, experts=experts)
    reference.begin_run(OptimizerSettings(lr=LR))

    def run() -> None:
        for batch in batches:
            reference.train_step([torch.tensor(batch)], lr=LR, clip_norm=CLIP_NORM)

    return run
