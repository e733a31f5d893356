"""The checks are checked: an error of each kind, put into manifests that are right, is found and named."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from typing import Any

import pytest

from tests.manifests import agreement as agree
from tests.manifests import operator_rules as operator
from tests.manifests import pod_rules as pod
from tests.manifests.kustomize import Manifest, find_kubectl, front, of_kind, overlay, ray_cluster
from tests.manifests.schema import api_violations, borrowed, core_schemas, find_crds, kind_of, ray_schema, violations
from tests.manifests.test_overlays import needs_crds

pytestmark = pytest.mark.skipif(find_kubectl() is None, reason="kubectl is not installed, which renders the overlays")

ROUTER, EXPERTS, SPOT = 0, 1, 2
Change = Callable[[list[Manifest]], None]


def put(value: Any, *path: str | int) -> Change:
    """Into the RayCluster's spec."""
    return lambda manifests: _put(ray_cluster(manifests)["spec"], value, path)


def drop(*path: str | int) -> Change:
    return lambda manifests: _drop(ray_cluster(manifests)["spec"], path)


def put_front(value: Any, *path: str | int) -> Change:
    """Into the spec of the front's pods."""
    return lambda manifests: _put(front(manifests)["spec"]["template"]["spec"], value, path)


def drop_front(*path: str | int) -> Change:
    return lambda manifests: _drop(front(manifests)["spec"]["template"]["spec"], path)


def put_into(kind: str, name: str, value: Any, *path: str | int) -> Change:
    return lambda manifests: _put(_named(manifests, kind, name), value, path)


def remove(kind: str, name: str) -> Change:
    return lambda manifests: manifests.remove(_named(manifests, kind, name))


def set_variable(name: str, value: str | None, *path: str | int) -> Change:
    """In the first container of a group's pods; None takes it away."""

    def change(manifests: list[Manifest]) -> None:
        container = _at(ray_cluster(manifests)["spec"], path)["template"]["spec"]["containers"][0]
        container["env"] = [item for item in container["env"] if item["name"] != name]
        if value is not None:
            container["env"].append({"name": name, "value": value})

    return change


def in_config(old: str, new: str) -> Change:
    def change(manifests: list[Manifest]) -> None:
        files = next(m for m in of_kind(manifests, "ConfigMap"))["data"]
        assert old in files["kubernetes_gpu.yaml"]
        files["kubernetes_gpu.yaml"] = files["kubernetes_gpu.yaml"].replace(old, new)

    return change


def _named(manifests: list[Manifest], kind: str, name: str) -> Manifest:
    return next(m for m in of_kind(manifests, kind) if m["metadata"]["name"] == name)


def _at(value: Any, path: tuple[str | int, ...]) -> Any:
    for key in path:
        value = value[key]
    return value


def _put(value: Any, new: Any, path: tuple[str | int, ...]) -> None:
    target = _at(value, path[:-1])
    if path[-1] == "+":
        target.append(new)
    else:
        target[path[-1]] = new


def _drop(value: Any, path: tuple[str | int, ...]) -> None:
    del _at(value, path[:-1])[path[-1]]


HEAD_POD = ("headGroupSpec", "template", "spec")
HEAD_BOX = (*HEAD_POD, "containers", 0)
EXPERT_GROUP = ("workerGroupSpecs", EXPERTS)
EXPERT_POD = (*EXPERT_GROUP, "template", "spec")
EXPERT_BOX = (*EXPERT_POD, "containers", 0)
SPOT_GROUP = ("workerGroupSpecs", SPOT)
FRONT_BOX, NODE_BOX = ("containers", 0), ("initContainers", 0)

OPERATOR = {
    "long name": (
        operator.name_is_short_dns,
        put_into("RayCluster", "moe-cluster", "Moe" * 20, "metadata", "name"),
        "DNS-1035",
    ),
    "no container": (operator.every_group_has_a_container, put([], *EXPERT_POD, "containers"), "no container"),
    "resources twice": (
        operator.resources_in_one_place,
        put("4", *EXPERT_GROUP, "rayStartParams", "num-cpus"),
        "rayStartParams num-cpus",
    ),
    "labels as start parameter": (
        operator.labels_at_the_top,
        put("a=b", *EXPERT_GROUP, "rayStartParams", "labels"),
        "rayStartParams.labels",
    ),
    "label key": (operator.labels_at_the_top, put("x", *EXPERT_GROUP, "labels", "a b"), "label key 'a b'"),
    "label value": (operator.labels_at_the_top, put("a/b", *EXPERT_GROUP, "labels", "a"), "value 'a/b'"),
    "more than at most": (operator.bounds_in_order, put(9, *EXPERT_GROUP, "minReplicas"), "minReplicas 9"),
    "negative": (operator.bounds_in_order, put(-1, *EXPERT_GROUP, "minReplicas"), "minReplicas -1"),
    "no bounds": (operator.bounds_in_order, drop(*EXPERT_GROUP, "maxReplicas"), "are needed"),
    "replicas outside": (operator.bounds_in_order, put(7, *EXPERT_GROUP, "replicas"), "replicas 7 outside"),
    "autoscaler v1": (operator.autoscaler_v2_by_its_field, put("v1", "autoscalerOptions", "version"), "not both"),
    "autoscaler by variable": (
        operator.autoscaler_v2_by_its_field,
        set_variable("RAY_enable_autoscaler_v2", "1", "headGroupSpec"),
        "beside autoscalerOptions",
    ),
    "restarted pods": (operator.pods_are_not_restarted, put("Always", *EXPERT_POD, "restartPolicy"), "restartPolicy"),
    "idle without v2": (operator.idle_timeouts, put(False, "enableInTreeAutoscaling"), "without autoscaler v2"),
    "negative idle time": (operator.idle_timeouts, put(-5, *EXPERT_GROUP, "idleTimeoutSeconds"), "-5 is negative"),
    "negative idle time of all": (
        operator.idle_timeouts,
        put(-5, "autoscalerOptions", "idleTimeoutSeconds"),
        "idleTimeoutSeconds -5",
    ),
    "priority in an old Ray": (operator.priority_is_known, put("2.55.0", "rayVersion"), "priority needs"),
    "no fault tolerance": (operator.state_of_the_head_has_one_owner, drop("gcsFaultToleranceOptions"), "ends with its"),
    "redis by variable": (
        operator.state_of_the_head_has_one_owner,
        set_variable("RAY_REDIS_ADDRESS", "redis:6379", "headGroupSpec"),
        "RAY_REDIS_ADDRESS beside",
    ),
    "redis by start parameter": (
        operator.state_of_the_head_has_one_owner,
        put("x", "headGroupSpec", "rayStartParams", "redis-password"),
        "redis-password",
    ),
    "both backends": (
        operator.state_of_the_head_has_one_owner,
        put("redis:6379", "gcsFaultToleranceOptions", "redisAddress"),
        "redisAddress with backend rocksdb",
    ),
    "redis with storage": (
        operator.state_of_the_head_has_one_owner,
        put("redis", "gcsFaultToleranceOptions", "backend"),
        "storage with backend redis",
    ),
    "claim and size": (
        operator.state_of_the_head_has_one_owner,
        put("mine", "gcsFaultToleranceOptions", "storage", "claimName"),
        "claimName beside",
    ),
    "storage by variable": (
        operator.state_of_the_head_has_one_owner,
        set_variable("RAY_gcs_storage", "rocksdb", "headGroupSpec"),
        "KubeRay's to set",
    ),
    "mount of KubeRay's": (
        operator.state_of_the_head_has_one_owner,
        put({"name": "tmp", "mountPath": "/data/gcs"}, *HEAD_BOX, "volumeMounts", "+"),
        "a mount at /data/gcs",
    ),
    "volume of KubeRay's": (
        operator.state_of_the_head_has_one_owner,
        put({"name": "gcs-storage", "emptyDir": {}}, *HEAD_POD, "volumes", "+"),
        "a volume gcs-storage",
    ),
    "no token": (operator.token_needs_a_version, drop("authOptions"), "not token"),
    "token without version": (operator.token_needs_a_version, drop("rayVersion"), "needs 2.52.0"),
    "two kinds of token": (
        operator.token_needs_a_version,
        put({"mode": "token", "enableK8sTokenAuth": True, "secretName": "x"}, "authOptions"),
        "enableK8sTokenAuth and secretName",
    ),
    "gated": (operator.no_gated_feature, put({"mode": "DenyAll"}, "networkPolicy"), "feature gate"),
    "upgrade strategy": (operator.upgrade_strategy_is_known, put({"type": "Rolling"}, "upgradeStrategy"), "'Rolling'"),
    "suspended": (operator.nothing_suspended, put(True, *EXPERT_GROUP, "suspend"), "suspend with"),
    "a name twice": (operator.groups_have_names_of_their_own, put("router", *EXPERT_GROUP, "groupName"), "two groups"),
}

PODS = {
    "root": (pod.containers_are_locked_down, drop(*HEAD_POD, "securityContext", "runAsNonRoot"), "may run as root"),
    "seccomp": (pod.containers_are_locked_down, drop(*HEAD_POD, "securityContext", "seccompProfile"), "seccomp"),
    "escalation": (
        pod.containers_are_locked_down,
        put(True, *EXPERT_BOX, "securityContext", "allowPrivilegeEscalation"),
        "allowPrivilegeEscalation",
    ),
    "writable root": (
        pod.containers_are_locked_down,
        drop_front(*FRONT_BOX, "securityContext", "readOnlyRootFilesystem"),
        "writable",
    ),
    "capabilities": (
        pod.containers_are_locked_down,
        drop("autoscalerOptions", "securityContext", "capabilities"),
        "autoscaler: keeps capabilities",
    ),
    "no volume": (pod.what_is_mounted_is_there, put("dta", *EXPERT_BOX, "volumeMounts", 2, "name"), "dta"),
    "no claim": (pod.what_is_mounted_is_there, remove("PersistentVolumeClaim", "moe-cluster-data"), "of the claim"),
    "no config map": (
        pod.what_is_mounted_is_there,
        put_front("moe-cluster-configs", "volumes", -2, "configMap", "name"),
        "config map",
    ),
    "no scratch": (pod.scratch_is_writable, put([], *EXPERT_BOX, "volumeMounts"), "cannot write to /tmp"),
    "a secret": (
        pod.secrets_by_reference,
        lambda manifests: manifests.append({"kind": "Secret", "metadata": {"name": "oops"}}),
        "oops",
    ),
    "a password": (
        pod.secrets_by_reference,
        set_variable("REDIS_PASSWORD", "hunter2", *EXPERT_GROUP),
        "REDIS_PASSWORD is written out",
    ),
    "an unknown secret": (
        pod.secrets_by_reference,
        put("x", *EXPERT_BOX, "envFrom", 0, "secretRef", "name"),
        "the secret 'x'",
    ),
    "an unknown secret as a volume": (
        pod.secrets_by_reference,
        put({"name": "x", "secret": {"secretName": "y"}}, *EXPERT_POD, "volumes", "+"),
        "mounts the secret 'y'",
    ),
    "a token for all": (pod.least_rights, drop(*EXPERT_POD, "automountServiceAccountToken"), "has the API server's"),
    "a token for the account": (
        pod.least_rights,
        put_into("ServiceAccount", "moe-cluster", True, "automountServiceAccountToken"),
        "mounted everywhere",
    ),
    "no account": (pod.least_rights, put("default", *EXPERT_POD, "serviceAccountName"), "'default' does not exist"),
    "rights for others": (
        pod.least_rights,
        put_into("RoleBinding", "moe-cluster", {"kind": "ServiceAccount", "name": "moe-cluster"}, "subjects", "+"),
        "rights for moe-cluster",
    ),
    "more verbs": (pod.least_rights, put_into("Role", "moe-cluster", ["*"], "rules", 0, "verbs"), "may * pods"),
    "more clusters": (
        pod.least_rights,
        put_into("Role", "moe-cluster", ["other"], "rules", 1, "resourceNames"),
        "more RayClusters",
    ),
    "a cluster role": (
        pod.least_rights,
        lambda manifests: manifests.append({"kind": "ClusterRole", "metadata": {"name": "all"}}),
        "beyond the namespace",
    ),
    "a small head": (
        pod.head_has_memory_and_no_actors,
        put("3900Mi", *HEAD_BOX, "resources", "limits", "memory"),
        "3900Mi",
    ),
    "actors on the head": (
        pod.head_has_memory_and_no_actors,
        put("1", "headGroupSpec", "resources", "moe_expert"),
        "offers",
    ),
    "CPUs on the head": (pod.head_has_memory_and_no_actors, drop("headGroupSpec", "resources", "CPU"), "its CPUs"),
    "no drain": (pod.experts_leave_in_order, drop(*EXPERT_BOX, "lifecycle"), "no preStop"),
    "no time to drain": (
        pod.experts_leave_in_order,
        put(300, *EXPERT_POD, "terminationGracePeriodSeconds"),
        "does not fit",
    ),
    "another name": (
        pod.experts_leave_in_order,
        set_variable("NODE_NAME", "experts", *EXPERT_GROUP),
        "NODE_NAME is not",
    ),
    "never idle": (pod.experts_leave_in_order, drop(*EXPERT_GROUP, "idleTimeoutSeconds"), "no idleTimeoutSeconds"),
    "one zone": (pod.experts_are_spread, drop(*EXPERT_POD, "topologySpreadConstraints"), "not spread over zones"),
    "one machine": (pod.experts_are_spread, drop(*EXPERT_POD, "affinity", "podAntiAffinity"), "on one machine"),
    "spread by nobody's label": (
        pod.experts_are_spread,
        put({"matchLabels": {"a": "b"}}, *EXPERT_POD, "topologySpreadConstraints", 0, "labelSelector"),
        "not spread",
    ),
    "spot without its label": (
        pod.spot_pods_are_labelled,
        put("on-demand", *SPOT_GROUP, "labels", "ray.io/market-type"),
        "tolerations say otherwise",
    ),
    "router on spot": (
        pod.spot_pods_are_labelled,
        put("router", *SPOT_GROUP, "labels", "moe-cluster.io/role"),
        "only experts",
    ),
    "budget for nobody": (
        pod.budgets_leave_room,
        put_into("PodDisruptionBudget", "moe-cluster-router", {"matchLabels": {"a": "b"}}, "spec", "selector"),
        "selects no pod",
    ),
    "budget in per cent": (
        pod.budgets_leave_room,
        put_into("PodDisruptionBudget", "moe-cluster-experts", "50%", "spec", "minAvailable"),
        "as a number",
    ),
    "budget that blocks": (
        pod.budgets_leave_room,
        put_into("PodDisruptionBudget", "moe-cluster-experts", 2, "spec", "minAvailable"),
        "minAvailable 2 of at least 2",
    ),
    "no budget": (pod.budgets_leave_room, remove("PodDisruptionBudget", "moe-cluster-front"), "no disruption budget"),
    "open network": (pod.network_is_closed, remove("NetworkPolicy", "moe-cluster-inside"), "network policies cover"),
    "no DNS": (
        pod.network_is_closed,
        lambda manifests: _drop(_named(manifests, "NetworkPolicy", "moe-cluster-inside"), ("spec", "egress", 1)),
        "no DNS",
    ),
    "no API server": (
        pod.network_is_closed,
        remove("NetworkPolicy", "moe-cluster-api-server"),
        "does not reach the API server",
    ),
    "Ray for all": (
        pod.network_is_closed,
        lambda manifests: _drop(
            _named(manifests, "NetworkPolicy", "moe-cluster-inside"), ("spec", "ingress", 0, "from")
        ),
        "open to others",
    ),
    "the dashboard for clients": (
        pod.network_is_closed,
        put_into("NetworkPolicy", "moe-cluster-metrics", 8265, "spec", "ingress", 0, "ports", 0, "port"),
        "open to others are ['8265'",
    ),
    "latest": (pod.images_are_pinned, put("moe-cluster:latest", *HEAD_BOX, "image"), "names no version"),
    "two images": (pod.images_are_pinned, put("moe-cluster:0.0.9", *HEAD_BOX, "image"), "different images"),
    "no limit": (pod.every_pod_is_limited, drop_front(*FRONT_BOX, "resources"), "no limit of memory"),
}

AGREEMENT = {
    "unknown key": (agree.config_loads, in_config("device: cuda", "devise: cuda"), "devise"),
    "no such config": (agree.config_loads, put_front(["--config=/etc/x.yaml"], *FRONT_BOX, "args"), "no config"),
    "no such option": (agree.config_loads, put_front(["--confg=x"], *FRONT_BOX, "args"), "command line"),
    "embedded": (agree.head_is_where_all_look, in_config("-head-svc:6379", "-head:6379"), "the head is at"),
    "another head": (
        agree.head_is_where_all_look,
        put_into("RayCluster", "moe-cluster", "other", "metadata", "name"),
        "other-head-svc",
    ),
    "another port": (agree.port_is_one, in_config(" port: 50151", " port: 50160"), "front.port 50160"),
    "loopback": (agree.port_is_one, in_config("host: 0.0.0.0", "host: 127.0.0.1"), "not reached"),
    "probe elsewhere": (agree.port_is_one, put_front({"port": 1}, *FRONT_BOX, "readinessProbe", "grpc"), "port 1,"),
    "service elsewhere": (
        agree.port_is_one,
        put_into("Service", "moe-cluster", 80, "spec", "ports", 0, "port"),
        "port 80",
    ),
    "service for nobody": (
        agree.port_is_one,
        put_into("Service", "moe-cluster", {"a": "b"}, "spec", "selector"),
        "selects no pod",
    ),
    "hook elsewhere": (
        agree.hooks_find_the_front,
        set_variable("MOE_CLUSTER_TARGET", "front:50151", *EXPERT_GROUP),
        "'front:50151'",
    ),
    "no tokens": (agree.access_files_are_mounted, drop_front(*FRONT_BOX, "volumeMounts", -1), "is in no secret"),
    "a hook without a token": (
        agree.access_files_are_mounted,
        set_variable("MOE_CLUSTER_TOKEN_FILE", None, *EXPERT_GROUP),
        "without MOE_CLUSTER_TOKEN_FILE",
    ),
    "a hook with a token elsewhere": (
        agree.access_files_are_mounted,
        set_variable("MOE_CLUSTER_CA", "/ca.crt", *EXPERT_GROUP),
        "/ca.crt is in no secret",
    ),
    "killed while it recovers": (
        agree.probes_ask_what_the_front_tells,
        put_front("", *FRONT_BOX, "livenessProbe", "grpc", "service"),
        "is killed",
    ),
    "ready too early": (
        agree.probes_ask_what_the_front_tells,
        put_front("moecluster.alive", *FRONT_BOX, "readinessProbe", "grpc", "service"),
        "whole front",
    ),
    "no time to start": (agree.front_has_time, in_config("timeout_s: 900", "timeout_s: 1200"), "may take 4800"),
    "no time to end": (agree.front_has_time, put_front(30, "terminationGracePeriodSeconds"), "ending takes"),
    "given up early": (
        agree.front_has_time,
        lambda manifests: _put(front(manifests), 60, ("spec", "progressDeadlineSeconds")),
        "progressDeadlineSeconds 60",
    ),
    "two fronts": (
        agree.there_is_one_front,
        lambda manifests: _put(front(manifests), 2, ("spec", "replicas")),
        "two clusters",
    ),
    "hidden processes": (agree.there_is_one_front, drop_front("shareProcessNamespace"), "shareProcessNamespace"),
    "no sidecar": (agree.there_is_one_front, drop_front(*NODE_BOX, "restartPolicy"), "no sidecar"),
    "no CPU for data": (agree.there_is_one_front, put_front(["ray"], *NODE_BOX, "command"), "Ray Data"),
    "private scratch": (
        agree.there_is_one_front,
        put_front("home", *FRONT_BOX, "volumeMounts", 0, "name"),
        "/tmp is not shared",
    ),
    "too few places": (agree.groups_offer_what_actors_ask_for, put(0, *SPOT_GROUP, "maxReplicas"), "room for 2 expert"),
    "no place for the router": (
        agree.groups_offer_what_actors_ask_for,
        drop("workerGroupSpecs", ROUTER, "resources", "moe_router"),
        "room for 0 router",
    ),
    "another resource": (
        agree.groups_offer_what_actors_ask_for,
        put("1", *EXPERT_GROUP, "resources", "moe_experts"),
        "'moe_experts', which nobody",
    ),
    "GPUs that are not there": (
        agree.gpus_are_counted_alike,
        put("2", *EXPERT_GROUP, "resources", "GPU"),
        "nvidia.com/gpu 1, and GPU 2",
    ),
    "idle GPUs": (
        agree.gpus_are_counted_alike,
        put("2", *EXPERT_GROUP, "resources", "moe_expert"),
        "1 GPUs for 2 expert",
    ),
    "bounds of the config": (agree.placement_is_possible, in_config("min_actors: 2", "min_actors: 3"), "outside of"),
    "fewer than copies": (agree.placement_is_possible, in_config("min_actors: 2", "min_actors: 1"), "redundancy"),
    "no name": (agree.nodes_are_named, set_variable("RAY_OVERRIDE_LABELS", None, *EXPERT_GROUP), "it must set"),
    "name too early": (agree.nodes_are_named, set_variable("POD_NAME", "x", *EXPERT_GROUP), "must stand before"),
    "an option that Ray lacks": (
        agree.ray_takes_its_options,
        put("1", *EXPERT_GROUP, "rayStartParams", "num-gpu"),
        "no --num-gpu",
    ),
    "an option of the front's node": (
        agree.ray_takes_its_options,
        put_front(["ray", "start", "--adress=x"], *NODE_BOX, "command"),
        "no --adress",
    ),
    "data apart": (agree.data_is_shared, in_config("root: /data", "root: /tmp"), "no volume that is shared"),
    "another Ray": (agree.versions_agree, put("2.59.0", "rayVersion"), "the image has 2.60.0"),
    "another release": (agree.versions_agree, put("moe-cluster:0.0.9", *HEAD_BOX, "image"), "the project is at"),
    "elsewhere": (
        agree.one_name_space,
        put_into("Service", "moe-cluster", "default", "metadata", "namespace"),
        "'default'",
    ),
}

SCHEMA = {
    "unknown field": ("Service", ("spec", "prots"), [], "prots"),
    "wrong type": ("Deployment", ("spec", "replicas"), "three", "'three' is not of type 'integer'"),
    "unknown choice": ("Deployment", ("spec", "strategy", "type"), "Blue", "'Blue'"),
    "quantity": ("PersistentVolumeClaim", ("spec", "resources", "requests", "storage"), "100 GB", "does not match"),
    "missing": ("NetworkPolicy", ("spec",), {"policyTypes": ["Ingress"]}, "'podSelector' is a required"),
    "two probes": (
        "Deployment",
        ("spec", "template", "spec", "containers", 0, "livenessProbe", "exec"),
        {"command": ["true"]},
        "valid under each of",
    ),
    "value and source": (
        "Deployment",
        ("spec", "template", "spec", "containers", 0, "env", 0, "value"),
        "x",
        "valid under each of",
    ),
    "beyond the object": ("Role", ("rule",), [], "rule"),
}
RAY_SCHEMA = {
    "typo": (put(True, "enableInTreeAutoscalling"), "enableInTreeAutoscalling"),
    "type": (put("two", *EXPERT_GROUP, "minReplicas"), "'two' is not of type 'integer'"),
    "choice": (put("v3", "autoscalerOptions", "version"), "'v3'"),
    "field of a pod": (put(5, *EXPERT_POD, "terminationGracePeriod"), "terminationGracePeriod"),
    "field of a probe": (put({"gprc": {"port": 1}}, *EXPERT_BOX, "readinessProbe"), "gprc"),
    "missing": (drop(*EXPERT_GROUP, "groupName"), "'groupName' is a required"),
    "no quantity": (put("6 GB", *EXPERT_BOX, "resources", "limits", "memory"), "does not match"),
}


@cache
def _right() -> list[Manifest]:
    return overlay("spot")


@pytest.fixture
def manifests() -> list[Manifest]:
    return copy.deepcopy(_right())


@pytest.mark.parametrize("error", sorted(OPERATOR))
def test_what_the_operator_refuses(error: str, manifests: list[Manifest]) -> None:
    rule, change, words = OPERATOR[error]
    assert list(rule(ray_cluster(manifests))) == []
    change(manifests)
    assert words in "\n".join(rule(ray_cluster(manifests)))


@pytest.mark.parametrize("error", sorted(PODS | AGREEMENT))
def test_what_we_do_not_want(error: str, manifests: list[Manifest]) -> None:
    rule, change, words = (PODS | AGREEMENT)[error]
    assert list(rule(manifests)) == []
    change(manifests)
    assert words in "\n".join(rule(manifests))


@pytest.mark.parametrize("error", sorted(SCHEMA))
def test_fields_of_built_in_kinds(error: str, manifests: list[Manifest]) -> None:
    kind, path, value, words = SCHEMA[error]
    manifest = of_kind(manifests, kind)[0]
    _put(manifest, value, path)
    assert words in "\n".join(violations(manifest, core_schemas()[kind_of(manifest)]))


@pytest.mark.parametrize("error", ["unknown field", "wrong type", "missing", "beyond the object"])
def test_fields_of_built_in_kinds_by_kubernetes_validate(error: str, manifests: list[Manifest]) -> None:
    kind, path, value, words = SCHEMA[error]
    manifest = of_kind(manifests, kind)[0]
    assert api_violations(manifest, "1.30") == []
    _put(manifest, value, path)
    (fault,) = api_violations(manifest, "1.30")
    assert words in fault


@needs_crds
@pytest.mark.parametrize("error", sorted(RAY_SCHEMA))
def test_fields_of_the_ray_cluster(error: str, manifests: list[Manifest]) -> None:
    change, words = RAY_SCHEMA[error]
    change(manifests)
    folder = find_crds()
    assert folder is not None
    assert words in "\n".join(violations(ray_cluster(manifests), ray_schema(folder)))


@needs_crds
@pytest.mark.parametrize("kind", ["Deployment", "Service", "NetworkPolicy", "PersistentVolumeClaim"])
def test_fields_that_the_crds_embed(kind: str, manifests: list[Manifest]) -> None:
    folder = find_crds()
    assert folder is not None
    manifest = of_kind(manifests, kind)[0]
    target = manifest["spec"]
    if kind == "Deployment":
        target = target["template"]["spec"]
    if kind == "NetworkPolicy":
        target = target["egress"][0]
    target["surprise"] = 1
    faults = [v for _, part, schema in borrowed(ray_schema(folder), manifest) for v in violations(part, schema)]
    assert "surprise" in "\n".join(faults)


def test_every_rule_has_an_error_that_it_finds() -> None:
    rules = {*operator.OPERATOR_RULES, *pod.POD_RULES, *agree.AGREEMENT_RULES}
    assert {rule for rule, *_ in (*OPERATOR.values(), *PODS.values(), *AGREEMENT.values())} == rules
