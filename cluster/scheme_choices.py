"""Which scheme takes new tokens onto keys that lie there: by the gang's measured speeds."""

from __future__ import annotations

from ringspan.attention.tail import turn_scheme
from ringspan.cluster.gang import Gang
from ringspan.cluster.planner import choose_scheme, known_speeds


class SchemeChoices:
    """Of one gang; what was chosen is remembered."""

    def __init__(self, gang: Gang) -> None:
        self._gang = gang
        self._chosen: dict[tuple[int, int, str], str] = {}

    def onto(self, new_tokens: int, cached_tokens: int, codec_name: str) -> str:
        """For a step of new tokens behind cached ones: a long question, or what is new behind a
        prefix. By the measured speeds, else by rule."""
        facts, world_size = self._gang.ready[0].facts, self._gang.world_size
        if (known := known_speeds(self._gang.ready)) is None:
            return turn_scheme(new_tokens, facts.num_q_heads, facts.num_kv_heads, world_size)
        # Predicting takes as long as a question may: once for all lengths up to a power of two.
        new, cached = 1 << (new_tokens - 1).bit_length(), 1 << (cached_tokens - 1).bit_length()
        at = (new, cached, codec_name)
        if at not in self._chosen:
            best, *_ = choose_scheme(facts, *known, new, cached, world_size, codec_name)
            self._chosen[at] = best[0]
        return self._chosen[at]
