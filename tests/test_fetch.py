"""What ends up in the database, from a real Orthanc: the program run as its users run it."""
import contextlib
import re
import sqlite3

import pytest
from conftest import on_one_day
from dicom_files import ENHANCED_MR, functional_group, instance, study, uid
from endpoint import Proxy
from pydicom.dataset import Dataset
from pydicom.uid import ExplicitVRBigEndian, ImplicitVRLittleEndian


def without(ds, *tags):
    for tag in tags:
        del ds[tag]


def raw_object(ds):
    """What a private-class object among the images looks like: neither SAR nor private block."""
    without(ds, 0x00181316, 0x00510010, 0x0051100A)
    ds.SOPClassUID = "1.3.12.2.1107.5.9.1"


def un_time(ds):
    """A private element whose VR was lost on the way."""
    value = ds[0x0051100A].value
    ds.add_new(0x0051100A, "UN", value.encode())


def enhanced(ds, per_frame=False, value=0.25, kind="IEC_WHOLE_BODY"):
    without(ds, 0x00181316, 0x00510010, 0x0051100A)
    ds.SOPClassUID = ENHANCED_MR
    group = functional_group(("SMR_B1RMS", 9.0), (kind, value))
    ds.AcquisitionDuration = 35.4
    if per_frame:
        ds.SharedFunctionalGroupsSequence, ds.PerFrameFunctionalGroupsSequence = [Dataset()], [group] * 40
    else:
        ds.SharedFunctionalGroupsSequence = [group]


def protocol(ds, seconds=450, creator="SIEMENS CSA HEADER", place=0x00290010, element=0x00291020):
    ds.add_new(place, "LO", creator)
    ds.add_new(element, "OB", b"ulVersion = 0x14b44b6\nlTotalScanTimeSec = %d\nlScanTimeSec = 7\n" % seconds)


def split_scan():
    """One accession, scanned over midnight: two studies."""
    return [instance("ESPLIT", study=f"split {day}", series=series, StudyDate=f"2024{day}", PatientID="P-split",
                     SeriesNumber=series)
            for day, numbers in (("0430", (1, 2)), ("0501", (3, 4, 5))) for series in numbers]


TIMES = [    # as written, as stored, whether it is below one second: that is no scan's
    ("TA 00.00", 0, True), ("TA 00.04", 0, True), ("TA 00.04*2", 0, True), ("TA 00.99", 1, True),
    ("TA 01.00", 1, False), ("TA 00.48*5", 2, False), ("TA 02:07", 127, False),
]
ARCHIVE = [
    *study("EPLAIN", series=3),
    *study("eplain", series=1, StudyDate="20240427"),
    *study("EDAYA", series=1, StudyDate="20240312"), *study("EDAYB", series=1, StudyDate="20240311"),
    *study("XDAY", series=1, StudyDate="20240311"),
    *study("eday", series=1, StudyDate="20240311"),
    *split_scan(),
    *study("EWI*D", series=1, StudyDate="20240201"), *study("EWILD", series=1, StudyDate="20240202"),
    *study("EWI\\D", series=1, StudyDate="20240203"),
    *study("ECT", series=2, Modality="CT", StudyDate="20240315"),
    *study("EMIX", series=1), instance("EMIX", series=7, Modality="SR"), instance("EMIX", series=8, Modality="OT"),
    *study("EPAT", study="pat a", series=1, StudyDate="20240101"),
    *study("EPAT", study="pat b", series=1, StudyDate="20240102"),
    *study("ECLASHA", study="clash a", series=1, StudyDate="20230101"),
    instance("ECLASHB", study="clash b", series=1, SeriesInstanceUID=uid("clash a", 1), StudyDate="20230101"),
    instance("EMOVED", block=0x11, ta="TA 02:07*6"),
    instance("EGE", creator="GEMS_FUNCTOOL_01", ta="-17", Manufacturer="GE MEDICAL SYSTEMS"),
    instance("ENOCREATOR", creator=None, ta="TA: 00:03:11"),
    instance("EUN", change=un_time), instance("EIMPLICIT", syntax=ImplicitVRLittleEndian, ta="TA 50.40*2"),
    instance("EIMPLICITMOVED", syntax=ImplicitVRLittleEndian, block=0x12, ta="TA 50.40*2"),
    instance("EBIG", syntax=ExplicitVRBigEndian),
    instance("EUMLAUT", study="uml", PatientID="Mu\u0308ller ß", syntax=ImplicitVRLittleEndian),
    *(instance("EODD", number=number, change=raw_object if number == 1 else None, SequenceName=f"*b{number}")
      for number in (1, 7, 3, 5)),
    *(instance("EODDUN", number=number, syntax=ImplicitVRLittleEndian, change=raw_object if number == 1 else None)
      for number in (1, 2, 3)),
    *(instance("EORDER", number=number, sar=f"0.{number}", SequenceName=f"*b{number}") for number in (7, 2, 9, 1)),
    *(instance("EVA", number=number, creator=None, ta=None) for number in range(1, 10)),
    *(instance("EPHILIPS", number=number, creator=None, ta=None, Manufacturer="Philips") for number in range(1, 10)),
    *(instance("EDIED", number=number, creator="Anon", ta="Anon") for number in range(1, 5)),
    instance("EBAD", series=1, ta="TA soon"), instance("EBAD", series=2, sar="-1"), instance("EBAD", series=3, sar=""),
    instance("EBAD", series=4, sar=None, ta=None, creator=None),
    instance("ENOSAR", syntax=ImplicitVRLittleEndian, sar=None), instance("EBAD", series=5), instance("EBAD", series=6),
    *(instance("ESHORT", series=series, ta=text) for series, (text, _, _) in enumerate(TIMES, 1)),
    instance("EENHANCED", series=1, change=enhanced),
    instance("EENHANCED", series=2, change=lambda ds: enhanced(ds, per_frame=True, value=0.5)),
    instance("EENHANCED", series=3, change=lambda ds: enhanced(ds, kind="HEAD")),
    instance("EPROTOCOL", series=1, ta="TA 00.04", change=protocol),
    instance("EPROTOCOL", series=2, ta="TA 00.04", change=protocol, ImageType=["DERIVED", "PRIMARY"]),
    instance("EPROTOCOL", series=3, ta="TA 00.00",
             change=lambda ds: protocol(ds, 78, "SIEMENS MR SDS 01", 0x00210010, 0x00211019)),
    instance("EPROTOCOL", series=4, ta="TA 05:00", change=protocol),
    instance("EUIH", creator=None, ta=None, Manufacturer="UIH", AcquisitionDuration=190713.0),
    instance("EVALUES", series=1, SeriesNumber=3, PatientAge=None, PatientSize=None, ManufacturerModelName=None,
             EthnicGroup=""),
    instance("EVALUES", series=2, SeriesNumber=747197466, PatientAge="018M", PatientSize=" 1.8796037616667",
             ManufacturerModelName="Skyra\0"),
    instance("EVALUES", series=3, SeriesNumber=4, PatientAge="", PatientSize="67.00 ", ManufacturerModelName="Other",
             SeriesDescription="  t1 mprage  ", SequenceName="", PulseSequenceName=None),
]


@pytest.fixture(scope="module")
def archive(server):
    server.upload(*ARCHIVE)
    return server.settle()


def test_the_values_of_an_accession_are_those_of_its_files(archive, home):
    assert home.run("EPLAIN", url=archive.url).status == 0
    assert home.studies() == [{
        "accession": "EPLAIN", "patient_id": "P-EPLAIN", "age": 40, "height": 1.75, "weight": 70.5, "sex": "F",
        "ethnic_group": "W", "body_part": "HEAD",
        "manufacturer_model": "Prisma", "study_date": "20240427", "study_description": "Head"}]
    assert home.series() == [{
        "series_uid": uid("EPLAIN", number), "accession": "EPLAIN", "sar": 0.5, "duration": 60, "series_number": number,
        "series_description": f"series {number}", "pulse_sequence_name": "tfl",
        "sequence_name": "*tfl3d1"} for number in (1, 2, 3)]


def test_study_values_come_from_the_first_series_by_number_that_has_them(archive, home):
    home.run("EVALUES", url=archive.url)
    (row,) = home.studies()
    assert (row["age"], row["height"], row["manufacturer_model"], row["ethnic_group"]) == (1, 67.0, "Other", "W")
    assert [row["series_number"] for row in home.series()] == [3, 4, 747197466]
    assert [row["series_description"] for row in home.series()][1] == "t1 mprage"
    assert [(row["sequence_name"], row["pulse_sequence_name"]) for row in home.series()][1] == (None, None)


def test_a_named_accession_is_matched_exactly(archive, home):
    ran = home.run("EPLAIN", "EPLAI", "Eplain", url=archive.url)
    assert ran.status == 1
    assert [row["accession"] for row in home.studies()] == ["EPLAIN"]
    assert "EPLAI: there is no such accession" in ran.err
    assert "Eplain: there is no such accession" in ran.err and "the server has EPLAIN, eplain" in ran.err


def test_a_day_finds_only_accessions_that_begin_with_a_capital_e(archive, home):
    ran = home.run("20240311", url=archive.url)
    assert (ran.status, ran.printed) == (0, ["EDAYB"])


def test_order_is_by_study_date_then_accession_whatever_the_order_of_the_tokens(archive, home):
    ran = home.run("20240312", "20240427", "20240311", "202403", url=archive.url)
    assert ran.printed[:2] == ["EDAYB", "EDAYA"]
    rest = ran.printed[2:]
    assert len(rest) > 10 and rest == sorted(set(rest))


def test_only_date_tokens_print_and_an_accession_named_both_ways_is_printed_once(archive, home):
    assert home.run("EDAYB", url=archive.url).out == ""
    assert home.run("EDAYA", "20240312", "202403", url=archive.url).printed == ["EDAYA"]


def test_stored_accessions_are_skipped_without_being_printed(archive, home):
    assert home.run("20240311-20240312", url=archive.url).printed == ["EDAYB", "EDAYA"]
    ran = home.run("202403", url=archive.url)
    assert (ran.status, ran.printed) == (0, [])
    assert "0 stored, 2 already stored" in ran.summary


def test_force_acquires_again_what_is_stored(archive, home):
    home.run("EDAYB", url=archive.url)
    ran = home.run("--force", "20240311", url=archive.url)
    assert ran.printed == ["EDAYB"] and "1 stored, 0 already stored" in ran.summary


def test_a_date_without_studies_is_no_failure_and_leaves_an_empty_database(archive, home):
    ran = home.run("19990101", url=archive.url)
    assert (ran.status, ran.out) == (0, "")
    assert home.studies() == []


@pytest.mark.parametrize("runs", [
    [["20240430"]], [["20240501"]], [["ESPLIT"]], [["20240430", "20240501"]],
    [["20240430"], ["20240501"]], [["20240501"], ["20240430"]], [["202404"], ["202405"]],
    [["20240430"], ["--force", "20240501"]], [["20240501"], ["--force", "20240430"]],
], ids=str)
def test_an_accession_split_over_midnight_is_always_whole(archive, home, runs):
    for arguments in runs:
        assert home.run(*arguments, url=archive.url).status == 0
    assert [row["series_number"] for row in home.series("ESPLIT")] == [1, 2, 3, 4, 5]
    assert [row["study_date"] for row in home.studies() if row["accession"] == "ESPLIT"] == ["20240430"]


def test_a_stored_accession_is_fetched_again_when_its_date_is_none_that_was_found(archive, home):
    """Where that brings nothing else than what is stored, it counts as already stored and is not printed."""
    home.run("20240430", url=archive.url)
    again = home.run("20240501", url=archive.url)
    assert (again.status, again.printed) == (0, []) and "studies: 0 stored, 1 already stored" in again.summary
    with contextlib.closing(sqlite3.connect(home.db)) as conn, conn:
        conn.execute("DELETE FROM series WHERE series_uid = (SELECT min(series_uid) FROM series)")
    assert home.run("20240501", url=archive.url).printed == ["ESPLIT"]
    assert home.run("20240430", "20240501", url=archive.url).printed == []


def test_an_accession_whose_mr_study_is_of_another_date_settles(fresh, home):
    """CT on the 30th, MR on the 1st: the stored date is never that of the token."""
    server = fresh()
    server.upload(instance("ETWO", study="ct", StudyDate="20240430", Modality="CT", sar=None, ta=None),
                  instance("ETWO", study="mr", StudyDate="20240501"))
    server.settle()
    assert home.run("20240430", url=server.url).printed == ["ETWO"]
    with Proxy(server.url) as proxy:
        again = home.run("20240430", url=proxy.url)
        told = [kind for kind in proxy.kinds if kind in ("find series", "series", "tags")]
        assert len(proxy.requests) <= (5 if server.extended else 6 if server.answers_tags else 9), proxy.kinds
    assert (again.status, again.printed) == (0, []) and "studies: 0 stored, 1 already stored" in again.summary
    assert told and again.err.count("WARNING") == 0


def test_patient_ids_are_those_of_all_studies_also_without_mr_series(fresh, home):
    server = fresh()
    server.upload(instance("EPAIR", study="ct", PatientID="P-1", Modality="CT", sar=None, ta=None),
                  instance("EPAIR", study="mr", PatientID="P-2"))
    server.settle()
    ran = home.run("EPAIR", url=server.url)
    assert ran.status == 0 and "WARNING EPAIR: its studies have 2 different patient IDs" in ran.err
    assert "P-1" not in ran.err and home.studies()[0]["patient_id"] == "P-2"


def test_an_accession_with_a_wildcard_is_stored_without_the_others_that_it_matches(archive, home):
    ran = home.run("20240201", "20240203", url=archive.url)
    assert (ran.status, ran.printed) == (0, ["EWI*D", "EWI\\D"])
    assert sorted((row["accession"], row["series_uid"]) for row in home.series()) == [
        ("EWI*D", uid("EWI*D", 1)), ("EWI\\D", uid("EWI\\D", 1))]


def test_a_study_without_mr_series_is_a_failure_only_when_named(archive, home):
    by_date = home.run("20240315", url=archive.url)
    assert (by_date.status, by_date.out) == (0, "") and "ECT: has no MR series" in by_date.err
    named = home.run("ECT", "20240315", url=archive.url)
    assert named.status == 1 and "ECT: has no MR series" in named.err
    assert home.studies() == []


def test_series_of_other_modalities_are_left_out(archive, home):
    assert home.run("EMIX", url=archive.url).status == 0
    assert [row["series_number"] for row in home.series()] == [1]


def test_different_patient_ids_under_one_accession_are_warned_of_and_not_told(archive, home):
    ran = home.run("EPAT", url=archive.url)
    assert ran.status == 0 and "WARNING EPAT: its studies have 2 different patient IDs" in ran.err
    assert "P-pat" not in ran.err
    assert len(home.series("EPAT")) == 2 and home.studies()[0]["patient_id"] == "P-pat a"


def test_a_series_stored_under_another_accession_is_never_moved(archive, home):
    ran = home.run("ECLASHA", "ECLASHB", url=archive.url, env={})
    assert ran.status == 1
    series = f"series {uid('clash a', 1)} of ECLASHB"
    assert f"ERROR ECLASHB: not stored: {series} is stored under accession ECLASHA already; see 'One" in ran.err
    assert [row["accession"] for row in home.studies()] == ["ECLASHA"] and len(home.series("ECLASHA")) == 1


@pytest.mark.parametrize("accession, duration", [
    ("EMOVED", 762), ("ENOCREATOR", 191), ("EUN", 60), ("EIMPLICIT", 101), ("EIMPLICITMOVED", 101), ("EBIG", 60),
    ("EUMLAUT", 60)])
def test_the_acquisition_time_is_found_wherever_and_however_it_is_stored(archive, home, accession, duration):
    assert home.run(accession, url=archive.url).status == 0
    assert [row["duration"] for row in home.series()] == [duration]


def test_the_first_instance_received_gives_the_values(archive, home):
    home.run("EORDER", url=archive.url)
    assert [(row["sar"], row["sequence_name"]) for row in home.series()] == [(0.7, "*b7")]


def test_a_series_whose_first_instance_lacks_them_takes_all_values_from_the_next_that_has_them(archive, home):
    home.run("EODD", "EODDUN", url=archive.url)
    possible = ["*b7"] if archive.own_index else ["*b3", "*b5", "*b7"]    # the next received, where that is known
    (row,) = home.series("EODD")
    assert (row["sar"], row["duration"]) == (0.5, 60) and row["sequence_name"] in possible
    assert [(row["sar"], row["duration"]) for row in home.series("EODDUN")] == [(0.5, 60)]


@pytest.mark.parametrize("accession, least, most", [
    # nothing explains the lack: a few other instances are looked at
    ("EVA", 1, 6), ("EODD", 1, 6), ("EODDUN", 1, 6),
    ("EPHILIPS", 0, 0), ("EGE", 0, 0), ("EDIED", 0, 0), ("EENHANCED", 0, 0)])
def test_a_second_look_costs_at_most_six_requests_and_none_where_the_vendor_explains_it(archive, home, accession,
                                                                                        least, most):
    with Proxy(archive.url) as proxy:
        home.run("EDAYA", url=proxy.url)
        plain = len(proxy.requests)     # what one series costs; on older servers each further one costs one more
        proxy.forget()
        assert home.run(accession, url=proxy.url).status == 0
        further_series = 2 if accession == "EENHANCED" and not archive.answers_tags else 0
        assert least <= len(proxy.requests) - plain - further_series <= most


def test_a_time_that_was_not_asked_for_is_not_called_absent(archive, home):
    """The server tells no private elements of Implicit VR files, and without SAR the series is not stored anyway."""
    ran = home.run("-v", "ENOSAR", url=archive.url)
    assert (f"ENOSAR: series 1 ({uid('ENOSAR', 1)}) skipped: SAR (0018,1316) is absent; "
            "duration (0051,100a) is not given by the server and, without SAR, not asked for") in ran.err


def test_every_skipped_series_has_a_reason_that_is_counted_and_with_v_named(archive, home):
    ran = home.run("-v", "EBAD", "EGE", "EVA", url=archive.url)
    assert ran.status == 0
    for accession, series, said in (("EBAD", 1, "duration (0051,100a) is not readable: 'TA soon'"),
                                    ("EBAD", 2, "SAR (0018,1316) is not readable: '-1'"),
                                    ("EBAD", 3, "SAR (0018,1316) is empty"),
                                    ("EBAD", 4, "SAR (0018,1316) is absent; duration (0051,100a) is absent"),
                                    ("EGE", 1, "(0051,100a) belongs to 'GEMS_FUNCTOOL_01'"),
                                    ("EVA", 1, "duration (0051,100a) is absent")):
        assert f"{accession}: series {series} ({uid(accession, series)}) skipped: {said}" in ran.err
    assert ("2 stored, 6 skipped (SAR absent: 2, SAR not readable: 1, duration absent: 1, duration not readable: 1, "
            "another vendor's tag: 1)") in ran.summary


def test_a_time_below_one_second_is_stored_as_it_rounds_and_reported(archive, home):
    ran = home.run("-v", "ESHORT", url=archive.url)
    assert [row["duration"] for row in home.series()] == [duration for _, duration, _ in TIMES]
    named = re.findall(r"ESHORT: series (\d) \([\d.]+\) has an acquisition time of 0\.\d\d s", ran.err)
    assert list(map(int, named)) == [series for series, (_, _, short) in enumerate(TIMES, 1) if short]
    assert "4 stored with a time below one second" in ran.summary


def test_the_reasons_are_not_told_one_by_one_without_v(archive, home):
    ran = home.run("EBAD", url=archive.url)
    assert "2 stored, 4 skipped" in ran.summary and "skipped:" not in ran.err


def test_fallback_is_off_by_default(archive, home):
    home.run("EENHANCED", "EUIH", "EPROTOCOL", url=archive.url)
    assert [(row["accession"], row["series_number"], row["duration"]) for row in home.series()] == [
        ("EPROTOCOL", 1, 0), ("EPROTOCOL", 2, 0), ("EPROTOCOL", 3, 0), ("EPROTOCOL", 4, 300)]


def test_fallback_reads_sar_and_duration_elsewhere_and_v_names_the_source(archive, home):
    ran = home.run("-v", "--fallback", "EENHANCED", "EUIH", "EPROTOCOL", url=archive.url)
    assert ran.status == 0
    assert [(row["accession"], row["series_number"], row["sar"], row["duration"]) for row in home.series()] == [
        ("EENHANCED", 1, 0.25, 35), ("EENHANCED", 2, 0.5, 35),
        ("EPROTOCOL", 1, 0.5, 450), ("EPROTOCOL", 2, 0.5, 0), ("EPROTOCOL", 3, 0.5, 78), ("EPROTOCOL", 4, 0.5, 300),
        ("EUIH", 1, 0.5, 191)]
    for accession, source in (("EENHANCED", "SAR from the whole-body item"),
                              ("EUIH", "duration from AcquisitionDuration (0018,9073)"),
                              ("EPROTOCOL", "TA 00.04: 450 s from the protocol (0029,1020)")):
        assert f"{accession}: series 1 ({uid(accession, 1)}): {source}" in ran.err
    assert "SAR absent: 1" in ran.summary


def test_fallback_downloads_no_large_enhanced_object(server, home):
    """2,000 frames are 2 MB of header; what is needed of them are a few bytes."""
    def many_frames(ds):
        enhanced(ds, per_frame=True, value=0.5)
        frame = ds.PerFrameFunctionalGroupsSequence[0]
        frame.add_new(0x00209111, "SQ", [Dataset() for _ in range(4)])
        for item in frame[0x00209111].value:
            item.FrameComments = "x" * 100
        ds.PerFrameFunctionalGroupsSequence = [frame] * 2000

    server.upload(instance("ELARGE", change=many_frames))
    server.settle()
    with Proxy(server.url) as proxy:
        assert home.run("--fallback", "ELARGE", url=proxy.url).status == 0
        assert [row["sar"] for row in home.series()] == [0.5]
        taken = proxy.sent
    if server.extended:
        assert taken < 100_000
    assert not [request.path for request in proxy.requests if request.path.endswith("5200-9230")]


def test_a_study_that_is_still_arriving_is_not_stored_unless_forced(servers, home):
    arriving = servers(StableAge=600)
    arriving.upload(*study("EARRIVES", series=2))
    for arguments in (["EARRIVES"], ["20240427"]):
        ran = home.run(*arguments, url=arriving.url)
        assert (ran.status, ran.out, home.studies()) == (1, "", [])
        assert "ERROR EARRIVES: is still arriving" in ran.err and "1 failed" in ran.summary
    assert home.run("--force", "EARRIVES", url=arriving.url).status == 0
    assert len(home.series()) == 2
    arriving.upload(instance("EARRIVES", series=3))
    assert home.run("--force", "EARRIVES", url=arriving.url).status == 0
    assert len(home.series()) == 3


def test_a_study_stored_on_its_own_study_date_is_warned_of(server, home):
    def run(today):
        server.upload(*study("ETODAY", series=1, StudyDate=f"{today:%Y%m%d}"))
        server.settle()
        return home.run("today", url=server.url)
    ran = on_one_day(run)
    assert ran.status == 0 and "ETODAY" in ran.printed
    assert "WARNING ETODAY: stored on its own study date" in ran.err and "--force" in ran.err


def test_force_replaces_the_set_of_series(fresh, home):
    server = fresh()
    server.upload(*study("ESET", series=3, instances=1))
    server.settle()
    home.run("ESET", url=server.url)
    server.client.delete("/series/" + server.find_id("Series", SeriesInstanceUID=uid("ESET", 2))).raise_for_status()
    server.client.delete("/series/" + server.find_id("Series", SeriesInstanceUID=uid("ESET", 3))).raise_for_status()
    server.upload(instance("ESET", series=3, sar="0.75"), instance("ESET", series=4))
    server.settle()
    assert home.run("ESET", url=server.url).status == 0
    assert [row["series_number"] for row in home.series()] == [1, 2, 3]
    assert home.run("-f", "ESET", url=server.url).status == 0
    assert [(row["series_number"], row["sar"]) for row in home.series()] == [(1, 0.5), (3, 0.75), (4, 0.5)]


def test_without_force_nothing_stored_is_changed_or_taken_out(fresh, home):
    """Half of a split scan can be gone from the server when the other is asked for; --fallback can have been given."""
    server = fresh()
    server.upload(instance("EHALF", study="half a", series=1, StudyDate="20240427", ta="TA 00.04", change=protocol),
                  instance("EHALF", study="half b", series=2, StudyDate="20240428"))
    server.settle()
    assert home.run("--fallback", "20240427", url=server.url).status == 0
    server.client.delete("/series/" + server.find_id("Series", SeriesInstanceUID=uid("half b", 2))).raise_for_status()
    server.upload(instance("EHALF", study="half c", series=3, StudyDate="20240429"))
    server.settle()
    ran = home.run("20240429", url=server.url)
    assert ran.status == 0
    assert "WARNING EHALF: 1 stored series were not on the server this time and stay as they are" in ran.err
    assert [(row["series_number"], row["duration"]) for row in home.series()] == [(1, 450), (2, 60), (3, 60)]
    assert home.run("--force", "EHALF", url=server.url).status == 0
    assert [(row["series_number"], row["duration"]) for row in home.series()] == [(1, 0), (3, 60)]


@pytest.mark.parametrize("padded, token", [
    *((" E88", token) for token in ("202404", "20240411", "20240412", "E88")),
    *((padded, token) for padded in ("  E88", "\tE88", "E88\t") for token in ("202404", "20240412"))])
def test_an_accession_that_one_study_has_padded_is_stored_whole(fresh, home, padded, token):
    """With one leading blank a find by name brings it; however else it is padded, by its date it is known."""
    server = fresh()
    server.upload(*study("E88", study="plain", series=2, instances=1, StudyDate="20240411"),
                  *study(padded, study="padded", series=1, instances=1, StudyDate="20240412"))
    server.settle()
    stored = {uid("plain", 1), uid("plain", 2), uid("padded", 1)}
    assert home.run(token, url=server.url).status == 0
    assert {row["series_uid"] for row in home.series()} == stored
    assert home.studies()[0]["study_date"] == "20240411"
    again = home.run("20240411-20240412", url=server.url)
    assert (again.status, again.out) == (0, "") and "0 stored, 1 already stored, 0 failed" in again.summary
    assert {(row["series_uid"], row["accession"]) for row in home.series()} == {(one, "E88") for one in stored}


@pytest.mark.parametrize("place, options", [(3, []), (3, ["--fallback"]), (4, []), (5, [])])
def test_a_time_that_only_a_later_instance_has_is_found_within_six_requests(fresh, home, place, options):
    """All have SAR and the creator, so that each time that is null may be one that Orthanc does not decode."""
    server = fresh()
    if not server.own_index:
        pytest.skip("no order of reception")
    server.upload(*(instance("ELATE", number=number, ta="TA 01:00" if number == place else None)
                    for number in range(1, 9)))
    server.settle()
    assert home.run(*options, "ELATE", url=server.url).status == 0
    # Two requests for each instance on the way where no find tells of all of them
    assert [row["duration"] for row in home.series()] == ([60] if server.extended or place < 5 else [])


def test_the_second_look_is_among_the_series_own_instances_where_two_patients_share_its_uid(fresh, home):
    server = fresh()
    shared = {"SeriesInstanceUID": uid("shared series"), "StudyInstanceUID": uid("shared")}
    server.upload(*(instance("EFIRST", study="first", number=number, **shared) for number in range(1, 8)),
                  *(instance("ESECOND", study="second", number=number, sar="0.25",
                             change=raw_object if number == 1 else None, **shared) for number in range(1, 4)))
    server.settle()
    assert home.run("ESECOND", url=server.url).status == 0
    assert [row["sar"] for row in home.series()] == [0.25]
