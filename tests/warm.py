"""Runs the program in a process of its own without paying for its imports each time.

An interpreter that has imported the program and its packages waits on a socket and forks for each run: what runs is a
real process with streams, working folder, environment and exit status of its own, a tenth of a second after it was
asked for. Start-up itself, signals and odd streams are tested with real starts of the program.
"""
import array
import json
import os
import pathlib
import socket
import subprocess
import sys
import tempfile

PROGRAM = pathlib.Path(__file__).resolve().parent.parent / "store_study_info.py"


class Warm:
    """The waiting interpreter, as a context manager."""

    def __enter__(self):
        ours, theirs = socket.socketpair()
        self.process = subprocess.Popen([sys.executable, __file__, str(theirs.fileno())],
                                        pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL)
        theirs.close()
        self.socket = ours
        return self

    def __exit__(self, *_):
        self.socket.close()
        self.process.wait(60)

    def run(self, arguments, folder, environment) -> tuple[int, str, str]:
        """Exit status, stdout, stderr."""
        with open(os.devnull, "rb") as nothing, tempfile.TemporaryFile() as out, tempfile.TemporaryFile() as err:
            message = json.dumps({"arguments": arguments, "folder": str(folder), "environment": environment}).encode()
            rights = array.array("i", [file.fileno() for file in (nothing, out, err)])
            self.socket.sendmsg([len(message).to_bytes(4, "big") + message],
                                [(socket.SOL_SOCKET, socket.SCM_RIGHTS, rights)])
            status = int.from_bytes(self.socket.recv(4), "big", signed=True)
            out.seek(0)
            err.seek(0)
            return status, out.read().decode(), err.read().decode()


def serve(connection: socket.socket) -> None:
    """Fork for each message: length, JSON, and the three standard streams."""
    sys.path.insert(0, str(PROGRAM.parent))
    import httpx  # noqa: F401 - the program imports it where it first needs it
    import store_study_info
    store_study_info.client_class()
    while True:
        data, ancillary, _, _ = connection.recvmsg(1 << 20, socket.CMSG_SPACE(3 * 4))
        if not data:
            return
        while len(data) < 4 + int.from_bytes(data[:4], "big"):
            data += connection.recv(1 << 20)
        streams = array.array("i", ancillary[0][2]).tolist()
        child = os.fork()
        if child == 0:
            connection.close()
            become(json.loads(data[4:]), streams, store_study_info)
        for stream in streams:
            os.close(stream)
        connection.sendall(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]).to_bytes(4, "big", signed=True))


def become(wanted: dict, streams: list[int], program) -> None:
    for number, stream in enumerate(streams):
        os.dup2(stream, number)
        os.close(stream)
    os.chdir(wanted["folder"])
    os.environ.clear()
    os.environ.update(wanted["environment"])
    sys.argv = [str(PROGRAM), *wanted["arguments"]]
    status = 70
    try:
        status = program.main()
    except SystemExit as end:    # after --help, --version and usage errors
        status = int(end.code or 0)
    except BaseException:    # what the interpreter would print
        import traceback
        traceback.print_exc()
        status = 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


if __name__ == "__main__":
    serve(socket.socket(fileno=int(sys.argv[1])))
