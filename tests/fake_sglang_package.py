"""Package named `sglang` whose server is the fake one, for code that starts its own servers."""

import os
import time
from pathlib import Path

TESTS = Path(__file__).resolve().parent
LAUNCH_SERVER = """
import os, subprocess, sys
if os.environ.get("FAKE_FAILS"):
    sys.exit("the fake cannot find its model")
print("the fake is starting", flush=True)
child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(600)"])
with open(os.environ["FAKE_PIDS"], "a") as pids:
    pids.write(f"{os.getpid()} {child.pid}\\n")
from fake_sglang import main
main()
"""
SERVER_ARGS = """
import argparse, json

class ServerArgs:
    @staticmethod
    def add_cli_args(parser):
        for name in ("model-path", "host", "dtype", "load-format", "device", "attention-backend"):
            parser.add_argument("--" + name)
        for name in ("port", "tp-size", "random-seed", "max-total-tokens", "chunked-prefill-size"):
            parser.add_argument("--" + name, type=int)
        for name in (
            *("skip-tokenizer-init", "skip-server-warmup", "enable-fp32-lm-head", "sleep-on-idle"),
            *("enable-return-routed-experts", "disable-cuda-graph", "enable-memory-saver"),
            *("enable-deterministic-inference", "enable-metrics"),
        ):
            parser.add_argument("--" + name, action="store_true")
        parser.add_argument("--overlap", action=argparse.BooleanOptionalAction, default=True)
        parser.add_argument("--mem-fraction-static", type=float)
        parser.add_argument("--cuda-graph-bs", type=int, nargs="+")
        parser.add_argument("--json-model-override-args", type=json.loads)
        parser.add_argument("--log-level", choices=["info", "error"])
"""
"""The names of real options, read as the real parser reads them."""


def install(directory: Path, monkeypatch) -> Path:
    """Put it on `PYTHONPATH`; return the file to which a server writes its processes' ids."""
    for name, value in environment(directory).items():
        monkeypatch.setenv(name, value)
    return directory / "pids"


def environment(directory: Path) -> dict[str, str]:
    """Write the package to the directory; return the variables with which Python finds it."""
    package = directory / "sglang"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    (package / "launch_server.py").write_text(LAUNCH_SERVER)
    (package / "srt").mkdir()
    (package / "srt" / "server_args.py").write_text(SERVER_ARGS)
    path = [str(directory), str(TESTS), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {"PYTHONPATH": os.pathsep.join(path), "FAKE_PIDS": str(directory / "pids")}


def processes(pids: Path, servers: int = 1) -> list[int]:
    """Wait for the processes of this many servers; return their ids."""
    wait_for("servers", lambda: pids.is_file() and pids.read_text().count("\n") >= servers)
    return [int(word) for word in pids.read_text().split()]


def wait_until_gone(ids: list[int], seconds: float = 60.0) -> None:
    """Raise if a process still exists at the deadline."""
    wait_for(f"the end of {ids}", lambda: not any(alive(pid) for pid in ids), seconds)


def alive(pid: int) -> bool:
    """Return whether the process runs; a zombie does not."""
    status = Path(f"/proc/{pid}/stat")
    return status.is_file() and status.read_text().rpartition(")")[2].split()[0] != "Z"


def wait_for(what: str, happened, seconds: float = 60.0) -> None:
    """Poll until it has happened."""
    deadline = time.monotonic() + seconds
    while not happened():
        assert time.monotonic() < deadline, f"waited {seconds:g} s for {what}"
        time.sleep(0.05)
