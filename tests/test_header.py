"""Reading a header: which element a value comes from, and the reason where there is none."""
import functools
import gzip
import importlib.util
import io
import json
import pathlib
from decimal import Decimal

import pydicom
import pytest
from conftest import check_row
from hypothesis import given, settings
from hypothesis import strategies as st

import dicom_files
import store_study_info as store
from dicom_files import ENHANCED_MR, SIEMENS

property_test = settings(max_examples=200)

read_values = store.read_values    # a header -> what of it is stored of a series, or why nothing is

GE = "GEMS_FUNCTOOL_01"


def header(**elements) -> dict:
    """A header by hexadecimal tag as the server writes it: header(t0018_1316="0.5") is {"0018,1316": "0.5"}."""
    return {name[1:].replace("_", ","): value for name, value in elements.items()}


def siemens(**elements) -> dict:
    """What is asked for of a classic Siemens image."""
    return header(t0051_0010=SIEMENS, t0051_100a="TA 02:07", t0018_1316="0.5", t0008_0070="SIEMENS",
                  t0008_0016="1.2.840.10008.5.1.4.1.1.4") | header(**elements)


# ------------------------------------------------------------------------------------------------------------------
# Elements and private blocks
# ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("value, expected", [
    ("HEAD", "HEAD"), ("HEAD \0", "HEAD"), ("", None), ("  ", None), (None, None), ([], None),
    ([{"0008,0100": "1"}], None),
])
def test_an_element_is_its_text_without_padding(value, expected):
    assert store.get_element({"0018,0015": value}, "0018,0015") == expected


def test_an_absent_element_is_none():
    assert store.get_element({}, "0018,0015") is None


@pytest.mark.parametrize("found, expected", [
    (header(t0051_0010=SIEMENS), "0051,100a"),
    (header(t0051_0010=SIEMENS + " "), "0051,100a"),
    (header(t0051_0010="Siemens MR Header"), "0051,100a"),
    (header(t0051_0011=SIEMENS), "0051,110a"),
    (header(t0051_0010=GE, t0051_0011=SIEMENS), "0051,110a"),
    (header(t0051_0010="", t0051_0012=SIEMENS), "0051,120a"),
    (header(t0051_0013=SIEMENS), "0051,130a"),
    (header(t0051_0010=GE), None),
    (header(t0051_0010="SIEMENS MR HEADER 2"), None),
    (header(t0051_0010="SIEMENS CSA HEADER"), None),
    (header(t0051_0010=None, t0051_100a="TA 01:00"), None),
    (header(t0029_0010=SIEMENS), None),
    ({}, None),
])
def test_a_private_element_is_where_its_creator_reserved_a_block(found, expected):
    assert store.private_tag(found, "0051", SIEMENS, "0a") == expected


def test_private_blocks_of_other_groups_are_found_too():
    found = header(t0029_0010="SIEMENS MEDCOM HEADER", t0029_0011="SIEMENS CSA HEADER", t0021_0010="SIEMENS MR SDS 01")
    assert store.private_tag(found, "0029", "SIEMENS CSA HEADER", "20") == "0029,1120"
    assert store.private_tag(found, "0021", "SIEMENS MR SDS 01", "19") == "0021,1019"


@pytest.mark.parametrize("found, expected", [
    (header(t0051_0010=SIEMENS, t0051_100a=None), "0051,100a"),         # VR UN, or a file in Implicit VR
    (header(t0051_0010=SIEMENS), "0051,100a"),
    (header(t0051_0010=GE, t0051_0011=SIEMENS, t0051_110a=None), "0051,110a"),
    (header(t0051_0010=SIEMENS, t0051_100a="TA 01:00"), None),           # there it is
    (header(t0051_0010=SIEMENS, t0051_100a=""), None),                   # the server read it: it is empty
    (header(t0051_0010=SIEMENS, t0051_100a="Anon"), None),
    (header(t0051_0010=GE, t0051_100a=None), None),                      # other vendors' series cost nothing more
    (header(t0051_0010="Anon", t0051_100a=None), None),
    (header(t0051_0010=None, t0051_100a=None), None),
    ({}, None),
])
def test_a_time_may_be_hidden_only_where_the_siemens_creator_is_seen(found, expected):
    assert store.undecoded_time(found) == expected


# ------------------------------------------------------------------------------------------------------------------
# SAR and duration, and why there is none
# ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    ("0.5", 0.5), ("0.1 ", 0.1), ("0", 0.0), ("0.06399572588428", 0.06399572588428)])
def test_sar_is_read(text, expected):
    assert store.extract_sar({"0018,1316": text}) == (expected, None, "")


@pytest.mark.parametrize("found, reason, said", [
    ({}, "SAR absent", "absent"),
    ({"0018,1316": None}, "SAR absent", "absent"),
    ({"0018,1316": ""}, "SAR absent", "empty"),
    ({"0018,1316": "  "}, "SAR absent", "empty"),
    ({"0018,1316": "abc"}, "SAR not readable", "'abc'"),
    ({"0018,1316": "NaN"}, "SAR not readable", "'NaN'"),
    ({"0018,1316": "-0.5"}, "SAR not readable", "'-0.5'"),
    ({"0018,1316": "1e999"}, "SAR not readable", "'1e999'"),
    ({"0018,1316": "0.1\\0.2"}, "SAR not readable", "0.1\\0.2"),
])
def test_a_missing_sar_has_a_reason(found, reason, said):
    reading = store.extract_sar(found)
    assert (reading.value, reading.reason) == (None, reason)
    assert said in reading.detail and "0018,1316" in reading.detail


@pytest.mark.parametrize("found, seconds", [
    (header(t0051_0010=SIEMENS, t0051_100a="TA 02:07*6"), "762"),
    (header(t0051_0010=SIEMENS + "\0", t0051_100a="TA: 12.35 "), "12.35"),
    # the block has moved, because another was there first
    (header(t0051_0011=SIEMENS, t0051_110a="TA 01:00"), "60"),
    (header(t0051_0010=GE, t0051_100a="-1534", t0051_0011=SIEMENS, t0051_110a="TA 01:00"), "60"),
    (header(t0051_0010=GE, t0051_100a="TA 05:00", t0051_0011=SIEMENS, t0051_110a="TA 01:00"), "60"),
    # no creator at all
    (header(t0051_100a="TA 01:00"), "60"),
    (header(t0051_0010=None, t0051_100a="TA 01:00"), "60"),
    (header(t0051_0010="", t0051_100a="TA 01:00"), "60"),
])
def test_the_acquisition_time_is_read_where_siemens_keeps_it(found, seconds):
    assert store.extract_duration(found) == (Decimal(seconds), None, "")


@pytest.mark.parametrize("found, reason, said", [
    ({}, "duration absent", "absent"),
    (header(t0051_0010=SIEMENS), "duration absent", "absent"),
    (header(t0051_0010=SIEMENS, t0051_100a=None), "duration absent", "absent"),
    (header(t0051_0010=SIEMENS, t0051_100a=""), "duration absent", "empty"),
    (header(t0051_0010=SIEMENS, t0051_100a=" "), "duration absent", "empty"),
    (header(t0051_100a=""), "duration absent", "empty"),
    # another block's element is not taken
    (header(t0051_0011=SIEMENS, t0051_100a="TA 01:00"), "duration absent", "0051,110a"),
    (header(t0051_0010=SIEMENS, t0051_100a="Anon"), "duration not readable", "'Anon'"),
    (header(t0051_0010=SIEMENS, t0051_100a="TA 02:60"), "duration not readable", "'TA 02:60'"),
    (header(t0051_0010=SIEMENS, t0051_100a="-3"), "duration not readable", "'-3'"),
    (header(t0051_100a="Anon"), "duration not readable", "'Anon'"),
    # another vendor's, however much it looks like seconds
    (header(t0051_0010=GE, t0051_100a="-1534"), "another vendor's tag", GE),
    (header(t0051_0010=GE, t0051_100a="1534"), "another vendor's tag", GE),
    (header(t0051_0010="Anon", t0051_100a="TA 01:00"), "another vendor's tag", "Anon"),
])
def test_a_missing_duration_has_a_reason(found, reason, said):
    reading = store.extract_duration(found)
    assert (reading.value, reading.reason) == (None, reason)
    assert said in reading.detail


def test_all_reasons_come_from_a_closed_list():
    assert store.REASONS == ("SAR absent", "SAR not readable", "duration absent", "duration not readable",
                             "another vendor's tag", "duration not of the scan")


@pytest.mark.parametrize("text", ["a\x1b[2Jb", "\nforged line", "x" * 5000])
def test_a_reason_shows_a_text_short_and_without_control_characters(text):
    for reading in (store.extract_sar({"0018,1316": text}), store.extract_duration({"0051,100a": text}),
                    store.extract_duration({"0051,0010": text, "0051,100a": text})):
        assert reading.detail.isprintable() and len(reading.detail) < 200


any_value = st.one_of(
    st.none(), st.text(max_size=12),
    st.sampled_from([SIEMENS, "SIEMENS", "MR", "0.5", "-1", "-0", "NaN", "1e999", "9" * 400, "9223372036854775808",
                     "None", "TA 01:00", "TA 99999:59*9999", "\0", "\ud800", "\x1b[2J", "040Y", "99999999"]),
    st.lists(st.dictionaries(st.sampled_from(store.FALLBACK_TAGS), st.text(max_size=5), max_size=2), max_size=2))
any_header = st.dictionaries(st.sampled_from(sorted({*store.SERIES_TAGS, *store.FALLBACK_TAGS})), any_value)


@property_test
@given(any_header)
def test_any_header_gives_values_or_reasons_and_each_value_keeps_its_column(found):
    values = read_values(found)
    for value in (values.sar, values.duration):
        assert (value.value is None) == (value.reason in store.REASONS) == bool(value.detail)
        assert value.value is None or value.value >= 0
    assert type(store.may_be_elsewhere(values)) is bool
    assert values.missing == [value for value in (values.sar, values.duration) if value.reason is not None]
    check_row("studies", store.extract_study([found, {}], "E1"))
    if not values.missing:
        check_row("series", store.extract_series(values, "E1") | {"series_uid": "1.2"})    # there is one, seen before


# ------------------------------------------------------------------------------------------------------------------
# A second look at other instances
# ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("change, expected", [
    # one private-class or Raw Data object among the images, Siemens or of no vendor named
    (header(t0018_1316=None), True),
    (header(t0051_100a=None), True),
    (header(t0018_1316=None, t0051_0010=None, t0051_100a=None), True),
    (header(t0018_1316=None, t0051_0010=None, t0051_100a=None, t0008_0016="1.3.12.2.1107.5.9.1"), True),
    (header(t0018_1316=None, t0051_0010=None, t0051_100a=None, t0008_0070=None), True),
    (header(t0018_1316="", t0051_100a=""), True),
    (header(t0018_1316=None, t0008_0070="Siemens Healthineers"), True),
    (header(t0018_1316=None, t0020_1209="545"), True),
    # nothing lacks, or what is there cannot be read: that is not for lack of the element
    ({}, False),
    (header(t0018_1316="abc"), False),
    (header(t0051_100a="Anon"), False),
    # another vendor explains it
    (header(t0018_1316=None, t0051_0010=GE), False),
    (header(t0051_0010=GE, t0051_100a=None), False),
    (header(t0051_0010="Anon", t0051_100a=None), False),
    (header(t0051_0010=None, t0051_100a=None, t0008_0070="GE MEDICAL SYSTEMS"), False),
    (header(t0051_0010=None, t0051_100a=None, t0008_0070="Philips Medical Systems"), False),
    (header(t0051_0010=None, t0051_100a=None, t0008_0070="UIH"), False),
    # so does an enhanced object, and spectroscopy: there it is nested
    (header(t0018_1316=None, t0008_0016=ENHANCED_MR), False),
    (header(t0018_1316=None, t0008_0016="1.2.840.10008.5.1.4.1.1.4.2"), False),
    # there are no others
    (header(t0018_1316=None, t0020_1209="1"), False),
])
def test_other_instances_are_looked_at_only_where_nothing_explains_the_lack(change, expected):
    assert store.may_be_elsewhere(read_values(siemens() | change)) is expected


# ------------------------------------------------------------------------------------------------------------------
# Rows
# ------------------------------------------------------------------------------------------------------------------

def test_the_row_of_a_series():
    found = siemens(t0051_100a="TA 50.40*2", t0020_000e="1.2.3\0", t0020_0011=" 7 ", t0008_103e="t1 mprage ",
                    t0018_9005="*tfl", t0018_0024="tfl3d1_16ns ")
    assert store.extract_series(read_values(found), "E1") == {
        "series_uid": "1.2.3", "accession": "E1", "sar": 0.5, "duration": 101, "series_number": 7,
        "series_description": "t1 mprage", "pulse_sequence_name": "*tfl", "sequence_name": "tfl3d1_16ns"}


@pytest.mark.parametrize("missing", ["", "  ", "\0", None])
def test_missing_texts_and_numbers_of_a_series_are_null(missing):
    found = siemens(t0020_000e="1.2.3", t0020_0011=missing, t0008_103e=missing, t0018_9005=missing, t0018_0024=missing)
    row = store.extract_series(read_values(found), "E1")
    assert [column for column, value in row.items() if value is None] == [
        "series_number", "series_description", "pulse_sequence_name", "sequence_name"]


@pytest.mark.parametrize("text, stored", [("TA 00.29*50", 15), ("TA 00.49", 0), ("TA 00.50", 1), ("TA 02.50", 3)])
def test_the_stored_duration_is_rounded_half_up_after_multiplying(text, stored):
    row = store.extract_series(read_values(siemens(t0051_100a=text, t0020_000e="1.2.3")), "E1")
    assert row["duration"] == stored and type(row["duration"]) is int


def test_the_duration_of_a_moved_block_is_stored():
    found = header(t0051_0010=GE, t0051_100a="-1534", t0051_0011=SIEMENS, t0051_110a="TA 01:00", t0018_1316="0.5",
                   t0020_000e="1.2.3")
    assert store.extract_series(read_values(found), "E1")["duration"] == 60


def test_the_row_of_a_study():
    found = header(t0008_0050="E1 ", t0010_0020="P1\0", t0010_1010="040Y", t0010_1020="1.8796037616667",
                   t0010_1030="67.00 ", t0010_0040="F ", t0010_2160="W", t0018_0015="HEAD", t0008_1090="Prisma ",
                   t0008_0020="20240427", t0008_1030="Head  routine ")
    assert store.extract_study([found], "E1") == {
        "accession": "E1", "patient_id": "P1", "age": 40, "height": 1.8796037616667, "weight": 67.0, "sex": "F",
        "ethnic_group": "W", "body_part": "HEAD",
        "manufacturer_model": "Prisma", "study_date": "20240427", "study_description": "Head  routine"}


def test_missing_values_of_a_study_are_null():
    found = header(t0010_1010="*** ", t0010_1020="", t0010_1030="abc", t0010_0040=" ", t0018_0015=None)
    row = store.extract_study([found], "E1")
    assert row.pop("accession") == "E1"
    assert set(row.values()) == {None} and len(row) == 10


def numbered(number, uid, **elements) -> dict:
    return header(t0020_0011=number, t0020_000e=uid) | header(**elements)


@pytest.mark.parametrize("headers, expected", [
    # by number, not as text and not in the order of the answer
    ([numbered("10", "1.1", t0018_0015="ten"), numbered("9", "1.2", t0018_0015="nine")], "nine"),
    ([numbered("2", "1.1", t0018_0015="two"), numbered("-1", "1.2", t0018_0015="minus")], "minus"),
    ([numbered("747197466", "1.1", t0018_0015="huge"), numbered("3", "1.2", t0018_0015="three")], "three"),
    # the same number twice: by UID
    ([numbered("1", "1.3", t0018_0015="later"), numbered("1", "1.2", t0018_0015="earlier")], "earlier"),
    # without a number: last
    ([numbered(None, "1.1", t0018_0015="none"), numbered("5", "1.2", t0018_0015="five")], "five"),
    ([numbered("x", "1.1", t0018_0015="none"), numbered("5", "1.2", t0018_0015="five")], "five"),
    # the first that has one
    ([numbered("1", "1.1"), numbered("2", "1.2", t0018_0015="two"), numbered("3", "1.3", t0018_0015="three")], "two"),
    ([numbered("1", "1.1", t0018_0015=" "), numbered("2", "1.2", t0018_0015="two")], "two"),
    ([numbered("1", "1.1"), numbered("2", "1.2")], None),
])
def test_a_study_value_comes_from_the_first_series_that_has_it(headers, expected):
    assert store.extract_study(headers, "E1")["body_part"] == expected
    assert store.extract_study(headers[::-1], "E1")["body_part"] == expected


def test_each_study_value_is_looked_for_on_its_own():
    row = store.extract_study([numbered("1", "1.1", t0010_1010="*** ", t0010_1030="70"),
                               numbered("2", "1.2", t0010_1010="040Y", t0010_1030="71", t0008_1090="Prisma")], "E1")
    assert (row["age"], row["weight"], row["manufacturer_model"]) == (40, 70.0, "Prisma")


def test_a_value_of_0_is_a_value():
    row = store.extract_study([numbered("1", "1.1", t0010_1010="000Y", t0010_1020="0"),
                               numbered("2", "1.2", t0010_1010="040Y", t0010_1020="1.8")], "E1")
    assert (row["age"], row["height"]) == (0, 0.0)


# ------------------------------------------------------------------------------------------------------------------
# Elsewhere in the file
# ------------------------------------------------------------------------------------------------------------------

def groups(*items) -> list:
    """Functional groups with the SAR items (definition, value) in the MR timing macro."""
    sar = [{"0018,9179": definition, "0018,9181": value} for definition, value in items]
    return [{"0018,9112": [{"0018,0080": "2000", "0018,9239": sar}]}]


@pytest.mark.parametrize("given_groups, expected", [
    (groups(("IEC_WHOLE_BODY", "0.0243")), 0.0243),
    (groups(("IEC_WHOLE_BODY ", "0.0243 ")), 0.0243),
    (groups(("IEC_LOCAL", "5.0"), ("IEC_HEAD", "1.2"), ("IEC_PARTIAL_BODY", "0.9"), ("IEC_WHOLE_BODY", "0.0243")),
     0.0243),
    (groups(("SMR_B1RMS", "2.31"), ("IEC_WHOLE_BODY", "0.0243")), 0.0243),
    (groups(("IEC_WHOLE_BODY", "0.0243"), ("SMR_B1RMS", "2.31")), 0.0243),
    (groups(("IEC_WHOLE_BODY", "0")), 0.0),
    (groups(("SMR_B1RMS", "2.31")), None),
    (groups(("IEC_HEAD", "1.2")), None),
    (groups(("IEC_WHOLE_BODY", "abc")), None),
    (groups(("IEC_WHOLE_BODY", "-1")), None),
    (groups(("IEC_WHOLE_BODY", "nan")), None),
    (groups(("IEC_WHOLE_BODY", None)), None),
    (groups((None, "0.0243")), None),
    (groups(("", "0.0243")), None),
    (groups(), None),
    # not where the standard has it
    ([{"0018,9239": [{"0018,9179": "IEC_WHOLE_BODY", "0018,9181": "0.0243"}]}], None),
    ([{}], None), ([], None), (None, None), ("", None), ("0.0243", None), ([None], None), ([["x"]], None),
    ([{"0018,9112": "text"}], None),
    ([{"0018,9112": [{"0018,9239": None}]}], None), ([{"0018,9112": [{"0018,9239": "text"}]}], None), ({}, None),
])
def test_sar_of_an_enhanced_object_is_its_whole_body_item(given_groups, expected):
    assert store.whole_body_sar(given_groups) == expected


GROUP_TAGS = ["0018,9112", "0018,9239", "0018,9179", "0018,9181"]
json_values = st.recursive(
    st.none() | st.text(max_size=5) | st.sampled_from(["IEC_WHOLE_BODY", "1.5"]), max_leaves=12,
    extend=lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(GROUP_TAGS), inner, max_size=4))


@property_test
@given(json_values)
def test_functional_groups_of_any_shape_give_a_sar_or_none(value):
    sar = store.whole_body_sar(value)
    assert sar is None or type(sar) is float and sar >= 0


def stated(found: dict) -> store.Value:
    """The duration of a header that has no acquisition time, by AcquisitionDuration; no server is asked."""
    series = store.Series("", "", True, found, ())
    return store.stated_time(None, series, read_values(found)).duration    # type: ignore[arg-type]


@pytest.mark.parametrize("text, manufacturer, expected", [
    ("333.39047241210938", "Philips Medical Systems", "333.39047241210938"),
    ("64.5", "SIEMENS", "64.5"), ("64.5 ", None, "64.5"), ("1", "SIEMENS", "1"), ("10800", None, "10800"),
    # UIH writes milliseconds
    ("190713.0", "UIH", "190.713"), ("190713", "UIH ", "190.713"), ("190713.0", "uih", "190.713"),
    ("", "SIEMENS", None), (None, "SIEMENS", None), ("abc", "SIEMENS", None), ("-5", "SIEMENS", None),
    ("nan", "SIEMENS", None), ("1e999", "SIEMENS", None), ("1e-400", "SIEMENS", None),
    # of one frame, or in another unit
    ("0", "SIEMENS", None), ("0.999", None, None), ("34.0", "UIH", None), ("16000.0", "SIEMENS", None),
])
def test_the_stated_duration_is_in_seconds(text, manufacturer, expected):
    value = stated(header(t0018_9073=text, t0008_0070=manufacturer)).value
    assert (value is None) == (expected is None)
    assert value is None or float(value) == float(expected), "FD is a double"


# ------------------------------------------------------------------------------------------------------------------
# Real files
# ------------------------------------------------------------------------------------------------------------------

@functools.lru_cache
def real_file(name: str) -> pydicom.Dataset:
    """A file that nibabel carries for its own tests."""
    spec = importlib.util.find_spec("nibabel")
    assert spec and spec.origin
    path = pathlib.Path(spec.origin).parent / "nicom" / "tests" / "data" / name
    data = path.read_bytes()
    return pydicom.dcmread(io.BytesIO(gzip.decompress(data) if name.endswith(".gz") else data))


def as_orthanc_tells(ds: pydicom.Dataset, implicit: bool) -> dict:
    """The header in the form of `tags?short`: hexadecimal tag -> text, null or a list of items; no bulk data.

    A private element of an Implicit VR file is null, save for the creators: its VR cannot be known.
    """
    told: dict[str, str | list | None] = {}
    for element in ds:
        tag = f"{element.tag.group:04x},{element.tag.element:04x}"
        if tag == "5200,9230":
            continue    # the per-frame groups are never asked for
        if element.VR == "SQ":
            told[tag] = [as_orthanc_tells(item, implicit) for item in element.value]
        elif element.VR in ("OB", "OW", "UN") or implicit and is_private_value(element):
            told[tag] = None
        else:
            several = isinstance(element.value, (list, pydicom.multival.MultiValue))
            values = element.value if several else [element.value]
            texts = ["" if value is None else str(getattr(value, "original_string", value)) for value in values]
            told[tag] = "\\".join(texts).strip(" \0")
    return told


def is_private_value(element: pydicom.DataElement) -> bool:
    return element.tag.is_private and not element.tag.is_private_creator


def told_of(name: str) -> tuple[pydicom.Dataset, dict]:
    ds = real_file(name)
    return ds, as_orthanc_tells(ds, ds.file_meta.TransferSyntaxUID.is_implicit_VR)


DWI = ["0.dcm", "1.dcm", "siemens_dwi_0.dcm.gz", "siemens_dwi_1000.dcm.gz"]


@pytest.mark.parametrize("name", DWI)
def test_a_real_implicit_vr_file_hides_its_acquisition_time(name):
    ds, told = told_of(name)
    found = read_values(told)
    assert found.sar == (0.421666, None, "")
    assert found.duration.reason == "duration absent"
    assert store.undecoded_time(told) == "0051,100a"
    assert ds[0x0051100A].value == "TA 00.04", "what an independent reader makes of it"
    read = read_values(told | {"0051,100a": "TA 00.04"})
    assert not read.missing and read.duration.value == Decimal("0.04")


@pytest.mark.parametrize("name", DWI)
def test_the_protocol_of_a_real_diffusion_scan_tells_the_total_that_its_time_does_not(name):
    ds, told = told_of(name)
    assert store.private_tag(told, "0029", "SIEMENS CSA HEADER", "20") == "0029,1020"
    assert store.protocol_duration(ds[0x00291020].value, Decimal("0.04")) == (450, "")
    assert "DERIVED" not in told["0008,0008"].split("\\")


@pytest.mark.parametrize("name, sequence", [("0.dcm", "ep_b0"), ("1.dcm", "ep_b0"), ("siemens_dwi_0.dcm.gz", "ep_b0"),
                                            ("siemens_dwi_1000.dcm.gz", "ep_b1000#1")])
def test_the_row_of_a_real_diffusion_series(name, sequence):
    _, told = told_of(name)
    row = store.extract_series(read_values(told | {"0051,100a": "TA 00.04"}), "E1")
    assert row == {
        "series_uid": "1.3.12.2.1107.5.2.32.35119.2010011420292594820699190.0.0.0", "accession": "E1", "sar": 0.421666,
        "duration": 0, "series_number": 12, "series_description": "CBU_DTI_64D_1A", "pulse_sequence_name": None,
        "sequence_name": sequence}


@pytest.mark.parametrize("name, expected", [
    ("0.dcm", {
        "age": None, "height": None, "weight": None, "sex": "F", "body_part": None, "manufacturer_model": "TrioTim",
        "study_date": "20100114", "study_description": "CBU^Neuroimaging"}),
    ("siemens_dwi_0.dcm.gz", {
        "patient_id": None, "age": None, "height": None, "weight": None, "sex": None, "body_part": None,
        "manufacturer_model": "TrioTim", "study_date": "20100114"}),
    ("csa_slice_norm.dcm", {
        "patient_id": "Anon", "age": 99, "height": None, "weight": 11.3398106925, "sex": "F",
        "manufacturer_model": "TrioTim", "study_date": "19000101"}),
    ("decimal_rescale.dcm", {
        "age": 99, "height": None, "weight": 90.71848554, "sex": "M", "manufacturer_model": "TrioTim"}),
    ("slicethickness_empty_string.dcm", {
        "age": 0, "height": 1.0, "weight": 1.0, "sex": "N/A", "body_part": "BRAIN", "manufacturer_model": "Prisma",
        "study_date": "20150101"}),
    ("philips_mprage.dcm.gz", {
        "age": None, "height": None, "weight": 100.0, "sex": "O", "ethnic_group": None, "body_part": "ORBIT",
        "manufacturer_model": "Achieva", "study_date": "20120310"}),
])
def test_the_study_row_of_a_real_file(name, expected):
    row = store.extract_study([told_of(name)[1]], "E1")
    assert {column: row[column] for column in expected} == expected


@pytest.mark.parametrize("name, sar, reason", [
    # creator and value both made "Anon"
    ("csa_slice_norm.dcm", 0.06399572588428, "another vendor's tag"),
    ("decimal_rescale.dcm", 0.00262783826098, "another vendor's tag"),
    # a projection: the creator is there, the time is not
    ("slicethickness_empty_string.dcm", 0.27354506973324, "duration absent"),
])
def test_real_files_without_a_time(name, sar, reason):
    found = read_values(told_of(name)[1])
    assert (found.sar.value, found.duration.reason) == (sar, reason)


def test_a_real_enhanced_file_of_another_vendor_is_read_by_fallback_only():
    ds, told = told_of("philips_mprage.dcm.gz")
    found = read_values(told)
    assert (found.sar.reason, found.duration.reason) == ("SAR absent", "duration absent")
    assert store.undecoded_time(told) is None and not store.may_be_elsewhere(found)
    assert store.whole_body_sar(told["5200,9229"]) == pytest.approx(0.024275561794638634, rel=1e-15)
    seconds = stated(told).value
    assert seconds and float(seconds) == pytest.approx(333.3904724121094, rel=1e-15)
    assert store.get_element(told, "0018,9005") == "T1TFE"


def test_made_files_read_like_the_server_reads_them():
    """The stand-in for the server in this file, held against a file of known content."""
    ds = pydicom.dcmread(io.BytesIO(dicom_files.instance("E7", sar="0.25 ", ta="TA: 12.35 ", block=0x11)))
    told = json.loads(json.dumps(as_orthanc_tells(ds, False)))
    found = read_values(told)
    assert (found.sar.value, found.duration.value, told["0008,0050"]) == (0.25, Decimal("12.35"), "E7")
