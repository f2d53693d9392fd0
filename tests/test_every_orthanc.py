"""The same values from every server, whatever its version, its index and its settings."""
import pytest
from dicom_files import instance, study, uid
from pydicom.uid import ImplicitVRLittleEndian


def without_sar(ds):
    """One of a private class among images: neither SAR nor the private block."""
    for tag in (0x00181316, 0x00510010, 0x0051100A):
        del ds[tag]


def functool(series: int, number: str) -> bytes:
    """GE keeps a signed number where Siemens has the time."""
    return instance("EGE", series=series, creator="GEMS_FUNCTOOL_01", ta=number, Manufacturer="GE MEDICAL SYSTEMS",
                    StudyDate="20240404")


def of_several(accession: str, numbers: tuple[int, ...], **more) -> list[bytes]:
    """One series whose instances, received in this order, disagree about everything."""
    return [instance(accession, number=number, sar=f"0.{number}", ta=f"TA 0{number}:00", SequenceName=f"*b{number}",
                     StudyDate="20240407", **(more if number == numbers[0] else {})) for number in numbers]


FULL = "20240420"    # a day of more studies than the limit
FILES = [
    *study("EPLAIN", series=3, StudyDate="20240403"),
    instance("EIMPLICIT", ta="TA 50.40*2", syntax=ImplicitVRLittleEndian, StudyDate="20240403"),
    instance("EGE", series=1, StudyDate="20240404"),
    *(functool(series, text) for series, text in ((2, "17"), (3, "-17"))),
    *(instance("ESPLIT", study=f"split {date}", series=series, PatientID="P-ESPLIT", StudyDate=date)
      for date, several in (("20240405", (1, 2)), ("20240406", (3, 4, 5))) for series in several),
    *of_several("EFIRST", (1, 7, 3, 5), change=without_sar),
    *of_several("EORDER", (7, 2, 9, 1)),
    instance(" E77", study="padded", PatientID="P-E77", StudyDate="20240408"),
    instance("E78", StudyDate="20240408"),
    instance("E5", StudyDate="20240409"), instance("e5", sar="0.9", StudyDate="20240409"),
    *(instance(f"EMANY{number}", StudyDate=FULL) for number in range(8)),
]
PLAIN = (0.5, 60)
EXPECTED = {    # {accession: (study date, {series: (SAR, duration)})}, those with one value wherever it comes from
    "EPLAIN": ("20240403", {uid("EPLAIN", series): PLAIN for series in (1, 2, 3)}),
    "EIMPLICIT": ("20240403", {uid("EIMPLICIT", 1): (0.5, 101)}),
    "EGE": ("20240404", {uid("EGE", 1): PLAIN}),
    "ESPLIT": ("20240405", {uid(f"split {date}", series): PLAIN for date, several in
                            (("20240405", (1, 2)), ("20240406", (3, 4, 5))) for series in several}),
    "E77": ("20240408", {uid("padded", 1): PLAIN}),
    "E78": ("20240408", {uid("E78", 1): PLAIN}),
    "E5": ("20240409", {uid("E5", 1): PLAIN}),
    **{f"EMANY{number}": (FULL, {uid(f"EMANY{number}", 1): PLAIN}) for number in range(8)},
}
# {accession: instances that its one series may be stored with, the one that it is where the order received is known}
OF_SEVERAL = {"EFIRST": ((3, 5, 7), 7), "EORDER": ((1, 2, 7, 9), 7)}
ALL = sorted({*EXPECTED, *OF_SEVERAL})

LIMITS = {"LimitFindResults": 5, "LimitFindInstances": 5}
NEVER = {"StorageAccessOnFind": "Never"}
EXTRA = {"ExtraMainDicomTags": {"Series": ["SAR", "0051,100a"]}}
SETTINGS: dict[str, dict] = {"default": {}, "never": NEVER, "limits": LIMITS, "extra": NEVER | EXTRA}


@pytest.fixture(scope="module", params=SETTINGS)
def archive(request, servers):
    if request.param == "extra" and not servers(Name="every Orthanc").answers_tags:
        pytest.skip("servers before 1.11 know no ExtraMainDicomTags")
    server = servers(Name="every Orthanc", **SETTINGS[request.param])
    server.upload(*FILES)
    return server.settle()


def check(home, server, accessions) -> None:
    """What is stored is these accessions, each with its expected values."""
    assert [row["accession"] for row in home.studies()] == sorted(accessions)
    for row in home.studies():
        name = row["accession"]
        date = EXPECTED[name][0] if name in EXPECTED else "20240407"
        assert row == {
            "accession": name, "patient_id": f"P-{name}", "age": 40, "height": 1.75, "weight": 70.5, "sex": "F",
            "ethnic_group": "W", "body_part": "HEAD", "manufacturer_model": "Prisma", "study_date": date,
            "study_description": "Head"}
        stored = {one["series_uid"]: (one["sar"], one["duration"]) for one in home.series(name)}
        if name in EXPECTED:
            assert stored == EXPECTED[name][1], name
        else:
            possible, first = OF_SEVERAL[name]
            numbers = [first] if server.own_index else possible
            assert stored in [{uid(name, 1): (number / 10, 60 * number)} for number in numbers], name


def hides(server) -> bool:
    """Whether its limit cuts an answer that was to hold everything, so that nothing can reach the rest."""
    everything = {"Level": "Study", "Query": {}, "Since": 0, "Limit": 0}
    return len(server.client.post("/tools/find", json=everything).json()) < len(ALL)


def test_a_month_is_stored_with_the_same_values(archive, home):
    ran = home.run("202404", url=archive.url)
    if hides(archive):
        stored = [row["accession"] for row in home.studies()]
        assert ran.status == 1 and f"ERROR {FULL}: may be incomplete" in ran.err
        assert set(ran.printed) == set(stored) < set(ALL)
        check(home, archive, stored)
    else:
        assert ran.status == 0, ran.err
        assert sorted(ran.printed) == ALL
        check(home, archive, ALL)


def test_accessions_by_name_are_stored_with_the_same_values(archive, home):
    ran = home.run(*ALL, url=archive.url)
    assert ran.status == 0, ran.err
    check(home, archive, ALL)


@pytest.mark.parametrize("date", ["20240405", "20240406"])
def test_a_split_study_is_stored_whole_whichever_of_its_dates_is_named(archive, home, date):
    ran = home.run(date, url=archive.url)
    assert (ran.status, ran.printed) == (0, ["ESPLIT"]), ran.err
    check(home, archive, ["ESPLIT"])


def test_a_padded_accession_is_found_by_its_date_beside_others(archive, home):
    ran = home.run("20240408", url=archive.url)
    assert (ran.status, ran.printed) == (0, ["E77", "E78"]), ran.err
    check(home, archive, ["E77", "E78"])


def test_the_small_letter_is_another_accession(archive, home):
    ran = home.run("20240409", url=archive.url)
    assert (ran.status, ran.printed) == (0, ["E5"]), ran.err
    check(home, archive, ["E5"])


def test_a_number_of_ge_is_never_a_duration(archive, home):
    ran = home.run("-v", "EGE", url=archive.url)
    assert ran.status == 0, ran.err
    check(home, archive, ["EGE"])
    assert "17" not in [str(row["duration"]) for row in home.series()]


def test_a_series_has_the_same_values_at_every_run(archive, home):
    found = set()
    for _ in range(3):
        assert home.run("--force", *OF_SEVERAL, url=archive.url).status == 0
        check(home, archive, OF_SEVERAL)
        found.add(repr(home.series()))
    assert len(found) == 1
    for row in home.series():
        assert row["sequence_name"] == f"*b{row['duration'] // 60}" and row["sar"] == row["duration"] / 600
