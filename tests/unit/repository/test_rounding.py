"""No allowance for rounding is an arbitrary number, and the derived ones detect mistakes."""

import ast
from pathlib import Path

import pytest
import torch
from rounding import Reference, allowance, approx, assert_close, assert_gradients

TESTS = Path(__file__).resolve().parents[2]
COMPARISONS = ("approx", "assert_close", "assert_allclose", "allclose", "isclose", "gradcheck")
ALLOWANCES = ("rel", "abs", "rtol", "atol")
NOT_ROUNDING = {
    # file: {test: what its number stands for}
    "e2e/test_demo.py": {
        "test_it_learns": "pass rates of a few hundred samples",
        "test_transformers_reaches_the_same_pass_rate": "pass rates of a few hundred samples",
    },
    "e2e/test_machine_faults.py": {"test_the_clock_does_jump": "seconds"},
    "unit/tools/bench/test_head.py": {
        "test_naive_holds_a_few_times_the_float32_logits": "numbers a token",
    },
    "unit/tools/bench/test_plan.py": {
        "test_the_most_bytes_are_those_alive_at_once": "bytes of scalars"
    },
    "unit/compare/test_analysis.py": {"test_some_seeds_miss": "draws of a bootstrap"},
    "unit/plan/test_memory.py": {
        "test_a_layers_activations_are_what_autograd_keeps": "bytes of routing probabilities",
    },
    "unit/evaluation/test_pass_at_k.py": {
        "test_the_interval_of_many_problems_is_the_normal_one": "draws of a bootstrap",
        "test_the_mean_over_suites_counts_each_suite_once": "draws of a bootstrap",
    },
    "unit/plan/test_plan.py": {
        "test_the_distributed_optimizer_splits_as_planned": "padding of shards",
        "test_bytes_of_a_rank_by_hand": "padding of shards",
        "test_an_offloaded_optimizer_takes_host_memory": "whole bytes",
        "test_a_thousand_gpus_and_more": "padding of shards",
        "test_what_suggestions_are_made_of_is_the_real_model": "layers alike",
        "test_suggestions_fit_and_come_in_order": "layers alike",
    },
    "unit/rewards/test_tasks.py": {"test_worked_answers_have_the_promised_lengths": "samples"},
}


def chosen(source: str) -> set[str]:
    """Return the functions that compare by an arbitrary number, or by a library's default."""
    functions = [node for node in ast.parse(source).body if isinstance(node, ast.FunctionDef)]
    return {function.name for function in functions if any(map(chooses, ast.walk(function)))}


def chooses(node: ast.AST) -> bool:
    if isinstance(node, ast.Compare):  # by less than a small number
        limits = [
            v for op, v in zip(node.ops, node.comparators) if isinstance(op, ast.Lt | ast.LtE)
        ]
        return any(is_number(limit) and 0 < limit.value < 1e-3 for limit in limits)
    if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
        return False  # those of `rounding` are called by their bare names
    given = [keyword.value for keyword in node.keywords if keyword.arg in ALLOWANCES]
    by_default = not given
    return node.func.attr in COMPARISONS and (by_default or any(map(contains_a_number, given)))


def is_number(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, int | float)


def contains_a_number(node: ast.AST) -> bool:
    """Return whether a number occurs, other than 0 and an integer times something derived."""
    numbers = [part.value for part in ast.walk(node) if is_number(part)]
    if any(isinstance(part, ast.Name | ast.Call) for part in ast.walk(node)):
        numbers = [number for number in numbers if isinstance(number, float)]
    return any(numbers)


@pytest.mark.parametrize(
    ("line", "found"),
    [
        ("assert x == pytest.approx(1.0)", True),
        ("assert x == pytest.approx(1.0, rel=1e-6)", True),
        ("assert x == pytest.approx(1.0, rel=0, abs=2 * allowed)", False),
        ("assert x == pytest.approx(1.0, rel=1e-3 * size)", True),
        ("torch.testing.assert_close(x, y)", True),
        ("torch.testing.assert_close(x, y, rtol=0, atol=2e-5)", True),
        ("torch.testing.assert_close(x, y, rtol=0, atol=bound(9) * size)", False),
        ("assert np.allclose(x, y)", True),
        ("assert (x - y).abs().max() < 1e-5", True),
        ("assert (x - y).abs().max() <= allowed", False),
        ("assert (x - y).abs().max() > 1e-5", False),
        ("assert x == approx(1.0)", False),
    ],
)
def test_what_counts_as_chosen(line, found):
    assert bool(chosen(f"def test():\n    {line}\n")) == found


def test_no_allowance_for_rounding_is_a_chosen_number():
    for path in sorted(TESTS.rglob("*.py")):
        name = path.relative_to(TESTS).as_posix()
        if name not in ("rounding.py", "unit/repository/test_rounding.py"):
            assert chosen(path.read_text()) == NOT_ROUNDING.get(name, {}).keys(), name


def product(a, b):
    return [a @ b]


def inputs(dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(30, 30, generator=generator, dtype=dtype) for _ in range(2)]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_reference_allows_another_order_and_no_other_term(dtype):
    a, b = inputs(dtype)
    reference = Reference(product, a, b)
    reference.assert_equals([a.flip(1) @ b.flip(0)])
    for wrong in (a[:, 1:] @ b[1:], (a * (1 + 1e-4)) @ b, -a @ b, a @ b + torch.nan):
        with pytest.raises(AssertionError, match="result 0: off by"):
            reference.assert_equals([wrong])


def test_a_result_by_chance_exact_in_float32_allows_some_roundings():
    reference = Reference(lambda a: [a * 3], torch.ones(1))
    reference.assert_equals([torch.full((1,), 3 + 2**-21)])
    with pytest.raises(AssertionError, match="off by"):
        reference.assert_equals([torch.full((1,), 3 + 2**-16)])


def test_an_allowance_that_would_hide_mistakes_is_refused():
    assert allowance(1e-6, size=1.0) == 8e-6
    for error in (0.01, float("nan")):
        with pytest.raises(AssertionError, match="would hide mistakes"):
            allowance(error, size=1.0)


def test_a_bound_grows_with_operations_and_is_relative_to_terms_that_cancel():
    eps = torch.finfo(torch.float64).eps
    assert 1 + 100 * eps == approx(1.0) and 1 + 102 * eps != approx(1.0)
    assert 100 * eps != approx(0.0) and 100 * eps == approx(0.0, scale=1.0)
    assert approx(1.0, 10, dtype=torch.float32) == 1 + 1e-6
    assert_close(torch.tensor([0.1]).double() * 3, torch.tensor([0.1]).double() + 0.2, 2**28)
    with pytest.raises(AssertionError):
        assert_close(torch.ones(1), torch.ones(1) + 1e-4)


def test_a_gradient_that_is_off_by_a_millionth_is_seen():
    class Wrong(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.square()

        @staticmethod
        def backward(ctx, gradient):
            return gradient * 2 * ctx.saved_tensors[0] * (1 + 1e-6)

    x = torch.ones(3, dtype=torch.float64, requires_grad=True)
    assert_gradients(torch.square, [x], scale=1.0)
    with pytest.raises(RuntimeError, match="Jacobian mismatch"):
        assert_gradients(Wrong.apply, [x], scale=1.0)
