"""The sample: generated events in GH Archive's format, the same bytes for the same arguments on every machine.

Belongs here: the users' activity, the form of each type of event, and the writing of the file. Not here: the reading or
checking of events. Every person, repository and organisation is invented: logins consist of syllables, and ids are
above those of GitHub.

Only ``random()`` and ``getrandbits()`` are used, whose sequences Python keeps; ``choices`` and ``shuffle`` may change.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import time
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from itertools import accumulate, islice
from random import Random
from typing import TYPE_CHECKING

from ghsync_dagster.domain.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator
    from pathlib import Path
    from typing import BinaryIO

    Payload = Callable[[Random, str], str]

SAMPLE_EVENTS = 28_600
SAMPLE_SEED = 20_150_301
SAMPLE_HOUR = datetime(2015, 3, 1, 17, tzinfo=UTC)
MAX_EVENTS = 6_000_000

_FIRST_HOUR = datetime(2015, 1, 1, tzinfo=UTC)  # before it, GH Archive's events have another shape
_IDS_PER_HOUR = 20_000_000  # more than MAX_EVENTS events use, gaps included: a later hour has higher event ids
_LINES_PER_WRITE = 512

_SYLLABLES = tuple(consonant + vowel for consonant in "bdjlmnrstv" for vowel in "aeiou")
_WORDS = tuple(first + second for first in _SYLLABLES for second in _SYLLABLES)
_NAMES = 6_249_989  # a prime below len(_WORDS) ** 2: multiplying modulo it gives each user a name of its own
_NAME_STEP = 2_654_435
_ID_STEP = 3_141_593
_FIRST_USER_ID = 900_000_000
_FIRST_ORG_ID = 890_000_000
_FIRST_REPO_ID = 20_000_000
_SEPARATORS = ("",) * 11 + ("-",) * 4 + ("_",)
_ENDINGS = ("",) * 11 + ("7", "42", "88", "-dev", "hub")
_NEW_ENDINGS = ("-io", "2", "-labs", "js")
_RENAMED_ONE_IN = 61
_BOTS = (
    "dependabot[bot]", "renovate[bot]", "github-actions[bot]", "rebuto-bot", "lavida-bot", "mirelo-bot",
    "tunaso-bot", "dovalu-bot", "senobi-bot", "jorita-bot", "bulemo-bot", "vidaro-bot",
)  # fmt: skip
# The cube of a uniform number picks one of 930 users for each of 1,000 events: 464 act, 59 % of them once, 23 % twice.
_POOL_PER_THOUSAND = 930

_REPOS = (
    "api", "app", "blog", "bot", "cli", "client", "config", "core", "data", "demo", "docs", "dots", "engine", "forum",
    "game", "home", "infra", "lib", "maps", "notes", "parser", "plugin", "proxy", "sdk", "server", "site", "store",
    "tests", "theme", "tools", "web", "wiki",
)  # fmt: skip
_BRANCHES = ("master", "master", "master", "master", "develop", "gh-pages", "fix/build", "feature/search")
_TEXTS = tuple(
    json.dumps(text, ensure_ascii=False)
    for text in (
        "Fix the build", "Add tests", "Update README", "Crash on empty input", "Support \"quoted\" names",
        "Typo", "Works for me", "First line\nSecond line", "Mise à jour du résumé", "修正布局", "Merged, thanks 👍",
        "Path C:\\temp is refused", "Add a search box", "Bump version", "Remove dead code", "Slow on large files",
    )
)  # fmt: skip
_SIZES = (1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 1, 2, 2, 3, 5)
_GAPS = (1, 1, 1, 1, 1, 1, 1, 2, 2, 2, 2, 3, 3, 4, 5, 6)


@dataclass(frozen=True, slots=True)
class SampleReport:
    """The facts of a written sample.

    Attributes:
        path: The file.
        events: Lines in it.
        users: Distinct values of ``actor.id`` in it.
        renames: Users with two logins.
        size: Bytes.
        sha256: Hex digest of the file.
        seconds: Wall time of the writing.
    """

    path: Path
    events: int
    users: int
    renames: int
    size: int
    sha256: str
    seconds: float


def write_sample(
    path: Path,
    *,
    events: int = SAMPLE_EVENTS,
    seed: int = SAMPLE_SEED,
    hour: datetime = SAMPLE_HOUR,
    progress: Callable[[int, int], None] | None = None,
) -> SampleReport:
    """Write generated events of one hour as JSON lines; the file appears whole or not at all.

    Args:
        path: The file to write; an existing one is replaced.
        events: How many, 1 to ``MAX_EVENTS``. The number of users grows in proportion: about 0.46 an event.
        seed: Selects who acts when. A user has the same id with every seed and hour.
        hour: Start of the hour, with a time zone, 2015 or later.
        progress: Called with events written so far and events in all, every few hundred events.

    Returns:
        The file's facts.

    Raises:
        ConfigError: An argument is out of range, or the file can't be written.
    """
    started = time.monotonic()
    start = _checked_hour(hour)
    if not 1 <= events <= MAX_EVENTS:
        raise ConfigError(
            f"A sample of {events} events can't be generated.", way_out=f"Ask for 1 to {MAX_EVENTS:,} events."
        )
    population = _Population(events)
    lines = _lines(population, events, Random(seed), start)  # noqa: S311 - repeatable, not secret
    part = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with part.open("xb") as file:
                size, sha256 = _write(file, lines, events, progress)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
    except OSError as error:
        raise ConfigError(
            f"{path} can't be written ({error.strerror or type(error).__name__}).",
            way_out="Name a file in a folder that can be written to and has room.",
        ) from error
    return SampleReport(path, events, population.users, population.renames, size, sha256, time.monotonic() - started)


def _checked_hour(hour: datetime) -> datetime:
    if hour.tzinfo is None or hour.minute or hour.second or hour.microsecond or hour < _FIRST_HOUR:
        raise ConfigError(
            f"{hour.isoformat()} is not the start of an hour of GH Archive's events.",
            way_out=f"Give a whole hour with its time zone, {_FIRST_HOUR:%Y-%m-%dT%H:%M:%SZ} or later.",
        )
    return hour.astimezone(UTC)


def _write(
    file: BinaryIO, lines: Iterator[str], events: int, progress: Callable[[int, int], None] | None
) -> tuple[int, str]:
    size, written, digest = 0, 0, hashlib.sha256()
    while block := list(islice(lines, _LINES_PER_WRITE)):
        data = "".join(block).encode()
        file.write(data)
        digest.update(data)
        size += len(data)
        written += len(block)
        if progress is not None:
            progress(written, events)
    file.flush()
    os.fsync(file.fileno())
    return size, digest.hexdigest()


class _Population:
    """The users that may act: each is a number, so that one byte for each is enough."""

    __slots__ = ("_seen", "pool")

    def __init__(self, events: int) -> None:
        self.pool = len(_BOTS) + 1 + events * _POOL_PER_THOUSAND // 1000
        self._seen = bytearray(self.pool)

    def act(self, number: int, second: int) -> str:
        """Record that a user acts in this second of the hour, and return its login then."""
        renamed = _is_renamed(number, second)
        self._seen[number] |= 2 if renamed else 1
        return _login(number) + _NEW_ENDINGS[number & 3] if renamed else _login(number)

    @property
    def users(self) -> int:
        """How many have acted."""
        return self.pool - self._seen.count(0)

    @property
    def renames(self) -> int:
        """How many have acted under both of their logins."""
        return self._seen.count(3)


def _is_renamed(number: int, second: int) -> bool:
    """Return whether the user has its new login in this second: each renamed user changes at another time."""
    return number % _RENAMED_ONE_IN == _RENAMED_ONE_IN - 1 and second >= 600 + number * 7 % 2400


def _login(number: int) -> str:
    if number < len(_BOTS):
        return _BOTS[number]
    name = number * _NAME_STEP % _NAMES
    head, tail = divmod(name, len(_WORDS))
    return _WORDS[head] + _SEPARATORS[name & 15] + _WORDS[tail] + _ENDINGS[name >> 4 & 15]


def _user_id(number: int) -> int:
    return _FIRST_USER_ID + number * _ID_STEP % _NAMES


def _lines(population: _Population, events: int, rng: Random, hour: datetime) -> Iterator[str]:
    """Yield the events in time order, one JSON line each."""
    hours = (hour - _FIRST_HOUR) // timedelta(hours=1)
    event_id = hours * _IDS_PER_HOUR + rng.getrandbits(20)
    pool = population.pool
    for second, count in enumerate(_events_by_second(events, rng)):
        created = f"{hour + timedelta(seconds=second):%Y-%m-%dT%H:%M:%SZ}"
        for _ in range(count):
            event_id += _GAPS[rng.getrandbits(4)]
            uniform = rng.random()
            number = int(uniform * uniform * uniform * pool)
            login, user_id = population.act(number, second), _user_id(number)
            repo_id, repo, org = _repository(rng, number, login, pool)
            kind, payload = _KIND_OF[rng.getrandbits(10)]
            yield (
                f'{{"id":"{event_id}","type":"{kind}","actor":{{"id":{user_id},"login":"{login}","gravatar_id":"",'
                f'"url":"https://api.github.com/users/{login}",'
                f'"avatar_url":"https://avatars.githubusercontent.com/u/{user_id}?"}},'
                f'"repo":{{"id":{repo_id},"name":"{repo}","url":"https://api.github.com/repos/{repo}"}},'
                f'"payload":{payload(rng, repo)},"public":true,"created_at":"{created}"{org}}}\n'
            )


def _events_by_second(events: int, rng: Random) -> Iterator[int]:
    """Spread the events over the 3,600 seconds of the hour, unevenly."""
    marks = list(accumulate(64 + rng.getrandbits(6) for _ in range(3600)))
    before = 0
    for mark in marks:
        until = events * mark // marks[-1]
        yield until - before
        before = until


def _repository(rng: Random, number: int, login: str, pool: int) -> tuple[int, str, str]:
    """Return id and name of the repository, and the organisation as the event's last field."""
    dice, word = rng.getrandbits(8), rng.getrandbits(5)
    if dice < 40:
        uniform = rng.random()
        org = int(uniform * uniform * (pool // 16 + 1))
        name = _WORDS[org * 7 % len(_WORDS)] + "-" + _SYLLABLES[org // len(_WORDS) % 50] + "lab"
        return _repo_id(_NAMES + org, word), f"{name}/{_REPOS[word]}", _org(_FIRST_ORG_ID + org, name)
    if dice < 134 or number < len(_BOTS):
        owner = len(_BOTS) + int(rng.random() * (pool - len(_BOTS)))
        return _repo_id(owner, word), f"{_login(owner)}/{_REPOS[word]}", ""
    return _repo_id(number, word), f"{login}/{_REPOS[word]}", ""


def _repo_id(owner: int, word: int) -> int:
    return _FIRST_REPO_ID + owner * len(_REPOS) + word


def _org(org_id: int, name: str) -> str:
    return (
        f',"org":{{"id":{org_id},"login":"{name}","gravatar_id":"","url":"https://api.github.com/orgs/{name}",'
        f'"avatar_url":"https://avatars.githubusercontent.com/u/{org_id}?"}}'
    )


def _text(rng: Random) -> str:
    return _TEXTS[rng.getrandbits(4)]


def _issue(rng: Random, state: str = "open") -> str:
    bits = rng.getrandbits(36)
    return f'{{"id":{bits >> 9},"number":{(bits & 511) + 1},"title":{_text(rng)},"state":"{state}"}}'


def _push(rng: Random, _repo: str) -> str:
    bits = rng.getrandbits(36)
    size = _SIZES[bits >> 32]
    return (
        f'{{"push_id":{500_000_000 + (bits >> 3 & 0x3FFFFFF)},"size":{size},"distinct_size":{size},'
        f'"ref":"refs/heads/{_BRANCHES[bits & 7]}"}}'
    )


def _create(rng: Random, _repo: str) -> str:
    dice = rng.getrandbits(3)
    ref, kind = ("null", "repository") if dice < 3 else ('"v1.0"', "tag") if dice == 3 else ('"develop"', "branch")
    return f'{{"ref":{ref},"ref_type":"{kind}","master_branch":"master","description":null,"pusher_type":"user"}}'


def _watch(_rng: Random, _repo: str) -> str:
    return '{"action":"started"}'


def _issue_comment(rng: Random, _repo: str) -> str:
    comment = f'{{"id":{rng.getrandbits(27)},"body":{_text(rng)}}}'
    return f'{{"action":"created","issue":{_issue(rng)},"comment":{comment}}}'


def _issues(rng: Random, _repo: str) -> str:
    action, state = (("opened", "open"), ("opened", "open"), ("closed", "closed"), ("reopened", "open"))[
        rng.getrandbits(2)
    ]
    return f'{{"action":"{action}","issue":{_issue(rng, state)}}}'


def _pull_request(rng: Random, _repo: str) -> str:
    action, state = (("opened", "open"), ("closed", "closed"))[rng.getrandbits(1)]
    bits = rng.getrandbits(36)
    number = (bits & 511) + 1
    return (
        f'{{"action":"{action}","number":{number},"pull_request":'
        f'{{"id":{bits >> 9},"number":{number},"state":"{state}","title":{_text(rng)}}}}}'
    )


def _fork(rng: Random, repo: str) -> str:
    name = repo.split("/")[1]
    owner = _WORDS[rng.getrandbits(11)]
    return f'{{"forkee":{{"id":{rng.getrandbits(27)},"name":"{name}","full_name":"{owner}-fork/{name}"}}}}'


def _delete(rng: Random, _repo: str) -> str:
    kind = ("branch", "branch", "branch", "tag")[rng.getrandbits(2)]
    return f'{{"ref":"old-{rng.getrandbits(8)}","ref_type":"{kind}","pusher_type":"user"}}'


def _review_comment(rng: Random, _repo: str) -> str:
    comment = f'{{"id":{rng.getrandbits(27)},"path":"README.md","position":null,"body":{_text(rng)}}}'
    return f'{{"action":"created","comment":{comment},"pull_request":{_issue(rng)}}}'


def _commit_comment(rng: Random, _repo: str) -> str:
    return f'{{"comment":{{"id":{rng.getrandbits(27)},"position":null,"line":null,"path":null,"body":{_text(rng)}}}}}'


def _gollum(rng: Random, repo: str) -> str:
    return (
        '{"pages":[{"page_name":"Home","title":"Home","summary":null,"action":"edited",'
        f'"sha":"{rng.getrandbits(160):040x}","html_url":"https://github.com/{repo}/wiki/Home"}}]}}'
    )


def _release(rng: Random, _repo: str) -> str:
    bits = rng.getrandbits(28)
    tag = f"v{bits & 7}.{bits >> 3 & 15}"
    release = f'{{"id":{bits},"tag_name":"{tag}","name":"{tag}","draft":false,"prerelease":false}}'
    return f'{{"action":"published","release":{release}}}'


def _member(rng: Random, _repo: str) -> str:
    number = len(_BOTS) + rng.getrandbits(13)
    login = _login(number)
    member = f'{{"login":"{login}","id":{_user_id(number)},"url":"https://api.github.com/users/{login}"}}'
    return f'{{"member":{member},"action":"added"}}'


def _public(_rng: Random, _repo: str) -> str:
    return "{}"


# Shares of 1,024, as measured on real hours of 2015.
_KINDS: tuple[tuple[str, Payload, int], ...] = (
    ("PushEvent", _push, 525),
    ("CreateEvent", _create, 133),
    ("WatchEvent", _watch, 111),
    ("IssueCommentEvent", _issue_comment, 76),
    ("IssuesEvent", _issues, 49),
    ("PullRequestEvent", _pull_request, 43),
    ("ForkEvent", _fork, 32),
    ("DeleteEvent", _delete, 23),
    ("PullRequestReviewCommentEvent", _review_comment, 12),
    ("CommitCommentEvent", _commit_comment, 6),
    ("GollumEvent", _gollum, 6),
    ("ReleaseEvent", _release, 5),
    ("MemberEvent", _member, 2),
    ("PublicEvent", _public, 1),
)
_KIND_OF = tuple((kind, payload) for kind, payload, share in _KINDS for _ in range(share))
