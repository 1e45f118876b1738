"""Options that several commands share, with one text each."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Annotated

import typer

from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.deploy.machine import gpus, usable_cores
from ringspan.deploy.record import Asked
from ringspan.errors import BadInput

Model = Annotated[
    str,
    typer.Option(
        "--model",
        "-m",
        help="smollm2, a folder, a hub id, a .gguf, random:<config>, or retriever.",
    ),
]
Ranks = Annotated[
    int | None,
    typer.Option("--ranks", "-p", help="Ranks; default: the GPUs, or 2 on a CPU of 2 cores."),
]
Transport = Annotated[
    str,
    typer.Option(
        "--transport",
        help="auto, nccl, copy-engine (NCCL, but copies between GPUs of one host), gloo, or "
        "loopback (all ranks in one process, one device).",
    ),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu or cuda.")]
Backend = Annotated[
    str, typer.Option("--backend", help="Local attention: auto, or a name `doctor` prints.")
]
Dtype = Annotated[
    str,
    typer.Option(
        "--dtype", help="auto (bfloat16 on a GPU, float32 on a CPU), float32, bfloat16, float16."
    ),
]
RopeScaling = Annotated[
    str | None,
    typer.Option(
        "--rope-scaling", help="Stretch the model's positions: yarn:4, linear:2, theta:500000."
    ),
]
Seed = Annotated[int, typer.Option("--seed", help="Of random weights, or of sampling.")]
Codec = Annotated[
    str, typer.Option("--codec", help="raw (exact), bf16, int8, fp8, int4, nuq4, k4v2, int2.")
]
Fidelity = Annotated[
    str,
    typer.Option(
        "--fidelity",
        help="The lowest that is accepted: exact, 16-bit, 8-bit, 4-bit, 2-bit; empty: any.",
    ),
]
Scheme = Annotated[
    str,
    typer.Option(
        "--scheme",
        help="auto, ring, ring-direct, all-gather, pass-q, gather-q, ulysses, ulysses-ring.",
    ),
]
Layout = Annotated[str, typer.Option("--layout", help="auto, zigzag, striped, contiguous.")]
ChunkTokens = Annotated[
    int | None,
    typer.Option("--chunk-tokens", help="Tokens of one step over all ranks; whole pages."),
]
Store = Annotated[
    Path,
    typer.Option("--store", envvar="RINGSPAN_STORE", help="Folder that keeps the contexts."),
]
Quota = Annotated[
    float | None,
    typer.Option(
        "--quota",
        help="GB that the contexts of --store may take; the ones cheapest to miss are evicted, "
        "pinned and open ones stay. Default: all of the disk.",
    ),
]
Json = Annotated[
    Path | None, typer.Option("--json", help="Write a JSON record of the run to this file.")
]
Local = Annotated[
    bool,
    typer.Option("--local", help="Without Ray: all ranks in this process (transport loopback)."),
]
Tenant = Annotated[
    str | None,
    typer.Option(
        "--tenant",
        help="Whose contexts: no other tenant's are seen or shared; default: the public ones.",
    ),
]
SecretFile = Annotated[
    Path,
    typer.Option(
        "--secret-file",
        envvar="RINGSPAN_SECRET_FILE",
        help="The server's secret, of which tenants' keys are made (mode 0600). The variable "
        "RINGSPAN_SECRET goes before it.",
    ),
]
Encrypt = Annotated[
    bool, typer.Option("--encrypt", help="Encrypt at rest (AES-256-GCM); wants --tenant.")
]
Threads = Annotated[
    int, typer.Option("--threads", help="CPU threads of one rank; 0 deals the cores evenly.")
]
Timeout = Annotated[
    float, typer.Option("--timeout", help="Seconds a rank waits for a peer before it gives up.")
]

NEEDLE_TOKENS = 8192
"""Of `--needles` without a number."""
DEFAULT_STORE = Path("ringspan-store")
DEFAULT_SECRET = Path("~/.config/ringspan/secret")
"""Made by the first prefill of a tenant; who loses it loses all tenants' contexts."""


def quota_bytes(quota: float | None) -> int | None:
    """Of `--quota`. Raises BadInput."""
    if quota is None:
        return None
    if not 0 < quota < float("inf"):
        raise BadInput(f"--quota {quota:g}: wanted GB, more than 0, or leave it out")
    return max(1, round(quota * 1e9))


def namespaces(tenant: str | None, secret_file: Path) -> tuple[bytes, ...]:
    """What the caller's contexts lie in. BadInput where a tenant is named and no secret is."""
    from ringspan.kvstore.tenancy import server_secret, tenant_namespaces

    if tenant is None:
        return tenant_namespaces(None, None)
    return tenant_namespaces(tenant, server_secret(secret_file.expanduser(), make=False))


def new_namespace(tenant: str | None, secret_file: Path, encrypt: bool) -> bytes:
    """The one that a new context is to lie in; the secret is made with the first tenant."""
    from ringspan.kvstore.tenancy import server_secret, tenant_namespace

    if tenant is None:
        return tenant_namespace(None, None, encrypt)
    tenant_namespace(tenant, b"any")  # a name that is none must not make a secret
    return tenant_namespace(tenant, server_secret(secret_file.expanduser()), encrypt)


def default_ranks(device: str) -> int:
    """One rank a GPU; without any, two on a CPU that has two cores."""
    boards = 0 if device == "cpu" else len(gpus())
    return boards or min(2, usable_cores())


def gang_spec(
    model: ModelSpec,
    *,
    ranks: int | None,
    transport: str,
    device: str,
    backend: str,
    threads: int,
    timeout_s: float,
    measure: bool | None = None,
) -> GangSpec:
    """The gang that the options ask for; not yet checked."""
    return GangSpec(
        world_size=default_ranks(device) if ranks is None else ranks,
        model=model,
        transport=transport,
        device=device,
        backend=backend,
        threads=threads,
        timeout_s=timeout_s,
        measure=measure,
    )


def as_asked(given: Mapping[str, object]) -> Asked:
    """A command's own arguments, for its record."""
    asked: Asked = {}
    for name, value in given.items():
        if isinstance(value, list):
            asked[name.rstrip("_")] = [str(item) for item in value]
        elif isinstance(value, str | int | float | bool | None):
            asked[name.rstrip("_")] = value
        else:
            asked[name.rstrip("_")] = str(value)
    return asked


def spread_inputs(arguments: Sequence[str]) -> list[str]:
    """`--input a b --ranks 2` -> `--input a --input b --ranks 2`: an option takes one value, but
    a shell's `src/*.py` gives many."""
    arguments = fill_needles(arguments)
    spread: list[str] = []
    taking = first = False
    for word in arguments:
        option = word.startswith("-") and word != "-"
        if option:
            taking = first = word in ("--input", "-i")
        elif taking:
            if not first:
                spread.append("--input")
            first = False
        spread.append(word)
    return spread


def fill_needles(arguments: Sequence[str]) -> list[str]:
    """`--needles` alone -> `--needles 8192`."""
    filled: list[str] = []
    for word, behind in zip_longest(arguments, arguments[1:], fillvalue=""):
        filled.append(word)
        if word == "--needles" and not behind.lstrip("-").isdigit():
            filled.append(str(NEEDLE_TOKENS))
    return filled
