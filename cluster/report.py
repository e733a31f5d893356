"""Pictures of a run: the loss curve and the experts' load, as PNG."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from cluster.backend import LoadStep

Curve = Sequence[tuple[int, float]]
"""(step, loss in nats a token)"""


def draw_losses(path: Path, training: Curve, heldout: Curve) -> None:
    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    axes.plot(*zip(*training, strict=True), linewidth=1, color="tab:blue", label="training, each step")
    if heldout:
        axes.plot(*zip(*heldout, strict=True), marker="o", color="tab:orange", label="held-out text")
        for step, loss in (heldout[0], heldout[-1]):
            axes.annotate(f"{loss:.2f}", (step, loss), textcoords="offset points", xytext=(4, 6))
    axes.set(xlabel="step", ylabel="loss (nats a token)", title="Loss")
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend()
    _save(figure, path)


def draw_load(path: Path, load_LE: Sequence[Sequence[int]], group_size: int) -> None:
    """Share of each expert of each layer, 1 being the mean; lines part the expert groups."""
    shares = _shares(load_LE)
    figure, axes = plt.subplots(figsize=(8, 1.2 + 0.5 * len(shares)), layout="constrained")
    image = axes.imshow(shares, aspect="auto", cmap="viridis", vmin=0)
    for group in range(group_size, len(shares[0]), group_size):
        axes.axvline(group - 0.5, color="white", linewidth=1)
    axes.set(xlabel="expert", ylabel="MoE layer", title="Expert load (1 = mean of the layer)")
    axes.set_yticks(range(len(shares)))
    figure.colorbar(image, ax=axes)
    _save(figure, path)


def draw_load_history(path: Path, history: Sequence[LoadStep], group_size: int) -> None:
    """Share of each expert over the steps of a window, summed over the layers; lines part the expert groups."""
    shares = _shares([step.load_E for step in history])
    first, last = history[0].version, history[-1].version
    num_experts = len(shares[0])
    figure, axes = plt.subplots(figsize=(8, min(12.0, 2.5 + 0.1 * num_experts)), layout="constrained")
    extent = (first - 0.5, last + 0.5, num_experts - 0.5, -0.5)
    image = axes.imshow([*zip(*shares, strict=True)], aspect="auto", cmap="viridis", vmin=0, extent=extent)
    for group in range(group_size, num_experts, group_size):
        axes.axhline(group - 0.5, color="white", linewidth=1)
    axes.set(xlabel="version (committed steps)", ylabel="expert", title="Expert load over time (1 = mean of the step)")
    axes.xaxis.get_major_locator().set_params(integer=True)
    figure.colorbar(image, ax=axes)
    _save(figure, path)


def _shares(load_XE: Sequence[Sequence[int]]) -> list[list[float]]:
    """Each row over its mean."""
    return [[load * len(load_E) / max(1, sum(load_E)) for load in load_E] for load_E in load_XE]


def _save(figure: plt.Figure, path: Path) -> None:
    figure.savefig(path, dpi=120)
    plt.close(figure)
