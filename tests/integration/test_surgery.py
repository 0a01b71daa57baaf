import pytest
import torch
from architectures import TIED, UNTIED
from conftest import VOCABULARY, close
from torch import nn

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding, compress, decompress, size_report
from hf_adacomp import pack as pack_model
from hf_adacomp.integration import surgery
from hf_adacomp.integration.compressed_tables import compressed_embeddings
from hf_adacomp.integration.dense_tables import dense_tables
from hf_adacomp.integration.surgery import plan, replace_module, take_out
from hf_adacomp.nn.head import CompressedHead
from hf_adacomp.nn.sharing import SharedEmbedding
from hf_adacomp.transformers_compat import tied_weights

pytestmark = pytest.mark.usefixtures("quick_fit")


def settings(**changes) -> AdaCompConfig:
    return AdaCompConfig(**{"code_lengths": (4, 8, 32), "target_ratio": 3, "codebook_dtype": "int8", **changes})


def install(model, config, *further) -> None:
    surgery.install(model, plan(model, config, *further), config.head)


def pack(model) -> None:
    for table in compressed_embeddings(model).values():
        table.pack()


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bart", "qwen3", "llama"])
def test_every_place_of_a_table_reads_the_same_codes(name, counts):
    model = {**TIED, **UNTIED}[name]()
    (dense,) = dense_tables(model)
    install(model, settings(), counts)
    table = model.get_submodule(dense.name)
    assert [*compressed_embeddings(model).values()] == [table]
    for places, kind in ((dense.shared, SharedEmbedding), (dense.heads, CompressedHead)):
        for place in places:
            module = model.get_submodule(place)
            assert type(module) is kind
            assert module.embedding is table
    assert not {*tied_weights(model), *tied_weights(model).values()} & dense.weights


@pytest.mark.parametrize("learning", [True, False])
def test_a_dense_head_keeps_a_copy_of_its_weights(learning, counts):
    model = TIED["gpt2"]()
    weight = model.lm_head.weight
    model.lm_head.weight.requires_grad_(learning)
    install(model, settings(head="dense"), counts)
    assert type(model.lm_head) is nn.Linear
    assert model.lm_head.weight.requires_grad == learning
    assert model.lm_head.weight.data_ptr() != weight.data_ptr()
    assert torch.equal(model.lm_head.weight, weight)


def test_counts_may_be_given_by_name_or_for_all(counts):
    names = "model.encoder.embed_tokens", "model.decoder.embed_tokens"
    model = TIED["marian-split"]()
    install(model, settings(), {names[0]: counts, names[1]: torch.arange(100)})
    tables = compressed_embeddings(model)
    assert torch.equal(tables[names[0]].token_counts(), counts)
    assert torch.equal(tables[names[1]].token_counts(), torch.arange(100))
    model = TIED["marian-split"]()
    install(model, settings(), {names[0]: counts})
    assert [table.cold for table in compressed_embeddings(model).values()] == [False, True]


def test_counts_of_no_table_are_refused(bert, counts):
    with pytest.raises(ValueError, match=r"token_counts names \['x'\], but the tables to compress are \['bert"):
        install(bert, settings(), {"x": counts})


def test_a_compressed_model_is_refused(bert, config):
    install(bert, config)
    with pytest.raises(ValueError, match="compressed already: load the dense model anew"):
        install(bert, config)


def test_nothing_changes_where_one_of_two_tables_is_refused(counts):
    model = TIED["marian-split"]()
    with torch.no_grad():
        model.model.decoder.embed_tokens.weight[7, 0] = float("inf")
    modules, ties = [*model.named_modules()], dict(tied_weights(model))
    with pytest.raises(ValueError, match="row of token 7"):
        install(model, settings())
    assert [*model.named_modules()] == modules
    assert tied_weights(model) == ties


@pytest.mark.parametrize("name", ["bert", "gpt2", "t5", "bart", "gemma3", "llama"])
def test_taking_out_gives_the_classes_and_ties_of_before(name, counts):
    model = {**TIED, **UNTIED}[name]()
    (dense,) = dense_tables(model)
    kinds, ties = {place: type(module) for place, module in model.named_modules()}, dict(tied_weights(model))
    install(model, settings(), counts)
    pack(model)
    expected = compressed_embeddings(model)[dense.name].to_embedding().weight
    take_out(model)
    assert {place: type(module) for place, module in model.named_modules()} == kinds
    assert tied_weights(model) == ties
    weight = model.get_submodule(dense.name).weight
    assert torch.equal(weight, expected)
    assert all(model.get_submodule(place).weight is weight for place in (*dense.shared, *dense.heads))


def test_taking_out_keeps_a_dense_head_and_unties_the_config(counts):
    model = TIED["bert"]()
    install(model, settings(head="dense"), counts)
    head = model.get_output_embeddings()
    kept = head.weight.detach().clone()
    pack(model)
    take_out(model)
    assert model.get_output_embeddings() is head
    assert torch.equal(head.weight, kept)
    assert head.weight is not model.get_input_embeddings().weight
    assert model.config.tie_word_embeddings is False
    assert tied_weights(model) == {}
    assert head.bias is not model.cls.predictions.bias


@pytest.mark.parametrize("name", ["gpt2", "bart"])
def test_a_head_that_was_untied_is_known_whatever_the_config_says(name, counts, ids, tmp_path):
    """PEFT's merge finds two weights and notes in the config that they are not tied."""
    model = pack_model(compress(TIED[name]().eval(), settings(head="dense"), counts))
    size, before = size_report(model).head_bytes, model(ids).logits
    model.config.tie_word_embeddings = False
    assert size_report(model).head_bytes == size > 0
    model.save_pretrained(tmp_path / "packed")
    assert close(type(model).from_pretrained(tmp_path / "packed")(ids).logits, before)
    decompress(model).save_pretrained(tmp_path / "plain")
    assert close(type(model).from_pretrained(tmp_path / "plain")(ids).logits, before)


def test_configs_inside_of_the_config_are_untied_along_with_it(counts):
    model = TIED["qwen2-vl"]()
    install(model, settings(head="dense"), counts)
    pack(model)
    take_out(model)
    assert model.config.get_text_config() is not model.config
    assert [config.tie_word_embeddings for config in (model.config, model.config.get_text_config())] == [False, False]


@pytest.mark.parametrize("training", [True, False])
def test_training_mode_of_the_table_is_kept_both_ways(training, counts):
    model = TIED["gpt2"]().train(training)
    install(model, settings(), counts)
    assert model.get_input_embeddings().training == training
    pack(model)
    take_out(model)
    assert model.get_input_embeddings().training == training


@pytest.mark.parametrize("learning", [True, False])
def test_a_frozen_table_stays_frozen_both_ways(learning, counts):
    model = TIED["gpt2"]()
    model.get_input_embeddings().requires_grad_(learning)
    install(model, settings(), counts)
    table = model.get_input_embeddings()
    assert {parameter.requires_grad for parameter in table.parameters()} == {learning}
    pack(model)
    take_out(model)
    assert model.get_input_embeddings().weight.requires_grad == learning


@pytest.mark.parametrize("name", ["bart", "llama"])
def test_hooks_are_handed_over_both_ways(name, counts):
    model, seen = {**TIED, **UNTIED}[name]().eval(), []
    note = lambda module, args, output: seen.append(type(module).__name__)  # noqa: E731
    handles = [
        module.register_forward_hook(note) for module in (model.get_input_embeddings(), model.get_output_embeddings())
    ]
    ids = torch.arange(6)[None]
    model.enable_input_require_grads()
    install(model, settings(), counts)
    model(ids)
    assert "AdaptiveCompressedEmbedding" in seen
    assert seen[-1] == ("CompressedHead" if name == "bart" else "Linear")
    model.get_input_embeddings().requires_grad_(False)
    assert model.get_input_embeddings()(ids).requires_grad
    pack(model)
    take_out(model)
    seen.clear()
    model(ids)
    assert seen[-1] == "Linear"
    for handle in handles:
        handle.remove()
    before = len(seen)
    model(ids)
    assert len(seen) == before


def test_a_module_is_replaced_wherever_it_stands():
    model, old, new = nn.Module(), nn.Linear(1, 1), nn.Linear(1, 1)
    model.first = model.second = old
    model.inner = nn.Sequential(old, nn.Linear(1, 1))
    kept = model.inner[1]
    replace_module(model, old, new)
    assert (model.first, model.second, model.inner[0], model.inner[1]) == (new, new, new, kept)


def test_what_is_put_in_computes_like_the_table_taken_from_it(counts):
    model = TIED["gemma3"]().eval()
    factor = float(model.get_input_embeddings().scalar_embed_scale)
    install(model, settings(), counts)
    table = model.get_input_embeddings()
    assert isinstance(table, AdaptiveCompressedEmbedding)
    ids = torch.arange(VOCABULARY)
    assert torch.allclose(table(ids), factor * table.to_embedding().weight, atol=1e-5)
