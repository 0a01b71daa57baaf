"""The output head that is tied to a compressed table."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .. import torch_compat
from ..codes.bits import NO_BYTE, centred_bits, whole_bytes
from ..codes.packed import PackedCodes
from .decoding import Decoder, SourceVectors
from .embedding import NOT_COMPILED, AdaptiveCompressedEmbedding
from .sharing import Borrower, Place

UNPACKED_BITS = 1 << 20
"""Bits of the codes that the head unpacks at once (as float32: 4 MB): the C library hands pages of larger blocks back
to the system each time, which took half of the time of a token."""


def scores(decoder: Decoder, hidden: Tensor, tokens: Tensor) -> Tensor:
    """Logits of some tokens but for the bias of the head, (..., d), (N,) -> (..., N)."""
    return F.linear(hidden, decoder.vectors(tokens).to(hidden.dtype))


class Scores(torch.autograd.Function):
    """`scores` of all tokens, whose blocks are made anew on the way back.

    All are written into one tensor: kept one by one, between what was made for them and freed, they would keep the
    heap of the C library from giving any of that back.
    """

    @staticmethod
    def forward(ctx: Any, decoder: Decoder, hidden: Tensor, *parameters: Tensor) -> Tensor:
        ctx.decoder, ctx.parameters = decoder, parameters
        ctx.save_for_backward(hidden)
        logits = hidden.new_empty(*hidden.shape[:-1], decoder.num_tokens)
        with torch.set_grad_enabled(any(ctx.needs_input_grad)):  # what the decoder makes once, it makes for both ways
            for block in decoder.blocks():
                logits[..., block] = scores(decoder, hidden, block).detach()
        return logits

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (hidden,) = ctx.saved_tensors
        rows, gradient = (tensor.reshape(-1, tensor.shape[-1]) for tensor in (hidden, gradients[0]))
        to_rows = torch.zeros(rows.shape, dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)

        def at_vectors(block: Tensor, vectors: Tensor) -> Tensor:
            part = gradient[:, block]
            to_rows.add_(part @ vectors.to(part.dtype))
            to_vectors: Tensor = part.T @ rows
            return to_vectors.to(vectors.dtype)

        found = ctx.decoder.gradients(ctx.parameters, at_vectors)
        return None, to_rows.to(hidden.dtype).view(hidden.shape), *found


class CompressedHead(Borrower):
    """An output head that is tied to a compressed table: logits from the same codes and code-book.

        logit_w = h . xhat_w = sum_{i < L_w} s_i (C h)_i + c . h        for the centred bits s of w

    For a few positions, as in generation, `C h` is computed once for each, and its sums over all values of a byte of
    a code are looked up byte by byte (asymmetric distance computation; Jegou, Douze, Schmid 2011). From d positions
    on it is cheaper to decode the vectors of a block of tokens for all of them. The dense table is never made: codes
    are unpacked in small blocks, which together with one reordered copy of the logits is all the memory that it takes.

    While lengths are learned a token's vector is the Gumbel-softmax mixture of all lengths, as in the embedding.

    Args:
        owner: The compressed table, (V, d), or where it stands.
        bias: Of the head that this one replaces, (V,), or None.
    """

    def __init__(self, owner: AdaptiveCompressedEmbedding | Place, bias: nn.Parameter | None = None) -> None:
        super().__init__(owner)
        self.in_features = self.embedding.embedding_dim
        self.bias = bias

    @property
    def out_features(self) -> int:
        """V, of the table as it is now."""
        return self.embedding.num_embeddings

    @out_features.setter
    def out_features(self, tokens: int) -> None:
        if tokens != self.out_features:  # transformers sets what is there when it ties weights
            raise ValueError(f"a compressed head has as many outputs as its table, {self.out_features}; got {tokens}")

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits of hidden states, (..., d) -> (..., V)."""
        table = self.embedding
        table.refuse_offloaded(hidden)
        hidden = hidden.to(table.device)  # a model that is spread over devices may have them on another
        if table.training_state is None:
            logits = self._scored(table.hard_decoder(), hidden)
        else:
            logits = self._score_in_training(hidden)
        return logits if self.bias is None else logits + self.bias.to(logits.device)

    @torch.compiler.disable(reason=NOT_COMPILED)  # type: ignore[untyped-decorator]  # torch's
    def _score_in_training(self, hidden: Tensor) -> Tensor:
        table = self.embedding
        generates = self.training and not torch.is_grad_enabled() and self._is_few(hidden)
        if generates and table.phase != "observe":
            # Decoded once for all tokens of a text. Eval mode sums as packed tables do.
            with torch.autocast(hidden.device.type, enabled=False):
                return F.linear(hidden.float(), table.weight_values().float()).to(hidden.dtype)
        decoder = table.decoder()
        if isinstance(decoder, SourceVectors):
            return decoder.score(hidden)
        score = self._many if self.training else self._scored  # bits have gradients while they are learned
        return score(decoder, hidden)

    def _scored(self, decoder: Decoder, hidden: Tensor) -> Tensor:
        # An exported graph serves any number of positions.
        if not torch.compiler.is_exporting() and not self._is_few(hidden):
            return self._many(decoder, hidden)
        with torch.autocast(hidden.device.type, enabled=False):  # sums in half precision would lose bits
            return self._few(decoder, hidden)

    def _is_few(self, hidden: Tensor) -> bool:
        return hidden.shape[:-1].numel() < self.in_features

    def _many(self, decoder: Decoder, hidden: Tensor) -> Tensor:
        if torch_compat.is_traced():
            return torch.cat([scores(decoder, hidden, block) for block in decoder.blocks()], dim=-1)
        kind = hidden.device.type
        dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else hidden.dtype
        logits: Tensor = Scores.apply(  # type: ignore[no-untyped-call]  # torch's
            decoder, hidden.to(dtype), *self.embedding.parameters()
        )
        return logits

    def _few(self, decoder: Decoder, hidden: Tensor) -> Tensor:
        rows = hidden.reshape(-1, self.in_features).float()
        codes, book = decoder.codes, decoder.book
        bit_scores = F.linear(book.vectors.float(), rows)
        bias = (rows @ book.bias.float())[None]  # quantizers of exported graphs trip over two transposed rows
        # Scores of all values of each byte of a code, one table a byte.
        whole = max([0, *(length // 8 for length in codes.ladder if length % 8 == 0)])
        columns = bit_scores.shape[1]
        tables = codes.octets[:NO_BYTE] @ bit_scores[: 8 * whole].reshape(whole, 8, columns)
        tables = tables.reshape(NO_BYTE * whole, columns)
        by_length = [
            self._sums(codes.group(k), tokens, length, bit_scores, tables) + bias
            for k, (length, tokens) in enumerate(zip(codes.ladder, codes.tokens_per_length, strict=True))
            if tokens
        ]
        by_group = torch.cat(by_length)
        if torch_compat.is_traced() and isinstance(codes, PackedCodes):
            logits = by_group.index_select(0, codes.places())
        else:
            logits = torch.zeros_like(by_group).index_copy(0, codes.order(), by_group)
        if decoder.zero_token is not None:
            logits[decoder.zero_token] = 0
        return logits.T.reshape(*hidden.shape[:-1], self.out_features).to(hidden.dtype)

    def _sums(self, codes: Tensor, tokens: int, length: int, bit_scores: Tensor, tables: Tensor) -> Tensor:
        """Logits of a group of codes but for the bias, (tokens, N), from scores of bits (L, N) and of bytes."""
        step = max(1, UNPACKED_BITS // length)
        if length % 8:
            starts = torch.arange(0, tokens * length, length, device=bit_scores.device)
            bits = (
                centred_bits(codes, part, torch.full_like(part, length), length, None) for part in starts.split(step)
            )
            sums = [block @ bit_scores[:length] for block in bits]
        else:
            first = torch.arange(length // 8, device=bit_scores.device, dtype=torch.int32) * NO_BYTE
            blocks = (block.to(torch.int32).add_(first) for block in whole_bytes(codes, length).split(step))
            # A third faster for the one position of generation.
            if tables.shape[1] == 1 and not torch_compat.is_traced():
                sums = [
                    tables.view(-1).index_select(0, block.view(-1)).view(block.shape).sum(1, keepdim=True)
                    for block in blocks
                ]
            else:
                sums = [F.embedding_bag(block, tables, mode="sum") for block in blocks]
        return torch.cat(sums)

    def extra_repr(self) -> str:
        return f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}"
