import json

import pytest


def test_rows_are_measured_on_small_tables(example, tmp_path):
    file = tmp_path / "speed.json"
    options = [
        "--rows",
        "lookup",
        "head",
        "train",
        "warm_start",
        "imports",
        "--scale",
        "0.02",
        "--repeats",
        "1",
        "--threads",
        "1",
        "--json_out",
        str(file),
    ]
    figures = example("speed").main(options)
    assert figures["head: largest error of a logit over the largest logit"] < 1e-4
    assert all(value > 0 for value in figures.values())
    assert len(figures) == 12
    assert json.loads(file.read_text()) == figures


def test_unknown_rows_are_named(example):
    with pytest.raises(ValueError, match=r"unknown rows \['warp'\]: choose among forward, lookup"):
        example("speed").main(["--rows", "warp"])
