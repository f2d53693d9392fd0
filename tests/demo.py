"""The program at work on a throw-away Orthanc with made-up studies; called by demo.sh.

Everything happens in a temporary folder that goes away at the end, an interrupt included. With --keep FILE the database
is copied to FILE first, to try queries on.
"""
import argparse
import contextlib
import io
import os
import pathlib
import re
import shutil
import signal
import sqlite3
import subprocess
import sys
import tempfile
import textwrap
from collections.abc import Iterable, Iterator
from concurrent import futures
from typing import IO, NamedTuple, cast

HERE = pathlib.Path(__file__).resolve().parent
if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_DFL)    # nothing has to be cleaned up yet
    sys.dont_write_bytecode = True                  # the clone stays as it is
sys.path.insert(0, str(HERE))

import dicom_files  # noqa: E402
import orthanc  # noqa: E402


# ------------------------------------------------------------------------------------------------------------------
# The studies: plausible protocols, scanners of four generations, made-up patients
# ------------------------------------------------------------------------------------------------------------------

class Protocol(NamedTuple):
    """One series: whole-body SAR in W/kg at 75 kg (None: the file has none), seconds, how often these are repeated.

    measurements: all but those of one are left out of the time that the scanner writes.

    No figure that is shown may lie on a rounding tie, which one release of SQLite rounds up and another down:
    test_readme.py fails where a new number does that.
    """

    description: str
    sequence: str
    sar: float | None
    seconds: float
    times: int = 1
    measurements: int = 1
    kind: str = "M"     # of image: magnitude, phase


PROTOCOLS = {
    "scout": Protocol("localizer", "*fl2d1", 0.022, 14.2),
    "mprage": Protocol("t1_mprage_sag", "*tfl3d1_16", 0.058, 321),
    "t2": Protocol("t2_tse_tra", "*tse2d1_18", 0.412, 155),
    "flair": Protocol("t2_flair_tra", "*tir2d1_16", 0.246, 244),
    "dwi": Protocol("ep2d_diff_tra", "*ep_b1000", 0.117, 188),
    "adc": Protocol("ep2d_diff_tra_ADC", "*ep_b0_1000", None, 188),
    "rest": Protocol("ep2d_bold_rest", "*epfid2d1_64", 0.049, 486),
    "task": Protocol("ep2d_bold_task", "*epfid2d1_64", 0.049, 364),
    "dynamic": Protocol("t1_fl3d_dyn", "*fl3d1", 0.087, 4.9, measurements=60),
    "field": Protocol("gre_field_mapping", "*fm2d2", 0.036, 65),
    "field phase": Protocol("gre_field_mapping", "*fm2d2", 0.036, 65, kind="P"),
    "spine t1": Protocol("t1_tse_sag", "*tse2d1_3", 1.294, 200),
    "spine t2": Protocol("t2_tse_sag", "*tse2d1_17", 1.512, 226),
    "spine tra": Protocol("t2_tse_tra_disc", "*tse2d1_15", 1.377, 142, 2),
    "haste": Protocol("t2_haste_cor", "*h2d1_128", 1.631, 21.5, 2),
    "vibe": Protocol("t1_vibe_dixon_tra", "*fl3d2", 0.682, 18),
    "liver t2": Protocol("t2_tse_tra_fs_trig", "*tse2d1_25", 1.483, 205),
    "liver dwi": Protocol("ep2d_diff_liver", "*ep_b800", 0.373, 228),
    "cine": Protocol("trufi_cine_sax", "*tfi2d1_12", 2.046, 9.6, 10),
    "cine 4ch": Protocol("trufi_cine_4ch", "*tfi2d1_12", 1.982, 9.6),
    "psir": Protocol("psir_tfl_sax", "*tfl2d1_25", 0.318, 11.3, 9),
}


class Scanner(NamedTuple):
    model: str
    manufacturer: str
    software: str
    generation: str     # how it writes the acquisition time
    pace: float         # its scan times relative to those of PROTOCOLS


SCANNERS = {
    "trio": Scanner("TrioTim", "SIEMENS", "syngo MR B17", "VB", 1.25),
    "skyra": Scanner("Skyra", "SIEMENS", "syngo MR E11", "VE", 1),
    "prisma": Scanner("Prisma", "SIEMENS", "syngo MR E11", "VE", 0.9),
    "vida": Scanner("MAGNETOM Vida", "Siemens Healthineers", "syngo MR XA30", "XA", 1),
    "signa": Scanner("SIGNA Premier", "GE MEDICAL SYSTEMS", "RX27.2", "GE", 1),
}


class Patient(NamedTuple):
    id: str
    age: str
    size: str | None
    weight: float
    sex: str
    ethnic_group: str | None = None


PATIENTS = {patient.id: patient for patient in (
    Patient("000873", "071Y", "1.74", 82, "M"),
    Patient("001760", "067Y", "1.66", 88, "F", "W"),
    Patient("002298", "084Y", "1.55", 49, "F", "W"),
    Patient("003415", "063Y", "1.63", 73, "F", "A"),
    Patient("004172", "034Y", "1.68", 61, "F", "B"),
    Patient("004519", "058Y", "1.80", 94, "M", "W"),
    Patient("005220", "009Y", "1.33", 28, "F", "A"),
    Patient("005907", "018M", "0.83", 11.4, "M"),
    Patient("006031", "042Y", "1.59", 118, "F"),
    Patient("006044", "015Y", "1.77", 66, "M", "W"),
    Patient("006102", "027Y", "1.85", 79, "M"),
    Patient("006127", "049Y", None, 102, "M", "B"),
)}

BRAIN, SPINE = "scout mprage t2 flair dwi", "scout,spine t1,spine t2,spine tra"
STUDIES = (    # accession, day, scanner, patient, body part, description, protocols
    ("E12301", "20240311", "prisma", "003415", "BRAIN", "Brain routine", BRAIN),
    ("E12309", "20240318", "trio", "000873", "BRAIN", "Brain fMRI", "scout mprage rest task"),
    ("E12322", "20240326", "vida", "006031", "LIVER", "Liver", "scout,haste,vibe,liver t2,liver dwi"),
    ("E12338", "20240402", "prisma", "004172", "BRAIN", "Brain routine", BRAIN),
    ("E12339", "20240404", "trio", "004519", "LSPINE", "Lumbar spine", SPINE),
    ("E12340", "20240408", "vida", "006031", "LIVER", "Liver", "scout,haste,haste,vibe,liver t2,liver dwi"),
    ("E12341", "20240409", "skyra", "005220", "BRAIN", "Brain routine", BRAIN),
    ("E12342", "20240411", "trio", "006102", "BRAIN", "Brain fMRI",
     "scout,mprage,rest,task,dwi,adc,dynamic,field,field phase"),
    ("E12343", "20240415", "signa", "000873", "BRAIN", "Brain routine", "scout mprage t2"),
    ("E12344", "20240417", "vida", "006127", "HEART", "Cardiac", "scout,cine 4ch,cine,psir"),
    ("E12345", "20240422", "prisma", "004172", "BRAIN", "Brain routine", BRAIN),
    ("E12346", "20240427", "prisma", "002298", "BRAIN", "Brain routine", "scout mprage mprage t2 flair dwi"),
    ("E12347", "20240423", "skyra", "005907", "BRAIN", "Brain routine", "scout mprage t2"),
    ("E12348", "20240429", "skyra", "006044", "LSPINE", "Lumbar spine", SPINE),
    ("E12349", "20240430", "vida", "001760", "LIVER", "Liver", "scout,haste,vibe,liver t2"),
    ("E12349", "20240501", "vida", "001760", "LIVER", "Liver", "liver t2,liver dwi"),
)


def time_of_acquisition(protocol: Protocol, scanner: Scanner) -> str | None:
    """What the scanner writes into (0051,100a)."""
    if scanner.generation == "GE":
        return None
    if scanner.generation == "VB" and protocol.sequence.startswith("*ep"):
        return "TA 00.04"    # no scan time: a fault of that software
    minutes, seconds = divmod(protocol.seconds * scanner.pace, 60)
    text = f"{int(minutes):02}:{int(seconds):02}" if minutes else f"{seconds:05.2f}"
    text += f"*{protocol.times}" if protocol.times > 1 else ""
    return f"TA: {text} " if scanner.generation == "XA" else f"TA {text}"


def sar_of(protocol: Protocol, weight: float) -> str | None:
    """More transmitter voltage for heavier patients, as scanners report it: with many digits."""
    return None if protocol.sar is None else f"{protocol.sar * (0.72 + 0.28 * weight / 75):.8f}"


def private_elements(protocol: Protocol, scanner: Scanner):
    """What changes a dataset: the protocol text of Siemens files, GE's own time and what it keeps in Siemens' place."""
    def change(ds):
        if scanner.generation == "GE":
            ds.add_new(0x00190010, "LO", "GEMS_ACQU_01")
            ds.add_new(0x0019105A, "FL", protocol.seconds * 1e6)
            if protocol.sequence.startswith("*tfl"):
                ds.add_new(0x00510010, "LO", "GEMS_FUNCTOOL_01")
                ds.add_new(0x0051100A, "LO", "-3")
        elif scanner.generation == "VB":
            total = protocol.seconds * scanner.pace * protocol.times * protocol.measurements
            text = (f"### ASCCONV BEGIN ###\nucOneSeriesForAllMeas = 0x1\nlRepetitions = {protocol.measurements - 1}\n"
                    f"lTotalScanTimeSec = {total:.0f}\n### ASCCONV END ###\n")
            ds.add_new(0x00290010, "LO", "SIEMENS CSA HEADER")
            ds.add_new(0x00291020, "OB", text.encode() + b"\0" * (len(text) % 2))
    return change


def series_elements(protocol: Protocol, scanner: Scanner, patient: Patient) -> dict:
    derived = protocol.sar is None
    return {
        "change": private_elements(protocol, scanner),
        "sar": sar_of(protocol, patient.weight), "ta": time_of_acquisition(protocol, scanner),
        "creator": None if scanner.generation == "GE" else dicom_files.SIEMENS,
        "Manufacturer": scanner.manufacturer, "ManufacturerModelName": scanner.model,
        "SoftwareVersions": scanner.software,
        "SeriesDescription": protocol.description, "SequenceName": protocol.sequence,
        "PulseSequenceName": protocol.sequence.strip("*") if scanner.generation == "XA" else None,
        "ImageType": ["DERIVED", "PRIMARY", "ADC"] if derived else ["ORIGINAL", "PRIMARY", protocol.kind]}


def study_elements(day: str, description: str, body_part: str, patient: Patient) -> dict:
    return {
        "StudyDate": day, "StudyDescription": description, "BodyPartExamined": body_part,
        "PatientID": patient.id, "PatientName": "Made^Up", "PatientAge": patient.age, "PatientSize": patient.size,
        "PatientWeight": f"{patient.weight:g}", "PatientSex": patient.sex, "EthnicGroup": patient.ethnic_group}


def files() -> Iterator[bytes]:
    """All DICOM files, two images a series, and a CT, which the program leaves alone."""
    later: dict[str, int] = {}    # the series number with which a second study of an accession goes on
    for accession, day, scanner, patient, body_part, description, names in STUDIES:
        who, machine = PATIENTS[patient], SCANNERS[scanner]
        of_study = study_elements(day, description, body_part, who)
        for number, name in enumerate(re.split("," if "," in names else " ", names), later.get(accession, 1)):
            of_series = series_elements(PROTOCOLS[name], machine, who)
            for image in (1, 2):
                yield dicom_files.instance(accession, study=(accession, day), series=number, number=image,
                                           **of_series, **of_study)
            later[accession] = number + 1
    yield dicom_files.instance(
        "E12337", sop_class="1.2.840.10008.5.1.4.1.1.2", sar=None, ta=None, creator=None, Modality="CT",
        StudyDate="20240403", StudyDescription="Chest", BodyPartExamined="CHEST", ManufacturerModelName="SOMATOM Force")


# ------------------------------------------------------------------------------------------------------------------
# Tables on a terminal
# ------------------------------------------------------------------------------------------------------------------

def columns(names: list[str], rows: list[tuple], stacked: bool = False) -> str:
    """Rows in columns: numbers to the right and with equally many decimals, NULL as nothing.

    stacked: names are broken at their underscores.
    """
    heads = [name.split("_") if stacked else [name] for name in names]
    height = max(map(len, heads))
    aligned = [column([row[place] for row in rows], [""] * (height - len(head)) + head)
               for place, head in enumerate(heads)]
    return "\n".join("  ".join(cells).rstrip() for cells in zip(*aligned, strict=True))


def column(values: list, head: list[str]) -> list[str]:
    """The cells of a column, all of one width: its head, a rule and the values."""
    known = [value for value in values if value is not None]
    numeric = bool(known) and all(isinstance(value, (int, float)) for value in known)
    decimals = max((len(repr(value).partition(".")[2]) for value in known if isinstance(value, float)), default=0)
    form = f".{decimals}f" if numeric and decimals else ""
    cells = ["" if value is None else f"{value:{form}}" for value in values]
    width = max(map(len, head + cells))
    return [cell.rjust(width) if numeric else cell.ljust(width) for cell in [*head, "-" * width, *cells]]


def ask(database: pathlib.Path, query: str, stacked: bool = False) -> str:
    """The answer of a query, in columns."""
    with contextlib.closing(sqlite3.connect(database)) as conn:
        cursor = conn.execute(query)
        return columns([what[0] for what in cursor.description], cursor.fetchall(), stacked)


STUDIES_TABLE = "SELECT * FROM studies ORDER BY study_date, accession"
SERIES_TABLE = """
    SELECT '…' || substr(series_uid, -6) AS series_uid, accession, round(sar, 3) AS sar, duration, series_number,
           series_description, pulse_sequence_name, sequence_name
    FROM series WHERE accession IN ('E12342', 'E12349') ORDER BY accession, series_number"""
STUDIES_OF = "made-up studies of March and April 2024"
ONE_STUDY = """
    SELECT series_number, series_description, duration, round(sar * duration / 1000, 3) AS "kJ/kg"
    FROM series WHERE accession = 'E12342' ORDER BY series_number"""
ENERGY = "SELECT printf('%.3f', sum(sar * duration) / 1000) FROM series WHERE accession = 'E12342'"
QUESTION = """\
SELECT accession, study_description, manufacturer_model, count(sar) AS series,
       round(sum(duration) / 60.0, 1) AS minutes,
       round(sum(sar * duration) / 1000, 3) AS "kJ/kg"
FROM studies JOIN series USING (accession)
GROUP BY accession ORDER BY sum(sar * duration) DESC"""


# ------------------------------------------------------------------------------------------------------------------
# The server and the show
# ------------------------------------------------------------------------------------------------------------------

def running_server(stack: contextlib.ExitStack, folder: pathlib.Path, guarded: bool = True):
    """A server with the studies, until the stack is left: Orthanc, or its stand-in where there is none that starts.

    guarded: signals are ignored while it is stopped.
    """
    from stand_in import StandIn
    command = next(iter(orthanc.commands()), None)
    server, name = (orthanc.Orthanc(command) if command else StandIn()), "A stand-in (no Orthanc was found)"
    try:
        start(server, stack, folder, guarded)
        name = f"Orthanc {server.version}" if command else name
    except orthanc.DidNotStart as error:
        print(f"{error}\nA small stand-in takes its place.", file=sys.stderr, flush=True)
        server, name = StandIn(), "A stand-in (Orthanc did not start)"
        start(server, stack, folder, guarded)
    server.upload(*files())
    server.settle()
    return server, name


def start(server, stack: contextlib.ExitStack, folder: pathlib.Path, guarded: bool) -> None:
    before, tempfile.tempdir = tempfile.tempdir, str(folder)    # what the server keeps goes away with the rest
    # in a thread, where no interrupt leaves it half done
    starting = futures.ThreadPoolExecutor(1).submit(server.__enter__)
    stack.callback(stop, server, starting)
    if guarded:
        stack.callback(ignore_signals)
    try:
        starting.result()
    finally:
        tempfile.tempdir = before


def stop(server, starting: futures.Future) -> None:
    """End a server, once it has started."""
    if starting.exception() is None:
        server.__exit__(None, None, None)


def ignore_signals() -> None:
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, signal.SIG_IGN)


def environment(server_url: str, folder: pathlib.Path) -> dict:
    """The caller's, but for what the program reads; its `python3` is the one that runs this."""
    return os.environ | {
        "ORTHANC_URL": server_url, "STUDY_INFO_DB": str(folder / "study_info.db"), "NETRC": os.devnull,
        "PATH": os.path.dirname(sys.executable) + os.pathsep + os.environ.get("PATH", os.defpath),
        "PYTHONDONTWRITEBYTECODE": "1"}


def show_run(env: dict, *arguments: str) -> None:
    """Run the program in the clone and pass on all that it says, in order."""
    print("$ ./store_study_info.py", *arguments, flush=True)
    with subprocess.Popen(["./store_study_info.py", *arguments], cwd=HERE.parent, env=env, encoding="utf-8",
                          stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT) as process:
        try:
            for line in cast(IO[str], process.stdout):
                print(line, end="", flush=True)
        except BaseException:
            process.kill()
            raise
    if process.returncode:
        sys.exit(f"the program ended with status {process.returncode}")


def say(text: str) -> None:
    print("\n" + textwrap.fill(text, 92), end="\n\n", flush=True)


def serve(folder: pathlib.Path) -> None:
    with contextlib.ExitStack() as stack:
        server, name = running_server(stack, folder)
        print(f"{name} answers until Ctrl-C, with {STUDIES_OF}. In another terminal:\n\n"
              f"  export ORTHANC_URL={server.url}", flush=True)
        while True:
            signal.pause()


def show(folder: pathlib.Path, keep: pathlib.Path | None) -> None:
    with contextlib.ExitStack() as stack:
        server, name = running_server(stack, folder)
        env, database = environment(server.url, folder), folder / "study_info.db"
        print(f"{name} answers at {server.url}, with {STUDIES_OF}.\n")
        print(f"$ export ORTHANC_URL={server.url} STUDY_INFO_DB=$(mktemp -d)/study_info.db")
        show_run(env, "202404")
        say("The accessions are on standard output, all else is on standard error. This is now in the database, first "
            "in the table studies:")
        print(ask(database, STUDIES_TABLE, stacked=True))
        say("The table series, here of two studies, with UIDs shortened and SAR rounded. E12349 was scanned over "
            "midnight, in two studies under one accession, and is whole. E12342 has EPI series for which the scanner's "
            "software wrote hundredths of a second: those with a time below one second in the summary above, which "
            "--force --fallback puts right.")
        print(ask(database, SERIES_TABLE, stacked=True))
        say("A question: how much energy did each study deposit? SAR (W/kg) times duration (s) is J/kg. "
            "(For E12342 the answer is too low.)")
        print(QUESTION + ";\n\n" + ask(database, QUESTION))
        say("Later, a range of months: what is stored already is skipped.")
        show_run(env, "202403-202404")
        if keep:    # as README.md's questions have it
            shutil.copyfile(database, keep)
            os.chmod(keep, 0o600)
        before = ask(database, ENERGY).split()[-1]
        say("The times that mean the scan, for E12342, from the protocols in its files:")
        show_run(env, "--force", "--fallback", "E12342")
        print("\n" + ask(database, ONE_STUDY))
        say(f"Its energy is {ask(database, ENERGY).split()[-1]} kJ/kg now; before, it was {before}. Series 8 and 9 are "
            "magnitude and phase of one scan, whose time is counted twice.")
        if keep:
            print(f"The database as it was before that is kept in {keep}.", flush=True)


def main(arguments: Iterable[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="demo.sh",
                                     description="Show store_study_info.py at work on a throw-away Orthanc.")
    parser.add_argument("--keep", metavar="FILE", type=pathlib.Path,
                        help="copy the database to FILE at the end, to try queries on")
    parser.add_argument("--serve", action="store_true", help="only start the server and leave it to you, until Ctrl-C")
    options = parser.parse_args(arguments)
    keep = options.keep
    if keep and (keep.exists() or not keep.absolute().parent.is_dir()):
        parser.error(f"{keep} exists already, or its folder does not")
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, lambda number, _: sys.exit(128 + number))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):    # nothing where it is closed
            stream.reconfigure(encoding="utf-8")
    try:
        with tempfile.TemporaryDirectory(prefix="store_study_info-") as folder:
            serve(pathlib.Path(folder)) if options.serve else show(pathlib.Path(folder), keep)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:    # the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


if __name__ == "__main__":
    sys.exit(main())
