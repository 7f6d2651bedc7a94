"""Lines of every odd kind, each with what it must come to. Belongs here: the lines. Not here: who decides them."""

from __future__ import annotations

import json
from typing import Any, NamedTuple

import msgspec

from ghsync_dagster.domain.event import Actor, Event, Repo

LOGIN_WORDS = "login must be letters, digits, hyphens or underscores, with an optional [bot] at the end"
ID_WORDS = "id must be a string of decimal digits up to 9223372036854775807"
TIME_WORDS = "created_at must be a time with its zone like 2015-01-01T15:00:00Z"
INT64 = 9223372036854775807

ACTOR: dict[str, Any] = {
    "id": 9,
    "login": "octo",
    "gravatar_id": "",
    "url": "https://api.github.com/users/octo",
    "avatar_url": "https://avatars.githubusercontent.com/u/9?",
}
REPO: dict[str, Any] = {"id": 7, "name": "octo/repo", "url": "https://api.github.com/repos/octo/repo"}
EVENT: dict[str, Any] = {
    "id": "12",
    "type": "PushEvent",
    "actor": ACTOR,
    "repo": REPO,
    "payload": {"actor": {"id": "x"}, "id": None, "id2": [1, {"login": "no"}]},
    "public": True,
    "created_at": "2015-01-01T15:00:00Z",
}


class Absent:
    """Stands for a key that is left out."""


def line(actor: Any = None, repo: Any = None, **top: Any) -> bytes:
    """Return a valid line with keys replaced, left out (``Absent``), or added."""
    event = {**EVENT, "actor": _changed(ACTOR, actor), "repo": _changed(REPO, repo)} | top
    return encoded({name: value for name, value in event.items() if value is not Absent})


def _changed(members: dict[str, Any], change: Any) -> Any:
    if not isinstance(change, dict):
        return members if change is None else change
    return {name: value for name, value in (members | change).items() if value is not Absent}


def encoded(value: object) -> bytes:
    return json.dumps(value, ensure_ascii=False, separators=(",", ":")).encode()


GOOD = line()
USED = Event(id="12", type="PushEvent", created_at="2015-01-01T15:00:00Z", actor=Actor(**ACTOR), repo=Repo(**REPO))


def actor_part(old: bytes, new: bytes) -> bytes:
    """Return the good line with a part of its actor's text replaced."""
    head, actor, tail = GOOD.partition(encoded(ACTOR))
    assert old in actor
    return head + actor.replace(old, new, 1) + tail


class Odd(NamedTuple):
    """An odd line and what it must come to: an event, None for blank, or the words of the refusal."""

    name: str
    line: bytes
    outcome: Event | str | None


KINDS = [
    # What is an event all the same
    Odd("plain", GOOD, USED),
    Odd("carriage return at the end", GOOD + b"\r", USED),
    Odd("white space around", b" \t" + GOOD + b"  ", USED),
    Odd("white space within", json.dumps(EVENT, indent=1).replace("\n", " ").encode(), USED),
    Odd("byte order mark", b"\xef\xbb\xbf" + GOOD, USED),
    Odd("keys in another order", encoded(dict(reversed(EVENT.items()))), USED),
    Odd("no repo", line(repo=Absent), msgspec.structs.replace(USED, repo=None)),
    Odd("null repo", encoded({**EVENT, "repo": None}), msgspec.structs.replace(USED, repo=None)),
    Odd("extra keys everywhere", line(actor={"display_login": "O"}, repo={"x": 1}, org={"id": 1}, _x=None), USED),
    Odd("a key spelled with an escape, once", actor_part(b'"login"', b'"lo\\u0067in"'), USED),
    Odd("a key repeated in payload only", GOOD.replace(b'{"actor"', b'{"id":1,"id":2,"actor"'), USED),
    Odd(
        "no gravatar_id",
        line(actor={"gravatar_id": Absent}),
        msgspec.structs.replace(USED, actor=Actor(**(ACTOR | {"gravatar_id": None}))),
    ),
    Odd(
        "unicode in an unused text",
        line(payload={"message": "naïve 🙂 \u2028 \x7f"}),
        USED,
    ),
    Odd("a number of 5,000 digits in payload", GOOD.replace(b"[1,", b"[" + b"9" * 5_000 + b","), USED),
    Odd("the same, spaced", GOOD.replace(b"[1,", b"[ " + b"9" * 5_000 + b","), USED),
    Odd(
        "the highest ids",
        line(id=str(INT64), repo={"id": INT64}),
        msgspec.structs.replace(USED, id=str(INT64), repo=Repo(**(REPO | {"id": INT64}))),
    ),
    Odd("leading zeros in the event's id", line(id="0" * 30 + "1"), msgspec.structs.replace(USED, id="0" * 30 + "1")),
    Odd(
        "a bot",
        line(actor={"login": "dependabot[bot]"}),
        msgspec.structs.replace(USED, actor=Actor(**(ACTOR | {"login": "dependabot[bot]"}))),
    ),
    Odd(
        "a login of 255 characters",
        line(actor={"login": "a" * 255}),
        msgspec.structs.replace(USED, actor=Actor(**(ACTOR | {"login": "a" * 255}))),
    ),
    Odd(
        "a leap day",
        line(created_at="2016-02-29T23:59:59Z"),
        msgspec.structs.replace(USED, created_at="2016-02-29T23:59:59Z"),
    ),
    Odd(
        "a time with an offset and a fraction",
        line(created_at="2016-03-01T01:59:59.123+02:00"),
        msgspec.structs.replace(USED, created_at="2016-02-29T23:59:59Z"),
    ),
    Odd("lone surrogate in an unused text", line(payload="X").replace(b"X", b"\\ud800"), USED),
    # Blank
    Odd("empty", b"", None),
    Odd("spaces", b"  \t ", None),
    Odd("only a carriage return", b"\r", None),
    Odd("form feed", b"\x0b\x0c", None),
    Odd("only a byte order mark", b"\xef\xbb\xbf", None),
    # No JSON object, or more than one
    Odd("no JSON", b"hello", "malformed JSON: invalid character (byte 0)"),
    Odd("NaN", b"NaN", "malformed JSON: invalid character (byte 0)"),
    Odd("number", b"17", "a line must be one JSON object: expected an object, got a whole number"),
    Odd("fraction", b"1.5", "a line must be one JSON object: expected an object, got a number with a fraction"),
    Odd("text", b'"x"', "a line must be one JSON object: expected an object, got a string"),
    Odd("null", b"null", "a line must be one JSON object: expected an object, got null"),
    Odd("true", b"true", "a line must be one JSON object: expected an object, got true or false"),
    Odd("array", b"[" + GOOD + b"]", "a line must be one JSON object: expected an object, got an array"),
    Odd("empty object", b"{}", "id is missing"),
    Odd("opening brace of pretty print", b"{", "malformed JSON: Input data was truncated"),
    Odd("closing brace of pretty print", b"}", "malformed JSON: invalid character (byte 0)"),
    Odd("key of pretty print", b'  "id": "12",', "a line must be one JSON object: expected an object, got a string"),
    Odd("cut short", GOOD[:80], "malformed JSON: Input data was truncated"),
    Odd("cut within a text", GOOD[:12], "malformed JSON: Input data was truncated"),
    Odd("two objects", GOOD + GOOD, "more than one JSON value on the line"),
    Odd("two objects, a space between", GOOD + b" " + GOOD, "more than one JSON value on the line"),
    Odd("two objects, a comma between", GOOD + b"," + GOOD, "more than one JSON value on the line"),
    Odd("two objects, a carriage return between", GOOD + b"\r" + GOOD, "more than one JSON value on the line"),
    Odd("trailing comma", GOOD + b",", 'malformed JSON: "," follows the object'),
    Odd("trailing commas", GOOD + b" , ,\r", 'malformed JSON: ", ," follows the object'),
    Odd("trailing comma and bracket", GOOD + b",]", 'malformed JSON: ",]" follows the object'),
    Odd("two objects, commas between", GOOD + b" ,, " + GOOD, "more than one JSON value on the line"),
    Odd("trailing junk", GOOD + b" junk", 'malformed JSON: "junk" follows the object'),
    Odd("trailing brace", GOOD + b"}", 'malformed JSON: "}" follows the object'),
    Odd("single quotes", GOOD.replace(b'"', b"'"), "malformed JSON: object keys must be strings (byte 1)"),
    Odd("comma after the last key", GOOD[:-1] + b",}", "malformed JSON: trailing comma in object (byte {at})"),
    Odd("comment", b"// " + GOOD, "malformed JSON: invalid character (byte 0)"),
    Odd("nested deeply", GOOD.replace(b"[1,", b"[" * 100_000), "malformed JSON: nested too deeply"),
    Odd("two byte order marks", b"\xef\xbb\xbf" * 2 + GOOD, "malformed JSON: invalid character (byte 0)"),
    Odd("a thousand byte order marks", b"\xef\xbb\xbf" * 1_000, "malformed JSON: invalid character (byte 0)"),
    # Bytes
    Odd("bad UTF-8 in a login", actor_part(b"octo", b"oct\xff"), "the line is not valid UTF-8"),
    Odd("bad UTF-8 in an unused text", line(payload="X").replace(b'"X"', b'"\xc3"'), "the line is not valid UTF-8"),
    Odd("bad UTF-8 in an unused key", line(Xx=1).replace(b'"Xx"', b'"\xc3x"'), "the line is not valid UTF-8"),
    Odd("surrogate in UTF-8", actor_part(b"octo", b"o\xed\xa0\x80"), "the line is not valid UTF-8"),
    Odd("UTF-16", GOOD.decode().encode("utf-16"), "the line is not valid UTF-8"),
    Odd("NUL", actor_part(b"octo", b"o\x00"), "malformed JSON: invalid character (byte {at})"),
    Odd("only NUL", b"\x00\x00", "malformed JSON: invalid character (byte 0)"),
    Odd("control character", actor_part(b"octo", b"o\x01"), "malformed JSON: invalid character (byte {at})"),
    Odd("raw tab in an unused text", line(payload="X").replace(b'"X"', b'"\t"'), "malformed JSON: invalid character"),
    Odd("no-break space", "\u00a0".encode(), "malformed JSON: invalid character (byte 0)"),
    Odd(
        "lone surrogate in a login",
        actor_part(b"octo", b"\\ud800"),
        "malformed JSON: unexpected end of escaped utf-16 surrogate pair",
    ),
    Odd("lone low surrogate", actor_part(b"octo", b"\\udc00x"), "malformed JSON: invalid utf-16 surrogate pair"),
    Odd("unknown escape", actor_part(b"octo", b"\\q"), "malformed JSON: invalid escape character in string"),
    # Structure
    Odd("no actor", line(actor=Absent), "actor is missing"),
    Odd("null actor", encoded({**EVENT, "actor": None}), "actor: expected an object, got null"),
    Odd("actor as text", line(actor="octo"), "actor: expected an object, got a string"),
    Odd("actor as array", line(actor=[1]), "actor: expected an object, got an array"),
    Odd("repo as text", line(repo="octo/repo"), "repo: expected an object or null, got a string"),
    Odd("no actor id", line(actor={"id": Absent}), "actor.id is missing"),
    Odd("null id", line(actor={"id": None}), "actor.id: expected a whole number, got null"),
    Odd("id as text", line(actor={"id": "9"}), "actor.id: expected a whole number, got a string"),
    Odd("id as fraction", line(actor={"id": 9.5}), "actor.id: expected a whole number, got a number with a fraction"),
    Odd("id as 9.0", line(actor={"id": 9.0}), "actor.id: expected a whole number, got a number with a fraction"),
    Odd("id as true", line(actor={"id": True}), "actor.id: expected a whole number, got true or false"),
    Odd("id as 1e3", actor_part(b":9,", b":1e3,"), "actor.id: expected a whole number, got a number with a fraction"),
    Odd("id as 1e999", actor_part(b":9,", b":1e999,"), "actor.id: number out of range"),
    Odd("id with a leading zero", actor_part(b":9,", b":09,"), "malformed JSON: invalid number"),
    Odd("id with a plus", actor_part(b":9,", b":+9,"), "malformed JSON: invalid character"),
    Odd("id one too high", line(actor={"id": INT64 + 1}), "actor.id must lie within 9223372036854775807"),
    Odd("id of 25 digits", line(actor={"id": 10**25}), "actor.id must lie within 9223372036854775807"),
    Odd("id of 400 digits", line(actor={"id": 10**400}), "actor.id must lie within 9223372036854775807"),
    Odd("id of 5,000 digits", actor_part(b":9,", b":" + b"9" * 5_000 + b","), "actor.id: "),
    Odd("repo id too low", line(repo={"id": -(10**25)}), "repo.id must lie within 9223372036854775807"),
    Odd("repo id as text", line(repo={"id": "7"}), "repo.id: expected a whole number or null, got a string"),
    Odd("login as number", line(actor={"login": 4}), "actor.login: expected a string or null, got a whole number"),
    Odd("login as object", line(actor={"login": {}}), "actor.login: expected a string or null, got an object"),
    Odd("no event id", line(id=Absent), "id is missing"),
    Odd("event id as number", line(id=12), "id: expected a string, got a whole number"),
    Odd("null type", line(type=None), "type: expected a string, got null"),
    Odd("no created_at", line(created_at=Absent), "created_at is missing"),
    # Keys that stand twice
    Odd("actor twice", GOOD.replace(b'"repo":', b'"actor":' + encoded(ACTOR) + b',"repo":', 1), "key actor stands"),
    Odd("id twice", b'{"id":"1",' + GOOD[1:], "key id stands more than once"),
    Odd("id twice, spaced", b'{ "id" : "1" , ' + GOOD[1:], "key id stands more than once"),
    Odd("id twice, one escaped", b'{"\\u0069d":"1",' + GOOD[1:], "key id stands more than once"),
    Odd("id twice, first of another type", b'{"id":1,' + GOOD[1:], "key id stands more than once"),
    Odd("a key twice that is no text", b'{"\\ud800":0,"\\ud800":0,' + GOOD[1:], USED),
    Odd("a key of the actor twice that is no text", actor_part(b"{", b'{"\\ud800":0,"\\ud800":0,'), USED),
    Odd("a key twice that is long", b"{" + b'"%s":0,' % (b"k" * 300) * 2 + GOOD[1:], USED),
    Odd("payload twice", b'{"payload":[1],' + GOOD[1:], USED),
    Odd("an unused key of the repo twice", GOOD.replace(b'"name"', b'"x":1,"x":"2","name"'), USED),
    Odd(
        "an unused key twice alongside a used one of another type", b'{"x":1,"x":1,"id":1,' + GOOD[1:], "key id stands"
    ),
    Odd("actor id twice", actor_part(b'"id":9', b'"id":9,"id":9'), "key actor.id stands more than once"),
    Odd("login twice", actor_part(b'"login"', b'"login":"a","login"'), "key actor.login stands more than once"),
    Odd("login twice, spaced", actor_part(b'"login"', b' "login" : "a", "login"'), "key actor.login stands more than"),
    Odd("login twice, one escaped", actor_part(b'"login"', b'"lo\\u0067in":"a","login"'), "key actor.login stands"),
    Odd("login twice, first null", actor_part(b'"login"', b'"login":null,"login"'), "key actor.login stands more"),
    Odd("repo name twice", GOOD.replace(b'"name"', b'"name":"a/b","name"'), "key repo.name stands more than once"),
    Odd(
        "login twice and nested deeply",
        actor_part(b'"login"', b'"login":"a","login"').replace(b"[1,", b"[" * 100_000),
        "malformed JSON: nested too deeply",
    ),
    Odd(
        "login twice and a number of 5,000 digits",
        actor_part(b'"login"', b'"login":"a","login"').replace(b"[1,", b"[" + b"9" * 5_000 + b","),
        "key actor.login stands more than once",
    ),
    # Values
    Odd("negative id", line(actor={"id": -9}), 'actor.id must be greater than 0, got "-9" (user_id_positive)'),
    Odd("zero id", line(actor={"id": 0}), 'actor.id must be greater than 0, got "0" (user_id_positive)'),
    Odd("minus zero", actor_part(b":9,", b":-0,"), 'actor.id must be greater than 0, got "0" (user_id_positive)'),
    Odd("no login", line(actor={"login": Absent}), f"{LOGIN_WORDS}, got null (login_format)"),
    Odd("null login", line(actor={"login": None}), f"{LOGIN_WORDS}, got null (login_format)"),
    Odd("empty login", line(actor={"login": ""}), f'{LOGIN_WORDS}, got "" (login_format)'),
    Odd("new line after the login", line(actor={"login": "octo\n"}), f'{LOGIN_WORDS}, got "octo\\n" (login_format)'),
    Odd("space in the login", line(actor={"login": "oc to"}), f'{LOGIN_WORDS}, got "oc to" (login_format)'),
    Odd("unicode in the login", line(actor={"login": "öcto"}), f'{LOGIN_WORDS}, got "\\u00f6cto" (login_format)'),
    Odd(
        "unicode digit in the login", line(actor={"login": "o\u0663"}), f'{LOGIN_WORDS}, got "o\\u0663" (login_format)'
    ),
    Odd("escaped NUL in the login", line(actor={"login": "o\0"}), f'{LOGIN_WORDS}, got "o\\u0000" (login_format)'),
    Odd("bot in the middle", line(actor={"login": "a[bot]b"}), f'{LOGIN_WORDS}, got "a[bot]b" (login_format)'),
    Odd("login of 256 characters", line(actor={"login": "a" * 256}), "login must have at most 255 characters, got "),
    Odd("gravatar of 256 characters", line(actor={"gravatar_id": "é" * 256}), "gravatar_id must have at most 255"),
    Odd("no url", line(actor={"url": Absent}), "url must be an http(s) URL of printable ASCII, got null (url_format)"),
    Odd("ftp url", line(actor={"url": "ftp://x"}), 'url must be an http(s) URL of printable ASCII, got "ftp://x"'),
    Odd("bare scheme", line(actor={"url": "https://"}), "url must be an http(s) URL of printable ASCII"),
    Odd("unicode url", line(actor={"url": "https://ö"}), "url must be an http(s) URL of printable ASCII"),
    Odd("url of 256 characters", line(actor={"url": "https://" + "u" * 248}), "url must have at most 255 characters"),
    Odd(
        "empty avatar_url",
        line(actor={"avatar_url": ""}),
        'avatar_url must be an http(s) URL of printable ASCII, got ""',
    ),
    Odd("empty type", line(type=""), "type must not be empty"),
    Odd("empty event id", line(id=""), f'{ID_WORDS}, got ""'),
    Odd("event id with letters", line(id="12a"), f'{ID_WORDS}, got "12a"'),
    Odd("event id with a sign", line(id="-12"), f'{ID_WORDS}, got "-12"'),
    Odd("event id with a space", line(id="12 "), f'{ID_WORDS}, got "12 "'),
    Odd("event id with an underscore", line(id="1_2"), f'{ID_WORDS}, got "1_2"'),
    Odd("event id of unicode digits", line(id="\u0661\u0662"), f'{ID_WORDS}, got "\\u0661\\u0662"'),
    Odd("event id one too high", line(id=str(INT64 + 1)), f'{ID_WORDS}, got "9223372036854775808"'),
    Odd("event id of 5,000 digits", line(id="1" * 5_000), f'{ID_WORDS}, got "1111'),
    Odd("impossible day", line(created_at="2015-02-29T15:00:00Z"), f'{TIME_WORDS}, got "2015-02-29T15:00:00Z"'),
    Odd("impossible month", line(created_at="2015-13-01T15:00:00Z"), f'{TIME_WORDS}, got "2015-13-01T15:00:00Z"'),
    Odd("impossible hour", line(created_at="2015-01-01T24:00:00Z"), f'{TIME_WORDS}, got "2015-01-01T24:00:00Z"'),
    Odd("leap second", line(created_at="2016-12-31T23:59:60Z"), f'{TIME_WORDS}, got "2016-12-31T23:59:60Z"'),
    Odd("year 0", line(created_at="0000-01-01T00:00:00Z"), f'{TIME_WORDS}, got "0000-01-01T00:00:00Z"'),
    Odd("no Z", line(created_at="2015-01-01T15:00:00"), f'{TIME_WORDS}, got "2015-01-01T15:00:00"'),
    Odd("year 9999", line(created_at="9999-01-01T00:00:00Z"), "created_at must not be more than a day in the future, "),
    Odd("offset of 25 hours", line(created_at="2015-01-01T15:00:00+25:00"), TIME_WORDS),
    Odd("offset of 60 minutes", line(created_at="2015-01-01T15:00:00+05:60"), TIME_WORDS),
    Odd("offset of 99 minutes", line(created_at="2015-01-01T15:00:00-0099"), TIME_WORDS),
    Odd("offset past the last year", line(created_at="9999-12-31T23:59:59-01:00"), TIME_WORDS),
    Odd("fraction of ten digits", line(created_at="2015-01-01T15:00:00.0123456789Z"), TIME_WORDS),
    Odd("fraction without a zone", line(created_at="2015-01-01T15:00:00.5"), TIME_WORDS),
    Odd("week date", line(created_at="2015-W01-4T15:00:00Z"), TIME_WORDS),
    Odd("unicode digits in the time", line(created_at="201\u0665-01-01T15:00:00Z"), TIME_WORDS),
    Odd("new line after the time", line(created_at="2015-01-01T15:00:00Z\n"), TIME_WORDS),
    Odd("empty time", line(created_at=""), f'{TIME_WORDS}, got ""'),
    Odd("time as number", line(created_at=1420124400), "created_at: expected a string, got a whole number"),
]
