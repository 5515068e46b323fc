"""Our safetensors files are the library's, both ways, and damage is named."""

import json
import os
import threading

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from megatron_prepo.errors import UserError
from megatron_prepo.files import ownership
from megatron_prepo.models import hf_files
from megatron_prepo.models.hf_files import INDEX, HFTensors, HFWriter, carry_over


def random_tensor(shape, dtype, seed=0):
    """Return any bit pattern, NaNs among them; True or False for bool."""
    count = torch.empty(shape, dtype=dtype, device="meta").nbytes
    generator = torch.Generator().manual_seed(seed)
    highest = 2 if dtype is torch.bool else 256
    flat = torch.randint(0, highest, (count,), dtype=torch.uint8, generator=generator)
    return flat.view(dtype).reshape(shape)


def bits(tensor):
    assert tensor.is_contiguous()
    return tensor.dtype, tuple(tensor.shape), tensor.reshape(-1).view(torch.uint8).tolist()


@pytest.fixture
def tensors():
    """Tensors of every type and every awkward shape."""
    by_dtype = {
        f"type.{name}": random_tensor((3, 5), dtype, seed=len(name))
        for name, dtype in hf_files.DTYPES.items()
    }
    return by_dtype | {
        "scalar": random_tensor((), torch.bfloat16, 1),
        "empty": torch.empty(0),
        "no columns": torch.empty(4, 0, dtype=torch.bfloat16),
        "cube": random_tensor((2, 3, 4), torch.float32, 2),
    }


@pytest.fixture
def config(tmp_path):
    """Directory with the files that are not weights, and weights that are not to be copied."""
    directory = tmp_path / "config"
    directory.mkdir()
    (directory / "config.json").write_text('{"model_type": "llama"}')
    (directory / "tokenizer.json").write_bytes(b"\x00tokenizer")
    for name in ("model.safetensors", INDEX, "pytorch_model.bin", "pytorch_model.bin.index.json"):
        (directory / name).write_text("not to be copied")
    (directory / "original").mkdir()
    return directory


def tensor_shapes(tensors):
    return {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in tensors.items()}


def two_files(directory):
    """Return the index of a directory of two files."""
    directory.mkdir(exist_ok=True)
    save_file({"a": torch.arange(4.0)}, directory / "one.safetensors")
    save_file({"b": torch.arange(6.0)}, directory / "two.safetensors")
    index = {"metadata": {}, "weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}
    (directory / INDEX).write_text(json.dumps(index))
    return index


# Reading and writing


def test_reads_what_safetensors_wrote(tmp_path, tensors):
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with HFTensors(tmp_path) as read:
        assert read.names() == tensors.keys()
        for name, tensor in tensors.items():
            assert bits(read[name]) == bits(tensor), name


def test_reads_several_files(tmp_path, tensors):
    names = sorted(tensors)
    save_file({n: tensors[n] for n in names[:4]}, tmp_path / "x-1.safetensors")
    save_file({n: tensors[n] for n in names[4:]}, tmp_path / "x-2.safetensors")
    weight_map = {n: f"x-{1 + (i >= 4)}.safetensors" for i, n in enumerate(names)}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": weight_map}))
    with HFTensors(tmp_path) as read:
        assert {n: bits(read[n]) for n in read.names()} == {n: bits(tensors[n]) for n in names}


@pytest.mark.parametrize("shard_bytes", [1, 100, 1 << 30])
def test_safetensors_reads_what_was_written(tmp_path, tensors, config, shard_bytes):
    """Tensors are in one file or several, and written in any order; our own reader agrees."""
    out = tmp_path / "out"
    writer = HFWriter(out, tensor_shapes(tensors), like=config, shard_bytes=shard_bytes)
    for name in reversed(tensors):
        writer.write(name, tensors[name])
    writer.finish()

    found = {}
    for file in out.glob("*.safetensors"):
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            for name in opened.keys():  # noqa: SIM118 - not a mapping
                found[name] = (file.name, bits(opened.get_tensor(name)))
    assert {n: b for n, (_, b) in found.items()} == {n: bits(t) for n, t in tensors.items()}
    if shard_bytes == 1 << 30:
        assert {file for file, _ in found.values()} == {"model.safetensors"}
        assert not (out / INDEX).exists()
    else:
        index = json.loads((out / INDEX).read_text())
        assert index["weight_map"] == {n: file for n, (file, _) in found.items()}
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in tensors.values())
    with HFTensors(out) as read:
        assert {n: bits(read[n]) for n in read.names()} == {n: bits(t) for n, t in tensors.items()}


def test_no_file_is_larger_than_asked_for_unless_one_tensor_is(tmp_path, config):
    shapes = {f"t{i}": (torch.float32, (size,)) for i, size in enumerate((10, 15, 1, 30, 2, 2))}
    writer = HFWriter(tmp_path / "out", shapes, like=config, shard_bytes=100)
    for name, (dtype, shape) in shapes.items():
        writer.write(name, torch.zeros(shape, dtype=dtype))
    writer.finish()
    index = json.loads((tmp_path / "out" / INDEX).read_text())["weight_map"]
    files = sorted(set(index.values()))
    assert files == [f"model-0000{i}-of-00004.safetensors" for i in (1, 2, 3, 4)]
    assert [[n for n in shapes if index[n] == file] for file in files] == [
        ["t0", "t1"],  # 100 bytes: they just fit
        ["t2"],
        ["t3"],  # 120 bytes: in a separate file
        ["t4", "t5"],
    ]


def test_a_view_is_written_as_what_it_shows(tmp_path, config):
    matrix = torch.arange(12.0).reshape(3, 4)
    views = {"transposed": matrix.t(), "columns": matrix[:, 1:3], "offset": matrix[1:]}
    writer = HFWriter(tmp_path / "out", tensor_shapes(views), like=config)
    for name, view in views.items():
        writer.write(name, view)
    writer.finish()
    read = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(read[name], view) for name, view in views.items())


def test_threads_read_and_write_at_once(tmp_path, config):
    tensors = {f"t{i}": random_tensor((97 + i, 31), torch.bfloat16, i) for i in range(24)}
    writer = HFWriter(tmp_path / "out", tensor_shapes(tensors), like=config, shard_bytes=40_000)
    in_threads([lambda n=n: writer.write(n, tensors[n]) for n in tensors])
    writer.finish()
    wrong = []
    with HFTensors(tmp_path / "out") as read:

        def check(start):
            names = sorted(tensors)
            for name in names[start:] + names[:start]:
                if not torch.equal(read[name].view(torch.int16), tensors[name].view(torch.int16)):
                    wrong.append(name)

        in_threads([lambda start=start: check(start) for start in range(0, 24, 3)])
    assert wrong == []


def in_threads(functions):
    threads = [threading.Thread(target=function) for function in functions]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_short_reads_and_writes_of_the_system_are_continued(tmp_path, config, monkeypatch):
    """The kernel may move less than asked for; beyond 2 GiB it always does."""
    real_read, real_write = os.preadv, os.pwrite
    monkeypatch.setattr(os, "preadv", lambda fd, buffers, at: real_read(fd, [buffers[0][:7]], at))
    monkeypatch.setattr(os, "pwrite", lambda fd, data, at: real_write(fd, data[:5], at))
    tensors = {"a": random_tensor((5, 9), torch.float32), "b": random_tensor((3,), torch.bfloat16)}
    writer = HFWriter(tmp_path / "out", tensor_shapes(tensors), like=config)
    for name, tensor in tensors.items():
        writer.write(name, tensor)
    writer.finish()
    with HFTensors(tmp_path / "out") as read:
        assert {n: bits(read[n]) for n in tensors} == {n: bits(t) for n, t in tensors.items()}


def test_configuration_and_tokenizer_are_carried_over_and_old_weights_are_not(tmp_path, config):
    target = tmp_path / "target"
    target.mkdir()
    carry_over(config, target)
    assert {file.name for file in target.iterdir()} == {"config.json", "tokenizer.json"}
    assert (target / "tokenizer.json").read_bytes() == b"\x00tokenizer"


# The writer's promises


def test_an_unfinished_writer_leaves_no_directory_of_the_final_name(tmp_path, config):
    writer = HFWriter(tmp_path / "out", {"a": (torch.float32, (2,))}, like=config)
    writer.write("a", torch.zeros(2))
    assert not (tmp_path / "out").exists()
    writer.abandon()
    assert {path.name for path in tmp_path.iterdir()} == {"config"}


def test_finish_asserts_that_all_was_written(tmp_path, config):
    shapes = {"a": (torch.float32, (2,)), "b": (torch.float32, (3,))}
    writer = HFWriter(tmp_path / "out", shapes, like=config)
    writer.write("a", torch.zeros(2))
    with pytest.raises(AssertionError, match=r"never written.*'b'"):
        writer.finish()
    assert not (tmp_path / "out").exists()
    writer.abandon()


@pytest.mark.parametrize("wrong", [torch.zeros(3), torch.zeros(2, dtype=torch.bfloat16)])
def test_write_asserts_what_was_announced(tmp_path, config, wrong):
    writer = HFWriter(tmp_path / "out", {"a": (torch.float32, (2,))}, like=config)
    with pytest.raises(AssertionError, match=r"a: .*announced"):
        writer.write("a", wrong)
    writer.abandon()


def test_remains_of_an_earlier_try_are_not_in_the_result(tmp_path, config):
    left = tmp_path / "out.partial"
    ownership.create(left, ownership.UNFINISHED)
    (left / "model-00001-of-00009.safetensors").write_text("left")
    writer = HFWriter(tmp_path / "out", {"a": (torch.float32, (2,))}, like=config)
    writer.write("a", torch.zeros(2))
    writer.finish()
    names = {file.name for file in (tmp_path / "out").iterdir()}
    assert names == {"model.safetensors", "config.json", "tokenizer.json"}
    assert [path.name for path in tmp_path.glob("out*")] == ["out"]


def test_what_is_in_the_way_and_not_ours_gets_another_name(tmp_path, config, capsys):
    for name in ("out", "out.partial"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "mine").write_text(name)
    writer = HFWriter(tmp_path / "out", {"a": (torch.float32, (2,))}, like=config)
    writer.write("a", torch.zeros(2))
    writer.finish()
    for name in ("out", "out.partial"):
        assert (tmp_path / f"{name}.kept-1" / "mine").read_text() == name
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert capsys.readouterr().err.count("is not known to be written by this program") == 2


def test_a_marker_is_not_carried_over_with_the_files_of_a_model(tmp_path, config):
    """The marker of an exported model would list other files."""
    ownership.mark(config, "model", files=["old"])
    writer = HFWriter(tmp_path / "out", {"a": (torch.float32, (2,))}, like=config, kind="model")
    assert "files" not in ownership.marker(writer.aside)
    writer.write("a", torch.zeros(2))
    writer.finish()
    files = ownership.marker(tmp_path / "out")["files"]
    assert list(files) == ["config.json", "model.safetensors", "tokenizer.json"]


def test_a_writer_that_could_not_start_leaves_nothing(tmp_path):
    """The source of configuration files is missing, or the disk is full."""
    with pytest.raises(OSError):
        HFWriter(tmp_path / "out", {"a": (torch.float32, (2,))}, like=tmp_path / "absent")
    assert list(tmp_path.iterdir()) == []


# Damage


def header(text, data=b""):
    text = text if isinstance(text, bytes) else text.encode()
    return len(text).to_bytes(8, "little") + text + data


ENTRY = '{"dtype":"F32","shape":[2],"data_offsets":[0,8]}'


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "header is not complete"),
        (b"\x01\x02\x03", "header is not complete"),
        ((10**6).to_bytes(8, "little") + b"{}", "header is not complete"),
        ((2**63).to_bytes(8, "little") + b"{}", "header is not complete"),
        (header("{not json"), "header is not JSON"),
        (header(b"\xff\xfe\x00"), "header is not JSON"),
        (header(f'{{"a":{ENTRY}}}', b"1234567"), "truncated"),
        (header(f'{{"a":{ENTRY}}}', b"123456789"), "damaged"),
        (header('{"a":{"dtype":"F32","shape":[3],"data_offsets":[0,8]}}', b"12345678"), "damaged"),
        (header('{"a":{"dtype":"F8_E4M3","shape":[8],"data_offsets":[0,8]}}', b"1" * 8), "F8_E4M3"),
        (header("[1, 2]"), "damaged"),
        (header('{"a": 1}'), "damaged"),
        (header('{"a":{"dtype":"F32","shape":[2]}}', b"12345678"), "damaged"),
        (header('{"a":{"dtype":"F32","shape":[2],"data_offsets":[-8,0]}}'), "damaged"),
    ],
    ids=[
        "empty",
        "three bytes",
        "header longer than the file",
        "header of 2^63 bytes",
        "header not JSON",
        "header not text",
        "a byte short",
        "a byte long",
        "shape does not fit",
        "unsupported type",
        "header a list",
        "entry a number",
        "no offsets",
        "negative offset",
    ],
)
def test_a_damaged_file_is_named(tmp_path, content, said):
    (tmp_path / "model.safetensors").write_bytes(content)
    with pytest.raises(UserError, match=r"model\.safetensors") as error:
        HFTensors(tmp_path)
    assert said in str(error.value)


def test_tensors_that_share_bytes_are_refused(tmp_path):
    """Safetensors refuses them as well: the header is damaged, the tensors are not those saved."""
    text = f'{{"a":{ENTRY},"b":{ENTRY},"c":{ENTRY.replace("[0,8]", "[8,16]")}}}'
    (tmp_path / "model.safetensors").write_bytes(header(text, b"1" * 16))
    with pytest.raises(Exception):  # noqa: B017 - the library's own error type is private
        load_file(tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"model\.safetensors"):
        HFTensors(tmp_path)


def test_every_truncation_of_a_file_is_noticed(tmp_path):
    save_file({"a": torch.arange(5.0), "b": torch.arange(3)}, tmp_path / "model.safetensors")
    whole = (tmp_path / "model.safetensors").read_bytes()
    for length in range(len(whole)):
        (tmp_path / "model.safetensors").write_bytes(whole[:length])
        with pytest.raises(UserError, match=r"model\.safetensors"):
            HFTensors(tmp_path)


def test_no_weights(tmp_path):
    with pytest.raises(UserError, match=f"no weights in {tmp_path}"):
        HFTensors(tmp_path)


def test_an_unknown_name_is_named(tmp_path):
    two_files(tmp_path)
    with HFTensors(tmp_path) as read, pytest.raises(UserError, match="no tensor zzz"):
        read["zzz"]


def test_a_missing_file_of_the_index_is_named(tmp_path):
    two_files(tmp_path)
    (tmp_path / "two.safetensors").unlink()
    with pytest.raises(UserError, match=r"index.json names two.safetensors, which is missing"):
        HFTensors(tmp_path)


@pytest.mark.parametrize(
    ("name", "file"), [("a", "two.safetensors"), ("c", "one.safetensors")], ids=["other", "none"]
)
def test_a_tensor_that_the_index_puts_elsewhere_is_named(tmp_path, name, file):
    index = two_files(tmp_path)
    index["weight_map"][name] = file
    (tmp_path / INDEX).write_text(json.dumps(index))
    with pytest.raises(UserError, match=rf"index.json lists {name} in {file}"):
        HFTensors(tmp_path)


@pytest.mark.parametrize("text", ["{", "[]", "{}", '{"weight_map": 3}', '{"weight_map": [1]}'])
def test_a_damaged_index_is_named(tmp_path, text):
    two_files(tmp_path)
    (tmp_path / INDEX).write_text(text)
    with pytest.raises(UserError, match=INDEX):
        HFTensors(tmp_path)


def test_a_name_in_two_files_is_named_with_both(tmp_path):
    two_files(tmp_path)
    save_file({"a": torch.ones(2), "b": torch.ones(2)}, tmp_path / "two.safetensors")
    with pytest.raises(UserError, match=r"a is in one.safetensors and in two.safetensors"):
        HFTensors(tmp_path)
