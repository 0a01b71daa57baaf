"""The default texts of the first example: their size, their splits, no answer given away, no chance."""

import pytest


@pytest.fixture(scope="module")
def corpus(example):
    return example("docstring_corpus").build_corpus()


def test_corpus_has_the_promised_size(corpus):
    assert len({*corpus["train"]["label"]}) >= 6
    assert sum(part.num_rows for part in corpus.values()) >= 4000
    for split in ("validation", "test"):
        assert {*corpus[split]["label"]} == {*corpus["train"]["label"]}


def test_corpus_splits_share_no_file_and_no_text(corpus):
    for column in ("module", "text"):
        values = {split: {*part[column]} for split, part in corpus.items()}
        assert values["train"].isdisjoint(values["validation"] | values["test"])
        assert values["validation"].isdisjoint(values["test"])


def test_corpus_texts_do_not_name_their_library(corpus):
    for part in corpus.values():
        for row in part:
            assert row["label"] not in row["text"].lower().split(), row


def test_corpus_is_deterministic(example):
    once, again = (example("docstring_corpus").build_corpus(texts_per_library=60) for _ in range(2))
    assert {split: part.to_dict() for split, part in once.items()} == {
        split: part.to_dict() for split, part in again.items()
    }
