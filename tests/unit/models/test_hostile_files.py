"""Prompt files, tokenizers and model configurations that are broken or malicious."""

import ast
import json
import math
import shutil
from fractions import Fraction
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from megatron_prepo.data import read_prompts
from megatron_prepo.errors import UserError
from megatron_prepo.inputs.preflight import read_tokenizer
from megatron_prepo.models.fit import check_fit
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.hf_files import INDEX, HFTensors, other_files
from megatron_prepo.rollout.stopping import stop_tokens

REPOSITORY = Path(__file__).resolve().parents[3]
BASE = REPOSITORY / "examples" / "laptop" / "base"
GOOD = '{"id": "a", "prompt": "tom has 3 apples", "answer": "3"}'


@pytest.fixture(scope="module")
def tokenizer():
    return read_tokenizer(str(BASE))


@pytest.fixture
def model(tmp_path):
    return Path(shutil.copytree(BASE, tmp_path / "model"))


def read(tmp_path, content, tokenizer):
    file = tmp_path / "prompts.jsonl"
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_prompts(file, tokenizer, max_tokens=96)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("[" * 100_000, r"line 2: not valid JSON \(nested too deeply\)"),
        ('{"a":' * 100_000 + "1" + "}" * 100_000, r"line 2: not valid JSON \(nested too deeply\)"),
        ('{"prompt": "tom", "answer": ' + "9" * 5000 + "}", r"line 2: not valid JSON .*digits"),
        ('{"prompt": "' + "tom " * 5_000_000 + '", "answer": "1"}', "line 2: .*20,000,000 char"),
        ('{"prompt": "tom \\u0000 tom", "answer": "1"}', "line 2: the tokenizer rejects"),
        (
            '{"prompt": "tom \\ud800 tom", "answer": "1"}',
            "line 2: field `prompt` is not valid Unicode",
        ),
        ("\x00" * 1000, "line 2: not valid JSON"),
        (b"\xff\xfe\x00{", "line 2: not UTF-8"),
        ("\ufeff" + GOOD, "line 2: not valid JSON"),
        ('{"prompt": {"a": 1}, "answer": "1"}', "line 2: field `prompt` must be a text"),
    ],
    ids=range(10),
)
def test_a_hostile_line_is_refused_by_number(tmp_path, tokenizer, line, message):
    line = line if isinstance(line, bytes) else line.encode()
    with pytest.raises(UserError, match=message) as caught:
        read(tmp_path, GOOD.encode() + b"\n" + line, tokenizer)
    assert len(str(caught.value)) < 600


@settings(
    max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.binary(max_size=40), st.integers(0, len(GOOD)))
def test_any_bytes_are_prompts_or_refused(tmp_path, tokenizer, noise, position):
    content = GOOD.encode()
    try:
        prompts = read(tmp_path, content[:position] + noise + content[position:], tokenizer)
    except UserError as error:
        assert str(error)
    else:
        assert all(len(prompt.tokens) >= 2 for prompt in prompts)


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text(max_size=5)
    | st.text("0123456789.,eE+-$%\u2212\ud800\u2028 ", max_size=5),
    lambda inner: (
        st.lists(inner, max_size=2) | st.dictionaries(st.text(max_size=3), inner, max_size=2)
    ),
    max_leaves=4,
)


def meant(field, value):
    """Return the text that a value stands for, by another way than the reader's; or None."""
    if value is None and field == "id":
        return "2"  # the number of the line
    if isinstance(value, str):
        unicode = not any("\ud800" <= c <= "\udfff" for c in value)
        return value if value.strip() and unicode and (field, value) != ("id", "a") else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return None
    if isinstance(value, float) and value and not 1e-300 <= abs(value) < 1e301:
        return None
    scaled = str(int(abs(Fraction(repr(value))) * 10**400)).zfill(401)
    sign, fraction = "-" if value < 0 else "", scaled[-400:].rstrip("0")
    return sign + scaled[:-400] + ("." + fraction if fraction else "")


@settings(
    max_examples=400, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.sampled_from(["answer", "id"]), JSON, st.booleans())
def test_any_value_is_an_answer_and_an_id_or_refused_with_its_line(
    tmp_path, tokenizer, field, value, ascii_only
):
    """A text stays itself, a number the same number; nothing else becomes a text."""
    record = {"id": "b", "prompt": "tom has 3 apples", "answer": "1"} | {field: value}
    line = json.dumps(record, ensure_ascii=ascii_only)
    try:
        content = (GOOD + "\n" + line).encode(errors="surrogatepass")
        _, prompt = read(tmp_path, content, tokenizer)
    except UserError as error:
        assert "prompts.jsonl, line 2: " in str(error) and str(error).isprintable()
        assert meant(field, value) is None
    else:
        assert (prompt.id if field == "id" else prompt.answer) == meant(field, value)


def test_a_prompt_file_that_may_not_be_read_is_refused(tmp_path, tokenizer, monkeypatch):
    (tmp_path / "prompts.jsonl").write_text(GOOD)

    def refuse(*args, **kwargs):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("builtins.open", refuse)
    with pytest.raises(UserError, match=r"cannot be read: .*Permission denied"):
        read_prompts(tmp_path / "prompts.jsonl", tokenizer, max_tokens=96)


@pytest.mark.parametrize(
    "content", [b"", b"garbage", b"[]", b'{"model": 7}', b"[" * 100_000, b"\x80\x04\x95\x00"]
)
@pytest.mark.parametrize("file", ["tokenizer.json", "tokenizer_config.json"])
def test_a_broken_tokenizer_is_refused(model, file, content):
    (model / file).write_bytes(content)
    with pytest.raises(UserError, match="the tokenizer of"):
        read_tokenizer(str(model))


@pytest.mark.parametrize("model_known", [True, False])
def test_code_beside_a_tokenizer_is_not_run(model, tmp_path, model_known):
    """Nothing is prompted for; transformers uses its own class for a model that it knows."""
    settings = json.loads((model / "tokenizer_config.json").read_text())
    settings["tokenizer_class"] = "EvilTokenizer"
    settings["auto_map"] = {"AutoTokenizer": ["evil.EvilTokenizer", "evil.EvilTokenizer"]}
    (model / "tokenizer_config.json").write_text(json.dumps(settings))
    (model / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    if model_known:
        assert read_tokenizer(str(model)).is_fast
    else:
        (model / "config.json").unlink()
        with pytest.raises(UserError, match="contains custom code"):
            read_tokenizer(str(model))
    assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": ["qwen3"]}, "model_type"),
        ({"hidden_size": "64"}, "hidden_size='64' is not a valid size"),
        ({"vocab_size": -5}, "vocab_size=-5 is not a valid size"),
        ({"num_hidden_layers": 10**15}, "num_hidden_layers=1000000000000000 is not a valid size"),
        ({"num_attention_heads": True}, "num_attention_heads=True is not a valid size"),
        ({"num_key_value_heads": 1.5}, "num_key_value_heads=1.5 is not a valid size"),
        ({"rms_norm_eps": [1]}, r"rms_norm_eps=\[1\] is not a valid number"),
    ],
)
def test_a_model_that_cannot_be_is_refused(model, change, message):
    config = json.loads((model / "config.json").read_text()) | change
    (model / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=message):
        read_hf_config(model)


@pytest.mark.parametrize("content", [b"[" * 100_000, b"\xff", b'{"a": ' + b"9" * 5000 + b"}"])
def test_a_model_configuration_that_is_no_json_is_refused(model, content):
    (model / "config.json").write_bytes(content)
    with pytest.raises(UserError, match="not valid JSON"):
        read_hf_config(model)


# Damaged folders

CONFIG = json.loads((BASE / "config.json").read_text())
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner),
    max_leaves=5,
)
ONE_LINE = settings(
    max_examples=50, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)


def read_folder(directory):
    """Read a folder as preflight does; only a UserError of one line may be raised."""
    try:
        hf = read_hf_config(directory)
        stop_tokens(directory, SimpleNamespace(eos_token_id=2))
        other_files(directory)
        with HFTensors(directory, tied=hf["tie_word_embeddings"]) as tensors:
            check_fit(tensors, hf)
    except UserError as error:
        assert len(str(error).splitlines()) == 1 and len(str(error)) < 1500
        return str(error)
    return None


def test_a_sound_folder_is_read(model):
    assert read_folder(model) is None


@ONE_LINE
@given(st.sampled_from([*CONFIG, "new"]), JSON)
def test_any_value_in_config_json_is_taken_or_refused_in_one_line(model, key, value):
    (model / "config.json").write_text(json.dumps(CONFIG | {key: value}))
    read_folder(model)


@ONE_LINE
@given(JSON)
def test_any_generation_config_is_taken_or_refused_in_one_line(model, value):
    for content in (value, {"eos_token_id": value}):
        (model / "generation_config.json").write_text(json.dumps(content))
        read_folder(model)


@ONE_LINE
@given(JSON, JSON)
def test_any_index_is_refused_in_one_line(model, name, value):
    (model / "model.safetensors").unlink(missing_ok=True)
    entry = {str(name): value}
    for content in (value, {"weight_map": value}, {"weight_map": entry, "metadata": {}}):
        (model / INDEX).write_text(json.dumps(content))
        assert INDEX in read_folder(model)


@ONE_LINE
@given(st.sampled_from(["dtype", "shape", "data_offsets"]), JSON)
def test_any_entry_of_a_header_is_refused_in_one_line(model, key, value):
    entry = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]} | {key: value}
    text = json.dumps({"lm_head.weight": entry}).encode()
    content = len(text).to_bytes(8, "little") + text + bytes(8)
    (model / "model.safetensors").write_bytes(content)
    assert read_folder(model)


@pytest.mark.parametrize(
    "name", ["config.json", "generation_config.json", "model.safetensors", "tokenizer.json"]
)
def test_a_folder_in_place_of_a_file_is_refused_or_no_file(model, name):
    (model / name).unlink()
    (model / name).mkdir()
    if name not in ("generation_config.json", "tokenizer.json"):
        assert read_folder(model)
    else:
        assert read_folder(model) is None


# What the code may not do


def calls(names):
    """Yield (file, call) of every call of a function with such a name in the two packages."""
    for package in ("megatron_prepo", "checkpoints_convert"):
        for file in (REPOSITORY / package).rglob("*.py"):
            for node in ast.walk(ast.parse(file.read_text())):
                if isinstance(node, ast.Call) and ast.unparse(node.func).endswith(names):
                    yield str(file.relative_to(REPOSITORY)), node


def test_remote_code_is_refused_wherever_something_is_read_by_transformers():
    found = list(calls("from_pretrained"))
    assert len(found) >= 5
    for file, call in found:
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("trust_remote_code") == "False", f"{file}: {ast.unparse(call)}"


def test_who_loads_weights_says_their_type():
    """A library that follows config.json would round them to the type it names."""
    found = calls(("from_pretrained", "from_config"))
    found = [(file, call) for file, call in found if "AutoModel" in ast.unparse(call.func)]
    assert len(found) >= 4
    for file, call in found:
        on_meta = file == "checkpoints_convert/verify.py" and "from_config" in ast.unparse(call)
        assert on_meta or "dtype" in {k.arg for k in call.keywords}, f"{file}: {ast.unparse(call)}"


def test_nothing_is_unpickled_but_tensors():
    """There is no `pickle.load`, `torch.load` has `weights_only`, Megatron's load is in one
    place."""
    assert not list(calls(("pickle.load", "pickle.loads", "allow_pickle")))
    for file, call in calls("torch.load"):
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
        assert keywords.get("weights_only") == "True", f"{file}: {ast.unparse(call)}"
    places = [file for file, _ in calls("dist_checkpointing.load")]
    assert places == ["megatron_prepo/actor/checkpoint.py"]
