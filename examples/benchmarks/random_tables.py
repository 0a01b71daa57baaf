"""Packed tables of random codes: time and memory are the same whatever the codes hold."""

import copy

import torch
from torch import Tensor
from transformers import PreTrainedModel

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding
from hf_adacomp.codes import bits as bit_format
from hf_adacomp.codes.packed import PackedCodes
from hf_adacomp.integration.attachment import attach
from hf_adacomp.integration.dense_tables import dense_tables
from hf_adacomp.integration.layout import empty_table
from hf_adacomp.integration.quantizer import AdaCompHfQuantizer
from hf_adacomp.integration.surgery import put

LENGTHS, SHARES = (16, 64, 256), (0.4, 0.5, 0.1)
"""Code lengths and the shares of tokens that have them: 64 bits a token on average."""

CONFIG = AdaCompConfig(LENGTHS, target_ratio=1.0)


def random_table(tokens: int, dim: int) -> AdaptiveCompressedEmbedding:
    """A packed table of random codes; low ids have long ones."""
    sizes = [int(share * tokens) for share in SHARES[:-1]]
    sizes.append(tokens - sum(sizes))
    layout = {
        "num_embeddings": tokens,
        "embedding_dim": dim,
        "padding_idx": None,
        "code_lengths": LENGTHS,
        "zero_padding": False,
        "scale": 1.0,
        "tokens_per_length": sizes,
    }
    table = empty_table(layout, CONFIG, torch.float32).to_empty(device="cpu")
    with torch.no_grad():
        book = table.codebook
        book.weight.copy_(bit_format.pack_nibbles(torch.randint(-7, 8, (book.length, dim), dtype=torch.int8)))
        book.scale.fill_((book.length * dim) ** -0.5 / 4)
        book.bias.normal_()
    assignment = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.uint8), torch.tensor(sizes)).flip(0)
    octets = sum(bit_format.group_bytes(sizes, LENGTHS))
    table.packed = PackedCodes.of(assignment, LENGTHS, torch.randint(0, 256, (octets,), dtype=torch.uint8))
    return table.eval()


def with_random_table(dense: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose table, and tied head, is a packed one."""
    model = copy.deepcopy(dense)
    (table,) = dense_tables(model)
    put(model, table, random_table(*table.owner.weight.shape), "compress")
    attach(model, AdaCompHfQuantizer(CONFIG, pre_quantized=False))
    return model.eval()


def zipf_ids(tokens: int, number: int) -> Tensor:
    return torch.multinomial(1 / torch.arange(1.0, tokens + 1), number, replacement=True)
