"""However a run ends, what is stored is whole, and the next run completes it."""
import contextlib
import os
import random
import signal
import sqlite3
import subprocess
import sys
import threading
import time
from collections import Counter

import pytest

import dicom_files
import store_study_info as program
from conftest import PROGRAM, Home
from endpoint import answered_after, at
from stand_in import StandIn

KILLS = int(os.environ.get("KILLS", "6"))    # how often a run is killed, with and without --force each
MONTH = [f"E{number}" for number in range(10, 22)]


def files(first: int, last: int, sar: str) -> list[bytes]:
    """The month, each study with the series first to last."""
    return [dicom_files.instance(accession, series=series, StudyDate=f"202404{day:02}", sar=sar)
            for day, accession in enumerate(MONTH, 1) for series in range(first, last + 1)]


def whole(first: int, last: int, sar: str) -> dict[str, set]:
    """What must be stored of the month: (series_uid, sar, duration)."""
    return {accession: {(dicom_files.uid(accession, series), float(sar), 60) for series in range(first, last + 1)}
            for accession in MONTH}


BEFORE, AFTER = (1, 3, "0.5"), (2, 5, "0.75")


@pytest.fixture(scope="module")
def server():
    with StandIn(*files(*BEFORE)) as running:
        yield running


@pytest.fixture(autouse=True)
def well_behaved(server):
    server.forget()
    server.misbehave = None
    yield
    server.misbehave = None


def reached(condition, process: subprocess.Popen | None = None) -> None:
    """Wait until something has happened, or the process has ended without it; the bound only ends a test that hangs."""
    for _ in range(12000):
        if condition() or (process and process.poll() is not None):
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


def ended(process: subprocess.Popen, within: float = 120) -> tuple[int, str, str]:
    """All that a run waits for in these tests is further away: to end by itself is to have been stopped."""
    try:
        out, err = process.communicate(timeout=within)
    finally:
        process.kill()
    assert "Traceback" not in err and "Exception" not in err
    return process.returncode, out, err


def fetches(request, accession: str) -> bool:
    """Whether a request is for the series of an accession, alone or with others."""
    return request.kind == "find series" and accession in request.accessions


def asked_before(accession: str, jobs: int) -> list[str]:
    """The accessions of the groups before that of this one: each job gets its share of the month."""
    share = -(-len(MONTH) // jobs)
    return MONTH[:MONTH.index(accession) // share * share]


def all_whole(found: dict[str, set]) -> bool:
    """Whether each accession that is stored has all its series, with the values from before."""
    return all(series == whole(*BEFORE)[accession] for accession, series in found.items())


# -- SIGINT and SIGTERM ----------------------------------------------------------------------------------------------

SIGNALS = pytest.mark.parametrize(
    "signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"]
)
HANGS = {"the first contact": lambda request: request.kind == "system",
         "planning": lambda request: request.kind == "find study",
         "the first study": lambda request: fetches(request, "E10"),
         "a later study": lambda request: fetches(request, "E15")}


@SIGNALS
@pytest.mark.parametrize("jobs", [1, 4])
@pytest.mark.parametrize("during", HANGS, ids=lambda name: name.replace(" ", "-"))
def test_a_signal_ends_the_run_while_a_request_hangs(home, server, signum, status, jobs, during):
    hanging = threading.Event()

    def hang(count, request):
        if not HANGS[during](request):
            return None
        hanging.set()
        return "hang"
    server.misbehave = hang
    process = home.start("--timeout", "600", "--jobs", jobs, "202404", url=server.url)
    before = asked_before("E15", jobs) if during == "a later study" else []
    reached(hanging.is_set, process)
    reached(lambda: len(home.stored()) == len(before), process)
    process.send_signal(signum)
    code, out, err = ended(process)
    assert code == status
    assert [line for line in err.splitlines() if "interrupted by" in line] == [err.splitlines()[-1]]
    found = home.stored()
    assert sorted(found) == before
    assert out.splitlines() == before[:len(out.splitlines())]    # the last ones may be stored and not yet printed
    assert all_whole(found)


def start_watched(home, watch: str, *arguments) -> subprocess.Popen:
    """A real run of the program with something in its way: `watch` is Python, after the import of `program`."""
    code = "import os, signal, sqlite3, sys\nsys.path.insert(0, sys.argv.pop(1))\nimport store_study_info as program\n"
    return subprocess.Popen([sys.executable, "-c", code + watch + "program.end_process(program.main())\n",
                             str(PROGRAM.parent), *map(str, arguments)], cwd=home.folder, env=home.environment(),
                            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


REFUSED = """
connect = sqlite3.connect

def watched(*arguments, factory, **options):
    class Watched(factory):
        def execute(self, *arguments):
            try:
                return super().execute(*arguments)
            except sqlite3.OperationalError:
                open("refused", "w").close()
                raise
    return connect(*arguments, factory=Watched, **options)

sqlite3.connect = watched
"""


@SIGNALS
def test_a_signal_ends_the_run_while_it_waits_for_another_writer(home, server, signum, status):
    assert home.run("E10", url=server.url).status == 0
    with contextlib.closing(sqlite3.connect(home.db, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        process = start_watched(home, REFUSED, "--url", server.url, "202404")
        reached((home.folder / "refused").exists, process)
        process.send_signal(signum)
        code, _, err = ended(process)
        other.execute("ROLLBACK")
    assert code == status
    assert "interrupted by" in err.splitlines()[-1]
    assert home.stored() == {"E10": whole(*BEFORE)["E10"]}


@SIGNALS
def test_a_signal_ends_the_run_while_it_waits_to_repeat_a_request(home, server, signum, status):
    """The wait is of 50 s: a run that went on after it would be seen to ask again, or to end too late."""
    def later(answer):
        return answer._replace(status=503, headers=(("Retry-After", "50"),))
    server.misbehave = at("find study", later)
    process = home.start("-v", "202404", url=server.url)
    said = ""
    while "next try in 50.0 s" not in said:
        said = process.stderr.readline()
        assert said, "it ended without waiting"
    process.send_signal(signum)
    assert ended(process, within=45)[0] == status
    assert server.kinds.count("find study") == 1


@SIGNALS
def test_a_signal_while_studies_are_stored_leaves_whole_ones_and_the_next_run_completes(home, server, signum, status):
    """The last study is not answered before the signal came, so that the run cannot have ended by itself."""
    stopped = threading.Event()
    server.misbehave = lambda count, request: (
        answered_after(stopped) if fetches(request, MONTH[-1]) else None
    )
    process = home.start("202404", url=server.url, bufsize=1)
    first = process.stdout.readline().strip()
    process.send_signal(signum)
    code, out, _ = ended(process)
    stopped.set()
    assert code == status
    found = home.stored()
    assert first == MONTH[0] and set(out.splitlines()) <= set(found)
    assert len(found) < len(MONTH)
    assert all_whole(found)
    server.misbehave = None
    assert home.run("202404", url=server.url).status == 0
    assert home.stored() == whole(*BEFORE)


def test_no_csv_is_written_on_an_interrupt(home, server):
    (home.folder / "all.csv").write_text("as it was")
    server.misbehave = lambda count, request: "hang" if HANGS["a later study"](request) else None
    process = home.start("--timeout", "600", "--csv", "all.csv", "202404", url=server.url)
    reached(lambda: len(home.stored()) == len(asked_before("E15", 4)), process)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143
    assert (home.folder / "all.csv").read_text() == "as it was"


def test_an_interrupt_closes_the_database(home, server):
    """As WAL, which a user may have set, shows: a closed database has no file beside it."""
    assert home.run("E10", url=server.url).status == 0
    with contextlib.closing(sqlite3.connect(home.db)) as conn:
        conn.execute("PRAGMA journal_mode = WAL")
    server.misbehave = lambda count, request: "hang" if HANGS["a later study"](request) else None
    process = home.start("--timeout", "600", "--jobs", "4", "202404", url=server.url)
    assert process.stdout.readline()
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143
    assert [path.name for path in home.folder.iterdir() if path.name.startswith(home.db.name)] == [home.db.name]


# -- SIGKILL ---------------------------------------------------------------------------------------------------------


def phase(found: dict[str, set], wanted: dict[str, set], before: dict[str, set]) -> str:
    """What a kill met. Each study is as it is now, or as it was before (not there, without --force)."""
    assert found.keys() >= before.keys()
    assert all(series in (wanted[accession], before.get(accession)) for accession, series in found.items())
    new = sum(found.get(accession) == series for accession, series in wanted.items())
    return (
        "before the first was stored" if not new else "after the last was stored" if new == len(wanted) else "between"
    )


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
def test_a_killed_run_leaves_no_study_half_stored_and_the_next_run_completes(
        home, server, tmp_path_factory, warm, record_property, force):
    """Killed a random while after a random one of its requests; what holds then holds at every moment.

    With --force each study is as it was or as it is now: the second server lacks a series, has two more, other values.
    """
    before, wanted = (whole(*BEFORE), whole(*AFTER)) if force else ({}, whole(*BEFORE))
    arguments, random_of_test = ["--force"] * force + ["202404"], random.Random(force)
    met: Counter[str] = Counter()
    with StandIn(*files(*AFTER)) as other:
        source = other if force else server
        assert home.run("202404", url=source.url).status == 0
        requests = len(source.requests)
        for kill in range(KILLS):
            home = Home(tmp_path_factory.mktemp("killed"), warm)
            if force:
                assert home.run("202404", url=server.url).status == 0
            source.forget()
            place, moment = random_of_test.randint(1, requests), random_of_test.uniform(0, 0.1)
            process = home.start(*arguments, url=source.url)
            reached(lambda place=place: len(source.requests) >= place, process)
            time.sleep(moment)
            process.kill()
            process.communicate()
            what = f"kill {kill}, {moment:.3f} s after request {place} of {requests}"
            try:
                met[phase(home.stored(), wanted, before)] += 1
                assert home.run(*arguments, url=source.url).status == 0
                assert home.stored() == wanted
            except AssertionError as error:
                raise AssertionError(what) from error
    record_property("kills", dict(met))
    print("kills:", *(f"{count} {when}" for when, count in met.items()))
    assert met.total() == KILLS


DYING = f"""
upsert = program.upsert

def dying(conn, rows, stored):
    for table, row in rows:
        upsert(conn, [(table, row)], stored)
        if table == "series" and row["accession"] == "{MONTH[3]}":
            conn.execute("PRAGMA cache_spill = 1")
            os.kill(os.getpid(), signal.SIGKILL)

program.upsert = dying
"""


def test_a_run_killed_between_two_series_of_a_study_leaves_it_out(home, server):
    """The hot journal of a killed writer is rolled back by the next run."""
    process = start_watched(home, DYING, "--url", server.url, "202404")
    assert ended(process)[0] == -signal.SIGKILL
    assert sorted(home.stored()) in ([], MONTH[:3])    # those that were ready with it share its transaction
    assert home.run("202404", url=server.url).status == 0
    assert home.stored() == whole(*BEFORE)


# -- standard streams ------------------------------------------------------------------------------------------------


def test_a_reader_that_goes_away_ends_the_run_quietly(home, server):
    """The last study is answered once the reader of the first has gone."""
    gone = threading.Event()
    server.misbehave = lambda count, request: answered_after(gone) if fetches(request, MONTH[-1]) else None
    process = home.start("202404", url=server.url)
    assert process.stdout.readline() == MONTH[0] + "\n"
    process.stdout.close()
    gone.set()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(120) not in (70, 120)
    assert not any(word in err for word in ("Traceback", "Exception", "BrokenPipe", "Broken pipe"))
    assert set(home.stored()) >= set(MONTH[:2]) and all_whole(home.stored())
    assert home.run("202404", url=server.url).status == 0
    assert home.stored() == whole(*BEFORE)


def test_a_full_stdout_is_a_failure_in_a_sentence_and_all_is_stored(home, server):
    with open("/dev/full", "w") as full:
        process = home.start("202404", url=server.url, stdout=full)
        _, err = process.communicate(timeout=120)
    assert process.returncode == 1
    assert "Traceback" not in err and "Exception" not in err
    assert len([line for line in err.splitlines() if " ERROR " in line]) == 1 and "standard output" in err
    assert f"studies: {len(MONTH)} stored, 0 already stored, 0 failed; " in err.splitlines()[-1]
    assert home.stored() == whole(*BEFORE)
    assert all_whole(home.stored())


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_closed_streams_stop_nothing(home, server, closed):
    ran = subprocess.run(
        ["sh", "-c", f'exec "$@" {closed}', "sh", *home.command("202404", url=server.url)],
        cwd=home.folder,
        env=home.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 0
    assert "Traceback" not in ran.stderr and "Exception" not in ran.stderr
    assert home.stored() == whole(*BEFORE)
    if ">&-" not in closed.replace("2>&-", ""):
        assert ran.stdout.splitlines() == MONTH


def test_a_closed_standard_input_holds_no_tokens(home):
    ran = subprocess.run(
        ["sh", "-c", 'exec "$@" <&-', "sh", *home.command("@-", url="http://127.0.0.1:9")],
        cwd=home.folder,
        env=home.environment(),
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert ran.returncode == 2 and "there is no standard input" in ran.stderr and os.listdir(home.folder) == []


# -- several at once -------------------------------------------------------------------------------------------------


def test_several_runs_on_one_database_at_once_all_succeed(home, server):
    started = [
        home.start(*arguments, url=server.url)
        for arguments in (["202404"], ["--force", "202404"], ["--force", *MONTH], [*MONTH])
    ]
    for process in started:
        code, _, err = ended(process)
        assert code == 0, err
    assert home.stored() == whole(*BEFORE)


@pytest.mark.parametrize("force", [[], ["--force"]])
def test_a_run_that_waits_for_the_server_holds_up_no_other(home, server, here, refusals, force):
    """The first has stored some of the month when the server falls silent; the second meets no lock, not once."""
    assert not force or home.run("202404", url=server.url).status == 0
    silent, first = threading.Event(), MONTH[6]
    server.misbehave = lambda count, request: answered_after(silent) if fetches(request, first) else None
    slow = home.start("--jobs", "4", *force, "202404", url=server.url)
    assert [slow.stdout.readline().strip() for _ in asked_before(first, 4)] == asked_before(first, 4)
    ran = here(*force, *MONTH[9:], url=server.url)
    assert (ran.status, refusals.count) == (0, 0) and home.stored().keys() >= {*MONTH[9:]}
    silent.set()
    assert ended(slow)[0] == 0 and home.stored() == whole(*BEFORE)


@pytest.mark.parametrize("lock", ["IMMEDIATE", "EXCLUSIVE"])
@pytest.mark.parametrize("arguments", [["202404"], ["--force", "E10"], ["--csv", "all.csv", "E10"]], ids=" ".join)
def test_a_foreign_writer_is_waited_for(home, server, here, refusals, lock, arguments):
    """IMMEDIATE is a transaction under way, EXCLUSIVE its end, when nobody may even read."""
    assert home.run("E10", url=server.url).status == 0
    with contextlib.closing(sqlite3.connect(home.db, isolation_level=None, check_same_thread=False)) as other:
        other.execute(f"BEGIN {lock}")
        refusals.then = lambda: other.execute("COMMIT") if refusals.count == 2 else None
        ran = here(*arguments, url=server.url)
    assert ran.status == 0, ran.err
    assert refusals.count == (0 if lock == "IMMEDIATE" and "--csv" in arguments else 2)    # which only reads
    assert home.stored() == (whole(*BEFORE) if arguments == ["202404"] else {"E10": whole(*BEFORE)["E10"]})


def test_a_writer_that_does_not_let_go_is_a_sentence_and_nothing_is_lost(home, server, here, monkeypatch):
    assert home.run("E10", url=server.url).status == 0
    monkeypatch.setattr(program, "BUSY_SECONDS", 0.4)
    with contextlib.closing(sqlite3.connect(home.db, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        ran = here("202404", url=server.url)
        other.execute("ROLLBACK")
    assert ran.status == 1
    (sentence,) = [line for line in ran.err.splitlines() if " ERROR " in line]
    assert str(home.db) in sentence and "locked" in sentence
    assert home.stored() == {"E10": whole(*BEFORE)["E10"]}
