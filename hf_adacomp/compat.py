"""Every private or unstable part of transformers, accelerate and torch that this package touches, under a name.

Each function says why it is needed; each has a test in `tests/test_compat.py`, so that an upstream change breaks one
named test. The rest of the package reads no attribute with a leading underscore that is not its own.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from transformers import PreTrainedModel
from transformers.quantizers.auto import (
    AUTO_QUANTIZATION_CONFIG_MAPPING,
    AUTO_QUANTIZER_MAPPING,
    register_quantization_config,
    register_quantizer,
)
from transformers.utils.hub import cached_file

TIES = ("_tied_weights_keys", "all_tied_weights_keys")
DENSE_TIES = "_dense_ties"
"""Where transformers keeps which parameters are tied, and where we keep what it said before compression."""


# transformers: quantizers


def register_quant_method(name: str, config_class: type, quantizer_class: type) -> None:
    """Make a `quant_method` known. The decorators that do it raise when a module is imported twice."""
    if name not in AUTO_QUANTIZATION_CONFIG_MAPPING:
        register_quantization_config(name)(config_class)
    if name not in AUTO_QUANTIZER_MAPPING:
        register_quantizer(name)(quantizer_class)


def quantizer_of(model: nn.Module) -> Any:
    """The quantizer that `from_pretrained` left on a model, or None: `Trainer` and `save_pretrained` ask it."""
    return model.__dict__.get("hf_quantizer")


def set_quantizer(model: PreTrainedModel, quantizer: Any) -> None:
    """Leave a quantizer on a model as `from_pretrained` does; no public method does."""
    setattr(model, "hf_quantizer", quantizer)  # noqa: B010  # transformers declares no such attribute


def is_loaded(tensor: Tensor) -> bool:
    """Whether `from_pretrained` found this tensor in a file: what it did not find holds whatever memory held."""
    return bool(getattr(tensor, "_is_hf_initialized", False))


def expect_in_files(model: PreTrainedModel, names: Iterable[str]) -> None:
    """Have `from_pretrained` pass over tensors of a file that the model has no place for, without a report."""
    expected = [rf"(^|\.){re.escape(name)}$" for name in names]
    known = model._keys_to_ignore_on_load_unexpected
    # Older releases add lists to it.
    patterns = known.union(expected) if isinstance(known, set) else [*(known or ()), *expected]
    model._keys_to_ignore_on_load_unexpected = patterns


# transformers: ties


def tied_weights(model: PreTrainedModel) -> dict[str, str]:
    """Which parameter is tied to which, by name, for the model and its parts: transformers computes it once."""
    ties: dict[str, str] = model.all_tied_weights_keys
    return ties


def forget_ties(part: PreTrainedModel, prefix: str, weights: set[str]) -> None:
    """Drop the ties between these weights (names that begin with `prefix`), which are modules of ours from now on.

    `tie_word_embeddings=False` would drop the tie of a trained bias along with them.
    """
    part.__dict__.setdefault(DENSE_TIES, {name: part.__dict__[name] for name in TIES if name in part.__dict__})
    own = part.get_expanded_tied_weights_keys()
    for attribute, ties in zip(TIES, (own, part.all_tied_weights_keys), strict=True):
        kept = {a: b for a, b in ties.items() if not {prefix + a, prefix + b} & weights}
        if len(kept) < len(ties):
            setattr(part, attribute, kept)


def remember_ties(part: PreTrainedModel, untied: bool) -> None:
    """Undo `forget_ties`, if that was called; no parameter is tied any more where `untied`."""
    if DENSE_TIES not in part.__dict__:
        return
    dense_ties = part.__dict__.pop(DENSE_TIES)
    for name in TIES:
        part.__dict__.pop(name, None)
    part.__dict__.update(dense_ties)
    if untied:
        part.all_tied_weights_keys = {}


# transformers: the rest


def embed_scale(embedding: nn.Module) -> Any:
    """The factor of transformers' scaled embeddings, which have no common class; None for others."""
    # The buffer `embed_scale` of Gemma takes the dtype of the model; its `scalar_embed_scale` is exact.
    return getattr(embedding, "scalar_embed_scale", getattr(embedding, "embed_scale", None))


def rounds_scale(embedding: nn.Module) -> bool:
    """Whether a scaled embedding rounds its factor to the dtype of its table, as Gemma's do, which hold a tensor."""
    return isinstance(getattr(embedding, "embed_scale", None), Tensor)


def loaded_from(model: PreTrainedModel) -> str:
    """The folder or Hub name that a model was loaded from; empty if it was not. There is no public record of it."""
    return str(model.config._name_or_path or "")


def upload_files(model: PreTrainedModel, *args: Any, **kwargs: Any) -> Any:
    """The last step of `push_to_hub`, by when all files lie in a folder: our card has to join them there."""
    return type(model)._upload_modified_files(model, *args, **kwargs)


UPLOAD_FILES = "_upload_modified_files"
"""Name of the method behind `upload_files`."""


def resized_embeddings(model: PreTrainedModel, *args: Any) -> nn.Module:
    """What makes embeddings of another size, which classes use for all of their tables by token."""
    embeddings: nn.Module = type(model)._get_resized_embeddings(model, *args)
    return embeddings


RESIZED_EMBEDDINGS = "_get_resized_embeddings"
"""Name of the method behind `resized_embeddings`."""


def resizes_more(model: PreTrainedModel) -> bool:
    """Whether a model's class resizes further weights along with its table and output head."""
    names = ("resize_token_embeddings", "_resize_token_embeddings")
    return any(getattr(type(model), name) is not getattr(PreTrainedModel, name) for name in names)


def file_of(model: str, file: str) -> str | None:
    """Where a file of a folder or a Hub repository lies; None if it has none. The public way raises many errors."""
    found: str | None = cached_file(model, file, _raise_exceptions_for_missing_entries=False)
    return found


def checkpoint_prefix() -> str:
    """How names of the Trainer's checkpoints begin. It brings PEFT along, which loading a model does not need."""
    from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR  # noqa: PLC0415

    return str(PREFIX_CHECKPOINT_DIR)


def add_to_log(state: Any, logs: dict[str, Any], values: dict[str, Any]) -> None:
    """Add values to what the Trainer logs: it has appended a copy to the history before it asks callbacks."""
    logs.update(values)
    state.log_history[-1].update(values)


# accelerate


def distributed_kind() -> str:
    """How accelerate shares out a training: `"NO"`, `"MULTI_GPU"`, `"FSDP"`, `"DEEPSPEED"` and the like."""
    from accelerate.state import AcceleratorState  # type: ignore[import-untyped]  # noqa: PLC0415  # ships no types

    return str(AcceleratorState().distributed_type.value)


# torch


def as_float64(tensor: Tensor) -> Tensor:
    """The values in float64, on the CPU where their device has none (Apple's)."""
    return tensor.to("cpu" if tensor.device.type == "mps" else tensor.device, torch.float64)


class KeptDtype(nn.Module):
    """A module whose floats keep their dtype when a model is cast: `model.to(torch.bfloat16)` moves it, no more.

    Every cast and move goes through `_apply`; there is no public way to take part.
    """

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> KeptDtype:
        def kept(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(kept, recurse)  # type: ignore[no-untyped-call]  # torch's
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


def children(module: nn.Module) -> Iterator[tuple[str, nn.Module | None]]:
    """All children by name; `named_children` leaves out a module's second name."""
    return iter([*module._modules.items()])


def version(tensor: Tensor) -> int:
    """How often a tensor was changed in place, as autograd counts it. 0 for those it does not.

    Fused optimizers, the Trainer's default among them, change parameters uncounted.
    """
    return 0 if tensor.is_inference() else int(tensor._version)


_steps_taken = 0


def _note_step(*_: Any) -> None:
    global _steps_taken  # noqa: PLW0603  # by all optimizers of the process, as the hook is
    _steps_taken += 1


register_optimizer_step_post_hook(_note_step)


def state_of(tensors: Iterable[Tensor]) -> tuple[Any, ...]:
    """What differs as soon as one of the tensors is another, lies elsewhere or was changed in place.

    Any optimizer's step may have changed them: see `version`.
    """
    return _steps_taken, *((id(tensor), tensor.data_ptr(), tensor.dtype, version(tensor)) for tensor in tensors)


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
    """A tensor of a subclass with the shape, strides and dtype of another; every operator asks the subclass."""
    return Tensor._make_wrapper_subclass(kind, like.shape, like.stride(), dtype=like.dtype, device=device)


def written(operator: Any, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
    """Those of its arguments that an operator writes into."""
    arguments = operator._schema.arguments
    writes = [argument for argument in arguments if argument.alias_info is not None and argument.alias_info.is_write]
    by_name = {**dict(zip((argument.name for argument in arguments), args, strict=False)), **kwargs}
    return [by_name[argument.name] for argument in writes if argument.name in by_name]


def is_view(operator: Any) -> bool:
    """Whether what an operator returns shares the memory of its first argument."""
    return any(returned.alias_info is not None for returned in operator._schema.returns)
