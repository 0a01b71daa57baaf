"""The Trainer callback: forwards training progress to the compressed embeddings."""

from __future__ import annotations

import logging
from typing import Any

from torch import nn
from transformers import PreTrainedModel, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import compat
from ..nn.embedding import AdaptiveCompressedEmbedding
from .checkpoint import unfinished_checkpoints
from .metric import task_metrics
from .sizes import size_report
from .tables import compressed_embeddings, require_compressed
from .training_data import count_tokens, input_name

logger = logging.getLogger(__name__)

SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Ways to share out a training that divide the parameters themselves."""

BEGUN = "_adacomp_begun"
"""Mark on the state of a training, of which the Trainer makes a new one each time: a callback has begun it."""


class AdaCompCallback(TrainerCallback):
    """Drives the compressed embeddings of the model that a `Trainer` trains.

    At the start it measures what the model's outputs react to (`AdaCompConfig.significance`), counts the training data,
    if counts were not given, and runs the warm start; before each optimizer step it forwards `global_step / max_steps`,
    by which the embeddings anneal and then freeze; at the end it packs.
    Logs gain `adacomp/temperature`, `adacomp/bits_per_token`, `adacomp/ratio` and `adacomp/phase`.

    Everything that training depends on lives in the checkpoint: a resumed run repeats the uninterrupted one. When the
    Trainer is made, checkpoints that a killed training left half-written are named.

    >>> import tempfile
    >>> from hf_adacomp import AdaCompCallback, AdaCompConfig, compress
    >>> from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
    >>> settings = BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    >>> model = compress(BertForSequenceClassification(settings), AdaCompConfig(target_ratio=20))
    >>> rows = [{"input_ids": [i % 1000, 7, 9], "labels": i % 2} for i in range(32)]
    >>> arguments = TrainingArguments(tempfile.mkdtemp(), max_steps=4, report_to=[], disable_tqdm=True, use_cpu=True)
    >>> result = Trainer(model, arguments, train_dataset=rows, callbacks=[AdaCompCallback()]).train()  # doctest: +ELLIPSIS
    {...}
    >>> model.get_input_embeddings().phase
    'packed'
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        # Resuming would fail before the training begins, at the first file that is not whole, without its name.
        folder = str(args.output_dir)
        for name, fault in unfinished_checkpoints(folder).items():
            logger.warning(
                "%s in %s is half-written (%s): delete it, or resume from an earlier one, "
                "trainer.train(resume_from_checkpoint=...)",
                name,
                folder,
                fault,
            )

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        _refuse_sharding()
        model, loader, show_progress = kwargs["model"], kwargs["train_dataloader"], not args.disable_tqdm
        embeddings = require_compressed(model).values()
        if hasattr(state, BEGUN):
            raise ValueError("AdaCompCallback is twice among the Trainer's callbacks: pass it once")
        setattr(state, BEGUN, True)
        for embedding in embeddings:
            embedding.abandoned = False
        fresh = [
            embedding
            for embedding in embeddings
            if embedding.training_state is not None and not embedding.training_state.driven
        ]
        measured = [embedding for embedding in fresh if embedding.config.significance]
        metrics = task_metrics(model, measured, loader, show_progress)
        for embedding in fresh:
            counts, metric = None, metrics.get(embedding)
            if not embedding.token_counts().any():  # an evaluation before training may have had to start without them
                rows = state.max_steps * args.train_batch_size * args.gradient_accumulation_steps * args.world_size
                counts = count_tokens(loader, embedding.num_embeddings, _id_names(model, embedding), rows)
            if counts is not None or metric is not None or embedding.cold:
                embedding.warm_start(counts, metric, show_progress)

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for embedding in compressed_embeddings(kwargs["model"]).values():
            before = embedding.phase
            embedding.step(state.global_step / state.max_steps)
            if before == "select" and embedding.phase == "encode":
                # Scores so far belong to lengths that may have changed since: the best model is sought from here on.
                state.best_metric = state.best_global_step = state.best_model_checkpoint = None

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        **kwargs: Any,
    ) -> None:
        embedding = next(iter(compressed_embeddings(kwargs["model"]).values()), None)
        if embedding is None:  # an evaluation of the dense model; training it would have been refused
            return
        report = size_report(kwargs["model"])
        values: dict[str, Any] = {
            "adacomp/temperature": embedding.temperature,
            "adacomp/bits_per_token": report.bits_per_token,
            "adacomp/ratio": report.ratio,
            "adacomp/phase": embedding.phase,
        }
        compat.add_to_log(state, kwargs["logs"], values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for name, embedding in compressed_embeddings(kwargs["model"]).items():
            if embedding.phase == "select" and state.global_step >= state.max_steps:
                embedding.freeze_lengths()
            if embedding.phase == "select":
                embedding.abandoned = True
                logger.warning(
                    "training stopped at step %d of %d, before the code lengths of %s were frozen: the model stays "
                    "as it is. Resume the training, or call hf_adacomp.pack(model) to freeze the lengths of now",
                    state.global_step,
                    state.max_steps,
                    name,
                )
            else:
                embedding.pack()


def _refuse_sharding() -> None:
    kind = compat.distributed_kind()
    if kind in SHARDING:
        raise ValueError(
            f"training a compressed table under {kind} is not supported: it shards what every process needs "
            "whole to meet the size. Train with DDP (accelerate launch --multi_gpu), or train the packed model there"
        )


def _id_names(model: nn.Module, embedding: AdaptiveCompressedEmbedding) -> list[str]:
    """The batch's keys for ids of `embedding`: those of a decoder are the labels, shifted."""
    names = {}
    if isinstance(model, PreTrainedModel) and getattr(model.config, "is_encoder_decoder", False):
        for part, name in ((model.get_encoder(), input_name(model)), (model.get_decoder(), "labels")):
            table = part.get_input_embeddings()
            names[name] = getattr(table, "embedding", table)
    return [name for name, table in names.items() if table is embedding] or [input_name(model)]
