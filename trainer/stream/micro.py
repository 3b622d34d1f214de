"""Rows of tokens -> micro-batches: shifted targets, documents kept apart, padding without loss.

Legend: B rows of a micro-batch, N rows of this rank, T = seq_len, W = T + 1 tokens of a window, D documents,
E places of EOS.
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


def document_layout(tokens_NT: np.ndarray, ends_E: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """(positions_NT int64, documents_NT int32) from the flat places of the EOS that end the documents."""
    num_rows, row_len = tokens_NT.shape
    begins = np.zeros(tokens_NT.size + 1, bool)
    begins[ends_E + 1] = True
    begins[:-1:row_len] = True  # a row may begin inside a document; what came before it is out of sight
    start_D = np.flatnonzero(begins[:-1])
    first_N = np.searchsorted(start_D, np.arange(num_rows) * row_len)
    number_D = np.arange(len(start_D)) - first_N[start_D // row_len]
    # Sums over changes at the starts only: three times as fast as repeating a value for every token.
    positions = np.ones(tokens_NT.size, np.int64)
    positions[start_D] = 1 - np.diff(start_D, prepend=-1)
    positions[0] = 0
    documents = np.zeros(tokens_NT.size, np.int32)
    documents[start_D] = np.diff(number_D, prepend=0)
    np.cumsum(positions, out=positions)
    np.cumsum(documents, out=documents)
    return positions.reshape(tokens_NT.shape), documents.reshape(tokens_NT.shape)


def make_micros(
    window_NW: np.ndarray,
    num_targets_N: np.ndarray,
    *,
    micro_batch: int,
    num_rows: int,
    eos_id: int,
    document_mask: bool,
) -> list[Micro]:
    """Cut windows of T + 1 tokens into micro-batches; only the first `num_rows` of the N rows are real.

    num_targets_N: real targets of each row (T, fewer where padding begins, 0 for a row that is not real).
    document_mask: also drop the target that an EOS would predict, the first token of an unrelated document.
    Micro-batches are contiguous parts of one array each: converting all rows at once costs half.
    """
    tokens_NT = window_NW[:, :-1].astype(np.int64)
    targets_NT = window_NW[:, 1:].astype(np.int64)
    row_len = tokens_NT.shape[1]
    num_items_N = num_targets_N.copy()
    for row in np.flatnonzero(num_targets_N < row_len):
        targets_NT[row, num_targets_N[row] :] = IGNORE
    positions_NT = documents_NT = None
    if document_mask:
        ends_E = np.flatnonzero((window_NW[:, :-1] == eos_id).ravel())
        positions_NT, documents_NT = document_layout(tokens_NT, ends_E)
        targets_NT.ravel()[ends_E] = IGNORE
        row_E, place_E = np.divmod(ends_E, row_len)
        num_items_N -= np.bincount(row_E[place_E < num_targets_N[row_E]], minlength=len(num_items_N))
    micros = []
    for begin in range(0, len(tokens_NT), micro_batch):
        rows = slice(begin, begin + micro_batch)
        real = tokens_NT[begin : min(begin + micro_batch, num_rows)]
        micros.append(
            Micro(
                torch.from_numpy(tokens_NT[rows]),
                torch.from_numpy(targets_NT[rows]),
                None if positions_NT is None else torch.from_numpy(positions_NT[rows]),
                None if documents_NT is None else torch.from_numpy(documents_NT[rows]),
                num_items=int(num_items_N[rows].sum()),
                rows_hash=sum(xxhash.xxh3_64_intdigest(row.data) for row in real) & (1 << 64) - 1,
            )
        )
    return micros
