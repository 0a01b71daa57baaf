import copy
import pickle

import pytest
import torch
from architectures import TIED
from conftest import LENGTHS, VOCABULARY, close, same_state

from hf_adacomp import AdaCompConfig, add_tokens, compress, keep_tokens, pack
from hf_adacomp.integration.vocabulary import nearest_codes

pytestmark = pytest.mark.usefixtures("quick_fit")


def packed(name, counts, **changes):
    config = AdaCompConfig(**{"code_lengths": (4, 8, 32), "target_ratio": 3, "codebook_dtype": "int8", **changes})
    return pack(compress(TIED[name]().eval(), config, counts)).eval()


def logits(model, ids):
    with torch.no_grad():
        return model(ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})).logits


@pytest.mark.parametrize("head", ["compress", "dense"])
@pytest.mark.parametrize("name", ["bert", "gpt2", "gemma3", "t5", "bart", "marian"])
def test_new_tokens_are_there_and_old_ones_stay(name, head, counts, tmp_path):
    model = packed(name, counts, head=head)
    ids = torch.randint(4, VOCABULARY, (2, 5))
    before = logits(model, ids)
    assert add_tokens(model, 3) is model
    assert model.config.get_text_config().vocab_size == VOCABULARY + 3
    after = logits(model, ids)
    assert after.shape[-1] == VOCABULARY + 3
    assert torch.allclose(after[..., :VOCABULARY], before, atol=1e-6)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path).eval()
    assert close(logits(loaded, ids), after)
    assert same_state(loaded, model)
    assert logits(loaded, torch.tensor([[VOCABULARY + 2]])).isfinite().all()
    embedding = loaded.get_input_embeddings()
    assert (getattr(embedding, "embedding", embedding).code_lengths()[-3:] == 32).all()
    keep_tokens(loaded, VOCABULARY)
    assert torch.allclose(logits(loaded, ids), before, atol=1e-6)


def test_new_tokens_are_near_the_mean_and_differ(counts):
    model = add_tokens(packed("gpt2", counts, code_lengths=(4, 8, 64), target_ratio=2), 8)
    table = model.get_input_embeddings().to_embedding().weight
    mean = table[:VOCABULARY].mean(dim=0)
    distance = (table - mean).norm(dim=1)
    assert distance[VOCABULARY:].mean() < 0.5 * distance[:VOCABULARY].mean()
    assert len(table[VOCABULARY:].unique(dim=0)) == 8


def test_nearest_codes_find_a_vector_of_the_codebook(packed_bert):
    *_, book = packed_bert.get_input_embeddings().books
    stored, bits = book.stored(), torch.zeros(1, book.length)
    bits[0, :3] = 1
    vector = stored.decode(bits)[0].detach()
    found = stored.decode(nearest_codes(book, vector, 32, seed=0).float())
    assert (found - vector).norm(dim=1).min() < 0.5 * vector.norm()


def test_new_tokens_train_on(counts):
    model = add_tokens(packed("gpt2", counts), 2).train()
    before = model.get_input_embeddings()(torch.tensor([VOCABULARY])).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.full((2, 4), VOCABULARY)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(model.get_input_embeddings()(torch.tensor([VOCABULARY])), before)


def test_resize_token_embeddings_leads_here(counts, tmp_path):
    model = packed("gpt2", counts)
    model.save_pretrained(tmp_path)
    for each in (model, copy.deepcopy(model), type(model).from_pretrained(tmp_path), pickle.loads(pickle.dumps(model))):
        assert each.resize_token_embeddings(VOCABULARY + 1, pad_to_multiple_of=8) is each.get_input_embeddings()
        assert each.config.vocab_size == VOCABULARY + 8
        each.resize_token_embeddings(VOCABULARY - 1)
        assert logits(each, torch.tensor([[1]])).shape[-1] == VOCABULARY - 1
    assert model.resize_token_embeddings().num_embeddings == VOCABULARY - 1


def test_bad_numbers_are_refused(bert, config, counts):
    model = packed("gpt2", counts)
    with pytest.raises(ValueError, match="must not be negative; got -1"):
        add_tokens(model, -1)
    with pytest.raises(ValueError, match="cannot keep 0 of 512"):
        keep_tokens(model, 0)
    with pytest.raises(ValueError, match="cannot keep 513 of 512"):
        keep_tokens(model, VOCABULARY + 1)
    with pytest.raises(ValueError, match="while its codes are trained"):
        add_tokens(compress(bert, config, counts), 1)
    both = pack(compress(TIED["marian-split"](), AdaCompConfig(LENGTHS, target_ratio=2)))
    with pytest.raises(ValueError, match="several compressed tables"):
        add_tokens(both, 1)


def test_padding_token_cannot_be_dropped(counts):
    model = packed("bert", counts)
    model.get_input_embeddings().padding_idx = 5
    with pytest.raises(ValueError, match="cannot drop the padding token 5"):
        keep_tokens(model, 5)
