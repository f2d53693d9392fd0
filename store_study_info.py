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

The pipeline: every token is checked before anything is contacted or written; the server is asked which studies the
tokens mean; one request brings all series of up to 20 accessions (older servers: a few for each, never an image);
parsers turn the text of the DICOM tags into values or None; what is ready is stored, each accession whole.

The promises: a number that cannot be read is NULL, never a guess; an accession is stored as a whole or not at all;
what a server may have held back is said; whatever fails ends in a sentence, and the rest is stored all the same.

The sections stand in the order in which they build on each other: nothing is used above its definition.

tokens:
  E12345                    an accession number
  20240427                  a day
  202404                    a month
  20240401-20240415         a range of days, ends included
  202401-202403, 202401-    a range of months; until today
  yesterday, today          in local time
  7days                     the seven days before today; any number of days
  @FILE, @-                 more tokens, one a line; from standard input

examples:
  store_study_info.py E12345
  store_study_info.py --db sar.db 202404
  store_study_info.py -q 7days
  store_study_info.py --csv april.csv 20240401-20240415
  store_study_info.py --force E12345 E12346

environment:
  ORTHANC_URL, NETRC                where --url or --netrc is not given
  STUDY_INFO_DB, STUDY_INFO_PREFIX  where --db or --prefix is not given
  SSL_CERT_FILE                     certificate authorities to trust with https

exit status:
  0        everything named is in the database; a date without studies too
  1        something named is not, the messages say what; the rest is stored
  2        usage error: nothing was contacted or written
  130 143  interrupted by SIGINT or SIGTERM; what was stored stays
"""

from __future__ import annotations

import signal

if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # until main() listens: an interrupt during imports is no traceback

import argparse
import calendar
import contextlib
import copy
import datetime
import functools
import itertools
import logging
import math
import os
import re
import sqlite3
import stat
import struct
import sys
import threading
import time
import types
from collections import Counter, deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from decimal import Decimal
from typing import Any, NamedTuple

# What only some runs need is imported where it is used: `--help` and usage errors come at once.

# ------------------------------------------------------------------------------------------------------------------
# Constants
# ------------------------------------------------------------------------------------------------------------------

__version__ = "1.0.0"

HOST = "micvna.mclean.harvard.edu"
PORT = 8042
PREFIX = "E"              # of the accession numbers that count; empty: all of them
DEFAULT_URL = f"http://{HOST}:{PORT}"
DEFAULT_DB = "study_info.db"
DEFAULT_JOBS = 4          # more clients at once gain nothing: Orthanc parses DICOM with two threads
DEFAULT_TIMEOUT = 60.0    # seconds for one complete answer

# Waiting, in seconds
CONNECT_SECONDS = 10.0       # a host that swallows packets is given up on sooner than a slow answer
KEEPALIVE_SECONDS = 0.8      # Orthanc closes idle connections after 1 s (1.11.3 and newer)
WAITS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0, 8.0, 8.0)    # before each further try of a request, give or take a quarter
LONGEST_WAIT = 60.0          # that one request may wait between its tries; a longer Retry-After is not waited for
BUSY_SECONDS = 30.0          # how long another writer of the database is waited for
SIGNAL_CHECK_SECONDS = 0.2   # the main thread never blocks for longer, so that it hears signals

# How often and how much
TRIES = 6                   # of one request, where repeating can help
PATIENT_TRIES = 9           # where a server that answered is out of reach: half a minute, in which it may restart
TIMEOUT_TRIES = 2           # a read that times out is repeated once
ANSWER_BYTES = 256 << 20    # no answer that this program asks for comes near it
AHEAD = 128                 # accessions fetched and not yet stored, at most: what bounds the memory
TOGETHER = 20               # accessions whose series are asked for by one find, at most
SERIES_TOGETHER = 200       # series that one such find brings, at most, as far as that is known beforehand
LOOKED_UP_TOGETHER = 50     # accessions whose studies are asked for by one find
LONG_ANSWER = 5.0           # seconds (or a tenth of the time-out) after which a find is taken for too large
MORE = 6                    # requests that a series may cost beyond its header, to find what is missing
LOOKS = 6                   # of its instances whose header may be read, the first one included
FOR_PROTOCOL = 2            # of MORE, kept with --fallback for the two places of a Siemens protocol
PAGE = 1000                 # studies on a further page
REPEATED = 20               # failures that a terminal shows once more at the end, at most

# Durations, in seconds
LONGEST_SCAN = 86400        # no scan takes more than a day
LONGEST_STATED = 10800      # and by other tags than Siemens': 3 hours, as the longest seen is 1280 s
LONGEST_PARTIAL = 60        # from here on the Siemens acquisition time is that of all measurements

SUMMARY = 25    # a log level above that of single studies, which a terminal with a progress bar does not show
logging.addLevelName(SUMMARY, "INFO")
log = logging.getLogger("store_study_info")


# ------------------------------------------------------------------------------------------------------------------
# Words and errors: what a user can meet, each a sentence
# ------------------------------------------------------------------------------------------------------------------

def printable(text: str) -> str:
    """Text that cannot move a cursor or forge a line: what is not printable becomes U+FFFD."""
    return "".join(char if char.isprintable() else "\ufffd" for char in text)


def quoted(text: str) -> str:
    """A value in a message, short and harmless; of a URL nothing: a part of it need not show that it has a password."""
    text = "…" if "://" in text else text
    return f"'{printable(text[:60])}'" + (" …" if len(text) > 60 else "")


def reason_of(error: BaseException) -> str:
    """What the system says, without the path that the sentence names already."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    return "it is not UTF-8 text" if isinstance(error, UnicodeDecodeError) else str(error) or type(error).__name__


class StudyInfoError(Exception):
    """Base of all errors of this program. Its text is one printable sentence: the value, the place and what to do."""

    def __init__(self, text: str = ""):
        super().__init__(printable(text))


class UsageError(StudyInfoError):
    """The command line, or what it names, is wrong: nothing was contacted or written."""


class RunError(StudyInfoError):
    """Nothing more can be done in this run: access denied, no server, database trouble."""


class DatabaseError(RunError):
    """The database cannot be read or written."""


class StudyError(StudyInfoError):
    """One accession, or one date, cannot be had or stored; the others go on."""


class NoMrSeries(StudyError):
    """The accession has no MR series: a failure only where it was named."""


class ServerError(StudyError):
    """An answer of the server was not what was asked for; status: that of HTTP where it is the reason, else 0."""

    def __init__(self, text: str, status: int = 0):
        super().__init__(text)
        self.status = status


class TransientError(ServerError):
    """A fault that repeating the request may cure."""

    def __init__(self, text: str, tries: int = TRIES, wait: float | None = None, contact: bool = True, hint: str = ""):
        super().__init__(text)
        self.tries, self.wait = tries, wait         # how often in all; seconds that the server asked for
        self.contact, self.hint = contact, hint     # whether a connection was made; what may help


class RequestsSpent(Exception):
    """A series has cost as many requests as it may: what is still missing stays so. No user meets it."""


class Interrupted(BaseException):
    """SIGINT or SIGTERM arrived. Not an Exception, so that nothing on the way swallows it."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.name, self.exit_status = signal.Signals(signum).name, 128 + signum


def missing_packages(*names: str) -> RunError:
    """The sentence that names them and the two ways to get them."""
    return RunError(f"missing Python packages: {', '.join(names)}; run 'pip install -r requirements.txt' in a virtual "
                    "environment, or run this program as 'uv run store_study_info.py', which fetches what it needs")


# ------------------------------------------------------------------------------------------------------------------
# Parsers: text of a DICOM element in, value or None out
# ------------------------------------------------------------------------------------------------------------------

def clean(value: Any) -> str | None:
    """Text without its padding, None where nothing is left or where the value is not text."""
    if not isinstance(value, str):
        return None
    text = value.replace("\0", " ").strip()    # padded to even length (PS3.5 6.2), in real files often further
    # Lone surrogates, which JSON can carry and neither SQLite nor a terminal can, become U+FFFD.
    return (text if text.isascii() else text.encode("utf-8", "surrogatepass").decode("utf-8", "replace")) or None


_NUMBER = re.compile(r"[+-]?(\d{1,300}\.?\d{0,300}|\.\d{1,300})([eE][+-]?\d{1,4})?", re.ASCII)


def number(text: str | None) -> float | None:
    """A decimal string (DS, or FD as Orthanc prints it) -> finite float, else None.

    >>> number("67.00 "), number(".5"), number("1e3"), number("1,5"), number("nan"), number("1e999"), number("5 kg")
    (67.0, 0.5, 1000.0, None, None, None, None)
    >>> number("1e-400"), number("0e-400")
    (None, 0.0)
    """
    match = _NUMBER.fullmatch(clean(text) or "")
    value = float(match[0]) if match else math.inf
    vanished = value == 0 and match and re.search("[1-9]", match[1])    # too small for a float is not 0
    return value if math.isfinite(value) and not vanished else None


def non_negative(text: str | None) -> float | None:
    """A number that is 0 or more, else None: SAR in W/kg, height in m, weight in kg, seconds."""
    value = number(text)
    return value if value is not None and value >= 0 else None


_INTEGER = re.compile(r"([+-]?\d{1,20})(\.0*)?", re.ASCII)


def integer(text: str | None) -> int | None:
    """An integer string (IS) -> int; None where it is not one, or beyond the 64 bits that SQLite holds.

    >>> integer("+007 "), integer("3.0"), integer("3.5"), integer("9223372036854775808")
    (7, 3, None, None)
    """
    match = _INTEGER.fullmatch(clean(text) or "")
    value = int(match[1]) if match else None
    return value if value is not None and -(2 ** 63) <= value < 2 ** 63 else None


_AGE = re.compile(r"0*(\d{1,3})(?:\s*([YMWDymwd])|\.\d*)?", re.ASCII)


def age(text: str | None) -> int | None:
    """PatientAge -> completed years, of 365 days, else None. AS is three digits and a unit (PS3.5 6.2), in theory.

    >>> age("040Y"), age("42"), age("9.0 "), age("*** "), age("018M"), age("104W"), age("730D")
    (40, 42, 9, None, 1, 1, 2)
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

    VB13 to VE11 write seconds and hundredths, or mm:ss; XA adds a colon after TA, and hours:

    >>> acquisition_time("TA 12.34"), acquisition_time("TA 02:07"), acquisition_time("TA: 00:03:11")
    (Decimal('12.34'), Decimal('127'), Decimal('191'))

    The number of concatenations multiplies; a number or mm:ss may stand alone:

    >>> acquisition_time("TA 02:07*6"), acquisition_time("TA 50.40*2"), acquisition_time("05:32")
    (Decimal('762'), Decimal('100.80'), Decimal('332'))

    Within a colon form all but the leading part have two digits and are below 60; nothing is guessed, and more than
    a day is not a scan's:

    >>> acquisition_time("TA 02:70"), acquisition_time("TA 5*0"), acquisition_time("Anon"), acquisition_time("25:00:00")
    (None, None, None, None)
    """
    match = _DURATION.fullmatch(clean(text) or "")
    if not match:
        return None
    hours, minutes, times = int(match["hours"] or 0), int(match["minutes"] or 0), int(match["times"] or 1)
    seconds = Decimal(match["seconds"].replace(",", "."))
    if times == 0 or (match["minutes"] and seconds >= 60) or (match["hours"] and minutes >= 60):
        return None
    total = (hours * 3600 + minutes * 60 + seconds) * times
    return total if total <= LONGEST_SCAN else None


def half_up(seconds: Decimal) -> int:
    """Seconds to the nearest integer, a half rounded up: 100.8 -> 101, 0.5 -> 1."""
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
PATIENT_ID, SEX, STUDY_DESCRIPTION, SERIES_NUMBER = "0010,0020", "0010,0040", "0008,1030", "0020,0011"
SAR, TIME_OF_ACQUISITION = "0018,1316", "0051,100a"

STUDY_FIELDS = (
    Field("accession", ACCESSION, "TEXT PRIMARY KEY", clean),
    Field("patient_id", PATIENT_ID, "TEXT", clean),
    Field("age", "0010,1010", "INTEGER", age),
    Field("height", "0010,1020", "REAL", non_negative),
    Field("weight", "0010,1030", "REAL", non_negative),
    Field("sex", SEX, "TEXT", clean),
    Field("ethnic_group", "0010,2160", "TEXT", clean),
    Field("body_part", "0018,0015", "TEXT", clean),
    Field("manufacturer_model", "0008,1090", "TEXT", clean),
    Field("study_date", STUDY_DATE, "TEXT", clean),
    Field("study_description", STUDY_DESCRIPTION, "TEXT", clean),
)
SERIES_FIELDS = (
    Field("series_uid", SERIES_UID, "TEXT PRIMARY KEY", clean),
    Field("accession", ACCESSION, "TEXT NOT NULL REFERENCES studies(accession)", clean),
    Field("sar", SAR, "REAL", non_negative),
    Field("duration", TIME_OF_ACQUISITION, "INTEGER", acquisition_time),
    Field("series_number", SERIES_NUMBER, "INTEGER", integer),
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
# Where a creator keeps something: group, creator, last two digits of the element
SIEMENS_HEADER = ("0051", "SIEMENS MR HEADER", "0a")
GE_TIME = ("0019", "GEMS_ACQU_01", "5a")
SIEMENS_PROTOCOLS = (("0029", "SIEMENS CSA HEADER", "20"), ("0021", "SIEMENS MR SDS 01", "19"))

# What Orthanc keeps of a study and its patient, the same for all its series
STUDY_LEVEL = (ACCESSION, STUDY_DATE, STUDY_UID, STUDY_DESCRIPTION, PATIENT_ID, SEX)
STUDY_TAGS = (ACCESSION, STUDY_DATE, STUDY_UID, SERIES_OF_STUDY)
SERIES_TAGS = tuple(dict.fromkeys(
    [field.tag for fields in TABLES.values() for field in fields]
    + [MODALITY, MANUFACTURER, SOP_CLASS, SOP_UID, STUDY_UID, INSTANCES_OF_SERIES]
    + [f"0051,{kind}" for block in BLOCKS for kind in (f"00{block}", f"{block}0a")]))
FALLBACK_TAGS = (IMAGE_TYPE, DURATION_SECONDS, SHARED_GROUPS,
                 *(f"0019,{kind}" for block in BLOCKS for kind in (f"00{block}", f"{block}5a")),
                 *(f"{group},00{block}" for group, _, _ in SIEMENS_PROTOCOLS for block in BLOCKS))

Header = dict[str, Any]    # of one instance, or what the server keeps: {tag: text, None or list of items}


def get_element(header: Header, tag: str) -> str | None:
    """The element's text without padding; None where it is absent, empty or not text."""
    return clean(header.get(tag))


# ------------------------------------------------------------------------------------------------------------------
# Tokens and dates: what the user names
# ------------------------------------------------------------------------------------------------------------------

class Dates(NamedTuple):
    token: str
    first: datetime.date
    last: datetime.date     # included


# What Orthanc matches as it stands: * and ? are wildcards and \ makes a list, with which it would answer with other
# patients' studies. A named accession is always plain, the server's own need not be.
PLAIN = re.compile(r"[A-Za-z0-9._/ -]+")
SECRET = re.compile(r"://|.@", re.DOTALL)    # a password could stand there
_DATES = re.compile(r"(\d{6}|\d{8})(?:(-)(\d{6}|\d{8})?)?", re.ASCII)
_DAYS = re.compile(r"[+-]?\d+ ?days?", re.ASCII | re.IGNORECASE)    # however 7days could be written


def parse_token(token: str, today: datetime.date, prefix: str = PREFIX) -> str | Dates:
    """One token, @FILE excepted: an accession or dates. Raises UsageError with the token and its likeliest meaning.

    >>> parse_token("E12345", datetime.date(2024, 5, 2))
    'E12345'
    >>> parse_token("7days", datetime.date(2024, 5, 2))[1:]
    (datetime.date(2024, 4, 25), datetime.date(2024, 5, 1))
    """
    try:
        if meaning := meaning_of(token, today, prefix):
            return meaning
        wrong = likeliest(token, today, prefix)
    except ValueError as error:
        wrong = str(error)
    shown = token if PLAIN.fullmatch(token) and len(token) <= 60 else quoted(token)
    raise UsageError(f"{'a token that could hold a password' if SECRET.search(token) else shown}: {wrong}")


def meaning_of(token: str, today: datetime.date, prefix: str) -> str | Dates | None:
    """What has the form of a date is one, whatever the prefix. Raises ValueError, which says what is wrong with it.

    >>> meaning_of("20240427", datetime.date(2024, 5, 2), "2")[1:]
    (datetime.date(2024, 4, 27), datetime.date(2024, 4, 27))
    """
    match = _DATES.fullmatch(token)
    if match and len(match[3] or match[1]) == len(match[1]):
        (first, last), dash, end = span_of(match[1]), match[2], match[3]
        if dash:
            last = span_of(end)[1] if end else today
        if first > last:
            raise ValueError("it ends before it starts" + ("" if end else f": today is {digits_of(today)}"))
        return Dates(token, first, last)
    if re.fullmatch(r"today|yesterday|[1-9]\d{0,3}days", token, re.ASCII):
        days = int(token[:-4]) if token[0].isdigit() else int(token == "yesterday")
        if days >= today.toordinal():
            raise ValueError("it starts before the calendar does")
        return Dates(token, today - datetime.timedelta(days), today - datetime.timedelta(min(days, 1)))
    named = token.startswith(prefix) and token != prefix and token.strip(" ") == token and PLAIN.fullmatch(token)
    return token if named and not _DAYS.fullmatch(token) else None


def span_of(digits: str) -> tuple[datetime.date, datetime.date]:
    """First and last day of YYYYMM or YYYYMMDD. Raises ValueError, which says what the calendar does not have."""
    year, month, day = int(digits[:4]), int(digits[4:6]), int(digits[6:] or 1)
    if not 1 <= month <= 12:
        raise ValueError(f"there is no month {month}")
    last = month_end(datetime.date(year, month, 1))
    if not 1 <= day <= last.day:
        raise ValueError(f"{calendar.month_name[month]}{f' {year}' if month == 2 else ''} has {last.day} days")
    return last.replace(day=day), last.replace(day=day) if digits[6:] else last


def beginning(prefix: str) -> str:
    """What accessions begin with, in a sentence."""
    return f"a capital {prefix}" if len(prefix) == 1 and prefix.isupper() else f"'{prefix}'"


def likeliest(token: str, today: datetime.date, prefix: str) -> str:
    """The likeliest meaning of a token that is not understood, or what is allowed. Raises ValueError as span_of does.

    >>> likeliest("e123", datetime.date(2024, 5, 2), "E"), likeliest("June", datetime.date(2024, 5, 2), "E")
    ('accession numbers begin with a capital E: E123?', 'write 202306')
    """
    text, begins = token.strip(), token.strip().lower().startswith(prefix.lower())
    if SECRET.search(token):
        return "the server's address goes after --url, a password into a netrc file"
    if _DAYS.fullmatch(text):
        return "days before today are written 7days, with a number from 1 to 9999"
    if re.search(r"[*?\\]", token):
        return "wildcards are not allowed"
    guesses = [text, text.lower(), re.sub(r" *(-+|:|\.\.) *", "-", text)]
    if re.fullmatch(r"(19|20)\d\d([-./]\d\d?){0,2}", text):
        digits = "".join(part.zfill(2) for part in re.split("[-./]", text))
        guesses.insert(0, digits if digits[4:] else f"{digits}01-{digits}12")
    if name := re.fullmatch(r"([a-z]{3,9})\.? ?(\d{4})?", text.lower(), re.ASCII):
        guesses += [f"{name[2] or today.year - (month > today.month):04}{month:02}" for month in range(1, 13)
                    if calendar.month_name[month].lower().startswith(name[1])]
    if begins or text.isdigit():
        guesses.append(prefix + (text[len(prefix):] if begins else text))
    for guess in guesses:
        if meaning := meaning_of(guess, today, prefix):
            plainly = isinstance(meaning, Dates) or guess == text
            return f"write {guess}" if plainly else f"accession numbers begin with {beginning(prefix)}: {guess}?"
    if token.startswith(prefix):
        return "an accession number goes on with letters, digits, blanks inside or . _ - /"
    day = digits_of(today)
    return f"accession numbers begin with {beginning(prefix)}; days are written {day}, months {day[:6]}"


def month_end(day: datetime.date) -> datetime.date:
    """The last day of a day's month."""
    return day.replace(day=calendar.monthrange(day.year, day.month)[1])


def expand_tokens(tokens: Iterable[str], today: datetime.date, stdin=None,
                  prefix: str = PREFIX) -> list[str | Dates]:
    """All tokens checked, files read, double ones dropped. Raises UsageError."""
    meant: dict[str | Dates, None] = {}
    for token in tokens:
        for place, text in token_lines(token[1:], stdin) if token.startswith("@") else [("", token)]:
            try:
                meant[parse_token(text, today, prefix)] = None
            except UsageError as error:
                raise UsageError(f"{place}{error}") from None
    return list(meant)


def token_lines(name: str, stdin=None) -> Iterator[tuple[str, str]]:
    """('@FILE, line N: ', token) for each line of a token file that has one; `-` is standard input.

    >>> import io
    >>> list(token_lines("-", io.BytesIO(b"E1  # knee\\r\\n\\n# April\\n202404")))
    [('@-, line 1: ', 'E1'), ('@-, line 4: ', '202404')]
    """
    file_name = "@…" if SECRET.search("@" + name) else "@" + name
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
        raise UsageError(f"token file {file_name} cannot be read: {reason_of(error)}") from None
    for count, line in enumerate(lines, 1):
        token = re.split(r"(?:^|[ \t])#", line, maxsplit=1)[0].strip(" \t")
        place = f"{file_name}, line {count}: "
        if token.startswith("@"):
            raise UsageError(f"{place}@ is not allowed here: a token file names no other token file")
        if token:
            yield place, token


def months_of(dates: Dates) -> Iterator[tuple[datetime.date, datetime.date]]:
    """A span cut at the ends of months, so that no single answer grows with its length."""
    for month in range(dates.first.year * 12 + dates.first.month - 1, dates.last.year * 12 + dates.last.month):
        start = datetime.date(month // 12, month % 12 + 1, 1)    # they were counted from the year 0
        yield max(start, dates.first), min(month_end(start), dates.last)


def digits_of(first: datetime.date, last: datetime.date | None = None) -> str:
    """YYYYMMDD, as DICOM writes dates (DA), or YYYYMMDD-YYYYMMDD; strftime does not pad years on every system."""
    return "-".join(dict.fromkeys(day.isoformat().replace("-", "") for day in (first, last or first)))


# ------------------------------------------------------------------------------------------------------------------
# HTTP: connections, tries and time-outs; nothing of studies
# ------------------------------------------------------------------------------------------------------------------

# What went wrong -> the hint. What went wrong begins with 'first' until an answer succeeded, then come the status, the
# call and what was asked, or at first how the answer begins (it is never shown); or what TLS did, and why it ended.
HINTS = (    # in the words of nginx, Apache, Tomcat and servers in Go; HAProxy ends the connection
    ("first 400 .*(plain HTTP|HTTP request to an HTTPS|requires TLS)", "that port speaks https: use https:// in --url"),
    ("first (400 .*SSL certificate|TLS .*ALERT_(CERTIFICATE_REQUIRED|BAD_CERTIFICATE|HANDSHAKE_FAILURE))",
     "it seems to want a client certificate, which is not supported"),
    ("first TLS connecting", "it does not speak https: is it http?"),
    ("403", "the role or filter of the server or its proxy must permit {call}; credentials were looked up in {place}"),
    ("429", "it allows fewer requests: use fewer --jobs"),
    ("50[23]", "the server behind the proxy at {url} is down"),
    ("504", "the proxy's time is over, the server behind it is slow or has much to do: use fewer --jobs"),
    ("(404|405|413) POST /tools/find", "this server or its proxy does not offer or allow {call}, or not of that size"),
    (r"[45]00 (GET /instances/|POST /tools/find .*'(Series|Instance)'.*'RequestedTags': \[')",
     "the server may have lost a file, or a part of it: see its log and its storage area"),
)


def redirect_target(url: str, path: str, location: str) -> tuple[str, str]:
    """Where a redirect of url + path goes, without the request's own path, and what to do; no secret is shown."""
    from urllib.parse import urljoin, urlsplit
    try:
        target = urlsplit(urljoin(url + path, location))
        place = f"{target.scheme}://{target.netloc.rpartition('@')[2]}{target.path[:200]}"
        base = place.removesuffix(path.partition("?")[0])
        if target.port == 0 or "@" in place:
            raise ValueError
    except ValueError:
        return "something that is not an address", "redirects are not followed"
    usable = base not in (place, url) and target.scheme in ("http", "https")
    return base if usable else place, "redirects are not followed" + usable * ": use that as --url"


@functools.cache
def client_class() -> type:
    """pyorthanc's client, from its own module: the package's `__init__` imports all of pydicom, asyncio and more."""
    import importlib.machinery
    import importlib.util
    try:    # it took 0.1 s of 0.35 s of a run on a month; a release that keeps it elsewhere is imported as a whole
        package: Any = importlib.util.find_spec("pyorthanc")
        spec: Any = importlib.machinery.PathFinder.find_spec("pyorthanc.client", package.submodule_search_locations)
        module = importlib.util.module_from_spec(spec)
        sys.modules[module.__name__] = module
        spec.loader.exec_module(module)
        return module.Orthanc
    except Exception:    # code of another package: whatever fails in it, the plain import does without or says it again
        sys.modules.pop("pyorthanc.client", None)
        from pyorthanc import Orthanc as PyorthancClient
        return PyorthancClient


def certificates(url: str) -> Any:
    """What httpx is to verify a server with: the system's authorities or those of SSL_CERT_FILE; nothing for http."""
    if not url.startswith("https:"):
        return False    # loading certificates takes time
    import ssl
    authorities = os.environ.get("SSL_CERT_FILE") or None
    try:
        return ssl.create_default_context(cafile=authorities)
    except OSError as error:
        raise UsageError(f"SSL_CERT_FILE {authorities or ''} cannot be read: {reason_of(error)}") from None


def retry_after(text: str) -> float | None:
    """The header Retry-After in seconds, whether it gives seconds or a date (RFC 9110 10.2.3); else None."""
    import email.utils
    with contextlib.suppress(ValueError, TypeError, OverflowError):
        if re.fullmatch(r"\d{1,9}", text.strip(), re.ASCII):
            return float(text)
        return max(0.0, email.utils.parsedate_to_datetime(text).timestamp() - time.time())
    return None


def certificate_error(url: str, fault: Any, timeout: float) -> RunError:
    """What is wrong with a certificate. Its names are read over a second connection; no request is sent."""
    if fault.verify_code not in (62, 64):    # OpenSSL's codes of another host name, another IP address
        return RunError(f"{url} has a certificate that is not trusted ({fault.verify_message}); name the file of "
                        "your certificate authority in the environment variable SSL_CERT_FILE")
    import socket
    from urllib.parse import urlsplit
    target, context, names = urlsplit(url), certificates(url), "other names"
    context.check_hostname = False
    with (contextlib.suppress(OSError),
          socket.create_connection((target.hostname, target.port or 443), timeout) as plain,
          context.wrap_socket(plain, server_hostname=target.hostname) as connection):
        listed = (connection.getpeercert() or {}).get("subjectAltName", ())
        names = ", ".join(str(name) for kind, name in listed if kind in ("DNS", "IP Address")) or names
    return RunError(f"{url} has a certificate for {names[:200]}, not for {target.hostname}; use such a name in --url")


class Http:
    """The connections to one server; every request goes through `ask`, from any thread."""

    def __init__(self, url: str, credentials: tuple[str, str] | None = None, looked_up: str = "no netrc",
                 timeout: float = DEFAULT_TIMEOUT):
        self.url, self.timeout = url.rstrip("/"), timeout
        self.looked_up = looked_up          # for messages: the netrc file and host
        self.last_success = -math.inf       # when the last answer with success came
        self._credentials, self._verify = credentials, certificates(url)    # (login, password), TLS
        self._thread = threading.local()    # of each: end, when the answer that it waits for must be complete

    @property
    def first(self) -> bool:
        """Whether no answer was a success yet: what is wrong now ends the run, later only what was asked."""
        return self.last_success == -math.inf

    @functools.cached_property
    def client(self) -> Any:
        """pyorthanc's client, which is an httpx.Client; opened by the first request, as that imports a lot."""
        try:    # without the environment's proxies: patient data and passwords go to the named server and nowhere else
            import httpx
            client = client_class()(
                self.url, return_raw_response=True, verify=self._verify, trust_env=False, follow_redirects=False,
                timeout=httpx.Timeout(self.timeout, connect=min(CONNECT_SECONDS, self.timeout), pool=None),
                limits=httpx.Limits(keepalive_expiry=KEEPALIVE_SECONDS),
                headers={"User-Agent": f"store_study_info/{__version__}"},
                # httpx itself reads a Location, even where it does not follow it, and fails over a broken one
                event_hooks={"response": [lambda got: got.extensions.update(at=got.headers.pop("location", None))]})
        except ImportError as error:
            raise missing_packages(error.name or str(error)) from None
        if self._credentials:
            client.setup_credentials(*self._credentials)
        return client

    def json(self, kind: type, method: str, path: str, body: Any = None, cut: bytes | None = None) -> Any:
        """The answer as JSON of the type `kind`. Its text is never quoted in an error: it can hold patient data."""
        import json
        data = self.ask(method, path, body, cut)
        try:
            answer = json.loads(data)
        except (ValueError, RecursionError):
            what = f"{len(data)} bytes of {'HTML' if data.lstrip()[:1] == b'<' else 'text'} that is not JSON"
            raise self._answered(path, what) from None
        if not isinstance(answer, kind):
            raise self._answered(path, f"a JSON {type(answer).__name__} instead of a {kind.__name__}")
        return answer

    def ask(self, method: str, path: str, body: Any = None, cut: bytes | None = None, content_type: str = "") -> bytes:
        """One answer, the request repeated where that can help. Raises ServerError, or RunError for the whole run."""
        began, waited, tries = time.monotonic(), 0.0, 0
        while True:
            try:
                return self._once(method, path, body, cut, content_type)
            except TransientError as fault:
                import random
                tries += 1
                patient = not self.first and not fault.contact
                # Longer each time, with jitter, so that several runs do not knock in step
                growing = WAITS[min(tries, len(WAITS)) - 1] * random.uniform(0.75, 1.25)
                wait = growing if fault.wait is None else fault.wait
                waited += wait
                if tries >= (PATIENT_TRIES if patient else fault.tries) or waited > LONGEST_WAIT:
                    raise self._final_error(fault, tries, began) from None
                alone = self.first and tries == 1 and sys.stderr.isatty()    # a person waits
                log.log(SUMMARY if alone else logging.DEBUG, "%s %s: %s; next try in %.1f s", method, path, fault, wait)
                time.sleep(wait)

    def _final_error(self, fault: TransientError, tries: int, began: float) -> StudyInfoError:
        """What is raised after the last try: the end of the run where the server cannot be reached (any more)."""
        text = f"{fault}, {tries} tries" if tries > 1 else str(fault)
        if (fault.wait or 0) > LONGEST_WAIT:
            text = f"{fault} and asks to wait {fault.wait:.0f} s: run again later"
        if not fault.contact and self.last_success < began:
            return RunError(f"{text}; is --url right, and the server running?")
        return self._error(text, fault.hint or self.first * "is --url right, and is it http or https?")

    def _error(self, text: str, hint: str, status: int = 0) -> StudyInfoError:
        """The end of the run at first, where that can be explained; else of what was asked."""
        if hint and self.first:
            return RunError(f"{text}; {hint}")
        return ServerError(f"{text}; {hint}" if hint else text, status)

    def _hint(self, met: str, call: str = "") -> str:
        """What HINTS says of what was met, or nothing."""
        found = (hint for what, hint in HINTS if re.match(f"(first )?({what})", "first " * self.first + met, re.DOTALL))
        return next(found, "").format(url=self.url, place=self.looked_up, call=call)

    def _once(self, method: str, path: str, body: Any, cut: bytes | None, content_type: str) -> bytes:
        """One try of a request. Raises TransientError where another may help."""
        client = self.client    # first of all: it says which package is missing
        import httpx
        try:
            with client.stream(method, self.url + path, json=body, extensions={"trace": self._watch}) as response:
                self._check_status(response, method, path, body)
                if not response.headers.get("content-type", "").startswith(content_type):
                    raise self._answered(path, "something else than the bytes of an element")
                return self._read(response, path, cut)
        except (httpx.ConnectTimeout, httpx.PoolTimeout):
            text = f"{self.url} cannot be reached within {min(CONNECT_SECONDS, self.timeout):g} s"
            raise TransientError(text, TRIES // 2, contact=False) from None
        except httpx.TimeoutException:
            text = f"{self.url} did not answer {path} completely within {self.timeout:g} s"
            raise TransientError(text, TIMEOUT_TRIES) from None
        except httpx.TransportError as error:
            raise self._connection_error(error, path) from None
        except (httpx.InvalidURL, UnicodeError) as error:    # what IDNA refuses is the latter
            raise RunError(f"{self.url} cannot be asked ({type(error).__name__}): is its host name right?") from None
        except (httpx.HTTPError, httpx.StreamError) as error:
            raise self._answered(path, f"something that is not HTTP: {type(error).__name__}") from None

    def _connection_error(self, error: Any, path: str) -> StudyInfoError:
        """What stands in the way of a connection, or broke it: with https often a certificate."""
        import ssl
        import httpx
        fault, connecting = error, isinstance(error, httpx.ConnectError)
        while fault is not None and not isinstance(fault, ssl.SSLError):
            fault = fault.__cause__ or fault.__context__
        if connecting and isinstance(fault, ssl.SSLCertVerificationError):
            return certificate_error(self.url, fault, min(CONNECT_SECONDS, self.timeout))
        if fault and (hint := self._hint(f"TLS {'connecting' if connecting else 'reading'} {fault}")):
            return RunError(f"{self.url} ended the connection; {hint}")
        if connecting:
            return TransientError(f"{self.url} cannot be reached ({str(error) or 'no connection'})", contact=False)
        return TransientError(f"{self.url} broke the connection while answering {path} ({type(error).__name__})")

    def _answered(self, path: str, what: str) -> ServerError:
        """The error that an answer is not what it should be."""
        return ServerError(f"{self.url} answered {path} with {what}")

    def _watch(self, event: str, info: dict[str, Any]) -> None:
        """httpcore's trace of a request: once it is sent, header and body together have the time-out's seconds."""
        # A time-out of each read would let a server drip for ever. Threads use a connection, one at a time.
        if event == "http11.receive_response_headers.started":
            self._thread.end = time.monotonic() + self.timeout
        elif event in ("connection.connect_tcp.complete", "connection.start_tls.complete"):
            import httpx
            stream, read = info["return_value"], info["return_value"].read

            def read_in_time(max_bytes: int, timeout: float | None = None) -> bytes:
                """A connection's `read` that ends when the time of the reading thread's answer does."""
                if (remaining := self._thread.end - time.monotonic()) > 0:
                    return read(max_bytes, remaining)
                raise httpx.ReadTimeout("the time for the complete answer is over")
            stream.read = read_in_time

    def _check_status(self, response, method: str, path: str, body: Any) -> None:
        """Raise what a status other than 2xx means: for the run, for what was asked, or for this try alone."""
        status, location = response.status_code, response.extensions["at"]
        if 200 <= status < 300:
            self.last_success = time.monotonic()
            return
        # The call without what it is of: GET /instances/…/content
        call = f"{method} " + re.sub(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}", "…", re.sub(r"\?.*|(?<=content)/.*", "", path))
        start = next(response.iter_raw(4096), b"") if status == 400 and self.first else b""
        text = f"{self.url} answered {path} with HTTP {status}"
        hint = self._hint(f"{status} {call} {body} {start!r}", call)
        if status == 401:
            what = "refuses the user and password" if self._credentials else "wants a user and password"
            raise RunError(f"{self.url} {what} (HTTP 401); credentials were looked up in {self.looked_up}")
        if 300 <= status < 400 and location is not None:
            target, hint = redirect_target(self.url, path, location)
            text = f"{self.url} redirects {path} to {target}"
        if status in (429, 502, 503, 504):
            wait = retry_after(response.headers.get("retry-after", ""))
            raise TransientError(text, TIMEOUT_TRIES if status == 504 else TRIES, wait, hint=hint)
        raise self._error(text, hint, status)

    def _read(self, response, path: str, cut: bytes | None) -> bytes:
        """The body, bounded in bytes, up to `cut`, the mark of a member of a JSON object."""
        data = bytearray()
        for chunk in response.iter_bytes():
            data += chunk
            if cut and (mark := data.find(cut)) >= 0:
                return bytes(data[:mark]).rstrip(b", \r\n") + b"}"
            if len(data) > ANSWER_BYTES:
                raise self._answered(path, f"more than {ANSWER_BYTES >> 20} MB")
        return bytes(data)


# ------------------------------------------------------------------------------------------------------------------
# Orthanc: its questions, each answer checked, no image; nothing of sockets
# ------------------------------------------------------------------------------------------------------------------

class Study(NamedTuple):
    id: str
    uid: str
    accession: str
    date: str           # YYYYMMDD, or empty
    stable: bool
    series: int         # how many it has
    tags: Header        # what the server keeps at study level, where it was asked for
    answers_tags: bool  # whether the server knows RequestedTags (1.11 and newer)


class Series(NamedTuple):
    id: str
    study: str          # the study's Orthanc ID
    stable: bool
    header: Header      # of the first instance received; of an older server only what it keeps of study and series
    instances: tuple[str, ...]  # in the order received, where the server tells; empty where they were not asked for


ORTHANC_ID = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{8}){4}", re.ASCII)    # nothing else becomes part of an address


def orthanc_id(*identifiers: str) -> str:
    """Orthanc's ID of a resource: SHA-1 of its PatientID, StudyInstanceUID, SeriesInstanceUID, SOPInstanceUID."""
    import hashlib
    digest = hashlib.sha1("|".join(identifiers).encode("utf-8", "replace"), usedforsecurity=False).hexdigest()
    return "-".join(digest[start:start + 8] for start in range(0, 40, 8))


def required(answer: Header, key: str, kind: type = str) -> Any:
    """A member of a record that must be there, of that JSON type; text must be an Orthanc ID. Raises ServerError."""
    value = answer.get(key)
    if not isinstance(value, kind) or kind is str and not ORTHANC_ID.fullmatch(str(value)):
        what = "missing" if value is None else f"not {'an Orthanc ID' if kind is str else f'a {kind.__name__}'}"
        raise ServerError(f"the server sent a record whose {key} is {what}")
    return value


def checked(header: Header) -> Header:
    """A header as it came, once every value is text, null or a sequence. Raises ServerError."""
    for tag, value in header.items():
        if not (value is None or isinstance(value, (str, list))):
            raise ServerError(f"the server sent ({tag[:20]}) as a JSON {type(value).__name__} instead of text")
    return header


@functools.lru_cache(maxsize=1024)    # the same few dozen tags in every answer
def hexadecimal(tag: str) -> str:
    """`0008,0050` as it is, a keyword of the DICOM dictionary (1.9 knows no `Short` here) as such a tag."""
    if re.fullmatch(r"[0-9a-fA-F]{4},[0-9a-fA-F]{4}", tag):
        return tag.lower()
    from pydicom.datadict import tag_for_keyword
    known = tag_for_keyword(tag)
    return tag if known is None else f"{known >> 16:04x},{known & 0xffff:04x}"


def read_header(answer: Header) -> Header:
    """All tags of a record by hexadecimal tag: those requested and, of older servers, those kept in the database."""
    header: Header = {}
    for part in ("PatientMainDicomTags", "MainDicomTags", "RequestedTags"):
        tags = answer.get(part) or {}
        if not isinstance(tags, dict):
            raise ServerError(f"the server sent {part} as a JSON {type(tags).__name__}")
        header |= {hexadecimal(tag): value for tag, value in checked(tags).items()}
    return header


def read_study(answer: Header) -> Study:
    """A study record of any server version. Raises ServerError where something needed is missing or of another type."""
    header = read_header(answer)
    listed = answer.get("Series")
    count = len(listed) if isinstance(listed, list) else integer(header.get(SERIES_OF_STUDY))
    uid = get_element(header, STUDY_UID)
    if count is None or uid is None:    # an empty value in a query matches everything
        what = "the number of its series" if count is None else "a StudyInstanceUID"
        raise ServerError(f"the server sent a study without {what}")
    tags = {tag: header[tag] for tag in STUDY_LEVEL if tag in header}
    accession, date = get_element(header, ACCESSION) or "", get_element(header, STUDY_DATE) or ""
    return Study(required(answer, "ID"), uid, accession, date, required(answer, "IsStable", bool), count, tags,
                 "RequestedTags" in answer)


def read_series(answer: Header) -> Series:
    """A series record of any server version. Raises ServerError as read_study does."""
    listed = [] if answer.get("Instances") is None else required(answer, "Instances", list)
    if not all(isinstance(one, str) and ORTHANC_ID.fullmatch(one) for one in listed):
        raise ServerError("the server sent a series whose instances are not Orthanc IDs")
    header = read_header(answer)
    if get_element(header, SERIES_UID) is None:
        raise ServerError("the server sent a series without a SeriesInstanceUID")
    return Series(required(answer, "ID"), required(answer, "ParentStudy"), required(answer, "IsStable", bool),
                  header, tuple(listed))


def accession_query(accessions: Iterable[str]) -> dict[str, str]:
    """The query for accessions by name, as a list (PS3.4 C.2.2.2.2), each also with the leading blank of some files."""
    return {"AccessionNumber": "\\".join(f"{accession}\\ {accession}" for accession in accessions)}


class Orthanc:
    """The questions that are asked of one server, from any thread, and what it can: see the table in NOTES.md."""

    def __init__(self, http: Http):
        self.http = http
        self.learnt = types.SimpleNamespace(    # from the answers so far
            probing=threading.Lock(),           # held by the thread that asks for the next two
            complete_below=1,                   # an answer with fewer studies or series than this was not cut
            capped=False,                       # whether more than that are never answered (LimitFindResults)
            orders=True,                        # whether it can sort instances by their reception
            series_together=SERIES_TOGETHER)    # how many one find should bring, so that its answer comes soon
        self._allowed = math.inf                # requests that may still be made

    def within(self, requests: int) -> Orthanc:
        """The same server for so many requests; a further one raises RequestsSpent."""
        limited = copy.copy(self)
        limited._allowed = requests
        return limited

    def _spend(self) -> Http:
        """Count one request."""
        if self._allowed < 1:
            raise RequestsSpent
        self._allowed -= 1
        return self.http

    @functools.cached_property
    def system(self) -> dict[str, Any]:
        """What the server says of itself: one `/system` a run. Raises RunError where it is not an Orthanc server."""
        try:
            system = self.http.json(dict, "GET", "/system")
        except ServerError as error:
            own = re.split(r"(?<!/)/(?:app|ui)(?:/|$)", self.http.url)[0]
            where = "is --url Orthanc's own address, as in http://host:8042?" if own == self.http.url else \
                f"Orthanc's own address ends before {self.http.url.removeprefix(own)}: use {own} as --url"
            raise RunError(f"{error}; {where}") from None
        if "Version" not in system:
            raise RunError(f"{self.http.url} is not an Orthanc server: its /system names no Version")
        return system

    @property
    def extended(self) -> bool:
        """Whether `Since` reaches everything: Capabilities.HasExtendedFind (1.12.5 and newer)."""
        capabilities = self.system.get("Capabilities")
        return isinstance(capabilities, dict) and capabilities.get("HasExtendedFind") is True

    @property
    def own_index(self) -> bool:
        """Whether the index is Orthanc's own, which keeps the order of reception; a plugin's need not."""
        return self.system.get("DatabaseBackendPlugin") is None

    def find(self, level: str, query: dict, tags: Iterable[str], content: Iterable[str], **more) -> list[Header]:
        """`tools/find`. Both `Since: 0` and `Limit: 0` are needed against a server's LimitFindResults."""
        body = {"Level": level, "Query": query, "Since": 0, "Limit": 0, "Expand": True, "Short": True,
                "RequestedTags": list(tags), "ResponseContent": list(content)} | more
        answers = self._spend().json(list, "POST", "/tools/find", body)
        if not all(isinstance(answer, dict) for answer in answers):
            raise ServerError(f"{self.http.url} answered /tools/find with other things than {level.lower()} records")
        return answers

    def find_studies(self, query: dict, tags: Iterable[str] = STUDY_TAGS) -> tuple[list[Study], bool]:
        """The studies that match, and whether that is proven to be all of them."""
        def page(**more) -> dict[str, Header]:
            """The records of a page, by ID."""
            answers = self.find("Study", query, tags, ("RequestedTags", "IsStable"), **more)
            return {required(answer, "ID"): answer for answer in answers}
        extended, records, complete = self.extended, page(), True
        if extended and "StudyDate" in query:
            received = len(records)
            while records and (further := page(Since=received, Limit=PAGE)):
                received += len(further)
                if further.keys() <= records.keys():    # `Since` counts rows that the server drops itself
                    complete = self._count(query) == len(records)
                    break
                records |= further
        studies = [read_study(answer) for answer in records.values()]
        fewest = 1 if "StudyDate" in query else 2    # no limit cuts to a single study
        level = "Series" if any(study.answers_tags for study in studies) else "Study"    # what is found next
        ahead = min(SERIES_TOGETHER, sum(study.series for study in studies)) if level == "Series" else 0
        return studies, complete and (len(studies) < fewest or not self.may_be_cut(level, len(studies), ahead))

    def _count(self, query: dict) -> int | None:
        """How many studies match, as the server counts them (1.12.5 and newer); None where it does not say."""
        body = {"Level": "Study", "Query": query}
        try:
            return self.http.json(dict, "POST", "/tools/count-resources", body).get("Count")
        except ServerError:
            return None

    def may_be_cut(self, level: str, count: int, ahead: int = 0) -> bool:
        """Whether an answer of `count` records of a server without extended find may be cut (LimitFindResults).

        Seen by asking for one record more than came, or than `ahead`, how many the next answer will have: fewer than
        that and than the server counted just before are as many as it ever returns.
        """
        if self.extended:
            return False
        with self.learnt.probing:
            if count >= self.learnt.complete_below and not self.learnt.capped:
                counts = self.http.json(dict, "GET", "/statistics")
                total = counts.get("CountStudies" if level == "Study" else "CountSeries")
                if not isinstance(total, int):
                    raise ServerError(f"{self.http.url} answered /statistics without the number of studies or series")
                limit = max(count, ahead) + 1
                seen = len(self.http.json(list, "POST", "/tools/find", {"Level": level, "Query": {}, "Limit": limit}))
                self.learnt.capped = seen < min(total, limit)
                self.learnt.complete_below = max(self.learnt.complete_below, math.inf if seen >= total else seen)
        return count >= self.learnt.complete_below

    def studies_of(self, accessions: list[str]) -> dict[str, list[Study]]:
        """{accession: its studies}, asked for together. Raises ServerError where the answer may have been cut."""
        studies = self._find_all(accession_query(accessions))
        return {accession: [study for study in studies if study.accession == accession] for accession in accessions}

    def studies_like(self, accession: str) -> tuple[list[Study], list[str]]:
        """All studies of an accession that wildcards find, and the other accessions that match."""
        # The server's index leaves out control characters and those beyond ASCII.
        pattern = "*" + (accession if PLAIN.fullmatch(accession) else "*".join([*PLAIN.findall(accession), ""]))
        studies = self._find_all({"AccessionNumber": pattern})
        return ([study for study in studies if study.accession == accession],
                [study.accession for study in studies if study.accession != accession])

    def _find_all(self, query: dict) -> list[Study]:
        """The studies that match, with what belongs to the study. Raises ServerError where some may be missing."""
        studies, complete = self.find_studies(query, (*STUDY_TAGS, STUDY_DESCRIPTION, PATIENT_ID, SEX))
        if not complete:
            raise ServerError(f"{self.http.url} cuts its answers: not all studies of the accession can be seen; "
                              "ask its administrator to lift the limit LimitFindResults")
        return studies

    def series_of(self, query: dict, tags: Iterable[str]) -> list[Series]:
        """All series that match, as far as the server tells them (see may_be_cut), each with an instance's header."""
        # The header is of the first received with Orthanc's own index, else of whichever the database names
        began = time.monotonic()
        answers = self.find("Series", query, tags, ("RequestedTags", "Parent", "IsStable"))
        took, long = time.monotonic() - began, min(LONG_ANSWER, self.http.timeout / 10)
        if took > long:
            self.ask_for_fewer(len(answers))
        elif took < long / 4:
            self.learnt.series_together = min(SERIES_TOGETHER, 2 * self.learnt.series_together)
        return [read_series(answer) for answer in answers]

    def ask_for_fewer(self, series: int) -> None:
        """A find for so many series was too large for the server."""
        self.learnt.series_together = max(1, min(series, self.learnt.series_together) // 2)

    def list_series(self, study: Study) -> list[Series]:
        """The series of a study, without any limit, with their instances where no find tells them in a better order."""
        answers = self._spend().json(list, "GET", f"/studies/{study.id}/series?expand&short")
        listed = [read_series(answer) for answer in answers if isinstance(answer, dict)]
        return [series._replace(instances=() if self.extended else self._as_received(series.instances),
                                header=series.header | {tag: study.tags.get(tag) for tag in STUDY_LEVEL})
                for series in listed]

    def _as_received(self, instances: tuple[str, ...]) -> tuple[str, ...]:
        """What a series lists: as received before 1.11 with Orthanc's own index, else sorted, always the same."""
        version = re.match(r"(\d+)\.(\d+)", str(self.system["Version"]), re.ASCII)
        told = self.own_index and version and (int(version[1]), int(version[2])) < (1, 11)
        return instances if told else tuple(sorted(instances))

    def find_instances(self, query: dict, tags: Iterable[str], **more) -> list[Header]:
        """Instances of a server with extended find, in the order received or, where its index cannot tell, by ID."""
        content = ("RequestedTags", "Parent")
        received = [{"Type": "Metadata", "Key": "ReceptionDate", "Direction": "ASC"}]    # by seconds
        if self.learnt.orders:
            try:
                return self.find("Instance", query, tags, content, OrderBy=received, **more)
            except ServerError as error:
                if error.status != 500 or self.own_index:    # what plugins for other databases answer
                    raise
        answers = sorted(self.find("Instance", query, tags, content, **more), key=lambda one: required(one, "ID"))
        self.learnt.orders = False
        return answers

    def headers_after_first(self, series: Series, tags: Iterable[str]) -> Iterator[tuple[str, Header, bool]]:
        """(ID, header, whether it is the whole header) of the instances after the first, up to LOOKS in all."""
        if self.extended and self.learnt.orders and not series.instances:
            # By the series' ID, as a UID can stand under two patients; page by page, as LimitFindInstances cuts
            wanted, seen = min(LOOKS, integer(series.header.get(INSTANCES_OF_SERIES)) or LOOKS), 0
            while seen < wanted and (page := self.find_instances({}, tags, ParentSeries=series.id, Since=seen,
                                                                 Limit=wanted - seen)):
                seen += len(page)
                told = {required(one, "ID"): read_header(one) for one in page if one.get("ParentSeries") == series.id}
                yield from ((one, header, False) for one, header in told.items()
                            if header.get(SOP_UID) != series.header.get(SOP_UID))
            return
        first, instances = self.instance_of(series), series.instances
        if not instances:
            listed = self._spend().json(dict, "GET", f"/series/{series.id}")
            instances = self._as_received(read_series(listed).instances)
        yield from ((one, self.header_of(one, series), True) for one in instances[:LOOKS] if one != first)

    def instance_of(self, series: Series) -> str | None:
        """The Orthanc ID of the instance that a series' header came from."""
        if series.instances:
            return series.instances[0]
        parts = [get_element(series.header, tag) or "" for tag in (PATIENT_ID, STUDY_UID, SERIES_UID, SOP_UID)]
        if orthanc_id(*parts[:3]) == series.id:    # which proves it for its instance
            return orthanc_id(*parts)
        if not all(parts[2:]):
            return None
        found = self.find("Instance", {"SeriesInstanceUID": parts[2], "SOPInstanceUID": parts[3]}, (), ("Parent",))
        return next((required(answer, "ID") for answer in found if answer.get("ParentSeries") == series.id), None)

    def header_of(self, instance: str, series: Series) -> Header:
        """The header of one instance, what belongs to the study as the server keeps it."""
        # Up to the per-frame groups: those of 2,000 frames are 2 MB, and nothing that is asked for comes after.
        header = self._spend().json(dict, "GET", f"/instances/{instance}/tags?short", cut=b'\n   "5200,9230"')
        return checked(header) | {tag: series.header.get(tag) for tag in (*STUDY_LEVEL, SERIES_UID)}

    def content(self, instance: str, *path: str) -> bytes | None:
        """The raw bytes of one element, None where it is absent. path: tag, or tag, item, tag … into sequences."""
        steps = "/".join(step.replace(",", "-") for step in path)
        try:
            return self._spend().ask("GET", f"/instances/{instance}/content/{steps}",
                                     content_type="application/octet-stream")
        except ServerError as error:
            if error.status != 404:
                raise
            return None

    def is_big_endian(self, instance: str) -> bool:
        """Whether the file has Explicit VR Big Endian."""
        header = self._spend().json(dict, "GET", f"/instances/{instance}/header?short")
        return header.get("0002,0010") == "1.2.840.10008.1.2.2"


def studies_between(orthanc: Orthanc, first: datetime.date, last: datetime.date,
                    prefix: str) -> tuple[list[Study], list[datetime.date]]:
    """The studies from first to last whose accession begins with prefix, and the days that may be incomplete."""
    low, high = digits_of(first), digits_of(last)
    # Without the first * no accession that is kept with a leading blank; the exact day is half the cost on 1.10.
    query = {"AccessionNumber": f"*{prefix}*" if prefix else "*", "StudyDate": digits_of(first, last)}
    studies, complete = orthanc.find_studies(query)
    studies = [study for study in studies
               if study.accession and study.accession.startswith(prefix) and low <= study.date <= high]
    if complete:
        return studies, []
    if first == last:
        return studies, [first]
    days = map(datetime.date.fromordinal, range(first.toordinal(), last.toordinal() + 1))
    answers = [studies_between(orthanc, day, day, prefix) for day in days]
    return [study for found, _ in answers for study in found], [day for _, doubtful in answers for day in doubtful]


# ------------------------------------------------------------------------------------------------------------------
# Header to values: what one instance says, or the reason why it does not
# ------------------------------------------------------------------------------------------------------------------

SAR_ABSENT, SAR_UNREADABLE = "SAR absent", "SAR not readable"
TIME_ABSENT, TIME_UNREADABLE, OTHER_VENDOR = "duration absent", "duration not readable", "another vendor's tag"
TIME_PARTIAL = "duration not of the scan"
REASONS = (SAR_ABSENT, SAR_UNREADABLE, TIME_ABSENT, TIME_UNREADABLE, OTHER_VENDOR, TIME_PARTIAL)

# What is counted of stored series whose duration is not plainly the Siemens tag's
BELOW_ONE_SECOND, FROM_STATED = "with a time below one second", "with the time of AcquisitionDuration"
FROM_GE, FROM_PROTOCOL = "with the time of GE's private tag", "with the time of the Siemens protocol"
ORIGINS = (BELOW_ONE_SECOND, FROM_STATED, FROM_GE, FROM_PROTOCOL)

# Their SAR is nested and they never carry 0051,100a: enhanced MR, spectroscopy, enhanced colour, legacy converted.
ENHANCED = {f"1.2.840.10008.5.1.4.1.1.4.{kind}" for kind in (1, 2, 3, 4)}
SPECTROSCOPY = "1.2.840.10008.5.1.4.1.1.4.2"


class Value(NamedTuple):
    value: Any
    reason: str | None = None   # one of REASONS where the value is None
    detail: str = ""            # of the reason, for the log


class SeriesValues(NamedTuple):    # what one instance says of its series
    header: Header
    sar: Value                      # W/kg, float
    duration: Value                 # seconds, Decimal, not yet rounded
    instance: str | None = None     # its ID, where it is not the first instance
    sources: tuple[str, ...] = ()   # for the log: where it was found other than in the first instance's Siemens tags
    origin: str | None = None       # of the duration, one of ORIGINS where it is not the Siemens tag

    @property
    def missing(self) -> list[Value]:
        """Which of the two is not there, with its reason; a series can be stored where nothing is missing."""
        return [value for value in (self.sar, self.duration) if value.value is None]


def private_tag(header: Header, group: str, creator: str, element: str) -> str | None:
    """Where the private block of a creator has its element, as gggg,eeee; None where there is no such creator."""
    places = [f"{group},{block}{element}" for block in BLOCKS
              if (get_element(header, f"{group},00{block}") or "").upper() == creator]
    return next((tag for tag in places if header.get(tag) is not None), places[0] if places else None)


def undecoded_time(header: Header) -> str | None:
    """The tag of a time that is null, perhaps only as Orthanc decodes no private UN or Implicit VR element; or None."""
    tag = private_tag(header, *SIEMENS_HEADER)
    return tag if tag and header.get(tag) is None else None


def extract_sar(header: Header) -> Value:
    """SAR (0018,1316) in W/kg."""
    text = get_element(header, SAR)
    if text is None:
        return Value(None, SAR_ABSENT, f"SAR ({SAR}) is {'absent' if header.get(SAR) is None else 'empty'}")
    value = non_negative(text)
    if value is None:
        return Value(None, SAR_UNREADABLE, f"SAR ({SAR}) is not readable: {quoted(text)}")
    return Value(value)


def extract_duration(header: Header) -> Value:
    """The Siemens acquisition time in seconds, wherever its private block is, or what reads so without a creator."""
    siemens, creator = private_tag(header, *SIEMENS_HEADER), get_element(header, "0051,0010")
    tag = siemens or TIME_OF_ACQUISITION
    text = get_element(header, tag)
    if text is None:
        return Value(None, TIME_ABSENT, f"duration ({tag}) is {'absent' if header.get(tag) is None else 'empty'}")
    if creator and not siemens:    # GE's GEMS_FUNCTOOL_01 keeps a signed number there
        return Value(None, OTHER_VENDOR, f"({tag}) belongs to {quoted(creator)}, it is not a duration")
    value = acquisition_time(text)
    if value is None:
        return Value(None, TIME_UNREADABLE, f"duration ({tag}) is not readable: {quoted(text)}")
    return Value(value)


def read_values(header: Header, instance: str | None = None) -> SeriesValues:
    """SAR and duration as one instance states them."""
    return SeriesValues(header, extract_sar(header), extract_duration(header), instance)


def may_be_siemens(header: Header) -> bool:
    """Whether no other vendor's creator or manufacturer is named."""
    creators = [get_element(header, f"0051,00{block}") for block in BLOCKS]
    return ((not any(creators) or private_tag(header, *SIEMENS_HEADER) is not None)
            and "SIEMENS" in (get_element(header, MANUFACTURER) or "SIEMENS").upper())


def may_be_elsewhere(values: SeriesValues) -> bool:
    """Whether other instances may have what this one lacks: not where a vendor or an enhanced object explains it."""
    # One object of a private class among the images lacked both while 544 others had them.
    if not {SAR_ABSENT, TIME_ABSENT} & {value.reason for value in values.missing}:
        return False
    header = values.header
    return (may_be_siemens(header) and get_element(header, SOP_CLASS) not in ENHANCED
            and get_element(header, INSTANCES_OF_SERIES) != "1")


def series_order(header: Header) -> tuple:
    """Key to sort series by SeriesNumber, a missing one last, then by UID."""
    position = integer(header.get(SERIES_NUMBER))
    return position is None, position or 0, get_element(header, SERIES_UID) or ""


def extract_study(headers: list[Header], accession: str) -> dict[str, Any]:
    """The row of a study: of each column the first of its series, by number and UID, that has a value."""
    headers = sorted(headers, key=series_order)
    return {field.column: next((value for header in headers
                                if (value := field.parse(header.get(field.tag))) is not None), None)
            for field in STUDY_FIELDS} | {"accession": accession}


def extract_series(values: SeriesValues, accession: str) -> dict[str, Any]:
    """The row of a series whose SAR and duration were found."""
    row = {field.column: field.parse(values.header.get(field.tag)) for field in SERIES_FIELDS}
    return row | {"accession": accession, "sar": values.sar.value, "duration": half_up(values.duration.value)}


# ------------------------------------------------------------------------------------------------------------------
# Other sources: SAR and duration elsewhere in the file, for --fallback
# ------------------------------------------------------------------------------------------------------------------

def items_of(sequence: Any, *tags: str) -> Iterator[Header]:
    """The items of a sequence, or of the sequences at the end of this path; nothing where there is no sequence."""
    for item in sequence if isinstance(sequence, list) else ():
        if isinstance(item, dict):
            yield from items_of(item.get(tags[0]), *tags[1:]) if tags else (item,)


def whole_body_sar(groups: Any) -> float | None:
    """The whole-body SAR in functional groups of an enhanced MR object, W/kg (PS3.3 C.8.13.5.2)."""
    # Other items are of the head, a part of the body or local; Siemens lists SMR_B1RMS among them, which is not a SAR.
    for item in items_of(groups, "0018,9112", "0018,9239"):
        if get_element(item, "0018,9179") == "IEC_WHOLE_BODY":
            return non_negative(get_element(item, "0018,9181"))
    return None


def frame_sar(orthanc: Orthanc, series: Series) -> float | None:
    """The whole-body SAR of the first frame of an enhanced object, W/kg, a few bytes at a time."""
    instance = orthanc.instance_of(series) or ""
    for item in itertools.count() if instance else ():    # it is listed first by every vendor seen
        path = (instance, "5200,9230", "0", "0018,9112", "0", "0018,9239", str(item))
        definition = orthanc.content(*path, "0018,9179")
        if definition is None:
            break
        if definition.strip(b" \0") == b"IEC_WHOLE_BODY":
            raw = orthanc.content(*path, "0018,9181")
            value = struct.unpack("<d", raw)[0] if raw and len(raw) == 8 else math.nan    # little endian in any file
            return value if math.isfinite(value) and value >= 0 else None
    return None


def other_time(values: SeriesValues, seconds: Decimal | None, source: str, origin: str) -> SeriesValues:
    """The values with these seconds where a scan can take as long, else with that reason why there is no duration."""
    if seconds is None:
        return values
    if 1 <= seconds <= LONGEST_STATED:
        sources = (*values.sources, f"duration from {source}")
        return values._replace(duration=Value(seconds), sources=sources, origin=origin)
    detail = f"{values.duration.detail}; {source} is {float(seconds):g} s, of one frame, or in another unit"
    return values._replace(duration=Value(None, TIME_PARTIAL, detail))


def stated_time(orthanc: Orthanc, series: Series, values: SeriesValues) -> SeriesValues:
    """The values with AcquisitionDuration, in seconds, where there is no other duration."""
    header, source = values.header, f"AcquisitionDuration ({DURATION_SECONDS})"
    seconds = non_negative(get_element(header, DURATION_SECONDS))
    if seconds is None or values.duration.value is not None:
        return values
    count = str(len(series.instances)) if series.instances else get_element(series.header, INSTANCES_OF_SERIES)
    if get_element(header, SOP_CLASS) == SPECTROSCOPY and count != "1":
        detail = f"{values.duration.detail}; {source} is {seconds:g} s, of one average of several"
        return values._replace(duration=Value(None, TIME_PARTIAL, detail))
    milliseconds = (get_element(header, MANUFACTURER) or "").upper().startswith(("UIH", "UNITED IMAGING"))    # 190713.0
    return other_time(values, Decimal(repr(seconds)) / (1000 if milliseconds else 1), source, FROM_STATED)


def ge_time(orthanc: Orthanc, series: Series, values: SeriesValues) -> SeriesValues:
    """The values with GE's time of the scan, FL in microseconds, where there is no other duration."""
    tag = private_tag(values.header, *GE_TIME)
    if tag is None or values.duration.value is not None:
        return values
    value = number(get_element(values.header, tag))
    if values.header.get(tag) is None and values.sar.value is not None:
        instance = values.instance or orthanc.instance_of(series)
        raw = orthanc.content(instance, tag) if instance else None
        if instance and raw and len(raw) == 4:
            # UN is told as it is in the file: where both orders give a scan's time, the transfer syntax decides.
            (value,), (big,) = struct.unpack("<f", raw), struct.unpack(">f", raw)
            value = big if 1e6 <= big <= LONGEST_STATED * 1e6 and orthanc.is_big_endian(instance) else value
    seconds = Decimal(repr(value)) / 1_000_000 if value is not None and math.isfinite(value) else None
    return other_time(values, seconds, f"GE's ({tag})", FROM_GE)


_PROTOCOL = re.compile(rb"(?<![\w.])(lTotalScanTimeSec|lRepetitions|ucOneSeriesForAllMeas)\s*=\s*"
                       rb"(0x[\da-fA-F]{1,8}|\d{1,9})(?![\w.])")


def protocol_duration(protocol: bytes, ta: Decimal | None) -> tuple[Decimal | None, str]:
    """The seconds of a series by the text of its protocol, None where the acquisition time stands; and of how much.

    >>> protocol_duration(b"lTotalScanTimeSec = 78 lRepetitions = 29", Decimal("2.4"))
    (Decimal('78'), ', 30 measurements')
    """
    numbers = {name: int(value, 16 if value[:2] == b"0x" else 10) for name, value in _PROTOCOL.findall(protocol)[::-1]}
    seconds, measurements = Decimal(numbers.get(b"lTotalScanTimeSec", 0)), numbers.get(b"lRepetitions", 0) + 1
    together = numbers.get(b"ucOneSeriesForAllMeas", 1) == 1    # with 0x4 each is a series of its own
    if ta is None or ta < 1:
        seconds /= 1 if together else measurements
    elif not together or measurements == 1 or ta >= Decimal("0.8") * seconds:
        return None, ""
    count = f", {'' if together else 'one of '}{measurements} measurements" if measurements > 1 else ""
    return seconds if 1 <= seconds <= LONGEST_SCAN else None, count


def protocol_time(orthanc: Orthanc, series: Series, values: SeriesValues) -> SeriesValues:
    """The values with the duration of the Siemens protocol where the acquisition time is missing or of a part."""
    header, ta = values.header, values.duration.value
    tags = [tag for place in SIEMENS_PROTOCOLS if (tag := private_tag(header, *place))]
    derived = "DERIVED" in (get_element(header, IMAGE_TYPE) or "").split("\\")    # PS3.3 C.7.6.1.1.2
    if not tags or derived or values.sar.value is None or values.origin or (ta or 0) >= LONGEST_PARTIAL \
            or not may_be_siemens(header) or not (instance := values.instance or orthanc.instance_of(series)):
        return values
    texts = ((tag, orthanc.content(instance, tag) or b"") for tag in tags)    # 70 to 140 kB
    tag, text = next(((tag, text) for tag, text in texts if b"lTotalScanTimeSec" in text), ("", b""))
    seconds, count = protocol_duration(text, ta)
    if seconds is None:
        return values
    said = get_element(header, private_tag(header, *SIEMENS_HEADER) or TIME_OF_ACQUISITION)
    source = f"{'no TA' if ta is None else said}{count}: {half_up(seconds)} s from the protocol ({tag})"
    return values._replace(duration=Value(seconds), sources=(*values.sources, source), origin=FROM_PROTOCOL)


def other_sar(orthanc: Orthanc, series: Series, values: SeriesValues) -> SeriesValues:
    """The values with a SAR of the functional groups where (0018,1316) has none."""
    if values.sar.value is not None:
        return values
    sar = whole_body_sar(values.header.get(SHARED_GROUPS))
    if sar is None and get_element(values.header, SOP_CLASS) in ENHANCED:
        sar = frame_sar(orthanc, series)
    if sar is None:
        return values
    source = "SAR from the whole-body item of the functional groups (0018,9181)"
    return values._replace(sar=Value(sar), sources=(*values.sources, source))


# ------------------------------------------------------------------------------------------------------------------
# Accession to rows: everything of one accession, or the reason why it may not be stored
# ------------------------------------------------------------------------------------------------------------------

class Options(NamedTuple):
    """What of the command line concerns the reading of a study."""

    force: bool = False
    fallback: bool = False
    today: str = ""     # YYYYMMDD
    prefix: str = PREFIX

    @property
    def tags(self) -> tuple[str, ...]:
        """The tags asked for of each series, as gggg,eeee."""
        return SERIES_TAGS + FALLBACK_TAGS if self.fallback else SERIES_TAGS


class Fetched(NamedTuple):
    """One accession, ready to be stored: rows by column, and what is to be said of it."""

    study: dict[str, Any]
    series: list[dict[str, Any]]
    counts: Counter                 # of REASONS and, of stored series, of ORIGINS
    notes: list[tuple[int, str]]    # (logging level, sentence)


class Acquisition:
    """One accession of this run, and why."""

    def __init__(self, accession: str, stored: str | None):
        self.accession = accession
        self.plain = PLAIN.fullmatch(accession) is not None    # whether it can be asked for by its name
        self.stored = stored                    # its stored study date; None: not stored, or to be stored again
        self.named = self.dated = False         # by its own token, by a date token
        self.dates: set[str] = set()            # study dates that the server has it on, as far as it was asked
        self.studies: dict[str, Study] = {}     # by Orthanc ID, where they are needed
        self.all_known = False                  # whether they were asked for by accession, not by date

    @property
    def order(self) -> tuple[str, str]:
        """Key to sort by study date, an unknown one last, then by accession."""
        return min(self.dates, default=self.stored or "99999999"), self.accession

    @property
    def by_name(self) -> bool:
        """Whether its series can be asked for by its name, with others in one find."""
        return self.plain and any(study.answers_tags for study in self.studies.values())

    @property
    def series_count(self) -> int:
        """How many series its studies have, as far as they are known."""
        return sum(study.series for study in self.studies.values())

    def take(self, studies: Iterable[Study]) -> None:
        """Studies that the server has of it."""
        for study in studies:
            if study.date:
                self.dates.add(study.date)
            if self.stored is None or self.all_known:
                self.studies[study.id] = study


def ask_together(ask: Callable[[list[str]], dict[str, Any]], accessions: list[str]) -> dict[str, Any]:
    """{accession: answer or StudyError}: by one question or, where that fails, by one for each."""
    if len(accessions) > 1:
        with contextlib.suppress(StudyError):
            return ask(accessions)
    answers: dict[str, Any] = {}
    for accession in accessions:
        try:
            answers |= ask([accession])
        except StudyError as error:
            answers[accession] = error
    return answers


def fetch_together(orthanc: Orthanc, group: list[Acquisition], options: Options) -> list[Fetched | StudyError]:
    """Everything of some accessions, whose series are asked for together; each is fetched or fails for itself."""
    def ask(accessions: list[str]) -> dict[str, list[Series]]:
        """The series of these accessions by one find, for each of them."""
        try:
            return dict.fromkeys(accessions, orthanc.series_of(accession_query(accessions), options.tags))
        except StudyError:
            orthanc.ask_for_fewer(sum(one.series_count for one in group if one.accession in accessions))
            raise

    answers = ask_together(ask, [wanted.accession for wanted in group if wanted.by_name])
    fetched: list[Fetched | StudyError] = []
    for wanted in group:
        try:
            fetched.append(fetch_accession(orthanc, wanted, answers.get(wanted.accession), options))
        except StudyError as error:
            fetched.append(error)
    return fetched


def fetch_accession(orthanc: Orthanc, wanted: Acquisition, answer: list[Series] | StudyError | None,
                    options: Options) -> Fetched:
    """Everything of one accession; answer: what a find by name brought, if there was one. Raises StudyError."""
    if isinstance(answer, StudyError):
        raise answer
    studies, series = all_series(orthanc, wanted, answer, options)
    arriving = not all(study.stable for study in studies) or not all(one.stable for one in series)
    if arriving and not options.force:
        raise StudyError("is still arriving, not stored; run again later, or store it as it is with --force")
    images = [one for one in series if get_element(one.header, MODALITY) == "MR"]
    if not images:
        raise NoMrSeries("has no MR series, not stored")
    warnings = []
    patients = {get_element(one.header, PATIENT_ID) for one in series}    # told apart, never shown
    if len(patients) > 1:
        warnings.append(f"its studies have {len(patients)} different patient IDs; the row is of the earliest with MR")
    if any(study.date == options.today for study in studies):
        warnings.append("stored on its own study date, more series may still come; --force fetches it again")
    return _process_study(orthanc, wanted.accession, with_headers(orthanc, studies, images), warnings, options)


def all_series(orthanc: Orthanc, wanted: Acquisition, answer: list[Series] | None,
               options: Options) -> tuple[list[Study], list[Series]]:
    """All studies and all series of an accession, in order, checked against each study's own count of series."""
    studies, count = list(wanted.studies.values()), len(answer or ())
    if answer is None and any(study.answers_tags for study in studies):
        answer = orthanc.series_of({"StudyInstanceUID": "\\".join(study.uid for study in studies)}, options.tags)
    series = [one for one in answer or () if get_element(one.header, ACCESSION) == wanted.accession]
    lacking = answer is not None and is_incomplete(studies, series)
    others = not wanted.all_known and ({one.study for one in series} != {study.id for study in studies}
                                       or orthanc.may_be_cut("Series", count))    # these show, or may hide, others
    if lacking or others:
        found = orthanc.studies_of([wanted.accession])[wanted.accession] if wanted.plain else []
        found = found or orthanc.studies_like(wanted.accession)[0]    # what a date found is not always among them
        studies = [*(wanted.studies | {study.id: study for study in found}).values()]
    if is_incomplete(studies, series):
        series = [one for study in studies for one in orthanc.list_series(study)]
    if is_incomplete(studies, series):
        raise StudyError("changed on the server while it was read, not stored; run again")
    studies.sort(key=lambda study: (not study.date, study.date, study.uid, study.id))    # a missing date last
    place = {study.id: position for position, study in enumerate(studies)}
    return studies, sorted(series, key=lambda one: (place[one.study], *series_order(one.header)))


def is_incomplete(studies: list[Study], series: list[Series]) -> bool:
    """Whether there is no study, one has fewer series here than it counts itself, or a series belongs to none."""
    counts = Counter(one.study for one in series)
    return (not studies or any(counts[study.id] < study.series for study in studies)
            or not counts.keys() <= {study.id for study in studies})


def with_headers(orthanc: Orthanc, studies: list[Study], series: list[Series]) -> list[Series]:
    """Each series with its first instance's header, read there where the server did not look. Raises StudyError."""
    listed = {one.id: [*one.instances] for one in series}
    if any(lacks_file_tags(one) and not one.instances for one in series):
        if orthanc.extended:    # its own lists are in no order
            for answer in orthanc.find_instances({"StudyInstanceUID": "\\".join(study.uid for study in studies)}, ()):
                listed.setdefault(required(answer, "ParentSeries"), []).append(required(answer, "ID"))
        else:
            listed |= {one.id: [*one.instances] for study in studies for one in orthanc.list_series(study)}
    if any(lacks_file_tags(one) and not listed[one.id] for one in series):
        raise StudyError("lost an instance on the server while it was read, not stored; run again")
    return [one._replace(instances=tuple(listed[one.id]), header=orthanc.header_of(listed[one.id][0], one))
            if lacks_file_tags(one) else one for one in series]


def lacks_file_tags(series: Series) -> bool:
    """Whether the server did not look into the file, as old ones and those with StorageAccessOnFind "Never" do not."""
    # Keys that no index keeps are absent then, not null; a server may keep SAR and duration (ExtraMainDicomTags).
    return not {f"0051,00{block}" for block in BLOCKS[1:]} <= series.header.keys()


def _process_study(orthanc: Orthanc, accession: str, series: list[Series], warnings: list[str],
                   options: Options) -> Fetched:
    """The rows of an accession from its MR series, in order: the study's from the earliest study, and each series'."""
    earliest = [one.header for one in series if one.study == series[0].study]
    rows: dict[str, dict[str, Any]] = {}
    counts: Counter = Counter()
    notes: list[tuple[int, str]] = []
    for one in series:
        values = _process_series(orthanc, one, options)
        name = f"series {get_element(one.header, SERIES_NUMBER) or '?'} ({get_element(one.header, SERIES_UID)})"
        if values.missing:
            counts[values.missing[0].reason] += 1
            reasons = "; ".join(value.detail for value in values.missing)
            notes.append((logging.DEBUG, f"{name} skipped: {reasons}"))
            continue
        row = extract_series(values, accession)
        if rows.setdefault(row["series_uid"], row) is not row:
            notes.append((logging.WARNING, f"{name} is on the server twice, the one of the earlier study is stored"))
            continue
        notes.extend((logging.DEBUG, f"{name}: {source}") for source in values.sources)
        counts[BELOW_ONE_SECOND if values.duration.value < 1 else values.origin] += 1
        if values.duration.value < 1:
            said = f"{name} has an acquisition time of {values.duration.value} s, which may not be that of the scan"
            notes.append((logging.DEBUG, said))
    notes.extend((logging.WARNING, warning) for warning in warnings)
    return Fetched(extract_study(earliest, accession), list(rows.values()), counts, notes)


def _process_series(orthanc: Orthanc, series: Series, options: Options) -> SeriesValues:
    """What is stored of one series; what is missing is looked for with MORE requests at most."""
    values, kept = read_values(series.header), FOR_PROTOCOL if options.fallback else 0
    limited = orthanc.within(MORE - kept)
    looks: list[Callable[[Orthanc, Series, SeriesValues], SeriesValues]] = [
        functools.partial(with_first_time, without_sar=options.fallback),
        functools.partial(second_look, tags=options.tags)]
    if options.fallback:
        looks += [other_sar, stated_time, ge_time, protocol_time]
    for look in looks:
        if look is other_sar:
            limited._allowed += kept
        with contextlib.suppress(RequestsSpent):
            values = look(limited, series, values)
    return values


def with_first_time(orthanc: Orthanc, series: Series, values: SeriesValues, without_sar: bool) -> SeriesValues:
    """The values with the acquisition time that the server does not decode; without_sar: also where it is alone."""
    tag = undecoded_time(series.header)
    if tag is None:
        return values
    if values.sar.value is None and not without_sar:
        detail = f"duration ({tag}) is not given by the server and, without SAR, not asked for"
        return values._replace(duration=Value(None, TIME_ABSENT, detail))
    return with_raw_time(orthanc, orthanc.instance_of(series), values, tag)


def with_raw_time(orthanc: Orthanc, instance: str | None, values: SeriesValues, tag: str) -> SeriesValues:
    """The values with the acquisition time that only the element's raw content tells; `tag` as of undecoded_time."""
    raw = orthanc.content(instance, tag) if instance else None
    return values if raw is None else read_values(values.header | {tag: raw[:64].decode("latin-1")}, values.instance)


def second_look(orthanc: Orthanc, series: Series, values: SeriesValues, tags: Iterable[str]) -> SeriesValues:
    """The values of the first of the next instances received that has both SAR and duration."""
    if not values.missing or not may_be_elsewhere(values):
        return values
    for instance, header, whole in orthanc.headers_after_first(series, tags):
        found, tag = read_values(header, instance), undecoded_time(header)
        if found.sar.value is not None and tag:
            found = with_raw_time(orthanc, instance, found, tag)
        if not found.missing and not whole:
            # RequestedTags mix in what the server keeps of the series, which is of its first instance: one request more
            tag = private_tag(header, *SIEMENS_HEADER) or TIME_OF_ACQUISITION
            found = read_values(orthanc.header_of(instance, series) | {tag: found.header.get(tag)}, instance)
        if not found.missing:
            source = "read from another instance than the first, which lacks SAR or duration"
            return found._replace(sources=(source,))
    return values


# ------------------------------------------------------------------------------------------------------------------
# SQLite: an accession is stored as a whole or not at all
# ------------------------------------------------------------------------------------------------------------------

class Database(sqlite3.Connection):
    """A connection that knows its path, for messages."""

    path = ""


MAGIC = b"SQLite format 3\0"    # the first bytes of every database that is not empty

# An accession, given twice: found by the index, and no other by a column that takes E1a for E1A or 007 for 7.
THE_ACCESSION = "accession = ? AND CAST(accession AS TEXT) = ? COLLATE BINARY"

ADVICE = (    # for what SQLite says
    ("readonly", "it or its folder cannot be written: check the permissions"),
    ("locked", f"another program has held it for {BUSY_SECONDS:.0f} s: run again later"),
    ("full", "make room, then run again"),
    ("unable to open", "check the path and the permissions"),
    ("is malformed|malformed database|not a database", "it is damaged: restore it from a copy, or move it away"),
)


@contextlib.contextmanager
def database_errors(path: str) -> Iterator[None]:
    """What SQLite says, as a sentence with the path and what to do; for one study alone where a constraint says it."""
    try:
        yield
    except sqlite3.IntegrityError as error:
        raise StudyError(f"not stored: database {path} has a rule of your own that refuses it ({error}); change that "
                         "column, index or trigger") from None
    except sqlite3.Error as error:
        advice = "".join(f"; {advice}" for words, advice in ADVICE if re.search(words, str(error)))
        raise DatabaseError(f"database {path}: {error}{advice}") from None


def first_bytes(path: str) -> bytes:
    """What a file begins with, as much as tells a database."""
    if not stat.S_ISREG(os.stat(path).st_mode):
        return b"not a file"    # a folder, a pipe: opening it could wait for ever
    with open(path, "rb") as file:
        return file.read(len(MAGIC))


def is_database(path: str) -> bool:
    """Whether it is the file of an SQLite database."""
    with contextlib.suppress(OSError):
        return first_bytes(path) == MAGIC
    return False


def check_database_file(path: str) -> bool:
    """Whether the database exists. Raises DatabaseError where it is something else, or could not be created."""
    folder, other = os.path.dirname(path), "name another with --db"
    try:
        start = first_bytes(path)
    except FileNotFoundError:
        if not os.path.isdir(folder):
            raise DatabaseError(f"database {path}: there is no folder {folder}; create it, or {other}") from None
        if not os.access(folder, os.W_OK | os.X_OK):
            raise DatabaseError(f"database {path}: the folder {folder} cannot be written; {other}") from None
        return False
    except (OSError, ValueError) as error:
        raise DatabaseError(f"database {path} cannot be read: {reason_of(error)}") from None
    if start and start != MAGIC:
        raise DatabaseError(f"database {path} is not an SQLite file and is left as it is; {other}")
    return True


def execute_when_free(conn: sqlite3.Connection, statement: str, values: tuple = ()) -> sqlite3.Cursor:
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
    """All or nothing, whatever ends it; within another one, a part that can be undone by itself."""
    begin, end, undo = (("SAVEPOINT part", "RELEASE part", "ROLLBACK TO part") if conn.in_transaction
                        else ("BEGIN IMMEDIATE", "COMMIT", "ROLLBACK"))
    execute_when_free(conn, begin)
    try:
        yield
        execute_when_free(conn, end)
    except BaseException:
        if conn.in_transaction:    # a rule of the user's own may have undone it
            conn.execute(undo)
        raise


def check_columns(conn: Database) -> None:
    """Raise DatabaseError where a table that is there lacks columns or its primary key."""
    faults = []
    for table, fields in TABLES.items():
        columns = {row[1].lower(): row[5] for row in execute_when_free(conn, f"PRAGMA table_info({table})")}
        missing, key = [field.column for field in fields if field.column not in columns], fields[0].column
        if columns and missing:
            faults.append(f"the table {table} lacks {', '.join(missing)}")
        elif columns and [name for name, place in columns.items() if place] != [key]:
            faults.append(f"{key} is not the primary key of the table {table}")
    if faults:
        advice = "move the file away to have the tables built anew, or name another with --db"
        raise DatabaseError(f"database {conn.path}: {' and '.join(faults)}; {advice}")


def open_database(path: str) -> Database:
    """The database at an absolute path, created with its tables where absent, readable by its owner alone."""
    if not check_database_file(path):
        try:
            os.close(os.open(os.path.realpath(path), os.O_CREAT | os.O_WRONLY, 0o600))
        except OSError as error:
            raise DatabaseError(f"database {path} cannot be created: {reason_of(error)}") from None
    with database_errors(path), contextlib.ExitStack() as undo:
        conn = sqlite3.connect(path, timeout=SIGNAL_CHECK_SECONDS, isolation_level=None, factory=Database)
        undo.callback(conn.close)
        conn.path, conn.text_factory = path, functools.partial(str, encoding="utf-8", errors="replace")
        check_columns(conn)
        there = execute_when_free(conn, "SELECT lower(name) FROM sqlite_master").fetchall()
        if not {(name,) for name in (*TABLES, "series_accession")} <= {*there}:
            with transaction(conn):
                for table, fields in TABLES.items():
                    columns = ", ".join(f"{field.column} {field.sql}" for field in fields)
                    conn.execute(f"CREATE TABLE IF NOT EXISTS {table} ({columns})")
                conn.execute("CREATE INDEX IF NOT EXISTS series_accession ON series(accession)")
        undo.pop_all()
    return conn


def stored_date(conn: Database, accession: str) -> str | None:
    """The stored study date of an accession, empty where it has none; None where it is not stored."""
    with database_errors(conn.path):
        statement = f"SELECT CAST(ifnull(study_date, '') AS TEXT) FROM studies WHERE {THE_ACCESSION}"
        row = execute_when_free(conn, statement, (accession, accession)).fetchone()
    return row[0] if row else None


class Outcome(NamedTuple):
    stayed: int     # series stored before that were not among these and stayed: a study may be gone from the server
    changed: bool   # whether anything that is stored is different now


def read_rows(conn: sqlite3.Connection, accession: str) -> dict[str, dict[str, tuple]]:
    """What is stored of an accession: {table: {key: values in the order of the fields}}."""
    queries = {table: f"SELECT {', '.join(field.column for field in fields)} FROM {table} WHERE {THE_ACCESSION}"
               for table, fields in TABLES.items()}
    return {table: {str(row[0]): row for row in conn.execute(query, (accession, accession))}
            for table, query in queries.items()}


def differences(table: str, row: dict[str, Any], stored: dict[str, dict[str, tuple]]) -> list[str]:
    """What differs between a row and the one stored with its key; '123' may be kept as 123, not '012' as 12."""
    kept = stored[table].get(row[TABLES[table][0].column])
    if kept is None:
        return [f"no row in {table}"]
    pairs = [(field.column, row[field.column], value) for field, value in zip(TABLES[table], kept, strict=True)]
    return [f"{table}.{column}" for column, ours, value in pairs
            if ours != value and (None in (ours, value) or str(ours) != str(value))]


def upsert(conn: sqlite3.Connection, rows: list[tuple[str, dict[str, Any]]],
           stored: dict[str, dict[str, tuple]]) -> None:
    """Insert (table, row), or update a stored one by its primary key; columns of the user's own stay as they are."""
    # An ON CONFLICT clause of the user's own is overruled: REPLACE would take out rows of other studies. Only where
    # there is one, as SQLite then overrules what his triggers do, too; so does its own upsert, which is not used.
    ruled = {name for (name,) in conn.execute("SELECT lower(name) FROM sqlite_master WHERE sql LIKE '%CONFLICT%'")}
    for table, row in rows:
        rule, columns, key = "OR ABORT" if table in ruled else "", [*row], TABLES[table][0].column
        if row[key] in stored[table]:
            conn.execute(f"UPDATE {rule} {table} SET {' = ?, '.join(columns)} = ? WHERE {key} = ?",
                         [*row.values(), row[key]])
        else:
            conn.execute(f"INSERT {rule} INTO {table} ({', '.join(columns)}) "
                         f"VALUES ({', '.join('?' * len(columns))})", [*row.values()])


def store_study(acc: str, conn: Database, study: dict[str, Any], series: list[dict[str, Any]],
                replace: bool = True) -> Outcome:
    """Store one accession whole or not at all: its row and exactly these series, gone ones out.

    Without `replace`, where stored series are not among these, only new ones come in, and no stored row is
    changed. Raises StudyError where a series is stored under another accession, and where a rule or type of the user's
    own refuses or changes what is written.
    """
    with database_errors(conn.path), transaction(conn):
        for row in series:
            found = conn.execute("SELECT accession FROM series WHERE series_uid = ?", (row["series_uid"],)).fetchone()
            if found and str(found[0]) != acc:
                raise StudyError(f"not stored: series {row['series_uid']} of {acc} is stored under accession "
                                 f"{found[0]} already; see 'One series under two accessions' in README.md")
        before, uids = read_rows(conn, acc), {row["series_uid"] for row in series}
        missing = before["series"].keys() - uids
        all_rows = replace or not missing or not before["studies"]    # without its study's row it is not stored
        gone = missing if all_rows else set()
        wanted = [("studies", study)] if all_rows else []
        wanted += [("series", row) for row in series if all_rows or row["series_uid"] not in before["series"]]
        changes = [(table, row) for table, row in wanted if differences(table, row, before)]
        for uid in gone:
            conn.execute("DELETE FROM series WHERE series_uid IS ? AND accession IS ?", before["series"][uid][:2])
        upsert(conn, changes, before)
        after = read_rows(conn, acc)
        wrong = [text for table, row in wanted for text in differences(table, row, after)]
        if wrong or after["series"].keys() != before["series"].keys() - gone | uids:
            raise StudyError(f"not stored: database {conn.path} kept something else than was written "
                             f"({wrong[0] if wrong else 'other series'}); change your column or trigger that does")
        return Outcome(len(missing - gone), bool(changes or gone))


def store_studies(conn: Database, studies: Sequence[tuple[str, dict, list[dict]]],
                  replace: bool = True) -> list[Outcome | StudyError]:
    """Store accessions in one transaction, each as `store_study` does; one that fails is undone alone."""
    outcomes: list[Outcome | StudyError] = []
    try:
        with database_errors(conn.path), transaction(conn):
            for accession, study, series in studies:
                try:
                    outcomes.append(store_study(accession, conn, study, series, replace))
                except StudyError as error:
                    if not conn.in_transaction:    # a ROLLBACK of the user's own undid them all
                        raise
                    outcomes.append(error)
        return outcomes
    except StudyError as error:
        # Alone it is its own error; of several, each is tried in a transaction of its own.
        return [error] if len(studies) == 1 else [store_studies(conn, [one], replace)[0] for one in studies]


# ------------------------------------------------------------------------------------------------------------------
# CSV: the accessions of a run, one row a series
# ------------------------------------------------------------------------------------------------------------------

def csv_rows(conn: Database | None, accessions: Iterable[str]) -> Iterator[tuple]:
    """The header, then one row a series in the order of the accessions; a study without series has one row."""
    columns = [f"{table}.{field.column}" for table, fields in TABLES.items() for field in fields]
    columns.remove("series.accession")
    yield tuple(column.partition(".")[2] for column in columns)
    studies, series = (f"(SELECT * FROM {table} WHERE {THE_ACCESSION}) AS {table}" for table in TABLES)
    order = "series_number IS NULL, series_number, series_uid"
    statement = f"SELECT {', '.join(columns)} FROM {studies} LEFT JOIN {series} ON 1 ORDER BY {order}"
    if conn:
        with database_errors(conn.path):
            for accession in accessions:
                yield from execute_when_free(conn, statement, (accession,) * 4)


def write_csv(path: str, conn: Database | None, accessions: Iterable[str]) -> None:
    """Written beside the file and moved into its place when complete; readable by its owner alone."""
    import csv
    import tempfile
    try:
        target = os.path.realpath(path)
        with tempfile.TemporaryDirectory(dir=os.path.dirname(target), prefix=".") as folder:
            complete = os.path.join(folder, "complete.csv")
            with open(os.open(complete, os.O_CREAT | os.O_WRONLY, 0o600), "w", encoding="utf-8", newline="") as file:
                # Before Python 3.13 a lone CR is quoted only where the line terminator has one.
                lines = types.SimpleNamespace(write=lambda line: file.write(line[:-2] + "\n"))
                csv.writer(lines, lineterminator="\r\n").writerows(csv_rows(conn, accessions))
            os.replace(complete, target)
    except OSError as error:
        raise RunError(f"CSV file {path} cannot be written: {reason_of(error)}") from None


# ------------------------------------------------------------------------------------------------------------------
# Output: log lines, progress, stdout
# ------------------------------------------------------------------------------------------------------------------

class LineHandler(logging.Handler):
    """Log lines on stderr, on a terminal without date and level, around a progress bar while there is one."""

    bar: Any = None
    screen: os.terminal_size | None = None      # of stderr, where that is a terminal
    rows = 0                                    # of it, written so far
    failures: list[tuple[int, str]] = []        # (rows before it, line)

    def emit(self, record: logging.LogRecord) -> None:
        """Write one line; a stderr that is gone or full is no trouble."""
        text = record.getMessage() if self.screen else self.format(record)
        if self.screen and record.levelno == logging.ERROR:
            LineHandler.failures.append((LineHandler.rows, text))
        with contextlib.suppress(OSError, ValueError):    # nobody reads it any more: no reason to stop storing
            write_line(sys.stderr, text)


def write_line(stream: Any, text: str) -> None:
    """Write one printable line at once, so that a pipe sees it as soon as it is true; around the bar, if any."""
    if LineHandler.bar is not None:
        LineHandler.bar.write(printable(text), file=stream)
    else:
        stream.write(printable(text) + "\n")
    stream.flush()
    if LineHandler.screen and stream.isatty():
        LineHandler.rows += max(1, -(-len(text) // (LineHandler.screen.columns or 80)))


def set_up_logging(verbose: bool, quiet: bool) -> None:
    """Log lines on stderr; on a terminal, where the bar shows single studies, only what sums up or warns."""
    handler = LineHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s", "%Y-%m-%d %H:%M:%S"))
    log.handlers[:] = [handler]
    log.propagate = False
    LineHandler.screen = os.get_terminal_size(sys.stderr.fileno()) if sys.stderr.isatty() else None
    LineHandler.rows, LineHandler.failures = 0, []
    usual = SUMMARY if LineHandler.screen else logging.INFO
    log.setLevel(logging.DEBUG if verbose else logging.WARNING if quiet else usual)


def sum_up(level: int, text: str) -> None:
    """The last line of all; on a terminal the last two, after the failures that scrolled away, once more."""
    lines, screen, failures = [text], LineHandler.screen, LineHandler.failures
    if screen:
        lines = re.split(r"; (?=studies: |series: )", text)
        if failures and LineHandler.rows - failures[0][0] + 4 > (screen.lines or 24):
            more = [f"… and {len(failures) - REPEATED} more"] if len(failures) > REPEATED else []
            lines = ["what failed:", *(line for _, line in failures[:REPEATED]), *more, *lines]
    for line in lines:
        log.log(level, "%s", line)


@contextlib.contextmanager
def progress_bar(total: int, unit: str = "study") -> Iterator[Callable[..., Any]]:
    """A bar on stderr if that is a terminal, with lines written around it; what is yielded moves it on, by one or n."""
    try:
        if not total or not sys.stderr.isatty() or log.level == logging.WARNING:
            raise ImportError
        from tqdm import tqdm    # comes with pyorthanc's extra `progress`
    except ImportError:
        yield lambda n=1: None
        return
    with tqdm(total=total, unit=unit, file=sys.stderr, dynamic_ncols=True, leave=False) as bar:
        LineHandler.bar = bar
        try:
            yield bar.update
        finally:
            LineHandler.bar = None


def print_accession(accession: str) -> bool:
    """One accession on stdout, once it is stored; False where that has to be a failure. A reader may go away."""
    try:
        write_line(sys.stdout, accession)
    except OSError as error:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())    # what else is printed goes there
        if not isinstance(error, BrokenPipeError):
            log.error("standard output cannot be written: %s; what else is stored is not printed", reason_of(error))
            return False
    return True


def open_missing_streams() -> None:
    """Give closed standard streams somewhere to go, and let no character that an encoding lacks stop the run."""
    if sys.stdin is None:
        os.open(os.devnull, os.O_RDONLY)    # takes number 0, so that no other file gets it
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, "w"))
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


# ------------------------------------------------------------------------------------------------------------------
# Signals and threads: work is done aside, so that the main thread hears an interrupt
# ------------------------------------------------------------------------------------------------------------------

@contextlib.contextmanager
def signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted, once; a second one ends the process at once."""
    numbers = (signal.SIGINT, signal.SIGTERM)

    def raise_interrupted(signum: int, _frame) -> None:
        """Once: the next signal meets the system's own handler."""
        for number in numbers:
            signal.signal(number, signal.SIG_DFL)
        raise Interrupted(signum)

    before = {number: signal.signal(number, raise_interrupted) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def in_order(work: Callable, items: Iterable, jobs: int,
             size: Callable[[Any], int] = lambda item: 1) -> Generator[list[tuple[Any, Any]], None, None]:
    """(item, result) in the order of the items, as many at once as are ready; `jobs` at a time. An error is raised.

    Those done and not yet given out are at most AHEAD by their size: memory is bounded, and one slow item holds up no
    others. After an error no further item is begun, and nobody waits for those under way.
    """
    from concurrent.futures import FIRST_COMPLETED, ThreadPoolExecutor, wait
    ended = threading.Event()

    def attempt(item: Any) -> Any:
        """In a thread. Items after one that ended the run are not begun."""
        try:
            return None if ended.is_set() else work(item)
        except BaseException:
            ended.set()
            raise

    pool = ThreadPoolExecutor(jobs)
    window: deque = deque()
    todo = iter(items)
    try:
        while True:
            while len(pending := [future for _, future in window if not future.done()]) < 2 * jobs \
                    and sum(size(item) for item, _ in window) < AHEAD and not ended.is_set() \
                    and (more := list(itertools.islice(todo, 1))):
                window.append((more[0], pool.submit(attempt, more[0])))
            if not window:
                return
            if not window[0][1].done():
                wait(pending, SIGNAL_CHECK_SECONDS, FIRST_COMPLETED)    # a signal just before it is heard after it
            ready: list[tuple[Any, Any]] = []
            while window and window[0][1].done() and not (ready and window[0][1].exception()):
                item, future = window.popleft()
                result = future.result()
                if result is not None or not ended.is_set():    # else a later one ended the run: its error comes next
                    ready.append((item, result))
            if ready:
                yield ready
    finally:
        ended.set()
        pool.shutdown(wait=False, cancel_futures=True)


def aside(work: Callable, *arguments: Any) -> Any:
    """The result of work(*arguments), or its exception, done in a thread of its own."""
    (((_, result),),) = in_order(lambda _: work(*arguments), [None], 1)
    return result


# ------------------------------------------------------------------------------------------------------------------
# The run: from tokens to accessions, fetch, store, report
# ------------------------------------------------------------------------------------------------------------------

STORED, ALREADY_STORED, FAILURES = "stored", "already stored", "failed"    # these five count studies
NOT_REACHED, WITHOUT_MR = "not reached", "without MR series"
SERIES_STORED, DOUBTFUL_DATES, UNPRINTED = "series stored", "dates that may be incomplete", "accessions not printed"


class Tally(Counter):
    """What the summary counts, by the constants above and, of series, by REASONS and ORIGINS."""

    meant = ""    # the dates of tokens like 7days

    @property
    def exit_status(self) -> int:
        """1 where something named is not in the database or not printed, or a date may be incomplete, else 0."""
        return 1 if self[FAILURES] or self[DOUBTFUL_DATES] or self[UNPRINTED] else 0

    def __str__(self) -> str:
        studies = [f"{self[one]} {one}" for one in (STORED, ALREADY_STORED, FAILURES)]
        studies += [f"{self[one]} {one}" for one in (NOT_REACHED, WITHOUT_MR) if self[one]]
        reasons = ", ".join(f"{reason}: {self[reason]}" for reason in REASONS if self[reason])
        text = f"studies: {', '.join(studies)}; series: {self[SERIES_STORED]} stored, "
        text += f"{sum(self[one] for one in REASONS)} skipped" + (f" ({reasons})" if reasons else "")
        text += "".join(f", {self[one]} stored {one}" for one in ORIGINS if self[one])
        text += f"; {DOUBTFUL_DATES}: {self[DOUBTFUL_DATES]}" if self[DOUBTFUL_DATES] else ""
        return text + self.meant


class Run(NamedTuple):
    """All that one run needs, the database excepted."""

    orthanc: Orthanc
    options: Options
    jobs: int
    prints: bool                            # whether accessions go to stdout
    acquisitions: dict[str, Acquisition]    # by accession
    tally: Tally

    def acquisition(self, accession: str, conn: Database | None) -> Acquisition:
        """The one record of an accession, made when it is first met."""
        if accession not in self.acquisitions:
            stored = stored_date(conn, accession) if conn and not self.options.force else None
            self.acquisitions[accession] = Acquisition(accession, stored)
        return self.acquisitions[accession]

    def failure(self, accession: str, text: object) -> None:
        """Count a failure and say it."""
        self.tally[FAILURES] += 1
        log.error("%s: %s", accession, text)


def plan(run: Run, tokens: list[str | Dates], conn: Database | None) -> list[Acquisition]:
    """Ask what the tokens mean; the accessions to fetch, by study date, then accession."""
    for token in tokens:
        if isinstance(token, str):
            run.acquisition(token, conn).named = True
    dates = [token for token in tokens if isinstance(token, Dates)]
    with progress_bar(sum(1 for token in dates for _ in months_of(token)), "month") as advance:
        for token in dates:
            process_date_arg(token, conn, run, advance)
    todo = [one for one in run.acquisitions.values()    # also what is stored with a date that no token found it on
            if one.stored is None or one.dated and one.stored not in one.dates]
    run.tally[ALREADY_STORED] += len(run.acquisitions) - len(todo)
    failed = look_up(run, [acquisition for acquisition in todo if not (acquisition.dated and acquisition.by_name)])
    return sorted(set(todo) - failed, key=lambda acquisition: acquisition.order)


def process_date_arg(token: Dates, conn: Database | None, run: Run, advance: Callable[[], Any]) -> None:
    """Find the accessions of a date token, month by month, and call `advance` after each; say what was found."""
    empty: list[datetime.date] = []     # the ends of months without studies, not yet said
    for first, last in months_of(token):
        studies = list_dates(run, first, last)
        if studies == []:
            empty += [first, last]
        else:
            say_empty(empty)
            empty.clear()
        if studies:
            log.info("%s: studies found: %d", digits_of(first, last), len(studies))
        for study in studies or ():
            acquisition = run.acquisition(study.accession, conn)
            acquisition.dated = True
            acquisition.take([study])
        advance()
    say_empty(empty, run.options.prefix if empty[:1] == [token.first] else None)
    if token.token.endswith("days"):
        run.tally.meant += f"; {token.token}: {digits_of(token.first, token.last)}"


def say_empty(days: list[datetime.date], prefix: str | None = None) -> None:
    """That no studies were found from the first to the last of these days; prefix: and that they are a whole token."""
    if not days:
        return
    counted = f"accessions that begin with {beginning(prefix)}" if prefix else "studies with an accession number"
    hint = "" if prefix is None else f" (only {counted} count; for others try --prefix, another date or --url)"
    length = 7 if days[0].day == 1 and days[-1] == month_end(days[-1]) else 10
    text = f"{days[0].isoformat()[:length]} to {days[-1].isoformat()[:length]}: no studies" if len(days) > 2 else \
        f"{digits_of(*days)}: studies found: 0"
    log.log(SUMMARY if hint else logging.INFO, "%s%s", text, hint)


def list_dates(run: Run, first: datetime.date, last: datetime.date) -> list[Study] | None:
    """The studies from first to last; where they are not known to be none, None. What is wrong is said."""
    try:
        studies, doubtful = aside(studies_between, run.orthanc, first, last, run.options.prefix)
    except StudyError as error:
        run.tally[DOUBTFUL_DATES] += 1
        log.error("%s: cannot be listed: %s", digits_of(first, last), error)
        return None
    for day in doubtful:
        run.tally[DOUBTFUL_DATES] += 1
        log.error("%s: may be incomplete, %s cuts its answers; name the missing accessions themselves, or ask "
                  "its administrator to lift the limit LimitFindResults", digits_of(day), run.orthanc.http.url)
    return studies if studies or not doubtful else None


def look_up(run: Run, acquisitions: list[Acquisition]) -> set[Acquisition]:
    """Ask for all studies of accessions that were named, or whose series no find tells by name; those that failed."""
    failed: set[Acquisition] = set()
    if acquisitions:
        aside(lambda: run.orthanc.extended)    # the first contact, before several threads make it
    size = 1 if run.orthanc.learnt.capped else LOOKED_UP_TOGETHER
    chunks = [acquisitions[start:start + size] for start in range(0, len(acquisitions), size)]

    def ask_for(chunk: list[Acquisition]) -> dict[str, Any]:
        """In a thread: what the server has of each; what is not found by its name is asked for with wildcards."""
        answers = ask_together(run.orthanc.studies_of, [one.accession for one in chunk if one.plain])
        found = {accession: (studies, []) if isinstance(studies, list) else studies
                 for accession, studies in answers.items() if studies}
        for accession in [one.accession for one in chunk if one.accession not in found]:
            found |= ask_together(lambda names: {names[0]: run.orthanc.studies_like(names[0])}, [accession])
        return found

    with (progress_bar(len(acquisitions)) as advance,
          contextlib.closing(in_order(ask_for, chunks, run.jobs)) as ready):
        for chunk, answers in itertools.chain.from_iterable(ready):
            for acquisition in chunk:
                if error := take_found(acquisition, answers[acquisition.accession], run.orthanc.http.url):
                    run.failure(acquisition.accession, error)
                    failed.add(acquisition)
                advance()
    return failed


def take_found(acquisition: Acquisition, found: Any, url: str) -> StudyError | None:
    """Take (studies, near ones) of an accession; the error where they cannot be had, or where there is no study."""
    if isinstance(found, StudyError):
        return found
    studies, near = found
    acquisition.all_known = True
    acquisition.take(studies)    # beside what a date found, which is not always among them
    like = f" (the server has {', '.join(sorted(set(near))[:3])})" if near else ""
    return None if studies or acquisition.dated else StudyError(f"there is no such accession on {url}{like}")


def fetch_groups(run: Run, todo: list[Acquisition]) -> Iterator[list[Acquisition]]:
    """Groups of accessions, one a thread: what can be asked for by name shares a find, if all threads have work."""
    share = min(TOGETHER, math.ceil(len(todo) / run.jobs))
    learnt = run.orthanc.learnt
    group: list[Acquisition] = []
    for acquisition in todo:
        most = min(learnt.series_together, learnt.complete_below - 1) if learnt.capped else learnt.series_together
        series = sum(one.series_count for one in [*group, acquisition])
        if group and (len(group) == share or series > most or not (acquisition.by_name and group[0].by_name)):
            yield group
            group = []
        group.append(acquisition)
    if group:
        yield group


def fetch_and_store(run: Run, todo: list[Acquisition], conn: Database) -> None:
    """Fetch side by side, store and print in order."""
    fetch = functools.partial(fetch_together, run.orthanc, options=run.options)
    run.tally[NOT_REACHED] = len(todo)
    if run.tally[ALREADY_STORED] and (run.options.fallback or log.level == logging.DEBUG):
        log.log(SUMMARY, "accessions already stored, not read again (use --force): %d", run.tally[ALREADY_STORED])
    with (progress_bar(len(todo)) as advance,
          contextlib.closing(in_order(fetch, fetch_groups(run, todo), run.jobs, len)) as batches):
        for batch in batches:
            ready = [pair for group, results in batch for pair in zip(group, results, strict=True)]
            store_ready(run, ready, conn)
            advance(len(ready))


def store_ready(run: Run, ready: list[tuple[Acquisition, Fetched | StudyError]], conn: Database) -> None:
    """Store what is ready in one transaction, then say what became of each and print it."""
    fetched = [(acquisition.accession, one.study, one.series)
               for acquisition, one in ready if not isinstance(one, StudyError)]
    outcomes = iter(store_studies(conn, fetched, run.options.force) if fetched else ())
    for acquisition, one in ready:
        stored = finish(run, acquisition, one, one if isinstance(one, StudyError) else next(outcomes))
        run.tally[NOT_REACHED] -= 1
        acquisition.studies.clear()
        if stored and acquisition.dated and run.prints:
            run.tally[UNPRINTED] += not print_accession(acquisition.accession)


def finish(run: Run, acquisition: Acquisition, fetched: Fetched | StudyError, outcome: Outcome | StudyError) -> bool:
    """Say what became of one accession; whether it was stored now."""
    accession, tally = acquisition.accession, run.tally
    if isinstance(outcome, NoMrSeries) and not acquisition.named:
        tally[WITHOUT_MR] += 1
        log.info("%s: %s", accession, outcome)
        return False
    if isinstance(outcome, StudyError) or isinstance(fetched, StudyError):
        run.failure(accession, outcome)
        return False
    if acquisition.stored is not None and not outcome.changed:    # it was fetched to be sure
        tally[ALREADY_STORED] += 1
        return False
    for level, note in fetched.notes:
        log.log(level, "%s: %s", accession, note)
    if outcome.stayed:
        log.warning("%s: %d stored series were not on the server this time and stay as they are; --force takes them "
                    "out", accession, outcome.stayed)
    tally.update(fetched.counts, **{STORED: 1, SERIES_STORED: len(fetched.series)})
    skipped = sum(fetched.counts[reason] for reason in REASONS)
    log.info("%s: %d series stored, %d skipped", accession, len(fetched.series), skipped)
    return True


# ------------------------------------------------------------------------------------------------------------------
# The command line: options, and everything of the user's that is checked before anything is contacted
# ------------------------------------------------------------------------------------------------------------------

class Parser(argparse.ArgumentParser):
    """Usage errors in one line."""

    def error(self, message: str):
        """End with exit status 2 and this message, without URLs that hold a user or password, up to the last '@'."""
        message = re.sub(r"\S*://.*@\S*|[^\s/:'=]+:\S*@", "…", message, flags=re.DOTALL)
        self.exit(2, f"{self.prog}: error: {printable(message)} (see {self.prog} --help)\n")


def bounded(parse: Callable[[str], Any], most: int, what: str) -> Callable[[str], Any]:
    """For argparse: what reads a number above 0 and up to `most`."""
    def read(text: str) -> Any:
        """The number. Raises ArgumentTypeError with the text and what it should be."""
        value = parse(text)
        if value is None or not 0 < value <= most:
            raise argparse.ArgumentTypeError(f"{quoted(text)} is not a number {what}")
        return value
    return read


def prefix_argument(text: str) -> str:
    """What accessions begin with, for argparse; empty: anything."""
    if text and (not PLAIN.fullmatch(text) or text[0] == " "):
        raise argparse.ArgumentTypeError(f"{quoted(text)} (or that of STUDY_INFO_PREFIX) cannot begin an accession "
                                         "number: only letters, digits, blanks inside and . _ - / can")
    return text


def build_parser() -> argparse.ArgumentParser:
    """All options; each default that the environment can change is read here."""
    url, db = os.environ.get("ORTHANC_URL") or DEFAULT_URL, os.environ.get("STUDY_INFO_DB") or DEFAULT_DB
    prefix = os.environ.get("STUDY_INFO_PREFIX", PREFIX)    # empty is a value too
    parser = Parser(
        prog="store_study_info.py", usage="%(prog)s [options] TOKEN [TOKEN ...]", add_help=False, allow_abbrev=False,
        description="Keep SAR and scan times of the MRI studies of an Orthanc server in a\n"
                    "local SQLite file. Studies that are stored already are skipped.",
        epilog=re.sub(r"E(1234\d)(  +)?", lambda match: (prefix + match[1]).ljust(len(match[0])),
                      "tokens:" + (__doc__ or "").partition("\ntokens:")[2]),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, max_help_position=24, width=79))

    what = parser.add_argument_group("what to fetch")
    what.add_argument("tokens", metavar="TOKEN", nargs="+",
                      help="accession, day, month, range, yesterday, today, Ndays or @FILE")
    what.add_argument("-f", "--force", action="store_true", help="fetch again what is already stored")
    what.add_argument("--prefix", metavar="TEXT", type=prefix_argument, default=prefix,
                      help="accession numbers begin with TEXT, '' for any (default %(default)r)")
    what.add_argument("--fallback", action="store_true",
                      help="read SAR and duration elsewhere in the file where the Siemens tags are missing or "
                           "meaningless; with --force for what is stored already")

    where = parser.add_argument_group("from where, and to where")
    where.add_argument("--url", default=url, help=f"Orthanc's address (default {DEFAULT_URL})")
    where.add_argument("--netrc", metavar="FILE", default=os.environ.get("NETRC"),
                       help="credentials (default ./netrc, else ~/.netrc)")
    where.add_argument("--db", metavar="PATH", default=db, help=f"the database (default {DEFAULT_DB})")
    where.add_argument("--csv", metavar="FILE", help="also write the accessions of this run as CSV, one row a series")

    how = parser.add_argument_group("how")
    how.add_argument("--jobs", metavar="N", type=bounded(integer, 999, "from 1 to 999"), default=DEFAULT_JOBS,
                     help=f"studies fetched at the same time (default {DEFAULT_JOBS})")
    how.add_argument("--timeout", metavar="S", type=bounded(number, 86400, "of seconds above 0 and up to a day"),
                     default=DEFAULT_TIMEOUT,
                     help=f"seconds to wait for one answer (default {DEFAULT_TIMEOUT:.0f})")
    loud = how.add_mutually_exclusive_group()
    loud.add_argument("-v", "--verbose", action="store_true", help="say why each series is skipped")
    loud.add_argument("-q", "--quiet", action="store_true",
                      help="only warnings and errors; nothing at all when all is well")

    about = parser.add_argument_group("about")
    about.add_argument("--version", action="version", version=f"%(prog)s {__version__}")
    about.add_argument("-h", "--help", action="help", help="show this text")
    return parser


def check_url(text: str) -> tuple[str, str]:
    """(URL, host) of an http or https URL without credentials. Raises UsageError, which never echoes a password."""
    import ipaddress
    from urllib.parse import urlsplit
    name = "the address of --url or ORTHANC_URL"
    if re.fullmatch(r"([\w.-]+|\[[\da-fA-F:]+\])(:\d{1,5})?(/[\w./-]*)?", text):
        raise UsageError(f"{name}: http:// is missing: did you mean http://{text}?")
    try:
        url = urlsplit(text)
        port_is_right, host = url.port is None or url.port > 0, url.hostname or ""
        host.encode("idna")    # what cannot be the name of a host is a UnicodeError, which is a ValueError
        if ":" in host or re.fullmatch(r"\d+(\.\d+){3}", host):
            ipaddress.ip_address(host)
    except ValueError:
        raise UsageError(f"{name} is not a URL; it must look like http://host:8042") from None
    if "@" in text or "%40" in text:    # a password can hold a slash
        raise UsageError(f"{name} holds a user or password: take it out, and put it into a netrc file (see --netrc)")
    if url.scheme not in ("http", "https") or not url.hostname or not port_is_right or url.query or url.fragment \
            or re.search(r"[\s\x00-\x20\x7f\\]|(?i://xn--)([.:/]|$)", text):
        raise UsageError(f"{name} is not the address of an Orthanc server; it must look like http://host:8042 or "
                         "https://host/orthanc")
    return url.geturl(), url.hostname


def absolute(path: str, option: str) -> str:
    """The path from the root, ~ expanded. Raises UsageError where it is no path, or the folder is not known."""
    if not path or "://" in path:    # with a password, maybe
        raise UsageError(f"{option} takes the path of a file, not a URL" if path else f"{option} is empty; name a file")
    whole = os.path.expanduser(path)
    if path[0] == "~" and (not os.path.isabs(whole) or os.getenv("HOME") == ""):
        raise UsageError(f"{option} {quoted(path)}: the home folder that ~ stands for is not known; write it out")
    try:
        return os.path.abspath(whole)
    except OSError:
        raise UsageError(f"{option} {quoted(path)}: the working directory was deleted; change to another folder, or "
                         "give the path from the root") from None


def netrc_files(named: str | None) -> list[str]:
    """The netrc files, the one that counts first; of the usual two those that are there."""
    usual = filter(os.path.exists, ("netrc", os.path.expanduser("~/.netrc")))
    return [absolute(named, "--netrc"), *usual] if named else [*usual]


def find_credentials(host: str, files: list[str]) -> tuple[tuple[str, str] | None, str]:
    """The entry of a host in the first netrc file, else its default; and for messages, where they were looked up."""
    if not files:
        home = "" if os.access(os.path.expanduser("~"), os.X_OK) else " (your home folder cannot be read)"
        return None, f"no netrc file: there is no ./netrc and no ~/.netrc{home}; make one with an entry for host {host}"
    import netrc
    path = files[0]

    class Netrc(netrc.netrc):
        def _parse(self, file, fp, *more):
            fp.reconfigure(encoding="utf-8-sig" if fp.encoding == "utf-8" else None)    # a BOM is not a word
            super()._parse(file, fp, *more)    # type: ignore[misc]

    try:
        entries = {name.lower(): entry for name, entry in Netrc(path).hosts.items()}
        if {host, "default"} & entries.keys() and os.stat(path).st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            log.warning("netrc file %s is readable by others: run chmod 600 on it", path)
    except netrc.NetrcParseError as error:    # its own text can quote a password
        raise UsageError(f"netrc file {path} is malformed near line {error.lineno}") from None
    except (OSError, ValueError) as error:
        raise UsageError(f"netrc file {path} cannot be read: {reason_of(error)}") from None
    name = host if host in entries else "default"
    if name not in entries:
        return None, f"netrc file {path}, which has no entry for host {host} and no default"
    login, _, password = entries[name]
    which = f"entry of host {host}" if name == host else f"default entry, for host {host}"
    return (login or "", password or ""), f"netrc file {path}, {which}"


def check_csv(path: str | None, database: str, used: Iterable[str | int]) -> str | None:
    """The file that --csv means, which may and can be replaced: none of those used, a number is an open file's."""
    if path is None:
        return None
    if path == "-":
        raise UsageError("--csv needs the name of a file: standard output is for accessions only")
    target = os.path.realpath(absolute(path, "--csv"))
    if os.path.exists(target) and not os.path.isfile(target):
        raise UsageError(f"--csv {quoted(path)} is not a regular file")
    beside = [target.removesuffix(side) for side in ("", "-journal", "-wal", "-shm")]    # files of a database
    there = filter(os.path.exists, used if os.path.exists(target) else ())
    if (os.path.realpath(database) in beside or any(map(is_database, beside))
            or any(os.path.samefile(target, other) for other in there)):
        raise UsageError(f"--csv {quoted(path)} is a database, or a file that this run itself uses; name another")
    if not os.path.isdir(os.path.dirname(target)) or not os.access(os.path.dirname(target), os.W_OK):
        raise UsageError(f"--csv {quoted(path)}: its folder does not exist or cannot be written")
    return target


def check_packages() -> None:
    """Raise RunError where Python is too old or a package is not installed; nothing is imported for it."""
    if sys.version_info < (3, 10):
        raise RunError(f"Python 3.10 or newer is needed, this is {sys.version.split()[0]}")
    import importlib.util
    missing = [name for name in ("pyorthanc", "pydicom") if importlib.util.find_spec(name) is None]
    if missing:
        raise missing_packages(*missing)


# ------------------------------------------------------------------------------------------------------------------
# main: parse, check, run, sum up
# ------------------------------------------------------------------------------------------------------------------

def check(arguments: argparse.Namespace, tally: Tally) -> tuple[Run, list[str | Dates], str, str | None]:
    """(run, tokens, database, CSV file), all that the user named checked. Raises UsageError, or RunError (packages)."""
    today = datetime.date.today()
    tokens = expand_tokens(arguments.tokens, today, prefix=arguments.prefix)
    url, host = check_url(arguments.url)
    path, netrc = absolute(arguments.db, "--db"), netrc_files(arguments.netrc)
    read = [token[1:] for token in arguments.tokens if token.startswith("@")] + [os.environ.get("SSL_CERT_FILE", "")]
    csv = check_csv(arguments.csv, path, [__file__, *netrc, *read, 0, 1, 2])
    http = Http(url, *find_credentials(host, netrc), arguments.timeout)
    check_packages()
    options = Options(arguments.force, arguments.fallback, digits_of(today), arguments.prefix)
    return Run(Orthanc(http), options, arguments.jobs, not arguments.quiet, {}, tally), tokens, path, csv


def acquire(arguments: argparse.Namespace, tally: Tally) -> None:
    """The complete run."""
    run, tokens, path, csv = check(arguments, tally)
    conn = open_database(path) if check_database_file(path) else None
    ended: StudyInfoError | None = None
    with contextlib.ExitStack() as at_end:
        at_end.callback(lambda: conn.close() if conn else None)    # if it was opened by then
        try:
            todo = plan(run, tokens, conn)
            conn = conn or open_database(path)
            fetch_and_store(run, todo, conn)
        except StudyInfoError as error:
            ended = error
        try:
            if csv and not isinstance(ended, DatabaseError):    # else the database, which just failed, would be read
                ordered = sorted(run.acquisitions.values(), key=lambda acquisition: acquisition.order)
                write_csv(csv, conn, [acquisition.accession for acquisition in ordered])
        except StudyInfoError as error:
            if ended:
                log.error("%s", error)    # does not hide what ended the run
            ended = ended or error
    if ended:
        raise ended


def end_process(status: int) -> None:
    """At once, whatever the threads wait for: everything is stored and closed by now."""
    for stream in (sys.stderr, sys.stdout):
        try:
            stream.flush()
        except (OSError, ValueError) as error:    # a reader that went away is no trouble, nor is a full stderr
            status = status or int(stream is sys.stdout and not isinstance(error, BrokenPipeError))
    os._exit(status)


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
    except StudyInfoError as error:
        log.error("%s", error)
        if tally.meant or any(tally.values()):
            sum_up(logging.WARNING, str(tally))
        return 1
    except Interrupted as interrupt:
        sum_up(logging.ERROR, f"interrupted by {interrupt.name}; {tally}")
        end_process(interrupt.exit_status)
    sum_up(logging.WARNING if tally.exit_status else SUMMARY, str(tally))
    return tally.exit_status


if __name__ == "__main__":
    try:
        end_process(main())
    except SystemExit as end:    # after --help, --version and usage errors
        end_process(end.code if isinstance(end.code, int) else 1)
