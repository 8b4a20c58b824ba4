"""What must be the same each time is: exports of one finished run, and the first forward pass of fresh processes."""

import subprocess
import sys
from pathlib import Path

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "check_repeats.py"


def test_exports_in_a_row_succeed_and_first_passes_have_the_bits_of_the_second() -> None:
    """On two threads, every second export beside a busy process; in full by the script itself."""
    command = [sys.executable, str(SCRIPT), "--exports", "5", "--processes", "5"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.splitlines()[-2:] == [
        "exports: 5, of which 0 went wrong",
        "processes: 5, of which 0 went wrong",
    ]
