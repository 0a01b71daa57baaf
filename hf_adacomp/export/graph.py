"""What is exported of a model: a function of token ids and mask, with named outputs."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ..integration.compressed_tables import compressed_embeddings, num_tokens
from ..integration.parts import transformers_models
from ..integration.sentence import is_sentence_model
from .graph_tables import for_graph

Inputs = tuple[tuple[Tensor, ...], tuple[Any, ...]]
"""Tensors for `forward`, and their axes that may have any size, by names that the Hub's ONNX models have."""


class Graph(nn.Module):
    """A model as a function `(input_ids, attention_mask) -> outputs`, int64 (B, T) both, in eval mode.

    A sentence model computes `token_embeddings` (B, T, d) and, pooled and in unit length if it is so, the
    `sentence_embedding` (B, d); one of several vectors a text the former alone, a cross-encoder its `scores`; another
    model its `logits` or `last_hidden_state`.

    Args:
        model: A transformers model, packed or dense, or one of sentence-transformers. It is copied.

    Raises:
        ValueError: For an encoder with a decoder, SPLADE's pooling, and a model without logits and hidden states.
    """

    @torch.no_grad()
    def __init__(self, model: Any) -> None:
        super().__init__()
        model = copy.deepcopy(model).eval().cpu()
        inner = transformers_models(model)[0]
        if inner.config.is_encoder_decoder:
            raise ValueError(
                f"{type(inner).__name__} is an encoder and a decoder, whose steps are several graphs, and is not "
                "exported. An encoder alone is, where it has a class that loads the folder, such as T5EncoderModel"
            )
        if any(type(module).__name__ == "SpladePooling" for module in model.modules()):
            raise ValueError(
                f"the pooling of a {type(model).__name__} fixes the length of texts in a graph: export its language "
                "model, export_onnx(model[0].auto_model, folder, model.tokenizer), and pool its logits"
            )
        inner.set_attn_implementation("eager")  # whose graph holds for any shape
        inner.config.use_cache, inner.config.return_dict = False, True
        for table in compressed_embeddings(inner).values():
            for_graph(table)
        self.model, self.inner, self.sentence = model, inner, is_sentence_model(model)
        self.eval().requires_grad_(False)
        self.inputs: tuple[str, ...] = ("input_ids", "attention_mask")
        found = self._all_outputs(*Graph.example(self)[0])
        if "scores" in found and "token_type_ids" in model.tokenizer.model_input_names:
            self.inputs += ("token_type_ids",)  # of a cross-encoder, which reads pairs
        self.outputs = self._named(found)

    @property
    def num_tokens(self) -> int:
        """Rows of the table, V."""
        return num_tokens(self.inner)

    def example(self) -> Inputs:
        """What it may be traced with: two texts of 16 tokens."""
        shape = (2, 16)
        axes = {0: "batch_size", 1: "sequence_length"}
        types = [torch.zeros(shape, dtype=torch.int64) for _ in self.inputs[2:]]
        ids, mask = torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.int64)
        return (ids, mask, *types), (axes,) * len(self.inputs)

    def forward(
        self, input_ids: Tensor, attention_mask: Tensor, token_type_ids: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Values of `outputs`."""
        found = self._all_outputs(input_ids, attention_mask, token_type_ids)
        return tuple(found[name] for name in self.outputs)

    def _all_outputs(self, *tensors: Tensor | None) -> dict[str, Tensor]:
        names = ("input_ids", "attention_mask", "token_type_ids")
        batch = {name: tensor for name, tensor in zip(names, tensors, strict=False) if tensor is not None}
        outputs: dict[str, Tensor] = self.model(batch) if self.sentence else self.inner(**batch)
        return outputs

    def _named(self, found: Mapping[str, Any]) -> tuple[str, ...]:
        if self.sentence and "sentence_embedding" in found:
            return ("token_embeddings", "sentence_embedding")
        kinds = ("scores", "logits", "last_hidden_state", "token_embeddings")
        names = tuple(name for name in kinds if isinstance(found.get(name), Tensor))
        if not names:
            raise ValueError(f"{type(self.inner).__name__} returns {sorted(found)}: no logits and no hidden states")
        return names[:1]
