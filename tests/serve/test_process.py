"""`loopwise serve` as a process: embedded defaults, and answers that are completed after SIGTERM."""

import json
import os
import signal
import subprocess
import sys
import time

import httpx
import openai
import pytest

from loopwise.cli import main


def test_it_serves_the_shipped_checkpoint_and_drains(tmp_path: object) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "loopwise", "serve", "--port", "0", "--json", "--memory", "64MiB"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"LOOPWISE_API_KEY": "correct-horse", "OMP_NUM_THREADS": "1"},
    )
    assert process.stdout is not None
    assert process.stderr is not None
    try:
        where = json.loads(process.stdout.readline())
        deadline = time.monotonic() + 60
        with openai.OpenAI(base_url=where["url"], api_key="correct-horse", max_retries=5) as client:
            while time.monotonic() < deadline:
                try:
                    assert client.models.list().data[0].id == "shipped"
                    break
                except openai.APIConnectionError:
                    time.sleep(0.05)
            stream = client.completions.create(
                model="shipped", prompt="def ", max_tokens=200, stream=True, extra_body={"ignore_eos": True}
            )
            chunks = [next(stream)]
            process.send_signal(signal.SIGTERM)
            chunks += stream
            assert chunks[-1].choices[0].finish_reason == "length"
        assert process.wait(30) == 0
        assert process.stderr.read() == ""
        with pytest.raises(httpx.ConnectError):
            httpx.get(where["url"])
    finally:
        process.kill()
        process.wait()
        process.stdout.close()
        process.stderr.close()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--host", "0.0.0.0"], "host=0.0.0.0 lets other machines in, and there is no API key"),
        (["exit=sometimes"], "exit"),
        (["loops=9"], "loops=9: this model was trained with at most 4"),
        (["bodyy=3"], "bodyy"),
        (["body=0"], "body=0: allowed is 1 or more"),
        (["--host", "203.0.113.7", "--without-key"], "cannot listen on 203.0.113.7:8000"),
    ],
)
def test_mistakes_are_one_line(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["serve", "--memory", "16MiB", *words]) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ")
    assert line in err
    assert err.count("\n") == 1
