"""The benchmark's tables, JSON and picture, computed from its cells.

    python examples/benchmarks/report.py --readme README.md

puts the rows of the main methods between the two marker lines of the README as well.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import matplotlib as mpl
import numpy as np
from cells import Cells, mean_and_deviation, paired_difference
from methods import METHODS, OURS, OWN_SIZE, PEERS, TITLES, base
from transformers import HfArgumentParser

mpl.use("Agg")
from matplotlib import pyplot as plt  # after the choice of a backend without windows

MARKERS = ("<!-- accuracy benchmark -->", "<!-- end of accuracy benchmark -->")
MAIN_METHODS = ("dense", "compositional", *OURS)
"""What the README shows: the dense table, the best peer and ours."""

COLOURS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#F0E442", "#000000")
"""Okabe and Ito's colours, told apart by colour-blind readers too."""


def summarize(cells: Cells) -> dict:
    """Mean, deviation and paired differences of all finished cells, JSON-ready."""
    tasks = list(dict.fromkeys(key.task for key in cells))
    forms = sorted({key[1:3] for key in cells}, key=lambda form: (form[1] or 0, METHODS.index(base(form[0]))))
    rows = [row for form in forms if (row := _row(cells, tasks, *form))]
    comparisons = [
        {"task": task, "ratio": ratio, "ours": "learned", "theirs": theirs, "points": points, "interval": interval}
        for ratio in sorted({ratio for _, ratio in forms if ratio})
        for theirs in (*METHODS, "learned:select_fraction=0")
        for task in tasks
        if theirs != "learned"
        for points, *interval in [_compare(cells, task, ratio, theirs)]
        if points is not None
    ]
    return {"tasks": tasks, "rows": rows, "paired": comparisons}


def _compare(cells: Cells, task: str, ratio: float, theirs: str) -> tuple[float | None, ...]:
    other = None if theirs in OWN_SIZE else ratio
    found = paired_difference(cells.done(task, "learned", ratio), cells.done(task, theirs, other))
    return (None,) if found is None else found


def _row(cells: Cells, tasks: list[str], method: str, ratio: float | None) -> dict | None:
    """One method at one size: figures of each task, and the mean drop under dense over the tasks it has."""
    figures = {}
    for task in tasks:
        done, dense = cells.done(task, method, ratio), cells.done(task, "dense", None)
        if not done:
            continue
        mean, deviation = mean_and_deviation(cell["test"]["accuracy"] for cell in done.values())
        figures[task] = {
            "accuracy": mean,
            "deviation": deviation,
            "log_loss": float(np.mean([cell["test"]["log_loss"] for cell in done.values()])),
            "validation_log_loss": float(np.mean([cell["validation"]["log_loss"] for cell in done.values()])),
            "ratio": float(np.mean([cell["ratio"] for cell in done.values()])),
            "seeds": sorted(done),
        }
        if both := sorted(done.keys() & dense.keys()):
            figures[task]["drop"] = float(
                np.mean([dense[seed]["test"]["accuracy"] - done[seed]["test"]["accuracy"] for seed in both])
            )
    if not figures:
        return None
    drops = [figure["drop"] for figure in figures.values() if "drop" in figure]
    measured = {key.task for key in cells if key.ratio == ratio}  # the mean is of all tasks that have this ratio
    mean_drop = float(np.mean(drops)) if len(drops) == len(measured) else None
    return {"method": method, "ratio": ratio, "tasks": figures, "mean_drop": mean_drop}


def table(summary: dict, methods: Sequence[str] = METHODS, figure: str = "accuracy") -> str:
    """Markdown of these methods' test accuracy in % (standard deviation over seeds) and mean drop under dense.

    With another `figure`, such as `log_loss`, of that, without drops.
    """
    tasks = summary["tasks"]
    drops = figure == "accuracy"
    lines = [
        f"| ratio | method | {' | '.join(tasks)} |{' mean drop |' if drops else ''} seeds |",
        "|---|---|" + "---|" * (len(tasks) + drops + 1),
    ]
    for row in summary["rows"]:
        if base(row["method"]) not in methods:
            continue
        figures = row["tasks"]
        show = _accuracy if drops else lambda found: f"{found[figure]:.3f}"
        shown = [show(figures[task]) if task in figures else "" for task in tasks]
        if drops:
            shown.append("" if row["mean_drop"] is None else f"{row['mean_drop']:.2f}")
        seeds = {len(found["seeds"]) for found in figures.values()}
        ratio = row["ratio"] or np.mean([found["ratio"] for found in figures.values()])
        name = TITLES.get(row["method"], row["method"])
        lines.append(f"| {ratio:.3g} | {name} | {' | '.join(shown)} | {'-'.join(map(str, sorted(seeds)))} |")
    return "\n".join(lines)


def information_table(cells: Cells) -> str:
    """Rank correlation of code lengths with information about the label at equal count, a row a seed."""
    lines = ["| task | ratio | method | seed | correlation | p | tokens |", "|---|---|---|---|---|---|---|"]
    for key in sorted(cells, key=lambda key: (key.task, key.ratio or 0, key.method, key.seed)):
        if found := cells[key].get("label_information"):
            figures = f"{found['correlation']:.2f} | {found['p']:.0e} | {found['tokens']}"
            lines.append(
                f"| {key.task} | {key.ratio:g} | {TITLES.get(key.method, key.method)} | {key.seed} | {figures} |"
            )
    return "\n".join(lines)


def _accuracy(figure: dict) -> str:
    deviation = "" if figure["deviation"] is None else f" ({figure['deviation']:.2f})"
    return f"{figure['accuracy']:.2f}{deviation}"


def paired_table(summary: dict) -> str:
    """Points of test accuracy that learned lengths are ahead, with 95 % bootstrap intervals."""
    lines = ["| ratio | default ahead of | task | points | 95 % interval |", "|---|---|---|---|---|"]
    for pair in summary["paired"]:
        low, high = pair["interval"]
        who = f"| {pair['ratio']:g} | {TITLES.get(pair['theirs'], pair['theirs'])} | {pair['task']} |"
        lines.append(f"{who} {pair['points']:+.2f} | {low:+.2f} to {high:+.2f} |")
    return "\n".join(lines)


def plot(summary: dict, file: Path) -> None:
    """Accuracy against size, one panel a task and one line a method; at most three panels in a row."""
    tasks = summary["tasks"]
    columns = min(3, len(tasks))
    rows = -(-len(tasks) // columns)
    figure, grid = plt.subplots(rows, columns, figsize=(3.8 * columns, 3.4 * rows), squeeze=False)
    panels = grid.flatten()
    for unused in panels[len(tasks) :]:
        unused.remove()
    panels = panels[: len(tasks)]
    methods = [
        method for method in (*OURS, *PEERS, "int8", "int4") if any(r["method"] == method for r in summary["rows"])
    ]
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
                    linestyle="-" if method in OURS else "--",
                    linewidth=2.5 if method == "learned" else 1.2,
                    label=method,
                )
        for row in summary["rows"]:
            if row["method"] == "dense" and task in row["tasks"]:
                panel.axhline(row["tasks"][task]["accuracy"], color="grey", linestyle=":", label="dense")
                # What has collapsed is far below: show where methods still differ.
                panel.set_ylim(bottom=max(panel.get_ylim()[0], row["tasks"][task]["accuracy"] - 15))
        panel.set(title=task, xscale="log", xlabel="dense bytes / stored bytes")
        panel.set_xticks([4, 8, 16, 40, 80, 160, 300], [4, 8, 16, 40, 80, 160, 300])
        panel.minorticks_off()
    for row in grid:
        row[0].set_ylabel("test accuracy (%)")
    handles = {
        label: handle for panel in panels for handle, label in zip(*panel.get_legend_handles_labels(), strict=True)
    }
    figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=3 * columns, frameon=False)
    lines = -(-len(handles) // (3 * columns))
    figure.tight_layout(rect=(0, 0.28 * lines / figure.get_figheight(), 1, 1))
    figure.savefig(file, dpi=150)
    plt.close(figure)


def fill_readme(readme: Path, text: str) -> None:
    """Put `text` between the two marker lines of the README."""
    before, rest = readme.read_text(encoding="utf-8").split(MARKERS[0] + "\n")
    after = rest.split(MARKERS[1] + "\n")[1]
    readme.write_text(f"{before}{MARKERS[0]}\n{text}\n{MARKERS[1]}\n{after}", encoding="utf-8")


def write_report(cells: Cells, folder: Path) -> dict:
    """Print all tables, write `tables.md`, `summary.json` and `accuracy.png` into `folder`."""
    cells.refuse_mixture()
    summary = summarize(cells)
    if summary["rows"]:
        parts = [table(summary), table(summary, figure="log_loss"), paired_table(summary), information_table(cells)]
        tables = "\n\n".join(parts) + "\n"
        print(f"\n{tables}")
        (folder / "tables.md").write_text(tables, encoding="utf-8")
        plot(summary, folder / "accuracy.png")
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


@dataclass
class ReportArguments:
    output_dir: str = field(
        default=str(Path(__file__).with_name("results")), metadata={"help": "Folder with cells.jsonl."}
    )
    readme: str | None = field(default=None, metadata={"help": "Put the table between the markers of this file."})


def main() -> None:
    (args,) = HfArgumentParser(ReportArguments).parse_args_into_dataclasses()
    folder = Path(args.output_dir)
    summary = write_report(Cells(folder / "cells.jsonl"), folder)
    if args.readme is not None:
        fill_readme(Path(args.readme), table(summary, MAIN_METHODS))


if __name__ == "__main__":
    main()
