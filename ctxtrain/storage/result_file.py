"""Write the result of a command to standard output, atomically to a file, or to a pipe or device."""

from __future__ import annotations

import errno
import os
import time
from pathlib import Path
from typing import IO

from ctxtrain.storage.atomic_files import annotate_write_errors, scratch_path, write_bytes
from ctxtrain.streams import write_stdout

STANDARD_OUTPUT = Path("-")
READER_WAIT = 20  # tenths of a second to wait for the reader of a pipe


def check_writable(path: Path) -> None:
    """Raise WriteFailed if `replace_atomically` would fail at once, for example without write permission."""
    with annotate_write_errors(path, 0):
        scratch = scratch_path(path)
        scratch.open("xb").close()
        scratch.unlink()


def write_result(path: Path | None, content: bytes) -> None:
    if path is None or path == STANDARD_OUTPUT:
        write_stdout(content)
    elif path.exists() and not path.is_file():  # write to a pipe or a device, do not replace it
        with _open_special(path) as stream:
            stream.write(content)
    else:
        write_bytes(path.resolve(), content)  # keep a symbolic link, replace its target


def _open_special(path: Path) -> IO[bytes]:
    """Open a pipe or a device for writing. Raises OSError if no reader opens the pipe within 2 seconds."""
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
