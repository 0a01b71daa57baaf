"""Texts from files, for the command line: a line a text, or a column of a table."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO, Any

TABLES = (".csv", ".tsv", ".jsonl")
UNREADABLE = (".json", ".parquet", ".arrow", ".zip")
COLUMNS = ("text", "sentence")
"""Columns that are taken without being named."""


def read_texts(file: Path, column: str | None = None) -> list[str]:
    """The texts of a file that are not empty.

    Args:
        file: Plain text, a line a text; or `.csv`, `.tsv` (with a header) or `.jsonl`, a row a text. `.gz` too.
        column: Name of the texts' column in a table; `text` or `sentence` if not given.

    Raises:
        ValueError: If the file holds no text, is damaged or of a kind that is not read, or has no such column.
    """
    try:
        with _open(file) as lines:
            texts = [text for text in map(str.strip, _texts(file, lines, column)) if text]
    except (csv.Error, EOFError, UnicodeDecodeError, gzip.BadGzipFile, zlib.error) as error:
        raise ValueError(f"{file} cannot be read as {''.join(file.suffixes) or 'text'} in UTF-8: {error}") from error
    if not texts:
        raise ValueError(f"{file} holds no text")
    return texts


def _open(file: Path) -> IO[str]:
    # Field values of a table may hold line ends of their own; spreadsheets write a mark before the first.
    if file.suffix.lower() == ".gz":
        return gzip.open(file, "rt", encoding="utf-8-sig", newline="")
    return file.open(encoding="utf-8-sig", newline="")


def _texts(file: Path, lines: IO[str], column: str | None) -> Iterator[str]:
    kind = Path(file.name.lower().removesuffix(".gz")).suffix
    if kind in UNREADABLE:
        raise ValueError(f"{file}: {kind} is not read. Write a line a text, or one of {', '.join(TABLES)}")
    if kind not in TABLES:
        if column is not None:
            raise ValueError(f"--column {column} is for {', '.join(TABLES)}; {file} is plain text, a line a text")
        yield from lines
        return
    if kind == ".jsonl":
        rows: Iterator[dict[str, Any]] = _objects(file, lines)
    else:
        rows = iter(csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ","))
    for row in rows:
        wanted = [column] if column is not None else [name for name in COLUMNS if name in row]
        if not wanted or wanted[0] not in row:
            named = f"no column {column!r}" if column is not None else "neither a column 'text' nor 'sentence'"
            raise ValueError(f"{file} has {named}, but {', '.join(map(str, row))}: name one by --column")
        text = row[wanted[0]]
        if not isinstance(text, str | None):
            raise ValueError(f"{file}: column {wanted[0]!r} should hold texts, but has {text!r}: name one by --column")
        yield text or ""


def _objects(file: Path, lines: IO[str]) -> Iterator[dict[str, Any]]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if not isinstance(row, dict):
            raise ValueError(f"{file}, line {number}: not a JSON object with a text, but {line.strip()[:80]!r}")
        yield row
