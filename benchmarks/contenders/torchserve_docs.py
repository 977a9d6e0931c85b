"""TorchServe as its documentation says: `torchserve_docs.py JOB raw|json`. A record a request, raw bytes or JSON,
batchSize 128, 256 requests in flight, a worker a core, default settings otherwise.
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


def raw(records: np.ndarray) -> tuple[bytes, str]:
    return records.tobytes(), "application/octet-stream"


def as_json(records: np.ndarray) -> tuple[bytes, str]:
    return json.dumps(records[0].ravel().tolist()).encode(), "application/json"


def scores_of(body: bytes, kind: str) -> np.ndarray:
    flat = np.frombuffer(body, np.float32) if kind == "application/octet-stream" else json.loads(body)
    return np.asarray(flat, np.float32).reshape(1, CLASSES)


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
    encode = {"raw": raw, "json": as_json}[sys.argv[2]]
    environ = {"JAVA_HOME": str(Path(find_java().path).parents[1]), "TEMP": job.work, "TMPDIR": job.work}
    with running(configured(job, ports), job, environ) as process:
        async with aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=IN_FLIGHT)) as session:
            url = f"http://127.0.0.1:{ports[0]}/predictions/bench"

            async def ask(records: np.ndarray) -> np.ndarray:
                body, kind = encode(records)
                async with session.post(url, data=body, headers={"Content-Type": kind}) as reply:
                    reply.raise_for_status()
                    return scores_of(await reply.read(), kind)

            await until_ready(process, session, f"http://127.0.0.1:{ports[0]}/ping")
            images = job.images()
            await asyncio.gather(*(ask(images[index:index + 1]) for index in range(IN_FLIGHT)))
            job.answer(await drive(job, ask, 1, IN_FLIGHT))


asyncio.run(main())
