"""`AdaptiveCompressedEmbedding`: the drop-in for `nn.Embedding`, in three phases."""

from __future__ import annotations

import logging
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .codebook import BinaryCodebook
from .coded_table import CodedTable, distinct, inverse
from .coder import TokenCoder
from .config import AUTO, AdaCompConfig
from .layout import tensor_checksum
from .length_choice import choose_code_lengths
from .packed_codes import PackedCodes
from .regularization import add_gradients, finite_gradients, orthogonality, relative_error, sample_tokens
from .source import checked_scale, checked_source, dense_embedding
from .token_counts import checked_counts
from .warm_start import warm_start

logger = logging.getLogger(__name__)


class AdaptiveCompressedEmbedding(CodedTable):
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
        self.code_bits()  # refuse an impossible size here rather than at the warm start

    def _build(
        self, source: Tensor, config: AdaCompConfig, padding_idx: int | None, token_counts: Tensor | None = None
    ) -> None:
        if config.code_lengths == AUTO:
            counts = torch.zeros(len(source)) if token_counts is None else checked_counts(token_counts, len(source))
            config = config.with_lengths(choose_code_lengths(source, counts, config))
        self.num_embeddings, self.embedding_dim = source.shape
        self.padding_idx, self.config = padding_idx, config
        self.scale, self.dense_class = 1.0, nn.Embedding
        self.zero_padding = padding_idx is not None and (source.is_meta or not source[padding_idx].any())
        self.codebooks = nn.ModuleList(
            BinaryCodebook(
                length,
                self.embedding_dim,
                tied=config.tied,
                storage=config.codebook_dtype,
                device=source.device,
                dtype=source.dtype,
            )
            for length in config.lengths
        )
        self.coder: TokenCoder | None = TokenCoder(source, config)
        self.packed: PackedCodes | None = None
        self.abandoned = False  # whether training ended before the lengths were frozen
        self.diverged = False  # whether the task's last gradients were NaN or Inf
        self.loading = False  # whether weights are on their way in and have not been checked yet

    @classmethod
    def _of(cls, source: Tensor, *settings: Any) -> AdaptiveCompressedEmbedding:
        """A module for a table that exists: the constructor makes one of its own."""
        module = cls.__new__(cls)
        nn.Module.__init__(module)
        module._build(source, *settings)
        return module

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding, config: AdaCompConfig, token_counts: Tensor | None = None
    ) -> AdaptiveCompressedEmbedding:
        """Compress a plain or scaled `nn.Embedding`; with `token_counts` (V,) the warm start runs at once.

        The source table is shared, not copied, until `pack` lets go of it. Raises as `checked_source` does.
        """
        source = checked_source(embedding)
        module = cls._of(source, config, embedding.padding_idx, token_counts)
        module.code_bits()  # refuse an impossible size here rather than at the warm start
        module.scale, module.dense_class = checked_scale(embedding), type(embedding)
        module.train(embedding.training)
        if token_counts is not None:
            module.warm_start(token_counts)
        return module

    @classmethod
    def from_layout(
        cls, layout: dict[str, Any], config: AdaCompConfig, dtype: torch.dtype | None = None
    ) -> AdaptiveCompressedEmbedding:
        """An empty module on the meta device with the tensors that `layout` describes, ready to be loaded into."""
        config = config.with_lengths(layout["code_lengths"])
        source = torch.empty(layout["num_embeddings"], layout["embedding_dim"], device="meta", dtype=dtype)
        module = cls._of(source, config, layout["padding_idx"])
        module.zero_padding, module.scale = layout["zero_padding"], layout["scale"]
        if layout["tokens_per_length"] is not None:
            packed = PackedCodes(module.num_embeddings, config.lengths, layout["tokens_per_length"], device="meta")
            module._become_packed(packed)
        return module

    def layout(self) -> dict[str, Any]:
        """What `from_layout` needs to rebuild the shapes, JSON-ready."""
        return {
            "num_embeddings": self.num_embeddings,
            "embedding_dim": self.embedding_dim,
            "padding_idx": self.padding_idx,
            "code_lengths": list(self.config.lengths),
            "zero_padding": self.zero_padding,
            "scale": self.scale,
            "tokens_per_length": list(self.packed.tokens_per_length) if self.packed else None,
            "tensor_checksums": self.checksums(),
        }

    def checksums(self) -> dict[str, int]:
        """Checksums of the tensors that packing fixed for good, by name: codes, lengths, integer code vectors."""
        if self.coder is not None:
            return {}
        stored = self.state_dict()
        return {name: tensor_checksum(stored[name]) for name in stored if not stored[name].is_floating_point()}

    # Training

    @property
    def phase(self) -> str:
        """`"select"`, `"encode"` or `"packed"`."""
        return "packed" if self.coder is None else self.coder.phase

    @property
    def temperature(self) -> float:
        """Gumbel-softmax temperature at the current training progress; 0 once the lengths are frozen."""
        return self.coder.temperature if self.coder is not None and self.coder.phase == "select" else 0.0

    def warm_start(
        self, token_counts: Tensor | None = None, metric: Tensor | None = None, show_progress: bool = True
    ) -> None:
        """Fit code-books and selection to the source table.

        Args:
            token_counts: Occurrences of each token in the training data, (V,), by which tokens weigh.
            metric: What errors are measured in, (d, d), from here on: `hf_adacomp.significance.task_metrics`.
            show_progress: Whether to draw a progress bar.

        Raises:
            ValueError: For counts or a metric that cannot be.
        """
        coder = self.require_coder("warm_start")
        if token_counts is not None:
            coder.set_counts(token_counts)
        if metric is not None:
            coder.set_metric(metric)
        bits, seed = self.code_bits(), self.config.seed
        cost = warm_start(list(self.books()), coder.source, coder.token_counts, coder.metric, bits, seed, show_progress)
        coder.start(cost, bits)

    def step(self, fraction: float) -> None:
        """Tell the module how far training is, between `backward()` and `optimizer.step()`.

        Sets temperature and price, freezes the lengths at `config.select_fraction`, and adds the gradients of the
        regularisers. Once packed it does nothing. Gradients that are NaN or Inf, as the loss was, are dropped with a
        warning.

        Args:
            fraction: Optimizer steps done over all steps, 0..1.
        """
        if not 0 <= fraction <= 1:
            raise ValueError(f"fraction is the share of training that is done, between 0 and 1; got {fraction!r}")
        if self.coder is None:
            return
        self.ensure_warm()
        self._leave_out_broken_gradients(fraction)
        self.coder.advance(fraction, self.code_bits())
        settings, source = self.config, self.coder.source
        loss = source.new_zeros(())
        if settings.orthogonality_weight:
            loss = loss + settings.orthogonality_weight * orthogonality(self.books())
        if settings.reconstruction_weight:
            tokens = sample_tokens(self.coder.token_counts, settings.seed, int(self.coder.progress)).to(source.device)
            loss = loss + settings.reconstruction_weight * relative_error(
                self.decode(tokens), source[tokens], self.coder.metric
            )
        if loss.requires_grad:
            add_gradients(loss, self.codebooks.parameters())

    def _leave_out_broken_gradients(self, fraction: float) -> None:
        finite = finite_gradients(self.parameters())
        if not finite:
            self.zero_grad()  # to None: an optimizer passes over what has no gradient
            if not self.diverged:
                logger.warning(
                    "the gradients of the loss are NaN or Inf after %.2f %% of training: they are left out for the "
                    "compressed table, which stays as it is. If the loss stays so, lower the learning rate",
                    100 * fraction,
                )
        self.diverged = not finite

    def freeze_lengths(self) -> None:
        """Freeze each token's most likely code length at the stated size. Afterwards only codes are learned."""
        coder = self.require_coder("freeze_lengths")
        self.ensure_warm()
        coder.freeze(self.code_bits())

    @torch.no_grad()
    def pack(self) -> None:
        """Store the bits of every token and drop the encoders, the selector and the source table."""
        if self.coder is None:
            return
        self.freeze_lengths()
        codes = torch.cat([self.group(k) for k in range(len(self.codebooks))])
        self._become_packed(PackedCodes.of(self.assignment(), self.config.lengths, codes))

    def resize(self, kept: int, new_codes: Tensor) -> None:
        """Keep the first tokens of a packed table and append some with these codes of the longest length, (N, L)."""
        self.packed = self.require_packed().resized(kept, new_codes)
        self.num_embeddings = self.packed.num_tokens

    def _become_packed(self, packed: PackedCodes) -> None:
        for book in self.books():
            book.pack()
        self.coder, self.packed = None, packed

    # What is computed

    def forward(self, input: Tensor) -> Tensor:
        """Vectors of the ids, int32 or int64 of any shape -> (..., d)."""
        if input.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(f"embedding ids must be int32 or int64, as for nn.Embedding; got {input.dtype}")
        if torch.compiler.is_compiling():  # shapes must not depend on values
            ids = input.to(torch.int64).flatten()
            return self._finish(ids, self.vectors(ids)).view(*input.shape, self.embedding_dim)
        if input.device.type == "cpu" and input.numel() and not 0 <= input.min() <= input.max() < self.num_embeddings:
            raise IndexError(
                f"token id out of range: ids run from {int(input.min())} to {int(input.max())}, the table has "
                f"{self.num_embeddings} rows"
            )
        self.ensure_warm()
        tokens, place = distinct(input.to(torch.int64), self.num_embeddings)
        if self.mixes:
            vectors = self.mixture(tokens)
        else:
            order, vectors = self.decode_by_length(tokens)
            tokens, place = tokens[order], inverse(order)[place]
        return F.embedding(place, self._finish(tokens, vectors))

    def _finish(self, tokens: Tensor, vectors: Tensor) -> Tensor:
        """What `forward` makes of decoded vectors: the padding's are zero, all are scaled."""
        vectors = self._without_padding(tokens, vectors)
        return vectors if self.scale == 1 else vectors * self.scale

    def _without_padding(self, tokens: Tensor, vectors: Tensor) -> Tensor:
        if not self.zero_padding:
            return vectors
        return vectors.masked_fill(tokens.eq(self.padding_idx or 0)[:, None], 0)

    def train(self, mode: bool = True) -> AdaptiveCompressedEmbedding:
        """As in `nn.Module`; entering eval mode settles the hard lengths of the moment."""
        super().train(mode)
        if not mode and self.coder is not None and not self.loading and self.coder.warm:
            self.coder.settle(self.code_bits())
        return self

    # Questions

    def source_table(self) -> Tensor:
        """The table that is compressed, (V, d); only until it is packed."""
        return self.require_coder("source_table").source.detach()

    def token_counts(self) -> Tensor:
        """Occurrences of each token in the training data, (V,); only until it is packed."""
        return self.require_coder("token_counts").token_counts

    def code_lengths(self) -> Tensor:
        """Bits of each token's code, (V,) int64, as they would be packed now."""
        self.ensure_warm()
        coder = self.coder
        assignment = self.assignment() if coder is None else coder.hard_assignment(self.code_bits())[0]
        return torch.tensor(self.config.lengths, device=assignment.device)[assignment.to(torch.int64)]

    @torch.no_grad()
    def codes(self, token_id: int) -> tuple[int, ...]:
        """Indices of the code vectors whose sum (plus the bias) is the token's vector."""
        if not 0 <= token_id < self.num_embeddings:
            raise IndexError(f"token id {token_id} is out of range for a table of {self.num_embeddings} rows")
        k = self.config.lengths.index(int(self.code_lengths()[token_id]))
        _, place = self.locate(torch.tensor([token_id], device=self.book(0).bias.device))
        return tuple(self.bits(k, place)[0].nonzero().squeeze(1).tolist())

    @torch.no_grad()
    def to_embedding(self) -> nn.Embedding:
        """A dense embedding of the class that this one replaced, with the decoded table."""
        was_training = self.training
        self.eval()
        self.ensure_warm()
        blocks = torch.arange(self.num_embeddings, device=self.book(0).bias.device).split(self.book(0).block)
        weight = torch.cat([self._without_padding(block, self.decode(block)) for block in blocks])
        self.train(was_training)
        return dense_embedding(weight, self.padding_idx, self.scale, self.dense_class).train(was_training)

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, phase={self.phase!r}, "
            f"code_lengths={self.config.lengths}, target_ratio={self.config.target_ratio:g}"
        )

    def restore_constants(self) -> None:
        """Mark the constants as such again after transformers loaded them as trainable parameters."""
        if self.coder is not None:
            self.coder.restore_constants()
            for book in self.books():
                book.restore_constants()

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *args: Any) -> None:
        stored_packed = f"{prefix}packed.codes" in state_dict
        if any(key.startswith(prefix) for key in state_dict) and stored_packed != (self.coder is None):
            forms = ("packed", "training") if stored_packed else ("training", "packed")
            error_msgs = args[-1]
            error_msgs.append(
                f"{prefix.rstrip('.')}: the checkpoint holds the {forms[0]} form of the compressed table, the model is "
                f"in its {forms[1]} form; load the checkpoint with from_pretrained instead"
            )
            return
        super()._load_from_state_dict(state_dict, prefix, *args)

    # Helpers

    @property
    def cold(self) -> bool:
        """Whether there is a warm start to come."""
        return self.coder is not None and not self.coder.warm

    def ensure_warm(self) -> None:
        """Fit the code-books without token counts if nobody did it with them."""
        if self.cold:
            logger.warning(
                "AdaptiveCompressedEmbedding is used before its warm start: fitting without token counts. Pass "
                "token_counts to compress(), or train with AdaCompCallback(), which counts the training data"
            )
            self.warm_start()
