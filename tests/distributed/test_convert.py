"""A converted checkpoint holds the weights of its source, whatever layout cut it and reads it.

Hugging Face directories are imported here, outside of a job.  One start of 4 ranks then loads each
import under each layout, in Megatron's real model, and saves some; what was saved is exported here.
"""

import json
import math
import shutil

import pytest
import tiny_models
import torch
from ranks import join, on_ranks
from safetensors.torch import load_file
from tiny_models import VOCAB, actor_config
from transformers_scores import judged, largest_of_all, model_of, scores

from checkpoints_convert.convert import export_hf, import_hf
from megatron_prepo.actor.checkpoint import load_weights, newest
from megatron_prepo.errors import UserError
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.hf_files import HFTensors
from megatron_prepo.models.torch_dist import TorchDistReader
from megatron_prepo.records import ScoredSequence

MODELS = {
    "qwen2 tied": lambda: tiny_models.qwen2(tied=True),
    "qwen2": lambda: tiny_models.qwen2(tied=False),
    "qwen3": lambda: tiny_models.qwen3(tied=False),  # heads of 12, not 32 / 4
    "llama3": lambda: tiny_models.llama3(layers=4),
    "moe": lambda: tiny_models.qwen3_moe(),
}
IMPORTS = {
    # name: sizes of the layout that cuts the checkpoint
    "1x1": {},
    "2x1": {"tensor": 2},
    "2x2": {"tensor": 2, "pipeline": 2},
    "2x2x2": {"tensor": 2, "pipeline": 2, "expert": 2},
}
LAYOUTS = {
    # name: (parallel settings, megatron settings)
    "tp1": ({}, {}),
    "tp2": ({"tensor": 2}, {}),
    "tp4": ({"tensor": 4}, {}),  # more ranks than the 2 key-value groups
    "pp2": ({"pipeline": 2}, {}),
    "pp2 uneven": ({"pipeline": 2}, {"num_layers_in_first_pipeline_stage": 1}),
    "pp4": ({"pipeline": 4}, {}),
    "tp2 pp2": ({"tensor": 2, "pipeline": 2}, {}),
    "ep2": ({"expert": 2, "data": 2}, {}),
    "tp2 ep2": ({"tensor": 2, "expert": 2}, {}),
    "pp2 ep2": ({"pipeline": 2, "expert": 2, "data": 2}, {}),
    "ep4": ({"expert": 4, "data": 4}, {}),
}
DENSE_LAYOUTS = [name for name in LAYOUTS if "ep" not in name]
MOE_LAYOUTS = ["tp1", "tp2", "pp2", "ep2", "tp2 ep2", "pp2 ep2", "ep4"]
READS = [
    (model, layout, cut)
    for model in MODELS
    for layout in (MOE_LAYOUTS if model == "moe" else DENSE_LAYOUTS)
    for cut in IMPORTS
    if model == "moe" or cut != "2x2x2"
]
SAVES = [
    # model, layout, with the optimizer's state
    ("qwen2 tied", "tp2 pp2", False),
    ("qwen2", "tp4", False),
    ("qwen3", "tp2 pp2", True),
    ("llama3", "pp2 uneven", False),
    ("moe", "tp2 ep2", True),
    ("moe", "pp2 ep2", False),
    ("moe", "ep4", False),
]
SCORED = ["tp1", "tp2", "pp2", "ep2", "tp2 ep2"]
"""Layouts in which the mixture-of-experts model is scored."""
JUDGED = ["tp1", "tp2", "pp2", "tp2 pp2", "ep2", "tp2 ep2"]
TOLERANCE = 2e-5
"""Nats, as in `parity/test_transformers_logits.py`."""


def sequences():
    generator = torch.Generator().manual_seed(1)
    return [
        ScoredSequence(tuple(torch.randint(0, VOCAB, (n,), generator=generator).tolist()), start)
        for n, start in ((9, 1), (31, 3), (2, 1), (17, 16), (60, 1))
    ]


# What the ranks do


def load_everything(hf, megatron, scratch):
    """Return {case: what differs} on this rank."""
    from megatron.core import parallel_state

    from megatron_prepo.actor import checkpoint, parallel
    from megatron_prepo.actor.actor import Actor

    found = {}
    for layout, (sizes, settings) in LAYOUTS.items():
        if not join(math.prod(sizes.get(axis, 1) for axis in ("tensor", "pipeline", "data"))):
            continue
        for name in MODELS:
            if not any(read[:2] == (name, layout) for read in READS):
                continue
            config = actor_config(hf[name], parallel=sizes, megatron=settings)
            parallel.initialize(config.parallel, seed=1)
            model, expected = from_hf(config)
            record = read_hf_config(config.model.hf)
            cuts = [cut for cut in IMPORTS if (name, layout, cut) in READS]
            for cut in cuts:
                poison(model)
                checkpoint.load_weights([model], megatron[name, cut], record)
                found[name, layout, cut] = {
                    "parameters": differing(model, expected),
                    "export": oddities(model, hf[name]),
                }
            if layout in JUDGED:
                poison(model)
                load_by_mbridge(model, hf[name])
                found[name, layout, "mbridge"] = differing(model, expected)
            for with_optimizer in (o for n, at, o in SAVES if (n, at) == (name, layout)):
                directory = f"{scratch}/{name} {layout}"
                if with_optimizer:
                    Actor(config).save(directory, step=3)
                else:
                    checkpoint.load_weights([model], megatron[name, cuts[0]], record)
                    spoil_padding(model)
                    checkpoint.start_saving([model], directory, step=3).finish(5)
            if name == "moe" and layout in SCORED:
                source = {"megatron": megatron[name, cuts[-1]]}
                actor = Actor(actor_config(hf[name], parallel=sizes, model=source))
                scores = actor.score(sequences(), temperature=1.0)
                found["scores", layout] = [(s.logprobs_T, s.entropy_T) for s in scores]
            parallel_state.destroy_model_parallel()  # the next model in the same process group
        parallel.shut_down()
    return found


def from_hf(config):
    """Return this rank's model and the parameters that `load_hf_weights` gives it."""
    from megatron_prepo.actor.model import build_model
    from megatron_prepo.models.hf_to_megatron import load_hf_weights

    hf = read_hf_config(config.model.hf)
    (model,) = build_model(hf, config.model, config.parallel, config.megatron)
    poison(model)
    load_hf_weights([model], config.model.hf)
    return model, {name: p.detach().clone() for name, p in model.named_parameters()}


@torch.no_grad()
def poison(model):
    """Fill the parameters with NaN, so that one that is not loaded, or only partly, is detected."""
    for parameter in model.parameters():
        parameter.fill_(float("nan"))


def differing(model, expected):
    """Return the names of this rank's parameters that are not bit-equal to the expected ones."""
    return [
        name
        for name, parameter in model.named_parameters()
        if not torch.equal(parameter.view(torch.int32), expected[name].view(torch.int32))
    ]


def oddities(model, hf):
    """Return names that the model's stream of weights has changed, lacks or has in excess."""
    from megatron_prepo.models.megatron_to_hf import hf_weights

    source, streamed, changed = load_file(f"{hf}/model.safetensors"), [], []
    for name, tensor in hf_weights([model], VOCAB):
        streamed.append(name)
        if name in source and not torch.equal(tensor, source[name]):
            changed.append(name)
    return {"changed": changed, "names": sorted(streamed) == sorted(source)}


@torch.no_grad()
def spoil_padding(model):
    """Overwrite the padding after the vocabulary's end, which must never be exported."""
    from megatron.core import parallel_state

    for name, parameter in model.named_parameters():
        if "word_embeddings" in name or "output_layer" in name:
            first = parallel_state.get_tensor_model_parallel_rank() * len(parameter)
            parameter[max(0, VOCAB - first) :] = 7.0


def load_by_mbridge(model, hf):
    """Load into one of our models by mbridge's own tables and its own distribution to the ranks.

    It knows TransformerEngine's names only: it is shown our parameters under those.  And it takes
    the padded vocabulary from the model that it would have built itself.
    """
    from mbridge import AutoBridge
    from megatron.core import parallel_state

    bridge = AutoBridge.from_pretrained(hf, dtype=torch.float32)
    size = parallel_state.get_tensor_model_parallel_world_size()
    bridge.make_vocab_size_divisible_by = size
    bridge.vocab_size, bridge.padded_vocab_size = VOCAB, -(-VOCAB // size) * size
    # a tied model has changed this table for all models after it
    tied = model.share_embeddings_and_output_weights
    output = "model.embed_tokens.weight" if tied else "lm_head.weight"
    bridge._DIRECT_MAPPING = bridge._DIRECT_MAPPING | {"output_layer.weight": output}
    bridge.load_weights([UnderTransformerEnginesNames(model)], hf)


class UnderTransformerEnginesNames:
    """The part of a model that mbridge looks at, under TransformerEngine's names."""

    def __init__(self, model):
        self.decoder = model.decoder
        dense = not model.config.num_moe_experts
        self._parameters = {te_name(n, dense): p.data for n, p in model.named_parameters()}

    def state_dict(self):
        return self._parameters


def te_name(name, dense):
    name = name.replace(".input_layernorm.", ".self_attention.linear_qkv.layer_norm_")
    if dense:
        name = name.replace(".pre_mlp_layernorm.", ".mlp.linear_fc1.layer_norm_")
    if ".local_experts." in name:
        before, after = name.split(".local_experts.")
        expert, rest = after.split(".", 1)
        name = f"{before}.{rest}{expert}"
    return name


# What comes before and after them


@pytest.fixture(scope="module")
def hf(tmp_path_factory):
    root = tmp_path_factory.mktemp("hf")
    return {
        name: tiny_models.save(make(), root / name.replace(" ", "_"))
        for name, make in MODELS.items()
    }


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return tmp_path_factory.mktemp("saved")


@pytest.fixture(scope="module")
def results(hf, scratch, tmp_path_factory):
    root = tmp_path_factory.mktemp("megatron")
    megatron = {}
    for name, cut in dict.fromkeys((name, cut) for name, _, cut in READS):
        megatron[name, cut] = str(root / f"{name} {cut}")
        assert import_hf(hf[name], megatron[name, cut], **IMPORTS[cut]) == []
    return on_ranks(4, load_everything, hf, megatron, str(scratch))


def of_ranks(results, case):
    found = [rank[case] for rank in results if case in rank]
    assert found
    return found


@pytest.mark.parametrize(("model", "layout", "cut"), READS)
def test_an_import_is_read_as_the_weights_of_its_source(results, model, layout, cut):
    """Parameters of every rank equal those from the Hugging Face files, bit for bit, and back."""
    for found in of_ranks(results, (model, layout, cut)):
        assert found == {"parameters": [], "export": {"changed": [], "names": True}}


@pytest.mark.parametrize(("model", "layout"), [save[:2] for save in SAVES])
def test_what_megatron_saved_is_exported_bit_for_bit(results, hf, scratch, tmp_path, model, layout):
    """The optimizer's state is stored with the weights; the padding of the vocabulary stays."""
    of_ranks(results, (model, layout, "1x1"))
    export_hf(scratch / f"{model} {layout}", tmp_path / "out", hf=hf[model])
    assert_same_tensors(hf[model], tmp_path / "out")


@pytest.mark.parametrize(("model", "layout"), [save[:2] for save in SAVES if save[2]])
def test_a_checkpoint_of_training_records_its_model(results, hf, scratch, tmp_path, model, layout):
    """The checkpoint is exported, and loaded again, as that model only."""
    of_ranks(results, (model, layout, "1x1"))
    other = shutil.copytree(hf[model], tmp_path / "other")
    config = json.loads((tmp_path / "other" / "config.json").read_text())
    config["rope_parameters"]["rope_theta"] = 1e6
    (tmp_path / "other" / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"rope_theta is 10000.0 in its record and 1000000.0"):
        export_hf(scratch / f"{model} {layout}", tmp_path / "out", hf=other)
    saved = newest(scratch / f"{model} {layout}")
    with pytest.raises(UserError, match="rope_theta"):
        load_weights([], saved, read_hf_config(other))


@pytest.mark.parametrize(("model", "cut"), dict.fromkeys((model, cut) for model, _, cut in READS))
def test_export_is_the_inverse_of_import(hf, tmp_path, model, cut):
    import_hf(hf[model], tmp_path / "megatron", **IMPORTS[cut])
    export_hf(tmp_path / "megatron", tmp_path / "out")
    assert_same_tensors(hf[model], tmp_path / "out")


@pytest.mark.parametrize("model", ["qwen3", "moe"])
def test_a_checkpoint_has_the_keys_that_transformer_engines_layers_look_for(hf, tmp_path, model):
    """A checkpoint written on a CPU is read on a GPU: Megatron's torch-native layers use another
    name for a norm."""
    import_hf(hf[model], tmp_path / "megatron")
    layers = "self_attention.linear_qkv.layer_norm_weight self_attention.linear_qkv.weight "
    layers += "self_attention.q_layernorm.weight self_attention.k_layernorm.weight "
    layers += "self_attention.linear_proj.weight "
    layers += {
        "qwen3": "mlp.linear_fc1.layer_norm_weight mlp.linear_fc1.weight mlp.linear_fc2.weight",
        "moe": "pre_mlp_layernorm.weight mlp.router.weight "
        "mlp.experts.experts.linear_fc1.weight mlp.experts.experts.linear_fc2.weight",
    }[model]
    top = {"embedding.word_embeddings.weight", "output_layer.weight"}
    top |= {"decoder.final_layernorm.weight"}
    keys = set(TorchDistReader(tmp_path / "megatron" / "release").tensors)
    assert keys == top | {f"decoder.layers.{name}" for name in layers.split()}


def assert_same_tensors(one, other):
    with HFTensors(one) as a, HFTensors(other) as b:
        assert a.names() == b.names()
        changed = [n for n in a.names() if not torch.equal(a[n], b[n]) or a[n].dtype != b[n].dtype]
    assert changed == []


@pytest.fixture(scope="module")
def expected_scores(hf):
    [(exact, allowed)] = judged(hf["moe"], sequences(), (1.0,))
    return exact, allowed


@pytest.mark.parametrize("layout", SCORED)
def test_an_imported_mixture_of_experts_computes_what_transformers_does(
    results, expected_scores, layout
):
    exact, allowed = expected_scores
    for ours in of_ranks(results, ("scores", layout)):
        assert largest_of_all(ours, exact) <= allowed


def test_a_swap_of_two_experts_would_be_seen(hf, expected_scores):
    model, (exact, allowed) = model_of(hf["moe"]), expected_scores
    with torch.no_grad():
        for layer in model.model.layers:
            experts = layer.mlp.experts.down_proj
            experts[[0, 1]] = experts[[1, 0]].clone()
    assert largest_of_all(scores(model, sequences(), 1.0), exact) > 100 * allowed


@pytest.mark.parametrize(
    ("model", "layout"),
    [(m, at) for m in MODELS for at in JUDGED if any(read[:2] == (m, at) for read in READS)],
)
def test_mbridge_gives_every_rank_the_same_parameters(results, model, layout):
    """mbridge judges independently: it shares no code with us."""
    for found in of_ranks(results, (model, layout, "mbridge")):
        assert found == []
