"""Checks before any rank is started: files, tokenizer, model, layout."""

import json
import os
import stat
from collections.abc import Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from megatron_prepo.config import (
    Config,
    DataConfig,
    ModelConfig,
    RolloutConfig,
    RunConfig,
    to_tree,
)
from megatron_prepo.data import CandidateBatches, read_prompts
from megatron_prepo.errors import UserError
from megatron_prepo.files import rows, user_code
from megatron_prepo.inputs import hub, prompt_digests
from megatron_prepo.inputs.digests import WEIGHT_FILES
from megatron_prepo.inputs.prompt_digests import PromptDigests
from megatron_prepo.models.hf_config import read_hf_config, sliding_window
from megatron_prepo.prompt_context import read_context
from megatron_prepo.records import Prompt
from megatron_prepo.rewards import pool
from megatron_prepo.rollout.engine import Engine
from megatron_prepo.rollout.stopping import Stops
from megatron_prepo.selection import user_class

READ_SUFFIXES = (".json", ".jinja", ".safetensors", ".distcp", ".pt")


@dataclass(frozen=True)
class Inputs:
    """The inputs of a run, except weights."""

    tokenizer: Any
    stop_tokens: frozenset[int]
    """Tokens that end a completion."""
    train_prompts: list[Prompt]
    eval_sets: dict[str, list[Prompt]]
    """Held-out prompts by the name of their set; a single file has an empty name."""
    digests: PromptDigests
    """Digests of all prompts of all files."""

    @property
    def dropped(self) -> dict[str, int]:
        """Number of prompts that are too long and were skipped, by setting, if any were."""
        return self.digests.dropped


def check(config: Config, *, initial_weights: bool = True) -> Inputs:
    """Read and check all inputs; UserError names the invalid one.

    `initial_weights`: whether the run reads the weights of `model.hf` or `model.megatron`
    (`needs_initial_weights` in `run/directory.py`); otherwise they are not opened.
    """
    from megatron_prepo.actor.model import check_layout
    from megatron_prepo.models.hf_files import other_files
    from megatron_prepo.rollout import build

    check_present(config, *inputs_read(config.model, initial_weights=initial_weights))
    check_opens(Path(config.model.hf), skip=() if initial_weights else WEIGHT_FILES)
    hf = read_hf_config(config.model.hf)
    check_layout(config, hf)
    other_files(config.model.hf)
    if initial_weights:
        check_weights(config.model, hf)
    # ranks load the function anyway, and check then whether it finds its answers
    takes = () if "RANK" in os.environ else pool.check(config.reward)
    check_selector(config)
    tokenizer = read_tokenizer(config.model.hf)
    stops = check_stop_tokens(config.model.hf, hf, tokenizer, config.rollout)
    files = {"data.train": config.data.train, **config.data.eval_settings}
    dropped: dict[str, list[str]] = {name: [] for name in files}
    needs_answer = "answer" in takes
    prompts = {
        name: load_prompts(
            config.data, config.run, tokenizer, file, dropped[name], needs_answer=needs_answer
        )
        for name, file in files.items()
    }
    digests = PromptDigests.of(
        files,
        prompt_digests.template_date(config.data, config.run),
        prompts,
        {name: len(ids) for name, ids in dropped.items() if ids},
    )
    prompt_digests.check_unchanged(config.run, digests)
    train_prompts, *of_sets = prompts.values()
    held_out = [of_set[: config.eval.max_prompts] for of_set in of_sets]
    CandidateBatches(train_prompts, config.selection.num_candidates, config.train.seed)
    everything = [prompt for some in (train_prompts, *held_out) for prompt in some]
    check_room(config.rollout, hf, everything)
    largest = max(max(prompt.tokens) for prompt in everything)
    if largest >= hf["vocab_size"]:
        raise UserError(
            f"the tokenizer of {config.model.hf} gives token {largest}, but the model's vocab_size "
            f"is {hf['vocab_size']}"
        )
    build.check(config)
    eval_sets = dict(zip(config.data.eval_files, held_out, strict=True))
    return Inputs(tokenizer, stops, train_prompts, eval_sets, digests)


INPUTS = ("model.hf", "model.megatron", "data.train", "data.eval", "data.few_shot")
DATA = ("data.train", "data.eval")
"""Settings that may name several files (`files/rows.py`)."""
CODE = ("reward.function", "selection.method")
"""Settings that may be `FILE.py:NAME`."""


def inputs_read(model: ModelConfig, *, initial_weights: bool = True) -> list[str]:
    """Return the settings that name a file or folder which a run reads."""
    unused = [] if initial_weights and model.megatron else ["model.megatron"]
    return [name for name in (*INPUTS, *CODE) if name not in unused]


def check_present(config: Config, *names: str) -> None:
    """Raise UserError with those of the settings whose file or folder does not exist.

    A name on the hub passes; `hub.resolved` asks for it.
    """
    tree, absent = to_tree(config), []
    for name in names:
        section, _, setting = name.partition(".")
        value = tree[section][setting]
        if value is None or (name in CODE and not user_code.has_form(value)):
            continue
        places = config.data.eval_settings if name == "data.eval" else {name: value}
        for key, given in places.items():
            place = given.rpartition(":")[0] if name in CODE else given
            if not _is_present(name, place):
                absent.append(f"{key}={given}")
    if absent:
        raise UserError(f"no such file or folder: {', '.join(absent)}")


def _is_present(setting: str, place: str) -> bool:
    """Return whether a setting names something here, or something to ask the hub for."""
    if setting in DATA:
        return rows.exists(place) or hub.Name.of(place, "dataset") is not None
    if setting == "model.hf" and hub.Name.of(place, "model"):
        return True
    return Path(place).exists()


def check_selector(config: Config) -> None:
    """Raise UserError unless a custom selector loads and can choose for a made-up run."""
    if config.selection.is_custom:
        user_class.check(
            user_class.TrialRun(
                config.selection,
                total_steps=config.train.total_steps,
                seed=config.train.seed,
                group_size=config.rollout.samples_per_prompt,
                low=config.reward.low,
                high=config.reward.high,
            ),
            overlap=config.train.overlap,
        )


def check_room(rollout: RolloutConfig, hf: dict[str, Any], prompts: list[Prompt]) -> None:
    """Raise UserError unless the longest prompt and its completion fit the model and engine."""
    longest = max(prompts, key=lambda prompt: len(prompt.tokens))
    limit, of_what = most_tokens(rollout, hf)
    if len(longest.tokens) > limit - rollout.max_new_tokens:
        raise UserError(
            f"prompt {longest.id!r} has {len(longest.tokens)} tokens, and with "
            f"rollout.max_new_tokens={rollout.max_new_tokens} does not fit the model's {limit} "
            f"{of_what}; lower rollout.max_new_tokens or drop it"
        )


def most_tokens(rollout: RolloutConfig, hf: dict[str, Any]) -> tuple[int, str]:
    """Return how long a sequence may be, and of what the model has that many.

    SGLang's Mistral (0.5.21) attends to all tokens, also to those outside of a sliding window.
    """
    limit, window = hf["max_position_embeddings"], sliding_window(hf)
    if rollout.engine == "sglang" and window is not None and window < limit:
        ignored = "tokens in sliding_window, which SGLang ignores"
        return window, f"{ignored} (rollout.engine=embedded does not)"
    return limit, "positions"


def check_stop_tokens(
    directory: str, hf: dict[str, Any], tokenizer: Any, rollout: RolloutConfig
) -> frozenset[int]:
    """Return the tokens that end a completion; UserError if none is in the model's vocabulary.

    `hf`: the settings of the model in the directory.  Also raises UserError if SGLang would end
    completions elsewhere: for stop strings it reads the tokenizer, and obeys its end token, too.
    """
    tokens = Stops.of(rollout, directory, tokenizer).tokens
    if min(tokens) >= hf["vocab_size"]:
        raise UserError(
            f"completions would never end: the end-of-sequence token {min(tokens)} of "
            f"{directory} is not one of its vocab_size={hf['vocab_size']}"
        )
    if rollout.engine == "sglang" and rollout.stop and tokenizer.eos_token_id not in tokens:
        raise UserError(
            f"rollout.stop with rollout.engine=sglang: SGLang would end completions with the "
            f"tokenizer's end token {tokenizer.eos_token_id} as well, which is none of the model's "
            f"stop tokens {sorted(tokens)}; add it: rollout.stop_tokens=[{tokenizer.eos_token_id}]"
        )
    return tokens


def check_engine(model: ModelConfig, rollout: RolloutConfig, engine: Engine) -> None:
    """Raise UserError unless the engine rounds logits as the actor does.

    Float32 on one side only is worse than on neither: all of the other side's rounding then appears
    as a difference.
    """
    actor_fp32 = model.fp32_lm_head
    if model.dtype != "float32" and engine.fp32_lm_head != actor_fp32:
        words = {True: "float32", False: model.dtype, None: "of unknown type"}
        raise UserError(
            f"model.fp32_lm_head={str(actor_fp32).lower()}: the actor's logits are "
            f"{words[actor_fp32]}, but those of rollout.engine={rollout.engine} are "
            f"{words[engine.fp32_lm_head]}; set model.fp32_lm_head="
            f"{str(engine.fp32_lm_head).lower()}, or start the engine with its own setting "
            "(SGLang: enable_fp32_lm_head) changed"
        )


def load_prompts(
    data: DataConfig,
    run: RunConfig,
    tokenizer: Any,
    file: str,
    dropped: list[str],
    *,
    needs_answer: bool = True,
) -> list[Prompt]:
    """Return all prompts of a file, tokenized.

    `dropped` gets the ids of those that are skipped (`data.overlong_prompts`).  `needs_answer`:
    whether the reward takes the answer, so that each line must have one.
    """
    return read_prompts(
        file,
        tokenizer,
        max_tokens=data.max_prompt_tokens,
        chat_template=data.chat_template,
        date=prompt_digests.template_date(data, run),
        context=read_context(data, tokenizer),
        dropped=dropped if data.overlong_prompts == "drop" else None,
        needs_answer=needs_answer,
        fields=data.fields,
    )


def check_opens(directory: Path, *, skip: Sequence[str] = ()) -> None:
    """Raise UserError for an entry of a model's directory that cannot be read as a file.

    Such as a dangling link, as in an incomplete cache; a file without read permission; a directory
    or a pipe in place of a file.  Other directories, and names that match a pattern of `skip`, are
    ignored.
    """
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if path.is_dir() and path.suffix not in READ_SUFFIXES:
            continue
        if any(fnmatch(path.name, pattern) for pattern in skip):
            continue
        try:
            if not stat.S_ISREG(path.stat().st_mode):
                raise UserError(f"{path} is not a regular file, but would be read as one")
            with path.open("rb") as file:
                file.read(1)
        except OSError as error:
            link = f" is a link to {path.readlink()} and" if path.is_symlink() else ""
            raise UserError(f"{path}{link} cannot be read: {error.strerror}") from error


def check_weights(model: ModelConfig, hf: dict[str, Any]) -> None:
    """Raise UserError unless the checkpoint or the Hugging Face files to start from match `hf`.

    `hf`: the settings of `model.hf`, whose other files are copied to the exported model.
    """
    from megatron_prepo.actor.checkpoint import newest
    from megatron_prepo.models.fit import check_fit
    from megatron_prepo.models.hf_files import HFTensors
    from megatron_prepo.models.record import check_record, check_tokenizer, refuse_adapters
    from megatron_prepo.models.torch_dist import TorchDistReader

    try:
        if model.megatron:
            checkpoint = newest(model.megatron)
            check_opens(checkpoint)
            _check_form(checkpoint)
            refuse_adapters(TorchDistReader(checkpoint))
            check_record(checkpoint, hf, model.hf)
            check_tokenizer(checkpoint, model.hf)
        else:
            with HFTensors(model.hf, tied=hf["tie_word_embeddings"]) as tensors:
                check_fit(tensors, hf)
    except OSError as error:
        raise UserError(f"{error.filename} cannot be read: {error.strerror}") from error


def _check_form(checkpoint: Path) -> None:
    """Raise UserError unless `metadata.json`, which names the checkpoint's format, is valid."""
    try:
        form = json.loads((checkpoint / "metadata.json").read_bytes())
    except ValueError:
        form = None
    if not isinstance(form, dict):
        raise UserError(f"{checkpoint / 'metadata.json'} is damaged: it is not a JSON object")


def read_tokenizer(directory: str) -> Any:
    """Return the fast tokenizer of a Hugging Face directory; UserError without a usable one."""
    from transformers import AutoTokenizer

    if not any((Path(directory) / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        raise UserError(f"no tokenizer in {directory}: neither tokenizer.json nor vocab.json")
    # With Mistral's own file and mistral-common, which SGLang requires, transformers would return a
    # tokenizer without offsets; named, even as its default, this argument selects tokenizer.json.
    own = {"fix_mistral_regex": None} if (Path(directory) / "tekken.json").is_file() else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            directory, local_files_only=True, trust_remote_code=False, **own
        )
    except Exception as error:  # transformers and tokenizers raise all kinds for invalid files
        reason = " ".join(str(error).split())[:300]
        raise UserError(f"the tokenizer of {directory} cannot be read: {reason}") from error
    if not tokenizer.is_fast:
        raise UserError(f"the tokenizer of {directory} has no fast version (tokenizer.json)")
    if tokenizer.eos_token_id is None:
        raise UserError(f"the tokenizer of {directory} has no end-of-sequence token")
    return tokenizer
