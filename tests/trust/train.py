"""A training that can be killed at any moment and started again; prints when a checkpoint begins and ends.

Usage: train.py FOLDER [CHECKPOINT]. Its result, the packed model, is in FOLDER/packed.
"""

import sys
from pathlib import Path

import torch
from conftest import LENGTHS, tiny_bert_config
from trainings import Texts
from transformers import BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from hf_adacomp import AdaCompCallback, AdaCompConfig, compress


class AnnouncingTrainer(Trainer):
    """Says what it is about to do, so that a killer can choose his moment."""

    def _save_checkpoint(self, *args, **kwargs):
        print("saving", self.state.global_step, flush=True)
        super()._save_checkpoint(*args, **kwargs)
        print("saved", self.state.global_step, flush=True)

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        print("step", self.state.global_step, flush=True)
        return loss


def train(folder: Path, checkpoint: str | None) -> None:
    torch.set_num_threads(1)
    set_seed(0)
    model = BertForSequenceClassification(tiny_bert_config(num_hidden_layers=1))
    trainer = AnnouncingTrainer(
        compress(model, AdaCompConfig(LENGTHS, target_ratio=32)),
        TrainingArguments(
            str(folder),
            max_steps=24,
            per_device_train_batch_size=8,
            learning_rate=1e-3,
            save_strategy="steps",
            save_steps=3,
            report_to=[],
            disable_tqdm=True,
            use_cpu=True,
        ),
        train_dataset=Texts(),
        callbacks=[AdaCompCallback()],
    )
    print("ready", flush=True)
    trainer.train(resume_from_checkpoint=checkpoint)
    trainer.save_model(str(folder / "packed"))


if __name__ == "__main__":
    train(Path(sys.argv[1]), sys.argv[2] if len(sys.argv) > 2 else None)
