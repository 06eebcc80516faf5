"""A command in a process of its own, forked from one that has imported already what takes every command four seconds.

`Popen([sys.executable, "-m", MODULE, ...])` or `"-c", CODE`: what the tests use of subprocess.Popen, its pipes text."""

import array
import atexit
import builtins
import contextlib
import importlib
import json
import os
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import threading
import traceback
import types
import warnings

IMPORTED = ("torch._dynamo", "torch._inductor", "hydra.main", "implicit_bench.cli", "implicit_bench.bench.command",
            "implicit_bench.compare.command", "implicit_bench.sweep.command")  # fmt: skip
_server = None  # this process's socket to the one that forks


class Popen:
    def __init__(self, argv, *, cwd=None, env=None):
        self.args, self.returncode, self._said = argv, None, b""
        (out, theirs), (err, others) = os.pipe(), os.pipe()
        self._end, far = socket.socketpair()
        request = {"argv": argv[1:], "cwd": str(cwd or os.getcwd()), "env": dict(env or os.environ)}
        _forker().sendmsg([json.dumps(request).encode()], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array(
            "i", [theirs, others, far.fileno()]))])  # fmt: skip
        for each in (theirs, others):
            os.close(each)
        far.close()
        self.stdout, self.stderr = open(out, encoding="utf-8"), open(err, encoding="utf-8")  # noqa: SIM115
        self.pid = int(self._line(60))

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        self.stdout.close()
        self.stderr.close()
        self.wait()

    def _line(self, timeout):
        """The next thing that the child's parent says: its pid, then its exit status. None: not yet."""
        while b"\n" not in self._said:
            if not select.select([self._end], [], [], timeout)[0]:
                return None
            if not (more := self._end.recv(64)):
                raise ChildProcessError("the process that forks has died")
            self._said += more
        line, _, self._said = self._said.partition(b"\n")
        return line

    def poll(self):
        if self.returncode is None and (line := self._line(0)) is not None:
            self.returncode = int(line)
        return self.returncode

    def wait(self, timeout=None):
        if self.returncode is None:
            if (line := self._line(timeout)) is None:
                raise subprocess.TimeoutExpired(self.args, timeout)
            self.returncode = int(line)
        return self.returncode

    def communicate(self, timeout=None):
        said = {}
        readers = [threading.Thread(target=lambda n=name: said.update({n: getattr(self, n).read()}), daemon=True)
                   for name in ("stdout", "stderr")]  # fmt: skip
        for reader in readers:
            reader.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()  # or it would go on beside the tests that follow
            raise
        for reader in readers:
            reader.join(timeout)
        self.stdout.close()
        self.stderr.close()
        return said.get("stdout"), said.get("stderr")

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def kill(self):
        self.send_signal(signal.SIGKILL)


def run(argv, *, cwd=None, env=None, timeout=None):
    process = Popen(argv, cwd=cwd, env=env)
    out, err = process.communicate(timeout)
    return subprocess.CompletedProcess(argv, process.returncode, out, err)


def _forker():
    """Ends with this process, whose end closes the socket."""
    global _server
    if _server is None:
        _server, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        subprocess.Popen([sys.executable, __file__, str(theirs.fileno())], pass_fds=[theirs.fileno()])
        theirs.close()
        atexit.register(_server.close)
    return _server


# ------------------------------------------------------------------------------------------- the process that forks


def _serve(own):
    for name in IMPORTED:
        importlib.import_module(name)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    while True:
        text, fds, *_ = socket.recv_fds(own, 1 << 20, 3)
        if not text:
            return
        if os.fork() == 0:
            own.close()
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
            _parent(json.loads(text), *fds)
        for fd in fds:
            os.close(fd)


def _parent(request, out, err, end):
    """Tells the pid of the child, and how it ended."""
    pid = os.fork()
    if pid == 0:
        os.close(end)
        _child(request, out, err)
    for fd in (out, err):
        os.close(fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.write(end, b"%d\n" % pid)
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(OSError):  # whoever asked is gone
        os.write(end, b"%d\n" % code)
    os._exit(0)


def _child(request, out, err):
    code = 1
    try:
        _as_if_new(request, out, err)
        flag, what, *words = request["argv"]
        if flag == "-m":
            sys.argv = [what, *words]
            runpy.run_module(what, run_name="__main__", alter_sys=True)
        else:
            sys.argv, main = ["-c", *words], types.ModuleType("__main__")
            sys.modules["__main__"] = main
            exec(what, main.__dict__)
        code = 0
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if isinstance(end.code, str):
            print(end.code, file=sys.stderr)
    except BaseException:
        traceback.print_exc()
    finally:
        try:
            threading._shutdown()
            atexit._run_exitfuncs()
            sys.stdout.flush()
            sys.stderr.flush()
        finally:
            os._exit(code & 0xFF)


def _as_if_new(request, out, err):
    signal.signal(signal.SIGINT, signal.default_int_handler)  # tests may run where Ctrl-C is ignored, as behind nohup
    null = os.open(os.devnull, os.O_RDONLY)
    for fd, to in ((null, 0), (out, 1), (err, 2)):
        os.dup2(fd, to)
    os.closerange(3, max(null, out, err) + 1)
    sys.stdin, sys.stdout = open(0), open(1, "w", encoding="utf-8")  # noqa: SIM115
    sys.stderr = open(2, "w", 1, encoding="utf-8", errors="backslashreplace")  # noqa: SIM115
    os.environ.clear()
    os.environ.update(request["env"])
    os.chdir(request["cwd"])
    random.seed()
    sys.path[0] = ""
    sys.path[1:1] = [path for path in request["env"].get("PYTHONPATH", "").split(os.pathsep) if path]
    for option in filter(None, request["env"].get("PYTHONWARNINGS", "").split(",")):
        action, _, category = option.partition("::")
        warnings.simplefilter(action, getattr(builtins, category) if category else Warning)


if __name__ == "__main__":
    _serve(socket.socket(fileno=int(sys.argv[1])))
