"""What a server's log says about a start that fails. Rule: text in, one line out; TorchServe's own words for the same
failure are left out, because the model's reason is in what its worker printed.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator

__all__ = ["last_words", "load_failure", "silent_deaths", "taken_port"]

DEATH = re.compile(r"Backend worker process died|Load model failed: |Backend worker error|Backend worker startup")
REFUSED_ARCHIVE = re.compile(r"Failed to load model: .*")
WORKER_LOST = re.compile(r"^\S+ \[\w+ *\] (W-\d+-\S+) \S+ - Load model failed: ", re.MULTILINE)
BIND_FAILURE = re.compile(r"Failed to bind to address.*|Address already in use|BindException.*")
WORKER_LINE = re.compile(r"^\S+ \[\w+ *\] (W-\d+-.+?-std(?:out|err)) MODEL_LOG - ?(.*)$")
EXCEPTION_LINE = re.compile(r"^([A-Za-z_][\w.]*(?:Error|Exception|Exit|Interrupt|Warning|Group))(?::|$)")
# What TorchServe's worker adds to the real reason: its second search for a handler, and its own summary.
ADDED_BY_TORCHSERVE = re.compile(r"ts\.torch_handler|^RuntimeError: 50[07] - ")
TOO_SLOW = "did not respond in given time"


def load_failure(log: str) -> str | None:
    """Why a worker died while it loaded the model, in one line; None as long as none did."""
    refused = REFUSED_ARCHIVE.search(log)
    if refused is None and DEATH.search(log) is None:
        return None
    raised = _raised(log)
    if raised:
        return raised[-1]
    if TOO_SLOW in log:
        return "the model did not load within the startupTimeout of its model-config.yaml"
    if refused:
        cause = re.search(r"^[\w.]+(?:Exception|Error): (.+)$", log[refused.end():], re.MULTILINE)
        return f"TorchServe refused the archive: {cause[1] if cause else refused[0]}"
    said = [line for lines in _worker_output(log) for line in lines if line.strip()]
    return ("a worker ended without a Python error, as when memory runs out or native code crashes; "
            f"it last said: {said[-1] if said else 'nothing'}")


def silent_deaths(log: str) -> int:
    """How many times the worker that died most often has died, while the log does not say why; otherwise 0.

    TorchServe closes a worker's output when its connection is lost (`Process.destroyForcibly`): a traceback that it has
    not read by then is lost. It then starts the worker again, so the reason comes again, too.
    """
    if _raised(log) or REFUSED_ARCHIVE.search(log) or TOO_SLOW in log:
        return 0
    return max(Counter(WORKER_LOST.findall(log)).values(), default=0)


def taken_port(log: str) -> str | None:
    """What TorchServe said about a port that it could not have; None as long as it got them."""
    found = BIND_FAILURE.search(log)
    return found[0] if found else None


def last_words(log: str) -> str:
    """The last line that is no frame of a Java stack trace."""
    return next((line for line in reversed(log.splitlines()) if line.strip() and not line.startswith("\tat ")),
                "nothing in its log")


def _raised(log: str) -> list[str]:
    """The exceptions that workers printed, without those that TorchServe adds."""
    return [one for lines in _worker_output(log) for one in _exceptions(lines) if not ADDED_BY_TORCHSERVE.search(one)]


def _worker_output(log: str) -> list[list[str]]:
    """The lines that workers printed, one list for each worker's stdout and stderr."""
    streams: dict[str, list[str]] = {}
    for line in log.splitlines():
        if found := WORKER_LINE.match(line):
            streams.setdefault(found[1], []).append(found[2])
    return list(streams.values())


def _exceptions(lines: list[str]) -> Iterator[str]:
    """The last lines of the tracebacks in `lines`, with what continues them, each as one line."""
    for number, line in enumerate(lines):
        if EXCEPTION_LINE.match(line):
            rest = []
            for following in lines[number + 1:number + 6]:
                if not following.startswith(("\t", "  ")):
                    break
                rest.append(following.strip())
            yield " ".join([line, *rest])
