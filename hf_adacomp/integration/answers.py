"""What a model says to a batch, which its compressed table must not change."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .parts import transformers_models
from .sentence import is_sentence_model

SENTENCE = "sentence_embedding"
LOGITS = "logits"
HIDDEN = "last_hidden_state"


@dataclass
class Answer:
    """Rows of what a model says, one a text or one a token.

    Args:
        kind: `"sentence_embedding"`, `"logits"` or `"last_hidden_state"`.
        rows: (N, width), without those of padding.
    """

    kind: str
    rows: Tensor

    def probe(self, generator: torch.Generator) -> Tensor:
        """A number whose gradient, g at a place of the model, has the mean `E[g g^T]` of how answers react there.

        Of logits that is the log-likelihood of labels which are drawn from them: the mean is Fisher's information, the
        curvature of the KL divergence (Martens 2020, arXiv 1412.1193, section 5). Of vectors it is their product with
        random ones: the mean is the curvature of the squared error, for sentence embeddings that of their directions.

        Raises:
            ValueError: For answers that are NaN or Inf.
        """
        if not self.rows.isfinite().all():
            raise ValueError(f"the model's answers to a batch, its {self.kind}, are NaN or Inf: mend the model first")
        if self.kind == LOGITS and self.rows.shape[1] > 1:
            rows = self.rows.float()
            labels = torch.multinomial(rows.detach().softmax(dim=1).cpu(), 1, generator=generator)
            return F.cross_entropy(rows, labels.squeeze(1).to(rows.device), reduction="sum")
        noise = torch.randn(self.rows.shape, generator=generator, dtype=torch.float32, device="cpu")
        return (self.compared() * noise.to(self.rows.device)).sum()

    def compared(self) -> Tensor:
        """The rows as they are compared, (N, width) float32: of sentence embeddings their directions."""
        rows = self.rows.float()
        return F.normalize(rows, dim=1) if self.kind == SENTENCE else rows


def ask(model: Any, batch: Mapping[str, Any]) -> Answer:
    """The model's answer to a batch of named tensors; ValueError if there is none."""
    return _answer(model, _outputs(model, batch), batch)


def reaction(model: Any, batch: Mapping[str, Any], generator: torch.Generator) -> Tensor:
    """What to follow back to see what matters to a model: its loss if the batch has labels, else `Answer.probe`."""
    outputs = _outputs(model, batch)
    loss: Tensor | None = outputs.get("loss")
    return _answer(model, outputs, batch).probe(generator) if loss is None else loss


def _outputs(model: Any, batch: Mapping[str, Any]) -> Mapping[str, Any]:
    outputs: Mapping[str, Any] = model(dict(batch)) if is_sentence_model(model) else {}
    if SENTENCE not in outputs:
        inner = transformers_models(model)[0]
        named = {} if inner.config.return_dict else {"return_dict": True}
        outputs = inner(**batch, **named)
    return outputs


def _answer(model: Any, outputs: Mapping[str, Any], batch: Mapping[str, Any]) -> Answer:
    if SENTENCE in outputs:
        return Answer(SENTENCE, outputs[SENTENCE])
    for kind in (LOGITS, HIDDEN):
        if isinstance(values := outputs.get(kind), Tensor):
            return Answer(kind, _counting(values, batch))
    several = [values for name, values in outputs.items() if name.endswith(LOGITS)]  # of a span's start and its end
    if several:
        return Answer(HIDDEN, torch.cat([values.flatten(1) for values in several], dim=1))
    raise ValueError(
        f"{type(transformers_models(model)[0]).__name__} returns neither logits nor hidden states, but "
        f"{sorted(outputs)}: give batches with labels, whose loss it returns, or train it"
    )


def _counting(values: Tensor, batch: Mapping[str, Any]) -> Tensor:
    """Rows of values (B, T, width) at what is no padding; all rows of values of another shape."""
    for mask in (batch.get("decoder_attention_mask"), batch.get("attention_mask")):
        if mask is not None and values.dim() == 3 and values.shape[:2] == mask.shape:
            return values[mask.bool()]
    return values.flatten(0, -2)
