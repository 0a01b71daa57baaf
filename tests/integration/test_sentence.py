"""Models of sentence-transformers as a whole: compressed, trained, saved with all modules, loaded by their class."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import VOCABULARY, WORDS, child_environment
from datasets import Dataset
from safetensors.torch import load_file
from sentence_transformers import (
    CrossEncoder,
    SentenceTransformer,
    SentenceTransformerTrainer,
    SentenceTransformerTrainingArguments,
    SparseEncoder,
)
from sentence_transformers.sentence_transformer import losses
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Router, StaticEmbedding, Transformer
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import BertConfig, BertForMaskedLM, BertForSequenceClassification, BertModel, PreTrainedTokenizerFast

from hf_adacomp import (
    AdaCompCallback,
    AdaCompConfig,
    AdaptiveCompressedEmbedding,
    calibrate,
    compress,
    decompress,
    pack,
    size_report,
    token_table,
)
from hf_adacomp.cli import main
from hf_adacomp.integration.compressed_tables import require_compressed
from hf_adacomp.integration.parts import transformers_models
from hf_adacomp.integration.sentence import is_sentence_model, static_model, tokenizer_of
from hf_adacomp.nn.static import StaticConfig, StaticModel

pytestmark = pytest.mark.usefixtures("quick_fit")
SENTENCES = ["w1 w2 w3", "w4", "", "w5 w6 unheard-of w7 w8 w1"]


def words() -> Tokenizer:
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", *(f"w{i}" for i in range(VOCABULARY - 4))]
    tokenizer = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 2), ("[SEP]", 3)]
    )
    return tokenizer


def settings(**changes) -> AdaCompConfig:
    return AdaCompConfig(**{"code_lengths": (4, 8, 32), "target_ratio": 3, "codebook_dtype": "int8", **changes})


@pytest.fixture
def encoder(tmp_path) -> SentenceTransformer:
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, **sizes)).save_pretrained(tmp_path / "bert")
    special = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    PreTrainedTokenizerFast(tokenizer_object=words(), **special).save_pretrained(tmp_path / "bert")
    modules = [Transformer(str(tmp_path / "bert")), Pooling(32, "mean"), Normalize()]
    return SentenceTransformer(modules=modules, device="cpu")


@pytest.fixture
def static() -> SentenceTransformer:
    weights = torch.randn(VOCABULARY, 32)
    return SentenceTransformer(modules=[StaticEmbedding(words(), embedding_weights=weights), Normalize()], device="cpu")


@pytest.fixture(params=["encoder", "static"])
def model(request) -> SentenceTransformer:
    return request.getfixturevalue(request.param)


def close(a, b, size=1e-5) -> bool:
    return a.shape == b.shape and bool(np.abs(a - b).max() < size)


def test_a_whole_model_is_saved_and_loaded_by_its_own_class(model, counts, tmp_path):
    dense = model.encode(SENTENCES)
    assert compress(model, settings(), counts) is model
    assert pack(model) is model
    before = model.encode(SENTENCES)
    assert before.shape == dense.shape
    assert size_report(model).ratio >= 3
    model.save_pretrained(str(tmp_path / "packed"))
    card = (tmp_path / "packed" / "README.md").read_text()
    assert "import hf_adacomp" in card
    assert 'SentenceTransformer("path/to/this/folder")' in card
    loaded = SentenceTransformer(str(tmp_path / "packed"), device="cpu")
    assert close(loaded.encode(SENTENCES), before)
    assert [type(module) for module in loaded] == [type(module) for module in model]
    loaded.save_pretrained(str(tmp_path / "again"))
    assert "import hf_adacomp" in (tmp_path / "again" / "README.md").read_text()
    rows = token_table(loaded, tokenizer_of(loaded))
    assert (len(rows), rows[4].token) == (VOCABULARY, "w0")


def test_decompressed_it_needs_us_no_more(model, counts, tmp_path):
    kinds = [type(module) for module in model]
    pack(compress(model, settings(), counts))
    before = model.encode(SENTENCES)
    assert decompress(model) is model
    assert [type(module) for module in model] == kinds
    assert close(model.encode(SENTENCES), before)
    model.save_pretrained(str(tmp_path / "plain"))
    assert "adacomp" not in "".join(file.read_text() for file in (tmp_path / "plain").rglob("*.json"))
    code = f"import sentence_transformers as s; print(s.SentenceTransformer({str(tmp_path / 'plain')!r}, device='cpu'))"
    run = subprocess.run(
        [sys.executable, "-c", code], env=child_environment(), capture_output=True, text=True, check=True
    )
    assert kinds[0].__name__ in run.stdout


def test_without_our_import_loading_ends_in_an_error(model, counts, tmp_path):
    pack(compress(model, settings(), counts)).save_pretrained(str(tmp_path / "packed"))
    code = f"import sentence_transformers as s; s.SentenceTransformer({str(tmp_path / 'packed')!r}, device='cpu')"
    run = subprocess.run([sys.executable, "-c", code], env=child_environment(), capture_output=True, check=False)
    assert run.returncode != 0
    assert "adacomp" in run.stderr.decode()


def test_its_trainer_trains_and_resumes(model, tmp_path):
    compress(model, settings(observe_fraction=0.25, select_fraction=0.5))
    rows = {"a": ["w1 w2", "w3"] * 8, "b": ["w4", "w5 w6"] * 8, "score": [0.1, 0.9] * 8}
    arguments = SentenceTransformerTrainingArguments(
        str(tmp_path / "run"), max_steps=8, save_steps=5, report_to="none", use_cpu=True, disable_tqdm=True
    )

    def trainer(trained):
        loss = losses.CosineSimilarityLoss(trained)
        data = Dataset.from_dict(rows)
        return SentenceTransformerTrainer(trained, arguments, data, loss=loss, callbacks=[AdaCompCallback()])

    trainer(model).train()
    assert [table.phase for table in require_compressed(model).values()] == ["packed"]
    model.save_pretrained(str(tmp_path / "packed"))
    assert "import hf_adacomp" in (tmp_path / "packed" / "README.md").read_text()
    resumed = SentenceTransformer(str(tmp_path / "run" / "checkpoint-5"), device="cpu")
    trainer(resumed).train(resume_from_checkpoint=str(tmp_path / "run" / "checkpoint-5"))
    assert close(resumed.encode(SENTENCES), model.encode(SENTENCES))


@pytest.mark.usefixtures("encoder")
def test_a_pooling_that_changes_in_place_what_gradients_need(tmp_path):
    sparse = SparseEncoder(str(tmp_path / "bert"), device="cpu")
    texts = [f"w{i} w{i + 1}" for i in range(40)]
    pack(calibrate(compress(sparse, settings()), texts, show_progress=False))
    expected = sparse.encode(SENTENCES, convert_to_sparse_tensor=False)
    sparse.save_pretrained(str(tmp_path / "sparse"))
    loaded = SparseEncoder(str(tmp_path / "sparse"), device="cpu")
    assert close(loaded.encode(SENTENCES, convert_to_sparse_tensor=False).numpy(), expected.numpy())


def test_a_static_model_gives_the_vectors_of_its_bag(static):
    dense = static.encode(SENTENCES)
    with torch.no_grad():
        bag = static[0].embedding
        compressed = compress(static, settings(target_ratio=1.01, code_lengths=(32,), codebook_dtype="float32"))
        table = compressed[0].model.embed_tokens
    table.train()  # the source itself, while it is observed
    compressed.train()
    features = compressed.preprocess(SENTENCES) if hasattr(compressed, "preprocess") else compressed.tokenize(SENTENCES)
    with torch.no_grad():
        found = compressed(features)["sentence_embedding"].numpy()
    assert bag.weight.shape == (VOCABULARY, 32)
    assert close(found, dense, 2e-3)  # lengths of vectors are rounded to a byte


def test_a_model_that_cannot_be_compressed_stays_as_it_is(static):
    kinds = [type(module) for module in static]
    with pytest.raises(ValueError, match="target_ratio"):
        compress(static, settings(target_ratio=1e6))
    assert [type(module) for module in static] == kinds
    assert isinstance(static[0].embedding.weight, torch.nn.Parameter)


def test_several_models_in_one_object_are_all_compressed_or_none(encoder, counts):
    class Pair(torch.nn.Module):
        def __init__(self, first, second):
            super().__init__()
            self.first, self.second = first, second

    def bert(tokens):
        return BertModel(BertConfig(vocab_size=tokens, hidden_size=32, num_hidden_layers=1, num_attention_heads=2))

    pair = pack(compress(Pair(bert(400), bert(500)), settings()))
    assert [inner.get_input_embeddings().phase for inner in transformers_models(pair)] == ["packed", "packed"]
    pair = Pair(bert(400), bert(20))
    with pytest.raises(ValueError, match="target_ratio"):
        compress(pair, settings())
    assert [type(inner.get_input_embeddings()) for inner in transformers_models(pair)] == [torch.nn.Embedding] * 2
    assert not hasattr(pair.first.config, "quantization_config")


def test_static_embeddings_of_a_route_stay_dense_and_are_told_of(encoder, static, counts, caplog):
    routed = SentenceTransformer(modules=[Router.for_query_document([static[0]], [*encoder])], device="cpu")
    compress(routed, AdaCompConfig((4, 8, 28), target_ratio=8), counts)
    assert "'0.sub_modules.query.0' stays dense" in caplog.text


def test_tables_that_the_library_cannot_load_are_not_saved(static, counts, tmp_path):
    model = SentenceTransformer(modules=[Router.for_query_document([static[0]], [static[0]])], device="cpu")
    with pytest.raises(ValueError, match="neither a transformers model nor begins with a StaticEmbedding"):
        compress(model, AdaCompConfig((4, 8, 28), target_ratio=8))
    inner = model[0].sub_modules["query"][0]
    inner.embedding = AdaptiveCompressedEmbedding.from_embedding(
        inner.embedding, AdaCompConfig((4, 8, 28), target_ratio=8), counts
    )
    with pytest.raises(ValueError, match=r"query.0.embedding is a compressed table outside of a transformers model"):
        pack(model).save(str(tmp_path))


def test_what_holds_no_model_is_refused():
    with pytest.raises(ValueError, match=r"got Linear.*from_embedding"):
        compress(torch.nn.Linear(2, 2), settings())
    with pytest.raises(ValueError, match=r"got Sequential.*from_embedding"):
        compress(torch.nn.Sequential(torch.nn.Embedding(3, 3)), settings())
    assert not is_sentence_model(torch.nn.Sequential(torch.nn.Linear(2, 2)))
    assert static_model(torch.nn.Sequential(torch.nn.Linear(2, 2))) is None


def test_uploads_leave_a_card_alone_that_is_there(encoder, counts, tmp_path):
    pack(compress(encoder, settings(), counts))
    encoder.save(str(tmp_path / "upload"), create_model_card=False)
    assert not (tmp_path / "upload" / "README.md").exists()
    (tmp_path / "upload" / "README.md").write_text("# Mine\n")
    encoder.save(str(tmp_path / "upload"))
    assert "import hf_adacomp" in (tmp_path / "upload" / "README.md").read_text()


def test_the_command_line_keeps_all_modules(model, tmp_path, capsys):
    model.save_pretrained(str(tmp_path / "dense"))
    text = tmp_path / "text.txt"
    text.write_text("w1 w2 w3\nw1 w1\n")
    packed = tmp_path / "packed"
    options = ["--ratio", "3", "--code-lengths", "4", "32", "--counts-from", str(text)]
    assert main(["compress", str(tmp_path / "dense"), str(packed), *options]) == 0
    loaded = SentenceTransformer(str(packed), device="cpu")
    assert isinstance(loaded[-1], Normalize)
    assert close(np.linalg.norm(loaded.encode(["w1 w2"]), axis=1), np.ones(1))
    assert main(["inspect", str(packed)]) == 0
    assert "w490" in capsys.readouterr().out
    assert main(["decompress", str(packed), str(tmp_path / "plain")]) == 0
    plain = SentenceTransformer(str(tmp_path / "plain"), device="cpu")
    assert [type(module) for module in plain] == [type(module) for module in model]
    assert close(plain.encode(SENTENCES), loaded.encode(SENTENCES))


def test_static_model_ignores_what_is_masked(tmp_path):
    static = StaticModel(StaticConfig(vocab_size=4, hidden_size=2))
    ids, mask = torch.tensor([[1, 99]]), torch.tensor([[1, 0]])
    assert torch.equal(static(ids, mask).last_hidden_state[0, 0], static.embed_tokens.weight[1])
    static.save_pretrained(tmp_path)
    assert Path(tmp_path / "config.json").read_text().count("adacomp-static") == 1


def test_the_command_line_keeps_the_kind_of_model(tmp_path, encoder):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 48}
    BertForSequenceClassification(BertConfig(vocab_size=VOCABULARY, num_labels=1, **sizes)).save_pretrained(
        tmp_path / "b"
    )
    encoder.tokenizer.save_pretrained(tmp_path / "b")
    CrossEncoder(str(tmp_path / "b"), device="cpu").save_pretrained(str(tmp_path / "dense"))
    options = ["--ratio", "3", "--code-lengths", "4", "32"]
    assert main(["compress", str(tmp_path / "dense"), str(tmp_path / "packed"), *options]) == 0
    loaded = CrossEncoder(str(tmp_path / "packed"), device="cpu")
    assert [inner.get_input_embeddings().phase for inner in transformers_models(loaded)] == ["packed"]
    assert np.isfinite(loaded.predict([("w1", "w2")])).all()
    assert "classifier.weight" in load_file(tmp_path / "packed" / "model.safetensors")


@pytest.mark.filterwarnings("default:__array_wrap__:DeprecationWarning")  # pandas', of numpy
def test_a_router_of_two_encoders_saves_and_loads(toy_model, tmp_path):
    def route() -> list[torch.nn.Module]:
        return [Transformer(str(toy_model)), Pooling(32, "mean")]

    router = Router.for_query_document(query_modules=route(), document_modules=route())
    model = SentenceTransformer(modules=[router], device="cpu")
    pack(compress(model, AdaCompConfig((4, 8, 20), target_ratio=10), 1000 // torch.arange(1, 205)))
    model.save_pretrained(str(tmp_path))
    loaded = SentenceTransformer(str(tmp_path), device="cpu")
    assert close(loaded.encode_document(WORDS[:4]), model.encode_document(WORDS[:4]))
