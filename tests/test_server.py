"""`tessella serve`: what it answers is what the network computes, and no request does it harm."""

from __future__ import annotations

import asyncio
import base64
import io
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import tessella
from tessella import UserError
from tessella.engine.pretrain import pretrain
from tessella.formats.model import Model
from tessella.weights.resolve import resolve_backbone
from tests.engine.runs import tiny_run
from tests.formats.classifiers import classifier_in

for library in ("starlette", "uvicorn", "httpx"):
    pytest.importorskip(library)

import httpx  # noqa: E402
import uvicorn  # noqa: E402

from tessella import server  # noqa: E402

NARROW = "random:resnet10?width=4&stem=small&size=32"
TOKEN = "of-this-test"
CPU = torch.device("cpu")


def jpeg(seed: int = 0, size: tuple[int, int] = (48, 40)) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (6, 5, 3), dtype=np.uint8)
    file = io.BytesIO()
    Image.fromarray(pixels).resize(size).save(file, "JPEG")
    return file.getvalue()


class Running:
    """An app on a free port, in a thread."""

    def __init__(self, served: server.Network, body_seconds: float = 5.0) -> None:
        app = server.App(served, TOKEN, 2, body_seconds).starlette(["127.0.0.1"])
        self.server = uvicorn.Server(uvicorn.Config(app, port=0, log_level="error"))
        self.thread = threading.Thread(target=self.server.run)

    def __enter__(self) -> httpx.Client:
        self.thread.start()
        while not self.server.started:
            time.sleep(0.01)
        self.port = self.server.servers[0].sockets[0].getsockname()[1]
        address = f"http://127.0.0.1:{self.port}"
        self.client = httpx.Client(base_url=address, headers={"Authorization": f"Bearer {TOKEN}"}, timeout=60)
        return self.client

    def __exit__(self, *error: object) -> None:
        self.client.close()
        self.server.should_exit = True
        self.thread.join(20)


@pytest.fixture(scope="module")
def model() -> Model:
    return Model.of(resolve_backbone(NARROW))


@pytest.fixture(scope="module")
def client() -> Iterator[httpx.Client]:
    with Running(server.network(NARROW, CPU)) as client:
        yield client


def features_of(model: Model, encoded: bytes) -> np.ndarray:
    with torch.no_grad():
        return model.backbone(model.transform(Image.open(io.BytesIO(encoded)))[None])[0].numpy()


def batch(*images: bytes) -> dict[str, Any]:
    return {"images": [base64.b64encode(image).decode() for image in images]}


# --- answers ------------------------------------------------------------------------------------------------


def test_an_image_is_answered_with_the_features_of_the_network(client: httpx.Client, model: Model):
    answer = client.post("/image", content=jpeg())
    assert answer.status_code == 200 and list(answer.json()) == ["features"]
    np.testing.assert_allclose(answer.json()["features"], features_of(model, jpeg()), rtol=1e-4, atol=1e-6)


def test_a_batch_is_answered_in_its_order(client: httpx.Client, model: Model):
    images = [jpeg(seed, (40 + seed, 50)) for seed in range(40)]  # more than one forward pass
    answers = client.post("/batch", json=batch(*images)).json()["images"]
    expected = np.stack([features_of(model, image) for image in images])
    np.testing.assert_allclose([answer["features"] for answer in answers], expected, rtol=1e-4, atol=1e-6)


def test_a_run_answers_with_its_own_cluster(tmp_path: Path):
    pretrain(tiny_run(max_steps=2), tmp_path)
    loaded = resolve_backbone(str(tmp_path))
    model = Model.of(loaded)
    with Running(server.network(str(tmp_path), CPU)) as client:
        answers = [client.post("/image", content=jpeg(seed)).json() for seed in range(4)]
    features = torch.from_numpy(np.stack([features_of(model, jpeg(seed)) for seed in range(4)]))
    assert [answer["cluster"] for answer in answers] == loaded.method.assign(features).tolist()


def test_a_classifier_answers_with_a_class_or_abstains(tmp_path: Path):
    classifier = classifier_in(tmp_path / "birds")
    with Running(server.network(str(tmp_path / "birds"), CPU)) as client:
        answers = [client.post("/image", content=jpeg(seed)).json() for seed in range(12)]
        described = client.get("/openapi.json").text
    assert {"cluster", "outlier_score", "class", "confidence"} <= set(answers[0]) and "outlier_score" in described
    for answer in answers:
        unit = torch.nn.functional.normalize(torch.tensor([answer["features"]]), dim=1)
        probability = classifier.probabilities(unit)[0]
        assert answer["most_probable"] == classifier.classes[probability.argmax()]
        assert answer["class"] == (answer["most_probable"] if probability.max() >= 0.86 else None)
    assert len({answer["class"] is None for answer in answers}) == 2  # it knows some, and not all


def test_the_description_names_every_answer(client: httpx.Client):
    described = client.get("/openapi.json").json()
    assert described["openapi"].startswith("3.") and set(described["paths"]) == {"/image", "/batch"}
    assert {"200", "401", "413", "422"} <= set(described["paths"]["/image"]["post"]["responses"])
    assert client.get("/").json()["network"] == "resnet10"


# --- refusals -----------------------------------------------------------------------------------------------

REFUSED: dict[str, tuple[dict[str, Any], int, str]] = {
    "no token": ({"content": jpeg(), "headers": {"Authorization": ""}}, 401, "Authorization: Bearer TOKEN"),
    "wrong token": ({"content": jpeg(), "headers": {"Authorization": "Bearer guess"}}, 401, "send the token"),
    "not ascii": ({"content": jpeg(), "headers": {"Authorization": "Bearer é".encode()}}, 401, "send the token"),
    "empty": ({"content": b""}, 400, "the body is empty"),
    "no image": ({"content": b"%PDF-1.7 and so on"}, 422, "the image cannot be decoded"),
    "cut off": ({"content": jpeg(size=(200, 200))[:-400]}, 422, "the image cannot be decoded"),
    "huge by its header": ({"content": b"\x89PNG\r\n\x1a\n" + bytes(40)}, 422, "the image cannot be decoded"),
    "a stream that is too large": ({"content": (bytes(2**20) for _ in range(40))}, 413, "larger than 33,554,432"),
    "another host": ({"content": jpeg(), "headers": {"Host": "rebound.example"}}, 400, ""),
}


@pytest.mark.parametrize(("request_", "code", "reason"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_with_a_reason(client: httpx.Client, request_: dict[str, Any], code: int, reason: str):
    answer = client.post("/image", **request_)
    assert answer.status_code == code and reason in answer.text
    assert client.post("/image", content=jpeg()).status_code == 200  # and the next one is answered


@pytest.mark.parametrize(
    "body",
    [b"", b"[]", b"{}", b'{"images": []}', b'{"images": "text"}', b'{"images": [1]}', b'{"images": ["no base64!"]}',
     b"[" * 100_000, b'{"images": [' + b"[]," * 1000 + b"]}", json.dumps(batch(*[b"x"] * 65)).encode(), b"\xff"],
)  # fmt: skip
def test_a_batch_of_another_form_is_refused(client: httpx.Client, body: bytes):
    answer = client.post("/batch", content=body)
    assert answer.status_code in (400, 422) and "error" in answer.json()


def test_a_damaged_image_of_a_batch_is_named(client: httpx.Client):
    answer = client.post("/batch", json=batch(jpeg(), jpeg()[:100], jpeg()))
    assert answer.status_code == 422 and answer.json()["error"].startswith("image 1 cannot be decoded")


@pytest.mark.parametrize(("method", "path", "code"), [("GET", "/image", 405), ("POST", "/", 405), ("GET", "/x", 404)])
def test_other_paths_and_methods_are_refused(client: httpx.Client, method: str, path: str, code: int):
    answer = client.request(method, path)
    assert answer.status_code == code and "error" in answer.json()


def raw(client: httpx.Client, text: str) -> str:
    """The answer to the beginning of a request."""
    with socket.create_connection((client.base_url.host, client.base_url.port), timeout=20) as connection:
        connection.sendall(text.replace("\n", "\r\n").encode())
        return connection.recv(4096).decode()


@pytest.mark.parametrize("length", [2**40, 10**30, 33_554_433])
def test_a_body_above_the_limit_is_refused_by_its_header(client: httpx.Client, length: int):
    head = f"POST /image HTTP/1.1\nHost: 127.0.0.1\nAuthorization: Bearer {TOKEN}\nContent-Length: {length}\n\n"
    assert raw(client, head).startswith(("HTTP/1.1 413", "HTTP/1.1 400"))


def test_a_body_that_does_not_arrive_is_given_up():
    with Running(server.network(NARROW, CPU), body_seconds=0.3) as client:
        head = f"POST /image HTTP/1.1\nHost: 127.0.0.1\nAuthorization: Bearer {TOKEN}\nContent-Length: 1000\n\n"
        assert raw(client, head + "only this").startswith("HTTP/1.1 408")
        assert client.post("/image", content=jpeg()).status_code == 200


# --- the program --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [100, pytest.param(1000, marks=pytest.mark.slow)])
def test_many_parallel_requests_are_answered_and_the_end_is_orderly(count: int):
    command = [sys.executable, "-m", "tessella", "serve", NARROW, "--port", "0", "--device", "cpu", "--workers", "1"]
    own = {"TESSELLA_TOKEN": TOKEN, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=os.environ | own, stdout=subprocess.PIPE, text=True) as program:
        said = [program.stdout.readline() for _ in range(3)]
        address = re.search(r"http://127\.0\.0\.1:\d+", said[0])[0]
        assert said[1] == f"Token: {TOKEN}\n" and f"{address}/image" in said[2]

        async def ask() -> list[int]:
            limits = httpx.Limits(max_connections=count)
            header = {"Authorization": f"Bearer {TOKEN}"}
            async with httpx.AsyncClient(base_url=address, headers=header, limits=limits, timeout=120) as client:
                bodies = [b"no image" if number % 10 == 0 else jpeg(number % 7) for number in range(count)]
                answers = await asyncio.gather(*(client.post("/image", content=body) for body in bodies))
            return [answer.status_code for answer in answers]

        assert asyncio.run(ask()) == [422 if number % 10 == 0 else 200 for number in range(count)]
        program.send_signal(signal.SIGTERM)
        assert program.wait(30) == 0


def test_a_port_in_use_is_one_helpful_line():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=f"127.0.0.1:{port} cannot be used .*give another --port, or 0 for any"):
            tessella.serve(NARROW, port=port)
