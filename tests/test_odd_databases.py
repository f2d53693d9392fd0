"""Databases that are not as this program makes them, files in odd places: each works or is refused in a sentence."""
import contextlib
import os
import pathlib
import re
import shutil
import sqlite3
import subprocess
import sys
import tempfile

import pytest
from conftest import PROGRAM

import store_study_info as store
from dicom_files import study, uid
from stand_in import StandIn
from test_store import child, everything, put, said_by, series_row, study_row

NOWHERE = "http://127.0.0.1:9"    # nothing listens there


@pytest.fixture(scope="module")
def archive():
    """E1 and E3 with three series each, E2 with two; all series of one SAR, and each its own number."""
    with StandIn(*study("E1", 3, 1), *study("E2", 2, 1), *study("E3", 3, 1)) as server:
        yield server


def tables(changes=None, options="", **more) -> str:
    """The statements that make our tables, with some columns defined otherwise, and constraints more."""
    changes, made = changes or {}, ""
    for table, fields in store.TABLES.items():
        columns = [f"{field.column} {changes.get(f'{table}.{field.column}', field.sql)}" for field in fields]
        made += f"CREATE TABLE {table} ({', '.join([*columns, *more.get(table, [])])}) {options};"
    return made


def database(path, script: str) -> None:
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as conn:
        conn.executescript(script)


def typed(types: str, **keys) -> str:
    """Our tables with all columns of one type."""
    return tables({f"{table}.{field.column}": types + (" PRIMARY KEY" if field is fields[0] else "")
                   for table, fields in store.TABLES.items() for field in fields}, **keys)


def texts(path) -> dict[str, list[list[str]]]:
    """All that is stored in our columns, numbers as they are read: 60 and 60.0 are the same."""
    def text(value):
        return f"{float(value):g}" if re.fullmatch(r"\d+(\.\d+)?", str(value)) else str(value)
    with contextlib.closing(sqlite3.connect(path)) as conn:
        return {table: sorted([text(value) for value in row] for row in conn.execute(
            f"SELECT {', '.join(field.column for field in fields)} FROM {table}"))
            for table, fields in store.TABLES.items()}


@pytest.fixture(scope="module")
def usual(archive, tmp_path_factory):
    """What a database of this program's own making holds."""
    path = tmp_path_factory.mktemp("usual") / "study_info.db"
    with contextlib.closing(store.open_database(str(path))) as conn:
        for accession, count in (("E1", 3), ("E2", 2), ("E3", 3)):
            rows = [series_row(number, accession, series_uid=uid(accession, number), sar=0.5,
                               pulse_sequence_name="tfl") for number in range(1, count + 1)]
            store.store_study(accession, conn, study_row(accession), rows)
    return texts(path)


# ------------------------------------------------------------------------------------------------------------------
# One table of databases
# ------------------------------------------------------------------------------------------------------------------

LOG = """CREATE TABLE log (accession TEXT PRIMARY KEY);
CREATE TRIGGER a AFTER INSERT ON series BEGIN INSERT OR IGNORE INTO log VALUES (new.accession); END;
CREATE TRIGGER b AFTER UPDATE ON series BEGIN INSERT OR REPLACE INTO log VALUES (new.accession); END;"""

WORKS = {
    "a date as INTEGER": tables({"studies.study_date": "INTEGER"}),
    "a date as DATE": tables({"studies.study_date": "DATE"}),
    "no types": typed(""),
    "all NUMERIC": typed("NUMERIC"),
    "all TEXT": typed("TEXT"),
    "all BLOB": typed("BLOB"),
    "all VARCHAR": typed("VARCHAR(64)"),
    "a duration as REAL": tables({"series.duration": "REAL"}),
    "a number of a series as REAL": tables({"series.series_number": "REAL"}),
    "WITHOUT ROWID": tables(options="WITHOUT ROWID"),
    "STRICT": tables(options="STRICT"),
    "STRICT with a date as INTEGER": tables({"studies.study_date": "INTEGER"}, options="STRICT"),
    "accessions that differ by case are one": tables({"studies.accession": "TEXT COLLATE NOCASE PRIMARY KEY",
                                                      "series.accession": "TEXT COLLATE NOCASE"}),
    "UIDs that differ by case are one": tables({"series.series_uid": "TEXT COLLATE NOCASE PRIMARY KEY"}),
    "keys of descending order": tables({"studies.accession": "TEXT PRIMARY KEY DESC"}),
    "generated columns of the user's own": tables(series=["joule REAL AS (sar * duration) STORED", "x AS (sar * 2)"]),
    "UTF-16": "PRAGMA encoding = 'UTF-16';" + tables(),
    "WAL": "PRAGMA journal_mode = WAL;" + tables(),
    "small pages and auto_vacuum": "PRAGMA page_size = 512; PRAGMA auto_vacuum = FULL;" + tables(),
    "foreign keys that are looked at only at COMMIT":
        tables({"series.accession": "TEXT NOT NULL REFERENCES studies DEFERRABLE INITIALLY DEFERRED"}),
    "a constraint that never strikes": tables(series=["UNIQUE (series_uid, sar) ON CONFLICT REPLACE"]),
    "a log by triggers": tables() + LOG,
    "a table of another case": tables().replace("studies", "Studies").replace(" sar ", " SAR "),
    "rows that are not UTF-8":
        tables() + "INSERT INTO studies VALUES (CAST(x'4539ff' AS TEXT), x'ff', x'ff', 1, 1, 1, 1, 1, 1, x'ff', 1);"
                   "DELETE FROM studies;",
}


@pytest.mark.parametrize("name", WORKS)
def test_an_odd_database_holds_the_same_and_is_read_again_as_stored(archive, usual, home, here, name):
    if "STRICT" in name and sqlite3.sqlite_version_info < (3, 37):
        pytest.skip("this SQLite has no STRICT tables")
    database(home.db, WORKS[name])
    ran = here("202404", url=archive.url)
    assert (ran.status, ran.printed) == (0, ["E1", "E2", "E3"]), ran.err
    assert texts(home.db) == usual
    with contextlib.closing(store.open_database(str(home.db))) as conn:
        assert [store.stored_date(conn, one) for one in ("E1", "e1", "E10", "E")] == ["20240427", None, None, None]
    again = here("--csv", "out.csv", "202404", url=archive.url)
    assert "studies: 0 stored, 3 already stored, 0 failed" in again.summary
    assert len((home.folder / "out.csv").read_text().splitlines()) == 1 + 8
    assert here("--force", "202404", url=archive.url).status == 0 and texts(home.db) == usual


ALL = ["E1", "E2", "E3"]
NONE: list[str] = []
RULE, KEPT = "has a rule of your own that refuses it", "kept something else than was written"
BEFORE = "CREATE TRIGGER own BEFORE INSERT ON series WHEN new.accession = 'E2' BEGIN "
AFTER = "CREATE TRIGGER own AFTER INSERT ON series WHEN new.accession = 'E2' AND new.series_number = 2 BEGIN "

REFUSED = {    # statements, what is said, which studies are stored
    "a date as REAL": (tables({"studies.study_date": "REAL"}), rf"{KEPT} \(studies.study_date\)", NONE),
    "an accession as INTEGER PRIMARY KEY": (tables({"studies.accession": "INTEGER PRIMARY KEY"}), RULE, NONE),
    "a text column with fewer characters": (
        tables({"series.series_description": "TEXT CHECK (length(series_description) < 3)"}), RULE, NONE),
    "STRICT with a text as INTEGER": (tables({"studies.sex": "INTEGER"}, options="STRICT"), RULE, NONE),
    "a trigger that changes a value": (
        tables() + AFTER + "UPDATE series SET sar = round(sar) WHERE series_uid = new.series_uid; END",
        rf"E2: not stored: .*{KEPT} \(series.sar\)", ["E1", "E3"]),
    "a trigger that empties a value": (
        tables() + AFTER + "UPDATE studies SET age = NULL; END", rf"E2: .*{KEPT} \(studies.age\)", ["E1", "E3"]),
    "a trigger that fills a value": (
        tables() + AFTER + "UPDATE series SET sequence_name = 'None'; END", rf"{KEPT} \(series.sequence_name\)",
        ["E1", "E3"]),
    "a trigger that takes a series out": (
        tables() + AFTER + "DELETE FROM series WHERE accession = 'E2'; END", rf"E2: .*{KEPT} \(no row in series\)",
        ["E1", "E3"]),
    "a trigger that puts a series in": (
        tables() + AFTER + "INSERT INTO series(series_uid, accession) VALUES ('x', 'E2'); END",
        rf"E2: .*{KEPT} \(other series\)", ["E1", "E3"]),
    "RAISE(IGNORE)": (tables() + BEFORE + "SELECT RAISE(IGNORE); END", rf"E2: .*{KEPT} \(no row in series\)",
                      ["E1", "E3"]),
    "RAISE(IGNORE) for studies": (
        tables() + BEFORE.replace("series", "studies") + "SELECT RAISE(IGNORE); END",
        rf"E2: .*{KEPT} \(no row in studies\)", ["E1", "E3"]),
    **{f"RAISE({how})": (tables() + f"{BEFORE} SELECT RAISE({how}, 'no thanks'); END", rf"E2: .*{RULE} \(no thanks\)",
                         ["E1", "E3"]) for how in ("ABORT", "FAIL", "ROLLBACK")},
    **{f"UNIQUE ON CONFLICT {how}": (tables(series=[f"UNIQUE (accession, sar) ON CONFLICT {how}"]),
                                     rf"E1: .*{RULE} \(UNIQUE constraint failed: series.accession, series.sar\)", NONE)
       for how in ("REPLACE", "IGNORE", "ABORT", "FAIL", "ROLLBACK")},
    **{f"UNIQUE ON CONFLICT {how} with another study": (
        tables(series=[f"UNIQUE (series_number) ON CONFLICT {how}"]), rf"E2: .*{RULE}", ["E1"])
       for how in ("REPLACE", "IGNORE", "ROLLBACK")},
    "a study that takes the place of another": (
        tables({"studies.sex": "TEXT UNIQUE ON CONFLICT REPLACE"}), rf"E2: .*{RULE}", ["E1"]),
    "a generated column in place of ours": (
        tables({"series.sar": "REAL AS (duration / 2.0)"}), "the table series lacks sar", None),
    "a view in place of studies": (
        tables().replace("TABLE studies", "TABLE raw") + "CREATE VIEW studies AS SELECT * FROM raw;",
        "accession is not the primary key of the table studies", None),
    "a view that can be written": (
        tables().replace("TABLE studies", "TABLE raw") + "CREATE VIEW studies AS SELECT * FROM raw;"
        "CREATE TRIGGER own INSTEAD OF INSERT ON studies BEGIN INSERT INTO raw(accession) VALUES (new.accession); END",
        "accession is not the primary key of the table studies", None),
    "a collation that this program does not have": (
        # made under another name, since SQLite here does not know it either
        tables() + "PRAGMA writable_schema = ON; UPDATE sqlite_master SET sql = replace(sql, 'accession TEXT PRIMARY', "
                   "'accession TEXT COLLATE german PRIMARY') WHERE name = 'studies'; PRAGMA writable_schema = OFF;",
        "no such collation sequence: german", None),
    "a trigger that writes to a table that is gone": (
        tables() + AFTER + "INSERT INTO gone VALUES (1); END", r"no such table: main.gone", NONE),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_an_odd_database_does_not_take_is_a_sentence_and_nothing_of_it_stays(archive, home, here, name):
    script, said, stored = REFUSED[name]
    if "STRICT" in name and sqlite3.sqlite_version_info < (3, 37):
        pytest.skip("this SQLite has no STRICT tables")
    database(home.db, script)
    ran = here("202404", url=archive.url)
    assert ran.status == 1 and ran.printed == (stored or [])
    assert [line for line in ran.err.splitlines() if re.search(said, line) and str(home.db) in line], ran.err
    if stored is not None:
        found = everything(home.db)
        assert [row[0] for row in found["studies"]] == stored
        assert [row[1] for row in found["series"]].count("E1") == 3 * ("E1" in stored)
        assert {row[1] for row in found["series"]} == set(stored)


def test_a_study_that_a_changed_trigger_no_longer_takes_keeps_what_was_stored(archive, home, here):
    assert here("202404", url=archive.url).status == 0
    database(home.db, "UPDATE series SET sar = 9; CREATE TRIGGER own AFTER UPDATE ON series WHEN new.accession = 'E2' "
                      "BEGIN UPDATE series SET sar = 7 WHERE series_uid = new.series_uid; END")
    ran = here("--force", "202404", url=archive.url)
    assert ran.status == 1 and KEPT in ran.err
    assert {(row["accession"], row["sar"]) for row in home.series()} == {("E1", 0.5), ("E2", 9.0), ("E3", 0.5)}


@pytest.mark.parametrize("name", ["a?b.db", "50%.db", "a#b.db", "a%20b.db", "file:x.db", "a b/c?mode=ro.db"])
def test_a_database_may_have_any_path(archive, home, here, name):
    path = home.folder / name
    path.parent.mkdir(exist_ok=True)
    assert here("--db", name, "202404", url=archive.url).status == 0
    assert len(everything(path)["studies"]) == 3 and os.listdir(path.parent) == [path.name]


# The folder of the database becomes a disk that is read-only, for the program alone.
READ_ONLY = """cp -a disk kept && mount -t tmpfs none disk && cp -a kept/. disk && rm -r kept &&
mount -o remount,ro disk && exec "$@" """


@pytest.mark.parametrize("arguments, status, said", [
    (["--db", "disk/study_info.db", "--csv", "out.csv", "202404"], 0, "3 already stored"),
    (["--db", "disk/study_info.db", "--force", "202404"], 0, "0 failed"),
    (["--db", "disk/less.db", "--force", "202404"], 1, "disk/less.db: attempt to write a readonly database; it or its"),
    (["--db", "disk/wal.db", "202404"], 1, "disk/wal.db: unable to open database file; check the path"),
    (["--db", "disk/own.db", "202404"], 1, "disk/own.db: attempt to write a readonly database; it or its folder"),
    (["--db", "disk/new.db", "202404"], 1, "disk/new.db: the folder"),
    (["--csv", "disk/out.csv", "202404"], 2, "'disk/out.csv': its folder does not exist or cannot be written")])
def test_a_read_only_disk_can_be_read_and_is_else_a_sentence(archive, home, arguments, status, said):
    (home.folder / "disk").mkdir()
    assert home.run("--db", "disk/study_info.db", "202404", url=archive.url).status == 0
    shutil.copy(home.folder / "disk" / "study_info.db", home.folder / "disk" / "wal.db")
    database(home.folder / "disk" / "wal.db", "PRAGMA journal_mode = WAL")
    shutil.copy(home.folder / "disk" / "study_info.db", home.folder / "disk" / "less.db")
    database(home.folder / "disk" / "less.db", "DELETE FROM series")
    database(home.folder / "disk" / "own.db", "CREATE TABLE own (x)")
    inside = ["unshare", "--mount", "sh", "-c", READ_ONLY, "sh"]
    if not shutil.which("unshare") or subprocess.run([*inside, "true"], cwd=home.folder, check=False).returncode:
        pytest.skip("no disk can be mounted here")
    ended = subprocess.run([*inside, *home.command(*arguments, url=archive.url)], cwd=home.folder, text=True,
                           env=home.environment(), capture_output=True, check=False)
    assert ended.returncode == status and said in ended.stderr and "Traceback" not in ended.stderr, ended.stderr


def test_values_of_odd_kinds_in_stored_rows_are_no_trouble(archive, home, here):
    """Not UTF-8, BLOBs, as pandas writes the numbers of numpy, and a key that is NULL."""
    assert here("202404", url=archive.url).status == 0
    database(home.db, "UPDATE studies SET patient_id = CAST(x'41ff' AS TEXT), age = x'2800', study_date = x'ff';"
                      "UPDATE series SET series_description = CAST(x'ff' AS TEXT), series_number = x'01';"
                      "INSERT INTO series (series_uid, accession) VALUES (NULL, 'E1'), (NULL, 'mine');")
    ran = here("--csv", "out.csv", "202404", url=archive.url)
    assert ran.status == 0 and "A\ufffd" in (home.folder / "out.csv").read_text(encoding="utf-8")
    assert here("--force", "202404", url=archive.url).status == 0
    assert [row["series_number"] for row in home.series()] == [1, 2, 3, 1, 2, 1, 2, 3, None]    # the last one is mine


SAME = {    # what is written, the type of the column, whether it is kept
    "a date as a number": ("20240427", "INTEGER", True), "leading zeros": ("0012", "INTEGER", False),
    "a number as text": (5, "TEXT", True), "a whole number as REAL": (5, "REAL", True),
    "a text as REAL": ("5", "REAL", False), "a text of an exponent": ("1e3", "NUMERIC", False),
    "more digits than a text keeps": (0.1 + 0.2, "TEXT", False), "a fraction as text": (0.0242176, "TEXT", True),
    "a fraction as INTEGER": (0.5, "INTEGER", True), "the text None": ("None", "TEXT", True),
    "beyond the whole numbers of REAL": (2 ** 53 + 1, "REAL", False), "nothing": (None, "INTEGER", True),
}


@pytest.mark.parametrize("name", SAME)
def test_a_number_may_be_kept_as_text_and_text_as_a_number_where_both_are_written_alike(tmp_path, name):
    value, kind, kept = SAME[name]
    path = str(tmp_path / "study_info.db")
    database(path, tables({"studies.patient_id": kind}))
    with contextlib.closing(store.open_database(path)) as conn:
        if kept:
            assert store.store_study("E1", conn, study_row(patient_id=value), []).changed
            assert not store.store_study("E1", conn, study_row(patient_id=value), []).changed
        else:
            with pytest.raises(store.StudyError, match=rf"{KEPT} \(studies.patient_id\)"):
                store.store_study("E1", conn, study_row(patient_id=value), [])
    assert len(everything(path)["studies"]) == kept


def test_nothing_is_not_the_text_none(tmp_path):
    path = str(tmp_path / "study_info.db")
    with contextlib.closing(store.open_database(path)) as conn:
        put(conn, "E1", (), patient_id="None")
        assert store.store_study("E1", conn, study_row(patient_id=None), []).changed
    assert everything(path)["studies"][0][1] is None


@pytest.mark.parametrize("collation", ["NOCASE", "RTRIM"])
def test_accessions_that_a_column_takes_for_one_another_are_kept_apart_or_refused(tmp_path, collation):
    path, other = str(tmp_path / "study_info.db"), "E1A" if collation == "NOCASE" else "E1a "
    database(path, tables({"studies.accession": f"TEXT COLLATE {collation} PRIMARY KEY",
                           "series.accession": f"TEXT COLLATE {collation}"}))
    with contextlib.closing(store.open_database(path)) as conn:
        store.store_study("E1a", conn, study_row("E1a"), [series_row(1, "E1a")])
        before = everything(path)
        assert store.stored_date(conn, other) is None
        with pytest.raises(store.StudyError, match=RULE):
            store.store_study(other, conn, study_row(other, age=1), [series_row(9, other)])
        assert len(list(store.csv_rows(conn, [other]))) == 1
    assert everything(path) == before


def test_accessions_of_digits_are_kept_apart_in_a_column_of_numbers(tmp_path):
    path = str(tmp_path / "study_info.db")
    database(path, tables({"studies.accession": "NUMERIC PRIMARY KEY", "series.accession": "NUMERIC"}))
    with contextlib.closing(store.open_database(path)) as conn:
        store.store_study("7", conn, study_row("7"), [series_row(1, "7")])
        assert store.stored_date(conn, "7") == "20240427" and store.stored_date(conn, "007") is None
        assert not store.store_study("7", conn, study_row("7"), [series_row(1, "7")]).changed
        with pytest.raises(store.StudyError):
            store.store_study("007", conn, study_row("007"), [])
        assert [len(list(store.csv_rows(conn, [one]))) for one in ("7", "007")] == [2, 1]


# ------------------------------------------------------------------------------------------------------------------
# Several studies in one transaction
# ------------------------------------------------------------------------------------------------------------------

@pytest.fixture
def conn(tmp_path):
    with contextlib.closing(store.open_database(str(tmp_path / "study_info.db"))) as conn:
        yield conn


def studies(*accessions, numbers=(1, 2)) -> list:
    return [(one, study_row(one), [series_row(number, one) for number in numbers]) for one in accessions]


def transactions(conn, act) -> int:
    statements: list[str] = []
    conn.set_trace_callback(statements.append)
    act()
    conn.set_trace_callback(None)
    return sum(statement.startswith("COMMIT") for statement in statements)


def test_several_studies_are_one_transaction(conn):
    outcomes: list = []
    assert transactions(conn, lambda: outcomes.extend(store.store_studies(conn, studies("E1", "E2", "E3")))) == 1
    assert outcomes == [store.Outcome(0, True)] * 3
    assert [len(rows) for rows in everything(conn.path).values()] == [3, 6]
    assert store.store_studies(conn, []) == []


def test_a_study_that_is_refused_is_undone_alone_in_the_same_transaction(conn):
    conn.execute("CREATE TRIGGER own BEFORE INSERT ON series WHEN new.series_uid = '2.25.2.2' "
                 "BEGIN SELECT RAISE(FAIL, 'not this one'); END")
    outcomes: list = []
    assert transactions(conn, lambda: outcomes.extend(store.store_studies(conn, studies("E1", "E2", "E3")))) == 1
    assert [isinstance(outcome, store.StudyError) for outcome in outcomes] == [False, True, False]
    assert [row[0] for row in everything(conn.path)["studies"]] == ["E1", "E3"] and not conn.in_transaction


@pytest.mark.parametrize("bad", [("E1",), ("E2",), ("E3",), ("E1", "E3"), ("E1", "E2", "E3")])
def test_a_rule_that_undoes_the_whole_transaction_takes_no_other_study_along(conn, bad):
    conn.execute(f"CREATE TRIGGER own BEFORE INSERT ON series WHEN new.accession IN {(*bad, '')} "
                 "BEGIN SELECT RAISE(ROLLBACK, 'not this one'); END")
    outcomes = store.store_studies(conn, studies("E1", "E2", "E3"))
    assert [isinstance(outcome, store.StudyError) for outcome in outcomes] == [one in bad for one in ALL]
    assert [row[0] for row in everything(conn.path)["studies"]] == [one for one in ALL if one not in bad]


def test_foreign_keys_of_the_users_own_that_fail_at_commit_fail_alone(tmp_path):
    path = str(tmp_path / "study_info.db")
    database(path, "CREATE TABLE sexes (sex TEXT PRIMARY KEY); INSERT INTO sexes VALUES ('F');" + tables(
        {"studies.sex": "TEXT REFERENCES sexes DEFERRABLE INITIALLY DEFERRED"}))
    with contextlib.closing(store.open_database(path)) as conn:
        conn.execute("PRAGMA foreign_keys = ON")    # as an SQLite that is built so does by itself
        group = studies("E1", "E2", "E3")
        group[1][1]["sex"] = "X"
        outcomes = store.store_studies(conn, group)
        assert [type(one) for one in outcomes] == [store.Outcome, store.StudyError, store.Outcome]
        assert RULE in str(outcomes[1]) and not conn.in_transaction
    assert [row[0] for row in everything(path)["studies"]] == ["E1", "E3"]


def test_foreign_keys_that_are_looked_at_hold(conn):
    conn.execute("PRAGMA foreign_keys = ON")
    put(conn, "E1", (1, 2))
    put(conn, "E1", (2, 3))
    conn.execute("PRAGMA foreign_keys = OFF")
    conn.execute("DELETE FROM studies")
    conn.execute("PRAGMA foreign_keys = ON")
    put(conn, "E1", (3, 4))
    assert len(everything(conn.path)["series"]) == 2


def test_what_brings_nothing_new_changes_nothing(conn):
    (again,) = group = studies("E1")
    for replace in (True, False):
        assert store.store_studies(conn, group, replace) == [store.Outcome(0, replace)]
        before = conn.total_changes
        assert store.store_studies(conn, group, replace) == [store.Outcome(0, False)]
        assert conn.total_changes == before


@pytest.mark.parametrize("replace", [True, False])
@pytest.mark.parametrize("age, numbers, stayed, changed", [
    (40, (1, 2, 3), 0, True), (41, (1, 2), 0, True), (40, (1,), 1, False), (41, (1,), 1, False),
    (40, (1, 3), 1, True), (40, (), 2, False)])
def test_it_is_told_whether_anything_changed_and_what_stayed(conn, replace, age, numbers, stayed, changed):
    put(conn, "E1", (1, 2))
    before = everything(conn.path)
    rows = [series_row(number) for number in numbers]
    outcome = store.store_study("E1", conn, study_row(age=age), rows, replace)
    assert outcome == (store.Outcome(0, True) if replace else store.Outcome(stayed, changed))
    assert (everything(conn.path) != before) is outcome.changed


@pytest.mark.parametrize("replace", [True, False])
def test_series_without_a_row_of_their_study_are_not_a_stored_accession(conn, replace):
    """Whoever deleted the row gets exactly what the server has."""
    put(conn, "E1", (1, 2, 9))
    put(conn, "E2", (1,))
    conn.execute("UPDATE series SET sar = 7 WHERE accession = 'E1'")
    conn.execute("DELETE FROM studies WHERE accession = 'E1'")
    assert store.stored_date(conn, "E1") is None
    outcome = store.store_study("E1", conn, study_row(), [series_row(1), series_row(2)], replace)
    assert outcome == store.Outcome(0, True)
    assert [row[:3] for row in everything(conn.path)["series"]] == [
        ("2.25.1.1", "E1", 0.25), ("2.25.1.2", "E1", 0.25), ("2.25.2.1", "E2", 0.25)]
    assert len(everything(conn.path)["studies"]) == 2


def test_an_accession_whose_row_was_deleted_by_hand_is_acquired_as_new(archive, home, here):
    assert here("202404", url=archive.url).status == 0
    wanted = home.series()
    database(home.db, "DELETE FROM studies WHERE accession = 'E1'; "
                      "UPDATE series SET series_uid = 'gone' WHERE accession = 'E1' AND series_number = 3")
    ran = here("202404", url=archive.url)
    assert ran.printed == ["E1"] and home.series() == wanted
    assert here("202404", url=archive.url).printed == []


def test_a_series_under_another_accession_names_both_and_the_way_out(conn):
    put(conn, "E1", (1, 2))
    moved = ("E2", study_row("E2"), [series_row(2, "E2", series_uid="2.25.1.2")])
    outcomes = store.store_studies(conn, [*studies("E3"), moved])
    said = str(outcomes[1])
    assert re.fullmatch(r"not stored: series 2\.25\.1\.2 of E2 is stored under accession E1 already; "
                        r"see 'One series under two accessions' in README\.md", said)
    for statement in ("DELETE FROM series WHERE accession = 'E1'", "DELETE FROM studies WHERE accession = 'E1'"):
        conn.execute(statement)
    assert store.store_studies(conn, [moved]) == [store.Outcome(0, True)]


# ------------------------------------------------------------------------------------------------------------------
# Files in odd places
# ------------------------------------------------------------------------------------------------------------------

def make_netrc(folder, name="netrc", text="default login jo password hunter2\n") -> pathlib.Path:
    (folder / name).write_text(text)
    (folder / name).chmod(0o600)
    return folder / name


USED = {    # options that use the file named own, in the folder or as a link
    "netrc": ("netrc", []), "the netrc file of the option": ("own", ["--netrc", "own"]),
    "the netrc file of home": (".netrc", []), "netrc beside the one of the option": ("netrc", ["--netrc", "other"]),
    "a token file": ("own", ["@own"]), "a second token file": ("own", ["@other", "@./own"]),
    "another database": ("own", []),
}
SPELLINGS = ["name", "symlink", "hard link", "spelling", "absolute"]


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("use", USED)
def test_csv_onto_a_file_that_is_in_use_is_a_usage_error(home, use, spelling):
    name, options = USED[use]
    own = home.folder / name
    make_netrc(home.folder, "other", "# nothing\n")
    if use == "another database":
        database(own, tables())
    else:
        make_netrc(home.folder, name, "# nothing\n")
    before = own.read_bytes()
    target = {"name": name, "symlink": "link", "hard link": "link", "spelling": f"./x/../{name}", "absolute": own}
    (home.folder / "x").mkdir()
    if spelling == "symlink":
        (home.folder / "link").symlink_to(name)
    elif spelling == "hard link":
        os.link(own, home.folder / "link")
    ran = home.run("--csv", target[spelling], *options, "E1", url=NOWHERE)
    assert ran.status == 2 and "is a database, or a file that this run itself uses" in ran.err, ran.err
    assert own.read_bytes() == before and not home.db.exists() and len(ran.err.splitlines()) == 1


@pytest.mark.parametrize("spelling", ["name", "symlink", "hard link"])
def test_csv_onto_the_program_is_a_usage_error(home, spelling):
    copy = shutil.copy(PROGRAM, home.folder / "program.py")
    before = pathlib.Path(copy).read_bytes()
    target = home.folder / ("program.py" if spelling == "name" else "link")
    if spelling == "symlink":
        target.symlink_to("program.py")
    elif spelling == "hard link":
        os.link(copy, target)
    ended = subprocess.run([sys.executable, copy, "--url", NOWHERE, "--csv", target, "E1"], cwd=home.folder, text=True,
                           env=home.environment(), capture_output=True, check=False)
    assert ended.returncode == 2 and "itself uses" in ended.stderr and "Traceback" not in ended.stderr
    assert pathlib.Path(copy).read_bytes() == before == target.read_bytes()


@pytest.mark.parametrize("stream", ["stdin", "stdout", "stderr"])
def test_csv_onto_a_file_that_a_standard_stream_is_bound_to_is_a_usage_error(home, stream):
    own = home.folder / "own"
    own.write_text("E1\n")
    with open(own, "r" if stream == "stdin" else "a", encoding="utf-8") as file:
        process = home.start("--csv", "own", "@-", url=NOWHERE, **{stream: file})
        _, err = process.communicate()
    said = own.read_text() if stream == "stderr" else err
    assert process.returncode == 2 and "itself uses" in said and own.read_text().startswith("E1\n")


def test_csv_onto_the_certificates_is_a_usage_error(home):
    (home.folder / "ca.pem").write_text("x")
    ran = home.run("--csv", "ca.pem", "E1", url=NOWHERE, env={"SSL_CERT_FILE": str(home.folder / "ca.pem")})
    assert ran.status == 2 and (home.folder / "ca.pem").read_text() == "x"


@pytest.mark.parametrize("side", ["", "-journal", "-wal", "-shm"])
@pytest.mark.parametrize("name", ["study_info.db", "other.db"])
def test_csv_onto_a_database_or_beside_it_is_a_usage_error(archive, home, here, name, side):
    assert here("E1", "--db", name, url=archive.url).status == 0
    before = (home.folder / name).read_bytes()
    (home.folder / "link").symlink_to(name + side)
    for target in (name + side, "link"):
        assert here("--csv", target, "E1", url=archive.url).status == 2
    assert (home.folder / name).read_bytes() == before and side in ("",) or not (home.folder / (name + side)).exists()


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux has /proc")
def test_csv_onto_a_file_that_cannot_be_read_is_a_usage_error(home):
    ran = home.run("--csv", "/proc/self/mem", "E1", env={"ORTHANC_URL": NOWHERE})
    assert ran.status == 2 and "its folder does not exist or cannot be written" in ran.err


def test_csv_onto_a_csv_file_or_what_is_nothing_of_these_is_fine(archive, home, here):
    for name in ("out.csv", "netrc.csv", "study_info.db.csv", "tokens.csv"):
        (home.folder / name).write_text("old\n")
        assert here("--csv", name, "E1", url=archive.url).status == 0
        assert (home.folder / name).read_text() != "old\n"


# -- the working directory, home -------------------------------------------------------------------------------------

def run_without_folder(home, *arguments, url=NOWHERE) -> subprocess.CompletedProcess:
    """The program in a working directory that is deleted before it starts."""
    (home.folder / "deleted").mkdir()
    command = ["sh", "-c", 'cd deleted && rmdir ../deleted && exec "$@"', "sh",
               *home.command(*arguments, url=url)]
    ended = subprocess.run(command, cwd=home.folder, env=home.environment(), text=True,
                           capture_output=True, stdin=subprocess.DEVNULL, timeout=120, check=False)
    assert "Traceback" not in ended.stderr, ended.stderr
    return ended


@pytest.mark.parametrize("arguments, said", [
    ([], "--db 'study_info.db': the working directory was deleted"),
    (["--db", "x/y.db"], "--db 'x/y.db': the working directory was deleted"),
    (["--db", "{}/x.db", "--csv", "x.csv"], "--csv 'x.csv': the working directory was deleted"),
    (["--db", "{}/x.db", "--netrc", "own"], "--netrc 'own': the working directory was deleted"),
    (["--db", "{}/x.db", "@tokens.txt"], "token file @tokens.txt cannot be read: No such file")])
def test_a_working_directory_that_was_deleted_is_a_sentence_for_every_relative_path(home, arguments, said):
    ended = run_without_folder(home, *(argument.format(home.folder) for argument in arguments), "E1")
    assert ended.returncode == 2 and said in ended.stderr and len(ended.stderr.splitlines()) == 1


def test_without_a_working_directory_whole_paths_work(archive, home):
    options = ["--db", home.folder / "x.db", "--csv", home.folder / "x.csv"]
    ended = run_without_folder(home, *options, "202404", url=archive.url)
    assert (ended.returncode, ended.stdout) == (0, "E1\nE2\nE3\n")
    assert len((home.folder / "x.csv").read_text().splitlines()) == 9


def test_a_working_directory_that_is_deleted_while_it_runs_hurts_nothing(archive, home, here, monkeypatch):
    folder = home.folder / "sub"
    folder.mkdir()
    monkeypatch.chdir(folder)

    def gone(*_):
        shutil.rmtree(folder)
        return store.PLAIN.fullmatch("E1") and []
    monkeypatch.setattr(store, "fetch_and_store", gone)
    ran = here("--db", home.folder / "x.db", "--csv", "x.csv", "E1", url=archive.url)
    assert ran.status == 1 and f"CSV file {folder}/x.csv cannot be written: No such file" in ran.err


HOMELESS = """
os.environ["HOME"] = os.path.dirname(path)
os.chdir("/")
print(store.netrc_files(None), store.find_credentials("h", [])[1])
try:
    store.open_database(path)
except store.DatabaseError as error:
    print(error)
"""


def test_a_home_that_cannot_be_read_is_a_sentence():
    with contextlib.ExitStack() as stack:
        folder = pathlib.Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.chmod(0o755)
        (folder / "home").mkdir(mode=0)
        said = said_by(child(HOMELESS, folder / "home" / "x.db", user=True)).splitlines()
    assert said[0].startswith("[] no netrc file: there is no ./netrc and no ~/.netrc (your home folder cannot be read)")
    assert said[1] == f"database {folder}/home/x.db cannot be read: Permission denied"


def test_where_home_is_read_no_home_is_blamed(home, monkeypatch):
    monkeypatch.chdir(home.folder)
    monkeypatch.setenv("HOME", str(home.folder))
    assert store.netrc_files(None) == [] and "home folder" not in store.find_credentials("h", [])[1]


# -- netrc -----------------------------------------------------------------------------------------------------------

ENTRY = b"machine h login jo password hunter2\n"


@pytest.mark.parametrize("content, found", [
    (ENTRY, ("jo", "hunter2")), (b"\xef\xbb\xbf" + ENTRY, ("jo", "hunter2")),
    (b"\xef\xbb\xbf# mine\r\n" + ENTRY.replace(b"\n", b"\r\n"), ("jo", "hunter2")),
    (ENTRY.replace(b" ", b"\r\n  "), ("jo", "hunter2")),
    (ENTRY.replace(b"hunter2", "hünter2".encode()), ("jo", "hünter2")),
    (b"\xef\xbb\xbf" + ENTRY.replace(b"hunter2", b'"hun ter"'), ("jo", "hun ter")),
    (ENTRY.replace(b"machine h", b"machine other"), None), (b"\xef\xbb\xbf", None), (b"", None),
    (ENTRY.replace(b"machine h", b"default"), ("jo", "hunter2"))])
def test_netrc_is_read_with_a_bom_and_crlf_and_without_an_entry(tmp_path, content, found):
    (tmp_path / "netrc").write_bytes(content)
    assert store.find_credentials("h", [str(tmp_path / "netrc")])[0] == found


@pytest.mark.parametrize("content", [ENTRY.decode().encode("utf-16"), b"\xef\xbb\xbf\xff" + ENTRY,
                                     b"\xef\xbb\xbf" + ENTRY.replace(b"login", b"passwort"), None])
def test_a_netrc_that_cannot_be_read_is_a_sentence_without_its_text(tmp_path, content):
    path = tmp_path / "netrc"
    path.mkdir() if content is None else path.write_bytes(content)
    with pytest.raises(store.UsageError, match=f"netrc file {path}") as error:
        store.find_credentials("h", [str(path)])
    assert "hunter2" not in str(error.value)


def test_netrc_may_be_a_pipe(tmp_path):
    """As in `--netrc <(pass show pacs)`: it can be read once only."""
    read, write = os.pipe()
    os.write(write, b"\xef\xbb\xbf" + ENTRY)
    os.close(write)
    assert store.find_credentials("h", [f"/dev/fd/{read}"])[0] == ("jo", "hunter2")
    os.close(read)


@pytest.mark.parametrize("entry, warned", [(b"machine other login jo password x\n", False),
                                           (b"default login jo password x\n", True)])
def test_a_netrc_that_others_can_read_is_warned_of_only_where_it_is_used(archive, home, entry, warned):
    (home.folder / "netrc").write_bytes(entry)
    (home.folder / "netrc").chmod(0o644)
    ran = home.run("-q", "E1", url=archive.url)
    assert ran.status == 0 and ("run chmod 600 on it" in ran.err) == warned and bool(ran.err) == warned


# -- passwords -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("url", [
    "http://jo:hunter2/x@h", "http://jo:hunter2@h", "https://jo:hunter2@h/p@q", "http://jo:a b/hunter2@h",
    "http://jo:" + "x" * 70 + "/hunter2@h", "http://jo:hunter2 #/x@h", "Ehttp://jo:hunter2@h", "ftp://hunter2/@"])
@pytest.mark.parametrize("place", ["token", "file", "file name", "url", "db", "csv", "jobs", "unknown option", "flag"])
def test_a_url_with_a_password_is_never_echoed(home, url, place):
    (home.folder / "tokens.txt").write_text(f"E1\n{url}\n")
    arguments = {"token": [url], "file": ["@tokens.txt"], "file name": ["@" + url], "url": ["--url", url, "E1"],
                 "db": ["--db", url, "E1"], "csv": ["--csv", url, "E1"], "jobs": ["--jobs", url, "E1"],
                 "unknown option": ["--ulr", url, "E1"], "flag": ["--force=" + url, "E1"]}[place]
    ran = home.run(*arguments, env={"ORTHANC_URL": NOWHERE})
    assert ran.status == 2 and "hunter2" not in ran.err and "jo:" not in ran.err
    assert len(ran.err.splitlines()) == 1
