"""The plan of a run: parameters and shards against Megatron itself, layouts, seconds, output."""

import dataclasses
import json
import re

import pytest
import yaml
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig, get_megatron_optimizer
from megatron.core.pipeline_parallel.schedules import get_pp_rank_microbatches
from rounding import approx

from megatron_prepo.actor.dry_run import count_parameters, each_rank, each_stage, pretend
from megatron_prepo.actor.model import build_model
from megatron_prepo.cli import main
from megatron_prepo.config import Config, ModelConfig, ParallelConfig, from_tree
from megatron_prepo.errors import UserError
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.shape import Shape
from megatron_prepo.plan import gpus, memory, step_time
from megatron_prepo.plan import layout_search as layouts
from megatron_prepo.plan import planner as plan
from megatron_prepo.plan import text as plan_text
from megatron_prepo.plan.gpus import GIB
from tests.unit.plan.test_memory import DENSE, EXPERTS

DDP = DistributedDataParallelConfig(grad_reduce_in_fp32=True)
MODEL = ModelConfig(hf="")
SEVEN = DENSE | {
    "hidden_size": 3584,
    "intermediate_size": 18944,
    "num_hidden_layers": 28,
    "num_attention_heads": 28,
    "num_key_value_heads": 4,
    "vocab_size": 152064,
    "max_position_embeddings": 8192,
}
TREE = {
    "run": {"dir": "unused"},
    "data": {"train": "absent", "eval": "absent", "max_prompt_tokens": 1024},
    "selection": {"num_candidates": 640, "num_selected": 128},
    "rollout": {"max_new_tokens": 3072},
    "train": {"total_steps": 100, "micro_batch_tokens": 4096, "mini_batches": 2},
    "optimizer": {"use_distributed_optimizer": True},
}


@pytest.fixture
def configured(tmp_path):
    """Configuration of a model that consists of `config.json` alone."""

    def make(hf: dict = SEVEN, **sections: dict) -> Config:
        (tmp_path / "config.json").write_text(json.dumps(hf))
        tree = TREE | {"model": {"hf": str(tmp_path)}}
        for name, values in sections.items():
            tree = tree | {name: tree.get(name, {}) | values}
        return from_tree(tree)

    return make


def stages_of(hf: dict, world_size: int, **sizes) -> list:
    return list(each_stage(hf, MODEL, ParallelConfig(**sizes), DDP, world_size=world_size))


@pytest.mark.parametrize(
    ("hf", "sizes"),
    [
        (DENSE | {"vocab_size": 257}, {"tensor": 2, "pipeline": 2}),
        (DENSE | {"vocab_size": 257, "tie_word_embeddings": True}, {"tensor": 2, "pipeline": 4}),
        (DENSE | {"tie_word_embeddings": True}, {"pipeline": 2, "virtual_pipeline": 2}),
        (DENSE, {"tensor": 4, "pipeline": 2}),  # more tensor ranks than key-value heads
        (EXPERTS, {"tensor": 2, "pipeline": 2, "expert": 4, "sequence": True}),
        (EXPERTS, {"context": 2, "pipeline": 2, "expert": 4}),
    ],
    ids=["padded", "tied", "interleaved", "few key-value heads", "experts", "context"],
)
def test_every_rank_of_a_stage_holds_what_its_first_one_does(hf, sizes):
    parallel = ParallelConfig(**sizes)
    world_size = parallel.num_ranks
    stages = stages_of(hf, world_size, **sizes)
    for rank, chunks in each_rank(hf, MODEL, parallel):
        stage = stages[rank // (world_size // parallel.pipeline)]
        assert sum(p.numel() for c in chunks for p in c.parameters()) == stage.parameters
        assert sum(len(chunk.decoder.layers) for chunk in chunks) == stage.layers


@pytest.mark.parametrize("tied", [False, True])
def test_parameters_do_not_depend_on_the_layout(tied):
    hf = DENSE | {"vocab_size": 257, "tie_word_embeddings": tied}
    whole = count_parameters(hf, stages_of(hf, 1))
    (alone,) = stages_of(hf, 1)
    assert whole == alone.parameters
    for sizes in (
        {"tensor": 2},
        {"pipeline": 2},
        {"tensor": 4, "pipeline": 4},
        {"pipeline": 2, "virtual_pipeline": 2},
    ):
        assert count_parameters(hf, stages_of(hf, 32, **sizes)) == whole


@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_micro_batches_in_flight_are_those_of_megatrons_schedule(chunks):
    for pipeline, micro_batches in ((2, 2), (2, 8), (4, 4), (4, 12)):
        parallel = ParallelConfig(pipeline=pipeline, virtual_pipeline=chunks)
        for stage in range(pipeline):
            with pretend(stage, pipeline, parallel):
                total, _, warm_up, _ = get_pp_rank_microbatches(
                    micro_batches, chunks, microbatch_group_size_per_vp_stage=pipeline
                )
            expected = min(warm_up + 1, total)
            assert plan.in_flight(parallel, stage, micro_batches) == expected


def test_uneven_pipelines_are_megatrons_own():
    megatron = {"num_layers_in_first_pipeline_stage": 1}
    parallel = ParallelConfig(pipeline=2)
    stages = list(each_stage(DENSE, MODEL, parallel, DDP, megatron, world_size=2))
    assert [stage.layers for stage in stages] == [1, 3]


@pytest.mark.parametrize(
    ("hf", "sizes"),
    [(DENSE, {"tensor": 2}), (EXPERTS, {"tensor": 2, "expert": 4, "sequence": True})],
    ids=["dense", "experts"],
)
def test_the_distributed_optimizer_splits_as_planned(hf, sizes):
    """Float32 numbers are those of Megatron's own optimizer, over all ranks of a job of 8."""
    parallel = ParallelConfig(**sizes)
    (stage,) = stages_of(hf, 8, **sizes)
    exact = sum(buffer.numel / buffer.ranks for buffer in stage.buffers)
    planned = sum(buffer.padded / buffer.ranks for buffer in stage.buffers)
    held = []
    for rank in range(8):
        with pretend(rank, 8, parallel):
            (model,) = build_model(hf, ModelConfig(hf="", layers="torch"), parallel)
            ddp = DistributedDataParallelConfig(
                grad_reduce_in_fp32=True, use_distributed_optimizer=True
            )
            wrapped = DistributedDataParallel(model.config, ddp, model)
            optimizer = get_megatron_optimizer(
                OptimizerConfig(
                    optimizer="adam", bf16=True, lr=1e-6, use_distributed_optimizer=True
                ),
                [wrapped],
                use_gloo_process_groups=False,
            )
            groups = optimizer.param_groups
            held.append(sum(p.numel() for group in groups for p in group["params"]))
            assert wrapped.buffers[0].grad_data.numel() == stage.buffers[0].padded
    assert sum(held) == 8 * exact
    assert max(held) <= planned == pytest.approx(exact, rel=0.01)


def test_bytes_of_a_rank_by_hand(configured):
    """Tensor 1, pipeline 1, data 8: 2 + 4 bytes per parameter, and 12, or 12 / 8."""
    config = configured(parallel={})
    answer = plan.make_plan(config, plan.PlanRequest(gpus=8, engine="sglang"))
    (rank,) = answer.ranks
    count = 7_615_616_512
    assert answer.parameters == answer.active_parameters == rank.parameters == count
    assert (rank.weights, rank.gradients) == (2 * count, 4 * count)
    assert rank.optimizer_whole == 12 * count
    assert rank.optimizer_split == pytest.approx(12 * count / 8, rel=1e-6)  # and padding
    assert rank.actor == rank.weights + rank.gradients + rank.optimizer_split
    whole = configured(parallel={}, optimizer={"use_distributed_optimizer": False})
    (unsplit,) = plan.make_plan(whole, plan.PlanRequest(gpus=8, engine="sglang")).ranks
    assert unsplit.actor == 18 * count
    assert unsplit.activations == rank.activations


@pytest.mark.parametrize(
    ("megatron", "fraction"),
    [({}, 1.0), ({"optimizer_offload_fraction": 0.25}, 0.25)],
)
def test_an_offloaded_optimizer_takes_host_memory(configured, megatron, fraction):
    """12 bytes per parameter leave the GPU; 16, with the gradient, arrive on the host."""
    sections = {"optimizer": {"use_distributed_optimizer": True}}
    offload = {"megatron": {"optimizer_cpu_offload": True, **megatron}}
    request = plan.PlanRequest(gpus=8)
    answer = plan.make_plan(configured(**sections, **offload), request)
    rank, plain = answer.ranks[0], plan.make_plan(configured(**sections), request).ranks[0]
    assert plain.optimizer_host == 0
    assert rank.optimizer_split == pytest.approx((1 - fraction) * plain.optimizer_split, abs=1)
    assert rank.optimizer_host == pytest.approx(fraction * plain.optimizer_split * 16 / 12, abs=1)
    assert plain.total - rank.total == pytest.approx(fraction * plain.optimizer_split, abs=1)
    host = f"offloaded optimizer: {rank.optimizer_host / GIB:.1f} GiB per rank"
    assert host in plan_text.text(answer, [])


def test_total_is_the_fuller_of_learning_and_generating(configured):
    config = configured(parallel={"tensor": 4, "sequence": True})
    ranks = plan.make_plan(config, plan.PlanRequest(gpus=8, engine="sglang")).ranks
    for rank in ranks:
        assert rank.activations + rank.head > rank.kv_cache
        learning = rank.activations + rank.head
        assert rank.total == rank.actor + rank.engine_weights + learning


def test_pipeline_stages_hold_activations_of_as_many_micro_batches_as_are_under_way(configured):
    config = configured(parallel={"pipeline": 4})
    ranks = plan.make_plan(config, plan.PlanRequest(gpus=8, engine="sglang")).ranks
    last = ranks[-1].activations
    assert [rank.activations / last for rank in ranks] == [4, 3, 2, 1]
    assert [rank.head > 0 for rank in ranks] == [False, False, False, True]


def test_a_kl_penalty_keeps_weights_twice_more(configured):
    request = plan.PlanRequest(gpus=8, engine="sglang")
    config = configured(parallel={"pipeline": 4}, loss={"kl_coef": 0.01})
    answer = plan.make_plan(config, request)
    for rank in answer.ranks:
        assert rank.reference == 2 * rank.weights
    without = plan.make_plan(configured(parallel={"pipeline": 4}), request)
    assert answer.seconds["update"] == without.seconds["update"]
    twice = [2 * seconds for seconds in without.seconds["old_logprobs"]]
    assert answer.seconds["old_logprobs"] == approx(twice)


def test_the_embedded_engine_is_whole_on_every_rank(configured):
    config = configured(parallel={"tensor": 4}, rollout={"batch_size": 100})
    answer = plan.make_plan(config, plan.PlanRequest(gpus=8))
    engine = answer.engine
    assert (engine.name, engine.count, engine.tensor) == ("embedded", 8, 1)
    assert engine.weights == 2 * 7_615_616_512 and engine.releases and engine.shared
    assert (engine.sequences_wanted, engine.sequences_at_once) == (128, 100)
    assert answer.ranks[0].kv_cache == 100 * 4096 * 56 * 1024


def test_sglangs_cache_takes_what_the_actor_leaves(configured):
    config = configured(parallel={"tensor": 4, "sequence": True})
    answer = plan.make_plan(
        config, plan.PlanRequest(gpus=8, engine="sglang", engine_tensor=2, reserve=40 * GIB)
    )
    engine = answer.engine
    assert engine.weights == 7_615_616_512
    room = answer.memory - 40 * GIB - answer.ranks[0].actor - engine.weights
    assert engine.sequences_wanted == 1024 // 4
    assert 0 < engine.sequences_at_once == room // (4096 * 28 * 1024) < 256
    full = plan.make_plan(
        config, plan.PlanRequest(gpus=8, engine="sglang", engine_tensor=2, reserve=0)
    )
    assert full.engine.sequences_at_once == 256


def test_a_fraction_is_the_memory_that_sglang_holds(configured):
    """0.4 of the GPU: weights and a cache of the rest; released, or kept during the update."""
    tree = {"parallel": {"tensor": 4, "sequence": True}, "sglang": {"mem_fraction_static": 0.4}}
    request = plan.PlanRequest(gpus=8, engine="sglang")
    kept = plan.make_plan(configured(**tree), request)
    (rank,) = kept.ranks
    pool = round(0.4 * kept.memory) - 2 * 7_615_616_512
    assert rank.kv_cache == pool and rank.engine_weights == 2 * 7_615_616_512
    assert kept.engine.sequences_at_once == pool // (4096 * 56 * 1024) > 0
    assert rank.total == rank.actor + rank.engine_weights + pool + rank.updating
    released = plan.make_plan(configured(**tree, servers={"release_memory": True}), request)
    (free,) = released.ranks
    assert free.total == rank.total - min(pool, rank.updating)
    assert kept.fits and released.fits


@pytest.mark.parametrize("releases", [True, False])
def test_without_a_fraction_the_most_that_fits_is_named(configured, releases):
    """SGLang would take most of the memory that it shares with a rank, also during an update if it
    keeps its cache."""
    tree = {"parallel": {"tensor": 4, "sequence": True}, "servers": {"release_memory": releases}}
    request = plan.PlanRequest(gpus=8, engine="sglang")
    answer = plan.make_plan(configured(**tree), request)
    assert not answer.fits
    (problem,) = answer.problems
    most = float(re.search(r"at most (0\.\d+)", problem)[1])
    for fraction, fits in ((most, True), (most + 0.01, False)):
        tried = configured(**tree, sglang={"mem_fraction_static": fraction})
        assert plan.make_plan(tried, request).fits == fits


@pytest.mark.parametrize("where", [{}, {"nodes": 1}, {"first_device": 4}], ids=str)
def test_an_engine_that_cannot_hold_the_weights_is_a_problem(configured, where):
    """14.2 GiB of weights in 0.15 of a GPU: beside the ranks, on a node, or on other GPUs."""
    tree = {"parallel": {"data": 4}, "sglang": {"mem_fraction_static": 0.15}}
    request = plan.PlanRequest(engine="sglang", gpu="h100")
    small = plan.make_plan(configured(**tree, servers={"tensor": 1, **where}), request)
    assert small.engine.sequences_at_once == 0 and not small.fits
    assert any("servers.tensor=1" in problem for problem in small.problems)
    wide = plan.make_plan(configured(**tree, servers={"tensor": 4, **where}), request)
    assert wide.engine.sequences_at_once > 0 and not wide.problems


def test_engines_of_their_own_gpus_generate_with_these_only(configured):
    tree = {"parallel": {"data": 8}}
    request = plan.PlanRequest(engine="sglang")
    shared, apart = (
        plan.make_plan(configured(**tree, servers={"nodes": nodes}), request) for nodes in (0, 2)
    )
    assert (shared.where.gpus, apart.where.gpus, apart.gpus) == (8, 24, 8)
    assert apart.engine.count == 16 and apart.ranks[0].engine_weights == 0
    assert apart.seconds["rollouts"] == approx([t / 2 for t in shared.seconds["rollouts"]])
    assert apart.seconds["update"] == shared.seconds["update"]
    seconds = sum(fast for fast, _ in apart.seconds.values())
    assert apart.gpu_hours[0] == approx(100 * seconds * 24 / 3600)


def test_evaluations_are_counted(configured, tmp_path):
    """100 steps, every 30: 3 during with 2 samples, 2 with 16; of 5 prompts, or of 1,000."""
    evaluated = {"every": 30, "samples_per_prompt": 16, "samples_during": 2}
    request = plan.PlanRequest(gpus=8, engine="sglang")
    config = configured(eval=evaluated)
    assert plan.make_plan(config, request).evaluations is None
    asked = dataclasses.replace(request, eval_prompts=1000)
    answer = plan.make_plan(config, asked)
    assert (answer.evaluations.number, answer.evaluations.completions) == (5, 38_000)
    last = configured(eval=evaluated | {"every": 50})  # the last step's is the one after the run
    assert plan.make_plan(last, asked).evaluations.number == 3
    steps = 38_000 / 1024
    expected = [t * steps * 8 / 3600 for t in answer.seconds["rollouts"]]
    assert answer.evaluation_hours == approx(expected)
    prompts = tmp_path / "eval.jsonl"
    prompts.write_text("{}\n" * 5)
    here = configured(eval=evaluated, data={"eval": str(prompts)})
    assert plan.make_plan(here, request).evaluations.completions == 190


def test_shorter_completions_are_faster_in_the_table_of_layouts_too(configured):
    request = plan.PlanRequest(gpus=8, engine="sglang")
    short = dataclasses.replace(request, prompt_tokens=128, response_tokens=384)
    limits, means = (layouts.suggest(configured(), asked)[0] for asked in (request, short))
    assert means.seconds < limits.seconds / 4


def test_a_thousand_gpus_and_more(configured):
    """Nothing but group sizes changes: the shard shrinks with the data-parallel ranks."""
    config = configured(parallel={"tensor": 4, "pipeline": 2, "sequence": True})
    shards = [
        plan.make_plan(config, plan.PlanRequest(gpus=count, engine="sglang"))
        .ranks[0]
        .optimizer_split
        for count in (256, 1024)
    ]
    assert shards[0] == pytest.approx(4 * shards[1], rel=1e-3)  # except for padding


@pytest.mark.parametrize(
    ("sections", "gpu_count", "expected"),
    [
        ({"parallel": {"tensor": 3}}, 6, "num_attention_heads=28"),
        ({"parallel": {"pipeline": 5}}, 10, "num_hidden_layers=28"),
        ({"parallel": {"tensor": 4}}, 6, "6 ranks do not fit parallel.tensor=4"),
        ({"parallel": {"data": 3}}, 4, "parallel.data=3"),
        (
            {"rollout": {"max_new_tokens": 8000}, "train": {"micro_batch_tokens": 16384}},
            4,
            "8192 positions",
        ),
        ({"parallel": {}, "selection": {"num_selected": 1}}, 64, "mini_batches=2"),
    ],
)
def test_what_cannot_be_is_refused(configured, sections, gpu_count, expected):
    with pytest.raises(UserError, match=expected):
        plan.make_plan(configured(**sections), plan.PlanRequest(gpus=gpu_count, engine="sglang"))


def test_experts_under_tensor_parallelism_need_sequence_parallelism(configured):
    """Megatron checks this too, but only in the first forward pass of training."""
    config = configured(EXPERTS | {"max_position_embeddings": 8192}, parallel={"tensor": 2})
    with pytest.raises(UserError, match=r"set parallel\.sequence=true"):
        plan.make_plan(config, plan.PlanRequest(gpus=2))


def test_tensor_parallelism_has_to_divide_the_width_of_an_expert(configured):
    hf = EXPERTS | {"max_position_embeddings": 8192, "moe_intermediate_size": 99}
    config = configured(hf, parallel={"tensor": 2, "sequence": True})
    with pytest.raises(UserError, match=r"parallel\.tensor=2 .* moe_intermediate_size=99"):
        plan.make_plan(config, plan.PlanRequest(gpus=2))


@pytest.mark.parametrize(
    ("asked", "expected"),
    [
        ({"gpus": 0}, "--gpus 0"),
        ({"gpus": 8, "gpu": "h10"}, "--gpu 'h10' is not one of a100, h100"),
        ({"gpus": 8, "engine": "vllm"}, "--engine 'vllm'"),
        ({"gpus": 8, "engine": "sglang", "engine_tensor": 3}, "servers.tensor=3 does not divide"),
        ({"gpus": 8, "engine": "sglang", "engine_tensor": 8}, "the model's 28 heads"),
        (
            {"gpus": 12, "engine": "sglang"},
            "12 ranks of the layout .or --gpus. do not fill nodes of 8",
        ),
    ],
)
def test_a_wrong_question_is_refused(configured, asked, expected):
    with pytest.raises(UserError, match=expected):
        plan.make_plan(configured(), plan.PlanRequest(**asked))


def test_a_custom_selector_is_planned_by_its_attributes(configured, tmp_path):
    text = "from megatron_prepo.selection import Selector\nclass Mine(Selector):\n"
    text += "    def __init__(self, config, *, total_steps, seed, pass_reward): ...\n"
    text += "    def choose(self, candidates, step): ...\n"

    def rollouts(attributes: str) -> tuple[int, int]:
        (tmp_path / "mine.py").write_text(f"{text}    {attributes}\n")
        config = configured(selection={"method": f"{tmp_path}/mine.py:Mine"})
        return plan.make_plan(config, plan.PlanRequest(gpus=8, engine="sglang")).rollouts

    assert rollouts("refills = False") == (102_400, 102_400)
    assert rollouts("refills = True") == (102_400, 512_000)
    assert rollouts("needs_pass_rates = True") == (100 * 768 * 8, 100 * 768 * 8)


def test_rollouts_of_a_run(configured):
    """128 x 8 per step; at most 640 x 8 with refilling; a budget ends with the step it is in."""

    def paid(method: str, **train) -> tuple[int, int]:
        config = configured(selection={"method": method}, train=train)
        return plan.make_plan(config, plan.PlanRequest(gpus=8, engine="sglang")).rollouts

    assert paid("prepo") == paid("random") == (102_400, 102_400)
    assert paid("greso") == (102_400, 512_000)
    assert paid("vip") == paid("pilot_commit") == (102_400, 102_400)
    assert paid("oracle") == (100 * 768 * 8, 100 * 768 * 8)
    assert paid("prepo", rollout_budget=2000) == (2048, 2048)


def test_a_budget_makes_a_run_of_refills_shorter(configured):
    """10,240 rollouts: 10 steps of 1,024, or 2 of 5,120; either way the rollouts cost the same."""
    config = configured(selection={"method": "greso"}, train={"rollout_budget": 10_240})
    answer = plan.make_plan(config, plan.PlanRequest(gpus=8, engine="sglang"))
    assert answer.rollouts == (10_240, 10_240)
    fast = {stage: both[0] for stage, both in answer.seconds.items()}
    slow = {stage: both[1] for stage, both in answer.seconds.items()} | {
        "rollouts": answer.seconds["rollouts"][1] / 5
    }
    in_2_steps = 2 * sum(fast.values()) + 8 * fast["rollouts"]
    assert answer.gpu_hours[0] == approx(in_2_steps * 8 / 3600)
    assert answer.gpu_hours[1] == approx(10 * sum(slow.values()) * 8 / 3600)


def test_seconds_are_the_published_runs_themselves():
    """The prediction for the very step that was published contains it, stage by stage."""
    for run in step_time.DENSE + step_time.EXPERTS:
        tokens = run.rollouts * run.tokens
        work = step_time.StepWork(run.parameters, run.active, 0, tokens, tokens, tokens, bubble=1.0)
        seconds = step_time.predict_seconds(
            work,
            gpu=gpus.GPUS["h100"],
            gpus=run.gpus,
            runs=step_time.published(run in step_time.EXPERTS),
        )
        assert seconds["perplexity"] == (0, 0)
        for stage in ("rollouts", "old_logprobs", "update", "weight_sync"):
            assert any(t == approx(run.seconds[stage]) for t in seconds[stage])


def test_seconds_scale_with_work_gpus_and_bandwidth():
    work = step_time.StepWork(7e9, 7e9, 1e5, 2e6, 3e6, 3e6, bubble=1.5)

    def seconds(gpu: str, count: int) -> dict:
        return step_time.predict_seconds(
            work, gpu=gpus.GPUS[gpu], gpus=count, runs=step_time.published(False)
        )

    one, twice, other = seconds("h100", 8), seconds("h100", 16), seconds("h200", 8)
    for stage in ("perplexity", "rollouts", "old_logprobs", "update"):
        assert one[stage] == approx([2 * t for t in twice[stage]])
    assert one["rollouts"] == approx([4.8 / 3.35 * t for t in other["rollouts"]])
    assert one["update"] == other["update"]
    assert one["weight_sync"] == twice["weight_sync"]
    # the 8B run: 28 s for 8.03e9 x 2048 x 795 on 8 GPUs
    assert one["update"][0] == approx(28 * 7e9 * 3e6 * 1.5 / (8.03e9 * 2048 * 795))


def test_least_communication_by_hand():
    """4 all-reduces of 2 layers x 10 tokens x 8 numbers x 2 bytes over 2 ranks; then gradients."""
    gpu = gpus.GPUS["h100"]
    asked = {"gpu": gpu, "layers": 2, "hidden": 8, "tokens": 10}
    alone = step_time.communication_seconds(**asked, tensor=2, data=1, gradient_bytes=1e9)
    assert alone == approx(4 * 2 * 10 * 8 * 2 / 450e9)
    near = step_time.communication_seconds(**asked, tensor=1, data=4, gradient_bytes=1e9)
    assert near == approx(1.5e9 / 450e9)
    far = step_time.communication_seconds(**asked, tensor=1, data=16, gradient_bytes=1e9)
    assert far == approx(2 * 15 / 16 * 1e9 / 50e9)


def test_messages_of_a_pipeline_by_hand():
    """10 tokens x 8 numbers x 2 bytes, there and back, for each chunk; tensor ranks send a part."""
    asked = {"gpu": gpus.GPUS["h100"], "layers": 0, "hidden": 8, "tokens": 10, "gradient_bytes": 0}
    inside = step_time.communication_seconds(**asked, tensor=1, data=2, pipeline=4)
    assert inside == approx(2 * 10 * 8 * 2 / 450e9)
    between = step_time.communication_seconds(**asked, tensor=2, data=2, pipeline=4, chunks=3)
    assert between == approx(3 * 2 * 10 * 8 * 2 / 2 / 50e9)


def test_exchanges_of_context_parallelism_by_hand():
    """Half of 32 queries, 8 keys and as many values, and the output goes to the other rank: back
    and forth, 2 layers x 10 tokens x 2 bytes; within a machine for any number of replicas."""
    shape = Shape.of(DENSE | {"hidden_size": 32, "num_attention_heads": 4, "head_dim": 8})
    shape = dataclasses.replace(shape, groups=1)
    for context, exchanged in ((1, 0), (2, (32 + 2 * 2 * 8 + 32) / 2)):
        assert memory.exchanged_numbers(shape, ParallelConfig(context=context)) == exchanged
    asked = {"gpu": gpus.GPUS["h100"], "layers": 2, "hidden": 8, "tokens": 10, "gradient_bytes": 0}
    near = step_time.communication_seconds(**asked, tensor=1, data=32, context=2, exchanged=48)
    assert near == approx(2 * 2 * 10 * 48 * 2 / 450e9)
    far = step_time.communication_seconds(**asked, tensor=1, data=32, context=16, exchanged=48)
    assert far == approx(2 * 2 * 10 * 48 * 2 / 50e9)


def test_context_ranks_on_several_machines_are_cautioned_against(configured):
    sizes = {"parallel": {"tensor": 4, "sequence": True, "context": 7}}
    answer = plan.make_plan(configured(**sizes), plan.PlanRequest(gpus=28, gpus_per_node=7))
    assert any("parallel.tensor=4 x parallel.context=7" in line for line in answer.cautions)


@pytest.mark.parametrize(
    ("hf", "sizes", "world_size"),
    [
        (DENSE | {"vocab_size": 257}, {"tensor": 2, "pipeline": 4}, 16),
        (DENSE | {"tie_word_embeddings": True}, {"tensor": 1, "pipeline": 2}, 4),
        (DENSE | {"tie_word_embeddings": True}, {"tensor": 2, "pipeline": 1}, 4),
        (EXPERTS, {"tensor": 2, "pipeline": 2, "expert": 4, "sequence": True}, 16),
        (DENSE, {"tensor": 1, "pipeline": 2, "virtual_pipeline": 2}, 4),
        (EXPERTS, {"tensor": 2, "pipeline": 1, "expert": 1, "sequence": True}, 4),
        (DENSE, {"tensor": 2, "pipeline": 2, "rank": 4}, 8),
    ],
)
def test_what_suggestions_are_made_of_is_the_real_model(configured, hf, sizes, world_size):
    """Composed from one layer, every stage has the parameters and the shard of the real one.

    One of them has adapters of the rank next to its sizes.
    """
    parallel = {name: size for name, size in sizes.items() if name != "rank"}
    config = plan.with_data(
        configured(
            hf,
            parallel=parallel,
            lora={"rank": sizes.get("rank", 0)},
            data={"max_prompt_tokens": 8},
            rollout={"max_new_tokens": 8},
        ),
        world_size,
    )
    request = plan.PlanRequest(gpus=world_size, engine="sglang", engine_tensor=1)
    real = plan.make_plan(config, request)
    parts = layouts._parts(config, hf)
    composed, engine = layouts._ranks(config, request, hf, Shape.of(hf), parts)
    for rank in composed:
        assert rank.parameters == real.ranks[rank.stage].parameters
        assert rank.total == pytest.approx(real.ranks[rank.stage].total, rel=0.02)
    assert engine.weights == pytest.approx(real.engine.weights, rel=0.02)


def test_adapters_have_gradients_and_optimizer_state_and_the_frozen_weights_have_none(configured):
    """Rank 16 on all projections of Qwen2.5-7B: 40,370,176 parameters, as `peft` counts them."""
    config = configured(lora={"rank": 16}, loss={"kl_coef": 0.1})
    answer = plan.make_plan(config, plan.PlanRequest(gpus=8, engine="sglang"))
    (rank,) = answer.ranks
    frozen, trained = 7_615_616_512, 40_370_176
    assert answer.parameters == answer.active_parameters == frozen
    assert rank.parameters == frozen + trained
    padding = 2**16  # of the buffer's end
    assert 0 <= rank.weights - 2 * (frozen + trained) < 2 * padding
    assert 0 <= rank.gradients - 4 * trained < 4 * padding
    assert 0 <= rank.optimizer_split - 12 * trained / 8 < 12 * padding
    assert (rank.optimizer_whole, rank.reference) == (12 * trained, 0)
    (whole,) = plan.make_plan(configured(), plan.PlanRequest(gpus=8, engine="sglang")).ranks
    shape, tokens = Shape.of(read_hf_config(config.model.hf)), config.train.micro_batch_tokens
    kept = memory.adapter_activations(shape, config.parallel, config.lora, tokens=tokens)
    assert abs(rank.activations - whole.activations - shape.layers * kept) <= 1
    assert memory.adapter_parameters(shape, config.lora) == trained


def test_suggestions_fit_and_come_in_order(configured):
    fraction = {"sglang": {"mem_fraction_static": 0.3}, "servers": {"release_memory": True}}
    config = configured(**fraction)
    request = plan.PlanRequest(gpus=8, engine="sglang")
    found = layouts.suggest(config, request)
    assert len(found) == 5
    assert [layout.seconds for layout in found] == sorted(layout.seconds for layout in found)
    memory = gpus.GPUS["h100"].memory
    for layout in found[:2]:
        sections: dict[str, dict] = {}
        for setting in layout.settings:
            name, _, value = setting.partition("=")
            section, _, key = name.partition(".")
            sections.setdefault(section, {})[key] = yaml.safe_load(value)
        answer = plan.make_plan(configured(**fraction, **sections), request)
        assert answer.fits
        assert max(rank.total for rank in answer.ranks) == pytest.approx(layout.total, rel=1e-3)
        assert layout.total + request.reserve <= memory


def test_suggestions_can_be_pasted_over_a_layout_that_has_its_data_parallelism(configured):
    fraction = {"sglang": {"mem_fraction_static": 0.3}, "servers": {"release_memory": True}}
    tree = {**fraction, "rollout": {"engine": "sglang"}}
    known = {"tensor": 4, "data": 2, "sequence": True}
    found = layouts.suggest(configured(parallel=known, **tree), plan.PlanRequest())
    changed = next(layout for layout in found if "parallel.data=" in " ".join(layout.settings))
    words = dict(word.split("=") for word in changed.settings if word.startswith("parallel."))
    pasted = {name.partition(".")[2]: yaml.safe_load(value) for name, value in words.items()}
    answer = plan.make_plan(configured(parallel=known | pasted, **tree), plan.PlanRequest())
    assert answer.where.ranks == 8


def test_an_engine_elsewhere_takes_no_memory_and_no_seconds_here(configured):
    here, elsewhere = (
        plan.make_plan(configured(), plan.PlanRequest(gpus=8, engine=engine))
        for engine in ("sglang", "elsewhere")
    )
    for beside, alone in zip(here.ranks, elsewhere.ranks, strict=True):
        assert alone.engine_weights == alone.kv_cache == 0 < beside.engine_weights
        assert alone.actor == beside.actor and alone.activations == beside.activations
    assert elsewhere.seconds["rollouts"] == (0, 0) and here.seconds["rollouts"][0] > 0
    assert elsewhere.seconds["update"] == here.seconds["update"]
    assert "not counted here, nor in the seconds" in plan_text.text(elsewhere, ())


def test_suggestions_undo_an_uneven_pipeline(configured):
    """Numbers of layers per stage belong to the configured pipeline, not to a suggested one."""
    uneven = {"num_layers_in_first_pipeline_stage": 13}
    config = configured(parallel={"pipeline": 2}, megatron=uneven)
    best = layouts.suggest(config, plan.PlanRequest(gpus=8, engine="sglang"))[0]
    assert "megatron.num_layers_in_first_pipeline_stage=" in best.settings


def suggested(config: Config) -> dict[tuple[str, ...], layouts.Layout]:
    """Return all suggestions for 16 GPUs, by the settings that define the pipeline."""
    found = layouts.suggest(config, plan.PlanRequest(gpus=16, engine="elsewhere"), most=99)
    return {
        tuple(word for word in layout.settings if "tensor" in word or "pipeline" in word): layout
        for layout in found
    }


def test_an_interleaved_pipeline_is_suggested_where_it_saves_idle_time(configured, monkeypatch):
    """Two data-parallel ranks have 8 micro-batches each of 2 x 8 longest sequences: 1 in 8 is idle,
    or 1 in 16 with two chunks; with 512 x 8 sequences, too little to be worth it."""
    chunks = "parallel.virtual_pipeline=2"  # of 7 layers; 4 do not divide 14
    tree = {"parallel": {"tensor": 4, "pipeline": 2}, "train": {"mini_batches": 1}}
    few = configured(**tree, selection={"num_selected": 2})
    many = configured(**tree, selection={"num_selected": 512})
    interleaved = suggested(few)[chunks,]
    assert suggested(many)[()].seconds > 0
    monkeypatch.setattr(layouts, "CHUNKS", (1,))
    plain = suggested(few)[()]
    messages = step_time.communication_seconds(
        gpu=gpus.GPUS["h100"],
        **{"tensor": 4, "data": 2, "pipeline": 2, "layers": 0, "gradient_bytes": 0},
        **{"hidden": 3584, "tokens": 8 * 4096},
    )
    busy = (plain.seconds - interleaved.seconds + messages) / (1 / 8 - 1 / 16)
    assert plain.seconds > busy > 0.8 * plain.seconds
    # both chunks keep their activations, and the first stage those of one more round
    assert interleaved.total > plain.total


def test_recomputation_is_suggested_only_where_it_is_needed(configured):
    """GPUs with memory for everything would compute a fourth more and gain nothing."""
    request = plan.PlanRequest(gpus=8, gpu="b200", engine="sglang")
    best = layouts.suggest(configured(), request)[0]
    assert not any("recompute" in setting for setting in best.settings)


def test_the_command_prints_a_narrow_table_and_json(configured, tmp_path, capsys):
    configured()
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(TREE | {"model": {"hf": str(tmp_path)}}))
    words = ["plan", str(path), "--gpus", "8", "--engine", "sglang"]
    layout = ["parallel.tensor=4", "parallel.sequence=true", "sglang.mem_fraction_static=0.3"]
    assert main([*words, *layout, "servers.release_memory=true"]) == 0
    table = capsys.readouterr().out
    assert max(map(len, table.splitlines())) <= 100
    for part in (
        "7,615,616,512 parameters",
        "\nfits: ",
        "rates published: Llama 3.1 8B",
        "102,400 rollouts",
    ):
        assert part in table, table
    assert main([*words, *layout, "train.micro_batch_tokens=262144", "--json"]) == 1
    answer = json.loads(capsys.readouterr().out)
    assert answer["parameters"] == 7_615_616_512 and not answer["fits"]
    assert answer["ranks"][0]["total"] > answer["memory"]
    assert main([*words, "parallel.tensor=3"]) == 2
    assert "num_attention_heads=28" in capsys.readouterr().err
    assert main([*words, "megatron.recompute_granularity=full"]) == 2
    assert "megatron-core rejected" in capsys.readouterr().err


def test_the_number_of_gpus_sets_data_parallelism_unless_an_override_does(
    configured, tmp_path, capsys
):
    configured()
    path = tmp_path / "run.yaml"
    tree = TREE | {"model": {"hf": str(tmp_path)}, "parallel": {"tensor": 4, "data": 2}}
    path.write_text(json.dumps(tree))
    for words, data in (([], 2), (["--gpus", "16"], 4), (["--gpus", "8", "parallel.data=2"], 2)):
        main(["plan", str(path), *words])
        assert f"tensor 4 x pipeline 1 x data {data}" in capsys.readouterr().out
    assert main(["plan", str(path), "--gpus", "16", "parallel.data=2"]) == 2
    assert "16 ranks do not fit" in capsys.readouterr().err


def test_the_table_says_when_nothing_fits(configured, tmp_path, capsys):
    configured(SEVEN | {"hidden_size": 16384, "num_attention_heads": 128})
    path = tmp_path / "run.yaml"
    path.write_text(json.dumps(TREE | {"model": {"hf": str(tmp_path)}}))
    assert main(["plan", str(path), "--gpus", "1"]) == 1
    table = capsys.readouterr().out
    assert "DOES NOT FIT" in table and "no layout fits" in table
