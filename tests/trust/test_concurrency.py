"""Packed models in threads, in the workers of a data loader and in spawned processes."""

import gc
import pickle
import resource
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from architectures import TIED
from conftest import LENGTHS, VOCABULARY, close
from safetensors.torch import load_file
from torch import multiprocessing
from torch.utils.data import DataLoader, Dataset

from hf_adacomp import AdaCompConfig, compress, pack

pytestmark = pytest.mark.usefixtures("quick_fit")
THREADS = 8


@pytest.fixture
def gpt2(counts):
    """A packed table that serves as output head, too."""
    return pack(compress(TIED["gpt2"]().eval(), AdaCompConfig(LENGTHS, target_ratio=3), counts))


def batches(number: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(0, VOCABULARY, (1 + i % 3, 1 + i % 9), generator=generator) for i in range(number)]


@torch.no_grad()
def logits(model, ids: torch.Tensor) -> torch.Tensor:
    return model(ids).logits


@pytest.mark.parametrize("name", ["gpt2", "packed_bert"])
def test_threads_compute_what_one_does(name, request):
    model = request.getfixturevalue(name)
    expected = [logits(model, ids) for ids in batches(40)]
    with ThreadPoolExecutor(THREADS) as threads:
        found = [*threads.map(lambda ids: logits(model, ids), batches(40) * 4)]
    assert all(close(a, b) for a, b in zip(found, expected * 4, strict=True))


def test_some_threads_evaluate_while_others_want_gradients(gpt2):
    """What eval mode keeps is let go by those, and by the next pass: nobody may lose what he is about to use."""
    table, every = gpt2.get_input_embeddings(), batches(20)
    expected = [logits(gpt2, ids) for ids in every]
    total = table.weight.detach().sum()

    def use(number: int) -> torch.Tensor:
        if number % 3 == 0:
            with torch.no_grad():
                return table.weight.sum() - total
        with torch.set_grad_enabled(number % 3 == 1):
            return (gpt2(every[number % 20]).logits - expected[number % 20]).abs().max()

    with ThreadPoolExecutor(THREADS) as threads:
        found = [*threads.map(use, range(600))]
    assert max(map(abs, found)) < 1e-3


def tensors_alive() -> int:
    gc.collect()
    return sum(issubclass(type(thing), torch.Tensor) for thing in gc.get_objects())


def resident_bytes() -> int:
    status = Path("/proc/self/statm")
    if not status.exists():
        pytest.skip("needs /proc/self/statm, which only Linux has")
    return resource.getpagesize() * int(status.read_text().split()[1])


def call_often(model, calls: int) -> tuple[int, int]:
    """Growth of the process in bytes and in tensors over so many calls from several threads, after as many."""
    every = batches(20)

    def look_up(number: int) -> None:
        with torch.no_grad():
            model.get_input_embeddings()(every[number % 20])
            if number % 10 == 0:
                model(every[number % 20])

    with ThreadPoolExecutor(THREADS) as threads:
        for _ in threads.map(look_up, range(calls)):
            pass
        before, tensors = resident_bytes(), tensors_alive()
        for _ in threads.map(look_up, range(calls)):
            pass
        after = resident_bytes()
    return after - before, tensors_alive() - tensors


def test_many_calls_leave_nothing_behind(gpt2):
    _, tensors = call_often(gpt2, 400)
    assert tensors <= 0


@pytest.mark.long
def test_ten_thousand_calls_take_no_memory(gpt2):
    grown, tensors = call_often(gpt2, 10_000)
    print(f"10,000 calls from {THREADS} threads: memory grew by {grown:,} bytes")
    assert tensors <= 0
    assert grown < 4 << 20  # the vectors that each call returns would be 13 MB


class Encoded(Dataset):
    """Vectors of a packed model, computed by the worker that reads them."""

    def __init__(self, model):
        self.model, self.ids = model, batches(12)

    def __len__(self):
        return len(self.ids)

    def __getitem__(self, index):
        torch.set_num_threads(1)
        return logits(self.model, self.ids[index])


@pytest.mark.parametrize(("context", "workers"), [("fork", 2), ("spawn", 1)])
@pytest.mark.filterwarnings("default::DeprecationWarning")  # Python's of forking a process with threads
def test_workers_of_a_data_loader(gpt2, context, workers):
    loader = DataLoader(Encoded(gpt2), batch_size=None, num_workers=workers, multiprocessing_context=context)
    for found, ids in zip(loader, batches(12), strict=True):
        assert close(found, logits(gpt2, ids))


def test_saves_at_the_same_time_each_store_the_state_that_they_are_given(packed_bert, tmp_path, monkeypatch):
    given, name = packed_bert.state_dict(), "bert.pooler.dense.weight"
    given[name] = 2 * given[name]
    stock = type(packed_bert.hf_quantizer).get_state_dict_and_metadata

    def meanwhile(quantizer, model):
        monkeypatch.undo()
        with ThreadPoolExecutor(1) as other:
            other.submit(packed_bert.save_pretrained, tmp_path / "own").result()
        return stock(quantizer, model)

    monkeypatch.setattr(type(packed_bert.hf_quantizer), "get_state_dict_and_metadata", meanwhile)
    packed_bert.save_pretrained(tmp_path / "given", state_dict=given)
    own, double = (load_file(tmp_path / folder / "model.safetensors")[name] for folder in ("own", "given"))
    assert torch.equal(own, packed_bert.state_dict()[name])
    assert torch.equal(double, 2 * own)


def write_logits(rank: int, model, results: torch.Tensor) -> None:
    torch.set_num_threads(1)
    results.copy_(logits(model, batches(1)[0]))


def test_spawned_process_shares_a_model(packed_bert):
    packed_bert.share_memory()
    expected = logits(packed_bert, batches(1)[0])
    found = torch.zeros_like(expected).share_memory_()
    multiprocessing.spawn(write_logits, (packed_bert, found), nprocs=1)
    assert close(found, expected)


@pytest.mark.parametrize("phase", ["select", "packed"])
def test_pickled_model_is_the_same_model(bert, config, counts, ids, phase):
    compress(bert, config, counts).eval()
    if phase == "packed":
        pack(bert)
    again = pickle.loads(pickle.dumps(bert))
    assert close(logits(again, ids), logits(bert, ids))
    assert again.get_input_embeddings().phase == phase
