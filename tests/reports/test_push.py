"""Pushing and loading with the real client against a Hub on loopback, each step in a process of its own."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import EXAMPLES
from hub_server import serve

TESTS = Path(__file__).parent

TRAIN = """
import sys, torch
sys.path.insert(0, {tests!r})
from conftest import VOCABULARY, tiny_bert_config
from transformers import BertForSequenceClassification, Trainer, TrainingArguments
import hf_adacomp, hf_adacomp.fitting.warm_start
hf_adacomp.fitting.warm_start.FIT_ROUNDS = 1
torch.manual_seed(0)
rows = [dict(input_ids=torch.randint(0, VOCABULARY, (9,)), labels=i % 2) for i in range(32)]
model = BertForSequenceClassification(tiny_bert_config())
hf_adacomp.compress(model, hf_adacomp.AdaCompConfig(code_lengths=(4, 8, 20), target_ratio=32))
trainer = Trainer(
    model,
    TrainingArguments("out", num_train_epochs=1, report_to="none", use_cpu=True, hub_model_id="user/trained"),
    train_dataset=rows,
    callbacks=[hf_adacomp.AdaCompCallback()],
)
trainer.train()
"""

PUSH = "model.push_to_hub('user/tiny')\ntorch.save(model.eval()(torch.arange(32)[None]).logits, 'logits.pt')"

PUSH_FROM_TRAINER = """
trainer.push_to_hub()
result = dict(task_type="text-classification", dataset_type="toy", dataset_name="Toy", metric_type="accuracy")
from huggingface_hub import EvalResult
hf_adacomp.push_model_card(
    model,
    "user/trained",
    base_model="google-bert/bert-base-uncased",
    results=[EvalResult(**result, metric_value=95.0)],
    dense_results=[EvalResult(**result, metric_value=96.0)],
)
torch.save(model.eval()(torch.arange(32)[None]).logits, 'logits.pt')
"""

LOAD = """
import torch
import hf_adacomp
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({repo!r})
assert model.get_input_embeddings().phase == "packed"
assert torch.allclose(model(torch.arange(32)[None]).logits, torch.load("logits.pt"), rtol=0, atol=1e-6)
{more}
"""


@pytest.fixture
def hub():
    with serve() as running:
        yield running


@pytest.fixture
def run(hub, tmp_path):
    """Runs a script in a fresh process whose Hub is the one on loopback."""

    def script(*command: str) -> str:
        environment = {name: value for name, value in os.environ.items() if "proxy" not in name.lower()}
        environment |= {
            "HF_ENDPOINT": hub.url,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_TOKEN": "hf_nobody",
            "HF_HOME": str(tmp_path / f"home{len(hub.requests)}"),  # nothing is left of an earlier process
            "PYTHONPATH": os.pathsep.join([str(TESTS.parent), os.environ.get("PYTHONPATH", "")]),
        }
        done = subprocess.run(
            [sys.executable, *command], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
        return done.stdout

    return script


def test_trained_pushed_and_loaded_by_name(hub, run):
    run("-c", TRAIN.format(tests=str(TESTS)) + PUSH)
    assert "model.safetensors" in hub.files("user/tiny")
    assert any(request.startswith("PUT /objects/") for request in hub.requests)
    card = hub.card("user/tiny")
    assert {"adacomp", "compression"} <= set(card.data.tags)
    assert card.data.library_name == "transformers"
    assert 'from_pretrained("user/tiny")' in card.text
    assert card.text.index("import hf_adacomp") < card.text.index("from transformers")
    assert hub.files("user/tiny")["code_lengths.png"].startswith(b"\x89PNG")
    assert hub.repositories["user/tiny"].commits == ["Upload BertForSequenceClassification"]

    # What the owner writes, and what an unrelated push finds, stays.
    text = hub.files("user/tiny")["README.md"].decode()
    mine = text.replace("# Model Card for Model ID\n", "# My title\n\nMy own words.\n").replace(
        "---\n", "---\nlicense: mit\n", 1
    )
    hub.files("user/tiny")["README.md"] = mine.encode()
    run("-c", LOAD.format(repo="user/tiny", more="model.push_to_hub('user/tiny')"))
    assert "My own words." in hub.card("user/tiny").text
    assert hub.card("user/tiny").data.license == "mit"
    assert hub.card("user/tiny").text.count("import hf_adacomp") == 1


def test_trainer_pushes_and_the_card_keeps_its_text(hub, run):
    run("-c", TRAIN.format(tests=str(TESTS)) + PUSH_FROM_TRAINER)
    card = hub.card("user/trained")
    assert "### Training hyperparameters" in card.text
    assert {"adacomp", "compression", "generated_from_trainer"} <= set(card.data.tags)
    assert (card.data.base_model, card.data.base_model_relation) == ("google-bert/bert-base-uncased", "quantized")
    assert [result.metric_value for result in card.data.eval_results] == [95.0]
    assert "| Toy | accuracy | 96.0 | 95.0 |" in card.text
    assert card.text.index("import hf_adacomp") < card.text.index("### Training hyperparameters")
    assert not any(name.startswith("checkpoint-") for name in hub.files("user/trained"))
    run("-c", LOAD.format(repo="user/trained", more=""))


def test_example_pushes(hub, run, toy_arguments, tmp_path):
    words = toy_arguments(hub_model_id="user/example")
    run(str(EXAMPLES / "benchmarks" / "classification.py"), *words, "--push_to_hub")
    card = hub.card("user/example")
    (result,) = card.data.eval_results
    assert (result.metric_type, result.dataset_split) == ("accuracy", "test")
    assert "| train | accuracy | " in card.text
    assert f"| {result.metric_value} |" in card.text
    assert {"model.safetensors", "tokenizer.json", "code_lengths.png"} <= set(hub.files("user/example"))
    model_bytes = len(hub.files("user/example")["model.safetensors"])
    assert model_bytes < (tmp_path / "out" / "dense" / "model.safetensors").stat().st_size


REFUSED = """
import pytest
from huggingface_hub import HfApi
with pytest.raises(ValueError, match="model_index"):
    HfApi()._validate_yaml("---\\nmodel-index: nonsense\\n---\\n")
"""


def test_server_refuses_a_card_with_broken_metadata(hub, run):
    """Its check of cards, which every push above passed, does find something."""
    run("-c", REFUSED)
    assert hub.requests == ["POST /api/validate-yaml"]


SENTENCES = """
import sys, torch
sys.path.insert(0, {tests!r})
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, StaticEmbedding
from tokenizers import Tokenizer, models
import hf_adacomp, hf_adacomp.fitting.warm_start
hf_adacomp.fitting.warm_start.FIT_ROUNDS = 1
words = Tokenizer(models.WordLevel({{f"w{{i}}": i for i in range(512)}}, unk_token="w0"))
static = StaticEmbedding(words, embedding_weights=torch.randn(512, 32))
model = SentenceTransformer(modules=[static, Normalize()], device="cpu")
config = hf_adacomp.AdaCompConfig(code_lengths=(4, 32), target_ratio=3, codebook_dtype="int8")
hf_adacomp.pack(hf_adacomp.compress(model, config, torch.arange(512)))
model.push_to_hub("user/sentences")
torch.save(model.encode(["w7"]), "vectors.pt")
"""

LOAD_SENTENCES = """
import torch
import hf_adacomp
from sentence_transformers import SentenceTransformer
model = SentenceTransformer("user/sentences", device="cpu")
assert abs(model.encode(["w7"]) - torch.load("vectors.pt", weights_only=False)).max() < 1e-6
model.push_to_hub("user/sentences", exist_ok=True)
"""


def test_sentence_transformers_push_and_load_by_name(hub, run):
    run("-c", SENTENCES.format(tests=str(TESTS.parent)))
    card = hub.card("user/sentences")
    assert {"adacomp", "compression", "sentence-transformers"} <= set(card.data.tags)
    assert 'SentenceTransformer("user/sentences")' in card.text
    assert card.text.index("import hf_adacomp") < card.text.index("SentenceTransformer(")
    mine = hub.files("user/sentences")["README.md"].decode() + "\nMy own words.\n"
    hub.files("user/sentences")["README.md"] = mine.encode()
    run("-c", LOAD_SENTENCES)
    assert "My own words." in hub.card("user/sentences").text
