"""What the package must never do: unpickle, run remote code, reach for the network."""

import ast
import socket
import subprocess
import sys
from pathlib import Path

import pytest

import hf_adacomp

PACKAGE = Path(hf_adacomp.__file__).parent
SOURCES = sorted(PACKAGE.rglob("*.py"))
FORBIDDEN_MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "shelve", "marshal", "joblib", "ctypes", "subprocess"}
FORBIDDEN_MODULES |= {"socket", "urllib", "http", "requests", "httpx", "aiohttp", "ftplib"}
FORBIDDEN_CALLS = {"eval", "exec", "compile", "__import__", "torch.load", "torch.save", "os.system", "os.popen"}
FORBIDDEN_CALLS |= {"numpy.load", "np.load", "importlib.import_module", "torch.hub.load"}


def imports(tree: ast.AST) -> set[str]:
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            found.add((node.module or "").split(".")[0])
    return found


@pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.name)
def test_source_has_no_pickle_no_remote_code_no_network(source):
    text = source.read_text(encoding="utf-8")
    tree = ast.parse(text)
    assert not imports(tree) & FORBIDDEN_MODULES
    calls = {ast.unparse(node.func) for node in ast.walk(tree) if isinstance(node, ast.Call)}
    assert not calls & FORBIDDEN_CALLS
    assert "trust_remote_code" not in text
    assert "weights_only=False" not in text


def test_all_sources_are_looked_at():
    assert {"__init__.py", "quantizer.py", "bits.py"} <= {path.name for path in SOURCES}


WATCHED = """
import sys
folder, seen = sys.argv[1], []

def watch(event, args):
    if event.startswith("socket.") and event not in ("socket.__new__", "socket.gethostname"):
        seen.append((event, args))
    if event in ("pickle.find_class", "marshal.loads") and armed and event != "marshal.loads":
        seen.append((event, args))

armed = False
sys.addaudithook(watch)
import torch
from transformers import AutoModelForSequenceClassification
armed = True
import hf_adacomp
model = AutoModelForSequenceClassification.from_pretrained(folder)
assert isinstance(model.get_input_embeddings(), hf_adacomp.AdaptiveCompressedEmbedding)
model(torch.tensor([[1, 2, 3]]))
model.save_pretrained(folder + "/again")
assert not seen, seen
print("clean")
"""


def test_import_load_run_and_save_neither_unpickle_nor_connect(packed_bert, tmp_path):
    """By Python's own audit events, in a fresh process that may use the network."""
    packed_bert.save_pretrained(tmp_path)
    stored = {"README.md", "code_lengths.png", "config.json", "model.safetensors"}
    assert {path.name for path in tmp_path.iterdir()} == stored
    done = subprocess.run([sys.executable, "-c", WATCHED, str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith("clean")


def test_the_suite_itself_is_cut_off():
    """conftest lets sockets connect to this machine only."""
    with pytest.raises(ConnectionRefusedError, match="tests are offline"), socket.socket() as connection:
        connection.connect(("192.0.2.1", 443))  # an address for documentation (RFC 5737)
    with pytest.raises(ConnectionRefusedError, match="tests are offline"):
        socket.create_connection(("192.0.2.1", 443), timeout=1)
