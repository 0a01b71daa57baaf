"""What we rely on of torch without a promise of its makers: a test a function."""

from typing import ClassVar

import pytest
import torch
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from hf_adacomp import torch_compat


def test_kept_dtype(device):
    class Kept(torch_compat.KeptDtype):
        def __init__(self):
            super().__init__()
            self.learned = nn.Parameter(torch.full((3,), 1 + 2**-20))
            self.register_buffer("count", torch.tensor(3))

    module = nn.Sequential(Kept(), nn.Linear(2, 2)).to(device)
    for cast in (module.half(), module.to(torch.bfloat16), module.double()):
        assert cast[0].learned.dtype == torch.float32
        assert (cast[0].learned == 1 + 2**-20).all()
        assert isinstance(cast[0].learned, nn.Parameter)
        assert cast[1].weight.dtype != torch.float32
    assert module.to("meta")[0].learned.is_meta
    assert module.to_empty(device=device)[0].learned.device == device


def test_movable():
    class Movable(torch_compat.Movable):
        moves = 0

        def moved(self):
            self.moves += 1

    class Kept(Movable, torch_compat.KeptDtype):
        pass

    model = nn.Sequential(Movable(), nn.Sequential(Kept()))
    model.to("cpu").double()
    assert [model[0].moves, model[1][0].moves] == [2, 2]


def test_is_replica():
    module = nn.Linear(2, 2)
    assert not torch_compat.is_replica(module)
    assert torch_compat.is_replica(module._replicate_for_data_parallel())


def test_spare_broadcasts():
    model = nn.Module()
    for name in ("ours", "others", "theirs"):
        model.register_buffer(name, torch.zeros(2))
    model.weight = nn.Parameter(torch.zeros(2))
    torch_compat.spare_broadcasts(model, ["ours"])
    torch_compat.spare_broadcasts(model, ["ours", "others"])
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        broadcast = DistributedDataParallel(model).modules_buffers
    finally:
        dist.destroy_process_group()
    assert [id(buffer) for buffer in broadcast] == [id(model.theirs)]


def test_children():
    model = nn.Module()
    model.first = model.second = nn.Linear(2, 2)
    model.third = None
    assert [name for name, _ in torch_compat.children(model)] == ["first", "second"]
    assert len([*model.named_children()]) == 1


class Watched(torch.Tensor):
    """Notes the operators that it is asked for."""

    __torch_function__ = torch_compat.NO_TORCH_FUNCTION
    asked: ClassVar[list] = []

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        if func is torch_compat.DEVICE:
            return args[0].lies_on
        cls.asked.append((func, args, kwargs or {}))
        return torch.zeros(3, 2)


def test_tensor_without_memory_asks_its_class_for_every_operator():
    like = torch.empty_strided((3, 2), (1, 3), dtype=torch.float16, device="meta")
    tensor = torch_compat.tensor_without_memory(Watched, like, torch.device("cpu"))
    assert (tensor.shape, tensor.stride(), tensor.dtype, tensor.device.type) == ((3, 2), (1, 3), torch.float16, "cpu")
    Watched.asked.clear()
    assert type(tensor + 1) is torch.Tensor
    assert [func.overloadpacket for func, _, _ in Watched.asked] == [torch.ops.aten.add]


def test_what_operators_write_and_which_are_views():
    tensor = torch_compat.tensor_without_memory(Watched, torch.empty(3, 2, device="meta"), torch.device("cpu"))
    Watched.asked.clear()
    tensor.mul_(2)
    torch.add(torch.zeros(3, 2), tensor, out=torch.zeros(3, 2))
    torch.zeros(3, 2).copy_(tensor)
    tensor.t()
    written = [[value is tensor for value in torch_compat.written(*asked)] for asked in Watched.asked]
    assert written == [[True], [False], [False], []]
    assert torch_compat.is_view(Watched.asked[-1][0])
    assert not torch_compat.is_view(torch.ops.aten.add.Tensor)


@pytest.mark.parametrize("compiled", [False, True])
def test_check_on_device_raises_what_the_processor_raises(compiled):
    def check(ids):
        torch_compat.check_on_device((ids >= 0).all(), "below zero")
        return ids + 1

    run = torch.compile(check, backend="aot_eager", fullgraph=True) if compiled else check
    assert run(torch.tensor([1])).item() == 2
    with pytest.raises(RuntimeError, match="below zero"):
        run(torch.tensor([-1]))


@pytest.mark.parametrize("inference", [False, True])
def test_snapshots_tell_every_change_of_constants(inference):
    with torch.inference_mode(inference):
        tensor = torch.zeros(2)
    before = torch_compat.Snapshot([tensor])
    assert before.holds([tensor])
    assert not before.holds([tensor, tensor])
    assert not before.holds([tensor.clone()])
    assert not before.holds([nn.Parameter(tensor.clone())])
    if not inference:
        tensor.add_(1)
        assert not before.holds([tensor])
        tensor.data = torch.zeros(2)
        assert not before.holds([tensor])


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_snapshots_tell_steps_of_optimizers(options):
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    before = torch_compat.Snapshot([parameter])
    torch.optim.AdamW([parameter], **options).step()  # a fused one leaves no trace at the tensor
    assert not before.holds([parameter])


def test_snapshots_tell_what_autograd_does_not_count():
    parameter = nn.Parameter(torch.ones(2))
    before = torch_compat.Snapshot([parameter])
    parameter.data.mul_(1)
    assert before.holds([parameter])
    parameter.data.mul_(2)
    assert not before.holds([parameter])
    assert not torch_compat.Snapshot([parameter]).holds([nn.Parameter(parameter.double())])
    assert not torch_compat.Snapshot([parameter.to("meta")]).holds([parameter.to("meta")])


def test_hand_over_hooks():
    old, new, seen = nn.Identity(), nn.Identity(), []
    first = old.register_forward_hook(lambda *_: seen.append("forward"))
    old.register_forward_pre_hook(lambda *_, **__: seen.append("before"), with_kwargs=True)
    old.register_full_backward_hook(lambda *_: seen.append("backward"))
    torch_compat.hand_over_hooks(old, new)
    new(torch.ones(1, requires_grad=True)).sum().backward()
    assert seen == ["before", "forward", "backward"]
    first.remove()
    new(torch.ones(1))
    assert seen[3:] == ["before"]


def test_is_traced_where_torch_func_transforms():
    found = []

    def see(x):
        found.append(torch_compat.is_traced())
        return x.sum()

    torch.func.vmap(see)(torch.ones(2, 3))
    torch.func.grad(see)(torch.ones(3))
    see(torch.ones(3))
    assert found == [True, True, False]
