"""Answers changed at random: nothing but a sentence comes of it, and no row breaks a rule.

HYPOTHESIS_PROFILE=thorough python -m pytest -c tests/pytest.ini tests/test_fuzz.py    # some thousands of cases
"""
import contextlib
import io
import itertools
import json
import os
import pathlib
import random
import re
import sqlite3
import tempfile
from collections.abc import Callable
from typing import NamedTuple

import httpx
import pytest
from conftest import OURS, check_row
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydicom.uid import ImplicitVRLittleEndian

import dicom_files
import store_study_info as program
from endpoint import Request
from stand_in import StandIn

EXAMPLES = {"usual": 150, "thorough": 3000}
PROFILE = settings(max_examples=EXAMPLES[os.environ.get("HYPOTHESIS_PROFILE", "usual")],
                   suppress_health_check=list(HealthCheck))

FILES = [dicom_files.instance("E1", series=1),
         dicom_files.instance("E1", series=2, syntax=ImplicitVRLittleEndian),
         dicom_files.instance("E1", series=3, number=1, sar=None, ta=None),
         dicom_files.instance("E1", series=3, number=2),
         dicom_files.instance("E1", series=4, sar=None, ta=None, creator=None, AcquisitionDuration=12.5),
         dicom_files.instance("E2", study="first half", StudyDate="20240430"),
         dicom_files.instance("E2", study="second half", StudyDate="20240501")]
OPTIONS = ["--url", "http://127.0.0.1:1", "--jobs", "1", "-v"]
TOKENS = ["202404", "E1", "E2"]
STAND_INS = {"new": (False, "Always"), "new-blind": (False, "Never"), "old": (True, "Always")}
LONGEST_RUN = 500    # requests; a run that asks more would never end


# -- changes -----------------------------------------------------------------------------------------------------------

TEXTS = st.one_of(st.text(max_size=30), st.sampled_from([
    "", " ", "\0", "E", "E1", "E2", "E1 ", "e1", "E*", "NaN", "nan", "inf", "-1", "1e999", "-0", "9" * 400,
    "9223372036854775808", "0.5", "TA 01:00", "TA 99999:59*9999", "20240430", "99999999", "None", "true", "\ud800",
    "\x1b[2J", "E\n1", "MR", "SIEMENS MR HEADER", "../../system", "1.2.3"]))
VALUES = st.recursive(st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), TEXTS), max_leaves=5,
                      extend=lambda inner: st.one_of(st.lists(inner, max_size=3),
                                                     st.dictionaries(TEXTS, inner, max_size=3)))
BYTES = st.binary(max_size=20)
TAGS = ["0008,0016", "0008,0020", "0008,0050", "0008,0060", "0008,0070", "0010,0020", "0010,1010", "0010,1020",
        "0018,1316", "0018,9073", "0020,000d", "0020,000e", "0020,0011", "0020,1206", "0020,1209", "0051,0010",
        "0051,100a", "5200,9229"]
KINDS = ["value", "value", "text", "text", "delete", "twice", "rename", "swap", "bytes", "truncate", "empty"]


class New(NamedTuple):
    """What a change may put into an answer."""

    texts: list
    values: list
    bytes: list


NEW = st.builds(New, *(st.lists(one, min_size=1, max_size=3) for one in (TEXTS, VALUES, BYTES)))


def places(node, path=()):
    """Every place in a JSON value, as a path of keys."""
    yield path
    items = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for key, value in items:
        yield from places(value, (*path, key))


def changed(data: bytes, kind: str, new: New, luck: random.Random) -> bytes:
    """An answer with one change in it."""
    if kind == "truncate":
        return data[:luck.randrange(len(data) + 1)]
    if kind == "empty":
        return luck.choice([b"", b"[]", b"{}", b"null"])
    if kind == "bytes":
        place = luck.randrange(len(data) + 1)
        return data[:place] + luck.choice(new.bytes) + data[place + luck.randrange(3):]
    try:
        parsed = json.loads(data)
    except ValueError:
        return luck.choice(new.bytes)
    path = luck.choice(list(places(parsed)))
    if path:
        parent = parsed
        for key in path[:-1]:
            parent = parent[key]
        change_member(parent, path[-1], kind, new, luck)
    else:
        parsed = luck.choice(new.values)
    return json.dumps(parsed, indent=3, separators=(",", " : ")).encode()


def change_member(parent, key, kind: str, new: New, luck: random.Random) -> None:
    """Change a list or an object at a place."""
    if kind == "delete":
        del parent[key]
    elif kind == "twice" and isinstance(parent, list):
        parent.insert(luck.randrange(len(parent) + 1), parent[key])
    elif kind == "rename" and isinstance(parent, dict):
        parent[luck.choice(new.texts + TAGS)] = parent.pop(key)
    elif kind == "swap" and isinstance(parent, dict):
        other = luck.choice(list(parent))
        parent[key], parent[other] = parent[other], parent[key]
    else:
        parent[key] = luck.choice(new.texts if kind == "text" else new.values)


# -- runs --------------------------------------------------------------------------------------------------------------

class Ended(NamedTuple):
    status: int
    printed: list[str]
    lines: list[str]            # of the log
    stored: dict[str, int]      # {accession: number of series}


@pytest.fixture(scope="module", params=STAND_INS)
def stand_in(request):
    old, access = STAND_INS[request.param]
    return StandIn(*FILES, old=old, StorageAccessOnFind=access)


@pytest.fixture
def run(stand_in, monkeypatch, tmp_path) -> Callable[..., Ended]:
    """run(change, *options): the whole program in this process, on answers as change(request, body) leaves them.

    They come from the stand-in without a network: in the place of httpx's own way to a server.
    """
    for name in [name for name in os.environ if name.upper() in OURS]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)

    def acquire(change: Callable[[Request, bytes], bytes], *options: str) -> Ended:
        asked = itertools.count()

        def handle(_, request: httpx.Request) -> httpx.Response:
            assert next(asked) < LONGEST_RUN, "the run does not end"
            plain = Request(request.method, request.url.raw_path.decode(), request.read(), dict(request.headers))
            answer = stand_in.answer(plain)
            body = change(plain, answer.body) if answer.status == 200 else answer.body
            return httpx.Response(answer.status, headers={"Content-Type": answer.content_type}, content=body)

        monkeypatch.setattr(httpx.HTTPTransport, "handle_request", handle)
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()) as out, \
                contextlib.redirect_stderr(io.StringIO()) as err:
            path = pathlib.Path(folder, "a.db")
            status = program.main([*OPTIONS, "--db", str(path), *options, *TOKENS])
            return Ended(status, out.getvalue().split("\n")[:-1], err.getvalue().split("\n")[:-1], checked_rows(path))
    return acquire


def checked_rows(path: pathlib.Path) -> dict[str, int]:
    """{accession: number of series}, once every row keeps the rules of its columns."""
    if not path.exists():
        return {}
    with contextlib.closing(sqlite3.connect(path)) as conn:
        conn.row_factory = sqlite3.Row
        for table in ("studies", "series"):
            for row in conn.execute(f"SELECT * FROM {table}"):
                check_row(table, dict(row))
        assert conn.execute("PRAGMA foreign_key_check").fetchall() == []
        return {row["accession"]: row["count"] for row in conn.execute(
            "SELECT studies.accession, count(series_uid) AS count FROM studies LEFT JOIN series USING (accession)"
            " GROUP BY studies.accession")}


def test_unchanged_answers_store_everything(run):
    ended = run(lambda request, body: body, "--fallback")
    assert (ended.status, ended.printed, ended.stored) == (0, ["E1", "E2"], {"E1": 3, "E2": 2})


def test_no_change_of_answers_escapes_as_an_exception_or_breaks_a_row(run):
    @settings(PROFILE)
    @given(NEW, st.integers(0, 1 << 30), st.sampled_from(KINDS), st.integers(0, 14), st.sampled_from([1, 1, 2, 5]),
           st.sampled_from([[], ["--fallback"], ["--force"]]))
    def check(new, seed, kind, first, times, options):
        luck, asked = random.Random(seed), itertools.count()

        def change(request, body):
            return changed(body, kind, new, luck) if first <= next(asked) < first + times else body

        ended = run(change, *options)
        summary = re.search(r"studies: (\d+) stored, ", ended.lines[-1])
        assert [line for line in ended.lines + ended.printed if not line.isprintable()] == []
        levels = [re.match(r"[\d-]{10} [\d:]{8} (DEBUG|INFO|WARNING|ERROR) ", line) for line in ended.lines]
        assert None not in levels, "a line was forged"
        assert ended.status == 1 or ended.status == 0 and "ERROR" not in [level[1] for level in levels if level]
        assert len(ended.printed) == len(set(ended.printed)) <= len(ended.stored)
        assert len(ended.stored) == (int(summary[1]) if summary else 0)
    check()


def test_no_answer_made_up_whole_escapes_as_an_exception(run):
    answers = st.one_of(VALUES.map(lambda value: json.dumps(value).encode()), st.binary(max_size=60))

    @settings(PROFILE)
    @given(st.lists(answers, min_size=1, max_size=3), st.sampled_from([
        "system", "statistics", "find study", "find series", "find instance", "series", "tags", "content"]))
    def check(made, kind):
        turn = itertools.cycle(made)
        ended = run(lambda request, body: next(turn) if request.kind == kind else body, "--fallback")
        assert ended.status in (0, 1) and ended.lines
    check()
