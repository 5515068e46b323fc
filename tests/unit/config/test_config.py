"""Invalid configurations are refused by the name of the setting, with a suggestion."""

import dataclasses

import pytest
import yaml

from megatron_prepo import config as configuration
from megatron_prepo.config import (
    Config,
    FilePath,
    from_tree,
    literal,
    load,
    reference,
    to_tree,
    to_yaml,
)
from megatron_prepo.config.schema import POSTERIORS, PROJECTIONS
from megatron_prepo.errors import UserError
from megatron_prepo.selection import METHODS

REQUIRED = {
    "run": {"dir": "runs/one"},
    "model": {"hf": "models/tiny"},
    "data": {"train": "train.jsonl", "eval": "eval.jsonl"},
    "selection": {"num_candidates": 10, "num_selected": 2},
    "rollout": {"max_new_tokens": 64},
    "train": {"total_steps": 5},
}

OVERLAP = {
    "train__overlap": True,
    "rollout__engine": "sglang",
    "loss__importance": "truncated",
}
"""Settings that overlapped training needs."""


def tree(**changes):
    """Return the required settings, changed by `section__key=value` and `section={...}`."""
    result = {section: dict(values) for section, values in REQUIRED.items()}
    for name, value in changes.items():
        section, _, key = name.partition("__")
        if key:
            result.setdefault(section, {})[key] = value
        else:
            result[section] = value
    return result


def write(tmp_path, content):
    path = tmp_path / "config.yaml"
    path.write_text(content if isinstance(content, str) else yaml.safe_dump(content))
    return path


def all_fields():
    """Yield (section, field) of every setting; (section, None) for a section without fields."""
    for section in dataclasses.fields(Config):
        if dataclasses.is_dataclass(section.type):
            yield from ((section, field) for field in dataclasses.fields(section.type))
        else:
            yield section, None


# Defaults


def test_defaults_are_the_papers():
    config = from_tree(tree())
    assert config.selection.method == "prepo" and config.selection.rho_max == 1.0
    assert config.weighting.method == "relative_entropy" and config.weighting.mean == "sequence"
    assert config.weighting.clamp is None and config.weighting.include_zero_variance
    assert (config.loss.clip_low, config.loss.clip_high) == (0.2, 0.28)
    assert config.loss.aggregation == "seq-mean-token-sum"
    assert config.loss.kl_coef == config.loss.entropy_coef == 0.0
    assert config.rollout.samples_per_prompt == 8


@pytest.mark.parametrize(
    "name", [f"{section}.{key}" for section, values in REQUIRED.items() for key in values]
)
def test_a_required_setting_has_no_default(name):
    section, key = name.split(".")
    incomplete = tree()
    del incomplete[section][key]
    with pytest.raises(UserError, match=f"setting {name} is required"):
        from_tree(incomplete)


def test_settings_cannot_be_changed():
    config = from_tree(tree())
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.train.total_steps = 7


# Refusals


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"optimizer__weight_decy": 0.1}, "unknown setting optimizer.weight_decy .*weight_decay"),
        (
            {"selection__num_candidate": 1},
            "did you mean selection.num_candidates",
        ),
        ({"selecton": {}}, r"unknown setting selecton \(did you mean selection\?\)"),
        ({"loss__zzzzqqqqxxxx": 1}, "unknown setting loss.zzzzqqqqxxxx$"),
        ({"loss": 3}, "setting loss=3"),
        ({"train__total_steps": "many"}, "setting train.total_steps='many': .*integer"),
        ({"train__total_steps": 2.5}, "setting train.total_steps=2.5"),
        ({"model__dtype": "float8"}, "setting model.dtype='float8': .*'float32' or 'bfloat16'"),
        (
            {"selection__method": "best"},
            "selection.method=best is neither one of prepo, random, .* of the form FILE.py:CLASS",
        ),
        (
            {"selection__hive_band": 0.5},
            r"selection.hive_band=0.5 must be a list, such as selection.hive_band=\[0.5,1.0\]",
        ),
        (
            {"rollout__stop": "b"},
            r"rollout.stop='b' must be a list, such as rollout.stop=\[\"b\"\]",
        ),
        ({"selection__method": "mine.py"}, "selection.method=mine.py is neither one of"),
        ({"selection__method": "mine.py:a.b"}, "selection.method=mine.py:a.b is neither one of"),
    ],
)
def test_unknown_names_and_wrong_types_are_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        from_tree(tree(**change))


def test_all_mistakes_are_reported_at_once():
    with pytest.raises(UserError) as caught:
        from_tree(tree(model__dtype="float8", rollout__tempature=0.7, loss__clip_low=2.0))
    message = str(caught.value)
    assert "model.dtype" in message and "loss.clip_low=2.0" in message
    assert "rollout.tempature (did you mean rollout.temperature?)" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"selection__num_selected": 11}, r"num_selected=11 is more than .*num_candidates=10"),
        ({"selection__num_selected": 0}, r"selection\.num_selected=0 must be at least 1"),
        ({"selection__rho_max": 1.1}, r"selection\.rho_max=1\.1 must lie between 0 and 1"),
        ({"selection__rho_max": -0.1}, r"selection\.rho_max=-0\.1"),
        ({"selection__target_pass_rate": 1.1}, r"selection\.target_pass_rate=1\.1 must lie"),
        ({"selection__mopps_decay": -0.1}, r"selection\.mopps_decay=-0\.1 must lie"),
        ({"selection__vip_least": 2}, r"selection\.vip_least=2 must be at least 3"),
        ({"selection__vip_bandwidth": 0.0}, r"selection\.vip_bandwidth=0\.0 must be above 0"),
        ({"selection__pilot_rollouts": 1}, r"selection\.pilot_rollouts=1 must be at least 2"),
        ({"selection__pilot_evict": -0.5}, r"selection\.pilot_evict=-0\.5 must be at least 0"),
        ({"selection__pilot_band": (0.5, 0.2)}, r"selection\.pilot_band=\[0\.5, 0\.2\] must be"),
        ({"selection__vip_most": 3}, r"selection\.vip_most=3 must be at least 4"),
        (
            {"selection__method": "pilot_commit", "rollout__samples_per_prompt": 2},
            r"samples_per_prompt=2 must be above the 2 rollouts of a pilot",
        ),
        (
            {"selection__method": "vip", "rollout__samples_per_prompt": 4},
            r"samples_per_prompt=4 must lie between selection\.vip_least=4 and .*vip_most=32",
        ),
        (
            {"selection__method": "pilot_commit", "selection__pilot_rollouts": 9},
            r"samples_per_prompt=8 must be above the 9 rollouts of a pilot .*nothing to commit",
        ),
        ({"selection__dps_decay": 1.1}, r"selection\.dps_decay=1\.1 must lie"),
        ({"selection__dps_prior": 0.0}, r"selection\.dps_prior=0\.0 must be"),
        ({"selection__kgps_prior_variance": 0.0}, r"selection\.kgps_prior_variance=0\.0 must be"),
        ({"selection__kgps_drift": -1.0}, r"selection\.kgps_drift=-1\.0 must be at least 0"),
        ({"selection__kgps_warm_up": -1}, r"selection\.kgps_warm_up=-1 must be at least 0"),
        ({"selection__hive_band": [0.5, 0.5]}, r"selection\.hive_band=\[0\.5, 0\.5\] must be two"),
        ({"selection__hive_band": [0.5, 1.5]}, r"selection\.hive_band=\[0\.5, 1\.5\] must be two"),
        ({"train__rollout_budget": 0}, r"train\.rollout_budget=0 must be at least 1"),
        ({"selection__ppl_agreement": 1.1}, r"selection\.ppl_agreement=1\.1 must lie"),
        (
            {"selection__method": "foresight", "selection__ppl_from": "engine"},
            r"ppl_from=engine gives no entropies, .*set selection\.ppl_from=actor",
        ),
        ({"selection__horizon": 0}, r"selection\.horizon=0 must be at least 1"),
        ({"parallel__tensor": 0}, r"parallel\.tensor=0"),
        ({"parallel__data": 0}, r"parallel\.data=0"),
        ({"parallel__sequence": True}, r"parallel\.sequence=true needs parallel\.tensor > 1"),
        ({"parallel__timeout_minutes": 0}, r"parallel\.timeout_minutes=0"),
        ({"data__max_prompt_tokens": 1}, r"data\.max_prompt_tokens=1 must be at least 2"),
        ({"weighting__clamp": 1.0}, r"weighting\.clamp=1\.0 must be above 1"),
        ({"weighting__clamp": float("nan")}, r"weighting\.clamp=nan: .*finite"),
        ({"optimizer__weight_decay": -1}, r"optimizer\.weight_decay=-1"),
        ({"optimizer__adam_beta1": 1.5}, r"optimizer\.adam_beta1=1\.5"),
        ({"optimizer__adam_beta2": 1.0}, r"optimizer\.adam_beta2=1\.0"),
        ({"optimizer__adam_eps": 0}, r"optimizer\.adam_eps=0"),
        ({"parallel__expert": 4, "parallel__data": 2}, r"parallel\.expert=4 must divide"),
        ({"rollout__samples_per_prompt": 1}, r"samples_per_prompt=1 must be at least 2"),
        ({"rollout__temperature": 0.0}, r"rollout\.temperature=0\.0 must be above 0"),
        ({"rollout__max_new_tokens": 0}, r"rollout\.max_new_tokens=0"),
        (
            {"reward": {"low": 1.0, "high": 1.0}},
            r"reward\.low=1\.0 must be below reward\.high",
        ),
        ({"advantage__eps": 0.0}, r"advantage\.eps=0\.0 must be above 0"),
        ({"loss__clip_low": 1.0}, r"loss\.clip_low=1\.0 must lie between 0 and 1"),
        ({"loss__clip_high": 0.0}, r"loss\.clip_high=0\.0"),
        ({"loss__kl_coef": -1.0}, r"loss\.kl_coef=-1\.0"),
        ({"loss__entropy_coef": -1.0}, r"loss\.entropy_coef=-1\.0"),
        ({"loss__importance_high": 0.5}, r"importance_high=0\.5 must enclose 1"),
        ({"loss__importance_low": 1.5}, r"importance_low=1\.5 .* must enclose 1"),
        ({"loss__importance_low": -0.1}, r"importance_low=-0\.1 .* must enclose 1"),
        ({"loss__head_memory_mib": 0}, r"loss\.head_memory_mib=0"),
        ({"optimizer__lr": -1.0}, r"optimizer\.lr=-1\.0"),
        ({"optimizer": {"lr": 1e-6, "min_lr": 1e-5}}, r"optimizer\.min_lr=1e-05 must lie between"),
        ({"optimizer__clip_grad": 0.0}, r"optimizer\.clip_grad=0\.0"),
        ({"train__micro_batch_tokens": 0}, r"train\.micro_batch_tokens=0"),
        ({"eval__every": -1}, r"eval\.every=-1"),
        ({"eval__temperature": 0.0}, r"eval\.temperature=0 decodes greedily"),
        ({"checkpoint__every": -1}, r"checkpoint\.every=-1"),
        ({"optimizer__lr": float("nan")}, r"optimizer\.lr=nan"),
        ({"optimizer__lr": float("inf")}, r"optimizer\.lr=inf: .*finite"),
        ({"debug__dump_steps": [3, -1]}, r"debug\.dump_steps=-1 must be at least 0"),
        ({"train__max_skipped_updates": -1}, r"train\.max_skipped_updates=-1"),
        ({"debug__max_skip_dumps": -1}, r"debug\.max_skip_dumps=-1"),
    ],
)
def test_a_value_out_of_range_is_refused_by_name(change, message):
    with pytest.raises(UserError, match=message):
        from_tree(tree(**change))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"train__mini_batches": 3},
            r"train\.mini_batches=3 is more than .*num_selected=2",
        ),
        (
            {"train": {"total_steps": 5, "packing": False, "share_prefixes": True}},
            r"train\.share_prefixes=true needs train\.packing=true",
        ),
        (
            {"train__micro_batch_tokens": 1000},
            r"micro_batch_tokens=1000 is less than data\.max_prompt_tokens=1024 .*set it to 1088",
        ),
        (
            {"parallel__data": 17},
            r"parallel\.data=17 .* without any of the 16 rollouts",
        ),
        ({"parallel__data": 9, "train__mini_batches": 2}, r"parallel\.data=9 and train\.mini_batc"),
        (
            {"profile__steps": [4, 5]},
            r"steps=\[5\] is out of range: steps run from 0 to 4",
        ),
        ({"optimizer__lr_warmup_steps": 6}, r"lr_warmup_steps=6 must be at most .*total_steps=5"),
        (OVERLAP | {"rollout__engine": "embedded"}, r"overlap=true .*rollout\.engine=embedded"),
        (OVERLAP | {"loss__importance": "off"}, r"overlap=true .*set loss\.importance=truncated"),
    ],
)
def test_settings_that_contradict_each_other_are_refused(change, message):
    with pytest.raises(UserError, match=message):
        from_tree(tree(**change))


@pytest.mark.parametrize("method", METHODS)
def test_overlap_is_refused_to_methods_that_select_by_rollouts_of_the_step(method):
    settings = tree(**OVERLAP, selection__method=method)
    if not (
        METHODS[method].refills or METHODS[method].needs_pass_rates or METHODS[method].needs_updates
    ):
        assert from_tree(settings).train.overlap
        return
    needs = "their size" if METHODS[method].needs_updates else "rollouts of the step"
    message = rf"overlap=true .*selection\.method={method} needs {needs}"
    with pytest.raises(UserError, match=message):
        from_tree(settings)


@pytest.mark.parametrize("method", METHODS)
def test_predicted_advantages_need_a_method_with_a_posterior(method):
    settings = tree(selection__method=method, advantage__method="posterior")
    if method in POSTERIORS:
        assert from_tree(settings).advantage.method == "posterior"
        return
    message = rf"advantage\.method=posterior needs .*selection\.method={method} does not have"
    with pytest.raises(UserError, match=message):
        from_tree(settings)


@pytest.mark.parametrize(
    "penalty",
    [{"loss__kl_in_reward": True, "loss__kl_coef": 0.1}, {"rollout__overlong": "penalty"}],
)
def test_predicted_advantages_would_not_see_penalties(penalty):
    settings = tree(selection__method="mapp", advantage__method="posterior", **penalty)
    with pytest.raises(
        UserError, match=r"advantage\.method=posterior .*would not see the penalties"
    ):
        from_tree(settings)


def test_entropy_replaces_no_advantage_where_no_two_rewards_are_equal():
    settings = tree(advantage__method="rl_zvp", loss__kl_in_reward=True, loss__kl_coef=0.1)
    with pytest.raises(UserError, match=r"rl_zvp has no effect with loss\.kl_in_reward=true"):
        from_tree(settings)


def test_overlap_with_all_that_it_needs_is_no_contradiction():
    assert from_tree(tree(**OVERLAP)).train.overlap


def test_the_edges_of_the_ranges_are_allowed():
    """K = |B|, one rank per rollout, one mini-batch per group, and a learning rate of zero."""
    from_tree(tree(selection={"num_candidates": 2, "num_selected": 2, "rho_max": 0.0}))
    from_tree(tree(parallel__data=16))
    from_tree(tree(parallel__data=8, train={"total_steps": 5, "mini_batches": 2}))
    from_tree(tree(optimizer={"lr": 0.0, "min_lr": 0.0, "lr_warmup_steps": 5}))
    from_tree(tree(parallel={"tensor": 2, "sequence": True}))


@pytest.mark.parametrize(
    ("servers", "message"),
    [
        ({"urls": ["a:1"]}, r"servers\.urls: 'a:1' must start with http"),
        ({"urls": ["http://a:1", "http://a:1"]}, "names a server twice"),
        ({"count": 0}, r"servers\.count=0 must be at least 1"),
        ({"host": "[::1]"}, r"servers\.host='\[::1\]' must be a host name or an IP address"),
        ({"host": "0.0.0.0:30000"}, r"without port and brackets"),
        ({"host": "http://10.0.0.7"}, r"servers\.host='http://10"),
        ({"host": "fe80::1%eth0"}, r"servers\.host='fe80::1%eth0'"),
        ({"host": ""}, r"servers\.host='' must be"),
        ({"straggler_seconds": 0.0}, r"servers\.straggler_seconds=0.0 must be above 0"),
    ],
)
def test_servers_that_cannot_be_are_refused(servers, message):
    with pytest.raises(UserError, match=message):
        from_tree(tree(servers=servers))


# Files and overrides


def test_overrides_change_the_file(tmp_path):
    """Values may be numbers, texts, truth values, null, lists for other libraries or new
    sections."""
    path = write(tmp_path, tree(optimizer__lr=1e-3, parallel__data=2))
    config = load(
        path,
        [
            "optimizer.lr=2e-6",
            "train.total_steps=7",
            "run.dir=runs/a=b",
            "run.overwrite=true",
            "parallel.data=",
            "weighting.clamp=2",
            "megatron.recompute_granularity=full",
            "megatron.adam_eps=1.0e-7",
        ],
    )
    assert config.optimizer.lr == 2e-6
    assert config.train.total_steps == 7
    assert config.run.dir == "runs/a=b" and config.run.overwrite is True
    assert config.parallel.data is None and config.weighting.clamp == 2.0
    assert config.megatron == {"recompute_granularity": "full", "adam_eps": 1e-7}
    assert config.model.hf == "models/tiny"


def test_the_last_override_counts(tmp_path):
    config = load(write(tmp_path, tree()), ["train.seed=2", "train.seed=3"])
    assert config.train.seed == 3


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("train.total_steps", "must have the form section.key=value"),
        ("=3", "must have the form"),
        (".seed=3", "must have the form"),
        ("train.=3", "must have the form"),
        ("train.total_steps.more=3", "total_steps is a value, not a section"),
        ("train.seed=[1", "not valid YAML"),
        ("train.sead=1", r"unknown setting train\.sead \(did you mean train\.seed\?\)"),
        ("train.seed=", r"setting train\.seed=None"),
    ],
)
def test_a_wrong_override_is_refused(tmp_path, override, message):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path, tree()), [override])


@pytest.mark.parametrize(
    ("content", "message"),
    [("run: [", "not valid YAML"), ("- a\n- b", "not a list"), ("", "setting run.dir is required")],
)
def test_a_file_that_is_no_configuration_is_refused(tmp_path, content, message):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path, content))


def test_a_missing_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no such configuration file"):
        load(tmp_path / "absent.yaml")


# What a word is


@pytest.mark.parametrize(
    ("key", "word", "value"),
    [
        ("loss.importance", "off", "off"),  # false to YAML 1.1
        ("run.dir", "010", "010"),
        ("run.dir", "yes", "yes"),
        ("run.dir", "1:30", "1:30"),
        ("run.dir", "2001-01-01", "2001-01-01"),
        ("run.dir", "1e3", "1e3"),
        ("run.wandb_project", "no", "no"),
        ("run.wandb_project", "null", None),
        ("run.wandb_project", "~", None),
        ("train.seed", "010", 10),  # 8 to YAML 1.1
        ("train.seed", "0x10", 16),
        ("train.seed", "0o17", 15),
        ("train.seed", "-7", -7),
        ("optimizer.lr", "4e-4", 4e-4),  # a text to YAML 1.1
        ("optimizer.lr", "1", 1.0),
        ("optimizer.lr", ".5", 0.5),
        ("run.overwrite", "True", True),
        ("profile.steps", "[01, 3]", (1, 3)),
        ("servers.urls", "[http://10.0.0.7:30000]", ("http://10.0.0.7:30000",)),
        ("sglang.a_setting", "1e-5", 1e-5),
        ("sglang.a_setting", "off", "off"),
        ("sglang.a_setting", "'010'", "010"),
        ("megatron.a_setting", "[010, 1:30, ~, {a: yes}]", [10, "1:30", None, {"a": "yes"}]),
    ],
)
def test_a_settings_type_decides_what_a_word_is_in_a_file_and_in_an_override(
    tmp_path, key, word, value
):
    section, name = key.split(".")
    text = to_yaml(from_tree(tree()))
    path = write(tmp_path, text)
    by_override = load(path, [f"{key}={word}"])
    (tmp_path / "dotted").mkdir()
    changed = tree()
    changed.get(section, {}).pop(name, None)
    in_file = load(write(tmp_path / "dotted", yaml.safe_dump(changed) + f"{key}: {word}\n"))
    for config in (by_override, in_file):
        of_section = to_tree(config)[section]
        assert of_section[name] == value and type(of_section[name]) is type(value)


@pytest.mark.parametrize(
    "override",
    [
        *("train.seed=1:30", "train.seed=yes", "train.seed=true", "train.seed=1.0"),
        *("train.seed='1'", "train.seed=1_000", "train.seed=1 # one", "train.seed=1 2"),
        *("optimizer.lr=true", "optimizer.lr='1'", "optimizer.lr=1e-5x", "optimizer.lr=1,5"),
        *("run.overwrite=yes", "run.overwrite=1", "run.overwrite='true'", "run.dir=", "run.dir=~"),
        *("profile.steps=3", "profile.steps=[yes]", "profile.steps=[1.0]", "run.dir=null"),
        *("train.seed=[1]", "train.seed={a: 1}", "optimizer.lr=1e400", "optimizer.lr=.nan"),
    ],
)
def test_a_word_of_another_type_is_refused_by_the_settings_name(tmp_path, override):
    key = override.partition("=")[0]
    with pytest.raises(UserError, match=f"setting {key}[=:.]"):
        load(write(tmp_path, tree()), [override])


@pytest.mark.parametrize("name", ["runs/a #1", "a: b", " a", "- a", "[a", "{a", "a'b", "*a", "%a"])
def test_a_text_typed_in_the_shell_is_taken_as_it_is(tmp_path, name):
    assert load(write(tmp_path, tree()), [f"run.dir={name}"]).run.dir == name


def test_a_text_in_quotes_is_without_them(tmp_path):
    """The quotes are removed as in a file, and as overrides have always been read."""
    path = write(tmp_path, tree())
    assert load(path, ["run.dir='runs/a #1'"]).run.dir == "runs/a #1"
    assert load(path, ['run.dir="a\\nb"']).run.dir == "a\nb"


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("04:00:00", str, "04:00:00"),  # 14400 to YAML 1.1
        ("010", str | None, "010"),
        ("010", int, 10),
        ("null", str | None, None),
        ("H100:8", str | list[str] | None, "H100:8"),
        ("[010, off]", str | list[str] | None, ["010", "off"]),
        ("[{claim: 010}]", list[dict[str, str]], [{"claim": 10}]),
    ],
)
def test_a_field_of_a_launchers_executor_is_read_by_its_type(text, kind, value):
    assert configuration.value_for(text, kind, "--with x: the value") == value


def test_home_and_variables_are_expanded_in_paths(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/ann")
    monkeypatch.setenv("DATA", "/data/sets")
    overrides = ["run.dir=~/run", "data.train=$DATA/a.jsonl", "data.eval=${DATA}2/$DATA"]
    overrides += ["reward.function=~/r.py:f", "model.megatron=$HOME/m", "run.wandb_project=$DATA"]
    overrides += ["selection.method=$HOME/s.py:S"]
    config = load(write(tmp_path, tree()), overrides)
    assert config.run.dir == "/home/ann/run"
    assert (config.data.train, config.data.eval) == ("/data/sets/a.jsonl", "/data/sets2//data/sets")
    assert config.reward.function == "/home/ann/r.py:f" and config.model.megatron == "/home/ann/m"
    assert config.selection.method == "/home/ann/s.py:S" and config.selection.name == "s.py:S"
    assert config.run.wandb_project == "$DATA"  # no path
    assert load(write(tmp_path, to_yaml(config))) == config
    paths = [f"{s.name}.{f.name}" for s, f in all_fields() if f and FilePath in (
        f.type, *getattr(f.type, "__args__", ()))]  # fmt: skip
    assert paths == [
        *("run.dir", "model.hf", "model.megatron", "data.train", "data.eval", "data.few_shot"),
        *("selection.method", "servers.python", "weight_sync.directory", "reward.function"),
    ]


@pytest.mark.parametrize(
    ("path", "named"),
    [("$ABSENT/a", "ABSENT"), ("a/${ABSENT}", "ABSENT"), ("$EMPTY/a", "EMPTY"), ("~no_one/a", "~")],
)
def test_a_variable_or_user_that_is_not_there_is_named(tmp_path, monkeypatch, path, named):
    """`$RUNS/a` would otherwise be `/a`, or a directory called `$RUNS`."""
    monkeypatch.delenv("ABSENT", raising=False)
    monkeypatch.setenv("EMPTY", "")
    with pytest.raises(UserError, match=rf"setting run\.dir: .*{named}"):
        load(write(tmp_path, tree()), [f"run.dir={path}"])


def test_what_a_variable_holds_is_not_expanded_again(tmp_path, monkeypatch):
    """Expansion happens once, as in a shell, and not when the saved configuration is read."""
    monkeypatch.setenv("OUTER", "/a/$INNER")
    monkeypatch.setenv("INNER", "b")
    config = load(write(tmp_path, tree()), ["run.dir=$OUTER"])
    assert config.run.dir == "/a/$INNER" and load(write(tmp_path, to_yaml(config))) == config


# Sections and keys


def test_a_section_of_comments_only_is_one_of_defaults(tmp_path):
    text = to_yaml(from_tree(tree())).partition("parallel:")[0]
    path = write(tmp_path, text + "optimizer:\n  # lr: 1\nmegatron:\nloss: ~\n")
    assert load(path) == from_tree(tree())
    assert load(path, ["optimizer.lr=1", "megatron.a=1"]).optimizer.lr == 1.0


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ("optimizer:\n  lr: 4e-4\noptimizer:\n  min_lr: 0\n", "optimizer is given twice, in lines"),
        ("optimizer:\n  lr: 4e-4\n  lr: 1e-6\n", r"optimizer\.lr is given twice, in lines"),
        ("megatron: {a: {b: 1, b: 2}}\n", r"megatron\.a\.b is given twice"),
        ("optimizer.lr: 1\noptimizer.lr: 2\n", r"optimizer\.lr is given twice, in lines"),
        ("optimizer.lr: 1\noptimizer: {lr: 2}\n", r"optimizer\.lr is given twice, in its section"),
        ("optimizer: {lr: 2}\noptimizer.lr: 1\n", r"optimizer\.lr is given twice, in its section"),
        ("optimizer: 2\noptimizer.lr: 1\n", r"optimizer is given twice"),
        ("loss:\n  loss.clip_low: 0.1\n", r"unknown setting loss\.loss\.clip_low"),
    ],
)
def test_what_is_given_twice_is_refused(tmp_path, more, message):
    with pytest.raises(UserError, match=message):
        load(write(tmp_path, yaml.safe_dump(tree()) + more))


def test_a_key_with_a_dot_is_a_setting_of_its_section(tmp_path):
    more = "optimizer.lr: 4e-4\noptimizer:\n  weight_decay: 0.1\nmegatron.a.b: 1\n"
    config = load(write(tmp_path, yaml.safe_dump(tree()) + more))
    assert (config.optimizer.lr, config.optimizer.weight_decay) == (4e-4, 0.1)
    assert config.megatron == load(write(tmp_path, tree()), ["megatron.a.b=1"]).megatron


@pytest.mark.parametrize("override", ["optimizer=", "optimizer={lr: 1}", "optimizer=3"])
def test_a_section_is_not_replaced_as_a_whole(tmp_path, override):
    """The file's other settings in the section would be lost."""
    with pytest.raises(UserError, match="optimizer is a section; set one of its settings"):
        load(write(tmp_path, tree()), [override])


# Round trip and reference


def other_value(field):
    """Return a value that is not the default and that passes all checks."""
    special = {
        ("method", "prepo"): "random",
        ("min_lr", 0.0): 1e-7,
        ("rho_max", 1.0): 0.5,
        ("target_pass_rate", 0.5): 0.25,
        ("mopps_decay", 0.5): 0.25,
        ("dps_decay", 0.5): 0.25,
        ("hive_band", (0.5, 1.0)): (0.25, 0.75),
        ("pilot_band", (0.125, 0.75)): (0.25, 0.5),
        ("clip_low", 0.2): 0.3,
        ("importance_low", 0.5): 0.4,
        ("ppl_agreement", 0.95): 0.9,
        ("mini_batches", 1): 2,
        ("clamp", None): 3.0,
        ("chat_template_date", None): "2026-01-31",
        ("prompt_field", "prompt"): "question",
        ("adam_beta1", 0.9): 0.8,
        ("adam_beta2", 0.95): 0.8,
        ("steps", ()): (0, 3),
        ("target_modules", PROJECTIONS): ("q_proj", "v_proj"),
        ("ranks", (0,)): (0, 1),
        ("function", "final_number"): "math",
        ("max_failed", 0.5): 0.25,
        ("urls", ()): ("http://a:1", "http://b:2"),
        ("stop", ()): ("\n\n", "# no comment"),
        ("stop_tokens", ()): ("010", "</s>"),
        ("pass_at", ()): (1, 2),
        ("top_p", 1.0): 0.5,
        ("chat_template_arguments", None): {"enable_thinking": False},
        ("dump_steps", ()): (3, 7),
        ("host", "127.0.0.1"): "10.0.0.1",
        ("address", "127.0.0.1"): "10.0.0.1",
    }
    if (field.name, field.default) in special:
        return special[field.name, field.default]
    kind = field.type
    if getattr(kind, "__args__", None) and isinstance(kind.__args__[0], str):
        return kind.__args__[-1]
    if field.default is None:
        return {int: 3, float: 3.0, str: "text", FilePath: "some/path"}[kind.__args__[0]]
    if isinstance(field.default, bool):
        return not field.default
    return field.default + 1


def test_round_trip_of_every_setting(tmp_path):
    """All settings, away from their defaults where possible, survive a tree and YAML."""
    changed = tree(parallel__tensor=2)
    for section, field in all_fields():
        if field is not None and field.default is not dataclasses.MISSING:
            changed.setdefault(section.name, {})[field.name] = other_value(field)
    changed["train"]["packing"] = True  # required by share_prefixes
    changed["model"] |= {"layers": "torch", "megatron": None}  # required by lora.rank
    changed["servers"]["nodes"] = 0  # refused beside urls and first_device
    changed |= {"megatron": {"bf16": [1, {"a": None}]}, "sglang": {"port": 30000}}
    config = from_tree(changed)
    assert to_tree(config) == changed
    assert from_tree(to_tree(config)) == config
    assert load(write(tmp_path, to_yaml(config))) == config
    assert load(write(tmp_path, to_tree(config))) == config  # as written by PyYAML
    assert config != from_tree(tree())


def test_the_reference_lists_every_setting_once_with_its_meaning():
    text = reference.markdown()
    for section, field in all_fields():
        assert f"## `{section.name}`\n" in text
        if field is None:
            continue
        (row,) = (
            line for line in text.splitlines() if f"| `{section.name}.{field.name}` |" in line
        )
        *_, default, meaning, _ = (cell.strip() for cell in row.replace("\\|", "").split("|"))
        assert len(meaning) > 15, row
        assert (default == "(required)") == (field.default is dataclasses.MISSING)


def test_nearest_is_silent_when_nothing_is_near():
    assert configuration.nearest("clip_lo", ["clip_low", "lr"]) == " (did you mean clip_low?)"
    assert configuration.nearest("xyz", ["clip_low", "lr"]) == ""


@pytest.mark.parametrize("name", ["a $HOME b", "$$", "${x}", "~", "it's #1: $5", "$"])
def test_a_path_with_any_characters_is_the_same_when_it_is_saved_and_read(tmp_path, name):
    """The path may be any name of a user's directory; what is typed as a setting is expanded."""
    tree_of_it = tree()
    tree_of_it["run"]["dir"] = f"{tmp_path}/{name}"
    config = from_tree(tree_of_it)
    path = tmp_path / "saved.yaml"
    path.write_text(to_yaml(config), encoding="utf-8")
    assert load(path) == config
    assert load(path, [f"run.dir={literal(config.run.dir)}"]) == config
