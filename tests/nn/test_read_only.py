import pytest
import torch
from conftest import VOCABULARY
from safetensors.torch import save_file
from torch import nn
from torch.nn.utils import prune
from transformers import initialization

from hf_adacomp import AdaptiveCompressedEmbedding
from hf_adacomp.nn.head import CompressedHead
from hf_adacomp.nn.sharing import SharedEmbedding

pytestmark = pytest.mark.usefixtures("quick_fit")


@pytest.fixture
def packed(config, counts) -> AdaptiveCompressedEmbedding:
    table = AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, 32), config, counts)
    table.pack()
    return table


WRITES = {
    "normal_": nn.init.normal_,
    "data": lambda weight: weight.data.zero_(),
    "row": lambda weight: weight.data.__setitem__(3, 1.0),
    "view of a row": lambda weight: weight.data[3].copy_(torch.ones(32)),
    "view": lambda weight: weight.detach().t().mul_(2),
    "one of many": lambda weight: weight.data.unbind()[2].zero_(),
    "padding": lambda weight: torch.no_grad()(weight.__setitem__)(0, 0.0),
    "+=": lambda weight: weight.data.__iadd__(1),
    "out": lambda weight: torch.add(weight.detach(), 1, out=weight.detach()),
    "foreach": lambda weight: torch._foreach_add_([weight.detach()], 1),
    "index_copy_": lambda weight: weight.data.index_copy_(0, torch.tensor([1]), torch.ones(1, 32)),
}


@pytest.mark.parametrize("write", WRITES.values(), ids=WRITES)
def test_a_write_would_be_lost_and_raises(packed, write):
    with pytest.raises(ValueError, match=r"add_tokens\(model, n, vectors=.*decompress"):
        write(packed.weight)


@pytest.mark.parametrize("value", [nn.Parameter(torch.zeros(2, 2)), torch.zeros(2, 2), None])
def test_it_cannot_be_set(packed, value):
    for module in (packed, CompressedHead(packed), SharedEmbedding(packed)):
        with pytest.raises(ValueError, match=r"add_tokens.*decompress"):
            module.weight = value


def test_it_may_be_set_to_itself(packed):
    for module in (packed, CompressedHead(packed), SharedEmbedding(packed)):
        module.weight = packed.weight
        module.weight = torch.zeros(0)  # as state dicts have it
        assert module.weight is packed.weight
        with pytest.raises(ValueError, match="cannot be set"):
            module.weight = packed.weight[:5]


def test_others_may_be_written_with_its_values(packed):
    target = torch.zeros(VOCABULARY, 32)
    target.copy_(packed.weight.detach())
    assert torch.equal(target, packed.weight_values())
    assert nn.Embedding.from_pretrained(packed.weight.detach().clone())(torch.tensor([1])).shape == (1, 32)


def test_initialisation_of_transformers_passes_over_it(packed):
    before = packed.weight_values().clone()
    initialization.normal_(packed.weight)
    initialization.zeros_(packed.weight[0])
    assert torch.equal(packed.weight_values(), before)


def test_its_data_is_a_copy_that_others_may_take(packed, ids):
    """`other.data = ...` asks no operator: without memory of its own, a look-up in the other would end the process."""
    data, values = packed.weight.data, packed.weight_values().clone()
    other = nn.Embedding(VOCABULARY, 32)
    other.weight.data = packed.weight.data
    assert torch.equal(other(ids), values[ids])
    with torch.no_grad():
        other.weight.zero_()
    assert torch.equal(packed.weight_values(), values)
    for write in (data.zero_, data[3].zero_, lambda: data.chunk(2)[1].add_(1), data.share_memory_):
        with pytest.raises(ValueError, match=r"weight.detach\(\).clone\(\)"):
            write()
    assert torch.equal(torch.as_tensor(data.numpy()), values)
    assert (data.tolist(), type(data + 0)) == (values.tolist(), torch.Tensor)


def test_hooks_that_would_not_be_called_are_refused(packed):
    for hook in ("register_hook", "register_post_accumulate_grad_hook"):
        with pytest.raises(ValueError, match=r"would not be called.*embedding.parameters\(\)"):
            getattr(packed.weight, hook)(print)
    seen = []
    weight = packed.weight.detach().requires_grad_()
    weight.register_hook(seen.append)
    weight.sum().backward()
    assert len(seen) == 1


def test_its_data_cannot_be_set(packed):
    before = packed.weight_values().clone()
    with pytest.raises(ValueError, match=r"cannot be set.*decompress"):
        packed.weight.data = torch.zeros(VOCABULARY, 32)
    assert torch.equal(packed.weight.data + 0, before)
    assert not packed.weight.data.requires_grad


def test_pruning_is_refused(packed):
    with pytest.raises(ValueError, match=r"cannot become 'weight_orig'.*decompress"):
        prune.l1_unstructured(packed, "weight", amount=0.5)


@pytest.mark.parametrize("take", [lambda weight: weight, lambda weight: weight.detach(), lambda weight: weight[2:9]])
def test_memory_that_is_not_there_is_not_taken(packed, take, tmp_path):
    """A look-up in what took it would end the process."""
    other = nn.Embedding(VOCABULARY, 32)
    with pytest.raises(RuntimeError, match="incompatible tensor type"):
        other.weight.data = take(packed.weight)
    assert other(torch.tensor([3])).shape == (1, 32)
    with pytest.raises(ValueError, match=r"no memory to be saved.*weight.detach\(\).clone\(\)"):
        save_file({"weight": take(packed.weight)}, tmp_path / "weight.safetensors")
