"""LSTMs on static word vectors, as `PreTrainedModel`s that save and load like any other: for texts and for words."""

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import SequenceClassifierOutput, TokenClassifierOutput


class WordVectorConfig(PreTrainedConfig):
    model_type = "word_vector_lstm"

    def __init__(
        self,
        vocab_size: int = 8003,
        vector_size: int = 300,
        hidden_size: int = 150,
        dropout: float = 0.5,
        pad_token_id: int = 0,
        **kwargs,
    ) -> None:
        super().__init__(pad_token_id=pad_token_id, **kwargs)
        self.vocab_size, self.vector_size, self.hidden_size = vocab_size, vector_size, hidden_size
        self.dropout = dropout


class WordVectorModel(PreTrainedModel):
    """Word vectors, one LSTM, one linear layer."""

    config_class = WordVectorConfig
    bidirectional = True

    def __init__(self, config: WordVectorConfig) -> None:
        super().__init__(config)
        self.embeddings = nn.Embedding(config.vocab_size, config.vector_size, config.pad_token_id)
        self.lstm = nn.LSTM(config.vector_size, config.hidden_size, batch_first=True, bidirectional=self.bidirectional)
        self.dropout = nn.Dropout(config.dropout)
        self.classifier = nn.Linear((1 + self.bidirectional) * config.hidden_size, config.num_labels)
        self.post_init()

    def _init_weights(self, module: nn.Module) -> None:
        if not isinstance(module, nn.LSTM):  # torch's own initial values suit an LSTM
            super()._init_weights(module)

    def get_input_embeddings(self) -> nn.Module:
        return self.embeddings

    def set_input_embeddings(self, value: nn.Module) -> None:
        self.embeddings = value

    def run(
        self, input_ids: Tensor | None, attention_mask: Tensor, inputs_embeds: Tensor | None
    ) -> tuple[PackedSequence, Tensor]:
        """States at all words, of ids (B, T) or vectors (B, T, d), and the last ones, (directions, B, h)."""
        words = self.dropout(self.embeddings(input_ids) if inputs_embeds is None else inputs_embeds)
        lengths = attention_mask.sum(dim=1).cpu()
        packed = pack_padded_sequence(words, lengths, batch_first=True, enforce_sorted=False)
        states, (last, _) = self.lstm(packed)
        return states, last


class WordVectorClassifier(WordVectorModel):
    """A label for a text, from the last states."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> SequenceClassifierOutput:
        _, last = self.run(input_ids, attention_mask, inputs_embeds)
        logits = self.classifier(self.dropout(torch.cat([last[0], last[1]], dim=1)))
        loss = None if labels is None else cross_entropy(logits, labels)
        return SequenceClassifierOutput(loss=loss, logits=logits)


class WordVectorTagger(WordVectorModel):
    """A label for each word, from the states there."""

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
    ) -> TokenClassifierOutput:
        states, _ = self.run(input_ids, attention_mask, inputs_embeds)
        padded, _ = pad_packed_sequence(states, batch_first=True, total_length=attention_mask.shape[1])
        logits = self.classifier(self.dropout(padded))
        loss = None if labels is None else cross_entropy(logits.flatten(0, 1), labels.flatten())
        return TokenClassifierOutput(loss=loss, logits=logits)


class WordVectorLanguageModel(WordVectorTagger):
    """The next word at each word, which is its label; the output layer has weights of its own."""

    bidirectional = False
