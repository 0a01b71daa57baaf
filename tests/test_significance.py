import pytest
import torch
from conftest import VOCABULARY, tiny_bert_config
from torch import nn
from torch.utils.data import DataLoader
from transformers import BertForSequenceClassification
from transformers.modeling_outputs import BaseModelOutput

from hf_adacomp import AdaCompConfig, compress
from hf_adacomp.significance import token_significance


class OneDirection(nn.Module):
    """Logits that depend on the first coordinate of the vectors alone."""

    def __init__(self, embedding):
        super().__init__()
        self.embedding = embedding

    def forward(self, input_ids, attention_mask=None, labels=None):
        return {"logits": self.embedding(input_ids)[..., :1].sum(1)}


READ = torch.arange(VOCABULARY) % 256 < 100
"""Tokens whose vectors lie in the direction that is read, one half of them never seen."""


def loader(rows=64, length=8) -> DataLoader:
    ids = torch.randint(0, VOCABULARY // 2, (rows, length))
    return DataLoader([{"input_ids": row} for row in ids], batch_size=4)


@pytest.fixture
def embedding(config, counts):
    model = BertForSequenceClassification(tiny_bert_config())
    with torch.no_grad():
        weight = model.get_input_embeddings().weight
        weight[:, 0] = 0.2 * READ * weight[:, 0].sign()
    return compress(model, config, counts).get_input_embeddings()


@pytest.mark.usefixtures("quick_fit")
def test_tokens_in_the_direction_that_is_read_are_significant_seen_or_not(embedding):
    significance = token_significance(OneDirection(embedding), embedding, loader(), show_progress=False)
    assert significance.shape == (VOCABULARY,)
    for half in (slice(1, 256), slice(256, None)):  # token 0 is padding, a zero vector
        assert significance[half][READ[half]].min() > 3 * significance[half][~READ[half]].max()


@pytest.mark.usefixtures("quick_fit")
def test_outputs_that_react_to_nothing_leave_all_tokens_alike(embedding):
    class Constant(OneDirection):
        def forward(self, input_ids):
            return {"logits": 0 * self.embedding(input_ids)}

    significance = token_significance(Constant(embedding), embedding, loader(), show_progress=False)
    assert torch.equal(significance, torch.ones(VOCABULARY))


@pytest.mark.usefixtures("quick_fit")
def test_measuring_leaves_model_and_random_numbers_alone(bert, config, counts):
    model = compress(bert, config, counts).train()
    embedding, data = model.get_input_embeddings(), loader()
    before = torch.get_rng_state()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    token_significance(model, embedding, data, show_progress=False)
    assert torch.equal(torch.get_rng_state(), before)
    assert model.training
    assert all(p.grad is None for p in model.parameters())
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())
    assert not embedding._forward_hooks


@pytest.mark.usefixtures("quick_fit")
def test_padding_does_not_count(bert, config, counts):
    embedding = compress(bert, config, counts).get_input_embeddings()
    rows = [{"input_ids": torch.tensor([5, 6, 7, 0]), "attention_mask": torch.tensor([1, 1, 1, 0])}] * 8
    masked = token_significance(bert, embedding, DataLoader(rows, batch_size=4), show_progress=False)
    assert torch.isfinite(masked).all()
    assert (masked > 0).all()


@pytest.mark.usefixtures("quick_fit")
def test_model_without_logits_and_loss_is_refused(embedding):
    class Silent(OneDirection):
        def forward(self, input_ids):
            return BaseModelOutput(last_hidden_state=self.embedding(input_ids))

    with pytest.raises(ValueError, match=r"neither logits nor a loss but .*Set AdaCompConfig\(significance=False\)"):
        token_significance(Silent(embedding), embedding, loader(), show_progress=False)


@pytest.mark.usefixtures("quick_fit")
def test_columns_for_the_trainer_alone_are_left_out(embedding):
    rows = [{"input_ids": torch.tensor([3, 4]), "weight_of_row": torch.tensor(2.0)}] * 4
    model = OneDirection(embedding)
    assert token_significance(model, embedding, DataLoader(rows, batch_size=4), show_progress=False).shape


@pytest.mark.usefixtures("quick_fit")
@pytest.mark.parametrize("answer", ["a tuple", "other inputs"])
def test_model_that_cannot_be_asked_is_refused(embedding, answer):
    class Odd(nn.Module):
        def forward(self, features=None):
            return (embedding(torch.tensor([3])),)

    rows = [{"features" if answer == "a tuple" else "input_ids": torch.tensor([3, 4])}] * 4
    with pytest.raises(ValueError, match=r"cannot measure which tokens matter.*significance=False"):
        token_significance(Odd(), embedding, DataLoader(rows, batch_size=4), show_progress=False)


@pytest.mark.usefixtures("quick_fit")
def test_significant_tokens_get_longer_codes_at_the_same_size(bert, config, counts):
    embedding = compress(bert, config, counts).get_input_embeddings()
    significance = torch.ones(VOCABULARY)
    significance[200:230] = 30
    before = embedding.code_lengths()
    embedding.weigh(significance)
    after = embedding.code_lengths()
    assert (after[200:230] >= before[200:230]).all()
    assert after[200:230].sum() > before[200:230].sum()
    assert after.sum() <= embedding.code_bits()


@pytest.mark.parametrize("bad", [torch.ones(3), torch.zeros(VOCABULARY), torch.full((VOCABULARY,), torch.nan)])
@pytest.mark.usefixtures("quick_fit")
def test_bad_significance_is_refused(embedding, bad):
    with pytest.raises(ValueError, match="positive numbers"):
        embedding.weigh(bad)


def test_switch_is_validated():
    with pytest.raises(ValueError, match="significance must be True or False; got 1"):
        AdaCompConfig(significance=1)
