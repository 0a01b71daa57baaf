import numpy as np
import pytest
import torch
from architectures import TIED, logits, packed
from conftest import LENGTHS, VOCABULARY, close, same_state
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPVisionConfig, RobertaConfig, RobertaModel

from hf_adacomp import AdaCompConfig, add_tokens, compress, keep_tokens, pack

pytestmark = pytest.mark.usefixtures("quick_fit")
SETTINGS = AdaCompConfig((4, 8, 32), target_ratio=3, codebook_dtype="int8")


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


def test_tokens_of_two_calls_differ(counts):
    model = add_tokens(add_tokens(packed("bert", counts), 1), 1)
    one, other = model.get_input_embeddings()(torch.tensor([VOCABULARY, VOCABULARY + 1]))
    assert not torch.equal(one, other)


def test_new_tokens_train_on(counts):
    model = add_tokens(packed("gpt2", counts), 2).train()
    before = model.get_input_embeddings()(torch.tensor([VOCABULARY])).detach()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    ids = torch.full((2, 4), VOCABULARY)
    model(ids, labels=ids).loss.backward()
    optimizer.step()
    assert not torch.equal(model.get_input_embeddings()(torch.tensor([VOCABULARY])), before)


def test_bad_numbers_are_refused(bert, config, counts):
    model = packed("gpt2", counts)
    with pytest.raises(ValueError, match="not negative; got -1"):
        add_tokens(model, -1)
    with pytest.raises(ValueError, match="cannot keep 0 of 512"):
        keep_tokens(model, 0)
    with pytest.raises(ValueError, match="cannot keep 513 of 512"):
        keep_tokens(model, VOCABULARY + 1)
    with pytest.raises(ValueError, match="while its codes are trained"):
        add_tokens(compress(bert, config, counts), 1)
    both = pack(compress(TIED["marian-split"](), AdaCompConfig(LENGTHS, target_ratio=2)))
    with pytest.raises(ValueError, match="tables of several vocabularies"):
        add_tokens(both, 1)


def test_padding_token_cannot_be_dropped(counts):
    model = packed("bert", counts)
    model.get_input_embeddings().padding_idx = 5
    with pytest.raises(ValueError, match="cannot drop the padding token 5"):
        keep_tokens(model, 5)


@pytest.mark.parametrize("name", ["gpt2", "gemma3", "bert"])
def test_listed_tokens_are_kept_in_their_order(name, counts, tmp_path):
    model = packed(name, counts)
    kept = torch.tensor([0, 1, 2, 3, *range(300, 99, -1)])
    places = torch.arange(len(kept))
    before = logits(model, kept[None, :20])
    vectors = model.get_input_embeddings()(kept)
    assert keep_tokens(model, kept) is model
    assert torch.equal(model.get_input_embeddings()(places), vectors)
    after = logits(model, places[None, :20])
    assert torch.allclose(after, before[..., kept], atol=1e-5)
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert same_state(loaded, model)
    assert loaded.config.get_text_config().vocab_size == len(kept)


def test_a_padding_token_that_positions_start_at_keeps_its_id(counts):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = RobertaModel(RobertaConfig(vocab_size=VOCABULARY, pad_token_id=1, **sizes)).eval()
    pack(compress(model, AdaCompConfig((4, 8, 32), target_ratio=3), counts))
    with pytest.raises(ValueError, match=r"counts positions from its padding token 1.*give it the place 1"):
        keep_tokens(model, [1, 0, 5])
    before = model(torch.tensor([[5, 7]])).last_hidden_state
    keep_tokens(model, [7, 1, 5])
    assert close(model(torch.tensor([[2, 0]])).last_hidden_state, before)


def test_positions_of_sines_start_at_the_padding_token_too(counts):
    model = packed("m2m100", counts)
    with pytest.raises(ValueError, match=r"counts positions from its padding token 0"):
        keep_tokens(model, [1, 0, *range(2, 12)])


@pytest.mark.parametrize("form", [set, dict.fromkeys, iter, np.array, lambda ids: np.array(ids, dtype=np.uint16)])
def test_ids_are_kept_in_any_form(packed_bert, form):
    tokens = form([0, 3, 7])
    assert keep_tokens(packed_bert, tokens.keys() if isinstance(tokens, dict) else tokens).config.vocab_size == 3


def test_numbers_and_vectors_of_numpy(counts):
    model = keep_tokens(packed("gpt2", counts), np.int64(100))
    vectors = model.get_input_embeddings()(torch.tensor([5, 6])).detach()
    add_tokens(model, 2, vectors=vectors.numpy())
    assert add_tokens(model, 2, vectors=vectors.tolist()).config.vocab_size == 104


@pytest.mark.parametrize(
    ("tokens", "message"),
    [
        ([True, False], "cannot keep"),
        ([], "cannot keep"),
        ([0, 5, 5], "different ids from 0 to 511"),
        ([0, 512], "different ids from 0 to 511"),
        ([0, -1], "different ids"),
        (torch.tensor([0.0, 1.0]), "cannot keep"),
        ([1, 2], "cannot drop the padding token 0"),
        (513, "cannot keep 513 of 512 tokens"),
        (-1, "cannot keep -1 of 512 tokens"),
        (None, "their number or their ids; got None"),
        (["a", "b"], r"their number or their ids; got \['a', 'b'\]"),
        ({0: 5, 3: 7}, "their number or their ids; got {0: 5"),
    ],
)
def test_tokens_that_cannot_be_kept_are_quoted(packed_bert, tokens, message):
    with pytest.raises(ValueError, match=message):
        keep_tokens(packed_bert, tokens)


@pytest.mark.parametrize("name", ["gpt2", "gemma3"])
def test_new_tokens_start_at_given_vectors(name, counts):
    model = packed(name, counts, code_lengths=(4, 8, 64), target_ratio=2)
    table = model.get_input_embeddings()
    pieces = table(torch.tensor([[5, 6], [7, 8], [20, 30]])).mean(1)
    mean = table(torch.arange(VOCABULARY)).mean(0)
    add_tokens(model, 3, vectors=pieces)
    new = table(torch.arange(VOCABULARY, VOCABULARY + 3))
    assert ((new - pieces).norm(dim=1) < 0.7 * (mean - pieces).norm(dim=1)).all()


def test_vectors_of_another_shape_are_quoted(packed_bert):
    with pytest.raises(ValueError, match=r"of shape \(2, 32\); got shape \(3, 32\)"):
        add_tokens(packed_bert, 2, vectors=torch.zeros(3, 32))
    with pytest.raises(ValueError, match="finite"):
        add_tokens(packed_bert, 2, vectors=torch.full((2, 32), torch.nan))


def text_and_images() -> CLIPModel:
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = CLIPTextConfig(vocab_size=VOCABULARY, eos_token_id=2, **sizes)
    vision = CLIPVisionConfig(image_size=8, patch_size=4, **sizes)
    return CLIPModel(CLIPConfig(text_config=text.to_dict(), vision_config=vision.to_dict(), projection_dim=32)).eval()


@pytest.mark.parametrize("number", [2.0, "3", None, True])
def test_numbers_of_tokens_of_another_kind_are_quoted(packed_bert, number):
    with pytest.raises(ValueError, match=f"whole number, not negative; got {number!r}"):
        add_tokens(packed_bert, number)
