"""`ringspan contexts list|show|verify|rm`: what a store folder holds."""

from __future__ import annotations

import contextlib
import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from ringspan.deploy.commands.options import DEFAULT_STORE, Store
from ringspan.deploy.progress import Meter, bytes_words, meter
from ringspan.errors import BadInput, CorruptPage

if TYPE_CHECKING:
    from ringspan.kvstore.manifest import Manifest

app = typer.Typer(
    help="List, show, verify or remove the contexts of a store.",
    no_args_is_help=True,
    rich_markup_mode=None,
)

Context = Annotated[str, typer.Argument(help="A context's id, or the beginning of it.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON.")]


@app.command("list")
def list_(store: Store = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """All contexts, newest first."""
    from ringspan.kvstore.folder import Store as StoreFolder

    manifests, damaged = StoreFolder(existing(store)).contexts()
    if as_json:
        rows = [_summary(manifest) for manifest in manifests]
        print(msgspec.json.encode({"contexts": rows, "damaged": damaged}).decode())
    else:
        for manifest in manifests:
            print(_line(manifest))
        if not manifests:
            print(f"no contexts in {store}")
    if damaged:
        raise CorruptPage(f"{len(damaged)} damaged in {store}: {'; '.join(damaged)}")


@app.command()
def show(context: Context, store: Store = DEFAULT_STORE, as_json: AsJson = False) -> None:
    """What one context is: model, tokens, codec, pages, where it came from."""
    from ringspan.kvstore.folder import Store as StoreFolder

    folder = StoreFolder(existing(store))
    manifest = folder.manifest(context)
    if as_json:
        print(msgspec.json.encode(_summary(manifest)).decode())
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
        "fingerprint": manifest.origin.fingerprint,
        "folder": str(folder.folder(manifest)),
    }
    for name, value in rows.items():
        print(f"{name:13} {value}")


@app.command()
def verify(context: Context, store: Store = DEFAULT_STORE) -> None:
    """Read every page of a context and check it. Status 1 if any is corrupt; nothing is changed."""
    from ringspan.kvstore.audit import verify as audit
    from ringspan.kvstore.folder import Store as StoreFolder

    folder = StoreFolder(existing(store))
    name = folder.find(context)
    with contextlib.ExitStack() as phases:
        meters: list[Meter] = []

        def progress(done: int, pages: int) -> None:
            if not meters:  # how many pages there are is known with the first
                meters.append(phases.enter_context(meter("verify", pages, "pages")))
            meters[0].update(done)

        report = audit(folder.root / "contexts" / name, progress)
    if not report.ok:
        for problem in (*report.problems, *(page.what for page in report.bad_pages)):
            print(problem)
        raise CorruptPage(
            f"context {name}: {len(report.bad_pages)} of {report.num_pages} pages are corrupt,"
            f" {len(report.problems)} problems with its manifest or tokens;"
            " remove it (ringspan contexts rm) and prefill again"
        )
    print(
        f"context {name}: {report.num_pages:,} pages, {bytes_words(report.payload_bytes)},"
        f" all whole, read in {report.elapsed_s:.1f} s"
    )


@app.command()
def rm(
    contexts: Annotated[list[str], typer.Argument(help="Ids, or beginnings of them.")],
    store: Store = DEFAULT_STORE,
) -> None:
    """Remove contexts from the store. All ids are looked up before the first is removed."""
    from ringspan.kvstore.folder import Store as StoreFolder

    folder = StoreFolder(existing(store))
    names = list(dict.fromkeys(folder.find(context) for context in contexts))
    for name in names:
        folder.remove(name)
        print(f"removed {name}")


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


def _line(manifest: Manifest) -> str:
    return (
        f"{manifest.context_id}  {manifest.num_tokens:>9,} tokens  {manifest.codec:5}"
        f" {bytes_words(manifest.payload_bytes):>8}  {_when(manifest)[:16]}"
        f"  {manifest.model.name}  {manifest.title or ', '.join(manifest.sources)}"
    )


def _summary(manifest: Manifest) -> dict[str, object]:
    """The manifest without its pages, which are thousands."""
    fields = msgspec.to_builtins(manifest)
    fields["num_pages"] = len(fields.pop("pages"))
    return dict(fields)
