import copy
import pickle

import pytest
import torch
from conftest import close, tiny_bert_config, word_tokenizer
from huggingface_hub import EvalResult, ModelCard
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from transformers import BertForSequenceClassification

from hf_adacomp import AdaCompConfig, compress, decompress, model_card, pack, save_model_card, size_report
from hf_adacomp.reports.card import PICTURE

pytestmark = pytest.mark.usefixtures("quick_fit")


def score(value, data="toy"):
    return EvalResult(
        task_type="text-classification",
        dataset_type=data,
        dataset_name=data.title(),
        metric_type="accuracy",
        metric_value=value,
    )


def test_saving_writes_a_card(packed_bert, tmp_path):
    packed_bert.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.tags == ["adacomp", "compression"]
    assert card.data.library_name == "transformers"
    assert card.text.index("import hf_adacomp") < card.text.index(
        "from transformers import BertForSequenceClassification"
    )
    size = size_report(packed_bert)
    assert f"| all | {size.total_bytes:,} |" in card.text
    for length, tokens in size.tokens_per_length.items():
        assert f"| {length} | {tokens:,} |" in card.text
    assert f"![Tokens by code length]({PICTURE})" in card.text
    assert (tmp_path / PICTURE).read_bytes().startswith(b"\x89PNG")
    assert repr(packed_bert.get_input_embeddings().config) in card.text
    assert "## Accuracy" not in card.text


class Own(BertForSequenceClassification):
    """A user's own model, which no library has."""


def test_a_model_of_ones_own_is_imported_from_where_it_is(config, counts):
    card = model_card(pack(compress(Own(tiny_bert_config()), config, counts)))
    assert f"from {__name__} import Own\n" in card.text


def test_a_sentence_model_names_its_library():
    static = StaticEmbedding(word_tokenizer(), embedding_dim=32)
    model = compress(SentenceTransformer(modules=[static], device="cpu"), AdaCompConfig((4, 8), target_ratio=2))
    assert model_card(pack(model)).data.library_name == "sentence-transformers"


def test_text_and_metadata_of_the_owner_stay(packed_bert, tmp_path):
    mine = "---\nlicense: mit\ntags:\n- poetry\n---\n\n# Verses\n\nMine.\n\n```bash\n# not a title\n```\n"
    (tmp_path / "README.md").write_text(mine, encoding="utf-8")
    for _ in range(2):
        packed_bert.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert card.data.license == "mit"
    assert card.data.tags == ["poetry", "adacomp", "compression"]
    assert card.text.count("import hf_adacomp") == 1
    start, end = card.text.index("<!-- hf_adacomp"), card.text.index("end of hf_adacomp table")
    assert card.text[:start].strip() == "# Verses"
    assert card.text[end:].split("-->", 1)[1].strip() == "Mine.\n\n```bash\n# not a title\n```"


def test_a_card_without_title_gets_our_part_first(packed_bert):
    card = model_card(packed_bert, ModelCard("Mine.\n"), repo_id="user/name")
    assert card.text.strip().startswith("<!-- hf_adacomp")
    assert card.text.strip().endswith("Mine.")
    assert 'from_pretrained("user/name")' in card.text


def test_scores_are_added_replaced_and_kept(packed_bert, tmp_path):
    save_model_card(packed_bert, tmp_path, results=[score(0.9)], dense_results=[score(0.95)])
    save_model_card(packed_bert, tmp_path, results=[score(0.91), score(0.5, "other")], dense_results=[score(0.95)])
    packed_bert.save_pretrained(tmp_path)
    card = ModelCard.load(tmp_path / "README.md")
    assert sorted(result.metric_value for result in card.data.eval_results) == [0.5, 0.91]
    assert "| Toy | accuracy | 0.95 | 0.91 |" in card.text
    assert "| Other | accuracy |  | 0.5 |" in card.text
    assert "0.9 |" not in card.text


@pytest.mark.parametrize(
    ("name", "expected"),
    [("google-bert/bert-base-uncased", "google-bert/bert-base-uncased"), ("", None), ("/a b", None)],
)
def test_base_model_is_the_name_that_was_compressed(bert, config, counts, name, expected):
    bert.config._name_or_path = name
    card = model_card(pack(compress(bert, config, counts)))
    assert card.data.base_model == expected
    assert card.data.get("base_model_relation") == (None if expected is None else "quantized")
    assert model_card(bert, base_model="user/dense").data.base_model == "user/dense"


def test_a_loaded_model_is_not_its_own_base(packed_bert, tmp_path):
    packed_bert.save_pretrained(tmp_path)
    loaded = type(packed_bert).from_pretrained(tmp_path)
    loaded.config._name_or_path = "user/packed"
    assert model_card(loaded).data.base_model is None


def test_training_form_gets_no_card(bert, config, counts, tmp_path):
    compress(bert, config, counts).get_input_embeddings().step(0.2)
    bert.save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()


@pytest.mark.parametrize("content", [b"---\na: [\n---\n", b"---\n- a\n---\n", b"---\nl\xe4rm: 1\n---"])
def test_a_card_that_cannot_be_read_costs_no_saved_model(packed_bert, ids, tmp_path, caplog, content):
    (tmp_path / "README.md").write_bytes(content)
    packed_bert.save_pretrained(tmp_path)
    assert "the model is saved, but its card is not written" in caplog.text
    assert (tmp_path / "README.md").read_bytes() == content
    assert close(type(packed_bert).from_pretrained(tmp_path)(ids).logits, packed_bert(ids).logits)
    with pytest.raises(ValueError, match=r"README.md cannot be read as a model card: mend it or delete it"):
        save_model_card(packed_bert, tmp_path)


def test_without_matplotlib_there_is_no_picture(packed_bert, tmp_path, monkeypatch):
    monkeypatch.setattr("hf_adacomp.reports.card.can_plot", lambda: False)
    packed_bert.save_pretrained(tmp_path)
    assert PICTURE not in (tmp_path / "README.md").read_text(encoding="utf-8")
    assert not (tmp_path / PICTURE).exists()


def test_a_decompressed_model_saves_as_a_plain_one(packed_bert, tmp_path):
    decompress(packed_bert).save_pretrained(tmp_path)
    assert not (tmp_path / "README.md").exists()
    assert packed_bert.model_tags == []


def test_copies_save_themselves(packed_bert, ids, tmp_path):
    for twin in (copy.deepcopy(packed_bert), pickle.loads(pickle.dumps(packed_bert))):
        twin.classifier.bias.data += 1
        twin.save_pretrained(tmp_path)
        assert close(type(twin).from_pretrained(tmp_path)(ids).logits, twin(ids).logits)
        assert not torch.equal(twin(ids).logits, packed_bert(ids).logits)
