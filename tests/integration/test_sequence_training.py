"""A stock Trainer on models with tied heads and decoders: what is counted, measured, trained and packed."""

import pytest
import torch
from architectures import TIED
from conftest import VOCABULARY, close
from datasets import Dataset
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_adacomp import AdaCompCallback, AdaCompConfig, compress
from hf_adacomp.integration.compressed_tables import compressed_embeddings

pytestmark = pytest.mark.usefixtures("quick_fit")

SETTINGS = {"code_lengths": (4, 8, 32), "target_ratio": 3, "codebook_dtype": "int8"}


@pytest.mark.parametrize("name", ["gpt2", "bert", "t5", "bart", "marian-split"])
def test_each_table_counts_its_own_ids(name, tmp_path):
    """Those of a decoder are the labels, shifted; a table that both sides share counts both."""
    model = compress(TIED[name](), AdaCompConfig(**SETTINGS, observe_fraction=1))
    rows = {"input_ids": torch.arange(4, 12), "labels": torch.arange(20, 28)}
    seen = []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen[:] = [table.token_counts()[:60].nonzero().flatten() for table in compressed_embeddings(model).values()]

    args = TrainingArguments(str(tmp_path), max_steps=1, report_to="none", save_strategy="no")
    Trainer(model, args, train_dataset=[rows] * 8, callbacks=[AdaCompCallback(), Look()]).train()
    inputs, outputs = set(range(4, 12)), set(range(20, 27))
    expected = {"gpt2": [inputs - {11}], "bert": [inputs], "marian-split": [inputs, outputs]}.get(
        name, [inputs | outputs]
    )
    assert [set(tokens.tolist()) - {0, 1, 2, 3} for tokens in seen] == expected


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
