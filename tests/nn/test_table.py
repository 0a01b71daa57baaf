import weakref

import pytest
import torch
from conftest import LENGTHS, VOCABULARY
from torch import nn

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding
from hf_adacomp.nn.head import CompressedHead

pytestmark = pytest.mark.usefixtures("quick_fit")
DIM = 32


def test_budget_is_what_the_size_leaves_for_codes(table, config):
    assert table.budget() // 8 + table.codebook.stored_bytes() < 4 * VOCABULARY * DIM / config.target_ratio
    table.pack()
    stored = sum(tensor.nbytes for tensor in table.state_dict().values())
    assert 4 * VOCABULARY * DIM / stored >= config.target_ratio


def test_lengths_of_now_and_of_the_last_step(table):
    table.step(0.1)
    settled = table.code_lengths(settled=True)
    assert torch.equal(table.code_lengths(), settled)
    with torch.no_grad():
        table.training_state.selector.offset[:, 0] += torch.rand_like(table.training_state.selector.offset[:, 0])
    assert torch.equal(table.code_lengths(settled=True), settled)
    assert not torch.equal(table.code_lengths(), settled)


def life(dense: nn.Embedding) -> list[torch.Tensor]:
    """Vectors and logits of a table after each stage of a training, and what is stored."""
    config = AdaCompConfig(target_ratio=10, observe_fraction=0.1, select_fraction=0.5)
    table = AdaptiveCompressedEmbedding.from_embedding(dense, config)
    head, ids, found = CompressedHead(table), torch.arange(40, device="cpu") % 30, []
    for done in (0.0, 0.2, 0.7, None):
        vectors = table.train()(ids)
        (vectors.square().sum() + head(vectors).square().mean()).backward()
        if done is None:
            table.pack()
        else:
            table.step(done, show_progress=False)
        with torch.no_grad():
            found += [table.eval()(ids), head(table(ids)), table.weight.detach().clone()]
    return [*found, *table.state_dict().values()]


def test_the_default_device_is_not_asked(monkeypatch):
    monkeypatch.setattr("hf_adacomp.nn.observation.MEASURED_ROWS", 4)
    torch.manual_seed(0)
    dense = nn.Embedding(VOCABULARY, DIM)
    expected = life(dense)
    with torch.device("meta"):  # whatever is made there by mistake has no values
        found = life(dense)
    assert all(torch.equal(one, other) for one, other in zip(found, expected, strict=True))


def test_what_is_kept_does_not_stay_behind_when_a_table_moves(table):
    table.pack()
    with torch.no_grad():
        table.eval()(torch.tensor([1]))
        values = weakref.ref(table.weight_values())
        assert table.codebook.kept_bytes > 0
        assert table.packed.kept_bytes > 0
        table.to("cpu")
    assert values() is None
    assert table.codebook.kept_bytes == table.packed.kept_bytes == 0


def test_fits_again_when_more_was_observed(config, device):
    table = AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, DIM, device=device), config)
    ids = torch.arange(9, device=device)
    table.train()(ids).sum().backward()
    table.training_state.recount()
    table.eval()(ids)  # asks for a fit
    assert not table.cold
    table.train()(ids + 1).square().sum().backward()
    table.training_state.recount()
    assert table.cold
    assert table.phase == "observe"
    table.end_observation()
    assert not table.cold
    assert table.phase == "select"


def test_packed_tables_grow_by_codes_of_the_longest_length(table, device):
    table.pack()
    before = table.eval()(torch.arange(VOCABULARY, device=device))
    table.resize(torch.arange(VOCABULARY - 2, device=device), torch.ones(5, LENGTHS[-1], device=device))
    assert table.num_embeddings == VOCABULARY + 3
    after = table(torch.arange(VOCABULARY + 3, device=device))
    assert torch.allclose(after[: VOCABULARY - 2], before[:-2], atol=1e-6)
    assert (table.code_lengths()[-5:] == LENGTHS[-1]).all()
    assert table.codes(VOCABULARY + 2) == tuple(range(LENGTHS[-1]))


def test_what_is_not_there_is_asked_for_by_name(table):
    with pytest.raises(ValueError, match=r"not packed yet: call pack\(\) first"):
        table.require_packed()
    table.pack()
    for verb in ("token_counts", "end_observation", "freeze_lengths"):
        with pytest.raises(ValueError, match=f"{verb} is not possible on a packed embedding"):
            getattr(table, verb)()
    assert table.coder is table.training_state is None


@pytest.mark.parametrize("context", [torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_the_fit_is_the_same_wherever_it_is_asked_for(config, context):
    found = []
    for surrounded in (False, True):
        torch.manual_seed(0)
        table = AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, DIM), config)
        table.train()(torch.arange(9)).square().sum().backward()
        table.training_state.recount()
        with context() if surrounded else torch.no_grad():
            table.eval()(torch.arange(9))
        found.append(table.state_dict())
        table.train()(torch.arange(9)).sum().backward()  # goes on learning
    assert all(torch.equal(tensor, found[1][name]) for name, tensor in found[0].items())


def test_what_the_user_draws_next_stays_the_same(config):
    embedding = nn.Embedding(VOCABULARY, 32)
    state = torch.get_rng_state()
    AdaptiveCompressedEmbedding.from_embedding(embedding, config)
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_fit_does_not_hang_on_the_default_dtype(counts, dtype):
    """Scripts set it to build models in half precision."""
    source = nn.Embedding(VOCABULARY, 32)
    expected = AdaptiveCompressedEmbedding.from_embedding(source, AdaCompConfig(target_ratio=10), counts)
    torch.set_default_dtype(dtype)
    try:
        found = AdaptiveCompressedEmbedding.from_embedding(source, AdaCompConfig(target_ratio=10), counts)
    finally:
        torch.set_default_dtype(torch.float32)
    assert found.config == expected.config
    assert torch.equal(found.code_lengths(), expected.code_lengths())
    assert torch.allclose(found.eval().weight + 0, expected.eval().weight + 0, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_small_vectors_in_half_precision_are_fitted_as_in_float32(counts, dtype):
    config = AdaCompConfig((4, 16), target_ratio=4)
    weight = torch.randn(VOCABULARY, 32) * 0.002
    errors = []
    for kind in (torch.float32, dtype):
        table = AdaptiveCompressedEmbedding.from_embedding(
            nn.Embedding.from_pretrained(weight.to(kind)), config, counts
        )
        table.pack()
        errors.append(float((table.weight.detach().float() - weight).square().sum() / weight.square().sum()))
    assert errors[1] < 1.1 * errors[0] < 1
