"""Selection of code lengths: logits and Gumbel-softmax."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..torch_compat import KeptDtype
from .budget import assign_lengths

SHARPNESS = 4.0
"""The price of the longest code at the warm start, in logits."""

BETAS, EPSILON = (0.9, 0.999), 1e-8
"""Of Adam, by which offsets are learned."""


def gumbel_noise(tokens: int, lengths: int, seed: int, device: torch.device) -> Tensor:
    """Gumbel(0, 1) noise of all tokens, float32 (tokens, lengths): a function of the arguments."""
    generator = torch.Generator(device).manual_seed(seed)
    return -torch.empty(tokens, lengths, device=device, dtype=torch.float32).exponential_(generator=generator).log()


class LengthSelector(KeptDtype):
    """Logits over n code lengths for each of V tokens, float32 whatever the model is.

        a_{w,k} = -cost_{w,k} - price * L_k + offset_{w,k}

    `cost` is the warm start's weighted distortion and `offset` is learned on the task. `price`, the Lagrange
    multiplier of the stored bits, is solved rather than tuned: it is the least price at which the most likely lengths
    fit the size.

    Offsets are learned by steps of their own, not the optimizer's: how far logits come must not hang on a learning
    rate that suits the model, nor on how many steps there are.

    Args:
        num_tokens: V.
        ladder: The n code lengths in bits, increasing.
        reach: How far a logit comes in all if its gradient keeps its sign.
    """

    cost: Tensor
    price: Tensor
    mean: Tensor
    square: Tensor
    steps: Tensor

    def __init__(
        self,
        num_tokens: int,
        ladder: tuple[int, ...],
        reach: float,
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        self.ladder, self.reach = ladder, reach
        options: dict[str, Any] = {"device": device, "dtype": torch.float32}
        self.offset = nn.Parameter(torch.zeros(num_tokens, len(ladder), **options))
        self.register_buffer("cost", torch.zeros(num_tokens, len(ladder), **options))
        for moment in ("mean", "square"):
            self.register_buffer(moment, torch.zeros(num_tokens, len(ladder), **options))
        self.register_buffer("steps", torch.zeros((), device=device, dtype=torch.int64))
        self.register_buffer("price", torch.full((), SHARPNESS / ladder[-1], **options))

    def scores(self, tokens: Tensor | slice = slice(None)) -> Tensor:
        """Logits before the price, (tokens, n)."""
        return self.offset[tokens] - self.cost[tokens]

    def forward(self, tokens: Tensor, temperature: float, noise: Tensor) -> Tensor:
        """Gumbel-softmax sample of each token, (N,) -> (N, n), rows on the simplex (Jang et al. 2017).

        `noise` is `gumbel_noise` of the same tokens, (N, n).
        """
        ladder = torch.tensor(self.ladder, device=self.price.device, dtype=self.price.dtype)
        return ((self.scores(tokens) - self.price * ladder + noise) / temperature).softmax(dim=-1)

    @torch.no_grad()
    def set_cost(self, distortion: Tensor, budget: int) -> None:
        """Start from weighted distortions (V, n), scaled so that the price of the longest code is `SHARPNESS`.

        Rare tokens then sit within a few logits of every length, where the task can move them, while tokens whose
        distortion outweighs the price are as good as settled.
        """
        ladder = torch.tensor(self.ladder, device=distortion.device)
        _, price = assign_lengths(-distortion, ladder, budget)
        # Where all bits that anyone wants are to be had, nothing has a price: take what a bit saves on average.
        saved = float((distortion[:, 0] - distortion[:, -1]).mean()) / max(1, self.ladder[-1] - self.ladder[0])
        reference = price or saved
        scale = SHARPNESS / (reference * self.ladder[-1]) if reference > 0 else 1.0
        self.cost.copy_(distortion * scale)
        self.offset.zero_()
        self.price.fill_(price * scale)

    @torch.no_grad()
    def learn(self, share: float) -> None:
        """A step of Adam (Kingma, Ba 2015; arXiv 1412.6980) by a share of the reach; the gradient is used up."""
        gradient, self.offset.grad = self.offset.grad, None
        if gradient is None:
            return
        self.steps += 1
        self.mean.lerp_(gradient, 1 - BETAS[0])
        self.square.lerp_(gradient.square(), 1 - BETAS[1])
        mean, square = (
            moment / (1 - beta ** int(self.steps)) for moment, beta in zip((self.mean, self.square), BETAS, strict=True)
        )
        self.offset.sub_(self.reach * share * mean / (square.sqrt() + EPSILON))

    @torch.no_grad()
    def solve(self, budget: int) -> tuple[Tensor, float]:
        """The index of each token's code length, (V,) int64, and the price at which the codes keep the budget."""
        ladder = torch.tensor(self.ladder, device=self.price.device)
        return assign_lengths(self.scores(), ladder, budget, guess=float(self.price))
