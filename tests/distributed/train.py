"""A short deterministic training for one or more processes.

Usage: train.py FOLDER ROWS_A_PROCESS [CHECKPOINT]. Every process writes its packed model's tensors to
FOLDER/rank<N>.safetensors.
"""

import sys
from pathlib import Path

import torch
from conftest import LENGTHS, tiny_bert_config
from safetensors.torch import save_file
from trainings import Texts
from transformers import BertForSequenceClassification, Trainer, TrainingArguments, set_seed

from hf_adacomp import AdaCompCallback, AdaCompConfig, compress


def train(folder: Path, rows: int, checkpoint: str | None) -> None:
    torch.set_num_threads(1)
    set_seed(0)
    # Processes would draw different dropout masks.
    config = tiny_bert_config(num_hidden_layers=1, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
    settings = AdaCompConfig(LENGTHS, target_ratio=32, select_fraction=0.5)
    # In float64, as sums in another order would tip bits, and what is tipped once spreads.
    model = compress(BertForSequenceClassification(config).double(), settings)
    # BERT's loss is a mean; Trainer would take it for a sum, and multiply it by the number of processes.
    model.accepts_loss_kwargs = False
    arguments = TrainingArguments(
        str(folder),
        max_steps=12,
        per_device_train_batch_size=rows,
        learning_rate=1e-3,
        adam_epsilon=1e-3,  # where gradients vanish, Adam would blow up the rounding of sums in another order
        save_strategy="steps",
        save_steps=4,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(model, arguments, train_dataset=Texts(), callbacks=[AdaCompCallback()])
    trainer.train(resume_from_checkpoint=checkpoint)
    save_file(model.state_dict(), folder / f"rank{arguments.process_index}.safetensors")


if __name__ == "__main__":
    train(Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3] if len(sys.argv) > 3 else None)
