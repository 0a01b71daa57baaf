"""What a compressed table has for `weight`: a tensor (V, d) without memory, decoded when its values are used.

Losses, adapters, `_init_weights` of models and many scripts read `embedding.weight`, most of them for its dtype, device
or shape. Those cost nothing; rows that are looked up are decoded alone; other uses decode the whole table. Gradients
reach what learns in the table. A write would be lost, and raises; so does one into a view.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from .. import torch_compat

aten = torch.ops.aten

LIKE = {
    *(aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like),
    *(aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full),
}
"""Makers of tensors that ask one for its dtype, device and shape alone."""

COPIES = {aten.embedding, aten.index_select, aten.index}
"""Look-ups of rows whose result is no view."""


LOST = (
    "is decoded from codes, so that a change would be lost, and cannot be tied to another. New tokens: "
    "hf_adacomp.add_tokens(model, n, vectors=...). To change others: decompress(pack(model)), change the dense table, "
    "compress it again"
)


class Table(Protocol):
    """What can be read as a weight."""

    num_embeddings: int
    embedding_dim: int

    def weight_values(self) -> Tensor:
        """All vectors, (V, d), without gradients."""

    def weight_rows(self, ids: Tensor) -> Tensor:
        """Vectors of ids (...) -> (..., d), without gradients."""

    def weight_gradients(self, gradient: Tensor) -> Sequence[Tensor | None]:
        """From the gradient at all vectors, (V, d), those of `parameters()`."""

    def parameters(self) -> Any:
        """What may learn."""

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Let it learn or not."""


class DecodedWeight(Tensor):
    """The weight of a compressed table, or a view of it.

    Args:
        table: Which it is.
        like: On the meta device, of its shape, strides and dtype.
        device: Where its values are made.
        make: Makes its values.
        whole: Whether it is the table itself, whose rows can be looked up.
        detached: Whether it is what `detach` returned: `requires_grad_` then is its own and leaves the table as it is.
    """

    __torch_function__ = torch_compat.NO_TORCH_FUNCTION
    _is_hf_initialized = True  # transformers' initialisation passes over it
    _table: Table
    _make: Callable[[], Tensor]
    _whole: bool
    _detached: bool

    @staticmethod
    def __new__(
        cls,
        table: Table,
        like: Tensor,
        device: torch.device,
        make: Callable[[], Tensor],
        whole: bool,
        detached: bool = False,
    ) -> DecodedWeight:
        weight: DecodedWeight = torch_compat.tensor_without_memory(cls, like, device)
        weight._table, weight._make, weight._whole, weight._detached = table, make, whole, detached
        return weight

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch declares it without its class and function
        cls, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        first, packet = args[0] if args else None, func.overloadpacket
        if any(map(_holds, torch_compat.written(func, args, kwargs))):
            raise ValueError(f"{packet} would write into the weight of a compressed table: it {LOST}")
        if isinstance(first, cls):
            if packet in LIKE:
                blank = torch.empty((), dtype=first.dtype, device=first.device).expand(first.shape)
                return func(blank, *args[1:], **kwargs)
            ids = first._ids(func, args[1:], kwargs)
            if ids is not None and packet in COPIES:
                return first._table.weight_rows(ids)
            if torch_compat.is_view(func):
                return first._view(func, args[1:], kwargs, ids)
        return func(*map(_replaced, args), **{name: _replaced(value) for name, value in kwargs.items()})

    def _ids(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Tensor | None:
        """The ids of the rows that `func` takes out; None if it does something else."""
        packet = func.overloadpacket
        rows = packet in (aten.select, aten.slice, aten.index_select) and (args[0] if args else 0) % self.dim() == 0
        if not self._whole or not (rows or packet is aten.embedding or (packet is aten.index and len(args[0]) == 1)):
            return None
        if packet is aten.embedding:
            return torch.as_tensor(args[0])
        ids: Tensor = func(torch.arange(len(self), device=self.device), *args, **kwargs)
        return ids

    def _view(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], ids: Tensor | None) -> Any:
        meta = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")
        like = func(meta, *args, **kwargs)
        if not isinstance(like, Tensor):  # several views
            return [self._part(one, partial(self._one_of_many, func, args, kwargs, i)) for i, one in enumerate(like)]
        if ids is not None:
            return self._part(like, lambda: self._table.weight_rows(ids))
        if func is aten.detach.default:
            return DecodedWeight(self._table, like, self.device, self._make, self._whole, detached=True)
        return self._part(like, lambda: func(self._make(), *args, **kwargs))

    def _one_of_many(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any], i: int) -> Tensor:
        views: list[Tensor] = func(self._make(), *args, **kwargs)
        return views[i]

    def _part(self, like: Tensor, make: Callable[[], Tensor]) -> DecodedWeight:
        return DecodedWeight(self._table, like, self.device, make, whole=False)

    @property
    def data(self) -> Tensor:
        """The same without gradients; not to be set."""
        return self.detach()

    @data.setter
    def data(self, value: Tensor) -> None:
        raise ValueError(f"data of the weight of a compressed table cannot be set: it {LOST}")

    @property
    def requires_grad(self) -> bool:
        """Whether the table learns; to be set, as on a parameter: see `requires_grad_`."""
        return bool(Tensor.requires_grad.__get__(self))  # type: ignore[attr-defined]  # a property of C

    @requires_grad.setter
    def requires_grad(self, requires_grad: bool) -> None:
        self.requires_grad_(requires_grad)

    def requires_grad_(self, requires_grad: bool = True) -> DecodedWeight:
        """Freeze or unfreeze the table; of a detached weight, have it gather gradients of its own or not."""
        if self._detached:
            super().requires_grad_(requires_grad)
            return self
        self._table.requires_grad_(requires_grad)
        return self

    def is_whole(self, weight: Any) -> bool:
        """Whether this is all of a table, and the same as another weight."""
        return isinstance(weight, DecodedWeight) and self._whole and self._table is weight._table and not self._detached

    def numpy(self, *, force: bool = False) -> np.ndarray[Any, Any]:
        """As of any tensor."""
        return self.clone().numpy(force=force)

    def tolist(self) -> list[Any]:
        """As of any tensor."""
        return self.clone().tolist()

    def __deepcopy__(self, memo: Any) -> Tensor:
        return self.detach().clone()

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.detach().clone().__reduce_ex__(protocol)

    def __repr__(self, **_: Any) -> str:  # type: ignore[override]  # torch declares no name for its options
        return f"{type(self).__name__}({tuple(self.shape)}, dtype={self.dtype}, device='{self.device}')"


class Read(torch.autograd.Function):
    """From parameters to the weight, and from its gradient, which may come more than once, to theirs."""

    @staticmethod
    def forward(ctx: Any, table: Table, bias: Tensor, *parameters: Tensor) -> DecodedWeight:
        ctx.table = table
        like = torch.empty(table.num_embeddings, table.embedding_dim, dtype=bias.dtype, device="meta")
        return DecodedWeight(table, like, bias.device, table.weight_values, whole=True)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.table.weight_gradients(gradient[0])


def _holds(value: Any) -> bool:
    return isinstance(value, DecodedWeight) or (isinstance(value, (list, tuple)) and any(map(_holds, value)))


def _replaced(value: Any) -> Any:
    if isinstance(value, DecodedWeight):
        return value._make()
    return type(value)(map(_replaced, value)) if isinstance(value, (list, tuple)) and _holds(value) else value
