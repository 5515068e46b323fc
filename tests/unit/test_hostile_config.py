"""Whatever a configuration holds: it is a `Config` that can be saved, or refused in sentences."""

import datetime

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st

from megatron_prepo.config import MAX_LINE, from_tree, load, to_tree
from megatron_prepo.errors import UserError
from tests.unit.test_config import all_fields, tree

KEYS = [(s.name, f.name if f else "a_setting") for s, f in all_fields()]
SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(),
    st.sampled_from([10**18, -(10**40), 0, 1, 2, 8]),
    st.floats(),
    st.sampled_from([1e300, 5e-324, 0.5, 1.0]),
    st.text(max_size=20),
    st.sampled_from(["prepo", "\x00", "\ud800", "a\nb", "1_000", "0x10", "x" * 10_000]),
    st.binary(max_size=5),
    st.dates(),
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(
            st.one_of(st.text(max_size=5), st.integers(), st.none()), inner, max_size=3
        ),
    ),
    max_leaves=6,
)
CHANGES = st.lists(st.tuples(st.sampled_from(KEYS), VALUES), min_size=1, max_size=3)
SECTIONS = st.lists(st.tuples(st.sampled_from([s for s, _ in KEYS]), VALUES), max_size=1)
NO_DEADLINE = {"deadline": None, "suppress_health_check": [HealthCheck.function_scoped_fixture]}


def assert_sentences(message):
    lines = message.splitlines()
    assert lines and all(line.isprintable() and len(line) <= MAX_LINE + 200 for line in lines)


def accept_or_refuse(make):
    """What `make` returns; None if it is refused as it should be."""
    try:
        return make()
    except UserError as error:
        assert_sentences(str(error))
        return None


@settings(max_examples=300, **NO_DEADLINE)
@given(CHANGES, SECTIONS)
@example([(("run", "dir"), "\ud800")], [])
@example([(("parallel", "timeout_minutes"), 1e300)], [])
@example([(("megatron", "a_setting"), datetime.date(2000, 1, 1))], [])
@example([(("sglang", "a_setting"), b"\x00")], [])
def test_any_tree_is_a_configuration_or_refused(tmp_path, changes, sections):
    changed = tree()
    for name, value in sections:
        changed[name] = value
    for (section, key), value in changes:
        if isinstance(changed.setdefault(section, {}), dict):
            changed[section][key] = value
    config = accept_or_refuse(lambda: from_tree(changed))
    if config is not None:
        file = tmp_path / "saved.yaml"
        file.write_text(yaml.safe_dump(to_tree(config)))
        assert load(file) == config


@settings(max_examples=150, **NO_DEADLINE)
@given(st.binary(max_size=30), st.integers(0, 400))
def test_any_bytes_are_a_configuration_or_refused(tmp_path, noise, position):
    """A good file with some bytes put into it."""
    good = yaml.safe_dump(tree()).encode()
    file = tmp_path / "config.yaml"
    file.write_bytes(good[:position] + noise + good[position:])
    accept_or_refuse(lambda: load(file))


@settings(max_examples=150, **NO_DEADLINE)
@given(st.sampled_from(KEYS), st.text(max_size=20))
@example(("train", "total_steps"), "9" * 5000)
@example(("train", "seed"), "0x" + "f" * 5000)
@example(("megatron", "a_setting"), "{1: [0x" + "f" * 5000 + "]}")
@example(("run", "dir"), "2001-13-45")
@example(("run", "dir"), "[" * 5000)
def test_any_override_is_a_configuration_or_refused(tmp_path, key, value):
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(tree()))
    accept_or_refuse(lambda: load(file, [f"{'.'.join(key)}={value}"]))


BOMB = "a: &a [x, x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 10)}]\n"
    for before, name in zip("abcdefghi", "bcdefghij", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (BOMB, r"YAML alias"),
        ("megatron: &m {m: *m}", "YAML alias"),
        ("a: &a {b: 1}\nc:\n  <<: *a\n", "YAML alias"),
        ("[" * 100_000, "nested more than 20 deep"),
        ("train: {total_steps: " + "9" * 5000 + "}", "not valid YAML.*digits"),
        ("run: {dir: 2001-13-45}", "not valid YAML"),
        ("run: !!python/object/apply:os.system ['touch /tmp/owned']", "not valid YAML"),
        ("a" * 2_000_000, "larger than 1,048,576 bytes"),
    ],
)
def test_yaml_that_is_meant_to_harm_is_refused(tmp_path, text, message):
    file = tmp_path / "config.yaml"
    file.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        load(file)
    assert_sentences(str(caught.value))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"servers__urls": ["http://me:s3cret@a:1"]}, r"servers\.urls: a user or password"),
        ({"servers__urls": ["https://s3cret@a:1"]}, r"servers\.urls: a user or password"),
        ({"servers__urls": ["http://[a:1"]}, r"servers\.urls: 'http://\[a:1' is no URL"),
        ({"sglang": {"api_key": "s3cret"}}, r"sglang\.api_key"),
        ({"sglang": {"admin-api-key": "s3cret"}}, r"sglang\.admin-api-key"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(change, message):
    """It would be in config.yaml, in error messages, and in the servers' logs."""
    with pytest.raises(UserError, match=message) as caught:
        from_tree(tree(**change))
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    "name", ["parallel__timeout_minutes", "servers__start_seconds", "weight_sync__request_seconds"]
)
def test_a_deadline_that_no_clock_can_hold_is_refused(name):
    with pytest.raises(UserError, match=name.replace("__", ".") + r"=1e\+300 must be at most"):
        from_tree(tree(**{name: 1e300}))


def test_a_file_that_is_not_text_is_refused(tmp_path):
    file = tmp_path / "config.yaml"
    file.write_bytes(b"run: \xff\xfe")
    with pytest.raises(UserError, match=r"config\.yaml cannot be read"):
        load(file)
