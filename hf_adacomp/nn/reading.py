"""Modules whose `weight` is read from codes, and for how long what was read is kept."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from weakref import WeakValueDictionary

import torch
from torch import Tensor, nn

from .. import torch_compat, transformers_compat
from ..codes.codebook import BinaryCodebook
from .bag import Bag
from .decoding import Decoder, SourceVectors
from .dense import dense_embedding
from .loading import put_guard
from .read_only import LOST
from .training_state import TrainingState
from .weight import DecodedWeight, Read, Table


class WeightFromCodes(torch_compat.Movable):
    """A module whose `weight` is decoded from codes, and cannot be set. State dicts have a guard in its place."""

    loading = False  # whether weights are on their way in and have not been checked yet

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.register_state_dict_post_hook(put_guard)  # type: ignore[no-untyped-call]  # torch's

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "weight":
            if self._has(value):
                return
            raise ValueError(f"the weight of a compressed table cannot be set: it {LOST}")
        super().__setattr__(name, value)

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        """As in `nn.Module`; pruning would keep the decoded weight as a parameter."""
        if isinstance(param, DecodedWeight):
            raise ValueError(f"the weight of a compressed table cannot become {name!r}: it {LOST}")
        super().register_parameter(name, param)

    def _has(self, value: Any) -> bool:
        """Whether a weight is the one that is there, or what state dicts have for it: ties and swaps set those."""
        if isinstance(value, DecodedWeight):
            return value.is_whole(self.weight)
        return isinstance(value, Tensor) and not value.numel()


class LastWeight:
    """The weight of a table that was read last, and its values while they are read again and again.

    Values are kept as long as nothing has changed the table and each pass over the model reads them. A copy of the
    table begins with none.
    """

    def __init__(self) -> None:
        self._weights: WeakValueDictionary[Any, DecodedWeight] = WeakValueDictionary()
        self._kept: tuple[bool, torch_compat.Snapshot, Tensor] | None = None
        self._read = False

    def __reduce__(self) -> tuple[Any, ...]:
        return LastWeight, ()

    def weight(self, table: Table, bias: Tensor) -> DecodedWeight:
        """The weight of `table`, of the dtype and device of `bias`; the same object while somebody holds it."""
        parameters = tuple((id(parameter), parameter.requires_grad) for parameter in table.parameters())
        state = parameters, bias.dtype, bias.device, table.num_embeddings
        weight = self._weights.get(state)
        if weight is None:
            with torch.inference_mode(False), torch.enable_grad():  # as a parameter, whoever asks for it first
                weight = Read.apply(table, bias, *table.parameters())  # type: ignore[no-untyped-call]  # torch's
            self._weights[state] = weight
        return weight

    def values(self, table: nn.Module, make: Callable[[], Tensor]) -> Tensor:
        """What `make` makes, once as long as `table` is in the same mode and its tensors are the same."""
        self._read = True
        tensors = [*table.parameters(), *table.buffers()]
        kept = self._kept  # once: other threads may let go of it
        if kept is None or kept[0] != table.training or not kept[1].holds(tensors):
            kept = self._kept = None  # before the next are made: not two tables at once
            kept = self._kept = table.training, torch_compat.Snapshot(tensors), make()
        return kept[2]

    def end_pass(self, keep: bool) -> None:
        """A pass over the model is over: values are let go unless it read them and they are to be kept."""
        if not (keep and self._read):
            self._kept = None
        self._read = False


class ReadableTable(WeightFromCodes):
    """A table with a `weight`, by what its decoder makes of tokens."""

    num_embeddings: int
    embedding_dim: int
    padding_idx: int | None
    codebook: BinaryCodebook
    training_state: TrainingState | None
    decoder: Callable[[], Decoder | SourceVectors]
    hard_decoder: Callable[[], Decoder]

    def __init__(self) -> None:
        WeightFromCodes.__init__(self)
        self.reached = False  # whether training ever used its vectors
        self.last_weight = LastWeight()
        # Of the dense module: see `stand_in_for`.
        self.dense_class: type = nn.Embedding
        self.scale, self.rounds_scale = 1.0, False
        self.bag: Bag | None = None

    def moved(self) -> None:
        """Values of the weight that were kept are let go."""
        self.last_weight.end_pass(keep=False)

    def stand_in_for(self, dense: nn.Module, scale: float) -> None:
        """Take over the class of a dense module, its factor, and how it makes one vector of many."""
        self.dense_class, self.bag = type(dense), Bag.of(dense)
        self.scale, self.rounds_scale = scale, transformers_compat.rounds_scale(dense)

    @property
    def itself(self) -> ReadableTable:
        """The table, also when asked through a wrapper that passes on what it does not know."""
        return self

    @property
    def device(self) -> torch.device:
        """Where it lies."""
        return self.codebook.bias.device

    @property
    def embed_scale(self) -> Tensor:
        """As of the scaled embeddings of transformers; others have none."""
        if self.scale == 1:
            raise AttributeError("embed_scale")
        return torch.full((), self.scale, device=self.device)

    def refuse_offloaded(self, input: Tensor) -> None:
        """Raise ValueError if `input` has values but the table is on the meta device, where offloading leaves it."""
        if self.device.type == "meta" != input.device.type:
            raise ValueError(
                "the compressed table is on the meta device: offloading it (device_map, accelerate's cpu_offload and "
                "disk_offload) is not supported. It is small: keep it on a device and offload other modules"
            )

    @property
    def weight(self) -> Tensor:
        """The decoded table, (V, d), before `scale`: see `hf_adacomp.nn.weight`."""
        if torch_compat.is_traced():
            vectors: Tensor = self.decoder().table() if self.training_state is None else self._all_vectors()
            return vectors
        return self.last_weight.weight(self, self.codebook.bias)

    @torch.compiler.disable  # type: ignore[untyped-decorator]  # as look-ups in training
    def _all_vectors(self) -> Tensor:
        return self.weight + 0

    @torch.inference_mode(False)
    @torch.no_grad()
    def weight_values(self) -> Tensor:
        """All vectors as they are due now, (V, d), without gradients."""
        return self.last_weight.values(self, lambda: self.decoder().table())

    @torch.no_grad()
    def weight_rows(self, ids: Tensor) -> Tensor:
        """Vectors of ids as they are due now, (...) -> (..., d), without gradients."""
        return self.decoder().look_up(ids)

    def weight_gradients(self, gradient: Tensor) -> list[Tensor | None]:
        """From the gradient at all vectors, (V, d), those of `parameters()`."""
        self.reached = True
        gradient = gradient.to_dense() if gradient.is_sparse else gradient
        with torch.enable_grad():  # a backward pass asks, which has none
            decoder = self.decoder()
        if isinstance(decoder, SourceVectors):
            decoder.state.observation.note_table(gradient)
            return [None for _ in self.parameters()]
        return decoder.gradients([*self.parameters()], lambda block, _: gradient[block])

    @torch.no_grad()
    def to_embedding(self) -> nn.Embedding | nn.EmbeddingBag:
        """A dense module of the class that this one replaced, with the decoded table."""
        was_training = self.training
        dense = self.dense_with(self.eval().hard_decoder().table())
        self.train(was_training)
        return dense.train(was_training)

    def dense_with(self, weight: Tensor) -> nn.Embedding | nn.EmbeddingBag:
        """A dense module of the class that this one replaced, with a table (V, d), which it shares."""
        return dense_embedding(weight, self.padding_idx, self.scale, self.dense_class, self.bag)
