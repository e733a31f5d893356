"""Shared experts that are computed while routed tokens are away: once, from the same tensor, with the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from actors.trunk.shared import shared_of, watch
from tests.families import FAMILIES

QWEN = {**FAMILIES["qwen3_moe"], "shared_expert_intermediate_size": 16}


class Experts(nn.Module):
    """Routed experts behind a link: says when tokens go out and when sums are back."""

    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self._log = log

    def forward(self, x_TD: Tensor) -> Tensor:
        shared = shared_of(self)
        assert shared is not None
        meanwhile = shared.sending(x_TD)
        self._log.append("sent")
        meanwhile()
        self._log.append("received")
        return 2 * x_TD


class Shared(nn.Module):
    def __init__(self, log: list[str]) -> None:
        super().__init__()
        self.linear, self._log = nn.Linear(4, 4), log

    def forward(self, x: Tensor, *more: Any) -> Tensor:
        self._log.append("shared")
        return torch.sigmoid(self.linear(x))


Compute = Callable[["Block", Tensor], Tensor]


class Block(nn.Module):
    def __init__(self, compute: Compute) -> None:
        super().__init__()
        self.log: list[str] = []
        self._compute = compute
        self.experts = Experts(self.log)
        self.shared_experts = Shared(self.log)

    def forward(self, x_BSD: Tensor) -> Tensor:
        return self._compute(self, x_BSD)


def added_after(block: Block, x_BSD: Tensor) -> Tensor:
    """DeepSeek-V3, GLM-MoE."""
    return block.experts(x_BSD.view(-1, 4)).view_as(x_BSD) + block.shared_experts(x_BSD)


def of_the_flat_tensor(block: Block, x_BSD: Tensor) -> Tensor:
    x_TD = x_BSD.view(-1, 4)
    return (block.experts(x_TD) + block.shared_experts(x_TD)).view_as(x_BSD)


def before(block: Block, x_BSD: Tensor) -> Tensor:
    """Qwen2-MoE."""
    shared = block.shared_experts(x_BSD)
    return block.experts(x_BSD.view(-1, 4)).view_as(x_BSD) + shared


def with_more(block: Block, x_BSD: Tensor) -> Tensor:
    """Inkling."""
    return block.experts(x_BSD.view(-1, 4)).view_as(x_BSD) + block.shared_experts(x_BSD, 1)


def of_another_tensor(block: Block, x_BSD: Tensor) -> Tensor:
    return block.experts(x_BSD.view(-1, 4)).view_as(x_BSD) + block.shared_experts(x_BSD + 1)


def watched(compute: Compute) -> Block:
    torch.manual_seed(0)
    block = Block(compute)
    watch(block, "experts", torch.zeros(1, 1, 4))
    return block


def numbers(block: Block) -> tuple[Tensor, Tensor, Tensor]:
    """Output, gradients of the input and of the shared experts."""
    x_BSD = torch.randn(2, 3, 4, generator=torch.Generator().manual_seed(1), requires_grad=True)
    block.log.clear()
    y_BSD = block(x_BSD)
    block.shared_experts.linear.weight.grad = None
    y_BSD.square().sum().backward()
    assert x_BSD.grad is not None
    assert block.shared_experts.linear.weight.grad is not None
    return y_BSD.detach(), x_BSD.grad, block.shared_experts.linear.weight.grad


@pytest.mark.parametrize("compute", [added_after, of_the_flat_tensor])
def test_they_are_computed_between_the_halves(compute: Compute) -> None:
    block, late = watched(compute), watched(compute)
    late_shared = shared_of(late.experts)
    assert late_shared is not None
    late_shared._source = ""
    expected = numbers(late)
    assert late.log == ["sent", "received", "shared"]
    for _ in range(2):
        assert all(torch.equal(a, b) for a, b in zip(numbers(block), expected, strict=True))
        assert block.log == ["sent", "shared", "received"]


def of_two_tensors(block: Block, x_BSD: Tensor, scale: float | None = None) -> Tensor:
    """Its trial fails."""
    return added_after(block, x_BSD + (0 if x_BSD.any() else scale))  # type: ignore[operator]


@pytest.mark.parametrize("compute", [before, with_more, of_another_tensor, of_two_tensors])
def test_others_are_left_alone(compute: Compute) -> None:
    block = watched(compute)
    first = numbers(block)
    order = list(block.log)
    assert all(torch.equal(a, b) for a, b in zip(numbers(block), first, strict=True))
    assert block.log == order
    assert sorted(order) == ["received", "sent", "shared"]


def test_a_family_that_changes_its_mind_gets_what_it_asks_for() -> None:
    given = [lambda x: x, lambda x: x, lambda x: x + 1, lambda x: x]
    done: list[Tensor] = []
    block = watched(lambda b, x: b.experts(x.view(-1, 4)).view_as(x) + b.shared_experts(given[len(done)](x)))
    x_BSD = torch.randn(2, 3, 4)
    for _ in given:
        done.append(block(x_BSD))
    expected = [2 * x_BSD + torch.sigmoid(block.shared_experts.linear(change(x_BSD))) for change in given]
    assert all(torch.equal(a, b) for a, b in zip(done, expected, strict=True))
    shared = shared_of(block.experts)
    assert shared is not None
    assert not shared.is_early, "it is not tried again"


def test_a_tensor_that_was_changed_in_place_is_another() -> None:
    def changes(block: Block, x_BSD: Tensor) -> Tensor:
        y_BSD = block.experts(x_BSD.view(-1, 4)).view_as(x_BSD)
        if len(done) == 2:
            x_BSD += 1
        return y_BSD + block.shared_experts(x_BSD)

    done: list[Tensor] = []
    block, x_BSD = watched(changes), torch.randn(2, 3, 4)
    given = x_BSD.clone()
    with torch.no_grad():
        for _ in range(3):
            done.append(block(x_BSD))
        assert torch.equal(done[2], 2 * given + torch.sigmoid(block.shared_experts.linear(given + 1)))


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_activation_checkpointing_computes_the_same(use_reentrant: bool) -> None:
    block = watched(added_after)
    expected = numbers(block)

    class Checkpointed(Block):
        def __call__(self, x_BSD: Tensor) -> Tensor:
            result: Tensor = checkpoint(block, x_BSD, use_reentrant=use_reentrant)
            return result

    again = Checkpointed(added_after)
    again.shared_experts, again.log = block.shared_experts, block.log
    assert all(torch.equal(a, b) for a, b in zip(numbers(again), expected, strict=True))


def test_an_error_between_the_halves_leaves_nothing_behind() -> None:
    block = watched(added_after)
    expected = numbers(block)

    @contextmanager
    def failing() -> Iterator[None]:
        def fail(*args: object) -> None:
            raise ValueError("in between")

        handle = block.shared_experts.linear.register_forward_pre_hook(fail)
        try:
            yield
        finally:
            handle.remove()

    with failing(), pytest.raises(ValueError, match="in between"):
        numbers(block)
    assert all(torch.equal(a, b) for a, b in zip(numbers(block), expected, strict=True))
