from weakref import WeakSet

import pytest
import torch
from conftest import LENGTHS, VOCABULARY, LargestTensor
from torch import nn

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding
from hf_adacomp.nn.decoding import Decoder
from hf_adacomp.nn.head import CompressedHead

pytestmark = pytest.mark.usefixtures("quick_fit")


@pytest.fixture
def table(counts) -> AdaptiveCompressedEmbedding:
    config = AdaCompConfig(LENGTHS, target_ratio=20, observe_fraction=0)
    return AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, 32, padding_idx=0), config, counts)


@pytest.fixture(params=[(1, 1), (2, 3), (2, 20)], ids=["one_position", "few_positions", "many_positions"])
def hidden(request) -> torch.Tensor:
    return torch.randn(*request.param, 32, requires_grad=True)


@pytest.mark.parametrize("phase", ["select", "encode", "packed"])
def test_logits_are_those_of_the_decoded_table(table, hidden, phase):
    if phase == "encode":
        table.step(0.9)
    if phase == "packed":
        table.pack()
    table.eval()
    bias = nn.Parameter(torch.randn(VOCABULARY))
    expected = hidden @ table.to_embedding().weight.T
    assert torch.allclose(CompressedHead(table)(hidden), expected, atol=1e-5)
    assert torch.allclose(CompressedHead(table, bias)(hidden), expected + bias, atol=1e-5)


@pytest.mark.parametrize("ladder", [(4,), (3, 7, 30), (4, 12)])
def test_codes_of_no_whole_bytes(hidden, counts, ladder):
    config = AdaCompConfig(ladder, target_ratio=5, codebook_dtype="int4")
    table = AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, 32), config, counts)
    table.pack()
    assert torch.allclose(CompressedHead(table)(hidden), hidden @ table.to_embedding().weight.T, atol=1e-5)


@pytest.mark.parametrize("blocks", [1, 1000])
def test_gradients_are_those_of_the_dense_product(table, hidden, blocks, monkeypatch):
    monkeypatch.setattr("hf_adacomp.nn.decoding.BITS_PER_BLOCK", VOCABULARY * LENGTHS[-1] // blocks)
    table.step(0.9)
    table.train()
    outputs = (CompressedHead(table)(hidden), hidden @ table(torch.arange(VOCABULARY)).T)
    weights = torch.randn_like(outputs[0])
    parameters = [hidden, *(p for p in table.codebook.parameters() if p.requires_grad)]
    ours, dense = (
        torch.autograd.grad((logits * weights).sum(), parameters, allow_unused=True, materialize_grads=True)
        for logits in outputs
    )
    assert all(torch.allclose(a, b, atol=1e-3) for a, b in zip(ours, dense, strict=True))


def test_gradients_of_a_table_that_is_tied_come_once_from_each_end(table, monkeypatch):
    """Hidden states hang on the code-book, too, through the look-up."""
    monkeypatch.setattr("hf_adacomp.nn.decoding.BITS_PER_BLOCK", VOCABULARY * LENGTHS[-1] // 7)
    table.step(0.9)
    table.train()
    weights = torch.randn(3, VOCABULARY)
    inputs = [table.codebook.weight, table.codebook.bias]
    ours, expected = (
        torch.autograd.grad((logits * weights).sum(), inputs)
        for logits in (
            CompressedHead(table)(table(torch.arange(3))),
            table(torch.arange(3)) @ table(torch.arange(VOCABULARY)).T,
        )
    )
    assert all((a - b).norm() < 1e-3 * b.norm() for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("trains", [True, False])
def test_adapters_train_before_a_packed_head(table, hidden, trains):
    table.pack()
    table.train().requires_grad_(trains)
    (found,) = torch.autograd.grad(CompressedHead(table)(hidden).square().sum(), hidden)
    vectors = table.to_embedding().weight
    assert torch.allclose(found, 2 * hidden @ vectors.T @ vectors, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("read", ["head", "weight"])
def test_second_derivatives_are_those_of_the_dense_product(table, hidden, read, monkeypatch):
    """As a gradient penalty needs them."""
    monkeypatch.setattr("hf_adacomp.nn.decoding.BITS_PER_BLOCK", VOCABULARY * LENGTHS[-1] // 7)
    table.step(0.9)
    table.train()
    inputs = [hidden, table.codebook.weight, table.codebook.bias]

    def of_penalty(logits: torch.Tensor) -> tuple[torch.Tensor, ...]:
        gradients = torch.autograd.grad(logits.pow(3).mean(), inputs, create_graph=True)
        return torch.autograd.grad(sum(gradient.square().sum() for gradient in gradients), inputs)

    ours = of_penalty(CompressedHead(table)(hidden) if read == "head" else hidden @ table.weight.T)
    expected = of_penalty(hidden @ table(torch.arange(VOCABULARY)).T)
    assert all((a - b).norm() < 1e-3 * b.norm() for a, b in zip(ours, expected, strict=True))


@pytest.mark.parametrize("phase", ["select", "encode"])
def test_training_keeps_hidden_states_alone(table, hidden, phase):
    """Neither vectors nor bits of the vocabulary wait for the way back: Gemma's would take 24 GB."""
    table.step(0.01 if phase == "select" else 0.9)
    table.train()
    waiting = WeakSet()

    class Saved:
        def __init__(self, tensor):
            self.tensor = tensor
            waiting.add(self)

    with torch.autograd.graph.saved_tensors_hooks(Saved, lambda saved: saved.tensor):
        logits = CompressedHead(table)(hidden)
    assert logits.requires_grad
    assert waiting
    assert max(saved.tensor.numel() for saved in waiting) < VOCABULARY * 32 / 4


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_gradients_of_hidden_states_have_their_dtype_and_its_precision(table, hidden, dtype):
    table.step(0.9)
    table.train()
    states = hidden.detach().to(dtype).requires_grad_()
    logits = CompressedHead(table)(states)
    weights = torch.randn_like(logits)
    (found,) = torch.autograd.grad(logits, states, weights)
    expected = weights @ table(torch.arange(VOCABULARY)).detach().to(dtype)
    assert logits.dtype == found.dtype == dtype
    error = (found - expected).norm() / expected.norm()
    assert error < (1e-2 if dtype == torch.bfloat16 else 1e-6)


def test_mixture_is_that_of_the_embedding(table, hidden):
    """With the same Gumbel noise, the logits are products with the mixed vectors."""
    table.train()
    expected = hidden @ table(torch.arange(VOCABULARY)).T
    assert torch.allclose(CompressedHead(table)(hidden), expected, atol=1e-5)
    table.step(0.01)  # other noise
    assert not torch.allclose(CompressedHead(table)(hidden), expected, atol=1e-2)


def test_no_dense_table_is_ever_made(table, monkeypatch):
    table.pack()
    for name in ("head.UNPACKED_BITS", "decoding.BITS_PER_BLOCK"):
        monkeypatch.setattr(f"hf_adacomp.nn.{name}", 64 * LENGTHS[-1])
    for positions, width in ((1, None), (64, 32)):  # logits of many positions are larger than a table
        with torch.no_grad(), LargestTensor(width) as seen:
            CompressedHead(table)(torch.randn(positions, 32))
        assert 0 < seen.most < VOCABULARY * 32 / 4


@pytest.mark.parametrize("phase", ["observe", "select", "encode", "packed"])
@pytest.mark.parametrize("positions", [3, 20])
def test_scores_on_any_device(counts, phase, positions, device):
    config = AdaCompConfig(LENGTHS, target_ratio=20, observe_fraction=0.05 if phase == "observe" else 0)
    source = nn.Embedding(VOCABULARY, 32, padding_idx=0, device=device)
    table = AdaptiveCompressedEmbedding.from_embedding(source, config, counts.to(device))
    if phase == "encode":
        table.step(0.9)
    if phase == "packed":
        table.pack()
    assert table.phase == phase
    hidden = torch.randn(positions, 32, device=device, requires_grad=True)
    for training in (True, False):
        logits = CompressedHead(table.train(training))(hidden)
        assert logits.shape == (positions, VOCABULARY)
        assert logits.device == hidden.device
        logits.square().sum().backward()
    assert hidden.grad.isfinite().all()


@pytest.mark.parametrize("progress", [0.3, 0.9])
def test_generation_in_training_decodes_once_until_something_changes(progress, config, counts, monkeypatch):
    table = AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, 32), config, counts)
    table.step(progress, show_progress=False)
    head, made = CompressedHead(table).train(), []
    decode = Decoder.table
    monkeypatch.setattr(Decoder, "table", lambda decoder: made.append(decoder) or decode(decoder))
    hidden = torch.randn(2, 32)
    with torch.no_grad():
        for _ in range(4):
            table(torch.tensor([3]))
            found = head(hidden)
    assert len(made) == 1
    assert torch.allclose(found, hidden @ table.decoder().table().T, atol=1e-5)
    table.step(progress + 0.01, show_progress=False)
    with torch.no_grad():
        assert torch.allclose(head(hidden), hidden @ table.decoder().table().T, atol=1e-5)
    table(torch.tensor([3]))
    assert table.last_weight._kept is None
