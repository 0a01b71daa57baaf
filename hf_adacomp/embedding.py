"""`AdaptiveCompressedEmbedding`: the drop-in for `nn.Embedding`, in three phases."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from . import packing
from .codebook import BITS_PER_BLOCK, BinaryCodebook
from .config import AdaCompConfig
from .packed_codes import PackedCodes
from .schedule import phase_at, temperature_at
from .selection import LengthSelector
from .warm_start import token_weights, warm_start

logger = logging.getLogger(__name__)

COLD, SELECT, ENCODE = range(3)
"""Values of the `stage` buffer: before the warm start, lengths being learned, lengths frozen."""

PROGRESS_UNIT = 10**9
"""`progress` counts training in billionths: an integer survives casts of the model, and so does the schedule."""

REGULARIZED_TOKENS = 1024
"""Tokens sampled for the reconstruction term of one optimizer step."""


class AdaptiveCompressedEmbedding(nn.Module):
    """Embeddings as sums of code vectors chosen by binary codes, each token with a code length of its own.

        select   lengths are learned: e_w = sum_k p_{w,k} xhat_{w,k}, p_w a Gumbel-softmax sample
        encode   lengths are frozen:  e_w = xhat_{w,k*}; codes and code-books go on learning
        packed   bits are stored; encoders, selector and source table are gone

    In eval mode the module computes, in every phase, what it would compute if it were packed at that moment: hard
    lengths that meet `config.target_ratio`, hard bits, code vectors as stored.

    Takes and refuses the same inputs as `nn.Embedding`: integer ids of any shape, `IndexError` out of range. The row of
    `padding_idx` is zero if the source's was.

    Args:
        num_embeddings: Number of tokens V.
        embedding_dim: Width d.
        config: The settings.
        padding_idx: As in `nn.Embedding`; may be negative.
        device: Of the parameters.
        dtype: Of the parameters.

    Raises:
        ValueError: If the code-books alone exceed `config.target_ratio`; the message gives the largest that fits.
    """

    weight: nn.Parameter
    assignment: Tensor
    stage: Tensor
    progress: Tensor

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        config: AdaCompConfig,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        source = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
        self._build(source.weight.data, config, source.padding_idx)

    def _build(self, weight: Tensor, config: AdaCompConfig, padding_idx: int | None) -> None:
        self.num_embeddings, self.embedding_dim = weight.shape
        self.padding_idx, self.config = padding_idx, config
        self.zero_padding = padding_idx is not None and (weight.is_meta or not weight[padding_idx].any())
        # Parameters without gradient rather than buffers: DDP broadcasts buffers on every forward pass.
        self.weight = nn.Parameter(weight, requires_grad=False)
        options: dict[str, Any] = {"device": weight.device}
        self.token_counts = nn.Parameter(
            torch.zeros(self.num_embeddings, dtype=torch.int64, **options), requires_grad=False
        )
        self.codebooks = nn.ModuleList(
            BinaryCodebook(
                length,
                self.embedding_dim,
                tied=config.tied,
                storage_dtype=config.storage_dtype,
                dtype=weight.dtype,
                **options,
            )
            for length in config.code_lengths
        )
        self.selector = LengthSelector(
            self.num_embeddings, config.code_lengths, config.selection_gain, dtype=weight.dtype, **options
        )
        self.register_buffer("assignment", torch.zeros(self.num_embeddings, dtype=torch.uint8, **options))
        self.register_buffer("stage", torch.tensor(COLD, dtype=torch.uint8, **options))
        self.register_buffer("progress", torch.tensor(-1, dtype=torch.int64, **options))
        self.packed: PackedCodes | None = None
        self.abandoned = False
        self.code_bits()  # refuse an impossible size here rather than at the warm start

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, config: AdaCompConfig, token_counts: Tensor | None = None
    ) -> AdaptiveCompressedEmbedding:
        """Compress a plain `nn.Embedding`; with `token_counts` (V,) the warm start runs at once.

        The source table is shared, not copied, until `pack` lets go of it.

        Raises:
            ValueError: For a subclass with its own `forward`, `sparse`, `max_norm`, or NaN or Inf in the table.
        """
        if type(embedding) is not nn.Embedding:
            raise ValueError(
                f"cannot compress {type(embedding).__name__}: only nn.Embedding itself is understood, because a "
                "subclass may compute something else in forward"
            )
        if embedding.sparse or embedding.max_norm is not None:
            raise ValueError(
                f"cannot compress an nn.Embedding with sparse={embedding.sparse} and max_norm={embedding.max_norm}: "
                "set sparse=False and max_norm=None first"
            )
        weight = embedding.weight.detach()
        if not weight.is_meta and not torch.isfinite(weight).all():
            bad = int((~torch.isfinite(weight)).any(dim=1).nonzero()[0])
            raise ValueError(f"the source table holds NaN or Inf, first in the row of token {bad}: repair it first")
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._build(weight, config, embedding.padding_idx)
        module.train(embedding.training)
        if token_counts is not None:
            module.warm_start(token_counts)
        return module

    @classmethod
    def from_layout(
        cls, layout: dict[str, Any], config: AdaCompConfig, dtype: torch.dtype | None = None
    ) -> AdaptiveCompressedEmbedding:
        """An empty module on the meta device with the tensors that `layout` describes, ready to be loaded into."""
        module = cls(
            layout["num_embeddings"], layout["embedding_dim"], config, layout["padding_idx"], device="meta", dtype=dtype
        )
        module.zero_padding = layout["zero_padding"]
        if layout["tokens_per_length"] is not None:
            packed = PackedCodes(
                module.num_embeddings, config.code_lengths, layout["tokens_per_length"], device="meta"
            )
            module._become_packed(packed)
        return module

    def layout(self) -> dict[str, Any]:
        """What `from_layout` needs to rebuild the shapes, JSON-ready."""
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "padding_idx": self.padding_idx,
            "zero_padding": self.zero_padding,
            "tokens_per_length": list(self.packed.tokens_per_length) if self.packed else None,
        }

    # Training state

    @property
    def phase(self) -> str:
        """`"select"`, `"encode"` or `"packed"`."""
        if self.packed is not None:
            return "packed"
        return "encode" if self.stage == ENCODE else "select"

    @property
    def temperature(self) -> float:
        """Gumbel-softmax temperature of the current training progress; 0 once lengths are frozen."""
        if self.phase != "select":
            return 0.0
        settings = self.config
        return temperature_at(
            max(0, int(self.progress)) / PROGRESS_UNIT,
            settings.temperature_start,
            settings.temperature_end,
            settings.select_fraction,
            settings.anneal,
        )

    @property
    def driven(self) -> bool:
        """Whether `step` has ever been called, by `AdaCompCallback` or a training loop."""
        return self.packed is not None or int(self.progress) >= 0

    @property
    def warm(self) -> bool:
        """Whether code-books hold a fit of the source table."""
        return self.packed is not None or self.stage != COLD

    def warm_start(self, token_counts: Tensor | None = None, show_progress: bool = True) -> None:
        """Fit code-books and selection costs to the source table, weighted by token counts (V,) if given."""
        self._require_unpacked("warm_start")
        if token_counts is not None:
            self.token_counts.copy_(_checked_counts(token_counts, self.num_embeddings))
        cost = warm_start(
            list(self.books()), self.weight, self.token_counts, self.code_bits(), self.config.seed, show_progress
        )
        self.selector.set_cost(cost, self.code_bits())
        self.stage.fill_(SELECT)
        self._solve()

    def step(self, fraction: float) -> None:
        """Tell the module how far training is, between `backward()` and `optimizer.step()`.

        Sets temperature and price, freezes the lengths at `config.select_fraction`, and adds the gradients of the
        regularisers. Once packed it does nothing.

        Args:
            fraction: Optimizer steps done over all steps, 0..1.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction is the share of training that is done, between 0 and 1; got {fraction!r}")
        if self.packed is not None:
            return
        self._ensure_warm()
        self.progress.fill_(round(fraction * PROGRESS_UNIT))
        if self.phase == "select":
            self.selector.price.fill_(self._solve())
            if phase_at(int(self.progress) / PROGRESS_UNIT, self.config.select_fraction) == "encode":
                self.stage.fill_(ENCODE)
        self._add_regularizer_gradients()

    def freeze_lengths(self) -> None:
        """Freeze each token's most likely code length at the stated size. Afterwards only codes are learned."""
        self._require_unpacked("freeze_lengths")
        self._ensure_warm()
        if self.phase == "select":
            self._solve()
            self.stage.fill_(ENCODE)

    @torch.no_grad()
    def pack(self) -> None:
        """Store the bits of every token and drop the encoders, the selector and the source table."""
        if self.packed is not None:
            return
        self.freeze_lengths()
        assignment = self.assignment
        members = [(assignment == k).nonzero().squeeze(1) for k in range(len(self.codebooks))]
        packed = PackedCodes(
            self.num_embeddings, self.config.code_lengths, [len(m) for m in members], device=assignment.device
        )
        packed.lengths.copy_(packing.pack_lengths(assignment, len(self.codebooks)))
        packed.codes.copy_(packing.pack_codes([self._encoded(k, tokens) for k, tokens in enumerate(members)]))
        self._become_packed(packed)

    def _encoded(self, k: int, tokens: Tensor) -> Iterator[Tensor]:
        block = 8 * max(1, BITS_PER_BLOCK // (8 * self.config.code_lengths[k]))
        return (self.codebooks[k].encode(self.weight[rows]) for rows in tokens.split(block) if len(rows))

    def _become_packed(self, packed: PackedCodes) -> None:
        for name in ("weight", "token_counts", "selector", "assignment", "stage", "progress"):
            delattr(self, name)
        for book in self.books():
            book.pack()
        self.packed = packed

    # What is computed

    def forward(self, input: Tensor) -> Tensor:
        """Vectors of the ids, int32 or int64 of any shape -> (..., d)."""
        if input.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(f"embedding ids must be int32 or int64, as for nn.Embedding; got {input.dtype}")
        if input.device.type == "cpu" and input.numel() and not 0 <= input.min() <= input.max() < self.num_embeddings:
            raise IndexError(
                f"token id out of range: ids run from {int(input.min())} to {int(input.max())}, the table has "
                f"{self.num_embeddings} rows"
            )
        self._ensure_warm()
        tokens, place = torch.unique(input, return_inverse=True)
        # A bit computed in half precision could differ from the one that is packed.
        with torch.autocast(input.device.type, enabled=False):
            if self.training and self.phase == "select":
                vectors = self._mixture(tokens.to(torch.int64))
            else:
                vectors = self._decode(tokens.to(torch.int64))
        if self.zero_padding:
            vectors = vectors.masked_fill((tokens == self.padding_idx)[:, None], 0)
        return F.embedding(place, vectors)

    def _mixture(self, tokens: Tensor) -> Tensor:
        x = self.weight[tokens]
        shares = self.selector(tokens, self.temperature)
        decoded = torch.stack([book.decode(book.encode(x)) for book in self.books()], dim=1)
        return (shares[:, :, None] * decoded).sum(dim=1)

    def _decode(self, tokens: Tensor) -> Tensor:
        """Vectors of distinct tokens from their hard lengths and bits, (N,) -> (N, d)."""
        if self.packed is None:
            lengths, places = self.assignment[tokens], tokens
        else:
            lengths, places = self.packed.locate(tokens)
        vectors = torch.zeros(len(tokens), self.embedding_dim, dtype=self._books_dtype(), device=tokens.device)
        for k, book in enumerate(self.books()):
            rows = (lengths == k).nonzero().squeeze(1)
            if len(rows):
                if self.packed is None:
                    bits = book.encode(self.weight[places[rows]])
                else:
                    bits = self.packed.bits(k, places[rows]).to(vectors.dtype)
                vectors = vectors.index_copy(0, rows, book.decode(bits))
        return vectors

    def train(self, mode: bool = True) -> AdaptiveCompressedEmbedding:
        """As in `nn.Module`; entering eval mode settles the hard lengths of the moment."""
        super().train(mode)
        if not mode and self.phase == "select" and self.warm:
            self._solve()
        return self

    # What can be asked

    def code_bits(self) -> int:
        """Bits available for the codes of all tokens under `config.target_ratio`."""
        dense = self.num_embeddings * self.embedding_dim * 4
        lengths = packing.packed_bytes(self.num_embeddings * packing.index_bits(len(self.codebooks)))
        # One byte a code-book for the padding of its group.
        fixed = lengths + sum(book.stored_bytes() + 1 for book in self.books())
        bits = 8 * (int(dense / self.config.target_ratio) - fixed)
        least = self.num_embeddings * self.config.code_lengths[0]
        if bits < least:
            largest = dense / (fixed + packing.packed_bytes(least))
            raise ValueError(
                f"target_ratio={self.config.target_ratio:g} cannot be met for a table of {self.num_embeddings} x "
                f"{self.embedding_dim}: code-books and lengths take {fixed} bytes and the shortest codes "
                f"{packing.packed_bytes(least)} of the {int(dense / self.config.target_ratio)} it leaves. The largest "
                f"ratio that fits is {int(largest * 100) / 100:g}; or use fewer or shorter code_lengths than "
                f"{self.config.code_lengths}"
            )
        return bits

    def code_lengths(self) -> Tensor:
        """Bits of each token's code, (V,) int64, as they would be packed now."""
        self._ensure_warm()
        if self.packed is not None:
            assignment = self.packed.assignment()
        elif self.phase == "select":
            assignment, _ = self.selector.solve(self.code_bits())
        else:
            assignment = self.assignment
        return torch.tensor(self.config.code_lengths, device=assignment.device)[assignment.to(torch.int64)]

    @torch.no_grad()
    def codes(self, token_id: int) -> tuple[int, ...]:
        """Indices of the code vectors whose sum (plus the bias) is the token's vector."""
        if not 0 <= token_id < self.num_embeddings:
            raise IndexError(f"token id {token_id} is out of range for a table of {self.num_embeddings} rows")
        token = torch.tensor([token_id], device=self.codebooks[0].bias.device)
        k = self.config.code_lengths.index(int(self.code_lengths()[token_id]))
        if self.packed is None:
            bits = self.codebooks[k].encode(self.weight[token])
        else:
            bits = self.packed.bits(k, self.packed.locate(token)[1])
        return tuple(bits[0].nonzero().squeeze(1).tolist())

    @torch.no_grad()
    def to_embedding(self) -> nn.Embedding:
        """A plain `nn.Embedding` with the decoded table."""
        was_training = self.training
        self.eval()
        ids = torch.arange(self.num_embeddings, device=self.codebooks[0].bias.device)
        weight = torch.cat([self(block) for block in ids.split(BITS_PER_BLOCK // self.embedding_dim + 1)])
        self.train(was_training)
        embedding = nn.Embedding.from_pretrained(weight, freeze=False, padding_idx=self.padding_idx)
        return embedding.train(was_training)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, phase={self.phase!r}, "
            f"code_lengths={self.config.code_lengths}, target_ratio={self.config.target_ratio:g}"
        )

    # Saving and loading

    def after_loading(self, name: str) -> None:
        """Undo what loading did to frozen parameters and check what was loaded; `name` is for messages."""
        if self.packed is not None:
            self.packed.validate(f"{name}.packed")
        else:
            for constant in (self.weight, self.token_counts, self.selector.cost):
                constant.requires_grad_(False)
            for book in self.books():
                if book.tied:
                    book.encoder_scale.requires_grad_(False)
        for parameter_name, parameter in self.named_parameters():
            if parameter.is_floating_point() and not torch.isfinite(parameter).all():
                raise ValueError(f"{name}.{parameter_name} holds NaN or Inf: the file is damaged")

    def refuse_unfinished(self, name: str) -> None:
        """Raise ValueError where saving would silently write something else than the user expects."""
        if not self.driven:
            raise ValueError(
                f"{name} is compressed but its training schedule never ran: pass callbacks=[AdaCompCallback()] to the "
                "Trainer (or call embedding.step(fraction) in your loop), or call hf_adacomp.pack(model) to save it "
                "without training"
            )
        if self.abandoned:
            raise ValueError(
                f"{name}: training ended before the code lengths were frozen (at select_fraction="
                f"{self.config.select_fraction:g} of the steps): resume the training, or call hf_adacomp.pack(model) "
                "to freeze the lengths as they are"
            )

    # Helpers

    def books(self) -> Iterator[BinaryCodebook]:
        """The code-books, shortest first."""
        return (book for book in self.codebooks if isinstance(book, BinaryCodebook))

    def _books_dtype(self) -> torch.dtype:
        return self.codebooks[0].bias.dtype

    def _require_unpacked(self, verb: str) -> None:
        if self.packed is not None:
            raise ValueError(f"{verb} is not possible on a packed embedding: lengths and bits are fixed")

    def _ensure_warm(self) -> None:
        if not self.warm:
            logger.warning(
                "AdaptiveCompressedEmbedding is used before its warm start: fitting without token counts. Pass "
                "token_counts to compress(), or train with AdaCompCallback(), which counts the training data"
            )
            self.warm_start()

    @torch.no_grad()
    def _solve(self) -> float:
        """Settle `assignment` for the current scores and return the price."""
        assignment, price = self.selector.solve(self.code_bits())
        self.assignment.copy_(assignment)
        return price

    def _add_regularizer_gradients(self) -> None:
        """Add the gradients of orthogonality and reconstruction, once an optimizer step, outside of the loss.

        There they are right under gradient accumulation, mixed precision and any loss function. The sampled tokens
        are a function of seed and progress, so that ranks agree and a resumed run repeats them.
        """
        parameters = [p for p in self.codebooks.parameters() if p.requires_grad]
        settings = self.config
        if not parameters or settings.orthogonality_weight == settings.reconstruction_weight == 0:
            return
        loss = settings.orthogonality_weight * torch.stack([book.orthogonality() for book in self.books()]).mean()
        if settings.reconstruction_weight:
            generator = torch.Generator().manual_seed(settings.seed * 1_000_003 + int(self.progress))
            weights = token_weights(self.token_counts).cpu()
            sample = torch.multinomial(weights, REGULARIZED_TOKENS, replacement=True, generator=generator)
            tokens = sample.to(self.weight.device)
            x = self.weight[tokens]
            error = (self._decode(tokens) - x).square().sum() / x.square().sum().clamp_min(1e-12)
            loss = loss + settings.reconstruction_weight * error
        for parameter, gradient in zip(
            parameters, torch.autograd.grad(loss, parameters, allow_unused=True), strict=True
        ):
            if gradient is not None:
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, *args: Any
    ) -> None:
        ours = any(key.startswith(prefix) for key in state_dict)
        if ours and (f"{prefix}packed.codes" in state_dict) != (self.packed is not None):
            stored = "packed" if self.packed is None else "training"
            error_msgs = args[-1]
            error_msgs.append(
                f"{prefix.rstrip('.')}: the checkpoint holds the {stored} form of the compressed table, the model "
                f"is in its {'packed' if self.packed else 'training'} form; load it with from_pretrained instead"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)  # type: ignore[no-untyped-call]


def _checked_counts(token_counts: Tensor, num_embeddings: int) -> Tensor:
    counts = torch.as_tensor(token_counts)
    if counts.shape != (num_embeddings,):
        raise ValueError(f"token_counts must have shape ({num_embeddings},); got {tuple(counts.shape)}")
    if counts.is_floating_point() and not torch.isfinite(counts).all():
        raise ValueError("token_counts must be finite; got NaN or Inf")
    if (counts < 0).any():
        bad = int((counts < 0).nonzero()[0])
        raise ValueError(f"token_counts must not be negative; got {counts[bad].item()} for token {bad}")
    return counts.to(torch.int64)
