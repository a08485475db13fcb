"""A backbone behind HTTP on this machine: images in, features and the cluster or class out.

    request -> host, token -> size by its header -> body, up to a limit and in time -> decoder (threads)
            -> waiting crops, up to 32 at a time -> network (one thread) -> JSON

A request is refused as early as possible: nothing of a body is read without the token, or above the limit. At most
`_AT_ONCE` bodies are held in memory; other requests wait.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import json
import secrets
import socket
import sys
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import torch
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.trustedhost import TrustedHostMiddleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse
from starlette.routing import Route
from torch import Tensor

from tessella.atlas.assign import Columns, Described, described
from tessella.atlas.classifier import is_classifier
from tessella.data.decode import Unreadable, decode
from tessella.data.transform import EvalTransform
from tessella.engine.interrupt import Stopped
from tessella.errors import UserError
from tessella.text import printable
from tessella.weights.resolve import Loaded, resolve_backbone

MOST_BYTES = 32 * 2**20  # of a body
MOST_IMAGES = 64  # of a batch
_FORWARD = 32  # images per forward pass
_AT_ONCE = 16  # bodies in memory
_BODY_SECONDS = 30.0  # in which a body must have arrived
_STOP_SECONDS = 10  # that open requests have to finish

Row = dict[str, Any]
Describe = Callable[[Tensor], Columns]


class Network(NamedTuple):
    """What computes the answers."""

    transform: EvalTransform
    answers: Callable[[Tensor], list[Row]]  # (b, size, size, 3) uint8 -> what is said of each image
    about: dict[str, Any]  # the network in words


def network(source: str, device: torch.device) -> Network:
    """The network that a name stands for.

    Args:
        source: a classifier, an atlas or a run with clusters, which say more than the features; or any backbone.
        device: where it runs.

    Raises:
        UserError: it names no backbone.
    """
    path = Path(source)
    if is_classifier(path) or (path / "atlas.json").is_file():
        return of_loaded(*described(path, device), device)
    loaded = resolve_backbone(source)
    clusters = loaded.method is not None and loaded.method.clusters
    return of_loaded(*(described(path, device) if clusters else Described(loaded, [], lambda x: {})), device)


def of_loaded(loaded: Loaded, columns: list[tuple[str, str]], describe: Describe, device: torch.device) -> Network:
    """A network from the parts of `Described`."""
    backbone = loaded.backbone.to(device).eval()

    def answers(crops: Tensor) -> list[Row]:
        with torch.inference_mode():
            features = backbone(loaded.transform.normalised(crops.to(device))).float().cpu()
        found = {"features": features.numpy()} | describe(features)
        values = {name: value if isinstance(value, list) else value.tolist() for name, value in found.items()}
        return [dict(zip(values, row, strict=True)) for row in zip(*values.values(), strict=True)]

    about = {"network": loaded.config.name, "features": loaded.backbone.feature_dim, "size": loaded.transform.size}
    return Network(loaded.transform, answers, about | {"also": [name for name, _ in columns]})


class App:
    """The application. Threads decode; one thread computes."""

    def __init__(self, served: Network, token: str | None, threads: int, body_seconds: float = _BODY_SECONDS) -> None:
        self._network, self._token, self._body_seconds = served, token, body_seconds
        self._decoders, self._computer = ThreadPoolExecutor(threads), ThreadPoolExecutor(1)

    def starlette(self, hosts: list[str]) -> Starlette:
        """The app for requests to these hosts: a page elsewhere cannot reach it by a name of its own."""
        routes = [
            Route("/", self._about),
            Route("/openapi.json", self._openapi),
            Route("/image", self._image, methods=["POST"]),
            Route("/batch", self._batch, methods=["POST"]),
        ]
        return Starlette(
            routes=routes,
            middleware=[Middleware(TrustedHostMiddleware, allowed_hosts=hosts)],
            exception_handlers={HTTPException: _refused},
            lifespan=self._life,
        )

    @contextlib.asynccontextmanager
    async def _life(self, app: Starlette) -> AsyncIterator[None]:
        self._waiting: asyncio.Queue[tuple[Tensor, asyncio.Future[Row]]] = asyncio.Queue()
        self._admitted = asyncio.Semaphore(_AT_ONCE)
        computing = asyncio.create_task(self._compute())
        yield
        computing.cancel()
        self._decoders.shutdown(cancel_futures=True)
        self._computer.shutdown(cancel_futures=True)

    async def _about(self, request: Request) -> JSONResponse:
        return JSONResponse(self._network.about | {"description": "/openapi.json"})

    async def _openapi(self, request: Request) -> JSONResponse:
        return JSONResponse(openapi(self._network.about))

    async def _image(self, request: Request) -> JSONResponse:
        async with self._body(request) as body:
            crop = await self._crop(body, "the image")
        return JSONResponse(await self._answer(crop))

    async def _batch(self, request: Request) -> JSONResponse:
        async with self._body(request) as body:
            images = _images_in(body)
            crops = await asyncio.gather(*(self._crop(image, f"image {n}") for n, image in enumerate(images)))
        return JSONResponse({"images": await asyncio.gather(*map(self._answer, crops))})

    @contextlib.asynccontextmanager
    async def _body(self, request: Request) -> AsyncIterator[bytes]:
        """A request's body, for as long as it may be held."""
        given = request.headers.get("authorization", "").encode()
        if self._token is not None and not secrets.compare_digest(given, f"Bearer {self._token}".encode()):
            raise HTTPException(401, "send the token: Authorization: Bearer TOKEN", {"WWW-Authenticate": "Bearer"})
        length = request.headers.get("content-length", "0")
        if not length.isdecimal() or int(length[:20]) > MOST_BYTES:
            raise _too_large()
        async with self._admitted:
            body = bytearray()
            try:
                async with asyncio.timeout(self._body_seconds):
                    async for chunk in request.stream():
                        body += chunk
                        if len(body) > MOST_BYTES:  # no length was given, or a wrong one
                            raise _too_large()
            except TimeoutError:
                raise HTTPException(408, f"the body did not arrive within {self._body_seconds:g} seconds") from None
            except ClientDisconnect:
                raise HTTPException(400, "the connection was closed before the body had arrived") from None
            if not body:
                raise HTTPException(400, "the body is empty: send the bytes of an image file")
            yield bytes(body)

    async def _crop(self, encoded: bytes, what: str) -> Tensor:
        def crop() -> Tensor:
            return self._network.transform.crop(decode(encoded))

        try:
            return await asyncio.get_running_loop().run_in_executor(self._decoders, crop)
        except Unreadable as error:
            raise HTTPException(422, f"{what} cannot be decoded: {printable(str(error))}") from None

    async def _answer(self, crop: Tensor) -> Row:
        answer: asyncio.Future[Row] = asyncio.get_running_loop().create_future()
        await self._waiting.put((crop, answer))
        return await answer

    async def _compute(self) -> None:
        """Answer what waits, several images at a time."""
        while True:
            asked = [await self._waiting.get()]
            while len(asked) < _FORWARD and not self._waiting.empty():
                asked.append(self._waiting.get_nowait())
            crops = torch.stack([crop for crop, _ in asked])
            try:
                rows = await asyncio.get_running_loop().run_in_executor(self._computer, self._network.answers, crops)
            except Exception as error:  # of one forward pass; the others have their own
                rows = [error] * len(asked)  # type: ignore[list-item]
            for (_, answer), row in zip(asked, rows, strict=True):
                if answer.done():  # whoever asked has gone
                    continue
                answer.set_exception(row) if isinstance(row, Exception) else answer.set_result(row)


def _images_in(body: bytes) -> list[bytes]:
    """The images of a batch: {"images": ["BASE64", ...]}."""
    wanted = f'send {{"images": ["BASE64", ...]}} with 1 to {MOST_IMAGES} images'
    # Before it is parsed: JSON of lists in lists takes many times its size.
    if body.count(b"[") != 1 or body.count(b"{") != 1 or body.count(b",") >= MOST_IMAGES:
        raise HTTPException(422, wanted)
    try:
        given = json.loads(body)["images"]
        images = [base64.b64decode(text, validate=True) for text in given]
    except (ValueError, TypeError, KeyError, binascii.Error):
        raise HTTPException(422, wanted) from None
    if not images or not isinstance(given, list):
        raise HTTPException(422, wanted)
    return images


def _too_large() -> HTTPException:
    return HTTPException(413, f"the body is larger than {MOST_BYTES:,} bytes, or its length is no number")


async def _refused(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException)
    return JSONResponse({"error": error.detail}, error.status_code, error.headers)


def openapi(about: dict[str, Any]) -> dict[str, Any]:
    """The description of the interface in OpenAPI's terms."""
    size = {"minItems": about["features"], "maxItems": about["features"]}
    answer: dict[str, Any] = {
        "type": "object",
        "required": ["features"],
        "properties": {"features": {"type": "array", "items": {"type": "number"}} | size},
        "additionalProperties": {"description": f"columns of `tessella assign`: {', '.join(about['also']) or 'none'}"},
    }
    error = {"type": "object", "required": ["error"], "properties": {"error": {"type": "string"}}}
    refusals = {
        "400": "an empty or broken body, or another host",
        "401": "no token, or a wrong one",
        "408": "the body came too slowly",
        "413": f"more than {MOST_BYTES:,} bytes",
        "422": "no image that can be decoded",
    }

    def post(what: str, body: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
        given = {"200": {"description": what, "content": {"application/json": {"schema": schema}}}}
        given |= {
            code: {"description": text, "content": {"application/json": {"schema": error}}}
            for code, text in refusals.items()
        }
        return {"post": {"summary": what, "requestBody": {"required": True, "content": body}, "responses": given}}

    texts = {"type": "array", "items": {"type": "string", "format": "byte"}, "minItems": 1, "maxItems": MOST_IMAGES}
    batch = {"type": "object", "required": ["images"], "properties": {"images": texts}}
    answers = {"type": "object", "properties": {"images": {"type": "array", "items": answer}}}
    binary = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"Tessella: {about['network']}", "version": "1"},
        "components": {"securitySchemes": {"token": {"type": "http", "scheme": "bearer"}}},
        "security": [{"token": []}],
        "paths": {
            "/image": post("Features of an image file", binary, answer),
            "/batch": post("Features of several image files", {"application/json": {"schema": batch}}, answers),
        },
    }


def serve(served: Network, host: str, port: int, token: str | None, threads: int) -> None:
    """Answer requests until Ctrl-C or SIGTERM; open requests are finished first.

    Raises:
        UserError: the address cannot be used.
    """
    import uvicorn

    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listening = socket.socket(family, socket.SOCK_STREAM)
    with contextlib.closing(listening):
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listening.bind((host, port))
        except (OSError, OverflowError) as error:
            raise UserError(f"{host}:{port} cannot be used ({error}): give another --port, or 0 for any") from None
        address = f"http://{f'[{host}]' if ':' in host else host}:{listening.getsockname()[1]}"
        print(f"Serving {served.about['network']} at {address}; Ctrl-C ends it")
        if token is not None:
            print(f"Token: {token}")
        header = "" if token is None else f" -H 'Authorization: Bearer {token}'"
        print(f"Try it: curl{header} --data-binary @photo.jpg {address}/image")
        sys.stdout.flush()
        hosts = ["*"] if host in ("0.0.0.0", "::") else ["127.0.0.1", "localhost", "[::1]", host]
        config = uvicorn.Config(
            App(served, token, threads).starlette(hosts),
            log_level="warning",
            ws="none",
            access_log=False,
            server_header=False,
            proxy_headers=False,
            timeout_graceful_shutdown=_STOP_SECONDS,
        )
        with contextlib.suppress(Stopped):  # the signal that ended it comes again
            uvicorn.Server(config).run([listening])
