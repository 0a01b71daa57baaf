import pytest
import torch
from conftest import LENGTHS, VOCABULARY
from torch import nn

from hf_adacomp import AdaptiveCompressedEmbedding
from hf_adacomp.codes.codebook import BinaryCodebook
from hf_adacomp.nn.decoding import SourceVectors, TakePart, distinct

pytestmark = pytest.mark.usefixtures("quick_fit")


@pytest.fixture
def table(config, counts, device) -> AdaptiveCompressedEmbedding:
    return AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, 32, device=device), config, counts)


@pytest.mark.parametrize("phase", ["encode", "packed"])
def test_the_code_book_is_rounded_once_a_pass(table, phase, monkeypatch):
    table.pack() if phase == "packed" else table.step(0.9)
    made = []
    original = BinaryCodebook.stored
    monkeypatch.setattr(BinaryCodebook, "stored", lambda book: made.append(book) or original(book))
    table.train()(torch.arange(VOCABULARY, device=table.device))
    assert len(made) == 1


@pytest.mark.parametrize("phase", ["encode", "packed"])
def test_tokens_by_length_are_what_they_are_at_once(table, phase, monkeypatch):
    table.pack() if phase == "packed" else table.step(0.9)
    tokens = torch.randperm(VOCABULARY, device=table.device)
    with torch.no_grad():
        decoder = table.eval().decoder()
        monkeypatch.setattr("hf_adacomp.nn.decoding.FEW", VOCABULARY)
        at_once = decoder.vectors(tokens)
        monkeypatch.setattr("hf_adacomp.nn.decoding.FEW", 0)
        assert torch.allclose(decoder.vectors(tokens), at_once, atol=1e-6)
        assert torch.allclose(decoder.table()[tokens], at_once, atol=1e-6)


def test_a_few_tokens_are_decoded_without_a_look_at_them(table, monkeypatch):
    """As on devices that one would have to wait for."""
    table.pack()
    ids = torch.randint(0, VOCABULARY, (4, 9), device=table.device)
    with torch.no_grad():
        decoder = table.eval().decoder()
        expected = decoder.look_up(ids)
        monkeypatch.setattr(type(decoder), "_unasked", lambda decoder, tokens: True)
        monkeypatch.setattr("hf_adacomp.nn.decoding.distinct", None)
        assert torch.allclose(decoder.look_up(ids), expected, atol=1e-6)
        short, longest = (table.code_lengths() == min(LENGTHS)).nonzero().squeeze(1)[:3], []
        stock = type(decoder.codes).centred
        monkeypatch.setattr(type(decoder.codes), "centred", lambda *a: longest.append(a[-1]) or stock(*a))
        decoder.look_up(short)
        assert longest == [max(LENGTHS)]
        assert decoder.look_up(ids[:, :0]).shape == (4, 0, 32)


@pytest.mark.parametrize("phase", ["select", "encode", "packed"])
@pytest.mark.parametrize("grad", [True, False])
def test_look_up_is_the_vectors_of_the_tokens(table, phase, grad, device):
    if phase == "encode":
        table.step(0.9)
    if phase == "packed":
        table.pack()
    ids = torch.randint(0, VOCABULARY, (4, 9), device=device)
    with torch.set_grad_enabled(grad):
        decoder = table.train().decoder()
        tokens = ids.unique()
        expected = dict(zip(tokens.tolist(), decoder.vectors(tokens), strict=True))
        for row, found in zip(ids.flatten().tolist(), decoder.look_up(ids).flatten(0, 1), strict=True):
            assert torch.allclose(found, expected[row], atol=1e-6)
        assert decoder.look_up(ids[:0]).shape == (0, 9, 32)


def test_source_vectors_are_looked_up_scored_and_given_as_a_whole(config, ids):
    table = AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, 32), config)
    source, hidden = table.training_state.source, torch.randn(5, 32)
    decoder = SourceVectors(table.training_state)
    assert torch.equal(decoder.look_up(ids), source[ids])
    assert torch.allclose(decoder.score(hidden), hidden @ source.T, atol=1e-5)
    assert decoder.table() is source


@pytest.mark.parametrize("bad", [-1, VOCABULARY])
def test_ids_out_of_range_are_quoted(table, bad):
    if table.codebook.bias.device.type != "cpu":
        pytest.skip("checking would wait for the device")
    with pytest.raises(IndexError, match=f"{bad}.* 512 rows"):
        table.eval()(torch.tensor([3, bad]))


def test_all_parameters_take_part_with_zero_gradients():
    vectors, first, second = (torch.randn(3, requires_grad=True) for _ in range(3))
    passed = TakePart.apply(vectors, first, second)
    assert torch.equal(passed, vectors)
    (passed * torch.arange(3)).sum().backward()
    assert vectors.grad.tolist() == [0, 1, 2]
    assert first.grad.tolist() == second.grad.tolist() == [0, 0, 0]


@pytest.mark.parametrize("count", [1, 7, 500])
def test_distinct_tokens_and_the_place_of_each_id(count, device):
    ids = torch.randint(0, VOCABULARY, (count, 2), device=device)
    tokens, place = distinct(ids, VOCABULARY)
    assert torch.equal(tokens, ids.unique())
    assert torch.equal(tokens[place], ids)
