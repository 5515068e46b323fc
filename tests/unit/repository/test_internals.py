"""Internals of other libraries: what we replace is compared with the installed version."""

import ast
from pathlib import Path
from types import MethodType, ModuleType

import pytest

from megatron_prepo import internals
from megatron_prepo.cli import main
from megatron_prepo.errors import UserError

REPOSITORY = Path(__file__).resolve().parents[3]
OURS = ("megatron_prepo", "checkpoints_convert")


class Layer:
    """Stand-in for a class of a library."""

    weight = 1

    def forward(self, hidden, weight=None):
        return hidden


def module(name: str, **parts) -> ModuleType:
    """Return a module of a library."""
    made = ModuleType(name)
    vars(made).update(parts)
    return made


def use_gqa(mask, key):
    return mask is None


@pytest.mark.parametrize(
    "replacement",
    [
        lambda *args, **kwargs: True,
        lambda mask, *args, **kwargs: True,
        lambda mask, key, *args, **kwargs: True,
        lambda any_name, /, *args, **kwargs: True,
    ],
)
def test_what_fits_takes_the_place_of_the_original(replacement):
    library = module("transformers.sdpa", use_gqa=use_gqa)
    assert internals.replace(library, "use_gqa", replacement) is use_gqa
    assert library.use_gqa(1, 2) and library.use_gqa(1, 2, 3) and library.use_gqa(1, key=2)


@pytest.mark.parametrize(
    ("parts", "replacement", "difference"),
    [
        ({}, lambda *args, **kwargs: True, "transformers.sdpa has no use_gqa"),
        ({"use_gqa": True}, lambda *args, **kwargs: True, "use_gqa is not a function"),
        (
            {"use_gqa": lambda key, mask: True},
            lambda mask, *args, **kwargs: True,
            "argument 1 of transformers.sdpa.use_gqa(key, mask) is not mask",
        ),
        (
            {"use_gqa": lambda mask: True},
            lambda mask, key, *args, **kwargs: True,
            "argument 2 of transformers.sdpa.use_gqa(mask) is not key",
        ),
        (
            {"use_gqa": lambda *, mask: True},
            lambda mask, /, *args, **kwargs: True,
            "argument 1 of transformers.sdpa.use_gqa(*, mask) is not mask",
        ),
    ],
)
def test_what_has_changed_is_named_with_its_library(parts, replacement, difference, monkeypatch):
    monkeypatch.setattr(internals.importlib.metadata, "version", {"transformers": "7.1.0"}.get)
    library = module("transformers.sdpa", **parts)
    with pytest.raises(UserError) as refused:
        internals.replace(library, "use_gqa", replacement)
    assert difference in str(refused.value)
    assert "transformers 7.1.0 is not supported" in str(refused.value)
    assert internals.TRIED["transformers"][1] in str(refused.value)
    assert vars(library).get("use_gqa") is parts.get("use_gqa"), "nothing is replaced"


def test_a_method_of_one_object_is_replaced():
    layer, other = Layer(), Layer()
    internals.replace(layer, "forward", MethodType(lambda self, x, /, *_, **__: (self, x), layer))
    assert layer.forward(3, weight=4) == (layer, 3) and other.forward(3) == 3
    with pytest.raises(UserError, match=r"argument 1 of .*Layer.forward\(.*\) is not input"):
        internals.replace(other, "forward", MethodType(lambda self, input, *_, **__: 0, other))


def test_a_replacement_that_would_refuse_a_new_argument_is_ours_to_mend():
    with pytest.raises(AssertionError, match="needs"):
        internals.replace(Layer, "forward", lambda self, hidden, weight=None: hidden)


def test_a_part_that_is_used_must_be_there():
    internals.require(Layer, "forward", "weight")
    with pytest.raises(UserError, match="Layer has no bias"):
        internals.require(Layer, "forward", "bias")


def test_a_name_that_a_library_no_longer_has_is_one_line(monkeypatch, capsys):
    """The library is installed but lacks the name; an absent library is a different case."""

    def run(options):
        from megatron.core.optimizer import NoSuchOptimizer  # noqa: F401

    monkeypatch.setattr("megatron_prepo.cli._doctor", run)
    assert main(["doctor"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: megatron-core 0.1") and said.count("\n") == 1
    assert "NoSuchOptimizer" in said and internals.TRIED["megatron"][1] in said
    monkeypatch.setattr(internals, "_version", lambda module: None)
    with pytest.raises(ImportError, match="NoSuchOptimizer"):
        main(["doctor"])


def assignments(tree: ast.Module) -> list[tuple[str, int]]:
    """Return attributes of imported modules and classes that a file assigns to: name and line."""
    imported = {
        (alias.asname or alias.name).split(".")[0]
        for node in ast.walk(tree)
        if isinstance(node, ast.Import | ast.ImportFrom)
        for alias in node.names
    }
    found = []
    for node in ast.walk(tree):
        targets = node.targets if isinstance(node, ast.Assign) else [getattr(node, "target", None)]
        for target in targets:
            root = target
            while isinstance(root, ast.Attribute):
                root = root.value
            if root is not target and isinstance(root, ast.Name) and root.id in imported:
                found.append((ast.unparse(target), node.lineno))
    return found


def test_libraries_are_changed_through_internals_only():
    """A test's own example shows that an assignment would be found."""
    assert assignments(ast.parse("import torch.cuda\ntorch.cuda.stream = None")) == [
        ("torch.cuda.stream", 2)
    ]
    files = [file for folder in OURS for file in (REPOSITORY / folder).rglob("*.py")]
    assert len(files) > 100
    found = {
        f"{file.relative_to(REPOSITORY)}: {name}"
        for file in files
        for name, _ in assignments(ast.parse(file.read_text()))
    }
    assert found <= ALLOWED, found - ALLOWED


ALLOWED = {
    "megatron_prepo/actor/model.py: moe_utils.te_general_gemm",
    "megatron_prepo/process/library_messages.py: warnings.showwarning",
}
"""Allowed assignments: megatron-core 0.16 leaves the name undefined, so nothing is replaced; and
`warnings.showwarning` may be replaced by its documentation."""
