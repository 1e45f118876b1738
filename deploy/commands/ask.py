"""`ringspan ask`: questions on a stored context, answered token by token.

Model, dtype and rope scaling are the context's own. Each question begins a session of its own on
the context; with --chat they go on from one another. Several given at once are answered together,
each token of all of them in one sweep of the context, and printed in their order.
"""

from __future__ import annotations

import contextlib
import sys
from typing import TYPE_CHECKING, Annotated, NamedTuple

import msgspec
import typer

from ringspan.deploy.answers import Spoken, Voice, in_order, pace, voice_for
from ringspan.deploy.checks import check_gang
from ringspan.deploy.commands import options
from ringspan.deploy.commands.contexts import existing
from ringspan.deploy.gangs import open_gang
from ringspan.deploy.questions import check_given, questions
from ringspan.deploy.record import Answered, recording
from ringspan.errors import BadInput

if TYPE_CHECKING:
    from ringspan.cluster.controller import Controller
    from ringspan.cluster.session import ContextHandle

Context = Annotated[str, typer.Argument(help="A context's id, or the beginning of it.")]
Questions = Annotated[
    list[str] | None, typer.Argument(help="Questions; without any they are read from stdin.")
]
InCodec = Annotated[
    str | None,
    typer.Option("--codec", help="Hold the context in this codec; default: as it is stored."),
]
MaxTokens = Annotated[int, typer.Option("--max-tokens", help="Of one answer.")]
Temperature = Annotated[float, typer.Option("--temperature", help="0 takes the likeliest token.")]
TopP = Annotated[float, typer.Option("--top-p", help="Sample within this share of probability.")]
SamplingSeed = Annotated[int | None, typer.Option("--seed", help="Of sampling; default: any.")]
Chat = Annotated[bool, typer.Option("--chat", help="Each question goes on from the last answer.")]
Together = Annotated[
    bool,
    typer.Option(
        "--together/--one-by-one",
        help="Several given questions share each sweep of the context, or wait for one another.",
    ),
]


def ask(
    context: Context,
    question: Questions = None,
    store: options.Store = options.DEFAULT_STORE,
    tenant: options.Tenant = None,
    secret_file: options.SecretFile = options.DEFAULT_SECRET,
    ranks: options.Ranks = None,
    codec: InCodec = None,
    max_tokens: MaxTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: SamplingSeed = None,
    chat: Chat = False,
    together: Together = True,
    transport: options.Transport = "auto",
    device: options.Device = "auto",
    backend: options.Backend = "auto",
    threads: options.Threads = 0,
    local: options.Local = False,
    fidelity: options.Fidelity = "",
    timeout: options.Timeout = 60.0,
    json: options.Json = None,
) -> None:
    """Ask a stored context; answers stream to stdout."""
    asked = options.as_asked(locals())
    given = question or []
    with recording(json, asked) as record, contextlib.ExitStack() as stack:
        _check_sampling(max_tokens, temperature, top_p)
        check_given(given)
        existing(store)
        from ringspan.cluster.controller import Controller
        from ringspan.kvstore.fidelity import check_fidelity
        from ringspan.kvstore.folder import Store

        folder = Store(existing(store), options.namespaces(tenant, secret_file))
        manifest = folder.manifest(context)
        record.context_id = manifest.context_id
        if fidelity:
            context = f"context {manifest.context_id}"
            check_fidelity(context, manifest.form, manifest.origin, fidelity)
        spec = options.gang_spec(
            msgspec.structs.replace(manifest.model, dtype=manifest.form.dtype),
            ranks=ranks,
            transport=transport,
            device=device,
            backend=backend,
            threads=threads,
            timeout_s=timeout,
        )
        check_gang(spec, local)
        voice = voice_for(manifest)
        for text in given:
            voice.first(text)  # whatever cannot be asked is refused before anything is started
        with record.phase("start"):
            gang = stack.enter_context(open_gang(spec, local))
        record.ranks = gang.ready
        controller = Controller(gang, folder, namespace=bytes.fromhex(manifest.namespace))
        with record.phase("open"):
            handle = controller.open(manifest.context_id, fidelity, codec or "")
        _say(f"opened context {handle.context_id} in {record.phases[-1].elapsed_s:.1f} s")
        _say_roads(handle)
        sampling = Sampling(max_tokens, temperature, top_p, seed)
        if together and not chat and len(given) > 1:
            record.answers += _together(controller, voice, given, handle.context_id, sampling)
            return
        session = None
        for number, text in enumerate(questions(given)):
            ids = voice.following(text) if session else voice.first(text)
            session = session or controller.begin_session(handle.context_id)
            if len(given) > 1 or (not given and not sys.stdin.isatty()):
                print(f"{chr(10) if number else ''}> {text}", flush=True)
            record.answers.append(
                _answer(controller, voice, text, ids, session, handle.context_id, sampling)
            )
            if not chat:
                controller.end_session(session)
                session = None


def _say_roads(handle: ContextHandle) -> None:
    """What became of pages that were not whole where they lie; for the person, not for a pipe."""
    repaired = sum(handle.pages.get("repaired", {}).values())
    if not repaired and not handle.recomputed:
        return
    counts = "; ".join(
        f"{kind} {', '.join(f'{pages} by {road}' for road, pages in roads.items())}"
        for kind, roads in handle.pages.items()
    )
    _say(
        f"context {handle.context_id} had damaged pages: {counts}; {handle.recomputed} computed "
        f"again before it was opened"
        + (f"; mend it in place: ringspan contexts repair {handle.context_id}" if repaired else "")
    )


def _say(line: str) -> None:
    print(line, file=sys.stderr, flush=True)


class Sampling(NamedTuple):
    """Of every answer; see `Controller.ask`."""

    max_tokens: int
    temperature: float
    top_p: float
    seed: int | None


def _answer(
    controller: Controller,
    voice: Voice,
    question: str,
    ids: tuple[int, ...],
    session: str,
    context_id: str,
    sampling: Sampling,
) -> Answered:
    """Prints the answer as it comes."""
    spoken = Spoken(voice, question, ids)
    for token in controller.ask(
        session, context_id, ids, **sampling._asdict(), stop_ids=voice.stop_ids
    ):
        print(spoken.push(token), end="", flush=True)
    print(flush=True)
    answered = spoken.answered()
    _say(pace([answered]))
    return answered


def _together(
    controller: Controller, voice: Voice, given: list[str], context_id: str, sampling: Sampling
) -> list[Answered]:
    """Prints the answers in the order of their questions, each as soon and as far as it came."""
    from ringspan.cluster.batched import Question

    asked, answers = [], {}
    for text in given:
        ids, session = voice.first(text), controller.begin_session(context_id)
        asked.append(
            Question(session, context_id, ids, **sampling._asdict(), stop_ids=voice.stop_ids)
        )
        answers[session] = Spoken(voice, text, ids)
    for piece in in_order(answers, controller.ask_many(asked)):
        print(piece, end="", flush=True)
    for session in answers:
        controller.end_session(session)
    answered = [spoken.answered() for spoken in answers.values()]
    _say(pace(answered))
    return answered


def _check_sampling(max_tokens: int, temperature: float, top_p: float) -> None:
    if max_tokens < 1:
        raise BadInput(f"--max-tokens {max_tokens}: wanted at least 1")
    if temperature < 0:
        raise BadInput(f"--temperature {temperature:g}: wanted 0 (the likeliest token) or more")
    if not 0 < top_p <= 1:
        raise BadInput(f"--top-p {top_p:g}: wanted more than 0, at most 1")
