"""Texts from files, for the command line: a line a text, or a column of a table."""

from __future__ import annotations

import csv
import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import IO

TABLES = (".csv", ".tsv", ".jsonl")
COLUMNS = ("text", "sentence")
"""Columns that are taken without being named."""


def read_texts(file: Path, column: str | None = None) -> list[str]:
    """The texts of a file that are not empty.

    Args:
        file: Plain text, a line a text; or `.csv`, `.tsv` (with a header) or `.jsonl`, a row a text. `.gz` too.
        column: Name of the texts' column in a table; `text` or `sentence` if not given.

    Raises:
        ValueError: If the file holds no text, or has no such column.
    """
    with _open(file) as lines:
        texts = [text for text in map(str.strip, _texts(file, lines, column)) if text]
    if not texts:
        raise ValueError(f"{file} holds no text")
    return texts


def _open(file: Path) -> IO[str]:
    # Field values of a table may hold line ends of their own.
    return (
        gzip.open(file, "rt", encoding="utf-8", newline="")
        if file.suffix == ".gz"
        else file.open(encoding="utf-8", newline="")
    )


def _texts(file: Path, lines: IO[str], column: str | None) -> Iterator[str]:
    kind = Path(file.name.removesuffix(".gz")).suffix
    if kind not in TABLES:
        if column is not None:
            raise ValueError(f"--column {column} is for {', '.join(TABLES)}; {file} is plain text, a line a text")
        yield from lines
        return
    if kind == ".jsonl":
        rows: Iterator[dict[str, str]] = (json.loads(line) for line in lines if line.strip())
    else:
        rows = iter(csv.DictReader(lines, delimiter="\t" if kind == ".tsv" else ","))
    for row in rows:
        wanted = [column] if column is not None else [name for name in COLUMNS if name in row]
        if not wanted or wanted[0] not in row:
            named = f"no column {column!r}" if column is not None else "neither a column 'text' nor 'sentence'"
            raise ValueError(f"{file} has {named}, but {', '.join(map(str, row))}: name one by --column")
        yield row[wanted[0]] or ""
