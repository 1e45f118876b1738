"""`ringspan contexts verify|repair`: whether a stored context is what it says, and making it so."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from ringspan.deploy.checks import check_gang, check_model
from ringspan.deploy.commands import options
from ringspan.deploy.commands.options import (
    DEFAULT_SECRET,
    DEFAULT_STORE,
    SecretFile,
    Store,
    Tenant,
    namespaces,
)
from ringspan.deploy.gangs import open_gang
from ringspan.deploy.progress import Meter, bytes_words, meter
from ringspan.errors import BadInput, CorruptPage, RingspanError, StoreError

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from ringspan.cluster.messages import GangSpec, PageRecord
    from ringspan.kvstore.audit import Progress, VerifyReport
    from ringspan.kvstore.folder import Store as StoreFolder
    from ringspan.kvstore.manifest import Manifest
    from ringspan.kvstore.repair import Mended
    from ringspan.types import Span

Context = Annotated[str, typer.Argument(help="A context's id, or the beginning of it.")]
Deep = Annotated[
    bool,
    typer.Option(
        "--deep", help="Also prefill a sample of pages again from the tokens and compare."
    ),
]
Sample = Annotated[int, typer.Option("--sample", help="Pages that --deep takes.")]
Parity = Annotated[
    int | None,
    typer.Option("--parity", help="Pages of parity to a stripe from now on: 1 or 2."),
]


def verify(
    context: Context,
    store: Store = DEFAULT_STORE,
    tenant: Tenant = None,
    secret_file: SecretFile = DEFAULT_SECRET,
    deep: Deep = False,
    sample: Sample = 4,
    ranks: options.Ranks = None,
    transport: options.Transport = "auto",
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    threads: options.Threads = 0,
    seed: options.Seed = 0,
    local: options.Local = False,
    timeout: options.Timeout = 60.0,
) -> None:
    """Read every copy of every page of a context, in all its tiers, and its parity, and check it.
    Status 1 if any is corrupt; nothing is changed. Any tenant's context can be verified as it is
    stored; with --tenant its keys and what is encrypted are checked too. The gang's options are for
    --deep."""
    if deep and sample < 1:
        raise BadInput(f"--sample {sample}: wanted at least one page")
    folder = _folder(store, None if tenant is None else namespaces(tenant, secret_file))
    name = folder.find(context)
    report = _audit(folder, name)
    for note in report.notes:
        print(note)
    if not report.ok:
        _tell(report)
        raise CorruptPage(
            f"context {name}: {len(report.bad_pages)} of {report.num_pages} pages are corrupt, "
            f"{len(report.problems)} problems with its manifest or tokens, "
            f"{len(report.bad_parity)} with its parity, {len(report.side_problems)} with the files "
            f"beside its pages; {_advice(report)}"
        )
    parity = f", {report.parity_rows} of parity to a stripe" if report.parity_rows else ""
    as_stored = " as stored (it is a tenant's)" if report.locked else ""
    print(
        f"context {name}: {report.num_pages:,} pages, {bytes_words(report.payload_bytes)}{parity},"
        f" all whole{as_stored}, read in {report.elapsed_s:.1f} s"
    )
    if deep:
        manifest = folder.manifest(name)
        spec = _spec(manifest, ranks, transport, device, backend, threads, timeout)
        _verify_deep(folder, manifest, spec, local, sample, seed)


def _verify_deep(
    folder: StoreFolder, manifest: Manifest, spec: GangSpec, local: bool, sample: int, seed: int
) -> None:
    from ringspan.cluster.mending import deep_verify

    check_gang(spec, local)
    with open_gang(spec, local) as gang:
        report = deep_verify(gang, folder, manifest, sample, seed)
    for page in report.pages:
        layer = report.worst(page)
        print(
            f"page [{page.span.start}, {page.span.stop}): computed again, off by "
            f"{layer.error:.2e} in layer {layer.layer}, {layer.allowed:.2e} is explained"
            f"{'' if layer.good else ': WRONG'}"
        )
    if report.bad:
        raise CorruptPage(
            f"context {manifest.context_id}: {len(report.bad)} of {len(report.pages)} pages "
            "computed again are not what is stored; remove it (ringspan contexts rm) and prefill "
            "again"
        )
    print(f"{len(report.pages)} pages computed again agree, in {report.elapsed_s:.1f} s")


def repair(
    context: Context,
    store: Store = DEFAULT_STORE,
    tenant: Tenant = None,
    secret_file: SecretFile = DEFAULT_SECRET,
    parity: Parity = None,
    ranks: options.Ranks = None,
    transport: options.Transport = "auto",
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    threads: options.Threads = 0,
    local: options.Local = False,
    timeout: options.Timeout = 60.0,
) -> None:
    """Make a stored context whole in place: damaged pages come from another tier, from parity, or
    are computed again by a gang, which is started only then."""
    from ringspan.kvstore.parity import check_rows
    from ringspan.kvstore.repair import mend_parity

    if parity is not None:
        check_rows(parity)
    folder = _folder(store, namespaces(tenant, secret_file))
    name = folder.find(context)
    for file in _mend_index(folder, name):
        print(f"{file} was restored from its copy")
    manifest = folder.manifest(name)
    report = _audit(folder, name)
    _tell(report)
    if report.problems:
        raise CorruptPage(
            f"context {name}: {report.problems[0]}; nothing can be repaired without it: remove it "
            "(ringspan contexts rm) and prefill again"
        )
    spec = _spec(manifest, ranks, transport, device, backend, threads, timeout)
    mended = _mend(folder, manifest, report, spec)
    for road, pages in mended.roads.items():
        print(f"repaired {pages} pages by road {road}")
    manifest = mended.manifest
    if mended.lost:
        manifest = _recompute(folder, manifest, mended.lost, spec, local)
    stripes = mend_parity(folder, manifest, parity)
    if stripes:
        print(f"wrote parity of {stripes} stripes")
    again = _audit(folder, name)
    if not again.ok:
        _tell(again)
        raise CorruptPage(f"context {name} is not whole after its repair")
    what = "is whole again" if not report.ok else "is whole"
    print(f"context {name} {what}: {again.num_pages:,} pages, {bytes_words(again.payload_bytes)}")


def _mend_index(folder: StoreFolder, name: str) -> tuple[str, ...]:
    from ringspan.kvstore.index_copy import mend_index
    from ringspan.kvstore.parity import mend_parity_rows
    from ringspan.kvstore.tiers.placement import mend_placement

    at = folder.root / "contexts" / name
    try:
        mended = mend_index(at, folder.namespaces or ())
        return (*mended, *mend_placement(at), *mend_parity_rows(at))
    except StoreError as error:
        raise CorruptPage(
            f"{error}, and neither is its copy; nothing can be repaired without it: remove it "
            "(ringspan contexts rm) and prefill again"
        ) from None


def _mend(folder: StoreFolder, manifest: Manifest, report: VerifyReport, spec: GangSpec) -> Mended:
    from ringspan.kvstore.repair import choose_roads, mend_stored
    from ringspan.kvstore.repair_plan import explain

    damaged = {page.key for page in report.bad_pages}
    tiers = {key: [p.tier for p in report.bad_pages if p.key == key] for key in damaged}
    records = [record for record in manifest.pages if record.key in damaged]
    if not records:
        return mend_stored(folder, manifest, ())
    choices, roads = choose_roads(folder, manifest, report, *_computing(spec))
    print(explain(choices))
    return mend_stored(folder, manifest, records, roads=roads, tiers=tiers)


def _computing(spec: GangSpec) -> tuple[Callable[[Span], float], float | None]:
    """FLOP of computing a range again, and how many a second the gang does, where that was measured
    on this machine before; nothing is loaded or measured for it."""
    from ringspan.attention.models.facts import prefill_flops
    from ringspan.cluster.device import device_named
    from ringspan.cluster.speeds import cached_speeds, speeds_key

    try:
        facts = check_model(spec)
    except (RingspanError, OSError):  # it may not be here: that matters when it must compute
        return lambda span: 0.0, None
    speeds = cached_speeds(speeds_key(device_named(spec.device), facts, spec.backend))

    def flops(span: Span) -> float:
        return prefill_flops(facts, span.tokens, span.start)

    return flops, spec.world_size * speeds.gemm_flops_per_s if speeds is not None else None


def _recompute(
    folder: StoreFolder,
    manifest: Manifest,
    lost: Sequence[PageRecord],
    spec: GangSpec,
    local: bool,
) -> Manifest:
    from ringspan.cluster.mending import recompute_lost

    check_gang(spec, local)
    print(f"computing {len(lost)} pages again on {spec.world_size} ranks")
    with open_gang(spec, local) as gang:
        done = recompute_lost(gang, folder, manifest)
    print(f"computed {len(done.spans)} pages again in {done.elapsed_s:.1f} s")
    if done.parity_stripes:
        print(f"wrote parity of {done.parity_stripes} stripes")
    return done.manifest


def _spec(
    manifest: Manifest,
    ranks: int | None,
    transport: str,
    device: str,
    backend: str,
    threads: int,
    timeout_s: float,
) -> GangSpec:
    """A gang that runs the context's own model."""
    return options.gang_spec(
        msgspec.structs.replace(manifest.model, dtype=manifest.form.dtype),
        ranks=ranks,
        transport=transport,
        device=device,
        backend=backend,
        threads=threads,
        timeout_s=timeout_s,
    )


def _tell(report: VerifyReport) -> None:
    pages = (page.what for page in report.bad_pages)
    found = (*report.problems, *report.side_problems, *report.bad_parity, *pages)
    for problem in dict.fromkeys(found):
        print(problem)


def _advice(report: VerifyReport) -> str:
    if report.problems:
        return "remove it (ringspan contexts rm) and prefill again"
    return f"repair it (ringspan contexts repair {report.context_id})"


def _audit(folder: StoreFolder, name: str) -> VerifyReport:
    from ringspan.kvstore.audit import verify as audit

    with _pages_meter() as progress:
        at = folder.root / "contexts" / name
        return audit(at, progress, namespaces=folder.namespaces or ())


@contextlib.contextmanager
def _pages_meter() -> Iterator[Progress]:
    """How many pages there are is known with the first."""
    with contextlib.ExitStack() as phases:
        meters: list[Meter] = []

        def progress(done: int, pages: int) -> None:
            if not meters:
                meters.append(phases.enter_context(meter("verify", pages, "pages")))
            meters[0].update(done)

        yield progress


def _folder(store: Store, namespaces: tuple[bytes, ...] | None) -> StoreFolder:
    """BadInput if there is none: reading must not make one."""
    from ringspan.kvstore.folder import Store as StoreFolder

    if not store.is_dir():
        raise BadInput(
            f"--store {store}: no such folder; prefill something first, or name another store"
        )
    return StoreFolder(store, namespaces)
