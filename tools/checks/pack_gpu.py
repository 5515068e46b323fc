"""Collect what gpu_check.py needs on a machine without a package index, and print its commands.

    python tools/checks/pack_gpu.py FOLDER [--sglang FOLDER] [--real DIR]      # needs the network

FOLDER is new, inside the repository, so that it is copied to the machine with it; `--sglang` names
archives of pack_sglang.py in such a folder.  `--real` names the directory of a `make real`: its
model is larger than a command may carry, so two commands carry a half each, FOLDER_real_1 and
FOLDER_real_2.  For a machine with Python 3.12, torch 2.11, triton and transformers, the packages
that these require, and those of BROUGHT_BY_THE_MACHINE.  What a command carries must be at most
64 MiB, which the sizes show.
"""

import argparse
import hashlib
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

from examples.real.run import GGUF
from megatron_prepo.errors import UserError
from megatron_prepo.files.existing import existing
from megatron_prepo.process.command import in_one_line
from tools.checks.gpu_parts import CHECKSUM, HALVES
from tools.checks.pack_sglang import MOST_BYTES, PLATFORM

PACKAGES = (
    *("megatron-core==0.19.2", "math-verify==0.9.0", "latex2sympy2-extended==1.11.0"),
    *("antlr4-python3-runtime==4.13.2", "pydantic==2.14.4", "pydantic-core==2.50.5"),
    *("annotated-types==0.8.0", "typing-inspection==0.4.5", "ruamel.yaml==0.19.1"),
    "liger-kernel==0.8.5",
)
"""The rehearsal in tests/e2e/test_gpu_rehearsal.py shows that these are enough."""
BROUGHT_BY_THE_MACHINE = (
    *("httpx", "hypothesis", "matplotlib", "numpy", "packaging", "psutil", "pytest"),
    *("safetensors", "scipy", "sympy", "tqdm"),
)
REAL_PACKAGES = ("gguf==0.19.0", "accelerate==1.15.0")
"""What transformers reads the real model's file with."""
PROMPTS = ("train.jsonl", "held_out.jsonl")
VERL, VERL_KERNEL = "verl==0.9.1", "verl/utils/kernel/"
"""verl's wheel, of which the kernel's files are carried."""
THERE = "/tmp/gpu"
"""Folder on the machine to which commands copy what they carry, since only it outlives them."""
INSTALL = (
    f"python3 -m pip install -q --no-index --no-deps --no-compile --no-cache-dir "
    f"--target {THERE}/site {THERE}/wheels/*.whl"
)
CHECK = f"PYTHONPATH={THERE}/site python3 tools/checks/gpu_check.py"


@in_one_line
def main() -> int:
    """Download, and print sizes and commands."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    parser.add_argument("--sglang", type=existing(), help="folder with archives of pack_sglang.py")
    parser.add_argument("--real", type=existing(), help="directory of `make real`")
    options = parser.parse_args()
    folders = [options.folder, *real_folders(options.folder)]
    if exists := [folder for folder in folders if folder.exists()]:
        raise UserError(f"{exists[0]} exists; choose another folder, or move it away")
    archives = sglang_archives(options.sglang) if options.sglang else []
    files = real_files(options.real) if options.real else []
    download(options.folder)
    carried = [[options.folder, *archives[:1]], archives[1:]]
    packed = list(zip(commands(*carried), carried, strict=True))[: 1 + bool(archives)]
    if files:
        split(files, *folders[1:])
        packed += zip(
            real_commands(*folders[1:]), ([folder] for folder in folders[1:]), strict=True
        )
    sizes = [sum(map(size, paths)) for _, paths in packed]
    for number, ((command, paths), bytes_) in enumerate(zip(packed, sizes, strict=True), 1):
        print(
            f"\ncommand {number} carries {bytes_ / (1 << 20):.1f} MiB of {MOST_BYTES >> 20}: ",
            end="",
        )
        print(f"{' '.join(map(str, paths))}\n\n{command}")
    return int(max(sizes) > MOST_BYTES)


def download(folder: Path) -> None:
    """Write the wheels and verl's kernel."""
    kernel = folder / "verl"
    kernel.mkdir(parents=True)
    download_wheels(PACKAGES, folder / "wheels")
    for wheel in sorted((folder / "wheels").iterdir()):
        print(f"{wheel.name}: {size(wheel) / 1e6:.2f} MB")
    with tempfile.TemporaryDirectory() as scratch:
        download_wheels((VERL,), Path(scratch))
        (wheel,) = Path(scratch).iterdir()
        copy_kernel(wheel, kernel)
    print(f"verl's kernel: {size(kernel) / 1e6:.2f} MB")


def download_wheels(packages: tuple[str, ...], folder: Path) -> None:
    """Download the machine's wheels of packages."""
    command = [sys.executable, "-m", "pip", "download", "--quiet", *PLATFORM, "--dest"]
    subprocess.run([*command, str(folder), *packages], check=True)


def copy_kernel(wheel: Path, folder: Path) -> None:
    """Copy the files of verl's kernel out of its wheel."""
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            if name.startswith(VERL_KERNEL) and name.endswith(".py"):
                (folder / Path(name).name).write_bytes(files.read(name))


def size(path: Path) -> int:
    """Return the bytes of a file, or of all files below a folder."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.stat().st_size for file in files)


def sglang_archives(folder: Path) -> list[Path]:
    """Return the two archives of pack_sglang.py, one for each command."""
    archives = [folder / f"sglang_{number}.zip" for number in (1, 2)]
    if absent := [archive for archive in archives if not archive.is_file()]:
        raise UserError(f"--sglang {folder}: no {absent[0].name}; make it by pack_sglang.py")
    return archives


def real_folders(folder: Path) -> list[Path]:
    """Return the folders that carry a real model, next to that of the first command."""
    return [folder.with_name(f"{folder.name}_real_{number}") for number in (1, 2)]


def real_files(directory: Path) -> list[Path]:
    """Return the model's file and its prompts, of a `make real`; UserError without them."""
    files = [directory / "model" / GGUF, *(directory / "prompts" / name for name in PROMPTS)]
    if absent := [file for file in files if not file.is_file()]:
        raise UserError(f"--real {directory}: no {absent[0]}; `make real` writes it")
    return files


def split(files: list[Path], first: Path, second: Path) -> None:
    """Write one half of the model's file to each folder, and everything else to the second."""
    model, *prompts = files
    content = model.read_bytes()
    middle = len(content) // 2
    for folder, name, half in zip(
        (first, second), HALVES, (content[:middle], content[middle:]), strict=True
    ):
        folder.mkdir(parents=True)
        (folder / name).write_bytes(half)
    (second / CHECKSUM).write_text(f"{hashlib.sha256(content).hexdigest()} {model.name}\n")
    for prompt in prompts:
        shutil.copyfile(prompt, second / prompt.name)
    download_wheels(REAL_PACKAGES, second / "wheels")


def real_commands(first: Path, second: Path) -> tuple[str, str]:
    """Return the commands that carry a half each; the second trains the model."""
    there = f"{THERE}/real"
    begin, again = (f"mkdir -p {there} && cp -r {path}/. {there}/" for path in (first, second))
    install = INSTALL.replace("/wheels/", "/real/wheels/")
    return (
        begin,
        f'{again} && {install} && {CHECK} --out "$OUT" --parts real --real {there} --budget 240',
    )


def commands(first: list[Path], second: list[Path]) -> tuple[str, str]:
    """Return the commands to run in the repository on the machine: all parts, then SGLang's."""
    copies = [f"cp -r {path}{'/.' if path.is_dir() else ''} {THERE}/" for path in first]
    begin = " && ".join([f"mkdir -p {THERE}", *copies, INSTALL])
    again = " && ".join(f"cp {path} {THERE}/" for path in second)
    return (
        f'{begin} && {CHECK} --out "$OUT" --verl {THERE}/verl --budget 540',
        f'{again} && {CHECK} --out "$OUT" --parts sglang --sglang {THERE} --budget 240',
    )


if __name__ == "__main__":
    sys.exit(main())
