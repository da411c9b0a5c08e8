"""Tests of qwen_proxy: real sockets on loopback, a fake of Qwen's endpoints as strict as they are.

Same sections, same order as the program. Most cases are rows of a few tables, named with the
clients that need them: REQUESTS (what a client sends, what the upstream gets), DIRTY (what an
upstream sends, what the client gets), and those above the tests of refusals, of repairs, of bad
requests, of frames and of the wire. Nothing here leaves the machine; HOME and QWEN_HOME are
temporary.
"""

import argparse
import ast
import base64
import collections
import concurrent.futures
import contextlib
import copy
import doctest
import errno
import functools
import gc
import gzip
import hashlib
import html
import http.client
import http.server
import inspect
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
import shutil
import signal
import socket
import socketserver
import sqlite3
import ssl
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import types
import urllib.parse
import zlib

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
    headers = [("Content-Type", "text/event-stream"), ("Transfer-Encoding", "chunked")]
    return Reply(status, headers, list(pieces))


def event(value, **more):
    """An event of exactly this JSON: nothing of chunk()'s good manners."""
    return b"data: " + json.dumps({**value, **more}, ensure_ascii=False).encode() + b"\n\n"


def chunk(delta=None, finish_reason=None, **more):
    """One event as DashScope writes it: choices first, id last, usage null."""
    choice = {"delta": delta, "index": 0, "logprobs": None, "finish_reason": finish_reason}
    value = {
        "choices": [] if delta is None else [choice],
        "object": "chat.completion.chunk",
        "usage": None,
        "created": 1790000000,
        "system_fingerprint": None,
        "model": "qwen3.7-plus",
        "id": "chatcmpl-1",
    }
    return event(value, **more)


def texts(*said, name="content", **more):
    return [chunk({name: text}, **more) for text in said]


USAGE = {"prompt_tokens": 9, "completion_tokens": 3, "total_tokens": 12}
DONE = b"data: [DONE]\n\n"
END = [chunk({"content": ""}, "stop"), chunk(usage=USAGE), DONE]
HELLO = (chunk({"content": "", "role": "assistant"}), *texts("Hel", "lo, ", "wörld"), *END)


def text_chunk(text, finish_reason=None, **more):
    choice = {"index": 0, "text": text, "logprobs": None, "finish_reason": finish_reason}
    value = {"id": "cmpl-1", "object": "text_completion", "created": 1790000000}
    value.update({"model": "qwen-coder-turbo", "choices": [choice], "usage": None})
    return b"data: " + json.dumps({**value, **more}).encode() + b"\n\n"


TEXT = [text_chunk(text) for text in ("def ", "f():")]
TEXT += [text_chunk("", "stop"), text_chunk("", choices=[], usage=USAGE), DONE]


def tool_call(index, call_id, name=None, arguments=""):
    function = {"arguments": arguments, **({} if name is None else {"name": name})}
    call = {"index": index, "id": call_id, "type": "function", "function": function}
    return {"content": None, "tool_calls": [call]}


def tool(*call, reason=None):
    """The delta of a call: its index, id, name and arguments."""
    return chunk(tool_call(*call), reason)


CALLS = (
    chunk({"content": None, "role": "assistant", "reasoning_content": "I must look."}),
    tool(0, "call_a", "get_weather", None),
    tool(0, "", None, '{"city"'),
    tool(0, "", None, ': "Paris"}'),
    tool(1, "call_b", "get_time", ""),
    tool(1, "", None, "{}"),
    *END,
)


def refusal(message, status=400, code="invalid_parameter_error", type="invalid_request_error"):
    error = {"message": message, "type": type, "param": None, "code": code}
    return reply(status, {"error": error, "request_id": "r-1"})


# What the endpoints say, by their own words.
INVALID = "<400> InternalError.Algo.InvalidParameter: "
BUDGET = "The thinking_budget parameter must be a positive integer and not greater than "


class FakeQwen:
    """Scripted replies, a strict default, everything recorded."""

    def __init__(self):
        self.requests, self.script, self.token_script = [], collections.deque(), collections.deque()
        self.access_tokens, self.refresh_tokens = {"at_1"}, {"rt_1"}
        self.refreshes, self.reused, self.expires_in, self.rotates = [], [], 21600, True
        self.device_answers, self.models, self.faults = collections.deque(), None, []
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
                fake.faults.append(sys.exc_info()[1])

        self.server = Server(("127.0.0.1", 0), Handler)
        self.port = self.server.server_port
        self.origin = f"http://127.0.0.1:{self.port}"
        self.dashscope = self.origin + "/compatible-mode/v1"
        threading.Thread(target=self.server.serve_forever, args=(0.002,), daemon=True).start()

    def close(self):
        self.server.shutdown()
        self.server.server_close()
        assert [fault for fault in self.faults if isinstance(fault, AssertionError)] == []

    def answer(self, path, headers, body):
        with self.arrived:
            self.requests.append((path, headers, body))
            self.arrived.notify_all()
        if path.endswith("/oauth2/token"):
            return self.token_answer(dict(urllib.parse.parse_qsl(body.decode())))
        if path.endswith("/oauth2/device/code"):
            return self.device_answer(dict(urllib.parse.parse_qsl(body.decode())))
        if path.endswith("/v1/models") and self.models is not None:
            if callable(self.models):
                return self.models()
            facts = {"object": "model", "created": 1790000000, "owned_by": "system"}
            listed = [{"id": name, **facts} for name in self.models]
            return reply(200, {"object": "list", "data": listed})
        if path.endswith("/v1/embeddings"):
            return self.refuse_key(path, headers) or self.embeddings(json.loads(body))
        if path.endswith("/v1/completions"):
            asked = json.loads(body)
            assert asked["stream"] is True and "suffix" not in asked and None not in asked.values()
            refused = self.refuse_key(path, headers)
            return refused or (self.script.popleft() if self.script else stream(*TEXT))
        if not path.endswith("/v1/chat/completions"):
            return Reply(404, [("Content-Length", "0")], [])  # as the real one: without a word
        refused = self.refuse(path, headers, body)
        return refused or (self.script.popleft() if self.script else stream(*HELLO))

    @staticmethod
    def embeddings(request):
        """text-embedding-v4: ten texts at most, floats only. The vector says which text it is."""
        given = request["input"] if isinstance(request["input"], list) else [request["input"]]
        assert all(isinstance(text, str) for text in given) and len(given) <= 10
        assert request["encoding_format"] == "float" and "user" not in request
        vectors = [[len(text) / 2, 0.25] for text in given]
        data = [{"object": "embedding", "index": n, "embedding": x} for n, x in enumerate(vectors)]
        usage = {"prompt_tokens": len(given), "total_tokens": len(given)}
        answer = {"object": "list", "model": request["model"], "id": "r-1", "usage": usage}
        return reply(200, {**answer, "data": data[::-1]})

    def wait_for_request(self, count=1):
        with self.arrived:
            assert self.arrived.wait_for(lambda: len(self.bodies()) >= count, WAIT)

    def refuse(self, path, headers, body):
        """What the real endpoints refuse, in their words (shape A of their error bodies)."""
        try:
            return self.refuse_key(path, headers) or self.refuse_chat(path, json.loads(body), body)
        except (TypeError, AttributeError, KeyError):
            return refusal(INVALID + "a field has the wrong type")

    def refuse_key(self, path, headers):
        assert headers.get("User-Agent")
        key = headers.get("Authorization", "").replace("Bearer ", "")
        if key in self.access_tokens or key.startswith("sk-good"):
            return None
        words = "Incorrect API key provided."
        words = "invalid access token or token expired" if path.startswith("/v1") else words
        return refusal(words, 401, "invalid_api_key")

    @staticmethod
    def refuse_chat(path, request, body):
        """A refusal that the program acts on; what else they refuse is an error of Python's own."""
        messages = request["messages"]
        assert len(body) <= 6_291_456 and messages
        for tool_ in (tool_["function"] for tool_ in request.get("tools", [])):
            assert re.match(r"[A-Za-z0-9_-]{1,64}$", tool_["name"]) and "parameters" in tool_
            assert tool_["name"] != "search"
        assert "user" in [message["role"] for message in messages]
        most = 32768 if request["model"].startswith("glm-5") else 262144
        is_double = {"thinking_budget", "reasoning_effort"} <= set(request)
        if not 0 < request.get("thinking_budget", 1) <= most or is_double:
            return refusal(BUDGET + str(most))
        pending = []
        for message in messages:
            assert message["role"] in ("system", "assistant", "user", "tool", "function")
            assert "content" in message
            if message["role"] == "tool":
                assert message.get("tool_call_id") in pending
                pending.remove(message["tool_call_id"])
                continue
            assert not pending
            for call in message.get("tool_calls") or []:
                pending.append(call["id"])
                assert isinstance(json.loads(call["function"]["arguments"]), dict)
        assert not pending
        system, content = messages[0]["role"] == "system", messages[0]["content"]
        is_marked = isinstance(content, list) and any("cache_control" in part for part in content)
        assert not path.startswith("/v1/") or (system and is_marked)
        thinks = bool(re.match("qwen3.7|qwen4", request["model"]))
        thinks = request.get("enable_thinking", thinks)
        if thinks and request.get("tool_choice", "auto") not in ("auto", "none"):
            return refusal('tool_choice is one of the strings that should be ["none", "auto"]')
        if dig(request, "response_format", "type") == "json_object":
            if thinks:
                return refusal("Json mode response is not supported when enable_thinking is true")
            assert "json" in json.dumps(messages).lower()
        if not 1 <= request.get("max_tokens", 1) <= 65536:
            return refusal("Range of max_tokens should be [1, 65536]")
        assert request.get("temperature", 0) < 2
        assert request["stream"] is True and dig(request, "stream_options", "include_usage")
        assert not {"functions", "metadata", "store"} & set(request) and request.get("tools") != []
        return None

    def token_answer(self, form):
        with self.lock:
            if self.token_script:
                scripted = self.token_script.popleft()
                return scripted(form) if callable(scripted) else scripted
            if form.get("grant_type") == qp.DeviceAuthorization.GRANT:
                return self.device_answers.popleft()
            assert form["client_id"] == qp.CLIENT_ID
            used = form.get("refresh_token")
            if used not in self.refresh_tokens:
                self.reused.append(used)
                words = "Invalid refresh token"
                return reply(400, {"error": "invalid_request", "error_description": words})
            number = len(self.refreshes) + 2
            self.refreshes.append(used)
            answer = {"access_token": f"at_{number}", "token_type": "Bearer"}
            answer["expires_in"] = self.expires_in
            if self.rotates:
                self.refresh_tokens = {f"rt_{number}"}
                answer["refresh_token"] = f"rt_{number}"
            self.access_tokens.add(answer["access_token"])
            return reply(200, answer)

    def device_answer(self, form):
        self.challenge = form.get("code_challenge")
        assert form["client_id"] == qp.CLIENT_ID and form["code_challenge_method"] == "S256"
        uri = self.origin + "/authorize"
        answer = {"device_code": "dc_1", "user_code": "ABCD-EFGH", "expires_in": 900}
        answer["verification_uri"] = uri
        answer["verification_uri_complete"] = uri + "?user_code=ABCD-EFGH&client=qwen-code"
        return reply(200, answer)

    def play(self, handler, answer):
        pieces, headers = list(answer.pieces), dict(answer.headers)
        is_chunked = "Transfer-Encoding" in headers
        if not is_chunked:
            size = sum(len(piece) for piece in pieces if isinstance(piece, bytes))
            headers.setdefault("Content-Length", str(size))
        handler.send_response_only(answer.status)
        for header in {"Date": handler.date_time_string(), **headers}.items():
            handler.send_header(*header)
        # An event before the first byte is silence before the answer's head.
        is_late = pieces and isinstance(pieces[0], threading.Event)
        if is_late and not self.pause(handler, pieces.pop(0)):
            return
        handler.end_headers()
        for piece in pieces:
            if piece is CUT:
                handler.close_connection = True
                handler.connection.shutdown(socket.SHUT_RDWR)
                return
            if isinstance(piece, threading.Event):
                if not self.pause(handler, piece):
                    return
            elif piece:
                handler.wfile.write(b"%x\r\n%s\r\n" % (len(piece), piece) if is_chunked else piece)
        handler.wfile.write(b"0\r\n\r\n" if is_chunked else b"")

    def pause(self, handler, event):
        """Wait for the event; False, and self.gone set, when the proxy has closed the connection meanwhile."""
        end = time.monotonic() + WAIT
        while not event.is_set() and time.monotonic() < end:
            connection = handler.connection
            if select.select([connection], [], [], 0.02)[0] and self.has_left(connection):
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
        return [json.loads(body) for path, _, body in self.requests if path.endswith(CHAT)]


HI = [{"role": "user", "content": "Hi"}]


def message(role, content, **more):
    return {"role": role, "content": content, **more}


roles = ("system", "user", "assistant")
system, user, assistant = (functools.partial(message, role) for role in roles)


def function(name="f", **more):
    return {"type": "function", "function": {"name": name, **more}}


def use(call_id=None, name="f", arguments="{}"):
    """An entry of tool_calls; without an id where it is None."""
    entry = function(name, arguments=arguments)
    return entry if call_id is None else {"id": call_id, **entry}


def call(*ids, content="", **more):
    """A turn of the assistant that calls f once for each id."""
    return assistant(content, tool_calls=[use(call_id, **more) for call_id in ids])


def result(call_id, content):
    return message("tool", content, tool_call_id=call_id)


def parts(*texts, **more):
    """Parts of text; the last one holds more."""
    found = [{"type": "text", "text": text} for text in texts]
    found[-1].update(more)
    return found


EMPTY = {"type": "object", "properties": {}}
F, G = function(parameters=EMPTY), function("g", parameters=EMPTY)
JSON_OBJECT = {"type": "json_object"}
JSON_SCHEMA = {"type": "json_schema", "json_schema": {"name": "x", "schema": {}}}
THINKS, NO_THOUGHTS = {"enable_thinking": True}, {"enable_thinking": False}


def dig(value, *path):
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def table(text):
    """The rows of a table: one a line, an indented line goes on; " | " between cells, the name first."""
    lines = re.sub(r"\n +", " ", text.strip()).split("\n")
    rows = [re.split(r" *\|(?: +|$)", line) for line in lines if line]
    return [pytest.param(*cells, id=name) for name, *cells in rows]


def rows(text):
    """Run a test with each row of a table; its first line names the columns."""
    names, _, text = text.strip().partition("\n")
    return pytest.mark.parametrize(names.replace(" | ", ", "), table(text))


def value_of(cell, **names):
    """What a cell says in Python, with the names of this file."""
    return eval(cell, {**globals(), **names})


def fields(cell):
    """A cell that is written like the arguments of a call: n=2, stop=["a"]."""
    return value_of(f"dict({cell})")


def pieces_of(cell):
    """A cell that is written like the pieces of an answer: *HELLO, CUT."""
    return value_of(f"[{cell}]")


# ----------------------------------------------------------------------------------------------------
# Fixtures and helpers
# ----------------------------------------------------------------------------------------------------


# What is waited for in seconds where nothing is to come: an end, more lines, a model's pace.
WAITS = [(qp.LogWriter, "PAUSE"), (qp.DemoUpstream, "PAUSE")]


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch, caplog):
    """A HOME with an empty ~/.qwen, and short waits; no variable of the real one leaks in."""
    caplog.set_level(logging.INFO, "qwen_proxy")
    ours = "(QWEN|OPENAI|DASHSCOPE|BAILIAN|OPENROUTER|MODELSCOPE)_|.*_proxy$"
    for name in [name for name in os.environ if re.match(ours, name, re.I)]:
        monkeypatch.delenv(name)
    folder = tmp_path / "home" / ".qwen"
    folder.mkdir(parents=True)
    for name in ("HOME", "USERPROFILE"):
        monkeypatch.setenv(name, str(folder.parent))
    for name in ("SETTINGS", "DEFAULTS"):
        monkeypatch.setenv(f"QWEN_CODE_SYSTEM_{name}_PATH", str(tmp_path / "none"))
    monkeypatch.chdir(tmp_path)
    for owner, name in WAITS:
        monkeypatch.setattr(owner, name, 0.002)
    return folder


@pytest.fixture()
def upstream(monkeypatch):
    fake = FakeQwen()
    monkeypatch.setenv("QWEN_OAUTH_BASE_URL", fake.origin)
    yield fake
    fake.close()


def write_login(home, upstream, expires_in=3600, name="oauth_creds.json", **fields):
    path, temporary = home / name, home / (name + ".new")  # as the CLI: atomically
    value = {"access_token": "at_1", "refresh_token": "rt_1", "token_type": "Bearer"}
    value["resource_url"] = upstream.origin
    value["expiry_date"] = int((time.time() + expires_in) * 1000)
    temporary.write_text(json.dumps({**value, **fields}))
    temporary.chmod(0o600)
    os.replace(str(temporary), str(path))
    return path


@pytest.fixture()
def login(home, upstream):
    return write_login(home, upstream)


@pytest.fixture()
def serve():
    """Start servers; they are stopped at the end."""
    with contextlib.ExitStack() as stack:

        def start(**arguments):
            arguments.setdefault("port", 0)
            server = stack.enter_context(qp.make_server(**arguments))
            stack.callback(server.shutdown, grace=0)
            return server

        yield start


@pytest.fixture()
def keyed(serve, upstream, monkeypatch):
    """Start servers with a key, in front of the fake's DashScope endpoint or at base_url=."""
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    return lambda **options: serve(**{"base_url": upstream.dashscope, "model": "m", **options})


@pytest.fixture()
def key_server(keyed):
    """A proxy in front of the fake's DashScope endpoint."""
    return keyed(model="qwen3-max")


def ask(server, body=None, method="POST", path="/v1/chat/completions", headers=None):
    """One request on a connection of its own: status, headers, body bytes."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
    try:
        data = body if isinstance(body, (bytes, type(None))) else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **(headers or {})}
        connection.request(method, path, data, headers)
        response = connection.getresponse()
        return response.status, response.headers, response.read()
    finally:
        connection.close()


def chat(server, stream=False, **more):
    """A chat request: (status, headers, JSON) or, streamed, (status, headers, list of data strings)."""
    body = {"messages": HI, "stream": stream, **more}
    status, headers, answer = ask(server, body)
    if not headers["Content-Type"].startswith("text/event-stream"):
        return status, headers, json.loads(answer)
    return status, headers, data_of(answer)


def get(server, path, **headers):
    status, _, body = ask(server, method="GET", path=path, headers=headers)
    return status, json.loads(body)


def data_of(body):
    """The data of events, each of one line; comments are left out."""
    blocks = body.decode().split("\n\n")
    assert blocks.pop() == "" and b"\r" not in body
    data = [block for block in blocks if not block.startswith(":")]
    assert all(block.startswith("data: ") and "\n" not in block for block in data)
    return [block[len("data: ") :] for block in data]


CHAT = "/v1/chat/completions"
POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\n"
HEALTH = b"GET /health HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"
WEBSOCKET = b"GET /v1/responses HTTP/1.1\r\nHost: localhost\r\n"
LENGTH, CHUNKS = b"Content-Length: %d\r\n\r\n", b"Transfer-Encoding: chunked\r\n\r\n"
BODY = json.dumps({"messages": HI}).encode()


def post(body=BODY, head=b"", stream=False):
    """The bytes of a chat request; the body is a streamed one with stream=True."""
    body = json.dumps({"messages": HI, "stream": True}).encode() if stream else body
    return POST + head + LENGTH % len(body) + body


def url_of(listener):
    return f"http://127.0.0.1:{listener.getsockname()[1]}/compatible-mode/v1"


def statuses(received):
    return [int(status) for status in re.findall(rb"HTTP/1\.1 (\d+) ", received)]


def at_once(*works):
    """What each of the works returns, of which each has a thread."""
    with concurrent.futures.ThreadPoolExecutor(len(works)) as executor:
        running = [executor.submit(work) for work in works]
    return [each.result() for each in running]


def until(is_true):
    """Wait for what must come true in time."""
    end = time.monotonic() + WAIT
    while not is_true():
        assert time.monotonic() < end
        time.sleep(0.01)
    return True


def raw(server, request, family=socket.AF_INET):
    """Send bytes as they are; everything that comes back until the connection ends."""
    address = "127.0.0.1" if family == socket.AF_INET else "::1"
    with socket.create_connection((address, server.port), timeout=WAIT) as connection:
        connection.sendall(request)
        with contextlib.suppress(ConnectionResetError):
            received = b""
            for piece in iter(lambda: connection.recv(65536), b""):
                received += piece
        return received


def target(model="qwen3.7-plus", family="dashscope", config=None):
    """A model of a provider of this family, with what the settings say of it."""
    entries = {model: config or {}}
    return qp.Target(
        qp.Provider("t", "http://h/v1", None, "t", entries, qp.FAMILIES[family]), model
    )


def translate(pieces, request=None):
    """The chunks of an answer, translated without any socket."""
    request = request or {"stream_options": {"include_usage": True}}
    decoder, chunks = qp.ChatDecoder(request, target()), []
    decoder.sink = lambda sent: chunks.append(sent[0])
    for piece in pieces:
        if not decoder.is_done:
            decoder.feed(piece)
    decoder.close()
    return chunks


def collect(chunks):
    collector = qp.CompletionCollector()
    for value in chunks:
        collector.feed(value)
    usages = [value["usage"] for value in chunks if value.get("usage")]
    return collector.completion(usages[0] if usages else None)


def text_in(chunks, name="content"):
    choices = [choice for value in chunks for choice in value["choices"]]
    return "".join(choice["delta"].get(name) or "" for choice in choices)


IS_ROOT, NOBODY = hasattr(os, "geteuid") and os.geteuid() == 0, 65534
posix = pytest.mark.skipif(os.name == "nt", reason="needs POSIX files and signals")
as_root = pytest.mark.skipif(not IS_ROOT, reason="only root can give files away")


@pytest.fixture()
def no_secrets(monkeypatch):
    """The program knows no secret of another test."""
    monkeypatch.setattr(qp, "SECRETS", qp.Secrets())


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


def check_linear(work, small, factor=8, clock=time.thread_time, least=0.001):
    """Costs grow like the input, with a margin of three; the square of 8 would be 64."""

    def cost(size):
        started = clock()
        work(size)
        return clock() - started

    most = 3 * factor * max(least, min(cost(small) for _ in range(3)))
    assert any(cost(small * factor) < most for _ in range(3))


def lines_of(server, path, body):
    """The lines of a streamed answer as they come."""
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=WAIT)
    with contextlib.closing(connection):
        connection.request("POST", path, json.dumps({**body, "stream": True}))
        yield from connection.getresponse()


@pytest.fixture()
def quick(keyed, monkeypatch):
    """A server that gives a sign of life every 50 ms."""
    monkeypatch.setattr(qp.Waiter, "HEARTBEAT", 0.05)
    monkeypatch.setattr(qp.Waiter, "LOOK", 0.02)
    return keyed()


def comments_until(server, gate, count):
    """The lines of a stream; the gate opens at so many comments."""
    lines = []
    for line in lines_of(server, CHAT, {"messages": HI}):
        lines.append(line)
        if lines.count(b": keep-alive\n") == count:
            gate.set()
    return lines


# ----------------------------------------------------------------------------------------------------
# Audit: what a reader of the file is promised
# ----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(sys.version_info < (3, 10), reason="needs sys.stdlib_module_names")
def test_imports_are_of_the_standard_library_only():
    names = set()
    for node in ast.walk(ast.parse(SOURCE)):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module.split(".")[0])
    assert names and names <= set(sys.stdlib_module_names) | {"__future__"}


def readme():
    with open(os.path.join(HERE, "README.md"), encoding="utf-8") as file:
        return " ".join(file.read().split())


def test_every_host_in_the_file_is_a_constant_and_in_the_readme():
    start = SOURCE.index("# Constants\n")
    constants = SOURCE[start : SOURCE.index("# Errors and small tools\n", start)]
    named = set(re.findall(r'(?:https://|")((?:[\w-]+\.)+(?:ai|cn|com))\b', constants))
    code = "".join(line.partition("#")[0] + "\n" for line in SOURCE.splitlines())
    assert set(re.findall(r"https?://([\w-]+\.[\w.-]*\w)", code)) - {"127.0.0.1"} <= named
    assert [host for host in named if host not in readme()] == []


def test_readme_holds_the_help(monkeypatch, main):
    monkeypatch.setenv("COLUMNS", "100")
    # The first heading is another one before Python 3.10.
    said = main("--help")[1].replace("optional arguments:", "options:")
    assert len(set(re.findall(r"--[a-z][a-z-]+", said))) > 15
    assert " ".join(said.split()) in readme()


def test_doctests_pass():
    found = doctest.testmod(qp)
    assert found.attempted > 5 and found.failed == 0


def test_import_starts_nothing_and_needs_no_home():
    code = "import threading, qwen_proxy; print(threading.active_count())"
    more = {"cwd": HERE, "env": {"PATH": ""}, "capture_output": True, "timeout": WAIT}
    done = subprocess.run([sys.executable, "-c", code], **more)
    assert (done.stdout.strip(), done.stderr) == (b"1", b"")


# -- no secret leaves by the program's own words --------------------------------------------------

OPENAI = {"auth": {"selectedType": "openai"}}
KEY, PASSWORD = 'K3y/o+f  the="u"~77', 'Zq1/wx+"yz"=~v'
SECRETS = [KEY, "pässwörd/Zürich?9", "p😀ss/w😀rd", "100%25+sure!", 'C:\\pass\\word"9']
SECRETS += ["a.*b(c)[d]$^{2}|x", "two\nlines"]
ESCAPES = "\x1b]0;x\x07\x1b[2J\r\x9b1m\u202e\x7f\nFORGED"
ENDPOINTS = {"chat": CHAT, "text": "/v1/completions"}
ENDPOINTS.update({name: "/v1/" + name for name in ("embeddings", "responses")})
ASKED = {"chat": {"messages": HI}, "responses": {"input": "Hi"}, "text": {"prompt": "Hi"}}
ROUTES = {name: (ENDPOINTS[name], body) for name, body in ASKED.items()}
ROUTES.update({f"{n}, streamed": (p, {**b, "stream": True}) for n, (p, b) in ROUTES.items()})
ROUTES["embeddings"] = "/v1/embeddings", {"input": "Hi", "model": "text-embedding-v4"}


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
        pieces = {form: range(len(form) - 5) for form in forms_of(secret).values()}
        return {form for form in pieces if any(form[n : n + 6] in text for n in pieces[form])}

    return find


@pytest.fixture()
def odd_key_server(no_secrets, keyed, upstream, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    upstream.access_tokens.add(KEY)
    return keyed(model="qwen3-max")


def test_a_secret_is_masked_whole_in_every_form_and_order(no_secrets):  # H5
    for value, (end, order) in itertools.product(SECRETS, [("-", 1), ("x", -1)]):
        value += end
        for known in [value[:-1], value[1:], value, "user:" + value][::order]:
            qp.SECRETS.add(known)
        said = {name: qp.public(f"before {form} after") for name, form in forms_of(value).items()}
        assert said == dict.fromkeys(said, "before *** after"), value


def test_to_mask_a_text_takes_no_square_of_its_length(no_secrets):  # B6
    for secret in ('"quoted-secret', "/slash-secret", "\\backslash-secret"):
        qp.SECRETS.add(secret)
    check_linear(lambda count: qp.public("\\" * count), 500)


def test_control_characters_become_visible_and_all_else_is_unchanged(no_secrets):  # H13
    for char in "\x00\x07\x08\t\r\n\x1b\x7f\x9b\u2028\u202e":
        said = qp.public(f"a{char}b")
        assert said[:2] == "a\\" and said[-1] == "b" and said.isprintable()
        assert qp.public(f"a{char}b\x1b\x00", keep=char)[:3] == f"a{char}b"
    qp.SECRETS.add("abcde")  # too short to be told from a word
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
        is_answer = "error_finish" in line or "HELLO" in line
        assert "because" in shown or "because" not in said or is_answer


def test_a_code_has_no_blank_and_at_most_60_characters(odd_key_server, upstream):  # H5
    for code, kept in (("A.b/" + "x" * 56, 1), ("x" * 61, 0), ("a b", 0), ("a\t", 0)):
        for line in ('400 {"error": {"message": "m", "code": JSON}}', '403 {"code": JSON}'):
            shown = json.loads(told(odd_key_server, upstream, line, code).partition("\n\n")[2])
            assert shown["error"]["code"] == (code if kept else None)


@rows("""
cut | place | template
a refusal | 2000 | 400 | RAW
its message | 300 | 400 | {"error": {"message": JSON}}
a message | 200 | /v1/chat/completions | {"messages": [{"role": "user", "content": JSON}]}
a path | 196 | /v1/ | PATH
a kind of item | 60 | /v1/responses | {"input": [{"type": JSON}]}
""")
def test_a_secret_where_a_text_is_cut_leaves_no_fragment(
    odd_key_server, upstream, traces, cut, place, template
):  # H5
    for form in [form for form in forms_of(KEY).values() if template != "PATH" or '"' not in form]:
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


@pytest.fixture()
def open_home(monkeypatch):
    """A home that nobody may enter, which pytest's own folders do not allow."""
    with tempfile.TemporaryDirectory() as top:
        monkeypatch.setenv("HOME", top)
        for name in ("SETTINGS", "DEFAULTS"):
            monkeypatch.setenv(f"QWEN_CODE_SYSTEM_{name}_PATH", top + "/none")
        monkeypatch.chdir(top)
        folder = pathlib.Path(top, ".qwen")
        for path in (folder.parent, folder):
            path.mkdir(exist_ok=True)
            path.chmod(0o755)
        yield folder


@posix
@as_root
@rows("""
name | kind
settings, closed | settings.json | closed
settings, a pipe | settings.json | pipe
settings, a folder | settings.json | folder
settings, a link to nothing | settings.json | dangling
variables, closed | .env | closed
the folder, a file | . | emptied
the folder, closed | . | closed
the folder, not to be listed | . | listless
""")
def test_what_cannot_be_read_is_named_with_its_reason(open_home, name, kind):  # O2
    path = open_home / name
    if kind in ("closed", "listless"):
        if not path.is_dir():
            path.write_text("{}")
        path.chmod(0o711 if kind == "listless" else 0o700)
    elif kind in ("pipe", "folder"):
        make(path, kind)
    else:
        spoil(path, kind)
    os.seteuid(NOBODY)
    try:
        providers = qp.Providers(qp.Options())
    finally:
        os.seteuid(0)
    said = "\n".join(providers._discovery.notes)
    assert str(open_home) in said
    assert re.search("permission denied|not a regular|no such file|a directory", said)


def settings_of(upstream, *entries, **more):
    """Settings with entries at an upstream, one named m if none is given, and their key."""
    entry = {"id": "m", "envKey": "K", "baseUrl": upstream.dashscope}
    listed = [{**entry, **each} for each in entries or [{}]]
    value = {"env": {"K": "sk-good-1"}, "security": OPENAI, "modelProviders": {"openai": listed}}
    return {**value, **more}


def write_settings(home, *arguments, **more):
    (home / "settings.json").write_text(json.dumps(settings_of(*arguments, **more)))


@rows("""
place
another variable | {"env": {"K": "k-fine", "UNUSED_API_KEY": JSON}}
the key for all | {"security": {"auth": {"apiKey": JSON, "baseUrl": "URL"}}}
a header | {"config": {"customHeaders": {"X-Team": JSON}}}
a header by a variable | {"config": {"customHeaders": {"X-Team": "${TEAM}"}}, "env": {"K": "k-fine", "TEAM": JSON}}
a text in extra_body | {"config": {"extra_body": {"a": {"b": [{"c": JSON}]}}}}
a password in extra_body | {"config": {"extra_body": {"dbPassword": "RAW"}}}
.env | .env
a client's key | client
an access token | access_token
a refresh token | refresh_token
""")
def test_a_secret_of_settings_and_logins_is_not_said(home, upstream, serve, traces, place):  # H5
    secret = PASSWORD[: 7 if "RAW" in place else None]
    if place[0] == "{":
        kept = json.loads(fill(place.replace("URL", upstream.dashscope), secret))
        write_settings(home, upstream, {"generationConfig": kept.pop("config", {})}, **kept)
    elif place == ".env":
        (home / ".env").write_text(f"K='{secret}'")
        write_settings(home, upstream, env={})
    else:
        write_login(home, upstream, **({place: secret} if "token" in place else {}))
    server = serve(api_key=[secret] if place == "client" else [])
    said = told(server, upstream, "400 RAW", everything(secret), Authorization="Bearer " + secret)
    assert "because" in said and traces(secret, said, "with status") == set()


def test_a_plain_value_of_extra_body_stays_readable(no_secrets, home, upstream, serve):  # H5
    body = {"mode": "fast", "words": "with blanks between"}
    write_settings(home, upstream, {"generationConfig": {"extra_body": body}})
    said = "because fast is odd, with blanks between"
    assert said in told(serve(), upstream, "400 " + said)


def userinfo_of(kind, secret=PASSWORD):
    """What stands before the host, and the password in it, with a character that addresses use."""
    user, colon, char = kind.partition(":")
    if char == "%":
        return user + colon + urllib.parse.quote(secret, safe=""), secret
    return user + colon + secret.replace("/", char), secret.replace("/", char)


@rows("""
place | scheme | kind
an entry's | baseUrl | http:// | user:
an entry's, no scheme | baseUrl | | user:@/@
a login's | resource_url | http:// | user:?
a login's, no scheme | resource_url | | me@example.org:
OpenAI's | OPENAI_BASE_URL | http:// | :
the identity host | QWEN_OAUTH_BASE_URL | http:// | user:%
a forward proxy | HTTP_PROXY | http:// | user:@/@
a SOCKS proxy | ALL_PROXY | socks5h:// | me@example.org:
a forward proxy, no scheme | http_proxy | | user:/
""")
def test_userinfo_is_in_no_host_or_words(
    home, upstream, serve, outside, traces, monkeypatch, place, scheme, kind
):  # H5
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


@rows("""
text | words
nothing | | not a JSON object
a list | [] | not a JSON object
one token | {"access_token": "a"} | refresh_token
no date | {"access_token":"a","refresh_token":"b","token_type":"Bearer"} | expiry_date
true | {"access_token":"a","refresh_token":"b","token_type":"Bearer","expiry_date":true} | expiry_date
a word | {"access_token":"a","refresh_token":"b","token_type":"Bearer","expiry_date":"x"} | expiry_date
empty token | {"access_token":"","refresh_token":"b","token_type":"Bearer","expiry_date":1} | access_token
""")
def test_incomplete_login_is_named(text, words):
    with pytest.raises(qp.CredentialError, match=words):
        qp.Login(qp.loads(text))


def test_base_url_of_resource_url():
    assert qp.Login.base_url_of("portal.qwen.ai") == "https://portal.qwen.ai/v1"
    assert qp.Login.base_url_of("https://x.y/") == "https://x.y/v1"
    assert qp.Login.base_url_of("http://127.0.0.1:1/v1") == "http://127.0.0.1:1/v1"


def credentials_of(path, upstream):
    return qp.OAuthCredentials(str(path), upstream.origin)


@pytest.fixture()
def stale(home, upstream):
    """A login that must be refreshed: its file, its credentials."""
    path = write_login(home, upstream, expires_in=0)
    return path, credentials_of(path, upstream)


@pytest.mark.parametrize("rotates", [True, False], ids=["a new refresh token", "none"])
def test_refresh_30_seconds_before_expiry_keeps_what_it_must(home, upstream, monkeypatch, rotates):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    upstream.rotates, kept = rotates, "rt_2" if rotates else "rt_1"
    note = {"of": "another program", "half": "\ud83d"}
    path = write_login(home, upstream, expires_in=29, note=note)
    path.chmod(0o644)
    before = path.stat().st_mtime_ns
    assert credentials_of(path, upstream).access_token() == "at_2"
    fields = json.loads(path.read_text())
    assert (fields["refresh_token"], fields["note"]) == (kept, note)
    assert fields["resource_url"] == upstream.origin
    assert fields["expiry_date"] == int((time.time() + 21600) * 1000)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600 and path.stat().st_mtime_ns > before
    assert os.listdir(str(home)) == ["oauth_creds.json"]


def test_forced_refresh_names_the_rejected_token_and_spares_a_newer_one(login, upstream):
    credentials = credentials_of(login, upstream)
    assert credentials.access_token() == credentials.access_token(rejected="at_0") == "at_1"
    write_login(login.parent, upstream, access_token="at_new_login")
    assert credentials.access_token() == "at_new_login" and upstream.requests == []
    for _ in range(2):
        assert credentials.access_token(rejected="at_new_login") == "at_2"
    assert upstream.refreshes == ["rt_1"]


def test_one_refresh_for_twenty_threads(upstream, stale):
    barrier = threading.Barrier(20)

    def run():
        barrier.wait(WAIT)
        return stale[1].access_token()

    assert (at_once(*[run] * 20), upstream.refreshes) == (["at_2"] * 20, ["rt_1"])


def refuse_to_write(*arguments, **more):
    raise OSError(errno.ENOSPC, "No space left on device")


def interrupt(*arguments, **more):
    raise KeyboardInterrupt


def locked(home, age=0):
    """The lock that somebody made so many seconds ago."""
    path, then = home / "oauth_creds.lock", time.time() - age
    path.write_text("somebody")
    os.utime(path, (then, then))
    return path


def test_login_refreshed_by_another_process_meanwhile_is_adopted(home, upstream, stale):
    (_, credentials), lock, result = stale, locked(home), []
    thread = threading.Thread(target=lambda: result.append(credentials.access_token()))
    thread.start()
    write_login(home, upstream, access_token="at_other", refresh_token="rt_other")
    lock.unlink()
    thread.join(WAIT)
    assert (result, upstream.refreshes) == (["at_other"], [])


@pytest.mark.parametrize("ahead", [60, 0, -60])
@pytest.mark.parametrize("age, polls", [(5, 3), (20, 3), (36, 0)])
def test_lock_is_broken_only_when_stale_by_the_file_server_s_clock(
    home, monkeypatch, ahead, age, polls
):  # O11
    path, seen, pauses, start = locked(home, age), [], [], time.monotonic()
    monkeypatch.setattr(qp.time, "time", lambda real=time.time: real() + ahead)
    monkeypatch.setattr(qp.time, "monotonic", lambda: start + 10 * len(seen))

    def pause(seconds):
        pauses.append(seconds)
        seen.append(os.listdir(home))
        if len(seen) == 3:
            path.unlink()

    with qp.LockFile(str(path), pause):
        # Where ours is behind, only the time that it was seen for can be told.
        assert len(seen) == (polls if ahead >= 0 else 3) and path.read_text() != "somebody"
    assert seen == [["oauth_creds.lock"]] * len(seen) and os.listdir(home) == []
    assert pauses == sorted(pauses)


def test_a_full_disk_does_not_keep_a_stale_lock(home, stale, monkeypatch):  # O11
    locked(home, 40)
    monkeypatch.setattr(qp.tempfile, "TemporaryFile", refuse_to_write)
    assert stale[1].access_token() == "at_2"


def test_lock_that_is_not_ours_any_more_is_left_alone(home):
    path = home / "oauth_creds.lock"
    with qp.LockFile(str(path)):
        path.write_text("thief")
    assert path.read_text() == "thief"


@pytest.mark.parametrize("text", ["from the future", None])
def test_lock_of_which_no_age_can_be_told_is_broken_when_stale(home, monkeypatch, text):
    monkeypatch.setattr(qp.LockFile, "STALE", 0.05)
    path = locked(home, -1e6)
    if not text:
        path.unlink()
        path.symlink_to(home / "nowhere")
    with qp.LockFile(str(path)):
        assert path.read_text() != "somebody"
    assert os.listdir(str(home)) == []


HTML = reply(403, b"<html><title>aliyun_waf</title></html>", "text/html")


# What the identity host answers, and how it is told.
@rows(r"""
answer | words
a gate | 403 <html><title>aliyun_waf</title></html> | web page.*aliyun_waf
a page | 200 \n <!DOCTYPE html><body>x | web page
a page of 400 | 400 <html> | web page
a long text | 500 RAW | \b321\b
a list | 500 [{"error": "no_words"}] | (?!.*no_words).*\b23\b
in words | 500 {"error": "a_code", "error_description": "in words"} | in words
a code | 500 {"error": "x"} | x
cut | 200 {cut |
an error | 200 {"error": "server_error"} | server_error
too fast | 429 {"error": "slow"} | slow
no token | 200 {"access_token": null} |
""")
def test_trouble_at_the_token_endpoint_is_told_and_no_verdict(
    upstream, stale, monkeypatch, answer, words
):  # H4
    path, credentials = stale
    before = path.read_text()
    monkeypatch.setattr(qp.OAuthCredentials, "PAUSE", 0)
    upstream.token_script.append(answer_of(answer, "x" * 321))
    with pytest.raises(qp.UpstreamError) as caught:
        credentials.access_token()
    assert caught.value.status == 503 and path.read_text() == before
    assert re.match(f"(?s).*?{words}", caught.value.message)
    assert credentials.access_token() == "at_2"


@pytest.mark.parametrize("status", [400, 401])
def test_refused_refresh_token_is_dead_until_the_file_changes(home, upstream, stale, status):
    path, credentials = stale
    before = path.read_text()
    upstream.token_script.append(reply(status, {"error": "invalid_request"}))
    for _ in range(3):
        with pytest.raises(qp.CredentialError, match="/auth"):
            credentials.access_token()
    assert len(upstream.requests) == 1 and path.read_text() == before
    upstream.refresh_tokens = {"rt_new"}
    write_login(home, upstream, expires_in=0, refresh_token="rt_new")
    assert credentials.access_token() == "at_2"


def test_refused_refresh_adopts_what_another_process_wrote_meanwhile(home, upstream, stale):
    def another_was_faster(form):
        write_login(home, upstream, access_token="at_other", refresh_token="rt_other")
        return reply(400, {"error": "invalid_request"})

    upstream.token_script.append(another_was_faster)
    assert stale[1].access_token() == "at_other"


@pytest.mark.parametrize("new", [None, "new"])
def test_what_is_not_written_is_written_later_or_gives_way(home, upstream, stale, monkeypatch, new):
    path, credentials = stale
    monkeypatch.setattr(qp.OAuthCredentials, "SAVE_PAUSE", 0)
    with monkeypatch.context() as patch:
        patch.setattr(qp.os, "replace", refuse_to_write)
        assert [credentials.access_token(), credentials.access_token()] == ["at_2"] * 2
    assert "no space" in credentials.problem.lower()
    assert json.loads(path.read_text())["access_token"] == "at_1"
    if new:
        write_login(home, upstream, access_token="at_new", refresh_token="rt_new")
    now = new or "2"
    assert [credentials.access_token(), credentials.access_token()] == [f"at_{now}"] * 2
    assert json.loads(path.read_text())["refresh_token"] == f"rt_{now}"
    assert len(upstream.refreshes) == 1 and os.listdir(str(home)) == ["oauth_creds.json"]
    assert new or not credentials.problem


def test_a_client_that_leaves_leads_to_no_refresh_without_the_lock(
    home, upstream, stale, monkeypatch
):
    monkeypatch.setattr(qp.Waiter, "HEARTBEAT", 0)
    lock, watch = locked(home), qp.Waiter(None, 5, refuse_to_write)
    with pytest.raises(qp.ClientGone):
        stale[1].access_token(pause=watch.sleep)
    assert upstream.refreshes == [] and lock.read_text() == "somebody"


def test_a_failure_that_many_share_keeps_nobodys_frames(upstream, stale):
    _, credentials = stale
    upstream.token_script.append(HTML)
    seen = []
    for _ in range(3):
        with pytest.raises(qp.UpstreamError) as caught:
            credentials.access_token()
        seen.append(caught.value)
    assert len({id(error) for error in seen}) == 3 and len({str(error) for error in seen}) == 1
    assert credentials._failed[2].__traceback__ is None and len(upstream.requests) == 1


def test_crash_between_write_and_rename_leaves_the_old_file_whole(home, login, monkeypatch):
    before = login.read_text()
    monkeypatch.setattr(qp.os, "replace", interrupt)
    with pytest.raises(KeyboardInterrupt):
        qp.LoginFile(str(login)).write("{}")
    assert login.read_text() == before
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
    upstream.expires_in = qp.Login.REFRESH_MARGIN + 0.3  # seconds for which it is fresh
    path = write_login(home, upstream, expires_in=0)
    arguments = [sys.executable, "-c", RACER, HERE, str(path), upstream.origin, "3"]
    processes = [subprocess.Popen(arguments, stdout=subprocess.PIPE) for _ in range(4)]
    said = [process.communicate(timeout=60)[0].strip() for process in processes]
    assert said == [b"0 []"] * 4
    assert upstream.reused == [] and len(upstream.refreshes) >= 3
    assert len(set(upstream.refreshes)) == len(upstream.refreshes)
    assert os.listdir(str(home)) == ["oauth_creds.json"]


@pytest.mark.skipif(os.name == "nt", reason="needs SIGKILL")
def test_kill_in_the_middle_of_a_refresh_harms_nobody(home, upstream, stale):
    (path, credentials), asked = stale, threading.Event()
    before, hanging = path.read_text(), Reply(200, [], [threading.Event()])
    upstream.token_script.append(lambda form: asked.set() or hanging)
    arguments = [sys.executable, "-c", RACER, HERE, str(path), upstream.origin, "60"]
    process = subprocess.Popen(arguments, stdout=subprocess.DEVNULL)
    assert asked.wait(WAIT)
    process.kill()
    process.wait(WAIT)
    lock = home / "oauth_creds.lock"
    assert path.read_text() == before and lock.exists()
    os.utime(lock, (time.time() - 36, time.time() - 36))
    assert credentials.access_token() == "at_2" and not lock.exists()


@rows(r"""
line
cut | 200 {"access_token": "RAW-access", "refresh_token": "RAW-ref
a form | 200 access_token=RAW-access&refresh_token=RAW-refresh&expires_in=3600
a page | 200 <html><body>{GRANT}</body></html>
JSON in JSON | 200 INNER << {GRANT}
an object for an error | 400 {"error": {GRANT}}
an error | 400 {"error": JSON, "error_description": JSON}
an object for words | 500 {"error_description": {GRANT}}
""")
def test_a_body_of_the_identity_host_is_not_told(home, upstream, serve, traces, monkeypatch, line):
    token = "tokenZq1dwxv"  # H4
    known = token if "JSON" in line else "rt_1"  # those two fields are told, without known secrets
    write_login(home, upstream, expires_in=0, refresh_token=known)
    answer = answer_of(line, token)
    upstream.token_script.extend([answer] * 20)
    server = serve(retries=0)
    answers = [fetch(server, route) for route in [*ROUTES, "/v1/models"]]
    assert {status for status, _ in answers[:-1]} <= {401, 503} and len(upstream.token_script) < 20
    monkeypatch.setattr(qp.DeviceAuthorization, "FIRST_INTERVAL", 0.001)
    upstream.token_script.clear()
    upstream.device_answers.extend([answer, DENIED])
    assert qp.main(["login", "--no-browser"]) == 1
    upstream.device_answer = lambda form: answer
    assert qp.main(["login", "--no-browser"]) == 1
    assert traces(token, *(said for _, said in answers)) == set()


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


@posix
@rows("""
name | number | owner
renamed | replace | 0 | None
a mount | replace | errno.EBUSY | None
a folder that is read-only | open | errno.EROFS | None
another's, a mount | replace | errno.EXDEV | NOBODY
another's folder | open | errno.EACCES | NOBODY
""")
def test_a_login_is_renamed_or_written_in_place(home, upstream, monkeypatch, name, number, owner):
    number, owner = value_of(number), value_of(owner)
    path = write_login(home, upstream, expires_in=0, note={"of": "another program"})  # H6, H8
    path.write_text(json.dumps(json.loads(path.read_text()), indent=300))  # longer than what comes
    path.chmod(0o644)
    give(owner, path)
    os.utime(path, (time.time() + 3600, time.time() + 3600))
    before, sync, synced, seen = path.stat(), os.fsync, [], []
    monkeypatch.setattr(os, "fsync", lambda fd: synced.append(os.fstat(fd).st_ino) or sync(fd))
    break_(monkeypatch, name, number, seen)
    credentials = credentials_of(path, upstream)
    assert credentials.access_token() == "at_2" and not credentials.problem
    fields, after = json.loads(path.read_text()), path.stat()
    assert (fields["refresh_token"], fields["note"]) == ("rt_2", {"of": "another program"})
    assert (after.st_uid, after.st_gid, stat.S_IMODE(after.st_mode)) == (*before[4:6], 0o600)
    assert after.st_ino in synced and (after.st_ino == before.st_ino) is bool(number)
    assert after.st_mtime_ns > before.st_mtime_ns and os.listdir(home) == [path.name]
    assert re.match(r"oauth_creds\.json\.qwen_proxy-[0-9a-f]+\.tmp\Z", seen[0])


@posix
@pytest.mark.parametrize(
    "moment, link", [("fsync", os.link), ("fchown", os.symlink), ("busy", os.symlink)]
)
def test_a_swapped_file_changes_no_other(home, upstream, tmp_path, monkeypatch, moment, link):
    path, others = write_login(home, upstream, expires_in=0), tmp_path / "others"  # H6
    give(NOBODY, path)
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
        credentials_of(path, upstream).access_token()
    assert facts_of(others) == before


def make(path, kind):
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link":
        make(path.parent / "pipe", "pipe")
        path.symlink_to(path.parent / "pipe")
    else:
        path.write_text(kind)


LOGIN = '{"access_token": "at_1", "refresh_token": "rt_1", "token_type": "Bearer"}'


def give(owner, *paths):
    """Give files away, links themselves, to somebody or to nobody; only root can."""
    if owner is not None and not IS_ROOT:
        pytest.skip("only root can give files away")
    for path in paths if owner is not None else ():
        os.chown(path, owner, owner, follow_symlinks=False)


def make_link(path, there, steps, *owners):
    """A link to there/oauth_creds.json, directly or by a second one; owners: of all three."""
    (there / "link").symlink_to("oauth_creds.json")
    path.symlink_to(there / ["oauth_creds.json", "link"][steps - 1])
    for file, owner in zip((path, there / "link", there / "oauth_creds.json"), owners):
        give(owner, file)


@posix
@rows("""
content | steps | owners
empty | "" | 1 |
another file | '{"theme": "dark"}' | 2 |
no login | LOGIN.replace('"rt_1"', "null") | 1 |
to nothing | None | 2 |
another's login | LOGIN | 1 | 0, 0, NOBODY
another's links | LOGIN | 1 | NOBODY, NOBODY, 0
""")
def test_a_link_leads_to_its_owner_only(home, upstream, tmp_path, caplog, content, steps, owners):
    path, there = write_login(home, upstream, expires_in=0), tmp_path / "there"  # H7
    credentials = credentials_of(path, upstream)
    credentials.login()
    path.unlink()
    there.mkdir()
    if value_of(content) is not None:
        make(there / path.name, value_of(content))
    make_link(path, there, int(steps), *pieces_of(owners))
    before = facts_of(home, there)
    assert [credentials.access_token(), credentials.access_token()] == ["at_2", "at_2"]
    said = [record.msg for record in caplog.records if record.levelname == "WARNING"]
    assert "saved" in credentials.problem and any(str(path) in line for line in said)
    with pytest.raises(OSError):
        qp.LoginFile(str(path)).write(LOGIN)
    assert facts_of(home, there) == before


@posix
@pytest.mark.parametrize("steps, owner", [(1, None), (2, NOBODY)])
def test_a_link_to_a_login_of_its_owner_stays_a_link(home, upstream, tmp_path, steps, owner):  # H7
    path, there = home / "oauth_creds.json", tmp_path / "there"
    there.mkdir()
    target = write_login(there, upstream, expires_in=0)
    make_link(path, there, steps, *[owner] * 3)
    assert credentials_of(path, upstream).access_token() == "at_2"
    assert path.is_symlink() and json.loads(target.read_text())["refresh_token"] == "rt_2"
    assert owner in (None, target.stat().st_uid) and len([*home.iterdir(), *there.iterdir()]) == 3


@posix
def test_a_disk_that_takes_no_more_leaves_the_login_whole(home, upstream, monkeypatch):  # H8
    import resource

    path = write_login(home, upstream, expires_in=0)
    before, limits = path.read_bytes(), resource.getrlimit(resource.RLIMIT_FSIZE)
    credentials = credentials_of(path, upstream)
    break_(monkeypatch, "open", errno.EROFS, [])
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before), limits[1]))
    try:
        assert credentials.access_token() == "at_2"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert credentials.problem and path.read_bytes() == before


@pytest.mark.skipif(not (IS_ROOT and hasattr(os, "setresuid")), reason="needs root, on Linux")
@rows("""
modes | owner | is_saved
neither | 0o500, 0o400 | NOBODY | False
the file | 0o500, 0o600 | NOBODY | True
the folder | 0o700, 0o400 | NOBODY | True
neither, all is root's | 0o755, 0o644 | 0 | False
root's file in a sticky folder | 0o1777, 0o666 | 0 | True
""")
def test_what_cannot_be_saved_is_said_beforehand(
    open_home, upstream, main, modes, owner, is_saved
):  # H8
    owner, is_saved, path = value_of(owner), value_of(is_saved), write_login(open_home, upstream)
    for file, mode in zip((open_home, path), value_of(modes)):
        give(owner, file)
        file.chmod(mode)
    assert main("status") and main("--port=0")  # nobody may not read what Python loads at need
    os.setresuid(NOBODY, NOBODY, 0)
    try:
        said = [main("status")[1], main("--port=0")[1]]
        credentials = credentials_of(path, upstream)
        assert credentials.access_token("at_1") == "at_2"
    finally:
        os.setresuid(0, 0, 0)
    assert ["cannot be saved" in words for words in said] == [not is_saved] * 2
    assert bool(credentials.problem) is not is_saved
    assert json.loads(path.read_text())["refresh_token"] == ("rt_2" if is_saved else "rt_1")
    assert os.listdir(open_home) == [path.name]


@posix
@rows("""
place | kind
settings | settings.json | pipe
settings linked | settings.json | link
login | oauth_creds.json | pipe
trust | trustedFolders.json | pipe
variables | ../../.env | pipe
settings of the system | ../../none | pipe
""")
def test_what_is_no_file_holds_no_start_up(home, login, tmp_path, place, kind):  # H18
    (home / "trustedFolders.json").write_text(json.dumps({str(tmp_path): "TRUST_FOLDER"}))
    place = pathlib.Path(os.path.abspath(home / place))
    spoil(place, "vanished")
    make(place, kind)
    done = subprocess.run([*program(), "status"], timeout=WAIT / 2, capture_output=True)
    is_told = str(place).encode() in done.stdout
    assert done.returncode == 1 and (is_told or b"not checked" in done.stdout)
    assert b"Traceback" not in done.stderr


@posix
@rows("""
name | kind
gone | json | vanished
cut | json | cut
a folder | json | directory
a pipe | json | pipe
a link to a pipe | json | link
a pipe for a lock | lock | pipe
""")
def test_a_login_in_memory_outlives_what_is_no_file(home, stale, monkeypatch, name, kind):  # H18
    monkeypatch.setattr(qp.LockFile, "STALE", 0.05)
    (_, credentials), result, path = stale, [], home / ("oauth_creds." + name)
    credentials.login()
    spoil(path, kind)
    if kind in ("pipe", "link"):
        make(path, kind)
    assert credentials.login() and bool(credentials.problem) == (name == "json")
    thread = threading.Thread(target=lambda: result.append(credentials.access_token()), daemon=True)
    thread.start()
    thread.join(WAIT / 2)
    assert result == ["at_2"]


@posix
@rows("""
name | age | stays
old | oauth_creds.json.qwen_proxy-0123456789ab.tmp | 40 |
young | oauth_creds.json.qwen_proxy-0123456789ab.tmp | 10 | yes
another program's | oauth_creds.json.0123456789ab.tmp | 40 | yes
another name | my.oauth_creds.json.qwen_proxy-0123456789ab.tmp | 40 | yes
""")
def test_only_our_own_old_temporary_files_are_swept(home, stale, name, age, stays):  # H18
    (path, credentials), then = stale, time.time() - int(age)
    make(home / name, "file")
    os.utime(home / name, (then, then))
    assert credentials.access_token() == "at_2"
    assert sorted(os.listdir(home)) == sorted([path.name, *[name] * bool(stays)])


PENDING = reply(400, {"error": "authorization_pending", "error_description": "wait"})
TOKENS = {"access_token": "at_9", "refresh_token": "rt_9", "token_type": "Bearer"}
SUCCESS = reply(200, {**TOKENS, "expires_in": 21600, "resource_url": "portal.qwen.ai"})
DENIED = reply(400, {"error": "access_denied"})


# What the identity host answers, the pauses before each, and what is said if it is no login.
@rows("""
answers | slept | words
approved | SUCCESS | 2 |
pending | PENDING, SUCCESS | 2, 2 |
too fast | reply(429, {"error": "slow_down"}), SUCCESS | 2, 3 |
too fast, as the standard has it | reply(400, {"error": "slow_down"}), PENDING, SUCCESS | 2, 3, 2 |
no token | reply(200, {"access_token": None}), SUCCESS | 2, 2 |
a page | HTML._replace(status=503), SUCCESS | 2, 2 |
denied | DENIED | 2 | refused
a gate | HTML | 2 | 403
expired | reply(400, {"error": "expired_token"}) | 2 | expired
expired, client 401 | reply(401, {"error": "x"}) | 2 | expired
too many | reply(429, {"error": "too_many"}) | 2 | 429
""")
def test_device_authorization_waits_for_a_verdict(upstream, answers, slept, words):
    upstream.device_answers.extend(pieces_of(answers))
    device, pauses = qp.DeviceAuthorization(upstream.origin), []
    try:
        assert device.wait(pauses.append).access_token == "at_9"
        assert not words
    except qp.CredentialError as error:
        assert words and words in str(error)
    assert pauses == pieces_of(slept)
    form = dict(urllib.parse.parse_qsl(upstream.requests[-1][2].decode()))
    verifier = form["code_verifier"]
    digest = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest())
    assert len(verifier) == 43 and digest.rstrip(b"=").decode() == upstream.challenge


ODD_TOKENS = [("expires_in", value) for value in (float("inf"), 10**400, True, "3600")]
ODD_TOKENS += [("access_token", value) for value in (5, ["at_9"], "at 9", "at_9\r\nX: y", "ä")]
ODD_TOKENS += [("refresh_token", "x\r\nHost: y"), ("resource_url", "x\r\nHost: y")]


@pytest.mark.parametrize("name, value", ODD_TOKENS, ids=lambda value: ascii(value)[:24])
def test_an_odd_answer_leaves_the_login_or_a_good_one(home, upstream, monkeypatch, name, value):
    path = write_login(home, upstream, expires_in=0)  # H14
    before, odd = path.read_text(), {name: value}
    answer = reply(200, {**json.loads(SUCCESS.pieces[0]), **odd})
    upstream.token_script.append(answer)
    try:
        assert credentials_of(path, upstream).access_token() == "at_9"
        assert_good(path)
    except qp.ProxyError:
        assert path.read_text() == before
    path.unlink()
    monkeypatch.setattr(qp.DeviceAuthorization, "FIRST_INTERVAL", 0.01)
    upstream.device_answers.extend([answer, DENIED])
    real = upstream.device_answer
    upstream.device_answer = lambda form: reply(200, {**json.loads(real(form).pieces[0]), **odd})
    if qp.main(["login", "--no-browser"]) == 0:
        assert_good(path)
    else:
        assert os.listdir(home) == []


def assert_good(path):
    """The file holds the new token, and nothing that a later request could stumble over."""
    fields = json.loads(path.read_text())
    for name in ("access_token", "refresh_token", "token_type", "resource_url"):
        assert re.match(r"[\x21-\x7e]+\Z", fields[name]), name
    assert fields["access_token"] == "at_9"
    assert time.time() + qp.Login.REFRESH_MARGIN < fields["expiry_date"] / 1000 < time.time() + 1e9


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
    monkeypatch.setattr(qp, "post_form", lambda *arguments: (200, answer, "a JSON object"))
    return qp.DeviceAuthorization(base).verification_uri


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
ENOUGH = 250  # bytes: more than two seconds' worth, where 0.1 are allowed


class NoiseUpstream:
    """Begins an answer and goes on for ever, until the other side leaves: then `left` is set."""

    def __init__(self, start, *noise, pace=0.002, most=10**9):
        self.start, self.noise, self.pace, self.most, self.sent = start, noise, pace, most, 0
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.left, self.is_flowing, self.never = (threading.Event() for _ in range(3))
        self.url = url_of(self.listener)
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        with contextlib.suppress(OSError):
            while True:
                self.answer(self.listener.accept()[0])
                self.left.set()

    def answer(self, connection):
        with connection, contextlib.suppress(OSError):
            connection.recv(65536)
            connection.sendall(self.start)
            for piece in itertools.cycle(self.noise):
                if self.sent >= self.most:
                    return
                connection.sendall(piece)
                self.sent += 1
                if self.sent == 20:
                    self.is_flowing.set()
                self.never.wait(self.pace)


DRIPPED = [("token", kind) for kind in DRIPS]
DRIPPED += [("proxy", "headers"), ("status", "status line"), ("status", "early answers")]


@pytest.mark.parametrize("place, kind", DRIPPED)
def test_who_drips_is_left(home, upstream, serve, monkeypatch, capsys, place, kind):  # B3
    for owner in (
        (qp.Upstream, "CONNECT_TIMEOUT"),
        (qp, "STATUS_TIMEOUT"),
        (qp.OAuthCredentials, "TIMEOUT"),
    ):
        monkeypatch.setattr(*owner, 0.1)
    start, drip = DRIPS[kind]
    dripper = NoiseUpstream(start, *(b"%c" % byte for byte in drip), pace=0.01, most=ENOUGH)
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
  "modelProviders": {"openai": %s, "gemini": [{"id": "gemini-x"}],
    "mine": [{"id": "m", "baseUrl": "http://h/v1", "envKey": "MY_KEY"}]},
  "providerProtocol": {"mine": "openai"},
  "security": {"auth": {"selectedType": "openai"}}, "model": {"name": "qwen3.7-plus"} }"""
ENTRIES = """[
    {"id": "qwen3.6-plus", "baseUrl": "${HOST}/compatible-mode/v1", "envKey": "DASHSCOPE_API_KEY"},
    {"id": "qwen3.7-plus", "baseUrl": "https://coding-intl.dashscope.aliyuncs.com/v1",
      "envKey": "BAILIAN_CODING_PLAN_API_KEY",
      "generationConfig": {"contextWindowSize": 5, "extra_body": {"enable_thinking": true}}},
    {"id": "old", "wireApi": "responses", "baseUrl": "http://h/v1"},
    {"id": "tts", "voiceOnly": true}, {"no": "id"}, "junk"]"""


def catalogue(home, options=None, **environ):
    nowhere = {f"QWEN_CODE_SYSTEM_{name}_PATH": "/none" for name in ("SETTINGS", "DEFAULTS")}
    environ = {"HOME": str(home.parent), **nowhere, **environ}
    return qp.Providers(options or qp.Options(), environ)


def write_entries(home, version=4, form="%s", text=SETTINGS):
    (home / "settings.json").write_text(text % (version, form % ENTRIES), encoding="utf-8")


@pytest.mark.parametrize("version, form", [(3, "%s"), (4, "%s"), (5, '{"models": %s}')])
def test_settings_give_providers_and_the_active_one(home, version, form):
    write_entries(home, version, form)
    discovery = catalogue(home, HOST="http://gateway:1").current()
    assert [provider.name for provider in discovery.providers] == ["coding-intl", "gateway:1", "h"]
    active, other, mine = discovery.providers
    assert (active.credentials.access_token(), active.family.name) == ("sk-sp-invented", "coding")
    assert discovery.model == "qwen3.7-plus"
    assert active.entries["qwen3.7-plus"]["extra_body"] == {"enable_thinking": True}
    assert other.base_url == "http://gateway:1/compatible-mode/v1"
    assert other.family.name == "dashscope"
    assert "DASHSCOPE_API_KEY is not set" in other.problem() and "MY_KEY" in mine.problem()


def test_settings_that_lose_the_provider_of_the_options_are_no_fault(
    home, upstream, serve, monkeypatch
):
    monkeypatch.setattr(qp.Providers, "INTERVAL", 0)
    write_settings(home, upstream)
    server = serve(provider="127.0.0.1")
    assert chat(server)[0] == 200
    (home / "settings.json").write_text('{"modelProviders": {}}')
    status, _, body = chat(server)
    assert status == 401 and "127.0.0.1" in body["error"]["message"]
    assert get(server, "/v1/models")[1]["data"] == []
    write_settings(home, upstream, ui={"theme": "another"})
    assert chat(server)[0] == 200


def test_key_precedence_environment_dotenv_settings(home):
    write_entries(home)

    def key(**environ):
        return catalogue(home, **environ).current().providers[0].credentials.access_token()

    assert key() == "sk-sp-invented"
    (home / ".env").write_text('export BAILIAN_CODING_PLAN_API_KEY="sk-sp-dotenv" # mine\n')
    assert key() == "sk-sp-dotenv"
    (home.parent / ".env").write_text("BAILIAN_CODING_PLAN_API_KEY=sk-sp-second\n")
    assert key() == "sk-sp-dotenv"
    assert key(BAILIAN_CODING_PLAN_API_KEY="sk-sp-env") == "sk-sp-env"
    assert key(BAILIAN_CODING_PLAN_API_KEY="") == "sk-sp-dotenv"


# The variables that are set, the name of the provider, and what is said.
@rows("""
environ | name | words
OpenRouter | OPENROUTER_API_KEY="sk-or-1" | openrouter |
DashScope of which region | DASHSCOPE_API_KEY="sk-1" | | --provider dashscope-intl
OpenAI | OPENAI_API_KEY="sk-1" | | --base-url
OpenAI and an address | OPENAI_API_KEY="sk-1", OPENAI_BASE_URL="http://h:1/v1" | h:1 |
a plan | BAILIAN_CODING_PLAN_API_KEY="sk-sp-1", OPENAI_BASE_URL="https://coding.dashscope.aliyuncs.com/v1" | coding |
none | | |
""")
def test_a_lone_key_is_enough_if_its_host_is_certain(home, environ, name, words):
    discovery = catalogue(home, **fields(environ)).current()
    assert [provider.name for provider in discovery.providers] == ([name] if name else [])
    assert words in discovery.advice


def test_presets(home):
    for name, (base_url, variable) in qp.PRESETS.items():
        found = catalogue(home, qp.Options(provider=name), **{variable: "sk-x"}).current()
        provider = found.providers[0]
        assert (provider.name, provider.base_url) == (name, base_url)
        assert provider.credentials.access_token() == "sk-x"


def test_provider_of_the_command_line_is_never_overruled(home):
    write_entries(home)
    for options in (qp.Options(base_url="http://chosen:1/v1"), qp.Options(provider="openrouter")):
        names = catalogue(home, options, HOST="http://gateway:1", OPENAI_API_KEY="sk-1")
        found = [target.provider for target in names.targets("qwen3.7-plus")]
        assert found == names.current().providers[:1]


@rows("""
text
a list of variables | {"env": ["a"]}
a list of providers | {"modelProviders": [1]}
a number for an address | {"security": {"auth": {"baseUrl": 5, "selectedType": "openai"}}}
half an address | {"modelProviders": {"openai": [{"id": "x", "baseUrl": "http://[::1"}]}}
an object for a name | {"model": {"name": {}}}
""")
def test_odd_settings_do_not_stop_the_start(home, text):
    (home / "settings.json").write_text(text)
    for provider in catalogue(home).current().providers:
        provider.describe()


@pytest.mark.parametrize(
    "qwen_home, expected",
    [("/a/b", "/a/b"), ("~/q", "{home}/q"), ("~", "{home}"), ("", "{home}/.qwen")],
)
def test_qwen_home_as_the_cli_resolves_it(home, qwen_home, expected):
    environ = {"HOME": str(home.parent), **({"QWEN_HOME": qwen_home} if qwen_home else {})}
    assert qp.qwen_home(environ) == expected.format(home=home.parent)


def test_qwen_cli_auth_seeds_the_file_once(home, upstream):
    seed = json.dumps({**TOKENS, "access_token": "at_seed", "expiry_date": 9e12})
    catalogue(home, QWEN_CLI_AUTH=seed)
    path = home / "oauth_creds.json"
    assert json.loads(path.read_text())["access_token"] == "at_seed"
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    write_login(home, upstream)
    catalogue(home, QWEN_CLI_AUTH=seed)
    assert json.loads(path.read_text())["access_token"] == "at_1"


# -- where a request goes when files are spoilt, distrusted or wrong -------------------------------

FIRST = "A sk-good-first"


class World:
    """A home, the folder above it, three upstreams A, B, C (A is the identity host), a server."""

    def __init__(self, home, serve, monkeypatch):
        self.home, self.root, self.serve = home, home.parent.parent, serve
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

    def settings(self, letter, key):
        """settings.json of one entry at an upstream, with its key."""
        more = {"env": {"K": key}, "model": {"name": "m"}, "ui": {"theme": "x" * 99}}
        return settings_of(self.fakes[letter], **more)

    def variables(self, letter, key):
        return {"OPENAI_API_KEY": key, "OPENAI_BASE_URL": self.url[letter], "OPENAI_MODEL": "m"}

    def other_login(self, *kinds):
        """A login at B that would be used if settings.json did not say otherwise."""
        if "oauth" in kinds:
            write_login(self.home, self.fakes["B"])
        for name, value in self.variables("B", "sk-good-other").items():
            if "environment" in kinds:
                self.setenv(name, value)


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
def world(home, serve, monkeypatch):
    made = World(home, serve, monkeypatch)
    yield made
    for fake in made.fakes.values():
        fake.close()


USER, PROJECT = "home/.qwen/settings.json", ".qwen/settings.json"
TRUSTED = "home/.qwen/trustedFolders.json"


@rows("""
place | other | damage
the user's settings, cut | home/.qwen/settings.json | oauth | cut
the user's settings, a comma | home/.qwen/settings.json | environment | comma
the user's settings, gone | home/.qwen/settings.json | oauth | vanished
the user's settings, a folder | home/.qwen/settings.json | environment | directory
the system's settings | system.json | environment | dangling
the project's settings | .qwen/settings.json | environment | vanished
the home's variables | home/.env | oauth | emptied
the project's variables | .qwen/.env | oauth | dangling
trust | home/.qwen/trustedFolders.json | environment | cut
""")
def test_what_is_spoilt_while_running_keeps_the_account(world, caplog, place, other, damage):  # H2
    named, trust = PROJECT if place == TRUSTED else place, {str(world.root): "TRUST_FOLDER"}
    content = world.variables if place.endswith(".env") else world.settings
    world.other_login(other)
    world.write(TRUSTED, trust)
    world.write(named, content("A", "sk-good-first"))
    world.start()
    assert world.goes() == FIRST
    caplog.clear()
    spoil(world.root / place, damage)
    assert [world.goes() for _ in range(3)] == [FIRST] * 3
    said = [one.getMessage() for one in caplog.records if one.levelname == "WARNING"]
    assert [pathlib.Path(place).name in words for words in said] == [True], said
    world.write(TRUSTED, trust)
    world.write(named, content("C", "sk-good-mended"))
    assert world.goes() == "C sk-good-mended"
    world.write(named, {"UNUSED": "x"})  # good, and it says less
    assert world.goes()[:2] == "B "


@rows("""
place | damage | options
cut | home/.qwen/settings.json | cut |
a folder | home/.qwen/settings.json | directory | model="m"
zeros | home/.qwen/settings.json | zeros |
the system's | system.json | comma | failover=True
""")
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
    world.start(**fields(options))
    get(world.server, "/v1/models")
    for fake in world.fakes.values():
        del fake.requests[:]
    named = CHAT, {"messages": HI, "model": "oauth/coder-model"}
    for target, request in [*ROUTES.values(), named]:
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
    # Every other row has the file elsewhere, and .env in .qwen.
    is_odd = TRUST_RULES.index(rule) % 2
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
    assert any("not trust" in note for note in qp.Providers(qp.Options()).current().notes)


IDENTITY_HOSTS = {"environment": True, "home/.qwen/.env": True, "elsewhere/.env": True}
OTHERS = "home/.env work/.env .qwen/.env system.json home/.qwen/settings.json".split()
IDENTITY_HOSTS.update(dict.fromkeys([*OTHERS, "work/.qwen/settings.json"], False))


@pytest.mark.parametrize("source", IDENTITY_HOSTS)
def test_the_identity_host_comes_from_the_users_own_files_only(world, monkeypatch, source):  # H3
    asked, variable, cli = [], {"QWEN_OAUTH_BASE_URL": "http://identity.example"}, world.home

    def post_form(base_url, path, *arguments):
        asked.append(base_url + path)
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
another has a key  | a@A:KA M@B:KB        | KA KB | A:a,M   | a=KA M=KB A/M=KA u~KA B/u~KB
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
    # Never used for what has no key of its own.
    world.setenv("OPENAI_API_KEY", "sk-good-openai")
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


@rows("""
field | value | place
a number | baseUrl | 5 |
a list | baseUrl | ["https://h.example/v1"] | OPENAI_BASE_URL
a switch | baseUrl | True | security
no scheme | baseUrl | "h.example/v1" | OPENAI_BASE_URL
an unset variable | baseUrl | "$UNSET/v1" | security
blanks | baseUrl | " " |
no address | baseUrl | ABSENT |
a number for a variable | envKey | 5 |
""")
def test_an_entry_with_a_wrong_field_is_refused_by_its_name(world, outside, field, value, place):
    auth = {**OPENAI["auth"], **({"baseUrl": world.url["B"]} if place == "security" else {})}  # H12
    world.setenv("OPENAI_API_KEY", "sk-good-openai")
    if place == "OPENAI_BASE_URL":
        world.setenv(place, world.url["B"])
    wrong = {field: value_of(value)}
    settings = settings_of(world.fakes["A"], wrong, {"id": "good"}, model={"name": "m"})
    if value == "ABSENT":
        del settings["modelProviders"]["openai"][0][field]
    world.write(USER, {**settings, "security": {"auth": auth}})
    world.start()
    get(world.server, "/v1/models")
    assert world.fakes["B"].requests == []
    for request in ({}, {"model": "m", "stream": True}):
        goes = world.goes(**request)
        assert goes.startswith("401 ") and field in goes
    assert world.goes(model="good") == "A sk-good-1" and outside == []


# Entries as id@upstream with a field of their own, in file order; model.name and model.baseUrl;
# and where a request goes that names no model, or the field that its 401 names.
@rows("""
entries | model | expected
the first | x@A; m@B; m@A | m | B
the first, without a key | x@A; m@B envKey="NONE"; m@A | m | NONE
the first, without an address | x@A; m@B baseUrl=" "; m@A | m | baseUrl
the first, of another API | x@A; m@B wireApi="responses"; m@A | m | wireApi
the first, for voices | m@B voiceOnly=True; m@A | m | voiceOnly
that at the address | x@A; m@B; m@C | m C | C
that at the address, broken | m@B; m@C envKey=5; m@C | m C | envKey
none at the address | x@A; m@B; m@C | m A | B
the CLI's default | x@A; qwen3.7-max@B envKey="NONE"; qwen3.7-max@A | | NONE
""")
def test_the_first_entry_with_the_id_counts(world, entries, model, expected):
    listed, (name, _, letter) = [], model.partition(" ")
    for entry in entries.split("; "):
        id, host, more = re.match(r"(\S+)@(\w) ?(.*)", entry).groups()
        listed.append({"id": id, "baseUrl": world.url[host], "envKey": "K", **fields(more)})
    wanted = {"name": name, **({"baseUrl": world.url[letter]} if letter else {})}
    settings = {"modelProviders": {"openai": listed}, "env": {"K": "sk-good-1"}, "model": wanted}
    world.write(USER, {**settings, "security": OPENAI})
    world.start()
    goes = world.goes()
    assert goes == f"{expected} sk-good-1" or goes.startswith("401 ") and expected in goes


@pytest.mark.parametrize("value", [5, "file:///v1", ["https://h.example"]])
@pytest.mark.parametrize("field", ["baseUrl", "resource_url"])
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


@pytest.mark.parametrize("status", [429, 502, 503, 529])
def test_retries_before_the_first_byte(key_server, upstream, status, monkeypatch):
    monkeypatch.setattr(qp.Call, "RETRY_DELAY", 0.01)
    text = "Requests rate limit exceeded, please try again later."
    upstream.script.extend([refusal(text, status, "limit_requests")] * 2)
    assert chat(key_server)[0] == 200 and len(upstream.bodies()) == 3


def test_retry_after_is_honoured_or_passed_on(key_server, upstream):
    slow = refusal("slow", 429)
    upstream.script.append(slow._replace(headers=[("Retry-After", "0")]))
    assert chat(key_server)[0] == 200
    upstream.script.append(slow._replace(headers=[("Retry-After", "300")]))
    status, headers, body = chat(key_server)
    assert (status, headers["Retry-After"]) == (429, "60")
    assert body["error"]["code"] == "rate_limit_exceeded"


def test_unreachable_upstream_is_502(keyed, upstream):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        urls = ["http://no-such-host.invalid/v1", f"https://127.0.0.1:{upstream.port}/v1"]
        for url, is_stream in itertools.product([url_of(free), *urls], (False, True)):
            status, _, body = chat(keyed(base_url=url, retries=0), stream=is_stream)
            assert (status, body["error"]["code"]) == (502, "upstream_unreachable"), url
            assert "cannot be reached" in body["error"]["message"]


def test_401_forces_one_refresh_and_one_repeat(login, upstream, serve):
    upstream.access_tokens, server = set(), serve()
    assert chat(server)[0] == 200 and upstream.refreshes == ["rt_1"]
    tokens = [headers["Authorization"] for path, headers, _ in upstream.requests if "chat" in path]
    assert tokens == ["Bearer at_1", "Bearer at_2"]
    # Then the refresh is refused, too.
    upstream.access_tokens, upstream.refresh_tokens = set(), set()
    assert chat(server)[0] == 401


def test_useless_login_is_refreshed_once_and_called_ended(login, upstream, serve):
    words = "invalid access token or token expired"
    upstream.script.extend([refusal(words, 401, "invalid_api_key")] * 5)
    server = serve()
    for _ in range(4):
        status, _, body = chat(server)
        assert status == 401
    assert "2026-04-15" in body["error"]["message"] and "/auth" in body["error"]["message"]
    assert len(upstream.refreshes) == 1 and len(upstream.bodies()) == 5


RATE_LIMIT = "Requests rate limit exceeded, please try again later."
INSPECTION = "Input data may contain inappropriate content."
STANDING = "Access denied, please make sure your account is in good standing."
INPUT_LENGTH = INVALID + "Range of input length should be [1, 983616]"
NESTED = {"message": '{"request_id":"r0","code":"C3","message":"m3"}', "code": "x"}
FRAME = (
    b'id:1\nevent:error\n:HTTP_STATUS/%d\ndata:{"request_id":"r-1","code":"%s","message":"%s"}\n\n'
)
FINISH = (FRAME % (429, b"X", b"Free allocated quota exceeded.")).decode().strip()


def too_long(message, status=400):
    return reply(status, {"error": {"message": message, "code": status}})


# What an upstream answers, and the client gets, streamed or not: status and code; words of the
# message and lines of the head, "; " between them.
@rows(r"""
answer | expected | words
not for us | reply(405, {"error": "Coding Plan is currently only available for Coding Agents"}) | 403 client_not_accepted | Coding Agents
wrong key | refusal("Incorrect API key provided. For details, see: x", 401, "invalid_api_key") | 401 invalid_api_key | region
any other, client 12 | refusal("no", 400) | 400 invalid_parameter_error | no
too long, client 35 | refusal(INPUT_LENGTH) | 400 context_length_exceeded | 983616
too large | refusal("Exceeded limit on max bytes to request body : 6291456") | 413 request_too_large | 6 MiB
native, client 13 | reply(400, {"code": "InvalidParameter", "message": "m1", "request_id": "r-1"}) | 400 InvalidParameter | m1; X-Request-Id: r-1
framed, client 14 | reply(400, b'data: {"error":{"message":"m2","code":"c2"},"request_id":"r-1"}') | 400 c2 | m2
JSON in JSON | reply(400, {"error": NESTED, "request_id": "r-1"}) | 400 C3 | m3
a number for a code | reply(400, {"error": {"code": "1302", "message": "busy"}}) | 429 rate_limit_exceeded | busy
inspection | refusal(INSPECTION, 400, "data_inspection_failed") | 400 content_filter | inappropriate
standing | refusal(STANDING, 400, "Arrearage") | 429 insufficient_quota | good standing
hard quota, client 35 | refusal("hour allocated quota exceeded", 429, "insufficient_quota") | 429 insufficient_quota | hour; x-should-retry: false
rate, clients 12 and 35 | refusal(RATE_LIMIT, 429, "limit_requests") | 429 rate_limit_exceeded | rate limit; Retry-After: 5
credits | reply(402, {"error": {"message": "Insufficient credits", "code": 402}}) | 429 insufficient_quota | credits
no model | refusal("The model `x` does not exist", 404, "model_not_found") | 404 model_not_found | The model `x` does not exist. /v1/models; --alias 'gpt-*=ID'
a redirect | reply(302, b"", headers=[("Location", "/elsewhere")]) | 502 None | redirect
nothing | Reply(404, [], []) | 404 None | base URL
a page | reply(200, b"<html><title>WAF</title></html>", "text/html") | 502 upstream_html | WAF
a page of 429 | reply(429, b"<html><title>Slow down</title></html>", "text/html") | 429 rate_limit_exceeded | Slow down
a page of 502 | reply(502, b"<html><title>busy</title></html>", "text/html") | 503 html | busy
empty | reply(200, b"", "text/event-stream") | 502 upstream_cut | empty
an error of 200 | reply(200, {"error": {"message": "m4", "code": "Throttling.AllocationQuota"}}) | 429 rate_limit_exceeded | m4
a frame | stream(FRAME % (400, b"InvalidParameter", b"m5")) | 400 InvalidParameter | m5
error_finish | stream(chunk({"content": FINISH}, "error_finish")) | 429 insufficient_quota | Free allocated
too long, in a stream | stream(event({"error": {"message": INPUT_LENGTH}})) | 400 context_length_exceeded | 983616
busy, in a stream | stream(event({"error": {"code": "ModelServingError", "message": "Too many requests"}})) | 503 ModelServingError | Too many
no access, in a stream | stream(event({"error": {"code": "Model.AccessDenied", "message": "no access"}})) | 403 Model.AccessDenied | no access
a fault, client 12 | reply(500, {"error": {"message": "boom", "code": "internal_error"}}) | 502 internal_error | boom
too long, llama.cpp, opencode #45834 | too_long("request (66202 tokens) exceeds the available context size (65536 tokens), try increasing it") | 400 context_length_exceeded | 66202
too long, llama.cpp of 2025 | too_long("the request exceeds the available context size. try increasing the context size", 500) | 400 context_length_exceeded | exceeds
too long, llama.cpp, while it answers | too_long("Context size has been exceeded.", 500) | 400 context_length_exceeded | exceeded
too long, SGLang | too_long("Requested token count exceeds the model's maximum context length of 202752 tokens.") | 400 context_length_exceeded | 202752
too long, SGLang, the input | too_long("The input (262200 tokens) is longer than the model's context length (262144 tokens).") | 400 context_length_exceeded | 262200
too long, vLLM | too_long("This model's maximum context length is 262144 tokens. However, you requested 0 output tokens") | 400 context_length_exceeded | 262144
too long, vLLM, media | too_long("The decoder prompt (length 5000) is longer than the maximum model length of 4096.") | 400 context_length_exceeded | 5000
too long, Ollama | too_long("prompt too long; exceeded max context length by 100918 tokens") | 400 context_length_exceeded | 100918
too long, llama.cpp, in a stream | stream(event({"error": {"message": "Context size has been exceeded.", "code": 500}})) | 400 context_length_exceeded | exceeded
too long, but not the context | refusal("String value length (30000000) exceeds the maximum allowed (28000000)") | 413 request_too_large | 28000000
too many, but not the context | refusal("The length of tools exceeds the limit") | 400 invalid_parameter_error | tools
""")
def test_refusals_become_clear_statuses(key_server, upstream, answer, expected, words):
    key_server.options = key_server.options._replace(retries=0)
    routes = ("chat", "responses") if "chunk(" in answer else ("chat", "responses", "text")
    for route, is_stream in itertools.product(routes, (False, True)):
        upstream.script.append(value_of(answer))
        asked = {**ASKED[route], "stream": is_stream}
        status, headers, body = ask(key_server, asked, path=ENDPOINTS[route])
        body, error = json.loads(body), json.loads(body)["error"]
        assert f"{status} {error['code']}" == expected
        assert headers["Content-Type"] == "application/json"
        assert set(error) == {"message", "type", "param", "code"}
        for text in words.split("; "):
            assert text in f"{headers}\n{error['message']}"
        assert body.get("request_id", headers["X-Request-Id"]) == headers["X-Request-Id"]


CALL_PLEASE = {"tool_choice": "required", "tools": [function()]}
JSON_PLEASE = {"response_format": JSON_OBJECT}


# What the upstream says, or nothing where it is the fake that refuses; the client's request; what
# is sent last, None for what is not; what the log says of it, or nothing if it was sent once.
@rows(r"""
message | request_ | repaired | words
limit | | model="some-model", max_tokens=100000 | max_tokens=65536 | with max_tokens 65536
JSON, nobody knows | | model="qwen4-plus", **JSON_PLEASE | enable_thinking=False, response_format=JSON_OBJECT | without thinking
JSON, thinks | | model="qwen4-plus", reasoning_effort="high", **JSON_PLEASE | enable_thinking=True, response_format=None |
JSON, thinks not | | model="qwen4-plus", reasoning_effort="none", **JSON_PLEASE | enable_thinking=False, response_format=JSON_OBJECT |
tool, nobody knows | | model="qwen4-plus", **CALL_PLEASE | enable_thinking=False, tool_choice="required" | without thinking
tool, thinks | | model="qwen4-plus", extra_body=THINKS, **CALL_PLEASE | enable_thinking=True, tool_choice="auto" |
tool, thinks as in Ollama | | model="qwen4-plus", think=True, **CALL_PLEASE | enable_thinking=True, tool_choice="auto" |
budget of GLM | | model="glm-5", thinking_budget=40000 | enable_thinking=True, thinking_budget=32768 | with thinking_budget 32768
schema | The model qwen3-max: json_schema is not supported | response_format=JSON_SCHEMA | response_format=JSON_OBJECT | with
logprobs | For model qwen3-max, logprobs is not supported | logprobs=True, top_logprobs=2 | logprobs=None, top_logprobs=None | without
tool_choice | tool_choice: required is not supported | **CALL_PLEASE | tool_choice="auto" | with
no thoughts, claude-code-router #1227 | thinking is enabled but reasoning_content is missing in assistant tool call message | model="glm-5.1", own=True, messages=LOOP | messages=LOOP, **SILENT | without thinking
no thoughts, Kimi | thinking is enabled but reasoning_content is missing in assistant tool call message | model="kimi-k2.6", messages=LOOP | messages=THOUGHTFUL, enable_thinking=False | without thinking
no thoughts, thinks | thinking is enabled but reasoning_content is missing in assistant tool call message | model="glm-5", enable_thinking=True, messages=LOOP | messages=THOUGHTFUL, enable_thinking=True | with a word
an answer begun, llama.cpp #20861 | Assistant response prefill is incompatible with enable_thinking. | model="Qwen/Qwen3-8B", own=True, messages=[*HI, assistant("Once")] | **SILENT | without thinking
an answer begun, mastra #15518 | Assistant response prefill is incompatible with enable_thinking. | model="gemma4:26b", own=True, messages=[*HI, assistant("Once")] | **SILENT | without thinking
parts, cherry-studio #9352 | Input should be a valid string: input.messages.0.content | own=True, routes=["chat"], messages=[user(parts("a", "b", **CACHED))] | messages=[user("a\nb")] | with text parts joined
a picture long ago | image input is not supported | own=True, messages=LOOK | messages=UNSEEN | without media
a picture long ago, in other words | The error info is [Unexpected item type in content.] | own=True, messages=LOOK | messages=UNSEEN | without media
a picture long ago, qwen-code #1888 | Invalid value: file. Supported values are: 'text','image_url' and 'video'. | own=True, messages=LOOK | messages=UNSEEN | without media
a picture of a tool | image input is not supported | own=True, routes=["chat"], messages=[*LOOP[:2], result("c", LOOK[0]["content"])] | messages=[*LOOP[:2], result("c", UNSEEN[0]["content"])] | without media
always thinks | The value of the enable_thinking parameter is restricted to True. | model="glm-5.9", enable_thinking=False | enable_thinking=True | with thinking
""")
def test_named_refusals_are_repaired_once(
    key_server, upstream, serve, caplog, message, request_, repaired, words
):
    server, request_, expected = key_server, fields(request_), fields(repaired)
    if request_.pop("own", False):
        server = serve(base_url=upstream.origin + "/own/v1", model="some-model")
    for route in request_.pop("routes", ("chat", "responses")):
        upstream.script.extend([refusal(message)] if message else [])
        asked = request_ if route == "chat" else as_response(**request_)
        assert ask(server, {"messages": HI, **asked}, path=ENDPOINTS[route])[0] == 200
        last = upstream.bodies()[-1]
        assert {name: last.get(name) for name in expected} == expected
        assert len(upstream.bodies()) == (2 if words else 1)
        assert f"retrying {words}" in caplog.text if words else "retrying" not in caplog.text
        upstream.requests.clear()


@pytest.mark.parametrize(
    "limit, sent", [("8192", [9000, 8192]), ("9" * 5000, [9000, None])], ids=len
)
def test_a_body_that_no_repair_changes_is_not_sent_again(key_server, upstream, limit, sent):  # B9
    upstream.script.extend([refusal(f"Range of max_tokens should be [1, {limit}]")] * 3)
    status, _, body = chat(key_server, model="qwen3-max", max_tokens=9000)
    assert status == 400 and "report" not in json.dumps(body)
    assert [body["max_tokens"] for body in upstream.bodies()] == sent


# -- HTTP as upstreams and gateways break it -----------------------------------------------------


class RawUpstream:
    """Sends scripted bytes, one entry for each connection, and closes; a request is read before each.

    STALL in an entry stands for silence until the other side closes.
    """

    STALL = b"(stall)"

    def __init__(self):
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.script, self.accepted, self.url = collections.deque(), 0, url_of(self.listener)
        self.late, self.sent_late, self.reads = b"", threading.Event(), True
        self.has_been_read = threading.Event()  # set by a test that waits for self.late
        self.ended = threading.Semaphore(0)  # released for each connection that has ended
        threading.Thread(target=self.run, daemon=True).start()

    def run(self):
        while True:
            try:
                connection, _ = self.listener.accept()
            except OSError:
                return
            self.accepted += 1
            both = (connection, self.script.popleft())
            threading.Thread(target=self.talk_and_count, args=both, daemon=True).start()

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
def raw_upstream(keyed):
    fake = RawUpstream()
    fake.server = keyed(base_url=fake.url, retries=0, timeout=2)
    yield fake
    fake.listener.close()


SSE = b"".join(HELLO)
HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\n"
IN_CHUNKS = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
WHOLE_ANSWER = HEAD + b"Content-Length: %d\r\n\r\n" % len(SSE) + SSE
STALL = RawUpstream.STALL


def chunked(data, size=50, extension=b""):
    parts = [data[at : at + size] for at in range(0, len(data), size)]
    chunks = b"".join(b"%X%s\r\n%s\r\n" % (len(part), extension, part) for part in parts)
    return chunks + b"0\r\n\r\n"


SOME, FINISHED = b"".join(HELLO[:3]), b"".join(HELLO[:5])
EARLY = b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 103 Early Hints\r\nLink: x\r\n\r\n"
CUT_401 = b'HTTP/1.1 401 Unauthorized\r\nContent-Length: 500\r\n\r\n{"error":'
FAR = b"Retry-After: Mon, 99999999999999999999 Jan 2030 00:00:00 GMT\r\n\r\n"


# What the upstream sends; status and code when not streamed, and when streamed, if they differ.
# Without a code it is all of HELLO.
@rows(r"""
answer | expected
length | WHOLE_ANSWER | 200
to the end | HEAD + b"\r\n" + SSE | 200
to the end, as it says | HEAD + b"Connection: close\r\n\r\n" + SSE | 200
chunks | IN_CHUNKS + chunked(SSE) | 200
chunks with extensions | IN_CHUNKS.replace(b"chunked", b"Chunked") + chunked(SSE, 7, b";a=b") | 200
a trailer | IN_CHUNKS + chunked(SSE)[:-2] + b"X-Trailer: 1\r\n\r\n" | 200
bare LF | IN_CHUNKS.replace(b"\r\n", b"\n") + chunked(SSE) | 200
early answers | EARLY + HEAD + b"\r\n" + SSE | 200
HTTP/1.0 | b"HTTP/1.0 200\r\n\r\n" + SSE | 200
length twice | HEAD + b"Content-Length: %d, %d\r\n\r\n" % (len(SSE), len(SSE)) + SSE | 200
length of many digits | HEAD + b"Content-Length: " + b"9" * 5000 + b"\r\n\r\n" + SSE | 200
odd Retry-After | HEAD + FAR + SSE | 200
cut after the finish reason | IN_CHUNKS + chunked(FINISHED)[:-5] | 200
cut after [DONE] | IN_CHUNKS + chunked(SSE)[:-5] | 200
stall after [DONE] | IN_CHUNKS + chunked(SSE)[:-5] + STALL | 200
silence | STALL | 504 upstream_timeout
slow headers | HEAD[:20] + STALL | 504 upstream_timeout
slow first byte | HEAD + b"\r\n" + STALL | 504 upstream_timeout
stall | HEAD + b"\r\n" + SOME + STALL | 504 upstream_timeout, 200 upstream_timeout
stall in a chunk | IN_CHUNKS + chunked(SOME)[:-30] + STALL | 504 upstream_timeout, 200 upstream_timeout
cut in a chunk | IN_CHUNKS + chunked(SOME)[:-30] | 502 upstream_cut, 200 upstream_cut
cut in an event | HEAD + b"\r\n" + SOME[:-20] | 502 upstream_cut, 200 upstream_cut
less than the length | HEAD + b"Content-Length: 99999\r\n\r\n" + SOME | 502 upstream_cut, 200 upstream_cut
nothing | HEAD + b"Content-Length: 0\r\n\r\n" | 502 upstream_cut
not a byte | b"" | 502 upstream_cut
cut head | b"HTTP/1.1 200 OK\r\nContent-" | 502 upstream_cut
no HTTP | b"garbage\r\n\r\n" | 502 upstream_cut
HTTP/2 | b"HTTP/2 200 OK\r\n\r\n" | 502 upstream_cut
garbage | HEAD + b"\r\n" + bytes(range(256)) * 9 | 502 upstream_cut
a page | HEAD + b"\r\n<html><body>busy</body></html>" | 502 upstream_html
cut in the first event | IN_CHUNKS + b"5\r\nda" | 502 upstream_cut
no size of a chunk | IN_CHUNKS + b"ZZ\r\n" | 502 upstream_cut
a size below zero | IN_CHUNKS + b"-5\r\nabc" | 502 upstream_cut
a size without end | IN_CHUNKS + b"9" * 70000 | 502 upstream_cut
headers without end | HEAD + b"X: y\r\n" * 60000 | 502 upstream_cut
a length that is none | HEAD + b"Content-Length: \xb2\r\n\r\n" | 502 upstream_cut
a refusal that is cut | CUT_401 | 401 invalid_api_key
""")
def test_frames_end_in_time_and_leave_nothing_behind(keyed, answer, expected):
    fake, answer = RawUpstream(), value_of(answer)
    expected = (expected.split(", ") * 2)[:2]
    timeout = 0.4 if STALL in answer else 5
    server = keyed(base_url=fake.url, retries=0, timeout=timeout)
    threads = threading.active_count()
    fake.script.extend([answer, answer, HEAD + b"\r\n" + SSE])
    with contextlib.closing(fake.listener):
        whole_, streamed = at_once(lambda: chat(server), lambda: chat(server, stream=True))
        status, _, completion = whole_
        code = dig(completion, "error", "code")
        assert [str(status), *([code] if code else [])] == expected[0].split()
        status, _, body = streamed
        if expected[1] == "200":
            for each in (completion, collect([json.loads(value) for value in body[:-1]])):
                assert each["choices"][0]["message"]["content"] == "Hello, wörld"
        else:
            error = json.loads(body[-1]) if status == 200 else body
            assert [str(status), error["error"]["code"]] == expected[1].split()
        assert chat(server)[2]["choices"][0]["message"]["content"] == "Hello, wörld"
        assert all(fake.ended.acquire(timeout=WAIT) for _ in range(3))  # no connection is left open
    until(lambda: threading.active_count() <= threads)


# Each connection with the answers that come on it.
@rows("""
script
closed at the moment of reuse | [WHOLE_ANSWER, b""], WHOLE_ANSWER
bytes behind an answer | [WHOLE_ANSWER + b"HTTP/1.1 200 OK\\r\\n\\r\\nsmuggled", WHOLE_ANSWER], WHOLE_ANSWER
""")
def test_a_kept_connection_that_cannot_be_used_is_replaced(raw_upstream, script):
    raw_upstream.script.extend(pieces_of(script))
    answers = [chat(raw_upstream.server)[2] for _ in range(2)]
    said = [answer["choices"][0]["message"]["content"] for answer in answers]
    assert said == ["Hello, wörld"] * 2 and raw_upstream.accepted == 2


@pytest.mark.parametrize("size, count", [(10_000_000, 1), (3, 20_000)])
def test_large_and_many_chunks_arrive_whole(raw_upstream, size, count):
    said = ["ab "[:size] if size < 10 else "x" * size] * count
    answer = IN_CHUNKS + chunked(b"".join([*texts(*said), *END]), 30_000)
    raw_upstream.script.extend([answer, answer])
    completion = chat(raw_upstream.server)[2]
    assert completion["choices"][0]["message"]["content"] == "".join(said)
    _, _, data = chat(raw_upstream.server, stream=True)
    assert text_in([json.loads(value) for value in data[:-1]]) == "".join(said)


def test_late_bytes_on_an_idle_connection_are_nobodys_answer(raw_upstream):
    raw_upstream.script.extend([[WHOLE_ANSWER, b""], WHOLE_ANSWER])
    raw_upstream.late = WHOLE_ANSWER.replace("wörld".encode(), b"DEMON")
    assert chat(raw_upstream.server)[0] == 200
    raw_upstream.has_been_read.set()
    assert raw_upstream.sent_late.wait(WAIT)
    assert chat(raw_upstream.server)[2]["choices"][0]["message"]["content"] == "Hello, wörld"


def test_a_refusal_during_the_upload_is_heard(raw_upstream):
    """An endpoint that finds the body too large answers and closes before it has all of it."""
    raw_upstream.reads = False
    head = b"HTTP/1.1 413 Too Large\r\nContent-Length: 2\r\nConnection: close\r\n\r\n{}"
    raw_upstream.script.append(head)
    status, _, body = chat(raw_upstream.server, messages=[user("x" * 20_000_000)])
    assert (status, body["error"]["code"]) == (413, "request_too_large")


def test_a_client_that_leaves_is_noticed_while_the_upstream_takes_nothing(keyed):
    with socket.create_server(("127.0.0.1", 0)) as listener:
        server = keyed(base_url=url_of(listener), retries=0)
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(post(json.dumps({"messages": [user("x" * 20_000_000)]}).encode()))
            upstream_end, _ = listener.accept()
            assert len(server.exchanges) == 1
        with upstream_end:  # open, but not read from
            until(lambda: not server.exchanges)


def test_the_password_of_a_forward_proxy_does_not_reach_the_upstream(monkeypatch):
    """Behind a tunnel, kept or new, the request is the upstream's."""
    told = []

    def connect(connection):
        told.append(connection._tunnel_headers["Proxy-Authorization"])
        raise OSError

    monkeypatch.setattr(http.client.HTTPSConnection, "connect", connect)
    request = urllib.request.Request("https://h/v1/chat/completions", b"{}")
    request.add_unredirected_header("Proxy-authorization", "Basic c2VjcmV0")
    request.set_proxy("proxy:3128", "https")
    request.timeout = 1
    for number in range(2):
        assert b"c2VjcmV0" not in qp.Upstream._head_of(request)
        with pytest.raises(qp.UpstreamError):
            qp.Upstream()._connect(request)
        assert told == ["Basic c2VjcmV0"] * (number + 1)


# ----------------------------------------------------------------------------------------------------
# Event streams
# ----------------------------------------------------------------------------------------------------

TRICKY = (
    '\ufeff: comment\r\n\r\ndata:{"a":1}\r\n\r\nid:1\nevent:x\ndata: one\ndata: twö\u2028\n\n\n\r'
    "data: c\r\rretry:5\n\ndata\n\n"
    ':HTTP_STATUS/429\nevent:error\ndata:{}\n\n{"bare":1}\n\ndata: last'
).encode()
TRICKY_EVENTS = [(b'{"a":1}', "", 0), ("one\ntwö\u2028".encode(), "x", 0), (b"c", "", 0)]
TRICKY_EVENTS += [(b"", "", 0), (b"{}", "error", 429), (b'{"bare":1}', "", 0), (b"last", "", 0)]


def events_of(pieces):
    decoder = qp.EventDecoder()
    return [tuple(event) for piece in [*pieces, b"\n\n"] for event in decoder.feed(piece)]


def test_events_are_the_same_however_the_bytes_are_cut():
    assert events_of([TRICKY]) == TRICKY_EVENTS
    for cut in range(len(TRICKY) + 1):
        assert events_of([TRICKY[:cut], TRICKY[cut:]]) == TRICKY_EVENTS
    assert events_of([TRICKY[at : at + 1] for at in range(len(TRICKY))]) == TRICKY_EVENTS


# ----------------------------------------------------------------------------------------------------
# Requests
# ----------------------------------------------------------------------------------------------------


def to_upstream(request, model="qwen3-max", family="dashscope", config=None, api=qp.ChatRouteApi):
    """The body that goes out for a request, and the rules that fired."""
    request = request if {"input", "prompt"} & set(request) else {"messages": HI, **request}
    before, api = json.dumps(request), api(qp.ResponseMemory())
    body, fired = api.to_upstream(api.check(request), target(model, family, config))
    # The client's request is not changed: failover needs it again.
    assert json.dumps(request) == before
    return json.loads(qp.encode_json(body, is_request=True)), fired


def flat(entry):
    """A tool, a call, a choice or a format as the Responses API has it."""
    kind = dig(entry, "type")
    return {"type": kind, **entry[kind]} if dig(entry, kind) else entry


def item_part(part):
    kind = part["type"]
    if kind == "image_url":
        return {"type": "input_image", "image_url": part[kind]["url"]}
    return {"type": "input_file", **part[kind]} if kind == "file" else part


def items_of(role, content=None, tool_calls=(), tool_call_id=None):
    """The items of a message."""
    content = [*map(item_part, content)] if isinstance(content, list) else content
    if role == "tool":
        return [{"type": "function_call_output", "call_id": tool_call_id, "output": content}]
    kinds = {"function": "function_call", "custom": "custom_tool_call"}
    calls = [{**flat(x), "type": kinds[x["type"]], "call_id": x["id"]} for x in tool_calls]
    return [{"role": role, "content": content}, *calls] if content or not calls else calls


def as_response(
    messages=HI, tools=None, tool_choice=None, max_tokens=None, reasoning_effort=None, **more
):
    """A chat request in the words of the Responses API."""
    wanted = more.pop("response_format", None)
    words = {
        "input": [item for message in messages for item in items_of(**message)],
        "tools": tools and [*map(flat, tools)],
        "tool_choice": flat(tool_choice),
        "max_output_tokens": max_tokens,
        "reasoning": reasoning_effort and {"effort": reasoning_effort},
        "text": wanted and {"format": flat(wanted)},
    }
    return {**qp.stated(words), **more}


def spellings(given, is_everywhere):
    """A request and the route that it takes, and the same in the words of the Responses API."""
    if "prompt" in given:
        return [(qp.TextApi, given)]
    chat = [] if "input" in given else [(qp.ChatRouteApi, given)]
    if chat and not is_everywhere:
        return chat
    words = as_response(**given) if chat else given
    return [*chat, (qp.ResponsesApi, words), (qp.ChatRouteApi, words)]


EVERYTHING = json.loads(r"""{
    "model": "qwen3-vl-plus",
    "messages": [
        {"role": "system", "content": "Be brief. Grüße 你好 \u2028"},
        {"role": "user", "name": "u", "content": [{"type": "text", "text": "look"},
            {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA", "detail": "low"}}]},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [
            {"id": "c1", "type": "function", "function": {"name": "f", "arguments": "{\"a\": 1.50}"}}]},
        {"role": "tool", "tool_call_id": "c1", "content": "ok"}],
    "temperature": 0, "top_p": 0.5, "top_k": 1, "max_tokens": 7, "n": 2, "seed": 0, "stop": ["a", "b"],
    "presence_penalty": 0, "frequency_penalty": -1.5,
    "logprobs": true, "top_logprobs": 0, "parallel_tool_calls": false, "tool_choice": "none",
    "tools": [{"type": "function", "function": {"name": "f", "description": "", "parameters": {
        "type": "object",
        "properties": {"a": {"type": ["number", "null"], "default": null, "enum": [null, 1.0]}}}}}],
    "response_format": {"type": "text"}, "enable_search": false, "repetition_penalty": 1.05, "user": "me",
    "vl_high_resolution_images": true, "x_unknown": {"deep": [null, {"a": 1e-7}]},
    "zahl": 12345678901234567890, "stream": true, "stream_options": {"include_usage": true}}""")


def test_everything_passes_unchanged(key_server, upstream):
    status, _, _ = ask(key_server, EVERYTHING)
    assert status == 200 and upstream.bodies()[0] == EVERYTHING
    assert "Grüße 你好".encode() in upstream.requests[0][2]


NO_RESULT = "(no result: the call was interrupted)"
CACHED = {"cache_control": {"type": "ephemeral"}}
FIVE_CACHED = [{**part, **CACHED} for part in parts(*"01234")]
NULLS = {"default": None, "enum": [None, "x"]}
ODD_SCHEMA = {**EMPTY, "title": None, "properties": {"a": {"description": None, **NULLS}}}
CLEAN_SCHEMA = {**EMPTY, "properties": {"a": NULLS}}
NULL_FORMAT = {"name": "json", "strict": None, "schema": {"default": None}}

# What a client sends, and what the upstream gets: model@family (qwen3-max@dashscope where it is
# empty); the client's fields, with entry= for what the settings say of the model; the fields sent.
# Of those, contents= are the contents of all messages, rule= is a rule that must have fired, by its
# name or with what it says. All that is sent to Qwen must be what the strict fake takes.
REQUESTS = table(r"""
everything, own server | any/model@other | **EVERYTHING, store=True, metadata={"a": "b"}, service_tier="auto"
    | **{**EVERYTHING, "model": "any/model"}, store=True, metadata={"a": "b"}, service_tier="auto"
both names for the limit | | max_completion_tokens=5, max_tokens=9 | max_tokens=5, rule="max-tokens"
limit above the model's, client 27 | | max_tokens=320000 | max_tokens=65536, rule="max-tokens"
new name for it, client 27 | | max_completion_tokens=320000 | max_tokens=65536
limit -1 | | max_completion_tokens=-1 | rule="max-tokens"
limit -1 beside another | | max_tokens=500, max_completion_tokens=-1 | max_tokens=500
limit of a Response, client 26 | | max_output_tokens=9 | max_tokens=9
temperature 2, client 27 | | temperature=2, top_p=0 | temperature=1.99, rule="sampling-range"
null for not set | | temperature=None | rule="no-nulls"
OpenAI's own | | store=False, metadata={}, service_tier="auto", logit_bias={} | rule="openai-only"
other servers' | | min_p=0.1, keep_alive="5m" | rule="foreign-fields"
a known field of theirs, client 26 | | repeat_penalty=1.1 | repetition_penalty=1.1
both names of it | | repeat_penalty=2, repetition_penalty=1 | repetition_penalty=1, rule="foreign-fields"
think, client 26 | qwen3.7-plus | think=False | enable_thinking=False
all of theirs, client 26 | | unheard_of=1, **dict.fromkeys(qp.Rewrite.FOREIGN, 1) | unheard_of=1
OpenAI's alone, client 26 | | prediction={}, verbosity="low", prompt_cache_key="k", prompt_cache_retention="24h", safety_identifier="s", modalities=["text"], n=1,
    user={"name": "me"}, seed=None, stop=None, tools=None, tool_choice=None, response_format=None, parallel_tool_calls=True, stream_options={"include_obfuscation": False},
    logit_bias={"1": 1}, metadata={"a": "b"}, store=True | stream_options={"include_usage": True}
no tools | | tools=[], tool_choice="auto" | rule="tools"
a tool without parameters, client 29 | | tools=[function()] | tools=[F]
a strict tool, client 29 | | tools=[function(strict=True, description=None)] | tools=[F], rule="tools"
a schema, client 29 | | tools=[function(parameters={"$schema": "s", **ODD_SCHEMA})] | tools=[function(parameters={"$schema": "s", **CLEAN_SCHEMA})]
web search | | web_search_options={} | enable_search=True, rule="web-search"
functions | | functions=[{"name": "f", "parameters": {}}], function_call={"name": "f"} | tools=[F], tool_choice=function(), rule="legacy-functions"
functions, automatic | | functions=[{"name": "f"}], function_call="auto" | tools=[F], tool_choice="auto"
functions beside no tools | | functions=[{"name": "f"}], tools=[] | tools=[F]
functions with a reserved name beside no tools | | functions=[{"name": "search"}], tools=[] | tools=[function("search_tool", parameters=EMPTY)]
nulls that mean not set, and others | | tools=[{**function(parameters=ODD_SCHEMA), "strict": None}],
    response_format={"type": "json_schema", "json_schema": NULL_FORMAT},
    messages=[user("Hi", name=None), assistant(None, function_call=None), *HI]
    | tools=[function(parameters=CLEAN_SCHEMA)],
    response_format={"type": "json_schema", "json_schema": {"name": "json", "schema": {"default": None}}},
    messages=[system("Answer in JSON."), user("Hi"), assistant(""), *HI]

effort low | qwen3.7-plus@coding | reasoning_effort="low" | enable_thinking=True, thinking_budget=4096
effort none | qwen3.7-plus@coding | reasoning={"effort": "none"} | enable_thinking=False
Anthropic's budget | qwen3.7-plus@coding | thinking={"type": "enabled", "budget_tokens": 99} | enable_thinking=True, thinking_budget=99
vLLM's | qwen3.7-plus@portal | chat_template_kwargs=NO_THOUGHTS | enable_thinking=False
effort max | qwen3.8-max | reasoning_effort="max" | reasoning_effort="xhigh"
effort none, always thinks | qwen3.8-max@token | reasoning_effort="none" |
effort none, may think | qwen3.8-flash | reasoning_effort="none" | reasoning_effort="none"
effort, never thinks | qwen3-coder-plus@coding | reasoning_effort="high" |
effort at OpenRouter | qwen/qwen3.7-plus@openrouter | reasoning_effort="high" | reasoning={"effort": "high"}
more of OpenRouter | x/y@openrouter | reasoning={"effort": "high", "exclude": True} | reasoning={"effort": "high", "exclude": True}
effort at DeepSeek | deepseek-v4-pro@deepseek | reasoning_effort="low" | thinking={"type": "enabled"}, reasoning_effort="high"
thinking of who knows | unknown | enable_thinking=True | enable_thinking=True

forced tool, client 28 | qwen3.7-plus | tools=[F, G], tool_choice="required" | tools=[F, G], tool_choice="required", enable_thinking=False
forced by name, client 28 | qwen3.7-plus | tools=[F, G], tool_choice=function() | tools=[F, G], tool_choice=function(), enable_thinking=False
forced as Anthropic does, client 28 | qwen3.7-plus | tools=[F], tool_choice={"type": "any"} | tools=[F], tool_choice="required", enable_thinking=False
by name, as Anthropic does, client 28 | qwen3.7-plus | tools=[F], tool_choice={"type": "tool", "name": "f"} | tools=[F], tool_choice=function(), enable_thinking=False
forced, thinks | qwen3.7-plus | tools=[F, G], tool_choice="required", enable_thinking=True | tools=[F, G], tool_choice="auto", enable_thinking=True, rule="thinking-clash"
forced by name, thinks | qwen3.7-plus | tools=[F, G], tool_choice=function(), enable_thinking=True | tools=[F], tool_choice="auto", enable_thinking=True, rule="thinking-clash", contents=["Call the tool f now; do not answer in text.", "Hi"]
an empty choice forces nothing | Qwen/Qwen3-8B@other | tools=[F], tool_choice="" | tools=[F], tool_choice=""
nor does none | Qwen/QwQ-32B@other | tools=[F], tool_choice=False, **THINKS | tools=[F], tool_choice=False, contents=["Hi"]
forced, always thinks, client 28 | qwq-plus | tools=[F], tool_choice="required" | tools=[F], tool_choice="auto", rule="thinking-clash", contents=["Call one of the tools now; do not answer in text.", "Hi"]
JSON and may think | qwen3.7-plus, qwen3-32b | response_format=JSON_OBJECT | response_format=JSON_OBJECT, enable_thinking=False
JSON by a schema | qwen3.7-plus | response_format=JSON_SCHEMA | response_format=JSON_SCHEMA, enable_thinking=False
JSON, thinks | qwen3.7-plus | response_format=JSON_OBJECT, reasoning_effort="high" | enable_thinking=True
JSON, only thinks and only thinks, sees | qwen3-235b-a22b-thinking-2507, qwen3-vl-32b-thinking | response_format=JSON_OBJECT |

entry gives defaults | qwen3.7-plus | temperature=0, reasoning_effort="none", entry={"samplingParams": {"temperature": 0.1, "top_p": 0.2}, "extra_body": {"top_p": 0.3, **THINKS}}
    | temperature=0, top_p=0.3, enable_thinking=False
entry, client's null | qwen3.7-plus | temperature=None, entry={"samplingParams": {"temperature": 0.5}} | temperature=0.5
entry, client's null for thinking | qwen3.7-plus | reasoning_effort=None, entry={"extra_body": THINKS} | enable_thinking=True
entry's limit of another name | qwen3.7-plus | max_completion_tokens=8000, entry={"samplingParams": {"max_tokens": 1000}} | max_tokens=8000
entry, thinking off in vLLM's way | qwen3.7-plus | chat_template_kwargs=NO_THOUGHTS, entry={"extra_body": THINKS} | enable_thinking=False
entry, thinking on in vLLM's way | qwen3.7-plus | chat_template_kwargs=THINKS, entry={"reasoning": False} | enable_thinking=True
entry thinks, tool forced | qwen3.7-plus@coding | tool_choice="required", tools=[F, G], entry={"extra_body": THINKS} | tool_choice="required", tools=[F, G], enable_thinking=False
entry thinks, client, too | qwen3.7-plus@coding | tool_choice="required", tools=[F, G], **THINKS, entry={"extra_body": THINKS} | tool_choice="auto", tools=[F, G], enable_thinking=True
entry thinks, JSON | qwen3.7-plus@coding | response_format=JSON_OBJECT, entry={"extra_body": THINKS} | response_format=JSON_OBJECT, enable_thinking=False

roles, client 23 | | messages=[message("developer", "a"), *HI, *HI, system("b")] | messages=[system("a\n\nb"), *HI, *HI]
system without user, client 23 | | messages=[system("a"), assistant("."), system("b")] | messages=[system("a"), assistant("."), user("b")]
portal marks the system message | coder-model@portal | messages=EVERYTHING["messages"][:2] | messages=[system(parts("Be brief. Grüße 你好 \u2028", **CACHED)), EVERYTHING["messages"][1]]
portal, none | coder-model@portal | messages=HI | contents=[parts("", **CACHED), "Hi"]
portal, system in parts | coder-model@portal | messages=[system(parts("a", "b")), *HI] | messages=[system(parts("a", **CACHED) + parts("b")), *HI]
portal, markers to spare | coder-model@portal | tools=[{**F, **CACHED}], messages=[user(FIVE_CACHED)] | tools=[F], contents=[parts("", **CACHED), parts(*"01") + FIVE_CACHED[2:]]
four markers at most | | tools=[{**F, **CACHED}], messages=[user(FIVE_CACHED[1:])] | tools=[{**F, **CACHED}], contents=[FIVE_CACHED[1:2] + parts("2") + FIVE_CACHED[3:]]
a marker for GLM | glm-5 | messages=[user(parts("x", **CACHED))], tools=[F, G] | messages=[user(parts("x", **CACHED))], tools=[F, G]
call cut short | | messages=[*HI, call("c", arguments="{cut"), *HI] | contents=["Hi", "", NO_RESULT, "Hi"]
orphan | | messages=[result("x", "orphan"), *HI] | messages=HI
call without content, client 24 | | messages=[*HI, {"role": "assistant", "tool_calls": [use("c")]}, result("c", parts("ok"))] | messages=[*HI, call("c"), result("c", parts("ok"))]
content null, client 24 | | messages=[*HI, call("c", content=None), result("c", "ok")] | messages=[*HI, call("c"), result("c", "ok")]
thoughts, client 24 | qwen3.7-plus | messages=[*HI, {**call("c", content=None), "reasoning": "hm"}, result("c", "ok")] | messages=[*HI, {**call("c"), "reasoning_content": "hm"}, result("c", "ok")]
thoughts for none | qwen3-coder-plus | messages=[*HI, assistant("a", reasoning="hm"), *HI] | messages=[*HI, assistant("a"), *HI]
result of nobody, client 25 | | messages=[*HI, call("c"), result("gone", "x"), *HI] | messages=[*HI, call("c"), result("c", NO_RESULT), *HI]
id used again, one lost | | messages=[*HI, call("c"), *HI, call("c", name="g"), result("c", "of g")] | contents=["Hi", "", NO_RESULT, "Hi", "", "of g"]
id used again | | messages=[*HI, call("c"), result("c", "1"), call("c", name="g"), result("c", "2")] | contents=["Hi", "", "1", "", "2"]
result too early | | messages=[*HI, result("c", "early"), call("c")] | contents=["Hi", "", NO_RESULT]
result too late | | messages=[*HI, call("c"), *HI, result("c", "late")] | contents=["Hi", "", "late", "Hi"]
said between results | | messages=[*HI, call("a", "b"), result("a", "1"), assistant("."), result("b", "2")] | contents=["Hi", ".", "", "1", "2"]
said behind them | | messages=[*HI, call("a"), result("a", "1"), assistant("."), result("a", "1")] | contents=["Hi", "", "1", "."]
said before the result | | messages=[*HI, call("a"), assistant("."), result("a", "1")] | contents=["Hi", ".", "", "1"]
said at the end | | messages=[*HI, call("a"), result("a", "1"), assistant(".")] | contents=["Hi", "", "1", "."]
said before an orphan | | messages=[*HI, assistant("."), result("orphan", "2")] | contents=["Hi", "."]
said between, then asked | | messages=[*HI, call("a", "b"), result("a", "1"), assistant("."), result("b", "2"), user("?")] | contents=["Hi", ".", "", "1", "2", "?"]
asked and said between | | messages=[*HI, call("a"), user("?"), assistant("."), result("a", "1")] | contents=["Hi", "", "1", "?", "."]
no ids, results of one turn | | messages=[*HI, call(None), *HI, call(None, name="g"), message("tool", "of g"), *HI] | contents=["Hi", "", NO_RESULT, "Hi", "", "of g", "Hi"]
no ids, two calls | | messages=[*HI, call(None, None), message("tool", "1"), result(None, "2")] | contents=["Hi", "", "1", "2"]
Anthropic's shapes | | tools=[{"name": "f", "description": "d", "input_schema": EMPTY}],
    messages=[*HI, assistant([*parts("I look."), {"type": "tool_use", "id": "t", "name": "f", "input": {"a": "ö"}}]),
    user([{"type": "tool_result", "tool_use_id": "t", "content": parts("sunny")}, *parts("And?")])] | tools=[function(description="d", parameters=EMPTY)],
    messages=[*HI, call("t", content="I look.", arguments='{"a": "ö"}'), result("t", parts("sunny")), user(parts("And?"))]
an assistant's parts | | messages=[*HI, assistant(parts("a", "b")), *HI] | messages=[*HI, assistant("a\nb"), *HI], rule="flat-content"
an assistant's parts, portal | coder-model@portal | messages=[system("s"), *HI, assistant(parts("a", "b")), *HI] | contents=[parts("s", **CACHED), "Hi", "a\nb", "Hi"], rule="flat-content"
an assistant's parts, marked | | messages=[*HI, assistant(parts("a", "b", **CACHED)), *HI] | messages=[*HI, assistant(parts("a", "b", **CACHED)), *HI]
an assistant's parts, OpenRouter | x/y@openrouter | messages=[*HI, assistant(parts("a", "b")), *HI] | messages=[*HI, assistant(parts("a", "b")), *HI]
a user's parts | | messages=[user(parts("a", "b")), *HI] | messages=[user(parts("a", "b")), *HI]
a user's parts, DeepSeek and GLM | deepseek-v4-pro@deepseek, glm-5.1 | messages=[user(parts("a", "b")), *HI] | messages=[user("a\nb"), *HI], rule="flat-content"
""")


def old_call(arguments, **more):
    """A conversation with a call of these arguments."""
    return [*HI, call("c", arguments=arguments, **more), result("c", "ok")]


def odd(arguments):
    """The arguments of a call that are no object, as they are sent."""
    return json.dumps({"malformed_arguments": arguments}, separators=(",", ":"))


def hear(data, **more):
    """A question about sound, with the data of OpenAI's part."""
    return [user([*parts("What?"), {"type": "input_audio", "input_audio": {"data": data, **more}}])]


def lite(*tools, more=()):
    """An input with its tools in an item, as Codex sends it."""
    return [{"type": "additional_tools", "role": "developer", "tools": list(tools)}, *more, *HI]


SILENT = {**NO_THOUGHTS, "chat_template_kwargs": NO_THOUGHTS}
ALOUD = {**THINKS, "chat_template_kwargs": THINKS}
KEEP = {"chat_template_kwargs": {"preserve_thinking": True}}
BEGIN, LOOP = user("Please begin."), old_call("{}")
TWICE = json.dumps('{"a": 3}')
KEPT_THOUGHTS, NOT_KEPT = {"reasoning_content": "Hm"}, {"reasoning_content": "(not kept)"}
THOUGHTFUL = [*HI, {**call("c"), **NOT_KEPT}, result("c", "ok")]
WAV = "data:audio/wav;base64,UklGRg=="
AUDIO_URL = {"type": "audio_url", "audio_url": {"url": WAV}}
PICTURE = {"type": "image_url", "image_url": {"url": "data:image/png;base64,AAAA"}}
LEFT_OUT = {"type": "text", "text": "(left out: the model cannot take it)"}
LOOK = [user([*parts("look"), PICTURE]), assistant("I see."), user("And now?")]
UNSEEN = [user([*parts("look"), LEFT_OUT]), *LOOK[1:]]
LARK = {"syntax": "lark", "definition": "start: hunk"}
FLAT = {"type": "custom", "name": "patch", "format": {"type": "grammar", **LARK}}
GRAMMAR = {"type": "grammar", "grammar": LARK}
NESTED_TOOL = {"type": "custom", "custom": {"name": "patch", "format": GRAMMAR}}
TEXT_INPUT = {"type": "string", "description": "It must match this grammar:\nstart: hunk"}
ONE_TEXT = {"type": "object", "required": ["input"], "properties": {"input": TEXT_INPUT}}
PATCH = function("patch", description="", parameters=ONE_TEXT)
EXEC = function("functions__exec", description="", parameters=ONE_TEXT)
SPACE = {"type": "namespace", "name": "functions", "tools": [flat(G), {**FLAT, "name": "exec"}]}
OFFERED = [function("functions__g", parameters=EMPTY), EXEC]
USED_SPACE = json.loads("""[
    {"type": "function_call", "call_id": "c", "name": "g", "namespace": "functions", "arguments": "{}"},
    {"type": "function_call_output", "call_id": "c", "output": "1"},
    {"type": "custom_tool_call", "call_id": "d", "name": "exec", "namespace": "functions", "input": "ls"},
    {"type": "custom_tool_call_output", "call_id": "d", "output": "2"}]""")
BOTH, WEB_SEARCH = [flat(F), flat(G)], {"type": "web_search"}
SEARCH_FIRST = {"type": "tool_search", "execution": "client", "parameters": EMPTY}
FOUND_TOOLS = [{"type": "namespace", "name": "mcp", "tools": [flat(G)]}]
FOUND = [{"type": "tool_search_output", "call_id": "c", "tools": FOUND_TOOLS}]
FOUND.insert(0, {"type": "tool_search_call", "call_id": "c", "arguments": {"q": "x"}})
CUSTOM_CALL = {"id": "c", "type": "custom", "custom": {"name": "patch", "input": "*** Begin"}}
SEARCH, SEARCH_TOOL = (function(name, parameters=EMPTY) for name in ("search", "search_tool"))
PATCHED = [*HI, assistant(None, tool_calls=[CUSTOM_CALL]), result("c", "ok")]
SENT_PATCH = old_call('{"input": "*** Begin"}', name="patch")

REPLAYED = json.loads(r"""[
    {"role": "developer", "content": "Rules."},
    {"type": "message", "role": "user", "content": [{"type": "input_text", "text": "Look"},
        {"type": "input_image", "image_url": "data:image/png;base64,AAAA", "detail": "low"}]},
    {"type": "reasoning", "id": "rs_1", "summary": [{"type": "summary_text", "text": "Hm"}],
        "encrypted_content": null},
    {"type": "message", "role": "assistant",
        "content": [{"type": "output_text", "text": "I look.", "annotations": []}]},
    {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}"},
    {"type": "function_call", "call_id": "c2", "name": "run", "namespace": "shell",
        "arguments": "{\"a\": 1}"},
    {"role": "user", "content": "Are you there?"},
    {"type": "function_call_output", "call_id": "c1",
        "output": [{"type": "input_text", "text": "one"}]},
    {"type": "function_call_output", "call_id": "c2", "output": "two"},
    {"type": "web_search_call", "id": "ws_1"},
    {"type": "custom_tool_call", "call_id": "c3", "name": "patch", "input": "*** Begin"},
    {"type": "custom_tool_call_output", "call_id": "c3", "output": "done"}]""")

REQUESTS += table(r"""
off in vLLM's way, own server, ModelScope | Qwen/Qwen3-8B@other, Qwen/Qwen3-8B@modelscope; everywhere | chat_template_kwargs=NO_THOUGHTS | **SILENT
the same beside more of it | Qwen/Qwen3-8B@other; everywhere | chat_template_kwargs={**NO_THOUGHTS, "x": 1} | enable_thinking=False, chat_template_kwargs={**NO_THOUGHTS, "x": 1}
the same in extra_body | Qwen/Qwen3-8B@other | extra_body={"chat_template_kwargs": NO_THOUGHTS} | **SILENT
the same, another model | zai-org/GLM-4.7@other | chat_template_kwargs=NO_THOUGHTS | chat_template_kwargs=NO_THOUGHTS
the same, text | Qwen/Qwen3-8B@other | prompt="x", chat_template_kwargs=NO_THOUGHTS | prompt="x", chat_template_kwargs=NO_THOUGHTS
on, own server | Qwen/Qwen3-8B@other; everywhere | enable_thinking=True | **ALOUD
effort none, own server | Qwen/Qwen3-8B@other; everywhere | reasoning_effort="none" | **SILENT
effort high, own server | Qwen/Qwen3-8B@other; everywhere | reasoning_effort="high" | **ALOUD
Anthropic's off, own server | Qwen/Qwen3-8B@other | thinking={"type": "disabled"} | **SILENT
forced tool, own server | Qwen/Qwen3-8B@other; everywhere | tools=[F], tool_choice="required" | tools=[F], tool_choice="required", **SILENT
JSON, own server | Qwen/Qwen3-8B@other; everywhere | response_format=JSON_OBJECT | response_format=JSON_OBJECT, **SILENT
entry, off, own server | Qwen/Qwen3-8B@other; everywhere | entry={"reasoning": False} | **SILENT
entry's profile, effort | m@other | reasoning_effort="medium", entry={"profile": {"profile": "openai-effort", "efforts": ["low", "high"]}} | reasoning_effort="high"
entry's profile, default effort | m@other | entry={"profile": {"profile": "openai-effort", "defaultEffort": "high"}} | reasoning_effort="high"
entry's profile, always on | m@other | reasoning_effort="none", entry={"profile": {"profile": "openai-effort", "canDisable": False}} | rule="thinking: thinking stays on, since m always thinks"
entry's profile, DeepSeek | m@other | reasoning_effort="high", entry={"profile": {"profile": "deepseek-openai"}} | thinking={"type": "enabled"}, reasoning_effort="high"
entry's profile, template | m@other | **THINKS, entry={"profile": {"profile": "qwen-chat-template"}} | chat_template_kwargs=THINKS
entry's profile, switch, always on | m@other | enable_thinking=False, entry={"profile": {"profile": "dashscope-thinking"}, "thinkingMandatory": True} |
entry's profile, OpenRouter | m@other | reasoning_effort="low", entry={"profile": {"profile": "openai-reasoning"}} | reasoning={"effort": "low"}

switch as text, open-webui #16682 | qwen3.7-plus; everywhere | enable_thinking="false" | enable_thinking=False
switch as number, own server | Qwen/Qwen3-8B@other; everywhere | enable_thinking=0 | **SILENT
switch on as text, own server | Qwen/Qwen3-8B@other; everywhere | enable_thinking="True" | **ALOUD
switch as text in the template | qwen3.7-plus; everywhere | chat_template_kwargs={"enable_thinking": "false"} | enable_thinking=False
switch as text, OpenRouter's | qwen3.7-plus | reasoning={"enabled": "false"} | enable_thinking=False
switch of the entry, as written | qwen3.7-plus; everywhere | entry={"extra_body": {"enable_thinking": False}} | enable_thinking=False
budget as text | qwen3.7-plus; everywhere | thinking_budget="1024" | thinking_budget=1024, **THINKS
budget as text, Anthropic's | qwen3.7-plus | thinking={"type": "enabled", "budget_tokens": "99"} | thinking_budget=99, **THINKS
limit with a point | | max_completion_tokens=100.0 | max_tokens=100
limit as text | ; everywhere | max_tokens="100" | max_tokens=100
a text with a suffix | qwen-coder-turbo | prompt="def ", suffix="return 1", max_tokens=9, best_of=None | prompt="<|fim_prefix|>def <|fim_suffix|>return 1<|fim_middle|>", max_tokens=9
limit as text, text | qwen-coder-turbo | prompt="x", max_tokens="100" | prompt="x", max_tokens=100
sampling as text | ; everywhere | temperature="0.5", top_k="3" | temperature=0.5, top_k=3
neither switch nor number | qwen3.7-plus@coding; everywhere | enable_thinking="perhaps", thinking_budget="much", seed="x" | enable_thinking="perhaps", thinking_budget="much", seed="x"
half a token, no limit | qwen3.7-plus@coding | thinking_budget=10.5, max_tokens="many" | thinking_budget=10.5, max_tokens="many"
no effort, no switch in the template | qwen3.7-plus | reasoning_effort=3, chat_template_kwargs={"enable_thinking": "auto"} | reasoning_effort=3, chat_template_kwargs={"enable_thinking": "auto"}

arguments encoded twice, koog #2096 | ; everywhere | messages=old_call(TWICE) | messages=old_call('{"a":3}')
arguments encoded thrice, own server | any@other; everywhere | messages=old_call(json.dumps(TWICE)) | messages=old_call('{"a":3}')
arguments null | ; everywhere | messages=old_call("null") | messages=LOOP
arguments null, twice | any@other; everywhere | messages=old_call('"null"') | messages=LOOP
arguments a list | ; everywhere | messages=old_call("[]") | messages=old_call(odd("[]"))
arguments a text | any@other; everywhere | messages=old_call('"Paris"') | messages=old_call(odd('"Paris"'))
arguments in blanks of their own | ; everywhere | messages=old_call('{"a":  3}') | messages=old_call('{"a":  3}')
function_call, arguments encoded twice | | messages=[*HI, assistant(None, function_call={"name": "f", "arguments": TWICE}),
    message("function", "ok", name="f")] | messages=[*HI, call("call_1_0", arguments='{"a":3}'), {**result("call_1_0", "ok"), "name": "f"}]

system alone, dify #33152 | ; everywhere | messages=[system("a")] | messages=[user("a")]
developer alone | Qwen/Qwen3-8B@other; everywhere | messages=[message("developer", "a")] | messages=[user("a")]
two systems, vllm #36432 | ; everywhere | messages=[system("a"), system("b")] | messages=[system("a"), user("b")]
system and developer | Qwen/Qwen3-8B@other; everywhere | messages=[system("a"), message("developer", "b")] | messages=[system("a"), user("b")]
instructions and developer | | input=[message("developer", "b")], instructions="a" | messages=[system("a"), user("b")]
system and assistant | ; everywhere | messages=[system("a"), assistant("b")] | messages=[system("a"), BEGIN, assistant("b")]
assistant alone | Qwen/Qwen3-8B@other; everywhere | messages=[assistant("b")] | messages=[BEGIN, assistant("b")]
a call and its result only | ; everywhere | messages=LOOP[1:] | messages=[BEGIN, *LOOP[1:]]
system, a call and its result | Qwen/Qwen3-8B@other; everywhere | messages=[system("a"), *LOOP[1:]] | messages=[system("a"), BEGIN, *LOOP[1:]]
assistant, then a user | ; everywhere | messages=[system("a"), assistant("b"), *HI] | messages=[system("a"), assistant("b"), *HI]
system alone, in parts | | messages=[system(parts("a"))] | messages=[user(parts("a"))]
system alone, another maker's | any/model@other; everywhere | messages=[system("a")] | messages=[system("a")]

bare base64, eino-ext #620 | qwen3-omni-flash; everywhere | messages=hear("UklGRg==", format="wav") | messages=hear("data:;base64,UklGRg==", format="wav")
sound by a data URL | qwen3-omni-flash; everywhere | messages=hear(WAV, format="wav") | messages=hear(WAV, format="wav")
audio_url, pydantic-ai #3596 | qwen3-omni-flash | messages=[user([*parts("What?"), AUDIO_URL])] | messages=hear(WAV)
bare base64, own server | Qwen/Qwen3-Omni@other; everywhere | messages=hear("UklGRg==") | messages=hear("UklGRg==")
audio_url, own server | Qwen/Qwen3-Omni@other | messages=[user([AUDIO_URL])] | messages=[user([AUDIO_URL])]
bare base64 in a result | qwen3-omni-flash | messages=[*LOOP[:2], result("c", hear("UklGRg==")[0]["content"])] | contents=["Hi", "", "What?", hear("data:;base64,UklGRg==")[0]["content"][1:]]

no thoughts, Kimi and DeepSeek, claude-code-router #1227, crush #2696 | kimi-k2.6@token, moonshotai/Kimi-K2.5@other, deepseek-v4-pro; everywhere | messages=LOOP | messages=THOUGHTFUL
no thoughts, DeepSeek's own host | deepseek-v4-pro@deepseek; everywhere | messages=LOOP | messages=[*HI, {**call("c"), "reasoning_content": ""}, result("c", "ok")]
thoughts of its own, Kimi | kimi-k2.6@token | messages=[*HI, {**call("c"), **KEPT_THOUGHTS}, result("c", "ok")] | messages=[*HI, {**call("c"), **KEPT_THOUGHTS}, result("c", "ok")]
no thoughts, Qwen | qwen3.7-plus@token; everywhere | messages=LOOP | messages=LOOP

custom tool, flat, Cursor | qwen3-coder-plus; everywhere | tools=[FLAT] | tools=[PATCH]
custom tool, nested, OpenAI's reference | qwen3-coder-plus; everywhere | tools=[F, NESTED_TOOL] | tools=[F, PATCH]
custom tool of a Response | any@other | input="Hi", tools=[FLAT] | tools=[PATCH]
custom tool, chosen, flat | qwen3-coder-plus | tools=[FLAT], tool_choice={"type": "custom", "name": "patch"} | tools=[PATCH], tool_choice=function("patch")
custom tool, chosen, nested | qwen3-coder-plus; everywhere | tools=[NESTED_TOOL], tool_choice={"type": "custom", "custom": {"name": "patch"}} | tools=[PATCH], tool_choice=function("patch")
custom call in the history, OpenAI's | qwen3-coder-plus; everywhere | tools=[NESTED_TOOL], messages=PATCHED | tools=[PATCH], messages=SENT_PATCH
custom call in the history, Cursor's | any@other | tools=[FLAT], messages=[*HI, call("c", name="patch", arguments="*** Begin"), result("c", "ok")] | tools=[PATCH], messages=SENT_PATCH
allowed tools | qwen3-coder-plus | tools=[F, G], tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "required", "tools": [function()]}} | tools=[F], tool_choice="required"

parts of text, qwen-long, cherry-studio #9352 | qwen-long; everywhere | messages=[user(parts("a", "b"))] | messages=[user("a\nb")]
parts of a system message, qwen-long | qwen-long-latest | messages=[system(parts("a", "b")), *HI] | messages=[system("a\nb"), *HI]
one of two systems in parts, qwen-long | qwen-long | messages=[system("a"), system(parts("b")), *HI] | contents=["a\nb", "Hi"]
parts of a result, qwen-long | qwen-long; everywhere | messages=[*LOOP[:2], result("c", parts("a", "b"))] | messages=[*LOOP[:2], result("c", "a\nb")]
parts with a mark, qwen-long | qwen-long | messages=[user(parts("a", "b", **CACHED))] | messages=[user("a\nb")]
text beside a picture | qwen3.7-plus; everywhere | messages=LOOK[:1] | messages=LOOK[:1]

a picture long ago, oh-my-pi #1859 | qwen3.7-max; everywhere | messages=LOOK | messages=UNSEEN, rule="unseen-media"
a picture long ago, a plan | qwen3-coder-plus@coding; everywhere | messages=LOOK | messages=UNSEEN
a picture of a tool, long ago | qwen3.7-max | messages=[*LOOP[:2], result("c", LOOK[0]["content"]), assistant("."), *HI] | contents=["Hi", "", parts("look", LEFT_OUT["text"]), ".", "Hi"]
a picture long ago, it sees and who knows | kimi-k2.5@coding, some-model@other; everywhere | messages=LOOK | messages=LOOK
""")
for schema in ("{}", "[]", "None", '""', '{"type": "object"}', '{"type": "string"}'):
    REQUESTS += table(f"""
parameters {schema}, crawl4ai #2207 and own server | MiniMax-M2.5@coding, MiniMaxAI/MiniMax-M2.5@other; everywhere | tools=[function(parameters={schema})] | tools=[F]
parameters {schema} of functions | MiniMax-M2.5@token | functions=[dict(name="f", parameters={schema})] | tools=[F]
parameters {schema}, Anthropic's | MiniMax-M2.5@token | tools=[dict(name="f", input_schema={schema})] | tools=[F]
""")
REQUESTS += table(r"""
properties null | MiniMax-M2.5@coding; everywhere | tools=[function(parameters={"type": "object", "properties": None})] | tools=[F]
properties a list | MiniMax-M2.5@coding; everywhere | tools=[function(parameters={"type": "object", "properties": []})] | tools=[F]
properties without a type | MiniMax-M2.5@coding; everywhere | tools=[function(parameters={"properties": {"a": {}}})] | tools=[function(parameters={"type": "object", "properties": {"a": {}}})]
a reference | MiniMax-M2.5@coding; everywhere | tools=[function(parameters={"$ref": "#/x"})] | tools=[function(parameters={"$ref": "#/x"})]

effort low, Qwen3.8, Qwen3.8 #217 | Qwen/Qwen3.8-27B@other; everywhere | reasoning_effort="low" | reasoning_effort="low", **ALOUD
effort medium, Qwen3.8 | Qwen/Qwen3.8-27B@other; everywhere | reasoning_effort="medium" | reasoning_effort="medium", **ALOUD
effort high, Qwen3.8 | Qwen/Qwen3.8-27B@other; everywhere | reasoning_effort="high" | reasoning_effort="xhigh", **ALOUD
effort none, Qwen3.8 | Qwen/Qwen3.8-27B@other; everywhere | reasoning_effort="none" | **SILENT
effort high, Qwen3.8-max | qwen3.8-max; everywhere | reasoning_effort="high" | reasoning_effort="high"
effort medium, Qwen3.8-max of a plan | qwen3.8-max@token; everywhere | reasoning_effort="medium" | reasoning_effort="medium"
effort low, DeepSeek V4 | deepseek-v4-pro@token; everywhere | reasoning_effort="low" | reasoning_effort="high", **THINKS
effort max, DeepSeek V4 | deepseek-v4-pro@token; everywhere | reasoning_effort="max" | reasoning_effort="max", **THINKS
effort xhigh, DeepSeek V4.1 | deepseek-v4.1-flash; everywhere | reasoning_effort="xhigh" | reasoning_effort="max", **THINKS
effort none, DeepSeek V4 | deepseek-v4-pro; everywhere | reasoning_effort="none" | **NO_THOUGHTS
effort low, Kimi K3 | kimi-k3; everywhere | reasoning_effort="low" | reasoning_effort="low"
effort medium, Kimi K3 | kimi-k3; everywhere | reasoning_effort="medium" | reasoning_effort="high"
effort xhigh, GLM 5.3 | glm-5.3@token; everywhere | reasoning_effort="xhigh" | reasoning_effort="max"
effort none, GLM 5.3 | glm-5.3@token; everywhere | reasoning_effort="none" |
off, Kimi K3 | kimi-k3; everywhere | enable_thinking=False | rule="thinking"
JSON, GLM 5.3 | glm-5.3@token; everywhere | response_format=JSON_OBJECT | rule="thinking-clash"
effort max, DeepSeek's own host and Z.AI | deepseek-v4-pro@deepseek, glm-5.3@zai; everywhere | reasoning_effort="max" | thinking={"type": "enabled"}, reasoning_effort="max"
effort none, DeepSeek's own host | deepseek-v4-pro@deepseek; everywhere | reasoning_effort="none" | thinking={"type": "disabled"}
entry's effort, DeepSeek V4 | deepseek-v4-pro@token; everywhere | entry={"reasoning": {"effort": "max"}} | reasoning_effort="max", **THINKS

preserve_thinking in the template, goose #8939 | qwen3.7-plus; everywhere | **KEEP | preserve_thinking=True
preserve_thinking beside the switch | qwen3.7-plus@token; everywhere | chat_template_kwargs={"preserve_thinking": True, **THINKS} | preserve_thinking=True, **THINKS
preserve_thinking beside more | qwen3.7-plus | chat_template_kwargs={"preserve_thinking": True, "x": 1} | preserve_thinking=True, chat_template_kwargs={"x": 1}
preserve_thinking in extra_body | qwen3.7-plus | extra_body=KEEP | preserve_thinking=True
preserve_thinking twice | qwen3.7-plus; everywhere | preserve_thinking=False, **KEEP | preserve_thinking=False
preserve_thinking, the entry's | qwen3.7-plus; everywhere | entry={"extra_body": KEEP} | preserve_thinking=True
preserve_thinking, own server | Qwen/Qwen3-8B@other; everywhere | **KEEP | **KEEP

half an emoji, eliza #18079 | ; everywhere | messages=[user("Hi \ud83d")] | messages=[user("Hi \ufffd")]
half an emoji in a result | ; everywhere | messages=[*LOOP[:2], result("c", "\ud83d")] | messages=[*LOOP[:2], result("c", "\ufffd")]
half an emoji in arguments | ; everywhere | messages=old_call(r'{"a": "\ud83d"}') | messages=old_call('{"a":"\ufffd"}')
half an emoji in a description | ; everywhere | tools=[function(description="\ud83d", parameters=EMPTY)] | tools=[function(description="\ufffd", parameters=EMPTY)]
half an emoji in a prompt | qwen-coder-turbo | prompt="\ud83d" | prompt="\ufffd"

no parts | ; everywhere | messages=[*HI, assistant("a"), user([])] | messages=[*HI, assistant("a"), user("")]
no parts of a system message | | messages=[system([]), *HI] | messages=[system(""), *HI]
no parts beside a call | any@other | messages=[*HI, call("c", content=[]), result("c", [])] | messages=[*LOOP[:2], result("c", "")]

tool called search, forgecode #1580 | qwen3-coder-plus; everywhere | tools=[F, SEARCH], tool_choice=function("search"), messages=[*HI, call("c", name="search"), result("c", "ok")]
    | tools=[F, SEARCH_TOOL], tool_choice=function("search_tool"), messages=[*HI, call("c", name="search_tool"), result("c", "ok")]
tool called search, a plan | kimi-k2.6@token; everywhere | tools=[SEARCH] | tools=[SEARCH_TOOL]
tool called search, its new name is taken | qwen3-coder-plus@coding; everywhere | tools=[SEARCH_TOOL, SEARCH] | tools=[SEARCH_TOOL, function("search_241932906782", parameters=EMPTY)]
JSON at a server of one's own, as Ollama names it | qwen3:14b@other | response_format={"type": "json_object"} | response_format={"type": "json_object"}, enable_thinking=False,
    chat_template_kwargs={"enable_thinking": False}, messages=[system("Answer in JSON."), *HI]
tool called search, functions | qwen3-coder-plus | functions=[SEARCH["function"]] | tools=[SEARCH_TOOL]
tool called search, OpenRouter | qwen/qwen3-coder-plus@openrouter; everywhere | tools=[SEARCH] | tools=[SEARCH]

tools in an item, Codex 0.144 and own server | qwen3-coder-plus, any@other | input=lite(SPACE) | tools=OFFERED
tools in an item, no namespace | qwen3.7-plus@coding | input=lite(flat(G)) | tools=[G]
tools in an item beside others | qwen3-coder-plus | input=lite(SPACE), tools=[flat(F)] | tools=[F, *OFFERED]
tools in an item, tools empty | qwen3-coder-plus | input=lite(SPACE), tools=[] | tools=OFFERED
tools in two items, one of them twice | qwen3-coder-plus | input=lite(flat(G), more=lite(flat(G), FLAT)[:1]) | tools=[G, PATCH]
tools in an item, one chosen | qwen3-coder-plus | input=lite(SPACE), tool_choice={"type": "function", "name": "g", "namespace": "functions"} | tools=OFFERED, tool_choice=function("functions__g")
tools in an item, forced | qwen3-coder-plus | input=lite(flat(G)), tool_choice="required" | tools=[G], tool_choice="required"
tools in an item, called | qwen3-coder-plus | input=[*lite(SPACE), *USED_SPACE, *lite(SPACE)[:1]] | tools=OFFERED,
    messages=[*HI, call("c", name="functions__g"), result("c", "1"), call("d", name="functions__exec", arguments='{"input": "ls"}'), result("d", "2")]
tools in an item, a compaction | | input=[*lite(flat(G)), {"type": "compaction_trigger"}] |
tools that were searched for, Codex | qwen3-coder-plus | input=[*HI, *FOUND], tools=[SEARCH_FIRST] | tools=[function("tool_search", parameters=EMPTY), function("mcp__g", parameters=EMPTY)],
    messages=[*HI, call("c", name="tool_search", arguments='{"q":"x"}'), result("c", "Found, and can be called now: mcp__g")]

further results of a call, Codex's notify() | | messages=[*HI, call("c"), result("c", "one"), result("c", "two")] | contents=["Hi", "", "one\ntwo"], rule="history: "
further results, the same | | messages=[*HI, call("c"), result("c", "one"), result("c", "one")] | contents=["Hi", "", "one"], rule="history: "
further results, the same and more | | messages=[*HI, call("c"), *(result("c", said) for said in ("one", "two", "one", "three"))] | contents=["Hi", "", "one\ntwo\nthree"], rule="history: "
further results in parts | | messages=[*HI, call("c"), result("c", "one"), result("c", parts("two"))] | contents=["Hi", "", parts("one", "two")], rule="history: "

a replayed conversation | qwen3-vl-plus | input=REPLAYED | messages=[system("Rules."), user([*parts("Look"), {"type": "image_url", "image_url": {**PICTURE["image_url"], "detail": "low"}}]),
    assistant("I look.", reasoning_content="Hm", tool_calls=[use("c1"), use("c2", "shell__run", '{"a": 1}')]), result("c1", "one"), result("c2", "two"),
    user("Are you there?"), call("c3", name="patch", arguments='{"input": "*** Begin"}'), result("c3", "done")]
web search of a Response | | input="Hi", tools=[WEB_SEARCH, {"type": "image_generation"}] | enable_search=True
a name that is too long | | input="Hi", tools=[{**SPACE, "tools": [{**flat(G), "name": "x" * 64}]}] | tools=[function(f"functions__{'x' * 44}_b2527481", parameters=EMPTY)]
web search of a Response, a plan | qwen3.7-plus@coding | input="Hi", tools=[WEB_SEARCH] | rule="web-search: no web search, since this endpoint has none"
web search of a Response, OpenRouter | x/y@openrouter | input="Hi", tools=[WEB_SEARCH] | rule="web-search"
web search of a Response, no tool wanted | | input="Hi", tools=[WEB_SEARCH], tool_choice="none" |
choice of a Response: required | | input="Hi", tools=BOTH, tool_choice="required" | tools=[F, G], tool_choice="required"
choice of a Response: by name | | input="Hi", tools=BOTH, tool_choice={"type": "function", "name": "f"} | tools=[F, G], tool_choice=function()
choice of a Response: none | | input="Hi", tools=BOTH, tool_choice="none" | tools=[F, G], tool_choice="none"
choice of a Response: allowed | | input="Hi", tools=BOTH, tool_choice={"type": "allowed_tools", "mode": "required", "tools": BOTH[:1]} | tools=[F], tool_choice="required"
choice of a Response: search | | input="Hi", tools=BOTH, tool_choice=WEB_SEARCH | tools=[F, G], tool_choice="auto"
choice of a Response: null | | input="Hi", tools=BOTH, tool_choice=None | tools=[F, G]
""")


@pytest.mark.parametrize("places, given, sent", REQUESTS)
def test_requests(places, given, sent):
    places, _, everywhere = places.partition("; ")
    given, sent = fields(given), fields(sent)
    entry, rule = given.pop("entry", None), sent.pop("rule", None)
    for place, (api, asked) in itertools.product(places.split(", "), spellings(given, everywhere)):
        model, _, family = place.partition("@")
        family = family or "dashscope"
        body, fired = to_upstream(asked, model or "qwen3-max", family, entry, api)
        assert rule is None or rule in [*fired, *map(": ".join, fired.items())]
        messages = body.get("messages", [])
        ids = [[call["id"] for call in turn.get("tool_calls", [])] for turn in messages]
        assert all(len(set(found)) == len(found) for found in ids)
        if family in ("portal", "dashscope") and messages:
            assert json.dumps(body).count("cache_control") <= 4
            path = "/v1/" if family == "portal" else "/compatible-mode/v1/"
            assert FakeQwen.refuse_chat(path, body, b"") is None
        body["contents"] = [message["content"] for message in messages]
        always = {"model", "stream", "stream_options", "messages", "contents"} - set(sent)
        assert {name: value for name, value in body.items() if name not in always} == sent


EXTRA = {"seed": 3, "top_k": 1, "temperature": 0.5, "stream_options": {"include_usage": True}}


# What a request does not get, and words for it at info and in the notes of the exchange.
@rows(r"""
given | words
fields of OpenAI | model="qwen3.7-plus", logit_bias={"1": 1}, verbosity="low", store=True | logit_bias; verbosity; store
fields of other servers | model="qwen3.7-plus", min_p=0.1, num_ctx=9 | min_p; num_ctx
top_p 0 | model="qwen3.7-plus", top_p=0 | top_p
thinking, never thinks | model="qwen3-coder-plus", enable_thinking=True | no thinking, since qwen3-coder-plus
effort, never thinks | model="qwen3-coder-plus", reasoning_effort="high" | no thinking, since qwen3-coder-plus
off, always thinks | model="kimi-k3", enable_thinking=False | thinking stays on, since kimi-k3
a budget, knows none | model="deepseek-v4-pro", thinking_budget=9 | no limit on thinking
a strict tool | model="qwen3-max", tools=[function(strict=True)] | strict of tools
a picture long ago | model="qwen3.7-max", messages=LOOK | 1 media part of
a result without a call | model="qwen3-max", messages=[*HI, result("x", "y")] | 1 tool result without
thoughts for none | model="qwen3-coder-plus", messages=[*HI, assistant("a", reasoning_content="Hm"), *HI] | the thoughts of 1
a forced tool, client 28 | model="qwen3.7-plus", tools=[F], tool_choice="required" | no thinking
a forced tool, always thinks, client 28 | model="qwq-plus", tools=[F], tool_choice="required" | an instruction in the prompt
""")
def test_what_is_left_out_is_named_in_log_and_notes(key_server, caplog, monkeypatch, given, words):
    notes = []
    monkeypatch.setattr(qp.Exchange, "log_line", lambda self: notes.append(str(self.notes)) or "")
    assert chat(key_server, **fields(given))[0] == 200 and until(lambda: notes)
    for text in words.split("; "):
        assert text in caplog.text and text in notes[0]


def test_extra_body_sent_as_it_is_written_is_merged(key_server, upstream, caplog):
    caplog.set_level(logging.DEBUG, "qwen_proxy")
    _, _, data = chat(key_server, stream=True, top_k=2, temperature=None, extra_body=EXTRA)
    sent = upstream.bodies()[0]
    assert fields("seed=3, top_k=2, temperature=0.5").items() <= sent.items()
    assert "extra_body" not in sent and "extra_body is merged: seed" in caplog.text
    assert json.loads(data[-2])["usage"] == USAGE


def test_headers_of_the_client_and_of_the_entry(home, upstream, serve):
    headers = {"X-Team": "blue", "Bad\nName": "x", "X-Bad": "a\r\nb"}
    config = {"customHeaders": {**headers, "User-Agent": "mine"}}
    write_settings(home, upstream, {"id": "a"}, {"id": "b", "generationConfig": config})
    server, found = serve(), []
    for model in "ab":
        ask(server, {"messages": HI, "model": model}, headers={"User-Agent": "OpenAI/JS 6"})
        found.append([upstream.requests[-1][1][name] for name in ("User-Agent", "X-Team", "X-Bad")])
    ours = "OpenAI/JS 6 qwen_proxy/" + qp.__version__
    assert found == [[ours, None, None], ["mine", "blue", None]]


# Odd requests that go out all the same, and the status.
@rows(r"""
path | body | status
messages beside a prompt, a number | text | {"prompt": "x", "messages": 5} | 200
messages beside a prompt, a text | text | {"prompt": "x", "messages": "hi"} | 200
messages beside a prompt, a list of numbers | text | {"prompt": "x", "messages": [1]} | 200
messages beside a prompt, no role | text | {"prompt": "x", "messages": [{"name": None}]} | 200
names of allowed tools | chat | {"messages": HI, "tools": [function()], "tool_choice": {"type": "allowed_tools", "allowed_tools": {"tools": [function(["f"])]}}} | 200
stream as text | chat | {"messages": HI, "stream": "false"} | 200
a custom tool without a name | chat | {"messages": [*HI, call("k"), result("k", "r")], "tools": [{"type": "custom"}]} | 400
calls of the user, which are none | chat | {"messages": [user("x", tool_calls=5), *HI], "tools": [function()]} | 400
""")
def test_odd_requests_are_no_500(key_server, path, body, status):
    got, _, answer = ask(key_server, value_of(body), path=ENDPOINTS[path])
    assert got == int(status) and b"report" not in answer


def test_a_text_completion_is_not_repaired_in_words(key_server, upstream):
    words = "Json mode response is not supported when enable_thinking is true"
    upstream.script.append(refusal(words))
    request = {"prompt": "x", "enable_thinking": True, **JSON_PLEASE}
    assert ask(key_server, request, path="/v1/completions")[0] == 400


# ----------------------------------------------------------------------------------------------------
# Responses
# ----------------------------------------------------------------------------------------------------


def heading(value):
    return tuple(value[name] for name in ("id", "created", "model", "object"))


def test_unchanged_chunks_go_out_as_the_bytes_that_came(key_server, upstream):
    odd = (
        b'{"model":"qwen3-max", "id":"i","object":"chat.completion.chunk","created":1,"x":0.10,'
        b'"choices":[{"index":0,"delta":{%s"content":"%s"},"finish_reason":null}]}'
    )
    words = [(b'"role":"assistant",', b"one"), (b"", b"two"), (b"", b"\\u0074hree")]
    pieces = [b"data: %s\n\n" % (odd % word) for word in words]
    upstream.script.append(stream(*pieces, chunk({}, "stop", id="i", created=1), DONE))
    assert chat(key_server, stream=True)[2][2] == (odd % words[2]).decode()


def again(events, **more):
    """The events with other values for some of their names."""
    return [data if data == DONE else event(json.loads(data[6:]), **more) for data in events]


def without(events, *names):
    """The events without some of their names, of the chunk and of its choice."""
    values = [json.loads(data[len(b"data: ") :]) for data in events]
    for value in values:
        for part, name in itertools.product((value, value["choices"][0]), names):
            part.pop(name, None)
    return [event(value) for value in values]


def delta(finish_reason=None, **names):
    return chunk(names, finish_reason)


def end(reason="stop", **usage):
    return [chunk({}, reason), chunk(usage={**USAGE, **usage}), DONE]


def stop(reason="stop", **more):
    """An end without usage, unless it is more=."""
    return [chunk({}, reason, **more), DONE]


def calling(*calls, reason=None):
    """A delta of several calls, each a dict or what tool() takes."""
    entries = [x if isinstance(x, dict) else tool_call(*x)["tool_calls"][0] for x in calls]
    return chunk({"tool_calls": entries}, reason)


def bare_call(name, arguments=None, **more):
    return {**more, "function": {"name": name, "arguments": arguments}}


def whole(content="Hello, wörld", finish_reason="stop", message=None, **more):
    """A completion that was not streamed; message= holds more of it, ABSENT is left out."""
    message = {"role": "assistant", "content": content, **(message or {})}
    choice = {"index": 0, "message": message, "finish_reason": finish_reason}
    value = {"id": "x", "object": "chat.completion", "created": 1, "model": "m", "usage": USAGE}
    value.update({"choices": [choice], **more})
    for part in (value, choice, message):
        for name in [name for name in part if part[name] is ABSENT]:
            del part[name]
    return json.dumps(value, ensure_ascii=False).encode()


def cut_emoji(text):
    """A delta whose text has half an emoji in the place of @."""
    return chunk({"content": text}).replace(b"@", rb"\ud83d")


def sound(**audio):
    return chunk({"audio": audio})


WORDS = ("Hel", "lo, ", "wörld")
DELTAS = texts(*WORDS)
NATIVE = FRAME % (429, b"Throttling.AllocationQuota", b"%s")
MINUTE = b"Allocated quota exceeded, please increase your quota limit."
FREE = b"Free allocated quota exceeded."
ERROR_FINISH = (NATIVE % FREE).decode().strip()
PARIS, A, B = '{"city": "Paris"}', ("call_a", "get_weather"), ("call_b", "get_time")
ENDING_B = [tool(1, *B, "{}"), *END]
SPLIT_PARIS = ['{"city"', ': "Paris"}']
CALLED = {"content": None, "finish_reason": "tool_calls"}
INFO = {"search_info": {"search_results": [{"index": 1, "url": "https://x"}]}}
FIRST_A, REST_A = '{"a"', ": 1}"
BOTH_CALLED = {**CALLED, "calls": [("f", {"a": 1}), ("g", {"a": 1})]}
ONE_CALLED = {**CALLED, "calls": [("f", {"a": 1})]}
BY_ID = [("c1", "f", FIRST_A), ("c2", "g", FIRST_A), ("c1", "", REST_A), ("c2", "", REST_A)]
TWO = {**CALLED, "calls": [("get_weather", {"city": "Paris"}), ("get_time", {})]}
TWO["ids"] = ["call_a", "call_b"]
FOX = "The quick brown fox jumps over the lazy dog"
QWEN = "Hello, I am a model by Qwen"
POEM = "a line of the poem that comes twice\n"
IN_JSON = {"response_format": JSON_OBJECT}
IN_SCHEMA = {"response_format": JSON_SCHEMA}

# What upstreams send instead of a clean answer, and what must come of it: by default the text and
# usage of HELLO. error= is its status and code, asked= what the client asks for besides. Sources:
# Model Studio's streaming pages, qwen-code and hermes-agent issues; each has been seen somewhere.
DIRTY = table(r"""
plain, clients 4 to 6 | *HELLO |
thoughts with content null, client 31 | delta(role="assistant", content=None, reasoning_content="Hm"), *DELTAS, *END | reasoning="Hm"
thoughts with content empty | delta(role="assistant", content="", reasoning_content="Hm"), *DELTAS, *END | reasoning="Hm"
thoughts called reasoning | delta(role="assistant", reasoning="Hm"), *DELTAS, *END | reasoning="Hm"
thoughts and text in one delta, client 32 | delta(reasoning_content="Hm", content="Hel"), *DELTAS[1:], *END | reasoning="Hm"
thoughts of both names | delta(role="assistant", content=None, reasoning_content="a"), delta(reasoning="b", content=""),
    delta(reasoning_content="c", content="d"), delta("stop", content="e"), DONE | reasoning="abc", content="de", usage=None
model of another name | *again(HELLO, model="glm-4.7") |
usage before the finish | *DELTAS, chunk(usage=USAGE), *stop() |
usage on the finish chunk | *DELTAS, *stop(usage=USAGE) |
usage on every chunk, client 8 | *texts(*WORDS, usage={**USAGE, "completion_tokens": 1}), *stop(usage=USAGE) |
usage in floats, a part missing | *DELTAS, delta("stop"), chunk(usage={"prompt_tokens": 9.0, "completion_tokens": 3.0}), DONE |
usage without a total | *DELTAS, *end(prompt_tokens=9.0, total_tokens=None) |
usage empty, client 9 | *DELTAS, *stop(usage={}) | usage=None
cached tokens at the top | *DELTAS, *end(cached_tokens=4) | usage={**USAGE, "cached_tokens": 4, "prompt_tokens_details": {"cached_tokens": 4}}
finish reason as the word null | *[delta("null", content=text) for text in WORDS], *END |
finish reason empty | *[delta("", content=text) for text in WORDS], *END |
several finish chunks | *DELTAS, delta("stop"), *END |
several finish chunks with text | HELLO[0], delta("stop", content="Hel"), delta("stop", content="lo"), DONE | content="Hello", usage=None
text in the finish chunk | *DELTAS[:2], delta("stop", content="wörld"), chunk(usage=USAGE), DONE |
length, client 22 | *DELTAS, *end("length") | finish_reason="length"
content filter | *DELTAS, *end("content_filter") | finish_reason="content_filter"
tool calls that are none, client 22 | *DELTAS, *end("tool_calls") |

cumulative text | *texts(FOX[:9], FOX[:15], FOX[:25], FOX[:34], FOX), *END | content=FOX
cumulative thoughts | *texts(FOX[:8], FOX[:15], FOX[:25], FOX, name="reasoning_content"), *DELTAS, *END | reasoning=FOX
cumulative, with one repeated | *texts(FOX[:30], FOX[:35], FOX[:35], FOX), *END | content=FOX
cumulative after equal ones | *texts(QWEN, QWEN, QWEN, QWEN + " of", QWEN + " of this"), *END | content=QWEN + " of this"
repetition: laughter | *texts("ha", "haha", "!"), *END | content="hahaha!"
repetition: laughter at the end | *texts("ha", "haha"), *END | content="hahaha"
repetition: digits | *texts("1", "10", "100"), *END | content="110100"
repetition: a rule | *texts(*["=", "==", "===="] * 9), *END | content="=" * 63
repetition: lines | *texts("\n", "\n\n", "x"), *END | content="\n\n\nx"
repetition: a song | *texts("na ", "na ", "na ", "batman"), *END | content="na na na batman"
repetition: the beginning | *texts("Hello", " world", "Hello world, again"), *END | content="Hello worldHello world, again"
repetition: dashes | *texts("--", "--", "-", "\nx"), *END | content="-----\nx"
repetition: long | *texts(*["ab"] * 2000), *END | content="ab" * 2000
repetition: endless | *texts(*["as it says: no end of it "] * 900), *END | content="as it says: no end of it " * 900
repetition: a poem | *texts(POEM, POEM, "x"), *END | content=POEM * 2 + "x"
a think tag | *texts("<think>", "Hm", "</think>"), *DELTAS, *END | reasoning="Hm"
a thinking tag, cut | *texts("<thin", "king>H", "m</think", "ing>\n\n"), *DELTAS, *END | reasoning="Hm"
a think tag in two, text behind it | *texts("<th", "ink>a", "b</thi", "nk>\n\nc"), *END | reasoning="ab", content="c"
a think tag in the text | *texts("say ", "<think>x</think>"), *END | content="say <think>x</think>"
a think tag never closed | *texts("<think>never closed"), *END | reasoning="never closed", content=""
a lone closing tag | *texts("</think>", "\n", "\n"), *DELTAS, *END |
another tag | *texts("<", "b>"), *END | content="<b>"
closing tags by the thousand | *texts("</think>" * 5000), *DELTAS, *END |
thoughts by the thousand | *texts("<think>x</think>" * 1000), *END | content="<think>x</think>" * 900, reasoning="x" * 100
blanks without end in JSON | *texts(*["\n\n  "] * 600), *END | content="\n\n  " * 600, asked=IN_JSON
JSON in a fence, client 30 | *texts("```js", 'on\n{"a":', " 1}\n", "```\n"), *END | content='{"a": 1}', asked=IN_JSON
JSON without, client 30 | *texts('{"a": 1}'), *END | content='{"a": 1}', asked=IN_SCHEMA
JSON behind thoughts, client 30 | *texts("<think>x</think>", '```\n{"a": 1}```'), *END | content='{"a": 1}', reasoning="x", asked=IN_SCHEMA
content null throughout | delta(role="assistant", content=None), delta("stop", content=None), chunk(usage=USAGE), DONE | content=""
content as parts | delta(content=parts("Hello, wörld")), *END |

no space after data | *[data.replace(b"data: ", b"data:") for data in HELLO] |
two of them | *[data.replace(b"data: ", b"data:  ") for data in HELLO] |
CRLF | b"".join(HELLO).replace(b"\n", b"\r\n") |
CR | b"".join(HELLO).replace(b"\n", b"\r") |
comments, ids, names, retry | *[b": keep-alive\n\nretry: 100\n\nid:%d\nevent:result\n:HTTP_STATUS/200\n" % n + data for n, data in enumerate(HELLO)] |
no blank line between events | b"".join(HELLO).replace(b"\n\n", b"\n") |
the same, cut behind the finish | b"".join([*DELTAS, *stop()[:1], b'data: {"id":"x","usa\n\n']).replace(b"\n\n", b"\n") | usage=None
BOM | b"\xef\xbb\xbf" + b"".join(HELLO) |
blank lines before it | b"\r\n\n \n\xef\xbb\xbf", *HELLO |
keep-alives in words and empty data | b"data: ping\n\n", b"data:\n\n", *HELLO |
dirt in between | HELLO[0], b"data: ping\n\n", b"data:\n\n", b": x\n\n", b'data: {"object":"x"}\n\n', *HELLO[1:] |
one event in several data lines | HELLO[0].replace(b'"index": 0,', b'"index": 0,\ndata: '), *HELLO[1:] |
no DONE | *HELLO[:-1] |
no usage, no DONE | *HELLO[:5] | usage=None
no usage, connection cut | *HELLO[:5], CUT | usage=None
usage cut | *HELLO[:5], b'data: {"choices":[],"usa' | usage=None
no finish chunk, but DONE | *DELTAS, chunk(usage=USAGE), DONE |
no blank line at the end | *HELLO[:-1], DONE.strip() |

no choices in some chunk, client 9 | event({"id": "x"}), *HELLO |
choices null, client 9 | event({"id": "x", "choices": None}), *HELLO |
texts and calls that are none | event({"choices": [{"delta": {}, "texts": 1, "calls": 2, "message": 3}]}), *HELLO |
log probabilities that are none | *[event({"choices": [{"delta": {}, "logprobs": x}]}) for x in ([1], {"content": 7})], *HELLO |
choices of null | HELLO[0], event({"choices": [None]}), *HELLO[1:] |
choices empty at first | event({"id": "x", "choices": []}), *HELLO |
no index | *without(DELTAS, "index"), *END |
no object, created, model, id | *without(DELTAS, "object", "created", "model", "id"), *END |
id a number, created a float | *again(DELTAS, id=7, created=1790000000.5), *END |
no delta | event({"choices": [{"index": 0, "finish_reason": None}]}), *HELLO |
delta null | event({"choices": [{"index": 0, "delta": None, "finish_reason": ""}]}), *HELLO |
no role | *DELTAS, *END |
role empty on every delta | *[delta(role="", content=text) for text in WORDS], *END |
role on every delta | *[delta(role="assistant", content=text) for text in WORDS], *END |
delta and message, client 9 | *[event({"choices": [{"index": 0, "delta": x, "message": x}]}) for x in ({"content": "Hello, "}, {"content": "wörld"})], *END |

a whole completion | whole() |
whole: blanks before it | b"\r\n \t", whole() |
whole: id a number, created a string, no object, no model | whole(id=7, created="x", object=ABSENT, model=ABSENT) |
whole: no index, no role | whole(choices=[{"message": {"content": "Hello, wörld"}, "finish_reason": "stop"}]) |
whole: content as a list | whole(parts("Hello, wörld")) |
whole: content missing | whole(ABSENT) | content=""
whole: no usage | whole(usage=ABSENT) | usage=None
whole: usage null | whole(usage=None) | usage=None
whole: unknown finish reason | whole(finish_reason="eos") | finish_reason="eos"
whole: no finish reason | whole(finish_reason=ABSENT) |
whole: finish reason null, calls null | whole(finish_reason=None, message={"tool_calls": None}) |
whole: more fields | whole(message={"reasoning_content": "Hm", "timings": 1}) | reasoning="Hm"
whole: a call without id, type and arguments | whole(None, message={"tool_calls": [{"function": {"name": "f"}}]}) | calls=[("f", {})], **CALLED
whole: arguments an object | whole(ABSENT, message={"tool_calls": [bare_call("f", {"a": 1}, id="a")]}) | calls=[("f", {"a": 1})], **CALLED
whole: two calls with one id | whole(ABSENT, "tool_calls", {"tool_calls": [use("a"), use("a", "g")]}) | calls=[("f", {}), ("g", {})], **CALLED
whole: calls without ids and arguments | whole(ABSENT, message={"tool_calls": [bare_call(name, type="function") for name in "ffg"]}) | calls=[("f", {}), ("f", {}), ("g", {})], **CALLED

no ids, another name before any arguments | *[calling(bare_call(name)) for name in "fg"], *END | calls=[("f", {}), ("g", {})], **CALLED
no ids, the name on every delta | *[calling(bare_call("f", text, index=0)) for text in ("", '{"a":', "1}", "")], *END | calls=[("f", {"a": 1})], **CALLED
no ids and types, client 20 | *[calling(bare_call("f", "{}", index=n)) for n in (0, 1)], *END | calls=[("f", {})] * 2, **CALLED
ids null and the same | tool(0, None, "f", "{}"), tool(1, "same", "g", "{}"), tool(2, "same", "h", "{}"), *END | calls=[("f", {}), ("g", {}), ("h", {})], **CALLED
an index only later | calling({"id": "c1", "function": {"name": "f"}}), calling({"index": 0, "function": {"arguments": "{}"}}), *END | calls=[("f", {})], **CALLED
arguments before all else | *[calling(part) for part in (bare_call(None, '{"a":'), bare_call("f", "1", id="c1"), bare_call(None, "}", id="c1"))], *END | calls=[("f", {"a": 1})], **CALLED
arguments before id, name and index | calling(bare_call(None, '{"a":')), tool(0, "c1", "f", "1"), tool(0, "c1", None, "}"), *END | calls=[("f", {"a": 1})], **CALLED
an id with the last blank | tool(0, "c1", "f", '{"a":1}'), tool(0, "c1", "f", "\n"), *END | calls=[("f", {"a": 1})], **CALLED
arguments null, client 21 | tool(0, "c1", "f", None), *END | calls=[("f", {})], **CALLED
arguments empty, client 21 | tool(0, "c1", "f", ""), *END | calls=[("f", {})], **CALLED
no arguments, length | tool(0, "c1", "f", ""), *end("length") | calls=[("f", {})], content=None, finish_reason="length"
whole arguments, length, client 22 | tool(0, "c1", "f", "{}"), *end("length") | calls=[("f", {})], **CALLED
arguments cut, client 22 | tool(0, "c1", "f", '{"a": "b'), *end("tool_calls") | calls=[("f", '{"a": "b')], content=None, finish_reason="length"
arguments cut, stop | tool(0, "c1", "f", '{"a": "b'), *END | calls=[("f", '{"a": "b')], content=None, finish_reason="length"
no name | tool(0, "c1", None, "{}"), *end("tool_calls") | content=""
finish with each call | tool(0, "c1", "f", "{}", reason="tool_calls"), tool(1, "c2", "g", "{}", reason="tool_calls"), DONE | calls=[("f", {}), ("g", {})], usage=None, **CALLED
text held before a call | HELLO[0], *texts("\n\n"), *CALLS[1:] | **{**TWO, "content": "\n\n"}
functions | tool(0, "a", "f", "{}"), *END | content=None, function_call={"name": "f", "arguments": "{}"}, finish_reason="function_call", asked={"functions": [{"name": "f"}]}
tools: as documented | *CALLS | reasoning="I must look.", **TWO
tools: no index, id repeated, client 18 | *[calling(bare_call(name, text, id=id)) for id, name, text in zip(A[:1] * 2 + B[:1], A[1:] * 2 + B[1:], [*SPLIT_PARIS, "{}"])], *END | **TWO
tools: one index for two calls, client 18 | tool(0, *A, PARIS), tool(0, *B, "{}"), *END | **TWO
tools: index from 1, client 18 | tool(1, *A, PARIS), tool(2, *B, ""), *END | **TWO
tools: two in one chunk, client 19 | calling((0, *A, PARIS), (1, *B, "{}")), *END | **TWO
tools: same index in one chunk, client 19 | calling((0, *A, PARIS), (0, *B, "{}")), *END | **TWO
tools: in the finish chunk, client 19 | calling((0, *A, PARIS), (1, *B, "{}"), reason="stop"), DONE | usage=None, **TWO
tools: arguments before the name | tool(0, "call_a", None, SPLIT_PARIS[0]), tool(0, "", "get_weather", SPLIT_PARIS[1]), tool(1, *B, None), *END | **TWO
tools: arguments as an object, client 21 | tool(0, *A, {"city": "Paris"}), tool(1, *B, {}), *END | **TWO
tools: the whole call replayed, client 17 | *[tool(0, *A, PARIS)] * 2, *ENDING_B | **TWO
tools: the whole call replayed in other blanks | tool(0, *A, PARIS), tool(0, *A, '{"city":"Paris"}'), *ENDING_B | **TWO
tools: a name that comes late | tool(5, "call_x", None, ""), tool(0, *A, PARIS), *ENDING_B | **TWO

native error frame, soft | NATIVE % MINUTE | error=(429, "rate_limit_exceeded")
native error frame, hard | NATIVE % FREE | error=(429, "insufficient_quota")
native error frame later | *DELTAS, NATIVE % MINUTE | error=(429, "rate_limit_exceeded")
native error frame, then text, client 11 | *DELTAS, NATIVE % FREE, *HELLO | error=(429, "insufficient_quota")
error_finish | delta("error_finish", content=ERROR_FINISH) | error=(429, "insufficient_quota")
error_finish later | *DELTAS, delta("error_finish", content=ERROR_FINISH) | error=(429, "insufficient_quota")
error object | event({"error": {"code": "invalid_parameter_error", "message": "m"}}) | error=(400, "invalid_parameter_error")
error string | event({"error": "boom"}) | error=(502, "boom")
error later | *DELTAS, event({"error": {"message": "late", "code": "x"}}) | error=(502, "x")
bare JSON error line | *DELTAS, b'{"error":{"message":"m","code":"internal_error"}}\n\n' | error=(502, "internal_error")
JSON error | b'{"code":"InvalidParameter","message":"m","request_id":"r-1"}' | error=(400, "InvalidParameter")
HTML | b"<!doctype html><html><title>Error</title></html>" | error=(502, "upstream_html")
a list | b"[]" | error=(502, None)
no body | | error=(502, "upstream_cut")
choices missing | whole(choices=ABSENT) | error=(502, None)
choices null in a whole answer | whole(choices=None) | error=(502, None)
choices empty in a whole answer | whole(choices=[]) | error=(502, None)
no finish reason, no DONE, client 10 | *DELTAS | error=(502, "upstream_cut")
connection cut | *DELTAS, CUT | error=(502, "upstream_cut")
garbage | *DELTAS, b"data: {not json\n\n" | error=(502, "upstream_cut")

{} and then the arguments, openai-agents-js #712 | tool(0, "c", "f", "{}"), tool(0, "", None, '{"a": 1}'), *END | **ONE_CALLED
{} and then pieces | tool(0, "c", "f", "{}"), tool(0, "", None, FIRST_A), tool(0, "", None, REST_A), *END | **ONE_CALLED
{} with id and name on each | tool(0, "c", "f", "{ }"), tool(0, "c", "f", '{"a": 1}'), *END | **ONE_CALLED
{} as an object | tool(0, "c", "f", {}), tool(0, "", None, '{"a": 1}'), *END | **ONE_CALLED
{} behind the name | tool(0, "c", "f", ""), tool(0, "", None, "{}"), tool(0, "", None, '{"a": 1}'), *END | **ONE_CALLED
null and then the arguments | tool(0, "c", "f", "null"), tool(0, "", None, '{"a": 1}'), *END | **ONE_CALLED
{} in two pieces, and no more | tool(0, "c", "f", "{"), tool(0, "", None, "}"), *END | calls=[("f", {})], **CALLED
{} twice, two calls | tool(0, "c", "f", "{}"), tool(0, "", None, '{"a": 1}'), tool(1, "d", "g", "{}"), tool(1, "", None, '{"a": 1}'), *END | **BOTH_CALLED

usage is the end, opencrabs #694 | *DELTAS, chunk(usage=USAGE) |
usage without choices is the end | *DELTAS, event({"id": "x", "usage": USAGE}) |
usage is the end, a call | tool(0, "c", "f", '{"a": 1}'), chunk(usage=USAGE) | **ONE_CALLED
usage is the end, a call that is cut | tool(0, "c", "f", FIRST_A), chunk(usage=USAGE) | calls=[("f", FIRST_A)], content=None, finish_reason="length"
usage on a text is no end | *texts("Hel", usage=USAGE) | error=(502, "upstream_cut")
usage before the text is no end | chunk(usage=USAGE), *DELTAS | error=(502, "upstream_cut")

search_info on the finish chunk | *DELTAS, *stop(**INFO), | usage=None, more=INFO
search_info on the usage chunk | *DELTAS, chunk({}, "stop"), chunk(usage=USAGE, **INFO), DONE | more=INFO
search_info beside an empty delta | *DELTAS, chunk({}, **INFO), *END | more=INFO
search_info first | delta(role="assistant", content=""), *texts("Hello, wörld", **INFO), *END | more=INFO
search_info behind the finish chunk | *DELTAS, chunk({}, "stop"), chunk({"content": ""}, **INFO), chunk(usage=USAGE), DONE | more=INFO

text in the middle of calls by turns | tool(0, "c", "f"), tool(1, "d", "g"), tool(0, "", None, FIRST_A), tool(1, "", None, FIRST_A), tool(0, "", None, REST_A), *texts("Hel", "lo"), tool(1, "", None, REST_A), *END | **{**BOTH_CALLED, "content": "Hello"}
text behind a call without arguments | tool(0, "c", "f", ""), *texts("Hi"), *END | calls=[("f", {})], **{**CALLED, "content": "Hi"}
two calls by turns, LlamaIndex | tool(0, "c", "f"), tool(1, "d", "g"), tool(0, "", None, FIRST_A), tool(1, "", None, FIRST_A), tool(0, "", None, REST_A),
    tool(1, "", None, REST_A), *END | **BOTH_CALLED
the second whole before the first | tool(0, "c", "f", FIRST_A), tool(1, "d", "g", '{"a": 1}'), tool(0, "", None, REST_A), *END | **BOTH_CALLED
by turns, by id alone | *[calling(bare_call(name, text, id=id)) for id, name, text in BY_ID], *END | **BOTH_CALLED
by turns, in one event | calling((0, "c", "f", FIRST_A), (1, "d", "g", FIRST_A)), calling((0, "", None, REST_A), (1, "", None, REST_A)), *END | **BOTH_CALLED
by turns, three | *[tool(n, f"c{n}", "f", FIRST_A) for n in range(3)], *[tool(n, "", None, REST_A) for n in range(3)], *END | calls=[("f", {"a": 1})] * 3, **CALLED
by turns, the first without arguments | tool(0, "c", "f"), tool(1, "d", "g", '{"a": 1}'), *END | calls=[("f", {}), ("g", {"a": 1})], **CALLED

half an emoji | cut_emoji("Hi @"), *END | content="Hi \ufffd"
half an emoji in thoughts | cut_emoji("<think>@</think>x"), *END | content="x", reasoning="\ufffd"

sound by turns | sound(transcript="Hel"), sound(data="AA"), sound(transcript="lo"), sound(data="BB"), *END | content="", more={"audio": {"data": "AABB", "transcript": "Hello"}}
sound with id and end | sound(id="a1", data="AA"), sound(id="a1", data="BB"), sound(expires_at=9), *END | content="", more={"audio": {"id": "a1", "data": "AABB", "expires_at": 9}}
sound beside text | delta(content="He", audio={"data": "AA"}), delta(content="llo", audio={"data": "BB"}), *END | content="Hello", more={"audio": {"data": "AABB"}}
any other object | delta(extra={"a": 1, "in": {"b": 2}}), delta(extra={"in": {"c": 3}}), *END | content="", more={"extra": {"a": 1, "in": {"b": 2, "c": 3}}}
""")


@pytest.fixture()
def same_ids(monkeypatch):
    """Ids that are made up are the same in every run."""

    def restart():
        numbers = iter(range(1000))
        monkeypatch.setattr(qp.secrets, "token_hex", lambda size: f"{next(numbers):024d}")

    return restart


def check_canonical(chunks):
    """The shape of a stream that every client takes."""
    assert len({heading(value) for value in chunks}) == 1
    assert isinstance(chunks[0]["id"], str) and isinstance(chunks[0]["created"], int)
    assert all(value["choices"] or "usage" in value for value in chunks)
    assert sum(value.get("usage") is not None for value in chunks) <= 1
    choices = [choice for value in chunks for choice in value["choices"]]
    assert all({"index", "finish_reason"} <= set(choice) for choice in choices)
    assert not any("message" in choice for choice in choices)
    deltas = [choice["delta"] for choice in choices]
    assert ["role" in delta for delta in deltas] == [True] + [False] * (len(deltas) - 1)
    assert not any({"content", "reasoning_content"} <= set(delta) for delta in deltas)
    ended = [choice["finish_reason"] is not None for choice in choices]
    assert ended == [False] * (len(choices) - 1) + [True] and deltas[-1] == {}
    # One delta of a call in a chunk: the first is complete, the later ones have arguments alone.
    calls = [delta["tool_calls"] for delta in deltas if "tool_calls" in delta]
    assert all(len(entries) == 1 for entries in calls)
    first = [entry for [entry] in calls if "id" in entry]
    assert [entry["index"] for entry in first] == list(range(len(first)))
    assert all(entry["type"] == "function" and entry["function"]["name"] for entry in first)
    later = [entry for [entry] in calls if "id" not in entry]
    assert all(set(entry) == {"index", "function"} for entry in later)
    assert all(set(entry["function"]) == {"arguments"} for entry in later)


def loaded(text):
    """The JSON of a text, or the text, if it is none."""
    try:
        return json.loads(text)
    except ValueError:
        return text


def check_completion(completion, expected):
    choice = completion["choices"][0]
    message, calls = choice["message"], choice["message"].get("tool_calls", [])
    assert completion["object"] == "chat.completion"
    assert [type(completion[name]) for name in ("id", "created", "model")] == [str, int, str]
    assert (choice["index"], message["role"]) == (0, "assistant")
    ids = [call["id"] for call in calls]
    assert len(set(ids)) == len(ids) and all(call["type"] == "function" for call in calls)
    found = {
        "content": message["content"],
        "reasoning": message.get("reasoning_content"),
        "finish_reason": choice["finish_reason"],
        "calls": [(x["function"]["name"], loaded(x["function"]["arguments"])) for x in calls],
        "function_call": message.get("function_call"),
        "usage": completion.get("usage"),
        "ids": ids if "ids" in expected else None,
    }
    if "more" in expected:
        found["more"] = {name: {**completion, **message}.get(name) for name in expected["more"]}
    usual = {"content": "Hello, wörld", "finish_reason": "stop", "calls": [], "usage": USAGE}
    assert found == {**dict.fromkeys(found), **usual, **expected}


def cuts_of(data):
    """Where to cut an answer in two: around line ends, names of fields, characters; and elsewhere."""
    size = len(data)
    if size > 4000:
        return range(0, size, size // 9)
    odd = [at for at, byte in enumerate(data) if byte in b"\r\n" or byte > 127]
    near = {at + more for at in odd for more in range(8)}
    return sorted(near.union(range(9), range(0, size, 29)).intersection(range(size + 1)))


@pytest.mark.parametrize("pieces, expected", DIRTY)
def test_dirty_answers_are_the_same_wherever_the_bytes_are_cut(pieces, expected, same_ids):
    whole_answer = b"".join(piece for piece in pieces_of(pieces) if piece is not CUT)
    asked = fields(expected).get("asked", {})

    def outcome(*parts, **more):
        same_ids()
        try:
            return translate(parts, {**asked, **more})
        except qp.UpstreamError as error:
            return error.status, error.code

    with_usage = {"stream_options": {"include_usage": True}}
    clean = outcome(whole_answer, **with_usage)
    for cut in cuts_of(whole_answer):
        assert outcome(whole_answer[:cut], whole_answer[cut:], **with_usage) == clean
    unasked = outcome(whole_answer, n=1)
    is_error = isinstance(clean, tuple)
    assert unasked == clean if is_error else not any("usage" in value for value in unasked)


@pytest.mark.parametrize("pieces, expected", DIRTY)
def test_dirty_answers_reach_clients_clean_streamed_and_not(key_server, upstream, pieces, expected):
    pieces, expected = pieces_of(pieces), fields(expected)
    is_stream = pieces and pieces[0][:1] not in (b"{", b"<", b"[")
    answer = stream(*pieces) if is_stream else reply(200, b"".join(pieces))
    upstream.script.extend([answer] * 2)
    key_server.options = key_server.options._replace(retries=0)
    asked = expected.pop("asked", {})
    status, _, completion = chat(key_server, **asked)
    _, _, data = chat(key_server, stream=True, stream_options={"include_usage": True}, **asked)
    if "error" in expected:
        assert (status, completion["error"]["code"]) == expected["error"]
        # The last event, if there are any, is never [DONE], which is no JSON.
        error = (data if isinstance(data, dict) else json.loads(data[-1]))["error"]
        assert error["code"] == expected["error"][1]
        assert set(error) == {"message", "type", "param", "code"}
        return
    check_completion(completion, expected)
    assert data.pop() == "[DONE]"
    chunks = [json.loads(value) for value in data]
    check_canonical(chunks)
    check_completion(collect(chunks), expected)


@pytest.mark.parametrize("pieces, expected", DIRTY)
def test_dirty_answers_are_responses_one_item_after_the_other(pieces, expected):
    whole_answer = b"".join(piece for piece in pieces_of(pieces) if piece is not CUT)
    expected = {"content": "Hello, wörld", "calls": [], "reasoning": None, **fields(expected)}
    asked = as_response(**expected.pop("asked", {}))
    if "error" in expected:
        with pytest.raises(qp.UpstreamError) as caught:
            events_of_response([whole_answer], **asked)
        assert (caught.value.status, caught.value.code) == expected["error"]
        return
    events = events_of_response([whole_answer], **asked)
    places = [event["output_index"] for event in events if "output_index" in event]
    response, found = events[-1]["response"], collections.defaultdict(list)
    for item in response["output"]:
        said = [part["text"] for part in item.get("content") or item.get("summary", [])]
        arguments = loaded(item.get("arguments", "null"))
        found[item["type"]].append("".join(said) if said else (item.get("name"), arguments))
    assert places == sorted(places)
    assert "".join(found["message"]) == (expected["content"] or "")
    assert "".join(found["reasoning"]) == (expected["reasoning"] or "")
    assert found["function_call"] == expected["calls"]
    reason = expected.get("finish_reason")
    is_cut = reason in ("length", "content_filter")
    assert response["status"] == ("incomplete" if is_cut else "completed")
    assert events[-1]["type"] == "response." + response["status"]
    details = {"reason": "max_output_tokens" if reason == "length" else reason}
    assert response["incomplete_details"] == (details if is_cut else None)


# Calls come back in the envelope in which their tools came: the route and the request, the name and
# the arguments that the upstream calls with, and what the client gets of it.
@pytest.mark.parametrize("is_stream", [False, True])
@rows(r"""
route | given | called | expected
search, forgecode #1580 | chat | tools=[SEARCH] | "search_tool", "{}" | function("search", arguments="{}")
search, of functions | chat | functions=[SEARCH["function"]] | "search_tool", "{}" | {"name": "search", "arguments": "{}"}
custom, of functions | chat | functions=[{"type": "custom", "name": "f"}] | "f", '{"input": 1}' | {"name": "f", "arguments": '{"input": 1}'}
search, of a Response | responses | tools=[flat(SEARCH)] | "search_tool", "{}" | {"type": "function_call", "name": "search", "arguments": "{}"}
search, of a Response for chat | chat | input="Hi", tools=[flat(SEARCH)] | "search_tool", "{}" | function("search", arguments="{}")
custom tool, flat, codex-proxy #707 | chat | tools=[FLAT] | "patch", '{"input": "*** Begin"}' | function("patch", arguments="*** Begin")
custom tool, nested | chat | tools=[NESTED_TOOL] | "patch", '{"input": "*** Begin"}' | {"type": "custom", "custom": {"name": "patch", "input": "*** Begin"}}
custom tool, called with bare text | chat | tools=[NESTED_TOOL] | "patch", "*** Begin" | {"type": "custom", "custom": {"name": "patch", "input": "*** Begin"}}
custom tool of a Response | responses | tools=[FLAT] | "patch", '{"input": "*** Begin"}' | {"type": "custom_tool_call", "name": "patch", "input": "*** Begin"}
custom tool of a Response for chat | chat | input="Hi", tools=[FLAT] | "patch", '{"input": "*** Begin"}' | function("patch", arguments="*** Begin")
custom tool of a Response, with an object | responses | tools=[{**FLAT, "custom": {}}] | "patch", '{"input": "*** Begin"}' | {"type": "custom_tool_call", "name": "patch", "input": "*** Begin"}
custom tool with a reserved name | chat | tools=[{"type": "custom", "custom": {"name": "search"}}] | "search_tool", '{"input": "x"}' | {"type": "custom", "custom": {"name": "search", "input": "x"}}
custom tool with a reserved name, of a Response | responses | tools=[{**FLAT, "name": "search"}] | "search_tool", '{"input": "x"}' | {"type": "custom_tool_call", "name": "search", "input": "x"}
function beside a custom tool | chat | tools=[F, NESTED_TOOL] | "f", '{"input": "x"}' | function(arguments='{"input": "x"}')
tool in an item, Codex 0.144 | responses | input=lite(SPACE) | "functions__g", "{}" | {"type": "function_call", "name": "g", "namespace": "functions", "arguments": "{}"}
custom tool in an item | responses | input=lite(SPACE) | "functions__exec", '{"input": "ls"}' | {"type": "custom_tool_call", "name": "exec", "namespace": "functions", "input": "ls"}
search for tools, Codex | responses | tools=[SEARCH_FIRST] | "tool_search", '{"q": "x"}'
    | {"type": "tool_search_call", "execution": "client", "call_id": "c", "arguments": {"q": "x"}, "status": "completed"}
tool that only a past call names, Codex | responses | input=[*HI, *USED_SPACE] | "functions__g", "{}" | {"type": "function_call", "name": "g", "namespace": "functions", "arguments": "{}"}
tool in an item beside its namesake | responses | input=lite(SPACE), tools=[flat(G)] | "g", "{}" | {"type": "function_call", "name": "g", "arguments": "{}"}
""")
def test_calls_return_as_offered(key_server, upstream, route, given, called, expected, is_stream):
    given, (name, arguments) = fields(given), value_of(called)
    start = {} if "input" in given else ASKED[route]
    for cut in (0, len(arguments) // 2):
        first, rest = tool(0, "c", name, arguments[:cut]), tool(0, "", None, arguments[cut:])
        upstream.script.append(stream(first, rest, *END))
        asked = {"model": "qwen3-coder-plus", "stream": is_stream, **start, **given}
        body = ask(key_server, asked, path=ENDPOINTS[route])[2].decode()
        found = [json.loads(x) for x in re.findall(r"^data: ({.*)", body, re.M)]
        if route == "responses":
            found = (found[-1]["response"] if is_stream else json.loads(body))["output"][0]
            assert found.get("namespace") == value_of(expected).get("namespace")
        else:
            found = (collect(found) if is_stream else json.loads(body))["choices"][0]["message"]
            found = found.get("function_call") or found["tool_calls"][0]
        assert {**found, **value_of(expected)} == found
        assert f'"name": "{name}"' in json.dumps(upstream.bodies()[-1])


@rows(r"""
pieces | expected
as it should be | *TEXT | usage=USAGE, object="text_completion"
usage is the end, opencrabs #694 | *TEXT[:2], text_chunk("", choices=[], usage=USAGE) | usage=USAGE
search_info on the finish chunk | *TEXT[:2], text_chunk("", "stop", **INFO), DONE | **INFO
search_info on the usage chunk | *TEXT[:3], text_chunk("", choices=[], usage=USAGE, **INFO), DONE | usage=USAGE, **INFO
search_info beside an empty text | *TEXT[:2], text_chunk("", **INFO), *TEXT[2:] | **INFO
half an emoji | *TEXT[:2], text_chunk("\ud83d"), *TEXT[2:] | text="def f():\ufffd"
""")
def test_text_answers_keep_what_comes_with_them(key_server, upstream, pieces, expected):
    upstream.script.extend([stream(*pieces_of(pieces))] * 3)
    _, data = complete(key_server, stream=True, stream_options={"include_usage": True})
    assert data.pop() == "[DONE]"
    for chunks in ([complete(key_server)[1]], [json.loads(value) for value in data]):
        choices = [choice for value in chunks for choice in value["choices"]]
        found = {name: value for chunk in chunks for name, value in chunk.items()}
        found["text"] = "".join(choice["text"] for choice in choices)
        assert choices[-1]["finish_reason"] == "stop"
        assert {**found, "text": found["text"], **{"text": "def f():", **fields(expected)}} == found
    assert "prompt_tokens" not in "".join(complete(key_server, stream=True)[1])


THOUGHTS = [delta(reasoning_content="ü"), delta(content="ö"), *stop("length")]


@pytest.mark.parametrize("pieces", [HELLO, CALLS, THOUGHTS], ids=["hello", "calls", "thoughts"])
def test_a_stream_that_ends_anywhere_is_an_error_unless_it_had_finished(pieces):
    whole_answer = b"".join(pieces)
    finished = whole_answer.index(b'"finish_reason": "')
    for cut in range(len(whole_answer) + 1):
        try:
            chunks = translate([whole_answer[:cut]])
        except qp.UpstreamError:
            continue
        reasons = [choice["finish_reason"] for value in chunks for choice in value["choices"]]
        assert cut > finished and reasons[-1] in ("stop", "tool_calls", "length")


# ----------------------------------------------------------------------------------------------------
# Responses API
# ----------------------------------------------------------------------------------------------------


def asked_for_response(**request):
    return qp.ResponseRequest({"input": "Hi", **request}, qp.ResponseMemory())


def response_writer(asked):
    """A writer that has no socket, and the list of the events that it writes."""
    events = []

    def write(pieces, is_last=False):
        events.extend(json.loads(piece.partition(b"\ndata: ")[2]) for piece in pieces)

    out = argparse.Namespace(write_events=write)
    writer = qp.ResponsesWriter(out, asked, "qwen3.7-plus", lambda items: None)
    writer.is_stream = True
    writer.start()
    return writer, events


def events_of_response(pieces, **request):
    """The events for an upstream's stream, without any socket."""
    asked = asked_for_response(**request)
    writer, events = response_writer(asked)
    for value in translate(pieces, asked.chat):
        writer.feed(value, None)
    writer.close(USAGE)
    return events


def respond(server, stream=False, **request):
    """A request to /v1/responses: (status, object), or streamed (status, list of (name, event))."""
    request = {"input": "Hi", "stream": stream, **request}
    status, headers, body = ask(server, request, path="/v1/responses")
    if not headers["Content-Type"].startswith("text/event-stream"):
        return status, json.loads(body)
    found = re.findall(r"event: (.*)\ndata: (.*)\n\n", body.decode())
    return status, [(name, json.loads(data)) for name, data in found]


THINK_TEXT_CALLS = [*texts("Hm", "m", name="reasoning_content"), *DELTAS]
THINK_TEXT_CALLS += [*texts("Again", name="reasoning_content"), *CALLS[1:]]
CALL_TOOLS = [{"type": "function", "name": "get_weather", "parameters": EMPTY, "strict": True}]
IN_ORDER = """
created in_progress output_item.added reasoning_summary_part.added reasoning_summary_text.delta
reasoning_summary_text.delta reasoning_summary_text.done reasoning_summary_part.done
output_item.done output_item.added content_part.added output_text.delta output_text.delta
output_text.delta output_text.done content_part.done output_item.done output_item.added
reasoning_summary_part.added reasoning_summary_text.delta reasoning_summary_text.done
reasoning_summary_part.done output_item.done output_item.added function_call_arguments.delta
function_call_arguments.delta function_call_arguments.done output_item.done output_item.added
function_call_arguments.delta function_call_arguments.done output_item.done output_item.added
custom_tool_call_input.delta custom_tool_call_input.done output_item.done completed
"""


def test_response_events_come_in_the_order_that_all_clients_take():
    patch = [tool(2, "c", "patch", '{"inp'), tool(2, "", None, 'ut": "*** Begin"}'), *END]
    events = events_of_response([b"".join(THINK_TEXT_CALLS[:-3] + patch)], tools=[FLAT])
    assert [event["sequence_number"] for event in events] == list(range(len(events)))
    assert [event["type"][len("response.") :] for event in events] == IN_ORDER.split()
    ended = [event["item"] for event in events if event["type"] == "response.output_item.done"]
    places = {item["id"]: place for place, item in enumerate(ended)}
    for event in events:
        if "output_index" in event:
            named = event.get("item_id") or event["item"]["id"]
            assert event["output_index"] == places[named]
            assert isinstance(event.get("delta", ""), str)
    reasoning, message, _, weather, clock, patch = ended
    kinds = "reasoning message reasoning function_call function_call custom_tool_call".split()
    assert [item["type"] for item in ended] == kinds
    assert reasoning["summary"] == [{"type": "summary_text", "text": "Hmm"}]
    assert (message["role"], message["status"]) == ("assistant", "completed")
    text = {"type": "output_text", "text": "Hello, wörld", "annotations": [], "logprobs": []}
    assert message["content"] == [text]
    facts = fields('call_id="call_a", name="get_weather", status="completed"')
    assert facts.items() <= weather.items()
    assert json.loads(weather["arguments"]) == {"city": "Paris"} and clock["arguments"] == "{}"
    assert "*** Begin" in [event.get("delta") for event in events] and patch["input"] == "*** Begin"
    final = events[-1]["response"]
    assert final["output"] == ended and final["status"] == "completed"
    counts = {"input_tokens": 9, "output_tokens": 3, "total_tokens": 12}
    counts["input_tokens_details"] = {"cached_tokens": 0, "cache_write_tokens": 0}
    assert final["usage"] == {**counts, "output_tokens_details": {"reasoning_tokens": 0}}


KEPT_FIELDS = fields("""
    metadata={"a": "b"}, instructions="Be brief.", temperature=0, max_output_tokens=99, user="me",
    tools=CALL_TOOLS, parallel_tool_calls=False, truncation="auto"
""")


def test_response_has_every_required_field_streamed_and_not(key_server, upstream):
    details = {"cached_tokens": 2, "cache_creation_input_tokens": 5}
    answer = stream(*THINK_TEXT_CALLS[:-3], *end(prompt_tokens_details=details))
    upstream.script.extend([answer] * 2)
    asked = {**KEPT_FIELDS, "store": True, "reasoning": {"effort": "low", "summary": "auto"}}
    status, response = respond(key_server, **asked)
    assert status == 200 and set(response) == RESPONSE_FIELDS
    counted = {"cached_tokens": 2, "cache_write_tokens": 5}
    assert response["usage"]["input_tokens_details"] == counted
    kept = {**KEPT_FIELDS, "store": True, "object": "response", "model": "qwen3-max"}
    kept["tools"] = [{"description": None, **CALL_TOOLS[0]}]
    assert {name: response[name] for name in kept} == kept
    _, events = respond(key_server, stream=True, **asked)
    assert all(name == event["type"] for name, event in events)

    def without_ids(value):
        ids = r'"(id|created_at|completed_at)": ("(resp|rs|msg|fc)_[0-9a-f]+"|\d+)'
        return re.sub(ids, "", json.dumps(value, sort_keys=True))

    assert without_ids(events[-1][1]["response"]) == without_ids(response)
    body = upstream.bodies()[0]
    assert body["messages"][0] == system("Be brief.")
    assert (body["max_tokens"], body["thinking_budget"]) == (99, 4096)
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
    asked = {"temperature": 0, "top_p": 0.5, "safety_identifier": "me", "presence_penalty": -1}
    final = events_of_response([*DELTAS, *stop("length")], **asked)[-1]["response"]
    assert {name: final[name] for name in asked} == asked and final["completed_at"] is None
    responses = [each["response"] for each in events_of_response([SSE]) if "response" in each]
    assert [set(response) for response in responses] == [RESPONSE_FIELDS] * 3
    defaults = fields("temperature=1, top_p=1, presence_penalty=0, frequency_penalty=0")
    assert defaults.items() <= responses[-1].items()
    assert [response["completed_at"] is None for response in responses] == [True, True, False]


@rows(r"""
pieces | code
no end | *DELTAS | server_error
connection cut | *DELTAS, CUT | server_error
quota | *DELTAS, NATIVE % FREE | insufficient_quota
rate | *DELTAS, NATIVE % MINUTE | rate_limit_exceeded
garbage | *DELTAS, b"data: {cut\n\n" | server_error
""")
def test_a_response_that_breaks_off_has_failed_and_can_be_continued(
    key_server, upstream, pieces, code
):
    upstream.script.append(stream(*pieces_of(pieces)))
    _, events = respond(key_server, stream=True)
    assert [event["sequence_number"] for _, event in events] == list(range(len(events)))
    names = [name for name, _ in events]
    assert [names[0], *names[-2:]] == ["response.created", "error", "response.failed"]
    failure, response = events[-2][1], events[-1][1]["response"]
    assert response["status"] == "failed"
    errors = [failure, failure["error"], response["error"]]
    assert [error["code"] for error in errors] == [code] * 3
    assert len({error["message"] for error in errors}) == 1
    assert get(key_server, f"/v1/responses/{response['id']}")[1] == response
    upstream.script.append(stream(*DELTAS, *stop("length")))
    _, cut = respond(key_server, input="Go on.", previous_response_id=response["id"])
    assert cut["status"] == "incomplete" and roles_of(upstream) == ["user", "assistant", "user"]
    assert respond(key_server, input="More.", previous_response_id=cut["id"])[0] == 200


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


FORMATS = [{"type": "json_schema", "name": "x", "schema": {"type": "object"}, "strict": True}]
FORMATS += [JSON_OBJECT]


@pytest.mark.parametrize("text_format", FORMATS)
def test_structured_output_of_responses_is_bare_json(key_server, upstream, text_format):
    upstream.script.append(stream(*texts("```json\n", '{"a": 1}', "\n```"), *END))
    text = {"format": text_format, "verbosity": "low"}
    status, response = respond(key_server, text=text, model="qwen3.7-plus")
    assert status == 200 and json.loads(response["output"][0]["content"][0]["text"]) == {"a": 1}
    assert upstream.bodies()[0]["response_format"]["type"] == text_format["type"]
    assert response["text"]["format"] == text_format


def test_compaction_is_one_item_that_a_later_request_carries_back(key_server, upstream):
    items = [user("Do it."), {"type": "compaction_trigger"}]
    _, events = respond(key_server, stream=True, input=items, tools=CALL_TOOLS)
    output = events[-1][1]["response"]["output"]
    assert [item["type"] for item in output] == ["compaction"]
    assert "tools" not in upstream.bodies()[0]
    names = "created in_progress output_item.added output_item.done completed"
    assert [name[len("response.") :] for name, _ in events] == names.split()
    respond(key_server, input=[*output, user("Go on.")])
    assert "Hello, wörld" in upstream.bodies()[1]["messages"][0]["content"]
    # Without a summary it has failed.
    upstream.script.extend([stream(chunk({"reasoning_content": "Hm"}), *END)] * 2)
    assert respond(key_server, input=items, stream=True)[1][-1][0] == "response.failed"
    assert respond(key_server, input=items)[0] == 502


def test_thoughts_are_carried_in_encrypted_content_when_asked_for(key_server, upstream):
    upstream.script.append(stream(*THINK_TEXT_CALLS[:5], *END))
    _, response = respond(key_server, include=["reasoning.encrypted_content"])
    respond(key_server, input=[*response["output"], user("Go on.")])
    assert upstream.bodies()[1]["messages"][0]["reasoning_content"] == "Hmm"


def roles_of(upstream, place=-1):
    return [message["role"] for message in upstream.bodies()[place]["messages"]]


@pytest.mark.parametrize("is_stream", [False, True])
def test_a_conversation_goes_on_by_the_id_of_a_response(key_server, upstream, is_stream):
    def turn(*script, **request):
        upstream.script.append(stream(*script, *END))
        status, answer = respond(key_server, stream=is_stream, **request)
        assert status == 200
        return answer[-1][1]["response"] if is_stream else answer

    called = chunk(tool_call(0, "c1", "get_weather", '{"city": "Paris"}'))
    first = turn(called, input="Weather?", instructions="Be brief.", tools=CALL_TOOLS)
    assert first["store"] is True and first["previous_response_id"] is None
    output = {"type": "function_call_output", "call_id": "c1", "output": "sunny"}
    second = turn(*DELTAS, input=[output], previous_response_id=first["id"])
    assert second["previous_response_id"] == first["id"]
    # Neither instructions nor tools are inherited.
    assert roles_of(upstream) == ["user", "assistant", "tool"]
    assert "tools" not in upstream.bodies()[-1]
    turn(*DELTAS, input="And tomorrow?", previous_response_id=second["id"])
    assert roles_of(upstream) == ["user", "assistant", "tool", "assistant", "user"]
    branch = turn(*DELTAS, input="Forget it.", previous_response_id=second["id"], store=False)
    assert roles_of(upstream)[-1] == "user" and len(roles_of(upstream)) == 5
    assert get(key_server, f"/v1/responses/{second['id']}") == (200, second)
    assert get(key_server, f"/v1/responses/{branch['id']}")[0] == 404
    listed = get(key_server, f"/v1/responses/{second['id']}/input_items")[1]
    kinds = [item["type"] for item in listed["data"]]
    assert kinds == ["function_call_output", "function_call", "message"]
    assert listed["data"][2]["content"] == [{"type": "input_text", "text": "Weather?"}]
    assert all(item["id"] for item in listed["data"]) and listed["has_more"] is False
    refused = get(key_server, f"/v1/responses/{second['id']}?stream=true")
    assert (refused[0], refused[1]["error"]["param"]) == (400, "stream")
    status, _, body = ask(key_server, method="DELETE", path=f"/v1/responses/{first['id']}")
    deleted = {"id": first["id"], "object": "response", "deleted": True}
    assert status == 200 and json.loads(body) == deleted
    assert get(key_server, f"/v1/responses/{first['id']}")[0] == 404
    # What was continued from it has the whole conversation.
    turn(*DELTAS, input="Well?", previous_response_id=second["id"])
    assert len(roles_of(upstream)) == 5


def test_the_items_of_an_input_come_in_pages(key_server, upstream):
    texts = [f"text {number}" for number in range(5)]
    items = [{"role": "user", "content": text} for text in texts]
    path = f"/v1/responses/{respond(key_server, input=items)[1]['id']}/input_items"

    def page(query):
        listed = get(key_server, f"{path}?{query}")[1]
        found = [item["content"][0]["text"] for item in listed["data"]]
        ids = [item["id"] for item in listed["data"]] or [None]
        assert (listed["first_id"], listed["last_id"]) == (ids[0], ids[-1])
        return found, listed["last_id"], listed["has_more"]

    found, last, has_more = page("limit=2&order=asc")
    assert found == texts[:2] and has_more
    found, last, has_more = page(f"limit=3&order=asc&after={last}")
    assert found == texts[2:] and not has_more and page(f"order=asc&after={last}")[0] == []
    assert page("")[0] == texts[::-1]
    for query, word in [("limit=0", "limit"), ("limit=x", "limit"), ("order=up", "order")]:
        assert get(key_server, f"{path}?{query}")[1]["error"]["param"] == word
    assert get(key_server, f"{path}?after=none")[0] == 400


def test_listed_items_have_ids_of_their_own(key_server, upstream):
    _, first = respond(key_server)
    again = {"id": first["output"][0]["id"]}
    nulls = {"id": None, "status": None}
    call = {"type": "function_call", "call_id": "c1", "name": "f", "arguments": "{}", **nulls}
    output = {"type": "function_call_output", "call_id": "c1", "output": "x", **nulls}
    items = [again, {"role": "user", "content": "z", **nulls}, call, output]
    _, second = respond(key_server, input=items, previous_response_id=first["id"])
    assert roles_of(upstream) == ["user", "assistant", "assistant", "user", "assistant", "tool"]
    listed = get(key_server, f"/v1/responses/{second['id']}/input_items")[1]["data"]
    assert len({item["id"] for item in listed}) == len(listed) == 6
    assert {item["status"] for item in listed} == {"completed"}


def references(response):
    return [{"type": "item_reference", "id": item["id"]} for item in response["output"]]


def test_an_item_of_an_answer_can_be_sent_back_by_its_id(key_server, upstream):
    """The AI SDK does so unless it is told `store: false`; thoughts that are forgotten are left out."""
    upstream.script.append(stream(*THINK_TEXT_CALLS, *END))
    said = respond(key_server, stream=True)[1][-1][1]["response"]
    ids = [item["call_id"] for item in said["output"] if "call_id" in item]
    results = [{"type": "function_call_output", "call_id": id, "output": "x"} for id in ids]
    forgotten = {"type": "item_reference", "id": "rs_forgotten"}
    _, whole_ = respond(key_server, input=[forgotten, *HI, *references(said), *results])
    assert whole_["status"] == "completed"
    assert respond(key_server, input=[*HI, *said["output"], *results])[0] == 200
    _, by_reference, in_full = upstream.bodies()
    assert by_reference == in_full
    calls = [len(message.get("tool_calls", [])) for message in in_full["messages"]]
    assert calls == [0, 0, 2, 0, 0]


def test_an_item_that_is_not_kept_or_comes_twice_is_refused(key_server, upstream):
    for store, times, words in ((False, 1, "store = false"), (True, 2, "second time")):
        _, response = respond(key_server, store=store)
        del upstream.requests[:]
        status, body = respond(key_server, input=[*HI, *references(response) * times])
        assert status == 400 and words in body["error"]["message"] and upstream.requests == []


def stored(number, *texts, size=30):
    output = [{"id": f"i{number}", "text": str(number) * size}]
    return {"id": f"r{number}", "output": output}, [{"text": text} for text in texts]


def test_the_memory_of_responses_has_a_limit():
    memory = qp.ResponseMemory(limit=4000)
    for number in range(20):
        memory.keep(*stored(number))
    assert memory.item("i19")["text"] == "19" * 30 and memory.item("i15") is None
    assert memory.get("r19")[0]["output"] == [memory.item("i19")] and memory.get("r15") is None
    memory.keep(*stored(20, size=9000))
    assert memory.get("r20") is memory.item("i20") is memory.get("r19") is None
    assert memory.size == 0 and memory.item(5) is None


def test_a_shared_beginning_is_remembered_once():
    memory, texts = qp.ResponseMemory(), [f"turn {number} " + "x" * 1000 for number in range(200)]
    for number in range(200):
        memory.keep(*stored(number, *texts[:number]))
    assert memory.size < 200 * (1000 + 3000) + 8 * 200 * 200
    assert len(memory.get("r199")[1]) == 199
    for number in range(200):
        assert memory.delete(f"r{number}") and not memory.delete(f"r{number}")
    assert memory.size == 0 and not memory._items and not memory._by_id


def test_an_item_is_named_by_its_place_in_the_client_s_input(key_server):
    rules, odd = [{"role": "developer", "content": "Be brief."}], {"type": "nothing"}
    before = respond(key_server)[1]["id"]
    for more in ({}, {"instructions": rules}, {"previous_response_id": before}):
        _, body = respond(key_server, input=[*HI, odd], **more)
        assert (body["error"]["param"], body["error"]["message"][:8]) == ("input.1", "input[1]")


# ----------------------------------------------------------------------------------------------------
# Ledger
# ----------------------------------------------------------------------------------------------------


@pytest.fixture()
def counted(keyed, monkeypatch, home):
    """A proxy that counts into a file, in front of the fake's DashScope endpoint."""
    monkeypatch.setattr(qp.Ledger, "PAUSE", 0.02)
    monkeypatch.setattr(qp.Ledger, "RETRY", 0.1)
    monkeypatch.setattr(qp.Call, "RETRY_DELAY", 0.01)
    monkeypatch.setattr(qp.CountsFile, "BUSY", 0.05)

    def start(path=home / "c.sqlite3", **options):
        return keyed(model="qwen3-max", usage_file=path and str(path), **options)

    return start


def text_at(server, path):
    status, _, body = ask(server, method="GET", path=path)
    assert status == 200, body
    return body.decode()


def usage(server, query=""):
    return json.loads(text_at(server, "/usage" + query))


def requests_of(server):
    return usage(server)["since_start"]["requests"]


def in_file(path, sql="SELECT coalesce(sum(requests), 0), sum(input_tokens) FROM buckets"):
    """The first row of a query; none before the table is there."""
    with contextlib.closing(sqlite3.connect(str(path))) as connection:
        tables = connection.execute("SELECT * FROM sqlite_master").fetchall()
        return connection.execute(sql).fetchone() if tables else (None, None)


RICH = fields("""
    prompt_tokens=900, completion_tokens=213, total_tokens=1113,
    prompt_tokens_details={"cached_tokens": 512}, completion_tokens_details={"reasoning_tokens": 96}
""")
WILD = fields("""
    prompt_tokens=9, completion_tokens=-3, prompt_tokens_details={"cached_tokens": 1e300},
    completion_tokens_details={"reasoning_tokens": "many"}
""")
BROKEN_OFF = [*HELLO[:2], chunk({}, usage=USAGE), CUT]
LINE_WHO = r"qwen3-max via 127\.0\.0\.1:\d+ \d\.\d\ds"
LINE_FIRST = r" first \d\.\d\ds"


# What the upstream answers, route, what the client asks; then status, tokens (input, cached, output,
# reasoning), level and line of the log.
@rows(r"""
script | route | asked | expected | line
streamed | stream(*HELLO) | chat | stream=True | 200 9 0 3 0 I | WHO FIRST 9\+3 tokens codex_cli_rs$
collected | stream(*HELLO) | chat | | 200 9 0 3 0 I | WHO FIRST 9\+3 tokens codex_cli_rs$
details | stream(*HELLO[:5], chunk(usage=RICH), DONE) | chat | | 200 900 512 213 96 I | 900\+213 tokens \(512 cached, 96 thoughts\) codex_cli_rs$
wild counts | stream(*HELLO[:5], chunk(usage=WILD), DONE) | chat | | 200 9 0 0 0 I | 9\+0 tokens codex_cli_rs$
nothing counted | stream(*HELLO[:5], DONE) | chat | | 200 0 0 0 0 I | WHO FIRST codex_cli_rs$
text | stream(*TEXT) | text | prompt="x" | 200 9 0 3 0 I | 9\+3 tokens
responses | stream(*HELLO) | responses | input="x" | 200 9 0 3 0 I | 9\+3 tokens
embeddings | | embeddings | input=["a"] * 25, model="text-embedding-v4" | 200 25 0 0 0 I | text-embedding-v4 via .* 25\+0 tokens codex_cli_rs$
no embeddings | | embeddings | input=[] | 400 0 0 0 0 W | 400 \d\.\d\ds codex_cli_rs: model must be named
refused | refusal("no such thing", 400) | chat | | 400 0 0 0 0 W | WHO codex_cli_rs: no such thing$
exhausted | refusal("hour allocated quota exceeded", 429, "insufficient_quota") | chat | | 429 0 0 0 0 W | 429 WHO codex_cli_rs:
down | *[reply(503, b"")] * 3 | chat | | 503 0 0 0 0 W | 503 WHO
cut | stream(*HELLO[:2], CUT) | chat | stream=True | 502 0 0 0 0 W | 502 WHO FIRST codex_cli_rs: the upstream broke off
cut but counted | stream(*BROKEN_OFF) | chat | stream=True | 502 9 0 3 0 W | 502 .* 9\+3 tokens codex_cli_rs: the upstream broke off
no JSON | | chat | messages=float("nan") | 400 0 0 0 0 W | 400 \d\.\d\ds codex_cli_rs: the body is not valid JSON
given up | stream(*HELLO) | chat | model="qwen3.7-plus", tools=[function()], tool_choice="required" | 200 9 0 3 0 I | codex_cli_rs: no thinking, since a tool call is forced$
""")
def test_each_outcome_counts(counted, upstream, home, caplog, script, route, asked, expected, line):
    *numbers, level = expected.split()
    status, *tokens = map(int, numbers)
    line = line.replace("WHO", LINE_WHO).replace(" FIRST", LINE_FIRST)
    server, path = counted(), ENDPOINTS[route]
    upstream.script.extend(pieces_of(script))
    body = {**({"messages": HI} if route == "chat" else {}), **fields(asked)}
    headers = {"User-Agent": "codex_cli_rs/0.56.0 (Linux)"}
    answered, _, received = ask(server, body, path=path, headers=headers)
    assert answered == (200 if b"data: " in received else status)
    until(lambda: requests_of(server) == 1)
    expected = (1, *tokens, int(status >= 400))
    report = usage(server, "?by=client,day")
    names = list(qp.CountsFile.MEASURES)[:6]
    for found in (report["since_start"], *report["groups"]):
        assert tuple(found[each] for each in names) == expected
    assert [group["client"] for group in report["groups"]] == ["codex_cli_rs"]
    metrics = text_at(server, "/metrics")
    total = rf'requests_total{{route="POST {path[3:]}",.*status="{status // 100}xx"}} 1\n'
    assert re.search(total, metrics)
    for kind, count in zip(("input", "cached", "output", "reasoning"), tokens):
        assert not count or re.search(rf'tokens_total{{.*kind="{kind}"}} {count}\n', metrics)
    said = [record for record in caplog.records if f"POST {path}" in record.getMessage()]
    assert len(said) == 1 and said[0].levelname[0] == level
    assert re.search(line, said[0].getMessage())
    server.shutdown(0)
    kept = f"SELECT outcome, {', '.join(qp.CountsFile.SUMS[:5])} FROM buckets"
    assert in_file(home / "c.sqlite3", kept) == (status, 1, *tokens)
    assert in_file(home / "c.sqlite3", "PRAGMA integrity_check") == ("ok",)


@rows(r"""
pieces | words
before the answer | | the client left while it waited for the first byte
in it | *HELLO[:2] | the client left \d\.\d s after the first byte
behind the usage | HELLO[0], chunk({}, usage=USAGE), HELLO[1] |  9\+3 tokens .*the client left
""")
def test_who_leaves_is_no_error_and_stops_the_upstream(counted, upstream, caplog, pieces, words):
    server, pieces = counted(None), pieces_of(pieces)
    upstream.script.append(stream(*pieces, threading.Event()))
    with send(server, stream=True) as client:
        upstream.wait_for_request()
        assert not pieces or any(b"Hel" in line for line in client.makefile("rb"))
    assert upstream.gone.wait(WAIT)
    until(lambda: requests_of(server) == 1)
    found = usage(server)["since_start"]
    assert (found["errors"], found["input_tokens"]) == (0, 9 if "tokens" in words else 0)
    line = next(one for one in caplog.records if " 499 " in one.getMessage())
    assert line.levelname == "INFO" and re.search(words, line.getMessage())


def test_debug_shows_the_start_what_is_sent_and_the_whole_answer(counted, upstream, caplog):
    caplog.set_level(logging.DEBUG, "qwen_proxy")
    server = counted(None)
    words = chunk({"content": " sk-abcdefghijkl " + "y" * 500})
    for stream_ in (False, True):
        caplog.clear()
        upstream.script.append(stream(*HELLO[:4], words, *HELLO[4:]))
        chat(server, stream=stream_)
        until(lambda: "answer: " in caplog.text)
        said = [record.getMessage() for record in caplog.records if record.levelname == "DEBUG"]
        assert said[0] == "POST /v1/chat/completions from unknown"
        assert any(line.startswith("rules: ") and '"content": "Hi"' in line for line in said)
        assert "Hello, wörld" in said[-1] and '"prompt_tokens": 9' in said[-1]
        assert "sk-abcdefghijkl" not in caplog.text and "y" * 250 not in caplog.text


def test_each_provider_that_was_asked_counts(counted, home, upstream, second):
    urls = ({"id": "qwen3-max", "baseUrl": fake.dashscope} for fake in (upstream, second))
    write_settings(home, upstream, *urls)
    server = counted(base_url=None, failover=True)
    upstream.script.append(EXHAUSTED)
    assert chat(server)[0] == 200
    until(lambda: requests_of(server) == 2)
    names = ("provider", "requests", "input_tokens", "errors")
    groups = usage(server, "?by=provider")["groups"]
    expected = [(f"127.0.0.1:{upstream.port}", 1, 0, 1), (f"127.0.0.1:{second.port}", 1, 9, 0)]
    assert sorted(tuple(group[name] for name in names) for group in groups) == sorted(expected)


def a_database(path, *statements):
    with contextlib.closing(sqlite3.connect(str(path))) as connection:
        for statement in statements:
            connection.execute(statement)
        connection.commit()


OURS = f"PRAGMA application_id = {qp.CountsFile.APPLICATION_ID}"


# What is made in place of the file, and what the warning says.
@posix
@rows(r"""
made | words
a directory | path.mkdir() | not a regular file
a pipe | make(path, "pipe") | not a regular file
a device | path.symlink_to("/dev/full") | not a regular file
a link to nothing | path.symlink_to("/nowhere/at/all") | not a regular file
no database | path.write_bytes(b"x" * 5000) | not a database
cut off | path.write_bytes(b"SQLite format 3\0" + b"\xff" * 50) | not a database
foreign | a_database(path, "CREATE TABLE buckets (x)") | another program's
newer | a_database(path, OURS, "PRAGMA user_version = 2") | a newer qwen_proxy
another table | a_database(path, OURS, "CREATE TABLE buckets (x)") | no such column
no sqlite3 | | sqlite3
""")
def test_a_useless_file_costs_a_warning_alone(counted, home, caplog, monkeypatch, made, words):
    path = home / "c.sqlite3"
    if made:
        value_of(made, path=path)
    else:
        monkeypatch.setitem(sys.modules, "sqlite3", None)
    before = path.read_bytes() if path.is_file() else b""
    server = counted()
    for _ in range(3):
        assert chat(server)[0] == 200
    until(lambda: requests_of(server) == 3 and words in caplog.text)
    report = usage(server)
    assert words in report["problem"]
    assert not made or report["groups"][0]["requests"] == 3
    assert "requests_total" in text_at(server, "/metrics")
    server.shutdown(0)
    said = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert len(said) == 1 and words in said[0] and str(path) in said[0]
    assert (path.read_bytes() if path.is_file() else b"") == before


def test_counts_wait_for_a_file_that_is_locked_and_for_one_that_was_deleted(counted, home, caplog):
    path, server = home / "c.sqlite3", counted()
    assert chat(server)[0] == 200
    until(lambda: path.exists() and in_file(path)[0] == 1)
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as other:
        other.execute("BEGIN IMMEDIATE")
        assert chat(server)[0] == 200
        until(lambda: "locked" in caplog.text)
        assert usage(server)["groups"][0]["requests"] == 2 and in_file(path)[0] == 1
    assert chat(server)[0] == 200
    until(lambda: in_file(path)[0] == 3)
    os.unlink(str(path))
    assert chat(server)[0] == 200
    until(lambda: path.exists() and in_file(path)[0] == 1)
    assert caplog.text.count("counted in memory") == 1


LOAD = """
import sys, time, qwen_proxy
qwen_proxy.Ledger.PAUSE = 0.01
ledger, count = qwen_proxy.Ledger(sys.argv[1]), int(sys.argv[2])
for number in range(count):
    ledger.add("POST /chat/completions", ("p", "m%d" % (number % 3), "c"), 200, (1, 0, 2, 0), (0.1, 0.2))
    if number % 50 == 0:
        print(number, flush=True)
        time.sleep(0.005)
ledger.close(30)
"""


def load(path, count):
    command = [sys.executable, "-c", LOAD, str(path), str(count)]
    return subprocess.Popen(command, cwd=HERE, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_file_that_another_process_makes_meanwhile_is_ours(tmp_path, monkeypatch):
    monkeypatch.setattr(qp.CountsFile, "BUSY", 0.01)
    path = str(tmp_path / "c.sqlite3")

    class Slow(sqlite3.Connection):
        def execute(self, sql, *values):
            found = super().execute(sql, *values)
            if sql == qp.CountsFile.LOOK:
                row = found.fetchone()
                found.close()
                found = types.SimpleNamespace(fetchone=lambda: row)
                facts = ("r", "p", "m", "c", 200, 1, 0, 0, 0, 0, 0, 0)
                qp.CountsFile(path).add([(600, *facts)])
            return found

    with contextlib.closing(sqlite3.connect(path, factory=Slow, isolation_level=None)) as slow:
        qp.CountsFile(path)._prepare(slow)
    assert in_file(path)[0] == 1


def test_several_processes_and_a_reader_share_one_file(home):
    path = home / "c.sqlite3"
    processes = [load(path, 2000) for _ in range(3)]
    seen = []
    while any(process.poll() is None for process in processes):
        groups = qp.CountsFile(str(path)).read(["day"], 2)["groups"]
        seen.append(sum(group["requests"] for group in groups))
    said = [process.communicate()[1] for process in processes]
    assert said == [b""] * 3 and seen == sorted(seen)
    assert in_file(path) == (6000, 6000) and stat.S_IMODE(path.stat().st_mode) == 0o600


def test_counts_are_read_after_a_death_in_the_middle_of_writing(home):
    path, left = home / "c.sqlite3", home / "left.sqlite3"
    facts, counts = ("r", "p", "m", "c", 200, 1, 2, 0, 3, 0, 4, 5), qp.CountsFile(str(path))
    counts.add([(int(time.time()), *facts)])
    with contextlib.closing(sqlite3.connect(str(path), isolation_level=None)) as writer:
        writer.execute("PRAGMA journal_mode = DELETE")
        # Then it writes before the transaction ends.
        writer.execute("PRAGMA cache_size = 1")
        writer.execute("BEGIN")
        writer.executemany(qp.CountsFile.ADD, [(number, *facts) for number in range(2000)])
        for suffix in ("", "-journal"):
            shutil.copy(f"{path}{suffix}", f"{left}{suffix}")
    groups = qp.CountsFile(str(left)).read(["model"], 2)["groups"]
    assert [group["requests"] for group in groups] == [1]


@posix
@pytest.mark.parametrize("after", [50, 400, 1500])
def test_a_killed_writer_leaves_a_good_file(home, after):
    path, process = home / "c.sqlite3", load(home / "c.sqlite3", 1_000_000)
    with process.stdout:
        while int(process.stdout.readline()) < after:
            pass
        process.kill()
    process.communicate()
    if path.exists():
        counts = qp.CountsFile(str(path)).read(["model"], 2)["groups"]
        assert all(group["requests"] * 2 == group["output_tokens"] for group in counts)
        assert in_file(path, "PRAGMA integrity_check") in (("ok",), (None, None))
    ledger = qp.Ledger(str(path))
    ledger.add("POST /embeddings", ("p", "last", "c"), 200)
    ledger.close(WAIT)
    assert in_file(path, "SELECT requests FROM buckets WHERE model = 'last'") == (1,)


DAY = 86_400


# Where the clock goes between three starts, in days, and how many buckets are left of the last 85
# days; the file has one of each hour of the last 200 days.
@rows("""
jumps | left
steady | 0, 0, 0 | 85 * 24
years ahead | 0, 7000, 7000 | 85
ahead and back | 0, 7000, 0 | 85 * 24
years back | 0, -15_000, -15_000 | 85 * 24
back and ahead | 0, -400, 0 | 85 * 24
""")
def test_old_buckets_become_days_and_no_clock_does_harm(home, monkeypatch, jumps, left):
    # In the afternoon: a day's bucket is its noon, which may be more or less than 85 days ago.
    real = time.mktime((*time.localtime()[:3], 15, 0, 0, 0, 0, -1))
    path = str(home / "c.sqlite3")
    facts, counts = ("POST /x", "p", "m", "c", 200, 1, 2, 0, 3, 0, 4, 5), qp.CountsFile(path)
    counts._next_merge = float("inf")
    counts.add([(int(real) - hour * 3600, *facts) for hour in range(1, 4800)])
    for days in pieces_of(jumps):
        monkeypatch.setattr(time, "time", lambda: real + days * DAY)
        ledger = qp.Ledger(path)
        ledger.add("POST /completions", ("p", "m", "c"), 200, (1, 1, 1, 1), (1, 2))
        ledger.close(WAIT)
        assert ledger.problem == ""
    assert in_file(path) == (4799 + 3, 2 * 4799 + 3)
    recent = "SELECT count(*) FROM buckets WHERE route = 'POST /x' AND bucket >= "
    assert in_file(path, recent + str(int(real) - 85 * DAY))[0] == value_of(left)
    older = "SELECT count(*), sum(requests) FROM buckets WHERE bucket < "
    rows, requests = in_file(path, older + str(int(real) - 92 * DAY))
    assert rows < 130 and requests >= 107 * 24


# Days ago, provider, model, client, outcome, requests, tokens.
FILLED = """
0|coding|qwen3.7-plus|codex_cli_rs|200|1200|4000000|1500000|132000|40000
0|coding|qwen3.7-plus|codex_cli_rs|429|7|0|0|0|0
0|coding|glm-5|aider|499|2|50|0|9|0
2|coding|glm-5|aider|200|10|1000|0|500|0
20|openrouter|a/b|curl|200|1|10|0|20|0
100|old|x|y|200|1|10|0|20|0
-3|ahead|x|y|200|1|10|0|20|0
0|||curl|401|3|0|0|0|0
"""


@pytest.fixture()
def filled(home):
    """The file of counts holds FILLED."""
    rows, counts = [], qp.CountsFile(str(home / "qwen_proxy.sqlite3"))
    for line in FILLED.split():
        days, *names, outcome, requests, a, b, c, d = line.split("|")
        numbers = [int(each) for each in (outcome, requests, a, b, c, d)]
        bucket, spans = int(time.time()) - int(days) * DAY, (numbers[1] * 500, numbers[1] * 2500)
        rows.append((bucket, "POST /chat/completions", *names, *numbers, *spans))
    counts.add(rows)


USAGE_TABLES = {
    "client --days 1": """
client        requests  tokens in     cached      out  errors  tokens/s
aider                2         50          0        9       0         0
codex_cli_rs     1,207  4,000,000  1,500,000  132,000       7        55
curl                 3          0          0        0       3         0
y                    1         10          0       20       0        10
""",
    "provider --days 200": """
provider    requests  tokens in     cached      out  errors  tokens/s
none               3          0          0        0       3         0
ahead              1         10          0       20       0        10
coding         1,219  4,001,050  1,500,000  132,509       7        55
old                1         10          0       20       0        10
openrouter         1         10          0       20       0        10
""",
}
WINDOW_TABLE = """
provider    window        requests  tokens in     cached      out  errors  tokens/s
coding      last 5 hours     1,209  4,000,050  1,500,000  132,009       7        55
coding      7 days           1,219  4,001,050  1,500,000  132,509       7        55
coding      30 days          1,219  4,001,050  1,500,000  132,509       7        55
openrouter  30 days              1         10          0       20       0        10

"""


@pytest.mark.parametrize("arguments", USAGE_TABLES)
def test_usage_prints_tables(filled, main, arguments):
    said = (USAGE_TABLES[arguments] + WINDOW_TABLE)[1:]
    assert main("usage", "--by", *arguments.split()) == (0, said)


def test_usage_as_json_and_by_day(filled, capsys):
    assert qp.main(["usage", "--json", "--days", "30"]) == 0
    report = json.loads(capsys.readouterr().out)
    today = time.strftime("%Y-%m-%d")
    assert [group["requests"] for group in report["groups"]] == [1, 10, 1212, 1]
    assert report["groups"][2]["day"] == today and report["groups"][2]["reasoning_tokens"] == 40_000
    windows = ["last 5 hours", "7 days", "30 days", "30 days"]
    assert [row["window"] for row in report["windows"]] == windows


@rows("""
made | code | words
nothing | None | 0 | requests
empty | path.write_bytes(b"") | 0 | requests
no database | path.write_bytes(b"x" * 5000) | 1 | cannot be read: file is not a database
foreign | a_database(path, "CREATE TABLE x (y)") | 1 | another program's
a directory | path.mkdir() | 1 | cannot be read
""")
def test_usage_of_what_is_no_file_of_counts(home, capsys, made, code, words):
    value_of(made, path=home / "qwen_proxy.sqlite3")
    before = sorted(os.listdir(str(home)))
    assert qp.main(["usage"]) == int(code) and words in "".join(capsys.readouterr())
    assert sorted(os.listdir(str(home))) == before


@rows("""
options | environ | name
the default | | | home/.qwen/qwen_proxy.sqlite3
named | | QWEN_PROXY_USAGE_FILE="my.sqlite3" | my.sqlite3
unwanted | "--no-usage" | |
the demo | "--demo" | |
""")
def test_where_counts_are_kept_and_the_last_line(login, upstream, tmp_path, options, environ, name):
    with Process("--port", "0", *pieces_of(options), **fields(environ)) as process:
        assert chat(process)[0] == 200
        until(lambda: requests_of(process) == 1)
        assert usage(process)["groups"][0]["requests"] == 1
    last = r"stopped after 1 request, \d+\+\d+ tokens \(0 cached\), 0 errors"
    assert re.match(last, process.lines[-1])
    line = r"^\d{4}-\d\d-\d\d \d\d:\d\d:\d\d I POST /v1/chat"
    assert re.search(line, "".join(process.lines), re.M)
    found = [str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*.sqlite3")]
    assert found == ([name] if name else [])


def test_a_server_of_another_program_writes_no_file(key_server, home):
    assert chat(key_server)[0] == 200
    until(lambda: requests_of(key_server) == 1)
    assert os.listdir(str(home)) == [] and usage(key_server)["file"] is None


def test_names_from_outside_are_bounded_escaped_and_masked(counted, home):
    qp.SECRETS.add("open-sesame-4711")
    server = counted()
    for name in ['a"b\\c\nd', "open-sesame-4711", "x" * 400, "\x1b[31m", *map(str, range(300))]:
        server.ledger.add("POST /completions", ("p", name, name), 200, (1, 0, 0, 0), (0.1, 0.3))
    text = text_at(server, "/metrics")
    models = set(re.findall(r'model="((?:[^"\\]|\\.)*)"', text))
    assert len(models) == qp.Ledger.MOST_NAMES + 1 and "other" in models
    assert max(map(len, models)) <= 100 and r"a\"b\\c\\nd" in models and r"\\x1b[31m" in models
    form = r'# (HELP|TYPE) \w+ .+$|\w+(\{(\w+="([^"\\]|\\.)*",?)+\})? [0-9.e+-]+$'
    assert all(re.match(form, line) for line in text.splitlines())
    server.shutdown(0)
    data = b"".join(each.read_bytes() for each in home.iterdir())
    assert b"open-sesame" not in data and b"sk-good" not in data and b"Hi" not in data


def test_metrics_are_histograms_and_gauges(login, upstream, counted):
    server = counted(None, base_url=None)
    for spans in (0.05, 0.05), (0.1, 0.1), (0.2, 0.2), (400, 400), (None, 3):
        server.ledger.add("POST /completions", ("p", "m", "c"), 200, (1, 0, 0, 0), spans)
    text = text_at(server, "/metrics")
    bucket = r'(?:first_byte|duration)_seconds_bucket{.*le="(?:0.1|0.25|300|\+Inf)"} (\d+)'
    assert [*map(int, re.findall(bucket, text))] == [2, 3, 3, 4, 2, 3, 4, 5]
    assert re.search(r"duration_seconds_sum{.*} 403.35\n", text)
    assert re.search(r"first_byte_seconds_count{.*} 4\n", text)
    assert re.search(r"\nqwen_proxy_in_flight 0\n", text)
    assert re.search(r"\nqwen_proxy_login_expiry_timestamp_seconds \d{10}\n", text)


@pytest.mark.parametrize("path", ["/usage", "/metrics"])
def test_counts_want_the_key_where_there_is_one(counted, path):
    server = counted(None, api_key=["one-key", "two-key"])
    assert ask(server, method="GET", path=path)[0] == 401
    headers = {"Authorization": "Bearer two-key", "User-Agent": "curl/8"}
    assert ask(server, {"messages": HI}, headers=headers)[0] == 200
    until(lambda: server.ledger.since_start()["requests"] == 1)
    status, _, body = ask(server, method="GET", path="/usage?by=client", headers=headers)
    assert status == 200 and json.loads(body)["groups"][0]["client"] == "curl (key 2)"


# ----------------------------------------------------------------------------------------------------
# Page
# ----------------------------------------------------------------------------------------------------

BROWSER = {"Accept": "text/html,application/xhtml+xml,*/*;q=0.8"}
EVIL = "<img src=x onerror=alert(1)>'\"{nonce}<script>alert(2)<&script>"
POLICY = """default-src 'none'; script-src NONCE; style-src NONCE; connect-src 'self'; img-src data:; \
base-uri 'none'; form-action 'none'; frame-ancestors 'none'"""


def page_of(server, path="/"):
    """The page as a browser gets it: its headers and its text."""
    status, headers, body = ask(server, method="GET", path=path, headers=BROWSER)
    assert (status, headers["Content-Type"]) == (200, "text/html; charset=utf-8")
    return headers, body.decode()


def test_the_page_allows_nothing_but_its_own_nonce(key_server):
    nonces = []
    for _ in range(2):
        headers, text = page_of(key_server)
        found = re.findall(r"nonce[-=][\"']?([\w-]+)", headers["Content-Security-Policy"] + text)
        policy = POLICY.replace("NONCE", f"'nonce-{found[0]}'")
        assert headers["Content-Security-Policy"] == policy and found == found[:1] * 4
        nonces.append(found[0])
    assert nonces[0] != nonces[1] and len(nonces[0]) > 20
    expected = ("DENY", "nosniff", "no-referrer", "no-store", "Accept")
    names = "X-Frame-Options X-Content-Type-Options Referrer-Policy Cache-Control Vary".split()
    assert tuple(map(headers.get, names)) == expected
    # No handler in an attribute, no resource, no way for a text to become markup.
    assert re.findall(r'\s(?:src|href|action|style|on\w+)="([^"]*)', qp.PAGE) == ["data:,"]
    # Behind a path prefix, too.
    assert re.findall(r"fetch\(([^,]*)", qp.PAGE) == ["root + path"]
    assert not re.search(r"(inner|outer)HTML|insertAdjacent|document\.write|eval\(", qp.PAGE)
    assert not re.search(r"https?://\w|//\w+\.\w+\.(?!internal)", qp.PAGE)
    assert len(page_of(key_server)[1].encode()) < 30_000


def test_scripts_get_text_and_head_has_no_body(key_server, caplog):
    for accept in ("*/*", "application/json", ""):
        status, headers, body = ask(key_server, method="GET", path="/", headers={"Accept": accept})
        assert (status, headers["Content-Type"]) == (200, "text/plain; charset=utf-8")
        assert b"State: Ready\n" in body and b"<" not in body and b"/status" not in body
    assert ask(key_server, method="HEAD", path="/", headers=BROWSER)[2] == b""
    for path in ("/status", "/usage", "/favicon.ico", "/v1/status", "/health"):
        assert ask(key_server, method="GET", path=path)[0] in (200, 204)
    assert until(lambda: "GET /health 200" in caplog.text)
    assert not re.search("status|usage|favicon", caplog.text)


# The words of the page without JavaScript, its class, and the status; NOTHING is a home without login.
@rows("""
kind | verdict | mood | words
nothing | NOTHING | Not ready | wrong | no Qwen login on this machine
broken | BROKEN | Refused | wrong | refresh token was refused
demo | DEMO | Ready | | the built-in demo
key | KEY | Ready | | qwen3-max
keyed | KEYED | Ready | | one of --api-key
""")
def test_state_and_settings_are_seen_without_javascript(
    home, upstream, serve, request, kind, verdict, mood, words
):
    if kind == "BROKEN":
        write_login(home, upstream, expires_in=-9, refresh_token="dead")
    if kind.startswith("KEY"):
        serve = request.getfixturevalue("keyed")
    options = {"KEY": {"model": "qwen3-max"}, "DEMO": {"demo": True}}
    server = serve(**options.get(kind, {"api_key": ["k-123456"] if kind == "KEYED" else []}))
    chat(server)
    for path in ("/", "/v1", "/v1/"):
        body = page_of(server, path)[1]
        assert f'<section id="state" class="{mood}"' in body and f">{verdict}<" in body
        assert words in body and f"http://127.0.0.1:{server.port}/v1" in body
    text = ask(server, method="GET", path="/")[2].decode()
    assert f"State: {verdict}\n" in text and words in text
    # Who has no key yet learns no more than from /health.
    assert ("qwen3-max" in body, "qwen3-max" in text) == (kind == "KEY",) * 2


@posix
def test_what_comes_from_outside_is_text_and_no_secret_is_told(home, upstream, serve, monkeypatch):
    write_login(home, upstream, name=f"oauth_creds-{EVIL}.json")
    monkeypatch.setenv("DASHSCOPE_API_KEY", "sk-other-key-1")
    provider = f"oauth-{EVIL}"
    server = serve(provider=provider, model="{nonce}" + EVIL, api_key=["k-123456"])
    key = {"Authorization": "Bearer k-123456"}
    upstream.script.append(refusal(EVIL, 400))
    ask(server, {"messages": HI, "model": EVIL}, headers={**key, "User-Agent": "<b>/1"})
    assert ask(server, method="GET", path="/status")[0] == 401
    assert until(lambda: get(server, "/status", **key)[1]["latest"])  # it is noted after the answer
    _, headers, body = ask(server, method="GET", path="/status", headers=key)
    status = json.loads(body)
    assert (headers["Content-Type"], headers["Cache-Control"]) == ("application/json", "no-store")
    assert status["facts"]["Provider"].startswith(provider)
    latest = status["latest"][0]
    assert (latest["client"], latest["model"]) == ("unknown (key 1)", EVIL)
    assert EVIL in latest["remarks"]
    open_server = serve(provider=provider, model=EVIL)
    text = page_of(open_server)[1]
    assert EVIL not in text and html.escape(provider) in text and "{nonce}" in text
    told = text + page_of(server)[1] + body.decode() + json.dumps(get(open_server, "/status"))
    assert [secret for secret in ("at_1", "rt_1", "sk-other", "k-123456") if secret in told] == []


# Headers, and the status of POST /login, GET /status, POST /v1/chat/completions. The port is that of
# the server, which is reached as 127.0.0.1; client 40.
OWN_PAGE = """
Origin: http://127.0.0.1:PORT | 200 200 200
Origin: http://127.0.0.1:PORT; Sec-Fetch-Site: same-origin | 200 200 200
Origin: HTTP://127.0.0.1:PORT | 200 200 200
Accept: */* | 403 200 200
Sec-Fetch-Site: same-origin | 403 200 200
Origin: http://127.0.0.1:PORT; Sec-Fetch-Site: same-site | 403 403 200
Origin: http://127.0.0.1:PORT; Sec-Fetch-Site: cross-site | 403 403 200
Origin: http://localhost:PORT | 403 403 200
Origin: http://127.0.0.1:1 | 403 403 200
Origin: http://127.0.0.1 | 403 403 200
Origin: https://127.0.0.1:PORT | 403 403 200
Origin: http:// | 403 403 403
Origin: null | 403 403 403
Origin: https://evil.example | 403 403 403
Origin: https://evil.example; Content-Type: text/plain | 403 403 403
Origin: https://evil.example; Host: evil.example | 403 403 403
Origin: https://named.example | 403 403 200
Host: desk.example; Origin: http://desk.example | 200 200 200
Host: desk.example:80; Origin: http://desk.example | 403 403 403
Host: desk.example; Origin: http://desk.example:8080 | 403 403 403
Host: desk.example; Origin: https://desk.example | 403 403 403
Host: desk.example; Origin: https://desk.example; X-Forwarded-Proto: https | 200 200 200
Host: desk.example; Origin: http://desk.example; X-Forwarded-Proto: https | 403 403 403
Host: localhost; Origin: http://desk.example | 403 403 403
Origin: http://127.0.0.1:PORT; Content-Type: text/plain | 415 200 415
Origin: http://localhost:3000 | 403 403 200
Origin: http://localhost:3000; Content-Type: text/plain | 415 403 415
Origin: http://localhost.evil.example | 403 403 403
Origin: vscode-webview://abc | 403 403 200
Origin: vscode-file://vscode-app | 403 403 200
Origin: file:// | 403 403 200
Sec-Fetch-Site: cross-site | 403 403 403
Sec-Fetch-Site: cross-site; Sec-Fetch-Mode: no-cors | 403 403 403
Sec-Fetch-Site: cross-site; Sec-Fetch-Mode: navigate | 403 200 403
Sec-Fetch-Site: cross-site; Sec-Fetch-Mode: cors; Content-Type: text/plain | 403 200 403
Sec-Fetch-Site: cross-site; Sec-Fetch-Mode: cors | 403 200 200
Sec-Fetch-Site: cross-site; Sec-Fetch-Mode: websocket | 403 403 403
Content-Type: application/x-www-form-urlencoded | 403 200 200
Authorization: Bearer  | 403 200 200
"""


def test_only_the_page_itself_may_log_in_and_no_other_site_spends_the_quota(
    keyed, upstream, monkeypatch
):
    started, options = [], {"allow_host": ["desk.example"]}
    monkeypatch.setattr(qp.DeviceLogin, "start", lambda *both: started.append(both) or {})
    server = keyed(allow_origin=["https://named.example/", "file://"], **options)
    for line in OWN_PAGE.strip().replace("PORT", str(server.port)).splitlines():
        stated, expected = line.split(" | ")
        headers = dict(header.split(": ") for header in stated.split("; "))
        del started[:], upstream.requests[:]
        got = [ask(server, {}, "POST", "/login", headers)[0]]
        got += [ask(server, None, "GET", "/status", headers)[0]]
        status, answered, _ = ask(server, {"messages": HI}, headers=headers)
        assert [*got, status] == [int(status) for status in expected.split()], line
        assert (len(started), len(upstream.bodies())) == (got[0] == 200, status == 200), line
        origin = headers.get("Origin") if status != 403 else None
        assert answered["Access-Control-Allow-Origin"] == origin, line
    own = {"Origin": f"http://127.0.0.1:{server.port}"}
    for method in ("GET", "HEAD", "PUT"):
        assert ask(server, {}, method, "/login", own)[0] == 405
    del started[:]
    server = keyed(api_key=["k-123456"], **options)
    own = {"Origin": f"http://127.0.0.1:{server.port}"}
    assert ask(server, {}, "POST", "/login", own)[0] == 401 and not started
    assert ask(server, {}, "POST", "/login", {**own, "X-API-Key": "k-123456"})[0] == 200 and started


# What the identity host answers, and how the log-in ends.
@rows("""
answers | phase | words
approved | [PENDING, SUCCESS] | done | oauth_creds.json holds the login
refused | [DENIED] | failed | refused in the browser
expired | [reply(400, {"error": "expired_token"})] | failed | code has expired
no answer | None | failed | device authorization endpoint
no write | [SUCCESS] | failed | cannot be written
stopped | [] | failed |
""")
def test_the_page_logs_in_to_the_end(home, upstream, serve, monkeypatch, answers, phase, words):
    answers, seen = value_of(answers), threading.Event()
    monkeypatch.setattr(qp.DeviceAuthorization, "FIRST_INTERVAL", 0.01 if answers else WAIT)
    monkeypatch.setattr(qp.Providers, "INTERVAL", 0)
    for answer in answers or []:
        upstream.token_script.append(lambda form, answer=answer: seen.wait(WAIT) and answer)
    if answers is None:
        upstream.device_answer = lambda form: reply(500, b"<html>no")
    if words == "cannot be written":
        monkeypatch.setattr(qp.OAuthCredentials, "save", lambda it, _: vars(it).update(problem="x"))
    server = serve()
    own = {"Origin": f"http://127.0.0.1:{server.port}"}

    def device():
        return server.status()["device"]

    assert json.loads(ask(server, {}, "POST", "/login", own)[2]) == {"phase": "starting"}
    assert ask(server, {}, "POST", "/login", own)[0] == 200
    if answers is not None:
        assert until(lambda: device()["phase"] == "waiting")
        waiting = get(server, "/status", **own)[1]["device"]
        assert waiting["code"] == "ABCD-EFGH" and waiting["expires_at"] > time.time() + 800
        assert waiting["address"].startswith(upstream.origin + "/authorize?")
    seen.set()
    if answers == []:
        server.shutdown(grace=0)
    assert until(lambda: device()["phase"] == phase)
    assert words in device()["message"] and "at_9" not in str(device())
    paths = [path for path, _, _ in upstream.requests]
    assert answers is None or paths.count("/api/v1/oauth2/device/code") == 1
    assert (home / "oauth_creds.json").exists() == (phase == "done")
    assert phase != "done" or until(lambda: server.status()["status"] == "ok")


def test_the_page_shows_running_and_latest_requests_and_no_text_of_them(key_server, upstream):
    go, agent = threading.Event(), {"User-Agent": "codex_cli_rs/0.5 (Linux)"}
    upstream.script.extend([stream(*HELLO[:2], go, *HELLO[2:]), refusal("Odd <b>.", 400)])
    body = {"messages": [{"role": "user", "content": "QUESTION"}], "stream": True}
    client = threading.Thread(target=ask, args=(key_server, body), kwargs={"headers": agent})
    client.start()

    def running():
        return get(key_server, "/status")[1]["running"]

    assert until(lambda: running() and running()[0]["first"] is not None)
    row = running()[0]
    assert (row["client"], row["model"], row["status"]) == ("codex_cli_rs", "qwen3-max", None)
    go.set()
    client.join(WAIT)
    ask(key_server, {"messages": HI, "model": "x"}, headers=agent)
    for _ in range(3):
        get(key_server, "/v1/models")
    assert until(lambda: len(get(key_server, "/status")[1]["latest"]) == 2)
    status = get(key_server, "/status")[1]
    failed, done = status["latest"]
    assert (failed["status"], failed["model"], failed["remarks"]) == (400, "x", "Odd <b>.")
    assert (done["status"], done["output_tokens"], done["remarks"]) == (200, 3, "")
    assert status["running"] == [] and not re.search("QUESTION|Hel|lo, ", json.dumps(status))
    for _ in range(25):
        chat(key_server)
    assert len(key_server.status()["latest"]) == 20


BROWSERS = ("chromium", "chromium-browser", "google-chrome")
CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)


class Browser:
    """A headless Chromium, by the DevTools protocol over pipes; with its faults and requests."""

    def __init__(self, folder):
        (read, self.to), (self.back, write) = os.pipe(), os.pipe()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-pipe"]
        options += ["--disable-background-networking", "--disable-component-update"]
        options += ["--no-first-run", f"--user-data-dir={folder}", "about:blank"]
        # It reads from descriptor 3 and writes to 4.
        command = ["bash", "-c", f'exec "$0" "$@" 3<&{read} 4>&{write}', CHROMIUM, *options]
        quiet = dict.fromkeys(("stdout", "stderr"), subprocess.DEVNULL)
        self.process = subprocess.Popen(command, pass_fds=(read, write), **quiet)
        os.close(read)
        os.close(write)
        self.rest, self.number, self.more, self.faults, self.hosts = b"", 0, {}, [], set()
        targets = self.call("Target.getTargets")["targetInfos"]
        page = next(target["targetId"] for target in targets if target["type"] == "page")
        session = self.call("Target.attachToTarget", targetId=page, flatten=True)["sessionId"]
        self.more = {"sessionId": session}
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(domain + ".enable")
        self.call("Emulation.setFocusEmulationEnabled", enabled=True)

    def call(self, method, **params):
        self.number += 1
        command = {"id": self.number, "method": method, "params": params, **self.more}
        os.write(self.to, json.dumps(command).encode() + b"\0")
        while True:
            while b"\0" not in self.rest:
                assert select.select([self.back], [], [], WAIT)[0], method
                piece = os.read(self.back, 1 << 20)
                assert piece, "Chromium ended"
                self.rest += piece
            line, _, self.rest = self.rest.partition(b"\0")
            message = json.loads(line)
            if message.get("id") == self.number:
                return message["result"]
            if re.match("Runtime.(exception|console)|Log|Page.javascriptDialog", message["method"]):
                self.faults.append(message["params"])
            if message["method"] == "Network.requestWillBeSent":
                self.hosts.add(urllib.parse.urlsplit(message["params"]["request"]["url"]).netloc)

    def run(self, script):
        script = re.sub(r"#([\w-]+)", r"document.getElementById('\1')", script)
        options = {"returnByValue": True, "userGesture": True}
        return self.call("Runtime.evaluate", expression=script, **options)["result"].get("value")

    def until(self, script):
        assert until(lambda: self.run(script)), (script, self.run("document.body.innerText"))

    def close(self):
        self.process.terminate()
        self.process.wait(WAIT)
        os.close(self.to)
        os.close(self.back)


@pytest.mark.skipif(not CHROMIUM, reason="needs Chromium: apt install chromium")
def test_the_page_in_chromium(home, upstream, serve, monkeypatch, tmp_path):
    monkeypatch.setattr(qp.DeviceAuthorization, "FIRST_INTERVAL", 0.01)
    approved, go = threading.Event(), threading.Event()
    login = {**json.loads(SUCCESS.pieces[0]), "resource_url": upstream.origin}
    upstream.token_script.append(lambda form: approved.wait(WAIT) and reply(200, login))
    upstream.access_tokens.add("at_9")
    upstream.script.extend([stream(*HELLO[:2], go, *HELLO[2:]), refusal(EVIL, 400)])
    server = serve()
    with contextlib.closing(Browser(tmp_path / "profile")) as browser:
        browser.call("Page.navigate", url=f"http://127.0.0.1:{server.port}/v1/")
        browser.until("document.body?.className === '' && #verdict.textContent === 'Not ready'")
        assert browser.run("#base.value") == f"http://127.0.0.1:{server.port}/v1"
        browser.run("#login-start.click()")
        browser.until("#code.textContent === 'ABCD-EFGH' && #link.href.includes('/authorize?')")
        approved.set()
        browser.until("#verdict.textContent === 'Ready' && /^Logged/.test(#login-text.textContent)")
        browser.run("#send.click()")
        browser.until("#answer.textContent === 'Hel' && /running/.test(#activity.textContent)")
        go.set()
        browser.until("#answer.textContent === 'Hello, wörld'")
        browser.until("/^First/.test(#outcome.textContent)")
        browser.until("/coder-model1/.test(#usage.textContent.replace(/\\s/g, ''))")
        browser.run("#base.nextSibling.click()")
        browser.until("#base.nextSibling.textContent === 'Copied'")
        assert browser.faults == []
        browser.run("#send.click()")
        browser.until("#outcome.textContent.includes('<script>')")
        browser.until("#activity.textContent.includes('<img src=x')")
        assert browser.run("document.querySelectorAll('img, main script').length") == 0
    assert browser.hosts - {""} == {f"127.0.0.1:{server.port}"}


# ----------------------------------------------------------------------------------------------------
# Server
# ----------------------------------------------------------------------------------------------------


def test_client_that_leaves_while_the_lock_is_held_is_let_go(home, upstream, stale, serve):
    server, lock = serve(), locked(home)
    with send(server):
        until(lambda: server.health()["in_flight"] == 1)
    until(lambda: server.health()["in_flight"] == 0)
    assert upstream.refreshes == [] and lock.read_text() == "somebody"


# More than the buffers of all sockets on the way.
LONG = [*texts(*["x" * 65_000] * 120), *END]


@pytest.fixture()
def slow_client(key_server, upstream):
    """A client of a long answer that has taken only what came at once."""
    upstream.script.append(stream(*LONG))
    with socket.socket() as client:
        client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        client.connect(("127.0.0.1", key_server.port))
        client.sendall(post(stream=True))
        until(lambda: unsent(key_server))
        client.settimeout(WAIT)
        yield client


def unsent(server):
    """What clients did not take yet."""
    return max((len(exchange.unsent) for exchange in list(server.exchanges)), default=0)


def test_a_client_that_does_not_keep_up_gets_all_and_holds_up_no_other(key_server, slow_client):
    chunks = map(json.loads, chat(key_server, stream=True)[2][:-1])
    assert text_in(chunks) == "Hello, wörld"
    assert unsent(key_server) < 1_000_000
    answer = http.client.HTTPResponse(slow_client)
    answer.begin()
    body = answer.read()
    assert body.count(b"x" * 65_000) == 120 and body.endswith(DONE)


def test_a_client_that_takes_nothing_is_left(key_server, upstream, slow_client, monkeypatch):
    monkeypatch.setattr(qp.Exchange, "WRITE_TIMEOUT", 0.05)
    until(lambda: not key_server.exchanges)
    assert chat(key_server)[0] == 200


def test_a_fault_in_one_stream_ends_no_other(key_server, upstream, monkeypatch):
    translate, gates = qp.ChatDecoder._feed_event, [threading.Event(), threading.Event()]

    def feed(self, event):
        return translate(self, event if b"fault" not in event.data else None)

    monkeypatch.setattr(qp.ChatDecoder, "_feed_event", feed)
    upstream.script.append(stream(HELLO[0], gates[0], *texts("fault"), *END))
    upstream.script.append(stream(HELLO[0], gates[1], *HELLO[1:]))
    streams = [lines_of(key_server, CHAT, {"messages": HI}) for _ in gates]
    assert all(next(lines).startswith(b"data: ") for lines in streams)
    for gate in gates:
        gate.set()
    broken, whole = map(b"".join, streams)
    assert b"an internal error of qwen_proxy" in broken and DONE not in broken
    assert whole.endswith(DONE)


def test_a_fault_of_the_loop_does_not_end_it(key_server, upstream, monkeypatch):
    turn, faults = qp.StreamLoop._turn, [OSError("no more")]

    def fail_once(self):
        if faults and self._streams:
            raise faults.pop()
        turn(self)

    monkeypatch.setattr(qp.StreamLoop, "_turn", fail_once)
    upstream.script.append(stream(HELLO[0], threading.Event()))
    assert b"internal error" in b"".join(lines_of(key_server, CHAT, {"messages": HI}))
    go = threading.Event()
    upstream.script.append(stream(HELLO[0], go, *HELLO[1:]))
    lines = lines_of(key_server, CHAT, {"messages": HI})
    assert next(lines) and not go.set() and b"".join(lines).endswith(DONE)


def test_a_full_piece_and_then_silence_costs_nothing(quick, upstream, monkeypatch):
    turns, turn, go = [], qp.StreamLoop._turn, threading.Event()
    monkeypatch.setattr(qp.StreamLoop, "_turn", lambda self: (turns.append(1), turn(self)))
    (full,) = texts("x" * 20_000)
    # As much as is read at once, in one chunk.
    full = full[: qp.PIECE - 8], full[qp.PIECE - 8 :]
    upstream.script.append(stream(HELLO[0], full[0], go, full[1], *END))
    lines = comments_until(quick, go, 5)
    assert b"x" * 20_000 in b"".join(lines) and len(turns) < 100


def test_an_error_behind_a_long_event_waits_for_nothing(key_server, upstream):
    upstream.script.append(stream(*texts("x" * 300_000), NATIVE % FREE, threading.Event()))
    *_, last = chat(key_server, stream=True)[2]
    assert json.loads(last)["error"]["code"] == "insufficient_quota" and upstream.gone.wait(WAIT)


def test_a_stream_that_comes_after_the_end_of_the_loop_ends(monkeypatch):
    monkeypatch.setattr(qp.StreamLoop, "_run", lambda self: None)
    loop = qp.StreamLoop()
    loop.close()
    with pytest.raises(qp.ShuttingDown):
        loop.carry(qp.Stream(types.SimpleNamespace(waiter=None), types.SimpleNamespace()))


@pytest.mark.parametrize("before", [[], [HELLO[0]]], ids=["before the answer", "in it"])
def test_silence_is_filled_with_comments(quick, upstream, before):  # client 15
    go = threading.Event()
    upstream.script.append(stream(*before, go, *HELLO[len(before) :]))
    lines = [line for line in comments_until(quick, go, 3) if line.strip()]
    assert all(re.match(rb": keep-alive\n|data: [{[]", line) for line in lines)
    assert lines.count(b": keep-alive\n") >= 3 and lines[-1] + b"\n" == DONE
    assert before or lines[:3] == [b": keep-alive\n"] * 3


def test_error_after_a_comment_is_an_error_event(quick, upstream):
    late, go = json.dumps({"error": {"message": "late refusal", "code": "x"}}), threading.Event()
    upstream.script.append(Reply(400, [("Transfer-Encoding", "chunked")], [go, late.encode()]))
    *_, last, empty = comments_until(quick, go, 1)
    assert json.loads(last[len("data: ") :])["error"]["message"] == "late refusal"
    assert last + empty != DONE


def test_models_health_root(login, upstream, serve):
    server, key = serve(api_key=["k-123456"]), {"Authorization": "Bearer k-123456"}
    models = get(server, "/v1/models", **key)[1]["data"]
    owned = {"id": "coder-model", "object": "model", "owned_by": "oauth"}
    assert len(models) == 1 and owned.items() <= models[0].items()
    assert get(server, "/models/coder%2Dmodel", **key)[0] == 200
    health = get(server, "/health")[1]
    assert (health["status"], health["login"]["type"]) == ("ok", "oauth")
    assert "path" not in health["login"]
    assert b"/v1/chat/completions" in ask(server, method="GET", path="/")[2]


# Method, path, status, and what the body says; client 3.
PATHS = """
POST /v1/chat/completions/ 200 | POST //chat/completions 200 | POST /v1//chat/completions 200
POST /chat/completions/ 200 | POST /v1/chat/completions?beta=true 200
GET /v1/nothing 404 /v1/chat/completions | POST /v1/batches 404 /v1/embeddings
POST /v1/files 404 /v1/embeddings | POST /v1/audio/speech 404 /v1/embeddings
POST /v1/images/generations 404 /v1/embeddings | GET /v1/chat/completions 405 POST
GET /v1/responses//input_items 404
GET /usage?by=color 400 | GET /usage?days=0 400 | GET /usage?days=x 400
GET /v1/responses/resp_1 404 response_not_found | DELETE /v1/responses/resp_1 404 response_not_found
"""


def test_paths(key_server):
    for line in re.split(r" \| |\n", PATHS.strip()):
        method, path, status, *words = line.split()
        got, _, body = ask(key_server, {"messages": HI} if method == "POST" else None, method, path)
        assert got == int(status) and all(word in body.decode() for word in words), line
        assert "error" in json.loads(body) or got == 200


# The keys of a server, headers of a client, and the status.
KEYS = """
Authorization: Bearer k-1 | 200
X-API-Key: k-2 | 200
api-key: k-1 | 200
Authorization: bearer k-2 | 200
 | 401
Authorization: Bearer | 401
Authorization: Bearer k | 401
Authorization: Bearer k- | 401
Authorization: k-1 | 401
X-API-Key: k-11 | 401
Authorization: Bearer ü | 401
"""


@pytest.mark.parametrize("keys", [["k-1", "k-2"], "k-1", ["\u00a0k-1 "]], ids=ascii)
def test_keys_open_the_door_and_others_do_not(serve, login, keys):  # H1
    server = serve(api_key=keys)
    for line in KEYS.strip("\n").splitlines():
        headers, status = line.split(" | ")
        status = 401 if "k-2" in headers and "k-2" not in keys else int(status)
        head = b"GET /v1/models HTTP/1.1\r\nConnection: close\r\nHost: localhost\r\n"
        received = raw(server, head + headers.encode("latin-1") + b"\r\n" * (2 if headers else 1))
        assert statuses(received) == [status], line
        assert status == 200 or b'"invalid_api_key"' in received


HOSTS = """localhost|127.0.0.1:1|[::1]:8080|app.localhost|host.docker.internal:8080|friend.example\
|Qwen-Proxy:8080|other.example.|[2001:DB8::1]:8080
evil.example|127.0.0.1.evil.example|1.2.3.4|a b||x.other.example"""


def test_host_must_name_this_machine(serve, login):
    allowed = "friend.example qwen-proxy:8080 https://Other.Example.:1/v1 [2001:db8:0::1]"
    server = serve(allow_host=allowed.split())  # O10
    for hosts, status in zip(HOSTS.split("\n"), (200, 403)):
        for host in hosts.split("|"):
            assert get(server, "/health", Host=host)[0] == status, host


def test_preflight_is_for_allowed_origins_only(key_server):
    wanted = {"Access-Control-Request-Headers": "authorization, x-stainless-new"}
    wanted["Access-Control-Request-Method"] = "POST"
    ours, theirs = {"Origin": "http://localhost:1"}, {"Origin": "https://evil.example"}
    status, headers, body = ask(key_server, method="OPTIONS", headers={**ours, **wanted})
    assert (status, body, headers["Access-Control-Allow-Credentials"]) == (204, b"", None)
    assert headers["Access-Control-Allow-Headers"] == "authorization, x-stainless-new"
    assert ask(key_server, method="OPTIONS", headers={**theirs, **wanted})[0] == 403


# Requests that cannot be served: the path, the body, and words of the answer.
@rows(r"""
path | body | words
empty | chat | b"" |
no JSON, client 36 | chat | b"{" |
a string, client 36 | chat | b'"x"' |
a list, client 36 | chat | b"[]" |
a number, client 36 | chat | b"1" |
null, client 36 | chat | b"null" |
NaN | chat | b'{"messages": NaN}' |
infinity | chat | b'{"messages": -Infinity}' |
depth | chat | b'{"messages":' + b"[" * 100_000 + b"]" * 100_000 + b"}" |
digits | chat | b'{"messages": [{"role":"user","content":"x"}], "n": ' + b"9" * 100_000 + b"}" |
UTF-8 | chat | b'{"messages": "\xff"}' |
twice | chat | b'{"messages": [], "messages": []}' |
overflow | chat | b'{"messages": [{"role":"user","content":"x"}], "x": 1e999}' |
no messages | chat | {} |
messages null | chat | {"messages": None} |
messages empty | chat | {"messages": []} |
a message that is a string | chat | {"messages": ["x"]} |
no role | chat | {"messages": [{}]} |
content | chat | {"messages": [user({})]} |
model | chat | {"messages": HI, "model": 5} | model
a model of megabytes | chat | {"messages": HI, "model": "m" * 1000} | model
stream | chat | {"messages": HI, "stream": "perhaps"} |
tools | chat | {"messages": HI, "tools": {}} |
tools in extra_body | chat | {"messages": HI, "extra_body": {"tools": 5}} |
orphans alone | chat | {"messages": [result("c", "x")], "response_format": JSON_OBJECT} | only tool results
prompt | text | {"prompt": 5} | prompt
no model | embeddings | {"input": "x"} | model must be named
no input | embeddings | {"model": "m"} | input must be
empty input | embeddings | {"model": "m", "input": []} | input must be
tokens | embeddings | {"model": "m", "input": [1, 2]} | token array
arrays of tokens, client 34 | embeddings | {"model": "m", "input": [[1, 2, 3]]} | check_embedding_ctx_length=False
an empty text | embeddings | {"model": "m", "input": ["a", ""]} | input[1]
a null | embeddings | {"model": "m", "input": ["a", None]} | input[1]
too many texts | embeddings | {"model": "m", "input": ["a"] * 2049} | 2048
format | embeddings | {"model": "m", "input": "a", "encoding_format": "int8"} | float or base64
a list for embeddings | embeddings | [] | JSON object
a response before | responses | {"input": "Hi", "previous_response_id": "resp_1"} | forgets them when it restarts
a conversation | responses | {"input": "Hi", "conversation": "conv_1"} | conversation is not
in the background | responses | {"input": "Hi", "background": True} | background
input null | responses | {"input": None} | input must be
input empty | responses | {"input": []} | at least one item
thoughts that are forgotten alone | responses | {"input": [{"type": "item_reference", "id": "rs_1"}]} |
an unknown item | responses | {"input": [{"type": "item_reference", "id": "x"}]} | item_reference
an id that is an object | responses | {"input": [{"type": "item_reference", "id": {"a": 1}}]} | item_reference
a kind of item | responses | {"input": [{"type": "computer_call"}]} | computer_call
a kind that is a list | responses | {"input": [{"type": ["x"]}]} | type
an item that is a number | responses | {"input": [5]} | input[0]
a role | responses | {"input": [{"role": "robot", "content": "x"}]} | robot
a file | responses | {"input": [user([{"type": "input_file", "file_id": "f"}])]} | input_file
content of an item | responses | {"input": [user(5)]} | content
a picture for a text model, oh-my-pi #1859 | chat | {"model": "qwen3.7-max", "messages": [*HI, LOOK[0]]} | messages[1] holds an image
the same, of a Response | responses | {"model": "qwen3.7-max", **as_response([*HI, LOOK[0]])} | messages[1] holds an image
a PDF, qwen-code #1888 | chat | {"model": "qwen3.7-plus", "messages": [user([{"type": "file", "file": {"file_data": "x"}}])]} | messages[0] holds a file
a response before, chat | chat | {"input": "Hi", "previous_response_id": "resp_1"} | Previous response with id 'resp_1' not found.; previous_response_not_found previous_response_id
a response before, streamed | responses | {"input": "Hi", "previous_response_id": "é", "stream": True} | Previous response with id 'é' not found.
""")
def test_bad_requests_are_refused_with_a_word(key_server, upstream, path, body, words):
    status, _, answer = ask(key_server, value_of(body), path=ENDPOINTS[path])
    error = json.loads(answer)["error"]
    assert (status, error["type"]) == (400, "invalid_request_error") and "report" not in str(error)
    said = "{message} {code} {param}".format(**error)
    assert all(text in said for text in words.split("; ")) and upstream.requests == []


@pytest.mark.parametrize("asked", ["QWEN3-MAX", "Qwen3-Max", "qwen/Qwen3-Max"])
def test_client_02_a_model_is_found_by_its_encoded_id_in_any_case(key_server, upstream, asked):
    upstream.models = [asked.lower(), "MiniMax-M2.5"]
    status, found = get(key_server, "/v1/models/" + urllib.parse.quote(asked, ""))
    assert status == 200 and found["id"].lower() == asked.lower()
    for route, request in ASKED.items():
        ask(key_server, {**request, "model": asked}, path=ENDPOINTS[route])
    sent = [json.loads(body)["model"] for _, _, body in upstream.requests if body]
    assert sent == [asked.lower()] * 3


def test_plans_without_an_endpoint_say_so(login, upstream, serve):
    server = serve()
    assert complete(server)[1]["error"]["code"] == "unsupported_endpoint"
    assert embed(server, "x")[1]["error"]["code"] == "unsupported_endpoint"
    assert upstream.requests == []


POST_GZIP = post(gzip.compress(BODY), b"Content-Encoding: gzip\r\n")
GET_HEALTH = b"GET /health HTTP/1.1\r\n"
BODY_CHUNKS = b"%x\r\n%s\r\n0\r\n\r\n" % (len(BODY), BODY)


# What a client sends, and the statuses that it gets: RFC 9112, what clients do, what attackers try.
@rows(r"""
request_ | expected
two lengths | POST + b"Content-Length: 2\r\nContent-Length: 2\r\n\r\n{}" | 400
length and chunked | POST + b"Content-Length: 2\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n" | 400
length with sign | POST + b"Content-Length: +2\r\n\r\n{}" | 400
length with underscore | POST + b"Content-Length: 1_0\r\n\r\n" | 400
length with space | POST + b"Content-Length: 1 0\r\n\r\n" | 400
length negative | POST + b"Content-Length: -1\r\n\r\n" | 400
length too large | POST + b"Content-Length: 99999999999\r\n\r\n" | 413
chunk size | POST + CHUNKS + b"xyz\r\n0\r\n\r\n" + HEALTH | 400
chunk without its end, RFC 9112 9.2 | POST + CHUNKS + b"2\r\n{}0\r\n\r\n0\r\n\r\n" + HEALTH | 400
chunk extension with NUL | POST + CHUNKS + b"2;\0\r\n{}\r\n0\r\n\r\n" | 400
chunk extensions without end | POST + CHUNKS + (b"1;" + b"a" * 9000 + b"\r\n \r\n") * 9 | 400
chunk trailer with a blank | POST + CHUNKS + b"0\r\nX : y\r\n\r\n" | 400
chunk trailers without end | POST + CHUNKS + b"0\r\n" + (b"X: " + b"y" * 9000 + b"\r\n") * 9 | 431
chunk extension, RFC 9112 7.1.1 | POST + CHUNKS + BODY_CHUNKS.replace(b"\r\n", b";a=b\r\n", 1) + HEALTH | 200 200
chunk extensions | POST + CHUNKS + BODY_CHUNKS.replace(b"\r\n", b' ; a="b;c" ;d\r\n', 1) + HEALTH | 200 200
trailers, RFC 9112 7.1.2 | POST + CHUNKS + BODY_CHUNKS[:-2] + b"X-Sum: 1\r\nHost: evil\r\n\r\n" + HEALTH | 200 200
other coding | POST + b"Transfer-Encoding: gzip, chunked\r\n\r\n0\r\n\r\n" | 400
folded header | POST + b"X: a\r\n b\r\n\r\n" | 400
space before colon | POST + b"X : a\r\n\r\n" | 400
NUL | POST + b"X: a\0b\r\n\r\n" | 400
bare CR | POST + b"X: a\rb\r\n\r\n" | 400
bare LF | POST + b"X: a\n\r\n" | 400
no Host | GET_HEALTH + b"Connection: close\r\n\r\n" | 400
two Hosts | GET_HEALTH + b"Host: localhost\r\nHost: evil\r\n\r\n" | 400
too many headers | POST + b"".join(b"X-%d: a\r\n" % n for n in range(200)) + b"\r\n" | 431
long headers | POST + b"".join(b"X-%d: %s\r\n" % (n, b"a" * 60_000) for n in range(20)) + b"\r\n" | 431
long header | POST + b"X: " + b"a" * 100_000 + b"\r\n\r\n" | 431
long request line | b"GET /" + b"a" * 100_000 + b" HTTP/1.1\r\nHost: localhost\r\n\r\n" | 414
HTTP/2 | b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n" | 505
HTTP/0.9 | b"GET /\r\n\r\n" | 400
no HTTP | b"\x15\x03\x01\x00\r\n\r\n" | 400
TLS | b"\x16\x03\x01\x00\r\n\r\n" | 400
absolute, RFC 9112 3.2.2 | HEALTH.replace(b"/health", b"HTTP://localhost:1/v1/models") | 200
absolute, its host counts | HEALTH.replace(b"/health", b"http://evil/v1/models") | 403
absolute, another Host | b"GET http://127.0.0.1//v1/models?x HTTP/1.1\r\nHost: evil\r\n" b"Connection: close\r\n\r\n" | 200
absolute, HTTP/1.0 | b"GET https://localhost HTTP/1.0\r\n\r\n" | 200
absolute, no Host | b"GET http://localhost/v1/models HTTP/1.1\r\nConnection: close\r\n\r\n" | 400
absolute, user | HEALTH.replace(b"/health", b"http://u@localhost/health") | 400
another scheme | HEALTH.replace(b"/health", b"ftp://localhost/health") | 400
dots | HEALTH.replace(b"/health", b"/v1/%2e%2e/x") | 404
unknown path | HEALTH.replace(b"/health", b"/x") | 404
the server as a whole, RFC 9112 3.2.4 | b"OPTIONS * HTTP/1.1\r\nHost: localhost\r\n\r\n" + HEALTH | 204 200
the same, to read | HEALTH.replace(b"/health", b"*") | 404
no path | HEALTH.replace(b"/health", b"health") | 400
wrong method | HEALTH.replace(b"/health", b"/v1/chat/completions") | 405
zstd | post(b"{}", b"Content-Encoding: zstd\r\nConnection: close\r\n") | 415
no gzip | post(b"{}", b"Content-Encoding: gzip\r\nConnection: close\r\n") | 400
in chunks, client 36 | POST + CHUNKS + BODY_CHUNKS + HEALTH | 200 200
gzip, client 36 | POST_GZIP + HEALTH | 200 200
expects a word, client 36 | post(head=b"Expect: 100-continue\r\nUpgrade: h2c\r\n") + HEALTH | 100 200 200
HTTP/2 by upgrade, client 36 | post(head=b"Upgrade: h2c\r\nConnection: Upgrade, HTTP2-Settings\r\nHTTP2-Settings: A\r\n") + HEALTH | 200 200
a form, client 36 | post(head=b"Content-Type: application/x-www-form-urlencoded\r\n") + HEALTH | 200 200
an error, then another, client 36 | post(b"[]") + post(b"{}") + POST_GZIP + post() + HEALTH | 400 400 200 200 200
half a surrogate pair | post(b'{"messages": [{"role":"user","content":"cut \\ud83d"}]}') + HEALTH | 200 200
a WebSocket, client 36 | WEBSOCKET + b"Connection: Upgrade\r\nUpgrade: websocket\r\n\r\n" + WEBSOCKET + b"\r\n" + HEALTH | 426 405 200
""")
def test_wire(key_server, upstream, request_, expected):
    received = raw(key_server, value_of(request_))
    assert statuses(received) == [int(status) for status in expected.split()], received[:200]
    if "200" in expected:
        assert re.search(rb"\r\nDate: \w{3}, \d\d \w{3} \d{4} \d\d:\d\d:\d\d GMT\r\n", received)
    else:
        assert b'{"error"' in received and upstream.requests == []
    assert get(key_server, "/health")[0] == 200


@pytest.mark.parametrize("host", ["::", "[::]", "0:0::0", "[::1]", "::1", "localhost"])
def test_addresses_of_ipv6_are_listened_on(serve, login, host):  # O10
    server, request = serve(host=host, api_key="good-key"), HEALTH.replace(b"localhost", b"[::1]")
    for family in [socket.AF_INET6, *([] if "1" in host else [socket.AF_INET])]:
        assert statuses(raw(server, request, family)) == [200]


# The keys of the server, the header of the client, and what is said of the host.
@rows("""
keys | header | status | words
the only key | good-key | Authorization: Bearer good-key | 200 |
one of two | k-1 good-key | X-API-Key: good-key | 200 |
another | good-key | Authorization: Bearer bad-key | 403 | --allow-host qwen-proxy, or
where there is none | | Authorization: Bearer good-key | 403 | --allow-host qwen-proxy
""")
def test_a_right_key_needs_no_known_host(serve, login, keys, header, status, words):  # O13
    server = serve(api_key=keys.split())
    headers = dict([header.split(": ")], Host="qwen-proxy:8080")
    got, body = get(server, "/v1/models", **headers)
    assert got == int(status) and words in json.dumps(body)
    assert get(server, "/v1/models", **headers, Origin="http://x.y")[0] == 403


@pytest.mark.parametrize(
    "end", [[CUT], [chunk(error={"message": "Model service overloaded."}, choices=None)]]
)
def test_the_connection_lives_on_after_an_error_in_mid_stream(key_server, upstream, end):
    upstream.script.append(stream(*HELLO[:2], *end))
    received = raw(key_server, post(stream=True) + HEALTH)
    assert statuses(received) == [200, 200] and received.count(b'data: {"error"') == 1


def test_many_clients_at_once_share_connections(key_server, upstream):
    work = [lambda is_stream=n % 2 > 0: chat(key_server, is_stream)[0] for n in range(80)]
    assert at_once(*[lambda: [each() for each in work[:10]]] * 8) == [[200] * 10] * 8
    assert upstream.connections <= 16


LINES = {"blanks": b"X: a%sa", "blanks and an end": b"X:%s\0", "a name": b"X%s"}
LINES["tabs"] = b"X:\t%s\0"


@pytest.mark.parametrize("name", LINES)
def test_no_header_takes_the_square_of_its_length(key_server, name):
    def work(size):  # four lines, since all of them together have a limit
        line = LINES[name] % ((b"X" if name == "a name" else b" \t") * size)[:size] + b"\r\n"
        end = b"Connection: close\r\nContent-Length: 2\r\n\r\n{}"
        assert raw(key_server, POST + line * 4 + end).startswith(b"HTTP/1.1 4")

    check_linear(work, 7_500, 8, time.process_time, 0.002)


def test_connections_above_the_limit_do_not_hold_the_others_up(keyed):
    server = keyed(max_connections=2)
    request = b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n"
    with contextlib.ExitStack() as stack:

        def connect():
            client = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT / 2)
            return stack.enter_context(client)

        for taken in [connect(), connect()]:
            taken.sendall(request)
            assert taken.recv(9) == b"HTTP/1.1 "
        silent = [connect() for _ in range(20)]
        with contextlib.suppress(ConnectionResetError):
            assert silent[-1].recv(100) == b""  # closed, while the first ones wait to be told
        silent[0].sendall(request)
        received = silent[0].makefile("rb").read()
        assert received.startswith(b"HTTP/1.1 503 ") and b"Retry-After" in received


def test_no_line_of_the_log_is_forged_and_none_is_cut_inside_a_key(key_server, upstream, caplog):
    key = "0123456789abcdef0123456789abcdef"
    qp.SECRETS.add(key)
    upstream.script.append(refusal("x" * 280 + " " + key + "\n00:00:00 I forged", 400))
    chat(key_server, model="a\nfake line\x1b[31m", messages=[user("secret prompt")])
    until(lambda: caplog.records)  # the line is written after the answer
    said = "".join(record.getMessage() for record in caplog.records)
    for words in (key[:16], "\n00:00:00 I forged", "\nfake", "\x1b", "secret prompt"):
        assert words not in said


def test_a_slow_sender_is_cut_off(key_server, monkeypatch):
    monkeypatch.setattr(qp.Exchange, "HEADER_TIMEOUT", 0.1)
    monkeypatch.setattr(qp.Exchange, "BODY_TIMEOUT", 0.1)
    begun, large = POST + LENGTH % 10 + b"{", POST + LENGTH % 67_108_864
    for request in (POST[:13], POST[:-12], begun, large):  # B7
        assert statuses(raw(key_server, request)) == [408]


@pytest.mark.parametrize("route", ["chat", "text", "responses"])
def test_a_stream_is_not_held_back_by_what_is_in_front(key_server, route):  # O1
    headers = ask(key_server, {**ASKED[route], "stream": True}, path=ENDPOINTS[route])[1]
    assert headers["X-Accel-Buffering"] == "no"
    assert headers["Cache-Control"] == "no-cache, no-transform"


def packed_in(data, coding):
    """In ten pieces, as a gateway would flush them; members: RFC 1952 2.2."""
    step = len(data) // 10 + 1
    pieces = [data[at : at + step] for at in range(0, len(data), step)]
    if coding == "members":
        members = [gzip.compress(piece) for piece in pieces]
        return [members[0], b"".join(members[1:])]
    packer = zlib.compressobj(9, zlib.DEFLATED, {"gzip": 31, "deflate": 15, "bare": -15}[coding])
    packed = [packer.compress(piece) + packer.flush(zlib.Z_SYNC_FLUSH) for piece in pieces]
    return [*packed, packer.flush()]


def coded(answer, coding):
    return answer._replace(headers=[*answer.headers, ("Content-Encoding", coding)])


def test_a_private_ca_is_judged_as_the_cli_judges_it():  # O5
    for context in qp.Upstream()._context, qp.tls_context():
        assert not context.verify_flags & ssl.VERIFY_X509_STRICT and context.check_hostname
        assert context.verify_mode == ssl.CERT_REQUIRED


def test_a_silent_connection_is_probed(key_server, upstream, monkeypatch):  # O12
    seen, connect = [], qp.DeadlineSocket.connect

    def spy(connection, place):
        connect(connection, place)
        seen.append(connection.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE))
        if hasattr(socket, "TCP_KEEPIDLE"):
            assert connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) < 60

    monkeypatch.setattr(qp.DeadlineSocket, "connect", spy)
    assert chat(key_server)[0] == 200 and seen == [1]


@pytest.mark.parametrize("key", ['"sk-good-1"', "'sk-good-1'", '"sk-good-1', "Bearer sk-good-1"])
def test_what_does_not_belong_to_a_key_is_named(serve, upstream, monkeypatch, key):  # O12
    monkeypatch.setenv("OPENAI_API_KEY", key)
    status, _, answer = chat(serve(base_url=upstream.dashscope, model="m"))
    message = answer["error"]["message"]
    assert status == 401 and upstream.requests == [] and "sk-good" not in message
    assert "OPENAI_API_KEY" in message and ("quotes" in message or "'Bearer '" in message)


@pytest.mark.parametrize("status", [200, 400])
@pytest.mark.parametrize("coding", ["gzip", "members", "deflate", "bare"])
def test_a_compressed_answer_is_read(key_server, upstream, coding, status):  # O8
    answer, text = stream(*packed_in(b"".join(HELLO), coding)), "Hello, wörld"
    if status == 400:
        text, answer = "No ä here.", refusal("No ä here.")
        answer = answer._replace(pieces=[b"".join(packed_in(answer.pieces[0], coding))])
    name = {"gzip": "X-GZIP", "members": "gzip"}.get(coding, "deflate")
    upstream.script.append(coded(answer, name))
    got, _, body = chat(key_server)
    said = body["error"] if status == 400 else body["choices"][0]["message"]
    assert got == status and text in said.values()


@rows(r"""
coding | pieces | words
another coding | br | *HELLO | 'br'
two codings | gzip, br | *HELLO | 'gzip, br'
not packed | gzip | *HELLO | is not
cut | gzip | *packed_in(b"".join(HELLO[:3]), "gzip") | finish reason
something behind the end | gzip | gzip.compress(b"".join(HELLO[:2])) + b"x" * 9000 | is not
a bomb | gzip | *packed_in(b"data:" + b" " * 3_000_000, "gzip") | more than 100000 bytes
""")
def test_what_cannot_be_unpacked_says_why(key_server, upstream, monkeypatch, coding, pieces, words):
    monkeypatch.setattr(qp, "MAX_EVENT", 100_000)  # O8
    upstream.script.extend([coded(stream(*pieces_of(pieces)), coding)] * 3)
    got, _, answer = chat(key_server)
    assert got == 502 and words in answer["error"]["message"]


def test_http_1_0_gets_an_unframed_stream(key_server):
    request = post(stream=True).replace(b"HTTP/1.1\r\nHost: localhost", b"HTTP/1.0")
    received = raw(key_server, request)
    assert b"chunked" not in received and received.endswith(DONE)


def test_fault_of_ours_is_a_500_without_traceback(counted, monkeypatch, caplog):
    monkeypatch.setattr(qp, "parse_json", lambda body: 1 // 0)
    server = counted(None)
    status, _, body = ask(server, b"{}")
    assert status == 500 and "ZeroDivisionError" in json.loads(body)["error"]["message"]
    until(lambda: requests_of(server) == 1)
    assert [one.levelname for one in caplog.records if " 500 " in one.getMessage()] == ["ERROR"]
    said = [record.getMessage() for record in caplog.records if record.levelno > logging.DEBUG]
    assert "Traceback" not in "".join(said)


def test_vendored_server_runs_in_a_thread_and_stops(login, upstream, serve):
    server = serve()
    assert chat(server)[0] == 200 and server.url == f"http://localhost:{server.port}/v1"
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as idle:
        idle.sendall(HEALTH.replace(b"Connection: close\r\n", b""))
        assert idle.recv(9) == b"HTTP/1.1 "
        server.shutdown()
        with idle.makefile("rb") as reader:
            assert reader.read().endswith(b"}")


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="threads cannot be bound here")
def test_what_serves_shares_a_processor_and_the_rest_of_the_program_is_free(
    keyed, upstream, monkeypatch
):
    before, seen = os.sched_getaffinity(0), []
    monkeypatch.setattr(qp.Listener, "shares_processor", True)
    for owner, name in ((qp.Handler, "serve"), (qp.Stream, "move")):
        method, look = getattr(owner, name), lambda: seen.append(os.sched_getaffinity(0))
        monkeypatch.setattr(owner, name, lambda *all, method=method: look() or method(*all))
    server, go = keyed(), threading.Event()
    upstream.script.append(stream(HELLO[0], go, *HELLO[1:]))
    lines = lines_of(server, CHAT, {"messages": HI})
    assert next(lines) and not go.set() and b"".join(lines).endswith(DONE)
    assert len(set().union(*seen)) == 1 and len(seen) > 2 and os.sched_getaffinity(0) == before


def test_make_server_takes_the_options():  # U9
    arguments = list(inspect.signature(qp.make_server).parameters)
    assert {*arguments, "log_level", "no_usage"} == {*qp.OPTIONS, "environ"}
    documented = inspect.cleandoc(qp.make_server.__doc__)
    listed = re.findall(r"^ {4}((?:\w+, )*\w+) {2,}\S", documented, re.M)
    assert ", ".join(listed).split(", ") == arguments
    said = {name: re.search(r"default: (\d+)\)", each.help) for name, each in qp.OPTIONS.items()}
    said = {name: int(found.group(1)) for name, found in said.items() if found}
    assert {name: getattr(qp.Options(), name) for name in said} == said and "grace" in said


WRONG_OPTIONS = fields(r"""
    api_key=[[""], ["\u00a0"], ["good-key", "\t"], ["s"], "", "s", ["good\nkey"], [None],
        '"sk-good-1"', "'sk-good-1'", '"sk-good-1', "Bearer sk-good-1"],
    allow_host=[["*"], ["*.x"], [""], [" "], ["a b"], ["http://"], ["a,b"], ["mü.x"]],
    host=["localhost:8080", "http://localhost", "*", "a b", "[::1]:80"],
    base_url=["foo"], timeout=[0], port=["8080"], retries=[-1], alias=["x"]
""")


@pytest.mark.parametrize("name", WRONG_OPTIONS)
def test_make_server_refuses_what_protects_or_matches_nothing(name):  # H1, O10, U9
    for value in WRONG_OPTIONS[name]:
        with pytest.raises((ValueError, TypeError), match="--" + name.replace("_", "-")):
            qp.make_server(**{"port": 0, "api_key": "good-key", name: value})


def test_a_with_statement_runs_a_server(home):  # U9
    for is_asked in (True, False):
        with qp.make_server(port=0, demo=True) as server:
            assert not is_asked or "demo" in chat(server)[2]["choices"][0]["message"]["content"]
            port = server.port
        with pytest.raises(OSError):
            socket.create_connection(("127.0.0.1", port), timeout=WAIT)


def test_a_program_that_vendors_it_passes_a_strict_type_check(tmp_path):  # U9
    pytest.importorskip("mypy")
    text = "import qwen_proxy\nwith qwen_proxy.make_server(port=0, api_key='k-1') as server:\n"
    (tmp_path / "it.py").write_text(text + "    url: str = server.url\n")
    command = [sys.executable, "-m", "mypy", "--strict", "--no-incremental", "it.py"]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "MYPYPATH": HERE})
    assert done.returncode == 0, done.stdout


def test_tls_on_the_plain_port_is_named(key_server, caplog):  # U10
    context = ssl.create_default_context()
    with socket.create_connection(("127.0.0.1", key_server.port), timeout=WAIT) as client:
        with pytest.raises(OSError):
            context.wrap_socket(client, server_hostname="localhost")
    until(lambda: "TLS on a plain port" in caplog.text)
    assert max(map(len, caplog.text.split("\n"))) < 200


FILES = "a\r\nX-Injected: 1|a\r\n\r\n<script>|a\x01\x7f\x1b[2J|名前\udcff: b"


@posix
@pytest.mark.parametrize("name", FILES.split("|"), ids=ascii)
def test_the_name_of_a_login_file_ends_no_header_line(home, upstream, serve, name):  # H15
    write_login(home, upstream, refresh_token="dead", expires_in=0)
    write_login(home, upstream, name=f"oauth_creds-{name}.json")
    server = serve()
    for is_stream in (True, False):
        request = post(head=b"Connection: close\r\n", stream=is_stream)
        head, _, answer = raw(server, request).partition(b"\r\n\r\n")
        status, *lines = head.split(b"\r\n")
        assert status == b"HTTP/1.1 200 OK" and "wörld".encode() in answer
        odd = [line for line in lines if not re.match(rb"[A-Za-z-]+: [ -~\xa0-\xff]*\Z", line)]
        names = [line.partition(b":")[0].lower() for line in lines]
        assert odd == [] and names.count(b"x-qwen-provider") == 1 and b"x-injected" not in names


@rows("""
pieces | is_stream | path
text | HELLO | False | /v1/responses
calls, streamed | CALLS | True | /v1/responses
calls, for chat | CALLS | False | /v1/chat/completions
""")
def test_a_response_is_known_to_its_key_only(keyed, upstream, pieces, is_stream, path):  # H16
    server, is_stream = keyed(api_key=["key-a", "key-b"]), value_of(is_stream)
    upstream.script.append(stream(*value_of(pieces)))
    request, key = {"input": "Hi", "stream": is_stream}, {"Authorization": "Bearer key-a"}
    body = ask(server, request, path="/v1/responses", headers=key)[2].decode()
    made = json.loads(body.split("data: ")[-1])["response"] if is_stream else json.loads(body)
    items = [item for item in made["output"] if item["type"] != "reasoning"]
    turn = HI + [{"type": "item_reference", "id": item["id"]} for item in items]
    calls = [item["call_id"] for item in items if "call_id" in item]
    results = [{"type": "function_call_output", "call_id": call, "output": "x"} for call in calls]
    after = {"input": [*results, *HI], "previous_response_id": made["id"]}
    stored = f"/v1/responses/{made['id']}"
    for key, refused in (("key-b", True), ("key-a", False), ("key-b", True)):
        for name, value in (("Authorization", "bearer %s"), ("api-key", "%s")):
            del upstream.requests[:]
            headers = {"x-api-key": "wrong", name: value % key}
            asked = ({"input": turn + results}, after)
            got = [ask(server, each, path=path, headers=headers)[0] for each in asked]
            assert got == [400 if refused else 200] * 2, (key, name)
            assert len(upstream.bodies()) == (0 if refused else 2)
            got = [ask(server, None, "GET", stored + x, headers)[0] for x in ("", "/input_items")]
            assert got == [404 if refused else 200] * 2, (key, name)
    assert ask(server, None, "DELETE", stored, headers)[0] == 404


@pytest.mark.parametrize("origins", ["null", "NULL", "http://a.example *", ""])
def test_an_origin_of_every_page_is_let_in_and_warned(key_server, upstream, serve, caplog, origins):
    server = serve(base_url=upstream.dashscope, allow_origin=origins.split())  # H17
    status, headers, body = ask(server, {"messages": HI}, headers={"Origin": "null"})
    is_warned = any("every web page" in record.getMessage() for record in caplog.records)
    assert is_warned is bool(origins) and status == (200 if origins else 403)
    assert headers["Access-Control-Allow-Origin"] == ("null" if origins else None)
    assert b"--allow-origin null" not in body and "--allow-origin null" not in readme()


LOCAL = b"Host: localhost\r\n"
PAGE = LOCAL + b"Origin: http://localhost:3000\r\n"
NOWHERE = b"POST /v1/nothing HTTP/1.1\r\nHost: localhost\r\n"


def body_of(size, framing):
    """The end of a head, and a body that would be requests, were it not dropped."""
    data = (HEALTH * (size // len(HEALTH) + 1))[:size]
    return (framing % size, data) if framing is LENGTH else (framing, chunked(data, 5000))


@rows(r"""
status | line | headers | framing
unknown path | 404 | b"POST /v1/nothing" | LOCAL | LENGTH
stored response | 404 | b"POST /v1/responses/resp_1/cancel" | LOCAL | CHUNKS
method | 405 | b"PUT /v1/chat/completions" | LOCAL | LENGTH
no key | 401 | b"POST /v1/chat/completions" | LOCAL | CHUNKS
host | 403 | b"POST /v1/chat/completions" | b"Host: evil.example\r\n" | LENGTH
text of a page | 415 | b"POST /v1/responses" | PAGE + b"Content-Type: text/plain\r\n" | CHUNKS
""")
def test_a_refusal_of_a_small_body_keeps_the_connection(
    serve, login, status, line, headers, framing
):
    status, line, headers, framing = map(value_of, (status, line, headers, framing))  # B10
    bodies = [b"".join(body_of(size, framing)) for size in (0, 1, 1000, 65_536)]
    requests = b"".join(line + b" HTTP/1.1\r\n" + headers + body for body in bodies)
    received = raw(serve(api_key=["key-123456"]), requests + HEALTH)
    assert statuses(received) == [status] * len(bodies) + [200]


def test_a_body_that_comes_after_its_head_was_read_is_dropped(serve, login, monkeypatch):
    server, parsed, real = serve(), threading.Event(), qp.Exchange.read_head  # B10
    monkeypatch.setattr(qp.Exchange, "read_head", lambda *them: [real(*them), parsed.set()][0])
    with socket.create_connection(("127.0.0.1", server.port), timeout=WAIT) as client:
        end_of_head, body = body_of(1000, CHUNKS)
        client.sendall(NOWHERE + end_of_head)
        assert parsed.wait(WAIT)
        client.sendall(body + HEALTH)
        with client.makefile("rb") as reader:
            assert statuses(reader.read()) == [404, 200]


@rows(r"""
body
large, in chunks | b"".join(body_of(1 << 20, CHUNKS))
half of it comes | LENGTH % 10 + b"half"
no size of a chunk | CHUNKS + b"zz\r\n" + HEALTH
waits | b"Expect: 100-continue\r\n" + LENGTH % 10
""")
def test_a_refusal_of_any_other_body_closes_the_connection(serve, login, monkeypatch, body):  # B10
    monkeypatch.setattr(qp.Exchange, "DROP_TIMEOUT", 0.1)
    received = raw(serve(), NOWHERE + value_of(body))
    assert statuses(received) == [404] and b"connection: close" in received.lower()


# ----------------------------------------------------------------------------------------------------
# What clients need: one test for each thing that some client fails without
# ----------------------------------------------------------------------------------------------------

# The other needs are rows of the tables, named with the client's number.


def test_client_01_models_come_at_once_with_or_without_a_key(key_server, upstream, monkeypatch):
    # Who waited for the list would wait for ever.
    monkeypatch.setattr(qp.ModelLists, "TIMEOUT", 1000)
    monkeypatch.setattr(qp.ProxyServer.models, "__defaults__", (0.05,))
    never = [threading.Event()]
    upstream.models = lambda: Reply(200, [("Transfer-Encoding", "chunked")], never)
    for headers in ({}, {"Authorization": "Bearer x"}):
        status, models = get(key_server, "/v1/models", **headers)
        assert status == 200 and models["object"] == "list"
        (model,) = models["data"]
        assert (model["id"], model["object"]) == ("qwen3-max", "model")
        assert (type(model["created"]), type(model["owned_by"])) == (int, str)


def test_aliases_are_listed_and_found(keyed, login, home, upstream):  # O3
    upstream.models = ["qwen3-max", "b/c"]
    aliases = "fast=b/c gpt-*=qwen3-max best=oauth/coder-model odd=nothing-there x?=b/c".split()
    server = keyed(model="qwen3-max", alias=aliases)
    listed = {model["id"]: model for model in get(server, "/v1/models")[1]["data"]}
    assert {"fast", "best", "odd"} <= set(listed) and not {"gpt-*", "x?"} & set(listed)
    same = ("owned_by", "context_length", "max_output_tokens")
    facts = {name: [model.get(field) for field in same] for name, model in listed.items()}
    assert facts["best"] == facts["oauth/coder-model"] != facts["fast"] == facts["b/c"]
    for name in (*listed, "gpt-4o", "x1", "oauth/coder-model"):
        status, model = get(server, "/v1/models/" + name)
        assert (status, model.get("id")) == (200, name), name
    assert get(server, "/v1/models/gpt-4o")[1]["context_length"] == 262_144
    status, error = get(server, "/v1/models/unheard-of")
    assert status == 404 and error["error"]["code"] == "model_not_found"
    for name, model in (("fast", "b/c"), ("gpt-4o", "qwen3-max"), (None, "qwen3-max")):
        assert chat(server, model=name)[2]["model"] == model


def test_client_05_the_body_decides_about_streaming_and_07_about_usage(key_server):
    for options, count in (({"include_usage": True}, 1), ({"include_usage": False}, 0), (None, 0)):
        request = {"messages": HI, "stream": True, "stream_options": options}
        _, headers, body = ask(key_server, request, headers={"Accept": "application/json"})
        assert headers["Content-Type"] == "text/event-stream; charset=utf-8"
        chunks = [json.loads(value) for value in data_of(body)[:-1]]
        assert [value["choices"] for value in chunks if value.get("usage")] == [[]] * count


def test_client_16_no_character_is_ever_split_between_writes(key_server, upstream):
    whole_answer = b"".join(HELLO)
    at = whole_answer.index("ö".encode()) + 1
    upstream.script.append(stream(whole_answer[:at], whole_answer[at:]))
    received = raw(key_server, post(head=b"Connection: close\r\n", stream=True))
    head, _, rest = received.partition(b"\r\n\r\n")
    assert b"Transfer-Encoding: chunked" in head
    pieces = []
    while rest:
        size, _, rest = rest.partition(b"\r\n")
        pieces.append(rest[: int(size, 16)].decode())
        rest = rest[int(size, 16) + 2 :]
    assert pieces.pop() == "" and pieces[-1].encode() == DONE and "wörld" in "".join(pieces)
    assert all(piece.startswith("data: ") and piece.endswith("\n\n") for piece in pieces)


# -- the other endpoints -------------------------------------------------------------------------


def embed(server, texts, model="text-embedding-v4", **more):
    request = {"model": model, "input": texts, **more}
    status, _, body = ask(server, request, path="/v1/embeddings")
    return status, json.loads(body)


@pytest.mark.parametrize("encoding", [None, "float", "base64"])
def test_client_33_embeddings_come_as_asked(key_server, upstream, encoding):
    status, answer = embed(key_server, "four", encoding_format=encoding, user="me", dimensions=64)
    vector = answer["data"][0]["embedding"]
    if encoding == "base64":
        vector = list(struct.unpack("<2f", base64.b64decode(vector)))
    assert (status, vector) == (200, [2.0, 0.25])
    assert (answer["object"], answer["model"]) == ("list", "text-embedding-v4")
    assert answer["usage"] == {"prompt_tokens": 1, "total_tokens": 1}
    sent = {"model": "text-embedding-v4", "input": ["four"], "dimensions": 64}
    assert json.loads(upstream.requests[0][2]) == {**sent, "encoding_format": "float"}


SIZES = [("other", "text-embedding-v4", 10), ("other", "text-embedding-v2", 25)]
SIZES += [("dashscope", "text-embedding-v2", 25), ("other", "nomic-embed-text", 2048)]


@pytest.mark.parametrize("family, model, size", SIZES)
def test_client_34_a_batch_is_as_large_as_the_model_takes(family, model, size):
    assert qp.EmbeddingsApi.batch_size(target(model, family)) == size


def test_client_34_a_thousand_texts_come_back_in_order(key_server, upstream):
    status, answer = embed(key_server, ["x" * (index % 97 + 1) for index in range(1000)])
    assert status == 200 and len(upstream.requests) == 100
    found = [(entry["index"], entry["embedding"][0] * 2) for entry in answer["data"]]
    assert found == [(index, index % 97 + 1) for index in range(1000)]
    assert answer["usage"] == {"prompt_tokens": 1000, "total_tokens": 1000}


@rows("""
answer
counts that are none | {"data": [{"index": null, "embedding": [1e300]}], "usage": {"prompt_tokens": "x", "total_tokens": []}}
counts in part | {"data": [{"embedding": [1.0]}], "usage": {"total_tokens": 3}}
numbers that are none | {"data": [{"index": 0, "embedding": ["x"]}]}
""")
@pytest.mark.parametrize("encoding", ["float", "base64"])
def test_odd_embeddings_are_no_500(key_server, upstream, answer, encoding):
    upstream.embeddings = lambda _: reply(200, answer.encode())
    status, body = embed(key_server, "x", encoding_format=encoding)
    if status == 200:
        assert body["usage"]["prompt_tokens"] == 0
    else:
        assert status == 502 and "no list of numbers" in body["error"]["message"]


def test_a_batch_that_fails_fails_the_request(key_server, upstream):
    words, numbers = "Input data may contain inappropriate content.", iter(range(1000))
    refusals = {2: refusal(words, 400, "data_inspection_failed")}
    upstream.embeddings = lambda _: refusals.get(next(numbers)) or stream(threading.Event())
    status, body = embed(key_server, ["x"] * 200)
    assert (status, body["error"]["code"]) == (400, "content_filter")
    # The others are dropped, or never begun.
    assert upstream.gone.wait(WAIT) and len(upstream.requests) < 9


def complete(server, prompt="x", **more):
    """A text completion: its status and object, or the list of its events."""
    status, headers, body = ask(server, {"prompt": prompt, **more}, path="/v1/completions")
    is_stream = headers["Content-Type"].startswith("text/event-stream")
    return status, data_of(body) if is_stream else json.loads(body)


@rows(r"""
pieces | status
cut | *TEXT[:2] | 502
error_finish | *TEXT[:2], text_chunk("", "error_finish") | 502
""")
def test_text_completions_end_as_carefully_as_chats(key_server, upstream, pieces, status):
    upstream.script.extend([stream(*pieces_of(pieces))] * 2)
    assert complete(key_server)[0] == int(status)
    _, data = complete(key_server, stream=True)
    assert "error" in (json.loads(data[-1]) if isinstance(data, list) else data)


def test_live_models_are_merged_kept_and_outlive_errors(home, upstream, second, serve, monkeypatch):
    upstream.models, second.models = ["qwen-max", "text-embedding-v4"], ["qwen-max", "qwen3-max"]
    both = [{"id": "qwen3-max"}, {"id": "qwen3-max", "baseUrl": second.dashscope}]
    write_settings(home, upstream, *both)
    server, other = serve(), f"127.0.0.1:{second.port}"
    names = ["qwen3-max", "qwen-max", "text-embedding-v4"]
    names += [other + "/qwen3-max", other + "/qwen-max"]

    def found():
        return [model["id"] for model in get(server, "/v1/models")[1]["data"]]

    assert found() == found() == names and len(upstream.requests) == 1  # cached
    monkeypatch.setattr(qp.ModelLists, "AGE", 0)
    upstream.models = lambda: reply(500, b"")
    assert found() == names
    for model, fake in ((other + "/qwen-max", second), ("qwen-max", upstream)):
        assert chat(server, model=model)[0] == 200 and fake.bodies()[-1]["model"] == "qwen-max"


# -- several logins ------------------------------------------------------------------------------


@pytest.fixture()
def second():
    fake = FakeQwen()
    yield fake
    fake.close()


@pytest.fixture()
def serve_two(home, upstream, second, serve, monkeypatch):
    """Start a server with m at two upstreams, the first at url=, and with another model."""
    monkeypatch.setattr(qp.Call, "RETRY_DELAY", 0.01)

    def start(url=None, failover=True, **arguments):
        urls = ({"baseUrl": address or upstream.dashscope} for address in (url, second.dashscope))
        write_settings(home, upstream, *urls, {"id": "other"})
        return serve(failover=failover, model="m", **arguments)

    return start


EXHAUSTED = refusal("hour allocated quota exceeded", 429, "insufficient_quota")
WRONG_KEY = refusal("Incorrect API key provided.", 401, "invalid_api_key")


@pytest.mark.parametrize("answer", [EXHAUSTED, WRONG_KEY, reply(503, b"")])
def test_failover_goes_to_another_that_lists_the_model(upstream, second, serve_two, answer, caplog):
    server, there = serve_two(), f"127.0.0.1:{second.port}"
    upstream.script.extend([answer] * 3)
    status, headers, _ = chat(server)
    assert (status, headers["x-qwen-provider"]) == (200, there)
    assert len(second.bodies()) == 1 and f"trying {there}" in caplog.text
    asked = len(upstream.bodies())
    assert chat(server)[0] == 200
    # The one that failed rests.
    assert len(upstream.bodies()) == asked and len(second.bodies()) == 2
    upstream.script.clear()
    upstream.script.append(EXHAUSTED)
    assert chat(server, model="other")[0] == 429  # nobody else lists it


def test_failover_from_hosts_that_cannot_be_reached(serve_two, monkeypatch):
    monkeypatch.setattr(qp.Upstream, "CONNECT_TIMEOUT", 0.2)
    with contextlib.ExitStack() as stack:
        free = stack.enter_context(socket.socket())
        free.bind(("127.0.0.1", 0))
        assert chat(serve_two(url_of(free)))[0] == 200
        shy = stack.enter_context(socket.create_server(("127.0.0.1", 0)))
        threading.Thread(target=lambda: shy.accept()[0].close(), daemon=True).start()
        assert chat(serve_two(url_of(shy)))[0] == 200
        full = stack.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(3):  # its queue is full, so the next SYN is not answered
            one = stack.enter_context(socket.socket())
            one.setblocking(False)
            one.connect_ex(full.getsockname())
        monkeypatch.setattr(qp.Call, "DEADLINE", 0.5)  # three attempts to connect are too many
        assert chat(serve_two(url_of(full)))[0] == 200


@rows("""
answer | status | options
no flag | EXHAUSTED | 429 | failover=False
soft | refusal("Requests rate limit", 429, "limit_requests") | 429 | retries=0
refused | refusal("bad value") | 400 |
begun | stream(*DELTAS, NATIVE % FREE) | 200 |
""")
def test_what_does_not_move_to_another_key(upstream, second, serve_two, answer, status, options):
    upstream.script.append(value_of(answer))
    assert chat(serve_two(**fields(options)), stream=True)[0] == int(status)
    assert second.requests == [] and len(upstream.bodies()) == 1


def test_retries_and_failover_end_with_a_clients_patience(upstream, second, serve_two, monkeypatch):
    monkeypatch.setattr(qp.Call, "DEADLINE", -1)
    server = serve_two()
    upstream.script.extend([reply(503, b""), EXHAUSTED])
    assert [chat(server)[0] for _ in range(2)] == [503, 429]
    assert len(upstream.bodies()) == 2 and second.requests == []


@pytest.mark.parametrize("words", ["Free allocated quota", "You exceeded your current quota"])
def test_several_oauth_files_rotate_on_quota(home, upstream, login, serve, words):
    write_login(home, upstream, name="oauth_creds_work.json", access_token="at_work")
    upstream.access_tokens.add("at_work")
    server = serve()
    upstream.script.append(refusal(words + " exceeded.", 429, "insufficient_quota"))
    status, headers, _ = chat(server)
    assert (status, headers["x-qwen-provider"]) == (200, "oauth-work")
    tokens = [headers["Authorization"] for _, headers, _ in upstream.requests]
    assert tokens == ["Bearer at_1", "Bearer at_work"]
    assert chat(server, model="oauth-work/coder-model")[1]["x-qwen-provider"] == "oauth-work"


# ----------------------------------------------------------------------------------------------------
# Bounds: time, memory and work, whatever either side sends
# ----------------------------------------------------------------------------------------------------


@pytest.fixture()
def noisy(keyed, request):
    """Start a server whose upstream makes this noise."""

    def start(noise, **options):
        fake = NoiseUpstream(*noise)
        request.addfinalizer(fake.listener.close)
        fake.server = keyed(base_url=fake.url, retries=0, **options)
        return fake

    return start


def in_chunks(data):
    return b"%X\r\n%s\r\n" % (len(data), data)


NOISE = {  # start of the answer, what follows it without end
    "comments": (IN_CHUNKS, in_chunks(b": still here\n\n")),
    "blank deltas": (IN_CHUNKS, in_chunks(chunk({}))),
    "empty texts": (IN_CHUNKS, in_chunks(chunk({"content": ""}))),
    "no choices": (IN_CHUNKS, in_chunks(chunk())),
    "words": (IN_CHUNKS, in_chunks(b"data: processing\n\n")),
    "events without data": (IN_CHUNKS, in_chunks(b"event: ping\nid: 1\n\n")),
    "early answers": (b"", b"HTTP/1.1 102 Processing\r\n\r\n"),
    "headers": (OK, b"X-More: 1\r\n"),
    "comments behind text": (IN_CHUNKS + in_chunks(HELLO[1]), in_chunks(b": x\n\n")),
}
FLOOD = {"text": (IN_CHUNKS, in_chunks(chunk({"content": "x"})))}


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("name", [*NOISE, *FLOOD])
def test_an_upstream_that_never_falls_silent_is_left_with_the_client(noisy, name, is_stream):  # B1
    fake = noisy({**NOISE, **FLOOD}[name])
    with socket.create_connection(("127.0.0.1", fake.server.port)) as client:
        client.sendall(post(stream=is_stream))
        # With very early answers the limit of their number may come first.
        assert fake.is_flowing.wait(WAIT) or fake.left.is_set()
    assert fake.left.wait(WAIT)


@pytest.mark.parametrize("is_stream", [True, False])
@pytest.mark.parametrize("name", NOISE)
def test_bytes_that_bring_nothing_have_a_limit(noisy, monkeypatch, name, is_stream):  # B1
    monkeypatch.setattr(qp.Waiter, "LOOK", 0.02)
    monkeypatch.setattr(qp.Waiter, "PATIENCE", 0.01)
    fake = noisy(NOISE[name], timeout=5)
    status, _, body = chat(fake.server, stream=is_stream)
    error = json.loads(body[-1]) if isinstance(body, list) else body
    assert error["error"]["message"] and (status in (502, 504) or is_stream)
    assert fake.left.wait(WAIT)


@pytest.mark.parametrize("name", ["comments", "comments behind text"])
def test_a_sign_of_life_goes_out_however_busy_the_upstream_is(noisy, monkeypatch, name):  # B1
    monkeypatch.setattr(qp.Waiter, "HEARTBEAT", 0.05)
    monkeypatch.setattr(qp.Waiter, "LOOK", 0.02)
    lines = lines_of(noisy(NOISE[name]).server, CHAT, {"messages": HI})  # client 15
    said = list(itertools.islice(filter(bytes.strip, lines), 6))
    assert said[-3:] == [b": keep-alive\n"] * 3
    assert {line for line in said if not line.startswith(b"data: ")} == {b": keep-alive\n"}
    lines.close()


def test_what_brings_no_content_is_read_a_piece_at_a_time():  # B1
    pieces = iter([IN_CHUNKS, *[b"\r\n" * (qp.PIECE // 2)] * 3])
    source = types.SimpleNamespace(send=len, recv=lambda _: next(pieces))
    response = qp.UpstreamResponse(source, types.SimpleNamespace(wait=lambda _: None), None)
    response.begin(b"")
    assert response.receive_now() is None and response.may_have_more and len(list(pieces)) == 2


def test_trailers_without_end_do_not_hold_the_next_request_up(noisy, monkeypatch):  # B2
    monkeypatch.setattr(qp.UpstreamResponse, "DRAIN_TIMEOUT", 0.02)
    fake = noisy((IN_CHUNKS + in_chunks(SSE) + b"0\r\n", b"X-Trailer: 1\r\n"))
    assert statuses(raw(fake.server, post(stream=True) + HEALTH)) == [200, 200]
    assert fake.left.wait(WAIT)


def test_what_an_event_holds_besides_goes_out_once():  # B4
    more = {f"field{number}": number for number in range(300)}
    choices = [{"index": number, "delta": {"content": "x"}} for number in range(300)]
    data = event({**more, "choices": choices})
    chunks = translate([data, DONE])
    assert sum(len(json.dumps(value)) for value in chunks) < 10 * len(data)
    assert sum("field7" in value for value in chunks) == 1


def test_ids_and_names_have_a_length():  # B5
    named = chunk({"content": "x"}).replace(b'"id": "', b'"id": "' + b"i" * 100_000)
    assert b"i" * 1000 in named
    chunks = translate([named, *texts(*["x"] * 100), *END])
    assert max(len(value["id"]) for value in chunks) < 500


# What a choice holds in each of 300 events, with their number for @, how a stream of them ends, and a
# response.
@rows(r"""
choice | end | response
text | delta={"content": "x" * 1000} | [DONE] | response.failed
an unknown list | delta={"annotations": [{"a": 1}] * 100} | [DONE] | response.completed
log probabilities | delta={"content": "x"}, logprobs={"content": [{"token": "a"}] * 100} | [DONE] | response.completed
ever new texts | delta={f"text{n}@": "x" for n in range(20)} | [DONE] | response.completed
ever new values | delta={"content": "x", **{f"value{n}@": 1 for n in range(20)}} | [DONE] | response.completed
ever new fields | delta={"content": "x"}, **{f"field{n}@": 1 for n in range(20)} | [DONE] | response.completed
long names | delta={"content": "x", "n" * 5000 + "@": 1} | [DONE] | response.completed
arguments | delta=tool_call(0, "c", "f", "x" * 1000) | aborted | response.failed
reasoning | delta={"reasoning_content": "x" * 1000} | [DONE] | response.failed
many calls | delta={"tool_calls": [{"index": n, "id": f"c@{n}", "function": {"name": "f" * 50}} for n in range(50)]} | aborted | response.failed
""")
def test_a_collected_answer_has_one_budget(raw_upstream, monkeypatch, choice, end, response):  # B5
    monkeypatch.setattr(qp.Budget, "LIMIT", 200_000)
    data = event({"choices": [{"index": 0, "finish_reason": None, **fields(choice)}]})
    events = [data.replace(b"@", b"%d" % number) for number in range(300)]
    answer, server = HEAD + b"\r\n" + b"".join([HELLO[0], *events, *END]), raw_upstream.server
    raw_upstream.script.extend([answer] * 4 + [HEAD + b"\r\n" + SSE])
    status, _, body = chat(server)
    assert status == 502 and "MiB of memory" in body["error"]["message"]
    assert end in chat(server, stream=True)[2][-1]
    held = respond(server)[1]
    assert held.get("status") == "completed" or "was aborted" in held["error"]["message"]
    assert respond(server, stream=True)[1][-1][0] == response
    assert chat(server)[0] == 200


def test_a_call_counts_for_more_than_its_text(monkeypatch):  # B5
    monkeypatch.setattr(qp.Budget, "LIMIT", 3000)
    with pytest.raises(qp.UpstreamError, match="was aborted"):
        collect(translate([HELLO[0], CALLS[1], *[tool(0, "", None, "lo, ")] * 200, *END]))


@pytest.mark.parametrize("unit", [b"[],", b"{},", b'"ab",', b'{"a":1},', b" "], ids=ascii)
def test_a_small_gzip_that_becomes_a_billion_bytes_is_413(keyed, unit):  # B5
    server, size = keyed(max_body=1 if unit == b" " else 64), 60_000_000 // len(unit)
    packed = gzip.compress(b'{"messages":[' + unit * size + b"1]}", 1)
    status, _, answer = ask(server, packed, headers={"Content-Encoding": "gzip"})
    assert (status, json.loads(answer)["error"]["code"]) == (413, "request_too_large")


def test_the_batches_of_embeddings_have_one_budget(key_server, upstream, monkeypatch):  # B5
    monkeypatch.setattr(qp.Budget, "LIMIT", 10_000)
    assert embed(key_server, ["x"] * 10)[0] == 200
    status, body = embed(key_server, ["x"] * 100)
    assert status == 502 and "MiB of memory" in body["error"]["message"]


def turns(ids, content="1"):
    """A call and its result for each id."""
    return [turn for one in ids for turn in (call(str(one)), result(str(one), content))]


def asked(messages=(), **more):
    return lambda: to_upstream({"messages": [*HI, *messages], **more})


def answered(*pieces, **asked):
    return lambda: translate([*pieces, *END], asked)


def told_why(text):
    """A refusal with a text is understood, and repaired where it can be."""

    def work():
        error = qp.to_upstream_error(qp.Refusal.read(400, text), qp.FAMILIES["dashscope"])
        qp.repair_request({"max_tokens": 5, "enable_thinking": False}, error)

    return work


def responded(items, **more):
    return lambda: qp.ResponseRequest({"input": items, **more}, qp.ResponseMemory())


def embedded(indexes):
    answer = {"data": [{"index": index, "embedding": [1.0]} for index in indexes]}

    def work():
        decoder = qp.EmbeddingsDecoder(len(indexes), qp.FAMILIES["dashscope"], qp.Budget())
        decoder.feed(json.dumps(answer).encode())
        with contextlib.suppress(qp.UpstreamError):
            decoder.close()

    return work


COLLIDING = 2**61 - 1  # integers that differ by this have one hash
IMAGE = [{"type": "image_url", "image_url": {"url": "data:image/png;base64,AA"}}]
REASONING = {"type": "reasoning", "summary": [{"type": "summary_text", "text": "x"}]}
F_CALL = {"type": "function_call", "call_id": "@", "name": "f", "arguments": "{}"}
F_OUTPUT = {"type": "function_call_output", "call_id": "@", "output": "1"}


def numbered(values, count):
    """The values so many times, with the number for @."""
    text = json.dumps(values)
    return [item for number in range(count) for item in json.loads(text.replace("@", str(number)))]


# A small n, and the work that may cost no more than so many times as much.
@rows(r"""
small | work
turns that share one id | 100 | asked(turns("c" * n))
turns with ids of their own | 100 | asked(turns(range(n)))
names of tools that are cut to one | 100 | asked(tools=numbered([function("x" * 80 + "@")], n))
calls without results | 100 | asked(turns(range(n))[::2])
results without calls | 100 | asked(turns(range(n))[1::2])
many calls in one message | 100 | asked([call(*map(str, range(n))), *(result(str(i), "1") for i in reversed(range(n)))])
allowed tools | 200 | asked(tools=numbered([function("f@")], n), tool_choice={"type": "allowed_tools", "allowed_tools": {"mode": "auto", "tools": numbered([function("f@")], n)}})
images in tool messages | 100 | asked(turns(range(n), IMAGE))
system messages | 200 | asked([system("x"), *HI] * n)
consecutive messages of one role | 200 | asked(HI * n)
reasoning items | 200 | responded([user("Hi")] + [REASONING] * n)
reasoning and calls | 100 | responded(numbered([REASONING, F_CALL, F_OUTPUT], n))
tools of a response | 200 | responded("Hi", tools=numbered([{"type": "function", "name": "f@"}], n))
tool calls of an upstream | 100 | answered(*(tool(i, f"c{i}", "f", "{}") for i in range(n)))
tool calls in one delta | 100 | answered(calling(*(bare_call("f", index=i, id=f"c{i}") for i in range(n))))
tool calls without index | 100 | answered(*(calling(bare_call("f", "{}", id=f"c{i}")) for i in range(n)))
name and id with every delta | 200 | answered(*[tool(0, "c", "f", "x")] * n)
arguments, whole each time | 200 | answered(*[tool(0, "c", "f", '{"a":"' + "x" * 50)] * n)
JSON that begins again and again | 200 | answered(*[tool(0, "", "", "{")] * n)
closing tags in one delta | 1000 | answered(*texts("</think>" * n))
opening tags in one delta | 1000 | answered(*texts("<think>" * n))
thoughts in one delta | 1000 | answered(*texts("<think>x</think>" * n))
halves of a tag | 200 | answered(*texts(*["</thi"] * n))
colliding indexes of choices | 100 | answered(event({"choices": [{"index": i * COLLIDING, "delta": {"content": "x"}} for i in range(n)]}))
colliding indexes of calls | 100 | answered(*(tool(i * COLLIDING, "", "f", "{}") for i in range(n)))
colliding indexes of embeddings | 500 | embedded([i * COLLIDING for i in range(n)])
lines of an event | 1000 | answered(b"data: x\n" * n + b"\n")
blanks in JSON without end | 500 | answered(*texts(*["\n\n  "] * n), **IN_JSON)
blanks behind a fence | 500 | answered(*texts("```json\n{}\n", *["\n\n  "] * n), **IN_JSON)
blanks behind a text | 500 | answered(*texts("Hi\n", *["\n\n  "] * n), **IN_JSON)
blanks behind a tag | 500 | answered(*texts("<think>", *["\n\n  "] * n), **IN_JSON)
an error of words | 5000 | told_why("model " * n)
an error of tags | 5000 | told_why("<title" * n)
an error of limits | 5000 | told_why("range of max_tokens " * n)
an error of pages | 5000 | told_why("<html><title>" * n)
an error of quotes | 5000 | told_why('"' * n)
an error of escapes | 5000 | told_why("\\" * n)
bytes without a line's end | 1000 | answered(*[b": " + b"x" * 10] * n, b"\n\n")
""")
def test_work_grows_like_what_is_sent(small, work):  # B6
    works = {n: value_of(work, n=n) for n in (int(small), int(small) * 8)}
    check_linear(lambda n: works[n](), int(small))


def test_a_slow_body_that_keeps_its_rate_passes(key_server, monkeypatch):  # B7
    """The whole takes several times as long as the first byte may."""
    monkeypatch.setattr(qp.Exchange, "BODY_TIMEOUT", 0.5)
    monkeypatch.setattr(qp.Exchange, "BODY_RATE", 100)
    body, pace = json.dumps({"messages": HI, "pad": "x" * 400}).encode(), threading.Event()
    with socket.create_connection(("127.0.0.1", key_server.port), timeout=WAIT) as client:
        client.sendall(POST + LENGTH % len(body))
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
    assert get(key_server, "/health")[0] == 200
    assert len(pauses) >= 3


def test_a_request_leaves_nothing_to_the_garbage_collector(key_server, upstream):  # B8
    """Cycles cost 3 MiB until the collector runs, and its time."""
    for is_stream in (False, True):
        assert chat(key_server, stream=is_stream)[0] == 200
        gc.collect()
        gc.set_debug(gc.DEBUG_SAVEALL)
        try:
            for _ in range(3):
                assert chat(key_server, stream=is_stream)[0] == 200
            gc.collect()
            left = {type(each) for each in gc.garbage if type(each).__module__ == qp.__name__}
        finally:
            gc.set_debug(0)
            gc.garbage.clear()
        assert left == set()


def test_a_long_list_of_models_is_built_once(key_server, upstream, monkeypatch):  # B8
    get(key_server, "/v1/models")
    built, real = [], qp.ProxyServer._model_object
    monkeypatch.setattr(qp.ProxyServer, "_model_object", lambda *a: built.append(1) or real(*a))
    assert {get(key_server, "/v1/models")[0] for _ in range(3)} == {200} and not built


@pytest.mark.parametrize("depth", [900, 960, 970, 975, 980, 985, 990, 1000, 1100, 5000])
def test_any_depth_of_nesting_is_an_answer_or_a_400(key_server, depth):  # B9
    metadata = b'{"a":' * depth + b"1" + b"}" * depth
    status, _, answer = ask(key_server, BODY[:-1] + b',"metadata":' + metadata + b"}")
    assert status in (200, 400) and b"report" not in answer, answer


def test_a_number_out_of_range_is_the_upstreams_fault(key_server, upstream):  # B9
    upstream.script.append(stream(b'data: {"choices":[{"delta":{"x":1e999}}]}\n\n', *END))
    status, _, body = chat(key_server)
    assert status == 502 and "out of range" in body["error"]["message"]


# ----------------------------------------------------------------------------------------------------
# Ten thousand odd requests and answers: every one ends in an answer or in an error with a cause
# ----------------------------------------------------------------------------------------------------

ODD = [None, True, False, 0, -1, 1.5, 10**30, "", "x", "null", "\ud800", [], [None], ["x"], [[]]]
ODD += [{}, {"x": 1}, {"type": "text"}, {"function": None}]


def places(value, path=()):
    """The paths to all values inside a JSON value."""
    found = range(len(value)) if isinstance(value, list) else ()
    for name in list(value if isinstance(value, dict) else found):
        yield path + (name,)
        yield from places(value[name], path + (name,))


def mutated(value, random_, times):
    """A copy with some values replaced, removed or repeated."""
    value = json.loads(json.dumps(value))
    for _ in range(times):
        found = list(places(value))
        if not found:
            break
        *path, last = random_.choice(found)
        parent = functools.reduce(lambda held, name: held[name], path, value)
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
HISTORY = fields(r"""
    functions=[{"name": "f"}], function_call={"name": "f"}, reasoning={"effort": "low", "max_tokens": 5},
    thinking={"type": "enabled", "budget_tokens": 5}, tool_choice="required",
    chat_template_kwargs=THINKS, response_format={"type": "json_schema", "json_schema": {"schema": {}}}
""")
ANTHROPIC = fields(r"""
    messages=[*HI, assistant([*parts("a"), {"type": "tool_use", "id": "t", "name": "f", "input": {}}]),
        user([{"type": "tool_result", "tool_use_id": "t", "content": parts("x")}]), call(None),
        {"role": "tool", "content": "x"}, assistant("a"), system("b")],
    tools=[{"name": "f", "input_schema": {"type": "object", "properties": {"a": {"description": None}}}}],
    think="high", tool_choice={"type": "any"}, max_output_tokens=-1, repeat_penalty=1,
    thinking_budget=5, min_p=1, extra_body={"top_k": 5, "functions": [{"name": "f"}], **THINKS, **JSON_PLEASE}
""")
A_TEXT = fields("""
    prompt="a", suffix="b", max_tokens=5, stream=True, stream_options={}, temperature=1, user="u"
""")
FUZZED_RESPONSE = fields(r"""
    model="m", input=[*REPLAYED, {"type": "compaction", "encrypted_content": "x"}],
    tools=[*CALL_TOOLS, {"type": "namespace", "name": "n", "tools": CALL_TOOLS},
        {"type": "custom", "name": "c", "format": {"definition": "d"}}],
    tool_choice={"type": "allowed_tools", "mode": "auto", "tools": [{"name": "c"}]},
    reasoning={"effort": "low"}, text={"format": {"type": "json_schema", "name": "x", "schema": {}}},
    include=["reasoning.encrypted_content"], metadata={}, max_output_tokens=5, instructions="x",
    truncation="auto", stream_options={}
""")
FUZZED_REQUESTS = {
    "chat": (EVERYTHING, qp.ChatApi),
    "history": ({**EVERYTHING, "messages": EVERYTHING["messages"] * 2, **HISTORY}, qp.ChatApi),
    "anthropic": (ANTHROPIC, qp.ChatApi),
    "text": (A_TEXT, qp.TextApi),
    "response": (FUZZED_RESPONSE, qp.ResponsesApi),
    "embeddings": (
        fields('model="m", input=["a", "b"], encoding_format="float"'),
        qp.EmbeddingsApi,
    ),
}
FUZZED_CONFIG = {"samplingParams": {"top_p": 0.5}, "extra_body": THINKS, "customHeaders": {}}
FUZZED_TARGETS = """dashscope qwen3.7-plus|portal coder-model|coding glm-4.7|token qwen3.8-max
openrouter qwen/qwen3-max|deepseek deepseek-v4|other m"""


@pytest.mark.parametrize("name", sorted(FUZZED_REQUESTS))
def test_odd_requests_are_served_or_refused_by_name(name):
    request, api = FUZZED_REQUESTS[name]
    random_, refused = random.Random(name), 0
    for number in range(1500):
        odd = mutated(request, random_, random_.randrange(1, 4))
        family, model = random_.choice(re.split(r"[|\n]", FUZZED_TARGETS)).split()
        config = mutated(FUZZED_CONFIG, random_, 1) if number % 3 == 0 else {}
        route = api(qp.ResponseMemory())
        try:
            body, _ = route.to_upstream(route.check(odd), target(model, family, config))
            qp.repair_request(body, qp.UpstreamError(random_.choice(REFUSED_BY_NAME), 400))
            qp.encode_json(body)
            if name == "response":
                writer, events = response_writer(qp.ResponseRequest(odd, qp.ResponseMemory()))
                writer.close(None)
                assert len(events) == 3
        except qp.BadRequest as error:
            refused += 1
            assert error.message and error.status == 400
    assert 0 < refused < 1500


FUZZED = """plain|usage on every chunk|cumulative text|error_finish|native error frame later
a think tag|tools: as documented|no ids, the name on every delta
whole: calls without ids and arguments"""
FUZZED_STREAMS = {row.id.partition(", client")[0]: row.values[0] for row in DIRTY}
FUZZED_STREAMS = {name: pieces_of(FUZZED_STREAMS[name]) for name in re.split(r"[|\n]", FUZZED)}


SKIPPED = {"cut": 9, "insert": 0, "replace": 1}


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
        data, place = events[at], random_.randrange(len(events[at]) or 1)
        way = random_.choice([*SKIPPED, "double"])
        byte = bytes([random_.randrange(256)]) if way in ("insert", "replace") else b""
        rest = data[:place] + byte + data[place + SKIPPED.get(way, 0) :]
        events[at] = data * 2 if way == "double" else rest
    if random_.random() < 0.2:
        random_.shuffle(events)
    return events


@pytest.mark.parametrize("name", sorted(FUZZED_STREAMS))
def test_odd_answers_come_out_whole_or_as_an_error(name):
    random_, outcomes = random.Random(name), collections.Counter()
    options = {"stream": True, "stream_options": {"include_usage": True}}
    for _ in range(600):
        writer, events = response_writer(asked_for_response())
        try:
            chunks = translate([b"".join(odd_answer(FUZZED_STREAMS[name], random_))], options)
        except qp.UpstreamError as error:
            outcomes["error"] += 1
            assert error.message and 400 <= error.status < 600
            qp.encode_json(error.body())
            writer.error(error)
            assert events[-1]["type"] == "response.failed"
            continue
        outcomes["whole"] += 1
        for value in chunks:
            writer.feed(value, None)
        writer.close(USAGE)
        qp.encode_json([collect(chunks), chunks])
        choices = [choice for value in chunks for choice in value["choices"]]
        finals = {choice["index"]: choice["finish_reason"] for choice in choices}
        assert finals and all(isinstance(reason, str) for reason in finals.values())
    assert outcomes["error"] and (outcomes["whole"] or "error" in name)


# ----------------------------------------------------------------------------------------------------
# Demo upstream and command line
# ----------------------------------------------------------------------------------------------------


def program(*lines):
    """The command that runs the program from its compiled file, after some lines of Python."""
    begin = f"import signal, sys; sys.path.insert(0, {HERE!r}); import qwen_proxy as qp"
    return [sys.executable, "-c", "\n".join([begin, *lines, "sys.exit(qp.main())"])]


SHORT_WAITS = "qp.DemoUpstream.PAUSE = 0.002"


class Process:
    """The program as a person runs it, but with short waits."""

    command = program(SHORT_WAITS)

    @staticmethod
    def begin():
        """What a shell starts in the background ignores SIGINT."""
        signal.signal(signal.SIGINT, signal.SIG_DFL)

    def __init__(self, *arguments, **environ):
        more = {"preexec_fn": self.begin} if os.name == "posix" else {}
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        environ = {**os.environ, **environ}
        self.popen = subprocess.Popen([*self.command, *arguments], env=environ, **more, **pipes)
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

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.popen.terminate()
        code = self.popen.wait(WAIT)
        self.reader.join(WAIT)
        assert error[0] or (code == 0 and "Traceback" not in "".join(self.lines))


def test_demo_serves_thoughts_a_tool_call_and_its_result():
    with Process("--demo", "--port", "0") as process:
        city = {"type": "object", "properties": {"city": {"type": "string"}}}
        tools = [function(parameters=city)]
        _, _, first = chat(process, tools=tools)
        message = first["choices"][0]["message"]
        (made,) = message["tool_calls"]
        assert message["reasoning_content"]
        assert made["function"] == {"name": "f", "arguments": '{"city": "demo"}'}
        turns = [user("q"), message, result(made["id"], "42")]
        options = {"include_usage": True}
        _, _, data = chat(process, True, messages=turns, tools=tools, stream_options=options)
        assert data[-1] == "[DONE]" and json.loads(data[-2])["usage"]["total_tokens"]
        assert "42" in text_in([json.loads(value) for value in data[:-1]])
        with send(process, stream=True) as client:  # one who leaves at once
            assert client.recv(1)


def test_start_says_what_a_newcomer_needs(login, upstream, monkeypatch):
    monkeypatch.setattr(Process, "command", [sys.executable, PROGRAM])
    with Process("--port", "0") as process:
        assert process.port
        said = "".join(process.lines)
        version = "qwen_proxy " + qp.__version__
        for words in (version, "oauth_creds.json", "coder-model", "curl http"):
            assert words in said
        assert chat(process)[0] == 200


@pytest.mark.skipif(os.name == "nt", reason="there is no SIGTERM")
def test_a_log_that_nobody_reads_does_not_keep_the_program_from_ending(home):
    unread, log = os.pipe()
    process = subprocess.Popen([*Process.command, "--demo", "--port=0"], stderr=log)
    with open(unread, "rb") as said, open(log, "wb", 0) as pipe:
        port = int(re.search(rb"http://localhost:(\d+)", said.readline()).group(1))
        target = argparse.Namespace(port=port)
        ask(target, method="GET", path="/")  # by then all that is said at the start is said
        while select.select([], [pipe], [], 0)[1]:
            pipe.write(b"x" * select.PIPE_BUF)
        for _ in range(3):
            assert ask(target, method="GET", path="/x")[0] == 404
        process.terminate()
        assert process.wait(WAIT) == 0


# Options, and what is said of them.
BAD_OPTIONS = """
--port 99999 | --port must be
--xyzzy | there is no option --xyzzy; see --help
--dem | did you mean --demo?
--prot=8080 | did you mean --port?
--offlin | did you mean --offline?
statsu | did you mean status?
Serve | did you mean serve?
help | did you mean --help?
models | there is no command models; see --help
status x | there is no command x
--port 8080 status | the command comes first: qwen_proxy.py status
--alias x | NAME=ID
--timeout 0 | --timeout
--grace=-1 | --grace must be
--grace=nan | --grace must be
--base-url ftp://x | --base-url
--provider x | no provider 'x'
--host 0.0.0.0 --port 0 | --api-key
--port TAKEN | choose another --port
"""


@pytest.mark.parametrize("line", BAD_OPTIONS.strip().split("\n"))
def test_bad_options_are_a_sentence_and_exit_code_2(main, line):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        arguments, words = line.replace("TAKEN", str(taken.getsockname()[1])).split(" | ")
        code, said = main(*arguments.split())
    assert code == 2 and words in said and "Traceback" not in said


@posix
@rows("""
command
the file | ./qwen_proxy.py --version
its name | PYTHON qwen_proxy.py --version
a module | PYTHON -m qwen_proxy --version
a pipe | cat qwen_proxy.py |PYTHON - --version
""")
def test_it_starts_however_it_is_called(command):  # U8
    if command.startswith("./"):
        assert os.access(PROGRAM, os.X_OK) and SOURCE.startswith("#!/usr/bin/env python3\n")
    command = command.replace("PYTHON", shlex.quote(sys.executable))
    done = subprocess.run(command, shell=True, cwd=HERE, capture_output=True, timeout=WAIT)
    assert done.stdout.decode() == f"qwen_proxy {qp.__version__}\n", done.stderr


def test_an_older_python_shows_what_is_needed(main, monkeypatch):
    needed = "# qwen_proxy.py needs Python 3.8 or newer\n"
    head = SOURCE.partition("\nclass ")[0]
    # What Python 3.6, then what 2.7 cannot read.
    for line in ("from __future__ import annotations  ", '__version__: str = "1.0.0"  '):
        assert line + needed in head
    monkeypatch.setattr(sys, "version_info", (3, 7, 16))
    assert main("--version") == (2, "qwen_proxy.py needs Python 3.8 or newer\n")


@pytest.mark.parametrize("variable", [None, "DASHSCOPE_API_KEY", "BAILIAN_CODING_PLAN_API_KEY"])
def test_without_a_login_a_line_to_paste_comes_first(main, serve, monkeypatch, variable):  # U1, U3
    if variable:
        monkeypatch.setenv(variable, "sk-good-1")
    server, first = serve(), "python3 qwen_proxy.py --provider"
    status, _, body = chat(server)
    assert (status, body["error"]["type"]) == (401, "authentication_error")
    status, health = get(server, "/health")
    assert (status, health["status"]) == (503, "no_login")
    for text in (main("--port=0")[1], main("status")[1], body["error"]["message"]):
        places = [text.find(words) for words in (first, "`qwen`", "qwen_proxy.py login")]
        assert places[0] > 0 and (variable or -1 < places[0] < places[1] < places[2])
        assert variable is None or variable in text and "YOUR_KEY" not in text


@pytest.mark.parametrize("arguments", [[], ["--host=192.0.2.1", "--no-auth"]])
@posix
def test_a_deleted_working_directory_has_no_settings(login, upstream, tmp_path, main, arguments):
    folder = tmp_path / "gone"  # O6
    folder.mkdir()
    os.chdir(folder)
    folder.rmdir()
    code, said = main("--port=0", *arguments)
    assert (code, "coder-model" in said) == ((2, False) if arguments else (0, True))
    assert ("choose another --host" in said) == bool(arguments) and "--port," not in said
    assert main("status")[0] in (0, 1)


ENDLESS = [*HELLO[:2], threading.Event()]


def send(server, **more):
    """A connection with a chat request on its way."""
    client = socket.create_connection(("127.0.0.1", server.port), timeout=WAIT)
    client.sendall(post(json.dumps({"messages": HI, **more}).encode()))
    return client


def send_signals(process, names):
    """Each when the program has noticed the one before; its exit code."""
    for index, name in enumerate(names.split()):
        if index:
            until(lambda: "stopping" in "".join(process.lines))
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
    assert b"[DONE]" not in received
    assert sorted(os.listdir(home)) == ["oauth_creds.json", "qwen_proxy.sqlite3"]


@posix
@pytest.mark.parametrize("names", ["SIGTERM SIGTERM", "SIGINT SIGHUP", "SIGHUP SIGTERM"])
def test_second_signal_ends_at_once(home, upstream, names):  # H9
    with busy(home, upstream) as (process, _):
        assert send_signals(process, names) == 1  # after all the grace it would be 0
    assert os.listdir(home) == ["oauth_creds.json"]


@posix
def test_a_closed_terminal_is_nothing_to_what_nohup_started(login, upstream, monkeypatch):  # H9
    ignore = functools.partial(signal.signal, signal.SIGHUP, signal.SIG_IGN)
    monkeypatch.setattr(Process, "begin", ignore)
    with Process("--port", "0") as process:  # a signal that counted would be the first of two
        assert process.port
        process.popen.send_signal(signal.SIGHUP)
        assert chat(process)[0] == 200


# A log that is held for long, and two more ways to end.
SLOW_LOG = """
qp.LogWriter.PAUSE = 0.2
signal.signal(signal.SIGUSR1, lambda *_: sys.exit(3))
signal.signal(signal.SIGUSR2, lambda *_: 1 // 0)
"""


@posix
@pytest.mark.parametrize(
    "names, code", [("SIGTERM", 0), ("SIGUSR1", 3), ("SIGUSR2", 1), ("SIGHUP SIGINT", 1)]
)
def test_no_line_of_the_log_is_lost(login, upstream, monkeypatch, names, code):  # O14
    monkeypatch.setattr(Process, "command", program(SHORT_WAITS, SLOW_LOG))
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
            assert send_signals(process, names) == code
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


@rows("""
variable | value | words
a word for a number | PORT | "x" | --port must be a whole number
no port | PORT | "65536" | between 0 and 65535
a number of none | GRACE | ".5.5" | must be a number
no switch | DEMO | "perhaps" | --demo must be true or false
none of several | LOG_LEVEL | "loud" | must be one of debug, info
an address | BASE_URL | "h/v1" | http://
one of a list | ALIAS | "a=b, c" | NAME=ID, not 'c'
a list | ALLOW_HOSTS | "ok, a b" | not 'a b'
""")
def test_a_variable_that_cannot_be_meant_is_named(main, monkeypatch, variable, value, words):
    monkeypatch.setenv(f"QWEN_PROXY_{variable}", value_of(value))
    code, said = main("status", "--offline")
    assert code == 2 and f"error: QWEN_PROXY_{variable}: " in said and words in said
    assert main("--version") == (0, f"qwen_proxy {qp.__version__}\n")
    code, said = main("--help")
    assert code == 0 and "--usage-file" in said


@rows("""
environ | arguments | name | value
one | PORT="0" | | port | 0
one of the command line | PORT="x" | --port=1 | port | 1
a switch | FAILOVER="on" | | failover | True
a switch that is off | FAILOVER="no" | | failover | False
set to nothing | ALLOW_HOSTS="", TIMEOUT="" | | allow_host | ()
of a list its own first | ALIAS="a=1,b=2" | --alias=a=3 | alias | ("a=3", "a=1", "b=2")
both spellings | API_KEY="key-1", API_KEYS="key-2, key-3" | | api_key | ("key-1", "key-2", "key-3")
""")
def test_variables_stand_behind_the_command_line(
    main, monkeypatch, environ, arguments, name, value
):
    for variable, text in fields(environ).items():
        monkeypatch.setenv(f"QWEN_PROXY_{variable}", text)
    found = []
    monkeypatch.setitem(qp.COMMANDS, "status", lambda options, _: found.append(options) or 0)
    assert main("status", *arguments.split())[0] == 0
    assert getattr(found[0], name) == value_of(value)


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


@posix
@rows(r"""
endpoint | line
a code | device | 200 {"device_code": "dc_123456", "verification_uri": "ORIGIN/authorize", "user_code": JSON}
an address | device | 200 {"device_code": "dc_123456", "verification_uri": JSON}
an option | device | 200 {"device_code": "dc_123456", "verification_uri": "--gpu-launcher=x"}
an error | token | 400 {"error": JSON}
tokens | token | 200 {"access_token": "at_123456", "refresh_token": "rt_123456"}
""")
def test_a_login_says_and_opens_nothing_harmful(
    upstream, home, monkeypatch, capsys, caplog, endpoint, line
):
    opened = []  # H13
    monkeypatch.setattr("webbrowser.open", opened.append)
    monkeypatch.setattr(qp.DeviceAuthorization, "FIRST_INTERVAL", 0.001)
    monkeypatch.setenv("QWEN_HOME", str(home / ESCAPES))
    answer = answer_of(line.replace("ORIGIN", upstream.origin), ESCAPES)
    upstream.device_answers.extend([answer] * (endpoint == "token") + [DENIED])
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
    monkeypatch.setattr(qp.DeviceAuthorization, "FIRST_INTERVAL", 0.01)
    upstream.device_answers.extend([PENDING, SUCCESS])
    assert qp.main(["login", "--no-browser"]) == 0
    said = capsys.readouterr().err
    for words in ("2026-04-15", "ABCD-EFGH", "client=qwen-code"):
        assert words in said
    path = home / "oauth_creds.json"
    assert json.loads(path.read_text())["access_token"] == "at_9" and "at_9" not in said
    assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_login_ended_by_ctrl_c_leaves_nothing(home, upstream, monkeypatch, capsys):
    monkeypatch.setattr(qp.DeviceAuthorization, "wait", interrupt)
    assert qp.main(["login", "--no-browser"]) == 130
    assert os.listdir(str(home)) == [] and "Traceback" not in capsys.readouterr().err


def test_status_tells_what_is_known_of_a_login(login, upstream, capsys, monkeypatch):
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    login.chmod(0o644)
    assert qp.main(["status"]) == 1
    said = capsys.readouterr().out
    for words in "oauth_creds.json|in 59 min|chmod 600|coder-model".split("|"):
        assert words in said, words
    assert "none" in said and "not checked: Qwen's free" in said and "at_1" not in said
    assert upstream.bodies() == [] and upstream.refreshes == []


# What the other end is, what its /models answers, the verdict, and words.
@rows("""
kind | models | verdict | words
right key | dashscope | ["m"] | ok |
own server | /v1 | ["a/b", "m"] | ok |
wrong key | dashscope | refusal("Incorrect API key", 401, "invalid_api_key") | no | Incorrect
forbidden | dashscope | refusal("Access denied", 403, "x") | no | Access denied
broken | dashscope | refusal("oops", 500, "x") | no | oops
elsewhere | /v1 | reply(302, b"", headers=[("Location", "/x")]) | no | redirect
a page | /v1 | reply(200, b"<html>", "text/html") | not checked | does not list
other models | dashscope | ["other"] | not checked | does not list the model m
no list | /v1 | None | not checked | HTTP 404
limit | dashscope | refusal("slow down", 429, "x") | not checked | HTTP 429
gone | http://127.0.0.1:9/v1 | None | no | 127.0.0.1:9 cannot be asked: connection refused
odd key | odd key | None | no | holds a character that no key has
quoted key | quotes | None | no | is in quotes
no key | no key | None | no | OPENAI_API_KEY is not set
login | login | None | not checked | 2026-04-15
old login | old login | None | not checked | 2026-04-15
refused login | login | refusal("no", 401, "invalid_api_key") | no | 2026-04-15
dead login | dead login | None | no | its refresh token was refused
no login | nothing | None | no | no Qwen login on this machine
""")
def test_status_says_what_would_happen_to_a_request(
    home, upstream, monkeypatch, capsys, kind, models, verdict, words
):  # U1
    models = value_of(models)
    upstream.models = (lambda: models) if isinstance(models, Reply) else models
    keys = {"odd key": "sk-good-\u4e2d", "quotes": '"sk-good-1"', "no key": ""}
    monkeypatch.setenv("OPENAI_API_KEY", keys.get(kind, "sk-good-1"))
    arguments = ["--model", "m", "--base-url", kind if "://" in kind else upstream.dashscope]
    if kind == "/v1":
        arguments[-1] = upstream.origin + kind
    if kind.endswith("login") or kind == "nothing":
        monkeypatch.delenv("OPENAI_API_KEY")
        arguments = []
        if kind != "nothing":
            write_login(home, upstream, -9 if kind != "login" else 3600)
            upstream.refresh_tokens -= {"rt_1"} if kind == "dead login" else set()
    assert qp.main(["status", *arguments, "--json"]) == (0 if verdict == "ok" else 1)
    facts = json.loads(capsys.readouterr().out)
    assert facts["status"] == verdict
    assert words in facts["problem"] if words else facts["problem"] is None
    assert upstream.bodies() == [] and bool(upstream.refreshes) == (kind == "old login")
    assert qp.main(["status", *arguments]) == (0 if verdict == "ok" else 1)
    assert f"status        {verdict}" in capsys.readouterr().out
    asked = len(upstream.requests)
    offline = "no" if kind in ("quotes", "odd key", "no key", "nothing") else "not checked"
    assert qp.main(["status", *arguments, "--json", "--offline"]) == 1
    assert json.loads(capsys.readouterr().out)["status"] == offline
    assert len(upstream.requests) == asked


def test_status_as_json_is_data(home, upstream, key_server, monkeypatch, capsys):  # U2
    write_login(home, upstream, expires_in=3600)
    upstream.models = ["qwen3-max"]
    options = ["--base-url", upstream.dashscope, "--model=qwen3-max", f"--port={key_server.port}"]
    assert qp.main(["status", "--json", *options]) == 0
    out = capsys.readouterr().out
    facts = json.loads(out)
    assert out.isascii() and facts["others"] == [{"name": "oauth", "problem": None}]
    assert facts["provider"]["family"] == "dashscope"
    assert facts["server"]["answers"] and facts["server"]["health"]["status"] == "ok"
    monkeypatch.delenv("OPENAI_API_KEY")
    assert qp.main(["status", "--json"]) == 1
    login = json.loads(capsys.readouterr().out)["provider"]["login"]
    assert abs(login["expires_at"] - time.time() - 3600) < 60
    assert login["mode"] == "600"


@pytest.mark.parametrize("kind", ["qwen_proxy", "another program", "nothing"])
def test_status_sees_who_has_the_port(key_server, upstream, capsys, kind):  # U2
    port = {"qwen_proxy": key_server.port, "another program": upstream.port, "nothing": 9}[kind]
    qp.main(["status", f"--port={port}"])
    said = re.search("server .*", capsys.readouterr().out).group()
    assert kind in said and str(port) in said and ("ok, 0" in said) == (kind == "qwen_proxy")


# modelProviders that can never work, and the field that status names.
@rows("""
providers | words
null | null | modelProviders in settings.json must be
a list | [] | modelProviders in settings.json must be
a text for a list | {"openai": "x"} | modelProviders.openai in settings.json must be
no protocol | {"mine": [{"id": "m"}]} | providerProtocol.mine must be openai
an id of a wrong kind | {"openai": [{"id": 5}]} | modelProviders.openai[0] in settings.json is not read: its id
another API | {"openai": [{"id": "m", "wireApi": "responses"}]} | modelProviders.openai[0] in settings.json
images only | {"openai": [{"id": "m", "imageOnly": true}]} | imageOnly is no chat model
""")
def test_settings_that_can_never_work_are_named_by_their_field(home, main, providers, words):
    (home / "settings.json").write_text(f'{{"modelProviders": {providers}}}')
    code, said = main("status", "--json", "--offline")
    facts = json.loads(said)
    assert (code, facts["status"]) == (1, "no") and words in facts["problem"]


def test_status_writes_no_file(home, upstream, monkeypatch, capsys):  # U2
    text = write_login(home, upstream).read_text()
    os.unlink(home / "oauth_creds.json")
    monkeypatch.setenv("QWEN_CLI_AUTH", text)
    for arguments in (["status"], ["status", "--json"], ["status", "--offline"]):
        assert qp.main(arguments) == 1
        assert "not checked" in capsys.readouterr().out and os.listdir(home) == []


@pytest.mark.parametrize("encoding", ["cp1252", "ascii", "utf-8"])
@pytest.mark.parametrize("arguments", [[], ["--json"]], ids=str)
def test_status_is_said_in_any_encoding(home, upstream, monkeypatch, encoding, arguments):  # O4
    monkeypatch.setenv("PYTHONIOENCODING", encoding)
    monkeypatch.setenv("OPENAI_API_KEY", "sk-good-1")
    command = [*program(), "status", "--offline", "--base-url", upstream.dashscope]
    done = subprocess.run([*command, "--model", "m\u6a21\u2013", *arguments], capture_output=True)
    assert done.returncode == 1 and done.stderr == b""
    encoding, said = encoding.partition(":")[0], done.stdout
    model = "m\u6a21\u2013".encode(encoding, "backslashreplace")
    assert json.loads(said)["model"] == "m\u6a21\u2013" if arguments else model in said


@posix
@pytest.mark.parametrize("command", ["| head -0", ">&-", "--json 2>&- | true"])
def test_a_reader_that_leaves_is_no_error(login, command):  # O4
    script = f"{shlex.join(program())} status --offline {command}; exit ${{PIPESTATUS[0]}}"
    done = subprocess.run(["bash", "-c", script], capture_output=True)
    assert (done.returncode, done.stderr) == (1, b"")


@pytest.mark.parametrize(
    "proxy", ["socks5://u:pass-word@127.0.0.1:9", "SOCKS5h://127.0.0.1:9", "socks4://127.0.0.1:9"]
)
@pytest.mark.parametrize("variable", ["HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "ALL_PROXY"])
def test_a_socks_proxy_is_named(keyed, upstream, monkeypatch, main, variable, proxy):  # O7
    monkeypatch.setenv(variable, proxy)
    upstream.models, is_used = ["m"], variable != "ALL_PROXY"
    command = ["status", "--base-url", upstream.dashscope, "--model=m"]
    code, said = main(*command, "--json")
    facts = json.loads(said)
    assert code == is_used and bool(facts["forward_proxy"]) == is_used
    status, _, answer = chat(keyed())
    assert status == (502 if is_used else 200)
    if is_used:
        assert answer["error"]["message"] == facts["problem"]
        for words in (f"{variable} names a SOCKS proxy", "127.0.0.1 in NO_PROXY"):
            assert words in facts["problem"] and "pass-word" not in facts["problem"]
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    code, said = main(*command)
    assert code == 0 and "forward proxy none" in said


@rows("""
answer | soon | later
wrong key | refusal("Incorrect API key provided.", 401, "invalid_api_key") | 503 | 503
no quota | refusal("Your quota will reset at 5", 429, "x") | 503 | 503
busy | refusal("no", 503, "x") | 503 | 200
rate | refusal("rate limit", 429, "x") | 200 | 200
no model | refusal("no such model", 404, "model_not_found") | 200 | 200
bad request | refusal("bad", 400, "x") | 200 | 200
cut | stream(*HELLO[:3], CUT) | 200 | 200
""")
def test_health_keeps_a_refusal_until_a_success(keyed, upstream, monkeypatch, answer, soon, later):
    soon, later = int(soon), int(later)
    server = keyed(retries=0)  # U1
    ago = [0]
    monkeypatch.setattr(qp.time, "time", lambda real=time.time: real() + ago[0])

    def health():
        return get(server, "/health")

    assert health()[1]["last_refusal"] is None
    upstream.script.append(value_of(answer))
    chat(server)
    assert health()[0] == soon and health()[1]["status"] == ("ok" if soon == 200 else "refused")
    refused = health()[1]["last_refusal"]
    assert bool(refused) == (soon == 503) and (not refused or refused["message"] and refused["at"])
    ago[0] = 100
    assert health()[0] == later and health()[1]["last_refusal"] == refused
    assert chat(server)[0] == 200 and health()[0] == 200 and health()[1]["last_refusal"] is None
