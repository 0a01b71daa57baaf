import pytest
from architectures import TIED, UNTIED
from torch import nn

from hf_adacomp.integration.compressed_tables import require_compressed
from hf_adacomp.integration.parts import config_ties, model_parts, named_modules

pytestmark = pytest.mark.usefixtures("quick_fit")


def test_parts_of_a_model_carry_the_prefix_of_their_parameters():
    model = TIED["bert"]()
    assert [prefix for prefix, _ in model_parts(model)] == ["", "bert."]
    for prefix, part in model_parts(model):
        assert {prefix + name for name, _ in part.named_parameters()} <= {name for name, _ in model.named_parameters()}


def test_ties_are_what_the_config_says():
    for model, tied in ((TIED["llama-tied"](), True), (UNTIED["llama"](), False), (TIED["bert"](), True)):
        assert config_ties(model, model.get_output_embeddings()) == tied


def test_objects_that_hold_models_are_looked_into(packed_bert):
    class Holder:
        """As SetFit's model: no module itself."""

        def __init__(self):
            self.body, self.head, self.name = packed_bert, nn.Linear(2, 2), "holder"

    holder, table = Holder(), "body.bert.embeddings.word_embeddings"
    assert {table, "head"} <= set(named_modules(holder))
    assert require_compressed(holder)[table] is packed_bert.get_input_embeddings()
