"""SGLang's own parser on the settings of `sglang:`, before a server is started."""

import pytest

from megatron_prepo.config import Config
from megatron_prepo.errors import UserError
from megatron_prepo.rollout.sglang import launch
from tests.unit.rollout.test_sglang_launch import config_of


def config(python: str, settings: dict) -> Config:
    return config_of(servers={"python": python}, sglang=settings)


def test_settings_of_every_kind_are_taken(sglang_python):
    taken = {"mem_fraction_static": 0.8, "trust_remote_code": True, "enable_metrics": False}
    taken |= {"chunked_prefill_size": -1, "cuda_graph_bs_decode": [1, 2], "load_format": None}
    launch.check(config(sglang_python, taken | {"json_model_override_args": {"a": 1}}))


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"mem_fraction_static": "1e-5x"}, "--mem-fraction-static: invalid float value"),
        ({"mem_fraction": 0.8}, "SGLang has no option --mem-fraction"),
    ],
)
def test_settings_that_sglang_would_not_take(sglang_python, setting, message):
    with pytest.raises(UserError, match=message):
        launch.check(config(sglang_python, setting))
