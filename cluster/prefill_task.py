"""One prefill, carried through on a gang whose ranks may be lost on the way.

    beginning -> chunks -> saving -> published
        ^          ^  |      |
        |          |  v      v
        +------- mending: replace ranks, find the last chunk that every rank has, go back to it

A chunk is sealed when every rank's pages of it lie in the staging folder: then it need not be
computed again, whoever dies. Without a store nothing outlives a rank, and all begins anew.

A journal in that folder lets another controller go on when this one's process is killed.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import msgspec
import numpy as np

from ringspan.cluster.events import (
    Cancelled,
    PrefillDone,
    PrefillPaused,
    PrefillResumed,
    PrefillTimings,
)
from ringspan.cluster.gang import Gang, Mended, Pending
from ringspan.cluster.known import Known
from ringspan.cluster.messages import (
    ChunkDone,
    PrefillBegun,
    PrefillPlan,
    PrefillStands,
    ShardSaved,
)
from ringspan.cluster.pace import Pace
from ringspan.cluster.planner import PrefillOptions
from ringspan.cluster.prefill_journal import LeftBehind, PrefillJournal, claim, opening_of
from ringspan.cluster.prefill_run import PrefillRun
from ringspan.cluster.session import Prefix
from ringspan.cluster.stored import manifest_of
from ringspan.cluster.wishes import Wishes
from ringspan.errors import BadInput, CorruptPage, RankLost, StoreError, TooLarge
from ringspan.kvstore.encryption import cipher_of
from ringspan.kvstore.folder import Store
from ringspan.kvstore.manifest import Manifest
from ringspan.kvstore.parity import SUFFIX, write_parity_rows

BEGIN_TIMEOUT_S = 120.0
"""For ranks to take memory for a shard."""
DISK_TIMEOUT_S = 3600.0
"""For ranks to write or read their pages."""
MEND_TIMEOUT_S = 600.0
"""For new ranks to find a place and load the weights, and for all to join."""
CHUNKS_AHEAD = 2
"""Chunks submitted at once: the next one waits at the ranks when one is done."""
MOST_FAULTS = 2
"""Ranks lost one after the other with no chunk done in between: then it is the work that kills
them, and the last error is told."""


class PrefillTask:
    """`run` it once.

    asked: what the plan was made from. left: a dead controller's prefill of the same, to go on with
    if it is there still. forget: gives up what the gang holds of the context, whatever state it is
    in. mended: told which ranks lost all they held, before the prefill goes on.
    """

    def __init__(
        self,
        gang: Gang,
        store: Store | None,
        known: Known,
        namespace: bytes,
        plan: PrefillPlan,
        token_ids: np.ndarray,
        wishes: Wishes,
        *,
        asked: PrefillOptions,
        left: LeftBehind | None = None,
        forget: Callable[[str], None],
        mended: Callable[[Mended], None],
    ) -> None:
        self.plan = plan
        """Says what was reused once it has begun."""
        self._gang, self._store, self._known = gang, store, known
        self._namespace, self._token_ids, self._wishes = namespace, token_ids, wishes
        self._asked, self._left = asked, left
        self._forget, self._mended = forget, mended
        self._begun: PrefillBegun | None = None
        self._staging = ""
        self._journal: PrefillJournal | None = None
        """Of the staging folder."""
        self._chunk = 0
        """That is to be done next."""
        self._submitted = 0
        self._faults = 0
        """Since the last chunk that was done."""
        self._resumed: list[PrefillResumed] = []

    def run(self, prefix: Prefix | None, began: float) -> PrefillDone:
        """Raises RankLost when the gang cannot be mended, or is lost time and again; Cancelled."""
        before = self._take_over(prefix)
        if before is None:
            self._begin(prefix)
        planned = time.perf_counter()
        run = PrefillRun(self.plan, Pace(self.plan, self._gang.ready[0].facts), planned)
        for chunk in before or ():
            run.add_before(chunk)
        if self._store is None:
            self._run_chunks(run)
            computed = time.perf_counter()
        else:
            with self._saving(self._store, run):
                self._run_chunks(run)
                computed = time.perf_counter()
                self._publish(self._store, run)
        run.resumed = tuple(self._resumed)
        timings = PrefillTimings(
            plan_s=planned - began,
            prefill_s=computed - run.began,
            save_s=time.perf_counter() - computed,
            chunk_s=run.chunk_s,
        )
        return run.finished(self._store is not None, timings)

    # taking over

    def _take_over(self, prefix: Prefix | None) -> Sequence[Sequence[ChunkDone]] | None:
        """Stand behind the last chunk that is whole of what a dead controller left; what was said
        of the chunks before. None where there is nothing, or nothing of it can be used."""
        left = self._left
        if left is None or not left.goes_with(prefix) or (folder := claim(left)) is None:
            return None
        noticed, given, store = time.perf_counter(), self.plan, self._store
        assert store is not None
        reason = f"the controller that began it (pid {left.pid}) ended"
        recorded = left.opening.plan
        self.plan = msgspec.structs.replace(recorded, namespace=given.namespace)
        self._begun, self._staging = left.opening.begun, folder
        self._chunk = len(left.chunks)
        begun_tokens = self._begun_tokens()
        try:
            self._pause(reason)
            restored, unusable = self._stand_on_left(self._chunk)
            if restored is None:
                reason += f", and what it left cannot be used: {unusable}"
                self._drop()
                store.abort(folder)
                self.plan, self._begun, self._staging, self._chunk = given, None, "", 0
            else:
                self._keep_journal(left.chunks[: self._chunk])
        except BaseException:
            self._forget(given.context_id)
            store.abort(folder)
            raise
        self._resume(
            reason,
            tuple(range(self._gang.world_size)),
            0.0,
            time.perf_counter() - noticed,
            recomputed_tokens=self._recomputed(begun_tokens),
            restored_pages=restored or 0,
        )
        return None if restored is None else left.chunks[: self._chunk]

    def _stand_on_left(self, most: int) -> tuple[int | None, str]:
        """How many pages were read to stand behind `most` chunks or fewer; or None, and why not."""
        dropped = False
        while True:
            try:
                if not dropped:  # what the gang may have of an earlier prefill lies in other files
                    self._drop()
                    dropped = True
                restored = self._stand_on_chunk(most)
            except RankLost as error:
                self._mend(error)
            except (CorruptPage, StoreError, BadInput, TooLarge) as error:
                return None, str(error)
            else:
                return restored, "it has no chunk that every rank has"

    def _drop(self) -> None:
        name = self.plan.context_id
        what = f"dropping context {name}"
        self._gang.call("drop", name, timeout_s=BEGIN_TIMEOUT_S, what=what)

    # beginning

    def _begin(self, prefix: Prefix | None) -> None:
        """Memory on the ranks, with the prefix's pages in it; the plan is then for what is left to
        compute. Pages that cannot be read, or are not what they should be, are computed too."""
        while True:
            try:
                self._begin_once(prefix)
            except RankLost as error:
                self._pause(str(error))
                mended = self._mend(error)
                self._resume(str(error), mended.replaced, mended.load_s, mended.elapsed_s)
                if prefix is not None and prefix.manifest is None:  # the lost rank held a part
                    why = f"context {prefix.plan.prefix_id} was lost with a rank"
                    prefix, self.plan = None, msgspec.structs.replace(self.plan, not_reused=why)
            except (CorruptPage, StoreError) as error:
                if prefix is None:
                    raise
                self.plan = msgspec.structs.replace(self.plan, not_reused=str(error))
                prefix = None
            else:
                return

    def _begin_once(self, prefix: Prefix | None) -> None:
        if prefix is None:
            self._begin_with(self.plan, "begin_prefill")
            return
        with self._known.prefix(
            prefix.plan.prefix_id, prefix.manifest is None or self._store is None
        ) as reading:
            if prefix.manifest is None or self._store is None:
                self._begin_with(prefix.plan, "begin_prefill_on_held")
            else:
                stored = (prefix.manifest, str(self._store.root))
                self._begin_with(prefix.plan, "begin_prefill_on_stored", *stored)
            reading.check()
        self.plan = prefix.plan

    def _begin_with(self, plan: PrefillPlan, method: str, *args: object) -> None:
        what = f"beginning context {plan.context_id}"
        if plan.prefix_id:
            what += f" on {plan.reused_tokens} tokens of context {plan.prefix_id}"
        timeout_s = DISK_TIMEOUT_S if method == "begin_prefill_on_stored" else BEGIN_TIMEOUT_S
        begun: list[PrefillBegun] = self._gang.call(
            method, plan, self._token_ids, *args, timeout_s=timeout_s, what=what
        )
        self._begun = begun[0]

    # chunks

    def _run_chunks(self, run: PrefillRun) -> None:
        while self._chunk < len(self.plan.chunks):
            try:
                self._run_chunks_once(run)
            except RankLost as error:
                self._go_on_after(error, run)

    def _run_chunks_once(self, run: PrefillRun) -> None:
        """Chunk after chunk, the next one submitted before the last one is waited for, unless
        others are to be let in between."""
        plan, num_chunks = self.plan, len(self.plan.chunks)
        interlude = self._wishes.interlude
        asked: deque[Pending] = deque()
        self._submitted = self._chunk
        while self._chunk < num_chunks:
            while self._submitted < num_chunks and len(asked) < CHUNKS_AHEAD:
                if interlude is not None and interlude.wanted():
                    if asked:
                        break
                    interlude.play()
                if self._wishes.cancelled():
                    raise Cancelled(
                        f"prefill of context {plan.context_id} was cancelled after {self._chunk} "
                        f"of {num_chunks} chunks; nothing of it was kept"
                    )
                span = plan.chunks[self._submitted]
                what = f"prefill chunk {self._submitted} [{span.start}, {span.stop})"
                asked.append(
                    self._gang.submit("prefill_chunk", plan.context_id, self._submitted, what=what)
                )
                self._submitted += 1
            done: list[ChunkDone] = asked.popleft().result(run.pace.timeout_s(self._chunk))
            self._chunk += 1
            self._faults = 0
            if self._journal is not None:
                self._journal.done(done)
            self._wishes.on_event(run.add(done))

    # faults

    def _mend(self, error: RankLost) -> Mended:
        """The gang has all its ranks again. Raises the error where that cannot be had."""
        while True:
            self._faults += 1
            if self._wishes.cancelled():
                raise Cancelled(
                    f"prefill of context {self.plan.context_id} was cancelled; nothing of it was "
                    f"kept ({error})"
                )
            if self._faults > MOST_FAULTS:
                raise error
            try:
                mended = self._gang.mend(MEND_TIMEOUT_S)
            except RankLost as why:
                if not self._gang.lost or self._faults >= MOST_FAULTS:
                    raise RankLost(f"{error}; the gang could not be mended: {why}") from error
            else:
                self._mended(mended)
                return mended

    def _go_on_after(self, error: RankLost, run: PrefillRun) -> None:
        """Every rank stands behind the same chunk again; no less than the last sealed one."""
        noticed, reason = time.perf_counter(), str(error)
        self._pause(str(error))
        replaced: set[int] = set()
        load_s = 0.0
        begun_tokens = self._begun_tokens()
        while True:
            mended = self._mend(error)
            replaced |= {*mended.replaced}
            load_s += mended.load_s
            try:
                restored = self._stand_together()
            except RankLost as another:
                error = another
            else:
                break
        run.go_back(self._chunk)
        self._resume(
            reason,
            tuple(sorted(replaced)),
            load_s,
            time.perf_counter() - noticed,
            recomputed_tokens=self._recomputed(begun_tokens),
            restored_pages=restored,
        )

    def _pause(self, reason: str) -> None:
        paused = PrefillPaused(
            context_id=self.plan.context_id,
            chunk_index=self._chunk,
            num_chunks=len(self.plan.chunks),
            reason=reason,
        )
        self._wishes.on_pause(paused)

    def _resume(
        self,
        reason: str,
        replaced: tuple[int, ...],
        load_s: float,
        pause_s: float,
        *,
        recomputed_tokens: int = 0,
        restored_pages: int = 0,
    ) -> None:
        resumed = PrefillResumed(
            context_id=self.plan.context_id,
            chunk_index=self._chunk,
            num_chunks=len(self.plan.chunks),
            reason=reason,
            replaced=replaced,
            recomputed_tokens=recomputed_tokens,
            restored_pages=restored_pages,
            load_s=load_s,
            pause_s=pause_s,
        )
        self._resumed.append(resumed)
        self._wishes.on_pause(resumed)

    def _begun_tokens(self) -> int:
        """Up to the end of the chunk that was under way, or of the last one."""
        chunks = self.plan.chunks
        return chunks[min(self._chunk, len(chunks) - 1)].stop

    def _recomputed(self, begun_tokens: int) -> int:
        behind = (0, *(chunk.stop for chunk in self.plan.chunks))[self._chunk]
        return max(0, begun_tokens - max(behind, self.plan.reused_tokens))

    def _stand_together(self) -> int:
        """Behind the last chunk that every rank has; how many pages were read for it."""
        restored = self._stand_on_chunk(len(self.plan.chunks))
        if restored is None:
            self._begin_anew()
        return restored or 0

    def _stand_on_chunk(self, most: int) -> int | None:
        """As `_stand_together`, behind `most` chunks or fewer; None where not even the prefix is
        there, or a page of it is damaged."""
        plan, begun, staging = self.plan, self._begun, self._staging
        assert begun is not None
        what = f"finding what is left of context {plan.context_id}"
        found: list[PrefillStands] = self._gang.call(
            "prefill_stands", plan, self._token_ids, begun, staging,
            timeout_s=DISK_TIMEOUT_S, what=what,
        )  # fmt: skip
        chunks_done = min(most, *(rank.chunks_done for rank in found))
        while chunks_done >= 0:
            what = f"going on with context {plan.context_id} behind chunk {chunks_done - 1}"
            try:
                stand: list[PrefillStands] = self._gang.call(
                    "resume_prefill", plan, self._token_ids, begun, chunks_done, staging,
                    timeout_s=DISK_TIMEOUT_S, what=what,
                )  # fmt: skip
            except CorruptPage:
                chunks_done -= 1  # headers said that the page is there; its payload is another
            else:
                self._chunk = chunks_done
                return sum(rank.restored_pages for rank in stand)
        return None

    def _begin_anew(self) -> None:
        """Nothing is left that could be gone on with."""
        if self.plan.prefix_id:
            self.plan = msgspec.structs.replace(
                self.plan,
                prefix_id="",
                reused_tokens=0,
                not_reused=f"context {self.plan.prefix_id} was lost with a rank",
                predicted_s=0.0,
                predicted_chunk_s=(),
            )
        self._chunk = 0
        self._begin_with(self.plan, "begin_prefill")
        if self._staging:
            self._begin_saving()
            self._keep_journal()

    # saving

    @contextmanager
    def _saving(self, store: Store, run: PrefillRun) -> Iterator[None]:
        """A staging folder, to which every rank writes its pages beside the others', behind each
        chunk; the one that was taken over, if one was. What fails within leaves nothing of it."""
        name, taken_over = self.plan.context_id, self._staging
        if not taken_over:
            self._staging = store.stage(name, self._token_ids, cipher_of(self._namespace))
        try:
            if not taken_over:
                try:
                    self._begin_saving()
                    self._keep_journal()
                except RankLost as error:
                    self._go_on_after(error, run)
            yield
        except BaseException:
            self._forget(name)  # or a rank that still writes would bring the folder back
            store.abort(self._staging)
            raise

    def _begin_saving(self) -> None:
        name = self.plan.context_id
        what = f"beginning to save context {name}"
        self._gang.call("begin_saving", name, self._staging, timeout_s=BEGIN_TIMEOUT_S, what=what)

    def _keep_journal(self, chunks: Sequence[Sequence[ChunkDone]] = ()) -> None:
        """In the staging folder, saying that these chunks are done."""
        assert self._begun is not None
        opening = opening_of(
            self.plan, self._asked, self._namespace, self._gang.world_size, self._begun
        )
        self._journal = PrefillJournal(self._staging)
        self._journal.begin(opening, chunks)

    def _publish(self, store: Store, run: PrefillRun) -> Manifest:
        """The ranks write what is left; then, in one step, it is a context."""
        while True:
            try:
                manifest = self._save()
            except RankLost as error:
                self._go_on_after(error, run)
                self._run_chunks(run)
            else:
                return store.publish(self._staging, manifest)

    def _save(self) -> Manifest:
        plan, staging = self.plan, self._staging
        saved: list[ShardSaved] = self._gang.call(
            "save",
            plan.context_id,
            staging,
            timeout_s=DISK_TIMEOUT_S,
            what=f"saving context {plan.context_id} after its last chunk",
        )
        manifest = manifest_of(
            plan,
            self._gang.spec,
            saved,
            staging,
            self._wishes.description,
            created_unix_s=time.time(),
            namespace=self._namespace,
        )
        if plan.parity:
            for left in Path(staging).glob(f"*{SUFFIX}"):  # of a try that a rank was lost in
                left.unlink()
            what = f"writing parity of context {plan.context_id}"
            args = (manifest, staging, plan.parity)
            self._gang.call("write_parity", *args, timeout_s=DISK_TIMEOUT_S, what=what)
            write_parity_rows(Path(staging), plan.parity)
        return manifest
