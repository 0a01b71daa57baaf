"""A stock Trainer on models with tied heads and decoders: what is counted, measured, trained and packed."""

import pytest
import torch
from architectures import TIED
from conftest import VOCABULARY, close
from datasets import Dataset
from transformers import Trainer, TrainingArguments

from hf_adacomp import AdaCompCallback, AdaCompConfig, compress
from hf_adacomp.integration.callback import _id_names
from hf_adacomp.integration.tables import compressed_embeddings

pytestmark = pytest.mark.usefixtures("quick_fit")

SETTINGS = {"code_lengths": (4, 8, 32), "target_ratio": 3, "codebook_dtype": "int8"}


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("gpt2", [["input_ids"]]),
        ("bert", [["input_ids"]]),
        ("t5", [["input_ids", "labels"]]),
        ("bart", [["input_ids", "labels"]]),
        ("marian", [["input_ids", "labels"]]),
        ("marian-split", [["input_ids"], ["labels"]]),
    ],
)
def test_ids_of_each_table_are_known(name, expected):
    model = compress(TIED[name](), AdaCompConfig(**SETTINGS))
    assert [_id_names(model, table) for table in compressed_embeddings(model).values()] == expected


@pytest.mark.parametrize("head", ["compress", "dense"])
@pytest.mark.parametrize("name", ["gpt2", "gemma3", "t5", "marian-split"])
def test_trainer_trains_packs_and_saves(name, head, tmp_path):
    model = compress(TIED[name](), AdaCompConfig(**SETTINGS, head=head))
    rows = torch.randint(4, 100, (32, 9))
    data = Dataset.from_dict({"input_ids": rows.tolist(), "labels": rows.tolist()}).with_format("torch")
    args = TrainingArguments(
        str(tmp_path / "run"), max_steps=6, per_device_train_batch_size=8, report_to="none", save_strategy="no"
    )
    trainer = Trainer(model=model, args=args, train_dataset=data, callbacks=[AdaCompCallback()])
    trainer.train()
    trainer.save_model(tmp_path / "packed")
    loaded = type(model).from_pretrained(tmp_path / "packed")
    batch = {"input_ids": rows[:2], "labels": rows[:2]}
    with torch.no_grad():
        assert close(loaded(**batch).logits, model.eval()(**batch).logits)
    assert all(table.phase == "packed" for table in compressed_embeddings(loaded).values())
    assert all(table.num_embeddings in (100, VOCABULARY) for table in compressed_embeddings(loaded).values())
