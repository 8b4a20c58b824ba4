"""The command line as a process: every error ends here, in one message on stderr and the exit code of `errors.py`.

A traceback only with --debug.
"""

from __future__ import annotations

import atexit
import errno
import os
import signal
import sys
import time
import traceback
from contextlib import suppress
from typing import NoReturn

from ctxtrain.cli.commands import app
from ctxtrain.errors import EXIT_INTERNAL, EXIT_IO, CtxtrainError, OutOfMemory
from ctxtrain.memory import is_out_of_memory, out_of_memory_message
from ctxtrain.streams import raise_lost_write
from ctxtrain.versions import require_safe_versions

# A launcher ends all processes once one has ended, so the silent ones wait until the first has printed its error.
LAUNCHER_GRACE = 3.0  # seconds
NOT_A_PLACE = {errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EEXIST, errno.ENAMETOOLONG}  # no file can be made there


def main(arguments: list[str] | None = None) -> None:
    """Run the command line and end the process with the documented exit code.

    With `arguments`, SystemExit is raised instead. Without them, the process ends right after its exit handlers: to
    tear down the modules of torch and transformers would take more than a second.
    """
    if arguments is not None:
        _run(arguments)
    code: object = EXIT_INTERNAL
    try:
        _run(sys.argv[1:])
    except SystemExit as end:
        code = end.code
    except KeyboardInterrupt:
        code = 128 + signal.SIGINT
    except BaseException:
        traceback.print_exc()
    finally:
        atexit._run_exitfuncs()
        for stream in filter(None, (sys.stdout, sys.stderr)):
            with suppress(OSError, ValueError):
                stream.flush()
        os._exit(code if isinstance(code, int) else int(code is not None))


def _run(words: list[str]) -> NoReturn:
    _open_standard_streams()
    debug = "--debug" in words
    try:
        require_safe_versions()
        try:
            app(args=[word for word in words if word != "--debug"], prog_name="ctxtrain")
        except SystemExit:
            raise_lost_write()
            raise
        raise SystemExit(0)
    except OutOfMemory as error:
        _end_without_memory(error, words, debug)
    except CtxtrainError as error:
        _end(str(error), error.exit_code, debug)
    except OSError as error:
        if is_out_of_memory(error):
            _end_without_memory(error, words, debug)
        what = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        remedy = "Give another path" if error.errno in NOT_A_PLACE else "Make room or give access"
        _end(f"{what}. {remedy} and run again; what was finished is whole.", EXIT_IO, debug)
    except Exception as error:
        if is_out_of_memory(error):
            _end_without_memory(error, words, debug)
        _end(
            f"internal fault, not yours: {type(error).__name__}: {str(error)[:300]}. "
            "Run again with --debug and report it.",
            EXIT_INTERNAL,
            debug,
        )


def _end(message: str, exit_code: int, debug: bool) -> NoReturn:
    """Of several processes the first speaks for all, unless the fault is one process's own."""
    if debug:
        traceback.print_exc()
    if _is_main_process() or exit_code == EXIT_INTERNAL:
        try:  # nobody may be there to read it; the exit code still says it
            sys.stderr.write("".join(f"error: {line}\n" for line in message.splitlines()))
            sys.stderr.flush()
        except (OSError, AttributeError):
            sys.stderr = None  # or Python tries again at its end, and ends with 120
    else:
        time.sleep(LAUNCHER_GRACE)
    raise SystemExit(exit_code)


def _end_without_memory(error: Exception, words: list[str], debug: bool) -> NoReturn:
    if not debug:
        _free(error)
    _end(
        str(error) if isinstance(error, OutOfMemory) else out_of_memory_message(error, f"in {words[0]}"),
        EXIT_INTERNAL,
        debug,
    )


def _is_main_process() -> bool:
    try:
        from ctxtrain.runtime import is_main_process
    except MemoryError:  # there may be too little even for an import
        return True
    return is_main_process()


def _free(error: BaseException | None) -> None:
    """Let go of what the frames of an error hold: without it there may be no memory to report the error."""
    while error is not None:
        error.__traceback__ = None
        error = error.__cause__ or error.__context__


def _open_standard_streams() -> None:
    """Where a standard stream is closed its number would go to the next file, and prints into a checkpoint."""
    while (number := os.open(os.devnull, os.O_RDWR)) <= 2:
        pass
    os.close(number)
