"""What can go wrong, as types.

RingspanError                  every error of ours; its text is one line: wanted, found, what to do
├── BadInput                   the caller asked for something that cannot be done (exit status 2)
│   ├── UnknownName            a name (model, codec, scheme, layout, context) that does not exist
│   ├── UnsupportedModel       the attention hook cannot carry this model
│   └── TooLarge               it does not fit: positions, memory, devices, disk
├── CorruptPage                a page failed its verification; it was not used
├── WrongAttention             an attention step did not see the keys it must, or missed its audit
├── StoreError                 the store folder cannot be read or written
│   ├── StaleHandle            (kvstore.leases) a lease or an epoch that is over
│   └── InUse                  (kvstore.leases) copies that somebody reads or needs
├── PeerTimeout                a peer said nothing within the time allowed
└── RankLost                   a rank died or failed; names the rank and the chunk
"""

from __future__ import annotations


class RingspanError(Exception):
    """Base of every error of ours. The text is one line for a person to read."""

    exit_status = 1


class BadInput(RingspanError):
    exit_status = 2


class UnknownName(BadInput):
    def __init__(self, kind: str, name: str, known: list[str] | tuple[str, ...]) -> None:
        super().__init__(f"unknown {kind} {name!r}; known: {', '.join(sorted(known)) or 'none'}")

    def __reduce__(self) -> tuple[object, ...]:
        return _rebuild, (type(self), str(self))


class UnsupportedModel(BadInput):
    pass


class TooLarge(BadInput):
    pass


class CorruptPage(RingspanError):
    pass


class WrongAttention(RingspanError):
    pass


class StoreError(RingspanError):
    pass


class PeerTimeout(RingspanError):
    pass


class RankLost(RingspanError):
    pass


def _rebuild(cls: type[RingspanError], text: str) -> RingspanError:
    """Errors cross process boundaries; one with its own __init__ is rebuilt from its text."""
    error = cls.__new__(cls)
    Exception.__init__(error, text)
    return error
