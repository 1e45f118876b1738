"""Stop strings, API keys, addresses, settings: by themselves."""

from __future__ import annotations

import hashlib
import os
import random
from pathlib import Path

import pytest
import yaml
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from ringspan.cluster.events import Cancelled
from ringspan.cluster.service_types import Overloaded, TenantLimits
from ringspan.deploy import cli
from ringspan.deploy.serve.auth import KEYS_VARIABLE, ApiKeys, new_key
from ringspan.deploy.serve.errors import ApiError, as_api_error
from ringspan.deploy.serve.limits import HttpLimits
from ringspan.deploy.serve.openapi import describe
from ringspan.deploy.serve.serve_app import config_from
from ringspan.deploy.serve.serving import check_host
from ringspan.deploy.serve.stops import StopStrings
from ringspan.deploy.serve.texts import put_around
from ringspan.errors import BadInput, RankLost, StoreError, TooLarge, UnknownName

ROOT = Path(__file__).resolve().parents[3]


def test_stop_strings_cut_alike_however_the_text_is_cut_into_pieces() -> None:
    draw = random.Random(5)
    for _ in range(2000):
        text = "".join(draw.choice("ab\n") for _ in range(draw.randrange(30)))
        lengths = [draw.randrange(1, 5) for _ in range(draw.randrange(4))]
        stops = tuple("".join(draw.choice("ab\n") for _ in range(n)) for n in lengths)
        found = StopStrings(stops)
        given, rest = "", text
        while rest:
            size = draw.randrange(1, 4)
            given += found.push(rest[:size])
            rest = rest[size:]
            assert not any(stop in given for stop in stops)
        given += found.finish()
        places = [text.find(stop) for stop in stops if stop in text]
        assert found.found == bool(places)
        if not places:
            assert given == text
        else:  # the first stop string that was whole; one that began earlier may not have been
            first_whole = min(text.find(stop) + len(stop) for stop in stops if stop in text)
            assert text.startswith(given)
            assert len(given) < first_whole


def test_a_stop_string_is_held_back_and_given_up() -> None:
    found = StopStrings(("END",))
    assert [found.push(piece) for piece in ("a E", "N", "x EN")] == ["a ", "", "ENx "]
    assert found.finish() == "EN"


def test_keys_are_hashed_at_rest_and_may_change_while_the_server_runs(tmp_path: Path) -> None:
    file = tmp_path / "deep" / "keys"
    key, other = new_key("a", file), new_key("", file)
    text = file.read_text()
    assert key not in text
    assert hashlib.sha256(key.encode()).hexdigest() in text
    assert file.stat().st_mode & 0o777 == 0o600
    keys = ApiKeys(file, {})
    assert (keys.tenant(f"Bearer {key}"), keys.tenant(f"bearer {other}")) == ("a", "")
    assert keys.tenants == {"a", ""}
    for wrong in ("", key, f"Basic {key}", f"Bearer {key[:-1]}", "Bearer ", "Bearer \udcff"):
        with pytest.raises(ApiError) as refused:
            keys.tenant(wrong)
        assert refused.value.status == 401
        assert key not in refused.value.message
    second, stranger = new_key("a", file), new_key("new", file)
    assert keys.tenant(f"Bearer {second}") == "a"
    with pytest.raises(ApiError):  # its namespace was not made when the server started
        keys.tenant(f"Bearer {stranger}")
    file.write_text(text.splitlines()[1] + "\n")
    with pytest.raises(ApiError):
        keys.tenant(f"Bearer {key}")
    file.write_text("")
    os.utime(file, ns=(1, 1))
    with pytest.raises(ApiError):  # no key left: nobody, not everybody
        keys.tenant("")


def test_keys_of_the_environment_and_lines_that_are_none(tmp_path: Path) -> None:
    digest = hashlib.sha256(b"rsk-x").hexdigest()
    keys = ApiKeys(None, {KEYS_VARIABLE: f"a:sha256:{digest},:sha256:{'0' * 64}"})
    assert keys.tenant("Bearer rsk-x") == "a"
    with pytest.raises(BadInput, match="line 1: wanted TENANT:sha256") as refused:
        ApiKeys(None, {KEYS_VARIABLE: "rsk-secret"})
    assert "rsk-secret" not in str(refused.value)
    with pytest.raises(BadInput, match=r"wanted 1 to 128 letters"):
        new_key("../a", tmp_path / "keys")
    assert not (tmp_path / "keys").exists()
    with pytest.raises(BadInput, match="--new-api-key TENANT"):
        ApiKeys(tmp_path / "none", {})
    file = tmp_path / "open"
    new_key("a", file)
    file.chmod(0o666)
    with pytest.raises(BadInput, match="chmod 600"):
        ApiKeys(file, {})


def test_limits_of_tenants_stand_beside_their_keys(tmp_path: Path) -> None:
    file = tmp_path / "keys"
    key = new_key("a", file)
    with file.open("a") as more:
        more.write("*:limits: max_running=3\na:limits: requests_per_minute=60 contexts=5\n")
    keys = ApiKeys(file, {KEYS_VARIABLE: "b:limits: tokens_in_flight=7"})
    assert keys.tenants == {"a"}
    assert keys.limits("a") == TenantLimits(requests_per_minute=60, contexts=5)
    assert keys.limits("b") == TenantLimits(tokens_in_flight=7)
    assert keys.limits("c") == TenantLimits(max_running=3)
    assert keys.limits("") == TenantLimits()
    file.write_text(file.read_text().replace("contexts=5", "contexts=6"))
    os.utime(file, ns=(1, 1))
    keys.tenant(f"Bearer {key}")
    assert keys.limits("a").contexts == 6
    for wrong in ("contexts=0", "contexts=-1", "contexts", "context=1", "contexts=1 contexts=2"):
        with pytest.raises(BadInput, match=r"line 1: limit .*: wanted NAME=NUMBER"):
            ApiKeys(None, {KEYS_VARIABLE: f"a:limits: {wrong}"})
    with pytest.raises(BadInput, match=r"wanted 1 to 128 letters"):
        ApiKeys(None, {KEYS_VARIABLE: "../a:limits: contexts=1"})


def test_control_tokens_that_a_tokenizer_puts_around_a_text() -> None:
    words = {"<s>": 0, "</s>": 1, "a": 2, "b": 3}
    backend = Tokenizer(WordLevel(words, unk_token="b"))
    bare = PreTrainedTokenizerFast(tokenizer_object=backend)
    assert put_around(bare) == ([], [])
    backend.post_processor = TemplateProcessing(
        single="<s> <s> $A </s>", special_tokens=[("<s>", 0), ("</s>", 1)]
    )
    assert put_around(PreTrainedTokenizerFast(tokenizer_object=backend)) == ([0, 0], [1])


def test_an_address_that_others_reach_wants_keys(tmp_path: Path) -> None:
    new_key("a", tmp_path / "keys")
    without, with_keys = ApiKeys(None, {}), ApiKeys(tmp_path / "keys", {})
    for host in ("127.0.0.1", "::1", "localhost", "127.8.9.1"):
        check_host(host, without, no_auth=False)
    for host in ("0.0.0.0", "::", "10.0.0.1", "example.org", ""):
        with pytest.raises(BadInput, match="--no-auth"):
            check_host(host, without, no_auth=False)
        check_host(host, with_keys, no_auth=False)
        check_host(host, without, no_auth=True)


@pytest.mark.parametrize(
    ("error", "status", "code", "retry"),
    [
        (UnknownName("context", "x", ("y",)), 404, "not_found", None),
        (
            TooLarge("9 tokens do not fit the 8 positions of m"),
            400,
            "context_length_exceeded",
            None,
        ),
        (TooLarge("no memory"), 400, "too_large", None),
        (BadInput("wrong"), 400, None, None),
        (Overloaded("64 wait", retry_after_s=2.2), 503, "overloaded", "3"),
        (Overloaded("of a", retry_after_s=2, tenant="a"), 429, "rate_limit_exceeded", "2"),
        (RankLost("rank 1"), 503, "rank_lost", "5"),
        (Cancelled("gone"), 503, "cancelled", "1"),
        (StoreError("cannot read /secret/place"), 500, "store_error", None),
        (RuntimeError("/secret/place"), 500, "internal_error", None),
    ],
)
def test_errors_have_their_status(
    error: Exception, status: int, code: str | None, retry: str | None
) -> None:
    told = as_api_error(error, "r-1")
    assert (told.status, told.code, told.headers.get("retry-after")) == (status, code, retry)
    assert b"/secret" not in told.body()
    assert b"known:" not in told.body()


def test_settings_of_a_serve_application() -> None:
    config = config_from({"model": "random:tiny", "ranks": "2", "local": "true"})
    assert (config.ranks, config.local, config.model_name) == (2, True, "random:tiny")
    assert config_from({"model": "/models/llama"}).model_name == "llama"
    for args in ({}, {"model": "m", "rnaks": 2}, {"model": "m", "limits": {"body_bytes": 0}}):
        with pytest.raises(BadInput):
            config_from(args)
    file = yaml.safe_load((ROOT / "deploy/serve/ringspan.yaml").read_text())
    config_from(file["applications"][0]["args"])
    with pytest.raises(BadInput, match="header_count = 0"):
        HttpLimits(header_count=0)


def test_every_reference_of_the_description_is_there() -> None:
    document = describe("1")
    names = set(document["components"]["schemas"])
    referred: set[str] = set()

    def walk(value: object) -> None:
        if isinstance(value, dict):
            if isinstance(value.get("$ref"), str):
                referred.add(value["$ref"].rpartition("/")[2])
            for item in value.values():
                walk(item)
        elif isinstance(value, list | tuple):
            for item in value:
                walk(item)

    walk(document)
    assert referred <= names
    operations = [op["operationId"] for path in document["paths"].values() for op in path.values()]
    assert len(operations) == len(set(operations)) == 14


def test_the_command_refuses_before_it_starts_anything(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv(KEYS_VARIABLE, raising=False)
    assert cli.run(["serve", "--new-api-key", "a", "--api-keys", "keys"]) == 0
    key = capsys.readouterr().out.strip()
    assert ApiKeys(tmp_path / "keys", {}).tenant(f"Bearer {key}") == "a"
    serve = ("serve", "--model", "random:tiny", "--local", "--ranks", "1", "--device", "cpu")
    for arguments, words in (
        (("serve",), "--model is missing"),
        (("serve", "--new-api-key", "a"), "--api-keys FILE"),
        ((*serve, "--host", "0.0.0.0"), "can be reached by others"),
        ((*serve, "--codec", "zip"), "unknown codec 'zip'"),
        ((*serve, "--port", "70000"), "--port 70000"),
        ((*serve, "--api-keys", "gone"), "--api-keys gone"),
        ((*serve, "--max-waiting", "0"), "max_waiting 0"),
        ((*serve, "--max-body-mb", "0"), "--max-body-mb 0"),
    ):
        assert cli.run(arguments) == 2, arguments
        error = capsys.readouterr().err
        assert words in error
        assert error.count("\n") == 1
    assert not (tmp_path / "ringspan-store").exists()
