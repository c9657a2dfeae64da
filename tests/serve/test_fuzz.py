"""Whatever fits the server's own OpenAPI schema, and much that does not, is answered without an error of ours."""

from typing import Any

import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis.generation import GenerationMode

from .conftest import Live

COMMON: dict[str, Any] = {"deadline": None, "derandomize": True, "database": None}


def test_no_errors_of_ours(live: Live) -> None:
    config = schemathesis.Config.from_dict({"generation": {"max-examples": 60}})
    schema = schemathesis.openapi.from_url(f"{live.url}/openapi.json", config=config)
    seen: dict[str, set[int]] = {}
    for mode in (GenerationMode.POSITIVE, GenerationMode.NEGATIVE):
        for operation in schema.get_all_operations():
            api = operation.ok()
            assert api is not None
            if mode is GenerationMode.NEGATIVE and not api.body:
                continue  # nothing in it could be wrong
            strategy = api.as_strategy(generation_mode=mode)

            @settings(max_examples=settings().max_examples * 2 // 5, suppress_health_check=list(HealthCheck), **COMMON)
            def answered(case: schemathesis.Case) -> None:
                asked = case.body.get("max_tokens") if isinstance(case.body, dict) else None
                if isinstance(asked, int) and asked > 2:
                    case.body["max_tokens"] = 2  # long answers are not what is being tried
                got = case.call(base_url=live.url, timeout=30)
                seen.setdefault(case.path, set()).add(got.status_code)
                assert got.status_code < 500, got.text
                if got.status_code >= 400:
                    assert got.json()["error"]["message"]

            given(case=strategy)(answered)()
    assert {"/v1/chat/completions", "/v1/completions", "/v1/models", "/health", "/metrics"} <= seen.keys()
    assert 400 in seen["/v1/completions"] or 404 in seen["/v1/completions"]
    live.settle()
