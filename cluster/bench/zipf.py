"""A model whose gates give its experts a Zipf load on the text of a job: expert e gets a share ~ 1 / (e + 1).

The gates' balance biases are fitted to the job's own first batches, layer by layer, as the experts of a layer change
what the next one's gate sees. Hot experts come first, so that the first expert actor holds the hottest of them.

    T tokens   E experts   K choices of a token
"""

from __future__ import annotations

import itertools
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

from actors.moe.balance import expert_load
from cluster.bench.balance import TASKS
from cluster.config import JobConfig
from cluster.jobs.batches import MicroBatch, StepBatches
from cluster.jobs.tokenizer import ByteTokenizer

Floats = npt.NDArray[np.float64]

FIT_TOKENS = 16_384
FIT_ROUNDS = 240
FIRST_SPEED, LAST_SPEED = 0.1, 1e-4
"""Of a bias, a round; scores are 0 to 1."""


def zipf_share(num_experts: int, exponent: float = 1.0) -> Floats:
    """[E], the first expert's is the largest; sums to 1."""
    weights = np.arange(1, num_experts + 1) ** -exponent
    return np.asarray(weights / weights.sum())


def distance(load_E: npt.ArrayLike, share_E: Floats) -> float:
    """Part of the load, 0 to 1, that is on other experts than `share_E` has it on (total variation)."""
    load = np.asarray(load_E, dtype=np.float64)
    return float(np.abs(load / load.sum() - share_E).sum() / 2)


def fit_bias(score_TE: Tensor, share_E: Floats, top_k: int) -> Tensor:
    """[E]: added to the scores, expert e is among the `top_k` best of a token for `share_E[e]` of all pairs.

    The loss-free balance rule with another aim than the even load, and a speed that falls. No share can be above
    1 / top_k, since a token takes an expert once.
    """
    wanted_E = torch.from_numpy(share_E * len(score_TE) * top_k)
    bias_E = torch.zeros(len(share_E), dtype=score_TE.dtype)
    for speed in np.geomspace(FIRST_SPEED, LAST_SPEED, FIT_ROUNDS).tolist():
        load_E = expert_load((score_TE + bias_E).topk(top_k, sorted=False).indices, len(share_E))
        bias_E += speed * torch.sign(wanted_E - load_E).to(bias_E.dtype)
    return bias_E


@torch.no_grad()
def save_zipf_model(directory: Path, values: Mapping[str, Any], job: JobConfig, exponent: float = 1.0) -> None:
    """A Hugging Face directory. `values`: of a config with DeepSeek-V3's gate, without a group limit."""
    torch.manual_seed(0)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Initializing zero-element tensors")  # a model without shared experts
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).eval()
    batches = _first_batches(job)
    for layer in model.model.layers:
        gate = layer.mlp.gate
        score_TE = _scores(model, gate, batches)
        share_E = zipf_share(score_TE.shape[1], exponent)
        gate.e_score_correction_bias.copy_(fit_bias(score_TE, share_E, int(values["num_experts_per_tok"])))
    model.save_pretrained(directory)


def _first_batches(job: JobConfig) -> list[MicroBatch]:
    """Of a job on text, as the cluster will read, pack and shuffle it."""
    documents = TASKS["text"](job.data)
    seed = job.data.seed if job.data.shuffle else None
    steps = StepBatches(documents.train(), job.batch, ByteTokenizer.eos_id, shuffle_seed=seed)
    microbatches = itertools.chain.from_iterable(steps)
    return list(itertools.islice(microbatches, -(-FIT_TOKENS // (job.batch.sequences * job.batch.sequence_length))))


class _Seen(Exception):
    """Ends a forward: what comes after the gate is not needed."""


def _scores(model: nn.Module, gate: nn.Module, batches: Sequence[MicroBatch]) -> Tensor:
    """[T, E] of one gate over all tokens, without its bias."""
    seen: list[Tensor] = []

    def look(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.append(inputs[0].flatten(0, -2))
        raise _Seen

    handle = gate.register_forward_pre_hook(look)
    for ids_BS in batches:
        with suppress(_Seen):
            model(input_ids=torch.from_numpy(ids_BS), use_cache=False)
    handle.remove()
    weight: Any = gate.weight
    return torch.sigmoid(torch.cat(seen).float() @ weight.float().T)
