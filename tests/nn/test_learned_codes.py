import pytest
import torch
from conftest import LENGTHS, VOCABULARY
from torch import nn

from hf_adacomp import AdaptiveCompressedEmbedding
from hf_adacomp.codes.packed import PackedCodes
from hf_adacomp.nn.learned_codes import LearnedCodes

pytestmark = pytest.mark.usefixtures("quick_fit")


@pytest.fixture
def codes(config, counts, device) -> LearnedCodes:
    source = nn.Embedding(VOCABULARY, 32, device=device)
    table = AdaptiveCompressedEmbedding.from_embedding(source, config, counts.to(device))
    return table.hard_decoder().codes


def test_each_token_has_a_code_of_its_length(codes, device):
    tokens = torch.randperm(VOCABULARY, device=device)[:90]
    lengths, places = codes.locate(tokens)
    bits = codes.centred(lengths, places, LENGTHS[-1])
    assert bits.count_nonzero(dim=1).tolist() == [LENGTHS[k] for k in lengths.tolist()]
    assert set(bits.unique().tolist()) == {-0.5, 0.0, 0.5}


def test_a_mixture_is_that_of_the_codes_of_all_lengths(codes, device):
    tokens, shares = torch.arange(40, device=device), torch.rand(40, len(LENGTHS), device=device)
    expected = sum(
        shares[:, k, None] * codes.centred(torch.full_like(tokens, k), tokens, LENGTHS[-1]) for k in range(len(LENGTHS))
    )
    assert torch.allclose(codes.mixed(shares, tokens), expected)


def test_gradients_of_a_mixture_reach_shares_and_encoder(codes, device):
    shares = torch.rand(40, len(LENGTHS), device=device, requires_grad=True)
    codes.mixed(shares, torch.arange(40, device=device)).square().sum().backward()
    assert shares.grad.all()
    assert codes.codebook.encoder_bias.grad.any()


def test_groups_hold_the_same_codes_packed(codes, device):
    groups = torch.cat([codes.group(k) for k in range(len(LENGTHS))])
    packed = PackedCodes.of(codes.assignment(), LENGTHS, groups)
    assert packed.tokens_per_length == tuple(codes.tokens_per_length)
    assert torch.equal(packed.order(), codes.order())
    tokens = torch.arange(VOCABULARY, device=device)
    found = (each.centred(*each.locate(tokens), LENGTHS[-1]) for each in (packed, codes))
    assert torch.equal(*found)
