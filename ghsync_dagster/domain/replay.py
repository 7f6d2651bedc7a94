"""Whether a dead letter may still be applied, and the steps that apply it beside the live stream and loads.

Belongs here: the pure decision (`judge`) and the order of the atomic steps, as data that a test enumerates. Not here:
how a step is written to a server, how the topic is read, or who holds the lease.

A replay holds the lease of loads, so no load runs beside it; the stream does. It stands on this:

- It *adopts* the key: the document gets the load's marker, content unchanged, its content logged first; where there is
  no document, the new one is inserted marked. Whatever the stream does to it afterwards takes the marker away.
- Then it *looks*: the group has committed past the letter, so no earlier record comes any more; and no newer record of
  the key is in the topic up to an end that was asked for after the adoption. So all that the stream still does to this
  key is newer than the letter, began after the adoption, and takes the marker away.
- Then it *writes*, in one command, only where the marker still is.

Should the group go back past the letter all the same, the stream brings the earlier records once more and then meets
the letter's again, which it applies or refuses: a letter that is refused again after it was replayed is open again.

A replay that dies leaves a marker and a log, with no version entry of its own: the recovery that loads have puts the
old content back, or removes the insert. The letter is still open then.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    from ghsync_dagster.domain.change import Position


class ReplayStep(Enum):
    """The steps of a replay on one key, in order; the steps that settle a dead load (`SettleStep`) end it."""

    RECORD_RUNNING = "record running"
    """Record the replay as a running load, once a replay, after the recovery of dead ones."""

    LOG_OLD = "log old"
    """Read the document and log its content: before the marker, or a crash would take it for an insert."""

    ADOPT = "adopt"
    """Mark the document where it still has exactly that content, unmarked; or insert the letter's, marked."""

    LOOK = "look"
    """Ask what the group has committed and where the topic ends, then read up to there, and judge."""

    RECORD_INTENT = "record intent"
    """Before the write: from now on an older letter of the key is no longer to be applied, even if this one dies."""

    RECORD_DELETED = "record deleted"
    """A delete: before the document goes, as the stream does, so that no load brings the user back."""

    DROP_VERSION = "drop version"
    """Before the write, or a load takes what is written for its own. A deletion on record is never forgotten: it may be
    a newer one of the stream; beside a document it does no harm."""

    WRITE = "write"
    """Where the document is still marked: the letter's content, unmarked; or delete it."""

    RECORD_OUTCOME = "record outcome"
    """The letter is no longer open."""


REPLAY_STEPS = tuple(ReplayStep)
"""A replay, before it settles."""


class Seen(Enum):
    """What a record of the topic is to a letter."""

    CHANGE = "change"
    """A change of the same key."""

    TRUNCATE = "truncate"
    """It ends all that came before it."""

    REPLAYED = "replayed"
    """A dead letter of the same key that a replay has applied, or began to apply."""

    UNREAD = "unread"
    """It can't be decoded, is no dead letter (yet), and may be of the same key: nobody knows whether it is applied."""


class Sighting(NamedTuple):
    """A record of the topic that bears on a letter.

    Attributes:
        seen: What it is.
        partition: Its partition.
        offset: Its offset.
        position: Its place in the binlog, None where unknown.
        letter: Whether it is a dead letter itself.
    """

    seen: Seen
    partition: int
    offset: int
    position: Position | None = None
    letter: bool = False

    def __str__(self) -> str:
        return f"partition {self.partition} offset {self.offset}"


class Stretch(NamedTuple):
    """What is known of a partition of the topic.

    Attributes:
        low: The first offset that it still holds.
        committed: Where the group goes on in it, None where it has never committed.
        first: The first place in the binlog that was read in it behind the last gap, None where none was.
        last_gap: The highest offset that was not there to be read, None where each was.
    """

    low: int
    committed: int | None
    first: Position | None = None
    last_gap: int | None = None


class Candidate(NamedTuple):
    """A dead letter that decodes to a change of one user.

    Attributes:
        partition: The partition of its record.
        offset: The offset of its record.
        position: Its place in the binlog, None where unknown.
        intact: Whether the topic still holds the record, with the letter's key and value.
        keyed: Whether the record's own key names the user.
    """

    partition: int
    offset: int
    position: Position | None
    intact: bool
    keyed: bool


class Outcome(Enum):
    """What is to become of a letter."""

    APPLY = "apply"
    """Nothing newer is known, and nothing newer can have come unseen."""

    MOVED_ON = "moved on"
    """A newer record has been applied, or will be."""

    SUPERSEDED = "superseded"
    """A newer dead letter of the key is the one to apply."""

    NOT_PASSED = "not passed yet"
    """The group has not committed an earlier record or the letter's own: it may still come, or come again."""

    UNSURE = "unsure"
    """Something newer may have been there. It is never guessed."""


class Judgement(NamedTuple):
    """What is to become of a letter, and why.

    Attributes:
        outcome: What.
        reason: Why, in words.
        by: The record that decided it, if one did.
    """

    outcome: Outcome
    reason: str
    by: Sighting | None = None


def judge(letter: Candidate, sightings: Iterable[Sighting], stretches: Mapping[int, Stretch]) -> Judgement:
    """Decide about one letter from what was read of the topic.

    Args:
        letter: The letter.
        sightings: Every record that bears on it, from its own offset on, and in other partitions from where they begin.
        stretches: Each partition of the topic.
    """
    doubt: Judgement | None = None
    waiting: Judgement | None = None
    for sighting in sightings:
        newer = _is_newer(sighting, letter)
        if newer and sighting.seen is not Seen.UNREAD:
            return _overtaken(sighting)
        if newer is None or newer:
            doubt = doubt or _doubt(sighting)
        elif sighting.partition != letter.partition and not _passed(stretches.get(sighting.partition), sighting.offset):
            waiting = Judgement(
                Outcome.NOT_PASSED, f"an earlier record, {sighting}, is not committed by the group yet", sighting
            )
    return doubt or waiting or _by_what_is_gone(letter, stretches) or Judgement(Outcome.APPLY, "nothing newer is there")


def _is_newer(sighting: Sighting, letter: Candidate) -> bool | None:
    """Tell whether a record comes after the letter's; None where that can't be told."""
    if sighting.partition == letter.partition:
        return sighting.offset > letter.offset
    if sighting.position is None or letter.position is None:
        return None
    order = sighting.position.compare(letter.position)
    return None if order is None else order > 0


def _overtaken(sighting: Sighting) -> Judgement:
    if sighting.seen is Seen.TRUNCATE:
        return Judgement(Outcome.MOVED_ON, f"the table was truncated later, at {sighting}", sighting)
    if sighting.seen is Seen.REPLAYED:
        return Judgement(Outcome.SUPERSEDED, f"a newer dead letter of the user was replayed, {sighting}", sighting)
    if sighting.letter:
        return Judgement(Outcome.SUPERSEDED, f"a newer dead letter of the user can be read, {sighting}", sighting)
    return Judgement(Outcome.MOVED_ON, f"a newer record of the user is at {sighting}", sighting)


def _doubt(sighting: Sighting) -> Judgement:
    if sighting.seen is Seen.UNREAD:
        reason = f"{sighting} can't be decoded here and is no dead letter yet; it may be a newer record of the user"
    else:
        reason = f"nothing tells whether {sighting} is newer"
    return Judgement(Outcome.UNSURE, reason, sighting)


def _by_what_is_gone(letter: Candidate, stretches: Mapping[int, Stretch]) -> Judgement | None:
    own = stretches.get(letter.partition)
    if own is None or not letter.intact:
        return Judgement(Outcome.UNSURE, "the topic no longer holds the record, so newer ones may be gone as well")
    if not _passed(own, letter.offset):
        return Judgement(Outcome.NOT_PASSED, "the group has not committed past it, so earlier records may come again")
    # Compaction leaves gaps, but takes no record away whose own key has an older record still there.
    if own.last_gap is not None and own.last_gap > letter.offset and not letter.keyed:
        return Judgement(Outcome.UNSURE, f"offset {own.last_gap} is gone, and the record's key does not tell whose")
    for partition, other in stretches.items():
        gone = other.low - 1 if other.last_gap is None else other.last_gap
        if partition != letter.partition and gone >= 0 and not _is_earlier(other.first, letter.position):
            return Judgement(Outcome.UNSURE, f"offset {gone} of partition {partition} is gone: it may have been newer")
    return None


def _passed(stretch: Stretch | None, offset: int) -> bool:
    return stretch is not None and stretch.committed is not None and stretch.committed > offset


def _is_earlier(one: Position | None, other: Position | None) -> bool:
    return one is not None and other is not None and (one.compare(other) or 0) < 0
