import pytest
import torch
from conftest import VOCABULARY
from torch import nn

from hf_adacomp import AdaptiveCompressedEmbedding
from hf_adacomp.nn.movement import PATIENCE, Movement

pytestmark = pytest.mark.usefixtures("quick_fit")


def test_parameters_that_nobody_moves_are_found_once(caplog):
    moved, still = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    movement = Movement()
    optimizer = torch.optim.SGD([moved], lr=0.1)
    for _ in range(2 * PATIENCE):
        moved.grad = torch.ones(2)
        optimizer.step()
        movement.check([moved, still])
        Movement().check([nn.Parameter(torch.ones(2), requires_grad=False)])
    assert not caplog.records
    for _ in range(3 * PATIENCE):
        movement.check([still])
    assert len(caplog.records) == 1


@pytest.mark.parametrize("fused", [True, False])
@pytest.mark.parametrize("late", [True, False])
def test_a_loop_whose_optimizer_lacks_the_table_is_told(config, counts, caplog, late, fused):
    model = nn.Sequential(nn.Embedding(VOCABULARY, 32), nn.Linear(32, 2))
    early = torch.optim.AdamW(model.parameters(), fused=fused)
    model[0] = AdaptiveCompressedEmbedding.from_embedding(model[0], config, counts)
    optimizer = torch.optim.AdamW(model.parameters(), fused=fused) if late else early
    for step in range(PATIENCE + 2):
        model.train()(torch.randint(0, VOCABULARY, (9,))).square().mean().backward()
        model[0].step(step / 40)
        optimizer.step()
        optimizer.zero_grad()
    assert ("make it after compressing" in caplog.text) == (not late)
