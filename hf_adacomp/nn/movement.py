"""Whether an optimizer moves parameters: one that was made before they existed does not, and nobody would notice."""

from __future__ import annotations

import logging
from collections.abc import Iterable

import torch
from torch import Tensor, nn

logger = logging.getLogger(__name__)

PATIENCE = 10
"""Steps without a change that are put down to a `GradScaler` which looks for its scale."""


class Movement:
    """Counts steps of training in which no trainable parameter was changed."""

    def __init__(self) -> None:
        self._before: list[int] = []
        self._steps = 0

    def check(self, parameters: Iterable[nn.Parameter]) -> None:
        """To be called once a step: warns when nothing has moved for the `PATIENCE`-th time in a row."""
        sums = [_sum_of_bits(parameter) for parameter in parameters if parameter.requires_grad]
        now = torch.stack(sums).tolist() if sums else []
        self._steps = self._steps + 1 if now and now == self._before else 0
        self._before = now
        if self._steps == PATIENCE:
            logger.warning(
                "nothing has changed the code-book in the last %d steps: the optimizer must hold its parameters "
                "(make it after compressing) and step after embedding.step()",
                PATIENCE,
            )


def _sum_of_bits(tensor: Tensor) -> Tensor:
    """The values of a tensor, read as integers, summed up: int64, on its device."""
    integers = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[tensor.element_size()]
    return tensor.detach().contiguous().view(integers).sum(dtype=torch.int64)
