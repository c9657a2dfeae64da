"""/metrics: vLLM's names where the meaning is the same, and what only loops have, all of it true."""

from collections.abc import Callable

import pytest
from prometheus_client.parser import text_string_to_metric_families

from loopwise.engine.engine import Engine
from loopwise.engine.figures import figures
from loopwise.engine.sampling import Sampling
from loopwise.models.looped_lm import LoopedLM
from loopwise.serve.metrics import Histogram

from .conftest import Live, serving


def scrape(live: Live) -> Callable[..., float]:
    """A sample's value by its name and labels."""
    with live.http() as http:
        got = http.get("/metrics")
    assert got.headers["content-type"].startswith("text/plain")
    samples = {
        (sample.name, frozenset(sample.labels.items())): sample.value
        for family in text_string_to_metric_families(got.text)
        for sample in family.samples
    }

    def value(name: str, **labels: str) -> float:
        return samples[name, frozenset({"model_name": "talker", **labels}.items())]

    return value


def test_what_was_done_is_counted(model: LoopedLM) -> None:
    with serving(model) as live, live.client() as client:
        before = scrape(live)
        assert before("vllm:generation_tokens_total") == 0
        got = [
            client.completions.create(
                model="talker", prompt="Hello", max_tokens=9, seed=seed, extra_body={"loop": {"rule": "hazard:0.3"}}
            )
            for seed in range(3)
        ]
        loops = sum((one.usage.model_extra or {})["loop"]["total"] for one in got)  # type: ignore[union-attr]
        value = scrape(live)
        assert value("vllm:generation_tokens_total") == 27
        assert value("vllm:prompt_tokens_total") == 15
        assert value("vllm:request_success_total", finished_reason="length") == 3
        assert value("vllm:num_requests_running") == value("vllm:num_requests_waiting") == 0
        assert value("vllm:time_to_first_token_seconds_count") == 3
        assert value("vllm:inter_token_latency_seconds_count") == 24
        assert value("vllm:e2e_request_latency_seconds_count") == 3
        assert value("vllm:e2e_request_latency_seconds_sum") >= value("vllm:time_to_first_token_seconds_sum")
        assert value("vllm:request_generation_tokens_sum") == 27
        assert value("loopwise:loops_per_token_count") == 27
        assert value("loopwise:loops_per_token_sum") == loops
        assert value("loopwise:loops_per_token_bucket", le="4.0") == 27
        assert value("loopwise:rows_per_tick_count") == value("loopwise:ticks_total")
        assert value("loopwise:rows_per_tick_sum") == value("loopwise:rows_total") > loops
        assert value("loopwise:pages", pool="core", state="held") == 0
        pages = [value("loopwise:pages", pool="core", state=state) for state in ("held", "cached", "free")]
        assert sum(pages) == live.engine._core.runner.memory.core.pages
        assert value("loopwise:promised_row_loops") == 0


def test_while_something_runs(model: LoopedLM) -> None:
    with serving(model, seats=2) as live, live.http() as http:
        body = {"model": "talker", "prompt": "Hello", "max_tokens": 480, "n": 3, "stream": True, "ignore_eos": True}
        with http.stream("POST", "/v1/completions", json=body) as got:
            lines = got.iter_lines()
            next(lines)
            value = scrape(live)
            assert value("vllm:num_requests_running") == 2
            assert value("vllm:num_requests_waiting") == 1
            assert value("loopwise:promised_row_loops") > 0
            assert value("vllm:kv_cache_usage_perc") > 0
            in_flight = [value("loopwise:rows_in_flight", loop=str(loop)) for loop in range(5)]
            assert 1 <= sum(in_flight) <= 2
        live.settle()
        assert scrape(live)("loopwise:clients_vanished_total") == 1


def test_drafts_are_counted(model: LoopedLM) -> None:
    engine = Engine(model, "last_exited", speculate="1", memory="16MiB")
    engine.generate([list(b"Hello")], Sampling(max_tokens=20))
    found = figures(engine)
    assert found.drafts_possible > 0
    assert found.drafts_started >= found.drafts_confirmed
    assert found.tokens == 20


@pytest.mark.parametrize(("value", "bucket"), [(0.5, 0), (1.0, 0), (1.5, 1), (2.0, 1), (9.0, 2)])
def test_a_histogram_counts_up_to_its_bounds(value: float, bucket: int) -> None:
    histogram = Histogram((1.0, 2.0))
    histogram.note(value, 3)
    assert histogram.counts[bucket] == sum(histogram.counts) == 3
    assert histogram.sum == 3 * value
