"""The codes of a packed table: two byte tensors and the index that finds a token's code in them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from .. import torch_compat
from ..torch_compat import KeptDtype
from .bits import (
    BLOCK,
    block_ranks,
    centred_bits,
    centred_bytes,
    check_padding,
    group_bytes,
    index_bits,
    locate,
    pack_assignment,
    pack_bits,
    packed_bytes,
    unpack_assignment,
)
from .codebook import BITS_PER_BLOCK


class PackedCodes(KeptDtype):
    """Codes of V tokens in the format of `hf_adacomp.codes.bits`.

    Args:
        num_tokens: V.
        ladder: The n code lengths in bits, increasing.
        tokens_per_length: How many tokens have each length, n numbers that sum to V.
    """

    length_indices: Tensor
    codes: Tensor
    ranks: Tensor
    groups: Tensor
    octets: Tensor

    def __init__(
        self,
        num_tokens: int,
        ladder: Sequence[int],
        tokens_per_length: Sequence[int],
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if len(tokens_per_length) != len(ladder) or sum(tokens_per_length) != num_tokens:
            raise ValueError(
                f"tokens_per_length={list(tokens_per_length)} does not share out {num_tokens} tokens over "
                f"{len(ladder)} code lengths {tuple(ladder)}"
            )
        self.num_tokens, self.ladder = num_tokens, tuple(ladder)
        self.tokens_per_length = tuple(tokens_per_length)
        self._order: Tensor | None = None  # sorted when it is first asked for
        self._located: tuple[Tensor, Tensor] | None = None
        self._index_bits = num_tokens * index_bits(len(ladder))
        self._unit = 8 if all(length % 8 == 0 for length in ladder) else 1  # bits in which codes are measured
        self._group_bytes = group_bytes(tokens_per_length, ladder)
        for name, size in (("length_indices", packed_bytes(self._index_bits)), ("codes", sum(self._group_bytes))):
            self.register_buffer(name, torch.zeros(size, dtype=torch.uint8, device=device))
        ranks = torch.zeros(-(-num_tokens // BLOCK), len(ladder), dtype=torch.int32, device=device)
        self.register_buffer("ranks", ranks, persistent=False)
        self.register_buffer("groups", torch.zeros(2, len(ladder), dtype=torch.int64, device=device), persistent=False)
        self.register_buffer("octets", centred_bytes(device), persistent=False)
        self.register_load_state_dict_post_hook(_index_again)  # type: ignore[no-untyped-call]  # torch's

    @classmethod
    def of(cls, assignment: Tensor, ladder: Sequence[int], codes: Tensor) -> PackedCodes:
        """Codes of tokens whose length indices are known, (V,), from the bytes of all groups."""
        tokens = torch.bincount(assignment.to(torch.int64), minlength=len(ladder)).tolist()
        packed = cls(len(assignment), ladder, tokens, device=codes.device)
        packed.length_indices.copy_(pack_assignment(assignment, len(ladder)))
        packed.codes.copy_(codes)
        packed.index()
        return packed

    @classmethod
    def room_for(cls, length_indices: Tensor, codes: Tensor, num_tokens: int, ladder: Sequence[int]) -> PackedCodes:
        """Room for stored codes, whose lengths tell how many tokens have each; ValueError if they are of others."""
        if len(length_indices) == packed_bytes(num_tokens * index_bits(len(ladder))):
            assignment = unpack_assignment(length_indices, num_tokens, len(ladder))
            tokens = torch.bincount(assignment.to(torch.int64), minlength=len(ladder)).tolist()
            if len(tokens) == len(ladder) and len(codes) == sum(group_bytes(tokens, ladder)):
                return cls(num_tokens, ladder, tokens, device=codes.device)
        raise ValueError(f"the codes are not of {num_tokens} tokens with code lengths {tuple(ladder)}")

    def resized(self, kept: Tensor, new_codes: Tensor) -> PackedCodes:
        """A copy for some tokens, int64 (K,), in that order, and new ones with centred bits (N, L), of the longest."""
        lengths, starts = self.locate(kept)
        longest = torch.full((len(new_codes),), len(self.ladder) - 1, dtype=torch.uint8, device=lengths.device)
        groups = []
        for k, length in enumerate(self.ladder):
            own = (lengths == k).nonzero().squeeze(1)
            blocks = own.split(max(8, BITS_PER_BLOCK // length // 8 * 8))  # whole bytes, but for the last
            for i, block in enumerate(blocks, 1):
                bits = self.centred(lengths[block], starts[block], length) > 0
                last = k == len(self.ladder) - 1 and i == len(blocks)
                groups.append(pack_bits(torch.cat([bits, new_codes > 0]) if last else bits))
        return PackedCodes.of(torch.cat([lengths, longest]), self.ladder, torch.cat(groups))

    def assignment(self) -> Tensor:
        """Length index of every token, uint8 (V,)."""
        return unpack_assignment(self.length_indices, self.num_tokens, len(self.ladder))

    def order(self) -> Tensor:
        """All tokens by code length, and by id where it is the same, int64 (V,): the order of `codes`."""
        order = self._order  # once: other threads may let go of it
        if order is None or order.device != self.codes.device:  # not all that moves tensors says so
            order = self._order = self.assignment().argsort(stable=True).to(torch.int32)
        return order.to(torch.int64)

    def places(self) -> Tensor:
        """Where every token's code is in the order of `codes`, int64 (V,); no sort, which exporters do not know."""
        lengths, inside = self._locate(torch.arange(self.num_tokens, device=self.codes.device))
        starts = [sum(self.tokens_per_length[:k]) for k in range(len(self.ladder))]
        return torch.tensor(starts, device=inside.device)[lengths.to(torch.int64)] + inside

    def locate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Length index, uint8 (N,), and where the code begins, int64 (N,), of each of `tokens`.

        From an index of all tokens, which is kept once it was asked for; graphs, whose constants are stored, do
        without.
        """
        if torch_compat.is_traced():
            lengths, inside = self._locate(tokens)
            return lengths, self._starts(lengths, inside)
        located = self._located  # once, as above
        if located is None or located[0].device != self.codes.device:
            lengths, inside = self._locate_all()
            small = 8 * len(self.codes) < torch.iinfo(torch.int32).max
            located = self._located = lengths, self._starts(lengths, inside).to(torch.int32 if small else torch.int64)
        lengths, starts = located
        return lengths[tokens], starts[tokens].to(torch.int64)

    def moved(self) -> None:
        """What is kept besides the tensors is let go."""
        self._order = self._located = None

    @property
    def kept_bytes(self) -> int:
        """Bytes of what is kept now besides the tensors of the file."""
        kept = (*(self._located or ()), *(() if self._order is None else (self._order,)))
        return sum(tensor.nbytes for tensor in kept)

    def _starts(self, lengths: Tensor, inside: Tensor) -> Tensor:
        sizes, starts = self.groups[:, lengths.to(torch.int64)]
        begin: Tensor = starts + inside * sizes
        return begin

    def _locate_all(self) -> tuple[Tensor, Tensor]:
        assignment = self.assignment()
        inside = torch.empty(len(assignment), dtype=torch.int64, device=assignment.device)
        for k in range(len(self.ladder)):
            own = (assignment == k).nonzero().squeeze(1)
            inside[own] = torch.arange(len(own), device=own.device)
        return assignment, inside

    def _locate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        return locate(self.length_indices, self.ranks, tokens)

    @torch.inference_mode(False)  # what is made there cannot take part in gradients
    def index(self) -> None:
        """Derive what is not stored; due whenever the length indices change."""
        self._order = self._located = None
        self.octets = centred_bytes(self.codes.device)
        lengths = [length // self._unit for length in self.ladder]
        starts = [8 * sum(self._group_bytes[:k]) // self._unit for k in range(len(self.ladder))]
        self.groups = torch.tensor([lengths, starts], device=self.codes.device)
        # `validate` names an index that is out of range.
        assignment = self.assignment().clamp_max(len(self.ladder) - 1)
        self.ranks = block_ranks(assignment, len(self.ladder))

    def centred(self, lengths: Tensor, starts: Tensor, longest: int) -> Tensor:
        """Centred bits of codes, as `locate` tells them: (N,), (N,) -> float32 (N, longest); none is longer."""
        octets = self.octets if self._unit == 8 else None
        return centred_bits(self.codes, starts, self.groups[0][lengths.to(torch.int64)], longest // self._unit, octets)

    def group(self, k: int) -> Tensor:
        """The bytes of the codes of the k-th length, uint8."""
        start = sum(self._group_bytes[:k])
        return self.codes[start : start + self._group_bytes[k]]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_order": None, "_located": None}  # copies and files are without what is kept

    def validate(self, name: str) -> None:
        """Raise ValueError if the tensors do not agree with each other or with `tokens_per_length`."""
        for tensor_name, tensor, size in (
            ("length_indices", self.length_indices, packed_bytes(self._index_bits)),
            ("codes", self.codes, sum(self._group_bytes)),
        ):
            if tensor.dtype != torch.uint8 or tensor.shape != (size,):
                raise ValueError(
                    f"{name}.{tensor_name} must be uint8 of shape ({size},); the file holds {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}"
                )
        check_padding(self.length_indices, self._index_bits, f"{name}.length_indices")
        found = torch.bincount(self.assignment().to(torch.int64), minlength=len(self.ladder)).tolist()
        if tuple(found) != self.tokens_per_length:
            raise ValueError(
                f"{name}.length_indices gives {found} tokens to the code lengths {self.ladder}, but the config says "
                f"{list(self.tokens_per_length)}; the file is damaged"
            )
        for k, length in enumerate(self.ladder):
            check_padding(self.group(k), self.tokens_per_length[k] * length, f"{name}.codes, group {k}")

    def extra_repr(self) -> str:
        return f"{self.num_tokens}, ladder={self.ladder}, tokens_per_length={self.tokens_per_length}"


def _index_again(packed: PackedCodes, _: Any) -> None:
    if not packed.length_indices.is_meta:
        packed.index()
