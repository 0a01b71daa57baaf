"""The benchmark's tables, JSON and picture, computed from its cells.

python examples/benchmarks/report.py --output_dir examples/benchmarks/results
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from cells import Cells, mean_and_deviation, paired_difference
from methods import METHODS, NOT_LEARNED, OWN_SIZE, TITLES, base
from pictures import accuracy_by_size
from transformers import HfArgumentParser


def summarize(cells: Cells) -> dict:
    """Mean, deviation and paired differences of all finished cells, JSON-ready."""
    tasks = list(dict.fromkeys(key.task for key in cells))
    forms = sorted({key[1:3] for key in cells}, key=lambda form: (form[1] or 0, METHODS.index(base(form[0])), form[0]))
    rows = [row for form in forms if (row := _row(cells, tasks, *form))]
    comparisons = [
        {"task": task, "ratio": ratio, "ours": "learned", "theirs": theirs, "points": points, "interval": interval}
        for ratio in sorted({ratio for _, ratio in forms if ratio})
        for theirs in (*METHODS, NOT_LEARNED)
        for task in tasks
        if theirs != "learned"
        for points, *interval in [_compare(cells, task, ratio, theirs)]
        if points is not None
    ]
    return {"tasks": tasks, "rows": rows, "paired": comparisons}


def _compare(cells: Cells, task: str, ratio: float, theirs: str) -> tuple[float | None, ...]:
    other = None if theirs in OWN_SIZE else ratio
    ours, dense = cells.done(task, "learned", ratio), cells.done(task, "dense", None)
    found = paired_difference(ours, cells.done(task, theirs, other), dense)
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


def seeds_table(cells: Cells) -> str:
    """Mean drop under dense over all tasks of a ratio, a row a seed; each method adds a part to the one before."""
    methods = ("fixed", "count", NOT_LEARNED, "learned")
    lines = [f"| ratio | seed | {' | '.join(TITLES[method] for method in methods)} |", "|---|---|---|---|---|---|"]
    for ratio in sorted({key.ratio for key in cells if key.ratio}):
        tasks = sorted({key.task for key in cells if key.ratio == ratio})
        forms = [("dense", None), *((method, ratio) for method in methods)]
        done = [[cells.done(task, *form) for task in tasks] for form in forms]
        for seed in sorted(set.intersection(*(set(found) for row in done for found in row))):
            dense, *ours = (np.mean([found[seed]["test"]["accuracy"] for found in row]) for row in done)
            lines.append(f"| {ratio:g} | {seed} | {' | '.join(f'{dense - mean:.2f}' for mean in ours)} |")
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


def write_report(cells: Cells, folder: Path) -> dict:
    """Print all tables, write `tables.md`, `summary.json` and `accuracy.png` into `folder`."""
    cells.refuse_mixture()
    summary = summarize(cells)
    if summary["rows"]:
        parts = [table(summary), seeds_table(cells), table(summary, figure="log_loss"), paired_table(summary)]
        parts.append(information_table(cells))
        tables = "\n\n".join(parts) + "\n"
        print(f"\n{tables}")
        (folder / "tables.md").write_text(tables, encoding="utf-8")
        accuracy_by_size(summary, folder / "accuracy.png")
    (folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
    return summary


@dataclass
class ReportArguments:
    output_dir: str = field(
        default=str(Path(__file__).with_name("results")), metadata={"help": "Folder with cells.jsonl."}
    )


def main() -> None:
    (args,) = HfArgumentParser(ReportArguments).parse_args_into_dataclasses()
    folder = Path(args.output_dir)
    write_report(Cells(folder / "cells.jsonl"), folder)


if __name__ == "__main__":
    main()
