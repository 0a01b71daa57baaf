"""Whether the method as it is now makes stored cells anew, answer for answer; its results then stand for both versions.

    python examples/benchmarks/remake.py --data_dir data --tasks sst2_vectors ud_vectors --methods learned count \
        --ratios 200 --seeds 0 --output_dir examples/benchmarks/word_vector_results

Any change of the method's code is another version, and stored cells count for one version alone. But code also changes
to be shorter, faster or smaller. This trains the chosen cells again, from the same dense models (`--model_dir`), and
compares sizes, log-losses and which answers are right. If all are equal, `versions.json` says from then on that the
version of now goes by the name of the stored one, and by which cells that was shown. Equal to the last digit they are
on one machine only. Elsewhere, let the code of before make them first, in a worktree of its commit (`accuracy.py` with
another `--output_dir` and the same `--model_dir`), and compare with those.
"""

import json
from pathlib import Path

from accuracy import BenchmarkArguments, keys, make_cells
from cells import VERSIONS, Cells, Key, code_version
from comparison import parse
from methods import OURS, base
from tasks import read_tasks

RESULTS = ("ratio", "validation", "test", "label_information")


def differences(key: Key, found: dict, stored: dict) -> list[str]:
    """What a cell has otherwise when it is made now, in words."""
    return [
        f"{' '.join(map(str, key))}: {name} is {found.get(name)}, stored is {stored.get(name)}"
        for name in RESULTS
        if found.get(name) != stored.get(name)
    ]


def main(arguments: list[str] | None = None) -> list[str]:
    (args,) = parse((BenchmarkArguments,), arguments)
    now = code_version()
    tasks = read_tasks(Path(args.tasks_file), Path(args.data_dir))
    cells = Cells(Path(args.output_dir) / "cells.jsonl")
    chosen = [key for key in keys(args, tasks) if key in cells and base(key.method) in OURS]
    if not chosen:
        raise ValueError(f"{cells.file} has no cell of {', '.join(OURS)} among those asked for: nothing to compare")
    found = []
    for key, cell in make_cells(chosen, tasks, args):
        found += differences(key, cell, cells[key])
    (version,) = {cells[key]["version"] for key in chosen}
    print("\n".join(found) or f"{now} makes {len(chosen)} cells of {version} anew, answer for answer")
    if not found and now != version:
        known = json.loads(VERSIONS.read_text(encoding="utf-8"))
        shown = known.setdefault(now, {"same_as": version, "shown_by": []})["shown_by"]
        shown += [name for key in chosen if (name := " ".join(map(str, key))) not in shown]
        VERSIONS.write_text(json.dumps(known, indent=2) + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    main()
