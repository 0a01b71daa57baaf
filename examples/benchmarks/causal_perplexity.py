"""A pretrained language model whose head is tied to its table: perplexity, speed and memory with smaller tables.

    python examples/benchmarks/causal_perplexity.py --name gemma-3-270m --model_name_or_path gemma-3-270m \\
        --calibration_file wap.train.txt.gz --test_file wap.test.txt.gz --ratios 8 16 32

`count` and `calibrated` know the lines of the calibration file, without training; `trained` goes on to train table and
head on them for `--steps` steps. int8 (a scale a row) and int4 (a scale for 32 entries) round the tied table.
Perplexity is that of `--positions` tokens of the test file in rows of `--row_length`, each after the start token.
Tokens a second and peak memory are those of `generate`, in a process of its own that loads the saved model. Every
result goes to `cells.jsonl` at once; run it again to go on.
"""

import copy
import json
import math
import subprocess
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from cells import Cells, Key, method_version, open_cells
from comparison import parse
from methods import OWN_SIZE
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm, trange
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PrinterCallback,
    Trainer,
    TrainingArguments,
)
from variants import round_table

from hf_adacomp import AdaCompCallback, AdaCompConfig, calibrate, compress, pack, size_report
from hf_adacomp.text_files import read_texts

OURS = ("count", "calibrated", "trained")
METHODS = ("dense", "int8", "int4", *OURS)

GENERATE = """
import json, sys, time
import hf_adacomp, torch
from transformers import AutoModelForCausalLM
torch.set_num_threads(int(sys.argv[3]))
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = torch.tensor([json.loads(sys.argv[2])])
new = dict(do_sample=False, min_new_tokens=32, max_new_tokens=32)
model.generate(ids, **new)
started = time.perf_counter()
model.generate(ids, **new)
seconds = time.perf_counter() - started
status = dict(line.split(":", 1) for line in open("/proc/self/status"))  # ru_maxrss would begin at the parent's
peak = 1024 * int(status["VmHWM"].split()[0])
print(json.dumps({"tokens_a_second": 32 / seconds, "peak_bytes": peak}))
"""


@dataclass
class PerplexityArguments:
    name: str = field(metadata={"help": "What cells call the model."})
    model_name_or_path: str = field(metadata={"help": "Folder or Hub name of a causal language model."})
    calibration_file: str = field(metadata={"help": "Plain text, a paragraph or line a row, .gz too."})
    test_file: str = field(metadata={"help": "Plain text of the measure."})
    methods: list[str] = field(default_factory=lambda: [*METHODS], metadata={"help": "Rows."})
    ratios: list[float] = field(default_factory=lambda: [8.0, 16.0, 32.0], metadata={"help": "Sizes of the table."})
    positions: int = field(default=4096, metadata={"help": "Tokens of the test text that are measured."})
    row_length: int = field(default=256, metadata={"help": "Tokens in a row."})
    calibration_rows: int = field(default=2048, metadata={"help": "Rows of the calibration text."})
    measured_batches: int = field(default=64, metadata={"help": "Pairs of rows that are run to calibrate."})
    steps: int = field(default=64, metadata={"help": "Of the short training."})
    learning_rate: float = field(default=5e-5, metadata={"help": "Of the short training."})
    output_dir: str = field(default="outputs/causal_perplexity", metadata={"help": "Folder of cells.jsonl."})


def rows(file: str, tokenizer: PreTrainedTokenizerBase, length: int, most: int) -> Tensor:
    """The text of a file as rows of so many tokens, each after the start token, at most so many rows."""
    ids: list[int] = []
    start = tokenizer.bos_token_id
    for text in read_texts(Path(file)):
        ids += tokenizer(text + "\n", add_special_tokens=False)["input_ids"]
        if len(ids) >= most * (length - 1):
            break
    cut = torch.tensor(ids[: len(ids) // (length - 1) * (length - 1)]).view(-1, length - 1)[:most]
    return torch.cat([torch.full((len(cut), 1), cut[0, 0] if start is None else start), cut], dim=1)


@torch.no_grad()
def perplexity(model: PreTrainedModel, test: Tensor) -> float:
    losses = []
    model.eval()
    for row in tqdm(test, desc="Perplexity"):
        logits = model(row[None]).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, row[1:]))
    return math.exp(sum(map(float, losses)) / len(losses))


def train(model: PreTrainedModel, data: Tensor, args: PerplexityArguments) -> None:
    """Train table and head on the rows, the layers between being as they are."""
    model.requires_grad_(False)
    model.get_input_embeddings().requires_grad_(True)
    settings = TrainingArguments(
        str(Path(args.output_dir) / "scratch"),
        max_steps=args.steps,
        learning_rate=args.learning_rate,
        per_device_train_batch_size=2,
        save_strategy="no",
        report_to="none",
        use_cpu=not torch.cuda.is_available(),
    )
    dataset = [{"input_ids": row, "labels": row} for row in data]
    trainer = Trainer(model, settings, train_dataset=dataset, callbacks=[AdaCompCallback()])
    trainer.remove_callback(PrinterCallback)
    trainer.train()


def cell(dense: PreTrainedModel, data: Tensor, test: Tensor, args: PerplexityArguments, key: Key) -> dict:
    """One row: make the model, measure it, save it, measure `generate`."""
    model = copy.deepcopy(dense)
    started = time.perf_counter()
    figures: dict = {}
    if key.method in OURS:
        counts = torch.bincount(data.flatten(), minlength=model.get_input_embeddings().num_embeddings)
        config = AdaCompConfig(target_ratio=key.ratio, select_fraction=0.0)
        compress(model, config, counts if key.method == "count" else None)
        if key.method != "count":
            batches = [{"input_ids": part, "attention_mask": torch.ones_like(part)} for part in data.split(2)]
            calibrate(model, batches, measured_batches=args.measured_batches)
        if key.method == "trained":
            train(model, data, args)
        pack(model)
        size = size_report(model)
        figures = {"version": method_version(), "table_bytes": size.total_bytes, "bits_per_token": size.bits_per_token}
    elif key.method != "dense":
        figures["table_bytes"] = round_table(model, 8) if key.method == "int8" else round_table(model, 4, group=32)
    figures["seconds"] = time.perf_counter() - started
    figures["perplexity"] = perplexity(model, test)
    if key.method not in ("int8", "int4"):  # whose rounded tables are stored as floats
        folder = Path(args.output_dir) / "model"
        model.save_pretrained(folder)
        prompt, threads = json.dumps(test[0, :16].tolist()), str(torch.get_num_threads())
        command = [sys.executable, "-c", GENERATE, str(folder), prompt, threads]
        figures |= json.loads(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        figures["file_bytes"] = sum(file.stat().st_size for file in folder.glob("*.safetensors"))
    return figures


def table(cells: Cells, name: str) -> str:
    """Markdown of all rows of a model."""
    keys = sorted((key for key in cells if key.task == name), key=lambda k: (k.ratio or 0, METHODS.index(k.method)))
    lines = ["| ratio | method | table MB | file MB | perplexity | tokens/s | peak MB | seconds |", "|---" * 8 + "|"]
    for key in keys:
        found = cells[key]
        ratio = "" if key.ratio is None else f"{key.ratio:g}"
        forms = {"table_bytes": (1e6, ".1f"), "file_bytes": (1e6, ".1f"), "perplexity": (1, ".2f")}
        forms |= {"tokens_a_second": (1, ".1f"), "peak_bytes": (1e6, ".0f"), "seconds": (1, ".0f")}
        shown = [f"{found[part] / unit:{form}}" if part in found else "" for part, (unit, form) in forms.items()]
        shown = [ratio, key.method, *shown]
        lines.append(f"| {' | '.join(shown)} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> Cells:
    (args,) = parse((PerplexityArguments,), arguments)
    cells, missing = open_cells(args.output_dir, args.name, args.methods, args.ratios, METHODS, [*OWN_SIZE])
    if missing:
        tokenizer = AutoTokenizer.from_pretrained(args.model_name_or_path)
        dense = AutoModelForCausalLM.from_pretrained(args.model_name_or_path)
        data = rows(args.calibration_file, tokenizer, args.row_length, args.calibration_rows)
        test = rows(args.test_file, tokenizer, args.row_length, args.positions // (args.row_length - 1))
        for place in trange(len(missing), desc="Cells"):
            cells.add(missing[place], cell(dense, data, test, args, missing[place]))
    print(table(cells, args.name))
    return cells


if __name__ == "__main__":
    main()
