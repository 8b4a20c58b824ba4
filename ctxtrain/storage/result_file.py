"""Where a command's result goes: standard output, a file that appears whole, or a pipe or device that is written to."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import IO

from ctxtrain.storage.atomic_files import needing, scratch_for, write_bytes
from ctxtrain.streams import write_out

STANDARD_OUTPUT = Path("-")
READER_WAIT = 20  # tenths of a second for a pipe's reader to come


def try_to_write(path: Path) -> None:
    """Raises WriteFailed if `replacing` could not begin, as for want of access or for a name too long."""
    with needing(path, 0):
        scratch = scratch_for(path)
        scratch.open("xb").close()
        scratch.unlink()


def write_result(path: Path | None, content: bytes) -> None:
    if path is None or path == STANDARD_OUTPUT:
        write_out(content)
    elif path.exists() and not path.is_file():  # a pipe or a device: it is written to, not replaced
        with _open_special(path) as stream:
            stream.write(content)
    else:
        write_bytes(path.resolve(), content)  # a link stays, and what it names is replaced


def _open_special(path: Path) -> IO[bytes]:
    """A pipe or a device, for writing. Raises OSError for a pipe that nobody opens to read for a while."""
    for _ in range(READER_WAIT):
        try:
            descriptor = os.open(path, os.O_WRONLY | os.O_NONBLOCK)
        except OSError as error:
            if error.errno != errno.ENXIO:
                raise
            time.sleep(0.1)
        else:
            os.set_blocking(descriptor, True)
            return os.fdopen(descriptor, "wb")
    raise OSError(errno.ENXIO, "nothing reads this pipe", str(path))
