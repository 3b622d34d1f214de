"""Files and names that are on the disk when the call returns: the leaf under everything that must survive."""

import os
from pathlib import Path


def fsync_directory(directory: Path) -> None:
    """Make a rename or a new name in `directory` durable."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_durably(path: Path, text: str) -> None:
    """Write a new file and bring it to the disk. Not atomic: rename it into place where that matters."""
    with open(path, "w", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
