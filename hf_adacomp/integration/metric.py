"""The metric: which directions of the token vectors matter for the task, measured before anything is learned.

With the gradients g of the model's outputs at the vectors of all token positions, and, where a tied head turns hidden
states h into logits, the gradients z at those,

    G = sum g g^T + sum |z|^2 h h^T        M = (R / mean(diag R) + I) / 2,  R = G^(1/2)

an error e of a token's vector costs the outputs about `e^T M e`. Code-books are fitted and code lengths chosen in this
metric. It needs no occurrence of a token, so that tokens which the training data never shows are judged too.

Gradients tell of small errors: a few directions in which they are huge hold most of G (two of 384 hold 60 % of it in a
tagger), while outputs react to a large error in them far less than in proportion. Hence the root, as in full-matrix
AdaGrad (Duchi et al. 2011), and the Euclidean half. Against G itself and 3 I, without training, the tagger's outputs
diverge by 19 % less at 80x and by 29 % less at 300x, and a language model loses a third less.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from itertools import islice
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, Subset
from tqdm.auto import tqdm

from ..nn.embedding import AdaptiveCompressedEmbedding
from .tables import compressed_heads
from .training_data import columns, input_name

MEASURED_ROWS = 2048
MEASURED_VECTORS = 1 << 17
BATCH_SIZE = 32
"""Rows of the training data that gradients are measured on, gradients after which that ends, and rows at once."""

MANY_CLASSES = 1024
"""Outputs of more classes are judged by the loss: random directions among them would say little at great cost."""

SWITCH = "Set AdaCompConfig(significance=False) to take all directions alike"


def task_metrics(
    model: nn.Module,
    embeddings: Sequence[AdaptiveCompressedEmbedding],
    loader: DataLoader[Any],
    show_progress: bool = True,
) -> dict[AdaptiveCompressedEmbedding, Tensor]:
    """The metric M of each table, (d, d) float32; the Euclidean one where the outputs react to nothing.

    Args:
        model: The model that is about to be trained. While it is measured it computes with the source vectors.
        embeddings: Its compressed tables that are not packed.
        loader: The training data loader; rows spread evenly over its dataset are read.
        show_progress: Whether to draw a progress bar.

    Raises:
        ValueError: If the model does not take the batches, returns neither logits nor a loss, or has gradients that are
            NaN or Inf.
    """
    if not embeddings:
        return {}
    device = embeddings[0].books[0].bias.device
    # Summed and taken apart in float64 on the CPU: of directions that outputs hardly react to, float32 would leave
    # rounding errors, other ones on each processor, and the root would make them large.
    moments = {table: torch.zeros(2 * (table.embedding_dim,), dtype=torch.float64) for table in embeddings}
    uses: list[Use] = []
    measured = 0
    name = input_name(model)
    with ExitStack() as stack:
        stack.callback(model.train, model.training)
        model.eval()
        stack.enter_context(torch.random.fork_rng())  # training shall draw the same numbers without us
        torch.manual_seed(embeddings[0].config.seed)
        for table in embeddings:
            stack.enter_context(_source_vectors(model, table, uses, moments[table]))
        for row in tqdm(_rows(loader, name), desc="Measuring significance", disable=not show_progress):
            batch = {k: v.to(device) if isinstance(v, Tensor) else v for k, v in row.items()}
            mask = batch.get("attention_mask")
            with torch.enable_grad():
                output = _random_output(_outputs(model, batch), batch)
                gradients = torch.autograd.grad(output, [use.result for use in uses], allow_unused=True)
            for use, gradient in zip(uses, gradients, strict=True):
                if gradient is not None:
                    rows = use.reactions(gradient, mask).to("cpu", torch.float64)
                    use.moments.addmm_(rows.T, rows)
                    measured += len(rows)
            uses.clear()
            if measured >= MEASURED_VECTORS:
                break
    return {table: _metric(sums) for table, sums in moments.items()}


def _metric(moments: Tensor) -> Tensor:
    euclidean = torch.eye(len(moments), dtype=moments.dtype)
    if not moments.any():
        return euclidean.float()
    if not moments.isfinite().all():
        raise ValueError(f"cannot measure which tokens matter: gradients of the outputs are NaN or Inf. {SWITCH}")
    variances, axes = torch.linalg.eigh(moments)
    reaction: Tensor = (axes * variances.clamp_min(0).sqrt()) @ axes.T
    reaction /= reaction.diagonal().mean()
    return ((reaction + euclidean) / 2).float()


class Use(NamedTuple):
    """One use of a table in a forward pass."""

    moments: Tensor
    """Where its second moments are due."""
    result: Tensor
    """What came of it."""
    reactions: Callable[[Tensor, Tensor | None], Tensor]
    """Gradients at the table's vectors, (N, d), from the gradient at the result and the batch's attention mask."""


@contextmanager
def _source_vectors(
    model: nn.Module, table: AdaptiveCompressedEmbedding, uses: list[Use], moments: Tensor
) -> Iterator[None]:
    """Let a table and its heads compute with the source vectors, and note each use."""
    source = table.require_training("measuring").source.detach()

    def look_up(ids: Tensor) -> Tensor:
        def reactions(gradient: Tensor, mask: Tensor | None) -> Tensor:
            return gradient.flatten(0, -2) if mask is None or mask.shape != ids.shape else gradient[mask.bool()]

        exact = source[ids].requires_grad_()
        uses.append(Use(moments, exact, reactions))
        return exact * table.scale

    def score(bias: Tensor | None, hidden: Tensor) -> Tensor:
        def reactions(gradient: Tensor, _: Tensor | None) -> Tensor:
            # Those of all tokens' vectors at one position have the second moments of this one row.
            rows: Tensor = hidden.detach() * gradient.norm(dim=-1, keepdim=True)
            return rows.flatten(0, -2)

        logits = F.linear(hidden, source, bias).requires_grad_()
        uses.append(Use(moments, logits, reactions))
        return logits

    heads = [head for head in compressed_heads(model).values() if head.embedding is table]
    places: list[tuple[nn.Module, Callable[[Tensor], Tensor]]] = [(table, look_up)]
    places += [(head, partial(score, head.bias)) for head in heads]
    for module, forward in places:
        module.forward = forward
    try:
        yield
    finally:
        for module, _ in places:
            del module.forward  # back to that of the class


def _rows(loader: DataLoader[Any], name: str) -> Iterator[dict[str, Any]]:
    """Batches of rows that lie evenly spread over the dataset, or of the first rows of an iterable one.

    Columns of sentence-transformers come as batches of their own.
    """
    dataset = loader.dataset
    if not isinstance(dataset, IterableDataset):
        total = len(dataset)  # type: ignore[arg-type]  # map-style datasets have a length
        step = max(1, total // MEASURED_ROWS)
        dataset = Subset(dataset, range(0, total, step)[:MEASURED_ROWS])
    size = min(BATCH_SIZE, loader.batch_size or BATCH_SIZE)
    batches = DataLoader(dataset, batch_size=size, collate_fn=loader.collate_fn)
    for batch in islice(iter(batches), -(-MEASURED_ROWS // size)):
        for column in columns(batch, name) or [""]:
            yield {key.removeprefix(column): value for key, value in batch.items() if key.startswith(column)}


def _outputs(model: nn.Module, batch: dict[str, Any]) -> Mapping[str, Any]:
    """What the model returns for what it takes of a batch, which may hold columns for the Trainer alone."""
    named = inspect.signature(model.forward).parameters.keys() & batch.keys()
    try:  # sentence-transformers' models take the batch as one dictionary
        output = model(**{name: batch[name] for name in named}) if named else model(batch)
    except (TypeError, KeyError) as error:
        raise ValueError(f"cannot measure which tokens matter: {error}. {SWITCH}") from error
    if not isinstance(output, Mapping):
        raise ValueError(f"cannot measure which tokens matter: the model returns a {type(output).__name__}. {SWITCH}")
    return output


def _random_output(output: Mapping[str, Any], batch: dict[str, Any]) -> Tensor:
    """A scalar whose gradient shows how the outputs react: logits projected on random directions, or the loss."""
    logits = [
        value.float()
        for name, value in output.items()
        if ("logits" in name or name == "sentence_embedding") and isinstance(value, Tensor)
    ]
    if output.get("loss") is not None and (not logits or max(value.shape[-1] for value in logits) > MANY_CLASSES):
        loss: Tensor = output["loss"].float()  # a mean over the labels
        return loss * (batch["labels"] >= 0).sum() if "labels" in batch else loss
    if not logits:
        raise ValueError(
            f"cannot measure which tokens matter: the model returns neither logits nor a loss but {[*output]}. {SWITCH}"
        )
    return torch.stack([(value * torch.randn_like(value)).sum() for value in logits]).sum()
