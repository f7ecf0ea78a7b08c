"""A Hub that fails as real ones do: cut, stalled, overloaded, wrong, refusing."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace

from hub_server import Dropped, HubError, HubServer, Request, Response

Action = Callable[["FaultyHub", Request, Response], Response]
EVER = 1_000_000

# What requests there are, by path.
INFO = r"/api/models/[^/]+/[^/]+/revision/.*"
TREE = r"/api/models/[^/]+/[^/]+/tree/.*"
FILE = r"/[^/]+/[^/]+/resolve/.*"


@dataclass
class Fault:
    """What happens to requests whose path matches, so many times."""

    path: str
    action: Action
    times: int = 1
    seen: list[Request] = field(default_factory=list)


class FaultyHub(HubServer):
    """A Hub whose `faults` come first."""

    def __init__(self, **options: object) -> None:
        super().__init__(**options)  # type: ignore[arg-type]
        self.faults: list[Fault] = []

    def answer(self, request: Request) -> Response:
        for fault in self.faults:
            if re.fullmatch(fault.path, request.path) and len(fault.seen) < fault.times:
                fault.seen.append(request)
                return fault.action(self, request, super().answer(request))
        return super().answer(request)


def status(code: int, **headers: str) -> Action:
    """Another status instead of the answer."""

    def act(hub: FaultyHub, request: Request, response: Response) -> Response:
        return HubError(code, "", "not now", **headers).response()

    return act


def cut(after: int, drop: str = "reset") -> Action:
    """The body ends after so many bytes: by a reset, by closing ("close"), or it stalls."""

    def act(hub: FaultyHub, request: Request, response: Response) -> Response:
        def body() -> Iterator[bytes]:
            content = b"".join(response.body)
            yield content[: min(after, len(content) - 1)]
            if drop == "stall":
                time.sleep(3)
            raise Dropped(reset=drop == "reset")

        return replace(response, body=body())

    return act


def late(hub: FaultyHub, request: Request, response: Response) -> Response:
    """No answer for longer than a client waits."""
    time.sleep(2)
    return response


def reset(hub: FaultyHub, request: Request, response: Response) -> Response:
    """The connection is reset before any answer."""
    raise Dropped(reset=True)


def flip(hub: FaultyHub, request: Request, response: Response) -> Response:
    """One bit of the body is another."""
    content = bytearray(b"".join(response.body))
    content[len(content) // 2] ^= 1
    return replace(response, body=[bytes(content)])


def shorten(hub: FaultyHub, request: Request, response: Response) -> Response:
    """A whole answer of fewer bytes than the file has."""
    content = b"".join(response.body)[:1000]
    headers = response.headers | {"Content-Length": str(len(content))}
    return Response(response.status, headers, [content])


def lengthen(hub: FaultyHub, request: Request, response: Response) -> Response:
    """A whole answer of more bytes than the file has."""
    content = b"".join(response.body) + b"more"
    return Response(
        response.status, response.headers | {"Content-Length": str(len(content))}, [content]
    )


def without_ranges(hub: FaultyHub, request: Request, response: Response) -> Response:
    """The whole file, whatever part was asked for."""
    if "Range" in request.headers:
        del request.headers["Range"]
        return HubServer.answer(hub, request)
    return response


def around(hub: FaultyHub, request: Request, response: Response) -> Response:
    """A redirect to itself."""
    return Response(302, {"Location": request.path, "Content-Length": "0"})


def listing(old: bytes, new: bytes) -> Action:
    """A list of files in which something else stands."""

    def act(hub: FaultyHub, request: Request, response: Response) -> Response:
        content = b"".join(response.body).replace(old, new)
        headers = response.headers | {"Content-Length": str(len(content))}
        return Response(response.status, headers, [content])

    return act


def login_page(hub: FaultyHub, request: Request, response: Response) -> Response:
    """What a hotel's network answers to everything."""
    page = b"<html>Please log in</html>"
    return Response(200, {"Content-Type": "text/html", "Content-Length": str(len(page))}, [page])
