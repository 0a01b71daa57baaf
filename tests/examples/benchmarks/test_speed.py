"""Time and memory: each row on small tables, once."""

import json

import pytest


@pytest.mark.usefixtures("quick_fit")
def test_rows_are_measured_on_small_tables(example, tmp_path, monkeypatch):
    file = tmp_path / "speed.json"
    module = example("speed")
    monkeypatch.setattr(module, "USES_OF_WEIGHT", dict([*module.USES_OF_WEIGHT.items()][-1:]))
    rows = ["lookup", "head", "weight", "train", "warm_start", "imports"]
    monkeypatch.setitem(module.MINILM, "num_hidden_layers", 1)
    options = ["--scale", "0.01", "--repeats", "1", "--threads", "1", "--json_out", str(file)]
    figures = module.main(["--rows", *rows, *options])
    assert figures["head: largest error of a logit over the largest logit"] < 1e-4
    assert all(value > 0 for name, value in figures.items() if "its memory" not in name)  # which noise may exceed
    assert len(figures) == 14
    assert json.loads(file.read_text()) == figures


def test_unknown_rows_are_named(example):
    with pytest.raises(ValueError, match=r"unknown rows \['warp'\]: choose among forward, lookup"):
        example("speed").main(["--rows", "warp"])
