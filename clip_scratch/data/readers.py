"""One reader per published captions format -> one row per caption.

Each row says where it comes from (`file`, `row`), for error messages. `row` is the line as an editor counts it, or the
number of the record where a JSON file does not have one per line.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
import sys
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import NamedTuple

import pandas as pd

from ..errors import UserError, suggest

# Column names that are recognised where no setting names the column, the most likely first.
IMAGE_NAMES = (
    "image", "image_name", "image_path", "image_file", "image_filename", "filename", "file_name", "filepath",
    "file_path", "file", "img", "img_name", "img_path", "path", "photo", "picture",
)  # fmt: skip
CAPTION_NAMES = (
    "caption", "captions", "comment", "comments", "text", "sentence", "sentences", "title", "product_title",
    "description",
)  # fmt: skip
LABEL_NAMES = ("label", "class_label", "class", "class_name", "category")
SPLIT_NAMES = ("split",)

DELIMITERS = "\t,;|"

# One image of Flickr8k.token.txt has a malformed name and was never published.
FLICKR8K_UNPUBLISHED = "2258277193_586949ec62.jpg.1"

# Of a field in a file without a header, or inside quotes that are not closed
IMAGE_FILE = r"[^\t,;|\"]+\.(?:jpe?g|png|webp|gif|bmp|tiff?|heic|avif)"

Records = list[tuple[int, dict]]  # (row, fields)


class Columns(NamedTuple):
    """The columns or fields that the settings name; an empty one is recognised by its usual names."""

    image: str = ""
    caption: str = ""
    label: str = ""


def read_file(path: Path, form: str, columns: Columns) -> pd.DataFrame:
    """Every caption of a file as a row: image, caption, file, row, and split and label where the file has them.

    `form` is a captions_format other than "huggingface"; "auto" recognises it. Raises UserError for a file that is
    missing, empty, malformed or without the columns.
    """
    text = read_text(path)
    form = sniff(text) if form == "auto" else form
    if form == "table":
        records = _table(text, path, columns)
    elif form == "flickr8k":
        records = list(_flickr8k(text, path))
    elif form == "flickr30k":
        records = list(_flickr30k(text, path))
    else:
        records = _json(text, path, karpathy=form == "karpathy")
    if form in ("flickr8k", "flickr30k", "karpathy"):
        columns = Columns("image", "caption")  # the settings are for formats that do not fix the names
    return _tabulate(records, path, columns)


def read_text(path: Path) -> str:
    """The text of a file in UTF-8, with or without a byte order mark (or UTF-16 with one, as Excel saves it)."""
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise UserError(f"cannot read {path}: {error.strerror}.") from error
    utf16 = raw.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE))
    if not utf16 and b"\0" in raw[:8192]:
        raise UserError(f"{path} is a binary file, not captions. Set --captions-path to a CSV, TSV or JSON file.")
    try:
        text = raw.decode("utf-16" if utf16 else "utf-8-sig")
    except UnicodeDecodeError as error:
        row = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, row {row}: not UTF-8 text. Save the file as UTF-8.") from error
    if not text.strip():
        raise UserError(f"{path} is empty: it has no captions.")
    return text


def sniff(text: str) -> str:
    """The captions_format of a text, from how it begins."""
    start = text.lstrip()
    line = start.splitlines()[0]
    if start[0] in "{[":
        return "json"
    if re.match(r"[^\t]+#\d+\t", line):
        return "flickr8k"
    if re.match(r"image_name\s*\|\s*comment_number\s*\|\s*comment\s*$", line):
        return "flickr30k"
    return "table"


# ---- the formats: text -> records


def _table(text: str, path: Path, columns: Columns) -> Records:
    """A CSV or TSV file with a header, or without one where the first line is an image and its caption.

    Without a header a column of numbers may stand between the two, as in `a.jpg,0,a dog runs`.
    """
    first = text.lstrip("\r\n").splitlines()[0]
    headless = re.match(rf'"?{IMAGE_FILE}"?\s*([\t,;|])', first, re.IGNORECASE)
    delimiter = headless[1] if headless else _delimiter(first, columns)
    rows = _csv_rows(text, delimiter, path)
    if headless:
        numbered = all(len(fields) > 2 and fields[1].strip().isdecimal() for _, fields in rows)
        header = ["image", "number", "caption"] if numbered else ["image", "caption"]
    else:
        header = [name.strip() for name in rows.pop(0)[1]]
    caption_is_last = header[-1] in caption_columns(header, columns.caption)
    records = []
    for row, fields in rows:
        if len(fields) > len(header) and caption_is_last:
            # An unquoted caption with commas: the rest of the line belongs to it
            fields = [*fields[: len(header) - 1], delimiter.join(fields[len(header) - 1 :])]
        if len(fields) > len(header):
            raise UserError(
                f"{path}, row {row}: {len(fields)} columns where the header has {len(header)}. "
                f'Put captions that contain "{delimiter}" in double quotes.'
            )
        records.append((row, dict(zip(header, fields, strict=False))))
    return records


def _delimiter(header: str, columns: Columns) -> str:
    """The delimiter that gives the header the most required columns, then the most columns."""

    def score(delimiter: str) -> tuple[int, int]:
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter))]
        found = bool(find_column(names, columns.image, IMAGE_NAMES)) + bool(caption_columns(names, columns.caption))
        return found, len(names)

    return max(DELIMITERS, key=score)


def _csv_rows(text: str, delimiter: str, path: Path) -> list[tuple[int, list[str]]]:
    """(first line, fields) of each record. In a file whose quotes do not pair, which is printed, each line is one."""
    rows, line, lines = [], 0, list(io.StringIO(text, newline=""))
    # A space before an opening quote, as in `a.jpg, "a dog, red"`, would make the quotes part of the caption. More
    # delimiters before it than the first line has are commas of an unquoted caption.
    d, most = re.escape(delimiter), max(1, lines[0].count(delimiter))
    spaced = re.search(rf'^(?:[^"\n{d}]*{d}){{1,{most}}} +"(?:[^"\n]|"")*"\s*(?:$|{d})', text, re.MULTILINE)
    dialect = {"delimiter": delimiter, "strict": True, "skipinitialspace": bool(spaced)}
    reader = csv.reader(lines, **dialect)
    try:
        for fields in reader:
            if any(_is_row(inner, delimiter) for inner in lines[line + 1 : reader.line_num]):
                raise csv.Error
            if fields:
                rows.append((line + 1, fields))
            line = reader.line_num
    except csv.Error:
        print(f"{path}, row {line + 1}: double quotes do not pair. Each line is read as a row.", file=sys.stderr)
        rows = [(number, _csv_line(line, dialect)) for number, line in _lines(text)]
    return rows


def _is_row(line: str, delimiter: str) -> bool:
    """Whether a line inside a quoted field looks like a row: one of its fields is an image file."""
    fields = line.split(delimiter)
    return len(fields) > 1 and any(re.fullmatch(rf'[\s"]*{IMAGE_FILE}[\s"]*', field, re.IGNORECASE) for field in fields)


def _csv_line(line: str, dialect: dict) -> list[str]:
    try:
        return next(csv.reader([line], **dialect))
    except csv.Error:
        return line.split(dialect["delimiter"])


def _flickr8k(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    """Flickr8k.token.txt (Hodosh et al., 2013): `image.jpg#0<TAB>caption`."""
    for row, line in _lines(text):
        name, tab, caption = line.partition("\t")
        if not tab:
            raise UserError(f"{path}, row {row}: no tab between the image and its caption.")
        name = re.sub(r"#\d+$", "", name)
        if name != FLICKR8K_UNPUBLISHED:
            yield row, {"image": name, "caption": caption}


def _flickr30k(text: str, path: Path) -> Iterator[tuple[int, dict]]:
    """Flickr30k results.csv (Young et al., 2014): `image_name| comment_number| comment`, nothing quoted.

    The published file has a row without its second bar: `2199200615.jpg| 4   A dog runs across the grass .`
    """
    for row, line in list(_lines(text))[1:]:
        match = re.match(r"([^|]+)\|\s*\d+(?:\s*\||\s+)(.*)", line)
        if not match:
            raise UserError(f"{path}, row {row}: not of the form `image_name| comment_number| comment`.")
        yield row, {"image": match[1], "caption": match[2]}


def _json(text: str, path: Path, karpathy: bool) -> Records:
    """JSON Lines, a JSON list of records, or a JSON object that contains such a list, as Karpathy's."""
    lines = list(_lines(text))
    try:
        by_line = len(lines) > 1 and isinstance(json.loads(lines[0][1]), dict)
    except (ValueError, RecursionError):
        by_line = False
    if by_line:
        return [(row, _fields(_parse(line, path, row), path, row)) for row, line in lines]
    content = _parse(text, path, 1)
    if isinstance(content, dict):
        images = content.get("images")
        lists = [
            value for value in content.values() if isinstance(value, list) and value and isinstance(value[0], dict)
        ]
        if karpathy or (images in lists and "sentences" in images[0]):
            return _karpathy(images, path)
        content = max(lists, key=len, default=[content])  # no list: the only line of a JSON Lines file
    if karpathy or not isinstance(content, list):
        raise UserError(f"{path} has no list of {'images' if karpathy else 'records'}.")
    return [(row, _fields(record, path, row)) for row, record in enumerate(content, 1)]


def _parse(text: str, path: Path, row: int) -> object:
    """The JSON value of a text that begins in line `row`."""
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise UserError(f"{path}, line {row + error.lineno - 1}: not valid JSON ({error.msg}).") from error
    except (ValueError, RecursionError) as error:  # a number with thousands of digits; lists thousands deep
        raise UserError(f"{path}, line {row}: cannot be read as JSON ({error}).") from error


def _fields(record: object, path: Path, row: int) -> dict:
    if not isinstance(record, dict):
        raise UserError(f"{path}, row {row}: expected a record with named fields, found {json.dumps(record)[:40]}.")
    return record


def _karpathy(images: object, path: Path) -> Records:
    """Karpathy & Fei-Fei (2015) dataset_*.json: `images` with `filename`, `filepath` (COCO), `split`, `sentences`."""
    if not isinstance(images, list):
        raise UserError(f"{path} has no list of images, which Karpathy's dataset_*.json files have.")
    records = []
    for row, image in enumerate(images, 1):
        fields = _fields(image, path, row)
        name = PurePosixPath(*(_text(fields.get(part)) for part in ("filepath", "filename")))
        records.append((row, {"image": str(name), "caption": fields.get("sentences"), "split": fields.get("split")}))
    return records


def _lines(text: str) -> Iterator[tuple[int, str]]:
    """(number, line) of every line that is not blank. (str.splitlines also breaks at other characters.)"""
    for number, line in enumerate(io.StringIO(text, newline=None), 1):
        if line.strip():
            yield number, line.rstrip("\n")


# ---- records -> rows


def _tabulate(records: Records, path: Path, columns: Columns) -> pd.DataFrame:
    """One row per caption; a record may have several."""
    if not records:
        raise UserError(f"{path} has a header but no captions.")
    names = list(dict.fromkeys(name for _, fields in records for name in fields))
    image = find_column(names, columns.image, IMAGE_NAMES)
    captions = caption_columns(names, columns.caption)
    label = find_column(names, columns.label, LABEL_NAMES)
    split = find_column(names, "", SPLIT_NAMES)
    for found, wanted, what in ((image, columns.image, "image"), (captions, columns.caption, "caption")):
        if not found:
            raise missing_column(path, names, wanted, what)
    if columns.label and not label:
        raise missing_column(path, names, columns.label, "label")

    rows = []
    for row, fields in records:
        name = _image_name(fields.get(image))
        given = [text for column in captions for text in _captions(fields.get(column))]
        for text in given or [""]:  # counted with the empty captions
            rows.append((name, text, path.name, row, _text(fields.get(split)), _text(fields.get(label))))
    table = pd.DataFrame(rows, columns=["image", "caption", "file", "row", "split", "label"])
    return table.drop(columns=[name for name, found in (("split", split), ("label", label)) if not found])


def find_column(names: list[str], wanted: str, usual: tuple[str, ...]) -> str | None:
    """The name `wanted`; where that is empty, the first of the `usual` names, in any case and spacing."""
    if wanted:
        return wanted if wanted in names else None
    plain = {re.sub(r"[\s-]+", "_", name.strip().lower()): name for name in reversed(names)}
    return next((plain[name] for name in usual if name in plain), None)


def caption_columns(names: list[str], wanted: str) -> list[str]:
    """The column of the captions, or the columns caption_0, caption_1 ... of a file that has these."""
    one = find_column(names, wanted, CAPTION_NAMES)
    if one or wanted:
        return [one] if one else []
    return [name for name in names if re.fullmatch(r"(caption|sentence|text)_?\d+", name.lower())]


def missing_column(source: Path | str, names: list[str], wanted: str, what: str) -> UserError:
    """The error for a source without the column `wanted`, or without any with a usual name."""
    missing = f"no column {wanted!r}." if wanted else f"no column that is known as the {what}."
    missing += suggest(wanted or what, names)
    return UserError(f"{source} has {missing} It has: {', '.join(names)}. Set --{what}-column to one of them.")


def _image_name(value: object) -> str:
    """The path of an image with forward slashes and no `./`, so that each image has one name; '' for none."""
    name = _text(value).strip().replace("\\", "/")
    return str(PurePosixPath(name)) if name else ""


def _captions(value: object) -> list[str]:
    """The captions of a field, without empty ones: a string, or a list of strings or of Karpathy's `{"raw": ...}`."""
    values = value if isinstance(value, list) else [value]
    texts = (_text(item.get("raw") if isinstance(item, dict) else item) for item in values)
    return [" ".join(text.split()) for text in texts if text.strip()]


def _text(value: object) -> str:
    """A field as a string that can be encoded; '' for None and NaN."""
    return "" if value is None or value != value else str(value).encode("utf-8", "replace").decode()
