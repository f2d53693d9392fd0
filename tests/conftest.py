"""Fixtures: the program as a subprocess, and real Orthanc servers that live for the session."""
import contextlib
import datetime
import math
import os
import pathlib
import socket
import sqlite3
import subprocess
import sys
from collections.abc import Callable
from typing import NamedTuple

import pytest
from hypothesis import settings

HERE = pathlib.Path(__file__).resolve().parent
PROGRAM = HERE.parent / "store_study_info.py"
sys.path[:0] = [str(HERE), str(HERE.parent)]

import orthanc  # noqa: E402
import store_study_info as program  # noqa: E402
from clock import Clock  # noqa: E402
from endpoint import Endpoint, Proxy  # noqa: E402
from stand_in import StandIn  # noqa: E402
from warm import Warm  # noqa: E402

NO_ORTHANC = "no Orthanc was found: install one, or name one in ORTHANC_COMMANDS"
STAND_INS = ["stand-in", "stand-in of old"]
REQUIRED = os.environ.get("REQUIRE_ORTHANC") == "1"


def failure(command: str) -> str:
    """Why this Orthanc does not start; nothing where it does."""
    try:
        with orthanc.Orthanc(command):
            return ""
    except orthanc.DidNotStart as error:
        return str(error)


# Those that do not start are left out, unless all are required. Tried once: xdist's workers find what is left here.
FAILURES = {} if REQUIRED or "PYTEST_XDIST_WORKER" in os.environ else {one: failure(one) for one in orthanc.commands()}
FAILED = [*filter(None, FAILURES.values())]
if FAILED:
    os.environ["ORTHANC_COMMANDS"] = "; ".join(one for one in FAILURES if not FAILURES[one]) or "stand-in"
COMMANDS = orthanc.commands() or STAND_INS
REAL = COMMANDS != STAND_INS

# What of the caller's environment the program would read.
OURS = ("STUDY_INFO_DB", "STUDY_INFO_PREFIX", "ORTHANC_URL", "NETRC", "SSL_CERT_FILE", "HTTP_PROXY", "HTTPS_PROXY",
        "ALL_PROXY", "NO_COLOR")

# Property tests: no example is too slow on a busy machine, and none is left as a file in the folder of the caller.
settings.register_profile("suite", deadline=None, database=None)
settings.load_profile("suite")


def pytest_report_header(config):
    used = "; ".join(COMMANDS) if REAL else " ".join(FAILED or [NO_ORTHANC]) + "; a stand-in takes its place"
    return "orthanc: " + used


def pytest_terminal_summary(terminalreporter):
    for line in FAILED:
        terminalreporter.write_line(line)
    if not REAL:
        terminalreporter.write_line(("" if FAILED else NO_ORTHANC + "; ") + "these tests ran on a stand-in")


@pytest.fixture(scope="session", params=COMMANDS, ids=lambda command: command.replace("/", "_").replace(" ", "_"))
def command(request):
    """Each way to start Orthanc that there is."""
    if not REAL and REQUIRED:
        pytest.fail(NO_ORTHANC)
    return request.param


@pytest.fixture(scope="session")
def real(command):
    """For tests of what only a real server does."""
    if command in STAND_INS:
        pytest.skip(NO_ORTHANC)


def start(command, **options):
    """A server to be entered: Orthanc, or the stand-in with those of its options that it knows."""
    if command not in STAND_INS:
        return orthanc.Orthanc(command, **options)
    options.pop("Name", None)
    unknown = options.keys() - {"LimitFindResults", "StorageAccessOnFind", "StableAge"}
    if unknown:
        pytest.skip(f"{NO_ORTHANC}; the stand-in has no {', '.join(unknown)}")
    return StandIn(old=command == STAND_INS[1], **options)


def entered(stack: contextlib.ExitStack, command, **options):
    """A running server, until the stack is left; the test fails in a sentence where it does not start."""
    try:
        return stack.enter_context(start(command, **options))
    except orthanc.DidNotStart as error:
        pytest.fail(str(error), pytrace=False)


@pytest.fixture(scope="session")
def servers(command):
    """servers(**configuration): a running server with that configuration, the same one each time it is asked for."""
    with contextlib.ExitStack() as stack:
        running = {}

        def get(**options):
            key = repr(sorted(options.items()))
            if key not in running:
                running[key] = entered(stack, command, **options)
            return running[key]
        yield get


@pytest.fixture(scope="session")
def server(servers):
    """A server where all is stable a second after it came."""
    return servers()


@pytest.fixture
def fresh(command):
    """fresh(**configuration): a server of this test's own, empty."""
    with contextlib.ExitStack() as stack:
        yield lambda **options: entered(stack, command, **options)


@pytest.fixture
def proxy(server):
    """A counting proxy before the session's server."""
    with Proxy(server.url) as running:
        yield running


class Ran(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def printed(self) -> list[str]:
        return self.out.splitlines()

    @property
    def summary(self) -> str:
        return self.err.splitlines()[-1] if self.err else ""


def on_one_day(act: Callable[[datetime.date], Ran]) -> Ran:
    """act(today), once more where midnight came meanwhile."""
    while True:
        today = datetime.date.today()
        ran = act(today)
        if today == datetime.date.today():
            return ran


class Home:
    """An empty folder to run the program in, with nothing of the caller's environment that it reads."""

    def __init__(self, folder: pathlib.Path, warm: Warm):
        self.folder, self.db, self.warm = folder, folder / "study_info.db", warm

    def environment(self, extra=None) -> dict:
        kept = {name: value for name, value in os.environ.items() if name.upper() not in OURS}
        return kept | {"HOME": str(self.folder), "COLUMNS": "80"} | (extra or {})

    def command(self, *arguments, url=None) -> list[str]:
        return [sys.executable, str(PROGRAM), *(["--url", url] if url else []), *map(str, arguments)]

    def run(self, *arguments, url=None, env=None, **options) -> Ran:
        """Run the program to its end; no traceback is ever right.

        It is started from scratch where options or Python's own environment are given, else by the waiting interpreter.
        """
        if not options and not any(name.startswith(("PYTHON", "LC_", "LANG")) for name in env or {}):
            ran = Ran(*self.warm.run(self.command(*arguments, url=url)[2:], self.folder, self.environment(env)))
            assert "Traceback" not in ran.err, ran.err
            return ran
        usual = {"capture_output": True, "text": True, "timeout": 300, "stdin": subprocess.DEVNULL}
        ended = subprocess.run(self.command(*arguments, url=url), cwd=self.folder, env=self.environment(env),
                               check=False, **usual | options)
        assert "Traceback" not in (ended.stderr or ""), ended.stderr
        return Ran(ended.returncode, ended.stdout or "", ended.stderr or "")

    def start(self, *arguments, url=None, env=None, **options) -> subprocess.Popen:
        usual = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True, "stdin": subprocess.DEVNULL}
        return subprocess.Popen(self.command(*arguments, url=url), cwd=self.folder, env=self.environment(env),
                                **usual | options)

    def rows(self, query: str, *values) -> list[dict]:
        with contextlib.closing(sqlite3.connect(self.db)) as conn:
            conn.row_factory = sqlite3.Row
            return [dict(row) for row in conn.execute(query, values)]

    def series(self, accession: str | None = None) -> list[dict]:
        return self.rows("SELECT * FROM series WHERE accession = ifnull(?, accession)"
                         " ORDER BY accession, series_number, series_uid", accession)

    def stored(self) -> dict[str, set]:
        """{accession: {(series_uid, sar, duration)}}, once the database is sound; empty where there is none yet."""
        if not self.db.exists():
            return {}
        with contextlib.closing(sqlite3.connect(self.db, timeout=30, isolation_level=None)) as conn:
            conn.execute("BEGIN")    # both tables as they are at one moment
            assert conn.execute("PRAGMA integrity_check").fetchall() == [("ok",)]
            if not conn.execute("SELECT name FROM sqlite_master WHERE name = 'series'").fetchall():
                return {}
            found: dict[str, set] = {accession: set() for (accession,) in conn.execute("SELECT accession FROM studies")}
            for accession, *rest in conn.execute("SELECT accession, series_uid, sar, duration FROM series"):
                found[accession].add(tuple(rest))
        return found

    def studies(self) -> list[dict]:
        return self.rows("SELECT * FROM studies ORDER BY accession")


def is_text(value):
    return value is None or isinstance(value, str) and value != "" and value == value.strip(" \0")


def is_accession(value):
    return isinstance(value, str) and value.startswith("E")


def is_number(value):
    return value is None or isinstance(value, float) and math.isfinite(value) and value >= 0


def is_integer(value):
    return value is None or isinstance(value, int)


RULES = {    # of the columns that hold something else than a text or NULL
    "studies": {"accession": is_accession, "height": is_number, "weight": is_number,
                "age": lambda value: value is None or isinstance(value, int) and 0 <= value <= 999},
    "series": {"accession": is_accession, "series_number": is_integer,
               "series_uid": lambda value: value is not None and is_text(value),
               "sar": lambda value: value is not None and is_number(value),
               "duration": lambda value: isinstance(value, int) and value >= 0},
}


def check_row(table: str, row: dict) -> None:
    """What holds for every row that is stored, whatever the server said."""
    for column, value in row.items():
        assert RULES[table].get(column, is_text)(value), (table, column, value)


@pytest.fixture(scope="session")
def warm():
    with Warm() as running:
        yield running


@pytest.fixture
def home(tmp_path, warm) -> Home:
    return Home(tmp_path, warm)


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """The time of this process' endpoints, and of the program where it runs in this process: see clock.py."""
    made = Clock()

    def recv(connection, *size):
        return made.recv(connection, *size)
    monkeypatch.setattr(program, "time", made)
    monkeypatch.setattr(Endpoint, "clock", made)
    monkeypatch.setattr(socket.socket, "recv", recv)
    return made


@pytest.fixture
def here(home, monkeypatch, capfd, clock):
    """here(*arguments, url=…): the program's main() in this process, its waits made, one study after the other."""
    monkeypatch.chdir(home.folder)
    for name in set(os.environ) - home.environment().keys():
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(home.folder))

    def run(*arguments, url, jobs=1) -> Ran:
        capfd.readouterr()
        try:
            status = program.main(["--jobs", str(jobs), "--url", url, *map(str, arguments)])
        except SystemExit as ended:
            status = int(ended.code or 0)
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        return Ran(status, out, err)
    return run


class Refusals:
    """How often SQLite refused the program a lock; `then` is called each time, and may let go of it."""

    def __init__(self):
        self.count, self.then = 0, lambda: None

    def met(self) -> None:
        self.count += 1
        self.then()


@pytest.fixture
def refusals(monkeypatch) -> Refusals:
    """For connections made from now on in this process."""
    connect, refusals = sqlite3.connect, Refusals()

    def watched(*arguments, factory=sqlite3.Connection, **options):
        class Watched(factory):    # type: ignore[valid-type, misc]
            def execute(self, *arguments):
                try:
                    return super().execute(*arguments)
                except sqlite3.OperationalError as error:
                    if "locked" in str(error):
                        refusals.met()
                    raise
        return connect(*arguments, factory=Watched, **options)
    monkeypatch.setattr(sqlite3, "connect", watched)
    return refusals
