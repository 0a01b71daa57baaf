"""Train an LSTM on static word vectors, compress their table on the same task, reload it and compare the two.

The paper's own setting: the vocabulary is the words of the training texts. Words without a vector are dropped.

python examples/benchmarks/static_vectors.py --vectors_file word2vec.npz \\
    --train_file train.tsv --test_file test.tsv --column_names label text
"""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain

import numpy as np
import torch
from comparison import CompressionArguments, ShortTrainingArguments, Task, compare, parse
from datasets import Dataset, DatasetDict, load_dataset
from labelled_texts import DataTrainingArguments, load_splits, text_columns_of, tokenize
from token_classification import TaggingArguments, read_conllu, token_classification
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors
from transformers import (
    DataCollatorForTokenClassification,
    DataCollatorWithPadding,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)
from word_vector_models import (
    WordVectorClassifier,
    WordVectorConfig,
    WordVectorLanguageModel,
    WordVectorModel,
    WordVectorTagger,
)

BLOCK = 32
"""Words in a row of plain text."""

SPECIAL = PAD, UNKNOWN, SEPARATOR = "[PAD]", "[UNK]", "[SEP]"


@dataclass
class VectorArguments:
    vectors_file: str = field(metadata={"help": "npz with `words` (V,) and `vectors` (V, d)."})
    max_seq_length: int = field(default=64, metadata={"help": "Truncate longer texts to so many words."})


def read_vectors(file: str) -> tuple[list[str], torch.Tensor]:
    """Words and their vectors, (V, d) float32; of words that differ in case only, the first, in lower case."""
    stored = np.load(file)
    rows = {word.lower(): row for row, word in reversed(list(enumerate(stored["words"].tolist())))}
    words = sorted(rows, key=rows.__getitem__)
    return words, torch.from_numpy(stored["vectors"][[rows[word] for word in words]].astype(np.float32))


def word_tokenizer(words: list[str]) -> PreTrainedTokenizerFast:
    """Splits at white space; the ids follow the order of `words`, after special ones; two texts are one, separated."""
    vocabulary = {word: index for index, word in enumerate([*SPECIAL, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="$A", pair=f"$A {SEPARATOR} $B", special_tokens=[(SEPARATOR, vocabulary[SEPARATOR])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, model_input_names=["input_ids", "attention_mask"]
    )


def drop_unknown(row: dict[str, list], unknown: int) -> dict[str, list]:
    """The row without words that have no vector; one of them stays if there is no other."""
    known = [word for word in row["input_ids"] if word != unknown] or row["input_ids"][:1]
    return {"input_ids": known, "attention_mask": [1] * len(known)}


def lstm(kind: type[WordVectorModel], words: list[str], vectors: torch.Tensor, labels: list[str]) -> WordVectorModel:
    """A model on the vectors of these words; those of special tokens are zero."""
    config = WordVectorConfig(
        vocab_size=len(SPECIAL) + len(words), vector_size=vectors.shape[1], id2label=dict(enumerate(labels))
    )
    model = kind(config)
    with torch.no_grad():
        model.embeddings.weight.zero_()
        model.embeddings.weight[len(SPECIAL) :] = vectors
    return model


def vectors_for(texts: Iterable[str], file: str) -> tuple[list[str], torch.Tensor]:
    """The words of the texts that have a vector, and those, (V, d)."""
    found = {word for text in texts for word in text.lower().split()}
    words, vectors = read_vectors(file)
    rows = [row for row, word in enumerate(words) if word in found]
    return [words[row] for row in rows], vectors[rows]


def static_vectors(vector_args: VectorArguments, data_args: DataTrainingArguments, seed: int) -> Task:
    """The classification task of these files for an LSTM on these word vectors."""
    raw = load_splits(data_args, seed)
    texts = chain(*(raw["train"][column] for column in text_columns_of(raw, data_args)))
    words, vectors = vectors_for(texts, vector_args.vectors_file)
    tokenizer = word_tokenizer(words)
    splits, labels = tokenize(raw, tokenizer, data_args, vector_args.max_seq_length)
    splits = splits.map(drop_unknown, fn_kwargs={"unknown": tokenizer.unk_token_id}, desc="Dropping unknown words")
    collator = DataCollatorWithPadding(tokenizer)
    return Task(splits, labels, tokenizer, lambda: lstm(WordVectorClassifier, words, vectors, labels), collator)


def static_tagging(vector_args: VectorArguments, tagging_args: TaggingArguments, seed: int) -> Task:
    """The tagging task of these files for an LSTM on these word vectors; unknown words are tagged, too."""
    texts = (" ".join(words) for words in read_conllu(tagging_args.train_file)["words"])
    words, vectors = vectors_for(texts, vector_args.vectors_file)

    def new_model(labels: list[str]) -> PreTrainedModel:
        return lstm(WordVectorTagger, words, vectors, labels)

    return token_classification(tagging_args, seed, word_tokenizer(words), new_model)


def static_language(vector_args: VectorArguments, files: dict[str, str]) -> Task:
    """Predicting the next word of plain texts, by splits; words without a vector are read, but not predicted."""
    pieces = pre_tokenizers.Whitespace()
    lines = load_dataset("text", data_files=files)
    lines = lines.map(lambda row: {"text": " ".join(word for word, _ in pieces.pre_tokenize_str(row["text"]))})
    words, vectors = vectors_for(lines["train"]["text"], vector_args.vectors_file)
    tokenizer = word_tokenizer(words)

    def rows(split: str) -> Dataset:
        ids = np.concatenate(tokenizer(list(lines[split]["text"]))["input_ids"]).astype(np.int64)
        ids = ids[: (len(ids) - 1) // BLOCK * BLOCK + 1]
        labels = np.where(ids == tokenizer.unk_token_id, -100, ids)[1:].reshape(-1, BLOCK)
        inputs = ids[:-1].reshape(-1, BLOCK)
        return Dataset.from_dict({"input_ids": inputs, "attention_mask": np.ones_like(inputs), "labels": labels})

    vocabulary = [*SPECIAL, *words]
    return Task(
        DatasetDict({split: rows(split) for split in files}),
        vocabulary,
        tokenizer,
        lambda: lstm(WordVectorLanguageModel, words, vectors, vocabulary),
        DataCollatorForTokenClassification(tokenizer),
        kind="text-generation",
    )


def main(arguments: list[str] | None = None) -> dict:
    groups = (VectorArguments, DataTrainingArguments, CompressionArguments, ShortTrainingArguments)
    vector_args, data_args, compression_args, training_args = parse(groups, arguments)
    compression_args.config(training_args.seed)  # before the work: a wrong setting is told at once
    task = static_vectors(vector_args, data_args, training_args.seed)
    return compare(task, compression_args, training_args)[1]


if __name__ == "__main__":
    main()
