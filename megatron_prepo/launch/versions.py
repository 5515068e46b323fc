"""Checks of installed versions against required ranges and combinations known to fail."""

from importlib import metadata
from typing import NamedTuple

from packaging.requirements import Requirement

OWN = "megatron-prepo"


class Failure(NamedTuple):
    """A combination of versions that can be installed and does not work."""

    installed: tuple[str, ...]
    """Requirements that the installed packages fulfil."""
    absent: tuple[str, ...]
    """Packages that are not installed."""
    why: str
    remedy: str


KNOWN_FAILURES = (
    Failure(
        installed=("megatron-core>=0.17",),
        absent=("triton",),
        why="megatron-core from 0.17 on imports Triton, also on a CPU",
        remedy='pip install triton, or "megatron-core<0.17" if it is unavailable (macOS)',
    ),
)


def problems() -> list[tuple[str, str]]:
    """Return what is wrong with the installed versions, each with a remedy."""
    return [*_out_of_range(), *_known_failures()]


def _out_of_range() -> list[tuple[str, str]]:
    """Find installed versions outside the ranges that we, or packages that we require, set."""
    own = _requirements(OWN)
    found = {}
    for package in (OWN, *(requirement.name for requirement in own)):
        for required in own if package == OWN else _requirements(package):
            version = _version(required.name)
            if version and not required.specifier.contains(version, prereleases=True):
                by = package if package == OWN else f"{package} {_version(package)}"
                wanted = f"{required.name}{required.specifier}"
                found[f"{required.name} {version}, but {by} requires {wanted}"] = wanted
    return [(problem, f'pip install "{wanted}"') for problem, wanted in found.items()]


def _known_failures() -> list[tuple[str, str]]:
    return [
        (failure.why, failure.remedy)
        for failure in KNOWN_FAILURES
        if all(map(_fulfilled, map(Requirement, failure.installed)))
        and not any(map(_version, failure.absent))
    ]


def _fulfilled(required: Requirement) -> bool:
    version = _version(required.name)
    return version is not None and required.specifier.contains(version, prereleases=True)


def _requirements(package: str) -> list[Requirement]:
    """Return a package's requirements on this machine, without extras; [] if it is absent."""
    try:
        requirements = [Requirement(line) for line in metadata.requires(package) or []]
    except metadata.PackageNotFoundError:
        return []
    return [r for r in requirements if r.marker is None or r.marker.evaluate({"extra": ""})]


def _version(package: str) -> str | None:
    """Return the installed version; None if the package is absent."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
