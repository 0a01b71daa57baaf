import gzip
import json
import re
import subprocess
import sys
from io import BytesIO, TextIOWrapper

import pytest
import torch
from conftest import WORDS, word_tokenizer
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from hf_adacomp import AdaptiveCompressedEmbedding
from hf_adacomp.cli import main
from hf_adacomp.reports.tokens import TokenRow

pytestmark = pytest.mark.usefixtures("quick_fit")


@pytest.fixture
def text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_text("\n".join(f"{' '.join(WORDS[:3])} {word}" for word in WORDS[:100]), encoding="utf-8")
    return file


@pytest.fixture
def packed(toy_model, text, tmp_path):
    folder = tmp_path / "packed"
    options = ["--ratio", "30", "--code-lengths", "4", "16", "--counts-from", str(text)]
    assert main(["compress", str(toy_model), str(folder), *options]) == 0
    return folder


def test_compress_counts_packs_and_saves(packed):
    model = AutoModelForSequenceClassification.from_pretrained(packed)
    embedding = model.get_input_embeddings()
    assert embedding.phase == "packed"
    tokenizer = AutoTokenizer.from_pretrained(packed)
    lengths = embedding.code_lengths()
    assert set(lengths[tokenizer.convert_tokens_to_ids(WORDS[:3])].tolist()) == {16}
    assert lengths[tokenizer.convert_tokens_to_ids(WORDS[100:])].float().mean() < 16
    assert (packed / "README.md").exists()


def test_compress_without_counts_and_gzipped_counts(toy_model, text, tmp_path, capsys):
    compressed = tmp_path / "text.txt.gz"
    compressed.write_bytes(gzip.compress(text.read_bytes()))
    options = ["--ratio", "30", "--code-lengths", "4", "16"]
    assert main(["compress", str(toy_model), str(tmp_path / "none"), *options]) == 0
    assert main(["compress", str(toy_model), str(tmp_path / "gz"), *options, "--counts-from", str(compressed)]) == 0
    lengths = [
        AutoModelForSequenceClassification.from_pretrained(tmp_path / name).get_input_embeddings().code_lengths()
        for name in ("none", "gz")
    ]
    assert not torch.equal(*lengths)
    assert capsys.readouterr().out.count("ratio") == 2


def test_counts_come_from_a_column_and_fit_the_table(toy_model, tmp_path, capsys):
    (tmp_path / "text.csv").write_text("query,label\nword1 word2,1\n", encoding="utf-8")
    command = ["compress", str(toy_model), str(tmp_path / "out"), "--ratio", "10", "--code-lengths", "4", "16"]
    command += ["--counts-from", str(tmp_path / "text.csv")]
    assert main([*command, "--column", "query"]) == 0
    (tmp_path / "odd").mkdir()
    for file in toy_model.iterdir():
        (tmp_path / "odd" / file.name).write_bytes(file.read_bytes())
    tokenizer = AutoTokenizer.from_pretrained(toy_model)
    tokenizer.add_tokens(["word1 word2"])
    tokenizer.save_pretrained(tmp_path / "odd")
    command[1] = str(tmp_path / "odd")
    assert main([*command, "--column", "query"]) == 1
    assert f"holds token id {len(tokenizer) - 1}, but the table has" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["txt", "jsonl"])
def test_compress_calibrates_and_reports(toy_model, tmp_path, capsys, kind):
    texts = [f"{' '.join(WORDS[:3])} {word}" for word in WORDS[:100]]
    file = tmp_path / f"texts.{kind}"
    lines = [json.dumps({"body": text}) for text in texts] if kind == "jsonl" else texts
    file.write_text("\n".join(lines), encoding="utf-8")
    options = ["--ratio", "30", "--code-lengths", "4", "16", "--calibrate", str(file), "--report"]
    options += ["--column", "body"] if kind == "jsonl" else []
    assert main(["compress", str(toy_model), str(tmp_path / "out"), *options]) == 0
    model = AutoModelForSequenceClassification.from_pretrained(tmp_path / "out")
    assert model.get_input_embeddings().phase == "packed"
    printed = capsys.readouterr().out
    # Ten texts are held out; the others have four words and two special tokens each.
    assert "90 texts hold 540 tokens, 93 of 204 different ones" in printed
    tokens = word_tokenizer()(texts[::10], padding=True, return_tensors="pt")
    with torch.no_grad():
        dense = AutoModelForSequenceClassification.from_pretrained(toy_model).eval()(**tokens).logits
        cosine = torch.cosine_similarity(dense, model.eval()(**tokens).logits).mean()
    told = re.search(r"answers to 10 held-out texts: mean (-?\d\.\d{4})", printed)
    assert float(told[1]) == pytest.approx(float(cosine), abs=2e-3)
    assert "ratio" in printed


def test_inspect_prints_sizes_and_tokens(packed, capsys):
    capsys.readouterr()
    assert main(["inspect", str(packed), "--json", "--tokens", "3"]) == 0
    figures = json.loads(capsys.readouterr().out)
    parts = ("codes_bytes", "lengths_bytes", "codebook_bytes", "head_bytes")
    assert figures["total_bytes"] == sum(figures[part] for part in parts)
    assert figures["ratio"] >= 30
    assert [row["bits"] for row in figures["longest"]] == [16, 16, 16]
    assert main(["inspect", str(packed)]) == 0
    printed = capsys.readouterr().out
    assert "code-books" in printed
    assert figures["longest"][0]["token"] in printed


def test_a_console_that_lacks_characters_shows_their_numbers(packed, monkeypatch):
    console = TextIOWrapper(BytesIO(), encoding="ascii")
    monkeypatch.setattr("sys.stdout", console)
    monkeypatch.setattr("hf_adacomp.cli.token_table", lambda *_: [TokenRow("\u00e9", 7, None, 16)])
    assert main(["inspect", str(packed)]) == 0
    console.flush()
    assert console.buffer.getvalue().endswith(b"\\xe9\n")
    console.buffer.truncate(console.buffer.seek(0))
    assert main(["inspect", str(packed), "--json"]) == 0
    console.flush()
    assert json.loads(console.buffer.getvalue())["longest"][0]["token"] == "\u00e9"


def test_plot_draws(packed, text, tmp_path):
    for name, options in (("ids.png", []), ("counts.svg", ["--counts-from", str(text)])):
        assert main(["plot", str(packed), str(tmp_path / name), *options]) == 0
        assert (tmp_path / name).stat().st_size > 5000


def test_decompress_gives_a_plain_model(packed, ids, tmp_path):
    assert main(["decompress", str(packed), str(tmp_path / "plain")]) == 0
    ours, plain = (AutoModelForSequenceClassification.from_pretrained(tmp_path / n) for n in ("packed", "plain"))
    assert not isinstance(plain.get_input_embeddings(), AdaptiveCompressedEmbedding)
    ids = ids % len(AutoTokenizer.from_pretrained(tmp_path / "plain"))
    with torch.no_grad():
        assert torch.allclose(ours(ids).logits, plain(ids).logits, atol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["inspect", "{toy}"], "has no compressed embedding: call compress"),
        (["decompress", "{toy}", "{tmp}/out"], "has no compressed embedding"),
        (["compress", "{toy}", "{tmp}/empty.txt"], "empty.txt is a file: name a folder"),
        (["compress", "{toy}", "{tmp}/out", "--ratio", "100000"], "target_ratio"),
        (["compress", "{toy}", "{tmp}/out", "--ratio", "-1"], "-1"),
        (["decompress", "{toy}", "{tmp}/empty.txt"], "empty.txt is a file: name a folder"),
        (["compress", "{toy}", "{toy}"], "name another folder"),
        (["compress", "{toy}", "{tmp}/out", "--counts-from", "{tmp}/nowhere.txt"], "nowhere.txt"),
        (["compress", "{toy}", "{tmp}/out", "--counts-from", "{tmp}/empty.txt"], "holds no text"),
        (["compress", "{toy}", "{tmp}/out", "--calibrate", "{tmp}/empty.txt"], "holds no text"),
        (["compress", "{toy}", "{tmp}/out", "--report"], "--report compares answers to texts of --calibrate"),
        (["compress", "{toy}", "{tmp}/out", "--column", "text"], "--column text is for the file of --calibrate"),
        (["inspect", "{tmp}/nowhere"], "nowhere"),
    ],
)
def test_failures_are_told_in_a_line(arguments, message, toy_model, tmp_path, capsys):
    (tmp_path / "empty.txt").touch()
    assert main([word.format(toy=toy_model, tmp=tmp_path) for word in arguments]) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_usage(capsys):
    for arguments, code in (["--help"], 0), (["compress", "--help"], 0), ([], 2), (["compress"], 2):
        with pytest.raises(SystemExit, match=str(code)):
            main(arguments)
    assert "--counts-from" in capsys.readouterr().out


def test_runs_from_the_shell(packed):
    done = subprocess.run(
        [sys.executable, "-m", "hf_adacomp.cli", "inspect", str(packed), "--json"],
        capture_output=True,
        text=True,
        check=True,
    )
    assert json.loads(done.stdout)["num_tokens"] == 204
