"""The stand-in answers as the real servers do: every call that the program makes is put to both."""
import subprocess
import sys

import pytest
from pydicom.datadict import tag_for_keyword
from pydicom.dataset import Dataset
from pydicom.sequence import Sequence
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian

import dicom_files
import store_study_info as program
from conftest import HERE, Home
from stand_in import RECEIVED, StandIn


def functional_groups(ds):
    """Nested SAR, as in an enhanced object; numbers of binary VR; a private protocol text."""
    item, timing, group = Dataset(), Dataset(), Dataset()
    item.add_new(0x00189179, "CS", "IEC_WHOLE_BODY")
    item.add_new(0x00189181, "FD", 0.1)
    timing.add_new(0x00189239, "SQ", Sequence([item, item]))
    group.add_new(0x00189112, "SQ", Sequence([timing]))
    ds.add_new(0x52009229, "SQ", Sequence([group]))
    ds.add_new(0x52009230, "SQ", Sequence([group, group]))
    ds.add_new(0x00189073, "FD", 12.5)
    ds.add_new(0x00290010, "LO", "SIEMENS CSA HEADER")
    ds.add_new(0x00291020, "OB", b"\0\1lTotalScanTimeSec = 450\n")
    ds.add_new(0x00081140, "SQ", Sequence([]))
    dicom_files.pixels(ds, 4)


def unknown_vr(ds):
    ds.add_new(0x0051100A, "UN", b"TA 02:00")
    ds.add_new(0x00181316, "UN", b"0.1 ")


ONE, TWO, LOW = dicom_files.uid("E1"), dicom_files.uid("E1 of the next day"), dicom_files.uid("e1")
FILES = [
    dicom_files.instance("E1", series=1, number=2),
    dicom_files.instance("E1", series=1, number=1, SequenceName="another"),
    dicom_files.instance("E1", series=1, number=3),
    dicom_files.instance("E1", series=2, change=functional_groups),
    dicom_files.instance("E1", series=3, syntax=ImplicitVRLittleEndian, SequenceName=None),
    dicom_files.instance("E1", series=4, syntax=ExplicitVRBigEndian, change=functional_groups),
    dicom_files.instance("E1", series=5, change=unknown_vr),
    dicom_files.instance(
        "E1", series=6, sar=None, ta=None, creator=None, EthnicGroup=None, BodyPartExamined=None, SeriesNumber=None
    ),
    dicom_files.instance(
        "E1", series=7, sar=" 0.25 ", ta="TA: 12.35 ", block=0x11, SeriesDescription="", PatientAge="006W"
    ),
    dicom_files.instance(
        "E1",
        study="E1 of the next day",
        series=1,
        StudyDate="20240501",
        SpecificCharacterSet="ISO_IR 100",
        PatientID="Pé 7",
    ),
    dicom_files.instance("e1", StudyDate="20240428"),
    dicom_files.instance("E2", StudyDate="20240430", Modality="CT"),
    dicom_files.instance("E2-0", StudyDate="20230430"),
    dicom_files.instance("X1", StudyDate=""),
    dicom_files.instance(" E77", study="padded", StudyDate="20240430"),
]


class Pair:
    """A real server and the stand-in of its generation, with the same files in the same order."""

    def __init__(self, real, stand_in):
        self.real, self.stand_in, self.extended = real, stand_in, real.extended

    def both(self, ask):
        return ask(self.real), ask(self.stand_in)


@pytest.fixture(scope="module")
def pairs(servers, real):
    """pairs(**configuration): a pair, settled unless it never settles."""
    made = {}

    def get(**options):
        key = repr(sorted(options.items()))
        if key not in made:
            real = servers(Name="contract", **options)
            real.upload(*FILES)
            index = real.client.get("/system").json().get("DatabaseBackendPlugin")
            made[key] = Pair(real, StandIn(*FILES, old=not real.answers_tags, postgresql=index is not None,
                                           **options).__enter__())
            if not options.get("StableAge"):
                real.settle()
        return made[key]
    yield get
    for pair in made.values():
        pair.stand_in.__exit__(None, None, None)


@pytest.fixture(scope="module")
def pair(pairs):
    return pairs()


# -- the calls -------------------------------------------------------------------------------------------------------


def find(level, query, tags=(), content=("RequestedTags", "Parent", "IsStable"), **more):
    """As Server.find asks."""
    body = {"Level": level, "Query": query, "Since": 0, "Limit": 0, "Expand": True, "Short": True,
            "RequestedTags": list(tags), "ResponseContent": list(content)} | more
    return lambda server: server.client.post("/tools/find", json=body)


def get(path):
    return lambda server: server.client.get(path)


def ids_of(server, level, **query) -> list[str]:
    return sorted(server.client.post("/tools/find", json={"Level": level, "Query": query}).json())


def instance_id(series, number=1, study="E1"):
    return lambda server: ids_of(server, "Instance", SOPInstanceUID=dicom_files.uid(study, series, number))[0]


STUDY = {"content": ("RequestedTags", "IsStable"), "tags": program.STUDY_TAGS + program.STUDY_LEVEL}
TAGS = program.SERIES_TAGS + program.FALLBACK_TAGS
CALLS = {
    "a month": find("Study", {"AccessionNumber": "E*", "StudyDate": "20240401-20240430"}, **STUDY),
    "a day": find("Study", {"AccessionNumber": "E*", "StudyDate": "20240430-20240430"}, **STUDY),
    "a day without studies": find("Study", {"AccessionNumber": "E*", "StudyDate": "20220430-20220430"}, **STUDY),
    "one more page": find(
        "Study", {"AccessionNumber": "E*", "StudyDate": "20240401-20240501"}, Since=2, Limit=1000, **STUDY
    ),
    "a page past the end": find(
        "Study", {"AccessionNumber": "E*", "StudyDate": "20240401-20240501"}, Since=99, Limit=1000, **STUDY
    ),
    "an accession": find("Study", {"AccessionNumber": "E1"}, **STUDY),
    "an accession with a hyphen": find("Study", {"AccessionNumber": "E2-0"}, **STUDY),
    "a padded accession": find("Study", {"AccessionNumber": "E77"}, **STUDY),
    "a padded accession with a wildcard": find("Study", {"AccessionNumber": "*E77"}, **STUDY),
    "a month with padded accessions": find(
        "Study", {"AccessionNumber": "*E*", "StudyDate": "20240401-20240430"}, **STUDY
    ),
    "several accessions": find("Study", {"AccessionNumber": "E1\\E77\\E2"}, **STUDY),
    "series of several accessions": find("Series", {"AccessionNumber": "E1\\E77\\E2"}, TAGS),
    "an accession that is not there": find("Study", {"AccessionNumber": "E9"}, **STUDY),
    "an accession with a wildcard": find("Study", {"AccessionNumber": "E?"}, **STUDY),
    "series of an accession": find("Series", {"AccessionNumber": "E1"}, TAGS),
    "series of two studies": find("Series", {"StudyInstanceUID": f"{ONE}\\{TWO}"}, TAGS),
    "series of a study that is not there": find("Series", {"StudyInstanceUID": "1.2.3"}, TAGS),
    "instances of a study": find("Instance", {"StudyInstanceUID": f"{ONE}\\{LOW}"}, (), ("Parent",), OrderBy=RECEIVED),
    "first instances of a series": find(
        "Instance",
        {"SeriesInstanceUID": dicom_files.uid("E1", 1)},
        TAGS,
        ("RequestedTags", "Parent"),
        OrderBy=RECEIVED,
        Limit=2,
    ),
    "one instance": find(
        "Instance",
        {"SeriesInstanceUID": dicom_files.uid("E1", 1), "SOPInstanceUID": dicom_files.uid("E1", 1, 1)},
        (),
        ("Parent",),
    ),
}


def hexadecimal(tags: dict) -> dict:
    """1.9 ignores `Short` and writes keywords."""
    named = ((tag_for_keyword(name), name, value) for name, value in tags.items())
    return {f"{number >> 16:04x},{number & 0xffff:04x}" if number else name: value for number, name, value in named}


def told(answer):
    """What the program takes from an answer: (status, JSON without what it never reads).

    Records are sorted by ID unless an order was asked for.
    """
    if answer.status_code != 200:
        return answer.status_code, None
    unread = (
        "LastUpdate",
        "Labels",
        "Status",
        "ExpectedNumberOfInstances",
        "FileSize",
        "FileUuid",
        "IndexInSeries",
        "ParentPatient",
    )

    def plain(record):
        if not isinstance(record, dict):
            return record
        kept = {key: value for key, value in record.items() if key not in unread}
        for key in kept.keys() & {"MainDicomTags", "PatientMainDicomTags"}:
            kept[key] = hexadecimal(kept[key])
        if "Series" in kept:
            kept["Series"] = sorted(kept["Series"])
        return kept
    parsed = answer.json()
    if not isinstance(parsed, list):
        return 200, plain(parsed)
    records = [plain(record) for record in parsed]
    asked = answer.request.content if answer.request.method == "POST" else b""
    keep_order = b"OrderBy" in asked and records and "Instances" not in records[0] and "MainDicomTags" not in records[0]
    return 200, records if keep_order or not records or isinstance(records[0], str) else sorted(
        records, key=lambda record: record["ID"]
    )


@pytest.mark.parametrize("call", CALLS, ids=lambda name: name.replace(" ", "-"))
def test_finds_are_answered_alike(pair, call):
    real, ours = pair.both(CALLS[call])
    assert told(ours) == told(real)


@pytest.mark.parametrize("call", ["series of an accession", "a month", "first instances of a series"])
def test_a_server_that_may_not_read_files_leaves_the_same_tags_out(pairs, call):
    real, ours = pairs(StorageAccessOnFind="Never").both(CALLS[call])
    assert told(ours) == told(real)


def test_the_system_tells_the_same_of_extended_find(pair):
    real, ours = (answer.json() for answer in pair.both(get("/system")))
    assert real["Version"] and ours["Version"]
    assert ours.get("Capabilities", {}).get("HasExtendedFind") == real.get("Capabilities", {}).get("HasExtendedFind")


def test_statistics_count_the_same(pair):
    real, ours = (answer.json() for answer in pair.both(get("/statistics")))
    counted = [key for key in real if key.startswith("Count")]
    assert {key: ours[key] for key in counted} == {key: real[key] for key in counted}
    assert real["CountStudies"] == 7


def test_the_series_of_a_study_are_listed_alike(pair):
    for study in ids_of(pair.real, "Study"):
        real, ours = pair.both(get(f"/studies/{study}/series?expand&short"))
        assert told(ours) == told(real)


def test_a_series_lists_its_instances_alike(pair):
    for series in ids_of(pair.real, "Series"):
        real, ours = pair.both(get(f"/series/{series}"))
        assert told(ours) == told(real)


def test_headers_are_the_same_text(pair):
    for instance in ids_of(pair.real, "Instance"):
        real, ours = pair.both(get(f"/instances/{instance}/tags?short"))
        assert ours.json() == real.json()
        assert list(ours.json()) == list(real.json())


def test_the_per_frame_groups_begin_at_the_same_mark(pair):
    """The program reads a header up to there."""
    instance = instance_id(2)(pair.real)
    real, ours = (answer.content for answer in pair.both(get(f"/instances/{instance}/tags?short")))
    assert real.count(b'\n   "5200,9230"') == ours.count(b'\n   "5200,9230"') == 1


CONTENTS = [
    "0051-100a",
    "0051-110a",
    "0018-1316",
    "0018-9073",
    "0029-1020",
    "0008-0008",
    "0008-103e",
    "0008-1140",
    "5200-9229",
    "5200-9230",
    "5200-9230/0/0018-9112/0/0018-9239",
    "5200-9230/0/0018-9112/0/0018-9239/1/0018-9179",
    "5200-9230/0/0018-9112/0/0018-9239/1/0018-9181",
    "5200-9230/0/0018-9112/0/0018-9239/2/0018-9181",
    "5200-9230/9/0018-9112",
    "5200-9230/0/0018-9199",
]


@pytest.mark.parametrize("path", CONTENTS)
def test_raw_content_is_the_same_bytes(pair, path):
    """Of a plain file, one with sequences, and Implicit VR, big endian and UN ones."""
    for series in (1, 2, 3, 4, 5, 7):
        real, ours = pair.both(get(f"/instances/{instance_id(series)(pair.real)}/content/{path}"))
        assert ours.status_code == real.status_code
        if real.status_code == 200:
            assert (
                "".join(ours.text.split()) == "".join(real.text.split())
                if "json" in real.headers["content-type"]
                else ours.content == real.content
            )
            assert ours.headers["content-type"] == real.headers["content-type"]


@pytest.mark.parametrize(
    "path",
    [
        "/studies/none/series?expand&short",
        "/series/none",
        "/instances/none/tags?short",
        "/instances/none/content/0051-100a",
    ],
)
def test_what_is_not_there_is_a_404(pair, path):
    assert [answer.status_code for answer in pair.both(get(path))] == [404, 404]


@pytest.mark.parametrize(
    "body", [{"Level": "Nonsense", "Query": {}}, {"Level": "Study", "Query": {"StudyDate": "202404*"}}]
)
def test_what_is_not_understood_is_a_400(pair, body):
    assert [
        answer.status_code for answer in pair.both(lambda server: server.client.post("/tools/find", json=body))
    ] == [400, 400]


def test_an_unknown_word_of_content_is_a_400_where_it_is_read(pair):
    real, ours = pair.both(find("Study", {"AccessionNumber": "E1"}, (), ("RequestedTags", "Nonsense")))
    assert ours.status_code == real.status_code == (400 if pair.real.answers_tags else 200)


PAGES = [
    {},
    {"Limit": 1000},
    {"Limit": 0},
    {"Since": 0, "Limit": 0},
    {"Since": 0},
    {"Since": 3},
    {"Since": 3, "Limit": 0},
    {"Since": 3, "Limit": 1000},
    {"Since": 0, "Limit": 2},
    {"Since": 2, "Limit": 2},
    {"Since": 99, "Limit": 1000},
]


@pytest.mark.parametrize("options", [{}, {"LimitFindResults": 3}], ids=["no-limit", "limit-3"])
@pytest.mark.parametrize("page", PAGES, ids=repr)
@pytest.mark.parametrize("query", [{}, {"AccessionNumber": "E*"}, {"AccessionNumber": "*E*"}], ids=repr)
def test_pages_and_limits_are_the_same(pairs, options, page, query):
    """Rows that the server drops itself, as that of a padded accession, are counted by some."""
    real, ours = pairs(**options).both(
        lambda server: server.client.post("/tools/find", json={"Level": "Study", "Query": query} | page).json()
    )
    assert ours == real


@pytest.mark.parametrize("accession", ["E1", "E*", "*E77"])
def test_the_studies_that_match_are_counted_alike_where_they_are(pair, accession):
    query = {"Level": "Study", "Query": {"AccessionNumber": accession}}
    real, ours = pair.both(lambda server: server.client.post("/tools/count-resources", json=query))
    assert ours.status_code == real.status_code
    assert real.status_code == 404 or ours.json() == real.json()


def test_what_has_just_come_is_not_stable(pairs):
    for call in ("a month", "series of an accession"):
        real, ours = (answer.json() for answer in pairs(StableAge=10000).both(CALLS[call]))
        assert {record["IsStable"] for record in real} == {record["IsStable"] for record in ours} == {False}


# -- the program on both ---------------------------------------------------------------------------------------------

@pytest.mark.parametrize(
    "options", [{}, {"StorageAccessOnFind": "Never"}, {"LimitFindResults": 3}, {"StableAge": 10000}], ids=repr
)
@pytest.mark.parametrize("arguments", [("202404", "E1", "E2", "E2-0"), ("--fallback", "202404")], ids=" ".join)
def test_the_program_gives_the_same_database_from_both(pairs, tmp_path, warm, options, arguments):
    ended = []
    for server in (pairs(**options).real, pairs(**options).stand_in):
        home = Home(tmp_path / server.url.rpartition(":")[2], warm)
        home.folder.mkdir()
        ran = home.run("-v", *arguments, url=server.url)
        said = [line.split(" ", 2)[2].replace(server.url, "URL") for line in ran.err.splitlines()]
        ended.append((ran.status, ran.out, said, home.studies(), home.series()))
    assert ended[0] == ended[1]
    assert bool(ended[0][4]) == ("StableAge" not in options)


@pytest.mark.parametrize("kind", [{}, {"old": True}, {"postgresql": True}], ids=["new", "old", "postgresql"])
def test_every_kind_of_call_that_the_program_makes_is_in_these_tests(home, kind):
    kinds = {"system", "statistics", "find study", "find series", "find instance", "series", "tags", "content",
             "count-resources"}
    with StandIn(*FILES, **kind) as server, StandIn(*FILES, **kind, StorageAccessOnFind="Never") as blind:
        for one in (server, blind):
            home.run("--fallback", "--force", "20240401-20240501", "E1", "E2", "E2-0", url=one.url)
        assert set(server.kinds) | set(blind.kinds) <= kinds


def test_it_runs_from_the_command_line(home):
    path = home.folder / "one.dcm"
    path.write_bytes(dicom_files.instance("E5"))
    process = subprocess.Popen(
        [sys.executable, str(HERE / "stand_in.py"), "--old", str(path)], stdout=subprocess.PIPE, text=True
    )
    assert process.stdout
    try:
        ran = home.run("E5", url=process.stdout.readline().strip())
    finally:
        process.terminate()
        process.wait()
        process.stdout.close()
    assert ran.status == 0
    assert [row["accession"] for row in home.series()] == ["E5"]
