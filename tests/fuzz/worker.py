"""One case in a process of its own, with bounds on memory and time, and what it showed."""

from __future__ import annotations

import hashlib
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import time
import traceback
import warnings
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from types import TracebackType

from qe_edge.checkpoint.files import FILES
from qe_edge.system.errors import QEError
from tests.fuzz.mutations import change_file
from tests.fuzz.target import SilentSuccessError, Target
from tests.sealing import seal

MEMORY = 3 * 2**30  # bytes over what the process has when it begins
CPU_SECONDS = 30  # of one process; time in which the machine does other work does not count
IDLE_SECONDS, WALL_SECONDS = 60, 1200  # without work to do; in all, however busy the machine is
POLL_SECONDS, LEAST_WORK = 0.5, 0.05  # LEAST_WORK: seconds of CPU in a second; less is waiting in a loop
MAX_SENTENCE = 700  # of a message to a user, without the values that it repeats
REFUSED, ACCEPTED = "refused", "accepted"


@dataclass(frozen=True)
class Outcome:
    """What a case showed.

    Attributes:
        verdict: "refused" or "accepted" if all is well; else what went wrong: "exception", "memory", "hang", "killed",
            "opaque" (an error that nobody can read), "silent success" or "broken fuzzer".
        kind: Class of the exception, name of the signal.
        where: Innermost line of ours, as "module:function:line".
        message: What was said or found.
        change: What was done to the files.
    """

    verdict: str
    kind: str = ""
    where: str = ""
    message: str = ""
    change: str = ""

    @property
    def failed(self) -> bool:
        """Whether something is wrong."""
        return self.verdict not in (REFUSED, ACCEPTED)

    @property
    def key(self) -> str:
        """The same for cases that show the same defect."""
        return " ".join(f"{self.verdict} {self.kind} {self.where or self.message[-80:]}".split())


def run_case(target: Target, sound: Path, work: Path, seed: int, case: int, expected: str | None) -> Outcome:
    """Change a file of a copy of the sound folder, read it, and judge.

    Args:
        target: What to read.
        sound: Its sound folder.
        work: Folder for the copy; must not exist.
        seed: Of the run.
        case: Number of the case; with the seed it determines the change.
        expected: What the sound folder reads as; None changes nothing.
    """
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        os.close(reader)
        os.setsid()
        outcome = Outcome("broken fuzzer")
        try:
            outcome = _in_child(target, sound, work, seed, case, expected)
        except Exception:  # noqa: BLE001 - a forked process must not go on with its parent's work
            outcome = Outcome("broken fuzzer", message=traceback.format_exc()[-2000:])
        finally:
            os.write(writer, json.dumps(asdict(outcome)).encode()[:60_000])
            os._exit(0)
    os.close(writer)
    said, limit = _read_until_end(reader, child)
    if limit:
        with suppress(ProcessLookupError):  # it tells where it is
            os.kill(child, signal.SIGUSR1)
            time.sleep(POLL_SECONDS)
        os.killpg(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    change = work.with_name(f"{work.name}.change")
    what = change.read_text(encoding="utf-8") if change.exists() else ""
    if said and not limit:
        return Outcome(**json.loads(said))
    hang = "hang" if change.exists() else "broken fuzzer"  # which hung while it changed the file
    if limit:
        return Outcome(hang, limit, _last_line(work), change=what)
    name = signal.Signals(os.WTERMSIG(status)).name if os.WIFSIGNALED(status) else f"exit code {os.WEXITSTATUS(status)}"
    if name in ("SIGXCPU", "SIGPROF"):
        return Outcome(hang, f"{CPU_SECONDS} s of CPU", _last_line(work), change=what)
    return Outcome("killed", name, _last_line(work), change=what)


def _read_until_end(reader: int, child: int) -> tuple[bytes, str]:
    """What the child writes, and the limit that it broke, if it did: idle for too long, or far too long in all."""
    parts: list[bytes] = []
    idle, spent_before, last, begun = 0.0, 0.0, time.monotonic(), time.monotonic()
    with os.fdopen(reader, "rb", buffering=0) as pipe:
        while True:
            if select.select([pipe], [], [], POLL_SECONDS)[0]:
                part = pipe.read(1 << 16)
                if not part:
                    return b"".join(parts), ""
                parts.append(part)
            now, (runnable, spent) = time.monotonic(), _activity(child)
            works = runnable or spent - spent_before > LEAST_WORK * (now - last)
            idle = 0.0 if works else idle + now - last
            last, spent_before = now, spent
            if idle > IDLE_SECONDS:
                return b"".join(parts), f"{IDLE_SECONDS} s idle"
            if now > begun + WALL_SECONDS:
                return b"".join(parts), f"{WALL_SECONDS} s"


def _activity(session: int) -> tuple[bool, float]:
    """Whether a thread of a session's processes runs, waits for a processor or for a disk; their seconds of CPU."""
    runnable, ticks = False, 0
    for process in Path("/proc").iterdir():
        if not process.name.isdigit():
            continue
        with suppress(OSError):  # it has ended in between
            if int(_fields(process / "stat")[3]) == session:
                threads = [_fields(thread / "stat") for thread in (process / "task").iterdir()]
                runnable = runnable or any(fields[0] in "RD" for fields in threads)
                ticks += sum(int(fields[11]) + int(fields[12]) for fields in threads)
    return runnable, ticks / os.sysconf("SC_CLK_TCK")


def _fields(stat: Path) -> list[str]:
    """State, parent, group, session, ..., user and system time: what follows the name, which may hold anything."""
    return stat.read_text(encoding="utf-8", errors="replace").rpartition(")")[2].split()


def _in_child(target: Target, sound: Path, work: Path, seed: int, case: int, expected: str | None) -> Outcome:
    import faulthandler

    log = os.open(work.with_name(f"{work.name}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    faulthandler.enable(2)  # the log, whatever sys.stderr is
    faulthandler.register(signal.SIGUSR1, 2)  # tells where a hang is
    faulthandler.register(signal.SIGXCPU, 2, chain=True)
    size = int(Path("/proc/self/statm").read_text(encoding="ascii").split()[0]) * os.sysconf("SC_PAGE_SIZE")
    resource.setrlimit(resource.RLIMIT_AS, (size + MEMORY, size + MEMORY))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    spent = int(time.process_time()) + 1
    resource.setrlimit(resource.RLIMIT_CPU, (spent + CPU_SECONDS, spent + CPU_SECONDS + 5))
    warnings.simplefilter("ignore")
    shutil.copytree(sound, work, symlinks=True)
    os.chdir(work)
    change, sealed = "", False
    if expected is not None:
        rng = random.Random(f"{seed} {target.name} {case}")
        choices = [sorted(work.glob(pattern)) for pattern in target.files]
        path = rng.choice([path for path in rng.choice([paths for paths in choices if paths]) if path.is_file()])
        before = path.read_bytes()
        change = change_file(path, rng)
        if target.sealed:
            with suppress(OSError, ValueError, TypeError, LookupError, RecursionError):  # a manifest that is none
                seal(work / target.sealed)
        changed = not (path.is_file() and path.read_bytes() == before)
        sealed = not target.repairs and changed and _is_sealed(work, before, origin=not target.sealed)
    work.with_name(f"{work.name}.change").write_text(change, encoding="utf-8")
    return _judge(target, work, expected, change, sealed=sealed)


def _is_sealed(work: Path, content: bytes, *, origin: bool) -> bool:
    """Whether the hash of a file stands in another file of the folder.

    Args:
        work: The folder.
        content: Of the file, before it changed.
        origin: Whether the files of the original model count, which a checkpoint lists beside its own.
    """
    known = hashlib.sha256(content).hexdigest().encode()
    files = (path for path in work.rglob("*.json") if path.is_file() and (origin or path.name != FILES))
    return any(known in path.read_bytes() for path in files)


def _judge(target: Target, work: Path, expected: str | None, change: str, *, sealed: bool) -> Outcome:
    try:
        found = target.read(work)
    except QEError as error:
        words = f"{error.problem} {error.remedy}"
        readable = error.problem and error.remedy and len(words) < MAX_SENTENCE + 3 * len(str(work))
        where = "" if readable else _where(error.__traceback__)
        return Outcome(REFUSED if readable else "opaque", type(error).__name__, where, words[:2000], change)
    except SilentSuccessError as error:
        return Outcome("silent success", "", _where(error.__traceback__), str(error), change)
    except MemoryError as error:
        return Outcome("memory", "MemoryError", _where(error.__traceback__), str(error)[:500], change)
    except BaseException as error:  # noqa: BLE001 - whatever it is, it is what the fuzzer looks for
        sys.stderr.write("".join(traceback.format_exception(error))[-20_000:])
        memory = "can't allocate memory" in str(error) or "bad_alloc" in str(error)
        kind, words = type(error).__name__, " ".join(str(error).split())[:500]
        return Outcome("memory" if memory else "exception", kind, _where(error.__traceback__), words, change)
    if expected is None:
        return Outcome(ACCEPTED, message=found)
    complaint = target.judge(expected, found) or ("a file changed whose hash is on record" if sealed else "")
    return Outcome("silent success" if complaint else ACCEPTED, "", "", f"{target.name}: {complaint}", change)


def _where(trace: TracebackType | None) -> str:
    """The innermost line of ours."""
    found = ""
    while trace is not None:
        module = str(trace.tb_frame.f_globals.get("__name__", ""))
        if module.startswith("qe_edge"):
            found = f"{module}:{trace.tb_frame.f_code.co_name}:{trace.tb_lineno}"
        trace = trace.tb_next
    return found


def _last_line(work: Path) -> str:
    """Where a process was that could not tell itself, from the dump that Python left in its log."""
    log = work.with_name(f"{work.name}.log")
    if not log.exists():
        return ""
    for line in log.read_text(encoding="utf-8", errors="replace").splitlines():
        folder, _, rest = line.partition('", line ')
        if "File " in folder and any(
            part in folder for part in ("/qe_edge/", "/export/", "/calibration/", "/plugins/")
        ):
            return f"{Path(folder.partition('File ')[2].strip(chr(34))).stem}:{rest.partition(' in ')[2]}"
    return ""
