"""Rows of tokens -> one micro-batch: shifted targets, documents kept apart, padding without loss.

Legend: B rows of a micro-batch, T = seq_len, W = T + 1 tokens of a window.
"""

from dataclasses import dataclass

import numpy as np
import torch
import xxhash
from torch import Tensor

IGNORE = -100  # target that carries no loss; the ignore_index of torch's cross entropy


@dataclass
class Micro:
    """One micro-batch of this rank, on the CPU; rows that only fill it up have IGNORE targets.

    tokens_BT, targets_BT: int64. positions_BT (int64, place inside the document) and documents_BT (int32,
    number of the document in its row) keep attention inside a document; None: plain causal attention over
    the row. num_items: targets that carry loss. rows_hash: sum mod 2^64 of xxh3_64 over the int64 bytes of
    every real row of `tokens_BT`, so the sum over micro-batches and ranks names the global batch however it
    was split.
    """

    tokens_BT: Tensor
    targets_BT: Tensor
    positions_BT: Tensor | None
    documents_BT: Tensor | None
    num_items: int
    rows_hash: int


def document_layout(tokens_BT: np.ndarray, eos_id: int) -> tuple[np.ndarray, np.ndarray]:
    """(positions_BT int64, documents_BT int32) from the EOS that ends each document."""
    ends_BT = tokens_BT == eos_id
    begins_BT = np.zeros_like(ends_BT)
    begins_BT[:, 1:] = ends_BT[:, :-1]
    documents_BT = np.cumsum(begins_BT, axis=1, dtype=np.int32)
    place_T = np.arange(tokens_BT.shape[1], dtype=np.int64)
    return place_T - np.maximum.accumulate(np.where(begins_BT, place_T, 0), axis=1), documents_BT


def make_micro(
    window_BW: np.ndarray, num_targets_B: np.ndarray, *, eos_id: int, document_mask: bool, num_rows: int
) -> Micro:
    """A micro-batch from windows of T + 1 tokens; only the first `num_rows` rows are real.

    num_targets_B: real targets of each row (T, fewer where padding begins, 0 for a row that is not real).
    document_mask: also drop the target that an EOS would predict, the first token of an unrelated document.
    """
    tokens_BT = window_BW[:, :-1].astype(np.int64)
    targets_BT = window_BW[:, 1:].astype(np.int64)
    num_items = int(num_targets_B.sum())
    for row in np.flatnonzero(num_targets_B < targets_BT.shape[1]):
        targets_BT[row, num_targets_B[row] :] = IGNORE
    positions_BT = documents_BT = None
    if document_mask:
        positions_BT, documents_BT = document_layout(tokens_BT, eos_id)
        targets_BT[tokens_BT == eos_id] = IGNORE
        num_items = int(np.count_nonzero(targets_BT != IGNORE))
    rows_hash = sum(xxhash.xxh3_64_intdigest(row.data) for row in tokens_BT[:num_rows])
    return Micro(
        torch.from_numpy(tokens_BT),
        torch.from_numpy(targets_BT),
        None if positions_BT is None else torch.from_numpy(positions_BT),
        None if documents_BT is None else torch.from_numpy(documents_BT),
        num_items,
        rows_hash & (1 << 64) - 1,
    )
