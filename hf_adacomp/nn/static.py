"""A model that is a table and nothing else, as a transformers model, which can be compressed, trained and saved as one.

`StaticEmbedding` of sentence-transformers, model2vec's static models and plain word vectors become this.

Where vectors are averaged, their lengths are the weights of the words, and codes do not keep them: the shorter a code,
the shorter is the sum of its code vectors. So a table that is compressed holds directions, and each token's length is
stored apart, its *gain* (gain-shape vector quantization: Gersho and Gray, *Vector Quantization and Signal Compression*,
12.10):

    e_w = gain_w xhat_w / |xhat_w|        gain_w = largest (q_w / 255)^2,  q_w one byte
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

from ..torch_compat import KeptBuffers

MODEL_TYPE = "adacomp-static"
LEVELS = 255
LARGEST_SHARE = 0.25
"""Of the size asked for that gains may take; they are not worth more."""


class StaticConfig(PretrainedConfig):
    """Sizes of a `StaticModel`.

    Args:
        vocab_size: Number of tokens V.
        hidden_size: Width d.
        gains: Whether the table holds directions, and the lengths of the vectors stand beside it.
    """

    model_type = MODEL_TYPE

    def __init__(self, vocab_size: int = 2, hidden_size: int = 1, gains: bool = False, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.gains = vocab_size, hidden_size, gains


class StaticModel(KeptBuffers, PreTrainedModel):
    """Vectors of tokens, whatever stands beside them; pooling makes vectors of texts.

    >>> import torch
    >>> from hf_adacomp.nn.static import StaticConfig, StaticModel
    >>> StaticModel(StaticConfig(vocab_size=100, hidden_size=8))(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 8])
    """

    config_class = StaticConfig
    base_model_prefix = "static"
    kept_buffers = ("largest_gain",)
    gain_levels: Tensor
    largest_gain: Tensor

    def __init__(self, config: StaticConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        if config.gains:
            self._make_room_for_gains()
        self.post_init()  # type: ignore[no-untyped-call]  # transformers'

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        """Vectors of the ids, int64 (B, T) -> `last_hidden_state` (B, T, d); that of token 0 where the mask is 0."""
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, 0)
        vectors = self.embed_tokens(input_ids)
        if self.config.gains:
            whole = F.normalize(vectors.float(), dim=-1) * self.gain(input_ids)[..., None]  # in half, a zero makes NaN
            vectors = whole.to(vectors.dtype)
        return BaseModelOutput(last_hidden_state=vectors)

    # Gains

    def gain(self, ids: Tensor) -> Tensor:
        """Lengths of the vectors of ids, of their shape, float32."""
        return self.largest_gain * (self.gain_levels[ids].to(torch.float32) / LEVELS).square()

    def store_gains(self, lengths: Tensor) -> None:
        """Set the lengths of all vectors, (V,), rounded: one of a hundredth of the longest by 4 % at most."""
        least = torch.finfo(torch.float32).tiny
        self.largest_gain = lengths.max().to(torch.float32).maximum(self.largest_gain).clamp_min(least)
        self.gain_levels = (lengths / self.largest_gain).sqrt().mul(LEVELS).round().to(torch.uint8)

    @property
    def gain_bytes(self) -> int:
        """Stored bytes of the gains."""
        return sum(gains.nbytes for gains in (self.gain_levels, self.largest_gain)) if self.config.gains else 0

    def ratio_beside_gains(self, target_ratio: float) -> float | None:
        """The ratio of a table of directions that leaves room for gains; None where they would take too much of it."""
        weight = self.embed_tokens.weight
        share = target_ratio * (len(weight) + 4) / (4 * weight.numel())
        return None if share > LARGEST_SHARE else target_ratio / (1 - share)

    def separate_gains(self) -> None:
        """Replace dense vectors by directions and gains, before they are compressed."""
        weight = self.embed_tokens.weight.detach()
        self.config.gains = True
        self._make_room_for_gains()
        self.store_gains(weight.float().norm(dim=1))
        directions = F.normalize(weight.float(), dim=1).to(weight.dtype)
        self.embed_tokens.weight = nn.Parameter(directions, self.embed_tokens.weight.requires_grad)

    def _make_room_for_gains(self) -> None:
        device = self.embed_tokens.weight.device
        self.register_buffer("gain_levels", torch.zeros(self.config.vocab_size, dtype=torch.uint8, device=device))
        self.register_buffer("largest_gain", torch.zeros((), dtype=torch.float32, device=device))


def register() -> None:
    """Make the model known to `AutoConfig` and `AutoModel`; once."""
    AutoConfig.register(MODEL_TYPE, StaticConfig, exist_ok=True)
    AutoModel.register(StaticConfig, StaticModel, exist_ok=True)
