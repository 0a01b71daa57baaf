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

from ..integration.compressed_tables import require_compressed
from ..integration.parts import transformers_models
from ..integration.sentence import is_sentence_model, tokenizer_of
from .generation import graph_of
from .graph import Graph

NAMES = {None: "model.onnx", "int8": "model_quantized.onnx", "int4": "model_q4.onnx"}
"""Of the file in a folder's `onnx/`, by how its linear layers are stored: as the Hub's ONNX models have them."""

BLOCK = 32
"""Weights that share a scale in int4."""

INTEGER_PRODUCTS = 4
"""The level of `MatMulNBits` at which activations are rounded to int8, block by block: it is a third faster."""

MODULES = "pkg.torch.onnx.class_hierarchy"
"""What PyTorch notes of a node: the classes of the modules around it."""

OWN_MODULES = "'hf_adacomp.nn."


def export_onnx(
    model: Any,
    path: str | os.PathLike[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    quantize: str | None = None,
) -> Path:
    """Write a packed model to ONNX, for any number of texts of any length; needs the extra `onnx`.

    Inputs are `input_ids` and `attention_mask`, int64 (B, T). A sentence-transformers model computes
    `token_embeddings` and, with its pooling and normalisation, `sentence_embedding`; others `logits` or
    `last_hidden_state`. Of a model that generates one step is exported, which also takes and gives the keys and values
    of the tokens before (`past_key_values.N.key`, `present.N.key`, ...; of no tokens at the first step).

    Args:
        model: A packed encoder or language model, or a packed model of sentence-transformers.
        path: A file `.onnx`; or a folder, which gets the layout of the Hub's ONNX models: `onnx/model.onnx`,
            `onnx/model_quantized.onnx` (int8) or `onnx/model_q4.onnx` (int4), config and tokenizer beside it, so that
            transformers.js loads it.
        tokenizer: For a folder; a sentence-transformers model has its own.
        quantize: Also store linear layers as integers, by onnxruntime's quantizers: `"int8"` (dynamic) or `"int4"`
            (weights in blocks of 32); and, in int8, dense tables such as that of positions. The packed table
            stays as it is.

    Returns:
        The file that was written.

    Raises:
        ValueError: For a model in training form, an encoder with a decoder, one that generates by other than keys and
            values, an unknown `quantize`, a folder without tokenizer, a missing extra. Nothing is written then.
    """
    if quantize not in NAMES:
        raise ValueError(f"quantize must be None, 'int8' or 'int4'; got {quantize!r}")
    _require("onnx", "onnxscript", *(["onnxruntime"] if quantize else []))
    for name, table in require_compressed(model).items():
        if table.phase != "packed":
            raise ValueError(f"{name} is in training form ({table.phase!r}): export what pack(model) returns")
    path, graph = Path(path), graph_of(model)
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
        table_nodes = write_graph(graph, made)
        if quantize is not None:
            made = quantized(made, quantize, table_nodes)
        os.replace(made, file)
    if file is not path and tokenizer is not None:
        transformers_models(model)[0].config.save_pretrained(path)
        if graph.inner.can_generate():
            graph.inner.generation_config.save_pretrained(path)
        tokenizer.save_pretrained(path)
    return file


def _require(*modules: str) -> None:
    for name in modules:
        try:
            import_module(name)
        except ModuleNotFoundError as error:
            raise ValueError(f"exporting to ONNX needs {name}: pip install onnx onnxscript onnxruntime") from error


def write_graph(graph: Graph, file: Path) -> list[str]:
    """Write a model, packed or dense, to an ONNX file as it is.

    Returns:
        The nodes of packed tables, which quantizers should leave alone.
    """
    inputs, axes = graph.example()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The axis name|# The axis name", UserWarning)  # ids and mask share theirs
        warnings.filterwarnings("ignore", "`isinstance\\(treespec", FutureWarning)  # of PyTorch about itself
        program: Any = torch.onnx.export(
            graph,
            inputs,
            input_names=graph.inputs,
            output_names=graph.outputs,
            dynamic_shapes=axes,
            dynamo=True,
            verbose=False,
        )
    table_nodes = []
    for node in program.model.graph.all_nodes():
        if OWN_MODULES in node.metadata_props.get(MODULES, ""):
            table_nodes.append(node.name)
        node.metadata_props.clear()  # where in the source each comes from: much of a small file
    program.save(file, external_data=False)
    return table_nodes


def quantized(file: Path, kind: str, table_nodes: list[str]) -> Path:
    """The same with integer weights of linear layers and dense tables, but for some nodes, in a file beside it."""
    onnx, quantization = import_module("onnx"), import_module("onnxruntime.quantization")
    made = file.with_name(f"{kind}.onnx")
    quantization.quantize_dynamic(
        file,
        made,
        op_types_to_quantize=["Gather", "MatMul", "Gemm"] if kind == "int8" else ["Gather"],
        per_channel=True,
        weight_type=quantization.QuantType.QInt8,
        nodes_to_exclude=table_nodes,
    )
    model = onnx.load(made)
    if kind == "int4":
        quantizers = import_module("onnxruntime.quantization.matmul_nbits_quantizer")
        quantizer = quantizers.MatMulNBitsQuantizer(
            model,
            block_size=BLOCK,
            is_symmetric=True,
            accuracy_level=INTEGER_PRODUCTS,
            nodes_to_exclude=table_nodes,
        )
        quantizer.process()
        model = quantizer.model.model
    del model.graph.value_info[:]  # shapes on the way, which a runtime finds by itself
    onnx.save(model, made)
    return made
