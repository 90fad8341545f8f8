"""Which line of a log is quoted: the error, whatever was written after it."""

import subprocess
import sys
import textwrap

import pytest

from feature_bridge.logs import MAX_CHARS, error_in, excerpt, last_line, quote, quote_file, read_end

RESOURCE_TRACKER = """
/python3.12/resource_tracker.py:279: UserWarning: resource_tracker: There appear to be 4 leaked semaphore objects
  warnings.warn('resource_tracker: There appear to be %d '
"""
TRAINING = """
Traceback (most recent call last):
  File "/app/feature_bridge/server.py", line 146, in serve
    answer = worker.check(request)
             ^^^^^^^^^^^^^^^^^^^^^
  File "/app/feature_bridge/targets/sglang_draft.py", line 84, in fields
    config, rope = self._model.draft_config, self._model.layers[0].self_attn.rotary_emb
                   ^^^^^^^^^^^^^^^^^^^^^^^^
AttributeError: 'DFlashDraftModel' object has no attribute 'draft_config'
"""
ATTRIBUTE = "AttributeError: 'DFlashDraftModel' object has no attribute 'draft_config'"

SCHEDULER = """
[2026-12-01 03:12:44 TP0] Load weight begin. avail mem=139.21 GB
Loading safetensors checkpoint shards: 100% Completed | 1/1 [00:00<00:00,  4.10it/s]
[2026-12-01 03:12:59 TP0] Scheduler hit an exception: Traceback (most recent call last):
  File "/env/sglang/srt/managers/scheduler.py", line 3094, in run_scheduler_process
    scheduler.event_loop_overlap()
  File "/env/torch/utils/_contextlib.py", line 120, in decorate_context
    return func(*args, **kwargs)
RuntimeError: The size of tensor a (4) must match the size of tensor b (3) at non-singleton dimension 1

[2026-12-01 03:12:59] Received sigquit from a child process. It usually means the child failed.
[2026-12-01 03:13:00] Child process died (pid=118). Terminating the server
"""

CHAINED = """
Traceback (most recent call last):
  File "/env/a.py", line 1, in load
    return table[name]
KeyError: 'layers'

During handling of the above exception, another exception occurred:

Traceback (most recent call last):
  File "/env/a.py", line 3, in load
    raise OSError(2, "No such file", "model.safetensors")
FileNotFoundError: [Errno 2] No such file: 'model.safetensors'

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/env/b.py", line 9, in <module>
    main()
ValueError: target.path='model' has no weights; give a complete directory
"""

LOGS = {
    "what came of SGLang 0.5.14": (TRAINING + RESOURCE_TRACKER, ATTRIBUTE),
    "SGLang's scheduler": (SCHEDULER + RESOURCE_TRACKER, "RuntimeError: The size of tensor a (4) must match the size "
                           "of tensor b (3) at non-singleton dimension 1"),
    "a chain": (CHAINED, "ValueError: target.path='model' has no weights; give a complete directory"),
    "ranks of torch": (
        """
[rank1]: Traceback (most recent call last):
[rank1]:   File "/env/worker.py", line 12, in <module>
[rank1]:     torch.distributed.all_reduce(x)
[rank1]: torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3356, unhandled cuda error
[rank1]:[W1201 03:12:59.1 ProcessGroupNCCL.cpp:1553] Warning: WARNING: destroy_process_group() was not called
""",
        "torch.distributed.DistBackendError: NCCL error in: ProcessGroupNCCL.cpp:3356, unhandled cuda error",
    ),
    "an error of CUDA, in several lines": (
        TRAINING.replace(ATTRIBUTE, """torch.AcceleratorError: CUDA error: an illegal memory access was encountered
Search for `cudaErrorIllegalAddress' in the CUDA documentation.
Compile with `TORCH_USE_CUDA_DSA` to enable device-side assertions."""),
        "torch.AcceleratorError: CUDA error: an illegal memory access was encountered",
    ),
    "a text that begins below its class": (
        """
Traceback (most recent call last):
  File "<string>", line 1, in <module>
    spawn_main()
RuntimeError: 
        An attempt has been made to start a new process before the
        current process has finished its bootstrapping phase.

        This probably means that you are not using fork.
""",  # noqa: W291
        "RuntimeError: An attempt has been made to start a new process before the current process has finished its "
        "bootstrapping phase.",
    ),
    "sizes that do not match": (
        """
Traceback (most recent call last):
  File "/env/module.py", line 2639, in load_state_dict
    raise RuntimeError(
RuntimeError: Error(s) in loading state_dict for Draft:
\tsize mismatch for fc.weight: copying a param with shape torch.Size([4, 8]) from checkpoint
""",
        "RuntimeError: Error(s) in loading state_dict for Draft: size mismatch for fc.weight: copying a param with "
        "shape torch.Size([4, 8]) from checkpoint",
    ),
    "no text": ('Traceback (most recent call last):\n  File "a.py", line 1\n    assert x\nAssertionError\n',
                "AssertionError"),
    "a class of another name": ('Traceback (most recent call last):\n  File "a.py", line 1\nzmq.Odd: odd\nready\n',
                                "zmq.Odd: odd"),
    "a syntax error": (
        'Traceback (most recent call last):\n  File "/a.py", line 1, in <module>\n    import b\n'
        '  File "/b.py", line 3\n    x = = 1\n        ^\nSyntaxError: invalid syntax\n',
        "SyntaxError: invalid syntax",
    ),
    "what other processes say of the end": (
        TRAINING
        + """
Process ForkServerProcess-2:
Traceback (most recent call last):
  File "/usr/lib/python3.12/multiprocessing/process.py", line 314, in _bootstrap
    self.run()
  File "/usr/lib/python3.12/multiprocessing/connection.py", line 399, in _recv
    raise EOFError
EOFError
Traceback (most recent call last):
  File "/env/readers.py", line 50, in loop
    connection.send(sample)
BrokenPipeError: [Errno 32] Broken pipe
""",
        ATTRIBUTE,
    ),
    "only what follows from another's end": (
        'Traceback (most recent call last):\n  File "a.py", line 1, in f\n    raise EOFError\nEOFError\n',
        "EOFError",
    ),
    "Python's own end": (
        TRAINING
        + """
Exception ignored in: <function Engine.__del__ at 0x7f0000000000>
Traceback (most recent call last):
  File "/env/engine.py", line 3, in __del__
    self.close()
ImportError: sys.meta_path is None, Python is likely shutting down
Exception ignored in atexit callback: <function shutdown at 0x7f0000000001>
Traceback (most recent call last):
  File "/env/x.py", line 3, in shutdown
    lock.acquire()
ValueError: semaphore is closed
""",
        ATTRIBUTE,
    ),
    "the tracker's own": (
        TRAINING
        + """
Traceback (most recent call last):
  File "/usr/lib/python3.12/multiprocessing/resource_tracker.py", line 264, in main
    cache[rtype].remove(name)
KeyError: '/loky-1-abc'
""",
        ATTRIBUTE,
    ),
    "another process's line in a traceback": (
        TRAINING.replace("             ^^^^^^^^^^^^^^^^^^^^^\n", "Readers: 4 processes\nWarmup\n"),
        ATTRIBUTE,
    ),
    "a group": (
        """
  + Exception Group Traceback (most recent call last):
  |   File "/env/serve.py", line 9, in main
  |     async with asyncio.TaskGroup() as group:
  | ExceptionGroup: unhandled errors in a TaskGroup (1 sub-exception)
  +-+---------------- 1 ----------------
    | Traceback (most recent call last):
    |   File "/env/serve.py", line 4, in ask
    |     raise ConnectionError("no server")
    | ConnectionError: no server
    +------------------------------------
""",
        "ConnectionError: no server",
    ),
    "a crash": (
        TRAINING
        + """
Fatal Python error: Segmentation fault

Current thread 0x00007f3c5f7fe640 (most recent call first):
  File "/env/torch/cuda.py", line 3 in launch
  File "/env/a.py", line 9 in main

Extension modules: numpy._core._multiarray_umath, torch._C (total: 2)
""",
        "Fatal Python error: Segmentation fault",
    ),
    "a C++ exception": (
        """
terminate called after throwing an instance of 'c10::Error'
  what():  CUDA error: device-side assert triggered
frame #0: c10::Error::Error(c10::SourceLocation, std::string) + 0x96 (0x7f in libc10.so)
frame #1: <unknown function> + 0x5d
""",
        "what():  CUDA error: device-side assert triggered",
    ),
    "killed": ("loading the target\nKilled\n" + RESOURCE_TRACKER, "Killed"),
    "a compiler": ("/tmp/a.cu(12): error: no instance of overloaded function\n1 error detected\nbuild stopped.\n",
                   "/tmp/a.cu(12): error: no instance of overloaded function"),
    "a window that begins inside a traceback": (
        "    return call(x)\nRuntimeError: CUDA error: out of memory\n" + RESOURCE_TRACKER,
        "RuntimeError: CUDA error: out of memory",
    ),
    "an error with a warning after it": (
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB\n/a.py:3: FutureWarning: old\n",
        "torch.OutOfMemoryError: CUDA out of memory. Tried to allocate 20 GiB",
    ),
    "colours": ('\x1b[31mTraceback (most recent call last):\x1b[0m\n  File "a"\n\x1b[1mValueError: red\x1b[0m\n',
                "ValueError: red"),
}  # fmt: skip


@pytest.mark.parametrize("name", LOGS)
def test_the_error_of_a_log(name):
    log, expected = LOGS[name]
    assert error_in(log) == expected[:MAX_CHARS]
    assert quote(log) == f"says: {expected[:MAX_CHARS]}"


@pytest.mark.parametrize(
    ("log", "last"),
    [
        ("index: 12 samples\nthe last words\n" + RESOURCE_TRACKER, "the last words"),
        ("no such module\n", "no such module"),
        ("ready\nSampling: 83%|████████▎ | 10/12 [00:01<00:00,  9.01it/s]\r", "ready"),
        ("ready\n[2026-12-01 03:13:00 TP0] Decode batch, #running-req: 3\n\n\n", "Decode batch, #running-req: 3"),
        ("WARNING: 2 errors: none of them an Error: at all\nready", "ready"),
    ],
)
def test_without_an_error_it_is_the_last_line_that_says_something(log, last):
    assert error_in(log) is None
    assert last_line(log) == last
    assert quote(log) == f"ends: {last}"


def test_nothing_but_noise_is_quoted_all_the_same():
    assert quote("") == "is empty"
    assert quote("\n \n") == "is empty"
    assert quote("a.py:1: UserWarning: odd\n") == "ends: a.py:1: UserWarning: odd"


def test_an_error_that_the_program_has_outlived():
    """A request that was refused an hour before the process was killed is not why it ended."""
    steps = "".join(f"row {i} filled\n" for i in range(99))
    assert quote(TRAINING + steps) == "ends: row 98 filled"
    assert quote(TRAINING + "row 1 filled\n") == f"says: {ATTRIBUTE}"


def test_a_file_and_what_was_in_it_before(tmp_path):
    log = tmp_path / "bridge.log"
    assert quote_file(log) == f"its log {log} cannot be read (No such file or directory)"
    log.write_text(TRAINING)
    start = log.stat().st_size
    assert quote_file(log) == f"its log {log} says: {ATTRIBUTE}"
    assert quote_file(log, start) == f"its log {log} is empty"
    log.write_bytes(log.read_bytes() + b"new\n" + b"\xff" * 70_000)
    assert len(read_end(log, start)) == 65536


def test_an_excerpt_begins_with_the_error():
    log = TRAINING + "".join(f"line {i}\n" for i in range(20)) + RESOURCE_TRACKER
    lines = excerpt(log, 5).splitlines()
    assert lines[0] == f"error: {ATTRIBUTE}"
    assert len(lines) == 2 + 5
    assert lines[2] == "line 17"
    assert excerpt("all is well\n") == "all is well"


def test_a_program_that_really_fails():
    """Its own traceback, and a thread's warnings and the semaphores that it leaves."""
    program = """
        import multiprocessing, warnings
        multiprocessing.set_start_method("spawn")
        lock = multiprocessing.Semaphore()
        try:
            {}["a"]
        except KeyError as error:
            warnings.warn("odd")
            raise RuntimeError("the real reason") from error
    """
    done = subprocess.run([sys.executable, "-c", textwrap.dedent(program)], capture_output=True, text=True, check=False)
    assert done.returncode == 1
    assert error_in(done.stderr) == "RuntimeError: the real reason"
