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
        self._ranks: Tensor | None = None

    def assignment(self) -> Tensor:
        """Length index of every token, uint8 (V,)."""
        tokens = torch.arange(self.num_tokens, device=self.lengths.device)
        return packing.unpack_lengths(self.lengths, tokens, len(self.code_lengths))

    def locate(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Length index, uint8 (N,), and place inside its group, int64 (N,), of each of `tokens`."""
        if self._ranks is None or self._ranks.device != self.lengths.device:
            self._ranks = packing.block_ranks(self.assignment(), len(self.code_lengths))
        return packing.locate(self.lengths, self._ranks, tokens)

    def bits(self, k: int, places: Tensor) -> Tensor:
        """Bits of the codes at `places` of group k: int64 (N,) -> uint8 0/1 (N, L_k)."""
        return packing.unpack_rows(self._group(k), places, self.code_lengths[k])

    def _group(self, k: int) -> Tensor:
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
        found = torch.bincount(self.assignment().to(torch.int64), minlength=len(self.code_lengths)).tolist()
        if tuple(found) != self.tokens_per_length:
            raise ValueError(
                f"{name}.lengths gives {found} tokens to the code lengths {self.code_lengths}, but the config says "
                f"{list(self.tokens_per_length)}; the file is damaged"
            )
        for k, length in enumerate(self.code_lengths):
            packing.check_padding(self._group(k), self.tokens_per_length[k] * length, f"{name}.codes, group {k}")

    def _load_from_state_dict(self, *args: object, **kwargs: object) -> None:
        super()._load_from_state_dict(*args, **kwargs)
        self._ranks = None

    def extra_repr(self) -> str:
        return f"{self.num_tokens}, code_lengths={self.code_lengths}, tokens_per_length={self.tokens_per_length}"
