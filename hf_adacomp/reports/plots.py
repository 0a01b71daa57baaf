"""Pictures of code lengths. Needs matplotlib, which the extra `plots` installs."""

from __future__ import annotations

import math
from importlib.util import find_spec
from itertools import pairwise
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from ..fitting.token_counts import checked_counts
from ..integration.compressed_tables import require_compressed

if TYPE_CHECKING:
    from matplotlib.figure import Figure

BLUE, ORANGE = "#0072B2", "#E69F00"
"""Of Okabe and Ito's colours, told apart by colour-blind readers too."""

WINDOWS = 40
"""Points of the curve of means: equal steps of the logarithm of the rank."""


def can_plot() -> bool:
    """Whether matplotlib is installed."""
    return find_spec("matplotlib") is not None


def plot_histogram(model: nn.Module) -> Figure:
    """Tokens by code length, over all compressed tables of `model`."""
    figure = _figure(5.6, 3.6)
    _histogram(figure, _all_lengths(model))
    return figure


def plot_lengths(model: nn.Module, token_counts: Tensor | None = None) -> Figure:
    """Tokens by code length, and code length by token rank.

    Args:
        model: A model with compressed tables; ranks are of the first.
        token_counts: Occurrences of each token, (V,): frequent tokens come first. Without them ranks are ids, by which
            vocabularies are roughly sorted.
    """
    lengths = next(iter(require_compressed(model).values())).code_lengths().cpu()
    figure = _figure(11, 4)
    _histogram(figure, _all_lengths(model), (1, 2, 1))
    by = "token id"
    if token_counts is not None:
        order = checked_counts(token_counts, len(lengths)).argsort(descending=True, stable=True)
        lengths, by = lengths[order], "rank of the token by count"
    _ranks(figure, lengths, by)
    return figure


def _figure(width: float, height: float) -> Figure:
    if not can_plot():
        raise ValueError("pictures need matplotlib, which is not installed: pip install matplotlib")
    from matplotlib.figure import Figure  # noqa: PLC0415  # optional, and slow to import

    return Figure(figsize=(width, height), dpi=120, layout="constrained")


def _all_lengths(model: nn.Module) -> Tensor:
    return torch.cat([embedding.code_lengths().cpu() for embedding in require_compressed(model).values()])


def _histogram(figure: Figure, lengths: Tensor, place: tuple[int, int, int] = (1, 1, 1)) -> None:
    panel = figure.add_subplot(*place)
    bits, tokens = lengths.unique(return_counts=True)
    bars = panel.bar([str(length) for length in bits.tolist()], tokens.tolist(), color=BLUE)
    panel.bar_label(bars, [f"{100 * share:.1f} %" for share in (tokens / len(lengths)).tolist()], padding=2)
    panel.margins(y=0.12)
    panel.yaxis.set_major_formatter("{x:,.0f}")
    panel.set(xlabel="code length (bits)", ylabel="tokens")
    panel.spines[["top", "right"]].set_visible(False)


def _ranks(figure: Figure, lengths: Tensor, by: str) -> None:
    panel = figure.add_subplot(1, 2, 2)
    ranks = torch.arange(1, len(lengths) + 1)
    spread = 1 + 0.12 * (torch.rand(len(lengths), generator=torch.Generator().manual_seed(0)) - 0.5)
    size = 12 if len(lengths) < 5000 else 3
    panel.scatter(
        ranks, lengths * spread, s=size, color=BLUE, alpha=0.35, linewidths=0, rasterized=True, label="a token"
    )
    first = min(10, len(lengths))  # single tokens have no mean to speak of
    steps = torch.logspace(math.log10(first), math.log10(len(lengths)), WINDOWS).round().to(torch.int64)
    edges = [1, *(steps + 1).unique().tolist()]
    windows = list(pairwise(edges))
    middles = [((a * (b - 1)) ** 0.5) for a, b in windows]
    means = [lengths[a - 1 : b - 1].float().mean().item() for a, b in windows]
    panel.plot(middles, means, color=ORANGE, linewidth=2.5, label="mean")
    panel.set(xscale="log", yscale="log", xlabel=by, ylabel="code length (bits; points spread a little)")
    bits = lengths.unique().tolist()
    panel.set_yticks(bits, [str(length) for length in bits])
    panel.minorticks_off()
    panel.spines[["top", "right"]].set_visible(False)
    panel.legend(
        frameon=False, markerscale=3 if size == 3 else 1.5, loc="lower center", bbox_to_anchor=(0.5, 1), ncols=2
    )
