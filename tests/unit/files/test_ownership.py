"""Directories that this program created are known by their marker, and only they are removed."""

import os
import shutil

import pytest

from megatron_prepo.errors import UserError
from megatron_prepo.files import atomic as durable
from megatron_prepo.files import digest as digests
from megatron_prepo.files import lock, ownership


@pytest.fixture
def sealed(tmp_path):
    directory = tmp_path / "folder"
    ownership.create(directory, "model")
    (directory / "inner").mkdir()
    (directory / "inner" / "file").write_text("ours")
    ownership.seal(directory, "model")
    return directory


def test_a_sealed_folder_knows_what_is_its_own(sealed):
    assert list(ownership.marker(sealed)["files"]) == ["inner/file"]
    assert ownership.strangers(sealed, "model") == []
    assert ownership.strangers(sealed, "dump") == [sealed], "of another kind"
    (sealed / "inner" / "mine").touch()
    (sealed / "link").symlink_to(sealed / "inner")
    assert ownership.strangers(sealed, "model") == [sealed / "inner" / "mine", sealed / "link"]


def replace(path, content: bytes) -> None:
    """Replace a file by another one of this name, as an editor or `mv` does."""
    path.with_name("other").write_bytes(content)
    path.with_name("other").replace(path)


@pytest.fixture
def large(sealed, monkeypatch):
    """File of which the digest reads samples only, and a byte that is between them."""
    monkeypatch.setattr(digests, "FULL_BYTES", 1 << 12)
    monkeypatch.setattr(digests, "END_BYTES", 1 << 8)
    monkeypatch.setattr(digests, "BLOCK_BYTES", 1 << 4)
    path = sealed / "model.safetensors"
    path.write_bytes(bytes(1 << 14))
    ownership.seal(sealed, "model")
    assert ownership.strangers(sealed, "model") == []
    return path


@pytest.mark.parametrize("harm", ["other content", "a link to itself", "a link", "a pipe"])
def test_a_file_in_the_place_of_a_sealed_one_is_not_ours(sealed, harm):
    """The other file has the same name and size, or is a link to the same content."""
    file = sealed / "inner" / "file"
    match harm:
        case "other content":
            replace(file, b"mine")
        case "a link to itself":
            file.rename(sealed.with_name("kept"))
            file.symlink_to(sealed.with_name("kept"))
        case "a link":
            file.unlink()
            file.symlink_to(sealed)
        case "a pipe":
            file.unlink()
            os.mkfifo(file)
    assert ownership.strangers(sealed, "model") == [file]
    ownership.make_room(sealed, "model")
    assert os.path.lexists(sealed.with_name("folder.kept-1") / "inner" / "file")


@pytest.mark.parametrize("position", [0, (1 << 13) + 100, (1 << 14) - 1])
@pytest.mark.parametrize("way", ["replaced", "in place", "with its time"])
def test_a_large_file_that_changed_is_not_ours(large, position, way):
    """The change is at an end, or between two samples, at any file size."""
    content, time = bytearray(large.read_bytes()), large.stat().st_mtime_ns
    digest = digests.digest(large)
    content[position] ^= 1
    if way == "replaced":
        replace(large, content)
    else:
        large.write_bytes(content)
    seen = digests.digest(large) != digest
    assert seen == (position != (1 << 13) + 100)
    if way == "with its time":
        os.utime(large, ns=(time, time))
    unseen = way == "with its time" and not seen  # only by a program that resets the time
    assert ownership.strangers(large.parent, "model") == ([] if unseen else [large])


def test_a_large_file_is_known_in_another_place_with_its_time(large, tmp_path):
    directory = large.parent
    shutil.copytree(directory, tmp_path / "copied")  # with times
    directory.rename(tmp_path / "moved")
    for name in ("copied", "moved"):
        assert ownership.strangers(tmp_path / name, "model") == []
    shutil.copyfile(tmp_path / "moved" / large.name, tmp_path / "copied" / large.name)
    assert ownership.strangers(tmp_path / "copied", "model") == [tmp_path / "copied" / large.name]


@pytest.mark.parametrize(
    "files",
    [
        ["inner/file"],  # of an older version
        None,
        "inner/file",
        {},
        {"inner/file": None},
        {"inner/file": "sha256:0"},
        {"inner/file": {}},
        {"inner/file": {"bytes": 4, "digest": "sampled:0", "mtime_ns": 0}},
    ],
)
def test_a_list_without_proofs_proves_nothing(sealed, files):
    ownership.mark(sealed, "model", files=files)
    assert ownership.strangers(sealed, "model") != []
    ownership.make_room(sealed, "model")
    assert (sealed.with_name("folder.kept-1") / "inner" / "file").read_text() == "ours"


def test_a_folder_that_was_never_sealed_proves_nothing(tmp_path):
    """The final name is given after sealing; a killed process leaves a `.partial` directory."""
    for kind, expected in (("model", [tmp_path / "model"]), (ownership.UNFINISHED, [])):
        ownership.create(tmp_path / kind, kind)
        assert ownership.strangers(tmp_path / kind, kind) == expected


def test_a_folder_of_another_run_is_not_this_runs(tmp_path):
    for name, identity in (("one", "a1"), ("two", "b2")):
        ownership.create(tmp_path / name, "plain")
        ownership.mark(tmp_path / name, ownership.RUN, identity=identity)
        ownership.create(tmp_path / name / "deep" / "hf", "model")
        (tmp_path / name / "deep" / "hf" / "file").touch()
        ownership.seal(tmp_path / name / "deep" / "hf", "model")
    (tmp_path / "two" / "deep" / "hf").rename(tmp_path / "one" / "deep" / "other")
    own, other = (tmp_path / "one" / "deep" / name for name in ("hf", "other"))
    assert ownership.run_identity(own) == "a1" and ownership.run_identity(tmp_path) is None
    assert ownership.strangers(own, "model", "a1") == []
    assert ownership.strangers(other, "model", "a1") == [other]
    ownership.create(tmp_path / "outside", "model")
    ownership.seal(tmp_path / "outside", "model")
    (tmp_path / "outside").rename(tmp_path / "one" / "outside")
    for run, expected in ((None, []), ("a1", [tmp_path / "one" / "outside"])):
        assert ownership.strangers(tmp_path / "one" / "outside", "model", run) == expected
    ownership.make_room(other, "model", "a1")
    assert (tmp_path / "one" / "deep" / "other.kept-1" / "file").exists()


def test_what_a_replay_adds_to_a_dump_is_known_by_a_seal_of_its_own(sealed):
    gradients = sealed / "one_rank" / "gradients_0"
    ownership.create(gradients, ownership.LATER_KIND)
    (gradients / "model.safetensors").write_text("ours")
    ownership.seal(gradients, ownership.LATER_KIND)
    (sealed / "logs").mkdir()
    (sealed / "logs" / "rank_0.error").touch()
    assert ownership.strangers(sealed, "model") == []
    (gradients / "model.safetensors").write_text("mine")
    expected = [gradients / ownership.MARKER, gradients / "model.safetensors"]
    assert ownership.strangers(sealed, "model") == expected


@pytest.mark.parametrize("harm", ["moved", "removed", "replaced"])
@pytest.mark.parametrize("end", ["publish", "abandon"])
def test_what_takes_the_place_of_an_unfinished_folder_is_left_alone(tmp_path, harm, end):
    ownership.create(tmp_path / "run", "model")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine").write_text("precious")
    aside = ownership.begin(tmp_path / "out")
    if harm == "removed":
        shutil.rmtree(aside)
    else:
        aside.rename(tmp_path / "moved")
    if harm == "replaced":
        ownership.create(aside, ownership.UNFINISHED)
        (aside / "theirs").touch()
    if end == "abandon":
        ownership.abandon(aside)
    else:
        with pytest.raises(UserError, match="was moved, removed or replaced while it was being w"):
            ownership.publish(aside, tmp_path / "out", "model")
    assert (tmp_path / "out" / "mine").read_text() == "precious"
    assert (aside / "theirs").exists() == (harm == "replaced")


def test_room_is_made_by_removing_what_is_ours(sealed, tmp_path):
    ownership.make_room(sealed, "model")
    (tmp_path / "empty").mkdir()
    ownership.make_room(tmp_path / "empty", "model")
    ownership.make_room(tmp_path / "absent", "model")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("what", ["folder", "marked otherwise", "added to", "file", "link"])
def test_anything_else_gets_another_name(sealed, tmp_path, capsys, what):
    path = tmp_path / "there"
    match what:
        case "folder":
            path.mkdir()
            (path / "mine").touch()
        case "marked otherwise":
            ownership.create(path, "dump")
        case "added to":
            sealed.rename(path)
            (path / "mine").touch()
        case "file":
            path.write_text("mine")
        case "link":
            path.symlink_to(sealed)
    (tmp_path / "there.kept-1").mkdir()
    ownership.make_room(path, "model")
    kept = tmp_path / "there.kept-2"
    assert not path.exists() and (kept.exists() or kept.is_symlink())
    assert f"renamed to {kept.name}" in capsys.readouterr().err
    assert what != "link" or (sealed / "inner" / "file").read_text() == "ours"


def test_what_a_running_process_writes_is_not_removed(tmp_path, monkeypatch):
    aside = ownership.begin(tmp_path / "out")
    monkeypatch.setattr(lock, "_is_mine", lambda file: False)
    monkeypatch.setattr(lock.fcntl, "lockf", _busy)
    with pytest.raises(UserError, match="is in use by process"):
        ownership.begin(tmp_path / "out")
    assert aside.is_dir()


def _busy(*_):
    raise BlockingIOError(11, "busy")


@pytest.mark.parametrize("kind", [None, "model"])
def test_a_published_folder_has_a_marker_if_it_is_ours(tmp_path, kind):
    aside = ownership.begin(tmp_path / "out")
    (aside / "file").touch()
    ownership.publish(aside, tmp_path / "out", kind)
    assert [path.name for path in tmp_path.iterdir()] == ["out"]
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"file"} | ({ownership.MARKER} if kind else set())
    ownership.begin(tmp_path / "out")  # the lock is free


def test_a_folder_is_claimed_once_and_only_if_nothing_is_in_it(tmp_path):
    ownership.claim(tmp_path / "new", "proof", "--dir")
    (tmp_path / "new" / "whole").mkdir()
    ownership.claim(tmp_path / "new", "proof", "--dir")
    (tmp_path / "file").touch()
    for place in (tmp_path, tmp_path / "file"):
        with pytest.raises(UserError, match=f"--dir {place}"):
            ownership.claim(place, "proof", "--dir")
    with pytest.raises(UserError, match=r"has no \.megatron-prepo\.json of a comparison"):
        ownership.claim(tmp_path / "new", "comparison", "--dir")


def test_text_is_replaced_without_touching_a_neighbour(tmp_path):
    """A user's file may have the name that a temporary file would have."""
    (tmp_path / "report.html.partial").write_text("mine")
    durable.write_text(tmp_path / "report.html", "ours")
    assert (tmp_path / "report.html.partial").read_text() == "mine"
    with pytest.raises(UnicodeEncodeError):
        durable.write_text(tmp_path / "report.html", "\ud800")
    assert (tmp_path / "report.html").read_text() == "ours"
    assert len(list(tmp_path.iterdir())) == 2


def test_a_checkpoint_that_was_added_to_is_not_pruned(tmp_path):
    from megatron_prepo.actor import checkpoint

    for step in range(1, 6):
        path = checkpoint.checkpoint_path(tmp_path, step)
        if step == 3:
            path.mkdir()  # of an older version, or the user's
            continue
        ownership.create(path, ownership.UNFINISHED)
        (path / "common.pt").touch()
        ownership.seal(path, checkpoint.KIND)
    (tmp_path / "iter_0000002" / "hf").mkdir()
    (tmp_path / "iter_0000002" / "hf" / "model.safetensors").touch()
    kept = checkpoint.prune(tmp_path, keep_last=1, keep_every=None)
    added = tmp_path / "iter_0000002" / "hf" / "model.safetensors"
    unmarked = tmp_path / "iter_0000003"
    assert kept == {tmp_path / "iter_0000002": [added], unmarked: [unmarked]}
    left = sorted(path.name for path in tmp_path.iterdir())
    assert left == ["iter_0000002", "iter_0000003", "iter_0000005"]


@pytest.mark.parametrize("foreign", ["of another run", "without a marker"])
def test_checkpoints_of_others_do_not_cost_a_run_its_own(tmp_path, foreign):
    from megatron_prepo.actor import checkpoint

    ownership.mark(tmp_path, ownership.RUN, identity="b2")
    for step in (1, 2, 3, 99):
        if step == 99:
            ownership.mark(tmp_path, ownership.RUN, identity="a1")
        path = checkpoint.checkpoint_path(tmp_path / "checkpoints", step)
        ownership.create(path, ownership.UNFINISHED)
        (path / "common.pt").touch()
        ownership.seal(path, checkpoint.KIND)
    if foreign == "without a marker":
        (path / ownership.MARKER).unlink()
    ownership.mark(tmp_path, ownership.RUN, identity="b2")
    kept = checkpoint.prune(tmp_path / "checkpoints", keep_last=1, keep_every=None)
    assert kept == {path: [path]}
    assert list(checkpoint.by_step(tmp_path / "checkpoints")) == [3, 99]


def test_weights_for_servers_get_a_folder_of_the_runs_own(tmp_path):
    """`weight_sync.directory` may be a folder of the user's, and of several runs."""
    from megatron_prepo.rollout.sglang.engine import weights_directory

    one, other = (
        weights_directory(str(tmp_path / name), str(tmp_path / "shared"))
        for name in ("one", "other")
    )
    assert one != other and one.parent == other.parent == tmp_path / "shared"
    assert one.name.startswith("megatron-prepo-")
    assert weights_directory(str(tmp_path / "run"), None) == tmp_path / "run" / "weight_sync"
