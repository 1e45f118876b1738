"""The same endpoint in a replica of Ray Serve."""

from __future__ import annotations

import socket
from pathlib import Path

import httpx2
import pytest

from ringspan.cluster.ray_cluster import connect
from ringspan.deploy.serve.serve_app import build

pytestmark = [pytest.mark.ray, pytest.mark.slow]


def test_a_replica_answers_and_streams(tmp_path: Path) -> None:
    from ray import serve

    args = {"model": "random:tiny", "ranks": 1, "local": True, "device": "cpu"}
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    with connect():
        try:
            serve.start(http_options={"host": "127.0.0.1", "port": port})
            serve.run(build({**args, "store": str(tmp_path / "store")}), name="ringspan")
            with httpx2.Client(base_url=f"http://127.0.0.1:{port}", timeout=60) as http:
                assert http.get("/health").json() == {"status": "ok"}
                body = {"prompt": [5, 9, 2], "max_tokens": 3, "temperature": 0}
                whole = http.post("/v1/completions", json=body).json()["choices"][0]["text"]
                assert len(whole.split()) == 3
                stream = http.post("/v1/completions", json={**body, "stream": True})
                assert stream.headers["content-type"].startswith("text/event-stream")
                assert stream.text.endswith("data: [DONE]\n\n")
                made = http.post("/v1/contexts", json={"token_ids": [1] * 200, "wait": True})
                assert made.json()["state"] == "ready"
                refused = http.post("/v1/completions", json={"prompt": []})
                assert refused.status_code == 400
                assert refused.json()["error"]["code"] == "invalid_value"
        finally:
            serve.shutdown()
