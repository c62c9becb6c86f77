"""TLS to a server, ended here: what the core says and hears goes through a socket pair.

Guarantees: one thread, bounded memory, back-pressure both ways; when one side ends the other does.
Does not know: what is said.
"""

import contextlib
import selectors
import socket
import ssl
import threading

from dualrestore.errors import LinkError

PIECE_BYTES = 256 * 1024


class TlsRelay:
    """From a connected socket, which it takes over, to a socket of the plain text."""

    def __init__(self, outside: socket.socket, context: ssl.SSLContext, hostname: str) -> None:
        self._outside = outside
        self._inside, self._plain = socket.socketpair()
        self._incoming, self._outgoing = ssl.MemoryBIO(), ssl.MemoryBIO()
        self._tls = context.wrap_bio(self._incoming, self._outgoing, server_hostname=hostname)
        self._thread: threading.Thread | None = None

    def open(self, place: str, seconds: float) -> socket.socket:
        """Speaks the handshake, then relays; the other end of the pair, to be used by the core."""
        try:
            self._outside.settimeout(seconds)
            while not self._shake():
                self._flush()
                self._take()
            self._flush()
            self._outside.settimeout(None)
        except (OSError, ssl.SSLError) as problem:
            raise LinkError(f"{place}: no TLS: {problem}") from problem
        self._thread = threading.Thread(target=self._run, name="tls-relay", daemon=True)
        self._thread.start()
        return self._plain

    def _shake(self) -> bool:
        try:
            self._tls.do_handshake()
        except ssl.SSLWantReadError:
            return False
        return True

    def _flush(self) -> None:
        if self._outgoing.pending:
            self._outside.sendall(self._outgoing.read())

    def _take(self) -> None:
        received = self._outside.recv(PIECE_BYTES)
        if not received:
            raise ConnectionError("the server closed it")
        self._incoming.write(received)

    def _run(self) -> None:
        # Either side may go at any moment: that is the end of it.
        with contextlib.suppress(OSError, ssl.SSLError), selectors.DefaultSelector() as selector:
            for end in (self._outside, self._inside):
                selector.register(end, selectors.EVENT_READ)
            self._hand_in()
            while True:
                ready = [key.fileobj for key, _ in selector.select()]
                if self._outside in ready:
                    self._take()
                    self._hand_in()
                if self._inside in ready:
                    said = self._inside.recv(PIECE_BYTES)
                    if not said:
                        break
                    self._tls.write(said)
                self._flush()
        for end in (self._inside, self._outside):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)

    def _hand_in(self) -> None:
        with contextlib.suppress(ssl.SSLWantReadError):
            while True:
                plain = self._tls.read(PIECE_BYTES)
                if not plain:
                    raise ConnectionError("the server has ended TLS")
                self._inside.sendall(plain)

    def close(self) -> None:
        """Ends both sides, and the thread."""
        for end in (self._inside, self._outside, self._plain):
            with contextlib.suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)
        if self._thread is not None:
            self._thread.join()
        for end in (self._inside, self._outside, self._plain):
            end.close()
