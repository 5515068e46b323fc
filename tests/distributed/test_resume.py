"""An actor that is saved and loaded again continues exactly as one that was never saved.

It is equal bit for bit under the layout that wrote it, and up to rounding under another.  One start
of 2 ranks goes through everything that needs a job; the tests look at its results.
"""

import contextlib
import json
import os
import resource
import shutil
import signal
import threading
from pathlib import Path

import pytest
import tiny_models
import torch
from ranks import join, on_ranks
from rounding import allowance
from tiny_models import actor_config

from megatron_prepo.errors import UserError
from megatron_prepo.records import ScoredSequence

LORA = {"lora": {"rank": 2}}
DISTRIBUTED = {"optimizer": {"use_distributed_optimizer": True}}
OFFLOADED = {
    "megatron": {
        "optimizer_cpu_offload": True,
        "optimizer_offload_fraction": 0.5,
        "overlap_cpu_optimizer_d2h_h2d": True,
    }
}
LAYOUTS = {
    "tp1": {},
    "tp2": {"parallel": {"tensor": 2}},
    "pp2": {"parallel": {"pipeline": 2}},
    "pp2 x 2": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
    # tied embeddings: on the last stage, the optimizer's buffer has two buckets
    "pp2 distributed": {"parallel": {"pipeline": 2}, **DISTRIBUTED},
    "pp2 x 2 distributed": {"parallel": {"pipeline": 2, "virtual_pipeline": 2}, **DISTRIBUTED},
    "dp2": {"parallel": {"data": 2}},
    "dp2 distributed": {"parallel": {"data": 2}, **DISTRIBUTED},
    "tp2 distributed": {"parallel": {"tensor": 2}, **DISTRIBUTED},
    "cp2": {"parallel": {"context": 2}},
    "cp2 distributed": {"parallel": {"context": 2}, **DISTRIBUTED},
    "tp1 bf16": {"model": {"dtype": "bfloat16"}},
    "tp2 bf16": {"model": {"dtype": "bfloat16"}, "parallel": {"tensor": 2}},
    "dp2 bf16 distributed": {
        "model": {"dtype": "bfloat16"},
        "parallel": {"data": 2},
        **DISTRIBUTED,
    },
    "tp1 adapters": LORA,
    "tp2 adapters": {"parallel": {"tensor": 2}, **LORA},
    "tp2 adapters distributed": {"parallel": {"tensor": 2}, **DISTRIBUTED, **LORA},
    "dp2 adapters distributed": {"parallel": {"data": 2}, **DISTRIBUTED, **LORA},
    "dp2 offloaded": {"parallel": {"data": 2}, **DISTRIBUTED, **OFFLOADED},
    "tp2 bf16 offloaded": {
        "model": {"dtype": "bfloat16"},
        "parallel": {"tensor": 2},
        **DISTRIBUTED,
        **OFFLOADED,
    },
    "dp2 bf16 offloaded": {
        "model": {"dtype": "bfloat16"},
        "parallel": {"data": 2},
        **DISTRIBUTED,
        **OFFLOADED,
    },
}
SAME_NUMBERS = [
    # the state of one optimizer is the other's, and so is what they compute
    ("dp2 bf16 distributed", "dp2 bf16 offloaded"),
    ("dp2 bf16 offloaded", "dp2 bf16 distributed"),
]
RESHARDED = [
    ("tp2", "tp1"),
    ("tp1", "tp2"),
    ("pp2", "tp2"),
    ("tp2", "dp2"),
    ("pp2 x 2", "tp2"),
    ("tp2", "pp2 x 2"),
    ("pp2 x 2 distributed", "dp2 distributed"),
    ("dp2 distributed", "pp2 x 2 distributed"),
    ("pp2 distributed", "dp2 distributed"),
    ("dp2 distributed", "tp2 distributed"),
    ("tp2 distributed", "dp2 distributed"),
    ("cp2", "tp1"),
    ("cp2 distributed", "tp2 distributed"),
    ("dp2 distributed", "cp2 distributed"),
    ("tp2 bf16", "tp1 bf16"),
    ("tp1 adapters", "tp2 adapters"),
    ("tp2 adapters", "tp1 adapters"),
    ("tp2 adapters distributed", "dp2 adapters distributed"),
    ("dp2 adapters distributed", "tp2 adapters distributed"),
    ("dp2 bf16 offloaded", "tp2 bf16 offloaded"),
    ("dp2 distributed", "dp2 offloaded"),
    *SAME_NUMBERS,
]
FROM_THE_START = ("tp1", "tp2 distributed", "dp2 bf16 offloaded")
IN_THE_BACKGROUND = ("tp2", "dp2 bf16 distributed", "dp2 bf16 offloaded")
DEADLINE_SECONDS = 240.0
SECTIONS = {
    "data": {"max_prompt_tokens": 16},
    "train": {"total_steps": 8, "micro_batch_tokens": 24},
    "optimizer": {"lr": 1e-2, "lr_warmup_steps": 3, "lr_decay_style": "cosine"},
}


class ActorOn:
    """An actor under a layout, on the first ranks; None on all further ranks."""

    def __init__(self, hf, layout, *, resumes=False):
        self.resumes = resumes
        sections = {name: dict(section) for name, section in SECTIONS.items()}
        for name, values in LAYOUTS[layout].items():
            sections[name] = sections.get(name, {}) | values
        self.config = actor_config(hf, **sections)

    def __enter__(self):
        from megatron_prepo.actor import parallel
        from megatron_prepo.actor.actor import Actor

        layout = self.config.parallel
        self.taking_part = join(layout.num_ranks)
        if not self.taking_part:
            return None
        parallel.initialize(layout, seed=1)
        return Actor(self.config, resumes=self.resumes)

    def __exit__(self, *_):
        from megatron_prepo.actor import parallel

        if self.taking_part:
            parallel.shut_down()


def batch():
    from megatron_prepo.actor.actor import TrainingSequence

    generator = torch.Generator().manual_seed(3)
    sequences = []
    for i, length in enumerate((9, 14, 5, 7)):
        tokens = torch.randint(3, tiny_models.VOCAB, (length,), generator=generator).tolist()
        sequences.append(
            TrainingSequence(
                ScoredSequence(tuple(tokens), start=3),
                old_logprobs_T=torch.full((length - 3,), -5.0),
                advantage=(-1.0) ** i,
                coefficient=0.25,
            )
        )
    return sequences


def state_of(actor):
    """Return weights, and the metrics of the last update: what is compared."""
    return {name: tensor.clone() for name, tensor in actor.hf_weights()}


def go_on(actor):
    metrics = [actor.update(batch()) for _ in range(2)]
    return {"metrics": metrics, "weights": state_of(actor), "updates": actor.updates}


def run_everything(hf, scratch):
    results, saved, uninterrupted = {}, {}, {}
    for layout in LAYOUTS:
        with ActorOn(hf, layout) as actor:
            if actor is None:
                continue
            for _ in range(2):  # the first has a learning rate of 0
                actor.update(batch())
            saved[layout] = actor.save(f"{scratch}/{layout.replace(' ', '-')}", step=1)
            sizes = {f.name: f.stat().st_size for f in saved[layout].glob("*.distcp")}
            results["bytes", layout] = [sizes[name] for name in sorted(sizes)]
            uninterrupted[layout] = go_on(actor)
    for source, target in [*((layout, layout) for layout in LAYOUTS), *RESHARDED]:
        with ActorOn(hf, target, resumes=True) as actor:
            if actor is None:
                continue
            path = Path(scratch, source.replace(" ", "-"), "iter_0000001")
            actor.load(path)
            results[source, target] = go_on(actor)
    for layout in FROM_THE_START:
        results |= {("before any update", layout): from_the_start(hf, layout, scratch)}
    results["disk full"] = disk_full(hf, scratch)
    results["in the background"] = in_the_background(hf, scratch)
    results["manifests"] = manifests(hf, scratch)
    results["checkpoints"] = run_checkpoints(hf, f"{scratch}/run")
    return results, uninterrupted


def from_the_start(hf, layout, scratch):
    """Return metrics of the first updates, without and with a checkpoint before them."""
    metrics = []
    for reads in (False, True):
        with ActorOn(hf, layout) as actor:
            if actor is None:
                continue
            if reads:
                actor.load(Path(scratch, f"start-{layout}", "iter_0000000"))
            else:
                actor.save(f"{scratch}/start-{layout}", step=0)
            metrics.append([actor.update(batch()) for _ in range(2)])
    return metrics


def disk_full(hf, scratch):
    """Run a save that runs out of space, then one that does not; a file-size limit stands in."""
    from megatron_prepo.actor import checkpoint, manifest

    with ActorOn(hf, "tp1") as actor:
        if actor is None:
            return None
        directory = f"{scratch}/full"
        whole = actor.save(directory, step=1)
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (50_000, before[1]))
        try:
            actor.save(directory, step=2)
            error = None
        except OSError as raised:
            error = str(raised)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        result = {
            "error": error,
            "left": list(checkpoint.by_step(directory)),
            "newest": checkpoint.newest(directory) == whole and manifest.problem(whole),
        }
        os.fork = None  # a fork whose rank is killed may wait forever
        result["later"] = manifest.problem(actor.save(directory, step=3))
        return result


def saved_meanwhile(tree, actor, fresh, first):
    """Make a step while the previous one is written; return what a killed run then resumes from."""
    from megatron_prepo.actor import parallel

    tree["checkpoint"]["asynchronous"] = True
    checkpoints, run, _ = fresh()
    restore(checkpoints)
    lines = [checkpoints.journal.directory / f"rollouts_{step}.0.jsonl" for step in (5, 6)]
    if first:
        checkpoints.journal.directory.mkdir(exist_ok=True)
        for line in lines:
            line.touch()
    with ParameterCounts() as held:
        updates = []
        for _ in range(2):
            actor.update(batch())
            run.num_steps += 1
            checkpoints.finish_if_done()
            updates.append(actor.updates)
            if len(updates) == 1:
                checkpoints.save()
        torch.distributed.barrier()
        states = parallel.from_rank_zero([line.exists() for line in lines])
        # a kill ends the threads: the files that exist now are those that remain
        then, run_then, _ = fresh()
        restore(then)
        before = (states, run_then.num_steps, actor.updates)
        held.go.set()
        checkpoints.finish()
    then, run_then, _ = fresh()
    torch.distributed.barrier()
    restore(then)
    states = parallel.from_rank_zero([line.exists() for line in lines])
    return updates, before, (states, run_then.num_steps, actor.updates)


class ParameterCounts:
    """Threads that write wait until they are released, on this rank only if requested."""

    def __init__(self, here=True):
        self.here, self.go = here, threading.Event()

    def __enter__(self):
        from megatron_prepo.actor.async_save import PendingCheckpoint

        self.write = write = PendingCheckpoint._write

        def wait_and_write(saving):
            assert not self.here or self.go.wait(DEADLINE_SECONDS)
            write(saving)

        PendingCheckpoint._write = wait_and_write
        return self

    def __exit__(self, *_):
        from megatron_prepo.actor.async_save import PendingCheckpoint

        PendingCheckpoint._write = self.write
        self.go.set()


def in_the_background(hf, scratch):
    """Save in the background while the state changes; with a rank that is late; with one whose disk
    is full."""
    from megatron_prepo.actor import checkpoint, manifest, parallel

    result, parallel.SIGN_OF_LIFE_SECONDS = {}, 0.05
    for layout in IN_THE_BACKGROUND:
        with ActorOn(hf, layout) as actor:
            there = [f"{scratch}/{kind}-{layout.replace(' ', '-')}" for kind in ("at-once", "late")]
            actor.update(batch())
            at_once = actor.save(there[0], step=1)
            with ParameterCounts() as held:
                saving = actor.start_saving(there[1], step=1)
                actor.update(batch())
                named_early = saving.done() or list(checkpoint.by_step(there[1]))
                held.go.set()
                saving.finish(timeout_minutes=1)
            late = checkpoint.newest(there[1])
            result[layout] = (named_early, sums_of(at_once), sums_of(late))

    with ActorOn(hf, "tp2") as actor:
        rank = torch.distributed.get_rank()
        with ParameterCounts(here=rank == 1):
            saving = actor.start_saving(there[0], step=2)
            result["late"] = error_of(lambda: saving.finish(timeout_minutes=0.01))
        saving.thread.join()
        torch.distributed.barrier()
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        if rank == 1:
            resource.setrlimit(resource.RLIMIT_FSIZE, (5_000, before[1]))
        saving = actor.start_saving(there[0], step=3)
        result["full"] = error_of(lambda: saving.finish(timeout_minutes=1))
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
        result["left"] = list(checkpoint.by_step(there[0]))
        result["later"] = manifest.problem(actor.save(there[0], step=4))
    return result


def sums_of(path):
    """Return the digests of a checkpoint's files except one, which holds a random number and its
    own path."""
    files = json.loads((path / "manifest.json").read_text())["files"]
    return {name: entry for name, entry in files.items() if name != ".metadata"}


def error_of(call):
    """Return the error that a call to write raises."""
    try:
        call()
    except OSError as error:
        return str(error)


def manifests(hf, scratch):
    """Return the reports on a checkpoint after each kind of damage."""
    from megatron_prepo.actor import manifest

    with ActorOn(hf, "tp2") as actor:
        path = actor.save(f"{scratch}/damage", step=3)
        first, said = torch.distributed.get_rank() == 0, {"whole": manifest.problem(path)}

        def after(name, damage, undo):
            if first:
                damage()
            torch.distributed.barrier()
            said[name] = manifest.problem(path)
            torch.distributed.barrier()
            if first:
                undo()
            torch.distributed.barrier()

        shard, kept = path / "__1_0.distcp", path / "kept"
        shutil.copy(shard, f"{scratch}/shard") if first else None

        def flip():
            content = bytearray(shard.read_bytes())
            content[len(content) // 2] ^= 1
            shard.write_bytes(content)

        def restore():
            shutil.copy(f"{scratch}/shard", shard)

        after("a bit flipped", flip, restore)
        after("cut short", lambda: os.truncate(shard, 100), restore)
        after("gone", lambda: shard.unlink(), restore)
        text = path / "manifest.json"
        after("manifest gone", lambda: text.rename(kept), lambda: kept.rename(text))
        whole = text.read_text()
        after("manifest cut", lambda: text.write_text(whole[:50]), lambda: text.write_text(whole))
        said["whole again"] = manifest.problem(path)
        return said


def of_another_run(fresh):
    """Return what a run with another identity restores: with its own rollouts, and without; then
    one whose checkpoints note none, as an older version's."""
    result = []
    for has_lines in (False, True):
        checkpoints, run, said = fresh("b2")
        run.has_lines = lambda found=has_lines: found
        try:
            result.append((restore(checkpoints), run.cut_to, said))
        except UserError as error:
            result.append((str(error), run.cut_to, said))
    checkpoints, run, _ = fresh(None)
    checkpoints.save()
    checkpoints, run, _ = fresh("b2")
    torch.distributed.barrier()
    return [*result, restore(checkpoints)]


def lost_directory(actor, fresh):
    """Lose a run's directory before a checkpoint is written, and before it has its name."""
    found = []
    for looks in (0, 1):
        checkpoints, run, _ = fresh()
        restore(checkpoints)
        before = list(checkpoint_names(checkpoints))
        run.num_steps += 5
        run.lost_after = looks
        try:
            checkpoints.save()
        except UserError as error:
            found.append(str(error))
        torch.distributed.barrier()
        found.append(checkpoint_names(checkpoints) == before)
        torch.distributed.barrier()
    return found


def checkpoint_names(checkpoints):
    """Return the names of the complete checkpoints."""
    from megatron_prepo.actor import checkpoint

    return list(checkpoint.by_step(checkpoints.directory))


def restore(checkpoints):
    """Restore as a run does, and return whether there was a checkpoint."""
    from megatron_prepo.trainer.resume import newest_checkpoint

    path = newest_checkpoint(checkpoints.parts["run"])
    checkpoints.restore(path)
    return path is not None


class Part:
    """Something with state, and the run."""

    def __init__(self, directory, identity, log):
        self.directory, self.log = Path(directory), log
        self.num_steps, self.cut_to = 0, None
        self.identity, self.lost_after = identity, None

    def check_directory(self):
        if self.lost_after == 0:
            raise UserError("the directory is lost")
        if self.lost_after:
            self.lost_after -= 1

    lost_directory_named = contextlib.nullcontext

    def state_dict(self):
        return {"num_steps": self.num_steps, "identity": self.identity}

    def load_state_dict(self, state):
        self.num_steps = state["num_steps"]

    def restart(self):
        self.cut_to = {}


def run_checkpoints(hf, run_directory):
    """Run 6 steps that keep few checkpoints, and return what is restored after damage to them."""
    from megatron_prepo.actor import checkpoint, parallel
    from megatron_prepo.config import from_tree, to_tree
    from megatron_prepo.rollout.engine import EngineError
    from megatron_prepo.run.rollout_journal import Journal
    from megatron_prepo.trainer.resume import Checkpoints

    result = {}
    with ActorOn(hf, "tp2") as actor:
        tree = to_tree(actor.config)
        tree["run"]["dir"] = run_directory
        tree["checkpoint"] |= {"keep_last": 2, "keep_every": 3}
        rank = torch.distributed.get_rank()
        first = rank == 0
        Path(run_directory).mkdir(exist_ok=True)

        def fresh(identity="a1"):
            said = []
            run = Part(run_directory, identity, said.append)
            journal = Journal(Path(run_directory, "journal"), rank, parallel.from_rank_zero)
            checkpoints = Checkpoints(
                from_tree(tree).checkpoint,
                Path(run_directory, "checkpoints"),
                actor,
                {"run": run},
                journal,
                said.append,
                timeout_minutes=10.0,
            )
            return checkpoints, run, said

        checkpoints, run, _ = fresh()
        result["nothing there"] = (restore(checkpoints), run.cut_to)
        for _ in range(6):
            actor.update(batch())
            run.num_steps += 1
            checkpoints.save()
        directory = checkpoints.directory
        torch.distributed.barrier()
        result["kept"] = list(checkpoint.by_step(directory))

        def restored():
            checkpoints, run, said = fresh()
            torch.distributed.barrier()
            return restore(checkpoints), run.num_steps, actor.updates, said

        result["the newest"] = restored()
        if first:
            path = checkpoint.checkpoint_path(directory, 6) / "__0_0.distcp"
            path.write_bytes(path.read_bytes()[:-1] + b"?")
            checkpoint.checkpoint_path(directory, 7).with_suffix(".partial").mkdir()
        torch.distributed.barrier()
        result["the newest is damaged"] = restored()

        checkpoints, run, _ = fresh()
        restore(checkpoints)
        actor.update(batch())
        run.num_steps += 1
        checkpoints.mark()
        try:
            with checkpoints.saved_if_the_engine_fails():
                raise EngineError("all servers are gone")
        except Exception as error:
            result["engine"] = (type(error).__name__, str(error), error.exit_code)
        result["after the engine"] = restored()
        result["another run's"] = of_another_run(fresh)
        result["lost"] = lost_directory(actor, fresh)
        result["asynchronous"] = saved_meanwhile(tree, actor, fresh, first)
        result["left behind"] = [path.name for path in directory.glob("*.partial")]
    return result


@pytest.fixture(scope="module")
def results(tmp_path_factory):
    hf = tiny_models.save(tiny_models.qwen3(tied=True), tmp_path_factory.mktemp("hf"))
    return on_ranks(2, run_everything, hf, str(tmp_path_factory.mktemp("checkpoints")))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_the_same_layout_goes_on_bit_for_bit(results, layout):
    for resumed, uninterrupted in results:
        if (layout, layout) in resumed:
            one, other = resumed[layout, layout], uninterrupted[layout]
            assert one["metrics"] == other["metrics"]
            assert one["updates"] == other["updates"] == 4
            for name, weight in other["weights"].items():
                assert torch.equal(one["weights"][name], weight), name


def test_updates_move_the_weights(results):
    """Weights must move, or nothing above is shown."""
    norms = [metrics["loss/grad_norm"] for metrics in results[0][1]["tp1"]["metrics"]]
    rates = [metrics["loss/learning_rate"] for metrics in results[0][1]["tp1"]["metrics"]]
    assert norms[0] != norms[1] and min(norms) > 0.01 and rates[0] != rates[1]


@pytest.mark.parametrize(("source", "target"), RESHARDED)
def test_another_layout_goes_on_up_to_rounding(results, source, target):
    """The resumed run is no further from the uninterrupted run, up to a factor, than uninterrupted
    runs of other layouts are from each other."""
    uninterrupted = results[0][1]
    dtype = torch.bfloat16 if "bf16" in source else torch.float32
    alike = [run for name, run in uninterrupted.items() if computes(name) == computes(source)]
    losses = [[update["loss/policy"] for update in run["metrics"]] for run in alike]
    allowed = [
        allowance(max(of_update) - min(of_update), abs(of_update[0]), dtype)
        for of_update in zip(*losses, strict=True)
    ]
    for resumed, _ in results:
        if (source, target) in resumed:
            assert resumed[source, target]["updates"] == 4
            for one, other, rounding in zip(
                resumed[source, target]["metrics"],
                uninterrupted[source]["metrics"],
                allowed,
                strict=True,
            ):
                assert abs(one["loss/policy"] - other["loss/policy"]) <= rounding
                assert one["loss/learning_rate"] == other["loss/learning_rate"]


def computes(layout):
    """Return what a layout computes, up to rounding."""
    return "bf16" in layout, "adapters" in layout


@pytest.mark.parametrize("layout", ["dp2", "dp2 distributed", "cp2", "dp2 bf16 distributed"])
def test_replicas_share_out_what_both_hold(results, layout):
    """Each replica writes a file, and none much more than half."""
    one, other = results[0][0]["bytes", layout]
    assert 0.4 < one / (one + other) < 0.6


@pytest.mark.parametrize(("source", "target"), SAME_NUMBERS)
def test_an_offloaded_optimizer_is_the_other_bit_for_bit(results, source, target):
    """Each resumes from the checkpoint of the other exactly as the other does."""
    for resumed, uninterrupted in results:
        one, other = resumed[source, target], uninterrupted[source]
        assert one["metrics"] == other["metrics"]
        assert all(torch.equal(one["weights"][name], w) for name, w in other["weights"].items())


@pytest.mark.parametrize("layout", FROM_THE_START)
def test_a_checkpoint_before_any_update_is_read(results, layout):
    for resumed, _ in results:
        if resumed["before any update", layout]:
            never_saved, read = resumed["before any update", layout]
            assert read == never_saved


def test_a_full_disk_costs_no_checkpoint_that_was_there(results):
    found = results[0][0]["disk full"]
    assert "rank 0 could not write" in found["error"] and "MiB are free" in found["error"]
    assert (found["left"], found["newest"], found["later"]) == ([1], None, None)


@pytest.mark.parametrize("layout", IN_THE_BACKGROUND)
def test_in_the_background_the_state_of_the_border_is_written_to_the_bit(results, layout):
    for resumed, _ in results:
        named_early, at_once, late = resumed["in the background"][layout]
        assert not named_early and len(late) >= 5 and at_once == late


def test_what_keeps_one_rank_from_writing_is_raised_on_all(results):
    for resumed, _ in results:
        found = resumed["in the background"]
        assert "is not written after 0.01 minutes" in found["late"]
        assert "rank 1 could not write" in found["full"] and "MiB are free" in found["full"]
        assert (found["left"], found["later"]) == ([1], None)


def test_a_kill_while_a_checkpoint_is_written_leaves_the_one_before(results):
    """Rollouts since then remain as well; they are dropped when the checkpoint is complete."""
    for resumed, _ in results:
        updates, killed, finished = resumed["checkpoints"]["asynchronous"]
        assert updates == [7, 8]
        assert killed == ([True, True], 6, 6)
        assert finished == ([False, True], 7, 7)


def test_damage_is_found_and_named(results):
    expected = {
        "whole": None,
        "a bit flipped": "has a damaged __1_0.distcp",
        "cut short": "has a damaged __1_0.distcp",
        "gone": "lacks __1_0.distcp",
        "manifest gone": "has no manifest",
        "manifest cut": "has a damaged manifest",
        "whole again": None,
    }
    for resumed, _ in results:
        assert resumed["manifests"] == expected


def test_checkpoints_are_kept_restored_and_passed_over(results):
    for rank, (resumed, _) in enumerate(results):
        found = resumed["checkpoints"]
        assert found["nothing there"] == (False, {})
        assert found["kept"] == [3, 5, 6]
        assert found["the newest"][:3] == (True, 6, 6)
        passed, steps, updates, said = found["the newest is damaged"]
        assert (passed, steps, updates) == (True, 5, 5)
        assert "iter_0000006 has a damaged __0_0.distcp" in said[0], rank


def test_checkpoints_of_another_run_are_skipped_and_cost_no_ledger(results):
    for rank, (resumed, _) in enumerate(results):
        begins, refused, older = resumed["checkpoints"]["another run's"]
        assert begins[:2] == (False, {})
        assert refused[1] is None and "would remove this run's ledger" in refused[0]
        for *_, said in (begins, refused):
            assert "iter_0000006 is another run's and is skipped" in said[0], rank
            assert len(said) == 3
        assert older is True


def test_a_run_that_lost_its_directory_writes_and_names_no_checkpoint(results):
    for resumed, _ in results:
        assert resumed["checkpoints"]["lost"] == 2 * ["the directory is lost", True]


def test_when_the_engine_fails_the_step_is_saved(results):
    for resumed, _ in results:
        kind, message, exit_code = resumed["checkpoints"]["engine"]
        assert kind == "Stopped" and exit_code == 1
        assert "all servers are gone" in message and "6 steps are saved" in message
        assert resumed["checkpoints"]["after the engine"][:3] == (True, 6, 6)
        assert resumed["checkpoints"]["left behind"] == []
