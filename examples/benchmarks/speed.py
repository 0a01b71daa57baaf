"""Time and memory of packed tables over dense ones, measured in one run on this machine.

    python examples/benchmarks/speed.py --json_out speed.json

Ratios are of medians over interleaved repeats. Tables are random: codes and code-books cost the same whatever they
hold. Ids follow Zipf's law, and frequent tokens have the long codes.

What bounds the rows, by count: a look-up of N distinct tokens multiplies N x L bits with L x d code vectors in float32
and then copies N x d floats as a dense one does. Of 4,096 ids 1,767 are distinct, 0.22 GFLOP: at 180 GFLOP/s of a core
three dense look-ups, with the copy four, before a bit is unpacked. (Sums over bytes or nibbles instead of products read
50 to 90 MB from the cache: no faster.) A batch of 16 tokens takes 0.35 ms, mostly to unpack 130,000 int4 entries of the
code-books, which would double the table in memory if they were kept as floats. The head of one position reads V L / 8
bytes of codes and as many table entries instead of 4 V d bytes: half its time is those 2 million additions, a quarter
the conversion of bytes to the integers that PyTorch's gathers take. `import hf_adacomp` alone takes what transformers
needs for any model; what comes on top is the row.

On paper: V = 1,000,000, d = 4096, lengths 64/512/2048, 8 GPUs under DDP, 64k tokens a GPU and step, 30k distinct.

    held by each GPU   source 8.2 GB in bfloat16, without gradient or optimizer state (a dense table in float32 with
                       Adam: 65 GB); code-books 43 MB, selector 24 MB, each with Adam 3 x; counts and noise 20 MB
    moved a step       gradients of code-books 43 MB and selector 12 MB, and 1 MB of buffers, instead of 16.4 GB
    computed a step    N (4 L d + 8 L^2) for each length: 2 TFLOP for 30k tokens at 2048 bits, about 10 ms at half of an
                       H100's TF32 peak, next to 3 PFLOP of an 8B model; a tied head encodes all V: 70 TFLOP, 0.3 s
    sharded            nothing: everything but the source is small, and the source is read only
    packed             205 MB at 80x
"""

import copy
import json
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from itertools import cycle
from pathlib import Path
from statistics import median

import bitsandbytes
import torch
from random_tables import random_table, with_random_table, zipf_ids
from torch import nn
from torch.utils.benchmark import Timer
from torchao.quantization import IntxWeightOnlyConfig, quantize_
from torchao.quantization.granularity import PerGroup
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    HfArgumentParser,
)

from hf_adacomp import AdaCompConfig, compress
from hf_adacomp.nn.head import CompressedHead

CONFIG = AdaCompConfig(target_ratio=80)
MINILM = {"hidden_size": 384, "num_hidden_layers": 6, "num_attention_heads": 12, "intermediate_size": 1536}


USES_OF_WEIGHT = {
    "dtype, device, shape": "table.weight.dtype, table.weight.device, table.weight.shape",
    "4,096 rows": "with torch.no_grad(): table.weight[ids]",
    "all values": "with torch.no_grad(): table.weight.sum()",
    "logits of 16 positions and gradients": "F.linear(hidden, table.weight).logsumexp(-1).sum().backward()",
}
"""What other code does with a packed table's weight: each is measured in a process of its own."""


@dataclass
class SpeedArguments:
    rows: list[str] | None = field(default=None, metadata={"help": "Only these. Default: all."})
    repeats: int = field(default=15, metadata={"help": "Interleaved repeats of each measurement."})
    threads: int = field(default=2, metadata={"help": "Threads of PyTorch; the look-up alone takes one."})
    scale: float = field(default=1.0, metadata={"help": "Factor of vocabulary sizes: below 1 for a quick look."})
    json_out: str | None = field(default=None, metadata={"help": "Write every figure to this file."})


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
    int4 = copy.deepcopy(dense).to(torch.bfloat16)
    config = IntxWeightOnlyConfig(weight_dtype=torch.int4, granularity=PerGroup(32))
    quantize_(int4, config, filter_fn=lambda module, _: isinstance(module, nn.Embedding))
    nf4 = bitsandbytes.nn.Embedding4bit(tokens, 384)
    nf4.load_state_dict(dense.state_dict())
    nf4 = nf4.to("cpu")  # moving quantises
    tables = {"packed": packed, "torchao int4": int4, "bitsandbytes 4-bit": nf4}
    found = medians(args.repeats, 1, dense=lambda: dense(ids), **{n: partial(t, ids) for n, t in tables.items()})
    for name in tables:
        yield f"look-up of 4,096 tokens, one thread, {name}, over dense", found[name] / found["dense"], "x"


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
    gpt2 = GPT2Config(vocab_size=int(50257 * args.scale), bos_token_id=0, eos_token_id=None)
    gemma = Gemma3TextConfig(
        vocab_size=int(262144 * args.scale),
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        bos_token_id=0,
        eos_token_id=None,
    )
    ids = torch.tensor([[1, 2, 3, 4]])
    options = {"max_new_tokens": 64, "do_sample": False, "pad_token_id": 0, "attention_mask": torch.ones_like(ids)}
    for name, model, config in (("GPT-2", GPT2LMHeadModel, gpt2), ("Gemma 3 270M", Gemma3ForCausalLM, gemma)):
        dense = model(config).eval()
        packed = with_random_table(dense)
        found = medians(
            max(3, args.repeats // 5),
            args.threads,
            packed=partial(packed.generate, ids, **options),
            dense=partial(dense.generate, ids, **options),
        )
        yield f"64 new tokens of {name}'s shape, over dense", found["packed"] / found["dense"], "x"


@torch.enable_grad()
def train(args: SpeedArguments) -> Iterator[Row]:
    tokens = int(30522 * args.scale)
    counts = zipf_ids(tokens, 1 << 17).bincount(minlength=tokens)
    config = BertConfig(vocab_size=tokens, **MINILM)
    batches = [zipf_ids(tokens, 1024).view(32, 32) for _ in range(16)]

    def new_step(fraction: float | None) -> Callable[[], None]:
        model = BertForSequenceClassification(config).train()
        if fraction is not None:
            compress(model, CONFIG, counts)
        table = model.get_input_embeddings()
        optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.0, fused=True)
        turn = cycle(batches)

        def step() -> None:
            model(input_ids=next(turn), labels=torch.zeros(32, dtype=torch.int64)).loss.backward()
            if fraction is not None:
                table.step(fraction)
            optimizer.step()
            optimizer.zero_grad()

        return step

    steps = {"dense": None, "select": 0.1, "encode": 0.9}
    found = medians(args.repeats, args.threads, **{name: new_step(fraction) for name, fraction in steps.items()})
    for phase in ("select", "encode"):
        yield f"training step of MiniLM, 32 x 32 tokens, phase {phase}, over dense", found[phase] / found["dense"], "x"


def process_figures(code: str) -> list[float]:
    """What a process of its own prints at its end, and its peak memory in bytes, from Linux's /proc."""
    code += "\nprint(next(line.split()[1] for line in open('/proc/self/status') if line.startswith('VmHWM')))"
    # not getrusage, whose peak begins with that of the process that forked
    lines = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    return [*map(float, lines[:-1]), 1024 * float(lines[-1])]


def warm_start(args: SpeedArguments) -> Iterator[Row]:
    tokens = int(250_000 * args.scale)
    made = f"""
import time, torch
from torch import nn
from hf_adacomp import AdaCompConfig, AdaptiveCompressedEmbedding
torch.manual_seed(0)
torch.set_num_threads({args.threads})
table = nn.Embedding({tokens}, 768)
table.weight.data.mul_(torch.arange(1, 769) ** -0.5)
counts = (1e7 / torch.arange(1, {tokens} + 1)).long()"""
    *_, before = process_figures(made)
    seconds, after = process_figures(f"""{made}
start = time.perf_counter()
AdaptiveCompressedEmbedding.from_embedding(table, {CONFIG}, counts).pack()
print(time.perf_counter() - start)""")
    yield "warm start and packing of a table of 250,000 x 768", seconds, "s"
    yield "its peak memory, table included, over the dense table", 1 + (after - before) / (tokens * 768 * 4), "x"


def imports(args: SpeedArguments) -> Iterator[Row]:
    code = """
import sys, time
import transformers
start = time.perf_counter()
transformers.PreTrainedModel
loading = time.perf_counter()
import hf_adacomp
print(loading - start, time.perf_counter() - loading)"""
    runs = [process_figures(code)[:2] for _ in range(args.repeats // 5 or 1)]
    yield "import of what any model of transformers needs", median(run[0] for run in runs), "s"
    yield "import hf_adacomp after that", median(run[1] for run in runs), "s"


def load(args: SpeedArguments) -> Iterator[Row]:
    layer = {"hidden_size": 768, "num_hidden_layers": 1, "num_attention_heads": 12, "intermediate_size": 768}
    peaks = []
    for tokens in (1000, int(500_000 * args.scale)):
        model = with_random_table(BertModel(BertConfig(vocab_size=tokens, **layer)))
        table = model.get_input_embeddings()
        stored = sum(tensor.nbytes for tensor in table.state_dict().values())
        held = sum(tensor.nbytes for tensor in (*table.parameters(), *table.buffers()))
        with torch.no_grad():
            table.eval()(torch.arange(tokens))
        kept = table.codebook.kept_bytes + table.require_packed().kept_bytes
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            del model
            code = f"import hf_adacomp; from transformers import BertModel; BertModel.from_pretrained({folder!r})"
            peaks += process_figures(code)
    yield "tensors of a loaded table of 500,000 x 768, over its bytes in the file", held / stored, "x"
    yield "packed bytes of that table", stored / 1e6, "MB"
    yield "floats of its code-book and index of its codes that eval mode keeps", kept / 1e6, "MB"
    yield "peak memory of from_pretrained above that of a tiny table", (peaks[1] - peaks[0]) / 1e6, "MB"


def weight(args: SpeedArguments) -> Iterator[Row]:
    tokens = int(262_144 * args.scale)
    made = f"""
import sys, time, torch
from torch.nn import functional as F
sys.path.insert(0, {str(Path(__file__).parent)!r})
from random_tables import random_table
torch.set_num_threads({args.threads})
table, ids, hidden = random_table({tokens}, 640), torch.arange(4096) % {tokens}, torch.randn(16, 640)
start = time.perf_counter()"""
    *_, before = process_figures(made)
    for name, use in USES_OF_WEIGHT.items():
        seconds, peak = process_figures(f"{made}\n{use}\nprint(time.perf_counter() - start)")
        yield f"weight of a packed table of 262,144 x 640: {name}", seconds, "s"
        yield f"  its memory ({name}), over the dense table", (peak - before) / (tokens * 640 * 4), "x"


ROWS: dict[str, Callable[[SpeedArguments], Iterator[Row]]] = {
    row.__name__: row for row in (forward, lookup, head, weight, generate, train, load, warm_start, imports)
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
