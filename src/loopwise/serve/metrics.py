"""Numbers for Prometheus: vLLM's names where the meaning is the same, and our own for what only loops have.

Nothing here is counted twice: what the engine counts is read from it when somebody asks, and what is measured for each
token is a list of integers until then.
"""

import bisect
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.exposition import CONTENT_TYPE_LATEST
from prometheus_client.registry import Collector

from loopwise.engine.figures import Figures, figures
from loopwise.engine.listening import ROWS

if TYPE_CHECKING:
    from loopwise.serve.service import Service

CONTENT_TYPE = CONTENT_TYPE_LATEST
_FIRST = (0.001, 0.005, 0.01, 0.02, 0.04, 0.06, 0.08, 0.1, 0.25, 0.5, 0.75, 1.0, 2.5, 5.0, 7.5, 10.0, 20.0, 40.0, 80.0)
_BETWEEN = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.075, 0.1, 0.15, 0.2, 0.3, 0.4, 0.5, 0.75, 1.0, 2.5, 5.0)
_WHOLE = (0.01, 0.05, 0.1, 0.3, 0.5, 0.8, 1.0, 1.5, 2.0, 2.5, 5.0, 10.0, 15.0, 20.0, 30.0, 40.0, 50.0, 60.0, 300.0)
_TOKENS = (1, 2, 5, 10, 20, 50, 100, 200, 500, 1000, 2000, 5000, 10000, 20000, 50000, 100000)


class Histogram:
    """Counts of values by upper bound. Cheap enough for every token."""

    def __init__(self, bounds: Sequence[int | float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.sum = 0.0

    def note(self, value: int | float, times: int = 1) -> None:
        self.counts[bisect.bisect_left(self.bounds, value)] += times
        self.sum += value * times


@dataclass
class Meters:
    """What the server itself measures."""

    first: Histogram = field(default_factory=lambda: Histogram(_FIRST))
    """Seconds to the first token."""
    between: Histogram = field(default_factory=lambda: Histogram(_BETWEEN))
    """Seconds between tokens."""
    whole: Histogram = field(default_factory=lambda: Histogram(_WHOLE))
    """Seconds of an answer."""
    prompts: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    """Tokens of a prompt."""
    answers: Histogram = field(default_factory=lambda: Histogram(_TOKENS))
    """Tokens of an answer."""
    reasons: Counter[str] = field(default_factory=Counter)
    """Answers by why they ended."""
    refused: int = 0
    """Requests answered 429."""
    vanished: int = 0
    """Requests whose client hung up."""

    def finished(self, reason: str, *, prompt: int, tokens: int, seconds: float) -> None:
        """One answer is complete."""
        self.reasons[reason] += 1
        self.prompts.note(prompt)
        self.answers.note(tokens)
        self.whole.note(seconds)


def expose(service: "Service") -> bytes:
    """Everything, in Prometheus' text format."""
    registry = CollectorRegistry(auto_describe=False)
    registry.register(_Reader(service))
    return generate_latest(registry)


class _Reader(Collector):
    def __init__(self, service: "Service") -> None:
        self._service = service

    def collect(self) -> Iterator[Metric]:
        service, now = self._service, figures(self._service.engine)
        label = service.name
        yield from _gauges(service, now)
        yield from _counters(service, now)
        meters = service.meters
        for name, text, histogram in (
            ("vllm:time_to_first_token_seconds", "Time to the first token", meters.first),
            ("vllm:inter_token_latency_seconds", "Time between tokens", meters.between),
            ("vllm:e2e_request_latency_seconds", "Time of a whole answer", meters.whole),
            ("vllm:request_prompt_tokens", "Tokens of a prompt", meters.prompts),
            ("vllm:request_generation_tokens", "Tokens of an answer", meters.answers),
        ):
            yield _histogram(name, text, label, histogram.bounds, histogram.counts, histogram.sum)
        loops = range(1, service.engine.max_loops + 1)
        yield _histogram(
            "loopwise:loops_per_token",
            "Loops of the row that emitted a token",
            label,
            loops,
            [now.loops.get(loop, 0) for loop in loops] + [0],
            sum(loop * count for loop, count in now.loops.items()),
        )
        yield _histogram(
            "loopwise:rows_per_tick",
            "Rows that one tick runs through the core, prompt rows included",
            label,
            ROWS,
            list(service.engine.rows_per_tick),
            now.rows,
        )


def _gauges(service: "Service", now: Figures) -> Iterator[Metric]:
    for name, text, value in (
        ("vllm:num_requests_running", "Answers being made", now.running),
        ("vllm:num_requests_waiting", "Answers waiting for a seat or for pages", now.waiting),
        ("vllm:kv_cache_usage_perc", "Share of pages that answers hold; 1 is all", _usage(now)),
        ("loopwise:promised_row_loops", "Row-loops that open answers may still take", service.bridge.promised),
        ("loopwise:backlog_row_loops", "Row-loops beyond which requests are answered 429", service.backlog),
    ):
        gauge = GaugeMetricFamily(name, text, labels=["model_name"])
        gauge.add_metric([service.name], value)
        yield gauge
    occupancy = GaugeMetricFamily(
        "loopwise:rows_in_flight",
        "Rows of answers in flight, by the loops they have run",
        labels=["model_name", "loop"],
    )
    for loop, count in now.rows_at_loop.items():
        occupancy.add_metric([service.name, str(loop)], count)
    yield occupancy
    pages = GaugeMetricFamily("loopwise:pages", "Pages by state", labels=["model_name", "pool", "state"])
    for pool, found in now.pages.items():
        for state in ("held", "cached", "free"):
            pages.add_metric([service.name, pool, state], getattr(found, state))
    yield pages
    acceptance = GaugeMetricFamily(
        "loopwise:draft_acceptance",
        "Share of tokens whose row was running before they were certain",
        labels=["model_name"],
    )
    if now.drafts_possible:
        acceptance.add_metric([service.name], now.drafts_confirmed / now.drafts_possible)
    yield acceptance


def _counters(service: "Service", now: Figures) -> Iterator[Metric]:
    meters = service.meters
    for name, text, value in (
        ("vllm:prompt_tokens", "Prompt tokens of answers that are complete", meters.prompts.sum),
        ("vllm:generation_tokens", "Tokens made", now.tokens),
        ("vllm:prefix_cache_queries", "Prompt tokens looked for in the prefix cache", now.prefix_queries),
        ("vllm:prefix_cache_hits", "Prompt tokens found there", now.prefix_hits),
        ("vllm:num_preemptions", "Times that a request stepped aside", now.preemptions),
        ("loopwise:ticks", "Ticks", now.ticks),
        ("loopwise:rows", "Rows that ran one loop", now.rows),
        ("loopwise:draft_rows", "Those of them that were started from drafts", now.draft_rows),
        ("loopwise:drafts_started", "Positions started from a draft", now.drafts_started),
        ("loopwise:drafts_confirmed", "Tokens whose row was running before they were certain", now.drafts_confirmed),
        ("loopwise:requests_refused", "Requests answered 429", meters.refused),
        ("loopwise:clients_vanished", "Requests whose client hung up", meters.vanished),
        ("loopwise:busy_seconds", "Time spent in ticks", service.engine.busy_seconds),
    ):
        counter = CounterMetricFamily(name, text, labels=["model_name"])
        counter.add_metric([service.name], value)
        yield counter
    reasons = CounterMetricFamily(
        "vllm:request_success", "Answers that are complete", labels=["model_name", "finished_reason"]
    )
    for reason, count in meters.reasons.items():
        reasons.add_metric([service.name, reason], count)
    yield reasons


def _usage(now: Figures) -> float:
    return max(found.used_share for found in now.pages.values())


def _histogram(
    name: str, text: str, label: str, bounds: Sequence[int | float], counts: Sequence[int], total: int | float
) -> HistogramMetricFamily:
    family = HistogramMetricFamily(name, text, labels=["model_name"])
    running, buckets = 0, []
    for bound, count in zip((*map(str, map(float, bounds)), "+Inf"), counts, strict=True):
        running += count
        buckets.append((bound, running))
    family.add_metric([label], buckets, sum_value=total)
    return family
