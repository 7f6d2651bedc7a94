"""Settings: where a value may come from, and that a wrong one is named and a secret one never shown."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from ghsync_dagster import settings
from ghsync_dagster.cdc.health.metrics import LONGEST_WINDOW_SECONDS
from ghsync_dagster.domain.errors import ConfigError
from ghsync_dagster.settings import Settings, environment_without_settings, load_settings

if TYPE_CHECKING:
    from collections.abc import Callable

SECRET = "mongodb://app:s3cr3t-PLANTED@db:27017"
VARIABLES = [str(field.validation_alias) for field in Settings.model_fields.values()]


@pytest.fixture(autouse=True)
def empty_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work where there is no .env, with no variable set."""
    monkeypatch.chdir(tmp_path)
    for name in VARIABLES:
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(f"{name}_FILE", raising=False)


def uri(settings: Settings) -> str | None:
    return settings.mongodb_uri.get_secret_value() if settings.mongodb_uri else None


def test_without_anything_set_the_defaults_of_the_design_hold(tmp_path: Path) -> None:
    settings = load_settings()
    assert settings.home_dir == tmp_path / ".ghsync"
    assert settings.events_path == "data/sample_data.json"
    assert settings.max_quarantined_ratio == pytest.approx(0.01)
    assert uri(settings) is None
    assert (settings.mongodb_database, settings.mongodb_collection) == ("new_data", "Users")
    assert settings.spark_master == "local[*]"
    assert settings.spark_jars_packages is None


def test_the_environment_wins_over_the_file_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("MONGODB_DATABASE=from_file\nMONGODB_COLLECTION=People\n")
    monkeypatch.setenv("MONGODB_DATABASE", "from_environment")
    settings = load_settings()
    assert (settings.mongodb_database, settings.mongodb_collection) == ("from_environment", "People")


def test_an_argument_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONGODB_DATABASE", "from_environment")
    assert load_settings(MONGODB_DATABASE="argument").mongodb_database == "argument"


def test_an_empty_variable_counts_as_unset(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONGODB_URI", "")
    monkeypatch.setenv("GHSYNC_MAX_QUARANTINED_RATIO", "")
    settings = load_settings()
    assert uri(settings) is None
    assert settings.max_quarantined_ratio == pytest.approx(0.01)


def test_reports_are_asked_for_within_what_is_remembered() -> None:
    assert load_settings(GHSYNC_CDC_REPORT_SECONDS=LONGEST_WINDOW_SECONDS).cdc_report_seconds == LONGEST_WINDOW_SECONDS
    with pytest.raises(ConfigError, match="GHSYNC_CDC_REPORT_SECONDS"):
        load_settings(GHSYNC_CDC_REPORT_SECONDS=LONGEST_WINDOW_SECONDS + 1)


@pytest.mark.parametrize(
    "url", ["http://u:s3cret@host:80a3", "host:8083", "//u:s3cret@host", "http://", "ftp://h", "http://h\x00", "h"]
)
def test_a_connect_url_that_leads_nowhere_is_refused_before_work_starts(url: str) -> None:
    with pytest.raises(ConfigError, match="Settings are wrong: CONNECT_URL: ") as caught:
        load_settings(CONNECT_URL=url)
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize("url", ["http://h", "https://u:s3cret@h:8083/connect/", "http://[::1]:8083"])
def test_a_connect_url_may_have_credentials_and_a_path(url: str) -> None:
    assert load_settings(CONNECT_URL=url).connect_url == url


def test_names_of_other_programs_are_left_alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("POSTGRES_PASSWORD=x\nDAGSTER_HOME=/y\nKAFKA_HEAP_OPTS=-Xmx1g\nMONGODB_VERSION=8\n")
    for name in (
        *("SPARK_HOME", "SPARK_MASTER_HOST", "SPARK_WORKER_MEMORY", "SPARK_LOCAL_IP", "MYSQL_PWD", "MYSQL_USER"),
        *("MYSQL_HOST", "MYSQL_DATABASE", "CONNECT_REST_PORT", "KAFKA_OPTS", "KAFKA_HEAP_OPTS", "KAFKA_BROKER_ID"),
        *("MONGO_INITDB_DATABASE", "EVENTS", "LOG_LEVEL"),
    ):
        monkeypatch.setenv(name, "z")
    assert load_settings().mongodb_database == "new_data"


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("GHSYNC_EVENT_PATH", "GHSYNC_EVENTS_PATH"),
        ("ghsync_events_pth", "GHSYNC_EVENTS_PATH"),
        ("GHSYNC_LOGLEVEL", "GHSYNC_LOG_LEVEL"),
        ("GHSYNC_ALERT_WEBHOOK_URL_FIL", "GHSYNC_ALERT_WEBHOOK_URL_FILE"),
        ("MONGODB_URL", "MONGODB_URI"),
        ("MONGO_URI", "MONGODB_URI"),
        ("MYSQL_URI", "MYSQL_URL"),
        ("KAFKA_BOOTSTRAP_SERVER", "KAFKA_BOOTSTRAP_SERVERS"),
        ("CONNECT_URI", "CONNECT_URL"),
        ("MONGO_URL", "MONGODB_URI"),
        ("MONGO_URL_FILE", "MONGODB_URI_FILE"),
        ("mongodb_connection_string", "MONGODB_URI"),
        ("MONGO_DB", "MONGODB_DATABASE"),
        ("MONGODB_DB", "MONGODB_DATABASE"),
        ("MONGODB_NAME", "MONGODB_DATABASE"),
        ("MONGODB_COLLECTION_NAME", "MONGODB_COLLECTION"),
        ("KAFKA_BROKERS", "KAFKA_BOOTSTRAP_SERVERS"),
        ("KAFKA_BOOTSTRAP", "KAFKA_BOOTSTRAP_SERVERS"),
        ("KAFKA_CONSUMER_GROUP", "KAFKA_GROUP_ID"),
        ("MYSQL_DSN", "MYSQL_URL"),
        ("SPARK_MEMORY", "SPARK_DRIVER_MEMORY"),
        ("EVENTS_PATH", "GHSYNC_EVENTS_PATH"),
    ],
)
def test_a_name_that_is_nearly_a_setting_s_is_refused_with_that_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, meant: str
) -> None:
    monkeypatch.setenv(name, "s3cret")
    with pytest.raises(ConfigError, match=f"{name.upper()} in the environment is no setting of ghsync") as caught:
        load_settings()
    assert f"Did you mean {meant}?" in caught.value.way_out
    monkeypatch.delenv(name)
    (tmp_path / ".env").write_text(f"{name}=s3cret\n")
    with pytest.raises(ConfigError, match=f"{name.upper()} in {tmp_path / '.env'} is no setting") as caught:
        load_settings()
    assert f"Did you mean {meant}?" in caught.value.way_out
    assert "s3cret" not in repr(caught.value)
    (tmp_path / ".env").write_text(f"{name}=\n")
    load_settings()


@pytest.mark.parametrize(
    ("name", "meant"),
    [
        ("EVENTS", "GHSYNC_EVENTS_PATH"),
        ("EVENTS_PATH", "GHSYNC_EVENTS_PATH"),
        ("LOG_LEVEL", "GHSYNC_LOG_LEVEL"),
        ("METRICS_PORT", "GHSYNC_METRICS_PORT"),
        ("REPAIR_MAX_USERS_FILE", "GHSYNC_REPAIR_MAX_USERS_FILE"),
    ],
)
def test_in_the_file_env_a_name_without_its_prefix_is_refused_with_it(tmp_path: Path, name: str, meant: str) -> None:
    (tmp_path / ".env").write_text(f"{name}=1\n")
    with pytest.raises(ConfigError, match=f"{name} in {tmp_path / '.env'} is no setting of ghsync") as caught:
        load_settings()
    assert f"Did you mean {meant}?" in caught.value.way_out
    (tmp_path / ".env").write_text(f"{name}=1\n{meant}={tmp_path / 'value'}\n")
    (tmp_path / "value").write_text("1")
    if meant.endswith("_FILE"):
        assert load_settings().repair_max_users == 1


def test_every_usual_name_leads_to_a_setting_and_is_none_itself() -> None:
    usual = [name for names in settings._USUAL.values() for name in names.split()]
    assert set(settings._USUAL) <= set(VARIABLES)
    assert not set(usual) & set(VARIABLES)
    assert len(usual) == len(set(usual))


def test_beside_the_file_of_a_setting_a_usual_name_is_somebody_else_s(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "secret").write_text(SECRET)
    monkeypatch.setenv("MONGODB_URI_FILE", str(tmp_path / "secret"))
    monkeypatch.setenv("MONGO_URL", "mongodb://elsewhere")
    assert uri(load_settings()) == SECRET


def test_an_environment_without_settings_sets_and_means_none(monkeypatch: pytest.MonkeyPatch) -> None:
    usual = [name for others in settings._USUAL.values() for name in others.split()]
    near = ["MONGODB_URIS", "KAFKA_TOPICS", "SPARK_MASTERS", "MYSQL_URLS", "CONNECT_URLS", "GHSYNC_HOMES", "EVENTS"]
    for name in (*VARIABLES, *usual, *near):
        for given in (name, f"{name}_FILE", name.lower()):
            monkeypatch.setenv(given, "s3cret")
    monkeypatch.setenv("OTHER", "kept")
    environment = environment_without_settings()
    assert "s3cret" not in environment.values()
    assert (environment["OTHER"], environment["PATH"]) == ("kept", os.environ["PATH"])
    for name in set(os.environ) - set(environment):
        monkeypatch.delenv(name)
    assert load_settings().model_fields_set == set()


def test_events_of_make_are_not_left_for_the_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("EVENTS", "/data")
    with pytest.raises(ConfigError, match="EVENTS in the environment is read by make run alone") as caught:
        load_settings().events()
    assert "GHSYNC_EVENTS_PATH" in caught.value.way_out
    # As the Makefile does.
    assert load_settings().events(["/data"]) == ["/data"]
    monkeypatch.setenv("GHSYNC_EVENTS_PATH", "/other")
    assert load_settings().events() == ["/other"]


@pytest.mark.parametrize("paths", [[""], ["a", " "], ['["a", ""]'], ["\t"]])
def test_a_blank_path_is_not_the_working_folder(paths: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ConfigError, match="A path of events is blank") as caught:
        load_settings().events(paths)
    assert "unset" in caught.value.way_out
    monkeypatch.setenv("GHSYNC_EVENTS_PATH", '[""]')
    with pytest.raises(ConfigError, match="A path of events is blank"):
        load_settings().events()


@pytest.mark.parametrize(
    ("text", "lines"),
    [
        ("GHSYNC_EVENTS_PATH: /data\n", "1"),
        ("A=1\nMONGODB_URI mongodb://app:s3cret@prod\n# c\nB=2\nGHSYNC_HOME\n", "2, 5"),
        ('A=1\nGHSYNC_EVENTS_PATH="/data\n', "2"),
        ("export MONGODB_URI\n", "1"),
    ],
)
def test_a_line_of_the_file_that_sets_nothing_is_refused(tmp_path: Path, text: str, lines: str) -> None:
    (tmp_path / ".env").write_text(text)
    with pytest.raises(ConfigError, match=rf"sets nothing in line {lines}\. ") as caught:
        load_settings()
    assert str(tmp_path / ".env") in caught.value.message
    assert "s3cret" not in repr(caught.value)
    assert "NAME=value" in caught.value.way_out


def test_a_file_of_settings_may_have_all_that_its_form_allows(tmp_path: Path) -> None:
    (tmp_path / ".env").write_text("\ufeff# c\n\nexport A='1 2'\nMONGODB_DATABASE = from_file # c\nEMPTY=\n")
    assert load_settings().mongodb_database == "from_file"


def test_a_file_of_settings_in_another_encoding_is_refused(tmp_path: Path) -> None:
    (tmp_path / ".env").write_bytes("MONGODB_DATABASE=ä\n".encode("latin-1"))
    with pytest.raises(ConfigError, match="is no UTF-8 text"):
        load_settings()


def test_the_sample_is_for_the_local_mongodb_only(monkeypatch: pytest.MonkeyPatch) -> None:
    assert load_settings().events() == ["data/sample_data.json"]
    monkeypatch.setenv("MONGODB_URI", SECRET)
    with pytest.raises(ConfigError, match="No events are named") as caught:
        load_settings().events()
    assert "PLANTED" not in repr(caught.value)
    assert load_settings().events(["named", "more"]) == ["named", "more"]
    monkeypatch.setenv("GHSYNC_EVENTS_PATH", "data/sample_data.json")
    assert load_settings().events() == ["data/sample_data.json"]
    assert load_settings().events(["named", "more"]) == ["named", "more"]


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ('["a b.json", "more/*.gz"]', ["a b.json", "more/*.gz"]),
        ('["[12].json"]', ["[12].json"]),
        ("[12].json", ["[12].json"]),
        ("[12]", ["[12]"]),
        ("[a-c]*.json", ["[a-c]*.json"]),
        ("[]", ["[]"]),
        ('["a.json", 1]', ['["a.json", 1]']),
        ('"a.json"', ['"a.json"']),
        ("a.json:b,c;d e.json", ["a.json:b,c;d e.json"]),
        ("a\nb.json", ["a\nb.json"]),
    ],
)
def test_several_paths_are_a_json_list_and_all_else_is_one_path(
    monkeypatch: pytest.MonkeyPatch, text: str, paths: list[str]
) -> None:
    monkeypatch.setenv("GHSYNC_EVENTS_PATH", text)
    assert load_settings().events() == paths
    assert load_settings().events(["x", text]) == ["x", *paths]


def test_a_name_like_nothing_of_ours_has_no_suggestion(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHSYNC_QQQ", "1")
    with pytest.raises(ConfigError, match="GHSYNC_QQQ in the environment") as caught:
        load_settings()
    assert caught.value.way_out == "Correct or remove it; .env.example has all names."


def test_beside_the_setting_itself_a_like_name_is_somebody_else_s(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MONGODB_URL", "mongodb://elsewhere")
    monkeypatch.setenv("MONGODB_URI", SECRET)
    assert uri(load_settings()) == SECRET


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("GHSYNC_LOG_LEVEL", "LOUD", "'DEBUG', 'INFO', 'WARNING' or 'ERROR'"),
        ("GHSYNC_LOG_FORMAT", "xml", "'auto', 'json' or 'console'"),
        ("KAFKA_SECURITY_PROTOCOL", "TLS", "'SASL_PLAINTEXT' or 'SASL_SSL'"),
        ("KAFKA_SASL_MECHANISM", "SCRAM", "'SCRAM-SHA-256' or 'SCRAM-SHA-512'"),
        *(("SPARK_DRIVER_MEMORY", value, "such as 512m or 2g") for value in ("2GBs", "2gb", "0g", "1.5g", "2", "2g\n")),
        ("GHSYNC_GIT_URL", "git@github.com:a/b", "such as https://github.com/OWNER/REPO"),
        ("GHSYNC_GIT_REVISION", "my branch", "such as main"),
    ],
)
def test_the_error_of_a_form_tells_it_in_words(name: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"Settings are wrong: {name}: ") as caught:
        load_settings(**{name: value})
    assert words in caught.value.message


@pytest.mark.parametrize("name", VARIABLES)
def test_no_error_of_a_setting_shows_a_pattern(name: str) -> None:
    message = ""
    try:
        load_settings(**{name: "\x00 ?"})
    except ConfigError as error:
        message = error.message
    assert "pattern" not in message
    assert not set(message) & set("^|")


@pytest.mark.parametrize(
    ("name", "value", "taken"),
    [
        ("GHSYNC_LOG_LEVEL", "info", "INFO"),
        ("GHSYNC_LOG_FORMAT", "JSON", "json"),
        ("KAFKA_SECURITY_PROTOCOL", "sasl_ssl", "SASL_SSL"),
        ("KAFKA_SASL_MECHANISM", "scram-sha-256", "SCRAM-SHA-256"),
        ("SPARK_DRIVER_MEMORY", "2G", "2g"),
    ],
)
def test_the_case_of_a_word_does_not_matter(name: str, value: str, taken: str) -> None:
    field = next(field for field, info in Settings.model_fields.items() if info.validation_alias == name)
    assert getattr(load_settings(**{name: value}), field) == taken


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        *(("MONGODB_DATABASE", f"my{wrong}db", "MongoDB allows no ") for wrong in '/\\. "$'),
        ("MONGODB_DATABASE", "x" * 64, "MongoDB allows up to 63 bytes"),
        *(("MONGODB_DATABASE", name, f"{name} is MongoDB's own") for name in ("admin", "local", "config", "Admin")),
        *(("MONGODB_COLLECTION", name, "MongoDB allows no ") for name in ("a$b", ".a", "a.", "a..b")),
        ("MONGODB_COLLECTION", "system.users", "MongoDB keeps names"),
        ("MONGODB_COLLECTION", "_ghsync_versions", "ghsync keeps names"),
        ("MONGODB_COLLECTION", "x" * 171, "up to 170 bytes"),
        ("MONGODB_URI", "127.0.0.1:27017", "it needs mongodb://"),
        ("MONGODB_URI", "app:s3cret@h:1", "it needs mongodb://"),
        *(
            ("SPARK_MASTER", name, "Spark takes local[*]")
            for name in ("local[x]", "local[0]", "127.0.0.1:7077", "spark://h")
        ),
        *(("KAFKA_TOPIC", name, "Kafka allows up to 249 letters") for name in ("a b", "a/b", "ü", "..", "x" * 246)),
    ],
)
def test_a_name_that_no_server_takes_is_refused_before_work_starts(name: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"Settings are wrong: {name}: ") as caught:
        load_settings(**{name: value})
    assert words in caught.value.message
    assert "s3cret" not in str(caught.value)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("MONGODB_DATABASE", "my-db_2"),
        ("MONGODB_DATABASE", "x" * 63),
        ("MONGODB_COLLECTION", "People.of my"),
        *(("SPARK_MASTER", name) for name in ("local", "local[4]", "local[*,3]", "local-cluster[2,1,1024]", "yarn")),
        *(("SPARK_MASTER", name) for name in ("spark://a:7077,b:7077", "k8s://https://h:443")),
        ("KAFKA_TOPIC", "mysql-server.new_data.Users_2"),
        ("KAFKA_TOPIC", "x" * 245),
    ],
)
def test_a_name_that_servers_take_is_taken(name: str, value: str) -> None:
    field = next(field for field, info in Settings.model_fields.items() if info.validation_alias == name)
    assert getattr(load_settings(**{name: value}), field) == value


@pytest.mark.parametrize("end", ["", "\n", "\r\n"])
def test_a_secret_may_be_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str) -> None:
    (tmp_path / "secret").write_bytes((SECRET + end).encode())
    monkeypatch.setenv("MONGODB_URI_FILE", str(tmp_path / "secret"))
    assert uri(load_settings()) == SECRET


def test_spaces_of_a_secret_in_a_file_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text(" s3cret \n")
    monkeypatch.setenv("GHSYNC_ALERT_WEBHOOK_URL_FILE", str(tmp_path / "secret"))
    url = load_settings().alert_webhook_url
    assert url is not None
    assert url.get_secret_value() == " s3cret "


@pytest.mark.parametrize("name", ["MONGODB_DATABASE", "GHSYNC_EVENTS_PATH", "KAFKA_GROUP_ID", "GHSYNC_RULES_MODULE"])
def test_any_setting_may_be_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    (tmp_path / "value").write_text("elsewhere\n")
    monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "value"))
    field = next(field for field, info in Settings.model_fields.items() if info.validation_alias == name)
    assert getattr(load_settings(), field) == "elsewhere"


def test_a_file_wins_over_the_file_env(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / ".env").write_text("MONGODB_URI=mongodb://other\n")
    (tmp_path / "secret").write_text(SECRET)
    monkeypatch.setenv("MONGODB_URI_FILE", str(tmp_path / "secret"))
    assert uri(load_settings()) == SECRET


def test_a_value_and_its_file_together_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "secret").write_text(SECRET)
    monkeypatch.setenv("MONGODB_URI", SECRET)
    monkeypatch.setenv("MONGODB_URI_FILE", str(tmp_path / "secret"))
    with pytest.raises(ConfigError, match="Both MONGODB_URI and MONGODB_URI_FILE are set") as caught:
        load_settings()
    assert "PLANTED" not in str(caught.value)


@pytest.mark.parametrize("content", ["", "\n"])
@pytest.mark.parametrize("name", ["MONGODB_URI", "MYSQL_URL", "GHSYNC_EVENTS_PATH"])
def test_an_empty_file_is_not_taken_for_nothing_set(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, content: str
) -> None:
    (tmp_path / "secret").write_text(content)
    monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "secret"))
    with pytest.raises(ConfigError, match=f"{name}_FILE names .*secret, which is empty") as caught:
        load_settings()
    assert name in caught.value.way_out


def missing(folder: Path) -> Path:
    return folder / "missing"


def folder_itself(folder: Path) -> Path:
    return folder


def not_utf8(folder: Path) -> Path:
    (folder / "bytes").write_bytes(b"\xff\xfe")
    return folder / "bytes"


@pytest.mark.parametrize("make", [missing, folder_itself, not_utf8], ids=lambda make: make.__name__)
def test_a_file_that_gives_no_text_is_one_clear_error(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, make: Callable[[Path], Path]
) -> None:
    path = make(tmp_path)
    monkeypatch.setenv("MONGODB_URI_FILE", str(path))
    with pytest.raises(ConfigError, match=f"MONGODB_URI_FILE names {path}, which can't be read") as caught:
        load_settings()
    assert "MONGODB_URI_FILE" in caught.value.way_out


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("GHSYNC_MAX_QUARANTINED_RATIO", "1.5"),
        ("GHSYNC_MAX_QUARANTINED_RATIO", "-0.1"),
        ("GHSYNC_MAX_QUARANTINED_RATIO", "1%"),
        ("GHSYNC_MAX_QUARANTINED_RATIO", "nan"),
        ("GHSYNC_LEASE_WAIT_SECONDS", "-1"),
        ("GHSYNC_RETRY_ATTEMPTS", "0"),
        ("GHSYNC_RETRY_ATTEMPTS", "1.5"),
        ("GHSYNC_SERVER_TIMEOUT_SECONDS", "0"),
        ("GHSYNC_LOG_LEVEL", "LOUD"),
        ("GHSYNC_LOG_FORMAT", "xml"),
        ("SPARK_DRIVER_MEMORY", "much"),
    ],
)
def test_a_malformed_value_is_refused_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, name: str, value: str
) -> None:
    monkeypatch.setenv(name, value)
    with pytest.raises(ConfigError, match=f"Settings are wrong: {name}: ") as caught:
        load_settings()
    assert ".env.example" in caught.value.way_out
    assert "\n" not in str(caught.value)


def test_every_malformed_variable_is_named_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GHSYNC_LOG_LEVEL", "LOUD")
    monkeypatch.setenv("GHSYNC_RETRY_ATTEMPTS", "few")
    with pytest.raises(ConfigError, match=r"GHSYNC_RETRY_ATTEMPTS: .*; GHSYNC_LOG_LEVEL: "):
        load_settings()


def test_a_malformed_value_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "value").write_text(SECRET)
    for name in ("GHSYNC_RETRY_ATTEMPTS", "GHSYNC_LOG_LEVEL", "SPARK_DRIVER_MEMORY"):
        monkeypatch.setenv(f"{name}_FILE", str(tmp_path / "value"))
    with pytest.raises(ConfigError) as caught:
        load_settings()
    assert "PLANTED" not in f"{caught.value!r} {caught.value}"
    assert caught.value.__cause__ is None


@pytest.mark.parametrize("name", ["MONGODB_URI", "GHSYNC_ALERT_WEBHOOK_URL"])
def test_a_secret_is_in_no_text_of_the_settings(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    monkeypatch.setenv(name, SECRET)
    settings = load_settings()
    assert "PLANTED" not in f"{settings!r} {settings} {settings.model_dump()} {settings.model_dump_json()}"


def test_the_home_folder_is_absolute_and_understands_the_tilde(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    assert load_settings(GHSYNC_HOME="~/state").home_dir == tmp_path / "state"
    assert load_settings(GHSYNC_HOME="state").home_dir == tmp_path / "state"


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("GHSYNC_HOME", "~nobody-of-that-name/x", "its ~ is no user's home folder"),
        ("GHSYNC_CACHE", "~nobody-of-that-name", "its ~ is no user's home folder"),
        ("SPARK_DRIVER_JAVA_OPTIONS", '-Da="x', "its quotes are not as in a shell"),
        ("SPARK_DRIVER_JAVA_OPTIONS", "-Da=x\\", "its quotes are not as in a shell"),
    ],
)
def test_what_is_only_expanded_later_is_refused_at_once(name: str, value: str, words: str) -> None:
    with pytest.raises(ConfigError, match=f"Settings are wrong: {name}: {words}"):
        load_settings(**{name: value})


def test_settings_do_not_change(tmp_path: Path) -> None:
    settings = load_settings(GHSYNC_HOME=str(tmp_path))
    with pytest.raises(ValueError, match="frozen"):
        settings.home = Path("elsewhere")


def test_reading_settings_writes_nothing(tmp_path: Path) -> None:
    before = {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")}
    load_settings()
    assert {path: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.rglob("*")} == before
