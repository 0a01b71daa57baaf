"""The whole path on real weights: all-MiniLM-L6-v2, real English, the stock Trainer and loader."""

import os
import pkgutil
import re
from pathlib import Path

import pytest
import torch
from conftest import close
from torch import nn
from transformers import (
    AutoModel,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    Trainer,
    TrainingArguments,
)

from hf_adacomp import (
    AdaCompCallback,
    AdaCompConfig,
    AdaptiveCompressedEmbedding,
    compress,
    pack,
    size_report,
    token_table,
)


@pytest.fixture(scope="module")
def tokenizer(minilm):
    return AutoTokenizer.from_pretrained(minilm)


@pytest.fixture(scope="module")
def sentences() -> list[str]:
    """English from the documentation of torch.nn.functional and pkgutil's neighbours in the standard library."""
    texts = [getattr(nn.functional, name).__doc__ or "" for name in dir(nn.functional)]
    texts += [getattr(module, name).__doc__ or "" for module in (pkgutil, re, os) for name in dir(module)]
    found = [sentence.strip() for text in texts for sentence in re.split(r"[.\n]\s", text)]
    return [sentence for sentence in found if 20 < len(sentence) < 120][:600]


def test_pack_without_training_keeps_sentences_close(minilm, tokenizer, sentences, tmp_path):
    model = AutoModel.from_pretrained(minilm)
    inputs = tokenizer(sentences[:64], padding=True, return_tensors="pt")
    with torch.no_grad():
        dense = model(**inputs).pooler_output
    counts = torch.zeros(model.config.vocab_size)
    for row in tokenizer(sentences)["input_ids"]:
        counts += torch.bincount(torch.tensor(row), minlength=len(counts))
    pack(compress(model, AdaCompConfig(code_lengths=(8, 64, 192), target_ratio=80), counts)).eval()
    with torch.no_grad():
        ours = model(**inputs).pooler_output
    assert nn.functional.cosine_similarity(dense, ours).mean() > 0.9

    report = size_report(model)
    assert report.dense_bytes == 30522 * 384 * 4
    assert 80 <= report.ratio < 80.1
    rows = {row.token: row.bits for row in token_table(model, tokenizer)}
    assert rows["the"] > rows["##zuki"]

    model.save_pretrained(tmp_path)
    size = (tmp_path / "model.safetensors").stat().st_size
    others = 4 * sum(p.numel() for name, p in model.named_parameters() if "word_embeddings" not in name)
    assert 0 < size - others - report.total_bytes < 20_000  # the header and the position ids
    loaded = AutoModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert close(loaded(**inputs).pooler_output, ours)


@pytest.mark.usefixtures("quick_fit")
def test_fine_tunes_with_the_stock_trainer(minilm, tokenizer, sentences, tmp_path):
    model = AutoModelForSequenceClassification.from_pretrained(minilm, num_labels=2)
    compress(model, AdaCompConfig(code_lengths=(8, 32, 128), target_ratio=100))
    rows = [{**tokenizer(text), "labels": int("tensor" in text.lower())} for text in sentences[:160]]
    arguments = TrainingArguments(
        str(tmp_path),
        per_device_train_batch_size=16,
        num_train_epochs=1,
        report_to=[],
        save_strategy="no",
        use_cpu=True,
    )
    trainer = Trainer(
        model,
        arguments,
        train_dataset=rows,
        data_collator=DataCollatorWithPadding(tokenizer),
        callbacks=[AdaCompCallback()],
    )
    trainer.train()
    trainer.save_model(tmp_path / "out")
    loaded = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    inputs = tokenizer(sentences[:8], padding=True, return_tensors="pt")
    with torch.no_grad():
        assert close(loaded(**inputs).logits, model.eval()(**inputs).logits)
    assert (tmp_path / "out" / "model.safetensors").stat().st_size < 46_000_000  # 91 MB dense


def test_warm_start_explains_running_text(minilm, tokenizer):
    """TREC questions, if they are at hand: share of the running text's variance that a 40 x smaller table keeps.

    The table is that of the tokens that occur, which is fitted in a third of the time.
    """
    file = Path(os.environ.get("ADACOMP_DATA", "")) / "trec" / "trec.train.tsv"
    if "ADACOMP_DATA" not in os.environ or not file.is_file():
        pytest.skip("needs the TREC questions: set ADACOMP_DATA to a folder that has trec/trec.train.tsv")
    questions = [line.split("\t", 1)[1] for line in file.read_text(encoding="utf-8").splitlines()]
    ids = torch.tensor([token for row in tokenizer(questions)["input_ids"] for token in row])
    tokens, counts = ids.unique(return_counts=True)
    share = counts / counts.sum()
    x = AutoModel.from_pretrained(minilm).get_input_embeddings().weight.detach()[tokens]
    source = nn.Embedding.from_pretrained(x)
    embedding = AdaptiveCompressedEmbedding.from_embedding(source, AdaCompConfig(target_ratio=40), counts)
    decoded = embedding.to_embedding().weight.detach()
    mean = share @ x
    explained = 1 - share @ (x - decoded).square().sum(1) / (share @ (x - mean).square().sum(1))
    assert explained > 0.78
