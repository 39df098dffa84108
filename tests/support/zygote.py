"""Start runs in processes of their own at once, and kill them where it hurts.

A process that has imported everything and done nothing forks one per line on its input: {"argv", "place", "step", "delay_s",
"ranks", "rank"}. The child, in a group of its own with further ranks if there are several, trains as `modernenc.resume` or
`.train` would. When `rank` comes to `place` at or after `step` (or to a step, when it has not come there for long), the parent
waits `delay_s` and kills the group with SIGKILL. It answers {"killed", "code", "place"}.
"""

import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from modernenc.atomic import PARTIAL_SUFFIX
from modernenc.data import lanes
from modernenc.evaluation.validation import Validator
from modernenc.train import main
from modernenc.training.module import Pretraining
from support.runs import composed, resume

CALLS: dict[str, tuple[Any, str]] = {"validation": (Validator, "scores"), "refill": (lanes, "pack")}
"""The function that is called at a place."""
FILES = {"write": (".ckpt.", PARTIAL_SUFFIX), "manifest": (".json.", PARTIAL_SUFFIX), "download": ("@", ".part")}
"""What the name of a file that is opened at a place contains, and what it ends with."""
PATIENCE = 30
"""Steps past the one that was asked for after which the run is killed at a step, wherever that is."""


def serve() -> None:
    """Answer orders until the input ends."""
    for line in sys.stdin:
        order = json.loads(line)
        print(json.dumps(run(order)), flush=True)


def run(order: dict[str, Any]) -> dict[str, Any]:
    """Fork a run, kill it where the order says so, and return how it ended."""
    reads, writes = os.pipe()
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    child = os.fork()
    if not child:
        os.setsid()
        os.close(reads)
        others = [fork_rank(order, rank, port, writes) for rank in range(1, order["ranks"])]
        code = train_rank(order, 0, port, writes)
        codes = [os.waitstatus_to_exitcode(os.waitpid(other, 0)[1]) for other in others]
        os._exit(next(filter(None, [code, *codes]), 0))
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


def fork_rank(order: dict[str, Any], rank: int, port: int, pipe: int) -> int:
    """Fork a further rank, and return its process."""
    child = os.fork()
    if not child:
        os._exit(train_rank(order, rank, port, pipe))
    return child


def train_rank(order: dict[str, Any], rank: int, port: int, pipe: int) -> int:
    """Train as one rank, and return the exit code."""
    if order["ranks"] > 1:
        os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= {"WORLD_SIZE": str(order["ranks"]), "LOCAL_WORLD_SIZE": str(order["ranks"])}
    code = 1
    try:
        code = train(order, rank, pipe)
    except SystemExit as error:
        code = int(error.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
    finally:
        sys.stderr.flush()
    return code


def train(order: dict[str, Any], rank: int, pipe: int) -> int:
    """Train as the command line of the order does."""
    null = os.open(os.devnull, os.O_WRONLY)
    os.dup2(null, 1)
    if order["place"] and order["rank"] == rank:
        tell_at(order["place"], order["step"], pipe)
    kind, *argv = order["argv"]
    if kind == "resume":
        resume(Path(argv[0]), argv[1:])
    else:
        main(composed(argv))
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
    if place in CALLS:
        owner, name = CALLS[place]
        called: Callable[..., Any] = getattr(owner, name)

        def observed(*arguments: Any, **named: Any) -> Any:
            tell(place)
            return called(*arguments, **named)

        setattr(owner, name, observed)
    elif place in FILES:
        part, ending = FILES[place]

        def opened(event: str, arguments: tuple[Any, ...]) -> None:
            if event == "open" and not at["told"] and isinstance(arguments[0], str | os.PathLike):
                name = Path(arguments[0]).name
                if part in name and name.endswith(ending):
                    tell(place)

        sys.addaudithook(opened)
