"""Completions from servers that misbehave: none lost, none counted twice, every fault named."""

import base64
import hashlib
import random
import struct
import time
from collections import Counter
from dataclasses import replace

import fake_sglang
import pytest
from fake_sglang import FakeSGLang

from megatron_prepo.config import ServersConfig
from megatron_prepo.models.routing import RoutingFormat
from megatron_prepo.records import Prompt
from megatron_prepo.rollout.engine import EngineError
from megatron_prepo.rollout.sglang import generation
from megatron_prepo.rollout.sglang.completion import CompletionJob, Sampling
from megatron_prepo.rollout.sglang.fleet import Fleet, Server, ServerFailed
from megatron_prepo.rollout.sglang.generation import Generation
from megatron_prepo.rollout.sglang.perplexity import Probing
from megatron_prepo.rollout.stopping import Stops

SAMPLING = Sampling(0.7, 12, Stops(frozenset({2})), "run.3", fake_sglang.VOCAB)
ROUTED = replace(SAMPLING, routing=RoutingFormat(3, 2, 8))
PROBING = Probing("run.3", fake_sglang.VOCAB)
GROUP = 4


@pytest.fixture(autouse=True)
def no_pauses(monkeypatch):
    monkeypatch.setattr(generation, "BACKOFF_SECONDS", 0.001)


@pytest.fixture
def fakes():
    with FakeSGLang() as one, FakeSGLang() as two:
        one.version = two.version = "run.3"
        yield one, two


def jobs(num_prompts: int) -> list[CompletionJob]:
    """GROUP completions of each prompt."""
    prompts = [Prompt(f"p{i}", "", "", (5, 6, 7 + i), (0, 0)) for i in range(num_prompts)]
    pairs = [(prompt, sample) for prompt in prompts for sample in range(GROUP)]
    return [
        CompletionJob(n, prompt, f"1/x/{prompt.id}/{sample}")
        for n, (prompt, sample) in enumerate(pairs)
    ]


def seed_of(job: CompletionJob) -> int:
    return int.from_bytes(hashlib.sha256(job.seed.encode()).digest()[:8], "little") >> 1


def expected(job: CompletionJob) -> tuple[int, ...]:
    return tuple(fake_sglang.completion(list(job.prompt.tokens), seed_of(job), 12)[0])


class Run:
    """One generation with some fakes: its results, and the fleet's messages."""

    def __init__(
        self, fakes, num_prompts=8, asked=SAMPLING, cached_at=None, on_completion=None, **settings
    ):
        self.jobs, self.said, self.progress = jobs(num_prompts), [], []
        if isinstance(asked, Probing):
            self.jobs = [replace(job, number=n) for n, job in enumerate(self.jobs[::GROUP])]
        settings = {"request_seconds": 6.0, "connect_seconds": 4.0} | settings
        self.fleet = Fleet(
            [Server(fake.url) for fake in fakes], ServersConfig(**settings), log=self.said.append
        )
        try:
            generation = Generation(
                self.fleet,
                self.jobs,
                asked,
                lambda *state: self.progress.append(state),
                {prompt: self.fleet.servers[i] for prompt, i in (cached_at or {}).items()},
                on_completion or (lambda job, completion: None),
            )
            self.completions = self.fleet.run(generation.run()).result(timeout=300)
            self.homes = {p: self.fleet.servers.index(s) for p, s in generation.homes.items()}
        finally:
            self.fleet.close()

    def assert_complete(self) -> None:
        assert [c.tokens for c in self.completions] == [expected(job) for job in self.jobs]
        for c in self.completions:
            assert c.logprobs == tuple(map(fake_sglang.logprob, c.tokens))
            assert c.finish == ("stop" if c.tokens[-1] == 2 else "length")
        total = len(self.jobs)
        assert self.progress == [(n, total) for n in range(1, total + 1)]


def only_generate(fault, at=None):
    """Return the fault at these requests for completions (None: all), counted from 0."""
    count = iter(range(10**6))

    def decide(path, body):
        if path != "/generate":
            return None
        n = next(count)
        return fault if at is None or n in at else None

    return decide


def wait_for_requests(fake, number: int) -> None:
    """Wait until the fake has received this many requests for completions."""
    end = time.monotonic() + 5
    while len(fake.requests) < number and time.monotonic() < end:
        time.sleep(0.001)


def test_completions_come_in_order_with_their_own_random_numbers(fakes):
    run = Run(fakes)
    run.assert_complete()
    assert {c.finish for c in run.completions} == {"stop", "length"}
    bodies = fakes[0].requests + fakes[1].requests
    assert len({body["rid"] for body in bodies}) == len(bodies) == len(run.jobs)
    seeds = {body["sampling_params"]["sampling_seed"] for body in bodies}
    assert seeds == {seed_of(job) for job in run.jobs} and len(seeds) == len(run.jobs)
    for body in bodies:
        assert body["return_logprob"] is True and "logprob_start_len" not in body
        params = body["sampling_params"]
        assert (params["temperature"], params["top_p"], params["top_k"]) == (0.7, 1.0, -1)
        assert (params["max_new_tokens"], params["stop_token_ids"]) == (12, [2])
        assert 0 <= params["sampling_seed"] < 2**63


def test_an_evaluation_is_greedy_or_of_the_most_probable_tokens():
    """SGLang takes temperature 0 as greedy."""
    job = CompletionJob(0, Prompt("p", "", "", (5, 6), (0, 2)), "seed")
    sampling = replace(SAMPLING, temperature=0.0, top_p=0.9, top_k=20)
    params = sampling.request(job, "r")["sampling_params"]
    assert (params["temperature"], params["top_p"], params["top_k"]) == (0.0, 0.9, 20)


def test_a_prompt_stays_at_a_server_and_servers_share_the_prompts(fakes):
    Run(fakes, num_prompts=12)
    prompts = [Counter(tuple(body["input_ids"]) for body in fake.requests) for fake in fakes]
    assert not prompts[0].keys() & prompts[1].keys()
    assert {len(p) for p in prompts} == {6} and set(prompts[0].values()) == {GROUP}


def test_a_prompt_goes_where_it_was_scored_as_long_as_that_is_hardly_busier(fakes):
    """The first prompt goes to the first server without a hint, the second to the second, ..."""
    hints = {f"p{i}": 1 - i % 2 for i in range(8)}
    followed = Run(fakes, cached_at=hints)
    followed.assert_complete()
    assert followed.homes == hints
    alone = Run(fakes, num_prompts=12, cached_at=dict.fromkeys(hints, 1), concurrency=64)
    alone.assert_complete()
    share = Counter(alone.homes.values())
    assert min(share.values()) >= 5, "one server is not left to idle"


def test_a_full_server_that_has_scored_a_prompt_is_not_waited_for(fakes):
    Run(fakes, cached_at={f"p{i}": 1 for i in range(8)}, concurrency=2).assert_complete()
    assert len(fakes[0].requests) >= 8


def test_probes_score_each_prompt_once_and_in_order(fakes):
    for fake in fakes:
        fake.prompt_logprobs = lambda ids: [-token / 100 for token in ids[1:]]
    run = Run(fakes, asked=PROBING)
    assert run.completions == [[-t / 100 for t in job.prompt.tokens[1:]] for job in run.jobs]
    bodies = fakes[0].requests + fakes[1].requests
    assert len(bodies) == 8 and all(fake.requests for fake in fakes)
    for body in bodies:
        assert body["return_logprob"] is True and body["logprob_start_len"] == 0
        assert body["sampling_params"] == {"max_new_tokens": 0, "temperature": 1.0}


@pytest.mark.parametrize("fault", ["500", "reset", "garbage", "text", "short", "nan"])
def test_a_probe_that_fails_is_mended_by_another_try(fakes, fault):
    fakes[0].fault = only_generate(fault, at={0, 1})
    run = Run(fakes, asked=PROBING)
    assert [len(logprobs) for logprobs in run.completions] == [2] * 8
    assert run.said == []


@pytest.mark.parametrize(("number", "accepted"), [(258, True), (0, True), (5, False)])
def test_the_last_token_of_the_vocabulary_may_have_the_number_0(number, accepted):
    """SGLang 0.5.21: any token from `vocab_size - 1` on is numbered 0, its value is its own."""
    job = CompletionJob(0, Prompt("p", "", "", (5, 258, 7), (0, 0)), "")
    triples = [[None, 5, None], [-0.5, number, None], [-0.7, 7, None]]
    answer = {"meta_info": {"weight_version": "run.3", "input_token_logprobs": triples}}
    if accepted:
        assert PROBING.read(answer, job, cut=False, server="url") == [-0.5, -0.7]
    else:
        with pytest.raises(ServerFailed, match="of other tokens than the prompt's"):
            PROBING.read(answer, job, cut=False, server="url")


def test_a_server_that_scores_by_other_weights_is_given_up(fakes):
    fakes[0].fault = only_generate("stale")
    run = Run(fakes, asked=PROBING)
    assert len(run.completions) == 8
    assert fakes[0].url in run.said[0] and "by weights default" in run.fleet.servers[0].lost


def test_a_slow_probe_is_not_cut(fakes):
    """A partial score is of no use, and cutting it would only mean to ask again."""
    for fake in fakes:
        fake.prompt_logprobs = lambda ids: time.sleep(0.5) or [-1.0] * (len(ids) - 1)
    Run(fakes, num_prompts=2, asked=PROBING, straggler_seconds=0.05)
    assert not any("/abort_request" in fake.calls for fake in fakes)


@pytest.mark.parametrize("fault", [None, "unrouted", "misrouted"])
def test_routings_cover_prompt_and_completion_but_the_last_token(fakes, fault):
    """A response without a routing, or with one of another number of tokens, is retried."""
    for fake in fakes:
        fake.routing = (3, 2)
    fakes[0].fault = only_generate(fault, at={0, 1, 5})
    run = Run(fakes, asked=ROUTED)
    run.assert_complete()
    for job, c in zip(run.jobs, run.completions, strict=True):
        routed = [*job.prompt.tokens, *c.tokens][:-1]
        assert list(c.routing) == fake_sglang.experts(routed, 3, 2)
    assert all(body["return_routed_experts"] for body in fakes[0].requests + fakes[1].requests)


def test_no_routing_is_asked_for_unless_it_is_wanted(fakes):
    fakes[0].routing = fakes[1].routing = (3, 2)
    run = Run(fakes)
    assert all(c.routing is None for c in run.completions)
    assert not any("return_routed_experts" in body for body in fakes[0].requests)


@pytest.mark.parametrize(
    ("routing", "message"),
    [
        (None, "None; is enable_return_routed_experts set?"),
        ("AAAA!", "Non-base64|Only base64|Incorrect padding|Invalid base64"),
        ("AAAA", "buffer size must be a multiple of element size"),
        (("0", 12), "cannot reshape array of size 12 into shape"),
        (("1", 18), "a token is routed to one expert twice"),
        (("9", 18), "experts 9 to 9 of 8"),
    ],
)
def test_a_routing_that_is_none_is_refused_by_the_name_of_the_setting(routing, message):
    """Two prompt tokens and two new ones, the last of which is not routed: 3 x 3 layers x 2."""
    if isinstance(routing, tuple):
        number, count = routing
        routing = base64.b64encode(struct.pack(f"<{count}i", *[int(number)] * count)).decode()
    meta = {
        "finish_reason": {"type": "stop"},
        "weight_version": "run.3",
        "output_token_logprobs": [[-0.5, 9, None], [-0.7, 2, None]],
        "prompt_tokens": 2,
        "routed_experts": routing,
    }
    job = CompletionJob(0, Prompt("p", "", "", (5, 6), (0, 0)), "")
    with pytest.raises(ServerFailed, match=rf"rollout\.router_replay.*({message})"):
        ROUTED.read({"output_ids": [9, 2], "meta_info": meta}, job, cut=False, server="url")


def test_concurrency_is_bounded(fakes):
    Run(fakes, num_prompts=12, concurrency=3).assert_complete()
    assert 1 < max(fake.most_under_way for fake in fakes) <= 3


@pytest.mark.parametrize("fault", ["500", "reset", "garbage", "text", "short", "nan", "abort"])
def test_a_passing_fault_is_mended_by_another_try(fakes, fault):
    fakes[0].fault = only_generate(fault, at={0, 1, 5})
    run = Run(fakes)
    run.assert_complete()
    assert run.said == [] and all(server.lost is None for server in run.fleet.servers)


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("hang", "no answer from {url}/generate within 6 s"),
        ("drip", "no answer from {url}/generate within 6 s"),
        ("die", "{url}/generate"),
        ("stale", "by weights default"),
        ("500", "failures in a row"),
        ("garbage", "no JSON"),
        ("short", "log-probabilities of other tokens"),
    ],
)
def test_a_bad_servers_work_goes_to_the_other(fakes, fault, reason):
    """The first server fails from its third completion on."""
    bad, good = fakes
    bad.fault = only_generate(fault, at=range(2, 10**6))
    good.fault = lambda path, body: wait_for_requests(bad, 3)
    good.seconds = 0.05  # the bad server is retried before no server remains
    run = Run(fakes, concurrency=2)
    run.assert_complete()
    assert bad.answered.total() <= 2
    lost, kept = run.fleet.servers
    assert kept.lost is None and reason.format(url=bad.url) in lost.lost
    assert len(run.said) == 1 and bad.url in run.said[0]


def test_when_no_server_is_left_the_error_says_what_became_of_each(fakes):
    fakes[0].fault, fakes[1].fault = only_generate("hang"), only_generate("die")
    with pytest.raises(EngineError) as error:
        Run(fakes)
    text = str(error.value)
    assert "no SGLang server is left" in text
    assert f"{fakes[0].url}: no answer from" in text and f"{fakes[1].url}: " in text


def test_what_has_come_by_the_end_of_the_last_server_is_kept(fakes):
    """Seven completions arrive while the server's health is checked, which is not known in time."""
    fakes[0].seconds, kept = 0.3, []
    reset = only_generate("reset", at=[2])
    fakes[0].fault = lambda path, body: "hang" if path == "/health" else reset(path, body)
    with pytest.raises(EngineError, match="no SGLang server is left"):
        Run(
            fakes[:1],
            num_prompts=2,
            connect_seconds=2.0,
            on_completion=lambda job, completion: kept.append((job.number, completion.tokens)),
        )
    assert len(kept) == 2 * GROUP - 1 and kept[0][0] != 2
    assert dict(kept) == {n: expected(jobs(2)[n]) for n, _ in kept}


def test_a_refused_request_is_not_repeated(fakes):
    fakes[0].fault = fakes[1].fault = only_generate("refuse")
    with pytest.raises(EngineError, match=r"answered 400: .*the fake will not"):
        Run(fakes, num_prompts=1, concurrency=1)
    assert len(fakes[0].requests) + len(fakes[1].requests) <= 2


def test_a_completion_that_nobody_can_give_ends_the_run(fakes):
    """One request fails at two servers that otherwise work."""
    bad = list(jobs(8)[13].prompt.tokens), seed_of(jobs(8)[13])

    def fault(path, body):
        if path == "/generate":
            this = body["input_ids"], body["sampling_params"]["sampling_seed"]
            return "short" if this == bad else None

    fakes[0].fault = fakes[1].fault = fault
    with pytest.raises(EngineError, match="'p3' failed 4 times"):
        Run(fakes)


def test_stragglers_are_cut_and_what_they_have_is_kept(fakes):
    slow = {2, 3}
    fakes[0].fault = only_generate("slow", at=slow)
    run = Run(fakes, straggler_seconds=1.5, request_seconds=60.0, connect_seconds=30.0)
    cut = [i for i, c in enumerate(run.completions) if c.finish == "abort"]
    assert len(cut) == len(slow)
    for i, (job, c) in enumerate(zip(run.jobs, run.completions, strict=True)):
        assert c.tokens == (expected(job)[:1] if i in cut else expected(job))
    assert fakes[0].calls.count("/abort_request") >= len(slow)


def test_of_a_thousand_faulted_requests_none_is_lost_or_counted_twice():
    """Ten per cent of all requests fail in some way; one of five servers dies in the middle."""
    draw = random.Random(7)

    def fault(path, body):
        kinds = ("500", "reset", "garbage", "short", "abort", "nan")
        return draw.choice(kinds) if path == "/generate" and draw.random() < 0.1 else None

    fakes = [FakeSGLang() for _ in range(5)]
    for fake in fakes:
        fake.__enter__()
        fake.version, fake.fault = "run.3", fault
    fakes[4].fault = lambda path, body: "die" if len(fakes[4].requests) > 60 else fault(path, body)
    try:
        run = Run(fakes, num_prompts=250, concurrency=8, attempts=12, request_seconds=20.0)
        run.assert_complete()
        asked = sum(len(fake.requests) for fake in fakes)
        assert 1060 < asked < 1400, "faults were met"
        answers = sum((fake.answered for fake in fakes), Counter())
        seeds = {f"{list(job.prompt.tokens)} {seed_of(job)}" for job in run.jobs}
        assert answers.keys() == seeds
        # only a server's end may waste a complete answer in flight
        assert sum(answers.values()) <= len(seeds) + 8
    finally:
        for fake in fakes:
            fake.__exit__()
