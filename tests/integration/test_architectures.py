"""Every architecture in every phase: train, save, load, generate, leave again."""

import copy

import pytest
import torch
from architectures import SCALES, TIED, UNTIED
from conftest import VOCABULARY, close, same_state
from safetensors.torch import load_file
from torch import nn

from hf_adacomp import AdaCompConfig, compress, decompress, pack, size_report
from hf_adacomp.integration.compressed_tables import compressed_embeddings, compressed_heads
from hf_adacomp.nn.head import CompressedHead

pytestmark = pytest.mark.usefixtures("quick_fit")
MODELS = {**TIED, **UNTIED}


def settings(**changes) -> AdaCompConfig:
    return AdaCompConfig(**{"code_lengths": (4, 8, 32), "target_ratio": 3, "codebook_dtype": "int8", **changes})


def inputs(model) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 100, (2, 7))
    ids[:, -1] = 2  # ends with the end-of-sequence token, once, as BART's classifier wants
    ids[:, :-1] += ids[:, :-1] == 2
    both = model.config.is_encoder_decoder and "Classification" not in type(model).__name__
    return {"input_ids": ids, **({"decoder_input_ids": ids} if both else {})}


@torch.no_grad()
def logits(model, batch) -> torch.Tensor:
    return model.eval()(**batch).logits


def compressed(name, counts, **changes):
    model = MODELS[name]().eval()
    return compress(model, settings(**changes), None if name == "marian-split" else counts)


@pytest.mark.parametrize("head", ["compress", "dense"])
@pytest.mark.parametrize("name", MODELS)
def test_loads_every_bit_and_leaves_again(name, head, counts, tmp_path):
    dense = MODELS[name]()
    tied = dense.get_output_embeddings() is not None and name in TIED
    if name == "marian-split":  # older releases leave its head alone
        tied = dense.get_output_embeddings().weight is dense.model.decoder.embed_tokens.weight
    shapes, ties = {k: v.shape for k, v in dense.state_dict().items()}, dict(dense.all_tied_weights_keys)
    model = compressed(name, counts, head=head)
    batch = inputs(model)
    expected = logits(model, batch)
    assert torch.equal(logits(pack(model), batch), expected)  # eval mode is the truth
    if name not in ("marian-split", "bart-classifier"):
        assert len(compressed_embeddings(model)) == 1
    assert len(compressed_heads(model)) == (tied and head == "compress")
    model.save_pretrained(tmp_path)
    tables = [n for n, t in load_file(tmp_path / "model.safetensors").items() if t.ndim == 2 and len(t) == VOCABULARY]
    assert len(tables) == (
        name in ("llama", "mistral", "gpt-neox") or (name in TIED and name != "marian-split" and head == "dense")
    )
    loaded = type(model).from_pretrained(tmp_path)
    assert same_state(loaded, model)
    assert close(logits(loaded, batch), expected)
    plain = decompress(loaded)
    assert torch.allclose(logits(plain, batch), expected, atol=1e-4)
    assert {k: v.shape for k, v in plain.state_dict().items()} == shapes
    if head == "compress":
        assert plain.all_tied_weights_keys == ties
    plain.save_pretrained(tmp_path / "plain")
    assert "quantization_config" not in (tmp_path / "plain" / "config.json").read_text()
    again = type(plain).from_pretrained(tmp_path / "plain")
    assert same_state(again, plain)
    assert close(logits(again, batch), logits(plain, batch))


@pytest.mark.parametrize("name", MODELS)
def test_trains_in_every_phase(name, counts):
    model = compressed(name, counts, observe_fraction=0.05)
    batch = {**inputs(model), "labels": torch.randint(4, 100, (2, 7))}
    if name == "bart-classifier":
        batch["labels"] = torch.tensor([0, 1])
    embedding = next(iter(compressed_embeddings(model).values()))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for fraction, before, phase in (
        (0.0, "observe", "observe"),
        (0.05, "observe", "select"),
        (0.1, "select", "select"),
        (0.9, "select", "encode"),
        (1.0, "encode", "packed"),
    ):
        assert embedding.phase == before
        model.train()
        optimizer.zero_grad()
        model(**batch).loss.backward()
        assert all(parameter.grad is not None for parameter in embedding.parameters())
        assert bool(embedding.training_state.selector.offset.grad.any()) == (before == "select")
        if before != "observe":
            assert embedding.codebook.bias.grad.any()
        for table in compressed_embeddings(model).values():
            table.step(fraction)
        optimizer.step()
        if phase == "packed":
            pack(model)
        assert embedding.phase == phase
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    before = logits(model, inputs(model))
    model.train()(**batch).loss.backward()
    optimizer.step()
    assert before.isfinite().all()


def used(embedding, k) -> bool:
    mixes = embedding.training and embedding.phase == "select"
    return mixes or bool((embedding.code_lengths() == embedding.config.ladder[k]).sum() > VOCABULARY / 2)


@pytest.mark.parametrize("name", MODELS)
def test_embedding_keeps_the_scale_of_the_model(name, counts):
    model = compressed(name, counts)
    embedding = model.get_input_embeddings()
    embedding = getattr(embedding, "embedding", embedding)
    assert embedding.scale == pytest.approx(SCALES.get(name, 1))
    ids = torch.tensor([5, 7])
    dense = embedding.eval().to_embedding()
    assert torch.allclose(embedding(ids), dense(ids), atol=1e-5)
    assert torch.allclose(embedding(ids), dense.weight[ids] * embedding.scale, atol=1e-5)


GENERATORS = ["gpt2", "qwen3", "gemma3", "opt", "llama", "t5", "bart", "marian", "m2m100", "qwen2-vl"]
WAYS = {
    "greedy": {"do_sample": False},
    "beams": {"do_sample": False, "num_beams": 3},
    "sampling": {"do_sample": True},
    "no cache": {"do_sample": False, "use_cache": False},
}


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", GENERATORS)
def test_generates_what_the_dense_model_would(name, way, counts):
    model = pack(compressed(name, counts)).eval()
    plain = decompress(copy.deepcopy(model))
    batch = {"input_ids": torch.randint(4, 100, (2, 7))}
    batch["attention_mask"] = (torch.arange(7) >= torch.tensor([[0], [3]])).long()  # left padding
    texts = []
    for each in (model, plain):
        torch.manual_seed(0)
        texts.append(each.generate(**batch, max_new_tokens=5, **WAYS[way]))
    assert torch.equal(*texts)


def test_separate_tables_are_both_compressed_or_as_asked(counts):
    make = TIED["marian-split"]
    both = compressed_embeddings(compress(make(), settings()))
    assert [table.num_embeddings for table in both.values()] == [VOCABULARY, 100]
    only = compressed_embeddings(compress(make(), settings(), counts, exclude=["*decoder*"]))
    assert [*only] == ["model.encoder.embed_tokens"]
    only = compressed_embeddings(compress(make(), settings(), include=["*.decoder.embed_tokens"]))
    assert [*only] == ["model.decoder.embed_tokens"]
    named = {"model.encoder.embed_tokens": counts, "model.decoder.embed_tokens": torch.arange(100)}
    both = compressed_embeddings(compress(make(), settings(), named))
    assert all(table.training_state.warm for table in both.values())


def test_patterns_and_names_that_match_nothing_are_refused(bert, counts):
    with pytest.raises(ValueError, match=r"no token embeddings .*include=\['nothing'\]"):
        compress(bert, settings(), include=["nothing"])
    with pytest.raises(ValueError, match=r"token_counts names \['x'\]"):
        compress(bert, settings(), {"x": counts})


def test_other_embeddings_may_be_asked_for(bert):
    compress(bert, AdaCompConfig(code_lengths=(8,), target_ratio=1), include=["*position_embeddings"])
    assert [*compressed_embeddings(bert)] == ["bert.embeddings.position_embeddings"]


def test_dense_head_is_counted(counts):
    model = compressed("gpt2", counts, head="dense")
    report = size_report(pack(model))
    assert report.head_bytes == VOCABULARY * 32 * 4
    assert report.ratio < 1
    assert "untied output head" in str(report)
    assert size_report(compressed("llama", counts)).head_bytes == 0


def test_bias_of_a_tied_head_survives(counts, tmp_path):
    model = TIED["bert"]()
    with torch.no_grad():
        model.cls.predictions.bias.normal_()
    bias = model.cls.predictions.bias.clone()
    pack(compress(model, settings(), counts)).save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    head = loaded.get_output_embeddings()
    assert isinstance(head, CompressedHead)
    assert head.bias is loaded.cls.predictions.bias
    assert torch.equal(head.bias, bias)


def test_untied_config_with_a_tied_head_is_refused(counts, tmp_path):
    model = pack(compressed("qwen3", counts))
    model.save_pretrained(tmp_path)
    model.config.tie_word_embeddings = False
    with pytest.raises(ValueError, match="tie_word_embeddings is False"):
        model.save_pretrained(tmp_path / "again")
    file = tmp_path / "config.json"
    file.write_text(file.read_text().replace('"tie_word_embeddings": true', '"tie_word_embeddings": false'))
    with pytest.raises(ValueError, match=r"saved tied .* set tie_word_embeddings to true"):
        type(model).from_pretrained(tmp_path)


def test_head_of_another_shape_or_kind_is_refused(config):
    model = TIED["gpt2"]()
    model.lm_head = nn.Bilinear(2, 2, 2)
    with pytest.raises(ValueError, match="not understood, a Bilinear"):
        compress(model, config)
    model = TIED["gpt2"]()
    model.lm_head = nn.Linear(32, VOCABULARY, bias=False)
    with pytest.raises(ValueError, match=r"declares 'lm_head.weight' tied .* different tensors"):
        compress(model, config)
    model = TIED["gpt2"]()
    model.other = nn.Conv1d(1, 1, 1)
    model.other.weight = model.transformer.wte.weight
    before = model.state_dict().keys()
    with pytest.raises(ValueError, match=r"ties its token embeddings 'transformer.wte' to 'other', a Conv1d"):
        compress(model, config)
    assert model.state_dict().keys() == before
