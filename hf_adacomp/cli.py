"""The command `hf-adacomp`: compress, inspect, plot, export and decompress models from the shell."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import asdict
from io import TextIOWrapper
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from tqdm.auto import trange

from .config import HEADS, AdaCompConfig
from .export.onnx_file import export_onnx
from .integration.agreement import Agreement
from .integration.batches import check_ids, text_batches
from .integration.calibration import calibrate
from .integration.compressed_tables import num_tokens, require_compressed
from .integration.compression import compress, decompress, pack
from .integration.parts import transformers_models
from .integration.sentence import static_model
from .integration.sizes import size_report
from .reports.plots import plot_lengths
from .reports.tokens import token_table
from .saved_models import load_model, load_tokenizer, save_model
from .text_files import read_texts

LINES = 1024
"""Lines of a text that are tokenized at once."""

HELD_OUT, HELD_OUT_EVERY = 256, 10
"""Texts that `--report` holds out, and at most one of so many."""


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command; returns 0, 1 for a failure that is told, 130 if interrupted. Wrong usage exits with 2."""
    args = _parser().parse_args(arguments)
    if isinstance(sys.stdout, TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # not every console has all characters of a vocabulary
    try:
        args.run(args)
    except (ValueError, OSError, RuntimeError, SafetensorError) as error:
        print(f"hf-adacomp: error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("hf-adacomp: interrupted", file=sys.stderr)
        return 130
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="hf-adacomp",
        description="Token tables of transformers models as binary codes: each token with a code length of its own.",
    )
    verbs = parser.add_subparsers(title="commands", required=True)
    dense = "folder or Hub name of a dense model"
    packed = "folder or Hub name of a compressed model"
    column = "of the texts in a table (default: text or sentence)"

    verb = verbs.add_parser(
        "compress",
        help="compress a model without training",
        description="Fit codes to the token table, pack them and save the model, without any training. With "
        "--calibrate, texts such as the model is for show how often tokens occur and what its answers react to; "
        "--counts-from takes counts alone from a text; without both, all tokens count alike.",
    )
    verb.add_argument("model", metavar="MODEL", help=dense)
    verb.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    verb.add_argument("--ratio", type=float, default=40.0, help="dense bytes / stored bytes (default: %(default)g)")
    source = verb.add_mutually_exclusive_group()
    source.add_argument("--calibrate", metavar="FILE", type=Path, help="texts: .txt, .csv, .tsv or .jsonl, .gz too")
    source.add_argument("--counts-from", metavar="FILE", type=Path, help="texts to count tokens in")
    verb.add_argument("--column", help=column)
    verb.add_argument(
        "--report", action="store_true", help="hold out texts of --calibrate and compare dense and packed answers"
    )
    verb.add_argument("--code-lengths", metavar="BITS", type=int, nargs="+", help="default: chosen for the size")
    verb.add_argument("--head", choices=HEADS, default="compress", help="what becomes of a tied output head")
    verb.set_defaults(run=_compress)

    verb = verbs.add_parser("inspect", help="sizes, code lengths, tokens with long codes")
    verb.add_argument("model", metavar="DIR", help=packed)
    verb.add_argument("--tokens", type=int, default=20, help="how many tokens to list (default: %(default)d)")
    verb.add_argument("--json", action="store_true", help="print JSON")
    verb.set_defaults(run=_inspect)

    verb = verbs.add_parser("plot", help="picture of code lengths, by number and by token rank")
    verb.add_argument("model", metavar="DIR", help=packed)
    verb.add_argument("out", metavar="OUT.png", type=Path, help="picture to write: .png, .svg or .pdf")
    verb.add_argument("--counts-from", metavar="FILE", type=Path, help="texts to rank tokens by")
    verb.add_argument("--column", help=column)
    verb.set_defaults(run=_plot)

    verb = verbs.add_parser(
        "export",
        help="write a compressed model to ONNX",
        description="Write a compressed encoder, language model, or model of sentence-transformers to ONNX. A folder "
        "gets the layout that transformers.js loads. Needs the extra `onnx`.",
    )
    verb.add_argument("model", metavar="DIR", help=packed)
    verb.add_argument("out", metavar="OUT", type=Path, help="file .onnx, or folder, to write")
    verb.add_argument("--quantize", choices=("int8", "int4"), help="store linear layers as integers, too")
    verb.set_defaults(run=_export)

    verb = verbs.add_parser("decompress", help="save as a plain model, which needs this library no more")
    verb.add_argument("model", metavar="DIR", help=packed)
    verb.add_argument("out", metavar="OUT", type=Path, help="folder to write")
    verb.set_defaults(run=_decompress)
    return parser


def _compress(args: argparse.Namespace) -> None:
    _check_out(args)
    if args.report and args.calibrate is None:
        raise ValueError("--report compares answers to texts of --calibrate FILE: give one")
    if args.column is not None and args.calibrate is None and args.counts_from is None:
        raise ValueError(f"--column {args.column} is for the file of --calibrate or --counts-from: name one")
    config = AdaCompConfig(args.code_lengths or "auto", target_ratio=args.ratio, head=args.head)
    texts = None if args.calibrate is None else read_texts(args.calibrate, args.column)
    model = load_model(args.model)
    counts = _counts(args, model)
    compress(model, config, counts)
    if texts is not None:
        _calibrate(args, model, texts)
    else:
        if counts is None:
            for embedding in require_compressed(model).values():
                embedding.warm_start()
        pack(model)
    save_model(model, args.model, args.out)
    print(size_report(model))


def _calibrate(args: argparse.Namespace, model: Any, texts: list[str]) -> None:
    """Calibrate and pack; tell what was seen and, with `--report`, how far answers to held-out texts agree."""
    tokenizer = load_tokenizer(args.model, model)
    held_out = texts[:: max(HELD_OUT_EVERY, len(texts) // HELD_OUT)] if args.report else []
    agreement = None
    if held_out:
        held = set(held_out)
        texts = [text for text in texts if text not in held]
        if not texts:
            raise ValueError(f"--report holds out all of the {len(held_out)} texts of {args.calibrate}: give more")
        agreement = Agreement(model, text_batches(model, held_out, tokenizer))
    calibrate(model, texts, tokenizer)
    for name, embedding in require_compressed(model).items():
        seen = embedding.token_counts()
        print(
            f"{name}: {len(texts):,} texts hold {int(seen.sum()):,} tokens, {int(seen.count_nonzero()):,} of "
            f"{len(seen):,} different ones"
        )
    pack(model)
    if agreement is not None:
        cosines, kind = agreement.cosines(), "correlation" if agreement.of_numbers else "cosine"
        print(
            f"{kind} of dense and packed answers to {len(held_out)} held-out texts: mean {cosines.mean():.4f}, "
            f"lowest 5 % below {cosines.quantile(0.05):.4f}"
        )


def _inspect(args: argparse.Namespace) -> None:
    if args.tokens < 0:
        raise ValueError(f"--tokens must not be negative; got {args.tokens}")
    model = load_model(args.model)
    size = size_report(model)
    rows = token_table(model, load_tokenizer(args.model, model))
    # Vocabularies are roughly sorted by frequency: a long code tells the most about a late token.
    longest = sorted(rows, key=lambda row: (-row.bits, -row.id))[: args.tokens]
    if args.json:
        figures = {**asdict(size), "total_bytes": size.total_bytes, "ratio": size.ratio}
        figures |= {"bits_per_token": size.bits_per_token, "longest": [row._asdict() for row in longest]}
        print(json.dumps(figures, indent=2))
        return
    print(f"{size}\n\nlongest codes, late tokens first\n{'id':>8}  {'bits':>5}  token")
    for row in longest:
        print(f"{row.id:>8}  {row.bits:>5}  {'(none)' if row.token is None else row.token}")


def _plot(args: argparse.Namespace) -> None:
    if args.column is not None and args.counts_from is None:
        raise ValueError(f"--column {args.column} is for the file of --counts-from: name it")
    model = load_model(args.model)
    counts = _counts(args, model)
    plot_lengths(model, counts).savefig(args.out)


def _export(args: argparse.Namespace) -> None:
    _check_out(args)
    model = load_model(args.model)
    tokenizer = None if args.out.suffix == ".onnx" else load_tokenizer(args.model, model)
    file = export_onnx(model, args.out, tokenizer, args.quantize)
    print(f"{file}: {file.stat().st_size:,} bytes")


def _decompress(args: argparse.Namespace) -> None:
    _check_out(args)
    save_model(decompress(load_model(args.model)), args.model, args.out)


def _check_out(args: argparse.Namespace) -> None:
    """Raise ValueError, before anything takes long, for a place that cannot be written to."""
    if args.out.is_file() and not (args.run is _export and args.out.suffix == ".onnx"):
        raise ValueError(f"{args.out} is a file: name a folder to write the model to")
    if args.out.exists() and args.out.resolve() == Path(args.model).resolve():
        raise ValueError(f"{args.out} is the model to read: name another folder to write")


def _counts(args: argparse.Namespace, model: Any) -> Tensor | None:
    """Occurrences of each token in the lines of `--counts-from`, (V,) int64; None without that option."""
    if args.counts_from is None:
        return None
    tokenizer = load_tokenizer(args.model, model)
    inner = static_model(model) or next(iter(transformers_models(model)), None)
    if inner is None:
        raise ValueError(f"{args.model} holds no transformers model: there is no token table to count for")
    counts = torch.zeros(num_tokens(inner), dtype=torch.int64)
    texts = read_texts(args.counts_from, args.column)
    for start in trange(0, len(texts), LINES, desc="Counting tokens"):
        batch = texts[start : start + LINES]
        rows = tokenizer(batch, truncation=False, verbose=False)["input_ids"]
        check_ids(f"{args.counts_from} holds", rows, len(counts))
        ids = [i for row in rows for i in row]
        counts += torch.bincount(torch.tensor(ids, dtype=torch.int64), minlength=len(counts))
    return counts


if __name__ == "__main__":
    sys.exit(main())
