"""`ringspan contexts export|import|recode`: contexts as files, and in other codecs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ringspan.deploy.commands.options import (
    DEFAULT_SECRET,
    DEFAULT_STORE,
    Device,
    Encrypt,
    SecretFile,
    Store,
    Tenant,
    namespaces,
    new_namespace,
)
from ringspan.deploy.progress import Meter, bytes_words, meter
from ringspan.errors import BadInput

if TYPE_CHECKING:
    from ringspan.kvstore.folder import Store as StoreFolder
    from ringspan.kvstore.transcode import Progress

Context = Annotated[str, typer.Argument(help="A context's id, or the beginning of it.")]
File = Annotated[Path, typer.Argument(help="The file; by custom it ends in .rsctx.")]
Recoded = Annotated[
    str | None,
    typer.Option("--codec", help="Recode on the way: a codec that keeps no more than it has."),
]
Cold = Annotated[
    bool, typer.Option("--cold", help="Pack pages for the archive, bit for bit (zstd by planes).")
]
Lossy = Annotated[
    bool,
    typer.Option("--cachegen", help="Pack pages in fewer bits than int4 has; lossy, as it says."),
]
Force = Annotated[bool, typer.Option("--force", help="Replace what is there.")]


def export(
    context: Context,
    file: File,
    store: Store = DEFAULT_STORE,
    tenant: Tenant = None,
    secret_file: SecretFile = DEFAULT_SECRET,
    codec: Recoded = None,
    cold: Cold = False,
    cachegen: Lossy = False,
    force: Force = False,
    device: Device = "cpu",
) -> None:
    """Write a context to one file that holds all of it, every page verified."""
    from ringspan.kvstore.archive import FRAMES
    from ringspan.kvstore.codecs import cachegen as cachegen_codec
    from ringspan.kvstore.codecs import cold as cold_codec
    from ringspan.kvstore.export import export_context

    if cold and cachegen:
        raise BadInput("--cold and --cachegen: a file's pages are packed one way, name one")
    folder = _folder(store, tenant, secret_file)
    stored = cold_codec.NAME if cold else cachegen_codec.NAME if cachegen else FRAMES
    began = time.perf_counter()
    with _progress("export") as progress:
        done = export_context(
            folder,
            context,
            file,
            codec_name=codec or "",
            stored=stored,
            replace=force,
            device=_device(device),
            progress=progress,
        )
    elapsed_s = time.perf_counter() - began
    print(
        f"{file}: {done.num_pages:,} pages, {bytes_words(done.file_bytes)} for "
        f"{bytes_words(done.payload_bytes)} of KV, in {elapsed_s:.1f} s"
    )


def import_(
    file: File,
    store: Store = DEFAULT_STORE,
    tenant: Tenant = None,
    secret_file: SecretFile = DEFAULT_SECRET,
    codec: Recoded = None,
    force: Force = False,
    device: Device = "cpu",
) -> None:
    """Take a context from a file that `export` wrote, after all of it was verified."""
    from ringspan.kvstore.folder import Store as StoreFolder
    from ringspan.kvstore.importing import import_context

    began = time.perf_counter()
    with _progress("import") as progress:
        manifest = import_context(
            StoreFolder(store, namespaces(tenant, secret_file)),
            file,
            codec_name=codec or "",
            replace=force,
            device=_device(device),
            progress=progress,
        )
    elapsed_s = time.perf_counter() - began
    print(
        f"context {manifest.context_id}: {manifest.num_tokens:,} tokens, codec {manifest.codec}, "
        f"{bytes_words(manifest.payload_bytes)}, verified, in {elapsed_s:.1f} s"
    )


def recode(
    context: Context,
    codec: Annotated[str, typer.Option("--codec", help="One that keeps no more than it has.")],
    store: Store = DEFAULT_STORE,
    tenant: Tenant = None,
    secret_file: SecretFile = DEFAULT_SECRET,
    replace: Annotated[
        bool, typer.Option("--replace", help="In the place of what is stored, not beside it.")
    ] = False,
    device: Device = "cpu",
) -> None:
    """Make a second form of a context: the same pages in another codec."""
    from ringspan.kvstore.forms import recode as recode_context

    began = time.perf_counter()
    with _progress("recode") as progress:
        at, manifest = recode_context(
            _folder(store, tenant, secret_file),
            context,
            codec,
            replace=replace,
            device=_device(device),
            progress=progress,
        )
    elapsed_s = time.perf_counter() - began
    print(
        f"context {manifest.context_id}: codec {manifest.codec} ({manifest.fidelity.text}), "
        f"{bytes_words(manifest.payload_bytes)}, in {at.root}, in {elapsed_s:.1f} s"
    )


def rekey(
    context: Context,
    to_tenant: Annotated[
        str | None, typer.Option("--to-tenant", help="Whose it becomes; default: public.")
    ] = None,
    encrypt: Encrypt = False,
    to_secret_file: Annotated[
        Path | None,
        typer.Option("--to-secret-file", help="Another secret, to rotate; default: the same."),
    ] = None,
    replace: Annotated[
        bool, typer.Option("--replace", help="Remove the old one, once the new one is there.")
    ] = False,
    store: Store = DEFAULT_STORE,
    tenant: Tenant = None,
    secret_file: SecretFile = DEFAULT_SECRET,
) -> None:
    """Give a context to another tenant, encrypt it or not, or rotate the secret it is under: the
    same KV in pages of other names, under another id."""
    from ringspan.kvstore.rekey import rekey as rekey_context
    from ringspan.kvstore.tenancy import SECRET_VARIABLE, server_secret, tenant_namespace
    from ringspan.kvstore.tiers.moving import check_unpinned, forget

    folder = _folder(store, tenant, secret_file)
    name = folder.find(context)
    if replace:
        check_unpinned(folder, name)
    if to_secret_file is None:
        namespace = new_namespace(to_tenant, secret_file, encrypt)
    elif to_tenant is None:
        raise BadInput(f"--to-secret-file {to_secret_file}: wanted with --to-tenant NAME")
    else:  # the variable holds the old one
        secret = server_secret(to_secret_file.expanduser(), {SECRET_VARIABLE: ""})
        namespace = tenant_namespace(to_tenant, secret, encrypt)
    began = time.perf_counter()
    with _progress("rekey") as progress:
        manifest = rekey_context(folder, name, namespace, progress=progress)
    print(
        f"context {manifest.context_id}: {manifest.num_tokens:,} tokens, "
        f"{'encrypted, ' if manifest.encrypted else ''}{bytes_words(manifest.payload_bytes)}, in "
        f"{time.perf_counter() - began:.1f} s; parity: ringspan contexts repair --parity N"
    )
    if replace:
        for left in forget(folder, name):
            print(left)
        print(f"removed {name}")


def _folder(store: Path, tenant: str | None, secret_file: Path) -> StoreFolder:
    from ringspan.deploy.commands.contexts import existing
    from ringspan.kvstore.folder import Store as StoreFolder

    return StoreFolder(existing(store), namespaces(tenant, secret_file))


def _device(name: str) -> str:
    """Where pages are decoded and encoded; the machine at hand, if it is left to us."""
    import torch

    here = torch.cuda.is_available()
    if name == "auto":
        return "cuda" if here else "cpu"
    if name not in ("cpu", "cuda") or (name == "cuda" and not here):
        raise BadInput(f"--device {name}: wanted cpu{' or cuda' if here else ', there is no GPU'}")
    return name


@contextlib.contextmanager
def _progress(what: str) -> Iterator[Progress]:
    """A meter that begins with the first page: only then it is known how many there are."""
    with contextlib.ExitStack() as phases:
        meters: list[Meter] = []

        def progress(done: int, pages: int) -> None:
            if not meters:
                meters.append(phases.enter_context(meter(what, pages, "pages")))
            meters[0].update(done)

        yield progress
