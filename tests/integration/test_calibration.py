"""Calibration on texts without labels: what is counted and measured, what a model keeps, what is refused."""

import copy

import pandas
import pytest
import torch
from conftest import LENGTHS, VOCABULARY, WORDS, same_state, tiny_bert_config, word_tokenizer
from datasets import Dataset
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import StaticEmbedding
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.utils.data import DataLoader
from transformers import (
    AutoModel,
    BertConfig,
    BertForMaskedLM,
    BertForQuestionAnswering,
    BertForSequenceClassification,
    BertModel,
    GPT2Config,
    GPT2LMHeadModel,
    MarianConfig,
    MarianMTModel,
    RobertaConfig,
    T5Config,
    T5ForConditionalGeneration,
    Trainer,
    TrainingArguments,
    WhisperConfig,
    WhisperForConditionalGeneration,
)

from hf_adacomp import AdaCompCallback, AdaCompConfig, calibrate, compress, pack
from hf_adacomp.integration.compressed_tables import compressed_embeddings

pytestmark = pytest.mark.usefixtures("quick_fit")


def texts(number: int, seed: int = 0) -> list[str]:
    generator = torch.Generator().manual_seed(seed)
    sizes = torch.randint(1, 9, (number,), generator=generator).tolist()
    return [" ".join(WORDS[i] for i in torch.randint(len(WORDS), (n,), generator=generator).tolist()) for n in sizes]


def settings(**changes) -> AdaCompConfig:
    return AdaCompConfig(**{"code_lengths": LENGTHS, "target_ratio": 10, "codebook_dtype": "int8", **changes})


def gpt2() -> GPT2LMHeadModel:
    sizes = {"n_embd": 32, "n_layer": 1, "n_head": 2, "n_positions": 32, "bos_token_id": 0, "eos_token_id": 0}
    return GPT2LMHeadModel(GPT2Config(vocab_size=VOCABULARY, **sizes))


def static() -> SentenceTransformer:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(["[UNK]", *WORDS])}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return SentenceTransformer(modules=[StaticEmbedding(tokenizer, torch.randn(len(WORDS) + 1, 32))], device="cpu")


MODELS = {
    "hidden states": lambda: BertModel(tiny_bert_config()),
    "classifier": lambda: BertForSequenceClassification(tiny_bert_config()),
    "regression": lambda: BertForSequenceClassification(tiny_bert_config(num_labels=1)),
    "spans": lambda: BertForQuestionAnswering(tiny_bert_config()),
    "masked": lambda: BertForMaskedLM(tiny_bert_config()),
    "causal, tied": gpt2,
    "static": static,
}


@pytest.mark.parametrize("kind", MODELS)
def test_any_model_is_calibrated_on_texts(kind):
    model = compress(MODELS[kind](), settings())
    table = next(module for module in model.modules() if type(module).__name__ == "AdaptiveCompressedEmbedding")
    tokenizer = None if kind == "static" else word_tokenizer()
    assert calibrate(model, texts(100), tokenizer, batch_size=8, show_progress=False) is model
    assert table.phase == "select"
    state = table.training_state
    assert state.token_counts.sum() > 300
    identity = torch.eye(table.embedding_dim)
    assert not torch.allclose(state.metric, identity, atol=0.01)
    assert torch.linalg.eigvalsh(state.metric.double()).min() > 0.1
    assert pack(model) is model


def test_tokens_count_whether_or_not_their_batch_is_measured(bert):
    def counts(**how) -> torch.Tensor:
        model = compress(BertForSequenceClassification(bert.config), settings())
        calibrate(model, texts(100), word_tokenizer(), show_progress=False, **how)
        return model.get_input_embeddings().token_counts()

    tokenizer = word_tokenizer()
    expected = torch.zeros(VOCABULARY, dtype=torch.int64)
    for text in texts(100):
        expected += torch.bincount(torch.tensor(tokenizer(text)["input_ids"]), minlength=VOCABULARY)
    assert torch.equal(counts(batch_size=7), expected)
    assert torch.equal(counts(batch_size=20, measured_batches=1), expected)
    assert counts(max_length=3).sum() < expected.sum()


def test_loaders_generators_and_lists_of_batches_are_alike(bert):
    batches = [{"input_ids": torch.randint(VOCABULARY, (4, 6))} for _ in range(8)]
    given = [batches, iter(batches), DataLoader(batches, batch_size=None), (batch for batch in batches)]
    tables = []
    for one in given:
        model = compress(copy.deepcopy(bert), settings())
        tables.append(calibrate(model, one, show_progress=False).get_input_embeddings())
    for table in tables[1:]:
        assert torch.equal(table.token_counts(), tables[0].token_counts())


def test_counts_that_were_given_are_kept_and_the_metric_is_measured(bert, counts):
    model = compress(bert, settings(), counts)
    calibrate(model, texts(50), word_tokenizer(), show_progress=False)
    state = model.get_input_embeddings().training_state
    assert torch.equal(state.token_counts, counts)
    assert not torch.equal(state.metric, torch.eye(32))


def test_the_metric_is_measured_though_training_would_not(bert):
    """With `observe_fraction=0` a training after it goes on with selection at once."""
    model = calibrate(compress(bert, settings(observe_fraction=0)), texts(50), word_tokenizer(), show_progress=False)
    assert not torch.equal(model.get_input_embeddings().training_state.metric, torch.eye(32))


def test_lengths_on_offer_follow_the_counts(bert, counts):
    """With "auto", as if the counts had been known at once."""
    model = compress(copy.deepcopy(bert), settings(code_lengths="auto"))
    model.get_input_embeddings().requires_grad_(False)
    before = model.get_input_embeddings().config.ladder
    ids = torch.arange(VOCABULARY).repeat_interleave(counts)
    calibrate(model, [{"input_ids": row} for row in ids[: len(ids) // 16 * 16].view(-1, 1, 16)], show_progress=False)
    observed = model.get_input_embeddings()
    known = compress(copy.deepcopy(bert), settings(code_lengths="auto"), observed.token_counts())
    assert observed.config.ladder == known.get_input_embeddings().config.ladder != before
    assert observed.codebook.length == observed.config.ladder[-1]
    assert not any(parameter.requires_grad for parameter in observed.codebook.parameters())
    pack(model)


def test_labels_make_the_loss_that_counts(bert):
    model = compress(bert, settings())
    seen = []
    forward = bert.forward
    model.forward = lambda **batch: seen.append(set(batch)) or forward(**batch)
    batches = [{"input_ids": torch.randint(VOCABULARY, (4, 6)), "labels": torch.tensor([0, 1, 0, 1])}]
    calibrate(model, batches, show_progress=False)
    assert seen == [{"input_ids", "labels"}]


def test_the_model_is_left_as_it_was(bert):
    model = compress(bert.train(), settings())
    model.classifier.eval().requires_grad_(False)
    modes = {name: module.training for name, module in model.named_modules()}
    learning = {name: p.requires_grad for name, p in model.named_parameters()}
    calibrate(model, texts(20), word_tokenizer(), show_progress=False)
    assert {name: module.training for name, module in model.named_modules()} == modes
    assert {name: p.requires_grad for name, p in model.named_parameters()} == learning
    assert all(p.grad is None for p in model.parameters())


def test_calibration_is_deterministic(bert):
    def codebook() -> torch.Tensor:
        model = compress(copy.deepcopy(bert), settings())
        calibrate(model, texts(40), word_tokenizer(), show_progress=False)
        return model.get_input_embeddings().codebook.stored().vectors

    first = codebook()
    torch.manual_seed(5)
    assert torch.equal(codebook(), first)


def test_directions_that_no_answer_shows_are_left_to_the_others():
    """Half of the dimensions do not reach the hidden states: codes spend their bits on the others."""
    model = static()
    weight = model[0].embedding.weight.detach().clone()
    compress(model, settings(target_ratio=15))
    embedded = model[0].forward

    def seeing_half(features, **kwargs):
        out = embedded(features, **kwargs)
        out["token_embeddings"] = out["token_embeddings"] * (torch.arange(32) < 16)
        return out

    model[0].forward = seeing_half
    pack(calibrate(model, texts(400), show_progress=False))
    table = next(module for module in model.modules() if type(module).__name__ == "AdaptiveCompressedEmbedding")
    errors = (table.to_embedding().weight.detach() - torch.nn.functional.normalize(weight)).square().mean(0)
    assert errors[:16].mean() < 0.9 * errors[16:].mean()


def test_a_model_that_is_loaded_to_be_compressed(bert, tmp_path):
    bert.save_pretrained(tmp_path)
    model = BertForSequenceClassification.from_pretrained(tmp_path, quantization_config=settings())
    calibrate(model, texts(50), word_tokenizer(), show_progress=False)
    pack(model).save_pretrained(tmp_path / "packed")
    again = BertForSequenceClassification.from_pretrained(tmp_path / "packed")
    ids = torch.randint(VOCABULARY, (2, 5))
    assert torch.allclose(model.eval()(ids).logits, again(ids).logits, atol=1e-5)


def test_training_goes_on_from_a_calibrated_model(bert, tmp_path):
    model = compress(bert, settings())
    calibrate(model, texts(50), word_tokenizer(), show_progress=False)
    rows = [{"input_ids": torch.randint(VOCABULARY, (6,)), "labels": i % 2} for i in range(32)]
    arguments = TrainingArguments(str(tmp_path), max_steps=8, report_to=[], disable_tqdm=True, use_cpu=True)
    Trainer(model, arguments, train_dataset=rows, callbacks=[AdaCompCallback()]).train()
    assert model.get_input_embeddings().phase == "packed"


def test_every_table_of_a_model_is_observed():
    config = tiny_bert_config()
    model = compress(
        BertModel(config),
        settings(target_ratio=2, code_lengths=(4, 8)),
        include=["*word_embeddings", "*position_embeddings"],
    )
    calibrate(model, texts(64), word_tokenizer(), batch_size=4, measured_batches=1, show_progress=False)
    word, position = (
        getattr(model.embeddings, name).token_counts() for name in ("word_embeddings", "position_embeddings")
    )
    assert position.sum() > 0
    assert word.sum() == sum(len(word_tokenizer()(text)["input_ids"]) for text in texts(64))


def test_wrong_input_is_told_before_anything_is_fitted(bert):
    tokenizer = word_tokenizer()
    dense = BertForSequenceClassification(bert.config)
    with pytest.raises(ValueError, match=r"call compress\(model, config\) first"):
        calibrate(dense, texts(4), tokenizer)
    model = compress(bert, settings())
    for given, told in (
        ([], "no texts and no batches are given"),
        (["", "  "], "all 2 texts are empty"),
        ("one string", "one string is given"),
        (["a", None], r"1 of 2 entries are not texts, the first None"),
        ([1, 2], "texts, pairs of texts or batches of named tensors; got 1"),
        (["🙂 🙃", "日本"], r"no known token, only \[UNK\]"),
        (
            [{"input_ids": torch.tensor([[5, VOCABULARY]])}],
            f"run from 5 to {VOCABULARY}, but the table has {VOCABULARY}",
        ),
        ([{"inputs_embeds": torch.randn(2, 3, 32)}], "never reach bert.embeddings.word_embeddings"),
        (None, "such as one column of a table, .*; got a NoneType"),
        (pandas.DataFrame({WORDS[5]: texts(4)}), "such as one column of a table, .*; got a DataFrame"),
        (Dataset.from_dict({"label": [0], "text": ["a"]}), r"texts in \['text'\]: .* such as dataset\['text'\]"),
        ([{"input_ids": torch.ones(2, 3)}], r"tensor of token ids \(B, T\); got torch.float32 of \(2, 3\)"),
        ([{"input_ids": torch.tensor([[5, 6]])}, "a text"], "all batches must be named tensors, .*; got a str"),
    ):
        with pytest.raises(ValueError, match=told):
            calibrate(model, given, tokenizer, show_progress=False)
    with pytest.raises(ValueError, match=r"the tokenizer must be one of transformers, .*; got a str"):
        calibrate(model, texts(4), "a name")
    with pytest.raises(ValueError, match=r"need its tokenizer: calibrate\(model, texts, tokenizer\)"):
        calibrate(model, texts(4))
    assert model.get_input_embeddings().cold
    calibrate(model, texts(40), tokenizer, show_progress=False)
    with pytest.raises(
        ValueError, match=r"is fitted already \(phase 'select'\).* compress the dense model without token_counts"
    ):
        calibrate(model, texts(40), tokenizer)


def test_what_a_refused_batch_showed_is_forgotten(bert):
    model = compress(bert, settings())
    good, bad = {"input_ids": torch.tensor([[5, 6]])}, {"input_ids": torch.tensor([[VOCABULARY]])}
    with pytest.raises(ValueError, match="another model"):
        calibrate(model, [good, bad], show_progress=False)
    calibrate(model, [good], show_progress=False)
    assert model.get_input_embeddings().token_counts().sum() == 2


def test_what_an_interrupted_fit_was_for_is_forgotten(bert, monkeypatch):
    fresh, model = compress(copy.deepcopy(bert), settings()), compress(bert, settings())
    wrong, right = {"input_ids": torch.tensor([[5, 5, 7]])}, {"input_ids": torch.tensor([[5, 6]])}
    with monkeypatch.context() as patch:
        patch.setattr("hf_adacomp.nn.table.fit_codebook", None)
        with pytest.raises(TypeError):
            calibrate(model, [wrong], show_progress=False)
    calibrate(model, [right], show_progress=False)
    expected = calibrate(fresh, [right], show_progress=False)
    assert model.get_input_embeddings().token_counts().sum() == 2
    assert same_state(model, expected)


def test_tables_that_were_fitted_before_an_interrupt_keep_what_they_were_fitted_to(monkeypatch):
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1, "encoder_attention_heads": 2}
    sizes |= {"decoder_attention_heads": 2, "encoder_ffn_dim": 48, "decoder_ffn_dim": 48, "max_position_embeddings": 32}
    own = MarianConfig(
        vocab_size=VOCABULARY, share_encoder_decoder_embeddings=False, pad_token_id=0, decoder_start_token_id=0, **sizes
    )
    model = compress(MarianMTModel(own), settings(target_ratio=3))
    ids = torch.arange(5, 25).view(2, 10)
    first, second = compressed_embeddings(model).values()
    with monkeypatch.context() as patch:
        patch.setattr(second, "warm_start", None)
        with pytest.raises(TypeError):
            calibrate(model, [{"input_ids": ids, "labels": ids}], show_progress=False)
    assert (first.phase, second.phase) == ("select", "observe")
    assert first.token_counts().sum() == 20
    assert second.token_counts().sum() == 0


def test_encoder_decoders_are_calibrated_on_batches_with_labels():
    sizes = {"d_model": 32, "d_kv": 8, "d_ff": 32, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = compress(T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes)), settings())
    with pytest.raises(ValueError, match="reads one text and writes another"):
        calibrate(model, texts(8), word_tokenizer(), show_progress=False)
    batch = {"input_ids": torch.randint(VOCABULARY, (4, 6)), "labels": torch.randint(1, VOCABULARY, (4, 5))}
    calibrate(model, [batch] * 4, show_progress=False)
    assert model.get_input_embeddings().token_counts().sum() > 4 * 24


@pytest.mark.parametrize("setting", ["batch_size", "max_length", "measured_batches"])
def test_numbers_below_one_are_quoted(bert, setting):
    compress(bert, settings())
    with pytest.raises(ValueError, match=rf"{setting} must be a positive whole number; got 0"):
        calibrate(bert, [{"input_ids": torch.ones(1, 4, dtype=torch.int64)}], **{setting: 0})


def test_both_texts_of_a_translation_are_counted():
    sizes = {"d_model": 32, "d_ff": 32, "d_kv": 8, "num_layers": 1, "num_heads": 2, "decoder_start_token_id": 0}
    model = compress(T5ForConditionalGeneration(T5Config(vocab_size=VOCABULARY, **sizes)), settings(target_ratio=4))
    batches = [
        {"input_ids": torch.randint(1, 200, (2, 8)), "labels": torch.randint(300, 500, (2, 8))} for _ in range(8)
    ]
    calibrate(model, batches, measured_batches=1)
    counted = model.get_input_embeddings().token_counts()
    assert counted[1:200].sum() == 8 * 16
    assert counted[300:500].sum() > 8 * 12  # the last token of a row is never read


def test_what_reads_no_texts_is_told():
    model = WhisperForConditionalGeneration(
        WhisperConfig(
            vocab_size=VOCABULARY,
            d_model=32,
            encoder_layers=1,
            decoder_layers=1,
            encoder_attention_heads=2,
            decoder_attention_heads=2,
            pad_token_id=0,
            bos_token_id=0,
            eos_token_id=0,
            decoder_start_token_id=1,
        )
    )
    with pytest.raises(ValueError, match=r"Whisper.* reads input_features, no texts.*--counts-from"):
        calibrate(compress(model, settings(target_ratio=4)), texts(9), word_tokenizer())


@pytest.mark.parametrize("kind", [BertConfig, RobertaConfig])
def test_long_texts_are_cut_to_the_positions_that_there_are(kind):
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    model = AutoModel.from_config(kind(vocab_size=VOCABULARY, max_position_embeddings=20, pad_token_id=0, **sizes))
    calibrate(compress(model, settings()), [" ".join([WORDS[5]] * 40)] * 4, word_tokenizer(), show_progress=False)
    assert not model.get_input_embeddings().cold
