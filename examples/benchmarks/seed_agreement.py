"""Whether selection learns the same about a token from one seed to the next.

    python examples/benchmarks/seed_agreement.py --data_dir data --tasks sst2_vectors trec_vectors --ratios 200

Each seed has a dense model, an order of the data, noise and a code-book of its own. What it learns of a token is
whether the task asks for a longer code than count and metric gave it: the slope of the token's learned offsets over the
code lengths. Prints the rank correlation of these slopes between each two seeds, over the tokens seen often enough.
"""

from dataclasses import dataclass, field
from itertools import combinations
from pathlib import Path

import torch
from accuracy import BenchmarkArguments, Run
from comparison import parse
from information import ordinary_tokens
from scipy.stats import spearmanr
from tasks import read_tasks
from torch import Tensor
from transformers import TrainerCallback

from hf_adacomp.lengths.selector import LengthSelector


@dataclass
class AgreementArguments(BenchmarkArguments):
    methods: list[str] = field(
        default_factory=lambda: ["learned"], metadata={"help": "`learned`, or with settings `learned:name=value`."}
    )


class LearnedSlopes(TrainerCallback):
    """Keeps the selector, which packing drops, for what it has learned: how much more a token wants a longer code."""

    selector: LengthSelector

    def on_step_end(self, args, state, control, model, **_):
        training = model.get_input_embeddings().training_state
        if training is not None:
            self.selector = training.selector

    def slopes(self) -> Tensor:
        """Of all tokens, (V,)."""
        lengths = torch.tensor(self.selector.ladder, dtype=torch.float32)
        return self.selector.offset.detach() @ (lengths - lengths.mean())


def learned_slopes(run: Run, method: str, ratio: float) -> tuple[Tensor, Tensor]:
    """Slopes of all tokens after selection, (V,), and which were seen often enough."""
    model, counts = run.start(method, ratio)
    trainer, kept = run.further_trainer(model, method), LearnedSlopes()
    trainer.add_callback(kept)
    trainer.train()
    return kept.slopes(), torch.from_numpy(ordinary_tokens(run.task, counts.numpy()))


def main(arguments: list[str] | None = None) -> dict[tuple[str, str, float], list[float]]:
    (args,) = parse((AgreementArguments,), arguments)
    tasks = read_tasks(Path(args.tasks_file), Path(args.data_dir))
    found = {}
    for name in args.tasks or tasks:
        runs = [Run(name, tasks[name], seed, args) for seed in args.seeds]
        for method in args.methods:
            for ratio in args.ratios:
                learned = [learned_slopes(run, method, ratio) for run in runs]
                correlations = [
                    float(spearmanr(first[ordinary], second[ordinary]).statistic)
                    for (first, ordinary), (second, _) in combinations(learned, 2)
                ]
                found[name, method, ratio] = correlations
                shown = ", ".join(f"{value:.2f}" for value in correlations)
                print(f"{name}, {method}, {ratio:g}x: rank correlation of two seeds {shown}")
    return found


if __name__ == "__main__":
    main()
