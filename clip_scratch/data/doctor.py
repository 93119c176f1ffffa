"""What is wrong with a data set: every fault of its captions and images, and what training does about each."""

from __future__ import annotations

import os
import re
import warnings
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING, ClassVar, NamedTuple

import numpy as np
import pandas as pd
from PIL import Image

from ..config import CFG
from ..errors import UserError
from ..files import write_atomically
from .captions import assign_splits, plain_words, read_rows
from .duplicates import Signature, duplicate_pairs, signature
from .image_files import is_url, split_member, stamp
from .images import fault_of, images_below, load_image, open_image
from .locate import SPLIT_OF_NAME, SPLITS, existing_folder, find_images, locate
from .tokenizer import build_tokenizer

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

TINY, HUGE = 32, 25_000_000  # pixels: of the shorter side, and of the image
_STOPS = "Training stops and lists the first ten; with --on-bad-image skip it leaves these images out."
FINDINGS = {  # what is counted, and what training does about it
    "missing": ("Captioned images that are missing", _STOPS),
    "truncated": ("Truncated images", _STOPS),
    "corrupt": ("Images that cannot be decoded", _STOPS),
    "tiny": (f"Images with a side below {TINY} pixels", "Training enlarges them to its --size."),
    "huge": (f"Images above {HUGE / 1e6:g} million pixels", "Training decodes them whole, slowly and with 3 bytes of "
             "memory a pixel, then scales them to its --size."),
    "extension": ("Images of another format than their extension", "Training goes by the content. `search index` "
                  "leaves out files without the extension of an image."),
    "unused": ("Images in the folder without a caption", "Training does not read them."),
    "not_utf8": ("Rows that are not UTF-8, read here as Windows-1252", "Training stops at the first."),
    "encoding": ("Captions with wrongly decoded characters", "Training learns these characters as they are."),
    "empty": ("Rows without an image or a caption", "Training leaves them out and prints their number."),
    "repeated": ("Repeated captions of an image", "Training uses exact repetitions once. One that differs in upper and "
                 "lower case counts as another caption."),
    "shared": ("Captions that several images have", "In training all images of such a caption are right. Recall "
               "counts only the caption's own image."),
    "long": ("Captions longer than the tokenizer's limit", "Training cuts off the rest."),
    "unknown_split": ("Rows in an unknown split", f"Training stops. A split is one of {', '.join(SPLIT_OF_NAME)}."),
    "two_splits": ("Rows of an image that is in two splits", "Training stops at the first. Keep it in one split."),
    "unlisted": ("Images in no published split", "Training leaves them out and prints their number."),
    "leaks": ("Pairs of equal or nearly equal images in different splits", "Training does not notice. Recall is then "
              "measured on images that were trained on, and is too high."),
    "duplicates": ("Pairs of equal images in a split", "Training takes them for two images: the captions of one are "
                   "wrong for the other, unless they have the same words."),
    "near_duplicates": ("Pairs of nearly equal images in a split", "As for equal images."),
    "misfits": ("Captions that fit their images worst", "Training uses them. Look for wrong ones among these."),
}  # fmt: skip
_BAD = ("missing", "truncated", "corrupt")
_SHOWN = ["file", "row", "image", "caption", "split", "detail", "other"]


@dataclass
class Report:
    """What `examine` found. `findings` has a DataFrame for each fault found, by its name in FINDINGS.

    Its rows say where (file, row, image, caption, split), and in detail what; in a pair `other` is the second image.
    `table` is the caption table with its splits, without empty rows; `images` the readable images by name, with width
    and height.
    """

    cfg: CFG
    folder: Path
    understood: list[str]
    table: pd.DataFrame
    images: pd.DataFrame
    findings: dict[str, pd.DataFrame] = field(default_factory=dict)
    EXAMPLES: ClassVar[int] = 10  # of a finding, in HTML

    @property
    def name(self) -> str:
        return self.cfg.captions_path or "the built-in scenes"

    def add(self, name: str, rows: pd.DataFrame, detail: object = "") -> None:
        """Add a finding, unless `rows` is empty. `detail` is a text for all of them or a list with one for each."""
        if len(rows):
            rows = rows if "detail" in rows else rows.assign(detail=detail)
            self.findings[name] = rows.reindex(columns=_SHOWN, fill_value="").reset_index(drop=True)

    def in_order(self) -> list[tuple[str, str, str, pd.DataFrame]]:
        """(name, title, effect, rows) of each finding, in the order of FINDINGS."""
        return [(name, *FINDINGS[name], self.findings[name]) for name in FINDINGS if name in self.findings]

    def counts(self) -> str:
        """Images, captions and captions per image of each split, as a table in plain text."""
        lines = [f"{'split':<8}{'images':>10}{'captions':>10}{'captions per image (min / median / max)':>42}"]
        parts = [(split, self.table[self.table["split"] == split]) for split in SPLITS]
        for name, rows in [*parts, ("all", self.table)]:
            if len(rows):
                an_image = rows.groupby("image").size()
                spread = f"{an_image.min()} / {an_image.median():g} / {an_image.max()}"
                lines.append(f"{name:<8}{len(an_image):>10,}{len(rows):>10,}{spread:>42}")
        return "\n".join(lines)

    def text(self, examples: int = 3) -> str:
        """The report in plain text, with a few examples of each finding."""
        lines = [self.counts(), *self.understood]
        for _, title, effect, rows in self.in_order():
            lines.append(f"\n{title}: {len(rows):,}. {effect}")
            for row in rows.head(examples).itertuples():
                where = f"{row.image} ({row.file}, row {row.row})" if row.file else row.image
                names = " and ".join(filter(None, [where, row.other]))
                lines.append("  " + ": ".join(filter(None, [names, row.detail, shorten(row.caption, 120)])))
            lines += [f"  and {len(rows) - examples:,} more"] if len(rows) > examples else []
        return "\n".join(lines if self.findings else [*lines, "\nNothing is wrong with it."])

    def html(self) -> str:
        """The report as one self-contained HTML page."""
        from .doctor_page import page

        return page(self)

    def _repr_html_(self) -> str:
        from .doctor_page import body

        return body(self)

    def cleaned(self) -> tuple[pd.DataFrame, dict[str, int]]:
        """The table without its certain faults, and how many rows were left out for each: see `write_cleaned`."""
        table = self.table.assign(caption=self.table["caption"].map(lambda text: repaired(text) or text))
        bad = {name for kind in _BAD for name in self._rows(kind)["image"]}
        rank = table["split"].map(SPLITS.index)
        latest = rank.groupby(table["image"]).max()
        leaks = self._rows("leaks")
        first_is_lower = latest.reindex(leaks["image"]).to_numpy() < latest.reindex(leaks["other"]).to_numpy()
        leaked = set(leaks["image"].where(first_is_lower, leaks["other"]))
        copies = self._rows("duplicates")  # leaks name the first of equal images only
        leaked |= set(copies["other"][copies["image"].isin(leaked)])
        words = table.assign(words=plain_words(table["caption"]))
        left_out = {
            "without an image or a caption": len(self._rows("empty")),
            "in an unknown split": len(self._rows("unknown_split")),
        }
        for reason, out in {
            "of images that cannot be read": table["image"].isin(bad),
            "of images that are in a later split too": rank < table["image"].map(latest),
            "of images that equal or nearly equal one in a later split": table["image"].isin(leaked),
            "that repeat a caption of their image": words.duplicated(["image", "words", "split"]),
        }.items():
            before, table = len(table), table[~out[table.index]]
            left_out[reason] = before - len(table)
        return table, {reason: n for reason, n in left_out.items() if n}

    def _rows(self, name: str) -> pd.DataFrame:
        return self.findings.get(name, pd.DataFrame(columns=_SHOWN))

    def write_cleaned(self, path: str | Path) -> str:
        """Write a new captions file without certain faults, and say what was left out.

        Left out are bad images, empty rows, unknown splits, repeated captions of an image and, of images in or nearly
        equal across several splits, the training ones; wrongly decoded captions are repaired where that is certain.
        Raises UserError where the file exists or nothing remains.
        """
        if os.path.lexists(path):
            raise UserError(f"{path} exists: no file is overwritten. Name another one")
        table, left_out = self.cleaned()
        if table.empty:
            raise UserError(f"no rows would be left for {path}: all of them have faults")
        columns = [name for name in ("image", "caption", "split", "label") if name in table]
        write_atomically(Path(path), lambda temporary: table[columns].to_csv(temporary, index=False))
        left_out = [f"  left out {n:,} rows {reason}" for reason, n in left_out.items()]
        train = f"python -m clip_scratch.train --captions-path {path} --image-path {self.folder}"
        return "\n".join([f"{path}: {len(table):,} rows", *left_out, f"Train on it:  {train}"])


def examine(
    captions: str | Path, images: str | Path = "", tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = True, **settings: object,
) -> Report:  # fmt: skip
    """Read a captions file and every image, and report all faults; `settings` are those of CFG.

    The tokenizer of the text encoder counts tokens, by default. Raises UserError for a captions file that cannot be
    read at all, and where there is no image folder.
    """
    cfg = CFG(captions_path=captions, image_path=images, **{"on_bad_image": "skip"} | settings)
    located = locate(cfg)
    try:
        parts, is_utf8 = read_rows(located, cfg), True
    except UserError:
        parts, is_utf8 = read_rows(located, cfg, lenient=True), False
    rows = pd.concat(parts, ignore_index=True).drop(columns="decodes", errors="ignore")
    empty = (rows["caption"] == "") | (rows["image"] == "")
    if empty.all():
        raise UserError(f"{located.first}: all {len(rows):,} rows have no image or no caption.")
    report = Report(cfg, Path(), [], rows[~empty], pd.DataFrame())
    report.add("empty", rows[empty], np.where(rows["image"] == "", "no image", "no caption")[empty])
    if not is_utf8:
        report.add("not_utf8", rows[(rows["image"] + rows["caption"]).map(lambda text: _undone(text) is None)])
    _examine_splits(report, Path(located.first))
    folder = located.images or (existing_folder(cfg.image_path) if cfg.image_path else None)
    report.folder = folder or find_images(located, report.table)
    report.understood = [*_understood(located.files.values(), parts), f"images: {report.folder}"]
    _examine_captions(report, tokenizer)
    signatures = _examine_images(report, progress)
    _examine_duplicates(report, signatures)
    return report


def repaired(text: str) -> str | None:
    """A caption whose UTF-8 was decoded as Windows-1252, as it was before; None where it was not, or is uncertain."""
    undone = _undone(text)
    # Signs of English and Western Europe; of others two in a row, as one could be an accented letter and closing quotes
    sure = r"[\x80-\xff\u2000-\u2bff\U00010000-\U0010ffff]|[\u0100-\u07ff]{2}|[\u0800-\uffff]{2}"
    return (repaired(undone) or undone) if undone and re.search(sure, undone) else None


def _undone(text: str) -> str | None:
    """A text written as Windows-1252 and read as UTF-8; None where it cannot be."""
    try:
        return text.translate(_TO_BYTES).encode("latin-1").decode()
    except UnicodeError:
        return None


_CP1252 = {byte: bytes([byte]).decode("cp1252", "ignore") for byte in range(0x80, 0xA0)}
_TO_BYTES = {ord(character): byte for byte, character in _CP1252.items() if character}


# ---- the parts of the examination


def _understood(files: Sequence[Path | str], parts: Sequence[pd.DataFrame]) -> list[str]:
    lines = []
    for file, part in zip(files, parts, strict=True):
        columns = {what: name for what, name in part.attrs.get("columns", {}).items() if name}
        named = ", ".join(f"{what} = {name}" for what, name in columns.items())
        split = f" (all {part['split'].iloc[0]})" if len(parts) > 1 else ""
        lines.append(f"captions: {file}{split}, read as {part.attrs.get('form', 'shards')}; {named}".rstrip("; "))
    return lines


def _examine_splits(report: Report, path: Path) -> None:
    """Give report.table its splits. Rows that training would refuse stay in their split, or are left out."""
    rows = report.table
    two = pd.Series(False, rows.index)
    if "split" in rows:
        given = rows["split"].fillna("").astype(str).str.strip()
        rows = rows.assign(split=given.str.lower().map(SPLIT_OF_NAME))
        unknown = rows["split"].isna()
        report.add("unknown_split", rows[unknown].assign(split=given[unknown]), given[unknown].map("split {!r}".format))
        rows = rows[~unknown]
        two = rows.groupby("image")["split"].transform("nunique") > 1
        report.add("two_splits", rows[two])
    kept = assign_splits(rows[~two], path, report.cfg) if not two.all() else rows[:0]
    report.add(
        "unlisted", rows[~two].drop(rows.index.intersection(kept.index)).drop_duplicates("image").assign(caption="")
    )
    report.table = pd.concat([kept, rows[two]]).sort_index().reset_index(drop=True)


def _examine_captions(report: Report, tokenizer: PreTrainedTokenizerBase | None) -> None:
    table, captions = report.table, report.table["caption"]
    words = plain_words(captions)
    report.add("repeated", table[table.assign(words=words).duplicated(["image", "words"])])
    several = words.map(table.groupby(words)["image"].nunique())
    several = several[(several > 1) & ~words.duplicated()]
    report.add("shared", table.loc[several.index], several.map("{:,} images".format))
    odd = captions[captions.str.contains(r"[^\x00-\x7f]")]
    details = odd.map(lambda text: f"meant: {fixed}" if (fixed := repaired(text)) else None)
    details[odd.str.contains(r"[�\x80-\x9f]|â€|Ã[^\w\s]") & details.isna()] = "characters are wrong or lost"
    report.add("encoding", table.loc[details.dropna().index], details.dropna())
    limit = report.cfg.max_length
    # A token has at least one character, and two tokens begin and end the caption
    candidates = captions[captions.str.len() > limit - 2].drop_duplicates().tolist()
    if candidates:
        try:
            tokenizer = tokenizer or build_tokenizer(report.cfg)
            limit = min(limit, tokenizer.model_max_length)
            counts, about = map(len, tokenizer(candidates, verbose=False)["input_ids"]), ""
        except UserError:  # no tokenizer here: words and marks are the fewest tokens that there can be
            counts, about = (len(re.findall(r"\w+|[^\w\s]", text)) + 2 for text in candidates), "at least "
        tokens = captions.map(dict(zip(candidates, counts, strict=True)))
        long = tokens[tokens > limit].astype(int)
        report.add(
            "long", table.loc[long.index], long.map((about + "{} tokens, " + f"of which {limit} are used").format)
        )


class _Look(NamedTuple):
    """What there is to know of an image: a fault, or its file's format, its size and its signature."""

    fault: str | None
    form: str | None = None
    width: int = 0
    height: int = 0
    signature: Signature | None = None


def _look(path: Path) -> _Look:
    try:
        with open_image(path) as file:
            form = file.format
            pixels = load_image(file)
        return _Look(None, form, pixels.shape[1], pixels.shape[0], signature(pixels))
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError and classes of their own
        fault = fault_of(path, error)
        if "cannot identify image file" in fault:  # PIL's message, which repeats the path
            begins = b"" if split_member(path) else path.read_bytes()[:1]
            what = "a web page" if begins == b"<" else "empty" if stamp(path)[0] == 0 else "no image"
            fault = f"cannot be decoded (the file is {what})"
        return _Look(fault)


def _examine_images(report: Report, progress: bool) -> list[Signature]:
    """Decode all distinct images in threads; returns the signatures of those that can be read."""
    from tqdm import tqdm

    firsts = report.table.drop_duplicates("image").reset_index(drop=True)
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # decoders release the GIL
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        looks = pool.map(_look, [report.folder / name for name in firsts["image"]])
        bar = tqdm(looks, "Examining images", len(firsts), disable=not progress, unit=" images", leave=False)
        found = pd.DataFrame(list(bar), columns=_Look._fields)
    firsts = firsts.join(found)
    bad = firsts[firsts["fault"].notna()].copy()
    kinds = bad["fault"].map(lambda fault: "missing" if fault == "no such file" else
                             "truncated" if "truncated" in fault.lower() else "corrupt")  # fmt: skip
    names, on_disk = set(firsts["image"]), _images_in(report.folder)
    other_case = {name.lower(): f"no such file, but {name}" for name in on_disk}
    missing = bad["image"][kinds == "missing"]
    bad.loc[missing.index, "fault"] = [other_case.get(name.lower(), "no such file") for name in missing]
    for kind in _BAD:
        report.add(kind, bad[kinds == kind], bad["fault"][kinds == kind])
    good = firsts.drop(bad.index)
    sizes = good["width"].map("{:,} x ".format) + good["height"].map("{:,} pixels".format)
    tiny = good[["width", "height"]].min(axis=1) < TINY
    huge = good["width"] * good["height"] > HUGE
    report.add("tiny", good[tiny], sizes[tiny])
    report.add("huge", good[huge], sizes[huge])
    forms = Image.registered_extensions() | {".jpg": "JPEG", ".heic": "HEIF"}
    expected = good["image"].map(lambda name: forms.get(Path(name).suffix.lower()))
    wrong = expected != good["form"].replace("MPO", "JPEG")  # MPO: several JPEGs in one, as cameras write them
    report.add("extension", good[wrong], "the content is " + good["form"][wrong].astype(str))
    report.add("unused", pd.DataFrame({"image": [name for name in on_disk if name not in names]}))
    report.images = good.set_index("image")[["width", "height"]]
    return good["signature"].tolist()


def _images_in(folder: Path) -> list[str]:
    try:
        return [] if is_url(str(folder)) else images_below(folder)
    except UserError:  # there are none
        return []


def _examine_duplicates(report: Report, signatures: list[Signature]) -> None:
    if len(signatures) < 2:
        return
    firsts = report.table.drop_duplicates("image").set_index("image").loc[report.images.index].reset_index()
    digests, hashes, thumbnails = zip(*signatures, strict=True)
    pairs = duplicate_pairs(
        np.array(digests, object), np.array(hashes, np.uint64), np.stack(thumbnails), firsts["split"].to_numpy()
    )
    one, other = (firsts.iloc[pairs[side]].reset_index(drop=True) for side in ("first", "second"))
    across = one["split"] != other["split"]
    alike = np.where(pairs["exact"], "equal pixels", pairs["bits"].map("hashes differ in {} of 64 bits".format))
    rows = one.assign(other=other["image"], detail=alike, caption=one["caption"] + " / " + other["caption"])
    rows.loc[across, "detail"] += ": " + one["split"] + " and " + other["split"]
    report.add("leaks", rows[across])
    report.add("duplicates", rows[~across & pairs["exact"]])
    report.add("near_duplicates", rows[~across & ~pairs["exact"]])
