"""Rows of tokens -> one micro-batch: shifted targets, documents kept apart, padding without loss.

Legend: B rows of a micro-batch, T = seq_len, W = T + 1 tokens of a window, D documents.
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
    num_rows, row_len = tokens_BT.shape
    begins = np.zeros(
        num_rows * row_len + 1, bool
    )  # documents are long: work on their starts, not on every token
    begins[1:] = (tokens_BT == eos_id).ravel()
    begins[:-1:row_len] = True  # a row may begin inside a document; what came before it is out of sight
    start_D = np.flatnonzero(begins[:-1])
    length_D = np.diff(start_D, append=tokens_BT.size)
    first_B = np.searchsorted(start_D, np.arange(0, tokens_BT.size, row_len))
    number_D = np.arange(len(start_D)) - first_B[start_D // row_len]
    positions_BT = np.arange(tokens_BT.size) - np.repeat(start_D, length_D)
    documents_BT = np.repeat(number_D.astype(np.int32), length_D)
    return positions_BT.reshape(tokens_BT.shape), documents_BT.reshape(tokens_BT.shape)


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
