"""What a model is and takes, as a server says: asked once, and every reply is checked against it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from batch_client.dialect import Outcome
from batch_client.errors import ServingError
from batch_client.jsontext import parse_json
from batch_client.plan import OutputGeometry
from batch_client.regions import usable_folder
from batch_client.serving import Servers, ask_for_room, turned_away
from batch_handler.oip import RESERVED_NAMES, ModelMetadata, OipError

__all__ = ["ModelContract", "contract_of", "fetch_contract"]

METADATA_SECONDS = 30
# For how long a server that has no room at the first question is asked again.
BUSY_SECONDS = 30.0
# The fingerprint of a server that gives none: any Open Inference Protocol server but ours.
UNVERIFIED = "unverified"
# What may name an array of the output, or a lane: either becomes a part of a path.
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]*")


@dataclass(frozen=True)
class ModelContract:
    """What a model is and takes, as its server says: what every reply is checked against.

    ceiling: records/s of the model alone on that server, all its workers together, where it was measured.
    micro_batch_seconds: about what a micro-batch takes there, None if unknown.
    bulk_lane: the name under which this server takes bulk requests, if it is not `name`.
    shared_memory: the folder in which it and this client share memory, None for a server on another machine.
    These four are the server's own business: servers that differ in them have the same model. A run's contract has the
    last two only if all of its servers have them.
    """

    name: str
    version: str
    digest: str
    fingerprint: str
    micro_batch: int
    input_name: str
    input_dtype: np.dtype[np.generic]
    input_shape: tuple[int, ...]
    outputs: tuple[OutputGeometry, ...]
    numerics: Mapping[str, object] = field(default_factory=dict)
    ceiling: float | None = field(default=None, compare=False)
    micro_batch_seconds: float | None = field(default=None, compare=False)
    bulk_lane: str | None = field(default=None, compare=False)
    shared_memory: Path | None = field(default=None, compare=False)

    def on_the_wire(self, records: np.ndarray) -> np.ndarray:
        """Records (n, *source's record shape) as they travel: the model's record shape and dtype, little-endian."""
        shaped = records.reshape(len(records), *self.input_shape)
        return np.ascontiguousarray(shaped, dtype=self.input_dtype.newbyteorder("<"))

    @property
    def output_names(self) -> tuple[str, ...]:
        return tuple(output.name for output in self.outputs)

    @property
    def has_status(self) -> bool:
        """Whether the server is our handler, which echoes checksums and gives each record a status."""
        return self.fingerprint != UNVERIFIED


async def fetch_contract(servers: Servers, url: str) -> ModelContract:
    """What the server at `url` says of its model: OIP metadata, asked for where the protocol has it and, as TorchServe
    has none, of the handler itself.

    Raises ServingError (unreachable, no such model, unusable metadata) or CredentialsError.
    """
    model = servers.model
    for path in (f"/v2/models/{model}", f"/predictions/{model}"):
        reply, verdict = await ask_for_room(servers, "GET", url, path, METADATA_SECONDS, patience=BUSY_SECONDS)
        if verdict.outcome is Outcome.RESULT:
            return contract_of(url, reply.body)
        # A proxy may refuse the first path for reasons of its own; what counts is what the handler's answers.
        if verdict.outcome not in (Outcome.NO_MODEL, Outcome.TOKEN):
            break
    if (refusal := turned_away(servers, url, verdict)) is not None:
        raise refusal
    raise ServingError(f"{url}: can't describe model {model!r}: {verdict.outcome.value} ({verdict.reason})")


def contract_of(url: str, body: bytes) -> ModelContract:
    """The contract in OIP metadata, as the server or archive at `url` gives it.

    Raises ServingError where the client can't use such a model.
    """
    try:
        metadata = ModelMetadata.from_json(parse_json(body))
    except (OipError, ValueError) as error:
        raise ServingError(f"{url}: its model metadata is not Open Inference Protocol v2: {error}") from error
    if len(metadata.inputs) != 1:
        record = ", ".join(f'"{spec.name}": …' for spec in metadata.inputs)
        raise ServingError(f"{url}: model {metadata.name} takes {len(metadata.inputs)} inputs: wanted a model of one; "
                           f"predict takes several, as JSON: [{{{record}}}]")
    one = metadata.inputs[0]
    for spec in metadata.outputs:
        if not NAME.fullmatch(spec.name) or spec.name in RESERVED_NAMES:
            raise ServingError(f"{url}: model {metadata.name} names an output {spec.name[:100]!r}, which can't name an "
                               "array: rename it in the model, with letters, digits, '.', '_' and '-', and not "
                               f"{' or '.join(RESERVED_NAMES)}")
    names = [spec.name for spec in metadata.outputs]
    if len({*names}) < len(names):
        raise ServingError(f"{url}: model {metadata.name} has several outputs of one name ({', '.join(names)[:200]}), "
                           "which can't be arrays beside each other: rename them in the model")
    outputs = tuple(OutputGeometry(spec.name, spec.dtype, spec.shape) for spec in metadata.outputs)
    free = [spec.name for spec in metadata.outputs if min(spec.shape, default=1) < 1]
    if free or not outputs:
        raise ServingError(f"{url}: model {metadata.name} does not say how large its output "
                           f"{', '.join(free) or '(none named)'} is for one record")
    version = metadata.versions[-1] if metadata.versions else ""
    parameters: Mapping[str, object] = metadata.parameters
    micro_batch, numerics = parameters.get("micro_batch", 1), parameters.get("numerics")
    took = _positive(parameters.get("micro_batch_ms"))
    lane, fingerprint = parameters.get("bulk_lane"), str(parameters.get("fingerprint", UNVERIFIED))
    return ModelContract(
        name=metadata.name,
        version=version,
        digest=str(parameters.get("model_digest", f"unverified:{metadata.name}:{version}")),
        fingerprint=fingerprint,
        micro_batch=micro_batch if isinstance(micro_batch, int) and micro_batch >= 1 else 1,
        input_name=one.name,
        input_dtype=one.dtype,
        input_shape=one.shape,
        outputs=outputs,
        numerics=dict(numerics) if isinstance(numerics, Mapping) else {},
        ceiling=_positive(parameters.get("ceiling_records_per_s")),
        micro_batch_seconds=None if took is None else took / 1e3,
        bulk_lane=lane if isinstance(lane, str) and NAME.fullmatch(lane) else None,
        # What lies where others can write is believed only with checksums, which our handler alone gives.
        shared_memory=usable_folder(parameters.get("shared_memory")) if fingerprint != UNVERIFIED else None,
    )


def _positive(value: object) -> float | None:
    """A number that can be a rate or a time, None for anything else: what a server says must not end a run."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 1e-6 <= value <= 1e12:
        return None
    return float(value)
