"""The page and the scripts of node: the similarities and texts of PyTorch, by files beside them alone.

They run where their packages are installed, `npm install --ignore-scripts` in examples/browser; the page also needs
Chromium with its driver (Debian: `apt install chromium chromium-driver`) and `pip install selenium`.
"""

import json
import shutil
import subprocess
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import urlparse

import pytest
import torch
from conftest import EXAMPLES, WORDS, tiny_bert_config, word_tokenizer
from sentence_transformers import SentenceTransformer
from sentence_transformers.sentence_transformer.modules import Normalize, Pooling, Transformer
from transformers import BertModel, LlamaConfig, LlamaForCausalLM

from hf_adacomp import AdaCompConfig, compress, export_onnx, pack

BROWSER = EXAMPLES / "browser"
PACKAGES = BROWSER / "node_modules"
TEXTS = (" ".join(WORDS[:4]), " ".join(WORDS[2:9]))

pytestmark = [
    pytest.mark.usefixtures("quick_fit"),
    pytest.mark.skipif(
        not (PACKAGES / "@huggingface" / "transformers").exists(),
        reason="transformers.js is not there: npm install --ignore-scripts in examples/browser",
    ),
]


@pytest.fixture
def page(tmp_path):
    """A folder with the page, its packages and an exported encoder; and the encoder's own cosine of `TEXTS`."""
    config = tiny_bert_config(num_hidden_layers=1, vocab_size=204)
    BertModel(config).save_pretrained(tmp_path / "bert")
    word_tokenizer().save_pretrained(tmp_path / "bert")
    modules = [Transformer(str(tmp_path / "bert")), Pooling(32, "mean"), Normalize()]
    encoder = SentenceTransformer(modules=modules, device="cpu")
    settings = AdaCompConfig(code_lengths=(4, 8, 28), target_ratio=6)
    pack(compress(encoder, settings, 1000 // torch.arange(1, 205)))
    folder = tmp_path / "page"
    folder.mkdir()
    for file in ("index.html", "similarity.mjs"):
        shutil.copy(BROWSER / file, folder)
    (folder / "node_modules").symlink_to(PACKAGES)
    export_onnx(encoder, folder / "model")
    first, second = encoder.encode([*TEXTS], convert_to_tensor=True)
    return folder, float(first @ second)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_node_says_what_pytorch_says(page):
    folder, cosine = page
    command = ["node", "similarity.mjs", str(folder / "model"), "fp32", *TEXTS]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) == pytest.approx(cosine, abs=1e-3)


@pytest.mark.skipif(shutil.which("node") is None, reason="node is not installed")
def test_node_generates_what_pytorch_generates(tmp_path):
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
    places = {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 0}
    model = LlamaForCausalLM(LlamaConfig(vocab_size=204, num_key_value_heads=2, head_dim=8, **sizes, **places)).eval()
    settings = AdaCompConfig(code_lengths=(4, 8, 28), target_ratio=6)
    pack(compress(model, settings, 1000 // torch.arange(1, 205)))
    tokenizer = word_tokenizer()
    export_onnx(model, tmp_path / "model", tokenizer)
    ids = tokenizer(TEXTS[0], return_tensors="pt")["input_ids"]
    wanted = tokenizer.decode(model.generate(ids, max_new_tokens=20, do_sample=False)[0], skip_special_tokens=True)
    command = ["node", str(BROWSER / "generate.mjs"), str(tmp_path / "model"), "fp32", TEXTS[0]]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == wanted


@pytest.fixture
def browser():
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed: pip install selenium")
    chromium, driver = shutil.which("chromium"), shutil.which("chromedriver")
    if chromium is None or driver is None:
        pytest.skip("no browser is installed: apt install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"performance": "ALL"})
    with webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)) as running:
        yield running


def test_the_page_says_what_pytorch_says_and_needs_no_network(page, browser):
    folder, cosine = page
    server = ThreadingHTTPServer(("127.0.0.1", 0), partial(SimpleHTTPRequestHandler, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    wait = pytest.importorskip("selenium.webdriver.support.ui").WebDriverWait(browser, 120)
    browser.get(f"http://127.0.0.1:{server.server_port}/index.html?dtype=fp32")
    wait.until(lambda seen: seen.execute_script("return document.body.dataset.ready"))
    server.shutdown()
    server.server_close()  # from here on there is nobody to ask
    for name, text in zip(("first", "second"), TEXTS, strict=True):
        ready = browser.execute_script("return document.body.dataset.ready")
        browser.execute_script(
            "const field = document.getElementById(arguments[0]);"
            "field.value = arguments[1]; field.dispatchEvent(new Event('change'));",
            name,
            text,
        )
        wait.until(lambda seen, ready=ready: seen.execute_script("return document.body.dataset.ready") != ready)
    said = browser.execute_script("return document.getElementById('cosine').value")
    assert float(said) == pytest.approx(cosine, abs=1e-3)
    assert browser.execute_script("return document.querySelectorAll('#nearest li').length") == 3
    assert "MB of model and tokenizer" in browser.execute_script("return document.getElementById('facts').textContent")
    events = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    asked = [event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"]
    assert {urlparse(url).hostname for url in asked if not url.startswith(("data:", "blob:"))} == {"127.0.0.1"}
