"""Whole processes as a user starts them: what they say, and the most memory that they had."""

import gc
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

from ldm.errors import MachineError
from ldm.machine import give_back_freed_memory

CLEAR = Path("/proc/self/clear_refs")  # 5 in it: the peak begins anew
# Linux counts the memory of who starts a process as that process's own until it runs, so a small one starts it.
STARTER = """
import os, sys
quiet = [(os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0)]
child = os.posix_spawn(sys.argv[1], sys.argv[1:], os.environ, file_actions=quiet)
_, status, used = os.wait4(child, 0)
print(used.ru_maxrss)
sys.exit(max(0, os.waitstatus_to_exitcode(status)) or int(status != 0))
"""


def ended(command: Sequence[str]) -> tuple[str, int]:
    """Run a process to its end; what it said on stderr, and its peak of resident memory in bytes.

    Raises MachineError where it fails.
    """
    with tempfile.TemporaryFile() as errors:
        starter = [sys.executable, "-I", "-S", "-c", STARTER, *command]
        done = subprocess.run(starter, stdout=subprocess.PIPE, stderr=errors, env=os.environ, check=False)
        errors.seek(0)
        said = errors.read().decode(errors="replace")
    if done.returncode:
        last = said.strip().splitlines()[-1:]
        raise MachineError(f"benchmark: a process ended with exit code {done.returncode}: {last}; run it by itself")
    return said, int(done.stdout) * (1 if sys.platform == "darwin" else 1024)


def memory_beside(work: Callable[[], object]) -> int:
    """The most bytes that this process had at once while it worked, beside what it has before."""
    if not CLEAR.exists():
        raise MachineError("benchmark: only Linux forgets how much memory a process once had; leave this part out")
    gc.collect()
    give_back_freed_memory()  # or the work would find room that counts as there before
    before = status("VmRSS")
    CLEAR.write_text("5")
    work()
    return status("VmHWM") - before


def status(name: str) -> int:
    """A number of bytes that Linux knows of this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{name}:"))
