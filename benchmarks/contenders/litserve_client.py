"""LitServe: `litserve_client.py JOB`, 1,000 records a request, 8 in flight."""

import asyncio
from pathlib import Path

import aiohttp
import numpy as np
from job import CLASSES, the_job
from served import drive, free_port, running, until_ready

HEADERS = {"Content-Type": "application/octet-stream"}


async def main() -> None:
    job, port = the_job(), free_port()
    url = f"http://127.0.0.1:{port}"
    server = [job.python, str(Path(__file__).with_name("litserve_server.py")), str(port), job.model,
              str(job.processes)]
    with running(server, job) as process:
        async with aiohttp.ClientSession() as session:
            await until_ready(process, session, f"{url}/health")

            async def ask(records: np.ndarray) -> np.ndarray:
                async with session.post(f"{url}/predict", data=records.tobytes(), headers=HEADERS) as reply:
                    reply.raise_for_status()
                    return np.frombuffer(await reply.read(), np.float32).reshape(-1, CLASSES)

            await ask(job.images()[:1000])
            job.answer(await drive(job, ask, 1000, 8))


asyncio.run(main())
