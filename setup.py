"""Packaging.  `kernels/` is installed as `engine.kernels` only: a top-level `kernels` would shadow Hugging Face's."""

from pathlib import Path

from setuptools import find_packages, setup

HERE = Path(__file__).parent

EXTRAS = {
    "hf": ["tokenizers", "transformers>=4.51", "huggingface_hub"], # HF tokenizers; parity, conversion checks; its Hub
    "megatron": ["megatron-core>=0.16"],                           # reading and writing its checkpoints
    "data": ["pyarrow", "zstandard", "rensa", "fsspec[http]"],     # parquet, .zst, near-duplicate search, addresses
    "fast": ["gigatoken"],                                         # encodes corpora several times faster, same ids
    "viz": ["tensorboard", "wandb"],                               # where metrics also go
    "completion": ["shtab"],                                       # octant completion bash
    "dev": ["pytest", "pytest-timeout", "hypothesis", "ruff", "mypy", "setuptools", "tensorboard", "types-PyYAML",
            "shtab", "jsonschema"],
}

setup(
    name="octant",
    version="0.1.0",
    description="A 3D-parallel training engine for Llama-family language models",
    long_description=(HERE / "README.md").read_text(encoding="utf-8") if (HERE / "README.md").exists() else "",
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    python_requires=">=3.11",
    packages=[*find_packages(include=["engine", "engine.*", "checkpoints_tools", "checkpoints_tools.*",
                                      "corpus_tools", "corpus_tools.*"])],
    package_dir={"engine.kernels": "kernels"},
    package_data={"engine.config": ["presets/*.yaml"], "corpus_tools.cleaning": ["rules.yaml"]},
    install_requires=["torch>=2.11", "numpy", "sentencepiece", "safetensors", "rich", "PyYAML", "pydantic>=2.10"],
    extras_require=EXTRAS,
    entry_points={"console_scripts": ["octant=engine.cli:main"]},
)
