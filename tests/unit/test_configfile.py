"""Config files: what is shipped loads, and every fault names file, path, value and remedy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from cluster.config import JobConfig, ModelConfig
from cluster.configfile import SHIPPED, find_config, job_from_dict, load_cluster, load_job, load_model, to_dict
from cluster.errors import ConfigError

MODEL = "model: {values: {model_type: deepseek_v3}}\n"


def write(folder: Path, text: str, name: str = "file.yaml") -> Path:
    file = folder / name
    file.write_text(text, encoding="utf-8")
    return file


# --- What is shipped -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_cluster_config_loads(file: Path) -> None:
    config = load_cluster(file)
    assert config == load_cluster(file.stem)
    experts = config.model.values.get("n_routed_experts")
    assert experts is None or experts // config.experts.group_size >= config.experts.actors


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("jobs/*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_job_loads(file: Path) -> None:
    assert load_job(file) == load_job(file.stem)


@pytest.mark.parametrize("file", sorted(SHIPPED.glob("models/*.yaml")), ids=lambda file: file.stem)
def test_every_shipped_model_is_a_transformers_config(file: Path) -> None:
    from transformers import AutoConfig

    model = load_model(file)
    built = AutoConfig.for_model(**model.values)
    assert built.vocab_size >= 259, "the byte tokenizer's ids need an embedding each"
    unknown = [key for key, value in model.values.items() if getattr(built, key, None) != value]
    assert not unknown, "transformers keeps values it does not know and never uses them"


def test_shipped_configs_exist() -> None:
    assert {file.stem for file in SHIPPED.rglob("*.yaml")} >= {
        "local_cpu",
        "tiny",
        "small",
        "demo",
        "quick",
        "finetune",
    }


# --- Loading -------------------------------------------------------------------------------------------------------


def test_values_overrides_and_defaults_meet(tmp_path: Path) -> None:
    file = write(
        tmp_path, MODEL + "experts: {actors: 3}\nstorage: {import_roots: [/a, /b]}\nray: {start_timeout_s: 90}"
    )
    config = load_cluster(file, {"experts.group_size": 4, "model.seed": 7, "model.values.hidden_size": 64})
    assert (config.experts.actors, config.experts.group_size, config.experts.device) == (3, 4, "cpu")
    assert config.storage.import_roots == ("/a", "/b")
    assert config.ray.start_timeout_s == 90.0
    assert isinstance(config.ray.start_timeout_s, float)
    assert config.model.seed == 7
    assert config.model.values == {"model_type": "deepseek_v3", "hidden_size": 64}


def test_model_entry_names_a_file_relative_to_the_config(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "sub").mkdir()
    write(tmp_path / "sub", "seed: 3\nvalues: {model_type: mixtral}", "m.yaml")
    file = write(tmp_path, "model: sub/m.yaml")
    monkeypatch.chdir("/")
    assert load_cluster(file).model == ModelConfig(values={"model_type": "mixtral"}, seed=3)


def test_model_entry_names_a_shipped_model_or_a_directory(tmp_path: Path) -> None:
    assert load_cluster(write(tmp_path, "model: tiny")).model == load_model("tiny")
    (tmp_path / "hf").mkdir()
    write(tmp_path / "hf", "{}", "config.json")
    assert load_cluster(write(tmp_path, "model: hf")).model == ModelConfig(path=str(tmp_path / "hf"))
    assert load_cluster(write(tmp_path, "model: {path: hf, seed: 1}")).model.path == str(tmp_path / "hf")


def test_paths_in_overrides_start_at_the_working_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "elsewhere").mkdir()
    write(tmp_path / "elsewhere", "values: {model_type: mixtral}", "m.yaml")
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert load_cluster(write(tmp_path, MODEL), {"model": "m.yaml"}).model.values == {"model_type": "mixtral"}


def test_job_data_path_starts_at_the_file(tmp_path: Path) -> None:
    file = write(tmp_path, "data: {source: 'path:corpus/*.txt'}")
    assert load_job(file).data.source == f"path:{tmp_path}/corpus/*.txt"
    assert load_job(file, {"data.source": "path:corpus"}).data.source == "path:corpus"


def test_a_job_chooses_how_experts_are_updated(tmp_path: Path) -> None:
    text = "optimizer: {experts: muon, momentum: 0.9, sparse: skip, delay_correction: 2}"
    optimizer = load_job(write(tmp_path, text)).optimizer
    assert (optimizer.experts, optimizer.momentum, optimizer.sparse) == ("muon", 0.9, "skip")
    assert optimizer.delay_correction == 2
    assert load_job(write(tmp_path, "optimizer: {sparse: none}")).optimizer.sparse == "none"


def test_numbers_without_a_dot_are_numbers(tmp_path: Path) -> None:
    assert load_job(write(tmp_path, "optimizer: {lr: 3e-3, weight_decay: 0}")).optimizer.lr == 0.003


@pytest.mark.parametrize("quote", ["", "'"])
def test_on_and_off_may_stand_without_quotes(tmp_path: Path, quote: str) -> None:
    """YAML 1.1 reads them as true and false."""
    text = f"links: {{secure: {quote}on{quote}}}\nfront: {{reflection: {quote}off{quote}}}"
    config = load_cluster(write(tmp_path, MODEL + text), {"checkpoint.every_steps": 1})
    assert (config.links.secure, config.front.reflection) == ("on", "off")
    assert load_cluster(write(tmp_path, yaml.safe_dump(to_dict(config)))) == config


def test_an_existing_cluster_may_have_any_number_of_nodes(tmp_path: Path) -> None:
    file = write(tmp_path, MODEL + "ray: {mode: existing, address: auto}\nexperts: {actors: 4, redundancy: 3}")
    assert load_cluster(file).experts.redundancy == 3


def test_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_job(write(tmp_path, "# nothing\n")) == JobConfig()


@pytest.mark.parametrize("name", ["demo", "quick", "finetune"])
def test_to_dict_is_the_inverse_of_loading(name: str) -> None:
    config = load_job(name)
    assert job_from_dict(json.loads(json.dumps(to_dict(config))), "wire") == config


def test_cluster_survives_a_round_trip_through_yaml(tmp_path: Path) -> None:
    config = load_cluster("local_cpu", {"storage.import_roots": ["/models"]})
    assert load_cluster(write(tmp_path, yaml.safe_dump(to_dict(config)))) == config


def test_find_config_lists_what_is_shipped() -> None:
    assert find_config("local_cpu").name == "local_cpu.yaml"
    with pytest.raises(ConfigError, match=r"nowhere: no such config file.*local_cpu"):
        find_config("nowhere")
    with pytest.raises(ConfigError, match=r"shipped names: demo, finetune, quick"):
        load_job("dmeo")


# --- Faults --------------------------------------------------------------------------------------------------------

JOB_FAULTS = {
    "unknown key": ("optimzer: {lr: 1}", "optimzer", "{'lr': 1}", "did you mean 'optimizer'?"),
    "unknown nested key": ("optimizer: {learning: 1}", "optimizer.learning", "1", "known keys of optimizer: name, lr"),
    "text for a number": ("steps: many", "steps", "'many'", "a whole number"),
    "bool for a whole number": ("steps: true", "steps", "True", "a whole number"),
    "bool for a number": ("optimizer: {lr: yes}", "optimizer.lr", "True", "a number"),
    "fraction for a whole number": ("steps: 1.5", "steps", "1.5", "a whole number"),
    "number for a text": ("data: {text_field: 3}", "data.text_field", "3", "a text"),
    "text for a bool": ("data: {shuffle: 'no'}", "data.shuffle", "'no'", "true or false"),
    "null": ("steps: null", "steps", "null", "a whole number"),
    "infinite": ("optimizer: {lr: .inf}", "optimizer.lr", "inf", "a finite number"),
    "number for a section": ("batch: 8", "batch", "8", "a mapping"),
    "not a choice": ("schedule: {kind: cosin}", "schedule.kind", "'cosin'", "did you mean 'cosine'?"),
    "no steps": ("steps: 0", "steps", "0", "from 1"),
    "no sequences": ("batch: {sequences: 0}", "batch.sequences", "0", "1 or more"),
    "nothing to predict": ("batch: {sequence_length: 1}", "batch.sequence_length", "1", "2 or more"),
    "no accumulation": ("batch: {gradient_accumulation: 0}", "batch.gradient_accumulation", "0", "1 or more"),
    "lr": ("optimizer: {lr: 0}", "optimizer.lr", "0.0", "above 0"),
    "beta1": ("optimizer: {beta1: 1.0}", "optimizer.beta1", "1.0", "less than 1"),
    "beta2": ("optimizer: {beta2: -0.1}", "optimizer.beta2", "-0.1", "at least 0"),
    "eps": ("optimizer: {eps: 0}", "optimizer.eps", "0.0", "above 0"),
    "clip_norm": ("optimizer: {clip_norm: -1}", "optimizer.clip_norm", "-1.0", "0 or more"),
    "weight_decay": ("optimizer: {weight_decay: -1}", "optimizer.weight_decay", "-1.0", "0 or more"),
    "expert optimizer": ("optimizer: {experts: sgd}", "optimizer.experts", "'sgd'", "muon"),
    "momentum": ("optimizer: {momentum: 1}", "optimizer.momentum", "1.0", "less than 1"),
    "delay correction": ("optimizer: {delay_correction: -1}", "optimizer.delay_correction", "-1.0", "0 or more"),
    "sparse": ("optimizer: {sparse: off}", "optimizer.sparse", "False", "exact"),
    "steps put off under Muon": ("optimizer: {experts: muon, sparse: exact}", "optimizer.sparse", "'exact'", "skip"),
    "steps put off beside forwards": (
        "optimizer: {sparse: exact, staleness: 1}",
        "optimizer.sparse",
        "'exact'",
        "staleness 0",
    ),
    "warm-up": ("steps: 10\nschedule: {warmup_steps: 11}", "schedule.warmup_steps", "11", "fewer steps"),
    "min_lr_ratio": ("schedule: {min_lr_ratio: 2}", "schedule.min_lr_ratio", "2.0", "from 0 to 1"),
    "source": ("data: {source: corpus}", "data.source", "'corpus'", "path:"),
    "stdlib is text": ("data: {format: jsonl}", "data.format", "'jsonl'", "leave the format out"),
    "all held out": ("data: {heldout_every: 1}", "data.heldout_every", "1", "2nd"),
    "evaluation of nothing": ("data: {heldout_every: 0}", "data.heldout_every", "0", "eval.every_steps to 0"),
    "evaluation batches": ("eval: {batches: 0}", "eval.batches", "0", "1 or more"),
    "seed": ("data: {seed: -1}", "data.seed", "-1", "0 or more"),
}

CLUSTER_FAULTS = {
    "a batch of streams without any": (
        MODEL + "router: {decode_batch: -1}",
        "router.decode_batch",
        "-1",
        "use a number from 0 to 1024",
    ),
    "chunks of a prompt": (MODEL + "router: {prompt_chunk: -1}", "router.prompt_chunk", "-1", "0 or more"),
    "graphs without a GPU": (MODEL + "router: {captured: on}", "router.captured", "on", "leave it at auto"),
    "no model": ("ray: {}", "model", "missing", "name a model file"),
    "unknown model": ("model: tinny", "model", "'tinny'", "shipped names: exact, small, tiny"),
    "model of a wrong type": ("model: [1]", "model", "[1]", "a name or a mapping"),
    "neither path nor values": ("model: {seed: 1}", "model", "either `path` or `values`", "give the path"),
    "no model type": ("model: {values: {hidden_size: 1}}", "model.values.model_type", "missing", "deepseek_v3"),
    "no model directory": ("model: {path: nowhere}", "model.path", "nowhere'", "save_pretrained"),
    "embedded with address": (MODEL + "ray: {address: auto}", "ray.address", "'auto'", "ray.mode to existing"),
    "existing without": (MODEL + "ray: {mode: existing}", "ray.address", "is needed", "ray.mode to embedded"),
    "no nodes": (MODEL + "ray: {nodes: 0}", "ray.nodes", "0", "1 or more"),
    "more zones than nodes": (MODEL + "ray: {nodes: 2, zones: 3}", "ray.zones", "3", "from 0 to 2"),
    "no actors": (MODEL + "experts: {actors: 0}", "experts.actors", "0", "1 or more"),
    "empty groups": (MODEL + "experts: {group_size: 0}", "experts.group_size", "0", "1 or more"),
    "no copy at all": (MODEL + "experts: {redundancy: 0}", "experts.redundancy", "0", "1 or more"),
    "more copies than actors": (
        MODEL + "ray: {nodes: 3}\nexperts: {actors: 2, redundancy: 3}",
        "experts.redundancy",
        "3",
        "at most 2, or set experts.actors to 3 or more",
    ),
    "more copies than nodes": (
        MODEL + "experts: {actors: 4, redundancy: 3}",
        "experts.redundancy",
        "ray.nodes is 2",
        "at most 2, or set ray.nodes to 3 or more",
    ),
    "snapshots more often than never": (
        MODEL + "experts: {snapshot_every_steps: -1}",
        "experts.snapshot_every_steps",
        "-1",
        "0 or more",
    ),
    "room below none": (MODEL + "experts: {max_groups: -1}", "experts.max_groups", "-1", "0 or more"),
    "no pair at a time": (MODEL + "experts: {max_pairs: -1}", "experts.max_pairs", "-1", "0 or more"),
    "no turn for requests": (MODEL + "experts: {serving_weight: 0}", "experts.serving_weight", "0", "1 or more"),
    "a cache below none": (
        MODEL + "experts: {expert_cache_size: -1}",
        "experts.expert_cache_size",
        "-1",
        "0 or more",
    ),
    "files of no cache": (
        MODEL + "experts: {cache_dir: /tmp/x}",
        "experts.cache_dir",
        "'/tmp/x'",
        "set experts.expert_cache_size",
    ),
    "port": (MODEL + "front: {port: 65536}", "front.port", "65536", "from 0 to 65535"),
    "certificate without key": (MODEL + "front: {tls: {certificate: a}}", "front.tls.key", "missing", "PEM file"),
    "key without certificate": (MODEL + "front: {tls: {key: a}}", "front.tls.certificate", "missing", "PEM file"),
    "clients without TLS": (
        MODEL + "front: {tls: {client_ca: a}}",
        "front.tls.certificate",
        "missing",
        "client_ca out",
    ),
    "health port": (MODEL + "front: {health_port: 50151}", "front.health_port", "50151", "use another"),
    "reflection": (MODEL + "front: {reflection: maybe}", "front.reflection", "'maybe'", "one of auto, on, off"),
    "secure links": (MODEL + "links: {secure: 1}", "links.secure", "1", "one of auto, on, off"),
    "unknown payload": (MODEL + "links: {payload: pigeon}", "links.payload", "pigeon", "one of auto, socket, shm"),
    "payload between GPUs on a CPU": (
        MODEL + "links: {payload: cuda_ipc}",
        "links.payload",
        "cuda_ipc",
        "router.device",
    ),
    "payload to experts on a CPU": (
        MODEL + "links: {payload: nccl}\nrouter: {device: cuda}",
        "links.payload",
        "nccl",
        "set experts.device to cuda",
    ),
    "relay": (MODEL + "links: {relay: maybe}", "links.relay", "'maybe'", "one of auto, on, off"),
    "relay between GPUs": (
        MODEL + "links: {payload: nccl, relay: on}\nrouter: {device: cuda}\nexperts: {device: cuda}",
        "links.relay",
        "nccl",
        "set links.payload to auto",
    ),
    "bool for a kind": (MODEL + "links: {kind: on}", "links.kind", "True", "one of auto, local, socket"),
    "more routers than there may be": (
        MODEL + "router: {actors: 5}",
        "router.max_actors",
        "4",
        "use 5 or more",
    ),
    "in_flight": (MODEL + "router: {in_flight: 9}", "router.in_flight", "9", "from 1 to 8"),
    "timeout": (MODEL + "router: {request_timeout_s: 0}", "router.request_timeout_s", "0.0", "above 0"),
    "text for a list": (MODEL + "storage: {import_roots: /a}", "storage.import_roots", "'/a'", "a list"),
    "in a list": (MODEL + "storage: {import_roots: [1]}", "storage.import_roots[0]", "1", "a text"),
}


@pytest.mark.parametrize(("text", "path", "value", "remedy"), JOB_FAULTS.values(), ids=JOB_FAULTS.keys())
def test_job_fault_names_file_path_value_and_remedy(
    tmp_path: Path, text: str, path: str, value: str, remedy: str
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_job(file)
    assert caught.value.field == f"{file}: {path}"
    assert value in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(("text", "path", "value", "remedy"), CLUSTER_FAULTS.values(), ids=CLUSTER_FAULTS.keys())
def test_cluster_fault_names_file_path_value_and_remedy(
    tmp_path: Path, text: str, path: str, value: str, remedy: str
) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_cluster(file)
    assert caught.value.field == f"{file}: {path}"
    assert value in str(caught.value)
    assert remedy in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps: 1\nsteps: 2", "line 2, column 1: key 'steps' is given twice"),
        ("batch:\n  sequences: 1\n  sequences: 1", "line 3, column 3: key 'sequences' is given twice"),
        ("steps: [1", "line 1"),
        ("- 1\n- 2", "expected a mapping"),
        ("steps: !!python/object/apply:os.getcwd []", "could not determine a constructor"),
    ],
)
def test_what_is_not_a_config_names_the_place(tmp_path: Path, text: str, message: str) -> None:
    file = write(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_job(file)
    assert str(caught.value).startswith(f"{file}: ")
    assert message in str(caught.value)


def test_not_utf8_is_a_config_error(tmp_path: Path) -> None:
    file = tmp_path / "file.yaml"
    file.write_bytes(b"steps: \xff")
    with pytest.raises(ConfigError, match="cannot be read"):
        load_job(file)


def test_fault_in_a_model_file_names_that_file(tmp_path: Path) -> None:
    model = write(tmp_path, "values: {model_type: mixtral}\nseeed: 1", "m.yaml")
    with pytest.raises(ConfigError) as caught:
        load_cluster(write(tmp_path, "model: m.yaml"))
    assert caught.value.field == f"{model}: seeed"


@pytest.mark.parametrize(
    ("overrides", "path"),
    [({"experts.actors": "two"}, "experts.actors"), ({"experts.actor": 2}, "experts.actor"), ({"x.y": 1}, "x")],
)
def test_fault_in_an_override_says_so(overrides: dict[str, Any], path: str) -> None:
    with pytest.raises(ConfigError, match=r"\(override\)" if path != "x" else "unknown key") as caught:
        load_cluster("local_cpu", overrides)
    assert caught.value.field.endswith(f": {path}")


def test_override_inside_a_value_is_refused() -> None:
    with pytest.raises(ConfigError, match="not a mapping"):
        load_job("demo", {"steps.more": 1})


def test_wire_spec_names_its_source() -> None:
    with pytest.raises(ConfigError, match=r"^SubmitJob: batch\.sequences: is below 1 \(got 0\)"):
        job_from_dict({"batch": {"sequences": 0}}, "SubmitJob")


@pytest.mark.parametrize(
    ("gate", "field"),
    [
        ({"temperature": 0.7}, "temperature"),
        ({"kind": "topk"}, "kind"),
        ({"kind": "top_k", "temperature": 0}, "temperature"),
        ({"kind": "top_k", "num_groups": 4}, "num_groups"),
        ({"kind": "top_k", "mass": 1.5}, "mass"),
        ({"kind": "top_k", "experts": 4}, "experts"),
    ],
)
def test_a_gate_that_cannot_be_names_file_and_path(tmp_path: Path, gate: dict[str, object], field: str) -> None:
    file = tmp_path / "cluster.yaml"
    file.write_text(yaml.safe_dump({"model": {"values": {"model_type": "mixtral"}, "gate": gate}}))
    with pytest.raises(ConfigError, match=rf"cluster\.yaml: model\.gate\.{field}"):
        load_cluster(file, {})
