"""Serve SGLang's protocol over HTTP, in this process, and misbehave on request.

    with FakeSGLang() as fake:
        fake.fault = lambda path, body: "hang" if path == "/generate" else None

Its completions are a function of prompt and seed, its prompt log-probabilities of the weights that
it was given.  Faults: `hang`, `drip` (one byte at a time, forever), `reset`, `500`, `garbage` (no
JSON), `text`, `short` (a log-probability too few), `stale` (other weights), `nan`, `abort`, `die`
(this request and all later ones are refused), `refuse` (400), `slow` (answers when asked to abort),
`unrouted` and `misrouted` (no routing, and one of a token too few).

Run as `python fake_sglang.py --port N ...` it is a separate server.
"""

import base64
import contextlib
import hashlib
import io
import json
import os
import pickle
import signal
import socket
import struct
import sys
import threading
import time
import zlib
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

VOCAB, STOP = 259, 2
ALLOWED = {
    ("types", "SimpleNamespace"),
    ("torch", "Size"),
    ("torch", "float32"),
    ("torch", "bfloat16"),
    ("torch", "float64"),
    ("torch._utils", "_rebuild_tensor_v2"),
    ("torch", "Tensor"),
    ("torch", "uint8"),
    ("torch.storage", "UntypedStorage"),
    ("torch.storage", "_load_from_bytes"),
    ("torch.multiprocessing.reductions", "rebuild_tensor"),
    ("torch.multiprocessing.reductions", "rebuild_storage_filename"),
    ("collections", "OrderedDict"),
}
"""Names that SGLang's own unpickler allows (0.5.21), as far as we use them."""


def completion(input_ids: list[int], seed: int, max_new_tokens: int) -> tuple[list[int], bool]:
    """Return the tokens of a completion, and whether it ended before the limit.

    With `FAKE_ANSWER`, a JSON list of tokens, half of the completions are these.
    """
    state = hashlib.sha256(json.dumps([input_ids, seed]).encode()).digest()
    if state[1] % 2 and (answer := json.loads(os.environ.get("FAKE_ANSWER", "[]"))):
        return [*answer, STOP], True
    tokens = [3 + byte % (VOCAB - 3) for byte in state * (max_new_tokens // 32 + 1)]
    length = 1 + state[0] % (2 * max_new_tokens)
    if length > max_new_tokens:
        return tokens[:max_new_tokens], False
    return [*tokens[: length - 1], STOP], True


def logprob(token: int) -> float:
    """Return the log-probability of any token anywhere in a completion."""
    return -0.5 - token / VOCAB


def prompt_logprob(weights: dict) -> float:
    """Return the log-probability of any prompt token, which depends on every byte of the
    weights."""
    total = 0
    for name in sorted(weights):
        total = zlib.crc32(name.encode() + weights[name].contiguous().numpy().tobytes(), total)
    return -1.0 - total % 100_000 / 100_000


def experts(tokens: list[int], layers: int, experts_per_token: int) -> list[int]:
    """Of each token in each layer, different ones of 8."""
    return [
        (token + 3 * layer + n) % 8
        for token in tokens
        for layer in range(layers)
        for n in range(experts_per_token)
    ]


class FakeSGLang:
    """The server; `port=0` takes a free port."""

    def __init__(
        self,
        port: int = 0,
        *,
        host: str = "127.0.0.1",
        architectures=("Qwen3ForCausalLM",),
        sessions: bool = True,
        num_ranks: int = 1,
        fp32_lm_head: bool = False,
        routing: tuple[int, int] | None = None,
    ):
        """Start; `routing` is the number of layers and of experts per token, returned on
        request."""
        self.fp32_lm_head, self.routing = fp32_lm_head, routing
        self.architectures, self.sessions, self.num_ranks = list(architectures), sessions, num_ranks
        self.weights: dict = {}
        self.version, self.in_session, self.paused = "default", False, False
        self.fault = lambda path, body: None
        self.prompt_logprobs = lambda ids: [prompt_logprob(self.weights)] * (len(ids) - 1)
        self.calls: list[str] = []
        self.requests: list[dict] = []
        """Bodies of /generate, in the order of arrival."""
        self.answered: Counter[str] = Counter()
        """Complete answers of /generate that were written, by prompt and seed."""
        self.under_way = self.most_under_way = 0
        self.aborted: set[str] = set()
        self.seconds = 0.002
        """Seconds that an answer of /generate takes."""
        self.moe_runner = "auto"
        self.dead, self._closing = False, threading.Event()
        self._lock = threading.Lock()
        self._server = _Listener((host, port), _handler_of(self))
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.05,))
        self._thread.daemon = True

    def __enter__(self) -> "FakeSGLang":
        self._thread.start()
        return self

    def __exit__(self, *_) -> None:
        self._closing.set()
        self._server.shutdown()
        self._server.server_close()

    def restart(self) -> None:
        """Serve again, without the weights that it had."""
        self.dead, self.version, self.weights, self.in_session = False, "default", {}, False
        self.fault = lambda path, body: None

    def answer(self, path: str, body: dict) -> tuple[int, object]:
        """Return status and content."""
        match path.partition("?")[0]:
            case "/health":
                return 200, {}
            case "/server_info":
                info = {"tp_size": self.num_ranks, "dp_size": 1}
                info["enable_fp32_lm_head"] = self.fp32_lm_head
                info["moe_runner_backend"] = self.moe_runner
                return 200, info | {"enable_return_routed_experts": self.routing is not None}
            case "/model_info":
                return 200, {"architectures": self.architectures, "weight_version": self.version}
            case "/openapi.json":
                paths = ["/generate", *["/begin_weight_update"] * self.sessions]
                return 200, {"paths": {key: {} for key in paths}}
            case "/generate":
                return 200, self._generate(body)
            case "/abort_request":
                self.aborted.add(body["rid"])
                return 200, {}
            case "/begin_weight_update" | "/end_weight_update" as path:
                self.in_session = path.startswith("/begin")
                return 200, {"success": True, "message": ""}
            case "/update_weights_from_tensor":
                return self._from_tensor(body)
            case "/update_weights_from_disk":
                return self._from_disk(body)
            case "/init_weights_update_group":
                return self._join(body)
            case "/update_weights_from_distributed":
                return self._from_broadcast(body)
            case "/destroy_weights_update_group":
                return 200, {"success": True, "message": ""}
            case "/update_weight_version":
                self.version = body["new_version"]
                return 200, {"success": True}
            case "/pause_generation" | "/continue_generation" as path:
                self.paused = path.startswith("/pause")
                return 200, {"status": "ok"}
            case "/flush_cache" | "/freeze_gc":
                return 200, {}
            case "/release_memory_occupation" | "/resume_memory_occupation":
                return 200, {}
        return 404, {"message": f"no {path}"}

    def _generate(self, body: dict) -> dict:
        ids, sampling = body["input_ids"], body["sampling_params"]
        meta = {
            "prompt_tokens": len(ids),
            "weight_version": self.version,
            "weight_versions": [{"version": self.version, "start": 0, "end": 1}],
        }
        if body.get("logprob_start_len") == 0:
            values = [None, *self.prompt_logprobs(ids)]
            meta["input_token_logprobs"] = [
                [value, token, None] for value, token in zip(values, ids, strict=True)
            ]
            meta["finish_reason"] = {"type": "length"}
            return {"output_ids": [], "meta_info": meta}
        tokens, ends = completion(ids, sampling["sampling_seed"], sampling["max_new_tokens"])
        meta["finish_reason"] = {"type": "stop" if ends else "length"}
        if body["rid"] in self.aborted:
            tokens, meta["finish_reason"] = tokens[:1], {"type": "abort"}
        meta["output_token_logprobs"] = [[logprob(token), token, None] for token in tokens]
        if body.get("return_routed_experts") and self.routing:
            rows = experts([*ids, *tokens][:-1], *self.routing)
            meta["routed_experts"] = base64.b64encode(struct.pack(f"<{len(rows)}i", *rows)).decode()
        return {"output_ids": tokens, "meta_info": meta}

    def _from_tensor(self, body: dict) -> tuple[int, object]:
        if self.sessions and not self.in_session:
            return 400, {"success": False, "message": "must run between begin and end"}
        payloads = body["serialized_named_tensors"]
        assert len(payloads) == self.num_ranks and body["load_format"] == "flattened_bucket"
        # each rank reads its own, and lets go of it
        [*_, bucket] = [_Strict(io.BytesIO(base64.b64decode(p))).load() for p in payloads]
        assert len({meta.dtype for meta in bucket["metadata"]}) == 1, "bytes may be misaligned"
        for meta in bucket["metadata"]:
            flat = bucket["flattened_tensor"][meta.start_idx : meta.end_idx]
            # a copy: the sender's memory holds other tensors soon
            self.weights[meta.name] = flat.view(meta.dtype).reshape(meta.shape).clone()
        return 200, {"success": True, "message": ""}

    def _join(self, body: dict) -> tuple[int, object]:
        """Join a process group; a process can join one only, so the fake needs a separate
        process."""
        from datetime import timedelta

        from megatron_prepo.rollout.sglang.transport import join_group

        if at := os.environ.get("FAKE_DIES_AT"):
            Path(f"{at}.joining").touch()
        self._group = join_group(
            f"{body['master_address']}:{body['master_port']}",
            body["rank_offset"],
            body["world_size"],
            body["group_name"],
            body["backend"],
            timedelta(seconds=60),
        )
        return 200, {"success": True, "message": ""}

    def _from_broadcast(self, body: dict) -> tuple[int, object]:
        import torch

        assert self.in_session and body["load_format"] == "flattened_bucket"
        dtypes = [getattr(torch, name) for name in body["dtypes"]]
        tensors = [torch.empty(s, dtype=d) for s, d in zip(body["shapes"], dtypes, strict=True)]
        flat = torch.cat([tensor.view(-1).view(torch.uint8) for tensor in tensors])
        try:
            torch.distributed.broadcast(flat, src=0, group=self._group)
        except RuntimeError as error:
            return 400, {"success": False, "message": f"Failed to receive weights: {error}"}
        parts = flat.split([tensor.numel() * tensor.element_size() for tensor in tensors])
        for name, part, tensor in zip(body["names"], parts, tensors, strict=True):
            self.weights[name] = part.clone().view(tensor.dtype).view(tensor.shape)
        return 200, {"success": True, "message": ""}

    def _from_disk(self, body: dict) -> tuple[int, object]:
        from safetensors.torch import load_file

        for file in Path(body["model_path"]).glob("*.safetensors"):
            self.weights |= load_file(file)
        return 200, {"success": True, "message": ""}


class _Strict(pickle.Unpickler):
    def find_class(self, module: str, name: str):
        assert (module, name) in ALLOWED, f"SGLang would refuse {module}.{name}"
        found = super().find_class(module, name)
        return _as_another_process(found) if name == "rebuild_storage_filename" else found


def _as_another_process(rebuild):
    """Open the file where the process that created it would use its own storage."""
    from torch.multiprocessing.reductions import shared_cache

    def rebuild_anew(kind, manager, handle, *sizes):
        shared_cache.pop(handle, None)
        return rebuild(kind, manager, handle, *sizes)

    return rebuild_anew


class _Listener(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 256

    def __init__(self, address: tuple[str, int], handler: type):
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def handle_error(self, request, client_address) -> None:
        """Handle connections that end in various ways; any other error is the fake's, or ours."""
        if not isinstance(sys.exc_info()[1], OSError):
            super().handle_error(request, client_address)


def _handler_of(fake: FakeSGLang):
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self._serve({})

        def do_POST(self) -> None:
            length = int(self.headers.get("Content-Length") or 0)
            self._serve(json.loads(self.rfile.read(length) or b"{}"))

        def log_message(self, *_) -> None:
            pass

        def _serve(self, body: dict) -> None:
            with fake._lock:
                fake.calls.append(self.path)
                if self.path == "/generate":
                    fake.requests.append(body)
                    fake.under_way += 1
                    fake.most_under_way = max(fake.most_under_way, fake.under_way)
            self._answer(body)

        def _answer(self, body: dict) -> None:
            fault = "reset" if fake.dead else fake.fault(self.path, body)
            if fault == "die":
                fake.dead, fault = True, "reset"
            if fault == "reset":
                linger = struct.pack("ii", 1, 0)
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, linger)
                self.close_connection = True
                self.connection.close()
                return
            if fault == "hang":
                fake._closing.wait(60)
                return
            if fault == "slow":
                while body["rid"] not in fake.aborted and not fake._closing.is_set():
                    time.sleep(0.01)
            if fault == "drip":
                self._head(200, 100_000)
                while not fake._closing.is_set():
                    self.wfile.write(b" ")
                    time.sleep(0.02)
                return
            if fault in ("500", "refuse"):
                return self._write(500 if fault == "500" else 400, {"message": "the fake will not"})
            if fault == "garbage":
                return self._write(200, b"<html>busy</html>")
            if fault == "text":
                return self._write(200, "busy")
            status, content = fake.answer(self.path, body)
            logprobs = "output_token_logprobs"
            if self.path == "/generate" and body.get("logprob_start_len") == 0:
                logprobs = "input_token_logprobs"
            if fault == "short":
                content["meta_info"][logprobs].pop()
            if fault == "unrouted":
                content["meta_info"].pop("routed_experts")
            if fault == "misrouted":
                rows = base64.b64decode(content["meta_info"]["routed_experts"])
                one = 4 * fake.routing[0] * fake.routing[1]
                content["meta_info"]["routed_experts"] = base64.b64encode(rows[:-one]).decode()
            if fault == "stale":
                content["meta_info"]["weight_version"] = "default"
            if fault == "nan":
                content["meta_info"][logprobs][-1][0] = float("nan")
            if fault == "abort":
                content["meta_info"]["finish_reason"] = {"type": "abort"}
            time.sleep(fake.seconds if self.path == "/generate" else 0.002)
            with fake._lock:
                fake.under_way -= self.path == "/generate"
            self._write(status, content)
            if self.path == "/generate" and not fault:
                seed = body["sampling_params"].get("sampling_seed")
                with fake._lock:
                    fake.answered[f"{body['input_ids']} {seed}"] += 1

        def _write(self, status: int, content) -> None:
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self._head(status, len(data))
            self.wfile.write(data)

        def _head(self, status: int, length: int) -> None:
            self.send_response(status)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(length))
            self.end_headers()

    return Handler


def main() -> None:
    """Run as `python -m sglang.launch_server --port N ...`, a server of `--model-path`.

    With `FAKE_DIES_AT=DIRECTORY/NAME`, the first server that is asked for /NAME is killed, once: it
    leaves that file.  With `FAKE_DIES_AFTER_OTHERS`, only once another is joining a process group.
    """
    options = ("--host", "--port", "--model-path")
    host, port, model = (sys.argv[sys.argv.index(option) + 1] for option in options)
    signal.signal(signal.SIGTERM, lambda *_: os._exit(0))
    config = Path(model, "config.json")
    known = {}
    if config.exists():  # tests of the process alone have no model
        known["architectures"] = json.loads(config.read_text())["architectures"]
    fake = FakeSGLang(
        int(port),
        host=host,
        fp32_lm_head="--enable-fp32-lm-head" in sys.argv,
        **known,
    )
    with fake, contextlib.suppress(KeyboardInterrupt):
        fake.seconds = float(os.environ.get("FAKE_SECONDS", fake.seconds))
        fake.fault = _fault_of_the_environment
        fake._closing.wait()


def _fault_of_the_environment(path: str, body: dict) -> None:
    at = Path(os.environ.get("FAKE_DIES_AT", "nothing"))
    if at.name == path.strip("/"):
        with contextlib.suppress(FileExistsError):
            at.touch(exist_ok=False)
            while "FAKE_DIES_AFTER_OTHERS" in os.environ and not Path(f"{at}.joining").exists():
                time.sleep(0.05)
            os.kill(os.getpid(), signal.SIGKILL)


if __name__ == "__main__":
    main()
