"""What answers in the place of an Orthanc, or stands before it: proxies, roles, certificates. Each is a sentence.

At the first contact it ends the run, later it fails only what was asked. The pages are those of nginx 1.22, Apache 2.4
and servers in Go.
"""
import json
import re
import socket
import ssl
import threading
from types import SimpleNamespace

import dicom_files
import httpx
import pytest
import trustme
from endpoint import Answer, at
from stand_in import StandIn

import store_study_info as program

MONTH = ["E1", "E2", "E3"]
FILES = [dicom_files.instance(accession, StudyDate=f"2024040{day}") for day, accession in enumerate(MONTH, 1)]
HIDDEN = [dicom_files.instance(accession, StudyDate=f"2024040{day}", syntax="1.2.840.10008.1.2")
          for day, accession in enumerate(MONTH, 1)]    # Implicit VR: their time is asked for by `content`
GENERATIONS = pytest.mark.parametrize("old", [False, True], ids=["new", "old"])


@pytest.fixture
def archive():
    with StandIn(*FILES) as server:
        yield server


def status(code: int, body: bytes = b"", **headers):
    """A fault: that status, with these headers."""
    named = tuple((name.replace("_", "-"), value) for name, value in headers.items())
    return lambda answer: Answer(code, body, "text/html", headers=named)


def of_e2(fault, kind: str = "find series"):
    """This fault wherever the study E2 is asked for, alone or with others, on a newer server."""
    return lambda count, request: fault if request.kind == kind and "E2" in request.accessions else None


def sentence(ran) -> str:
    """The one error of a run that failed."""
    assert ran.status == 1
    (line,) = [line for line in ran.err.splitlines() if " ERROR " in line]
    return line


class Says:
    """Answers each request with the same bytes, whatever it is; as a context manager. held: no end of the answer."""

    def __init__(self, said: bytes, held: bool = False):
        self.said, self.held, self.asked, self.over = said, held, 0, threading.Event()

    def __enter__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.serve, daemon=True).start()
        return self

    def serve(self):
        while not self.over.is_set():
            with self.listener.accept()[0] as connection:
                if connection.recv(1 << 16):
                    self.asked += 1
                    connection.sendall(self.said)
                    self.over.wait(120 if self.held else 0)

    def __exit__(self, *_):
        self.over.set()
        socket.create_connection(self.listener.getsockname()).close()    # wakes `accept`
        self.listener.close()


def page(title: str, body: str) -> bytes:
    text = f"<html>\r\n<head><title>{title}</title></head>\r\n<body>\r\n{body}\r\n</body>\r\n</html>\r\n".encode()
    head = f"HTTP/1.1 400 Bad Request\r\nContent-Type: text/html\r\nContent-Length: {len(text)}\r\nConnection: close"
    return head.encode() + b"\r\n\r\n" + text


def nginx(what: str) -> bytes:
    return page(f"400 {what}", f"<center><h1>400 Bad Request</h1></center>\r\n<center>{what}</center>\r\n"
                               "<hr><center>nginx/1.22.1</center>")


# -- redirects -------------------------------------------------------------------------------------------------------

REDIRECTS = [
    ("https://other.example:8043/system", "https://other.example:8043;", True),
    ("https://other.example/orthanc/a/system?next=%2Fsecret", "https://other.example/orthanc/a;", True),
    ("/orthanc/system", "{url}/orthanc;", True),
    ("//other.example/system", "http://other.example;", True),
    ("https://[::1]:8043/system", "https://[::1]:8043;", True),
    ("https://jo:secret@other.example/system", "https://other.example;", True),
    ("https://login.example:444/realms/x?secret=1#secret", "https://login.example:444/realms/x;", False),
    ("/system", "{url}/system;", False),
    ("/new/", "{url}/new/;", False),
    ("", "{url}/system;", False),
    ("ftp://other.example/system", "ftp://other.example/system;", False),
    ("http://[", "something that is not an address;", False),
    ("http://other.example:99999/system", "something that is not an address;", False),
    ("http://jo:1/secret@other.example/system", "something that is not an address;", False),
    ("https://jo:secret%40other.example/system", "something that is not an address;", False),
    ("http:jo:secret@other.example/system", "something that is not an address;", False),
    ("http://xn--a/system", "http://xn--a;", True),
]


@pytest.mark.parametrize("location, place, usable", REDIRECTS, ids=[repr(location) for location, _, _ in REDIRECTS])
@pytest.mark.parametrize("kind", ["system", "find series"])
def test_a_redirect_says_which_url_would_do_and_no_secret(home, here, archive, kind, location, place, usable):
    """At the first contact that ends the run, later the study."""
    own = "/system" if kind == "system" else "/tools/find"
    archive.misbehave = of_e2(status(302, Location=location.replace("/system", own)), kind) if kind != "system" else \
        at(kind, status(302, Location=location))
    said = sentence(here(*MONTH, url=archive.url))
    assert f"redirects {own} to {place.format(url=archive.url).replace('/system', own)}" in said
    assert "redirects are not followed" in said and said.endswith("use that as --url") == usable
    assert "secret" not in said
    assert sorted(home.stored()) == ([] if kind == "system" else ["E1", "E3"])


def test_a_redirect_without_an_address_is_a_status_like_any_other(here, archive):
    archive.misbehave = of_e2(status(304))
    assert " E2: " in (said := sentence(here(*MONTH, url=archive.url))) and "HTTP 304" in said


# -- http and https --------------------------------------------------------------------------------------------------

APACHE = page("400 Bad Request", "<h1>Bad Request</h1>\n<p>Your browser sent a request that this server could not "
              "understand.<br />\nReason: You're speaking plain HTTP to an SSL-enabled server port.<br />\n</p>")
GO = b"HTTP/1.0 400 Bad Request\r\n\r\nClient sent an HTTP request to an HTTPS server.\n"
PLAIN_HTTP = {"nginx": nginx("The plain HTTP request was sent to HTTPS port"), "Apache": APACHE, "Go": GO}


@pytest.mark.parametrize("server", PLAIN_HTTP)
def test_a_port_that_wants_https_is_told_from_its_answer_to_http(here, server):
    with Says(PLAIN_HTTP[server]) as far:
        said = sentence(here("202404", url=far.url))
    assert said.endswith("HTTP 400; that port speaks https: use https:// in --url") and "nginx" not in said
    assert far.asked == 1


def test_of_the_page_of_an_error_a_few_kilobytes_are_read(here):
    head, text = GO.replace(b"\r\n\r\n", b"\r\nContent-Length: 999999999\r\n\r\n"), b" " * 4096
    with Says(head + text, held=True) as far:
        assert "that port speaks https" in sentence(here("202404", url=far.url))


@pytest.mark.parametrize("code", [400, 500])
def test_after_the_first_contact_no_page_of_an_error_is_taken_for_https(here, archive, code):
    archive.misbehave = of_e2(status(code, GO), "find study")
    said = sentence(here(*MONTH, url=archive.url))
    assert said.endswith(f"answered /tools/find with HTTP {code}") and " E2: " in said


@pytest.fixture(scope="module")
def authority(tmp_path_factory):
    made = trustme.CA()
    made.cert_pem.write_to_path(tmp_path_factory.getbasetemp() / "authority.pem")
    return made


@pytest.fixture
def trusted(authority, tmp_path_factory, monkeypatch, here):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path_factory.getbasetemp() / "authority.pem"))


def tls_of(authority, *names: str) -> ssl.SSLContext:
    tls = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert(*names).configure_cert(tls)
    return tls


@pytest.mark.parametrize("version", ["TLSv1_2", "TLSv1_3"])
def test_a_server_that_wants_a_client_certificate_is_told_so(home, here, trusted, authority, version):
    """With TLS 1.3 the connection is made before the server refuses it."""
    tls = tls_of(authority, "localhost")
    tls.maximum_version = tls.minimum_version = ssl.TLSVersion[version]
    tls.verify_mode = ssl.CERT_REQUIRED
    authority.configure_trust(tls)
    with StandIn(*FILES, tls=tls) as server:
        assert sentence(here("202404", url=server.url)).endswith(
            "it seems to want a client certificate, which is not supported")
        assert server.requests == []


def test_nginx_that_wants_a_client_certificate_is_told_so(here):
    with Says(nginx("No required SSL certificate was sent")) as far:
        assert "HTTP 400; it seems to want a client certificate" in sentence(here("202404", url=far.url))


@pytest.mark.parametrize("host, names", [
    ("localhost", ["pacs.example.org", "*.hospital.example"]), ("127.0.0.1", ["localhost", "10.0.0.1"])])
def test_a_certificate_for_another_host_says_for_which(home, here, trusted, authority, host, names):
    with StandIn(*FILES, tls=tls_of(authority, *names)) as server:
        said = sentence(here("202404", url=server.url.replace("localhost", host)))
        assert server.requests == []
    assert f"has a certificate for {', '.join(names)}, not for {host}; " in said and "--url" in said
    assert not home.db.exists()


def test_the_names_of_a_certificate_are_not_waited_for_without_end(monkeypatch):
    """They take a second connection, which a server may accept and leave alone."""
    connect, timeouts = socket.create_connection, []

    def watched(address, timeout=None):
        timeouts.append(timeout)
        return connect(address, timeout or 0.2)
    monkeypatch.setattr(socket, "create_connection", watched)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = f"https://127.0.0.1:{silent.getsockname()[1]}"
        error = program.certificate_error(url, SimpleNamespace(verify_code=64), 0.1)
    assert "has a certificate for other names, not for 127.0.0.1" in str(error) and timeouts == [0.1]


def test_a_connection_refused_by_tls_ends_only_a_run_that_had_no_answer_yet():
    """Later the server may be restarting."""
    http = program.Http("https://localhost:1")
    refused = httpx.ConnectError("[SSL] record layer failure")
    refused.__cause__ = ssl.SSLError(1, "[SSL] record layer failure")
    assert "does not speak https" in str(http._connection_error(refused, "/system"))
    http.last_success = 1.0
    later = http._connection_error(refused, "/system")
    assert isinstance(later, program.TransientError) and not later.contact


# -- the address of the server ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("place", ["/app/explorer.html", "/app", "/ui/app/", "/ui/app/index.html"])
def test_the_address_of_orthanc_s_pages_says_where_its_own_ends(server, home, place):
    said = sentence(home.run("E1", url=server.url + place))
    assert f"Orthanc's own address ends before {place.rstrip('/')}: use {server.url} as --url" in said
    assert not home.db.exists()


def test_the_same_is_said_of_a_page_and_with_a_prefix(here, archive):
    archive.misbehave = at("explorer.html", "html")
    archive.prefix = "/orthanc"
    said = sentence(here("E1", url=f"{archive.url}/orthanc/ui/app/explorer.html"))
    assert f"use {archive.url}/orthanc as --url" in said


@pytest.mark.parametrize("url", ["http://app", "http://ui/orthanc", "http://host/apps", "http://host/gui"])
def test_a_host_or_prefix_of_a_like_name_is_not_taken_for_a_page(url):
    def fail(*_):
        raise program.ServerError("not found")
    with pytest.raises(program.RunError, match="is --url Orthanc's own address"):
        _ = program.Orthanc(SimpleNamespace(url=url, json=fail)).extended    # type: ignore[arg-type]


WITHOUT_SCHEME = ["micvna:8042", "localhost", "10.0.0.1:8042/orthanc", "[::1]:8042", "pacs.example.org/a-b/"]


@pytest.mark.parametrize("url", WITHOUT_SCHEME)
def test_an_address_without_http_is_a_usage_error_that_says_what_was_meant(home, url):
    ran = home.run("E1", url=url)
    assert ran.status == 2 and f"http:// is missing: did you mean http://{url}?" in ran.err


@pytest.mark.parametrize("url", ["jo:secret@micvna:8042", "secret@micvna", "micvna:8042/@secret", "micvna:8042?secret",
                                 "http://jo:12345/secret@h:8042", "http://jo:/secret@h", "http://jo/x:secret@h",
                                 "http://jo%3Asecret%40h/"])
def test_what_may_hold_a_password_is_not_shown_also_without_http(home, url):
    ran = home.run("E1", url=url)
    assert ran.status == 2 and not re.search("secret(?! out)", ran.err)
    assert "http://host:8042" in ran.err or "holds a user or password" in ran.err


NO_HOSTS = ["a..b", "a" * 64, "a." + "b" * 64 + ".c", "xn--", "XN--:8042", ".a", "999.999.999.999", "1.2.3.256",
            "[::12345]", "[zz]"]


@pytest.mark.parametrize("host", NO_HOSTS)
@pytest.mark.parametrize("way", ["option", "environment"])
def test_a_host_that_none_can_be_is_a_usage_error(home, host, way):
    url = f"http://{host}/orthanc"
    ran = home.run("E1", url=url) if way == "option" else home.run("E1", env={"ORTHANC_URL": url})
    assert ran.status == 2 and "must look like http://host:8042" in ran.err and len(ran.err.splitlines()) == 1


@pytest.mark.parametrize("host", ["xn--a", "xn--ls8h.example", "\u2603.example", "[v1.x]"])
def test_a_host_that_only_the_connection_refuses_ends_the_run_in_a_sentence(home, host):
    assert "is its host name right?" in sentence(home.run("E1", "E2", url=f"http://{host}"))


@pytest.mark.parametrize("host", ["a", "a.", "10-0-0-1.example", "127.1", "10.0.0.1", "[::1]", "a_b",
                                  "b\u00fccher.example", "xn--fa-hia.example"])
def test_hosts_of_every_form_are_accepted(host):
    assert program.check_url(f"http://{host}:8042") == (f"http://{host}:8042", host.strip("[]"))


# -- proxies ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("code", [502, 503])
def test_a_proxy_without_its_server_ends_the_run_and_says_that_the_server_is_down(home, here, archive, code):
    archive.misbehave = at("system", f"status {code}")
    said = sentence(here("202404", "E1", url=archive.url))
    assert said.endswith(f"HTTP {code}, 6 tries; the server behind the proxy at {archive.url} is down")
    assert archive.kinds == ["system"] * 6 and not home.db.exists()


@pytest.mark.parametrize("kind", ["system", "find series"])
def test_a_time_out_of_a_proxy_is_asked_again_once_and_names_jobs_and_the_load(home, here, archive, kind):
    archive.misbehave = at(kind, "status 504") if kind == "system" else of_e2("status 504")
    said = sentence(here(*MONTH, url=archive.url))
    assert "HTTP 504, 2 tries; " in said and "slow or has much to do" in said and "--jobs" in said
    assert sorted(home.stored()) == ([] if kind == "system" else ["E1", "E3"])


@pytest.mark.parametrize("code", [404, 405, 413])
def test_a_find_that_is_not_offered_or_not_allowed_is_told_so(home, here, archive, code):
    archive.misbehave = of_e2(status(code))
    said = sentence(here(*MONTH, url=archive.url))
    assert f"HTTP {code}; this server or its proxy does not offer or allow POST /tools/find" in said and " E2: " in said
    assert sorted(home.stored()) == ["E1", "E3"]


@pytest.mark.parametrize("code", [400, 500])
@GENERATIONS
def test_a_file_that_may_be_lost_fails_its_study_alone_and_is_told_so(home, here, old, code):
    with StandIn(*FILES, old=old) as server:
        lost = server.find_id("Instance", SOPInstanceUID=dicom_files.uid("E2", 1, 1))
        server.misbehave = (lambda count, request: f"status {code}" if lost in request.path else None) if old else \
            of_e2(f"status {code}")
        said = sentence(here("202404", url=server.url))
    assert f"HTTP {code}; the server may have lost a file" in said and "log" in said and " E2: " in said
    assert sorted(home.stored()) == ["E1", "E3"]


@pytest.mark.parametrize("kind", ["find study", "statistics", "system"])
def test_no_file_is_called_lost_where_none_is_read(here, kind):
    with StandIn(*FILES, old=True) as server:
        server.misbehave = at(kind, "status 500")
        assert "lost" not in sentence(here("202404", url=server.url))


@pytest.mark.parametrize("harm", ["gone", "cut"])
def test_a_file_that_a_real_server_lost_fails_its_study_alone_and_is_told_so(real, fresh, home, harm):
    server = fresh(MaximumStorageCacheSize=0)    # nothing of a file is kept in memory
    server.upload(*FILES)
    server.settle()
    wanted = dicom_files.uid("E2", 1, 1).encode()
    (file,) = [path for path in server.folder.rglob("*")
               if path.is_file() and len(path.name) == 36 and wanted in path.read_bytes()]
    file.unlink() if harm == "gone" else file.write_bytes(file.read_bytes()[:200])
    said = sentence(home.run("202404", url=server.url))
    assert "the server may have lost a file" in said and " E2: " in said
    assert sorted(home.stored()) == ["E1", "E3"]


# -- a role or a filter that does not permit everything --------------------------------------------------------------

def test_what_is_forbidden_at_the_first_contact_ends_the_run_naming_call_netrc_and_host(home, here, archive):
    (home.folder / "netrc").write_text("machine 127.0.0.1 login jo password secret\n")
    (home.folder / "netrc").chmod(0o600)
    archive.misbehave = at("system", status(403, b"<html>secret</html>"))
    said = sentence(here("202404", *MONTH, url=archive.url))
    assert "HTTP 403; the role or filter of the server or its proxy must permit GET /system; " in said
    assert said.endswith("looked up in netrc file netrc, entry of host 127.0.0.1") and "secret" not in said
    assert archive.kinds == ["system"] and not home.db.exists()


CALLS = [("series", True, "GET /studies/…/series"), ("tags", True, "GET /instances/…/tags"),
         ("content", False, "GET /instances/…/content"), ("content", True, "GET /instances/…/content"),
         ("find series", False, "POST /tools/find")]


@pytest.mark.parametrize("kind, old, call", CALLS, ids=[f"{kind}-{'old' if old else 'new'}" for kind, old, _ in CALLS])
def test_what_is_forbidden_later_fails_only_the_study_that_needed_it(home, here, kind, old, call):
    with StandIn(HIDDEN[0], *(FILES[1:] if kind == "content" else HIDDEN[1:]), old=old) as server:
        ids = [server.find_id(level, **{key: value}) for level, key, value in (
            ("Study", "AccessionNumber", "E1"), ("Instance", "SOPInstanceUID", dicom_files.uid("E1", 1, 1)))]
        server.misbehave = lambda count, request: status(403) if request.kind == kind and (
            "E1" in request.accessions or any(one in request.path for one in ids)) else None
        ran = here("202404", url=server.url)
        asked = [request for request in server.requests if request.kind == kind]
    said = sentence(ran)
    assert f"must permit {call}; credentials were looked up in no netrc file" in said and " E1: " in said
    assert sorted(home.stored()) == ran.printed == ["E2", "E3"]
    assert len(asked) == len({request[:3] for request in asked})    # none is asked twice


def test_a_forbidden_find_fails_each_date_and_each_accession_for_itself(home, here, archive):
    archive.misbehave = lambda count, request: status(403) if b'"20240401' in request.body else None
    ran = here("202404", "20240402", "E3", url=archive.url)
    assert "20240401-20240430: cannot be listed" in (said := sentence(ran)) and "must permit POST /tools/find" in said
    assert sorted(home.stored()) == ["E2", "E3"]


def test_a_filter_that_lets_through_what_readme_names_is_enough(home, here):
    """GET, and POST of /tools/find; nothing else is asked for, however the values are hidden."""
    for old in (False, True):
        with StandIn(*HIDDEN, dicom_files.instance("E4", StudyDate="20240404", number=1, sar=None, ta=None),
                     dicom_files.instance("E4", StudyDate="20240404", number=2), old=old) as server:
            assert here("--force", "--fallback", "202404", url=server.url).status == 0
            calls = {(request.method, re.sub(r"[0-9a-f-]{44}|\?.*|(?<=content)/.*", "", request.path))
                     for request in server.requests}
            assert all(json.loads(request.body) for request in server.requests if request.method == "POST")
        assert calls <= {("GET", "/system"), ("GET", "/statistics"), ("GET", "/studies//series"), ("GET", "/series/"),
                         ("GET", "/instances//tags"), ("GET", "/instances//content"), ("POST", "/tools/find")}
