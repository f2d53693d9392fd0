"""Answers changed at random: nothing but a sentence comes of it, and no row breaks a rule.

HYPOTHESIS_PROFILE=thorough python -m pytest -c tests/pytest.ini tests/test_fuzz.py    # some thousands of cases
"""
import contextlib
import json
import logging
import math
import os
import pathlib
import random
import sqlite3
import tempfile

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import ImplicitVRLittleEndian

import dicom_files
import store_study_info as program
from endpoint import Request
from stand_in import StandIn

COMMON = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}
settings.register_profile("default", max_examples=150, **COMMON)
settings.register_profile("thorough", max_examples=3000, **COMMON)
PROFILE = settings.get_profile(os.environ.get("HYPOTHESIS_PROFILE", "default"))

FILES = [dicom_files.instance("E1", series=1),
         dicom_files.instance("E1", series=2, syntax=ImplicitVRLittleEndian),
         dicom_files.instance("E1", series=3, number=1, sar=None, ta=None),
         dicom_files.instance("E1", series=3, number=2),
         dicom_files.instance("E1", series=4, sar=None, ta=None, creator=None, AcquisitionDuration=12.5),
         dicom_files.instance("E2", study="first half", StudyDate="20240430"),
         dicom_files.instance("E2", study="second half", StudyDate="20240501")]
TOKENS = ["202404", "E1", "E2"]


class Local(program.Server):
    """Asks the stand-in without a network; what arrives is what `change` makes of the answer."""

    stand_in: StandIn
    change = staticmethod(lambda request, data: data)

    def _once(self, method, path, body, absent_ok, cut):
        request = Request(method, path, b"" if body is None else json.dumps(body).encode(), {})
        answer = self.stand_in.answer(request)
        self.answered = 0
        if answer.status == 404 and absent_ok:
            return None
        if answer.status != 200:
            raise program.ServerError(f"{path} was answered with {answer.status}")
        data = self.change(request, answer.body)
        return data[:mark].rstrip(b", \r\n") + b"}" if cut and (mark := data.find(cut)) >= 0 else data


# -- changes ------------------------------------------------------------------------------------------------------------

TEXTS = st.one_of(st.text(max_size=30), st.sampled_from([
    "", " ", "\0", "E", "E1", "E2", "E1 ", "e1", "E*", "NaN", "nan", "inf", "-1", "1e999", "-0", "9" * 400, "9223372036854775808", "0.5", "TA 01:00", "TA 99999:59*9999",
    "20240430", "99999999", "None", "true", "\ud800", "\x1b[2J", "E\n1", "MR", "SIEMENS MR HEADER", "../../system", "1.2.3"]))
VALUES = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS),
                      lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(TEXTS, inner, max_size=3)), max_leaves=5)
KINDS = ["value", "value", "text", "text", "delete", "twice", "rename", "swap", "bytes", "truncate", "empty"]


def places(node, path=()):
    """Every place in a JSON value, as a path of keys."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def changed(data: bytes, kind: str, draw, luck: random.Random) -> bytes:
    """An answer with one change in it."""
    if kind == "truncate":
        return data[:luck.randrange(len(data) + 1)]
    if kind == "empty":
        return luck.choice([b"", b"[]", b"{}", b"null"])
    if kind == "bytes":
        place = luck.randrange(len(data) + 1)
        return data[:place] + draw(st.binary(min_size=1, max_size=4)) + data[place + luck.randrange(3):]
    try:
        parsed = json.loads(data)
    except ValueError:
        return draw(st.binary(max_size=20))
    path = luck.choice(list(places(parsed)))
    if not path:
        return json.dumps(draw(VALUES)).encode()
    parent = parsed
    for key in path[:-1]:
        parent = parent[key]
    if kind == "delete":
        del parent[path[-1]]
    elif kind == "twice" and isinstance(parent, list):
        parent.insert(luck.randrange(len(parent) + 1), parent[path[-1]])
    elif kind == "rename" and isinstance(parent, dict):
        parent[draw(st.one_of(TEXTS, st.sampled_from(list(program.SERIES_TAGS))))] = parent.pop(path[-1])
    elif kind == "swap" and isinstance(parent, dict):
        other = luck.choice(list(parent))
        parent[path[-1]], parent[other] = parent[other], parent[path[-1]]
    else:
        parent[path[-1]] = draw(TEXTS if kind == "text" else VALUES)
    return json.dumps(parsed, indent=3, separators=(",", " : ")).encode()


# -- rules ---------------------------------------------------------------------------------------------------------------

def is_text(value):
    return value is None or isinstance(value, str) and value not in ("",) and value == value.strip(" \0")


def is_number(value):
    return value is None or isinstance(value, float) and math.isfinite(value) and value >= 0


def is_whole(value):
    return value is None or isinstance(value, int)


RULES = {"studies": {"accession": lambda value: isinstance(value, str) and value.startswith("E"), "age": lambda value: value is None or isinstance(value, int) and 0 <= value <= 999,
                     "height": is_number, "weight": is_number},
         "series": {"series_uid": lambda value: isinstance(value, str) and bool(value), "accession": lambda value: isinstance(value, str) and value.startswith("E"),
                    "sar": lambda value: value is not None and is_number(value), "duration": lambda value: isinstance(value, int) and value >= 0, "series_number": is_whole}}


def check_rows(path: pathlib.Path) -> dict[str, int]:
    """{accession: number of series}, once every row keeps the rules of its columns."""
    with contextlib.closing(sqlite3.connect(path)) as conn:
        conn.row_factory = sqlite3.Row
        for table, rules in RULES.items():
            for row in conn.execute(f"SELECT * FROM {table}"):
                for column in row.keys():
                    assert rules.get(column, is_text)(row[column]), (table, column, row[column])
        assert conn.execute("PRAGMA foreign_key_check").fetchall() == []
        counts = {accession: 0 for (accession,) in conn.execute("SELECT accession FROM studies")}
        for (accession,) in conn.execute("SELECT accession FROM series"):
            counts[accession] += 1
        return counts


@pytest.fixture(scope="module", params=[(False, "Always"), (False, "Never"), (True, "Always")], ids=["new", "new-blind", "old"])
def stand_in(request):
    old, access = request.param
    return StandIn(*FILES, old=old, StorageAccessOnFind=access)


@pytest.fixture
def lines(monkeypatch):
    """All that the program logs, as it would be written."""
    class Kept(logging.Handler):
        def emit(self, record):
            said.append(record.getMessage())
    said: list[str] = []
    monkeypatch.setattr(program.log, "handlers", [Kept()])
    monkeypatch.setattr(program.log, "propagate", False)
    program.log.setLevel(logging.DEBUG)
    return said


def serial(work, items, jobs):
    """All in this thread: Hypothesis draws in no other."""
    for item in items:
        try:
            result = work(item)
        except Exception as error:
            result = error
        yield item, result


@pytest.fixture
def fast(monkeypatch):
    """No waits, no network, no file system that waits for a disk."""
    monkeypatch.setattr(program, "Server", Local)
    monkeypatch.setattr(program, "FIRST_WAIT", 0)
    monkeypatch.setattr(program, "in_order", serial)
    monkeypatch.setattr(program, "find_credentials", lambda host, named: (None, "nowhere"))


def acquire(path: pathlib.Path, arguments: list[str]) -> tuple[program.Tally, list[str], BaseException | None]:
    """A run in this process: its tally, what it printed, and the error that ended it."""
    tally, printed, ended = program.Tally(), [], None
    original, program.print_accession = program.print_accession, printed.append
    try:
        program.acquire(program.build_parser().parse_args(["--db", str(path), "--jobs", "1", "--url", "http://127.0.0.1:1", *arguments]), tally)
    except program.StudyInfoError as error:
        ended = error
    finally:
        program.print_accession = original
    return tally, printed, ended


def visible(text: str) -> bool:
    return all(char.isprintable() for char in text)


def test_unchanged_answers_store_everything(stand_in, fast, tmp_path):
    Local.stand_in, Local.change = stand_in, staticmethod(lambda request, data: data)
    tally, printed, ended = acquire(tmp_path / "a.db", ["--fallback", *TOKENS])
    assert (ended, tally.exit_status, printed) == (None, 0, ["E1", "E2"])
    assert check_rows(tmp_path / "a.db") == {"E1": 3, "E2": 2}


def test_no_change_of_answers_escapes_as_an_exception_or_breaks_a_row(stand_in, fast, lines):
    Local.stand_in = stand_in

    @settings(PROFILE)
    @given(st.data(), st.integers(0, 1 << 30), st.sampled_from(KINDS), st.integers(0, 14), st.sampled_from([1, 1, 2, 5]), st.sampled_from([[], ["--fallback"], ["--force"]]))
    def run(data, seed, kind, first, times, options):
        luck, seen = random.Random(seed), []

        def change(request, answer):
            seen.append(request)
            assert len(seen) < 500, "the run does not end"
            return changed(answer, kind, data.draw, luck) if first <= len(seen) - 1 < first + times else answer
        Local.change = staticmethod(change)
        lines.clear()
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "a.db")
            tally, printed, ended = acquire(path, [*options, *TOKENS])
            stored = check_rows(path) if path.exists() else {}
        assert len(printed) == len(set(printed)) and all(visible(line) for line in printed)
        assert tally.stored == len(stored) >= len(printed)
        assert ended is None or visible(str(ended))
        assert [line for line in lines if not visible(line)] == []
        assert ended is not None or lines
    run()


ANSWERS = st.one_of(VALUES.map(lambda value: json.dumps(value).encode()), st.binary(max_size=60))


def test_no_answer_made_up_whole_escapes_as_an_exception(stand_in, fast):
    Local.stand_in = stand_in

    @settings(PROFILE)
    @given(st.data(), st.sampled_from(["system", "statistics", "find study", "find series", "find instance", "series", "tags", "content"]))
    def run(data, kind):
        seen = []

        def change(request, answer):
            seen.append(request)
            assert len(seen) < 500, "the run does not end"
            return data.draw(ANSWERS) if request.kind == kind else answer
        Local.change = staticmethod(change)
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "a.db")
            acquire(path, ["--fallback", *TOKENS])
            if path.exists():
                check_rows(path)
    run()


@settings(PROFILE)
@given(st.dictionaries(st.one_of(TEXTS, st.sampled_from(program.SERIES_TAGS + program.FALLBACK_TAGS)), st.one_of(st.none(), TEXTS, st.lists(VALUES, max_size=3)), max_size=12))
def test_no_header_raises_and_each_value_keeps_its_column(header):
    found = program.measure(header)
    program.may_be_elsewhere(found)
    program.whole_body_sar(header.get(program.SHARED_GROUPS))
    study = program.extract_study([header], "E1")
    assert all(RULES["studies"].get(column, is_text)(value) for column, value in study.items())
    if found.complete:
        series = program.extract_series(found, "E1")
        assert all(RULES["series"].get(column, is_text)(value) for column, value in series.items() if column != "series_uid")
