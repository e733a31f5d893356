"""Manifests and the rest of the project agree: configs, ports, names, versions, resources and labels.

Manifests -> one line a fault, as in `pod_rules`.
"""

from __future__ import annotations

import json
import re
import tomllib
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from packaging.requirements import Requirement
from ray._private import ray_constants
from ray.autoscaler._private.kuberay.autoscaling_config import _generate_available_node_types_from_ray_cr_spec
from ray.scripts.scripts import start as ray_start

from cluster.cli import parser
from cluster.config import ClusterConfig
from cluster.configfile import load_cluster
from cluster.errors import ConfigError
from cluster.fabric.nodes import DATA_CPUS
from cluster.fabric.options import EXPERT_RESOURCE, NODE_LABEL, ROUTER_RESOURCE, expert_options, router_options
from cluster.placement.placement import ActorSlot, spread
from cluster.service.server import ALIVE
from tests.manifests.kustomize import K8S, REPOSITORY, Manifest, Pod, env, front, of_kind, pods, ray_cluster

Rule = Callable[[Sequence[Manifest]], Iterator[str]]

CONFIG_FOLDER = "/etc/moe-cluster/"
FRONT_END_S = 30
"""From the end of the front's grace to the end of the process, at most."""


def config_loads(manifests: Sequence[Manifest]) -> Iterator[str]:
    try:
        config_of(manifests)
    except ConfigError as error:
        yield f"config: {error}"
    except (KeyError, SystemExit) as error:
        yield f"front: its command line names no config that is mounted: {error}"


def config_of(manifests: Sequence[Manifest]) -> ClusterConfig:
    """As the front would load it: from the config map, with its command line's overrides."""
    container = _front_container(manifests)
    args = parser().parse_args([*container["command"][1:], *container.get("args", [])])
    files = _config_map(manifests)
    with TemporaryDirectory() as folder:
        for name, text in files.items():
            (Path(folder) / name).write_text(text)
        if not args.config.startswith(CONFIG_FOLDER) or args.config.removeprefix(CONFIG_FOLDER) not in files:
            raise KeyError(args.config)
        return load_cluster(Path(folder) / args.config.removeprefix(CONFIG_FOLDER), dict(args.overrides))


def _config_map(manifests: Sequence[Manifest]) -> dict[str, str]:
    (mounted,) = (v for v in front(manifests)["spec"]["template"]["spec"]["volumes"] if "configMap" in v)
    maps = {item["metadata"]["name"]: item["data"] for item in of_kind(manifests, "ConfigMap")}
    files: dict[str, str] = maps[mounted["configMap"]["name"]]
    return files


def head_is_where_all_look(manifests: Sequence[Manifest]) -> Iterator[str]:
    cluster = ray_cluster(manifests)
    address = f"{cluster['metadata']['name']}-head-svc:6379"  # KubeRay's util.go, GenerateHeadServiceName
    config = config_of(manifests)
    if (config.ray.mode, config.ray.address) != ("existing", address):
        yield f"config: ray.mode {config.ray.mode}, ray.address {config.ray.address!r}; the head is at {address}"
    if f"--address={address}" not in _ray_node(manifests)["command"]:
        yield f"front/ray-node: does not join {address}"


def port_is_one(manifests: Sequence[Manifest]) -> Iterator[str]:
    container, config = _front_container(manifests), config_of(manifests)
    named = {port["name"]: port["containerPort"] for port in container.get("ports", [])}
    ports = {"grpc": "port", "health": "health_port", "front-metrics": "metrics_port"}
    for name, key in ports.items():
        if named.get(name) != (wanted := getattr(config.front, key)):
            yield f"front: port {name} is {named.get(name)}, and front.{key} {wanted}"
    if config.front.host not in ("0.0.0.0", "::"):
        yield f"config: front.host {config.front.host} is not reached from other pods"
    for kind in ("startupProbe", "readinessProbe", "livenessProbe"):
        probe = container.get(kind, {}).get("grpc", {})
        if probe.get("port") != config.front.health_port:  # the other one is out of their reach once it speaks TLS
            yield f"front: {kind} asks port {probe.get('port')}, and front.health_port is {config.front.health_port}"
    for service in of_kind(manifests, "Service"):
        for port in service["spec"]["ports"]:
            if port["port"] != config.front.port or port["targetPort"] not in ("grpc", config.front.port):
                yield f"service {service['metadata']['name']}: port {port['port']} to {port['targetPort']}"
        if not any(_selects(service, pod) for pod in pods(manifests)):
            yield f"service {service['metadata']['name']}: selects no pod"


def _selects(service: Manifest, pod: Pod) -> bool:
    return all(pod.labels.get(key) == value for key, value in service["spec"]["selector"].items())


def hooks_find_the_front(manifests: Sequence[Manifest]) -> Iterator[str]:
    targets = {
        f"{s['metadata']['name']}:{p['port']}" for s in of_kind(manifests, "Service") for p in s["spec"]["ports"]
    }
    for pod in pods(manifests):
        for container in pod.containers:
            target = env(container).get("MOE_CLUSTER_TARGET")
            if target is not None and target not in targets:
                yield f"{pod.name}: MOE_CLUSTER_TARGET {target!r} is none of {', '.join(sorted(targets))}"


def access_files_are_mounted(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Those that the config names, and what the drain hook needs to be let in by a front that asks for it."""
    config = config_of(manifests).front
    files = {config.auth.tokens_file, config.tls.certificate, config.tls.key, config.tls.client_ca} - {""}
    yield from _unmounted("front", _front_container(manifests), pods(manifests)[0], files)
    for pod in pods(manifests):
        container = pod.spec["containers"][0]
        variables = env(container)
        if "DRAIN_TIMEOUT_S" not in variables:
            continue
        needed = {"MOE_CLUSTER_TOKEN_FILE": config.auth.tokens_file, "MOE_CLUSTER_CA": config.tls.certificate}
        for variable in (name for name, file in needed.items() if file and not variables.get(name)):
            yield f"{pod.name}: the front does not let the drain hook in without {variable}"
        yield from _unmounted(pod.name, container, pod, {variables[name] for name in needed if variables.get(name)})


def _unmounted(name: str, container: Manifest, pod: Pod, files: set[str]) -> Iterator[str]:
    secrets = {volume["name"] for volume in pod.spec["volumes"] if "secret" in volume}
    folders = {mount["mountPath"] for mount in container["volumeMounts"] if mount["name"] in secrets}
    for file in sorted(files):
        if str(Path(file).parent) not in folders:
            yield f"{name}: {file} is in no secret that is mounted"


def probes_ask_what_the_front_tells(manifests: Sequence[Manifest]) -> Iterator[str]:
    container = _front_container(manifests)
    for kind in ("startupProbe", "livenessProbe"):
        service = container.get(kind, {}).get("grpc", {}).get("service")
        if service != ALIVE:
            yield f"front: {kind} asks for {service!r}, which is not {ALIVE!r}: a cluster that recovers is killed"
    if container.get("readinessProbe", {}).get("grpc", {}).get("service", ""):
        yield "front: readinessProbe does not ask for the whole front"


def front_has_time(manifests: Sequence[Manifest]) -> Iterator[str]:
    config, spec = config_of(manifests), front(manifests)["spec"]
    container = _front_container(manifests)
    probe = container["startupProbe"]
    start_s = probe["failureThreshold"] * probe["periodSeconds"]
    # Up to three for the actors, one more for the front; `cluster.fabric.launch` and `cluster.serve`.
    needed_s = 4 * config.ray.start_timeout_s
    if start_s < needed_s:
        yield f"front: killed after {start_s} s of starting, which may take {needed_s:.0f} s"
    if spec.get("progressDeadlineSeconds", 600) <= start_s:
        yield f"front: progressDeadlineSeconds {spec.get('progressDeadlineSeconds', 600)} is before {start_s} s"
    pause_s = float(container["lifecycle"]["preStop"]["exec"]["command"][-1])
    end_s = pause_s + config.front.shutdown_grace_s + FRONT_END_S
    grace_s = spec["template"]["spec"]["terminationGracePeriodSeconds"]
    if grace_s < end_s:
        yield f"front: terminationGracePeriodSeconds {grace_s}, and ending takes up to {end_s:.0f} s"


def there_is_one_front(manifests: Sequence[Manifest]) -> Iterator[str]:
    spec = front(manifests)["spec"]
    if spec.get("replicas") != 1 or spec.get("strategy", {}).get("type") != "Recreate":
        yield "front: it is the driver of the cluster; two of them, also for a moment, are two clusters"
    if not spec["template"]["spec"].get("shareProcessNamespace"):
        yield "front: without shareProcessNamespace it does not find the Ray node beside it"
    node = _ray_node(manifests)
    if node.get("restartPolicy") != "Always":
        yield "front/ray-node: no sidecar; the front would start without it"
    if f"--num-cpus={DATA_CPUS}" not in node["command"]:
        yield f"front/ray-node: Ray Data needs {DATA_CPUS} CPUs there"
    shared = [{m["mountPath"]: m["name"] for m in c["volumeMounts"]} for c in (node, _front_container(manifests))]
    for path in ("/tmp", "/dev/shm"):
        if not shared[0].get(path) or shared[0].get(path) != shared[1].get(path):
            yield f"front: {path} is not shared with the Ray node beside it"


def groups_offer_what_actors_ask_for(manifests: Sequence[Manifest]) -> Iterator[str]:
    """As Ray's autoscaler reads the groups: it adds pods for what waits, if a group offers all of it."""
    config, types = config_of(manifests), _node_types(manifests)
    for who, options, wanted in (
        ("router", router_options(config), 1),
        ("expert", expert_options(config), config.experts.max_actors),
    ):
        room = sum(node["max_workers"] * _slots(node["resources"], _demand(options)) for node in types.values())
        if room < wanted:
            yield f"groups have room for {room} {who} actors, and the config wants up to {wanted}: {_demand(options)}"
    known = {"CPU", "GPU", "memory", ROUTER_RESOURCE, EXPERT_RESOURCE}
    for name, node in types.items():
        for resource in sorted(node["resources"].keys() - known):
            yield f"{name}: offers {resource!r}, which nobody asks for"


def _demand(options: dict[str, Any]) -> dict[str, float]:
    counts = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], **options["resources"]}
    return {name: amount for name, amount in counts.items() if amount}


def _slots(offer: dict[str, float], demand: dict[str, float]) -> int:
    return int(min(offer.get(name, 0) // amount for name, amount in demand.items()))


def _node_types(manifests: Sequence[Manifest]) -> dict[str, Any]:
    types: dict[str, Any] = _generate_available_node_types_from_ray_cr_spec(ray_cluster(manifests)["spec"])
    return types


def gpus_are_counted_alike(manifests: Sequence[Manifest]) -> Iterator[str]:
    for name, node in _node_types(manifests).items():
        group = next((pod.group for pod in pods(manifests) if pod.name == name), {})
        if not group:
            continue
        limits = group["template"]["spec"]["containers"][0]["resources"]["limits"]
        gpus, slots = int(limits.get("nvidia.com/gpu", 0)), node["resources"].get(EXPERT_RESOURCE, 0)
        if gpus != node["resources"].get("GPU", 0):
            yield f"{name}: nvidia.com/gpu {gpus}, and GPU {node['resources'].get('GPU', 0)}"
        if gpus and slots and gpus != slots:
            yield f"{name}: {gpus} GPUs for {slots:.0f} expert actors"


def placement_is_possible(manifests: Sequence[Manifest]) -> Iterator[str]:
    """The fewest actors and the first ones fit, each on a pod of its own, with all copies."""
    config, types = config_of(manifests), _node_types(manifests)
    experts = [node for node in types.values() if EXPERT_RESOURCE in node["resources"]]
    if sum(node["max_workers"] for node in experts) < config.experts.redundancy:
        yield f"experts.redundancy {config.experts.redundancy} needs as many expert pods"
    if not config.experts.min_actors <= config.experts.actors <= config.experts.max_actors:
        yield f"experts.actors {config.experts.actors} is outside of min_actors and max_actors"
    if config.experts.min_actors < config.experts.redundancy:
        yield f"experts.min_actors {config.experts.min_actors} is below the redundancy"
    num_experts = config.model.values.get("n_routed_experts")
    if num_experts is not None:
        for count in (config.experts.actors, config.experts.max_actors):
            slots = [ActorSlot(f"expert-{i}", f"pod-{i}") for i in range(count)]
            spread(num_experts, config.experts.group_size, slots, config.experts.redundancy)


def nodes_are_named(manifests: Sequence[Manifest]) -> Iterator[str]:
    """Every Ray node carries the label that its name is read from: the pod's name, which Kubernetes puts in."""
    for pod in pods(manifests):
        container = next((c for c in pod.containers if c["name"].startswith("ray-")), {})
        names = [item["name"] for item in container.get("env", [])]
        variable = ray_constants.LABELS_ENVIRONMENT_VARIABLE
        text = env(container).get(variable)
        if text is None or json.loads(text) != {NODE_LABEL: "$(POD_NAME)"}:
            yield f"{pod.name}: {variable} is {text!r}; it must set {NODE_LABEL} to $(POD_NAME)"
        elif "POD_NAME" not in names or names.index("POD_NAME") > names.index(variable):
            yield f"{pod.name}: POD_NAME must stand before {variable}, or it is not put in"


def ray_takes_its_options(manifests: Sequence[Manifest]) -> Iterator[str]:
    known = {option.removeprefix("--") for parameter in ray_start.params for option in parameter.opts}
    used = {pod.name: set(pod.group.get("rayStartParams", {})) for pod in pods(manifests) if pod.group}
    command = _ray_node(manifests)["command"]
    used["front/ray-node"] = {part.removeprefix("--").partition("=")[0] for part in command if part.startswith("--")}
    for name, options in used.items():
        for option in sorted(options - known):
            yield f"{name}: `ray start` has no --{option}"


def data_is_shared(manifests: Sequence[Manifest]) -> Iterator[str]:
    root = config_of(manifests).storage.root
    for pod in pods(manifests):
        if pod.name == "head":
            continue
        for container in pod.containers:
            mounts = {m["mountPath"]: m["name"] for m in container.get("volumeMounts", [])}
            claims = {v["name"] for v in pod.spec["volumes"] if "persistentVolumeClaim" in v}
            if mounts.get(root) not in claims:
                yield f"{pod.name}/{container['name']}: storage.root {root} is on no volume that is shared"


def versions_agree(manifests: Sequence[Manifest]) -> Iterator[str]:
    version = str(ray_cluster(manifests)["spec"].get("rayVersion"))
    if version != constraints().get("ray"):
        yield f"rayVersion {version}, and the image has {constraints().get('ray')}"
    if not project_requirements()["ray"].specifier.contains(version):
        yield f"rayVersion {version}, and pyproject.toml wants {project_requirements()['ray'].specifier}"
    tags = {c["image"].rpartition(":")[2] for pod in pods(manifests) for c in pod.containers}
    for tag in tags:
        if tag.partition("-")[0] != project()["version"]:
            yield f"image tag {tag}, and the project is at {project()['version']}"


def one_name_space(manifests: Sequence[Manifest]) -> Iterator[str]:
    (namespace,) = (item["metadata"]["name"] for item in of_kind(manifests, "Namespace"))
    for manifest in manifests:
        found = manifest["metadata"].get("namespace")
        if manifest["kind"] != "Namespace" and found != namespace:
            yield f"{manifest['kind']} {manifest['metadata']['name']}: namespace {found!r}, not {namespace!r}"


def _front_container(manifests: Sequence[Manifest]) -> Manifest:
    container: Manifest = front(manifests)["spec"]["template"]["spec"]["containers"][0]
    return container


def _ray_node(manifests: Sequence[Manifest]) -> Manifest:
    container: Manifest = front(manifests)["spec"]["template"]["spec"]["initContainers"][0]
    return container


# --- The project's own files ---------------------------------------------------------------------------------------


@cache
def project() -> dict[str, Any]:
    values: dict[str, Any] = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    return values


@cache
def project_requirements() -> dict[str, Requirement]:
    return {_normal(r.name): r for r in map(Requirement, project()["dependencies"])}


@cache
def constraints() -> dict[str, str]:
    """Package -> the one version that the image takes. `ValueError` at a line that pins nothing."""
    pins = {}
    for line in (K8S / "constraints.txt").read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = re.fullmatch(r"([A-Za-z0-9._-]+)==([A-Za-z0-9.!+]+)", line)
        if match is None:
            raise ValueError(f"k8s/constraints.txt: {line!r} pins nothing")
        pins[_normal(match[1])] = match[2]
    return pins


def _normal(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


AGREEMENT_RULES: tuple[Rule, ...] = (
    config_loads,
    head_is_where_all_look,
    port_is_one,
    hooks_find_the_front,
    access_files_are_mounted,
    probes_ask_what_the_front_tells,
    front_has_time,
    there_is_one_front,
    groups_offer_what_actors_ask_for,
    gpus_are_counted_alike,
    placement_is_possible,
    nodes_are_named,
    ray_takes_its_options,
    data_is_shared,
    versions_agree,
    one_name_space,
)
