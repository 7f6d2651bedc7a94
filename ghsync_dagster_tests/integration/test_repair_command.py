"""`ghsync cdc repair`, `cdc_repair_job` and its sensor, on the whole stack."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import dagster as dg
import pytest

from ghsync_dagster.defs.cdc.checks import in_step_with_mysql
from ghsync_dagster.defs.cdc.repair import REPAIR_JOB, REPAIR_OP, cdc_repair_sensor
from ghsync_dagster.stores.mongo.users import UserStore
from ghsync_dagster.stores.mysql import MySqlStore
from ghsync_dagster_tests.support.cdc_parts import GHSYNC, stored, until
from ghsync_dagster_tests.support.long_campaign import HANG_SECONDS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from ghsync_dagster.settings import Settings

pytestmark = [pytest.mark.integration, pytest.mark.servers("stack")]

DAGSTER = str(Path(sys.executable).parent / "dagster")


class _Sides:
    """Both sides, and the environment of a command."""

    def __init__(self, settings: Settings, mysql: MySqlStore, store: UserStore) -> None:
        self.mysql, self.store = mysql, store
        assert settings.mongodb_uri
        assert settings.mysql_url
        self.environment = {
            "MONGODB_URI": settings.mongodb_uri.get_secret_value(),
            "MONGODB_DATABASE": settings.mongodb_database,
            "KAFKA_BOOTSTRAP_SERVERS": str(settings.kafka_bootstrap_servers),
            "KAFKA_GROUP_ID": settings.kafka_group_id,
            "CONNECT_URL": str(settings.connect_url),
            "MYSQL_URL": settings.mysql_url.get_secret_value(),
        }

    def run(self, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run a command to its end."""
        environment = self.environment | more
        return subprocess.run(
            command, env=environment, cwd=Path.home(), capture_output=True, text=True, timeout=HANG_SECONDS
        )

    def repair(self, *options: str, **more: str) -> subprocess.CompletedProcess[str]:
        """Run ``ghsync cdc repair``."""
        return self.run(GHSYNC, "cdc", "repair", *options, **more)

    def job(self, folder: Path, config: dict[str, Any], **more: str) -> subprocess.CompletedProcess[str]:
        """Run ``cdc_repair_job``."""
        file = folder / "run.json"
        file.write_text(json.dumps({"ops": {REPAIR_OP: {"config": config}}}))
        job = (DAGSTER, "job", "execute", "-m", "ghsync_dagster.definitions", "-j", REPAIR_JOB, "-c", str(file))
        return self.run(*job, DAGSTER_HOME=str(folder), **more)

    def everything(self) -> dict[str, Any]:
        """Return the database's collections with their options, indexes and documents."""
        database = self.store.database
        return {
            found["name"]: (
                found.get("options"),
                sorted(map(str, database[found["name"]].list_indexes())),
                sorted(map(str, database[found["name"]].find())),
            )
            for found in database.list_collections()
        }

    def hide(self, *statements: str) -> None:
        """Change rows without a record in the binlog."""
        for statement in ("SET SESSION sql_log_bin = 0", *statements, "SET SESSION sql_log_bin = 1"):
            self.mysql.execute([(statement, ())])


@pytest.fixture
def sides(stack_settings: Settings) -> Iterator[_Sides]:
    """Five users that both sides have, drained."""
    assert stack_settings.mongodb_uri
    assert stack_settings.mysql_url
    uri = stack_settings.mongodb_uri.get_secret_value()
    with (
        MySqlStore(stack_settings.mysql_url.get_secret_value()) as mysql,
        UserStore(uri, stack_settings.mongodb_database, "Users") as store,
    ):
        found = _Sides(stack_settings, mysql, store)
        mysql.execute([("INSERT INTO Users (user_id, login) VALUES (1,'a'),(2,'b'),(3,'c'),(4,'d'),(5,'e')", ())])
        until(lambda: found.run(GHSYNC, "cdc", "drain").returncode == 0 and len(stored(store)) == 5)
        yield found


def test_hidden_changes_are_repaired_from_an_audit(sides: _Sides) -> None:
    sides.hide(
        "UPDATE Users SET login = 'hidden' WHERE user_id = 1",
        "DELETE FROM Users WHERE user_id = 2",
        "INSERT INTO Users (user_id, login) VALUES (6, 'new')",
    )
    dry = sides.repair("--from-audit", "--patience", "0.5", "--dry-run")
    assert dry.returncode == 0
    assert dry.stdout.startswith("dry run of 3 users: would be 1 removed, 2 written; nothing was changed\n")
    planned = json.loads(sides.repair("--from-audit", "--patience", "0.5", "--dry-run", "--json").stdout)
    assert "carried_out" not in planned
    assert sorted(planned["planned"].values()) == ["removed", "written", "written"]
    assert dry.stdout.splitlines()[1:] == [f"  {what:<9} {user}" for user, what in planned["planned"].items()]
    assert stored(sides.store)["1"]["login"] == "a"
    done = sides.repair("--from-audit", "--patience", "0.5", "--json")
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert (report["outcomes"], report["open"], report["by_itself"]) == ({"written": 2, "removed": 1}, 0, True)
    found = stored(sides.store)
    assert {key: document["login"] for key, document in found.items()} == {
        "1": "hidden",
        "3": "c",
        "4": "d",
        "5": "e",
        "6": "new",
    }
    assert sides.run(GHSYNC, "cdc", "audit", "--patience", "1").returncode == 0
    # The stream goes on from there.
    sides.mysql.execute([("UPDATE Users SET login = 'later' WHERE user_id = 1", ())])
    until(lambda: sides.run(GHSYNC, "cdc", "drain").returncode == 0 and stored(sides.store)["1"]["login"] == "later")


def test_what_is_asked_for_wrongly_is_one_clear_error(sides: _Sides) -> None:
    for options, more, words in (
        ((), {}, "No user is chosen"),
        (("--user-id", "octo"), {}, "No user id: 'octo'"),
        (("--user-id", "1", "--user-id", "2"), {"GHSYNC_REPAIR_MAX_USERS": "1"}, "2 users would be repaired"),
        (("--user-id", "1"), {"MYSQL_URL": "nowhere"}, "MYSQL_URL is malformed"),
    ):
        done = sides.repair(*options, **more)
        assert done.returncode == 2, done.stderr
        assert words in done.stderr
        assert "way out: " in done.stderr
    assert sides.store.database["_ghsync_repairs"].count_documents({}) == 0
    allowed = sides.repair("--user-id", "1", "--user-id", "2", "--yes", GHSYNC_REPAIR_MAX_USERS="1")
    assert allowed.returncode == 0, allowed.stderr


def test_the_job_repairs_what_the_launchpad_chooses(sides: _Sides, tmp_path: Path) -> None:
    sides.store.users.update_one({"user_id": "3"}, {"$set": {"login": "foreign"}})
    for chosen, code in (({}, 1), ({"user_ids": ["3"]}, 0)):
        done = sides.job(tmp_path, chosen)
        assert done.returncode == code, done.stderr[-3000:]
        assert ("No user is chosen" in done.stderr) == (code == 1)
    assert stored(sides.store)["3"]["login"] == "c"


def test_a_dry_run_writes_nothing_at_all(sides: _Sides, tmp_path: Path) -> None:
    sides.hide("UPDATE Users SET login = 'hidden' WHERE user_id = 1")
    fresh = f"{sides.store.database.name}_fresh"
    before = sides.everything()
    for database, users in (
        (sides.store.database.name, "dry run of 2 users: would be 1 absent, 1 written"),
        (fresh, "dry run of 6 users: would be 1 absent, 5 written"),
    ):
        options = ("--all", "--user-id", "1", "--user-id", "9", "--dry-run")
        done = sides.repair(*options, MONGODB_DATABASE=database)
        assert (done.returncode, "nothing was changed" in done.stdout) == (0, True), done.stderr
        assert done.stdout.startswith(users)
    assert sides.job(tmp_path, {"everyone": True, "dry_run": True}, MONGODB_DATABASE=fresh).returncode == 0
    assert sides.everything() == before
    assert sides.store.client[fresh].list_collection_names() == []
    assert sides.repair("--dead-letters", "--dry-run", MONGODB_DATABASE=fresh).returncode == 0
    # The index of dead letters, where the topic for them is there.
    assert set(sides.store.client[fresh].list_collection_names()) <= {"_ghsync_dead_letters"}


def test_what_is_left_to_do_by_hand_fails_the_command_and_the_job(sides: _Sides, tmp_path: Path) -> None:
    odd = {**stored(sides.store)["3"], "user_id": 42}
    sides.store.users.insert_one(odd, bypass_document_validation=True)
    done = sides.repair("--from-audit", "--patience", "0")
    assert done.returncode == 1, done.stderr
    assert done.stdout.startswith("0 users asked for: none repaired; 1 to be fixed by hand")
    assert "by hand   42 (int)" in done.stdout
    assert "way out: A document or row whose user_id is no whole number: remove it" in done.stderr
    report = json.loads(sides.repair("--from-audit", "--patience", "0", "--json").stdout)
    assert (report["unrepairable"], report["by_hand"], report["carried_out"]) == (1, ["42 (int)"], False)
    job = sides.job(tmp_path, {"from_audit": True, "patience_seconds": 0})
    assert job.returncode == 1
    assert "1 to be fixed by hand" in job.stderr
    sides.store.users.delete_one({"user_id": 42})
    assert sides.repair("--from-audit", "--patience", "0").returncode == 0


@pytest.mark.parametrize(
    ("found", "starts", "words"),
    [
        (None, False, "there was none"),
        ({"missing": 0, "extra": 0, "different": 0}, False, "compared nothing"),
        ({"missing": 2, "extra": 1, "different": 3}, True, ""),
        ({"missing": 0, "extra": 10_001, "different": 0}, False, "more than GHSYNC_REPAIR_MAX_USERS"),
    ],
)
def test_the_sensor_starts_one_repair_for_each_small_difference(
    found: dict[str, int] | None, starts: bool, words: str
) -> None:
    with dg.instance_for_test() as instance:
        if found is not None:
            instance.report_runless_asset_event(
                dg.AssetCheckEvaluation(
                    asset_key=in_step_with_mysql.check_key.asset_key,
                    check_name=in_step_with_mysql.check_key.name,
                    passed=False,
                    metadata={name: dg.MetadataValue.int(count) for name, count in found.items()},
                )
            )
        context = dg.build_sensor_context(instance=instance)
        result = cdc_repair_sensor(context)
        assert isinstance(result, dg.SensorResult | dg.SkipReason)
        if isinstance(result, dg.SkipReason) or not starts:
            skipped = result.skip_message if isinstance(result, dg.SkipReason) else result.skip_reason
            assert words in str(skipped)
            assert not starts
            return
        [request] = result.run_requests or []
        assert request.run_config == {"ops": {REPAIR_OP: {"config": {"from_audit": True}}}}
        again = dg.build_sensor_context(instance=instance, cursor=result.cursor)
        assert isinstance(cdc_repair_sensor(again), dg.SkipReason)
