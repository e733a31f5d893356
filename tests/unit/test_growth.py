"""Growth without a cluster: gate rows and biases, where new groups are born, what is refused."""

from __future__ import annotations

from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from actors.errors import InvalidInput
from actors.expert.births import Births, copies_in_turn, evenly_spread, give_birth
from actors.expert.holdings import Holdings
from actors.expert.residency import Quarters
from actors.moe.growth import closed_choice, closed_scores, fresh_rows, moved_share, perturbed, split
from actors.moe.settings import GateSettings
from actors.router.growing import check_growth, grown_settings
from actors.trunk.config import config_of
from actors.trunk.init import initial_experts
from actors.trunk.model import ModelSource, skeleton
from actors.values import Growth, Placement
from cluster.control.growth import check_room
from cluster.placement.placement import ActorSlot, spread
from tests.families import FAMILIES

TOKENS, WIDTH, EXPERTS = 1024, 48, 8


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def inputs_and_rows(seed: int = 0, shift: float = 0.0) -> tuple[Tensor, Tensor]:
    """Inputs with a common part and very unequal variances, as hidden states have them."""
    drawn = torch.randn(TOKENS, WIDTH, generator=generator(seed), dtype=torch.float64)
    spread_D = torch.logspace(0.5, -1, WIDTH, dtype=torch.float64)
    rows = torch.randn(EXPERTS, WIDTH, generator=generator(seed + 1), dtype=torch.float64)
    return drawn * spread_D + shift, rows


def softmax_choice(rows: Tensor, inputs: Tensor, top_k: int, renormalised: bool) -> tuple[Tensor, Tensor]:
    weights, ids = (inputs @ rows.T).softmax(1).topk(top_k, dim=1)
    return ids, weights / weights.sum(1, keepdim=True) if renormalised else weights


class TestSplit:
    @pytest.mark.parametrize("renormalised", [True, False])
    @pytest.mark.parametrize("num_sets", [2, 4])
    @pytest.mark.parametrize("shift", [0.0, 3.0])
    def test_every_token_goes_on_with_the_same_mixture_and_every_set_gets_tokens(
        self, num_sets: int, renormalised: bool, shift: float
    ) -> None:
        inputs, rows = inputs_and_rows(shift=shift)
        grown = split(rows, inputs, num_sets, 2, generator(7), renormalises=renormalised)
        assert grown.shape == (num_sets * EXPERTS, WIDTH)
        before = softmax_choice(rows, inputs, 2, renormalised)
        after = softmax_choice(grown, inputs, 2, renormalised)
        sources = [*range(EXPERTS)] * num_sets
        assert moved_share(before, after, sources, EXPERTS) < 0.01
        tokens = Counter((after[0][:, 0] // EXPERTS).tolist())
        assert len(tokens) == num_sets
        assert min(tokens.values()) > TOKENS / num_sets / 3

    def test_a_second_cut_divides_every_set_of_the_first(self) -> None:
        inputs, rows = inputs_and_rows()
        once = split(rows, inputs, 2, 2, generator(1), renormalises=True)
        twice = split(once, inputs, 2, 2, generator(2), renormalises=True)
        ids, _ = softmax_choice(twice, inputs, 2, True)
        tokens = Counter((ids[:, 0] // EXPERTS).tolist())
        assert min(tokens[part] for part in range(4)) > TOKENS / 4 / 3

    def test_equal_seeds_give_equal_rows(self) -> None:
        inputs, rows = inputs_and_rows()
        one, same, other = (split(rows, inputs, 2, 2, generator(seed), renormalises=True) for seed in (1, 1, 2))
        assert torch.equal(one, same)
        assert not torch.equal(one, other)

    def test_rows_that_are_too_narrow_are_refused(self) -> None:
        inputs, rows = inputs_and_rows()
        with pytest.raises(InvalidInput, match="rows of width 48 cannot tell 16 copies"):
            split(rows, inputs, 16, 2, generator(), renormalises=True)


class TestClosed:
    def test_no_new_expert_reaches_an_old_one_until_it_is_open(self) -> None:
        bias_E = torch.tensor([0.5, -2.0, 0.0, 0.3])
        aim_N = torch.tensor([0.5, 0.0])
        closed = closed_choice(bias_E, aim_N, 10)
        assert (1 + closed.bias_N).max() < bias_E.min()
        torch.testing.assert_close(closed.bias_N + 10 * closed.rise_N, aim_N)

    def test_scores_without_bounds(self) -> None:
        scores = torch.randn(64, 6, generator=generator()) * 10
        new = torch.randn(64, 2, generator=generator(1)) * 10
        closed = closed_scores(scores, new, 3, torch.zeros(2), 5)
        assert torch.cat((scores, new + closed.bias_N), dim=1).topk(3, dim=1).indices.max() < 6
        torch.testing.assert_close(closed.bias_N + 5 * closed.rise_N, torch.zeros(2))

    def test_one_whose_aim_is_lower_still_does_not_fall(self) -> None:
        closed = closed_choice(torch.zeros(2), torch.tensor([-9.0]), 4)
        assert (closed.bias_N.item(), closed.rise_N.item()) == (-9.0, 0.0)


class TestParameters:
    @given(share=st.floats(0.001, 0.5), seed=st.integers(0, 99))
    @settings(max_examples=20, deadline=None)
    def test_noise_is_relative_to_each_expert(self, share: float, seed: int) -> None:
        stack = torch.randn(3, 40, 40, generator=generator(seed)) * torch.tensor([0.01, 1.0, 100.0]).view(3, 1, 1)
        noisy = perturbed(stack, share, generator(seed))
        relative = (noisy - stack).flatten(1).norm(dim=1) / stack.flatten(1).norm(dim=1)
        torch.testing.assert_close(relative, torch.full((3,), share), rtol=0.1, atol=0)
        assert torch.equal(noisy, perturbed(stack, share, generator(seed)))

    def test_without_noise_a_copy_is_equal_and_its_own(self) -> None:
        stack = torch.randn(2, 3, generator=generator())
        copy = perturbed(stack, 0.0, generator())
        assert torch.equal(copy, stack)
        assert copy.data_ptr() != stack.data_ptr()

    def test_fresh_rows_are_as_large_as_the_old_ones(self) -> None:
        rows = 0.02 * torch.randn(64, 256, generator=generator())
        fresh = fresh_rows(rows, 32, generator(1))
        assert fresh.shape == (32, 256)
        assert fresh.std().item() == pytest.approx(0.02, rel=0.05)


class TestMovedShare:
    IDS, WEIGHTS = torch.tensor([[0, 1], [2, -1]]), torch.tensor([[0.75, 0.25], [1.0, 0.5]])

    @pytest.mark.parametrize(
        ("ids", "weights", "moved"),
        [
            ([[0, 1], [2, -1]], [[0.75, 0.25], [1.0, 9.0]], 0.0),
            ([[4, 3], [5, -1]], [[0.25, 0.75], [1.0, 0.0]], 0.0),  # copies count as their sources
            ([[0, 3], [2, -1]], [[0.75, 0.25], [1.0, 0.0]], 0.125),  # one pair of a quarter, of a weight of 2
            ([[6, 6], [6, -1]], [[0.5, 0.5], [1.0, 0.0]], 1.0),  # all of it to a fresh one
        ],
    )
    def test_it_is_the_weight_that_goes_elsewhere(
        self, ids: list[list[int]], weights: list[list[float]], moved: float
    ) -> None:
        sources = [0, 1, 2, 0, 1, 2, -1]
        after = torch.tensor(ids), torch.tensor(weights)
        assert moved_share((self.IDS, self.WEIGHTS), after, sources, 3) == pytest.approx(moved)


class TestWhereGroupsAreBorn:
    @given(actors=st.integers(1, 6), groups=st.integers(1, 12), new=st.integers(1, 24), redundancy=st.integers(1, 3))
    @settings(max_examples=60, deadline=None)
    def test_actors_hold_evenly_many_on_nodes_of_their_own(
        self, actors: int, groups: int, new: int, redundancy: int
    ) -> None:
        actors, redundancy = min(actors, groups), min(redundancy, actors, groups)
        slots = [ActorSlot(f"e{i}", f"n{i}") for i in range(actors)]
        placement = spread(groups * 2, 2, slots, redundancy)
        grown = Births(Growth(0), evenly_spread(placement, new)).placed(placement)
        assert (grown.epoch, grown.num_groups) == (placement.epoch + 1, groups + new)
        assert grown.holders[:groups] == placement.holders
        assert all(len(set(held)) == redundancy for held in grown.holders)
        held = Counter(actor for holders in grown.holders for actor in holders)
        assert max(held.values()) <= 2 + redundancy + (groups + new) * redundancy / actors

    def test_in_turn_expert_e_is_a_copy_of_e_modulo_the_old_number(self) -> None:
        assert copies_in_turn(3, 6) == {3: 0, 4: 1, 5: 2, 6: 0, 7: 1, 8: 2}

    def test_the_message_crosses_whole(self) -> None:
        births = Births(Growth(16, "fresh", 0.2, 5, 7), {4: 1, 5: 3})
        assert Births.of(births.fields()) == births
        assert Births.of({"epoch": 3}) is None


MODEL = skeleton(ModelSource(values={"model_type": "mixtral", **FAMILIES["mixtral"]}))


def holdings(*groups: int) -> Holdings:
    def load(layer: int, groups: object) -> dict[str, Tensor]:
        return initial_experts(MODEL, layer, groups, 2, 0)  # type: ignore[arg-type]

    return Holdings(Quarters(MODEL, 2, torch.device("cpu")), groups, load)


class TestBirths:
    @pytest.mark.parametrize("mode", ["copy", "fresh"])
    def test_equal_at_every_holder_whatever_else_it_holds(self, mode: str) -> None:
        births = Births(Growth(12, mode, 0.05, seed=2), {4: 1, 5: 0})
        one, other = holdings(0, 1), holdings(2, 1, 3, 0)
        give_birth(one, lambda: MODEL, 2, births, [4, 5])
        give_birth(other, lambda: MODEL, 2, births, [5, 4])
        for group in (4, 5):
            for layer in range(len(MODEL.layers)):
                here, there = one.read(group, layer), other.read(group, layer)
                assert here[1] == there[1]
                assert all(torch.equal(a, b) for a, b in zip(here[0], there[0], strict=True))
        source, born = one.read(1, 0)[0], one.read(4, 0)[0]
        assert torch.allclose(source[0], born[0], rtol=0, atol=0.05 * 6 * source[0].std()) is (mode == "copy")

    def test_one_that_failed_is_made_anew(self) -> None:
        one = holdings(0, 1)
        give_birth(one, lambda: MODEL, 2, Births(Growth(10), {4: 1}), [4])
        one.hold((0, 1))
        give_birth(one, lambda: MODEL, 2, Births(Growth(10, perturbation=0.0), {4: 0}), [4])
        one.hold((0, 1, 4))
        assert torch.equal(one.read(4, 0)[0][0], one.read(0, 0)[0][0])
        assert one.groups == (0, 1, 4)


class TestRefused:
    @pytest.mark.parametrize(
        ("growth", "field"),
        [
            (Growth(8), "num_experts"),
            (Growth(15), "num_experts"),
            (Growth(16, "other"), "mode"),
            (Growth(16, perturbation=-0.1), "perturbation"),
            (Growth(16, open_steps=0), "open_steps"),
        ],
    )
    def test_the_field_is_named(self, growth: Growth, field: str) -> None:
        with pytest.raises(InvalidInput) as caught:
            check_growth(growth, 8, 2)
        assert caught.value.field == field

    def test_parts_of_a_gate_keep_their_size(self) -> None:
        gate = GateSettings(kind="deepseek", num_groups=4, groups_per_token=2)
        assert grown_settings(gate, 8, 12).num_groups == 6
        with pytest.raises(InvalidInput, match="a multiple of 2"):
            grown_settings(gate, 8, 11)
        with pytest.raises(InvalidInput, match="node-limited"):
            grown_settings(GateSettings(kind="node_limited", num_nodes=2), 8, 16)

    @pytest.mark.parametrize("family", FAMILIES)
    def test_configs_of_the_families_know_their_number(self, family: str) -> None:
        grown = skeleton(ModelSource(values={"model_type": family, **FAMILIES[family]}, num_experts=24))
        assert grown.num_experts == 24
        assert {layer.num_experts for layer in grown.layers} == {24}

    def test_a_config_whose_gate_has_parts(self) -> None:
        source = ModelSource(values={"model_type": "deepseek_v3", **FAMILIES["deepseek_v3"]}, num_experts=12)
        assert config_of(source).n_group == 3
        with pytest.raises(InvalidInput, match="a multiple of 4"):
            skeleton(ModelSource(values=source.values, num_experts=10))

    def test_actors_without_room(self) -> None:
        placement = Placement(1, (("a", "b"), ("b", "a")), 4)
        check_room(placement, 16, 4)
        check_room(placement, 64, 0)
        with pytest.raises(InvalidInput, match="would be 10 expert groups with their copies, and 2 actors may hold 8"):
            check_room(placement, 20, 4)
