"""Time as the far end makes it, so that no test of a time-out can pass or fail by what else the machine does."""
import select
import socket
import threading
import time


class Clock:
    """Stands in for the program's module `time`, and for the time-outs of the sockets that it reads from.

    It runs as the machine's own does, and is moved on where an endpoint holds its answer back: by the whole time-out
    of the one read that waits for it (`never`), or by SECONDS for each read that waits for another byte of an answer
    that drips (`drips`). So an answer that never comes costs no time, and one that comes has all the time that the
    program gives it. What the program sleeps is noted in `waits` and over at once.
    """

    SECONDS = 10.0    # that each read of a dripping answer takes

    def __init__(self):
        self.made = 0.0
        self.waits: list[float] = []
        self.wall = 1_700_000_000
        self.silent: set[tuple] = set()                         # by the client's address
        self.dripping: dict[tuple, threading.Semaphore] = {}    # of each, how many bytes are asked for

    # -- for the program -------------------------------------------------------------------------------------------

    def monotonic(self) -> float:
        return time.monotonic() + self.made

    def time(self) -> float:
        return self.wall

    def sleep(self, seconds: float) -> None:
        self.waits.append(seconds)

    def recv(self, connection: socket.socket, *size) -> bytes:
        """What socket.recv does, with time-outs by this clock."""
        limit = connection.gettimeout()
        if limit:
            self.wait_for_bytes(connection, limit)
        return plain_recv(connection, *size)

    def wait_for_bytes(self, connection: socket.socket, limit: float) -> None:
        """Until the connection can be read, or for that many seconds; then raise what a socket does."""
        address, end, asked = connection.getsockname(), self.monotonic() + limit, False
        while not select.select([connection], [], [], 0.01)[0]:
            if address in self.silent:
                self.silent.discard(address)
                self.made += limit
            elif address in self.dripping and not asked:
                asked = True
                self.made += self.SECONDS
                self.dripping[address].release()
            if self.monotonic() >= end:
                raise TimeoutError("timed out")

    # -- for the far end -------------------------------------------------------------------------------------------

    def never(self, address: tuple) -> None:
        """No byte more comes to this client: the time-out of its read is over at once."""
        self.silent.add(address)

    def drips(self, address: tuple, gone) -> bool:
        """Wait until the client reads on in an answer that drips; False where it does not, once gone() says so."""
        wanted = self.dripping.setdefault(address, threading.Semaphore(0))
        while not wanted.acquire(timeout=0.01):
            if gone():
                self.dripping.pop(address, None)
                return False
        return True


plain_recv = socket.socket.recv

