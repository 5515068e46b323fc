"""Values of the `megatron:` section have the types of Megatron's own fields."""

import dataclasses

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from megatron.core.distributed import DistributedDataParallelConfig
from megatron.core.optimizer import OptimizerConfig
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.enums import AttnBackend
from tiny_models import actor_config

from megatron_prepo.actor.model import check_layout, megatron_overrides
from megatron_prepo.errors import UserError
from megatron_prepo.models.hf_config import read_hf_config
from tests.e2e.laptop import REPOSITORY

KINDS = (TransformerConfig, DistributedDataParallelConfig, OptimizerConfig)
PLAIN = (bool, int, float, str)
FIELDS = [(kind, field) for kind in KINDS for field in dataclasses.fields(kind)]


def test_every_default_that_a_file_can_hold_is_accepted_as_it_is():
    for kind, field in FIELDS:
        if field.default is None or isinstance(field.default, PLAIN):
            taken = megatron_overrides({field.name: field.default}, kind)[field.name]
            same_kind = isinstance(taken, bool) == isinstance(field.default, bool)
            assert taken == field.default and same_kind, field.name


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("attention_dropout", 1, 1.0),
        ("attention_dropout", 1e-5, 1e-5),
        ("moe_aux_loss_coeff", [0, 2.5], [0.0, 2.5]),
        ("recompute_modules", ["mlp"], ["mlp"]),
        ("window_size", [1, 2], (1, 2)),
        ("attention_backend", "flash", AttnBackend.flash),
        ("recompute_granularity", None, None),
    ],
)
def test_a_value_becomes_its_fields_type(name, value, taken):
    assert megatron_overrides({name: value}, TransformerConfig) == {name: taken}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("attention_dropout", "1e-5", "valid number"),
        ("attention_dropout", True, "valid number"),
        ("recompute_num_layers", 1.0, r"valid integer \(Optional\[int\]"),
        ("recompute_num_layers", True, "valid integer"),
        ("recompute_granularity", "ful", "'full' or 'selective'"),
        ("recompute_modules", "mlp", "valid array"),
        ("window_size", [1], "Field required"),
        ("apply_rope_fusion", "false", "valid boolean"),
        ("apply_rope_fusion", 0, "valid boolean"),
        ("attention_backend", "flush", "flash or fused or"),
        ("attention_backend", ["flash"], "flash or fused or"),
        ("activation_func", "gelu", "callable"),
        ("autocast_dtype", "bf16", "a configuration cannot express it"),
    ],
)
def test_a_value_of_another_type_is_refused_by_name(name, value, message):
    with pytest.raises(UserError, match=rf"setting megatron\.{name}=.*{message}"):
        megatron_overrides({name: value}, TransformerConfig)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | st.floats(-9, 9) | st.text(max_size=3),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=2), inner),
    max_leaves=3,
)


@settings(max_examples=200, deadline=None)
@given(st.sampled_from(FIELDS), JSON)
def test_any_value_is_taken_unchanged_or_refused_in_a_sentence(kind_and_field, value):
    kind, field = kind_and_field
    try:
        taken = megatron_overrides({field.name: value}, kind)[field.name]
    except UserError as error:
        assert f"setting megatron.{field.name}=" in str(error) and str(error).isprintable()
    else:
        assert taken == (tuple(value) if isinstance(taken, tuple) else value)
        assert isinstance(taken, bool) == isinstance(value, bool)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("rotary_interleaved", True, "it is set by the model's config.json"),
        ("layernorm_epsilon", 1e-5, "it is set by the model's config.json"),
        ("num_layers", 1, "it is set by the model's config.json"),
        ("softmax_scale", 0.5, "it is set by the model's config.json"),
        ("lr", 4e-4, r"set optimizer\.lr instead"),
        ("weight_decay", 0.1, r"set optimizer\.weight_decay instead"),
    ],
)
def test_what_another_place_decides_is_refused(name, value, message):
    """The engine and the export would compute another function, or one of two values would win."""
    base = REPOSITORY / "examples" / "laptop" / "base"
    config = actor_config(str(base), megatron={name: value})
    with pytest.raises(UserError, match=rf"^megatron\.{name}: .*{message}"):
        check_layout(config, read_hf_config(base))
    check_layout(actor_config(str(base), megatron={"attention_dropout": 0.1}), read_hf_config(base))
