"""Triton: `triton_client.py JOB`, its own client over HTTP, 1,000 records a request, 8 in flight."""

import asyncio
from pathlib import Path

import aiohttp
import numpy as np
from job import CLASSES, the_job
from served import drive, free_port, running, until_ready
from tritonclient.http import aio


async def main() -> None:
    job = the_job()
    ports = [str(free_port()) for _ in range(3)]
    server = [job.python, str(Path(__file__).with_name("triton_server.py")), *ports, job.model, str(CLASSES),
              str(job.processes)]
    with running(server, job) as process:
        async with aiohttp.ClientSession() as session:
            await until_ready(process, session, f"http://127.0.0.1:{ports[0]}/v2/models/bench/ready")
        async with aio.InferenceServerClient(f"127.0.0.1:{ports[0]}") as client:

            async def ask(records: np.ndarray) -> np.ndarray:
                tensor = aio.InferInput("image", list(records.shape), "UINT8")
                tensor.set_data_from_numpy(records)
                return (await client.infer("bench", [tensor])).as_numpy("scores")

            await ask(job.images()[:1000])
            job.answer(await drive(job, ask, 1000, 8))


asyncio.run(main())
