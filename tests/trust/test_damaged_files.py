"""Damaged, contradictory and hostile files: each is refused with a reason or loads as if nothing had happened.

Only the compressed table is judged. Its float tensors are ordinary weights that carry no checksum: what a file says of
them counts, if it is finite.
"""

import copy
import json
import math
import random
import shutil
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from architectures import TIED
from conftest import LENGTHS, VOCABULARY, close, tiny_bert_config
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load, load_file, save
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import AutoModelForSequenceClassification, BertForSequenceClassification

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding, compress, keep_tokens, pack
from hf_adacomp.codes.bits import checksum
from hf_adacomp.integration.layout import sealed

NAME = "bert.embeddings.word_embeddings"
TRILLION = 10**12


class Honest(NamedTuple):
    """A saved model: its folder, the bytes of its weights, its config and what it loads as."""

    folder: Path
    weights: bytes
    config: dict
    table: AdaptiveCompressedEmbedding

    def __repr__(self) -> str:  # hypothesis prints what tests are given
        return f"Honest({self.folder})"

    @property
    def ours(self) -> list[str]:
        return sorted(key for key in load(self.weights) if key.startswith(NAME) and key != f"{NAME}.weight")


@pytest.fixture(scope="module")
def honest(tmp_path_factory) -> dict[str, Honest]:
    models = {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_adacomp.fitting.warm_start.FIT_ROUNDS", 1)
        patch.setenv("HF_DEACTIVATE_ASYNC_LOAD", "1")  # LargestTensor sees its own thread only
        for name, changes in {
            "int4": {},
            "float16": {"codebook_dtype": "float16", "target_ratio": 16},
            "one length": {"code_lengths": (9,)},
            "training": {},
        }.items():
            torch.manual_seed(0)
            model = BertForSequenceClassification(tiny_bert_config(num_hidden_layers=1))
            settings = AdaCompConfig(**{"code_lengths": LENGTHS, "target_ratio": 32, **changes})
            compress(model, settings, VOCABULARY // torch.arange(1, VOCABULARY + 1))
            if name == "training":
                model.get_input_embeddings().step(0.2)
            else:
                pack(model)
            folder = tmp_path_factory.mktemp("honest")
            model.save_pretrained(folder)
            table = AutoModelForSequenceClassification.from_pretrained(folder).get_input_embeddings()
            config = json.loads((folder / "config.json").read_text())
            models[name] = Honest(folder, (folder / "model.safetensors").read_bytes(), config, table)
        yield models


class LargestTensor(TorchDispatchMode):
    """Remembers the most bytes of a tensor that any operation made outside of the meta device."""

    most = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta:
                self.most = max(self.most, tensor.nbytes)
        return result


def outcome(model: Honest, weights: bytes, config: dict) -> str:
    """Loads the damaged model. Returns the reason of its refusal, or "" if it loads with the vectors it should have."""
    folder = model.folder.with_name("damaged")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(weights)
    (folder / "config.json").write_text(json.dumps(config))
    with LargestTensor() as seen:
        try:
            loaded = AutoModelForSequenceClassification.from_pretrained(folder)
        except ValueError as error:
            return str(error)
        finally:
            assert seen.most <= 2 * len(model.weights)
    stored, expected = load(weights), copy.deepcopy(model.table)
    source = {} if expected.training_state is None else {"training_state.source": expected.training_state.source}
    with torch.no_grad():
        for name, value in {**dict(expected.named_parameters()), **source}.items():
            if value.is_floating_point():
                value.copy_(stored[f"{NAME}.{name}"])
    found, ids = loaded.get_input_embeddings().eval(), torch.arange(VOCABULARY)
    torch.testing.assert_close(found(ids), expected.eval()(ids), rtol=0, atol=0, equal_nan=True)
    return ""


def flipped(data: bytes, bit: int) -> bytes:
    changed = bytearray(data)
    changed[bit // 8] ^= 1 << bit % 8
    return bytes(changed)


def damaged_tensor(draw, tensor: torch.Tensor) -> torch.Tensor | None:
    """Something else than `tensor`; None where there shall be none."""
    flat, values = tensor.flatten(), st.integers(0, max(0, tensor.numel() - 1))
    kind = draw(st.sampled_from(["gone", "longer", "shorter", "shape", "dtype", "bit", "value", "noise"]))
    if kind == "gone":
        return None
    if kind == "longer":
        flat = torch.cat([flat, torch.ones(draw(st.integers(1, 70)), dtype=tensor.dtype)])
    elif kind == "shorter":
        flat = flat[: draw(values)]
    elif kind == "shape":
        flat = draw(st.sampled_from([tensor[None], flat[:, None], flat[None, :, None], flat.flip(0)]))
    elif kind == "dtype":
        kinds = [torch.float16, torch.float32, torch.float64, torch.int8, torch.int16, torch.int64, torch.bool]
        return tensor.to(draw(st.sampled_from(kinds)))
    elif kind == "bit" and tensor.numel():
        octets = flat.clone().view(torch.uint8).numpy().tobytes()
        octets = bytearray(flipped(octets, draw(st.integers(0, 8 * len(octets) - 1))))
        flat = torch.frombuffer(octets, dtype=tensor.dtype).view(tensor.shape)
    elif kind == "value" and tensor.numel():
        odd = [0, 1, -1, math.nan, math.inf, -math.inf] if tensor.is_floating_point() else [0, 1, 127]
        flat = flat.index_fill(0, torch.tensor(draw(values)), draw(st.sampled_from(odd))).view(tensor.shape)
    else:
        generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
        octets = torch.randint(0, 256, (tensor.nbytes,), generator=generator, dtype=torch.uint8)
        flat = octets.view(tensor.dtype).view(tensor.shape)
    return flat.contiguous()


ODD = [None, True, False, -1, 0, 1, 2, 3.5, 1e300, math.nan, TRILLION, 2**63, 10**400, "x", "", [], [1], [[]], {}]
ODD += [{"x": 1}, [TRILLION], [1, 2, 3], [4, 8, 21], [3, 8, 20], [0, 0, VOCABULARY], ["4", "8", "20"], [4.0, 8.0, 20.0]]


def changed(draw, values: dict) -> str:
    """Changes one field of `values`, and returns which."""
    field = draw(st.sampled_from(sorted(values)))
    kind = draw(st.sampled_from(["gone", "odd", "near"]))
    if kind == "gone":
        del values[field]
    elif kind == "near" and isinstance(values[field], (int, float)):
        values[field] = type(values[field])(values[field] + draw(st.integers(-3, 3)))
    elif kind == "near" and isinstance(values[field], list) and values[field]:
        values[field] = draw(st.permutations(values[field]))
    else:
        values[field] = draw(st.sampled_from(ODD))
    return field


FILE_DAMAGE, CONFIG_DAMAGE = ["tensor", "tensor", "cut", "bit"], ["layout", "hostile layout", "setting", "huge"]


def check(honest: dict[str, Honest], draw) -> None:
    model = honest[draw(st.sampled_from(["int4", "int4", "float16", "one length", "training"]))]
    kind = draw(st.sampled_from(FILE_DAMAGE + CONFIG_DAMAGE))
    (check_file if kind in FILE_DAMAGE else check_config)(model, kind, draw)


def check_file(model: Honest, kind: str, draw) -> None:
    weights = model.weights
    if kind == "tensor":
        tensors = load(weights)
        key = draw(st.sampled_from(model.ours))
        before = tensors.pop(key)
        if (after := damaged_tensor(draw, before)) is not None:
            tensors[key] = after
        reason = outcome(model, save(tensors, {"format": "pt"}), model.config)
        same = after is not None and after.shape == before.shape and after.dtype == before.dtype
        fixed = not before.is_floating_point() and model.table.phase == "packed"
        if after is None or (fixed and not (same and torch.equal(after, before))):
            assert reason
        assert not reason or key in reason
    elif kind == "cut":
        cut = draw(st.integers(1, len(weights) - 1))
        damaged = weights[:cut] + draw(st.sampled_from([b"", b"\0", weights]))
        reason = outcome(model, damaged, model.config)
        assert "model.safetensors" in reason or len(damaged) == len(weights)  # only another last byte
    else:  # a bit of the header, or of a tensor of ours
        header, spans = layout_of_file(model)
        start, end = draw(st.sampled_from([(0, header), *(span for span in spans.values() if span[0] < span[1])]))
        outcome(model, flipped(weights, draw(st.integers(8 * start, 8 * end - 1))), model.config)


def layout_of_file(model: Honest) -> tuple[int, dict[str, tuple[int, int]]]:
    """Bytes of the header, and where in the file the tensors of ours begin and end."""
    header = 8 + int.from_bytes(model.weights[:8], "little")
    described = json.loads(model.weights[8:header])
    return header, {key: tuple(header + offset for offset in described[key]["data_offsets"]) for key in model.ours}


def check_config(model: Honest, kind: str, draw) -> None:
    config = copy.deepcopy(model.config)
    quantization = config["quantization_config"]
    layout = quantization["tables"][NAME]
    needs = NAME
    if kind == "huge":  # a config that contradicts nothing but the file
        layout["num_embeddings"] = config["vocab_size"] = draw(st.sampled_from([2**31 - 1, TRILLION, 2**40]))
        if layout["tokens_per_length"] is not None:
            layout["tokens_per_length"][0] += layout["num_embeddings"] - VOCABULARY
        seal(quantization)
    elif kind == "setting":
        needs = changed(draw, quantization)
        if needs == "quant_method":  # what transformers does then is pinned in test_quantizer
            return
    elif kind == "layout":
        changed(draw, layout)
    else:  # with a checksum to match: only tensors can contradict it
        tellable = ("num_embeddings", "embedding_dim", "code_lengths", "tokens_per_length", "tensor_checksums")
        part = {field: layout.pop(field) for field in tellable}
        changed(draw, part)
        layout.update(part)
        seal(quantization)
    reason = outcome(model, model.weights, config)
    assert not reason or needs in reason or NAME in reason
    assert reason or kind == "setting" or config == model.config


def seal(quantization: dict) -> None:
    layout = quantization["tables"][NAME]
    layout.pop("checksum", None)
    quantization["tables"][NAME] = sealed(layout, AdaCompConfig(**{**quantization, "tables": {}}))


no_checks = [HealthCheck.function_scoped_fixture, HealthCheck.too_slow, HealthCheck.data_too_large]


@given(data=st.data())
@settings(max_examples=250, deadline=10_000, derandomize=True, suppress_health_check=no_checks)
def test_damage_is_refused_with_a_reason_or_harmless(honest, data):
    check(honest, data.draw)


@pytest.mark.long
@given(data=st.data())
@settings(max_examples=3000, deadline=10_000, suppress_health_check=no_checks)
def test_much_damage_is_refused_with_a_reason_or_harmless(honest, data):
    check(honest, data.draw)


@pytest.mark.parametrize("name", ["int4", "float16", "one length", "training"])
def test_the_honest_file_loads(honest, name):
    model = honest[name]
    assert outcome(model, model.weights, model.config) == ""


@pytest.mark.parametrize("name", ["int4", "float16", "one length"])
def test_every_bit_of_codes_and_lengths_is_guarded(honest, name):
    """A sample of each tensor's bits, the last ones, which may be padding, included."""
    model = honest[name]
    _, spans = layout_of_file(model)
    for key in model.config["quantization_config"]["tables"][NAME]["tensor_checksums"]:
        start, end = (8 * octet for octet in spans[f"{NAME}.{key}"])
        bits = [*random.Random(0).sample(range(start, end), min(5, end - start)), *range(max(start, end - 2), end)]
        for bit in bits:
            assert f"{NAME}.{key}" in outcome(model, flipped(model.weights, bit), model.config)


def test_an_index_beyond_the_number_of_books_is_named_even_with_a_matching_checksum(honest):
    model = honest["int4"]
    config, tensors = copy.deepcopy(model.config), load(model.weights)
    lengths = tensors[f"{NAME}.packed.length_indices"]
    lengths[5] = 0b11  # of three books
    quantization = config["quantization_config"]
    quantization["tables"][NAME]["tensor_checksums"]["packed.length_indices"] = checksum(lengths)
    seal(quantization)
    assert f"{NAME}.packed.length_indices gives" in outcome(model, save(tensors, {"format": "pt"}), config)


def test_a_table_that_the_config_forgets_is_missed(tmp_path):
    """It would be an ordinary table of random vectors."""
    model = pack(compress(TIED["marian-split"](), AdaCompConfig(LENGTHS, target_ratio=2)))
    model.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    names = [*config["quantization_config"]["tables"]]
    assert len(names) == 2
    del config["quantization_config"]["tables"][names[1]]
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(ValueError, match="holds 2 compressed tables"):
        type(model).from_pretrained(tmp_path)


def test_weights_that_are_pickled_are_refused(packed_bert, tmp_path):
    packed_bert.save_pretrained(tmp_path)
    torch.save(load_file(tmp_path / "model.safetensors"), tmp_path / "pytorch_model.bin")
    (tmp_path / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"from safetensors files only.*pytorch_model.bin"):
        AutoModelForSequenceClassification.from_pretrained(tmp_path)


def test_saving_again_renews_the_checksums(packed_bert, ids, tmp_path):
    packed_bert.save_pretrained(tmp_path / "first")
    keep_tokens(packed_bert, 20)
    ids = ids % 20
    packed_bert.save_pretrained(tmp_path / "second")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "second")
    assert close(loaded(ids).logits, packed_bert(ids).logits)
    loaded.save_pretrained(tmp_path / "third")
    config = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("second", "third")]
    assert config[0]["quantization_config"] == config[1]["quantization_config"]


@pytest.mark.long
def test_coverage_guided_fuzzing_of_the_config(honest, tmp_path):
    pytest.importorskip("atheris", reason="needs atheris: pip install atheris")
    corpus = tmp_path / "corpus"
    corpus.mkdir()
    for number, model in enumerate(honest.values()):
        (corpus / str(number)).write_text(json.dumps(model.config["quantization_config"]))
    script = Path(__file__).with_name("fuzz_config.py")
    command = [sys.executable, str(script), "-runs=200000", "-max_len=4000", "-seed=1", f"-artifact_prefix={tmp_path}/"]
    done = subprocess.run([*command, str(corpus)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
