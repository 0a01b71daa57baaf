"""What a compressed table has for `weight`: a tensor (V, d) without memory, decoded when its values are used.

Losses, adapters, `_init_weights` of models and many scripts read `embedding.weight`, most of them for its dtype, device
or shape. Those cost nothing; rows that are looked up are decoded alone; other uses decode the whole table. Gradients
reach what learns in the table. A write would be lost, and raises; so does one into a view.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from .. import torch_compat
from .read_only import LOST, ReadOnly, ReadOnlyCopy

aten = torch.ops.aten

LIKE = {
    *(aten.empty_like, aten.zeros_like, aten.ones_like, aten.full_like, aten.rand_like, aten.randn_like),
    *(aten.new_empty, aten.new_zeros, aten.new_ones, aten.new_full),
}
"""Makers of tensors that ask one for its dtype, device and shape alone."""

COPIES = {aten.embedding, aten.index_select, aten.index}
"""Look-ups of rows whose result is no view."""


class Table(Protocol):
    """What can be read as a weight."""

    num_embeddings: int
    embedding_dim: int
    loading: bool

    def weight_values(self) -> Tensor:
        """All vectors, (V, d), without gradients."""

    def weight_rows(self, ids: Tensor) -> Tensor:
        """Vectors of ids (...) -> (..., d), without gradients."""

    def weight_gradients(self, gradient: Tensor) -> Sequence[Tensor | None]:
        """From the gradient at all vectors, (V, d), those of `parameters()`."""

    def parameters(self) -> Any:
        """What may learn."""

    def named_parameters(self) -> Any:
        """The same with names."""

    def requires_grad_(self, requires_grad: bool = True) -> Any:
        """Let it learn or not."""


class DecodedWeight(ReadOnly):
    """The weight of a compressed table, or a view of it.

    Args:
        table: Which it is.
        like: On the meta device, of its shape, strides and dtype.
        device: Where its values are made.
        make: Makes its values.
        whole: Whether it is the table itself, whose rows can be looked up.
        detached: Whether it is what `detach` returned: `requires_grad_` then is its own and leaves the table as it is.
    """

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

    def plain(self) -> Tensor:
        """All values that it stands for, decoded."""
        return self._make()

    def answer(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Any:
        """What an operator returns whose first argument this is: most need less than all values."""
        packet = func.overloadpacket
        if packet in LIKE:
            blank = torch.empty((), dtype=self.dtype, device=self.device).expand(self.shape)
            return func(blank, *args, **kwargs)
        ids = self._ids(func, args, kwargs)
        if ids is not None and packet in COPIES:
            return self._table.weight_rows(ids)
        if torch_compat.is_view(func):
            return self._view(func, args, kwargs, ids)
        return super().answer(func, args, kwargs)

    def _ids(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> Tensor | None:
        """The ids of the rows that `func` takes out; None if it does something else."""
        packet = func.overloadpacket
        rows = packet in (aten.select, aten.slice, aten.index_select) and (args[0] if args else 0) % self.dim() == 0
        if not self._whole or not (rows or packet is aten.embedding or (packet is aten.index and len(args[0]) == 1)):
            return None
        if packet is aten.embedding:
            return torch.as_tensor(args[0])
        ids: Tensor = func(torch.arange(len(self), device=self.device), *args, **kwargs)
        return ids

    def _view(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], ids: Tensor | None) -> Any:
        meta = torch.empty_strided(self.shape, self.stride(), dtype=self.dtype, device="meta")
        like = func(meta, *args, **kwargs)
        if not isinstance(like, Tensor):  # several views
            return [self._part(one, partial(self._one_of_many, func, args, kwargs, i)) for i, one in enumerate(like)]
        if ids is not None:
            return self._part(like, lambda: self._table.weight_rows(ids))
        if func is aten.detach.default:
            return DecodedWeight(self._table, like, self.device, self._make, self._whole, detached=True)
        return self._part(like, lambda: func(self._make(), *args, **kwargs))

    def _one_of_many(self, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], i: int) -> Tensor:
        views: list[Tensor] = func(self._make(), *args, **kwargs)
        return views[i]

    def _part(self, like: Tensor, make: Callable[[], Tensor]) -> DecodedWeight:
        return DecodedWeight(self._table, like, self.device, make, whole=False)

    @property
    def data(self) -> Tensor:
        """A copy without gradients, which is not to be written to; not to be set."""
        if self._table.loading:  # models initialise it before there are codes
            return self.detach()
        return ReadOnlyCopy(self._make().clone())

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

    def storage(self) -> Any:
        """Refused: what saves a tensor asks for its memory."""
        raise ValueError(f"the weight of a compressed table has no memory to be saved or shared: it {LOST}")

    def untyped_storage(self) -> Any:
        """As `storage`."""
        return self.storage()

    def is_whole(self, weight: Any) -> bool:
        """Whether this is all of a table, and the same as another weight."""
        return isinstance(weight, DecodedWeight) and self._whole and self._table is weight._table and not self._detached

    def register_hook(self, hook: Any) -> Any:
        """Refused, but for a detached weight: the next reader of the table gets another weight."""
        return super().register_hook(hook) if self._detached else self._refuse_hook()  # type: ignore[no-untyped-call]

    def register_post_accumulate_grad_hook(self, hook: Any) -> Any:
        """As `register_hook`."""
        return super().register_post_accumulate_grad_hook(hook) if self._detached else self._refuse_hook()  # type: ignore[no-untyped-call]

    def _refuse_hook(self) -> None:
        raise ValueError(
            "a hook on the weight of a compressed table would not be called: it is decoded at each use, and what "
            "learns are embedding.parameters(). Put the hook there, or on the module, register_full_backward_hook"
        )


class Read(torch.autograd.Function):
    """From parameters to the weight, and from its gradient, which may come more than once, to theirs."""

    @staticmethod
    def forward(ctx: Any, table: Table, bias: Tensor, *parameters: Tensor) -> DecodedWeight:
        ctx.asked = asked = AskedWith(table, parameters)
        like = torch.empty(table.num_embeddings, table.embedding_dim, dtype=bias.dtype, device="meta")
        return DecodedWeight(table, like, bias.device, partial(asked, "weight_values"), whole=True)

    @staticmethod
    def backward(ctx: Any, *gradient: Tensor) -> tuple[Tensor | None, ...]:
        return None, None, *ctx.asked("weight_gradients", gradient[0])


class AskedWith:
    """A table, asked with the parameters that it had when its weight was read.

    `torch.func.functional_call` exchanges a module's parameters for one call; gradients come after it.
    """

    def __init__(self, table: Table, parameters: Sequence[Tensor]) -> None:
        self.table, self.parameters = table, parameters

    def __call__(self, method: str, *args: Any) -> Any:
        """What the method returns."""
        names = [name for name, _ in self.table.named_parameters()]
        same = all(old is now for old, now in zip(self.parameters, self.table.parameters(), strict=False))
        if same or len(names) != len(self.parameters):  # packing leaves fewer
            return getattr(self.table, method)(*args)
        given = {f"table.{name}": old for name, old in zip(names, self.parameters, strict=True)}
        return torch.func.functional_call(_Asking(self.table), given, (method, *args))


class _Asking(nn.Module):
    def __init__(self, table: Any) -> None:
        super().__init__()
        self.table = table

    def forward(self, method: str, *args: Any) -> Any:
        return getattr(self.table, method)(*args)
