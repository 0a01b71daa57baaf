"""One process; tests/distributed has several."""

import torch

from hf_adacomp.nn.ranks import check_agreement, several, sum_over_ranks, take_from_first


def test_one_process_is_left_alone():
    tensor = torch.randn(3)
    before = tensor.clone()
    assert not several()
    assert sum_over_ranks(tensor) is tensor
    take_from_first([tensor])
    check_agreement({"codes": 1}, tensor.device)
    assert torch.equal(tensor, before)
