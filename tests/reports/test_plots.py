import pytest

from hf_adacomp import compress, pack
from hf_adacomp.reports.plots import plot_histogram, plot_lengths

pytestmark = pytest.mark.usefixtures("quick_fit")


def test_histogram_counts_every_token(packed_bert):
    (panel,) = plot_histogram(packed_bert).axes
    lengths = packed_bert.get_input_embeddings().code_lengths()
    heights = {
        tick.get_text(): bar.get_height() for tick, bar in zip(panel.get_xticklabels(), panel.patches, strict=True)
    }
    assert heights == {str(length): int((lengths == length).sum()) for length in lengths.unique().tolist()}
    assert (panel.get_xlabel(), panel.get_ylabel()) == ("code length (bits)", "tokens")


def test_ranks_follow_ids_or_counts(bert, config, counts):
    pack(compress(bert, config, counts.flip(0)))
    by_id, by_count = (plot_lengths(bert, given).axes[1] for given in (None, counts.flip(0)))
    assert by_id.get_xlabel() == "token id"
    assert by_count.get_xlabel() == "rank of the token by count"
    (rising,), (falling,) = by_id.lines, by_count.lines
    assert rising.get_ydata()[0] < rising.get_ydata()[-1]  # the last ids are the frequent ones
    assert falling.get_ydata()[0] > falling.get_ydata()[-1]
    assert falling.get_ydata()[0] == bert.get_input_embeddings().code_lengths()[-10:].float().mean()


def test_missing_matplotlib_tells_what_to_install(packed_bert, monkeypatch):
    monkeypatch.setattr("hf_adacomp.reports.plots.find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"pip install matplotlib"):
        plot_histogram(packed_bert)
