"""What no decent client sends: no 500, no hang, and an error that names what was wrong."""

from __future__ import annotations

import json
import random

import openai
import pytest

POSTS = ("/v1/chat/completions", "/v1/completions", "/tokenize", "/v1/contexts")
BODIES = (
    {
        "model": "tiny",
        "prompt": [5, 17, 9],
        "max_tokens": 2,
        "temperature": 0.5,
        "n": 1,
        "stop": ["x"],
        "stream": True,
        "stream_options": {"include_usage": True},
        "logprobs": 2,
        "seed": 7,
    },
    {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "hi"}]}],
        "max_completion_tokens": 1,
        "contexts": ["0123456789abcdef"],
    },
    {"token_ids": [1, 2, 3], "title": "t", "codec": "raw", "wait": True},
)
ODD = (
    None, True, -1, 0, 1, 2**31, 2**63, 2**70, 1e308, -0.0, "", "x" * 500, "\ud800", "\0", [],
    {}, [[]], [[[1]]], {"a": 1}, ["a", 1], [None], [-1], [2**40], [1.5], "../../etc/passwd", "raw",
)  # fmt: skip
SEED, CASES = 20261124, 300


def mutated(value, draw: random.Random):
    """The value with one place of it changed."""
    if isinstance(value, dict) and value and draw.random() < 0.8:
        key = draw.choice(list(value))
        changed = dict(value)
        if draw.random() < 0.15:
            del changed[key]
        else:
            changed[key] = mutated(value[key], draw)
        return changed
    if isinstance(value, list) and value and draw.random() < 0.5:
        at = draw.randrange(len(value))
        return [*value[:at], mutated(value[at], draw), *value[at + 1 :]]
    return draw.choice(ODD)


def check_error(status: int, body: bytes) -> dict:
    """The shape of every error; gives what is in it."""
    error = json.loads(body)["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["message"]
    assert 400 <= status < 500 or status in (503, 507), (status, error)
    return error


def test_mutated_bodies_are_answered_or_refused(tiny) -> None:
    draw = random.Random(SEED)
    statuses = set()
    with tiny.http("") as http:
        for case in range(CASES):
            body = draw.choice(BODIES)
            for _ in range(draw.randrange(1, 3)):
                body = mutated(body, draw)
            sent = json.dumps(body).encode()
            if draw.random() < 0.2:  # and bytes that are no JSON any more
                at = draw.randrange(len(sent))
                sent = sent[:at] + bytes([draw.randrange(256)]) + sent[at + draw.randrange(2) :]
            path = draw.choice(POSTS)
            answer = http.post(path, content=sent, headers={"content-type": "application/json"})
            statuses.add(answer.status_code)
            assert answer.status_code < 500, (case, path, sent, answer.text)
            if answer.status_code >= 400:
                check_error(answer.status_code, answer.content)
            elif "event-stream" in answer.headers["content-type"]:
                assert answer.text.endswith("data: [DONE]\n\n"), (case, path, sent)
    assert {200, 400, 404} <= statuses


@pytest.mark.parametrize(
    ("sent", "code"),
    [
        (b"", "invalid_json"),
        (b"[" * 100_000, None),
        (b'{"prompt": ' + b"[" * 50_000 + b"]" * 50_000 + b"}", None),
        (b'{"a":' * 50_000, "invalid_json"),
        (b'{"prompt": [5], "max_tokens": "many"}', "invalid_value"),
        (b'{"prompt": [5], "temperature": 3}', "invalid_value"),
        (b'{"prompt": [5], "temperature": NaN}', "invalid_json"),
        (b'{"prompt": [5], "n": 1000000}', "invalid_value"),
        (b'{"prompt": [[5], [6], [7]], "n": 64}', "invalid_value"),
        (b'{"prompt": [5, 999999]}', "invalid_value"),
        (b'{"prompt": []}', "invalid_value"),
        (b'{"prompt": "a text for a model without a tokenizer"}', "no_tokenizer"),
        (b'{"prompt": [5], "echo": true}', "unsupported_parameter"),
        (b'{"prompt": [5], "contexts": ["../../../secret"]}', "invalid_value"),
        (b'{"prompt": [5], "contexts": ["0123456789abcdef"]}', "not_found"),
        (b'{"prompt": [5], "contexts": []}', "unsupported_value"),
        (b'{"prompt": [5], "min_tokens": 9, "max_tokens": 2}', "invalid_value"),
        (b'{"prompt": [5], "max_tokens": 100000000}', "context_length_exceeded"),
        (b'{"prompt": [5], "model": "gpt-9"}', "model_not_found"),
    ],
)
def test_each_refusal_names_its_reason(tiny, sent: bytes, code: str | None) -> None:
    with tiny.http("") as http:
        answer = http.post(
            "/v1/completions", content=sent, headers={"content-type": "application/json"}
        )
    error = check_error(answer.status_code, answer.content)
    assert answer.status_code == (404 if code in ("not_found", "model_not_found") else 400)
    assert code is None or error["code"] == code


@pytest.mark.parametrize(
    ("path", "field", "value"),
    [
        ("completions", "echo", True),
        ("completions", "suffix", "end"),
        ("completions", "best_of", 3),
        ("completions", "presence_penalty", 0.5),
        ("completions", "frequency_penalty", -1),
        ("completions", "logit_bias", {"5": -100}),
        ("completions", "top_k", 40),
        ("completions", "repetition_penalty", 1.1),
        ("completions", "guided_regex", "[0-9]+"),
        ("chat/completions", "tools", [{"type": "function", "function": {"name": "f"}}]),
        ("chat/completions", "tool_choice", "required"),
        ("chat/completions", "functions", [{"name": "f"}]),
        ("chat/completions", "response_format", {"type": "json_object"}),
        ("chat/completions", "modalities", ["text", "audio"]),
        ("contexts", "plian", True),
    ],
)
def test_what_would_change_the_answer_is_not_ignored(tiny, path, field, value) -> None:
    messages = [{"role": "user", "content": "hi"}]
    body = {
        "completions": {"prompt": [5, 9], "max_tokens": 1},
        "chat/completions": {"messages": messages},
        "contexts": {"token_ids": [1, 2]},
    }[path]
    with tiny.http("") as http:
        answer = http.post(f"/v1/{path}", json={**body, field: value})
    error = check_error(answer.status_code, answer.content)
    assert (answer.status_code, error["param"]) == (400, field)
    assert error["code"] == "unsupported_parameter"


def test_a_message_that_calls_a_tool_is_refused(tiny) -> None:
    call = {"role": "assistant", "content": None, "tool_calls": [{"id": "c", "type": "function"}]}
    with tiny.http("") as http:
        answer = http.post("/v1/chat/completions", json={"messages": [call]})
    assert "tool_calls" in check_error(answer.status_code, answer.content)["message"]


def test_what_changes_no_answer_is_taken(tiny) -> None:
    plain = {"prompt": [5, 9], "max_tokens": 3, "temperature": 0}
    more = {
        "user": "u", "metadata": {"a": "b"}, "store": False, "service_tier": "auto",
        "presence_penalty": 0, "frequency_penalty": 0.0, "logit_bias": {}, "top_k": -1,
        "repetition_penalty": 1.0, "echo": False, "suffix": None, "best_of": 1, "n": 1,
    }  # fmt: skip
    with tiny.http("") as http:
        answers = [http.post("/v1/completions", json=body) for body in (plain, plain | more)]
    assert [answer.status_code for answer in answers] == [200, 200]
    assert answers[0].json()["choices"] == answers[1].json()["choices"]


def test_allow_names_every_method_of_a_path(tiny) -> None:
    with tiny.http("") as http:
        for path, methods in (
            ("/v1/contexts", {"GET", "HEAD", "POST"}),
            ("/v1/contexts/0123456789abcdef", {"GET", "HEAD", "DELETE"}),
        ):
            allowed = http.request("OPTIONS", path).headers["allow"]
            assert set(allowed.split(", ")) == methods


def test_a_context_is_refused_by_its_field(tiny) -> None:
    with tiny.http("") as http:
        for body, param in (
            ({"token_ids": [1, 2], "codec": "zip"}, "codec"),
            ({"token_ids": [1], "files": []}, "files"),
            ({}, "text"),
            ({"token_ids": []}, "token_ids"),
            ({"token_ids": [1 << 30]}, "token_ids"),
            ({"text": "no tokenizer"}, "text"),
            ({"token_ids": [1, 2], "title": "x" * 2000}, "title"),
        ):
            answer = http.post("/v1/contexts", json=body)
            assert answer.status_code == 400
            assert check_error(400, answer.content)["param"] == param


def test_routes_methods_and_types_that_are_none(tiny) -> None:
    with tiny.http("") as http:
        for method, path, status in (
            ("GET", "/v1/nothing", 404),
            ("GET", "/v1/completions", 405),
            ("DELETE", "/health", 405),
            ("GET", "/v1/contexts/..%2f..%2fetc%2fpasswd", 404),
            ("GET", "/v1/contexts/0123456789ABCDEF", 404),
            ("DELETE", "/v1/contexts/0123456789abcdef", 404),
            ("POST", "/v1/contexts/0123456789abcdef/verify", 404),
            ("GET", "/v1/requests/r%00x", 404),
            ("GET", "/v1/requests/unknown", 404),
            ("GET", "/v1/models/gpt-9", 404),
        ):
            answer = http.request(method, path)
            assert answer.status_code == status, (method, path, answer.text)
            check_error(status, answer.content)
        assert http.request("GET", "/v1/completions").headers["allow"] == "POST"
        for kind in ("text/plain", "application/x-www-form-urlencoded", ""):
            answer = http.post("/v1/completions", content=b"{}", headers={"content-type": kind})
            assert answer.status_code == 415
            check_error(415, answer.content)


def test_headers_and_bodies_have_their_bounds_before_they_are_parsed(tiny) -> None:
    key = tiny.keys[""]
    head = f"Host: x\r\nAuthorization: Bearer {key}\r\nContent-Type: application/json\r\n"

    def post(more: str, body: bytes = b"") -> tuple[int, bytes]:
        sent = f"POST /v1/completions HTTP/1.1\r\n{head}{more}\r\n".encode() + body
        answer = tiny.raw(sent)
        return int(answer.split(b" ", 2)[1]), answer.partition(b"\r\n\r\n")[2]

    status, body = post("Content-Length: 99999999999\r\n")
    assert (status, check_error(413, body)["code"]) == (413, "body_too_large")
    chunk = b"80000\r\n" + b" " * 0x80000 + b"\r\n"
    status, body = post("Transfer-Encoding: chunked\r\n", chunk * 3)
    assert status == 413
    status, body = post("Content-Length: 50\r\n", b'{"prompt"')  # and then nothing more
    assert (status, check_error(408, body)["code"]) == (408, "timeout")
    status, body = post(f"X-Long: {'x' * 40_000}\r\nContent-Length: 2\r\n", b"{}")
    assert (status, check_error(431, body)["code"]) == (431, "headers_too_large")
    status, body = post("".join(f"X-{n}: 1\r\n" for n in range(200)) + "Content-Length: 0\r\n")
    assert status == 431
    assert post(f"X-Long: {'x' * 200_000}\r\n")[0] == 400  # more than the parser takes
    with tiny.openai(key) as client:
        assert client.completions.create(model="tiny", prompt=[5, 9], max_tokens=1).choices


def test_a_key_names_a_tenant_whose_contexts_are_nobody_elses(tiny) -> None:
    body = {"token_ids": [3, 1, 4, 1, 5, 9, 2, 6] * 20, "wait": True}
    ids = {}
    for tenant in ("a", "b"):
        with tiny.http(tenant) as http:
            made = http.post("/v1/contexts", json=body)
            assert made.status_code == 200, made.text
            ids[tenant] = made.json()["id"]
    assert ids["a"] != ids["b"]
    with tiny.http("b") as http:
        assert [c["id"] for c in http.get("/v1/contexts").json()["data"]] == [ids["b"]]
        for method, path in (("GET", ""), ("DELETE", ""), ("POST", "/verify")):
            answer = http.request(method, f"/v1/contexts/{ids['a']}{path}")
            nobodys = http.request(method, f"/v1/contexts/{'0' * 16}{path}")
            assert answer.status_code == nobodys.status_code == 404
            assert answer.text == nobodys.text.replace("0" * 16, ids["a"])
        theirs = {"prompt": [5], "contexts": [ids["a"]], "max_tokens": 1}
        assert http.post("/v1/completions", json=theirs).status_code == 404
        mine = http.post("/v1/completions", json={**theirs, "contexts": [ids["b"]]})
        assert mine.json()["usage"]["prompt_tokens"] == 161
        request_id = mine.headers["x-request-id"]
        assert http.get(f"/v1/requests/{request_id}").status_code == 200
    with tiny.http("a") as http:
        assert http.get(f"/v1/requests/{request_id}").status_code == 404
        assert http.get("/v1/contexts").json()["data"][0]["id"] == ids["a"]


def test_without_a_key_nothing_but_health_is_told(tiny) -> None:
    with tiny.http() as http:
        assert http.get("/health").json() == {"status": "ok"}
        assert http.get("/openapi.json").json()["openapi"] == "3.1.0"
        for path in ("/v1/models", "/v1/contexts", "/v1/requests", "/metrics"):
            answer = http.get(path)
            assert answer.status_code == 401
            assert check_error(401, answer.content)["code"] == "no_api_key"
        for path in POSTS:
            assert http.post(path, json={}).status_code == 401
    with tiny.openai("rsk-wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()
    with tiny.openai(tiny.keys["a"]) as client:
        [card] = client.models.list().data
        assert (card.id, card.max_model_len) == ("tiny", tiny.state.service.max_model_len)
    with tiny.http("a") as http:
        assert "ringspan_answers" in http.get("/metrics").text
