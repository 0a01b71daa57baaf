"""The Trainer callback: forwards training progress to the compressed embeddings."""

from __future__ import annotations

import logging
from typing import Any

from torch.optim import Optimizer
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from .. import transformers_compat
from ..nn.embedding import AdaptiveCompressedEmbedding
from .attachment import attach_whole
from .checkpoint import unfinished_checkpoints
from .compressed_tables import compressed_embeddings, keep_from_broadcasts, require_compressed
from .parts import named_modules
from .sentence import give_save
from .sizes import size_report

logger = logging.getLogger(__name__)

SHARDING = ("FSDP", "DEEPSPEED", "MEGATRON_LM")
"""Ways to share out a training that divide the parameters themselves."""

LEARNING = ("observe", "select")
"""Phases before the lengths are frozen."""

LOSS = "loss"
"""What the logs of training steps hold, and no others."""

BEGUN = "_adacomp_begun"
"""Mark on the state of a training, of which the Trainer makes a new one each time: a callback has begun it."""


class AdaCompCallback(TrainerCallback):
    """Drives the compressed embeddings of the model that a `Trainer` trains.

    Before each optimizer step it forwards `global_step / max_steps`, by which the embeddings are observed, fitted,
    annealed and then frozen; at the end it packs. It reads no data: what counts is seen where the tables are used.
    Logs of training steps gain `adacomp/temperature`, `adacomp/phase` and, once codes are fitted,
    `adacomp/bits_per_token` and `adacomp/ratio`. The Trainer asks the trackers of `report_to` before other callbacks:
    for them to get these values, name them after this one, `report_to="none"` and `callbacks=[AdaCompCallback(),
    TensorBoardCallback()]`.

    `Trainer.create_model_card`, which `push_to_hub` calls, writes a card of its own over the one that says how to load
    the model: `save_model_card(model, folder)` or `push_model_card(model, "user/model")` after it puts that back.

    Averages of weights (EMA) begin where `adacomp/phase` is `"encode"`, since a code-book is random until it is
    fitted, and take parameters alone, not buffers.

    Everything that training depends on lives in the checkpoint: a resumed run repeats the uninterrupted one. When the
    Trainer is made, checkpoints that a killed training left half-written are named.

    >>> import tempfile
    >>> from hf_adacomp import AdaCompCallback, AdaCompConfig, compress
    >>> from transformers import BertConfig, BertForSequenceClassification, Trainer, TrainingArguments
    >>> settings = BertConfig(vocab_size=1000, hidden_size=64, num_hidden_layers=1, num_attention_heads=2)
    >>> model = compress(BertForSequenceClassification(settings), AdaCompConfig(target_ratio=20))
    >>> rows = [{"input_ids": [i % 1000, 7, 9], "labels": i % 2} for i in range(32)]
    >>> arguments = TrainingArguments(tempfile.mkdtemp(), max_steps=4, report_to=[], disable_tqdm=True, use_cpu=True)
    >>> trainer = Trainer(model, arguments, train_dataset=rows, callbacks=[AdaCompCallback()])
    >>> steps = trainer.train().global_step  # doctest: +ELLIPSIS
    {...}
    >>> model.get_input_embeddings().phase
    'packed'
    """

    def on_init_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        keep_from_broadcasts(kwargs["model"])  # the trainer may hold a larger model than the one that was compressed
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
        model, tables = kwargs["model"], require_compressed(kwargs["model"])
        give_save(model)
        attach_whole(model)
        if hasattr(state, BEGUN):
            raise ValueError("AdaCompCallback is twice among the Trainer's callbacks: pass it once")
        setattr(state, BEGUN, True)
        learning = {name: table for name, table in tables.items() if table.training_state is not None}
        if learning:
            _refuse_sharding()
            _refuse_adapters(model)
            _refuse_scaled_gradients(args)
        for name, table in learning.items():
            _refuse_other_optimizer(name, table, kwargs.get("optimizer"))
            table.check_size()
            if not table.weight.requires_grad:
                logger.warning(
                    "%s is frozen, so that its codes and code lengths are fitted to the training, and not learned. To "
                    "let them learn: requires_grad_(True) on it, before the Trainer is made",
                    name,
                )
        for table in tables.values():
            table.abandoned = False

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for name, embedding in compressed_embeddings(kwargs["model"]).items():
            before = embedding.phase
            embedding.step(min(1.0, state.global_step / state.max_steps), not args.disable_tqdm)
            if before == "observe" != embedding.phase and not embedding.reached:
                raise ValueError(
                    f"the batches never reach {name}: no forward pass has looked up a token in it. Where they bring "
                    "inputs_embeds, or vectors of their own, pack(model) first, and train without the callback"
                )
            if embedding.phase == "encode" != before:
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
        if embedding is None or LOSS not in kwargs["logs"]:
            return  # metrics of an evaluation or of the whole training, which users sum up, save and publish
        values: dict[str, Any] = {"adacomp/temperature": embedding.temperature, "adacomp/phase": embedding.phase}
        if embedding.phase != "observe":  # nothing is compressed until then
            report = size_report(kwargs["model"], settled=True)
            values |= {"adacomp/bits_per_token": report.bits_per_token, "adacomp/ratio": report.ratio}
        transformers_compat.add_to_log(state, kwargs["logs"], values)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        for name, embedding in compressed_embeddings(kwargs["model"]).items():
            if embedding.phase in LEARNING and state.global_step >= state.max_steps:
                embedding.freeze_lengths()
            if embedding.phase in LEARNING:
                embedding.abandoned = True
                logger.warning(
                    "training stopped at step %d of %d, before the code lengths of %s were frozen: the model stays "
                    "as it is. Resume the training, or call hf_adacomp.pack(model) to freeze the lengths of now",
                    state.global_step,
                    state.max_steps,
                    name,
                )
            elif embedding.phase == "encode":
                embedding.check_ranks()
                embedding.pack()


def _refuse_sharding() -> None:
    kind = transformers_compat.distributed_kind()
    if kind in SHARDING:
        raise ValueError(
            f"training a compressed table under {kind} is not supported: it shards what every process needs "
            "whole to meet the size. Train with DDP (accelerate launch --multi_gpu), or train the packed model there"
        )


def _refuse_adapters(model: Any) -> None:
    if any(hasattr(module, "peft_config") for module in named_modules(model).values()):
        raise ValueError(
            "the model has adapters of PEFT, which freeze the compressed table before it has learned anything and save "
            "without it: train it without adapters, call hf_adacomp.pack(model), save it, then add adapters to that"
        )


def _refuse_scaled_gradients(args: TrainingArguments) -> None:
    if args.fp16 and not args.max_grad_norm > 0:
        raise ValueError(
            f"fp16=True with max_grad_norm={args.max_grad_norm}: the Trainer scales gradients back only to clip them, "
            "and the table's regularisers would be lost beside those of the loss. Set max_grad_norm, or bf16=True"
        )


def _refuse_other_optimizer(name: str, table: AdaptiveCompressedEmbedding, optimizer: Optimizer | None) -> None:
    if optimizer is None:
        return
    known = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
    left_out = [
        own for own, parameter in table.named_parameters() if parameter.requires_grad and id(parameter) not in known
    ]
    if left_out:
        raise ValueError(
            f"the optimizer does not hold {name}.{left_out[0]} ({len(left_out)} parameters of the table in all), which "
            "would never learn: make the optimizer after compress(model), or freeze the table, "
            "model.get_input_embeddings().requires_grad_(False)"
        )
