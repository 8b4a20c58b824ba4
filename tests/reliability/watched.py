"""Open files that may be hostile while every call that could do harm is written down; run as a script.

    python watched.py WHAT SCRATCH GOOD FILE…      one JSON line a file: its outcome, and what it did

WHAT is checkpoint, unpack or model. GOOD is a file of the kind that is sound: opening it first brings in what the
libraries load late. Nothing may be written but below SCRATCH, nothing run, no socket opened. More than two seconds of
processor time for a file ends it.
"""

import json
import os
import signal
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from types import FrameType

HARM: tuple[str, ...] = ("os.system", "os.exec", "os.fork", "os.posix_spawn", "os.spawn", "os.kill", "os.putenv")
HARM += ("subprocess.Popen", "socket.", "ctypes.", "pty.spawn", "webbrowser.open", "urllib.", "ftplib.", "http.client.")
HARM += ("pickle.find_class", "marshal.load", "code.__new__", "sys.addaudithook", "exec", "compile")
HARM += ("os.chmod", "os.link", "os.symlink", "os.truncate")
WRITES = {"open", "os.remove", "os.rename", "os.mkdir", "os.rmdir", "shutil.rmtree", "shutil.move"}

done: list[str] = []
wrote: list[str] = []
watching: list[bool] = []


def opener(what: str, scratch: Path) -> Callable[[Path], object]:
    if what == "checkpoint":
        from ctxtrain.storage import checkpoint

        return checkpoint.load
    if what == "unpack":
        from ctxtrain.storage.archive import unpack

        return lambda path: unpack(path, scratch / "unpacked")
    from ctxtrain.export.predictor import load_model

    return load_model


def watch(scratch: str) -> None:
    def hook(event: str, arguments: tuple[object, ...]) -> None:
        if not watching:
            return
        if event in WRITES:
            where = str(arguments[0])
            writes = event != "open" or changes(arguments[1], arguments[2])
            if writes and where != os.devnull:
                (wrote if where.startswith(scratch) else done).append(f"{event} {where}")
        elif event.startswith(HARM) and not of_a_library(event, arguments):
            done.append(f"{event} {str(arguments)[:200]}")

    sys.addaudithook(hook)


def of_a_library(event: str, arguments: tuple[object, ...]) -> bool:
    """Code that is installed, which a library has put off to import: its source, its bytecode, or what is in them."""
    if event == "marshal.loads":
        caller = sys._getframe(2)  # of the hook
        imports = caller.f_code.co_filename == "<frozen importlib._bootstrap_external>"
        where = caller.f_locals.get("bytecode_path", "") if imports else ""
    elif event == "compile":
        where = arguments[1]
    elif event == "exec":
        where = getattr(arguments[0], "co_filename", "")
    else:
        return False
    if isinstance(where, bytes):
        where = os.fsdecode(where)
    return str(where).startswith((sys.prefix, sys.base_prefix))


def changes(mode: object, flags: object) -> bool:
    if isinstance(mode, str):
        return bool(set(mode) & set("wax+"))
    return isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))


class TooLong(BaseException):
    """No Exception, so that nothing on the way takes it for a fault of the file."""


def too_long(_number: int, _frame: FrameType | None) -> None:
    raise TooLong("more than 2 s of processor time")


def main(what: str, scratch: str, good: str, *paths: str) -> None:
    from ctxtrain.errors import DataError

    tempfile.tempdir = scratch
    load = opener(what, Path(scratch))
    watch(scratch)
    signal.signal(signal.SIGPROF, too_long)
    for number, path in enumerate([good, *paths]):
        done.clear()
        done.clear()
        wrote.clear()
        signal.setitimer(signal.ITIMER_PROF, 60 if number == 0 else 2)
        watching[:] = [True] * (number > 0)
        try:
            load(Path(path))
            outcome = "opened"
        except DataError as error:
            outcome = f"DataError: {error}"
        except BaseException as error:  # noqa: BLE001  # the test reads what it was
            outcome = f"{type(error).__name__}: {error}"
        watching.clear()
        signal.setitimer(signal.ITIMER_PROF, 0)
        status = Path("/proc/self/status").read_text(encoding="utf-8")  # ru_maxrss begins with the parent's peak
        peak = int(status.partition("VmHWM:")[2].split()[0]) >> 10
        report = {"path": path, "outcome": outcome, "done": done, "wrote": wrote, "peak_mb": peak}
        sys.stdout.write(json.dumps(report) + "\n")


if __name__ == "__main__":
    main(*sys.argv[1:])
