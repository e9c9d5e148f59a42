"""What other programs use of a machine."""

import subprocess
import sys

from ulysses_infer.bench.load import _own_seconds

WORK = "import time\nwhile time.process_time() < 0.5: pass"


def test_a_child_that_has_ended_counts_as_this_jobs():
    before = _own_seconds()
    subprocess.run([sys.executable, "-c", WORK], check=True)
    assert _own_seconds() - before >= 0.3
