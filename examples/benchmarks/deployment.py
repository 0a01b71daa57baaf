"""A sentence encoder on a device: bytes to download, peak memory, time of a query and accuracy of ONNX files.

    python examples/benchmarks/deployment.py --name MiniLM --model_name_or_path all-MiniLM-L6-v2 --data_dir stsb_multi
    python examples/benchmarks/deployment.py --name e5-small --model_name_or_path multilingual-e5-small \\
        --prompt "query: " --data_dir stsb_multi --languages de en fr ja ru zh

The dense model is exported in float32 and, as it is published mostly, in int8 by ONNX Runtime's quantizer, its table
included; ours at `--ratio` with linear layers in float, int8 and int4, the table calibrated on the training sentences
of `--languages`. Peak memory is that of a fresh process that loads the file and answers one query of 16 tokens: in ONNX
Runtime, and in node through transformers.js with its tokenizer (`npm install --ignore-scripts` in examples/browser).
Times are of that query in one thread, all files in turn. Spearman is of the test pairs of `--test_language`, computed
by the files. Every result goes to `cells.jsonl` at once; run it again to go on. Models and files go to `--models_dir`.
"""

import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch
from cells import Cells, Key, method_version, open_cells
from comparison import parse
from one_query import embed, session
from sentence_similarity import SimilarityArguments, load_model, read_rows, scores, training_texts, vectors
from sentence_transformers import SentenceTransformer
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase, set_seed

from hf_adacomp import AdaCompConfig, calibrate, compress, pack
from hf_adacomp.export.graph import Graph
from hf_adacomp.export.onnx_file import NAMES, quantized, write_graph
from hf_adacomp.integration.sentence import tokenizer_of
from hf_adacomp.saved_models import load_model as load_packed

FORMS = {
    "dense": (None, "dense, float32"),
    "dense:int8": ("int8", "dense, int8"),
    "calibrated:float": (None, "ours, float32 layers"),
    "calibrated:int8": ("int8", "ours, int8 layers"),
    "calibrated:int4": ("int4", "ours, int4 layers"),
}
"""How layers are stored, and what the table calls it."""

DENSE, OURS = [*FORMS][:2], [*FORMS][2:]
TIMES = "times"
"""What the cell with the times of all forms is called in place of a method: they were taken together."""

DTYPES = {None: "fp32", "int8": "q8", "int4": "q4"}
"""Names of transformers.js."""

BROWSER = Path(__file__).resolve().parents[1] / "browser"
TOKENS = 16
BATCH = 32
PROCESSES = 3
"""Whose median is the peak memory."""


@dataclass
class DeploymentArguments:
    data_dir: str = field(metadata={"help": "Folder of stsb-LANGUAGE-SPLIT.csv.gz."})
    name: str = field(metadata={"help": "What cells call the model."})
    model_name_or_path: str = field(metadata={"help": "An encoder, pooled by the mean."})
    prompt: str = field(default="", metadata={"help": "What the encoder wants before every text."})
    languages: list[str] = field(default_factory=lambda: ["en"], metadata={"help": "Of the training sentences."})
    test_language: str = field(default="en", metadata={"help": "Of the test."})
    ratio: float = field(default=40.0, metadata={"help": "How much smaller the table gets."})
    train_rows: int = field(default=1500, metadata={"help": "Pairs of sentences of each language."})
    test_rows: int | None = field(default=None, metadata={"help": "For a quick look."})
    repeats: int = field(default=200, metadata={"help": "Of the query, for its time."})
    output_dir: str = field(default="outputs/deployment", metadata={"help": "Folder of cells.jsonl."})
    models_dir: str = field(default="outputs/deployment", metadata={"help": "Folder of the packed model and files."})

    def similarity(self, *languages: str) -> SimilarityArguments:
        """Those of `sentence_similarity.py` for these languages."""
        shared = ("data_dir", "name", "model_name_or_path", "prompt", "train_rows", "test_rows")
        return SimilarityArguments(**{name: getattr(self, name) for name in shared}, languages=[*languages])


class OnnxEncoder:
    """A file that embeds texts, as `SentenceTransformer` does: sorted by length, in batches."""

    def __init__(self, file: Path, tokenizer: PreTrainedTokenizerBase, prompt: str) -> None:
        self.running, self.tokenizer, self.prompt = session(file), tokenizer, prompt

    def encode(self, texts: Iterable[str], convert_to_tensor: bool = True) -> Tensor:
        """Vectors, (N, d)."""
        ids = self.tokenizer([self.prompt + text for text in texts], truncation=True)["input_ids"]
        order = torch.tensor([len(found) for found in ids]).argsort(descending=True, stable=True)
        found = []
        for batch in order.split(BATCH):
            padded = self.tokenizer.pad({"input_ids": [ids[i] for i in batch.tolist()]})
            found.append(torch.from_numpy(embed(self.running, padded["input_ids"], padded["attention_mask"])))
        return torch.cat(found)[order.argsort()]


def packed_model(args: DeploymentArguments, models: Path) -> SentenceTransformer:
    """Ours, kept for the next time."""
    folder = models / f"packed-{args.ratio:g}-{method_version()}"
    if not folder.exists():
        model = load_model(args.similarity())
        set_seed(0)
        compress(model, AdaCompConfig(target_ratio=args.ratio))
        calibrate(model, training_texts(args.similarity(*args.languages)))
        pack(model).save_pretrained(str(folder))
    return load_packed(str(folder))


def write_forms(model: SentenceTransformer, forms: Iterable[str], folder: Path) -> dict[str, Path]:
    """Files of these forms of a model, the float one first: `FOLDER/FORM/onnx/FILE`, laid out as by `export_onnx`."""
    graph, files = Graph(model), {}
    for form in forms:
        quantize, _ = FORMS[form]
        own = folder / form.replace(":", "-")
        files[form] = file = own / "onnx" / NAMES[quantize]
        file.parent.mkdir(parents=True, exist_ok=True)
        if quantize is None:
            packed, plain = write_graph(graph, file), file
        else:
            os.replace(quantized(plain, quantize, packed), file)
        graph.inner.config.save_pretrained(own)
        tokenizer_of(model).save_pretrained(own)
    return files


def why_without_node() -> str | None:
    """What the measure in node lacks, if anything."""
    if shutil.which("node") is None:
        return "node is not installed"
    if not (BROWSER / "node_modules" / "@huggingface" / "transformers").exists():
        return "transformers.js is not there: npm install --ignore-scripts in examples/browser"
    return None


def peak(command: list[str | Path]) -> float:
    """Median of what processes print."""
    runs = [subprocess.run([*map(str, command)], capture_output=True, text=True, check=True) for _ in range(PROCESSES)]
    return median(int(run.stdout) for run in runs)


def measure(form: str, file: Path, text: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, float]:
    """Bytes of a form, and of the processes that answer the query `text` with it."""
    figures: dict[str, float] = {"bytes": file.stat().st_size}
    ids = [*map(str, tokenizer(text)["input_ids"])]
    figures["peak_onnxruntime"] = peak([sys.executable, Path(__file__).with_name("one_query.py"), file, *ids])
    if why_without_node() is None:
        folder, dtype = file.parents[1].resolve(), DTYPES[FORMS[form][0]]
        figures["peak_node"] = peak(["node", BROWSER / "memory.mjs", folder, dtype, text])
    return figures


def milliseconds(files: dict[str, Path], ids: list[int], repeats: int) -> dict[str, float]:
    """Median time of a query by form; they take turns, so that whatever else the machine does slows all alike."""
    sessions = {form: session(file) for form, file in files.items()}
    taken: dict[str, list[float]] = {form: [] for form in files}
    for _ in range(repeats + 1):
        for form, running in sessions.items():
            started = time.perf_counter()
            embed(running, [ids], [[1] * len(ids)])
            taken[form].append(1000 * (time.perf_counter() - started))
    return {form: median(times[1:]) for form, times in taken.items()}  # the first one warms up


def key_of(form: str, args: DeploymentArguments) -> Key:
    return Key(args.name, form, None if form in DENSE else args.ratio, 0)


def table(cells: Cells, args: DeploymentArguments) -> str:
    """Markdown, a row a form."""
    found = {form: cells[key_of(form, args)] for form in FORMS}
    times = cells[key_of(TIMES, args)]["milliseconds"]
    with_node = all("peak_node" in cell for cell in found.values())
    node = " peak MB, node |" if with_node else ""
    lines = [f"| form | MB | peak MB, ONNX Runtime |{node} ms a query | Spearman |", "|---" * (5 + with_node) + "|"]
    for form, cell in found.items():
        peaks = ["peak_onnxruntime", *(["peak_node"] if with_node else [])]
        shown = [f"{cell['bytes'] / 1e6:.2f}", *(f"{cell[name] / 1e6:.0f}" for name in peaks), f"{times[form]:.2f}"]
        similarity = cell["similarity"][args.test_language]
        lines.append(f"| {FORMS[form][1]} | {' | '.join(shown)} | {similarity:.2f} |")
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> Cells:
    (args,) = parse((DeploymentArguments,), arguments)
    cells, missing = open_cells(args.output_dir, args.name, [*FORMS], [args.ratio], [*FORMS], DENSE)
    if missing or key_of(TIMES, args) not in cells:
        cells.refuse_mixture(method_version())
        dense, test = load_model(args.similarity()), args.similarity(args.test_language)
        tokenizer, folder = tokenizer_of(dense), Path(args.models_dir) / args.name
        files = {**write_forms(dense, DENSE, folder), **write_forms(packed_model(args, folder), OURS, folder)}
        texts = [args.prompt + row[0] for row in read_rows(test, args.test_language, "test")[: args.test_rows]]
        query = min(texts, key=lambda text: abs(len(tokenizer(text)["input_ids"]) - TOKENS))
        wanted = vectors(OnnxEncoder(files["dense"], tokenizer, args.prompt), test)
        for key in tqdm(missing, desc="Cells"):
            file = files[key.method]
            figures = measure(key.method, file, query, tokenizer)
            found = vectors(OnnxEncoder(file, tokenizer, args.prompt), test)
            version = {} if key.method in DENSE else {"version": method_version()}
            cells.add(key, {**version, **figures, **scores(found, wanted, test)})
        ids = tokenizer(query)["input_ids"]
        times = milliseconds(files, ids, args.repeats)
        cells.add(key_of(TIMES, args), {"tokens": len(ids), "milliseconds": times})
    print(table(cells, args))
    if reason := why_without_node():
        print(f"\nPeak memory in node was not measured: {reason}.")
    return cells


if __name__ == "__main__":
    main()
