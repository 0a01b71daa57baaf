"""The README's table and picture, from cells of every benchmark."""

import json
from pathlib import Path

import numpy as np
import pytest


@pytest.fixture
def results(example, tmp_path):
    """Folders of results: every accuracy is 90 less what a method loses at a size."""
    module = example("cells")
    counted = module.encode_counts(np.ones(10))
    split = {"log_loss": 0.5, "right": counted, "of": counted}

    def add(folder, key, figures):
        (tmp_path / folder).mkdir(exist_ok=True)
        module.Cells(tmp_path / folder / "cells.jsonl").add(module.Key(*key), figures)

    def accuracy(folder, task, method, ratio, drop):
        either = {"test": {"accuracy": 90 - drop, **split}, "validation": {"accuracy": 90 - drop, **split}}
        add(folder, (task, method, ratio, 0), {"ratio": ratio or 1.0, "version": "1", **either})

    for folder in ("results", "spacy_vector_results", "word_vector_results"):
        for task in ("a", "b"):
            accuracy(folder, task, "dense", None, 0)
            ours = {"learned": 0.1, "learned:select_fraction=0": 0.3, "fixed": 2, "count": 1}
            for method, drop in {**ours, "pq": 3, "svd": 5}.items():
                accuracy(folder, task, method, 80.0, drop + (task == "b"))
        accuracy(folder, "a", "learned", 120.0, 0.5)
    for method, ratio, score in (("dense", None, 80), ("calibrated", 40.0, 79), ("fixed", 40.0, 78), ("pq", 40.0, 70)):
        for model in ("e5-small", "word2vec-8k"):
            add("sentence_results", (model, method, ratio, 0), {"similarity": {"de": score, "en": score + 2}})
    forms = ("dense", "dense:int8", "calibrated:float", "calibrated:int8", "calibrated:int4")
    for form in forms:
        cell = {"bytes": 12_340_000, "peak_onnxruntime": 84_200_000, "similarity": {"en": 81.234}}
        add("deployment_results", ("a", form, 40.0, 0), cell)
    add("deployment_results", ("a", "times", 40.0, 0), {"milliseconds": dict.fromkeys(forms, 2.345)})
    return tmp_path


def test_rows_without_holes(example, results):
    texts = example("overview").main(["--results", str(results)])
    rows = [line.split(" | ")[1:] for line in texts["overview"].splitlines()[2:]]
    assert rows == [  # no 120x: of a method or a task it has none
        *3 * [["80", "0.60", "0.80", "2.50", "3.50 (product quantization) |"]],
        *2 * [["40", "1.00", "1.00", "2.00", "10.00 (product quantization) |"]],
    ]
    lines = texts["deployment"].splitlines()
    assert lines[0] == "| layers | a |"
    assert lines[3] == "| dense, int8 | 12.3 / 84 / 2.3 / 81.23 |"
    assert (results / "word_vector_results" / "overview.png").stat().st_size > 10_000


def test_readme_is_filled_between_its_marks(example, results):
    overview = example("overview")
    readme = results / "README.md"
    marks = [(f"<!-- {mark} -->\n", f"<!-- end of {mark} -->\n") for mark in overview.MARKS]
    readme.write_text("a\n" + "b\n".join(f"{first}old\n{last}" for first, last in marks), encoding="utf-8")
    texts = overview.main(["--results", str(results), "--readme", str(readme)])
    filled = [f"{first}{text}\n{last}" for (first, last), text in zip(marks, texts.values(), strict=True)]
    assert readme.read_text(encoding="utf-8") == "a\n" + "b\n".join(filled)


def test_readme_holds_the_stored_results(example):
    """Figures of the README are those of the cells that are stored beside the benchmarks."""
    overview = example("overview")
    benchmarks = Path(overview.__file__).parent
    readme = (benchmarks.parents[1] / "README.md").read_text(encoding="utf-8")
    assert overview.table(benchmarks, overview.OverviewArguments().ratios) in readme
    assert overview.deployment_table(benchmarks) in readme


def test_stored_cells_are_of_one_version(example):
    for file in Path(example("cells").__file__).parent.glob("*/cells.jsonl"):
        versions = {json.loads(line).get("version") for line in file.read_text(encoding="utf-8").splitlines()}
        assert len(versions - {None}) <= 1, f"{file} mixes {versions}"
