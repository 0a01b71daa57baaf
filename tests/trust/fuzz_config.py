"""Coverage-guided fuzzing of the config that a file brings: ValueError or a layout, nothing else; see atheris."""

import json
import sys

import atheris

with atheris.instrument_imports(include=["hf_adacomp.config", "hf_adacomp.integration.layout"]):
    from hf_adacomp.config import AdaCompConfig
    from hf_adacomp.integration.layout import check_layout

from hf_adacomp import AdaptiveCompressedEmbedding


def read_config(data: bytes) -> None:
    try:
        values = json.loads(data)
    except (ValueError, RecursionError):
        return
    if not isinstance(values, dict):
        return
    try:
        config = AdaCompConfig.from_dict(values)
        for name, layout in config.tables.items():
            check_layout(name, layout, config)
            AdaptiveCompressedEmbedding.from_layout(layout, config)
    except ValueError:
        return


atheris.Setup(sys.argv, read_config)
atheris.Fuzz()
