"""How far a packed model agrees with the dense one, on texts that neither was fitted to."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .answers import ask
from .calibration import source_in_use

MOST_NUMBERS = 1 << 26
"""Of the dense answers that are kept (as float32: 0.25 GB): logits of a vocabulary are many."""


class Agreement:
    """Cosines between what a model said before it was packed and what it says later.

    Args:
        model: A compressed model in training form; it answers with its source vectors.
        batches: What it is asked, as it takes them.
    """

    def __init__(self, model: Any, batches: Iterable[Mapping[str, Any]]) -> None:
        self.model, self.batches = model, batches
        with source_in_use(model):
            self.dense = self._answers()

    @property
    def of_numbers(self) -> bool:
        """Whether answers are single numbers, whose angle tells their sign alone."""
        return self.dense[0].shape[1] == 1

    def cosines(self) -> Tensor:
        """Of each row of the answers, one a text or one a token, (N,); of single numbers their correlation, (1,)."""
        pairs = [*zip(self._answers(), self.dense, strict=True)]
        if self.of_numbers:
            now, before = (torch.cat(rows).flatten() for rows in zip(*pairs, strict=True))
            return torch.corrcoef(torch.stack([now, before]))[0, 1:]
        return torch.cat([F.cosine_similarity(now, before, dim=1) for now, before in pairs])

    @torch.no_grad()
    def _answers(self) -> list[Tensor]:
        rows: list[Tensor] = []
        for batch in self.batches:
            rows.append(ask(self.model, batch).compared().cpu())
            if sum(row.numel() for row in rows) > MOST_NUMBERS:
                break
        return rows
