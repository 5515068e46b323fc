"""What is carried to a GPU machine: verl's kernel alone, sizes, and the commands to run there."""

import shutil
import subprocess
import sys
import zipfile

import pytest

from megatron_prepo.errors import UserError
from tools.checks import gpu_parts, pack_gpu


def test_only_the_kernel_of_verl_is_carried(tmp_path):
    with zipfile.ZipFile(tmp_path / "verl.whl", "w") as wheel:
        for name in ("verl/__init__.py", "verl/utils/kernel/kernels.py", "verl/utils/kernel/a.md"):
            wheel.writestr(name, "x = 1\n")
    (tmp_path / "kernel").mkdir()
    pack_gpu.copy_kernel(tmp_path / "verl.whl", tmp_path / "kernel")
    assert [path.name for path in (tmp_path / "kernel").iterdir()] == ["kernels.py"]
    assert pack_gpu.size(tmp_path / "kernel") == 6


def test_commands_and_what_each_carries(tmp_path, monkeypatch, capsys):
    folder, archives = tmp_path / "packed", tmp_path / "archives"
    archives.mkdir()
    for number in (1, 2):
        (archives / f"sglang_{number}.zip").write_bytes(b"x" * (number << 20))

    def download(folder):
        (folder / "wheels").mkdir(parents=True)
        (folder / "wheels" / "a.whl").write_bytes(b"x" * (6 << 20))

    monkeypatch.setattr(pack_gpu, "download", download)
    words = ["pack_gpu.py", str(folder), "--sglang", str(archives)]
    monkeypatch.setattr(sys, "argv", words)
    assert pack_gpu.main() == 0
    printed = capsys.readouterr().out
    first, second = archives / "sglang_1.zip", archives / "sglang_2.zip"
    assert f"command 1 carries 7.0 MiB of 64: {folder} {first}" in printed
    assert f"command 2 carries 2.0 MiB of 64: {second}" in printed
    assert "pip install -q --no-index --no-deps" in printed
    assert f"cp -r {folder}/. {pack_gpu.THERE}/ && cp -r {first} {pack_gpu.THERE}/" in printed
    assert f"--parts sglang --sglang {pack_gpu.THERE} --budget 240" in printed
    assert pack_gpu.main() == 2
    assert "packed exists; choose another folder" in capsys.readouterr().err
    monkeypatch.setattr(pack_gpu, "MOST_BYTES", 1 << 20)
    words[1] = str(tmp_path / "other")
    assert pack_gpu.main() == 1


def test_an_archive_that_is_missing_is_named_before_anything_is_downloaded(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(pack_gpu, "download", None)
    (tmp_path / "sglang_1.zip").touch()
    words = ["pack_gpu.py", str(tmp_path / "packed"), "--sglang", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", words)
    assert pack_gpu.main() == 2
    assert "no sglang_2.zip" in capsys.readouterr().err
    assert not (tmp_path / "packed").exists()


@pytest.fixture
def real(tmp_path, monkeypatch):
    """Pack a stand-in of 5 bytes for the real model; return the printed commands' folder."""
    made = tmp_path / "made"
    for name in ("model", "prompts"):
        (made / name).mkdir(parents=True)
    (made / "model" / pack_gpu.GGUF).write_bytes(b"abcde")
    for name in pack_gpu.PROMPTS:
        (made / "prompts" / name).write_text(f"{name}\n")

    def download_wheels(packages, folder):
        folder.mkdir(parents=True)
        (folder / "a.whl").write_text(" ".join(packages))

    monkeypatch.setattr(pack_gpu, "download", lambda folder: folder.mkdir(parents=True))
    monkeypatch.setattr(pack_gpu, "download_wheels", download_wheels)
    monkeypatch.setattr(pack_gpu, "THERE", str(tmp_path / "there"))
    words = ["pack_gpu.py", str(tmp_path / "packed"), "--real", str(made)]
    monkeypatch.setattr(sys, "argv", words)
    return tmp_path


def carry(command: str) -> None:
    """Run what a printed command does before it installs and measures."""
    copy = command.partition(" && python3")[0]
    subprocess.run(["sh", "-c", copy], check=True)


def test_a_real_model_is_carried_in_halves_and_joined(real, capsys):
    assert pack_gpu.main() == 0
    printed = capsys.readouterr().out
    first, second = (real / f"packed_real_{n}" for n in (1, 2))
    assert f"command 2 carries 0.0 MiB of 64: {first}" in printed
    assert f"command 3 carries 0.0 MiB of 64: {second}" in printed
    there = real / "there" / "real"
    one, two = pack_gpu.real_commands(first, second)
    assert one in printed and two in printed
    assert two.endswith(f"--parts real --real {there} --budget 240")
    carry(one)
    with pytest.raises(UserError, match=r"has no model\.sha256: run both commands"):
        gpu_parts.join(there, real / "joined")
    carry(two)
    file = gpu_parts.join(there, real / "joined")
    assert (file.name, file.read_bytes()) == (pack_gpu.GGUF, b"abcde")
    for name in pack_gpu.PROMPTS:
        assert (there / name).read_text() == f"{name}\n"
    assert (there / "wheels" / "a.whl").is_file()
    assert pack_gpu.main() == 2, "the folders exist"
    shutil.copyfile(there / "model.2", there / "model.1")
    with pytest.raises(UserError, match="the halves do not make"):
        gpu_parts.join(there, real / "again")


def test_a_real_run_that_is_not_there_is_named_before_anything_is_downloaded(real, capsys):
    (real / "made" / "prompts" / "train.jsonl").unlink()
    assert pack_gpu.main() == 2
    assert "train.jsonl; `make real` writes it" in capsys.readouterr().err
    assert not (real / "packed").exists()
