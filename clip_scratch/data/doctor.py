"""What is wrong with a data set: every fault of its captions and images, and what training does about each."""

from __future__ import annotations

import contextlib
import os
import re
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from textwrap import shorten
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
from PIL import Image

from ..config import CFG
from ..errors import UserError
from ..files import write_atomically
from .captions import assign_splits, plain_words, read_rows
from .duplicates import duplicate_pairs, signature
from .images import fault_of, images_below, load_image, open_image
from .locate import SPLIT_OF_NAME, SPLITS, existing_folder, find_images, locate
from .readers import read_text
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
    "huge": (f"Images above {HUGE / 1e6:g} million pixels", "Training decodes them slowly: JPEG files at a part of "
             "their size, others whole, with 3 bytes of memory a pixel. Then it scales them to its --size."),
    "extension": ("Images of another format than their extension", "Training goes by the content. `search index` "
                  "leaves out files without the extension of an image."),
    "unused": ("Images in the folder without a caption", "Training does not read them."),
    "not_utf8": ("Rows that are not UTF-8, read here as Windows-1252", "Training stops at the first."),
    "malformed": ("Rows that cannot be read", "Training refuses the file at the first. --fix leaves them out."),
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
_SHOWN = ["file", "row", "image", "caption", "split", "detail", "other"]


@dataclass
class Report:
    """What `examine` found. `findings` has a DataFrame for each fault found, by its name in FINDINGS.

    Its rows say where (file, row, image, caption, split), and in detail what; in a pair `other` is the second image.
    `table` is the caption table with its splits, without empty rows; `images` the width and height of each readable
    image, by name.
    """

    source: str
    folder: Path
    understood: list[str]
    table: pd.DataFrame
    images: pd.DataFrame
    findings: dict[str, pd.DataFrame] = field(default_factory=dict)

    def add(self, name: str, rows: pd.DataFrame, detail: object = "") -> None:
        """Add a finding, unless `rows` is empty; `detail` is a text for all, a list, or a Series with their index."""
        if len(rows):
            rows = rows.assign(detail=detail).reindex(columns=_SHOWN, fill_value="")
            self.findings[name] = rows.reset_index(drop=True)

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
                where = f"{row.image} ({row.file}, row {row.row})".strip() if row.file else row.image
                names = " and ".join(filter(None, [where, row.other]))
                lines.append("  " + ": ".join(filter(None, [names, row.detail, shorten(row.caption, 120)])))
            more = rows["row"][examples:] if rows["file"].all() else []
            which = f": rows {shorten(', '.join(map(str, more)), 160)}" if len(more) else ""
            lines += [f"  and {len(rows) - examples:,} more{which}"] if len(rows) > examples else []
        return "\n".join(lines if self.findings else [*lines, "\nNothing is wrong with it."])

    def html(self, whole: bool = True) -> str:
        """The report as one self-contained HTML page, or as a part of another."""
        from .doctor_page import body, page

        return page(self) if whole else body(self)

    def _repr_html_(self) -> str:
        return self.html(whole=False)

    def write_cleaned(self, path: str | Path) -> str:
        """Write a new captions file without certain faults, and say what was left out.

        Left out are rows that cannot be read, bad images, empty rows, unknown splits, repeated captions of an image
        and, of images in or nearly equal across several splits, the training ones; wrongly decoded captions are
        repaired where that is certain.
        Raises UserError where the file exists or nothing remains.
        """
        if os.path.lexists(path):
            raise UserError(f"{path} exists, and no file is overwritten. Name a new one")
        table = self.table.assign(caption=self.table["caption"].map(lambda text: repaired(text) or text))
        found = {name: self.findings.get(name, pd.DataFrame(columns=_SHOWN)) for name in FINDINGS}
        bad = pd.concat([found[name]["image"] for name in ("missing", "truncated", "corrupt")])
        rank = table["split"].map(SPLITS.index)
        latest = rank.groupby(table["image"]).max().to_dict()
        pairs = pd.concat([found[name] for name in ("leaks", "duplicates", "near_duplicates")])[["image", "other"]]
        leaked = {min(a, b, key=latest.get) for a, b in pairs.to_numpy() if latest[a] != latest[b]}
        copies = found["duplicates"]  # leaks name only the first of equal images
        leaked |= set(copies["other"][copies["image"].isin(leaked)])
        repeats = table.assign(words=plain_words(table["caption"])).duplicated(["image", "words", "split"])
        left_out = {
            "that cannot be read": len(found["malformed"]), "without an image or a caption": len(found["empty"]),
            "in an unknown split": len(found["unknown_split"]),
        }  # fmt: skip
        for reason, out in {
            "of images that cannot be read": table["image"].isin(bad),
            "of images that are in a later split too": rank < table["image"].map(latest),
            "of images that equal or nearly equal one in a later split": table["image"].isin(leaked),
            "that repeat a caption of their image": repeats,
        }.items():
            before, table = len(table), table[~out[table.index]]
            left_out[reason] = before - len(table)
        if table.empty:
            raise UserError(f"no rows would be left for {path}: all of them have faults")
        columns = [name for name in ("image", "caption", "split", "label") if name in table]
        write_atomically(Path(path), lambda temporary: table[columns].to_csv(temporary, index=False))
        lines = [f"  left out {n:,} rows {reason}" for reason, n in left_out.items() if n]
        train = f"python -m clip_scratch.train --captions-path {path} --image-path {self.folder}"
        return "\n".join([f"{path}: {len(table):,} rows", *lines, f"Train on it:  {train}"])


def examine(
    captions: str | Path, images: str | Path = "", tokenizer: PreTrainedTokenizerBase | None = None,
    progress: bool = True, **settings: object,
) -> Report:  # fmt: skip
    """Read a captions file and every image, and report all faults; `settings` are those of CFG.

    The tokenizer that counts tokens is by default the text encoder's own. Raises UserError for a captions file that
    cannot be read at all, and where there is no image folder.
    """
    cfg = CFG(captions_path=captions, image_path=images, **{"on_bad_image": "skip"} | settings)
    located = locate(cfg)
    parts = read_rows(located, cfg, lenient=True)
    read = list(zip(located.files.values(), parts, strict=True))
    rows = pd.concat(parts, ignore_index=True).drop(columns="decodes", errors="ignore")
    no_image = rows["image"] == ""
    empty = (rows["caption"] == "") | no_image
    if empty.all():
        raise UserError(f"{located.first}: all {len(rows):,} rows have no image or no caption.")
    report = Report(cfg.captions_path or "the built-in scenes", Path(), [], rows[~empty], pd.DataFrame())
    report.add("empty", rows[empty], no_image.map({True: "no image", False: "no caption"}))
    faults = [(Path(file).name, *fault) for file, part in read for fault in part.attrs.get("faults", ())]
    malformed = pd.DataFrame(faults, columns=["file", "row", "detail"])
    report.add("malformed", malformed, malformed["detail"])
    if not all(map(_is_utf8, located.files.values())):
        report.add("not_utf8", rows[(rows["image"] + rows["caption"]).map(_undone).isna()])
    _examine_splits(report, Path(located.first), cfg)
    folder = located.images or (existing_folder(cfg.image_path) if cfg.image_path else None)
    report.folder = folder or find_images(located, report.table)
    for file, part in read:
        split = f" (all {part['split'].iloc[0]})" if len(parts) > 1 else ""
        columns = ", ".join(f"{what} = {name}" for what, name in part.attrs.get("columns", {}).items() if name)
        report.understood.append(f"captions: {file}{split}, read as {part.attrs.get('form', 'shards')}: {columns}")
    report.understood.append(f"images: {report.folder}")
    _examine_captions(report, cfg, tokenizer)
    _examine_pairs(report, _examine_images(report, progress))
    return report


def repaired(text: str) -> str | None:
    """A caption whose UTF-8 was decoded as Windows-1252, as it was before; None where it was not, or is uncertain."""
    undone = _undone(text)
    # Signs of English and Western Europe; of others two in a row, as one could be an accented letter and closing quotes
    sure = r"[\x80-\xff\u2000-\u2bff\U00010000-\U0010ffff]|[\u0100-\u07ff]{2}|[\u0800-\uffff]{2}"
    return (repaired(undone) or undone) if undone and re.search(sure, undone) else None


def _is_utf8(file: Path | str) -> bool:
    """Whether training could decode a captions file, as it can those of shards."""
    try:
        return isinstance(file, str) or bool(read_text(file))
    except UserError:
        return False


def _undone(text: str) -> str | None:
    """A text written as Windows-1252 and read as UTF-8; None where it cannot be."""
    try:
        return text.translate(_TO_BYTES).encode("latin-1").decode()
    except UnicodeError:
        return None


_CP1252 = {byte: bytes([byte]).decode("cp1252", "ignore") for byte in range(0x80, 0xA0)}
_TO_BYTES = {ord(character): byte for byte, character in _CP1252.items() if character}


# ---- the parts of the examination


def _examine_splits(report: Report, path: Path, cfg: CFG) -> None:
    """Give report.table its splits. Rows that training would refuse stay in their split, or are left out."""
    rows = report.table
    two = pd.Series(False, rows.index)
    if "split" in rows:
        given = rows["split"].fillna("").astype(str).str.strip()
        rows = rows.assign(split=given.str.lower().map(SPLIT_OF_NAME))
        unknown = rows["split"].isna()
        report.add("unknown_split", rows[unknown].assign(split=""), given.map("split {!r}".format))
        rows = rows[~unknown]
        two = rows.groupby("image")["split"].transform("nunique") > 1
        report.add("two_splits", rows[two])
    kept = rows[:0] if two.all() else assign_splits(rows[~two], path, cfg)
    report.add("unlisted", rows[~two].drop(kept.index).drop_duplicates("image").assign(caption=""))
    report.table = pd.concat([kept, rows[two]]).sort_index().reset_index(drop=True)


def _examine_captions(report: Report, cfg: CFG, tokenizer: PreTrainedTokenizerBase | None) -> None:
    table, captions, words = report.table, report.table["caption"], plain_words(report.table["caption"])
    report.add("repeated", table[table.assign(words=words).duplicated(["image", "words"])])
    several = table.groupby(words)["image"].transform("nunique")
    report.add("shared", table[(several > 1) & ~words.duplicated()], several.map("{:,} images".format))
    odd = captions[captions.str.contains(r"[^\x00-\x7f]")]
    details = odd.map(lambda text: f"meant: {fixed}" if (fixed := repaired(text)) else None)
    details[odd.str.contains(r"[�\x80-\x9f]|â€|Ã[^\w\s]") & details.isna()] = "characters are wrong or lost"
    report.add("encoding", table.loc[details.dropna().index], details)
    limit = min(cfg.max_length, tokenizer.model_max_length) if tokenizer else cfg.max_length
    # A token has at least one byte, and two tokens begin and end the caption
    candidates = captions[captions.map(str.encode).map(len) > limit - 2].drop_duplicates().tolist()
    if candidates:
        try:
            tokenizer = tokenizer or build_tokenizer(cfg)
            counts, about = map(len, tokenizer(candidates, verbose=False)["input_ids"]), "{}"
        except UserError:  # no tokenizer here: each word and mark is at least one token
            counts, about = (len(re.findall(r"\w+|[^\w\s]", text)) + 2 for text in candidates), "at least {}"
        tokens = captions.map(dict(zip(candidates, counts, strict=True)))
        long = tokens[tokens > limit].astype(int)
        report.add("long", table.loc[long.index], long.map(f"{about} tokens, of which {limit} are used".format))


def _look(path: Path) -> dict:
    """The fault of an image file, or its format, width, height and signature."""
    try:
        with open_image(path) as file:
            form, pixels = file.format, load_image(file)
        return {"form": form, "width": pixels.shape[1], "height": pixels.shape[0]} | signature(pixels)
    except Exception as error:  # decoders raise OSError, ValueError, SyntaxError and classes of their own
        fault = fault_of(path, error)
        if "cannot identify image file" in fault:  # PIL's message, which repeats the path
            what = "no image"
            with contextlib.suppress(OSError), open(path, "rb") as file:  # not in a shard
                what = {b"<": "a web page", b"": "empty"}.get(file.read(1), what)
            fault = f"cannot be decoded (the file is {what})"
        return {"fault": fault}


def _examine_images(report: Report, progress: bool) -> pd.DataFrame:
    """Decode all distinct images in threads; returns the rows and `_look` of those that can be read."""
    from tqdm import tqdm

    firsts = report.table.drop_duplicates("image").reset_index(drop=True)
    with warnings.catch_warnings(), ThreadPoolExecutor(os.cpu_count() or 1) as pool:  # decoders release the GIL
        warnings.simplefilter("ignore", Image.DecompressionBombWarning)
        looks = pool.map(_look, [report.folder / name for name in firsts["image"]])
        bar = tqdm(looks, "Examining images", len(firsts), disable=not progress, unit=" images", leave=False)
        columns = ["fault", "form", "width", "height", "digest", "phash", "thumbnail"]
        firsts = firsts.join(pd.DataFrame(bar, columns=columns, dtype=object))
    names, on_disk = set(firsts["image"]), []
    with contextlib.suppress(UserError):  # shards at a URL, or no image at all
        on_disk = images_below(report.folder)
    bad, good = firsts[firsts["fault"].notna()], firsts[firsts["fault"].isna()]
    missing, truncated = bad["fault"] == "no such file", bad["fault"].str.lower().str.contains("truncated")
    other_case = {name.lower(): f"no such file, but {name}" for name in on_disk}
    report.add(
        "missing", bad[missing], [other_case.get(name.lower(), "no such file") for name in bad["image"][missing]]
    )
    report.add("truncated", bad[truncated], bad["fault"])
    report.add("corrupt", bad[~missing & ~truncated], bad["fault"])
    sizes = good["width"].map("{:,} x ".format) + good["height"].map("{:,} pixels".format)
    report.add("tiny", good[good[["width", "height"]].min(axis=1) < TINY], sizes)
    report.add("huge", good[good["width"] * good["height"] > HUGE], sizes)
    forms = Image.registered_extensions() | {".jpg": "JPEG", ".heic": "HEIF"}
    expected = good["image"].map(lambda name: forms.get(Path(name).suffix.lower()))
    wrong = expected != good["form"].replace("MPO", "JPEG")  # MPO: several JPEGs in one, as cameras write them
    report.add("extension", good[wrong], "the content is " + good["form"].astype(str))
    report.add("unused", pd.DataFrame({"image": [name for name in on_disk if name not in names]}))
    report.images = good.set_index("image")[["width", "height"]].astype(int)
    return good


def _examine_pairs(report: Report, good: pd.DataFrame) -> None:
    """Find equal and nearly equal images among those that can be read."""
    if good.empty:
        return
    pairs = duplicate_pairs(
        good["digest"], good["phash"].to_numpy(np.uint64), np.stack(good["thumbnail"]), good["split"]
    )
    one, other = (good.iloc[pairs[side]].reset_index(drop=True) for side in ("first", "second"))
    across = one["split"] != other["split"]
    detail = ("hashes differ in " + pairs["bits"].astype(str) + " of 64 bits").mask(pairs["exact"], "equal pixels")
    detail = detail.mask(across, detail + ": " + one["split"] + " and " + other["split"])
    rows = one.assign(other=other["image"], caption=one["caption"] + " / " + other["caption"])
    report.add("leaks", rows[across], detail)
    report.add("duplicates", rows[~across & pairs["exact"]], detail)
    report.add("near_duplicates", rows[~across & ~pairs["exact"]], detail)
