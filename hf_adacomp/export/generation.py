"""A step of generation as a graph: logits of new tokens, given the keys and values of those before them."""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

from ..integration.parts import transformers_models
from ..integration.sentence import is_sentence_model
from .graph import Graph, Inputs


class GenerationStep(Graph):
    """A model that generates as a function `(ids, mask, positions, keys and values) -> (logits, keys and values)`.

    Inputs are `input_ids` and, if the model takes them, `position_ids` (B, T), `attention_mask` (B, P + T), and
    `past_key_values.N.key` and `.value` of each layer N, (B, H, P, d / H), where P may be 0; outputs are `logits`
    (B, T, V), `present.N.key` and `.value`, as the Hub's ONNX models name them.

    Raises:
        ValueError: As `Graph`, and for a model that remembers what was before by other than keys and values.
    """

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        taken = inspect.signature(self.inner.forward).parameters
        self.cache_name = "cache" if "cache" in taken else "past_key_values"  # as transformers before 5.24 called it
        self.shapes = [tensor.shape for tensor in self._kept()]
        names = [f"{n}.{kind}" for n in range(len(self.shapes) // 2) for kind in ("key", "value")]
        self.inputs = (
            "input_ids",
            "attention_mask",
            *(["position_ids"] if "position_ids" in taken else []),
            *(f"past_key_values.{name}" for name in names),
        )
        self.outputs = ("logits", *(f"present.{name}" for name in names))

    def forward(self, *tensors: Tensor) -> tuple[Tensor, ...]:  # type: ignore[override]  # as many as it has inputs
        """Values of `outputs` from those of `inputs`."""
        split, cache = len(tensors) - len(self.shapes), DynamicCache()
        tokens, past = dict(zip(self.inputs[:split], tensors[:split], strict=True)), tensors[split:]
        for layer in range(len(past) // 2):
            cache.update(past[2 * layer], past[2 * layer + 1], layer)
        found = self.inner(**tokens, **{self.cache_name: cache}, use_cache=True)
        return (found["logits"], *_tensors(cache))

    def example(self) -> Inputs:
        """As `Graph.example`: three new tokens after five."""
        texts, before, new = 2, 5, 3
        ids = torch.zeros(texts, new, dtype=torch.int64)
        tokens = [ids, torch.ones(texts, before + new, dtype=torch.int64)]
        if "position_ids" in self.inputs:
            tokens.append(before + torch.arange(new).repeat(texts, 1))
        past = [torch.zeros(texts, heads, before, width, dtype=torch.float32) for _, heads, _, width in self.shapes]
        axes = [{0: "batch_size", 1: "sequence_length"} for _ in tokens]
        axes[1] = {0: "batch_size", 1: "total_sequence_length"}
        axes += [{0: "batch_size", 2: "past_sequence_length"} for _ in past]
        return (*tokens, *past), (tuple(axes),)  # one argument, `*tensors`

    @torch.no_grad()
    def _kept(self) -> list[Tensor]:
        """What the model keeps of two tokens."""
        ids = torch.zeros(1, 2, dtype=torch.int64)
        found = self.inner(input_ids=ids, attention_mask=torch.ones_like(ids), use_cache=True)
        cache = found.get(self.cache_name)
        if type(cache) is not DynamicCache or not all(hasattr(layer, "keys") for layer in cache.layers):
            raise ValueError(
                f"{type(self.inner).__name__} keeps a {type(cache).__name__} of the tokens before, not keys and values "
                "of each layer: a step of it cannot be exported"
            )
        return _tensors(cache)


def _tensors(cache: DynamicCache) -> list[Tensor]:
    """Keys and values of each layer, (B, H, T, d / H) each."""
    return [getattr(layer, name) for layer in cache.layers for name in ("keys", "values")]


def graph_of(model: Any) -> Graph:
    """What is exported of a model: a `GenerationStep` if it generates, else a `Graph`."""
    inner = transformers_models(model)[0]
    steps = not is_sentence_model(model) and not inner.config.is_encoder_decoder and inner.can_generate()
    return GenerationStep(model) if steps else Graph(model)
