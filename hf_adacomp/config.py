"""The settings of adaptive compression, validated at construction."""

from __future__ import annotations

import copy
import inspect
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from transformers.utils.quantization_config import QuantizationConfigMixin

QUANT_METHOD = "adacomp"
FORMAT_VERSION = 4
PLAIN_VERSION = 3
OLD_VERSIONS = (1, 2)
"""Version of the file format that this release writes; the one before, whose code-books hold code vectors or scales
undivided by the rate, which it reads; those before, which it does not."""

AUTO = "auto"
ANNEALS = ("exponential", "linear", "cosine")
HEADS = ("compress", "dense")
INTEGER_BITS = {"int4": 4, "int8": 8}
FLOAT_DTYPES = {"float16": torch.float16, "bfloat16": torch.bfloat16, "float32": torch.float32}
LARGEST = sys.float_info.max
MOST_BITS = 2**20
"""Of a code, and the largest width of vectors, by which all sizes stay within int64."""

SEEDS = 2**32
"""How many seeds there are, as for numpy's and transformers' `set_seed`."""

CODEBOOK_DTYPES = (*INTEGER_BITS, *FLOAT_DTYPES)


class AdaCompConfig(QuantizationConfigMixin):
    """Settings of adaptive compression (Kim, Kim, Lee: *Adaptive Compression of Word Embeddings*, ACL 2020).

    >>> from hf_adacomp import AdaCompConfig
    >>> AdaCompConfig(target_ratio=80, codebook_dtype="int8").code_lengths
    'auto'
    >>> AdaCompConfig(code_lengths=(8, 4))
    Traceback (most recent call last):
    ...
    ValueError: code_lengths must increase; got (8, 4): write (4, 8)

    Args:
        code_lengths: Bits of codes, strictly increasing; every token ends up with one of these lengths. Or
            `"auto"`: the ladder that promises the least distortion for the table, its counts and `target_ratio`.
        target_ratio: Bytes of the dense float32 table over all stored bytes of the compressed one (codes, lengths,
            code-book), without a head's own copy (`head="dense"`). The frozen lengths never exceed that size.
        temperature_start: Gumbel-softmax temperature at the first step of training; where lengths begin to be learned,
            at `observe_fraction`, it has cooled to 0.47 by default.
        temperature_end: Gumbel-softmax temperature when the lengths are frozen.
        anneal: Path between the two: `"exponential"`, `"linear"` or `"cosine"`.
        observe_fraction: Share of training, its beginning, in which the table computes with its source vectors while
            its use is observed: which tokens count, unless `token_counts` were given, and which directions of the
            vectors the loss reacts to. Then the code-book is fitted. At least one step, unless both are known; 0 with
            `token_counts` starts from those alone.
        select_fraction: Share of training after which the lengths are frozen; the rest trains the codes of frozen
            lengths. Up to `observe_fraction` it keeps the lengths of the warm start.
        tied: Whether the encoder's weights follow the code vectors (`F = s C M`) or are learned apart.
        orthogonality_weight: Weight of `|C C^T / scale - I|^2 / L`.
        reconstruction_weight: Weight of the relative squared error of the decoded against the source vectors.
        codebook_dtype: How code vectors are stored: `"int4"` or `"int8"` (with one float scale a vector), `"float16"`,
            `"bfloat16"` or `"float32"`. Training sees the rounded values, so storing them costs nothing further.
        selection_reach: How far a logit of the selection comes in all, from `observe_fraction` to `select_fraction`, if
            its gradient keeps its sign; whatever optimizer and learning rate the model has.
        significance: Whether errors of vectors are measured by how the loss reacts to their direction, as observed in
            training or by `calibrate`. If False, or with neither, all directions count alike.
        head: For models whose output head is tied to the table: `"compress"` computes logits from the same codes,
            `"dense"` leaves the head its own copy of the table, which is saved, and which `size_report` counts and
            `target_ratio` does not.
        seed: Seed of whatever is drawn: in the fit, by the Gumbel-softmax, the regularisers, `calibrate`, `add_tokens`.
        format_version: Version of the file format; for files.
        tables: Layout of the compressed tables by module name; filled by `compress` and `pack`, read when loading.

    Raises:
        ValueError: For a setting outside its domain. The message quotes it.
    """

    def __init__(
        self,
        code_lengths: Sequence[int] | str = AUTO,
        target_ratio: float = 40.0,
        temperature_start: float = 1.0,
        temperature_end: float = 0.3,
        anneal: str = "exponential",
        observe_fraction: float = 0.25,
        select_fraction: float = 0.4,
        tied: bool = True,
        orthogonality_weight: float = 0.01,
        reconstruction_weight: float = 0.1,
        codebook_dtype: str = "int4",
        selection_reach: float = 8.0,
        significance: bool = True,
        head: str = "compress",
        seed: int = 0,
        format_version: int = FORMAT_VERSION,
        tables: Mapping[str, Mapping[str, Any]] | None = None,
        quant_method: str = QUANT_METHOD,
    ) -> None:
        if quant_method != QUANT_METHOD:
            raise ValueError(f"AdaCompConfig has quant_method={QUANT_METHOD!r}; got {quant_method!r}")
        self.quant_method: str = QUANT_METHOD  # type: ignore[assignment]  # plugins are registered by plain name
        self.code_lengths: tuple[int, ...] | str = _checked_lengths(code_lengths)
        self.target_ratio = _number("target_ratio", target_ratio, above=0)
        self.temperature_start = _number("temperature_start", temperature_start, above=0)
        self.temperature_end = _number("temperature_end", temperature_end, above=0)
        if self.temperature_end > self.temperature_start:
            raise ValueError(
                "temperature_end must not exceed temperature_start: annealing only cools; got "
                f"temperature_start={temperature_start} and temperature_end={temperature_end}"
            )
        self.anneal = _choice("anneal", anneal, ANNEALS)
        self.observe_fraction = _number("observe_fraction", observe_fraction, least=0, most=1)
        self.select_fraction = _number("select_fraction", select_fraction, least=0, most=1)
        self.tied = _boolean("tied", tied)
        self.orthogonality_weight = _number("orthogonality_weight", orthogonality_weight, least=0)
        self.reconstruction_weight = _number("reconstruction_weight", reconstruction_weight, least=0)
        self.codebook_dtype = _choice("codebook_dtype", codebook_dtype, CODEBOOK_DTYPES)
        self.selection_reach = _number("selection_reach", selection_reach, above=0)
        self.significance = _boolean("significance", significance)
        self.head = _choice("head", head, HEADS)
        self.seed = _integer("seed", seed)
        if not 0 <= self.seed < SEEDS:
            raise ValueError(f"seed must be from 0 to {SEEDS - 1}; got {seed}")
        self.format_version = _integer("format_version", format_version)
        if self.format_version in OLD_VERSIONS:
            raise ValueError(
                f"format_version={format_version} is of an hf_adacomp before its first release, which held a code-book "
                f"for each code length: compress the dense model again, for format_version {FORMAT_VERSION}"
            )
        if self.format_version not in (PLAIN_VERSION, FORMAT_VERSION):
            raise ValueError(
                f"format_version={format_version} is not known to this hf_adacomp, which reads {PLAIN_VERSION} and "
                f"{FORMAT_VERSION}: upgrade hf_adacomp to load the file"
            )
        if tables is not None and not (
            isinstance(tables, Mapping) and all(isinstance(layout, Mapping) for layout in tables.values())
        ):
            raise ValueError(f"tables must map module names to table layouts; got {tables!r}")
        self.tables: dict[str, dict[str, Any]] = {name: dict(layout) for name, layout in (tables or {}).items()}

    def get(self, name: str, default: Any = None) -> Any:
        """A setting by its name: transformers asks the config of a loaded model as if it were the dict of a file."""
        return getattr(self, name, default)

    @property
    def measured(self) -> bool:
        """Whether training measures which directions of the vectors matter."""
        return self.significance and self.observe_fraction > 0

    @property
    def ladder(self) -> tuple[int, ...]:
        """`code_lengths` once they are numbers; ValueError while they are `"auto"`."""
        if isinstance(self.code_lengths, str):
            raise ValueError(f"code_lengths={self.code_lengths!r} has not been resolved for a table yet")
        return self.code_lengths

    def with_ladder(self, ladder: Sequence[int]) -> AdaCompConfig:
        """A copy for one table, whose code lengths are these."""
        config = copy.copy(self)
        config.code_lengths = _checked_lengths(ladder)
        config.format_version = FORMAT_VERSION  # it is saved as such, whatever it was loaded from
        return config

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """As upstream; ValueError for a field that this release does not know."""
        if unknown := config_dict.keys() - inspect.signature(cls).parameters.keys():
            raise ValueError(
                f"quantization_config has fields that this hf_adacomp does not know, {sorted(unknown)}: upgrade "
                "hf_adacomp, or correct their names"
            )
        return super().from_dict(config_dict, return_unused_kwargs, **kwargs)  # type: ignore[no-untyped-call]

    def to_dict(self) -> dict[str, Any]:
        """The settings as JSON-ready values; `AdaCompConfig(**config.to_dict())` gives an equal config."""
        lengths = self.code_lengths if isinstance(self.code_lengths, str) else list(self.code_lengths)
        return {**super().to_dict(), "code_lengths": lengths}

    def __eq__(self, other: object) -> bool:
        return isinstance(other, AdaCompConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]  # mutable, like any config

    def __repr__(self) -> str:
        settings = {name: value for name, value in self.__dict__.items() if name not in ("quant_method", "tables")}
        return f"AdaCompConfig({', '.join(f'{name}={value!r}' for name, value in settings.items())})"


def checked_config(config: Any) -> AdaCompConfig:
    """The same; ValueError for what are no settings."""
    if not isinstance(config, AdaCompConfig):
        raise ValueError(f"config must be an AdaCompConfig, such as AdaCompConfig(target_ratio=40); got {config!r}")
    return config


def _plain(value: Any) -> Any:
    """A number or list of Python for those of numpy and torch, which say what they are by `tolist`."""
    return value.tolist() if hasattr(value, "tolist") else value


def _checked_lengths(code_lengths: Sequence[int] | str) -> tuple[int, ...] | str:
    code_lengths = _plain(code_lengths)
    if isinstance(code_lengths, str) and code_lengths == AUTO:
        return AUTO
    if isinstance(code_lengths, (str, bytes)) or not isinstance(code_lengths, Sequence) or not code_lengths:
        raise ValueError(
            f"code_lengths must be {AUTO!r} or a sequence of at least one length in bits; got {code_lengths!r}"
        )
    lengths = tuple(_integer("code_lengths", length) for length in code_lengths)
    if not 1 <= min(lengths) <= max(lengths) <= MOST_BITS:
        raise ValueError(f"code_lengths must be from 1 to {MOST_BITS} bits; got {lengths}")
    if len(set(lengths)) < len(lengths):
        raise ValueError(f"code_lengths must not repeat a length; got {lengths}: drop the copies")
    if list(lengths) != sorted(lengths):
        raise ValueError(f"code_lengths must increase; got {lengths}: write {tuple(sorted(lengths))}")
    if len(lengths) > 256:
        raise ValueError(f"code_lengths has {len(lengths)} entries; at most 256 are supported")
    return lengths


def _number(
    name: str, value: float, *, above: float | None = None, least: float = -math.inf, most: float = math.inf
) -> float:
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= LARGEST:
        raise ValueError(f"{name} must be a finite number; got {value!r}")
    if above is not None and value <= above:
        raise ValueError(f"{name} must be greater than {above}; got {value!r}")
    if not least <= value <= most:
        domain = f"at least {least}" if most == math.inf else f"between {least} and {most}"
        raise ValueError(f"{name} must be {domain}; got {value!r}")
    return float(value)


def _integer(name: str, value: int | str) -> int:
    value = _plain(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name} takes whole numbers; got {value!r}")
    return value


def _boolean(name: str, value: bool) -> bool:
    value = _plain(value)
    if not isinstance(value, bool):
        raise ValueError(f"{name} must be True or False; got {value!r}")
    return value


def _choice(name: str, value: str, choices: tuple[str, ...]) -> str:
    value = _plain(value)
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(map(repr, choices))}; got {value!r}")
    return value
