"""What the processes of one training, the ranks, share: sums, a common start, and a check that they agree.

Does nothing where `torch.distributed` runs no more than one process.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor
from torch import distributed as dist


def several() -> bool:
    """Whether this process is one of several."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@torch.no_grad()
def sum_over_ranks(tensor: Tensor, device: torch.device | None = None) -> Tensor:
    """The sum of a tensor over all ranks, by way of `device`, the same on each; itself where there is one rank."""
    if not several():
        return tensor
    total = tensor.to(tensor.device if device is None else device, copy=True)
    dist.all_reduce(total)
    return total


@torch.no_grad()
def take_from_first(tensors: Iterable[Tensor]) -> None:
    """Overwrite tensors by those of the first rank."""
    if not several():
        return
    from torch.distributed.tensor import DTensor  # noqa: PLC0415  # a second that loading a model does not need

    for tensor in tensors:
        if isinstance(tensor, DTensor):
            raise ValueError(
                "the parameters of a compressed table are sharded (FSDP2), which needs every process to have them "
                "whole until it is packed: train with DistributedDataParallel, or shard the packed model"
            )
        dist.broadcast(tensor, src=0)


def check_agreement(checksums: Mapping[str, int], device: torch.device) -> None:
    """Raise ValueError on every rank unless all ranks have the same checksums of their tensors, given by name."""
    if not several():
        return
    own = torch.tensor([*checksums.values()], dtype=torch.int64, device=device)
    ranks = [torch.empty_like(own) for _ in range(dist.get_world_size())]
    dist.all_gather(ranks, own)
    for rank, other in enumerate(ranks):
        if not torch.equal(other, ranks[0]):
            place = int((other != ranks[0]).nonzero()[0])
            raise ValueError(
                f"ranks 0 and {rank} have trained different tables, first seen in {[*checksums][place]!r}: wrap the "
                "model in DistributedDataParallel, or let the Trainer do it, so that all ranks take the same steps; "
                "and call embedding.step() only where gradients are synchronised, not under no_sync()"
            )
