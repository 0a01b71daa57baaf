import pytest
import torch
from architectures import TIED
from conftest import VOCABULARY

from hf_adacomp import AdaCompConfig, compress, pack
from hf_adacomp.integration.new_codes import STARTS, nearest_codes

pytestmark = pytest.mark.usefixtures("quick_fit")


def test_nearest_codes_find_a_vector_of_the_codebook(packed_bert):
    book = packed_bert.get_input_embeddings().codebook
    stored, bits = book.stored(), torch.full((1, book.length), -0.5)
    bits[0, :3] = 0.5
    vector = stored.decode(bits)[0].detach()
    found = stored.decode(nearest_codes(book, vector.expand(32, -1), seed=0))
    assert (found - vector).norm(dim=1).min() < 0.5 * vector.norm()


@pytest.mark.parametrize("seed", range(3))
def test_a_given_vector_takes_the_nearest_of_several_descents(counts, seed):
    """Some of which end no nearer than the mean vector."""
    settings = AdaCompConfig((4, 8, 32), target_ratio=3, codebook_dtype="int8", seed=seed)
    table = pack(compress(TIED["gemma3"]().eval(), settings, counts)).get_input_embeddings()
    wanted = table(torch.arange(5, 15)).unflatten(0, (5, 2)).mean(1)
    one, several = (
        table.codebook.stored().decode(nearest_codes(table.codebook, wanted, seed, starts)) for starts in (1, STARTS)
    )
    mean = table(torch.arange(VOCABULARY)).mean(0)
    assert ((several - wanted).norm(dim=1) <= (one - wanted).norm(dim=1) + 1e-6).all()
    assert ((several - wanted).norm(dim=1) < 0.9 * (mean - wanted).norm(dim=1)).all()
