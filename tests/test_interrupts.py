"""However a run ends, what is stored is whole, and the next run completes it."""
import contextlib
import os
import random
import re
import signal
import sqlite3
import subprocess
import sys
import threading
import time

import pytest

import dicom_files
import store_study_info as program
from conftest import PROGRAM, Home
from stand_in import StandIn

KILLS = int(os.environ.get("KILLS", "6"))    # how often a run is killed, with and without --force each
MONTH = [f"E{number}" for number in range(10, 22)]


def files(first: int, last: int, sar: str) -> list[bytes]:
    """The month, each study with the series first to last."""
    return [dicom_files.instance(accession, series=series, StudyDate=f"202404{day:02}", sar=sar)
            for day, accession in enumerate(MONTH, 1) for series in range(first, last + 1)]


def whole(first: int, last: int, sar: float) -> dict[str, set]:
    """What must be stored of the month: (series_uid, sar, duration)."""
    return {accession: {(dicom_files.uid(accession, series), sar, 60) for series in range(first, last + 1)} for accession in MONTH}


BEFORE, AFTER = (1, 3, "0.5"), (2, 5, "0.75")


@pytest.fixture(scope="module")
def server():
    with StandIn(*files(*BEFORE)) as running:
        yield running


@pytest.fixture(autouse=True)
def well_behaved(server):
    server.forget()
    server.misbehave, server.delay = None, 0
    yield
    server.misbehave, server.delay = None, 0


def reached(condition) -> None:
    """Wait until something has happened."""
    for _ in range(3000):
        if condition():
            return
        time.sleep(0.01)
    raise AssertionError("it never happened")


def ended(process: subprocess.Popen) -> tuple[int, str, str]:
    """All that a run waits for in these tests is ten minutes away: to end within 30 s is to have been stopped."""
    try:
        out, err = process.communicate(timeout=30)
    finally:
        process.kill()
    assert "Traceback" not in err and "Exception" not in err
    return process.returncode, out, err


# -- SIGINT and SIGTERM ------------------------------------------------------------------------------------------------

SIGNALS = pytest.mark.parametrize("signum, status", [(signal.SIGINT, 130), (signal.SIGTERM, 143)], ids=["SIGINT", "SIGTERM"])
HANGS = {"the first contact": lambda request: request.kind == "system",
         "planning": lambda request: request.kind == "find study",
         "the first study": lambda request: request.kind == "find series" and b'"E10"' in request.body,
         "a later study": lambda request: request.kind == "find series" and b'"E15"' in request.body}


@SIGNALS
@pytest.mark.parametrize("jobs", [1, 4])
@pytest.mark.parametrize("during", HANGS, ids=lambda name: name.replace(" ", "-"))
def test_a_signal_ends_the_run_while_a_request_hangs(home, server, signum, status, jobs, during):
    hanging = threading.Event()

    def hang(count, request):
        if HANGS[during](request):
            hanging.set()
            return "hang"
    server.misbehave = hang
    process = home.start("--timeout", "600", "--jobs", jobs, "202404", url=server.url)
    assert hanging.wait(30)
    if during == "a later study":
        reached(lambda: len(home.stored()) == 5)
    process.send_signal(signum)
    code, out, err = ended(process)
    assert code == status
    assert [line for line in err.splitlines() if "interrupted by" in line] == [err.splitlines()[-1]]
    found = home.stored()
    assert sorted(found) == (MONTH[:5] if during == "a later study" else [])
    assert out.splitlines() in (sorted(found), sorted(found)[:-1])    # the last one may be stored and not yet printed
    assert all(series == whole(1, 3, 0.5)[accession] for accession, series in found.items())


@SIGNALS
def test_a_signal_ends_the_run_while_it_waits_for_another_writer(home, server, signum, status):
    assert home.run("E10", url=server.url).status == 0
    server.forget()
    with contextlib.closing(sqlite3.connect(home.db, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        process = home.start("202404", url=server.url)
        reached(lambda: server.kinds.count("find series") == len(MONTH) - 1)
        process.send_signal(signum)
        code, _, err = ended(process)
        other.execute("ROLLBACK")
    assert code == status
    assert "interrupted by" in err.splitlines()[-1]
    assert home.stored() == {"E10": whole(1, 3, 0.5)["E10"]}


@SIGNALS
def test_a_signal_ends_the_run_while_it_waits_to_repeat_a_request(home, server, signum, status):
    server.misbehave = lambda count, request: (lambda answer: answer._replace(status=503, headers=(("Retry-After", "50"),))) if request.kind == "find study" else None
    process = home.start("202404", url=server.url)
    reached(lambda: "find study" in server.kinds)
    process.send_signal(signum)
    assert ended(process)[0] == status


@SIGNALS
def test_a_signal_while_studies_are_stored_leaves_whole_ones_and_the_next_run_completes(home, server, signum, status):
    server.delay = 0.02
    process = home.start("--jobs", "1", "202404", url=server.url, bufsize=1)
    first = process.stdout.readline().strip()
    process.send_signal(signum)
    code, out, _ = ended(process)
    assert code == status
    found = home.stored()
    assert first == MONTH[0] and set(out.splitlines()) <= set(found)
    assert len(found) < len(MONTH)
    assert all(series == whole(1, 3, 0.5)[accession] for accession, series in found.items())
    server.delay = 0
    assert home.run("202404", url=server.url).status == 0
    assert home.stored() == whole(1, 3, 0.5)


def test_no_csv_is_written_on_an_interrupt(home, server):
    (home.folder / "all.csv").write_text("as it was")
    server.misbehave = lambda count, request: "hang" if HANGS["a later study"](request) else None
    process = home.start("--timeout", "600", "--csv", "all.csv", "202404", url=server.url)
    reached(lambda: len(home.stored()) == 5)
    process.send_signal(signal.SIGTERM)
    assert ended(process)[0] == 143
    assert (home.folder / "all.csv").read_text() == "as it was"


# -- SIGKILL -------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def span(server, tmp_path_factory, warm) -> float:
    """Seconds from a run's first request to its end."""
    server.misbehave, server.delay = None, 0
    home = Home(tmp_path_factory.mktemp("span"), warm)
    process = home.start("202404", url=server.url)
    server.forget()
    reached(lambda: server.requests)
    began = time.monotonic()
    process.communicate(timeout=60)
    return time.monotonic() - began


@pytest.mark.parametrize("force", [False, True], ids=["new", "force"])
@pytest.mark.parametrize("seed", range(KILLS))
def test_a_killed_run_leaves_no_study_half_stored_and_the_next_run_completes(home, server, span, seed, force):
    """With --force, each study is as it was or as it is now: the second server lacks a series, has two more and other values."""
    before, after = whole(1, 3, 0.5), whole(2, 5, 0.75)
    with StandIn(*files(*AFTER)) as other:
        source, wanted = (other, after) if force else (server, before)
        if force:
            assert home.run("202404", url=server.url).status == 0
            assert home.stored() == before
        source.forget()
        arguments = ["--force"] * force + ["202404"]
        process = home.start(*arguments, url=source.url)
        reached(lambda: source.requests or process.poll() is not None)
        time.sleep(random.Random(seed * 2 + force).uniform(0, span))
        process.kill()
        process.communicate()
        found = home.stored()
        assert set(found) == set(MONTH) if force else set(found) <= set(MONTH)
        assert all(series in (wanted[accession], before[accession]) for accession, series in found.items())
        assert home.run(*arguments, url=source.url).status == 0
        assert home.stored() == wanted


def test_a_run_killed_between_two_series_of_a_study_leaves_it_out(home, server):
    """The hot journal of a killed writer is rolled back by the next run."""
    script = ("import os, signal, sys; sys.path.insert(0, sys.argv.pop(1)); import store_study_info as program\n"
              "upsert = program.upsert\n"
              "def dying(conn, table, row):\n"
              "    upsert(conn, table, row)\n"
              f"    if table == 'series' and row['accession'] == '{MONTH[3]}':\n"
              "        conn.execute('PRAGMA cache_spill = 1'); os.kill(os.getpid(), signal.SIGKILL)\n"
              "program.upsert = dying\n"
              "sys.exit(program.main())\n")
    ran = subprocess.run([sys.executable, "-c", script, str(PROGRAM.parent), "--url", server.url, "202404"], cwd=home.folder, env=home.environment(), capture_output=True)
    assert ran.returncode == -signal.SIGKILL
    assert sorted(home.stored()) == MONTH[:3]
    assert home.run("202404", url=server.url).status == 0
    assert home.stored() == whole(1, 3, 0.5)


# -- standard streams ------------------------------------------------------------------------------------------------------

def test_a_reader_that_goes_away_ends_the_run_quietly(home, server):
    server.delay = 0.02
    process = home.start("--jobs", "1", "202404", url=server.url)
    process.stdout.readline()
    process.stdout.close()
    err = process.stderr.read()
    process.stderr.close()
    assert process.wait(30) not in (70, 120)
    assert not any(word in err for word in ("Traceback", "Exception", "BrokenPipe", "Broken pipe"))
    assert all(series == whole(1, 3, 0.5)[accession] for accession, series in home.stored().items())
    server.delay = 0
    assert home.run("202404", url=server.url).status == 0
    assert home.stored() == whole(1, 3, 0.5)


def test_a_full_stdout_ends_the_run_with_a_sentence(home, server):
    with open("/dev/full", "w") as full:
        process = home.start("202404", url=server.url, stdout=full)
        _, err = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "Traceback" not in err and "Exception" not in err
    assert len([line for line in err.splitlines() if " ERROR " in line]) == 1 and "standard output" in err
    counts = re.search(r"(\d+) stored, (\d+) already stored, (\d+) failed, (\d+) not reached", err.splitlines()[-1])
    assert sum(map(int, counts.groups())) == len(MONTH)
    assert all(series == whole(1, 3, 0.5)[accession] for accession, series in home.stored().items())


@pytest.mark.parametrize("closed", ["<&-", ">&-", "2>&-", "<&- >&- 2>&-", "2>/dev/full"])
def test_closed_streams_stop_nothing(home, server, closed):
    ran = subprocess.run(["sh", "-c", f'exec "$@" {closed}', "sh", *home.command("202404", url=server.url)], cwd=home.folder, env=home.environment(),
                         capture_output=True, text=True, timeout=60)
    assert ran.returncode == 0
    assert "Traceback" not in ran.stderr and "Exception" not in ran.stderr
    assert home.stored() == whole(1, 3, 0.5)
    if ">&-" not in closed.replace("2>&-", ""):
        assert ran.stdout.splitlines() == MONTH


def test_a_closed_standard_input_holds_no_tokens(home):
    ran = subprocess.run(["sh", "-c", 'exec "$@" <&-', "sh", *home.command("@-", url="http://127.0.0.1:9")], cwd=home.folder, env=home.environment(),
                         capture_output=True, text=True, timeout=60)
    assert ran.returncode == 2 and "there is no standard input" in ran.stderr and os.listdir(home.folder) == []


# -- several at once -----------------------------------------------------------------------------------------------------

def test_several_runs_on_one_database_at_once_all_succeed(home, server):
    started = [home.start(*arguments, url=server.url) for arguments in (["202404"], ["--force", "202404"], ["--force", *MONTH], [*MONTH])]
    for process in started:
        code, _, err = ended(process)
        assert code == 0, err
    assert home.stored() == whole(1, 3, 0.5)


@pytest.mark.parametrize("lock", ["IMMEDIATE", "EXCLUSIVE"])
@pytest.mark.parametrize("arguments", [["202404"], ["--force", "E10"], ["--csv", "all.csv", "E10"]], ids=" ".join)
def test_a_foreign_writer_is_waited_for(home, server, lock, arguments):
    """IMMEDIATE is a transaction under way, EXCLUSIVE its end, when nobody may even read."""
    assert home.run("E10", url=server.url).status == 0
    with contextlib.closing(sqlite3.connect(home.db, isolation_level=None, check_same_thread=False)) as other:
        other.execute(f"BEGIN {lock}")
        timer = threading.Timer(1, lambda: other.execute("COMMIT"))
        timer.start()
        ran = home.run(*arguments, url=server.url)
        timer.join()
    assert ran.status == 0, ran.err
    assert home.stored() == (whole(1, 3, 0.5) if arguments == ["202404"] else {"E10": whole(1, 3, 0.5)["E10"]})


def test_a_writer_that_does_not_let_go_is_a_sentence_and_nothing_is_lost(home, server, monkeypatch, capfd):
    assert home.run("E10", url=server.url).status == 0
    monkeypatch.chdir(home.folder)
    monkeypatch.setattr(program, "BUSY_SECONDS", 0.4)
    with contextlib.closing(sqlite3.connect(home.db, isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert program.main(["--url", server.url, "202404"]) == 1
        other.execute("ROLLBACK")
    err = capfd.readouterr().err
    (sentence,) = [line for line in err.splitlines() if " ERROR " in line]
    assert str(home.db) in sentence and "locked" in sentence
    assert home.stored() == {"E10": whole(1, 3, 0.5)["E10"]}
