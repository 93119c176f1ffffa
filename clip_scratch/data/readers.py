"""One reader per published captions format -> one row per caption.

Each row says where it comes from (`file`, `row`), for error messages. `row` is the line as an editor counts it, or the
number of the record where a JSON file does not have one per line.
"""

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

# Formats of one caption per line, nothing quoted: how the file begins, the lines of its header, what a line is, and
# the same in words. Flickr8k: Hodosh et al., 2013. Flickr30k: Young et al., 2014; the published file has a row without
# its second bar, `2199200615.jpg| 4   A dog runs across the grass .`
LINE_FORMATS = {
    "flickr8k": (r"[^\t]+#\d+\t", 0, r"([^\t]*?)(?:#\d+)?\t(.*)", "image.jpg#0, a tab, and the caption"),
    "flickr30k": (r"image_name\s*\|\s*comment_number\s*\|\s*comment\s*$", 1, r"([^|]+)\|\s*\d+(?:\s*\||\s+)(.*)",
                  "image_name| comment_number| comment"),
}  # fmt: skip
# One image of Flickr8k.token.txt has a malformed name and was never published.
FLICKR8K_UNPUBLISHED = "2258277193_586949ec62.jpg.1"

csv.field_size_limit(2**30)  # a line of any length is read, and refused for its columns
DELIMITERS = "\t,;|"
# Of a field in a file without a header, or inside quotes that are not closed
IMAGE_FILE = r"[^\t,;|\"]+\.(?:jpe?g|png|webp|gif|bmp|tiff?|heic|avif)"

Records = list[tuple[int, dict | str]]  # (row, fields), or for a row that cannot be read (row, what is wrong)


class Columns(NamedTuple):
    """The columns or fields that the settings name; an empty one is recognised by its usual names."""

    image: str = ""
    caption: str = ""
    label: str = ""


def read_file(path: Path, form: str, columns: Columns, lenient: bool = False) -> pd.DataFrame:
    """Every caption of a file as a row: image, caption, file, row, and split and label where the file has them.

    `form` is a captions_format other than "huggingface"; "auto" recognises it from how the file begins. Raises
    UserError for a file that is missing, empty, malformed or without the columns. `attrs` of the table says what was
    recognised. Where `lenient`, which is also that of `read_text`, rows that cannot be read are left out:
    `attrs["faults"]` has (row, what is wrong) of each.
    """
    text = read_text(path, lenient)
    if form == "auto":
        line = text.lstrip().splitlines()[0]
        by_line = (name for name, (start, *_) in LINE_FORMATS.items() if re.match(start, line))
        form = "json" if line[0] in "{[" else next(by_line, "table")
    if form in LINE_FORMATS:
        records, columns = _line_records(text, form), Columns()  # the settings name no column of these
    else:
        records = _table(text, columns, path) if form == "table" else _json(text, path)
    faults = [(row, fault) for row, fault in records if isinstance(fault, str)]
    if faults and (not lenient or len(faults) == len(records)):
        lists = f"python -m clip_scratch.prepare check {path} lists all such rows."
        raise UserError(f"{path}, row {faults[0][0]}: {faults[0][1]} {lists}")
    table = _tabulate([record for record in records if not isinstance(record[1], str)], path, columns)
    table.attrs |= {"form": form, "faults": faults}
    return table


def read_text(path: Path, lenient: bool = False) -> str:
    """The text of a file in UTF-8, with or without a byte order mark (or UTF-16 with one, as Excel saves it).

    Another encoding raises UserError, or is read as Windows-1252 where `lenient`.
    """
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
        if lenient and not utf16:
            return raw.decode("cp1252", "replace")
        row = raw[: error.start].count(b"\n") + 1
        raise UserError(f"{path}, row {row}: not UTF-8 text. Save the file as UTF-8.") from error
    if not text.strip():
        raise UserError(f"{path} is empty: it has no captions.")
    return text


# ---- the formats: text -> records


def _line_records(text: str, form: str) -> Records:
    _, header, pattern, example = LINE_FORMATS[form]
    records = []
    for row, line in list(_lines(text))[header:]:
        match = re.match(pattern, line)
        if not match:
            records.append((row, f"not of the form `{example}`."))
        elif match[1] != FLICKR8K_UNPUBLISHED:
            records.append((row, {"image": match[1], "caption": match[2]}))
    return records


def _table(text: str, columns: Columns, path: Path) -> Records:
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
    last = len(header) - 1
    caption_is_last = header[last] in _caption_columns(header, columns.caption)
    records = []
    for row, fields in rows:
        if len(fields) > len(header) and caption_is_last:
            # An unquoted caption with commas: the rest of the line belongs to it
            fields = [*fields[:last], delimiter.join(fields[last:])]
        fix = f'Put captions that contain "{delimiter}" in double quotes.'
        fault = f"{len(fields)} columns where the header has {len(header)}. {fix}" if len(fields) > len(header) else ""
        records.append((row, fault or dict(zip(header, fields, strict=False))))
    return records


def _delimiter(header: str, columns: Columns) -> str:
    """The delimiter that gives the header the most required columns, then the most columns."""

    def score(delimiter: str) -> tuple[int, int]:
        names = [name.strip() for name in next(csv.reader([header], delimiter=delimiter))]
        found = bool(_column(names, columns.image, IMAGE_NAMES)) + bool(_caption_columns(names, columns.caption))
        return found, len(names)

    return max(DELIMITERS, key=score)


def _csv_rows(text: str, delimiter: str, path: Path) -> list[tuple[int, list[str]]]:
    """(first line, fields) of each record. In a file whose quotes do not pair, which is printed, each line is one."""
    rows, line, lines = [], 0, list(io.StringIO(text, newline=""))
    # A space before an opening quote, as in `a.jpg, "a dog, red"`, would make the quotes part of the caption. More
    # delimiters before it than the first line has are commas of an unquoted caption.
    d, most = re.escape(delimiter), max(1, lines[0].count(delimiter))
    spaced = re.search(rf'^(?:[^"\n{d}]*{d}){{1,{most}}} +"(?:[^"\n]|"")*"\s*(?:$|{d})', text, re.MULTILINE)
    dialect = {"delimiter": delimiter, "skipinitialspace": bool(spaced)}
    reader = csv.reader(lines, strict=True, **dialect)
    try:
        for fields in reader:
            if any(_is_row(inner, delimiter) for inner in lines[line + 1 : reader.line_num]):
                raise csv.Error
            if fields:
                rows.append((line + 1, fields))
            line = reader.line_num
    except csv.Error:
        print(f"{path}, row {line + 1}: double quotes do not pair. Each line is read as a row.", file=sys.stderr)
        rows = [(number, next(csv.reader([line], **dialect))) for number, line in _lines(text)]
    return rows


def _is_row(line: str, delimiter: str) -> bool:
    """Whether a line inside a quoted field looks like a row: one of its fields is an image file."""
    fields = line.split(delimiter)
    return len(fields) > 1 and any(re.fullmatch(rf'[\s"]*{IMAGE_FILE}[\s"]*', field, re.IGNORECASE) for field in fields)


def _json(text: str, path: Path) -> Records:
    """JSON Lines, a list of records, or an object with such a list, as Karpathy & Fei-Fei's (2015) dataset_*.json."""
    lines = list(_lines(text))
    # A first line that begins with a brace may be broken: then the second, a whole record, shows JSON Lines
    is_whole = (isinstance(_record(line), dict) for _, line in lines[:2])
    if len(lines) > 1 and text.lstrip()[0] == "{" and any(is_whole):
        records = [(row, _record(line)) for row, line in lines]
    else:
        try:
            content = json.loads(text)
        except (ValueError, RecursionError) as error:  # also a number with thousands of digits; lists thousands deep
            fault = f"line {getattr(error, 'lineno', 1)}: cannot be read as JSON ({getattr(error, 'msg', error)})."
            raise UserError(f"{path}, {fault}") from error
        if isinstance(content, dict):  # without a list it is the only line of a JSON Lines file
            lists = [part for part in content.values() if isinstance(part, list) and part and isinstance(part[0], dict)]
            content = max(lists, key=len, default=[content])
        records = [(i, _checked(item)) for i, item in enumerate(content if isinstance(content, list) else [content], 1)]
    for _, fields in records:
        # Karpathy's COCO: the image's folder and its name
        if isinstance(fields, dict) and fields.keys() >= {"filepath", "filename", "sentences"}:
            fields["filename"] = str(PurePosixPath(_text(fields["filepath"]), _text(fields["filename"])))
    return records


def _record(line: str) -> dict | str:
    """A line of JSON Lines, or what is wrong with it."""
    try:
        return _checked(json.loads(line))
    except (ValueError, RecursionError) as error:
        return f"cannot be read as JSON ({getattr(error, 'msg', error)})."


def _checked(fields: object) -> dict | str:
    """A record, or what is wrong with it."""
    if isinstance(fields, dict):
        return fields
    return f"expected a record with named fields, found {json.dumps(fields)[:40]}."


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
    image, captions, split, label = find_columns(path, names, columns)
    rows = []
    for row, fields in records:
        # Forward slashes and no `./`, so that each image has one name
        name = _text(fields.get(image)).strip().replace("\\", "/")
        name = str(PurePosixPath(name)) if name else ""
        given = [text for column in captions for text in captions_in(fields.get(column))]
        for text in given or [""]:  # counted with the empty captions
            rows.append((name, text, path.name, row, _text(fields.get(split)), _text(fields.get(label))))
    table = pd.DataFrame(rows, columns=["image", "caption", "file", "row", "split", "label"])
    table = table.drop(columns=[name for name, found in (("split", split), ("label", label)) if not found])
    table.attrs["columns"] = {"image": image, "caption": ", ".join(captions), "split": split, "label": label}
    return table


def find_columns(
    source: Path | str, names: list[str], columns: Columns
) -> tuple[str, list[str], str | None, str | None]:
    """The image column, the caption columns (several for caption_0, caption_1 ...), and the split and label columns.

    Raises UserError without an image or a caption column, or without one that a setting names.
    """
    image, captions = _column(names, columns.image, IMAGE_NAMES), _caption_columns(names, columns.caption)
    label = _column(names, columns.label, LABEL_NAMES)
    for what, found in (("image", image), ("caption", captions), ("label", label or not columns.label)):
        if not found:
            wanted = getattr(columns, what)
            missing = f"no column {wanted!r}." if wanted else f"no column that is known as the {what}."
            missing += suggest(wanted or what, names)
            raise UserError(f"{source} has {missing} It has: {', '.join(names)}. Set --{what}-column to one of them.")
    return image, captions, _column(names, "", ("split",)), label


def _column(names: list[str], wanted: str, usual: tuple[str, ...]) -> str | None:
    """The name `wanted`; where that is empty, the first of the `usual` names, in any case and spacing."""
    if wanted:
        return wanted if wanted in names else None
    plain = {re.sub(r"[\s-]+", "_", name.strip().lower()): name for name in reversed(names)}
    return next((plain[name] for name in usual if name in plain), None)


def _caption_columns(names: list[str], wanted: str) -> list[str]:
    one = _column(names, wanted, CAPTION_NAMES)
    if one or wanted:
        return [one] if one else []
    return [name for name in names if re.fullmatch(r"(caption|sentence|text)_?\d+", name.lower())]


def captions_in(value: object) -> list[str]:
    """The captions of a field, without empty ones: a string, or a list of strings or of Karpathy's `{"raw": ...}`."""
    values = value if isinstance(value, list) else [value]
    texts = (_text(item.get("raw") if isinstance(item, dict) else item) for item in values)
    return [" ".join(text.split()) for text in texts if text.strip()]


def _text(value: object) -> str:
    """A field as a string that can be encoded; '' for None and NaN."""
    return "" if value is None or value != value else str(value).encode("utf-8", "replace").decode()
