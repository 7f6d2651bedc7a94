# ruff: noqa: E501, S608
"""Online schema changes on a MariaDB and a MySQL, the connector restarted at each of their steps.

``TEST_FAULT_ROUNDS=N`` (any N) tries each tool on each server.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import pytest

from ghsync_dagster.cdc.health.audit import Patience
from ghsync_dagster.domain.user import USER_FIELDS
from ghsync_dagster_tests.support.long_campaign import ROUNDS
from ghsync_dagster_tests.support.odd_ddl import MARIADB, MYSQL

if TYPE_CHECKING:
    from ghsync_dagster_tests.support.source_parts import Source

pytestmark = [pytest.mark.integration, pytest.mark.servers("source")]

ROWS = ", ".join(f"({key}, 'l{key}', 'g{key}', 'a{key}', 'u{key}')" for key in range(1, 5))
# The new table, with a column in the middle.
COLUMNS = "user_id, login, gravatar_id, avatar_url, url"
WIDEN = "ADD COLUMN bio TEXT AFTER login, MODIFY avatar_url VARCHAR(300) AFTER user_id"
CHANGE = "UPDATE Users SET login = CONCAT(login, '+') WHERE user_id IN (1, 2)"
NEW_VALUES = "NEW.user_id, NEW.login, NEW.gravatar_id, NEW.avatar_url, NEW.url"
TRIGGER = "CREATE TRIGGER `pt_osc_new_data_Users_{0}` AFTER {1} ON `new_data`.`Users` FOR EACH ROW {2}"
GONE = "DELETE IGNORE FROM `new_data`.`_Users_new` WHERE `_Users_new`.`user_id` <=> OLD.`user_id`"
PUT = f"REPLACE INTO `new_data`.`_Users_new` ({COLUMNS}) VALUES ({NEW_VALUES})"

# Both as their logs show them. A restart, a change and an audit follow each step.
PT_ONLINE_SCHEMA_CHANGE = (
    ("CREATE TABLE `new_data`.`_Users_new` LIKE `new_data`.`Users`",),
    (f"ALTER TABLE `new_data`.`_Users_new` {WIDEN}",),
    (
        TRIGGER.format("del", "DELETE", GONE),
        TRIGGER.format("upd", "UPDATE", f"BEGIN {GONE}; {PUT}; END"),
        TRIGGER.format("ins", "INSERT", PUT),
        CHANGE,
    ),
    (
        f"INSERT LOW_PRIORITY IGNORE INTO `new_data`.`_Users_new` ({COLUMNS}) SELECT {COLUMNS} FROM `new_data`.`Users` FORCE INDEX(`PRIMARY`) WHERE user_id >= 1 LOCK IN SHARE MODE /*pt-online-schema-change 1 copy nibble*/",
        "ANALYZE TABLE `new_data`.`_Users_new` /* pt-online-schema-change */",
    ),
    ("RENAME TABLE `new_data`.`Users` TO `new_data`.`_Users_old`, `new_data`.`_Users_new` TO `new_data`.`Users`",),
    (
        CHANGE,
        "DROP TABLE IF EXISTS `new_data`.`_Users_old`",
        *(f"DROP TRIGGER IF EXISTS `new_data`.`pt_osc_new_data_Users_{event}`" for event in ("del", "upd", "ins")),
    ),
)
COPY = f"into `new_data`.`_Users_gho` ({COLUMNS}) (select {COLUMNS} from `new_data`.`Users` force index (`PRIMARY`) lock in share mode)"
GH_OST = (
    (
        "create /* gh-ost */ table `new_data`.`_Users_ghc` (id bigint unsigned auto_increment, last_update timestamp not null DEFAULT CURRENT_TIMESTAMP ON UPDATE CURRENT_TIMESTAMP, hint varchar(64) charset ascii not null, value varchar(4096) charset ascii not null, primary key(id), unique key hint_uidx(hint)) auto_increment=256 comment='gh-ost-changelog'",
        "create /* gh-ost */ table `new_data`.`_Users_gho` like `new_data`.`Users`",
    ),
    (f"alter /* gh-ost */ table `new_data`.`_Users_gho` {WIDEN}",),
    (f"insert /* gh-ost `new_data`.`Users` */ ignore {COPY}", CHANGE),
    (
        "create /* gh-ost */ table `new_data`.`_Users_del` (id int auto_increment primary key) comment='ghost-cut-over-sentry'",
    ),
    (
        # It reads the changes of the rows copied so far from the binlog.
        f"replace /* gh-ost `new_data`.`_Users_gho` */ {COPY}",
        "drop /* gh-ost */ table if exists `new_data`.`_Users_del`",
        "rename /* gh-ost */ table `new_data`.`Users` to `new_data`.`_Users_del`, `new_data`.`_Users_gho` to `new_data`.`Users`",
    ),
    (CHANGE, *(f"drop /* gh-ost */ table if exists `new_data`.`_Users_{name}`" for name in ("ghc", "del"))),
)
TOOLS = {"pt-online-schema-change": PT_ONLINE_SCHEMA_CHANGE, "gh-ost": GH_OST}
SHORT = {"pt-online-schema-change": MARIADB, "gh-ost": MYSQL}
"""On which server a tool is tried in the short run."""


@pytest.mark.faults
@pytest.mark.parametrize("tool", TOOLS)
def test_a_swap_puts_no_value_into_another_column_though_the_connector_restarts_at_each_step(
    source: Source, tool: str
) -> None:
    if source.server != SHORT[tool] and not ROUNDS:
        pytest.skip("make faults runs it")
    source.do(f"INSERT INTO Users ({COLUMNS}) VALUES {ROWS}")
    for number, step in enumerate(TOOLS[tool], start=1):
        source.do(*step)
        source.restart()
        source.do("UPDATE Users SET gravatar_id = CONCAT(gravatar_id, '.') WHERE user_id = 3")
        changed, marker = source.arrived()[-2:]
        assert changed == {
            "op": "u",
            "user_id": 3,
            **dict(zip(USER_FIELDS[1:], ("l3", f"g3{'.' * number}", "a3", "u3"), strict=True)),
        }
        assert marker == source.marker(), step
        assert source.audited().equal, step


def test_a_history_of_the_captured_table_alone_shifts_values_and_the_audit_finds_it(source: Source) -> None:
    """Why an old deployment is asked for a new snapshot."""
    before = source.configure(**{"schema.history.internal.store.only.captured.tables.ddl": "true"})
    try:
        source.arrived()
        source.do("CREATE TABLE _Users_new LIKE Users", "ALTER TABLE _Users_new ADD COLUMN bio VARCHAR(9) AFTER login")
        source.arrived()
        source.restart()
        source.do("INSERT INTO _Users_new (user_id, login, gravatar_id, avatar_url, url) SELECT * FROM Users")
        source.do("RENAME TABLE Users TO _Users_old, _Users_new TO Users")
        user = source.arrived()[-1]
        assert (user["gravatar_id"], user["avatar_url"], user["url"]) == (
            None,
            *(source.marker()[name] for name in ("gravatar_id", "avatar_url")),
        )
        assert not source.audited(Patience(seconds=0)).equal
    finally:
        source.configure(**before)
    assert source.arrived()[-1] == source.marker()
    assert source.audited().equal
