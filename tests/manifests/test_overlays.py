"""Every overlay as kubectl renders it: fields by schema, rules of KubeRay's operator, and our own."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.integration.load import DRAIN_S
from tests.manifests.agreement import AGREEMENT_RULES
from tests.manifests.kustomize import (
    COMPONENTS,
    OVERLAYS,
    Manifest,
    env,
    find_kubectl,
    overlay,
    pods,
    ray_cluster,
    with_components,
)
from tests.manifests.operator_rules import OPERATOR_RULES
from tests.manifests.pod_rules import POD_RULES
from tests.manifests.schema import (
    CRDS_VARIABLE,
    RAY_KIND,
    api_violations,
    borrowed,
    core_schemas,
    find_crds,
    kind_of,
    ray_schema,
    violations,
)

pytestmark = pytest.mark.skipif(find_kubectl() is None, reason="kubectl is not installed, which renders the overlays")

needs_crds = pytest.mark.skipif(
    find_crds() is None,
    reason=f"KubeRay's CRD files are neither in ${CRDS_VARIABLE} nor in ../shared/kuberay",
)
KUBERNETES = "1.30", "1.37"
"""The oldest that k8s/README.md asks for, and the newest that it has been checked with."""
ADDITIONS = ("redis", "s3")
VARIANTS = (
    *((name, ()) for name in OVERLAYS),
    *((name, (component,)) for name in OVERLAYS for component in ADDITIONS),
    ("kind", ("access",)),  # the others have it
    ("gpu", ADDITIONS),
)


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda variant: "+".join(("overlays/" + variant[0], *variant[1])))
def manifests(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[Manifest]:
    name, components = request.param
    return with_components(tmp_path_factory.mktemp(name), name, components) if components else overlay(name)


def test_what_there_is() -> None:
    assert OVERLAYS == ("gpu", "kind", "spot")
    assert set(COMPONENTS) == {"access", *ADDITIONS}


def test_built_in_kinds_have_no_unknown_or_wrong_fields(manifests: list[Manifest]) -> None:
    schemas = core_schemas()
    for manifest in manifests:
        if kind_of(manifest) != RAY_KIND:
            assert kind_of(manifest) in schemas, f"{kind_of(manifest)} is not in core.yaml"
            assert violations(manifest, schemas[kind_of(manifest)]) == [], manifest["metadata"]["name"]


@pytest.mark.parametrize("version", KUBERNETES)
def test_built_in_kinds_pass_kubernetes_validate(version: str, manifests: list[Manifest]) -> None:
    for manifest in manifests:
        if kind_of(manifest) != RAY_KIND:
            assert api_violations(manifest, version) == [], manifest["metadata"]["name"]


@needs_crds
def test_the_ray_cluster_has_no_unknown_or_wrong_fields(manifests: list[Manifest]) -> None:
    folder = find_crds()
    assert folder is not None
    assert violations(ray_cluster(manifests), ray_schema(folder)) == []


@needs_crds
def test_built_in_kinds_agree_with_what_the_crds_embed_of_them(manifests: list[Manifest]) -> None:
    folder = find_crds()
    assert folder is not None
    parts = [part for manifest in manifests for part in borrowed(ray_schema(folder), manifest)]
    assert len(parts) > 5
    for where, part, schema in parts:
        assert violations(part, schema) == [], where


@pytest.mark.parametrize("rule", OPERATOR_RULES, ids=lambda rule: rule.__name__)
def test_the_operator_takes_it(rule, manifests: list[Manifest]) -> None:
    assert list(rule(ray_cluster(manifests))) == []


@pytest.mark.parametrize("rule", [*POD_RULES, *AGREEMENT_RULES], ids=lambda rule: rule.__name__)
def test_it_is_as_ours_must_be(rule, manifests: list[Manifest]) -> None:
    assert list(rule(manifests)) == []


def test_names_are_given_once(manifests: list[Manifest]) -> None:
    names = [(m["kind"], m["metadata"]["name"]) for m in manifests]
    assert len(set(names)) == len(names)


def test_integration_tests_drain_within_the_shortest_time_that_a_pod_has() -> None:
    boxes = [c for name in OVERLAYS for pod in pods(overlay(name)) for c in pod.containers]
    assert min(int(env(box)["DRAIN_TIMEOUT_S"]) for box in boxes if "DRAIN_TIMEOUT_S" in env(box)) == DRAIN_S


def test_a_second_cluster_is_another_namespace(tmp_path: Path) -> None:
    """As an upgrade without failed requests has it: nothing but the namespace differs, and all references hold."""
    manifests = with_components(tmp_path, "spot", ADDITIONS, namespace="moe-cluster-green")
    assert {m["metadata"].get("namespace", m["metadata"]["name"]) for m in manifests} == {"moe-cluster-green"}
    assert [fault for rule in (*POD_RULES, *AGREEMENT_RULES) for fault in rule(manifests)] == []
