import copy
import logging
from collections import Counter

import pytest
import torch
from accelerate import Accelerator
from conftest import LENGTHS, VOCABULARY
from torch import nn

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding

pytestmark = pytest.mark.usefixtures("quick_fit")
DIM = 32


@pytest.fixture
def source() -> nn.Embedding:
    return nn.Embedding(VOCABULARY, DIM, padding_idx=0)


@pytest.fixture
def embedding(source, config, counts) -> AdaptiveCompressedEmbedding:
    return AdaptiveCompressedEmbedding.from_embedding(source, config, counts)


def to_phase(embedding: AdaptiveCompressedEmbedding, phase: str) -> AdaptiveCompressedEmbedding:
    if phase == "encode":
        embedding.freeze_lengths()
    if phase == "packed":
        embedding.pack()
    assert embedding.phase == phase
    return embedding


phases = pytest.mark.parametrize("phase", ["select", "encode", "packed"])


@phases
@pytest.mark.parametrize("shape", [(), (0,), (7,), (2, 0), (2, 3), (2, 3, 4)])
@pytest.mark.parametrize("dtype", [torch.int32, torch.int64])
def test_takes_ids_of_any_shape_like_nn_embedding(embedding, source, phase, shape, dtype):
    ids = torch.randint(0, VOCABULARY, shape, dtype=dtype)
    vectors = to_phase(embedding, phase)(ids)
    assert vectors.shape == source(ids).shape
    assert vectors.dtype == torch.float32
    assert vectors.requires_grad or not ids.numel()


@phases
@pytest.mark.parametrize("bad", [VOCABULARY, -1])
def test_refuses_ids_out_of_range_like_nn_embedding(embedding, source, phase, bad):
    for module in (source, to_phase(embedding, phase)):
        with pytest.raises(IndexError, match="out of range"):
            module(torch.tensor([1, bad]))


def test_refuses_ids_that_are_no_integers(embedding, source):
    for module in (source, embedding):
        with pytest.raises(RuntimeError):
            module(torch.tensor([1.0]))


@phases
def test_padding_is_zero_where_the_source_was(embedding, phase):
    to_phase(embedding, phase)
    for training in (True, False):
        assert not embedding.train(training)(torch.tensor([0])).any()


def test_padding_row_that_was_not_zero_is_an_ordinary_row(source, config, counts):
    with torch.no_grad():
        source.weight[0] = 1
    embedding = AdaptiveCompressedEmbedding.from_embedding(source, config, counts)
    assert embedding.eval()(torch.tensor([0])).any()


@pytest.mark.parametrize("fraction", [None, 0.05, 0.2, 0.6])
@pytest.mark.parametrize(("codebook_dtype", "ratio"), [("int4", 32), ("int8", 26), ("float16", 18), ("float32", 12)])
def test_eval_mode_computes_what_packing_would(source, counts, fraction, codebook_dtype, ratio):
    config = AdaCompConfig(LENGTHS, target_ratio=ratio, codebook_dtype=codebook_dtype)
    embedding = AdaptiveCompressedEmbedding.from_embedding(source, config, counts)
    if fraction is not None:
        optimizer = torch.optim.Adam((p for p in embedding.parameters() if p.requires_grad), lr=1e-3)
        for step in range(4):
            embedding.train()(torch.randint(0, VOCABULARY, (9, 9))).square().mean().backward()
            embedding.step(fraction * step / 3)
            optimizer.step()
    ids = torch.arange(VOCABULARY)
    expected = embedding.eval()(ids)
    lengths = embedding.code_lengths()
    embedding.pack()
    assert torch.equal(embedding(ids), expected)
    assert torch.equal(embedding.code_lengths(), lengths)
    assert torch.equal(embedding.train()(ids), expected)


def test_evaluation_does_not_change_training(embedding):
    twin = copy.deepcopy(embedding)
    for module, looks in ((embedding, False), (twin, True)):
        torch.manual_seed(7)
        optimizer = torch.optim.Adam((p for p in module.parameters() if p.requires_grad), lr=1e-3)
        for step in range(5):
            module.train()(torch.randint(0, VOCABULARY, (50,))).square().sum().backward()
            module.step(step / 10)
            optimizer.step()
            if looks:
                module.eval()(torch.arange(5))
    assert all(torch.equal(a, b) for a, b in zip(embedding.parameters(), twin.parameters(), strict=True))
    assert torch.equal(embedding.training_state.selector.price, twin.training_state.selector.price)


def test_lengths_always_meet_the_size_and_prefer_frequent_tokens(embedding, counts):
    lengths = embedding.code_lengths()
    assert lengths.sum() <= embedding.budget()
    assert lengths.sum() > 0.98 * embedding.budget()
    assert lengths[1:20].float().mean() > lengths[-VOCABULARY // 4 :].float().mean()
    assert set(lengths.tolist()) <= set(LENGTHS)


def test_task_gradient_reaches_selector_codes_and_encoder(embedding):
    embedding.train()(torch.arange(1, 100)).square().sum().backward()
    for parameter in (
        embedding.training_state.selector.offset,
        embedding.codebook.weight,
        embedding.codebook.bias,
        embedding.codebook.encoder_bias,
    ):
        assert parameter.grad.abs().sum() > 0
    assert embedding.training_state.source.grad is None


def test_task_lengthens_the_tokens_it_needs(source, counts):
    """Tokens 400..419 are as rare as their neighbours, but only they matter to the loss."""
    config = AdaCompConfig(LENGTHS, target_ratio=32, reconstruction_weight=0, orthogonality_weight=0)
    embedding = AdaptiveCompressedEmbedding.from_embedding(source, config, counts)
    needed, needless = torch.arange(400, 420), torch.arange(420, 512)
    before = embedding.code_lengths().float()
    for step in range(60):
        (embedding.train()(needed) - source(needed)).square().sum().backward()
        embedding.step(step / 120)
    embedding.freeze_lengths()
    after = embedding.code_lengths().float()
    assert after[needed].mean() > before[needed].mean() + 4
    assert after[needless].mean() <= before[needless].mean() + 1
    assert after.sum() <= embedding.budget()


def test_step_anneals_then_freezes(embedding):
    assert (embedding.phase, embedding.temperature) == ("select", 1.0)
    embedding.step(0.25)
    assert embedding.temperature == pytest.approx(0.3**0.5)
    embedding.step(0.5)
    assert (embedding.phase, embedding.temperature) == ("encode", 0.0)
    lengths = embedding.code_lengths()
    with torch.no_grad():
        embedding.training_state.selector.offset.normal_()
    assert torch.equal(embedding.eval().code_lengths(), lengths)
    embedding.pack()
    embedding.step(0.9)  # harmless


@pytest.mark.parametrize("fraction", [-0.1, 1.1, float("nan")])
def test_step_refuses_what_is_no_share(embedding, fraction):
    with pytest.raises(ValueError, match="between 0 and 1; got"):
        embedding.step(fraction)


def test_regularisers_add_the_same_gradient_again_at_the_same_progress(embedding):
    gradients = []
    for _ in range(2):
        embedding.zero_grad()
        embedding.step(0.6)
        gradients.append([p.grad.clone() for p in embedding.codebook.parameters() if p.grad is not None])
    assert gradients[0]
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))
    before = embedding.codebook.weight.grad.clone()
    embedding.step(0.6)
    assert torch.allclose(embedding.codebook.weight.grad, 2 * before)


def test_bits_do_not_depend_on_autocast(embedding, ids):
    embedding.freeze_lengths()
    plain = embedding.eval()(ids)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(embedding(ids), plain)


@pytest.mark.parametrize("dtypes", [(torch.float16, torch.bfloat16), (torch.bfloat16, torch.float16)])
def test_a_half_precision_table_runs_under_autocast_of_the_other(embedding, ids, dtypes):
    embedding.freeze_lengths()
    plain = embedding.to(dtypes[0]).eval()(ids)
    with torch.autocast("cpu", dtypes[1]):
        assert torch.equal(embedding(ids), plain)


@phases
def test_codes_are_the_bits_that_make_the_vector_of_the_token(embedding, phase):
    to_phase(embedding, phase).eval()
    for token in (1, 17, 500):
        bits = torch.full((int(embedding.code_lengths()[token]),), -0.5)
        bits[list(embedding.codes(token))] = 0.5
        total = bits @ embedding.codebook.stored().vectors[: len(bits)] + embedding.codebook.bias
        assert torch.allclose(total, embedding(torch.tensor(token)), atol=1e-6)
    with pytest.raises(IndexError, match="512"):
        embedding.codes(512)


@phases
def test_to_embedding_has_the_same_vectors(embedding, phase):
    to_phase(embedding, phase).eval()
    plain = embedding.to_embedding()
    ids = torch.randint(0, VOCABULARY, (40,))
    assert type(plain) is nn.Embedding
    assert plain.padding_idx == 0
    assert torch.allclose(plain(ids), embedding(ids), atol=1e-6)


def test_packed_holds_no_table(embedding):
    embedding.pack()
    assert all(tensor.numel() < VOCABULARY * DIM / 4 for tensor in embedding.state_dict().values())
    for verb in ("freeze_lengths", "warm_start"):
        with pytest.raises(ValueError, match=f"{verb} is not possible on a packed"):
            getattr(embedding, verb)()


@phases
def test_deepcopy_and_repr(embedding, phase, ids):
    to_phase(embedding, phase).eval()
    assert torch.equal(copy.deepcopy(embedding)(ids), embedding(ids))
    assert f"512, 32, padding_idx=0, phase='{phase}', code_lengths=(4, 8, 28), target_ratio=32" in repr(embedding)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
def test_follows_the_dtype_of_the_source(config, counts, dtype, ids):
    source = nn.Embedding(VOCABULARY, DIM, dtype=dtype)
    embedding = AdaptiveCompressedEmbedding.from_embedding(source, config, counts)
    expected = embedding.eval()(ids)
    assert expected.dtype == dtype
    embedding.pack()
    assert torch.equal(embedding(ids), expected)


def test_without_counts_it_warns_and_fits_the_plain_table(source, config, ids, caplog):
    embedding = AdaptiveCompressedEmbedding.from_embedding(source, config)
    with caplog.at_level(logging.WARNING, "hf_adacomp"):
        embedding.eval()(ids)
    assert "fitted as if all were equally frequent" in caplog.text


def test_constructor_makes_what_nn_embedding_would(config):
    embedding = AdaptiveCompressedEmbedding(VOCABULARY, DIM, config, padding_idx=-1, dtype=torch.float64)
    assert embedding.padding_idx == VOCABULARY - 1
    assert embedding.training_state.source.shape == (VOCABULARY, DIM)
    assert not embedding.training_state.source[-1].any()
    skeleton = AdaptiveCompressedEmbedding(VOCABULARY, DIM, config, device="meta")
    assert skeleton.training_state.source.is_meta
    assert "phase='observe'" in repr(skeleton)


class Scaled(nn.Embedding):
    def forward(self, input):
        return 2 * super().forward(input)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (Scaled(VOCABULARY, DIM), "cannot compress Scaled"),
        (nn.Embedding(VOCABULARY, DIM, sparse=True), "sparse=True"),
        (nn.Embedding(VOCABULARY, DIM, max_norm=1.0), "max_norm=1.0"),
        (
            nn.Embedding.from_pretrained(torch.full((VOCABULARY, DIM), float("inf"))),
            "NaN or Inf, first in the row of token 0",
        ),
        (nn.Linear(4, 4), "cannot compress Linear"),
    ],
)
def test_refuses_what_it_does_not_understand(source, config, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveCompressedEmbedding.from_embedding(source, config)


@pytest.mark.parametrize(
    ("counts", "message"),
    [
        (torch.ones(3), r"shape \(512,\); got \(3,\)"),
        (-torch.ones(VOCABULARY), "negative; got -1.0 for token 0"),
        (torch.full((VOCABULARY,), float("nan")), "finite"),
        (torch.full((VOCABULARY,), 1e30), r"below 2\^63; got 1e\+30"),
        (Counter(range(VOCABULARY)), r"a tensor \(512,\); got a Counter"),
        ("counts", r"a tensor \(512,\); got a str"),
        (torch.ones(VOCABULARY, dtype=torch.complex64), "dense tensor of whole numbers; got torch.complex64"),
        (torch.ones(VOCABULARY, device="meta"), "on meta"),
        (torch.ones(VOCABULARY).to_sparse(), "torch.sparse_coo"),
    ],
)
def test_refuses_bad_counts(source, config, counts, message):
    with pytest.raises(ValueError, match=message):
        AdaptiveCompressedEmbedding.from_embedding(source, config, counts)


def test_refuses_a_size_that_code_books_exceed(source):
    with pytest.raises(ValueError, match=r"target_ratio=40 .*largest ratio that fits is"):
        AdaptiveCompressedEmbedding.from_embedding(source, AdaCompConfig((8, 64, 256), target_ratio=40))


def test_refuses_to_load_the_other_form(embedding):
    training, packed = copy.deepcopy(embedding), embedding
    packed.pack()
    with pytest.raises(RuntimeError, match=r"holds the packed form .* model is in its training form"):
        training.load_state_dict(packed.state_dict(), strict=False)
    with pytest.raises(RuntimeError, match="holds the training form"):
        packed.load_state_dict(training.state_dict(), strict=False)


def test_plain_module_trains_in_a_plain_loop(config, counts):
    """A model of one's own: from_embedding, step, pack, state_dict."""
    model = nn.Sequential(nn.Embedding(VOCABULARY, DIM), nn.Flatten(), nn.Linear(6 * DIM, 2))
    model[0] = AdaptiveCompressedEmbedding.from_embedding(model[0], config, counts)
    optimizer = torch.optim.Adam((p for p in model.parameters() if p.requires_grad), lr=1e-3)
    ids = torch.randint(0, VOCABULARY, (64, 6))
    labels = ids[:, 0] % 2
    losses = []
    for step in range(40):
        loss = nn.functional.cross_entropy(model(ids), labels)
        loss.backward()
        model[0].step(step / 40)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert model[0].phase == "encode"
    assert losses[-1] < 0.5 * losses[0]
    model[0].pack()
    assert torch.isfinite(model.eval()(ids)).all()


@pytest.mark.parametrize("given", [True, False])
def test_learns_on_any_device(config, counts, given, device):
    """From the source to packed codes, and moved to the CPU as it is then."""
    source = nn.Embedding(VOCABULARY, DIM, padding_idx=0, device=device)
    table = AdaptiveCompressedEmbedding.from_embedding(source, config, counts.to(device) if given else None)
    optimizer = torch.optim.Adam((p for p in table.parameters() if p.requires_grad), lr=1e-3)
    for step in range(6):
        table.train()(torch.randint(0, VOCABULARY, (9, 9), device=device)).square().mean().backward()
        table.step(step / 6)
        optimizer.step()
        optimizer.zero_grad()
    assert table.phase == "encode"
    table.eval().pack()
    assert {tensor.device for tensor in table.state_dict().values()} == {source.weight.device}
    vectors = table(torch.arange(VOCABULARY, device=device)).cpu()
    assert torch.allclose(table.cpu()(torch.arange(VOCABULARY)), vectors, atol=1e-5)


@pytest.mark.parametrize("config", [None, "40", 40, {"target_ratio": 40}])
def test_settings_of_another_kind_are_quoted(config):
    with pytest.raises(ValueError, match="config must be an AdaCompConfig"):
        AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(8, 8), config)
    with pytest.raises(ValueError, match="config must be an AdaCompConfig"):
        AdaptiveCompressedEmbedding(8, 8, config)


def test_progress_may_be_a_tensor(embedding):
    embedding.step(torch.tensor(0.3))
    assert embedding.phase == "select"


def test_a_step_where_accelerate_accumulates_gradients_is_refused(source, config, counts):
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    table = AdaptiveCompressedEmbedding.from_embedding(source, config, counts)
    for last in (False, True):
        with accelerator.accumulate(table):
            table(torch.tensor([3, 4])).sum().backward()
            if last:
                table.step(0.5, show_progress=False)
            else:
                with pytest.raises(ValueError, match=r"if accelerator.sync_gradients: embedding.step\(fraction\)"):
                    table.step(0.5)
    assert table.phase == "encode"
