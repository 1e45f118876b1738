"""deploy/serve/ringspan.yaml, by Ray Serve's own schema and the application's own arguments."""

import importlib
from typing import Any

import pytest
import yaml
from ray.serve.schema import ServeDeploySchema


@pytest.fixture
def config(manifest) -> Any:
    return manifest("serve/ringspan.yaml")


def test_ray_serve_takes_the_file(config: Any) -> None:
    schema = ServeDeploySchema.model_validate(config)
    (application,) = schema.applications
    assert schema.http_options.request_timeout_s is None  # a long prefill is no reason to hang up
    assert application.route_prefix == "/"


def test_ray_serve_refuses_a_field_that_is_none(config: Any) -> None:
    with pytest.raises(ValueError, match="import_pat"):
        ServeDeploySchema.model_validate(
            {**config, "applications": [{"name": "x", "import_pat": "a:b"}]}
        )


def test_the_builder_takes_the_arguments(config: Any) -> None:
    (application,) = config["applications"]
    module, _, name = application["import_path"].partition(":")
    loaded = importlib.import_module(module)
    assert callable(getattr(loaded, name))
    made = loaded.config_from(application["args"])
    for key, value in application["args"].items():
        assert getattr(made, key) == value
    assert made.api_keys  # it listens on every address


def test_rayservice_carries_the_same_application(config: Any, manifest) -> None:
    carried = manifest("kuberay/rayservice.yaml")["spec"]["serveConfigV2"]
    assert yaml.safe_load(carried) == config
