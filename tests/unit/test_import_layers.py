"""The layers of the project, as imports: what the folders promise, read from the source without running it."""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGES = ("actors", "cluster", "protos")

GRPC = ("grpc", "grpc_health", "grpc_reflection", "grpc_status", "grpc_tools", "google.rpc", "protos")
RAY = ("ray",)

ALLOWED = {"ray": "cluster.fabric", "grpc": "cluster.service"}
"""Which folder alone may import it."""


def imports_of(source: str, module: str, is_package: bool) -> set[str]:
    """Every module that `source` names in an import, wherever it stands: in functions, under TYPE_CHECKING, by name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            base = _absolute(node, module, is_package)
            found.add(base)
            # `from cluster import fabric` imports the module cluster.fabric.
            found.update(f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call):
            found.update(_named_in_call(node))
    return found


def _absolute(node: ast.ImportFrom, module: str, is_package: bool) -> str:
    if node.level == 0:
        return node.module or ""
    parts = module.split(".")
    parts = parts[: len(parts) - node.level + is_package]
    return ".".join([*parts, node.module] if node.module else parts)


def _named_in_call(node: ast.Call) -> Iterator[str]:
    name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
    if name in ("import_module", "__import__") and node.args and isinstance(node.args[0], ast.Constant):
        yield str(node.args[0].value)


def read_project(root: Path) -> dict[str, set[str]]:
    """Module -> imported modules."""
    graph = {}
    for package in PACKAGES:
        for file in sorted((root / package).rglob("*.py")):
            parts = file.relative_to(root).with_suffix("").parts
            is_package = parts[-1] == "__init__"
            module = ".".join(parts[:-1] if is_package else parts)
            graph[module] = imports_of(file.read_text(encoding="utf-8"), module, is_package)
    return graph


def is_below(module: str, *packages: str) -> bool:
    return any(module == package or module.startswith(f"{package}.") for package in packages)


def reached_from(graph: Mapping[str, set[str]], package: str) -> dict[str, str]:
    """Project modules that importing `package` runs, each with the module that imports it."""
    reached = {module: "" for module in graph if is_below(module, package)}
    waiting = list(reached)
    while waiting:
        module = waiting.pop()
        for name in graph[module]:
            # Importing a.b.c runs a and a.b too.
            parts = name.split(".")
            for parent in (".".join(parts[: i + 1]) for i in range(len(parts))):
                if parent in graph and parent not in reached:
                    reached[parent] = module
                    waiting.append(parent)
    return reached


def violations(graph: Mapping[str, set[str]]) -> list[str]:
    found = []
    for module, names in graph.items():
        for name in sorted(names):
            if is_below(module, "actors") and is_below(name, *RAY, *GRPC, "cluster"):
                found.append(f"{module} imports {name}: actors/ knows no ray, grpc, protos or cluster")
            elif is_below(module, "cluster") and is_below(name, *RAY) and not is_below(module, ALLOWED["ray"]):
                found.append(f"{module} imports {name}: only cluster/fabric imports ray")
            elif is_below(module, "cluster") and is_below(name, *GRPC) and not is_below(module, ALLOWED["grpc"]):
                found.append(f"{module} imports {name}: only cluster/service imports grpc and protos")
    for module, importer in reached_from(graph, "actors").items():
        found += [
            f"{module} imports {name}, and actors/ reaches it through {importer}"
            for name in sorted(graph[module])
            if importer and is_below(name, *RAY, *GRPC)
        ]
    return found


def test_imports_go_down_only() -> None:
    graph = read_project(ROOT)
    assert {"actors.errors", "cluster.config", "cluster.fabric.data"} <= set(graph), "the files were not found"
    assert violations(graph) == []


@pytest.mark.parametrize(
    ("file", "source", "found"),
    [
        ("actors/a.py", "import ray", "actors.a imports ray"),
        ("actors/moe/a.py", "def f():\n    from ray.util import x", "actors.moe.a imports ray.util"),
        ("actors/a.py", "import cluster.config", "actors.a imports cluster.config"),
        (
            "actors/a.py",
            "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import grpc",
            "actors.a imports grpc",
        ),
        ("actors/a.py", "import importlib\nimportlib.import_module('ray')", "actors.a imports ray"),
        ("actors/moe/a.py", "from ...cluster import x", "actors.moe.a imports cluster"),
        ("cluster/jobs/a.py", "import ray.data", "cluster.jobs.a imports ray.data"),
        ("cluster/fabric/a.py", "import ray, grpc", "cluster.fabric.a imports grpc"),
        ("cluster/service/a.py", "import grpc\nfrom google.rpc import status_pb2\nimport ray", "service.a imports ray"),
        ("cluster/a.py", "from google.rpc import status_pb2", "cluster.a imports google.rpc"),
        ("cluster/a.py", "from grpc_health.v1 import health", "cluster.a imports grpc_health.v1"),
        ("cluster/jobs/a.py", "from protos.x import y", "cluster.jobs.a imports protos.x"),
    ],
)
def test_the_checker_catches_a_planted_import(tmp_path: Path, file: str, source: str, found: str) -> None:
    planted = tmp_path / file
    planted.parent.mkdir(parents=True)
    planted.write_text(source)
    caught = violations(read_project(tmp_path))
    assert any(found in violation for violation in caught)


def test_the_checker_lets_the_edges_import() -> None:
    graph = {
        "cluster.fabric.a": {"ray", "ray.data", "cluster.config"},
        "cluster.service.a": {"grpc.aio", "google.rpc.status_pb2", "protos.x"},
        "cluster.a": {"google.protobuf", "grpcio_like", "rayon"},
        "protos.x": {"grpc"},
    }
    assert violations(graph) == []


def test_the_checker_follows_what_actors_reach() -> None:
    graph = {"actors.a": {"protos"}, "protos": {"protos.deep"}, "protos.deep": {"grpc"}}
    assert "protos.deep imports grpc, and actors/ reaches it through protos" in violations(graph)
