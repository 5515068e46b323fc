"""Our `torch_dist` files are those of torch and Megatron-Core; damage and malice are refused."""

import itertools
import pickle
import random
import threading
from pathlib import Path

import pytest
import torch
import torch.distributed.checkpoint as dcp
from torch.distributed.checkpoint.metadata import MetadataIndex

from megatron_prepo.errors import UserError
from megatron_prepo.models.torch_dist import Chunk, TorchDistReader, TorchDistWriter

SHAPE = (4, 7, 6)
CUTS = ((0, 1, 3, 4), (0, 5, 7), (0, 2, 6))
"""Cuts of each dimension of the tensor, which give 12 chunks of different sizes."""


def whole():
    return torch.arange(4 * 7 * 6, dtype=torch.float32).reshape(SHAPE)


def cut_chunks(key, shape=SHAPE, cuts=CUTS):
    for ranges in itertools.product(*(itertools.pairwise(cut) for cut in cuts)):
        yield Chunk(key, tuple(shape), tuple(a for a, _ in ranges), tuple(b - a for a, b in ranges))


def region(tensor, offset, shape):
    return tensor[tuple(slice(a, a + n) for a, n in zip(offset, shape, strict=True))]


def write(directory, *, leave_out=()):
    """Write a tensor in 12 chunks, one in one, a scalar, and bfloat16."""
    writer = TorchDistWriter(directory)
    for number, chunk in enumerate(cut_chunks("cut")):
        if number not in leave_out:
            writer.write(chunk, region(whole(), chunk.offset, chunk.shape))
    writer.write(Chunk("one", (5, 3), (0, 0), (5, 3)), torch.arange(15.0).reshape(5, 3))
    writer.write(Chunk("scalar", (), (), ()), torch.tensor(3.5))
    half = torch.arange(8, dtype=torch.bfloat16)
    writer.write(Chunk("half", (2, 4), (0, 0), (1, 4)), half[:4])
    writer.write(Chunk("half", (2, 4), (1, 0), (1, 4)), half[4:])
    writer.finish({"iteration": 7, "checkpoint_version": 3.0})
    return directory


@pytest.fixture
def checkpoint(tmp_path):
    return write(tmp_path / "checkpoint")


# Regions


def test_any_region_comes_back(checkpoint):
    """Regions are inside a chunk, across chunks, one chunk, or the entire tensor."""
    reader = TorchDistReader(checkpoint)
    draw = random.Random(0)
    regions = [((0, 0, 0), SHAPE), ((1, 0, 2), (2, 5, 4)), ((3, 6, 5), (1, 1, 1))]
    for _ in range(60):
        offset = tuple(draw.randrange(n) for n in SHAPE)
        regions.append(
            (offset, tuple(draw.randint(1, n - a) for n, a in zip(SHAPE, offset, strict=True)))
        )
    for offset, shape in regions:
        read = reader.read("cut", offset, shape)
        assert torch.equal(read, region(whole(), offset, shape)), (offset, shape)


def test_shapes_types_and_the_rest_come_back(checkpoint):
    reader = TorchDistReader(checkpoint)
    assert set(reader.tensors) == {"cut", "one", "scalar", "half"}
    assert reader.shape("cut") == SHAPE and reader.dtype("half") is torch.bfloat16
    assert reader.read("scalar", (), ()).item() == 3.5
    assert reader.read("half", (0, 0), (2, 4)).flatten().tolist() == list(range(8))
    assert reader.common()["iteration"] == 7


def test_a_chunk_that_shows_a_part_of_a_larger_tensor_is_stored_without_the_rest(tmp_path):
    """`torch.save` of a view would write the entire tensor that is viewed."""
    large = torch.arange(100_000.0).reshape(1000, 100)
    writer = TorchDistWriter(tmp_path / "c")
    writer.write(Chunk("t", (2, 3), (0, 0), (2, 3)), large[5:7, 10:13])
    writer.write(Chunk("u", (1, 100), (0, 0), (1, 100)), large[5:6])  # already contiguous
    writer.finish({})
    reader = TorchDistReader(tmp_path / "c")
    assert torch.equal(reader.read("t", (0, 0), (2, 3)), large[5:7, 10:13])
    assert torch.equal(reader.read("u", (0, 0), (1, 100)), large[5:6])
    assert sum(file.stat().st_size for file in (tmp_path / "c").glob("*.distcp")) < 20_000


def test_threads_write_and_read_at_once(tmp_path):
    big = torch.randn(24, 50, generator=torch.Generator().manual_seed(0))
    writer = TorchDistWriter(tmp_path / "c")

    def put(start):
        for row in range(start, 24, 4):
            writer.write(Chunk("t", (24, 50), (row, 0), (1, 50)), big[row])

    in_threads(put, range(4))
    writer.finish({})
    reader, found = TorchDistReader(tmp_path / "c"), {}

    def get(start):
        found[start] = reader.read("t", (start, 3), (20, 40))

    in_threads(get, range(4))
    assert len(list((tmp_path / "c").glob("*.distcp"))) == 4
    assert all(torch.equal(t, big[s : s + 20, 3:43]) for s, t in found.items()) and len(found) == 4


def in_threads(function, arguments):
    threads = [threading.Thread(target=function, args=(argument,)) for argument in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()


def test_a_chunk_written_twice_asserts(tmp_path):
    writer, chunk = TorchDistWriter(tmp_path / "c"), Chunk("t", (2,), (0,), (2,))
    writer.write(chunk, torch.zeros(2))
    with pytest.raises(AssertionError, match="written twice"):
        writer.write(chunk, torch.zeros(2))
    writer.close()


def test_two_global_shapes_of_one_key_assert(tmp_path):
    writer = TorchDistWriter(tmp_path / "c")
    writer.write(Chunk("t", (4,), (0,), (2,)), torch.zeros(2))
    with pytest.raises(AssertionError, match="two shapes"):
        writer.write(Chunk("t", (5,), (2,), (2,)), torch.zeros(2))
    writer.close()


# torch and Megatron-Core


def test_torch_reads_what_was_written(checkpoint):
    """Compares entire tensors, and the checkpoint's table as torch's own reader returns it."""
    state = {
        "cut": torch.zeros(SHAPE),
        "one": torch.zeros(5, 3),
        "scalar": torch.zeros(()),
        "half": torch.zeros(2, 4, dtype=torch.bfloat16),
    }
    dcp.load(state, storage_reader=dcp.FileSystemReader(checkpoint), no_dist=True)
    assert torch.equal(state["cut"], whole())
    assert torch.equal(state["one"], torch.arange(15.0).reshape(5, 3))
    assert state["scalar"].item() == 3.5
    assert state["half"].flatten().tolist() == list(range(8))


@pytest.mark.parametrize("kind", [str, Path])
def test_what_torch_wrote_is_read(tmp_path, kind):
    """Torch stores the directory in its table as given: a name or a `Path`."""
    state = {"a": {"b": torch.arange(12.0).reshape(3, 4)}, "c": torch.ones(2, dtype=torch.bfloat16)}
    dcp.save(state, storage_writer=dcp.FileSystemWriter(kind(tmp_path / "c")), no_dist=True)
    reader = TorchDistReader(tmp_path / "c")
    assert set(reader.tensors) == {"a.b", "c"}
    assert torch.equal(reader.read("a.b", (1, 1), (2, 2)), state["a"]["b"][1:3, 1:3])
    assert torch.equal(reader.read("c", (0,), (2,)), state["c"])


def test_what_torch_wrote_of_a_tensor_in_another_order_in_memory_is_read(tmp_path):
    """torch keeps strides: the bytes of a transposed matrix are not in the order of its rows."""
    wide = torch.arange(24.0).reshape(4, 6)
    state = {"t": wide.t(), "cube": torch.arange(24.0).reshape(2, 3, 4).permute(2, 0, 1)}
    dcp.save(state, storage_writer=MegatronsWriter(tmp_path / "c"), no_dist=True)
    reader = TorchDistReader(tmp_path / "c")
    assert torch.equal(reader.read("t", (0, 0), (6, 4)), wide.t())
    assert torch.equal(reader.read("t", (2, 1), (3, 2)), wide.t()[2:5, 1:3])
    assert torch.equal(reader.read("cube", (0, 0, 0), (4, 2, 3)), state["cube"])


class MegatronsWriter(dcp.FileSystemWriter):
    """Writer that, like Megatron's, records no directory in the table."""

    def storage_meta(self):
        return None


@pytest.fixture
def one_rank():
    from megatron_prepo.actor import parallel
    from megatron_prepo.config import ParallelConfig

    parallel.initialize(ParallelConfig(), seed=0)
    yield
    parallel.shut_down()


def sharded(tensor, key, shape):
    """Return Megatron's description of an entire tensor."""
    from megatron.core.dist_checkpointing.mapping import ShardedTensor

    return ShardedTensor(
        key, tensor, tensor.dtype, tuple(shape), tuple(shape), (0,) * len(shape), (1,) * len(shape)
    )


def test_megatron_reads_what_was_written_and_the_other_way_round(checkpoint, tmp_path, one_rank):
    from megatron.core import dist_checkpointing

    asked = {"x": sharded(torch.zeros(SHAPE), "cut", SHAPE)}
    loaded = dist_checkpointing.load(asked, str(checkpoint))
    assert torch.equal(loaded["x"], whole()) and loaded["iteration"] == 7

    theirs = tmp_path / "theirs"
    theirs.mkdir()
    state = {"w": sharded(whole(), "weight", SHAPE), "iteration": 9, "text": "words"}
    dist_checkpointing.save(state, str(theirs))
    reader = TorchDistReader(theirs)
    assert torch.equal(reader.read("weight", (1, 2, 3), (3, 4, 2)), whole()[1:4, 2:6, 3:5])
    assert reader.common()["iteration"] == 9 and reader.common()["text"] == "words"


# Damage


def test_a_missing_region_is_named(tmp_path):
    """One of 12 chunks was never written; what does not touch it can be read."""
    reader = TorchDistReader(write(tmp_path / "c", leave_out={5}))
    hole = list(cut_chunks("cut"))[5]
    with pytest.raises(UserError, match=r"cut is incomplete.*\(4, 7, 6\) at \(0, 0, 0\)"):
        reader.read("cut", (0, 0, 0), SHAPE)
    with pytest.raises(UserError, match="cut is incomplete"):
        reader.read("cut", hole.offset, hole.shape)
    assert torch.equal(reader.read("cut", (0, 0, 0), (1, 7, 6)), whole()[:1])


def test_a_region_outside_of_the_tensor_is_refused(checkpoint):
    with pytest.raises(UserError, match="cut is incomplete"):
        TorchDistReader(checkpoint).read("cut", (3, 0, 0), (2, 7, 6))


def test_an_unknown_key_is_named(checkpoint):
    with pytest.raises(UserError, match="no tensor absent"):
        TorchDistReader(checkpoint).read("absent", (0,), (1,))


def test_a_truncated_data_file_is_named(checkpoint):
    (file,) = checkpoint.glob("*.distcp")
    file.write_bytes(file.read_bytes()[:-1])
    with pytest.raises(UserError, match=rf"{file.name} is missing or truncated"):
        TorchDistReader(checkpoint)


def test_a_missing_data_file_is_named(checkpoint):
    (file,) = checkpoint.glob("*.distcp")
    file.unlink()
    with pytest.raises(UserError, match=rf"{file.name} is missing or truncated"):
        TorchDistReader(checkpoint)


def test_a_data_file_of_other_content_is_named(checkpoint):
    """The length is right, as on a disk that lost blocks."""
    (file,) = checkpoint.glob("*.distcp")
    file.write_bytes(bytes(file.stat().st_size))
    with pytest.raises(UserError, match=str(checkpoint)):
        TorchDistReader(checkpoint).read("one", (0, 0), (5, 3))


def test_no_table(tmp_path):
    with pytest.raises(UserError, match=r"not a torch_dist checkpoint: it has no .metadata"):
        TorchDistReader(tmp_path)


def test_every_truncation_of_the_table_is_refused(checkpoint):
    table = checkpoint / ".metadata"
    content = table.read_bytes()
    for length in [*range(0, len(content), 37), len(content) - 1]:
        table.write_bytes(content[:length])
        with pytest.raises(UserError, match=r"\.metadata is damaged"):
            TorchDistReader(checkpoint)


@pytest.mark.parametrize(
    "table",
    [b"garbage", b"\x80\x04", b"\x00" * 100, pickle.dumps([1, 2]), pickle.dumps({})],
    ids=["garbage", "start", "zeros", "list", "dict"],
)
def test_a_table_that_is_none_is_refused(checkpoint, table):
    (checkpoint / ".metadata").write_bytes(table)
    with pytest.raises(UserError, match=r"\.metadata is damaged"):
        TorchDistReader(checkpoint)


def test_a_missing_rest_is_named(checkpoint):
    (checkpoint / "common.pt").unlink()
    with pytest.raises((UserError, OSError), match=r"common\.pt"):
        TorchDistReader(checkpoint).common()


def test_a_damaged_rest_is_named(checkpoint):
    (checkpoint / "common.pt").write_bytes(b"garbage")
    with pytest.raises(UserError, match=r"common\.pt"):
        TorchDistReader(checkpoint).common()


# Malice: a pickle that would create a file


def reduce(callable_by_name, argument):
    """Return a pickle (protocol 4) that calls a module's function by name with one string."""
    module, name = callable_by_name
    return b"\x80\x04" + text(module) + text(name) + b"\x93" + text(argument) + b"\x85R."


def call_what_it_returns(callable_by_name, argument, command):
    """Pickle a call, and a call of its result with another string."""
    return reduce(callable_by_name, argument)[:-1] + text(command) + b"\x85R."


def text(string):
    encoded = string.encode()
    return b"\x8c" + bytes([len(encoded)]) + encoded


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("os.system", lambda command: reduce(("os", "system"), command)),
        (
            "eval",
            lambda command: reduce(("builtins", "eval"), f"__import__('os').system({command!r})"),
        ),
        (
            "a module inside of an allowed module",
            lambda command: reduce(
                ("torch.distributed.checkpoint.filesystem", "os.system"), command
            ),
        ),
        (
            "attributes of an allowed class",
            lambda command: reduce(("torch.distributed.checkpoint.metadata", "os.system"), command),
        ),
        (
            "torch's importer by name",
            lambda command: call_what_it_returns(
                ("torch._utils", "_import_dotted_name"), "os.system", command
            ),
        ),
        (
            "through Megatron's modules",
            lambda command: reduce(
                ("megatron.core.dist_checkpointing.strategies.filesystem_async", "os.system"),
                command,
            ),
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_malicious_table_is_refused_and_not_executed(checkpoint, name, make, tmp_path):
    (checkpoint / ".metadata").write_bytes(make(f"touch {tmp_path}/executed"))
    try:
        with pytest.raises(UserError, match=r"\.metadata is damaged"):
            TorchDistReader(checkpoint)
    finally:
        assert not (tmp_path / "executed").exists(), f"{name}: executed"


def test_the_malicious_tables_would_work(tmp_path):
    """Plain pickle executes them, so the tests above refuse a real attack."""
    for number, table in enumerate(
        (
            reduce(("torch.distributed.checkpoint.filesystem", "os.system"), f"touch {tmp_path}/0"),
            call_what_it_returns(
                ("torch._utils", "_import_dotted_name"), "os.system", f"touch {tmp_path}/1"
            ),
        )
    ):
        pickle.loads(table)
        assert (tmp_path / str(number)).exists()


def test_a_malicious_tensor_or_rest_is_refused_and_not_executed(checkpoint, tmp_path):
    evil = reduce(("os", "system"), f"touch {tmp_path}/executed")
    (checkpoint / "common.pt").write_bytes(evil)
    with pytest.raises(Exception):  # noqa: B017 - which one is the business of other tests
        TorchDistReader(checkpoint).common()
    assert not (tmp_path / "executed").exists()

    class Evil:
        def __reduce__(self):
            import os

            return os.system, (f"touch {tmp_path}/executed",)

    reader = TorchDistReader(checkpoint)
    place = reader._places[MetadataIndex("one", (0, 0), 0)]
    with (checkpoint / place.relative_path).open("r+b") as stream:
        stream.seek(place.offset)
        torch.save(Evil(), stream)
    with pytest.raises(Exception):  # noqa: B017
        reader.read("one", (0, 0), (5, 3))
    assert not (tmp_path / "executed").exists()
