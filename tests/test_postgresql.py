"""A server whose index is PostgreSQL: it answers RequestedTags, has no extended find and tells no order of reception.

On the stand-in; test_stand_in.py holds it to a real one, and test_every_orthanc.py runs on that itself.
"""
import pytest
from dicom_files import instance, study, uid
from stand_in import StandIn


@pytest.fixture
def postgresql():
    """postgresql(files, **options): a running server that holds them."""
    running = []

    def start(*files, **options):
        running.append(StandIn(*files, postgresql=True, **options).__enter__())
        return running[-1]
    yield start
    for one in running:
        one.__exit__(None, None, None)


def month(studies: int, series: int) -> list[bytes]:
    return [file for number in range(studies)
            for file in study(f"E{number:03}", series=series, instances=1, StudyDate=f"202404{1 + number % 30:02}")]


def test_a_month_of_thirty_studies_of_ten_series_takes_eight_requests_at_most(postgresql, home):
    server = postgresql(*month(30, 10))
    assert home.run("202404", url=server.url).status == 0
    assert len(home.studies()) == 30 and len(home.series()) == 300
    assert len(server.requests) <= 8, server.kinds


def test_a_month_that_is_stored_takes_four_requests_at_most(postgresql, home):
    server = postgresql(*month(30, 10))
    home.run("202404", url=server.url)
    server.forget()
    ran = home.run("202404", url=server.url)
    assert (ran.status, ran.printed) == (0, [])
    assert len(server.requests) <= 4, server.kinds


def test_what_is_asked_about_limits_is_asked_once_by_however_many_threads(postgresql, home):
    """Each day finds one study, of whose series it is not known whether their answer can be cut."""
    server = postgresql(*month(12, 1))
    days = [f"202404{day:02}" for day in range(1, 13)]
    assert home.run("--jobs", "8", *days, url=server.url).status == 0
    asked = [request for request in server.requests if request.kind == "statistics"]
    assert len(asked) <= 2 and len(home.studies()) == 12, server.kinds    # of one study, then of two series


def lacking(number: int):
    """All but one image of a series lack SAR and time."""
    def change(ds):
        if number != 3:
            for tag in (0x00181316, 0x00510010, 0x0051100A):
                del ds[tag]
    return change


def test_a_refused_order_is_no_failure_and_is_asked_for_once(postgresql, home):
    server = postgresql(*(instance(name, number=number, change=lacking(number))
                          for name in ("E1", "E2") for number in (5, 4, 3, 2)))
    ran = home.run("E1", "E2", url=server.url)
    assert ran.status == 0 and "500" not in ran.err
    assert [row["series_uid"] for row in home.series()] == [uid("E1", 1), uid("E2", 1)]
    assert sum(b"OrderBy" in request.body for request in server.requests) <= 1


def test_the_second_look_costs_six_requests_at_most(postgresql, home):
    plain = postgresql(instance("E1"))
    home.run("E1", url=plain.url)
    server = postgresql(*(instance("E1", number=number, change=lacking(number)) for number in range(9, 0, -1)))
    home.run("--force", "E1", url=server.url)
    assert len(server.requests) <= len(plain.requests) + 6, server.kinds


def test_a_server_that_may_not_read_files_is_asked_for_headers(postgresql, home):
    """Twice the same ones, though it tells no order."""
    server = postgresql(*(instance("E1", number=number, sar=f"0.{number}") for number in (7, 2, 9)),
                        StorageAccessOnFind="Never")
    found = []
    for _ in range(2):
        assert home.run("--force", "E1", url=server.url).status == 0
        found.append(home.series())
    assert found[0] == found[1] and found[0][0]["sar"] in (0.7, 0.2, 0.9)


@pytest.mark.parametrize("date", ["20240401", "202404"])
def test_a_padded_accession_is_stored_without_its_blank(postgresql, home, date):
    server = postgresql(instance(" E77", study="padded", StudyDate="20240401"), instance("E5", StudyDate="20240401"))
    ran = home.run(date, url=server.url)
    assert (ran.status, ran.printed) == (0, ["E5", "E77"])
    assert home.series("E77")[0]["series_uid"] == uid("padded", 1)


def test_a_find_for_several_accessions_that_fails_stops_no_other(postgresql, home):
    server = postgresql(*month(3, 1))

    def asks_for_the_second(count, request):
        asked = request.json["Query"] if request.kind == "find series" else {}
        return "status 500" if "E001" in asked.get("AccessionNumber", "") else None
    server.misbehave = asks_for_the_second
    ran = home.run("202404", url=server.url)
    assert (ran.status, ran.printed) == (1, ["E000", "E002"])
    server.misbehave = None
    assert home.run("202404", url=server.url).printed == ["E001"]
