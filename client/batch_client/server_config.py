"""How one start is configured: the settings, and what they and the archive become in its properties and environment.

Rule: decisions only. Ports, cores and folders come as arguments; what is read is the archive's manifest and the
template of config.properties.
"""

from __future__ import annotations

import json
import os
import re
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

from batch_client.errors import ServingError, UsageError
from batch_client.server_lanes import BATCH_SIZE, Lane
from batch_client.tuning import ALLOCATOR_VARIABLES, ALLOCATORS, DEFAULT_ALLOCATOR, Tuning

__all__ = ["LOOPBACK", "PORTS", "Model", "ServerSettings", "configuration", "environment", "model_of",
           "parse_properties", "template_of", "with_tuning"]

LOOPBACK = "127.0.0.1"
# TorchServe gives a worker 300 s to load its model (serve_config/config.properties), and then says so.
STARTUP_SECONDS = 330.0
MOST_WORKERS = 1024  # more than any machine has cores or GPUs for
PORTS = 5  # that `configuration` asks for
MANIFEST = "MAR-INF/MANIFEST.json"
MANIFEST_BYTES = 1 << 20
NEEDED = ("vmargs", "blacklist_env_vars")  # of the template, which may be a user's own
CEILING = "BATCH_HANDLER_CEILING"
# Variables that would override or redirect what is configured here.
OVERRIDES = re.compile(r"TS_.*|LOG_LOCATION|METRICS_LOCATION|SM_TELEMETRY_LOG|LOG4J_.*"
                       r"|BATCH_HANDLER_(BULK_LANE|SHARED_MEMORY|NAMED_GPUS)|OMP_(DYNAMIC|THREAD_LIMIT)")


@dataclass(frozen=True)
class ServerSettings:
    """How to serve one archive.

    archive: the .mar. workers: default the number of GPUs, or else cores. online_workers: of a lane of its own for
    online queries, see `lanes_of`. threads: of each worker, default its share of
    the cores. micro_batch: records, default what the archive says. batch_size: requests in one server batch, but
    in a bulk lane.
    address, port: where it takes requests; a free port by default. metrics_port: shows metrics, which need no token, at
    `address` too; by default they are on a free port of the loopback. startup_seconds: until every worker is ready.
    token_minutes: life of a token. log_dir: default the private temp dir, removed after a clean end.
    shared_memory: whether clients on this machine may have records and outputs in memory (`regions.py`).
    extra_properties: lines for config.properties, which win over all others. tuning: what was measured, for all that is
    left open here and in the environment; the default is the file beside the archive for this kind of machine, if any.
    """

    archive: Path
    workers: int | None = None
    online_workers: int | None = 0
    threads: int | None = None
    micro_batch: int | None = None
    batch_size: int = BATCH_SIZE
    address: str = LOOPBACK
    port: int | None = None
    metrics_port: int | None = None
    startup_seconds: float = STARTUP_SECONDS
    token_minutes: float = 60
    log_dir: Path | None = None
    shared_memory: bool = True
    extra_properties: Mapping[str, str] = field(default_factory=dict)
    tuning: Tuning | None = None

    def __post_init__(self) -> None:
        for name in ("workers", "threads", "micro_batch", "batch_size", "port", "metrics_port"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UsageError(f"{name} is {value}: give a number of at least 1")
        if (most := max(self.workers or 0, self.online_workers or 0)) > MOST_WORKERS:
            raise UsageError(f"{most} workers: each is a process that loads the model; give {MOST_WORKERS} at most")
        if self.online_workers is not None and self.online_workers < 0:
            raise UsageError(f"online_workers is {self.online_workers}: give 0 or more")


class Model(NamedTuple):
    """What an archive calls its model."""

    name: str
    version: str


def model_of(archive: Path) -> Model:
    """Name and version from the archive's manifest. Raises ServingError naming the file."""
    try:
        with zipfile.ZipFile(archive) as mar, mar.open(MANIFEST) as member:
            manifest = json.loads(member.read(MANIFEST_BYTES))
        model = manifest["model"]
        name, version = str(model["modelName"]), str(model.get("modelVersion", "1.0"))
    except FileNotFoundError:
        raise ServingError(f"there is no archive {archive}: `batch-client pack` makes one") from None
    except Exception as error:  # any damage: each way to compress has errors of its own
        raise ServingError(f"{archive} is not a model archive ({MANIFEST}: {str(error) or type(error).__name__}): "
                           "`batch-client pack` makes one") from error
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name):
        raise ServingError(f"{archive} calls its model {name!r}: wanted letters, digits, '.', '_' and '-'")
    return Model(name, version)


def with_tuning(settings: ServerSettings, tuning: Tuning) -> ServerSettings:
    """`settings` with what was measured for what they leave open.

    Workers and threads share the cores: whoever names one of them gets the default of the other, not the file's.
    """
    if settings.workers is not None or settings.threads is not None:
        return replace(settings, tuning=tuning)
    return replace(settings, tuning=tuning, workers=tuning.workers, threads=tuning.threads)


def configuration(
    settings: ServerSettings, model: Model, lanes: Sequence[Lane], ports: Sequence[int], worker_port: int, folder: Path,
    templates: Path,
) -> str:
    """The text of config.properties: the template, then what this start decides.

    ports: PORTS free ones. worker_port: after which workers' sockets are named. folder: the start's own, with `models`
    and `workflows`. templates: serve_config/.
    """
    inference, management, metrics, grpc, grpc_management = ports
    decided = {
        "inference_address": f"http://{settings.address}:{settings.port or inference}",
        "management_address": f"http://{LOOPBACK}:{management}",
        "metrics_address": (f"http://{settings.address}:{settings.metrics_port}" if settings.metrics_port
                            else f"http://{LOOPBACK}:{metrics}"),
        "grpc_inference_port": str(grpc),
        "grpc_management_port": str(grpc_management),
        "initial_worker_port": str(worker_port),
        "metrics_config": str(templates / "metrics.yaml"),
        "model_store": str(folder / "models"),
        "workflow_store": str(folder / "workflows"),
        "models": json.dumps({lane.name: {model.version: {"minWorkers": lane.workers, "maxWorkers": lane.workers,
                                                          "batchSize": lane.batch_size}} for lane in lanes}),
        "token_expiration_min": str(settings.token_minutes),
    } | dict(settings.extra_properties)
    template = template_of(templates)
    lines = (f"{key}={_escape(value)}\n" for key, value in decided.items())
    return f"{template}\n# --- Decided at this start. ---\n{''.join(lines)}"


def template_of(templates: Path) -> str:
    """The text of config.properties in a serve_config/. Raises ServingError for one that lacks what a start reads."""
    path = templates / "config.properties"
    try:
        text = path.read_text("ascii")
    except (OSError, UnicodeDecodeError) as error:
        raise ServingError(f"{path} can't be read: {error}") from error
    if missing := [name for name in NEEDED if name not in parse_properties(text)]:
        raise ServingError(f"{path} has no {' and no '.join(missing)}: begin with a copy of batch-client's own")
    return text


def parse_properties(text: str) -> dict[str, str]:
    """As java.util.Properties would, for files without continuation lines and escapes."""
    pairs = (line.split("=", 1) for line in text.splitlines() if "=" in line and line.lstrip()[:1] not in ("#", "!"))
    return {key.strip(): value.strip() for key, value in pairs}


def _escape(value: str) -> str:
    """A value that java.util.Properties reads back as it is; its files are Latin-1."""
    plain = value.replace("\\", "\\\\").replace("\n", "\\n")
    # \uXXXX is all that they know, of the halves of a surrogate pair where a character needs two.
    units = memoryview(plain.encode("utf-16-le", "surrogatepass")).cast("H")
    return "".join(chr(unit) if unit < 128 else f"\\u{unit:04x}" for unit in units)


def environment(
    environ: Mapping[str, str], kept_back: str, tmp: Path, settings: ServerSettings, threads: int,
    lanes: Sequence[Lane], shared: Path | None,
) -> dict[str, str]:
    """What Java and its workers get to see of `environ`, and what tells a worker its share of the machine.

    `kept_back` is `blacklist_env_vars`: what workers must not see is not even given to Java, whose own environment they
    could read. Relative entries of PYTHONPATH are made absolute, because a worker starts in its model's folder.
    `shared` is the folder that clients on this machine share with the workers.
    `threads` are each worker's if the settings name none. Settings win over variables of `environ`, and those over
    the tuning file; for threads and the allocator variables of `environ` say nothing. The ceiling is told only where
    nothing was changed since it was measured.
    """
    secret = re.compile(kept_back)
    ours = (CEILING, *ALLOCATOR_VARIABLES)
    seen = {name: value for name, value in environ.items()
            if not secret.fullmatch(name) and not OVERRIDES.fullmatch(name) and name not in ours}
    if path := seen.get("PYTHONPATH"):
        seen["PYTHONPATH"] = os.pathsep.join(str(Path(entry).absolute()) for entry in path.split(os.pathsep))
    seen |= dict.fromkeys(("TMPDIR", "TEMP", "TMP"), str(tmp))
    tuning = settings.tuning
    seen |= ALLOCATORS[tuning.allocator if tuning else DEFAULT_ALLOCATOR]
    seen |= dict.fromkeys(("OMP_NUM_THREADS", "BATCH_HANDLER_THREADS"), str(settings.threads or threads))
    if len(lanes) > 1:
        seen["BATCH_HANDLER_BULK_LANE"] = lanes[-1].name
    if shared is not None:
        seen["BATCH_HANDLER_SHARED_MEMORY"] = str(shared)
    if settings.micro_batch is not None:
        seen["BATCH_HANDLER_MICRO_BATCH"] = str(settings.micro_batch)
    if tuning is not None:
        measured = tuning.environment()
        seen = measured | seen
        if settings.workers == tuning.workers and measured.items() <= seen.items():
            seen[CEILING] = str(tuning.records_per_s)
    return seen
