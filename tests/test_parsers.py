"""Parsers: the text of a DICOM element in, a value or None out.

The tables are the specification's own examples and what real files hold.
"""
import math
import sqlite3
from decimal import Decimal
from fractions import Fraction

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

import store_study_info as store

property_test = settings(max_examples=500)

# As they are called here, whatever they are called there.
number, non_negative, integer = store.number, store.non_negative, store.integer

NO_TEXT: list = [None, [], [{"0018,9181": "1"}], {}, 12, 1.5, True, b"TA 12.34"]


# ------------------------------------------------------------------------------------------------------------------
# Text
# ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    ("HEAD", "HEAD"), ("HEAD ", "HEAD"), ("  HEAD  ", "HEAD"), ("401\0", "401"), ("401\0\0 ", "401"), ("\0 401", "401"),
    ("two words ", "two words"), ("*fl3d1r_t70 ", "*fl3d1r_t70"), ("<MIP Range>", "<MIP Range>"), ("0", "0"),
    ("O", "O"), ("N/A", "N/A"),
    ("Müller^Jürgen", "Müller^Jürgen"), ("山田", "山田"), ("007", "007"), ("1\\2", "1\\2"),
    ("", None), (" ", None), ("    ", None), ("\0", None), (" \0 \0", None), ("\t\n", None),
])
def test_text_is_stripped_of_padding_and_empty_is_null(text, expected):
    assert store.clean(text) == expected


@pytest.mark.parametrize("value", NO_TEXT, ids=repr)
@pytest.mark.parametrize("parse", [store.clean, number, non_negative, integer, store.age, store.acquisition_time])
def test_what_is_no_text_is_null(parse, value):
    assert parse(value) is None


@pytest.mark.parametrize("text", ["a\ud800b", "\udfff", "ok\ud83d", "\ud83d\ude00"], ids=ascii)
def test_lone_surrogates_become_something_that_sqlite_can_store(text):
    cleaned = store.clean(text)
    assert cleaned and cleaned.encode("utf-8")
    assert sqlite3.connect(":memory:").execute("SELECT ?", (cleaned,)).fetchone() == (cleaned,)


# ------------------------------------------------------------------------------------------------------------------
# Numbers
# ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    ("0.1", 0.1), ("0.1 ", 0.1), (" 0.1", 0.1), ("0.06399572588428", 0.06399572588428), ("0.421666", 0.421666),
    ("1.8796037616667", 1.8796037616667),
    ("67.00 ", 67.0), ("1.0", 1.0), ("0", 0.0), ("0.0", 0.0), ("70", 70.0), ("70\0", 70.0), ("+70", 70.0),
    ("-1.5", -1.5), (".5", 0.5), ("5.", 5.0),
    ("1e-3", 0.001), ("1.5E+2", 150.0), ("333.39047241210938", 333.39047241210938),
    ("2.4275561794638634e-02", 0.024275561794638634), ("007", 7.0), ("0e-400", 0.0), ("0.00e5", 0.0),
    ("5e-324", 5e-324),
])
def test_numbers_are_read(text, expected):
    value = number(text)
    assert value == expected and type(value) is float


NO_NUMBERS = [
    "", " ", "\0", "abc", "None", "NaN", "nan", "inf", "-inf", "Infinity", "1e999", "-1e999",
    "1e-400", "-1e-400", "0.1e-330", "1,5", "1.2.3", "1 2",
    "1\\2", "0x10", "1_000", "--1", "+", "-", ".", "e5", "1e", "٣", "１.５", "²", "½", "12a", "0.1 W/kg", "1'000",
    "TA 12.34", "*** ",
]


@pytest.mark.parametrize("text", NO_NUMBERS, ids=ascii)
def test_what_is_no_finite_number_is_null(text):
    assert number(text) is None
    assert non_negative(text) is None


@pytest.mark.parametrize("text, expected", [
    ("0", 0.0), ("0.0000", 0.0), ("0.27354506973324", 0.27354506973324), ("190713.0", 190713.0),
    ("-0.1", None), ("-1", None), ("-1e-300", None),
])
def test_sar_is_a_number_of_0_or_more(text, expected):
    assert non_negative(text) == expected


@pytest.mark.parametrize("text, expected", [
    ("1", 1), ("12 ", 12), (" 12", 12), ("0", 0), ("-3", -3), ("+3", 3), ("007", 7), ("5\0", 5), ("301", 301),
    ("747197466", 747197466),
    ("9223372036854775807", 2 ** 63 - 1), ("-9223372036854775808", -2 ** 63),
    ("9223372036854775808", None), ("-9223372036854775809", None), ("99999999999999999999", None), ("9" * 500, None),
    ("", None), (" ", None), ("abc", None), ("1.5", None), ("1e3", None), ("1\\2", None), ("1 2", None), ("NaN", None),
    ("None", None), ("٣", None),
    ("１", None), ("1_0", None), ("0x1", None), ("-", None),
])
def test_a_series_number_is_an_integer_that_sqlite_holds(text, expected):
    value = integer(text)
    assert value == expected and type(value) in (int, type(None))


# ------------------------------------------------------------------------------------------------------------------
# Ages
# ------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("text, expected", [
    ("040Y", 40), ("30Y", 30), ("42", 42), ("9.0 ", 9), ("003Y", 3), ("000Y", 0), ("0Y", 0), ("99", 99), ("100Y", 100),
    ("099Y ", 99), ("040Y\0", 40),
    (" 040Y", 40), ("0", 0),
    # completed years: a month is a twelfth of one, 52 weeks are a day short of one
    ("018M", 1), ("011M", 0), ("012M", 1), ("023M", 1), ("024M", 2), ("000M", 0), ("119M", 9),
    ("006W", 0), ("052W", 0), ("053W", 1), ("104W", 1), ("105W", 2), ("157W", 3),
    ("010D", 0), ("001D", 0), ("004D", 0), ("364D", 0), ("366D", 1), ("729D", 1), ("740D", 2), ("999D", 2),
])
def test_ages_are_completed_years(text, expected):
    value = store.age(text)
    assert value == expected and type(value) is int


@pytest.mark.parametrize("text", [
    "", " ", "\0", "*** ", "***Y", "Y", "M", "abc", "Y040", "-5Y", "-1", "None", "NaN", "inf", "4 0Y", "040X", "040YY",
    "040Y\\041Y", "٠٤٠Y", "０４０Y", "1e2", "0x1", "040Y old",
], ids=ascii)
def test_what_is_no_age_is_null(text):
    assert store.age(text) is None


@property_test
@given(st.integers(0, 999), st.sampled_from("YMWD"), st.sampled_from(["", " ", "\0"]))
def test_every_age_of_the_standard_is_read(count, unit, padding):
    # PS3.5 6.2: nnnD, nnnW, nnnM or nnnY. How long a year is in days is told apart only where it does not matter.
    low, high = {"Y": (count, count), "M": (count // 12, count // 12),
                 "W": (count * 7 // 366, count * 7 // 365), "D": (count // 366, count // 365)}[unit]
    assert low <= store.age(f"{count:03}{unit}{padding}") <= high


# ------------------------------------------------------------------------------------------------------------------
# The acquisition time (0051,100a)
# ------------------------------------------------------------------------------------------------------------------

SEEN = [    # the forms of real files, each with more than one value
    # seconds.hundredths, never mm.ss
    ("TA 12.34", "12.34"), ("TA 00.04", "0.04"), ("TA 00.00", "0"), ("TA 59.99", "59.99"), ("TA 17.71", "17.71"),
    ("TA 04:46", "286"), ("TA 02:07", "127"), ("TA 00:59", "59"), ("TA 59:59", "3599"), ("TA 00:00", "0"),
    ("TA 01:00", "60"),
    ("TA 00.48*5", "2.4"), ("TA 50.40*2", "100.8"), ("TA 50.40*12 ", "604.8"), ("TA 00.01*10 ", "0.1"),
    ("TA 02:07*6", "762"), ("TA 01:30*2", "180"),
    ("TA: 12.35 ", "12.35"), ("TA: 00.61 ", "0.61"),
    ("TA: 01:11 ", "71"), ("TA: 12:34 ", "754"),
    ("TA: 00:03:11", "191"), ("TA: 00:00:59", "59"), ("TA: 01:00:00", "3600"), ("TA: 02:46:40", "10000"),
]
NOTED = [
    ("12.34", "12.34"), ("45", "45"), ("0", "0"), ("05:32", "332"), ("00:59", "59"), ("TA 45", "45"), ("TA: 45", "45"),
]
READ_BY_A_PERSON = [
    # lower case
    ("ta 12.34", "12.34"), ("Ta 02:07", "127"), ("tA: 00:03:11", "191"), ("ta: 12.35", "12.35"), ("ta 02:07*6", "762"),
    # no blank after TA, or several
    ("TA12.34", "12.34"), ("TA02:07", "127"), ("TA:12.34", "12.34"), ("TA:00:03:11", "191"), ("TA:02:07*6", "762"),
    ("TA  12.34", "12.34"), ("TA:  02:07", "127"),
    # comma decimals
    ("TA 12,34", "12.34"), ("TA: 12,35 ", "12.35"), ("12,34", "12.34"), ("TA 50,40*2", "100.8"),
    # one-digit minutes
    ("TA 2:07", "127"), ("TA: 2:07", "127"), ("TA 0:05", "5"), ("5:32", "332"), ("TA 2:07*6", "762"),
    # hours
    ("TA: 1:00:00", "3600"), ("TA: 10:00:01", "36001"), ("TA 01:02:03", "3723"),
    ("TA 23:59:59", "86399"), ("TA 24:00:00", "86400"), ("TA 01:00*1440", "86400"), ("86400", "86400"),
    ("TA 1.5", "1.5"), ("TA 100.25", "100.25"), ("TA 75:00", "4500"),
    # padding
    ("TA 12.34\0", "12.34"), ("TA: 12.35\0\0", "12.35"), ("TA 02:07\0 ", "127"), (" TA 02:07", "127"),
    ("\0TA 02:07", "127"),
    ("TA 02:07 * 6", "762"), ("TA 02:07*1", "127"), ("TA 02:07*06", "762"),
]
UNREADABLE = [
    "", " ", "\0", "Anon", "None", "NaN", "nan", "inf", "-inf", "TA", "TA:", "TA: ", "TA nan", "TA inf", "TA Anon",
    "***", "*", "*6", "TA *6",
    # signed, as GE's GEMS_FUNCTOOL_01 keeps there
    "-1", "-12.34", "TA -12.34", "TA: -00:03:11", "TA 02:-7", "+12.34", "TA +1",
    # not the time of a clock
    "TA 02:60", "TA 02:99", "TA: 00:60:00", "TA: 00:03:60", "TA: 01:75:00", "05:61",
    # not a number of concatenations
    "TA 02:07*0", "TA 02:07*", "TA 02:07**2", "TA 02:07*-6", "TA 02:07*6*2", "TA 02:07*1.5", "TA 02:07*x",
    # other numbers of digits, or of parts
    "TA 02:7", "TA 02:", "TA :07", "02::07", "TA: 00:03:1", "TA: 1:2:3:4", "TA: 00:00:03:11", "TA 02:007",
    "TA 02.07.08", "TA 12.3.4", "TA 12..34", "TA 1,2,3", "TA 02:07:08.09.10",
    # other words and numbers
    "TA 12.34 s", "TA 12.34s", "12 min", "2m07s", "TA 1e3", "1e3", "0x10", "1_000", "TA 12.34 TA 12.34",
    "TA 12.34\\TA 12.34", "12.34\\12.34", "TA 12 34", "TA 0 2:07",
    "TATA 12.34", "TA:: 12.34", "TA; 12.34", "TA=12.34", "TE 12.34", "T 12.34", "A 12.34", "TR 02:07", "XTA 12.34",
    "2.5*TA", "TA 12.34!", "[TA 12.34]", "TA 02-07", "TA 02;07",
    "TA ٠٢:٠٧", "TA １２.３４", "ＴＡ 12.34", "²", "TA 12.34\nTA 2",
    # more than a day, after multiplying
    "TA 61:00:00", "TA: 24:00:01", "TA 9999999*9999", "TA 24:00:00*2", "86401", "TA 86400.01", "TA 1441:00",
    "TA 01:00*1441", "TA 99999:59*9999",
    "9" * 400, "TA " + "9" * 400, "TA " + "9:" * 200, "TA 02:07*" + "9" * 400, "TA 1." + "1" * 400,
]


@pytest.mark.parametrize("text, seconds", SEEN + NOTED + READ_BY_A_PERSON, ids=ascii)
def test_acquisition_times_are_read(text, seconds):
    assert store.acquisition_time(text) == Decimal(seconds)


@pytest.mark.parametrize("text", UNREADABLE, ids=lambda text: ascii(text[:40]))
def test_what_is_no_acquisition_time_is_null_never_a_guess(text):
    assert store.acquisition_time(text) is None


@pytest.mark.parametrize("text, stored", [
    ("TA 02:07*6", 762), ("TA 50.40*2", 101), ("TA 12.34", 12), ("TA: 00:03:11", 191), ("TA: 12.35 ", 12),
    ("TA 00.48*5", 2),
    ("TA 00.04", 0), ("TA 00.49", 0), ("TA 00.50", 1), ("TA 00.99", 1), ("TA 01.50", 2), ("TA 02.50", 3),
    ("TA 12.49", 12), ("TA 12.51", 13),
    # in binary these are 14.499… and 4.499…: the product must be exact
    ("TA 00.29*50", 15), ("TA 00.09*50", 5), ("TA 01.15*10", 12),
])
def test_what_is_stored_is_whole_seconds_a_half_rounded_up(text, stored):
    seconds = store.acquisition_time(text)
    value = None if seconds is None else store.half_up(seconds)
    assert value == stored and type(value) is int


@pytest.mark.parametrize("seconds, expected", [
    ("0", 0), ("0.04", 0), ("0.49", 0), ("0.4999999", 0), ("0.5", 1), ("0.51", 1), ("1.5", 2), ("2.5", 3), ("3.5", 4),
    ("100.8", 101), ("12.34", 12),
    ("190.713", 191), ("333.39047241210938", 333), ("86400", 86400),
])
def test_a_half_is_rounded_up(seconds, expected):
    assert store.half_up(Decimal(seconds)) == expected


@st.composite
def acquisition_times(draw):
    """(text, seconds as an exact fraction): a value of the grammar, written as a scanner or a person may write it."""
    def digits(value: int, *widths: int) -> str:
        return str(value).zfill(draw(st.sampled_from(widths)))

    form = draw(st.sampled_from(["seconds", "mm:ss", "hh:mm:ss"]))
    if form == "seconds":
        count, decimals = draw(st.integers(0, 5999)), draw(st.text(alphabet="0123456789", max_size=2))
        text, seconds = digits(count, 1, 2), Fraction(count)
        if decimals:
            text += draw(st.sampled_from(".,")) + decimals
            seconds += Fraction(int(decimals), 10 ** len(decimals))
    else:
        hours, minutes, second = draw(st.integers(0, 23)), draw(st.integers(0, 59)), draw(st.integers(0, 59))
        if form == "mm:ss":
            hours, minutes = 0, minutes + draw(st.sampled_from([0, 0, 0, 40]))
            text = f"{digits(minutes, 1, 2)}:{second:02}"
        else:
            text = f"{digits(hours, 1, 2)}:{minutes:02}:{second:02}"
        seconds = Fraction(hours * 3600 + minutes * 60 + second)
    label = draw(st.sampled_from(["", "TA", "ta", "Ta", "tA"]))
    if label:
        label += draw(st.sampled_from(["", ":"])) + " " * draw(st.integers(0, 3))
        if draw(st.booleans()):
            times = draw(st.integers(1, 128))
            text, seconds = f"{text}*{digits(times, 1, 2)}", seconds * times
    padding = st.text(alphabet=" \0", max_size=3)
    return draw(padding) + label + text + draw(padding), seconds


@property_test
@given(acquisition_times())
def test_every_acquisition_time_of_the_grammar_means_what_was_meant(pair):
    text, seconds = pair
    value = store.acquisition_time(text)
    if seconds > 86400:
        assert value is None, "more than a day"
        return
    assert value is not None and Fraction(value) == seconds
    assert store.half_up(value) == math.floor(seconds + Fraction(1, 2))


@st.composite
def broken_times(draw):
    """A value of the grammar with one character put in."""
    text, _ = draw(acquisition_times())
    place = draw(st.integers(0, len(text)))
    return text[:place] + draw(st.characters()) + text[place:]


near_times = st.one_of(
    st.text(max_size=24),
    st.text(alphabet="TAta :.,*0123456789 -+\0\\eE", max_size=24),
    broken_times(),
    st.from_regex(r"[Tt]?[Aa]?:? ?\d{0,12}[:.,]?\d{0,12}[:.,]?\d{0,12}(\*\d{0,9})?"))


@property_test
@given(near_times)
@example("TA 9999:59:59*9999")
@example("9" * 5000)
@example("\ud800")
def test_the_duration_parser_never_raises_and_never_returns_a_negative_or_endless_time(text):
    value = store.acquisition_time(text)
    if value is not None:
        assert isinstance(value, Decimal)
        assert 0 <= value <= 86400
        assert 0 <= store.half_up(value) <= 86400


@property_test
@given(near_times)
def test_no_acquisition_time_is_read_from_a_text_without_a_digit_or_with_a_sign(text):
    if not any(char in "0123456789" for char in text) or "-" in text or "+" in text:
        assert store.acquisition_time(text) is None


# ------------------------------------------------------------------------------------------------------------------
# What holds for any text
# ------------------------------------------------------------------------------------------------------------------

any_text = st.one_of(
    st.text(max_size=40), st.text(alphabet="0123456789+-.eE \0YMWDnaif_*", max_size=20),
    st.text(alphabet="0123456789", max_size=400), st.floats().map(str), st.integers().map(str),
    st.characters(categories=["Cs"]).map(lambda char: "1" + char))


@property_test
@given(any_text)
def test_text_comes_out_as_text_without_padding_or_not_at_all(text):
    value = store.clean(text)
    if value is not None:
        assert value and value == value.strip(" \0") and value.encode("utf-8")
        assert store.clean(value) == value


@pytest.mark.parametrize("parse, kind", [(number, float), (non_negative, float), (integer, int), (store.age, int)],
                         ids=["number", "non_negative", "integer", "age"])
@property_test
@given(any_text)
@example("1e400")
@example("9" * 400)
@example("nan")
def test_numbers_come_out_as_finite_numbers_or_not_at_all(parse, kind, text):
    value = parse(text)
    assert value is None or type(value) is kind
    if value is not None:
        assert math.isfinite(value)
        assert kind is float or -2 ** 63 <= value < 2 ** 63
        assert value >= 0 or parse in (number, integer)


@property_test
@given(st.floats(allow_nan=False, allow_infinity=False), st.sampled_from(["", " ", "\0"]))
def test_every_finite_number_is_read_exactly(value, padding):
    assert number(repr(value) + padding) == value


@property_test
@given(st.integers(-2 ** 70, 2 ** 70))
def test_every_integer_is_read_if_sqlite_holds_it(value):
    assert integer(str(value)) == (value if -2 ** 63 <= value < 2 ** 63 else None)
