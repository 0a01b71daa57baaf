"""Every architecture of transformers that can be built tiny, through everything a user does with a compressed model.

python tests/sweep.py                 all of them, eight minutes on one core; prints a table, exits 1 if one fails
python tests/sweep.py gpt2 bert       those whose name contains one of the words

An architecture works, is refused by `compress` with the reason, or fails. Where the dense model itself cannot do a step
(a loss, a resize, `generate`), nothing is asked of the compressed one.
"""

import copy
import sys
import tempfile
import traceback
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel, set_seed
from transformers.models.auto import configuration_auto, modeling_auto

from hf_adacomp import AdaCompConfig, compress, decompress, pack, size_report
from hf_adacomp.integration.compressed_tables import compressed_embeddings

VOCABULARY = 384
MOST_PARAMETERS = 8_000_000
KINDS = {
    "causal": modeling_auto.MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    "masked": modeling_auto.MODEL_FOR_MASKED_LM_MAPPING_NAMES,
    "seq2seq": modeling_auto.MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES,
    "classify": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
}
SIZES: dict[int, str] = {
    32: "hidden_size d_model n_embd dim emb_dim embed_dim embedding_size word_embed_proj_dim projection_dim d_embed "
    "proj_size output_dim out_hidden_size hidden_dim_vision model_dim cross_attention_hidden_size decoder_hidden_size "
    "text_hidden_size true_hidden_size lru_width attention_hidden_size encoder_hidden_size",
    48: "intermediate_size ffn_dim d_ff encoder_ffn_dim decoder_ffn_dim hidden_dim n_inner ffn_hidden_size d_inner "
    "moe_intermediate_size shared_expert_intermediate_size intermediate_size_mlp expert_ffn_hidden_size "
    "moe_shared_expert_intermediate_size feed_forward_size ffn_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_decoder_layers depth "
    "num_encoder_layers num_attention_heads n_head n_heads encoder_attention_heads decoder_attention_heads num_heads "
    "num_key_value_heads num_block_records num_experts_per_tok moe_topk moe_top_k num_kv_heads n_kv_heads "
    "num_global_key_value_heads num_encoder_attention_heads num_decoder_attention_heads num_hash_functions",
    4: "num_experts num_local_experts n_routed_experts moe_num_experts num_buckets_hash_embeddings",
    1: "n_group topk_group n_shared_experts first_k_dense_replace num_hidden_groups moe_num_shared_experts "
    "num_nextn_predict_layers mlp_ratio",
    16: "head_dim d_kv kv_lora_rank q_lora_rank v_head_dim attention_head_size kv_channels mamba_d_state state_size "
    "ssm_state_size index_head_dim linear_key_head_dim linear_value_head_dim global_head_dim",
    8: "qk_rope_head_dim qk_nope_head_dim patch_size index_topk hidden_size_per_layer_input",
    128: "max_position_embeddings n_positions max_seq_len max_source_positions max_target_positions n_ctx seq_length "
    "max_sequence_length max_window_layers",
}
SMALL = {name: size for size, names in SIZES.items() for name in names.split()} | {
    "image_size": 16,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    **dict.fromkeys(["entity_vocab_size", "pronunciation_vocab_size", "shape_vocab_size"], 64),
    "decoder_vocab_size": VOCABULARY,
    "bos_token_id": 1,
    "pad_token_id": 0,
    "eos_token_id": 2,
    "decoder_start_token_id": 0,
    "sep_token_id": 2,
    "cls_token_id": 1,
}

LAYERS = ("num_hidden_layers", "n_layer", "num_layers")
WIDTHS = dict.fromkeys([*SIZES[16].split(), *SIZES[8].split()])
VARIANTS: tuple[dict[str, int | None], ...] = (
    {},
    dict.fromkeys(LAYERS, 4),
    WIDTHS,
    {**WIDTHS, **dict.fromkeys(LAYERS, 4)},
    dict.fromkeys(LAYERS, 8),
)
"""Other small numbers, which are tried in turn; None keeps the default."""

MAMBA = {"mamba_n_heads": 4, "mamba_d_head": 16, "mamba_n_groups": 1}

SPECIAL: dict[str, dict[str, Any]] = {
    "gptj": {"rotary_dim": 8},
    "codegen": {"rotary_dim": 8},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "mamba2": {"num_heads": 4, "head_dim": 16, "n_groups": 1},
    "bamba": {"num_hidden_layers": 4, "attn_layer_indices": [1, 3], **MAMBA},
    "granitemoehybrid": {"num_hidden_layers": 4, "layers_block_type": ["mamba", "attention"] * 2, **MAMBA},
    "gemma3n_text": {
        "num_hidden_layers": 5,
        "num_kv_shared_layers": 0,
        "laurel_rank": 8,
        "activation_sparsity_pattern": [0.0] * 5,
    },
    "ernie4_5_moe": {"moe_k": 2, "moe_num_experts": 4},
    "deepseek_v2": {"num_experts_per_tok": 2},
    "mobilebert": {
        "hidden_size": 64,
        "true_hidden_size": 32,
        "intra_bottleneck_size": 32,
        "num_feedforward_networks": 1,
    },
    "nemotron": {"num_key_value_heads": 2},
    "esm": {"vocab_size": VOCABULARY, "mask_token_id": 3},
    "reformer": {"axial_pos_embds": False, "attn_layers": ["local", "local"], "is_decoder": True},
    "xmod": {"default_language": "en_XX"},
    "t5": {"decoder_start_token_id": 0},
    "ministral": {"head_dim": 16},
    "hunyuan_v1_dense": {"head_dim": 16},
    "hunyuan_v1_moe": {"head_dim": 16},
}
"""What single architectures need besides."""


@dataclass
class Outcome:
    """What became of a model class."""

    kind: str
    name: str
    tied: bool
    verdict: str
    steps: str = ""
    reason: str = ""


def model_classes(words: list[str]) -> Iterator[tuple[str, str, str]]:
    """Kind, model type and class name of every architecture, each class once."""
    seen = set()
    for kind, names in KINDS.items():
        for model_type, found in names.items():
            for name in [found] if isinstance(found, str) else found:
                if name not in seen and (not words or any(word in model_type for word in words)):
                    seen.add(name)
                    yield kind, model_type, name


def small_config(
    config_class: type[PretrainedConfig], small: dict[str, int | None], **changes: Any
) -> PretrainedConfig:
    """A configuration with small numbers wherever the default has large ones of a known name."""
    default = config_class()
    values: dict[str, Any] = {}
    for name, value in default.to_dict().items():
        part = vars(default).get(name)
        size = small.get(name)
        if isinstance(part, PretrainedConfig):
            values[name] = small_config(type(part), small).to_dict()
        elif size is not None and (isinstance(value, int) or (value is None and name.endswith("token_id"))):
            values[name] = min(value, size) if value and not name.endswith("_id") else size
    return config_class(**{**values, **changes})


def tiny(model_type: str, name: str, tied: bool, variant: dict[str, int | None]) -> PreTrainedModel:
    """A random model of that class."""
    model_class = getattr(transformers, name)
    config_class = model_class.config_class or configuration_auto.CONFIG_MAPPING[model_type]
    changes = SPECIAL.get(model_type, {})
    if "tie_word_embeddings" in config_class().to_dict() or tied:
        changes = {**changes, "tie_word_embeddings": tied}
    config = small_config(config_class, {**SMALL, **variant}, **changes)
    config.get_text_config().tie_word_embeddings = tied
    if config_class.from_dict(config.to_dict()).get_text_config().tie_word_embeddings != tied:
        raise ValueError(f"is always {'apart' if tied else 'tied'}")
    set_seed(0)
    with torch.device("meta"):
        size = sum(parameter.numel() for parameter in model_class(config).parameters())
    if size > MOST_PARAMETERS:
        raise ValueError(f"{size} parameters")
    model: PreTrainedModel = model_class(config).eval()
    return model


def builder(model_type: str, name: str, tied: bool) -> Callable[[], PreTrainedModel]:
    """What builds a tiny model that computes logits; the first variant's error if none does."""
    errors = []
    for variant in VARIANTS:
        build = partial(tiny, model_type, name, tied, variant)
        try:
            logits(build())
        except Exception as error:  # whatever a tiny dense model cannot do is no concern of ours
            errors.append(error)
        else:
            return build
    raise errors[0]


def batch_for(model: PreTrainedModel, labels: bool = False) -> dict[str, Tensor]:
    """Token ids, and labels as the model wants them."""
    set_seed(1)
    ids = torch.randint(4, 300, (2, 16))
    batch = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    sequence = "Classification" in type(model).__name__
    if sequence:
        batch["input_ids"][:, -1] = 2  # BART's classifier looks for the end
    elif model.config.is_encoder_decoder:
        batch["decoder_input_ids"] = ids
    if labels:
        batch["labels"] = torch.tensor([0, 1]) if sequence else ids
    return batch


def logits(model: PreTrainedModel) -> Tensor:
    with torch.no_grad():
        set_seed(2)
        found: Tensor = model.eval()(**batch_for(model)).logits
    return found.float()


def loss(model: PreTrainedModel) -> None:
    found = model.train()(**batch_for(model, labels=True)).loss
    assert found.isfinite()
    found.backward()
    model.zero_grad()
    model.eval()


def generate(model: PreTrainedModel) -> Tensor:
    batch = {name: value for name, value in batch_for(model).items() if "decoder" not in name}
    return model.generate(**batch, max_new_tokens=3, do_sample=False)


def reload(model: PreTrainedModel) -> None:
    expected = logits(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        assert close(logits(type(model).from_pretrained(folder)), expected), "loaded computes something else"


def resize(model: PreTrainedModel) -> None:
    for size in (VOCABULARY + 8, VOCABULARY - 16):
        model.resize_token_embeddings(size)
        assert model.get_input_embeddings().weight.shape[0] == size
        found = logits(model)
        if model.get_output_embeddings() is not None and "Classification" not in type(model).__name__:
            assert found.shape[-1] in (size, size - 1), found.shape
        loss(model)
    reload(model)


STEPS: dict[str, Callable[[PreTrainedModel], Any]] = {
    "loss": loss,
    "generate": generate,
    "reload": reload,
    "resize": resize,
}


def can(build: Callable[[], PreTrainedModel]) -> list[str]:
    """The steps that the dense model can do."""
    done = []
    for name, step in STEPS.items():
        try:
            step(build())
        except Exception:  # whatever a dense model cannot do is not asked
            continue
        done.append(name)
    return done


def close(found: Tensor, expected: Tensor, size: float = 1e-4) -> bool:
    return found.shape == expected.shape and bool(
        torch.allclose(found, expected, atol=size * (1 + float(expected.abs().max())), equal_nan=True)
    )


def drive(build: Callable[[], PreTrainedModel], steps: list[str], head: str) -> None:
    """Everything; raises where the compressed model falls short of the dense one."""
    settings = AdaCompConfig(
        code_lengths=(4, 8, 32), target_ratio=3, codebook_dtype="int8", head=head, observe_fraction=0.1
    )
    model = build()
    try:
        compress(model, settings)
    except ValueError as error:
        raise RefusedError(str(error)) from error
    for table in compressed_embeddings(model).values():
        table.warm_start((1000 / torch.arange(1, table.num_embeddings + 1)).long(), show_progress=False)
    if "loss" in steps:
        for fraction in (0.0, 0.1, 0.3, 0.9):
            for table in compressed_embeddings(model).values():
                table.step(fraction)
            loss(model)
    expected = logits(model)
    pack(model)
    assert close(logits(model), expected), "packed computes something else"
    size_report(model)
    loaded = copy.deepcopy(model)
    if "reload" in steps:
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            loaded = type(model).from_pretrained(folder).eval()
    assert close(logits(loaded), expected), "loaded computes something else"
    if "generate" in steps:
        assert torch.equal(generate(loaded), generate(model))
    if "resize" in steps:
        resize(loaded)
    plain = decompress(model)
    assert close(logits(plain), expected), "decompressed computes something else"
    if "reload" in steps:
        reload(plain)


class RefusedError(Exception):
    """By `compress`, with the reason."""


def outcome(kind: str, model_type: str, name: str, tied: bool, head: str = "compress") -> Outcome:
    """What becomes of one model class."""
    found = Outcome(kind, name, tied, "works")
    try:
        build = builder(model_type, name, tied)
    except Exception as error:  # no concern of ours
        found.verdict, found.reason = "not built", f"{type(error).__name__}: {error}"
        return found
    steps = can(build)
    found.steps = " ".join(steps)
    try:
        drive(build, steps, head)
    except RefusedError as error:
        found.verdict, found.reason = "refused", str(error)
    except Exception as error:  # what the sweep is for
        place = traceback.extract_tb(error.__traceback__)
        ours = [frame.line for frame in place if frame.filename == __file__]
        found.verdict, found.reason = "FAILS", f"{type(error).__name__}: {error} [{ours[-1]}]"
    return found


def report(found: Outcome) -> str:
    """One row of the table."""
    tied, reason = "tied" if found.tied else "apart", " ".join(found.reason.split())[:200]
    return f"{found.verdict:<10}{found.kind:<9}{found.name:<46}{tied:<6}{found.steps:<29}{reason}"


def main(words: list[str]) -> int:
    """Print the table."""
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    verdicts: Counter[str] = Counter()
    for kind, model_type, name in model_classes(words):
        for tied in (True, False) if kind != "classify" else (False,):
            found = outcome(kind, model_type, name, tied)
            verdicts[found.verdict] += 1
            print(report(found), flush=True)
    print(dict(verdicts))
    return int(verdicts["FAILS"] > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
