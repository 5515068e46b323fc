"""Folders that this program made are known by their marker, and only they are removed."""

import pytest

from megatron_prepo.errors import UserError
from megatron_prepo.files import atomic as durable
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
    assert ownership.marker(sealed)["files"] == ["inner/file"]
    assert ownership.strangers(sealed, "model") == []
    assert ownership.strangers(sealed, "dump") == [sealed], "of another kind"
    (sealed / "inner" / "mine").touch()
    (sealed / "link").symlink_to(sealed / "inner")
    assert ownership.strangers(sealed, "model") == [sealed / "inner" / "mine", sealed / "link"]


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
    """A user's file may have the name that a temporary one would have."""
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
        path = checkpoint.path_of(tmp_path, step)
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


def test_weights_for_servers_get_a_folder_of_the_runs_own(tmp_path):
    """`weight_sync.directory` may be a folder of the user's, and of several runs."""
    from megatron_prepo.rollout.sglang.engine import weights_directory
    from tests.unit.run.test_run_directory import config

    shared = {"weight_sync": {"directory": str(tmp_path / "shared")}}
    one, other = (
        weights_directory(config(tmp_path, run={"dir": str(tmp_path / name)}, **shared))
        for name in ("one", "other")
    )
    assert one != other and one.parent == other.parent == tmp_path / "shared"
    assert one.name.startswith("megatron-prepo-")
    assert weights_directory(config(tmp_path)) == tmp_path / "run" / "weight_sync"
