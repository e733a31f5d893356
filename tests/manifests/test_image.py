"""The image as far as it can be checked without building it: its steps, what they read, and the versions they take."""

from __future__ import annotations

import fnmatch
import re
import shlex
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

import pytest
from packaging.requirements import Requirement

from cluster.cli import parser
from tests.manifests.agreement import constraints, project_requirements
from tests.manifests.kustomize import K8S, OVERLAYS, REPOSITORY, find_kubectl, overlay, pods

EXTRA = ("s3fs", "setuptools")
"""What the image has beside the project's own dependencies."""


@dataclass(frozen=True)
class Step:
    instruction: str
    text: str
    stage: int


def steps() -> list[Step]:
    found: list[Step] = []
    text = re.sub(r"^#.*\n", "", (K8S / "Dockerfile").read_text(), flags=re.MULTILINE).replace("\\\n", " ")
    for line in text.splitlines():
        if line.strip():
            instruction, _, rest = line.partition(" ")
            stage = sum(step.instruction == "FROM" for step in found) + (instruction == "FROM")
            found.append(Step(instruction, rest.strip(), stage))
    return found


def texts(instruction: str) -> list[str]:
    return [step.text for step in steps() if step.instruction == instruction]


def pip_installs() -> list[list[str]]:
    commands = [shlex.split(part) for text in texts("RUN") for part in re.split(r"&&|>\s*\S+", text)]
    return [command[2:] for command in commands if command[:2] == ["pip", "install"]]


def test_instructions_are_known_and_the_stages_are_two() -> None:
    known = {"ARG", "FROM", "ENV", "WORKDIR", "COPY", "RUN", "USER", "EXPOSE", "HEALTHCHECK", "CMD"}
    assert {step.instruction for step in steps()} <= known
    assert texts("FROM") == ["${BASE_IMAGE} AS build", "${BASE_IMAGE}"]


def test_the_base_is_pinned_and_runs_what_the_project_wants() -> None:
    base = next(text.partition("=")[2] for text in texts("ARG") if text.startswith("BASE_IMAGE="))
    version = re.fullmatch(r"python:(3\.1[12])\.\d+-slim-bookworm", base)
    assert version is not None


def test_cpu_and_cuda_differ_by_one_argument() -> None:
    index = next(text.partition("=")[2] for text in texts("ARG") if text.startswith("TORCH_INDEX_URL="))
    assert index == "https://download.pytorch.org/whl/cpu"
    assert "--build-arg TORCH_INDEX_URL=https://pypi.org/simple" in (K8S / "Dockerfile").read_text()
    uses = [install for install in pip_installs() if "${TORCH_INDEX_URL}" in install]
    assert [install[-1] for install in uses] == ["torch"]


def test_every_installation_is_pinned() -> None:
    installs = pip_installs()
    assert len(installs) == 3
    for install in installs[:-1]:
        assert install[install.index("--constraint") + 1] == "constraints.txt"
    assert "--no-deps" in installs[-1]
    assert "--no-build-isolation" in installs[-1]


def test_pip_reads_the_steps_and_the_constraints() -> None:
    """By pip itself: options, and every line of the file; nothing is installed and nobody is asked."""
    for install in pip_installs():
        options = [str(K8S / part) if part == "constraints.txt" else part for part in install]
        if "--index-url" in options:
            del options[options.index("--index-url") : options.index("--index-url") + 2]
        if "--requirement" in options:
            del options[options.index("--requirement") : options.index("--requirement") + 2]
        while options[-1] in (".", "torch", *EXTRA):
            options.pop()
        command = [sys.executable, "-m", "pip", "install", "--dry-run", "--no-index", "--no-deps", *options, "pip"]
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
        assert done.returncode == 0, done.stderr


def test_constraints_pin_what_the_project_asks_for() -> None:
    for name, requirement in project_requirements().items():
        assert requirement.specifier.contains(constraints()[name], prereleases=True), name
    assert set(EXTRA) <= constraints().keys()


def test_constraints_do_not_contradict_one_another() -> None:
    """As far as their packages are installed here in the same version."""
    checked = 0
    for name, version in constraints().items():
        for text in _requires(name, version):
            requirement = Requirement(text)
            pin = constraints().get(re.sub(r"[-_.]+", "-", requirement.name).lower())
            if pin is None or (requirement.marker and not requirement.marker.evaluate({"extra": ""})):
                continue
            checked += 1
            assert requirement.specifier.contains(pin, prereleases=True), f"{name} wants {requirement}, pinned is {pin}"
    assert checked > 0


def _requires(name: str, version: str) -> list[str]:
    try:
        found = distribution(name)
    except PackageNotFoundError:
        return []
    return (found.requires or []) if found.version.split("+")[0] == version else []


def test_a_line_that_pins_nothing_is_refused(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "constraints.txt").write_text("ray>=2\n")
    monkeypatch.setattr("tests.manifests.agreement.K8S", tmp_path)
    with pytest.raises(ValueError, match="ray>=2"):
        constraints.__wrapped__()


def test_everything_copied_is_there_and_sent() -> None:
    ignored, sent = _ignore_file()
    assert ignored[0] == "*"
    for text in texts("COPY"):
        words = [word for word in text.split() if not word.startswith("--")]
        if "--from=build" in text:
            assert words[0] == "/opt/venv"
            continue
        for source in words[:-1]:
            assert (REPOSITORY / source).exists(), source
            assert source in sent, f"k8s/Dockerfile.dockerignore keeps {source} back"
    assert any(fnmatch.fnmatch("cluster/__pycache__", pattern) for pattern in ignored)


def _ignore_file() -> tuple[list[str], set[str]]:
    lines = [line for line in (K8S / "Dockerfile.dockerignore").read_text().splitlines() if line and line[0] != "#"]
    return [line for line in lines if line[0] != "!"], {line[1:] for line in lines if line[0] == "!"}


def test_all_packages_of_the_project_are_copied() -> None:
    copied = {word for text in texts("COPY") for word in text.split()}
    packages = {path.parent.name for path in REPOSITORY.glob("*/__init__.py")} - {"tests"}
    assert packages | {"configs"} <= copied


def test_it_runs_without_root_as_the_user_of_the_manifests() -> None:
    last = max(step.stage for step in steps())
    users = [step.text for step in steps() if step.instruction == "USER" and step.stage == last]
    assert users == ["1000:1000"]
    order = [step.instruction for step in steps() if step.stage == last]
    assert "RUN" not in order[order.index("USER") :]


@pytest.mark.skipif(find_kubectl() is None, reason="kubectl is not installed, which renders the overlays")
@pytest.mark.parametrize("name", OVERLAYS, ids=lambda name: f"overlays/{name}")
def test_the_user_and_the_hooks_are_those_of_the_manifests(name: str) -> None:
    for pod in pods(overlay(name)):
        context = pod.spec["securityContext"]
        assert (context["runAsUser"], context["runAsGroup"], context["fsGroup"]) == (1000, 1000, 1000)
        for container in pod.containers:
            command = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [""])
            if command[0].startswith("/opt/moe-cluster/hooks/"):
                assert (K8S / "hooks" / Path(command[0]).name).stat().st_mode & 0o111


def test_its_commands_are_ours() -> None:
    health = re.search(r"CMD (\[.*\])", texts("HEALTHCHECK")[0])
    assert health is not None
    for command in (health[1], texts("CMD")[0]):
        words = re.findall(r'"([^"]*)"', command)
        assert words[0] == "moe-cluster"
        parser().parse_args(words[1:])
    assert texts("EXPOSE") == ["50151"]
