"""The accuracy benchmark: sizes and fits of the peers, the cache of cells, statistics, a run on a toy task."""

import json

import numpy as np
import pytest
import torch
from torch import nn

TOKENS, DIM = 2000, 48


@pytest.fixture
def embedding():
    """A table with a decaying spectrum."""
    return nn.Embedding.from_pretrained(torch.randn(TOKENS, DIM) / torch.arange(1, DIM + 1) ** 0.7)


@pytest.mark.parametrize("method", ["uniform", "pq", "opq", "lsh", "itq", "svd", "compositional", "trim"])
@pytest.mark.parametrize("ratio", [8, 20])
def test_peers_fit_the_size_and_the_table(example, embedding, method, ratio, monkeypatch):
    methods, peers = example("methods"), example("peers")
    monkeypatch.setattr(peers.Compositional, "STEPS", 300)
    monkeypatch.setattr(methods, "LEAST_SAMPLE", 1 << 12)
    counts = torch.arange(TOKENS)
    peer = methods.peer(method, embedding, ratio, counts)
    dense = 4 * TOKENS * DIM
    assert dense / peer.stored_bytes() >= ratio / methods.SLACK
    if (method, ratio) not in [("lsh", 8), ("itq", 8)]:  # they have no more than d bits
        assert dense / peer.stored_bytes() < 2.2 * ratio  # it uses what it may, in the steps that it has
    peer.finish()
    ids = torch.arange(TOKENS).view(-1, 50)
    decoded = peer(ids)
    assert decoded.shape == (*ids.shape, DIM)
    table = embedding.weight
    assert (decoded.view(-1, DIM) - table).square().sum() < 0.96 * (table - table.mean(0)).square().sum()
    decoded.square().sum().backward()
    assert all(parameter.grad is not None for parameter in peer.parameters())
    assert not any(name == "codes" for name, _ in peer.named_parameters())


def test_trimmed_tables_keep_the_frequent_rows(example, embedding):
    peer = example("peers").Trimmed(embedding.weight.detach(), torch.arange(TOKENS), kept=100)
    peer.finish()
    rows = peer(torch.arange(TOKENS))
    assert (rows[-100:] - embedding.weight[-100:]).abs().max() < embedding.weight.abs().max() / 100
    assert (rows[:-100] == rows[0]).all()
    assert peer.stored_bytes() == 101 * (DIM + 2)


def test_sizes_that_a_peer_cannot_reach_are_said(example, embedding):
    methods = example("methods")
    with pytest.raises(methods.OutOfReachError, match="one bit an entry"):
        methods.peer("uniform", embedding, 100, torch.ones(TOKENS, dtype=torch.int64))


@pytest.mark.parametrize("bits", [1, 2, 4])
def test_uniform_rows_are_within_a_step(example, bits):
    table = torch.linspace(-1, 1, 64).repeat(3, 1)
    peer = example("peers").UniformRows(table, bits)
    assert (peer(torch.arange(3)) - table).abs().max() <= peer.scale.max()


def test_our_methods_differ_only_where_they_say(example, embedding):
    our_config = example("methods").our_config
    learned, count = (our_config(method, embedding, 8, 3) for method in ("learned", "count"))
    assert learned.to_dict() | {"select_fraction": 0.0, "significance": False} == count.to_dict()
    assert len(our_config("fixed", embedding, 8, 3).ladder) == 1
    changed = our_config("learned:tied=false;code_lengths=[4, 8]", embedding, 8, 3)
    assert (changed.tied, changed.ladder, changed.seed) == (False, (4, 8), 3)


def test_cells_survive_and_runs_go_on(example, tmp_path):
    module = example("cells")
    key = module.Key("task", "learned", 80.0, 0)
    module.Cells(tmp_path / "cells.jsonl").add(key, {"ratio": 80.5})
    again = module.Cells(tmp_path / "cells.jsonl")
    assert key in again
    assert again[key]["ratio"] == 80.5
    assert again.done("task", "learned", 80.0) == {0: again[key]}


def test_scores_leave_out_what_has_no_label(example):
    module = example("cells")
    logits = torch.tensor([[[0.9, 0.1], [0.2, 0.8]], [[0.6, 0.4], [0.5, 0.5]]]).log() + 3
    labels = torch.tensor([[0, 0], [1, -100]])
    kept = module.label_scores(logits, labels)
    assert kept.shape == (2, 2, 2)
    scores = module.score_items(kept.numpy(), labels.numpy())
    assert scores["accuracy"] == pytest.approx(100 / 3)
    assert scores["log_loss"] == pytest.approx(-np.log([0.9, 0.2, 0.4]).mean())
    assert module.decode_counts(scores["right"]).tolist() == [1, 0]
    assert module.decode_counts(scores["of"]).tolist() == [2, 1]


def test_versions_of_the_method_are_not_mixed(example, tmp_path):
    module = example("cells")
    cells = module.Cells(tmp_path / "cells.jsonl")
    cells.add(module.Key("task", "dense", None, 0), {"ratio": 1.0})
    cells.add(module.Key("task", "learned", 80.0, 0), {"version": "1234"})
    cells.refuse_mixture("1234")
    with pytest.raises(ValueError, match=r"cells\.jsonl would mix cells of several versions of the method, 1234, 5678"):
        cells.refuse_mixture("5678")
    cells.add(module.Key("task", "count:seed=3", 80.0, 0), {"ratio": 80.0})  # of a time when cells did not tell
    with pytest.raises(ValueError, match="of the method, 1234, unknown"):
        cells.refuse_mixture()


def test_paired_difference_has_the_interval_of_its_texts(example):
    module = example("cells")

    def cell(right):
        return {"test": {"right": module.encode_counts(np.asarray(right))}}

    dense = {0: {"test": {"of": module.encode_counts(np.ones(100))}}}
    better, worse = cell([1] * 60 + [0] * 40), cell([1] * 50 + [0] * 50)
    points, low, high = module.paired_difference({0: better, 1: better}, {0: worse, 2: worse}, dense)
    assert points == pytest.approx(10)
    assert low == pytest.approx(10 - 1.96 * 3, abs=1)  # ten texts of a hundred differ: sqrt(100 * 0.1 * 0.9) = 3
    assert high == pytest.approx(10 + 1.96 * 3, abs=1)
    assert module.paired_difference({0: better}, {1: worse}, dense) is None


@pytest.fixture
def toy_task(example, toy_model, write_tsv, tmp_path, monkeypatch):
    """What a command is given to work on a toy task."""
    write_tsv(tmp_path / "train.tsv", 200, seed=0)
    write_tsv(tmp_path / "test.tsv", 60, seed=1)
    description = {"kind": "text_classification", "epochs": 2, "further_epochs": 1, "learning_rate": 5e-3}
    description |= {"train_file": "train.tsv", "test_file": "test.tsv", "column_names": ["label", "text"]}
    description |= {"label_prefix_separator": ":"}
    (tmp_path / "tasks.json").write_text(json.dumps({"toy": description}), encoding="utf-8")
    monkeypatch.setattr(
        example("tasks"), "ModelArguments", lambda: example("classification").ModelArguments(str(toy_model))
    )
    given = ["--data_dir", str(tmp_path), "--tasks_file", str(tmp_path / "tasks.json"), "--ratios", "8"]
    return [*given, "--output_dir", str(tmp_path / "results"), "--model_dir", str(tmp_path / "models")]


def test_whole_benchmark_on_a_toy_task(example, toy_task, tmp_path, monkeypatch, capsys):
    accuracy = example("accuracy")
    monkeypatch.setattr(example("peers").Compositional, "STEPS", 50)
    given = [*toy_task, "--seeds", "0"]
    methods = ["dense", "int8", "uniform", "svd", "learned", "count", "fixed"]
    summary = accuracy.main([*given, "--methods", *methods])
    rows = {row["method"]: row["tasks"]["toy"] for row in summary["rows"]}
    assert set(rows) == set(methods) - {"uniform"} | ({"uniform"} & set(rows))
    assert rows["dense"]["drop"] == 0
    assert rows["learned"]["ratio"] >= 8
    assert (tmp_path / "results" / "accuracy.png").stat().st_size > 10_000
    printed = capsys.readouterr().out
    assert "| 8 | default |" in printed
    assert "| 8 | learned |" not in printed

    started = [path.stat().st_mtime_ns for path in (tmp_path / "models").rglob("*.safetensors")]
    monkeypatch.setattr(accuracy.Run, "cell", lambda *_: pytest.fail("a finished cell was run again"))
    assert accuracy.main([*given, "--methods", *methods]) == summary
    assert [path.stat().st_mtime_ns for path in (tmp_path / "models").rglob("*.safetensors")] == started


def test_selection_learns_the_same_of_the_same_seed(example, toy_task, capsys):
    method = "learned:code_lengths=[4, 16, 64];select_fraction=0.8"
    found = example("seed_agreement").main([*toy_task, "--methods", method, "--seeds", "0", "0", "1"])
    same, *others = found["toy", method, 8.0]
    assert same > 0.999
    assert others[0] == pytest.approx(others[1], abs=1e-3)
    assert -1 < others[0] < 0.99
    assert "8x: rank correlation of two seeds 1.00," in capsys.readouterr().out


def test_code_that_makes_the_same_results_goes_by_the_same_version(example, toy_task, tmp_path, monkeypatch):
    cells, remake = example("cells"), example("remake")
    versions = tmp_path / "versions.json"
    versions.write_text("{}")
    monkeypatch.setattr(cells, "VERSIONS", versions)
    monkeypatch.setattr(remake, "VERSIONS", versions)
    given = [*toy_task, "--seeds", "0", "--methods", "learned", "count"]
    example("accuracy").main(given)
    before = cells.method_version()
    assert remake.main(given) == []
    assert json.loads(versions.read_text()) == {}  # it is that version

    monkeypatch.setattr(cells, "code_version", lambda: "after")
    monkeypatch.setattr(remake, "code_version", lambda: "after")
    assert cells.method_version() == "after"
    assert remake.main(given) == []
    assert json.loads(versions.read_text())["after"] == {
        "same_as": before,
        "shown_by": ["toy learned 8.0 0", "toy count 8.0 0"],
    }
    assert cells.method_version() == before

    monkeypatch.setattr(remake, "code_version", lambda: "otherwise")
    monkeypatch.setattr(example("accuracy").Run, "cell", lambda *_: {"ratio": 9.0})
    assert any("toy learned 8.0 0: ratio is 9.0, stored is" in text for text in remake.main(given))
    assert "otherwise" not in json.loads(versions.read_text())
    with pytest.raises(ValueError, match="no cell of learned, count, fixed among those asked for"):
        remake.main([*toy_task, "--methods", "dense"])


def test_lengths_that_follow_labels_are_told(example, tmp_path):
    module = example("cells")
    cells = module.Cells(tmp_path / "cells.jsonl")
    found = {"correlation": 0.345, "p": 1e-9, "tokens": 700}
    cells.add(module.Key("task", "learned:select_fraction=0", 80.0, 1), {"label_information": found})
    told = example("report").information_table(cells).splitlines()
    assert told[2:] == ["| task | 80 | lengths not learned | 1 | 0.34 | 1e-09 | 700 |"]


def test_drops_are_told_seed_by_seed(example, tmp_path):
    module = example("cells")
    cells = module.Cells(tmp_path / "cells.jsonl")
    drops = {"dense": 0, "fixed": 4, "count": 3, "learned:select_fraction=0": 2, "learned": 1}
    for seed, methods in enumerate([drops, drops, {"dense": 0, "learned": 1}]):
        for method, drop in methods.items():
            for task, more in {"a": 0, "b": seed}.items():
                key = module.Key(task, method, None if method == "dense" else 80.0, seed)
                cells.add(key, {"test": {"accuracy": 90 - drop * (1 + more)}})
    told = example("report").seeds_table(cells).splitlines()
    assert told[2:] == ["| 80 | 0 | 4.00 | 3.00 | 2.00 | 1.00 |", "| 80 | 1 | 6.00 | 4.50 | 3.00 | 1.50 |"]


def test_unknown_names_are_refused(example):
    accuracy = example("accuracy")
    with pytest.raises(ValueError, match=r"unknown methods \['leraned'\]"):
        accuracy.main(["--methods", "leraned"])
    with pytest.raises(ValueError, match=r"unknown tasks \['sst3'\]"):
        accuracy.main(["--tasks", "sst3"])


def test_version_changes_with_code_but_not_with_comments(example, tmp_path):
    cells = example("cells")
    for room in cells.ROOMS:
        (tmp_path / room).mkdir()
    (tmp_path / "config.py").write_text("")

    def version(code: str) -> str:
        (tmp_path / "codes" / "bits.py").write_text(code)
        return cells.version_of(tmp_path)

    first = version('"""Bits."""\n\ndef bits(x):\n    """Of x."""\n    return x > 0  # as floats\n')
    assert version("def bits(x):\n    return (x > 0)\n") == first
    assert version("def bits(x):\n    return x >= 0\n") != first
