"""DICOM files made by pydicom: what scanners write, with made-up patients."""
import hashlib
import io

from pydicom.dataset import Dataset, FileMetaDataset
from pydicom.uid import ExplicitVRLittleEndian, MRImageStorage

SIEMENS = "SIEMENS MR HEADER"
ENHANCED_MR = "1.2.840.10008.5.1.4.1.1.4.1"


def uid(*names) -> str:
    """The same UID for the same names, another for others (PS3.5 B.2)."""
    return "2.25." + str(int(hashlib.sha256(repr(names).encode()).hexdigest()[:30], 16))


def instance(accession="E1", study=None, series=1, number=1, *, sar="0.5", ta="TA 01:00", creator=SIEMENS, block=0x10,
             syntax=ExplicitVRLittleEndian, sop_class=MRImageStorage, change=None, **elements) -> bytes:
    """One DICOM file.

    study: a name for the study, the accession unless given; sar, ta, creator: None leaves them out; block: where the
    private block is; change(ds): a last word on the dataset; elements: by keyword, None to delete.
    """
    study = study or accession
    ds = Dataset()
    ds.file_meta = FileMetaDataset()
    ds.file_meta.TransferSyntaxUID = syntax
    ds.SpecificCharacterSet = "ISO_IR 192"
    ds.SOPClassUID = sop_class
    ds.StudyInstanceUID = uid(study)
    ds.SeriesInstanceUID = uid(study, series)
    ds.SOPInstanceUID = uid(study, series, number)
    ds.AccessionNumber, ds.PatientID, ds.PatientName = accession, f"P-{study}", "Doe^Jane"
    ds.StudyDate, ds.StudyTime, ds.StudyDescription = "20240427", "101112", "Head"
    ds.PatientAge, ds.PatientSize, ds.PatientWeight, ds.PatientSex = "040Y", "1.75", "70.5", "F"
    ds.EthnicGroup, ds.BodyPartExamined = "W", "HEAD"
    ds.Modality, ds.Manufacturer, ds.ManufacturerModelName = "MR", "SIEMENS", "Prisma"
    ds.SeriesNumber = series if isinstance(series, int) else 1
    ds.SeriesDescription, ds.SequenceName, ds.PulseSequenceName = f"series {series}", "*tfl3d1", "tfl"
    ds.InstanceNumber = number
    ds.ImageType = ["ORIGINAL", "PRIMARY", "M"]
    if sar is not None:
        ds.add_new(0x00181316, "DS", sar)
    if creator is not None:
        ds.add_new(0x00510000 + block, "LO", creator)
    if ta is not None:
        ds.add_new(0x0051000A + block * 0x100, "SH", ta)
    for keyword, value in elements.items():
        if value is None:
            delattr(ds, keyword)
        else:
            setattr(ds, keyword, value)
    if change:
        change(ds)
    return encode(ds)


def encode(ds: Dataset) -> bytes:
    ds.file_meta.MediaStorageSOPClassUID, ds.file_meta.MediaStorageSOPInstanceUID = ds.SOPClassUID, ds.SOPInstanceUID
    buffer = io.BytesIO()
    ds.save_as(buffer, enforce_file_format=True)
    return buffer.getvalue()


def study(accession="E1", series=3, instances=2, **elements) -> list[bytes]:
    """All files of a study: series 1 to `series`, each with `instances` images."""
    return [instance(accession, series=one, number=number, **elements)
            for one in range(1, series + 1) for number in range(1, instances + 1)]


def pixels(ds: Dataset, rows: int = 192) -> None:
    """Add an image of random-looking 16-bit pixels."""
    ds.Rows = ds.Columns = rows
    ds.BitsAllocated = ds.BitsStored = 16
    ds.HighBit, ds.PixelRepresentation, ds.SamplesPerPixel, ds.PhotometricInterpretation = 15, 0, 1, "MONOCHROME2"
    ds.add_new(0x7FE00010, "OW", hashlib.shake_128(str(ds.SOPInstanceUID).encode()).digest(rows * rows * 2))


def functional_group(*sar: tuple[str, float]) -> Dataset:
    """A functional group of an enhanced object that states SAR: (definition, W/kg) each."""
    timing, group = Dataset(), Dataset()
    timing.SpecificAbsorptionRateSequence = []
    for definition, value in sar:
        item = Dataset()
        item.SpecificAbsorptionRateDefinition, item.SpecificAbsorptionRateValue = definition, value
        timing.SpecificAbsorptionRateSequence.append(item)
    group.MRTimingAndRelatedParametersSequence = [timing]
    return group
