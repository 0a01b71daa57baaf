"""What each setting is worth: learned lengths at one size with one setting changed at a time.

    python examples/benchmarks/ablation.py --data_dir data --tasks trec --seeds 0 --ratios 80

Takes the options of `accuracy.py`, starts from the same dense models, and writes cells of its own.
"""

import sys
from pathlib import Path

import accuracy

VARIANTS = (
    "learned",
    "learned:select_fraction=0",
    "learned:significance=false",
    "learned:select_fraction=0;significance=false",
    "learned:select_fraction=0.5",
    "learned:select_fraction=0.75",
    "learned:code_lengths=[16, 384]",
    "learned:code_lengths=[8, 64, 384]",
    "learned:code_lengths=[8, 32, 128, 384]",
    "learned:code_lengths=[8, 24, 64, 160, 384]",
    "learned:codebook_dtype=int8",
    "learned:tied=false",
    "learned:orthogonality_weight=0",
    "learned:reconstruction_weight=0",
    "learned:anneal=linear",
    "learned:anneal=cosine",
    "learned:temperature_start=0.3",
    "learned:temperature_end=1.0",
    "learned:selection_reach=2",
    "learned:selection_reach=32",
)
"""The defaults, and one or two changes to them."""


def main(arguments: list[str] | None = None) -> dict:
    given = sys.argv[1:] if arguments is None else arguments
    folder = str(Path(__file__).with_name("ablation_results"))
    return accuracy.main(["--output_dir", folder, "--ratios", "80", "--methods", *VARIANTS, *given])


if __name__ == "__main__":
    main()
