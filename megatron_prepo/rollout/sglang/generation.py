"""Completions distributed over servers: bounded, balanced, retried, and each counted once.

All completions of a prompt go to one server, which then computes the prompt once (SGLang's radix
cache): the server with the fewest completions in progress, or the one that scored the prompt, if
that one is hardly busier.  `completion.Sampling` and `perplexity.Probing` define requests and check
responses.
"""

import asyncio
import contextlib
import uuid
from collections import defaultdict, deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

from megatron_prepo.rollout.engine import EngineError
from megatron_prepo.rollout.sglang.completion import CompletionJob
from megatron_prepo.rollout.sglang.fleet import Fleet, Server, ServerFailed

BACKOFF_SECONDS = 0.5


class Asked(Protocol):
    """Requests and responses of a call: `completion.Sampling` or `perplexity.Probing`."""

    can_be_cut: bool

    def request(self, job: CompletionJob, request_id: str) -> dict[str, Any]:
        """Return the body of a request."""

    def read(self, answer: Any, job: CompletionJob, *, cut: bool, server: str) -> Any:
        """Return the result in a response; raises ServerFailed for anything else."""


class Generation:
    """One call of `generate`; `run` once, in the fleet's loop."""

    def __init__(
        self,
        fleet: Fleet,
        jobs: Sequence[CompletionJob],
        asked: Asked,
        on_progress: Callable[[int, int], None],
        cached_at: Mapping[str, Server] | None = None,
        on_completion: Callable[[CompletionJob, Any], None] = lambda job, completion: None,
    ) -> None:
        """`asked`: a `Sampling` or `Probing`; `cached_at`: servers with a cached prompt, by its id.

        `on_completion` is called in another thread, one call at a time; what it raises is raised by
        `run`.
        """
        self.fleet, self.settings = fleet, fleet.settings
        self.jobs, self.asked, self.on_progress = jobs, asked, on_progress
        self.cached_at, self.on_completion = cached_at or {}, on_completion
        self.group_size = len(jobs) // len({job.prompt.id for job in jobs}) if jobs else 0
        self.waiting = deque(jobs)
        self.under_way: dict[asyncio.Task[Any], tuple[CompletionJob, Server, float]] = {}
        self.ended: asyncio.Queue[asyncio.Task[Any]] = asyncio.Queue()
        self.homes: dict[str, Server] = {}
        self.failed_at: defaultdict[int, list[Server]] = defaultdict(list)
        """Servers of failed attempts, by job."""
        self.completions: dict[int, Any] = {}

    async def run(self) -> list[Any]:
        """Return the result of `asked.read` for each job, in their order.

        Raises EngineError if no server is alive, one rejects a request, or a job has failed
        `servers.attempts` times.
        """
        for server in self.fleet.servers:
            server.in_flight = 0
        try:
            while len(self.completions) < len(self.jobs):
                self._send()
                await self._take(await self.ended.get())
        except EngineError:
            for task, (job, *_) in self.under_way.items():
                if task.done() and not task.cancelled() and task.exception() is None:
                    await asyncio.to_thread(self.on_completion, job, task.result())
            raise
        finally:
            for task in self.under_way:
                task.cancel()
            await asyncio.gather(*self.under_way, return_exceptions=True)
        return [self.completions[job.number] for job in self.jobs]

    def _send(self) -> None:
        """Send as many waiting jobs as the servers have room for."""
        while self.waiting and (server := self._with_room(self.waiting[0])):
            job = self.waiting.popleft()
            task = asyncio.create_task(self._complete(server, job))
            server.in_flight += 1
            self.under_way[task] = job, server, asyncio.get_running_loop().time()
            task.add_done_callback(self.ended.put_nowait)

    def _with_room(self, job: CompletionJob) -> Server | None:
        alive, bound = self.fleet.alive(), self.settings.concurrency
        # a job returns to a server where it failed only if it has failed on all
        fresh = [server for server in alive if server not in self.failed_at[job.number]] or alive
        home = self.homes.get(job.prompt.id)
        if home not in fresh or home.in_flight >= bound:
            home = min(fresh, key=lambda server: server.in_flight)
            cached_at = self.cached_at.get(job.prompt.id)
            busiest = min(bound - 1, home.in_flight + self.group_size)
            if cached_at in fresh and cached_at.in_flight <= busiest:
                home = cached_at
        if home.in_flight >= bound:
            return None
        self.homes[job.prompt.id] = home
        return home

    async def _take(self, task: asyncio.Task[Any]) -> None:
        """Store the completion of a job, or queue the job again."""
        job, server, sent = self.under_way.pop(task)
        server.in_flight -= 1
        if task.cancelled():
            self.waiting.appendleft(job)
            return
        try:
            completion = task.result()
        except ServerFailed as failure:
            await self._failed(job, server, failure, sent)
            return
        assert job.number not in self.completions, f"two completions of job {job.number}"
        # in a thread: it may wait for a disk while other completions continue
        await asyncio.to_thread(self.on_completion, job, completion)
        self.completions[job.number] = completion
        server.strikes = 0
        self.on_progress(len(self.completions), len(self.jobs))

    async def _failed(
        self, job: CompletionJob, server: Server, failure: ServerFailed, sent: float
    ) -> None:
        self.waiting.appendleft(job)
        if server.lost is not None:
            return  # the failure is the server's, not the job's
        await self.fleet.failed(server, failure, sent)
        if server.lost is not None:
            for task, (_, other, _) in self.under_way.items():
                if other is server:
                    task.cancel()
            return
        self.failed_at[job.number].append(server)
        if (tries := len(self.failed_at[job.number])) >= self.settings.attempts:
            raise EngineError(
                f"a completion of {job.prompt.id!r} failed {tries} times, at last: {failure}"
            )

    async def _complete(self, server: Server, job: CompletionJob) -> Any:
        """Attempt a job once on a server."""
        if tries := len(self.failed_at[job.number]):
            await asyncio.sleep(BACKOFF_SECONDS * 2 ** (tries - 1))
        request_id, cut = uuid.uuid4().hex, asyncio.Event()
        cutting = asyncio.create_task(self._cut(server, request_id, cut))
        try:
            answer = await self.fleet.call(
                server,
                "/generate",
                self.asked.request(job, request_id),
                seconds=self.settings.request_seconds,
            )
        finally:
            cutting.cancel()
        return self.asked.read(answer, job, cut=cut.is_set(), server=server.url)

    async def _cut(self, server: Server, request_id: str, cut: asyncio.Event) -> None:
        """Abort a completion after `servers.straggler_seconds`; its tokens so far are kept."""
        if self.settings.straggler_seconds is None or not self.asked.can_be_cut:
            return
        await asyncio.sleep(self.settings.straggler_seconds)
        cut.set()
        # a failure does no harm: the completion itself has a deadline
        with contextlib.suppress(ServerFailed, EngineError):
            await self.fleet.call(
                server,
                "/abort_request",
                {"rid": request_id},
                seconds=self.settings.connect_seconds,
            )
