"""What a duration means: what a file holds, what is stored of it plainly, and what with --fallback.

Each row of the table is a series of its own on a server, in Explicit and in Implicit VR.
"""
import re
import struct
from decimal import Decimal
from typing import Any, NamedTuple

import pytest
from dicom_files import SIEMENS, instance, pixels, uid
from endpoint import Proxy
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydicom.uid import ExplicitVRBigEndian, ExplicitVRLittleEndian, ImplicitVRLittleEndian

import store_study_info as store

SYNTAXES = {"X": ExplicitVRLittleEndian, "I": ImplicitVRLittleEndian}
SPECTROSCOPY = "1.2.840.10008.5.1.4.1.1.4.2"
CSA, SDS = (0x0029, "SIEMENS CSA HEADER", 0x20), (0x0021, "SIEMENS MR SDS 01", 0x19)
MEDCOM = (0x0029, "SIEMENS MEDCOM HEADER", 0x20)
PROTOCOL_BYTES = 100_000    # real ones have 70 to 140 kB


# ------------------------------------------------------------------------------------------------------------------
# What files hold
# ------------------------------------------------------------------------------------------------------------------

def add_private(ds, place, value, vr="OB", block=0x10):
    group, creator, element = place
    ds.add_new(group << 16 | block, "LO", creator)
    ds.add_new(group << 16 | block << 8 | element, vr, value)


def text_of(total=None, repetitions=None, one=None) -> bytes:
    """A Siemens protocol's text; what is None stands not in it."""
    said = {"ucOneSeriesForAllMeas": one, "lRepetitions": repetitions, "lTotalScanTimeSec": total}
    lines = [f"{name}\t = \t{value}" for name, value in said.items() if value is not None]
    text = "\n".join(["### ASCCONV BEGIN ###", "lScanTimeSec = 7", "alRepetitionsDelayTimeMs.__attribute__.size = 64",
                      *lines, "### ASCCONV END ###"])
    return text.encode().ljust(PROTOCOL_BYTES, b" ")


def protocol(*numbers, place=CSA, block=0x10):
    return lambda ds: add_private(ds, place, text_of(*numbers), block=block)


def ge(microseconds: float, block=0x10, creator="GEMS_ACQU_01"):
    return lambda ds: add_private(ds, (0x0019, creator, 0x5A), microseconds, "FL", block)


def ge_of_unknown_vr(microseconds: float, order="<"):
    return lambda ds: add_private(ds, (0x0019, "GEMS_ACQU_01", 0x5A), struct.pack(order + "f", microseconds), "UN")


def both(*changes):
    return lambda ds: [change(ds) for change in changes]


class Row(NamedTuple):
    name: str
    held: dict[str, Any]        # arguments of `instance`
    plain: int | None           # seconds stored; None: the series is skipped
    fallback: int | None
    said: str = ""              # of it with -v and --fallback
    images: int = 1

    def accession(self, syntax: str) -> str:
        return f"E{syntax}{TABLE.index(self)}"


def siemens(name, ta, change, plain, fallback, said="", **elements) -> Row:
    return Row(name, {"ta": ta, "change": change, **elements}, plain, fallback, said)


def other(name, manufacturer, change, fallback, said="", images=1, **elements) -> Row:
    """A series of a maker that has no acquisition time: never stored without --fallback."""
    held = {"ta": None, "creator": None, "Manufacturer": manufacturer, "change": change, **elements}
    return Row(name, held, None, fallback, said, images)


def stated(seconds, fallback, manufacturer="Philips", said="", images=1, **elements) -> Row:
    return other(f"AcquisitionDuration {seconds} of {manufacturer}", manufacturer, None, fallback, said, images,
                 AcquisitionDuration=seconds, **elements)


DERIVED = {"ImageType": ["DERIVED", "PRIMARY", "ADC"]}
NOT_THE_SCAN = "of one frame, or in another unit"
AMBIGUOUS = 0x4C80004C.to_bytes(4, "little")     # 67 s, or 34 s read as big endian
LITTLE, BIG = struct.unpack("<f", AMBIGUOUS)[0], struct.unpack(">f", AMBIGUOUS)[0]

TABLE = [
    # the Siemens acquisition time, and its protocol
    siemens("no protocol", "TA 02:07", None, 127, 127),
    siemens("EPI of VB17", "TA 00.01", protocol(17, 1, "0x1"), 0, 17,
            "TA 00.01, 2 measurements: 17 s from the protocol (0029,1020)"),
    siemens("diffusion of VB17", "TA 00.04", protocol(450, None, "0x1"), 0, 450,
            "TA 00.04: 450 s from the protocol (0029,1020)"),
    siemens("diffusion of VD", "TA 00.04", protocol(864), 0, 864),
    siemens("a derived series of VB17", "TA 00.00", protocol(450), 0, 0, **DERIVED),
    siemens("a derived map without a time", None, protocol(450), None, None, **DERIVED),
    siemens("a derived map with repetitions", "TA 06.00", protocol(361, 59, 1), 6, 6, **DERIVED),
    siemens("the first volume of multiband EPI", "TA 11.59", protocol(19, 9, "0x1"), 12, 19),
    siemens("its other volumes", "TA 00.04", protocol(19, 9, "0x1"), 0, 19),
    siemens("many measurements in a series", "TA 00.48*5", protocol(78, 29, 1), 2, 78,
            "TA 00.48*5, 30 measurements: 78 s from the protocol (0029,1020)"),
    siemens("sixty of them", "TA 06.00", protocol(361, 59, "0x1"), 6, 361,
            "TA 06.00, 60 measurements: 361 s from the protocol (0029,1020)"),
    siemens("in one series where nothing says otherwise", "TA 06.00", protocol(361, 59), 6, 361),
    siemens("each measurement a series", "TA 04:15", protocol(516, 1, "0x4"), 255, 255),
    siemens("the other of the two", "TA 04:15", protocol(516, 1, "4"), 255, 255),
    siemens("each a series, below a minute", "TA 40.00", protocol(516, 9, "0x4"), 40, 40),
    siemens("each a series, of EPI", "TA 00.04", protocol(516, 1, "0x4"), 0, 258,
            "TA 00.04, one of 2 measurements: 258 s from the protocol (0029,1020)"),
    siemens("without repetitions", "TA 12.34", protocol(100, None, 1), 12, 12),
    siemens("no repetitions", "TA 12.34", protocol(100, 0, 1), 12, 12),
    siemens("eight tenths of the total", "TA 16.00", protocol(20, 1, 1), 16, 16),
    siemens("less than that", "TA 15.99", protocol(20, 1, 1), 16, 20),
    siemens("below a minute", "TA 59.99", protocol(600, 9, 1), 60, 600),
    siemens("a minute", "TA 01:00", protocol(600, 9, 1), 60, 60),
    siemens("the protocol in XA's place", "TA: 00.04 ", protocol(78, place=SDS), 0, 78,
            "TA: 00.04: 78 s from the protocol (0021,1019)"),
    siemens("a block that moved", "TA 00.04", protocol(78, block=0x12), 0, 78),
    siemens("two places, the first without a protocol", "TA 00.04",
            both(lambda ds: add_private(ds, CSA, b"nothing here"), protocol(78, place=SDS)), 0, 78),
    siemens("another creator's element", "TA 00.04", protocol(450, place=MEDCOM), 0, 0),
    siemens("a total of 0", "TA 00.04", protocol(0), 0, 0),
    siemens("a total of a day", "TA 00.04", protocol(86400), 0, 86400),
    siemens("a total above a day", "TA 00.04", protocol(86401), 0, 0),
    siemens("a share below a second", "TA 00.04", protocol(9, 9, 4), 0, 0),
    siemens("no total", "TA 00.04", protocol(None, 3), 0, 0),
    siemens("VB12, which has no group 0051", None, protocol(110), None, 110,
            "no TA: 110 s from the protocol (0029,1020)", creator=None),
    siemens("VB12, each measurement a series", None, protocol(330, 2, 4), None, 110, creator=None),
    siemens("a time that cannot be read", "Anon", protocol(110), None, 110),
    siemens("another creator in the time's place", "Anon", protocol(110), None, None, creator="Anon"),
    siemens("23:59:59", "TA: 23:59:59", None, 86399, 86399),
    siemens("a day", "TA: 24:00:00", None, 86400, 86400),
    siemens("above a day", "TA: 61:00:00", None, None, None, "duration (0051,100a) is not readable: 'TA: 61:00:00'"),
    siemens("far above a day", "TA 9999999*9999", None, None, None, "is not readable: 'TA 9999999*9999'"),
    siemens("a SAR that is not 0 and would become it", "TA 02:07", None, None, None, "is not readable: '1e-400'",
            sar="1e-400"),
    # AcquisitionDuration
    stated(35.4, 35, said="duration from AcquisitionDuration (0018,9073)"), stated(1280.0, 1280),
    stated(190713.0, 191, "UIH"), stated(34.0, None, "UIH", NOT_THE_SCAN), stated(0.0, None, "UIH", NOT_THE_SCAN),
    stated(16000.0, None, said="AcquisitionDuration (0018,9073) is 16000 s, " + NOT_THE_SCAN),
    stated(0.0, None, said=NOT_THE_SCAN), stated(1.0, 1), stated(0.99, None), stated(10800.0, 10800),
    stated(10800.5, None),
    stated(160.0, 160, "SIEMENS", sop_class=SPECTROSCOPY),
    stated(4.0, None, "SIEMENS", "AcquisitionDuration (0018,9073) is 4 s, of one average of several", 4,
           sop_class=SPECTROSCOPY),
    stated(256.0, 256, "SIEMENS", images=2),
    siemens("the acquisition time comes first", "TA 00.48", None, 0, 0, AcquisitionDuration=35.4),
    siemens("AcquisitionDuration before the protocol", None, protocol(110), None, 35, AcquisitionDuration=35.4),
    siemens("the protocol where AcquisitionDuration is of a part", None, protocol(110), None, 110,
            AcquisitionDuration=0.0),
    # GE
    other("GE", "GE MEDICAL SYSTEMS", ge(50000008.0), 50, "duration from GE's (0019,105a)"),
    other("GE's block moved", "GE MEDICAL SYSTEMS", ge(50000008.0, 0x13), 50, "duration from GE's (0019,135a)"),
    other("GE's number in another unit", "GE MEDICAL SYSTEMS", ge(50.0), None, NOT_THE_SCAN),
    other("GE's second", "GE MEDICAL SYSTEMS", ge(1e6), 1), other("GE's part of one", "GE", ge(999999.0), None),
    other("GE's three hours", "GE MEDICAL SYSTEMS", ge(10.8e9), 10800), other("GE's four", "GE", ge(14.4e9), None),
    other("GE's zero", "GE MEDICAL SYSTEMS", ge(0.0), None), other("GE below zero", "GE", ge(-50e6), None),
    other("not a number of GE's", "GE MEDICAL SYSTEMS", ge(float("nan")), None),
    other("another creator than GE's", "GE MEDICAL SYSTEMS", ge(50000008.0, creator="GEMS_PARM_01"), None),
    other("GE, VR UN", "GE MEDICAL SYSTEMS", ge_of_unknown_vr(50000008.0), 50),
    other("GE, VR UN and either order", "GE MEDICAL SYSTEMS", ge_of_unknown_vr(LITTLE), 67),
    other("GE, VR UN and something else", "GE MEDICAL SYSTEMS", lambda ds: add_private(
        ds, (0x0019, "GEMS_ACQU_01", 0x5A), b"50000008", "UN"), None),
    other("GE, AcquisitionDuration before its own", "GE MEDICAL SYSTEMS", ge(50000008.0), 35, AcquisitionDuration=35.4),
    other("GE with a number in the time's place", "GE MEDICAL SYSTEMS", ge(50000008.0), 50, creator="GEMS_FUNCTOOL_01",
          ta="-17"),
    # makers that state none
    other("Canon", "CANON_MEC", None, None), other("Hitachi", "HITACHI", None, None),
]
BIG_ENDIAN = {    # the seconds of files of Explicit VR Big Endian
    "EBIG1": (ge(50000008.0), 50), "EBIG2": (ge_of_unknown_vr(50000008.0, ">"), 50),
    "EBIG3": (ge_of_unknown_vr(BIG, ">"), round(BIG / 1e6)),
}
VOLUMES = {"EFIRST": ("TA 11.59", "TA 00.04"), "ELATER": ("TA 00.04", "TA 11.59")}


def table_files():
    for row in TABLE:
        for letter, syntax in SYNTAXES.items():
            for number in range(1, row.images + 1):
                yield instance(row.accession(letter), number=number, syntax=syntax, **row.held)
    for accession, (change, _) in BIG_ENDIAN.items():
        yield instance(accession, syntax=ExplicitVRBigEndian, ta=None, creator=None, change=change,
                       Manufacturer="GE MEDICAL SYSTEMS")
    for accession, times in VOLUMES.items():
        for number, ta in enumerate(times, 1):
            yield instance(accession, number=number, ta=ta, change=protocol(19, 9, 1))


class Stored(NamedTuple):
    seconds: dict[str, int]     # by accession
    said: str
    summary: str


@pytest.fixture(scope="module")
def archive(server):
    server.upload(*table_files())
    return server.settle()


ACCESSIONS = [row.accession(letter) for row in TABLE for letter in SYNTAXES]


def acquire(home, url, *options) -> Stored:
    ran = home.run("-v", *options, *ACCESSIONS, *BIG_ENDIAN, *VOLUMES, url=url)
    assert ran.status == 0, ran.err
    return Stored({row["accession"]: row["duration"] for row in home.series()}, ran.err, ran.summary)


@pytest.fixture(scope="module")
def homes(tmp_path_factory, warm):
    from conftest import Home
    return lambda name: Home(tmp_path_factory.mktemp(name), warm)


@pytest.fixture(scope="module")
def plain(archive, homes) -> Stored:
    return acquire(homes("plain"), archive.url)


@pytest.fixture(scope="module")
def fallback(archive, homes) -> Stored:
    return acquire(homes("fallback"), archive.url, "--fallback")


def named(row: Row) -> str:
    return row.name


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("row", TABLE, ids=named)
def test_without_fallback_only_the_siemens_tag_is_a_duration(plain, row, syntax):
    assert plain.seconds.get(row.accession(syntax)) == row.plain


@pytest.mark.parametrize("syntax", SYNTAXES)
@pytest.mark.parametrize("row", TABLE, ids=named)
def test_with_fallback_a_duration_is_that_of_the_scan(fallback, row, syntax):
    assert fallback.seconds.get(row.accession(syntax)) == row.fallback


@pytest.mark.parametrize("row", [row for row in TABLE if row.said], ids=named)
def test_v_names_the_source_or_the_reason(fallback, row):
    for syntax in SYNTAXES:
        of_series = re.findall(rf"DEBUG {row.accession(syntax)}: series 1 \([\d.]+\).*", fallback.said)
        assert any(row.said in line for line in of_series), of_series


@pytest.mark.parametrize("row", [row for row in TABLE if row.plain == row.fallback is not None], ids=named)
def test_v_names_no_source_where_it_is_the_siemens_tag(fallback, row):
    assert not re.search(rf"DEBUG {row.accession('X')}: .*(from|protocol)", fallback.said)


def test_the_summary_counts_durations_by_source(fallback, plain):
    origins = [(row.plain, row.fallback, row.name) for row in TABLE if row.fallback is not None]
    from_ge = sum(name.startswith("GE") and "Acq" not in name for _, _, name in origins)
    from_stated = sum(name.startswith("Acq") or "AcquisitionDuration before" in name for _, _, name in origins)
    changed = sum(now != before for before, now, _ in origins)
    below = sum(row.fallback == 0 for row in TABLE)
    parts = {"with the time of AcquisitionDuration": 2 * from_stated,
             "with the time of GE's private tag": 2 * from_ge + len(BIG_ENDIAN),
             "with the time of the Siemens protocol": 2 * (changed - from_ge - from_stated) + len(VOLUMES),
             "with a time below one second": 2 * below}
    assert {part: int(count) for count, part in re.findall(r", (\d+) stored ([^,]+)", fallback.summary)} == parts
    assert re.findall(r"stored (with [^,]+)", plain.summary) == ["with a time below one second"]
    assert "duration not of the scan: " in fallback.summary and "duration not of the scan" not in plain.summary


@pytest.mark.parametrize("accession", BIG_ENDIAN)
def test_ge_s_bytes_are_read_in_the_order_in_which_they_were_stored(fallback, accession):
    assert fallback.seconds.get(accession) == BIG_ENDIAN[accession][1]


def test_with_fallback_the_result_is_the_same_whichever_volume_came_first(plain, fallback):
    assert [plain.seconds[accession] for accession in VOLUMES] == [12, 0]
    assert [fallback.seconds[accession] for accession in VOLUMES] == [19, 19]


# ------------------------------------------------------------------------------------------------------------------
# What it costs
# ------------------------------------------------------------------------------------------------------------------

def picture(change=None):
    def added(ds):
        pixels(ds, 512)
        if change:
            change(ds)
    return added


COSTS = {    # what --fallback costs more: requests of a series without SAR or with it
    "ECOSTSIEMENS": (siemens("", "TA 02:07", picture(protocol(127)), 0, 0), 0),
    "ECOSTEPI": (siemens("", "TA 00.04", picture(protocol(450)), 0, 0), 1),
    "ECOSTREPEATED": (siemens("", "TA 06.00", picture(protocol(361, 59)), 0, 0), 1),
    "ECOSTDERIVED": (siemens("", "TA 00.04", picture(protocol(450)), 0, 0, **DERIVED), 0),
    "ECOSTNOPROTOCOL": (siemens("", "TA 00.04", picture(), 0, 0), 0),
    "ECOSTNOSAR": (siemens("", "TA 00.04", picture(protocol(450)), 0, 0, sar=None), 0),
    "ECOSTXA": (siemens("", "TA: 00.04 ", picture(both(
        lambda ds: add_private(ds, CSA, b"no total"), protocol(78, place=SDS))), 0, 0), 2),
    "ECOSTGE": (other("", "GE MEDICAL SYSTEMS", picture(ge(50e6)), 0), 0),
    "ECOSTGEUN": (other("", "GE MEDICAL SYSTEMS", picture(ge_of_unknown_vr(50000008.0)), 0), 1),
    "ECOSTGENONE": (other("", "GE MEDICAL SYSTEMS", picture(
        lambda ds: ds.add_new(0x00190010, "LO", "GEMS_ACQU_01")), 0), 1),
    "ECOSTGENOSAR": (other("", "GE MEDICAL SYSTEMS", picture(ge_of_unknown_vr(50000008.0)), 0, sar=None), 0),
    "ECOSTCANON": (other("", "CANON_MEC", picture(), 0, PatientID="P-Müller"), 0),
    "ECOSTPHILIPS": (other("", "Philips", picture(), 0, AcquisitionDuration=35.4), 0),
}


@pytest.fixture(scope="module")
def costs(server):
    server.upload(*(instance(accession, study=accession, number=number, **row.held)
                    for accession, (row, _) in COSTS.items() for number in (1, 2)))
    return server.settle()


@pytest.mark.parametrize("accession", COSTS)
def test_fallback_costs_a_request_where_it_reads_a_protocol_or_ge_s_bytes_and_no_image(costs, home, accession):
    with Proxy(costs.url) as proxy:
        home.run(accession, url=proxy.url)
        before, bytes_before = len(proxy.requests), proxy.sent
        proxy.forget()
        assert home.run("--force", "--fallback", accession, url=proxy.url).status == 0
        more = len(proxy.requests) - before
        taken = proxy.sent - bytes_before
    assert more == COSTS[accession][1]
    assert taken < 2000 + (PROTOCOL_BYTES if more else 0), "an image would be 524,288"


@pytest.mark.parametrize("place", [2, 5, 6])
def test_the_protocol_gets_its_requests_also_where_the_second_look_was_dear(server, home, place):
    """The first instances are of a private class; within six requests in all."""
    def odd(ds):
        for tag in (0x00181316, 0x00510010, 0x0051100A):
            del ds[tag]
    server.upload(instance("EDEAR", series="plain"),
                  *(instance(f"EDEAR{place}", number=number, ta="TA 00.04", change=odd if number < place else both(
                      lambda ds: add_private(ds, CSA, b"no total"), protocol(450, place=SDS)))
                    for number in range(1, 9)))
    server.settle()
    with Proxy(server.url) as proxy:
        home.run("EDEAR", url=proxy.url)
        usual = len(proxy.requests)
        proxy.forget()
        home.run("--fallback", f"EDEAR{place}", url=proxy.url)
        assert len(proxy.requests) - usual <= 6
    stored = [row["duration"] for row in home.series(f"EDEAR{place}")]
    assert stored == [450] or place == 6 and not server.extended and not stored, "rather no number than a wrong one"


# ------------------------------------------------------------------------------------------------------------------
# What holds for any file
# ------------------------------------------------------------------------------------------------------------------

class Told(store.Orthanc):
    """A server that tells these raw contents."""

    def __init__(self, contents: dict[str, bytes]):
        super().__init__(None)    # type: ignore[arg-type]
        self.contents = contents

    def instance_of(self, series):
        return "an instance"

    def content(self, instance, *path):
        return self.contents.get(path[-1])

    def is_big_endian(self, instance):
        return False


numbers = st.one_of(st.none(), st.integers(-2, 2 * 10 ** 5),
                    st.sampled_from([0, 1, 59, 86400, 86401, "0x1", "0x4", "x"]))
times = st.one_of(st.none(), st.sampled_from(["TA 00.04", "TA 00.00", "TA 06.00", "TA 59.99", "TA 99:99:99", "Anon"]),
                  st.from_regex(r"TA [0-9]{2}[.:][0-5][0-9](\*[0-9]{1,4})?", fullmatch=True))
texts = st.one_of(st.none(), st.floats().map(str), st.floats(0, 2e4).map(str), st.floats(0, 2e10).map(str),
                  st.sampled_from(["", "0", "1e-400", "1e400", "-1"]))
makers = st.sampled_from([None, "SIEMENS", "UIH", "GE MEDICAL SYSTEMS", "Philips"])
kinds = st.sampled_from(["ORIGINAL\\PRIMARY", "DERIVED\\PRIMARY"])


@settings(max_examples=500)
@given(times, texts, texts, st.binary(max_size=8), st.tuples(numbers, numbers, numbers), makers, kinds)
@example("TA 00.04", None, None, b"", (86401, None, None), "SIEMENS", "ORIGINAL\\PRIMARY")
@example("TA 00.04", None, None, b"", (3, 99, 4), "SIEMENS", "ORIGINAL\\PRIMARY")
@example(None, "0.5", "999999", b"", (0, None, None), None, "ORIGINAL\\PRIMARY")
@example(None, None, None, struct.pack("<f", 2e10), (None, None, None), None, "ORIGINAL\\PRIMARY")
def test_with_fallback_a_duration_is_from_a_second_to_a_day_unless_the_siemens_tag_alone_says_so(
        ta, stated_text, ge_text, ge_raw, of_protocol, maker, kind):
    header = {"0018,1316": "0.5", "0051,0010": SIEMENS if ta else None, "0051,100a": ta, "0018,9073": stated_text,
              "0019,0010": "GEMS_ACQU_01", "0019,105a": ge_text, "0029,0010": "SIEMENS CSA HEADER",
              "0008,0070": maker, "0008,0008": kind, "0020,1209": "1"}
    told = Told({"0019,105a": ge_raw, "0029,1020": text_of(*of_protocol)})
    series = store.Series("an id", "a study", True, header, ())
    values = store._process_series(told, series, store.Options(fallback=True))
    seconds, by_tag = values.duration.value, store.acquisition_time(ta)
    assert seconds is None or 1 <= seconds <= 86400 or seconds == by_tag
    assert values.origin or seconds == by_tag
    assert by_tag is None or by_tag < 60 or seconds == by_tag
    assert "DERIVED" not in kind or values.origin != store.FROM_PROTOCOL
    assert (seconds is None) == (values.duration.reason in store.REASONS)


@pytest.mark.parametrize("text, ta, expected", [
    (b"lTotalScanTimeSec = 450\n", None, 450), (b"lTotalScanTimeSec=864", "0.04", 864),
    (b"lScanTimeSec                             = 438\n"
     b"lTotalScanTimeSec                        = 450\nlTotalScanTimeSecOther = 3\n", "0", 450),
    (b"\0\1\xff### ASCCONV BEGIN ###\nulVersion\t = \t0x1\nlTotalScanTimeSec\t = \t17\n### ASCCONV END ###\0",
     None, 17),
    # of a name that stands twice the first; other names do not count
    (b"lTotalScanTimeSec = 17\nlTotalScanTimeSec = 450", None, 17),
    (b"sOld.lTotalScanTimeSec = 3\nlTotalScanTimeSec = 17\nxlTotalScanTimeSec = 4", None, 17),
    (b"lTotalScanTimeSec = 78\nlRepetitions = 0x1D", "2.4", 78),
    (b"lTotalScanTimeSec = 078\nlRepetitions = 09", "2", 78),
    (b"", None, None), (b"lTotalScanTimeSec", None, None), (b"lTotalScanTimeSec = ", None, None),
    (b"lTotalScanTimeSec = -1", None, None), (b"lTotalScanTimeSec = abc", None, None),
    (b"lTotalScanTimeSec = 4.5", None, None), (b"lTotalScanTimeSec = 12x", None, None),
    (b"lTotalScanTimeSec = 99999999999", None, None), (b"lScanTimeSec = 438", None, None),
])
def test_the_protocol_tells_its_total_time(text, ta, expected):
    assert store.protocol_duration(text, None if ta is None else Decimal(ta))[0] == expected


def test_a_series_keeps_its_uid_and_its_row_whatever_the_source(archive, home):
    row = next(row for row in TABLE if row.name == "GE")
    assert home.run("--fallback", row.accession("X"), url=archive.url).status == 0
    (found,) = home.series()
    assert (found["series_uid"], found["sar"], found["duration"]) == (uid(row.accession("X"), 1), 0.5, 50)
