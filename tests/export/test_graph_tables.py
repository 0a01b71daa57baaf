"""Packed tables as graphs hold them say what they said."""

import copy

import pytest
import torch
from conftest import VOCABULARY
from torch import nn

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding
from hf_adacomp.export.graph_tables import GraphCodes, NibbleBook, for_graph

pytestmark = pytest.mark.usefixtures("quick_fit")


def packed_table(lengths: tuple[int, ...], dim: int = 33, **settings: object) -> AdaptiveCompressedEmbedding:
    config = AdaCompConfig(code_lengths=lengths, target_ratio=4, **settings)
    table = AdaptiveCompressedEmbedding.from_embedding(
        nn.Embedding(VOCABULARY, dim), config, 1000 // torch.arange(1, VOCABULARY + 1)
    )
    table.pack()
    return table.eval()


@pytest.mark.parametrize("lengths", [(4, 8, 28), (8, 16, 24, 32), (16,), tuple(range(4, 22, 2))])
@pytest.mark.parametrize("storage", ["int4", "int8", "float16"])
@torch.no_grad()
def test_vectors_are_the_same(lengths, storage):
    table = packed_table(lengths, codebook_dtype=storage)
    graph = copy.deepcopy(table)
    for_graph(graph)
    assert isinstance(graph.codebook.stored(), NibbleBook) == (storage == "int4")
    assert isinstance(graph.packed, GraphCodes) == (1 < len(lengths) <= 8)
    tokens = torch.arange(VOCABULARY)
    for found, expected in zip(graph.packed._locate(tokens), table.packed._locate(tokens), strict=True):
        assert torch.equal(found.to(torch.int64), expected.to(torch.int64))
    assert torch.allclose(graph(tokens), table(tokens), atol=1e-5)
    assert torch.allclose(graph.codebook.stored().vectors, table.codebook.stored().vectors, atol=1e-6)
