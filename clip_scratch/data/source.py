"""The opened data set of a run: its caption table, where its images are, and which of them can be used."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import pandas as pd

from ..config import CFG
from .captions import check_images, image_folder, read_captions, split_of
from .image_cache import decoded_before


@dataclass
class DataSource:
    """`table` is the caption table; `cfg` are the settings with `image_path` set to the folder that was found."""

    cfg: CFG
    table: pd.DataFrame
    image_folder: Path

    @property
    def name(self) -> str:
        """What messages call the data set."""
        return self.cfg.captions_path or "the built-in data set"

    def split(self, name: str) -> pd.DataFrame:
        """The rows of "train", "valid" or "test". Raises UserError where there are none."""
        return split_of(self.table, name, self.cfg.captions_path)


def open_data(cfg: CFG) -> DataSource:
    """Read the captions of `cfg`, find its image folder and check that every image can be decoded.

    Bad images raise UserError, or are left out where cfg.on_bad_image is "skip".
    """
    table = read_captions(cfg)
    folder = image_folder(cfg, table)
    known = decoded_before(folder, cfg) if cfg.image_cache else ()
    table = check_images(table, folder, cfg.on_bad_image, known=known)
    return DataSource(dataclasses.replace(cfg, image_path=str(folder)), table, folder)
