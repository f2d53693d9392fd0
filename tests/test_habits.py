"""Other sites and other habits: prefixes, late arrivals, empty months, home folders, and what a terminal shows."""
import datetime
import os
import re

import pytest
from conftest import on_one_day
from dicom_files import instance, study
from endpoint import Answer, Proxy
from stand_in import StandIn
from test_command_line import STAMP, on_terminal

NAMES = ("E1", "e1", "MR-1", "mr-2", "MR 3", "71", "7/2", "17", "XMR-1")
BY_PREFIX = {"MR-": ["MR-1"], "7": ["7/2", "71"], "": sorted(NAMES), "E": ["E1"], "MR": ["MR 3", "MR-1"],
             "mr": ["mr-2"]}


def only(name):
    """The study that an accession of this file is in, whatever else is on the server."""
    return {"StudyDate": "20110503", "study": f"habits {name}"}


@pytest.fixture(scope="module")
def other_site(servers):
    server = servers()
    server.upload(*(instance(name, **only(name)) for name in NAMES),
                  instance("", **only("empty")), instance(" ", **only("blank")),
                  instance("", AccessionNumber=None, **only("absent")),
                  instance("E2011", StudyDate="20110715"))
    return server.settle()


# -- the beginning of accession numbers --------------------------------------------------------------------------------

@pytest.mark.parametrize("given", [["--prefix", "{}"], ["--prefix={}"], None])
@pytest.mark.parametrize("prefix", BY_PREFIX)
def test_a_date_finds_the_accessions_that_begin_with_the_prefix_and_none_without_accession(
        other_site, home, prefix, given):
    arguments = [argument.format(prefix) for argument in given or ()]
    ran = home.run(*arguments, "20110503", url=other_site.url, env={} if given else {"STUDY_INFO_PREFIX": prefix})
    assert (ran.status, ran.printed) == (0, BY_PREFIX[prefix])
    assert [row["accession"] for row in home.studies()] == BY_PREFIX[prefix]


@pytest.mark.parametrize("prefix", BY_PREFIX)
def test_an_accession_is_found_by_its_name_with_any_prefix(other_site, home, prefix):
    ran = home.run("--prefix", prefix, *BY_PREFIX[prefix], url=other_site.url)
    assert ran.status == 0 and [row["accession"] for row in home.studies()] == BY_PREFIX[prefix]


def test_the_prefix_of_the_command_line_comes_first(other_site, home):
    ran = home.run("--prefix", "MR-", "20110503", url=other_site.url, env={"STUDY_INFO_PREFIX": "7"})
    assert ran.printed == ["MR-1"]


@pytest.mark.parametrize("prefix, beginning", [
    ("E", "accessions that begin with a capital E count"), ("MR-", "accessions that begin with 'MR-' count"),
    ("", "studies with an accession number count")])
def test_a_date_without_studies_names_the_prefix_in_force_and_what_to_try(other_site, home, prefix, beginning):
    ran = home.run("--prefix", prefix, "20110601", url=other_site.url)
    assert ran.status == 0
    assert f"20110601: studies found: 0 (only {beginning}; for others try --prefix, another date or --url)" in ran.err


def test_help_says_the_prefix_in_force(home):
    ran = home.run("--help", env={"STUDY_INFO_PREFIX": "MR-"})
    assert "(default 'MR-')" in ran.out and "E12345" not in ran.out
    assert re.search(r"^  MR-12345 {18}an accession number$", ran.out, re.MULTILINE)
    assert "--force MR-12345 MR-12346\n" in ran.out


@pytest.mark.parametrize("prefix", ["E*", "?", "\\", " E", "\xc9", "E\t", "%s", "'"])
def test_a_prefix_with_characters_that_no_accession_token_has_is_a_usage_error(home, prefix):
    for arguments, env in ((["--prefix", prefix], {}), ([], {"STUDY_INFO_PREFIX": prefix})):
        ran = home.run(*arguments, "20110503", url="http://127.0.0.1:9", env=env)
        assert ran.status == 2 and "STUDY_INFO_PREFIX" in ran.err and ran.err.count("\n") == 1
    assert os.listdir(home.folder) == [] and home.run("--help", env={"STUDY_INFO_PREFIX": prefix}).status == 0


# -- late arrivals -----------------------------------------------------------------------------------------------------

def test_seven_days_store_what_came_late_and_nothing_twice(fresh, home):
    def days_before(today, days):
        return f"{today - datetime.timedelta(days):%Y%m%d}"

    server = fresh()

    def run(today):
        for day in (0, 1, 7, 8):
            server.upload(instance(f"EDAY{day}", StudyDate=days_before(today, day)))
        server.settle()
        first = home.run("7days", url=server.url)
        assert first.printed == ["EDAY7", "EDAY1"]
        server.upload(instance("ELATE", StudyDate=days_before(today, 3)))
        server.settle()
        late = home.run("7days", url=server.url)
        assert f"; 7days: {days_before(today, 7)}-{days_before(today, 1)}" in late.summary
        assert home.run("-q", "7days", url=server.url).err == ""
        return late
    assert on_one_day(run).printed == ["ELATE"]


def test_a_run_that_is_ended_still_names_the_dates_that_it_meant(home):
    with StandIn() as server:
        server.misbehave = lambda count, request: (lambda _: Answer(401, b"")) if b"20240101" in request.body else None
        ran = home.run("7days", "20240101", url=server.url)
    assert ran.status == 1 and re.search(r"; 7days: \d{8}-\d{8}$", ran.summary)


# -- months without studies --------------------------------------------------------------------------------------------

@pytest.mark.parametrize("token, lines", [
    ("201001-201103", ["2010-01 to 2011-03: no studies (only accessions …)"]),
    ("201001-201108", ["2010-01 to 2011-04: no studies", "20110501-20110531: studies found: 1",
                       "20110601-20110630: studies found: 0", "20110701-20110731: studies found: 1",
                       "20110801-20110831: studies found: 0"]),
    ("20100115-20110430", ["2010-01-15 to 2011-04-30: no studies (only accessions …)"]),
    ("201105-201201", ["20110501-20110531: studies found: 1", "20110601-20110630: studies found: 0",
                       "20110701-20110731: studies found: 1", "2011-08 to 2012-01: no studies"]),
    ("201106", ["20110601-20110630: studies found: 0 (only accessions …)"])])
def test_months_without_studies_are_one_line(other_site, home, token, lines):
    ran = home.run(token, url=other_site.url)
    said = [re.sub(r"\(only accessions .*\)$", "(only accessions …)", line[25:]) for line in ran.err.splitlines()]
    assert ran.status == 0 and [line for line in said if "studies" in line.split(": ")[1]] == lines


def test_a_month_that_cannot_be_listed_is_not_said_to_have_no_studies(other_site, home):
    with Proxy(other_site.url) as proxy:
        def misbehave(count, request):
            refused = request.kind.startswith("find") and b"20100201" in request.body
            return (lambda answer: answer._replace(status=500)) if refused else None
        proxy.misbehave = misbehave
        ran = home.run("201001-201004", url=proxy.url)
    assert ran.status == 1 and "ERROR 20100201-20100228: cannot be listed" in ran.err
    assert "20100101-20100131: studies found: 0" in ran.err and "2010-03 to 2010-04: no studies\n" in ran.err


# -- the home folder ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("arguments, env", [
    (["--db", "~/own/x.db", "--csv", "~/own/x.csv", "--netrc", "~/own/netrc"], {}),
    (["--db=~/own/x.db", "--csv=~/own/x.csv", "--netrc=~/own/netrc"], {}),
    (["--csv=~/own/x.csv"], {"STUDY_INFO_DB": "~/own/x.db", "NETRC": "~/own/netrc"})])
def test_a_tilde_is_the_home_folder(other_site, home, arguments, env):
    (home.folder / "own").mkdir()
    (home.folder / "own" / "netrc").write_text("default login jo password x\n")
    (home.folder / "own" / "netrc").chmod(0o644)
    ran = home.run(*arguments, "20110503", url=other_site.url, env=env)
    assert ran.status == 0 and f"{home.folder}/own/netrc is readable by others" in ran.err
    assert sorted(os.listdir(home.folder / "own")) == ["netrc", "x.csv", "x.db"] and os.listdir(home.folder) == ["own"]


@pytest.mark.parametrize("path, env", [("~nobody-of-this-name/x", {}), ("~nobody-of-this-name", {}),
                                       ("~/x", {"HOME": ""})])
@pytest.mark.parametrize("option", ["--db", "--csv", "--netrc", "STUDY_INFO_DB", "NETRC"])
def test_a_home_folder_that_is_not_known_is_a_usage_error(home, path, env, option):
    arguments, env = ([option, path], env) if option[0] == "-" else ([], env | {option: path})
    ran = home.run(*arguments, "E1", url="http://127.0.0.1:9", env=env)
    assert ran.status == 2 and f"'{path}': the home folder that ~ stands for is not known" in ran.err
    assert os.listdir(home.folder) == []


# -- on a terminal -----------------------------------------------------------------------------------------------------

def lines_of(shown: str) -> list[str]:
    """What stays on a terminal, line by line: what was written last after a return."""
    lines = (line.rstrip("\r").split("\r")[-1].rstrip() for line in shown.split("\n"))
    return [line for line in lines if line]


def test_a_terminal_shows_lines_without_date_and_level(other_site, home):
    (home.folder / "netrc").write_text("default login jo password x\n")
    (home.folder / "netrc").chmod(0o644)
    status, shown, _ = on_terminal(home, "--url", other_site.url, "20110715", "ENONE")
    assert status == 1 and not re.search(STAMP, shown) and "INFO" not in shown and "ERROR" not in shown
    warning, error, *summary = lines_of(shown)
    assert warning.startswith("netrc file") and error.startswith("ENONE: there is no such accession on")
    assert summary == ["studies: 1 stored, 0 already stored, 1 failed", "series: 1 stored, 0 skipped"]


def test_on_a_terminal_a_date_without_studies_says_what_to_try_but_not_when_quiet(other_site, home):
    _, shown, _ = on_terminal(home, "--url", other_site.url, "20110601")
    assert lines_of(shown)[0] == ("20110601: studies found: 0 (only accessions that begin with a capital E count; "
                                  "for others try --prefix, another date or --url)")
    assert on_terminal(home, "-q", "--url", other_site.url, "20110601")[1] == ""


def test_on_a_terminal_accessions_and_bar_stand_on_lines_of_their_own(other_site, home):
    _, shown, _ = on_terminal(home, "--prefix", "", "--url", other_site.url, "20110503", stdout_too=True)
    assert lines_of(shown)[:-2] == sorted(NAMES)


@pytest.mark.parametrize("number", [3, 19, 30])
def test_what_failed_is_said_once_more_where_it_scrolled_away(other_site, home, number):
    names = [f"ENONE{one}" for one in range(number)]
    _, shown, _ = on_terminal(home, "--url", other_site.url, *names, "20110715")
    *lines, studies, series = lines_of(shown)
    said = [re.match(r"(ENONE\d+): |(what failed:)|(…) and 10 more", line) for line in lines]
    told = [next(filter(None, match.groups())) if match else "" for match in said]
    again = {3: [], 19: [], 30: ["what failed:", *names[:20], "…"]}[number]
    assert told == names + again
    assert studies.endswith(f"{number} failed") and series.startswith("series: ")


def test_what_failed_is_said_once_more_where_accessions_scrolled_it_away(fresh, home):
    server = fresh()
    server.upload(*(file for one in range(30) for file in study(f"E{one:02}", series=1, instances=1)))
    server.settle()
    shown = on_terminal(home, "--url", server.url, "ENONE", "20240427", stdout_too=True)[1]
    assert [line[:12] for line in lines_of(shown)[-4:]] == [
        "what failed:", "ENONE: there", "studies: 30 ", "series: 30 s"]


def test_a_pipe_has_one_last_line_with_date_and_level(other_site, home):
    ran = home.run("20110715", "ENONE", url=other_site.url)
    assert re.fullmatch(STAMP + " WARNING studies: 1 stored, 0 already stored, 1 failed; series: 1 stored, 0 skipped",
                        ran.summary)
