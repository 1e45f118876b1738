"""Overload and retries, progress of a prefill, an error within a stream, the end of a server."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx2
import openai
import pytest

ROOT = Path(__file__).resolve().parents[3]
LONG = {"model": "tiny", "temperature": 0, "extra_body": {"ignore_eos": True}}


def events(text: str) -> list[dict]:
    return [json.loads(part[6:]) for part in text.split("\n\n") if part.startswith("data: {")]


def test_a_full_server_says_when_to_come_back_and_the_client_does(opened, tmp_path) -> None:
    settings = {"served_model_name": "tiny", "max_waiting": 1, "max_running": 1}
    body = {"model": "tiny", "max_tokens": 60, "temperature": 0, "ignore_eos": True}
    with (
        opened("random:tiny", tmp_path, **settings) as server,
        server.http() as http,
        server.openai(max_retries=10) as client,
        ThreadPoolExecutor(8) as pool,
    ):
        bodies = [{**body, "prompt": [seed, 5, 9]} for seed in range(8)]
        waited = [pool.submit(http.post, "/v1/completions", json=one) for one in bodies]
        retried = client.completions.create(prompt=[9, 5, 9], max_tokens=2, **LONG)
        assert len(retried.choices[0].text.split()) == 2
        answers = [one.result(30) for one in waited]
        assert {answer.status_code for answer in answers} == {200, 503}
        for answer in answers:
            if answer.status_code == 503:
                assert int(answer.headers["retry-after"]) >= 1
                assert answer.json()["error"]["code"] == "overloaded"
        assert http.get("/v1/models").status_code == 200  # no keys: everybody is public


def test_a_stream_that_waits_tells_how_far_its_prefill_is(tiny, until) -> None:
    prompt = [(7 * at) % 1000 for at in range(1500)]
    body = {"model": "tiny", "max_tokens": 2, "stream": True}
    with tiny.http("") as http, ThreadPoolExecutor(1) as other:
        for options, wanted in ((None, True), ({"include_prompt_progress": False}, False)):
            busy = other.submit(  # so that the next one waits
                lambda: [
                    http.post(
                        "/v1/completions",
                        json={"prompt": [*prompt[at:], at], "max_tokens": 60, "ignore_eos": True},
                    ).status_code
                    for at in range(2)
                ]
            )
            until(tiny.running)
            asked = {**body, "prompt": [3, *prompt, len(str(options))]}
            answer = http.post("/v1/completions", json={**asked, "stream_options": options})
            told = [event for event in events(answer.text) if "prompt_progress" in event]
            assert bool(told) == wanted or ": still" in answer.text
            assert not (told and not wanted)
            for event in told:
                assert event["choices"] == []
                progress = event["prompt_progress"]
                assert progress["state"] in ("waiting", "prefilling", "answering")
                assert progress["prompt_tokens"] == len(asked["prompt"])
            assert answer.text.endswith("data: [DONE]\n\n")
            assert busy.result() == [200, 200]


def test_an_error_within_a_stream_is_an_event(opened, tmp_path) -> None:
    with opened("random:tiny", tmp_path, served_model_name="tiny") as server:
        with server.openai() as client:
            stream = client.completions.create(
                prompt=[5, 9, 2], max_tokens=1800, stream=True, **LONG
            )
            assert next(iter(stream)).choices
            server.state.service.close()
            with pytest.raises(openai.APIError) as failed:
                list(stream)
            assert not isinstance(failed.value, openai.APIConnectionError)
        with server.http() as http:
            answer = http.post("/v1/completions", json={"prompt": [5, 9]})
            assert answer.status_code == 503
            assert set(answer.json()["error"]) == {"message", "type", "param", "code"}


def test_the_command_serves_and_ends_at_sigterm(tmp_path) -> None:
    env = {**os.environ, "PYTHONPATH": str(ROOT / "src"), "OMP_NUM_THREADS": "1"}
    command = (sys.executable, "-P", "-m", "ringspan.deploy.cli", "serve", "--model", "random:tiny")
    options = ("--local", "--ranks", "1", "--device", "cpu", "--port", "0", "--store", "store")
    process = subprocess.Popen(
        [*command, *options], cwd=tmp_path, env=env, stderr=subprocess.PIPE, text=True
    )
    try:
        assert process.stderr is not None
        said = ""
        while "ringspan serves" not in said:
            said = process.stderr.readline()
            assert said, "it ended before it served"
        assert "random:tiny" in said
        with httpx2.Client(base_url=said.split(" at ")[1].strip(), timeout=30) as http:
            assert http.get("/health").status_code == 200
            body = {"prompt": [5, 9], "max_tokens": 2}
            assert http.post("/v1/completions", json=body).status_code == 200
        process.send_signal(signal.SIGTERM)
        rest = process.communicate(timeout=60)[1]
        assert process.returncode == 0, rest
        assert "Traceback" not in rest
    finally:
        with contextlib.suppress(ProcessLookupError):
            process.kill()
        process.wait(30)
