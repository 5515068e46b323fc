"""Fixtures for a real Slurm: `make test-slurm` runs everything here, `make test` a sample."""

import os
import random
from pathlib import Path

import pytest

from megatron_prepo import config as configuration
from tests.e2e.laptop import LAPTOP, made_by_ranks
from tests.real_slurm import cluster as slurm


def pytest_collection_modifyitems(items) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.slurm)


def pytest_generate_tests(metafunc) -> None:
    """Repeat each fault TIMES times, at different steps (`make test-slurm TIMES=5`)."""
    if "moment" in metafunc.fixturenames:
        drawn = random.Random(20)
        later = [drawn.randint(1, 8) for _ in range(int(os.environ.get("TIMES", "1")) - 1)]
        metafunc.parametrize("moment", [5, *later], ids=lambda step: f"step{step}")


@pytest.fixture(scope="session")
def running_cluster(pytestconfig, request):
    """A cluster for all tests of a process; without Slurm, `make test-slurm` fails, others skip.

    It has no accounting, which takes a database, if no test asks for it.
    """
    if why := slurm.missing():
        if pytestconfig.option.markexpr == "slurm":
            pytest.exit(why, returncode=2)
        pytest.skip(why)
    wanted = any("accounted" in item.fixturenames for item in request.session.items)
    with slurm.Cluster(**({} if wanted else {"ACCOUNTING": "no"})) as cluster:
        yield cluster


@pytest.fixture
def cluster(running_cluster):
    """The cluster, with an empty queue before and after."""
    running_cluster.idle()
    yield running_cluster
    running_cluster.idle()


@pytest.fixture
def accounted(cluster):
    """The cluster, if it has `sacct`."""
    if cluster.settings["ACCOUNTING"] == "no":
        pytest.skip(f"no sacct: apt-get install {' '.join(slurm.ACCOUNTING.values())}")
    return cluster


@pytest.fixture(scope="session")
def uninterrupted(tmp_path_factory):
    """Return the run that an interrupted one must equal, by settings; each is made once, here."""
    made = {}

    def run(*settings: str) -> Path:
        if settings not in made:
            directory = tmp_path_factory.mktemp("uninterrupted") / "run"
            layout = configuration.load(LAPTOP / "prepo.yaml", settings).parallel
            made[settings] = made_by_ranks(directory, *settings, num_ranks=layout.num_ranks)
        return made[settings]

    return run
