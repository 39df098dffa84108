"""Start runs in processes of their own at once, and kill them where it hurts.

A process that has imported everything and done nothing forks one per line on its input: {"argv", "place", "step", "delay_s"}.
The child, in a group of its own, trains as `modernenc.resume` or `.train` would. When it comes to `place` at or after `step`
(or to a step, when it has not come there for long), the parent waits `delay_s` and kills the group with SIGKILL. It answers
{"killed", "code", "place"}.
"""

import json
import os
import select
import signal
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from conftest import composed

from modernenc import checkpoints
from modernenc.checks import check_run
from modernenc.data.lanes import Lane
from modernenc.data.store import Store
from modernenc.fit import fit, start
from modernenc.resume import resume
from modernenc.trainer import Pretraining
from modernenc.validation import Validator

PLACES = {
    "step": (Pretraining, "training_step"),
    "write": (checkpoints, "write"),
    "manifest": (checkpoints, "write_json"),
    "validation": (Validator, "scores"),
    "refill": (Lane, "_fill_buffer"),
    "download": (Store, "_download"),
}
"""What is called where: the child tells when it enters, and runs it as it is."""
PATIENCE = 30


def serve() -> None:
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(run(order)), flush=True)


def run(order: dict[str, Any]) -> dict[str, Any]:
    reads, writes = os.pipe()
    child = os.fork()
    if not child:
        os.setsid()
        os.close(reads)
        code = 1
        try:
            code = train(order, writes)
        except SystemExit as error:
            code = int(error.code or 0)
        except BaseException:
            import traceback

            traceback.print_exc()
        finally:
            sys.stderr.flush()
            os._exit(code)
    os.close(writes)
    deadline = time.monotonic() + 120
    told = b""
    while not told and os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT) is None:
        assert time.monotonic() < deadline, f"a run hangs: {order}"
        if select.select([reads], [], [], 0.01)[0]:
            told = os.read(reads, 64)
            if not told:
                break
    if told:
        time.sleep(order["delay_s"])
    ended = os.waitid(os.P_PID, child, os.WEXITED | os.WNOHANG | os.WNOWAIT)
    if told and ended is None:
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    os.close(reads)
    return {"killed": os.WIFSIGNALED(status), "code": os.waitstatus_to_exitcode(status), "place": told.decode()}


def train(order: dict[str, Any], pipe: int) -> int:
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    if order["place"]:
        tell_at(order["place"], order["step"], pipe)
    kind, *argv = order["argv"]
    if kind == "resume":
        resume(Path(argv[0]), argv[1:])
    else:
        config = composed(argv)
        curriculum, corpus = check_run(config)
        start(config, curriculum)
        fit(config, curriculum, corpus, None, {"event": "start", "checkpoint": ""})
    return 0


def tell_at(place: str, step: int, pipe: int) -> None:
    """Have the first call at a place, once the run has come to a step, write the step to the pipe before it goes on."""
    at = {"step": 0, "told": False, "starts": False}
    module_class: Any = Pretraining
    training_step = module_class.training_step

    def counted(module: Pretraining, *arguments: Any) -> None:
        at["step"] = module.step
        at["starts"] = module.tokens_seen in {module.curriculum.start_of(phase) for phase in module.run.phases}
        if place == "step" or (place == "phase" and at["starts"]):
            tell(place)
        elif at["step"] > step + PATIENCE:
            tell("step")
        training_step(module, *arguments)

    def tell(where: str) -> None:
        if at["step"] >= step and not at["told"]:
            at["told"] = True
            os.write(pipe, where.encode())

    module_class.training_step = counted
    if place in ("step", "phase"):
        return
    owner, name = PLACES[place]
    called: Callable[..., Any] = getattr(owner, name)

    def observed(*arguments: Any, **named: Any) -> Any:
        tell(place)
        return called(*arguments, **named)

    setattr(owner, name, observed)


if __name__ == "__main__":
    serve()
