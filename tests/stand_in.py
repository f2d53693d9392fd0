"""A small stand-in for an Orthanc server: the few calls that store_study_info.py makes, and nothing else.

    python tests/stand_in.py [--port N] [--old | --postgresql] FILE...

It answers as Orthanc 1.12.7 does or, with `old`, as 1.10.1, which ignores RequestedTags, ResponseContent and OrderBy
and has no extended find; or, with `postgresql`, as 1.12.7 with its index in PostgreSQL (plugin 5.0), which answers
RequestedTags, but has no extended find and refuses OrderBy. What it says is held to what real servers say by
test_stand_in.py. It is for faults (see endpoint.py), for tests without an Orthanc, and never for real data: nothing is
kept, nobody is asked for a password.
"""
import argparse
import contextlib
import fnmatch
import hashlib
import io
import json
import re
import struct
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import httpx
import pydicom
from pydicom.charset import convert_encodings
from pydicom.datadict import dictionary_has_tag, dictionary_VR, keyword_for_tag, tag_for_keyword
from pydicom.dataelem import RawDataElement
from pydicom.tag import Tag

from endpoint import Answer, Endpoint, Request

# What Orthanc keeps in its database, by level (`MainDicomTags` of /system in 1.12.7): those that files of these tests
# can hold.
MAIN = {
    "Patient": {"0010,0010", "0010,0020", "0010,0030", "0010,0040"},
    "Study": {"0008,0020", "0008,0030", "0008,0050", "0008,1030", "0020,000d", "0020,0010"},
    "Series": {
        "0008,0021",
        "0008,0031",
        "0008,0060",
        "0008,0070",
        "0008,103e",
        "0018,0010",
        "0018,0015",
        "0018,0024",
        "0018,1030",
        "0020,000e",
        "0020,0011",
        "0020,0037",
    },
    "Instance": {"0008,0018", "0020,0012", "0020,0013", "0020,0032", "0020,0037", "0028,0008"},
}
LEVELS = list(MAIN)
PARENT = {"Study": "Patient", "Series": "Study", "Instance": "Series"}
COUNTED = {"Study": "0020,1206", "Series": "0020,1209"}    # NumberOfStudyRelatedSeries, NumberOfSeriesRelatedInstances
SOP_CLASS = "0008,0016"                                    # kept as metadata of the instance
RECEIVED = [{"Type": "Metadata", "Key": "ReceptionDate", "Direction": "ASC"}]

LEADING_KEPT = {"LO", "LT", "SH", "ST", "UC", "UT"}    # text whose leading blanks are part of it
TEXT = {"AE", "AS", "CS", "DA", "DS", "DT", "IS", "LO", "LT", "PN", "SH", "ST", "TM", "UC", "UI", "UR", "UT"}
BINARY = {"US": "H", "SS": "h", "UL": "I", "SL": "i", "FD": "d", "FL": "f"}


class NotFound(Exception):
    """Answered with 404."""


class BadRequest(Exception):
    """Answered with 400."""


class NotImplementedYet(Exception):
    """Answered with 500."""


# -- from a file to what Orthanc tells of it -------------------------------------------------------------------------

def written(tag) -> str:
    """A tag as Orthanc writes it under `short`."""
    return f"{tag >> 16:04x},{tag & 0xffff:04x}"


def vr_of(element) -> str:
    """The VR as DCMTK takes it: private ones of UN, or of a file of Implicit VR, are not decoded; standard ones are."""
    if element.VR in (None, "UN"):
        private = element.tag.group % 2
        return (
            "LO"
            if private and 0x10 <= element.tag.elem <= 0xFF
            else dictionary_VR(element.tag)
            if not private and dictionary_has_tag(element.tag)
            else "UN"
        )
    return element.VR


def values_of(ds: pydicom.Dataset, encoding: str) -> dict[str, Any]:
    """{tag: text, None where it is no text, list of items}, in the order of the tags."""
    header: dict[str, Any] = {}
    for tag in sorted(ds.keys()):
        element = ds.get_item(tag)
        if tag.element == 0 or tag.group == 2:
            continue
        vr = vr_of(element)
        if vr == "SQ":
            header[written(tag)] = [values_of(item, encoding) for item in ds[tag].value]
        else:
            header[written(tag)] = text_of(vr, raw_of(ds, tag), encoding)
    return header


def text_of(vr: str, raw: bytes, encoding: str) -> str | None:
    if vr in TEXT:
        text = raw.decode(encoding, "replace").rstrip(" \0")
        return text.lstrip("\0" if vr in LEADING_KEPT else " \0")
    if vr in BINARY:
        return "\\".join(format(value, ".17g") for (value,) in struct.iter_unpack("<" + BINARY[vr], raw))
    return None


def raw_of(ds: pydicom.Dataset, tag) -> bytes:
    """The bytes of an element, little endian whatever the file is."""
    element = ds.get_item(tag)
    code = BINARY.get(vr_of(element))
    if element.value is None:
        return b""
    if not isinstance(element, RawDataElement):    # pydicom decodes by itself what it needs to read the others
        return struct.pack("<" + code, element.value) if code else str(element.value).encode()
    raw = element.value or b""
    if code and not element.is_little_endian:
        raw = b"".join(struct.pack("<" + code, value) for (value,) in struct.iter_unpack(">" + code, raw))
    return raw


def orthanc_id(*identifiers: str) -> str:
    digest = hashlib.sha1("|".join(identifiers).encode()).hexdigest()
    return "-".join(re.findall(".{8}", digest))


class Instance(NamedTuple):
    ids: dict[str, str]         # by level
    header: dict[str, Any]
    dataset: pydicom.Dataset
    received: float

    @property
    def id(self) -> str:
        return self.ids["Instance"]


def read_instance(data: bytes) -> Instance:
    ds = pydicom.dcmread(io.BytesIO(data))
    header = values_of(ds, convert_encodings(ds.get("SpecificCharacterSet") or "ISO_IR 6")[0])
    names = [header.get(tag) or "" for tag in ("0010,0020", "0020,000d", "0020,000e", "0008,0018")]
    return Instance(
        {level: orthanc_id(*names[:count]) for count, level in enumerate(LEVELS, 1)}, header, ds, time.monotonic()
    )


# -- the server ------------------------------------------------------------------------------------------------------


class StandIn(Endpoint):
    """A server on a free loopback port, as a context manager. files: what it holds from the start.

    Options have the names of Orthanc's configuration: LimitFindResults, StorageAccessOnFind, StableAge (0: all is
    stable at once).
    """

    def __init__(self, *files: bytes, old: bool = False, postgresql: bool = False, LimitFindResults: int = 0,
                 StorageAccessOnFind: str = "Always", StableAge: float = 0, **options):
        super().__init__(**options)
        self.postgresql = postgresql
        self.old, self.cap, self.blind, self.stable_age = (
            old,
            LimitFindResults,
            StorageAccessOnFind == "Never",
            StableAge,
        )
        self.version = "1.10.1" if old else "1.12.7"
        self.instances: dict[str, Instance] = {}    # by ID, in the order received
        self.index: dict | None = None              # the same by level and ID, made when it is wanted
        self.upload(*files)

    def __enter__(self):
        super().__enter__()
        self.client = httpx.Client(base_url=self.url, timeout=60, trust_env=False)
        return self

    def __exit__(self, *exception):
        self.client.close()
        super().__exit__(*exception)

    @property
    def extended(self) -> bool:
        return not self.old and not self.postgresql

    @property
    def own_index(self) -> bool:
        return not self.postgresql

    @property
    def answers_tags(self) -> bool:
        return not self.old

    def upload(self, *files: bytes) -> list[dict]:
        """Store DICOM files, in this order."""
        told = []
        for one in map(read_instance, files):
            known = one.id in self.instances
            with self.lock:
                self.instances.setdefault(one.id, one)
                self.index = None
            told.append(
                {
                    "ID": one.id,
                    "Path": f"/instances/{one.id}",
                    "Status": "AlreadyStored" if known else "Success",
                    **{f"Parent{level}": one.ids[level] for level in LEVELS[:-1]},
                }
            )
        return told

    def delete(self, level: str, identifier: str):
        """Remove a patient, study, series or instance."""
        with self.lock:
            self.instances = {one.id: one for one in self.instances.values() if one.ids[level] != identifier}
            self.index = None

    def settle(self, limit: float = 30):
        """Wait until everything is stable."""
        newest = max((one.received for one in self.instances.values()), default=0)
        wait = newest + self.stable_age - time.monotonic()
        if wait > limit:
            raise RuntimeError(f"studies are not stable after {limit} s")
        time.sleep(max(0, wait))
        return self

    def find_id(self, level: str, **query) -> str:
        (one,) = self.find({"Level": level, "Query": query})
        return one

    # -- requests ----------------------------------------------------------------------------------------------------

    def answer(self, request: Request) -> Answer:
        url = urllib.parse.urlsplit(request.path)
        parts = [urllib.parse.unquote(part) for part in url.path.strip("/").split("/")]
        options = urllib.parse.parse_qs(url.query, keep_blank_values=True)
        try:
            found = (
                {"POST": self.post, "DELETE": self.remove}[request.method](parts, request)
                if request.method != "GET"
                else self.get(parts, options)
            )
        except NotFound:
            return Answer(404, b"", "text/plain")
        except NotImplementedYet as error:
            return Answer(500, json.dumps({"HttpStatus": 500, "Message": "Not implemented yet",
                                           "Details": str(error)}).encode(), "text/plain")
        except BadRequest as error:
            return Answer(
                400,
                json.dumps({"HttpStatus": 400, "Message": "Parameter out of range", "Details": str(error)}).encode(),
                "text/plain",
            )
        if isinstance(found, bytes):
            return Answer(200, found, "application/octet-stream")
        return Answer(
            200, json.dumps(found, indent=3, separators=(",", " : ")).encode(), "application/json; charset=utf-8"
        )

    def post(self, parts: list[str], request: Request) -> Any:
        if parts == ["tools", "find"]:
            return self.find(request.json)
        if parts == ["tools", "count-resources"] and not self.old:
            asked = request.json
            return {"Count": len(self.rows(asked["Level"], patterns_of(asked["Query"]), asked))}
        raise NotFound

    def remove(self, parts: list[str], request: Request) -> Any:
        match parts:
            case ["series", series] if series in self.members("Series"):
                self.delete("Series", series)
                return {}
        raise NotFound

    def get(self, parts: list[str], options: dict) -> Any:
        short = "short" in options
        match parts:
            case ["system"]:
                capabilities = {"HasExtendedChanges": self.extended, "HasExtendedFind": self.extended}
                return {
                    "ApiVersion": 16 if self.old else 27,
                    "Name": "",
                    "Version": self.version,
                    "DatabaseBackendPlugin": "libOrthancPostgreSQLIndex.so" if self.postgresql else None,
                } | ({} if self.old else {"Capabilities": capabilities})
            case ["statistics"]:
                return {
                    f"Count{'Studies' if level == 'Study' else level if level == 'Series' else level + 's'}": len(
                        self.members(level)
                    )
                    for level in LEVELS
                }
            case ["studies", study, "series"]:
                found = [
                    identifier for identifier, held in self.members("Series").items() if held[0].ids["Study"] == study
                ]
                if not found:
                    raise NotFound
                records = [self.resource("Series", identifier, short) for identifier in found]
                return records if "expand" in options else found
            case ["series", series]:
                return self.resource("Series", series, short)
            case ["instances", instance, "tags"] if short:
                return self.instance(instance).header
            case ["instances", instance, "header"] if short:
                return {"0002,0010": str(self.instance(instance).dataset.file_meta.TransferSyntaxUID)}
            case ["instances", instance, "content", *path]:
                return content(self.instance(instance).dataset, path)
        raise NotFound

    def instance(self, identifier: str) -> Instance:
        if identifier not in self.instances:
            raise NotFound
        return self.instances[identifier]

    # -- resources ---------------------------------------------------------------------------------------------------

    def members(self, level: str) -> dict[str, list[Instance]]:
        """{ID: its instances in the order received}, in the order received."""
        with self.lock:
            if self.index is None:
                self.index = {one: {} for one in LEVELS}
                for one in self.instances.values():
                    for which, identifier in one.ids.items():
                        self.index[which].setdefault(identifier, []).append(one)
            return self.index[level]

    def main(self, level: str, one: Instance) -> dict[str, str]:
        """What the database keeps at one level: from the first instance received of it."""
        first = self.members(level)[one.ids[level]][0]
        return {tag: value for tag, value in first.header.items() if tag in MAIN[level] and isinstance(value, str)}

    def stable(self, held: Iterable[Instance]) -> bool:
        return time.monotonic() - max(one.received for one in held) >= self.stable_age

    def resource(self, level: str, identifier: str, short: bool) -> dict:
        """A resource as `expand` tells it."""
        held = self.members(level).get(identifier)
        if not held:
            raise NotFound

        def named(tags: dict) -> dict:
            return (
                tags if short else {keyword_for_tag(tag.replace(",", "")) or tag: value for tag, value in tags.items()}
            )

        told: dict[str, Any] = {
            "ID": identifier,
            "Type": level,
            f"Parent{PARENT[level]}": held[0].ids[PARENT[level]],
            "MainDicomTags": named(self.main(level, held[0])),
        }
        if level == "Study":
            told |= {
                "PatientMainDicomTags": named(self.main("Patient", held[0])),
                "Series": list(dict.fromkeys(one.ids["Series"] for one in held)),
            }
        if level == "Series":
            instances = [one.id for one in held]
            told |= {
                "Instances": instances if self.old else sorted(instances),
                "Status": "Unknown",
                "ExpectedNumberOfInstances": None,
            }
        if level != "Instance":
            told["IsStable"] = self.stable(held)
        return told

    # -- tools/find --------------------------------------------------------------------------------------------------

    def find(self, asked: dict) -> list:
        level, query = asked.get("Level"), asked.get("Query")
        if level not in PARENT or not isinstance(query, dict):
            raise BadRequest(f"Invalid resource type '{level}'")
        patterns, members = patterns_of(query), self.members(level)
        found = self.rows(level, patterns, asked)
        if self.old or "OrderBy" not in asked:
            pass
        elif self.postgresql:
            raise NotImplementedYet("The database backend doesn't support ordering")
        elif asked["OrderBy"] != RECEIVED:
            raise BadRequest("the stand-in knows no other order")

        def fitting(some: list[str]) -> list[str]:
            return [one for one in some if self.matches(level, members[one][0], patterns)]
        if self.old:    # cut in the order received, before they are sorted
            found = fitting(found[:self.cap + 1] if self.cap else found)
            found = self.page(found if level == "Instance" else sorted(found), asked)
        elif self.postgresql:    # as many rows as to the end of the page, of which those that fit are counted
            since, limit = asked.get("Since", 0), asked.get("Limit", 0)
            rows = since + limit or (self.cap + 1 if self.cap and "Since" not in asked else 0)
            if rows:
                found = (found if query else sorted(found))[:rows]
            found = fitting(found)[since:]
        else:    # a page of rows, of which those that do not fit are missing
            found = fitting(self.page(found if "OrderBy" in asked else sorted(found), asked))
        if not asked.get("Expand"):
            return found
        if self.old or "ResponseContent" not in asked:
            return [self.resource(level, identifier, bool(asked.get("Short"))) for identifier in found]
        return [self.requested(level, identifier, members[identifier], asked) for identifier in found]

    def rows(self, level: str, patterns: dict[str, str], asked: dict) -> list[str]:
        """What the index finds, in the order received: it keeps values without padding."""
        parent = None if self.old else asked.get("ParentSeries")
        return [identifier for identifier, held in self.members(level).items()
                if self.matches(level, held[0], patterns, str.strip) and parent in (None, held[0].ids["Series"])]

    def page(self, found: list[str], asked: dict) -> list[str]:
        """Since and Limit, and what LimitFindResults makes of them."""
        since, limit = asked.get("Since", 0), asked.get("Limit", 0)
        if self.cap and not self.old and (limit or "Since" not in asked):
            limit = min(limit or self.cap, self.cap)
        return found[since:since + limit] if limit else found[since:]

    def matches(self, level: str, first: Instance, patterns: dict[str, str], read: Callable[[str], str] = str) -> bool:
        kept = {tag: value for one in LEVELS[:LEVELS.index(level) + 1] for tag, value in self.main(one, first).items()}
        return all(match(read(kept.get(tag, "")), read(pattern), tag) for tag, pattern in patterns.items())

    def requested(self, level: str, identifier: str, held: list[Instance], asked: dict) -> dict:
        """A resource as ResponseContent wants it."""
        told: dict[str, Any] = {"ID": identifier, "Type": level}
        for word in asked["ResponseContent"]:
            if word == "Parent":
                told[f"Parent{PARENT[level]}"] = held[0].ids[PARENT[level]]
            elif word == "IsStable":
                if level != "Instance":
                    told["IsStable"] = self.stable(held)
            elif word == "RequestedTags":
                told["RequestedTags"] = self.requested_tags(level, held, asked["RequestedTags"])
            else:
                raise BadRequest(f"Unrecognized value in ResponseContent: {word}")
        return told

    def requested_tags(self, level: str, held: list[Instance], tags: list[str]) -> dict:
        above = LEVELS[:LEVELS.index(level) + 1]
        database: dict[str, Any] = {tag: value for one in above for tag, value in self.main(one, held[0]).items()}
        kept = {tag for one in above for tag in MAIN[one]}
        if level in COUNTED:
            database[COUNTED[level]] = str(len({one.ids[LEVELS[LEVELS.index(level) + 1]] for one in held}))
        if level == "Instance":
            database[SOP_CLASS] = held[0].header.get(SOP_CLASS)
        told: dict[str, Any] = {}
        for tag in tags:
            if not re.fullmatch("[0-9a-f]{4},[0-9a-f]{4}", tag):
                raise BadRequest("the stand-in wants hexadecimal tags")
            if tag in database:
                told[tag] = database[tag]
            elif tag not in kept and not self.blind:
                told[tag] = held[0].header.get(tag)
        return dict(sorted(told.items()))


def patterns_of(query: dict[str, str]) -> dict[str, str]:
    return {tag_of(name): pattern for name, pattern in query.items()}


def tag_of(name: str) -> str:
    """A queried tag; those that Orthanc does not keep in its database are none of this program's business."""
    number = tag_for_keyword(name)
    tag = written(number) if number else name
    if not any(tag in tags for tags in MAIN.values()):
        raise BadRequest(f"the stand-in cannot be asked for {name}")
    return tag


def match(value: str, pattern: str, tag: str) -> bool:
    """An empty pattern matches all; \\ makes a list, * and ? are wildcards, case does not matter; dates have ranges."""
    vr = dictionary_VR(tag.replace(",", ""))
    if vr == "DA":
        if re.search(r"[*?]", pattern):
            raise BadRequest(f"Wildcards are not allowed on tag {tag}")
        first, dash, last = pattern.partition("-")
        return not pattern or bool(value) and ((first or "0") <= value <= (last or "9") if dash else value == pattern)
    if vr == "UI":
        return not pattern or value in pattern.split("\\")
    return not pattern or any(
        fnmatch.fnmatchcase(value.upper(), one.upper().replace("[", "[[]")) for one in pattern.split("\\")
    )


def content(ds: pydicom.Dataset, path: list[str]) -> bytes | list[str]:
    """One element by tag, item, tag …: its bytes, or the names of what a sequence or an item holds."""
    for tag, item in zip(path[0::2], [*path[1::2], None], strict=False):    # the None is for a path that ends in a tag
        number = Tag(tag.replace("-", ""))
        if number not in ds:
            raise NotFound
        element = ds.get_item(number)
        if vr_of(element) != "SQ":
            if item is not None:
                raise NotFound
            return raw_of(ds, number)
        items = ds[number].value
        if item is None:
            return [str(count) for count in range(len(items))]
        if not item.isdigit() or int(item) >= len(items):
            raise NotFound
        ds = items[int(item)]
    return [written(one).replace(",", "-") for one in sorted(ds.keys())]


def main(argv=None):
    parser = argparse.ArgumentParser(description="A stand-in for an Orthanc server, on loopback, until Ctrl-C.")
    parser.add_argument("--port", type=int, default=0, help="where to listen (default: a free port)")
    kinds = parser.add_mutually_exclusive_group()
    kinds.add_argument("--old", action="store_true", help="answer as Orthanc 1.10.1 instead of 1.12.7")
    kinds.add_argument("--postgresql", action="store_true", help="answer as Orthanc 1.12.7 with PostgreSQL")
    parser.add_argument("files", metavar="FILE", nargs="*", help="DICOM files to hold")
    arguments = parser.parse_args(argv)
    server = StandIn(old=arguments.old, postgresql=arguments.postgresql, port=arguments.port)
    for name in arguments.files:
        with open(name, "rb") as file:
            server.upload(file.read())
    with server, contextlib.suppress(KeyboardInterrupt):
        print(server.url, flush=True)
        server.stopping.wait()


if __name__ == "__main__":
    sys.exit(main())
