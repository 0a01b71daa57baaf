"""The binary code-book of all code lengths: encode by a straight-through step, decode by a sum of code vectors."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import torch_compat
from ..config import FLOAT_DTYPES, INTEGER_BITS
from .bits import pack_nibbles, unpack_nibbles
from .descent import BinaryStep, decide_bits
from .rounding import codebook_bytes, packed_rate, quantize_rows, round_vectors, straight_through

BITS_PER_BLOCK = 1 << 22
"""Table rows are processed in blocks of about this many bits (as float32: 16 MB) to bound memory."""


class StoredBook(NamedTuple):
    """The code-book as it is stored, in floats: code vectors C (L, d) and bias c (d,)."""

    vectors: Tensor
    bias: Tensor

    def decode(self, bits: Tensor) -> Tensor:
        """`C^T s + c` of centred bits of the first vectors, (N, l) -> (N, d). Under autocast as without it."""
        with torch.autocast(bits.device.type, enabled=False):
            return torch.addmm(self.bias, bits.to(self.vectors.dtype), self.vectors[: bits.shape[1]])


class Encoder(NamedTuple):
    """The network that decides bits: weight F (L, d), shift (L,), and what bits explain of each other, S (L, L)."""

    weight: Tensor
    shift: Tensor
    overlap: Tensor

    @classmethod
    def tied(cls, readers: Tensor, vectors: Tensor, bias: Tensor) -> Encoder:
        """The one that descends the error of code vectors and bias, whose readers are `s C M`."""
        return cls(readers, -readers @ bias, (readers @ vectors.T).fill_diagonal_(0))

    def encode(self, x: Tensor, length: int | None = None) -> Tensor:
        """Centred bits of the vectors x, (..., d) -> (..., length), of x's dtype. Computed in float32 at least."""
        return self.decide(self.drive(x, length)).to(x.dtype)

    def drive(self, x: Tensor, length: int | None = None) -> Tensor:
        """`F x + f`, (..., d) -> (..., length), float32 at least; the drive of a shorter code is its beginning."""
        first = slice(length)
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x.to(self.weight.dtype), self.weight[first], self.shift[first])

    def decide(self, drive: Tensor) -> Tensor:
        """Centred bits of codes as long as their drive, (..., length)."""
        first = slice(drive.shape[-1])
        with torch.autocast(drive.device.type, enabled=False):
            with torch.no_grad():
                bits, margins = decide_bits(drive, self.overlap[first, first])
                explained = drive - margins
            decided: Tensor = BinaryStep.apply(drive - explained, bits)  # type: ignore[no-untyped-call]
            return decided

    def encode_each(self, x: Tensor, lengths: Tensor, longest: int) -> Tensor:
        """The same in codes of each vector's own length, at most the longest: (N, d), (N,) -> (N, longest), then 0."""
        with torch.autocast(x.device.type, enabled=False):  # it cannot mix two half precisions
            bits = x.new_zeros(len(x), longest)
            groups = lengths.argsort(stable=True).split(lengths.bincount(minlength=1).tolist())
            for length, own in enumerate(groups):
                if len(own):
                    bits = bits.index_copy(0, own, F.pad(self.encode(x[own], length), (0, longest - length)))
            return bits


class BinaryCodebook(torch_compat.KeptBuffers):
    """A code-book of `length` code vectors of width `dim`, with the encoder that chooses among them.

        encode   s_i = H(F_i x + f_i - sum_{j<l} S_ij s_j) - 1/2    i < l, S = s C M C^T off the diagonal: `decide_bits`
        decode   xhat = sum_{i<l} s_i C_i + c                       code vectors C_i, rows of C, and the bias c

    A code of length l uses the first l code vectors: one book serves all lengths, and a longer code refines what a
    shorter one says. Bits are centred, -1/2 or 1/2, so that the bias is right for each length.

    With `tied`, `F = s C M` and `f = encoder_bias - s C M c`: encoding descends the squared error in the metric M, up
    to the learned bias, and follows the code vectors, which are constants to it. (Gradients that reach them through the
    encoder, too, make them alike, and the descent over alike vectors is poor.) Both ways see code vectors as they will
    be stored (rounded to `storage`), with gradients passed straight through the rounding and through the step H.

    A vector is the sum of about L/2 code vectors. If an optimizer moved each by its learning rate, vectors would move
    by many times that: training therefore holds `C = rate * weight` with `rate = sqrt(2 / L)`. Packed, and in files, it
    is `C = rate * weight` in floats, or `C = rate * scale * weight` in integers, whose scales learn: rate is a power of
    two then, near `sqrt(2 / L)` or that over 2^(bits - 1), so that packing changes no value.

    Args:
        length: Number of code vectors, i.e. bits of the longest code.
        dim: Width d of the vectors.
        tied: Whether the encoder shares the code vectors.
        storage: How code vectors are stored, as `AdaCompConfig.codebook_dtype`.
    """

    encoder_scale: Tensor
    kept_buffers = ("encoder_scale",)  # the smaller vectors are, the larger is it: float16 would overflow

    def __init__(
        self,
        length: int,
        dim: int,
        *,
        tied: bool,
        storage: str,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.length, self.dim, self.tied, self.storage = length, dim, tied, storage
        self.integer_bits = INTEGER_BITS.get(storage)
        self.packed = False
        self._kept: tuple[torch_compat.Snapshot, StoredBook] | None = None
        self.rate = min(1.0, (2 / length) ** 0.5)
        options: dict[str, Any] = {"device": device, "dtype": dtype}
        self.weight = nn.Parameter(torch.randn(length, dim, **options) / length**0.5 / self.rate)
        self.bias = nn.Parameter(torch.zeros(dim, **options))
        self.encoder_bias = nn.Parameter(torch.zeros(length, **options))
        self.register_buffer("encoder_scale", torch.ones(1, dtype=torch.float32, device=device))
        if not tied:
            self.encoder_weight = nn.Parameter(torch.randn(length, dim, **options) / dim**0.5)
        self.register_state_dict_post_hook(_store_as_decoded)  # type: ignore[no-untyped-call]  # torch's

    def stored(self) -> StoredBook:
        """The code-book as it will be stored; gradients reach `weight` (`scale` once packed as integers) and `bias`.

        Rounds or unpacks all code vectors: call it once a forward pass. Packed, in eval mode and without gradients the
        floats are kept, until training begins or a tensor is another; on the CPU alone, since to ask whether one is
        would wait for a device.
        """
        learns = self.training or torch.is_grad_enabled()
        if not self.packed or learns or torch_compat.is_traced() or self.bias.device.type != "cpu":
            self._kept = None
            return self._decoded()
        tensors = (self.weight, self.bias, self.scale if self.integer_bits else self.bias)
        kept = self._kept  # once: other threads may let go of it
        if kept is None or not kept[0].holds(tensors):
            kept = self._kept = torch_compat.Snapshot(tensors), self._decoded()
        return kept[1]

    @property
    def kept_bytes(self) -> int:
        """Bytes of the float code vectors that are kept now."""
        kept = self._kept
        return 0 if kept is None else kept[1].vectors.nbytes

    def moved(self) -> None:
        """Floats that were kept are let go."""
        self._kept = None

    def train(self, mode: bool = True) -> BinaryCodebook:
        """As in `nn.Module`; floats that were kept are let go."""
        self._kept = None
        super().train(mode)
        return self

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_kept": None}  # copies and files are without

    def _decoded(self) -> StoredBook:
        if self.packed and self.integer_bits:
            dtype = self.scale.dtype
            whole = self.integer_bits == 8
            integers = self.weight.to(dtype) if whole else unpack_nibbles(self.weight, self.dim, dtype)
            return StoredBook(integers.mul_(self.scales), self.bias)  # in place: one float copy of the book, not two
        vectors: Tensor = self.rate * self.weight
        vectors = straight_through(vectors, round_vectors(vectors.detach(), self.storage))
        if self.integer_bits:  # the bias keeps the dtype of the model
            return StoredBook(vectors, self.bias)
        return StoredBook(vectors, straight_through(self.bias, round_vectors(self.bias.detach(), self.storage)))

    @property
    def scales(self) -> Tensor:
        """Of packed integers: what each is multiplied by, (L, 1)."""
        scales: Tensor = self.rate * self.scale
        return scales

    def encoder(self, stored: StoredBook, metric: Tensor) -> Encoder:
        """The encoder for this state of the code-book, which looks for bits near a vector in a metric (d, d)."""
        dtype = torch.promote_types(metric.dtype, torch.float32)
        with torch.no_grad(), torch.autocast(metric.device.type, enabled=False):
            vectors = stored.vectors.to(dtype)
            readers = self.encoder_scale.to(dtype) * vectors @ metric.to(dtype)
            tied = Encoder.tied(readers, vectors, stored.bias.to(dtype))
        shift = self.encoder_bias.to(dtype)
        if self.tied:
            return tied._replace(shift=shift + tied.shift)
        return tied._replace(weight=self.encoder_weight.to(dtype), shift=shift)

    @torch.no_grad()
    def reconstruct(self, x: Tensor, metric: Tensor, length: int | None = None) -> Tensor:
        """The vectors x (N, d) encoded and decoded again, without gradients, in blocks of bounded memory."""
        stored = self.stored()
        encoder = self.encoder(stored, metric)
        return torch.cat([stored.decode(encoder.encode(rows, length)) for rows in x.split(self.block)])

    @property
    def block(self) -> int:
        """Rows to process at once; a multiple of 8, so that blocks of packed codes end at a byte."""
        return 8 * max(1, BITS_PER_BLOCK // (8 * max(self.length, self.dim)))

    @torch.no_grad()
    def take_over(self, vectors: Tensor, bias: Tensor) -> None:
        """Take over code vectors, (L, d), and bias, (d,); ValueError if they are too large for how they are stored."""
        kinds = {self.weight.dtype, FLOAT_DTYPES.get(self.storage, self.weight.dtype)}
        most = min(torch.finfo(kind).max for kind in kinds)
        largest = float(torch.cat([2 / self.rate * vectors, bias[None]]).abs().max())
        if not largest <= most:
            raise ValueError(
                f"the code-book of this table needs numbers up to {largest:g}, and codebook_dtype={self.storage!r} in "
                f"a model of {self.weight.dtype} holds {most:g}: rescale the table, or compress it in float32 with "
                "codebook_dtype='int8'"
            )
        self.weight.copy_(vectors / self.rate)
        self.bias.copy_(bias)

    def orthogonality(self) -> Tensor:
        """`|C C^T / s - I|^2 / L`, s the mean squared norm of the code vectors: 0 when they are orthonormal."""
        weight = self.weight.to(torch.promote_types(self.weight.dtype, torch.float32))
        gram = weight @ weight.T
        gram = gram / gram.diagonal().mean().clamp_min(torch.finfo(gram.dtype).tiny)
        return (gram - torch.eye(self.length, dtype=gram.dtype, device=gram.device)).square().sum() / self.length

    def pack(self) -> None:
        """Drop the encoder; with integer storage replace the float code vectors by integers with trainable scales."""
        vectors, rate = self.rate * self.weight.data, self.packed_rate
        if self.integer_bits:
            integers, scale = quantize_rows(vectors, self.integer_bits)
            learned = nn.Parameter(scale / rate, self.weight.requires_grad)
            stored = integers if self.integer_bits == 8 else pack_nibbles(integers)
            # Nothing fails from here on: an interrupted `pack` can be called again.
            del self.weight
            self.register_buffer("weight", stored)
            self.scale = learned
        else:
            self.weight.data = vectors / rate
        del self.encoder_bias, self.encoder_scale
        if not self.tied:
            del self.encoder_weight
        self.rate, self.packed = rate, True

    @torch.no_grad()
    def divide_by_rate(self) -> None:
        """Take over what files before `format_version` 4 hold, where rate was 1."""
        getattr(self, self.learned).div_(self.rate)

    def stored_bytes(self) -> int:
        """Bytes of the packed code-book in a file."""
        return codebook_bytes(self.length, self.dim, self.storage, self.bias.dtype)

    @property
    def packed_rate(self) -> float:
        """The rate of a packed code-book; those that were packed before `format_version` 4 have 1."""
        return packed_rate(self.length, self.storage)

    @property
    def learned(self) -> str:
        """Name of what the rate multiplies, once packed."""
        return "scale" if self.integer_bits else "weight"

    def extra_repr(self) -> str:
        return f"{self.length}, {self.dim}, tied={self.tied}, storage={self.storage!r}"


def _store_as_decoded(book: BinaryCodebook, state: dict[str, Any], prefix: str, _: dict[str, Any]) -> None:
    """Write a float code-book in the dtype that decoding sees, while the parameters keep the model's to train on."""
    # A skeleton on the meta device is not saved but asked for the dtypes to load into.
    if book.packed and book.integer_bits is None and not book.bias.is_meta:
        dtype = FLOAT_DTYPES[book.storage]
        for name, rate in (("weight", book.rate), ("bias", 1.0)):
            if state[prefix + name].dtype != dtype:
                state[prefix + name] = (rate * state[prefix + name]).to(dtype) / rate
