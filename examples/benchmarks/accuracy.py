"""Accuracy at equal size: every way to make a token table small, on the same tasks, from the same dense models.

    python examples/benchmarks/accuracy.py --data_dir data --tasks trec sst2 --ratios 40 80 --methods learned count

A dense model is trained for each task and seed. Every method starts from it, replaces the token table, and trains
everything but its codes for the same further epochs; so does the dense model. Each result, a cell, is written to
`cells.jsonl` as soon as it is there: run the command again to go on, or with other selections to add to it. Two
processes may share the folders as long as they work on different tasks or seeds. `report.py` prints what there is.

Settings were chosen on validation splits; test splits are read to report.
"""

import itertools
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cells import Cells, Key, label_scores, method_version, score_items
from comparison import Task, parse
from information import correlation_at_equal_count, label_information, ordinary_tokens
from methods import METHODS, OURS, OWN_SIZE, OutOfReachError, base, install, stored_bytes
from peers import Peer
from report import write_report
from tasks import BenchmarkTask, read_tasks
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel, PrinterCallback, Trainer, TrainingArguments, set_seed

from hf_adacomp import AdaCompCallback

RATIOS = (8.0, 16.0, 40.0, 80.0, 160.0, 300.0)
LEADING = ("dense", *OURS)
"""Methods that run with every seed; the others run with the first, until one turns out to be the best peer."""


@dataclass
class BenchmarkArguments:
    data_dir: str = field(
        default_factory=lambda: os.environ.get("ADACOMP_DATA", "data"),
        metadata={"help": "Folder of the data files. Default: the environment's ADACOMP_DATA."},
    )
    tasks_file: str = field(
        default=str(Path(__file__).with_name("tasks.json")),
        metadata={"help": "What the tasks are: files, kinds, epochs."},
    )
    tasks: list[str] | None = field(default=None, metadata={"help": "Only these tasks."})
    methods: list[str] = field(
        default_factory=lambda: list(METHODS),
        metadata={"help": "Only these; `learned:tied=false;seed=3` changes settings of AdaCompConfig."},
    )
    ratios: list[float] = field(default_factory=lambda: list(RATIOS), metadata={"help": "Dense bytes / stored bytes."})
    seeds: list[int] = field(default_factory=lambda: [0, 1, 2], metadata={"help": "Seeds of training and fitting."})
    all_seeds: bool = field(default=False, metadata={"help": "Every seed for peers too, not the first only."})
    output_dir: str = field(
        default=str(Path(__file__).with_name("results")), metadata={"help": "Folder of cells.jsonl and the report."}
    )
    model_dir: str = field(default="outputs/accuracy_benchmark", metadata={"help": "Folder of the dense models."})
    bf16: bool = field(default=False, metadata={"help": "Mixed precision in training and evaluation."})
    max_train_samples: int | None = field(default=None, metadata={"help": "For a quick look."})

    def __post_init__(self) -> None:
        if unknown := {base(method) for method in self.methods} - set(METHODS):
            raise ValueError(f"unknown methods {sorted(unknown)}: choose among {', '.join(METHODS)}")


class Run:
    """One task with one seed: its data, its dense model, and the training that all methods share."""

    def __init__(self, name: str, benchmark_task: BenchmarkTask, seed: int, args: BenchmarkArguments) -> None:
        self.settings, self.seed, self.args = benchmark_task, seed, args
        self.task: Task = benchmark_task.build()
        self.folder = Path(args.model_dir) / f"{name}-{seed}"
        if not (self.folder / "config.json").exists():
            set_seed(seed)
            trainer = self.trainer(self.task.new_model(), benchmark_task.epochs, benchmark_task.learning_rate)
            trainer.train()
            trainer.save_model(self.folder)
        self.model_class = type(self.task.new_model())
        self.dense_bytes = self.dense().get_input_embeddings().weight.nbytes

    def dense(self) -> PreTrainedModel:
        """The dense model that all methods start from."""
        model: PreTrainedModel = self.model_class.from_pretrained(self.folder)
        return model

    def start(self, method: str, ratio: float | None) -> tuple[PreTrainedModel, Tensor]:
        """The dense model with the table of a method in place of its own, and the counts of its tokens, (V,)."""
        model = self.dense()
        counts = self.task.token_counts(model.get_input_embeddings().num_embeddings)
        install(method, model, ratio, counts, self.seed)
        return model, counts

    def further_trainer(self, model: PreTrainedModel, method: str) -> Trainer:
        """What trains it on."""
        trainer = self.trainer(model, self.settings.further_epochs, self.settings.further_learning_rate)
        if base(method) in OURS:
            trainer.add_callback(AdaCompCallback())
        return trainer

    def cell(self, method: str, ratio: float | None) -> dict:
        """Train and measure one method."""
        stamp = {"version": method_version()} if base(method) in OURS else {}
        started = time.perf_counter()
        try:
            model, counts = self.start(method, ratio)
        except OutOfReachError as reason:
            return {"out_of_reach": str(reason), **stamp}
        fitted = time.perf_counter()
        trainer = self.further_trainer(model, method)
        trainer.train()
        if isinstance(model.get_input_embeddings(), Peer):
            model.get_input_embeddings().finish()
        trained = time.perf_counter()
        cell = {"ratio": self.dense_bytes / stored_bytes(model), "fit_seconds": fitted - started}
        cell["train_seconds"] = trained - fitted
        for split in ("validation", "test"):
            output = trainer.predict(self.task.splits[split])
            cell[split] = score_items(output.predictions, output.label_ids)
        for name in ("right", "of"):  # methods are compared text by text on the test split alone
            del cell["validation"][name]
        if method != "dense":  # the labels are the same
            del cell["test"]["of"]
        if base(method) in OURS:
            cell |= self.information_followed(model, counts)
        return {**cell, **stamp}

    def information_followed(self, model: PreTrainedModel, counts: Tensor) -> dict:
        """How code lengths go with information about the label at equal count, where texts have one label each."""
        lengths = model.get_input_embeddings().code_lengths()
        if self.task.kind != "text-classification" or len(lengths.unique()) == 1:
            return {}
        values = lengths.numpy(), label_information(self.task, len(counts)), counts.numpy()
        ordinary = ordinary_tokens(self.task, counts.numpy())
        return {"label_information": correlation_at_equal_count(*(each[ordinary] for each in values))}

    def trainer(self, model: PreTrainedModel, epochs: float, learning_rate: float) -> Trainer:
        settings = TrainingArguments(
            str(self.folder.with_name("scratch")),
            num_train_epochs=epochs,
            learning_rate=learning_rate,
            seed=self.seed,
            per_device_train_batch_size=32,
            per_device_eval_batch_size=64,
            train_sampling_strategy="group_by_length",
            save_strategy="no",
            logging_steps=50,
            report_to="none",
            disable_tqdm=True,
            bf16=self.args.bf16 and self.settings.mixed_precision,
            use_cpu=not torch.cuda.is_available(),
        )
        train = self.task.splits["train"]
        if self.args.max_train_samples is not None and self.args.max_train_samples < len(train):
            train = train.shuffle(seed=0).select(range(self.args.max_train_samples))
        trainer = Trainer(
            model=model,
            args=settings,
            train_dataset=train,
            data_collator=self.task.collator,
            preprocess_logits_for_metrics=label_scores,
        )
        trainer.remove_callback(PrinterCallback)
        return trainer


def keys(args: BenchmarkArguments, tasks: dict[str, BenchmarkTask]) -> list[Key]:
    """Cells that are asked for, in the order of the work."""
    chosen = []
    for seed, task in itertools.product(args.seeds, args.tasks or tasks):
        for method in args.methods:
            if seed != args.seeds[0] and base(method) not in LEADING and not args.all_seeds:
                continue
            ratios = [None] if method in OWN_SIZE else args.ratios
            chosen += [Key(task, method, ratio, seed) for ratio in ratios]
    return chosen


def make_cells(
    wanted: list[Key], tasks: dict[str, BenchmarkTask], args: BenchmarkArguments
) -> Iterator[tuple[Key, dict]]:
    """Cell after cell; neighbours of one task and seed share its data and its dense model."""
    run, current = None, None
    with tqdm(wanted, desc="Cells") as progress:
        for key in progress:
            progress.set_postfix_str(" ".join(str(part) for part in key if part is not None))
            if (key.task, key.seed) != current:
                run, current = Run(key.task, tasks[key.task], key.seed, args), (key.task, key.seed)
            yield key, run.cell(key.method, key.ratio)


def main(arguments: list[str] | None = None) -> dict:
    (args,) = parse((BenchmarkArguments,), arguments)
    tasks = read_tasks(Path(args.tasks_file), Path(args.data_dir))
    if unknown := set(args.tasks or ()) - set(tasks):
        raise ValueError(f"unknown tasks {sorted(unknown)}: {args.tasks_file} has {', '.join(tasks)}")
    folder = Path(args.output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    cells = Cells(folder / "cells.jsonl")
    cells.refuse_mixture(*[method_version() for method in args.methods if base(method) in OURS])
    missing = [key for key in keys(args, tasks) if key not in cells]
    for key, cell in make_cells(missing, tasks, args):
        cells.add(key, cell)
    return write_report(cells, folder)


if __name__ == "__main__":
    main()
