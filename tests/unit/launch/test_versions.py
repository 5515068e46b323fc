"""Incompatible versions are reported with the reason, by our metadata and a small list."""

from importlib import metadata

import pytest

from megatron_prepo.launch import doctor, versions


@pytest.fixture
def installed(monkeypatch):
    """Have exactly these packages installed: name, version and requirements."""

    def have(*packages: tuple):
        by_name = {name: rest for name, *rest in packages}

        def look(name: str):
            if name not in by_name:
                raise metadata.PackageNotFoundError(name)
            return by_name[name]

        monkeypatch.setattr(metadata, "version", lambda name: look(name)[0])
        monkeypatch.setattr(metadata, "requires", lambda name: list(look(name)[1:]) or None)

    return have


def test_what_is_installed_here_goes_together():
    assert versions.problems() == []
    [finding] = [found for found in doctor.examine() if found.what == "versions"]
    assert finding.state == "ok"


def test_a_version_out_of_our_range_is_refused(installed):
    installed(
        ("megatron-prepo", "0.1.0", "torch>=2.10", "transformers<6,>=5.6", "scipy"),
        ("torch", "2.9.1"),
        ("transformers", "6.0.0rc1"),
    )
    assert versions.problems() == [
        ("torch 2.9.1, but megatron-prepo requires torch>=2.10", 'pip install "torch>=2.10"'),
        (
            "transformers 6.0.0rc1, but megatron-prepo requires transformers<6,>=5.6",
            'pip install "transformers<6,>=5.6"',
        ),
    ]
    findings = [found for found in doctor.examine() if found.what == "versions"]
    assert [found.state for found in findings] == ["missing", "missing"]


def test_another_triton_than_torchs_is_refused(installed):
    installed(
        ("megatron-prepo", "0.1.0", "torch>=2.10"),
        ("torch", "2.13.0", "triton==3.7.1; python_version < '3.15'"),
        ("triton", "3.9.0"),
    )
    assert versions.problems() == [
        (
            "triton 3.9.0, but torch 2.13.0 requires triton==3.7.1",
            'pip install "triton==3.7.1"',
        )
    ]


def test_markers_and_extras_of_another_machine_ask_for_nothing(installed):
    installed(
        ("megatron-prepo", "0.1.0", "numpy>=3; python_version < '3'", "numpy>=3; extra == 'x'"),
        ("numpy", "2.4"),
    )
    assert versions.problems() == []


@pytest.mark.parametrize(
    ("megatron", "triton", "fails"),
    [("0.16.1", None, False), ("0.17.0", None, True), ("0.19.2", "3.7.1", False)],
)
def test_megatron_that_imports_triton_needs_it(installed, megatron, triton, fails):
    installed(("megatron-core", megatron), *([("triton", triton)] if triton else []))
    found = versions.problems()
    assert [problem for problem, _ in found] == [
        "megatron-core from 0.17 on imports Triton, also on a CPU"
    ] * fails
