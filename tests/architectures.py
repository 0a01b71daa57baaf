"""Tiny random models of many architectures, by name: which tables are shared, scaled, tied or apart."""

from collections.abc import Callable

import torch
import transformers as t
from conftest import VOCABULARY
from transformers.models.gemma import modeling_gemma

from hf_adacomp import AdaCompConfig, compress, pack

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "max_position_embeddings": 64,
    "pad_token_id": 0,
}
DISTIL = {"vocab_size": VOCABULARY, "dim": 32, "max_position_embeddings": 64}
GPT2 = {"vocab_size": VOCABULARY, "n_embd": 32, "n_positions": 64}
LLAMA = {**SMALL, "num_key_value_heads": 2}
T5 = {"vocab_size": VOCABULARY, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
BART = {
    "vocab_size": VOCABULARY,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 64,
    "decoder_start_token_id": 2,
    "pad_token_id": 0,
}
SPLIT = {**BART, "share_encoder_decoder_embeddings": False, "decoder_vocab_size": 100}
VISION = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 2}
ROPE = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 3, 3]}


def _qwen2_vl() -> t.PreTrainedModel:
    vision = {"depth": 1, "embed_dim": 32, "hidden_size": 32, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    text = {**LLAMA, "rope_parameters": ROPE, "tie_word_embeddings": True}
    config = t.Qwen2VLConfig(text_config=text, vision_config=vision, tie_word_embeddings=True)
    return t.Qwen2VLForConditionalGeneration(config)


def _paligemma() -> t.PreTrainedModel:
    vision = {"model_type": "siglip_vision_model", "image_size": 8, "patch_size": 4, **VISION}
    text = {**SMALL, "model_type": "gemma", "num_key_value_heads": 1, "head_dim": 16}
    return t.PaliGemmaForConditionalGeneration(
        t.PaliGemmaConfig(text_config=text, vision_config=vision, projection_dim=32)
    )


def _opt() -> t.PreTrainedModel:
    sizes = {"ffn_dim": 48, "word_embed_proj_dim": 32, **SMALL}
    return t.OPTForCausalLM(t.OPTConfig(**sizes))


TIED: dict[str, Callable[[], t.PreTrainedModel]] = {
    "bert": lambda: t.BertForMaskedLM(t.BertConfig(**SMALL)),
    "roberta": lambda: t.RobertaForMaskedLM(t.RobertaConfig(**SMALL)),
    "distilbert": lambda: t.DistilBertForMaskedLM(t.DistilBertConfig(n_layers=1, n_heads=2, hidden_dim=48, **DISTIL)),
    "albert": lambda: t.AlbertForMaskedLM(t.AlbertConfig(embedding_size=24, **SMALL)),
    "deberta-v2": lambda: t.DebertaV2ForMaskedLM(t.DebertaV2Config(**SMALL)),
    "electra": lambda: t.ElectraForMaskedLM(t.ElectraConfig(embedding_size=24, **SMALL)),
    "gpt2": lambda: t.GPT2LMHeadModel(t.GPT2Config(n_layer=1, n_head=2, **GPT2)),
    "llama-tied": lambda: t.LlamaForCausalLM(t.LlamaConfig(tie_word_embeddings=True, **LLAMA)),
    "qwen3": lambda: t.Qwen3ForCausalLM(t.Qwen3Config(head_dim=16, tie_word_embeddings=True, **LLAMA)),
    "gemma3": lambda: t.Gemma3ForCausalLM(t.Gemma3TextConfig(head_dim=16, **LLAMA)),
    "opt": _opt,
    "t5": lambda: t.T5ForConditionalGeneration(t.T5Config(decoder_start_token_id=0, **T5)),
    "bart": lambda: t.BartForConditionalGeneration(t.BartConfig(scale_embedding=True, **BART)),
    "marian": lambda: t.MarianMTModel(t.MarianConfig(**BART)),
    "marian-split": lambda: t.MarianMTModel(t.MarianConfig(**SPLIT)),
    "m2m100": lambda: t.M2M100ForConditionalGeneration(t.M2M100Config(**BART)),
    "qwen2-vl": _qwen2_vl,
}
if hasattr(modeling_gemma, "GemmaTextScaledWordEmbedding"):  # older releases scale Gemma's vectors elsewhere
    TIED["paligemma"] = _paligemma
UNTIED: dict[str, Callable[[], t.PreTrainedModel]] = {
    "llama": lambda: t.LlamaForCausalLM(t.LlamaConfig(**LLAMA)),
    "mistral": lambda: t.MistralForCausalLM(t.MistralConfig(**LLAMA)),
    "gpt-neox": lambda: t.GPTNeoXForCausalLM(t.GPTNeoXConfig(**SMALL)),
    "bart-classifier": lambda: t.BartForSequenceClassification(t.BartConfig(**{**BART, "eos_token_id": 2})),
}
SCALES = {"gemma3": 32**0.5, "bart": 32**0.5, "m2m100": 32**0.5, "paligemma": 32**0.5}
"""Factors that the model's embedding applies; 1 for all others."""


def packed(name, counts, **changes):
    """A model of `TIED`, packed."""
    config = AdaCompConfig(**{"code_lengths": (4, 8, 32), "target_ratio": 3, "codebook_dtype": "int8", **changes})
    return pack(compress(TIED[name]().eval(), config, counts)).eval()


def logits(model, ids):
    """What a model says to ids, which it reads and, as a decoder, writes."""
    with torch.no_grad():
        return model(ids, **({"decoder_input_ids": ids} if model.config.is_encoder_decoder else {})).logits
