"""What a text classifier loses where single tokens lose their vectors: the exact damage, measured on whole texts."""

from itertools import islice

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import DataLoader
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_adacomp import AdaCompConfig, compress

DRAWS = 3
"""Tokens of each text whose vectors are replaced, one at a time."""

OBSERVED_BATCHES = 64
"""Batches whose loss tells the metric."""

LEAST_TIMES = 3
"""A token met less often says too little."""


def shortest_codes(
    model: PreTrainedModel, config: AdaCompConfig, batches: DataLoader, counts: Tensor
) -> tuple[Tensor, Tensor]:
    """The table if every token had a code of the shortest length, before any training, (V, d): by code-books fitted in
    the task's metric, and by those that know nothing of the task. Compresses `model`.
    """
    embedding = compress(model, config, counts).get_input_embeddings()

    state = embedding.training_state

    def decoded() -> Tensor:
        return embedding.codebook.reconstruct(state.source, state.metric, embedding.config.ladder[0])

    euclidean = decoded()
    model.train()
    for batch in islice(batches, OBSERVED_BATCHES):
        model(**batch).loss.backward()
        embedding.step(0.0)
        model.zero_grad()
    embedding.end_observation()
    return decoded(), euclidean


@torch.no_grad()
def sureness_and_damage(
    model: PreTrainedModel, batches: DataLoader, tables: dict[str, Tensor], special: Tensor
) -> dict[str, np.ndarray]:
    """Means of each token, (V,), NaN for one met less than `LEAST_TIMES` times.

    `sureness` is the probability of the likeliest label in the texts that a token stands in. Under the name of each of
    `tables`, (V, d), it is the KL divergence from the model's outputs of those where this token takes its vector from
    that table, while all others of the text keep theirs. Tokens in `special` are left as they are.
    """
    source = model.eval().get_input_embeddings().weight
    generator = torch.Generator().manual_seed(0)
    sums = {name: torch.zeros(2, len(source)) for name in ("sureness", *tables)}  # of the values, and how many

    def note(name: str, tokens: Tensor, values: Tensor) -> None:
        sums[name].index_add_(1, tokens, torch.stack([values, torch.ones_like(values)]))

    def log_probabilities(vectors: Tensor, inputs: dict[str, Tensor]) -> Tensor:
        return model(inputs_embeds=vectors, **inputs).logits.log_softmax(-1)

    for batch in tqdm(batches, desc="Measuring damage"):
        inputs = {name: value for name, value in batch.items() if name not in ("input_ids", "labels")}
        ids = batch["input_ids"]
        exact = source[ids]
        expected = log_probabilities(exact, inputs)
        words = inputs["attention_mask"].bool() & ~torch.isin(ids, special)
        rows, places = torch.where(words)
        note("sureness", ids[rows, places], expected.exp().amax(1)[rows])
        rows = words.any(1).nonzero().squeeze(1)
        for _ in range(DRAWS if len(rows) else 0):
            places = torch.multinomial(words[rows].float(), 1, generator=generator).squeeze(1)
            tokens = ids[rows, places]
            for name, table in tables.items():
                vectors = exact.clone()
                vectors[rows, places] = table[tokens]
                outputs = log_probabilities(vectors, inputs)
                divergence = F.kl_div(outputs, expected, log_target=True, reduction="none").sum(1)
                note(name, tokens, divergence[rows])
    return {
        name: torch.where(times >= LEAST_TIMES, total / times, torch.nan).numpy()
        for name, (total, times) in sums.items()
    }
