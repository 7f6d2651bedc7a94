# ruff: noqa: E501
"""Odd but valid statements, by name: what a server's binlog may hold and a connector has to follow.

Each list is executed as it stands, the table ``Users`` as documented before it, in a database ``new_data`` alongside
an empty ``other``. Belongs here: statements, and on which server they are valid. Not here: what is asked of the connector.
"""

from __future__ import annotations

from typing import NamedTuple

MYSQL, MARIADB = "mysql", "mariadb"
BOTH = (MYSQL, MARIADB)


class Odd(NamedTuple):
    """Statements that are executed one after another.

    Attributes:
        statements: The SQL.
        servers: Where they are valid.
        lasts: Whether a new snapshot does not pass what they leave.
    """

    statements: tuple[str, ...]
    servers: tuple[str, ...] = BOTH
    lasts: bool = False


def _both(*statements: str) -> Odd:
    return Odd(statements)


def _on(server: str, *statements: str) -> Odd:
    return Odd(statements, (server,))


TUTORIAL = """CREATE TABLE IF NOT EXISTS Users (user_id BIGINT PRIMARY KEY, login VARCHAR(255) NOT NULL,
        gravatar_id VARCHAR(255), avatar_url VARCHAR(255), url VARCHAR(255))"""

FOLLOWED: dict[str, Odd] = {
    # Words that the grammar of Debezium's MySQL connector from 3.6 on takes for its own.
    "the tutorial's table": _both(TUTORIAL),
    "a column url is widened": _both("ALTER TABLE Users MODIFY url VARCHAR(512)"),
    "an index of a column url": _both("ALTER TABLE Users ADD INDEX iurl (url)"),
    "a column url in another database": _both("CREATE TABLE other.t1 (id INT PRIMARY KEY, url TEXT)"),
    "a column url is moved": _both("ALTER TABLE Users MODIFY url VARCHAR(512) AFTER user_id"),
    "columns named by other tokens": _both(
        "CREATE TABLE other.words (id INT PRIMARY KEY, log INT, bernoulli INT, gtids INT)"
    ),
    "a column auto": _on(
        MYSQL, "CREATE TABLE other.t1 (id INT PRIMARY KEY, auto INT)", "ALTER TABLE Users ADD COLUMN auto INT FIRST"
    ),
    "a column vector, quoted": _both("ALTER TABLE Users ADD COLUMN `vector` INT FIRST, ADD COLUMN `auto` INT FIRST"),
    "parallel and manual": _on(MARIADB, "CREATE TABLE other.words (id INT PRIMARY KEY, parallel INT, manual INT)"),
    "words of window functions, quoted": _both("CREATE TABLE other.words (id INT PRIMARY KEY, `rank` INT, `lag` INT)"),
    # Quotes and comments.
    "a comment with every quote": _both("""ALTER TABLE Users COMMENT 'it''s "odd" `ticks` -- # /* \\' */ ;'"""),
    "comments around and within": _both(
        "/* don't */ ALTER TABLE Users ADD COLUMN c1 INT /* it's \"x */ AFTER login -- it's `y"
    ),
    "a comment to the line's end": _both("# it's\nALTER TABLE Users -- don't \"\n ADD COLUMN c1 INT FIRST"),
    "a comment and blanks of 5,000 characters": _both(
        f"/* {'it is long, ' * 420} */ ALTER TABLE Users{' ' * 5_000}ADD COLUMN c1 INT FIRST",
        f"/* {'it is long, ' * 420} */{' ' * 5_000}CREATE{' ' * 5_000}VIEW other.v AS SELECT 1",
        f"# {'it is long, ' * 420}\nDROP{' ' * 5_000}VIEW other.v",
    ),
    "double quotes": _both("""ALTER TABLE Users ADD COLUMN c1 VARCHAR(9) DEFAULT "a'b" COMMENT "say ""hi\\"" FIRST"""),
    "ANSI quotes": _both(
        "SET SESSION sql_mode = 'ANSI_QUOTES'", 'ALTER TABLE "Users" ADD COLUMN "c 1" INT DEFAULT 1 FIRST'
    ),
    "an executable comment of no column": _both(
        "CREATE TABLE other.t1 (id INT PRIMARY KEY, url TEXT /*!50606 COMMENT 'x' */) /*!40101 DEFAULT CHARSET=utf8mb4 */ "
        "/*!50100 PARTITION BY HASH (id) PARTITIONS 2 */"
    ),
    "an executable comment of a later version": _both("ALTER TABLE Users ADD COLUMN c1 INT /*!99999 FIRST */"),
    "an optimizer's hint": _both("CREATE TABLE other.t1 AS SELECT /*+ MAX_EXECUTION_TIME(1000) */ * FROM Users"),
    # Columns that move, and are renamed.
    "columns are moved": _both(
        "ALTER TABLE Users CHANGE url url VARCHAR(300) FIRST, CHANGE login login VARCHAR(300) NOT NULL AFTER avatar_url"
    ),
    "a list of columns": _both("ALTER TABLE Users ADD COLUMN (c1 INT, c2 INT), ADD c3 INT AFTER c1, ADD c4 INT FIRST"),
    "columns that may be there": _on(
        MARIADB,
        "ALTER TABLE Users ADD COLUMN IF NOT EXISTS c1 INT FIRST",
        "ALTER TABLE Users DROP COLUMN IF EXISTS c9",
    ),
    "a column at once": _both("ALTER TABLE Users ADD COLUMN c1 INT DEFAULT 7 FIRST, ALGORITHM=INSTANT"),
    "generated columns": _both(
        "ALTER TABLE Users ADD COLUMN g1 VARCHAR(255) GENERATED ALWAYS AS (LOWER(login)) VIRTUAL AFTER user_id",
        "ALTER TABLE Users ADD COLUMN g2 INT AS (CHAR_LENGTH(login)) STORED FIRST",
    ),
    "an invisible column": _both("ALTER TABLE Users ADD COLUMN hidden INT INVISIBLE FIRST"),
    "an invisible column that was not": _on(
        MYSQL, "ALTER TABLE Users ADD COLUMN c1 INT FIRST", "ALTER TABLE Users ALTER COLUMN c1 SET INVISIBLE"
    ),
    "defaults by expression": _both(
        "ALTER TABLE Users ADD COLUMN j JSON DEFAULT (JSON_ARRAY('a', 1)) FIRST, ADD COLUMN d DOUBLE DEFAULT (1 + LENGTH(login))"
    ),
    "types with quotes, commas and bits": _both(
        "ALTER TABLE Users ADD COLUMN e ENUM('a,b','it''s','\"') DEFAULT 'a,b' FIRST, ADD COLUMN s SET('x','y') FIRST, "
        "ADD COLUMN b BIT(8) DEFAULT b'101' FIRST, ADD COLUMN h VARBINARY(4) DEFAULT x'ff00', "
        "ADD COLUMN t TIMESTAMP(6) NULL DEFAULT CURRENT_TIMESTAMP(6) ON UPDATE CURRENT_TIMESTAMP(6) AFTER login, "
        "ADD COLUMN n NATIONAL VARCHAR(5), ADD COLUMN g GEOMETRY, ADD COLUMN y YEAR, ADD COLUMN f DECIMAL(30,10) UNSIGNED"
    ),
    "a vector": _on(
        MYSQL, "CREATE TABLE other.t1 (id INT PRIMARY KEY, v VECTOR(3))", "ALTER TABLE Users ADD v VECTOR FIRST"
    ),
    "a UUID": _on(MARIADB, "ALTER TABLE Users ADD COLUMN u UUID FIRST"),
    # Indexes and constraints.
    "a functional index": _on(
        MYSQL, "ALTER TABLE Users ADD INDEX fi ((LOWER(login)), (CAST(user_id AS CHAR(20))) DESC)"
    ),
    "an index with options": _both("CREATE INDEX i1 ON Users (login(10) DESC, url(5)) USING BTREE COMMENT 'it''s'"),
    "an index that is not used": _on(MYSQL, "ALTER TABLE Users ADD INDEX i1 (login) INVISIBLE"),
    "an index that is ignored": _on(MARIADB, "ALTER TABLE Users ADD INDEX i1 (login) IGNORED"),
    "a check": _both("ALTER TABLE Users ADD CONSTRAINT ck CHECK (CHAR_LENGTH(login) >= 0 AND login <> '\\'')"),
    "a check that is not enforced": _on(MYSQL, "ALTER TABLE Users ADD CHECK (url REGEXP '^h') NOT ENFORCED"),
    "a foreign key": _both(
        "CREATE TABLE other.t1 (id BIGINT PRIMARY KEY, CONSTRAINT f FOREIGN KEY (id) REFERENCES new_data.Users (user_id) "
        "ON DELETE CASCADE ON UPDATE RESTRICT)",
        "DROP TABLE other.t1",
    ),
    # Partitions.
    "partitions": _both(
        "ALTER TABLE Users PARTITION BY HASH (user_id) PARTITIONS 4",
        "ALTER TABLE Users COALESCE PARTITION 2",
        "ALTER TABLE Users REMOVE PARTITIONING",
    ),
    "partitions by range": _both(
        "ALTER TABLE Users PARTITION BY RANGE COLUMNS (user_id) (PARTITION p0 VALUES LESS THAN (10) COMMENT 'it''s', "
        "PARTITION p1 VALUES LESS THAN (MAXVALUE))",
        "ALTER TABLE Users REORGANIZE PARTITION p1 INTO (PARTITION p1 VALUES LESS THAN (20), "
        "PARTITION url VALUES LESS THAN (MAXVALUE))",
        "ALTER TABLE Users ANALYZE PARTITION p0",
        "ALTER TABLE Users TRUNCATE PARTITION p0",
        "ALTER TABLE Users DROP PARTITION p0",
        "CREATE TABLE other.t1 LIKE Users",
        "ALTER TABLE other.t1 REMOVE PARTITIONING",
        "ALTER TABLE Users EXCHANGE PARTITION p1 WITH TABLE other.t1 WITHOUT VALIDATION",
    ),
    # Whole tables.
    "the table goes around": _both("RENAME TABLE Users TO u2, u2 TO other.u3, other.u3 TO Users"),
    "another table of its likeness": _both(
        "CREATE TABLE other.u LIKE Users", "DROP TABLE IF EXISTS other.u, other.no RESTRICT"
    ),
    "another database's swap": _both(
        "CREATE TABLE other.u (user_id BIGINT PRIMARY KEY, bio TEXT, url VARCHAR(255), avatar_url VARCHAR(255), "
        "gravatar_id VARCHAR(255), login VARCHAR(255) NOT NULL)",
        "RENAME TABLE new_data.Users TO other.u_old, other.u TO new_data.Users",
    ),
    "a table out of a query": _both(
        "CREATE TABLE other.t1 (id INT AUTO_INCREMENT PRIMARY KEY) ENGINE InnoDB ROW_FORMAT=DYNAMIC "
        "SELECT login, url FROM Users UNION ALL SELECT 'a', \"it's\""
    ),
    "a table out of two queries": _both(
        "CREATE TABLE other.t1 AS (SELECT url FROM Users) EXCEPT (SELECT login FROM Users)"
    ),
    "a temporary table": _both("CREATE TEMPORARY TABLE Users (url INT)", "DROP TEMPORARY TABLE Users"),
    "a table made again": _on(MARIADB, f"{TUTORIAL.replace('CREATE TABLE IF NOT EXISTS', 'CREATE OR REPLACE TABLE')}"),
    "a sequence": _on(MARIADB, "CREATE SEQUENCE other.s START WITH 5", "DROP SEQUENCE other.s"),
    "a table with versions": _on(
        MARIADB, "CREATE TABLE other.t1 (id INT PRIMARY KEY, url TEXT) WITH SYSTEM VERSIONING"
    ),
    "a name in other letters": _both(
        "CREATE TABLE other.`ünï tbl` (`ключ` INT PRIMARY KEY, `a``b` INT, $c INT, `1` INT) DEFAULT CHARSET=utf8mb4"
    ),
    "options of a table": _on(
        MYSQL,
        "ALTER TABLE Users STATS_PERSISTENT=1, COMPRESSION=''",
        "ALTER TABLE Users CONVERT TO CHARACTER SET utf8mb4 COLLATE utf8mb4_0900_as_cs",
    ),
    "options of a table of MariaDB": _on(
        MARIADB,
        "ALTER TABLE Users PAGE_CHECKSUM=1 TRANSACTIONAL=0",
        "ALTER ONLINE TABLE Users WAIT 5 FORCE, LOCK=NONE",
        "ALTER TABLE Users CONVERT TO CHARACTER SET utf8mb4 COLLATE uca1400_ai_ci",
    ),
    "a database": _both(
        "CREATE SCHEMA IF NOT EXISTS `odd-one` CHARACTER SET latin1",
        "ALTER DATABASE `odd-one` COLLATE utf8mb4_bin",
        "USE `odd-one`",
        "CREATE TABLE Users (url INT, login INT)",
        "USE new_data",
        "DROP DATABASE `odd-one`",
    ),
    # All that is no table.
    "upkeep": _both(
        "FLUSH TABLES",
        "FLUSH TABLES Users WITH READ LOCK",
        "UNLOCK TABLES",
        "FLUSH PRIVILEGES",
        "FLUSH LOGS",
        "ANALYZE TABLE Users",
        "OPTIMIZE TABLE Users",
        "REPAIR TABLE Users",
        "CHECK TABLE Users",
    ),
    "locks": _both(
        "START TRANSACTION",
        "SELECT url FROM Users FOR UPDATE SKIP LOCKED",
        "SAVEPOINT url",
        "UPDATE Users SET url = 'x'",
        "ROLLBACK TO SAVEPOINT url",
        "COMMIT",
        "LOCK TABLES Users WRITE",
        "UNLOCK TABLES",
    ),
    "a distributed transaction": _both(
        "XA START 'it''s'",
        "INSERT INTO Users (user_id, login) VALUES (77, 'xa')",
        "XA END 'it''s'",
        "XA PREPARE 'it''s'",
        "XA COMMIT 'it''s'",
    ),
    "a view": _both(
        "CREATE OR REPLACE ALGORITHM=MERGE SQL SECURITY INVOKER VIEW other.v AS WITH w AS (SELECT url, ROW_NUMBER() "
        "OVER (PARTITION BY login ORDER BY url) AS n FROM new_data.Users) SELECT url, n FROM w WHERE n = 1",
        "DROP VIEW IF EXISTS other.v",
    ),
    "a view of documents": _on(
        MYSQL,
        "CREATE JSON RELATIONAL DUALITY VIEW other.v AS SELECT JSON_DUALITY_OBJECT('_id': user_id, 'url': url) FROM "
        "new_data.Users",
    ),
    "a trigger": _both(
        "CREATE TRIGGER tr BEFORE INSERT ON Users FOR EACH ROW BEGIN IF NEW.url = '' THEN SET NEW.url = NULL; END IF; END",
        "DROP TRIGGER tr",
    ),
    "a procedure": _both(
        "CREATE DEFINER=CURRENT_USER PROCEDURE pr(IN url INT, OUT auto INT) COMMENT 'it''s' MODIFIES SQL DATA BEGIN "
        "DECLARE EXIT HANDLER FOR SQLEXCEPTION BEGIN ROLLBACK; END; SELECT COUNT(*) INTO auto FROM Users FOR UPDATE SKIP "
        "LOCKED; INSERT INTO Users (user_id, login) VALUES (url, 'by procedure'); END",
        "CALL pr(88, @n)",
        "DROP PROCEDURE pr",
    ),
    "a function": _both(
        "CREATE FUNCTION fu(url INT) RETURNS INT DETERMINISTIC NO SQL RETURN url + 1", "DROP FUNCTION fu"
    ),
    "an event": _both(
        "CREATE EVENT ev ON SCHEDULE EVERY 1 DAY DISABLE COMMENT 'it''s' DO DELETE FROM Users WHERE url = ''",
        "ALTER EVENT ev RENAME TO ev2",
        "DROP EVENT ev2",
    ),
    "users and roles": _both(
        "CREATE USER 'o''dd'@'%' IDENTIFIED BY 'it''s \"`'",
        "CREATE ROLE url",
        "ALTER USER 'o''dd'@'%' ACCOUNT LOCK",
        "RENAME USER 'o''dd'@'%' TO auto",
        "DROP USER auto",
        "DROP ROLE url",
    ),
    "a server": _both(
        "CREATE SERVER se FOREIGN DATA WRAPPER mysql OPTIONS (HOST '127.0.0.1', DATABASE 'url')", "DROP SERVER se"
    ),
    "a tablespace": _on(
        MYSQL,
        "CREATE TABLESPACE ts ADD DATAFILE 'ts.ibd'",
        "CREATE TABLE other.t1 (url INT) TABLESPACE ts",
        "DROP TABLE other.t1",
        "DROP TABLESPACE ts",
    ),
    "a spatial reference system": _on(
        MYSQL,
        'CREATE SPATIAL REFERENCE SYSTEM 1234567 NAME \'odd\' DEFINITION \'GEOGCS["it",DATUM["d",SPHEROID["s",6378137,298.3]],'
        'PRIMEM["G",0],UNIT["degree",0.017453292519943278],AXIS["Lat",NORTH],AXIS["Lon",EAST]]\'',
        "DROP SPATIAL REFERENCE SYSTEM 1234567",
    ),
    "a package": _on(
        MARIADB,
        "SET SESSION sql_mode = 'ORACLE'",
        "CREATE OR REPLACE PACKAGE pa AS FUNCTION f RETURN INT; END",
        "DROP PACKAGE pa",
    ),
}

NOT_FOLLOWED: dict[str, Odd] = {
    "a column vector": _both("CREATE TABLE other.t1 (id INT PRIMARY KEY, vector INT)"),
    "a column auto": _on(MARIADB, "CREATE TABLE other.t1 (id INT PRIMARY KEY, auto INT)"),
    "a backslash that escapes nothing": _both(
        "SET SESSION sql_mode = 'NO_BACKSLASH_ESCAPES'",
        "ALTER TABLE Users ADD COLUMN c1 VARCHAR(9) DEFAULT 'a\\' COMMENT '\\' FIRST",
    ),
    "an executable comment that adds a column": _both("ALTER TABLE Users /*!50000 ADD COLUMN c1 INT FIRST */"),
    "an executable comment that moves a column": _both("ALTER TABLE Users ADD COLUMN c1 INT /*!40000 FIRST */"),
    "columns that change names with each other": _both(
        "ALTER TABLE Users RENAME COLUMN gravatar_id TO avatar_url, RENAME COLUMN avatar_url TO gravatar_id"
    ),
    "a column that is not there": _on(MARIADB, "ALTER TABLE Users MODIFY COLUMN IF EXISTS c9 INT FIRST"),
    "a compressed column": Odd(
        ("ALTER TABLE Users ADD COLUMN z1 TEXT COMPRESSED AFTER login",), (MARIADB,), lasts=True
    ),
    "an INET4 in another database": Odd(
        ("CREATE TABLE other.t1 (id INT PRIMARY KEY, i4 INET4)",), (MARIADB,), lasts=True
    ),
    "an INET6": Odd(("ALTER TABLE Users ADD COLUMN i6 INET6 FIRST",), (MARIADB,), lasts=True),
    "an action of a foreign key": _on(
        MARIADB,
        "CREATE TABLE other.t1 (id BIGINT PRIMARY KEY, CONSTRAINT f FOREIGN KEY (id) REFERENCES new_data.Users (user_id) "
        "ON UPDATE SET DEFAULT)",
    ),
    "a table that grows by steps": _on(MYSQL, "ALTER TABLE Users AUTOEXTEND_SIZE=4M"),
}
"""What stops the connector of the servers that are named; elsewhere it is followed, or not valid."""

SHIFTING: dict[str, Odd] = {
    "a position in an executable comment": _both(
        "ALTER TABLE Users ADD COLUMN c1 VARCHAR(255) DEFAULT 'g' /*!40000 AFTER login */"
    ),
    "a column that is there already": _on(
        MARIADB, "ALTER TABLE Users ADD COLUMN IF NOT EXISTS url VARCHAR(255) AFTER login"
    ),
    "a table made again in another order": _on(
        MARIADB,
        "CREATE OR REPLACE TABLE Users (user_id BIGINT PRIMARY KEY, url VARCHAR(255), avatar_url VARCHAR(255), "
        "gravatar_id VARCHAR(255), login VARCHAR(255) NOT NULL)",
    ),
    "a whole statement in an executable comment": _on(
        MARIADB, "/*!50000 ALTER TABLE Users MODIFY avatar_url VARCHAR(300) AFTER user_id */"
    ),
}
"""What is neither followed nor stops the connector: values are read into other columns."""
