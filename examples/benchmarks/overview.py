"""The README's table and picture, from the stored results of all benchmarks.

    python examples/benchmarks/overview.py --readme README.md

fills what stands between marker lines and draws `overview.png`. In the first table each row is a token table and a
size, each figure what is lost under the dense one: points of test accuracy, mean over the tasks, or of Spearman's
correlation x 100, mean over the languages; where there are no labels, no lengths are learned. The second table is that
of `deployment.py`, shortened.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from cells import Cells, Key
from deployment import FORMS, TIMES
from methods import NOT_LEARNED, PEERS, TITLES, base
from pictures import drop_by_size
from report import summarize
from transformers import HfArgumentParser

MARKS = ("overview", "deployment")
"""Of the README's two tables: each stands between `<!-- MARK -->` and `<!-- end of MARK -->`."""

ACCURACIES = {
    "word_vector_results": "word2vec's vectors, five tasks",
    "spacy_vector_results": "spaCy's vectors, two tasks",
    "results": "all-MiniLM-L6-v2, four tasks",
}
"""Folders of the accuracy benchmark, and what rows call them."""

SENTENCES = {
    "e5-small": "multilingual-e5-small, six languages, no labels",
    "word2vec-8k": "word2vec's vectors, static model, no labels",
}
"""The same for models of the benchmark of sentence similarity."""

SENTENCE_RATIOS = (40.0, 80.0)
LINES = ("learned", NOT_LEARNED, "count", "fixed", "pq")
"""Of the picture."""


@dataclass
class OverviewArguments:
    results: str = field(
        default=str(Path(__file__).parent), metadata={"help": "Folder of the benchmarks' folders of results."}
    )
    readme: str | None = field(default=None, metadata={"help": "Put the table between the markers of this file."})
    ratios: list[float] = field(default_factory=lambda: [80.0, 120.0, 160.0, 200.0, 300.0], metadata={"help": "Rows."})


def accuracy_rows(title: str, summary: dict, ratios: list[float]) -> list[str]:
    """Rows of a summary of the accuracy benchmark: ours, with lengths not learned, one length, the best peer."""
    lines = []
    for ratio in ratios:
        drops = {row["method"]: row["mean_drop"] for row in summary["rows"] if row["ratio"] == ratio}
        lines += _row(title, ratio, drops, ("learned", NOT_LEARNED, "fixed"))
    return lines


def similarity_rows(title: str, cells: Cells, task: str) -> list[str]:
    """Rows of the benchmark of sentence similarity."""
    dense = _mean(cells[Key(task, "dense", None, 0)])
    lines = []
    for ratio in SENTENCE_RATIOS:
        found = [key for key in cells if key.task == task and key.ratio == ratio]
        drops = {key.method: dense - _mean(cells[key]) for key in found}
        lines += _row(title, ratio, drops, ("calibrated", "calibrated", "fixed"))
    return lines


def _mean(cell: dict) -> float:
    return sum(cell["similarity"].values()) / len(cell["similarity"])


def _row(title: str, ratio: float, drops: dict[str, float | None], ours: tuple[str, ...]) -> list[str]:
    """One line, or none where a figure is missing: the table has no holes."""
    peers = {method: drop for method, drop in drops.items() if base(method) in PEERS and drop is not None}
    wanted = [drops.get(method) for method in ours]
    if not peers or None in wanted:
        return []
    best = min(peers, key=lambda method: peers[method])
    shown = " | ".join(f"{drop:.2f}" for drop in wanted)
    return [f"| {title} | {ratio:g} | {shown} | {peers[best]:.2f} ({TITLES.get(best, best)}) |"]


def table(folder: Path, ratios: list[float]) -> str:
    """Markdown."""
    columns = ("token table", "times smaller", "default", "lengths not learned", "one length", "best other method")
    lines = [f"| {' | '.join(columns)} |", "|---" * len(columns) + "|"]
    for name, title in ACCURACIES.items():
        lines += accuracy_rows(title, summarize(Cells(folder / name / "cells.jsonl")), ratios)
    sentences = Cells(folder / "sentence_results" / "cells.jsonl")
    for name, title in SENTENCES.items():
        lines += similarity_rows(title, sentences, name)
    return "\n".join(lines)


def deployment_table(folder: Path) -> str:
    """Markdown: what a form of a model takes on a device, and what it is worth."""
    cells = Cells(folder / "deployment_results" / "cells.jsonl")
    models = list(dict.fromkeys(key.task for key in cells))
    lines = [f"| layers | {' | '.join(models)} |", "|---" * (1 + len(models)) + "|"]
    for form, (_, title) in FORMS.items():
        shown = []
        for model in models:
            cell = next(cells[key] for key in cells if key[:2] == (model, form))
            times = next(cells[key] for key in cells if key[:2] == (model, TIMES))["milliseconds"]
            sizes = f"{cell['bytes'] / 1e6:.1f} / {cell['peak_onnxruntime'] / 1e6:.0f}"
            shown.append(f"{sizes} / {times[form]:.1f} / {_mean(cell):.2f}")
        lines.append(f"| {title} | {' | '.join(shown)} |")
    return "\n".join(lines)


def fill_readme(readme: Path, mark: str, text: str) -> None:
    """Put `text` between the two lines of a mark."""
    first, last = f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n"
    before, rest = readme.read_text(encoding="utf-8").split(first)
    readme.write_text(f"{before}{first}{text}\n{last}{rest.split(last)[1]}", encoding="utf-8")


def main(arguments: list[str] | None = None) -> dict[str, str]:
    (args,) = HfArgumentParser(OverviewArguments).parse_args_into_dataclasses(arguments)
    folder = Path(args.results)
    texts = dict(zip(MARKS, (table(folder, args.ratios), deployment_table(folder)), strict=True))
    print(*texts.values(), sep="\n\n")
    summary = summarize(Cells(folder / "word_vector_results" / "cells.jsonl"))
    drop_by_size(summary, LINES, "Word vectors, mean of five tasks", folder / "word_vector_results" / "overview.png")
    if args.readme is not None:
        for mark, text in texts.items():
            fill_readme(Path(args.readme), mark, text)
    return texts


if __name__ == "__main__":
    main()
