"""The dense tables that can be compressed: `nn.Embedding`, `nn.EmbeddingBag`, scaled subclasses of transformers."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from .. import transformers_compat
from .bag import Bag

TABLES = (nn.Embedding, nn.EmbeddingBag)
"""Classes of dense tables."""

SMALL, LARGE = 1e-7, 1e6
"""Largest entries of tables, between which no square of a sum of squares leaves float32."""

OPTIONS = ("sparse", "max_norm", "scale_grad_by_freq")
"""Of dense tables, which a compressed one does not have."""


def checked_table(embedding: nn.Module) -> Tensor:
    """The table of a plain or scaled `nn.Embedding`, or an `nn.EmbeddingBag`, (V, d).

    Raises:
        ValueError: For any other subclass, which may compute something else in `forward`, for `sparse`, `max_norm`
            or `scale_grad_by_freq`, and for NaN, Inf, or entries all too small or any too large in the table.
    """
    if not isinstance(getattr(embedding, "weight", None), nn.Parameter):
        raise ValueError(
            f"cannot compress {type(embedding).__name__}: it has no parameter `weight` of its own. To "
            'compress a table inside of it, name that: compress(model, config, include=["*its_name"])'
        )
    checked_scale(embedding)
    if not isinstance(embedding, TABLES) or any(map(vars(embedding).get, OPTIONS)):
        given = ", ".join(f"{name}={vars(embedding).get(name)}" for name in OPTIONS)
        raise ValueError(f"cannot compress an {type(embedding).__name__} with {given}: switch these options off first")
    weight = embedding.weight.detach()
    if weight.is_meta or not weight.numel():
        return weight
    extremes = torch.stack(weight.aminmax())  # these tell, NaN included, without a mask as large as the table
    if not torch.isfinite(extremes).all():
        bad = int((~torch.isfinite(weight)).any(dim=1).nonzero()[0])
        raise ValueError(f"the source table holds NaN or Inf, first in the row of token {bad}: repair it first")
    largest = float(extremes.abs().max())
    if largest and not SMALL <= largest <= LARGE:
        raise ValueError(
            f"the largest entry of the source table is {largest:g}, and fits are made of tables where it is from "
            f"{SMALL:g} to {LARGE:g}: rescale the table"
        )
    return weight


def checked_scale(embedding: nn.Module) -> float:
    """The factor between a row of the table and what `forward` returns for it; 1 for a plain `nn.Embedding`.

    Many models multiply by `sqrt(d)` inside of a subclass. One is understood if it names its factor `embed_scale` and
    really computes that product.
    """
    if type(embedding) in TABLES:
        if "forward" in vars(embedding) and not embedding.weight.is_meta and not _multiplies(embedding, 1.0):
            raise ValueError(
                f"cannot compress an {type(embedding).__name__} whose own `forward` returns other than rows of its "
                "table: take that off, compress, and put it on the compressed one"
            )
        return 1.0
    scale = transformers_compat.embed_scale(embedding)
    own = {name for name, _ in embedding.named_parameters()}
    if isinstance(embedding, nn.Embedding) and scale is not None and own == {"weight"}:
        # Without values there is nothing to multiply: a file's layout has the scale of the model being loaded.
        factor = 1.0 if embedding.weight.is_meta else float(scale)
        if embedding.weight.is_meta or _multiplies(embedding, factor):
            return factor
    raise ValueError(
        f"cannot compress {type(embedding).__name__}: only nn.Embedding itself and subclasses that multiply it by "
        "`embed_scale` are understood, because another may compute something else in forward"
    )


@torch.no_grad()
def _multiplies(embedding: nn.Module, scale: float) -> bool:
    rows: Tensor = embedding.weight[:2]  # type: ignore[index]  # a tensor
    found = embedding(torch.arange(len(rows), device=rows.device))
    return found.shape == rows.shape and torch.allclose(found.float(), rows.float() * scale, rtol=0.01)


def dense_embedding(
    weight: Tensor | nn.Parameter, padding_idx: int | None, scale: float, kind: type, bag: Bag | None
) -> nn.Embedding | nn.EmbeddingBag:
    """A dense module of class `kind`, or a bag, with this table (V, d), which it shares."""
    options: dict[str, Any] = {} if kind is nn.Embedding else {"embed_scale": scale}
    dim = weight.shape[1]
    embedding: nn.Embedding | nn.EmbeddingBag = kind(1, dim, None, **options) if bag is None else bag.dense(dim)
    embedding.to(device=weight.device, dtype=weight.dtype)
    embedding.num_embeddings, embedding.padding_idx = len(weight), padding_idx
    embedding.weight = weight if isinstance(weight, nn.Parameter) else nn.Parameter(weight)
    return embedding
