"""What saving and pushing a compressed model add to transformers' own: a model card."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, EvalResult, HfApi
from huggingface_hub.errors import EntryNotFoundError
from transformers import PreTrainedModel

from .card import save_model_card
from .surgery import compressed_embeddings


def save_pretrained(model: PreTrainedModel, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
    """`PreTrainedModel.save_pretrained`; a packed model's folder gets a model card, too."""
    type(model).save_pretrained(model, save_directory, *args, **kwargs)
    if kwargs.get("is_main_process", True) and _is_packed(model):
        save_model_card(model, save_directory)


def upload_modified_files(
    model: PreTrainedModel, working_dir: str | os.PathLike[str], repo_id: str, *args: Any, **kwargs: Any
) -> CommitInfo:
    """The last step of `push_to_hub`, by when the card of the Hub lies in `working_dir`: our part goes into it."""
    if _is_packed(model):
        save_model_card(model, working_dir, repo_id=repo_id)
    commit: CommitInfo = type(model)._upload_modified_files(model, working_dir, repo_id, *args, **kwargs)
    return commit


def push_model_card(
    model: PreTrainedModel,
    repo_id: str,
    *,
    base_model: str | None = None,
    results: Sequence[EvalResult] = (),
    dense_results: Sequence[EvalResult] = (),
    token: str | None = None,
    revision: str | None = None,
) -> CommitInfo:
    """Put our part into the model card of a repository, in a commit of its own.

    For after `Trainer.push_to_hub`, which always writes a card of its own, and for results that are known only then.
    Arguments are those of `model_card`.
    """
    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        try:
            file = api.hf_hub_download(repo_id, "README.md", revision=revision)
        except EntryNotFoundError:
            pass  # the repository has no card yet
        else:
            shutil.copy(file, os.path.join(folder, "README.md"))
        save_model_card(
            model, folder, repo_id=repo_id, base_model=base_model, results=results, dense_results=dense_results
        )
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Model card of the compressed table"
        )


def _is_packed(model: PreTrainedModel) -> bool:
    return all(embedding.phase == "packed" for embedding in compressed_embeddings(model).values())
