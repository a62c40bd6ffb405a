"""Arguments that nobody should give: no call may end the process, each error is one clear line."""

import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

WORKER = Path(__file__).with_name("hostile_worker.py")
SEEDS, CALLS = range(4), 700


def run(seed: int, folder: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, WORKER, str(seed), str(CALLS)]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, timeout=300)


def test_hostile_arguments(tmp_path):
    with ThreadPoolExecutor(2) as pool:
        for done in pool.map(lambda seed: run(seed, tmp_path), SEEDS):
            assert done.returncode == 0, done.stderr[-2000:]
            assert done.stderr.count("\n") >= CALLS  # every call was made
            assert done.stdout == ""
