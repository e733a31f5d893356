"""What k8s/README.md tells its reader to type, and the names that it names."""

from __future__ import annotations

import os
import re
import shlex
import textwrap
from pathlib import Path

import pytest
import yaml

from cluster.cli import parser
from tests.manifests.kustomize import COMPONENTS, K8S, OVERLAYS, find_kubectl, front, parse, pods, render
from tests.manifests.pod_rules import POD_RULES, SECRETS

TEXT = (K8S / "README.md").read_text()
COMMANDS = re.findall(r"^ *(moe-cluster .*)$", TEXT, flags=re.MULTILINE)


@pytest.mark.parametrize("command", sorted(set(COMMANDS)))
def test_commands_are_ours(command: str) -> None:
    parser().parse_args(shlex.split(command)[1:])


def test_there_are_commands() -> None:
    assert len(COMMANDS) > 5


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
