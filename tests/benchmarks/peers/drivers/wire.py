"""The driver's side of the protocol: JSON objects on standard input and output, one a line.

A driver is an object whose methods are the operations; it runs in the peer's own environment, so this module and the
drivers import the standard library and that peer alone.

    {"do": "load", "model": "...", ...}
        -> {"ok": {"versions": {...}, ...}}
    {"do": "one", "prompt": [...], "max_tokens": n}
        -> {"ok": {"token_ids": [...], "prompt_seconds": s, "decode_seconds": s}}
    {"do": "batch", "prompts": [[...], ...], "max_tokens": [...]}
        -> {"ok": {"outputs": [[...], ...], "seconds": s}}
    {"do": "close"}
        -> {"ok": {}}, and the process ends

What fails is answered with {"error": "..."}; the traceback goes to standard error.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import traceback

_PR_SET_PDEATHSIG = 1  # linux/prctl.h


def end_with_parent() -> None:
    """Have the kernel end this process when its parent dies, however it dies. Linux only; elsewhere nothing happens."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)


def serve(driver: object) -> None:
    """Answer requests until ``close`` or the end of standard input."""
    end_with_parent()
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # libraries print where answers go
    for line in sys.stdin:
        request = json.loads(line)
        operation = request.pop("do")
        try:
            answer = {"ok": getattr(driver, operation)(**request)}
        except Exception as error:  # whatever the peer raises is the harness's to report
            traceback.print_exc()
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
        if operation == "close":
            return
