"""Overlays as kubectl renders them, and small looks into what comes out."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import yaml

Manifest = dict[str, Any]

REPOSITORY = Path(__file__).resolve().parents[2]
K8S = REPOSITORY / "k8s"
OVERLAYS = tuple(sorted(path.parent.name for path in K8S.glob("overlays/*/kustomization.yaml")))
COMPONENTS = tuple(sorted(path.parent.name for path in K8S.glob("components/*/kustomization.yaml")))
NAMESPACE = "moe-cluster"
EXPERT_ROLE = "expert"
ROLE_LABEL = "moe-cluster.io/role"
RENDER_TIMEOUT_S = 60


def find_kubectl() -> str | None:
    return shutil.which("kubectl")


@cache
def render(folder: Path) -> str:
    """YAML of all objects. `ValueError` with kubectl's own words if the folder cannot be built."""
    done = subprocess.run(
        [find_kubectl() or "kubectl", "kustomize", str(folder)],
        capture_output=True,
        text=True,
        timeout=RENDER_TIMEOUT_S,
        check=False,
    )
    if done.returncode:
        raise ValueError(f"{folder}: {done.stderr.strip()}")
    return done.stdout


def parse(text: str) -> list[Manifest]:
    return [document for document in yaml.load_all(text, Loader=_Loader) if document]


class _Loader(yaml.SafeLoader):
    """A key that is given twice is an error: Kubernetes would take the last one without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key, deep=True) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            raise ValueError(f"a key is given twice in {keys}, line {node.start_mark.line + 1}")
        return super().construct_mapping(node, deep)


def overlay(name: str) -> list[Manifest]:
    return parse(render(K8S / "overlays" / name))


def with_components(
    folder: Path, overlay_name: str, components: Sequence[str], namespace: str = NAMESPACE
) -> list[Manifest]:
    """`folder`: an empty one, for a kustomization like those that users write."""
    at = {name: os.path.relpath(K8S / name, folder.resolve()) for name in ("overlays", "components")}
    values = {
        "apiVersion": "kustomize.config.k8s.io/v1beta1",
        "kind": "Kustomization",
        "namespace": namespace,
        "resources": [f"{at['overlays']}/{overlay_name}"],
        "components": [f"{at['components']}/{name}" for name in components],
    }
    (folder / "kustomization.yaml").write_text(yaml.safe_dump(values))
    return parse(render(folder))


# --- Looks into manifests ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pod:
    """A pod template and what its pods are labelled with in the end."""

    name: str
    labels: dict[str, str]
    spec: Manifest
    group: Manifest
    """The group's spec of a Ray pod; empty of others."""

    @property
    def containers(self) -> list[Manifest]:
        return [*self.spec.get("initContainers", []), *self.spec["containers"]]


def of_kind(manifests: Sequence[Manifest], kind: str) -> list[Manifest]:
    return [manifest for manifest in manifests if manifest.get("kind") == kind]


def ray_cluster(manifests: Sequence[Manifest]) -> Manifest:
    (cluster,) = of_kind(manifests, "RayCluster")
    return cluster


def front(manifests: Sequence[Manifest]) -> Manifest:
    (deployment,) = of_kind(manifests, "Deployment")
    return deployment


def groups(cluster: Manifest) -> Iterator[tuple[str, Manifest]]:
    """Head first."""
    yield "head", cluster["spec"]["headGroupSpec"]
    for group in cluster["spec"].get("workerGroupSpecs", []):
        yield group["groupName"], group


def expert_groups(cluster: Manifest) -> list[Manifest]:
    return [g for g in cluster["spec"]["workerGroupSpecs"] if g.get("labels", {}).get(ROLE_LABEL) == EXPERT_ROLE]


def pods(manifests: Sequence[Manifest]) -> list[Pod]:
    found = []
    for deployment in of_kind(manifests, "Deployment"):
        template = deployment["spec"]["template"]
        found.append(Pod(deployment["metadata"]["name"], template["metadata"].get("labels", {}), template["spec"], {}))
    for cluster in of_kind(manifests, "RayCluster"):
        found += [_ray_pod(cluster, name, group) for name, group in groups(cluster)]
    return found


def _ray_pod(cluster: Manifest, name: str, group: Manifest) -> Pod:
    labels = {
        "app.kubernetes.io/name": "kuberay",
        **group["template"].get("metadata", {}).get("labels", {}),
        **group.get("labels", {}),
        # Those that KubeRay sets whatever the template says; its pod.go, labelPod.
        "ray.io/cluster": cluster["metadata"]["name"],
        "ray.io/node-type": "head" if name == "head" else "worker",
        "ray.io/group": "headgroup" if name == "head" else name,
    }
    return Pod(name, labels, group["template"]["spec"], group)


def selects(selector: Manifest, labels: dict[str, str]) -> bool:
    return all(labels.get(key) == value for key, value in selector.get("matchLabels", selector).items())


def env(container: Manifest) -> dict[str, str]:
    """Those with a plain value."""
    return {item["name"]: item["value"] for item in container.get("env", []) if "value" in item}
