"""`ringspan serve`: the OpenAI-compatible endpoint over one gang.

Whatever can be refused is refused before a gang is started. Ctrl-C or SIGTERM: no new connection is
taken, what runs has `--drain` seconds to end, then the gang ends.
"""

from __future__ import annotations

import contextlib
import signal
import sys
from pathlib import Path
from typing import Annotated

import typer

from ringspan.deploy.commands import options
from ringspan.errors import BadInput

ServedName = Annotated[
    str, typer.Option("--served-model-name", help="What requests call it; default: its own name.")
]
Host = Annotated[str, typer.Option("--host", help="Address to listen on.")]
Port = Annotated[int, typer.Option("--port", help="0 takes a free one.")]
KeysFile = Annotated[
    Path | None,
    typer.Option(
        "--api-keys",
        help="File with hashes of API keys, and limits of tenants. The variable RINGSPAN_API_KEYS "
        "may hold more.",
    ),
]
NewKey = Annotated[
    str | None,
    typer.Option(
        "--new-api-key",
        help="Print a new key for this tenant (public: for none), keep its hash in --api-keys, "
        "and end.",
    ),
]
NoAuth = Annotated[
    bool, typer.Option("--no-auth", help="Everybody who reaches --host may ask, without a key.")
]
OpenMetrics = Annotated[bool, typer.Option("--open-metrics", help="GET /metrics wants no API key.")]
MaxWaiting = Annotated[int, typer.Option("--max-waiting", help="Requests that may wait.")]
MaxRunning = Annotated[int, typer.Option("--max-running", help="Answers that advance together.")]
MaxBody = Annotated[
    int, typer.Option("--max-body-mb", help="Of one request's body, in MiB, before it is parsed.")
]
Drain = Annotated[
    float, typer.Option("--drain", help="Seconds that what runs has to end at a shutdown.")
]
PUBLIC = "public"


def serve(
    model: options.Model = "",
    store: options.Store = options.DEFAULT_STORE,
    quota: options.Quota = None,
    served_model_name: ServedName = "",
    host: Host = "127.0.0.1",
    port: Port = 8000,
    api_keys: KeysFile = None,
    new_api_key: NewKey = None,
    no_auth: NoAuth = False,
    open_metrics: OpenMetrics = False,
    secret_file: options.SecretFile = options.DEFAULT_SECRET,
    ranks: options.Ranks = None,
    codec: options.Codec = "raw",
    max_waiting: MaxWaiting = 64,
    max_running: MaxRunning = 16,
    max_body_mb: MaxBody = 32,
    drain: Drain = 30.0,
    transport: options.Transport = "auto",
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    dtype: options.Dtype = "auto",
    rope_scaling: options.RopeScaling = None,
    seed: options.Seed = 0,
    threads: options.Threads = 0,
    local: options.Local = False,
    timeout: options.Timeout = 60.0,
) -> None:
    """Serve chats, completions and contexts over HTTP, as OpenAI's clients speak it."""
    if new_api_key is not None:
        _new_key(new_api_key, api_keys)
        return
    if not model:
        raise BadInput("--model is missing: smollm2, a folder, a hub id, a .gguf, ...")
    if not 0 <= port < 1 << 16:
        raise BadInput(f"--port {port}: wanted 0 to 65535")
    if max_body_mb < 1 or drain <= 0:
        raise BadInput(f"--max-body-mb {max_body_mb}, --drain {drain:g}: wanted more than 0")
    from ringspan.deploy.serve.limits import HttpLimits
    from ringspan.deploy.serve.serving import ServeConfig, check_config, check_host, serving

    body_bytes = max_body_mb << 20
    config = ServeConfig(
        model=model,
        served_model_name=served_model_name,
        store=str(store),
        quota_bytes=options.quota_bytes(quota),
        ranks=ranks,
        local=local,
        transport=transport,
        device=device,
        backend=backend,
        dtype=dtype,
        rope_scaling=rope_scaling,
        seed=seed,
        threads=threads,
        timeout_s=timeout,
        codec=codec,
        api_keys="" if api_keys is None else str(api_keys),
        secret_file=str(secret_file),
        open_metrics=open_metrics,
        max_waiting=max_waiting,
        max_running=max_running,
        drain_s=drain,
        limits=HttpLimits(body_bytes=body_bytes, bodies_bytes=8 * body_bytes),
    )
    keys = check_config(config)
    check_host(host, keys, no_auth)
    from ringspan.deploy.serve.app import build_app
    from ringspan.deploy.serve.listening import BACKLOG, bound, server_for

    with bound(host, port) as listening:
        previous = signal.signal(signal.SIGTERM, _stop)
        try:
            with serving(config, keys) as state:
                signal.signal(signal.SIGTERM, _stop)  # Ray has put its own over it: exit 15
                listening.listen(BACKLOG)  # who reads the line below may connect at once
                address, taken = listening.getsockname()[:2]
                url = (
                    f"http://[{address}]:{taken}" if ":" in address else f"http://{address}:{taken}"
                )
                print(f"ringspan serves {state.model_name} at {url}", file=sys.stderr, flush=True)
                # uvicorn raises again the signal that it ended by
                with contextlib.suppress(KeyboardInterrupt):
                    server = server_for(build_app(state), drain_s=drain, limits=config.limits)
                    server.run(sockets=[listening])
        finally:
            signal.signal(signal.SIGTERM, previous)


def _new_key(tenant: str, path: Path | None) -> None:
    from ringspan.deploy.serve.auth import new_key

    if path is None:
        raise BadInput("--new-api-key wants --api-keys FILE, which its hash is kept in")
    print(new_key("" if tenant == PUBLIC else tenant, path.expanduser()))


def _stop(signum: int, frame: object) -> None:
    """SIGTERM ends the server as Ctrl-C does, instead of on the spot."""
    raise KeyboardInterrupt
