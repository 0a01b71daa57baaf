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
