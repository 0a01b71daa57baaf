import gzip
import json

import pytest

from hf_adacomp.text_files import read_texts

TEXTS = ["one, two", 'said "three"\nfour', "fünf 六"]


def write(file, kind, name="text"):
    if kind == "jsonl":
        content = "\n".join(json.dumps({"label": 1, name: text}, ensure_ascii=False) for text in TEXTS) + "\n\n"
    elif kind == "txt":
        content = "\r\n".join(text.replace("\n", " ") for text in TEXTS) + "\n\n  \n"
    else:
        delimiter = {"csv": ",", "tsv": "\t"}[kind]
        quoted = ('"' + text.replace('"', '""') + '"' for text in TEXTS)
        content = "\n".join([f"label{delimiter}{name}", *(f"1{delimiter}{text}" for text in quoted)]) + "\n"
    data = content.encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    return file


@pytest.mark.parametrize("packed", ["", ".gz"])
@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl"])
def test_texts_of_every_kind_of_file(tmp_path, kind, packed):
    expected = [text.replace("\n", " ") for text in TEXTS] if kind == "txt" else TEXTS
    loud = write(tmp_path / f"texts.{kind}{packed}", kind)
    assert read_texts(loud.rename(tmp_path / f"LOUD.{kind}{packed}".upper())) == expected
    assert read_texts(write(tmp_path / f"texts.{kind}{packed}", kind)) == expected


@pytest.mark.parametrize("kind", ["csv", "tsv", "jsonl"])
def test_columns_are_named_or_known(tmp_path, kind):
    assert read_texts(write(tmp_path / f"a.{kind}", kind, "sentence")) == TEXTS
    odd = write(tmp_path / f"b.{kind}", kind, "query")
    assert read_texts(odd, "query") == TEXTS
    with pytest.raises(ValueError, match="neither a column 'text' nor 'sentence', but label, query: name one"):
        read_texts(odd)
    with pytest.raises(ValueError, match="no column 'body', but label, query"):
        read_texts(odd, "body")


def test_files_without_text_are_refused(tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    with pytest.raises(ValueError, match=r"empty\.txt holds no text"):
        read_texts(tmp_path / "empty.txt")
    with pytest.raises(ValueError, match="--column text is for"):
        read_texts(write(tmp_path / "texts.txt", "txt"), "text")


def test_a_mark_of_the_byte_order_is_no_part_of_a_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xef\xbb\xbftext,label\none,1\n")
    assert read_texts(tmp_path / "a.csv") == ["one"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "one"}\n{"text": \n', r"a\.jsonl, line 2: not a JSON object.*'\{\"text\":'"),
        ("a.jsonl", b'"one"\n', r"a\.jsonl, line 1: not a JSON object with a text, but '\"one\"'"),
        ("a.jsonl", b'{"text": ["one", "two"]}\n', r"column 'text' should hold texts, but has \['one', 'two'\]"),
        ("a.json", b'[{"text": "one"}]', r"a\.json: \.json is not read. Write a line a text, or one of \.csv"),
        ("a.csv", b"text\n" + b"x" * 200_000 + b"\n", r"a\.csv cannot be read as \.csv.*field larger than"),
        ("a.txt", b"\xff\xfe\x00", r"a\.txt cannot be read as \.txt in UTF-8"),
        ("a.txt.gz", gzip.compress(b"one\n" * 99)[:-9], r"a\.txt\.gz cannot be read as \.txt\.gz"),
    ],
)
def test_damaged_files_are_told_of(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_texts(tmp_path / name)
