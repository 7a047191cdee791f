"""One process to a run folder.

The lock is one of the operating system's, on `run.lock`: it goes with the process, however that ends, and its worker
processes do not hold it. The file says who has it.
"""

import fcntl
import os
import socket
from pathlib import Path

from performer_lm.writing import open_plain


class RunLock:
    """Hold a run's folder until `release`.

    Args:
        folder: of the run; it must exist.

    Raises:
        ValueError: where another process has it, naming process and host.
        OSError: where the file cannot be made.
    """

    def __init__(self, folder: Path) -> None:
        self.path = folder / "run.lock"
        while True:
            self._handle = open_plain(self.path, os.O_RDWR | os.O_CREAT)
            try:
                fcntl.lockf(self._handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError as error:
                owner = os.read(self._handle, 200).decode(errors="replace").strip()
                os.close(self._handle)
                raise ValueError(f"{folder} is in use by {owner or f'another process ({error.strerror})'}") from error
            if self._stands():
                break
            os.close(self._handle)  # its holder has just deleted it
        os.ftruncate(self._handle, 0)
        os.write(self._handle, f"process {os.getpid()} on {socket.gethostname()}\n".encode())

    def release(self) -> None:
        """Let the folder go."""
        if self._handle >= 0:
            self.path.unlink(missing_ok=True)
            os.close(self._handle)
            self._handle = -1

    def _stands(self) -> bool:
        try:
            return os.lstat(self.path).st_ino == os.fstat(self._handle).st_ino
        except FileNotFoundError:
            return False
