"""Tests of qwen_proxy: real sockets on loopback, a fake of Qwen's endpoints as strict as the real ones.

Same sections, same order as the program. Nothing here leaves the machine; HOME and QWEN_HOME are temporary.
"""

import argparse
import ast
import base64
import collections
import contextlib
import copy
import doctest
import errno
import functools
import gzip
import hashlib
import http.client
import http.server
import io
import itertools
import json
import logging
import os
import pathlib
import random
import re
import select
import shlex
import signal
import socket
import socketserver
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import urllib.parse

import pytest

import qwen_proxy as qp

HERE = os.path.dirname(os.path.abspath(__file__))
PROGRAM = os.path.join(HERE, "qwen_proxy.py")
with open(PROGRAM, encoding="utf-8") as _file:
    SOURCE = _file.read()
WAIT = 20  # seconds until something that must happen counts as never happening
CUT = object()  # in a reply's pieces: close the connection here, without an end


# ----------------------------------------------------------------------------------------------------
# The fake: Qwen's identity host and endpoints
# ----------------------------------------------------------------------------------------------------

Reply = collections.namedtuple("Reply", "status headers pieces")


def reply(status=200, body=b"", content_type="application/json", headers=()):
    body = json.dumps(body).encode() if isinstance(body, (dict, list)) else body
    return Reply(status, [("Content-Type", content_type), *headers], [body])


def stream(*pieces, status=200):
    """A chunked answer of these pieces; an Event among them is waited for, CUT breaks off."""
    return Reply(
        status,
        [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")],
        list(pieces),
    )


def chunk(delta=None, finish_reason=None, **more):
    """One event as DashScope writes it: choices first, id last, usage null."""
    value = {
        "choices": []
        if delta is None
        else [{"delta": delta, "index": 0, "logprobs": None, "finish_reason": finish_reason}],
        "object": "chat.completion.chunk",
        "usage": None,
        "created": 1790000000,
        "system_fingerprint": None,
        "model": "qwen3.7-plus",
        "id": "chatcmpl-1",
    }
    value.update(more)
    return b"data: " + json.dumps(value, ensure_ascii=False).encode() + b"\n\n"


USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
DONE = b"data: [DONE]\n\n"
END = [chunk({"content": ""}, "stop"), chunk(usage=USAGE), DONE]
HELLO = (
    chunk({"content": "", "role": "assistant"}),
    chunk({"content": "Hel"}),
    chunk({"content": "lo, "}),
    chunk({"content": "wörld"}),
    chunk({"content": ""}, "stop"),
    chunk(usage=USAGE),
    DONE,
)


def text_chunk(text, finish_reason=None, **more):
    return (
        b"data: "
        + json.dumps(
            {
                "id": "cmpl-1",
                "object": "text_completion",
                "created": 1790000000,
                "model": "qwen-coder-turbo",
                "choices": [
                    {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
                ],
                "usage": None,
                **more,
            }
        ).encode()
        + b"\n\n"
    )


TEXT = (
    text_chunk("def "),
    text_chunk("f():"),
    text_chunk("", "stop"),
    text_chunk("", choices=[], usage=USAGE),
    DONE,
)


def tool_call(index, call_id, name=None, arguments=""):
    function = {"arguments": arguments}
    if name is not None:
        function["name"] = name
    return {
        "content": None,
        "tool_calls": [{"index": index, "id": call_id, "type": "function", "function": function}],
    }


CALLS = (
    chunk({"content": None, "role": "assistant", "reasoning_content": "I must look."}),
    chunk(tool_call(0, "call_a", "get_weather", None)),
    chunk(tool_call(0, "", None, '{"city"')),
    chunk(tool_call(0, "", None, ': "Paris"}')),
    chunk(tool_call(1, "call_b", "get_time", "")),
    chunk(tool_call(1, "", None, "{}")),
    chunk({"content": ""}, "stop"),
    chunk(usage=USAGE),
    DONE,
)


def refusal(message, status=400, code="invalid_parameter_error", type="invalid_request_error"):
    return reply(
        status,
        {
            "error": {"message": message, "type": type, "param": None, "code": code},
            "request_id": "r-1",
        },
    )


class FakeQwen:
    """Scripted replies, a strict default, everything recorded."""

    def __init__(self):
        self.requests, self.script, self.token_script = [], collections.deque(), collections.deque()
        self.access_tokens, self.refresh_tokens = {"at_1"}, {"rt_1"}
        self.refreshes, self.reused, self.expires_in, self.rotates = [], [], 21600, True
        self.device_answers, self.models = collections.deque(), None
        self.connections, self.gone, self.lock = 0, threading.Event(), threading.Lock()
        self.arrived = threading.Condition()
        fake = self

        class Handler(http.server.BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"
            disable_nagle_algorithm = True

            def setup(self):
                with fake.lock:
                    fake.connections += 1
                super().setup()

            def do_POST(self):
                body = self.rfile.read(int(self.headers["Content-Length"]))
                fake.play(self, fake.answer(self.path, self.headers, body))

            def do_GET(self):
                fake.play(self, fake.answer(self.path, self.headers, b""))

            do_HEAD = do_GET

            def log_message(self, *args):
                pass

        class Server(http.server.ThreadingHTTPServer):
            daemon_threads, request_queue_size = True, 256

            def handle_error(self, request, client_address):
                pass

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.origin = f"http://127.0.0.1:{self.port}"
        self.dashscope = self.origin + "/compatible-mode/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.005,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()

    def answer(self, path, headers, body):
        with self.arrived:
            self.requests.append((path, headers, body))
            self.arrived.notify_all()
        if path.endswith("/oauth2/token"):
            return self.token_answer(dict(urllib.parse.parse_qsl(body.decode())))
        if path.endswith("/oauth2/device/code"):
            return self.device_answer(dict(urllib.parse.parse_qsl(body.decode())))
        if path.endswith("/v1/models") and self.models is not None:
            return (
                self.models()
                if callable(self.models)
                else reply(
                    200,
                    {
                        "object": "list",
                        "data": [
                            {
                                "id": name,
                                "object": "model",
                                "created": 1790000000,
                                "owned_by": "system",
                            }
                            for name in self.models
                        ],
                    },
                )
            )
        if path.endswith("/v1/embeddings"):
            return self.refuse_key(path, headers) or self.embeddings(json.loads(body))
        if path.endswith("/v1/completions"):
            return (
                self.refuse_key(path, headers)
                or self.refuse_text(json.loads(body))
                or (self.script.popleft() if self.script else stream(*TEXT))
            )
        if not path.endswith("/v1/chat/completions"):
            return Reply(404, [("Content-Length", "0")], [])  # as the real one: without a word
        return self.refuse(path, headers, body) or (
            self.script.popleft() if self.script else stream(*HELLO)
        )

    @staticmethod
    def embeddings(request):
        """text-embedding-v4: ten texts at most, floats only. The vector says which text it is."""
        texts = request["input"] if isinstance(request["input"], list) else [request["input"]]
        if not all(isinstance(text, str) for text in texts):
            return refusal(
                "<400> InternalError.Algo.InvalidParameter: contents is neither str nor list of str.: input.contents"
            )
        if len(texts) > 10:
            return refusal(
                "<400> InternalError.Algo.InvalidParameter: Value error, batch size is invalid, it should not be larger "
                "than 10.: input.contents"
            )
        if request.get("encoding_format") != "float" or "user" in request:
            return refusal("encoding_format must be float")
        return reply(
            200,
            {
                "object": "list",
                "model": request["model"],
                "id": "r-1",
                "data": [
                    {"object": "embedding", "index": index, "embedding": [len(text) / 2, 0.25]}
                    for index, text in enumerate(texts)
                ][::-1],
                "usage": {"prompt_tokens": len(texts), "total_tokens": len(texts)},
            },
        )

    @staticmethod
    def refuse_text(request):
        if (
            request.get("stream") is not True
            or "suffix" in request
            or any(value is None for value in request.values())
        ):
            return refusal("unknown field")
        return None

    def wait_for_request(self, count=1):
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.bodies()) >= count, WAIT)

    def refuse(self, path, headers, body):
        """What the real endpoints refuse, in their words (shape A of their error bodies)."""
        try:
            return self.refuse_key(path, headers) or self.refuse_chat(path, json.loads(body), body)
        except (TypeError, AttributeError, KeyError):
            return refusal("<400> InternalError.Algo.InvalidParameter: a field has the wrong type")

    def refuse_key(self, path, headers):
        if not headers.get("User-Agent"):
            return reply(
                405, {"error": "Coding Plan is currently only available for Coding Agents"}
            )
        key = headers.get("Authorization", "").replace("Bearer ", "")
        if key not in self.access_tokens and not key.startswith("sk-good"):
            text = (
                "invalid access token or token expired"
                if path.startswith("/v1")
                else "Incorrect API key provided."
            )
            return refusal(text, 401, "invalid_api_key")
        return None

    @staticmethod
    def refuse_chat(path, request, body):
        if len(body) > 6_291_456:
            return refusal("Exceeded limit on max bytes to request body : 6291456")
        if not request["messages"]:
            return refusal("[] is too short - 'messages'")
        if any(
            not re.match(r"[A-Za-z0-9_-]{1,64}$", tool["function"]["name"])
            or "parameters" not in tool["function"]
            for tool in request.get("tools", [])
        ):
            return refusal("function parameters is empty (2013)")
        most = 32768 if request["model"].startswith("glm-5") else 262144
        if not 0 < request.get("thinking_budget", 1) <= most or {
            "thinking_budget",
            "reasoning_effort",
        } <= set(request):
            return refusal(
                f"The thinking_budget parameter must be a positive integer and not greater than {most}"
            )
        messages, thinking = (
            request["messages"],
            request.get("enable_thinking", bool(re.match("qwen3.7|qwen4", request["model"]))),
        )
        pending = []
        for index, message in enumerate(messages):
            if message["role"] not in ("system", "assistant", "user", "tool", "function"):
                return refusal(
                    f"{message['role']} is not one of ['system', 'assistant', 'user', 'tool', 'function'] - 'messages.['{index}].role'"
                )
            if "content" not in message:
                return refusal(f"Field required: input.messages.{index}.content")
            if message["role"] == "tool":
                if message.get("tool_call_id") not in pending:
                    return refusal(
                        '<400> InternalError.Algo.InvalidParameter: messages with role "tool" must be a response to a '
                        'preceeding message with "tool_calls".'
                    )
                pending.remove(message["tool_call_id"])
            elif pending:
                break
            for call in message.get("tool_calls") or []:
                pending.append(call["id"])
                try:
                    json.loads(call["function"]["arguments"])
                except ValueError:
                    return refusal(
                        'The "function.arguments" parameter of the code model must be in JSON format.'
                    )
        if pending:
            return refusal(
                'An assistant message with "tool_calls" must be followed by tool messages responding to each '
                '"tool_call_id". The following tool_call_ids did not have response messages: '
                + pending[0]
            )
        if path.startswith("/v1/") and (
            messages[0]["role"] != "system"
            or not isinstance(messages[0]["content"], list)
            or not any("cache_control" in part for part in messages[0]["content"])
        ):
            return refusal("bad request")
        if thinking and request.get("tool_choice", "auto") not in ("auto", "none"):
            return refusal('tool_choice is one of the strings that should be ["none", "auto"]')
        if dig(request, "response_format", "type") == "json_object":
            if thinking:
                return refusal("Json mode response is not supported when enable_thinking is true")
            if "json" not in json.dumps(messages).lower():
                return refusal(
                    "'messages' must contain the word 'json' in some form, to use 'response_format' of type 'json_object'."
                )
        if not 1 <= request.get("max_tokens", 1) <= 65536:
            return refusal("Range of max_tokens should be [1, 65536]")
        if request.get("temperature", 0) >= 2:
            return refusal("temperature must be in [0, 2)")
        if request.get("stream") is not True or not dig(request, "stream_options", "include_usage"):
            return refusal(
                "This model only support stream mode, please enable the stream parameter"
            )
        if (
            any(name in request for name in ("functions", "metadata", "store"))
            or request.get("tools") == []
        ):
            return refusal("unknown field")
        return None

    def token_answer(self, form):
        with self.lock:
            if self.token_script:
                scripted = self.token_script.popleft()
                return scripted(form) if callable(scripted) else scripted
            if form.get("grant_type") == qp.DEVICE_GRANT:
                return self.device_answers.popleft()
            if form.get("client_id") != qp.CLIENT_ID:
                return reply(
                    401,
                    {"error": "invalid_client", "error_description": "Invalid client credentials"},
                )
            used = form.get("refresh_token")
            if used not in self.refresh_tokens:
                self.reused.append(used)
                return reply(
                    400, {"error": "invalid_request", "error_description": "Invalid refresh token"}
                )
            number = len(self.refreshes) + 2
            self.refreshes.append(used)
            answer = {
                "access_token": f"at_{number}",
                "token_type": "Bearer",
                "expires_in": self.expires_in,
            }
            if self.rotates:
                self.refresh_tokens = {f"rt_{number}"}
                answer["refresh_token"] = f"rt_{number}"
            self.access_tokens.add(answer["access_token"])
            return reply(200, answer)

    def device_answer(self, form):
        self.challenge = form.get("code_challenge")
        if form.get("client_id") != qp.CLIENT_ID or form.get("code_challenge_method") != "S256":
            return reply(
                401, {"error": "invalid_client", "error_description": "Invalid client credentials"}
            )
        return reply(
            200,
            {
                "device_code": "dc_1",
                "user_code": "ABCD-EFGH",
                "verification_uri": self.origin + "/authorize",
                "verification_uri_complete": self.origin
                + "/authorize?user_code=ABCD-EFGH&client=qwen-code",
                "expires_in": 900,
            },
        )

    def play(self, handler, answer):
        handler.send_response_only(answer.status)
        handler.send_header("Date", handler.date_time_string())
        framed = any(name == "Transfer-Encoding" for name, _ in answer.headers)
        body = (
            b""
            if framed
            else b"".join(piece for piece in answer.pieces if isinstance(piece, bytes))
        )
        for name, value in answer.headers:
            handler.send_header(name, value)
        if not framed and not any(name == "Content-Length" for name, _ in answer.headers):
            handler.send_header("Content-Length", str(len(body)))
        # An event before the first byte is silence before the answer's head.
        silence = answer.pieces and isinstance(answer.pieces[0], threading.Event)
        if silence and not self.pause(handler, answer.pieces.pop(0)):
            return
        handler.end_headers()
        if not framed:
            handler.wfile.write(body)
            return
        for piece in answer.pieces:
            if piece is CUT:
                handler.close_connection = True
                handler.connection.shutdown(socket.SHUT_RDWR)
                return
            if isinstance(piece, threading.Event):
                if not self.pause(handler, piece):
                    return
            elif piece:
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece))
        handler.wfile.write(b"0\r\n\r\n")

    def pause(self, handler, event):
        """Wait for the event; False, and self.gone set, when the proxy has closed the connection meanwhile."""
        end = time.monotonic() + WAIT
        while not event.is_set() and time.monotonic() < end:
            if select.select([handler.connection], [], [], 0.02)[0] and self.has_left(
                handler.connection
            ):
                handler.close_connection = True
                self.gone.set()
                return False
        return True

    @staticmethod
    def has_left(connection):
        try:
            return not connection.recv(1, socket.MSG_PEEK)
        except ConnectionResetError:  # closed on bytes that it had not read
            return True

    def bodies(self):
        return [
            json.loads(body)
            for path, _, body in self.requests
            if path.endswith("/chat/completions")
        ]


HI = [{"role": "user", "content": "Hi"}]


def dig(value, *path):
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


# ----------------------------------------------------------------------------------------------------
# Fixtures and helpers
# ----------------------------------------------------------------------------------------------------


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """A HOME with an empty ~/.qwen; no variable of the real one leaks in."""
    for name in list(os.environ):
        if name.startswith(
            ("QWEN_", "OPENAI_", "DASHSCOPE_", "BAILIAN_", "OPENROUTER_", "MODELSCOPE_")
        ) or name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)
    folder = tmp_path / "home" / ".qwen"
    folder.mkdir(parents=True)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    monkeypatch.setenv("QWEN_CODE_SYSTEM_SETTINGS_PATH", str(tmp_path / "none"))
    monkeypatch.setenv("QWEN_CODE_SYSTEM_DEFAULTS_PATH", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(qp.Listener, "poll_interval", 0.005)
    return folder


@pytest.fixture()
def upstream(monkeypatch):
    fake = FakeQwen()
    monkeypatch.setenv("QWEN_OAUTH_BASE_URL", fake.origin)
    yield fake
    fake.close()


def write_login(home, upstream, expires_in=3600, name="oauth_creds.json", **fields):
    path, temporary = home / name, home / (name + ".new")  # as the CLI: atomically
    temporary.write_text(
        json.dumps(
            {
                "access_token": "at_1",
                "refresh_token": "rt_1",
                "token_type": "Bearer",
                "resource_url": upstream.origin,
                "expiry_date": int((time.time() + expires_in) * 1000),
                **fields,
            }
        )
    )
    temporary.chmod(0o600)
    os.replace(str(temporary), str(path))
    return path


@pytest.fixture()
def login(home, upstream):
    return write_login(home, upstream)


@pytest.fixture()
def serve():
    """Start servers; they are stopped at the end."""
    running = []

    def start(**arguments):
        arguments.setdefault("port", 0)
        server = qp.make_server(**arguments)
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        running.append((server, thread))
        return server

    yield start
    for server, thread in running:
        server.shutdown(grace=0)
        thread.join(WAIT)
        assert not thread.is_alive()


@pytest.fixture()
def key_server(serve, upstream, monkeypatch):
    """A proxy in front of the fake's DashScope endpoint."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-key-123456")
    return serve(base_url=upstream.dashscope, model="qwen3-max")


def ask(server, body=None, method="POST", path="/v1/chat/completions", headers=None):
    """One request on a connection of its own: status, headers, body bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
    try:
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        connection.request(
            method, path, data, {"Content-Type": "application/json", **(headers or {})}
        )
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def chat(server, stream=False, **more):
    """A chat request: (status, headers, JSON) or, streamed, (status, headers, list of data strings)."""
    body = {"messages": [{"role": "user", "content": "Hi"}], "stream": stream, **more}
    status, headers, answer = ask(server, body)
    if not headers["Content-Type"].startswith("text/event-stream"):
        return status, headers, json.loads(answer)
    return status, headers, data_of(answer)


def data_of(body):
    blocks = body.decode().split("\n\n")
    assert blocks.pop() == ""
    return [block[len("data: ") :] for block in blocks if not block.startswith(":")]


def raw(server, request, family=socket.AF_INET):
    """Send bytes as they are; everything that comes back until the connection ends."""
    with socket.create_connection(
        ("127.0.0.1" if family == socket.AF_INET else "::1", server.port), timeout=WAIT
    ) as connection:
        connection.sendall(request)
        received = b""
        while True:
            try:
                piece = connection.recv(65536)
            except ConnectionResetError:
                return received
            if not piece:
                return received
            received += piece


def translate(pieces, request=None, model="qwen3.7-plus", family="dashscope"):
    """The chunks of an answer, translated without any socket."""
    provider = qp.Provider(
        "test", "http://127.0.0.1/compatible-mode/v1", None, "test", family=qp.FAMILIES[family]
    )
    request = request or {"stream_options": {"include_usage": True}}
    decoder, chunks = qp.AnswerDecoder(qp.ChunkTranslator(request, qp.Target(provider, model))), []
    decoder.sink = lambda chunk: chunks.append(chunk.value)
    push(decoder, pieces)
    return chunks


def push(decoder, pieces):
    """Feed a decoder as relay() does, from an iterator that may raise as a connection does."""
    pieces = iter(pieces)
    while not decoder.is_done:
        try:
            piece = next(pieces, None)
        except qp.UpstreamError:
            if not decoder.is_finished():
                raise
            piece = None
        if piece is None:
            break
        decoder.feed(piece)
    decoder.close()


def collect(chunks):
    collector = qp.CompletionCollector()
    for value in chunks:
        if value["choices"]:
            collector.feed(value)
    return collector.completion(
        next((value["usage"] for value in chunks if value.get("usage")), None)
    )


def text_in(chunks, name="content"):
    return "".join(
        choice["delta"].get(name) or "" for value in chunks for choice in value["choices"]
    )


IS_ROOT, NOBODY = hasattr(os, "geteuid") and os.geteuid() == 0, 65534
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX files and signals")
as_root = pytest.mark.skipif(not IS_ROOT, reason="only root can give files away")


@pytest.fixture()
def no_secrets(monkeypatch):
    """The program knows no secret of another test."""
    monkeypatch.setattr(qp, "SECRETS", qp.Secrets())
    monkeypatch.setattr(qp, "keep_secret", qp.SECRETS.add)


@pytest.fixture()
def outside(monkeypatch):
    """The hosts beyond loopback that are looked up or connected to; nobody gets there."""
    asked, look_up, connect = [], socket.getaddrinfo, socket.socket.connect

    def checked(host):
        if host not in ("127.0.0.1", "::1", "localhost"):
            asked.append(host)
            raise socket.gaierror(socket.EAI_NONAME, "unknown")
        return host

    def connect_there(self, address):
        return connect(self, (checked(address[0]), *address[1:]))

    monkeypatch.setattr(socket, "getaddrinfo", lambda to, *a, **b: look_up(checked(to), *a, **b))
    monkeypatch.setattr(socket.socket, "connect", connect_there)
    return asked


@pytest.fixture()
def main(monkeypatch, capsys):
    """qp.main() with everything but the serving: its exit code and what it says."""

    def run(*arguments):
        with monkeypatch.context() as patch:
            for name in ("tune_process", "stop_on_signals"):
                patch.setattr(qp, name, lambda *arguments: None, raising=False)
            patch.setattr(qp.ProxyServer, "serve_forever", lambda self: self.shutdown(grace=0))
            try:
                code = qp.main(list(arguments))
            except SystemExit as end:
                code = end.code
        return code, "".join(capsys.readouterr())

    return run


def cost(work, clock):
    """Processor seconds of the cheapest of three runs."""
    costs = []
    for _ in range(3):
        started = clock()
        work()
        costs.append(clock() - started)
    return min(costs)


def check_linear(work, small, factor=8, clock=time.thread_time, least=0.001):
    """Costs grow like the input, with a margin of three; the square of 8 would be 64."""
    few = cost(lambda: work(small), clock)
    assert cost(lambda: work(small * factor), clock) < 3 * factor * max(few, least)


def lines_of(server, path, body):
    """The lines of a streamed answer as they come."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps({**body, "stream": True}))
        yield from connection.getresponse()


@pytest.fixture()
def quick(serve, upstream, monkeypatch):
    """A server that gives a sign of life every 50 ms."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    monkeypatch.setattr(qp, "KEEP_ALIVE_INTERVAL", 0.05)
    return serve(base_url=upstream.dashscope, model="m")


def comments_until(server, gate, count):
    """The lines of a stream; the gate opens at so many comments."""
    lines = []
    for line in lines_of(server, "/v1/chat/completions", {"messages": HI}):
        lines.append(line)
        if lines.count(qp.KEEP_ALIVE.strip() + b"\n") == count:
            gate.set()
    return lines


# ----------------------------------------------------------------------------------------------------
# Audit: what a reader of the file is promised
# ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.version_info < (3, 10), reason="needs sys.stdlib_module_names")
def test_imports_are_of_the_standard_library_only():
    names = set()
    for node in ast.walk(ast.parse(SOURCE)):
        names |= (
            {alias.name.split(".")[0] for alias in node.names}
            if isinstance(node, ast.Import)
            else set()
        )
        names |= {node.module.split(".")[0]} if isinstance(node, ast.ImportFrom) else set()
    assert names and names <= set(sys.stdlib_module_names) | {"__future__"}


def hosts_in_constants():
    start = SOURCE.index("# Constants\n")
    return set(
        re.findall(
            r'(?:https://|")((?:[\w-]+\.)+(?:ai|cn|com))\b',
            SOURCE[start : SOURCE.index("# Errors and small tools\n", start)],
        )
    )


def test_every_host_in_the_file_is_a_constant():
    code = "".join(line.partition("#")[0] + "\n" for line in SOURCE.splitlines())
    assert (
        set(re.findall(r"https?://([\w-]+\.[\w.-]*\w)", code)) - {"127.0.0.1"}
        <= hosts_in_constants()
    )


def readme():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return file.read()


def test_readme_names_every_host_and_holds_the_help(monkeypatch, capsys):
    monkeypatch.setenv("COLUMNS", "100")
    with pytest.raises(SystemExit):
        qp.main(["--help"])
    text = " ".join(readme().split())
    # The first heading is another one before Python 3.10.
    said = capsys.readouterr().out.replace("optional arguments:", "options:")
    assert len(set(re.findall(r"--[a-z][a-z-]+", said))) > 15
    assert " ".join(said.split()) in text
    assert [host for host in sorted(hosts_in_constants()) if host not in text] == []


def test_doctests_pass():
    assert doctest.testmod(qp).attempted > 5
    assert doctest.testmod(qp).failed == 0


def test_import_starts_nothing_and_needs_no_home():
    code = "import threading, qwen_proxy; print(threading.active_count())"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=HERE,
        env={"PATH": ""},
        capture_output=True,
        timeout=WAIT,
    )
    assert (done.stdout.strip(), done.stderr) == (b"1", b"")


def test_no_secret_reaches_log_answers_or_status(
    home, upstream, serve, caplog, capsys, monkeypatch
):
    caplog.set_level(logging.DEBUG, "qwen_proxy")
    secrets = ["MARK-access-1", "MARK-refresh-1", "MARK-client-1", "sk-MARKprovider1"]
    write_login(home, upstream, access_token=secrets[0], refresh_token=secrets[1])
    upstream.refresh_tokens = {secrets[1]}
    upstream.token_script.append(refusal("no such token MARK-refresh-1", 400))
    server = serve(api_key=[secrets[2]])
    said = [
        ask(
            server,
            {"messages": [{"role": "user", "content": "x"}]},
            headers={"Authorization": "Bearer " + key},
        )
        for key in (secrets[2], "wrong")
    ]
    said += [
        ask(server, method="GET", path="/health"),
        ask(server, method="GET", path="/v1/models"),
    ]
    monkeypatch.setenv("OPENAI_API_KEY", secrets[3])
    upstream.script.append(refusal("your key sk-MARKprovider1 is bad", 401))
    keyed = serve(base_url=upstream.dashscope, model="m")
    upstream.access_tokens.add(secrets[3])
    said.append(ask(keyed, {"messages": [{"role": "user", "content": "x"}]}))
    qp.main(["status", "--json"])
    output = capsys.readouterr()
    everything = (
        caplog.text
        + output.out
        + output.err
        + "".join(str(headers) + body.decode() for _, headers, body in said)
    )
    assert "status" in everything or "usable" in everything
    assert [secret for secret in secrets if secret in everything] == []


# -- no secret leaves by the program's own words --------------------------------------------------

KEY, PASSWORD = 'K3y/o+f  the="u"~77', 'Zq1/wx+"yz"=~v'
SECRETS = [KEY, "pässwörd/Zürich?9", "p😀ss/w😀rd", "100%25+sure!", 'C:\\pass\\word"9']
SECRETS += ["a.*b(c)[d]$^{2}|x", "two\nlines"]
ESCAPES = "\x1b]0;x\x07\x1b[2J\r\x9b1m\u202e\x7f\nFORGED"
ROUTES = {
    "chat": ("/v1/chat/completions", {"messages": HI}),
    "chat, streamed": ("/v1/chat/completions", {"messages": HI, "stream": True}),
    "responses": ("/v1/responses", {"input": "Hi"}),
    "responses, streamed": ("/v1/responses", {"input": "Hi", "stream": True}),
    "completions": ("/v1/completions", {"prompt": "Hi"}),
    "completions, streamed": ("/v1/completions", {"prompt": "Hi", "stream": True}),
    "embeddings": ("/v1/embeddings", {"input": "Hi", "model": "text-embedding-v4"}),
}


def forms_of(secret):
    """The forms in which a secret travels, by name."""
    in_json, percent = json.dumps(secret)[1:-1], urllib.parse.quote(secret, safe="")
    found = {"plain": secret, "percent": percent, "path": urllib.parse.quote(secret)}
    found["lower percent"] = re.sub("%..", lambda match: match.group().lower(), percent)
    found["JSON"], found["JSON, slashes"] = in_json, in_json.replace("/", "\\/")
    found["JSON, UTF-8"] = json.dumps(secret, ensure_ascii=False)[1:-1]
    for before in ("", "Bearer ", "user:"):
        for encode in (base64.b64encode, base64.urlsafe_b64encode):
            encoded = encode((before + secret).encode()).decode()
            found[f"{before}{encode.__name__}"] = encoded
            found[f"{before}{encode.__name__}, no padding"] = encoded.rstrip("=")
    return found


def everything(secret):
    return "because " + " ".join(forms_of(secret).values())


GRANT = '"access_token": "RAW-access", "refresh_token": "RAW-refresh", "expires_in": 3600'


def fill(template, said):
    """The template with a text: RAW, as JSON, or INNER, the JSON string of what is behind <<."""
    outer, _, inner = template.partition(" << ")
    outer = outer.replace("\\n", "\n").replace("GRANT", GRANT)
    outer = outer.replace("JSON", json.dumps(said)).replace("RAW", said)
    return outer.replace("INNER", json.dumps(fill(inner, said))) if inner else outer


def answer_of(line, said=""):
    """The answer for a line of a table: status, HEADER for a text in x-request-id, body."""
    status, header, body = re.match("(...) (HEADER )?(.*)", line).groups()
    body = fill(body.replace("HELLO", HELLO[1].decode()), said).encode()
    return reply(int(status), body, headers=[("x-request-id", said)] if header else [])


def fetch(server, route="chat", method="POST", **headers):
    """The status and all that a client gets to see."""
    path, body = ROUTES.get(route, (route, None))
    status, headers, answer = ask(server, body, method, path, headers)
    return status, str(headers) + answer.decode()


def told(server, upstream, line, said="", route="chat", **headers):
    """What a client is told where the upstream refuses with the answer for a line."""
    upstream.refuse_key = lambda *_: answer_of(line, said)
    return fetch(server, route, **headers)[1]


@pytest.fixture()
def traces(no_secrets, caplog, capsys):
    """Every six characters in a row of any form of a secret in texts, log, terminal and status."""
    caplog.set_level(logging.DEBUG, "qwen_proxy")

    def find(secret, *texts):
        if len(texts) > 1:
            qp.main(["status"])
            qp.main(["status", "--json"])
        text = "\n".join([*texts, caplog.text, *capsys.readouterr()])
        caplog.clear()
        forms = forms_of(secret).values()
        return {
            form for form in forms if any(form[n : n + 6] in text for n in range(len(form) - 5))
        }

    return find


@pytest.fixture()
def odd_key_server(no_secrets, serve, upstream, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    upstream.access_tokens.add(KEY)
    return serve(base_url=upstream.dashscope, model="qwen3-max")


def test_a_secret_is_masked_whole_in_every_form_and_order(no_secrets):  # H5
    for value, (end, order) in itertools.product(SECRETS, [("-", 1), ("x", -1)]):
        value += end
        for known in [value[:-1], value[1:], value, "user:" + value][::order]:
            qp.keep_secret(known)
        said = {name: qp.public(f"before {form} after") for name, form in forms_of(value).items()}
        assert said == dict.fromkeys(said, "before *** after"), value


def test_to_mask_a_text_takes_no_square_of_its_length(no_secrets):  # B6
    for secret in ('"quoted-secret', "/slash-secret", "\\backslash-secret"):
        qp.keep_secret(secret)
    check_linear(lambda count: qp.public("\\" * count), 500)


def test_control_characters_become_visible_and_all_else_is_unchanged(no_secrets):  # H13
    for char in "\x00\x07\x08\t\r\n\x1b\x7f\x9b\u2028\u202e":
        said = qp.public(f"a{char}b")
        assert said[:2] == "a\\" and said[-1] == "b" and said.isprintable()
        assert qp.public(f"a{char}b\x1b\x00", keep=char)[:3] == f"a{char}b"
    qp.keep_secret("abcde")  # too short to be told from a word
    for text in ("", "ü 你好 😀 \\n C:\\x", "abcde", "https://qwen.ai/v1?x=1"):
        assert qp.public(text) == text


ANSWERS = r"""
400 {"error": JSON}
403 {"error": {"message": JSON}}
400 {"code": JSON, "message": JSON, "request_id": JSON}
403 {"error": {"message": "because", "code": JSON}}
401 {"error": {"message": "because", "type": JSON, "param": JSON}}
400 HEADER {"message": "because"}
200 HEADER HELLO
400 {"error": {"message": INNER}} << {"message": INNER} << {"message": JSON}
400 id:1\nevent:error\n:HTTP_STATUS/400\ndata:{"message": JSON}\n\n
400 <html><title>RAW</title></html>
400 RAW
400 {"message": JSON
200 data: {"error": {"message": JSON, "code": JSON, "type": JSON, "param": JSON}}\n\n
200 HELLO event:error\n:HTTP_STATUS/400\ndata:{"message": INNER}\n\n << {"message": JSON}
200 data: {"choices": [{"finish_reason": "error_finish", "delta": {"content": JSON}}]}\n\n
200 HELLO data: {"error": {"message": JSON, "code": JSON}}\n\n
200 HELLO event: error\ndata: RAW\n\n
""".strip().split("\n")
REFUSED = [*zip(ANSWERS, itertools.cycle(ROUTES))]  # each shape once, and each route


@pytest.mark.parametrize("line, route", REFUSED, ids=str)
def test_an_answer_of_an_upstream_shows_no_secret(odd_key_server, upstream, traces, line, route):
    for said in (everything(KEY), *forms_of(KEY).values()):  # H5
        shown = told(odd_key_server, upstream, line, said, route)
        assert traces(KEY, shown) == set()
        assert (
            "because" in shown or "because" not in said or "error_finish" in line or "HELLO" in line
        )


def test_a_code_has_no_blank_and_at_most_60_characters(odd_key_server, upstream):  # H5
    for code, kept in (
        ("A.b/" + "x" * 56, True),
        ("x" * 61, False),
        ("a b", False),
        ("a\t", False),
    ):
        for line in ('400 {"error": {"message": "m", "code": JSON}}', '403 {"code": JSON}'):
            shown = json.loads(told(odd_key_server, upstream, line, code).partition("\n\n")[2])
            assert shown["error"]["code"] == (code if kept else None)


CUTS = """
2000 400 RAW
300 400 {"error": {"message": JSON}}
200 /v1/chat/completions {"messages": [{"role": "user", "content": JSON}]}
196 /v1/ PATH
60 /v1/responses {"input": [{"type": JSON}]}
""".strip().split("\n")


@pytest.mark.parametrize("line", CUTS)
def test_a_secret_where_a_text_is_cut_leaves_no_fragment(odd_key_server, upstream, traces, line):
    (cut, place, template), forms = line.split(" ", 2), forms_of(KEY).values()  # H5
    for form in [form for form in forms if template != "PATH" or '"' not in form]:
        for shown in (7, len(form) - 1):
            text = "-" * (int(cut) - shown) + form
            if place == "400":
                said = told(odd_key_server, upstream, "400 " + template, text)
            elif template == "PATH":
                said = fetch(odd_key_server, place + text, "GET")[1]
            else:
                said = ask(odd_key_server, fill(template, text).encode(), path=place)[2].decode()
            assert traces(KEY, said) == set(), (form, shown)


LOOKS = [KEY, forms_of(KEY)["Bearer b64encode"], "sk-abcdefghijklmnop", "Bearer abcdefgh1234"]
LOOKS += ["eyJhbGciOiJIUzI1NiJ9.e30.abc", "https://user:password@example.org/", ESCAPES]


@pytest.mark.parametrize("route", ["chat, streamed", "responses"])
def test_what_a_model_answers_is_untouched(odd_key_server, upstream, route):  # H5
    for text in LOOKS:
        use = tool_call(0, "call_1", "f", json.dumps({"x": text}))
        deltas = [{"reasoning_content": text}, {"content": text}, use]
        upstream.script.append(stream(*map(chunk, deltas), *END))
        said = fetch(odd_key_server, route)[1]
        assert said.count(json.dumps(text, ensure_ascii=False)[1:-1]) >= 2
        assert json.dumps(json.dumps({"x": text}))[1:-1] in said


def write_settings(home, upstream, config=None, **settings):
    entry = {"baseUrl": upstream.dashscope, "generationConfig": config or {}}
    entries = [{"id": "m", "envKey": "K", **entry}, {"id": "n", "envKey": "OTHER", **entry}]
    settings = {"env": {"K": "k-fine"}, "modelProviders": {"openai": entries}, **settings}
    (home / "settings.json").write_text(json.dumps(settings))


KEPT = """
{"env": {"K": "k-fine", "UNUSED_API_KEY": JSON}}
{"security": {"auth": {"apiKey": JSON, "baseUrl": "URL"}}}
{"config": {"customHeaders": {"X-Team": JSON}}}
{"config": {"customHeaders": {"X-Team": "${TEAM}"}}, "env": {"K": "k-fine", "TEAM": JSON}}
{"config": {"extra_body": {"a": {"b": [{"c": JSON}]}}}}
{"config": {"extra_body": {"dbPassword": "RAW"}}}
""".strip().split("\n")


@pytest.mark.parametrize("place", [*KEPT, ".env", "client", "refresh_token"])
def test_a_secret_of_settings_and_logins_is_not_said(home, upstream, serve, traces, place):  # H5
    secret = PASSWORD[: 7 if "RAW" in place else None]
    if place in KEPT:
        kept = fill(place.replace("URL", upstream.dashscope), secret)
        write_settings(home, upstream, **json.loads(kept))
    elif place == ".env":
        (home / ".env").write_text(f"K='{secret}'")
        write_settings(home, upstream, env={})
    else:
        write_login(home, upstream, **({place: secret} if "token" in place else {}))
    server = serve(api_key=[secret] if place == "client" else [])
    said = told(server, upstream, "400 RAW", everything(secret), Authorization="Bearer " + secret)
    assert "because" in said and traces(secret, said, "with status") == set()


def test_a_plain_value_of_extra_body_stays_readable(no_secrets, home, upstream, serve):  # H5
    write_settings(home, upstream, {"extra_body": {"mode": "fast", "words": "with blanks between"}})
    said = "because fast is odd, with blanks between"
    assert said in told(serve(), upstream, "400 " + said)


def userinfo_of(kind, secret=PASSWORD):
    """What stands before the host, and the password in it, with a character that addresses use."""
    user, colon, char = kind.partition(":")
    if char == "%":
        return user + colon + urllib.parse.quote(secret, safe=""), secret
    return user + colon + secret.replace("/", char), secret.replace("/", char)


ADDRESSES = """
baseUrl http:// user:
baseUrl  user:@/@
resource_url http:// user:?
resource_url  me@example.org:
OPENAI_BASE_URL http:// :
QWEN_OAUTH_BASE_URL http:// user:%
HTTP_PROXY http:// user:@/@
ALL_PROXY socks5h:// me@example.org:
http_proxy  user:/
""".strip().split("\n")


@pytest.mark.parametrize("line", ADDRESSES)
def test_userinfo_of_an_address_is_in_no_host_and_no_words(
    home, upstream, serve, outside, traces, monkeypatch, line
):
    place, scheme, kind = line.split(" ")  # H5
    userinfo, password = userinfo_of(kind)
    url = f"{scheme}{userinfo}@127.0.0.1:{upstream.port}/v1"
    entries = [{"id": "m", "baseUrl": url, "envKey": "K"}] if place == "baseUrl" else []
    auth = {"selectedType": "openai" if place in ("baseUrl", "OPENAI_BASE_URL") else "qwen-oauth"}
    write_settings(home, upstream, modelProviders={"openai": entries}, security={"auth": auth})
    address = {"resource_url": url} if place == "resource_url" else {}
    write_login(home, upstream, 0 if place == "QWEN_OAUTH_BASE_URL" else 3600, **address)
    monkeypatch.setenv("OPENAI_API_KEY", "k-fine")
    is_proxy = place.lower().endswith("_proxy")
    if is_proxy or place.isupper():
        monkeypatch.setenv(place, url[: -len("/v1")] if is_proxy else url)
    server = serve(base_url="http://model.example/v1" if is_proxy else None, retries=0)
    said = told(server, upstream, "407 RAW", everything(password))
    more = [fetch(server, path, "GET")[1] for path in ("/v1/models", "/health", "/")]
    assert traces(password, said, *more) == set() and set(outside) <= {"model.example"}
    assert place != "baseUrl" or "baseUrl" in said and upstream.bodies() == []


# ----------------------------------------------------------------------------------------------------
# Credentials
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, words",
    [
        ("", "not JSON"),
        ("[]", "not a JSON object"),
        ('{"access_token": "a"}', "refresh_token"),
        ('{"access_token":"a","refresh_token":"b","token_type":"Bearer"}', "expiry_date"),
        (
            '{"access_token":"a","refresh_token":"b","token_type":"Bearer","expiry_date":true}',
            "expiry_date",
        ),
        (
            '{"access_token":"a","refresh_token":"b","token_type":"Bearer","expiry_date":"soon"}',
            "expiry_date",
        ),
        (
            '{"access_token":"","refresh_token":"b","token_type":"Bearer","expiry_date":1}',
            "access_token",
        ),
    ],
)
def test_incomplete_login_is_named(text, words):
    with pytest.raises(qp.CredentialError, match=words):
        qp.Login.parse(text)


@pytest.mark.parametrize(
    "resource_url, base_url",
    [
        ("portal.qwen.ai", "https://portal.qwen.ai/v1"),
        ("https://x.y/", "https://x.y/v1"),
        ("http://127.0.0.1:1/v1", "http://127.0.0.1:1/v1"),
    ],
)
def test_base_url_of_resource_url(resource_url, base_url):
    assert qp.base_url_of(resource_url) == base_url


def test_fresh_token_is_used_without_refresh(login, upstream):
    assert qp.OAuthCredentials(str(login), upstream.origin).access_token() == "at_1"
    assert upstream.requests == []


def test_refresh_30_seconds_before_expiry_keeps_unknown_fields_and_mode(
    home, upstream, monkeypatch
):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    path = write_login(home, upstream, expires_in=29, note={"of": "another program"})
    path.chmod(0o644)
    before = path.stat().st_mtime_ns
    assert qp.OAuthCredentials(str(path), upstream.origin).access_token() == "at_2"
    fields = json.loads(path.read_text())
    assert (fields["refresh_token"], fields["note"]) == ("rt_2", {"of": "another program"})
    assert fields["resource_url"] == upstream.origin
    assert fields["expiry_date"] == int((time.time() + 21600) * 1000)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.stat().st_mtime_ns > before
    assert os.listdir(str(home)) == ["oauth_creds.json"]


def test_refresh_without_a_new_refresh_token_keeps_the_old_one(home, upstream):
    upstream.rotates = False
    path = write_login(home, upstream, expires_in=-5)
    qp.OAuthCredentials(str(path), upstream.origin).access_token()
    assert json.loads(path.read_text())["refresh_token"] == "rt_1"


def test_forced_refresh_names_the_rejected_token_and_spares_a_newer_one(login, upstream):
    credentials = qp.OAuthCredentials(str(login), upstream.origin)
    assert credentials.access_token(rejected="at_0") == "at_1"
    assert credentials.access_token(rejected="at_1") == "at_2"
    assert credentials.access_token(rejected="at_1") == "at_2"
    assert upstream.refreshes == ["rt_1"]


def test_one_refresh_for_twenty_threads(home, upstream):
    credentials = qp.OAuthCredentials(
        str(write_login(home, upstream, expires_in=0)), upstream.origin
    )
    results, barrier = [], threading.Barrier(20)

    def run():
        barrier.wait(WAIT)
        results.append(credentials.access_token())

    threads = [threading.Thread(target=run) for _ in range(20)]
    [thread.start() for thread in threads]
    [thread.join(WAIT) for thread in threads]
    assert (results, upstream.refreshes) == (["at_2"] * 20, ["rt_1"])


def test_login_refreshed_by_another_process_while_waiting_for_the_lock_is_adopted(home, upstream):
    path = write_login(home, upstream, expires_in=0)
    credentials, lock, result = (
        qp.OAuthCredentials(str(path), upstream.origin),
        home / "oauth_creds.lock",
        [],
    )
    lock.write_text("somebody")
    thread = threading.Thread(target=lambda: result.append(credentials.access_token()))
    thread.start()
    write_login(home, upstream, access_token="at_other", refresh_token="rt_other")
    lock.unlink()
    thread.join(WAIT)
    assert (result, upstream.refreshes) == (["at_other"], [])


@pytest.mark.parametrize("age, polls", [(36, 0), (11, 5)])
def test_lock_is_broken_only_when_stale(home, age, polls):
    path, pauses = home / "oauth_creds.lock", []
    path.write_text("somebody")
    os.utime(str(path), (time.time() - age, time.time() - age))

    def pause(seconds):
        pauses.append(seconds)
        if len(pauses) == polls:
            path.unlink()

    with qp.LockFile(str(path), pause):
        assert path.read_text() != "somebody"
    assert len(pauses) == polls and pauses == sorted(pauses) and os.listdir(str(home)) == []


def test_lock_that_is_not_ours_any_more_is_left_alone(home):
    path = home / "oauth_creds.lock"
    with qp.LockFile(str(path)):
        path.write_text("thief")
    assert path.read_text() == "thief"


def test_lock_that_cannot_be_read_is_broken_too(home, monkeypatch):
    monkeypatch.setattr(qp.LockFile, "STALE", 0.2)
    (home / "oauth_creds.lock").symlink_to(home / "nowhere")
    with qp.LockFile(str(home / "oauth_creds.lock")):
        pass
    assert os.listdir(str(home)) == []


def test_lock_waits_no_longer_than_stale_when_the_clock_jumped(home, monkeypatch):
    path = home / "oauth_creds.lock"
    path.write_text("from the future")
    os.utime(str(path), (time.time() + 1e6, time.time() + 1e6))
    monkeypatch.setattr(qp.LockFile, "STALE", 0.3)
    with qp.LockFile(str(path)):
        assert path.read_text() != "from the future"


HTML = reply(403, b"<html><title>aliyun_waf</title></html>", "text/html")


@pytest.mark.parametrize(
    "answer",
    [
        HTML,
        reply(400, b"<html>", "text/html"),
        reply(500, {"error": "x"}),
        reply(200, b"{cut"),
        reply(200, {"error": "server_error"}),
        reply(429, {"error": "slow"}),
        reply(200, {"access_token": None}),
    ],
)
def test_trouble_at_the_token_endpoint_is_no_verdict(home, upstream, answer, monkeypatch):
    path = write_login(home, upstream, expires_in=0)
    before = path.read_text()
    credentials = qp.OAuthCredentials(str(path), upstream.origin)
    upstream.token_script.append(answer)
    with pytest.raises(qp.UpstreamError) as caught:
        credentials.access_token()
    assert caught.value.status == 503 and path.read_text() == before
    monkeypatch.setattr(qp.OAuthCredentials, "PAUSE", 0)
    assert credentials.access_token() == "at_2"


@pytest.mark.parametrize("status", [400, 401])
def test_refused_refresh_token_is_dead_until_the_file_changes(home, upstream, status):
    path = write_login(home, upstream, expires_in=0)
    before = path.read_text()
    credentials = qp.OAuthCredentials(str(path), upstream.origin)
    upstream.token_script.append(reply(status, {"error": "invalid_request"}))
    for _ in range(3):
        with pytest.raises(qp.CredentialError, match="/auth"):
            credentials.access_token()
    assert len(upstream.requests) == 1 and path.read_text() == before
    upstream.refresh_tokens = {"rt_new"}
    write_login(home, upstream, expires_in=0, refresh_token="rt_new")
    assert credentials.access_token() == "at_2"


def test_refused_refresh_adopts_what_another_process_wrote_meanwhile(home, upstream):
    path = write_login(home, upstream, expires_in=0)

    def another_was_faster(form):
        write_login(home, upstream, access_token="at_other", refresh_token="rt_other")
        return reply(400, {"error": "invalid_request"})

    upstream.token_script.append(another_was_faster)
    assert qp.OAuthCredentials(str(path), upstream.origin).access_token() == "at_other"


def test_new_login_is_picked_up(home, upstream, login):
    credentials = qp.OAuthCredentials(str(login), upstream.origin)
    credentials.access_token()
    write_login(home, upstream, access_token="at_new_login")
    assert credentials.access_token() == "at_new_login"


@pytest.mark.parametrize("spoil", ["delete", "garbage", "directory"])
def test_login_in_memory_outlives_the_file(login, upstream, spoil):
    credentials = qp.OAuthCredentials(str(login), upstream.origin)
    credentials.access_token()
    login.unlink()
    if spoil == "garbage":
        login.write_text("{cut")
    elif spoil == "directory":
        login.mkdir()
    assert credentials.access_token() == "at_1" and credentials.problem


def test_unwritable_file_is_said_and_served_from_memory(home, upstream, monkeypatch):
    path = write_login(home, upstream, expires_in=0)
    credentials = qp.OAuthCredentials(str(path), upstream.origin)

    def refuse(*arguments):
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(qp.LoginFile, "write", refuse)
    assert credentials.access_token() == "at_2" and "read-only" in credentials.problem
    assert (
        credentials.access_token() == "at_2"
        and json.loads(path.read_text())["access_token"] == "at_1"
    )
    assert os.listdir(str(home)) == ["oauth_creds.json"]


def test_what_could_not_be_written_is_written_later(home, upstream, monkeypatch):
    path, real = write_login(home, upstream, expires_in=0), os.replace
    credentials = qp.OAuthCredentials(str(path), upstream.origin)
    monkeypatch.setattr(qp.OAuthCredentials, "SAVE_PAUSE", 0)
    monkeypatch.setattr(
        qp.os,
        "replace",
        lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    assert [credentials.access_token(), credentials.access_token()] == [
        "at_2",
        "at_2",
    ] and "no space" in credentials.problem.lower()
    monkeypatch.setattr(qp.os, "replace", real)
    assert credentials.access_token() == "at_2" and not credentials.problem
    assert json.loads(path.read_text())["refresh_token"] == "rt_2" and len(upstream.refreshes) == 1
    assert os.listdir(str(home)) == ["oauth_creds.json"]


def test_what_could_not_be_written_gives_way_to_a_new_login(home, upstream, monkeypatch):
    path, real = write_login(home, upstream, expires_in=0), os.replace
    credentials = qp.OAuthCredentials(str(path), upstream.origin)
    monkeypatch.setattr(
        qp.os,
        "replace",
        lambda *arguments: (_ for _ in ()).throw(OSError(28, "No space left on device")),
    )
    assert credentials.access_token() == "at_2"
    monkeypatch.setattr(qp.os, "replace", real)
    monkeypatch.setattr(qp.OAuthCredentials, "SAVE_PAUSE", 0)
    write_login(home, upstream, access_token="at_new", refresh_token="rt_new")
    assert [credentials.access_token(), credentials.access_token()] == ["at_new"] * 2
    assert json.loads(path.read_text())["refresh_token"] == "rt_new"


def test_a_client_that_leaves_does_not_lead_to_a_refresh_without_the_lock(home, upstream):
    path = write_login(home, upstream, expires_in=0)
    (home / "oauth_creds.lock").write_text("somebody else's")
    watch = qp.Waiter(None, 5, 0, lambda: (_ for _ in ()).throw(BrokenPipeError(32, "Broken pipe")))
    with pytest.raises(qp.ClientGone):
        qp.OAuthCredentials(str(path), upstream.origin).access_token(pause=watch.sleep)
    assert upstream.refreshes == [] and (home / "oauth_creds.lock").read_text() == "somebody else's"


def test_a_failure_that_many_share_keeps_nobodys_frames(home, upstream):
    credentials = qp.OAuthCredentials(
        str(write_login(home, upstream, expires_in=0)), upstream.origin
    )
    upstream.token_script.append(HTML)
    seen = []
    for _ in range(3):
        with pytest.raises(qp.UpstreamError) as caught:
            credentials.access_token()
        seen.append(caught.value)
    assert len({id(error) for error in seen}) == 3 and len({str(error) for error in seen}) == 1
    assert credentials._failure[1].__traceback__ is None and len(upstream.requests) == 1


def test_half_a_surrogate_pair_in_the_file_is_kept(home, upstream):
    path = write_login(home, upstream, expires_in=0, note="\ud83d")
    assert qp.OAuthCredentials(str(path), upstream.origin).access_token() == "at_2"
    assert json.loads(path.read_text())["note"] == "\ud83d" and os.listdir(str(home)) == [
        "oauth_creds.json"
    ]


def test_a_lock_that_cannot_be_written_does_not_stay(home, monkeypatch):
    class Full(io.StringIO):
        def write(self, text):
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(qp.os, "fdopen", lambda handle, mode: os.close(handle) or Full())
    with pytest.raises(OSError, match="space"):
        qp.LockFile(str(home / "oauth_creds.lock")).__enter__()
    assert os.listdir(str(home)) == []


def test_crash_between_write_and_rename_leaves_the_old_file_whole(home, upstream, monkeypatch):
    path = write_login(home, upstream)
    before = path.read_text()

    def crash(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(qp.os, "replace", crash)
    with pytest.raises(KeyboardInterrupt):
        qp.LoginFile(str(path)).write("{}")
    assert path.read_text() == before
    assert all(stat.S_IMODE(entry.stat().st_mode) == 0o600 for entry in home.iterdir())


# Runs until the login has been refreshed so many times, by whomever.
RACER = """
import sys, threading, time
sys.path.insert(0, sys.argv[1])
import qwen_proxy
credentials, failures = qwen_proxy.OAuthCredentials(sys.argv[2], sys.argv[3]), []
def run():
    try:
        while int(credentials.access_token()[len("at_"):]) <= int(sys.argv[4]):
            time.sleep(0.01)
    except Exception as error:
        failures.append(repr(error))
threads = [threading.Thread(target=run) for _ in range(8)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(failures), failures[:1])
"""


def test_processes_racing_on_single_use_refresh_tokens(home, upstream):
    upstream.expires_in = 31  # fresh for one second
    path = write_login(home, upstream, expires_in=0)
    arguments = [sys.executable, "-c", RACER, HERE, str(path), upstream.origin, "3"]
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE) for _ in range(4)]
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert said == [b"0 []"] * 4
    assert upstream.reused == [] and len(upstream.refreshes) >= 3
    assert len(set(upstream.refreshes)) == len(upstream.refreshes)
    assert os.listdir(str(home)) == ["oauth_creds.json"]


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_kill_in_the_middle_of_a_refresh_harms_nobody(home, upstream):
    path, never, asked = (
        write_login(home, upstream, expires_in=0),
        threading.Event(),
        threading.Event(),
    )
    before = path.read_text()

    def hang(form):
        asked.set()
        return Reply(200, [("Content-Type", "application/json")], [never])

    upstream.token_script.append(hang)
    process = subprocess.Popen(
        [sys.executable, "-c", RACER, HERE, str(path), upstream.origin, "60"],
        stdout=subprocess.DEVNULL,
    )
    assert asked.wait(WAIT)
    process.kill()
    process.wait(WAIT)
    lock = home / "oauth_creds.lock"
    assert path.read_text() == before and lock.exists()
    os.utime(str(lock), (time.time() - 36, time.time() - 36))
    assert qp.OAuthCredentials(str(path), upstream.origin).access_token() == "at_2"
    assert not lock.exists()


TOKEN_BODIES = r"""
200 {"access_token": "RAW-access", "refresh_token": "RAW-ref
200 access_token=RAW-access&refresh_token=RAW-refresh&expires_in=3600
200 <html><body>{GRANT}</body></html>
200 INNER << {GRANT}
400 {"error": {GRANT}}
400 {"error": JSON, "error_description": JSON}
500 {"error_description": {GRANT}}
""".strip().split("\n")


@pytest.mark.parametrize("line", TOKEN_BODIES)
def test_a_body_of_the_identity_host_is_not_quoted(
    home, upstream, serve, traces, monkeypatch, line
):
    token = "tokenZq1dwxv"  # H4
    known = token if "JSON" in line else "rt_1"  # those two fields are told, without known secrets
    write_login(home, upstream, expires_in=0, refresh_token=known)
    answer = answer_of(line, token)
    upstream.token_script.extend([answer] * 20)
    server = serve(retries=0)
    answers = [fetch(server, route) for route in [*ROUTES, "/v1/models"]]
    assert {status for status, _ in answers[:-1]} <= {401, 503} and len(upstream.token_script) < 20
    monkeypatch.setattr(qp, "LOGIN_POLL_FIRST", 0.001)
    upstream.token_script.clear()
    upstream.device_answers.extend([answer, reply(400, {"error": "access_denied"})])
    assert qp.main(["login", "--no-browser"]) == 1
    upstream.device_answer = lambda form: answer
    assert qp.main(["login", "--no-browser"]) == 1
    assert traces(token, *(said for _, said in answers)) == set()


TOLD = {
    "403 <html><title>aliyun_waf</title>": "web page.*aliyun_waf",
    r"200 \n <!DOCTYPE html><body>x": "web page",
    "500 " + "x" * 321: r"\b321\b",
    '500 [{"error": "no_words"}]': r"(?!.*no_words).*\b23\b",
    '500 {"error": "a_code", "error_description": "in words"}': "in words",
}


@pytest.mark.parametrize("line", TOLD)
def test_trouble_at_the_token_endpoint_is_told_by_its_kind(home, upstream, serve, line):  # H4
    write_login(home, upstream, expires_in=0)
    upstream.token_script.append(answer_of(line))
    message = json.loads(ask(serve(), {"messages": HI})[2])["error"]["message"]
    assert re.match(f"(?s)(?=.*{line[:3]}).*?{TOLD[line]}", message)


def facts_of(*folders):
    """All that a write could change of what is in some folders."""
    facts = {}
    for path in (path for folder in folders for path in folder.iterdir()):
        status = path.lstat()
        content = path.read_bytes() if stat.S_ISREG(status.st_mode) else None
        facts[path] = content, status[:3], status.st_uid, status.st_gid, status.st_mtime_ns
    return facts


def break_(monkeypatch, name, number, seen):
    """From now on os.replace fails, or os.open where it is for a temporary file; seen: of those."""
    real = getattr(os, name)

    def fail(path, *arguments, **more):
        if name == "replace" or str(path).endswith(".tmp"):
            seen.append(os.path.basename(path))
            if number:
                raise OSError(number, os.strerror(number), path)
        return real(path, *arguments, **more)

    monkeypatch.setattr(os, name, fail)


WAYS = [("replace", 0, None), ("replace", errno.EBUSY, None), ("open", errno.EROFS, None)]
WAYS += [pytest.param("replace", errno.EXDEV, NOBODY, marks=as_root)]
WAYS += [pytest.param("open", errno.EACCES, NOBODY, marks=as_root)]


@posix
@pytest.mark.parametrize("name, number, owner", WAYS)
def test_a_login_is_renamed_over_or_written_in_place_and_by_descriptor(
    home, upstream, monkeypatch, name, number, owner
):
    path = write_login(home, upstream, expires_in=0, note={"of": "another program"})  # H6, H8
    path.write_text(json.dumps(json.loads(path.read_text()), indent=300))  # longer than what comes
    path.chmod(0o644)
    if owner:
        os.chown(path, owner, owner)
    os.utime(path, (time.time() + 3600, time.time() + 3600))
    before, sync, synced, seen = path.stat(), os.fsync, [], []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino) or sync(fd))
    break_(monkeypatch, name, number, seen)
    credentials = qp.OAuthCredentials(str(path), upstream.origin)
    assert credentials.access_token() == "at_2" and not credentials.problem
    fields, after = json.loads(path.read_text()), path.stat()
    assert (fields["refresh_token"], fields["note"]) == ("rt_2", {"of": "another program"})
    assert (after.st_uid, after.st_gid, stat.S_IMODE(after.st_mode)) == (*before[4:6], 0o600)
    assert after.st_ino in synced and (after.st_ino == before.st_ino) is bool(number)
    assert after.st_mtime_ns > before.st_mtime_ns and os.listdir(home) == [path.name]
    assert re.match(r"oauth_creds\.json\.qwen_proxy-[0-9a-f]+\.tmp\Z", seen[0])


@as_root
@pytest.mark.parametrize(
    "moment, link",
    [("fsync", os.link), ("fchown", os.symlink), ("busy", os.symlink)],
)
def test_a_file_swapped_in_the_middle_of_a_refresh_changes_no_other(
    home, upstream, tmp_path, monkeypatch, moment, link
):
    path, others = write_login(home, upstream, expires_in=0), tmp_path / "others"  # H6
    os.chown(path, NOBODY, NOBODY)
    others.mkdir()
    (others / "file").write_text("root's")
    before, name = facts_of(others), "replace" if moment == "busy" else moment
    real = getattr(os, name)

    def swap(*arguments, **more):
        for temporary in home.glob("*.tmp"):
            temporary.unlink()
            link(others / "file", temporary)
        if moment == "busy":  # now the login itself would be written, in place
            path.unlink()
            path.symlink_to(others / "file")
            raise OSError(errno.EBUSY, "busy")
        return real(*arguments, **more)

    monkeypatch.setattr(os, name, swap)
    with contextlib.suppress(qp.ProxyError):
        qp.OAuthCredentials(str(path), upstream.origin).access_token()
    assert facts_of(others) == before


def make(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "socket":
        with socket.socket(socket.AF_UNIX) as server:
            server.bind(os.path.relpath(path))  # as a whole, the path may be too long
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        make(path.parent / "pipe", "pipe")
        path.symlink_to(path.parent / "pipe")
    else:
        path.write_text(kind)


LOGIN = '{"access_token": "at_1", "refresh_token": "rt_1", "token_type": "Bearer"}'
LINKED = [("", 1, None), ('{"theme": "dark"}', 2, None), (LOGIN.replace('"rt_1"', "null"), 1, None)]
LINKED += [(None, 2, None)]
LINKED += [pytest.param(LOGIN, 1, (0, 0, NOBODY), marks=as_root)]
LINKED += [pytest.param(LOGIN, 1, (NOBODY, NOBODY, 0), marks=as_root)]


def make_link(path, there, steps, owners):
    """A link to there/oauth_creds.json, directly or by a second one; owners: of all three."""
    (there / "link").symlink_to("oauth_creds.json")
    path.symlink_to(there / ["oauth_creds.json", "link"][steps - 1])
    for file, owner in zip((path, there / "link", there / "oauth_creds.json"), owners or ()):
        os.chown(file, owner, owner, follow_symlinks=False)


@posix
@pytest.mark.parametrize("content, steps, owners", LINKED)
def test_no_file_but_a_login_of_the_owner_of_the_link_is_written_through_it(
    home, upstream, tmp_path, caplog, content, steps, owners
):
    path, there = write_login(home, upstream, expires_in=0), tmp_path / "there"  # H7
    credentials = qp.OAuthCredentials(str(path), upstream.origin)
    credentials.login()
    path.unlink()
    there.mkdir()
    if content is not None:
        make(there / path.name, content)
    make_link(path, there, steps, owners)
    before = facts_of(home, there)
    assert [credentials.access_token(), credentials.access_token()] == ["at_2", "at_2"]
    said = [record.msg for record in caplog.records if record.levelname == "WARNING"]
    assert "saved" in credentials.problem and any(str(path) in line for line in said)
    with pytest.raises(OSError):
        qp.LoginFile(str(path)).write(LOGIN)
    assert facts_of(home, there) == before


@posix
@pytest.mark.parametrize("steps, owner", [(1, None), pytest.param(2, NOBODY, marks=as_root)])
def test_a_link_to_a_login_of_its_owner_stays_a_link(home, upstream, tmp_path, steps, owner):  # H7
    path, there = home / "oauth_creds.json", tmp_path / "there"
    there.mkdir()
    target = write_login(there, upstream, expires_in=0)
    make_link(path, there, steps, owner and [owner] * 3)
    assert qp.OAuthCredentials(str(path), upstream.origin).access_token() == "at_2"
    assert path.is_symlink() and json.loads(target.read_text())["refresh_token"] == "rt_2"
    assert owner in (None, target.stat().st_uid) and len([*home.iterdir(), *there.iterdir()]) == 3


@posix
def test_a_disk_that_takes_no_more_leaves_the_login_whole(home, upstream, monkeypatch):  # H8
    import resource

    path = write_login(home, upstream, expires_in=0)
    before, (soft, hard) = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    credentials = qp.OAuthCredentials(str(path), upstream.origin)
    break_(monkeypatch, "open", errno.EROFS, [])
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), hard))
    try:
        assert credentials.access_token() == "at_2"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert credentials.problem and path.read_bytes() == before


WRITABLE = {
    "neither": (0o500, 0o400, NOBODY, False),
    "the file": (0o500, 0o600, NOBODY, True),
    "the folder": (0o700, 0o400, NOBODY, True),
    "neither, all is root's": (0o755, 0o644, 0, False),
    "root's file in a sticky folder": (0o1777, 0o666, 0, True),
}


@pytest.mark.skipif(not (IS_ROOT and hasattr(os, "setresuid")), reason="needs root, on Linux")
@pytest.mark.parametrize("name", WRITABLE)
def test_what_cannot_be_saved_is_said_beforehand(upstream, monkeypatch, main, name):  # H8
    folder_mode, file_mode, owner, is_saved = WRITABLE[name]
    with tempfile.TemporaryDirectory() as top:  # pytest's own folders are closed to nobody
        for variable in (
            "HOME",
            "QWEN_CODE_SYSTEM_SETTINGS_PATH",
            "QWEN_CODE_SYSTEM_DEFAULTS_PATH",
        ):
            monkeypatch.setenv(variable, top if variable == "HOME" else top + "/none")
        monkeypatch.chdir(top)
        folder = pathlib.Path(top) / ".qwen"
        folder.mkdir()
        path = write_login(folder, upstream)
        for file, mode in ((pathlib.Path(top), 0o755), (path, file_mode), (folder, folder_mode)):
            os.chown(file, owner, owner)
            file.chmod(mode)
        os.setresuid(NOBODY, NOBODY, 0)
        try:
            said = [main("status")[1], main("--port=0")[1]]
            credentials = qp.OAuthCredentials(str(path), upstream.origin)
            assert credentials.access_token("at_1") == "at_2"
        finally:
            os.setresuid(0, 0, 0)
        assert ["cannot be saved" in words for words in said] == [not is_saved] * 2
        assert bool(credentials.problem) is not is_saved
        assert json.loads(path.read_text())["refresh_token"] == ("rt_2" if is_saved else "rt_1")
        assert os.listdir(folder) == [path.name]


NO_FILES = """
settings.json pipe
settings.json link
oauth_creds.json pipe
trustedFolders.json pipe
../../.env pipe
../../none pipe
""".strip().split("\n")


@posix
@pytest.mark.parametrize("line", NO_FILES)
def test_what_is_no_file_holds_no_start_up(home, upstream, tmp_path, line):  # H18
    place, kind = line.split()
    write_login(home, upstream)
    (home / "trustedFolders.json").write_text(json.dumps({str(tmp_path): "TRUST_FOLDER"}))
    place = pathlib.Path(os.path.abspath(home / place))
    if place.exists():
        place.unlink()
    make(place, kind)
    pipes = dict.fromkeys(("stdout", "stderr"), subprocess.PIPE)
    done = subprocess.run([sys.executable, PROGRAM, "status"], timeout=WAIT / 2, **pipes)
    assert done.returncode == 0 or str(place).encode() in done.stdout
    assert b"Traceback" not in done.stderr


@posix
@pytest.mark.parametrize("name, kind", [("json", "pipe"), ("json", "link"), ("lock", "pipe")])
def test_what_is_no_file_holds_no_refresh_up(home, upstream, monkeypatch, name, kind):  # H18
    monkeypatch.setattr(qp.LockFile, "STALE", 0.3)
    credentials, result = (
        qp.OAuthCredentials(str(write_login(home, upstream, 0)), upstream.origin),
        [],
    )
    credentials.login()
    with contextlib.suppress(FileNotFoundError):
        (home / ("oauth_creds." + name)).unlink()
    make(home / ("oauth_creds." + name), kind)
    thread = threading.Thread(target=lambda: result.append(credentials.access_token()), daemon=True)
    thread.start()
    thread.join(WAIT / 2)
    assert result == ["at_2"]


LEFT = "oauth_creds.json.qwen_proxy-0123456789ab.tmp"
SWEPT = [(LEFT, "file", 40, False), (LEFT, "file", 10, True)]
SWEPT += [("oauth_creds.json.0123456789ab.tmp", "file", 40, True), ("my." + LEFT, "file", 40, True)]


@posix
@pytest.mark.parametrize("name, kind, age, stays", SWEPT)
def test_only_our_own_old_temporary_files_are_swept(home, upstream, name, kind, age, stays):  # H18
    path, then = write_login(home, upstream, expires_in=0), time.time() - age
    make(home / name, kind)
    os.utime(home / name, (then, then), follow_symlinks=False)
    assert qp.OAuthCredentials(str(path), upstream.origin).access_token() == "at_2"
    assert sorted(os.listdir(home)) == sorted([path.name] + [name] * stays)


def test_pkce_challenge_is_the_hash_of_the_verifier():
    verifier, challenge = qp.pkce_pair()
    assert len(verifier) == 43 and "=" not in verifier + challenge
    assert base64.urlsafe_b64decode(challenge + "=") == hashlib.sha256(verifier.encode()).digest()


PENDING = reply(400, {"error": "authorization_pending", "error_description": "wait"})
SUCCESS = reply(
    200,
    {
        "access_token": "at_9",
        "refresh_token": "rt_9",
        "token_type": "Bearer",
        "expires_in": 21600,
        "resource_url": "portal.qwen.ai",
    },
)


@pytest.mark.parametrize(
    "answers, slept",
    [
        ([SUCCESS], [2]),
        ([PENDING, SUCCESS], [2, 2]),
        ([reply(429, {"error": "slow_down"}), SUCCESS], [2, 3]),
        ([reply(400, {"error": "slow_down"}), PENDING, SUCCESS], [2, 3, 2]),
        ([reply(200, {"access_token": None}), SUCCESS], [2, 2]),
        ([HTML._replace(status=503), SUCCESS], [2, 2]),
    ],
)
def test_device_authorization_waits_until_approved(upstream, answers, slept):
    upstream.device_answers.extend(answers)
    device, pauses = qp.request_device_code(upstream.origin), []
    login = qp.poll_for_login(upstream.origin, device, pauses.append)
    assert (login.access_token, pauses) == ("at_9", slept)
    form = dict(urllib.parse.parse_qsl(upstream.requests[-1][2].decode()))
    digest = hashlib.sha256(form["code_verifier"].encode()).digest()
    assert base64.urlsafe_b64encode(digest).rstrip(b"=").decode() == upstream.challenge


@pytest.mark.parametrize(
    "answer, words",
    [
        (reply(400, {"error": "access_denied"}), "refused"),
        (reply(400, {"error": "expired_token"}), "expired"),
        (reply(401, {"error": "x"}), "expired"),
        (reply(429, {"error": "too_many"}), "429"),
        (HTML, "403"),
    ],
)
def test_device_authorization_that_fails_says_why(upstream, answer, words):
    upstream.device_answers.append(answer)
    with pytest.raises(qp.CredentialError, match=words):
        qp.poll_for_login(
            upstream.origin, qp.request_device_code(upstream.origin), lambda seconds: None
        )


ODD_TOKENS = [("expires_in", value) for value in (float("inf"), 10**400, True, "3600")]
ODD_TOKENS += [("access_token", value) for value in (5, ["at_9"], "at 9", "at_9\r\nX: y", "ä")]
ODD_TOKENS += [("refresh_token", "x\r\nHost: y"), ("resource_url", "x\r\nHost: y")]


def assert_good(path):
    """The file holds the new token, and nothing that a later request could stumble over."""
    fields = json.loads(path.read_text())
    for name in ("access_token", "refresh_token", "token_type", "resource_url"):
        assert re.match(r"[\x21-\x7e]+\Z", fields[name]), name
    assert fields["access_token"] == "at_9"
    assert time.time() + qp.REFRESH_MARGIN < fields["expiry_date"] / 1000 < time.time() + 1e9


@pytest.mark.parametrize("name, value", ODD_TOKENS, ids=lambda value: ascii(value)[:24])
def test_an_odd_answer_leaves_the_login_or_a_good_one(home, upstream, monkeypatch, name, value):
    path = write_login(home, upstream, expires_in=0)  # H14
    before, odd = path.read_text(), {name: value}
    answer = reply(200, {**json.loads(SUCCESS.pieces[0]), **odd})
    upstream.token_script.append(answer)
    try:
        assert qp.OAuthCredentials(str(path), upstream.origin).access_token() == "at_9"
        assert_good(path)
    except qp.ProxyError:
        assert path.read_text() == before
    path.unlink()
    monkeypatch.setattr(qp, "LOGIN_POLL_FIRST", 0.01)
    upstream.device_answers.extend([answer, reply(400, {"error": "access_denied"})])
    real = upstream.device_answer
    upstream.device_answer = lambda form: reply(200, {**json.loads(real(form).pieces[0]), **odd})
    if qp.main(["login", "--no-browser"]) == 0:
        assert_good(path)
    else:
        assert os.listdir(home) == []


SITE = "https://chat.qwen.ai"
ELSEWHERE = [None, 5, [SITE], "", " " + SITE, SITE + "/ --x", SITE + "/\r\nx", SITE + "/\x1b[2J"]
ELSEWHERE += r"""
file:///etc/passwd javascript:alert(1) data:text/html,x view-source:https://chat.qwen.ai/
https://ai/ --gpu-launcher=x -x //chat.qwen.ai/x chat.qwen.ai/x /authorize https://
https:chat.qwen.ai http://chat.qwen.ai/ https://evil.example/ https://chat.qwen.ai.evil.example
https://evilqwen.ai/ https://evil.example/chat.qwen.ai https://evil.example#qwen.ai
https://chat-qwen.ai/ https://[::1 https://chat.qwen.ai@evil.example/ https://u:p@chat.qwen.ai/
https://evil.example\@chat.qwen.ai/ https://chat.qwen.ai\.evil.example/
https://chat.qwen.ai%2eevil.example/ https://chat.qwen.ai:x/ https://chat.qwen.аi/ https://[::1]/
http://10.9.0.1/
""".split()


def device_uri(monkeypatch, base, **fields):
    answer = {"device_code": "dc_123456", "user_code": "AB", "expires_in": 900, **fields}
    monkeypatch.setattr(qp, "post_form", lambda *arguments, **more: (200, answer, "a JSON object"))
    return qp.request_device_code(base).verification_uri


@pytest.mark.parametrize("base", [SITE, "http://127.0.0.1:80", "http://localhost"])
def test_an_address_beyond_the_identity_host_is_never_opened(monkeypatch, base):  # H13
    taken = []
    for uri in ELSEWHERE:
        for complete in ({}, {"verification_uri_complete": uri}):
            with contextlib.suppress(qp.UpstreamError):
                taken.append(device_uri(monkeypatch, base, verification_uri=uri, **complete))
        plain = {"verification_uri": base + "/authorize", "verification_uri_complete": uri}
        taken.append(device_uri(monkeypatch, base, **plain))
    assert taken == [base + "/authorize"] * len(ELSEWHERE)
    for uri in (base + "/a?user_code=AB&client=qwen-code", base.replace("chat", "www") + "/x"):
        assert device_uri(monkeypatch, base + "/", verification_uri=uri) == uri
        complete = {"verification_uri": uri[:-1], "verification_uri_complete": uri}
        assert device_uri(monkeypatch, base, **complete) == uri


OK = b"HTTP/1.1 200 OK\r\n"
CHUNKED = OK + b"Transfer-Encoding: chunked\r\n\r\n"
DRIPS = {
    "status line": (b"HTTP/1.1 2", b"0"),
    "headers": (OK, b"X: a\r\n"),
    "early answers": (b"", b"HTTP/1.1 100 Continue\r\n\r\n"),
    "chunk size": (CHUNKED, b"0"),
    "trailers": (CHUNKED + b"2\r\n{}\r\n0\r\n", b"X: a\r\n"),
}
ENOUGH = 250  # bytes: more than two seconds' worth, where 0.3 are allowed


class Dripper:
    """Answers requests with the beginning of an answer, then one byte at a time; counts those."""

    def __init__(self, kind):
        self.start, self.drip, self.sent = (*DRIPS[kind], 0)
        self.listener, self.pace = socket.create_server(("127.0.0.1", 0)), threading.Event()
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                self.answer(self.listener.accept()[0])

    def answer(self, connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(self.start)
            for byte in itertools.cycle(self.drip):
                if self.sent >= ENOUGH:
                    return
                connection.sendall(bytes([byte]))
                self.sent += 1
                self.pace.wait(0.01)


DRIPPED = [("token", kind) for kind in DRIPS]
DRIPPED += [("proxy", "headers"), ("status", "status line"), ("status", "early answers")]


@pytest.mark.parametrize("place, kind", DRIPPED)
def test_who_drips_is_left(home, upstream, serve, monkeypatch, capsys, place, kind):  # B3
    for name in ("CONNECT_TIMEOUT", "STATUS_TIMEOUT"):
        monkeypatch.setattr(qp, name, 0.3)
    monkeypatch.setattr(qp.OAuthCredentials, "TIMEOUT", 0.3)
    dripper = Dripper(kind)
    with dripper.listener:
        if place == "token":
            path = write_login(home, upstream, expires_in=0)
            with pytest.raises(qp.UpstreamError):
                qp.OAuthCredentials(str(path), dripper.url).access_token()
            assert os.listdir(home) == [path.name]  # the lock is gone
        elif place == "proxy":
            monkeypatch.setenv("HTTPS_PROXY", dripper.url)
            monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
            server = serve(base_url="https://example.invalid/v1", model="m", retries=0)
            assert chat(server)[0] in (502, 504)
        else:
            write_login(home, upstream, resource_url=dripper.url)
            assert qp.main(["status"]) in (0, 1)
            assert "oauth_creds.json" in capsys.readouterr().out
    assert dripper.sent < ENOUGH


# ----------------------------------------------------------------------------------------------------
# Providers
# ----------------------------------------------------------------------------------------------------

SETTINGS = """\ufeff// written by hand
{ "$version": %d, /* keys */ "env": {"BAILIAN_CODING_PLAN_API_KEY": "sk-sp-invented"},
  "modelProviders": {"openai": %s, "gemini": [{"id": "gemini-x"}], "mine": [{"id": "m", "baseUrl": "http://h/v1", "envKey": "MY_KEY"}]},
  "providerProtocol": {"mine": "openai"},
  "security": {"auth": {"selectedType": "openai"}}, "model": {"name": "qwen3.7-plus"} }"""
ENTRIES = json.dumps(
    [
        {
            "id": "qwen3.6-plus",
            "baseUrl": "${HOST}/compatible-mode/v1",
            "envKey": "DASHSCOPE_API_KEY",
        },
        {
            "id": "qwen3.7-plus",
            "baseUrl": "https://coding-intl.dashscope.aliyuncs.com/v1",
            "envKey": "BAILIAN_CODING_PLAN_API_KEY",
            "generationConfig": {"contextWindowSize": 5, "extra_body": {"enable_thinking": True}},
        },
        {"id": "old", "wireApi": "responses", "baseUrl": "http://h/v1"},
        {"id": "tts", "voiceOnly": True},
        {"no": "id"},
        "junk",
    ]
)


def catalogue(home, options=None, **environ):
    environ = {
        "HOME": str(home.parent),
        "QWEN_CODE_SYSTEM_SETTINGS_PATH": "/none",
        "QWEN_CODE_SYSTEM_DEFAULTS_PATH": "/none",
        **environ,
    }
    return qp.Providers(options or qp.Options(), environ)


@pytest.mark.parametrize("version, form", [(3, "%s"), (4, "%s"), (5, '{"models": %s}')])
def test_settings_give_providers_and_the_active_one(home, version, form):
    (home / "settings.json").write_text(SETTINGS % (version, form % ENTRIES), encoding="utf-8")
    discovery = catalogue(home, HOST="http://gateway:1").current()
    assert [provider.name for provider in discovery.providers] == ["coding-intl", "gateway:1", "h"]
    active, other, mine = discovery.providers
    assert (active.credentials.access_token(), active.family.name, discovery.model) == (
        "sk-sp-invented",
        "coding",
        "qwen3.7-plus",
    )
    assert active.entries["qwen3.7-plus"]["extra_body"] == {"enable_thinking": True}
    assert (other.base_url, other.family.name) == (
        "http://gateway:1/compatible-mode/v1",
        "dashscope",
    )
    assert "DASHSCOPE_API_KEY is not set" in other.problem() and "MY_KEY" in mine.problem()


def test_key_precedence_environment_dotenv_settings(home):
    (home / "settings.json").write_text(SETTINGS % (4, ENTRIES), encoding="utf-8")
    assert catalogue(home).current().providers[0].credentials.access_token() == "sk-sp-invented"
    (home / ".env").write_text('export BAILIAN_CODING_PLAN_API_KEY="sk-sp-dotenv" # mine\n')
    assert catalogue(home).current().providers[0].credentials.access_token() == "sk-sp-dotenv"
    (home.parent / ".env").write_text("BAILIAN_CODING_PLAN_API_KEY=sk-sp-second\n")
    assert catalogue(home).current().providers[0].credentials.access_token() == "sk-sp-dotenv"
    from_environment = catalogue(home, BAILIAN_CODING_PLAN_API_KEY="sk-sp-env").current()
    assert from_environment.providers[0].credentials.access_token() == "sk-sp-env"
    empty = catalogue(home, BAILIAN_CODING_PLAN_API_KEY="").current()
    assert empty.providers[0].credentials.access_token() == "sk-sp-dotenv"


def test_missing_variable_is_never_filled_with_another_key(home):
    (home / "settings.json").write_text(
        SETTINGS.replace('BAILIAN_CODING_PLAN_API_KEY": "sk', 'UNUSED": "sk') % (4, ENTRIES),
        encoding="utf-8",
    )
    provider = catalogue(home, OPENAI_API_KEY="sk-openai-key").current().providers[0]
    with pytest.raises(qp.CredentialError, match="BAILIAN_CODING_PLAN_API_KEY is not set"):
        provider.credentials.access_token()


def test_broken_settings_are_said_and_skipped(home):
    (home / "settings.json").write_text('{"a": 1,}')
    assert "settings.json is ignored" in catalogue(home).current().notes[0]


@pytest.mark.parametrize(
    "environ, name, words",
    [
        ({"OPENROUTER_API_KEY": "sk-or-1"}, "openrouter", ""),
        ({"DASHSCOPE_API_KEY": "sk-1"}, None, "--provider dashscope-intl"),
        ({"OPENAI_API_KEY": "sk-1"}, None, "--base-url"),
        ({"OPENAI_API_KEY": "sk-1", "OPENAI_BASE_URL": "http://h:1/v1"}, "h:1", ""),
        (
            {
                "BAILIAN_CODING_PLAN_API_KEY": "sk-sp-1",
                "OPENAI_BASE_URL": "https://coding.dashscope.aliyuncs.com/v1",
            },
            "coding",
            "",
        ),
        ({}, None, ""),
    ],
)
def test_a_lone_key_is_enough_if_its_host_is_certain(home, environ, name, words):
    discovery = catalogue(home, **environ).current()
    assert [provider.name for provider in discovery.providers] == ([name] if name else [])
    assert words in " ".join(discovery.notes)


@pytest.mark.parametrize("name", sorted(qp.PRESETS))
def test_presets(home, name):
    base_url, variable = qp.PRESETS[name]
    provider = (
        catalogue(home, qp.Options(provider=name), **{variable: "sk-x"}).current().providers[0]
    )
    assert (provider.name, provider.base_url, provider.credentials.access_token()) == (
        name,
        base_url,
        "sk-x",
    )


def test_unknown_provider_is_named(home):
    with pytest.raises(ValueError, match="no provider 'x'"):
        catalogue(home, qp.Options(provider="x"))


def test_provider_of_the_command_line_is_never_overruled(home):
    (home / "settings.json").write_text(SETTINGS % (4, ENTRIES), encoding="utf-8")
    for options in (qp.Options(base_url="http://chosen:1/v1"), qp.Options(provider="openrouter")):
        names = catalogue(home, options, HOST="http://gateway:1", OPENAI_API_KEY="sk-1")
        assert [
            target.provider for target in names.targets("qwen3.7-plus")
        ] == names.current().providers[:1]


@pytest.mark.parametrize(
    "text",
    [
        '{"env":["a"]}',
        '{"modelProviders":[1]}',
        '{"security":{"auth":{"baseUrl":5,"selectedType":"openai"}}}',
        '{"modelProviders":{"openai":[{"id":"x","baseUrl":"http://[::1"}]}}',
        '{"model":{"name":{}}}',
    ],
)
def test_odd_settings_do_not_stop_the_start(home, text):
    (home / "settings.json").write_text(text)
    for provider in catalogue(home).current().providers:
        provider.describe()


def test_oauth_file_is_active_when_nothing_is_selected(home, upstream, login):
    discovery = catalogue(home).current()
    assert (discovery.providers[0].name, discovery.model) == ("oauth", "coder-model")


@pytest.mark.parametrize(
    "environ, expected",
    [
        ({"QWEN_HOME": "/a/b"}, "/a/b"),
        ({"QWEN_HOME": "~/q"}, "{home}/q"),
        ({"QWEN_HOME": "~"}, "{home}"),
        ({}, "{home}/.qwen"),
    ],
)
def test_qwen_home_as_the_cli_resolves_it(home, environ, expected):
    environ["HOME"] = str(home.parent)
    assert qp.qwen_home(environ) == expected.format(home=home.parent)


def test_qwen_cli_auth_seeds_the_file_once(home, upstream):
    seed = json.dumps(
        {
            "access_token": "at_seed",
            "refresh_token": "rt_seed",
            "token_type": "Bearer",
            "expiry_date": 9e12,
        }
    )
    catalogue(home, QWEN_CLI_AUTH=seed)
    path = home / "oauth_creds.json"
    assert (
        json.loads(path.read_text())["access_token"] == "at_seed"
        and stat.S_IMODE(path.stat().st_mode) == 0o600
    )
    write_login(home, upstream)
    catalogue(home, QWEN_CLI_AUTH=seed)
    assert json.loads(path.read_text())["access_token"] == "at_1"


def test_files_of_an_untrusted_directory_are_not_read(home, tmp_path):
    (tmp_path / ".env").write_text("OPENAI_BASE_URL=http://evil/v1\n")
    environ = {"OPENAI_API_KEY": "sk-1"}
    discovery = catalogue(home, **environ).current()
    assert discovery.providers == [] and "not trust" in discovery.notes[0]
    (home / "trustedFolders.json").write_text(json.dumps({str(tmp_path): "TRUST_FOLDER"}))
    assert catalogue(home, **environ).current().providers[0].base_url == "http://evil/v1"


def test_aliases_and_explicit_providers(home):
    (home / "settings.json").write_text(SETTINGS % (4, ENTRIES), encoding="utf-8")
    names = catalogue(home, qp.Options(alias=("gpt-*=qwen3.6-plus",)), HOST="http://gateway:1")
    assert names.targets("gpt-4o")[0].provider.name == "gateway:1"
    assert names.targets(None)[0].model == "qwen3.7-plus"
    assert names.targets("h/anything")[0][1] == "anything"
    assert names.targets("unknown-model")[0].provider.name == "coding-intl"
    with pytest.raises(qp.BadRequest):
        names.targets(5)


# -- where a request goes when files are spoilt, distrusted or wrong -------------------------------

OPENAI, FIRST = {"auth": {"selectedType": "openai"}}, "A sk-good-first"


class World:
    """A home, the folder above it, three upstreams A, B, C (A is the identity host), a server."""

    def __init__(self, home, serve, monkeypatch, caplog):
        self.home, self.root, self.serve, self.caplog = home, home.parent.parent, serve, caplog
        self.setenv = monkeypatch.setenv
        self.fakes = {letter: FakeQwen() for letter in "ABC"}
        self.host = {letter: f"127.0.0.1:{fake.port}" for letter, fake in self.fakes.items()}
        self.url = {letter: fake.dashscope for letter, fake in self.fakes.items()}
        self.setenv("QWEN_OAUTH_BASE_URL", self.fakes["A"].origin)
        self.setenv("QWEN_CODE_SYSTEM_SETTINGS_PATH", str(self.root / "system.json"))

    def start(self, **options):
        self.server = self.serve(**options)

    def goes(self, **request):
        """Where a request goes now: the upstream and the key that it got; or the refusal."""
        self.server.providers._checked = 0.0
        for fake in self.fakes.values():
            del fake.requests[:]
        status, headers, body = chat(self.server, **request)
        self.provider = headers.get("x-qwen-provider")
        asked = [
            (letter, headers["Authorization"].replace("Bearer", ""))
            for letter, fake in self.fakes.items()
            for path, headers, _ in fake.requests
            if path.endswith("/chat/completions")
        ]
        assert len(asked) == (status == 200)
        return "".join(asked[0]) if asked else f"{status} {body['error']['message']}"

    def write(self, path, value):
        """A file below the root, whatever is there now: JSON, variables (.env), or text."""
        path = self.root / path
        path.parent.mkdir(parents=True, exist_ok=True)
        spoil(path, "vanished")
        if path.name == ".env":
            value = "".join("{}={}\n".format(*item) for item in value.items())
        path.write_text(value if isinstance(value, str) else json.dumps(value))
        return path

    def settings(self, letter, key, model="m"):
        """settings.json of one entry at an upstream, with its key."""
        entry = {"id": model, "baseUrl": self.url[letter], "envKey": "K"}
        more = {"env": {"K": key}, "model": {"name": model}, "ui": {"theme": "x" * 99}}
        return {"modelProviders": {"openai": [entry]}, "security": OPENAI, **more}

    def variables(self, letter, key):
        return {"OPENAI_API_KEY": key, "OPENAI_BASE_URL": self.url[letter], "OPENAI_MODEL": "m"}

    def other_login(self, *kinds):
        """A login at B that would be used if settings.json did not say otherwise."""
        if "oauth" in kinds:
            write_login(self.home, self.fakes["B"])
        for name, value in self.variables("B", "sk-good-other").items():
            if "environment" in kinds:
                self.setenv(name, value)

    def check_kept(self, path, damage):
        """A file is spoilt: nothing changes but for one warning that names it."""
        assert self.goes() == FIRST
        self.caplog.clear()
        spoil(path, damage)
        assert [self.goes() for _ in range(3)] == [FIRST] * 3
        said = [one.getMessage() for one in self.caplog.records if one.levelname == "WARNING"]
        assert [path.name in words for words in said] == [True], said


SPOILT = {
    "cut": lambda text: text[: min(150, len(text) // 2)],
    "comma": lambda text: text[:-1] + ",}",
    "emptied": lambda text: "",
    "list": lambda text: f"[{text}]",
    "null": lambda text: "null",
    "zeros": lambda text: "\0" * len(text),
}


def spoil(path, damage):
    text = path.read_text() if path.is_file() else ""
    if path.is_dir():
        path.rmdir()
    elif os.path.lexists(str(path)):
        path.unlink()
    if damage == "directory":
        path.mkdir()
    elif damage == "dangling":
        path.symlink_to(path.parent / "nowhere")
    elif damage in SPOILT:
        path.write_text(SPOILT[damage](text))


@pytest.fixture()
def world(home, serve, monkeypatch, caplog):
    made = World(home, serve, monkeypatch, caplog)
    yield made
    for fake in made.fakes.values():
        fake.close()


USER, SYSTEM, PROJECT = "home/.qwen/settings.json", "system.json", ".qwen/settings.json"
TRUSTED = "home/.qwen/trustedFolders.json"
KEPT_FILES = """
home/.qwen/settings.json oauth cut
home/.qwen/settings.json environment comma
home/.qwen/settings.json oauth vanished
home/.qwen/settings.json environment directory
system.json environment dangling
.qwen/settings.json environment vanished
home/.env oauth emptied
.qwen/.env oauth dangling
home/.qwen/trustedFolders.json environment cut
""".strip().split("\n")


@pytest.mark.parametrize("line", KEPT_FILES)
def test_what_is_spoilt_while_running_keeps_the_account(world, line):  # H2
    place, other, damage = line.split()
    named, trust = PROJECT if place == TRUSTED else place, {str(world.root): "TRUST_FOLDER"}
    content = world.variables if place.endswith(".env") else world.settings
    world.other_login(other)
    world.write(TRUSTED, trust)
    world.write(named, content("A", "sk-good-first"))
    world.start()
    world.check_kept(world.root / place, damage)
    world.write(TRUSTED, trust)
    world.write(named, content("C", "sk-good-mended"))
    assert world.goes() == "C sk-good-mended"
    world.write(named, {"UNUSED": "x"})  # good, and it says less
    assert world.goes()[:2] == "B "


BROKEN = [(USER, "cut", {}), (USER, "directory", {"model": "m"}), (USER, "zeros", {})]
BROKEN += [(SYSTEM, "comma", {"failover": True})]


@pytest.mark.parametrize("place, damage, options", BROKEN, ids=str)
def test_settings_broken_at_the_start_stop_every_request(world, main, place, damage, options):
    world.other_login("oauth", "environment")  # H2
    path = world.write(place, world.settings("A", "sk-good-first"))
    spoil(path, damage)
    for arguments, expected in (["--port=0"], 0), (["status"], 1):
        code, said = main(*arguments)
        assert code == expected and str(path) in said
    world.start(provider="oauth")
    assert world.goes() == "B at_1"
    world.start(base_url=world.url["C"])
    assert world.goes() == "C sk-good-other"
    world.start(**options)
    get(world.server, "/v1/models")
    for fake in world.fakes.values():
        del fake.requests[:]
    for target, request in [
        *ROUTES.values(),
        (CHAT, {"messages": HI, "model": "oauth/coder-model"}),
    ]:
        status, _, body = ask(world.server, request, path=target)
        error = json.loads(body)["error"]
        assert (status, error["code"]) == (503, "settings_unreadable"), target
        assert str(path) in error["message"]
    assert not any(fake.requests for fake in world.fakes.values())
    world.write(place, world.settings("A", "sk-good-first"))
    assert world.goes() == FIRST


# Rules on top/parent/repo, where the program runs (+ trusted, ^ its parent trusted, - not trusted),
# and what that makes trusted: Repo's settings.json, Parent's .env.
TRUST_RULES = """
repo+: R | parent+ repo-: | repo- parent+: | repo+ parent-: R | top+ parent-: | repo^: RP
parent/other^ repo-: | parent- repo/any^: R
link+: R | link/..+: RP | repo-2+ parent/rep+ repo/any+:
"""
TRUST_RULES = [rule.strip() for rule in re.split(r"[|\n]", TRUST_RULES.strip())]
LEVELS = {"+": "TRUST_FOLDER", "^": "TRUST_PARENT", "-": "DO_NOT_TRUST", "?": "trust_folder"}


def repository(world, dotenv=".env"):
    """The user's own settings, a repository with others, and a .env above it with another key."""
    for name, path in (("own", USER), ("repo", "top/parent/repo/.qwen/settings.json")):
        entry = {"id": name, "baseUrl": f"http://{name}/v1", "envKey": "K"}
        env = {"K": "sk-own-key"} if name == "own" else {}
        settings = {"env": env, "modelProviders": {"openai": [entry]}, "model": {"name": name}}
        world.write(path, {**settings, "security": OPENAI})
    world.write("top/parent/" + dotenv, {"K": "sk-parent-key"})
    repo = world.root / "top" / "parent" / "repo"
    (world.root / "link").symlink_to(repo)
    os.chdir(str(repo))
    return dict(zip(("link", "repo", "parent", "top"), (world.root / "link", repo, *repo.parents)))


def base_url_and_key():
    """Of a request that names no model."""
    provider = qp.Providers(qp.Options()).targets(None)[0].provider
    return provider.base_url, provider.credentials.access_token()


@pytest.mark.parametrize("rule", TRUST_RULES)
def test_trust_is_asked_for_each_folder_whose_file_is_read(world, rule):  # H3
    is_odd = (
        TRUST_RULES.index(rule) % 2
    )  # every other row has the file elsewhere, and .env in .qwen
    folders = repository(world, [".env", ".qwen/.env"][is_odd])
    rules, _, trusted = rule.rpartition(":")
    found = {}
    for path, sign in re.findall(r"(\S*)([-+^?])(?= |$)", rules):
        name = re.match("[a-z]*", path).group()
        found[path.replace(name, str(folders[name]), 1)] = LEVELS[sign]
    if is_odd:  # then the file in the home does not count
        contrary = {str(folders["repo"]): LEVELS["-" if "R" in trusted else "+"]}
        contrary[str(folders["parent"])] = LEVELS["-" if "P" in trusted else "+"]
        world.write(TRUSTED, contrary)
        world.setenv("QWEN_CODE_TRUSTED_FOLDERS_PATH", str(world.root / "moved.json"))
    world.write("moved.json" if is_odd else TRUSTED, found)
    base_url = "http://repo/v1" if "R" in trusted else "http://own/v1"
    assert base_url_and_key() == (base_url, "sk-parent-key" if "P" in trusted else "sk-own-key")


@pytest.mark.parametrize("text", ['{"%s": "TRUST_FOLDER",}', None], ids=str)
def test_trust_that_cannot_be_read_at_the_start_trusts_nothing(world, text):  # H3
    repo = str(repository(world)["repo"])
    world.write(TRUSTED, {repo: "TRUST_FOLDER"})
    world.setenv("QWEN_CODE_TRUSTED_FOLDERS_PATH", str(world.root / "moved.json"))
    if text is None:
        (world.root / "moved.json").mkdir()
    else:
        world.write("moved.json", text.replace("%s", repo))
    assert base_url_and_key() == ("http://own/v1", "sk-own-key")


IDENTITY_HOSTS = {"environment": True, "home/.qwen/.env": True, "elsewhere/.env": True}
OTHERS = (
    "home/.env work/.env .qwen/.env home/.qwen/settings.json system.json work/.qwen/settings.json"
)
IDENTITY_HOSTS.update(dict.fromkeys(OTHERS.split(), False))


@pytest.mark.parametrize("source", IDENTITY_HOSTS)
def test_the_identity_host_comes_from_the_users_own_files_only(world, monkeypatch, source):  # H3
    asked, variable, cli = [], {"QWEN_OAUTH_BASE_URL": "http://identity.example"}, world.home

    def post_form(url, *arguments, **more):
        asked.append(url)
        raise qp.UpstreamError("recorded")

    monkeypatch.setattr(qp, "post_form", post_form)
    monkeypatch.delenv("QWEN_OAUTH_BASE_URL")
    if source == "environment":
        world.setenv("QWEN_OAUTH_BASE_URL", "http://identity.example")
    else:
        world.write(source, {"env": variable} if source.endswith(".json") else variable)
    if source.startswith("elsewhere"):
        cli = world.root / "elsewhere"
        world.setenv("QWEN_HOME", str(cli))
    world.write("work/file", "")
    monkeypatch.chdir(world.root / "work")
    world.write(cli / "trustedFolders.json", {str(world.root): "TRUST_FOLDER"})
    write_login(cli, world.fakes["A"], expires_in=-60)
    with pytest.raises(qp.UpstreamError, match="recorded"):
        base_url_and_key()
    host = "http://identity.example" if IDENTITY_HOSTS[source] else qp.OAUTH_BASE_URL
    assert asked == [host + qp.TOKEN_PATH]


# Entries as id@upstream:variable, the active one's first ("chosen": --base-url A); the variables
# that are set; live lists; and what must come of it: id=variable is in the list and goes there with
# that key, id~variable only goes there, id!variable is a 401 that names it.
SHAPES = """
live at the active | a@A:KA M@B:KB        | KA    | A:a,M   | a=KA M=KA B/M!KB
another has a key  | a@A:KA M@B:KB        | KA KB | A:a,M   | a=KA M=KB A/M=KA
two others, live   | a@A:KA M@B:KB M@C:KC | KA KC | A:M     | M=KC A/M=KA B/M!KB
nobody has a key   | a@A:KA M@B:KB M@C:KC | KA    | A:a,M   | M=KA B/M!KB C/M!KC
no key of its own  | M@A:KA M@B:KB        | KB    | B:M     | M!KA A/M!KA B/M=KB
several            | a@A:KA b@B:KB c@C:KC a@C:KC | KA KB | A:x,c | a=KA b=KB x=KA c=KA C/c!KC C/a!KC
as if at another   | a@A:KA M@B:KB        | KA KB | A:a,B/M | a=KA M=KB
chosen, listed     | M@B:KB b@B:KB        | KB    | A:x,M   | x=KA M=KA b~KA B/b=KB B/M=KB
chosen, not listed | M@B:KB               | KB    | A:x     | x=KA M~KA B/M=KB
failover           | a@A:KA M@B:KB M@C:KC | KA KC | A:M     | M=KC A/M=KA B/M!KB
"""


@pytest.mark.parametrize("shape", SHAPES.strip().splitlines(), ids=lambda row: row[:18].strip())
def test_the_list_of_models_says_where_a_request_goes(world, shape):  # H11
    name, entries, keys, live, expected = (part.strip() for part in shape.split("|"))
    options, providers, listed = {"failover": name == "failover"}, {"KA": world.host["A"]}, []
    for model, letter, key in re.findall(r"(\w)@(\w):(\w+)", entries):
        listed.append({"id": model, "baseUrl": world.url[letter], "envKey": key})
        providers[key] = world.host[letter]
    settings = {"modelProviders": {"openai": listed}, "security": OPENAI}
    if name.startswith("chosen"):
        world.setenv("OPENAI_API_KEY", "sk-good-KA")
        options["base_url"] = world.url["A"]
    else:
        settings["model"] = {"name": listed[0]["id"]}
    world.write(USER, {**settings, "env": {key: "sk-good-" + key for key in keys.split()}})

    def spelt(model):
        return re.sub("^[ABC](?=/)", lambda letter: world.host[letter.group()], model)

    def outcome(model):
        """The variable whose key was used, or that a 401 names."""
        goes = world.goes(model=model)
        assert goes.startswith("401 ") or world.provider == providers[goes[-2:]]
        return ("!" if goes.startswith("401 ") else "") + re.search(r"\bK[A-Z]\b", goes).group()

    for letter, models in re.findall(r"(\w):(\S+)", live):
        world.fakes[letter].models = [spelt(model) for model in models.split(",")]
    world.start(**options)
    wanted = re.findall(r"(\S+)([=~!])(\S+)", expected)
    for _ in range(2):  # before anybody has asked for the list, and after
        for model, sign, key in wanted:
            assert outcome(spelt(model)) == sign.strip("=~") + key, model
        found = get(world.server, "/v1/models")[1]["data"]
    owners = {model["id"]: model["owned_by"] for model in found}
    for model, sign, key in wanted:
        assert sign != "=" or owners.get(spelt(model)) == providers[key], model
    assert {model: providers[outcome(model).strip("!")] for model in owners} == owners


ABSENT = "(absent)"
WRONG_FIELDS = [("baseUrl", 5, None), ("baseUrl", ["https://h.example/v1"], "OPENAI_BASE_URL")]
WRONG_FIELDS += [("baseUrl", True, "security"), ("baseUrl", "h.example/v1", "OPENAI_BASE_URL")]
WRONG_FIELDS += [("baseUrl", "$UNSET/v1", "security")]
WRONG_FIELDS += [("baseUrl", "   ", None), ("baseUrl", ABSENT, None), ("envKey", 5, None)]


@pytest.mark.parametrize("field, value, place", WRONG_FIELDS)
def test_an_entry_with_a_wrong_field_is_refused_by_its_name(world, outside, field, value, place):
    auth = {**OPENAI["auth"], **({"baseUrl": world.url["B"]} if place == "security" else {})}  # H12
    world.setenv("OPENAI_API_KEY", "sk-good-openai")
    if place == "OPENAI_BASE_URL":
        world.setenv(place, world.url["B"])
    good = {"id": "good", "baseUrl": world.url["A"], "envKey": "K"}
    wrong = {**good, "id": "m", field: value}
    wrong = {name: item for name, item in wrong.items() if item != ABSENT}
    settings = {"env": {"K": "sk-good-own"}, "model": {"name": "m"}, "security": {"auth": auth}}
    world.write(USER, {**settings, "modelProviders": {"openai": [wrong, good]}})
    world.start()
    get(world.server, "/v1/models")
    assert world.fakes["B"].requests == []
    for request in ({}, {"model": "m", "stream": True}):
        goes = world.goes(**request)
        assert goes.startswith("401 ") and field in goes
    assert world.goes(model="good") == "A sk-good-own" and outside == []


WRONG_ADDRESSES = [("baseUrl", 5), ("baseUrl", "file:///v1")]
WRONG_ADDRESSES += [("resource_url", 5), ("resource_url", ["https://h.example"])]


@pytest.mark.parametrize("field, value", WRONG_ADDRESSES)
def test_a_base_url_for_all_of_a_wrong_kind_is_refused(world, outside, field, value):  # H12
    if field == "baseUrl":
        world.setenv("OPENAI_API_KEY", "sk-good-openai")
        auth = {**OPENAI["auth"], "baseUrl": value, "apiKey": "sk-good-old"}
        settings = {"modelProviders": {"openai": [{"id": "m"}]}, "model": {"name": "m"}}
        world.write(USER, {**settings, "security": {"auth": auth}})
    else:
        write_login(world.home, world.fakes["A"], resource_url=value)
    world.start()
    goes = world.goes()
    assert goes.startswith("401 ") and field in goes and outside == []


# ----------------------------------------------------------------------------------------------------
# Upstream
# ----------------------------------------------------------------------------------------------------


def test_upstream_connection_is_kept(key_server, upstream):
    for _ in range(5):
        assert chat(key_server)[0] == 200
        assert chat(key_server, stream=True)[0] == 200
    assert (
        upstream.connections <= 3
    )  # a client may be faster than the return of a connection to the pool


def test_kept_connection_that_died_is_replaced(key_server, upstream):
    upstream.script.append(stream(*HELLO, CUT))
    assert chat(key_server)[0] == 200
    assert chat(key_server)[0] == 200
    assert 2 <= upstream.connections <= 3


@pytest.mark.parametrize("status", [429, 502, 503, 529])
def test_retries_before_the_first_byte(key_server, upstream, status, monkeypatch):
    monkeypatch.setattr(qp.Call, "RETRY_DELAY", 0.01)
    text = "Requests rate limit exceeded, please try again later."
    upstream.script.extend([refusal(text, status, "limit_requests")] * 2)
    assert chat(key_server)[0] == 200 and len(upstream.bodies()) == 3


def test_retry_after_is_honoured_or_passed_on(key_server, upstream):
    upstream.script.append(refusal("slow", 429)._replace(headers=[("Retry-After", "0")]))
    assert chat(key_server)[0] == 200
    upstream.script.append(refusal("slow", 429)._replace(headers=[("Retry-After", "300")]))
    status, headers, body = chat(key_server)
    assert (status, headers["Retry-After"], body["error"]["code"]) == (
        429,
        "60",
        "rate_limit_exceeded",
    )


def test_no_retry_for_hard_quota(key_server, upstream):
    upstream.script.append(refusal("Free allocated quota exceeded.", 429, "insufficient_quota"))
    status, headers, body = chat(key_server)
    assert (status, headers["x-should-retry"], body["error"]["code"]) == (
        429,
        "false",
        "insufficient_quota",
    )
    assert len(upstream.bodies()) == 1 and body["request_id"] == "r-1"


def test_unreachable_upstream_is_502(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-x-123456")
    monkeypatch.setattr(qp.Call, "RETRY_DELAY", 0.01)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        server = serve(base_url=f"http://127.0.0.1:{free.getsockname()[1]}/v1")
        status, _, body = chat(server)
    assert (status, body["error"]["code"]) == (502, "upstream_unreachable")


def test_silent_upstream_is_504(serve, upstream, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    server = serve(base_url=upstream.dashscope, model="m", timeout=0.3)
    upstream.script.append(
        Reply(
            200,
            [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")],
            [threading.Event()],
        )
    )
    assert chat(server)[0] == 504
    assert upstream.gone.wait(WAIT)


def test_redirect_is_not_followed(key_server, upstream):
    upstream.script.append(reply(302, b"", headers=[("Location", upstream.origin + "/elsewhere")]))
    status, _, body = chat(key_server)
    assert status == 502 and "redirect" in body["error"]["message"] and len(upstream.requests) == 1


def test_401_forces_one_refresh_and_one_repeat(login, upstream, serve):
    upstream.access_tokens = set()
    status, _, body = chat(serve())
    assert status == 200 and upstream.refreshes == ["rt_1"]
    assert [
        headers["Authorization"]
        for path, headers, _ in upstream.requests
        if path.endswith("completions")
    ] == ["Bearer at_1", "Bearer at_2"]


def test_401_after_a_refresh_says_that_the_free_tier_ended(login, upstream, serve):
    upstream.script.extend(
        [refusal("invalid access token or token expired", 401, "invalid_api_key")] * 2
    )
    status, _, body = chat(serve())
    assert (
        status == 401
        and "2026-04-15" in body["error"]["message"]
        and "/auth" in body["error"]["message"]
    )
    assert len(upstream.refreshes) == 1 and len(upstream.bodies()) == 2


def test_useless_login_is_not_refreshed_for_every_request(login, upstream, serve):
    upstream.script.extend(
        [refusal("invalid access token or token expired", 401, "invalid_api_key")] * 5
    )
    server = serve()
    assert [chat(server)[0] for _ in range(4)] == [401] * 4 and len(upstream.refreshes) == 1


@pytest.mark.parametrize(
    "answer, status, code, words",
    [
        (
            reply(405, {"error": "Coding Plan is currently only available for Coding Agents"}),
            403,
            "client_not_accepted",
            "Coding Agents",
        ),
        (
            refusal("Incorrect API key provided. For details, see: x", 401, "invalid_api_key"),
            401,
            "invalid_api_key",
            "region",
        ),
        (
            refusal(
                "<400> InternalError.Algo.InvalidParameter: Range of input length should be [1, 983616]"
            ),
            400,
            "context_length_exceeded",
            "983616",
        ),
        (
            refusal("Exceeded limit on max bytes to request body : 6291456"),
            413,
            "request_too_large",
            "6 MiB",
        ),
        (
            reply(400, {"code": "InvalidParameter", "message": "m1", "request_id": "r-1"}),
            400,
            "InvalidParameter",
            "m1",
        ),
        (
            reply(400, b'data: {"error":{"message":"m2","code":"c2"},"request_id":"r-1"}'),
            400,
            "c2",
            "m2",
        ),
        (
            reply(
                400,
                {
                    "error": {
                        "message": '{"request_id":"r0","code":"C3","message":"m3"}',
                        "code": "x",
                    },
                    "request_id": "r-1",
                },
            ),
            400,
            "C3",
            "m3",
        ),
        (
            refusal("Input data may contain inappropriate content.", 400, "data_inspection_failed"),
            400,
            "content_filter",
            "inappropriate",
        ),
        (
            refusal(
                "Access denied, please make sure your account is in good standing.",
                400,
                "Arrearage",
            ),
            429,
            "insufficient_quota",
            "good standing",
        ),
        (
            refusal("hour allocated quota exceeded", 429, "insufficient_quota"),
            429,
            "insufficient_quota",
            "hour",
        ),
        (
            refusal("The model `x` does not exist", 404, "model_not_found"),
            404,
            "model_not_found",
            "does not exist",
        ),
        (Reply(404, [], []), 404, None, "base URL"),
        (reply(200, b"<html><title>WAF</title></html>", "text/html"), 502, "upstream_html", "WAF"),
        (
            reply(429, b"<html><title>Slow down</title></html>", "text/html"),
            429,
            "rate_limit_exceeded",
            "Slow down",
        ),
        (reply(200, b"", "text/event-stream"), 502, "upstream_cut", "empty"),
        (
            reply(200, {"error": {"message": "m4", "code": "Throttling.AllocationQuota"}}),
            429,
            "rate_limit_exceeded",
            "m4",
        ),
        (
            stream(
                b'id:1\nevent:error\n:HTTP_STATUS/400\ndata:{"request_id":"r-1","code":"InvalidParameter","message":"m5"}\n\n'
            ),
            400,
            "InvalidParameter",
            "m5",
        ),
        (
            stream(
                chunk(
                    {
                        "content": 'id:1\nevent:error\n:HTTP_STATUS/429\ndata:{"code":"X","message":"Free allocated quota exceeded."}'
                    },
                    "error_finish",
                )
            ),
            429,
            "insufficient_quota",
            "Free allocated",
        ),
        (
            reply(500, {"error": {"message": "boom", "code": "internal_error"}}),
            502,
            "internal_error",
            "boom",
        ),
    ],
)
@pytest.mark.parametrize("is_stream", [False, True])
def test_refusals_become_clear_statuses(
    serve, upstream, monkeypatch, answer, status, code, words, is_stream
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    server = serve(base_url=upstream.dashscope, model="m", retries=0)
    upstream.script.append(answer)
    got, headers, body = chat(server, stream=is_stream)
    assert (got, body["error"]["code"], headers["Content-Type"]) == (
        status,
        code,
        "application/json",
    )
    assert words in body["error"]["message"] and set(body["error"]) == {
        "message",
        "type",
        "param",
        "code",
    }


def test_named_refusal_is_repaired_once(serve, upstream, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    server = serve(base_url=upstream.dashscope, model="some-model")
    assert chat(server, max_tokens=100000)[0] == 200
    assert [body["max_tokens"] for body in upstream.bodies()] == [100000, 65536]


JSON_PLEASE = {"response_format": {"type": "json_object"}}
CALL_PLEASE = {
    "tool_choice": "required",
    "tools": [{"type": "function", "function": {"name": "f"}}],
}


@pytest.mark.parametrize(
    "model, request_, repaired, words",
    [
        (
            "qwen4-plus",
            JSON_PLEASE,
            {"enable_thinking": False, "response_format": {"type": "json_object"}},
            "without thinking",
        ),
        (
            "qwen4-plus",
            {**JSON_PLEASE, "reasoning_effort": "high"},
            {"enable_thinking": True, "response_format": None},
            "",
        ),
        (
            "qwen4-plus",
            {**JSON_PLEASE, "reasoning_effort": "none"},
            {"enable_thinking": False, "response_format": {"type": "json_object"}},
            "",
        ),
        (
            "qwen4-plus",
            CALL_PLEASE,
            {"enable_thinking": False, "tool_choice": "required"},
            "without thinking",
        ),
        (
            "qwen4-plus",
            {**CALL_PLEASE, "extra_body": {"enable_thinking": True}},
            {"enable_thinking": True, "tool_choice": "auto"},
            "",
        ),
        (
            "qwen4-plus",
            {**CALL_PLEASE, "think": True},
            {"enable_thinking": True, "tool_choice": "auto"},
            "",
        ),
        (
            "glm-5",
            {"thinking_budget": 40000},
            {"enable_thinking": True, "thinking_budget": 32768},
            "with thinking_budget 32768",
        ),
    ],
)
def test_a_model_that_nobody_knows_thinks_as_the_client_wants(
    key_server, upstream, caplog, model, request_, repaired, words
):
    caplog.set_level(logging.INFO, "qwen_proxy")
    assert chat(key_server, model=model, **request_)[0] == 200
    assert {name: upstream.bodies()[-1].get(name) for name in repaired} == repaired
    assert (
        len(upstream.bodies()) == (2 if words else 1)
        and "retrying " + words in caplog.text + "retrying "
    )


@pytest.mark.parametrize(
    "message, request_, repaired",
    [
        (
            "The model qwen3-max: json_schema is not supported",
            {
                "response_format": {
                    "type": "json_schema",
                    "json_schema": {"name": "x", "schema": {}},
                }
            },
            {"response_format": {"type": "json_object"}},
        ),
        (
            "For model qwen3-max, logprobs is not supported",
            {"logprobs": True, "top_logprobs": 2},
            {"logprobs": None, "top_logprobs": None},
        ),
        ("tool_choice: required is not supported", CALL_PLEASE, {"tool_choice": "auto"}),
    ],
)
def test_what_is_refused_by_name_is_taken_out(key_server, upstream, message, request_, repaired):
    upstream.script.append(refusal(message))
    assert chat(key_server, model="qwen3-max", **request_)[0] == 200
    assert {name: upstream.bodies()[1].get(name) for name in repaired} == repaired


def test_a_body_that_no_repair_changes_is_not_sent_again(key_server, upstream):
    upstream.script.extend([refusal("Range of max_tokens should be [1, 8192]")] * 3)
    assert chat(key_server, model="qwen3-max", max_tokens=9000)[0] == 400
    assert [body["max_tokens"] for body in upstream.bodies()] == [9000, 8192]


# -- HTTP as upstreams and gateways break it -----------------------------------------------------


class RawUpstream:
    """Sends scripted bytes, one entry for each connection, and closes; a request is read before each.

    STALL in an entry stands for silence until the other side closes.
    """

    STALL = b"(stall)"

    def __init__(self):
        self.script, self.accepted, self.listener = (
            collections.deque(),
            0,
            socket.create_server(("127.0.0.1", 0)),
        )
        self.late, self.sent_late, self.reads = b"", threading.Event(), True
        self.has_been_read = threading.Event()  # set by a test that waits for self.late
        self.ended = threading.Semaphore(0)  # released for each connection that has ended
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/compatible-mode/v1"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.accepted += 1
            threading.Thread(
                target=self.talk_and_count, args=(connection, self.script.popleft()), daemon=True
            ).start()

    def talk_and_count(self, connection, answers):
        with contextlib.suppress(OSError):
            self.talk(connection, answers)
        self.ended.release()

    def talk(self, connection, answers):
        with connection, connection.makefile("rb") as reader:
            for answer in answers if isinstance(answers, list) else [answers]:
                length = 0
                for line in iter(reader.readline, b"\r\n"):
                    if not line:
                        return
                    if line.lower().startswith(b"content-length:"):
                        length = int(line.split(b":")[1])
                reader.read(length if self.reads else 0)
                with contextlib.suppress(OSError):
                    connection.sendall(answer.replace(self.STALL, b""))
                    if self.late:
                        late, self.late = self.late, b""
                        assert self.has_been_read.wait(WAIT)
                        connection.sendall(late)
                        self.sent_late.set()
                    if self.STALL in answer:
                        connection.settimeout(WAIT)
                        reader.read()
            if not self.reads:
                return
            with contextlib.suppress(OSError):  # what was not read would reset the answer away
                connection.shutdown(socket.SHUT_WR)
                connection.settimeout(1)
                reader.read()


@pytest.fixture()
def raw_upstream(serve, monkeypatch):
    fake = RawUpstream()
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    fake.server = serve(base_url=fake.url, model="m", retries=0, timeout=2)
    yield fake
    fake.listener.close()


SSE = b"".join(HELLO)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"


def chunked(data, size=50, extension=b""):
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    return (
        b"".join(b"%X%s\r\n%s\r\n" % (len(part), extension, part) for part in parts) + b"0\r\n\r\n"
    )


@pytest.mark.parametrize(
    "answer",
    [
        HEAD + b"Content-Length: %d\r\n\r\n" % len(SSE) + SSE,
        HEAD + b"\r\n" + SSE,
        HEAD + b"Connection: close\r\n\r\n" + SSE,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(SSE),
        HEAD + b"Transfer-Encoding: Chunked\r\n\r\n" + chunked(SSE, 7, b";a=b"),
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(SSE)[:-2] + b"X-Trailer: 1\r\n\r\n",
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\n").replace(b"\r\n", b"\n") + chunked(SSE),
        b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
        + HEAD
        + b"\r\n"
        + SSE,
        b"HTTP/1.0 200\r\n\r\n" + SSE,
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(SSE)[:-5],
    ],
)
@pytest.mark.parametrize("is_stream", [True, False])
def test_every_framing_of_an_answer_is_read(raw_upstream, answer, is_stream):
    raw_upstream.script.append(answer)
    status, _, body = chat(raw_upstream.server, stream=is_stream)
    completion = collect([json.loads(value) for value in body[:-1]]) if is_stream else body
    assert status == 200 and completion["choices"][0]["message"]["content"] == "Hello, wörld"


@pytest.mark.parametrize(
    "answer",
    [
        b"",
        b"HTTP/1.1 200 OK\r\nContent-",
        b"garbage\r\n\r\n",
        b"HTTP/2 200 OK\r\n\r\n",
        HEAD + b"Content-Length: 99999\r\n\r\n" + SSE[:600],
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n5\r\nda",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\nZZ\r\n",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n-5\r\nabc",
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + b"9" * 70000,
        HEAD + b"X: y\r\n" * 60000,
        HEAD + b"Content-Length: \xb2\r\n\r\n",
    ],
)
def test_broken_framing_is_a_502_and_the_next_request_works(raw_upstream, answer):
    raw_upstream.script.extend([answer, HEAD + b"\r\n" + SSE])
    threads = threading.active_count()
    status, _, body = chat(raw_upstream.server)
    assert status == 502 and body["error"]["code"] == "upstream_cut"
    assert chat(raw_upstream.server)[0] == 200
    end = time.monotonic() + WAIT
    while threading.active_count() > threads and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= threads


SOME = b"".join(HELLO[:3])
FINISHED = b"".join(HELLO[:5])
FAULTS = {  # what the upstream sends: (status and code when not streamed, the same when streamed or None for a whole answer)
    "slow headers": (
        HEAD[:20] + RawUpstream.STALL,
        (504, "upstream_timeout"),
        (504, "upstream_timeout"),
    ),
    "slow first byte": (
        HEAD + b"\r\n" + RawUpstream.STALL,
        (504, "upstream_timeout"),
        (504, "upstream_timeout"),
    ),
    "stall": (
        HEAD + b"\r\n" + SOME + RawUpstream.STALL,
        (504, "upstream_timeout"),
        (200, "upstream_timeout"),
    ),
    "stall in a chunk": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(SOME)[:-30] + RawUpstream.STALL,
        (504, "upstream_timeout"),
        (200, "upstream_timeout"),
    ),
    "cut in a chunk": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(SOME)[:-30],
        (502, "upstream_cut"),
        (200, "upstream_cut"),
    ),
    "cut in an event": (HEAD + b"\r\n" + SOME[:-20], (502, "upstream_cut"), (200, "upstream_cut")),
    "cut after the finish reason": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(FINISHED)[:-5],
        (200, None),
        (200, None),
    ),
    "cut after [DONE]": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(SSE)[:-5],
        (200, None),
        (200, None),
    ),
    "stall after [DONE]": (
        HEAD + b"Transfer-Encoding: chunked\r\n\r\n" + chunked(SSE)[:-5] + RawUpstream.STALL,
        (200, None),
        (200, None),
    ),
    "garbage": (
        HEAD + b"\r\n" + bytes(range(256)) * 9,
        (502, "upstream_cut"),
        (502, "upstream_cut"),
    ),
    "a page": (
        HEAD + b"\r\n<html><body>busy</body></html>",
        (502, "upstream_html"),
        (502, "upstream_html"),
    ),
    "nothing": (HEAD + b"Content-Length: 0\r\n\r\n", (502, "upstream_cut"), (502, "upstream_cut")),
}


@pytest.mark.parametrize("name", sorted(FAULTS))
def test_a_fault_ends_in_time_and_leaves_nothing_behind(serve, monkeypatch, name):
    fake, (answer, whole, streamed) = RawUpstream(), FAULTS[name]
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    server, threads = (
        serve(base_url=fake.url, model="m", retries=0, timeout=0.4),
        threading.active_count(),
    )
    fake.script.extend([answer, answer, HEAD + b"\r\n" + SSE])
    with contextlib.closing(fake.listener):
        status, _, body = chat(server)
        assert (status, dig(body, "error", "code")) == whole
        status, _, body = chat(server, stream=True)
        error = body if status != 200 else {} if body[-1] == "[DONE]" else json.loads(body[-1])
        assert (status, dig(error, "error", "code")) == streamed
        assert chat(server)[2]["choices"][0]["message"]["content"] == "Hello, wörld"
        assert all(fake.ended.acquire(timeout=WAIT) for _ in range(3))  # no connection is left open
    end = time.monotonic() + WAIT
    while threading.active_count() > threads and time.monotonic() < end:
        time.sleep(0.01)
    assert threading.active_count() <= threads


@pytest.mark.parametrize(
    "delta", [{"content": "lo, "}, {"reasoning_content": "lo, "}, tool_call(0, "", None, "lo, ")]
)
def test_an_answer_that_is_held_has_a_limit_and_a_stream_has_none(raw_upstream, monkeypatch, delta):
    monkeypatch.setattr(qp.Budget, "LIMIT", 3000)
    is_call = "tool_calls" in delta
    answer = (
        HEAD
        + b"\r\n"
        + b"".join([HELLO[0], *([CALLS[1]] if is_call else []), *[chunk(delta)] * 1000, *END])
    )
    raw_upstream.script.extend([answer] * 4 + [HEAD + b"\r\n" + SSE])
    status, _, body = chat(raw_upstream.server)
    assert status == 502 and "was aborted" in body["error"]["message"]
    assert "was aborted" in respond(raw_upstream.server)[1]["error"]["message"]
    assert respond(raw_upstream.server, stream=True)[1][-1][0] == "response.failed"
    assert (chat(raw_upstream.server, stream=True)[2][-1] == "[DONE]") == (
        not is_call
    )  # the state of a call is held
    assert chat(raw_upstream.server)[0] == 200


@pytest.mark.parametrize(
    "base_url",
    ["http://127.0.0.1:1/v1", "http://no-such-host.invalid/v1", "https://127.0.0.1:{port}/v1"],
)
def test_an_upstream_that_cannot_be_reached_is_named(serve, upstream, monkeypatch, base_url):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    server = serve(base_url=base_url.format(port=upstream.port), model="m", retries=0)
    for is_stream in (False, True):
        status, _, body = chat(server, stream=is_stream)
        assert (status, body["error"]["code"]) == (
            502,
            "upstream_unreachable",
        ) and "cannot be reached" in body["error"]["message"]


def test_a_kept_connection_closed_at_the_moment_of_reuse_is_replaced(raw_upstream):
    whole_answer = HEAD + b"Content-Length: %d\r\n\r\n" % len(SSE) + SSE
    raw_upstream.script.extend([[whole_answer, b""], whole_answer])
    assert [chat(raw_upstream.server)[0] for _ in range(2)] == [
        200,
        200,
    ] and raw_upstream.accepted == 2


def test_bytes_behind_an_answer_close_the_connection(raw_upstream):
    whole_answer = HEAD + b"Content-Length: %d\r\n\r\n" % len(SSE) + SSE
    raw_upstream.script.extend(
        [[whole_answer + b"HTTP/1.1 200 OK\r\n\r\nsmuggled", whole_answer], whole_answer]
    )
    assert [chat(raw_upstream.server)[2]["choices"][0]["message"]["content"] for _ in range(2)] == [
        "Hello, wörld"
    ] * 2
    assert raw_upstream.accepted == 2


@pytest.mark.parametrize("size, count", [(10_000_000, 1), (3, 20_000)])
def test_large_and_many_chunks_arrive_whole(raw_upstream, size, count):
    texts = ["ab "[:size] if size < 10 else "x" * size] * count
    answer = (
        HEAD
        + b"Transfer-Encoding: chunked\r\n\r\n"
        + chunked(b"".join(chunk({"content": text}) for text in texts) + b"".join(END), 30_000)
    )
    raw_upstream.script.extend([answer, answer])
    assert chat(raw_upstream.server)[2]["choices"][0]["message"]["content"] == "".join(texts)
    _, _, data = chat(raw_upstream.server, stream=True)
    assert text_in([json.loads(value) for value in data[:-1]]) == "".join(texts)


@pytest.mark.parametrize("start", ["", "```json\n{}\n", "Hi\n", "<think>"])
def test_blank_characters_without_end_take_no_time_and_pass(start):
    """Models in JSON mode fall into that: held back for a while, never for its square."""

    def work(pieces):
        content = qp.ContentFilter(is_json=True)
        said = [content.feed(text) for text in [start] + ["\n\n  "] * pieces]
        text = "".join(part for pair in said for part in pair) + content.close()[1]
        assert len(text) > pieces * 3

    check_linear(work, 4_000)


def test_closing_tags_by_the_thousand_are_taken_out():
    content = qp.ContentFilter(is_json=False)
    assert content.feed("</think>" * 5000 + "Hello") == ("", "Hello")


UNITS = ["model ", "<title", "range of max_tokens ", "<html><title>", '"', "\\"]


@pytest.mark.parametrize("unit", UNITS)
def test_no_error_takes_the_square_of_its_length(unit):
    def work(count):
        error = qp.to_upstream_error(qp.Refusal.read(400, unit * count), qp.FAMILIES["dashscope"])
        qp.repair_request({"max_tokens": 5, "enable_thinking": False}, error)

    check_linear(work, 5_000)


def test_late_bytes_on_an_idle_connection_are_nobodys_answer(raw_upstream):
    whole_answer = HEAD + b"Content-Length: %d\r\n\r\n" % len(SSE) + SSE
    raw_upstream.script.extend([[whole_answer, b""], whole_answer])
    raw_upstream.late = whole_answer.replace("wörld".encode(), b"DEMON")
    assert chat(raw_upstream.server)[0] == 200
    raw_upstream.has_been_read.set()
    assert raw_upstream.sent_late.wait(WAIT)
    assert chat(raw_upstream.server)[2]["choices"][0]["message"]["content"] == "Hello, wörld"


def test_a_refusal_counts_even_if_its_body_is_cut(raw_upstream):
    raw_upstream.script.append(b'HTTP/1.1 401 Unauthorized\r\nContent-Length: 500\r\n\r\n{"error":')
    assert chat(raw_upstream.server)[0] == 401


def test_a_refusal_during_the_upload_is_heard(raw_upstream):
    """An endpoint that finds the body too large answers and closes before it has all of it."""
    raw_upstream.reads = False
    raw_upstream.script.append(
        b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    )
    status, _, body = ask(
        raw_upstream.server, {"messages": [{"role": "user", "content": "x" * 20_000_000}]}
    )
    assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")


def test_a_client_that_leaves_is_noticed_while_the_upstream_takes_nothing(serve, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = serve(
            base_url=f"http://127.0.0.1:{listener.getsockname()[1]}/v1", model="m", retries=0
        )
        body = json.dumps({"messages": [{"role": "user", "content": "x" * 20_000_000}]}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body) + body)
            upstream_end, _ = listener.accept()
            assert len(server.handlers) == 1
        with upstream_end:  # open, but not read from
            end = time.monotonic() + WAIT
            while server.handlers and time.monotonic() < end:
                time.sleep(0.01)
            assert not server.handlers


def test_blank_lines_before_the_first_event_are_not_kept():
    provider, chunks = qp.Provider("test", "http://127.0.0.1/v1", None, "test"), []
    decoder = qp.AnswerDecoder(qp.ChunkTranslator({}, qp.Target(provider, "m")))
    decoder.sink = lambda chunk: chunks.append(chunk.value)
    for blank in (b"\r\n", b"\n \n", b"\xef\xbb\xbf"):
        decoder.feed(blank)
        assert chunks == []
    decoder.feed(SSE)
    assert text_in(chunks) == "Hello, wörld"


@pytest.mark.parametrize(
    "header, status",
    [
        (b"Content-Length: %d, %d\r\n" % (len(SSE), len(SSE)), 200),
        (b"Content-Length: " + b"9" * 5000 + b"\r\n", 200),
        (b"Retry-After: Mon, 99999999999999999999 Jan 2030 00:00:00 GMT\r\n", 200),
    ],
)
def test_odd_headers_of_an_upstream_are_read(raw_upstream, header, status):
    raw_upstream.script.append(HEAD + header + b"\r\n" + SSE)
    assert chat(raw_upstream.server)[0] == status
    assert (
        qp.retry_after_of({"retry-after": header.decode().partition(": ")[2].strip()}) is None
        or b"Length" in header
    )


def test_a_failed_batch_of_embeddings_leaves_other_answers_alone():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        watch = qp.Waiter()
        theirs.sendall(b"x")
        watch.for_reading(ours)
        watch.release()  # its answer is whole, the connection may be somebody else's now
        watch.stop()
        theirs.sendall(b"y")
        assert ours.recv(2) == b"xy"


def test_the_password_of_a_forward_proxy_does_not_reach_the_upstream(upstream):
    """Behind a tunnel, kept or new, the request is the upstream's."""
    for _ in range(2):
        request = urllib.request.Request("https://h/v1/chat/completions", b"{}")
        request.add_unredirected_header("Proxy-authorization", "Basic c2VjcmV0")
        request.set_proxy("proxy:3128", "https")
        assert qp.KeepAliveHandler._tunnel_headers(request) == {
            "Proxy-Authorization": "Basic c2VjcmV0"
        }
        assert b"c2VjcmV0" not in qp.KeepAliveHandler._head_of(request)


# ----------------------------------------------------------------------------------------------------
# Event streams
# ----------------------------------------------------------------------------------------------------

TRICKY = (
    '\ufeff: comment\r\n\r\ndata:{"a":1}\r\n\r\nid:1\nevent:x\ndata: one\ndata: twö\u2028\n\n\n\rdata: c\r\rretry:5\n\ndata\n\n'
    ':HTTP_STATUS/429\nevent:error\ndata:{}\n\n{"bare":1}\n\ndata: last'
).encode()
TRICKY_EVENTS = [
    (b'{"a":1}', "", 0),
    ("one\ntwö\u2028".encode(), "x", 0),
    (b"c", "", 0),
    (b"", "", 0),
    (b"{}", "error", 429),
    (b'{"bare":1}', "", 0),
    (b"last", "", 0),
]


def events_of(pieces):
    decoder = qp.EventDecoder()
    return [tuple(event) for piece in pieces for event in decoder.feed(piece)] + [
        tuple(event) for event in decoder.close()
    ]


def test_events_are_the_same_however_the_bytes_are_cut():
    assert events_of([TRICKY]) == TRICKY_EVENTS
    for cut in range(len(TRICKY) + 1):
        assert events_of([TRICKY[:cut], TRICKY[cut:]]) == TRICKY_EVENTS
    assert events_of([TRICKY[at : at + 1] for at in range(len(TRICKY))]) == TRICKY_EVENTS


def test_large_event_arrives_in_one_piece():
    event = b"data: " + b"x" * 3_000_000 + b"\n\n"
    decoder, found = qp.EventDecoder(), []
    for at in range(0, len(event), 8192):
        found += decoder.feed(event[at : at + 8192])
    assert [len(event.data) for event in found] == [3_000_000]


# ----------------------------------------------------------------------------------------------------
# Requests
# ----------------------------------------------------------------------------------------------------


def to_upstream(request, model="qwen3-max", family="dashscope", config=None):
    provider = qp.Provider(
        "t", "http://h/v1", None, "t", {model: config or {}}, qp.FAMILIES[family]
    )
    request = {"messages": [{"role": "user", "content": "Hi"}], **request}
    before = json.dumps(request)
    body, fired = qp.Rewrite(request, qp.Target(provider, model)).run("chat")
    assert (
        json.dumps(request) == before
    )  # the client's request is not changed: failover needs it again
    return body, fired


EVERYTHING = {
    "model": "qwen3-vl-plus",
    "messages": [
        {"role": "system", "content": "Be brief. Grüße 你好 \u2028"},
        {
            "role": "user",
            "name": "u",
            "content": [
                {"type": "text", "text": "look"},
                {
                    "type": "image_url",
                    "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"},
                },
            ],
        },
        {
            "role": "assistant",
            "content": "",
            "reasoning_content": "hm",
            "tool_calls": [
                {
                    "id": "c1",
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"a": 1.50}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "c1", "content": "ok"},
    ],
    "temperature": 0,
    "top_p": 0.5,
    "top_k": 1,
    "max_tokens": 7,
    "n": 2,
    "seed": 0,
    "stop": ["a", "b"],
    "presence_penalty": 0,
    "frequency_penalty": -1.5,
    "logprobs": True,
    "top_logprobs": 0,
    "parallel_tool_calls": False,
    "tool_choice": "none",
    "tools": [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "",
                "parameters": {
                    "type": "object",
                    "properties": {
                        "a": {"type": ["number", "null"], "default": None, "enum": [None, 1.0]}
                    },
                },
            },
        }
    ],
    "response_format": {"type": "text"},
    "enable_search": False,
    "repetition_penalty": 1.05,
    "user": "me",
    "vl_high_resolution_images": True,
    "x_unknown": {"deep": [None, {"a": 1e-7}]},
    "zahl": 12345678901234567890,
    "stream": True,
    "stream_options": {"include_usage": True},
}


def test_everything_passes_unchanged(key_server, upstream):
    status, _, _ = ask(key_server, EVERYTHING)
    assert status == 200 and upstream.bodies()[0] == EVERYTHING
    assert "Grüße 你好".encode() in upstream.requests[0][2]


def test_everything_passes_unknown_endpoints_untouched():
    request = {**EVERYTHING, "store": True, "metadata": {"a": "b"}, "service_tier": "auto"}
    assert to_upstream(request, "any/model", "other")[0] == {**request, "model": "any/model"}


@pytest.mark.parametrize(
    "request_, changed, rule",
    [
        ({"max_completion_tokens": 5, "max_tokens": 9}, {"max_tokens": 5}, "max-tokens"),
        ({"max_tokens": 10**6}, {"max_tokens": 65536}, "max-tokens"),
        ({"max_completion_tokens": -1}, {}, "max-tokens"),
        ({"max_tokens": 500, "max_completion_tokens": -1}, {"max_tokens": 500}, "max-tokens"),
        ({"temperature": 2}, {"temperature": 1.99}, "sampling-range"),
        ({"temperature": None}, {}, "no-nulls"),
        (
            {"store": False, "metadata": {}, "service_tier": "auto", "logit_bias": {}},
            {},
            "openai-only",
        ),
        ({"min_p": 0.1, "keep_alive": "5m"}, {}, "foreign-fields"),
        (
            {"repeat_penalty": 2, "repetition_penalty": 1},
            {"repetition_penalty": 1},
            "foreign-fields",
        ),
        ({"tools": [], "tool_choice": "auto"}, {}, "tools"),
        (
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {"name": "f", "strict": True, "description": None},
                    }
                ]
            },
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "parameters": {"type": "object", "properties": {}},
                        },
                    }
                ]
            },
            "tools",
        ),
        ({"web_search_options": {}}, {"enable_search": True}, "web-search"),
        (
            {"functions": [{"name": "f", "parameters": {}}], "function_call": {"name": "f"}},
            {
                "tools": [
                    {
                        "type": "function",
                        "function": {
                            "name": "f",
                            "parameters": {"type": "object", "properties": {}},
                        },
                    }
                ],
                "tool_choice": {"type": "function", "function": {"name": "f"}},
            },
            "legacy-functions",
        ),
    ],
)
def test_rules_on_fields(request_, changed, rule):
    body, fired = to_upstream(request_)
    for name in ("model", "messages", "stream", "stream_options"):
        body.pop(name)
    assert body == changed and rule in fired


@pytest.mark.parametrize(
    "request_, model, family, changed",
    [
        (
            {"reasoning_effort": "low"},
            "qwen3.7-plus",
            "coding",
            {"enable_thinking": True, "thinking_budget": 4096},
        ),
        ({"reasoning": {"effort": "none"}}, "qwen3.7-plus", "coding", {"enable_thinking": False}),
        (
            {"thinking": {"type": "enabled", "budget_tokens": 99}},
            "qwen3.7-plus",
            "coding",
            {"enable_thinking": True, "thinking_budget": 99},
        ),
        (
            {"chat_template_kwargs": {"enable_thinking": False}},
            "qwen3.7-plus",
            "portal",
            {"enable_thinking": False},
        ),
        ({"reasoning_effort": "max"}, "qwen3.8-max", "dashscope", {"reasoning_effort": "xhigh"}),
        ({"reasoning_effort": "none"}, "qwen3.8-max", "token", {}),
        ({"reasoning_effort": "none"}, "qwen3.8-flash", "dashscope", {"reasoning_effort": "none"}),
        ({"reasoning_effort": "high"}, "qwen3-coder-plus", "coding", {}),
        (
            {"reasoning_effort": "high"},
            "qwen/qwen3.7-plus",
            "openrouter",
            {"reasoning": {"effort": "high"}},
        ),
        (
            {"reasoning_effort": "low"},
            "deepseek-v4-pro",
            "deepseek",
            {"thinking": {"type": "enabled"}, "reasoning_effort": "high"},
        ),
        ({"enable_thinking": True}, "unknown", "dashscope", {"enable_thinking": True}),
    ],
)
def test_thinking_in_every_spelling(request_, model, family, changed):
    body, _ = to_upstream(request_, model, family)
    assert {
        name: body[name] for name in qp.THINKING_FIELDS + ("chat_template_kwargs",) if name in body
    } == changed


TOOL = {
    "type": "function",
    "function": {"name": "f", "parameters": {"type": "object", "properties": {}}},
}


@pytest.mark.parametrize(
    "request_",
    [
        {"tools": [TOOL], "tool_choice": "required"},
        {"tools": [TOOL], "tool_choice": {"type": "function", "function": {"name": "f"}}},
        {"response_format": {"type": "json_object"}},
        {"response_format": {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}},
        {"tools": [TOOL], "tool_choice": "required", "enable_thinking": True},
        {"response_format": {"type": "json_object"}, "reasoning_effort": "high"},
        {
            "messages": [
                {"role": "developer", "content": "d"},
                {"role": "user", "content": "u"},
                {"role": "system", "content": "s"},
            ]
        },
        {
            "messages": [
                {"role": "user", "content": "u"},
                {
                    "role": "assistant",
                    "content": None,
                    "tool_calls": [
                        {
                            "id": "c1",
                            "type": "function",
                            "function": {"name": "f", "arguments": "{cut"},
                        }
                    ],
                },
                {"role": "user", "content": "again"},
            ]
        },
        {
            "messages": [
                {"role": "tool", "tool_call_id": "x", "content": "orphan"},
                {"role": "user", "content": "u"},
            ]
        },
        {
            "messages": [
                {
                    "role": "assistant",
                    "tool_calls": [
                        {"id": "c1", "type": "function", "function": {"name": "f", "arguments": ""}}
                    ],
                },
                {"role": "user", "content": "between"},
                {"role": "tool", "tool_call_id": "c1", "content": "late"},
            ]
        },
        {"functions": [{"name": "f"}], "function_call": "auto"},
        {"max_tokens": 200000, "temperature": 2.0},
        {"store": True, "metadata": {"a": "b"}, "tools": []},
    ],
)
@pytest.mark.parametrize("kind", ["portal", "dashscope"])
def test_normal_openai_requests_pass_the_strict_fake(
    login, upstream, serve, monkeypatch, request_, kind
):
    if kind == "dashscope":
        monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    server = serve(
        model="qwen3.7-plus", base_url=upstream.dashscope if kind == "dashscope" else None
    )
    status, _, body = chat(server, **request_)
    assert status == 200, body


def test_explicit_wish_for_thinking_wins_over_forced_tool():
    body, fired = to_upstream(
        {
            "tools": [TOOL, {"type": "function", "function": {"name": "g"}}],
            "enable_thinking": True,
            "tool_choice": {"type": "function", "function": {"name": "f"}},
        },
        "qwen3.7-plus",
    )
    assert (body["tool_choice"], body["enable_thinking"], body["tools"]) == ("auto", True, [TOOL])
    assert "forced-tool" in fired and "f" in body["messages"][0]["content"]


def test_system_messages_are_one_with_all_their_text():
    body, _ = to_upstream(
        {
            "messages": [
                {"role": "developer", "content": "a"},
                {"role": "user", "content": "u"},
                {"role": "system", "content": "b"},
            ]
        }
    )
    assert body["messages"] == [
        {"role": "system", "content": "a\n\nb"},
        {"role": "user", "content": "u"},
    ]


def test_portal_gets_one_marked_system_message_and_images_stay():
    body, _ = to_upstream({"messages": EVERYTHING["messages"]}, "coder-model", "portal")
    assert body["messages"][0]["content"] == [
        {
            "type": "text",
            "text": "Be brief. Grüße 你好 \u2028",
            "cache_control": {"type": "ephemeral"},
        }
    ]
    assert body["messages"][1] == EVERYTHING["messages"][1]


def test_settings_entry_gives_defaults_that_the_client_overrides():
    config = {
        "samplingParams": {"temperature": 0.1, "top_p": 0.2},
        "extra_body": {"top_p": 0.3, "enable_thinking": True},
    }
    body, _ = to_upstream(
        {"temperature": 0, "reasoning_effort": "none"}, "qwen3.7-plus", config=config
    )
    assert (body["temperature"], body["top_p"], body["enable_thinking"]) == (0, 0.3, False)


def test_custom_headers_of_the_entry_win(home, upstream, serve, monkeypatch):
    entry = {
        "id": "qwen3-max",
        "baseUrl": upstream.dashscope,
        "envKey": "K",
        "generationConfig": {
            "customHeaders": {
                "X-Team": "blue",
                "User-Agent": "mine",
                "Bad\nName": "x",
                "X-Bad": "a\r\nb",
            }
        },
    }
    (home / "settings.json").write_text(
        json.dumps({"modelProviders": {"openai": [entry]}, "env": {"K": "sk-good-1"}})
    )
    assert chat(serve())[0] == 200
    headers = upstream.requests[0][1]
    assert (headers["X-Team"], headers["User-Agent"], headers["X-Bad"]) == ("blue", "mine", None)


def test_user_agent_is_the_clients_and_ours(key_server, upstream):
    ask(
        key_server,
        {"messages": [{"role": "user", "content": "x"}]},
        headers={"User-Agent": "OpenAI/JS 6"},
    )
    assert upstream.requests[0][1]["User-Agent"] == "OpenAI/JS 6 qwen_proxy/" + qp.__version__


TWO_TOOLS = [
    {
        "type": "function",
        "function": {"name": name, "parameters": {"type": "object", "properties": {}}},
    }
    for name in "fg"
]


def call(call_id, name="f"):
    return {
        "role": "assistant",
        "content": "",
        "tool_calls": [
            {"id": call_id, "type": "function", "function": {"name": name, "arguments": "{}"}}
        ],
    }


def result(call_id, content):
    return {"role": "tool", "tool_call_id": call_id, "content": content}


@pytest.mark.parametrize(
    "request_, sent",
    [
        (
            {"tool_choice": "required", "tools": TWO_TOOLS},
            {"tool_choice": "required", "enable_thinking": False},
        ),
        (
            {"tool_choice": "required", "tools": TWO_TOOLS, "enable_thinking": True},
            {"tool_choice": "auto", "enable_thinking": True},
        ),
        (
            {"response_format": {"type": "json_object"}},
            {"response_format": {"type": "json_object"}, "enable_thinking": False},
        ),
    ],
)
def test_thinking_of_the_settings_entry_is_a_default_and_gives_way(request_, sent):
    body, _ = to_upstream(
        request_, "qwen3.7-plus", "coding", {"extra_body": {"enable_thinking": True}}
    )
    assert {name: body.get(name) for name in sent} == sent


@pytest.mark.parametrize(
    "config, request_, sent",
    [
        ({"samplingParams": {"temperature": 0.5}}, {"temperature": None}, {"temperature": 0.5}),
        (
            {"extra_body": {"enable_thinking": True}},
            {"reasoning_effort": None},
            {"enable_thinking": True},
        ),
        (
            {"samplingParams": {"max_tokens": 1000}},
            {"max_completion_tokens": 8000},
            {"max_tokens": 8000},
        ),
        (
            {"extra_body": {"enable_thinking": True}},
            {"chat_template_kwargs": {"enable_thinking": False}},
            {"enable_thinking": False},
        ),
        (
            {"reasoning": False},
            {"chat_template_kwargs": {"enable_thinking": True}},
            {"enable_thinking": True},
        ),
    ],
)
def test_defaults_of_the_entry_stand_only_where_the_client_says_nothing(config, request_, sent):
    body, _ = to_upstream(request_, "qwen3.7-plus", "dashscope", config)
    assert {name: body.get(name) for name in sent} == sent


@pytest.mark.parametrize(
    "messages, contents",
    [
        (
            [call("c"), *HI, call("c", "g"), result("c", "of g")],
            ["(no result: the call was interrupted)", "of g"],
        ),
        ([call("c"), result("c", "one"), call("c", "g"), result("c", "two")], ["one", "two"]),
        ([result("c", "early"), call("c")], ["early"]),
        ([call("c"), *HI, result("c", "late")], ["late"]),
    ],
)
def test_an_answer_belongs_to_the_nearest_call_of_its_id(messages, contents):
    body, _ = to_upstream({"messages": [*HI, *messages]})
    assert [
        message["content"] for message in body["messages"] if message["role"] == "tool"
    ] == contents


def two_calls(*ids):
    return {**call(ids[0]), "tool_calls": [call(call_id)["tool_calls"][0] for call_id in ids]}


@pytest.mark.parametrize(
    "messages, order",
    [
        (
            [
                two_calls("a", "b"),
                result("a", "1"),
                {"role": "assistant", "content": "."},
                result("b", "2"),
            ],
            [".", "", "1", "2"],
        ),
        (
            [call("a"), result("a", "1"), {"role": "assistant", "content": "."}, result("a", "1")],
            ["", "1", "."],
        ),
        ([call("a"), {"role": "assistant", "content": "."}, result("a", "1")], [".", "", "1"]),
        ([call("a"), result("a", "1"), {"role": "assistant", "content": "."}], ["", "1", "."]),
        ([{"role": "assistant", "content": "."}, result("orphan", "2")], ["."]),
        (
            [
                two_calls("a", "b"),
                result("a", "1"),
                {"role": "assistant", "content": "."},
                result("b", "2"),
                {"role": "user", "content": "and?"},
            ],
            [".", "", "1", "2", "and?"],
        ),
        (
            [
                call("a"),
                {"role": "user", "content": "wait"},
                {"role": "assistant", "content": "."},
                result("a", "1"),
            ],
            ["", "1", "wait", "."],
        ),
    ],
)
def test_what_the_assistant_says_between_results_goes_before_the_calls(messages, order):
    body, _ = to_upstream({"messages": [*HI, *messages]})
    assert [message["content"] for message in body["messages"][1:]] == order


def test_calls_results_and_tools_in_anthropics_shapes_are_understood(key_server, upstream):
    text = {"type": "text", "text": "I look."}
    tool_use = {"type": "tool_use", "id": "tu_1", "name": "f", "input": {"city": "Köln"}}
    tool_result = {
        "type": "tool_result",
        "tool_use_id": "tu_1",
        "content": [{"type": "text", "text": "sunny"}],
    }
    status, _, _ = chat(
        key_server,
        tools=[
            {"name": "f", "description": "d", "input_schema": {"type": "object", "properties": {}}}
        ],
        tool_choice={"type": "any"},
        messages=[
            *HI,
            {"role": "assistant", "content": [text, tool_use]},
            {"role": "user", "content": [tool_result, {"type": "text", "text": "And?"}]},
        ],
    )
    body = upstream.bodies()[0]
    assert status == 200 and body["tool_choice"] == "required"
    assert body["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "f",
                "description": "d",
                "parameters": {"type": "object", "properties": {}},
            },
        }
    ]
    assert body["messages"][1:] == [
        {
            "role": "assistant",
            "content": "I look.",
            "tool_calls": [
                {
                    "id": "tu_1",
                    "type": "function",
                    "function": {"name": "f", "arguments": '{"city": "Köln"}'},
                }
            ],
        },
        {"role": "tool", "tool_call_id": "tu_1", "content": [{"type": "text", "text": "sunny"}]},
        {"role": "user", "content": [{"type": "text", "text": "And?"}]},
    ]


@pytest.mark.parametrize(
    "odd", [{"messages": 5}, {"messages": "hi"}, {"messages": [1]}, {"messages": [{"name": None}]}]
)
def test_odd_messages_beside_a_prompt_are_no_500(key_server, odd):
    assert ask(key_server, {"prompt": "x", **odd}, path="/v1/completions")[0] == 200


def test_a_text_completion_is_not_repaired_in_words(key_server, upstream):
    upstream.script.append(
        refusal("Json mode response is not supported when enable_thinking is true")
    )
    assert (
        ask(
            key_server,
            {"prompt": "x", "enable_thinking": True, **JSON_PLEASE},
            path="/v1/completions",
        )[0]
        == 400
    )


def test_results_without_ids_belong_to_the_turn_before_them():
    calls = [
        {
            "role": "assistant",
            "content": "",
            "tool_calls": [{"type": "function", "function": {"name": name, "arguments": "{}"}}],
        }
        for name in "fg"
    ]
    body, _ = to_upstream(
        {"messages": [*HI, calls[0], *HI, calls[1], {"role": "tool", "content": "of g"}, *HI]}
    )
    assert [message["content"] for message in body["messages"] if message["role"] == "tool"] == [
        "(no result: the call was interrupted)",
        "of g",
    ]


def test_calls_and_results_without_ids_find_each_other():
    calls = [{"type": "function", "function": {"name": name, "arguments": "{}"}} for name in "fg"]
    body, _ = to_upstream(
        {
            "messages": [
                *HI,
                {"role": "assistant", "content": "", "tool_calls": calls},
                {"role": "tool", "content": "of f"},
                {"role": "tool", "tool_call_id": None, "content": "of g"},
            ]
        }
    )
    messages = body["messages"][1:]
    assert [message["content"] for message in messages] == ["", "of f", "of g"]
    assert [call["id"] for call in messages[0]["tool_calls"]] == [
        message["tool_call_id"] for message in messages[1:]
    ]
    assert len({call["id"] for call in messages[0]["tool_calls"]}) == 2


@pytest.mark.parametrize("model, is_kept", [("qwen3-coder-plus", False), ("qwen3.7-plus", True)])
def test_thoughts_go_back_only_to_models_that_think(model, is_kept):
    body, _ = to_upstream(
        {"messages": [*HI, {"role": "assistant", "content": "a", "reasoning": "hm"}, *HI]}, model
    )
    assert body["messages"][1] == {
        "role": "assistant",
        "content": "a",
        **({"reasoning_content": "hm"} if is_kept else {}),
    }


def test_nulls_that_mean_not_set_are_left_out_and_those_that_are_values_stay():
    schema = {
        "type": "object",
        "title": None,
        "properties": {
            "a": {"type": "string", "description": None, "default": None, "enum": [None, "x"]}
        },
    }
    body, _ = to_upstream(
        {
            "messages": [
                {"role": "user", "content": "Hi", "name": None},
                {"role": "assistant", "content": None, "function_call": None},
                *HI,
            ],
            "tools": [
                {
                    "type": "function",
                    "strict": None,
                    "function": {"name": "f", "parameters": schema},
                }
            ],
            "response_format": {
                "type": "json_schema",
                "json_schema": {"name": "json", "strict": None, "schema": {"default": None}},
            },
        }
    )
    assert body["messages"][1:3] == [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": ""},
    ]  # behind 'Answer in JSON.'
    assert body["tools"] == [
        {
            "type": "function",
            "function": {
                "name": "f",
                "parameters": {
                    "type": "object",
                    "properties": {"a": {"type": "string", "default": None, "enum": [None, "x"]}},
                },
            },
        }
    ]
    assert body["response_format"]["json_schema"] == {"name": "json", "schema": {"default": None}}


def test_the_marker_that_the_portal_wants_is_never_the_surplus_one():
    marker = {"cache_control": {"type": "ephemeral"}}
    body, _ = to_upstream(
        {
            "tools": [{**TWO_TOOLS[0], **marker}],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": str(number), **marker} for number in range(5)
                    ],
                }
            ],
        },
        "coder-model",
        "portal",
    )
    assert (
        "cache_control" in body["messages"][0]["content"][0]
        and json.dumps(body).count("cache_control") == 4
    )


def test_nothing_but_orphans_is_refused_by_name(key_server, upstream):
    status, _, body = ask(
        key_server, {"messages": [result("c", "x")], "response_format": {"type": "json_object"}}
    )
    assert status == 400 and b"only tool results" in body and upstream.requests == []


@pytest.mark.parametrize(
    "model, sent",
    [
        ("qwen3-235b-a22b-thinking-2507", None),
        ("qwen3-vl-32b-thinking", None),
        ("qwen3-32b", False),
    ],
)
def test_models_that_only_think_are_not_told_to_stop(model, sent):
    body, _ = to_upstream({"response_format": {"type": "json_object"}}, model)
    assert body.get("enable_thinking") is sent and ("response_format" in body) == (sent is False)


@pytest.mark.parametrize(
    "role, model, family, more, is_flat",
    [
        ("assistant", "qwen3-max", "dashscope", {}, True),
        ("assistant", "coder-model", "portal", {}, True),
        ("assistant", "qwen3-max", "dashscope", {"cache_control": {"type": "ephemeral"}}, False),
        ("assistant", "x/y", "openrouter", {}, False),
        ("user", "qwen3-max", "dashscope", {}, False),
        ("user", "deepseek-v4-pro", "deepseek", {}, True),
        ("user", "glm-5.1", "dashscope", {}, True),
    ],
)
def test_text_parts_become_one_string_where_parts_are_lost_or_refused(
    role, model, family, more, is_flat
):
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": "b", **more}]
    body, fired = to_upstream(
        {"messages": [*HI, {"role": role, "content": parts}, *HI]}, model, family
    )
    found = [message["content"] for message in body["messages"] if message["role"] == role][
        -2 if role == "user" else 0
    ]
    assert found == ("a\nb" if is_flat else parts) and ("flat-content" in fired) == is_flat


def test_small_print_of_the_requests():
    marker = {"cache_control": {"type": "ephemeral"}}
    parts = [{"type": "text", "text": name} for name in "ab"]
    body, _ = to_upstream(
        {"messages": [{"role": "system", "content": parts}, *HI]}, "coder-model", "portal"
    )
    assert ["cache_control" in part for part in body["messages"][0]["content"]] == [True, False]
    body, _ = to_upstream(
        {
            "tools": [{**TWO_TOOLS[0], **marker}],
            "messages": [
                {
                    "role": "user",
                    "content": [
                        {"type": "text", "text": str(number), **marker} for number in range(4)
                    ],
                }
            ],
        }
    )
    assert json.dumps(body).count("cache_control") == 4
    body, _ = to_upstream({"reasoning": {"effort": "high", "exclude": True}}, "x/y", "openrouter")
    assert body["reasoning"] == {"effort": "high", "exclude": True}
    body, _ = to_upstream(
        {
            "messages": [{"role": "user", "content": [{"type": "text", "text": "x", **marker}]}],
            "tools": TWO_TOOLS,
        },
        "glm-5",
    )
    assert body["messages"][0]["content"][0]["cache_control"]
    search = qp.ResponseRequest(
        {"input": "Hi", "tools": [{"type": "web_search"}]}, qp.ItemMemory()
    ).chat
    assert "web_search_options" not in to_upstream(search, "x/y", "openrouter")[0]
    assert (
        "web_search_options"
        not in qp.ResponseRequest(
            {"input": "Hi", "tools": [{"type": "web_search"}], "tool_choice": "none"},
            qp.ItemMemory(),
        ).chat
    )
    assert json.loads(qp.encode_json({"a": "\ud83d", "b": "ü"})) == {"a": "\ufffd", "b": "ü"}


# ----------------------------------------------------------------------------------------------------
# Responses
# ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "refusal_, status, code",
    [
        (
            (402, '{"error":{"message":"Insufficient credits","code":402}}'),
            429,
            "insufficient_quota",
        ),
        (
            (
                0,
                "<400> InternalError.Algo.InvalidParameter: Range of input length should be [1, 983616]",
            ),
            400,
            "context_length_exceeded",
        ),
        ((400, '{"error":{"code":"1302","message":"busy"}}'), 429, "rate_limit_exceeded"),
        (
            (0, '{"error":{"code":"ModelServingError","message":"Too many requests"}}'),
            503,
            "ModelServingError",
        ),
        (
            (0, '{"error":{"code":"Model.AccessDenied","message":"no access"}}'),
            403,
            "Model.AccessDenied",
        ),
        ((502, "<html><title>busy</title></html>"), 503, "html"),
    ],
)
def test_refusals_that_a_review_found_misread(refusal_, status, code):
    error = qp.to_upstream_error(qp.Refusal.read(*refusal_), qp.FAMILIES["openrouter"])
    assert (error.status, error.code) == (status, code)


def one_call(arguments, finish_reason, name="f"):
    return [HELLO[0], chunk(tool_call(0, "c1", name, arguments)), chunk({}, finish_reason), DONE]


@pytest.mark.parametrize(
    "events, finish_reason, calls",
    [
        (one_call("", "length"), "length", ["{}"]),
        (one_call("{}", "length"), "tool_calls", ["{}"]),
        (one_call('{"a": "b', "tool_calls"), "length", ['{"a": "b']),
        (one_call('{"a": "b', "stop"), "length", ['{"a": "b']),
        (one_call("{}", "tool_calls", None), "stop", []),
        (one_call("", "stop"), "tool_calls", ["{}"]),
        (
            [
                HELLO[0],
                chunk(tool_call(0, "c1", "f", '{"a":1}')),
                chunk(tool_call(0, "c1", "f", "\n")),
                *END,
            ],
            "tool_calls",
            ['{"a":1}\n'],
        ),
        (
            [
                HELLO[0],
                chunk({"tool_calls": [{"id": "c1", "function": {"name": "f"}}]}),
                chunk({"tool_calls": [{"index": 0, "function": {"arguments": '{"a":1}'}}]}),
                *END,
            ],
            "tool_calls",
            ['{"a":1}'],
        ),
        (
            [
                HELLO[0],
                chunk(tool_call(0, "c1", "f", "{}"), "tool_calls"),
                chunk(tool_call(1, "c2", "g", "{}"), "tool_calls"),
                DONE,
            ],
            "tool_calls",
            ["{}", "{}"],
        ),
    ],
)
def test_calls_that_a_review_found_wrong(events, finish_reason, calls):
    choice = collect(translate([b"".join(events)]))["choices"][0]
    assert choice["finish_reason"] == finish_reason
    assert [
        each["function"]["arguments"] for each in choice["message"].get("tool_calls", [])
    ] == calls


def test_text_that_is_held_comes_before_the_call():
    chunks = translate([b"".join([HELLO[0], chunk({"content": "\n\n"}), *CALLS[1:]])])
    kinds = [
        name
        for value in chunks
        for choice in value["choices"]
        for name in ("content", "tool_calls")
        if choice["delta"].get(name)
    ]
    assert kinds[0] == "content" and "content" not in kinds[1:]


@pytest.mark.parametrize(
    "events, text",
    [
        ([*HELLO[:5], b'data: {"choices":[],"usa'], "Hello, wörld"),
        ([event.replace(b"data: ", b"data:  ") for event in HELLO], "Hello, wörld"),
        (
            [HELLO[0], chunk({"content": "Hel"}, "stop"), chunk({"content": "lo"}, "stop"), DONE],
            "Hello",
        ),
    ],
)
def test_answers_that_a_review_found_lost(events, text):
    chunks = translate([b"".join(events)])
    assert text_in(chunks) == text
    assert [choice["finish_reason"] for value in chunks for choice in value["choices"]][
        -1
    ] == "stop"
    assert (
        sum(choice["finish_reason"] is not None for value in chunks for choice in value["choices"])
        == 1
    )


@pytest.mark.parametrize(
    "answer",
    [
        {
            "data": [{"index": None, "embedding": [1e300]}],
            "usage": {"prompt_tokens": "x", "total_tokens": []},
        },
        {"data": [{"embedding": [1.0]}], "usage": {"total_tokens": 3}},
        {"data": [{"index": 0, "embedding": ["x"]}]},
    ],
)
def test_odd_embeddings_are_no_500(key_server, upstream, answer):
    answers = []
    out = argparse.Namespace(send_json=lambda status, value: answers.append(value))
    for is_base64 in (False, True):
        decoder = qp.EmbeddingsDecoder(1, qp.FAMILIES["dashscope"], qp.Budget())
        writer = qp.EmbeddingsWriter(out, "m", is_base64)
        decoder.sink = writer.part(0)
        try:
            decoder.feed(json.dumps(answer).encode())
            decoder.close()
            writer.close(None)
            assert answers.pop()["usage"]["prompt_tokens"] == 0
        except qp.UpstreamError as error:
            assert "no list of numbers" in str(error)


def test_clean_stream_has_the_canonical_shape():
    chunks = translate([b"".join(HELLO)])
    assert [value["choices"][0]["delta"] for value in chunks[:-1]] == [
        {"role": "assistant", "content": ""},
        {"content": "Hel"},
        {"content": "lo, "},
        {"content": "wörld"},
        {},
    ]
    assert chunks[-2]["choices"][0]["finish_reason"] == "stop"
    assert (chunks[-1]["choices"], chunks[-1]["usage"]) == ([], USAGE)
    assert {
        (value["id"], value["created"], value["model"], value["object"]) for value in chunks
    } == {("chatcmpl-1", 1790000000, "qwen3.7-plus", "chat.completion.chunk")}


def test_unchanged_chunks_go_out_as_the_bytes_that_came(key_server, upstream):
    odd = b'{"model":"qwen3-max", "id":"i","object":"chat.completion.chunk","created":1,"x":0.10,"choices":[{"index":0,"delta":{"content":"%s"},"finish_reason":null}]}'
    pieces = [b"data: %s\n\n" % (odd % word) for word in (b"one", b"two", b"\\u0074hree")]
    upstream.script.append(
        stream(
            pieces[0].replace(b'{"content"', b'{"role":"assistant","content"'),
            *pieces[1:],
            chunk({}, "stop", id="i", created=1),
            DONE,
        )
    )
    _, _, data = chat(key_server, stream=True)
    assert data[2] == (odd % b"\\u0074hree").decode()


TOOL_DELTAS = {
    "as documented": CALLS,
    "no index, id repeated": [
        chunk(
            {
                "role": "assistant",
                "tool_calls": [{"id": i, "function": {"name": n, "arguments": a}}],
            }
        )
        for i, n, a in (
            ("call_a", "get_weather", '{"city"'),
            ("call_a", "get_weather", ': "Paris"}'),
            ("call_b", "get_time", "{}"),
        )
    ]
    + [chunk({}, "tool_calls"), DONE],
    "one index for two calls": [
        chunk(tool_call(0, "call_a", "get_weather", '{"city": "Paris"}')),
        chunk(tool_call(0, "call_b", "get_time", "{}")),
        chunk({}, "stop"),
        DONE,
    ],
    "index from 1": [
        chunk(tool_call(1, "call_a", "get_weather", '{"city": "Paris"}')),
        chunk(tool_call(2, "call_b", "get_time", "")),
        chunk({}, "stop"),
        DONE,
    ],
    "two in one chunk": [
        chunk(
            {
                "tool_calls": tool_call(0, "call_a", "get_weather", '{"city": "Paris"}')[
                    "tool_calls"
                ]
                + tool_call(1, "call_b", "get_time", "{}")["tool_calls"]
            }
        ),
        chunk({}, "stop"),
        DONE,
    ],
    "same index in one chunk": [
        chunk(
            {
                "tool_calls": tool_call(0, "call_a", "get_weather", '{"city": "Paris"}')[
                    "tool_calls"
                ]
                + tool_call(0, "call_b", "get_time", "{}")["tool_calls"]
            }
        ),
        chunk({}, "stop"),
        DONE,
    ],
    "arguments before the name": [
        chunk(tool_call(0, "call_a", None, '{"city"')),
        chunk(tool_call(0, "", "get_weather", ': "Paris"}')),
        chunk(tool_call(1, "call_b", "get_time", None)),
        chunk({}, "stop"),
        DONE,
    ],
    "arguments as an object": [
        chunk(tool_call(0, "call_a", "get_weather", {"city": "Paris"})),
        chunk(tool_call(1, "call_b", "get_time", {})),
        chunk({}, "stop"),
        DONE,
    ],
    "the whole call replayed": [chunk(tool_call(0, "call_a", "get_weather", '{"city": "Paris"}'))]
    * 2
    + [chunk(tool_call(1, "call_b", "get_time", "{}")), chunk({}, "stop"), DONE],
    "a name that comes late": [
        chunk(tool_call(5, "call_x", None, "")),
        chunk(tool_call(0, "call_a", "get_weather", '{"city": "Paris"}')),
        chunk(tool_call(1, "call_b", "get_time", "{}")),
        chunk({}, "stop"),
        DONE,
    ],
    "in the finish chunk": [
        chunk(
            {
                "tool_calls": tool_call(0, "call_a", "get_weather", '{"city": "Paris"}')[
                    "tool_calls"
                ]
                + tool_call(1, "call_b", "get_time", "{}")["tool_calls"]
            },
            "stop",
        ),
        DONE,
    ],
    "the whole call replayed in other blanks": [
        chunk(tool_call(0, "call_a", "get_weather", blanks))
        for blanks in ('{"city": "Paris"}', '{"city":"Paris"}')
    ]
    + [chunk(tool_call(1, "call_b", "get_time", "{}")), chunk({}, "stop"), DONE],
    "truncated by length, but whole": [
        chunk(tool_call(0, "call_a", "get_weather", '{"city": "Paris"}')),
        chunk(tool_call(1, "call_b", "get_time", "{}")),
        chunk({}, "length"),
        DONE,
    ],
}


@pytest.mark.parametrize("name", sorted(TOOL_DELTAS))
def test_tool_calls_are_rebuilt(name):
    chunks = translate([b"".join(TOOL_DELTAS[name])])
    deltas = [
        choice["delta"]["tool_calls"]
        for value in chunks
        for choice in value["choices"]
        if "tool_calls" in choice["delta"]
    ]
    assert all(len(entries) == 1 for entries in deltas)
    firsts = [entries[0] for entries in deltas if "id" in entries[0]]
    assert [
        (entry["index"], entry["id"], entry["type"], entry["function"]["name"]) for entry in firsts
    ] == [(0, "call_a", "function", "get_weather"), (1, "call_b", "function", "get_time")]
    assert all(
        set(entries[0]) == {"index", "function"} and set(entries[0]["function"]) == {"arguments"}
        for entries in deltas
        if "id" not in entries[0]
    )
    choice = collect(chunks)["choices"][0]
    assert [
        json.loads(call["function"]["arguments"]) for call in choice["message"]["tool_calls"]
    ] == [{"city": "Paris"}, {}]
    assert choice["finish_reason"] == "tool_calls"


def test_missing_and_duplicate_ids_become_unique():
    chunks = translate(
        [
            chunk(tool_call(0, None, "f", "{}")),
            chunk(tool_call(1, "same", "g", "{}")),
            chunk(tool_call(2, "same", "h", "{}")),
            chunk({}, "stop"),
            DONE,
        ]
    )
    ids = [call["id"] for call in collect(chunks)["choices"][0]["message"]["tool_calls"]]
    assert len(set(ids)) == 3 and all(ids)


def test_legacy_functions_come_back_as_function_call():
    completion = collect(
        translate(
            [chunk(tool_call(0, "a", "f", "{}")), chunk({}, "stop"), DONE],
            {"functions": [{"name": "f"}]},
        )
    )
    assert completion["choices"][0]["message"]["function_call"] == {"name": "f", "arguments": "{}"}
    assert completion["choices"][0]["finish_reason"] == "function_call"


def test_thinking_comes_first_and_never_beside_text():
    chunks = translate(
        [
            chunk({"role": "assistant", "content": None, "reasoning_content": "a"}),
            chunk({"reasoning": "b", "content": ""}),
            chunk({"reasoning_content": "c", "content": "d"}),
            chunk({"content": "e"}, "stop"),
            DONE,
        ]
    )
    assert (text_in(chunks, "reasoning_content"), text_in(chunks)) == ("abc", "de")
    assert all(
        not {"content", "reasoning_content"} <= set(choice["delta"])
        for value in chunks
        for choice in value["choices"]
    )
    message = collect(chunks)["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("abc", "de")


def deltas_of(*texts):
    return [chunk({"content": text}) for text in texts] + [chunk({}, "stop"), DONE]


def event(value, **more):
    """An event of exactly this JSON: nothing of chunk()'s good manners."""
    return b"data: " + json.dumps({**value, **more}, ensure_ascii=False).encode() + b"\n\n"


def bare(delta, finish_reason=None, **more):
    return event(
        {
            "id": "x",
            "object": "chat.completion.chunk",
            "created": 1,
            "model": "m",
            "choices": [{"index": 0, "delta": delta, "finish_reason": finish_reason}],
            **more,
        }
    )


def without(data, *names):
    """The event without some of its names, of the chunk and of its choice."""
    value = json.loads(data[len(b"data: ") :])
    for part in (value, value["choices"][0]):
        for name in names:
            part.pop(name, None)
    return event(value)


def whole(message=None, finish_reason="stop", **more):
    """A completion that was not streamed."""
    value = {
        "id": "x",
        "object": "chat.completion",
        "created": 1,
        "model": "m",
        "usage": USAGE,
        "choices": [
            {
                "index": 0,
                "message": message or {"role": "assistant", "content": "Hello, wörld"},
                "finish_reason": finish_reason,
            }
        ],
    }
    value.update(more)
    return [
        json.dumps(
            {name: item for name, item in value.items() if item != "absent"}, ensure_ascii=False
        ).encode()
    ]


TEXT_PIECES = ["Hel", "lo, ", "wörld"]
DELTAS = [chunk({"content": text}) for text in TEXT_PIECES]
ROLE = chunk({"role": "assistant", "content": ""})
NATIVE = b'id:1\nevent:error\n:HTTP_STATUS/429\ndata:{"request_id":"r-1","code":"Throttling.AllocationQuota","message":"%s"}\n\n'
MINUTE, FREE = (
    b"Allocated quota exceeded, please increase your quota limit.",
    b"Free allocated quota exceeded.",
)
ERROR_FINISH = {"content": (NATIVE % FREE).decode().strip()}
CALL = tool_call(0, "call_a", "get_weather", '{"city": "Paris"}')

# What upstreams send instead of a clean answer, and what must come of it: by default the text and usage of HELLO.
# Sources: Model Studio's streaming pages, qwen-code and hermes-agent issues; each has been seen somewhere.
DIRTY = {
    # ordinary answers in DashScope's ways
    "plain": (HELLO, {}),
    "thoughts with content null": (
        [chunk({"role": "assistant", "content": None, "reasoning_content": "Hm"}), *DELTAS, *END],
        {"reasoning": "Hm"},
    ),
    "thoughts with content empty": (
        [chunk({"role": "assistant", "content": "", "reasoning_content": "Hm"}), *DELTAS, *END],
        {"reasoning": "Hm"},
    ),
    "thoughts called reasoning": (
        [chunk({"role": "assistant", "reasoning": "Hm"}), *DELTAS, *END],
        {"reasoning": "Hm"},
    ),
    "thoughts and text in one delta": (
        [chunk({"reasoning_content": "Hm", "content": "Hel"}), *DELTAS[1:], *END],
        {"reasoning": "Hm"},
    ),
    "model of another name": (
        [event(json.loads(data[6:]), model="glm-4.7") if data != DONE else data for data in HELLO],
        {},
    ),
    "usage before the finish": ([*DELTAS, chunk(usage=USAGE), chunk({}, "stop"), DONE], {}),
    "usage on the finish chunk": ([*DELTAS, chunk({}, "stop", usage=USAGE), DONE], {}),
    "usage on every chunk": (
        [chunk({"content": text}, usage={**USAGE, "completion_tokens": 1}) for text in TEXT_PIECES]
        + [chunk({}, "stop", usage=USAGE), chunk(usage=USAGE), DONE],
        {},
    ),
    "usage in floats, a part missing": (
        [
            *DELTAS,
            chunk({}, "stop"),
            chunk(usage={"prompt_tokens": 9.0, "completion_tokens": 3.0}),
            DONE,
        ],
        {},
    ),
    "usage empty": ([*DELTAS, chunk({}, "stop", usage={}), DONE], {"usage": None}),
    "cached tokens at the top": (
        [*DELTAS, chunk({}, "stop"), chunk(usage={**USAGE, "cached_tokens": 4}), DONE],
        {"usage": {**USAGE, "cached_tokens": 4, "prompt_tokens_details": {"cached_tokens": 4}}},
    ),
    "finish reason as the word null": (
        [chunk({"content": text}, "null") for text in TEXT_PIECES] + END,
        {},
    ),
    "finish reason empty": ([chunk({"content": text}, "") for text in TEXT_PIECES] + END, {}),
    "several finish chunks": (
        [*DELTAS, chunk({}, "stop"), chunk({"content": ""}, "stop"), chunk(usage=USAGE), DONE],
        {},
    ),
    "text in the finish chunk": (
        [*DELTAS[:2], chunk({"content": "wörld"}, "stop"), chunk(usage=USAGE), DONE],
        {},
    ),
    "length": (
        [*DELTAS, chunk({}, "length"), chunk(usage=USAGE), DONE],
        {"finish_reason": "length"},
    ),
    "content filter": (
        [*DELTAS, chunk({}, "content_filter"), chunk(usage=USAGE), DONE],
        {"finish_reason": "content_filter"},
    ),
    # content
    "cumulative text": (
        [
            chunk({"content": "The quick brown fox jumps over the lazy dog"[:end]})
            for end in (9, 15, 25, 34, 43)
        ]
        + END,
        {"content": "The quick brown fox jumps over the lazy dog"},
    ),
    "cumulative thoughts": (
        [
            chunk({"reasoning_content": "Let me think about the question"[:end]})
            for end in (8, 15, 25, 31)
        ]
        + DELTAS
        + END,
        {"reasoning": "Let me think about the question"},
    ),
    "a think tag": (
        deltas_of("<think>", "Hm", "</think>", *TEXT_PIECES)[:-2] + END,
        {"reasoning": "Hm"},
    ),
    "a thinking tag, cut": (
        deltas_of("<thin", "king>H", "m</think", "ing>\n\n", *TEXT_PIECES)[:-2] + END,
        {"reasoning": "Hm"},
    ),
    "a lone closing tag": (deltas_of("</think>\n\n", *TEXT_PIECES)[:-2] + END, {}),
    "content null throughout": (
        [
            chunk({"role": "assistant", "content": None}),
            chunk({"content": None}, "stop"),
            chunk(usage=USAGE),
            DONE,
        ],
        {"content": ""},
    ),
    "content as parts": (
        [chunk({"content": [{"type": "text", "text": "Hello, wörld"}]}), *END],
        {},
    ),
    # framing
    "no space after data": ([data.replace(b"data: ", b"data:") for data in HELLO], {}),
    "CRLF": ([b"".join(HELLO).replace(b"\n", b"\r\n")], {}),
    "CR": ([b"".join(HELLO).replace(b"\n", b"\r")], {}),
    "comments, ids, names, retry": (
        [
            b": keep-alive\n\nretry: 100\n\nid:%d\nevent:result\n:HTTP_STATUS/200\n" % number + data
            for number, data in enumerate(HELLO)
        ],
        {},
    ),
    "no blank line between events": ([b"".join(HELLO).replace(b"\n\n", b"\n")], {}),
    "BOM": ([b"\xef\xbb\xbf" + b"".join(HELLO)], {}),
    "keep-alives in words and empty data": ([b"data: ping\n\n", b"data:\n\n", *HELLO], {}),
    "one event in several data lines": (
        [HELLO[0].replace(b'"index": 0,', b'"index": 0,\ndata: '), *HELLO[1:]],
        {},
    ),
    "no DONE": (HELLO[:-1], {}),
    "no finish chunk, but DONE": ([*DELTAS, chunk(usage=USAGE), DONE], {}),
    "no blank line at the end": ([*HELLO[:-1], DONE.strip()], {}),
    # chunks that lack something
    "no choices in some chunk": ([event({"id": "x"}), *HELLO], {}),
    "choices null": ([event({"id": "x", "choices": None}), *HELLO], {}),
    "choices empty at first": ([event({"id": "x", "choices": []}), *HELLO], {}),
    "no index": ([without(data, "index") for data in DELTAS] + END, {}),
    "no object, created, model, id": (
        [without(data, "object", "created", "model", "id") for data in DELTAS] + END,
        {},
    ),
    "id a number, created a float": (
        [event(json.loads(data[6:]), id=7, created=1790000000.5) for data in DELTAS] + END,
        {},
    ),
    "no delta": ([event({"choices": [{"index": 0, "finish_reason": None}]}), *HELLO], {}),
    "delta null": ([event({"choices": [{"index": 0, "delta": None}]}), *HELLO], {}),
    "no role": ([*DELTAS, *END], {}),
    "role empty on every delta": (
        [chunk({"role": "", "content": text}) for text in TEXT_PIECES] + END,
        {},
    ),
    "role on every delta": (
        [chunk({"role": "assistant", "content": text}) for text in TEXT_PIECES] + END,
        {},
    ),
    "delta and message": (
        [
            event(
                {
                    "choices": [
                        {"index": 0, "delta": {"content": text}, "message": {"content": text}}
                    ]
                }
            )
            for text in TEXT_PIECES
        ]
        + END,
        {},
    ),
    # answers that are no streams
    "a whole completion": (whole(), {}),
    "whole: id a number, created a string, no object, no model": (
        whole(id=7, created="x", object="absent", model="absent"),
        {},
    ),
    "whole: no index, no role": (
        whole(choices=[{"message": {"content": "Hello, wörld"}, "finish_reason": "stop"}]),
        {},
    ),
    "whole: content as a list": (
        whole({"role": "assistant", "content": [{"type": "text", "text": "Hello, wörld"}]}),
        {},
    ),
    "whole: content missing": (whole({"role": "assistant"}), {"content": ""}),
    "whole: no usage": (whole(usage="absent"), {"usage": None}),
    "whole: usage null": (whole(usage=None), {"usage": None}),
    "whole: unknown finish reason": (whole(finish_reason="eos"), {"finish_reason": "eos"}),
    "whole: more fields": (
        whole(
            {
                "role": "assistant",
                "content": "Hello, wörld",
                "reasoning_content": "Hm",
                "timings": 1,
            }
        ),
        {"reasoning": "Hm"},
    ),
    "whole: a call without id, type and arguments": (
        whole({"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}]}),
        {"content": None, "calls": [("f", {})], "finish_reason": "tool_calls"},
    ),
    "whole: arguments an object": (
        whole(
            {
                "role": "assistant",
                "tool_calls": [{"id": "a", "function": {"name": "f", "arguments": {"a": 1}}}],
            }
        ),
        {"content": None, "calls": [("f", {"a": 1})], "finish_reason": "tool_calls"},
    ),
    "whole: two calls with one id": (
        whole(
            {
                "role": "assistant",
                "tool_calls": [
                    {"id": "a", "type": "function", "function": {"name": name, "arguments": "{}"}}
                    for name in "fg"
                ],
            },
            "tool_calls",
        ),
        {"content": None, "calls": [("f", {}), ("g", {})], "finish_reason": "tool_calls"},
    ),
    "whole: no finish reason": (
        whole(choices=[{"index": 0, "message": {"role": "assistant", "content": "Hello, wörld"}}]),
        {},
    ),
    "whole: finish reason null": (whole(finish_reason=None), {}),
    "whole: calls without ids and arguments": (
        whole(
            {
                "role": "assistant",
                "tool_calls": [
                    {"type": "function", "function": {"name": name, "arguments": None}}
                    for name in "ffg"
                ],
            }
        ),
        {
            "content": None,
            "calls": [("f", {}), ("f", {}), ("g", {})],
            "finish_reason": "tool_calls",
        },
    ),
    # tool calls without ids
    "no ids, another name before any arguments": (
        [chunk({"tool_calls": [{"function": {"name": name, "arguments": None}}]}) for name in "fg"]
        + END,
        {"content": None, "calls": [("f", {}), ("g", {})], "finish_reason": "tool_calls"},
    ),
    "no ids, the name on every delta": (
        [
            chunk({"tool_calls": [{"index": 0, "function": {"name": "f", "arguments": text}}]})
            for text in ("", '{"a":', "1}", "")
        ]
        + END,
        {"content": None, "calls": [("f", {"a": 1})], "finish_reason": "tool_calls"},
    ),
    # errors that come with status 200
    "native error frame, soft": ([NATIVE % MINUTE], {"error": (429, "rate_limit_exceeded")}),
    "native error frame, hard": ([NATIVE % FREE], {"error": (429, "insufficient_quota")}),
    "native error frame later": (
        [*DELTAS, NATIVE % MINUTE],
        {"error": (429, "rate_limit_exceeded")},
    ),
    "error_finish": ([chunk(ERROR_FINISH, "error_finish")], {"error": (429, "insufficient_quota")}),
    "error_finish later": (
        [*DELTAS, chunk(ERROR_FINISH, "error_finish")],
        {"error": (429, "insufficient_quota")},
    ),
    "error object": (
        [event({"error": {"code": "invalid_parameter_error", "message": "m"}})],
        {"error": (400, "invalid_parameter_error")},
    ),
    "error string": ([event({"error": "boom"})], {"error": (502, "boom")}),
    "bare JSON error line": (
        [*DELTAS, b'{"error":{"message":"m","code":"internal_error"}}\n\n'],
        {"error": (502, "internal_error")},
    ),
    "JSON error": (
        [b'{"code":"InvalidParameter","message":"m","request_id":"r-1"}'],
        {"error": (400, "InvalidParameter")},
    ),
    "HTML": (
        [b"<!doctype html><html><title>Error</title></html>"],
        {"error": (502, "upstream_html")},
    ),
    "a list": ([b"[]"], {"error": (502, None)}),
    "no body": ([], {"error": (502, "upstream_cut")}),
    "choices missing": (whole(choices="absent"), {"error": (502, None)}),
    "choices null in a whole answer": (whole(choices=None), {"error": (502, None)}),
    "choices empty in a whole answer": (whole(choices=[]), {"error": (502, None)}),
    "no finish reason, no DONE": (DELTAS, {"error": (502, "upstream_cut")}),
    "garbage": ([*DELTAS, b"data: {not json\n\n"], {"error": (502, "upstream_cut")}),
}
DIRTY.update(
    {
        "tools: " + name: (
            pieces,
            {
                "content": None,
                "calls": [("get_weather", {"city": "Paris"}), ("get_time", {})],
                "finish_reason": "tool_calls",
                "usage": USAGE if chunk(usage=USAGE) in pieces else None,
                **({"reasoning": "I must look."} if pieces is CALLS else {}),
            },
        )
        for name, pieces in TOOL_DELTAS.items()
    }
)


@pytest.fixture()
def same_ids(monkeypatch):
    """Ids that are made up are the same in every run."""

    def restart():
        numbers = iter(range(1000))
        monkeypatch.setattr(qp.secrets, "token_hex", lambda size: f"{next(numbers):024d}")

    return restart


def check_canonical(chunks):
    """The shape of a stream that every client takes."""
    assert (
        len({(value["id"], value["created"], value["model"], value["object"]) for value in chunks})
        == 1
    )
    assert isinstance(chunks[0]["id"], str) and isinstance(chunks[0]["created"], int)
    choices = [choice for value in chunks for choice in value["choices"]]
    assert all(value["choices"] or "usage" in value for value in chunks)
    assert ["role" in choice["delta"] for choice in choices] == [True] + [False] * (
        len(choices) - 1
    )
    assert all(
        "index" in choice and "finish_reason" in choice and "message" not in choice
        for choice in choices
    )
    assert not any({"content", "reasoning_content"} <= set(choice["delta"]) for choice in choices)
    assert all(len(choice["delta"].get("tool_calls", [0])) == 1 for choice in choices)
    assert [choice["finish_reason"] is not None for choice in choices] == [False] * (
        len(choices) - 1
    ) + [True]
    assert choices[-1]["delta"] == {} and sum("usage" in value for value in chunks) <= 1


def check_completion(completion, expected):
    choice = completion["choices"][0]
    message = choice["message"]
    assert {"id", "object", "created", "model", "choices"} <= set(completion) and completion[
        "object"
    ] == "chat.completion"
    assert (choice["index"], message["role"], choice["finish_reason"]) == (
        0,
        "assistant",
        expected.get("finish_reason", "stop"),
    )
    assert message["content"] == expected.get("content", "Hello, wörld")
    assert message.get("reasoning_content", "") == expected.get("reasoning", "")
    calls = message.get("tool_calls", [])
    assert [
        (call["function"]["name"], json.loads(call["function"]["arguments"])) for call in calls
    ] == expected.get("calls", [])
    assert len({call["id"] for call in calls}) == len(calls) and all(
        call["type"] == "function" for call in calls
    )
    assert completion.get("usage") == expected.get("usage", USAGE)


@pytest.mark.parametrize("name", sorted(DIRTY))
def test_dirty_answers_come_out_clean_wherever_the_bytes_are_cut(name, same_ids):
    pieces, expected = DIRTY[name]
    whole_answer = b"".join(pieces)

    def outcome(parts):
        same_ids()
        try:
            return translate(parts)
        except qp.UpstreamError as error:
            return error.status, error.code

    clean = outcome([whole_answer])
    if "error" in expected:
        assert clean == expected["error"]
    else:
        check_canonical(clean)
        check_completion(collect(clean), expected)
    for cut in range(len(whole_answer) + 1):
        assert outcome([whole_answer[:cut], whole_answer[cut:]]) == clean


@pytest.mark.parametrize("name", sorted(DIRTY))
def test_dirty_answers_reach_the_client_clean_streamed_and_not(key_server, upstream, name):
    pieces, expected = DIRTY[name]
    is_stream = pieces and pieces[0][:1] not in (b"{", b"<", b"[")
    answer = stream(*pieces) if is_stream else reply(200, b"".join(pieces))
    upstream.script.extend([answer] * 8)  # what may be repeated, is
    key_server.options = key_server.options._replace(retries=0)
    status, _, completion = chat(key_server)
    _, _, data = chat(key_server, stream=True, stream_options={"include_usage": True})
    if "error" not in expected:
        check_completion(completion, expected)
        assert data.pop() == "[DONE]"
        check_completion(collect([json.loads(value) for value in data]), expected)
        return
    assert (status, completion["error"]["code"]) == expected["error"]
    last = (
        data if isinstance(data, dict) else json.loads(data[-1])
    )  # never [DONE], which is no JSON
    assert last["error"]["code"] == expected["error"][1]


@pytest.mark.parametrize(
    "texts, expected",
    [
        (["ha", "haha", "!"], "hahaha!"),
        (["ha", "haha"], "hahaha"),
        (["1", "10", "100"], "110100"),
        (["=", "==", "===="] * 9, "=======" * 9),
        (["\n", "\n\n", "x"], "\n\n\nx"),
        (["na ", "na ", "na ", "batman"], "na na na batman"),
        (
            [
                "The",
                "The quick",
                "The quick brown",
                "The quick brown fox jumps",
                "The quick brown fox jumps over",
            ],
            "The quick brown fox jumps over",
        ),
        (
            [
                "A longer beginning of a text",
                "A longer beginning of a text, and",
                "A longer beginning of a text, and",
                "A longer beginning of a text, and end",
            ],
            "A longer beginning of a text, and end",
        ),
        (["Hello", " world", "Hello world, again"], "Hello worldHello world, again"),
        (
            ["Hello, I am a model by Qwen"] * 3
            + ["Hello, I am a model by Qwen of", "Hello, I am a model by Qwen of this"],
            "Hello, I am a model by Qwen of this",
        ),
        (["--", "--", "-", "\nx"], "-----\nx"),
        (["ab"] * 2000, "ab" * 2000),
        (["as it says: no end of it "] * 900, "as it says: no end of it " * 900),
        (
            ["a line of the poem that comes twice\n"] * 2 + ["x"],
            "a line of the poem that comes twice\n" * 2 + "x",
        ),
    ],
)
def test_cumulative_deltas_become_increments_and_repetition_survives(texts, expected):
    assert text_in(translate([b"".join(deltas_of(*texts))])) == expected


def test_text_before_a_cut_line_is_not_lost_where_no_blank_lines_are():
    lines = b"".join([*DELTAS, chunk({}, "stop"), b'data: {"id":"x","usa\n\n']).replace(
        b"\n\n", b"\n"
    )
    assert text_in(translate([lines])) == "Hello, w\u00f6rld"


def test_equal_chunks_are_passed_on_as_they_come():
    increments = qp.Increments()
    assert [increments.feed("xxxxxxxx") for _ in range(3)] == ["xxxxxxxx"] * 3


@pytest.mark.parametrize(
    "texts, thoughts, content",
    [
        (["<th", "ink>a", "b</thi", "nk>\n\nc"], "ab", "c"),
        (["</think>", "\n", "c"], "", "c"),
        (["<", "b>"], "", "<b>"),
        (["say ", "<think>x</think>"], "", "say <think>x</think>"),
        (["<think>never closed"], "never closed", ""),
    ],
)
def test_thoughts_left_in_the_content_are_taken_out(texts, thoughts, content):
    chunks = translate([b"".join(deltas_of(*texts))])
    assert (text_in(chunks, "reasoning_content"), text_in(chunks)) == (thoughts, content)


@pytest.mark.parametrize(
    "texts",
    [
        ["```js", 'on\n{"a":', " 1}\n", "```\n"],
        ['{"a": 1}'],
        ["<think>x</think>", '```\n{"a": 1}```'],
    ],
)
def test_json_output_loses_its_fence(texts):
    chunks = translate([b"".join(deltas_of(*texts))], {"response_format": {"type": "json_object"}})
    assert json.loads(text_in(chunks)) == {"a": 1}


@pytest.mark.parametrize(
    "pieces, usage",
    [
        (
            [
                chunk({"content": "a"}, usage=USAGE),
                chunk({"content": "b"}, "stop", usage=USAGE),
                DONE,
            ],
            USAGE,
        ),
        ([chunk({"content": "a"}), chunk(usage=USAGE), chunk({}, "stop"), DONE], USAGE),
        (
            [
                chunk({"content": "a"}),
                chunk({}, "stop"),
                chunk(usage={"prompt_tokens": 1.0, "completion_tokens": 2, "total_tokens": None}),
                DONE,
            ],
            {"prompt_tokens": 1, "completion_tokens": 2, "total_tokens": 3},
        ),
        ([chunk({"content": "a"}), chunk({}, "stop", usage={}), DONE], None),
    ],
)
def test_usage_comes_once_and_last_if_asked_for(pieces, usage):
    chunks = translate([b"".join(pieces)])
    assert [value["usage"] for value in chunks if "usage" in value] == ([usage] if usage else [])
    assert "usage" in chunks[-1] or usage is None
    assert not any("usage" in value for value in translate([b"".join(pieces)], {"stream": True}))


@pytest.mark.parametrize(
    "dirty",
    [
        b'data: {"choices":null}\n\n',
        b'data: {"object":"x"}\n\n',
        b"data:\n\n",
        b"data: ping\n\n",
        b": x\n\n",
        b'data: {"choices":[null]}\n\n',
        b'data: {"choices":[{"delta":null,"index":0,"finish_reason":""}]}\n\n',
        chunk({"content": None}, "null"),
    ],
)
def test_dirt_in_a_stream_does_not_reach_the_client(dirty):
    clean = list(translate([b"".join(HELLO)]))
    assert translate([HELLO[0], dirty, *HELLO[1:]]) == clean


def test_message_instead_of_delta_and_whole_completion_with_200():
    whole = {
        "choices": [
            {
                "index": 0,
                "message": {"role": "assistant", "content": "Hi", "tool_calls": None},
                "finish_reason": "stop",
            }
        ],
        "id": "x",
        "created": 1,
        "model": "m",
        "object": "chat.completion",
        "usage": USAGE,
    }
    chunks = translate([json.dumps(whole).encode()])
    assert (text_in(chunks), chunks[-1]["usage"]) == ("Hi", USAGE)


@pytest.mark.parametrize(
    "name, pieces",
    [
        ("hello", HELLO),
        ("calls", CALLS),
        (
            "thoughts",
            [chunk({"reasoning_content": "ü"}), chunk({"content": "ö"}), chunk({}, "length"), DONE],
        ),
    ],
)
def test_every_stream_cut_at_every_byte(name, pieces):
    """Split anywhere it is the same; ended anywhere it is an error, unless the finish reason had come."""
    whole = b"".join(pieces)
    expected = translate([whole])
    finished = whole.index(b'"finish_reason": "') if b'"finish_reason": "' in whole else 0
    for cut in range(len(whole) + 1):
        assert translate([whole[:cut], whole[cut:]]) == expected
        try:
            chunks = translate([whole[:cut]])
        except qp.UpstreamError:
            continue
        assert cut > finished
        assert chunks[-1]["choices"] == [] or chunks[-1]["choices"][0]["finish_reason"] in (
            "stop",
            "tool_calls",
            "length",
        )


# ----------------------------------------------------------------------------------------------------
# Responses API
# ----------------------------------------------------------------------------------------------------


def response_writer(asked):
    """A writer that has no socket, and the list of the events that it writes."""
    events = []

    def write(pieces):
        events.extend(json.loads(piece.partition(b"\ndata: ")[2]) for piece in pieces)

    out = argparse.Namespace(write_events=write, end_stream=lambda: None)
    writer = qp.ResponsesWriter(out, asked, "qwen3.7-plus", lambda items: None)
    writer.is_stream = True
    return writer, events


def events_of_response(pieces, **request):
    """The events for an upstream's stream, without any socket."""
    asked = qp.ResponseRequest({"input": "Hi", **request}, qp.ItemMemory())
    writer, events = response_writer(asked)
    writer.start()
    for value in translate(pieces, asked.chat):
        writer.feed(qp.Chunk(value))
    writer.close(USAGE)
    return events


def respond(server, stream=False, **request):
    """A request to /v1/responses: (status, object), or streamed (status, list of (name, event))."""
    status, headers, body = ask(
        server, {"input": "Hi", "stream": stream, **request}, path="/v1/responses"
    )
    if not headers["Content-Type"].startswith("text/event-stream"):
        return status, json.loads(body)
    blocks = [block.split("\n") for block in body.decode().split("\n\n")[:-1]]
    return status, [
        (name[len("event: ") :], json.loads(data[len("data: ") :])) for name, data in blocks
    ]


THINK_TEXT_CALLS = [
    chunk({"reasoning_content": "Hm"}),
    chunk({"reasoning_content": "m"}),
    *DELTAS,
    chunk({"reasoning_content": "Again"}),
    *CALLS[1:],
]
CALL_TOOLS = [
    {
        "type": "function",
        "name": "get_weather",
        "parameters": {"type": "object", "properties": {}},
        "strict": True,
    }
]


def test_response_events_come_in_the_order_that_all_clients_take():
    events = events_of_response([b"".join(THINK_TEXT_CALLS)])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    thoughts = ["output_item.added", "reasoning_summary_part.added", "reasoning_summary_text.delta"]
    ended = ["reasoning_summary_text.done", "reasoning_summary_part.done", "output_item.done"]
    assert [event["type"][len("response.") :] for event in events] == [
        "created",
        "in_progress",
        *thoughts,
        "reasoning_summary_text.delta",
        *ended,
        "output_item.added",
        "content_part.added",
        *["output_text.delta"] * 3,
        "output_text.done",
        "content_part.done",
        "output_item.done",
        *thoughts,
        *ended,
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "output_item.added",
        "function_call_arguments.delta",
        "function_call_arguments.done",
        "output_item.done",
        "completed",
    ]
    added = [event for event in events if event["type"] == "response.output_item.added"]
    assert [event["output_index"] for event in added] == [0, 1, 2, 3, 4]


def test_every_delta_names_its_item_and_the_done_item_is_whole():
    events = events_of_response([b"".join(THINK_TEXT_CALLS)])
    done = {
        event["item"]["id"]: event["item"]
        for event in events
        if event["type"] == "response.output_item.done"
    }
    for event in events:
        if event["type"].endswith(".delta"):
            assert (
                event["item_id"] in done
                and isinstance(event["delta"], str)
                and "output_index" in event
            )
    assert [item["type"] for item in done.values()] == [
        "reasoning",
        "message",
        "reasoning",
        "function_call",
        "function_call",
    ]
    reasoning, message, _, weather, clock = done.values()
    assert reasoning["summary"] == [{"type": "summary_text", "text": "Hmm"}]
    assert (message["role"], message["status"]) == ("assistant", "completed")
    assert message["content"] == [
        {"type": "output_text", "text": "Hello, wörld", "annotations": [], "logprobs": []}
    ]
    assert (
        weather["call_id"],
        weather["name"],
        json.loads(weather["arguments"]),
        weather["status"],
    ) == ("call_a", "get_weather", {"city": "Paris"}, "completed")
    assert clock["arguments"] == "{}"
    final = events[-1]["response"]
    assert final["output"] == list(done.values()) and final["status"] == "completed"
    assert final["usage"] == {
        "input_tokens": 9,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": 3,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": 12,
    }


def test_response_has_every_required_field_streamed_and_not(key_server, upstream):
    upstream.script.extend([stream(*THINK_TEXT_CALLS)] * 2)
    asked = {
        "metadata": {"a": "b"},
        "instructions": "Be brief.",
        "temperature": 0,
        "max_output_tokens": 99,
        "user": "me",
        "store": True,
        "tools": CALL_TOOLS,
        "parallel_tool_calls": False,
        "reasoning": {"effort": "low", "summary": "auto"},
        "truncation": "auto",
    }
    status, response = respond(key_server, **asked)
    assert status == 200 and {
        "id",
        "created_at",
        "model",
        "object",
        "output",
        "parallel_tool_calls",
        "tool_choice",
        "tools",
        "error",
        "incomplete_details",
        "previous_response_id",
        "text",
        "top_p",
    } <= set(response)
    assert {
        name: response[name]
        for name in (
            "metadata",
            "instructions",
            "temperature",
            "max_output_tokens",
            "user",
            "tools",
            "truncation",
        )
    } == {
        name: asked[name]
        for name in (
            "metadata",
            "instructions",
            "temperature",
            "max_output_tokens",
            "user",
            "tools",
            "truncation",
        )
    }
    assert (
        response["store"],
        response["object"],
        response["parallel_tool_calls"],
        response["model"],
    ) == (False, "response", False, "qwen3-max")
    _, events = respond(key_server, stream=True, **asked)
    assert all(name == event["type"] for name, event in events)
    streamed = events[-1][1]["response"]

    def without_ids(value):
        return re.sub(
            r'"(id|created_at|completed_at)": ("(resp|rs|msg|fc)_[0-9a-f]+"|\d+)',
            "",
            json.dumps(value, sort_keys=True),
        )

    assert without_ids(streamed) == without_ids(response)
    body = upstream.bodies()[0]
    assert body["messages"][0] == {"role": "system", "content": "Be brief."} and (
        body["max_tokens"],
        body["thinking_budget"],
    ) == (99, 4096)
    assert not {"store", "metadata", "truncation", "reasoning", "instructions", "input"} & set(body)


# The fields of Response in openai-python 3.57, and those of Open Responses beside them.
RESPONSE_FIELDS = set(
    """access_programs background completed_at conversation created_at error frequency_penalty id
    image incomplete_details input_transformations instructions max_output_tokens max_tool_calls
    metadata model moderation object output parallel_tool_calls presence_penalty
    previous_response_id prompt prompt_cache_diagnostics prompt_cache_key prompt_cache_options
    prompt_cache_retention reasoning safety_identifier service_tier status store temperature text
    tool_choice tool_usage tools top_logprobs top_p truncation usage user""".split()
)


def test_every_response_has_every_field_of_the_schema_with_openai_s_defaults():
    events = events_of_response([b"".join(THINK_TEXT_CALLS)])
    responses = [event["response"] for event in events if "response" in event]
    assert [set(response) for response in responses] == [RESPONSE_FIELDS] * 3
    names = ("temperature", "top_p", "presence_penalty", "frequency_penalty")
    assert [responses[-1][name] for name in names] == [1, 1, 0, 0]
    assert [response["completed_at"] is None for response in responses] == [True, True, False]
    asked = {"temperature": 0, "top_p": 0.5, "safety_identifier": "me", "presence_penalty": -1}
    final = events_of_response([*DELTAS, chunk({}, "length"), DONE], **asked)[-1]["response"]
    assert {name: final[name] for name in asked} == asked and final["completed_at"] is None


def test_tokens_written_to_the_cache_are_counted(key_server, upstream):
    details = {"cached_tokens": 2, "cache_creation_input_tokens": 5}
    usage = {**USAGE, "prompt_tokens_details": details}
    upstream.script.append(stream(*DELTAS, chunk({}, "stop"), chunk(usage=usage), DONE))
    _, response = respond(key_server)
    assert response["usage"]["input_tokens_details"] == {
        "cached_tokens": 2,
        "cache_write_tokens": 5,
    }


@pytest.mark.parametrize(
    "reason, detail", [("length", "max_output_tokens"), ("content_filter", "content_filter")]
)
def test_a_response_cut_for_a_reason_is_incomplete(reason, detail):
    final = events_of_response([*DELTAS, chunk({}, reason), DONE])[-1]
    assert (
        final["type"],
        final["response"]["status"],
        final["response"]["incomplete_details"],
    ) == ("response.incomplete", "incomplete", {"reason": detail})


@pytest.mark.parametrize(
    "pieces, code",
    [
        (DELTAS, "server_error"),
        ([*DELTAS, CUT], "server_error"),
        ([*DELTAS, NATIVE % FREE], "insufficient_quota"),
        ([*DELTAS, NATIVE % MINUTE], "rate_limit_exceeded"),
        ([*DELTAS, b"data: {cut\n\n"], "server_error"),
    ],
)
def test_a_response_that_breaks_off_has_failed(key_server, upstream, pieces, code):
    upstream.script.append(stream(*pieces))
    _, events = respond(key_server, stream=True)
    assert events[-1][0] == "response.failed" and events[-1][1]["response"]["error"]["code"] == code
    assert events[-1][1]["response"]["status"] == "failed" and events[0][0] == "response.created"
    failure = events[-2][1]
    assert (events[-2][0], failure["code"], failure["error"]["code"]) == ("error", code, code)
    assert (
        failure["message"]
        == failure["error"]["message"]
        == events[-1][1]["response"]["error"]["message"]
    )
    assert [event["sequence_number"] for _, event in events] == list(range(len(events)))


def test_response_errors_before_the_first_event_are_http_statuses(key_server, upstream):
    upstream.script.append(refusal("Free allocated quota exceeded.", 429, "insufficient_quota"))
    status, body = respond(key_server, stream=True)
    assert (status, body["error"]["code"]) == (429, "insufficient_quota")


def test_silence_before_and_in_a_response_is_filled_with_in_progress(quick, upstream):
    first, second, names, numbers = threading.Event(), threading.Event(), [], []
    upstream.script.append(stream(first, *DELTAS, second, *END))
    for line in lines_of(quick, "/v1/responses", {"input": "Hi"}):
        if line.startswith(b"event: "):
            names.append(line[len("event: ") :].strip().decode())
        elif line.startswith(b"data: "):
            numbers.append(json.loads(line[len("data: ") :])["sequence_number"])
        if names.count("response.in_progress") == 3:
            first.set()
        if "response.output_text.delta" in names and names[-1] == "response.in_progress":
            second.set()
    assert names[0] == "response.created" and names.count("response.created") == 1
    assert names.index("response.output_text.delta") > 3 and names[-1] == "response.completed"
    assert "response.in_progress" in names[names.index("response.output_text.delta") :]
    assert numbers == list(range(len(names)))


REPLAYED = [
    {"role": "developer", "content": "Rules."},
    {
        "type": "message",
        "role": "user",
        "content": [
            {"type": "input_text", "text": "Look"},
            {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "low"},
        ],
    },
    {
        "type": "reasoning",
        "id": "rs_1",
        "summary": [{"type": "summary_text", "text": "Hm"}],
        "encrypted_content": None,
    },
    {
        "type": "message",
        "role": "assistant",
        "content": [{"type": "output_text", "text": "I look.", "annotations": []}],
    },
    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
    {
        "type": "function_call",
        "call_id": "c2",
        "name": "run",
        "namespace": "shell",
        "arguments": '{"a": 1}',
    },
    {"role": "user", "content": "Are you there?"},
    {
        "type": "function_call_output",
        "call_id": "c1",
        "output": [{"type": "input_text", "text": "one"}],
    },
    {"type": "function_call_output", "call_id": "c2", "output": "two"},
    {"type": "web_search_call", "id": "ws_1"},
    {"type": "custom_tool_call", "call_id": "c3", "name": "patch", "input": "*** Begin"},
    {"type": "custom_tool_call_output", "call_id": "c3", "output": "done"},
]


def test_a_replayed_conversation_becomes_paired_messages(key_server, upstream):
    assert respond(key_server, input=REPLAYED, model="qwen3-vl-plus")[0] == 200
    messages = upstream.bodies()[0]["messages"]
    assert [message["role"] for message in messages] == [
        "system",
        "user",
        "assistant",
        "tool",
        "tool",
        "user",
        "assistant",
        "tool",
    ]
    assert messages[1]["content"][1] == {
        "type": "image_url",
        "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"},
    }
    turn = messages[2]
    assert (
        turn["content"],
        turn["reasoning_content"],
        [call["function"]["name"] for call in turn["tool_calls"]],
    ) == ("I look.", "Hm", ["f", "shell__run"])
    assert [message["content"] for message in messages[3:5]] == ["one", "two"]
    assert json.loads(messages[6]["tool_calls"][0]["function"]["arguments"]) == {
        "input": "*** Begin"
    }


def test_namespaces_and_custom_tools_are_flattened_and_restored(key_server, upstream):
    tools = [
        {
            "type": "namespace",
            "name": "shell",
            "tools": [
                {
                    "type": "function",
                    "name": "run",
                    "parameters": {"type": "object", "properties": {}},
                },
                {"type": "function", "name": "x" * 64, "parameters": None},
            ],
        },
        {
            "type": "custom",
            "name": "patch",
            "format": {"type": "grammar", "syntax": "lark", "definition": "start: A"},
        },
        {"type": "web_search"},
        {"type": "image_generation"},
    ]
    upstream.script.append(
        stream(
            chunk(tool_call(0, "c1", "shell__run", "{}")),
            chunk(tool_call(1, "c2", "patch", '{"inp')),
            chunk(tool_call(1, "", None, 'ut": "*** Begin"}')),
            *END,
        )
    )
    _, events = respond(key_server, stream=True, tools=tools)
    body = upstream.bodies()[0]
    assert [tool["function"]["name"] for tool in body["tools"]][::2] == [
        "shell__run",
        "patch",
    ] and body["enable_search"] is True
    assert len(body["tools"][1]["function"]["name"]) == 64 and "start: A" in json.dumps(
        body["tools"][2]
    )
    items = events[-1][1]["response"]["output"]
    assert (items[0]["name"], items[0]["namespace"], items[0]["type"]) == (
        "run",
        "shell",
        "function_call",
    )
    assert (items[1]["type"], items[1]["name"], items[1]["input"]) == (
        "custom_tool_call",
        "patch",
        "*** Begin",
    )
    assert [
        event["delta"] for name, event in events if name == "response.custom_tool_call_input.delta"
    ] == ["*** Begin"]


def function_named(name):
    return {"type": "function", "name": name, "parameters": {"type": "object", "properties": {}}}


@pytest.mark.parametrize("beside", [[], CALL_TOOLS])
def test_tools_in_an_item_of_the_input_are_offered_and_called_by_their_namespace(
    key_server, upstream, beside
):
    """Codex since 0.144 sends its tools in an item, not beside the input."""
    namespace = {
        "type": "namespace",
        "name": "functions",
        "tools": [function_named("exec"), {"type": "custom", "name": "patch"}],
    }
    more = {"type": "additional_tools", "role": "developer", "tools": [namespace]}
    upstream.script.append(
        stream(
            chunk(tool_call(0, "c1", "functions__exec", "{}")),
            chunk(tool_call(1, "c2", "functions__patch", '{"input": "*** Begin"}')),
            *END,
        )
    )
    _, events = respond(key_server, stream=True, input=[more, *HI], tools=beside)
    offered = [tool["function"]["name"] for tool in upstream.bodies()[0]["tools"]]
    assert offered == [*(tool["name"] for tool in beside), "functions__exec", "functions__patch"]
    calls = events[-1][1]["response"]["output"]
    assert [(call["type"], call["name"], call["namespace"]) for call in calls] == [
        ("function_call", "exec", "functions"),
        ("custom_tool_call", "patch", "functions"),
    ]
    results = [
        {"type": f"{call['type']}_output", "call_id": call["call_id"], "output": "x"}
        for call in calls
    ]
    assert respond(key_server, input=[more, *HI, more, *calls, *results], tools=beside)[0] == 200
    body = upstream.bodies()[1]
    assert [tool["function"]["name"] for tool in body["tools"]] == offered
    replayed = [call["function"]["name"] for call in body["messages"][1]["tool_calls"]]
    assert replayed == offered[-2:]


def test_tools_in_an_item_are_not_offered_for_a_compaction(key_server, upstream):
    more = {"type": "additional_tools", "tools": CALL_TOOLS}
    assert respond(key_server, input=[more, *HI, {"type": "compaction_trigger"}])[0] == 200
    assert "tools" not in upstream.bodies()[0]


def test_search_is_left_out_with_a_word_where_there_is_none(caplog):
    caplog.set_level(logging.INFO, "qwen_proxy")
    chat_request = qp.ResponseRequest(
        {"input": "Hi", "tools": [{"type": "web_search"}]}, qp.ItemMemory()
    ).chat
    body, fired = to_upstream(chat_request, "qwen3.7-plus", "coding")
    assert "no web search" in fired["web-search"] and not {
        "enable_search",
        "web_search_options",
        "tools",
    } & set(body)


@pytest.mark.parametrize(
    "choice, sent",
    [
        ("required", "required"),
        ({"type": "function", "name": "get_weather"}, "get_weather"),
        ("none", "none"),
        (
            {
                "type": "allowed_tools",
                "mode": "required",
                "tools": [{"type": "function", "name": "get_weather"}],
            },
            "required",
        ),
        ({"type": "web_search"}, "auto"),
        (None, None),
    ],
)
def test_tool_choice_of_responses(choice, sent):
    tools = [*CALL_TOOLS, {"type": "function", "name": "other"}]
    asked, _ = to_upstream(
        qp.ResponseRequest(
            {"input": "Hi", "tools": tools, "tool_choice": choice}, qp.ItemMemory()
        ).chat
    )
    got = asked.get("tool_choice")
    assert (got["function"]["name"] if isinstance(got, dict) else got) == sent
    assert len(asked["tools"]) == (
        1 if isinstance(choice, dict) and choice["type"] == "allowed_tools" else 2
    )


@pytest.mark.parametrize(
    "text_format",
    [
        {"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True},
        {"type": "json_object"},
    ],
)
def test_structured_output_of_responses_is_bare_json(key_server, upstream, text_format):
    upstream.script.append(
        stream(*[chunk({"content": text}) for text in ("```json\n", '{"a": 1}', "\n```")], *END)
    )
    status, response = respond(
        key_server, text={"format": text_format, "verbosity": "low"}, model="qwen3.7-plus"
    )
    assert status == 200 and json.loads(response["output"][0]["content"][0]["text"]) == {"a": 1}
    assert (
        upstream.bodies()[0]["response_format"]["type"] == text_format["type"]
        and response["text"]["format"] == text_format
    )


def test_compaction_is_one_item_that_a_later_request_carries_back(key_server, upstream):
    items = [{"role": "user", "content": "Do it."}, {"type": "compaction_trigger"}]
    status, events = respond(key_server, stream=True, input=items, tools=CALL_TOOLS)
    output = events[-1][1]["response"]["output"]
    assert [item["type"] for item in output] == ["compaction"] and "tools" not in upstream.bodies()[
        0
    ]
    assert [name for name, _ in events] == [
        "response.created",
        "response.in_progress",
        "response.output_item.added",
        "response.output_item.done",
        "response.completed",
    ]
    respond(key_server, input=[*output, {"role": "user", "content": "Go on."}])
    assert "Hello, wörld" in upstream.bodies()[1]["messages"][0]["content"]


def test_thoughts_are_carried_in_encrypted_content_when_asked_for(key_server, upstream):
    upstream.script.append(stream(*THINK_TEXT_CALLS[:5], *END))
    _, response = respond(key_server, include=["reasoning.encrypted_content"])
    respond(key_server, input=[*response["output"], {"role": "user", "content": "Go on."}])
    assert upstream.bodies()[1]["messages"][0]["reasoning_content"] == "Hmm"


def references(response):
    return [{"type": "item_reference", "id": item["id"]} for item in response["output"]]


def test_an_item_of_an_answer_can_be_sent_back_by_its_id(key_server, upstream):
    """The AI SDK does so unless it is told `store: false`; thoughts that are forgotten are left out."""
    upstream.script.append(stream(*THINK_TEXT_CALLS, *END))
    _, events = respond(key_server, stream=True)
    said = events[-1][1]["response"]
    results = [
        {"type": "function_call_output", "call_id": item["call_id"], "output": "x"}
        for item in said["output"]
        if "call_id" in item
    ]
    _, whole = respond(
        key_server,
        input=[{"type": "item_reference", "id": "rs_forgotten"}, *HI, *references(said), *results],
    )
    assert whole["status"] == "completed"
    in_full = respond(key_server, input=[*HI, *said["output"], *results])
    assert in_full[0] == 200 and upstream.bodies()[1] == upstream.bodies()[2]
    assert [len(message.get("tool_calls", [])) for message in upstream.bodies()[1]["messages"]] == [
        0,
        0,
        2,
        0,
        0,
    ]


def test_an_item_that_the_client_wanted_not_stored_is_not_kept(key_server, upstream):
    _, response = respond(key_server, store=False)
    status, body = respond(key_server, input=[*HI, *references(response)])
    assert (
        status == 400
        and "store = false" in body["error"]["message"]
        and len(upstream.requests) == 1
    )


def test_the_memory_of_items_has_a_limit():
    memory = qp.ItemMemory(limit=100)
    memory.keep([{"id": str(number), "text": "x" * 30} for number in range(20)])
    assert memory.get("19") == {"id": "19", "text": "x" * 30} and memory.get("17") is None
    memory.keep([{"id": "large", "text": "x" * 200}])
    assert memory.get("large") is None and memory.get("19") is None
    memory.keep([{"id": "small"}])
    assert memory.get("small") == {"id": "small"} and memory.get(5) is None


def test_an_item_is_referred_to_once(key_server, upstream):
    _, response = respond(key_server)
    status, body = respond(key_server, input=[*HI, *references(response) * 2])
    assert (
        status == 400 and "second time" in body["error"]["message"] and len(upstream.requests) == 1
    )


def test_a_compaction_without_a_summary_has_failed(key_server, upstream):
    upstream.script.extend([stream(chunk({"reasoning_content": "Hm"}), *END)] * 2)
    request = [*HI, {"type": "compaction_trigger"}]
    _, events = respond(key_server, input=request, stream=True)
    assert events[-1][0] == "response.failed"
    assert respond(key_server, input=request)[0] == 502


@pytest.mark.parametrize(
    "request_, words",
    [
        ({"previous_response_id": "resp_1"}, "send the whole conversation"),
        ({"conversation": "conv_1"}, "conversation is not"),
        ({"input": None}, "input must be"),
        ({"input": []}, "input must be"),
        ({"input": [{"type": "item_reference", "id": "x"}]}, "item_reference"),
        ({"input": [{"type": "computer_call"}]}, "computer_call"),
        ({"input": [5]}, "input[0]"),
        ({"input": [{"role": "robot", "content": "x"}]}, "robot"),
        ({"background": True}, "background"),
        (
            {"input": [{"role": "user", "content": [{"type": "input_file", "file_id": "f"}]}]},
            "input_file",
        ),
        ({"input": [{"type": ["x"]}]}, "type"),
        ({"input": [{"role": "user", "content": 5}]}, "content"),
    ],
)
def test_responses_that_cannot_be_served_say_why(key_server, upstream, request_, words):
    status, body = respond(key_server, **request_)
    assert status == 400 and words in body["error"]["message"] and upstream.requests == []


def test_a_previous_response_that_is_unknown_is_said_in_openai_s_words(key_server, upstream):
    """Clients tell by them that they must send the conversation again."""
    status, body = respond(key_server, previous_response_id="resp_1")
    error = body["error"]
    assert (status, error["code"], error["param"], error["type"]) == (
        400,
        "previous_response_not_found",
        "previous_response_id",
        "invalid_request_error",
    )
    assert error["message"].startswith("Previous response with id 'resp_1' not found.")
    assert upstream.requests == []


def test_odd_types_in_a_response_request_are_no_500(key_server):
    odd = [5, "x", [5], {"a": 5}, None, True]
    for name in (
        "instructions",
        "tools",
        "tool_choice",
        "reasoning",
        "text",
        "include",
        "metadata",
        "max_output_tokens",
        "truncation",
        "stream_options",
    ):
        for value in odd:
            assert respond(key_server, **{name: value})[0] in (200, 400), (name, value)
    for kind in (
        "function_call",
        "function_call_output",
        "reasoning",
        "compaction",
        "custom_tool_call",
        "message",
    ):
        for field in (
            "content",
            "summary",
            "output",
            "arguments",
            "name",
            "namespace",
            "call_id",
            "encrypted_content",
            "input",
        ):
            for value in odd:
                assert respond(
                    key_server, input=[{"type": kind, "role": "user", field: value}, *HI]
                )[0] in (200, 400), (kind, field, value)


def test_nothing_is_stored(key_server):
    for method in ("GET", "DELETE"):
        status, _, body = ask(key_server, method=method, path="/v1/responses/resp_1")
        assert (status, json.loads(body)["error"]["code"]) == (404, "response_not_found")


def test_client_36_a_websocket_is_answered_426_and_the_connection_lives_on(key_server):
    received = raw(
        key_server,
        b"GET /v1/responses HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n\r\n"
        b"GET /v1/responses HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    )
    assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"426", b"405"]


def test_a_responses_body_on_the_chat_route_is_understood(key_server):
    status, _, completion = chat(key_server, messages=None)
    assert status == 400
    status, _, body = ask(
        key_server, {"input": [{"role": "user", "content": "Hi"}], "instructions": "x"}
    )
    assert status == 200 and json.loads(body)["choices"][0]["message"]["content"] == "Hello, wörld"


# ----------------------------------------------------------------------------------------------------
# Server
# ----------------------------------------------------------------------------------------------------


def test_chat_answers_whole_and_streamed_alike(login, upstream, serve):
    server = serve()
    for script in (HELLO, CALLS):
        upstream.script.extend([stream(*script), stream(*script)])
        _, headers, completion = chat(server)
        _, _, data = chat(server, stream=True, stream_options={"include_usage": True})
        assert data.pop() == "[DONE]"
        streamed = collect([json.loads(value) for value in data])
        assert streamed == completion
        assert completion["object"] == "chat.completion" and completion["usage"] == USAGE
        assert headers["x-qwen-provider"] == "oauth"
    assert [
        call["function"]["name"] for call in completion["choices"][0]["message"]["tool_calls"]
    ] == ["get_weather", "get_time"]


def test_stream_is_framed_as_whole_events(key_server, upstream):
    body = {"messages": [{"role": "user", "content": "x"}], "stream": True}
    data = json.dumps(body).encode()
    received = raw(
        key_server,
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
        % (len(data), data),
    )
    head, _, rest = received.partition(b"\r\n\r\n")
    assert b"text/event-stream; charset=utf-8" in head and b"Transfer-Encoding: chunked" in head
    pieces = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        pieces.append(rest[: int(size, 16)])
        rest = rest[int(size, 16) + 2 :]
    assert pieces.pop() == b"" and all(
        piece.startswith(b"data: ") and piece.endswith(b"\n\n") for piece in pieces
    )
    assert pieces[-1] == DONE


@pytest.mark.parametrize(
    "pieces",
    [
        HELLO[:3],
        HELLO[:3] + (CUT,),
        HELLO[:3] + (b"data: {cut\n\n",),
        HELLO[:3] + (b'data: {"error":{"message":"late","code":"x"}}\n\n',),
    ],
)
def test_broken_stream_ends_in_an_error_and_no_done(key_server, upstream, pieces):
    upstream.script.append(stream(*pieces))
    status, _, data = chat(key_server, stream=True)
    assert status == 200 and "error" in json.loads(data[-1]) and "[DONE]" not in data
    upstream.script.append(stream(*pieces))
    assert chat(key_server)[0] in (502,)


@pytest.mark.parametrize("pieces", [HELLO[:5], HELLO[:5] + (CUT,), HELLO[:6], HELLO])
def test_finished_stream_without_done_gets_it(key_server, upstream, pieces):
    upstream.script.append(stream(*pieces))
    _, _, data = chat(key_server, stream=True)
    assert data[-1] == "[DONE]" and json.loads(data[-2])["choices"][0]["finish_reason"] == "stop"


def test_client_that_leaves_while_the_lock_is_held_is_let_go(home, upstream, serve):
    write_login(home, upstream, expires_in=0)
    (home / "oauth_creds.lock").write_text("somebody")
    server = serve()
    data = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as client:
        client.sendall(POST + b"Content-Length: %d\r\n\r\n%s" % (len(data), data))
        end = time.monotonic() + WAIT
        while not server.health()["in_flight"] and time.monotonic() < end:
            time.sleep(0.01)
        assert server.health()["in_flight"] == 1
    while server.health()["in_flight"] and time.monotonic() < end:
        time.sleep(0.01)
    assert server.health()["in_flight"] == 0


@pytest.mark.parametrize("pieces", [[], HELLO[:2]])
def test_client_that_leaves_stops_the_upstream_at_once(key_server, upstream, pieces):
    never = threading.Event()
    upstream.script.append(
        Reply(
            200,
            [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")],
            [*pieces, never],
        )
    )
    data = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
    with socket.create_connection(("127.0.0.1", key_server.port), timeout=WAIT) as client:
        client.sendall(
            b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
            % (len(data), data)
        )
        upstream.wait_for_request()
        if pieces:
            assert client.recv(1)
    assert upstream.gone.wait(WAIT)


@pytest.mark.parametrize("before", [[], [HELLO[0]]], ids=["before the answer", "in it"])
def test_silence_is_filled_with_comments(quick, upstream, before):
    go = threading.Event()
    upstream.script.append(stream(*before, go, *HELLO[len(before) :]))
    body = b"".join(comments_until(quick, go, 3))
    assert body.count(qp.KEEP_ALIVE) >= 3 and body.endswith(DONE)
    assert before or body.startswith(qp.KEEP_ALIVE * 3)


def test_error_after_a_comment_is_an_error_event(quick, upstream):
    late, go = json.dumps({"error": {"message": "late refusal", "code": "x"}}), threading.Event()
    upstream.script.append(Reply(400, [("Transfer-Encoding", "chunked")], [go, late.encode()]))
    *_, last, empty = comments_until(quick, go, 1)
    assert json.loads(last[len("data: ") :])["error"]["message"] == "late refusal"
    assert last + empty != DONE


def test_models_health_root(login, upstream, serve):
    server = serve(api_key=["k-123456"])
    key = {"Authorization": "Bearer k-123456"}
    models = json.loads(ask(server, method="GET", path="/v1/models", headers=key)[2])
    assert [(model["id"], model["object"], model["owned_by"]) for model in models["data"]] == [
        ("coder-model", "model", "oauth")
    ]
    assert ask(server, method="GET", path="/models/coder%2Dmodel", headers=key)[0] == 200
    assert (
        json.loads(ask(server, method="GET", path="/v1/models/nope", headers=key)[2])["error"][
            "code"
        ]
        == "model_not_found"
    )
    assert ask(server, method="GET", path="/v1/models")[0] == 401
    health = json.loads(ask(server, method="GET", path="/health")[2])
    assert (
        health["status"] == "ok"
        and health["login"]["type"] == "oauth"
        and "path" not in health["login"]
    )
    assert b"/v1/chat/completions" in ask(server, method="GET", path="/")[2]
    assert ask(server, method="HEAD", path="/")[2] == b""


def test_model_ids_may_contain_slashes(home, upstream, serve):
    entry = {"id": "qwen/qwen3 x", "baseUrl": upstream.dashscope, "envKey": "K"}
    (home / "settings.json").write_text(
        json.dumps({"modelProviders": {"openai": [entry]}, "env": {"K": "sk-good-1"}})
    )
    assert ask(serve(), method="GET", path="/v1/models/qwen%2Fqwen3%20x")[0] == 200


@pytest.mark.parametrize(
    "path",
    [
        "/v1/chat/completions",
        "/chat/completions",
        "/v1/chat/completions/",
        "/v1//chat/completions",
        "/v1/chat/completions?beta=true",
    ],
)
def test_base_url_may_be_wrong_in_the_usual_ways(key_server, path):
    assert ask(key_server, {"messages": [{"role": "user", "content": "x"}]}, path=path)[0] == 200


def test_no_login_says_what_to_do(serve):
    status, _, body = chat(serve())
    assert (
        status == 401
        and "/auth" in body["error"]["message"]
        and body["error"]["type"] == "authentication_error"
    )


@pytest.mark.parametrize(
    "header",
    [
        {"Authorization": "Bearer k-1"},
        {"X-API-Key": "k-2"},
        {"api-key": "k-1"},
        {"Authorization": "bearer k-2"},
    ],
)
def test_keys_open_the_door(serve, login, header):
    server = serve(api_key=["k-1", "k-2"])
    assert ask(server, method="GET", path="/v1/models", headers=header)[0] == 200


@pytest.mark.parametrize(
    "header",
    [
        {},
        {"Authorization": "Bearer "},
        {"Authorization": "k-1"},
        {"X-API-Key": "k-11"},
        {"Authorization": "Bearer ü"},
    ],
)
def test_wrong_keys_do_not(serve, login, header):
    status, _, body = ask(
        serve(api_key=["k-1"]),
        {"messages": []},
        headers={name: value.encode("latin-1") for name, value in header.items()},
    )
    assert (status, json.loads(body)["error"]["code"]) == (401, "invalid_api_key")


NO_KEYS = [[""], ["\u00a0"], ["good-key", "\t"], ["s"], "", "s", ["good\nkey"], [None]]


@pytest.mark.parametrize("keys", NO_KEYS, ids=ascii)
def test_a_key_that_protects_nothing_is_refused(keys):  # H1
    with pytest.raises((ValueError, TypeError)):
        qp.make_server(port=0, api_key=keys)


@pytest.mark.parametrize("keys", ["secret-key", ["\u00a0secret-key "]], ids=ascii)
def test_keys_in_any_shape_let_in_that_key_only(serve, login, keys):  # H1
    server = serve(api_key=keys)
    for key, status in (("secret-key", 200), ("s", 401), ("secret", 401), ("", 401)):
        assert get(server, "/v1/models", Authorization="Bearer " + key)[0] == status, key


def test_empty_bearer_is_fine_without_keys(key_server):
    assert (
        ask(
            key_server,
            {"messages": [{"role": "user", "content": "x"}]},
            headers={"Authorization": "Bearer "},
        )[0]
        == 200
    )


@pytest.mark.parametrize(
    "host, status",
    [
        ("localhost", 200),
        ("127.0.0.1:1", 200),
        ("[::1]:8080", 200),
        ("app.localhost", 200),
        ("host.docker.internal:8080", 200),
        ("evil.example", 403),
        ("127.0.0.1.evil.example", 403),
        ("friend.example", 200),
        ("1.2.3.4", 403),
        ("a b", 403),
        ("", 403),
    ],
)
def test_host_must_name_this_machine(serve, login, host, status):
    server = serve(allow_host=["friend.example"])
    assert ask(server, method="GET", path="/health", headers={"Host": host})[0] == status


@pytest.mark.parametrize(
    "end", [[CUT], [chunk(error={"message": "Model service overloaded."}, choices=None)]]
)
def test_the_connection_lives_on_after_an_error_in_mid_stream(key_server, upstream, end):
    upstream.script.append(stream(*HELLO[:2], *end))
    body = json.dumps({"messages": HI, "stream": True}).encode()
    received = raw(
        key_server,
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: %d\r\n\r\n%s"
        % (len(body), body)
        + b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
    )
    assert (
        re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"200"]
        and received.count(b'data: {"error"') == 1
    )


@pytest.mark.parametrize(
    "headers, status",
    [
        ({"Origin": "http://localhost:3000"}, 200),
        ({"Origin": "vscode-webview://abc"}, 200),
        ({"Origin": "https://good.example"}, 200),
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://localhost.evil.example"}, 403),
        ({"Origin": "vscode-file://vscode-app"}, 200),
        ({"Origin": "file://"}, 200),
        ({"Sec-Fetch-Site": "cross-site"}, 403),
        ({"Sec-Fetch-Site": "same-origin"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "no-cors"}, 403),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "navigate"}, 403),
        (
            {
                "Sec-Fetch-Site": "cross-site",
                "Sec-Fetch-Mode": "cors",
                "Content-Type": "text/plain",
            },
            403,
        ),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "cors"}, 200),
        ({"Sec-Fetch-Site": "cross-site", "Sec-Fetch-Mode": "websocket"}, 403),
        ({"Origin": "http://localhost:3000", "Content-Type": "text/plain"}, 415),
        ({"Content-Type": "application/x-www-form-urlencoded"}, 200),
    ],
)
def test_pages_of_other_sites_cannot_spend_the_quota(serve, upstream, monkeypatch, headers, status):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    server = serve(
        base_url=upstream.dashscope, model="m", allow_origin=["https://good.example/", "file://"]
    )
    got, answered, _ = ask(
        server, {"messages": [{"role": "user", "content": "x"}]}, headers=headers
    )
    assert got == status and len(upstream.bodies()) == (status == 200)
    assert answered["Access-Control-Allow-Origin"] == (
        headers.get("Origin") if status in (200, 415) else None
    )


def test_preflight_echoes_headers_to_allowed_origins_only(key_server):
    wanted = {
        "Access-Control-Request-Headers": "authorization, x-stainless-new",
        "Access-Control-Request-Method": "POST",
    }
    status, headers, body = ask(
        key_server, method="OPTIONS", headers={"Origin": "http://localhost:1", **wanted}
    )
    assert (status, headers["Access-Control-Allow-Headers"], body) == (
        204,
        "authorization, x-stainless-new",
        b"",
    )
    assert headers["Access-Control-Allow-Credentials"] is None
    assert (
        ask(key_server, method="OPTIONS", headers={"Origin": "https://evil.example", **wanted})[0]
        == 403
    )


def test_errors_carry_cors_headers(key_server):
    _, headers, _ = ask(key_server, {"messages": []}, headers={"Origin": "http://localhost:1"})
    assert headers["Access-Control-Allow-Origin"] == "http://localhost:1"


BODIES = {
    "empty": b"",
    "no JSON": b"{",
    "string": b'"x"',
    "list": b"[]",
    "number": b"1",
    "null": b"null",
    "NaN": b'{"messages": NaN}',
    "Infinity": b'{"messages": -Infinity}',
    "depth": b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}",
    "digits": b'{"messages": [{"role":"user","content":"x"}], "n": ' + b"9" * 100_000 + b"}",
    "UTF-8": b'{"messages": "\xff"}',
    "twice": b'{"messages": [], "messages": []}',
    "overflow": b'{"messages": [{"role":"user","content":"x"}], "x": 1e999}',
    "no messages": b"{}",
    "messages empty": b'{"messages": []}',
    "message string": b'{"messages": ["x"]}',
    "no role": b'{"messages": [{}]}',
    "content": b'{"messages": [{"role":"user","content":{}}]}',
    "model": b'{"model": 5, "messages": [{"role":"user","content":"x"}]}',
    "stream": b'{"stream": "yes", "messages": [{"role":"user","content":"x"}]}',
    "tools": b'{"tools": {}, "messages": [{"role":"user","content":"x"}]}',
}


@pytest.mark.parametrize("name", sorted(BODIES))
def test_malformed_bodies_get_a_clear_400(key_server, upstream, name):
    status, headers, body = ask(key_server, BODIES[name])
    assert (status, json.loads(body)["error"]["type"]) == (
        400,
        "invalid_request_error",
    ) and upstream.requests == []
    assert chat(key_server)[0] == 200


def test_half_a_surrogate_pair_is_no_reason_to_fail(key_server, upstream):
    assert ask(key_server, b'{"messages": [{"role":"user","content":"cut \\ud83d"}]}')[0] == 200


POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
RAW = {
    "two lengths": (POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}", 400),
    "length and chunked": (
        POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
        400,
    ),
    "length with sign": (POST + b"Content-Length: +2\r\n\r\n{}", 400),
    "length with underscore": (POST + b"Content-Length: 1_0\r\n\r\n", 400),
    "length with space": (POST + b"Content-Length: 1 0\r\n\r\n", 400),
    "length negative": (POST + b"Content-Length: -1\r\n\r\n", 400),
    "length too large": (POST + b"Content-Length: 99999999999\r\n\r\n", 413),
    "chunk size": (POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n", 400),
    "chunk extension": (POST + b"Transfer-Encoding: chunked\r\n\r\n2;a=b\r\n{}\r\n0\r\n\r\n", 400),
    "chunk trailer": (
        POST + b"Transfer-Encoding: chunked\r\n\r\n2\r\n{}\r\n0\r\nX: y\r\n\r\n",
        400,
    ),
    "other coding": (POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n", 400),
    "folded header": (POST + b"X: a\r\n b\r\n\r\n", 400),
    "space before colon": (POST + b"X : a\r\n\r\n", 400),
    "NUL": (POST + b"X: a\0b\r\n\r\n", 400),
    "bare CR": (POST + b"X: a\rb\r\n\r\n", 400),
    "bare LF": (POST + b"X: a\n\r\n", 400),
    "no Host": (b"GET /health HTTP/1.1\r\nConnection: close\r\n\r\n", 400),
    "two Hosts": (b"GET /health HTTP/1.1\r\nHost: localhost\r\nHost: evil\r\n\r\n", 400),
    "too many headers": (POST + b"".join(b"X-%d: a\r\n" % n for n in range(200)) + b"\r\n", 431),
    "long request line": (b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n", 414),
    "long header": (POST + b"X: " + b"a" * 100_000 + b"\r\n\r\n", 431),
    "HTTP/2": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", 505),
    "HTTP/0.9": (b"GET /\r\n\r\n", 400),
    "no HTTP": (b"\x16\x03\x01\x00\r\n\r\n", 400),
    "absolute": (
        b"GET http://localhost/v1/models HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        400,
    ),
    "dots": (b"GET /v1/%2e%2e/x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
    "unknown path": (b"GET /x HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n", 404),
    "wrong method": (
        b"GET /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n",
        405,
    ),
    "zstd": (
        POST + b"Content-Encoding: zstd\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
        415,
    ),
    "no gzip": (
        POST + b"Content-Encoding: gzip\r\nConnection: close\r\nContent-Length: 2\r\n\r\n{}",
        400,
    ),
}


@pytest.mark.parametrize("name", sorted(RAW))
def test_malformed_requests(key_server, upstream, name):
    request, status = RAW[name]
    received = raw(key_server, request)
    assert received.startswith(b"HTTP/1.1 %d " % status), received[:200]
    assert "error" in json.loads(received.partition(b"\r\n\r\n")[2]) and upstream.requests == []
    assert ask(key_server, method="GET", path="/health")[0] == 200


def test_many_clients_at_once_share_connections(key_server, upstream):
    results = []
    threads = [
        threading.Thread(target=lambda: results.extend(chat(key_server)[0] for _ in range(10)))
        for _ in range(8)
    ]
    [thread.start() for thread in threads]
    [thread.join(WAIT) for thread in threads]
    assert results == [200] * 80 and upstream.connections <= 16


LINES = {
    "blanks": b"X: a%sa",
    "blanks and an end": b"X:%s\0",
    "a name": b"X%s",
    "tabs": b"X:\t%s\0",
}


@pytest.mark.parametrize("name", LINES)
def test_no_header_takes_the_square_of_its_length(key_server, name):
    def work(size):  # four lines, since all of them together have a limit
        line = LINES[name] % ((b"X" if name == "a name" else b" \t") * size)[:size] + b"\r\n"
        end = b"Connection: close\r\nContent-Length: 2\r\n\r\n{}"
        assert raw(key_server, POST + line * 4 + end).startswith(b"HTTP/1.1 4")

    check_linear(work, 7_500, 8, time.process_time, 0.002)


def test_connections_above_the_limit_do_not_hold_the_others_up(serve, upstream, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    server = serve(base_url=upstream.dashscope, model="m", max_connections=2)
    gate, real = threading.Event(), qp.Listener._reject
    monkeypatch.setattr(
        qp.Listener, "_reject", lambda it, request: gate.wait(WAIT) and real(it, request)
    )
    with contextlib.ExitStack() as stack:

        def connect():
            client = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT / 2)
            return stack.enter_context(client)

        for taken in [connect(), connect()]:
            taken.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
            assert taken.recv(9) == b"HTTP/1.1 "
        silent = [connect() for _ in range(20)]
        with contextlib.suppress(ConnectionResetError):
            assert silent[-1].recv(100) == b""  # closed, while the first ones wait to be told
        gate.set()
        assert silent[0].recv(100).startswith(b"HTTP/1.1 503 ")


def test_a_model_of_megabytes_is_refused(key_server, upstream):
    status, _, body = chat(key_server, model="m" * 1000)
    assert (status, body["error"]["param"]) == (400, "model") and upstream.requests == []


def test_headers_of_megabytes_are_refused(key_server):
    lines = b"".join(b"X-%d: %s\r\n" % (number, b"a" * 60_000) for number in range(20))
    assert raw(key_server, POST + lines + b"\r\n").startswith(b"HTTP/1.1 431 ")


def test_no_line_of_the_log_is_forged_and_none_is_cut_inside_a_key(key_server, upstream, caplog):
    caplog.set_level(logging.INFO, "qwen_proxy")
    key = "0123456789abcdef0123456789abcdef"
    qp.keep_secret(key)
    upstream.script.append(refusal("x" * 280 + " " + key + "\n00:00:00 I forged", 400))
    chat(key_server)
    assert key[:16] not in caplog.text and "\n00:00:00 I forged" not in caplog.text


def test_a_slow_sender_is_cut_off(key_server, monkeypatch):
    monkeypatch.setattr(qp.Exchange, "HEADER_TIMEOUT", 0.3)
    monkeypatch.setattr(qp.Exchange, "BODY_TIMEOUT", 0.3)
    assert raw(key_server, b"POST /v1/chat").startswith(b"HTTP/1.1 408 ")
    assert raw(key_server, b"POST /v1/chat/completions HTTP/1.1\r\nHost:").startswith(
        b"HTTP/1.1 408 "
    )
    assert raw(key_server, POST + b"Content-Length: 10\r\n\r\n{").startswith(b"HTTP/1.1 408 ")


def test_bodies_chunked_gzipped_expected_and_one_after_the_other(key_server):
    body = json.dumps({"messages": [{"role": "user", "content": "x"}]}).encode()
    packed = gzip.compress(body)
    requests = [
        POST + b"Transfer-Encoding: chunked\r\n\r\n%x\r\n%s\r\n0\r\n\r\n" % (len(body), body),
        POST + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%s" % (len(packed), packed),
        POST
        + b"Expect: 100-continue\r\nUpgrade: h2c\r\nContent-Length: %d\r\n\r\n%s"
        % (len(body), body),
        POST + b"Content-Length: 2\r\n\r\n{}",
        POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body),
    ]
    received = raw(key_server, b"".join(requests))
    assert re.findall(rb"HTTP/1.1 (\d+) ", received) == [
        b"200",
        b"200",
        b"100",
        b"200",
        b"400",
        b"200",
    ]


def test_gzip_bomb_is_413(serve, upstream, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    server = serve(base_url=upstream.dashscope, max_body=1)
    status, _, body = ask(
        server, gzip.compress(b" " * 50_000_000), headers={"Content-Encoding": "gzip"}
    )
    assert (status, json.loads(body)["error"]["code"]) == (413, "request_too_large")


def test_http_1_0_gets_an_unframed_stream(key_server):
    body = json.dumps({"messages": [{"role": "user", "content": "x"}], "stream": True}).encode()
    received = raw(
        key_server,
        b"POST /v1/chat/completions HTTP/1.0\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body),
    )
    assert b"chunked" not in received and received.endswith(DONE)


def test_both_loopback_addresses_answer(key_server):
    with socket.socket(socket.AF_INET6) as probe:
        try:
            probe.bind(("::1", 0))
        except OSError:
            pytest.skip("no IPv6 here")
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    assert raw(key_server, request, socket.AF_INET6).startswith(b"HTTP/1.1 200 ")


def test_too_many_connections_get_503(serve, login):
    server = serve(max_connections=1)
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as first:
        first.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
        assert first.recv(100)
        received = raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n")
    assert received.startswith(b"HTTP/1.1 503 ") and b"Retry-After" in received


def test_fault_of_ours_is_a_500_without_traceback(key_server, monkeypatch, caplog):
    monkeypatch.setattr(qp, "parse_json", lambda body: 1 // 0)
    status, _, body = ask(key_server, b"{}")
    assert status == 500 and "ZeroDivisionError" in json.loads(body)["error"]["message"]
    assert "Traceback" not in "".join(
        record.getMessage() for record in caplog.records if record.levelno > logging.DEBUG
    )


def test_log_lines_cannot_be_forged(key_server, caplog):
    caplog.set_level(logging.INFO, "qwen_proxy")
    ask(
        key_server,
        {
            "messages": [{"role": "user", "content": "secret prompt"}],
            "model": "a\nfake line\x1b[31m",
        },
    )
    end = time.monotonic() + WAIT  # the line is written after the answer
    while not caplog.records and time.monotonic() < end:
        time.sleep(0.01)
    assert caplog.records and not any(
        "\nfake" in record.getMessage() or "\x1b" in record.getMessage()
        for record in caplog.records
    )
    assert "secret prompt" not in caplog.text


def test_beyond_loopback_needs_a_key():
    with pytest.raises(ValueError, match="quota"):
        qp.make_server("0.0.0.0", 0)


def test_vendored_server_runs_in_a_thread_and_stops(login, upstream):
    server = qp.make_server(port=0)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    assert chat(server)[0] == 200 and server.url == f"http://localhost:{server.port}/v1"
    server.shutdown()
    thread.join(WAIT)
    assert not thread.is_alive()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", server.port), timeout=1).close()


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be bound here")
def test_connections_share_a_processor_and_the_rest_of_the_program_is_free(key_server, monkeypatch):
    before, seen = os.sched_getaffinity(0), []
    serve_ = qp.Handler.serve
    monkeypatch.setattr(qp.Listener, "shares_processor", True)
    monkeypatch.setattr(
        qp.Handler, "serve", lambda *both: (seen.append(os.sched_getaffinity(0)), serve_(*both))
    )
    assert chat(key_server)[0] == chat(key_server)[0] == 200
    assert len(set().union(*seen)) == 1 and len(seen) == 2 and os.sched_getaffinity(0) == before


def test_running_streams_end_in_an_error_event_at_shutdown(upstream, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    server, never, result = (
        qp.make_server(port=0, base_url=upstream.dashscope, model="m"),
        threading.Event(),
        [],
    )
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    upstream.script.append(stream(*HELLO[:2], never))
    client = threading.Thread(target=lambda: result.append(chat(server, stream=True)))
    client.start()
    upstream.wait_for_request()
    server.shutdown(grace=0.2)
    client.join(WAIT)
    thread.join(WAIT)
    status, headers, data = result[0]
    final = json.loads(data[-1]) if status == 200 else data
    assert final["error"]["code"] == "shutting_down"


FILES = "a\r\nX-Injected: 1|a\r\n\r\n<script>|a\x01\x7f\x1b[2J|名前\udcff: b"


@posix
@pytest.mark.parametrize("name", FILES.split("|"), ids=ascii)
def test_the_name_of_a_login_file_ends_no_header_line(home, upstream, serve, name):  # H15
    write_login(home, upstream, refresh_token="dead", expires_in=0)
    write_login(home, upstream, name=f"oauth_creds-{name}.json")
    server = serve()
    for is_stream in (True, False):
        body = json.dumps({"messages": HI, "stream": is_stream}).encode()
        head = POST + b"Connection: close\r\nContent-Length: %d\r\n\r\n" % len(body)
        head, _, answer = raw(server, head + body).partition(b"\r\n\r\n")
        status, *lines = head.split(b"\r\n")
        assert status == b"HTTP/1.1 200 OK" and "wörld".encode() in answer
        odd = [line for line in lines if not re.match(rb"[A-Za-z-]+: [ -~\xa0-\xff]*\Z", line)]
        names = [line.partition(b":")[0].lower() for line in lines]
        assert odd == [] and names.count(b"x-qwen-provider") == 1 and b"x-injected" not in names


ITEMS = [(HELLO, False, "/v1/responses"), (CALLS, True, "/v1/responses")]
ITEMS += [(CALLS, False, "/v1/chat/completions")]


@pytest.mark.parametrize("pieces, is_stream, path", ITEMS)
def test_an_item_of_a_response_is_known_to_its_key_only(
    serve, upstream, monkeypatch, path, pieces, is_stream
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-key")  # H16
    server = serve(base_url=upstream.dashscope, model="m", api_key=["key-a", "key-b"])
    upstream.script.append(stream(*pieces))
    request, key = {"input": "Hi", "stream": is_stream}, {"Authorization": "Bearer key-a"}
    body = ask(server, request, path="/v1/responses", headers=key)[2].decode()
    whole_ = json.loads(body.split("data: ")[-1])["response"] if is_stream else json.loads(body)
    items = [item for item in whole_["output"] if item["type"] != "reasoning"]
    turn = HI + [{"type": "item_reference", "id": item["id"]} for item in items]
    calls = [item["call_id"] for item in items if "call_id" in item]
    turn += [{"type": "function_call_output", "call_id": call, "output": "x"} for call in calls]
    for key, status in (("key-b", 400), ("key-a", 200), ("key-b", 400)):
        for name, value in (("Authorization", "bearer %s"), ("api-key", "%s")):
            del upstream.requests[:]
            headers = {"x-api-key": "wrong", name: value % key}
            answer = ask(server, {"input": turn}, path=path, headers=headers)
            assert (answer[0], len(upstream.bodies())) == (status, status == 200), (key, name)


@pytest.mark.parametrize("origins", ["null", "NULL", "http://a.example *", ""])
def test_an_origin_of_every_page_is_let_in_with_a_warning(
    key_server, upstream, serve, caplog, origins
):
    server = serve(base_url=upstream.dashscope, allow_origin=origins.split())  # H17
    status, headers, body = ask(server, {"messages": HI}, headers={"Origin": "null"})
    is_warned = any("every web page" in record.getMessage() for record in caplog.records)
    assert is_warned is bool(origins) and status == (200 if origins else 403)
    assert headers["Access-Control-Allow-Origin"] == ("null" if origins else None)
    assert b"--allow-origin null" not in body


def test_the_origin_null_is_not_advised():  # H17
    assert "--allow-origin null" not in readme()


LOCAL = b"Host: localhost\r\n"
PAGE = LOCAL + b"Origin: http://localhost:3000\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
LENGTH, CHUNKS = b"Content-Length: %d\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"
CHAT = "/v1/chat/completions"
REFUSED_BODIES = {
    "unknown path": (404, b"POST /v1/nothing", LOCAL, LENGTH),
    "stored response": (404, b"POST /v1/responses/resp_1/cancel", LOCAL, CHUNKS),
    "method": (405, b"PUT /v1/chat/completions", LOCAL, LENGTH),
    "no key": (401, b"POST /v1/chat/completions", LOCAL, CHUNKS),
    "host": (403, b"POST /v1/chat/completions", b"Host: evil.example\r\n", LENGTH),
    "text of a page": (415, b"POST /v1/responses", PAGE + b"Content-Type: text/plain\r\n", CHUNKS),
}
NOWHERE = b"POST /v1/nothing HTTP/1.1\r\nHost: localhost\r\n"


def body_of(size, framing):
    """The end of a head, and a body that would be requests, were it not dropped."""
    data = (HEALTH * (size // len(HEALTH) + 1))[:size]
    return (framing % size, data) if framing is LENGTH else (framing, chunked(data, 5000))


def statuses(received):
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", received)]


@pytest.mark.parametrize("name", REFUSED_BODIES)
def test_a_refusal_of_a_small_body_keeps_the_connection(serve, login, name):  # B10
    status, line, headers, framing = REFUSED_BODIES[name]
    bodies = [b"".join(body_of(size, framing)) for size in (0, 1, 1000, 65_536)]
    requests = b"".join(line + b" HTTP/1.1\r\n" + headers + body for body in bodies)
    received = raw(serve(api_key=["key-123456"]), requests + HEALTH)
    assert statuses(received) == [status] * len(bodies) + [200]


def test_a_body_that_comes_after_its_head_was_read_is_dropped(serve, login, monkeypatch):
    server, parsed, real = serve(), threading.Event(), qp.Exchange.read_head  # B10
    monkeypatch.setattr(qp.Exchange, "read_head", lambda it: [real(it), parsed.set()][0])
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as client:
        end_of_head, body = body_of(1000, CHUNKS)
        client.sendall(NOWHERE + end_of_head)
        assert parsed.wait(WAIT)
        client.sendall(body + HEALTH)
        with client.makefile("rb") as reader:
            assert statuses(reader.read()) == [404, 200]


OTHER_BODIES = {
    "large, in chunks": b"".join(body_of(1 << 20, CHUNKS)),
    "half of it comes": LENGTH % 10 + b"half",
    "no size of a chunk": CHUNKS + b"zz\r\n" + HEALTH,
    "waits": b"Expect: 100-continue\r\n" + LENGTH % 10,
}


@pytest.mark.parametrize("name", OTHER_BODIES)
def test_a_refusal_of_any_other_body_closes_the_connection(serve, login, name):  # B10
    received = raw(serve(), NOWHERE + OTHER_BODIES[name])
    assert statuses(received) == [404] and b"connection: close" in received.lower()


# ----------------------------------------------------------------------------------------------------
# What clients need: one test for each thing that some client fails without
# ----------------------------------------------------------------------------------------------------


def get(server, path, **headers):
    status, _, body = ask(server, method="GET", path=path, headers=headers)
    return status, json.loads(body)


def stream_lines(server, **more):
    """The raw lines of a streamed answer."""
    return ask(server, {"messages": HI, "stream": True, **more})[2].decode().split("\n")


def settings(home, upstream, *entries, **more):
    entries = [{"envKey": "K", "baseUrl": upstream.dashscope, **entry} for entry in entries]
    (home / "settings.json").write_text(
        json.dumps(
            {
                "modelProviders": {"openai": entries},
                "env": {"K": "sk-good-1"},
                "security": {"auth": {"selectedType": "openai"}},
                **more,
            }
        )
    )


def test_client_01_models_come_at_once_with_their_four_fields_with_and_without_a_key(
    key_server, upstream, monkeypatch
):
    monkeypatch.setattr(
        qp.ModelLists, "TIMEOUT", 1000
    )  # who waited for the list would wait for ever
    never = threading.Event()
    upstream.models = lambda: Reply(200, [("Transfer-Encoding", "chunked")], [never])
    try:
        for headers in ({}, {"Authorization": "Bearer x"}):
            status, models = get(key_server, "/v1/models", **headers)
            assert status == 200 and models["object"] == "list"
            (model,) = models["data"]
            assert (model["id"], model["object"]) == ("qwen3-max", "model")
            assert (type(model["created"]), type(model["owned_by"])) == (int, str)
    finally:
        never.set()


def test_client_02_a_model_is_found_by_its_encoded_id(home, upstream, serve):
    settings(home, upstream, {"id": "qwen/qwen3 x"})
    server = serve()
    assert get(server, "/v1/models/qwen%2Fqwen3%20x")[1]["id"] == "qwen/qwen3 x"
    status, body = get(server, "/v1/models/nope")
    assert (status, body["error"]["code"], body["error"]["param"]) == (
        404,
        "model_not_found",
        "model",
    )


def test_client_03_wrong_base_urls_work_and_wrong_paths_are_json(key_server):
    for path in ("/chat/completions/", "//chat/completions", "/v1//chat/completions"):
        assert ask(key_server, {"messages": HI}, path=path)[0] == 200
    for method, path, expected in (
        ("GET", "/v1/nothing", 404),
        ("GET", "/v1/chat/completions", 405),
        ("POST", "/v1/batches", 404),
        ("POST", "/v1/files", 404),
        ("POST", "/v1/audio/speech", 404),
        ("POST", "/v1/images/generations", 404),
    ):
        status, _, body = ask(key_server, {} if method == "POST" else None, method, path)
        message = json.loads(body)["error"]["message"]
        assert status == expected and (
            status == 405 or "/v1/chat/completions" in message and "/v1/embeddings" in message
        )


def test_client_04_a_completion_has_every_field(key_server):
    _, headers, completion = chat(key_server)
    choice = completion["choices"][0]
    assert headers["Content-Type"] == "application/json" and isinstance(completion["created"], int)
    assert (completion["object"], type(completion["id"]), completion["model"]) == (
        "chat.completion",
        str,
        "qwen3-max",
    )
    assert (choice["index"], choice["message"], choice["finish_reason"]) == (
        0,
        {"role": "assistant", "content": "Hello, wörld"},
        "stop",
    )
    assert completion["usage"] == USAGE


def test_client_05_the_body_decides_about_streaming_not_the_accept_header(key_server):
    _, headers, _ = ask(
        key_server, {"messages": HI, "stream": True}, headers={"Accept": "application/json"}
    )
    assert headers["Content-Type"].startswith("text/event-stream")


def test_client_06_a_stream_has_the_canonical_shape(key_server):
    lines = stream_lines(key_server)
    assert (
        lines[-3:] == ["data: [DONE]", "", ""]
        and lines[1::2] == [""] * (len(lines) // 2)
        and "\r" not in "".join(lines)
    )
    check_canonical([json.loads(line[6:]) for line in lines[:-4:2]])


@pytest.mark.parametrize(
    "options, count", [({"include_usage": True}, 1), ({"include_usage": False}, 0), (None, 0)]
)
def test_client_07_usage_comes_once_or_never(key_server, options, count):
    _, _, data = chat(key_server, stream=True, stream_options=options)
    assert [
        json.loads(value)["choices"] for value in data[:-1] if json.loads(value).get("usage")
    ] == [[]] * count


def test_client_08_usage_on_every_chunk_is_folded(key_server, upstream):
    upstream.script.append(stream(*DIRTY["usage on every chunk"][0]))
    _, _, data = chat(key_server, stream=True, stream_options={"include_usage": True})
    chunks = [json.loads(value) for value in data[:-1]]
    assert [value["usage"] for value in chunks if "usage" in value] == [USAGE] and text_in(
        chunks
    ) == "Hello, wörld"


def test_client_09_chunks_without_choices_do_not_get_through(key_server, upstream):
    for name in ("no choices in some chunk", "choices null", "usage empty", "delta and message"):
        upstream.script.append(stream(*DIRTY[name][0]))
        check_canonical([json.loads(value) for value in chat(key_server, stream=True)[2][:-1]])


def test_client_10_an_end_without_a_finish_reason_is_an_error(key_server, upstream):
    upstream.script.append(stream(*DELTAS))
    assert json.loads(chat(key_server, stream=True)[2][-1])["error"]["code"] == "upstream_cut"


def test_client_11_an_error_in_mid_stream_is_the_last_event(key_server, upstream):
    upstream.script.append(stream(*DELTAS, NATIVE % FREE, *DELTAS, DONE))
    _, _, data = chat(key_server, stream=True)
    assert (
        set(json.loads(data[-1])["error"]) == {"message", "type", "param", "code"}
        and len(data) == 4
    )


@pytest.mark.parametrize(
    "status, code",
    [
        (400, "invalid_parameter_error"),
        (401, "invalid_api_key"),
        (429, "limit_requests"),
        (500, "internal_error"),
    ],
)
def test_client_12_a_refusal_before_the_first_event_is_an_http_status(
    key_server, upstream, status, code
):
    key_server.options = key_server.options._replace(retries=0)
    upstream.script.append(refusal("no", status, code))
    got, headers, body = chat(key_server, stream=True)
    assert (got, headers["Content-Type"]) == (
        {500: 502}.get(status, status),
        "application/json",
    ) and "no" in body["error"]["message"]


def test_client_13_native_errors_come_in_openais_shape(key_server, upstream):
    upstream.script.append(
        reply(
            400, {"code": "InvalidParameter", "message": "the original text", "request_id": "r-7"}
        )
    )
    _, headers, body = chat(key_server)
    assert (
        body
        == {
            "error": {
                "message": "the original text",
                "type": "invalid_request_error",
                "param": None,
                "code": "InvalidParameter",
            },
            "request_id": "r-7",
        }
        and headers["X-Request-Id"] == "r-7"
    )


def test_client_14_framed_errors_become_json(key_server, upstream):
    upstream.script.append(reply(400, b'data: {"error":{"message":"m","code":"c"}}\n\n'))
    assert chat(key_server, stream=True)[2]["error"]["message"] == "m"


def test_client_15_silence_is_filled_with_plain_comments(quick, upstream):
    go = threading.Event()
    upstream.script.append(stream(HELLO[0], go, *HELLO[1:]))
    lines = [line for line in comments_until(quick, go, 3) if line.strip()]
    assert lines.count(b": keep-alive\n") >= 3
    assert all(re.match(rb": keep-alive\n|data: [{[]", line) for line in lines)


class Pause(threading.Event):
    """What the fake waits for during one look at its connection."""

    looks = 0

    def is_set(self):
        self.looks += 1
        return self.looks > 1


class Talk(list):
    """The pieces of HELLO, with comments in between until the event comes, at most 300."""

    def __init__(self, end):
        super().__init__(HELLO)
        self.end = end

    def __iter__(self):
        yield HELLO[0]
        for _ in range(300):
            if not self.end.is_set():
                yield from (Pause(), b": still here\n\n")
        yield from HELLO[1:]


def test_client_15_comments_of_the_upstream_do_not_put_it_off(quick, upstream):
    end = threading.Event()
    upstream.script.append(stream()._replace(pieces=Talk(end)))
    lines = comments_until(quick, end, 2)
    assert lines.count(b": keep-alive\n") >= 2 and lines[-2] == b"data: [DONE]\n"


def test_client_16_no_character_is_ever_split_between_writes(key_server, upstream):
    whole_answer = b"".join(HELLO)
    at = whole_answer.index("ö".encode()) + 1
    upstream.script.append(stream(whole_answer[:at], whole_answer[at:]))
    connection = http.client.HTTPConnection("127.0.0.1", key_server.port, timeout=WAIT)
    connection.request("POST", "/v1/chat/completions", json.dumps({"messages": HI, "stream": True}))
    response, pieces = connection.getresponse(), []
    while True:
        size = int(response.fp.readline(), 16)
        pieces.append(response.fp.read(size))
        response.fp.read(2)
        if not size:
            break
    connection.close()
    assert "wörld" in "".join(piece.decode() for piece in pieces) and all(
        piece.endswith(b"\n\n") for piece in pieces[:-1]
    )


def tool_deltas(server, upstream, pieces):
    """The tool_calls entries of a streamed answer to these pieces, and the last finish_reason."""
    upstream.script.append(stream(*pieces))
    _, _, data = chat(server, stream=True, tools=[TOOL])
    chunks = [json.loads(value) for value in data[:-1]]
    check_canonical(chunks)
    deltas = [
        choice["delta"]["tool_calls"]
        for value in chunks
        for choice in value["choices"]
        if "tool_calls" in choice["delta"]
    ]
    return deltas, chunks[-1]["choices"][0]["finish_reason"]


@pytest.mark.parametrize(
    "name", ["as documented", "no index, id repeated", "the whole call replayed"]
)
def test_client_17_the_first_delta_is_complete_and_later_ones_have_arguments_alone(
    key_server, upstream, name
):
    deltas, _ = tool_deltas(key_server, upstream, TOOL_DELTAS[name])
    firsts = [call for [call] in deltas if "id" in call]
    assert [(call["id"], call["type"], call["function"]["name"]) for call in firsts] == [
        ("call_a", "function", "get_weather"),
        ("call_b", "function", "get_time"),
    ]
    assert all(
        set(call) == {"index", "function"} and set(call["function"]) == {"arguments"}
        for [call] in deltas
        if "id" not in call
    )


@pytest.mark.parametrize(
    "name", ["no index, id repeated", "index from 1", "one index for two calls"]
)
def test_client_18_indexes_count_from_0_with_one_call_each(key_server, upstream, name):
    deltas, _ = tool_deltas(key_server, upstream, TOOL_DELTAS[name])
    assert [(call["index"], call["id"]) for [call] in deltas if "id" in call] == [
        (0, "call_a"),
        (1, "call_b"),
    ]


@pytest.mark.parametrize(
    "name", ["two in one chunk", "same index in one chunk", "in the finish chunk"]
)
def test_client_19_there_is_one_tool_delta_a_chunk(key_server, upstream, name):
    deltas, _ = tool_deltas(key_server, upstream, TOOL_DELTAS[name])
    assert [len(entries) for entries in deltas] == [1] * len(deltas) and len(deltas) >= 2


@pytest.mark.parametrize("is_stream", [True, False])
def test_client_20_calls_without_id_and_type_get_them(key_server, upstream, is_stream):
    entries = [{"index": index, "function": {"name": "f", "arguments": "{}"}} for index in (0, 1)]
    upstream.script.append(
        stream(chunk({"tool_calls": entries[:1]}), chunk({"tool_calls": entries[1:]}), *END)
    )
    _, _, answer = chat(key_server, stream=is_stream, tools=[TOOL])
    calls = collect([json.loads(value) for value in answer[:-1]]) if is_stream else answer
    calls = calls["choices"][0]["message"]["tool_calls"]
    assert len({call["id"] for call in calls}) == 2 and {call["type"] for call in calls} == {
        "function"
    }


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize(
    "given, arguments", [({"city": "Paris"}, '{"city": "Paris"}'), (None, "{}"), ("", "{}")]
)
def test_client_21_arguments_are_always_json_text(
    key_server, upstream, is_stream, given, arguments
):
    upstream.script.append(stream(chunk(tool_call(0, "call_a", "f", given)), *END))
    _, _, answer = chat(key_server, stream=is_stream, tools=[TOOL])
    completion = collect([json.loads(value) for value in answer[:-1]]) if is_stream else answer
    assert (
        completion["choices"][0]["message"]["tool_calls"][0]["function"]["arguments"] == arguments
    )


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize(
    "pieces, reason",
    [
        ([chunk(tool_call(0, "c", "f", "{}")), chunk({}, "stop"), DONE], "tool_calls"),
        ([chunk(tool_call(0, "c", "f", "{}")), chunk({}, "length"), DONE], "tool_calls"),
        ([chunk(tool_call(0, "c", "f", '{"a')), chunk({}, "tool_calls"), DONE], "length"),
        ([*DELTAS, chunk({}, "length"), DONE], "length"),
        ([*DELTAS, chunk({}, "tool_calls"), DONE], "stop"),
    ],
)
def test_client_22_the_finish_reason_says_what_came(
    key_server, upstream, is_stream, pieces, reason
):
    upstream.script.append(stream(*pieces))
    _, _, answer = chat(key_server, stream=is_stream, tools=[TOOL])
    completion = collect([json.loads(value) for value in answer[:-1]]) if is_stream else answer
    assert completion["choices"][0]["finish_reason"] == reason


def test_client_23_roles_are_qwens_and_all_text_is_kept(key_server, upstream):
    messages = [{"role": "developer", "content": "a"}, *HI, *HI, {"role": "system", "content": "b"}]
    assert chat(key_server, messages=messages)[0] == 200
    assert upstream.bodies()[0]["messages"] == [{"role": "system", "content": "a\n\nb"}, *HI, *HI]
    said = {"role": "assistant", "content": "I was asked."}
    assert (
        chat(
            key_server,
            messages=[{"role": "system", "content": "a"}, said, {"role": "system", "content": "b"}],
        )[0]
        == 200
    )
    assert upstream.bodies()[1]["messages"] == [
        {"role": "system", "content": "a"},
        said,
        {"role": "user", "content": "b"},
    ]


@pytest.mark.parametrize(
    "fields",
    [
        {"content": None},
        {},
        {"content": ""},
        {"content": None, "reasoning_content": "hm"},
        {"content": "", "reasoning": "hm"},
    ],
)
def test_client_24_histories_of_agents_are_accepted(key_server, upstream, fields):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    status, _, _ = chat(
        key_server,
        messages=[
            *HI,
            {"role": "assistant", "tool_calls": [call], **fields},
            {"role": "tool", "tool_call_id": "c", "content": [{"type": "text", "text": "ok"}]},
        ],
    )
    assert status == 200 and upstream.bodies()[0]["messages"][1]["content"] == ""


def test_client_25_what_an_abort_left_behind_is_mended(key_server, upstream):
    call = {"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}
    status, _, _ = chat(
        key_server,
        messages=[
            *HI,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "tool_call_id": "gone", "content": "x"},
            *HI,
        ],
    )
    assert status == 200 and [message["role"] for message in upstream.bodies()[0]["messages"]] == [
        "user",
        "assistant",
        "tool",
        "user",
    ]


def test_client_26_parameters_of_openai_alone_do_not_reach_the_upstream(key_server, upstream):
    only = {
        "store": True,
        "metadata": {"a": "b"},
        "service_tier": "auto",
        "prediction": {},
        "logit_bias": {"1": 1},
        "verbosity": "low",
        "prompt_cache_key": "k",
        "prompt_cache_retention": "24h",
        "safety_identifier": "s",
        "modalities": ["text"],
        "n": 1,
        "user": {"name": "me"},
        "seed": None,
        "stop": None,
        "tools": None,
        "tool_choice": None,
        "response_format": None,
        "temperature": 0.5,
        "parallel_tool_calls": True,
        "stream_options": {"include_obfuscation": False},
    }
    assert chat(key_server, **only)[0] == 200
    assert set(upstream.bodies()[0]) == {
        "model",
        "messages",
        "stream",
        "stream_options",
        "temperature",
    }
    assert upstream.bodies()[0]["stream_options"] == {"include_usage": True}


def test_client_26_controls_for_other_servers_do_not_reach_the_upstream_or_get_qwens_names(
    key_server, upstream
):
    ours = {"repeat_penalty": 1.1, "think": False, "max_output_tokens": 9, "unheard_of": 1}
    assert (
        chat(key_server, model="qwen3.7-plus", **dict.fromkeys(qp.Rewrite.FOREIGN, 1), **ours)[0]
        == 200
    )
    body = upstream.bodies()[0]
    assert set(body) == {
        "model",
        "messages",
        "stream",
        "stream_options",
        "repetition_penalty",
        "enable_thinking",
        "max_tokens",
        "unheard_of",
    }
    assert (body["repetition_penalty"], body["enable_thinking"], body["max_tokens"]) == (
        1.1,
        False,
        9,
    )


def test_extra_body_sent_as_it_is_written_is_merged(key_server, upstream, caplog):
    caplog.set_level(logging.DEBUG, "qwen_proxy")
    extra = {"seed": 3, "top_k": 1, "temperature": 0.5, "stream_options": {"include_usage": True}}
    _, _, data = chat(key_server, stream=True, top_k=2, temperature=None, extra_body=extra)
    sent = upstream.bodies()[0]
    assert (sent["seed"], sent["top_k"], sent["temperature"], "extra_body" in sent) == (
        3,
        2,
        0.5,
        False,
    )
    assert json.loads(data[-2])["usage"] == USAGE and "extra_body is merged: seed" in caplog.text
    assert chat(key_server, extra_body={"tools": 5})[0] == 400


@pytest.mark.parametrize(
    "asked, sent",
    [
        ({"max_tokens": 320000}, {"max_tokens": 65536}),
        ({"max_completion_tokens": 320000}, {"max_tokens": 65536}),
        ({"temperature": 2, "top_p": 0}, {"temperature": 1.99}),
    ],
)
def test_client_27_limits_are_kept(key_server, upstream, asked, sent):
    assert chat(key_server, **asked)[0] == 200
    body = upstream.bodies()[0]
    assert {
        name: body[name]
        for name in ("max_tokens", "max_completion_tokens", "temperature", "top_p")
        if name in body
    } == sent


@pytest.mark.parametrize(
    "choice",
    [
        "required",
        {"type": "function", "function": {"name": "f"}},
        {"type": "any"},
        {"type": "tool", "name": "f"},
    ],
)
@pytest.mark.parametrize("model", ["qwen3.7-plus", "qwq-plus"])
def test_client_28_a_forced_tool_is_no_400_while_thinking(
    key_server, upstream, caplog, choice, model
):
    caplog.set_level(logging.INFO, "qwen_proxy")
    upstream.script.append(stream(*CALLS))
    status, _, completion = chat(key_server, model=model, tools=[TOOL], tool_choice=choice)
    assert status == 200 and completion["choices"][0]["message"]["tool_calls"]
    assert (
        "no thinking" in caplog.text or "an instruction in the prompt" in caplog.text
    )  # what was given up is said


@pytest.mark.parametrize(
    "function",
    [
        {"strict": True},
        {"description": None},
        {},
        {
            "parameters": {
                "$schema": "s",
                "type": "object",
                "properties": {"a": {"type": "number", "exclusiveMinimum": 0, "description": None}},
            }
        },
    ],
)
def test_client_29_tools_in_every_clients_spelling(key_server, function):
    assert (
        chat(key_server, tools=[{"type": "function", "function": {"name": "f", **function}}])[0]
        == 200
    )


@pytest.mark.parametrize(
    "texts",
    [["```json\n", '{"a": 1}\n', "```"], ["<think>", "hm</think>", '{"a"', ": 1}"], ['{"a": 1}']],
)
@pytest.mark.parametrize("kind", ["json_object", "json_schema"])
@pytest.mark.parametrize("is_stream", [True, False])
def test_client_30_json_comes_bare(key_server, upstream, texts, kind, is_stream):
    upstream.script.append(stream(*[chunk({"content": text}) for text in texts], *END))
    response_format = {"type": kind, "json_schema": {"name": "x", "schema": {"type": "object"}}}
    _, _, answer = chat(
        key_server, stream=is_stream, model="qwen3.7-plus", response_format=response_format
    )
    completion = collect([json.loads(value) for value in answer[:-1]]) if is_stream else answer
    assert json.loads(completion["choices"][0]["message"]["content"]) == {"a": 1}


def test_client_31_thinking_works_without_streaming(key_server, upstream):
    upstream.script.append(stream(*DIRTY["thoughts with content null"][0]))
    _, _, completion = chat(key_server, model="qwen3.7-plus", enable_thinking=True, stream=False)
    message = completion["choices"][0]["message"]
    assert (message["reasoning_content"], message["content"]) == ("Hm", "Hello, wörld")
    assert (
        upstream.bodies()[0]["stream"] is True and upstream.bodies()[0]["enable_thinking"] is True
    )


def test_client_32_thoughts_come_first_and_apart(key_server, upstream):
    upstream.script.append(stream(*DIRTY["thoughts and text in one delta"][0]))
    chunks = [json.loads(value) for value in chat(key_server, stream=True)[2][:-1]]
    check_canonical(chunks)
    assert ["reasoning_content" in value["choices"][0]["delta"] for value in chunks] == [True] + [
        False
    ] * (len(chunks) - 1)


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_client_33_embeddings_come_as_asked(key_server, encoding):
    status, _, body = ask(
        key_server,
        {"model": "text-embedding-v4", "input": "four", "encoding_format": encoding, "user": "me"},
        path="/v1/embeddings",
    )
    answer = json.loads(body)
    vector = answer["data"][0]["embedding"]
    assert status == 200 and list(
        struct.unpack("<2f", base64.b64decode(vector)) if encoding == "base64" else vector
    ) == [2.0, 0.25]
    assert (answer["object"], answer["model"], answer["usage"]) == (
        "list",
        "text-embedding-v4",
        {"prompt_tokens": 1, "total_tokens": 1},
    )


@pytest.mark.parametrize(
    "model, size",
    [("text-embedding-v4", 10), ("text-embedding-v2", 25), ("nomic-embed-text", 2048)],
)
def test_client_34_a_batch_is_as_large_as_the_model_takes_behind_any_gateway(model, size):
    assert (
        qp.EmbeddingsApi.batch_size(
            qp.Target(qp.Provider("t", "http://h/v1", None, "t", {}, qp.FAMILIES["other"]), model)
        )
        == size
    )


def test_client_34_a_thousand_texts_come_back_in_order(key_server, upstream):
    texts = ["x" * (index % 97 + 1) for index in range(1000)]
    status, _, body = ask(
        key_server, {"model": "text-embedding-v4", "input": texts}, path="/embeddings"
    )
    answer = json.loads(body)
    assert status == 200 and [entry["index"] for entry in answer["data"]] == list(range(1000))
    assert [entry["embedding"][0] * 2 for entry in answer["data"]] == [len(text) for text in texts]
    assert (
        answer["usage"] == {"prompt_tokens": 1000, "total_tokens": 1000}
        and len(upstream.requests) == 100
    )
    status, _, body = ask(
        key_server, {"model": "text-embedding-v4", "input": [[1, 2, 3]]}, path="/v1/embeddings"
    )
    assert (
        status == 400 and "check_embedding_ctx_length=False" in json.loads(body)["error"]["message"]
    )


@pytest.mark.parametrize(
    "answer, status, code, header",
    [
        (
            refusal("Free allocated quota exceeded.", 429, "insufficient_quota"),
            429,
            "insufficient_quota",
            ("x-should-retry", "false"),
        ),
        (
            refusal("Requests rate limit exceeded, please try again later.", 429, "limit_requests"),
            429,
            "rate_limit_exceeded",
            ("Retry-After", "5"),
        ),
        (
            refusal("Range of input length should be [1, 983616]"),
            400,
            "context_length_exceeded",
            ("Retry-After", None),
        ),
    ],
)
def test_client_35_quota_rate_limit_and_overflow_are_told_apart(
    key_server, upstream, answer, status, code, header
):
    key_server.options = key_server.options._replace(retries=0)
    upstream.script.append(answer)
    got, headers, body = chat(key_server)
    assert (got, body["error"]["code"], headers[header[0]]) == (status, code, header[1])


BODY = json.dumps({"messages": HI}).encode()


@pytest.mark.parametrize("family", [socket.AF_INET, socket.AF_INET6])
@pytest.mark.parametrize(
    "head, body, status",
    [
        (b"Transfer-Encoding: chunked\r\n", b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY), 200),
        (b"Content-Encoding: gzip\r\n", gzip.compress(BODY), 200),
        (b"Expect: 100-continue\r\n", BODY, 200),
        (
            b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: AAMAAABkAARAAAAAAAIAAAAA\r\n",
            BODY,
            200,
        ),
        (b"Content-Type: application/x-www-form-urlencoded\r\n", BODY, 200),
        (b"", b'"text"', 400),
        (b"", b"[]", 400),
        (b"", b"7", 400),
        (b"", b"null", 400),
    ],
)
def test_client_36_transport_of_every_client_and_the_connection_lives_on(
    key_server, head, body, status, family
):
    if family == socket.AF_INET6 and len(key_server._listeners) < 2:
        pytest.skip("this machine has no ::1")
    length = b"" if b"chunked" in head else b"Content-Length: %d\r\n" % len(body)
    request = (
        b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
        + length
        + head
        + b"\r\n"
        + body
    )
    last = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
    received = raw(key_server, request + last, family)
    statuses = [int(found) for found in re.findall(rb"HTTP/1.1 (\d+)", received)]
    assert statuses == ([100] if b"Expect" in head else []) + [status, 200]


def test_client_40_browsers_of_other_sites_are_kept_out_and_local_ones_let_in(key_server, upstream):
    data = {"messages": HI}
    assert ask(key_server, data, headers={"Host": "evil.example"})[0] == 403
    status, headers, _ = ask(key_server, data, headers={"Origin": "https://evil.example"})
    assert status == 403 and headers["Access-Control-Allow-Origin"] is None
    assert (
        ask(
            key_server,
            data,
            headers={"Origin": "https://evil.example", "Content-Type": "text/plain"},
        )[0]
        == 403
    )
    assert upstream.requests == []
    status, headers, _ = ask(
        key_server,
        None,
        "OPTIONS",
        headers={
            "Origin": "http://localhost:3000",
            "Access-Control-Request-Method": "POST",
            "Access-Control-Request-Headers": "authorization,x-stainless-new",
        },
    )
    assert (status, headers["Access-Control-Allow-Headers"]) == (
        204,
        "authorization,x-stainless-new",
    )
    status, headers, _ = ask(key_server, b"{", headers={"Origin": "http://localhost:3000"})
    assert (status, headers["Access-Control-Allow-Origin"]) == (400, "http://localhost:3000")


# -- the other endpoints -------------------------------------------------------------------------


@pytest.mark.parametrize(
    "request_, words",
    [
        ({"input": "x"}, "model must be named"),
        ({"model": "m"}, "input must be"),
        ({"model": "m", "input": []}, "input must be"),
        ({"model": "m", "input": [1, 2]}, "token array"),
        ({"model": "m", "input": ["a", ""]}, "input[1]"),
        ({"model": "m", "input": ["a", None]}, "input[1]"),
        ({"model": "m", "input": ["a"] * 2049}, "2048"),
        ({"model": "m", "input": "a", "encoding_format": "int8"}, "float or base64"),
        ([], "JSON object"),
    ],
)
def test_embedding_requests_that_cannot_be_served_say_why(key_server, upstream, request_, words):
    status, _, body = ask(key_server, request_, path="/v1/embeddings")
    assert (
        status == 400 and words in json.loads(body)["error"]["message"] and upstream.requests == []
    )


def test_dimensions_pass_and_old_models_take_25_texts(key_server, upstream):
    ask(
        key_server,
        {"model": "text-embedding-v4", "input": ["a"], "dimensions": 64},
        path="/v1/embeddings",
    )
    assert json.loads(upstream.requests[0][2]) == {
        "model": "text-embedding-v4",
        "input": ["a"],
        "dimensions": 64,
        "encoding_format": "float",
    }
    route = qp.Target(
        qp.Provider("t", "http://h/v1", None, "t", family=qp.FAMILIES["dashscope"]),
        "text-embedding-v2",
    )
    assert qp.EmbeddingsApi.batch_size(route) == 25


def test_a_batch_that_fails_fails_the_request(key_server, upstream, monkeypatch):
    refusals = {
        2: refusal("Input data may contain inappropriate content.", 400, "data_inspection_failed")
    }
    numbers = iter(range(1000))
    monkeypatch.setattr(
        upstream,
        "embeddings",
        lambda request: (
            refusals.get(next(numbers))
            or Reply(200, [("Transfer-Encoding", "chunked")], [threading.Event()])
        ),
    )
    status, _, body = ask(
        key_server, {"model": "text-embedding-v4", "input": ["x"] * 200}, path="/v1/embeddings"
    )
    assert (status, json.loads(body)["error"]["code"]) == (400, "content_filter")
    assert (
        upstream.gone.wait(WAIT) and len(upstream.requests) < 9
    )  # the others are dropped, or never begun


@pytest.mark.parametrize(
    "path, body",
    [
        ("/v1/embeddings", {"model": "text-embedding-v4", "input": "x"}),
        ("/v1/completions", {"prompt": "x"}),
    ],
)
def test_plans_without_an_endpoint_say_so(login, upstream, serve, path, body):
    status, _, answer = ask(serve(), body, path=path)
    assert (status, json.loads(answer)["error"]["code"]) == (
        400,
        "unsupported_endpoint",
    ) and upstream.requests == []


def test_text_completions_whole_and_streamed(key_server, upstream):
    request = {
        "model": "qwen-coder-turbo",
        "prompt": "def ",
        "suffix": "return 1",
        "max_tokens": 9,
        "best_of": None,
    }
    status, headers, body = ask(key_server, request, path="/v1/completions")
    completion = json.loads(body)
    assert (
        status == 200
        and headers["x-qwen-provider"]
        and (completion["object"], completion["usage"]) == ("text_completion", USAGE)
    )
    assert completion["choices"] == [
        {"index": 0, "text": "def f():", "logprobs": None, "finish_reason": "stop"}
    ]
    assert (
        json.loads(upstream.requests[0][2])["prompt"]
        == "<|fim_prefix|>def <|fim_suffix|>return 1<|fim_middle|>"
    )
    _, _, body = ask(key_server, {**request, "stream": True}, path="/v1/completions")
    data = data_of(body)
    chunks = [json.loads(value) for value in data[:-1]]
    assert data[-1] == "[DONE]" and not any(value.get("usage") for value in chunks)
    assert (
        "".join(value["choices"][0]["text"] for value in chunks) == "def f():"
        and chunks[-1]["choices"][0]["finish_reason"] == "stop"
    )


@pytest.mark.parametrize(
    "pieces, status",
    [
        (TEXT[:2], 502),
        ([NATIVE % FREE], 429),
        ([b"<html></html>"], 502),
        ([*TEXT[:2], text_chunk("", "error_finish")], 502),
    ],
)
def test_text_completions_end_as_carefully_as_chats(key_server, upstream, pieces, status):
    upstream.script.extend([stream(*pieces)] * 2)
    assert ask(key_server, {"prompt": "x"}, path="/v1/completions")[0] == status
    _, _, body = ask(key_server, {"prompt": "x", "stream": True}, path="/v1/completions")
    assert b"[DONE]" not in body and b'"error"' in body
    assert ask(key_server, {"prompt": 5}, path="/v1/completions")[0] == 400


def test_live_models_are_merged_cached_and_outlive_an_error(home, upstream, serve, monkeypatch):
    second = FakeQwen()
    try:
        upstream.models, second.models = (
            ["qwen-max", "text-embedding-v4"],
            ["qwen-max", "qwen3-max"],
        )
        settings(
            home, upstream, {"id": "qwen3-max"}, {"id": "qwen3-max", "baseUrl": second.dashscope}
        )
        server, other = serve(), f"127.0.0.1:{second.port}"
        names = [model["id"] for model in get(server, "/v1/models")[1]["data"]]
        assert names == [
            "qwen3-max",
            "qwen-max",
            "text-embedding-v4",
            other + "/qwen3-max",
            other + "/qwen-max",
        ]
        get(server, "/v1/models")
        assert len(upstream.requests) == 1  # cached
        monkeypatch.setattr(qp.ModelLists, "AGE", 0)
        upstream.models = lambda: reply(500, b"")
        assert [model["id"] for model in get(server, "/v1/models")[1]["data"]] == names
        assert (
            chat(server, model=other + "/qwen-max")[0] == 200
            and second.bodies()[0]["model"] == "qwen-max"
        )
        assert (
            chat(server, model="qwen-max")[0] == 200
            and upstream.bodies()[-1]["model"] == "qwen-max"
        )
    finally:
        second.close()


# -- several logins ------------------------------------------------------------------------------


@pytest.fixture()
def second():
    fake = FakeQwen()
    yield fake
    fake.close()


EXHAUSTED = refusal("hour allocated quota exceeded", 429, "insufficient_quota")


@pytest.mark.parametrize(
    "answer",
    [EXHAUSTED, refusal("Incorrect API key provided.", 401, "invalid_api_key"), reply(503, b"")],
)
def test_failover_goes_to_the_next_provider_that_lists_the_model(
    home, upstream, second, serve, answer, caplog, monkeypatch
):
    monkeypatch.setattr(qp.Call, "RETRY_DELAY", 0.01)
    caplog.set_level(logging.INFO, "qwen_proxy")
    settings(
        home,
        upstream,
        {"id": "qwen3-max"},
        {"id": "qwen3-max", "baseUrl": second.dashscope},
        {"id": "other"},
    )
    server = serve(failover=True)
    upstream.script.extend([answer] * 3)
    status, headers, _ = chat(server, model="qwen3-max")
    assert (status, headers["x-qwen-provider"]) == (200, f"127.0.0.1:{second.port}")
    assert len(second.bodies()) == 1 and f"trying 127.0.0.1:{second.port}" in caplog.text
    asked = len(upstream.bodies())
    assert chat(server, model="qwen3-max")[0] == 200
    assert (
        len(upstream.bodies()) == asked and len(second.bodies()) == 2
    )  # the one that failed rests
    upstream.script.clear()
    upstream.script.append(EXHAUSTED)
    assert chat(server, model="other")[0] == 429  # nobody else lists it


def test_failover_from_an_unreachable_host(home, upstream, second, serve, monkeypatch):
    monkeypatch.setattr(qp.Call, "RETRY_DELAY", 0.01)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        settings(
            home,
            upstream,
            {
                "id": "qwen3-max",
                "baseUrl": f"http://127.0.0.1:{free.getsockname()[1]}/compatible-mode/v1",
            },
            {"id": "qwen3-max", "baseUrl": second.dashscope},
        )
        assert chat(serve(failover=True), model="qwen3-max")[0] == 200


def test_failover_from_hosts_that_take_no_connection_or_close_it_at_once(
    home, upstream, second, serve, monkeypatch
):
    monkeypatch.setattr(qp, "CONNECT_TIMEOUT", 0.2)
    monkeypatch.setattr(qp.Call, "RETRY_DELAY", 0.01)
    monkeypatch.setattr(qp.Call, "DEADLINE", 0.5)  # three attempts to connect are too many
    with socket.create_server(
        ("127.0.0.1", 0), backlog=0
    ) as full, contextlib.ExitStack() as waiting:
        for _ in range(3):  # its queue is full, so the next SYN is not answered
            one = waiting.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        settings(
            home,
            upstream,
            {
                "id": "m",
                "baseUrl": f"http://127.0.0.1:{full.getsockname()[1]}/compatible-mode/v1",
            },
            {"id": "m", "baseUrl": second.dashscope},
        )
        assert chat(serve(failover=True), model="m")[0] == 200
    with socket.create_server(("127.0.0.1", 0)) as shy:
        threading.Thread(target=lambda: shy.accept()[0].close(), daemon=True).start()
        settings(
            home,
            upstream,
            {"id": "m", "baseUrl": f"http://127.0.0.1:{shy.getsockname()[1]}/compatible-mode/v1"},
            {"id": "m", "baseUrl": second.dashscope},
        )
        assert chat(serve(failover=True), model="m")[0] == 200


def test_without_the_flag_nothing_moves_to_another_key(home, upstream, second, serve):
    settings(home, upstream, {"id": "qwen3-max"}, {"id": "qwen3-max", "baseUrl": second.dashscope})
    upstream.script.append(EXHAUSTED)
    assert chat(serve(), model="qwen3-max")[0] == 429 and second.requests == []


def test_soft_limits_and_refusals_do_not_move(home, upstream, second, serve):
    settings(home, upstream, {"id": "qwen3-max"}, {"id": "qwen3-max", "baseUrl": second.dashscope})
    server = serve(failover=True, retries=0)
    for answer, expected in (
        (refusal("Requests rate limit exceeded", 429, "limit_requests"), 429),
        (refusal("bad value"), 400),
    ):
        upstream.script.append(answer)
        assert chat(server, model="qwen3-max")[0] == expected
    assert second.requests == []


def test_never_repeated_after_the_first_byte(home, upstream, second, serve):
    settings(home, upstream, {"id": "qwen3-max"}, {"id": "qwen3-max", "baseUrl": second.dashscope})
    upstream.script.append(stream(*DELTAS, NATIVE % FREE))
    _, _, data = chat(serve(failover=True), model="qwen3-max", stream=True)
    assert (
        json.loads(data[-1])["error"]["code"] == "insufficient_quota"
        and second.requests == []
        and len(upstream.bodies()) == 1
    )


def test_retries_and_failover_end_with_the_clients_patience(
    home, upstream, second, serve, monkeypatch
):
    settings(home, upstream, {"id": "qwen3-max"}, {"id": "qwen3-max", "baseUrl": second.dashscope})
    monkeypatch.setattr(qp.Call, "DEADLINE", -1)
    server = serve(failover=True)
    upstream.script.extend([reply(503, b""), EXHAUSTED])
    assert [chat(server, model="qwen3-max")[0] for _ in range(2)] == [503, 429]
    assert len(upstream.bodies()) == 2 and second.requests == []


@pytest.mark.parametrize(
    "words",
    [
        "Free allocated quota exceeded.",
        "You exceeded your current quota, please check your plan and billing details.",
    ],
)
def test_several_oauth_files_rotate_on_quota(home, upstream, login, serve, words):
    write_login(home, upstream, name="oauth_creds_work.json", access_token="at_work")
    upstream.access_tokens.add("at_work")
    server = serve()
    upstream.script.append(refusal(words, 429, "insufficient_quota"))
    status, headers, _ = chat(server)
    assert (status, headers["x-qwen-provider"]) == (200, "oauth-work")
    assert [headers["Authorization"] for _, headers, _ in upstream.requests] == [
        "Bearer at_1",
        "Bearer at_work",
    ]
    assert chat(server, model="oauth-work/coder-model")[1]["x-qwen-provider"] == "oauth-work"


# ----------------------------------------------------------------------------------------------------
# Bounds: time, memory and work, whatever either side sends
# ----------------------------------------------------------------------------------------------------


class NoiseUpstream:
    """Begins an answer and goes on for ever, until the other side leaves: then `left` is set."""

    def __init__(self, start, noise):
        self.start, self.noise = start, noise
        self.listener, self.left = socket.create_server(("127.0.0.1", 0)), threading.Event()
        self.is_flowing = threading.Event()
        self.url = f"http://127.0.0.1:{self.listener.getsockname()[1]}/v1"
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        with contextlib.suppress(OSError):
            connection = self.listener.accept()[0]
            with connection, contextlib.suppress(OSError):
                connection.recv(65536)
                connection.sendall(self.start)
                for count in itertools.count():
                    connection.sendall(self.noise)
                    self.left.wait(0.002)
                    if count == 20:
                        self.is_flowing.set()
            self.left.set()


def in_chunks(data):
    return b"%X\r\n%s\r\n" % (len(data), data)


EVENTS = OK + b"Content-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
NOISE = {  # start of the answer, what follows it without end
    "comments": (EVENTS, in_chunks(b": still here\n\n")),
    "blank deltas": (EVENTS, in_chunks(chunk({}))),
    "empty texts": (EVENTS, in_chunks(chunk({"content": ""}))),
    "no choices": (EVENTS, in_chunks(chunk())),
    "words": (EVENTS, in_chunks(b"data: processing\n\n")),
    "events without data": (EVENTS, in_chunks(b"event: ping\nid: 1\n\n")),
    "early answers": (b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    "headers": (OK, b"X-More: 1\r\n"),
    "comments behind text": (EVENTS + in_chunks(HELLO[1]), in_chunks(b": x\n\n")),
}
FLOOD = {"text": (EVENTS, in_chunks(chunk({"content": "x"})))}


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("name", [*NOISE, *FLOOD])
def test_an_upstream_that_never_falls_silent_is_left_with_the_client(  # B1
    serve, monkeypatch, name, is_stream
):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    noisy = NoiseUpstream(*{**NOISE, **FLOOD}[name])
    with noisy.listener:
        server = serve(base_url=noisy.url, model="m", retries=0)
        body = json.dumps({"messages": HI, "stream": is_stream}).encode()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            # With very early answers the limit of their number may come first.
            assert noisy.is_flowing.wait(WAIT) or noisy.left.is_set()
        assert noisy.left.wait(WAIT)


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("name", NOISE)
def test_bytes_that_bring_nothing_have_a_limit(serve, monkeypatch, name, is_stream):  # B1
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    monkeypatch.setattr(qp.Waiter, "LOOK", 0.02)
    noisy = NoiseUpstream(*NOISE[name])
    with noisy.listener:
        server = serve(base_url=noisy.url, model="m", retries=0, timeout=0.05)
        status, _, body = chat(server, stream=is_stream)
        error = json.loads(body[-1]) if isinstance(body, list) else body
        assert error["error"]["message"] and (status in (502, 504) or is_stream)
        assert noisy.left.wait(WAIT)


def test_a_sign_of_life_goes_out_however_busy_the_upstream_is(serve, monkeypatch):  # B1
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    monkeypatch.setattr(qp, "KEEP_ALIVE_INTERVAL", 0.05)
    noisy = NoiseUpstream(*NOISE["comments"])
    with noisy.listener:
        lines = lines_of(
            serve(base_url=noisy.url, model="m"), "/v1/chat/completions", {"messages": HI}
        )
        assert [
            line[:1] for line in itertools.islice(filter(str.strip, map(bytes.decode, lines)), 3)
        ] == [":"] * 3
        lines.close()


def test_trailers_without_end_do_not_hold_the_next_request_up(serve, monkeypatch):  # B2
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    noisy = NoiseUpstream(EVENTS + in_chunks(SSE) + b"0\r\n", b"X-Trailer: 1\r\n")
    with noisy.listener:
        server = serve(base_url=noisy.url, model="m")
        body = json.dumps({"messages": HI, "stream": True}).encode()
        health = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
        received = raw(server, POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body) + health)
        assert re.findall(rb"HTTP/1.1 (\d+)", received) == [b"200", b"200"]
        assert noisy.left.wait(WAIT)


def test_what_an_event_holds_besides_goes_out_once():  # B4
    fields = {f"field{number}": number for number in range(300)}
    choices = [{"index": number, "delta": {"content": "x"}} for number in range(300)]
    event = b"data: " + json.dumps({**fields, "choices": choices}).encode() + b"\n\n"
    chunks = translate([event, DONE])
    assert sum(len(json.dumps(value)) for value in chunks) < 10 * len(event)
    assert sum("field7" in value for value in chunks) == 1


def test_ids_and_names_have_a_length():  # B5
    named = chunk({"content": "x"}).replace(b'"id": "', b'"id": "' + b"i" * 100_000)
    assert b"i" * 1000 in named
    chunks = translate([named, *[chunk({"content": "x"})] * 100, *END])
    assert max(len(value["id"]) for value in chunks) < 500


HELD = {
    "an unknown list": {"delta": {"annotations": [{"a": 1}] * 100}},
    "log probabilities": {
        "delta": {"content": "x"},
        "logprobs": {"content": [{"token": "a"}] * 100},
    },
    "ever new texts": {"delta": {f"text{n}@": "x" for n in range(20)}},
    "ever new values": {"delta": {"content": "x", **{f"value{n}@": 1 for n in range(20)}}},
    "ever new fields": {"delta": {"content": "x"}, **{f"field{n}@": 1 for n in range(20)}},
    "long names": {"delta": {"content": "x", "n" * 5000 + "@": 1}},
    "arguments": {"delta": tool_call(0, "c", "f", "x" * 1000)},
    "reasoning": {"delta": {"reasoning_content": "x" * 1000}},
    "many calls": {
        "delta": {
            "tool_calls": [
                {"index": n, "id": f"c@{n}", "function": {"name": "f" * 50}} for n in range(50)
            ]
        }
    },
}


@pytest.mark.parametrize("name", HELD)
def test_a_collected_answer_has_one_budget(raw_upstream, monkeypatch, name):  # B5
    monkeypatch.setattr(qp.Budget, "LIMIT", 200_000)
    choice = {"index": 0, "finish_reason": None, **HELD[name]}
    events = [
        b"data: " + json.dumps({"choices": [choice]}).replace("@", str(number)).encode() + b"\n\n"
        for number in range(300)
    ]
    raw_upstream.script.append(HEAD + b"\r\n" + b"".join([HELLO[0], *events, *END]))
    status, _, body = chat(raw_upstream.server)
    assert status == 502 and "MiB of memory" in body["error"]["message"]


DENSE = {"lists": b"[],", "objects": b"{},", "texts": b'"ab",', "names": b'{"a":1},'}


@pytest.mark.parametrize("name", DENSE)
def test_a_small_gzip_that_becomes_a_billion_bytes_is_413(key_server, upstream, name):  # B5
    size = 60_000_000 // len(DENSE[name])
    body = b'{"messages":[' + DENSE[name] * size + b"1]}"
    status, _, answer = ask(
        key_server, gzip.compress(body, 1), headers={"Content-Encoding": "gzip"}
    )
    assert (status, json.loads(answer)["error"]["code"]) == (413, "request_too_large")


def test_the_batches_of_embeddings_have_one_budget(key_server, upstream, monkeypatch):  # B5
    monkeypatch.setattr(qp.Budget, "LIMIT", 10_000)
    request = {"model": "text-embedding-v4", "input": ["x"] * 10}
    assert ask(key_server, request, path="/v1/embeddings")[0] == 200
    request["input"] *= 10
    status, _, body = ask(key_server, request, path="/v1/embeddings")
    assert status == 502 and b"MiB of memory" in body


def call_turns(count, id_of):
    for number in range(count):
        call = {"id": id_of(number), "type": "function", "function": {"name": "f"}}
        yield {"role": "assistant", "content": "", "tool_calls": [call]}
        yield {"role": "tool", "tool_call_id": id_of(number), "content": "1"}


def asked_for(messages=(), **fields):
    return lambda: to_upstream({"messages": [*HI, *messages], **fields})


def tools_named(count):
    return [{"type": "function", "function": {"name": f"f{n}"}} for n in range(count)]


def image_results(count):
    for turn in call_turns(count, str):
        if turn["role"] == "tool":
            turn["content"] = [
                {"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}
            ]
        yield turn


def answered(*deltas, **fields):
    return lambda: translate([*(chunk(delta) for delta in deltas), *END])


def responded(items, **fields):
    return lambda: qp.ResponseRequest({"input": items, **fields}, qp.ItemMemory())


def one_event(choices):
    return lambda: translate(
        [b"data: " + json.dumps({"choices": choices}).encode() + b"\n\n", DONE]
    )


def embedded(indexes):
    answer = {"data": [{"index": index, "embedding": [1.0]} for index in indexes]}

    def work():
        decoder = qp.EmbeddingsDecoder(len(indexes), qp.FAMILIES["dashscope"], qp.Budget())
        decoder.feed(json.dumps(answer).encode())
        with contextlib.suppress(qp.UpstreamError):
            decoder.close()

    return work


COLLIDING = 2**61 - 1  # integers that differ by this have one hash
LINEAR = {  # count -> the work that may cost no more than so many times as much; a small count
    "turns that share one id": (lambda n: asked_for(call_turns(n, lambda _: "c")), 100),
    "turns with ids of their own": (lambda n: asked_for(call_turns(n, str)), 100),
    "calls without results": (lambda n: asked_for(list(call_turns(n, str))[::2]), 100),
    "results without calls": (lambda n: asked_for(list(call_turns(n, str))[1::2]), 100),
    "many calls in one message": (
        lambda n: asked_for(
            [
                {
                    "role": "assistant",
                    "tool_calls": [{"id": str(i), "function": {"name": "f"}} for i in range(n)],
                },
                *(
                    {"role": "tool", "tool_call_id": str(i), "content": "1"}
                    for i in reversed(range(n))
                ),
            ]
        ),
        100,
    ),
    "allowed tools": (
        lambda n: asked_for(
            tools=tools_named(n),
            tool_choice={
                "type": "allowed_tools",
                "allowed_tools": {"mode": "auto", "tools": tools_named(n)},
            },
        ),
        200,
    ),
    "images in tool messages": (lambda n: asked_for(image_results(n)), 100),
    "system messages": (lambda n: asked_for([{"role": "system", "content": "x"}, *HI] * n), 200),
    "consecutive messages of one role": (lambda n: asked_for(HI * n), 200),
    "reasoning items": (
        lambda n: responded(
            [{"role": "user", "content": "Hi"}]
            + [{"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]}] * n
        ),
        200,
    ),
    "reasoning and calls": (
        lambda n: responded(
            [
                item
                for i in range(n)
                for item in (
                    {"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]},
                    {"type": "function_call", "call_id": str(i), "name": "f", "arguments": "{}"},
                    {"type": "function_call_output", "call_id": str(i), "output": "1"},
                )
            ]
        ),
        100,
    ),
    "tools of a response": (
        lambda n: responded("Hi", tools=[{"type": "function", "name": f"f{i}"} for i in range(n)]),
        200,
    ),
    "tool calls of an upstream": (
        lambda n: answered(*(tool_call(i, f"c{i}", "f", "{}") for i in range(n))),
        100,
    ),
    "tool calls in one delta": (
        lambda n: answered(
            {
                "tool_calls": [
                    {"index": i, "id": f"c{i}", "function": {"name": "f"}} for i in range(n)
                ]
            }
        ),
        100,
    ),
    "tool calls without index": (
        lambda n: answered(
            *(
                {"tool_calls": [{"id": f"c{i}", "function": {"name": "f", "arguments": "{}"}}]}
                for i in range(n)
            )
        ),
        100,
    ),
    "name and id with every delta": (lambda n: answered(*[tool_call(0, "c", "f", "x")] * n), 200),
    "arguments, whole each time": (
        lambda n: answered(*(tool_call(0, "c", "f", '{"a":"' + "x" * 50) for _ in range(n))),
        200,
    ),
    "JSON that begins again and again": (lambda n: answered(*[tool_call(0, "", "", "{")] * n), 200),
    "closing tags in one delta": (lambda n: answered({"content": "</think>" * n}), 1000),
    "opening tags in one delta": (lambda n: answered({"content": "<think>" * n}), 1000),
    "halves of a tag": (lambda n: answered(*[{"content": "</thi"}] * n), 200),
    "colliding indexes of choices": (
        lambda n: one_event(
            [{"index": i * COLLIDING, "delta": {"content": "x"}} for i in range(n)]
        ),
        100,
    ),
    "colliding indexes of calls": (
        lambda n: answered(*(tool_call(i * COLLIDING, "", "f", "{}") for i in range(n))),
        100,
    ),
    "colliding indexes of embeddings": (
        lambda n: embedded([i * COLLIDING for i in range(n)]),
        500,
    ),
    "lines of an event": (lambda n: lambda: translate([b"data: x\n" * n + b"\n", *END]), 1000),
    "bytes without a line's end": (
        lambda n: lambda: translate([*[b": " + b"x" * 10] * n, b"\n\n", *END]),
        1000,
    ),
}


@pytest.mark.parametrize("name", LINEAR)
def test_work_grows_like_what_is_sent(name):  # B6
    prepare, small = LINEAR[name]
    works = {factor: prepare(small * factor) for factor in (1, 2, 4, 8)}
    least = max(cost(works[1], time.thread_time), 0.001)
    for factor in (2, 4, 8):
        assert cost(works[factor], time.thread_time) < 3 * factor * least


def test_time_is_credited_for_bytes_that_came(key_server, monkeypatch):  # B7
    monkeypatch.setattr(qp.Exchange, "BODY_TIMEOUT", 0.2)
    assert raw(key_server, POST + b"Content-Length: 67108864\r\n\r\n").startswith(b"HTTP/1.1 408 ")


def test_a_slow_body_that_keeps_its_rate_passes(key_server, monkeypatch):  # B7
    """The whole takes several times as long as the first byte may."""
    monkeypatch.setattr(qp.Exchange, "BODY_TIMEOUT", 0.5)
    monkeypatch.setattr(qp.Exchange, "BODY_RATE", 100)
    body, pace = json.dumps({"messages": HI, "pad": "x" * 400}).encode(), threading.Event()
    with socket.create_connection(("127.0.0.1", key_server.port), timeout=WAIT) as client:
        client.sendall(POST + b"Content-Length: %d\r\n\r\n" % len(body))
        for start in range(0, len(body), 40):
            client.sendall(body[start : start + 40])
            pace.wait(0.08)
        assert client.recv(12) == b"HTTP/1.1 200"


def test_without_file_descriptors_the_accepting_thread_pauses(key_server, monkeypatch):  # B8
    """accept() fails without taking the connection, so it is ready again at once."""
    failures, pauses, real = iter("123"), [], socketserver.TCPServer.get_request

    def get_request(server):
        if next(failures, None):
            raise OSError(errno.EMFILE, "Too many open files")
        return real(server)

    monkeypatch.setattr(socketserver.TCPServer, "get_request", get_request)
    monkeypatch.setattr(time, "sleep", pauses.append)
    assert ask(key_server, method="GET", path="/health")[0] == 200
    assert len(pauses) >= 3


def test_a_long_list_of_models_is_built_once(key_server, upstream, monkeypatch):  # B8
    get(key_server, "/v1/models")
    built, real = [], qp.ProxyServer._model_object
    monkeypatch.setattr(
        qp.ProxyServer, "_model_object", lambda *made: built.append(1) or real(*made)
    )
    assert {get(key_server, "/v1/models")[0] for _ in range(3)} == {200} and not built


STRANGE = {  # B9: request path and body, or an answer of the upstream: a clear 400, or 502
    "a reference whose id is an object": (
        "/v1/responses",
        {"input": [{"type": "item_reference", "id": {"a": 1}}]},
        None,
        400,
    ),
    "a reference whose id is a list": (
        "/v1/responses",
        {"input": [{"type": "item_reference", "id": [1]}]},
        None,
        400,
    ),
    "an infinite number": ("/v1/chat/completions", {}, b'{"delta":{"x":1e999},"index":0}', 502),
    "texts and calls": (
        "/v1/chat/completions",
        {},
        b'{"delta":{"content":"a"},"texts":1,"calls":2,"message":3}',
        200,
    ),
    "odd log probabilities": (
        "/v1/chat/completions",
        {},
        b'{"delta":{"content":"a"},"logprobs":[1]}',
        200,
    ),
    "odd lists of them": (
        "/v1/chat/completions",
        {},
        b'{"delta":{"content":"a"},"logprobs":{"content":7}}',
        200,
    ),
}


@pytest.mark.parametrize("name", STRANGE)
def test_what_is_odd_has_a_cause(key_server, upstream, name):  # B9
    path, body, choice, status = STRANGE[name]
    if choice:
        upstream.script.append(stream(b'data: {"choices":[' + choice + b"]}\n\n", *END))
    got, _, answer = ask(key_server, {"messages": HI, **body}, path=path)
    assert got == status and b"report" not in answer, answer


@pytest.mark.parametrize("depth", [900, 960, 970, 975, 980, 985, 990, 1000, 1100, 5000])
def test_any_depth_of_nesting_is_an_answer_or_a_400(key_server, depth):  # B9
    metadata = b'{"a":' * depth + b"1" + b"}" * depth
    body = b'{"messages":[{"role":"user","content":"Hi"}],"metadata":' + metadata + b"}"
    status, _, answer = ask(key_server, body)
    assert status in (200, 400) and b"report" not in answer, answer


def test_a_limit_of_five_thousand_digits_is_no_repair(key_server, upstream):  # B9
    digits = "9" * 5000
    upstream.script.append(refusal(f"Range of max_tokens should be [1, {digits}]", 400))
    status, _, body = chat(key_server, max_tokens=5)
    assert status in (200, 400) and "report" not in json.dumps(body)


# ----------------------------------------------------------------------------------------------------
# Ten thousand odd requests and answers: every one ends in an answer or in an error with a cause
# ----------------------------------------------------------------------------------------------------

ODD = [
    None,
    True,
    False,
    0,
    -1,
    1.5,
    10**30,
    "",
    "x",
    "null",
    "\ud800",
    [],
    [None],
    ["x"],
    [[]],
    {},
    {"x": 1},
    {"type": "text"},
    {"function": None},
]


def places(value, path=()):
    """The paths to all values inside a JSON value."""
    for name, item in list(
        value.items()
        if isinstance(value, dict)
        else enumerate(value)
        if isinstance(value, list)
        else ()
    ):
        yield path + (name,)
        yield from places(item, path + (name,))


def mutated(value, random_, times):
    """A copy with some values replaced, removed or repeated."""
    value = json.loads(json.dumps(value))
    for _ in range(times):
        found = list(places(value))
        if not found:
            break
        *path, last = random_.choice(found)
        parent = value
        for name in path:
            parent = parent[name]
        action = random_.random()
        if action < 0.7:
            parent[last] = copy.deepcopy(random_.choice(ODD))
        elif action < 0.85:
            del parent[last]
        elif isinstance(parent, list):
            parent.append(copy.deepcopy(parent[last]))
    return value


REFUSED_BY_NAME = [
    "Range of max_tokens should be [1, 5] json_schema logprobs",
    "thinking_budget must be not greater than 5",
    "tool_choice",
    "Json mode response is not supported when enable_thinking is true",
    'tool_choice should be ["none", "auto"]',
]
FUZZED_REQUESTS = {
    "chat": (EVERYTHING, qp.ChatApi().check, qp.ChatApi().to_upstream),
    "history": (
        {
            **EVERYTHING,
            "messages": EVERYTHING["messages"] * 2,
            "functions": [{"name": "f"}],
            "function_call": {"name": "f"},
            "reasoning": {"effort": "low", "max_tokens": 5},
            "thinking": {"type": "enabled", "budget_tokens": 5},
            "tool_choice": "required",
            "chat_template_kwargs": {"enable_thinking": True},
            "response_format": {"type": "json_schema", "json_schema": {"schema": {}}},
        },
        qp.ChatApi().check,
        qp.ChatApi().to_upstream,
    ),
    "anthropic": (
        {
            "messages": [
                *HI,
                {
                    "role": "assistant",
                    "content": [
                        {"type": "text", "text": "a"},
                        {"type": "tool_use", "id": "t", "name": "f", "input": {}},
                    ],
                },
                {
                    "role": "user",
                    "content": [
                        {
                            "type": "tool_result",
                            "tool_use_id": "t",
                            "content": [{"type": "text", "text": "x"}],
                        }
                    ],
                },
                {
                    "role": "assistant",
                    "content": "",
                    "tool_calls": [
                        {"type": "function", "function": {"name": "f", "arguments": "{}"}}
                    ],
                },
                {"role": "tool", "content": "x"},
                {"role": "assistant", "content": "a"},
                {"role": "system", "content": "b"},
            ],
            "tools": [
                {
                    "name": "f",
                    "input_schema": {"type": "object", "properties": {"a": {"description": None}}},
                }
            ],
            "think": "high",
            "tool_choice": {"type": "any"},
            "max_output_tokens": -1,
            "repeat_penalty": 1,
            "thinking_budget": 5,
            "min_p": 1,
            "extra_body": {
                "top_k": 5,
                "enable_thinking": True,
                "functions": [{"name": "f"}],
                "response_format": {"type": "json_object"},
            },
        },
        qp.ChatApi().check,
        qp.ChatApi().to_upstream,
    ),
    "text": (
        {
            "prompt": "a",
            "suffix": "b",
            "max_tokens": 5,
            "stream": True,
            "stream_options": {},
            "temperature": 1,
            "user": "u",
        },
        qp.TextApi().check,
        qp.TextApi().to_upstream,
    ),
}


@pytest.mark.parametrize("name", sorted(FUZZED_REQUESTS))
def test_odd_requests_are_served_or_refused_by_name(name):
    request, check, to_upstream_ = FUZZED_REQUESTS[name]
    random_ = random.Random(name)
    config = {
        "samplingParams": {"top_p": 0.5},
        "extra_body": {"enable_thinking": True},
        "customHeaders": {},
    }
    refused = 0
    for number in range(1500):
        odd = qp.with_extra_body(mutated(request, random_, random_.randrange(1, 4)))
        family, model = random_.choice(
            [
                ("dashscope", "qwen3.7-plus"),
                ("portal", "coder-model"),
                ("coding", "glm-4.7"),
                ("token", "qwen3.8-max"),
                ("openrouter", "qwen/qwen3-max"),
                ("deepseek", "deepseek-v4"),
                ("other", "m"),
            ]
        )
        provider = qp.Provider(
            "t",
            "http://h/v1",
            None,
            "t",
            {model: mutated(config, random_, 1) if number % 3 == 0 else {}},
            qp.FAMILIES[family],
        )
        try:
            check(odd)
            body, _ = to_upstream_(odd, qp.Target(provider, model))
            qp.repair_request(body, qp.UpstreamError(random_.choice(REFUSED_BY_NAME), 400))
            qp.encode_json(body)
        except qp.BadRequest as error:
            refused += 1
            assert error.message and error.status == 400
    assert 0 < refused < 1500


def test_odd_response_and_embedding_requests_are_served_or_refused_by_name():
    request = {
        "model": "m",
        "input": REPLAYED,
        "tools": [
            *CALL_TOOLS,
            {"type": "namespace", "name": "n", "tools": CALL_TOOLS},
            {"type": "custom", "name": "c", "format": {"definition": "d"}},
        ],
        "tool_choice": {"type": "allowed_tools", "mode": "auto", "tools": [{"name": "c"}]},
        "reasoning": {"effort": "low"},
        "text": {"format": {"type": "json_schema", "name": "x", "schema": {}}},
        "include": ["reasoning.encrypted_content"],
        "metadata": {},
        "max_output_tokens": 5,
        "instructions": "x",
    }
    random_, refused = random.Random(5), 0
    for _ in range(1500):
        try:
            asked = qp.ResponseRequest(
                mutated(request, random_, random_.randrange(1, 4)), qp.ItemMemory()
            )
            qp.ChatApi().check(asked.chat)
            body, _ = to_upstream(asked.chat, "qwen3.7-plus")
            writer, events = response_writer(asked)
            writer.start()
            writer.close(None)
            assert len(events) == 3
            qp.encode_json(body)
        except qp.BadRequest as error:
            refused += 1
            assert error.message and error.status == 400
    assert 0 < refused < 1500
    for _ in range(500):
        try:
            qp.EmbeddingsApi().check(
                mutated({"model": "m", "input": ["a", "b"], "encoding_format": "float"}, random_, 2)
            )
        except qp.BadRequest as error:
            assert error.message


FUZZED_STREAMS = {
    name: list(DIRTY[name][0])
    for name in (
        "plain",
        "usage on every chunk",
        "cumulative text",
        "error_finish",
        "native error frame later",
        "a think tag",
        "tools: as documented",
        "no ids, the name on every delta",
        "whole: calls without ids and arguments",
    )
}


def odd_answer(pieces, random_):
    """The answer with some of its JSON, or some of its bytes, changed."""
    events = list(pieces)
    for _ in range(random_.randrange(1, 4)):
        at = random_.randrange(len(events))
        if events[at].startswith(b"data: {") and random_.random() < 0.7:
            with contextlib.suppress(ValueError):
                value = mutated(json.loads(events[at][6:]), random_, random_.randrange(1, 3))
                events[at] = b"data: " + json.dumps(value).encode() + b"\n\n"
            continue
        data, place = bytearray(events[at]), random_.randrange(len(events[at]) or 1)
        random_.choice(
            [
                lambda: data.__delitem__(slice(place, place + 9)),
                lambda: data.insert(place, random_.randrange(256)),
                lambda: data.__setitem__(slice(place, place + 1), bytes([random_.randrange(256)])),
                lambda: data.extend(data),
            ]
        )()
        events[at] = bytes(data)
    if random_.random() < 0.2:
        random_.shuffle(events)
    return events


@pytest.mark.parametrize("name", sorted(FUZZED_STREAMS))
def test_odd_answers_come_out_whole_or_as_an_error(name):
    random_ = random.Random(name)
    outcomes = collections.Counter()
    for _ in range(600):
        pieces = odd_answer(FUZZED_STREAMS[name], random_)
        asked = qp.ResponseRequest({"input": "x"}, qp.ItemMemory())
        writer, events = response_writer(asked)
        writer.start()
        try:
            chunks = translate(
                [b"".join(pieces)], {"stream": True, "stream_options": {"include_usage": True}}
            )
        except qp.UpstreamError as error:
            outcomes["error"] += 1
            assert error.message and 400 <= error.status < 600
            qp.encode_json(error.body())
            writer.error(error)
            assert events[-1]["type"] == "response.failed"
            continue
        outcomes["whole"] += 1
        for value in chunks:
            writer.feed(qp.Chunk(value))
        writer.close(USAGE)
        qp.encode_json([collect(chunks), chunks])
        finals = {
            choice["index"]: choice["finish_reason"]
            for value in chunks
            for choice in value["choices"]
        }
        assert finals and all(isinstance(reason, str) for reason in finals.values())
    assert outcomes["error"] and (outcomes["whole"] or "error" in name)


# ----------------------------------------------------------------------------------------------------
# Demo upstream and command line
# ----------------------------------------------------------------------------------------------------


class Process:
    """The program as a person runs it."""

    def __init__(self, *arguments, **environ):
        env = dict(os.environ.items())
        env.update(environ)
        self.popen = subprocess.Popen(
            [sys.executable, PROGRAM, *arguments],
            stderr=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=env,
        )
        self.lines, self.is_up = [], threading.Event()
        self.reader = threading.Thread(target=self._read, daemon=True)
        self.reader.start()

    def _read(self):
        for line in io.TextIOWrapper(self.popen.stderr, encoding="utf-8"):
            self.lines.append(line)
            if line.startswith("try "):
                self.is_up.set()

    @property
    def port(self):
        assert self.is_up.wait(WAIT), self.lines
        return int(re.search(r"http://localhost:(\d+)/v1", self.lines[0]).group(1))


def test_demo_serves_thoughts_a_tool_call_and_its_result():
    process = Process("--demo", "--port", "0")
    try:
        tools = [
            {
                "type": "function",
                "function": {
                    "name": "f",
                    "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
                },
            }
        ]
        _, _, first = chat(process, tools=tools)
        message = first["choices"][0]["message"]
        assert message["reasoning_content"] and message["tool_calls"][0]["function"] == {
            "name": "f",
            "arguments": '{"city": "demo"}',
        }
        messages = [
            {"role": "user", "content": "q"},
            message,
            {"role": "tool", "tool_call_id": message["tool_calls"][0]["id"], "content": "42"},
        ]
        _, _, data = chat(
            process,
            stream=True,
            messages=messages,
            tools=tools,
            stream_options={"include_usage": True},
        )
        assert data[-1] == "[DONE]" and json.loads(data[-2])["usage"]["total_tokens"]
        assert "42" in text_in([json.loads(value) for value in data[:-1]])
        with socket.create_connection(
            ("127.0.0.1", process.port), timeout=WAIT
        ) as client:  # one who leaves at once
            body = b'{"stream": true, "messages": [{"role": "user", "content": "Hi"}]}'
            client.sendall(POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
            assert client.recv(1)
    finally:
        process.popen.terminate()
        assert process.popen.wait(WAIT) == 0
    process.reader.join(WAIT)
    assert "Traceback" not in "".join(process.lines)


def test_start_says_what_a_newcomer_needs(login, upstream):
    process = Process("--port", "0")
    try:
        assert process.port
        said = "".join(process.lines)
        for words in (
            "qwen_proxy " + qp.__version__,
            "oauth_creds.json",
            "coder-model",
            "curl http://localhost",
        ):
            assert words in said
        assert chat(process)[0] == 200
    finally:
        process.popen.terminate()
        assert process.popen.wait(WAIT) == 0
    process.reader.join(WAIT)
    assert "Traceback" not in "".join(process.lines)


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGTERM")
def test_a_log_that_nobody_reads_does_not_keep_the_program_from_ending(home):
    process = subprocess.Popen(
        [sys.executable, os.path.join(HERE, "qwen_proxy.py"), "--demo", "--port", "0"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    with process.stderr:
        port = int(re.search(rb"http://localhost:(\d+)", process.stderr.readline()).group(1))
        target = type("Target", (), {"port": port})
        for _ in range(1000):  # more than the 64 KiB that a pipe holds
            ask(target, method="GET", path="/" + "x" * 90)
        process.terminate()
        assert process.wait(WAIT) == 0


@pytest.mark.parametrize(
    "arguments, words",
    [
        (["--port", "99999"], "--port must be"),
        (["--nonsense"], "unrecognized"),
        (["--alias", "x"], "NAME=ID"),
        (["--timeout", "0"], "--timeout"),
        (["--base-url", "ftp://x"], "--base-url"),
        (["--host", "0.0.0.0", "--port", "0"], "--api-key"),
    ],
)
def test_bad_options_are_a_sentence_and_exit_code_2(arguments, words):
    done = subprocess.run(
        [sys.executable, PROGRAM, *arguments],
        capture_output=True,
        timeout=WAIT,
    )
    assert (
        done.returncode == 2 and words in done.stderr.decode() and b"Traceback" not in done.stderr
    )


def test_taken_port_is_a_sentence_and_exit_code_2():
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        done = subprocess.run(
            [sys.executable, PROGRAM, "--port", str(taken.getsockname()[1])],
            capture_output=True,
            timeout=WAIT,
        )
    assert (
        done.returncode == 2
        and b"choose another --port" in done.stderr
        and b"Traceback" not in done.stderr
    )


ENDLESS = [*HELLO[:2], threading.Event()]


def send(server, **more):
    """A connection with a chat request on its way."""
    body = json.dumps({"messages": HI, **more}).encode()
    client = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT)
    client.sendall(POST + b"Content-Length: %d\r\n\r\n%s" % (len(body), body))
    return client


def send_signals(process, names):
    """Each when the program has noticed the one before; its exit code."""
    for index, name in enumerate(names.split()):
        end = time.monotonic() + WAIT
        while index and "stopping" not in "".join(process.lines) and time.monotonic() < end:
            time.sleep(0.01)
        process.popen.send_signal(getattr(signal, name))
    return process.popen.wait(WAIT)


@contextlib.contextmanager
def busy(home, upstream, *options):
    """The program, and a client: its stream never ends, and no more does a refresh."""
    write_login(home, upstream)
    asked, never = threading.Event(), [threading.Event()]
    upstream.script.extend([stream(*ENDLESS), refusal("no", 401, "invalid_api_key")])
    upstream.token_script.append(lambda form: asked.set() or Reply(200, [], never))
    process = Process("--port", "0", *options)
    try:
        with send(process, stream=True) as client, client.makefile("rb") as reader:
            assert any(b"Hel" in line for line in reader)
            with send(process):
                assert asked.wait(WAIT) and (home / "oauth_creds.lock").exists()
                yield process, reader
    finally:
        process.popen.kill()
        process.popen.wait(WAIT)


@posix
@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT", "SIGHUP"])
def test_a_signal_ends_a_stream_with_a_word_and_leaves_no_lock(home, upstream, name):  # H9
    with busy(home, upstream, "--grace", "0.1") as (process, reader):
        assert send_signals(process, name) == 0
        received = reader.read()
    assert b"shutting_down" in received and received.endswith(b"\n\n\r\n0\r\n\r\n")
    assert b"[DONE]" not in received and os.listdir(home) == ["oauth_creds.json"]


@posix
@pytest.mark.parametrize("names", ["SIGTERM SIGTERM", "SIGINT SIGHUP", "SIGHUP SIGTERM"])
def test_second_signal_ends_at_once(home, upstream, names):  # H9
    with busy(home, upstream) as (process, _):
        assert send_signals(process, names) == 1  # after all the grace it would be 0
    assert os.listdir(home) == ["oauth_creds.json"]


@posix
def test_a_closed_terminal_is_nothing_to_what_nohup_started(login, upstream, monkeypatch):  # H9
    ignore = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(subprocess, "Popen", functools.partial(subprocess.Popen, preexec_fn=ignore))
    process = Process("--port", "0")
    try:
        assert process.port
        process.popen.send_signal(signal.SIGHUP)
        assert chat(process)[0] == 200
        assert send_signals(process, "SIGTERM") == 0  # as a second one it would end in 1
    finally:
        process.popen.kill()


@pytest.mark.parametrize("value", [None, "0.5", "-1", "nan"])
def test_grace_is_8_seconds_unless_told_otherwise(capsys, value):  # H10
    arguments = ["--grace=" + value] if value else []
    if value in (None, "0.5"):
        parsed = qp.build_parser().parse_args(arguments)
        assert qp.checked_options(qp.stated_options(parsed, {})).grace == float(value or 8)
        return
    with pytest.raises(SystemExit):
        qp.main(arguments)
    assert re.search(r"error: .*--grace(?!=)", capsys.readouterr().err)


# The program with a log that is held for long, and with two more ways to end.
SLOW_LOG = """
import signal, sys
sys.path.insert(0, %r)
import qwen_proxy as qp
qp.LOG_PAUSE = 2
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))
signal.signal(signal.SIGUSR2, lambda *_: 1 // 0)
sys.exit(qp.main(sys.argv[1:]))
"""
ENDINGS = {"SIGTERM": 0, "SIGUSR1": 3, "SIGUSR2": 1, "SIGHUP SIGINT": 1}


@posix
@pytest.mark.parametrize("names", ENDINGS)
def test_no_line_of_the_log_is_lost(login, upstream, tmp_path, monkeypatch, names):  # O14
    (tmp_path / "program.py").write_text(SLOW_LOG % HERE)
    monkeypatch.setattr(sys.modules[__name__], "PROGRAM", str(tmp_path / "program.py"))
    process, requests = Process("--port", "0"), ["/v1/chat/completions"] * 5 + ["/health"]
    connection = http.client.HTTPConnection("127.0.0.1", process.port, timeout=WAIT)
    try:
        for path in requests:  # by one thread, so the last answer tells that the rest is logged
            body = None if path == "/health" else json.dumps({"messages": HI})
            connection.request("POST" if body else "GET", path, body)
            assert connection.getresponse().read()
        upstream.script.append(stream(*ENDLESS))
        with send(process, stream=True) if " " in names else contextlib.nullcontext():
            upstream.wait_for_request(6 if " " in names else 5)
            assert send_signals(process, names) == ENDINGS[names]
    finally:
        connection.close()
        process.popen.kill()
    process.reader.join(WAIT)
    assert "".join(process.lines).count(" POST /v1/chat/completions 200 ") == 5


NO_ACCESS = [(["--api-key="], None), (["--api-key=\u00a0", "--host=0.0.0.0"], None)]
NO_ACCESS += [(["--api-key=good-key", "--api-key=\t", "--no-auth"], None)]
NO_ACCESS += [([], ""), (["--host=0.0.0.0"], "good-key, ,k-2"), (["--api-key=good-key"], ",")]


@pytest.mark.parametrize("arguments, variable", NO_ACCESS, ids=ascii)
def test_a_key_that_protects_nothing_ends_the_start(main, monkeypatch, arguments, variable):  # H1
    if variable is not None:
        monkeypatch.setenv("QWEN_PROXY_API_KEYS", variable)
    code, said = main("--port=0", *arguments)
    assert code == 2 and ("--api-key" if variable is None else "QWEN_PROXY_API_KEYS") in said
    assert variable is not None or "--no-auth" not in said


@pytest.mark.parametrize("host, begin", [("", ""), ("x.localhost", "-"), ("::", "sk-")])
def test_a_host_without_a_key_is_refused_with_a_command(main, monkeypatch, host, begin):  # H1
    numbers, fresh = itertools.count(10**30), set()
    monkeypatch.setattr(qp.secrets, "token_urlsafe", lambda *size: begin + str(next(numbers)))
    for _ in range(2):
        code, said = main("--port=0", "--host", host)
        command = re.search(r"--host .*?--api-key\S* ?\S+", said).group()  # ready to be pasted
        options = qp.build_parser().parse_args(shlex.split(command))
        assert code == 2 and options.host in (host, host or "0.0.0.0")
        assert re.match(r"[\w-]{20,}\Z", options.api_key[0]), command
        fresh.update(options.api_key)
    assert len(fresh) == 2 and main("--port=0", "--host=0.0.0.0", "--api-key=good-key")[0] == 0


def assert_plain(said):
    assert [char for char in said if not char.isprintable() and char != "\n"] == []
    assert not re.search("^ *FORGED", said, re.M)


LOGINS = r"""
device 200 {"device_code": "dc_123456", "verification_uri": "ORIGIN/authorize", "user_code": JSON}
device 200 {"device_code": "dc_123456", "verification_uri": JSON}
device 200 {"device_code": "dc_123456", "verification_uri": "--gpu-launcher=x"}
token 400 {"error": JSON}
token 200 {"access_token": "at_123456", "refresh_token": "rt_123456"}
""".strip().split("\n")


@posix
@pytest.mark.parametrize("line", LOGINS)
def test_a_login_says_and_opens_nothing_harmful(upstream, home, monkeypatch, capsys, caplog, line):
    opened = []  # H13
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(qp, "LOGIN_POLL_FIRST", 0.001)
    monkeypatch.setenv("QWEN_HOME", str(home / ESCAPES))
    endpoint, line = line.replace("ORIGIN", upstream.origin).split(" ", 1)
    answer = answer_of(line, ESCAPES)
    upstream.device_answers.extend([answer] * (endpoint == "token"))
    upstream.device_answers.append(reply(400, {"error": "access_denied"}))
    if endpoint == "device":
        upstream.device_answer = lambda form: answer
    assert qp.main(["login"]) == (0 if "at_123456" in line else 1)
    assert_plain("".join(capsys.readouterr()) + caplog.text)
    assert {uri.partition("?")[0] for uri in opened} <= {upstream.origin + "/authorize"}


@posix
@pytest.mark.parametrize("broken", [False, True], ids=["settings", "broken settings"])
def test_status_says_no_escapes(home, upstream, monkeypatch, capsys, broken):  # H13
    folder = home / ESCAPES
    folder.mkdir()
    monkeypatch.setenv("QWEN_HOME", str(folder))
    monkeypatch.setenv("HTTP_PROXY", "http://x" + ESCAPES)
    write_login(folder, upstream, name=f"oauth_creds-{ESCAPES}.json")
    entries = [{"id": "m" + ESCAPES, "envKey": "K", "baseUrl": "http://x" + ESCAPES}]
    write_settings(folder, upstream, modelProviders={"openai": entries}, model={"name": ESCAPES})
    if broken:
        (folder / "settings.json").write_text("{")
    qp.main(["status"])
    qp.main(["status", "--json"])
    assert_plain("".join(capsys.readouterr()))


def test_login_writes_the_file(home, upstream, monkeypatch, capsys):
    monkeypatch.setattr(qp, "LOGIN_POLL_FIRST", 0.01)
    upstream.device_answers.extend([PENDING, SUCCESS])
    assert qp.main(["login", "--no-browser"]) == 0
    said = capsys.readouterr().err
    assert (
        "2026-04-15" in said
        and "ABCD-EFGH" in said
        and "client=qwen-code" in said
        and "at_9" not in said
    )
    path = home / "oauth_creds.json"
    assert (
        json.loads(path.read_text())["access_token"] == "at_9"
        and stat.S_IMODE(path.stat().st_mode) == 0o600
    )


def test_login_ended_by_ctrl_c_or_refusal_leaves_nothing(home, upstream, monkeypatch, capsys):
    monkeypatch.setattr(qp, "LOGIN_POLL_FIRST", 0.01)
    upstream.device_answers.append(reply(400, {"error": "access_denied"}))
    assert qp.main(["login", "--no-browser"]) == 1

    def interrupt(*arguments):
        raise KeyboardInterrupt

    monkeypatch.setattr(qp, "poll_for_login", interrupt)
    assert qp.main(["login", "--no-browser"]) == 130
    assert os.listdir(str(home)) == [] and "Traceback" not in capsys.readouterr().err


def test_status_tells_a_usable_login(login, upstream, capsys, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    (login.parent / "oauth_creds.lock").write_text("x")
    assert qp.main(["status"]) == 0
    said = capsys.readouterr().out
    for words in ("oauth_creds.json", "in 59 min", "600", "exists for", "coder-model", "right"):
        assert words in said, words
    assert "none" in said and "http://localhost:8080/v1" in said and "at_1" not in said
    assert upstream.bodies() == [] and upstream.refreshes == []


def test_status_of_nothing_is_exit_code_1(capsys):
    assert qp.main(["status", "--json"]) == 1
    facts = json.loads(capsys.readouterr().out)
    assert facts["usable"] is False and "/auth" in facts["problem"]
