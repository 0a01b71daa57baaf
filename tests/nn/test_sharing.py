"""What shares a table does not own it, and finds it wherever adapters and copies leave it."""

import copy

import pytest
import torch
from architectures import TIED
from conftest import VOCABULARY
from torch import nn
from transformers import T5EncoderModel

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding, compress, pack
from hf_adacomp.nn.head import CompressedHead
from hf_adacomp.nn.sharing import Place, SharedEmbedding

pytestmark = pytest.mark.usefixtures("quick_fit")


@pytest.fixture
def table(config, counts) -> AdaptiveCompressedEmbedding:
    table = AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, 32, padding_idx=0), config, counts)
    table.pack()
    return table.eval()


@pytest.fixture
def llama(counts):
    config = AdaCompConfig((4, 8, 32), target_ratio=3, codebook_dtype="int8")
    return pack(compress(TIED["llama-tied"](), config, counts)).eval()


def test_places_do_not_own_the_table(table):
    shared, head = SharedEmbedding(table), CompressedHead(table, nn.Parameter(torch.zeros(VOCABULARY)))
    assert [*shared.state_dict()] == ["weight"]
    assert [*head.state_dict()] == ["bias", "weight"]
    assert shared.state_dict()["weight"].numel() == head.state_dict()["weight"].numel() == 0
    assert (shared.num_embeddings, shared.embedding_dim, shared.padding_idx) == (VOCABULARY, 32, 0)
    assert (head.in_features, head.out_features) == (32, VOCABULARY)
    ids = torch.tensor([3, 1])
    assert torch.equal(shared(ids), table(ids))


class Wrapper(nn.Module):
    """Passes on what it does not know, as PEFT's wrappers do."""

    def __init__(self, active):
        super().__init__()
        self.active = active

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(super().__getattr__("active"), name)


class Layer(nn.Module):
    """Gives its base layer when asked, as PEFT's layers do."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def get_base_layer(self):
        return self.base


@pytest.mark.parametrize("wrap", [lambda table: table, Wrapper, Layer, lambda table: Wrapper(Layer(table))])
def test_a_table_is_found_in_its_place(table, wrap):
    model = nn.Sequential(nn.Sequential(wrap(table)))
    assert Place(model, "0.0").table() is table


def test_what_was_exchanged_is_named(table):
    model = nn.Sequential(nn.Embedding(4, 2))
    with pytest.raises(ValueError, match=r"'0' is a Embedding now.*decompress"):
        SharedEmbedding(Place(model, "0"))(torch.tensor([1]))


def test_copies_read_the_table_of_their_model(llama):
    other, head = copy.deepcopy(llama), copy.deepcopy(llama.lm_head)
    assert other.lm_head.embedding is other.get_input_embeddings() is not llama.get_input_embeddings()
    assert head.embedding is llama.get_input_embeddings()


def test_an_encoder_is_not_saved_without_the_table_that_it_reads(counts, tmp_path):
    model = pack(compress(TIED["t5"](), AdaCompConfig((4, 8, 32), target_ratio=3), counts))
    with pytest.raises(ValueError, match=r"T5Stack reads the compressed table.*T5EncoderModel"):
        model.encoder.save_pretrained(tmp_path / "encoder")
    model.save_pretrained(tmp_path / "whole")
    loaded = T5EncoderModel.from_pretrained(tmp_path / "whole")
    assert loaded.get_input_embeddings().phase == "packed"


def test_a_copy_in_the_place_of_the_table_is_read(llama):
    llama.model.embed_tokens = copy.deepcopy(llama.model.embed_tokens)
    assert llama.lm_head.embedding is llama.model.embed_tokens


def test_hidden_states_come_to_the_table(table):
    with pytest.raises(ValueError, match="offloading"):
        table.to("meta")(torch.tensor([1]))
    with pytest.raises(ValueError, match="offloading"):
        CompressedHead(table)(torch.zeros(1, 32))
