"""Every environment variable that ghsync reads, typed and documented: nowhere else is the environment read.

``NAME_FILE`` is a path whose content is the value of ``NAME``, for any name below, as Docker secrets need it. A name
that looks like one of these and is none is refused: else the setting that was meant would silently keep its default.

A field's variable is its name in capitals, with the prefix GHSYNC_ unless it begins like another program's
(``_THEIRS``): ``home`` is GHSYNC_HOME, ``mongodb_uri`` is MONGODB_URI. The docstring of a field describes it here, in
``.env.example`` and in Dagster's UI.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import sys
from difflib import get_close_matches
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from dotenv import dotenv_values
from dotenv.parser import parse_stream
from pydantic import AfterValidator, AliasGenerator, BeforeValidator, Field, SecretStr, ValidationError, field_validator
from pydantic_settings import BaseSettings, PydanticBaseSettingsSource, SettingsConfigDict

from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.stores.mongo.uri import wrong_options

if TYPE_CHECKING:
    from collections.abc import Sequence

    from pydantic.fields import FieldInfo

_OURS = "GHSYNC_"
_SHARED = ("MONGO", "KAFKA_", "SPARK_", "MYSQL_", "CONNECT_")
"""Prefixes that other programs use too: only a name close to a setting's is taken for a misspelling."""
_THEIRS = ("MONGODB_", "KAFKA_", "SPARK_", "MYSQL_", "CONNECT_")
_NEAR = 0.87
_USUAL = {
    "MONGODB_URI": "MONGO_URI MONGO_URL MONGODB_URL MONGO_DSN MONGODB_DSN MONGO_HOST MONGODB_HOST "
    "MONGO_CONNECTION_STRING MONGODB_CONNECTION_STRING",
    "MONGODB_DATABASE": "MONGO_DATABASE MONGO_DB MONGODB_DB MONGO_DBNAME MONGODB_DBNAME MONGO_DB_NAME MONGODB_DB_NAME "
    "MONGO_NAME MONGODB_NAME",
    "MONGODB_COLLECTION": "MONGO_COLLECTION MONGO_COLLECTION_NAME MONGODB_COLLECTION_NAME",
    "KAFKA_BOOTSTRAP_SERVERS": "KAFKA_BOOTSTRAP KAFKA_BROKER KAFKA_BROKERS KAFKA_BROKER_LIST KAFKA_BROKER_URL "
    "KAFKA_SERVERS KAFKA_HOSTS KAFKA_URL",
    "KAFKA_TOPIC": "KAFKA_TOPIC_NAME",
    "KAFKA_GROUP_ID": "KAFKA_GROUP KAFKA_CONSUMER_GROUP KAFKA_CONSUMER_GROUP_ID",
    "MYSQL_URL": "MYSQL_URI MYSQL_DSN MYSQL_CONNECTION_STRING",
    "CONNECT_URL": "KAFKA_CONNECT_URL",
    "SPARK_MASTER": "SPARK_MASTER_URL",
    "SPARK_DRIVER_MEMORY": "SPARK_MEMORY SPARK_MEM SPARK_DRIVER_MEM",
    "GHSYNC_EVENTS_PATH": "EVENTS_PATH",
}
"""Other programs' names for a setting: if ignored, the local server or the default would silently be used."""
_OF_MAKE = "EVENTS"
_DATABASE_BYTES = 63
_COLLECTION_BYTES = 170
"""MongoDB allows 255 with the database; the platform's own collections have longer names."""
_OF_SERVER = ("admin", "config", "local")
_MASTER = re.compile(
    r"local(\[(\*|[1-9][0-9]*)(, *[0-9]+)?\])?|local-cluster\[[0-9, ]+\]|yarn|k8s://\S+"
    r"|spark://[^/\s,]+:[0-9]+(,[^/\s,]+:[0-9]+)*"
)
_TOPIC = re.compile(r"[A-Za-z0-9._-]{1,245}")
"""A name that Kafka allows, with room for .dlq."""


def _form(pattern: str, words: str) -> AfterValidator:
    """Return a validator of a pattern; ``words`` is its error."""

    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(words)
        return value

    return AfterValidator(check)


_Upper = BeforeValidator(lambda value: value.upper() if isinstance(value, str) else value)
_Lower = BeforeValidator(lambda value: value.lower() if isinstance(value, str) else value)


def _variable(field_name: str) -> str:
    """Return the variable of a field: other programs' names stay, others begin with GHSYNC_."""
    name = field_name.upper()
    return name if name.startswith(_THEIRS) else _OURS + name


class FileSource(PydanticBaseSettingsSource):
    """Reads ``NAME`` from the file that ``NAME_FILE`` names, in the environment or in ``.env``."""

    def get_field_value(self, field: FieldInfo, field_name: str) -> tuple[Any, str, bool]:
        """Return the value of one field, its key, and False: values are plain text."""
        variable = str(field.validation_alias or field_name)
        path = self._path(variable)
        if path is None:
            return None, variable, False
        try:
            value = Path(path).read_text(encoding="utf-8").rstrip("\r\n")
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"{variable}_FILE names {path}, which can't be read ({type(error).__name__}).",
                way_out=f"Point {variable}_FILE at a readable UTF-8 text file.",
            ) from None
        if not value:
            # An empty value would count as unset, and another server might be used.
            raise ConfigError(
                f"{variable}_FILE names {path}, which is empty.", way_out=f"Write the value of {variable} into it."
            )
        return value, variable, False

    def _path(self, variable: str) -> str | None:
        """Return the path in the environment, else in ``.env``; None if the value itself is given first."""
        for given in (os.environ, dotenv_values(str(self.config.get("env_file") or os.devnull))):
            path, value = given.get(f"{variable}_FILE"), given.get(variable)
            if path and value:
                raise ConfigError(f"Both {variable} and {variable}_FILE are set.", way_out="Set only one of them.")
            if path or value:
                return path or None
        return None

    def __call__(self) -> dict[str, Any]:
        """Return the values of all fields with a file, by variable."""
        values = (self.get_field_value(field, name) for name, field in self.settings_cls.model_fields.items())
        return {variable: value for value, variable, _ in values if value is not None}


class Settings(BaseSettings):
    """The settings of one process, read from the environment and from ``.env`` in the working folder."""

    model_config = SettingsConfigDict(
        env_file=".env",
        extra="ignore",
        frozen=True,
        env_ignore_empty=True,
        use_attribute_docstrings=True,
        alias_generator=AliasGenerator(validation_alias=_variable),
    )

    home: Path = Path(".ghsync")
    """Folder of all local state: materialized data, local servers, logs, Dagster's own storage."""
    cache: Path | None = None
    """Folder of downloaded jars, shared by checkouts. Default: the user's cache folder."""
    events_path: str = "data/sample_data.json"
    """File, folder or glob of GitHub events; several as a JSON list, ["a.json", "more/*.gz"]; see
    docs/explain/files.md. Unset: the sample, for the local MongoDB only."""
    max_quarantined_ratio: float = Field(default=0.01, ge=0, le=1)
    """The share of bad lines (0 to 1) above which the check quarantined_ratio fails."""
    rules_module: str | None = None
    """Python module whose RULES (a sequence of ghsync_dagster.domain.user.Rule) join the built-in ones."""
    lease_wait_seconds: float = Field(default=600, ge=0)
    """How long a load waits for another load of the same collection before it gives up."""
    lease_quiet_seconds: float = Field(default=6, ge=1, le=15)
    """How long MongoDB may still execute the last command of a load that died: the next load waits so long."""
    retry_attempts: int = Field(default=5, ge=1)
    """Tries of one step while a server is away. Permanent errors are never retried."""
    server_timeout_seconds: float = Field(default=10, gt=0)
    """How long one try waits until a server is reachable."""
    alert_webhook_url: SecretStr | None = None
    """URL that gets a JSON POST for each failed asset check and run. Unset: they are only logged."""
    git_url: (
        Annotated[
            str,
            _form(
                r"https://[^/\s@]*git(hub|lab)[^/\s@]*/[^\s@]*[^/\s@]",
                "it is an address without credentials and without / at its end, such as https://github.com/OWNER/REPO",
            ),
        ]
        | None
    ) = None
    """Repository of this code, as https://github.com/OWNER/REPO (GitHub or GitLab). Dagster's UI then links to it.
    Unset: it names files of this machine."""
    git_revision: Annotated[str, _form(r"\S+", "it has no spaces: a branch, tag or commit, such as main")] = "main"
    """Branch, tag or commit that those links lead to."""
    log_level: Annotated[Literal["DEBUG", "INFO", "WARNING", "ERROR"], _Upper] = "INFO"
    """DEBUG, INFO, WARNING or ERROR, in any case."""
    log_format: Annotated[Literal["auto", "json", "console"], _Lower] = "auto"
    """json, console, or auto: json where standard error is not a terminal."""
    mongodb_uri: SecretStr | None = None
    """MongoDB to write to. Unset: a local server is started (see ghsync up mongo)."""
    mongodb_database: str = Field(default="new_data", min_length=1)
    """Database of the collection and of the platform's own _ghsync_* collections."""
    mongodb_collection: str = Field(default="Users", min_length=1)
    """Collection that is kept in sync."""
    spark_master: str = "local[*]"
    """Spark master URL: local[*] or spark://host:port."""
    spark_driver_memory: Annotated[
        str, _form("[1-9][0-9]*[mg]", "it is a whole number and m or g, such as 512m or 2g"), _Lower
    ] = "1g"
    """Heap of the Spark driver, such as 512m or 2g."""
    spark_driver_java_options: str = ""
    """Further options of the Spark driver's JVM, quoted as in a shell."""
    spark_jars_packages: str | None = None
    """Maven coordinates for spark.jars.packages, which replace the locked connector jar."""

    kafka_bootstrap_servers: str | None = None
    """Kafka brokers, host:port, comma-separated. Unset: the local broker (see ghsync up kafka)."""
    kafka_topic: str = Field(default="mysql-server.new_data.Users", min_length=1)
    """Topic of Debezium's change events. Dead letters go to this name with .dlq at its end."""
    kafka_group_id: str = Field(default="ghsync-users", min_length=1)
    """Consumer group whose committed offsets mark what has been applied."""
    kafka_security_protocol: Annotated[Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"], _Upper] = "PLAINTEXT"
    """PLAINTEXT, SSL, SASL_PLAINTEXT or SASL_SSL."""
    kafka_sasl_mechanism: Annotated[Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None, _Upper] = None
    """PLAIN, SCRAM-SHA-256 or SCRAM-SHA-512."""
    kafka_sasl_username: str | None = None
    """User for SASL."""
    kafka_sasl_password: SecretStr | None = None
    """Password for SASL."""
    kafka_ssl_ca_location: Path | None = None
    """PEM file of the authorities that verify the brokers' certificates."""
    kafka_ssl_certificate_location: Path | None = None
    """PEM file of the client's certificate."""
    kafka_ssl_key_location: Path | None = None
    """PEM file of the client's key."""
    kafka_ssl_key_password: SecretStr | None = None
    """Password of the client's key."""
    mysql_url: SecretStr | None = None
    """MySQL as mysql://user:password@host:port/new_data, its options in docs/operate/configure.md (TLS). Unset: the
    local server (see ghsync up mysql)."""
    connect_url: str | None = None
    """Kafka Connect's REST address. Unset: the local worker (see ghsync up connect)."""
    connect_secrets: str | None = None
    """Folder on the Connect worker's machine with the files connector-user and connector-password. The connector's
    configuration then names these files and holds no password."""
    topic_partitions: int = Field(default=1, ge=1)
    """Partitions that the topic of changes gets when it is created: as many consumers can share its work."""
    consumer: Annotated[Literal["slices", "service"], _Lower] = "slices"
    """slices: the sensor cdc_supervisor keeps runs of cdc_sync_job going. service: ghsync cdc run is kept running
    elsewhere, and the sensor starts nothing."""
    cdc_slice_seconds: float = Field(default=3600, gt=0)
    """How long one run of cdc_sync_job consumes before the next one takes over."""
    # The metrics cover five minutes.
    cdc_report_seconds: float = Field(default=10, gt=0, le=300)
    """How often the consumer logs and observes counts, lag and latency."""
    cdc_session_timeout_seconds: float = Field(default=10, ge=6)
    """How long Kafka waits for a silent consumer before others take its partitions."""
    max_lag_records: int = Field(default=10_000, ge=0)
    """The number of waiting change events above which the check kafka_lag fails."""
    max_latency_ms: float = Field(default=1_000, gt=0)
    """The p99 from database commit to stored document above which the check cdc_latency fails."""
    repair_max_users: int = Field(default=10_000, ge=0)
    """How many users ghsync cdc repair asks for without --yes."""
    repair_users_a_second: float = Field(default=5_000, gt=0)
    """How many users a consumer repairs a second at most, so that MySQL and the stream have room."""
    connector_still_seconds: float = Field(default=120, gt=0)
    """How long the connector's offset may stand still while MySQL writes, before connector_running fails."""
    metrics_port: int | None = Field(default=None, ge=0, le=65535)
    """Port of the consumer's Prometheus endpoint; 0 takes a free one. Unset: no endpoint."""
    metrics_host: str = "127.0.0.1"
    """Address that the Prometheus endpoint binds to."""

    @field_validator("mongodb_uri")
    @classmethod
    def _names_a_server(cls, uri: SecretStr | None) -> SecretStr | None:
        # pymongo accepts a bare host too, Spark's connector does not.
        if uri is not None and not uri.get_secret_value().startswith(("mongodb://", "mongodb+srv://")):
            raise ValueError("it needs mongodb:// or mongodb+srv:// at its beginning")
        if uri is not None and (wrong := wrong_options(uri.get_secret_value())):
            raise ValueError(wrong)
        return uri

    @field_validator("spark_master")
    @classmethod
    def _is_a_master(cls, master: str) -> str:
        if not _MASTER.fullmatch(master):
            raise ValueError("Spark takes local[*], local[4], spark://host:port, yarn or k8s://...")
        return master

    @field_validator("home", "cache")
    @classmethod
    def _is_a_folder(cls, folder: Path | None) -> Path | None:
        try:
            return folder and folder.expanduser()
        except RuntimeError:
            raise ValueError("its ~ is no user's home folder") from None

    @field_validator("spark_driver_java_options")
    @classmethod
    def _is_quoted(cls, options: str) -> str:
        try:
            shlex.split(options)
        except ValueError as error:
            raise ValueError(f"its quotes are not as in a shell ({str(error).lower()})") from None
        return options

    @field_validator("mongodb_database")
    @classmethod
    def _is_a_database(cls, name: str) -> str:
        if wrong := sorted(set(name) & set('/\\. "$\x00')):
            raise ValueError(f"MongoDB allows no {wrong[0]!r} in the name of a database")
        if len(name.encode()) > _DATABASE_BYTES:
            raise ValueError(f"MongoDB allows up to {_DATABASE_BYTES} bytes for the name of a database")
        if name.lower() in _OF_SERVER:
            raise ValueError(f"{name} is MongoDB's own")
        return name

    @field_validator("mongodb_collection")
    @classmethod
    def _is_a_collection(cls, name: str) -> str:
        if wrong := sorted(set(name) & set("$\x00")):
            raise ValueError(f"MongoDB allows no {wrong[0]!r} in the name of a collection")
        if len(name.encode()) > _COLLECTION_BYTES:
            raise ValueError(f"up to {_COLLECTION_BYTES} bytes leave room for the names of ghsync's own collections")
        if name.startswith(".") or name.endswith(".") or ".." in name:
            raise ValueError("MongoDB allows no empty part between dots in the name of a collection")
        if name.startswith("system."):
            raise ValueError("MongoDB keeps names that begin with system. for itself")
        if name.startswith("_ghsync_"):
            raise ValueError("ghsync keeps names that begin with _ghsync_ for itself")
        return name

    @field_validator("kafka_topic")
    @classmethod
    def _is_a_topic(cls, name: str) -> str:
        if not _TOPIC.fullmatch(name) or name in (".", ".."):
            raise ValueError("Kafka allows up to 249 letters, digits, dots, _ and - in a name, and .dlq is put to it")
        return name

    @field_validator("connect_url")
    @classmethod
    def _is_http(cls, url: str | None) -> str | None:
        if url is not None:
            import httpx

            try:
                parsed = httpx.URL(url)
            except httpx.InvalidURL:
                raise ValueError("it is malformed") from None
            if parsed.scheme not in ("http", "https") or not parsed.host:
                raise ValueError("it needs http:// or https://, and a host")
        return url

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,
        dotenv_settings: PydanticBaseSettingsSource,
        file_secret_settings: PydanticBaseSettingsSource,
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Order the sources: arguments, environment, files named by the environment, ``.env``."""
        del file_secret_settings
        return init_settings, env_settings, FileSource(settings_cls), dotenv_settings

    def events(self, named: Sequence[str] = ()) -> list[str]:
        """Return the paths to read: those that a caller names, else GHSYNC_EVENTS_PATH.

        A path that is a JSON list of texts stands for several paths.

        Raises:
            ConfigError: Only the sample is left, and MONGODB_URI names a MongoDB; or EVENTS in the environment names
                other events; or a path is blank.
        """
        if not named and "events_path" not in self.model_fields_set:
            self.refuse_sample()
            # make run EVENTS=... sets it too, and passes the events as arguments.
            if os.environ.get(_OF_MAKE):
                raise ConfigError(
                    f"{_OF_MAKE} in the environment is read by make run alone, and no other events are named.",
                    way_out="Set GHSYNC_EVENTS_PATH, or name the events: ghsync run --events PATH; or unset it.",
                )
        paths = [path for text in named or [self.events_path] for path in _paths_in(text)]
        if not all(map(str.strip, paths)):
            # It would mean the whole working folder.
            raise ConfigError(
                "A path of events is blank.",
                way_out="Name a file, a folder or a glob; a variable of your script may be unset.",
            )
        return paths

    def refuse_sample(self) -> None:
        """Refuse the sample for any MongoDB but the local one.

        Raises:
            ConfigError: MONGODB_URI names a MongoDB.
        """
        if self.mongodb_uri is not None:
            raise ConfigError(
                "No events are named, and the sample is for the local MongoDB only: MONGODB_URI names another.",
                way_out="Set GHSYNC_EVENTS_PATH, or name the events: ghsync run --events PATH.",
            )

    @cached_property
    def home_dir(self) -> Path:
        """``home`` as an absolute path."""
        return self.home.resolve()

    @cached_property
    def cache_dir(self) -> Path:
        """Where downloaded jars are kept."""
        from platformdirs import user_cache_path

        return self.cache.resolve() if self.cache else user_cache_path("ghsync", appauthor=False)


for _field in Settings.model_fields.values():
    # Docstrings have line breaks, descriptions have none.
    _field.description = " ".join((_field.description or "").split())


def _paths_in(text: str) -> list[str]:
    try:
        paths = json.loads(text)
    except ValueError:
        return [text]
    return paths if isinstance(paths, list) and paths and all(type(path) is str for path in paths) else [text]


def load_settings(**overrides: object) -> Settings:
    """Read the settings.

    Args:
        overrides: Values by environment variable name, which win over the environment.

    Raises:
        ConfigError: A value is malformed, or a name looks like a setting's and is none. The message names each
            variable, and never a secret's value.
    """
    _refuse_unread_lines()
    _refuse_unknown_names()
    try:
        return Settings(**overrides)  # type: ignore[arg-type]
    except ValidationError as error:
        problems = "; ".join(
            f"{item['loc'][0]}: {item['msg'].removeprefix('Value error, ')}"
            for item in error.errors(include_input=False)
        )
        raise ConfigError(
            f"Settings are wrong: {problems}.",
            way_out="Correct them in the environment or in .env; see .env.example.",
        ) from None


def _variables() -> list[str]:
    return [str(field.validation_alias) for field in Settings.model_fields.values()]


def _with_files(names: Sequence[str]) -> list[str]:
    return [*names, *(f"{name}_FILE" for name in names)]


def environment_without_settings() -> dict[str, str]:
    """Return this process's environment without settings and names like them, for a process with others."""
    ours = _with_files([*_variables(), _OF_MAKE, *(name for usual in _USUAL.values() for name in usual.split())])
    return {
        name: value
        for name, value in os.environ.items()
        if name.upper() not in ours and not name.upper().startswith((_OURS, *_SHARED))
    }


def settings_file() -> str | None:
    """Return the absolute path of the ``.env`` in use; None if the working folder has none."""
    file = Path(str(Settings.model_config.get("env_file"))).resolve()
    return str(file) if file.is_file() else None


def _refuse_unread_lines() -> None:
    """Refuse a ``.env`` with lines that set nothing: else a setting would silently keep its default."""
    file = settings_file()
    if file is None:
        return
    try:
        with Path(file).open(encoding="utf-8") as stream:
            unread = [
                str(binding.original.line)
                for binding in parse_stream(stream)
                if binding.error or (binding.key and binding.value is None)
            ]
    except UnicodeDecodeError:
        raise ConfigError(f"{file} is no UTF-8 text.", way_out="Save it as UTF-8.") from None
    except OSError as error:
        raise ConfigError(f"{file} can't be read ({error.strerror}).", way_out="Make it readable.") from None
    if unread:
        raise ConfigError(
            f"{file} sets nothing in line {', '.join(unread)}.",
            way_out="Write NAME=value, and quote a value with spaces; # begins a comment.",
        )


def _refuse_unknown_names() -> None:
    known = _with_files(_variables())
    ours = [name.removeprefix(_OURS) for name in known if name.startswith(_OURS)]
    file = Path(str(Settings.model_config.get("env_file")))
    # dagster dev also puts the file's names into the environment: errors report them as the file's.
    in_file = {name.upper() for name, value in dotenv_values(file).items() if value}
    given = {name.upper() for name, value in os.environ.items() if value} | in_file
    problems, meant = [], []
    for name in given - set(known):
        if name.startswith(_OURS):
            near = [_OURS + end for end in get_close_matches(name.removeprefix(_OURS), ours, n=1)]
        else:
            near = [usual] if (usual := _usually(name, in_file=name in in_file)) else []
            if not near and name.startswith(_SHARED):
                near = get_close_matches(name, known, n=1, cutoff=_NEAR)
            # If the setting itself is given too, the name is another program's.
            if not near or given & {plain := near[0].removesuffix("_FILE"), f"{plain}_FILE"}:
                continue
        where = str(file.resolve()) if name in in_file else "the environment"
        problems.append(f"{name} in {where} is no setting of ghsync")
        meant += near
    if problems:
        raise ConfigError(
            f"{'; '.join(sorted(problems))}.",
            way_out=(f"Did you mean {' and '.join(sorted(set(meant)))}? " if meant else "")
            + "Correct or remove it; .env.example has all names.",
        )


def _usually(name: str, *, in_file: bool) -> str | None:
    """Return the setting that other programs call by a name; in ``.env`` also one that lacks its GHSYNC_."""
    plain = name.removesuffix("_FILE")
    meant = next((ours for ours, usual in _USUAL.items() if plain in usual.split()), None)
    if meant is None and in_file:
        # HOME belongs to the system.
        without = {name.removeprefix(_OURS): name for name in _variables() if name.startswith(_OURS)} | {"HOME": None}
        meant = "GHSYNC_EVENTS_PATH" if plain == _OF_MAKE else without.get(plain)
    return meant and meant + name[len(plain) :]


def example_env() -> str:
    """Return the text of ``.env.example``: each setting with its description and default."""
    parts = ["# Copy to .env and set what you need. NAME_FILE=path reads NAME from a file, for any name.\n"]
    for field in Settings.model_fields.values():
        default = "" if field.default is None else field.default
        parts.append(f"# {field.description}\n# {field.validation_alias}={default}\n")
    return "\n".join(parts)


if __name__ == "__main__":
    sys.stdout.write(example_env())
