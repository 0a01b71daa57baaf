"""The benchmark's tasks, as `tasks.json` describes them: data files, epochs, learning rates."""

import json
from dataclasses import dataclass, fields
from pathlib import Path

from classification import ModelArguments, text_classification
from comparison import Task
from labelled_texts import DataTrainingArguments
from static_vectors import VectorArguments, static_language, static_tagging, static_vectors
from token_classification import TaggingArguments, token_classification

DATA_SEED = 0
"""Of the splits that are held out: all runs of a task see the same texts, whatever their seed."""


@dataclass(frozen=True)
class BenchmarkTask:
    """A task and how long to train on it.

    `epochs` train the dense model; every method then trains `further_epochs` from there, the dense model too.
    `mixed_precision` allows `--bf16`, with which an LSTM is many times slower on a CPU.
    """

    kind: str
    options: dict
    epochs: float = 3.0
    further_epochs: float = 2.0
    learning_rate: float = 5e-5
    further_learning_rate: float = 5e-5
    mixed_precision: bool = True

    def build(self) -> Task:
        if self.kind == "token_classification":
            return token_classification(TaggingArguments(**self.options), DATA_SEED)
        if self.kind.startswith("static_"):
            vectors = VectorArguments(self.options["vectors_file"])
            texts = {name: value for name, value in self.options.items() if name != "vectors_file"}
            if self.kind == "static_language":
                return static_language(vectors, {name.removesuffix("_file"): file for name, file in texts.items()})
            if self.kind == "static_tagging":
                return static_tagging(vectors, TaggingArguments(**texts), DATA_SEED)
            return static_vectors(vectors, DataTrainingArguments(**texts), DATA_SEED)
        if self.kind == "text_classification":
            return text_classification(ModelArguments(), DataTrainingArguments(**self.options), DATA_SEED)
        raise ValueError(
            "a task is a text_classification, token_classification, static_vectors, static_tagging or "
            f"static_language; got {self.kind!r}"
        )


def read_tasks(file: Path, data_dir: Path) -> dict[str, BenchmarkTask]:
    """Tasks by name; files are looked for in `data_dir`."""
    training = {field.name for field in fields(BenchmarkTask)} - {"options"}
    tasks = {}
    for name, given in json.loads(file.read_text(encoding="utf-8")).items():
        options = {
            option: str(data_dir / value) if option.endswith("_file") else value
            for option, value in given.items()
            if option not in training
        }
        tasks[name] = BenchmarkTask(
            options=options, **{option: value for option, value in given.items() if option in training}
        )
    return tasks
