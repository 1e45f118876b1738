"""What can be refused before a Ray is started or weights are loaded."""

from __future__ import annotations

import os
from pathlib import Path

from ringspan.cluster.messages import GangSpec, ModelSpec
from ringspan.cluster.placement import GangNeed, NodeView, place_gang
from ringspan.deploy.machine import gpus, usable_cores
from ringspan.errors import BadInput, StoreError, TooLarge, UnknownName
from ringspan.specs import ModelFacts
from ringspan.types import page_tokens_for

TRANSPORTS = ("auto", "nccl", "copy-engine", "gloo", "loopback")
DEVICES = ("auto", "cpu", "cuda")


def check_gang(spec: GangSpec, local: bool) -> None:
    """The gang's names and its size against this machine.

    A cluster that was named (RAY_ADDRESS) is not asked here: the gang asks it when it starts.
    Raises UnknownName, BadInput, or TooLarge with the number of devices found.
    """
    check_name("transport", spec.transport, TRANSPORTS)
    check_name("device", spec.device, DEVICES)
    check_model_name(spec.model)
    check_backend(spec.backend)
    if spec.world_size < 1:
        raise BadInput(f"--ranks {spec.world_size}: wanted at least 1")
    if spec.threads < 0:
        raise BadInput(f"--threads {spec.threads}: wanted at least 1, or 0 to share the cores")
    if spec.timeout_s <= 0:
        raise BadInput(f"--timeout {spec.timeout_s:g}: wanted seconds, more than 0")
    if local and spec.transport not in ("auto", "loopback"):
        raise BadInput(
            f"--local puts all ranks in this process, --transport {spec.transport} wants one"
            " process a rank; leave one of the two out"
        )
    if not os.environ.get("RAY_ADDRESS"):
        _check_this_machine(spec, local)


def _check_this_machine(spec: GangSpec, local: bool) -> None:
    boards = len(gpus())
    if spec.device == "cuda" and not boards:
        raise TooLarge("--device cuda: this machine shows no GPU; leave it out to use the CPU")
    if spec.transport in ("nccl", "copy-engine") and (spec.device == "cpu" or not boards):
        raise TooLarge(
            f"--transport {spec.transport} wants a GPU for each of {spec.world_size} ranks, found"
            f" {'--device cpu' if boards else 'none'}; use gloo on CPUs"
        )
    machine = NodeView(node_id="here", num_cpus=usable_cores(), num_gpus=boards)
    need = GangNeed(
        world_size=spec.world_size,
        device=spec.device,
        threads=spec.threads,
        one_process=local or spec.transport == "loopback",
    )
    place_gang((machine,), need)


def check_model_name(model: ModelSpec) -> None:
    """The name, the rope scaling and the dtype, without reading any weights."""
    from ringspan.attention.models.load import DTYPES
    from ringspan.attention.models.rope import parse_rope_scaling
    from ringspan.attention.models.source import parse_name

    parse_name(model.name)
    check_name("dtype", model.dtype, ("auto", *DTYPES))
    if model.rope_scaling is not None:
        parse_rope_scaling(model.rope_scaling)


def check_model(spec: GangSpec) -> ModelFacts:
    """What the model is, by its config alone. Refuses what the attention hook cannot carry.

    The dtype `auto` is guessed by this machine's devices; the ranks know better.
    """
    import torch

    from ringspan.attention.models.load import facts_from_config

    cuda = spec.device == "cuda" or (spec.device == "auto" and len(gpus()) > 0)
    return facts_from_config(spec.model, torch.device("cuda" if cuda else "cpu"))


def check_size(facts: ModelFacts, num_tokens: int, chunk_tokens: int | None) -> None:
    """The model has the positions, and the chunks are whole pages."""
    from ringspan.attention.models.facts import check_positions
    from ringspan.cluster.planner import check_chunk_tokens

    check_positions(facts, num_tokens)
    if chunk_tokens is not None:
        check_chunk_tokens(chunk_tokens, page_tokens_for(facts.head_dim))


def check_scheme(scheme: str, facts: ModelFacts, world_size: int) -> None:
    """The scheme can serve the model's heads on so many ranks."""
    from ringspan.attention.schemes.table import why_not

    if scheme != "auto":
        reason = why_not(scheme, facts.num_q_heads, facts.num_kv_heads, world_size)
        if reason is not None:
            raise BadInput(reason)


def check_backend(backend: str) -> None:
    from ringspan.attention.local import BACKENDS

    check_name("attention backend", backend, ("auto", *BACKENDS))


def check_plan_names(codec: str, scheme: str, layout: str, fidelity: str = "") -> None:
    """Each may be `auto` where the planner can choose."""
    from ringspan.attention.layout import LAYOUTS
    from ringspan.attention.schemes.table import SCHEMES
    from ringspan.kvstore.codecs.registry import CODECS

    check_name("codec", codec, tuple(CODECS))
    check_name("scheme", scheme, ("auto", *SCHEMES))
    check_name("layout", layout, ("auto", *LAYOUTS))
    if fidelity:
        from ringspan.kvstore.fidelity import fidelity_named

        fidelity_named(fidelity)


def check_kept(codec: str, facts: ModelFacts, fidelity: str) -> None:
    """The codec keeps the lowest fidelity that is accepted (empty: any)."""
    import torch

    from ringspan.kvstore.fidelity import check_codec

    dtype = getattr(torch, facts.dtype)
    check_codec(codec, facts.num_kv_heads, facts.head_dim, dtype, fidelity)


def check_name(kind: str, name: str, known: tuple[str, ...]) -> None:
    if name not in known:
        raise UnknownName(kind, name, known)


def check_store_folder(store: Path) -> None:
    """The folder can be made or written to. Its room is checked once the size is known."""
    existing = store
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    if not existing.is_dir():
        raise StoreError(f"--store {store}: {existing} is a file; wanted a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise StoreError(
            f"--store {store}: no right to write in {existing}; choose another folder with --store"
        )
