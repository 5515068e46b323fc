"""Pack SGLang for a GPU machine without a package index: two archives of less than 64 MiB each.

    python tools/checks/pack_sglang.py FOLDER          # downloads some 0.6 GB; needs the network
    python tools/checks/pack_gpu.py OTHER_FOLDER --sglang FOLDER      # then prints the commands

For Python 3.12 and torch 2.11 (CUDA 13), which must be installed, as well as torchvision and
triton.  Of the kernel package, 383 MB, only the files that sm90 (H100, H200) imports are included:
attention and sampling then use Triton and torch.  Archives are unpacked onto the servers' path, not
installed.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]
MOST_BYTES = 64 << 20
PLATFORM = (
    *("--python-version", "3.12", "--implementation", "cp", "--abi", "cp312", "--abi", "abi3"),
    *(
        "--abi",
        "none",
        "--platform",
        "manylinux_2_34_x86_64",
        "--platform",
        "manylinux_2_28_x86_64",
    ),
    *("--platform", "manylinux_2_24_x86_64", "--platform", "manylinux_2_17_x86_64"),
    *("--platform", "manylinux2014_x86_64", "--only-binary", ":all:", "--no-deps"),
)
PARTS = (
    """
    sglang==0.5.17 flashinfer-python==0.6.15.post1 transformers==5.12.1 tokenizers==0.22.2
    apache-tvm-ffi==0.1.11 xgrammar==0.2.7
    """,
    """
    sglang-kernel==0.4.5 aiohappyeyeballs aiohttp aiosignal annotated-doc annotated-types anyio
    asttokens attrs certifi cffi charset-normalizer click compressed-tensors decorator dill distro
    einops executing fastapi frozenlist gguf h11 httpcore httpx idna interegular ipython
    ipython-pygments-lexers jedi jiter jsonschema jsonschema-specifications loguru
    matplotlib-inline msgspec multidict openai==2.6.1 openai-harmony==0.0.4 orjson parso
    partial-json-parser pexpect prometheus-client prompt-toolkit propcache ptyprocess pure-eval
    pybase64 pycparser pydantic pydantic-core python-multipart pyzmq referencing regex requests
    rpds-py sentencepiece setproctitle sniffio soundfile stack-data starlette tiktoken
    torch-memory-saver traitlets typing-inspection urllib3 uvicorn uvloop watchfiles wcwidth xxhash
    yarl zstandard
    """,
)
LEFT_OUT = ("/flash_ops", "/sm100/", "/infllm_ops", "/flashmla_ops", "sglang/srt/server")


def main() -> int:
    """Download, strip, pack; print the sizes."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("folder", type=Path)
    folder = parser.parse_args().folder
    folder.mkdir(parents=True, exist_ok=True)
    archives = [folder / f"sglang_{n}.zip" for n, _ in enumerate(PARTS, 1)]
    for archive in archives:
        if archive.exists():
            parser.error(f"{archive} exists; choose another folder, or move it away")
    sizes = [pack(names.split(), path) for names, path in zip(PARTS, archives, strict=True)]
    return int(max(sizes) > MOST_BYTES)


def pack(names: list[str], archive: Path) -> int:
    """Write the wheels' files to one archive; returns its bytes."""
    with tempfile.TemporaryDirectory() as scratch:
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--dest", scratch]
        constraints = ["--constraint", str(REPOSITORY / "sglang_cpu.txt")]
        subprocess.run([*command, *PLATFORM, *constraints, *names], check=True)
        with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as out:
            for wheel in sorted(Path(scratch).glob("*.whl")):
                before = out.fp.tell()
                copy(wheel, out)
                print(f"{wheel.name}: {(out.fp.tell() - before) / 1e6:.1f} MB")
    size = archive.stat().st_size
    verdict = "" if size <= MOST_BYTES else ": too large"
    print(f"{archive}: {size / (1 << 20):.1f} MiB of {MOST_BYTES >> 20}{verdict}")
    return size


def copy(wheel: Path, out: zipfile.ZipFile) -> None:
    """Copy the files of a wheel that are needed to an archive."""
    with zipfile.ZipFile(wheel) as files:
        for name in files.namelist():
            if not any(part in name for part in LEFT_OUT):
                out.writestr(name, files.read(name))


if __name__ == "__main__":
    sys.exit(main())
