"""`ringspan prefill`: a document through the model once, its KV into the store.

Everything that can be refused without a model or a Ray is refused first; the context appears in
the store when all of it is there, or not at all. stdout has the context's id alone.
"""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import msgspec
import typer

from ringspan.attention.models.facts import prefill_flops
from ringspan.cluster.messages import Findings, GangSpec, ModelSpec, PrefillPlan
from ringspan.deploy.checks import (
    check_gang,
    check_kept,
    check_model,
    check_plan_names,
    check_scheme,
    check_size,
    check_store_folder,
)
from ringspan.deploy.commands import options
from ringspan.deploy.gangs import open_gang
from ringspan.deploy.inputs import gather
from ringspan.deploy.progress import bytes_words, meter
from ringspan.deploy.record import Prefilled, RunRecord, prefilled, recording
from ringspan.deploy.tokenise import Prepared, describe_sources, prepare
from ringspan.deploy.watching import check_files, watching
from ringspan.errors import BadInput

if TYPE_CHECKING:  # torch takes seconds to import: only a run that passed its checks does
    from ringspan.cluster.events import PauseEvent, PrefillProgress
    from ringspan.cluster.planner import PrefillOptions
    from ringspan.cluster.stored import Description
    from ringspan.kvstore.folder import Store

Input = Annotated[
    list[str],
    typer.Option(
        "--input", "-i", help="Files, folders, a .npy of token ids, or - for stdin; several may be."
    ),
]
Pattern = Annotated[
    list[str] | None,
    typer.Option("--pattern", help="Of a folder's files take those that match (repeatable)."),
]
LimitTokens = Annotated[
    int | None, typer.Option("--limit-tokens", help="Take only the document's first N tokens.")
]
Again = Annotated[
    bool, typer.Option("--again", help="Prefill even if the store has this context; replaces it.")
]
NoReuse = Annotated[
    bool,
    typer.Option(
        "--no-reuse",
        help="Compute every token, even those that a context of the store begins with too.",
    ),
]
Plain = Annotated[
    bool, typer.Option("--plain", help="The text as it is, without the model's chat template.")
]
Deterministic = Annotated[
    bool,
    typer.Option(
        "--deterministic", help="One merge order, so that a run repeats bit for bit; more memory."
    ),
]
AuditRows = Annotated[
    int,
    typer.Option(
        "--audit-rows",
        help="Rows of each rank computed again in fp32, at one layer of every chunk; 0: none.",
    ),
]
Measure = Annotated[
    bool | None,
    typer.Option(
        "--measure/--no-measure",
        help="Measure speeds at the start (seconds, once a machine) and plan by them; GPUs do.",
    ),
]
Parity = Annotated[
    int,
    typer.Option(
        "--parity",
        help="Pages of parity to a stripe of pages, one of each rank: lost pages come back from "
        "the others; 0, 1 or 2.",
    ),
]
Trace = Annotated[
    Path | None,
    typer.Option("--trace", help="Write what each rank did as a trace for Perfetto."),
]
MetricsFile = Annotated[
    Path | None, typer.Option("--metrics", help="Write Prometheus metrics to this file.")
]
Decisions = Annotated[
    Path | None,
    typer.Option("--decisions", help="Append what was decided to this file, a JSON line each."),
]
Title = Annotated[str, typer.Option("--title", help="What `contexts list` calls it.")]


def prefill(
    model: options.Model,
    input_: Input,
    pattern: Pattern = None,
    ranks: options.Ranks = None,
    transport: options.Transport = "auto",
    device: options.Device = "auto",
    scheme: options.Scheme = "auto",
    layout: options.Layout = "auto",
    codec: options.Codec = "raw",
    chunk_tokens: options.ChunkTokens = None,
    rope_scaling: options.RopeScaling = None,
    dtype: options.Dtype = "auto",
    backend: options.Backend = "auto",
    threads: options.Threads = 0,
    seed: options.Seed = 0,
    store: options.Store = options.DEFAULT_STORE,
    quota: options.Quota = None,
    tenant: options.Tenant = None,
    secret_file: options.SecretFile = options.DEFAULT_SECRET,
    encrypt: options.Encrypt = False,
    limit_tokens: LimitTokens = None,
    again: Again = False,
    no_reuse: NoReuse = False,
    plain: Plain = False,
    deterministic: Deterministic = False,
    audit_rows: AuditRows = 4,
    fidelity: options.Fidelity = "",
    measure: Measure = None,
    parity: Parity = 0,
    title: Title = "",
    trace: Trace = None,
    metrics: MetricsFile = None,
    decisions: Decisions = None,
    local: options.Local = False,
    timeout: options.Timeout = 60.0,
    json: options.Json = None,
) -> None:
    """Prefill a document and keep its KV; prints the context's id."""
    asked = options.as_asked(locals())
    spec = options.gang_spec(
        ModelSpec(name=model, dtype=dtype, rope_scaling=rope_scaling, seed=seed),
        ranks=ranks,
        transport=transport,
        device=device,
        backend=backend,
        threads=threads,
        timeout_s=timeout,
        measure=measure,
    )
    with recording(json, asked) as record:
        with record.phase("read"):
            _check_numbers(limit_tokens, chunk_tokens, audit_rows, parity)
            quota_bytes = options.quota_bytes(quota)
            check_store_folder(store)
            check_files(trace, metrics, decisions)
            namespace = options.new_namespace(tenant, secret_file, encrypt)
            inputs = gather(input_, pattern or [])
        _say(f"read {inputs.describe()}")
        with record.phase("tokenise"):
            check_plan_names(codec, scheme, layout, fidelity)
            check_gang(spec, local)
            facts = check_model(spec)
            check_kept(codec, facts, fidelity)
            check_scheme(scheme, facts, spec.world_size)
            prepared = prepare(
                inputs, input_, spec.model, facts, plain=plain, limit_tokens=limit_tokens
            )
            check_size(facts, len(prepared.token_ids), chunk_tokens)
        _say(f"{len(prepared.token_ids):,} tokens for {model} ({facts.family})")
        from ringspan.cluster.planner import PrefillOptions
        from ringspan.cluster.stored import Description
        from ringspan.kvstore.folder import Store

        _run(
            record,
            spec,
            prepared,
            wanted=PrefillOptions(
                layout=layout,
                scheme=scheme,
                codec=codec,
                chunk_tokens=chunk_tokens,
                deterministic=deterministic,
                audit_rows=audit_rows,
                parity=parity,
                lowest_fidelity=fidelity,
            ),
            description=Description(
                title=title,
                sources=describe_sources(input_),
                chat=prepared.chat,
                document=prepared.document,
            ),
            store=Store(store, (namespace,), quota_bytes),
            namespace=namespace,
            again=again,
            reuse=not no_reuse,
            local=local,
            files=(trace, metrics, decisions),
        )
        whose = f" --tenant {tenant}" if tenant is not None else ""
        _say(f'ask it: ringspan ask {record.context_id} --store {store}{whose} "..."')
        print(record.context_id)


def _run(
    record: RunRecord,
    spec: GangSpec,
    prepared: Prepared,
    *,
    wanted: PrefillOptions,
    description: Description,
    store: Store,
    namespace: bytes,
    again: bool,
    reuse: bool,
    local: bool,
    files: tuple[Path | None, Path | None, Path | None],
) -> None:
    """Gang, prefill, save; figures into the record. files: of trace, metrics and decisions."""
    from ringspan.cluster.controller import Controller
    from ringspan.cluster.planner import explain

    with contextlib.ExitStack() as stack:
        with record.phase("start"):
            gang = stack.enter_context(open_gang(spec, local))
        record.ranks = gang.ready
        controller = Controller(gang, store, namespace=namespace)
        plan = controller.plan(prepared.token_ids, wanted)
        for line in explain(plan, controller.facts, gang.ready).splitlines():
            _say(line)
        trace, metrics, decisions = files
        watch = stack.enter_context(
            watching(
                record,
                gang.ready,
                plan,
                local=local,
                trace=trace,
                metrics=metrics,
                decisions=decisions,
            )
        )
        with meter(
            "prefill",
            plan.num_tokens,
            work=lambda tokens: prefill_flops(controller.facts, tokens),
        ) as progress:

            def on_event(event: PrefillProgress) -> None:
                watch.on_event(event)
                progress.update(event.tokens_done, f"KV {bytes_words(event.kv_bytes)}")

            def on_pause(event: PauseEvent) -> None:
                watch.on_pause(event)
                _say_pause(event)

            done = controller.prefill(
                prepared.token_ids,
                wanted,
                description=description,
                on_event=on_event,
                on_pause=on_pause,
                again=again,
                reuse=reuse,
            )
        watch.ended(done)
    record.context_id = done.context_id
    record.plan = msgspec.structs.replace(done.plan, namespace="")  # never in a file
    if done.reused:
        _say(f"the store has context {done.context_id} already; --again prefills it anew")
        return
    _say_reused(done.plan)
    record.add_phase("plan", done.timings.plan_s)
    record.add_phase("prefill", done.timings.prefill_s)
    record.add_phase("save", done.timings.save_s)
    record.prefill = prefilled(done, record.ranks)
    _say(
        f"prefilled {done.plan.num_tokens:,} tokens in {done.timings.prefill_s:.1f} s"
        f" ({record.prefill.tokens_per_s:,.0f} tokens/s,"
        f" {record.prefill.tflops_per_device:.3g} TFLOP/s a device);"
        f" saved {bytes_words(done.kv_bytes)} in {done.timings.save_s:.1f} s"
    )
    _say_findings(done.findings)
    _say_prediction(record.prefill)


def _say_findings(done: Findings) -> None:
    audited = (
        f"; {done.audited_rows} rows computed again in fp32: off by {done.audit_error:.1e}"
        if done.audited_rows
        else ""
    )
    _say(f"every row saw its keys, {done.seen_keys:.4g} counted over heads and layers{audited}")
    if any(done.exposed_s[1:]):  # step 0 waits for nothing but the proof's own exchanges
        steps = ", ".join(f"{seconds:.3g}" for seconds in done.exposed_s[1:])
        _say(f"stood still for exchanges, by step of the scheme: {steps} s")


def _say_prediction(done: Prefilled) -> None:
    if done.ratio is not None:
        _say(
            f"predicted {done.predicted_s:.4g} s, took {done.elapsed_s:.4g} s"
            f" (ratio {done.ratio:.3f})"
        )


def _say_pause(event: PauseEvent) -> None:
    from ringspan.cluster.events import PrefillPaused

    if isinstance(event, PrefillPaused):
        _say(f"paused: {event.reason}; replacing what is lost")
        return
    ranks = ", ".join(str(rank) for rank in event.replaced) or "none"
    _say(
        f"goes on at chunk {event.chunk_index} of {event.num_chunks} after {event.pause_s:.1f} s"
        f" ({event.load_s:.1f} s of it to load the model; ranks replaced: {ranks};"
        f" {event.restored_pages:,} pages read, {event.recomputed_tokens:,} tokens computed again)"
    )


def _say_reused(plan: PrefillPlan) -> None:
    if plan.reused_tokens:
        _say(
            f"took over the first {plan.reused_tokens:,} tokens of context {plan.prefix_id};"
            f" computed {plan.num_tokens - plan.reused_tokens:,}"
        )
    if plan.not_reused:
        _say(f"computed what a stored context begins with too: {plan.not_reused}")


def _check_numbers(
    limit_tokens: int | None, chunk_tokens: int | None, audit_rows: int, parity: int
) -> None:
    if not 0 <= parity <= 2:
        raise BadInput(f"--parity {parity}: wanted 0, 1 or 2 pages of parity to a stripe")
    if audit_rows < 0:
        raise BadInput(f"--audit-rows {audit_rows}: wanted rows of each rank, or 0 for none")
    if limit_tokens is not None and limit_tokens < 1:
        raise BadInput(f"--limit-tokens {limit_tokens}: wanted at least 1")
    if chunk_tokens is not None and chunk_tokens < 1:
        raise BadInput(f"--chunk-tokens {chunk_tokens}: wanted a multiple of a page (128 tokens)")


def _say(text: str) -> None:
    """For the person, not for a pipe."""
    print(text, file=sys.stderr, flush=True)
