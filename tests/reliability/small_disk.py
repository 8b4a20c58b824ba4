"""A run on a disk of its own, too small or read-only, made of memory in a namespace of its own.

Run in a child of the server: `run_on(config, root, before, after, size, mode)`.
"""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

CLONE_NEWNS, CLONE_NEWUSER = 0x00020000, 0x10000000
UNABLE = 77


def run_on(config: str, root: str, before: str, after: str, size: str, mode: str) -> None:
    """Continue the run of the folder `before` on a disk of `size` bytes, then with room; leave the result in `after`.

    The exit code of the first attempt goes to `after`.code.
    """
    if not own_namespace() or mount("-t", "tmpfs", "-o", "size=200m", "none", root):
        os._exit(UNABLE)
    shutil.copytree(before, root, dirs_exist_ok=True)
    assert not mount("-o", f"remount,size={size}" if mode == "small" else "remount,ro", root)
    words = ["train", config, f"output_dir={root}", "--resume"]
    Path(f"{after}.code").write_text(str(attempt(words)))
    assert not mount("-o", "remount,rw,size=200m", root)
    assert attempt(words) == 0
    shutil.copytree(root, after)


def attempt(words: list[str]) -> int:
    from tests.reliability.server import ended

    pid = os.fork()
    if not pid:
        code = ended(words)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def own_namespace() -> bool:
    user, group = os.getuid(), os.getgid()
    if ctypes.CDLL(None, use_errno=True).unshare(CLONE_NEWUSER | CLONE_NEWNS):
        return False
    try:
        for name, content in (("setgroups", "deny"), ("uid_map", f"0 {user} 1"), ("gid_map", f"0 {group} 1")):
            Path(f"/proc/self/{name}").write_text(content)
    except OSError:
        return False
    return not mount("--make-rprivate", "/")


def mount(*words: str) -> int:
    return subprocess.run(["mount", *words], capture_output=True, check=False).returncode
