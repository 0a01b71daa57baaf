"""The trainers that people use, the real ones: the table is observed, trained, packed by each."""

import pytest
import torch
import trl
from architectures import TIED, UNTIED
from conftest import LENGTHS, VOCABULARY, tiny_bert_config
from datasets import Dataset, DatasetDict
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
)
from sentence_transformers.cross_encoder import CrossEncoderTrainer, CrossEncoderTrainingArguments
from sentence_transformers.cross_encoder.losses import BinaryCrossEntropyLoss
from sentence_transformers.sentence_transformer import losses
from torch.utils.data import IterableDataset
from transformers import AutoTokenizer, BertForSequenceClassification, Trainer, TrainingArguments

from hf_adacomp import AdaCompCallback, AdaCompConfig, compress
from hf_adacomp.integration.compressed_tables import compressed_embeddings

setfit = pytest.importorskip("setfit", reason="SetFit lags behind transformers' newest releases")
pytestmark = [
    pytest.mark.usefixtures("quick_fit"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),  # of the libraries themselves
]

CONFIG = AdaCompConfig((4, 8, 32), target_ratio=3, codebook_dtype="int8", select_fraction=0.5)
COMMON = {"max_steps": 6, "report_to": "none", "save_strategy": "no", "disable_tqdm": True}
QUICK = {**COMMON, "per_device_train_batch_size": 4, "learning_rate": 1e-4, "use_cpu": True}
OTHER_HEAD = {"ignore_mismatched_sizes": True}
TEXTS = ["word5 word6 word7", "word8 word9", "word9 word7", "word6"] * 8


@pytest.fixture
def tokenizer(toy_model):
    return AutoTokenizer.from_pretrained(toy_model)


@pytest.fixture
def llama(tokenizer):
    """With a head of its own: losses of trl read its weight."""
    model = compress(UNTIED["llama"](), CONFIG)
    model.generation_config.eos_token_id = tokenizer.sep_token_id
    tokenizer.eos_token = tokenizer.sep_token
    return model


class Look(AdaCompCallback):
    """Keeps the counts and the phases of a training."""

    def on_step_end(self, args, state, control, **kwargs):
        (table,) = compressed_embeddings(kwargs["model"]).values()
        self.phases = [*getattr(self, "phases", []), table.phase]
        self.counts = table.token_counts().clone()

    def check(self, model) -> None:
        (table,) = compressed_embeddings(model).values()
        assert table.phase == "packed"
        assert [*dict.fromkeys(self.phases)] == ["observe", "select", "encode"]
        assert self.counts.any()


def test_setfit(toy_model, tmp_path):
    model, look = setfit.SetFitModel.from_pretrained(str(toy_model)), Look()
    compress(model.model_body[0].auto_model, CONFIG)
    data = Dataset.from_dict({"text": TEXTS, "label": [0, 1] * 16})
    arguments = setfit.TrainingArguments(str(tmp_path), max_steps=6, batch_size=4, report_to="none", save_strategy="no")
    setfit.Trainer(model=model, args=arguments, train_dataset=data, callbacks=[look]).train()
    look.check(model)


def test_sentence_transformers_on_several_datasets(toy_model, tmp_path):
    model, look = SentenceTransformer(str(toy_model), device="cpu"), Look()
    compress(model[0].auto_model, CONFIG)
    pairs = Dataset.from_dict({"anchor": TEXTS, "positive": TEXTS[::-1]})
    scored = Dataset.from_dict({"s1": TEXTS, "s2": TEXTS[::-1], "score": [0.5] * 32})
    SentenceTransformerTrainer(
        model,
        SentenceTransformerTrainingArguments(str(tmp_path), **QUICK),
        train_dataset=DatasetDict({"pairs": pairs, "scored": scored}),
        loss={"pairs": losses.MultipleNegativesRankingLoss(model), "scored": losses.CosineSimilarityLoss(model)},
        callbacks=[look],
    ).train()
    look.check(model)


def test_cross_encoder(toy_model, tmp_path):
    model, look = CrossEncoder(str(toy_model), num_labels=1, device="cpu", model_kwargs=OTHER_HEAD), Look()
    compress(model.model, CONFIG)
    data = Dataset.from_dict({"a": TEXTS, "b": TEXTS[::-1], "label": [0.0, 1.0] * 16})
    arguments = CrossEncoderTrainingArguments(str(tmp_path), **QUICK)
    loss = BinaryCrossEntropyLoss(model)
    CrossEncoderTrainer(model, arguments, train_dataset=data, loss=loss, callbacks=[look]).train()
    look.check(model)


def test_sft(llama, tokenizer, tmp_path):
    look = Look()
    data = Dataset.from_dict({"text": TEXTS})
    trl.SFTTrainer(
        llama, trl.SFTConfig(str(tmp_path), **QUICK), train_dataset=data, processing_class=tokenizer, callbacks=[look]
    ).train()
    look.check(llama)


def test_dpo(llama, tokenizer, tmp_path):
    look = Look()
    data = Dataset.from_dict({"prompt": TEXTS, "chosen": [" word3"] * 32, "rejected": [" word4"] * 32})
    arguments = trl.DPOConfig(str(tmp_path), **QUICK)
    trl.DPOTrainer(
        llama, UNTIED["llama"](), arguments, train_dataset=data, processing_class=tokenizer, callbacks=[look]
    ).train()
    look.check(llama)


def test_grpo(llama, tokenizer, tmp_path):
    """Its batches are raw prompts; what the model itself generates is what the table sees."""
    look = Look()
    arguments = trl.GRPOConfig(str(tmp_path), num_generations=4, max_completion_length=4, **QUICK)
    trl.GRPOTrainer(
        llama,
        reward_funcs=lambda completions, **_: [float(i % 4) for i, _ in enumerate(completions)],
        args=arguments,
        train_dataset=Dataset.from_dict({"prompt": TEXTS}),
        processing_class=tokenizer,
        callbacks=[look],
    ).train()
    look.check(llama)


class Once(IterableDataset):
    """A stream that cannot be read twice."""

    def __init__(self):
        self.rows = iter([{"input_ids": torch.randint(4, VOCABULARY, (8,)), "labels": i % 2} for i in range(64)])

    def __iter__(self):
        return self.rows


def trainer(model, folder, data, callbacks=None, **settings) -> Trainer:
    arguments = TrainingArguments(str(folder), **{**QUICK, **settings})
    return Trainer(model, arguments, train_dataset=data, callbacks=callbacks or [AdaCompCallback()])


@pytest.fixture
def model() -> BertForSequenceClassification:
    return compress(BertForSequenceClassification(tiny_bert_config()), CONFIG)


@pytest.fixture
def rows() -> list[dict]:
    return [{"input_ids": torch.randint(4, VOCABULARY, (8,)), "labels": i % 2} for i in range(32)]


def test_streams_that_are_read_once(model, tmp_path):
    look = Look()
    trainer(model, tmp_path, Once(), [look]).train()
    look.check(model)


def test_random_numbers_are_those_of_a_training_without_us(model, rows, tmp_path):
    """Nothing is drawn on the way: the data come in the order of a dense training."""
    states = []
    for each in (model, BertForSequenceClassification(tiny_bert_config())):
        torch.manual_seed(0)
        callbacks = [AdaCompCallback()] if each is model else []
        arguments = TrainingArguments(str(tmp_path), **QUICK)
        Trainer(each, arguments, train_dataset=rows, callbacks=callbacks).train()
        states.append(torch.get_rng_state())
    assert torch.equal(*states)


def test_table_of_positions_counts_positions(tmp_path, rows):
    model = BertForSequenceClassification(tiny_bert_config(max_position_embeddings=600))
    compress(model, AdaCompConfig((4, 8), target_ratio=2), include=["*position_embeddings"])
    look = Look()
    trainer(model, tmp_path, rows, [look]).train()
    look.check(model)
    assert look.counts[:8].all()
    assert not look.counts[8:].any()


def test_batches_that_never_reach_the_table_are_named(counts, tmp_path):
    model = BertForSequenceClassification(tiny_bert_config())
    vectors = model.get_input_embeddings().weight.detach().clone()
    compress(model, CONFIG, counts)
    data = [{"inputs_embeds": vectors[4:12], "labels": i % 2} for i in range(32)]
    with pytest.raises(ValueError, match=r"batches never reach bert.embeddings.word_embeddings.*inputs_embeds"):
        trainer(model, tmp_path, data).train()


def test_optimizer_of_before_is_refused(rows, tmp_path):
    model = BertForSequenceClassification(tiny_bert_config())
    optimizer = torch.optim.AdamW(model.parameters())
    compress(model, CONFIG)
    arguments = TrainingArguments(str(tmp_path), **QUICK)
    late = Trainer(model, arguments, train_dataset=rows, callbacks=[AdaCompCallback()], optimizers=(optimizer, None))
    with pytest.raises(ValueError, match=r"optimizer does not hold .*codebook.weight.*after compress\(model\)"):
        late.train()


def test_everything_may_be_unfrozen(model, rows, tmp_path):
    model.requires_grad_(True)
    for parameter in model.parameters():
        parameter.requires_grad = True
    trainer(model, tmp_path, rows).train()
    assert model.get_input_embeddings().phase == "packed"


def test_frozen_table_stays_frozen(model, rows, tmp_path, caplog):
    model.requires_grad_(False)
    model.classifier.requires_grad_(True)
    trainer(model, tmp_path, rows).train()
    assert model.get_input_embeddings().phase == "packed"
    free = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert free == {"classifier.weight", "classifier.bias"}
    assert "bert.embeddings.word_embeddings is frozen, so that its codes" in caplog.text


def test_resuming_with_fewer_steps_ends_at_once(model, rows, tmp_path):
    saved = {"save_strategy": "steps", "save_steps": 5}
    trainer(model, tmp_path, rows, **saved).train()
    again = compress(BertForSequenceClassification(tiny_bert_config()), CONFIG)
    trainer(again, tmp_path, rows, max_steps=4).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))
    assert again.get_input_embeddings().phase == "packed"


def test_resuming_from_a_dense_checkpoint_is_refused(model, rows, tmp_path):
    dense = BertForSequenceClassification(tiny_bert_config())
    arguments = TrainingArguments(str(tmp_path), **{**QUICK, "save_strategy": "steps", "save_steps": 3})
    Trainer(dense, arguments, train_dataset=rows).train()
    with pytest.raises(RuntimeError, match="the checkpoint holds a dense table"):
        trainer(model, tmp_path, rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-3"))


def test_size_changed_after_the_freeze_is_refused(rows, tmp_path):
    first, second = (
        compress(
            BertForSequenceClassification(tiny_bert_config()),
            AdaCompConfig(LENGTHS, target_ratio=ratio, select_fraction=0.5),
        )
        for ratio in (32, 44)
    )
    trainer(first, tmp_path, rows, save_strategy="steps", save_steps=5).train()
    with pytest.raises(ValueError, match=r"target_ratio=44 leaves .* but the lengths, which are frozen, take"):
        trainer(second, tmp_path, rows).train(resume_from_checkpoint=str(tmp_path / "checkpoint-5"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_models_stay_finite(rows, tmp_path, dtype):
    model = compress(BertForSequenceClassification(tiny_bert_config()).to(dtype), CONFIG)
    trainer(model, tmp_path, rows, max_steps=20, learning_rate=1e-3).train()
    assert model.get_input_embeddings()(torch.arange(VOCABULARY)).isfinite().all()


@pytest.mark.parametrize("name", ["bert-classifier", "gpt2"])
def test_compiled_training(name, model, rows, tmp_path):
    """What learns is left out of the graphs."""
    if name == "gpt2":
        model = compress(TIED["gpt2"](), CONFIG)
        rows = [{"input_ids": row["input_ids"], "labels": row["input_ids"]} for row in rows]
    look = Look()
    trainer(model, tmp_path, rows, [look], torch_compile=True, torch_compile_backend="aot_eager").train()
    look.check(model)
