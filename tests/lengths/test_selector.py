import pytest
import torch
from torch.autograd import gradcheck

from hf_adacomp.lengths.selector import SHARPNESS, LengthSelector, gumbel_noise

LENGTHS = (4, 8, 20)


def in_double(module: LengthSelector) -> LengthSelector:
    """With float64 tensors, for exact comparisons; casting the module would leave it as it is."""
    module.offset = torch.nn.Parameter(module.offset.detach().double())
    for name in ("cost", "price", "mean", "square"):
        setattr(module, name, getattr(module, name).double())
    return module


def selector(tokens=50, reach=8.0) -> LengthSelector:
    module = in_double(LengthSelector(tokens, LENGTHS, reach))
    with torch.no_grad():
        module.cost.uniform_(0, 3)
        module.offset.normal_()
    return module


def noise(tokens, seed=0):
    return gumbel_noise(tokens, len(LENGTHS), seed, torch.device("cpu")).double()


def test_noise_is_gumbels_and_a_function_of_the_seed():
    values = noise(50_000)
    assert values.mean().item() == pytest.approx(0.5772, abs=0.02)  # Euler's constant
    assert values.var().item() == pytest.approx(torch.pi**2 / 6, abs=0.05)
    assert torch.equal(values, noise(50_000))
    assert not torch.equal(values, noise(50_000, seed=1))


def test_sample_is_the_tempered_softmax_of_noisy_logits():
    module, tokens = selector(), torch.tensor([3, 3, 7])
    logits = module.offset[tokens] - module.cost[tokens] - module.price * torch.tensor(LENGTHS)
    shares = module(tokens, 0.5, noise(3))
    assert torch.allclose(shares, ((logits + noise(3)) / 0.5).softmax(1))
    assert torch.allclose(shares.sum(1), torch.ones(3, dtype=torch.float64))


def test_gradient_of_a_sample_matches_finite_differences():
    module, tokens = selector(), torch.tensor([3, 7])
    assert gradcheck(lambda _: module(tokens, 0.7, noise(2)), (module.offset,))


@pytest.mark.parametrize("steps", [5, 60])
def test_a_gradient_that_keeps_its_sign_moves_a_logit_by_the_reach_however_many_steps(steps):
    module = selector(reach=8.0)
    before = module.offset.detach().clone()
    for _ in range(steps):
        module.offset.grad = torch.zeros_like(module.offset)
        module.offset.grad[1, 2], module.offset.grad[2, 0] = -1e-3, 50.0
        module.learn(1 / steps)
        assert module.offset.grad is None
    moved = module.offset - before
    assert moved[1, 2].item() == pytest.approx(8, rel=1e-3)
    assert moved[2, 0].item() == pytest.approx(-8, rel=1e-3)
    assert moved.count_nonzero() == 2


def test_steps_are_those_of_adam():
    module, steps = selector(reach=0.5), 7
    twin = torch.nn.Parameter(module.offset.detach().clone())
    optimizer = torch.optim.Adam([twin], lr=0.5 / steps)
    for _ in range(steps):
        module.offset.grad = torch.randn_like(twin)
        twin.grad = module.offset.grad.clone()
        module.learn(1 / steps)
        optimizer.step()
    assert torch.allclose(module.offset, twin)
    before = module.offset.detach().clone()
    module.learn(1.0)  # without a gradient there is nothing to learn
    assert torch.equal(module.offset, before)


def test_samples_follow_the_logits():
    module = selector(tokens=1)
    logits = module.scores()[0] - module.price * torch.tensor(LENGTHS)
    picks = module(torch.zeros(20_000, dtype=torch.int64), 0.3, noise(20_000)).argmax(1)
    share = torch.bincount(picks, minlength=3) / len(picks)
    assert torch.allclose(share.double(), logits.softmax(0), atol=0.015)


def test_costs_are_scaled_to_the_price_and_meet_the_size():
    module = selector(tokens=200)
    distortion = torch.rand(200, 1) * torch.tensor([[9.0, 5.0, 1.0]]) * 1e-4
    module.set_cost(distortion, 200 * 10)
    assert float(module.price) * LENGTHS[-1] == pytest.approx(SHARPNESS)
    assert not module.offset.any()
    assignment, price = module.solve(200 * 10)
    assert price == pytest.approx(float(module.price))
    assert 200 * 9.9 <= torch.tensor(LENGTHS)[assignment].sum() <= 200 * 10


def test_learned_offsets_move_lengths_within_the_same_size():
    module = selector(tokens=200)
    module.set_cost(torch.rand(200, 1) * torch.tensor([[9.0, 5.0, 1.0]]), 200 * 10)
    before, _ = module.solve(200 * 10)
    token = int((before == 0).nonzero()[0])
    with torch.no_grad():
        module.offset[token, 2] += 20
    after, _ = module.solve(200 * 10)
    assert after[token] == 2
    assert torch.tensor(LENGTHS)[after].sum() <= 200 * 10


def test_a_size_that_does_not_bind_keeps_costs_comparable_to_noise():
    module = selector(tokens=200)
    module.set_cost(torch.rand(200, 1) * torch.tensor([[9.0, 5.0, 1.0]]) * 1e-4, 200 * LENGTHS[-1])
    assert float(module.price) == 0
    gap = (module.cost[:, 0] - module.cost[:, -1]).mean()
    assert gap.item() == pytest.approx(SHARPNESS * (LENGTHS[-1] - LENGTHS[0]) / LENGTHS[-1])
    single = LengthSelector(5, (8,), 8.0)
    single.set_cost(torch.rand(5, 1), 40)
    assert torch.isfinite(single.cost).all()


def test_starts_without_preference_at_the_longest_codes_price():
    module = LengthSelector(6, LENGTHS, 8.0)
    assert (module.reach, module.ladder) == (8.0, LENGTHS)
    assert {name: tensor.dtype for name, tensor in module.state_dict().items()} == {
        **dict.fromkeys(("offset", "cost", "price", "mean", "square"), torch.float32),
        "steps": torch.int64,
    }
    assert float(module.price) == pytest.approx(SHARPNESS / LENGTHS[-1])
    assert not module.offset.any()
    assert not module.cost.any()
    assert module.offset.shape == module.cost.shape == (6, 3)
    assert [name for name, parameter in module.named_parameters() if parameter.requires_grad] == ["offset"]


def test_everything_stays_on_its_device():
    """Meta tensors refuse to meet tensors of another device, so that one machine stands for all."""
    module = LengthSelector(6, LENGTHS, 8.0, device="meta")
    assert {tensor.device.type for tensor in module.state_dict().values()} == {"meta"}
    assert module(torch.zeros(2, dtype=torch.int64, device="meta"), 0.5, torch.zeros(2, 3, device="meta")).is_meta


def test_costs_keep_their_proportions_and_learned_offsets_are_forgotten():
    module = selector(tokens=200)
    distortion = torch.rand(200, 3).sort(dim=1, descending=True).values
    module.set_cost(distortion, 200 * 10)
    ratio = module.cost / distortion
    assert torch.allclose(ratio, ratio[0, 0].expand_as(ratio))
    assert not module.offset.any()
    assert torch.equal(module.solve(200 * 10)[0], module.solve(200 * 10)[0])


@pytest.mark.parametrize("lengths", [(8,), (4, 12)])
def test_costs_that_say_nothing_are_left_at_their_scale(lengths):
    """Where longer codes save nothing there is no price to scale by."""
    module = in_double(LengthSelector(5, lengths, 400.0))
    distortion = torch.rand(5, 1, dtype=torch.float64).expand(5, len(lengths))
    module.set_cost(distortion, 5 * lengths[-1])
    assert torch.equal(module.cost, distortion)
    assert float(module.price) == 0


def test_price_of_a_size_that_does_not_bind_is_what_a_bit_saves():
    module = in_double(LengthSelector(2, (4, 12), 1.0))
    module.set_cost(torch.tensor([[3.0, 1.0], [5.0, 1.0]]), 2 * 12)  # 2 and 4 for 8 bits: 3/8 a bit
    assert torch.allclose(module.cost, torch.tensor([[3.0, 1.0], [5.0, 1.0]]).double() * SHARPNESS / (3 / 8 * 12))


def test_stays_float32_when_the_model_is_cast():
    module = LengthSelector(5, LENGTHS, 8.0)
    dtypes = {name: tensor.dtype for name, tensor in module.state_dict().items()}
    with torch.no_grad():
        module.offset.fill_(1 + 2**-20)
    for cast in (module.to(torch.bfloat16), module.half(), module.double()):
        assert {name: tensor.dtype for name, tensor in cast.state_dict().items()} == dtypes
        assert (cast.offset == 1 + 2**-20).all()
    assert module.to("meta").offset.is_meta
