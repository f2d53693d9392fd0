"""The same from every server: versions, limits on results, storage access, authentication, https, reverse proxies."""
import json
import os
import ssl
import stat

import orthanc
import pytest
import trustme
from dicom_files import instance, study, uid
from endpoint import Answer, Proxy, at
from pydicom.uid import ImplicitVRLittleEndian
from stand_in import StandIn
from test_fetch import ARCHIVE



def month(studies=9, series=2):
    """A day of studies, and a few on other days of the same month."""
    files = [
        file
        for number in range(studies)
        for file in study(f"EL{number:02}", series=series, instances=1, StudyDate="20240410")
    ]
    return files + [
        file
        for number in range(2)
        for file in study(f"EM{number}", series=1, instances=1, StudyDate=f"2024041{number + 1}")
    ]


# -- limits on results -----------------------------------------------------------------------------------------------

def test_nothing_is_lost_to_a_limit_on_results_or_the_days_are_named(servers, home):
    server = servers(LimitFindResults=5)
    server.upload(*month(), *study("ELONG", series=12, instances=1, StudyDate="20240410"))
    server.settle()
    ran = home.run("202404", url=server.url)
    if server.extended or not server.own_index:
        assert ran.status == 0
        assert ran.printed == [f"EL{number:02}" for number in range(9)] + ["ELONG", "EM0", "EM1"]
        assert len(home.series("ELONG")) == 12
    else:
        assert ran.status == 1
        assert "ERROR 20240410: may be incomplete" in ran.err and ran.err.count("may be incomplete,") == 1
        assert {"EM0", "EM1"} <= set(ran.printed) and len(ran.printed) == 6 + 2
        assert "dates that may be incomplete: 1" in ran.summary
        assert home.run("ELONG", *(f"EL{number:02}" for number in range(9)), url=server.url).status == 0
        assert len(home.series("ELONG")) == 12 and len(home.studies()) == 12


def test_a_server_that_cuts_the_series_answer_is_noticed_by_the_study_s_own_count(archive_of_twelve, home):
    """Should the server forget what `Limit: 0` means: the list of the study itself has no limit."""
    def shorter(answer):
        return answer._replace(body=json.dumps(json.loads(answer.body)[:5]).encode())
    with Proxy(archive_of_twelve.url) as proxy:
        proxy.misbehave = lambda count, request: shorter if request.kind == "find series" else None
        assert home.run("ETWELVE", url=proxy.url).status == 0
    assert [row["series_number"] for row in home.series()] == list(range(1, 13))


def test_a_server_that_cuts_the_study_answer_is_asked_for_the_rest(archive_of_twelve, home):
    if not archive_of_twelve.extended:
        pytest.skip("needs a server with extended find: on others no Since reaches the rest")

    def shorter(answer):
        return answer._replace(body=json.dumps(json.loads(answer.body)[:2]).encode())
    with Proxy(archive_of_twelve.url) as proxy:
        proxy.misbehave = lambda count, request: (
            shorter if request.kind == "find study" and request.json["Limit"] == 0 else None
        )
        assert home.run("20230607", url=proxy.url).printed == ["ETA", "ETB", "ETC", "ETD", "ETWELVE"]


@pytest.fixture(scope="module")
def archive_of_twelve(server):
    server.upload(*study("ETWELVE", series=12, instances=1, StudyDate="20230607"),
                  *(instance(name, StudyDate="20230607") for name in ("ETA", "ETB", "ETC", "ETD")))
    return server.settle()


@pytest.mark.parametrize("limit, count, doubted", [(0, 12, False), (5, 5, False), (5, 6, True), (5, 12, True)])
def test_a_limit_of_an_older_server_is_seen_by_asking_for_everything(home, limit, count, doubted):
    """It returns one study more than its limit, never more: as many as that may have been cut."""
    dates = ["20240410"] * count + ["20240301"] * (20 - count)
    files = [instance(f"E{number}", StudyDate=date) for number, date in enumerate(dates)]
    with StandIn(*files, old=True, LimitFindResults=limit) as server:
        ran = home.run("20240410", url=server.url)
    assert ("20240410: may be incomplete" in ran.err) is doubted
    assert ran.status == doubted and len(home.studies()) == min(count, limit + 1 if limit else count)


def test_a_date_with_a_single_study_may_have_been_cut_to_it(home):
    """Where a server returns no more than one study for anything, one is not known to be all."""
    def first(answer):
        return answer._replace(body=json.dumps(json.loads(answer.body)[:1]).encode())
    with StandIn(*(instance(name, StudyDate="20240410") for name in ("E1", "E2")), old=True) as server:
        server.misbehave = at("find study", first)
        ran = home.run("20240410", url=server.url)
    assert ran.status == 1 and "20240410: may be incomplete" in ran.err


# -- the same database -----------------------------------------------------------------------------------------------

# Accessions of the archive: plain ones, split ones, and what must be looked for at other places of a file.
EVERY_KIND = [
    "EPLAIN", "EDAYA", "ESPLIT", "EMOVED", "EGE", "EUN", "EIMPLICIT", "EODD", "EODDUN", "EORDER", "EBAD", "EENHANCED",
    "EPROTOCOL", "EVALUES", "EMIX",
]

OF_SEVERAL = {"EODD", "EODDUN", "EORDER"}    # their instances disagree: the first received counts, where that is known


@pytest.mark.parametrize("options", [{"StorageAccessOnFind": "Never"}, {"LimitFindResults": 5}], ids=str)
def test_the_database_does_not_depend_on_the_server_s_settings(servers, home, tmp_path_factory, options):
    dumps = []
    for server, folder in ((servers(), "plain"), (servers(**options), "other")):
        if options.get("LimitFindResults") and not server.extended:
            pytest.skip("needs a server with extended find")
        known = {"Level": "Study", "Query": {"AccessionNumber": "EVALUES"}}
        if folder == "other" or not server.client.post("/tools/find", json=known).json():
            server.upload(*ARCHIVE)
        server.settle()
        files = ["--db", tmp_path_factory.mktemp(folder) / "x.db", "--csv", f"{folder}.csv"]
        accessions = [one for one in EVERY_KIND if server.own_index or one not in OF_SEVERAL]
        ran = home.run("--fallback", *files, *accessions, url=server.url)
        assert ran.status == 0, ran.err
        dumps.append((home.folder / f"{folder}.csv").read_text())
    assert dumps[0] == dumps[1]
    assert dumps[0].count("\n") > 20


def test_two_versions_give_the_same_database(home):
    """Where ORTHANC_COMMANDS names a second version; `sh tests/servers.sh` makes one."""
    commands = orthanc.commands()
    if len(commands) < 2:
        pytest.skip("ORTHANC_COMMANDS names no second version of Orthanc")
    dumps: dict[str, str] = {}
    same = [one for one in EVERY_KIND if one not in OF_SEVERAL or not any("+" in command for command in commands)]
    for command in commands:
        with orthanc.Orthanc(command) as server:
            server.upload(*ARCHIVE)
            server.settle()
            ran = home.run(
                "--fallback",
                "--db",
                f"{len(dumps)}.db",
                "--csv",
                "out.csv",
                *same,
                "EVA",
                "EUIH",
                "EUMLAUT",
                "EBIG",
                url=server.url,
            )
            assert ran.status == 0, ran.err
            dumps[command] = (home.folder / "out.csv").read_text()
    assert len(set(dumps.values())) == 1, dumps


# -- the way to the server -------------------------------------------------------------------------------------------


def netrc_file(folder, text, name="netrc", mode=0o600):
    path = folder / name
    path.write_text(text)
    path.chmod(mode)
    return path


@pytest.fixture(scope="module")
def guarded(servers):
    server = servers(AuthenticationEnabled=True, RegisteredUsers={"jo": "se cret:ß"})
    server.upload(*study("EAUTH", series=1))
    return server.settle()


def test_credentials_come_from_the_netrc_entry_of_the_host(guarded, home):
    netrc_file(
        home.folder, 'machine other.example login x password y\nmachine 127.0.0.1 login jo password "se cret:ß"\n'
    )
    assert home.run("EAUTH", url=guarded.url).status == 0


def test_credentials_come_from_the_default_entry_where_the_host_has_none(guarded, home):
    path = netrc_file(home.folder, 'default login jo password "se cret:ß"\n', "elsewhere")
    assert home.run("--netrc", path, "EAUTH", url=guarded.url).status == 0
    assert home.run("--force", "EAUTH", url=guarded.url, env={"NETRC": str(path)}).status == 0


def test_the_option_comes_before_the_environment_before_the_working_folder_before_home(guarded, home):
    good, bad = 'default login jo password "se cret:ß"\n', "default login jo password wrong\n"
    netrc_file(home.folder, bad, ".netrc")
    assert home.run("EAUTH", url=guarded.url).status == 1
    netrc_file(home.folder, good)
    assert home.run("-f", "EAUTH", url=guarded.url).status == 0
    assert home.run("-f", "EAUTH", url=guarded.url, env={"NETRC": str(home.folder / ".netrc")}).status == 1
    assert (
        home.run("-f", "--netrc", "netrc", "EAUTH", url=guarded.url, env={"NETRC": str(home.folder / ".netrc")}).status
        == 0
    )


@pytest.mark.parametrize(
    "text, told",
    [
        (
            None,
            "wants a user and password (HTTP 401); credentials were looked up in no netrc file: "
            "there is no ./netrc and no ~/.netrc",
        ),
        (
            "machine other.example login a password b\n",
            "wants a user and password (HTTP 401); credentials were looked up in netrc file netrc, "
            "which has no entry for host 127.0.0.1",
        ),
        (
            "machine 127.0.0.1 login jo password hunter2\n",
            "refuses the user and password (HTTP 401); credentials were looked up in netrc file netrc, "
            "entry of host 127.0.0.1",
        ),
    ],
)
def test_a_wrong_password_ends_the_run_with_one_sentence_and_no_password(guarded, home, text, told):
    if text:
        netrc_file(home.folder, text)
    ran = home.run("EAUTH", "20240427", "202301", url=guarded.url)
    assert ran.status == 1 and told in ran.err and len(ran.err.splitlines()) == 1
    assert "hunter2" not in ran.err
    assert not home.db.exists()


def test_no_entry_no_credentials(guarded, home):
    netrc_file(home.folder, "machine other.example login a password b\n")
    with Proxy(guarded.url) as proxy:
        home.run("EAUTH", url=proxy.url)
        assert proxy.requests and all("Authorization" not in request.headers for request in proxy.requests)


def test_a_netrc_that_others_can_read_is_warned_of(guarded, home):
    netrc_file(home.folder, 'default login jo password "se cret:ß"\n', mode=0o644)
    ran = home.run("EAUTH", url=guarded.url)
    assert ran.status == 0 and "WARNING netrc file netrc is readable by others: run chmod 600" in ran.err


def test_https_with_a_private_authority(server, home, archive_of_twelve):
    authority = trustme.CA()
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("localhost").configure_cert(tls)
    authority.cert_pem.write_to_path(home.folder / "ca.pem")
    with Proxy(server.url, tls=tls) as proxy:
        refused = home.run("ETA", url=proxy.url)
        assert (
            refused.status == 1
            and "has a certificate that is not trusted" in refused.err
            and "SSL_CERT_FILE" in refused.err
        )
        assert len(refused.err.splitlines()) == 1
        assert home.run("ETA", url=proxy.url, env={"SSL_CERT_FILE": str(home.folder / "ca.pem")}).status == 0
        plain = home.run("ETB", url=proxy.url.replace("https:", "http:"))
        assert plain.status == 1
    with Proxy(server.url) as proxy:
        ran = home.run("ETB", url=proxy.url.replace("http:", "https:"))
        assert ran.status == 1 and "does not speak https: is it http?" in ran.err
    missing = home.run("ETB", url="https://localhost:1", env={"SSL_CERT_FILE": "/nowhere/ca.pem"})
    assert missing.status == 2 and "SSL_CERT_FILE /nowhere/ca.pem cannot be read" in missing.err


@pytest.mark.parametrize("prefix", ["/orthanc", "/a/b"])
def test_a_path_prefix_behind_a_reverse_proxy(server, home, archive_of_twelve, prefix):
    with Proxy(server.url, prefix=prefix) as proxy:
        for url in (proxy.url, proxy.url + "/"):
            assert home.run("-f", "ETA", url=url).status == 0
        assert {request.path for request in proxy.requests} >= {"/system", "/tools/find"}


def test_a_server_that_is_not_there_is_one_sentence_and_nothing_is_written(home):
    url = f"http://127.0.0.1:{orthanc.free_port()}"
    ran = home.run("E1", "202404", url=url)
    assert ran.status == 1 and len(ran.err.splitlines()) == 1
    assert f"{url} cannot be reached" in ran.err and "is --url right" in ran.err
    assert os.listdir(home.folder) == []


def test_a_server_that_is_no_orthanc_is_told_so(home):
    class Other(Proxy):
        def answer(self, request):
            return Answer(200, b'{"hello": "world"}')
    with Other("http://127.0.0.1:9") as other:
        ran = home.run("E1", url=other.url)
    assert ran.status == 1 and "is not an Orthanc server" in ran.err and not home.db.exists()


def test_implicit_vr_needs_the_instance_s_id_which_is_that_of_the_server(server, home):
    """The ID is computed from the DICOM identifiers; a request for it is spared."""
    server.upload(instance("EID", PatientID="Jos\u00e9 ", syntax=ImplicitVRLittleEndian))
    server.settle()
    with Proxy(server.url) as proxy:
        assert home.run("EID", url=proxy.url).status == 0
        known = server.find_id("Instance", SOPInstanceUID=uid("EID", 1, 1))
        contents = [request.path for request in proxy.requests if "/content/" in request.path]
    assert contents == [f"/instances/{known}/content/0051-100a"]
    assert "find instance" not in proxy.kinds


def test_the_database_is_readable_by_its_owner_alone(server, home, archive_of_twelve):
    old = os.umask(0)
    try:
        home.run("ETA", url=server.url)
    finally:
        os.umask(old)
    assert stat.S_IMODE(home.db.stat().st_mode) == 0o600


def test_the_first_instance_received_gives_the_values_also_when_the_study_is_listed_anew(server, home):
    """Series that do not fit the study's count are checked against the study's own list.

    Newer servers sort that by ID.
    """
    server.upload(
        *(instance("ELISTED", number=number, sar=f"0.{number}", StudyDate="20230608") for number in (7, 2, 9, 1, 5)),
        instance("ELISTED", series=2, StudyDate="20230608"),
    )
    server.settle()

    def shorter(answer):
        return answer._replace(body=json.dumps(json.loads(answer.body)[:1]).encode())
    with Proxy(server.url) as proxy:
        proxy.misbehave = lambda count, request: shorter if request.kind == "find series" else None
        assert home.run("ELISTED", url=proxy.url).status == 0
    first, second = (row["sar"] for row in home.series())
    assert second == 0.5 and (first == 0.7 or not server.own_index and first in (0.1, 0.2, 0.5, 0.9))


def test_a_limit_on_instances_does_not_cut_the_second_look(servers, home):
    server = servers(LimitFindInstances=2)
    if not server.extended:
        pytest.skip("older servers list the instances of a series, to which no limit applies")

    def raw_object(ds):
        for tag in (0x00181316, 0x00510010, 0x0051100A):
            del ds[tag]

    server.upload(
        *(instance("ELATE", number=number, change=raw_object if number < 4 else None) for number in range(1, 9))
    )
    server.settle()
    assert home.run("ELATE", url=server.url).status == 0
    assert len(home.series()) == 1


@pytest.mark.parametrize("limit", [0, 1])
def test_a_series_costs_six_requests_more_at_most_wherever_its_values_are(servers, home, limit):
    """Only the sixth instance has SAR, its time is not a scan's, and the first of its two protocols tells no other."""

    def protocols(ds):
        ds.add_new(0x00290010, "LO", "SIEMENS CSA HEADER")
        ds.add_new(0x00291020, "OB", b"nothing here")
        ds.add_new(0x00210010, "LO", "SIEMENS MR SDS 01")
        ds.add_new(0x00211019, "OB", b"lTotalScanTimeSec = 450\n")
    server = servers(LimitFindInstances=limit)
    server.upload(
        instance("EONE"),
        *(
            instance("ESIX", number=number, sar=None if number < 6 else "0.5", ta="TA 00.02", change=protocols)
            for number in range(1, 7)
        ),
    )
    server.settle()
    with Proxy(server.url) as proxy:
        home.run("EONE", url=proxy.url)
        plain = len(proxy.requests)
        for option in ([], ["--fallback"]):
            proxy.forget()
            assert home.run("--force", *option, "ESIX", url=proxy.url).status == 0
            assert len(proxy.requests) <= plain + 6, proxy.kinds


def test_a_second_study_is_not_lost_to_a_limit_where_only_requested_tags_are_known(server, home):
    """Orthanc 1.11 to 1.12.4: RequestedTags are answered, no Since reaches what a limit hides.

    Cut to four, the series of the first study fit its count.
    """
    if not server.extended:
        pytest.skip("needs a server that answers RequestedTags")
    server.upload(
        *(
            instance("EBOTH", study=f"both {day}", series=day * 10 + number, StudyDate=f"2023070{day}")
            for day, count in ((1, 4), (2, 2))
            for number in range(count)
        )
    )
    server.settle()

    class Between(Proxy):
        """The newer server as one between: no word of extended find, and a limit of four on studies and series."""

        def answer(self, request):
            answer = super().answer(request)
            assert answer.status == 200
            told = json.loads(answer.body)
            if request.path == "/system":
                told.pop("Capabilities")
            elif request.kind == "find series":
                if "Expand" in request.json:
                    told.sort(key=lambda one: one["RequestedTags"]["0008,0020"])
                told = told[:4]
            return answer._replace(body=json.dumps(told).encode(), headers=())
    with Between(server.url) as between:
        assert home.run("20230701", url=between.url).status == 0
    assert len(home.series("EBOTH")) == 6
