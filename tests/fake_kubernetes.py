"""Plays Kubernetes' training operator on this machine: an API server that knows TrainJobs.

A job's pods are processes here, one per node, with the variables that the operator's runtime
`torch-distributed` sets for torchrun.  It reproduces creation, states and the command, which no
shell reads.
"""

import contextlib
import json
import os
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

from megatron_prepo.process.ports import free_port

JOBS = "/apis/trainer.kubeflow.org/v1alpha1/namespaces/default/trainjobs"


@contextlib.contextmanager
def serve(directory: Path, *, cwd: Path) -> Iterator[tuple[dict[str, str], list[dict]]]:
    """Serve the API; yield the environment in which it is found, and the TrainJobs received."""
    pods: list[subprocess.Popen] = []
    jobs: list[dict] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            job = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            if self.path != JOBS:
                return self.answer(404, {})
            jobs.append(job)
            with (directory / "pods.log").open("w") as log:
                pods.extend(_start(job, cwd, environment, log))
            self.answer(201, job)

        def do_GET(self):
            if not jobs or self.path != f"{JOBS}/{jobs[0]['metadata']['name']}":
                return self.answer(404, {})
            codes = [pod.poll() for pod in pods]
            status = {
                "name": "node",
                "active": codes.count(None),
                "failed": int(any(codes)),
                "succeeded": int(not any(codes) and None not in codes),
            }
            self.answer(200, jobs[0] | {"status": {"jobsStatus": [status]}})

        def answer(self, code: int, body: dict):
            text = json.dumps(body).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    environment = install(directory, server.server_port)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield environment, jobs
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
        for pod in pods:
            pod.kill()
            pod.wait()


def _start(job: dict, cwd: Path, environment: dict[str, str], log) -> list[subprocess.Popen]:
    trainer = job["spec"]["trainer"]
    given = {variable["name"]: variable["value"] for variable in trainer["env"]}
    port = free_port()
    return [
        subprocess.Popen(
            trainer["command"],
            cwd=cwd,
            env=os.environ
            | environment
            | given
            | {
                "PET_NNODES": str(trainer["numNodes"]),
                "PET_NPROC_PER_NODE": str(trainer["numProcPerNode"]),
                "PET_NODE_RANK": str(node),
                "PET_MASTER_ADDR": "127.0.0.1",
                "PET_MASTER_PORT": str(port),
            },
            stdout=log,
            stderr=log,
        )
        for node in range(trainer["numNodes"])
    ]


def install(directory: Path, port: int) -> dict[str, str]:
    """Write a `kubectl`; return the environment in which the API server at this port is found."""
    named = {"cluster": "here", "user": "me"}
    kubeconfig = {
        "apiVersion": "v1",
        "kind": "Config",
        "current-context": "here",
        "clusters": [{"name": "here", "cluster": {"server": f"http://127.0.0.1:{port}"}}],
        "contexts": [{"name": "here", "context": named}],
        "users": [{"name": "me", "user": {}}],
    }
    path, binaries = directory / "kubeconfig", directory / "bin"
    path.write_text(json.dumps(kubeconfig))
    # by which NeMo-Run looks for pods and their logs; it finds none
    binaries.mkdir()
    (binaries / "kubectl").write_text("#!/bin/sh\necho '{}'\n")
    (binaries / "kubectl").chmod(0o755)
    # torchrun is where this interpreter is
    found = [str(binaries), str(Path(sys.executable).parent), os.environ["PATH"]]
    return {"KUBECONFIG": str(path), "PATH": os.pathsep.join(found)}
