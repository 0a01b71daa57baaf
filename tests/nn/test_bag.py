"""A compressed table in the place of an `nn.EmbeddingBag`: same arguments, same results, same refusals."""

import pytest
import torch
from conftest import VOCABULARY
from torch import nn
from torch.nn import functional as F
from transformers import PretrainedConfig, PreTrainedModel

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding, compress, decompress, pack
from hf_adacomp.nn.bag import Bag

pytestmark = pytest.mark.usefixtures("quick_fit")


def table_in(phase, config, counts, **options) -> AdaptiveCompressedEmbedding:
    bag = nn.EmbeddingBag(VOCABULARY, 32, **options)
    table = AdaptiveCompressedEmbedding.from_embedding(bag, config, counts)
    table.pack() if phase == "packed" else table.step(0.9, show_progress=False)
    return table.eval()


def test_bag_of_a_module():
    assert Bag.of(nn.Embedding(2, 2)) is None
    assert Bag.of(nn.EmbeddingBag(2, 2, mode="max")) == Bag("max", False)
    assert Bag("sum", True).dense(3).weight.shape == (1, 3)


@pytest.mark.parametrize("phase", ["encode", "packed"])
@pytest.mark.parametrize("mode", ["sum", "mean", "max"])
@pytest.mark.parametrize("padding", [None, 3])
@pytest.mark.parametrize("last", [False, True])
def test_results_are_those_of_torch(phase, mode, padding, last, config, counts):
    table = table_in(phase, config, counts, mode=mode, padding_idx=padding, include_last_offset=last)
    weight = table.weight_values()
    flat, rows = torch.randint(0, 9, (20,)), torch.randint(0, 9, (4, 5))
    offsets = torch.tensor([0, 3, 3, 9, 20] if last else [0, 3, 3, 9])
    options = {"mode": mode, "padding_idx": padding, "include_last_offset": last}
    with torch.no_grad():
        expected = F.embedding_bag(flat, weight, offsets, **options)
        assert torch.allclose(table(flat, offsets), expected, atol=1e-5)
        if not last:
            assert torch.allclose(table(rows), F.embedding_bag(rows, weight, **options), atol=1e-5)
        if mode == "sum":
            weights = torch.rand(20)
            expected = F.embedding_bag(flat, weight, offsets, per_sample_weights=weights, **options)
            assert torch.allclose(table(flat, offsets, weights), expected, atol=1e-5)
        dense = table.to_embedding()
        assert type(dense) is nn.EmbeddingBag
        assert torch.allclose(dense(flat, offsets), table(flat, offsets), atol=1e-5)


def test_what_torch_refuses_is_refused(config, counts):
    table = table_in("packed", config, counts, mode="mean")
    with pytest.raises(NotImplementedError, match="per_sample_weights"):
        table(torch.tensor([1, 2]), torch.tensor([0]), torch.ones(2))
    with pytest.raises(ValueError, match="offsets"):
        table(torch.tensor([1, 2]))
    with pytest.raises(IndexError):
        table(torch.tensor([VOCABULARY]), torch.tensor([0]))


def test_a_table_of_single_vectors_takes_no_offsets(config, counts):
    table = AdaptiveCompressedEmbedding.from_embedding(nn.Embedding(VOCABULARY, 32), config, counts)
    with pytest.raises(TypeError, match="offsets"):
        table(torch.tensor([1]), torch.tensor([0]))


class BagConfig(PretrainedConfig):
    model_type = "bag-of-words"


class BagOfWords(PreTrainedModel):
    config_class = BagConfig

    def __init__(self, config):
        super().__init__(config)
        self.bag = nn.EmbeddingBag(VOCABULARY, 32, mode="sum", include_last_offset=True)
        self.classifier = nn.Linear(32, 2)
        self.post_init()

    def get_input_embeddings(self):
        return self.bag

    def forward(self, input_ids, offsets):
        return self.classifier(self.bag(input_ids, offsets))


def test_a_model_of_a_bag_trains_saves_loads_and_leaves_again(counts, tmp_path):
    config = AdaCompConfig((4, 8, 32), target_ratio=3, codebook_dtype="int8", observe_fraction=0.1)
    model = compress(BagOfWords(BagConfig()), config, counts)
    ids, offsets = torch.randint(0, VOCABULARY, (9,)), torch.tensor([0, 4, 9])
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-2)
    for fraction in (0.0, 0.1, 0.3, 0.9):
        model.train()(ids, offsets).square().sum().backward()
        model.bag.step(fraction)
        optimizer.step()
        optimizer.zero_grad()
    expected = pack(model).eval()(ids, offsets)
    model.save_pretrained(tmp_path)
    loaded = BagOfWords.from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(ids, offsets), expected, atol=1e-5)
    plain = decompress(loaded)
    assert type(plain.bag) is nn.EmbeddingBag
    assert torch.allclose(plain(ids, offsets), expected, atol=1e-5)
