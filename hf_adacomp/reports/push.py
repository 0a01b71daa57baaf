"""Push a model card to the Hub."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, EvalResult, HfApi
from huggingface_hub.errors import RemoteEntryNotFoundError

from .card import save_model_card


def push_model_card(
    model: Any,
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

    Args:
        model: A compressed model, of transformers or sentence-transformers.
        repo_id: Of the repository.
        base_model: As of `model_card`, and so are `results` and `dense_results`.
        results: Of the compressed model.
        dense_results: Of the dense one.
        token: For the Hub, as of `HfApi`.
        revision: Branch that is read and written.
    """
    api = HfApi(token=token)
    with TemporaryDirectory() as folder:
        try:
            file = api.hf_hub_download(repo_id, "README.md", revision=revision)
        except RemoteEntryNotFoundError:
            pass  # the repository has no card yet; other errors do not say so
        else:
            shutil.copy(file, os.path.join(folder, "README.md"))
        save_model_card(
            model, folder, repo_id=repo_id, base_model=base_model, results=results, dense_results=dense_results
        )
        return api.upload_folder(
            repo_id=repo_id, folder_path=folder, revision=revision, commit_message="Model card of the compressed table"
        )
