import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from performer_lm.training.lock import RunLock

HOLD = """
import sys, time
from pathlib import Path
from performer_lm.training.lock import RunLock
RunLock(Path(sys.argv[1]))
print("held", flush=True)
time.sleep(60)
"""


def test_another_process_is_refused_and_told_who_holds_it(tmp_path: Path) -> None:
    child = subprocess.Popen([sys.executable, "-c", HOLD, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert child.stdout is not None
    assert child.stdout.readline() == "held\n"
    with pytest.raises(ValueError, match=f"is in use by process {child.pid} on {socket.gethostname()}"):
        RunLock(tmp_path)
    child.kill()  # with the file left behind
    child.wait()
    child.stdout.close()
    assert (tmp_path / "run.lock").exists()
    lock = RunLock(tmp_path)
    assert f"process {os.getpid()} on" in lock.path.read_text()
    lock.release()
    lock.release()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_cannot_be_written_to_says_so(tmp_path: Path) -> None:
    with pytest.raises(OSError, match="No such file"):
        RunLock(tmp_path / "gone")
