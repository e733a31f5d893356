"""Every overlay as Ray's autoscaler sees it: pods come for our actors, go when they are empty, within min and max."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import pytest

from cluster.config import ClusterConfig
from cluster.fabric.options import EXPERT_RESOURCE, ROUTER_RESOURCE, away_from, expert_options, router_options
from tests.manifests.agreement import config_of
from tests.manifests.autoscaler import Actor, Autoscaler
from tests.manifests.kustomize import (
    OVERLAYS,
    Manifest,
    expert_groups,
    find_kubectl,
    overlay,
    ray_cluster,
)

pytestmark = pytest.mark.skipif(find_kubectl() is None, reason="kubectl is not installed, which renders the overlays")


@pytest.fixture(params=OVERLAYS, ids=lambda name: f"overlays/{name}")
def manifests(request: pytest.FixtureRequest) -> list[Manifest]:
    return copy.deepcopy(overlay(request.param))


@pytest.fixture
def config(manifests: list[Manifest]) -> ClusterConfig:
    return config_of(manifests)


def experts(config: ClusterConfig, number: int) -> list[Actor]:
    return [Actor(expert_options(config)) for _ in range(number)]


def running(manifests: Sequence[Manifest], config: ClusterConfig) -> Autoscaler:
    """A cluster that has just started."""
    autoscaler = Autoscaler(manifests)
    autoscaler.waiting = [Actor(router_options(config)), *experts(config, config.experts.actors)]
    autoscaler.turn()
    assert autoscaler.waiting == []
    return autoscaler


def group_bounds(manifests: Sequence[Manifest], key: str) -> dict[str, int]:
    return {group["groupName"]: group[key] for group in ray_cluster(manifests)["spec"]["workerGroupSpecs"]}


def test_the_fewest_pods_hold_what_a_cluster_begins_with(manifests: list[Manifest], config: ClusterConfig) -> None:
    empty = Autoscaler(manifests)
    empty.turn()
    least = {group: number for group, number in group_bounds(manifests, "minReplicas").items() if number}
    assert empty.counts() == least
    began = running(manifests, config)
    assert began.counts() == least, "nothing more is started for the first actors"
    assert len(began.of(EXPERT_RESOURCE)) == config.experts.actors, "copies of a group are on different pods"
    assert len(began.of(ROUTER_RESOURCE)) == 1


def test_pods_come_for_actors_that_wait_up_to_the_most(manifests: list[Manifest], config: ClusterConfig) -> None:
    autoscaler = running(manifests, config)
    for number in range(config.experts.actors + 1, config.experts.max_actors + 1):
        before = len(autoscaler.pods)
        autoscaler.waiting += experts(config, 1)
        autoscaler.turn()
        assert autoscaler.waiting == []
        assert len(autoscaler.pods) == before + 1
        assert len(autoscaler.of(EXPERT_RESOURCE)) == number
    most = sum(group["maxReplicas"] for group in expert_groups(ray_cluster(manifests)))
    autoscaler.waiting += experts(config, most)
    autoscaler.turn()
    assert len(autoscaler.of(EXPERT_RESOURCE)) == most
    assert len(autoscaler.waiting) == config.experts.max_actors
    assert autoscaler.counts() == group_bounds(manifests, "maxReplicas")


def test_new_actors_are_on_spot_machines_first(config: ClusterConfig, manifests: list[Manifest]) -> None:
    groups = expert_groups(ray_cluster(manifests))
    spot = [group["groupName"] for group in groups if group["labels"]["ray.io/market-type"] == "spot"]
    autoscaler = running(manifests, config)
    began = {pod.node_id for pod in autoscaler.pods}
    autoscaler.waiting += experts(config, 1)
    autoscaler.turn()
    (new,) = (pod for pod in autoscaler.pods if pod.node_id not in began)
    assert new.group == (spot or ["experts"])[0]
    assert new.labels["ray.io/market-type"] == ("spot" if spot else "on-demand")


def test_a_pod_that_is_drained_is_not_used_again_and_ends(manifests: list[Manifest], config: ClusterConfig) -> None:
    """As `moe-cluster drain` has it: another actor elsewhere, then this one's groups move, then it ends."""
    autoscaler = running(manifests, config)
    leaving = autoscaler.of(EXPERT_RESOURCE)[0]
    autoscaler.waiting = [Actor({**expert_options(config), **away_from([leaving.node_id])})]
    autoscaler.turn()
    assert autoscaler.waiting == []
    leaving.actors.clear()
    stay = config.experts.actors
    assert len(autoscaler.of(EXPERT_RESOURCE)) == stay
    again = Actor({**expert_options(config), **away_from([leaving.node_id])})
    autoscaler.waiting = [again]
    autoscaler.turn()
    assert again not in leaving.actors, "it has room, and is leaving"


def test_pods_go_when_they_have_been_empty_for_their_time(manifests: list[Manifest], config: ClusterConfig) -> None:
    autoscaler = running(manifests, config)
    autoscaler.waiting += experts(config, config.experts.max_actors - config.experts.actors)
    autoscaler.turn()
    groups = {group["groupName"]: group for group in expert_groups(ray_cluster(manifests))}
    for pod in autoscaler.of(EXPERT_RESOURCE)[config.experts.min_actors :]:
        pod.actors.clear()
    empty = {pod.node_id: pod.group for pod in autoscaler.pods if not pod.actors}
    assert len(empty) == config.experts.max_actors - config.experts.min_actors
    (idle_s,) = {groups[group]["idleTimeoutSeconds"] for group in empty.values()}
    autoscaler.turn(passed_s=idle_s - 1)
    assert empty.keys() <= {pod.node_id for pod in autoscaler.pods}, "the next actor may want them"
    autoscaler.turn(passed_s=2)
    assert empty.keys().isdisjoint(pod.node_id for pod in autoscaler.pods)
    least = {group: number for group, number in group_bounds(manifests, "minReplicas").items() if number}
    assert autoscaler.counts() == least
    for pod in autoscaler.pods:
        pod.actors.clear()
    autoscaler.turn(passed_s=10 * idle_s)
    assert autoscaler.counts() == least, "whether they are empty or not"


def test_a_group_that_lacks_what_actors_ask_for_gets_no_pods(manifests: list[Manifest], config: ClusterConfig) -> None:
    demand = Actor(expert_options(config)).demand
    assert set(demand) == ({"GPU", EXPERT_RESOURCE} if config.experts.device == "cuda" else {EXPERT_RESOURCE})
    for group in expert_groups(ray_cluster(manifests)):
        for resource in demand:
            group["resources"].pop(resource)
        group["template"]["spec"]["containers"][0]["resources"]["limits"].pop("nvidia.com/gpu", None)
    autoscaler = Autoscaler(manifests)
    autoscaler.waiting = experts(config, 1)
    autoscaler.turn()
    assert len(autoscaler.waiting) == 1
    assert autoscaler.of(EXPERT_RESOURCE) == []
