"""A classifier to train and the stock Trainer: what tests of trainings share."""

import torch
from conftest import LENGTHS, VOCABULARY, tiny_bert_config
from torch.utils.data import Dataset
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments, set_seed

from hf_adacomp import AdaCompCallback, AdaCompConfig, compress, size_report


class Texts(Dataset):
    """Zipf-distributed ids; the label says whether one of a few tokens occurs."""

    def __init__(self, rows=96):
        generator = torch.Generator().manual_seed(1)
        share = 1 / torch.arange(1, VOCABULARY)
        self.ids = 1 + torch.multinomial(share.expand(rows, -1), 8, replacement=True, generator=generator)
        self.labels = (self.ids < 5).any(1).long()

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        return {"input_ids": self.ids[index], "labels": self.labels[index]}


SCHEDULE = {"observe_fraction": 0.05, "select_fraction": 0.5}
"""Of 24 steps two are observed."""


def new_model(**settings) -> BertForSequenceClassification:
    set_seed(0)
    model = BertForSequenceClassification(tiny_bert_config())
    return compress(model, AdaCompConfig(LENGTHS, **{**SCHEDULE, "target_ratio": 32, **settings}))


def new_trainer(model, folder, callbacks=(), **settings) -> Trainer:
    arguments = {
        "output_dir": str(folder),
        "per_device_train_batch_size": 8,
        "num_train_epochs": 2,
        "learning_rate": 1e-3,
        "report_to": [],
        "disable_tqdm": True,
        "save_strategy": "no",
        "logging_steps": 1,
        "use_cpu": True,
    }
    return Trainer(
        model,
        TrainingArguments(**{**arguments, **settings}),
        train_dataset=Texts(),
        eval_dataset=Texts(40),
        callbacks=[AdaCompCallback(), *callbacks],
    )


class Watch(TrainerCallback):
    """Notes phase, temperature and packed size after each step."""

    def __init__(self):
        self.phases, self.temperatures, self.ratios = [], [], []

    def on_step_end(self, args, state, control, model, **kwargs):
        embedding = model.get_input_embeddings()
        self.phases.append(embedding.phase)
        self.temperatures.append(embedding.temperature)
        if embedding.phase != "observe":
            self.ratios.append(size_report(model).ratio)
