"""The part of a compressed embedding that only training needs."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor

from ..config import AdaCompConfig
from ..fitting.token_counts import checked_counts, expected_counts, token_weights
from ..lengths.schedule import temperature_at
from ..lengths.selector import LengthSelector, gumbel_noise
from ..torch_compat import Movable
from .observation import Observation

logger = logging.getLogger(__name__)

PHASES = ("observe", "select", "encode")
OBSERVE, SELECT, ENCODE = range(3)
"""Values of the `stage` buffer: the table's use observed, lengths being learned, lengths frozen."""

PROGRESS_UNIT = 10**9
"""`progress` counts training in billionths: an integer survives casts of the model, and so does the schedule."""


class TrainingState(Movable):
    """Source table, what was observed of its use, length selector and the schedule's state; dropped at packing.

    All state is in tensors under fixed names, whatever the phase, so that any checkpoint of a run loads into any
    moment of it.

    Args:
        source: The table that is compressed, (V, d).
        config: The settings.
    """

    source: Tensor
    ladder: Tensor
    assignment: Tensor
    stage: Tensor
    warm_started: Tensor
    progress: Tensor

    def __init__(self, source: Tensor, config: AdaCompConfig) -> None:
        super().__init__()
        self.config = config
        options: dict[str, Any] = {"device": source.device}
        self.register_buffer("source", source)
        self.observation = Observation(*source.shape, **options)
        self.observation.measuring = config.measured
        self.selector = LengthSelector(len(source), config.ladder, config.selection_reach, **options)
        self.register_buffer("ladder", torch.tensor(config.ladder, dtype=torch.int32, **options))  # what indices mean
        self.register_buffer("assignment", torch.zeros(len(source), dtype=torch.uint8, **options))
        self.register_buffer("stage", torch.tensor(OBSERVE, dtype=torch.uint8, **options))
        self.register_buffer("warm_started", torch.zeros((), dtype=torch.uint8, **options))
        self.register_buffer("progress", torch.tensor(-1, dtype=torch.int64, **options))
        self._noise: tuple[int, Tensor] | None = None

    def moved(self) -> None:
        """Noise is drawn anew where it is needed."""
        self._noise = None

    @property
    def phase(self) -> str:
        """`"observe"`, `"select"` or `"encode"`; of a skeleton on the meta device the first."""
        return PHASES[0 if self.stage.is_meta else int(self.stage)]

    @property
    def observing(self) -> bool:
        """Whether the table's use in training is being observed."""
        return bool(self.stage == OBSERVE)

    @property
    def token_counts(self) -> Tensor:
        """Occurrences of each token, (V,) int64: the user's, or those observed so far."""
        return self.observation.token_counts

    @property
    def metric(self) -> Tensor:
        """What errors are measured in, (d, d) float32."""
        return self.observation.metric

    @property
    def warm(self) -> bool:
        """Whether the code-book holds a fit of the source table."""
        return bool(self.warm_started)

    @property
    def driven(self) -> bool:
        """Whether `advance` was ever called."""
        return bool(self.progress >= 0)

    @property
    def temperature(self) -> float:
        """Gumbel-softmax temperature at the current progress."""
        settings = self.config
        return temperature_at(
            max(0, int(self.progress)) / PROGRESS_UNIT,
            settings.temperature_start,
            settings.temperature_end,
            settings.select_fraction,
            settings.anneal,
        )

    def shares(self, tokens: Tensor) -> Tensor:
        """Gumbel-softmax shares of the code lengths of tokens at the current progress, (N,) -> (N, n).

        The noise is a function of seed and progress: all places of a table, the micro-batches of a step, all processes
        and a resumed run see the same.
        """
        moment = int(self.progress)
        if self._noise is None or self._noise[0] != moment:
            offset, seed = self.selector.offset, self.config.seed * 1_000_003 + moment
            self._noise = moment, gumbel_noise(len(offset), offset.shape[1], seed, offset.device)
        shares: Tensor = self.selector(tokens, self.temperature, self._noise[1][tokens])
        return shares

    def set_counts(self, token_counts: Tensor) -> None:
        """Take over token counts, (V,), and count no more."""
        self.token_counts.copy_(checked_counts(token_counts, len(self.source)))
        self.observation.counting.zero_()

    def set_metric(self, metric: Tensor) -> None:
        """Take over the metric, (d, d), symmetric and positive definite."""
        positive = metric.shape == self.metric.shape and not torch.linalg.cholesky_ex(metric.double()).info
        if not positive or not torch.allclose(metric, metric.T, atol=1e-5 * float(metric.abs().max())):
            raise ValueError(
                f"metric must be a symmetric, positive definite matrix of shape {tuple(self.metric.shape)}; got shape "
                f"{tuple(metric.shape)} with entries from {metric.min():g} to {metric.max():g}"
            )
        self.metric.copy_(metric)

    def weigh_tokens(self) -> Tensor:
        """What each token weighs in a fit by its count so far, (V,) float32."""
        expected = self.observation.expected_counts
        expected.copy_(expected_counts(self.token_counts, self.source))
        return token_weights(expected)

    def recount(self, alone: bool = False) -> None:
        """Collect counts, on all ranks together or alone; while lengths are learned, tokens weigh by them from here."""
        added, came = self.observation.collect(self.observing and self.observation.measuring, alone)
        if self.observing and came:
            self.warm_started.zero_()  # a fit that evaluation asked for knew less
        if self.observing or not self.observation.counting:
            return
        before, now = self.observation.expected_counts, self.observation.expected_counts + added
        self.selector.cost *= token_weights(now / before * (before.sum() / now.sum()))[:, None]
        before.copy_(now)

    def warn_of_missing_gradients(self) -> None:
        """Warn if there is nothing to measure directions by."""
        if self.observation.measuring and not self.observation.moments.any():
            logger.warning(
                "no gradient reached the table while it was observed: no direction was measured%s. If it was in eval "
                "mode, call train() first. If no gradient is to reach it, pass token_counts to compress(), and "
                "AdaCompConfig(significance=False)",
                ", and no token counted" if self.observation.counting else "",
            )

    def start(self, cost: Tensor, budget: int) -> None:
        """Take over the warm start's weighted distortions, (V, n)."""
        self.selector.set_cost(cost, budget)
        self.warm_started.fill_(1)
        self.settle(budget)

    def end_observation(self) -> None:
        """Learn lengths from here on."""
        if self.observing:
            self.stage.fill_(SELECT)

    def advance(self, fraction: float, budget: int) -> None:
        """Take note that a share `fraction` of training is done: progress, price, and the freeze when it is due."""
        done = max(0, int(self.progress)) / PROGRESS_UNIT
        self.progress.fill_(round(fraction * PROGRESS_UNIT))
        if self.phase == "select":
            first, last = self.config.observe_fraction, self.config.select_fraction
            since = max(0.0, fraction - max(done, first))  # a table fitted before training begins to learn no earlier
            self.selector.learn(min(1.0, since / (last - first)) if last > first else 0.0)
            self.selector.price.fill_(self.settle(budget))
            if int(self.progress) / PROGRESS_UNIT >= last:
                self.stage.fill_(ENCODE)

    def hard_assignment(self, budget: int) -> tuple[Tensor, float]:
        """Index of each token's hard code length, (V,), and the price at which they fit (0 once frozen)."""
        return (self.assignment, 0.0) if self.phase == "encode" else self.selector.solve(budget)

    @torch.no_grad()
    def settle(self, budget: int) -> float:
        """Set `assignment` to the hard lengths of the moment; returns the price at which they fit.

        The price is not the selector's from here on: evaluation settles too, and must not change training.
        """
        assignment, price = self.hard_assignment(budget)
        self.assignment.copy_(assignment)
        return price

    def freeze(self, budget: int) -> None:
        """Freeze the hard lengths of the current scores."""
        if self.phase != "encode":
            self.settle(budget)
            self.stage.fill_(ENCODE)
        self.check_size(budget)

    def check_size(self, budget: int) -> None:
        """Raise ValueError if frozen lengths exceed the budget."""
        ladder = torch.tensor(self.config.ladder, device=self.assignment.device)
        if self.phase == "encode" and (used := int(ladder[self.assignment.long()].sum())) > budget:
            raise ValueError(
                f"target_ratio={self.config.target_ratio:g} leaves {budget} bits for codes, but the lengths, which are "
                f"frozen, take {used}. Of a checkpoint: resume with the target_ratio it was trained with, or start "
                "anew. If the model was cast since, which makes bias and scales larger: cast it back"
            )

    def validate(self, name: str) -> None:
        """Raise ValueError if a tensor holds what training never does."""
        for tensor_name, tensor, least, most in (
            ("assignment", self.assignment, 0, len(self.config.ladder) - 1),
            ("stage", self.stage, OBSERVE, ENCODE),
            ("warm_started", self.warm_started, 0, 1),
            ("progress", self.progress, -1, PROGRESS_UNIT),
            ("observation.token_counts", self.token_counts, 0, torch.iinfo(torch.int64).max),
        ):
            if not least <= int(tensor.min()) <= int(tensor.max()) <= most:
                raise ValueError(
                    f"{name}.{tensor_name} must be from {least} to {most}; the file holds {int(tensor.min())} to "
                    f"{int(tensor.max())}: it is damaged"
                )
