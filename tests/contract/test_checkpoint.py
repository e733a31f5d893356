"""Model directories that cannot be used are named before anything is built from them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from actors.errors import CheckpointError, InvalidInput
from actors.expert.host import ExpertHost
from actors.trunk.checkpoint import CheckpointReader
from actors.trunk.model import ModelSource, skeleton
from tests.families import build, save


def host(directory: Path, groups: tuple[int, ...] = (1, 2)) -> ExpertHost:
    return ExpertHost("host", ModelSource(path=str(directory)), groups, group_size=2)


def drop_tensor(part: str) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        file = directory / "model.safetensors"
        tensors = {name: t for name, t in load_file(file).items() if part not in name}
        save_file(tensors, file, metadata={"format": "pt"})

    return damage


def set_config(**changes: object) -> Callable[[Path], None]:
    def damage(directory: Path) -> None:
        file = directory / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))

    return damage


def lose_a_shard(directory: Path) -> None:
    build("deepseek_v3").save_pretrained(directory, max_shard_size="50KB")
    (directory / "model.safetensors").unlink()
    sorted(directory.glob("model-*.safetensors"))[1].unlink()


def only_pickle(directory: Path) -> None:
    (directory / "model.safetensors").unlink()
    torch.save({}, directory / "pytorch_model.bin")


DAMAGE: dict[str, tuple[Callable[[Path], None], str]] = {
    "no config": (lambda d: (d / "config.json").unlink(), "config.json is missing"),
    "an expert tensor missing": (drop_tensor("experts.3.up_proj"), "experts.3.up_proj"),
    "a layer's experts missing": (drop_tensor("layers.2.mlp.experts"), "layers.2.mlp.experts"),
    "a trunk tensor missing": (drop_tensor("layers.1.self_attn.o_proj"), "o_proj"),
    "a shard missing": (lose_a_shard, "model-00002"),
    "pickled weights": (only_pickle, "safetensors"),
    "quantised": (set_config(quantization_config={"quant_method": "fp8"}), "quantised"),
    "unknown architecture": (set_config(model_type="never_heard_of"), "never_heard_of"),
}


@pytest.mark.parametrize("what", DAMAGE)
def test_a_damaged_directory_is_named(tmp_path: Path, what: str) -> None:
    directory = save("deepseek_v3", tmp_path / "model")
    damage, text = DAMAGE[what]
    damage(directory)
    with pytest.raises(CheckpointError, match=text):
        host(directory)


def test_a_directory_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere"):
        host(tmp_path / "nowhere")


def test_a_model_without_experts_is_refused() -> None:
    dense = {
        "model_type": "llama",
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 1,
        "vocab_size": 64,
    }
    with pytest.raises(CheckpointError, match="no mixture-of-experts layer"):
        skeleton(ModelSource(values={**dense, "num_attention_heads": 2, "num_key_value_heads": 2}))


def test_groups_beyond_the_model_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match="last group is 3"):
        host(save("deepseek_v3", tmp_path / "model"), groups=(4,))


@pytest.mark.parametrize("family", ["deepseek_v3", "gpt_oss"])
def test_any_experts_in_any_order_are_those_of_the_whole_model(tmp_path: Path, family: str) -> None:
    model = build(family)
    model.save_pretrained(tmp_path)
    found = skeleton(ModelSource(path=str(tmp_path)))
    reader = CheckpointReader(tmp_path, found)
    wanted = [6, 0, 1, 5]
    for layer in found.layers:
        tensors = reader.expert_tensors(layer.name, wanted)
        assert set(tensors) == set(layer.shapes())
        for name, tensor in tensors.items():
            whole = model.get_parameter(f"{layer.name}.{name}")
            assert torch.equal(tensor, whole.detach()[wanted]), name
