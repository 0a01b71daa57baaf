"""A table of vectors in codes: its code-book, where its bits come from, and what can be asked of it."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from .. import torch_compat
from ..codes.bits import checksum
from ..codes.codebook import BinaryCodebook
from ..codes.packed import PackedCodes
from ..config import AdaCompConfig
from ..fitting.warm_start import fit_codebook
from ..lengths.budget import code_budget
from .decoding import Decoder, SourceVectors, StaticDecoder
from .learned_codes import LearnedCodes
from .loading import check_form, seal_again, tell_units
from .reading import ReadableTable
from .training_state import TrainingState

logger = logging.getLogger(__name__)


class CodedTable(ReadableTable, nn.Embedding):  # type: ignore[override]  # whose weight can be set
    """V vectors of width d: a code-book and, for each token, a code length and the bits of a code.

    The bits come from encoders until they are stored: of `training_state` and `packed` exactly one is there. It is an
    `nn.Embedding` to those who ask, without being made as one.

    Args:
        source: The table that is compressed, (V, d). Shared, not copied.
        config: The settings, with a ladder.
        padding_idx: As in `nn.Embedding`, not negative. Its vector is zero if the source's is.
    """

    max_norm, norm_type, scale_grad_by_freq, sparse = None, 2.0, False, False
    anew = False  # whether the table is random: nothing is lost if it becomes one that was packed
    head_untied = False  # whether an output head that shared the dense table keeps weights of its own
    sealed: dict[str, int] | None = None  # `checksums` when it was packed, loaded or resized

    def __init__(self, source: Tensor, config: AdaCompConfig, padding_idx: int | None) -> None:
        ReadableTable.__init__(self)
        self.num_embeddings, self.embedding_dim = source.shape
        self.padding_idx, self.config = padding_idx, config
        self.zero_padding = padding_idx is not None and (source.is_meta or not source[padding_idx].any())
        self.codebook = _new_codebook(source, config)
        self.training_state: TrainingState | None = TrainingState(source, config)
        self.packed: PackedCodes | None = None
        self.register_state_dict_post_hook(tell_units)  # type: ignore[no-untyped-call]  # torch's
        self.register_load_state_dict_pre_hook(check_form)  # type: ignore[no-untyped-call]  # torch's
        self.register_load_state_dict_post_hook(seal_again)  # type: ignore[no-untyped-call]  # torch's

    def book(self, k: int) -> BinaryCodebook:
        """The code-book of the k-th code length: one serves all. Scripts of before ask for it."""
        return self.codebook

    @property
    def coder(self) -> TrainingState | None:
        """`training_state`, as it was called first; scripts ask for it."""
        return self.training_state

    @property
    def phase(self) -> str:
        """`"observe"`, `"select"`, `"encode"` or `"packed"`."""
        return "packed" if self.training_state is None else self.training_state.phase

    def budget(self) -> int:
        """Bits available for the codes of all tokens under `config.target_ratio`."""
        config, book = self.config, self.codebook.stored_bytes()
        return code_budget(self.num_embeddings, self.embedding_dim, config.ladder, book, config.target_ratio)

    def check_size(self) -> None:
        """Raise ValueError if frozen lengths exceed what `config.target_ratio` leaves for them."""
        if self.training_state is not None:
            self.training_state.check_size(self.budget())

    def offer(self, config: AdaCompConfig) -> None:
        """Begin anew with the ladder of other settings, before anything is fitted; what was observed stays."""
        state = self.require_training("offer")
        observation, source = state.observation, state.source
        learning = any(parameter.requires_grad for parameter in self.codebook.parameters())
        self.config, self.codebook = config, _new_codebook(source, config).train(self.training)
        self.codebook.requires_grad_(learning)
        self.training_state = TrainingState(source, config).train(self.training)
        self.training_state.observation = observation

    def warm_start(
        self, token_counts: Tensor | None = None, metric: Tensor | None = None, show_progress: bool = True
    ) -> None:
        """Fit code-book and selection to the source table.

        Args:
            token_counts: Occurrences of each token in the training data, (V,), by which tokens weigh.
            metric: What errors are measured in, (d, d), from here on: `hf_adacomp.nn.observation`.
            show_progress: Whether to draw a progress bar.

        Raises:
            ValueError: For counts or a metric that cannot be.
        """
        state = self.require_training("warm_start")
        if token_counts is not None:
            state.set_counts(token_counts)
        if metric is not None:
            state.set_metric(metric)
        budget, seed = self.budget(), self.config.seed
        # An evaluation may ask for the fit in the middle of a forward pass.
        with torch.inference_mode(False), torch.autocast(state.source.device.type, enabled=False):
            weights = state.weigh_tokens()
            cost = fit_codebook(
                self.codebook, self.config.ladder, state.source, weights, state.metric, budget, seed, show_progress
            )
            state.start(cost, budget)
        if not state.observation.counting and (metric is not None or not self.config.measured):
            state.end_observation()

    @property
    def cold(self) -> bool:
        """Whether the code-book is yet to be fitted, or to what was observed since it was."""
        return self.training_state is not None and not self.training_state.warm

    def ensure_warm(self, show_progress: bool = True) -> None:
        """Fit the code-book to what was observed so far, unless it is; a warning if nothing was counted yet."""
        if not self.cold:
            return
        if not self.token_counts().any():
            logger.warning(
                "a compressed table is used before any token was counted: it is fitted as if all were equally "
                "frequent, and loses more than it will. Pass token_counts to compress(), calibrate on texts, or train "
                "with AdaCompCallback(), which counts. What is evaluated before that training is not the dense model; "
                "a reference or teacher model that is not trained should be left dense"
            )
        state = self.require_training("ensure_warm")
        if state.observation.measuring and (metric := state.observation.measured_metric()) is not None:
            state.set_metric(metric)  # that of the moment: observation goes on
        self.warm_start(show_progress=show_progress)

    def end_observation(self, show_progress: bool = True) -> None:
        """Fit code-book and selection to what was observed so far; learn lengths from here on."""
        self.ensure_warm(show_progress)
        self.require_training("end_observation").end_observation()

    def decoder(self) -> Decoder | SourceVectors:
        """From tokens to vectors as they are due now, for one forward pass.

        In training mode those are the source vectors while the table is observed, and mixtures over all lengths while
        those are learned.
        """
        state = self.training_state
        if state is not None and torch_compat.is_transformed():
            raise ValueError("torch.func transforms packed tables alone: call pack first")
        if self.training and state is not None and state.observing:
            return SourceVectors(state)
        decoder = self.hard_decoder()
        if self.training and state is not None and state.phase == "select":
            decoder.shares = state.shares
        return decoder

    def hard_decoder(self) -> Decoder:
        """From tokens to vectors as they would be packed now, for one forward pass."""
        static = torch_compat.is_traced()
        if not static:
            self.ensure_warm()
        stored = self.codebook.stored()
        state, padding = self.training_state, self.padding_idx
        codes = self.require_packed() if static or state is None else LearnedCodes(state, self.codebook, stored)
        kind = StaticDecoder if static else Decoder
        return kind(stored, codes, self.num_embeddings, padding, padding if self.zero_padding else None)

    def token_counts(self) -> Tensor:
        """Occurrences of each token in the training data, (V,); only until it is packed."""
        return self.require_training("token_counts").token_counts

    def code_lengths(self, settled: bool = False) -> Tensor:
        """Bits of each token's code, (V,) int64, as they would be packed now.

        Args:
            settled: Take those of the last training step or evaluation, without solving for those of this moment.
        """
        self.ensure_warm()
        if self.training_state is None:
            assignment = self.require_packed().assignment()
        elif settled:
            assignment = self.training_state.assignment
        else:
            assignment = self.training_state.hard_assignment(self.budget())[0]
        return torch.tensor(self.config.ladder, device=assignment.device)[assignment.to(torch.int64)]

    @torch.no_grad()
    def codes(self, token_id: int) -> tuple[int, ...]:
        """Indices of the bits that are set in a token's code, whose length `code_lengths` tells."""
        if not 0 <= token_id < self.num_embeddings:
            raise IndexError(f"token id {token_id} is out of range for a table of {self.num_embeddings} rows")
        codes = self.hard_decoder().codes
        bits = codes.centred(*codes.locate(torch.tensor([token_id], device=self.device)), self.config.ladder[-1])
        return tuple((bits[0] > 0).nonzero().squeeze(1).tolist())

    def become_packed(self, packed: PackedCodes) -> None:
        """Drop what only training needs, with these codes to be read from now on."""
        self.codebook.pack()
        self.training_state, self.packed = None, packed.train(self.training)

    def resize(self, kept: Tensor, new_codes: Tensor) -> None:
        """Keep tokens of a packed table, int64 (K,), in that order; append some with centred bits (N, L)."""
        self.packed = self.require_packed().resized(kept, new_codes).train(self.training)
        self.num_embeddings = self.packed.num_tokens
        if self.padding_idx is not None:
            ids = kept.tolist()
            self.padding_idx = ids.index(self.padding_idx) if self.padding_idx in ids else None  # as transformers does
            self.zero_padding = self.zero_padding and self.padding_idx is not None
        self.seal()

    def checksums(self) -> dict[str, int]:
        """Those of the tensors that packing fixed for good, by name: codes, length indices, integer code vectors."""
        if self.packed is None:
            return {}
        return {name: checksum(value) for name, value in self.state_dict().items() if not value.is_floating_point()}

    def seal(self) -> None:
        """Take the checksums of now for right: averages of whole states, say, change what is fixed."""
        self.sealed = self.checksums()

    def require_packed(self) -> PackedCodes:
        """The packed codes; ValueError before there are any."""
        if self.packed is None:
            raise ValueError("the embedding is not packed yet: call pack() first")
        return self.packed

    def require_training(self, verb: str) -> TrainingState:
        """What training needs; ValueError once packed."""
        if self.training_state is None:
            raise ValueError(f"{verb} is not possible on a packed embedding: lengths and bits are fixed")
        return self.training_state


def _new_codebook(source: Tensor, config: AdaCompConfig) -> BinaryCodebook:
    """A random code-book for a table and settings with a ladder; what the user draws next stays the same."""
    with torch.random.fork_rng([source.device] if source.is_cuda else []):
        return BinaryCodebook(
            config.ladder[-1],
            source.shape[1],
            tied=config.tied,
            storage=config.codebook_dtype,
            device=source.device,
            dtype=source.dtype,
        )
