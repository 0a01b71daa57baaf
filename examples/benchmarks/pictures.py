"""Pictures of the accuracy benchmark, from what `report.summarize` makes of its cells."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import matplotlib as mpl
from methods import OURS, PEERS, TITLES, base

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend without windows

COLOURS = (
    *("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#B2912F", "#777777"),
    *("#332288", "#882255", "#44AA99", "#999933"),
)
"""Okabe and Ito's, then Tol's, told apart by colour-blind readers too; seen on white and on black."""

INK = "#808080"
"""Of letters and axes: read on light and dark pages alike."""

LARGEST_DROP = 6.0
"""Points under dense down to which the README's picture goes."""


def accuracy_by_size(summary: dict, file: Path) -> None:
    """Accuracy against size, one panel a task and one line a method; at most three panels in a row."""
    tasks = summary["tasks"]
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.8 * columns, 3.4 * rows), squeeze=False)
    panels = grid.flatten()
    for unused in panels[len(tasks) :]:
        unused.remove()
    panels = panels[: len(tasks)]
    found = {row["method"] for row in summary["rows"]}
    order = (*OURS, *PEERS, "int8", "int4")
    methods = sorted((method for method in found if method != "dense"), key=lambda m: (order.index(base(m)), m))
    for task, panel in zip(tasks, panels, strict=True):
        for index, method in enumerate(methods):
            points = sorted(
                (row["tasks"][task]["ratio"], row["tasks"][task]["accuracy"])
                for row in summary["rows"]
                if row["method"] == method and task in row["tasks"]
            )
            if points:
                panel.plot(
                    *zip(*points, strict=True),
                    marker="o^sDvP*X"[index % 8],
                    color=COLOURS[index % len(COLOURS)],
                    linestyle="-" if base(method) in OURS else "--",
                    linewidth=2.5 if method == "learned" else 1.2,
                    label=TITLES.get(method, method),
                )
        sizes = {row["tasks"][task]["ratio"] for row in summary["rows"] if task in row["tasks"]}
        for row in summary["rows"]:
            if row["method"] == "dense" and task in row["tasks"]:
                panel.axhline(row["tasks"][task]["accuracy"], color="grey", linestyle=":", label="dense")
                # What has collapsed is far below: show where methods still differ.
                panel.set_ylim(bottom=max(panel.get_ylim()[0], row["tasks"][task]["accuracy"] - 15))
        panel.set(title=task, xscale="log", xlabel="dense bytes / stored bytes")
        _mark_sizes(panel, sorted(size for size in sizes if size > 1))
    for row in grid:
        row[0].set_ylabel("test accuracy (%)")
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=2 * columns, frameon=False)
    lines = -(-len(handles) // (2 * columns))
    figure.tight_layout(rect=(0, 0.28 * lines / figure.get_figheight(), 1, 1))
    figure.savefig(file, dpi=150)
    plt.close(figure)


def drop_by_size(summary: dict, methods: Sequence[str], title: str, file: Path) -> None:
    """Mean points under dense against size, one line a method with its name at its end; no background."""
    with plt.rc_context({"font.size": 12, "text.color": INK, "axes.labelcolor": INK, "axes.edgecolor": INK}):
        figure, panel = plt.subplots(figsize=(7, 4))
        panel.axhline(0, color=INK, linewidth=1, linestyle=":")
        sizes: set[float] = set()
        ends = []
        for method, colour in zip(methods, COLOURS, strict=False):
            points = sorted(
                (row["ratio"], row["mean_drop"])
                for row in summary["rows"]
                if row["method"] == method and row["mean_drop"] is not None and row["ratio"]
            )
            if points:
                panel.plot(*zip(*points, strict=True), color=colour, marker="o", linewidth=2.5)
                sizes |= {size for size, _ in points}
                shown = [point for point in points if point[1] <= LARGEST_DROP]
                ends.append([*(shown or points)[-1], TITLES.get(method, method), colour])
        panel.set(xscale="log", xlabel="times smaller than the dense table", ylabel="points of accuracy lost")
        panel.set_title(title, fontsize=12)
        panel.set_ylim(LARGEST_DROP, -1)  # less is lost further up
        _mark_sizes(panel, sorted(sizes))
        panel.tick_params(colors=INK)
        for side in ("top", "right"):
            panel.spines[side].set_visible(False)
        ends.sort(key=lambda end: end[1])
        level = -1.0
        for size, drop, name, colour in ends:
            level = max(drop, level + 0.45)  # names do not cover one another
            panel.annotate(name, (size, level), (8, 0), textcoords="offset points", color=colour, va="center")
        figure.tight_layout()
        figure.savefig(file, dpi=150, transparent=True)
        plt.close(figure)


def _mark_sizes(panel: plt.Axes, sizes: Sequence[float]) -> None:
    marks: list[float] = []
    apart = max(1.25, (sizes[-1] / sizes[0]) ** (1 / 8)) if sizes else 1.25  # room for eight labels
    for size in sizes:
        if not marks or size > apart * marks[-1]:
            marks.append(size)
    panel.set_xticks(marks, [f"{mark:.3g}" for mark in marks])
    panel.minorticks_off()
