"""Static models: directions in the table, lengths of vectors as gains beside it."""

import pytest
import torch
from conftest import close
from safetensors.torch import load_file, save_file
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModel

from hf_adacomp import AdaCompConfig, add_tokens, compress, decompress, keep_tokens, pack, size_report
from hf_adacomp.integration.parts import transformers_models
from hf_adacomp.nn.static import StaticConfig, StaticModel

pytestmark = pytest.mark.usefixtures("quick_fit")
TOKENS, DIM = 600, 64


@pytest.fixture
def vectors() -> torch.Tensor:
    """Vectors of very different lengths; the first is zero, as that of an unknown word."""
    generator = torch.Generator().manual_seed(0)
    lengths = torch.logspace(-1.5, 0.5, TOKENS)
    lengths[0] = 0
    return torch.randn(TOKENS, DIM, generator=generator) * lengths[:, None]


@pytest.fixture
def model(vectors) -> SentenceTransformer:
    words = Tokenizer(models.WordLevel({f"w{i}": i for i in range(TOKENS)}, unk_token="w0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return SentenceTransformer(modules=[StaticEmbedding(words, embedding_weights=vectors.clone())], device="cpu")


@pytest.fixture
def packed(model) -> SentenceTransformer:
    return pack(compress(model, AdaCompConfig(target_ratio=12), 600 // torch.arange(1, TOKENS + 1)))


def decoded(model: SentenceTransformer) -> torch.Tensor:
    (static,) = transformers_models(model)
    with torch.no_grad():
        return static(torch.arange(static.config.vocab_size)[None]).last_hidden_state[0]


def test_each_vector_keeps_its_length_however_short_its_code(packed, vectors):
    found, wanted = decoded(packed).norm(dim=1), vectors.norm(dim=1)
    levels = transformers_models(packed)[0].gain_levels
    assert not found[0]
    assert levels.max() == 255
    assert ((found - wanted).abs() <= 1.1 * wanted / levels.clamp_min(1))[1:].all()  # half a level, squared
    cosines = torch.cosine_similarity(decoded(packed)[1:], vectors[1:])
    assert cosines.mean() > 0.5


def test_gains_are_in_the_size(packed, tmp_path):
    report = size_report(packed)
    assert report.gains_bytes == TOKENS + 4
    assert report.ratio >= 12
    assert "lengths of vectors" in str(report)
    packed.save_pretrained(str(tmp_path))
    tensors = load_file(tmp_path / "model.safetensors")
    assert sum(tensor.nbytes for tensor in tensors.values()) == report.total_bytes


def test_saved_and_loaded_it_is_the_same(packed, tmp_path):
    packed.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert close(decoded(loaded), decoded(packed))
    half = AutoModel.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert half.gain_levels.dtype == torch.uint8
    assert half(torch.tensor([[1, 2]])).last_hidden_state.dtype == torch.bfloat16


def test_a_file_without_gains_is_damaged(packed, tmp_path):
    packed.save_pretrained(str(tmp_path))
    file = tmp_path / "model.safetensors"
    save_file({name: x for name, x in load_file(file).items() if name != "gain_levels"}, file, {"format": "pt"})
    with pytest.raises(ValueError, match=r"gain_levels.*damaged"):
        AutoModel.from_pretrained(tmp_path)


def test_decompressed_the_table_has_whole_vectors(packed):
    before = decoded(packed)
    decompress(packed)
    assert torch.equal(packed[0].embedding.weight, before)


def test_gains_follow_the_vocabulary(packed):
    before = decoded(packed)
    keep_tokens(packed, [0, 5, 599])
    torch.testing.assert_close(decoded(packed), before[[0, 5, 599]])
    new = torch.stack([3 * before[599], torch.zeros(DIM)])
    add_tokens(packed, 2, new)
    found = decoded(packed)
    torch.testing.assert_close(found[:3], before[[0, 5, 599]], rtol=0.1, atol=0.01)  # to another largest gain
    torch.testing.assert_close(found[3:].norm(dim=1), new.norm(dim=1))
    assert torch.cosine_similarity(found[3], new[0], dim=0) > 0.9
    add_tokens(packed, 1)
    torch.testing.assert_close(decoded(packed)[:5], found)
    add_tokens(packed, 1, torch.zeros(1, DIM, dtype=torch.float16))
    assert not decoded(packed)[-1].any()


def test_where_gains_would_be_a_large_part_there_are_none(model, vectors):
    compress(model, AdaCompConfig((4,), target_ratio=80, codebook_dtype="int4"))
    (static,) = transformers_models(model)
    assert not static.config.gains
    assert torch.equal(static.embed_tokens.training_state.source, vectors)


def test_a_size_out_of_reach_is_told_as_it_was_asked_for(model):
    with pytest.raises(ValueError, match=rf"target_ratio=20 cannot be met: lengths of vectors take {TOKENS + 4} bytes"):
        compress(model, AdaCompConfig((512,), target_ratio=20))
    assert isinstance(model[0], StaticEmbedding)


def test_a_model_whose_vectors_are_nan_is_left_alone(model):
    with torch.no_grad():
        model[0].embedding.weight[3, 3] = torch.nan
    with pytest.raises(ValueError, match="NaN"):
        compress(model, AdaCompConfig(target_ratio=12))
    assert isinstance(model[0], StaticEmbedding)


def test_a_zero_vector_stays_zero_in_half_precision(model, vectors):
    compress(model.half(), AdaCompConfig(target_ratio=12))
    found = decoded(model)
    assert found.dtype == torch.float16
    assert not found[0].any()
    torch.testing.assert_close(found.float(), vectors, rtol=0.3, atol=0.01)


def test_without_gains_vectors_are_those_of_the_table():
    static = StaticModel(StaticConfig(4, 2))
    assert static.gain_bytes == 0
    assert torch.equal(static(torch.tensor([[1]])).last_hidden_state[0, 0], static.embed_tokens.weight[1])
