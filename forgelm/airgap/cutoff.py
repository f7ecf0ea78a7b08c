"""A process without a network: what is proved in it holds on a machine that has none."""

from __future__ import annotations

import errno
import socket
from collections.abc import Callable
from typing import Any, NoReturn

_TOLD = "there is no network here"


def cut_off(asked: Callable[[str], object] = lambda host: None) -> None:
    """Let no socket of this process reach anything but its own machine's files, from now on.

    `asked` is told each host that something tried to reach. Python's sockets alone are held:
    native code has to be told by the libraries' own switches (`hubcache.OFFLINE`).
    """
    connect, connect_ex = socket.socket.connect, socket.socket.connect_ex

    def refuse(address: Any) -> NoReturn:
        asked(str(address[0]))
        raise OSError(errno.ENETUNREACH, _TOLD)

    def no_connect(self: socket.socket, address: Any, /) -> Any:
        return connect(self, address) if self.family == socket.AF_UNIX else refuse(address)

    def no_connect_ex(self: socket.socket, address: Any, /) -> Any:
        if self.family == socket.AF_UNIX:
            return connect_ex(self, address)
        asked(str(address[0]))
        return errno.ENETUNREACH

    def no_sendto(self: socket.socket, data: Any, *rest: Any) -> NoReturn:
        refuse(rest[-1])

    def no_getaddrinfo(host: Any, *rest: Any, **more: Any) -> NoReturn:
        asked(str(host))
        raise socket.gaierror(socket.EAI_FAIL, _TOLD)

    for name, held in (
        ("connect", no_connect),
        ("connect_ex", no_connect_ex),
        ("sendto", no_sendto),
    ):
        setattr(socket.socket, name, held)
    socket.getaddrinfo = no_getaddrinfo
