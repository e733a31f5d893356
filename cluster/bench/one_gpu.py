"""`one_gpu_3b`: training tokens a second of a router and an expert host that share one GPU, against transformers with
`grouped_mm` in one process on the same GPU: the same weights, batches, losses and optimizer. `two_gpu_3b`: with the
expert host on a GPU of its own, so that gradients and updates of experts are computed beside the trunk's.

Router and host are in one process with a local link between them; rows cross from GPU to GPU as copies between peers.
Both sides' models are in memory together and are timed in turns.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from actors.expert.host import ExpertHost
from actors.optim import OptimizerSettings
from actors.reference import Reference
from actors.router.roster import Peer, Roster
from actors.router.router import Router
from actors.transport.local import LocalLink
from actors.trunk.model import ModelSource, skeleton
from actors.values import Placement
from cluster.bench.result import Row, interleaved, rate_row

MODEL = {
    "model_type": "deepseek_v3",
    "vocab_size": 32_000,
    "hidden_size": 2048,
    "intermediate_size": 10_944,
    "moe_intermediate_size": 1408,
    "num_hidden_layers": 6,
    "first_k_dense_replace": 1,
    "num_attention_heads": 16,
    "num_key_value_heads": 16,
    "q_lora_rank": None,
    "kv_lora_rank": 512,
    "qk_nope_head_dim": 128,
    "qk_rope_head_dim": 64,
    "v_head_dim": 128,
    "n_routed_experts": 64,
    "n_shared_experts": 2,
    "num_experts_per_tok": 6,
    "n_group": 1,
    "topk_group": 1,
    "max_position_embeddings": 2048,
}
"""3.1 B parameters, in the proportions of DeepSeek-V2-Lite."""
GROUP_SIZE = 16
STEPS_A_ROUND = 2
MIN_ROUNDS = 5
LR, CLIP_NORM = 1e-4, 1.0
TIMEOUT_S = 600.0
MIN_MEMORY_BYTES = 70 << 30


@dataclass(frozen=True)
class Extent:
    """What is trained, and where."""

    values: Mapping[str, Any]
    group_size: int
    sequences: int
    length: int
    device: str
    expert_device: str
    dtype: str
    in_flight: int = 1
    """Micro-batches that our side divides a batch into, and has in flight together."""


WHOLE = Extent(MODEL, GROUP_SIZE, sequences=8, length=2048, device="cuda:0", expert_device="cuda:0", dtype="bfloat16")
TWO_GPUS = replace(WHOLE, expert_device="cuda:1")


@dataclass(frozen=True)
class TrainingRow(Row):
    spread: float
    """Of the ratio: largest round less smallest."""
    num_parameters: int
    loss_difference: float
    """Of the last step's losses, as a part of the peer's."""


def one_gpu_rows(rounds: int) -> list[Row]:
    """None where no GPU has room for both sides; with another GPU, that case too. At least `MIN_ROUNDS`."""
    if not has_room():
        return []
    extents = {"one_gpu_3b": WHOLE, "two_gpu_3b": TWO_GPUS}
    found: list[Row] = []
    for case, extent in list(extents.items())[: torch.cuda.device_count()]:
        found.append(train_both(case, extent, max(rounds, MIN_ROUNDS)))
        torch.cuda.empty_cache()
    return found


def has_room() -> bool:
    """Whether there is a GPU for two models of this size that are trained."""
    return torch.cuda.is_available() and torch.cuda.get_device_properties(0).total_memory >= MIN_MEMORY_BYTES


def train_both(case: str, extent: Extent, rounds: int) -> TrainingRow:
    with side_by_side(extent) as (router, reference):
        batches = random_batches(extent, STEPS_A_ROUND)
        losses: dict[str, float] = {}

        def ours() -> None:
            for batch in batches:
                losses["ours"] = router.train_step(batch.chunk(extent.in_flight), lr=LR, clip_norm=CLIP_NORM).loss
            _wait(extent)

        def theirs() -> None:
            for batch in batches:
                losses["theirs"], _ = reference.train_step([batch], lr=LR, clip_norm=CLIP_NORM)
            _wait(extent)

        seconds = interleaved({"ours": ours, "theirs": theirs}, rounds, 2)
        num_parameters = sum(parameter.numel() for parameter in reference.model.parameters())
    peer = "transformers grouped_mm, one process"
    tokens = STEPS_A_ROUND * extent.sequences * (extent.length - 1)
    row = rate_row(case, "tokens/s", tokens, seconds["ours"], peer, seconds["theirs"])
    ratios = [b / a for a, b in zip(seconds["ours"], seconds["theirs"], strict=True)]
    difference = abs(losses["ours"] / losses["theirs"] - 1)
    return TrainingRow(
        **asdict(row), spread=max(ratios) - min(ratios), num_parameters=num_parameters, loss_difference=difference
    )


@contextmanager
def side_by_side(extent: Extent) -> Iterator[tuple[Router, Reference]]:
    """A router with an expert host of this process, and plain transformers: the same weights on the same device."""
    with tempfile.TemporaryDirectory() as directory:
        model = save_model(extent, directory)
        source = ModelSource(path=directory, dtype=extent.dtype)
        num_groups = int(skeleton(source).num_experts) // extent.group_size
        host = ExpertHost(
            "expert-0",
            source,
            range(num_groups),
            group_size=extent.group_size,
            device=extent.expert_device,
            timeout_s=TIMEOUT_S,
        )
        peer = Peer(lambda: LocalLink(host.name, host.handle, idle=host.idle))
        placement = Placement(1, ((host.name,),) * num_groups, extent.group_size)
        router = Router(
            source,
            Roster(placement, {host.name: peer}),
            device=extent.device,
            timeout_s=TIMEOUT_S,
            in_flight=extent.in_flight,
        )
    try:
        router.begin_run(OptimizerSettings(lr=LR))
        reference = Reference.of(model)
        reference.begin_run(OptimizerSettings(lr=LR))
        yield router, reference
    finally:
        router.close()
        host.close()


def save_model(extent: Extent, directory: str) -> PreTrainedModel:
    """With random weights. -> the model, on its device."""
    torch.manual_seed(0)
    with torch.device(extent.device):  # drawn there: on a CPU that would take minutes
        config = AutoConfig.for_model(**extent.values)
        model = AutoModelForCausalLM.from_config(
            config, dtype=getattr(torch, extent.dtype), experts_implementation="grouped_mm"
        )
    model.save_pretrained(directory, save_original_format=False)
    return model


def random_batches(extent: Extent, number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    size = (number, extent.sequences, extent.length)
    return list(torch.randint(0, int(extent.values["vocab_size"]), size, generator=generator).to(extent.device))


def _wait(extent: Extent) -> None:
    for device in {extent.device, extent.expert_device} - {"cpu"}:
        torch.cuda.synchronize(device)
