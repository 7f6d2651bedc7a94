"""Who wins on one key: the steps of loads and of the change stream, and the decisions between them.

Belongs here: the pure decisions (`classify`, `settle`) and the order of the atomic steps, as data that the flows
execute and a test enumerates. Not here: how a step is written to a server, in what batches, or who holds the lease.

Each step is a read, or a write of one document. No transaction spans two documents, so this runs on every deployment.
It rests on three guarantees of its callers:

- One load at a time (the lease), and a load that lost it writes nothing more. So only one process ever writes
  version entries, while the stream only drops them: an entry that is still there is the one that was read.
- Load ids are never used twice.
- The stream applies the operations of a key in order and repeats an operation whole until it ends.

What is stored for a key: the document (marked while a load has not finished with it), the version entry (the
event that the document came from, and the load that wrote the document), the deletion (the stream deleted the
key), and in the load's own log the old content of a document that the load replaces.
"""

from __future__ import annotations

from enum import Enum
from typing import NamedTuple


class Version(NamedTuple):
    """The event that a stored user comes from. Later events compare greater.

    Attributes:
        created_at: UTC time of the event as `YYYY-MM-DDTHH:MM:SSZ`, whose text order is the order of time.
        event_id: The event's number, which decides within one second.
    """

    created_at: str
    event_id: int


class Stored(NamedTuple):
    """What a load read of one key, each part at its own moment.

    Attributes:
        content: The document's user fields in a form that `==` compares, or None without a document.
        version: The version entry, or None.
        deleted: Whether the stream recorded that it deleted the key.
    """

    content: object | None
    version: Version | None
    deleted: bool


class Incoming(NamedTuple):
    """What a load brings for one key.

    Attributes:
        content: The user fields, in the form that `Stored.content` has.
        version: The event that they come from.
    """

    content: object
    version: Version


class Action(Enum):
    """What a load does with one key: three ways to write, five reasons not to."""

    INSERT = "insert"
    """There is no such user: write the marked document, then its version entry."""

    BUMP = "bump"
    """The load's own older document already has this content: only the version moves on, where it still is."""

    REPLACE = "replace"
    """The load's own older document has other content: log the old, replace it where unchanged, move the version."""

    ALREADY_STORED = "already stored"
    """This very event wrote the document."""

    NEWER_STORED = "newer stored"
    """A newer event wrote the document."""

    OWNED_BY_STREAM = "owned by the stream"
    """A document without version entry: the stream wrote it, or somebody else did."""

    DELETED_BY_STREAM = "deleted by the stream"
    """There is no document because the stream deleted it."""

    STORED_MEANWHILE = "stored meanwhile"
    """The load wrote the document, and it is unmarked when it is read back: another writer has written it since."""

    @property
    def writes_document(self) -> bool:
        """Whether the document itself is written, and so is marked until the load settles."""
        return self is Action.INSERT or self is Action.REPLACE

    @property
    def is_skip(self) -> bool:
        """Whether nothing is written; the value is then the reason, in words."""
        return not (self.writes_document or self is Action.BUMP)


def classify(stored: Stored, incoming: Incoming) -> Action:
    """Decide what a load does with one key.

    The decision may be out of date when it is acted on; the conditions of the write steps and `settle` handle that.
    A version entry without a document has no meaning and is overwritten.

    Args:
        stored: What was read of the key.
        incoming: What the load brings for it.

    Returns:
        The way to write, or the reason not to.
    """
    if stored.content is None:
        return Action.DELETED_BY_STREAM if stored.deleted else Action.INSERT
    if stored.version is None:
        return Action.OWNED_BY_STREAM
    if stored.version == incoming.version:
        return Action.ALREADY_STORED
    if stored.version > incoming.version:
        return Action.NEWER_STORED
    return Action.BUMP if stored.content == incoming.content else Action.REPLACE


def classify_missing(stored: Stored, *, marked: bool) -> Action:
    """Decide what a load does with a key that it wrote and that READ_BACK finds missing.

    Args:
        stored: What was read of the key after that.
        marked: Whether the document is marked.

    Returns:
        INSERT by the steps of INSERT_AGAIN_STEPS, or the reason not to.
    """
    if stored.content is None:
        return Action.DELETED_BY_STREAM if stored.deleted else Action.INSERT
    return Action.INSERT if marked else Action.STORED_MEANWHILE


class LoadState(Enum):
    """The progress of a load by its record. Only this record distinguishes pending version entries from final ones."""

    RUNNING = "running"
    """It may have written documents and versions that are not yet compared with the stream."""

    CHECKED = "checked"
    """Every key is settled: what is marked stays, and version entries are final."""

    DONE = "done"
    """Nothing is marked and nothing is logged."""


class Found(NamedTuple):
    """The state of one key after a load's last write, found by the load itself or, if it died, by the next one.

    Attributes:
        marked: The document is there and marked.
        replaced: The load's log has the old content of this key.
        versioned: The version entry names this load as the writer.
        deleted: The stream recorded that it deleted the key.
    """

    marked: bool
    replaced: bool
    versioned: bool
    deleted: bool


class Repair(Enum):
    """What settling does with one key. Every write to a document is conditional on its marker."""

    NOTHING = "nothing"
    """Nothing of this load is left on the key."""

    KEEP = "keep"
    """Document and version belong together: the marker goes when all keys are settled."""

    PUT_BACK = "put back"
    """The document was replaced, its version was not: write the logged content, unmarked, where marked."""

    REMOVE = "remove"
    """An insert that the stream overtook or that has no version: delete where marked, drop this load's entry."""

    DROP_VERSION = "drop version"
    """The stream wrote or deleted the document since: drop this load's entry."""


def settle(state: LoadState | None, found: Found) -> Repair:
    """Decide about one key that a load wrote, in the same way for a load at its end and for a dead one.

    Args:
        state: The state in the load's record, None without a record.
        found: What was read of the key after the load's last write to it.

    Returns:
        The repair. If it is repeated after a crash, the result is the same.
    """
    if state is not LoadState.RUNNING:
        return Repair.KEEP if found.marked else Repair.NOTHING
    if not found.marked:
        return Repair.DROP_VERSION if found.versioned else Repair.NOTHING
    if found.replaced:
        return Repair.KEEP if found.versioned else Repair.PUT_BACK
    return Repair.KEEP if found.versioned and not found.deleted else Repair.REMOVE


class LoadStep(Enum):
    """The steps of a load. Any time may pass between two of them, and each may be the last one.

    RECORD_RUNNING once a load, PLAN_STEPS for each key, then the WRITE_STEPS of its action, then READ_BACK. A key that
    is found missing is read again by READ_STEPS, and inserted again by INSERT_AGAIN_STEPS if ``classify_missing``
    decides so. That is repeated as often as needed, but before SETTLE_STEPS.
    """

    RECORD_RUNNING = "record running"
    """Record the load's id as running, once a load. Nothing is written before, so nothing is left without an owner."""

    READ_DOCUMENT = "read document"
    """First of three reads for `classify`. Any order is safe; this one misreads the stream least often."""

    READ_VERSION = "read version"
    """Second read: an entry that is read after the document proves that the stream had not yet written the document."""

    READ_DELETED = "read deleted"
    """Third read. It only saves inserting what settling removes again."""

    REMOVE_LATE = "remove late"
    """Delete the document where it is marked, if no version entry was read: this load has written none yet.

    Spark's executors of a dead load may write for a moment longer, after the recovery. Nobody else has seen these.
    """

    REMOVE_WRONG = "remove wrong"
    """Delete the document where it is marked: it is not what was to be written."""

    DROP_STALE = "drop stale"
    """Drop the version entry, which belongs to no document: WRITE_VERSION of an insert leaves one that is there."""

    FORGET_LOGGED = "forget logged"
    """Drop the old content of the key from the load's log: from here on it is an insert, with nothing to put back."""

    LOG_OLD = "log old"
    """Log the content that was read, under the load's id. Before the document changes, or a crash loses it."""

    WRITE_DOCUMENT = "write document"
    """INSERT: insert marked, and leave what is stored meanwhile. REPLACE: only where unmarked and still as read."""

    WRITE_VERSION = "write version"
    """INSERT: insert the entry, and leave one that is there. REPLACE, BUMP: update it where it still is.

    For REPLACE this comes after the document: an entry that is still there proves that the stream had not written the
    user when the document was replaced. For INSERT both orders are safe. The old value need not be compared, since only
    the holder of the lease writes entries. BUMP keeps the id of the load that wrote the document, because an entry with
    this load's id counts as pending. BUMP ends here: it has nothing to settle.
    """

    READ_BACK = "read back"
    """Compare what is marked with what was to be written."""


class SettleStep(Enum):
    """The steps that end a load, in order: at its own end, and in the recovery of a dead one (``steps_left``)."""

    FIND_MARKED = "find marked"
    """First of three reads for `settle`, in any order, but each after the last write of a document or version."""

    FIND_VERSION = "find version"
    """Second read. A load at its own end may take its inserts as versioned; what it replaced it must look up."""

    FIND_DELETED = "find deleted"
    """Third read: a deletion recorded before it may have missed the insert, one recorded after it will not."""

    REPAIR_DOCUMENT = "repair document"
    """PUT_BACK and REMOVE, each only where marked, since the stream may write in between."""

    REPAIR_VERSION = "repair version"
    """DROP_VERSION and REMOVE. By key alone: the stream only drops entries, so what is there is what was found."""

    RECORD_CHECKED = "record checked"
    """Record the load as checked, once a load: before the first marker goes, after which nothing looks pending."""

    UNMARK = "unmark"
    """Remove the marker wherever it is."""

    FORGET_OLD = "forget old"
    """Drop the load's log, which nothing reads once the load is checked."""

    RECORD_DONE = "record done"
    """Record the load as done, once a load: the next one finds nothing to recover."""


class StreamStep(Enum):
    """The steps of the stream on one key."""

    RECORD_DELETED = "record deleted"
    """Before the document goes: a load that inserts after that finds the deletion when it settles."""

    DROP_VERSION = "drop version"
    """Upsert: before the write, so that no load takes what is written for its own. Delete: leaves no entry behind."""

    WRITE_DOCUMENT = "write document"
    """Replace or insert the document, unmarked."""

    REMOVE_DOCUMENT = "remove document"
    """Delete the document, marked or not."""

    DROP_VERSION_AGAIN = "drop version again"
    """Drops what a load wrote since. A key that had an entry goes back, see ``GOES_BACK``.

    By that entry a load may have classified the document as its own and replaced it in between. A lost answer counts
    as an entry: the whole operation is repeated.
    """

    FORGET_DELETED = "forget deleted"
    """After the write, so that a deleted user does not come back from a file for a moment. Keeps the record small."""


READ_STEPS = (LoadStep.READ_DOCUMENT, LoadStep.READ_VERSION, LoadStep.READ_DELETED)
"""What a load reads of a key before it decides."""

PLAN_STEPS = (*READ_STEPS, LoadStep.REMOVE_LATE)
"""What a load does with a key before it decides for the first time."""

WRITE_STEPS = {
    Action.INSERT: (LoadStep.DROP_STALE, LoadStep.WRITE_DOCUMENT, LoadStep.WRITE_VERSION),
    Action.BUMP: (LoadStep.WRITE_VERSION,),
    Action.REPLACE: (LoadStep.LOG_OLD, LoadStep.WRITE_DOCUMENT, LoadStep.WRITE_VERSION),
}
"""How a load writes a key, by what it decided."""

INSERT_AGAIN_STEPS = (
    LoadStep.REMOVE_WRONG,
    LoadStep.DROP_STALE,
    LoadStep.FORGET_LOGGED,
    LoadStep.WRITE_DOCUMENT,
    LoadStep.WRITE_VERSION,
)
"""How a load writes a key that it found missing."""

SETTLE_STEPS = tuple(SettleStep)
"""The end of a load, or the recovery of a dead one."""

OF_EACH_KEY = frozenset(SETTLE_STEPS[: SETTLE_STEPS.index(SettleStep.RECORD_CHECKED)])
"""Those of them that are executed for each key; the others are executed once a load, for all keys."""


def steps_left(state: LoadState, steps: tuple[SettleStep, ...] = SETTLE_STEPS) -> tuple[SettleStep, ...]:
    """Return the steps that remain for a load whose record has this state, in order."""
    last = {LoadState.CHECKED: SettleStep.RECORD_CHECKED, LoadState.DONE: SettleStep.RECORD_DONE}.get(state)
    return steps if last is None else steps[steps.index(last) + 1 :]


UPSERT_STEPS = (
    StreamStep.DROP_VERSION,
    StreamStep.WRITE_DOCUMENT,
    StreamStep.DROP_VERSION_AGAIN,
    StreamStep.FORGET_DELETED,
)
"""The stream inserts or updates the key."""

DELETE_STEPS = (StreamStep.RECORD_DELETED, StreamStep.DROP_VERSION, StreamStep.REMOVE_DOCUMENT)
"""The stream deletes the key."""

GOES_BACK = {StreamStep.DROP_VERSION_AGAIN: StreamStep.WRITE_DOCUMENT}
"""If a step finds for a key what must not be there, the key continues from this earlier step."""
