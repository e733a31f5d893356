"""`quarter_of_experts`: peak memory of loading a host that owns a quarter of the experts, against the whole model.

Each load runs in a process of its own; what Python and its libraries take before the load is subtracted.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoConfig, AutoModelForCausalLM

from cluster.bench.result import Report, Row

SHAPE = {
    "vocab_size": 512,
    "hidden_size": 512,
    "intermediate_size": 1024,
    "num_hidden_layers": 4,
    "num_attention_heads": 8,
    "num_key_value_heads": 8,
    "num_local_experts": 32,
    "num_experts_per_tok": 2,
}
"""A Mixtral of 820 MB in float32, nearly all of it experts."""
TIMEOUT_S = 120.0

_MEASURE = """
import sys
import actors.expert.host, actors.trunk.checkpoint, transformers
from transformers import AutoModelForCausalLM
from actors.trunk.model import ModelSource
def peak():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))
def now():
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmRSS"))
what, path = sys.argv[1:]
AutoModelForCausalLM.from_config  # lazy import, not part of the load
import transformers.models.mixtral.modeling_mixtral
with open("/proc/self/clear_refs", "w") as file:
    file.write("5")  # the peak starts anew here
before = now()
if what == "whole":
    kept = AutoModelForCausalLM.from_pretrained(path)
else:
    kept = actors.expert.host.ExpertHost("host", ModelSource(path=path), [0, 1], group_size=4)
print(peak() - before)
"""


def bench_memory(*, rounds: int) -> Report:
    with tempfile.TemporaryDirectory() as directory:
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model("mixtral", **SHAPE))
        size = sum(p.numel() * p.element_size() for p in model.parameters())
        model.save_pretrained(directory)
        del model
        quarter = [_peak_bytes("quarter", directory) for _ in range(rounds)]
        whole = [_peak_bytes("whole", directory) for _ in range(rounds)]
    ours, theirs = max(quarter) / 1e6, min(whole) / 1e6
    peer = f"from_pretrained of the {size / 1e6:.0f} MB model"
    return Report("memory", [Row("quarter_of_experts", ours, "MB", peer, theirs, theirs / ours, rounds)])


def _peak_bytes(what: str, directory: str) -> int:
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, what, directory],
        capture_output=True, text=True, timeout=TIMEOUT_S, check=True, cwd=root,
    )  # fmt: skip
    return int(done.stdout.strip().splitlines()[-1])
