"""Prompt files are read strictly; candidate batches are a pure function of seed and position."""

import gzip
import json
import string

import pytest
import tiny_models
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from megatron_prepo.config import DataConfig, RolloutConfig
from megatron_prepo.data import CandidateBatches, read_prompts, tokenize
from megatron_prepo.errors import UserError
from megatron_prepo.inputs import preflight
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.prompt_context import read_context, read_shots
from megatron_prepo.records import Prompt

SPECIAL = ["<unk>", "<bos>", "<user>", "<assistant>", "<end>"]
CHAT = (
    "{% for m in messages %}<user>{{ m['content'] | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
SPOKEN_CHAT = "<user>{{ messages[0]['content'] }}<end><assistant>assistant: "


def character_tokenizer(chat_template=CHAT):
    """Return a tokenizer with one token per character, after a `<bos>`."""
    vocabulary = {token: i for i, token in enumerate([*SPECIAL, *string.printable, "é"])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    tokenizer.add_special_tokens(SPECIAL)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, unk_token="<unk>", chat_template=chat_template
    )


TOKENIZER = character_tokenizer()


def write(tmp_path, *lines):
    path = tmp_path / "prompts.jsonl"
    text = "\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines)
    path.write_text(text, encoding="utf-8")
    return path


def read(path, max_tokens=100, **settings):
    return read_prompts(path, TOKENIZER, max_tokens=max_tokens, **settings)


# Files


def test_prompts_that_are_too_long_are_dropped_and_change_no_other(tmp_path):
    """The remaining prompts keep their ids, which are line numbers, and their order."""
    texts = ("short", "x" * 30, "long enough", "y" * 200_000, "end")
    path = write(tmp_path, *({"prompt": text, "answer": 1} for text in texts))
    dropped = []
    prompts = read(path, max_tokens=12, dropped=dropped)
    assert ([prompt.id for prompt in prompts], dropped) == (["1", "3", "5"], ["2", "4"])
    for limit in (12, 31):
        with pytest.raises(UserError, match=r"line [24].*data\.max_prompt_tokens"):
            read(path, max_tokens=limit)
    with pytest.raises(UserError, match=r"no prompts of up to data\.max_prompt_tokens=2 tokens"):
        read(path, max_tokens=2, dropped=[])


def test_prompts_are_read_in_order(tmp_path):
    path = write(
        tmp_path,
        {"id": "a", "prompt": "2+2", "answer": "4", "level": "easy"},
        "",
        {"prompt": "what is 3*4 ?", "answer": 12},
        {"id": 7, "prompt": " x ", "answer": "0.5"},
    )
    prompts = read(path)
    assert [(p.id, p.text, p.answer) for p in prompts] == [
        ("a", "2+2", "4"),
        ("3", "what is 3*4 ?", "12"),
        ("7", " x ", "0.5"),
    ]
    assert TOKENIZER.convert_ids_to_tokens(prompts[0].tokens) == ["<bos>", "2", "+", "2"]


def test_a_prompt_keeps_its_whole_line(tmp_path):
    line = {"id": "a", "prompt": "2+2", "answer": 4.5, "level": {"of": [1, 0.1]}, "x": None}
    (prompt,) = read(write(tmp_path, json.dumps(line) + " \r"))
    assert json.loads(prompt.record) == line and prompt.answer == "4.5"


def test_an_answer_may_be_absent_if_the_reward_does_not_take_it(tmp_path):
    path = write(
        tmp_path,
        {"prompt": "2+2"},
        {"prompt": "2+3", "answer": ["4", "5"]},
        {"prompt": "2+4", "answer": 6},
    )
    assert [prompt.answer for prompt in read(path, needs_answer=False)] == ["", "", "6"]
    with pytest.raises(UserError, match="line 1: field `answer` is missing; the line has prompt"):
        read(path)
    odd = write(tmp_path, {"prompt": "2+2", "answer": " "})
    with pytest.raises(UserError, match="line 1: field `answer` is empty"):
        read(odd, needs_answer=False)


GOOD = {"id": "a", "prompt": "2+2", "answer": "4"}


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"prompt": "2+2"', "line 2: not valid JSON"),
        ('["2+2", "4"]', "line 2: must be an object"),
        ({"prompt": "2+2"}, "line 2: field `answer` is missing"),
        ({"answer": "4"}, "line 2: field `prompt` is missing"),
        ({"prompt": None, "answer": "4"}, "line 2: field `prompt` must be a text, but is null"),
        ({"prompt": 3, "answer": "4"}, "line 2: field `prompt` must be a text, but is a number"),
        ({"prompt": "2+2", "answer": True}, "field `answer` .* but is true or false; write it"),
        ({"prompt": "2+2", "answer": None}, "field `answer` .* but is null"),
        ({"prompt": "2+2", "answer": {"a": 1}}, "field `answer` .* but is an object"),
        ('{"prompt": "2+2", "answer": 1e400}', "field `answer`=1E.400 is not a finite number"),
        ('{"prompt": "2+2", "answer": 1e-400}', "field `answer`=1E-400 is not a finite number"),
        ('{"prompt": "2+2", "answer": 1e9999999999999999999}', "not valid JSON .*out of range"),
        (
            {"prompt": "2+2", "answer": float("nan")},
            "line 2: not valid JSON .NaN is not a JSON number",
        ),
        ({"prompt": "2+2", "answer": float("inf")}, "line 2: not valid JSON .Infinity is no"),
        ({"prompt": "2+2", "answer": "\ud800"}, "line 2: field `answer` is not valid Unicode"),
        ({"prompt": "\ud800 ", "answer": "1"}, "line 2: field `prompt` is not valid Unicode"),
        ({"id": "\udfff", "prompt": "2+2", "answer": "1"}, "field `id` is not valid Unicode"),
        ({"id": [1], "prompt": "2+2", "answer": "1"}, "field `id` must be a text or a number"),
        ({"id": False, "prompt": "2+2", "answer": "1"}, "field `id` must be a text or a number"),
        ({"id": " ", "prompt": "2+2", "answer": "1"}, "field `id` is empty"),
        ('{"prompt": "2+2", "answer": "4", "answer": "5"}', "key 'answer' is given twice"),
        ('{"prompt": "2+2", "answer": "4", "x": [{"b": 1, "b": 1}]}', "key 'b' is given twice"),
        ({"prompt": "2+2", "answer": ["4"]}, "field `answer` .* but is a list"),
        ({"prompt": " \n", "answer": "4"}, "line 2: field `prompt` is empty"),
        ({"prompt": "2+2", "answer": ""}, "line 2: field `answer` is empty"),
        ({"id": "a", "prompt": "3", "answer": "3"}, "line 2: id 'a' is also that of line 1"),
        (
            {"id": "b", "prompt": "x" * 100, "answer": "3"},
            "'b' has 101 tokens.*_tokens=100",
        ),
    ],
)
def test_a_broken_line_is_refused_by_its_number(tmp_path, line, message):
    with pytest.raises(UserError, match=message):
        read(write(tmp_path, GOOD, line))


def test_a_prompt_as_long_as_the_limit_is_read(tmp_path):
    (prompt,) = read(write(tmp_path, {"prompt": "x" * 99, "answer": "3"}))
    assert len(prompt.tokens) == 100


def test_a_prompt_of_one_token_has_no_perplexity(tmp_path):
    tokenizer = character_tokenizer()
    tokenizer.backend_tokenizer.post_processor = processors.Sequence([])
    path = write(tmp_path, {"id": "b", "prompt": "x", "answer": "3"})
    with pytest.raises(UserError, match="'b' has 1 token; perplexity needs"):
        read_prompts(path, tokenizer, max_tokens=100)


def test_the_number_of_a_line_must_not_be_the_id_of_another(tmp_path):
    with pytest.raises(UserError, match="line 2: id '2' is also that of line 1"):
        read(write(tmp_path, GOOD | {"id": 2}, {"prompt": "1+1", "answer": "2"}))


def test_a_file_without_prompts_and_no_file_are_refused(tmp_path):
    with pytest.raises(UserError, match="contains no prompts"):
        read(write(tmp_path, "", "  "))
    with pytest.raises(UserError, match=r"no such file.*absent\.jsonl"):
        read(tmp_path / "absent.jsonl")


def test_an_id_of_null_is_no_id(tmp_path):
    prompts = read(write(tmp_path, GOOD | {"id": None}, GOOD | {"id": None}))
    assert [prompt.id for prompt in prompts] == ["1", "2"]


def test_a_file_that_is_not_utf8_is_refused(tmp_path):
    path = tmp_path / "latin1.jsonl"
    path.write_bytes('{"prompt": "caf\xe9", "answer": "1"}'.encode("latin-1"))
    with pytest.raises(UserError, match=r"latin1\.jsonl, line 1: not UTF-8"):
        read(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"prompt": "a"}'.encode("utf-16"), "line 1: not UTF-8 text, but UTF-16; convert it"),
        ('{"prompt": "a"}'.encode("utf-16-be"), "line 1: not valid JSON"),
        (gzip.compress(b"{}", mtime=0), "line 1: not UTF-8 text, but compressed by gzip"),
        (b"PAR1\0\0PAR1", "line 1: not UTF-8 text, but Parquet"),
        (b'{}\n{"prompt": "\xe9"}', "field `prompt` is missing"),
        (b'\n\n{"prompt": "\xe9"}', "line 3: not UTF-8 text"),
        (b'[{"prompt": "a", "answer": "1"}]', "line 1: must be an object"),
        (b'{"prompt": "a",\n"answer": "1"}', "line 1: not valid JSON"),
        (b'{"prompt": "a", "answer": "1"}{"prompt": "b"}', "line 1: not valid JSON .Extra data"),
    ],
)
def test_a_file_in_another_format_is_named_with_its_line(tmp_path, content, message):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()


def test_marks_and_ends_of_lines_of_other_systems_are_read(tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": f"{i}+1", "answer": i}).encode() for i in range(3)]
    path.write_bytes(b"\xef\xbb\xbf" + b"\r\n\r\n".join(lines))  # and the last line has no end
    assert [(p.id, p.answer) for p in read(path)] == [("1", "0"), ("3", "1"), ("5", "2")]


@pytest.mark.parametrize(
    ("number", "answer"),
    [
        ("18", "18"),
        ("18.0", "18"),
        ("-18.50", "-18.5"),
        ("1e3", "1000"),
        ("1E-7", "0.0000001"),
        ("-0.0", "0"),
        ("0.1000000000000000055", "0.1000000000000000055"),
        ("12345678901234567890123", "12345678901234567890123"),
        ("12345678901234567890123.0", "12345678901234567890123"),
    ],
)
def test_a_number_is_an_answer_to_its_last_digit(tmp_path, number, answer):
    (prompt,) = read(write(tmp_path, f'{{"id": {number}, "prompt": "?!", "answer": {number}}}'))
    assert prompt.answer == prompt.id == answer


def test_a_text_is_an_answer_as_it_is(tmp_path):
    (prompt,) = read(write(tmp_path, {"prompt": "?!", "answer": " 18.00 "}))
    assert prompt.answer == " 18.00 "


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85"])
def test_only_line_feeds_end_a_line(tmp_path, separator):
    """JSON allows Unicode's other line separators inside a text."""
    record = {"prompt": f"one{separator}two", "answer": "2"}
    (prompt,) = read(write(tmp_path, json.dumps(record, ensure_ascii=False)))
    assert prompt.text == f"one{separator}two"


def test_prompts_of_verify_are_those_of_the_trainer_or_lines_of_a_text(tmp_path):
    from checkpoints_convert.__main__ import _prompts

    path = write(tmp_path, json.dumps({"prompt": "a\u2028b", "answer": 1}, ensure_ascii=False), "")
    assert _prompts(str(path)) == ["a\u2028b"]
    text = tmp_path / "prompts.txt"
    text.write_bytes("one\u2028two\r\n\n 18 $".encode())
    assert _prompts(str(text)) == ["one\u2028two", " 18 $"]
    text.write_bytes(b"one\n\xe9")
    with pytest.raises(UserError, match="line 2: not UTF-8"):
        _prompts(str(text))


# Tokens and the span of the text


def content(text, tokenizer=TOKENIZER, **settings):
    tokens, (begin, end) = tokenize(text, tokenizer, **settings)
    return "".join(tokenizer.convert_ids_to_tokens(tokens[begin:end])), tokens


@pytest.mark.parametrize("text", ["2+2", "  2+2\n", "é", "user", "<end>x"])
def test_content_is_the_users_text_without_the_template(text):
    """Leading and trailing white space is not content, whether the template strips it or not."""
    for tokenizer in (TOKENIZER, character_tokenizer(SPOKEN_CHAT)):
        inside, tokens = content(text, tokenizer, chat_template=True)
        assert inside == text.strip()
        assert tokenizer.convert_ids_to_tokens(tokens[0]) == "<user>"
        assert "<assistant>" in tokenizer.convert_ids_to_tokens(tokens)


def test_without_a_template_the_content_is_all_but_special_tokens():
    inside, tokens = content("2+2", chat_template=False)
    assert inside == "2+2"
    assert TOKENIZER.convert_ids_to_tokens(tokens) == ["<bos>", "2", "+", "2"]


def test_a_template_has_its_own_special_tokens():
    """No second `<bos>` is put before what the template renders."""
    _, tokens = content("2+2", chat_template=True)
    assert TOKENIZER.convert_ids_to_tokens(tokens) == [
        "<user>", "2", "+", "2", "<end>", "<assistant>",
    ]  # fmt: skip


def test_content_is_found_where_the_user_speaks():
    """The template's later words do not count."""
    _, span = tokenize("assistant", character_tokenizer(SPOKEN_CHAT), chat_template=True)
    assert span == (1, 10)


def test_a_template_that_rewrites_the_text_makes_everything_content():
    shouting = character_tokenizer("<user>{{ messages[0]['content'] | upper }}<assistant>")
    tokens, span = tokenize("two", shouting, chat_template=True)
    assert span == (0, len(tokens))


MISTRALS_CHAT = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}[INST] {{ m['content'] }}"
    "[/INST]{% elif m['role'] == 'assistant' %} {{ m['content'] }}{{ eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant roles are supported!') }}{% endif %}{% endfor %}"
)


def mistrals_tokenizer(directory):
    """Write a tokenizer as Mistral 7B v0.3 has one: a space is a letter, others may be bytes."""
    special = ["<unk>", "<s>", "</s>", "[INST]", "[/INST]"]
    pieces = [*(f"<0x{byte:02X}>" for byte in range(256)), "▁", *string.ascii_letters, "ab", "▁ab"]
    vocabulary = {token: i for i, token in enumerate([*special, *pieces])}
    merges = [("a", "b"), ("▁", "ab")]
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, unk_token="<unk>", byte_fallback=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace("▁", "first", split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            *(decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()),
            decoders.Strip(" ", 1, 0),
        ]
    )
    tokenizer.add_special_tokens(special)
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", 1)]
    )
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        chat_template=MISTRALS_CHAT,
        **{"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"},
    ).save_pretrained(directory)
    config = json.loads((directory / "tokenizer_config.json").read_text())
    config["tokenizer_class"] = "LlamaTokenizer"
    (directory / "tokenizer_config.json").write_text(json.dumps(config))
    return preflight.read_tokenizer(str(directory))


def test_mistrals_chat_has_one_begin_token_and_no_system_message(tmp_path):
    tiny_models.save(tiny_models.mistral(), tmp_path)
    tokenizer = mistrals_tokenizer(tmp_path)
    inside, tokens = content("ab é", tokenizer, chat_template=True)
    words = tokenizer.convert_ids_to_tokens(tokens)
    assert words == ["<s>", "[INST]", "▁ab", "▁", "<0xC3>", "<0xA9>", "[/INST]"]
    assert inside == "▁ab▁<0xC3><0xA9>"
    assert tokenizer.decode(tokens, skip_special_tokens=True).strip() == "ab é"
    hf = read_hf_config(tmp_path)
    stops = preflight.check_stop_tokens(
        str(tmp_path), hf, tokenizer, RolloutConfig(max_new_tokens=4)
    )
    assert stops == {2}
    data = DataConfig(train="-", eval="-", chat_template=True, system="be short")
    with pytest.raises(UserError, match=r"data\.system: .* rejects it \(Only user and assistant"):
        read_context(data, tokenizer)


def test_a_chat_template_must_exist():
    with pytest.raises(UserError, match=r"data\.chat_template=true.*no chat template"):
        tokenize("2+2", character_tokenizer(chat_template=None), chat_template=True)


# Candidate batches


def prompts(num):
    return [Prompt(str(i), "", "", (1, 2), (0, 2)) for i in range(num)]


def ids(batch):
    return [prompt.id for prompt in batch]


def test_an_epoch_deals_each_prompt_at_most_once():
    """11 prompts in batches of 4: two batches per epoch, and 3 prompts are unused."""
    batches = CandidateBatches(prompts(11), 4, seed=1)
    for _ in range(5):
        epoch = ids(batches.next()) + ids(batches.next())
        assert len(set(epoch)) == 8


def test_each_epoch_is_shuffled_anew():
    batches = CandidateBatches(prompts(20), 20, seed=1)
    orders = [tuple(ids(batches.next())) for _ in range(4)]
    assert len(set(orders)) == 4
    assert all(sorted(order, key=int) == ids(prompts(20)) for order in orders)


def test_every_prompt_gets_its_turn():
    """Prompts that are unused in one epoch are not the same in the next."""
    batches = CandidateBatches(prompts(11), 4, seed=1)
    assert len({i for _ in range(20) for i in ids(batches.next())}) == 11


def test_a_restored_position_goes_on_as_the_first_would_have():
    first, restored = (CandidateBatches(prompts(11), 4, seed=1) for _ in range(2))
    for _ in range(3):
        first.next()
    restored.load_state_dict(json.loads(json.dumps(first.state_dict())))
    for _ in range(6):
        assert ids(first.next()) == ids(restored.next())


def test_batches_follow_from_the_seed():
    def start(seed):
        batches = CandidateBatches(prompts(50), 10, seed)
        return [ids(batches.next()) for _ in range(3)]

    assert start(1) == start(1) != start(2)


def test_more_candidates_than_prompts_are_refused():
    assert len(CandidateBatches(prompts(4), 4, seed=1).next()) == 4
    with pytest.raises(UserError, match=r"selection\.num_candidates=5 is more than the 4"):
        CandidateBatches(prompts(4), 5, seed=1)


# What stands before a prompt

SYSTEM_CHAT = (
    "{% for m in messages %}{% if m['role'] == 'system' %}<bos>{% elif m['role'] == 'user' %}<user>"
    "{% else %}<assistant>{% endif %}{{ m['content'] | trim }}<end>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
    "{% if not enable_thinking | default(true) %}no{% endif %}"
)
REJECTING_CHAT = "{{ raise_exception('System role not supported') }}"
USERS_CHAT = "{% for m in messages if m['role'] == 'user' %}<user>{{ m['content'] }}{% endfor %}"


def context(tmp_path, template, **settings):
    """Return a tokenizer with the template, and the context of the settings with one shot."""
    shots = tmp_path / "shots.jsonl"
    shots.write_text('{"prompt": "1+1=", "answer": 2}\n')
    data = DataConfig(train="-", eval="-", few_shot=str(shots), **settings)
    tokenizer = character_tokenizer(template)
    return tokenizer, read_context(data, tokenizer)


def test_a_chat_begins_with_the_system_message_and_the_shots(tmp_path):
    tokenizer, before = context(
        tmp_path,
        SYSTEM_CHAT,
        chat_template=True,
        system="be short",
        chat_template_arguments={"enable_thinking": False},
    )
    tokens, (begin, end) = tokenize(" 2+2=", tokenizer, chat_template=True, context=before)
    assert tokenizer.decode(tokens).replace(" ", "") == (
        "<bos>beshort<end><user>1+1=<end><assistant>2<end><user>2+2=<end><assistant>no"
    )
    assert tokenizer.convert_ids_to_tokens(list(tokens[begin:end])) == list("2+2=")


def test_without_a_template_the_shots_are_text(tmp_path):
    tokenizer, before = context(tmp_path, None)
    path = write(tmp_path, {"prompt": "1+1=", "answer": 2})
    [prompt] = read_prompts(path, tokenizer, max_tokens=100, context=before)
    assert tokenizer.convert_ids_to_tokens(list(prompt.tokens)) == ["<bos>", *"1+1=2\n\n1+1="]
    assert prompt.content == (8, 12), "the prompt's own text, though a shot has the same"
    assert prompt.text == "1+1="


@pytest.mark.parametrize(
    ("template", "settings", "message"),
    [
        (REJECTING_CHAT, {"system": "x"}, r"data\.system: .* rejects it \(System role not supp"),
        (USERS_CHAT, {"system": "be short"}, r"data\.system: .* leaves out 'be short'; remove"),
        (USERS_CHAT, {}, r"data\.few_shot: .* leaves out '2'; remove data\.few_shot, or put"),
        (
            SYSTEM_CHAT,
            {"chat_template_arguments": {"enable_thinkin": False}},
            r"data\.chat_template_arguments: .* does not use enable_thinkin",
        ),
        (
            SYSTEM_CHAT,
            {"chat_template_arguments": {"tokenize": False}},
            "tokenize is set by the run itself",
        ),
    ],
)
def test_what_a_template_rejects_or_ignores_is_an_error(tmp_path, template, settings, message):
    with pytest.raises(UserError, match=message):
        context(tmp_path, template, chat_template=True, **settings)


@pytest.mark.parametrize("settings", [{"system": "x"}, {"chat_template_arguments": {"a": 1}}])
def test_parts_of_a_chat_need_a_template(settings):
    with pytest.raises(ValueError, match=r"set data\.chat_template=true, or remove data\."):
        DataConfig(train="-", eval="-", **settings)


def test_a_file_of_shots_is_read_as_strictly_as_prompts(tmp_path):
    path = write(tmp_path, {"prompt": "1+1="})
    with pytest.raises(UserError, match=r"prompts\.jsonl, line 1: field `answer` is missing"):
        read_shots(str(path))
    with pytest.raises(UserError, match=r"data\.few_shot=.* contains no prompts"):
        read_shots(str(write(tmp_path, "")))
