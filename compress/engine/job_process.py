"""Process of one job, started by `executors.Processes`.

    python -m compress.engine.job_process < JOB > RESULT

The job is a line of JSON on standard input, and the result is JSON on standard output. Whatever else is printed goes to
standard error. The process ends when its standard input is closed, as by the end of the process that started it.
"""

import json
import os
import sys
import threading
from dataclasses import asdict
from typing import TextIO

from compress.errors import INTERRUPTED_EXIT_CODE


def main() -> None:
    """Execute the job on standard input."""
    result = os.fdopen(os.dup(sys.stdout.fileno()), "w", encoding="utf-8")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    values = json.loads(sys.stdin.readline())
    threading.Thread(target=_end_with, args=(sys.stdin,), daemon=True).start()
    from compress.engine.job_log import JobLog
    from compress.engine.jobs import execute, from_plain
    from compress.engine.timing_lock import TimingLock

    job = from_plain(values)
    found = execute(job, JobLog(job.log), TimingLock(), catches_all=True)
    result.write(json.dumps(asdict(found)))
    result.flush()
    os._exit(0)  # threads of user code cannot keep the process


def _end_with(stream: TextIO) -> None:
    """End this process when a stream ends."""
    while stream.read(1):
        pass
    os._exit(INTERRUPTED_EXIT_CODE)


if __name__ == "__main__":
    main()
