import pytest
import torch
from conftest import LENGTHS, VOCABULARY
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from hf_adacomp import compress, pack, token_table

pytestmark = pytest.mark.usefixtures("quick_fit")


def test_token_table_lists_every_token(bert, config, counts):
    vocabulary = {f"word{i}": i for i in range(VOCABULARY)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="word0")))
    compress(bert, config, counts)
    rows = token_table(bert, tokenizer)
    assert [row.id for row in rows] == list(range(VOCABULARY))
    assert (rows[7].token, rows[7].count) == ("word7", int(counts[7]))
    assert torch.equal(torch.tensor([row.bits for row in rows]), bert.get_input_embeddings().code_lengths())
    assert {row.bits for row in rows} <= set(LENGTHS)
    assert {row[2] for row in token_table(pack(bert), tokenizer)} == {None}


def test_rows_beyond_the_tokenizer_have_no_token(packed_bert):
    words = models.WordLevel({f"word{i}": i for i in range(VOCABULARY - 2)}, unk_token="word0")
    rows = token_table(packed_bert, PreTrainedTokenizerFast(tokenizer_object=Tokenizer(words)))
    assert [row.token for row in rows[-3:]] == [f"word{VOCABULARY - 3}", None, None]


def test_needs_a_tokenizer(packed_bert):
    with pytest.raises(ValueError, match=r"takes the model's tokenizer, .*; got NoneType"):
        token_table(packed_bert, None)


def test_needs_a_compressed_model(bert):
    with pytest.raises(ValueError, match="call compress"):
        token_table(bert, None)
