"""What runs in a case of `bench attention` on one rank: our engine, or torch's context_parallel.

Both hold this rank's rows and keys, are audited on them before any time is taken, and are then run
again and again. The engine counts every key of every run, the timed ones too (attention/ledger.py).
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Protocol

import torch

from ringspan.attention.audit import Audit, AuditResult
from ringspan.attention.buffers import Buffers
from ringspan.attention.compute import Compute, Rules
from ringspan.attention.layer import Layer
from ringspan.attention.layout import positions
from ringspan.attention.ledger import Ledger
from ringspan.attention.schemes.table import scheme_named
from ringspan.attention.transport import Transport
from ringspan.deploy.bench.case import TORCH_SCHEMES, AttentionCase
from ringspan.deploy.bench.single_kernel import Whole
from ringspan.deploy.bench.timing import Agree, seconds_of
from ringspan.errors import RingspanError
from ringspan.types import Part


class Unavailable(RingspanError):
    """What a case is to be compared with cannot run here."""


AUDIT_ROWS = 8
"""Of each rank, compared with fp32 over all keys."""


class Contestant(Protocol):
    note: str
    """What a reader of the figures must know."""
    sent_bytes: int
    """By this rank in one run; 0 where it is not known."""

    def audit(self) -> AuditResult:
        """One run, some of its rows against fp32. All ranks call it. Raises WrongAttention on a
        rank whose rows are wrong."""

    def run(self, calls: int) -> None: ...

    def prove(self) -> int:
        """Keys that this rank's rows saw in one run, counted in all runs so far; 0 where nobody
        counts. All ranks call it. Raises WrongAttention."""


class Engine:
    """One of our schemes over one layer."""

    note = ""

    def __init__(self, case: AttentionCase, rank: int, transport: Transport, whole: Whole) -> None:
        self._ledger = Ledger(case.problem().windowed(case.window)[0])
        self._layer = layer_of(case, rank, transport, whole, self._ledger)
        self._scheme = scheme_named(case.scheme)
        self.rank, self.transport = rank, transport
        self._runs = self.sent_bytes = 0

    def audit(self) -> AuditResult:
        sent = self._layer.transport.sent_bytes
        part = self._once()
        self.sent_bytes = self._layer.transport.sent_bytes - sent
        return _audited(self._layer, part)

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self._once()

    def prove(self) -> int:
        heads = self._layer.q.shape[1]
        seen = self._ledger.check(self._layer.transport, self._layer.q.device)
        return seen // (heads * max(1, self._runs))

    def _once(self) -> Part:
        self._ledger.layer(self._layer.rules.window, self._layer.q.shape[1])
        self._runs += 1
        return self._scheme(self._layer)


class TorchContextParallel:
    """torch's context_parallel around scaled_dot_product_attention, at its best on this machine.

    It may be given the K and V heads as they are or repeated for every q head, and cuDNN's or
    flash's kernel. What runs and passes the audit is timed, and the fastest is kept.
    """

    sent_bytes = 0

    def __init__(
        self, case: AttentionCase, rank: int, transport: Transport, whole: Whole, agree: Agree
    ) -> None:
        self._layer = layer_of(case, rank, transport, whole)  # its rows, for the audit
        self._q, self._k, self._v = (
            # a copy of its own: context_parallel cuts it to this rank's part in place
            tensor.transpose(0, 1)[None].clone(memory_format=torch.contiguous_format)
            for tensor in whole
        )
        self._repeats = case.num_q_heads // case.num_kv_heads
        self._repeated: tuple[torch.Tensor, torch.Tensor] | None = None
        self._agree = agree
        self._kernel: object = None
        self._as_they_are = True
        self.note = ""

    def choose(self) -> None:
        """Tries what can be tried. Raises Unavailable if nothing runs and is right."""
        from torch.nn.attention import SDPBackend

        took: dict[tuple[bool, str], float] = {}
        failures = []
        device = self._layer.q.device
        for as_they_are in (True, False) if self._repeats > 1 else (True,):
            for name in ("CUDNN_ATTENTION", "FLASH_ATTENTION"):
                self._use(as_they_are, getattr(SDPBackend, name))
                error = self._try()
                # a failure of one rank is a failure of all
                if self._agree(float(error is not None)):
                    failures.append(f"{name}: {error or 'failed on another rank'}")
                    continue
                took[as_they_are, name] = self._agree(seconds_of(self.run, 3, device))
            if took:
                break  # repeated heads are for where the others are refused
        if not took:
            raise Unavailable(f"torch's context_parallel: {'; '.join(failures)}")
        as_they_are, name = min(took, key=took.__getitem__)
        self._use(as_they_are, getattr(SDPBackend, name))
        self.note = name.lower() + ("" if as_they_are else ", K and V repeated for every q head")

    def audit(self) -> AuditResult:
        return _audited(self._layer, Part(self._attend()[0].transpose(0, 1), self._no_lse()))

    def run(self, calls: int) -> None:
        for _ in range(calls):
            self._attend()

    def prove(self) -> int:
        return 0

    @contextlib.contextmanager
    def entered(self, rotation: str) -> Iterator[None]:
        """Within it torch's attention is context-parallel, in the whole process."""
        import torch.distributed.tensor.experimental as experimental
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.tensor.experimental._attention import set_rotate_method

        set_rotate_method(rotation)
        mesh = init_device_mesh(self._q.device.type, (self._layer.world_size,))
        buffers = [self._q, self._k, self._v]
        with experimental.context_parallel(
            mesh, buffers=buffers, buffer_seq_dims=[2, 2, 2], no_restore_buffers=set(buffers)
        ):
            yield

    def _use(self, as_they_are: bool, kernel: object) -> None:
        self._as_they_are, self._kernel = as_they_are, kernel
        if not as_they_are and self._repeated is None:
            k, v = (t.repeat_interleave(self._repeats, 1) for t in (self._k, self._v))
            self._repeated = k, v

    def _try(self) -> str | None:
        try:
            self._attend()
            self.audit()
        except Exception as error:  # of torch's prototype: any type
            return str(error).strip().partition("\n")[0] or type(error).__name__
        return None

    def _attend(self) -> torch.Tensor:
        """This rank's rows, [1, Hq, T / P, D]."""
        from torch.nn.attention import sdpa_kernel

        k, v = self._k, self._v
        if not self._as_they_are and self._repeated is not None:
            k, v = self._repeated
        with sdpa_kernel(self._kernel):
            return torch.nn.functional.scaled_dot_product_attention(
                self._q, k, v, is_causal=True, enable_gqa=self._as_they_are and self._repeats > 1
            )

    def _no_lse(self) -> torch.Tensor:
        return self._q.new_empty(0, dtype=torch.float32)


@contextlib.contextmanager
def contestant(
    case: AttentionCase, rank: int, transport: Transport, whole: Whole, agree: Agree
) -> Iterator[Contestant]:
    """The case's scheme on this rank, ready to run while it is entered."""
    if case.scheme not in TORCH_SCHEMES:
        yield Engine(case, rank, transport, whole)
        return
    theirs = TorchContextParallel(case, rank, transport, whole, agree)
    with theirs.entered(TORCH_SCHEMES[case.scheme]):
        theirs.choose()
        yield theirs


def layer_of(
    case: AttentionCase,
    rank: int,
    transport: Transport,
    whole: Whole,
    ledger: Ledger | None = None,
) -> Layer:
    """This rank's rows and keys, copied out of the whole sequence."""
    everything = case.problem()
    problem, firsts = everything.windowed(case.window)
    device = whole.q.device
    at = positions(case.dealt()[rank], device)
    keys = positions(everything.sources[0].held[rank], device)[firsts[0][rank] :]
    rules = Rules(layer=0, scale=case.head_dim**-0.5, window=case.window)
    return Layer(
        transport=transport,
        buffers=Buffers(device),
        compute=Compute(case.backend, alternate=case.ranks > 1),
        problem=problem,
        rules=rules,
        q=whole.q[at - case.cached],
        own=(whole.k[keys], whole.v[keys]),
        kv_shape=(case.num_kv_heads, case.head_dim),
        ledger=ledger,
    )


def _audited(layer: Layer, part: Part) -> AuditResult:
    audit = Audit(frozenset((layer.rules.layer,)), seed=1, rows=AUDIT_ROWS)
    audit.check(layer, part)
    return audit.result()
