#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = [
#     "pyorthanc[progress]>=1.23,<2",
#     "pydicom>=2.4,<4",
# ]
# ///
"""Keep SAR and scan times of the MRI studies of an Orthanc server in a local SQLite file.

    ./store_study_info.py [options] TOKEN [TOKEN ...]

A TOKEN is an accession number (E12345), a day (20240427), a month (202404), a range of either
(20240401-20240415, 202401-202403, 202401- until today), yesterday, today, or @FILE with more of them.

The pipeline: every token is checked before anything is contacted or written; the server is asked which studies the
tokens mean; each accession is fetched with one request for all its series (older servers: a few more, never an
image); parsers turn the text of the DICOM tags into values or None; each accession is stored in one transaction.

The promises: a number that cannot be read is NULL, never a guess; an accession is stored whole or not at all; what a
server may have held back is said; whatever fails ends in a sentence, and the rest is stored all the same.

Exit status: 0 everything named is in the database (a date without studies too); 1 something is not, the messages say
what; 2 usage error, nothing was contacted or written; 130 and 143 interrupted by SIGINT and SIGTERM.
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # until main() listens: an interrupt during imports is no traceback

import argparse
import contextlib
import datetime
import functools
import gc
import logging
import math
import os
import queue
import re
import sqlite3
import stat
import struct
import sys
import threading
import time
import types
from collections import Counter, deque
from decimal import Decimal
from typing import Any, Callable, Iterable, Iterator, NamedTuple

__version__ = "1.0.0"

HOST = "micvna.mclean.harvard.edu"
PORT = 8042

DEFAULT_URL = f"http://{HOST}:{PORT}"
DEFAULT_DB = "study_info.db"
DEFAULT_JOBS = 4          # more clients at once gain nothing: Orthanc parses DICOM with two threads
DEFAULT_TIMEOUT = 60.0    # seconds for one whole answer

CONNECT_SECONDS = 10.0    # a host that swallows packets is given up sooner than a slow answer
KEEPALIVE_SECONDS = 0.8   # Orthanc closes idle connections after 1 s (1.11.3 and newer)
TRIES = 6                 # of one request, where repeating can help
PATIENT_TRIES = 9         # where a server that had answered cannot be reached: half a minute, in which it may restart
TIMEOUT_TRIES = 2         # a read that times out is repeated once
FIRST_WAIT = 0.25         # seconds before the second try, doubled each time, with jitter
TALLEST_WAIT = 8.0        # no single wait grows above it
LONGEST_WAIT = 60.0       # seconds that one request may spend waiting in all; a longer Retry-After is not waited for
ANSWER_BYTES = 256 << 20  # no answer that this program asks for comes near it
BUSY_SECONDS = 30.0       # how long another writer of the database is waited for
MOMENT = 0.2              # the main thread never blocks for longer, so that it hears signals
AHEAD = 128               # accessions fetched and not yet stored, at most: what bounds the memory
MORE = 6                  # requests that a series may cost beyond its header, to find what is missing
LOOKS = 6                 # of its instances whose header may be read, the first one included
LONGEST_SCAN = 86400      # seconds; an AcquisitionDuration above a day is in another unit
PROBE = 1000              # studies asked for to see whether an older server cuts its answers

log = logging.getLogger("store_study_info")

# What only some runs need is imported where it is used: `--help` and usage errors come at once.


# ------------------------------------------------------------------------------------------------------------------
# Errors: what a user can meet, each a sentence
# ------------------------------------------------------------------------------------------------------------------

class StudyInfoError(Exception):
    """Base of all errors of this program. Its text is one sentence with the value, the place and what to do."""

    exit_status = 1


class UsageError(StudyInfoError):
    """The command line, or what it names, is wrong: nothing was contacted or written."""

    exit_status = 2


class RunError(StudyInfoError):
    """Nothing more can be done in this run: access denied, no server, database trouble."""


class DatabaseError(RunError):
    """The database cannot be read or written."""


class StudyError(StudyInfoError):
    """One accession, or one date, cannot be had or stored; the others go on."""


class ServerError(StudyError):
    """An answer of the server was not what was asked for."""


class TransientError(ServerError):
    """A fault that repeating the request may cure.

    tries: how often the request is made in all; wait: seconds the server asked for, or None;
    contact: False where not even a connection could be made; stale: the fault of a connection the server had closed.
    """

    def __init__(self, text: str, tries: int = TRIES, wait: float | None = None, contact: bool = True, stale: bool = False):
        super().__init__(text)
        self.tries, self.wait, self.contact, self.stale = tries, wait, contact, stale


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived. Not an Exception, so that nothing on the way swallows it."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.name, self.exit_status = signal.Signals(signum).name, 128 + signum


# ------------------------------------------------------------------------------------------------------------------
# Parsers: text of a DICOM element in, value or None out
# ------------------------------------------------------------------------------------------------------------------

def clean(value: Any) -> str | None:
    """Text without its padding, None where nothing is left.

    DICOM pads with a blank or NUL to even length (PS3.5 6.2); real files pad with several. What is no text is None.
    Lone surrogates, which JSON can carry and neither SQLite nor a terminal can, become U+FFFD.
    """
    if not isinstance(value, str):
        return None
    text = value.replace("\0", " ").strip()
    return (text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")) or None


_NUMBER = re.compile(r"[+-]?(\d{1,300}\.?\d{0,300}|\.\d{1,300})([eE][+-]?\d{1,4})?", re.ASCII)


def number(text: str | None) -> float | None:
    """A decimal string (DS, or FD as Orthanc prints it) -> finite float, else None. `67.00 ` occurs; `1,5` is no number."""
    text = clean(text)
    if text is None or not _NUMBER.fullmatch(text):
        return None
    value = float(text)
    return value if math.isfinite(value) else None


def magnitude(text: str | None) -> float | None:
    """A number that is 0 or more, else None: SAR in W/kg, height in m, weight in kg, seconds."""
    value = number(text)
    return value if value is not None and value >= 0 else None


_WHOLE = re.compile(r"([+-]?\d{1,20})(\.0*)?", re.ASCII)


def whole(text: str | None) -> int | None:
    """An integer string (IS) -> int, None where it is none or beyond the 64 bits that SQLite holds."""
    match = _WHOLE.fullmatch(clean(text) or "")
    value = int(match[1]) if match else None
    return value if value is not None and -(2 ** 63) <= value < 2 ** 63 else None


_AGE = re.compile(r"0*(\d{1,3})(?:\s*([YMWDymwd])|\.\d*)?", re.ASCII)


def age(text: str | None) -> int | None:
    """PatientAge -> completed years, else None.

    AS is three digits and a unit (PS3.5 6.2); `30Y`, `42` and `9.0 ` occur too, `*** ` is nothing. Weeks and days are
    counted in years of 365 days.
    """
    match = _AGE.fullmatch(clean(text) or "")
    if not match:
        return None
    count, unit = int(match[1]), (match[2] or "Y").upper()
    return {"Y": count, "M": count // 12, "W": count * 7 // 365, "D": count // 365}[unit]


_DURATION = re.compile(
    r"(?:TA:?\s*)?"
    r"(?:(?:(?P<hours>\d{1,4}):(?=\d\d:))?(?P<minutes>\d{1,4}):(?=\d\d(?!\d)))?"
    r"(?P<seconds>\d{1,7}(?:[.,]\d{1,6})?)"
    r"(?:\s*\*\s*(?P<times>\d{1,4}))?",
    re.ASCII | re.IGNORECASE)


def acquisition_time(text: str | None) -> Decimal | None:
    """The Siemens acquisition time (0051,100a) -> seconds, exact, or None where a person could not tell.

    `TA 12.34` is seconds and hundredths (VB13 to VE11), `TA 02:07` mm:ss, `TA: 00:03:11` hh:mm:ss (XA), and `*6` the
    number of concatenations, which multiplies. Within a colon form all but the leading part are below 60.
    """
    match = _DURATION.fullmatch(clean(text) or "")
    if not match:
        return None
    hours, minutes, times = (int(match[part] or default) for part, default in (("hours", 0), ("minutes", 0), ("times", 1)))
    seconds = Decimal(match["seconds"].replace(",", "."))
    if times == 0 or (match["minutes"] and seconds >= 60) or (match["hours"] and minutes >= 60):
        return None
    return (hours * 3600 + minutes * 60 + seconds) * times


def half_up(seconds: Decimal) -> int:
    """Whole seconds, a half rounded up: 100.8 -> 101, 0.5 -> 1."""
    return int(seconds + Decimal("0.5"))


# ------------------------------------------------------------------------------------------------------------------
# The fields: from this table follow the schema, the tags asked for, the upserts and the CSV header
# ------------------------------------------------------------------------------------------------------------------

class Field(NamedTuple):
    column: str
    tag: str            # gggg,eeee in lower-case hexadecimal, as Orthanc writes it under `Short`
    sql: str            # type and constraints
    parse: Callable     # text or None -> value or None


ACCESSION, STUDY_DATE, STUDY_UID, SERIES_UID = "0008,0050", "0008,0020", "0020,000d", "0020,000e"
PATIENT_ID, SAR, TIME_OF_ACQUISITION = "0010,0020", "0018,1316", "0051,100a"

STUDY_FIELDS = (
    Field("accession", ACCESSION, "TEXT PRIMARY KEY", clean),
    Field("patient_id", PATIENT_ID, "TEXT", clean),
    Field("age", "0010,1010", "INTEGER", age),
    Field("height", "0010,1020", "REAL", magnitude),
    Field("weight", "0010,1030", "REAL", magnitude),
    Field("sex", "0010,0040", "TEXT", clean),
    Field("ethnic_group", "0010,2160", "TEXT", clean),
    Field("body_part", "0018,0015", "TEXT", clean),
    Field("manufacturer_model", "0008,1090", "TEXT", clean),
    Field("study_date", STUDY_DATE, "TEXT", clean),
    Field("study_description", "0008,1030", "TEXT", clean),
)
SERIES_FIELDS = (
    Field("series_uid", SERIES_UID, "TEXT PRIMARY KEY", clean),
    Field("accession", ACCESSION, "TEXT NOT NULL REFERENCES studies(accession)", clean),
    Field("sar", SAR, "REAL", magnitude),
    Field("duration", TIME_OF_ACQUISITION, "INTEGER", acquisition_time),
    Field("series_number", "0020,0011", "INTEGER", whole),
    Field("series_description", "0008,103e", "TEXT", clean),
    Field("pulse_sequence_name", "0018,9005", "TEXT", clean),
    Field("sequence_name", "0018,0024", "TEXT", clean),
)
TABLES = {"studies": STUDY_FIELDS, "series": SERIES_FIELDS}

MODALITY, MANUFACTURER, SOP_CLASS, SOP_UID = "0008,0060", "0008,0070", "0008,0016", "0008,0018"
IMAGE_TYPE, SHARED_GROUPS, DURATION_SECONDS = "0008,0008", "5200,9229", "0018,9073"
SERIES_OF_STUDY, INSTANCES_OF_SERIES = "0020,1206", "0020,1209"    # counted by Orthanc itself, in no file

# Private blocks are looked for in the first four places (PS3.5 7.8.1); a moved block was seen one place further.
BLOCKS = ("10", "11", "12", "13")
SIEMENS_HEADER = ("0051", "SIEMENS MR HEADER", "0a")
SIEMENS_PROTOCOLS = (("0029", "SIEMENS CSA HEADER", "20"), ("0021", "SIEMENS MR SDS 01", "19"))

# What Orthanc keeps of a study and its patient, the same for all its series.
STUDY_LEVEL = (ACCESSION, STUDY_DATE, STUDY_UID, "0008,1030", PATIENT_ID, "0010,0040")
STUDY_TAGS = (ACCESSION, STUDY_DATE, STUDY_UID, SERIES_OF_STUDY)
SERIES_TAGS = tuple(dict.fromkeys(
    [field.tag for fields in TABLES.values() for field in fields]
    + [MODALITY, MANUFACTURER, SOP_CLASS, SOP_UID, STUDY_UID, INSTANCES_OF_SERIES]
    + [f"0051,{kind}" for block in BLOCKS for kind in (f"00{block}", f"{block}0a")]))
FALLBACK_TAGS = (IMAGE_TYPE, DURATION_SECONDS, SHARED_GROUPS,
                 *(f"{group},00{block}" for group, _, _ in SIEMENS_PROTOCOLS for block in BLOCKS))


# ------------------------------------------------------------------------------------------------------------------
# Tokens: what the user names
# ------------------------------------------------------------------------------------------------------------------

class Accession(NamedTuple):
    text: str


class Dates(NamedTuple):
    token: str
    first: datetime.date
    last: datetime.date     # included


TOKEN_HELP = ("an accession number, which begins with a capital E (E12345), a day (YYYYMMDD), a month (YYYYMM), a range of days or months "
              "(YYYYMMDD-YYYYMMDD, YYYYMM-YYYYMM, open at the end: YYYYMM-), yesterday, today or @FILE")

# What Orthanc matches as it stands: * and ? are wildcards and \ makes a list, with which it would answer with other
# patients' studies. A named accession is always plain, the server's own need not be.
PLAIN = re.compile(r"[A-Za-z0-9._/ -]+")
UNSAFE = re.compile(r"[^A-Za-z0-9._/ -]")
_DATES = re.compile(r"(\d{8})(?:(-)(\d{8})?)?|(\d{6})(?:(-)(\d{6})?)?", re.ASCII)


def parse_token(token: str, today: datetime.date) -> Accession | Dates:
    """One token, @FILE excepted -> what it means. Raises UsageError with the token and what is allowed."""
    if len(token) > 1 and token[0] == "E" and token[-1] != " " and PLAIN.fullmatch(token):
        return Accession(token)
    if token in ("today", "yesterday"):
        day = today - datetime.timedelta(days=token == "yesterday")
        return Dates(token, day, day)
    match = _DATES.fullmatch(token)
    if not match:
        raise UsageError(f"token {quoted(token)} is not understood; allowed are {TOKEN_HELP}")
    start, dash, end = match.group(1, 2, 3) if match[1] else match.group(4, 5, 6)
    first, last = span_of(start, token)
    if dash:
        last = span_of(end, token)[1] if end else today
    if first > last:
        raise UsageError(f"range {quoted(token)} ends before it starts" + ("" if end else f": today is {digits_of(today)}") + f"; allowed are {TOKEN_HELP}")
    return Dates(token, first, last)


def span_of(digits: str, token: str) -> tuple[datetime.date, datetime.date]:
    """First and last day of YYYYMM or YYYYMMDD."""
    year, month, day = int(digits[:4]), int(digits[4:6]), digits[6:]
    try:
        first = datetime.date(year, month, int(day or 1))
    except ValueError:
        raise UsageError(f"token {quoted(token)}: {digits} is no {'day' if day else 'month'} of the calendar; allowed are {TOKEN_HELP}") from None
    return first, first if day else month_end(first)


def expand_tokens(tokens: Iterable[str], today: datetime.date, stdin=None) -> list[Accession | Dates]:
    """All tokens checked, files read, double ones dropped."""
    meant: dict[Accession | Dates, None] = {}
    for token in tokens:
        if not token.startswith("@"):
            meant[parse_token(token, today)] = None
            continue
        for place, line in token_lines(token[1:], stdin):
            try:
                meant[parse_token(line, today)] = None
            except UsageError as error:
                raise UsageError(f"{place}: {error}") from None
    return list(meant)


def token_lines(name: str, stdin=None) -> Iterator[tuple[str, str]]:
    """('FILE, line N', token) for each line of a token file that has one; `-` is standard input."""
    try:
        if name == "-":
            if not (stdin or sys.stdin):
                raise OSError("there is no standard input")
            data = (stdin or sys.stdin.buffer).read()
        else:
            with open(name, "rb") as file:
                data = file.read()
        lines = re.split(r"\r\n|\n|\r", data.decode("utf-8-sig"))     # splitlines() would cut at control characters too
    except (OSError, ValueError) as error:
        raise UsageError(f"token file @{printable(name)} cannot be read: {reason_of(error)}") from None
    for count, line in enumerate(lines, 1):
        line = re.split(r"(?:^|[ \t])#", line, maxsplit=1)[0].strip(" \t")
        if line.startswith("@"):
            raise UsageError(f"@{printable(name)}, line {count}: {quoted(line)} is not allowed here: a token file names no other token file")
        if line:
            yield f"@{printable(name)}, line {count}", line


def months_of(dates: Dates) -> Iterator[tuple[datetime.date, datetime.date]]:
    """A span cut at the ends of months, so that no single answer grows with its length."""
    first = dates.first
    while first <= dates.last:
        end = month_end(first)
        yield first, min(end, dates.last)
        if end == datetime.date.max:
            return
        first = end + datetime.timedelta(days=1)


def month_end(day: datetime.date) -> datetime.date:
    """The last day of a day's month."""
    if day.month == 12:
        return day.replace(day=31)
    return day.replace(month=day.month + 1, day=1) - datetime.timedelta(days=1)


def digits_of(day: datetime.date) -> str:
    """YYYYMMDD, as DICOM writes dates (DA); strftime does not pad years on every system."""
    return day.isoformat().replace("-", "")


def days_of(first: datetime.date, last: datetime.date) -> list[datetime.date]:
    """Every day from first to last, both included."""
    return [datetime.date.fromordinal(day) for day in range(first.toordinal(), last.toordinal() + 1)]


# ------------------------------------------------------------------------------------------------------------------
# Reading a header: {tag: text, None or list of items} -> values, or the reason why there is none
# ------------------------------------------------------------------------------------------------------------------

Header = dict[str, Any]

SAR_ABSENT, SAR_UNREADABLE = "SAR absent", "SAR not readable"
TIME_ABSENT, TIME_UNREADABLE, OTHER_VENDOR = "duration absent", "duration not readable", "another vendor's tag"
REASONS = (SAR_ABSENT, SAR_UNREADABLE, TIME_ABSENT, TIME_UNREADABLE, OTHER_VENDOR)

# Their SAR is nested and they never carry 0051,100a: enhanced MR, spectroscopy, enhanced colour, legacy converted.
ENHANCED = {f"1.2.840.10008.5.1.4.1.1.4.{number}" for number in (1, 2, 3, 4)}


class Reading(NamedTuple):
    """A value with None as reason, or None with one of REASONS; detail is for the log."""

    value: Any
    reason: str | None = None
    detail: str = ""


class Measured(NamedTuple):
    """What one instance says of its series."""

    header: Header
    sar: Reading        # W/kg, float
    duration: Reading   # seconds, Decimal, not yet rounded
    instance: str | None = None     # its ID, where it is not the first instance

    @property
    def complete(self) -> bool:
        """Whether both are there: the series can be stored."""
        return self.sar.value is not None and self.duration.value is not None


def get_element(header: Header, tag: str) -> str | None:
    """The element's text without padding; None where it is absent, empty or no text."""
    return clean(header.get(tag))


def private_tag(header: Header, group: str, creator: str, element: str) -> str | None:
    """Where the private block of a creator has its element, in lower-case hexadecimal; None where the creator is not seen."""
    places = [f"{group},{block}{element}" for block in BLOCKS if (get_element(header, f"{group},00{block}") or "").upper() == creator]
    return next((tag for tag in places if header.get(tag) is not None), places[0] if places else None)


def hidden_time(header: Header) -> str | None:
    """The tag of an acquisition time that may be there although the server says null.

    Orthanc does not decode private elements of VR UN or of Implicit VR files, only their raw content.
    """
    tag = private_tag(header, *SIEMENS_HEADER)
    return tag if tag and header.get(tag) is None else None


def extract_sar(header: Header) -> Reading:
    """SAR (0018,1316) in W/kg."""
    text = get_element(header, SAR)
    if text is None:
        return Reading(None, SAR_ABSENT, f"SAR ({SAR}) is {'empty' if header.get(SAR) is not None else 'absent'}")
    value = magnitude(text)
    if value is None:
        return Reading(None, SAR_UNREADABLE, f"SAR ({SAR}) is not readable: {quoted(text)}")
    return Reading(value)


def extract_duration(header: Header) -> Reading:
    """The Siemens acquisition time in seconds, wherever its private block is.

    Under another creator (0051,100a) means something else (GE's GEMS_FUNCTOOL_01 keeps a signed number there); with
    no creator at all it is taken if it reads as a duration.
    """
    siemens, other = private_tag(header, *SIEMENS_HEADER), get_element(header, "0051,0010")
    tag = siemens or TIME_OF_ACQUISITION
    text = get_element(header, tag)
    if text is None:
        return Reading(None, TIME_ABSENT, f"duration ({tag}) is {'empty' if header.get(tag) is not None else 'absent'}")
    if other and not siemens:
        return Reading(None, OTHER_VENDOR, f"({tag}) belongs to {quoted(other)}, it is no duration")
    value = acquisition_time(text)
    if value is None:
        return Reading(None, TIME_UNREADABLE, f"duration ({tag}) is not readable: {quoted(text)}")
    return Reading(value)


def measure(header: Header, instance: str | None = None) -> Measured:
    """SAR and duration as one instance states them."""
    return Measured(header, extract_sar(header), extract_duration(header), instance)


def may_be_elsewhere(found: Measured) -> bool:
    """Whether other instances of the series may have what this one lacks.

    One object of a private class among the images lacks both while 544 others have them. Where another vendor's
    creator or manufacturer, or an enhanced object, explains the lack, they have not.
    """
    if not {found.sar.reason, found.duration.reason} & {SAR_ABSENT, TIME_ABSENT}:
        return False
    creators = [get_element(found.header, f"0051,00{block}") for block in BLOCKS]
    manufacturer = (get_element(found.header, MANUFACTURER) or "SIEMENS").upper()
    return (not any(creators) or private_tag(found.header, *SIEMENS_HEADER) is not None) \
        and "SIEMENS" in manufacturer \
        and get_element(found.header, SOP_CLASS) not in ENHANCED \
        and get_element(found.header, INSTANCES_OF_SERIES) != "1"


def extract_series(found: Measured, accession: str) -> dict[str, Any]:
    """The row of a series whose SAR and duration were found."""
    row = {field.column: field.parse(found.header.get(field.tag)) for field in SERIES_FIELDS}
    return row | {"accession": accession, "sar": found.sar.value, "duration": half_up(found.duration.value)}


def extract_study(headers: list[Header], accession: str) -> dict[str, Any]:
    """The row of a study: of each column the first of its series, by number and UID, that has a value."""
    headers = sorted(headers, key=series_order)
    row = {field.column: next((value for header in headers if (value := field.parse(header.get(field.tag))) is not None), None)
           for field in STUDY_FIELDS}
    return row | {"accession": accession}


def series_order(header: Header) -> tuple:
    """Key to sort series by SeriesNumber, a missing one last, then by UID."""
    position = whole(header.get("0020,0011"))
    return position is None, position or 0, get_element(header, SERIES_UID) or ""


def whole_body_sar(groups: Any) -> float | None:
    """The whole-body SAR in functional groups of an enhanced MR object, W/kg (PS3.3 C.8.13.5.2).

    The other items are of the head, a part of the body or local; Siemens lists SMR_B1RMS among them, which is no SAR.
    """
    for timing in items_of(groups, "0018,9112"):
        for item in items_of(timing.get("0018,9239")):
            if get_element(item, "0018,9179") == "IEC_WHOLE_BODY":
                return magnitude(get_element(item, "0018,9181"))
    return None


def items_of(sequence: Any, tag: str | None = None) -> Iterator[Header]:
    """The items of a sequence, or of the sequence `tag` in each of them; nothing where there is no sequence."""
    for item in sequence if isinstance(sequence, list) else ():
        if isinstance(item, dict):
            yield from items_of(item.get(tag)) if tag else (item,)


def stated_duration(header: Header) -> Decimal | None:
    """AcquisitionDuration (0018,9073) in seconds. UIH writes milliseconds (190713.0)."""
    value = magnitude(get_element(header, DURATION_SECONDS))
    if value is not None and (get_element(header, MANUFACTURER) or "").upper().startswith(("UIH", "UNITED IMAGING")):
        value /= 1000
    return Decimal(repr(value)) if value is not None and value <= LONGEST_SCAN else None


def protocol_duration(protocol: bytes) -> Decimal | None:
    """The total scan time in seconds from the text of a Siemens protocol: `lTotalScanTimeSec = 450`."""
    match = re.search(rb"lTotalScanTimeSec\s*=\s*(\d{1,9})(?!\d)", protocol)
    return Decimal(match[1].decode()) if match and int(match[1]) else None


# ------------------------------------------------------------------------------------------------------------------
# Orthanc: few requests, checked answers, no image
# ------------------------------------------------------------------------------------------------------------------

class Study(NamedTuple):
    id: str
    uid: str
    accession: str
    date: str           # YYYYMMDD, or empty
    stable: bool
    series: int         # how many it has
    tags: Header        # what the server keeps at study level, where it was asked for


class Series(NamedTuple):
    id: str
    study: str          # the study's Orthanc ID
    stable: bool
    header: Header      # of the first instance received; of an older server only what it keeps of study and series
    instances: tuple[str, ...] | None   # in the order received, where the server tells


class Credentials(NamedTuple):
    login: str
    password: str


class Server:
    """The Orthanc server of one run. Every request goes through `ask`, from any thread.

    where: for messages, the netrc file and host that credentials were looked up in. Raises UsageError where
    SSL_CERT_FILE cannot be read.
    """

    def __init__(self, url: str, credentials: Credentials | None = None, timeout: float = DEFAULT_TIMEOUT, where: str = "no netrc"):
        self.url, self.timeout, self.where = url.rstrip("/"), timeout, where
        self.answered = -math.inf      # when the last answer came, whatever it said
        self.proven: float = 1         # an older server's answer with fewer studies than this was not cut
        self.most = 0                  # records that it was ever seen to return in one answer
        self.requested = False         # whether its last answer about studies knew RequestedTags (1.11 and newer)
        self._credentials, self._verify = credentials, certificates(url)
        self._client: Any = None
        self._extended: bool | None = None
        self._thread = threading.local()    # of each: count, the requests made; end, when its answer must be whole

    # -- one request -----------------------------------------------------------------------------------------------

    @property
    def client(self):
        """pyorthanc's client, opened by the first request (`/system`, before several threads make any): a run that asks nothing imports nothing."""
        if self._client is None:
            self._client = open_client(self.url, self._credentials, self.timeout, self._verify)
        return self._client

    def close(self) -> None:
        """Close the connections, if there are any."""
        if self._client is not None:
            self._client.close()

    def asked(self) -> int:
        """How many requests this thread has made, repeated ones counted once."""
        return getattr(self._thread, "count", 0)

    def ask(self, method: str, path: str, body: Any = None, raw: bool = False, cut: bytes | None = None) -> bytes | None:
        """One answer, the request repeated where that can help.

        With `raw` it is the bytes of an element, None where that is absent (404). With `cut`, the mark of a member of
        a JSON object, the answer ends before it and the rest is not read. Raises ServerError for this request,
        RunError where the run cannot go on.
        """
        self._thread.count = self.asked() + 1
        began, waited, tries, stale = time.monotonic(), 0.0, 0, False
        while True:
            try:
                return self._once(method, path, body, raw, cut)
            except TransientError as fault:
                if fault.stale and not stale:
                    stale = True    # the server had just closed an idle connection: repeated without a word
                    continue
                tries += 1
                enough = PATIENT_TRIES if self.answered > -math.inf and not fault.contact else fault.tries
                wait = fault.wait if fault.wait is not None else growing_wait(tries)
                waited += wait
                if tries >= enough or waited > LONGEST_WAIT:
                    raise self._given_up(fault, tries, began) from None
                first = self.answered == -math.inf and tries == 1 and sys.stderr.isatty()    # a person waits
                log.log(SUMMARY if first else logging.DEBUG, "%s %s: %s; next try in %.1f s", method, path, fault, wait)
                time.sleep(wait)

    def _given_up(self, fault: TransientError, tries: int, began: float) -> StudyInfoError:
        """The end of a request's tries: of the whole run where the server cannot be reached (any more)."""
        text = f"{fault}, {tries} tries" if tries > 1 else str(fault)
        if fault.wait is not None and fault.wait > LONGEST_WAIT:
            text = f"{fault} and asks to wait {fault.wait:.0f} s: run again later"
        if not fault.contact and self.answered < began:
            return RunError(f"{text}; is --url right, and the server running?")
        if self.answered == -math.inf:
            return RunError(f"{text}; is --url right, and is it http or https?")
        return ServerError(text)

    def _once(self, method: str, path: str, body: Any, raw: bool, cut: bytes | None) -> bytes | None:
        """One try of a request. Raises TransientError where another may help."""
        client = self.client    # first of all: it says which package is missing
        import httpx
        try:
            with client.stream(method, self.url + path, json=body, extensions={"trace": self._watch}) as response:
                self.answered = time.monotonic()
                if response.status_code == 404 and raw:
                    return None
                self._check_status(response, path)
                if raw and not response.headers.get("content-type", "").startswith("application/octet-stream"):
                    raise ServerError(f"{self.url} answered {path} with something else than the bytes of an element")
                return self._read(response, path, cut)
        except httpx.TimeoutException as error:
            if isinstance(error, (httpx.ConnectTimeout, httpx.PoolTimeout)):
                raise TransientError(f"{self.url} cannot be reached within {min(CONNECT_SECONDS, self.timeout):g} s", TRIES // 2, contact=False) from None
            raise TransientError(f"{self.url} did not answer {path} completely within {self.timeout:g} s", TIMEOUT_TRIES) from None
        except httpx.ConnectError as error:
            raise self._no_connection(error) from None
        except httpx.TransportError as error:
            stale = isinstance(error, (httpx.RemoteProtocolError, httpx.ReadError, httpx.WriteError))
            raise TransientError(f"{self.url} broke the connection while answering {path} ({type(error).__name__})", stale=stale) from None
        except (httpx.HTTPError, httpx.InvalidURL, httpx.StreamError) as error:
            raise ServerError(f"{self.url} answered {path} with something that is no HTTP: {type(error).__name__}") from None

    def _watch(self, event: str, info: dict[str, Any]) -> None:
        """httpcore's trace of a request: from when it was sent the whole answer, header and body, has the time-out's seconds.

        A time-out of each read alone would let a server drip for ever. A connection is used by several threads, one at a time.
        """
        if event == "http11.receive_response_headers.started":
            self._thread.end = time.monotonic() + self.timeout
        elif event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            stream = info["return_value"]
            stream.read = self._in_time(stream.read)

    def _in_time(self, read: Callable) -> Callable:
        """A connection's `read` that ends when the time of the reading thread's answer does."""
        import httpx

        def read_in_time(max_bytes: int, timeout: float | None = None) -> bytes:
            left = self._thread.end - time.monotonic()
            if left <= 0:
                raise httpx.ReadTimeout("the time for the whole answer is over")
            return read(max_bytes, left)
        return read_in_time

    def _no_connection(self, error: BaseException) -> StudyInfoError:
        """What stands in the way of a connection: with https often the certificate."""
        import ssl
        cause: BaseException | None = error
        while cause is not None:
            if isinstance(cause, ssl.SSLCertVerificationError):
                return RunError(f"{self.url} has a certificate that is not trusted ({printable(cause.verify_message)}); "
                                "name the file of your certificate authority in the environment variable SSL_CERT_FILE")
            if isinstance(cause, ssl.SSLError):
                return RunError(f"{self.url} does not speak https: is it http?")
            cause = cause.__cause__ or cause.__context__
        return TransientError(f"{self.url} cannot be reached ({printable(str(error)) or 'no connection'})", contact=False)

    def _check_status(self, response, path: str) -> None:
        """Raise what a status other than 2xx means: for the run, for the study, or for this try alone."""
        status = response.status_code
        if 200 <= status < 300:
            return
        if status in (401, 403):
            what = "forbids this" if status == 403 else "refuses the user and password" if self._credentials else "wants a user and password"
            raise RunError(f"{self.url} {what} (HTTP {status}); credentials were looked up in {self.where}")
        if 300 <= status < 400:
            from urllib.parse import urlsplit
            target = urlsplit(response.headers.get("location", ""))
            raise ServerError(f"{self.url} redirects {path} to {printable(target.scheme)}://{printable(target.hostname or '')}: "
                              "redirects are not followed, give the final address as --url")
        text = f"{self.url} answered {path} with HTTP {status}"
        if status in (429, 502, 503, 504):
            raise TransientError(text, wait=retry_after(response.headers.get("retry-after")))
        raise ServerError(text)

    def _read(self, response, path: str, cut: bytes | None) -> bytes:
        """The body, bounded in bytes."""
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            if cut and (mark := data.find(cut)) >= 0:
                return bytes(data[:mark]).rstrip(b", \r\n") + b"}"
            if len(data) > ANSWER_BYTES:
                raise ServerError(f"{self.url} answered {path} with more than {ANSWER_BYTES >> 20} MB")
        return bytes(data)

    def json(self, kind: type, method: str, path: str, body: Any = None, cut: bytes | None = None) -> Any:
        """The answer as JSON of the type `kind`. Its text is never quoted in an error: it can hold patient data."""
        import json
        data = self.ask(method, path, body, cut=cut)
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            what = "HTML" if data.lstrip()[:1] == b"<" else "text"
            raise ServerError(f"{self.url} answered {path} with {len(data)} bytes of {what} that is no JSON: is it an Orthanc server?") from None
        if not isinstance(answer, kind):
            raise ServerError(f"{self.url} answered {path} with a JSON {type(answer).__name__} instead of a {kind.__name__}")
        return answer

    # -- what the server can -----------------------------------------------------------------------------------------

    @property
    def extended(self) -> bool:
        """Whether `Since` reaches everything: Capabilities.HasExtendedFind (1.12.5 and newer). One `/system` a run."""
        if self._extended is None:
            try:
                system = self.json(dict, "GET", "/system")
            except ServerError as error:
                raise RunError(f"{error}; is --url Orthanc's own address, as in http://host:8042?") from None
            if "Version" not in system:
                raise RunError(f"{self.url} is no Orthanc server: its /system names no Version")
            capabilities = system.get("Capabilities")
            self._extended = isinstance(capabilities, dict) and capabilities.get("HasExtendedFind") is True
        return self._extended

    def find(self, level: str, query: dict, tags: Iterable[str], content: Iterable[str], **more) -> list[Header]:
        """`tools/find`. Both `Since: 0` and `Limit: 0` are needed against a server's LimitFindResults."""
        body = {"Level": level, "Query": query, "Since": 0, "Limit": 0, "Expand": True, "Short": True,
                "RequestedTags": list(tags), "ResponseContent": list(content)} | more
        answers = self.json(list, "POST", "/tools/find", body)
        if not all(isinstance(answer, dict) for answer in answers):
            raise ServerError(f"{self.url} answered /tools/find with a list of other things than {level.lower()} records")
        self.most = max(self.most, len(answers))
        return answers

    def may_be_cut(self, count: int) -> bool:
        """Whether an answer of `count` studies of a server without extended find may have lost some to LimitFindResults.

        Seen by asking for all studies: fewer than the server counts are as many as it ever returns. The count comes
        first, so that a study that arrives in between does no harm.
        """
        if count >= self.proven:
            total = self.json(dict, "GET", "/statistics").get("CountStudies")
            if not isinstance(total, int):
                raise ServerError(f"{self.url} answered /statistics without the number of studies")
            limit = max(PROBE, count + 1)
            seen = len(self.json(list, "POST", "/tools/find", {"Level": "Study", "Query": {}, "Limit": limit}))
            self.proven = max(self.proven, math.inf if seen >= total else seen)
        return count >= self.proven

    # -- studies -----------------------------------------------------------------------------------------------------

    def find_studies(self, query: dict, tags: Iterable[str] = STUDY_TAGS) -> tuple[list[Study], bool]:
        """The studies that match, and whether that is proven to be all of them."""
        def page(**more):
            return self.find("Study", query, tags, ("RequestedTags", "IsStable"), **more)
        extended, answers = self.extended, page()
        if extended and "StudyDate" in query:
            while answers and (further := page(Since=len(answers), Limit=PROBE)):
                if any(one.get("ID") == answers[0].get("ID") for one in further):
                    raise ServerError(f"{self.url} answered /tools/find with the same studies again: it ignores 'Since'")
                answers += further
        if answers:
            self.requested = "RequestedTags" in answers[0]
        fewest = 1 if "StudyDate" in query else 2    # no limit cuts to a single study
        whole_answer = extended or len(answers) < fewest or not self.may_be_cut(len(answers))
        return [read_study(answer) for answer in answers], whole_answer

    def studies_between(self, first: datetime.date, last: datetime.date) -> tuple[list[Study], list[datetime.date]]:
        """The studies of accessions in E* from first to last, and the days that may be incomplete."""
        low, high = digits_of(first), digits_of(last)
        studies, whole_answer = self.find_studies({"AccessionNumber": "E*", "StudyDate": f"{low}-{high}"})
        studies = [study for study in studies if study.accession.startswith("E") and low <= study.date <= high]
        if whole_answer:
            return studies, []
        if first == last:
            return studies, [first]
        days = [self.studies_between(day, day) for day in days_of(first, last)]
        return [study for found, _ in days for study in found], [day for _, doubtful in days for day in doubtful]

    def studies_of(self, accession: str) -> tuple[list[Study], list[str]]:
        """All studies with exactly this accession, and others that the server took for it (case, wildcards).

        What is not plain is asked for with a wildcard: the server's index leaves out control characters and those
        beyond ASCII.
        """
        pattern = accession if PLAIN.fullmatch(accession) else UNSAFE.sub("*", accession) + "*"
        studies, whole_answer = self.find_studies({"AccessionNumber": pattern}, STUDY_TAGS + STUDY_LEVEL[3:])
        if not whole_answer:
            raise ServerError(f"{self.url} cuts its answers: not all studies of the accession can be seen; have the server's limit LimitFindResults lifted")
        return [study for study in studies if study.accession == accession], [study.accession for study in studies if study.accession != accession]

    # -- series and instances ----------------------------------------------------------------------------------------

    def series_of(self, accession: str, studies: Iterable[Study], tags: Iterable[str]) -> list[Series]:
        """All series of an accession in one request, each with the header of the first instance received; others that match too.

        One that is not plain is asked for by its studies' UIDs instead.
        """
        query = {"AccessionNumber": accession} if PLAIN.fullmatch(accession) else {"StudyInstanceUID": uid_list(studies)}
        answers = self.find("Series", query, tags, ("RequestedTags", "Parent", "IsStable"))
        return [read_series(answer) for answer in answers]

    def list_series(self, study: Study) -> list[Series]:
        """The series of a study, of an older server with their instances in the order received. No limit on results applies."""
        answers = self.json(list, "GET", f"/studies/{study.id}/series?expand&short")
        series = [read_series(answer) for answer in answers if isinstance(answer, dict)]
        if self.extended:    # lists instances by ID, not in the order received
            series = [one._replace(instances=None) for one in series]
        return [one._replace(header=one.header | {tag: study.tags.get(tag) for tag in STUDY_LEVEL}) for one in series]

    def instances_of(self, studies: Iterable[Study]) -> dict[str, tuple[str, ...]]:
        """{series ID: instance IDs in the order received}, for servers whose own lists are in another order.

        The reception date has a resolution of a second; within it Orthanc keeps the order of its database.
        """
        instances: dict[str, list[str]] = {}
        query = {"StudyInstanceUID": uid_list(studies)}
        for answer in self.find("Instance", query, (), ("Parent",), OrderBy=RECEIVED):
            instances.setdefault(required_id(answer, "ParentSeries"), []).append(required_id(answer, "ID"))
        return {series: tuple(ids) for series, ids in instances.items()}

    def instance_list(self, series: Series) -> tuple[str, ...]:
        """The instances of a series, in the order received where the server tells it."""
        if series.instances is not None:
            return series.instances
        return read_series(self.json(dict, "GET", f"/series/{series.id}")).instances or ()

    def first_instances(self, series: Series, tags: Iterable[str]) -> Iterator[tuple[str, Header]]:
        """(ID, header) of the first instances of a series in the order received, the very first one included.

        By the series' ID, as a SeriesInstanceUID can stand under two patients; page by page where LimitFindInstances cuts.
        """
        wanted, seen = min(LOOKS, whole(series.header.get(INSTANCES_OF_SERIES)) or LOOKS), 0
        while seen < wanted:
            page = self.find("Instance", {}, tags, ("RequestedTags", "Parent"), ParentSeries=series.id, OrderBy=RECEIVED, Since=seen, Limit=wanted - seen)
            for answer in page:
                if answer.get("ParentSeries") == series.id:
                    yield required_id(answer, "ID"), read_header(answer)
            if not page:
                return
            seen += len(page)

    def header_of(self, instance: str, series: Series) -> Header:
        """The header of one instance, what belongs to the study as the server keeps it.

        Read up to the per-frame groups: those of 2,000 frames are 2 MB, and nothing that is asked for comes after.
        """
        header = self.json(dict, "GET", f"/instances/{instance}/tags?short", cut=b'\n   "5200,9230"')
        return checked(header) | {tag: series.header.get(tag) for tag in STUDY_LEVEL} | {SERIES_UID: series.header.get(SERIES_UID)}

    def content(self, instance: str, *path: str) -> bytes | None:
        """The raw bytes of one element, None where it is absent. path: tag, or tag, item, tag … into sequences."""
        return self.ask("GET", f"/instances/{instance}/content/" + "/".join(step.replace(",", "-") for step in path), raw=True)

    def instance_of(self, series: Series) -> str | None:
        """The Orthanc ID of the instance that a series' header came from.

        IDs are SHA-1 of the DICOM identifiers; that the series' own ID comes out the same proves it for its instance.
        """
        if series.instances:
            return series.instances[0]
        parts = [clean(series.header.get(tag)) or "" for tag in (PATIENT_ID, STUDY_UID, SERIES_UID, SOP_UID)]
        if orthanc_id(*parts[:3]) == series.id:
            return orthanc_id(*parts)
        found = self.find("Instance", {"SeriesInstanceUID": parts[2], "SOPInstanceUID": parts[3]}, (), ("Parent",)) if all(parts[2:]) else []
        return next((required_id(answer, "ID") for answer in found if answer.get("ParentSeries") == series.id), None)


RECEIVED = [{"Type": "Metadata", "Key": "ReceptionDate", "Direction": "ASC"}]


def open_client(url: str, credentials: Credentials | None, timeout: float, verify: Any):
    """pyorthanc's client, which is an httpx.Client.

    Proxies in the environment are not used: patient data and passwords go to the named server and nowhere else.
    """
    with without_garbage_collection():
        try:
            import httpx
            Orthanc = client_class()
        except ImportError as error:
            raise missing_packages(error.name or str(error)) from None
        client = Orthanc(url, return_raw_response=True, verify=verify, trust_env=False, follow_redirects=False,
                         timeout=httpx.Timeout(timeout, connect=min(CONNECT_SECONDS, timeout), pool=None),
                         limits=httpx.Limits(keepalive_expiry=KEEPALIVE_SECONDS),
                         headers={"User-Agent": f"store_study_info/{__version__}"})
    if credentials:
        client.setup_credentials(*credentials)
    return client


@functools.cache
def client_class() -> type:
    """pyorthanc's client, from its own module: the package's `__init__` imports all of pydicom, asyncio and more.

    That took a third of the time of a run on a month (0.1 s of 0.35 s on two cores). A release whose client needs more of
    its package imports that itself, and one that keeps it elsewhere is imported whole.
    """
    import importlib.machinery
    import importlib.util
    package = importlib.util.find_spec("pyorthanc")
    spec = package and importlib.machinery.PathFinder.find_spec("pyorthanc.client", package.submodule_search_locations or [])
    try:
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        spec.loader.exec_module(module)
        return module.Orthanc
    except Exception:    # code of another package: whatever fails in it, the plain import does without or says it again
        sys.modules.pop("pyorthanc.client", None)
        from pyorthanc import Orthanc
        return Orthanc


@contextlib.contextmanager
def without_garbage_collection() -> Iterator[None]:
    """Around imports of packages whose 20,000 objects come to stay: looking for garbage among them costs a tenth of the import."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def certificates(url: str) -> Any:
    """What httpx is to verify a server with: the system's authorities or those of SSL_CERT_FILE; nothing for http."""
    if not url.startswith("https:"):
        return False    # loading certificates takes time
    import ssl
    authorities = os.environ.get("SSL_CERT_FILE") or None
    try:
        return ssl.create_default_context(cafile=authorities)
    except OSError as error:
        raise UsageError(f"SSL_CERT_FILE {printable(authorities or '')} cannot be read: {reason_of(error)}") from None


def growing_wait(tries: int) -> float:
    """Seconds before the next try, doubled each time, with jitter, so that several runs do not knock in step."""
    import random
    return min(FIRST_WAIT * 2 ** (tries - 1), TALLEST_WAIT) * random.uniform(0.75, 1.25)


def retry_after(text: str | None) -> float | None:
    """The header Retry-After in seconds, whether it gives seconds or a date (RFC 9110 10.2.3); None where it is no such."""
    if text is None:
        return None
    if re.fullmatch(r"\d{1,9}", text.strip(), re.ASCII):
        return float(text)
    import email.utils
    try:
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    except (ValueError, TypeError, OverflowError):
        return None


def orthanc_id(*identifiers: str) -> str:
    """Orthanc's ID of a resource: SHA-1 of its PatientID, StudyInstanceUID, SeriesInstanceUID, SOPInstanceUID."""
    import hashlib
    digest = hashlib.sha1("|".join(identifiers).encode("utf-8", "replace"), usedforsecurity=False).hexdigest()
    return "-".join(digest[start:start + 8] for start in range(0, 40, 8))


# Orthanc's IDs become part of addresses and of sentences: nothing else may.
ORTHANC_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}", re.ASCII)


def is_id(value: Any) -> bool:
    """Whether a value is an Orthanc ID: five groups of eight hexadecimal digits."""
    return isinstance(value, str) and ORTHANC_ID.fullmatch(value) is not None


def required_id(answer: Header, key: str) -> str:
    """A member of a record that must be an Orthanc ID. Raises ServerError."""
    value = required(answer, key, str)
    if not is_id(value):
        raise ServerError(f"the server sent a record whose {key} is no Orthanc ID")
    return value


def required(answer: Header, key: str, kind: type) -> Any:
    """A member of a record that must be there, of that JSON type. Raises ServerError."""
    value = answer.get(key)
    if not isinstance(value, kind):
        raise ServerError(f"the server sent a record whose {key} is {'missing' if value is None else 'a ' + type(value).__name__}")
    return value


def checked(header: Header) -> Header:
    """A header as it came, once every value is text, null or a sequence."""
    for tag, value in header.items():
        if not (value is None or isinstance(value, (str, list))):
            raise ServerError(f"the server sent ({printable(tag)[:20]}) as a JSON {type(value).__name__} instead of text")
    return header


def read_header(answer: Header) -> Header:
    """All tags of a record by hexadecimal tag, from RequestedTags or, of older servers, the tags kept in the database."""
    header: Header = {}
    for part in ("PatientMainDicomTags", "MainDicomTags", "RequestedTags"):
        tags = answer.get(part) or {}
        if not isinstance(tags, dict):
            raise ServerError(f"the server sent {part} as a JSON {type(tags).__name__}")
        header |= {hexadecimal(tag): value for tag, value in checked(tags).items()}
    return header


@functools.lru_cache(maxsize=1024)    # the same few dozen tags in every answer
def hexadecimal(tag: str) -> str:
    """`0008,0050` as it is, a keyword of the DICOM dictionary (1.9 knows no `Short` here) as such a tag."""
    if re.fullmatch(r"[0-9a-fA-F]{4},[0-9a-fA-F]{4}", tag):
        return tag.lower()
    from pydicom.datadict import tag_for_keyword
    known = tag_for_keyword(tag)
    return tag if known is None else f"{known >> 16:04x},{known & 0xffff:04x}"


def uid_list(studies: Iterable[Study]) -> str:
    """StudyInstanceUIDs as a query wants them: a list is separated by backslashes (PS3.4 C.2.2.2.2)."""
    return "\\".join(sorted({study.uid for study in studies}))


def read_study(answer: Header) -> Study:
    """A study record of any server version. Raises ServerError where something needed is missing or of another type."""
    header = read_header(answer)
    listed = answer.get("Series")
    count = len(listed) if isinstance(listed, list) else whole(header.get(SERIES_OF_STUDY))
    if count is None:
        raise ServerError("the server sent a study without the number of its series")
    uid = clean(header.get(STUDY_UID))
    if uid is None:    # an empty value in a query matches everything
        raise ServerError("the server sent a study without a StudyInstanceUID")
    tags = {tag: header[tag] for tag in STUDY_LEVEL if tag in header}
    return Study(required_id(answer, "ID"), uid, clean(header.get(ACCESSION)) or "",
                 clean(header.get(STUDY_DATE)) or "", required(answer, "IsStable", bool), count, tags)


def read_series(answer: Header) -> Series:
    """A series record of any server version. Raises ServerError where something needed is missing or of another type."""
    instances = answer.get("Instances")
    if not (instances is None or isinstance(instances, list) and all(map(is_id, instances))):
        raise ServerError("the server sent a series whose instances are no list of IDs")
    header = read_header(answer)
    if clean(header.get(SERIES_UID)) is None:
        raise ServerError("the server sent a series without a SeriesInstanceUID")
    return Series(required_id(answer, "ID"), required_id(answer, "ParentStudy"), required(answer, "IsStable", bool),
                  header, tuple(instances) if instances is not None else None)


# ------------------------------------------------------------------------------------------------------------------
# From Orthanc to rows: one accession, whole
# ------------------------------------------------------------------------------------------------------------------

class Options(NamedTuple):
    """What of the command line concerns the reading of a study."""

    force: bool = False
    fallback: bool = False
    today: str = ""     # YYYYMMDD

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags asked for of each series, as gggg,eeee."""
        return SERIES_TAGS + FALLBACK_TAGS if self.fallback else SERIES_TAGS


class Fetched(NamedTuple):
    """One accession, ready to be stored: rows by column, and what is to be said of it."""

    accession: str
    study: dict[str, Any]
    series: list[dict[str, Any]]
    skipped: Counter                # of REASONS
    short: int                      # stored series with an acquisition time below one second
    notes: list[tuple[int, str]]    # (logging level, sentence)


class NoImages(StudyError):
    """The accession has no MR series: a failure only where it was named."""


def fetch_accession(server: Server, accession: str, known: list[Study], whole_known: bool, options: Options) -> Fetched:
    """Everything of one accession, from however many studies. Raises StudyError where it may not be stored.

    known: studies that a token found; whole_known: that there are no others is known.
    """
    studies, series = whole_accession(server, accession, known, whole_known, options)
    arriving = [study.id for study in studies if not study.stable] or [one.id for one in series if not one.stable]
    if arriving and not options.force:
        raise StudyError("is still arriving at the server, not stored; run again later, or store it as it is with --force")
    images = [one for one in series if get_element(one.header, MODALITY) == "MR"]
    if not images:
        raise NoImages("has no MR series, not stored")
    return _process_study(server, accession, studies, with_headers(server, studies, images), options)


def whole_accession(server: Server, accession: str, known: list[Study], whole_known: bool, options: Options) -> tuple[list[Study], list[Series]]:
    """All studies and all series of an accession, in order, checked against each study's own count of series."""
    if not whole_known and (not server.requested or not PLAIN.fullmatch(accession)):
        known, whole_known = server.studies_of(accession)[0], True
    studies, series = requested_accession(server, accession, known, whole_known, options) if server.requested else (known, [])
    if not studies or missing_series(studies, series):
        if server.requested:
            studies = server.studies_of(accession)[0]
        series = [one for study in studies for one in server.list_series(study)]
    if not studies or missing_series(studies, series):
        raise StudyError("changed on the server while it was read, not stored; run again")
    return in_study_order(studies, series)


def requested_accession(server: Server, accession: str, known: list[Study], whole_known: bool, options: Options) -> tuple[list[Study], list[Series]]:
    """The series of an accession by one request, and its studies: asked for where the series show, or may hide, others than the known ones."""
    most = server.most
    answers = server.series_of(accession, known, options.tags)
    series = [one for one in answers if get_element(one.header, ACCESSION) == accession]
    cut = not server.extended and len(answers) >= most    # as many as were ever seen of it: there may be more
    if not whole_known and (cut or {one.study for one in series} != {study.id for study in known}):
        known = server.studies_of(accession)[0]
    return known, series


def missing_series(studies: Iterable[Study], series: Iterable[Series]) -> bool:
    """Whether a study has fewer series here than it counts itself, or a series belongs to none of the studies."""
    counts = Counter(one.study for one in series)
    return any(counts[study.id] < study.series for study in studies) or not counts.keys() <= {study.id for study in studies}


def in_study_order(studies: list[Study], series: list[Series]) -> tuple[list[Study], list[Series]]:
    """Both by StudyDate (a missing one last), StudyInstanceUID and, within a study, SeriesNumber and UID."""
    studies = sorted(studies, key=lambda study: (not study.date, study.date, study.uid, study.id))
    place = {study.id: position for position, study in enumerate(studies)}
    return studies, sorted(series, key=lambda one: (place[one.study], *series_order(one.header)))


def with_headers(server: Server, studies: list[Study], series: list[Series]) -> list[Series]:
    """Each series with the header of its first instance, read from the instance where the server did not look.

    The keys are absent then: older servers, and those with StorageAccessOnFind "Never".
    """
    if any(is_blind(one) and one.instances is None for one in series):    # lists by ID, or told by a find
        instances = server.instances_of(studies) if server.extended else \
            {one.id: one.instances for study in studies for one in server.list_series(study)}
        series = [one._replace(instances=instances.get(one.id, ())) if is_blind(one) else one for one in series]
    return [read_first(server, one) if is_blind(one) else one for one in series]


def is_blind(series: Series) -> bool:
    """Whether the server did not look into the file: the keys of SAR and duration are absent, not null."""
    return not {SAR, TIME_OF_ACQUISITION} <= series.header.keys()


def read_first(server: Server, series: Series) -> Series:
    """The series with the header of its first instance, read from that. Raises StudyError where it has none (any more)."""
    if not series.instances:
        raise StudyError("lost an instance on the server while it was read, not stored; run again")
    return series._replace(header=server.header_of(series.instances[0], series))


def _process_study(server: Server, accession: str, studies: list[Study], series: list[Series], options: Options) -> Fetched:
    """The rows of an accession from its MR series, in order: the study's from the earliest study, and each series'."""
    fetched = Fetched(accession, extract_study([one.header for one in series if one.study == series[0].study], accession), [], Counter(), 0, [])
    rows: dict[str, dict[str, Any]] = {}
    short = 0
    for one in series:
        found, sources = _process_series(server, one, options)
        name = f"series {get_element(one.header, '0020,0011') or '?'} ({get_element(one.header, SERIES_UID)})"
        if not found.complete:
            lacks = [reading for reading in (found.sar, found.duration) if reading.reason]
            fetched.skipped[lacks[0].reason] += 1
            fetched.notes.append((logging.DEBUG, f"{name} skipped: {'; '.join(reading.detail for reading in lacks)}"))
            continue
        row = extract_series(found, accession)
        if rows.setdefault(row["series_uid"], row) is not row:
            fetched.notes.append((logging.WARNING, f"{name} is on the server twice, the one of the earlier study is stored"))
            continue
        fetched.notes.extend((logging.DEBUG, f"{name}: {source}") for source in sources)
        if found.duration.value < 1:
            short += 1
            fetched.notes.append((logging.DEBUG, f"{name} has an acquisition time of {found.duration.value} s, which may not be that of the scan"))
    fetched.notes.extend((logging.WARNING, note) for note in doubts(studies, series, options.today))
    return fetched._replace(series=list(rows.values()), short=short)


def doubts(studies: list[Study], series: list[Series], today: str) -> Iterator[str]:
    """What a person should look at although everything was stored. Patient IDs are told apart, never told."""
    patients = {get_element(one.header, PATIENT_ID) for one in series}
    if len(patients) > 1:
        yield f"the accession's series have {len(patients)} different patient IDs; the study row is of the earliest study"
    if any(study.date == today for study in studies):
        yield "stored on its own study date, more series may still come; --force acquires it again"


def _process_series(server: Server, series: Series, options: Options) -> tuple[Measured, list[str]]:
    """What is stored of one series, and for the log where it was found other than in its first instance's Siemens tags.

    What is missing is looked for with MORE requests at most.
    """
    found, sources, limit = measure(series.header), [], server.asked() + MORE
    hidden = hidden_time(series.header)
    if hidden and (found.sar.value is not None or options.fallback):
        found = measure(with_hidden_time(server, server.instance_of(series), series.header, hidden))
    elif hidden:
        found = found._replace(duration=Reading(None, TIME_ABSENT, f"duration ({hidden}) is not told by the server and, without SAR, not asked for"))
    if not found.complete and may_be_elsewhere(found):
        better = second_look(server, series, options, limit)
        if better:
            found = better
            sources.append("read from another instance than the first, which lacks SAR or duration")
    if options.fallback and not (found.complete and found.duration.value >= 1):
        found, further = fall_back(server, series, found, limit)
        sources += further
    return found, sources


def with_hidden_time(server: Server, instance: str | None, header: Header, tag: str) -> Header:
    """The header with the acquisition time that only the element's raw content tells; `tag` is what hidden_time says."""
    raw = server.content(instance, tag) if instance else None
    return header if raw is None else header | {tag: raw[:64].decode("latin-1")}


def second_look(server: Server, series: Series, options: Options, limit: int) -> Measured | None:
    """The next instances in the order received, until one has both SAR and duration or the thread's count of requests is at its limit."""
    requested = series.instances is None and server.extended    # whether RequestedTags were answered, in the order received
    for instance, header in siblings(server, series, options, limit, requested):
        found, hidden = measure(header, instance), hidden_time(header)
        if found.sar.value is not None and hidden and server.asked() + requested < limit:
            found = measure(with_hidden_time(server, instance, header, hidden), instance)
        if found.complete and requested:
            # RequestedTags mix in what the server keeps of the series, which is of its first instance: one request more
            tag = private_tag(header, *SIEMENS_HEADER) or TIME_OF_ACQUISITION
            found = measure(server.header_of(instance, series) | {tag: found.header.get(tag)}, instance)
        if found.complete:
            return found
    return None


def siblings(server: Server, series: Series, options: Options, limit: int, requested: bool) -> Iterator[tuple[str, Header]]:
    """(instance, header) of a few instances after the first one received."""
    if requested:
        for instance, header in server.first_instances(series, options.tags):
            if server.asked() >= limit:    # one is left over for second_look
                return
            if header.get(SOP_UID) != series.header.get(SOP_UID):
                yield instance, header
        return
    first = server.instance_of(series)
    for instance in server.instance_list(series)[:LOOKS]:
        if instance != first and server.asked() < limit:
            yield instance, server.header_of(instance, series)


def fall_back(server: Server, series: Series, found: Measured, limit: int) -> tuple[Measured, list[str]]:
    """SAR and duration from elsewhere in the file, where the Siemens tags are missing or do not mean the scan."""
    sources = []
    if found.sar.value is None:
        sar = whole_body_sar(found.header.get(SHARED_GROUPS))
        if sar is None and get_element(found.header, SOP_CLASS) in ENHANCED:
            sar = frame_sar(server, series, limit)
        if sar is not None:
            found = found._replace(sar=Reading(sar))
            sources.append("SAR from the whole-body item of the functional groups (0018,9181)")
    seconds, source = None, ""
    if found.duration.value is None:
        seconds, source = stated_duration(found.header), f"AcquisitionDuration ({DURATION_SECONDS})"
    elif found.sar.value is not None and found.duration.value < 1 and "DERIVED" not in (get_element(found.header, IMAGE_TYPE) or "").split("\\"):
        seconds, source = siemens_protocol(server, series, found, limit), "the protocol's lTotalScanTimeSec"
    if seconds is not None:
        found = found._replace(duration=Reading(seconds))
        sources.append(f"duration from {source}")
    return found, sources


def frame_sar(server: Server, series: Series, limit: int) -> float | None:
    """The whole-body SAR of the first frame of an enhanced object, a few bytes at a time. It is listed first by every vendor seen."""
    instance, item = server.instance_of(series), 0
    while instance and server.asked() + 1 < limit:
        path = ("5200,9230", "0", "0018,9112", "0", "0018,9239", str(item))
        definition = server.content(instance, *path, "0018,9179")
        if definition is None:
            return None
        if definition.strip(b" \0") == b"IEC_WHOLE_BODY":
            raw = server.content(instance, *path, "0018,9181")
            value = struct.unpack("<d", raw)[0] if raw and len(raw) == 8 else math.nan    # little endian, whatever the file is
            return value if math.isfinite(value) and value >= 0 else None
        item += 1
    return None


def siemens_protocol(server: Server, series: Series, found: Measured, limit: int) -> Decimal | None:
    """The protocol's total scan time of the instance that the values came from; its text is 70 to 140 kB."""
    instance = found.instance or (server.instance_of(series) if server.asked() < limit else None)
    for place in SIEMENS_PROTOCOLS:
        tag = private_tag(found.header, *place)
        raw = server.content(instance, tag) if tag and instance and server.asked() < limit else None
        seconds = protocol_duration(raw) if raw else None
        if seconds is not None:
            return seconds
    return None


# ------------------------------------------------------------------------------------------------------------------
# SQLite: what is stored, whole or not at all
# ------------------------------------------------------------------------------------------------------------------

class Database(sqlite3.Connection):
    """A connection that knows its path, for messages."""

    path = ""


@contextlib.contextmanager
def database_errors(path: str) -> Iterator[None]:
    """What SQLite says, as a sentence with the path and what to do."""
    try:
        yield
    except sqlite3.Error as error:
        text, hint = printable(str(error)), ""
        for word, advice in (("readonly", "it or its folder may not be written: check the permissions"),
                             ("locked", f"another program has held it for {BUSY_SECONDS:.0f} s: run again later"),
                             ("full", "make room, then run again"), ("unable to open", "check the path and the permissions"),
                             ("malformed", "restore it from a copy, or move it away and acquire the studies again"),
                             ("not a database", "it is damaged: restore it from a copy, or move it away and acquire the studies again")):
            if word in text:
                hint = f"; {advice}"
        raise DatabaseError(f"database {printable(path)}: {text}{hint}") from None


def check_database_file(path: str) -> bool:
    """Whether the database exists. Raises DatabaseError where it is something else, or could not be created."""
    try:
        if stat.S_ISREG(os.stat(path).st_mode):
            with open(path, "rb") as file:
                start = file.read(16)
        else:
            start = b"no file"      # a folder, a pipe: opening it could wait for ever
    except FileNotFoundError:
        folder = os.path.dirname(path)
        if not os.path.isdir(folder):
            raise DatabaseError(f"database {printable(path)}: there is no folder {printable(folder)}; create it, or name another with --db") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise DatabaseError(f"database {printable(path)}: the folder {printable(folder)} may not be written; name another with --db") from None
        return False
    except (OSError, ValueError) as error:
        raise DatabaseError(f"database {printable(path)} cannot be read: {reason_of(error)}") from None
    if start and start != b"SQLite format 3\0":
        raise DatabaseError(f"database {printable(path)} is no SQLite file and is left as it is; name another with --db")
    return True


def open_database(path: str) -> Database:
    """The database at an absolute path, created with its tables where absent, readable by its owner alone."""
    if not check_database_file(path):
        try:
            os.close(os.open(os.path.realpath(path), os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            pass    # another run was faster
        except OSError as error:
            raise DatabaseError(f"database {printable(path)} cannot be created: {reason_of(error)}") from None
    with database_errors(path), contextlib.ExitStack() as undo:
        conn = sqlite3.connect(path, timeout=MOMENT, isolation_level=None, factory=Database)
        undo.callback(conn.close)
        conn.path = path
        tables = {table: read_columns(conn, table) for table in TABLES}
        check_columns(path, tables)
        if not all(tables.values()) or not has_index(conn):
            with transaction(conn):
                create_tables(conn)
        undo.pop_all()
    return conn


def read_columns(conn: sqlite3.Connection, table: str) -> dict[str, int]:
    """{column in lower case: place in the primary key, 0 for none}; empty where there is no such table."""
    return {row[1].lower(): row[5] for row in patiently(conn, f"PRAGMA table_info({table})")}


def check_columns(path: str, tables: dict[str, dict[str, int]]) -> None:
    """Refuse a database whose tables lack columns or their primary key; tables that are not there yet are none. Raises DatabaseError."""
    faults = []
    for table, columns in tables.items():
        missing = [field.column for field in TABLES[table] if field.column not in columns]
        key = TABLES[table][0].column
        if columns and missing:
            faults.append(f"the table {table} lacks {', '.join(missing)}")
        elif columns and [name for name, place in columns.items() if place] != [key]:
            faults.append(f"{key} is not the primary key of the table {table}")
    if faults:
        raise DatabaseError(f"database {printable(path)}: {' and '.join(faults)}; move the file away to have the tables built anew, or name another with --db")


def has_index(conn: sqlite3.Connection) -> bool:
    """Whether the series of an accession are found by an index, of whatever name."""
    return patiently(conn, "SELECT 1 FROM pragma_index_list('series') AS list, pragma_index_info(list.name) AS info "
                           "WHERE info.seqno = 0 AND lower(info.name) = 'accession'").fetchone() is not None


def create_tables(conn: sqlite3.Connection) -> None:
    """The tables and the index, where they are not there yet."""
    for table, fields in TABLES.items():
        conn.execute(f"CREATE TABLE IF NOT EXISTS {table} ({', '.join(f'{field.column} {field.sql}' for field in fields)})")
    conn.execute("CREATE INDEX IF NOT EXISTS series_accession ON series(accession)")


def patiently(conn: sqlite3.Connection, statement: str, values: tuple = ()) -> sqlite3.Cursor:
    """Execute a statement, waiting for other writers; in short waits, so that an interrupt is heard."""
    end = time.monotonic() + BUSY_SECONDS
    while True:
        try:
            return conn.execute(statement, values)
        except sqlite3.OperationalError as error:
            if "locked" not in str(error) or time.monotonic() > end:
                raise


@contextlib.contextmanager
def transaction(conn: sqlite3.Connection) -> Iterator[None]:
    """All or nothing, whatever ends it."""
    patiently(conn, "BEGIN IMMEDIATE")
    try:
        yield
        patiently(conn, "COMMIT")
    except BaseException:
        if conn.in_transaction:
            conn.execute("ROLLBACK")
        raise


def stored_date(conn: Database | None, accession: str) -> tuple[bool, str | None]:
    """Whether an accession is stored, and its study date."""
    if conn is None:
        return False, None
    with database_errors(conn.path):
        row = patiently(conn, "SELECT study_date FROM studies WHERE accession = ?", (accession,)).fetchone()
    return row is not None, row[0] if row else None


def upsert(conn: sqlite3.Connection, table: str, row: dict[str, Any]) -> None:
    """Insert a row or update it by its primary key; further columns of the user's own stay as they are."""
    columns = [field.column for field in TABLES[table]]
    changes = ", ".join(f"{column} = excluded.{column}" for column in columns[1:])
    conn.execute(f"INSERT INTO {table} ({', '.join(columns)}) VALUES ({', '.join('?' * len(columns))}) "
                 f"ON CONFLICT({columns[0]}) DO UPDATE SET {changes}", [row[column] for column in columns])


def store_study(acc: str, conn: Database, study: dict[str, Any], series: list[dict[str, Any]], replace: bool = True) -> int:
    """Store one accession in one transaction: its row and exactly these series, gone ones out.

    Without `replace` nothing that is stored is changed or taken out, only new series come in. Returns how many stored
    series were not among these and stayed: a study may be gone from the server, or another run was faster. Raises
    StudyError where a series is stored under another accession already, as it is never moved, and where a constraint
    or trigger of the user's own refuses a row.
    """
    with database_errors(conn.path), transaction(conn):
        for row in series:
            other = conn.execute("SELECT accession FROM series WHERE series_uid = ? AND accession <> ?", (row["series_uid"], acc)).fetchone()
            if other:
                raise StudyError(f"has a series {row['series_uid']} that is stored under accession {printable(other[0])} already, not stored")
        try:
            return write_rows(acc, conn, study, series, replace)
        except sqlite3.IntegrityError as error:
            raise StudyError(f"is refused by a rule of your own in database {printable(conn.path)} ({printable(str(error))}), not stored; "
                             "change that column, index or trigger") from None


def write_rows(acc: str, conn: sqlite3.Connection, study: dict[str, Any], series: list[dict[str, Any]], replace: bool) -> int:
    """What `store_study` does inside its transaction, once no other accession has one of these series."""
    stored = {uid for (uid,) in conn.execute("SELECT series_uid FROM series WHERE accession = ?", (acc,))}
    gone = stored - {row["series_uid"] for row in series}
    if replace or not gone:
        upsert(conn, "studies", study)
    for uid in gone if replace else ():
        conn.execute("DELETE FROM series WHERE series_uid = ?", (uid,))
    for row in series:
        if replace or row["series_uid"] not in stored:
            upsert(conn, "series", row)
    return 0 if replace else len(gone)


# ------------------------------------------------------------------------------------------------------------------
# CSV
# ------------------------------------------------------------------------------------------------------------------

CSV_STUDY = [field.column for field in STUDY_FIELDS]
CSV_SERIES = [field.column for field in SERIES_FIELDS if field.column != "accession"]


def csv_rows(conn: Database | None, accessions: Iterable[str]) -> Iterator[tuple]:
    """The header, then one row a series in the order of the accessions; a study without series has one row. No database: no rows."""
    yield (*CSV_STUDY, *CSV_SERIES)
    if conn is None:
        return
    columns = ", ".join([f"studies.{column}" for column in CSV_STUDY] + [f"series.{column}" for column in CSV_SERIES])
    with database_errors(conn.path):
        for accession in accessions:
            yield from patiently(conn, f"SELECT {columns} FROM studies LEFT JOIN series ON series.accession = studies.accession "
                                       "WHERE studies.accession = ? ORDER BY series_number IS NULL, series_number, series_uid", (accession,))


def write_csv(path: str, conn: Database | None, accessions: Iterable[str]) -> None:
    """Written beside the file and moved into its place when complete; readable by its owner alone."""
    import csv
    import tempfile
    target = os.path.realpath(path)
    temporary = None
    try:
        with tempfile.NamedTemporaryFile("w", encoding="utf-8", newline="", dir=os.path.dirname(target), prefix=".", suffix=".csv", delete=False) as file:
            temporary = file.name
            # Before Python 3.13 a lone CR is quoted only where the line terminator has one.
            lines = types.SimpleNamespace(write=lambda line: file.write(line[:-2] + "\n"))
            csv.writer(lines, lineterminator="\r\n").writerows(csv_rows(conn, accessions))
        os.replace(temporary, target)
        temporary = None
    except OSError as error:
        raise RunError(f"CSV file {printable(path)} cannot be written: {reason_of(error)}") from None
    finally:
        if temporary:
            with contextlib.suppress(OSError):
                os.unlink(temporary)


# ------------------------------------------------------------------------------------------------------------------
# The run: plan, fetch, store, report
# ------------------------------------------------------------------------------------------------------------------

class Want:
    """One accession of this run, and why."""

    __slots__ = ("accession", "dates", "dated", "named", "studies", "whole_known", "again", "stored")

    def __init__(self, accession: str):
        self.accession = accession
        self.dates: set[str] = set()            # study dates that tokens found it on
        self.dated = self.named = False         # by a date token, by its own
        self.studies: dict[str, Study] = {}     # by Orthanc ID
        self.whole_known = False                # that there are no others is known
        self.stored: str | None = None          # the stored study date, where again is False
        self.again = True                       # to be fetched, stored already or not


class Tally:
    """What the summary counts."""

    def __init__(self):
        self.stored = self.already = self.failed = self.without_images = self.series = self.short = self.doubtful = self.left = 0
        self.skipped: Counter = Counter()

    @property
    def exit_status(self) -> int:
        """1 where something named is not in the database, or a date may be incomplete, else 0."""
        return 1 if self.failed or self.doubtful else 0

    def __str__(self) -> str:
        reasons = ", ".join(f"{reason}: {self.skipped[reason]}" for reason in REASONS if self.skipped[reason])
        text = f"studies: {self.stored} stored, {self.already} already stored, {self.failed} failed"
        text += f", {self.left} not reached" if self.left else ""
        text += f", {self.without_images} without MR series" if self.without_images else ""
        text += f"; series: {self.series} stored, {self.skipped.total()} skipped" + (f" ({reasons})" if reasons else "")
        text += f", {self.short} stored with a time below one second" if self.short else ""
        return text + (f"; dates that may be incomplete: {self.doubtful}" if self.doubtful else "")


class Run(NamedTuple):
    """All that one run needs."""

    server: Server
    options: Options
    jobs: int
    wants: dict[str, Want]
    tally: Tally

    def want(self, accession: str) -> Want:
        """The one record of an accession, made when it is first named."""
        return self.wants.setdefault(accession, Want(accession))

    def failure(self, text: str) -> None:
        """Count a failure and say it."""
        self.tally.failed += 1
        log.error("%s", printable(text))


def plan(run: Run, tokens: list[Accession | Dates], conn: Database | None) -> list[Want]:
    """Ask what the tokens mean; the accessions to fetch, by study date, then accession."""
    dates = [token for token in tokens if isinstance(token, Dates)]
    for token in tokens:
        if isinstance(token, Accession):
            want = run.want(token.text)
            want.named = True
            note_stored(want, conn, run.options)
    with progress_bar(sum(1 for token in dates for _ in months_of(token)), "month") as bar:
        for token in dates:
            process_date_arg(token, conn, run, bar.update)
    unseen = [want for want in run.wants.values() if want.again and want.named and not want.dated]
    if unseen:
        aside(lambda: run.server.extended)    # the first contact, before several threads make it
    with progress_bar(len(unseen)) as bar, contextlib.closing(in_order(lambda want: run.server.studies_of(want.accession), unseen, run.jobs)) as results:
        for want, found in results:
            note_found(run, want, found)
            bar.update()
    for want in run.wants.values():
        want.again = want.again or want.dated and want.stored not in want.dates
    todo = [want for want in run.wants.values() if want.again]
    run.tally.already += len(run.wants) - len(todo)
    return sorted((want for want in todo if want.studies or want.dated), key=run_order)


def run_order(want: Want) -> tuple:
    """Key to sort accessions by study date, an unknown one last, then by their text."""
    return min(want.dates, default=want.stored or "99999999"), want.accession


def note_stored(want: Want, conn: Database | None, options: Options) -> None:
    """What is stored already is not fetched again, unless --force or the dates that it is found on say so."""
    if not options.force:
        stored, want.stored = stored_date(conn, want.accession)
        want.again = not stored


def note_found(run: Run, want: Want, found: Any) -> None:
    """Take what the server said of a named accession: its studies, or that there is none."""
    if isinstance(found, StudyError):
        run.failure(f"{printable(want.accession)}: {found}")
        return
    if isinstance(found, BaseException):
        raise found
    studies, others = found
    if not studies:
        near = f" (the server has {', '.join(sorted({printable(other) for other in others})[:3])})" if others else ""
        run.failure(f"{want.accession}: there is no such accession on {run.server.url}{near}")
    want.studies, want.whole_known = {study.id: study for study in studies}, True
    want.dates.update(study.date for study in studies if study.date)


def process_date_arg(token: Dates, conn: Database | None, run: Run, listed: Callable[[], Any]) -> None:
    """Find the accessions of a date token, month by month, and call `listed` after each. What could not be listed is said, and the rest goes on."""
    for first, last in months_of(token):
        span = digits_of(first) if first == last else f"{digits_of(first)}-{digits_of(last)}"
        try:
            studies, doubtful = aside(lambda: run.server.studies_between(first, last))
        except StudyError as error:
            run.tally.doubtful += 1
            log.error("%s: cannot be listed: %s", span, error)
            continue
        finally:
            listed()
        for day in doubtful:
            run.tally.doubtful += 1
            log.error("%s: may be incomplete, %s cuts its answers; name the missing accessions themselves, or have its limit LimitFindResults lifted", digits_of(day), run.server.url)
        log.info("%s: studies found: %d%s", span, len(studies), "" if studies else " (only accessions that begin with a capital E count)")
        for study in studies:
            note_dated(run.want(study.accession), study, conn, run.options)


def note_dated(want: Want, study: Study, conn: Database | None, options: Options) -> None:
    """Take a study that a date token found for its accession."""
    if not (want.dated or want.named):
        note_stored(want, conn, options)
    want.dated = True
    want.dates.add(study.date)
    if want.again:
        want.studies[study.id] = study


def in_order(work: Callable, items: list, jobs: int) -> Iterator[tuple[Any, Any]]:
    """(item, result or the exception that it ended with), in the order of the items, `jobs` at a time.

    At most AHEAD items are done and not yet taken, so that memory is bounded and one slow item holds up no others.
    Threads are daemons: an interrupt waits for none of them. Nothing is done in the main thread, which only ever waits
    for a moment: a signal that arrives just before it blocks would not be heard before it has done so.
    """
    tasks: queue.SimpleQueue = queue.SimpleQueue()

    def worker() -> None:
        """A thread: one item after the other, until there is None instead."""
        for item, box in iter(tasks.get, None):
            result = attempt(work, item)
            if isinstance(result, RunError):
                stop()    # the run ends with it: what comes later in the order is not asked for
            box.put(result)

    def stop() -> None:
        """Take out of the queue what nobody has begun, and end the threads."""
        with contextlib.suppress(queue.Empty):
            while True:
                tasks.get_nowait()
        for _ in range(jobs):
            tasks.put(None)

    for _ in range(min(jobs, len(items))):
        threading.Thread(target=worker, daemon=True).start()
    waiting: deque = deque()
    todo = iter(items)
    try:
        while True:
            for item in todo:
                waiting.append((item, queue.SimpleQueue()))
                tasks.put(waiting[-1])
                if len(waiting) >= AHEAD:
                    break
            if not waiting:
                return
            item, box = waiting.popleft()
            yield item, wait_for(box)
    finally:
        stop()


def wait_for(box: queue.SimpleQueue) -> Any:
    """What a thread puts into the box; in short waits, so that an interrupt is heard."""
    while True:
        with contextlib.suppress(queue.Empty):
            return box.get(timeout=MOMENT)


def aside(work: Callable) -> Any:
    """The result of work(), or its exception, done in a thread of its own."""
    ((_, result),) = in_order(lambda _: work(), [None], 1)
    if isinstance(result, BaseException):
        raise result
    return result


def attempt(work: Callable, item: Any) -> Any:
    """The result, or the exception as a value: it is looked at where results are taken, in order."""
    try:
        return work(item)
    except BaseException as error:    # a thread that died of it would be waited for: the main thread raises it again
        return error


def fetch_and_store(run: Run, todo: list[Want], conn: Database, out) -> None:
    """Fetch side by side, store and print in order."""
    def fetch(want: Want) -> Fetched:
        """In a thread: all of one accession from the server."""
        return fetch_accession(run.server, want.accession, list(want.studies.values()), want.whole_known, run.options)

    run.tally.left = len(todo)
    if run.tally.already and (run.options.fallback or log.level == logging.DEBUG):
        log.log(SUMMARY, "%d accessions are stored already and are not read again; --force does that", run.tally.already)
    with progress_bar(len(todo)) as bar, contextlib.closing(in_order(fetch, todo, run.jobs)) as results:
        for want, result in results:
            stored = finish(run, want, result, conn)
            run.tally.left -= 1
            want.studies = {}
            if stored and want.dated:
                out(printable(want.accession))
            bar.update()


def finish(run: Run, want: Want, result: Any, conn: Database) -> bool:
    """Store one accession and say what became of it; whether it is stored."""
    name = printable(want.accession)
    try:
        if isinstance(result, BaseException):
            raise result
        stayed = store_study(want.accession, conn, result.study, result.series, run.options.force)
    except NoImages as error:
        if want.named:
            run.failure(f"{name}: {error}")
        else:
            run.tally.without_images += 1
            log.info("%s: %s", name, error)
        return False
    except StudyError as error:
        run.failure(f"{name}: {error}")
        return False
    run.tally.stored += 1
    run.tally.series += len(result.series)
    run.tally.skipped += result.skipped
    run.tally.short += result.short
    for level, note in result.notes:
        log.log(level, "%s: %s", name, printable(note))
    if stayed:
        log.warning("%s: %d stored series were not on the server this time and stay as they are; --force takes them out", name, stayed)
    log.info("%s: %d series stored, %d skipped", name, len(result.series), result.skipped.total())
    return True


# ------------------------------------------------------------------------------------------------------------------
# Saying it: log lines, progress, stdout
# ------------------------------------------------------------------------------------------------------------------

SUMMARY = 25    # above the lines of single studies, which a terminal with a progress bar does not show

logging.addLevelName(SUMMARY, "INFO")


def printable(text: str) -> str:
    """Text that cannot move a cursor or forge a line: what is not printable becomes U+FFFD."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def quoted(text: str) -> str:
    """A value in a message, short and harmless."""
    return f"'{printable(text[:60])}'" + (" …" if len(text) > 60 else "")


def reason_of(error: BaseException) -> str:
    """What the system says, without the path that the sentence names already."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "it is no UTF-8 text" if isinstance(error, UnicodeDecodeError) else printable(str(error)) or type(error).__name__


class LineHandler(logging.Handler):
    """Log lines on stderr; around a progress bar while there is one."""

    bar: Any = None

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; a stderr that is gone or full is no trouble."""
        line = self.format(record)
        try:
            if self.bar is not None:
                self.bar.write(line, file=sys.stderr)
            else:
                sys.stderr.write(line + "\n")
                sys.stderr.flush()
        except (OSError, ValueError):
            pass    # nobody reads stderr any more: that is no reason to stop storing


def set_up_logging(verbose: bool, quiet: bool) -> None:
    """Log lines with time and level on stderr; on a terminal, where the bar tells of single studies, only what sums up or warns."""
    handler = LineHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    log.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else SUMMARY if sys.stderr.isatty() else logging.INFO)


class NoBar:
    """Stands in for tqdm's bar where there is no terminal."""

    def update(self) -> None:
        """Nothing to show."""
        pass


@contextlib.contextmanager
def progress_bar(total: int, unit: str = "study") -> Iterator[Any]:
    """A bar on stderr if that is a terminal; log lines and accessions are written around it."""
    tqdm = None
    if total and sys.stderr.isatty() and log.level != logging.WARNING:
        with contextlib.suppress(ImportError):    # comes with pyorthanc's extra `progress`
            from tqdm import tqdm
    if tqdm is None:
        yield NoBar()
        return
    with tqdm(total=total, unit=unit, file=sys.stderr, dynamic_ncols=True, leave=False) as bar:
        LineHandler.bar = bar
        try:
            yield bar
        finally:
            LineHandler.bar = None


class OutputClosed(StudyInfoError):
    """The reader of stdout is gone: the run ends quietly."""


def print_accession(name: str) -> None:
    """One accession on stdout, at once, so that a pipe sees it when it is stored."""
    try:
        if LineHandler.bar is not None:
            LineHandler.bar.write(name, file=sys.stdout)
        else:
            sys.stdout.write(name + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        abandon_stdout()
        raise OutputClosed() from None
    except OSError as error:
        abandon_stdout()
        raise RunError(f"standard output cannot be written: {reason_of(error)}; what is stored stays stored") from None


def abandon_stdout() -> None:
    """Let the interpreter flush what is left of stdout into nothing when it ends."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def open_missing_streams() -> None:
    """Give closed standard streams somewhere to go, and let no character that an encoding lacks stop the run."""
    if sys.stdin is None:
        os.open(os.devnull, os.O_RDONLY)    # takes its number, which another file would get
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


@contextlib.contextmanager
def signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted, once; a second one ends the process at once."""
    def raise_interrupted(signum: int, _frame) -> None:
        """Once: the next signal meets the system's own handler."""
        for number in before:
            signal.signal(number, signal.SIG_DFL)
        raise Interrupted(signum)

    before = {number: signal.signal(number, raise_interrupted) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ------------------------------------------------------------------------------------------------------------------
# The command line
# ------------------------------------------------------------------------------------------------------------------

EXAMPLES = """\
tokens:
  E12345                    an accession number
  20240427                  a day
  202404                    a month
  20240401-20240415         a range of days, ends included
  202401-202403, 202401-    a range of months; until today
  yesterday, today          in local time
  @FILE, @-                 more tokens, one a line; from standard input

examples:
  store_study_info.py E12345
  store_study_info.py --db sar.db 202404
  store_study_info.py -q yesterday
  store_study_info.py --csv april.csv 20240401-20240415
  store_study_info.py --force E12345 E12346

environment:
  STUDY_INFO_DB             the database, where --db is not given
  ORTHANC_URL               the server, where --url is not given
  NETRC                     the netrc file, where --netrc is not given
  SSL_CERT_FILE             certificate authorities to trust with https

exit status:
  0        everything named is in the database; a date without studies too
  1        something named is not, the messages say what; the rest is stored
  2        usage error: nothing was contacted or written
  130 143  interrupted by SIGINT or SIGTERM; what was stored stays
"""


class Parser(argparse.ArgumentParser):
    """Usage errors in one line."""

    def error(self, message: str):
        message = re.sub(r"//[^/@\s]*@", "//…@", message)    # a mistyped --url can hold a password
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> argparse.ArgumentParser:
    """All options; each default that the environment can change is read here."""
    parser = Parser(
        prog="store_study_info.py", usage="%(prog)s [options] TOKEN [TOKEN ...]", add_help=False, allow_abbrev=False,
        description="Keep SAR and scan times of the MRI studies of an Orthanc server in a\nlocal SQLite file. Studies that are stored already are skipped.",
        epilog=EXAMPLES, formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=24, width=79))
    what = parser.add_argument_group("what to acquire")
    what.add_argument("tokens", metavar="TOKEN", nargs="+", help="accession, day, month, range, yesterday, today or @FILE")
    what.add_argument("-f", "--force", action="store_true", help="acquire again what is already stored")
    what.add_argument("--fallback", action="store_true", help="read SAR and duration elsewhere in the file where the Siemens tags are missing or meaningless; with --force for what is stored already")
    where = parser.add_argument_group("from where, and to where")
    where.add_argument("--url", default=os.environ.get("ORTHANC_URL") or DEFAULT_URL, help=f"Orthanc's address (default {DEFAULT_URL})")
    where.add_argument("--netrc", metavar="FILE", help="credentials (default ./netrc, else ~/.netrc)")
    where.add_argument("--db", metavar="PATH", default=os.environ.get("STUDY_INFO_DB") or DEFAULT_DB, help=f"the database (default {DEFAULT_DB})")
    where.add_argument("--csv", metavar="FILE", help="also write the accessions of this run as CSV, one row a series")
    how = parser.add_argument_group("how")
    how.add_argument("--jobs", metavar="N", type=positive_int, default=DEFAULT_JOBS, help=f"studies fetched at the same time (default {DEFAULT_JOBS})")
    how.add_argument("--timeout", metavar="S", type=positive_seconds, default=DEFAULT_TIMEOUT, help=f"seconds to wait for one answer (default {DEFAULT_TIMEOUT:.0f})")
    loud = how.add_mutually_exclusive_group()
    loud.add_argument("-v", "--verbose", action="store_true", help="say why each series is skipped")
    loud.add_argument("-q", "--quiet", action="store_true", help="only warnings and errors; nothing at all when all is well")
    about = parser.add_argument_group("about")
    about.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    about.add_argument("-h", "--help", action="help", help="show this text")
    return parser


def positive_int(text: str) -> int:
    """A whole number from 1 to 999, for argparse."""
    if not re.fullmatch(r"\d{1,3}", text, re.ASCII) or not int(text):
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no number from 1 to 999")
    return int(text)


def positive_seconds(text: str) -> float:
    """Seconds, above 0 and up to a day, for argparse."""
    value = number(text)
    if value is None or not 0 < value <= 86400:
        raise argparse.ArgumentTypeError(f"{quoted(text)} is no number of seconds above 0 and up to a day")
    return value


def check_url(text: str) -> tuple[str, str]:
    """(URL, host) of an http or https URL without credentials; what is refused is never echoed, a password could be in it."""
    from urllib.parse import urlsplit
    try:
        url = urlsplit(text)
        port_ok = url.port is None or url.port > 0
    except ValueError:
        raise UsageError("the address of --url or ORTHANC_URL is no URL; it must look like http://host:8042") from None
    if "@" in url.netloc or "@" in text.partition("//")[2].partition("/")[0]:
        raise UsageError("the address of --url or ORTHANC_URL holds a user or password: take it out, and put it into a netrc file (see --netrc)")
    if url.scheme not in ("http", "https") or not url.hostname or not port_ok or url.query or url.fragment \
            or re.search(r"[\s\x00-\x20\x7f\\]", text):
        raise UsageError("the address of --url or ORTHANC_URL is none of an Orthanc server; it must look like http://host:8042 or https://host/orthanc")
    return url.geturl(), url.hostname


def find_credentials(host: str, named: str | None) -> tuple[Credentials | None, str]:
    """The netrc entry of a host, else the default one; and for messages, where they were looked up."""
    path = named or os.environ.get("NETRC")
    if not path:
        path = next((place for place in ("netrc", os.path.expanduser("~/.netrc")) if os.path.exists(place)), None)
    if not path:
        return None, f"no netrc file: there is no ./netrc and no ~/.netrc; make one with an entry for host {host}"
    import netrc
    try:
        entries = {name.lower(): entry for name, entry in netrc.netrc(path).hosts.items()}
        readable = os.stat(path).st_mode & (stat.S_IRWXG | stat.S_IRWXO)
    except netrc.NetrcParseError as error:    # its own text can quote a password
        raise UsageError(f"netrc file {printable(path)} is malformed near line {error.lineno}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"netrc file {printable(path)} cannot be read: {reason_of(error)}") from None
    name = host if host in entries else "default"
    if name not in entries:
        return None, f"netrc file {printable(path)}, which has no entry for host {host} and no default"
    if readable:
        log.warning("netrc file %s is readable by others: run chmod 600 on it", printable(path))
    login, _, password = entries[name]
    return Credentials(login or "", password or ""), f"netrc file {printable(path)}, {'entry of host ' + host if name == host else 'default entry, for host ' + host}"


def check_csv(path: str | None, database: str) -> None:
    """Refuse early what write_csv could not replace, or should not."""
    if path is None:
        return
    if path == "-":
        raise UsageError("--csv needs the name of a file: standard output is for accessions only")
    target = os.path.realpath(path)
    if os.path.exists(target) and not os.path.isfile(target):
        raise UsageError(f"--csv {quoted(path)} is no regular file")
    if target in [os.path.realpath(database) + side for side in ("", "-journal", "-wal", "-shm")]:
        raise UsageError(f"--csv {quoted(path)} is the database itself, or a file that SQLite keeps beside it")
    if not os.path.isdir(os.path.dirname(target)) or not os.access(os.path.dirname(target), os.W_OK):
        raise UsageError(f"--csv {quoted(path)}: its folder does not exist or may not be written")


def check_packages() -> None:
    """Raise RunError where Python is too old or a package is not installed; nothing is imported for it."""
    if sys.version_info < (3, 10):
        raise RunError(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
    import importlib.util
    missing = [name for name in ("pyorthanc", "pydicom") if importlib.util.find_spec(name) is None]
    if missing:
        raise missing_packages(*missing)


def missing_packages(*names: str) -> RunError:
    """The sentence that names them and the two ways to get them."""
    return RunError(f"missing Python packages: {', '.join(names)}; run 'pip install -r requirements.txt' "
                    "in a virtual environment, or run this program as 'uv run store_study_info.py', which fetches what it needs")


def acquire(arguments: argparse.Namespace, tally: Tally) -> None:
    """The whole run. Everything of the user's is checked before the server is contacted or a file is written."""
    today = datetime.date.today()
    tokens = expand_tokens(arguments.tokens, today)
    url, host = check_url(arguments.url)
    if not arguments.db:
        raise UsageError("--db is empty; name a file")
    path = os.path.abspath(arguments.db)
    check_csv(arguments.csv, path)
    credentials, where = find_credentials(host, arguments.netrc)
    server = Server(url, credentials, arguments.timeout, where)
    check_packages()
    conn = open_database(path) if check_database_file(path) else None
    run = Run(server, Options(arguments.force, arguments.fallback, digits_of(today)), arguments.jobs, {}, tally)

    def also_csv() -> None:
        if arguments.csv:
            write_csv(arguments.csv, conn, [want.accession for want in sorted(run.wants.values(), key=run_order)])

    try:
        with at_exit_0_and_1(also_csv):
            todo = plan(run, tokens, conn)
            conn = conn or open_database(path)
            fetch_and_store(run, todo, conn, (lambda name: None) if arguments.quiet else print_accession)
            server.close()    # not after an interrupt: it would wait for the threads' requests
    finally:
        if conn:
            conn.close()


@contextlib.contextmanager
def at_exit_0_and_1(work: Callable[[], None]) -> Iterator[None]:
    """Do the work at the end, not after an interrupt or where the database failed, which it would have to read.

    Trouble with it does not hide what ended the run.
    """
    try:
        yield
    except DatabaseError:
        raise
    except StudyInfoError:
        try:
            work()
        except StudyInfoError as error:
            log.error("%s", error)
        raise
    work()


def main(argv: list[str] | None = None) -> int:
    """Returns the exit status; the process ends at once after an interrupt, whatever its threads wait for."""
    open_missing_streams()
    parser = build_parser()
    arguments = parser.parse_intermixed_args(argv)
    set_up_logging(arguments.verbose, arguments.quiet)
    tally = Tally()
    try:
        with signals():
            acquire(arguments, tally)
    except UsageError as error:
        parser.error(str(error))
    except OutputClosed:
        return 1
    except StudyInfoError as error:
        log.error("%s", error)
        if any(vars(tally).values()):
            log.warning("%s", tally)
        return error.exit_status
    except Interrupted as interrupt:
        log.error("interrupted by %s; %s", interrupt.name, tally)
        end_process(interrupt.exit_status)
    log.log(logging.WARNING if tally.exit_status else SUMMARY, "%s", tally)
    return tally.exit_status


def end_process(status: int) -> None:
    """At once, whatever the threads wait for: everything is stored and closed by now."""
    with contextlib.suppress(OSError, ValueError):
        sys.stderr.flush()
    try:
        sys.stdout.flush()
    except BrokenPipeError:
        pass    # ends quietly
    except (OSError, ValueError):
        status = status or 1
    os._exit(status)


if __name__ == "__main__":
    try:
        end_process(main())
    except SystemExit as end:    # after --help, --version and usage errors
        end_process(end.code)
