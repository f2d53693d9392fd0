"""Whatever a server or a network does: an exit status, a sentence, no traceback, whole studies.

The next run completes what is missing.
"""
import base64
import datetime
import email.utils
import itertools
import json
import math
import os
import re
import subprocess
import sys
import threading
from itertools import pairwise
from types import SimpleNamespace

import pytest
from pydicom.uid import ImplicitVRLittleEndian

import dicom_files
import store_study_info as program
from conftest import PROGRAM, Ran
from endpoint import FAULTS, Answer, Endpoint, Proxy, Request, answered_after, at
from orthanc import free_port
from stand_in import StandIn

for code in (401, 403):
    FAULTS.setdefault(f"status {code}", lambda handler, answer, code=code: handler.send(Answer(code, b"")))

CURABLE = {"status 429", "status 502", "status 503", "reset", "close", "cut", "no http"}
TIMEOUTS = {"hang", "slow", "slow header"}
TRIED_TWICE = {*TIMEOUTS, "status 504"}    # the time-out of a proxy
DENIED = {"status 401"}
GENERATIONS = pytest.mark.parametrize("old", [False, True], ids=["new", "old"])


def examined(accession: str, date: str) -> list[bytes]:
    """A study whose series need every kind of request: plain, a hidden private tag, a first instance without SAR."""
    return [dicom_files.instance(accession, series=1, StudyDate=date),
            dicom_files.instance(accession, series=2, StudyDate=date, syntax=ImplicitVRLittleEndian),
            dicom_files.instance(accession, series=3, number=1, StudyDate=date, sar=None, ta=None),
            dicom_files.instance(accession, series=3, number=2, StudyDate=date)]


MONTH = ["E1", "E2", "E3"]
NAMED = "E9"
TOKENS = ["202404", NAMED]
DATES = {"E1": "20240401", "E2": "20240402", "E3": "20240403", NAMED: "20240509"}
FILES = [data for accession, date in DATES.items() for data in examined(accession, date)]


def whole(accession: str, series: int = 3) -> set:
    """What must be stored of an accession: (series_uid, sar, duration)."""
    return {(dicom_files.uid(accession, one), 0.5, 60) for one in range(1, series + 1)}


def same(request: Request, target: Request) -> bool:
    return request[:3] == target[:3]


def first_middle_last(requests: list[Request]) -> list[tuple[str, Request]]:
    """Of each kind of request three: (kind, request)."""
    kinds: dict[str, list[Request]] = {}
    for request in requests:
        kinds.setdefault(request.kind, []).append(request)
    return [(kind, made[place]) for kind, made in kinds.items() for place in sorted({0, len(made) // 2, len(made) - 1})]


@pytest.fixture
def alone(monkeypatch):
    """Each request names one accession at most, so that a fault at it can meet no other."""
    monkeypatch.setattr(program, "TOGETHER", 1)
    monkeypatch.setattr(program, "LOOKED_UP_TOGETHER", 1)


def fail_always(target: Request, kind: str):
    return lambda count, request: kind if same(request, target) else None


def fail_once(target: Request, kind: str):
    failed: list[Request] = []

    def once(count, request):
        if failed or not same(request, target):
            return None
        failed.append(request)
        return kind
    return once


def errors(ran: Ran) -> list[str]:
    return [line for line in ran.err.splitlines() if " ERROR " in line]


# -- every fault at every call ---------------------------------------------------------------------------------------

# A 404 of `content` says that there is no such element, and its bytes may be anything: no fault that could be told
# from an answer.
NO_FAULT = {("status 404", "content"), ("half json", "content"), ("empty", "content")}


def what_is_said(fault: str) -> str:
    """Of a fault, as a pattern."""
    if fault.startswith("status"):
        return f"HTTP {fault[-3:]}\\b"
    said = dict.fromkeys(TIMEOUTS, "did not answer .* completely within 60 s, 2 tries")
    said |= dict.fromkeys(["reset", "close", "cut", "no http"], "broke the connection while answering .* tries")
    return (said | {"redirect": "redirects .* to http://127.0.0.1"}).get(fault, "JSON|than the bytes of an element")


def missing_after(kind: str, target: Request) -> list[set]:
    """Which accessions may be missing when a request of this kind never gets its answer."""
    if kind == "system":
        return [{*MONTH, NAMED}]
    if kind in ("find study", "statistics"):
        return [{*target.accessions} & {*MONTH, NAMED} or set(MONTH)]
    return [{accession} for accession in (*MONTH, NAMED)]


@pytest.fixture(scope="module", params=[False, True], ids=["new", "old"])
def server(request):
    with StandIn(*FILES, old=request.param) as running:
        yield running


CALLS: dict[bool, list[tuple[str, Request]]] = {}    # by whether the server is old


@pytest.fixture
def calls(server, home, here, alone):
    """Each call of a run without faults, three of each kind."""
    if server.old not in CALLS:
        server.misbehave = None
        server.forget()
        assert here(*TOKENS, url=server.url).status == 0
        assert home.stored() == {accession: whole(accession) for accession in (*MONTH, NAMED)}
        further = {"statistics", "series"} if server.old else {"find series", "find instance"}
        assert set(server.kinds) == {"system", "find study", "tags", "content"} | further
        CALLS[server.old] = first_middle_last(list(server.requests))
    return CALLS[server.old]


@pytest.mark.parametrize("fault", sorted(FAULTS))
def test_a_fault_at_any_call_is_a_sentence_and_the_next_run_completes(home, here, server, calls, fault):
    for kind, target in calls:
        if (fault, kind) in NO_FAULT:
            continue
        what = f"{fault} at {kind} {target.path} {target.body!r}"
        home.db.unlink(missing_ok=True)
        server.forget()
        server.misbehave = fail_always(target, fault)
        ran = here(*TOKENS, url=server.url)
        server.misbehave = None
        found = home.stored()
        assert ran.status == 1, what
        assert len(errors(ran)) == 1, (what, ran.err)
        assert re.search(what_is_said(fault), errors(ran)[0]), (what, ran.err)
        assert all(series == whole(accession) for accession, series in found.items()), what
        assert set(ran.printed) == set(found) & set(MONTH), what
        tried = sum(same(request, target) for request in server.requests)
        if fault in DENIED:
            assert tried == 1 and same(server.requests[-1], target), what
        else:
            assert {*MONTH, NAMED} - set(found) in missing_after(kind, target), what
            assert 3 <= tried <= 8 if fault in CURABLE else tried == (2 if fault in TRIED_TWICE else 1), what
        assert here(*TOKENS, url=server.url).status == 0, what
        assert home.stored() == {accession: whole(accession) for accession in (*MONTH, NAMED)}, what


@pytest.mark.parametrize("fault", sorted(CURABLE | TRIED_TWICE))
def test_a_fault_that_passes_is_cured_by_repeating(home, here, server, calls, fault):
    for kind, target in calls:
        home.db.unlink(missing_ok=True)
        server.forget()
        server.misbehave = fail_once(target, fault)
        ran = here(*TOKENS, url=server.url)
        server.misbehave = None
        assert ran.status == 0, (kind, ran.err)
        assert sum(same(request, target) for request in server.requests) >= 2, kind
        assert home.stored() == {accession: whole(accession) for accession in (*MONTH, NAMED)}, kind


@GENERATIONS
@pytest.mark.parametrize("fault", ["status 500", "html", "half json", "redirect"])
def test_the_same_holds_for_the_whole_process(home, old, fault):
    with StandIn(*FILES, old=old) as server:
        server.misbehave = lambda count, request: (
            fault if request.kind == "tags" and second_instance(server, "E2") in request.path else None
        )
        ran = home.run(*TOKENS, url=server.url)
        assert ran.status == 1
        assert [line for line in ran.err.splitlines() if " ERROR E2: " in line] == errors(ran) != []
        assert home.stored() == {accession: whole(accession) for accession in ("E1", "E3", NAMED)}
        server.misbehave = None
        assert home.run(*TOKENS, url=server.url).status == 0
        assert set(home.stored()) == {*MONTH, NAMED}


def second_instance(server: StandIn, accession: str) -> str:
    """Of the instance of series 3 whose header is read: the second one received."""
    return server.find_id("Instance", SOPInstanceUID=dicom_files.uid(accession, 3, 2))


# -- before a real server --------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def real(servers):
    """A real server with the same files, and nothing else."""
    server = servers(Name="faults")
    server.upload(*FILES)
    return server.settle()


@pytest.mark.parametrize("fault", ["status 503", "status 500", "reset", "cut", "html", "half json", "hang"])
def test_faults_before_a_real_server_end_alike(home, here, alone, real, fault):
    with Proxy(real.url) as proxy:
        assert here(*TOKENS, url=proxy.url).status == 0
        for kind, target in first_middle_last(list(proxy.requests))[1::3]:
            if (fault, kind) in NO_FAULT:
                continue
            home.db.unlink()
            proxy.misbehave = fail_always(target, fault)
            ran = here(*TOKENS, url=proxy.url)
            proxy.misbehave = None
            assert ran.status == 1 and len(errors(ran)) == 1, (kind, ran.err)
            assert all(series == whole(accession) for accession, series in home.stored().items())
            assert here(*TOKENS, url=proxy.url).status == 0
            assert home.stored() == {accession: whole(accession) for accession in (*MONTH, NAMED)}


# -- repeating -------------------------------------------------------------------------------------------------------

TWENTY = [f"E{number}" for number in range(20)]
TWENTY_FILES = [
    data
    for day, accession in enumerate(TWENTY, 1)
    for data in dicom_files.study(accession, series=2, instances=1, StudyDate=f"202406{day:02}")
]


class OneInFive:
    """Each fifth new request fails twice: which ones does not depend on how the threads take turns."""

    def __init__(self):
        self.lock = threading.Lock()
        self.tries: dict[tuple, list] = {}    # of each request: its place among the others, and its tries so far

    def __call__(self, count, request):
        with self.lock:
            known = self.tries.setdefault(request[:3], [len(self.tries), 0])
            known[1] += 1
            place, tries = known
        faults = ["status 503", "status 502", "status 429", "reset", "cut"]
        return faults[(place // 5 + tries) % 5] if place % 5 == 4 and tries <= 2 else None


@GENERATIONS
def test_a_month_is_stored_whole_although_one_answer_in_five_fails(home, here, old):
    with StandIn(*TWENTY_FILES, old=old) as server:
        server.misbehave = OneInFive()
        ran = here("202406", url=server.url, jobs=4)
    assert (ran.status, ran.printed) == (0, TWENTY)
    assert home.stored() == {accession: whole(accession, 2) for accession in TWENTY}


def test_a_month_is_stored_whole_with_the_waits_that_users_have(home):
    with StandIn(*TWENTY_FILES) as server:
        server.misbehave = OneInFive()
        ran = home.run("202406", url=server.url)
    assert (ran.status, ran.printed) == (0, TWENTY)
    assert home.stored() == {accession: whole(accession, 2) for accession in TWENTY}


def refuse(status, **headers):
    named = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return lambda answer: Answer(status, b"", headers=named)


def test_waits_grow_with_jitter_and_are_bounded(home, here, alone, clock):
    with StandIn(*FILES) as server:
        server.misbehave = at("find series", "status 503")
        ran = here("-v", "E1", "E2", url=server.url)
    assert ran.status == 1
    first, second = clock.waits[:len(clock.waits) // 2], clock.waits[len(clock.waits) // 2:]
    assert len(first) == len(second) > 2
    assert first[0] > 0 and all(later > earlier for earlier, later in pairwise(first))
    assert first != second
    assert sum(first) <= program.LONGEST_WAIT
    assert ran.err.count("next try in") == len(clock.waits)


def date_in(seconds: int, clock) -> str:
    when = datetime.datetime.fromtimestamp(clock.wall + seconds, datetime.timezone.utc)
    return email.utils.format_datetime(when, usegmt=True)


@pytest.mark.parametrize("status", [429, 503])
@pytest.mark.parametrize("header, low, high", [("7", 7, 7), ("0", 0, 0), (30, 30, 30), (-30, 0, 0), ("soon", 0, 1)],
                         ids=["seconds", "none", "a-date", "a-date-that-is-over", "nonsense"])
def test_retry_after_is_respected(home, here, clock, status, header, low, high):
    told: list[Request] = []

    def once(count, request):
        if request.kind != "find series" or told:
            return None
        told.append(request)
        return refuse(status, Retry_After=header if isinstance(header, str) else date_in(header, clock))
    with StandIn(*FILES) as server:
        server.misbehave = once
        assert here("E1", url=server.url).status == 0
    (wait,) = clock.waits
    assert low <= wait <= high


@pytest.mark.parametrize("header", ["3600", "999999999", "Fri, 31 Dec 9999 23:59:59 GMT"])
def test_a_long_retry_after_is_not_waited_for_but_said(home, here, clock, header):
    with StandIn(*FILES) as server:
        server.misbehave = at("find series", refuse(503, Retry_After=header))
        ran = here("E1", url=server.url)
    assert ran.status == 1
    assert clock.waits == []
    assert "asks to wait" in ran.err


def test_a_repeated_short_retry_after_is_bounded_too(home, here, clock):
    with StandIn(*FILES) as server:
        server.misbehave = at("find series", refuse(503, Retry_After="25"))
        assert here("E1", url=server.url).status == 1
    assert 0 < sum(clock.waits) <= program.LONGEST_WAIT


# -- no server, no access --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "tokens", [["202404"], ["E1", "E2", "E3"], ["202404", "E1", "E2"], ["202401-202412"]], ids=" ".join
)
@pytest.mark.parametrize("jobs", [1, 4])
def test_a_server_that_is_not_there_ends_the_run_with_one_sentence(home, here, tokens, jobs):
    ran = here(*tokens, url=f"http://127.0.0.1:{free_port()}", jobs=jobs)
    assert ran.status == 1
    (sentence,) = errors(ran)
    assert "cannot be reached" in sentence and "--url" in sentence
    assert not home.db.exists()


class Late(threading.Event):
    """Told of the end of a run only once the thread that asks first has been held up until then."""

    def is_set(self):
        if threading.current_thread().name.endswith("_0"):
            self.wait(120)
        return super().is_set()


def test_what_ends_the_run_is_raised_also_where_an_earlier_thread_was_held_up(monkeypatch):
    """The item of the thread that was held up was not looked at: it has no result, and is not told of."""
    def fail(item):
        raise program.RunError(f"item {item}")
    monkeypatch.setattr(program, "threading", SimpleNamespace(Event=Late))
    told = []
    with pytest.raises(program.RunError, match="item 1"):
        for item, result in program.in_order(fail, [0, 1], 2):
            told.append((item, result))
    assert told == []


def test_a_host_that_has_no_address_ends_the_run_with_one_sentence(home, here):
    ran = here("E1", "E2", url="http://no-such-host.invalid:8042")
    assert ran.status == 1
    (sentence,) = errors(ran)
    assert "no-such-host.invalid" in sentence


@GENERATIONS
@pytest.mark.parametrize("jobs", [1, 4])
def test_a_server_that_goes_away_ends_the_run_with_what_is_stored(home, here, alone, old, jobs):
    server = StandIn(*TWENTY_FILES, old=old)
    with server:
        count_of_series, gone = itertools.count(1), threading.Event()

        def leave(count, request):
            if request.kind == ("series" if old else "find series") and next(count_of_series) == 5:
                gone.set()
                server.listener.socket.close()
            return "reset" if gone.is_set() else None
        server.misbehave = leave
        ran = here("202406", url=server.url, jobs=jobs)
    assert ran.status == 1
    assert any("cannot be reached" in line for line in errors(ran))
    assert len(errors(ran)) <= 1 + jobs    # those under way
    assert "not reached" in ran.err
    assert all(series == whole(accession, 2) for accession, series in home.stored().items())
    assert ran.printed == [accession for accession in TWENTY if accession in home.stored()]


PASSWORD = "pass-word-7788"


def write_netrc(home, host="127.0.0.1", mode=0o600):
    path = home.folder / "keys"
    path.write_text(f"machine {host} login someone password {PASSWORD}\n")
    path.chmod(mode)
    return path


@GENERATIONS
@pytest.mark.parametrize("kind", ["system", "find study", "tags"])
def test_denied_access_ends_the_run_at_once_naming_netrc_and_host(home, here, old, kind):
    path = write_netrc(home)
    with StandIn(*FILES, old=old) as server:
        server.misbehave = at(kind, refuse(401, WWW_Authenticate='Basic realm="Orthanc"'))
        ran = here("-v", "--netrc", path, *TOKENS, url=server.url)
        assert server.kinds.count(kind) == 1 and server.kinds[-1] == kind
    assert ran.status == 1
    (sentence,) = errors(ran)
    assert str(path) in sentence and "127.0.0.1" in sentence and "401" in sentence
    assert PASSWORD not in ran.err + ran.out and "someone" not in ran.err + ran.out
    assert all(series == whole(accession) for accession, series in home.stored().items())


@pytest.mark.parametrize("jobs", [1, 4])
def test_denied_access_in_mid_run_leaves_what_is_stored_and_asks_no_more(home, here, alone, jobs):
    """The first study is answered once the fifth was denied, and what comes after that one never."""
    denied, never = threading.Event(), threading.Event()

    def deny(answer):
        denied.set()
        return Answer(401, b"")

    def misbehave(count, request):
        if request.kind != "find series":
            return None
        place = TWENTY.index(request.accessions[0])
        if place == 4:
            return deny
        return answered_after(never) if place > 4 else answered_after(denied) if place == 0 and jobs > 1 else None
    with StandIn(*TWENTY_FILES) as server:
        server.misbehave = misbehave
        ran = here("202406", url=server.url, jobs=jobs)
        asked = server.kinds.count("find series")
        never.set()
    assert ran.status == 1
    (sentence,) = errors(ran)
    assert "netrc" in sentence
    assert ran.printed == ["E0", "E1", "E2", "E3"] == sorted(home.stored())
    assert 5 <= asked < 5 + jobs    # the other threads had one under way each


@GENERATIONS
def test_credentials_of_the_host_are_sent_with_every_request(home, here, old):
    path = write_netrc(home)
    with StandIn(*FILES, old=old) as server:
        assert here("--netrc", path, "202404", url=server.url).status == 0
        sent = {request.headers.get("Authorization") for request in server.requests}
    assert sent == {"Basic " + base64.b64encode(f"someone:{PASSWORD}".encode()).decode()}


def test_credentials_of_another_host_are_not_sent(home, here):
    path = write_netrc(home, host="pacs.example.org")
    with StandIn(*FILES) as server:
        assert here("--netrc", path, "E1", url=server.url).status == 0
        assert not any(name.lower() == "authorization" for request in server.requests for name in request.headers)


class Elsewhere(Endpoint):
    def answer(self, request):
        return Answer(200, b"[]")


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
@pytest.mark.parametrize("kind", ["system", "find study", "find series"])
def test_redirects_are_never_followed(home, here, status, kind):
    path = write_netrc(home)
    with StandIn(*FILES) as server, Elsewhere() as other:
        server.misbehave = at(kind, refuse(status, Location=other.url + "/system"))
        ran = here("--netrc", path, "E1", url=server.url)
        assert other.requests == []
    assert ran.status == 1
    assert "redirect" in ran.err and PASSWORD not in ran.err


@pytest.mark.parametrize(
    "mode, warned", [(0o600, False), (0o400, False), (0o644, True), (0o640, True), (0o604, True)], ids=oct
)
def test_a_netrc_that_others_can_read_is_warned_of(home, here, mode, warned):
    path = write_netrc(home, mode=mode)
    with StandIn(*FILES) as server:
        ran = here("-q", "--netrc", path, "E1", url=server.url)
    assert ran.status == 0
    assert ("chmod 600" in ran.err and str(path) in ran.err) == warned
    assert bool(ran.err) == warned
    assert PASSWORD not in ran.err


@pytest.mark.parametrize(
    "url",
    [
        "http://someone:{}@127.0.0.1:1",
        "http://:{}@127.0.0.1:1/x",
        "https://{}@127.0.0.1",
        "http:someone:{}@127.0.0.1",
        "someone:{}@127.0.0.1",
    ],
)
@pytest.mark.parametrize("way", ["option", "environment"])
def test_a_url_with_a_password_is_refused_and_never_echoed(home, url, way):
    url = url.format(PASSWORD)
    ran = home.run("E1", url=url) if way == "option" else home.run("E1", env={"ORTHANC_URL": url})
    assert ran.status == 2
    assert len(ran.err.splitlines()) == 1
    assert PASSWORD not in ran.err + ran.out and "someone" not in ran.err
    assert not home.db.exists()


def test_proxies_in_the_environment_are_not_used(home):
    with StandIn(*FILES) as server, Elsewhere() as other:
        proxies = {f"{name}_PROXY": other.url for name in ("HTTP", "HTTPS", "ALL")}
        ran = home.run(*TOKENS, url=server.url, env=proxies | {name.lower(): url for name, url in proxies.items()})
        assert other.requests == []
    assert ran.status == 0


# -- time-outs -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("fault", sorted(TIMEOUTS))
def test_an_answer_that_does_not_come_in_time_is_asked_for_once_more(home, here, alone, clock, fault):
    with StandIn(*FILES) as server:
        server.misbehave = lambda count, request: fault if series_of_e2(request) else None
        ran = here("--timeout", 45, *MONTH, url=server.url)
        assert sum(map(series_of_e2, server.requests)) == 2
    assert ran.status == 1
    (sentence,) = errors(ran)
    assert " E2: " in sentence and "45 s" in sentence
    assert sorted(home.stored()) == ["E1", "E3"]
    assert 0 < clock.made < 2 * 45 + 2 * clock.SECONDS    # an answer that drips has no longer than one that hangs


@pytest.mark.parametrize("fault", sorted(TIMEOUTS))
def test_a_server_that_never_answers_in_time_ends_the_run(home, fault):
    """By the machine's own clock, and the whole process: no request gets an answer, so no time-out is too short."""
    with StandIn(*FILES) as server:
        server.misbehave = lambda count, request: fault
        ran = home.run("--timeout", "0.2", *MONTH, url=server.url)
        assert server.kinds == ["system"] * 2
    assert ran.status == 1
    (sentence,) = errors(ran)
    assert "0.2 s, 2 tries; is --url" in sentence
    assert not home.db.exists()


# -- answers that are not what was asked for -------------------------------------------------------------------------


def rewritten(change):
    """A fault that changes the JSON of an answer."""
    def fault(answer):
        parsed = json.loads(answer.body)
        return answer._replace(body=json.dumps(change(parsed) or parsed, indent=3, separators=(",", " : ")).encode())
    return fault


def each(records, change):
    for record in records if isinstance(records, list) else [records]:
        change(record)


def without(*keys):
    return rewritten(lambda records: each(records, lambda record: [record.pop(key, None) for key in keys] and None))


def with_value(key, value):
    return rewritten(lambda records: each(records, lambda record: record.__setitem__(key, value)))


def with_tag(tag, value):
    return rewritten(lambda records: each(records, lambda record: record["RequestedTags"].__setitem__(tag, value)))


def series_of_e2(request: Request) -> bool:
    return request.kind == "find series" and "E2" in request.accessions


WRONG = {
    "a number": lambda answer: answer._replace(body=b"7"),
    "null": lambda answer: answer._replace(body=b"null"),
    "a list of numbers": lambda answer: answer._replace(body=b"[1, 2, 3]"),
    "a list of lists": lambda answer: answer._replace(body=b"[[]]"),
    "deeply nested": lambda answer: answer._replace(body=b"[" * 100000),
    "no UTF-8": lambda answer: answer._replace(body=b"\xff\xfe" * 50),
    "a huge number": lambda answer: answer._replace(body=b"[" + b"9" * 5000 + b"]"),
    "NUL bytes": lambda answer: answer._replace(body=bytes(100)),
    "without IDs": without("ID"),
    "without stability": without("IsStable"),
    "without parents": without("ParentStudy"),
    "stability as text": with_value("IsStable", "true"),
    "stability as a number": with_value("IsStable", 1),
    "an ID that is a number": with_value("ID", 7),
    "a parent that is a list": with_value("ParentStudy", ["x"]),
    "tags as a list": with_value("RequestedTags", ["x"]),
    "tags as text": with_value("RequestedTags", "x"),
    "a tag that is a number": with_tag("0018,1316", 0.5),
    "a tag that is true": with_tag("0008,103e", True),
    "a tag that is an object": with_tag("0018,1316", {"Value": ["0.5"]}),
}


@pytest.mark.parametrize("wrong", WRONG, ids=lambda name: name.replace(" ", "-"))
def test_an_answer_of_another_shape_fails_its_study_and_no_other(home, here, wrong):
    with StandIn(*FILES) as server:
        server.misbehave = lambda count, request: WRONG[wrong] if series_of_e2(request) else None
        ran = here(*TOKENS, url=server.url)
    assert ran.status == 1
    (sentence,) = errors(ran)
    assert " E2: " in sentence
    assert home.stored() == {accession: whole(accession) for accession in ("E1", "E3", NAMED)}


WRONG_LISTS = [
    "a number",
    "null",
    "a list of numbers",
    "deeply nested",
    "without IDs",
    "without stability",
    "stability as text",
    "tags as a list",
]


@pytest.mark.parametrize("wrong", WRONG_LISTS, ids=lambda name: name.replace(" ", "-"))
def test_a_list_of_studies_of_another_shape_fails_its_date_and_no_other(home, here, wrong):
    with StandIn(*FILES) as server:
        server.misbehave = lambda count, request: (
            WRONG[wrong] if request.kind == "find study" and b"20240401-" in request.body else None
        )
        ran = here(*TOKENS, "202405", url=server.url)
    assert ran.status == 1
    (sentence,) = errors(ran)
    assert "20240401-20240430" in sentence
    assert set(home.stored()) == {NAMED}


@pytest.mark.parametrize(
    "wrong",
    [
        "a number",
        "null",
        "deeply nested",
        "without IDs",
        "without parents",
        "stability as text",
        "an ID that is a number",
    ],
    ids=lambda name: name.replace(" ", "-"),
)
def test_a_list_of_series_of_another_shape_fails_its_study_on_older_servers(home, here, wrong):
    with StandIn(*FILES, old=True) as server:
        study = server.find_id("Study", AccessionNumber="E2")
        server.misbehave = lambda count, request: (
            WRONG[wrong] if request.kind == "series" and study in request.path else None
        )
        ran = here(*TOKENS, url=server.url)
    assert ran.status == 1
    (sentence,) = errors(ran)
    assert " E2: " in sentence
    assert home.stored() == {accession: whole(accession) for accession in ("E1", "E3", NAMED)}


@pytest.mark.parametrize("count", [None, "3", 3.5, [3]], ids=repr)
def test_statistics_of_another_shape_fail_the_date_whose_answer_may_be_cut(home, here, count):
    with StandIn(*FILES, old=True) as server:
        server.misbehave = at("statistics", with_value("CountStudies", count))
        ran = here("202404", url=server.url)
    assert ran.status == 1
    (sentence,) = errors(ran)
    assert "20240401-20240430" in sentence and "number of studies" in sentence
    assert home.stored() == {}


@GENERATIONS
def test_a_header_that_ends_after_a_whole_line_is_not_taken_for_a_short_one(home, here, old):
    """A complete HTTP answer of an incomplete JSON text: all that is missing would count as absent."""
    def lines(answer):
        return answer._replace(body=answer.body[:answer.body.index(b',\n   "0018,1316"') + 1])
    with StandIn(*FILES, old=old) as server:
        wanted = second_instance(server, "E2")
        server.misbehave = lambda count, request: lines if request.kind == "tags" and wanted in request.path else None
        ran = here(*TOKENS, url=server.url)
    assert ran.status == 1
    assert home.stored() == {accession: whole(accession) for accession in ("E1", "E3", NAMED)}


@GENERATIONS
def test_raw_content_of_a_page_of_some_proxy_is_no_value(home, here, old):
    """Orthanc sends elements as application/octet-stream; taken for a value, the page would leave a series out."""
    with StandIn(*FILES, old=old) as server:
        server.misbehave = at("content", "html")
        ran = here("E1", url=server.url)
    assert ran.status == 1
    assert home.stored() == {}


@pytest.mark.parametrize("kind", ["system", "find study", "find series", "find instance", "tags", "content"])
def test_a_huge_answer_is_not_read_to_its_end(home, here, monkeypatch, kind):
    monkeypatch.setattr(program, "ANSWER_BYTES", 1 << 20)
    with StandIn(*FILES) as server:
        server.misbehave = at(kind, (lambda answer: answer._replace(body=answer.body + b" " * (8 << 20))))
        ran = here("E1", url=server.url)
        tried = server.kinds.count(kind)
    assert (ran.status, tried) == (1, 1)
    assert "more than 1 MB" in ran.err
    assert home.stored() == {}


@pytest.mark.parametrize("arguments", [["202404"], ["E2"], ["--force", "E2"]], ids=" ".join)
@GENERATIONS
def test_other_patients_studies_in_an_answer_are_never_stored(home, here, old, arguments):
    """The answer is that for another accession: what comes back is compared with what was asked for."""
    with StandIn(*FILES, old=old) as server:
        kind = "find study" if old else "find series"
        asked, wrong = (server.find_id("Study", AccessionNumber=accession) for accession in ("E2", "E1"))

        def other(count, request):
            if request.kind == kind:
                swapped = request._replace(body=request.body.replace(b'"E2"', b'"E1"'))
            else:
                swapped = request._replace(path=request.path.replace(asked, wrong) if old else request.path)
            return None if swapped == request else lambda answer: server.answer(swapped)
        server.misbehave = other
        ran = here(*arguments, url=server.url)
    # A newer server's own list of E2's series is asked for where the answer lacks them; an older one's is wrong too.
    named = set(MONTH) if "202404" in arguments else {"E2"}
    assert home.stored() == {accession: whole(accession) for accession in named - ({"E2"} if old else set())}
    assert ran.status == (1 if old else 0)


@GENERATIONS
def test_studies_that_no_token_named_are_not_stored(home, here, old):
    """The server ignores what was asked and lists everything."""
    others = [dicom_files.instance(accession, StudyDate="20240402") for accession in ("X7", "e2")]
    with StandIn(*FILES, *others, old=old) as server:
        def all_of_it(count, request):
            if request.kind != "find study" or not request.json.get("Expand"):
                return None
            everything = request._replace(body=json.dumps(request.json | {"Query": {}}).encode())
            return lambda answer: server.answer(everything)
        server.misbehave = all_of_it
        ran = here("20240402", NAMED, url=server.url)
    assert ran.status == 0
    assert home.stored() == {"E2": whole("E2"), NAMED: whole(NAMED)}


def test_a_series_that_was_not_sent_is_noticed(home, here):
    """An answer with one series less than the study has is not taken for the whole study."""
    with StandIn(*FILES) as server:
        server.misbehave = lambda count, request: (
            rewritten(lambda records: records[1:]) if series_of_e2(request) else None
        )
        ran = here("202404", url=server.url)
    assert ran.status == 0
    assert home.stored() == {accession: whole(accession) for accession in MONTH}


@pytest.mark.parametrize("value, stored", [(0.25, 0.25), (0.0, 0.0), (-1.0, None), (math.nan, None), (math.inf, None)])
@GENERATIONS
def test_the_sar_of_a_frame_is_a_finite_number_of_0_or_more_or_not_stored(home, here, old, value, stored):
    """Its bytes are read as they are in the file."""
    def frames(ds):
        ds.AcquisitionDuration = 60.0
        group = dicom_files.functional_group(("IEC_WHOLE_BODY", value))
        ds.PerFrameFunctionalGroupsSequence = [group]
    enhanced = {"sop_class": dicom_files.ENHANCED_MR, "sar": None, "ta": None, "creator": None}
    with StandIn(dicom_files.instance("E1", change=frames, **enhanced), old=old) as server:
        assert here("--fallback", "E1", url=server.url).status == 0
    assert [row["sar"] for row in home.series()] == ([] if stored is None else [stored])


@pytest.mark.parametrize("place", [0, 2], ids=["first", "last"])
@GENERATIONS
def test_a_study_of_which_one_series_is_still_arriving_is_not_stored_unless_forced(home, here, old, place):
    """Orthanc calls a study stable by itself, and each of its series too."""
    def arriving(records):
        theirs = [one for one in records if old or one["RequestedTags"]["0008,0050"] == "E2"]
        theirs[place]["IsStable"] = False
    with StandIn(*FILES, old=old) as server:
        study = server.find_id("Study", AccessionNumber="E2")

        def misbehave(count, request):
            listed = study in request.path and request.kind == "series" if old else series_of_e2(request)
            return rewritten(arriving) if listed else None
        server.misbehave = misbehave
        ran = here(*TOKENS, url=server.url)
        assert ran.status == 1
        (sentence,) = errors(ran)
        assert " E2: is still arriving" in sentence and "--force" in sentence
        assert home.stored() == {accession: whole(accession) for accession in ("E1", "E3", NAMED)}
        assert here("--force", "E2", url=server.url).status == 0
    assert home.stored() == {accession: whole(accession) for accession in (*MONTH, NAMED)}


@GENERATIONS
def test_a_series_that_is_on_the_server_twice_is_stored_from_the_earlier_study_and_warned_of(home, here, old):
    files = [dicom_files.instance("E1", study=date, StudyDate=date, sar=sar, SeriesInstanceUID="1.2.3")
             for date, sar in (("20240402", "0.75"), ("20240401", "0.25"))]
    with StandIn(*files, old=old) as server:
        ran = here("E1", url=server.url)
    assert ran.status == 0 and "WARNING E1: series 1 (1.2.3) is on the server twice" in ran.err
    assert [row["sar"] for row in home.series()] == [0.25]


@pytest.mark.parametrize("accession", ["E*7", "E 7+", "EÄ7"])
@GENERATIONS
def test_an_accession_that_no_query_can_name_is_stored_whole_too(home, here, old, accession):
    """Its other study is of another day: what the day found is not all of it."""
    files = [dicom_files.instance(accession, study=f"{accession} {day}", StudyDate=f"2024041{day}") for day in (1, 2)]
    with StandIn(*files, dicom_files.instance("E77", StudyDate="20240411"), old=old) as server:
        assert here("20240411", url=server.url).status == 0
    assert len(home.series(accession)) == 2


@GENERATIONS
def test_a_series_costs_six_requests_more_at_most_also_where_its_instances_come_one_by_one(home, here, old):
    """As with LimitFindInstances: 1. Of each but the first the time must be asked for, and is none."""
    files = [dicom_files.instance("E1", number=number, sar=None if number == 1 else "0.5", ta="soon",
                                  syntax=ImplicitVRLittleEndian) for number in range(1, 9)]
    with StandIn(*files, dicom_files.instance("E2"), old=old) as server:
        server.misbehave = at("find instance", rewritten(lambda records: records[:1]))
        assert here("E2", url=server.url).status == 0
        plain = len(server.requests)
        server.forget()
        assert here("E1", url=server.url).status == 0
        assert plain + 1 < len(server.requests) <= plain + 6


def test_an_endless_list_of_studies_ends_and_its_dates_may_be_incomplete(home, here):
    """A server that ignores Since, and tells the same studies for every page, but counts more; what came is stored."""
    with StandIn(*FILES) as server:
        def again(count, request):
            if request.path == "/tools/count-resources":
                return with_value("Count", 9)
            if request.kind != "find study" or not request.json["Since"]:
                return None
            first = request._replace(body=json.dumps(request.json | {"Since": 0}).encode())
            return "status 500" if count > 200 else lambda answer: server.answer(first)
        server.misbehave = again
        ran = here("20240401-20240403", url=server.url)
        assert len(server.requests) < 50
    assert ran.status == 1
    assert re.findall(r" (\d{8}): may be incomplete", "\n".join(errors(ran))) == ["20240401", "20240402", "20240403"]
    assert home.stored() == {accession: whole(accession) for accession in MONTH}


def test_a_passing_500_does_not_change_which_instance_gives_the_values_of_the_others(home, here):
    """Only a plugin's index may be unable to sort; on Orthanc's own a 500 is a failure of its study."""
    files = [dicom_files.instance(accession, number=number, sar=sar, StudyDate="20240401")
             for accession in MONTH for number, sar in ((5, None), (9, "0.2"), (1, "0.6"))]
    failed: list[Request] = []

    def once(count, request):
        if request.kind != "find instance" or failed:
            return None
        failed.append(request)
        return "status 500"
    with StandIn(*files) as server:
        server.misbehave = once
        ran = here("20240401", url=server.url)
    assert ran.status == 1 and len(errors(ran)) == 1
    assert [row["sar"] for row in home.series()] == [0.2, 0.2]


@GENERATIONS
def test_a_first_day_of_one_study_does_not_keep_others_from_being_looked_up_together(home, here, old):
    names = [f"E{number}" for number in range(20, 40)]
    files = [dicom_files.instance(name, StudyDate="20240502") for name in names]
    with StandIn(dicom_files.instance("E1", StudyDate="20240401"), *files, old=old) as server:
        assert here("20240401", *names, url=server.url).status == 0
        assert sum(bool(request.accessions) for request in server.requests if request.kind == "find study") <= 3
    assert len(home.studies()) == 21


def test_a_name_whose_question_fails_does_not_have_the_others_asked_again(home, here):
    names = [f"E{number}" for number in range(20, 40)]
    with StandIn(*FILES) as server:
        server.misbehave = lambda count, request: "status 500" if "*E39" in request.accessions else None
        ran = here(*names, url=server.url)
        assert server.kinds.count("find study") == 1 + len(names)
    assert ran.status == 1 and len(errors(ran)) == len(names)


# -- many accessions in one request ----------------------------------------------------------------------------------

def together_or_alone(fault: str, *, together: bool):
    """The fault at each find for series that names E2, or only where others are named with it."""
    return lambda count, request: fault if series_of_e2(request) and (
        not together or len(request.accessions) > 1) else None


@pytest.mark.parametrize("jobs", [1, 2])
@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - DENIED))
def test_a_fault_of_one_study_fails_it_alone_where_many_are_asked_for_together(home, here, fault, jobs):
    with StandIn(*FILES) as server:
        server.misbehave = together_or_alone(fault, together=False)
        ran = here(*TOKENS, url=server.url, jobs=jobs)
        assert max(len(request.accessions) for request in server.requests if request.kind == "find series") > 1
    assert ran.status == 1 and ran.printed == ["E1", "E3"]
    (sentence,) = errors(ran)
    assert " E2: " in sentence and re.search(what_is_said(fault), sentence)
    assert home.stored() == {accession: whole(accession) for accession in ("E1", "E3", NAMED)}


@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - DENIED))
def test_where_many_cannot_be_asked_for_together_each_is_asked_for_alone(home, here, fault):
    with StandIn(*FILES) as server:
        server.misbehave = together_or_alone(fault, together=True)
        ran = here(*TOKENS, url=server.url)
    assert ran.status == 0 and errors(ran) == [] and ran.printed == MONTH
    assert home.stored() == {accession: whole(accession) for accession in (*MONTH, NAMED)}


@GENERATIONS
@pytest.mark.parametrize("fault", sorted(FAULTS.keys() - DENIED))
def test_where_many_cannot_be_looked_up_together_each_is_looked_up_alone(home, here, old, fault):
    """Named ones on any server, and those of a date where a server knows no RequestedTags."""
    tokens = ["202404"] if old else MONTH
    with StandIn(*FILES, old=old) as server:
        server.misbehave = lambda count, request: (
            fault if request.kind == "find study" and len(request.accessions) > 1 else None)
        ran = here(*tokens, url=server.url)
        assert server.requests[-1].kind != "find study"
    assert ran.status == 0 and errors(ran) == []
    assert home.stored() == {accession: whole(accession) for accession in MONTH}


# -- what is shown ---------------------------------------------------------------------------------------------------

NASTY = "\x1b[2J\x1b]0;owned\x07\r\nE666\x9b31m\u202eX"


def visible(text: str) -> bool:
    return all(char.isprintable() or char == "\n" for char in text)


@pytest.mark.parametrize(
    "tag",
    [
        "0008,0050",
        "0008,103e",
        "0020,000e",
        "0020,0011",
        "0018,1316",
        "0051,100a",
        "0051,0010",
        "0008,0060",
        "0010,0020",
    ],
)
@GENERATIONS
def test_control_characters_of_the_server_reach_neither_stdout_nor_stderr(home, here, old, tag):
    def nasty(answer):
        def change(node):
            for key, value in node.items() if isinstance(node, dict) else ():
                if key == tag and isinstance(value, str):
                    node[key] = value + NASTY
                change(value)
            for one in node if isinstance(node, list) else ():
                change(one)
        return rewritten(change)(answer)
    with StandIn(*FILES, old=old) as server:
        server.misbehave = lambda count, request: (
            nasty if request.kind in ("find study", "find series", "find instance", "series", "tags") else None
        )
        ran = here("-v", *TOKENS, url=server.url)
    assert visible(ran.out) and visible(ran.err)
    assert not re.search(r"^E666", ran.out + ran.err, re.MULTILINE)


@pytest.mark.parametrize("header", ["Location", "Retry-After", "Content-Type"])
def test_control_characters_in_headers_reach_nobody(home, here, header):
    def nasty(answer):
        return Answer(
            302 if header == "Location" else 503,
            b"",
            **(
                {"content_type": "x\x1b[2J"}
                if header == "Content-Type"
                else {"headers": ((header, "ftp://\x1b[2J\x9b/"),)}
            ),
        )

    with StandIn(*FILES) as server:
        server.misbehave = at("find series", nasty)
        ran = here("-v", "E1", url=server.url)
    assert ran.status == 1
    assert visible(ran.out) and visible(ran.err)


@GENERATIONS
@pytest.mark.parametrize(
    "fault", [None, "status 500", "half json", "html", "a tag that is a number", "an ID that is a number"]
)
def test_no_patient_is_named_in_any_line(home, here, old, fault):
    files = [
        dicom_files.instance(
            "E1",
            series=series,
            PatientName="Doe^Zebulon",
            PatientID="SECRET-77",
            PatientBirthDate="19440506",
            PatientAge="091Y",
            sar=None if series == 3 else "0.5",
            ta="Anon" if series == 4 else "TA 01:00",
        )
        for series in range(1, 5)
    ]
    number_in_header = rewritten(lambda header: header.__setitem__("0018,1316", 0.5))

    def misbehave(count, request):
        if request.kind not in (("series", "tags") if old else ("find series",)):
            return None
        if fault not in WRONG:
            return fault
        if old and fault == "a tag that is a number":
            return number_in_header if request.kind == "tags" else None
        return WRONG[fault] if request.kind != "tags" else None
    with StandIn(*files, old=old) as server:
        server.misbehave = misbehave
        ran = here("-v", "--fallback", "202404", "E1", url=server.url)
    assert ran.status == (1 if fault else 0), ran.err
    assert len(errors(ran)) == ran.status
    for secret in ("Doe", "SECRET", "19440506", "091Y"):
        assert secret not in ran.err + ran.out


# -- what is missing -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "hidden", [("pyorthanc",), ("pydicom",), ("pyorthanc", "pydicom"), ("httpx",), ("tqdm",)], ids="+".join
)
def test_a_missing_package_is_a_sentence_that_says_what_to_run(home, tmp_path, hidden):
    """tqdm is missed by nobody: it only draws the bar."""
    import pyorthanc
    packages = os.path.dirname(os.path.dirname(pyorthanc.__file__))
    shown = tmp_path / "packages"
    shown.mkdir()
    for name in os.listdir(packages):
        if not any(name == one or name.startswith(f"{one}-") for one in hidden) and not name.endswith(".pth"):
            (shown / name).symlink_to(os.path.join(packages, name))
    with StandIn(*FILES) as server:
        ended = subprocess.run(
            [sys.executable, "-S", str(PROGRAM), "--url", server.url, "E1"],
            cwd=home.folder,
            env=home.environment({"PYTHONPATH": str(shown)}),
            capture_output=True,
            text=True,
            check=False,
        )
    assert "Traceback" not in ended.stderr
    if hidden == ("tqdm",):
        assert (ended.returncode, set(home.stored())) == (0, {"E1"})
        return
    assert ended.returncode == 1
    assert "pip install -r requirements.txt" in ended.stderr and "uv run" in ended.stderr
    assert not home.db.exists()


BAD_IDS = ["\x1b[2J\x9b31m", "../../tools/shutdown", "x?expand", "", "a b\r\nE666", "x" * 100000]


@pytest.mark.parametrize(
    "bad", BAD_IDS, ids=["control-characters", "another-path", "a-query", "empty", "line-break", "huge"]
)
def test_an_id_that_is_none_is_neither_asked_for_nor_shown(home, here, bad):
    """Orthanc's IDs are five groups of eight hexadecimal digits; an address or a sentence may hold no other."""

    def nasty(answer):
        return rewritten(lambda records: each(records, lambda record: record.__setitem__("Instances", [bad])))(answer)
    with StandIn(*FILES, old=True) as server:
        study = server.find_id("Study", AccessionNumber="E2")
        server.misbehave = lambda count, request: nasty if request.kind == "series" and study in request.path else None
        ran = here("-v", *TOKENS, url=server.url)
        asked = [request.path for request in server.requests if request.method == "GET"]
    assert ran.status == 1
    assert all(
        re.fullmatch(
            r"/(system|statistics|(studies|instances|series)/[0-9a-f-]{44}(/(series|tags|content/[0-9a-f-]{9})(\?[a-z&]*)?)?)",
            path,
        )
        for path in asked
    )
    assert visible(ran.out) and visible(ran.err)
    assert max(map(len, ran.err.splitlines())) < 1000
    assert home.stored() == {accession: whole(accession) for accession in ("E1", "E3", NAMED)}
