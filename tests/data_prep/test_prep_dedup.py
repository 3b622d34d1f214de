"""Exact duplicates: the same documents stay whatever the tasks, their order and the number of cells."""

import hashlib
from pathlib import Path

from data_prep.dedup import cell_of, document_files, exact_dedup, num_cells
from data_prep.files import jsonl_writer, read_jsonl

TEXTS = [f"text {number % 70}" for number in range(200)]


def rows() -> list[dict]:
    return [
        {
            "id": f"id-{number:03d}",
            "url": f"https://example.org/{(number * 37) % 200}",
            "sha256": hashlib.sha256(text.encode()).hexdigest(),
            "text": text,
            "source": {"file": "a", "offset": number},
        }
        for number, text in enumerate(TEXTS)
    ]


def run(tmp_path: Path, name: str, order: list[dict], tasks: int, cell_bytes: int) -> tuple[list[dict], dict]:
    sources = []
    for task in range(tasks):
        path = tmp_path / f"{name}-{task}.jsonl.zst"
        with jsonl_writer(path) as out:
            for row in order[task::tasks]:
                out.write(row)
        sources.append(path)
    out_dir = tmp_path / name
    out_dir.mkdir()
    result = exact_dedup(sources, sum(len(text) for text in TEXTS), cell_bytes, out_dir)
    return [row for file in document_files(out_dir) for row in read_jsonl(file)], result


def test_result_does_not_depend_on_tasks_order_or_cells(tmp_path: Path) -> None:
    expected, counts = run(tmp_path, "one", rows(), 1, 1 << 20)
    assert counts == {
        "documents": 70,
        "text_bytes": sum(len(t) for t in set(TEXTS)),
        "dropped": 130,
        "files": 1,
    }
    assert len({row["text"] for row in expected}) == 70
    assert run(tmp_path, "reverse", rows()[::-1], 1, 1 << 20)[0] == expected
    assert run(tmp_path, "tasks", rows(), 7, 1 << 20)[0] == expected
    many, counts = run(tmp_path, "cells", rows()[::-1], 3, 100)
    assert many == expected
    assert counts["files"] > 4


def test_the_copy_with_the_least_address_stays(tmp_path: Path) -> None:
    for row in run(tmp_path, "least", rows(), 2, 1 << 20)[0]:
        assert row["url"] == min(other["url"] for other in rows() if other["text"] == row["text"])


def test_cells_follow_the_order_of_the_hashes() -> None:
    hashes = sorted(hashlib.sha256(bytes([number])).hexdigest() for number in range(256))
    cells = [cell_of(sha256, 16) for sha256 in hashes]
    assert cells == sorted(cells)
    assert set(cells) == set(range(16))
    assert num_cells(0, 100) == 1
    assert num_cells(1000, 100) == 16
