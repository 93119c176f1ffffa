"""Captions -> token ids: tokenized once and packed without padding; batches are padded to their longest caption."""

from __future__ import annotations

import contextlib
import hashlib
import json
import zipfile
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from ..config import CFG
from ..errors import UserError
from ..files import cache_folder, write_atomically
from ..hub import is_function, load_pretrained, local_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

TRAINED = "train"  # text_tokenizer="train": a WordPiece vocabulary learned from the training captions
_VOCABULARY = 8192
_LETTERS = 1000  # largest alphabet; rarer letters are unknown
_FORMAT = 1  # of cached tokens: a new number leaves the old ones unused
_MANY = 10_000  # captions from which tokens are cached: fewer take less than half a second


def build_tokenizer(cfg: CFG, captions: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """The text encoder's own tokenizer; for random weights without the hub, one trained on `captions`.

    Raises UserError where a pretrained tower's tokenizer is available neither locally nor from the hub.
    """
    from transformers import AutoTokenizer

    own = cfg.model_name if cfg.backend == "hf_clip" else cfg.text_encoder_model
    if not cfg.text_tokenizer and is_function(own):
        fix = "Set --text-tokenizer to one, or to train"
        raise UserError(f"text_tokenizer: {own} has no tokenizer. {fix}")
    name = cfg.text_tokenizer or own
    if name == TRAINED:
        if not len(captions):
            raise UserError("text_tokenizer 'train' learns from the training captions, and there are none")
        return train_tokenizer(captions)
    path = local_path(name, "text_tokenizer")
    or_random = ", or --no-pretrained" if cfg.backend == "from_scratch" and cfg.pretrained else ""
    remedy = f"Give text_tokenizer a local folder{or_random}"
    try:
        tokenizer = load_pretrained(AutoTokenizer, name, "text_tokenizer", "the tokenizer", remedy)
    except UserError:
        if path is not None or cfg.pretrained or cfg.text_tokenizer or not len(captions):
            raise
        return train_tokenizer(captions)
    if not set(tokenizer.get_vocab()) - set(tokenizer.all_special_tokens):  # transformers' fallback
        raise UserError(f"text_tokenizer: {path} holds no tokenizer. Set --text-tokenizer to a folder with one")
    return tokenizer


def train_tokenizer(captions: Sequence[str]) -> PreTrainedTokenizerBase:
    """An uncased WordPiece tokenizer with BERT's special tokens, learned from `captions`."""
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
    from transformers import BertTokenizerFast

    wordpiece = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    wordpiece.normalizer = normalizers.BertNormalizer(lowercase=True)
    wordpiece.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    # The trainer numbers letters in the order of a random hash table and breaks ties by these numbers. Giving it the
    # letters in order makes the vocabulary reproducible.
    letters = Counter(c for text in captions for c in wordpiece.normalizer.normalize_str(text) if not c.isspace())
    inner = sorted(f"##{letter}" for letter, _ in letters.most_common(_LETTERS))
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *inner]
    options = {"vocab_size": _VOCABULARY, "limit_alphabet": _LETTERS, "min_frequency": 2, "show_progress": False}
    trainer = trainers.WordPieceTrainer(special_tokens=special, **options)
    wordpiece.train_from_iterator(captions, trainer)
    return BertTokenizerFast(vocab=wordpiece.get_vocab(), do_lower_case=True)


@dataclass
class TokenTable:
    """Token ids of many captions, packed end to end: caption i is `ids[starts[i]:starts[i + 1]]`."""

    ids: np.ndarray  # int32, (all tokens,)
    starts: np.ndarray  # int64, (captions + 1,)
    pad_id: int
    truncated: int  # number of captions longer than max_length

    def __len__(self) -> int:
        return len(self.starts) - 1

    def lengths(self) -> np.ndarray:
        """Tokens of each caption, (captions,)."""
        return np.diff(self.starts)

    def batch(self, rows: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """These captions, padded to the longest: input_ids and attention_mask, both int64 (C, L)."""
        import torch

        rows = np.asarray(rows, dtype=np.int64)
        lengths = self.starts[rows + 1] - self.starts[rows]
        mask = np.arange(lengths.max())[None, :] < lengths[:, None]  # (C, L)
        input_ids = np.full(mask.shape, self.pad_id, dtype=np.int64)
        input_ids[mask] = np.concatenate([self.ids[self.starts[r] : self.starts[r + 1]] for r in rows])
        return torch.from_numpy(input_ids), torch.from_numpy(mask.astype(np.int64))


def tokenize(
    captions: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int, cfg: CFG | None = None
) -> TokenTable:
    """Tokenize every caption; those longer than `max_length` tokens are truncated and counted.

    With a `cfg` the tokens of 10,000 captions or more are kept in its cache folder, where the next run finds them.
    """
    limit = min(max_length, tokenizer.model_max_length)
    ids, starts = _tokens(captions, tokenizer, cfg if len(captions) >= _MANY else None)
    long = np.flatnonzero(np.diff(starts) > limit)
    if len(long):  # the tokenizer keeps the special tokens at the end
        rows = np.split(ids, starts[1:-1])
        cut = tokenizer([captions[i] for i in long], truncation=True, max_length=limit)["input_ids"]
        for i, own in zip(long, cut, strict=True):
            rows[i] = own
        ids, starts = _packed(rows)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return TokenTable(ids, starts, pad_id, truncated=len(long))


def _tokens(
    captions: Sequence[str], tokenizer: PreTrainedTokenizerBase, cfg: CFG | None
) -> tuple[np.ndarray, np.ndarray]:
    """The ids and starts of whole captions; with a `cfg` from its cache, or into it."""

    def write(temporary: Path) -> None:
        with open(temporary, "wb") as file:
            np.savez(file, ids=ids, starts=starts)

    name = ""
    if cfg and hasattr(tokenizer, "backend_tokenizer"):  # else nothing says all that the ids depend on
        rules = json.loads(tokenizer.backend_tokenizer.to_str()) | {"truncation": None, "padding": None}
        digest = hashlib.sha256(json.dumps([_FORMAT, type(tokenizer).__name__, rules]).encode())
        for caption in captions:
            content = caption.encode("utf-8", "surrogatepass")
            digest.update(len(content).to_bytes(8, "little") + content)
        name = f"tokens-{digest.hexdigest()[:16]}.npz"
        missing = OSError, EOFError, ValueError, KeyError, zipfile.BadZipFile  # or damaged
        with contextlib.suppress(*missing), np.load(cache_folder(cfg) / name) as kept:
            return kept["ids"], kept["starts"]
    ids, starts = _packed(tokenizer(list(captions), verbose=False)["input_ids"] if len(captions) else [])
    if name:
        with contextlib.suppress(OSError):  # without room the next run tokenizes again
            cache_folder(cfg).mkdir(parents=True, exist_ok=True)
            write_atomically(cache_folder(cfg) / name, write)
    return ids, starts


def _packed(rows: Sequence[Sequence[int]]) -> tuple[np.ndarray, np.ndarray]:
    """Token ids end to end, int32, and where each row starts, int64 (rows + 1,)."""
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    return np.concatenate([np.asarray(row, dtype=np.int32) for row in [[], *rows]]), starts
