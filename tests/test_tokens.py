"""Tokens: what the user names on the command line or in a token file, and what is refused."""
import datetime
import io
import re

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import store_study_info as store

TODAY = datetime.date(2024, 4, 27)

property_test = settings(max_examples=300)


def date(text: str) -> datetime.date:
    return datetime.date(int(text[:4]), int(text[4:6]), int(text[6:]))


def digits(day: datetime.date) -> str:
    return f"{day.year:04}{day.month:02}{day.day:02}"


def span(token: str, today: datetime.date = TODAY) -> tuple[str, str]:
    """First and last day of what a token of dates means."""
    meaning = store.parse_token(token, today)
    assert isinstance(meaning, store.Dates)
    return digits(meaning.first), digits(meaning.last)


def names(tokens, stdin=None) -> list[str]:
    """The tokens that are meant, files read."""
    return [one if isinstance(one, str) else one.token
            for one in store.expand_tokens(tokens, TODAY, stdin)]


# ------------------------------------------------------------------------------------------------------------------
# One token
# ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("token", [
    "E1", "E12345", "Eabc", "EE", "E-1", "E.1", "E_1", "E/1", "E 1", "E1 2 3", "E123-45/6.7_8", "E20240427", "E2024-04",
    "Etoday", "E" + "9" * 15,
])
def test_an_accession_is_taken_as_it_is(token):
    assert store.parse_token(token, TODAY) == token


@pytest.mark.parametrize("token, first, last", [
    ("20240427", "20240427", "20240427"),
    ("19991231", "19991231", "19991231"),
    ("20240229", "20240229", "20240229"),
    ("20000229", "20000229", "20000229"),
    ("20301231", "20301231", "20301231"),           # a day to come is no error: it has no studies yet
    ("202404", "20240401", "20240430"),
    ("202401", "20240101", "20240131"),
    ("202412", "20241201", "20241231"),
    ("202402", "20240201", "20240229"),
    ("202302", "20230201", "20230228"),
    ("190002", "19000201", "19000228"),             # no leap year
    ("200002", "20000201", "20000229"),             # one
    # both ends of a range are included
    ("20240401-20240415", "20240401", "20240415"),
    ("20240415-20240415", "20240415", "20240415"),
    ("20231230-20240102", "20231230", "20240102"),
    ("20240228-20240301", "20240228", "20240301"),
    ("202401-202403", "20240101", "20240331"),
    ("202404-202404", "20240401", "20240430"),
    ("202312-202402", "20231201", "20240229"),
])
def test_days_months_and_ranges_of_them(token, first, last):
    assert span(token) == (first, last)


@pytest.mark.parametrize("token, today, first, last", [
    ("20240401-", "20240427", "20240401", "20240427"),
    ("20240427-", "20240427", "20240427", "20240427"),
    ("202404-", "20240427", "20240401", "20240427"),
    ("202401-", "20240427", "20240101", "20240427"),
    ("202404-", "20240401", "20240401", "20240401"),
    ("20231231-", "20240101", "20231231", "20240101"),
    ("202402-", "20240229", "20240201", "20240229"),
])
def test_an_open_range_goes_until_today(token, today, first, last):
    assert span(token, date(today)) == (first, last)


@pytest.mark.parametrize("token, today, meant", [
    ("today", "20240427", "20240427"),
    ("yesterday", "20240427", "20240426"),
    ("yesterday", "20240501", "20240430"),
    ("yesterday", "20240101", "20231231"),
    ("yesterday", "20240301", "20240229"),
    ("yesterday", "20230301", "20230228"),
    ("today", "20240229", "20240229"),
])
def test_yesterday_and_today(token, today, meant):
    assert span(token, date(today)) == (meant, meant)


REFUSED = [
    # no days and months of the calendar
    "202413", "202400", "20240631", "20240230", "20230229", "19000229", "20240400", "20240432", "20241301", "20240001",
    "000000", "00000101", "99999999",
    # ranges
    "20240415-20240401", "202404-202403", "20240427-20240426", "20240401-202404", "202404-20240430",
    "20240401-20240230", "202404-202413", "202413-202404",
    "-20240401", "-202404", "-", "20240401--20240402", "20240401-20240402-", "20240401-20240402-20240403",
    "20240401 - 20240402", "20240401:20240402",
    # open ones that start after today, the 27th of April 2024
    "20240428-", "202405-", "20250101-", "99991231-", "202413-", "20240230-",
    # no accession: the first letter
    "", " ", "e123", "abc", "123", "X123", " E123", "ÉE1", "Ｅ123",
    # no accession: nothing after it, or a blank at the end (which DICOM takes for padding)
    "E", "E ", "E1 ", "E1  ",
    # no accession: what Orthanc reads as a wildcard or a list
    "E*", "E?", "E1*", "E1?", "*E1", "E1\\E2", "E\\", "*", "?", "E*1", "E 1*",
    # no accession: control characters
    "E1\n", "E1\t", "\nE1", "E1\r", "E1\0", "E1\x1b[2J", "E1\x7f", "E1\x85", "E1\nE2", "E1\u2028", "E1\u200b",
    # no accession: other characters
    "E1,E2", "E1;", "E1:2", "E(1)", "E1#", "E1@", "E%31", "E1'", 'E1"', "E1=2", "E1+2", "E1|2", "E1\xa02", "E1\udcff",
    # no dates
    "2024", "20240", "2024042", "202404271", "2024-04-27", "2024-04", "27.04.2024", "2024042a", "٢٠٢٤٠٤",
    "２０２４０４２７", "20240427\n", "202404 ", "+202404", "2024_04", "tomorrow", "yesterday ", "todayE1",
]


@pytest.mark.parametrize("token", REFUSED, ids=ascii)
def test_a_wrong_token_is_a_usage_error(token):
    with pytest.raises(store.UsageError):
        store.parse_token(token, TODAY)


LIKELIEST = [
    # the accession number: its beginning, its characters
    ("e123", "E", "accession numbers begin with a capital E: E123?"),
    ("12345", "E", "accession numbers begin with a capital E: E12345?"),
    ("mr-5", "MR-", "accession numbers begin with 'MR-': MR-5?"),
    ("12345", "MR-", "accession numbers begin with 'MR-': MR-12345?"),
    ("E123", "7", "accession numbers begin with '7'; days are written 20240427"),
    ("abc", "E", "accession numbers begin with a capital E; days are written 20240427"),
    ("E1 ", "E", "write E1"),
    ("E", "E", "goes on with letters, digits, blanks inside or . _ - /"),
    ("E1,E2", "E", "goes on with letters, digits, blanks inside or . _ - /"),
    ("E(1)", "", "goes on with letters, digits, blanks inside or . _ - /"),
    ("E*", "E", "wildcards are not allowed"), ("*", "", "wildcards are not allowed"),
    ("E1?", "E", "wildcards are not allowed"), ("E1\\E2", "E", "wildcards are not allowed"),
    # days, months and ranges in other spellings
    ("2024-04-27", "E", "write 20240427"), ("2024/4/7", "E", "write 20240407"), ("2024.04.27", "MR-", "write 20240427"),
    ("2024-04", "E", "write 202404"), ("2024", "E", "write 202401-202412"),
    ("April", "E", "write 202404"), ("apr", "E", "write 202404"), ("May", "E", "write 202305"),
    ("december", "E", "write 202312"), ("April 2019", "E", "write 201904"),
    ("20240401 - 20240415", "E", "write 20240401-20240415"), ("20240401:20240415", "E", "write 20240401-20240415"),
    ("Today", "E", "write today"), ("YESTERDAY", "E", "write yesterday"), ("202404 ", "E", "write 202404"),
    # what the calendar does not have, whatever the prefix
    *[("20240431", prefix, "April has 30 days") for prefix in ("E", "", "2", "MR-")],
    ("2024-04-31", "E", "April has 30 days"), ("20230229", "E", "February 2023 has 28 days"),
    ("202413", "E", "there is no month 13"), ("20240001", "", "there is no month 0"),
    ("00000101", "E", "year 0"), ("20240201-20240230", "E", "February 2024 has 29 days"),
    ("20240415-20240401", "E", "it ends before it starts"), ("202404-202403", "E", "it ends before it starts"),
    ("20240428-", "E", "it ends before it starts: today is 20240427"),
    # days before today
    *[(token, prefix, "days before today are written 7days, with a number from 1 to 9999")
      for token in ("0days", "-3days", "99999days", "10000days", "7Days", "07days", "7day", "7 days",
                    "9" * 5000 + "days")
      for prefix in ("E", "", "7", "0")],
]


@pytest.mark.parametrize("token, prefix, told", LIKELIEST)
def test_the_error_is_a_short_line_with_the_token_and_its_likeliest_meaning(token, prefix, told):
    with pytest.raises(store.UsageError) as error:
        store.parse_token(token, TODAY, prefix)
    shown, _, wrong = str(error.value).partition(": ")
    assert shown in (token, f"'{token}'", f"'{token[:60]}' …", f"{token[:60]}' …") and told in wrong
    assert len(str(error.value)) < 160


@pytest.mark.parametrize("prefix", ["E", "", "h", "jo"])
@pytest.mark.parametrize("token", [
    "http://jo:hunter2@h", "http://jo:hunter2/x@h", "https://hunter2", "jo:hunter2@h", "ftp://h/hunter2", "E@hunter2",
    "//jo:hunter2@h:8042", "http://jo:hunter2*@h"])
def test_a_token_that_could_hold_a_password_is_not_shown(tmp_path, prefix, token):
    (tmp_path / "list").write_text(f"{token}\n")
    for named in (token, f"@{token}", f"@{tmp_path / 'list'}"):
        with pytest.raises(store.UsageError) as error:
            store.expand_tokens([named], TODAY, prefix=prefix)
        assert "hunter2" not in str(error.value)


def test_a_message_about_a_month_names_the_most_recent_such_month():
    for month in range(1, 13):
        with pytest.raises(store.UsageError, match=f"write {2024 if month <= 4 else 2023}{month:02}$"):
            store.parse_token(datetime.date(2024, month, 1).strftime("%B"), TODAY)


@pytest.mark.parametrize("token, today, first, last", [
    ("7days", "20240427", "20240420", "20240426"), ("1days", "20240427", "20240426", "20240426"),
    ("1days", "20240101", "20231231", "20231231"), ("31days", "20240401", "20240301", "20240331"),
    ("9999days", "20240427", "19961211", "20240426"), ("9days", "00010110", "00010101", "00010109"),
])
def test_n_days_are_those_before_today(token, today, first, last):
    assert span(token, date(today)) == (first, last)


@pytest.mark.parametrize("token, today", [("10days", "00010110"), ("9999days", "00200101"), ("yesterday", "00010101")])
def test_days_before_the_calendar_begins_are_a_usage_error(token, today):
    with pytest.raises(store.UsageError, match=f"{token}: it starts before the calendar does"):
        store.parse_token(token, date(today))


@pytest.mark.parametrize("prefix", ["2", "", "20", "20240427", "t", "7", "E"])
@pytest.mark.parametrize("token", ["20240427", "202404", "20240401-20240415", "202401-", "today", "yesterday", "7days"])
def test_what_has_the_form_of_a_date_is_a_date_whatever_the_prefix(token, prefix):
    assert isinstance(store.parse_token(token, TODAY, prefix), store.Dates)


@pytest.mark.parametrize("prefix, token", [
    ("", "abc"), ("", "123"), ("", "E"), ("", "2024"), ("", "2024-04-27"), ("7", "712"), ("7", "7 1"), ("MR-", "MR-1"),
    ("MR-", "MR-MR-"), ("2", "2024"), ("a b", "a bc"), ("e", "e123")])
def test_an_accession_is_the_prefix_and_more(prefix, token):
    assert store.parse_token(token, TODAY, prefix) == token


@pytest.mark.parametrize("prefix, token", [
    ("", ""), ("", " "), ("", " a"), ("", "a "), ("", "a*"), ("", "a\\b"), ("", "a\n"), ("", "\xe9"), ("7", "7"),
    ("7", "E1"), ("MR-", "MR-"), ("MR-", "mr-1"), ("MR-", "MR1"), ("E", "7E1"), ("a b", "ab")])
def test_without_the_prefix_or_with_another_character_it_is_refused(prefix, token):
    with pytest.raises(store.UsageError):
        store.parse_token(token, TODAY, prefix)


def test_the_error_says_which_part_of_a_range_is_wrong():
    with pytest.raises(store.UsageError, match="20240230"):
        store.parse_token("20240201-20240230", TODAY)


@pytest.mark.parametrize("token", [
    "E1\x1b[2J", "E1\nE2: stored", "E" + "\x00" * 5000, "\x9b" * 3, "E1\u202e",
], ids=["escape", "line", "many", "C1", "right to left"])
def test_the_error_shows_a_token_without_its_control_characters(token):
    with pytest.raises(store.UsageError) as error:
        store.parse_token(token, TODAY)
    assert str(error.value).isprintable()
    assert len(str(error.value)) < 1000


# ------------------------------------------------------------------------------------------------------------------
# What holds for any text
# ------------------------------------------------------------------------------------------------------------------

near_tokens = st.one_of(
    st.text(max_size=30),
    st.text(alphabet="E019-/._ *?\\\n\0e", max_size=12).map(lambda rest: "E" + rest),
    st.text(alphabet="0123456789-", max_size=18),
    st.from_regex(r"E[\w./ -]{0,16}[*?\\\x00-\x1f]?[\w./ -]{0,4}", fullmatch=True),
    st.from_regex(r"[0-9]{6}([0-9]{2})?(-([0-9]{6}([0-9]{2})?)?)?", fullmatch=True))


def specified_accession(text: str) -> bool:
    """The rule of the accession token, said once more: E, then letters, digits, . _ - / or a blank inside."""
    return len(text) >= 2 and text[0] == "E" and text[-1] != " " and all(
        char.isascii() and char.isalnum() or char in "._-/ " for char in text[1:])


@property_test
@given(near_tokens)
@example("E1\n")
@example("E\u0661")
def test_any_text_means_something_or_is_a_usage_error(text):
    try:
        meaning = store.parse_token(text, TODAY)
    except store.UsageError:
        return
    if isinstance(meaning, str):
        assert meaning == text
        assert specified_accession(text)
    else:
        assert meaning.first <= meaning.last
        assert re.fullmatch(r"\d{6}(\d\d)?(-(\d{6}(\d\d)?)?)?|today|yesterday|[1-9]\d{0,3}days", text, re.ASCII)


@property_test
@given(st.text(alphabet="E1a ./", max_size=6),
       st.sampled_from("*?\\\u2028\u2029" + "".join(map(chr, [*range(32), *range(127, 160)]))),
       st.text(alphabet="E1a ./", max_size=6))
def test_no_accession_with_a_wildcard_a_list_or_a_control_character_is_accepted(before, bad, after):
    with pytest.raises(store.UsageError):
        store.parse_token("E" + before + bad + after, TODAY)


@property_test
@given(st.text(alphabet="ABEZabez0189._-/ ", min_size=1, max_size=16).filter(lambda rest: not rest.endswith(" ")))
def test_every_accession_of_the_rule_is_accepted(rest):
    token = "E" + rest
    assert specified_accession(token)
    assert store.parse_token(token, TODAY) == token


@property_test
@given(st.dates(), st.dates())
def test_every_day_and_every_range_of_days_means_itself(one, other):
    low, high = sorted(map(digits, (one, other)))
    assert span(low) == (low, low)
    assert span(f"{low}-{high}") == (low, high)


# ------------------------------------------------------------------------------------------------------------------
# Several tokens
# ------------------------------------------------------------------------------------------------------------------

def test_tokens_keep_their_order():
    assert store.expand_tokens(["202404", "E2", "20240401", "E1"], TODAY) == [
        store.Dates("202404", date("20240401"), date("20240430")), "E2",
        store.Dates("20240401", date("20240401"), date("20240401")), "E1"]


def test_a_token_named_twice_counts_once(tmp_path):
    (tmp_path / "list").write_text("E1\n202404\nE1\nE2\n")
    assert names(["E1", "202404", "E1", "202404", *[f"@{tmp_path / 'list'}"] * 2]) == ["E1", "202404", "E2"]


@pytest.mark.parametrize("tokens", [["E1", "E*"], ["E*", "E1"], ["202404", "202413"], ["E1", "@nowhere"]])
def test_one_wrong_token_refuses_them_all(tokens):
    with pytest.raises(store.UsageError):
        store.expand_tokens(tokens, TODAY)


# ------------------------------------------------------------------------------------------------------------------
# @FILE
# ------------------------------------------------------------------------------------------------------------------

def tokens_of(path) -> list[str]:
    return names([f"@{path}"])


@pytest.mark.parametrize("content, expected", [
    (b"E1\nE2\n", ["E1", "E2"]),
    (b"E1\nE2", ["E1", "E2"]),                                      # no end of line at the end
    (b"E1\r\n20240427\r\n", ["E1", "20240427"]),                    # as Windows writes it
    (b"\xef\xbb\xbfE1\nE2\n", ["E1", "E2"]),                        # a BOM, as spreadsheet programs write it
    (b"\xef\xbb\xbf202404\r\n\r\n# end\r\n", ["202404"]),
    (b"\n\n  \nE1\n\t\n", ["E1"]),                                  # blank lines
    (b"# all of April\n202404\n  # and one\nE1\n#E2\n", ["202404", "E1"]),
    (b"E1 # the first\nE2\t#2\n", ["E1", "E2"]),
    (b"  E1\t\n E 2 \n", ["E1", "E 2"]),                            # blanks around, not those inside
    ("# Müller\nE1\n".encode(), ["E1"]),
    (b"yesterday\n20240401-20240415\n202401-\n", ["yesterday", "20240401-20240415", "202401-"]),
    (b"", []), (b"\xef\xbb\xbf", []), (b"# nothing\n", []),
])
def test_a_token_file_holds_one_token_a_line(tmp_path, content, expected):
    (tmp_path / "list").write_bytes(content)
    assert tokens_of(tmp_path / "list") == expected


def test_a_token_file_of_many_lines_is_read_whole(tmp_path):
    many = [f"E{number}" for number in range(20_000)]
    (tmp_path / "list").write_text("\n".join(many))
    assert tokens_of(tmp_path / "list") == many


@pytest.mark.parametrize("content, line, token", [
    (b"E1\nE*\nE2\n", 2, "E*"),
    (b"\xef\xbb\xbf# one\r\n\r\n202413\r\n", 3, "202413"),
    (b"e123\n", 1, "e123"),
    (b"E1\nE1 E2 *\n", 2, "E1 E2 *"),
    (b"E1\nE2,E3\n", 2, "E2,E3"),
    (b"E1\nE2#3\n", 2, "E2#3"),        # no comment: what is before it may be another's accession
])
def test_a_wrong_line_is_named_with_file_number_and_token(tmp_path, content, line, token):
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(store.UsageError) as error:
        tokens_of(tmp_path / "list")
    assert re.match(f"@{re.escape(str(tmp_path / 'list'))}, line {line}: '?{re.escape(token)}'?: ", str(error.value))


@pytest.mark.parametrize("content", [
    b"E1\0\n", b"E1\x1b[2J\n", b"E1\x0cE2\n", b"E1\x0bE2\n", b"E1\x1cE2\n", b"E1\x7f\n", "E1\x85E2\n".encode(),
    "E1\u2028E2\n".encode(),
])
def test_a_line_with_a_control_character_is_refused_not_cut(tmp_path, content):
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(store.UsageError):
        tokens_of(tmp_path / "list")


def test_a_token_file_names_no_other(tmp_path):
    (tmp_path / "inner").write_text("E1\n")
    (tmp_path / "outer").write_text(f"@{tmp_path / 'inner'}\n")
    with pytest.raises(store.UsageError) as error:
        tokens_of(tmp_path / "outer")
    assert str(tmp_path / "outer") in str(error.value) and "line 1" in str(error.value)


NO_TEXT = {"latin": b"E1\n\xff\xfe\n", "comment": b"caf\xe9\n", "utf-16": "E1\n".encode("utf-16"),
           "utf-16-le": "E1\nE2\n".encode("utf-16-le"), "image": b"\x89PNG\r\n\x1a\n\0\0"}


@pytest.mark.parametrize("content", NO_TEXT.values(), ids=NO_TEXT)
def test_a_file_that_is_no_utf8_text_of_tokens_is_refused(tmp_path, content):
    (tmp_path / "list").write_bytes(content)
    with pytest.raises(store.UsageError, match=re.escape(str(tmp_path / "list"))) as error:
        tokens_of(tmp_path / "list")
    assert str(error.value).isprintable()


@pytest.mark.parametrize("name", ["missing", "", ".", "no/such/folder/list"])
def test_a_token_file_that_cannot_be_read_is_named(tmp_path, name):
    path = tmp_path / name if name else ""
    with pytest.raises(store.UsageError, match=re.escape(f"@{path}")):
        tokens_of(path)


def test_a_file_name_with_a_nul_is_a_usage_error():
    with pytest.raises(store.UsageError):
        tokens_of("a\0b")


def test_a_dash_reads_standard_input(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"\xef\xbb\xbfE1\r\n\r\n# two\r\n202404\r\n")))
    assert tokens_of("-") == ["E1", "202404"]


def test_a_wrong_line_of_standard_input_is_named(monkeypatch):
    monkeypatch.setattr("sys.stdin", io.TextIOWrapper(io.BytesIO(b"E1\nE?\n")))
    with pytest.raises(store.UsageError, match=r"@-.*line 2.*'E\?'"):
        tokens_of("-")


def test_a_closed_standard_input_is_a_usage_error(monkeypatch):
    monkeypatch.setattr("sys.stdin", None)
    with pytest.raises(store.UsageError, match="@- cannot be read: there is no standard input"):
        tokens_of("-")


@property_test
@given(st.binary(max_size=60))
def test_any_bytes_as_a_token_file_mean_something_or_are_a_usage_error(data):
    try:
        meant = names(["@-"], io.BytesIO(data))
    except store.UsageError as error:
        assert str(error).isprintable()
        return
    assert all(specified_accession(name) for name in meant if name.startswith("E"))


# ------------------------------------------------------------------------------------------------------------------
# Spans cut into months and days
# ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("first, last, months", [
    ("20240401", "20240430", [("20240401", "20240430")]),
    ("20240410", "20240412", [("20240410", "20240412")]),
    ("20240427", "20240427", [("20240427", "20240427")]),
    ("20240430", "20240501", [("20240430", "20240430"), ("20240501", "20240501")]),
    ("20240115", "20240310", [("20240115", "20240131"), ("20240201", "20240229"), ("20240301", "20240310")]),
    ("20230201", "20230301", [("20230201", "20230228"), ("20230301", "20230301")]),
    ("20231215", "20240115", [("20231215", "20231231"), ("20240101", "20240115")]),
    ("20231231", "20240101", [("20231231", "20231231"), ("20240101", "20240101")]),
    ("99991130", "99991231", [("99991130", "99991130"), ("99991201", "99991231")]),     # the calendar ends here
    ("00010101", "00010201", [("00010101", "00010131"), ("00010201", "00010201")]),
])
def test_a_span_is_asked_month_by_month(first, last, months):
    cut = list(store.months_of(store.Dates("", date(first), date(last))))
    assert cut == [(date(low), date(high)) for low, high in months]


@property_test
@given(st.dates(), st.integers(0, 900))
def test_the_months_of_a_span_cover_it_once_and_without_a_gap(first, length):
    last = datetime.date.fromordinal(min(first.toordinal() + length, datetime.date.max.toordinal()))
    expected = list(range(first.toordinal(), last.toordinal() + 1))
    months = list(store.months_of(store.Dates("", first, last)))
    assert [day for low, high in months for day in range(low.toordinal(), high.toordinal() + 1)] == expected
    assert all((low.year, low.month) == (high.year, high.month) for low, high in months)
