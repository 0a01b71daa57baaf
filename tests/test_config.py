import json

import numpy as np
import pytest
import torch
from transformers.quantizers.auto import AutoQuantizationConfig

from hf_adacomp import AdaCompConfig
from hf_adacomp.integration.quantizer import register


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"code_lengths": (64, 16)}, r"must increase; got \(64, 16\): write \(16, 64\)"),
        ({"code_lengths": (0, 16)}, r"from 1 to 1048576 bits; got \(0, 16\)"),
        ({"code_lengths": (-8,)}, "from 1 to 1048576 bits"),
        ({"code_lengths": (16, 16)}, r"not repeat a length; got \(16, 16\)"),
        ({"code_lengths": ()}, r"at least one length"),
        ({"code_lengths": (8.5,)}, r"whole numbers; got 8.5"),
        ({"code_lengths": 16}, r"sequence"),
        ({"code_lengths": tuple(range(1, 300))}, r"at most 256"),
        ({"target_ratio": 0}, r"target_ratio must be greater than 0; got 0"),
        ({"target_ratio": "40"}, r"finite number; got '40'"),
        ({"target_ratio": float("nan")}, r"finite number; got nan"),
        ({"temperature_end": 2.0}, r"temperature_end=2.0"),
        ({"temperature_end": 0}, r"temperature_end must be greater than 0"),
        ({"anneal": "quadratic"}, r"'exponential', 'linear', 'cosine'; got 'quadratic'"),
        ({"select_fraction": 1.5}, r"between 0 and 1; got 1.5"),
        ({"tied": 1}, r"tied must be True or False; got 1"),
        ({"orthogonality_weight": -1}, r"at least 0; got -1"),
        ({"codebook_dtype": "int3"}, r"got 'int3'"),
        ({"head": "none"}, r"got 'none'"),
        ({"seed": 0.5}, r"got 0.5"),
        ({"seed": 2**32}, r"seed must be from 0 to 4294967295; got 4294967296"),
        ({"seed": -1}, r"seed must be from 0"),
        ({"observe_fraction": -0.1}, r"observe_fraction must be between 0 and 1; got -0.1"),
        *[({"format_version": old}, f"format_version={old} .* compress the dense model again") for old in (1, 2)],
        ({"format_version": 99}, r"format_version=99 .* upgrade hf_adacomp"),
        ({"quant_method": "gptq"}, r"got 'gptq'"),
        ({"tables": [1]}, r"got \[1\]"),
    ],
)
def test_refuses_and_quotes_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        AdaCompConfig(**settings)


def test_numbers_of_numpy_and_torch_are_numbers():
    plain = AdaCompConfig((4, 8, 32), target_ratio=3.0, seed=1, tied=False)
    assert plain == AdaCompConfig(np.array([4, 8, 32]), target_ratio=np.float32(3), seed=np.int64(1), tied=np.False_)
    assert plain == AdaCompConfig([torch.tensor(4), 8, 32], target_ratio=torch.tensor(3.0), seed=1, tied=False)
    assert json.loads(json.dumps(plain.to_dict()))["code_lengths"] == [4, 8, 32]


def test_unknown_setting_is_an_error():
    with pytest.raises(TypeError, match="code_length"):
        AdaCompConfig(code_length=(8, 16))


def test_round_trips_through_json_and_transformers():
    config = AdaCompConfig(code_lengths=[8, 64], target_ratio=33, anneal="cosine", tables={"a": {"embedding_dim": 3}})
    stored = json.loads(json.dumps(config.to_dict()))
    assert AdaCompConfig(**stored) == config
    assert AutoQuantizationConfig.from_dict(stored) == config
    assert config.code_lengths == (8, 64)


def test_repr_round_trips():
    config = AdaCompConfig(code_lengths=(8, 64), target_ratio=33.5, tied=False)
    assert eval(repr(config)) == config


def test_registering_twice_is_harmless():
    register()
    register()
