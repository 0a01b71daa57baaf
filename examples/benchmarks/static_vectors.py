"""Train an LSTM on static word vectors, compress their table on the same task, reload it and compare the two.

The paper's own setting. Words without a vector are dropped.

python examples/benchmarks/static_vectors.py --vectors_file word2vec.npz \\
    --train_file train.tsv --test_file test.tsv --column_names label text
"""

from dataclasses import dataclass, field

import numpy as np
import torch
from comparison import CompressionArguments, ShortTrainingArguments, Task, compare, parse
from labelled_texts import DataTrainingArguments, load_splits, tokenize
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers
from transformers import DataCollatorWithPadding, PreTrainedModel, PreTrainedTokenizerFast
from word_vector_classifier import WordVectorClassifier, WordVectorConfig

PAD, UNKNOWN = "[PAD]", "[UNK]"


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
    """Splits at white space; the ids follow the order of `words`, after padding and the unknown word."""
    vocabulary = {word: index for index, word in enumerate([PAD, UNKNOWN, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token=UNKNOWN))
    tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, unk_token=UNKNOWN, model_input_names=["input_ids", "attention_mask"]
    )


def drop_unknown(row: dict[str, list], unknown: int) -> dict[str, list]:
    """The row without words that have no vector; one of them stays if there is no other."""
    known = [word for word in row["input_ids"] if word != unknown] or row["input_ids"][:1]
    return {"input_ids": known, "attention_mask": [1] * len(known)}


def static_vectors(vector_args: VectorArguments, data_args: DataTrainingArguments, seed: int) -> Task:
    """The classification task of these files for an LSTM on these word vectors."""
    words, vectors = read_vectors(vector_args.vectors_file)
    tokenizer = word_tokenizer(words)
    splits, labels = tokenize(load_splits(data_args, seed), tokenizer, data_args, vector_args.max_seq_length)
    splits = splits.map(drop_unknown, fn_kwargs={"unknown": tokenizer.unk_token_id}, desc="Dropping unknown words")

    def new_model() -> PreTrainedModel:
        config = WordVectorConfig(
            vocab_size=len(tokenizer), vector_size=vectors.shape[1], id2label=dict(enumerate(labels))
        )
        model = WordVectorClassifier(config)
        with torch.no_grad():
            model.embeddings.weight[:2] = 0
            model.embeddings.weight[2:] = vectors
        return model

    collator = DataCollatorWithPadding(tokenizer)
    return Task(splits, labels, tokenizer, new_model, collator)


def main(arguments: list[str] | None = None) -> dict:
    groups = (VectorArguments, DataTrainingArguments, CompressionArguments, ShortTrainingArguments)
    vector_args, data_args, compression_args, training_args = parse(groups, arguments)
    compression_args.config(training_args.seed)  # before the work: a wrong setting is told at once
    task = static_vectors(vector_args, data_args, training_args.seed)
    return compare(task, compression_args, training_args)[1]


if __name__ == "__main__":
    main()
