"""TorchServe as its documentation says: `torchserve_docs.py JOB`. A record a request, raw bytes, batchSize 128,
256 requests in flight, a worker a core, default settings otherwise.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import aiohttp
import numpy as np
from forward import module_of, traced
from job import CLASSES, Job, the_job
from served import drive, free_port, running, until_ready

from batch_client.java import find_java

IN_FLIGHT = 256
HEADERS = {"Content-Type": "application/octet-stream"}


def configured(job: Job, ports: list[int]) -> list[str]:
    """Archive the model, write config.properties; returns the command line."""
    work, here = Path(job.work), Path(__file__).parent
    traced(module_of(job.model)).save(work / "model.pt")
    # The program beside this interpreter, as its documentation calls it.
    programs = Path(sys.executable).parent
    subprocess.run([programs / "torch-model-archiver", "--model-name", "bench", "--version", "1.0",
                    "--serialized-file", work / "model.pt", "--handler", here / "torchserve_handler.py",
                    "--export-path", work], check=True, stdout=subprocess.DEVNULL)
    models = {"bench": {"1.0": {"marName": "bench.mar", "minWorkers": job.processes, "maxWorkers": job.processes,
                                "batchSize": 128, "maxBatchDelay": 50, "responseTimeout": 120}}}
    names = ("inference_address", "management_address", "metrics_address")
    lines = [f"{name}=http://127.0.0.1:{port}" for name, port in zip(names, ports, strict=False)]
    lines += [f"grpc_inference_port={ports[3]}", f"grpc_management_port={ports[4]}", "load_models=bench.mar",
              f"job_queue_size={2 * IN_FLIGHT}", f"models={json.dumps(models)}"]
    (work / "config.properties").write_text("\n".join(lines), "ascii")
    return [str(programs / "torchserve"), "--start", "--foreground", "--ncs", "--disable-token-auth", "--model-store",
            job.work, "--ts-config", str(work / "config.properties")]


async def main() -> None:
    job, ports = the_job(), [free_port() for _ in range(5)]
    environ = {"JAVA_HOME": str(Path(find_java().path).parents[1]), "TEMP": job.work, "TMPDIR": job.work}
    with running(configured(job, ports), job, environ) as process:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=IN_FLIGHT)) as session:
            url = f"http://127.0.0.1:{ports[0]}/predictions/bench"

            async def ask(records: np.ndarray) -> np.ndarray:
                async with session.post(url, data=records.tobytes(), headers=HEADERS) as reply:
                    reply.raise_for_status()
                    return np.frombuffer(await reply.read(), np.float32).reshape(1, CLASSES)

            await until_ready(process, session, f"http://127.0.0.1:{ports[0]}/ping")
            images = job.images()
            await asyncio.gather(*(ask(images[index:index + 1]) for index in range(IN_FLIGHT)))
            job.answer(await drive(job, ask, 1, IN_FLIGHT))


asyncio.run(main())
