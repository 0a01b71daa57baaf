import copy
import pickle

import pytest
import torch
from conftest import VOCABULARY, close
from safetensors.torch import load_model, save_model

from hf_adacomp import compress, decompress, pack
from hf_adacomp.integration import methods
from hf_adacomp.integration.methods import METHODS, TAGS, give_methods, take_methods

pytestmark = pytest.mark.usefixtures("quick_fit")


@pytest.fixture
def written(monkeypatch):
    """Folders that a card was written to."""
    folders = []
    monkeypatch.setattr(methods, "_write_card", lambda model, folder, **where: folders.append(str(folder)))
    return folders


def test_packed_models_save_with_a_card(bert, config, counts, tmp_path, written):
    compress(bert, config, counts).get_input_embeddings().step(0.1)
    bert.save_pretrained(tmp_path / "training")
    assert written == []
    pack(bert).save_pretrained(tmp_path / "packed")
    assert written == [str(tmp_path / "packed")]
    bert.save_pretrained(tmp_path / "second", is_main_process=False)
    bert.save_pretrained(tmp_path / "third", False)
    assert written == [str(tmp_path / "packed")]


@pytest.mark.parametrize("cast", ["half", "float"])
def test_loaded_models_are_cast_as_others_are(packed_bert, tmp_path, cast):
    packed_bert.save_pretrained(tmp_path)
    loaded = getattr(type(packed_bert).from_pretrained(tmp_path), cast)()
    assert loaded.dtype == loaded.get_input_embeddings().weight.dtype == getattr(torch, cast)


def test_methods_and_tags_come_and_go(bert):
    give_methods(bert)
    assert set(METHODS) <= set(bert.__dict__)
    assert set(TAGS) <= set(bert.model_tags)
    take_methods(bert)
    assert not set(METHODS) & set(bert.__dict__)
    assert not set(TAGS) & set(bert.model_tags)


@pytest.mark.parametrize("twin", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_copies_have_methods_of_their_own(packed_bert, twin):
    other = twin(packed_bert)
    other.resize_token_embeddings(VOCABULARY + 2)
    assert other.get_input_embeddings().num_embeddings == VOCABULARY + 2
    assert packed_bert.get_input_embeddings().num_embeddings == VOCABULARY


def test_plain_again_it_has_the_methods_of_its_class(packed_bert):
    decompress(packed_bert)
    assert packed_bert.save_pretrained.__func__ is type(packed_bert).save_pretrained


@pytest.mark.parametrize("form", ["training", "packed"])
def test_safetensors_saves_and_loads_models_itself(bert, config, counts, ids, tmp_path, form):
    compress(bert, config, counts)
    if form == "packed":
        pack(bert)
    other = copy.deepcopy(bert)
    other.get_input_embeddings().codebook.bias.data += 1
    save_model(bert, str(tmp_path / "model.safetensors"))
    load_model(other, tmp_path / "model.safetensors")
    assert close(other.eval()(ids).logits, bert.eval()(ids).logits)
