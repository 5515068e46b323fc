"""Only functions that need all of a run's configuration take it; others take sections or numbers.

A function may take `Config` if it reads at least three of its sections, or sections by their names,
or hands it on to a function that may take it.
"""

import ast
import dataclasses
from collections.abc import Iterator
from pathlib import Path

import pytest

from megatron_prepo.config import Config

REPOSITORY = Path(__file__).resolve().parents[3]
SECTIONS = {field.name for field in dataclasses.fields(Config)}
FEWEST_SECTIONS = 3
NEED_ALL = {
    "megatron_prepo.config.": "reads, checks and writes configurations",
    "megatron_prepo.plan.": "computes memory and seconds from most sections, for changed ones too",
    "megatron_prepo.launch.doctor.": "has a finding for any section of a configuration, or none",
}
"""Modules whose functions may take all of it in any case, each with the reason."""


@dataclasses.dataclass
class Parameter:
    """A parameter that is a configuration."""

    where: str
    function: str
    """Dotted name of the function; of the class for a constructor."""
    sections: set[str]
    receivers: set[str]
    """Dotted names of the functions to which it is handed on."""


def dotted_names(tree: ast.Module, module: str) -> dict[str, str]:
    """Return the dotted name of each name that a module imports or defines."""
    names = {
        node.name: f"{module}.{node.name}"
        for node in tree.body
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            names |= {a.asname or a.name: f"{node.module}.{a.name}" for a in node.names}
    return names


def uses(scope: ast.AST, whole: set[str], names: dict[str, str]) -> tuple[set[str], set[str]]:
    """Return the sections that are read of a configuration, and who receives all of it."""
    sections, receivers = set(), set()
    for node in ast.walk(scope):
        if isinstance(node, ast.Attribute) and ast.unparse(node.value) in whole:
            sections |= {node.attr} & SECTIONS
        if isinstance(node, ast.Call):
            given = [*node.args, *(keyword.value for keyword in node.keywords)]
            if whole & set(map(ast.unparse, given)):
                head, dot, rest = ast.unparse(node.func).partition(".")
                receivers.add(names.get(head, head) + dot + rest)
    return (SECTIONS if "getattr" in receivers else sections), receivers


def parameters(code: str, module: str) -> Iterator[Parameter]:
    """Yield the parameters of a module's functions that are configurations."""
    tree = ast.parse(code)
    names = dotted_names(tree, module)
    classes = {
        method: node
        for node in ast.walk(tree)
        if isinstance(node, ast.ClassDef)
        for method in node.body
    }
    for node in ast.walk(tree):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        owner = classes.get(node)
        prefix = f"{module}.{owner.name}" if owner else module
        constructs = owner is not None and node.name == "__init__"
        for argument in (*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs):
            annotation = ast.unparse(argument.annotation) if argument.annotation else ""
            if annotation.removesuffix(" | None").rpartition(".")[2] != "Config":
                continue
            # a constructor may keep it for the other methods
            whole = {argument.arg, *([f"self.{argument.arg}"] if constructs else [])}
            found = uses(owner if constructs else node, whole, names | {"self": prefix})
            function = prefix if constructs else f"{prefix}.{node.name}"
            yield Parameter(f"{function}({argument.arg}), line {node.lineno}", function, *found)


def needless(found: list[Parameter]) -> list[str]:
    """Return which of the parameters should be sections or numbers instead."""
    takers: set[str] = set()
    num_before = -1

    def is_needed(parameter: Parameter) -> bool:
        names = (parameter.function, *parameter.receivers)
        in_listed_modules = any(name.startswith(tuple(NEED_ALL)) for name in names)
        reads_many = len(parameter.sections) >= FEWEST_SECTIONS
        return in_listed_modules or reads_many or bool(takers & parameter.receivers)

    while num_before < len(takers):
        num_before = len(takers)
        takers |= {parameter.function for parameter in found if is_needed(parameter)}
    return [f"{p.where} reads {sorted(p.sections) or 'none'}" for p in found if not is_needed(p)]


def test_functions_that_take_all_of_the_configuration_need_it():
    found = []
    for package in ("megatron_prepo", "checkpoints_convert"):
        for path in sorted((REPOSITORY / package).rglob("*.py")):
            parts = path.relative_to(REPOSITORY).with_suffix("").parts
            module = ".".join(part for part in parts if part != "__init__")
            found += parameters(path.read_text(), module)
    assert len(found) > 30
    assert needless(found) == []


IMPORTS = "from megatron_prepo.config import Config, to_tree\n"


@pytest.mark.parametrize(
    "code",
    [
        "def f(config: Config): return config.run.dir",
        "def f(config: Config | None): return config.run, config.data, config.data.eval",
        "def f(config: Config): g(config)\ndef g(other: Config): return other.run",
        "def f(config: Config): f(config)",
        "def f(a: Config, b: Config): return to_tree(a), b.run",
        "class A:\n def __init__(self, config: Config): self.config = config\n"
        " def g(self): return self.config.run, self.config.data",
    ],
)
def test_few_sections_are_found(code):
    assert needless(list(parameters(IMPORTS + code, "m")))


@pytest.mark.parametrize(
    "code",
    [
        "def f(config: Config): return config.run, config.data, config.loss.head",
        "def f(config: Config): return to_tree(config)",
        "def f(config: Config, name: str): return getattr(config, name)",
        "def f(config: Config): g(config)\n"
        "def g(other: Config): return other.run, other.data, other.loss",
        "class A:\n def __init__(self, config: Config): self.config = config\n"
        " def g(self): return self.config.run, self.config.data, self.config.loss\n"
        "def f(config: Config): A(config)",
        "class A:\n def f(self, config: Config): self.g(config)\n"
        " def g(self, config: Config): return to_tree(config)",
        "def f(data: DataConfig): return data.eval",
    ],
)
def test_many_sections_pass(code):
    assert needless(list(parameters(IMPORTS + code, "m"))) == []
