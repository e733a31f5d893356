"""Manifests against schemas: the built-in kinds by `core.yaml` and kubernetes-validate, Ray's by the CRD files that
KubeRay ships."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import yaml
from jsonschema import Draft202012Validator

from tests.manifests.kustomize import REPOSITORY, Manifest

CRDS_VARIABLE = "MOE_CLUSTER_KUBERAY_CRDS"
"""Names a directory with KubeRay's `ray.io_rayclusters.yaml`."""
RAY_KIND = "ray.io/v1/RayCluster"


def kind_of(manifest: Manifest) -> str:
    return f"{manifest.get('apiVersion')}/{manifest.get('kind')}"


def violations(manifest: Manifest, schema: Mapping[str, Any]) -> list[str]:
    """One line a fault, with the path to it."""
    errors = sorted(Draft202012Validator(schema).iter_errors(manifest), key=lambda error: list(map(str, error.path)))
    return [f"{'.'.join(map(str, error.path))}: {error.message[:300]}" for error in errors]


# --- Built-in kinds ------------------------------------------------------------------------------------------------


@cache
def core_schemas() -> dict[str, dict[str, Any]]:
    """Kind -> schema in which every field that is not named is an error."""
    values = yaml.safe_load((Path(__file__).parent / "core.yaml").read_text())
    return {
        kind: {**schema, "unevaluatedProperties": False, "$defs": values["$defs"]}
        for kind, schema in values["kinds"].items()
    }


def api_violations(manifest: Manifest, version: str) -> list[str]:
    """As `kubernetes-validate --strict` of a manifest, by the API's own schemas; skips where it is not installed."""
    pytest.importorskip("kubernetes_validate", reason="kubernetes-validate is not installed (extra `test`)")
    return list(_api_violations(json.dumps(manifest), version))


@cache
def _api_violations(text: str, version: str) -> tuple[str, ...]:
    """Most manifests are in all overlays alike, and the schemas are read anew each time."""
    import kubernetes_validate

    try:
        kubernetes_validate.validate(json.loads(text), version, strict=True)
    except kubernetes_validate.ValidationError as error:
        return (f"{'.'.join(map(str, error.path))}: {error.message[:300]}",)
    return ()


# --- Ray's kinds ---------------------------------------------------------------------------------------------------


def find_crds() -> Path | None:
    named = os.environ.get(CRDS_VARIABLE)
    folder = Path(named) if named else REPOSITORY.parent / "shared" / "kuberay"
    return folder if (folder / "ray.io_rayclusters.yaml").is_file() else None


@cache
def ray_schema(folder: Path) -> dict[str, Any]:
    """Of RayCluster ray.io/v1, strict: the API server drops fields that it does not know, here they are errors."""
    text = (folder / "ray.io_rayclusters.yaml").read_text()
    definition = yaml.load(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader))
    (version,) = (v for v in definition["spec"]["versions"] if v["name"] == "v1")
    schema: dict[str, Any] = strict(version["schema"]["openAPIV3Schema"])
    schema["properties"]["metadata"] = {"type": "object"}
    return schema


def strict(schema: Any) -> Any:
    """OpenAPI v3 as CRDs write it -> JSON Schema in which fields that are not named are errors."""
    if isinstance(schema, list):
        return [strict(item) for item in schema]
    if not isinstance(schema, dict):
        return schema
    out = {key: _strict_value(key, value) for key, value in schema.items() if not key.startswith("x-kubernetes")}
    closed = "properties" in out and "additionalProperties" not in out
    if closed and not schema.get("x-kubernetes-preserve-unknown-fields"):
        out["additionalProperties"] = False
    if schema.get("nullable") and isinstance(out.get("type"), str):
        out["type"] = [out["type"], "null"]
    return out


def _strict_value(key: str, value: Any) -> Any:
    if key == "properties":
        return {name: strict(item) for name, item in value.items()}
    return value if key in ("required", "enum", "default") else strict(value)


def borrowed(schema: Mapping[str, Any], manifest: Manifest) -> Iterator[tuple[str, Any, dict[str, Any]]]:
    """Parts of a built-in kind whose full schema stands inside RayCluster's -> (where, part, schema)."""
    spec = schema["properties"]["spec"]["properties"]
    match kind_of(manifest):
        case "apps/v1/Deployment":
            template = spec["workerGroupSpecs"]["items"]["properties"]["template"]
            yield "spec.template", manifest["spec"]["template"], template
        case "v1/Service":
            yield "spec", manifest["spec"], spec["headGroupSpec"]["properties"]["headService"]["properties"]["spec"]
        case "networking.k8s.io/v1/NetworkPolicy":
            rules = spec["networkPolicy"]["properties"]["head"]["properties"]
            yield "spec.ingress", manifest["spec"].get("ingress", []), rules["ingressRules"]
            yield "spec.egress", manifest["spec"].get("egress", []), rules["egressRules"]
        case "v1/PersistentVolumeClaim":
            pod = spec["workerGroupSpecs"]["items"]["properties"]["template"]["properties"]["spec"]
            volume = pod["properties"]["volumes"]["items"]["properties"]["ephemeral"]
            yield "spec", manifest["spec"], volume["properties"]["volumeClaimTemplate"]["properties"]["spec"]
