"""Packaging of lomo_ds. torch is pinned here, and only here."""

from pathlib import Path

from setuptools import find_packages, setup

TORCH = "2.13.0"  # the release that `make setup` installs; every release from 2.11 on works

setup(
    name="lomo_ds",
    version="0.1.0",
    description="Full-parameter LOMO fine-tuning inside DeepSpeed ZeRO-3",
    long_description=Path(__file__).with_name("README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    packages=find_packages(include=["lomo_ds", "lomo_ds.*"]),
    package_data={"lomo_ds": ["py.typed", "ds_configs/*.json", "chat_templates/*.jinja"]},
    python_requires=">=3.11",
    install_requires=[
        "torch>=2.11",
        "deepspeed==0.19.8",  # its internals are subclassed; tests/test_deepspeed_contract.py names what is relied on
        "transformers>=5.17,<6",
        "datasets>=4.0",  # reads parquet and arrow files, and datasets on the hub
        "huggingface_hub>=1.0",
        "safetensors>=0.8",  # writes tensors from where they lie; older ones copy them first
        "sentencepiece>=0.2",
        "protobuf",
        "tensorboard>=2.18",
        "nvidia-ml-py>=12.560",  # the pynvml module
        "numpy",
        "psutil",
        "pydantic>=2",
        "pyyaml",
        "tqdm",
    ],
    extras_require={
        "bench": [
            "accelerate>=1.10",  # for transformers' own ZeRO-3 loading
            "lomo-optim==0.1.1",  # the authors' own package, to compare with
            "matplotlib",
        ],
        "dev": [
            "accelerate>=1.10",  # for transformers' Trainer
            "hypothesis",
            "mypy>=1.15",
            "pytest>=8",
            "pytest-xdist",
            "ruff>=0.11",
            "triton>=3.6; sys_platform == 'linux'",  # torch for CUDA brings its own; the kernels' tests need no GPU
            "trl>=1.16",  # the reference for tokens, labels and packing, and a trainer that lomo_ds must fit into
            "types-psutil",
            "types-PyYAML",
            "types-setuptools",
            "types-tqdm",
            "wandb",
        ],
    },
)
