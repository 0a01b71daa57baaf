import copy

import pytest
import torch
from conftest import LENGTHS, WORDS, tiny_bert_config, word_tokenizer
from transformers import BertForSequenceClassification

from hf_adacomp import AdaCompConfig, calibrate, compress, pack
from hf_adacomp.integration import agreement
from hf_adacomp.integration.agreement import Agreement
from hf_adacomp.integration.batches import text_batches

pytestmark = pytest.mark.usefixtures("quick_fit")
TEXTS = [f"{WORDS[i]} {WORDS[2 * i]}" for i in range(60)]


@pytest.mark.parametrize("limit", [1 << 26, 50])
def test_cosines_are_those_of_dense_and_packed_answers(bert, monkeypatch, limit):
    monkeypatch.setattr(agreement, "MOST_NUMBERS", limit)
    dense = copy.deepcopy(bert)
    model = compress(bert.train(), AdaCompConfig(code_lengths=LENGTHS, target_ratio=20))
    batches = text_batches(model, TEXTS, word_tokenizer(), batch_size=10)
    agreed = Agreement(model, batches)
    assert model.training
    pack(calibrate(model, TEXTS, word_tokenizer(), show_progress=False)).eval()
    found = agreed.cosines()
    with torch.no_grad():
        said = [[one(**batch).logits for batch in batches] for one in (dense, model)]
    expected = torch.nn.functional.cosine_similarity(*(torch.cat(rows) for rows in said))
    assert len(found) == (60 if limit > 50 else 30)
    assert torch.allclose(found, expected[: len(found)], atol=1e-5)


def test_single_numbers_agree_by_their_correlation():
    model = compress(
        BertForSequenceClassification(tiny_bert_config(num_labels=1)), AdaCompConfig(LENGTHS, target_ratio=20)
    )
    batches = text_batches(model, TEXTS, word_tokenizer(), batch_size=10)
    agreed = Agreement(model, batches)
    before = torch.cat(agreed.dense).flatten()
    pack(calibrate(model, TEXTS, word_tokenizer(), show_progress=False)).eval()
    with torch.no_grad():
        now = torch.cat([model(**batch).logits for batch in batches]).flatten()
    assert agreed.of_numbers
    assert torch.allclose(agreed.cosines(), torch.corrcoef(torch.stack([now, before]))[0, 1:])
