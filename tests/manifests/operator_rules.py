"""What KubeRay's operator refuses when it sees a RayCluster, as pure functions: cluster -> one line a fault.

After ray-operator/controllers/ray/utils/validation.go of KubeRay 1.7, those of its rules that manifests of ours can
break; a feature whose gate is off by default counts as refused, except embedded storage, which k8s/README.md asks to be
switched on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping

from tests.manifests.kustomize import Manifest, groups

Rule = Callable[[Manifest], Iterator[str]]

DNS_1035 = re.compile(r"[a-z]([-a-z0-9]*[a-z0-9])?")
LABEL_NAME = re.compile(r"[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?")
LABEL_PREFIX = re.compile(r"[a-z0-9]([-a-z0-9.]{0,251}[a-z0-9])?")
MAX_NAME = 53
START_RESOURCES = ("num-cpus", "num-gpus", "memory", "resources")
MIN_RAY_TOKEN, MIN_RAY_PRIORITY = (2, 52), (2, 56)
V2_VARIABLE = "RAY_enable_autoscaler_v2"
GCS_MOUNT = "/data/gcs"
GCS_VOLUME = "gcs-storage"
GATED = ("networkPolicy", "tlsOptions", "historyServerOptions")


def name_is_short_dns(cluster: Manifest) -> Iterator[str]:
    name = cluster["metadata"]["name"]
    if not DNS_1035.fullmatch(name) or len(name) > MAX_NAME:
        yield f"metadata.name {name!r} is not a DNS-1035 label of at most {MAX_NAME} characters"


def every_group_has_a_container(cluster: Manifest) -> Iterator[str]:
    for name, group in groups(cluster):
        if not group["template"]["spec"].get("containers"):
            yield f"{name}: no container"


def resources_in_one_place(cluster: Manifest) -> Iterator[str]:
    for name, group in groups(cluster):
        twice = [key for key in START_RESOURCES if group.get("rayStartParams", {}).get(key)]
        if twice and group.get("resources"):
            yield f"{name}: both resources and rayStartParams {', '.join(twice)}"


def labels_at_the_top(cluster: Manifest) -> Iterator[str]:
    for name, group in groups(cluster):
        if "labels" in group.get("rayStartParams", {}):
            yield f"{name}: rayStartParams.labels; use the group's labels"
        for key, value in group.get("labels", {}).items():
            prefix, slash, last = key.rpartition("/")
            if not LABEL_NAME.fullmatch(last) or (slash and not LABEL_PREFIX.fullmatch(prefix)):
                yield f"{name}: label key {key!r} is not one of Kubernetes"
            if value and not LABEL_NAME.fullmatch(value):
                yield f"{name}: label {key} has the value {value!r}, which Kubernetes does not allow"


def bounds_in_order(cluster: Manifest) -> Iterator[str]:
    for group in cluster["spec"].get("workerGroupSpecs", []):
        name, low, high = group["groupName"], group.get("minReplicas"), group.get("maxReplicas")
        # Optional to the operator; Ray's autoscaler reads them without asking.
        if low is None or high is None:
            yield f"{name}: minReplicas and maxReplicas are needed"
            continue
        if low < 0 or low > high:
            yield f"{name}: minReplicas {low} and maxReplicas {high}"
        if not low <= group.get("replicas", low) <= high:
            yield f"{name}: replicas {group['replicas']} outside of {low} to {high}"


def autoscaler_v2_by_its_field(cluster: Manifest) -> Iterator[str]:
    spec = cluster["spec"]
    if not _is_v2(cluster):
        yield "enableInTreeAutoscaling and autoscalerOptions.version v2 are not both there"
    if V2_VARIABLE in _variables(spec["headGroupSpec"]):
        yield f"{V2_VARIABLE} beside autoscalerOptions.version"


def pods_are_not_restarted(cluster: Manifest) -> Iterator[str]:
    for name, group in groups(cluster):
        policy = group["template"]["spec"].get("restartPolicy", "Never")
        if policy != "Never":
            yield f"{name}: restartPolicy {policy} with autoscaler v2"


def idle_timeouts(cluster: Manifest) -> Iterator[str]:
    overall = cluster["spec"].get("autoscalerOptions", {}).get("idleTimeoutSeconds", 0)
    if overall < 0:
        yield f"autoscalerOptions.idleTimeoutSeconds {overall} is negative"
    for group in cluster["spec"].get("workerGroupSpecs", []):
        seconds = group.get("idleTimeoutSeconds")
        if seconds is not None and (seconds < 0 or not _is_v2(cluster)):
            yield f"{group['groupName']}: idleTimeoutSeconds {seconds} is negative, or without autoscaler v2"


def priority_is_known(cluster: Manifest) -> Iterator[str]:
    for group in cluster["spec"].get("workerGroupSpecs", []):
        if group.get("priority") and (ray_version(cluster) < MIN_RAY_PRIORITY or not _is_v2(cluster)):
            yield f"{group['groupName']}: priority needs Ray 2.56 or newer and autoscaler v2"


def state_of_the_head_has_one_owner(cluster: Manifest) -> Iterator[str]:
    options = cluster["spec"].get("gcsFaultToleranceOptions")
    head = cluster["spec"]["headGroupSpec"]
    variables = _variables(head)
    if options is None:
        yield "gcsFaultToleranceOptions: without them the cluster ends with its head"
        return
    for variable in ("REDIS_PASSWORD", "RAY_REDIS_ADDRESS", "REDIS_USERNAME"):
        if variable in variables:
            yield f"{variable} beside gcsFaultToleranceOptions"
    if "redis-password" in head.get("rayStartParams", {}) or "redis-username" in head.get("rayStartParams", {}):
        yield "rayStartParams redis-password or redis-username beside gcsFaultToleranceOptions"
    yield from (_embedded(options, head) if options.get("backend") == "rocksdb" else _redis(options))


def _embedded(options: Manifest, head: Manifest) -> Iterator[str]:
    for field in ("redisAddress", "redisUsername", "redisPassword", "externalStorageNamespace"):
        if field in options:
            yield f"gcsFaultToleranceOptions.{field} with backend rocksdb"
    storage = options.get("storage", {})
    if "claimName" in storage and storage.keys() & {"size", "storageClassName", "accessModes"}:
        yield "gcsFaultToleranceOptions.storage.claimName beside a size, class or access mode"
    if _variables(head) & {"RAY_gcs_storage", "RAY_gcs_storage_path"}:
        yield "RAY_gcs_storage is KubeRay's to set"
    spec = head["template"]["spec"]
    mounts = spec["containers"][0].get("volumeMounts", [])
    if any(m["mountPath"] == GCS_MOUNT or m["name"] == GCS_VOLUME for m in [*mounts]):
        yield f"a mount at {GCS_MOUNT}, which is KubeRay's"
    if any(volume["name"] == GCS_VOLUME for volume in spec.get("volumes", [])):
        yield f"a volume {GCS_VOLUME}, which is KubeRay's"


def _redis(options: Manifest) -> Iterator[str]:
    if "storage" in options:
        yield "gcsFaultToleranceOptions.storage with backend redis"
    if not options.get("redisAddress"):
        yield "gcsFaultToleranceOptions.redisAddress is missing"


def token_needs_a_version(cluster: Manifest) -> Iterator[str]:
    auth = cluster["spec"].get("authOptions", {})
    if auth.get("mode") != "token":
        yield "authOptions.mode is not token: whoever reaches a Ray port runs code"
    elif ray_version(cluster) < MIN_RAY_TOKEN:
        yield f"authOptions.mode token with rayVersion {cluster['spec'].get('rayVersion')!r}; it needs 2.52.0 or newer"
    if auth.get("enableK8sTokenAuth") and auth.get("secretName"):
        yield "authOptions: enableK8sTokenAuth and secretName"


def no_gated_feature(cluster: Manifest) -> Iterator[str]:
    for field in GATED:
        if field in cluster["spec"]:
            yield f"spec.{field} needs a feature gate that is off by default"


def upgrade_strategy_is_known(cluster: Manifest) -> Iterator[str]:
    strategy = cluster["spec"].get("upgradeStrategy", {}).get("type", "None")
    if strategy not in ("Recreate", "None"):
        yield f"upgradeStrategy.type {strategy!r}; a RayCluster has Recreate and None"


def nothing_suspended(cluster: Manifest) -> Iterator[str]:
    for name, group in groups(cluster):
        if group.get("suspend"):
            yield f"{name}: suspend with the autoscaler"


def groups_have_names_of_their_own(cluster: Manifest) -> Iterator[str]:
    names = [group["groupName"] for group in cluster["spec"].get("workerGroupSpecs", [])]
    for name in sorted(set(names)):
        if names.count(name) > 1:
            yield f"two groups are called {name!r}"
        if not DNS_1035.fullmatch(name):
            yield f"group name {name!r} is not a DNS label"


def ray_version(cluster: Manifest) -> tuple[int, ...]:
    """(0,) where there is none."""
    parts = re.findall(r"\d+", str(cluster["spec"].get("rayVersion") or "0"))
    return tuple(map(int, parts))


def _is_v2(cluster: Manifest) -> bool:
    spec = cluster["spec"]
    return bool(spec.get("enableInTreeAutoscaling")) and spec.get("autoscalerOptions", {}).get("version") == "v2"


def _variables(group: Mapping[str, Manifest]) -> set[str]:
    return {item["name"] for item in group["template"]["spec"]["containers"][0].get("env", [])}


OPERATOR_RULES: tuple[Rule, ...] = (
    name_is_short_dns,
    every_group_has_a_container,
    resources_in_one_place,
    labels_at_the_top,
    bounds_in_order,
    autoscaler_v2_by_its_field,
    pods_are_not_restarted,
    idle_timeouts,
    priority_is_known,
    state_of_the_head_has_one_owner,
    token_needs_a_version,
    no_gated_feature,
    upgrade_strategy_is_known,
    nothing_suspended,
    groups_have_names_of_their_own,
)
