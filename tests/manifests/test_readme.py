"""What k8s/README.md tells its reader to type, and the names that it names."""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import yaml

from cluster.cli import parser
from protos.moecluster.v1 import inference_pb2
from tests.integration.requests import retry_policy
from tests.manifests.kustomize import COMPONENTS, K8S, OVERLAYS, find_kubectl, front, overlay, parse, pods, render
from tests.manifests.pod_rules import POD_RULES, SECRETS

TEXT = (K8S / "README.md").read_text()
COMMANDS = re.findall(r"^ *(moe-cluster .*)$", TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_commands_are_ours(command: str) -> None:
    parser().parse_args(shlex.split(command)[1:])


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 5


def subcommands() -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in parser()._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


@pytest.mark.parametrize("text", sorted({*re.findall(r"`(moe-cluster [^`]+)`", TEXT), *COMMANDS}))
def test_commands_in_sentences_are_there_with_their_options(text: str) -> None:
    """Not always whole: what they are given may be left to the reader."""
    _, name, *words = text.split()
    assert name in subcommands()
    options = subcommands()[name]._option_string_actions
    assert {word.partition("=")[0] for word in words if word.startswith("--")} <= options.keys()


def test_options_in_sentences_are_there() -> None:
    known = {option for command in subcommands().values() for option in command._option_string_actions}
    named = {text.split("=")[0] for text in re.findall(r"`(--[\w-]+)[^`]*`", TEXT)}
    assert named
    assert named - {"--build-arg"} <= known, "docker's, and ours"


def runbook() -> dict[str, str]:
    """Of each alert its part."""
    text = TEXT[TEXT.index("## When an alert fires") : TEXT.index("## Maintenance")]
    parts = re.split(r"^\*\*", text, flags=re.MULTILINE)[1:]
    return {name: part for part in parts for name in re.findall(r"\A[^*]*\*\*,\s`(MoeCluster\w+)`", part)}


def rules() -> dict[str, str]:
    groups = yaml.safe_load((K8S / "monitoring" / "alerts.yaml").read_text())["spec"]["groups"]
    return {rule["alert"]: rule["expr"] for group in groups for rule in group["rules"]}


def test_every_alert_has_its_part_in_the_runbook_and_no_other_is_named() -> None:
    assert runbook().keys() == rules().keys()
    assert set(re.findall(r"MoeCluster\w+", TEXT)) == rules().keys()
    for name, part in runbook().items():
        assert re.search(r"```bash\nmoe-cluster ", part), f"{name}: nothing to type"


def test_limits_are_those_of_the_rules() -> None:
    for name, limit, words in (
        ("MoeClusterUnevenExperts", 0.15, "above 0.15"),
        ("MoeClusterLossFluctuates", 0.3, "more than 0.3"),
        ("MoeClusterSlow", 0.5, "above 500 ms"),
    ):
        assert set(re.findall(r"> ([\d.]+)", rules()[name])) == {str(limit)}
        assert words in runbook()[name]


@pytest.mark.skipif(find_kubectl() is None, reason="kubectl is not installed, which renders the overlays")
def test_objects_containers_and_labels_that_it_names_are_there() -> None:
    manifests = overlay("gpu")
    names = {f"{item['kind'].lower()}/{item['metadata']['name']}" for item in manifests}
    named = set(re.findall(r"\b(?:deployment|service)/[a-z-]+", TEXT))
    assert named
    assert named <= names
    containers = {container["name"] for pod in pods(manifests) for container in pod.containers}
    assert set(re.findall(r" -c ([a-z-]+)", TEXT)) <= containers | {"autoscaler"}, "KubeRay's, beside the head"
    for key, value in re.findall(r" -l\s+([\w./-]+)=([\w-]+)", TEXT):
        assert any(pod.labels.get(key) == value for pod in pods(manifests)), f"{key}={value}"


def test_the_policy_for_calls_that_are_tried_again_is_what_grpc_takes() -> None:
    policy = json.loads(retry_policy())["methodConfig"][0]
    services = [f"{s.full_name}" for s in inference_pb2.DESCRIPTOR.services_by_name.values()]
    assert [name["service"] for name in policy["name"]] == services
    assert policy["retryPolicy"]["retryableStatusCodes"] == ["UNAVAILABLE", "CANCELLED"]
    assert 2 <= policy["retryPolicy"]["maxAttempts"] <= 5, "gRPC makes no more than five"


def test_overlays_components_and_secrets_are_told_of() -> None:
    for name in (*(f"overlays/{n}" for n in OVERLAYS), *(f"components/{n}" for n in COMPONENTS)):
        assert f"`{name}`" in TEXT
    for name in SECRETS:
        assert f"`{name}`" in TEXT


def test_files_and_folders_that_it_names_are_there() -> None:
    named = set(re.findall(r"k8s/([\w./-]+)", TEXT)) | set(
        re.findall(r"`((?:hooks|base|overlays|components)/[^`]*)`", TEXT)
    )
    assert len(named) > 5
    for name in named:
        assert (K8S / name).exists(), name


@pytest.mark.skipif(find_kubectl() is None, reason="kubectl is not installed, which renders the overlays")
def test_the_overlay_to_write_is_right(tmp_path: Path) -> None:
    block = re.search(r" *```yaml\n(.*?)```", TEXT, flags=re.DOTALL)
    assert block is not None
    values = yaml.safe_load(textwrap.dedent(block[1]))
    for key in ("resources", "components"):
        values[key] = [os.path.relpath(K8S / "overlays" / "mine" / path, tmp_path.resolve()) for path in values[key]]
    (tmp_path / "kustomization.yaml").write_text(yaml.safe_dump(values))
    manifests = parse(render(tmp_path))
    assert {"--set=model=/data/models/NAME", "--set=experts.group_size=16"} <= set(
        front(manifests)["spec"]["template"]["spec"]["containers"][0]["args"]
    )
    assert {c["image"] for pod in pods(manifests) for c in pod.containers} == {"YOUR/IMAGE:0.1.0-cuda"}
    assert [fault for rule in POD_RULES for fault in rule(manifests)] == []
