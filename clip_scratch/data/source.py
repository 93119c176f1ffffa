"""The opened data set of a run: its caption table, where its images are, and which of them can be used."""

import dataclasses
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..config import CFG
from .captions import check_images, read_table, split_of
from .image_cache import decoded_before
from .locate import existing_folder, find_images, locate


@dataclass
class DataSource:
    """`table` is the caption table; in `cfg` image_path is set, so that the folder is not searched again."""

    cfg: CFG
    table: pd.DataFrame
    image_folder: Path

    @property
    def name(self) -> str:
        """The data set's name in messages."""
        return self.cfg.captions_path or "the built-in data set"

    def split(self, name: str) -> pd.DataFrame:
        """The rows of "train", "valid" or "test". Raises UserError where there are none."""
        return split_of(self.table, name, self.cfg.captions_path)


def open_data(cfg: CFG, known: Collection[str] = ()) -> DataSource:
    """Read the captions of `cfg`, find the image folder and check that every image can be decoded.

    Those in `known` were decoded before. Bad ones raise UserError, or are left out where cfg.on_bad_image is "skip".
    """
    cfg = cfg() if isinstance(cfg, type) else cfg
    located = locate(cfg)
    table = read_table(located, cfg)
    folder = located.images or (existing_folder(cfg.image_path) if cfg.image_path else find_images(located, table))
    known = {*known, *(decoded_before(folder, cfg) if cfg.image_cache else ())}
    if "decodes" in table:  # shards are checked when they are read first
        known |= set(table["image"][table.pop("decodes")])
    table = check_images(table, folder, cfg.on_bad_image, known=known)
    return DataSource(dataclasses.replace(cfg, image_path=str(folder)), table, folder)
