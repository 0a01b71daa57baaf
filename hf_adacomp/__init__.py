"""Adaptive compression of word embeddings for Hugging Face Transformers.

Importing this package makes `quant_method: "adacomp"` known to transformers, which must happen before a compressed
model is loaded with `from_pretrained`.

Words, each for one thing:

    table        V token vectors of width d; the *source* is the dense one that is compressed
    code         the bits of a token; its *code length* is how many they are
    ladder       the code lengths on offer, increasing: `AdaCompConfig.code_lengths` once it holds numbers
    length index place of a token's code length on the ladder; the *assignment* has that of every token
    code-book    the code vectors and the bias that decode codes; a code of L bits uses the first L vectors
    budget       bits that all codes of a table may take, so that the table meets `target_ratio`
    metric       a matrix that says how much an error in each direction of a vector costs the task
    significance how much the task depends on a direction (measured for the metric) or on a token (analysed)
    observation  what training shows of a table at its beginning: token counts, and the gradients behind the metric
    calibration  observation from texts without labels, where nothing is trained
    gain         length of a vector of a static model, stored beside its direction
    warm start   code-book and selection costs fitted to the source by what was observed
    phase        observe: the source is in use; select: lengths are learned; encode: codes are; packed: bits are stored

Rooms, each built on those before it:

    codes/        what a code is, how its bits are decided and stored
    lengths/      which token gets how many bits, and when
    fitting/      what follows from a table in closed form: the ladder, the warm start
    nn/           the modules that stand in a model
    integration/  transformers: compress, save, load, train
    export/       packed models for runtimes without Python
    reports/      what people look at
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from .config import AdaCompConfig
from .integration.calibration import calibrate
from .integration.compression import compress, decompress, pack
from .integration.methods import set_card_writer as _set_card_writer
from .integration.quantizer import register as _register
from .integration.sizes import size_report
from .integration.vocabulary import add_tokens, keep_tokens
from .nn.embedding import AdaptiveCompressedEmbedding
from .nn.static import register as _register_static

if TYPE_CHECKING:
    from .export.onnx_file import export_onnx
    from .integration.callback import AdaCompCallback
    from .reports.card import model_card, save_model_card
    from .reports.push import push_model_card
    from .reports.tokens import token_table

__version__ = "0.1.0"

__all__ = [
    "AdaCompCallback",
    "AdaCompConfig",
    "AdaptiveCompressedEmbedding",
    "add_tokens",
    "calibrate",
    "compress",
    "decompress",
    "export_onnx",
    "keep_tokens",
    "model_card",
    "pack",
    "push_model_card",
    "save_model_card",
    "size_report",
    "token_table",
]


# Their modules bring along what loading a model does not need: the Trainer, PEFT, the Hub's cards.
_LATE = {
    "AdaCompCallback": ".integration.callback",
    "export_onnx": ".export.onnx_file",
    "model_card": ".reports.card",
    "push_model_card": ".reports.push",
    "save_model_card": ".reports.card",
    "token_table": ".reports.tokens",
}


def __getattr__(name: str) -> Any:
    if name not in _LATE:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(_LATE[name], __name__), name)


def _write_card(model: Any, folder: str | os.PathLike[str], repo_id: str | None = None) -> None:
    from .reports.card import save_model_card  # noqa: PLC0415

    save_model_card(model, folder, repo_id=repo_id)


_register()
_register_static()
_set_card_writer(_write_card)
