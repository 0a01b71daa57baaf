"""Files of `format_version` 3, whose packed code-books are not divided by the rate."""

import json

import pytest
import torch
from conftest import LENGTHS, close, same_state
from safetensors.torch import load_file, save_file
from transformers import BertForSequenceClassification

from hf_adacomp import AdaCompConfig, compress, pack
from hf_adacomp.config import FORMAT_VERSION, PLAIN_VERSION
from hf_adacomp.integration.layout import sealed
from hf_adacomp.nn.loading import UNITS

pytestmark = pytest.mark.usefixtures("quick_fit")

PREFIX = "bert.embeddings.word_embeddings."


def write_plain(folder, rate: float, part: str) -> None:
    """Make of a saved model a file of the format before, whose code-books are not divided by the rate."""
    config = json.loads((folder / "config.json").read_text())
    settings = config["quantization_config"]
    settings["format_version"] = PLAIN_VERSION
    for name, layout in settings["tables"].items():
        del layout["checksum"]
        settings["tables"][name] = sealed(layout, AdaCompConfig(**{**settings, "tables": None}))
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / "model.safetensors"
    tensors = load_file(file)
    tensors[PREFIX + part] *= rate
    tensors.pop(PREFIX + UNITS, None)
    save_file(tensors, file, {"format": "pt"})


@pytest.mark.parametrize("codebook_dtype", ["int4", "int8", "float16", "float32"])
def test_files_of_the_format_before_are_read_and_saved_anew(codebook_dtype, bert, counts, ids, tmp_path):
    settings = AdaCompConfig(LENGTHS, target_ratio=2, codebook_dtype=codebook_dtype)
    model = pack(compress(bert, settings, counts)).eval()
    model.save_pretrained(tmp_path / "plain")
    book = model.get_input_embeddings().codebook
    write_plain(tmp_path / "plain", book.rate, "codebook.scale" if book.integer_bits else "codebook.weight")
    folder = tmp_path / "plain"
    for folder in (tmp_path / "plain", tmp_path / "anew"):
        loaded = BertForSequenceClassification.from_pretrained(folder)
        assert torch.equal(loaded.get_input_embeddings()(ids), model.get_input_embeddings()(ids))
        loaded.save_pretrained(tmp_path / "anew")
    assert same_state(loaded, model)
    config = json.loads((tmp_path / "anew" / "config.json").read_text())
    assert config["quantization_config"]["format_version"] == FORMAT_VERSION


def test_a_file_of_the_format_before_under_the_config_of_this_is_refused(packed_bert, tmp_path):
    packed_bert.save_pretrained(tmp_path)
    write_plain(tmp_path, packed_bert.get_input_embeddings().codebook.rate, "codebook.scale")
    with pytest.raises(ValueError, match=r"lacks the empty tensor .*codebook.divided.*Leave out config="):
        BertForSequenceClassification.from_pretrained(tmp_path, config=packed_bert.config)


def test_a_training_of_the_format_before_is_refused(bert, config, counts, tmp_path):
    model = compress(bert, config, counts)
    model.get_input_embeddings().step(0.9, show_progress=False)
    model.save_pretrained(tmp_path)
    write_plain(tmp_path, 1, "codebook.weight")
    with pytest.raises(ValueError, match=r"in training, begun by .*format_version=3: end the training with that"):
        BertForSequenceClassification.from_pretrained(tmp_path)


def test_settings_of_the_format_before_compress_as_any(bert, counts, ids, tmp_path):
    settings = AdaCompConfig(LENGTHS, target_ratio=2, format_version=PLAIN_VERSION)
    model = pack(compress(bert, settings, counts)).eval()
    model.save_pretrained(tmp_path)
    assert close(BertForSequenceClassification.from_pretrained(tmp_path)(ids).logits, model(ids).logits)
