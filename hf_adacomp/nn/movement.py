"""Whether an optimizer moves parameters: one that was made before they existed does not, and nobody would notice."""

from __future__ import annotations

import logging
from collections.abc import Iterable

from torch import nn

from .. import compat

logger = logging.getLogger(__name__)

PATIENCE = 10
"""Steps without a change that are put down to a `GradScaler` which looks for its scale."""


class Movement:
    """Counts steps of training in which no trainable parameter was changed."""

    def __init__(self) -> None:
        self._versions: list[int] = []
        self._steps = 0

    def check(self, parameters: Iterable[nn.Parameter]) -> None:
        """To be called once a step: warns when nothing has moved for the `PATIENCE`-th time in a row."""
        versions = [compat.version(parameter) for parameter in parameters if parameter.requires_grad]
        self._steps = self._steps + 1 if versions and versions == self._versions else 0
        self._versions = versions
        if self._steps == PATIENCE:
            logger.warning(
                "nothing has changed the code-book in the last %d steps: the optimizer must hold their parameters "
                "(make it after compressing) and step after embedding.step()",
                PATIENCE,
            )
