"""Every private or unstable part of torch that this package touches, under a name.

Each function says why it is needed, and has a test of its own that breaks with an upstream change. The rest of the
package reads no attribute with a leading underscore that is not its own.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn


def as_float64(tensor: Tensor) -> Tensor:
    """The values in float64, on the CPU where their device has none (Apple's)."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


class Movable(nn.Module):
    """A module that learns that it was moved or cast: what it keeps beside its tensors would stay behind.

    Every cast and move goes through `_apply`; there is no public way to take part.
    """

    def moved(self) -> None:
        """Called after each cast and move."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Movable:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]  # torch's
        self.moved()
        return self


class KeptDtype(Movable):
    """A module whose floats keep their dtype when a model is cast: `model.to(torch.bfloat16)` moves it, no more."""

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeptDtype:
        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(kept, recurse)
        return self


class KeptBuffers(Movable):
    """A module some of whose buffers keep their dtype when a model is cast, as all floats of a `KeptDtype` do."""

    kept_buffers: tuple[str, ...] = ()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeptBuffers:
        before = {name: self._buffers[name] for name in self.kept_buffers if name in self._buffers}
        super()._apply(fn, recurse)
        for name, old in before.items():
            moved = self._buffers[name]
            if old is not None and moved is not None and moved.dtype != old.dtype:
                self._buffers[name] = old.to(moved.device)
        return self


IGNORED_BY_DDP = "_ddp_params_and_buffers_to_ignore"


def spare_broadcasts(model: nn.Module, names: Iterable[str]) -> None:
    """Have `DistributedDataParallel` leave these buffers of `model` alone, which it sends around at each forward pass.

    The public switch, `broadcast_buffers`, is for all buffers of a model or none.
    """
    known = getattr(model, IGNORED_BY_DDP, [])
    setattr(model, IGNORED_BY_DDP, [*known, *(name for name in names if name not in known)])


HOOKS = (
    *("_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    *("_forward_pre_hooks", "_forward_pre_hooks_with_kwargs"),
    *("_backward_hooks", "_backward_pre_hooks", "_is_full_backward_hook"),
)
"""Where torch keeps the hooks on a module's passes, which has no public way to list them."""


def hand_over_hooks(old: nn.Module, new: nn.Module) -> None:
    """Have a module call the hooks of another, whose handles remove them from both."""
    new.__dict__.update({name: old.__dict__[name] for name in HOOKS})


def is_replica(module: nn.Module) -> bool:
    """Whether `nn.DataParallel` made a module, for one forward pass."""
    return getattr(module, "_is_replica", False)


def children(module: nn.Module) -> Iterator[tuple[str, nn.Module | None]]:
    """All children by name; `named_children` leaves out a module's second name."""
    return iter([*module._modules.items()])


class Snapshot:
    """Tensors as they were: parameters by a copy of their values, which fused optimizers and `parameter.data` change
    uncounted; others, which are large and constant, by where they lie and how often autograd has seen them change.
    """

    def __init__(self, tensors: Iterable[Tensor]) -> None:
        self.seen = [_seen(tensor) for tensor in tensors]

    def holds(self, tensors: Iterable[Tensor]) -> bool:
        """Whether these are the same tensors, unchanged."""
        given = [*tensors]
        return len(given) == len(self.seen) and all(map(_is_same, self.seen, given))


def _seen(tensor: Tensor) -> Any:
    if isinstance(tensor, nn.Parameter):
        return tensor.detach().clone()
    return id(tensor), tensor.data_ptr(), tensor.dtype, 0 if tensor.is_inference() else tensor._version


def _is_same(seen: Any, tensor: Tensor) -> bool:
    if isinstance(seen, Tensor) != isinstance(tensor, nn.Parameter):
        return False
    if not isinstance(seen, Tensor):
        return bool(seen == _seen(tensor))
    alike = (seen.dtype, seen.device) == (tensor.dtype, tensor.device) and not seen.is_meta
    return alike and torch.equal(seen, tensor)


def is_traced() -> bool:
    """Whether only plain operators may run, whose shapes do not depend on values: compiled, exported, transformed."""
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()  # type: ignore[attr-defined,no-untyped-call]
    return bool(traced) or is_transformed()


def is_transformed() -> bool:
    """Whether `torch.func.vmap`, `grad` or another of its kin runs the code. There is no public way to ask."""
    return not torch.compiler.is_compiling() and bool(torch._C._functorch.get_interpreter_stack())


def check_on_device(condition: Tensor, message: str) -> None:
    """Have the device check a condition, a bool of shape (), without waiting for it; as `nn.Embedding` checks ids.

    Compiled graphs keep the check, too. There is no public way, and not every device has it.
    """
    if is_transformed():  # for all examples at once: what `vmap` wraps is a tensor of theirs
        while torch._C._functorch.is_functorch_wrapped_tensor(condition):
            condition = torch._C._functorch.get_unwrapped(condition)
        condition = condition.all()
    if condition.device.type in ("cpu", "cuda", "meta"):
        torch._assert_async(condition, message)


NO_TORCH_FUNCTION: Any = torch._C._disabled_torch_function_impl
"""For subclasses of `Tensor` that look at operators (`__torch_dispatch__`): results stay plain tensors."""


def tensor_without_memory(kind: type[Tensor], like: Tensor, device: torch.device) -> Any:
    """A tensor of a subclass with the shape, strides and dtype of another; every operator asks the subclass.

    So does the question for its device. To torch it is on the meta device: `other.data = ...` asks no operator, and
    would take memory that is not there.
    """
    options: dict[str, Any] = {"dtype": like.dtype, "device": "meta", "dispatch_device": True}
    made: Any = Tensor._make_wrapper_subclass(kind, like.shape, like.stride(), **options)
    made.lies_on = device
    return made


DEVICE: Any = torch.ops.prim.device.default
"""The operator that asks a tensor without memory for its device."""


def written(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Those of its arguments that an operator writes into."""
    arguments = operator._schema.arguments
    writes = [argument for argument in arguments if argument.alias_info is not None and argument.alias_info.is_write]
    by_name = {**dict(zip((argument.name for argument in arguments), args, strict=False)), **kwargs}
    return [by_name[argument.name] for argument in writes if argument.name in by_name]


def is_view(operator: Any) -> bool:
    """Whether what an operator returns shares the memory of its first argument."""
    return any(returned.alias_info is not None for returned in operator._schema.returns)
