"""Replays of one rank's dump in other layouts; and non-finite numbers on one rank.

One start of 2 ranks goes through all of it; the tests look at its results.
"""

import io
import os
import pickle
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import tiny_models
import torch
from ranks import join, on_ranks
from tiny_models import VOCAB, actor_config
from torch.distributed.checkpoint.api import CheckpointException

from megatron_prepo.debug.replay import TOLERANCE
from megatron_prepo.errors import UserError
from megatron_prepo.records import Prompt, Rollout

LENGTHS = (5, 9, 3, 4, 12, 6, 8, 2)
LAYOUTS = {
    "TP1": ["train.micro_batch_tokens=16"],
    "TP2 SP": ["parallel.tensor=2", "parallel.sequence=true"],
    "PP2": ["parallel.pipeline=2", "train.micro_batch_tokens=48"],
    "DP2": ["parallel.data=2"],
    "CP2": ["parallel.context=2"],
    "DP2 distributed optimizer": [
        "parallel.data=2",
        "optimizer.use_distributed_optimizer=true",
        "loss.head=recompute",
    ],
}
POISONS = {
    # a name: settings, what rank 1 alone does wrong
    "a copy of a norm's gradient": ({"parallel": {"tensor": 2}}, "gradient"),
    "an activation of a tensor-parallel rank": ({"parallel": {"tensor": 2}}, "activation"),
    "a gradient of the second stage": ({"parallel": {"pipeline": 2}}, "gradient"),
    "an activation of the second stage": ({"parallel": {"pipeline": 2}}, "activation"),
    "one replica's gradient, once reduced": ({"parallel": {"data": 2}}, "gradient"),
    "an activation of one replica": ({"parallel": {"data": 2}}, "activation"),
    "an activation of a slice of the row": ({"parallel": {"context": 2}}, "activation"),
    "a gradient where the optimizer is on the host": (
        {
            "parallel": {"data": 2},
            "optimizer": {"use_distributed_optimizer": True},
            "megatron": {"optimizer_cpu_offload": True, "optimizer_offload_fraction": 0.5},
        },
        "gradient",
    ),
}
MAX_SKIPPED = 1


def config_of(hf, **sections):
    train = {"total_steps": 9, "mini_batches": 2, "micro_batch_tokens": 32}
    train["max_skipped_updates"] = MAX_SKIPPED
    limits = {"data": {"max_prompt_tokens": 4}, "rollout": {"max_new_tokens": max(LENGTHS)}}
    optimizer = {"lr": 1e-2} | sections.pop("optimizer", {})
    return actor_config(hf, train=train, optimizer=optimizer, **limits, **sections)


def made_up_step(actor):
    """Make up candidates, and 4 groups of 2 rollouts of random tokens to learn from."""
    from megatron_prepo.prepo.advantages import group_advantages
    from megatron_prepo.rewards.pool import Grade
    from megatron_prepo.selection.base import Candidates
    from megatron_prepo.trainer.groups import Groups
    from megatron_prepo.trainer.policy_update import TrainingBatch, score_rollouts, weigh_by_entropy

    generator = torch.Generator().manual_seed(3)

    def tokens(count):
        return tuple(torch.randint(0, VOCAB, (count,), generator=generator).tolist())

    prompts = [Prompt(f"p{k}", f"text {k}", "1", tokens(4), (0, 4)) for k in range(4)]
    rollouts = [
        Rollout(prompts[i // 2], tokens(n), (-0.5,) * n, f"completion {i}", True, actor.updates)
        for i, n in enumerate(LENGTHS)
    ]
    candidates = Candidates(prompts, torch.arange(1.0, 5.0))
    groups = Groups().extend(range(4), rollouts, (Grade(0.0), Grade(1.0)) * 4)
    config = actor.config
    old = score_rollouts(actor, rollouts, temperature=1.0, loss=config.loss)
    weight_N = weigh_by_entropy(config.weighting, groups, old, config.train.mini_batches)
    advantage_N = group_advantages(groups.rewards).flatten()
    return candidates, TrainingBatch(groups, advantage_N, old, weight_N)


def update_by(learner, config, batch):
    """Run the step's updates with what stands in for the actor."""
    from megatron_prepo.trainer.policy_update import update_policy

    return update_policy(
        learner,
        batch,
        aggregation=config.loss.aggregation,
        num_mini_batches=config.train.mini_batches,
    )


def run_everything(hf, root):
    """Compute, on each rank, what the tests look at."""
    results = {"dumped": dump_of_one_rank(hf, root)}
    for name in LAYOUTS:
        results[name] = replayed(root, LAYOUTS[name])
    results["one copy wrong"] = replayed(root, LAYOUTS["TP2 SP"], mutate=scale_one_shard)
    results["norms not summed"] = replayed(root, LAYOUTS["TP2 SP"], mutate=forget_the_norms)
    results["dumped adapters"] = dump_of_one_rank(hf, root / "adapters", lora={"rank": 2})
    results["adapters"] = replayed(root / "adapters", LAYOUTS["TP2 SP"])
    for name, (sections, what) in POISONS.items():
        results[name] = poisoned(hf, root / name.replace(" ", "-"), sections, what)
    return results


def dump_of_one_rank(hf, root, **sections):
    from megatron_prepo.actor import parallel
    from megatron_prepo.actor.actor import Actor
    from megatron_prepo.trainer.guarded_update import UpdateGuard
    from megatron_prepo.trainer.policy_update import step_record

    if not join(1):
        return None
    config = config_of(hf, debug={"dump_steps": [7]}, **sections)
    parallel.initialize(config.parallel, seed=1)
    actor = Actor(config)
    candidates, batch = made_up_step(actor)
    run = SimpleNamespace(directory=root, log=print, check_directory=lambda: None)
    learner = UpdateGuard(config, actor, run).of_step(
        step_record(7, candidates, batch, config.train.mini_batches)
    )
    metrics = update_by(learner, config, batch)
    hostile = hostile_checkpoints(actor, root / "dumps" / "step_0007" / "weights_0", root)
    parallel.shut_down()
    return {
        "metrics": metrics,
        "rollouts": batch.groups.rollouts,
        "old": batch.old_scores.scores,
        "hostile": hostile,
    }


class Evil:
    """Object that creates a file when it is unpickled."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.system, (f"touch {self.marker}",)


def hostile_checkpoints(actor, good, root):
    """Return the outcome of loading checkpoints that run a command when unpickled: (error, ran).

    One has it in place of the table of tensors, one in place of an object, where Megatron's own
    `load` does run it.
    """
    from megatron.core import dist_checkpointing
    from megatron.core.dist_checkpointing.mapping import ShardedObject

    from megatron_prepo.actor import checkpoint

    def attempt(what, load):
        marker = root / f"executed-{what}"
        try:
            load(marker)
            message = None
        except (UserError, CheckpointException, TypeError) as error:
            message = f"{type(error).__name__}: {error}"
        return message, marker.exists()

    def table(marker):
        directory = shutil.copytree(good, root / "hostile-table")
        (checkpoint.newest(directory) / ".metadata").write_bytes(pickle.dumps(Evil(marker)))
        checkpoint.load_weights(actor.chunks, directory, actor.hf)

    def saved_object(marker):
        directory = root / marker.name.replace("executed", "hostile")
        directory.mkdir()
        good = {"thing": ShardedObject("thing", "good", (1,), (0,))}
        dist_checkpointing.save(good, str(directory))
        put_in_place_of_an_object(directory, Evil(marker))
        return directory, {"thing": ShardedObject("thing", None, (1,), (0,))}

    def by_megatron(marker):
        directory, wanted = saved_object(marker)
        dist_checkpointing.load(wanted, str(directory))

    return {
        "table": attempt("table", table),
        "object": attempt("object", lambda m: checkpoint.load_without_running(*saved_object(m))),
        "object, by Megatron's own load": attempt("megatron", by_megatron),
    }


def put_in_place_of_an_object(directory, evil):
    """Make the table's entry for `thing` refer to other bytes."""
    metadata = pickle.loads((directory / ".metadata").read_bytes())
    # megatron-core 0.19 saves what all ranks have in common as an object, too
    ((index, place),) = (
        entry for entry in metadata.storage_data.items() if entry[0].fqn.startswith("thing")
    )
    file, data = directory / place.relative_path, io.BytesIO()
    torch.save(evil, data)
    metadata.storage_data[index] = replace(
        place, offset=file.stat().st_size, length=len(data.getvalue())
    )
    file.write_bytes(file.read_bytes() + data.getvalue())
    (directory / ".metadata").write_bytes(pickle.dumps(metadata))


def replayed(root, overrides, mutate=None):
    """Return the comparison's differing rows and largest errors; None on an unused rank."""
    from megatron_prepo.actor import parallel
    from megatron_prepo.actor.actor import Actor
    from megatron_prepo.debug.dump import read
    from megatron_prepo.debug.replay import replay

    if not join(2 if overrides[0].endswith("=2") else 1):
        return None
    dump = read(root / "dumps" / "step_0007", overrides)
    parallel.initialize(dump.config.parallel, seed=1)
    backward = Actor.backward
    if mutate:
        Actor.backward = lambda actor, batch: mutate(actor, lambda: backward(actor, batch))
    try:
        comparison = replay(dump)
    finally:
        Actor.backward = backward
        parallel.shut_down()
    return {
        "differing": [row.name for row in comparison.differing()],
        "numbers": {row.name: row.error for row in comparison.numbers},
        "tensors": {row.name: row.error for row in comparison.tensors},
        "text": comparison.text(),
    }


def scale_one_shard(actor, backward):
    """Make rank 1's rows of one matrix 1 % too large."""
    gradient = backward()
    if torch.distributed.get_rank() == 1:
        actor.chunks[0].decoder.layers[2].mlp.linear_fc2.weight.main_grad.mul_(1.01)
    return gradient


def forget_the_norms(actor, backward):
    """Skip sequence parallelism's sum over ranks of the gradients of norms."""
    for parameter in actor.chunks[0].parameters():
        parameter.sequence_parallel = False
    return backward()


def poisoned(hf, root, sections, what):
    """Make a good update, a NaN on rank 1 alone, a good one, then NaN after NaN; and, for
    comparison, the good ones without."""
    from megatron_prepo.actor import parallel
    from megatron_prepo.actor.actor import Actor
    from megatron_prepo.trainer.guarded_update import UpdateGuard
    from megatron_prepo.trainer.policy_update import step_record

    join(2)
    config = config_of(hf, **sections, debug={"max_skip_dumps": 2})
    parallel.initialize(config.parallel, seed=1)
    actor, untouched = Actor(config), Actor(config)
    candidates, step_batch = made_up_step(actor)
    record, said = step_record(3, candidates, step_batch, config.train.mini_batches), []
    run = SimpleNamespace(directory=root, log=said.append, check_directory=lambda: None)
    updates = UpdateGuard(config, actor, run)

    def update(poison):
        batches = []
        collect = SimpleNamespace(update=lambda batch: batches.append(batch))
        update_by(collect, config, step_batch)
        if not poison:
            return updates.of_step(record).update(batches[0]), untouched.update(batches[0])
        with poisoned_rank(actor, what):
            return updates.of_step(record).update(batches[0]), None

    update(poison=False)  # so that Adam has moments to lose
    before = state_of(actor)
    result = {"first": update(poison=True)[0], "unchanged": before == state_of(actor)}
    result["good"], result["expected"] = update(poison=False)
    result["weights equal"] = state_of(actor) == state_of(untouched)
    update(poison=True)
    try:
        update(poison=True)
        result["message"] = None
    except FloatingPointError as error:
        result["message"] = str(error)
    result["at the end"] = state_of(actor) == state_of(untouched)
    result["said"] = said
    parallel.shut_down()
    return result


class poisoned_rank:
    """Context in which rank 1 has a NaN in an activation, or in a gradient after all reductions."""

    def __init__(self, actor, what):
        self.actor, self.what = actor, what

    def __enter__(self):
        actor, self.hook = self.actor, None
        self.prepare_grads = actor.optimizer.prepare_grads
        if torch.distributed.get_rank() != 1:
            return
        layer = actor.chunks[0].decoder.layers[-1]
        if self.what == "activation":
            self.hook = layer.mlp.linear_fc1.register_forward_hook(with_a_nan)
            return

        def prepare_grads():
            layer.input_layernorm.weight.main_grad[3] = float("nan")
            return self.prepare_grads()

        actor.optimizer.prepare_grads = prepare_grads

    def __exit__(self, *_):
        self.actor.optimizer.prepare_grads = self.prepare_grads
        if self.hook:
            self.hook.remove()


def with_a_nan(module, inputs, output):
    output[0].view(-1)[5] = float("nan")
    return output


def state_of(actor):
    """Return all state of this rank that an update changes: weights, moments, schedule, version."""
    tensors = [p.detach() for p in actor.chunks[0].parameters()]
    tensors += [
        value
        for optimizer in actor.optimizer.chained_optimizers
        for state in optimizer.optimizer.state.values()
        for value in state.values()
        if isinstance(value, torch.Tensor)
    ]
    rate = actor.optimizer.param_groups[0]["lr"]
    numbers = (
        torch.cat([tensor.detach().double().flatten() for tensor in tensors]).numpy().tobytes()
    )
    return numbers, rate, actor.scheduler.num_steps, actor.updates


# The tests


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    return tmp_path_factory.mktemp("replay")


@pytest.fixture(scope="module")
def results(root):
    hf = tiny_models.save(tiny_models.qwen2(), root / "hf")
    return on_ranks(2, run_everything, hf, root)


def test_a_hostile_checkpoint_is_refused_and_not_executed(results):
    hostile = results[0]["dumped"]["hostile"]
    for what, refused in (("table", "posix.system"), ("object", "posix.system")):
        message, executed = hostile[what]
        assert message.startswith("UserError") and refused in message
        assert not executed
    _, executed = hostile["object, by Megatron's own load"]
    assert executed, "the test is harmless"


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_replay_agrees_with_the_dump_in_any_layout(results, layout):
    """Agreement is within the command's own tolerance, which mistakes exceed a thousandfold."""
    replay = results[0][layout]
    assert replay["differing"] == []
    assert len(replay["tensors"]) == 2 * 50 and len(replay["numbers"]) == 2 + 2 * 2
    assert max(*replay["tensors"].values(), *replay["numbers"].values()) <= TOLERANCE["float32"]


def test_a_replay_of_adapters_agrees_with_their_dump(results):
    """Gradients are those of the two matrices of 7 projections in each of 4 layers."""
    replay = results[0]["adapters"]
    assert replay["differing"] == []
    names = {name.split(": ")[1] for name in replay["tensors"]}
    assert len(names) == 2 * 7 * 4 and all(".lora_" in name for name in names)


def test_a_gradient_that_is_wrong_on_one_rank_is_named(results):
    assert results[0]["one copy wrong"]["differing"] == [
        "update 1: model.layers.2.mlp.down_proj.weight",
        "update 0: model.layers.2.mlp.down_proj.weight",
    ]


def test_norms_that_are_not_summed_are_named(results):
    names = {name.split(": ")[1] for name in results[0]["norms not summed"]["differing"]}
    tensors = {name for name in names if name.startswith("model.")}
    assert {"model.layers.0.input_layernorm.weight", "model.norm.weight"} <= tensors
    assert max(results[0]["norms not summed"]["tensors"].values()) > 1000 * TOLERANCE["float32"]
    assert all("norm" in name or "bias" in name for name in tensors)


@pytest.mark.parametrize("name", POISONS)
def test_what_is_not_finite_on_one_rank_is_skipped_on_all_and_leaves_no_trace(results, name):
    for rank in results:
        seen = rank[name]
        assert seen["first"] is None and seen["unchanged"]
        assert seen["good"] == seen["expected"] and seen["weights equal"]
        assert "2 in a row are more than train.max_skipped_updates=1" in seen["message"]
        assert seen["at the end"]
        assert "skipped: update 2: non-finite" in seen["said"][0]
        assert "dumps/step_0003" in seen["said"][0]
