"""A trainer with few open files left: its servers are healthy, and are not given up for that."""

import json
import os
import re
import subprocess
import sys

import pytest
from fake_sglang import FakeSGLang

from megatron_prepo.config import to_tree
from tests.unit.rollout.test_sglang_launch import config_of

TRAINER = """
import json, os, resource, sys
from megatron_prepo.config import from_tree
from megatron_prepo.errors import UserError
from megatron_prepo.rollout.sglang import open_files
from megatron_prepo.rollout.engine import EngineError
from megatron_prepo.rollout.sglang.fleet import Fleet, Server
from tests.unit.rollout.test_sglang_generation import SAMPLING, Generation, jobs
tree, soft, hard, held = json.loads(sys.argv[1]), *map(int, sys.argv[2:])
settings, said = from_tree(tree).servers, []
resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
if held:  # as if others had taken the room that was made
    open_files.make_room = lambda settings, servers: None
    files = [os.open(os.devnull, os.O_RDONLY) for _ in range(held)]
try:
    fleet = Fleet([Server(url) for url in settings.urls], settings, log=said.append)
    generation = Generation(fleet, jobs(100), SAMPLING, lambda *state: None)
    print(len(fleet.run(generation.run()).result(timeout=100)), said)
except (UserError, EngineError) as error:
    print(type(error).__name__, error, said)
"""


@pytest.mark.parametrize(
    ("soft", "hard", "held", "printed"),
    [
        (256, 4096, 0, r"400 \[\]"),
        (
            256,
            512,
            0,
            r"UserError servers\.concurrency=300 at 1 server may need 556 open files, and this "
            r"machine allows a process 512 .*or set servers\.concurrency=256 \[\]",
        ),
        (256, 512, 180, r"OutOfFiles no connection to http://127.*servers\.concurrency=300 \[\]"),
    ],
)
def test_room_is_made_or_the_numbers_are_told_and_no_server_is_given_up(soft, hard, held, printed):
    with FakeSGLang() as fake:
        fake.version, fake.seconds = "run.3", 0.5
        config = config_of(servers={"urls": [fake.url], "concurrency": 300})
        numbers = map(str, (soft, hard, held))
        done = subprocess.run(
            [sys.executable, "-c", TRAINER, json.dumps(to_tree(config)), *numbers],
            capture_output=True,
            text=True,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        )
    assert re.fullmatch(printed, done.stdout.strip()), done.stdout + done.stderr
