"""Any content of a configuration gives a `Config` that can be saved, or a readable error."""

import datetime
import re

import pytest
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from ruamel.yaml import YAML

from megatron_prepo.config import FilePath, from_tree, load, to_tree, to_yaml, yaml_text
from megatron_prepo.errors import MAX_LINE, UserError
from tests.unit.config.test_config import all_fields, tree

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
    """Return what `make` returns; None if it is refused as it should be."""
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
        file.write_text(to_yaml(config), encoding="utf-8")
        assert load(file) == config
        # PyYAML reads YAML 1.1, and wrote config.yaml once
        assert from_tree(yaml.safe_load(to_yaml(config))) == config
        file.write_text(yaml.safe_dump(to_tree(config)))
        if not reads_as_numbers(to_tree(config)["megatron"] | to_tree(config)["sglang"]):
            assert load(file) == config


def reads_as_numbers(value):
    """Return whether it contains a text such as 1e-5 or 0o7, which YAML 1.1 writes unquoted."""
    if isinstance(value, dict):
        return any(map(reads_as_numbers, [*value, *value.values()]))
    if isinstance(value, list | tuple):
        return any(map(reads_as_numbers, value))
    return isinstance(value, str) and yaml_text.resolved(value) != value


WORDS = st.one_of(
    st.from_regex(r"[-+.~]?[0-9]{0,3}[-+._:xobeE,]?[0-9a-fA-F]{0,3}(e-?[0-9])?", fullmatch=True),
    st.text("0123456789+-.eExob_:~#/'\"[]{},&*!|>%@` \tafnyNoOsu\u00e9\u2028", max_size=8),
    st.sampled_from(["off", "on", "yes", "no", "y", "n", "true", "TRUE", "True", "false", "null"]),
    st.sampled_from(["~", "", ".inf", ".nan", "-.INF", "inf", "nan", "=", "<<", "-", "--", "?"]),
    st.sampled_from(["010", "0o10", "0x1F", "1:30", "1:30:00", "1e-5", "1E5", "1.e3", ".5", "5."]),
    st.sampled_from(["1_000", "2001-01-01", ":", "a:b", "a#b", "a #b", "'010'", "0x", "1e", "+"]),
)


def kind_of(word, kind):
    """Return the word as Python reads a number of that kind, or a truth value."""
    if kind is bool:
        return {"true": True, "false": False}[word.lower()]
    assert "_" not in word
    return kind(int(word, 0) if word.startswith(("0x", "0o")) else word)


@settings(max_examples=400, **NO_DEADLINE)
@given(st.sampled_from([key for key in all_fields() if key[1]]), WORDS)
@example(next(key for key in all_fields() if key[1] and key[1].name == "lr_decay_steps"), "&0")
def test_any_word_is_what_yaml_1_2_has_for_the_settings_type_or_refused(tmp_path, key, word):
    """The result is the same in a file and in an override; numbers are as Python reads them."""
    section, field = key
    name = f"{section.name}.{field.name}"
    before = tree()
    before.get(section.name, {}).pop(field.name, None)
    file = tmp_path / "config.yaml"
    file.write_text(yaml.safe_dump(before) + f"{name}: {word}\n", encoding="utf-8")
    in_file = accept_or_refuse(lambda: load(file))
    file.write_text(yaml.safe_dump(tree()))
    by_override = accept_or_refuse(lambda: load(file, [f"{name}={word}"]))
    takes_text = {str, FilePath} & {field.type, *getattr(field.type, "__args__", ())}
    for config in filter(None, (in_file, by_override)):
        value = to_tree(config)[section.name][field.name]
        bare = re.split(r"\s#", f" {word}")[0].strip()
        bare = re.sub(r"^&\S+\s*", "", bare) if config is in_file else bare  # an anchor
        if value is None:
            assert bare in ("", "~", "null", "Null", "NULL")
        elif isinstance(value, int | float):
            expected = kind_of(bare, type(value))
            assert value == expected and type(value) is type(expected)
        elif takes_text and config is by_override and word[0] + word[-1] not in ("''", '""'):
            assert value == word
        elif isinstance(value, str) and config is in_file:
            assert value == yaml_text.read(word, "the word")


@settings(max_examples=300, **NO_DEADLINE)
@given(st.dictionaries(st.text(max_size=5), VALUES, max_size=3))
def test_what_is_written_is_read_again(tree):
    """Readers: ours, ruamel.yaml as YAML 1.2, PyYAML as YAML 1.1; any JSON value, keys too."""
    try:
        from_tree({"megatron": tree})
    except UserError as error:
        if "is required" not in str(error).partition("\n")[0]:
            return  # what no setting can be
    text = yaml_text.write(tree)

    def by_us(value):
        if isinstance(value, dict):
            return {key: by_us(inner) for key, inner in value.items()}
        if isinstance(value, list):
            return [by_us(inner) for inner in value]
        return yaml_text.resolved(value) if isinstance(value, yaml_text.Plain) else value

    assert repr(by_us(yaml_text.read(text, "the text"))) == repr(tree)
    assert repr(yaml.safe_load(text)) == repr(tree)
    assert repr(YAML(typ="safe", pure=True).load(text)) == repr(tree)


@settings(max_examples=300, **NO_DEADLINE)
@given(st.text("ab:-?#&*!|>'\"%@`[]{},~ \n\t\\01.<=\x85\u2028\ufeff\0", max_size=30))
def test_any_text_is_yaml_or_refused_in_a_sentence(text):
    accept_or_refuse(lambda: yaml_text.read(text, "the text"))


@settings(max_examples=150, **NO_DEADLINE)
@given(st.binary(max_size=30), st.integers(0, 400))
def test_any_bytes_are_a_configuration_or_refused(tmp_path, noise, position):
    """Input is a valid file with some bytes inserted."""
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
        ("train: {total_steps: " + "9" * 5000 + "}", "train.total_steps: 9999.* 5,000 digits"),
        ("run: !!python/object/apply:os.system ['touch /tmp/owned']", "line 1: a YAML tag"),
        ("run: !!str 3", "line 1: a YAML tag"),
        ("a: 1\n---\na: 2", "multiple documents"),
        ("%YAML 1.1\n---\na: 1", "marked %YAML 1.1"),
        ("? " * 100_000, "a key must be a text"),
        ("? [a]\n: 1", "a key must be a text"),
        ("run: {dir: a\x85b}", r"U\+0085"),
        ('run: {dir: "\\ud800"}', r"run\.dir='\\ud800' is not UTF-8"),
        ('run: {"\\ud800": 1}', "setting run has the key"),
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
        ({"servers__urls": ["http://[a:1"]}, r"servers\.urls: 'http://\[a:1' is not a URL"),
        ({"sglang": {"api_key": "s3cret"}}, r"sglang\.api_key"),
        ({"sglang": {"admin-api-key": "s3cret"}}, r"sglang\.admin-api-key"),
    ],
)
def test_a_secret_is_refused_and_not_repeated(change, message):
    """The secret would be in config.yaml, in error messages, and in the servers' logs."""
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
