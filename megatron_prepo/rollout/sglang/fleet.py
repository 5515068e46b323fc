"""The servers of a run; every call has a deadline, and every error names the server.

A server is marked as failed when it does not respond in time, cannot be reached, responds with
other weights than the actor's, or fails repeatedly.  It gets no requests until `reconnect`, before
a weight sync, finds it healthy.
"""

import asyncio
from collections.abc import Callable, Coroutine, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from threading import Thread
from typing import Any, TypeVar

import httpx

from megatron_prepo.config import ServersConfig
from megatron_prepo.rollout.engine import EngineError
from megatron_prepo.rollout.sglang import open_files
from megatron_prepo.rollout.sglang.launch import OwnServer

POLL_SECONDS = 0.5
NORMALIZING_RUNNERS = ("flashinfer_trtllm", "experimental_sgl_trtllm")
"""SGLang's `moe_runner_backend` whose kernel chooses the experts, and always normalises their
probabilities (0.5.21, 0.5.23); `auto` is the first of them on Blackwell."""
Result = TypeVar("Result")


class OutOfFiles(EngineError):
    """This machine cannot open another connection; no server is to blame."""


class ServerFailed(Exception):
    """A request failed in a way that may not recur in another attempt or on another server."""


class ServerHung(ServerFailed):
    """No response by the deadline."""


class StaleWeights(ServerFailed):
    """A response by other weights than the actor's."""


@dataclass(eq=False)
class Server:
    """State of one server."""

    url: str
    own: OwnServer | None = None
    num_ranks: int = 1
    """Tensor-parallel size."""
    has_sessions: bool = False
    """Whether weight updates are enclosed in `begin_weight_update` and `end_weight_update`."""
    described: bool = False
    asleep: bool = False
    """Whether it has released the memory of its key-value cache."""
    in_flight: int = 0
    """Completions in progress."""
    strikes: int = 0
    """Groups of failed completions since the last successful one."""
    last_strike: float = 0.0
    lost: str | None = None
    """Reason why it failed; None: it is alive."""


class Fleet:
    """The servers; all methods but `run` and `close` belong to the event loop of `run`."""

    def __init__(
        self,
        servers: Sequence[Server],
        settings: ServersConfig,
        architectures: Sequence[str] = (),
        log: Callable[[str], None] = print,
        fp32_lm_head: bool | None = None,
        *,
        routing: bool = False,
        decodes: bool = False,
        normalized: bool = True,
    ) -> None:
        """`fp32_lm_head`: required type of the servers' logits; None accepts either.

        `routing`: whether the experts of tokens will be requested.
        `decodes`: whether stop strings will be, for which a server needs its tokenizer.
        `normalized`: whether the probabilities of a token's experts add up to 1, or there are none.
        """
        self.servers, self.settings, self.log = list(servers), settings, log
        open_files.make_room(settings, len(self.servers))
        self.architectures, self.fp32_lm_head = list(architectures), fp32_lm_head
        self.routing, self.decodes, self.normalized = routing, decodes, normalized
        self.changes = 0
        """Number of times that a server failed or was reconnected."""
        self._clients: dict[str, httpx.AsyncClient] = {}
        self._loop = asyncio.new_event_loop()
        self._thread = Thread(target=self._loop.run_forever, name="sglang", daemon=True)
        self._thread.start()

    def run(self, coroutine: Coroutine[Any, Any, Result]) -> Future[Result]:
        """Start a coroutine in the background; returns its future."""
        return asyncio.run_coroutine_threadsafe(coroutine, self._loop)

    def close(self) -> None:
        """Close connections and stop the servers that the run started."""
        self.run(self._close_clients()).result(timeout=30)
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join(timeout=30)
        for server in self.servers:
            if server.own:
                server.own.stop()

    def alive(self) -> list[Server]:
        """Return the servers that are alive; raises EngineError with every failure if none is."""
        alive = [server for server in self.servers if server.lost is None]
        if not alive:
            fates = "\n".join(f"{server.url}: {server.lost}" for server in self.servers)
            raise EngineError(f"no SGLang server is left\n{fates}")
        return alive

    def mark_failed(self, server: Server, reason: str) -> None:
        """Remove a server from rotation."""
        if server.lost is not None:
            return
        if server.own and (ended := server.own.ended()):
            reason = f"{reason}; the process {ended}"
        server.lost = reason
        self.changes += 1
        self.log(f"SGLang: {server.url} is given up: {reason}")

    async def call(
        self,
        server: Server,
        path: str,
        body: dict[str, Any] | None = None,
        *,
        seconds: float,
        method: str = "POST",
    ) -> Any:
        """Return the response to one request, as JSON or, if it is not JSON, as text.

        Raises ServerHung or ServerFailed if another attempt or server may succeed, EngineError for
        a request that the server rejects (4xx), and OutOfFiles.  Nothing is sent twice.
        """
        what = f"{server.url}{path}"
        try:
            response = await asyncio.wait_for(
                self._client(server).request(method, path, json=body), seconds
            )
        except asyncio.TimeoutError:
            raise ServerHung(f"no answer from {what} within {seconds:g} s") from None
        except httpx.HTTPError as error:
            if isinstance(error, httpx.ConnectError) and open_files.exhausted(error):
                raise OutOfFiles(
                    f"no connection to {what}: this process or machine can open no further file "
                    "(ulimit -n); raise the limit, or lower servers.concurrency="
                    f"{self.settings.concurrency}"
                ) from error
            raise ServerFailed(f"{what}: {type(error).__name__} {error}".strip()) from error
        if response.status_code >= 500:
            raise ServerFailed(f"{what} answered {response.status_code}: {response.text[:300]}")
        if response.status_code >= 400:
            raise EngineError(f"{what} answered {response.status_code}: {response.text[:300]}")
        if response.headers.get("content-type", "").startswith("application/json"):
            try:
                return response.json()
            except ValueError:
                raise ServerFailed(f"{what} answered {response.text[:100]!r}, no JSON") from None
        return response.text

    async def call_all(
        self,
        path: str,
        body_of: Callable[[Server], dict[str, Any]],
        *,
        seconds: float,
        servers: Sequence[Server] | None = None,
    ) -> dict[str, Any]:
        """Send one request to each of the servers (None: all that are alive) concurrently.

        A server that fails is removed from rotation.  Returns the remaining servers' responses by
        URL.  Raises EngineError if one rejects the request, or no server is alive.
        """
        servers = self.alive() if servers is None else servers

        async def ask(server: Server) -> Any:
            try:
                return await self.call(server, path, body_of(server), seconds=seconds)
            except ServerFailed as failure:
                if server.own:  # the process, whose log is reported, exits after its connections
                    await asyncio.sleep(POLL_SECONDS)
                # immediately visible to those who wait for all servers
                self.mark_failed(server, str(failure))

        answers = await asyncio.gather(*map(ask, servers), return_exceptions=True)
        for answer in answers:
            if isinstance(answer, BaseException):
                raise answer
        self.alive()
        return {
            server.url: answer
            for server, answer in zip(servers, answers, strict=True)
            if server.lost is None
        }

    async def reconnect(self) -> bool:
        """Add new servers, restart failed ones of the run, and add others that are healthy again.

        A weight sync must follow.  Returns whether there is a server that did not take part in the
        last sync.  Raises EngineError if no server is alive.
        """
        coming = [server for server in self.servers if server.lost or not server.described]
        await asyncio.gather(*(self._reconnect(server) for server in coming))
        self.alive()
        return any(server.lost is None for server in coming)

    async def _reconnect(self, server: Server) -> None:
        seconds = self.settings.connect_seconds
        if server.own:
            seconds = self.settings.start_seconds
            if server.lost is not None:
                await asyncio.to_thread(server.own.stop)
                server.own.start()
                server.url = server.own.url
        try:
            await self._wait_until_healthy(server, seconds)
            await self._describe(server)
            if server.own:
                # a server does this itself after a warm-up; without it, each flush of the cache
                # walks all imported objects, 0.3 s on a CPU
                await self.call(server, "/freeze_gc", seconds=self.settings.connect_seconds)
        except ServerFailed as failure:
            if server.lost is None:
                self.mark_failed(server, str(failure))
            else:
                server.lost = f"{server.lost}; then {failure}"
            return
        if server.lost is not None:
            self.log(f"SGLang: {server.url} serves again")
        server.lost, server.strikes, server.asleep = None, 0, False
        self.changes += 1

    async def _wait_until_healthy(self, server: Server, seconds: float) -> None:
        deadline = asyncio.get_running_loop().time() + seconds
        while True:
            if server.own and (ended := server.own.ended()):
                raise ServerFailed(f"the process {ended}")
            try:
                await self.call(
                    server, "/health", seconds=self.settings.connect_seconds, method="GET"
                )
                return
            except ServerFailed as failure:
                if asyncio.get_running_loop().time() > deadline:
                    lines = f"; {server.own.last_lines()}" if server.own else ""
                    raise ServerHung(
                        f"not healthy within {seconds:g} s, at last: {failure}{lines}"
                    ) from failure
            await asyncio.sleep(POLL_SECONDS)

    async def _describe(self, server: Server) -> None:
        """Read a server's settings; raises EngineError for a server that cannot be used."""
        seconds = self.settings.connect_seconds
        info = await self.call(server, "/server_info", seconds=seconds, method="GET")
        model = await self.call(server, "/model_info", seconds=seconds, method="GET")
        paths = await self.call(server, "/openapi.json", seconds=seconds, method="GET")
        try:
            server.num_ranks = int(info["tp_size"])
            server.has_sessions = "/begin_weight_update" in paths["paths"]
            replicas, architectures = info["dp_size"], model.get("architectures")
            fp32_lm_head = bool(info.get("enable_fp32_lm_head"))
            tells_routing = bool(info.get("enable_return_routed_experts"))
            runner = info.get("moe_runner_backend")
            decodes = not info.get("skip_tokenizer_init")
        except (TypeError, KeyError, ValueError, AttributeError) as error:
            raise ServerFailed(f"does not describe itself as SGLang does: {error!r}") from error
        if replicas != 1:
            raise EngineError(
                f"{server.url} has dp_size={replicas}, and SGLang updates the weights of one "
                "replica only: start as many servers instead"
            )
        if self.architectures and architectures and architectures != self.architectures:
            raise EngineError(
                f"{server.url} serves {architectures}, and the actor is {self.architectures}"
            )
        if self.fp32_lm_head is not None and fp32_lm_head != self.fp32_lm_head:
            raise EngineError(
                f"{server.url} has enable_fp32_lm_head={str(fp32_lm_head).lower()}, and the actor "
                f"model.fp32_lm_head={str(self.fp32_lm_head).lower()}: their logits are rounded "
                "differently; start the server, or set the actor, as the other"
            )
        if self.routing and not tells_routing:
            raise EngineError(
                f"{server.url} does not tell which experts it chooses, as rollout.router_replay="
                "true needs it to: start it with --enable-return-routed-experts, or set "
                "rollout.router_replay=false"
            )
        if self.decodes and not decodes:
            raise EngineError(
                f"{server.url} has no tokenizer, which the stop strings of rollout.stop need: "
                "start it without --skip-tokenizer-init, or use rollout.stop_tokens"
            )
        if not self.normalized and runner in NORMALIZING_RUNNERS:
            raise EngineError(
                f"{server.url} has moe_runner_backend={runner}, which normalises the probabilities "
                "of a token's experts, and the model has norm_topk_prob=false: start it with "
                "--moe-runner-backend triton (sglang.moe_runner_backend=triton for servers of the "
                "run)"
            )
        server.described = True

    async def failed(self, server: Server, failure: ServerFailed, sent: float) -> None:
        """Record a failed completion that was sent at `sent`; may mark the server as failed.

        Completions that were in progress together fail together, and count once.
        """
        if server.lost is not None:
            return
        if isinstance(failure, ServerHung | StaleWeights):
            self.mark_failed(server, str(failure))
            return
        try:
            await self.call(server, "/health", seconds=self.settings.connect_seconds, method="GET")
        except OutOfFiles:
            raise
        except (ServerFailed, EngineError) as unhealthy:
            self.mark_failed(server, f"{failure}; then {unhealthy}")
            return
        if sent >= server.last_strike:
            server.strikes += 1
            server.last_strike = asyncio.get_running_loop().time()
        if server.strikes >= self.settings.attempts:
            self.mark_failed(server, f"{server.strikes} failures in a row, at last: {failure}")

    def _client(self, server: Server) -> httpx.AsyncClient:
        if server.url not in self._clients:
            self._clients[server.url] = httpx.AsyncClient(
                base_url=server.url,
                # `call` has a deadline for the complete request
                timeout=httpx.Timeout(None, connect=self.settings.connect_seconds),
                limits=httpx.Limits(
                    max_connections=None,
                    max_keepalive_connections=None,
                    # shorter than the server's 5 s, so that no request uses a closing connection
                    keepalive_expiry=2.0,
                ),
                trust_env=False,  # a proxy is for other hosts
                # loading the certificates blocks the event loop for a second
                verify=server.url.startswith("https:"),
            )
        return self._clients[server.url]

    async def _close_clients(self) -> None:
        for client in self._clients.values():
            await client.aclose()
        self._clients.clear()
