import copy
import math
import pickle

import pytest
import torch
from torch.autograd import gradcheck

from hf_adacomp.codes.codebook import BinaryCodebook
from hf_adacomp.codes.descent import BinaryStep
from hf_adacomp.config import CODEBOOK_DTYPES, FLOAT_DTYPES

METRIC = torch.diag(torch.tensor([4.0, 1.0, 1.0, 0.5], dtype=torch.float64))


def book(length=6, dim=4, *, tied=False) -> BinaryCodebook:
    return BinaryCodebook(length, dim, tied=tied, storage="float64", dtype=torch.float64)


def encode(module: BinaryCodebook, x: torch.Tensor) -> torch.Tensor:
    return module.encoder(module.stored(), METRIC.to(x)).encode(x)


def decode(module: BinaryCodebook, bits: torch.Tensor) -> torch.Tensor:
    return module.stored().decode(bits)


@pytest.fixture(autouse=True)
def exact_storage(monkeypatch):
    """A dtype of storage that rounds nothing, so that gradients can be checked by differences."""
    monkeypatch.setitem(FLOAT_DTYPES, "float64", torch.float64)


@pytest.mark.parametrize("tied", [False, True])
def test_encoder_gradient_is_that_of_the_relaxed_network(tied, monkeypatch):
    module = book(tied=tied)
    x = 0.3 * torch.randn(5, 4, dtype=torch.float64)
    target = torch.randn(5, 6, dtype=torch.float64)
    parameters = [p for p in module.parameters() if p.requires_grad]

    def gradients():
        loss = (encode(module, x) * target).sum()
        return torch.autograd.grad(loss, parameters, allow_unused=True)

    hard = gradients()
    monkeypatch.setattr(BinaryStep, "apply", lambda z, bits: (z / 2).clamp(-0.5, 0.5))
    for a, b in zip(hard, gradients(), strict=True):
        assert (a is None) == (b is None)
        assert a is None or torch.allclose(a, b)


def test_code_vectors_follow_decoding_alone():
    module = book(tied=True)
    encode(module, torch.randn(5, 4, dtype=torch.float64)).sum().backward()
    assert module.weight.grad is None
    assert module.encoder_bias.grad is not None


def test_decode_is_half_of_each_code_vector_added_or_taken_away():
    module = book()
    bits = torch.tensor([[0.5, -0.5, 0.5, 0, 0, 0], [0, 0, 0, 0, 0, 0]], dtype=torch.float64)
    decoded = decode(module, bits)
    vectors = module.stored().vectors
    assert torch.allclose(decoded[0], (vectors[0] - vectors[1] + vectors[2]) / 2 + module.bias)
    assert torch.equal(decoded[1], module.bias)
    assert torch.allclose(decode(module, bits[:, :3]), decoded)
    bits.requires_grad_()
    assert gradcheck(lambda *_: decode(module, bits), (bits, module.weight, module.bias))


@pytest.mark.parametrize("storage", CODEBOOK_DTYPES)
def test_training_sees_the_stored_vectors_and_packing_keeps_them(storage):
    module = BinaryCodebook(6, 4, tied=True, storage=storage)
    bits = torch.randint(0, 2, (9, 6)) - 0.5
    before = decode(module, bits)
    before.sum().backward()
    expected = module.rate * bits.sum(0)[:, None].expand(6, 4)
    assert torch.allclose(module.weight.grad, expected)  # straight through the rounding
    module.pack()
    assert torch.equal(decode(module, bits), before)
    saved = module.state_dict()
    assert sum(tensor.nbytes for tensor in saved.values()) == module.stored_bytes()
    other = BinaryCodebook(6, 4, tied=True, storage=storage)
    other.pack()
    other.load_state_dict(saved)
    assert torch.equal(decode(other, bits), before)


def test_orthogonality_is_zero_for_orthonormal_vectors_of_any_scale():
    module = book(length=3, dim=4)
    with torch.no_grad():
        module.weight.copy_(7 * torch.linalg.qr(torch.randn(4, 3, dtype=torch.float64))[0].T)
        assert module.orthogonality() == pytest.approx(0, abs=1e-12)
        module.weight[0] = module.weight[1]
        assert module.orthogonality() == pytest.approx(2 / 3)
    assert gradcheck(lambda _: module.orthogonality(), (module.weight,))


def test_reconstruct_in_blocks_is_encode_and_decode(monkeypatch):
    monkeypatch.setattr("hf_adacomp.codes.codebook.BITS_PER_BLOCK", 64)
    module = book()
    x = torch.randn(100, 4, dtype=torch.float64)
    assert module.block == 8
    assert torch.allclose(module.reconstruct(x, METRIC), decode(module, encode(module, x)))


def test_a_shorter_code_is_what_a_book_of_the_first_vectors_would_decide():
    module, short, x = book(tied=True), book(length=3, tied=True), torch.randn(20, 4, dtype=torch.float64)
    short.take_over(module.stored().vectors[:3], module.bias)
    found = module.encoder(module.stored(), METRIC).encode(x, 3)
    assert torch.equal(found, encode(short, x))
    assert torch.allclose(module.reconstruct(x, METRIC, 3), short.reconstruct(x, METRIC))


@pytest.mark.parametrize(("storage", "dtype"), [("float16", torch.float32), ("int4", torch.float16)])
def test_a_code_book_that_its_storage_cannot_hold_is_refused(storage, dtype):
    module = BinaryCodebook(6, 4, tied=True, storage=storage, dtype=dtype)
    most, zero = torch.finfo(torch.float16).max, torch.zeros(4)
    with pytest.raises(ValueError, match=rf"codebook_dtype='{storage}' in a model of {dtype} holds 65504"):
        module.take_over(torch.full((6, 4), 0.6 * most * module.rate), zero)
    with pytest.raises(ValueError, match="up to 100000"):
        module.take_over(torch.ones(6, 4), torch.full((4,), 1e5))
    module.take_over(torch.full((6, 4), 0.49 * most * module.rate), torch.full((4,), most))
    module.pack()
    assert all(tensor.isfinite().all() for tensor in module.stored())


def test_packing_can_be_called_again_after_it_failed(monkeypatch):
    module = BinaryCodebook(6, 4, tied=False, storage="int4")
    before = module.stored().vectors
    with monkeypatch.context() as patch:
        patch.setattr("hf_adacomp.codes.codebook.pack_nibbles", None)
        with pytest.raises(TypeError):
            module.pack()
    module.pack()
    assert torch.allclose(module.stored().vectors, before)


def test_each_vector_has_a_code_of_its_own_length():
    module, x = book(), torch.randn(20, 4, dtype=torch.float64)
    encoder = module.encoder(module.stored(), METRIC)
    lengths = torch.arange(20) % 3 + 2
    found = encoder.encode_each(x, lengths, 5)
    for row, length, code in zip(x, lengths.tolist(), found, strict=True):
        assert torch.equal(code[:length], encoder.encode(row[None], length)[0])
        assert not code[length:].any()


@pytest.mark.parametrize("length", [1, 8, 512])
def test_a_step_of_the_optimizer_moves_vectors_by_about_sqrt_half_length_steps(length):
    """Not by L/2: all code vectors of a code move the same way if its gradient says so."""
    module = BinaryCodebook(length, 4, tied=True, storage="float32")
    bits = torch.ones(1, length)
    before = decode(module, bits).detach()
    decode(module, bits).sum().backward()
    torch.optim.Adam([module.weight], lr=1e-3).step()
    moved = (before - decode(module, bits)).abs()
    assert torch.allclose(moved, torch.full_like(moved, 1e-3 * length * module.rate), rtol=1e-2)
    assert module.rate == pytest.approx(min(1, (2 / length) ** 0.5))


@pytest.mark.parametrize("storage", ["int4", "int8", "float16"])
def test_encodes_and_decodes_on_any_device(storage, device):
    module = BinaryCodebook(16, 8, tied=True, storage=storage).to(device)
    x, metric = torch.randn(30, 8, device=device), torch.eye(8, device=device)
    vectors = module.reconstruct(x, metric)
    assert vectors.device == x.device
    module.pack()
    bits = torch.ones(1, 16, device=device)
    assert torch.allclose(decode(module, bits)[0], module.stored().vectors.sum(0) + module.bias, atol=1e-5)


@pytest.mark.parametrize("storage", ["int4", "int8", "float16"])
def test_packed_floats_are_kept_in_eval_mode_alone(storage, device):
    module = BinaryCodebook(8, 6, tied=True, storage=storage, device=device)
    module.pack()
    module.eval()
    with torch.no_grad():
        kept = module.stored()
        assert module.stored() is kept
        assert module.kept_bytes == 8 * 6 * kept.vectors.element_size()
        assert copy.deepcopy(module).kept_bytes == pickle.loads(pickle.dumps(module)).kept_bytes == 0
        before = kept.vectors.clone()
        (module.weight if storage == "float16" else module.scale).mul_(2)  # whatever changes is seen
        assert torch.allclose(module.stored().vectors, 2 * before)
        assert module.to(torch.float64).stored().vectors.dtype == torch.float64
    assert module.stored().bias.requires_grad
    assert module.kept_bytes == 0
    with torch.no_grad():
        module.stored()
    module.train()
    assert module.kept_bytes == 0


@pytest.mark.parametrize("tied", [True, False])
def test_the_scale_of_the_encoder_stays_in_float32(tied):
    book = BinaryCodebook(8, 4, tied=tied, storage="int8", dtype=torch.float16)
    book.encoder_scale.fill_(1e6)
    for cast in (book.half(), book.float().half(), book.to(torch.bfloat16)):
        assert cast.encoder_scale.dtype == torch.float32
        assert cast.encoder_scale == 1e6


@pytest.mark.parametrize("length", [1, 8, 512])
@pytest.mark.parametrize("storage", CODEBOOK_DTYPES)
def test_packed_vectors_move_by_about_as_much_as_in_training(storage, length):
    """Scales are a hundred times smaller than code vectors: a step of the optimizer must not be a leap to them."""
    moved = []
    for packed in (False, True):
        torch.manual_seed(0)
        module = BinaryCodebook(length, 64, tied=True, storage=storage)
        if packed:
            module.pack()
        before, bits = module.stored().vectors.detach().clone(), torch.ones(1, length)
        (decode(module, bits) * torch.randn(64)).sum().backward()
        torch.optim.SGD([module.scale if packed and module.integer_bits else module.weight], lr=1e-2).step()
        moved.append(float((module.stored().vectors.detach() - before).norm() / before.norm()))
    assert 0.01 * moved[0] < moved[1] < 4 * moved[0]
    assert module.rate == 2.0 ** round(math.log2(module.rate))
