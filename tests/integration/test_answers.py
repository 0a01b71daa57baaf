"""What models say, and the probes whose gradients tell what answers react to."""

import pytest
import torch
from conftest import VOCABULARY, tiny_bert_config
from torch.nn import functional as F
from transformers import BertForSequenceClassification, BertForTokenClassification, BertModel, ViTConfig, ViTModel

from hf_adacomp.integration.answers import HIDDEN, LOGITS, SENTENCE, Answer, ask

DRAWS = 4000
POINT = torch.tensor([[0.5, -1.0, 0.3]])
WEIGHT = torch.tensor([[1.0, 0.2, -0.5], [0.3, -1.0, 0.8], [-0.7, 0.4, 0.1], [0.2, 0.5, 0.9]])


def compared(kind: str, rows: torch.Tensor) -> torch.Tensor:
    return F.normalize(rows, dim=1) if kind == SENTENCE else rows


@pytest.mark.parametrize("kind", [SENTENCE, LOGITS, HIDDEN])
def test_probes_have_the_second_moments_of_the_reaction(kind):
    """Against the exact matrices `J^T H J`."""
    generator = torch.Generator().manual_seed(0)
    found = torch.zeros(3, 3)
    for _ in range(DRAWS):
        x = POINT.clone().requires_grad_()
        Answer(kind, x @ WEIGHT.T).probe(generator).backward()
        found += x.grad.T @ x.grad / DRAWS
    jacobian = torch.autograd.functional.jacobian(lambda x: compared(kind, x @ WEIGHT.T)[0], POINT)[:, 0]
    p = (POINT @ WEIGHT.T).softmax(1)[0]
    curvature = p.diag() - torch.outer(p, p) if kind == LOGITS else torch.eye(4)
    expected = jacobian.T @ curvature @ jacobian
    assert torch.allclose(found, expected, atol=0.1 * float(expected.diagonal().max()))


def test_rows_are_those_of_tokens_that_count():
    ids, mask = torch.randint(VOCABULARY, (2, 5)), torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1]])
    batch = {"input_ids": ids, "attention_mask": mask}
    hidden = ask(BertModel(tiny_bert_config()), batch)
    assert (hidden.kind, hidden.rows.shape) == (HIDDEN, (8, 32))
    tags = ask(BertForTokenClassification(tiny_bert_config(num_labels=3)), batch)
    assert (tags.kind, tags.rows.shape) == (LOGITS, (8, 3))
    labels = ask(BertForSequenceClassification(tiny_bert_config(num_labels=3)), batch)
    assert (labels.kind, labels.rows.shape) == (LOGITS, (2, 3))


def test_models_whose_config_asks_for_tuples_answer():
    model = BertModel(tiny_bert_config(return_dict=False))
    assert ask(model, {"input_ids": torch.randint(VOCABULARY, (2, 5))}).kind == HIDDEN


@pytest.mark.parametrize("kind", [SENTENCE, LOGITS, HIDDEN])
def test_answers_that_are_no_numbers_are_refused(kind):
    with pytest.raises(ValueError, match=f"its {kind}, are NaN or Inf"):
        Answer(kind, torch.full((2, 3), torch.nan)).probe(torch.Generator())


def test_models_that_say_something_else_are_refused(monkeypatch):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "image_size": 8, "patch_size": 4}
    model = ViTModel(ViTConfig(**sizes))
    monkeypatch.setattr(model, "forward", lambda **_: {"pixels": torch.ones(1)})
    with pytest.raises(ValueError, match=r"neither logits nor hidden states, but \['pixels'\]"):
        ask(model, {"pixel_values": torch.randn(1, 3, 8, 8)})
