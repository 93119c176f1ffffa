"""Captions -> token ids: tokenized once and packed without padding; batches are padded to their longest caption."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ..config import CFG
from ..errors import UserError
from ..hub import is_function, load_pretrained, local_path

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

TRAINED = "train"  # text_tokenizer="train": a WordPiece vocabulary learned from the training captions
_VOCABULARY = 8192
_LETTERS = 1000  # largest alphabet; rarer letters are unknown


def build_tokenizer(cfg: CFG, captions: Sequence[str] = ()) -> PreTrainedTokenizerBase:
    """The text encoder's own tokenizer; for random weights without the hub, one trained on `captions`.

    Raises UserError where a pretrained tower's tokenizer is available neither locally nor from the hub.
    """
    from transformers import AutoTokenizer

    if not cfg.text_tokenizer and is_function(cfg.text_encoder_model):
        fix = "Set --text-tokenizer to one, or to train"
        raise UserError(f"text_tokenizer: {cfg.text_encoder_model} has no tokenizer. {fix}")
    name = cfg.text_tokenizer or cfg.text_encoder_model
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


def tokenize(captions: Sequence[str], tokenizer: PreTrainedTokenizerBase, max_length: int) -> TokenTable:
    """Tokenize every caption; those longer than `max_length` tokens are truncated and counted."""
    limit = min(max_length, tokenizer.model_max_length)
    rows = tokenizer(list(captions), verbose=False)["input_ids"] if captions else []
    long = [i for i, ids in enumerate(rows) if len(ids) > limit]
    if long:  # the tokenizer keeps the special tokens at the end
        cut = tokenizer([captions[i] for i in long], truncation=True, max_length=limit)["input_ids"]
        for i, ids in zip(long, cut, strict=True):
            rows[i] = ids
    starts = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)])
    ids = np.concatenate([np.asarray(row, dtype=np.int32) for row in rows]) if rows else np.empty(0, np.int32)
    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else 0
    return TokenTable(ids, starts, pad_id, truncated=len(long))
