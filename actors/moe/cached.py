"""The experts of one MoE layer whose weights are at home behind the device, and on it only while they are used.

Numbers are those of `ExpertStack`, bit for bit on a CPU: the same products of the same rows, group by group in whatever
order their weights come, and everything else for all rows at once. For that a pass visits each of the two matrices of a
group by itself, each on a shelf of its own, and none of them twice.

Gradients and moments stay at home. Biases, some thousandths of the weights, are sent along with each pass.

    place: room for one group; expert e of the stack is in place e // group_size
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Sequence

import torch
from torch import Tensor

from actors.expert.homes import Home
from actors.moe.cache import Forecast
from actors.moe.experts import MAX_PAIRS, ExpertStack, Saved, Template, Weights, Work
from actors.moe.grouped import add_grouped_outer, add_grouped_sum, grouped_mm_into
from actors.moe.shelf import Loader, Shelf


class CachedExperts(ExpertStack):
    """`homes` are those of the places, kept up to date by the owner of the list; `capacity` of their groups fit on the
    device at a time. `shapes`: of one expert."""

    def __init__(
        self,
        template: Template,
        layer: int,
        shapes: dict[str, tuple[int, ...]],
        homes: Sequence[Home],
        *,
        group_size: int,
        capacity: int,
        loader: Loader,
        max_pairs: int = MAX_PAIRS,
    ) -> None:
        super().__init__(template, {}, max_pairs=max_pairs)  # `weights` stay empty: passes look for them at home
        self.names = tuple(sorted(shapes))
        self._layer, self._shapes, self._homes, self._group_size = layer, shapes, homes, group_size
        self._loader = loader
        self._forecast = Forecast[Home]()
        self._shelves = {
            name: Shelf[Home](capacity, self._home_of(name), loader, self._forecast) for name in (self._in, self._out)
        }
        self.after_forward: Callable[[], None] = lambda: None
        """Called when a forward has been computed: what comes next may be loaded."""

    @property
    def num_experts(self) -> int:
        return len(self._homes) * self._group_size

    def shape(self, name: str) -> tuple[int, ...]:
        return self._shapes[name]

    @property
    def num_resident(self) -> int:
        """Matrices on the device."""
        return sum(len(shelf) for shelf in self._shelves.values())

    def forward(
        self, x_TD: Tensor, work: Work, *, keep: bool, weights: Weights | None = None
    ) -> tuple[Tensor, Saved | None]:
        """Of the weights at home alone: there is one version of them."""
        if keep:
            for home in self._homes:
                home.train()  # a disk without room for gradients is told before there are any
        self._forecast.note([home for home, _, _ in self._parts(work.counts_E)])
        result = super().forward(x_TD, work, keep=keep)
        self.after_forward()
        return result

    def anticipate(self) -> None:
        """Loads what the next forward is likely to ask for, in the background."""
        for shelf in self._shelves.values():
            shelf.anticipate(self._homes)

    def reload(self, homes: Collection[Home]) -> None:
        """These were written: what the device has of them is old."""
        for home in homes:
            for shelf in self._shelves.values():
                shelf.reload(home)

    def drop(self, home: Home) -> None:
        """What its place held is gone."""
        self._forecast.forget(home)
        for shelf in self._shelves.values():
            shelf.drop(home)

    def close(self) -> None:
        """Gives its slots back. Stacks refer to each other, so that they would wait for the garbage collector."""
        self.after_forward = lambda: None
        self._shelves.clear()
        self._forecast = Forecast()

    # -- as ExpertStack does it with all weights at hand --------------------------------------------------------------

    def _project(self, weights: Weights, name: str, rows_PM: Tensor, counts_E: Sequence[int]) -> Tensor:
        # Who has multiplied by the first matrix multiplies by the second next.
        return self._product(name, rows_PM, counts_E, then=self._out if name == self._in else None)

    def _project_back(self, weights: Weights, name: str, rows_PN: Tensor, counts_E: Sequence[int]) -> Tensor:
        return self._product(name, rows_PN, counts_E, back=True, then=self._in if name == self._out else None)

    def _product(
        self, name: str, rows: Tensor, counts_E: Sequence[int], *, then: str | None, back: bool = False
    ) -> Tensor:
        first, last = self.shape(name)
        out = rows.new_empty(len(rows), last if self._transposed != back else first)
        for part, counts, weight in self._visits(name, counts_E, then):
            matrices = self._matrices(weight)
            grouped_mm_into(out[part], rows[part], matrices.transpose(1, 2) if back else matrices, counts)
        return out

    def _accumulate_matrix(self, name: str, rows_PM: Tensor, grad_PN: Tensor, counts_E: Sequence[int]) -> None:
        left, right = (rows_PM, grad_PN) if self._transposed else (grad_PN, rows_PM)
        for home, rows, counts in self._parts(counts_E):
            with _Sum(home.training(self._layer)[name].gradient, self._loader.device) as gradient:
                add_grouped_outer(gradient, left[rows], right[rows], counts)

    def _accumulate_bias(self, name: str, grad_PN: Tensor, counts_E: Sequence[int]) -> None:
        for home, rows, counts in self._parts(counts_E):
            with _Sum(home.training(self._layer)[name].gradient, self._loader.device) as gradient:
                add_grouped_sum(gradient, grad_PN[rows], counts)

    def _length(self, weights: Weights) -> int:
        return self.num_experts

    def _bias(self, weights: Weights, name: str) -> Tensor | None:
        bias = f"{name}_bias"
        if bias not in self.names:
            return None
        return torch.cat([home.weights[self._layer][bias] for home in self._homes]).to(self._loader.device)

    # -- inside -------------------------------------------------------------------------------------------------------

    def _home_of(self, name: str) -> Callable[[Home], Tensor]:
        return lambda home: home.weights[self._layer][name]

    def _parts(self, counts_E: Sequence[int]) -> Iterator[tuple[Home, slice, Sequence[int]]]:
        """Of each place that has pairs: its home, its rows, counts of its experts."""
        size, start = self._group_size, 0
        for home, first in zip(self._homes, range(0, len(counts_E), size), strict=False):
            counts = counts_E[first : first + size]
            end = start + sum(counts)
            if end > start:
                yield home, slice(start, end), counts
            start = end

    def _visits(
        self, name: str, counts_E: Sequence[int], then: str | None
    ) -> Iterator[tuple[slice, Sequence[int], Tensor]]:
        """Rows, counts and weights of each group that has pairs; meanwhile those of matrix `then` are loaded."""
        parts = {home: (rows, counts) for home, rows, counts in self._parts(counts_E)}

        def expect() -> None:
            if then is not None:
                self._shelves[then].expect(list(parts))

        for home, weight in self._shelves[name].visit(parts, expect):
            yield *parts[home], weight


class _Sum:
    """Gives a tensor on the device into which to add what is to be added to `home`."""

    def __init__(self, home: Tensor, device: torch.device) -> None:
        self._home = home
        self._part = home if home.device.type == device.type else torch.zeros_like(home, device=device)

    def __enter__(self) -> Tensor:
        return self._part

    def __exit__(self, *error: object) -> None:
        if self._part is not self._home:
            self._home += self._part.cpu()
