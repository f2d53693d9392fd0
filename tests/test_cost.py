"""What a run costs the server: requests, their order and their bytes, counted by a proxy. Never seconds."""
import contextlib
import itertools
import re
import subprocess
import sys
import threading
import urllib.parse
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple

import pytest
from conftest import PROGRAM, Home
from dicom_files import ENHANCED_MR, functional_group, instance, pixels, study
from endpoint import FAULTS, Proxy, Request, at
from stand_in import StandIn
from pydicom.uid import ImplicitVRLittleEndian

import store_study_info

IMAGE = 128    # rows and columns of an image
IMAGE_BYTES = IMAGE * IMAGE * 2
FILES = 8      # in a series that lacks something: more than a second look may read
PLACES = (2, 6, FILES)    # of the one image that has SAR


def image(ds):
    pixels(ds, IMAGE)


def enhanced(ds):
    """An enhanced MR object that states its SAR for each frame, the one of the whole body after the four others."""
    image(ds)
    ds.AcquisitionDuration = 60.0
    kinds = ("IEC_HEAD", "IEC_PARTIAL_BODY", "IEC_LOCAL", "SMR_B1RMS", "IEC_WHOLE_BODY")
    ds.PerFrameFunctionalGroupsSequence = [functional_group(*((kind, 0.25) for kind in kinds))]


# ------------------------------------------------------------------------------------------------------------------
# What was asked
# ------------------------------------------------------------------------------------------------------------------

def purpose(request: Request) -> str:
    """What a request is for, in the words of the rules."""
    if not request.kind.startswith("find "):
        return {"series": "series list"}.get(request.kind, request.kind)
    query = request.json["Query"]
    if not query and request.kind != "find instance":
        return "limit probe"
    if request.kind == "find study":
        if "StudyDate" in query:
            return "closing page" if request.json.get("Since") else "token query"
        return "accession query"
    return request.kind


def fetched_by(server, request: Request) -> list[str]:
    """The accessions whose series a request is the first one for, whatever the server."""
    if request.kind != "series":
        return request.accessions if request.kind == "find series" else []
    everything = {"Level": "Study", "Query": {}, "Expand": True}
    return [study["MainDicomTags"]["AccessionNumber"]
            for study in server.client.post("/tools/find", json=everything).json() if study["ID"] in request.path]


class Watch(Proxy):
    """A proxy that notes also connections, requests under way at the same time, and the size of each answer.

    before(request) and after(request) are called around each request to the real server, and may wait.
    """

    def __init__(self, target: str):
        super().__init__(target)
        self.connections = self.now = self.most = 0
        self.sizes: list[int] = []
        self.before = self.after = lambda request: None

    def __enter__(self):
        super().__enter__()
        accept = self.listener.process_request

        def counted(*arguments):
            self.connections += 1
            accept(*arguments)
        setattr(self.listener, "process_request", counted)  # noqa: B010 - a method replaced on one object
        return self

    def answer(self, request):
        with self.lock:
            self.now += 1
            self.most = max(self.most, self.now)
        try:
            self.before(request)
            answer = super().answer(request)
            self.after(request)
            with self.lock:
                self.sizes.append(len(answer.body))
            return answer
        finally:
            with self.lock:
                self.now -= 1

    @property
    def cost(self) -> Counter:
        return Counter(purpose(request) for request in self.requests)


@pytest.fixture
def watch(full):
    with Watch(full.url) as running:
        yield running


# ------------------------------------------------------------------------------------------------------------------
# What is on the server
# ------------------------------------------------------------------------------------------------------------------

def day(date: str, studies: int, series: int) -> list[bytes]:
    return [data for index in range(studies) for data in study(f"E{date}{index:02d}", series, 1, StudyDate=date)]


# Series that lack something, each alone in its study, by what dicom_files.instance makes them of.
LACKING: dict[str, dict] = {
    "no SAR in any image": {"sar": None},
    "an empty SAR in every image": {"sar": ""},
    "no duration in any image": {"ta": None},
    "an empty duration in every image": {"ta": ""},
    "neither in any image": {"sar": None, "ta": None},
    "neither, and no private creator": {"sar": None, "ta": None, "creator": None},
    "no SAR, implicit VR": {"sar": None, "syntax": ImplicitVRLittleEndian},
    "no duration, implicit VR": {"ta": None, "syntax": ImplicitVRLittleEndian},
    "neither, implicit VR": {"sar": None, "ta": None, "syntax": ImplicitVRLittleEndian},
    "no manufacturer": {"sar": None, "Manufacturer": None},
}
EXPLAINED: dict[str, dict] = {
    "another vendor's creator": {"sar": None, "creator": "GEMS_FUNCTOOL_01", "ta": "-42"},
    "another vendor's creator in another block": {
        "sar": None,
        "ta": None,
        "creator": "GEMS_FUNCTOOL_01",
        "block": 0x11,
    },
    "another manufacturer": {"ta": None, "creator": None, "Manufacturer": "GE MEDICAL SYSTEMS"},
    "another manufacturer, no SAR either": {
        "ta": None,
        "sar": None,
        "creator": None,
        "Manufacturer": "Philips Healthcare",
    },
    "another manufacturer, implicit VR": {
        "ta": None,
        "creator": None,
        "Manufacturer": "UIH",
        "syntax": ImplicitVRLittleEndian,
    },
}
EXPLAINED |= {
    f"an enhanced object, class {number}": {
        "sar": None,
        "ta": None,
        "creator": None,
        "sop_class": f"1.2.840.10008.5.1.4.1.1.4.{number}",
    }
    for number in range(1, 5)
}
ODD: dict[str, dict] = {**LACKING, **EXPLAINED, "a plain series": {}}


def odd_accession(name: str) -> str:
    return f"EODD{list(ODD).index(name):02d}"


@pytest.fixture(scope="module")
def full(servers):
    """A server of this file's own, so that its dates hold nothing else."""
    server = servers(Name="COST")
    plain = [
        *day("20310110", 10, 10),
        *day("20310220", 8, 2),
        *day("20310331", 1, 1),
        *(data for index in range(30) for data in study(f"EM{index:02d}", 10, 1, StudyDate=f"203104{1 + index:02d}")),
        *study("EFEW", 2, 1, StudyDate="20310601"),
        *study("EMANY", 2, 20, StudyDate="20310602"),
    ]
    with ThreadPoolExecutor(4) as pool:
        list(pool.map(server.upload, plain))
    for name, elements in ODD.items():
        server.upload(
            *(
                instance(odd_accession(name), number=number, StudyDate="20310701", change=image, **elements)
                for number in range(1, FILES + 1)
            )
        )
    for place in PLACES:
        server.upload(
            *(
                instance(
                    f"EONLY{place}",
                    number=number,
                    sar="0.5" if number == place else None,
                    StudyDate="20310702",
                    change=image,
                )
                for number in range(1, FILES + 1)
            )
        )
    server.upload(
        instance(
            "EENHANCED", sop_class=ENHANCED_MR, sar=None, ta=None, creator=None, StudyDate="20310703", change=enhanced
        )
    )
    return server.settle(60)


@pytest.fixture
def extended(full):
    if not full.extended:
        pytest.skip(
            f"Orthanc {full.version} has no extended find (1.12.5 and newer): "
            "a study costs two requests and one a series there"
        )
    return full


def expected(full, found: int, stored: int = 0, series: int = 0) -> dict:
    """What one date token may cost that finds so many studies, some of them to be stored, with so many series.

    With 4 jobs: those of up to 20 accessions are one find, and no job is left without work.
    """
    cost = {"system": 1, "token query": 1}
    if full.extended:
        cost |= {"closing page": 1 if found else 0}
    else:
        cost |= {"statistics": 1, "limit probe": 1}
    if full.answers_tags:
        cost |= {"find series": min(stored, 4)}
    else:
        cost |= {"accession query": 1 if stored else 0, "series list": stored, "tags": series}
    return {name: count for name, count in cost.items() if count}


# ------------------------------------------------------------------------------------------------------------------
# A token, a study, a skipped study
# ------------------------------------------------------------------------------------------------------------------

def test_a_day_costs_one_query_and_what_is_to_be_stored_what_its_server_needs(full, watch, home):
    assert home.run("20310220", url=watch.url).status == 0
    assert watch.cost == expected(full, 8, 8, 16)
    assert len(home.series()) == 16


def test_a_month_costs_one_query_too(full, watch, home):
    assert home.run("203102", url=watch.url).status == 0
    assert watch.cost == expected(full, 8, 8, 16)


def test_a_date_without_studies_costs_one_query_and_nothing_more(full, watch, home):
    assert home.run("20300101", url=watch.url).status == 0
    assert watch.cost == {"system": 1, "token query": 1}


def test_skipped_studies_cost_nothing_further(full, watch, home):
    home.run("20310220", url=full.url)
    assert home.run("20310220", url=watch.url).status == 0
    assert watch.cost == expected(full, 8)


def test_force_costs_what_the_first_time_did(full, watch, home):
    home.run("20310220", url=full.url)
    assert home.run("--force", "20310220", url=watch.url).status == 0
    assert watch.cost == expected(full, 8, 8, 16)


def test_a_named_accession_costs_one_study_query_and_the_fetch(full, watch, home):
    assert home.run("EM03", url=watch.url).status == 0
    assert watch.cost == ({"system": 1, "accession query": 1, "find series": 1} if full.answers_tags else
                          {"system": 1, "accession query": 1, "series list": 1, "tags": 10})


def test_named_accessions_are_looked_up_50_at_a_time(full, watch, home):
    names = [f"EM{index:02d}" for index in range(30)] + [f"E20310110{index:02d}" for index in range(10)] \
        + [f"E20310220{index:02d}" for index in range(8)] + ["EFEW", "EMANY", "E2031033100"]
    assert home.run("--jobs", 4, *names, url=watch.url).status == 0
    asked = [request.accessions for request in watch.requests if purpose(request) == "accession query"]
    assert sorted(map(len, asked)) == [1, 50] and sorted(itertools.chain(*asked)) == sorted(names)
    if full.answers_tags:
        together = [request.accessions for request in watch.requests if purpose(request) == "find series"]
        assert max(map(len, together)) <= 20 and len(together) <= 6


def test_a_named_accession_that_is_stored_costs_its_one_query_at_most(full, watch, home):
    home.run("EM03", url=full.url)
    assert home.run("EM03", url=watch.url).status == 0
    assert watch.cost <= Counter({"system": 1, "accession query": 1})


def test_an_accession_that_several_tokens_name_is_fetched_once(extended, watch, home):
    assert home.run("20310331", "E2031033100", "203103", "20310330-20310331", url=watch.url).status == 0
    assert watch.cost["find series"] == 1


def test_a_run_asks_for_the_system_once_and_probes_an_old_server_only_where_more_came_than_before(full, watch, home):
    """Eight studies of a day, then eleven that are looked up by their names."""
    assert home.run("20310220", "20310331", "203103", "EM03", "EM04", url=watch.url).status == 0
    assert watch.cost["system"] == 1
    probes = 0 if full.extended else 1 if full.answers_tags else 2
    assert [watch.cost["statistics"], watch.cost["limit probe"]] == [probes, probes]


def test_studies_are_fetched_together_too_where_a_server_without_extended_find_knows_requested_tags(
        extended, watch, home):
    """Orthanc 1.11 to 1.12.4: as if /system named no capabilities."""
    def without(answer):
        return answer._replace(body=answer.body.replace(b'"HasExtendedFind" : true', b'"HasExtendedFind" : false'))
    watch.misbehave = at("system", without)
    assert home.run("20310220", url=watch.url).status == 0
    assert watch.cost == {"system": 1, "token query": 1, "statistics": 1, "limit probe": 1, "find series": 4}


# ------------------------------------------------------------------------------------------------------------------
# A day, a month, a range
# ------------------------------------------------------------------------------------------------------------------

def test_a_day_of_ten_studies_of_ten_series_takes_14_requests_at_most_and_3_when_run_again(extended, watch, home):
    assert home.run("20310110", url=watch.url).status == 0
    assert len(home.series()) == 100 and len(watch.requests) <= 14
    watch.forget()
    assert home.run("20310110", url=watch.url).status == 0
    assert len(watch.requests) <= 3


def test_a_month_of_30_studies_of_10_series_takes_8_requests_and_335_on_older_servers_and_4_when_run_again(
        full, watch, home):
    assert home.run("203104", url=watch.url).status == 0
    asked = sum(len(request.body) for request in watch.requests)
    assert len(home.series()) == 300 and len(watch.requests) <= (8 if full.answers_tags else 335)
    assert watch.sent + asked <= 500_000 or not full.answers_tags
    watch.forget()
    assert home.run("203104", url=watch.url).status == 0
    assert len(watch.requests) <= (3 if full.extended else 4)


@pytest.mark.parametrize("token, spans", [
    ("20310110-20310420", ["20310110-20310131", "20310201-20310228", "20310301-20310331", "20310401-20310420"]),
    ("203101-203103", ["20310101-20310131", "20310201-20310228", "20310301-20310331"]),
    ("20310220-20310331", ["20310220-20310228", "20310301-20310331"]),
])
def test_a_long_range_is_asked_month_by_month_in_order(full, watch, home, token, spans):
    assert home.run(token, url=watch.url).status == 0
    asked = [request.json["Query"]["StudyDate"] for request in watch.requests if purpose(request) == "token query"]
    assert asked == spans


# ------------------------------------------------------------------------------------------------------------------
# Series that lack something
# ------------------------------------------------------------------------------------------------------------------

class Odd(NamedTuple):
    more: int       # requests beyond those of a plain series
    stored: int


@pytest.fixture(scope="module")
def odd(full, warm, tmp_path_factory) -> dict[str, Odd]:
    """What each of the odd studies costs in a run of its own."""
    home = Home(tmp_path_factory.mktemp("odd"), warm)
    costs = {}
    for name in [*map(odd_accession, ODD), *(f"EONLY{place}" for place in PLACES)]:
        with Watch(full.url) as watch:
            home.run(name, url=watch.url)
        costs[name] = len(watch.requests)
    plain = costs[odd_accession("a plain series")]
    return {name: Odd(cost - plain, len(home.series(name))) for name, cost in costs.items()}


@pytest.mark.parametrize("name", LACKING)
def test_a_series_that_lacks_something_costs_6_more_at_most(odd, name):
    more, stored = odd[odd_accession(name)]
    assert more <= 6 and stored == 0


@pytest.mark.parametrize("place", PLACES)
def test_the_second_look_costs_6_more_at_most_wherever_the_value_is(odd, place):
    more, stored = odd[f"EONLY{place}"]
    assert 0 < more <= 6 and stored == (1 if place <= 6 else 0)


@pytest.mark.parametrize("name", EXPLAINED)
def test_a_series_that_another_vendor_explains_costs_nothing_more(odd, name):
    assert odd[odd_accession(name)] == (0, 0)


def test_the_sar_of_an_enhanced_object_costs_6_more_at_most_with_fallback(full, watch, home):
    home.run("EENHANCED", url=watch.url)
    plain = len(watch.requests)
    watch.forget()
    home.run("--fallback", "--force", "EENHANCED", url=watch.url)
    assert plain < len(watch.requests) <= plain + 6


# ------------------------------------------------------------------------------------------------------------------
# Bytes
# ------------------------------------------------------------------------------------------------------------------

WHOLE_FILES = re.compile(
    r"/(file|archive|media|preview|image\w*|rendered|raw|frames|matlab|numpy|pdf|instances-tags|attachments|dicom-\w+)\b|7fe0"
)


@pytest.mark.parametrize(
    "options", [(), ("--fallback",), ("--force",)], ids=lambda options: " ".join(options) or "plain"
)
def test_pixel_data_is_never_downloaded_whatever_is_missing_or_odd(full, watch, home, options):
    """Each answer is smaller than one image, and none of the calls is one that carries images."""
    home.run(*options, "203107", "20310331", url=watch.url)
    assert len(home.studies()) == len(ODD) + 3 + 1 + 1
    assert [
        request.path for request in watch.requests if WHOLE_FILES.search(urllib.parse.urlsplit(request.path).path)
    ] == []
    assert watch.sizes and max(watch.sizes) < IMAGE_BYTES


def test_answers_do_not_grow_with_the_number_of_instances(extended, watch, home):
    sizes = []
    for accession in ("EFEW", "EMANY"):    # two series of 1 and of 20 images
        watch.forget()
        assert home.run(accession, url=watch.url).status == 0
        sizes.append(watch.sent)
    assert sizes[1] - sizes[0] < 100    # a few digits; the IDs of 38 more instances would be 1.6 kB


# ------------------------------------------------------------------------------------------------------------------
# Side by side, in order
# ------------------------------------------------------------------------------------------------------------------

def test_one_job_is_strictly_serial(full, watch, home):
    watch.delay = 0.002
    assert home.run("--jobs", "1", "20310220", "EM01", "EM02", "EM03", url=watch.url).status == 0
    assert watch.most == 1
    order = [name for request in watch.requests for name in fetched_by(full, request) if name.startswith("E2031")]
    assert order == [f"E20310220{index:02d}" for index in range(8)]


def test_the_walk_inside_a_study_is_serial(full, watch, home):
    watch.delay = 0.002
    assert home.run("--jobs", "4", "EM01", url=watch.url).status == 0
    assert watch.most == 1


@pytest.mark.parametrize(
    "options, together", [((), 4), (("--jobs", "4"), 4), (("--jobs", "2"), 2)], ids=["default", "4", "2"]
)
def test_so_many_studies_are_fetched_at_the_same_time_and_printed_in_order(full, watch, home, options, together):
    """The first request for studies is answered only when as many as there are jobs have come."""
    barrier = threading.Barrier(together)

    def wait(request):
        if purpose(request) in ("find series", "series list"):
            with contextlib.suppress(threading.BrokenBarrierError):    # where they do not come: go on, and fail below
                barrier.wait(120)
    watch.before = wait
    ran = home.run(*options, "20310220", url=watch.url)
    assert not barrier.broken and ran.status == 0
    assert watch.most == together
    assert ran.printed == [f"E20310220{index:02d}" for index in range(8)]


def test_one_slow_study_does_not_hold_up_fetching_the_rest_and_is_still_printed_first(full, watch, home):
    """The first study is answered only when all requests for the others have been, or for those not asked with it."""
    others, answered, held = threading.Event(), set(), []
    last, wanted = ("find series", 3) if full.answers_tags else ("tags", 14)

    def hold(request):
        if "E2031022000" in fetched_by(full, request):
            held.append(others.wait(120))

    def count(request):
        if purpose(request) == last:
            answered.add(request.body + request.path.encode())
            if len(answered) == wanted:
                others.set()
    watch.before, watch.after = hold, count
    ran = home.run("--jobs", "4", "20310220", url=watch.url)
    assert held == [True] and ran.status == 0
    assert ran.printed == [f"E20310220{index:02d}" for index in range(8)]


def test_no_more_studies_are_fetched_ahead_than_memory_is_meant_for(home, here, monkeypatch):
    """The first study is answered once all are asked for that may be; half a second more is for a wrong program."""
    bound = 8
    monkeypatch.setattr(store_study_info, "AHEAD", bound)
    monkeypatch.setattr(store_study_info, "TOGETHER", 1)
    names = [f"EA{number:02d}" for number in range(3 * bound)]
    begun, filled, beyond, early = set(), threading.Event(), threading.Event(), []

    def hold(answer):
        filled.wait(120)
        early.append(beyond.wait(0.5))
        return answer

    def note(count, request):
        if request.kind != "find series":
            return None
        begun.update(request.accessions)
        if len(begun) >= bound - 1:
            filled.set()
        if len(begun) > bound:
            beyond.set()
        return hold if names[0] in request.accessions else None
    with StandIn(*(instance(name) for name in names)) as server:
        server.misbehave = note
        assert here(*names, url=server.url, jobs=4).status == 0
    assert early == [False] and begun == set(names) == set(home.stored())


# ------------------------------------------------------------------------------------------------------------------
# Connections
# ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("jobs", [1, 4])
def test_connections_are_reused(full, watch, here, monkeypatch, jobs):
    """As many as there are jobs, where none is idle for too long."""
    monkeypatch.setattr(store_study_info, "KEEPALIVE_SECONDS", 600)
    assert here("20310110", url=watch.url, jobs=jobs).status == 0
    assert watch.connections <= jobs < len(watch.requests)


def answer_and_close(handler, answer):
    """Answered, and then closed without a word in the headers, as by a server whose idle time is over."""
    handler.send(answer)
    handler.drop()


def words(ran) -> list[str]:
    """The log lines without their time stamps."""
    return [re.sub(r"^\S+ \S+ ", "", line) for line in ran.err.splitlines()]


@pytest.fixture(scope="module")
def undisturbed(full, warm, tmp_path_factory):
    return Home(tmp_path_factory.mktemp("undisturbed"), warm).run("-v", "20310220", url=full.url)


@pytest.mark.parametrize("how, jobs, times", [("close", 1, 99), ("close", 4, 99), ("answer and close", 1, 99),
                                              ("answer and close", 4, 1)])
def test_a_request_that_meets_a_connection_just_closed_is_repeated(
        undisturbed, watch, home, monkeypatch, how, jobs, times):
    """Every second request, once each; not the very first, whose connection has just been opened."""
    monkeypatch.setitem(FAULTS, "answer and close", answer_and_close)
    seen: set[tuple] = set()
    lock = threading.Lock()

    def close_some(count, request):
        key = request.path, request.body
        with lock:
            if count % 2 or key in seen or len(seen) >= times:
                return None
            seen.add(key)
        return how
    watch.misbehave = close_some
    ran = home.run("--jobs", jobs, "-v", "20310220", url=watch.url)
    assert seen and ran.status == 0 and ran.out == undisturbed.out and len(home.series()) == 16
    assert [line for line in words(ran) if "next try" not in line] == words(undisturbed)


# ------------------------------------------------------------------------------------------------------------------
# Start-up
# ------------------------------------------------------------------------------------------------------------------

def imports(home, *arguments, url=None, whole=False) -> tuple[int, set[str]]:
    """Exit status of a run, and the packages that it imported; with `whole` each module's full name."""
    ran = home.run(*arguments, url=url, env={"PYTHONPROFILEIMPORTTIME": "1"})
    names = {line.rpartition("|")[2].strip() for line in ran.err.splitlines() if line.startswith("import time:")}
    return ran.status, names if whole else {name.partition(".")[0] for name in names}


HEAVY = {"pyorthanc", "pydicom", "httpx", "httpcore", "numpy", "tqdm", "ssl", "asyncio"}


@pytest.mark.parametrize(
    "arguments, status",
    [
        (["--help"], 0),
        (["--version"], 0),
        ([], 2),
        (["E*"], 2),
        (["20240230"], 2),
        (["--jobs", "0", "E1"], 2),
        (["--timeout", "x", "E1"], 2),
        (["--nonsense", "E1"], 2),
        (["--url", "ftp://127.0.0.1", "E1"], 2),
        (["--url", "http://u:p@127.0.0.1", "E1"], 2),
        (["--csv", "no/such/folder.csv", "E1"], 2),
        (["@no-such-file"], 2),
        (["--netrc", "no-such-file", "E1"], 2),
        (["-v", "-q", "E1"], 2),
        (["202413"], 2),
        (["E1", "--url", "nothing"], 2),
    ],
    ids=lambda value: " ".join(value) or "nothing" if isinstance(value, list) else "",
)
def test_help_version_and_usage_errors_import_no_package(home, arguments, status):
    ended, imported = imports(home, *arguments)
    assert ended == status and {"argparse", "sqlite3"} <= imported
    assert imported & HEAVY == set()


def test_a_run_that_asks_the_server_nothing_imports_no_package(full, home):
    home.run("EM03", url=full.url)
    ended, imported = imports(home, "EM03", url="http://127.0.0.1:9")
    assert ended == 0 and imported & HEAVY == set()


def test_a_run_imports_of_pyorthanc_its_client_alone(full, home):
    """The rest of the package takes longer than a month's requests."""
    ended, imported = imports(home, "EM03", url=full.url, whole=True)
    # Old servers name tags by keyword: that needs pydicom's dictionary.
    unused = {"pyorthanc", "asyncio"} | ({"pydicom"} if full.extended else set())
    assert ended == 0 and "httpx" in imported
    assert imported & unused == set()


@pytest.mark.parametrize(
    "modules",
    [
        {"__init__.py": "class Orthanc: where = 'package'"},
        {"__init__.py": "from .elsewhere import Orthanc", "elsewhere.py": "class Orthanc: where = 'package'"},
        {
            "__init__.py": "from .client import Orthanc",
            "client.py": "from .errors import Fault\nclass Orthanc: where = Fault",
            "errors.py": "Fault = 'package'",
        },
        {"__init__.py": "from .core import Orthanc", "core.py": "class Orthanc: where = 'package'", "client.py": ""},
        {
            "__init__.py": "from .client import Orthanc",
            "client.py": "from __future__ import annotations\nimport dataclasses\n"
            "@dataclasses.dataclass\nclass Orthanc:\n    where: str = 'package'",
        },
        {
            "__init__.py": "from .core import Orthanc",
            "core.py": "class Orthanc: where = 'package'",
            "client.py": "1 / 0",
        },
    ],
    ids=[
        "in the package itself",
        "in another module",
        "with the help of another module",
        "not in its old module",
        "as a dataclass",
        "beside a broken module",
    ],
)
def test_a_release_of_pyorthanc_that_is_laid_out_otherwise_serves_as_well(tmp_path, modules):
    (tmp_path / "pyorthanc").mkdir()
    for name, text in modules.items():
        (tmp_path / "pyorthanc" / name).write_text(text)
    code = (
        "import sys; sys.path[:0] = sys.argv[1:]; import store_study_info; print(store_study_info.client_class().where)"
    )
    ended = subprocess.run(
        [sys.executable, "-c", code, str(tmp_path), str(PROGRAM.parent)],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
    )
    assert (ended.stdout, ended.stderr) == ("package\n", "")
