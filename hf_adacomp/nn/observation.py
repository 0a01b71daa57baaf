"""What a training shows of a table where it is used: how often each token counts, and what the loss reacts to.

While a table is observed it computes with its source vectors, and hooks look at the gradients on their way back. With
those g at the vectors of all look-ups and, where a tied head turns hidden states h into logits, those z at the logits,

    G = sum g g^T + sum |z|^2 h h^T        M = (R / mean(diag R) + I) / 2,  R = G^(1/2)

an error e of a token's vector costs the loss about `e^T M e`: the metric M, in which the code-book is fitted and code
lengths chosen. It needs no occurrence of a token, so that tokens which the training never shows are judged too.

Gradients tell of small errors: a few directions in which they are huge hold most of G (two of 384 hold 60 % of it in a
tagger), while the loss reacts to a large error in them far less than in proportion. Hence the root, as in full-matrix
AdaGrad (Duchi et al. 2011), and the Euclidean half.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ..torch_compat import KeptDtype
from .ranks import sum_over_ranks

MEASURED_ROWS = 2048
"""Gradients that are measured of one use of a table in one backward pass, where there are twice as many: at random
places, since each so-manieth would be the same few positions of all texts."""


class Observation(KeptDtype):
    """Token counts and second moments of gradients, summed over all uses, micro-batches and ranks, and the metric.

    A token counts where the gradient reaches its vector, which leaves out padding that is masked.

    Args:
        num_tokens: V.
        dim: Width d.
    """

    token_counts: Tensor
    expected_counts: Tensor
    counting: Tensor
    moment_bits: Tensor
    metric: Tensor
    measuring = True  # whether moments are wanted

    def __init__(self, num_tokens: int, dim: int, *, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.register_buffer("token_counts", torch.zeros(num_tokens, dtype=torch.int64, device=device))
        # Those smoothed at the warm start, and what was counted since.
        self.register_buffer("expected_counts", torch.zeros(num_tokens, dtype=torch.float32, device=device))
        # Whether the counts are ours, and not the user's.
        self.register_buffer("counting", torch.ones((), dtype=torch.uint8, device=device))
        # Float64, held as the integers of the same bits: not every device knows it.
        self.register_buffer("moment_bits", torch.zeros(dim, dim, dtype=torch.int64, device=device))
        self.register_buffer("metric", torch.eye(dim, dtype=torch.float32, device=device))
        self._counts: Tensor | None = None
        self._moments: Tensor | None = None
        self.broken = False  # whether a gradient since the last `collect` was NaN or Inf

    def moved(self) -> None:
        """What was counted in the middle of a step goes along."""
        if self._counts is not None:
            self._counts = None if self.token_counts.is_meta else self._counts.to(self.token_counts.device)

    def count(self, tokens: Tensor) -> None:
        """Take note of tokens, (N,), once for each time that they are there; of none where the user gave counts."""
        if self.counting:
            counted = torch.bincount(tokens, minlength=len(self.token_counts))
            self._counts = counted if self._counts is None else self._counts.add_(counted)

    def watch_look_up(self, ids: Tensor, vectors: Tensor, measure: bool) -> None:
        """Take note of the gradients at vectors (..., d) of ids (...) when they come, and of moments to `measure`."""

        def note(gradient: Tensor) -> None:
            rows = gradient.detach().reshape(-1, gradient.shape[-1])
            if not rows.isfinite().all():
                self.broken = True
                return
            if self.counting:  # asked before the search for rows that are reached
                self.count(ids.flatten()[(rows != 0).any(dim=1)])
            if measure:
                self._measure(rows)

        vectors.register_hook(note)

    def watch_scores(self, hidden: Tensor, logits: Tensor) -> None:
        """Take note of the gradients at logits that a tied head makes of hidden states, (..., V) and (..., d)."""

        def note(gradient: Tensor) -> None:
            # Those at all tokens' vectors from one position have the second moments of this one row.
            wide = torch.promote_types(gradient.dtype, torch.float32)
            sizes = torch.linalg.vector_norm(gradient.detach(), dim=-1, keepdim=True, dtype=wide)
            rows = hidden.detach().to(wide) * sizes
            if rows.isfinite().all():
                self._measure(rows.reshape(-1, rows.shape[-1]))
            else:
                self.broken = True

        logits.register_hook(note)

    def note_table(self, gradient: Tensor) -> None:
        """Take note of the gradient at all vectors, (V, d), as a loss makes it that reads the whole table."""
        if not gradient.isfinite().all():
            self.broken = True
        else:
            self._measure(gradient.detach())

    def _measure(self, rows: Tensor) -> None:
        total, share = len(rows), max(1, len(rows) // MEASURED_ROWS)
        if share > 1:
            # Others in each step, the same in a resumed run.
            places = torch.Generator("cpu").manual_seed(int(self.moment_bits[0, 0]) + total)
            rows = rows[torch.randperm(total, generator=places, device="cpu")[: total // share].to(rows.device)]
        sample = rows.to("cpu", torch.float64)
        moments = share * (sample.T @ sample)
        self._moments = moments if self._moments is None else self._moments.add_(moments)

    @torch.no_grad()
    def collect(self, measure: bool, alone: bool = False) -> tuple[Tensor, bool]:
        """Add what came since the last call, on all ranks, to what is known; all ranks must call it together.

        Args:
            measure: Whether moments are wanted.
            alone: Whether this rank calls it alone, for itself.

        Returns:
            The counts that came, (V,) int64, and whether anything came.
        """
        counts = torch.zeros_like(self.token_counts) if self._counts is None else self._counts
        moments = self._moments
        self.discard()
        if self.counting:
            counts = counts if alone else sum_over_ranks(counts)
            self.token_counts += counts
        came = bool(counts.any())
        if measure:
            if moments is None:
                moments = torch.zeros(self.moment_bits.shape, dtype=torch.float64, device="cpu")
            if not alone:
                moments = sum_over_ranks(moments, self.moment_bits.device).cpu()
            came = came or bool(moments.any())
            self.moment_bits.copy_((self.moments + moments).view(torch.int64))
        return counts, came

    def discard(self) -> None:
        """Forget what came since the last `collect`."""
        self._counts = self._moments = None
        self.broken = False

    @property
    def moments(self) -> Tensor:
        """Sum of the second moments so far, G (d, d), float64 on the CPU."""
        return self.moment_bits.cpu().view(torch.float64)

    def measured_metric(self) -> Tensor | None:
        """The metric M by the moments so far, (d, d) float32; None if no gradient came."""
        moments = self.moments
        if not moments.any():
            return None
        variances, axes = torch.linalg.eigh(moments)
        reaction: Tensor = (axes * variances.clamp_min(0).sqrt()) @ axes.T
        reaction /= reaction.diagonal().mean()
        return ((reaction + torch.eye(len(moments), dtype=moments.dtype, device=moments.device)) / 2).float()
