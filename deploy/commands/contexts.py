"""`ringspan contexts`: what a store folder holds, and where."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from ringspan.deploy.commands import archives, repairs
from ringspan.deploy.commands.options import (
    DEFAULT_SECRET,
    DEFAULT_STORE,
    SecretFile,
    Store,
    Tenant,
    namespaces,
)
from ringspan.deploy.progress import bytes_words, meter
from ringspan.errors import BadInput, CorruptPage, StoreError

if TYPE_CHECKING:
    from ringspan.kvstore.folder import Store as StoreFolder
    from ringspan.kvstore.manifest import Manifest

app = typer.Typer(
    help="List, show, verify, move, recode, re-key, export, import, pin or remove contexts.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

app.command("export")(archives.export)
app.command("import")(archives.import_)
app.command("recode")(archives.recode)
app.command("rekey")(archives.rekey)
app.command("verify")(repairs.verify)
app.command("repair")(repairs.repair)

Context = Annotated[str, typer.Argument(help="A context's id, or the beginning of it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_(
    store: Store = DEFAULT_STORE,
    tenant: Tenant = None,
    secret_file: SecretFile = DEFAULT_SECRET,
    as_json: AsJson = False,
) -> None:
    """All contexts, newest first."""
    from ringspan.kvstore.folder import Store as StoreFolder

    folder = StoreFolder(existing(store), namespaces(tenant, secret_file))
    manifests, damaged = folder.contexts()
    if as_json:
        rows = [_summary(manifest, folder) for manifest in manifests]
        print(msgspec.json.encode({"contexts": rows, "damaged": damaged}).decode())
    else:
        for manifest in manifests:
            print(_line(manifest, folder))
        if not manifests:
            print(f"no contexts in {store}")
    if damaged:
        raise CorruptPage(f"{len(damaged)} damaged in {store}: {'; '.join(damaged)}")


@app.command()
def show(
    context: Context,
    store: Store = DEFAULT_STORE,
    tenant: Tenant = None,
    secret_file: SecretFile = DEFAULT_SECRET,
    as_json: AsJson = False,
) -> None:
    """What one context is: model, tokens, codec, pages, where it came from."""
    from ringspan.kvstore.folder import Store as StoreFolder

    folder = StoreFolder(existing(store), namespaces(tenant, secret_file))
    manifest = folder.manifest(context)
    if as_json:
        print(msgspec.json.encode(_summary(manifest, folder)).decode())
        return
    form = manifest.form
    rows = {
        "context": manifest.context_id,
        "title": manifest.title or "-",
        "sources": ", ".join(manifest.sources) or "-",
        "model": manifest.model.name,
        "rope scaling": manifest.model.rope_scaling or "none",
        "tokens": f"{manifest.num_tokens:,} (document: {manifest.document_tokens.tokens:,})",
        "made as": "a chat's opening" if manifest.chat else "plain tokens",
        "codec": f"{manifest.codec} ({'exact' if manifest.exact else 'approximate'})",
        "pages": f"{len(manifest.pages):,} of {form.page_tokens} tokens",
        "bytes": f"{manifest.payload_bytes:,}"
        f" ({manifest.payload_bytes / manifest.num_tokens:,.0f} a token)",
        "prefilled": f"{_when(manifest)} on {manifest.world_size} ranks, {manifest.layout},"
        f" chunks of {manifest.chunk_tokens:,}",
        "encrypted": "pages, tokens and title, at rest" if manifest.encrypted else "no",
        "fingerprint": manifest.origin.fingerprint,
        "folder": str(folder.folder(manifest)),
        "tiers": _tiers(manifest, folder),
    }
    for name, value in rows.items():
        print(f"{name:13} {value}")


@app.command()
def rm(
    contexts: Annotated[list[str], typer.Argument(help="Ids, or beginnings of them.")],
    store: Store = DEFAULT_STORE,
    tenant: Tenant = None,
    secret_file: SecretFile = DEFAULT_SECRET,
) -> None:
    """Remove contexts from the store. All ids are looked up before the first is removed."""
    from ringspan.kvstore.folder import Store as StoreFolder
    from ringspan.kvstore.forms import remove_forms
    from ringspan.kvstore.tiers.moving import check_unpinned, forget

    folder = StoreFolder(existing(store), namespaces(tenant, secret_file))
    names = list(dict.fromkeys(folder.find(context) for context in contexts))
    for name in names:
        check_unpinned(folder, name)
    for name in names:
        for left in forget(folder, name):
            print(left)
        forms = remove_forms(folder, name)
        print(f"removed {name}" + (f" and its form in {', '.join(forms)}" if forms else ""))


@app.command()
def move(
    context: Context,
    to: Annotated[str, typer.Option("--to", help="host, disk or remote:URL (an fsspec URL).")],
    keep: Annotated[bool, typer.Option("--keep", help="Copy: leave it where it is, too.")] = False,
    store: Store = DEFAULT_STORE,
    tenant: Tenant = None,
    secret_file: SecretFile = DEFAULT_SECRET,
) -> None:
    """Bring a context's pages to another tier, verified there before they go from here."""
    from ringspan.cluster.host_store import host_folder, host_tier
    from ringspan.kvstore.folder import Store as StoreFolder
    from ringspan.kvstore.tiers.moving import move as move_context
    from ringspan.kvstore.tiers.placement import tier_name

    target = tier_name(to, str(host_folder()))
    folder = StoreFolder(existing(store), namespaces(tenant, secret_file))
    manifest = folder.manifest(context)
    if target.kind == "host":
        host_tier(Path(target.at)).close()  # started if it does not run
    with meter("move", len(manifest.pages), "pages") as shown:
        placement = move_context(
            folder,
            manifest.context_id,
            target,
            keep=keep,
            progress=lambda done, _: shown.update(done),
        )
    print(f"context {manifest.context_id}: {', '.join(map(str, placement.tiers))}")


@app.command()
def pin(
    context: Context,
    off: Annotated[bool, typer.Option("--off", help="Unpin it.")] = False,
    store: Store = DEFAULT_STORE,
    tenant: Tenant = None,
    secret_file: SecretFile = DEFAULT_SECRET,
) -> None:
    """Keep a context from being evicted or removed."""
    from ringspan.kvstore.folder import Store as StoreFolder
    from ringspan.kvstore.tiers.moving import pin as pin_context

    folder = StoreFolder(existing(store), namespaces(tenant, secret_file))
    name = folder.find(context)
    pin_context(folder, name, pinned=not off)
    print(f"{'unpinned' if off else 'pinned'} {name}")


def existing(store: Path) -> Path:
    """The folder, or BadInput if there is none: reading must not make one."""
    if not store.is_dir():
        raise BadInput(
            f"--store {store}: no such folder; prefill something first, or name another store"
        )
    return store


def _when(manifest: Manifest) -> str:
    moment = datetime.datetime.fromtimestamp(manifest.created_unix_s)
    return moment.astimezone().isoformat(sep=" ", timespec="minutes")


def _tiers(manifest: Manifest, folder: StoreFolder) -> str:
    from ringspan.kvstore.tiers.placement import read_placement

    try:
        placement = read_placement(folder.folder(manifest))
    except StoreError:
        return "unknown tiers"  # one damaged file does not hide the other contexts
    return ", ".join(map(str, placement.tiers)) + (" (pinned)" if placement.pinned else "")


def _line(manifest: Manifest, folder: StoreFolder) -> str:
    return (
        f"{manifest.context_id}  {manifest.num_tokens:>9,} tokens  {manifest.codec:5}"
        f" {bytes_words(manifest.payload_bytes):>8}  {_when(manifest)[:16]}"
        f"  {_tiers(manifest, folder)}"
        f"  {manifest.model.name}  {manifest.title or ', '.join(manifest.sources)}"
    )


def _summary(manifest: Manifest, folder: StoreFolder) -> dict[str, object]:
    """The manifest without its pages, which are thousands, and where it lies."""
    from ringspan.kvstore.tiers.placement import read_placement

    fields = msgspec.to_builtins(manifest)
    fields["namespace"] = manifest.origin.namespace  # a tenant's own is never printed
    fields["encrypted"] = bool(fields.pop("hidden"))
    placement = read_placement(folder.folder(manifest))
    fields["tiers"] = [str(tier) for tier in placement.tiers]
    fields["pinned"] = placement.pinned
    fields["num_pages"] = len(fields.pop("pages"))
    return dict(fields)
