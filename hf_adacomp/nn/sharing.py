"""What stands where a compressed table is shared, such as by the embeddings of a decoder."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .embedding import AdaptiveCompressedEmbedding
from .loading import pass_over_guard
from .reading import WeightFromCodes


class Place:
    """Where in a model a table stands.

    It is looked up anew each time: adapters wrap a table, train a copy of it and put the copy in its place.

    Args:
        model: The model.
        name: Of the table's module in it.
    """

    def __init__(self, model: nn.Module, name: str) -> None:
        self.model, self.name = model, name

    def __deepcopy__(self, memo: dict[int, Any]) -> Place:
        return Place(memo.get(id(self.model), self.model), self.name)  # a head that is copied alone reads the same

    def table(self) -> AdaptiveCompressedEmbedding:
        """What stands there now.

        Raises:
            ValueError: If it is no compressed table any more.
        """
        module = self.model.get_submodule(self.name)
        base = getattr(module, "get_base_layer", None)  # of an adapter's layer
        found = getattr(module if base is None else base(), "itself", None)
        if not isinstance(found, AdaptiveCompressedEmbedding):
            raise ValueError(
                f"{self.name!r} is a {type(module).__name__} now, but an output head or other embeddings read the "
                "compressed table that stood there: decompress(model) before tables are exchanged or single tokens "
                "adapted; hf_adacomp.add_tokens(model, n, vectors=...) adds tokens"
            )
        return found


class Borrower(WeightFromCodes):
    """A module that reads a compressed embedding which stands elsewhere in the model.

    The reference is not registered: the table is saved, moved and counted once, under its owner's name.

    Args:
        owner: The table, or where it stands.
    """

    def __init__(self, owner: AdaptiveCompressedEmbedding | Place) -> None:
        super().__init__()
        self._owner = owner if isinstance(owner, Place) else (owner,)
        self.register_load_state_dict_pre_hook(pass_over_guard)  # type: ignore[no-untyped-call]  # torch's

    @property
    def embedding(self) -> AdaptiveCompressedEmbedding:
        """The compressed table."""
        return self._owner.table() if isinstance(self._owner, Place) else self._owner[0]

    @property
    def weight(self) -> Tensor:
        """As `AdaptiveCompressedEmbedding.weight`, the same object."""
        return self.embedding.weight


class SharedEmbedding(Borrower):
    """Further token embeddings that share the table, such as those of a decoder."""

    def forward(self, input: Tensor, *args: Any) -> Tensor:
        """As `AdaptiveCompressedEmbedding.forward`."""
        vectors: Tensor = self.embedding(input.to(self.embedding.device), *args)
        return vectors

    @property
    def num_embeddings(self) -> int:
        """V."""
        return self.embedding.num_embeddings

    @property
    def embedding_dim(self) -> int:
        """d."""
        return self.embedding.embedding_dim

    @property
    def padding_idx(self) -> int | None:
        """As in `nn.Embedding`."""
        return self.embedding.padding_idx
