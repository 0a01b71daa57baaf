"""Adaptive compression of word embeddings for Hugging Face Transformers.

Importing this package makes `quant_method: "adacomp"` known to transformers, which must happen before a compressed
model is loaded with `from_pretrained`.
"""

from typing import TYPE_CHECKING

from .card import model_card, save_model_card
from .compression import compress, decompress, pack
from .config import AdaCompConfig
from .embedding import AdaptiveCompressedEmbedding
from .hub import push_model_card
from .quantizer import register as _register
from .report import size_report, token_table
from .vocabulary import add_tokens, keep_tokens

if TYPE_CHECKING:
    from .callback import AdaCompCallback

__version__ = "0.1.0"

__all__ = [
    "AdaCompCallback",
    "AdaCompConfig",
    "AdaptiveCompressedEmbedding",
    "add_tokens",
    "compress",
    "decompress",
    "keep_tokens",
    "model_card",
    "pack",
    "push_model_card",
    "save_model_card",
    "size_report",
    "token_table",
]

_register()


def __getattr__(name: str) -> object:
    if name == "AdaCompCallback":
        # It brings transformers' Trainer and PEFT along, which loading a packed model does not need.
        from .callback import AdaCompCallback  # noqa: PLC0415

        return AdaCompCallback
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
