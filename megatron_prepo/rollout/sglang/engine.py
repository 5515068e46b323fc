"""The SGLang engine, with the methods of `rollout/engine.py` on every rank.

Rank 0 calls the servers in a background thread; the remaining ranks wait for its results and
exchange messages with it meanwhile, so that no collective times out during a long generation
(`actor.parallel.from_rank_zero_when_done`).

A weight sync reconnects failed servers, pauses generation, opens a session, sends buckets, closes
the session, flushes the cache, sets the new version and resumes generation.  In between, a server
has a version from which no rollout is accepted.
"""

import contextlib
import hashlib
import os
import secrets
import socket
import time
from collections.abc import Callable, Coroutine, Iterable, Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import torch

from megatron_prepo.config import Config, ServersConfig
from megatron_prepo.errors import UserError
from megatron_prepo.models.hf_config import read_hf_config
from megatron_prepo.models.routing import RoutingFormat
from megatron_prepo.records import Prompt, Rollout
from megatron_prepo.rollout import placement
from megatron_prepo.rollout.engine import (
    Bucket,
    EngineError,
    PendingRollouts,
    Request,
    Shapes,
    Tokenizer,
    result_here,
)
from megatron_prepo.rollout.sglang import ipc, launch
from megatron_prepo.rollout.sglang.completion import Completion, CompletionJob, Sampling
from megatron_prepo.rollout.sglang.fleet import Fleet, Server
from megatron_prepo.rollout.sglang.generation import Generation
from megatron_prepo.rollout.sglang.ipc import ByIPC
from megatron_prepo.rollout.sglang.launch import OwnServer
from megatron_prepo.rollout.sglang.perplexity import Probing
from megatron_prepo.rollout.sglang.transport import ByValue, Distributed, FromDisk, Transport
from megatron_prepo.rollout.stopping import Stops


class SGLangEngine:
    """Engine that generates on SGLang servers.

    `share` returns the result of rank 0's future on every rank (ranks other than 0 pass None), and
    `gather` every rank's value on all.
    """

    def __init__(
        self,
        config: Config,
        tokenizer: Tokenizer,
        *,
        device: torch.device,
        rank: int = 0,
        share: Callable[[Future[Any] | None], Any] = result_here,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
        log: Callable[[str], None] = print,
    ) -> None:
        """Start the run's servers; collective, and waits for those that share the ranks' GPUs.

        The first weight sync waits until all are ready.
        """
        self.settings, self.tokenizer = config.servers, tokenizer
        self.rank, self.share, self.gather = rank, share, gather
        self.hf = read_hf_config(config.model.hf, for_megatron=False)
        self.stops = Stops.of(config.rollout, config.model.hf, tokenizer)
        self.weight_version: int | None = None
        """Number of optimizer updates in the weights; None without a complete sync."""
        self.verified = False
        """Whether the weights of all current servers have been compared with the actor's."""
        self.fp32_lm_head = launch.fp32_lm_head(config)
        """Whether the servers' logits are float32; every server is checked."""
        self._busy = False
        """Whether a generation is running whose result was not taken."""
        self._run_name = secrets.token_hex(4)  # distinguishes "update 3" of different runs
        self.fleet: Fleet | None = None
        if config.weight_sync.transport == "ipc":
            ipc.check(config.servers, device)
        if rank == 0:
            self._seconds = config.weight_sync.request_seconds
            self.fleet = Fleet(
                _servers(config, device),
                config.servers,
                self._architectures(),
                log,
                self.fp32_lm_head,
                routing=config.rollout.router_replay,
                decodes=bool(self.stops.texts),
                normalized=self.hf.get("norm_topk_prob") is not False,
            )
            self._cached_at: dict[str, Server] = {}
            """Server that scored a prompt last, by the prompt's id."""
        self.transport = self.make_transport(config, device)
        """Transport of weights on this rank; None if the rank takes no part."""
        if shares_gpus(config.servers, device):
            # SGLang takes for its cache what the weights leave of the memory that was free when it
            # started: what the actor takes from the same GPU meanwhile would be missing there
            self.share(self._on_rank_zero(Fleet.reconnect))

    def make_transport(self, config: Config, device: torch.device) -> Transport | None:
        """Return the transport of `weight_sync.transport`; None on ranks without a part in it."""
        settings, seconds = config.weight_sync, config.weight_sync.request_seconds
        if settings.transport == "ipc":
            return ByIPC(
                self.fleet,
                config.servers,
                settings,
                device=device,
                rank=self.rank,
                share=self.share,
                gather=self.gather,
            )
        if self.fleet is None:
            return None
        match settings.transport:
            case "value":
                return ByValue(self.fleet, seconds=seconds)
            case "distributed":
                address = settings.address
                return Distributed(self.fleet, seconds=seconds, address=address, device=device)
        directory = weights_directory(config.run.dir, settings.directory)
        return FromDisk(self.fleet, seconds=seconds, directory=directory, like=config.model.hf)

    def load_weights(self, buckets: Iterable[Bucket], version: int, shapes: Shapes) -> None:
        """Replace the servers' weights with those of the buckets; collective.

        A server that fails is removed from rotation until the next sync.  Raises, on every rank,
        EngineError if a server rejects a request or no server is alive, and SyncBroken if all
        weights must be sent again.
        """
        assert not self._busy, "the engine is still generating"
        self.weight_version = None
        some_are_new = self.share(self._on_rank_zero(self._prepare))
        self.verified = self.verified and not some_are_new
        failure = None
        if self.transport:
            failure = _failure(self.transport.start, shapes)
        for bucket in buckets:  # to the end, even after a failure: gathering a bucket is collective
            if self.transport and failure is None:
                failure = _failure(self.transport.send, bucket)
        if self.transport and failure is None:
            failure = _failure(self.transport.finish)
        self.share(self._on_rank_zero(self._conclude, version, failure))
        self.weight_version = version

    def generate(self, request: Request) -> list[Rollout]:
        """Return the rollouts of the request, in its order, on every rank.

        Includes their routing if requested (servers need `enable_return_routed_experts`).  Rank 0's
        `on_rollouts` receives each rollout as it arrives, in another thread.  Raises EngineError on
        every rank if no server is alive or one rejects a request.
        """
        return self.start_generate(request).result()

    def start_generate(self, request: Request) -> PendingRollouts:
        """Begin `generate` in the background; call no other method before taking its result.

        Every rank calls it and later `result`, and may do other work in between.
        """
        self._assert_ready()
        pairs, cached = request.samples(), request.cached
        jobs = [
            CompletionJob(number, prompt, f"{request.seed}/{prompt.id}/{sample}")
            for number, (prompt, sample) in enumerate(pairs)
            if (prompt.id, sample) not in cached
        ]
        sampling = Sampling(
            temperature=request.temperature,
            max_new_tokens=request.max_new_tokens,
            stops=self.stops,
            weight_version=self._version_name(self.weight_version),
            vocab_size=self.hf["vocab_size"],
            routing=RoutingFormat.of(self.hf) if request.routing else None,
            top_p=request.top_p,
            top_k=request.top_k,
        )

        def on_completion(job: CompletionJob, completion: Completion) -> None:
            prompt, sample = pairs[job.number]
            request.on_rollouts({(prompt.id, sample): self._rollout(prompt, completion)})

        self._busy = True
        future = self._on_rank_zero(
            self._generate, jobs, sampling, request.on_progress, on_completion
        )

        def wait() -> tuple[list[Rollout], float]:
            self._busy = False
            completions, seconds = self.share(future)
            new = {
                job.number: self._rollout(job.prompt, completion)
                for job, completion in zip(jobs, completions, strict=True)
            }
            rollouts = [
                new[number] if number in new else cached[prompt.id, sample]
                for number, (prompt, sample) in enumerate(pairs)
            ]
            return rollouts, seconds

        return PendingRollouts(wait)

    def score_prompts(self, prompts: Sequence[Prompt]) -> list[list[float]]:
        """Return log-probabilities of each prompt's tokens except the first, on every rank.

        At temperature 1.  Rollouts of a prompt are later sent to the server that scored it, where
        the prompt is cached.  Raises EngineError on every rank if no server is alive or one rejects
        a request.
        """
        self._assert_ready()
        jobs = [CompletionJob(number, prompt, seed="") for number, prompt in enumerate(prompts)]
        probing = Probing(self._version_name(self.weight_version), self.hf["vocab_size"])
        scores: list[list[float]] = self.share(self._on_rank_zero(self._score, jobs, probing))
        return scores

    def prompt_logprobs(self, tokens: Sequence[int]) -> dict[str, list[float]]:
        """Return, by server, the log-probability of every token except the first.

        On every rank.  Raises EngineError for a response by other weights than the last sync's.
        """
        self._assert_ready()
        name = self._version_name(self.weight_version)
        logprobs: dict[str, list[float]] = self.share(
            self._on_rank_zero(self._prompt_logprobs, list(tokens), name)
        )
        return logprobs

    def close(self) -> None:
        """Stop the servers that the run started."""
        if self.fleet:
            self.fleet.close()

    def _assert_ready(self) -> None:
        assert self.weight_version is not None, "the engine has no weights: sync first"
        assert not self._busy, "the engine is still generating"

    def _on_rank_zero(
        self, function: Callable[..., Coroutine[Any, Any, Any]], *arguments: object
    ) -> Future[Any] | None:
        return self.fleet.run(function(self.fleet, *arguments)) if self.fleet else None

    async def _prepare(self, fleet: Fleet) -> bool:
        """Prepare the servers for weights; returns whether some of them never had any."""
        new = await fleet.reconnect()
        await self._wake(fleet)
        await self._all(fleet, "/pause_generation")
        await self._version(fleet, "incomplete")
        assert self.transport is not None, "rank 0 takes part in every sync"
        if self.transport.in_session:
            await self._in_session(fleet, "/begin_weight_update", {"selector": "target"})
        return new

    async def _conclude(self, fleet: Fleet, version: int, failure: EngineError | None) -> None:
        """Finish a sync after all buckets were sent, or after `failure`, which is raised."""
        assert self.transport is not None, "rank 0 takes part in every sync"
        if failure:
            with contextlib.suppress(EngineError):  # existing servers are left as they were found
                if self.transport.in_session:
                    await self._in_session(fleet, "/end_weight_update", {})
                await self._all(fleet, "/continue_generation")
            raise failure
        if self.transport.in_session:
            await self._in_session(fleet, "/end_weight_update", {})
        await self._all(fleet, "/flush_cache")
        await self._version(fleet, self._version_name(version))
        await self._all(fleet, "/continue_generation")

    async def _generate(
        self,
        fleet: Fleet,
        jobs: Sequence[CompletionJob],
        sampling: Sampling,
        on_progress: Callable[[int, int], None],
        on_completion: Callable[[CompletionJob, Completion], None],
    ) -> tuple[list[Completion], float]:
        """Return the completions and the seconds that they took."""
        if not jobs:
            return [], 0.0
        start = time.monotonic()
        await self._wake(fleet)
        generation = Generation(fleet, jobs, sampling, on_progress, self._cached_at, on_completion)
        completions = await generation.run()
        if self.settings.release_memory:
            await self._all(fleet, "/release_memory_occupation", {"tags": ["kv_cache"]})
            for server in fleet.alive():
                server.asleep = True
        return completions, time.monotonic() - start

    async def _score(
        self, fleet: Fleet, jobs: Sequence[CompletionJob], probing: Probing
    ) -> list[list[float]]:
        await self._wake(fleet)
        scoring = Generation(fleet, jobs, probing, lambda done, total: None)
        logprobs: list[list[float]] = await scoring.run()
        self._cached_at = scoring.homes
        return logprobs

    async def _prompt_logprobs(
        self, fleet: Fleet, tokens: list[int], version: str
    ) -> dict[str, list[float]]:
        await self._wake(fleet)
        body = {
            "input_ids": tokens,
            "return_logprob": True,
            "logprob_start_len": 0,
            "sampling_params": {"max_new_tokens": 0, "temperature": 1.0},
        }
        logprobs = {}
        for url, answer in (await self._all(fleet, "/generate", body)).items():
            try:
                answered_by = answer["meta_info"]["weight_version"]
                triples = answer["meta_info"]["input_token_logprobs"][1:]
                logprobs[url] = [float(logprob) for logprob, *_ in triples]
            except (TypeError, KeyError, IndexError, ValueError) as error:
                raise EngineError(f"{url} gave no prompt log-probabilities: {error!r}") from error
            if answered_by != version or len(triples) != len(tokens) - 1:
                raise EngineError(
                    f"{url} gave {len(triples)} prompt log-probabilities of weights {answered_by}; "
                    f"{len(tokens) - 1} of weights {version} were requested"
                )
        return logprobs

    async def _wake(self, fleet: Fleet) -> None:
        asleep = [server for server in fleet.alive() if server.asleep]
        await self._all(fleet, "/resume_memory_occupation", {"tags": ["kv_cache"]}, asleep)
        for server in asleep:
            server.asleep = False

    async def _version(self, fleet: Fleet, name: str) -> None:
        await self._all(fleet, "/update_weight_version", {"new_version": name})

    async def _in_session(self, fleet: Fleet, path: str, body: dict[str, Any]) -> None:
        """Call the servers that have sessions (SGLang from 0.5.21)."""
        servers = [server for server in fleet.alive() if server.has_sessions]
        for url, answer in (await self._all(fleet, path, body, servers)).items():
            if not (isinstance(answer, dict) and answer.get("success") is True):
                raise EngineError(f"{url}{path} answered {str(answer)[:300]}")

    async def _all(
        self,
        fleet: Fleet,
        path: str,
        body: dict[str, Any] | None = None,
        servers: Sequence[Server] | None = None,
    ) -> dict[str, Any]:
        return await fleet.call_all(
            path, lambda server: body or {}, seconds=self._seconds, servers=servers
        )

    def _version_name(self, version: int | None) -> str:
        assert version is not None, "the engine has no weights: sync first"
        return f"{self._run_name}.{version}"

    def _architectures(self) -> list[str]:
        return list(self.hf.get("architectures") or ())

    def _rollout(self, prompt: Prompt, completion: Completion) -> Rollout:
        assert self.weight_version is not None, "the engine has no weights: sync first"
        return Rollout(
            prompt=prompt,
            tokens=completion.tokens,
            engine_logprobs=completion.logprobs,
            text=self.tokenizer.decode(list(completion.tokens), skip_special_tokens=True),
            finished=completion.finish == "stop",
            aborted=completion.finish == "abort",
            weight_version=self.weight_version,
            routing=completion.routing,
        )


def weights_directory(run_dir: str, shared: str | None) -> Path:
    """Return the directory for weights with `weight_sync.transport=disk`, used by this run only.

    In `shared`, the `weight_sync.directory` of several runs, its name is a digest of host and
    `run.dir`.
    """
    if shared is None:
        return Path(run_dir) / "weight_sync"
    place = f"{socket.gethostname()}:{Path(run_dir).resolve()}"
    name = f"megatron-prepo-{hashlib.sha256(place.encode()).hexdigest()[:16]}"
    return Path(shared) / name


def _servers(config: Config, device: torch.device) -> list[Server]:
    """Return the servers of `servers.urls`; without any, start and return the run's servers."""
    if config.servers.urls:
        return [Server(url.rstrip("/")) for url in config.servers.urls]
    logs, cuda = Path(config.run.dir) / "logs", device.type == "cuda"
    count = placement.servers_here(config.servers, cuda=cuda)
    owned = [OwnServer(config, i, logs, cuda=cuda) for i in range(count)]
    return [Server(own.url, own) for own in owned]


def shares_gpus(servers: ServersConfig, device: torch.device) -> bool:
    """Return whether the run starts servers on the GPUs of ranks."""
    ranks = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return device.type == "cuda" and not servers.urls and servers.first_device < ranks


def _failure(step: Callable[..., None], *arguments: object) -> EngineError | None:
    """Return the error of a step instead of raising it, so that it can be raised on all ranks."""
    try:
        step(*arguments)
    except EngineError as error:
        return error
    except (OSError, UserError) as error:
        return EngineError(f"weights to the servers: {error}")
    return None
