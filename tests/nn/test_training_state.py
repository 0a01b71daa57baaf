import pytest
import torch
from conftest import LENGTHS, VOCABULARY

from hf_adacomp import AdaCompConfig
from hf_adacomp.nn.training_state import PROGRESS_UNIT, TrainingState

BUDGET = 10 * VOCABULARY


@pytest.fixture
def state(config, device) -> TrainingState:
    """Lengths are being learned; what a bit saves differs between tokens."""
    state = TrainingState(torch.randn(VOCABULARY, 32, device=device), config)
    state.weigh_tokens()
    distortion = torch.rand(VOCABULARY, 1, device=device) * torch.tensor([3.0, 2.0, 1.0], device=device)
    state.start(distortion, BUDGET)
    state.end_observation()
    return state


def test_phases_follow_progress(config):
    state = TrainingState(torch.randn(VOCABULARY, 32), config)
    assert (state.phase, state.observing, state.warm, state.driven) == ("observe", True, False, False)
    state.advance(0.0, BUDGET)
    assert (state.phase, state.driven) == ("observe", True)
    state.start(torch.rand(VOCABULARY, 3), BUDGET)
    state.end_observation()
    state.advance(0.1, BUDGET)
    assert (state.phase, state.warm) == ("select", True)
    state.advance(0.5, BUDGET)
    assert state.phase == "encode"


@pytest.mark.parametrize("observed", [0.0, 0.25])
def test_lengths_are_learned_from_the_end_of_observation_on(observed):
    """Also of a table that was fitted before training began: offsets come as far as with observation."""
    config = AdaCompConfig(code_lengths=LENGTHS, target_ratio=32, observe_fraction=observed, select_fraction=0.5)
    state = TrainingState(torch.randn(VOCABULARY, 32), config)
    state.weigh_tokens()
    state.start(torch.rand(VOCABULARY, 3), BUDGET)
    state.end_observation()
    for step in range(20):
        state.selector.offset.grad = torch.ones_like(state.selector.offset)
        state.advance(step / 20, BUDGET)
        if step / 20 <= observed:
            assert not state.selector.offset.any()
    reached = -float(state.selector.offset.mean())
    assert reached == pytest.approx(config.selection_reach, rel=0.05)


def test_shares_are_a_function_of_progress(state, device):
    tokens = torch.tensor([3, 3, 9], device=device)
    state.advance(0.1, BUDGET)
    first = state.shares(tokens)
    assert torch.equal(first[0], first[1])
    assert torch.allclose(first.sum(1), torch.ones(3, device=device))
    assert torch.equal(state.shares(tokens), first)
    state.advance(0.2, BUDGET)
    assert not torch.equal(state.shares(tokens), first)
    state.advance(0.1, BUDGET)
    assert torch.equal(state.shares(tokens), first)


def test_tokens_weigh_by_what_was_counted_since(state, device):
    cost = state.selector.cost.clone()
    vectors = torch.zeros(40, 32, device=device, requires_grad=True)
    looked_up = vectors * 1
    state.observation.watch_look_up(torch.full((40,), 7, device=device), looked_up, measure=False)
    looked_up.sum().backward()
    state.recount()
    assert state.token_counts[7] == 40
    ratio = (state.selector.cost / cost)[:, 0]
    assert float(ratio[7] / ratio[8]) == pytest.approx((40.5 / 0.5) ** 0.5, rel=1e-3)
    assert torch.allclose(ratio[8:], ratio[8].expand(VOCABULARY - 8))


def test_counts_that_were_given_weigh_as_they_are(state, counts, device):
    state.set_counts(counts.to(device))
    cost = state.selector.cost.clone()
    state.recount()
    assert torch.equal(state.selector.cost, cost)
    assert torch.equal(state.token_counts, counts.to(device))


def test_frozen_lengths_stay_and_must_fit(state):
    state.freeze(BUDGET)
    frozen = state.assignment.clone()
    with torch.no_grad():
        state.selector.offset.normal_()
    state.settle(BUDGET)
    assert torch.equal(state.assignment, frozen)
    assert state.hard_assignment(BUDGET)[1] == 0
    state.freeze(BUDGET)
    with pytest.raises(ValueError, match=r"target_ratio=32 leaves 2048 bits .* frozen, take \d+. .*: resume with"):
        state.freeze(4 * VOCABULARY)


@pytest.mark.parametrize(
    ("tensor", "value"),
    [
        ("assignment", len(LENGTHS)),
        ("stage", 3),
        ("warm_started", 2),
        ("progress", PROGRESS_UNIT + 1),
        ("observation.token_counts", -1),
    ],
)
def test_values_that_training_never_makes_are_named(config, tensor, value):
    state = TrainingState(torch.randn(VOCABULARY, 32), config)
    state.validate("table")
    state.get_buffer(tensor).fill_(value)
    with pytest.raises(ValueError, match=f"table.{tensor} must be from"):
        state.validate("table")


def test_constants_are_no_parameters():
    state = TrainingState(torch.randn(9, 4), AdaCompConfig((4, 8)))
    assert [name for name, _ in state.named_parameters()] == ["selector.offset"]
    state.requires_grad_(True)  # as unfreezing loops do
    assert "source" in state.state_dict()


def test_casts_move_the_source_alone():
    state = TrainingState(torch.randn(9, 4), AdaCompConfig((4, 8))).to(torch.bfloat16)
    cast = {name for name, tensor in state.state_dict().items() if tensor.dtype == torch.bfloat16}
    assert cast == {"source"}
