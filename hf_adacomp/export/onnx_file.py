"""Packed models as ONNX files: codes and int4 code vectors stay bytes, and the graph decodes what it looks up."""

from __future__ import annotations

import os
import warnings
from importlib import import_module
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from ..integration.sentence import is_sentence_model, tokenizer_of
from ..integration.tables import require_compressed
from .graph import INPUTS, Graph

NAMES = {None: "model.onnx", "int8": "model_quantized.onnx", "int4": "model_q4.onnx"}
"""Of the file in a folder's `onnx/`, by how its linear layers are stored: as the Hub's ONNX models have them."""

BLOCK = 32
"""Weights that share a scale in int4."""


def export_onnx(
    model: Any,
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantize: str | None = None,
) -> Path:
    """Write a packed model to ONNX, for any number of texts of any length; needs the extra `onnx`.

    Inputs are `input_ids` and `attention_mask`, int64 (B, T). A sentence-transformers model computes
    `token_embeddings` and, with its pooling and normalisation, `sentence_embedding`; others `logits` or
    `last_hidden_state`.

    Args:
        model: A packed encoder or language model (without cache), or a packed model of sentence-transformers.
        path: A file `.onnx`; or a folder, which gets the layout of the Hub's ONNX models: `onnx/model.onnx`,
            `onnx/model_quantized.onnx` (int8) or `onnx/model_q4.onnx` (int4), config and tokenizer beside it, so that
            transformers.js loads it.
        tokenizer: For a folder; a sentence-transformers model has its own.
        quantize: Also store linear layers as integers, by onnxruntime's quantizers: `"int8"` (dynamic) or `"int4"`
            (weights alone, in blocks of 32). The table keeps its codes.

    Returns:
        The file that was written.

    Raises:
        ValueError: For a model in training form, an encoder with a decoder, an unknown `quantize`, a folder without
            tokenizer, a missing extra. Nothing is written then.
    """
    if quantize not in NAMES:
        raise ValueError(f"quantize must be None, 'int8' or 'int4'; got {quantize!r}")
    _require("onnx", "onnxscript", *(["onnxruntime"] if quantize else []))
    for name, table in require_compressed(model).items():
        if table.phase != "packed":
            raise ValueError(f"{name} is in training form ({table.phase!r}): export what pack(model) returns")
    path, graph = Path(path), Graph(model)
    if path.suffix == ".onnx":
        file = path
    else:
        tokenizer = tokenizer_of(model) if tokenizer is None and is_sentence_model(model) else tokenizer
        if tokenizer is None:
            raise ValueError(f"the folder {path} needs a tokenizer: export_onnx(model, folder, tokenizer)")
        file = path / "onnx" / NAMES[quantize]
    file.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=file.parent) as folder:  # a file that is not whole is not left behind
        made = Path(folder) / "model.onnx"
        write_graph(graph, made)
        if quantize is not None:
            made = _quantized(made, quantize)
        os.replace(made, file)
    if file is not path and tokenizer is not None:
        graph.inner.config.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return file


def _require(*modules: str) -> None:
    for name in modules:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(f'exporting to ONNX needs {name}: pip install "hf-adacomp[onnx]"') from error


def write_graph(graph: Graph, file: Path) -> None:
    """Write a model, packed or dense, to an ONNX file as it is."""
    axes = {0: torch.export.Dim("texts"), 1: torch.export.Dim("tokens")}
    shape = (2, 16)
    inputs = (torch.zeros(shape, dtype=torch.int64), torch.ones(shape, dtype=torch.int64))
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The axis name|# The axis name", UserWarning)  # ids and mask share theirs
        warnings.filterwarnings("ignore", "`isinstance\\(treespec", FutureWarning)  # of PyTorch about itself
        program: Any = torch.onnx.export(
            graph,
            kwargs=dict(zip(INPUTS, inputs, strict=True)),
            input_names=INPUTS,
            output_names=graph.outputs,
            dynamic_shapes=dict.fromkeys(INPUTS, axes),
            dynamo=True,
            verbose=False,
        )
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # where in the source each comes from: much of a small file
    program.save(file, external_data=False)


def _quantized(file: Path, kind: str) -> Path:
    """The same with integer weights of linear layers, in a file beside it."""
    made = file.with_name(f"{kind}.onnx")
    if kind == "int8":
        quantization = import_module("onnxruntime.quantization")
        quantization.quantize_dynamic(
            file,
            made,
            op_types_to_quantize=["MatMul", "Gemm"],
            per_channel=True,
            weight_type=quantization.QuantType.QInt8,
        )
        return made
    onnx, quantizers = import_module("onnx"), import_module("onnxruntime.quantization.matmul_nbits_quantizer")
    quantizer = quantizers.MatMulNBitsQuantizer(onnx.load(file), block_size=BLOCK, is_symmetric=True)
    quantizer.process()
    quantizer.model.save_model_to_file(str(made), use_external_data_format=False)
    return made
