"""The command line: options, streams, exit status, log, progress, CSV; run as a subprocess, or on a terminal."""
import contextlib
import csv
import datetime
import fcntl
import io
import os
import pathlib
import pty
import re
import shutil
import sqlite3
import struct
import subprocess
import sys
import termios
import threading

import pytest
from conftest import PROGRAM, on_one_day
from dicom_files import instance, study, uid
from endpoint import Proxy

import store_study_info as program

STAMP = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d"


@pytest.fixture(scope="module")
def archive(server):
    server.upload(*(file for day in range(1, 5) for name in "AB"
                    for file in study(f"EC{day}{name}", series=2, instances=1, StudyDate=f"2022060{day}",
                                      PatientID=f"00{day}{name}", PatientName="Secret^Name")),
                  instance("ECSKIP", series=1, StudyDate="20220610"),
                  instance("ECSKIP", series=2, sar=None, StudyDate="20220610"),
                  instance("ECNONE", series=1, ta=None, creator=None, Manufacturer="GE", StudyDate="20220611"),
                  instance('ECSV, "1"\n', study="csv", StudyDate="20220612", PatientID="00700",
                           SeriesDescription='a, "b" \u00e4', PatientAge=""),
                  instance("ECON\r\tX\x7f", study="control", StudyDate="20220613"))
    return server.settle()


# -- usage errors ------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, told", [
    (["202413"], "error: 202413: there is no month 13 (see store_study_info.py --help)"),
    (["20240230"], "error: 20240230: February 2024 has 29 days (see store_study_info.py --help)"),
    (["20240631"], "error: 20240631: June has 30 days"),
    (["E*"], "error: 'E*': wildcards are not allowed (see"),
    (["e123"], "error: e123: accession numbers begin with a capital E: E123? (see store_study_info.py --help)"),
    (["abc"], "error: abc: accession numbers begin with a capital E; days are written"),
    (["--prefix", "MR-", "E1"], "error: E1: accession numbers begin with 'MR-'; days are written"),
    (["E1?"], "'E1?': wildcards are"), (["E1\\E2"], "'E1\\E2': wildcards are"),
    (["E"], "error: E: an accession number goes on with letters"),
    ([""], "error: '': accession numbers begin"),
    (["20240402-20240401"], "error: 20240402-20240401: it ends before it starts"),
    (["29990101-"], "error: 29990101-: it ends before it starts: today is"),
    (["0days"], "error: 0days: days before today are written 7days"), (["99999days"], "with a number from 1 to 9999"),
    (["7Days"], "error: 7Days: "), (["-3days"], "required: TOKEN"), (["E1", "-3days"], "arguments: -3days"),
    (["--prefix", "E*", "E1"], "'E*' (or that of STUDY_INFO_PREFIX) cannot begin an accession number"),
    (["--prefix", " E", "E1"], "' E' (or that of"), (["--prefix", "\xc9", "E1"], "'\xc9' (or that of"),
    (["@nowhere"], "token file @nowhere cannot be read"), (["E1", "202404", "E2*"], "error: 'E2*': wildcards"),
    ([], "required: TOKEN"), (["--jobs", "0", "E1"], "'0' is not a number from 1 to 999"),
    (["--timeout", "nan", "E1"], "'nan' is not a number of seconds"),
    (["--nonsense", "E1"], "--nonsense"), (["-v", "-q", "E1"], "not allowed with"),
    (["--db", "", "E1"], "--db is empty"),
    (["--url", "ftp://x", "E1"], "address of --url or ORTHANC_URL is not the address of an Orthanc server"),
    (["--url", "micvna:8042", "E1"], "http:// is missing: did you mean http://micvna:8042?"),
    (["--url", "http://h:99999", "E1"], "ORTHANC_URL is not a URL"),
    (["--url", "http://h/?a=b", "E1"], "ORTHANC_URL is not the address of an Orthanc server"),
    (["--netrc", "nowhere", "E1"], "/nowhere cannot be read: No such file"),
    (["--csv", "nofolder/x.csv", "E1"], "--csv 'nofolder/x.csv': its folder does not exist"),
    (["--csv", "study_info.db", "E1"], "is a database, or a file that this run itself uses"),
    (["--csv", "-", "E1"], "--csv needs the name of a file"),
    (["--csv", "/dev/null", "E1"], "'/dev/null' is not a regular file"), (["--fo", "E1"], "--fo")])
def test_a_usage_error_is_one_line_and_nothing_is_contacted_or_written(home, arguments, told):
    with Proxy("http://127.0.0.1:9") as proxy:
        ran = home.run(*arguments, env={"ORTHANC_URL": proxy.url})
        assert (ran.status, ran.out, proxy.requests) == (2, "", [])
    assert told in ran.err and len(ran.err.splitlines()) == 1
    assert os.listdir(home.folder) == []


@pytest.mark.parametrize("url", ["http://jo:hunter2@127.0.0.1:9", "https://hunter2@h/orthanc",
                                 "http://jo:hunter2/x@h", "http://jo:hun%74er2@h"])
@pytest.mark.parametrize("arguments", [["--url", "{}", "E1"], ["--ulr={}", "--url", "x", "E1"], ["{}"], ["E1", "@{}"]])
def test_a_url_with_a_password_is_refused_and_never_echoed_wherever_it_stands(home, url, arguments):
    ran = home.run(*[argument.format(url) for argument in arguments])
    assert ran.status == 2 and ran.err.count("\n") == 1
    assert "hunter2" not in ran.err and "hun%74er2" not in ran.err


def test_a_malformed_netrc_is_a_usage_error_that_quotes_none_of_it(home):
    (home.folder / "netrc").write_text("machine h login jo passwort hunter2\n")
    ran = home.run("E1")
    assert ran.status == 2 and "netrc file netrc is malformed near line" in ran.err and "hunter2" not in ran.err


def test_options_may_stand_after_tokens(archive, home):
    assert home.run("EC1A", "--url", archive.url, "EC1B", "-q").status == 0
    assert len(home.studies()) == 2


# -- tokens on the command line ----------------------------------------------------------------------------------------

def test_tokens_from_a_file_and_from_stdin(archive, home):
    (home.folder / "list").write_bytes(b"\xef\xbb\xbf# wanted\r\n\r\nEC1A\r\n20220602  # a day\r\n")
    assert home.run("@list", "@-", url=archive.url, stdin=None, input="EC3B\n").printed == ["EC2A", "EC2B"]
    assert [row["accession"] for row in home.studies()] == ["EC1A", "EC2A", "EC2B", "EC3B"]


def test_an_empty_token_file_is_nothing_to_do(home):
    (home.folder / "list").write_text("# none today\n")
    assert home.run("@list", url="http://127.0.0.1:9").status == 0


def test_ranges_name_all_days_ends_included(archive, home):
    assert home.run("20220602-20220603", url=archive.url).printed == ["EC2A", "EC2B", "EC3A", "EC3B"]
    assert home.run("202205-202206", url=archive.url).printed[:4] == ["EC1A", "EC1B", "EC4A", "EC4B"]


def test_yesterday_is_the_day_before_today_in_local_time(server, home):
    def run(today):
        server.upload(instance("EYESTERDAY", StudyDate=f"{today - datetime.timedelta(days=1):%Y%m%d}"))
        server.settle()
        return home.run("yesterday", url=server.url)
    assert "EYESTERDAY" in on_one_day(run).printed


def test_the_environment_names_server_and_database_and_options_come_first(archive, home):
    env = {"ORTHANC_URL": archive.url, "STUDY_INFO_DB": str(home.folder / "other.db")}
    assert home.run("EC1A", env=env).status == 0
    assert not home.db.exists() and (home.folder / "other.db").exists()
    assert home.run("--db", home.db, "EC1A", env=env).status == 0
    assert home.db.exists()
    assert home.run("EC2A", url="http://127.0.0.1:9", env=env).status == 1


# -- streams, log, summary ---------------------------------------------------------------------------------------------

def test_a_log_line_has_time_level_and_accession(archive, home):
    ran = home.run("20220601", url=archive.url)
    assert re.fullmatch(STAMP + r" INFO 20220601: studies found: 2", ran.err.splitlines()[0])
    assert re.fullmatch(STAMP + r" INFO EC1A: 2 series stored, 0 skipped", ran.err.splitlines()[1])


def test_the_last_line_sums_up(archive, home):
    home.run("EC1A", url=archive.url)
    ran = home.run("202206", "ENOWHERE", url=archive.url)
    assert ran.status == 1
    assert re.fullmatch(STAMP + r" WARNING studies: 11 stored, 1 already stored, 1 failed; "
                        r"series: 17 stored, 2 skipped \(SAR absent: 1, duration absent: 1\)", ran.summary)


def test_quiet_says_nothing_at_all_when_all_is_well_and_else_what_went_wrong(archive, home):
    ran = home.run("-q", "20220601", url=archive.url)
    assert (ran.status, ran.err, ran.out) == (0, "", "")
    assert len(home.studies()) == 2
    ran = home.run("-q", "20220602", "ENOWHERE", url=archive.url)
    assert ran.status == 1 and "ERROR ENOWHERE: there is no such accession" in ran.err and "1 failed" in ran.summary
    assert "INFO" not in ran.err


def test_patient_names_and_ids_are_in_no_log_line(archive, home):
    ran = home.run("-v", "202206", "202206", url=archive.url)
    assert ran.status == 0 and len(ran.err.splitlines()) > 10
    assert not re.search(r"Secret|Name|00\d[AB]|00700", ran.err)


def test_control_characters_of_an_accession_reach_neither_stdout_nor_log(archive, home):
    ran = home.run("20220612", "20220613", url=archive.url)
    assert ran.status == 0 and ran.out == 'ECSV, "1"\nECON\ufffd\ufffdX\ufffd\n'
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", ran.out + ran.err)


def test_an_encoding_that_lacks_a_character_does_not_stop_the_run(server, home):
    server.upload(instance("E\u00dcBER\u65e5", StudyDate="20220701"), instance("EV", StudyDate="20220701"))
    server.settle()
    ran = home.run("20220701", url=server.url, env={"PYTHONIOENCODING": "ascii", "LC_ALL": "C"})
    assert ran.status == 0 and ran.printed == ["EV", "E\\xdcBER\\u65e5"]
    assert [row["accession"] for row in home.studies()] == ["EV", "E\u00dcBER\u65e5"]


@pytest.mark.parametrize("tokens, status", [(["202206"], 0), (["202206", "ENOWHERE"], 1)])
def test_a_reader_of_stdout_that_goes_away_ends_the_printing_not_the_storing(archive, home, tokens, status):
    process = home.start(*tokens, url=archive.url)
    process.stdout.close()
    err = process.stderr.read()
    assert process.wait(60) == status
    assert "Traceback" not in err and "Broken" not in err and err.count("ERROR") == status
    assert len(home.studies()) == 12 and "studies: 12 stored" in err.splitlines()[-1]


def test_a_full_stdout_is_one_sentence_and_the_rest_is_stored(archive, home):
    with open("/dev/full", "w") as full:
        ran = home.run("202206", url=archive.url, capture_output=False, stdout=full, stderr=subprocess.PIPE)
    assert ran.status == 1 and ran.err.count("standard output cannot be written: No space left") == 1
    assert len(home.studies()) == 12 and "WARNING studies: 12 stored" in ran.summary


def test_closed_streams_do_not_stop_the_run(archive, home):
    command = " ".join(map(repr, home.command("20220601", url=archive.url)))
    subprocess.run(["sh", "-c", f"exec {command} <&- >&- 2>&-"], cwd=home.folder, env=home.environment(), check=True)
    assert len(home.studies()) == 2


# -- on a terminal -----------------------------------------------------------------------------------------------------

def on_terminal(home, *arguments, stdout_too=False):
    """Run with stderr (and stdout) on a pseudo-terminal; what was written to the terminal, and to stdout."""
    leader, follower = pty.openpty()
    fcntl.ioctl(follower, termios.TIOCSWINSZ, struct.pack("HHHH", 24, 80, 0, 0))
    process = home.start(*arguments, env={"TERM": "xterm", "NO_COLOR": "1"}, text=False,
                         stdout=follower if stdout_too else subprocess.PIPE, stderr=follower)
    os.close(follower)
    shown = b""
    watch = threading.Timer(300, process.kill)
    watch.start()
    with contextlib.suppress(OSError):    # the other end is closed: the process has ended
        while data := os.read(leader, 65536):
            shown += data
    out = process.stdout.read().decode() if process.stdout else ""
    watch.cancel()
    os.close(leader)
    return process.wait(), shown.decode(), out


def test_a_terminal_shows_a_bar_with_count_and_rate_and_stdout_only_accessions(archive, home):
    status, shown, out = on_terminal(home, "--url", archive.url, "20220601-20220604")
    assert status == 0
    assert out.splitlines() == [f"EC{day}{name}" for day in range(1, 5) for name in "AB"]
    assert "/8 [" in shown and "study/s" in shown
    lines = [line.split("\r")[-1] for line in shown.replace("\r\n", "\n").rstrip().split("\n")]
    assert lines[-2:] == ["studies: 8 stored, 0 already stored, 0 failed", "series: 16 stored, 0 skipped"]
    assert "\x1b[3" not in shown and "\x1b[9" not in shown      # no colours


def test_the_bar_never_shares_a_line_with_an_accession(archive, home):
    _, shown, _ = on_terminal(home, "--url", archive.url, "20220601", stdout_too=True)
    lines = [line.split("\r")[-1] for line in shown.replace("\r\n", "\n").split("\n")]
    assert "EC1A" in lines and "EC1B" in lines


def test_quiet_shows_no_bar(archive, home):
    assert on_terminal(home, "-q", "--url", archive.url, "20220601")[1] == ""


# -- CSV ---------------------------------------------------------------------------------------------------------------

COLUMNS = ["accession", "patient_id", "age", "height", "weight", "sex", "ethnic_group", "body_part",
           "manufacturer_model", "study_date", "study_description", "series_uid", "sar", "duration", "series_number",
           "series_description", "pulse_sequence_name", "sequence_name"]


def test_csv_has_a_row_a_series_of_this_run_s_accessions_stored_before_or_now(archive, home):
    home.run("EC1A", "EC4A", url=archive.url)
    assert home.run("--csv", "out.csv", "20220601", "20220611", url=archive.url).status == 0
    header, *rows = csv.reader(io.StringIO((home.folder / "out.csv").read_text(encoding="utf-8")))
    assert header == COLUMNS
    assert [(row[0], row[14]) for row in rows] == [
        ("EC1A", "1"), ("EC1A", "2"), ("EC1B", "1"), ("EC1B", "2"), ("ECNONE", "")]
    assert rows[0] == ["EC1A", "001A", "40", "1.75", "70.5", "F", "W", "HEAD", "Prisma", "20220601", "Head",
                       uid("EC1A", 1), "0.5", "60", "1", "series 1", "tfl", "*tfl3d1"]
    assert rows[4][11:] == [""] * 7


def test_csv_keeps_text_as_it_is(archive, home):
    home.run("--csv", "out.csv", "20220612", url=archive.url)
    (row,) = csv.DictReader(io.StringIO((home.folder / "out.csv").read_bytes().decode("utf-8"), newline=""))
    assert (row["patient_id"], row["series_description"], row["age"]) == ("00700", 'a, "b" \u00e4', "")


@pytest.mark.parametrize("arguments, status, written", [
    (["EC1A"], 0, True), (["EC1A", "ENOWHERE"], 1, True), (["EC1A", "E*"], 2, False)])
def test_csv_is_written_at_exit_0_and_1_but_not_2(archive, home, arguments, status, written):
    (home.folder / "out.csv").write_text("old\n")
    assert home.run("--csv", "out.csv", *arguments, url=archive.url).status == status
    assert ((home.folder / "out.csv").read_text() != "old\n") is written
    assert sorted(os.listdir(home.folder)) == sorted(["out.csv"] + ["study_info.db"] * written)


@pytest.mark.parametrize("tokens, rows", [(["EC1A", "ENEW"], 2), (["202204"], 0)])
def test_csv_is_written_at_exit_1_also_where_the_server_cannot_be_asked(archive, home, tokens, rows):
    """An old file beside exit status 1 would pass for this run's."""
    home.run("EC1A", url=archive.url)
    (home.folder / "out.csv").write_text("old\n")
    ran = home.run("--csv", "out.csv", *tokens, url="http://127.0.0.1:9")
    assert ran.status == 1 and "cannot be reached" in ran.err
    header, *lines = (home.folder / "out.csv").read_text().splitlines()
    assert header.startswith("accession,patient_id,")
    assert [line.split(",")[0] for line in lines] == ["EC1A"] * rows


def test_csv_without_any_database_is_its_header(home):
    assert home.run("--csv", "out.csv", "E1", url="http://127.0.0.1:9").status == 1
    assert len((home.folder / "out.csv").read_text().splitlines()) == 1 and not home.db.exists()


@pytest.fixture
def full_disk(home, monkeypatch):
    """For main() in this process: the CSV file cannot be written."""
    def full(*_):
        raise program.RunError("CSV file out.csv cannot be written")
    monkeypatch.chdir(home.folder)
    monkeypatch.setattr(program, "write_csv", full)


def test_trouble_with_the_csv_file_does_not_hide_what_ended_the_run(full_disk, monkeypatch, capfd):
    monkeypatch.setattr(program, "WAITS", (0,))
    assert program.main(["--url", "http://127.0.0.1:9", "--csv", "out.csv", "E1"]) == 1
    first, second = capfd.readouterr().err.splitlines()
    assert "out.csv cannot be written" in first and "cannot be reached" in second


def test_an_unreadable_certificate_file_is_a_usage_error_before_anything_is_written(home):
    (home.folder / "out.csv").write_text("old\n")
    home.db.touch()
    ran = home.run("--csv", "out.csv", "E1", url="https://127.0.0.1:9", env={"SSL_CERT_FILE": "no-such-file"})
    assert ran.status == 2 and "no-such-file" in ran.err
    assert (home.folder / "out.csv").read_text() == "old\n" and home.db.read_bytes() == b""


@pytest.mark.parametrize("side", ["", "-journal", "-wal", "-shm"])
def test_the_csv_file_is_none_of_the_database_s(home, side):
    assert home.run("--csv", f"study_info.db{side}", "E1", url="http://127.0.0.1:9").status == 2
    assert os.listdir(home.folder) == []


def test_a_locked_database_is_not_waited_for_again_for_the_csv_file(archive, home, monkeypatch, capfd):
    home.run("EC1A", url=archive.url)
    (home.folder / "out.csv").write_text("old\n")
    monkeypatch.chdir(home.folder)
    monkeypatch.setattr(program, "BUSY_SECONDS", 0.4)
    with contextlib.closing(sqlite3.connect(home.db, isolation_level=None)) as other:
        def while_locked(*arguments, store_study=program.store_study):
            other.execute("BEGIN EXCLUSIVE")
            return store_study(*arguments)
        monkeypatch.setattr(program, "store_study", while_locked)
        assert program.main(["--url", archive.url, "--csv", "out.csv", "EC1B"]) == 1
    assert capfd.readouterr().err.count("has held it") == 1
    assert (home.folder / "out.csv").read_text() == "old\n"


def test_the_summary_ends_a_run_that_the_csv_file_ended(archive, home, full_disk, capfd):
    home.run("EC1A", url=archive.url)
    assert program.main(["--url", archive.url, "--csv", "out.csv", "EC1A"]) == 1
    first, second = capfd.readouterr().err.splitlines()
    assert "out.csv cannot be written" in first and "0 stored, 1 already stored" in second


def test_help_that_cannot_be_written_is_no_success(home):
    environment = home.environment()
    environment.pop("PYTHONUNBUFFERED", None)    # with it argparse hides the fault
    with open("/dev/full", "w") as full:
        ended = subprocess.run([sys.executable, PROGRAM, "--version"], stdout=full, stderr=subprocess.PIPE, text=True,
                               env=environment, check=False)
    assert ended.returncode == 1 and "Traceback" not in ended.stderr


# -- databases that are none -------------------------------------------------------------------------------------------

def foreign_table(path):
    with sqlite3.connect(path) as conn:
        conn.execute("CREATE TABLE studies (accession TEXT PRIMARY KEY, age INTEGER)")
    conn.close()


@pytest.mark.parametrize("make, told", [
    (lambda path: path.write_text("accession,sar\nE1,0.5\n"), "is not an SQLite file and is left as it is"),
    (lambda path: path.write_bytes(b"x"), "is not an SQLite file and is left as it is"),
    (lambda path: path.mkdir(), "is not an SQLite file and is left as it is"),
    (foreign_table, "the table studies lacks patient_id, height, weight, sex, ethnic_group, body_part, "
                    "manufacturer_model, study_date, study_description; move the file away")])
def test_a_database_that_is_none_is_one_sentence_exit_1_and_left_as_it_was(home, make, told):
    make(home.db)
    before = home.db.read_bytes() if home.db.is_file() else None
    with Proxy("http://127.0.0.1:9") as proxy:
        ran = home.run("E1", url=proxy.url)
        assert proxy.requests == []
    assert ran.status == 1 and told in ran.err and len(ran.err.splitlines()) == 1
    assert (home.db.read_bytes() if home.db.is_file() else None) == before


def test_a_folder_that_does_not_exist_is_named(home):
    ran = home.run("--db", "no/such/x.db", "E1", url="http://127.0.0.1:9")
    assert ran.status == 1 and f"there is no folder {home.folder / 'no/such'}" in ran.err


def test_an_empty_file_is_a_new_database(archive, home):
    home.db.touch()
    assert home.run("EC1A", url=archive.url).status == 0
    assert len(home.series()) == 2


# -- start-up ----------------------------------------------------------------------------------------------------------

def test_stored_accessions_cost_nothing_at_all(archive, home):
    home.run("EC1A", url=archive.url)
    ran = home.run("EC1A", url="http://127.0.0.1:9")
    assert ran.status == 0 and "0 stored, 1 already stored" in ran.summary


WITHOUT_A_PACKAGE = """
import importlib.util, sys
package, folder = sys.argv[1:]
find = importlib.util.find_spec
importlib.util.find_spec = lambda name, *rest: None if name == package else find(name, *rest)
sys.path.insert(0, folder)
import store_study_info
sys.exit(store_study_info.main(["E1"]))
"""


@pytest.mark.parametrize("package", ["pyorthanc", "pydicom"])
def test_a_missing_package_is_a_sentence_that_says_how_to_get_it(home, package):
    ended = subprocess.run([sys.executable, "-c", WITHOUT_A_PACKAGE, package, PROGRAM.parent], cwd=home.folder,
                           env=home.environment(), capture_output=True, text=True, check=False)
    assert ended.returncode == 1 and os.listdir(home.folder) == []
    assert f"missing Python packages: {package};" in ended.stderr and "Traceback" not in ended.stderr
    assert "pip install -r requirements.txt" in ended.stderr and "uv run" in ended.stderr


def test_version(home):
    assert re.fullmatch(r"store_study_info.py \d+\.\d+\.\d+\n", home.run("--version").out)


def other_pythons(minors: range) -> dict[str, str]:
    """{3.N: path} of the interpreters of this machine besides the tests' own: on PATH, or installed beside that."""
    found: dict[str, str] = {}
    for minor in minors:
        name = f"python3.{minor}"
        beside = sorted(pathlib.Path(sys.base_prefix).parent.glob(f"*3.{minor}*/bin/{name}"))
        for path in filter(None, (shutil.which(name), *map(str, beside))):
            if minor != sys.version_info.minor and subprocess.run([path, "-c", ""], check=False).returncode == 0:
                found.setdefault(f"3.{minor}", path)
    return found


OTHERS = other_pythons(range(10, 20))


def shows_its_help(python, home) -> None:
    ended = subprocess.run([python, PROGRAM, "--help"], capture_output=True, text=True,
                           env=home.environment(), check=False)
    assert (ended.returncode, ended.stderr) == (0, "") and "TOKEN" in ended.stdout


def test_help_needs_no_package_and_starts_on_this_python(home):
    shows_its_help(sys.executable, home)


@pytest.mark.parametrize("python", OTHERS or [None])
def test_it_starts_on_the_other_pythons_of_this_machine(home, python):
    """Nothing is installed there: at least the module compiles and its help shows."""
    if python is None:
        pytest.skip("this machine has no other Python from 3.10")
    shows_its_help(OTHERS[python], home)


def test_a_python_that_is_too_old_is_told_so(home):
    for path in other_pythons(range(9, 10)).values():
        ended = subprocess.run([path, PROGRAM, "--netrc", os.devnull, "E1"], capture_output=True, text=True,
                               cwd=home.folder, env=home.environment(), check=False)
        assert ended.returncode == 1 and "Python 3.10 or newer is needed, this is 3.9." in ended.stderr
        assert len(ended.stderr.splitlines()) == 1 and os.listdir(home.folder) == []
        return
    pytest.skip("this machine has no Python 3.9")
