"""Rows of verl, of slime and of this project become the same prompts; others are refused."""

import json
import sys

import pyarrow
import pytest
from pyarrow import ipc, parquet

from checkpoints_convert import __main__ as converter
from megatron_prepo.config import DataConfig, RunConfig
from megatron_prepo.data import CandidateBatches, read_prompts
from megatron_prepo.errors import UserError
from megatron_prepo.files import rows
from megatron_prepo.files.rows import Fields
from megatron_prepo.inputs import preflight
from megatron_prepo.inputs.digests import file_digests
from megatron_prepo.prompt_context import Context, read_context, read_shots
from megatron_prepo.records import Prompt
from tests.unit.inputs.test_data import SYSTEM_CHAT, character_tokenizer, write

TOKENIZER = character_tokenizer(SYSTEM_CHAT)
USER = [{"role": "user", "content": "1+1=?"}]
VERL = {
    # as examples/data_preprocess/gsm8k.py of verl writes them
    "data_source": "openai/gsm8k",
    "prompt": USER,
    "ability": "math",
    "reward_model": {"style": "rule", "ground_truth": "2"},
    "extra_info": {"split": "train", "index": 0, "answer": "1+1 #### 2", "question": "1+1"},
}
SLIME = {"prompt": USER, "label": "2", "metadata": {"rm_type": "math"}}
OWN = {"prompt": "1+1=?", "answer": "2"}


def read(place, *, context=None, **settings):
    settings = {"max_tokens": 200, "chat_template": True} | settings
    return read_prompts(place, TOKENIZER, context=context or Context(), **settings)


def table(path, *of_rows):
    columns = pyarrow.Table.from_pylist(list(of_rows))
    if path.suffix == ".parquet":
        parquet.write_table(columns, path, row_group_size=1)
    else:
        with ipc.new_stream(path, columns.schema) as stream:
            stream.write_table(columns)
    return path


def shown(prompt):
    return TOKENIZER.decode(prompt.tokens).replace(" ", "")


# Schemas


@pytest.mark.parametrize("row", [VERL, SLIME, SLIME | {"prompt": "1+1=?"}, OWN | {"prompt": USER}])
@pytest.mark.parametrize("form", ["prompts.jsonl", "prompts.parquet", "prompts.arrow"])
def test_a_row_of_each_schema_is_the_same_prompt(row, form, tmp_path):
    second = json.loads(json.dumps(row).replace("1+1", "2+2").replace('"2"', '"4"'))
    path = tmp_path / form
    if path.suffix == ".jsonl":
        write(tmp_path, row, second)
    else:
        table(path, row, second)
    [own, _] = read(write_own(tmp_path, OWN, OWN | {"prompt": "2+2=?", "answer": "4"}))
    first, last = read(path)
    assert (first.id, first.text, first.answer) == ("1", "1+1=?", "2")
    assert (first.tokens, first.content) == (own.tokens, own.content)
    assert (last.id, last.text, last.answer) == ("2", "2+2=?", "4")
    assert json.loads(first.record) == row, "a reward sees all of it"


def write_own(tmp_path, *lines):
    (tmp_path / "own").mkdir()
    return write(tmp_path / "own", *lines)


def test_a_text_prompt_with_an_answer_is_ours_whatever_else_the_row_has(tmp_path):
    """Versions before did the same, and knew no other schema."""
    row = {"prompt": "1+1", "answer": 2, "label": "easy", "reward_model": 7, "images": [1]}
    assert [p.answer for p in read(write(tmp_path, row))] == ["2"]
    row = {"prompt": "1+1", "label": "easy"}
    assert [p.answer for p in read(write(tmp_path, row), needs_answer=False)] == [""]


def test_settings_name_other_fields(tmp_path):
    row = {"input": {"text": "1+1"}, "solution": 2, "answer": "by adding", "label": "easy"}
    fields = DataConfig(train="-", eval="-", prompt_field="input.text", answer_field="solution")
    [prompt] = read(write(tmp_path, row), fields=fields.fields)
    assert (prompt.text, prompt.answer) == ("1+1", "2")
    both = SLIME | {"answer": "3"}
    [prompt] = read(write(tmp_path, both), fields=Fields(answer="label"))
    assert prompt.answer == "2"
    for name in ("", "a..b", ".a"):
        with pytest.raises(ValueError, match=r"data\.answer_field='.*' must be the name"):
            DataConfig(train="-", eval="-", answer_field=name)


def without(row, field):
    return {name: value for name, value in row.items() if name != field}


def said(*turns):
    return {"prompt": [{"role": role, "content": content} for role, content in turns]}


CALCULATOR = {"calc_gsm8k_reward": {"create_kwargs": {"ground_truth": "2"}}}
"""Value of examples/data_preprocess/gsm8k_tool_agent_loop.py of verl."""


def info(**more):
    return {"extra_info": VERL["extra_info"] | more}


def test_a_row_of_verl_that_needs_no_tools_is_read(tmp_path):
    """A table has the columns of its other rows, too."""
    without_tools = info(
        need_tools_kwargs=False,
        tools_kwargs={"calc_gsm8k_reward": {"create_kwargs": None}},
        interaction_kwargs=None,
    )
    [prompt] = read(write(tmp_path, VERL | without_tools | {"agent_name": "single_turn_agent"}))
    assert prompt.answer == "2"


def test_the_loss_mask_of_a_message_of_slime_changes_nothing(tmp_path):
    turns = said(("user", "1+0"), ("assistant", "1"), ("user", "1+1"))
    [plain] = read(write(tmp_path, SLIME | turns))
    for turn in turns["prompt"]:
        turn["step_loss_mask"] = 0
    [masked] = read(write(tmp_path, SLIME | turns))
    assert masked.tokens == plain.tokens


def test_images_are_refused_in_rows_of_ours(tmp_path):
    """Both in messages and where a setting names the field of the answer."""
    for row, fields in ((OWN | {"prompt": USER}, None), (OWN, Fields(answer="answer"))):
        with pytest.raises(UserError, match="line 1: field `images` would not reach the model"):
            read(write(tmp_path, row | {"images": ["a.png"]}), fields=fields)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            without(VERL, "prompt"),
            r"`prompt` is missing; the line has ability.* set data\.prompt_f",
        ),
        (without(VERL, "reward_model"), r"`reward_model.ground_truth` is missing.* data\.answer_f"),
        (VERL | {"reward_model": {}}, "field `reward_model.ground_truth` is missing"),
        (VERL | {"reward_model": {"ground_truth": ["2"]}}, "ground_truth` must be a text or a num"),
        (
            VERL | {"reward_model": {"ground_truth": {"a": 1}}},
            "ground_truth` .* is an object; write it as a text, or take `record` in place of `ans",
        ),
        (VERL | info(need_tools_kwargs=True), r"`extra_info\.need_tools_kwargs` would not reach"),
        (VERL | info(tools_kwargs=CALCULATOR), r"field `extra_info\.tools_kwargs` would not reach"),
        (VERL | info(interaction_kwargs={"name": "gsm8k"}), r"`extra_info\.interaction_kwargs` w"),
        (VERL | {"agent_name": "tool_agent"}, "`agent_name`=tool_agent asks for tools or several"),
        (VERL | {"label": "3"}, "fields `reward_model.ground_truth` and `label`, of different"),
        (SLIME, "fields `reward_model.ground_truth` and `label`, of different schemas; set data"),
        (VERL | {"answer": "2"}, "fields `reward_model.ground_truth` and `answer`, of diff"),
        (VERL | {"images": ["a.png"]}, "field `images` would not reach the model"),
        (VERL | {"prompt": []}, "field `prompt` has no messages"),
        (VERL | {"prompt": ["1+1"]}, r"field `prompt\[0\]` must be {\"role\""),
        (VERL | said(("user", "")), r"field `prompt\[0\].content` is empty"),
        (VERL | said(("user", [])), r"`prompt\[0\].content` must be a text, but is a list"),
        (VERL | said(("tool", "3")), r"`prompt\[0\].role`=tool must be one of system, user, assis"),
        (VERL | said(("user", "1+1"), ("assistant", "2")), "ends with a message of role assistant"),
        (VERL | said(("user", "a"), ("system", "b"), ("user", "c")), r"`prompt\[1\]` is a system"),
        (
            VERL | {"prompt": [*said(("user", "a"))["prompt"], USER[0] | {"tool_calls": [1]}]},
            r"field `prompt\[1\].tool_calls` would not reach the model",
        ),
    ],
)
def test_a_row_that_does_not_fit_is_named_with_its_field(row, message, tmp_path):
    path = write(tmp_path, VERL, row)
    with pytest.raises(UserError, match=message) as caught:
        read(path)
    assert str(caught.value).startswith(f"{path}, line 2: ")


def test_a_table_names_its_row_and_what_json_cannot_hold(tmp_path):
    path = table(tmp_path / "a.parquet", VERL, VERL | {"prompt": []})
    with pytest.raises(UserError, match=r"a\.parquet, row 2: field `prompt` has no messages"):
        read(path)
    path = table(tmp_path / "b.parquet", VERL | {"picture": b"\x89"})
    with pytest.raises(
        UserError, match=r"b\.parquet, row 1: field `picture` holds a value that JS"
    ):
        read(path)
    for damaged in (tmp_path / "c.parquet", tmp_path / "c.arrow"):
        damaged.write_bytes(b"PAR1 no more")
        with pytest.raises(UserError, match=r"c\.\w+ cannot be read: .*; copy it again"):
            read(damaged)
    with pytest.raises(UserError, match=r"no such file: .*absent\.parquet"):
        read(tmp_path / "absent.parquet")
    path = table(tmp_path / "d.parquet", VERL | {"score": float("nan")})
    with pytest.raises(
        UserError, match=r"row 1: field `score` .* no form for \(bytes, a date, NaN"
    ):
        read(path)
    twice = pyarrow.Table.from_arrays([pyarrow.array(["1"])] * 3, names=["prompt", "id", "id"])
    parquet.write_table(twice, path)
    with pytest.raises(
        UserError, match=r"d\.parquet: column `id` is there twice; rename or remove"
    ):
        read(path)


def test_both_formats_of_arrow_are_read(tmp_path):
    path = tmp_path / "a.arrow"
    columns = pyarrow.Table.from_pylist([OWN, OWN | {"answer": "3"}])
    with ipc.new_file(path, columns.schema) as file:
        file.write_table(columns, max_chunksize=1)
    assert [prompt.answer for prompt in read(path)] == ["2", "3"]


def test_worked_examples_and_prompts_of_verify_may_be_tables(tmp_path):
    path = table(tmp_path / "a.parquet", {"prompt": "1+1=", "answer": 2})
    assert read_shots(str(path)) == (("1+1=", "2"),)
    assert converter._prompts(str(path)) == ["1+1="]


def test_without_pyarrow_the_extra_is_named(tmp_path, monkeypatch):
    path = table(tmp_path / "a.parquet", VERL)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(UserError, match=r'a\.parquet needs pyarrow: pip install -e "\.\[data\]"'):
        read(path)


# Messages


def test_a_conversation_keeps_its_turns_and_its_content_is_the_last(tmp_path):
    turns = said(("system", "be short "), ("user", "1+1"), ("assistant", "2"), ("user", "1+1 "))
    [prompt] = read(write(tmp_path, VERL | turns))
    assert shown(prompt) == (
        "<bos>beshort<end><user>1+1<end><assistant>2<end><user>1+1<end><assistant>"
    )
    begin, end = prompt.content
    assert TOKENIZER.decode(prompt.tokens[begin:end]).replace(" ", "") == "1+1"
    assert begin > len("1+1") * 2 and prompt.text == "1+1 "


def test_the_settings_context_stands_where_a_chat_has_it(tmp_path):
    context = Context("be kind", (("0+1", "1"),))
    path = write(tmp_path, VERL | said(("user", "a"), ("assistant", "b"), ("user", "c")))
    [prompt] = read(path, context=context)
    assert shown(prompt) == (
        "<bos>bekind<end><user>0+1<end><assistant>1<end>"
        "<user>a<end><assistant>b<end><user>c<end><assistant>"
    )
    path = write(tmp_path, VERL | said(("system", "s"), ("user", "c")))
    [prompt] = read(path, context=Context(None, context.shots))
    assert shown(prompt).startswith("<bos>s<end><user>0+1<end>")
    with pytest.raises(UserError, match=r"line 1: the prompt has a system message, 's', and data"):
        read(path, context=context)


def test_chat_template_arguments_reach_messages(tmp_path):
    data = DataConfig(
        train="-", eval="-", chat_template=True, chat_template_arguments={"enable_thinking": False}
    )
    [prompt] = read(write(tmp_path, VERL), context=read_context(data, TOKENIZER))
    assert shown(prompt).endswith("<assistant>no")


def test_messages_need_a_template_that_shows_them(tmp_path):
    path = write(tmp_path, VERL | said(("system", "be short"), ("user", "1+1")))
    with pytest.raises(UserError, match=r"line 1: .* list of messages, .* data\.chat_template=tru"):
        read(path, chat_template=False)
    turns = said(("user", "first"), ("assistant", "thoughts"), ("user", "1+1"))
    path = write(tmp_path, VERL | turns)
    last, users = "{{ messages[-1]['content'] }}", "{% for m in messages[::2] %}{{ m['content'] }}"
    with pytest.raises(UserError, match=r"line 1: .* leaves out the message 'first'"):
        read_prompts(path, character_tokenizer(last), max_tokens=99, chat_template=True)
    tokenizer = character_tokenizer(users + "{% endfor %}")
    [prompt] = read_prompts(path, tokenizer, max_tokens=99, chat_template=True)
    assert len(prompt.tokens) == len("first1+1"), "templates may shorten what the model has said"
    path = write(tmp_path, VERL | said(("system", "be short"), ("user", "1+1")))
    for template, message in (
        ("{{ messages[-1]['content'] }}", "line 1: .* leaves out the message 'be short'"),
        ("{{ raise_exception('no system role') }}", "line 1: .* rejects the prompt: no system"),
    ):
        with pytest.raises(UserError, match=message):
            read_prompts(path, character_tokenizer(template), max_tokens=99, chat_template=True)


# Places


def test_a_folder_or_a_pattern_stands_for_its_files(tmp_path):
    folder = tmp_path / "data"
    folder.mkdir()
    for number in range(2):
        table(folder / f"train-{number}.parquet", VERL)
    (folder / "README.md").write_text("no data")
    ids = ["train-0.parquet:1", "train-1.parquet:1"]
    assert [prompt.id for prompt in read(folder)] == ids
    before = file_digests("data.train", folder)
    table(folder / "test.parquet", VERL)
    with pytest.raises(UserError, match=r"several folders or splits .*name those to read, such as"):
        read(folder)
    pattern = folder / "train-*.parquet"
    assert [prompt.id for prompt in read(pattern)] == ids and rows.num_rows(pattern) == 2
    assert (
        file_digests("data.train", pattern)
        == before
        == dict.fromkeys(("train-0.parquet", "train-1.parquet"), before["train-0.parquet"])
    )
    assert rows.exists(pattern) and not rows.exists(folder / "val-*.parquet")
    with pytest.raises(UserError, match=r"val-\*.parquet has no files that end with \.jsonl, "):
        read(folder / "val-*.parquet")


def test_files_of_a_folder_that_are_not_its_rows_are_skipped(tmp_path):
    """`datasets` keeps results of `map` next to the rows, and other programs hidden files."""
    folder = tmp_path / "data"
    folder.mkdir()
    table(folder / "data-00000-of-00001.arrow", OWN)
    for name in ("cache-1b2f.arrow", "cache-1b2f_00000_of_00002.arrow", ".~a.arrow"):
        table(folder / name, OWN)
    assert len(read(folder)) == len(read(f"{folder}/")) == len(read(folder / "*.arrow")) == 1


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (("a/x.jsonl", "b/x.jsonl"), r"several folders or splits \(a/x.jsonl, b/x.jsonl\)"),
        (
            ("x.jsonl", "x.parquet"),
            r"several formats \(x.jsonl, x.parquet\); na",
        ),
    ],
)
def test_files_that_may_not_be_one_set_are_refused(names, message, tmp_path):
    for name in names:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    for place in (tmp_path, f"{tmp_path}/"):
        with pytest.raises(UserError, match=message) as caught:
            rows.data_files(place)
        assert f"such as {tmp_path / names[0]}, in which" in str(caught.value)
    if "parquet" in names[1]:
        with pytest.raises(UserError, match=message):
            rows.data_files(tmp_path / "x.*")


def test_files_of_one_place_have_their_own_schemas_but_ids_of_all(tmp_path):
    files = []
    for name, row in (("a", VERL), ("b", SLIME), ("c", OWN)):
        (tmp_path / name).mkdir()
        files.append(write(tmp_path / name, row))
    place = tmp_path / "*" / "prompts.jsonl"
    ids = [f"{name}/prompts.jsonl:1" for name in "abc"]
    assert [prompt.id for prompt in read(place)] == ids
    for number, file in enumerate(files):
        file.write_text(json.dumps(json.loads(file.read_text()) | {"id": number}))
    assert [(prompt.id, prompt.answer) for prompt in read(place)] == [
        ("0", "2"),
        ("1", "2"),
        ("2", "2"),
    ]
    assert list(file_digests("data.train", place)) == [f"{name}/prompts.jsonl" for name in "abc"]
    files[2].write_text(json.dumps(OWN | {"id": 0}))
    with pytest.raises(
        UserError, match=r"c/.*, line 1: id '0' is also that of .*a/.*, line 1; give each row its"
    ):
        read(place)


def test_all_messages_count_for_the_length_that_is_not_tokenized(tmp_path):
    turns = said(("user", "x" * 200_000), ("assistant", "2"), ("user", "1+1"))
    with pytest.raises(UserError, match="prompt '1' has 200,004 characters, more than"):
        read(write(tmp_path, VERL | turns))


def test_a_run_reads_the_fields_that_its_settings_name(tmp_path):
    path = write(tmp_path, {"question": "1+1", "solution": "2", "prompt": "3", "answer": "4"})
    data = DataConfig(train="-", eval="-", prompt_field="question", answer_field="solution")
    [prompt] = preflight.load_prompts(data, RunConfig(dir="-"), TOKENIZER, str(path), [])
    assert (prompt.text, prompt.answer) == ("1+1", "2")


# Order


def test_in_the_files_order_no_prompt_is_passed_over():
    prompts = [Prompt(str(i), "", "", (1, 2), (0, 2)) for i in range(5)]
    batches = CandidateBatches(prompts, 3, seed=1, order="file")
    drawn = ["".join(prompt.id for prompt in batches.next()) for _ in range(5)]
    assert drawn == ["012", "340", "123", "401", "234"]
    resumed = CandidateBatches(prompts, 3, seed=2, order="file")
    resumed.load_state_dict({"position": 2})
    assert ["".join(p.id for p in resumed.next()) for _ in range(3)] == drawn[2:]
