"""Results of the benchmark: one JSON line a cell (task, method, ratio, seed), and what is computed from them."""

from __future__ import annotations

import ast
import base64
import json
import zlib
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from hashlib import sha256
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

import hf_adacomp

RESAMPLES = 2000

STAMPED = ("learned", "count", "fixed", "calibrated", "distilled", "trained")
"""Methods whose results hang on the code of this package; settings may follow a colon."""

ROOMS = ("codes", "lengths", "fitting", "nn")
"""Of the package: what decides on a result, beside the settings."""

VERSIONS = Path(__file__).with_name("versions.json")
"""Versions of the method that make the same results as an earlier one, which they go by."""

DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef)


class Key(NamedTuple):
    """What a cell is a result of; `ratio` is None for methods whose size is what it is."""

    task: str
    method: str
    ratio: float | None
    seed: int


class Cells:
    """Cells in a file of JSON lines, to which they are added as they are done: a stopped run goes on from there."""

    def __init__(self, file: Path) -> None:
        self.file, self._cells = file, {}
        if file.exists():
            for line in file.read_text(encoding="utf-8").splitlines():
                cell = json.loads(line)
                self._cells[Key(*cell["key"])] = cell

    def __contains__(self, key: Key) -> bool:
        return key in self._cells

    def __getitem__(self, key: Key) -> dict:
        return self._cells[key]

    def add(self, key: Key, cell: dict) -> None:
        self._cells[key] = {"key": list(key), **cell}
        with self.file.open("a", encoding="utf-8") as lines:  # one write: two runs may share the file
            lines.write(json.dumps(self._cells[key], separators=(",", ":")) + "\n")

    def __iter__(self) -> Iterator[Key]:
        return iter(self._cells)

    def refuse_mixture(self, *others: str) -> None:
        """Raise ValueError if our cells, with those that other versions of the method would make, are of several."""
        ours = [cell for key, cell in self._cells.items() if key.method.partition(":")[0] in STAMPED]
        found = {cell.get("version", "unknown") for cell in ours} | {*others}
        if len(found) > 1:
            raise ValueError(
                f"{self.file} would mix cells of several versions of the method, {', '.join(sorted(found))}: "
                "name another output folder, delete the old cells, or show with remake.py that both make the same"
            )

    def done(self, task: str, method: str, ratio: float | None) -> dict[int, dict]:
        """Finished cells of all seeds, by seed; without those that the method cannot reach."""
        return {
            key.seed: cell
            for key, cell in self._cells.items()
            if key[:3] == (task, method, ratio) and "out_of_reach" not in cell
        }


def label_scores(logits: Tensor | tuple[Tensor, ...], labels: Tensor) -> Tensor:
    """Log-probability of the label and whether it is the likeliest, (..., 2), of logits (..., classes); else 0.

    A Trainer's `preprocess_logits_for_metrics`: of a vocabulary's logits nothing else needs to be kept.
    """
    scores = logits[0] if isinstance(logits, tuple) else logits
    known = labels.clamp_min(0)[..., None]
    of_label = scores.float().log_softmax(-1).gather(-1, known)
    right = scores.argmax(-1, keepdim=True) == known
    return torch.cat([of_label, right.to(of_label)], dim=-1) * (labels != -100)[..., None]


def score_items(scores: np.ndarray, labels: np.ndarray) -> dict:
    """Accuracy in %, log-loss, and for each text how many labels (`of`) it has and how many are `right`.

    Args:
        scores: Those of `label_scores`, (N, 2) or (N, T, 2).
        labels: (N,) or (N, T), -100 where none counts.
    """
    labels = labels.reshape(len(labels), -1)
    scores = scores.reshape(*labels.shape, 2)
    counting = labels != -100
    right = ((scores[..., 1] == 1) & counting).sum(1)
    return {
        "accuracy": 100 * float(right.sum() / counting.sum()),
        "log_loss": -float(scores[counting][:, 0].mean()),
        "right": encode_counts(right),
        "of": encode_counts(counting.sum(1)),
    }


def method_version() -> str:
    """The version of the method that results of now are of: of the first code that makes them, see `remake.py`."""
    version = code_version()
    known = json.loads(VERSIONS.read_text(encoding="utf-8"))
    return known[version]["same_as"] if version in known else version


@cache  # of the code that is loaded: files may change while it works
def code_version() -> str:
    """Twelve digits that change with the code of the method: settings, codes, lengths, fits, modules.

    They do not change with comments and docstrings, which decide on no result.
    """
    return version_of(Path(hf_adacomp.__file__).parent)


def version_of(package: Path) -> str:
    """`code_version` of the package in that folder."""
    files = [package / "config.py", *sorted(file for room in ROOMS for file in (package / room).glob("*.py"))]
    trees = [ast.parse(file.read_text(encoding="utf-8")) for file in files]
    for node in (node for tree in trees for node in ast.walk(tree)):
        if isinstance(node, DOCUMENTED):
            node.body = [part for part in node.body if not _is_text(part)]
    return sha256("".join(map(ast.unparse, trees)).encode()).hexdigest()[:12]


def _is_text(statement: ast.stmt) -> bool:
    return isinstance(statement, ast.Expr) and isinstance(getattr(statement.value, "value", None), str)


def open_cells(
    folder: str,
    name: str,
    methods: Sequence[str],
    ratios: Sequence[float],
    known: Sequence[str],
    sizeless: Sequence[str],
) -> tuple[Cells, list[Key]]:
    """Cells of a folder, and the keys that it lacks of a model: of each method at each ratio, or once if `sizeless`.

    ValueError for methods that are not `known`, and where versions of the method would mix.
    """
    if unknown := {*methods} - {*known}:
        raise ValueError(f"unknown methods {sorted(unknown)}: choose among {', '.join(known)}")
    Path(folder).mkdir(parents=True, exist_ok=True)
    cells = Cells(Path(folder) / "cells.jsonl")
    cells.refuse_mixture(*[method_version() for method in methods if method in STAMPED])
    keys = [
        Key(name, method, ratio, 0)
        for ratio in (None, *ratios)
        for method in methods
        if (method in sizeless) == (ratio is None)
    ]
    return cells, [key for key in keys if key not in cells]


def encode_counts(counts: np.ndarray) -> str:
    """Small counts as text for a JSON line: 16 bits each, compressed."""
    return base64.b85encode(zlib.compress(counts.astype("<u2").tobytes(), 9)).decode("ascii")


def decode_counts(text: str) -> np.ndarray:
    """Undo `encode_counts`."""
    return np.frombuffer(zlib.decompress(base64.b85decode(text)), dtype="<u2").astype(np.int64)


def paired_difference(
    ours: dict[int, dict], theirs: dict[int, dict], dense: dict[int, dict]
) -> tuple[float, float, float] | None:
    """Difference of test accuracy in points over the seeds that both have, with its 95 % bootstrap interval.

    The texts of the test split, whose numbers of labels stand in the cells of the dense model, are drawn again, for
    both methods and all seeds alike, `RESAMPLES` times.
    """
    seeds = sorted(ours.keys() & theirs.keys())
    if not seeds or not dense:
        return None
    right = [[decode_counts(cells[seed]["test"]["right"]) for seed in seeds] for cells in (ours, theirs)]
    gains = np.mean(np.subtract(*right), axis=0)
    sizes = decode_counts(next(iter(dense.values()))["test"]["of"])
    generator = np.random.default_rng(0)
    draws = generator.integers(len(gains), size=(RESAMPLES, len(gains)), dtype=np.int32)
    resampled = 100 * gains[draws].sum(1) / sizes[draws].sum(1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return float(100 * gains.sum() / sizes.sum()), float(low), float(high)


def mean_and_deviation(values: Iterable[float]) -> tuple[float, float | None]:
    """Mean and sample standard deviation (None for one value)."""
    values = list(values)
    return float(np.mean(values)), float(np.std(values, ddof=1)) if len(values) > 1 else None
