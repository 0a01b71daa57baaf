"""Long and odd runs: each ends packed and finite, or says what is wrong."""

import logging

import pytest
import torch
from architectures import TIED
from conftest import LENGTHS, VOCABULARY, close, tiny_bert_config
from torch import nn
from trainings import Texts, Watch, new_model, new_trainer
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    Trainer,
    TrainerCallback,
    set_seed,
)

from hf_adacomp import AdaCompCallback, AdaCompConfig, AdaptiveCompressedEmbedding, compress, pack, size_report

pytestmark = pytest.mark.usefixtures("quick_fit")


def all_finite(module: nn.Module) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in module.state_dict().values())


def ends_packed(model: nn.Module, trainer: Trainer, folder) -> None:
    """Packed, finite, within the size, and the file gives the same vectors back."""
    embedding = model.get_input_embeddings()
    assert embedding.phase == "packed"
    assert all_finite(embedding)
    assert size_report(model).ratio >= embedding.config.target_ratio
    trainer.save_model(folder / "packed")
    loaded = AutoModelForSequenceClassification.from_pretrained(folder / "packed")
    ids = torch.arange(embedding.num_embeddings)
    assert close(loaded.get_input_embeddings()(ids), embedding.eval()(ids))


@pytest.mark.parametrize(
    ("settings", "arguments"),
    [
        ({"select_fraction": 0.0}, {"max_steps": 3}),
        ({"select_fraction": 1.0}, {"max_steps": 3}),
        ({"select_fraction": 0.0}, {"max_steps": 1}),
        ({"select_fraction": 1.0}, {"max_steps": 1}),
        ({}, {"max_steps": 1}),
        ({}, {"gradient_accumulation_steps": 64, "max_steps": 2, "per_device_train_batch_size": 2}),
        ({}, {"learning_rate": 0.0, "max_steps": 3}),
        ({}, {"per_device_train_batch_size": 1, "max_steps": 3}),
        ({"orthogonality_weight": 0.0, "reconstruction_weight": 0.0}, {"max_steps": 3}),
    ],
)
def test_extreme_settings_end_packed(tmp_path, settings, arguments):
    model = new_model(**settings)
    trainer = new_trainer(model, tmp_path, **arguments)
    trainer.train()
    ends_packed(model, trainer, tmp_path)


def test_learning_rate_zero_moves_nothing_but_lengths(tmp_path):
    model = new_model()

    def learned():
        return {name: value for name, value in model.named_parameters() if not name.endswith("selector.offset")}

    class Remember(TrainerCallback):
        def on_step_begin(self, args, state, control, model, **kwargs):
            if state.global_step == 2:  # when the code-books have been fitted
                self.before = {name: value.clone() for name, value in learned().items()}

        def on_step_end(self, args, state, control, model, **kwargs):
            if state.global_step > 2:
                assert all(torch.equal(self.before[name], value) for name, value in learned().items())

    new_trainer(model, tmp_path, [Remember()], learning_rate=0.0, max_steps=4).train()


@pytest.mark.parametrize("length_of_code", [(12,), (4, 80)])
def test_one_length_and_codes_longer_than_vectors(tmp_path, length_of_code):
    model = BertForSequenceClassification(tiny_bert_config())
    compress(model, AdaCompConfig(length_of_code, target_ratio=8))
    trainer = new_trainer(model, tmp_path, max_steps=4)
    trainer.train()
    ends_packed(model, trainer, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_models_of_every_float_dtype_train(tmp_path, dtype):
    model = BertForSequenceClassification(tiny_bert_config()).to(dtype)
    compress(model, AdaCompConfig(LENGTHS, target_ratio=32))
    trainer = new_trainer(model, tmp_path, max_steps=4, learning_rate=1e-4)
    trainer.train()
    assert model.get_input_embeddings().codebook.bias.dtype == dtype
    ends_packed(model, trainer, tmp_path)


@pytest.mark.parametrize(("tokens", "dim"), [(1, 4), (2, 4), (1, 1), (2, 1), (7, 1), (40, 1), (33, 3)])
@pytest.mark.parametrize("lengths", [(1,), (3,), (1, 2, 5)])
@pytest.mark.parametrize("counted", [True, False])
def test_smallest_tables(tokens, dim, lengths, counted):
    config = AdaCompConfig(lengths, target_ratio=0.01)
    counts = torch.arange(tokens) if counted else torch.zeros(tokens)
    embedding = AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(tokens, dim), config, counts)
    optimizer = torch.optim.Adam((p for p in embedding.parameters() if p.requires_grad), lr=1e-3)
    for step in range(4):
        embedding.train()(torch.arange(tokens)).square().sum().backward()
        embedding.step(step / 3)
        optimizer.step()
    expected = embedding.eval()(torch.arange(tokens))
    embedding.pack()
    assert torch.equal(embedding(torch.arange(tokens)), expected)
    assert all_finite(embedding)


def test_table_of_one_repeated_vector():
    """No variance at all: nothing to find axes of."""
    source = nn.Embedding.from_pretrained(torch.full((50, 8), 0.25))
    for counts in (torch.ones(50), torch.zeros(50)):
        embedding = AdaptiveCompressedEmbedding.from_embedding(source, AdaCompConfig((2, 6), target_ratio=1), counts)
        embedding.pack()
        assert torch.allclose(embedding(torch.arange(50)), source.weight, atol=1e-3)


@pytest.mark.parametrize("phase", ["select", "encode", "packed"])
@pytest.mark.parametrize("shape", [(0, 7), (3, 0), (3, 1), (1, 1)])
def test_batches_without_rows_and_of_single_tokens(counts, phase, shape):
    """A table with its tied head; BERT itself refuses an empty batch."""
    model = TIED["gpt2"]()
    embedding = compress(model, AdaCompConfig(LENGTHS, target_ratio=3), counts).get_input_embeddings()
    if phase != "select":
        embedding.freeze_lengths()
    if phase == "packed":
        pack(model)
    vectors = embedding.train()(torch.randint(0, VOCABULARY, shape))
    logits = model.get_output_embeddings()(vectors)
    assert logits.shape == (*shape, VOCABULARY)
    logits.sum().backward()
    embedding.step(0.1)
    assert all_finite(embedding)


class Padding(Texts):
    """Texts of nothing but padding."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "input_ids": torch.zeros(8, dtype=torch.int64)}


class MaskedPadding(Padding):
    """The same with a mask, so that no token counts."""

    def __getitem__(self, index):
        return {**super().__getitem__(index), "attention_mask": torch.zeros(8, dtype=torch.int64)}


class SingleTokens(Texts):
    """Texts of one token, which leaves most of the vocabulary unseen."""

    def __getitem__(self, index):
        return {"input_ids": self.ids[index][:1], "labels": self.labels[index]}


@pytest.mark.parametrize("texts", [Padding, MaskedPadding, SingleTokens])
def test_training_data_with_hardly_a_token(tmp_path, texts):
    model = new_model()
    trainer = new_trainer(model, tmp_path, max_steps=4)
    trainer.train_dataset = texts()
    trainer.train()
    ends_packed(model, trainer, tmp_path)


class BrokenLoss(Trainer):
    """Gives a loss that is not a number in one step, or from a step on."""

    def compute_loss(self, model, inputs, return_outputs=False, **kwargs):
        loss, outputs = super().compute_loss(model, inputs, return_outputs=True, **kwargs)
        if self.state.global_step in self.broken:
            loss = loss * float("nan")
        return (loss, outputs) if return_outputs else loss


@pytest.mark.parametrize("broken", [{2}, {5}, set(range(1, 8))])
@pytest.mark.parametrize("max_grad_norm", [0.0, 1.0])
def test_nan_loss_does_not_poison_the_table(tmp_path, caplog, broken, max_grad_norm):
    model, finite = new_model(), []

    class Look(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            finite.append(all_finite(model.get_input_embeddings()))

    trainer = new_trainer(model, tmp_path, [Look()], max_grad_norm=max_grad_norm, max_steps=8)
    trainer.__class__ = BrokenLoss
    trainer.broken = broken
    with caplog.at_level(logging.WARNING, "hf_adacomp"):
        trainer.train()
    assert finite == [True] * 8
    assert caplog.text.count("NaN or Inf after") == 1
    assert f"after {100 * min(broken) / 8:.2f} % of training" in caplog.text
    ends_packed(model, trainer, tmp_path)


def test_a_step_without_usable_gradients_leaves_the_lengths_as_they_were(bert, config, counts):
    embedding = compress(bert, config, counts).get_input_embeddings()
    optimizer = torch.optim.Adam((p for p in embedding.parameters() if p.requires_grad), lr=1e-3)
    for step in range(3):
        optimizer.zero_grad()
        (embedding.train()(torch.arange(9)).square().sum() * [1, float("inf"), 1][step]).backward()
        offset = embedding.training_state.selector.offset
        before = offset.detach().clone()
        embedding.step((step + 1) / 10)
        optimizer.step()
        assert torch.equal(before, offset) == (step == 1)


def test_early_stopping_before_the_freeze_warns_and_pack_freezes_what_there_is(tmp_path, caplog):
    model = new_model()
    settings = {"eval_strategy": "steps", "eval_steps": 1, "save_strategy": "steps", "save_steps": 1}
    settings |= {"load_best_model_at_end": True, "metric_for_best_model": "loss", "learning_rate": 0.0}
    trainer = new_trainer(model, tmp_path, [EarlyStoppingCallback(2)], **settings)
    with caplog.at_level(logging.WARNING, "hf_adacomp"):
        trainer.train()
    assert "before the code lengths of bert.embeddings.word_embeddings were frozen" in caplog.text
    assert "hf_adacomp.pack(model)" in caplog.text
    lengths = model.get_input_embeddings().eval().code_lengths()
    pack(model)
    assert torch.equal(model.get_input_embeddings().code_lengths(), lengths)
    ends_packed(model, trainer, tmp_path)


def test_two_models_in_one_process_train_as_if_alone(tmp_path):
    models = [new_model(), new_model()]
    trainers = [new_trainer(model, tmp_path, max_steps=4) for model in models]
    for trainer in trainers:
        set_seed(0)
        trainer.train()
    first, second = (model.state_dict() for model in models)
    assert all(torch.equal(first[name], value) for name, value in second.items())


def test_one_callback_serves_two_trainings_one_after_another(tmp_path):
    callback, results = AdaCompCallback(), []
    for _ in range(2):
        model = new_model()
        trainer = new_trainer(model, tmp_path, max_steps=4)
        trainer.remove_callback(AdaCompCallback)
        trainer.add_callback(callback)
        trainer.train()
        results.append(model.state_dict())
    assert all(torch.equal(results[0][name], value) for name, value in results[1].items())


def test_one_trainer_may_train_twice(tmp_path):
    model = new_model()
    trainer = new_trainer(model, tmp_path, max_steps=4)
    trainer.train()
    before = model.get_input_embeddings().packed.codes.clone()
    trainer.train()
    assert torch.equal(model.get_input_embeddings().packed.codes, before)


@pytest.mark.parametrize("same", [True, False])
def test_callback_passed_twice_is_an_error(tmp_path, same):
    callback = AdaCompCallback()
    trainer = new_trainer(new_model(), tmp_path, max_steps=2)
    trainer.remove_callback(AdaCompCallback)
    trainer.add_callback(callback)
    trainer.add_callback(callback if same else AdaCompCallback())
    with pytest.raises(ValueError, match="twice among the Trainer's callbacks"):
        trainer.train()
    trainer.pop_callback(AdaCompCallback)
    trainer.train()
    assert trainer.model.get_input_embeddings().phase == "packed"


@pytest.mark.long
def test_a_long_run_keeps_its_promises_at_every_step(tmp_path):
    model, watch = new_model(), Watch()
    trainer = new_trainer(model, tmp_path, [watch], max_steps=3000, learning_rate=3e-4, logging_steps=100)
    trainer.train()
    assert min(watch.ratios) >= 32
    assert watch.temperatures == sorted(watch.temperatures, reverse=True)
    ends_packed(model, trainer, tmp_path)
