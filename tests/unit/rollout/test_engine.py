"""The interface of engines: both implement it, and no other module knows which engines exist."""

import ast
import inspect
from pathlib import Path

import pytest

import megatron_prepo
from megatron_prepo.records import Prompt
from megatron_prepo.rollout.engine import BackgroundEngine, Engine, PendingRollouts, Request
from megatron_prepo.rollout.sglang.engine import SGLangEngine
from megatron_prepo.rollout.transformers_engine import EmbeddedEngine

PACKAGE = Path(megatron_prepo.__file__).parent
KNOW_SGLANG = {"build.py", "doctor.py", "servers.py", "start.py"}
"""Modules that create engines, check for what they need, start servers, or show their commands."""


def methods(protocol) -> list[str]:
    return [n for n, f in inspect.getmembers(protocol, inspect.isfunction) if n[0] != "_"]


@pytest.mark.parametrize(
    ("engine", "protocol"),
    [(EmbeddedEngine, Engine), (SGLangEngine, Engine), (SGLangEngine, BackgroundEngine)],
)
def test_an_engine_has_the_methods_of_its_protocol_with_their_parameters(engine, protocol):
    assert "generate" in methods(protocol)
    for name in methods(protocol):
        asked, has = (inspect.signature(getattr(kind, name)) for kind in (protocol, engine))
        assert list(asked.parameters) == list(has.parameters), name


def imports(path: Path) -> set[str]:
    """Return the modules that a file imports, also within functions."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            found |= {f"{node.module}.{name.name}" for name in node.names}
        elif isinstance(node, ast.Import):
            found |= {name.name for name in node.names}
    return found


def test_only_construction_knows_sglang():
    files = [p for p in PACKAGE.rglob("*.py") if "sglang" not in p.relative_to(PACKAGE).parts]
    know = [p for p in files if any("rollout.sglang" in name for name in imports(p))]
    assert {path.name for path in know} == KNOW_SGLANG, know


def request(**options) -> Request:
    prompts = [Prompt(name, "", "", (5, 6), (0, 2)) for name in "ab"]
    settings = {"samples_per_prompt": 2, "temperature": 1.0, "max_new_tokens": 4, "seed": "1/x"}
    return Request(prompts=prompts, **settings | options)


def test_samples_are_in_the_prompts_order():
    samples = [(prompt.id, n) for prompt, n in request().samples()]
    assert samples == [("a", 0), ("a", 1), ("b", 0), ("b", 1)]


def test_prompts_may_have_samples_of_other_numbers():
    asked = request(samples_per_prompt=[range(1), range(2, 4)])
    assert [(prompt.id, n) for prompt, n in asked.samples()] == [("a", 0), ("b", 2), ("b", 3)]


def test_a_request_alone_reuses_nothing_and_tells_nobody():
    asked = request()
    assert asked.cached == {} and asked.on_rollouts({}) is None and asked.on_progress(1, 4) is None


def test_pending_rollouts_know_their_seconds_once_they_are_there():
    pending = PendingRollouts(lambda: (["rollout"], 1.5))
    assert pending.seconds == 0.0
    assert pending.result() == ["rollout"] and pending.seconds == 1.5
