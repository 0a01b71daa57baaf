"""`AdaptiveCompressedEmbedding`: the drop-in for `nn.Embedding`, in four phases."""

from __future__ import annotations

import logging

import torch
from torch import Tensor, nn

from .. import torch_compat, transformers_compat
from ..codes.bits import checksum
from ..codes.packed import PackedCodes
from ..config import AdaCompConfig, checked_config
from ..fitting.ladder import with_ladder_for
from .decoding import with_all
from .dense import checked_scale, checked_table
from .movement import Movement
from .ranks import check_agreement, take_from_first
from .regularization import add_gradients, finite_gradients, regularizer
from .table import CodedTable
from .training_state import TrainingState

logger = logging.getLogger(__name__)

NOT_COMPILED = "a compressed table in training is not compiled, since shapes depend on values: call pack first"
"""What torch says where the whole of a model must be one graph."""


class AdaptiveCompressedEmbedding(CodedTable):
    """Embeddings as sums of code vectors chosen by binary codes, each token with a code length of its own.

        observe  the source vectors: which tokens count, and which directions of their vectors, is observed
        select   lengths are learned: e_w = sum_k p_{w,k} xhat_{w,k}, p_w a Gumbel-softmax sample
        encode   lengths are frozen:  e_w = xhat_{w,k*}; codes and code vectors go on learning
        packed   bits are stored; encoders, selector and source table are gone

    In eval mode the module computes, in every phase, what it would compute if it were packed at that moment: hard
    lengths that keep the budget of `config.target_ratio`, hard bits, code vectors as stored.

    Made directly, and not by `from_embedding`, it has a random table, and becomes packed when it loads the state dict
    of a packed one. So modules are loaded that `from_pretrained` does not know.

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
        ValueError: If `config.target_ratio` leaves no room for the code-book, the lengths and codes of the shortest
            length; the message gives the largest ratio that does.
    """

    def __init__(
        self,
        num_embeddings: int,
        embedding_dim: int,
        config: AdaCompConfig,
        padding_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
        *,
        _source: Tensor | None = None,
    ) -> None:
        if _source is None:
            dense = nn.Embedding(num_embeddings, embedding_dim, padding_idx, device=device, dtype=dtype)
            checked_config(config)
        else:
            dense = nn.Embedding.from_pretrained(_source, padding_idx=padding_idx)  # shares it
        source = dense.weight.data
        super().__init__(source, with_ladder_for(source, config), dense.padding_idx)
        self.abandoned = False  # whether training ended before the lengths were frozen
        self.diverged = False  # whether the task's last gradients were NaN or Inf
        self.movement = Movement()
        self.settings = config  # as the user gave them, perhaps without a ladder
        self.anew = _source is None
        if self.anew:
            self.budget()  # refuse an impossible size here rather than at the warm start

    @classmethod
    def from_embedding(
        cls, embedding: nn.Embedding | nn.EmbeddingBag, config: AdaCompConfig, token_counts: Tensor | None = None
    ) -> AdaptiveCompressedEmbedding:
        """Compress an `nn.Embedding`, plain or scaled, or an `nn.EmbeddingBag`; with `token_counts` (V,) fit at once.

        The source table is shared, not copied, until `pack` lets go of it.

        >>> import torch
        >>> from torch import nn
        >>> from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding
        >>> table, counts = nn.Embedding(1000, 64), 1000 // torch.arange(1, 1001)
        >>> embedding = AdaptiveCompressedEmbedding.from_embedding(table, AdaCompConfig(target_ratio=20), counts)
        >>> embedding(torch.tensor([[1, 2, 3]])).shape
        torch.Size([1, 3, 64])
        >>> embedding.pack()
        >>> embedding.phase
        'packed'

        Raises:
            ValueError: For a table that cannot be compressed, and for counts that cannot be.
        """
        source, config = checked_table(embedding), checked_config(config)
        offered = with_ladder_for(source, config, token_counts)
        tokens, dim = source.shape
        with torch.inference_mode(False):  # what is made there cannot learn
            module = cls(tokens, dim, offered, embedding.padding_idx, _source=source)
        module.settings = config
        module.budget()
        module.stand_in_for(embedding, checked_scale(embedding))
        torch_compat.hand_over_hooks(embedding, module)
        module.train(embedding.training)
        if token_counts is not None:
            module.warm_start(token_counts)
        return module

    # Training

    @property
    def temperature(self) -> float:
        """Gumbel-softmax temperature at the current training progress; 0 once the lengths are frozen."""
        state = self.training_state
        return 0.0 if state is None or state.phase == "encode" else state.temperature

    def step(self, fraction: float, show_progress: bool = True) -> None:
        """Tell the module how far training is, between `backward()` and `optimizer.step()`; in all processes together.

        Once an optimizer step: where gradients are accumulated, only after the last `backward()`.

        Collects what was observed, fits the code-book when that ends, sets temperature and price, freezes the lengths
        at `config.select_fraction`, and adds the gradients of the regularisers. Once packed it does nothing. Gradients
        that are NaN or Inf, as the loss was, are dropped with a warning. With a `GradScaler`, call `unscale_` first:
        the regularisers' gradients have the size of unscaled ones.

        Args:
            fraction: Optimizer steps done over all steps, 0..1.
            show_progress: Whether to draw a progress bar when the code-book is fitted.
        """
        try:
            done = float(fraction)
        except (TypeError, ValueError):
            done = -1.0
        if not 0 <= done <= 1:
            raise ValueError(f"fraction is the share of training that is done, between 0 and 1; got {fraction!r}")
        fraction = done
        state = self.training_state
        if state is None:
            return
        if transformers_compat.accumulates():
            raise ValueError(
                "accelerate is accumulating gradients: call step where its optimizer takes one, "
                "if accelerator.sync_gradients: embedding.step(fraction). If a loop of accelerate was left in the "
                "middle, and this one is none of its: accelerate.state.GradientState._reset_state()"
            )
        if not state.driven:
            take_from_first(self._tensors())
        self._leave_out_broken_gradients(fraction, state)
        before = state.phase
        if before != "encode":
            state.recount()
        if state.observing and fraction >= self.config.observe_fraction:
            state.warn_of_missing_gradients()
            self.end_observation(show_progress)
            take_from_first(self._tensors())
        state.advance(fraction, self.budget())
        if before == "observe":
            self.zero_grad()  # to None: an optimizer passes over what took part without a gradient
        else:
            self.movement.check(self.codebook.parameters())
            if state.phase == "encode":
                state.selector.zero_grad()
            loss = regularizer(self.config, self.codebook, state, self.hard_decoder().vectors)
            add_gradients(loss, self.codebook.parameters())
        if before != state.phase == "encode":
            self.check_ranks()

    def check_ranks(self) -> None:
        """Raise ValueError if the processes of a training have come to different lengths or code vectors."""
        state = self.require_training("check_ranks")
        tensors = {"lengths": state.assignment, **dict(self.codebook.named_parameters(prefix="codebook"))}
        check_agreement({name: checksum(tensor) for name, tensor in tensors.items()}, state.assignment.device)

    def _tensors(self) -> list[Tensor]:
        return [*self.parameters(), *self.buffers()]

    def _leave_out_broken_gradients(self, fraction: float, state: TrainingState) -> None:
        finite = finite_gradients(self.parameters()) and not (state.observing and state.observation.broken)
        if not finite:
            self.zero_grad()
            if not self.diverged:
                logger.warning(
                    "the gradients of the loss are NaN or Inf after %.2f %% of training: they are left out for the "
                    "compressed table, which stays as it is. A GradScaler that looks for its scale overflows now and "
                    "then; if the loss stays so, lower the learning rate",
                    100 * fraction,
                )
        self.diverged = not finite

    def freeze_lengths(self) -> None:
        """Freeze each token's most likely code length within the budget. Afterwards only codes are learned."""
        state = self.require_training("freeze_lengths")
        self.end_observation()
        state.freeze(self.budget())

    @torch.inference_mode(False)
    @torch.no_grad()
    def pack(self) -> None:
        """Store the bits of every token and drop the encoders, the selector and the source table."""
        if self.training_state is None:
            return
        self.freeze_lengths()
        decoder = self.hard_decoder()
        codes = torch.cat([decoder.codes.group(k) for k in range(len(self.config.ladder))])
        self.become_packed(PackedCodes.of(decoder.codes.assignment(), self.config.ladder, codes))
        self.seal()

    # What is computed

    def forward(self, input: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None) -> Tensor:
        """Vectors of the ids, int32 or int64 of any shape -> (..., d); or what an `nn.EmbeddingBag` returns."""
        if input.dtype not in (torch.int32, torch.int64):
            raise RuntimeError(f"embedding ids must be int32 or int64, as for nn.Embedding; got {input.dtype}")
        self.refuse_offloaded(input)
        ids = input.to(torch.int64)
        vectors = self._look_up(ids if self.bag is None else ids.flatten())
        if self.scale != 1:
            vectors = vectors * (self.embed_scale.to(vectors.dtype) if self.rounds_scale else self.scale)
        if self.bag is not None:
            return self.bag.reduce(ids, vectors, offsets, per_sample_weights, self.padding_idx)
        if offsets is not None or per_sample_weights is not None:
            raise TypeError("offsets and per_sample_weights are for tables in the place of an nn.EmbeddingBag")
        return vectors

    def _look_up(self, ids: Tensor) -> Tensor:
        if self.training_state is not None:
            learned: Tensor = self._look_up_in_training(ids, self.training_state)
            return learned
        if torch_compat.is_traced():
            return self.decoder().look_up(ids)
        self._end_pass()
        return self._with_all(self.decoder().look_up(ids))

    def _end_pass(self) -> None:
        self.last_weight.end_pass(keep=not (self.training and torch.is_grad_enabled()))  # training may generate

    @torch.compiler.disable(reason=NOT_COMPILED)  # type: ignore[untyped-decorator]  # torch's
    def _look_up_in_training(self, ids: Tensor, state: TrainingState) -> Tensor:
        if self.training and torch_compat.is_replica(self):
            raise ValueError(
                "nn.DataParallel trains copies of the model, which last for one step, and what they note of a "
                "compressed table is lost: start a process for each device, torchrun --standalone --nproc-per-node N "
                "train.py, or show the training one alone, CUDA_VISIBLE_DEVICES=0"
            )
        self.reached = True
        self._end_pass()
        vectors = self.decoder().look_up(ids)
        if state.phase != "select":
            return self._with_all(vectors)
        if state.observation.counting and vectors.requires_grad:
            state.observation.watch_look_up(ids, vectors, measure=False)
        return vectors

    def _with_all(self, vectors: Tensor) -> Tensor:
        return with_all(vectors, self.parameters()) if self.training else vectors

    def train(self, mode: bool = True) -> AdaptiveCompressedEmbedding:
        """As in `nn.Module`; entering eval mode settles the hard lengths of the moment."""
        super().train(mode)
        if not mode and self.training_state is not None and not self.loading and self.training_state.warm:
            self.training_state.settle(self.budget())
        return self

    # Questions

    def extra_repr(self) -> str:
        padding = "" if self.padding_idx is None else f", padding_idx={self.padding_idx}"
        return (
            f"{self.num_embeddings}, {self.embedding_dim}{padding}, phase={self.phase!r}, "
            f"code_lengths={self.config.ladder}, target_ratio={self.config.target_ratio:g}"
        )
