"""Engines in threads: the same tokens as in one, and a process that leaves does so cleanly at any moment."""

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any
from unittest import mock

import httpx
import mlx.core as mx
import pytest
from conftest import GOLDEN
from greedy import ids

import mlx_mtp
from mlx_mtp.backend import threads
from mlx_mtp.generation.prefix import Session

TARGET, DRAFTER = GOLDEN / "ple" / "target", GOLDEN / "ple" / "assistant_tied"
PATIENCE = 60
BEGIN = """
import asyncio, os, queue, sys, threading
from concurrent.futures import ThreadPoolExecutor
import mlx_mtp
from mlx_mtp.backend import threads

def load():
    return mlx_mtp.load(sys.argv[1], drafter=sys.argv[2], depth=2)

def say(tokens=30, engine=None, told=None):
    for event in (engine or one).stream([1, 2, 3], max_tokens=tokens, ignore_end=True):
        if told is not None:
            told.set()

def thread(work):
    found = []
    begun = threading.Thread(target=lambda: found.append(work()))
    begun.start(), begun.join()
    return found[0]

one = load()
"""
# Whatever threads that have ended may leave behind: each of these once aborted the process at its end, or could.
ENDED = """
both = [threading.Thread(target=say) for _ in range(2)]
[each.start() for each in both], [each.join() for each in both]
with ThreadPoolExecutor(3) as pool:
    list(pool.map(say, [20] * 6))
unjoined = ThreadPoolExecutor(2)
list(unjoined.map(say, [20] * 2))

async def main():
    await asyncio.gather(*(asyncio.to_thread(say) for _ in range(3)))
asyncio.run(main())

other = thread(load)
say(engine=other)
thread(lambda: say(20, other))
events = one.stream([1, 2, 3], max_tokens=100, ignore_end=True)
next(events)
thread(lambda: next(events))
next(events)
session = mlx_mtp.Session()
thread(lambda: one.generate([1, 2, 3], session=session))

class Holder: pass
holder = Holder()  # only the end of the process collects it
holder.self, holder.engine = holder, one
if child := os.fork():
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 7
else:
    os._exit(thread(lambda: threads.run(lambda: 7)))  # a child has none of its parent's threads
"""
# Daemons in the middle of replies, of a long prompt, of loading, and looking for work.
DAEMONS = """
import mlx_mtp.generation.loop
mlx_mtp.generation.loop.MAX_CHUNK = 16
begun, work = [threading.Event() for _ in range(5)], queue.Queue()

def replies(told):
    say(200, told=told)

def reads(told):
    one.generate(list(range(3, 103)) * 2, max_tokens=1, on_prefill=lambda done, total: told.set())

def loads(told):
    load()
    told.set()

def serves(told):
    try:
        work.get(timeout=0.0005)()
    except queue.Empty:
        told.set()

def daemon(work, told):
    while True:
        work(told)

for kind, told in zip((replies, replies, reads, loads, serves), begun):
    threading.Thread(target=daemon, args=(kind, told), daemon=True).start()
work.put(say)
[told.wait() for told in begun]
"""


def left(code: str) -> tuple[int, str]:
    """Exit code and standard error of a process that runs the code."""
    found = subprocess.run([sys.executable, "-c", BEGIN + code, str(TARGET), str(DRAFTER)],
                           capture_output=True, text=True, timeout=PATIENCE)  # fmt: skip
    return found.returncode, found.stderr


def test_threads_that_have_ended() -> None:
    assert left(ENDED) == (0, "")


def test_daemons_in_the_middle_of_work() -> None:
    assert left(DAEMONS + "raise SystemExit('sentence')") == (1, "sentence\n")


FORKS = """
import time
import mlx.core as mx
a, done = mx.random.normal((1024, 1024)), False
def product(x=a):
    for _ in range(4): x = x @ a / 32
    return x
def go():
    while not done: threads.run(lambda: mx.eval(product()))
(worker := threading.Thread(target=go)).start()
for i in range(20):
    mx.async_eval(x := product())
    time.sleep(0.001 * (i % 7))
    if (child := os.fork()) == 0: os._exit(0)
    os.waitpid(child, 0)
    mx.eval(x)
done = True
worker.join()
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork here")
def test_a_fork_while_two_threads_compute() -> None:
    """OpenBLAS ends its threads in front of a fork; nobody may wait for them then."""
    assert left(FORKS)[0] == 0  # Python warns of any fork beside threads


def test_an_interrupt_while_another_thread_decodes() -> None:
    code = "threading.Thread(target=say, args=(10**6, one, told := threading.Event()), daemon=True).start()\n"
    code += "told.wait(); print('now', flush=True); threading.Event().wait()"
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


def test_what_a_thread_loads_and_computes_is_the_same(engine: mlx_mtp.Engine) -> None:
    loaded = elsewhere(lambda: mlx_mtp.load(TARGET, drafter=DRAFTER, depth=2))
    assert reply(loaded, ids(9, 1)).tokens == elsewhere(lambda: reply(loaded, ids(9, 1))).tokens
    tokens = mx.array([ids(9, 1)])
    there = elsewhere(lambda: engine.target.logits(tokens + 0))
    assert there.tolist() == engine.target.logits(tokens).tolist()


def test_errors_arrive_where_they_belong(engine: mlx_mtp.Engine) -> None:
    stop = mock.Mock(side_effect=ZeroDivisionError)
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


# The server


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 0)])
def test_a_signal_lets_the_reply_finish(number: signal.Signals, code: int) -> None:
    """The command itself; a second signal is in test_server_waiting.py."""
    command = [sys.executable, "-m", "mlx_mtp.cli.app", "serve", "--port", "0", "--depth", "2", "--model", str(TARGET),
               "--drafter", str(DRAFTER)]  # fmt: skip
    handlers = lambda: signal.signal(signal.SIGINT, signal.default_int_handler)  # noqa: E731
    with subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=handlers) as process:
        try:
            assert process.stderr is not None
            line = process.stderr.readline()
            assert line.startswith("Serving target at http://127.0.0.1:"), line + process.stderr.read()
            url, body = f"{line.split()[3]}/completions", {"prompt": [1, 2, 3], "max_tokens": 60, "stream": True}
            with httpx.stream("POST", url, json=body, timeout=PATIENCE, trust_env=False) as response:
                lines = response.iter_lines()
                next(lines)
                process.send_signal(number)
                assert list(lines)[-2] == "data: [DONE]"
            assert process.wait(PATIENCE) == code
            said = process.stderr.read()  # nothing where the reply was done already
            assert said in ("", "finishing 1 reply, Ctrl-C again ends now\n"[: 100 * (number == signal.SIGINT)])
        finally:
            process.kill()
