"""What we rely on without a promise of its makers: one test a function, so that an upstream change breaks that one."""

import ast
from pathlib import Path
from typing import ClassVar

import pytest
import torch
from accelerate.state import AcceleratorState
from architectures import TIED
from torch import distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from transformers import BertForSequenceClassification, Trainer, TrainerCallback, TrainingArguments
from transformers.quantizers.auto import AUTO_QUANTIZATION_CONFIG_MAPPING, AUTO_QUANTIZER_MAPPING
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

import hf_adacomp
from hf_adacomp import compat

PACKAGE = Path(hf_adacomp.__file__).parent


def test_register_quant_method():
    class Config(QuantizationConfigMixin):
        pass

    class Quantizer(HfQuantizer):
        pass

    for _ in range(2):  # a second time is harmless
        compat.register_quant_method("test-method", Config, Quantizer)
    assert AUTO_QUANTIZATION_CONFIG_MAPPING.pop("test-method") is Config
    assert AUTO_QUANTIZER_MAPPING.pop("test-method") is Quantizer


def test_quantizer_of_and_set_quantizer(bert):
    assert compat.quantizer_of(bert) is None
    compat.set_quantizer(bert, "one")
    assert compat.quantizer_of(bert) == bert.hf_quantizer == "one"


def test_is_loaded(bert, tmp_path):
    """transformers marks what a file held."""
    del bert.classifier.bias
    bert.classifier.register_parameter("bias", None)
    bert.save_pretrained(tmp_path)
    assert not compat.is_loaded(torch.zeros(1))
    assert compat.is_loaded(BertForSequenceClassification.from_pretrained(tmp_path).classifier.weight)


def test_expect_in_files(bert, tmp_path):
    state = {**bert.state_dict(), "ours.weight": torch.zeros(1), "theirs.weight": torch.ones(1)}
    bert.save_pretrained(tmp_path, state_dict=state)

    class Expecting(BertForSequenceClassification):
        def __init__(self, config):
            super().__init__(config)
            compat.expect_in_files(self, ["ours.weight"])

    _, report = Expecting.from_pretrained(tmp_path, output_loading_info=True)
    assert set(report["unexpected_keys"]) == {"theirs.weight"}


def test_tied_weights():
    assert compat.tied_weights(TIED["gpt2"]()) == {"lm_head.weight": "transformer.wte.weight"}


def test_forget_ties_and_remember_ties():
    model = TIED["bert"]()
    before = compat.tied_weights(model)
    words = {"bert.embeddings.word_embeddings.weight", "cls.predictions.decoder.weight"}
    compat.forget_ties(model, "", words)
    kept = compat.tied_weights(model)
    assert kept == {a: b for a, b in before.items() if not {a, b} & words}
    assert kept  # the trained bias is tied as before
    compat.remember_ties(model, untied=False)
    assert compat.tied_weights(model) == before
    compat.forget_ties(model, "", words)
    compat.remember_ties(model, untied=True)
    assert compat.tied_weights(model) == {}


def test_embed_scale():
    assert compat.embed_scale(nn.Embedding(3, 4)) is None
    scaled = TIED["gemma3"]().get_input_embeddings()
    assert float(compat.embed_scale(scaled)) == pytest.approx(32**0.5)


def test_loaded_from(bert, tmp_path):
    assert compat.loaded_from(bert) == ""
    bert.save_pretrained(tmp_path)
    assert compat.loaded_from(BertForSequenceClassification.from_pretrained(tmp_path)) == str(tmp_path)


def test_upload_files(bert, monkeypatch):
    monkeypatch.setattr(type(bert), compat.UPLOAD_FILES, lambda model, *args, **kwargs: (args, kwargs))
    assert compat.upload_files(bert, "folder", "user/name", token="t") == (("folder", "user/name"), {"token": "t"})
    monkeypatch.undo()
    assert callable(getattr(bert, compat.UPLOAD_FILES))


def test_file_of(tmp_path):
    (tmp_path / "config.json").write_text("{}")
    assert compat.file_of(str(tmp_path), "config.json") == str(tmp_path / "config.json")
    assert compat.file_of(str(tmp_path), "tokenizer.json") is None
    assert compat.file_of("nobody/nothing-at-all", "config.json") is None


def test_checkpoint_prefix(bert, tmp_path):
    rows = [{"input_ids": torch.tensor([3, 4]), "labels": 0}]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, save_steps=1, report_to="none", use_cpu=True)
    Trainer(bert, arguments, train_dataset=rows).train()
    assert (tmp_path / f"{compat.checkpoint_prefix()}-1").is_dir()


def test_add_to_log(bert, tmp_path):
    class Add(TrainerCallback):
        def on_log(self, args, state, control, logs, **kwargs):
            compat.add_to_log(state, logs, {"ours": 7})

    rows = [{"input_ids": torch.tensor([3, 4]), "labels": 0}]
    arguments = TrainingArguments(str(tmp_path), max_steps=1, logging_steps=1, report_to="none", use_cpu=True)
    trainer = Trainer(bert, arguments, train_dataset=rows, callbacks=[Add()])
    trainer.train()
    assert all(entry["ours"] == 7 for entry in trainer.state.log_history)


def test_distributed_kind():
    AcceleratorState(cpu=True)
    assert compat.distributed_kind() == "NO"


def test_kept_dtype(device):
    class Kept(compat.KeptDtype):
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


def test_spare_broadcasts():
    model = nn.Module()
    for name in ("ours", "others", "theirs"):
        model.register_buffer(name, torch.zeros(2))
    model.weight = nn.Parameter(torch.zeros(2))
    compat.spare_broadcasts(model, ["ours"])
    compat.spare_broadcasts(model, ["ours", "others"])
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
    assert [name for name, _ in compat.children(model)] == ["first", "second"]
    assert len([*model.named_children()]) == 1


def test_version():
    parameter = nn.Parameter(torch.ones(2))
    before = compat.version(parameter)
    parameter.grad = torch.ones(2)
    for optimizer in (torch.optim.AdamW([parameter], foreach=True), torch.optim.SGD([parameter], lr=0.0)):
        optimizer.step()
        assert compat.version(parameter) > before
        before = compat.version(parameter)


def private_names(tree: ast.AST) -> set[str]:
    """Attributes with one leading underscore that a module reads or sets on anything."""
    names = {node.attr for node in ast.walk(tree) if isinstance(node, ast.Attribute)}
    return {name for name in names if name.startswith("_") and not name.startswith("__")}


def own_names(tree: ast.AST) -> set[str]:
    """What a module defines: functions, classes, attributes of `self`, variables."""
    names = {node.name for node in ast.walk(tree) if isinstance(node, (ast.FunctionDef, ast.ClassDef))}
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                names.add(node.attr)
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            names.add(node.id)
    return names


def test_no_other_module_reads_what_is_private_elsewhere():
    trees = {path: ast.parse(path.read_text()) for path in PACKAGE.rglob("*.py")}
    own = {"_asdict", "_replace"}.union(*map(own_names, trees.values()))  # named tuples document those
    found = {path.name: private_names(tree) - own for path, tree in trees.items() if path.name != "compat.py"}
    assert {name: names for name, names in found.items() if names} == {}
    assert private_names(trees[PACKAGE / "compat.py"]) - own


class Watched(torch.Tensor):
    """Notes the operators that it is asked for."""

    __torch_function__ = compat.NO_TORCH_FUNCTION
    asked: ClassVar[list] = []

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        cls.asked.append((func, args, kwargs or {}))
        return torch.zeros(3, 2)


def test_tensor_without_memory_asks_its_class_for_every_operator():
    like = torch.empty_strided((3, 2), (1, 3), dtype=torch.float16, device="meta")
    tensor = compat.tensor_without_memory(Watched, like, torch.device("cpu"))
    assert (tensor.shape, tensor.stride(), tensor.dtype, tensor.device.type) == ((3, 2), (1, 3), torch.float16, "cpu")
    Watched.asked.clear()
    assert type(tensor + 1) is torch.Tensor
    assert [func.overloadpacket for func, _, _ in Watched.asked] == [torch.ops.aten.add]


def test_what_operators_write_and_which_are_views():
    tensor = compat.tensor_without_memory(Watched, torch.empty(3, 2, device="meta"), torch.device("cpu"))
    Watched.asked.clear()
    tensor.mul_(2)
    torch.add(torch.zeros(3, 2), tensor, out=torch.zeros(3, 2))
    torch.zeros(3, 2).copy_(tensor)
    tensor.t()
    written = [[value is tensor for value in compat.written(*asked)] for asked in Watched.asked]
    assert written == [[True], [False], [False], []]
    assert compat.is_view(Watched.asked[-1][0])
    assert not compat.is_view(torch.ops.aten.add.Tensor)


@pytest.mark.parametrize("compiled", [False, True])
def test_check_on_device_raises_what_the_processor_raises(compiled):
    def check(ids):
        compat.check_on_device((ids >= 0).all(), "below zero")
        return ids + 1

    run = torch.compile(check, backend="aot_eager", fullgraph=True) if compiled else check
    assert run(torch.tensor([1])).item() == 2
    with pytest.raises(RuntimeError, match="below zero"):
        run(torch.tensor([-1]))


def test_version_of_what_autograd_does_not_count():
    with torch.inference_mode():
        assert compat.version(torch.zeros(2)) == 0


def test_state_of_tensors_tells_every_change():
    tensor = torch.zeros(2)
    before = compat.state_of([tensor])
    assert compat.state_of([tensor]) == before
    assert compat.state_of([tensor.clone()]) != before
    tensor.data = torch.zeros(2)
    moved = compat.state_of([tensor])
    assert moved != before
    tensor.add_(1)
    assert compat.state_of([tensor]) != moved


@pytest.mark.parametrize("options", [{"fused": True}, {"foreach": True}, {"foreach": False}])
def test_state_of_tensors_tells_steps_of_optimizers(options):
    parameter = nn.Parameter(torch.ones(2))
    parameter.grad = torch.ones(2)
    before = compat.state_of([parameter])
    torch.optim.AdamW([parameter], **options).step()  # a fused one leaves no trace at the tensor
    assert compat.state_of([parameter]) != before
