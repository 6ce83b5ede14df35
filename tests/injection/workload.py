"""A target: works until its stop file appears, and then tells what it has computed. Any Python 3.11, stdlib only.

    workload.py MODE STOP_FILE      work; print "ready", and at the end one JSON object
    workload.py twin CHAIN STEPS    compute the same undisturbed, and print the digest

What it checks on its way, a system call that came back early or interrupted, it lists as faults.
"""

import ctypes
import gc
import hashlib
import json
import math
import os
import signal
import sys
import threading
import time
from pathlib import Path

LIBC = ctypes.CDLL(None, use_errno=True)
WAIT_S = 0.004


def compute(state: bytes, step: int) -> bytes:
    total = math.fsum(math.sin(k * 0.1 + step) * math.sqrt(k) for k in range(60))
    return hashlib.sha256(state + repr(total).encode()).digest()


def memory(state: bytes, step: int) -> bytes:
    pieces = [bytes([(step + k) % 256]) * (k * 37 % 4000) for k in range(150)]
    table = {len(piece): [piece[:3]] * 5 for piece in pieces}
    table["self"] = table  # garbage for the collector
    if step % 50 == 0:
        gc.collect()
    return hashlib.sha256(state + b"".join(pieces)[::97]).digest()


def numpy(state: bytes, step: int) -> bytes:
    import numpy as np

    left = np.frombuffer(hashlib.shake_128(state).digest(96 * 96), dtype=np.uint8).reshape(96, 96).astype(np.float32)
    product = left
    for _ in range(12):
        product = np.tanh(product @ left / 3e4)
    return hashlib.sha256(state + product.tobytes()).digest()


CHAINS = {"compute": compute, "memory": memory, "numpy": numpy}


class Work:
    def __init__(self, stop: str) -> None:
        self.stop = stop
        self.chains: list[tuple[str, int, str]] = []
        self.faults: list[str] = []
        self.waits = 0

    def running(self) -> bool:
        return not Path(self.stop).exists()

    def chain(self, kind: str) -> None:
        state, step, advance = b"", 0, CHAINS[kind]
        while step == 0 or self.running():
            for _ in range(5):
                state, step = advance(state, step), step + 1
        self.chains.append((kind, step, state.hex()))

    def waiting(self, wait, expected) -> None:
        """System calls that wait must come back neither early, nor late by a restart, nor interrupted."""
        while self.running():
            started = time.monotonic()
            found = wait()
            took = time.monotonic() - started
            self.waits += 1
            if found != expected:
                self.faults.append(f"returned {found}, errno {ctypes.get_errno()}")
            if took < WAIT_S * 0.99:
                self.faults.append(f"early: {took}")


def wait_in_nanosleep() -> int:
    return LIBC.nanosleep((ctypes.c_long * 2)(0, int(WAIT_S * 1e9)), None)


def wait_in_poll() -> int:
    return LIBC.poll(None, 0, math.ceil(WAIT_S * 1e3))


def wait_in_condition() -> bool:
    return threading.Event().wait(WAIT_S)


def reader():
    """A blocking read of what another thread writes late, without Python's own retry."""
    source, sink = os.pipe()
    buffer = ctypes.create_string_buffer(8)

    def wait() -> bytes:
        threading.Timer(WAIT_S, os.write, (sink, b"12345678")).start()
        found = LIBC.read(source, buffer, 8)
        return buffer.raw if found == 8 else found

    return wait


def joiner() -> str:
    """A wait without a timeout, for a lock that another thread frees."""
    lock = threading.Lock()
    lock.acquire()
    threading.Timer(WAIT_S, lock.release).start()
    return "got it" if lock.acquire() else "nothing"


def main(mode: str, stop: str) -> None:
    work = Work(stop)
    ready = lambda: print("ready", flush=True)  # noqa: E731
    if mode in CHAINS:
        CHAINS[mode](b"", 0)
        ready()
        work.chain(mode)
    elif mode == "threads":
        threads = [threading.Thread(target=work.chain, args=(kind,)) for kind in ("compute", "memory", "compute")]
        for thread in threads:
            thread.start()
        ready()
        for thread in threads:
            thread.join()
    elif mode == "signals":
        received = []
        signal.signal(signal.SIGRTMIN, lambda number, frame: received.append(number))
        ready()
        while work.running():
            time.sleep(0.002)
        work.waits = len(received)
    else:
        waits = {
            "sleep": (lambda: time.sleep(WAIT_S), None),
            "nanosleep": (wait_in_nanosleep, 0),
            "poll": (wait_in_poll, 0),
            "read": (reader(), b"12345678"),
            "condition": (wait_in_condition, False),
            "lock": (joiner, "got it"),
        }
        ready()
        work.waiting(*waits[mode])
    # What an injection could leave behind.
    names = sorted(set(globals()) - KNOWN)
    deadline = time.monotonic() + 5  # a request's thread ends a little after its answer
    while any(thread.name.startswith("entropy") for thread in threading.enumerate()) and time.monotonic() < deadline:
        time.sleep(0.01)
    threads_left = [thread.name for thread in threading.enumerate()]
    found = {"chains": work.chains, "faults": work.faults, "waits": work.waits, "names": names, "threads": threads_left}
    print(json.dumps(found), flush=True)


def twin(kind: str, steps: int) -> None:
    state = b""
    for step in range(steps):
        state = CHAINS[kind](state, step)
    print(state.hex(), flush=True)


KNOWN = set(globals()) | {"KNOWN"}

if __name__ == "__main__":
    if sys.argv[1] == "twin":
        twin(sys.argv[2], int(sys.argv[3]))
    else:
        main(sys.argv[1], sys.argv[2])
