"""Time and memory of packed tables over dense ones, measured in one run on this machine.

    python examples/benchmarks/speed.py --json_out speed.json

Ratios are of medians over interleaved repeats. Tables are random: codes and code-books cost the same whatever they
hold. Ids follow Zipf's law, and frequent tokens have the long codes.

What bounds the rows, by count: a look-up of N distinct tokens multiplies N x L bits with L x d code vectors in float32
and then copies N x d floats as a dense one does, so that it cannot be as fast; the head of one position reads V L / 8
bytes of codes and as many table entries instead of 4 V d bytes.
"""

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from statistics import median

import torch
from torch import Tensor, nn
from torch.utils.benchmark import Timer
from transformers import BertConfig, BertModel, GPT2Config, GPT2LMHeadModel, HfArgumentParser, PreTrainedModel

from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding, packing
from hf_adacomp.packed_codes import PackedCodes
from hf_adacomp.places import CompressedHead
from hf_adacomp.quantizer import AdaCompHfQuantizer, attach
from hf_adacomp.surgery import put, token_tables

LENGTHS, SHARES = (16, 64, 256), (0.4, 0.5, 0.1)
"""Code lengths and the shares of tokens that have them: 64 bits a token on average."""

CONFIG = AdaCompConfig(LENGTHS, target_ratio=1.0)
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


@dataclass
class SpeedArguments:
    rows: list[str] | None = field(default=None, metadata={"help": "Only these. Default: all."})
    repeats: int = field(default=15, metadata={"help": "Interleaved repeats of each measurement."})
    threads: int = field(default=2, metadata={"help": "Threads of PyTorch; the look-up alone takes one."})
    scale: float = field(default=1.0, metadata={"help": "Factor of vocabulary sizes: below 1 for a quick look."})
    json_out: str | None = field(default=None, metadata={"help": "Write every figure to this file."})


def random_table(tokens: int, dim: int) -> AdaptiveCompressedEmbedding:
    """A packed table of random codes; low ids have long ones."""
    sizes = [int(share * tokens) for share in SHARES[:-1]]
    sizes.append(tokens - sum(sizes))
    layout = {
        "num_embeddings": tokens,
        "embedding_dim": dim,
        "padding_idx": None,
        "code_lengths": LENGTHS,
        "zero_padding": False,
        "scale": 1.0,
        "tokens_per_length": sizes,
    }
    table = AdaptiveCompressedEmbedding.from_layout(layout, CONFIG, torch.float32).to_empty(device="cpu")
    with torch.no_grad():
        for book in table.books():
            book.weight.copy_(packing.pack_nibbles(torch.randint(-7, 8, (book.length, dim), dtype=torch.int8)))
            book.scale.fill_((book.length * dim) ** -0.5 / 4)
            book.bias.normal_()
    assignment = torch.repeat_interleave(torch.arange(len(sizes), dtype=torch.uint8), torch.tensor(sizes)).flip(0)
    octets = sum(packing.group_bytes(sizes, LENGTHS))
    table.packed = PackedCodes.of(assignment, LENGTHS, torch.randint(0, 256, (octets,), dtype=torch.uint8))
    return table.eval()


def with_random_table(dense: PreTrainedModel) -> PreTrainedModel:
    """A copy of a model whose table, and tied head, is a packed one."""
    model = copy.deepcopy(dense)
    (table,) = token_tables(model)
    put(model, table, random_table(*table.owner.weight.shape), "compress")
    attach(model, AdaCompHfQuantizer(CONFIG, pre_quantized=False))
    return model.eval()


def zipf_ids(tokens: int, number: int) -> Tensor:
    return torch.multinomial(1 / torch.arange(1.0, tokens + 1), number, replacement=True)


def medians(repeats: int, threads: int, **candidates: Callable[[], object]) -> dict[str, float]:
    """Median seconds of each candidate, measured in turn."""
    timers = {name: Timer("f()", globals={"f": f}, num_threads=threads) for name, f in candidates.items()}
    number = {name: max(1, int(0.05 / timer.timeit(1).mean)) for name, timer in timers.items()}
    times: dict[str, list[float]] = {name: [] for name in timers}
    for _ in range(repeats):
        for name, timer in timers.items():
            times[name].append(timer.timeit(number[name]).mean)
    return {name: median(values) for name, values in times.items()}


Row = tuple[str, float, str]
"""What was measured, its value, its unit."""


def forward(args: SpeedArguments) -> Iterator[Row]:
    tokens = int(30522 * args.scale)
    dense = BertModel(BertConfig(vocab_size=tokens, **MINILM)).eval()
    packed = with_random_table(dense)
    for shape in ((32, 64), (1, 16)):
        ids = zipf_ids(tokens, shape[0] * shape[1]).view(shape)
        found = medians(args.repeats, args.threads, packed=partial(packed, ids), dense=partial(dense, ids))
        yield f"MiniLM-L6 forward, {shape[0]} x {shape[1]} tokens, over dense", found["packed"] / found["dense"], "x"


def lookup(args: SpeedArguments) -> Iterator[Row]:
    tokens = int(30522 * args.scale)
    dense, packed, ids = nn.Embedding(tokens, 384), random_table(tokens, 384), zipf_ids(tokens, 4096)
    found = medians(args.repeats, 1, packed=lambda: packed(ids), dense=lambda: dense(ids))
    yield "look-up of 4,096 tokens, one thread, over dense", found["packed"] / found["dense"], "x"


def head(args: SpeedArguments) -> Iterator[Row]:
    table, hidden = random_table(int(262144 * args.scale), 640), torch.randn(1, 640)
    weight = table.to_embedding().weight.detach()
    half, compressed = weight.bfloat16(), CompressedHead(table)
    logits = hidden @ weight.T
    yield (
        "head: largest error of a logit over the largest logit",
        float((compressed(hidden) - logits).abs().max() / logits.abs().max()),
        "",
    )
    found = medians(
        args.repeats,
        args.threads,
        packed=lambda: compressed(hidden),
        float32=lambda: nn.functional.linear(hidden, weight),
        bfloat16=lambda: nn.functional.linear(hidden.bfloat16(), half),
    )
    for dtype in ("float32", "bfloat16"):
        yield f"head of one position, V=262,144, d=640, over {dtype}", found["packed"] / found[dtype], "x"


def generate(args: SpeedArguments) -> Iterator[Row]:
    dense = GPT2LMHeadModel(GPT2Config(vocab_size=int(50257 * args.scale), bos_token_id=0, eos_token_id=None)).eval()
    packed, ids = with_random_table(dense), torch.tensor([[1, 2, 3, 4]])
    options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    found = medians(
        max(3, args.repeats // 5),
        args.threads,
        packed=lambda: packed.generate(ids, **options),
        dense=lambda: dense.generate(ids, **options),
    )
    yield "64 new tokens of GPT-2's shape, over dense", found["packed"] / found["dense"], "x"


def peak_after_loading(folder: str) -> int:
    """Peak memory in bytes of a process that loads a model, from Linux's /proc."""
    code = (  # not getrusage, whose peak begins with that of the process that forked
        f"import hf_adacomp; from transformers import BertModel; BertModel.from_pretrained({folder!r});"
        "print(*(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    )
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return 1024 * int(lines[-1])


def load(args: SpeedArguments) -> Iterator[Row]:
    layer = {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12, "intermediate_size": 768}
    peaks = []
    for tokens in (1000, int(500_000 * args.scale)):
        model = with_random_table(BertModel(BertConfig(vocab_size=tokens, **layer)))
        table = model.get_input_embeddings()
        stored = sum(tensor.nbytes for tensor in table.state_dict().values())
        held = sum(tensor.nbytes for tensor in (*table.parameters(), *table.buffers()))
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            peaks.append(peak_after_loading(folder))
    yield "tensors of a loaded table of 500,000 x 768, over its bytes in the file", held / stored, "x"
    yield "packed bytes of that table", stored / 1e6, "MB"
    yield "peak memory of from_pretrained above that of a tiny table", (peaks[1] - peaks[0]) / 1e6, "MB"


ROWS: dict[str, Callable[[SpeedArguments], Iterator[Row]]] = {
    row.__name__: row for row in (forward, lookup, head, generate, load)
}


def main(arguments: list[str] | None = None) -> dict[str, float]:
    (args,) = HfArgumentParser(SpeedArguments).parse_args_into_dataclasses(arguments)
    if unknown := set(args.rows or ()) - set(ROWS):
        raise ValueError(f"unknown rows {sorted(unknown)}: choose among {', '.join(ROWS)}")
    torch.manual_seed(0)
    torch.set_num_threads(args.threads)
    figures = {}
    with torch.no_grad():
        for name in args.rows or ROWS:
            for what, value, unit in ROWS[name](args):
                figures[what] = value
                print(f"{what:<75}{value:>12.4g} {unit}", flush=True)
    if args.json_out is not None:
        Path(args.json_out).write_text(json.dumps(figures, indent=2) + "\n", encoding="utf-8")
    return figures


if __name__ == "__main__":
    main()
