"""The codes of a packed table: two byte tensors and the index that finds a token's code in them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from . import packing


class PackedCodes(nn.Module):
    """Codes of V tokens in the format of `hf_adacomp.packing`.

    Args:
        num_tokens: V.
        code_lengths: The n code lengths in bits, increasing.
        tokens_per_length: How many tokens have each length, n numbers that sum to V.
    """

    lengths: Tensor
    codes: Tensor
    ranks: Tensor

    def __init__(
        self,
        num_tokens: int,
        code_lengths: Sequence[int],
        tokens_per_length: Sequence[int],
        *,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        if len(tokens_per_length) != len(code_lengths) or sum(tokens_per_length) != num_tokens:
            raise ValueError(
                f"tokens_per_length={list(tokens_per_length)} does not share out {num_tokens} tokens over "
                f"{len(code_lengths)} code lengths {tuple(code_lengths)}"
            )
        self.num_tokens, self.code_lengths = num_tokens, tuple(code_lengths)
        self.tokens_per_length = tuple(tokens_per_length)
        self._length_bits = num_tokens * packing.index_bits(len(code_lengths))
        self._group_bytes = packing.group_bytes(tokens_per_length, code_lengths)
        for name, size in (("lengths", packing.packed_bytes(self._length_bits)), ("codes", sum(self._group_bytes))):
            self.register_buffer(name, torch.zeros(size, dtype=torch.uint8, device=device))
        ranks = torch.zeros(-(-num_tokens // packing.BLOCK), len(code_lengths), dtype=torch.int32, device=device)
        self.register_buffer("ranks", ranks, persistent=False)

    @classmethod
    def of(cls, assignment: Tensor, code_lengths: Sequence[int], codes: Tensor) -> PackedCodes:
        """Codes of tokens whose length indices are known, (V,), from the bytes of all groups."""
        tokens = torch.bincount(assignment.to(torch.int64), minlength=len(code_lengths)).tolist()
        packed = cls(len(assignment), code_lengths, tokens, device=codes.device)
        packed.lengths.copy_(packing.pack_lengths(assignment, len(code_lengths)))
        packed.codes.copy_(codes)
        packed.index()
        return packed

    def resized(self, num_tokens: int, new_codes: Tensor) -> PackedCodes:
        """A copy for `num_tokens` tokens: the first of these, then new ones with codes (N, L) of the longest length."""
        assignment = self.assignment()[:num_tokens]
        longest = torch.full((len(new_codes),), len(self.code_lengths) - 1, dtype=torch.uint8, device=assignment.device)
        groups = []
        for k in range(len(self.code_lengths)):
            kept = torch.arange(int((assignment == k).sum()), device=assignment.device)  # token order inside a group
            bits = self.bits(k, kept)
            groups.append(packing.pack_bits(bits if k < len(self.code_lengths) - 1 else torch.cat([bits, new_codes])))
        return PackedCodes.of(torch.cat([assignment, longest]), self.code_lengths, torch.cat(groups))

    def assignment(self) -> Tensor:
        """Length index of every token, uint8 (V,)."""
        return packing.unpack_assignment(self.lengths, self.num_tokens, len(self.code_lengths))

    def locate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Length index, uint8 (N,), and place inside its group, int64 (N,), of each of `tokens`."""
        return packing.locate(self.lengths, self.ranks, tokens)

    def index(self) -> None:
        """Derive the ranks from the lengths; due whenever those change."""
        # `validate` names an index that is out of range.
        assignment = self.assignment().clamp_max(len(self.code_lengths) - 1)
        self.ranks = packing.block_ranks(assignment, len(self.code_lengths))

    def bits(self, k: int, places: Tensor) -> Tensor:
        """Bits of the codes at `places` of group k: int64 (N,) -> float32 0/1 (N, L_k)."""
        return packing.unpack_rows(self.group(k), places, self.code_lengths[k])

    def group(self, k: int) -> Tensor:
        """The bytes of the codes of the k-th length, uint8."""
        start = sum(self._group_bytes[:k])
        return self.codes[start : start + self._group_bytes[k]]

    def validate(self, name: str) -> None:
        """Raise ValueError if the tensors do not agree with each other or with `tokens_per_length`."""
        for tensor_name, tensor, size in (
            ("lengths", self.lengths, packing.packed_bytes(self._length_bits)),
            ("codes", self.codes, sum(self._group_bytes)),
        ):
            if tensor.dtype != torch.uint8 or tensor.shape != (size,):
                raise ValueError(
                    f"{name}.{tensor_name} must be uint8 of shape ({size},); the file holds {tensor.dtype} of shape "
                    f"{tuple(tensor.shape)}"
                )
        packing.check_padding(self.lengths, self._length_bits, f"{name}.lengths")
        self.index()  # transformers fills what a file does not hold with uninitialised memory
        found = torch.bincount(self.assignment().to(torch.int64), minlength=len(self.code_lengths)).tolist()
        if tuple(found) != self.tokens_per_length:
            raise ValueError(
                f"{name}.lengths gives {found} tokens to the code lengths {self.code_lengths}, but the config says "
                f"{list(self.tokens_per_length)}; the file is damaged"
            )
        for k, length in enumerate(self.code_lengths):
            packing.check_padding(self.group(k), self.tokens_per_length[k] * length, f"{name}.codes, group {k}")

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        if not self.lengths.is_meta:
            self.index()

    def extra_repr(self) -> str:
        return f"{self.num_tokens}, code_lengths={self.code_lengths}, tokens_per_length={self.tokens_per_length}"
