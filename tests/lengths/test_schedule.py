import pytest
from hypothesis import given
from hypothesis import strategies as st

from hf_adacomp.config import ANNEALS
from hf_adacomp.lengths.schedule import temperature_at

fractions = st.floats(0, 1)


@pytest.mark.parametrize("anneal", ANNEALS)
def test_runs_from_start_to_end_and_stays(anneal):
    assert temperature_at(0, 1.0, 0.3, 0.5, anneal) == pytest.approx(1.0)
    for fraction in (0.5, 0.7, 1.0):
        assert temperature_at(fraction, 1.0, 0.3, 0.5, anneal) == pytest.approx(0.3)


@pytest.mark.parametrize(("anneal", "middle"), [("exponential", 0.4), ("linear", 0.5), ("cosine", 0.5)])
def test_half_way(anneal, middle):
    assert temperature_at(0.25, 0.8, 0.2, 0.5, anneal) == pytest.approx(middle)


@given(st.sampled_from(ANNEALS), fractions, fractions, fractions)
def test_never_heats(anneal, a, b, select_fraction):
    early, late = (temperature_at(f, 1.0, 0.1, select_fraction, anneal) for f in sorted((a, b)))
    assert 0.1 - 1e-12 <= late <= early <= 1.0 + 1e-12


def test_no_selection_has_the_end_temperature_at_once():
    assert temperature_at(0, 1.0, 0.3, 0.0, "linear") == pytest.approx(0.3)


def test_refuses_an_unknown_path():
    with pytest.raises(ValueError, match="got 'step'"):
        temperature_at(0.1, 1.0, 0.3, 0.5, "step")
