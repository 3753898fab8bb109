"""Engines in threads: the same tokens as in one, and a process that leaves does so cleanly at any moment."""

from __future__ import annotations

import asyncio
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import httpx
import mlx.core as mx
import numpy as np
import pytest
from conftest import GOLDEN
from servers import eventually

import mlx_mtp
from mlx_mtp.backend import threads
from mlx_mtp.generation.prefix import Session

TARGET, DRAFTER = GOLDEN / "ple" / "target", GOLDEN / "ple" / "assistant_tied"
PATIENCE = 60
BEGIN = """
import asyncio, queue, sys, threading, time
from concurrent.futures import ThreadPoolExecutor
import mlx_mtp

def load():
    return mlx_mtp.load(sys.argv[1], drafter=sys.argv[2], depth=2)

def say(tokens=30, engine=None, told=None):
    for event in (engine or one).stream([1, 2, 3], max_tokens=tokens, ignore_end=True):
        if told is not None:
            told.set()

def for_ever(told):
    while True:
        say(200, told=told)

one = load()
"""
SHAPES = {
    "two threads": """
both = [threading.Thread(target=say) for _ in range(2)]
[thread.start() for thread in both], [thread.join() for thread in both]
""",
    "a pool": """
pool = ThreadPoolExecutor(3)
list(pool.map(say, [20] * 6))
""",
    "asyncio": """
async def main():
    await asyncio.gather(*(asyncio.to_thread(say) for _ in range(3)))
asyncio.run(main())
""",
    "a daemon in the middle of a reply": """
told = threading.Event()
threading.Thread(target=for_ever, args=(told,), daemon=True).start()
told.wait()
""",
    "daemons in the middle of replies": """
all_told = [threading.Event() for _ in range(3)]
for told in all_told:
    threading.Thread(target=for_ever, args=(told,), daemon=True).start()
[told.wait() for told in all_told]
""",
    "a daemon that looks for work all the time": """
work, done = queue.Queue(), threading.Event()
def serve():
    while True:
        try:
            work.get(timeout=0.0005)()
        except queue.Empty:
            pass
for _ in range(3):
    threading.Thread(target=serve, daemon=True).start()
for _ in range(3):
    work.put(say)
work.put(done.set)
done.wait()
""",
    "a daemon in the middle of a long prompt": """
import mlx_mtp.generation.loop
mlx_mtp.generation.loop.MAX_CHUNK, told = 16, threading.Event()
def read():
    while True:
        one.generate(list(range(3, 103)) * 2, max_tokens=1, on_prefill=lambda done, total: told.set())
threading.Thread(target=read, daemon=True).start()
told.wait()
""",
    "a thread that loads": """
found = []
thread = threading.Thread(target=lambda: found.append(load()))
thread.start(), thread.join()
say(engine=found[0])
thread = threading.Thread(target=say, args=(20, found[0]))
thread.start(), thread.join()
""",
    "a daemon that loads": """
def loads():
    while True:
        load()
threading.Thread(target=loads, daemon=True).start()
load()
""",
    "a generator that went from thread to thread": """
events = one.stream([1, 2, 3], max_tokens=100, ignore_end=True)
next(events)
thread = threading.Thread(target=lambda: next(events))
thread.start(), thread.join()
next(events)
""",
    "a session filled in a thread": """
session = mlx_mtp.Session()
thread = threading.Thread(target=lambda: one.generate([1, 2, 3], session=session))
thread.start(), thread.join()
""",
}
ENDS = {"": 0, "sys.exit(3)": 3, "raise SystemExit('sentence')": 1}


def left(code: str) -> tuple[int, str]:
    """Exit code and standard error of a process that runs the code."""
    found = subprocess.run([sys.executable, "-c", BEGIN + code, str(TARGET), str(DRAFTER)],
                           capture_output=True, text=True, timeout=PATIENCE)  # fmt: skip
    return found.returncode, found.stderr


@pytest.mark.parametrize("shape", SHAPES)
def test_leaving_is_clean(shape: str) -> None:
    ends = ENDS if "daemon in the middle of a reply" in shape else {"": 0}
    for end, code in ends.items():
        for _ in range(2):
            assert left(SHAPES[shape] + end) == (code, "sentence\n" if "sentence" in end else "")


def test_an_exception_in_the_main_thread_is_all_that_is_said() -> None:
    code, err = left(SHAPES["a daemon in the middle of a reply"] + "1 / 0")
    assert code == 1 and err.strip().endswith("ZeroDivisionError: division by zero") and "terminate" not in err


def test_an_interrupt_while_another_thread_decodes() -> None:
    code = SHAPES["a daemon in the middle of a reply"] + "print('now', flush=True); threading.Event().wait()"
    process = subprocess.Popen([sys.executable, "-c", BEGIN + code, str(TARGET), str(DRAFTER)], text=True,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                               preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler))  # fmt: skip
    assert process.stdout is not None
    assert process.stdout.readline() == "now\n"
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=PATIENCE)
    # Python's own end of an interrupted script: it takes the signal's own way out.
    assert process.returncode == -signal.SIGINT and err.rstrip().endswith("KeyboardInterrupt")


# In one process


@pytest.fixture(scope="module")
def engine() -> mlx_mtp.Engine:
    return mlx_mtp.load(TARGET, drafter=DRAFTER, depth=2)


def ids(count: int, seed: int) -> list[int]:
    return np.random.default_rng(seed).integers(3, 128, count).tolist()


def reply(engine: mlx_mtp.Engine, prompt: list[int], **options: Any) -> mlx_mtp.Result:
    return engine.generate(prompt, max_tokens=40, ignore_end=True, **options)


def elsewhere(work: Callable[[], Any]) -> Any:
    """What comes of it in a thread of its own, that has ended."""
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(work).result()


def test_threads_at_once_get_what_each_gets_alone(engine: mlx_mtp.Engine) -> None:
    prompts = [ids(20 + 7 * seed, seed) for seed in range(6)]
    options = [{"sampling": mlx_mtp.Sampling(temperature=0.8), "seed": seed} if seed % 2 else {} for seed in range(6)]
    alone = [reply(engine, prompt, **each).tokens for prompt, each in zip(prompts, options, strict=True)]
    with ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(reply, engine, prompt, **each) for prompt, each in zip(prompts, options, strict=True)]
        here = reply(engine, prompts[0]).tokens  # while those run
        found = [future.result().tokens for future in futures]
    assert found == alone and here == alone[0]


def test_a_session_goes_from_thread_to_thread(engine: mlx_mtp.Engine) -> None:
    session, said = Session(), ids(40, 1)
    for turn in range(4):
        ask = lambda said=said: reply(engine, said, session=session)  # noqa: E731
        result = ask() if turn == 2 else elsewhere(ask)
        assert result.tokens == reply(engine, said).tokens
        assert result.stats.prefilled_tokens == (40 if turn == 0 else 6)
        said = [*said, *result.tokens, *ids(5, turn)]


def test_an_engine_that_a_thread_has_loaded() -> None:
    engine = elsewhere(lambda: mlx_mtp.load(TARGET, drafter=DRAFTER, depth=2))
    assert reply(engine, ids(9, 1)).tokens == elsewhere(lambda: reply(engine, ids(9, 1))).tokens


def test_logits_from_a_thread(engine: mlx_mtp.Engine) -> None:
    tokens = mx.array([ids(9, 1)])
    there = elsewhere(lambda: engine.target.logits(tokens + 0))
    assert there.tolist() == engine.target.logits(tokens).tolist()


def test_asyncio(engine: mlx_mtp.Engine) -> None:
    async def both() -> list[mlx_mtp.Result]:
        return await asyncio.gather(*(asyncio.to_thread(reply, engine, ids(9, seed)) for seed in range(2)))

    assert [each.tokens for each in asyncio.run(both())] == [reply(engine, ids(9, seed)).tokens for seed in range(2)]


def test_errors_arrive_where_they_belong(engine: mlx_mtp.Engine) -> None:
    def stop(done: int, total: int) -> None:
        raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        elsewhere(lambda: reply(engine, ids(9, 1), on_prefill=stop))
    with pytest.raises(mlx_mtp.ModelNotFound):
        elsewhere(lambda: mlx_mtp.load("/nowhere"))
    assert elsewhere(lambda: reply(engine, ids(9, 1)).tokens) == reply(engine, ids(9, 1)).tokens


def test_a_reply_inside_a_reply(engine: mlx_mtp.Engine) -> None:
    """A callback that asks the same engine, in the thread that must answer it."""
    inner: list[list[int]] = []

    def ask(done: int, total: int) -> None:
        inner.append(reply(engine, ids(5, 2)).tokens)

    outer = elsewhere(lambda: reply(engine, ids(9, 1), on_prefill=ask).tokens)
    assert outer == reply(engine, ids(9, 1)).tokens and inner == [reply(engine, ids(5, 2)).tokens]


def test_work_is_done_in_the_main_thread_or_one_other() -> None:
    main = threading.get_ident()
    assert threads.run(threading.get_ident) == main
    others = {elsewhere(lambda: threads.run(threading.get_ident)) for _ in range(3)}
    assert len(others) == 1 and main not in others


def test_a_child_process_has_a_thread_of_its_own() -> None:
    code = """
thread = threading.Thread(target=say)
thread.start(), thread.join()
import os
from mlx_mtp.backend import threads
if child := os.fork():
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
found = []
thread = threading.Thread(target=lambda: found.append(threads.run(lambda: 7)))
thread.start(), thread.join()
os._exit(found[0])
"""
    assert left(code) == (7, "")


def test_an_engine_in_a_cycle() -> None:
    """A script may end while its own engine is in a cycle of references that only the end collects."""
    code = "class Holder: pass\nholder = Holder()\nholder.self, holder.engine = holder, one\n" + SHAPES["two threads"]
    assert left(code) == (0, "")


# The server


@contextmanager
def serving() -> Iterator[tuple[subprocess.Popen[str], str]]:
    """`mlx-mtp serve` and its address."""
    command = [sys.executable, "-m", "mlx_mtp.cli.app", "serve", "--port", "0", "--depth", "2"]
    handlers = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=handlers) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert line.startswith("Serving "), line + process.stderr.read()
            yield process, line.split()[3]
        finally:
            process.kill()


@contextmanager
def replying(url: str, tokens: int) -> Iterator[Iterator[str]]:
    """The lines of a streamed reply that has begun."""
    body = {"prompt": "import os\n", "max_tokens": tokens, "stream": True}
    with httpx.stream("POST", f"{url}/completions", json=body, timeout=PATIENCE, trust_env=False) as response:
        lines = response.iter_lines()
        next(lines)
        yield lines


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_second_signal_ends_the_server_at_once(number: signal.Signals) -> None:
    with serving() as (process, url), replying(url, 4000):
        assert process.stderr is not None
        process.send_signal(number)
        if number == signal.SIGINT:
            assert process.stderr.readline() == "finishing 1 reply, Ctrl-C again ends now\n"
        else:
            assert eventually(lambda: refuses(url))
        process.send_signal(number)
        assert process.wait(PATIENCE) == 130 and process.stderr.read() == ""


def refuses(url: str) -> bool:
    """Whether no new connection is taken any more, which is the first that the end of a server does."""
    try:
        httpx.get(f"{url}/models", timeout=5, trust_env=False)
    except httpx.HTTPError:
        return True
    return False


def test_one_signal_lets_the_reply_finish() -> None:
    with serving() as (process, url), replying(url, 60) as lines:
        process.send_signal(signal.SIGINT)
        rest = list(lines)
        assert rest[-2] == "data: [DONE]" and process.stderr is not None
        assert process.wait(PATIENCE) == 130
        assert process.stderr.read() in ("finishing 1 reply, Ctrl-C again ends now\n", "")  # "" where it was done


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_server_with_nothing_to_do_ends_at_once(number: signal.Signals, code: int) -> None:
    with serving() as (process, url):
        assert httpx.get(f"{url}/models", timeout=PATIENCE, trust_env=False).status_code == 200
        process.send_signal(number)
        assert process.wait(PATIENCE) == code and process.stderr is not None and process.stderr.read() == ""
