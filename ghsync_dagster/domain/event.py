"""The decision about a line of a GH Archive file: a typed event, or the reason why it is none.

Belongs here: that decision, for any bytes: nothing is dropped, coerced or turned into null. Not here: files, Spark, or
the storage of refused lines.

The shape is GH Archive's (https://www.gharchive.org/): one JSON object a line, any extra fields allowed.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from functools import lru_cache, partial
from types import NoneType
from typing import TYPE_CHECKING, Any, Final, get_args

import msgspec

from ghsync_dagster.domain.text import shortened
from ghsync_dagster.domain.user import USER_FIELDS, Rule

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

RAW_LIMIT: Final = 2_000
"""How many characters of a refused line are kept."""

_UTF8_BOM: Final = b"\xef\xbb\xbf"
_INT64_MAX: Final = 2**63 - 1
_INT64_DIGITS: Final = len(str(_INT64_MAX))
_CREATED_AT: Final = re.compile(r"[0-9]{4}-[0-9]{2}-[0-9]{2}T[0-9]{2}:[0-9]{2}:[0-9]{2}Z", re.ASCII)
_EXPORTED_AT: Final = re.compile(
    r"(?P<day>[0-9]{4}-[0-9]{2}-[0-9]{2})[Tt ](?P<time>[0-9]{2}:[0-9]{2}:[0-9]{2})(?:[.,][0-9]{1,9})?"
    r"(?: ?(?:[Zz]|UTC)|(?P<hours>[+-][0-9]{2})(?::?(?P<minutes>[0-5][0-9]))?)",
    re.ASCII,
)
_AHEAD: Final = timedelta(days=1)
"""An event counts as from the future only beyond this: a clock may be behind GitHub's, or a zone wrong."""
_ESCAPE: Final = re.compile(
    rb"\\(?:u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|u[dD](?P<half>[89a-fA-F])(?P<rest>[0-9a-fA-F]{2})|.)",
    re.DOTALL,
)
"""A pair of surrogates, a lone one, or any other escape: JSON has no backslash outside of these."""

_TIME_WORDS: Final = "created_at must be a time with its zone like 2015-01-01T15:00:00Z"
FUTURE_WORDS: Final = "created_at must not be more than a day in the future"
"""The reason if an event is refused because of the clock, not because of its content."""


class Actor(msgspec.Struct, frozen=True, gc=False):
    """The user who acted. Absent texts are None; the rules say which may be."""

    id: int
    login: str | None = None
    gravatar_id: str | None = None
    url: str | None = None
    avatar_url: str | None = None


class Repo(msgspec.Struct, frozen=True, gc=False):
    """The repository acted on."""

    id: int | None = None
    name: str | None = None
    url: str | None = None


class Event(msgspec.Struct, frozen=True, gc=False):
    """One GitHub event, the used fields only."""

    id: str
    type: str
    created_at: str
    actor: Actor
    repo: Repo | None = None


def event_shape(record: type[msgspec.Struct] = Event) -> dict[str, Any]:
    """Return the fields of an event, from which its schemas elsewhere are derived.

    Returns:
        Each name, in order, to ``int``, ``str``, or the fields of a nested record.
    """

    def shape(kind: Any) -> Any:  # noqa: ANN401  what an annotation is
        (plain,) = (part for part in get_args(kind) or (kind,) if part is not NoneType)
        return event_shape(plain) if issubclass(plain, msgspec.Struct) else plain

    return {field.name: shape(field.type) for field in msgspec.structs.fields(record)}


@dataclass(frozen=True, slots=True)
class Refused:
    """A line that is no usable event, and the reason."""

    reason: str


REQUIRED_FIELDS: Final = frozenset(field.encode_name for field in msgspec.structs.fields(Event) if field.required)
_USED_FIELDS: Final = {
    prefix: frozenset(kind.__struct_fields__) for prefix, kind in (("", Event), ("actor.", Actor), ("repo.", Repo))
}
_decode_event: Final = msgspec.json.Decoder(Event).decode
_decode_members: Final = msgspec.json.Decoder(dict[str, msgspec.Raw]).decode
_encode: Final = msgspec.json.Encoder().encode


def latest_time(now: datetime) -> str:
    """Return the time after which an event is from the future.

    Args:
        now: The time by the caller's clock, in UTC.
    """
    return f"{(now + _AHEAD).replace(tzinfo=None).isoformat(timespec='seconds')}Z"


def event_decoder(rules: Sequence[Rule], latest: str) -> Callable[[bytes], Event | Refused | None]:
    """Return the function that decides one line: an event, a refusal, or None for a blank line.

    It raises only if a project's own predicate does (see ``Rule.breaker``). Only the used fields decide: whatever JSON
    allows in the others is no reason to refuse, not even a lone surrogate.

    Args:
        rules: The user rules that a file's users must keep.
        latest: The time after which an event is from the future, from `latest_time`. Such an event would fix its
            user's state permanently, since the newest event wins.
    """
    tests = [
        (index, rule.breaker(), rule) for index, name in enumerate(USER_FIELDS) for rule in rules if rule.field == name
    ]

    def decide(line: bytes) -> Event | Refused | None:
        try:
            if not line.isascii():
                line.decode()
            event = _decode_event(line)
            reason = _structure_problem(line, event)
        except msgspec.ValidationError as error:
            return Refused(_repeated_key(line) or _in_words(str(error)))
        except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
            if not line.strip():
                return None
            if line.startswith(_UTF8_BOM) and not line.startswith(_UTF8_BOM * 2):
                return decide(line.removeprefix(_UTF8_BOM))
            if b"\\u" in line and (readable := _with_readable_extras(line)):
                repeated = _repeated_key(line)
                return Refused(repeated) if repeated else decide(readable)
            return Refused(_malformed(line, error))
        if reason is not None:
            return Refused(reason)
        at = _utc(event.created_at)
        if at is None:
            return Refused(f"{_TIME_WORDS}, got {_shown(event.created_at)}")
        if at > latest:
            return Refused(f"{FUTURE_WORDS}, got {_shown(event.created_at)} (event_not_in_future)")
        if at != event.created_at:
            event = msgspec.structs.replace(event, created_at=at)
        actor = event.actor
        user = (str(actor.id), actor.login, actor.gravatar_id, actor.avatar_url, actor.url)
        for index, broken, rule in tests:
            if broken(user[index]):
                return Refused(f"{rule.words}, got {_shown(user[index])} ({rule.name})")
        return event

    return decide


def _structure_problem(line: bytes, event: Event) -> str | None:
    """Return what typed decoding does not detect: repeated keys, ids out of range, an empty type; else None."""
    if not _keys_are_unique(line, event) and (repeated := _repeated_key(line)):
        return repeated
    repo_id = event.repo.id if event.repo is not None else None
    if not -_INT64_MAX <= event.actor.id <= _INT64_MAX:
        return f"actor.id must lie within {_INT64_MAX}"
    if repo_id is not None and not -_INT64_MAX <= repo_id <= _INT64_MAX:
        return f"repo.id must lie within {_INT64_MAX}"
    if not _is_event_id(event.id):
        return f"id must be a string of decimal digits up to {_INT64_MAX}, got {_shown(event.id)}"
    if not event.type:
        return "type must not be empty"
    return None


def _with_readable_extras(line: bytes) -> bytes | None:
    """Return a line with other characters in place of lone surrogates; None if a used field has one.

    JSON allows them, and payloads that were cut within a character have them. In a used field the replacement would
    change the value.
    """
    one, two = (_ESCAPE.sub(partial(_replaced, plane), line) for plane in (b"e", b"f"))
    try:
        return one if one != line and _decode_event(one) == _decode_event(two) else None
    except msgspec.ValidationError:
        return one
    except (msgspec.DecodeError, RecursionError):
        return None


def _replaced(plane: bytes, found: re.Match[bytes]) -> bytes:
    """Replace a lone surrogate by a private-use character, a different one for each surrogate."""
    half = found["half"]
    return b"\\u%s%d%s" % (plane, int(half, 16) - 8, found["rest"]) if half else found[0]


def _keys_are_unique(line: bytes, event: Event) -> bool:
    """Return whether the bytes prove that no used key is repeated; False means that a full check is needed.

    If decoding and encoding an object's members gives the same bytes, no member was lost.
    """
    members = _decode_members(line)
    if _encode(members) != line:
        line = msgspec.json.format(line, indent=-1)
        members = _decode_members(line)
        if _encode(members) != line:
            return False
    actor = bytes(members["actor"])
    if _encode(event.actor) != actor and _encode(_decode_members(actor)) != actor:
        return False
    if event.repo is None:
        return True
    repo = bytes(members["repo"])
    return _encode(event.repo) == repo or _encode(_decode_members(repo)) == repo


def _is_event_id(text: str) -> bool:
    if not (text.isascii() and text.isdigit()):
        return False
    digits = text.lstrip("0")
    return len(digits) < _INT64_DIGITS or (len(digits) == _INT64_DIGITS and int(digits) <= _INT64_MAX)


# An hour of events has at most 3,600 times.
@lru_cache(maxsize=4_096)
def _utc(text: str) -> str | None:
    """Return a time in UTC and whole seconds, in GitHub's form; None if it is no time, or has no zone.

    A fraction is dropped, so that an exported event is the same event as in GH Archive.
    """
    try:
        if _CREATED_AT.fullmatch(text):
            datetime.fromisoformat(text)
            return text
        if not (parts := _EXPORTED_AT.fullmatch(text)):
            return None
        hours, minutes = parts["hours"] or "+00", parts["minutes"] or "00"
        at = datetime.fromisoformat(f"{parts['day']}T{parts['time']}{hours}:{minutes}").astimezone(UTC)
    except (ValueError, OverflowError):
        return None
    # Not strftime, which does not pad the year on every system.
    return f"{at.replace(tzinfo=None).isoformat(timespec='seconds')}Z"


def _repeated_key(line: bytes) -> str | None:
    """Return a reason with the first used key that is repeated at the top level, in actor or in repo; else None."""
    try:
        # As text, because Python refuses to make an int of very many digits.
        pairs: Any = json.loads(line, object_pairs_hook=_Pairs, parse_int=str)
    except RecursionError:
        return "malformed JSON: nested too deeply"
    except ValueError:
        return None
    if not isinstance(pairs, _Pairs):
        return None
    objects = [("", pairs), *((f"{name}.", value) for name, value in pairs if name in ("actor", "repo"))]
    for prefix, value in objects:
        names = Counter(name for name, _ in value if name in _USED_FIELDS[prefix]) if isinstance(value, _Pairs) else {}
        twice = next((name for name, times in names.items() if times > 1), None)
        if twice is not None:
            return f"key {prefix}{twice} stands more than once"
    return None


class _Pairs(list[tuple[str, Any]]):
    """A JSON object as its pairs, distinguishable from a JSON array."""


_PATH: Final = re.compile(r" - at `\$\.?(?P<path>[^`]*)`$")
_MISSING: Final = re.compile(r"Object missing required field `(?P<name>\w+)`")
_TYPES: Final = {
    "str": "a string",
    "int": "a whole number",
    "object": "an object",
    "null": "null",
    "array": "an array",
    "bool": "true or false",
    "float": "a number with a fraction",
}


def _in_words(message: str) -> str:
    """Turn a validation message of msgspec into ours: field path, expected, got."""
    found = _PATH.search(message)
    path = found["path"] if found else ""
    head = message[: found.start()] if found else message
    if missing := _MISSING.fullmatch(head):
        return f"{'.'.join(filter(None, (path, missing['name'])))} is missing"
    head = re.sub(r"`([^`]*)`", lambda part: " or ".join(_TYPES.get(word, word) for word in part[1].split(" | ")), head)
    if not path:
        return f"a line must be one JSON object: {head[0].lower()}{head[1:]}"
    return f"{path}: {head[0].lower()}{head[1:]}"


def _malformed(line: bytes, error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError) or not _is_utf8(line):
        return "the line is not valid UTF-8"
    if isinstance(error, RecursionError):
        return "malformed JSON: nested too deeply"
    try:
        _, end = json.JSONDecoder().raw_decode(line.decode().lstrip())
    except (ValueError, RecursionError):
        return f"malformed JSON: {str(error).removeprefix('JSON is malformed: ')}"
    rest = line.decode().lstrip()[end:].strip()
    if rest.lstrip(", \t\r").startswith("{"):
        return "more than one JSON value on the line"
    what = f"{_shown(rest)} follows the object" if rest else str(error).removeprefix("JSON is malformed: ")
    return f"malformed JSON: {what}"


def _is_utf8(line: bytes) -> bool:
    try:
        line.decode()
    except UnicodeDecodeError:
        return False
    return True


def _shown(value: str | None, limit: int = 60) -> str:
    if value is None:
        return "null"
    return shortened(json.dumps(value), limit)
