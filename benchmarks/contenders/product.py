"""This project: `product.py JOB`: `batch-client run --archive`, default settings, exact; seconds of its own summary."""

import json
import subprocess
import sys

from job import the_job

job = the_job()
done = subprocess.run(
    [sys.executable, "-m", "batch_client", "run", job.source, job.output, "--archive", job.archive, "--records",
     f":{job.records}", "--log", "none", "--json"], stdout=subprocess.PIPE, check=True)
summary = json.loads(done.stdout)
assert summary["failed"] == 0
assert summary["scored"] == job.records
job.answer(summary["seconds"])
