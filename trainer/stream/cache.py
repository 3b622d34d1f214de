"""The node's cache of remote shards: sparse files that jobs, and users, share without a lock.

The name of a file comes from the whole URL of the shard and its hash, so equal file names of two sources, or
of two versions of one, never meet. Who comes first makes the file; everybody who may write to it fetches
blocks into it. A user who may not (it belongs to another one) keeps a file of his own beside it, and takes
the blocks that are in the other one from there: a copy on this node instead of a fetch. Copied and not
mapped, because the owner may cut his file at any time, and a map of it would then kill this process.
"""

import errno
import hashlib
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from trainer.errors import UserError

NOT_OURS = (errno.EACCES, errno.EPERM, errno.ELOOP)
FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


@dataclass
class CachedFile:
    """An open file of the cache that may be written; neighbour: the other user's file for the same shard."""

    path: Path
    handle: int
    neighbour: Path | None

    def write(self, data: bytes, start: int) -> None:
        # Not through the map: a page of a sparse file for which the disk has no room would be a SIGBUS.
        with cache_errors(self.path):
            while data:
                written = os.pwrite(self.handle, data, start)
                data, start = data[written:], start + written

    def copy_from_neighbour(self, start: int, count: int) -> bool:
        """Copy a block that may or may not be there; True: the hash is to be looked at."""
        assert self.neighbour is not None
        try:
            with open(self.neighbour, "rb", buffering=0) as file:
                data = os.pread(file.fileno(), count, start)
        except OSError:  # private, or tidied away: the block is fetched
            return True
        if any(data):  # a hole would only take room
            self.write(data, start)
        return True


class NodeCache:
    """A directory of the node; `open` makes it and the file as needed."""

    def __init__(self, directory: str):
        self.directory = Path(directory).expanduser()

    def path(self, identity: str) -> Path:
        """The file that stands for what `identity` names."""
        return self.directory / f"{hashlib.sha256(identity.encode()).hexdigest()[:40]}.tar"

    def open(self, path: Path, size: int) -> CachedFile:
        """The file at `path`, or one of our own beside it, open for reading and writing and `size` long."""
        with cache_errors(path):
            self._make_directory()
            cached = self._open(path)
            if cached is None:
                neighbour, path = path, path.with_name(f"{path.stem}-{os.geteuid()}.tar")
                cached = self._open(path)
                if cached is None:
                    raise UserError(
                        f"{path}: belongs to another user: delete it or choose another data.cache_dir"
                    )
                cached.neighbour = neighbour
            try:
                if os.fstat(cached.handle).st_size < size:
                    os.ftruncate(cached.handle, size)
            except OSError:
                os.close(cached.handle)
                raise
            return cached

    def _open(self, path: Path) -> CachedFile | None:
        """None: the file belongs to another user, and may not be written."""
        while True:
            try:
                # Without O_CREAT first: in a directory like /tmp the kernel refuses that flag on files of
                # others (fs.protected_regular), even to root. Never through a link: others may put some here.
                return CachedFile(path, os.open(path, os.O_RDWR | os.O_NOFOLLOW), None)
            except FileNotFoundError:
                pass
            except OSError as error:
                if error.errno in NOT_OURS:
                    return None
                raise
            try:
                return CachedFile(path, os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666), None)
            except FileExistsError:
                continue  # somebody was faster: it is his

    def _make_directory(self) -> None:
        """In a directory for all users (/tmp, a scratch disk) the cache is for all users, too."""
        if self.directory.is_dir():
            return
        missing = [self.directory, *(p for p in self.directory.parents if not p.exists())]
        for directory in reversed(missing):
            parent = directory.parent.stat().st_mode
            directory.mkdir(exist_ok=True)
            ours = directory.stat().st_uid == os.geteuid()  # another user may have been faster
            if ours and parent & stat.S_ISVTX and parent & stat.S_IWOTH:
                directory.chmod(0o1777)  # the umask would take the bits from mkdir


@contextmanager
def cache_errors(path: Path) -> Iterator[None]:
    """A full disk and a closed directory are the user's to mend: one line that names the key."""
    try:
        yield
    except OSError as error:
        if error.errno in FULL:
            fix = "make room, or set data.cache_dir to a larger disk; what was fetched is kept"
        elif error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            fix = "open the directory to all who share it (chmod 1777), or set data.cache_dir to one of yours"
        else:
            raise
        raise UserError(f"{path}: the cache cannot be written ({error.strerror}): {fix}") from error
