"""Real English text that every installation has: the docstrings of its libraries, labelled by library.

    from docstring_corpus import build_corpus
    splits = build_corpus()    # DatasetDict: train, validation, test
    print(splits["train"][0])  # {"text": ..., "label": "sympy", "module": "sympy/sets/sets.py"}

The task is "which library is this from?". Files are parsed, never imported. The exact texts depend on the
installed versions; for one installation they are always the same.
"""

import ast
import importlib.util
import re
import sysconfig
import warnings
import zlib
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from datasets import Dataset, DatasetDict
from tqdm.auto import tqdm

# Python itself and what torch, transformers and datasets always bring along.
LIBRARIES = ("python", "torch", "transformers", "pandas", "huggingface_hub", "sympy", "networkx")
TEXTS_PER_LIBRARY = 590
TEXTS_PER_MODULE = 20  # so that no single file speaks for its library
# Shares of each library's texts, taken whole files at a time; the rest is for training.
HELD_OUT = {"test": 0.15, "validation": 0.10}

# Names that would give the answer away, in every text and not only in their own library's.
NAMES = re.compile(
    r"\b(?:c?python\d*|py_?torch|aten|transformers?|num_?py|np|pandas|pd|hugging[ _]?face(?:_hub)?|hf|sym_?py"
    r"|network_?x|nx|torch)\b",
    re.IGNORECASE,
)
DOCUMENTED = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
MARKUP = re.compile(r":[a-z:]+:(?=`)|[`*]+|~(?=\w)|<[^>]*>")


def clean(docstring: str) -> str | None:
    """First paragraph without markup and names of libraries, or None if that is no sentence of English."""
    paragraph = re.split(r"\n\s*\n", docstring.strip(), maxsplit=1)[0]
    text = " ".join(NAMES.sub("library", MARKUP.sub("", paragraph)).split())
    letters = sum(character.isalpha() or character == " " for character in text)
    if not 8 <= len(text.split()) <= 40 or letters < 0.85 * len(text):  # titles, essays; signatures, tables
        return None
    return text


def docstrings(source: str) -> Iterator[str]:
    """Docstrings of a module, its classes and functions, and of theirs."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # invalid escapes in other people's files
        waiting: list = [ast.parse(source)]
    while waiting:
        node = waiting.pop()
        docstring = ast.get_docstring(node, clean=False)
        if docstring:
            yield docstring
        # Not ast.walk: that visits every expression, which takes longer than parsing.
        waiting += [part for part in node.body if isinstance(part, DOCUMENTED)]


def python_files(library: str) -> list[tuple[str, Path]]:
    """`(module, file)` of a library's sources without its tests, in a fixed order unrelated to its layout."""
    if library == "python":
        root = Path(sysconfig.get_paths()["stdlib"])
    else:
        spec = importlib.util.find_spec(library)  # of a top-level package: finds it without running it
        if spec is None or spec.origin is None:
            return []
        root = Path(spec.origin).parent
    found = []
    for path in root.rglob("*.py"):
        inside = path.relative_to(root)
        skip = ("site-packages", "dist-packages", "_vendor", "lib2to3", "encodings")
        if not any(part in skip or part.startswith(("test", "_test")) for part in inside.parts):
            found.append((f"{library}/{inside.as_posix()}", path))
    return sorted(found, key=lambda item: (zlib.crc32(item[0].encode()), item[0]))


def read_library(library: str, limit: int) -> list[dict[str, str]]:
    """Up to `limit` rows of one library; reads no more files than that takes."""
    rows: dict[str, dict[str, str]] = {}
    for module, path in python_files(library):
        taken = 0
        try:
            texts = map(clean, docstrings(path.read_text(encoding="utf-8")))
            for text in texts:
                if text is not None and text not in rows and taken < TEXTS_PER_MODULE:
                    rows[text] = {"text": text, "label": library, "module": module}
                    taken += 1
        except (SyntaxError, UnicodeDecodeError):  # templates and files of another Python version
            continue
        if len(rows) >= limit:
            break
    return list(rows.values())[:limit]


def split_modules(rows: list[dict[str, str]]) -> dict[str, str]:
    """The split of every file of one library: no docstring has a neighbour from its file on another side."""
    sizes = Counter(row["module"] for row in rows)
    modules = sorted(sizes, key=lambda module: (zlib.crc32(b"split:" + module.encode()), module))
    split_of = dict.fromkeys(modules, "train")
    waiting = iter(modules)
    for split, share in HELD_OUT.items():
        held = 0
        while held < share * len(rows):
            module = next(waiting)
            split_of[module] = split
            held += sizes[module]
    return split_of


def build_corpus(texts_per_library: int = TEXTS_PER_LIBRARY) -> DatasetDict:
    """Train, validation and test splits with the columns `text`, `label` and `module`."""
    progress = tqdm(LIBRARIES, desc="Reading docstrings", unit="library")
    read = [read_library(library, texts_per_library) for library in progress]
    shared = {text for text, n in Counter(row["text"] for rows in read for row in rows).items() if n > 1}
    splits: dict[str, list[dict[str, str]]] = {"train": [], "validation": [], "test": []}
    for found in read:
        rows = [row for row in found if row["text"] not in shared]  # a sentence of two libraries has no answer
        split_of = split_modules(rows)
        for row in rows:
            splits[split_of[row["module"]]].append(row)
    labels = sorted({row["label"] for row in splits["train"]})
    if len(labels) < 6:
        raise RuntimeError(
            f"Found docstrings of only {labels}; the demo needs the sources of at least 6 of {LIBRARIES}. "
            "Give your own data with --train_file instead."
        )
    return DatasetDict({split: Dataset.from_list(part) for split, part in splits.items()})


if __name__ == "__main__":
    corpus = build_corpus()
    for split, part in corpus.items():
        print(split, part.num_rows, dict(sorted(Counter(part["label"]).items())))
    for row in corpus["train"].shuffle(seed=0).select(range(10)):
        print(f"{row['label']:>16}  {row['text']}")
