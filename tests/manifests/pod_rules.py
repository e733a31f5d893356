"""What must hold of every pod, and of the objects around pods: manifests -> one line a fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from tests.manifests.kustomize import (
    EXPERT_ROLE,
    ROLE_LABEL,
    Manifest,
    Pod,
    env,
    expert_groups,
    of_kind,
    pods,
    ray_cluster,
    selects,
)

Rule = Callable[[Sequence[Manifest]], Iterator[str]]

SECRETS = {
    "moe-cluster": "KubeRay makes it",
    "moe-cluster-storage": "keys of a bucket",
    "moe-cluster-front": "the front's digests of tokens, its certificate and key",
    "moe-cluster-client": "the token with which a node that leaves asks the front, and the front's CA",
    "moe-cluster-redis": "password of the Redis behind the head",
}
"""Those that manifests may refer to; none is in them."""
SECRET_WORDS = ("TOKEN", "PASSWORD", "SECRET", "ACCESS_KEY")
RIGHTS = {("", "pods"): {"get", "list"}, ("ray.io", "rayclusters"): {"get", "patch"}}
PART_OF = {"app.kubernetes.io/part-of": "moe-cluster"}
MIN_HEAD_BYTES = 4 << 30
UNITS = {"Ki": 1 << 10, "Mi": 1 << 20, "Gi": 1 << 30, "Ti": 1 << 40, "k": 10**3, "M": 10**6, "G": 10**9, "T": 10**12}


def containers_are_locked_down(manifests: Sequence[Manifest]) -> Iterator[str]:
    """As Kubernetes' pod security standard `restricted` wants it, and a root file system that nobody writes to."""
    for pod in pods(manifests):
        context = pod.spec.get("securityContext", {})
        if not context.get("runAsNonRoot") or not context.get("runAsUser"):
            yield f"{pod.name}: may run as root"
        if context.get("seccompProfile", {}).get("type") != "RuntimeDefault":
            yield f"{pod.name}: no seccomp profile"
        for container in pod.containers:
            yield from _unlocked(f"{pod.name}/{container['name']}", container.get("securityContext", {}))
    autoscaler = ray_cluster(manifests)["spec"].get("autoscalerOptions", {})
    yield from _unlocked("autoscaler", autoscaler.get("securityContext", {}))


def _unlocked(name: str, context: Manifest) -> Iterator[str]:
    if context.get("allowPrivilegeEscalation") is not False:
        yield f"{name}: allowPrivilegeEscalation is not false"
    if context.get("readOnlyRootFilesystem") is not True:
        yield f"{name}: root file system is writable"
    if "ALL" not in context.get("capabilities", {}).get("drop", []):
        yield f"{name}: keeps capabilities"


def what_is_mounted_is_there(manifests: Sequence[Manifest]) -> Iterator[str]:
    claims = {claim["metadata"]["name"] for claim in of_kind(manifests, "PersistentVolumeClaim")}
    maps = {item["metadata"]["name"] for item in of_kind(manifests, "ConfigMap")} | {"kube-root-ca.crt"}
    for pod in pods(manifests):
        volumes = {volume["name"]: volume for volume in pod.spec.get("volumes", [])}
        for container in pod.containers:
            for mount in container.get("volumeMounts", []):
                if mount["name"] not in volumes:
                    yield f"{pod.name}/{container['name']}: mounts {mount['name']}, which is no volume"
        for name, volume in volumes.items():
            claim = volume.get("persistentVolumeClaim", {}).get("claimName")
            if claim is not None and claim not in claims:
                yield f"{pod.name}: volume {name} is of the claim {claim!r}, which does not exist"
            config = volume.get("configMap", {}).get("name")
            if config is not None and config not in maps:
                yield f"{pod.name}: volume {name} is of the config map {config!r}, which does not exist"


def scratch_is_writable(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Where Ray and Python write although the root file system is read-only."""
    for pod in pods(manifests):
        empty = {volume["name"] for volume in pod.spec.get("volumes", []) if "emptyDir" in volume}
        for container in pod.containers:
            writable = {m["mountPath"] for m in container.get("volumeMounts", []) if m["name"] in empty}
            for needed in ("/tmp", env(container).get("HOME", "/")):
                if needed not in writable:
                    yield f"{pod.name}/{container['name']}: cannot write to {needed}"


def secrets_by_reference(manifests: Sequence[Manifest]) -> Iterator[str]:
    for secret in of_kind(manifests, "Secret"):
        yield f"a Secret in the manifests: {secret['metadata']['name']}"
    for pod in pods(manifests):
        for container in pod.containers:
            where = f"{pod.name}/{container['name']}"
            for name in env(container):
                if any(word in name.upper() for word in SECRET_WORDS) and not name.endswith("_FILE"):
                    yield f"{where}: {name} is written out"
            for name in _secrets(container):
                if name not in SECRETS:
                    yield f"{where}: refers to the secret {name!r}; known are {', '.join(sorted(SECRETS))}"
        for volume in pod.spec.get("volumes", []):
            name = volume.get("secret", {}).get("secretName")
            if name is not None and name not in SECRETS:
                yield f"{pod.name}: mounts the secret {name!r}; known are {', '.join(sorted(SECRETS))}"


def _secrets(container: Manifest) -> list[str]:
    single = [item["valueFrom"]["secretKeyRef"]["name"] for item in container.get("env", []) if _is_secret(item)]
    return single + [item["secretRef"]["name"] for item in container.get("envFrom", []) if "secretRef" in item]


def _is_secret(item: Manifest) -> bool:
    return "secretKeyRef" in item.get("valueFrom", {})


def least_rights(manifests: Sequence[Manifest]) -> Iterator[str]:
    accounts = {account["metadata"]["name"]: account for account in of_kind(manifests, "ServiceAccount")}
    for name, account in accounts.items():
        if account.get("automountServiceAccountToken") is not False:
            yield f"service account {name}: its token is mounted everywhere"
    for pod in pods(manifests):
        if pod.spec.get("serviceAccountName") not in accounts:
            yield f"{pod.name}: service account {pod.spec.get('serviceAccountName')!r} does not exist"
        if pod.spec.get("automountServiceAccountToken") is not False:
            yield f"{pod.name}: every container has the API server's token"
    head = next(pod for pod in pods(manifests) if pod.name == "head").spec.get("serviceAccountName")
    for binding in of_kind(manifests, "RoleBinding"):
        for subject in binding["subjects"]:
            if subject["name"] != head:
                yield f"role binding {binding['metadata']['name']}: rights for {subject['name']}, not the head alone"
    for role in of_kind(manifests, "Role"):
        yield from _too_many_rights(role, ray_cluster(manifests)["metadata"]["name"])
    for kind in ("ClusterRole", "ClusterRoleBinding"):
        for item in of_kind(manifests, kind):
            yield f"{kind} {item['metadata']['name']}: rights beyond the namespace"


def _too_many_rights(role: Manifest, cluster: str) -> Iterator[str]:
    for rule in role["rules"]:
        for group in rule["apiGroups"]:
            for resource in rule["resources"]:
                extra = set(rule["verbs"]) - RIGHTS.get((group, resource), set())
                if extra:
                    yield f"role {role['metadata']['name']}: may {', '.join(sorted(extra))} {resource}"
        if "rayclusters" in rule["resources"] and rule.get("resourceNames") != [cluster]:
            yield f"role {role['metadata']['name']}: rights on more RayClusters than {cluster!r}"


def head_has_memory_and_no_actors(manifests: Sequence[Manifest]) -> Iterator[str]:
    head = ray_cluster(manifests)["spec"]["headGroupSpec"]
    limit = head["template"]["spec"]["containers"][0].get("resources", {}).get("limits", {}).get("memory", "0")
    if size_bytes(limit) < MIN_HEAD_BYTES:
        yield f"head: {limit} of memory; it needs 4Gi at least"
    offers = {name: amount for name, amount in head.get("resources", {}).items() if float(amount)}
    if offers or head.get("resources", {}).get("CPU") != "0":
        yield f"head: offers {offers or 'its CPUs'} to actors"


def experts_leave_in_order(manifests: Sequence[Manifest]) -> Iterator[str]:
    for group in expert_groups(ray_cluster(manifests)):
        name, spec = group["groupName"], group["template"]["spec"]
        container = spec["containers"][0]
        hook = container.get("lifecycle", {}).get("preStop", {}).get("exec", {}).get("command", [])
        if not any(part.endswith("/drain.sh") for part in hook):
            yield f"{name}: no preStop that drains"
        drain_s, grace_s = int(env(container).get("DRAIN_TIMEOUT_S", "0")), spec["terminationGracePeriodSeconds"]
        # The hook itself gives up 15 s after the command should have.
        if not 0 < drain_s <= grace_s - 15:
            yield f"{name}: DRAIN_TIMEOUT_S {drain_s} does not fit into terminationGracePeriodSeconds {grace_s}"
        if env(container).get("NODE_NAME") != "$(POD_NAME)":
            yield f"{name}: NODE_NAME is not the pod's name"
        if "idleTimeoutSeconds" not in group:
            yield f"{name}: no idleTimeoutSeconds"


def experts_are_spread(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Over zones where it can be, and over machines always unless there is one only, as in kind."""
    for pod in _experts(manifests):
        spread = {
            item["topologyKey"]
            for item in pod.spec.get("topologySpreadConstraints", [])
            if selects(item["labelSelector"], pod.labels)
        }
        if "topology.kubernetes.io/zone" not in spread:
            yield f"{pod.name}: not spread over zones"
        if _has_many_writers(manifests) and not _is_alone_on_its_machine(pod):
            yield f"{pod.name}: two of them may be on one machine, and copies with them"


def _is_alone_on_its_machine(pod: Pod) -> bool:
    terms = (
        pod.spec.get("affinity", {})
        .get("podAntiAffinity", {})
        .get("requiredDuringSchedulingIgnoredDuringExecution", [])
    )
    return any(
        term["topologyKey"] == "kubernetes.io/hostname" and selects(term["labelSelector"], pod.labels) for term in terms
    )


def _has_many_writers(manifests: Sequence[Manifest]) -> bool:
    """Of a volume that only one machine can mount, all users are on that machine."""
    return all("ReadWriteMany" in claim["spec"]["accessModes"] for claim in of_kind(manifests, "PersistentVolumeClaim"))


def spot_pods_are_labelled(manifests: Sequence[Manifest]) -> Iterator[str]:
    for pod in pods(manifests):
        tolerates = any(_names_spot(item) for item in pod.spec.get("tolerations", []))
        market = pod.labels.get("ray.io/market-type")
        is_spot = market == "spot"
        if tolerates != is_spot:
            yield f"{pod.name}: ray.io/market-type is {market!r}, tolerations say otherwise"
        if is_spot and pod.labels.get(ROLE_LABEL) != EXPERT_ROLE:
            yield f"{pod.name}: only experts may be on spot machines"


def _names_spot(toleration: Manifest) -> bool:
    return "spot" in f"{toleration.get('key')} {toleration.get('value')}"


def budgets_leave_room(manifests: Sequence[Manifest]) -> Iterator[str]:
    all_pods = pods(manifests)
    for budget in of_kind(manifests, "PodDisruptionBudget"):
        name, spec = budget["metadata"]["name"], budget["spec"]
        chosen = [pod for pod in all_pods if selects(spec["selector"], pod.labels)]
        if not chosen:
            yield f"{name}: selects no pod"
        # RayCluster has no scale subresource: a percentage or maxUnavailable of its pods cannot be computed.
        if any(pod.group for pod in chosen) and not isinstance(spec.get("minAvailable"), int):
            yield f"{name}: Ray pods need minAvailable as a number"
            continue
        experts = [pod for pod in chosen if pod.labels.get(ROLE_LABEL) == EXPERT_ROLE]
        fewest = sum(pod.group["minReplicas"] for pod in experts)
        if experts and not 0 < spec.get("minAvailable", 0) < fewest:
            yield f"{name}: minAvailable {spec.get('minAvailable')} of at least {fewest} expert pods"
    for pod in all_pods:
        if not any(selects(b["spec"]["selector"], pod.labels) for b in of_kind(manifests, "PodDisruptionBudget")):
            yield f"{pod.name}: no disruption budget"


def network_is_closed(manifests: Sequence[Manifest]) -> Iterator[str]:
    policies = of_kind(manifests, "NetworkPolicy")
    for pod in pods(manifests):
        mine = [policy["spec"] for policy in policies if selects(policy["spec"]["podSelector"], pod.labels)]
        kinds = {kind for spec in mine for kind in spec["policyTypes"]}
        if kinds != {"Ingress", "Egress"}:
            yield f"{pod.name}: network policies cover {sorted(kinds) or 'nothing'}"
        egress = [rule for spec in mine for rule in spec.get("egress", [])]
        if not any(_ports(rule) >= {("UDP", 53), ("TCP", 53)} for rule in egress):
            yield f"{pod.name}: no DNS, without which it finds nobody"
        has_api = any(("TCP", 443) in _ports(rule) and "to" not in rule for rule in egress)
        if pod.name == "head" and not has_api:
            yield "head: the autoscaler does not reach the API server"
        for spec in mine:
            for rule in spec.get("ingress", []):
                yield from _open_to_others(pod, rule)


def _open_to_others(pod: Pod, rule: Manifest) -> Iterator[str]:
    """Other pods come in by named ports only: grpc to the front, metrics of Ray and of the front."""
    own = rule.get("from") == [{"podSelector": {"matchLabels": PART_OF}}]
    ports = {port for _, port in _ports(rule)}
    allowed = {"metrics", "front-metrics"} | ({"grpc"} if pod.name.endswith("-front") else set())
    if not own and ("from" not in rule or not ports or not ports <= allowed):
        yield f"{pod.name}: open to others are {sorted(map(str, ports)) or 'all ports'}"


def _ports(rule: Manifest) -> set[tuple[str, int | str]]:
    return {(item["protocol"], item["port"]) for item in rule.get("ports", [])}


def images_are_pinned(manifests: Sequence[Manifest]) -> Iterator[str]:
    images = {container["image"] for pod in pods(manifests) for container in pod.containers}
    for image in sorted(images):
        _, colon, tag = image.rpartition("/")[2].partition(":")
        if "@sha256:" not in image and (not colon or tag == "latest"):
            yield f"image {image!r} names no version"
    if len(images) > 1:
        yield f"pods of one cluster run different images: {', '.join(sorted(images))}"


def every_pod_is_limited(manifests: Sequence[Manifest]) -> Iterator[str]:
    for pod in pods(manifests):
        for container in pod.containers:
            resources = container.get("resources", {})
            if "memory" not in resources.get("limits", {}) or "cpu" not in resources.get("requests", {}):
                yield f"{pod.name}/{container['name']}: asks for no CPU, or has no limit of memory"


def size_bytes(quantity: str) -> float:
    number = quantity.rstrip("kKMGTi")
    return float(number) * UNITS.get(quantity[len(number) :], 1)


def _experts(manifests: Sequence[Manifest]) -> list[Pod]:
    return [pod for pod in pods(manifests) if pod.labels.get(ROLE_LABEL) == EXPERT_ROLE]


POD_RULES: tuple[Rule, ...] = (
    containers_are_locked_down,
    what_is_mounted_is_there,
    scratch_is_writable,
    secrets_by_reference,
    least_rights,
    head_has_memory_and_no_actors,
    experts_leave_in_order,
    experts_are_spread,
    spot_pods_are_labelled,
    budgets_leave_room,
    network_is_closed,
    images_are_pinned,
    every_pod_is_limited,
)
