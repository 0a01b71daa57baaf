"""The callback under the stock Trainer, on a task whose answer is a token of the input."""

import json
import logging

import pytest
import torch
from accelerate.utils import DistributedType
from conftest import LENGTHS, VOCABULARY, close, same_state, tiny_bert_config
from trainings import Texts, Watch, new_model, new_trainer
from transformers import (
    AutoModelForSequenceClassification,
    BertForSequenceClassification,
    EarlyStoppingCallback,
    TrainerCallback,
)

from hf_adacomp import AdaCompCallback, pack, size_report

pytestmark = pytest.mark.usefixtures("quick_fit")


def best_model(steps, metric) -> dict:
    """Settings that evaluate and save every so many steps and load the best model at the end."""
    return {
        "eval_strategy": "steps",
        "eval_steps": steps,
        "save_strategy": "steps",
        "save_steps": steps,
        "load_best_model_at_end": True,
        "metric_for_best_model": metric,
    }


def test_anneals_freezes_packs_and_saves(tmp_path, ids, device):
    model, watch = new_model(), Watch()
    trainer = new_trainer(model, tmp_path, [watch], use_cpu=device.type == "cpu")
    trainer.train()
    assert watch.phases == ["observe"] * 2 + ["select"] * 10 + ["encode"] * 12
    assert watch.temperatures[0] == 1.0
    assert watch.temperatures[6] == pytest.approx(0.3**0.5)
    assert watch.temperatures == sorted(watch.temperatures, reverse=True)
    assert min(watch.ratios) >= 32
    embedding = model.get_input_embeddings()
    assert embedding.phase == "packed"
    trainer.save_model(tmp_path / "out")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert close(loaded(ids).logits, model.cpu().eval()(ids).logits, 1e-6 if device.type == "cpu" else 1e-3)


def test_an_ordinary_training_warns_of_nothing(tmp_path, caplog):
    trainer = new_trainer(new_model(), tmp_path)
    assert "fused" in trainer.args.optim  # as by default; such an optimizer changes parameters unseen by autograd
    trainer.train()
    assert not [record for record in caplog.records if record.name.startswith("hf_adacomp")]


@pytest.mark.parametrize("evaluate_first", [False, True])
def test_fits_to_what_the_training_shows(tmp_path, evaluate_first):
    """Even where an evaluation before training had to start without counts."""
    counts = torch.bincount(Texts().ids.flatten(), minlength=VOCABULARY)
    model = new_model(observe_fraction=1)
    table = model.get_input_embeddings()

    class FirstEpoch(TrainerCallback):
        def on_train_end(self, args, state, control, **kwargs):
            self.observation = table.training_state.observation

    trainer, first = new_trainer(model, tmp_path, num_train_epochs=1, max_steps=-1), FirstEpoch()
    trainer.callback_handler.callbacks.insert(0, first)
    if evaluate_first:
        trainer.evaluate()
    trainer.train()
    assert torch.equal(first.observation.token_counts, counts)
    expected = new_model().get_input_embeddings()
    expected.warm_start(counts, first.observation.measured_metric())
    expected.pack()
    assert same_state(table, expected)


def test_dense_model_can_be_evaluated_under_the_callback(tmp_path):
    model = BertForSequenceClassification(tiny_bert_config())
    assert "eval_loss" in new_trainer(model, tmp_path).evaluate()


def test_logs_reach_the_history(tmp_path):
    trainer = new_trainer(new_model(), tmp_path, max_steps=4)
    trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert [entry["adacomp/phase"] for entry in steps] == ["observe", "select", "encode", "encode"]
    assert steps[0]["adacomp/temperature"] == 1.0
    for entry in steps[1:]:
        assert entry["adacomp/ratio"] >= 32
        assert LENGTHS[0] <= entry["adacomp/bits_per_token"] <= LENGTHS[-1]


def test_metrics_are_what_they_are_without_the_callback(tmp_path):
    """Searches of hyperparameters sum them up; reports and cards print them."""
    trainer = new_trainer(new_model(), tmp_path, max_steps=4)
    found = [*trainer.train().metrics, *trainer.evaluate(), *trainer.state.log_history[-1]]
    assert "eval_loss" in found
    assert not [name for name in found if name.startswith("adacomp/")]


def test_trackers_that_come_after_it_get_its_values(tmp_path):
    class Tracker(TrainerCallback):
        seen = ()

        def on_log(self, args, state, control, logs, **kwargs):
            self.seen = (*self.seen, *logs)

    trainer, tracker = new_trainer(new_model(), tmp_path, max_steps=4), Tracker()
    trainer.add_callback(tracker)
    trainer.train()
    assert tracker.seen.count("adacomp/temperature") == 4


@pytest.mark.parametrize("settings", [{"gradient_accumulation_steps": 5}, {"bf16": True}, {"max_steps": 1}])
def test_trainer_settings_that_must_not_matter(tmp_path, settings):
    model = new_model()
    new_trainer(model, tmp_path, **settings).train()
    assert model.get_input_embeddings().phase == "packed"
    assert size_report(model).ratio >= 32


@pytest.mark.parametrize("select_fraction", [0.0, 1.0])
def test_extremes_of_the_schedule(tmp_path, select_fraction):
    model, watch = new_model(select_fraction=select_fraction), Watch()
    new_trainer(model, tmp_path, [watch]).train()
    assert set(watch.phases) == {"observe", "encode" if select_fraction == 0 else "select"}
    assert model.get_input_embeddings().phase == "packed"


@pytest.mark.parametrize("stop", [1, 2, 3, 5, 12, 13, 20])
def test_resumed_run_equals_the_uninterrupted_one(tmp_path, stop):
    settings = {"save_strategy": "steps", "save_steps": stop, "eval_strategy": "steps", "eval_steps": 4}
    whole = new_model()
    new_trainer(whole, tmp_path, **settings).train()
    resumed = new_model()
    trainer = new_trainer(resumed, tmp_path / "resumed", **settings)
    trainer.train(resume_from_checkpoint=str(tmp_path / f"checkpoint-{stop}"))
    assert trainer.state.global_step == 24
    expected, found = whole.state_dict(), resumed.state_dict()
    assert expected.keys() == found.keys()
    assert [name for name in expected if not torch.equal(expected[name], found[name])] == []


def test_best_model_is_sought_after_the_freeze(tmp_path):
    scores = iter(range(100, 0, -1))  # the first evaluations look best
    trainer = new_trainer(new_model(), tmp_path, greater_is_better=True, **best_model(4, "score"))
    trainer.compute_metrics = lambda prediction: {"score": next(scores)}
    trainer.train()
    assert trainer.state.best_global_step == 16
    assert trainer.model.get_input_embeddings().phase == "packed"
    best = AutoModelForSequenceClassification.from_pretrained(tmp_path / "checkpoint-16").eval()
    ids = Texts().ids[:4]
    assert close(trainer.model.eval()(ids).logits, best(ids).logits)


def test_checkpoints_hold_the_training_form(tmp_path):
    new_trainer(new_model(), tmp_path, save_strategy="steps", save_steps=6, max_steps=6).train()
    layout = json.loads((tmp_path / "checkpoint-6" / "config.json").read_text())["quantization_config"]["tables"]
    assert layout["bert.embeddings.word_embeddings"]["tokens_per_length"] is None


def test_stopping_early_warns_and_saving_says_what_to_do(tmp_path, caplog):
    model = new_model()

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            control.should_training_stop = state.global_step == 3

    trainer = new_trainer(model, tmp_path, [Stop()])
    with caplog.at_level(logging.WARNING, "hf_adacomp"):
        trainer.train()
    assert "stopped at step 3 of 24" in caplog.text
    with pytest.raises(ValueError, match="training ended before the code lengths were frozen"):
        trainer.save_model(tmp_path / "out")
    pack(model)
    trainer.save_model(tmp_path / "out")


def test_early_stopping_after_the_freeze_packs(tmp_path):
    model = new_model(select_fraction=0.2)  # frozen in step 6, where the search for the best begins anew
    trainer = new_trainer(model, tmp_path, [EarlyStoppingCallback(5)], learning_rate=0.0, **best_model(1, "loss"))
    trainer.train()
    assert trainer.state.global_step == 11
    assert trainer.model.get_input_embeddings().phase == "packed"


def test_forgotten_callback_is_found_at_save(tmp_path):
    trainer = new_trainer(new_model(), tmp_path, max_steps=2)
    trainer.remove_callback(AdaCompCallback)
    trainer.train()
    with pytest.raises(ValueError, match="schedule never ran"):
        trainer.save_model(tmp_path / "out")


def test_callback_without_a_compressed_model_is_an_error(tmp_path):
    trainer = new_trainer(BertForSequenceClassification(tiny_bert_config()), tmp_path)
    with pytest.raises(ValueError, match=r"no compressed embedding: call compress\(model, config\)"):
        trainer.train()


def test_packed_model_trains_on_with_fixed_bits(packed_bert, ids, tmp_path):
    packed_bert.save_pretrained(tmp_path / "first")
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "first", num_labels=2)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    trainer = new_trainer(model, tmp_path / "more")
    trainer.train()
    after = model.state_dict()
    prefix = "bert.embeddings.word_embeddings."
    for name in ("packed.codes", "packed.length_indices", "codebook.weight"):
        assert torch.equal(before[prefix + name], after[prefix + name])
    for name in ("codebook.scale", "codebook.bias"):
        assert not torch.equal(before[prefix + name], after[prefix + name])
    trainer.save_model(tmp_path / "second")
    again = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")
    assert close(again(ids).logits, model.eval()(ids).logits)


@pytest.mark.parametrize("kind", ["FSDP", "DEEPSPEED"])
def test_sharded_training_is_refused_by_name(tmp_path, monkeypatch, kind):
    trainer = new_trainer(new_model(), tmp_path, [AdaCompCallback()])
    monkeypatch.setattr("hf_adacomp.transformers_compat.distributed_kind", lambda: DistributedType(kind).value)
    with pytest.raises(ValueError, match=f"under {kind} is not supported: it shards .* Train with DDP"):
        trainer.train()


def test_gradients_that_stay_scaled_are_refused(tmp_path):
    trainer = new_trainer(new_model(), tmp_path, [AdaCompCallback()], max_grad_norm=0)
    trainer.args.fp16 = True  # which transformers refuses without a GPU
    with pytest.raises(ValueError, match=r"fp16=True with max_grad_norm=0\b.*bf16=True"):
        trainer.train()
