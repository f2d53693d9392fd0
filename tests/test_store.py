"""The database and the CSV file: what is stored, whole or not at all, on real SQLite files."""
import contextlib
import csv
import json
import os
import pathlib
import shutil
import signal
import sqlite3
import stat
import subprocess
import sys
import tempfile

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import store_study_info as store
from dicom_files import instance, uid
from stand_in import StandIn

PROJECT = pathlib.Path(store.__file__).resolve().parent

# The specification's two tables: (column, type, not null, place in the primary key).
STUDIES = [
    ("accession", "TEXT", 0, 1),
    ("patient_id", "TEXT", 0, 0),
    ("age", "INTEGER", 0, 0),
    ("height", "REAL", 0, 0),
    ("weight", "REAL", 0, 0),
    ("sex", "TEXT", 0, 0),
    ("ethnic_group", "TEXT", 0, 0),
    ("body_part", "TEXT", 0, 0),
    ("manufacturer_model", "TEXT", 0, 0),
    ("study_date", "TEXT", 0, 0),
    ("study_description", "TEXT", 0, 0),
]
SERIES = [
    ("series_uid", "TEXT", 0, 1),
    ("accession", "TEXT", 1, 0),
    ("sar", "REAL", 0, 0),
    ("duration", "INTEGER", 0, 0),
    ("series_number", "INTEGER", 0, 0),
    ("series_description", "TEXT", 0, 0),
    ("pulse_sequence_name", "TEXT", 0, 0),
    ("sequence_name", "TEXT", 0, 0),
]
TABLES = {"studies": STUDIES, "series": SERIES}


def study_row(accession="E1", **values) -> dict:
    return {
        "accession": accession,
        "patient_id": f"P-{accession}",
        "age": 40,
        "height": 1.75,
        "weight": 70.5,
        "sex": "F",
        "ethnic_group": "W",
        "body_part": "HEAD",
        "manufacturer_model": "Prisma",
        "study_date": "20240427",
        "study_description": "Head",
    } | values


def series_row(number, accession="E1", **values) -> dict:
    return {
        "series_uid": f"2.25.{accession[1:]}.{number}",
        "accession": accession,
        "sar": 0.25,
        "duration": 60,
        "series_number": number,
        "series_description": f"series {number}",
        "pulse_sequence_name": None,
        "sequence_name": "*tfl3d1",
    } | values


def put(conn, accession="E1", numbers=(1, 2), **values) -> None:
    store.store_study(
        accession, conn, study_row(accession, **values), [series_row(number, accession) for number in numbers]
    )


def everything(path) -> dict[str, list[tuple]]:
    """All rows of both tables, read by a connection of our own; the file is sound."""
    with contextlib.closing(sqlite3.connect(path)) as conn:
        assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
        return {table: conn.execute(f"SELECT * FROM {table} ORDER BY 1").fetchall() for table in TABLES}


def stored_uids(path, accession="E1") -> list[str]:
    return [row[0] for row in everything(path)["series"] if row[1] == accession]


@pytest.fixture
def path(tmp_path) -> str:
    return str(tmp_path / "study_info.db")


@pytest.fixture
def conn(path, refusals):
    with contextlib.closing(store.open_database(path)) as conn:
        yield conn


# ------------------------------------------------------------------------------------------------------------------
# In another process: killed, limited, or as another user
# ------------------------------------------------------------------------------------------------------------------

PRELUDE = """
# All before the process becomes another user, who may not read them.
import csv, json, os, resource, signal, sqlite3, sys, tempfile, time
sys.path.insert(0, sys.argv[1])
import store_study_info as store
arguments = json.loads(sys.argv[2])
path = arguments["path"]
if arguments["user"] and os.geteuid() == 0:     # root may write everywhere
    os.setgroups([])
    os.setgid(65534)
    os.setuid(65534)
"""
STORE = """
try:
    conn = store.open_database(path)
    store.store_study("E2", conn, arguments["study"], arguments["series"])
    print("stored")
except store.StudyInfoError as error:
    print(error)
"""


def child(code: str, path, user=False, **arguments) -> subprocess.Popen:
    arguments |= {"path": str(path), "user": user, "study": study_row("E2"),
                  "series": [series_row(number, "E2", series_description="x" * 50) for number in range(200)]}
    return subprocess.Popen(
        [sys.executable, "-c", PRELUDE + code, str(PROJECT), json.dumps(arguments)],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd="/",
    )


def said_by(process: subprocess.Popen) -> str:
    """What a child printed; a traceback is never right."""
    out, err = process.communicate(timeout=120)
    assert (process.returncode, err) == (0, "")
    return out.strip()


@pytest.fixture
def open_folder():
    """A folder that any user can reach; pytest's own are for their owner alone."""
    folder = pathlib.Path(tempfile.mkdtemp(prefix="store-"))
    folder.chmod(0o755)
    yield folder
    for one in [folder, *folder.rglob("*")]:
        one.chmod(0o700)
    shutil.rmtree(folder)


# ------------------------------------------------------------------------------------------------------------------
# The schema
# ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("table", TABLES)
def test_the_columns_are_those_of_the_specification_in_its_order(conn, table):
    columns = conn.execute(f"PRAGMA table_info({table})").fetchall()
    assert [(name, kind, not_null, key) for _, name, kind, not_null, _, key in columns] == TABLES[table]


def test_there_are_exactly_two_tables(conn):
    assert sorted(conn.execute("SELECT type, name FROM sqlite_master WHERE type IN ('table', 'view', 'trigger')")) == [
        ("table", "series"),
        ("table", "studies"),
    ]


def test_series_refer_to_their_study(conn):
    (key,) = conn.execute("PRAGMA foreign_key_list(series)").fetchall()
    assert key[2:5] == ("studies", "accession", "accession")


def test_the_series_of_an_accession_are_found_by_an_index(conn):
    indexed = [
        [row[2] for row in conn.execute(f"PRAGMA index_info('{index[1]}')")]
        for index in conn.execute("PRAGMA index_list(series)").fetchall()
    ]
    assert ["accession"] in indexed
    plan = " ".join(
        str(row[-1]) for row in conn.execute("EXPLAIN QUERY PLAN SELECT * FROM series WHERE accession = 'E1'")
    )
    assert "USING INDEX" in plan


@pytest.mark.parametrize(
    "rule, said",
    [
        ("CREATE UNIQUE INDEX mine ON studies(sex)", "UNIQUE constraint failed: studies.sex"),
        (
            "CREATE TRIGGER mine BEFORE INSERT ON series WHEN new.series_uid LIKE '%.2' "
            "BEGIN SELECT RAISE(ABORT, 'not two'); END",
            "not two",
        ),
        (
            "CREATE TRIGGER mine BEFORE INSERT ON series WHEN new.series_uid LIKE '%.2' "
            "BEGIN SELECT RAISE(ROLLBACK, 'not two'); END",
            "not two",
        ),
    ],
)
def test_a_study_that_the_users_own_rule_refuses_fails_alone(path, conn, rule, said):
    conn.execute(rule)
    put(conn, "E1", (1,))
    with pytest.raises(
        store.StudyError, match=rf"not stored: database {path} has a rule of your own that refuses it \({said}\)"
    ):
        put(conn, "E2", (2, 3))
    assert conn.execute("SELECT accession FROM studies").fetchall() == [("E1",)] and not conn.in_transaction


def test_foreign_keys_hold_whatever_was_stored(conn):
    put(conn, "E1", (1, 2))
    put(conn, "E2", ())
    put(conn, "E1", ())
    assert conn.execute("PRAGMA foreign_key_check").fetchall() == []


@pytest.mark.parametrize("umask", [0o000, 0o022, 0o077])
def test_a_new_database_is_readable_by_its_owner_alone(path, umask):
    before = os.umask(umask)
    try:
        with contextlib.closing(store.open_database(path)) as conn:
            conn.execute("BEGIN IMMEDIATE")
            conn.execute("INSERT INTO studies (accession) VALUES ('E1')")
            modes = {
                name: stat.S_IMODE(os.stat(os.path.join(os.path.dirname(path), name)).st_mode)
                for name in os.listdir(os.path.dirname(path))
            }
            conn.execute("COMMIT")
    finally:
        os.umask(before)
    assert modes == {"study_info.db": 0o600, "study_info.db-journal": 0o600}


def test_a_new_database_behind_a_link_is_readable_by_its_owner_alone(tmp_path):
    (tmp_path / "link.db").symlink_to(tmp_path / "real.db")
    before = os.umask(0o022)
    try:
        store.open_database(str(tmp_path / "link.db")).close()
    finally:
        os.umask(before)
    assert (tmp_path / "link.db").is_symlink()
    assert stat.S_IMODE((tmp_path / "real.db").stat().st_mode) == 0o600


def test_opening_again_changes_nothing(path, conn):
    put(conn)
    conn.close()
    before = pathlib.Path(path).read_bytes()
    store.open_database(path).close()
    assert pathlib.Path(path).read_bytes() == before
    assert os.listdir(os.path.dirname(path)) == ["study_info.db"]


def test_an_empty_file_is_a_new_database(path):
    pathlib.Path(path).touch()
    assert store.check_database_file(path) is True
    with contextlib.closing(store.open_database(path)) as conn:
        put(conn)
    assert len(stored_uids(path)) == 2


def test_a_database_that_is_not_there_is_not_created_by_the_check(path):
    assert store.check_database_file(path) is False
    assert not os.path.exists(path)


@pytest.mark.parametrize(
    "name", ["with blank.db", "ünïcode.db", "a?b#c%20.db", "a'b\"c.db", "file:x?mode=memory", ":memory:"]
)
def test_a_database_may_have_any_name(tmp_path, name):
    with contextlib.closing(store.open_database(str(tmp_path / name))) as conn:
        put(conn)
    assert os.listdir(tmp_path) == [name]


# ------------------------------------------------------------------------------------------------------------------
# Storing
# ------------------------------------------------------------------------------------------------------------------

def test_a_study_is_stored_with_its_series(path, conn):
    put(conn, "E1", (1, 2))
    assert everything(path) == {
        "studies": [("E1", "P-E1", 40, 1.75, 70.5, "F", "W", "HEAD", "Prisma", "20240427", "Head")],
        "series": [
            ("2.25.1.1", "E1", 0.25, 60, 1, "series 1", None, "*tfl3d1"),
            ("2.25.1.2", "E1", 0.25, 60, 2, "series 2", None, "*tfl3d1"),
        ],
    }


def test_values_are_stored_in_the_types_of_their_columns(conn):
    series = series_row(1, sar=1.0, duration=0, series_number=2**63 - 1, series_description="007", sequence_name="1e3")
    store.store_study(
        "E1",
        conn,
        study_row(patient_id="00123", age=0, height=2.0, weight=70.0, sex="0", study_date="20240427"),
        [series],
    )
    row = conn.execute(
        "SELECT patient_id, age, height, weight, sex, study_date, "
        "sar, duration, series_number, series_description, sequence_name "
        "FROM studies JOIN series USING (accession)"
    ).fetchone()
    assert [(type(value), value) for value in row] == [
        (str, "00123"),
        (int, 0),
        (float, 2.0),
        (float, 70.0),
        (str, "0"),
        (str, "20240427"),
        (float, 1.0),
        (int, 0),
        (int, 2**63 - 1),
        (str, "007"),
        (str, "1e3"),
    ]


def test_what_is_not_known_is_null(conn):
    store.store_study(
        "E1",
        conn,
        dict.fromkeys(study_row(), None) | {"accession": "E1"},
        [series_row(1, series_number=None, series_description=None, pulse_sequence_name=None, sequence_name=None)],
    )
    for table, known in (("studies", 1), ("series", 4)):
        (row,) = conn.execute(f"SELECT * FROM {table}").fetchall()
        assert row.count(None) == len(TABLES[table]) - known


def test_a_study_is_one_transaction(conn):
    put(conn, "E1", (1, 2, 3))
    statements: list[str] = []
    conn.set_trace_callback(statements.append)
    put(conn, "E1", (2, 3, 4))
    words = [statement.split()[0].upper() for statement in statements]
    assert (words[0], words[-1]) == ("BEGIN", "COMMIT")
    assert words.count("BEGIN") == words.count("COMMIT") == 1


@pytest.mark.parametrize("stored", [(), (1, 5)], ids=["new", "again"])
@pytest.mark.parametrize("fatal", [1, 2, 3])
def test_a_study_that_cannot_be_stored_whole_is_not_stored_at_all(path, conn, stored, fatal):
    put(conn, "E9", (1,))
    if stored:
        put(conn, "E1", stored)
    for event in ("INSERT", "UPDATE"):
        conn.execute(
            f"CREATE TRIGGER own_{event} BEFORE {event} ON series WHEN new.series_number = {fatal} "
            "AND new.accession = 'E1' AND new.sar = 9 BEGIN SELECT RAISE(ABORT, 'not this one'); END"
        )
    before = everything(path)
    with pytest.raises(store.StudyInfoError, match="not this one"):
        store.store_study("E1", conn, study_row(age=99), [series_row(number, sar=9.0) for number in (1, 2, 3)])
    assert everything(path) == before and not conn.in_transaction
    put(conn, "E2")
    assert len(stored_uids(path, "E2")) == 2


class Stopping(dict):
    """A row in the middle of which a signal arrives."""

    def __getitem__(self, key):
        if key == "sequence_name":
            raise store.Interrupted(signal.SIGINT)
        return super().__getitem__(key)


def test_an_interrupt_in_the_middle_of_a_study_leaves_what_was_there(path, conn):
    put(conn, "E1", (1, 2))
    before = everything(path)
    with pytest.raises(store.Interrupted):
        store.store_study("E1", conn, study_row(age=99), [series_row(3), Stopping(series_row(4))])
    assert everything(path) == before and not conn.in_transaction


@pytest.mark.parametrize(
    "before, after",
    [
        ((1, 2), (1, 2)),
        ((1, 2), (2, 3)),
        ((1, 2, 3), (2,)),
        ((1,), (1, 2, 3)),
        ((1, 2), (3, 4)),
        ((1, 2), ()),
        ((), (1,)),
        ((), ()),
    ],
)
def test_storing_again_replaces_the_set_of_series(path, conn, before, after):
    put(conn, "E1", before)
    put(conn, "E2", (1, 2))
    others = [row for row in everything(path)["series"] if row[1] == "E2"]
    put(conn, "E1", after)
    assert stored_uids(path) == [f"2.25.1.{number}" for number in after]
    assert [row for row in everything(path)["series"] if row[1] == "E2"] == others


def test_storing_again_updates_what_has_changed(path, conn):
    put(conn, "E1", (1, 2))
    store.store_study(
        "E1",
        conn,
        study_row(age=41, weight=None),
        [series_row(1, duration=99, series_description=None), series_row(2, series_number=7)],
    )
    assert everything(path) == {
        "studies": [("E1", "P-E1", 41, 1.75, None, "F", "W", "HEAD", "Prisma", "20240427", "Head")],
        "series": [
            ("2.25.1.1", "E1", 0.25, 99, 1, None, None, "*tfl3d1"),
            ("2.25.1.2", "E1", 0.25, 60, 7, "series 2", None, "*tfl3d1"),
        ],
    }


@pytest.mark.parametrize("table, column", [(table, column[0]) for table in TABLES for column in TABLES[table][1:]])
def test_storing_again_updates_every_column(path, conn, table, column):
    study, series = study_row(), series_row(1)
    store.store_study("E1", conn, study, [series])
    changed = study if table == "studies" else series
    if column != "accession":    # which is that of the study
        changed[column] = 7 if isinstance(changed[column], int) else 7.5 if isinstance(changed[column], float) else "7"
    store.store_study("E1", conn, study, [series])
    assert everything(path) == {"studies": [tuple(study.values())], "series": [tuple(series.values())]}


def test_a_study_of_many_series_is_replaced_whole(path, conn):
    put(conn, "E1", range(3000))
    put(conn, "E1", range(1500, 4000))
    assert sorted(int(uid.rpartition(".")[2]) for uid in stored_uids(path)) == list(range(1500, 4000))


def test_without_replace_nothing_that_is_stored_is_changed_or_taken_out(path, conn):
    """What a run without --force found is less than what is stored: a study may be gone from the server."""
    put(conn, "E1", (1, 2))
    before = everything(path)
    came = [series_row(2, sar=9.0), series_row(3)]
    row = study_row(age=99, study_date="20240428")
    assert store.store_study("E1", conn, row, came, False) == store.Outcome(stayed=1, changed=True)
    assert everything(path) == {"studies": before["studies"], "series": [*before["series"], tuple(came[1].values())]}


def test_without_replace_all_is_described_anew_where_all_that_is_stored_was_found_again(path, conn):
    """A study that came later may be the earliest, which gives the row; no row is of another state than the others."""
    put(conn, "E1", (1, 2))
    came = [series_row(1, sar=9.0), series_row(2), series_row(3)]
    row = study_row(age=41, study_date="20240426")
    assert store.store_study("E1", conn, row, came, False) == store.Outcome(stayed=0, changed=True)
    assert everything(path) == {
        "studies": [tuple(row.values())],
        "series": [tuple(row.values()) for row in came],
    }


def test_a_series_stored_under_another_accession_is_never_moved(path, conn):
    put(conn, "E1", (1, 2))
    put(conn, "E2", (1,))
    before = everything(path)
    with pytest.raises(store.StudyError) as error:
        store.store_study(
            "E2", conn, study_row("E2", age=99), [series_row(5, "E2"), series_row(1, "E2", series_uid="2.25.1.2")]
        )
    assert "2.25.1.2" in str(error.value) and "E1" in str(error.value)
    assert everything(path) == before and not conn.in_transaction


def test_the_failure_names_both_accessions_and_counts(home, here):
    files = [instance("E1"), instance("E2", SeriesInstanceUID=uid("E1", 1))]
    with StandIn(*files) as server:
        ran = here("E1", "E2", url=server.url)
    (line,) = [line for line in ran.err.splitlines() if " ERROR " in line]
    assert " E2: " in line and " E1 " in line
    assert ran.status == 1 and "studies: 1 stored, 0 already stored, 1 failed" in ran.summary


@pytest.mark.parametrize(
    "asked, expected",
    [
        ("E1", "20240427"),
        ("E2", ""),
        ("E3", None),
        ("e1", None),
        ("E1 ", None),
        ("E_", None),
        ("E%", None),
        ("", None),
    ],
)
def test_an_accession_is_known_as_stored_with_its_date(conn, asked, expected):
    put(conn, "E1")
    put(conn, "E2", study_date=None)
    assert store.stored_date(conn, asked) == expected


# ------------------------------------------------------------------------------------------------------------------
# What else is in the file
# ------------------------------------------------------------------------------------------------------------------

def test_columns_views_and_tables_of_the_user_are_left_in_peace(path, conn):
    put(conn, "E1", (1, 2))
    conn.executescript("""
        ALTER TABLE studies ADD COLUMN remark TEXT;
        ALTER TABLE series ADD COLUMN quality INTEGER DEFAULT 3;
        UPDATE studies SET remark = 'mine';
        UPDATE series SET quality = 5 WHERE series_number = 1;
        CREATE TABLE phantoms (name TEXT, accession TEXT);
        INSERT INTO phantoms VALUES ('ball', 'E1');
        CREATE VIEW energy AS SELECT accession, sum(sar * duration) AS joule FROM series GROUP BY accession;
        CREATE INDEX own ON series(sar);
        CREATE TABLE log (accession TEXT);
        CREATE TRIGGER noted AFTER UPDATE ON studies BEGIN INSERT INTO log VALUES (new.accession); END;
    """)
    conn.close()
    with contextlib.closing(store.open_database(path)) as again:
        schema = again.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall()
        store.store_study("E1", again, study_row(age=41), [series_row(1, duration=61), series_row(3)])
        put(again, "E2", (1,))
        assert again.execute("SELECT accession, age, remark FROM studies ORDER BY 1").fetchall() == [
            ("E1", 41, "mine"),
            ("E2", 40, None),
        ]
        assert again.execute("SELECT series_uid, duration, quality FROM series ORDER BY 1").fetchall() == [
            ("2.25.1.1", 61, 5),
            ("2.25.1.3", 60, 3),
            ("2.25.2.1", 60, 3),
        ]
        assert again.execute("SELECT * FROM phantoms").fetchall() == [("ball", "E1")]
        assert again.execute("SELECT * FROM energy ORDER BY 1").fetchall() == [("E1", 0.25 * 121), ("E2", 15.0)]
        assert again.execute("SELECT * FROM log").fetchall() == [("E1",)]
        assert again.execute("SELECT sql FROM sqlite_master ORDER BY name").fetchall() == schema


def test_a_database_of_other_tables_gets_ours_beside_them(path):
    with contextlib.closing(sqlite3.connect(path)) as own:
        own.executescript("CREATE TABLE mine (x); INSERT INTO mine VALUES (1);")
    with contextlib.closing(store.open_database(path)) as conn:
        put(conn)
        assert conn.execute("SELECT * FROM mine").fetchall() == [(1,)]
    assert len(stored_uids(path)) == 2


def create(path, tables, index=True) -> bytes:
    """A database with these (column, type, not null, key) and a row in each table; its bytes."""
    with contextlib.closing(sqlite3.connect(path)) as conn:
        for table, columns in tables.items():
            defined = (f"{name} {kind}{' PRIMARY KEY' if key else ''}" for name, kind, _, key in columns)
            conn.execute(f"CREATE TABLE {table} ({', '.join(defined)})")
            conn.execute(
                f"INSERT INTO {table} ({columns[0][0]}) VALUES (?)", (1 if columns[0][1] == "INTEGER" else "E1",)
            )
        if index and "series" in tables:
            conn.execute(f"CREATE INDEX own ON series({tables['series'][1][0]})")
        conn.commit()
    return pathlib.Path(path).read_bytes()


def test_a_database_of_an_earlier_version_goes_on(path):
    # columns in another order and in other types, one more, keys in capitals
    create(path, {"studies": [(name.upper(), "", 0, key) for name, _, _, key in STUDIES],
                  "series": [SERIES[0], ("extra", "TEXT", 0, 0), *reversed(SERIES[1:])]})
    with contextlib.closing(store.open_database(path)) as conn:
        assert store.stored_date(conn, "E1") == ""
        put(conn, "E2", (1,))
        assert conn.execute("SELECT sar, duration, extra FROM series WHERE accession = 'E2'").fetchall() == [
            (0.25, 60, None)
        ]


def test_a_database_of_an_earlier_version_without_the_index_gets_it(path):
    create(path, TABLES, index=False)
    with contextlib.closing(store.open_database(path)) as conn:
        assert "USING INDEX" in " ".join(
            str(row[-1]) for row in conn.execute("EXPLAIN QUERY PLAN SELECT * FROM series WHERE accession = 'E1'")
        )


@pytest.mark.parametrize(
    "table, column", [(table, column[0]) for table, columns in TABLES.items() for column in columns]
)
def test_a_table_that_lacks_a_column_is_refused_and_named(path, table, column):
    tables = TABLES | {table: [one for one in TABLES[table] if one[0] != column]}
    before = create(path, tables, index=False)
    with pytest.raises(store.RunError) as error:
        store.open_database(path)
    text = str(error.value)
    assert path in text and table in text and f" {column}" in text and "move the file away" in text
    assert not any(
        f" {one[0]}" in text.split(path)[1].partition(";")[0].replace(f"table {table}", "")
        for one in TABLES[table]
        if one[0] != column
    )
    assert pathlib.Path(path).read_bytes() == before


def test_all_missing_columns_are_named(path):
    create(path, {"studies": [one for one in STUDIES if one[0] not in ("age", "sex")],
                  "series": [one for one in SERIES if one[0] not in ("sar", "duration")]})
    with pytest.raises(store.RunError) as error:
        store.open_database(path)
    assert all(name in str(error.value) for name in ("age", "sex", "sar", "duration"))


@pytest.mark.parametrize(
    "tables",
    [
        {"studies": STUDIES[:5]},
        {"series": [SERIES[0], *SERIES[3:]]},
        {"series": SERIES[:3]},
        {"studies": [("id", "INTEGER", 0, 1)]},
    ],
    ids=["studies only", "series without accession", "series only", "another program's"],
)
def test_a_refused_file_stays_as_it_was_although_a_table_is_missing_too(path, tables):
    before = create(path, tables, index=False)
    with pytest.raises(store.RunError, match="lack"):
        store.open_database(path)
    assert pathlib.Path(path).read_bytes() == before


@pytest.mark.parametrize(
    "statements",
    [
        "CREATE TABLE studies ({studies}); CREATE TABLE series ({series}, PRIMARY KEY (series_uid))",
        "CREATE TABLE studies ({studies}, PRIMARY KEY (accession)); CREATE TABLE series ({series})",
        "CREATE TABLE studies ({studies}, PRIMARY KEY (patient_id)); "
        "CREATE TABLE series ({series}, PRIMARY KEY (series_uid))",
        "CREATE TABLE studies ({studies}, PRIMARY KEY (accession)); "
        "CREATE TABLE series ({series}, PRIMARY KEY (series_uid, accession))",
        "CREATE TABLE studies ({studies}, PRIMARY KEY (accession)); "
        "CREATE TABLE raw ({series}); CREATE VIEW series AS SELECT * FROM raw",
    ],
    ids=["no key of studies", "no key of series", "another key", "a key of two columns", "a view"],
)
def test_a_table_without_its_primary_key_is_refused(path, statements):
    # without the key a study stored again would be there twice
    with contextlib.closing(sqlite3.connect(path)) as own:
        own.executescript(
            statements.format(
                **{table: ", ".join(f"{one[0]} {one[1]}" for one in columns) for table, columns in TABLES.items()}
            )
        )
    before = pathlib.Path(path).read_bytes()
    with pytest.raises(store.RunError, match="primary key"):
        store.open_database(path)
    assert pathlib.Path(path).read_bytes() == before


# ------------------------------------------------------------------------------------------------------------------
# What is no database, or cannot be used
# ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "content",
    [
        b"x",
        b"\0",
        b"\n",
        b"SQLite",
        b"SQLite format 3",
        b"SQLite format 3\n",
        b"sqlite format 3\0" + b"\0" * 1000,
        b"\0" * 4096,
        b"accession,patient_id\nE1,P1\n" * 100,
        b"\x1f\x8b\x08\0" + b"\1" * 500,
        b"SQLite format 3\0",
        b"SQLite format 3\0" + b"no pages" * 1000,
        b"SQLite format 4\0" + b"\0" * 4080,
        b" SQLite format 3\0",
    ],
    ids=lambda content: ascii(content[:20]),
)
def test_a_file_that_is_no_database_is_refused_and_left_as_it_is(path, content):
    pathlib.Path(path).write_bytes(content)
    with pytest.raises(store.RunError) as error:
        store.open_database(path)
    assert path in str(error.value) and str(error.value).isprintable()
    assert pathlib.Path(path).read_bytes() == content
    assert os.listdir(os.path.dirname(path)) == ["study_info.db"]


@settings(deadline=None, database=None, max_examples=100)
@given(st.binary(min_size=1, max_size=200))
def test_any_short_file_is_refused_and_left_as_it_is(content):
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "x.db")
        pathlib.Path(path).write_bytes(content)
        with pytest.raises(store.RunError):
            store.open_database(path)
        assert pathlib.Path(path).read_bytes() == content


@pytest.mark.parametrize("size", [50, 100, 1000, 4096, -4096, -1])
def test_a_database_that_was_cut_off_is_never_made_worse(path, conn, size):
    put(conn, "E1", range(100))
    conn.close()
    content = pathlib.Path(path).read_bytes()[:size]
    pathlib.Path(path).write_bytes(content)
    try:
        with contextlib.closing(store.open_database(path)) as again:
            put(again, "E1", range(100, 300))
    except store.RunError as error:
        assert path in str(error)
        assert pathlib.Path(path).read_bytes() == content
    else:
        assert len(stored_uids(path)) == 200, "SQLite found it sound"


def test_a_damaged_database_says_where_to_get_another(path, conn):
    put(conn, "E1", range(200))
    conn.close()
    whole = pathlib.Path(path).read_bytes()
    for damaged in (whole[:4096] + bytes(len(whole) - 4096), whole[:16] + bytes(len(whole) - 16)):
        pathlib.Path(path).write_bytes(damaged)
        with pytest.raises(store.RunError, match=f"{path}: .*restore it from a copy, or move it away"), \
                contextlib.closing(store.open_database(path)) as again:
            put(again, "E1", range(200))
        assert pathlib.Path(path).read_bytes() == damaged


def test_a_folder_is_no_database(tmp_path):
    with pytest.raises(store.RunError, match=str(tmp_path)):
        store.open_database(str(tmp_path))
    assert os.listdir(tmp_path) == []


def test_a_folder_that_does_not_exist_is_named_and_not_made(tmp_path):
    with pytest.raises(store.RunError) as error:
        store.open_database(str(tmp_path / "no" / "such.db"))
    assert f"there is no folder {tmp_path / 'no'}" in str(error.value)
    assert os.listdir(tmp_path) == []


def test_a_file_is_no_folder(tmp_path):
    (tmp_path / "file").write_text("x")
    with pytest.raises(store.RunError, match=str(tmp_path / "file")):
        store.open_database(str(tmp_path / "file" / "such.db"))


def test_a_path_is_shown_without_its_control_characters(tmp_path):
    path = tmp_path / "a\x1b[2Jb\n.db"
    path.write_text("text")
    with pytest.raises(store.RunError) as error:
        store.open_database(str(path))
    assert str(error.value).isprintable()


@pytest.mark.parametrize(
    "file_mode, folder_mode",
    [(0o444, 0o777), (0o444, 0o555), (0o666, 0o555), (0o000, 0o777), (0o666, 0o000)],
    ids=["file read-only", "both read-only", "folder read-only", "file unreadable", "folder unreadable"],
)
def test_a_database_that_may_not_be_written_stays_as_it_was(open_folder, file_mode, folder_mode):
    path = open_folder / "in" / "study_info.db"
    path.parent.mkdir()
    with contextlib.closing(store.open_database(str(path))) as conn:
        put(conn)
    before = path.read_bytes()
    path.chmod(file_mode)
    path.parent.chmod(folder_mode)
    said = said_by(child(STORE, path, user=True))
    path.parent.chmod(0o755)
    path.chmod(0o600)
    assert said.startswith(f"database {path}") and "permission" in said.lower()
    assert path.read_bytes() == before and os.listdir(path.parent) == [path.name]


def test_a_database_that_may_only_be_read_tells_what_is_stored(open_folder):
    path = open_folder / "study_info.db"
    with contextlib.closing(store.open_database(str(path))) as conn:
        put(conn)
    path.chmod(0o444)
    open_folder.chmod(0o555)
    assert (
        said_by(child("print(store.stored_date(store.open_database(path), 'E1'))", path, user=True))
        == "20240427"
    )


@pytest.mark.parametrize("mode", [0o555, 0o000])
def test_no_database_is_created_where_none_may_be(open_folder, mode):
    folder = open_folder / "in"
    folder.mkdir()
    folder.chmod(mode)
    said = said_by(child(STORE, folder / "study_info.db", user=True))
    folder.chmod(0o755)
    assert said.startswith("database ") and str(folder) in said
    assert os.listdir(folder) == []


# ------------------------------------------------------------------------------------------------------------------
# Disk full
# ------------------------------------------------------------------------------------------------------------------

def test_a_full_disk_leaves_what_was_stored(path, conn):
    put(conn, "E1", (1, 2))
    before = everything(path)
    conn.execute(f"PRAGMA max_page_count = {conn.execute('PRAGMA page_count').fetchone()[0] + 1}")
    with pytest.raises(store.RunError) as error:
        put(conn, "E2", range(500))
    assert path in str(error.value) and "full" in str(error.value) and "room" in str(error.value)
    assert everything(path) == before and not conn.in_transaction
    conn.execute("PRAGMA max_page_count = 100000")
    put(conn, "E2", range(500))
    assert len(stored_uids(path, "E2")) == 500


LIMITED = "resource.setrlimit(resource.RLIMIT_FSIZE, (arguments['limit'],) * 2)\n"


@pytest.mark.parametrize("room", [0, 512, 4096])
def test_a_file_that_may_not_grow_leaves_what_was_stored(path, conn, room):
    put(conn, "E1", range(20))
    conn.close()
    before = everything(path)
    said = said_by(child(LIMITED + STORE, path, limit=os.path.getsize(path) + room))
    assert said.startswith(f"database {path}")
    assert everything(path) == before
    with contextlib.closing(store.open_database(path)) as again:
        put(again, "E2", range(200))
    assert len(stored_uids(path, "E2")) == 200


@pytest.mark.parametrize("room", [0, 1, 4096, 8192])
def test_a_database_that_could_not_be_made_can_be_made_later(path, room):
    said = said_by(child(LIMITED + STORE, path, limit=room))
    assert said.startswith(f"database {path}")
    with contextlib.closing(store.open_database(path)) as conn:
        put(conn)
    assert len(stored_uids(path)) == 2


# ------------------------------------------------------------------------------------------------------------------
# Killed writers
# ------------------------------------------------------------------------------------------------------------------

KILLED = """
class Last(dict):
    def __getitem__(self, key):
        if key == "sequence_name" and os.path.getsize(path + "-journal") > 512:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__getitem__(key)

conn = store.open_database(path)
conn.execute("PRAGMA cache_size = 5")       # pages in pages out: the file is changed long before the end
row = arguments["series"][0] | {"accession": "E1"}
rows = [row | {"series_uid": f"2.25.1.{number}", "series_description": "y" * 64} for number in range(3000)]
study = arguments["study"] | {"accession": "E1", "age": 99}
store.store_study("E1", conn, study, rows + [Last(row | {"series_uid": "2.25.9"})])
"""


def test_what_a_killed_writer_left_is_undone_by_the_next_run(path, conn):
    put(conn, "E1", range(0, 200, 2))
    put(conn, "E3", range(10))
    conn.close()
    before, content = everything(path), pathlib.Path(path).read_bytes()
    killed = child(KILLED, path)
    killed.communicate(timeout=120)
    assert killed.returncode == -signal.SIGKILL
    assert os.path.getsize(path + "-journal") > 512 and pathlib.Path(path).read_bytes() != content, (
        "half of it was in the file"
    )
    with contextlib.closing(store.open_database(path)) as again:
        put(again, "E2", (1, 2))
    after = everything(path)
    assert [row for row in after["series"] if row[1] != "E2"] == before["series"]
    assert [row for row in after["studies"] if row[0] != "E2"] == before["studies"]
    assert not os.path.exists(path + "-journal")


# ------------------------------------------------------------------------------------------------------------------
# Several at once
# ------------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def held(path, begin):
    """Another program's lock, and what lets go of it; the end does so too."""
    other = sqlite3.connect(path, isolation_level=None)
    for statement in begin.split(";"):
        cursor = other.execute(statement)
        cursor.fetchone()

    def let_go():
        cursor.close()
        if other.in_transaction:
            other.execute("ROLLBACK")
    try:
        yield let_go
    finally:
        let_go()
        other.close()


@contextlib.contextmanager
def waited_for(path, refusals, begin):
    """Another program's lock that is held until the program was refused twice: it must have waited, and tried again."""
    with held(path, begin) as let_go:
        refusals.then = lambda: let_go() if refusals.count >= 2 else None
        yield
        assert refusals.count == 2


# A writer in the middle of its work, one that is just committing, and a reader.
HOLDERS = ["BEGIN IMMEDIATE", "BEGIN EXCLUSIVE", "BEGIN; SELECT count(*) FROM studies"]


@pytest.mark.parametrize("holder", HOLDERS)
def test_another_programs_lock_is_waited_for(path, conn, refusals, holder):
    put(conn, "E1")
    with waited_for(path, refusals, holder):
        put(conn, "E2")
    assert len(stored_uids(path, "E2")) == 2


def test_opening_waits_for_another_programs_lock(path, conn, refusals):
    put(conn, "E1")
    with waited_for(path, refusals, "BEGIN EXCLUSIVE"), contextlib.closing(store.open_database(path)) as again:
        assert store.stored_date(again, "E1") == "20240427"


def test_asking_what_is_stored_waits_for_another_programs_lock(path, conn, refusals):
    put(conn, "E1")
    with waited_for(path, refusals, "BEGIN EXCLUSIVE"):
        assert store.stored_date(conn, "E1") == "20240427"


def test_a_csv_file_waits_for_another_programs_lock(path, conn, refusals, tmp_path):
    put(conn, "E1")
    with waited_for(path, refusals, "BEGIN EXCLUSIVE"):
        store.write_csv(str(tmp_path / "x.csv"), conn, ["E1"])
    assert len((tmp_path / "x.csv").read_text().splitlines()) == 3


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_lock_that_is_held_too_long_is_a_sentence(path, conn, monkeypatch, holder):
    monkeypatch.setattr(store, "BUSY_SECONDS", 0.3)
    put(conn, "E1", (1, 2))
    with held(path, holder):
        with pytest.raises(store.RunError) as error:
            put(conn, "E1", (3,))
        assert not conn.in_transaction
    assert path in str(error.value) and "run again" in str(error.value)
    assert stored_uids(path) == ["2.25.1.1", "2.25.1.2"]
    put(conn, "E1", (3,))
    assert stored_uids(path) == ["2.25.1.3"]


def test_a_database_that_is_held_too_long_at_the_start_is_a_sentence(path, conn, monkeypatch):
    monkeypatch.setattr(store, "BUSY_SECONDS", 0.3)
    with held(path, "BEGIN EXCLUSIVE"), pytest.raises(store.RunError) as error:
        store.open_database(path)
    assert path in str(error.value) and "run again" in str(error.value)


WRITER = """
conn = store.open_database(path)
for accession in arguments["accessions"]:
    rows = [row | {"accession": accession, "series_uid": f"2.25.{accession[1:]}.{count}"}
            for count, row in enumerate(arguments["series"][:5])]
    store.store_study(accession, conn, arguments["study"] | {"accession": accession}, rows)
print("done")
"""


def test_several_writers_at_once_on_a_new_database_all_succeed(path):
    writers = [
        child(WRITER, path, accessions=[f"E{number}" for number in range(first, first + 30)])
        for first in (100, 110, 120)
    ]
    assert [said_by(writer) for writer in writers] == ["done"] * 3
    rows = everything(path)
    assert [row[0] for row in rows["studies"]] == [f"E{number}" for number in range(100, 150)]
    assert sorted(row[0] for row in rows["series"]) == sorted(
        f"2.25.{number}.{count}" for number in range(100, 150) for count in range(5)
    )


def test_a_database_in_wal_mode_works(path, conn):
    put(conn, "E1")
    conn.execute("PRAGMA journal_mode = WAL")
    with contextlib.closing(sqlite3.connect(path)) as reader:
        reader.execute("BEGIN")
        reader.execute("SELECT * FROM studies").fetchone()
        put(conn, "E2")
        assert reader.execute("SELECT count(*) FROM studies").fetchone() == (1,)
    assert len(stored_uids(path, "E2")) == 2


# ------------------------------------------------------------------------------------------------------------------
# Strange text
# ------------------------------------------------------------------------------------------------------------------

def store_header(conn, name, header) -> None:
    """As the program does it for a study of one series."""
    measured = store.read_values(header)
    store.store_study(name, conn, store.extract_study([header], name), [store.extract_series(measured, name)])


TEXTS = ["a\0b", "\ud800", "x\udcff", "\x1b[2J", "Robert'); DROP TABLE studies;--", '"; --', "山田^太郎", "\U0001f9e0",
         "\ufeffx", "\u202e", "%s %d {}", "a" * 100_000]


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: ascii(text[:20]))
def test_text_of_any_kind_goes_through_the_header_into_the_database(conn, tmp_path, text):
    tags = ("0010,0020", "0008,1030", "0008,103e", "0018,9005", "0018,0024", "0018,0015")
    series = {"0051,100a": "TA 01:00", "0018,1316": "1", "0020,000e": "1.2"}
    store_header(conn, "E1", series | dict.fromkeys(tags, text))
    query = "SELECT patient_id, body_part, series_description FROM studies JOIN series USING (accession)"
    (stored,) = conn.execute(query).fetchall()
    cleaned = {"a\0b": "a b", "\ud800": "\ufffd" * 3, "x\udcff": "x" + "\ufffd" * 3}    # as SQLite could not hold it
    assert stored == (cleaned.get(text, text),) * 3
    store.write_csv(str(tmp_path / "x.csv"), conn, ["E1"])
    assert len(read_csv(tmp_path / "x.csv")) == 2


ANY_TEXTS = st.dictionaries(
    st.sampled_from([field.tag for field in (*store.STUDY_FIELDS, *store.SERIES_FIELDS)]),
    st.text(st.characters(), max_size=20),
)


def test_whatever_a_header_holds_its_rows_can_be_stored(conn):
    conn.execute("PRAGMA synchronous = OFF")    # some hundred transactions

    @settings(deadline=None, database=None, max_examples=300)
    @given(ANY_TEXTS)
    def check(texts):
        header = texts | {"0051,100a": "TA 01:00", "0018,1316": "0.5", "0020,000e": "1.2"}
        store_header(conn, "E1", header)
        for row in conn.execute("SELECT * FROM studies").fetchall() + conn.execute("SELECT * FROM series").fetchall():
            assert "" not in row and not any(isinstance(value, str) and value != value.strip() for value in row)
    check()


# ------------------------------------------------------------------------------------------------------------------
# CSV
# ------------------------------------------------------------------------------------------------------------------

HEADER = [column[0] for column in STUDIES] + [column[0] for column in SERIES if column[0] != "accession"]


def read_csv(path) -> list[list[str]]:
    with open(path, encoding="utf-8", newline="") as file:
        return list(csv.reader(file))


@pytest.fixture
def target(tmp_path) -> pathlib.Path:
    folder = tmp_path / "out"
    folder.mkdir()
    return folder / "april.csv"


def test_a_csv_file_has_one_row_a_series_with_the_study_first(conn, target):
    put(conn, "E1", (1, 2))
    store.write_csv(str(target), conn, ["E1"])
    study = ["E1", "P-E1", "40", "1.75", "70.5", "F", "W", "HEAD", "Prisma", "20240427", "Head"]
    assert read_csv(target) == [HEADER, [*study, "2.25.1.1", "0.25", "60", "1", "series 1", "", "*tfl3d1"],
                                [*study, "2.25.1.2", "0.25", "60", "2", "series 2", "", "*tfl3d1"]]


def test_a_study_without_series_has_one_row(conn, target):
    put(conn, "E1", (), age=None)
    store.write_csv(str(target), conn, ["E1"])
    assert read_csv(target) == [
        HEADER,
        ["E1", "P-E1", "", "1.75", "70.5", "F", "W", "HEAD", "Prisma", "20240427", "Head", *[""] * 7],
    ]


def test_a_csv_file_holds_the_accessions_named_in_their_order_and_no_others(conn, target):
    for name in ("E1", "E2", "E3", "E4"):
        put(conn, name, (1,))
    store.write_csv(str(target), conn, ["E3", "E1", "E9", "E2"])
    assert [row[0] for row in read_csv(target)] == ["accession", "E3", "E1", "E2"]


def test_series_are_ordered_by_number_then_uid(conn, target):
    rows = [
        series_row(None, series_uid="1.0"),
        series_row(10, series_uid="1.1"),
        series_row(9, series_uid="1.3"),
        series_row(9, series_uid="1.2"),
        series_row(-1, series_uid="1.9"),
    ]
    store.store_study("E1", conn, study_row(), rows)
    store.write_csv(str(target), conn, ["E1"])
    assert [row[HEADER.index("series_uid")] for row in read_csv(target)[1:]] == ["1.9", "1.2", "1.3", "1.1", "1.0"]


def test_nothing_stored_leaves_the_header(conn, target):
    store.write_csv(str(target), conn, [])
    assert read_csv(target) == [HEADER]


@pytest.mark.parametrize(
    "text",
    [
        "a,b",
        'say "x"',
        '"',
        "two\nlines",
        "two\r\nlines",
        "a\rb",
        ",",
        ',,"\n',
        "semi;colon",
        "tab\tinside",
        "007",
        "1e5",
        "=1+1",
        "'",
        "Müller",
        "山田",
        "\U0001f9e0",
        "NULL",
        "a\\b",
    ],
    ids=ascii,
)
def test_every_text_comes_back_from_a_csv_file_as_it_was(conn, target, text):
    store.store_study(
        "E1",
        conn,
        study_row(patient_id=text, study_description=text),
        [series_row(1, series_description=text, sequence_name=text)],
    )
    store.write_csv(str(target), conn, ["E1"])
    (header, row) = read_csv(target)
    assert len(row) == len(header) == 18
    assert [
        row[header.index(column)]
        for column in ("patient_id", "study_description", "series_description", "sequence_name")
    ] == [text] * 4


def test_numbers_come_back_from_a_csv_file_exactly(conn, target):
    store.store_study(
        "E1", conn, study_row(height=1.8796037616667), [series_row(2**63 - 1, sar=0.024275561794638634, duration=0)]
    )
    store.write_csv(str(target), conn, ["E1"])
    row = dict(zip(*read_csv(target), strict=True))
    assert (float(row["height"]), float(row["sar"]), int(row["duration"]), int(row["series_number"])) == (
        1.8796037616667,
        0.024275561794638634,
        0,
        2**63 - 1,
    )


def test_a_csv_file_is_utf8_whatever_the_locale(conn, target):
    put(conn, "E1", (1,), study_description="Schädel 頭")
    store.write_csv(str(target), conn, ["E1"])
    data = target.read_bytes()
    assert data.startswith(b"accession,patient_id,age,") and "Schädel 頭".encode() in data


@pytest.mark.parametrize("umask", [0o000, 0o022])
def test_a_csv_file_is_readable_by_its_owner_alone(conn, target, umask):
    target.write_text("old")
    target.chmod(0o644)
    before = os.umask(umask)
    try:
        store.write_csv(str(target), conn, [])
    finally:
        os.umask(before)
    assert stat.S_IMODE(target.stat().st_mode) == 0o600
    assert os.listdir(target.parent) == [target.name]


def test_a_csv_file_that_is_a_link_is_written_where_it_leads(conn, target):
    target.symlink_to(target.parent / "real.csv")
    (target.parent / "real.csv").write_text("old")
    store.write_csv(str(target), conn, [])
    assert target.is_symlink() and read_csv(target.parent / "real.csv") == [HEADER]


def break_off(error):
    """Accessions of which the second cannot be had."""
    yield "E1"
    raise error


@pytest.mark.parametrize(
    "error",
    [
        store.Interrupted(signal.SIGTERM),
        OSError(5, "Input/output error"),
        RuntimeError("?"),
        sqlite3.OperationalError("disk I/O error"),
    ],
    ids=repr,
)
@pytest.mark.parametrize("old", [None, "old\n"])
def test_a_csv_file_is_replaced_only_when_complete(conn, target, error, old):
    put(conn, "E1", range(500))
    if old:
        target.write_text(old)
    with pytest.raises((store.StudyInfoError, store.Interrupted, RuntimeError)):
        store.write_csv(str(target), conn, break_off(error))
    assert os.listdir(target.parent) == ([target.name] if old else [])
    assert not old or target.read_text() == old


CSV_OF_ALL = """
try:
    store.write_csv(arguments["csv"], store.open_database(path), ["E1"])
    print("written")
except store.StudyInfoError as error:
    print(error)
"""


@pytest.mark.parametrize("limit", [0, 1000, 20_000])
def test_a_csv_file_on_a_full_disk_leaves_the_old_one(path, conn, target, limit):
    put(conn, "E1", range(500))
    target.write_text("old\n")
    said = said_by(child(LIMITED + CSV_OF_ALL, path, limit=limit, csv=str(target)))
    assert said.startswith(f"CSV file {target} cannot be written")
    assert target.read_text() == "old\n" and os.listdir(target.parent) == [target.name]


def test_a_csv_file_in_a_folder_that_may_not_be_written_is_a_sentence(open_folder):
    path, out = open_folder / "study_info.db", open_folder / "out"
    with contextlib.closing(store.open_database(str(path))) as conn:
        put(conn)
    path.chmod(0o644)
    out.mkdir()
    (out / "x.csv").write_text("old\n")
    out.chmod(0o555)
    said = said_by(child(CSV_OF_ALL, path, user=True, csv=str(out / "x.csv")))
    assert said.startswith(f"CSV file {out / 'x.csv'} cannot be written") and "ermission" in said
    assert (out / "x.csv").read_text() == "old\n" and os.listdir(out) == ["x.csv"]
