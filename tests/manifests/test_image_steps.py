"""The steps of k8s/Dockerfile, run in a fresh virtual environment with only what the image gets.

What pip would download is left out, unless `MOE_CLUSTER_IMAGE_DOWNLOADS` is set: the packages of this environment stand
in for it then. The second stage is what the first has made, the hooks and some variables.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from tests.manifests.kustomize import K8S, REPOSITORY
from tests.manifests.test_image import steps, texts

DOWNLOADS = os.environ.get("MOE_CLUSTER_IMAGE_DOWNLOADS", "")
LIMIT_S = 1500 if DOWNLOADS else 120
setuptools = pytest.importorskip("setuptools", "77", reason="setuptools 77 or newer (extra `test`) builds the package")
pytestmark = pytest.mark.timeout(LIMIT_S + 60)
NETWORK = "pip install --no-deps --constraint", "pip install --constraint", "pip check"
"""How the commands begin that want what is downloaded."""


@dataclass(frozen=True)
class Image:
    root: Path
    left_out: list[str]

    @property
    def venv(self) -> Path:
        return self.root / "opt" / "venv"

    def run(self, command: str) -> subprocess.CompletedProcess[str]:
        """In the last stage: nothing of the build's folder is there."""
        home = self.root / "home"
        home.mkdir(exist_ok=True)
        return shell(command, home, {**environment(self.venv), "HOME": str(home)})


def shell(command: str, folder: Path, variables: dict[str, str]) -> subprocess.CompletedProcess[str]:
    words = ["sh", "-c", command]
    return subprocess.run(
        words, cwd=folder, env=variables, capture_output=True, text=True, timeout=LIMIT_S, check=False
    )


def environment(venv: Path) -> dict[str, str]:
    theirs = re.compile(r"LANG|TMPDIR|PIP_.*|.*_proxy", re.IGNORECASE)  # where pip finds packages here
    kept = {name: value for name, value in os.environ.items() if theirs.fullmatch(name)}
    path = f"{venv / 'bin'}:{Path(sys.base_prefix) / 'bin'}:/usr/bin:/bin"
    return {**kept, "PATH": path, "PIP_DISABLE_PIP_VERSION_CHECK": "1", "PIP_NO_CACHE_DIR": "1"}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Image:
    root = tmp_path_factory.mktemp("image")
    source, venv = root / "src", root / "opt" / "venv"
    source.mkdir()
    index = next(text.partition("=")[2] for text in texts("ARG") if text.startswith("TORCH_INDEX_URL="))
    index = os.environ.get("TORCH_INDEX_URL", index)
    left_out = []
    for step in steps():
        if step.stage == 1 and step.instruction == "COPY":
            copy(step.text, source)
        for command in re.split(r"&&", step.text) if step.stage == 1 and step.instruction == "RUN" else ():
            text = command.strip().replace("/opt/venv", str(venv))
            if text.startswith(NETWORK) and not DOWNLOADS:
                left_out.append(text)
                continue
            text = text.replace("python -m venv", f"{sys.executable} -m venv")
            variables = {**environment(venv), "TORCH_INDEX_URL": index}
            if not DOWNLOADS:
                variables["PYTHONPATH"] = str(build_tools(root))
            done = subprocess.run(
                ["sh", "-c", text],
                cwd=source,
                env=variables,
                capture_output=True,
                text=True,
                timeout=LIMIT_S,
                check=False,
            )
            assert done.returncode == 0, f"{text}\n{done.stdout[-2000:]}{done.stderr[-2000:]}"
    shutil.copytree(K8S / "hooks", root / "opt" / "hooks")
    if not DOWNLOADS:
        (lib,) = venv.glob("lib/python*/site-packages")
        (lib / "others.pth").write_text("".join(f"{path}\n" for path in sys.path if path.endswith("-packages")))
    return Image(root, left_out)


def copy(text: str, source: Path) -> None:
    """As COPY, without what k8s/Dockerfile.dockerignore keeps back."""
    words = text.split()
    for word in words[:-1]:
        origin, target = REPOSITORY / word, source / (Path(word).name if words[-1] == "./" else words[-1])
        if origin.is_dir():
            shutil.copytree(origin, target, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(origin, target)


def build_tools(root: Path) -> Path:
    """setuptools alone, of this environment."""
    folder = root / "tools"
    if not folder.exists():
        folder.mkdir()
        (folder / "setuptools").symlink_to(Path(setuptools.__file__).parent)
    return folder


def test_two_downloads_and_their_check_are_all_that_is_left_out(image: Image) -> None:
    assert len(image.left_out) == (0 if DOWNLOADS else 3)


def test_requirements_are_the_project_s_own(image: Image) -> None:
    import tomllib

    wanted = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    assert (image.root / "src" / "requirements.txt").read_text().splitlines() == wanted


def test_the_package_is_whole_and_the_command_runs(image: Image) -> None:
    code = "import cluster, actors, protos, configs; print(cluster.__path__, actors.__path__, protos.__path__)"
    done = image.run(f"python -c '{code}'")
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(str(image.venv)) == 3, done.stdout
    done = image.run("moe-cluster --help")
    assert done.returncode == 0, done.stderr
    assert "drain" in done.stdout
    done = image.run("moe-cluster token --role infer --name me")
    assert done.returncode == 0, done.stderr


def test_configs_and_jobs_are_found_by_name(image: Image) -> None:
    code = (
        "from cluster.configfile import find_config, load_cluster, load_job; "
        "[load_cluster(find_config(name), {}) for name in ('local_cpu', 'kubernetes', 'kubernetes_gpu')]; "
        "[load_job(find_config(f'jobs/{name}')) for name in ('quick', 'demo')]"
    )
    done = image.run(f'python -c "{code}"')
    assert done.returncode == 0, done.stderr


def test_the_generated_code_and_the_protos_came_along(image: Image) -> None:
    (lib,) = image.venv.glob("lib/python*/site-packages")
    for folder in ("protos", "configs"):
        assert files(REPOSITORY, folder) - {"protos/generate.py"} <= files(lib, folder)


def files(root: Path, folder: str) -> set[str]:
    kinds = (".yaml", ".proto", ".py", ".pyi")
    return {str(path.relative_to(root)) for path in (root / folder).rglob("*") if path.suffix in kinds}


def test_the_health_check_says_when_nothing_serves(image: Image) -> None:
    command = re.search(r"CMD (\[.*\])", texts("HEALTHCHECK")[0])
    assert command is not None
    words = re.findall(r'"([^"]*)"', command[1])
    done = image.run(" ".join([*words, "--target", "127.0.0.1:1"]))
    assert done.returncode not in (0, 2), "2: a command line that is not ours"


def test_the_hooks_run(image: Image) -> None:
    for hook in (image.root / "opt" / "hooks").iterdir():
        done = image.run(str(hook))
        assert done.returncode != 0
        assert "NODE_NAME" in done.stderr
