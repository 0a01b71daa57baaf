"""The sweep over all architectures: a few whose code is odd at once, each of them with `pytest -m long`."""

import pytest
from sweep import model_classes, outcome, report

pytestmark = pytest.mark.filterwarnings("default::FutureWarning", "default::DeprecationWarning")  # of their models

ODD = (
    "CTRLLMHeadModel",  # changes in place what its table returns
    "MambaForCausalLM",  # asks for the dtype of the head
    "MllamaForCausalLM",  # a head narrower than the table
    "MobileBertForMaskedLM",  # logits from the table's values and further weights by token
    "ModernBertForMaskedLM",  # its initialisation reads the head
    "DebertaV2ForMaskedLM",
    "XLNetLMHeadModel",
    "BartForConditionalGeneration",
    "GPT2ForSequenceClassification",
)
CLASSES = [*model_classes([])]


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize("name", ODD)
def test_odd_architectures_work(name, tied):
    kind, model_type = next((kind, model_type) for kind, model_type, found in CLASSES if found == name)
    found = outcome(kind, model_type, name, tied and kind != "classify")
    assert found.verdict in ("works", "not built"), report(found)
    if found.verdict == "not built":
        pytest.skip(found.reason)


@pytest.mark.long
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "apart"])
@pytest.mark.parametrize(("kind", "model_type", "name"), CLASSES, ids=[name for _, _, name in CLASSES])
def test_no_architecture_fails(kind, model_type, name, tied):
    found = outcome(kind, model_type, name, tied)
    print(report(found))
    assert found.verdict != "FAILS", report(found)
    if found.verdict != "works":
        pytest.skip(report(found))
