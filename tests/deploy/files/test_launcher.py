"""deploy/ray/*.yaml, by the code that `ray up` runs before it starts anything."""

import copy
import shlex
from typing import Any

import jsonschema
import pytest
from ray.autoscaler._private.util import prepare_config, validate_config
from ray.scripts.scripts import start

NAMES = ("aws", "onprem")


@pytest.fixture(params=NAMES)
def config(request: pytest.FixtureRequest, manifest) -> Any:
    return manifest(f"ray/{request.param}.yaml")


def test_the_launcher_takes_the_file(config: Any) -> None:
    prepared = prepare_config(copy.deepcopy(config))
    validate_config(prepared)
    commands = [*prepared["head_setup_commands"], *prepared["worker_setup_commands"]]
    assert commands == []  # the image has it all: the launcher's defaults install another Ray


def test_the_launcher_refuses_a_field_that_is_none(config: Any) -> None:
    prepared = prepare_config({**copy.deepcopy(config), "max_wokers": 2})
    with pytest.raises(jsonschema.ValidationError, match="max_wokers"):
        validate_config(prepared)


@pytest.mark.parametrize("kind", ["head", "worker"])
def test_ray_starts_as_the_file_says(config: Any, kind: str) -> None:
    last = config[f"{kind}_start_ray_commands"][-1].rpartition(";")[2]
    words = shlex.split(last.replace("$RAY_HEAD_IP", "192.0.2.10"))
    assert words[:2] == ["ray", "start"]
    context = start.make_context("start", words[2:])
    assert context.params["head"] is (kind == "head")
    if kind == "head":  # reached by a tunnel: it is not opened to the network
        assert context.params["dashboard_host"] in ("localhost", "127.0.0.1")


def test_the_token_is_on_every_host_before_ray_starts(config: Any) -> None:
    assert config["file_mounts"] == {"/home/ringspan/.ray/auth_token": "~/.ray/auth_token"}
    options = config["docker"]["run_options"]
    assert "--env RAY_AUTH_MODE=token" in options
    assert not any("RAY_AUTH_TOKEN=" in option for option in options)  # no secret in a list


def test_containers_have_shared_memory_and_a_version(config: Any) -> None:
    options = config["docker"]["run_options"]
    assert any(option.startswith("--shm-size=") for option in options)
    assert config["docker"]["image"].rpartition(":")[2] not in ("", "latest")
