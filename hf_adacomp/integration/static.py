"""A model that is a table and nothing else, as a transformers model, which can be compressed, trained and saved as one.

`StaticEmbedding` of sentence-transformers, model2vec's static models and plain word vectors become this.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutput

MODEL_TYPE = "adacomp-static"


class StaticConfig(PretrainedConfig):
    """Sizes of a `StaticModel`.

    Args:
        vocab_size: Number of tokens V.
        hidden_size: Width d.
    """

    model_type = MODEL_TYPE

    def __init__(self, vocab_size: int = 2, hidden_size: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size = vocab_size, hidden_size


class StaticModel(PreTrainedModel):
    """Vectors of tokens, whatever stands beside them; pooling makes vectors of texts.

    >>> import torch
    >>> from hf_adacomp.integration.static import StaticConfig, StaticModel
    >>> StaticModel(StaticConfig(vocab_size=100, hidden_size=8))(torch.tensor([[1, 2, 3]])).last_hidden_state.shape
    torch.Size([1, 3, 8])
    """

    config_class = StaticConfig
    base_model_prefix = "static"

    def __init__(self, config: StaticConfig) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.post_init()  # type: ignore[no-untyped-call]  # transformers'

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, **_: Any) -> BaseModelOutput:
        """Vectors of the ids, int64 (B, T) -> `last_hidden_state` (B, T, d); of any token where the mask is 0."""
        if attention_mask is not None:
            input_ids = input_ids.masked_fill(attention_mask == 0, 0)
        return BaseModelOutput(last_hidden_state=self.embed_tokens(input_ids))


def register() -> None:
    """Make the model known to `AutoConfig` and `AutoModel`; once."""
    AutoConfig.register(MODEL_TYPE, StaticConfig, exist_ok=True)
    AutoModel.register(StaticConfig, StaticModel, exist_ok=True)
