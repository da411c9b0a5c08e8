#!/usr/bin/env python3
"""Qwen for every OpenAI client: one file, standard library only.

The login that the Qwen Code CLI keeps on this machine becomes an OpenAI-compatible API on localhost:

    python3 qwen_proxy.py --port 8080      then use http://localhost:8080/v1 with any key
    python3 qwen_proxy.py --demo           the same with a built-in stand-in, no account needed
    python3 qwen_proxy.py login            log in with the browser (writes oauth_creds.json)
    python3 qwen_proxy.py status           which login would be used, from where, until when

What it touches
    reads     ~/.qwen/oauth_creds*.json, settings.json, trustedFolders.json and .env (QWEN_HOME moves them),
              ~/.env, the system settings of Qwen Code, .qwen/ and .env of a trusted working directory
    writes    ~/.qwen/oauth_creds.json (mode 0600) when the access token is refreshed, and while it does
              so ~/.qwen/oauth_creds.lock and a temporary file beside it; nothing else
    connects  to chat.qwen.ai for log-in and refresh, and to the base URL of the provider in use, over
              the forward proxy of HTTP(S)_PROXY if there is one; every host is in 'Constants' below
    listens   on 127.0.0.1 and ::1, port 8080, unless told otherwise

What it never does: telemetry, update checks, prompts on disk, running tools for the model, trying a key
at a host that it was not issued for, posing as another client, deleting or blanking a file of yours.

How to read on: each section uses only those above it. The life of a token is section 'Credentials'; what
changes between client and Qwen is 'Requests' and 'Responses', two pure translations; 'Server' is the rest.

To vendor it, copy the file. Importing it starts nothing:

    import threading, qwen_proxy
    server = qwen_proxy.make_server(port=0)                 # arguments: see make_server
    threading.Thread(target=server.serve_forever).start()
    print(server.url)                                       # http://localhost:PORT/v1
    server.shutdown()                                       # ends serve_forever, closes the port
"""

from __future__ import annotations

import argparse
import atexit
import base64
import collections
import concurrent.futures
import contextlib
import copy
import errno
import fnmatch
import functools
import gc
import hashlib
import hmac
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import logging.handlers
import os
import platform
import queue
import random
import re
import secrets
import select
import signal
import socket
import ssl
import stat
import struct
import sys
import tempfile
import threading
import time
import traceback
import urllib.error
import urllib.parse
import urllib.request
import uuid
import zlib
from email.utils import parsedate_to_datetime
from typing import Any, Callable, Iterable, Iterator, List, NamedTuple, Optional, Tuple

__version__ = "1.0.0"
__all__ = ["make_server", "ProxyServer", "ProxyError", "CredentialError", "UpstreamError", "main"]

log = logging.getLogger("qwen_proxy")


# ------------------------------------------------------------------------------------------------
# Constants
# ------------------------------------------------------------------------------------------------
# Times are seconds and sizes are bytes unless the name says otherwise. No other section names a
# host.

# OAuth of the Qwen Code CLI: device authorization (RFC 8628) with PKCE (RFC 7636), public client.
# Qwen Code, packages/core/src/qwen/qwenOAuth2.ts.
OAUTH_BASE_URL = "https://chat.qwen.ai"
DEVICE_CODE_PATH = "/api/v1/oauth2/device/code"
TOKEN_PATH = "/api/v1/oauth2/token"
CLIENT_ID = "f0304373b74a44d2b584a3fb70ca9e56"
SCOPE = "openid profile email model.completion"
DEVICE_GRANT = "urn:ietf:params:oauth:grant-type:device_code"
# where a login that names no resource_url is served
PORTAL_RESOURCE_URL = "portal.qwen.ai"
# the one model id that an OAuth login serves
OAUTH_MODEL = "coder-model"
# QwenLM/qwen-code PR #3291
FREE_TIER_END = "2026-04-15"

# A provider's name on the command line: its base URL and the variable that holds its key.
# Qwen Code, the presets of its /auth dialogue.
PRESETS = {
    "coding": ("https://coding.dashscope.aliyuncs.com/v1", "BAILIAN_CODING_PLAN_API_KEY"),
    "coding-intl": ("https://coding-intl.dashscope.aliyuncs.com/v1", "BAILIAN_CODING_PLAN_API_KEY"),
    "token-cn": (
        "https://token-plan.cn-beijing.maas.aliyuncs.com/compatible-mode/v1",
        "BAILIAN_TOKEN_PLAN_API_KEY",
    ),
    "token-intl": (
        "https://token-plan.ap-southeast-1.maas.aliyuncs.com/compatible-mode/v1",
        "BAILIAN_TOKEN_PLAN_API_KEY",
    ),
    "dashscope": ("https://dashscope.aliyuncs.com/compatible-mode/v1", "DASHSCOPE_API_KEY"),
    "dashscope-intl": (
        "https://dashscope-intl.aliyuncs.com/compatible-mode/v1",
        "DASHSCOPE_API_KEY",
    ),
    "dashscope-us": ("https://dashscope-us.aliyuncs.com/compatible-mode/v1", "DASHSCOPE_API_KEY"),
    "dashscope-hk": (
        "https://cn-hongkong.dashscope.aliyuncs.com/compatible-mode/v1",
        "DASHSCOPE_API_KEY",
    ),
    "openrouter": ("https://openrouter.ai/api/v1", "OPENROUTER_API_KEY"),
    "modelscope": ("https://api-inference.modelscope.cn/v1", "MODELSCOPE_API_KEY"),
}

# Endpoint families: which dialect a base URL speaks. First match of host, then of path (a gateway,
# a fake).
FAMILIES_BY_HOST = (
    (r"(^|\.)coding(-intl)?\.dashscope\.aliyuncs\.com$", "coding"),
    (r"^token-plan\..*\.maas\.aliyuncs\.com$", "token"),
    (r"(^|\.)dashscope(-intl|-us|-finance)?\.aliyuncs\.com$", "dashscope"),
    (r"\.maas\.aliyuncs\.com$|\.(alibaba|aliyun)-inc\.com$|\.alicloudapi\.com$", "dashscope"),
    (r"(^|\.)portal\.qwen\.ai$", "portal"),
    (r"(^|\.)openrouter\.ai$", "openrouter"),
    (r"(^|\.)modelscope\.cn$", "modelscope"),
    (r"(^|\.)deepseek\.com$", "deepseek"),
    (r"(^|\.)(z\.ai|bigmodel\.cn)$", "zai"),
)
FAMILIES_BY_VARIABLE = {
    "BAILIAN_CODING_PLAN_API_KEY": "coding",
    "BAILIAN_TOKEN_PLAN_API_KEY": "token",
    "DASHSCOPE_API_KEY": "dashscope",
    "OPENROUTER_API_KEY": "openrouter",
    "MODELSCOPE_API_KEY": "modelscope",
}
ALIBABA_FAMILIES = frozenset({"portal", "coding", "token", "dashscope"})

# The Coding Plan and the Token Plan are asked for no list of models; these are the CLI's own
# presets.
# Qwen Code 0.24.4, model-providers.
PLAN_MODELS = {
    "coding": (
        "qwen3.7-plus",
        "qwen3.6-plus",
        "qwen3.5-plus",
        "glm-5",
        "kimi-k2.5",
        "MiniMax-M2.5",
        "qwen3-coder-plus",
        "qwen3-coder-next",
        "qwen3-max-2026-01-23",
        "glm-4.7",
    ),
    "token": (
        "qwen3.7-plus",
        "qwen3.6-plus",
        "qwen3.7-max",
        "qwen3.8-max",
        "qwen3.8-max-preview",
        "qwen3.6-flash",
        "qwen3.8-flash",
        "deepseek-v4-pro",
        "deepseek-v4-flash-0731",
        "deepseek-v3.2",
        "kimi-k2.7-code",
        "kimi-k2.6",
        "kimi-k2.5",
        "glm-5.2",
        "glm-5.1",
        "glm-5",
        "MiniMax-M2.5",
    ),
}
# Qwen Code 0.24.4, when nothing else names one
DEFAULT_MODEL = "qwen3.7-max"

# look at oauth_creds.json no more often: with many clients it is a cost
FILE_CHECK_INTERVAL = 0.05
# a token counts as expired this long before it is: the CLI's own margin
REFRESH_MARGIN = 30
# one attempt while holding the lock: a CLI before 0.24 breaks it after 10 s
REFRESH_TIMEOUT = 8
# before a login that could not be written is tried again
SAVE_PAUSE = 30
# after a failure that may pass, requests fail at once for this long
REFRESH_PAUSE = 5
# Qwen Code 0.24, sharedTokenManager.ts: a lock older than this is broken
LOCK_STALE = 35
LOCK_WAIT_FIRST, LOCK_WAIT_FACTOR, LOCK_WAIT_MOST = 0.1, 1.5, 2.0
LOGIN_POLL_FIRST, LOGIN_POLL_MOST = (
    2.0,
    10.0,
    # RFC 8628 3.5; the CLI's first interval and its ceiling
)

CONNECT_TIMEOUT = 10
# longest silence of the upstream
UPSTREAM_TIMEOUT = 300
# a streaming client hears something at least this often
KEEP_ALIVE_INTERVAL = 15
RETRIES = 2
# doubled each time
RETRY_DELAY_FIRST = 0.5
# a Retry-After beyond this is the client's to wait for
RETRY_DELAY_MOST = 10
RETRY_STATUSES = frozenset({429, 502, 503, 529})
# of a body, each without what was refused by name: one reason may hide another
MAX_REPAIRS = 2
# no retry and no failover begins later than this: clients have timeouts too
PATIENCE = 30
# a provider that another one stood in for comes last for so long
REST_AFTER_FAILURE = 60
# kept open to each upstream
IDLE_CONNECTIONS = 64
# shorter than the idle limit of any gateway we know
IDLE_CONNECTION_AGE = 30
# for what an upstream still sends after [DONE]
DRAIN_TIMEOUT = 0.25

# a live list of models is asked for again after this long
MODELS_AGE = 300
# and after this long if there was none to be had
MODELS_AGE_FAILED = 30
# GET /v1/models waits no longer for one: LibreChat gives it 5 s, Claude Code 3
MODELS_WAIT = 0.8
# what such a request itself may take; Qwen Code's own limits
MODELS_TIMEOUT = 5
MODELS_SIZE = 1_048_576
# no dependable /models: Coding Plan FAQ
UNLISTED_FAMILIES = frozenset({"portal", "coding"})

# Texts in one request to /embeddings. Model Studio, 'Text embedding'; langchain4j #1140 for v1 and
# v2.
EMBEDDING_BATCHES = (("text-embedding-v[12]*", 25), ("*", 10))
# OpenAI reference, embeddings
MAX_EMBEDDING_INPUTS = 2048
PARALLEL_BATCHES = 4

# What a family of endpoints is known not to have, and the way out.
UNSERVED = {
    (
        "/embeddings",
        "portal",
    ): "an OAuth login serves chat only; embeddings need a standard key (--provider dashscope)",
    (
        "/embeddings",
        "coding",
    ): "the Coding Plan has no embeddings; they need a standard key (--provider dashscope)",
    ("/completions", "portal"): "an OAuth login serves chat only; use /v1/chat/completions",
    ("/completions", "coding"): "the Coding Plan has no text completions; use /v1/chat/completions",
}

MAX_CONNECTIONS = 1024
# above that, so many at a time are told why; the others are just closed
TURNED_AWAY = 8
MAX_BODY_MIB = 64
# request line or one header line
MAX_LINE = 65536
MAX_HEADERS = 100
# all headers together
MAX_HEAD = 262_144
MAX_ERROR_BODY = 262_144
# of the CLI's settings and login files
MAX_FILE = 4_194_304
# so much of an error is searched for what it means
CLASSIFIED = 10_000
LONGEST_START = (
    # of a text, where it is looked at for more than it says: thoughts, fences, repetition
    2000
)
# of answers to /v1/responses, see ItemMemory
MAX_ITEM_MEMORY = 4_194_304
# one event of a stream, or a whole answer that was not streamed
MAX_EVENT = 64 * 1024 * 1024
MAX_ANSWER = (
    128 * 1024 * 1024
    # characters of one text that is held to its end; a stream of chunks holds none
)
MAX_MODEL_ID = 512
# of one number: CPython before 3.11 takes quadratic time for more
MAX_JSON_DIGITS = 1000
# a client's connection between requests
IDLE_TIMEOUT = 75
# from the first byte of a request to the end of its headers
HEADER_TIMEOUT = 20
# for the body, and one second more for every
BODY_TIMEOUT = 60
# bytes of it
BODY_RATE = 65_536
# of a refused request: it is read and dropped, so that the connection stays,
SMALL_BODY = 65_536
# if it arrives within this time
DROP_TIMEOUT = 1
# a client that takes nothing for this long has left
WRITE_TIMEOUT = 60
# for what `status` asks an upstream
STATUS_TIMEOUT = 3
# from the first signal to the end: docker kills after 10
GRACE = 8
# of it, for what running streams are told and the last log lines
LAST_WORDS = 1.5
# openai-node sleeps any Retry-After, openai-python none above 60
RETRY_AFTER_MOST = 60
# new containers before the collector looks at the young ones
GC_THRESHOLD = 20_000
SWITCH_INTERVAL = (
    # between threads; CPython's 0.005 costs 15 % more with 100 streams, measured here
    0.05
)
# lines that wait for a terminal that takes none; more are lost
LOG_MOST = 10_000
# read at most this much at once; 65,536 costs 20 KiB more a stream and is no faster
PIECE = 16_384

LOCAL_ORIGINS = re.compile(
    r"(https?://(localhost|127\.\d+\.\d+\.\d+|\[::1\]|tauri\.localhost)(:\d+)?"
    r"|(app|tauri|vscode-webview|vscode-file)://.*)\Z",
    re.I,
)


class ModelFacts(NamedTuple):
    """What is known of a model: tokens of context and output, how it thinks, whether it sees images.

    thinking is 'none', 'off' or 'on' (it can be switched, and is so by default), 'effort' (on, with
    levels), 'always', or 'unknown'.
    """

    pattern: str
    context: int | None = None
    output: int | None = None
    thinking: str = "unknown"
    vision: bool | None = None


# First match of the id without its vendor prefix, in lower case. State of 2026-11: Qwen Code 0.24.4
# (tokenLimits.ts, modality table), Model Studio 'Deep thinking' and model pages, models.dev.
MODELS = tuple(
    ModelFacts(*row)
    for row in (
        ("qwen3.8-max*", 1_000_000, 131_072, "effort", True),
        ("qwen3.8-*", 1_000_000, 131_072, "effort", True),
        ("coder-model", 1_000_000, 65_536, "on", True),
        ("qwen3.[567]-plus*", 1_000_000, 65_536, "on", True),
        ("qwen3.[567]*", 1_000_000, 65_536, "on", False),
        ("qwen3-coder-next*", 262_144, 65_536, "none", False),
        ("qwen3-coder*", 1_000_000, 65_536, "none", False),
        ("qwen3-vl-*-thinking*", 262_144, 32_768, "always", True),
        ("qwen3-vl-*", 262_144, 32_768, "off", True),
        ("qwen3-omni*", 65_536, 16_384, "off", True),
        ("qwen3-max*", 262_144, 65_536, "off", False),
        ("qwen3-*-thinking*", 131_072, None, "always", False),
        ("qwen3-*", 131_072, None, "on", False),
        ("qwen-vl-max*", 131_072, 8_192, "none", True),
        ("qwen-vl*", 131_072, None, "none", True),
        ("qwen-turbo*", 1_000_000, 16_384, "off", False),
        ("qwen-plus*", 1_000_000, 32_768, "off", False),
        ("qwen-flash*", 1_000_000, 32_768, "off", False),
        ("qwq*", 131_072, None, "always", False),
        ("qvq*", 131_072, None, "always", True),
        ("kimi-k3*", 1_000_000, 131_072, "always", True),
        ("kimi-k2.7-code*", 262_144, None, "always", True),
        ("kimi-k2.5*", 262_144, 32_768, "on", True),
        ("kimi-*", 262_144, None, "on", True),
        ("glm-5.[2-9]*", 1_000_000, 131_072, "on", False),
        ("glm-5*", 202_752, 131_072, "on", False),
        ("glm-4.7*", 202_752, 16_384, "on", False),
        ("deepseek-v4*", 1_000_000, 384_000, "on", False),
        ("deepseek-v3*", 131_072, None, "off", False),
        ("deepseek-r*", 131_072, 65_536, "always", False),
        ("minimax-m2.5*", 196_608, 65_536, "always", False),
        ("minimax-m3*", 1_000_000, None, "always", True),
        ("*",),
    )
)


@functools.lru_cache(maxsize=256)
def model_facts(model: str) -> ModelFacts:
    """The row of MODELS for a model id; the last row, which knows nothing, for an unknown one."""
    name = model.rsplit("/", 1)[-1].lower()
    return next(row for row in MODELS if fnmatch.fnmatchcase(name, row.pattern))


# ------------------------------------------------------------------------------------------------
# Errors
# ------------------------------------------------------------------------------------------------


class ProxyError(Exception):
    """A failure that is told to the client: an HTTP status and OpenAI's error object.

        ProxyError
          +-- BadRequest        400  what the client sent cannot be served
          +-- CredentialError   401  there is no usable login
          +-- UpstreamError     502  the other side refused, broke off or could not be reached

    status: of the answer; type, code, param: of the error object; request_id: the upstream's handle for
    its support; headers: more headers for the answer; retry: whether the same request may succeed in a
    moment; retry_after: seconds, where the upstream said so; moves_on: whether another provider may help.
    """

    status, type, code = 500, "api_error", None
    retry = moves_on = False

    def __init__(
        self,
        message: str,
        status: int | None = None,
        code: str | None = None,
        type: str | None = None,
        param: str | None = None,
        request_id: str | None = None,
        headers: Iterable[tuple[str, str]] = (),
        retry: bool | None = None,
        retry_after: float | None = None,
        moves_on: bool | None = None,
    ):
        super().__init__(message)
        self.message, self.param, self.request_id, self.retry_after = (
            message,
            param,
            request_id,
            retry_after,
        )
        self.headers = list(headers)
        for name, value in (
            ("status", status),
            ("code", code),
            ("type", type),
            ("retry", retry),
            ("moves_on", moves_on),
        ):
            if value is not None:
                setattr(self, name, value)

    def error_object(self) -> dict:
        """OpenAI's error object, as it may leave the program."""
        return {
            "message": public(self.message, keep="\n\t"),
            "type": self.type,
            "param": self.param and public(self.param),
            "code": self.code and public(self.code),
        }

    def body(self) -> dict:
        """The body of an error answer: the error object, and the upstream's request_id where there is one."""
        body = {"error": self.error_object()}
        return {**body, "request_id": public(self.request_id)} if self.request_id else body


class BadRequest(ProxyError):
    """The client's request cannot be served as it is."""

    status, type = 400, "invalid_request_error"


class CredentialError(ProxyError):
    """There is no usable login; the message says how to get one."""

    status, type, code, moves_on = 401, "authentication_error", "invalid_api_key", True


class UpstreamError(ProxyError):
    """The upstream refused, broke off, or could not be reached."""

    status, type = 502, "upstream_error"


class ClientGone(Exception):
    """The client closed its connection; nobody waits for the answer any more."""


class ShuttingDown(Exception):
    """The server stops and this answer has used up its time of grace."""


class Secrets:
    """The values that must not leave the program, in every form in which they travel.

    Any thread may add one. Values of fewer than 6 characters cannot be told from ordinary words and are
    not kept. Tokens that rotate give way to newer ones, so that a long run does not collect them.
    """

    # neither JSON nor a URL has another spelling for these
    PLAIN = re.compile(r"[\w.~-]*\Z", re.A)
    SHAPES = re.compile(
        r"(?<=://)[^/@\s]+(?=@)|\b(sk|ms)-[A-Za-z0-9_-]{8,}"
        r"|\beyJ[A-Za-z0-9_-]{10,}[A-Za-z0-9._-]*|(?<=Bearer )(?!YOUR_KEY)[^\s\"',]{6,}"
    )
    # without one of these no shape matches
    SIGNS = ("://", "sk-", "ms-", "eyJ", "Bearer ")
    BACKSLASH = r"(?:\\|%(?:25)*5c)"
    BASE64 = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/_-=\\")
    ROTATING = 64

    def __init__(self) -> None:
        self._lock, self._rotating = threading.Lock(), collections.deque()  # type: ignore[var-annotated]
        self._values: dict[str, set[str]] = {}
        self._forms: list[str] = []
        self._encoded: set[str] = set()
        self._patterns: list[re.Pattern[str]] = []

    def add(self, value: Any, rotates: bool = False) -> None:
        """From now on mask() hides this value."""
        if not isinstance(value, str) or len(value) < 6 or value in self._values:
            return
        with self._lock:
            self._encoded = {*self._encoded, *self.encoded_forms(value)}
            self._values[value] = {value, *self.encoded_forms(value)}
            if not self.PLAIN.match(value):
                self._patterns = [*self._patterns, self.pattern(value)]
                self._patterns.sort(key=lambda pattern: -len(pattern.pattern))
            if rotates:
                self._rotating.append(value)
                if len(self._rotating) > self.ROTATING:
                    gone = self._rotating.popleft()
                    self._values.pop(gone, None)
                    self._encoded -= self.encoded_forms(gone)
            # The longest first: a secret that contains another one is masked whole.
            self._forms = sorted(set().union(*self._values.values()), key=len, reverse=True)

    @classmethod
    def pattern(cls, value: str) -> re.Pattern[str]:
        """The value in every spelling of JSON and of URLs, also of one within another, each with more \\ or %25."""
        parts = []
        for char in value:
            escape = json.dumps(char)[1:-1]
            ways = [re.escape(char)] if char != "\\" else []
            ways += [
                "".join(
                    "%(?:25)*" + f"{byte:02x}" for byte in char.encode("utf-8", "surrogatepass")
                )
            ]
            if char in '\\"/':
                ways = (
                    [cls.BACKSLASH + "+"]
                    if char == "\\"
                    else [f"{cls.BACKSLASH}*{way}" for way in ways]
                )
            elif escape != char:
                ways.append("".join(cls.BACKSLASH + "+" + part for part in escape.split("\\")[1:]))
            elif char == " ":
                ways.append(r"\+")
            parts.append(char if cls.PLAIN.match(char) and char != "." else f"(?:{'|'.join(ways)})")
        return re.compile("".join(parts), re.I)

    @staticmethod
    def encoded_forms(value: str) -> set[str]:
        """What base64 makes of the value, behind whatever user name or scheme: the part that holds nothing else."""
        data, found = value.encode("utf-8", "replace"), set()
        for before in range(3):
            encoded = base64.b64encode(bytes(before) + data).decode()[
                (before * 4 + 2) // 3 : (before + len(data)) * 4 // 3
            ]
            found |= {
                encoded,
                encoded.replace("+", "-").replace("/", "_"),
                encoded.replace("/", "\\/"),
            }
        return found

    def mask(self, text: str) -> str:
        """The text without secrets: those that are known, and anything shaped like a key."""
        for pattern in self._patterns:
            text = pattern.sub("***", text)
        for form in self._forms:
            if form in text:
                text = self._without(text, form)
        return self.SHAPES.sub("***", text) if any(sign in text for sign in self.SIGNS) else text

    def _without(self, text: str, form: str) -> str:
        """The text with *** for a form, and of an encoded one for all of the word that it is in."""
        parts, done, at = [], 0, text.find(form)
        while at >= 0:
            start, end = at, at + len(form)
            if form in self._encoded:
                while start > done and text[start - 1] in self.BASE64:
                    start -= 1
                while end < len(text) and text[end] in self.BASE64:
                    end += 1
            parts += [text[done:start], "***"]
            done, at = end, text.find(form, end)
        return "".join([*parts, text[done:]])


SECRETS = Secrets()
keep_secret = SECRETS.add


def keep_userinfo(url: str) -> None:
    """Keep user name and password of a URL secret, also those that a URL may not hold unquoted."""
    userinfo, at, _ = (url.partition("://")[2] or url).rpartition("@")
    if at and ":" in userinfo:
        password = userinfo.partition(":")[2]
        # The pieces, too: one that holds / ? # or @ is read in part as a host.
        for part in (userinfo + "@", userinfo, password, *re.split("[/?#@]", password)):
            keep_secret(part)
            keep_secret(urllib.parse.unquote(part))


def forward_proxies() -> dict[str, str]:
    """The forward proxies of the environment by scheme, their passwords kept secret and quoted as URLs need it."""
    proxies = {}
    for scheme, url in urllib.request.getproxies().items():
        keep_userinfo(url)
        before, _, rest = url.rpartition("://")
        userinfo, at, host = rest.rpartition("@")
        quoted = urllib.parse.quote(userinfo, safe=":%", errors="replace")
        proxies[scheme] = (before + "://" if before else "") + quoted + at + host
    return proxies


_SECRET_NAME = re.compile(
    r"key|token|secret|passw|auth(?!or(?!iz))|credential|cookie|session", re.I
)
_PUBLIC_NAMES = frozenset(
    {
        "envkey",
        "http-referer",
        "referer",
        "x-openrouter-title",
        "x-title",
        "user-agent",
        "accept",
        "content-type",
    }
)


def keep_secrets_in(value: Any, name: str = "", holder: str = "") -> None:
    """Keep what is secret in a JSON value of settings: by its name, or by the object that holds it."""
    if isinstance(value, dict):
        is_holder = name in ("customHeaders", "headers", "extra_body")
        for key, item in value.items():
            keep_secrets_in(item, key, name if is_holder else holder)
    elif isinstance(value, list):
        for item in value:
            keep_secrets_in(item, name, holder)
    elif isinstance(value, str) and name.lower() not in _PUBLIC_NAMES:
        keep_userinfo(value)
        is_long = len(value) >= 12 and len(value.split()) == 1
        if (
            _SECRET_NAME.search(name)
            or holder in ("customHeaders", "headers")
            or holder == "extra_body"
            and is_long
        ):
            keep_secret(value)
            # behind Bearer or Basic
            keep_secret(value.partition(" ")[2])


def public(text: str, keep: str = "") -> str:
    """The text as it may leave the program: secrets masked, control characters made visible but those in `keep`.

    The one exit of what the program itself says: errors, header values, the log, the terminal. What a model
    answers is not the program's own word and does not pass here.

    >>> public("a\\x1b[31mb\\n"), public("a\\nb", keep="\\n")
    ('a\\\\x1b[31mb\\\\n', 'a\\nb')
    """
    text = SECRETS.mask(text)
    probe = text
    for char in keep:
        probe = probe.replace(char, "")
    if probe.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in text
    )


def shorten(text: str, limit: int) -> str:
    """The text cut to so many characters, after secrets were masked: a cut must not leave half of one."""
    return SECRETS.mask(text)[:limit]


class _PublicFilter(logging.Filter):
    """Lets nothing but public() lines into the log, so that no caller has to think of it."""

    def filter(self, record: logging.LogRecord) -> bool:
        record.msg, record.args = public(record.getMessage()), ()
        return True


log.addFilter(_PublicFilter())


def json_type(value: Any) -> str:
    """A JSON value's type in JSON's words."""
    names = {
        dict: "an object",
        list: "a list",
        str: "a string",
        bool: "a boolean",
        type(None): "null",
    }
    return names.get(type(value), "a number")


def read_regular(path: str, errors: str = "strict") -> tuple[str, os.stat_result]:
    """Text and status of a regular file; raises OSError for anything else, so that no pipe is waited for."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", path)
        if status.st_size > MAX_FILE:
            raise OSError(errno.EFBIG, f"it is larger than {MAX_FILE} bytes", path)
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read(MAX_FILE).decode("utf-8-sig", errors), status
    finally:
        os.close(handle)


# ------------------------------------------------------------------------------------------------
# Credentials
# ------------------------------------------------------------------------------------------------

LOGIN_AGAIN = "run `qwen` and then /auth, or `python3 qwen_proxy.py login`"
FREE_TIER_ENDED = (
    f"Qwen's free OAuth tier ended on {FREE_TIER_END}: a login still works, but chat does not. Configure an API key "
    "in the CLI (run `qwen`, then /auth), or start with --provider NAME and its key in the environment"
)


class Login(NamedTuple):
    """One state of oauth_creds.json. expires_at is in seconds; fields is the whole file, for saving."""

    access_token: str
    refresh_token: str
    expires_at: float
    resource_url: str
    fields: dict

    def is_fresh(self) -> bool:
        """Whether the access token can be used now (Qwen Code: until 30 s before it expires)."""
        return time.time() < self.expires_at - REFRESH_MARGIN


def parse_login(text: str) -> Login:
    """The login in the text of oauth_creds.json; raises CredentialError that names what is wrong.

    Qwen Code, sharedTokenManager.ts: the three strings and expiry_date, in milliseconds, are required.
    """
    try:
        fields = json.loads(text)
    except (ValueError, RecursionError):
        raise CredentialError("it is not JSON") from None
    if not isinstance(fields, dict):
        raise CredentialError("it is not a JSON object")
    return login_of(fields)


def login_of(fields: dict) -> Login:
    """The login in the fields of oauth_creds.json; raises CredentialError that names what is wrong."""
    for name in ("access_token", "refresh_token", "token_type"):
        if not isinstance(fields.get(name), str) or not fields[name]:
            raise CredentialError(f"it has no {name}")
    if not _TOKEN.match(fields["access_token"]):
        raise CredentialError("its access_token holds a character that no header may hold")
    expiry_date = fields.get("expiry_date")
    if (
        isinstance(expiry_date, bool)
        or not isinstance(expiry_date, (int, float))
        or not 0 < expiry_date < 1e17
    ):
        raise CredentialError("its expiry_date is not a time in milliseconds")
    keep_secret(fields["access_token"], rotates=True)
    keep_secret(fields["refresh_token"], rotates=True)
    resource_url = (
        PORTAL_RESOURCE_URL if fields.get("resource_url") in (None, "") else fields["resource_url"]
    )
    keep_userinfo(str(resource_url))
    fault = base_url_fault(
        base_url_of(resource_url) if isinstance(resource_url, str) else resource_url
    )
    if fault:
        raise CredentialError(f"its resource_url {fault}")
    return Login(
        fields["access_token"], fields["refresh_token"], expiry_date / 1000, resource_url, fields
    )


_TOKEN = re.compile(r"[\x21-\x7e]+\Z")


def login_from_answer(answer: dict, before: dict) -> Login:
    """The login after a token response (RFC 6749 5.1); fields of the file that it does not name are kept.

    Kept above all: the refresh token when the answer rotates none, and resource_url, whose loss makes
    the CLI fall back to a host that refuses the token. Raises UpstreamError for an answer that gives no
    new access token: the old one must not get a new expiry.
    """
    fields = {**before, "access_token": answer.get("access_token")}
    for name in ("refresh_token", "token_type", "resource_url"):
        if isinstance(answer.get(name), str) and _TOKEN.match(answer[name]):
            fields[name] = answer[name]
    fields.setdefault("token_type", "Bearer")
    fields.setdefault("resource_url", PORTAL_RESOURCE_URL)
    fields["expiry_date"] = int((time.time() + seconds_in(answer.get("expires_in"), 3600)) * 1000)
    try:
        return login_of(fields)
    except CredentialError as error:
        raise UpstreamError(
            f"the token endpoint's answer is unusable: {error.message}",
            503,
            "token_refresh_failed",
            retry=True,
            headers=[("Retry-After", str(REFRESH_PAUSE))],
        ) from None


def seconds_in(value: Any, default: float) -> float:
    """A span in seconds that an answer names; the default where it is no number of a sensible size."""
    is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return value if is_number and 0 < value < 1e9 else default


def base_url_fault(url: Any) -> str:
    """What is wrong with a base URL, as the end of a sentence; empty for one that can be used."""
    if not isinstance(url, str):
        return f"must be a string, not {json_type(url)}"
    try:
        parts = urllib.parse.urlsplit(url)
        is_good = (
            bool(re.match(r"[\w.-]+\Z|[0-9a-f:.]+\Z", parts.hostname or "")) and parts.port != 0
        )
    except ValueError:
        is_good = False
    if "@" in url.partition("://")[2].partition("/")[0]:
        return "must hold no user name and no password"
    if not is_good or parts.scheme not in ("http", "https") or " " in url or not url.isprintable():
        return "must begin with http:// or https:// and name a host"
    return ""


def base_url_of(resource_url: str) -> str:
    """portal.qwen.ai -> https://portal.qwen.ai/v1, as the CLI makes it."""
    url = resource_url if "://" in resource_url else "https://" + resource_url
    url = url.rstrip("/")
    return url if url.endswith("/v1") else url + "/v1"


class LockFile:
    """The CLI's own lock on oauth_creds.json: a file that exists while somebody refreshes.

    Qwen Code, sharedTokenManager.ts: created exclusively with a random UUID in it; busy ones are tried
    again after 100 ms, each time half as long again, up to 2 s; one older than 35 s belongs to nobody
    and is renamed away. An flock would not keep the CLI out.
    """

    _held: dict[str, LockFile] = {}

    def __init__(self, path: str, pause: Callable[[float], None] = time.sleep):
        self.path, self._owner, self._pause = path, str(uuid.uuid4()), pause

    def __enter__(self) -> LockFile:
        if not LockFile._held:
            atexit.register(LockFile.release_all)
        wait, seen, seen_since = LOCK_WAIT_FIRST, None, time.monotonic()
        while not self._create():
            holder = self._read()
            if holder != seen:
                seen, seen_since = holder, time.monotonic()
            if self._age(seen_since) > LOCK_STALE:
                self._break(holder)
                continue
            self._pause(wait)
            wait = min(wait * LOCK_WAIT_FACTOR, LOCK_WAIT_MOST)
        LockFile._held[self._owner] = self
        return self

    def __exit__(self, *_: Any) -> None:
        """Removes the lock if it is still ours: a slow refresh may have lost it to somebody else."""
        LockFile._held.pop(self._owner, None)
        holder = self._read()
        if holder and holder[0] == self._owner:
            with contextlib.suppress(OSError):
                os.unlink(self.path)

    @staticmethod
    def release_all() -> None:
        """For the end of the process: a CLI waits 29 s for a lock, but calls it stale only after 35."""
        for lock in list(LockFile._held.values()):
            lock.__exit__()

    def _create(self) -> bool:
        try:
            handle = os.open(self.path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        except FileExistsError:
            return False
        except PermissionError:
            # somebody is just deleting it
            if os.name == "nt" and os.path.exists(self.path):
                return False
            raise
        try:
            with os.fdopen(handle, "w") as file:
                file.write(self._owner)
        except OSError:
            # a full disk: a lock without its owner's name would stay for good
            os.unlink(self.path)
            raise
        return True

    def _read(self) -> tuple[str, int] | None:
        """Content and mtime (ns) of the lock as it is, or None when it is gone."""
        try:
            text, status = read_regular(self.path, "replace")
            return text[:100], status.st_mtime_ns
        except OSError:
            return None

    def _age(self, seen_since: float) -> float:
        """Its age, or how long we have seen it unchanged: a clock that jumped back must not hang us."""
        try:
            return max(time.time() - os.lstat(self.path).st_mtime, time.monotonic() - seen_since)
        except OSError:
            return 0

    def _break(self, holder: tuple[str, int] | None) -> None:
        """Rename a stale lock away; should it be a new one after all, put that back. Raises OSError."""
        away = f"{self.path}.stale.{uuid.uuid4()}"
        try:
            os.rename(self.path, away)
        except FileNotFoundError:
            return
        with contextlib.suppress(OSError):
            if holder is not None and read_regular(away, "replace")[0][:100] != holder[0]:
                os.link(away, self.path)
        with contextlib.suppress(OSError):
            os.unlink(away)


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    """Refuses every redirect."""

    def redirect_request(self, *_: Any) -> None:
        return None


class DeadlineSocket(socket.socket):
    """A socket that receives nothing after `deadline` (monotonic), however slowly the bytes drip in."""

    deadline = float("inf")

    def recv_into(self, *arguments: Any) -> int:
        """As socket's; raises socket.timeout at the deadline."""
        self.settimeout(time_left(self.deadline))
        return super().recv_into(*arguments)


class DeadlineTLSSocket(ssl.SSLSocket):
    """The TLS counterpart of DeadlineSocket."""

    deadline = float("inf")

    def recv_into(self, *arguments: Any) -> int:  # type: ignore[override]
        """As SSLSocket's; raises socket.timeout at the deadline."""
        self.settimeout(time_left(self.deadline))
        return super().recv_into(*arguments)


def time_left(deadline: float) -> float:
    """The seconds until a deadline; raises socket.timeout when there are none."""
    remaining = deadline - time.monotonic()
    if remaining <= 0:
        raise socket.timeout("timed out")
    return remaining


def connect_before(deadline: float) -> Callable[..., socket.socket]:
    """A socket.create_connection() with one deadline for all addresses of a name and all that is received."""

    def create_connection(address: tuple[str, int], *_: Any, **__: Any) -> socket.socket:
        failure: OSError = OSError("the host name has no address")
        for family, kind, protocol, _, place in socket.getaddrinfo(
            *address, type=socket.SOCK_STREAM
        ):
            connection = DeadlineSocket(family, kind, protocol)
            try:
                connection.deadline = deadline
                connection.settimeout(time_left(deadline))
                connection.connect(place)
                return connection
            except OSError as error:
                connection.close()
                failure = error
        raise failure

    return create_connection


class DeadlineHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """urllib's own connections, with one deadline for connect, head and body together."""

    def __init__(self, seconds: float):
        super().__init__()
        self._deadline = time.monotonic() + seconds

    def http_open(self, request: urllib.request.Request) -> Any:
        return self.do_open(
            functools.partial(self._connection, http.client.HTTPConnection), request
        )

    def https_open(self, request: urllib.request.Request) -> Any:
        context = ssl.create_default_context()
        context.sslsocket_class = type("_", (DeadlineTLSSocket,), {"deadline": self._deadline})
        return self.do_open(
            functools.partial(self._connection, http.client.HTTPSConnection),
            request,
            context=context,
        )

    def _connection(self, kind: Any, host: str, **arguments: Any) -> Any:
        connection = kind(host, **arguments)
        connection._create_connection = connect_before(self._deadline)
        return connection


def open_before(request: urllib.request.Request, seconds: float) -> Any:
    """The response to a request to the identity host, or for `status`; raises OSError, http.client.HTTPException.

    No redirect is followed: urllib would take our secrets along to the new place.
    """
    handlers = urllib.request.ProxyHandler(forward_proxies()), _NoRedirect, DeadlineHandler(seconds)
    try:
        return urllib.request.build_opener(*handlers).open(request, timeout=seconds)
    except urllib.error.HTTPError as error:
        return error


def post_form(
    url: str, fields: dict[str, str], headers: dict[str, str] | None = None
) -> tuple[int, dict | None, str]:
    """POST a form to the identity host: the HTTP status, the JSON object or None, and what the body is.

    Raises UpstreamError when no answer came within REFRESH_TIMEOUT. Status and body are judged by the
    caller, since the host sits behind a firewall that answers HTML with any status, which is no verdict
    on anything. The body itself is never quoted, since a token may be in it.
    """
    try:
        data = urllib.parse.urlencode(fields).encode()
        request = urllib.request.Request(
            url,
            data,
            {
                "Content-Type": "application/x-www-form-urlencoded",
                "Accept": "application/json",
                # Without a User-Agent of its own choice the host answers HTML (hermes-agent #7746).
                "User-Agent": f"qwen_proxy/{__version__}",
                **(headers or {}),
            },
        )
    except ValueError as error:
        raise UpstreamError(f"the address {url} or the login cannot be used: {error}") from error
    try:
        with open_before(request, REFRESH_TIMEOUT) as response:
            status, body = response.getcode(), response.read(MAX_ERROR_BODY)
    except (OSError, http.client.HTTPException) as error:
        raise UpstreamError(
            f"no answer from {host_of(url, with_port=True)}: {reason_of(error)}", retry=True
        ) from error
    try:
        answer = json.loads(body.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        answer = None
    if not isinstance(answer, dict):
        return status, None, described_body(body)
    for name in ("access_token", "refresh_token", "id_token", "device_code"):
        keep_secret(answer.get(name), rotates=True)
    detail = next(
        (
            answer[name]
            for name in ("error_description", "error")
            if isinstance(answer.get(name), str)
        ),
        "",
    )
    return status, answer, shorten(detail, 120) or "a JSON object without an error"


def described_body(body: bytes) -> str:
    """What a body is that must not be quoted.

    >>> described_body(b""), described_body(b"<html><title>Not now</title>"), described_body(b'{"access_tok')
    ('an empty body', "a web page ('Not now')", '12 bytes that are no JSON object')
    """
    text = body.decode("utf-8", "replace").strip()
    if not text:
        return "an empty body"
    return web_page(text) or f"{len(body)} bytes that are no JSON object"


def web_page(text: str) -> str:
    """'a web page', with its title, for text that is one; empty for other text."""
    if not re.match(r"<[!?a-zA-Z]", text):
        return ""
    title = re.search(r"<title[^>]*>(.*?)</title>", text[:CLASSIFIED], re.S | re.I)
    words = " ".join(SECRETS.mask(title.group(1)).split()) if title else ""
    return f"a web page ('{shorten(words, 80)}')" if words else "a web page"


def reason_of(error: BaseException) -> str:
    """A few words for a network failure, without Python's names for it."""
    error = getattr(error, "reason", error) if isinstance(error, urllib.error.URLError) else error
    if isinstance(error, socket.timeout):
        return "timed out"
    if isinstance(error, socket.gaierror):
        return "the host name cannot be resolved"
    if isinstance(error, ssl.SSLCertVerificationError):
        return f"its TLS certificate is not trusted ({error.verify_message}); a private CA goes into SSL_CERT_FILE"
    if isinstance(error, ssl.SSLError):
        return "TLS failed (%s)" % (error.reason or "connection closed")
    if isinstance(error, OSError) and error.strerror:
        return error.strerror[:1].lower() + error.strerror[1:]
    return str(error) or type(error).__name__


class OAuthCredentials:
    """The login in one oauth_creds.json, shared with the CLI and with other processes.

    Any number of threads may call it. The file is read again whenever it has changed, so a new login by
    the CLI counts at once; it is written only with a refreshed token, atomically, mode 0600.
    """

    kind = "oauth"

    def __init__(self, path: str, oauth_base_url: str = OAUTH_BASE_URL):
        self.path, self.problem = path, ""
        self._token_url = oauth_base_url.rstrip("/") + TOKEN_PATH
        self._refreshing, self._reading = threading.Lock(), threading.Lock()
        self._login: Login | None = None
        # when the file was last looked at (monotonic)
        self._looked = 0.0
        # when to try what could not be written (monotonic); 0: nothing
        self._save_again_at = 0.0
        self._signature: Any = ()
        # the refresh token that the token endpoint refused
        self._refused: str | None = None
        self._failure: tuple[float, ProxyError] | None = (
            # the last failed refresh and its time
            None
        )
        self.useless_token = (
            # fresh from a refresh and refused all the same: no use in another one
            ""
        )

    def access_token(self, rejected: str = "", pause: Callable[[float], None] = time.sleep) -> str:
        """A token that is valid now and is not `rejected`, the one an upstream has just refused.

        pause(seconds) is called while somebody else refreshes; it may raise to give up. Raises
        CredentialError when a new login is needed, UpstreamError when the refresh may work later.
        """
        asked = time.monotonic()
        login = self.login()
        if login.is_fresh() and login.access_token != rejected:
            if self._save_again_at and time.monotonic() > self._save_again_at:
                self._save_again(pause)
            return login.access_token
        while not self._refreshing.acquire(timeout=LOCK_WAIT_FIRST):
            pause(0)
        try:
            self._looked = 0.0
            login = self.login()
            if login.is_fresh() and login.access_token != rejected:
                return login.access_token
            # Those who waited while one attempt failed share its outcome instead of queueing for 8
            # s each.
            failure = self._failure
            if failure and (failure[0] > asked or time.monotonic() - failure[0] < REFRESH_PAUSE):
                raise copy.copy(
                    failure[1]
                    # a copy: one that is raised again and again keeps all its frames
                )
            try:
                login = self._refresh_locked(rejected, pause)
            except UpstreamError as error:
                self._failure = (time.monotonic(), copy.copy(error))
                raise
            self._failure = None
            return login.access_token
        finally:
            self._refreshing.release()

    def login(self, in_memory: bool = False) -> Login:
        """The login as it is now: the file if it has changed, else the copy in memory.

        A file that has become unreadable or is gone (the CLI deletes it when its own refresh is refused)
        does not end a login that memory still holds.
        """
        with self._reading:
            if self._login is None or not (
                in_memory or time.monotonic() - self._looked < FILE_CHECK_INTERVAL
            ):
                self._look_at_file()
            if self._login is None:
                raise CredentialError(
                    f"no usable login in {self.path}: {self.problem}; {LOGIN_AGAIN}"
                )
            return self._login

    def is_there(self) -> bool:
        """Whether there is a file, or was one that memory still holds."""
        return self._login is not None or os.path.exists(self.path)

    def base_url(self) -> str:
        """Where this login is served."""
        return base_url_of(self.login(in_memory=True).resource_url)

    def describe(self) -> dict:
        """Facts for /health and status; nothing secret."""
        facts = {"type": self.kind, "path": self.path, "problem": self.problem or None}
        with contextlib.suppress(CredentialError):
            facts["expires_at"] = int(self.login().expires_at)
        return facts

    def replace(self, login: Login) -> None:
        """Put a new login in place of the old one, under the CLI's lock."""
        with self._refreshing, self._locked():
            self.save(login)

    def save(self, login: Login) -> None:
        """Write the login, by the holder of the lock; what cannot be written stays in memory, and says so."""
        with self._reading:
            self._login, self.problem, self._save_again_at = login, "", 0.0
            try:
                sweep_leftovers(self.path)
                write_private(self.path, json.dumps(login.fields, indent=2))
            except OSError as error:
                self._save_again_at = time.monotonic() + SAVE_PAUSE
                self.problem = f"it could not be saved ({reason_of(error)}), the new token is kept in memory only"
                log.warning("%s: %s", self.path, self.problem)
            self._signature = self._signature_of_file()

    def _save_again(self, pause: Callable[[float], None]) -> None:
        """Write what could not be written: a login that is in memory only ends with the process."""
        if not self._refreshing.acquire(blocking=False):
            return
        try:
            with self._locked(pause):
                login = self.login()
                # else the file has changed, and holds a newer login
                if self._save_again_at:
                    self.save(login)
        finally:
            self._refreshing.release()

    def _look_at_file(self) -> None:
        self._looked, signature = time.monotonic(), self._signature_of_file()
        if signature != self._signature:
            self._read(signature)

    def _signature_of_file(self) -> Any:
        try:
            status = os.stat(self.path)
        except OSError as error:
            return type(error).__name__
        return status.st_mtime_ns, status.st_size, status.st_ino

    def _read(self, signature: Any) -> None:
        try:
            login = parse_login(read_regular(self.path)[0])
        except (OSError, UnicodeError, CredentialError) as error:
            self.problem, self._signature = reason_of(error), signature
            if self._login:
                log.warning("%s: %s; the login in memory goes on", self.path, self.problem)
            return
        if self._login is None or login.refresh_token != self._login.refresh_token:
            self._refused = None
        self._login, self._signature, self._failure, self.problem, self._save_again_at = (
            login,
            signature,
            None,
            "",
            0.0,
        )

    def _refresh_locked(self, rejected: str, pause: Callable[[float], None]) -> Login:
        """Refresh under the CLI's lock, unless somebody else has done it meanwhile."""
        with self._locked(pause):
            # whoever held the lock before us has just written the file
            self._looked = 0.0
            login = self.login()
            if login.is_fresh() and login.access_token != rejected:
                return login
            return self._refresh(login)

    @contextlib.contextmanager
    def _locked(self, pause: Callable[[float], None] = time.sleep) -> Iterator[None]:
        with contextlib.ExitStack() as stack:
            folder = os.path.dirname(self.path)
            try:
                os.makedirs(folder, mode=0o700, exist_ok=True)
                stack.enter_context(LockFile(os.path.join(folder, "oauth_creds.lock"), pause))
            except (
                OSError
                # a read-only disk: nobody can write the file, so nobody needs the lock
            ) as error:
                log.warning("no lock in %s (%s); going on without", folder, reason_of(error))
            yield

    def _refresh(self, login: Login) -> Login:
        if login.refresh_token == self._refused:
            raise self._login_needed()
        status, answer, detail = post_form(
            self._token_url,
            {
                "grant_type": "refresh_token",
                "refresh_token": login.refresh_token,
                "client_id": CLIENT_ID,
            },
        )
        if status == 200 and answer and not answer.get("error"):
            refreshed = login_from_answer(answer, login.fields)
            self.save(refreshed)
            log.info(
                "refreshed the access token, valid for %d min",
                (refreshed.expires_at - time.time()) / 60,
            )
            return refreshed
        # Only JSON is a verdict (the firewall's HTML comes with any status), and only on this
        # refresh token.
        if status in (400, 401) and answer is not None:
            return self._refused_by_host(login, detail)
        raise UpstreamError(
            f"the token endpoint answered {status} ({detail}); the login is kept and tried again",
            503,
            "token_refresh_failed",
            retry=True,
            headers=[("Retry-After", str(REFRESH_PAUSE))],
        )

    def _refused_by_host(self, login: Login, detail: str) -> Login:
        """After a refusal: adopt what another process has put into the file, else remember the token as dead."""
        self._looked = 0.0
        current = self.login()
        if current.refresh_token != login.refresh_token and current.is_fresh():
            return current
        self._refused = login.refresh_token
        log.warning("the token endpoint refused the refresh token: %s", detail)
        raise self._login_needed()

    def _login_needed(self) -> CredentialError:
        return CredentialError(
            f"the login in {self.path} has expired and its refresh token was refused; {LOGIN_AGAIN}"
        )


# os.replace() fails so on a file that is mounted by itself, in a folder of somebody else's, across
# a mount.
NOT_REPLACEABLE = frozenset({errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV})


def write_private(path: str, text: str) -> None:
    """Write a login file, mode 0600: atomically where it can be renamed over, else in place; raises OSError.

    The new mtime is always later than the old one: the CLI reloads only then. Qwen Code,
    sharedTokenManager.ts. Everything is done by descriptor, so that nobody who may write into the folder
    can turn it to another file.
    """
    path, data = login_file(path), text.encode()
    try:
        before: os.stat_result | None = os.lstat(path)
    except FileNotFoundError:
        before = None
    if before is None or not hasattr(os, "geteuid") or os.geteuid() in (0, before.st_uid):
        try:
            return replace_file(path, data, before)
        except OSError as error:
            if before is None or error.errno not in NOT_REPLACEABLE:
                raise
    return overwrite_file(path, data, before)


def login_file(path: str) -> str:
    """The file to write for this path: itself, or what a link leads to, if that is a login file of the same owner.

    Raises OSError for a link to anything else: the refresh must not overwrite some other file of the user.
    """
    if not os.path.islink(path):
        return path
    target = os.path.realpath(path)
    try:
        text, status = read_regular(target)
        parse_login(text)
    except (OSError, ValueError, CredentialError) as error:
        raise OSError(
            errno.EPERM, f"it is a link to {target}, which is no login file ({reason_of(error)})"
        ) from None
    if status.st_uid != os.lstat(path).st_uid:
        raise OSError(errno.EPERM, f"it is a link to {target}, which belongs to another user")
    return target


def replace_file(path: str, data: bytes, before: os.stat_result | None) -> None:
    """Put a new file in the place of the old one, which keeps its owner; raises OSError."""
    temporary = f"{path}.qwen_proxy-{secrets.token_hex(6)}.tmp"
    handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | _OPEN_FLAGS, 0o600)
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(data)
            file.flush()
            if before and hasattr(os, "fchown") and before.st_uid != os.geteuid():
                os.fchown(
                    handle,
                    before.st_uid,
                    before.st_gid,
                    # root must not take it away from its user
                )
            finish_file(handle, before)
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(temporary)
        raise


def overwrite_file(path: str, data: bytes, before: os.stat_result) -> None:
    """Write over the old file, which stays whole JSON if the disk is full: blanks make room before, and fill up."""
    handle = os.open(path, os.O_WRONLY | _OPEN_FLAGS)
    try:
        status = os.fstat(handle)
        if not stat.S_ISREG(status.st_mode) or (status.st_dev, status.st_ino) != (
            before.st_dev,
            before.st_ino,
        ):
            raise OSError(errno.EPERM, "it was replaced meanwhile")
        try:
            write_at(handle, status.st_size, b" " * (len(data) - status.st_size))
        except OSError:
            os.ftruncate(handle, status.st_size)
            raise
        write_at(handle, 0, data.ljust(status.st_size))
        os.ftruncate(handle, len(data))
        finish_file(handle, before)
    finally:
        os.close(handle)


def write_at(handle: int, place: int, data: bytes) -> None:
    """Write all of the data to a place in a file."""
    os.lseek(handle, place, os.SEEK_SET)
    rest = memoryview(data)
    while rest:
        rest = rest[os.write(handle, rest) :]


_OPEN_FLAGS = (
    getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
)


def finish_file(handle: int, before: os.stat_result | None) -> None:
    """Mode, a later mtime than before, and all of it on the disk."""
    if hasattr(os, "fchmod"):
        # another user's file that we may write
        with contextlib.suppress(PermissionError):
            os.fchmod(handle, 0o600)
    os.fsync(handle)
    if before and os.fstat(handle).st_mtime_ns <= before.st_mtime_ns and os.name != "nt":
        with contextlib.suppress(PermissionError):
            os.utime(handle, ns=(before.st_atime_ns, before.st_mtime_ns + 1_000_000))


def sweep_leftovers(path: str) -> None:
    """Remove what a killed refresh of ours has left beside a login file; by the holder of the lock."""
    folder, name = os.path.split(path)
    leftover = re.compile(re.escape(name) + r"\.qwen_proxy-[0-9a-f]{12}\.tmp\Z")
    with contextlib.suppress(OSError):
        for found in filter(leftover.match, os.listdir(folder)):
            status = os.lstat(os.path.join(folder, found))
            if stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime > LOCK_STALE:
                os.unlink(os.path.join(folder, found))


def why_not_saved(path: str) -> str:
    """Why a refreshed login could not be saved in this file; empty where it can be, or there is none."""
    try:
        path = login_file(path)
    except OSError as error:
        return reason_of(error)
    if (
        not os.path.exists(path)
        or os.access(path, os.W_OK)
        or os.access(os.path.dirname(path), os.W_OK | os.X_OK)
    ):
        return ""
    return "it is read-only"


class ApiKey:
    """A key from settings, environment or command line, bound to the base URL of the same entry."""

    kind = "api-key"

    def __init__(self, value: str, source: str, problem: str = ""):
        self._value, self.source, self._problem = value, source, problem
        keep_secret(value)

    def access_token(self, rejected: str = "", pause: Callable[[float], None] = time.sleep) -> str:
        """The key; raises CredentialError when there is none, or its entry is wrong."""
        if self._problem:
            raise CredentialError(self._problem)
        return self._value

    def base_url(self) -> str:
        """For an entry whose base URL is wrong: raises CredentialError that says so."""
        raise CredentialError(self._problem)

    def describe(self) -> dict:
        """Facts for /health and status; nothing secret."""
        return {"type": self.kind, "source": self.source, "problem": self._problem or None}


class DeviceCode(NamedTuple):
    """An authorization that waits for its user (RFC 8628 3.2); expires_in is in seconds."""

    device_code: str
    code_verifier: str
    user_code: str
    verification_uri: str
    expires_in: float


def pkce_pair() -> tuple[str, str]:
    """code_verifier and its S256 code_challenge (RFC 7636 4.1, 4.2)."""
    code_verifier = base64.urlsafe_b64encode(secrets.token_bytes(32)).rstrip(b"=").decode()
    digest = hashlib.sha256(code_verifier.encode()).digest()
    return code_verifier, base64.urlsafe_b64encode(digest).rstrip(b"=").decode()


def request_device_code(oauth_base_url: str) -> DeviceCode:
    """Start a device authorization (RFC 8628 3.1); raises UpstreamError when the host refuses."""
    code_verifier, code_challenge = pkce_pair()
    status, answer, detail = post_form(
        oauth_base_url.rstrip("/") + DEVICE_CODE_PATH,
        {
            "client_id": CLIENT_ID,
            "scope": SCOPE,
            "code_challenge": code_challenge,
            "code_challenge_method": "S256",
        },
        {"x-request-id": str(uuid.uuid4())},
    )
    if not answer or not isinstance(answer.get("device_code"), str):
        raise UpstreamError(f"the device authorization endpoint answered {status}: {detail}")
    keep_secret(code_verifier)
    addresses = (answer.get("verification_uri_complete"), answer.get("verification_uri"))
    address = next((address for address in addresses if is_page_of(oauth_base_url, address)), None)
    if address is None:
        raise UpstreamError(
            "the device authorization endpoint named no page of its own site to approve the log-in at"
        )
    return DeviceCode(
        answer["device_code"],
        code_verifier,
        str(answer.get("user_code") or "")[:60],
        address,
        seconds_in(answer.get("expires_in"), 900),
    )


def is_page_of(base_url: str, address: Any) -> bool:
    """Whether an address is a page of the same site, in the same scheme: a browser would open anything.

    >>> is_page_of(OAUTH_BASE_URL, OAUTH_BASE_URL + "/authorize?user_code=AB"), is_page_of(OAUTH_BASE_URL, "file:///a")
    (True, False)
    """
    if base_url_fault(address):
        return False
    ours, theirs = urllib.parse.urlsplit(base_url), urllib.parse.urlsplit(address)
    host, other = ours.hostname or "", theirs.hostname or ""
    is_address = host.replace(".", "").isdigit() or ":" in host
    # chat.qwen.ai is a page of qwen.ai, and so are its other names.
    site = host if is_address or host.count(".") < 2 else host.partition(".")[2]
    return (other == site or other.endswith("." + site)) and theirs.scheme == ours.scheme


def poll_for_login(
    oauth_base_url: str, device: DeviceCode, sleep: Callable[[float], None] = time.sleep
) -> Login:
    """Wait until the user has approved (RFC 8628 3.4); raises CredentialError when that will not come.

    slow_down arrives as HTTP 429 here, not as RFC 8628's 400; a 200 with access_token null is 'pending'.
    Qwen Code, qwenOAuth2.ts.
    """
    interval, deadline = LOGIN_POLL_FIRST, time.monotonic() + device.expires_in
    while time.monotonic() < deadline:
        sleep(interval)
        try:
            status, answer, detail = post_form(
                oauth_base_url.rstrip("/") + TOKEN_PATH,
                {
                    "grant_type": DEVICE_GRANT,
                    "client_id": CLIENT_ID,
                    "device_code": device.device_code,
                    "code_verifier": device.code_verifier,
                },
            )
        except UpstreamError as error:
            # a network that comes and goes must not end the log-in
            log.warning("%s", error)
            continue
        reason = (answer or {}).get("error")
        if status == 200 and answer is not None and not reason:
            if answer.get("access_token") is not None:
                return login_from_answer(answer, {})
        elif reason == "authorization_pending":
            interval = LOGIN_POLL_FIRST
        elif reason == "slow_down":
            interval = min(interval * 1.5, LOGIN_POLL_MOST)
        elif reason == "access_denied":
            raise CredentialError(
                "the log-in was refused in the browser; run login again to start over"
            )
        elif reason == "expired_token" or status == 401:
            raise CredentialError("the code has expired; run login again for a new one")
        elif answer is not None or status < 500:
            raise CredentialError(
                f"the token endpoint answered {status}: {detail}; run login again"
            )
    raise CredentialError(
        "nobody approved the log-in within %d minutes; run login again" % (device.expires_in / 60)
    )


# ------------------------------------------------------------------------------------------------
# Providers
# ------------------------------------------------------------------------------------------------


class Options(NamedTuple):
    """What the command line or make_server() says about providers."""

    provider: str | None = None
    base_url: str | None = None
    model: str | None = None
    aliases: tuple[tuple[str, str], ...] = ()
    qwen_home: str | None = None
    failover: bool = False


class Provider:
    """One base URL with the one credential that belongs to it, and what it is known to serve.

    name: for --provider, `name/model` and x-qwen-provider; family: the dialect of its endpoints;
    entries: model id -> generationConfig of settings.json; source: where all this was found.
    """

    def __init__(
        self,
        name: str,
        base_url: str,
        credentials: Any,
        source: str,
        entries: dict[str, dict] | None = None,
        family: str | None = None,
    ):
        self.name, self.credentials, self.source, self.entries = (
            name,
            credentials,
            source,
            entries or {},
        )
        self.family = family or family_of(base_url)
        self._base_url = base_url.rstrip("/")
        # monotonic; another provider goes first until then
        self.rests_until = 0.0

    @property
    def stated_url(self) -> str:
        """The base URL that settings or options name; empty for an OAuth login."""
        return self._base_url

    @property
    def base_url(self) -> str:
        """Where it is; for an OAuth login the host that its file names now."""
        return self._base_url or self.credentials.base_url()

    def host(self) -> str:
        """The host of a base URL that settings or options name."""
        return host_of(self._base_url)

    def model_ids(self) -> list[str]:
        """The models that it is known to serve; empty when only the upstream itself knows."""
        return list(self.entries) or list(PLAN_MODELS.get(self.family, ()))

    def problem(self) -> str | None:
        """Why it cannot be used, in words; None when it can."""
        try:
            self.credentials.login() if self.credentials.kind == "oauth" else self.credentials.access_token()
        except CredentialError as error:
            return error.message
        return None

    def describe(self) -> dict:
        """Facts for status; nothing secret."""
        try:
            base_url: str | None = self.base_url
        except CredentialError:
            base_url = None
        return {
            "name": self.name,
            "family": self.family,
            "base_url": base_url,
            "source": self.source,
            "models": self.model_ids(),
            "login": self.credentials.describe(),
            "problem": self.problem(),
        }


class Route(NamedTuple):
    """A provider and the model id to ask it for."""

    provider: Provider
    model: str


class Discovery(NamedTuple):
    """All usable logins, the active one first, and the model for requests that name none."""

    providers: list[Provider]
    model: str
    # what a person should know: skipped files, ambiguous keys
    notes: list[str]
    settings_files: list[str]
    # settings that cannot be read: nothing stands in for what they may name
    problem: str = ""


def family_of(base_url: str, variable: str | None = None) -> str:
    """The dialect of a base URL: by host, else by path or the key's variable, else 'other'."""
    for pattern, family in FAMILIES_BY_HOST:
        if re.search(pattern, host_of(base_url)):
            return family
    if variable in FAMILIES_BY_VARIABLE:
        return FAMILIES_BY_VARIABLE[variable]
    return "dashscope" if "/compatible-mode/" in base_url + "/" else "other"


def qwen_home(environ: dict[str, str], option: str | None = None) -> str:
    """The folder of the CLI: --qwen-home, QWEN_HOME, ~/.qwen. Qwen Code, storage.ts."""
    home = environ.get("HOME") or os.path.expanduser("~")
    named = option or environ.get("QWEN_HOME")
    if not named:
        # Qwen Code reads QWEN_HOME from the home .env files too.
        for name in (".qwen/.env", ".env"):
            with contextlib.suppress(OSError):
                text = read_regular(os.path.join(home, name), "replace")[0]
                named = named or parse_dotenv(text).get("QWEN_HOME")
    if not named:
        return os.path.join(home if os.path.isabs(home) else tempfile.gettempdir(), ".qwen")
    if named == "~" or named.startswith(("~/", "~\\")):
        named = home + named[1:]
    return os.path.abspath(named)


_DOTENV_LINE = re.compile(
    r"""^[ \t]*(?:export[ \t]+)?([\w.-]+)[ \t]*[=:][ \t]*
    (?: "((?:\\.|[^"\\])*)" | '([^']*)' | `([^`]*)` | ([^#\r\n]*) )""",
    re.M | re.X,
)


def parse_dotenv(text: str) -> dict[str, str]:
    """NAME=value lines as the dotenv package reads them.

    >>> parse_dotenv('export A=1 # note\\nB="x\\\\ny"\\nC=\\'$A\\'') == {'A': '1', 'B': 'x\\ny', 'C': '$A'}
    True
    """
    values = {}
    for match in _DOTENV_LINE.finditer(text):
        name, double, single, back, bare = match.groups()
        if double is not None:
            values[name] = double.replace("\\n", "\n").replace("\\r", "\r").replace('\\"', '"')
        else:
            values[name] = next(
                value for value in (single, back, (bare or "").strip()) if value is not None
            )
    return values


_COMMENT_OR_STRING = re.compile(r'("(?:\\.|[^"\\])*")|//[^\r\n]*|/\*.*?\*/', re.S)


def parse_settings(text: str) -> dict:
    """The object in a settings.json, comments allowed; raises ValueError.

    >>> parse_settings('{"url": "http://x" /* why */ } // end')
    {'url': 'http://x'}
    """
    try:
        settings = json.loads(_COMMENT_OR_STRING.sub(lambda match: match.group(1) or " ", text))
    except RecursionError:
        raise ValueError("it is nested too deeply") from None
    if not isinstance(settings, dict):
        raise ValueError("it is not a JSON object")
    return settings


def expand_variables(value: Any, environ: dict[str, str]) -> Any:
    """$NAME and ${NAME} replaced in every string of a JSON value; unknown names stay as they are."""
    if isinstance(value, str):
        return re.sub(
            r"\$(?:(\w+)|\{(\w+)\})",
            lambda match: environ.get(match.group(1) or match.group(2)) or match.group(0),
            value,
        )
    if isinstance(value, dict):
        return {name: expand_variables(item, environ) for name, item in value.items()}
    return [expand_variables(item, environ) for item in value] if isinstance(value, list) else value


def merge(low: dict, high: dict) -> dict:
    """Two settings objects merged in depth; the second one wins."""
    merged = dict(low)
    for name, value in high.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = merge(merged[name], value) if both else value
    return merged


def as_object(value: Any) -> dict:
    """The value if it is an object, else an empty one: a wrong type in settings.json must not stop the start."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list:
    """The value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def as_text(value: Any) -> str:
    """The value if it is a string, else an empty one."""
    return value if isinstance(value, str) else ""


def host_of(url: str, with_port: bool = False) -> str:
    """The host of a URL, empty where it has none that can be read."""
    try:
        parts = urllib.parse.urlsplit(url)
        return (parts.netloc.rpartition("@")[2] if with_port else parts.hostname) or ""
    except ValueError:
        return ""


def dig(settings: Any, *path: str) -> Any:
    """settings[path[0]][path[1]]..., or None where a step is missing or not an object."""
    for name in path:
        settings = settings.get(name) if isinstance(settings, dict) else None
    return settings


class WatchedFiles:
    """The CLI's files in their last good state, and what they looked like when they were read.

    While the program runs, a file that cannot be read or parsed any more, is emptied or gone (an editor
    at work, a disk that is full) keeps its last good state, and a warning says so: another account must
    not silently stand in for the one that the file names.
    """

    def __init__(self) -> None:
        self._good: dict[str, dict] = {}
        self._warned: dict[str, str] = {}
        self._stamps: dict[str, Any] = {}
        # files that were never good, and why
        self.faults: dict[str, str] = {}

    def load(self, path: str, parse: Callable[[str], dict]) -> dict:
        """What is in a file, empty where there is none and never was, or where it cannot be used."""
        self._stamps[path] = None
        self.faults.pop(path, None)
        try:
            self._stamps[path] = stamp_of(path)
            text, _ = read_regular(path, "replace")
            if not text.strip() and self._good.get(path):
                raise ValueError("it is empty")
            self._good[path] = found = parse(text)
            self._warned.pop(path, None)
            return found
        except FileNotFoundError:
            if not self._good.get(path):
                return {}
            reason = "it is gone"
        except (OSError, ValueError) as error:
            reason = reason_of(error)
        if path not in self._good:
            self.faults[path] = reason
            return {}
        if self._warned.get(path) != reason:
            self._warned[path] = reason
            log.warning("%s: %s; what it said before still counts", path, reason)
        return self._good[path]

    def known(self) -> Iterable[str]:
        """The files that were good once."""
        return self._good

    def has_changed(self) -> bool:
        """True if a file that was asked for does not look as it did then."""
        return any(stamp_of(path) != stamp for path, stamp in self._stamps.items())

    def watch(self, path: str) -> None:
        """Look at a folder, too."""
        self._stamps[path] = stamp_of(path)


def stamp_of(path: str) -> Any:
    """What changes when a file does; None where there is none."""
    try:
        status = os.stat(path)
    except OSError:
        return None
    return status.st_mtime_ns, status.st_size, status.st_ino


class CliSettings:
    """What the CLI's settings files, .env files and the environment say together.

    Qwen Code, settings.ts: system defaults < user < project < system for the files; the environment,
    then .env files, then settings.env for variables. Files of the working directory and above count only
    where trustedFolders.json trusts the folder that holds them: a cloned repository must not be able to
    send a key to its own host.
    """

    def __init__(
        self, home: str, environ: dict[str, str], folder: str, files: WatchedFiles | None = None
    ):
        self.home, self.environ, self._files = home, environ, files or WatchedFiles()
        self.files: list[str] = []
        self.notes: list[str] = []
        self._user_home = environ.get("HOME") or os.path.expanduser("~")
        self.variables: dict[str, str] = {}
        # of files that are nobody's but the user's
        self._own_variables: dict[str, str] = {}
        own = [os.path.join(home, ".env"), os.path.join(self._user_home, ".qwen", ".env")]
        for path in dict.fromkeys(
            [*self._project_dotenv(folder), *own, os.path.join(self._user_home, ".env")]
        ):
            for name, value in self._load(path, parse_dotenv).items():
                self.variables.setdefault(name, value)
                if path in own:
                    self._own_variables.setdefault(name, value)
        self.values: dict = {}
        # Where one of these is broken, the CLI stops.
        binding = [
            self._system_file("system-defaults.json", "QWEN_CODE_SYSTEM_DEFAULTS_PATH"),
            os.path.join(home, "settings.json"),
            self._system_file("settings.json", "QWEN_CODE_SYSTEM_SETTINGS_PATH"),
        ]
        for path in [*binding[:2], *self._project_settings(folder), binding[2]]:
            self.values = merge(self.values, self._load(path, parse_settings))
        known = {**self.environ, **self.variables}
        for name, value in as_object(dig(self.values, "env")).items():
            if isinstance(value, str):
                self.variables.setdefault(name, expand_variables(value, known))
        self.values = expand_variables(self.values, {**self.variables, **self.environ})
        self.problem = next(
            (
                f"{path} cannot be used: {self._files.faults[path]}; mend it, or start with --provider NAME"
                for path in binding
                if path in self._files.faults
            ),
            "",
        )
        keep_secrets_in(self.values)
        keep_secrets_in(self.variables)

    def variable(self, name: str) -> str:
        """The value of a variable without blanks around it; '' when it is unset or empty."""
        return (self.environ.get(name) or self.variables.get(name) or "").strip()

    def oauth_base_url(self) -> str:
        """The identity host, which gets the refresh token: no project and no settings file may move it."""
        return (
            self.environ.get("QWEN_OAUTH_BASE_URL")
            or self._own_variables.get("QWEN_OAUTH_BASE_URL")
            or OAUTH_BASE_URL
        )

    def _load(self, path: str, parse: Callable[[str], dict]) -> dict:
        found = self._files.load(path, parse)
        note = f"{path} is ignored: {self._files.faults.get(path)}"
        if path in self._files.faults and note not in self.notes:
            self.notes.append(note)
        elif found and path not in self.files:
            self.files.append(path)
        return found

    def _system_file(self, name: str, variable: str) -> str:
        folder = {
            "Darwin": "/Library/Application Support/QwenCode",
            "Windows": "C:\\ProgramData\\qwen-code",
        }
        return self.environ.get(variable) or os.path.join(
            folder.get(platform.system(), "/etc/qwen-code"), name
        )

    def _project_dotenv(self, folder: str) -> list[str]:
        """The nearest .env of the working directory or above, where that and the folder that holds it are trusted."""
        above, user_home = folder, os.path.realpath(self._user_home)
        while os.path.realpath(above) != user_home:
            for path in (os.path.join(above, ".qwen", ".env"), os.path.join(above, ".env")):
                if self._may_count(above, path) and self._is_trusted(folder):
                    return [path]
            if above == os.path.dirname(above):
                break
            above = os.path.dirname(above)
        return []

    def _project_settings(self, folder: str) -> list[str]:
        """settings.json of the working directory, where that is trusted and not the user's own."""
        path = os.path.join(folder, ".qwen", "settings.json")
        return [path] if self._may_count(folder, path) else []

    def _may_count(self, folder: str, path: str) -> bool:
        """Whether there is (or was) such a file, not one of the user's own, in a folder that is trusted."""
        own = {
            os.path.realpath(os.path.join(base, name))
            for base in (self.home, os.path.join(self._user_home, ".qwen"), self._user_home)
            for name in (".env", "settings.json")
        }
        self._files.watch(path)
        if os.path.realpath(path) in own or not (
            os.path.lexists(path) or path in self._files.known()
        ):
            return False
        if not self._is_trusted(folder):
            self.notes.append(
                f"not read, since trustedFolders.json does not trust its folder: {path}"
            )
            return False
        return True

    def _is_trusted(self, folder: str) -> bool:
        """Qwen Code, trustedFolders.ts: the most specific rule for a folder decides, DO_NOT_TRUST of two alike."""
        path = self.environ.get("QWEN_CODE_TRUSTED_FOLDERS_PATH") or os.path.join(
            self.home, "trustedFolders.json"
        )
        # without a rule it is not trusted
        deciding = (-1, False)
        for rule, level in self._load(path, parse_settings).items():
            if level not in ("TRUST_FOLDER", "TRUST_PARENT", "DO_NOT_TRUST"):
                continue
            root = os.path.dirname(rule.rstrip(os.sep)) if level == "TRUST_PARENT" else rule
            for spelled in spellings(root):
                if any(is_within(place, spelled) for place in spellings(folder)):
                    found = (spelled.rstrip(os.sep).count(os.sep), level != "DO_NOT_TRUST")
                    deciding = max(deciding, found, key=lambda match: (match[0], not match[1]))
        return deciding[1]


def spellings(path: str) -> set[str]:
    """A path without `..`, with its links and without."""
    return {os.path.normcase(os.path.abspath(path)), os.path.normcase(os.path.realpath(path))}


def is_within(folder: str, root: str) -> bool:
    """Whether a folder is another one, or inside it."""
    return folder == root or folder.startswith(root.rstrip(os.sep) + os.sep)


def preset_of(base_url: str) -> str | None:
    """The name of the preset with this base URL."""
    return next((name for name, (url, _) in PRESETS.items() if url == base_url.rstrip("/")), None)


def preset_provider(name: str, settings: CliSettings) -> Provider:
    """A provider from PRESETS, with the key of its own variable."""
    base_url, variable = PRESETS[name]
    return Provider(
        name,
        base_url,
        key_from(settings, variable),
        f"--provider {name}, {variable}",
        family=family_of(base_url, variable),
    )


def key_from(settings: CliSettings, variable: str) -> ApiKey:
    """The key in a variable; without one, an ApiKey that says so when it is asked."""
    value = settings.variable(variable)
    problem = (
        f"the variable {variable} is not set; set it in the environment, in ~/.qwen/.env, or run `qwen` and "
        "then /auth"
    )
    return ApiKey(value, variable, "" if value else problem)


def settings_providers(settings: CliSettings) -> list[Provider]:
    """One provider for each base URL and key variable in modelProviders, in the order of the file."""
    providers: dict[tuple[str, str], Provider] = {}
    protocols = as_object(dig(settings.values, "providerProtocol"))
    for kind, listed in as_object(dig(settings.values, "modelProviders")).items():
        if kind != "openai" and protocols.get(kind) != "openai":
            continue
        entries = listed.get("models") if isinstance(listed, dict) else listed
        for index, entry in enumerate(entries if isinstance(entries, list) else []):
            if is_chat_entry(entry):
                add_entry(
                    providers, entry, settings, f"modelProviders.{kind}[{index}] in settings.json"
                )
            elif as_text(dig(entry, "wireApi")) not in ("", "chat-completions"):
                log.info(
                    "settings.json: %s speaks %s only, which no upstream is asked in; left out",
                    as_text(dig(entry, "id")),
                    as_text(entry["wireApi"]),
                )
    return list(providers.values())


def is_chat_entry(entry: Any) -> bool:
    """Whether an entry of modelProviders describes a model that answers chat completions."""
    return (
        isinstance(entry, dict)
        and isinstance(entry.get("id"), str)
        and bool(entry["id"])
        and entry.get("wireApi", "chat-completions") == "chat-completions"
        and not any(entry.get(flag) for flag in ("voiceOnly", "imageOnly", "realtimeOnly"))
    )


def add_entry(
    providers: dict[tuple[str, str], Provider], entry: dict, settings: CliSettings, where: str
) -> None:
    """Put a modelProviders entry under its provider. Key and base URL come from the entry alone.

    The CLI would fall back from a missing envKey to OPENAI_API_KEY, and so send one company's key to
    another; here a variable that is not set stays an error with its name in it. Nor does anything wrong
    or missing get a default host.
    """
    variable = entry.get("envKey") if entry.get("envKey") is not None else "OPENAI_API_KEY"
    base_url, problem = base_url_of_entry(entry, settings)
    if not isinstance(variable, str) or not variable.strip():
        variable, problem = "", "envKey must be the name of a variable"
    variable = variable.strip()
    key = (where if problem else base_url, variable)
    if key not in providers:
        name = "unnamed" if problem else preset_of(base_url) or host_of(base_url, with_port=True)
        taken = sum(1 for other in providers.values() if other.name.split("#")[0] == name)
        credentials = (
            ApiKey("", where, f"{where}: {problem}") if problem else key_from(settings, variable)
        )
        providers[key] = Provider(
            f"{name}#{taken + 1}" if taken else name,
            "" if problem else base_url,
            credentials,
            f"{where}, {variable}",
            family=family_of(base_url, variable),
        )
    providers[key].entries.setdefault(entry["id"], as_object(entry.get("generationConfig")))


def base_url_of_entry(entry: dict, settings: CliSettings) -> tuple[str, str]:
    """The base URL of a modelProviders entry and '', or what it says and why that is none."""
    stated = [
        ("baseUrl", entry.get("baseUrl")),
        ("OPENAI_BASE_URL", settings.variable("OPENAI_BASE_URL") or None),
        ("security.auth.baseUrl", dig(settings.values, "security", "auth", "baseUrl")),
    ]
    name, url = next(((name, url) for name, url in stated if url is not None), ("baseUrl", None))
    if url is None:
        return "", "baseUrl is missing, and no host is guessed for a key"
    url = url.strip().rstrip("/") if isinstance(url, str) else url
    fault = base_url_fault(url)
    return (str(url), f"{name} {fault}") if fault else (url, "")


def environment_provider(settings: CliSettings, base_url: str, source: str) -> Provider:
    """A provider at a base URL from the command line or environment, with the key that belongs to it.

    That is OPENAI_API_KEY, the deprecated security.auth.apiKey, or the variable of a plan, if base_url
    is on that plan's host.
    """
    base_url = base_url.strip() if isinstance(base_url, str) else base_url
    fault = base_url_fault(base_url)
    if fault:
        return Provider("unnamed", "", ApiKey("", source, f"{source} {fault}"), source)
    host = host_of(base_url, with_port=True)
    plan = next((variable for url, variable in PRESETS.values() if host_of(url) == host), None)
    stored = dig(settings.values, "security", "auth", "apiKey")
    if settings.variable("OPENAI_API_KEY"):
        credentials = key_from(settings, "OPENAI_API_KEY")
    elif plan and settings.variable(plan):
        credentials = key_from(settings, plan)
    elif (
        isinstance(stored, str)
        and stored
        and dig(settings.values, "security", "auth", "baseUrl") == base_url
    ):
        credentials = ApiKey(stored, "security.auth.apiKey in settings.json")
    else:
        credentials = key_from(settings, "OPENAI_API_KEY")
    return Provider(preset_of(base_url) or host, base_url, credentials, source)


def provider_of_lone_key(settings: CliSettings) -> tuple[Provider | None, str]:
    """The provider of the only key in the environment, if its host is certain; else None and a sentence."""
    variables = sorted(
        {variable for _, variable in PRESETS.values() if settings.variable(variable)}
    )
    fitting = [name for name, (_, variable) in PRESETS.items() if variable in variables]
    if len(fitting) == 1:
        return preset_provider(fitting[0], settings), ""
    if variables:
        return (
            None,
            "{} is set, but its host is not certain and never guessed; choose one: {}".format(
                " and ".join(variables),
                ", ".join("--provider " + name for name in fitting),
            ),
        )
    if settings.variable("OPENAI_API_KEY"):
        return (
            None,
            "OPENAI_API_KEY is set, but not its host; add --base-url URL or OPENAI_BASE_URL",
        )
    return None, ""


def oauth_providers(
    home: str, settings: CliSettings, known: dict[str, OAuthCredentials]
) -> list[Provider]:
    """A provider for oauth_creds.json and for every oauth_creds*.json beside it."""
    try:
        names = sorted(
            name for name in os.listdir(home) if fnmatch.fnmatchcase(name, "oauth_creds?*.json")
        )
    except OSError:
        names = []
    providers = []
    for name in ["oauth_creds.json", *names]:
        path = os.path.join(home, name)
        if path not in known:
            known[path] = OAuthCredentials(path, settings.oauth_base_url())
        suffix = name[len("oauth_creds") : -len(".json")].strip("._-")
        providers.append(
            Provider(
                "oauth-" + suffix if suffix else "oauth",
                "",
                known[path],
                path,
                {OAUTH_MODEL: {}},
                "portal",
            )
        )
    return providers


def wanted_model(settings: CliSettings, options: Options) -> str | None:
    """The model that the CLI would use: --model, model.name, OPENAI_MODEL, QWEN_MODEL."""
    stored = dig(settings.values, "model", "name") or dig(settings.values, "model")
    if isinstance(stored, str) and stored.startswith("$runtime|"):
        stored = stored.split("|")[-1]
    return (
        options.model
        or (stored if isinstance(stored, str) else None)
        or settings.variable("OPENAI_MODEL")
        or settings.variable("QWEN_MODEL")
        or None
    )


def active_provider(
    settings: CliSettings, options: Options, listed: list[Provider], oauth: list[Provider]
) -> tuple[Provider | None, str]:
    """The provider that the command line or else the CLI's own rules choose, or None and why."""
    if options.base_url:
        return environment_provider(settings, options.base_url, "--base-url"), ""
    if options.provider:
        return named_provider(options.provider, settings, listed + oauth)
    kind = dig(settings.values, "security", "auth", "selectedType") or dig(
        settings.values, "selectedAuthType"
    )
    base_url = settings.variable("OPENAI_BASE_URL")
    if (
        not kind
        and settings.variable("OPENAI_API_KEY")
        and base_url
        and (settings.variable("OPENAI_MODEL") or settings.variable("QWEN_MODEL"))
    ):
        kind = "openai"
    if kind in ("anthropic", "gemini", "vertex-ai"):
        return None, (
            f"the CLI is set to {kind}, which has no OpenAI-compatible endpoint here; choose another one with "
            "--provider NAME"
        )
    if kind == "qwen-oauth" or (kind is None and oauth[0].credentials.is_there()):
        return oauth[0], ""
    return provider_of_model(settings, options, listed, base_url)


def provider_of_model(
    settings: CliSettings, options: Options, listed: list[Provider], base_url: str
) -> tuple[Provider | None, str]:
    """Qwen Code, its model resolver: the entry with the wanted id (and model.baseUrl), else the environment."""
    model, stored_url = wanted_model(settings, options), dig(settings.values, "model", "baseUrl")
    having = [provider for provider in listed if model in provider.entries]
    having.sort(key=lambda provider: provider.stated_url != str(stored_url or "").rstrip("/"))
    if having:
        return having[0], ""
    if base_url:
        return environment_provider(settings, base_url, "OPENAI_BASE_URL"), ""
    stored = dig(settings.values, "security", "auth", "baseUrl")
    if stored not in (None, ""):
        return environment_provider(settings, stored, "security.auth.baseUrl in settings.json"), ""
    if listed:
        # The entry of the CLI's default model, else the first one: never another because that one
        # has no key.
        return next(
            (provider for provider in listed if DEFAULT_MODEL in provider.entries), listed[0]
        ), ""
    return provider_of_lone_key(settings)


def named_provider(
    name: str, settings: CliSettings, found: list[Provider]
) -> tuple[Provider | None, str]:
    """--provider NAME: by the name or host of one that was found, else a preset."""
    for provider in found:
        if name in (provider.name, provider.host()):
            return provider, ""
    if name in PRESETS:
        return preset_provider(name, settings), ""
    known = sorted({*PRESETS, "oauth", *(provider.name for provider in found)})
    return None, "there is no provider {!r}; known are {}".format(name, ", ".join(known))


def discover(
    options: Options,
    environ: dict[str, str],
    folder: str,
    known: dict[str, OAuthCredentials],
    files: WatchedFiles | None = None,
    home: str = "",
) -> Discovery:
    """Everything that can be used on this machine, the active provider first; raises ValueError for a wrong option."""
    home = home or qwen_home(environ, options.qwen_home)
    settings = CliSettings(home, environ, folder, files)
    if settings.problem and not (options.provider or options.base_url):
        return Discovery(
            [],
            wanted_model(settings, options) or DEFAULT_MODEL,
            settings.notes,
            settings.files,
            settings.problem,
        )
    listed, oauth = settings_providers(settings), oauth_providers(home, settings, known)
    active, note = active_provider(settings, options, listed, oauth)
    present = [
        provider for provider in oauth if provider.credentials.is_there() or provider is active
    ]
    others = [provider for provider in listed + present if provider is not active]
    for provider in others:
        if (
            active and provider.name == active.name
            # --base-url at the host of an entry: another key, another name
        ):
            provider.name += "#settings"
    notes = (
        settings.notes
        + ([note] if note else [])
        + [
            f"{provider.credentials.path} cannot be saved ({reason}): a refreshed token stays in memory only, and after a "
            "restart the login is dead, for the CLI too"
            for provider in present
            for reason in [why_not_saved(provider.credentials.path)]
            if reason
        ]
    )
    if active is None and options.provider:
        raise ValueError(note)
    providers = (
        [active, *others] if active else []
        # none is chosen in the place of one that was meant
    )
    return Discovery(providers, default_model(settings, options, active), notes, settings.files)


def default_model(settings: CliSettings, options: Options, active: Provider | None) -> str:
    """The model for requests that name none."""
    wanted = wanted_model(settings, options)
    if active is None:
        return wanted or DEFAULT_MODEL
    if active.credentials.kind == "oauth" and not options.model:
        # Qwen Code: any other name falls back to it
        return OAUTH_MODEL
    known = active.model_ids()
    return wanted or (known[0] if known else DEFAULT_MODEL)


class Serving:
    """Who serves which model: the one list that /v1/models shows and that requests follow.

    A model belongs to the provider whose settings list it, since that is whose key the CLI would use; then
    to the active provider, if its own list names it. One that cannot be used is passed over where another
    has the model, but never the active one for a model of its own, nor one that was named.
    """

    def __init__(self, discovery: Discovery, lists: list[list[str]], is_chosen: bool):
        self._discovery, self._is_chosen = discovery, is_chosen
        self._known = [
            list(dict.fromkeys([*provider.model_ids(), *listed]))
            for provider, listed in zip(discovery.providers, lists)
        ]
        if self._known and not self._known[0]:
            self._known[0] = [discovery.model]
        self._of_active = set(self._known[0]) if self._known else set()

    def routes(self, model: str) -> list[Route]:
        """Where a model is asked for, best first; never empty where there is a provider."""
        claims = [
            (self._rank(place, provider, model), place, provider)
            for place, provider in enumerate(self._discovery.providers)
        ]
        claims = sorted(
            (claim for claim in claims if claim[0] is not None), key=lambda claim: claim[:2]
        )
        listing = [Route(provider, model) for _, _, provider in claims]
        if not listing or self._is_chosen:
            named = next(
                (
                    provider
                    for provider in self._discovery.providers
                    if model.startswith(provider.name + "/")
                ),
                None,
            )
            if named and model not in self._of_active:
                return [Route(named, model[len(named.name) + 1 :])]
        return listing or [Route(self._discovery.providers[0], model)]

    def listing(self) -> list[tuple[str, Route]]:
        """Each model under the id that leads to it: `provider/model` where the plain id leads to another provider."""
        listed = []
        for provider, models in zip(self._discovery.providers, self._known):
            for model in models:
                is_first = self.routes(model)[0] == Route(provider, model)
                listed.append(
                    (model if is_first else f"{provider.name}/{model}", Route(provider, model))
                )
        return listed

    def _rank(self, place: int, provider: Provider, model: str) -> int | None:
        if place == 0 and (self._is_chosen or model in provider.entries):
            return 0
        if model in provider.entries:
            return 3 if provider.problem() else 1
        return 2 if place == 0 and model in self._of_active else None


class Catalogue:
    """The discovery, made anew when a file behind it changes; any thread may ask."""

    def __init__(self, options: Options, environ: dict[str, str] | None = None):
        self.options, self._environ = options, dict(os.environ if environ is None else environ)
        self._folder, self._known = os.getcwd(), {}  # type: ignore[var-annotated]
        self._lock, self._checked, self._files = threading.Lock(), 0.0, WatchedFiles()
        self.home = qwen_home(self._environ, options.qwen_home)
        self._seed_login()
        self._discovery = self._discover()

    def current(self) -> Discovery:
        """The discovery as of now; the disk is looked at once a second at most."""
        with self._lock:
            if time.monotonic() - self._checked > 1:
                self._checked = time.monotonic()
                if self._files.has_changed():
                    self._discovery = self._discover()
            return self._discovery

    def _discover(self) -> Discovery:
        # oauth_creds*.json may come and go
        self._files.watch(self.home)
        return discover(
            self.options, self._environ, self._folder, self._known, self._files, self.home
        )

    def serving(self, lists: list[list[str]] | None = None) -> Serving:
        """Who serves which model now, as far as known; lists are the live ones, in the order of the providers."""
        discovery = self.current()
        is_chosen = self.options.base_url is not None or self.options.provider is not None
        return Serving(discovery, lists or [[] for _ in discovery.providers], is_chosen)

    def routes(self, model: Any, lists: list[list[str]] | None = None) -> list[Route]:
        """Where a model can be had, best first: all of them with --failover, else only one.

        Several OAuth logins stand in for each other in any case, since that costs nobody anything.
        Raises BadRequest for a model that is no string, CredentialError when there is no login at all.
        """
        if model is not None and not isinstance(model, str):
            raise BadRequest("model must be a string", param="model")
        if model and len(model) > MAX_MODEL_ID:
            raise BadRequest("model is longer than %d characters" % MAX_MODEL_ID, param="model")
        discovery = self.current()
        model = self._unaliased(model.strip() if model else "") or discovery.model
        if discovery.problem:
            raise ProxyError(
                discovery.problem,
                503,
                "settings_unreadable",
                "server_error",
                headers=[("x-should-retry", "false")],
            )
        if not discovery.providers:
            raise CredentialError(
                " ".join(
                    [
                        f"no Qwen login on this machine: {LOGIN_AGAIN}, or start with --provider NAME and its "
                        "key in the environment.",
                        *discovery.notes,
                    ]
                ).strip()
            )
        routes = self.serving(lists).routes(model)
        if self.options.failover:
            return routes
        if routes[0].provider.credentials.kind == "oauth":
            return [route for route in routes if route.provider.credentials.kind == "oauth"]
        return routes[:1]

    def _unaliased(self, model: str) -> str:
        for name, target in self.options.aliases:
            if fnmatch.fnmatchcase(model, name):
                return target
        return model

    def _seed_login(self) -> None:
        """QWEN_CLI_AUTH holds the JSON of oauth_creds.json, for containers; it never replaces a file."""
        seed, path = self._environ.get("QWEN_CLI_AUTH"), os.path.join(self.home, "oauth_creds.json")
        if not seed or os.path.exists(path):
            return
        try:
            login = parse_login(seed)
        except CredentialError as error:
            log.warning("QWEN_CLI_AUTH is ignored: %s", error.message)
            return
        base = CliSettings(self.home, self._environ, self._folder).oauth_base_url()
        self._known[path] = OAuthCredentials(path, base)
        self._known[path].replace(login)


# ------------------------------------------------------------------------------------------------
# Upstream
# ------------------------------------------------------------------------------------------------


class Readiness:
    """Which of some sockets can be read; made once and asked often."""

    def __init__(self, sockets: list[socket.socket]):
        self._by_descriptor = {each.fileno(): each for each in sockets}
        self._poll = select.poll() if hasattr(select, "poll") else None
        for each in sockets if self._poll else ():
            self._poll.register(each, select.POLLIN)

    def wait(self, seconds: float) -> list[socket.socket]:
        """Those that can be read without waiting, after at most that many seconds."""
        seconds = max(0, seconds)
        # select() fails from descriptor 1024 on
        if self._poll:
            return [
                self._by_descriptor[descriptor] for descriptor, _ in self._poll.poll(seconds * 1000)
            ]
        # Windows, where select() refuses to wait for nothing
        if not self._by_descriptor:
            time.sleep(seconds)
            return []
        return select.select(list(self._by_descriptor.values()), [], [], seconds)[0]


def readable(connection: socket.socket, seconds: float) -> bool:
    """Whether the socket can be read without waiting, after at most that many seconds."""
    return bool(Readiness([connection]).wait(seconds))


def send_all(connection: socket.socket, data: bytes, wait: Callable[[socket.socket], None]) -> None:
    """Send on a socket that does not block; wait(connection) returns when it takes bytes again, or raises.

    Sockets with a timeout cost one more system call for each send, and a stream is little else.
    """
    view = memoryview(data)
    while view:
        try:
            view = view[connection.send(view) :]
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            wait(connection)


def writable(connection: socket.socket, seconds: float) -> bool:
    """Whether the socket takes bytes, after at most that many seconds."""
    if not hasattr(select, "poll"):
        return bool(select.select([], [connection], [], seconds)[1])
    poll = select.poll()
    poll.register(connection, select.POLLOUT)
    return bool(poll.poll(seconds * 1000))


class Watch:
    """Waits for the upstream without losing sight of the client.

    One thread serves one request; here it sees, while the upstream is silent, that the client has left
    (so the upstream is dropped at once, also before the first token), that a sign of life is due, that
    the silence has lasted too long, and that the server stops.
    """

    def __init__(
        self,
        client: socket.socket | None = None,
        timeout: float = UPSTREAM_TIMEOUT,
        interval: float = KEEP_ALIVE_INTERVAL,
        on_silence: Callable[[], None] | None = None,
    ):
        self._client, self.timeout, self._interval, self._on_silence = (
            client,
            timeout,
            interval,
            on_silence,
        )
        self._upstream: socket.socket | None = None
        self._stopping, self._lock = False, threading.Lock()
        self._last_sign = time.monotonic()

    def wait(self, upstream: socket.socket) -> None:
        """Return when the upstream can be read; raises ClientGone, ShuttingDown, UpstreamError (504)."""
        self._attend(upstream)
        deadline = time.monotonic() + self.timeout
        while True:
            if self._stopping:
                raise ShuttingDown
            now = time.monotonic()
            if now >= deadline:
                raise UpstreamError(
                    f"the upstream has sent nothing for {self.timeout:g} s; try again, or allow more with --timeout",
                    504,
                    "upstream_timeout",
                )
            due = (
                max(0.0, self._last_sign + self._interval - now)
                if self._on_silence
                else self._interval
            )
            ready = self._both.wait(min(due, deadline - now))
            if upstream in ready and not self._stopping:
                return
            if self._client in ready:
                self._look_at_client()
            self.tick()

    def wait_to_send(self, upstream: socket.socket) -> None:
        """Return when the upstream takes bytes; raises as wait() does."""
        self._attend(upstream)
        deadline = time.monotonic() + self.timeout
        while not writable(upstream, min(0.5, self._interval)):
            if self._stopping:
                raise ShuttingDown
            if time.monotonic() > deadline:
                raise UpstreamError(
                    f"the upstream has taken nothing for {self.timeout:g} s; try again",
                    504,
                    "upstream_timeout",
                )
            if self._client and readable(self._client, 0):
                self._look_at_client()
            self.tick()

    def release(self) -> None:
        """The connection is no longer this request's: stop() must not touch what another one may use."""
        with self._lock:
            self._upstream = None

    def sleep(self, seconds: float) -> None:
        """Wait before another attempt; raises ClientGone and ShuttingDown as wait() does."""
        end = time.monotonic() + seconds
        while True:
            if self._stopping:
                raise ShuttingDown
            remaining = end - time.monotonic()
            if Readiness([self._client] if self._client else []).wait(min(0.5, remaining)):
                self._look_at_client()
            self.tick()
            if remaining <= 0:
                return

    def tick(self) -> None:
        """Give the client a sign of life if it has heard nothing for an interval."""
        if self._on_silence and time.monotonic() - self._last_sign >= self._interval * 0.99:
            try:
                self._on_silence()
            except OSError:
                # never as an error of what is waited for, such as the lock
                raise ClientGone from None
            self.heard()

    def heard(self) -> None:
        """The client was sent something."""
        self._last_sign = time.monotonic()

    def stop(self) -> None:
        """From any thread: end the wait with ShuttingDown."""
        with self._lock:
            self._stopping = True
            if self._upstream is not None:
                with contextlib.suppress(
                    OSError
                    # not SSLSocket's: it drops what recv in the other thread needs
                ):
                    socket.socket.shutdown(self._upstream, socket.SHUT_RDWR)

    def _attend(self, upstream: socket.socket) -> None:
        if self._upstream is not upstream:
            self._upstream, self._both = (
                upstream,
                Readiness([upstream, self._client] if self._client else [upstream]),
            )

    def _look_at_client(self) -> None:
        try:
            if not self._client.recv(1, socket.MSG_PEEK):  # type: ignore[union-attr]
                raise ClientGone
        except OSError:
            raise ClientGone from None
        # it has sent its next request ahead: no end can be seen behind that
        self._client = None
        self._both = Readiness([self._upstream] if self._upstream is not None else [])


class Connection:
    """A connection to an upstream, each wait of which is a Watch's.

    It never blocks inside recv: a TLS record that carries no data must not hide a client that leaves.
    """

    def __init__(self, connected: http.client.HTTPConnection):
        self._connected, self.socket = connected, connected.sock
        self.socket.setblocking(False)
        self._pending = getattr(self.socket, "pending", None)
        self.watch, self.idle_since, self.has_received = Watch(), 0.0, False

    def send(self, data: bytes) -> None:
        """Send it all; raises OSError, and what Watch.wait_to_send() raises."""
        self.has_received = False
        send_all(self.socket, data, self.watch.wait_to_send)

    def receive(self) -> bytes:
        """What arrives next, empty at the end; raises OSError, and what Watch.wait() raises."""
        while True:
            if not (self._pending and self._pending()):
                self.watch.wait(self.socket)
            try:
                received = self.socket.recv(PIECE)
            except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
                continue
            self.has_received = self.has_received or bool(received)
            return received

    def close(self) -> None:
        """Close it; may be called more than once."""
        self._connected.close()


_HEAD_END = re.compile(rb"\r?\n\r?\n")
_STATUS_LINE = re.compile(r"HTTP/1\.([01]) ([1-5]\d\d)(?: |\Z)")


def parse_head(head: bytes) -> tuple[int, dict[str, str], bool]:
    """Status, headers (names in lower case) and whether the connection stays open (RFC 9112 4, 5, 9.3).

    http.client's own parser is the e-mail package's, and half the cost of a small answer. Raises
    http.client.BadStatusLine.
    """
    status_line, *lines = head.decode("latin-1").split("\n")
    match = _STATUS_LINE.match(status_line.rstrip("\r"))
    if not match:
        raise http.client.BadStatusLine(shorten(status_line, 100))
    headers: dict[str, str] = {}
    for line in lines:
        name, _, value = line.partition(":")
        name, value = name.strip().lower(), value.strip()
        headers[name] = headers[name] + ", " + value if name in headers else value
    connection = headers.get("connection", "").lower()
    stays_open = "close" not in connection and (match.group(1) == "1" or "keep-alive" in connection)
    return int(match.group(2)), headers, stays_open


class BodyDecoder:
    """Takes the framing off a response's body: chunked, of a known length, or up to the end (RFC 9112 6.3).

    >>> decoder = BodyDecoder(200, {"transfer-encoding": "chunked"})
    >>> decoder.feed(b"3\\r\\nabc\\r\\n2\\r"), decoder.feed(b"\\nde\\r\\n0\\r\\n\\r\\n"), decoder.is_done
    (b'abc', b'de', True)
    """

    def __init__(self, status: int, headers: dict[str, str]):
        self._is_chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        lengths = {length.strip() for length in headers.get("content-length", "").split(",")}
        length = (
            lengths.pop() if len(lengths) == 1 else ""
            # the same one twice is allowed, RFC 9110 8.6
        )
        is_known = length.isdecimal() and len(length) < 19 and not self._is_chunked
        self.ends_with_connection = not self._is_chunked and not is_known
        self._left = int(length) if is_known else 0
        self._line, self._is_last, self.surplus = b"", False, b""
        self.is_done = status in (204, 304) or not (
            self._is_chunked or self._left or self.ends_with_connection
        )

    def feed(self, received: bytes) -> bytes:
        """The content in what was received; raises ValueError for a chunk size that is none."""
        if self.ends_with_connection:
            return received
        if self._is_chunked:
            return self._dechunked(received)
        content, self.surplus = received[: self._left], received[self._left :]
        self._left -= len(content)
        self.is_done = not self._left
        return content

    def _dechunked(self, received: bytes) -> bytes:
        found, at = [], 0
        if self._line:
            received, self._line = self._line + received, b""
        while at < len(received) and not self.is_done:
            if not self._left:
                end = received.find(b"\n", at)
                if end < 0:
                    self._line = received[at:]
                    if len(self._line) > MAX_LINE:
                        raise ValueError("a chunk size without an end")
                    break
                self._take_line(received[at:end].strip())
                at = end + 1
            if self._left:
                stop = at + self._left
                found.append(received[at:stop])
                self._left, at = self._left - len(found[-1]), at + len(found[-1])
                at += (
                    2 if received.startswith(b"\r\n", stop) else 0
                    # spares a turn for the empty line
                )
        self.surplus = received[at:] if self.is_done else b""
        return found[0] if len(found) == 1 else b"".join(found)

    def _take_line(self, line: bytes) -> None:
        """A chunk's size, the empty end of the chunk before, or after the last one a trailer."""
        if self._is_last:
            self.is_done = not line
        elif line:
            self._left = int(line.partition(b";")[0], 16)
            self._is_last = not self._left
            if self._left < 0:
                raise ValueError("a negative chunk size")


class UpstreamResponse:
    """An answer of the upstream: status, headers, and the body in pieces as they arrive."""

    def __init__(self, connection: Connection, pool: KeepAliveHandler, key: Any):
        self._connection: Connection | None = connection
        self._pool, self._key = pool, key
        self.status, self.headers, self._stays_open = self._read_head(connection)
        self._body = BodyDecoder(self.status, self.headers)
        if self._body.is_done:
            self._body.surplus = self._received

    def _read_head(self, connection: Connection) -> tuple[int, dict[str, str], bool]:
        self._received = b""
        while True:
            end = _HEAD_END.search(self._received)
            if end:
                head, self._received = self._received[: end.start()], self._received[end.end() :]
                parsed = parse_head(head)
                if parsed[0] >= 200:
                    return parsed
                # 100 Continue, 103 Early Hints: the answer is still to come
                continue
            piece = connection.receive()
            if not piece or len(self._received) > MAX_ERROR_BODY:
                raise http.client.RemoteDisconnected
            self._received += piece

    def pieces(self) -> Iterator[bytes]:
        """The body; raises UpstreamError when the connection breaks, and what Watch.wait() raises."""
        received, self._received = self._received, b""
        try:
            while not self._body.is_done:
                content = self._body.feed(received) if received else b""
                if content:
                    yield content
                if self._body.is_done:
                    return
                received = self._connection.receive() if self._connection else b""
                if not received:
                    self._end_of_connection()
        except (OSError, ValueError) as error:
            raise UpstreamError(
                f"the upstream broke off in the middle of its answer ({reason_of(error)}); try again",
                code="upstream_cut",
            ) from error

    def _end_of_connection(self) -> None:
        if not self._body.ends_with_connection:
            raise ConnectionError("connection closed")
        self._body.is_done, self._stays_open = True, False

    def read(self, limit: int) -> bytes:
        """The body up to a limit; of a refusal what came of it, since its status counts in any case."""
        body = bytearray()
        with contextlib.suppress(*([UpstreamError] if self.status >= 300 else [])):
            for piece in self.pieces():
                body += piece
                if len(body) > limit:
                    break
        return bytes(body[:limit])

    def close(self) -> None:
        """Done with it, once: keep the connection if the body is at its end, else close it."""
        connection, self._connection = self._connection, None
        if connection is None:
            return
        connection.watch.release()
        if self._body.is_done and self._stays_open and not self._body.surplus:
            self._pool.put(self._key, connection)
        else:
            connection.close()

    def drain(self) -> None:
        """Read what little may follow the end of the stream, so that the connection can be kept."""
        if not self._body.is_done and self._connection is not None:
            self._connection.watch.release()
            self._connection.watch, end = (
                Watch(timeout=DRAIN_TIMEOUT),
                time.monotonic() + DRAIN_TIMEOUT,
            )
            with contextlib.suppress(UpstreamError):
                for _ in self.pieces():
                    if time.monotonic() > end:
                        break
        self.close()


def request_head(request: Any) -> bytes:
    """Request line and headers; raises ValueError for a character that would end a line early."""
    headers = {**request.headers, **request.unredirected_hdrs, "Accept-encoding": "identity"}
    lines = [f"{request.get_method()} {request.selector} HTTP/1.1"]
    lines += [f"{name.title()}: {value}" for name, value in headers.items()]
    head = "\r\n".join(lines)
    if (
        head.count("\n") != len(headers)
        or head.count("\r") != len(headers)
        or "\0" in head
        or " " in request.selector
    ):
        raise ValueError("a line end in the request's head")
    return (head + "\r\n\r\n").encode("latin-1")


def headers_for_tunnel(request: Any) -> dict[str, str]:
    """The password of a forward proxy, taken out of the request: behind a tunnel it is none of the upstream's."""
    if not request._tunnel_host:
        return {}
    secret = request.unredirected_hdrs.pop("Proxy-authorization", None) or request.headers.pop(
        "Proxy-authorization", None
    )
    return {"Proxy-Authorization": secret} if secret else {}


class KeepAliveHandler(urllib.request.AbstractHTTPHandler):
    """urllib's documented place to open connections otherwise: here they are kept and used again.

    The pool knows only put and take. A kept connection that turns out dead before it gave one byte is
    replaced once; a fresh one that fails is an error.
    """

    def __init__(self) -> None:
        super().__init__()
        self._idle: dict[Any, list[Any]] = collections.defaultdict(list)
        self._lock, self._context = threading.Lock(), None  # type: ignore[var-annotated]

    def http_open(self, request: urllib.request.Request) -> UpstreamResponse:
        return self.do_open(http.client.HTTPConnection, request)

    def https_open(self, request: urllib.request.Request) -> UpstreamResponse:
        try:
            context = self._tls()
        except (
            OSError
            # SSLError is one: SSL_CERT_FILE or SSLKEYLOGFILE name nothing good
        ) as error:
            raise UpstreamError(
                f"TLS cannot be set up ({reason_of(error)}); check SSL_CERT_FILE", 500
            ) from error
        return self.do_open(http.client.HTTPSConnection, request, context=context)

    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def do_open(self, http_class: Any, request: Any, **connection_args: Any) -> UpstreamResponse:
        """The response to a request; raises UpstreamError, and what Watch.wait() raises."""
        key = (http_class, request.host, request._tunnel_host)
        connection, tunnel_headers = self._take(key), headers_for_tunnel(request)
        is_fresh = connection is None
        while True:
            if connection is None:
                connection, is_fresh = (
                    self._connect(http_class, request, connection_args, tunnel_headers),
                    True,
                )
            try:
                return self._exchange(connection, request, key)
            except (OSError, http.client.HTTPException) as error:
                if is_fresh or connection.has_received:
                    raise UpstreamError(
                        "{} gave no answer ({}); try again".format(
                            request.host,
                            "it closed the connection"
                            if isinstance(error, http.client.HTTPException)
                            else reason_of(error),
                        ),
                        code="upstream_cut",
                        moves_on=not connection.has_received,
                    ) from error
                log.debug("a kept connection to %s was dead", request.host)
                connection = None

    def put(self, key: Any, connection: Any) -> None:
        """Keep a connection whose response was read to its end."""
        connection.idle_since = time.monotonic()
        with self._lock:
            idle = self._idle[key]
            idle.append(connection)
            surplus = idle.pop(0) if len(idle) > IDLE_CONNECTIONS else None
        if surplus is not None:
            surplus.close()

    def close_idle(self) -> None:
        """Close what is kept."""
        with self._lock:
            kept, self._idle = self._idle, collections.defaultdict(list)
        for connection in (connection for idle in kept.values() for connection in idle):
            connection.close()

    def _take(self, key: Any) -> Any:
        while True:
            with self._lock:
                connection = self._idle[key].pop() if self._idle[key] else None
            if connection is None:
                return None
            age = time.monotonic() - connection.idle_since
            # Whatever can be read on an idle connection is its end, or nothing that we asked for.
            if age < IDLE_CONNECTION_AGE and not readable(connection.socket, 0):
                return connection
            connection.close()

    def _connect(
        self, http_class: Any, request: Any, connection_args: dict, tunnel_headers: dict
    ) -> Any:
        try:
            seconds = min(request.timeout, CONNECT_TIMEOUT)
            connection = http_class(request.host, timeout=seconds, **connection_args)
            connection._create_connection = connect_before(time.monotonic() + seconds)
            if request._tunnel_host:
                connection.set_tunnel(request._tunnel_host, headers=tunnel_headers)
            connection.connect()
            return Connection(connection)
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            raise UpstreamError(
                f"{request._tunnel_host or request.host} cannot be reached: {reason_of(error)}",
                code="upstream_unreachable",
                retry=not isinstance(error, (ssl.SSLError, http.client.HTTPException)),
                moves_on=True,
            ) from error

    def _exchange(self, connection: Connection, request: Any, key: Any) -> UpstreamResponse:
        connection.watch = request.watch
        try:
            with contextlib.suppress(
                BrokenPipeError,
                ConnectionResetError,
                # it may have refused and closed: 413
            ):
                connection.send(request_head(request) + (request.data or b""))
            return UpstreamResponse(connection, self, key)
        except BaseException:
            connection.close()
            raise

    def _tls(self) -> ssl.SSLContext:
        with self._lock:
            # loading the trust store takes 20 ms: once, and not at start
            if self._context is None:
                self._context = ssl.create_default_context()
            return self._context


class Upstream:
    """Sends requests to providers, over the forward proxy of the environment where there is one."""

    def __init__(self) -> None:
        self._connections = KeepAliveHandler()
        self._opener = (
            urllib.request.OpenerDirector()
            # no redirects, no errors raised: both are judged here
        )
        for handler in (
            urllib.request.ProxyHandler(forward_proxies()),
            self._connections,
            urllib.request.UnknownHandler(),
        ):
            self._opener.add_handler(handler)

    def send(
        self,
        route: Route,
        path: str,
        body: bytes | None,
        access_token: str,
        watch: Watch,
        headers: dict[str, str] | None = None,
    ) -> UpstreamResponse:
        """POST a body (GET without one) to a path below the provider's base URL."""
        own = {"Authorization": "Bearer " + access_token, **(headers or {})}
        if body is not None:
            own["Content-Type"] = "application/json"
        own.update(custom_headers(route))
        try:
            request = urllib.request.Request(
                route.provider.base_url + path,
                body,
                own,
                method="POST" if body is not None else "GET",
            )
        except ValueError as error:
            raise UpstreamError(
                f"the base URL {route.provider.base_url} is unusable: {error}", 500
            ) from error
        request.watch = watch  # type: ignore[attr-defined]
        try:
            return self._opener.open(request, timeout=watch.timeout)  # type: ignore[return-value]
        except urllib.error.URLError as error:
            raise UpstreamError(
                f"the base URL {route.provider.base_url} is unusable: {reason_of(error)}", 500
            ) from error
        except (
            ValueError,
            UnicodeError,
            # http.client on a key or header with odd characters
        ) as error:
            raise UpstreamError(
                f"the request to {route.provider.name} cannot be sent: the key or a header holds a character that HTTP "
                "does not allow",
                500,
            ) from error

    def close(self) -> None:
        """Close the connections that are kept."""
        self._connections.close_idle()


_HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+\Z")


def custom_headers(route: Route) -> dict[str, str]:
    """customHeaders of the model's entry in settings.json, without what is no header."""
    found = dig(route.provider.entries.get(route.model), "customHeaders")
    return {
        name: value
        for name, value in (found.items() if isinstance(found, dict) else ())
        if isinstance(value, str) and _HEADER_NAME.match(name) and value.isprintable()
    }


def open_answer(
    routes: list[Route],
    attempt: Callable[[Route, str], Any],
    repair: Callable[[UpstreamError], bool],
    watch: Watch,
    retries: int,
) -> Any:
    """The first answer that one of the routes gives, as attempt(route, access_token) began it.

    Everything here happens before the first byte of an answer: one refresh after a 401, some repairs of a
    refused body, some retries, and the next route. attempt() raises UpstreamError for whatever is not the
    beginning of an answer; repair() changes what the next attempt sends. All of it ends with PATIENCE.
    """
    now = time.monotonic()
    routes = sorted(routes, key=lambda route: route.provider.rests_until > now)
    for index, route in enumerate(routes):
        try:
            return _open_on(
                route, attempt, repair, watch, retries, now + PATIENCE, index + 1 == len(routes)
            )
        except ProxyError as error:
            if index + 1 == len(routes) or not error.moves_on or time.monotonic() > now + PATIENCE:
                raise
            if not isinstance(error, BadRequest):
                route.provider.rests_until = time.monotonic() + REST_AFTER_FAILURE
            log.warning(
                "%s: %s; trying %s",
                route.provider.name,
                error.message,
                routes[index + 1].provider.name,
            )
    # never: routes is not empty
    raise CredentialError("no provider")


def _open_on(
    route: Route,
    attempt: Callable[[Route, str], Any],
    repair: Callable[[UpstreamError], bool],
    watch: Watch,
    retries: int,
    deadline: float,
    is_last: bool,
) -> Any:
    credentials, rejected, repairs, delay = (
        route.provider.credentials,
        "",
        MAX_REPAIRS,
        RETRY_DELAY_FIRST,
    )
    while True:
        access_token = credentials.access_token(rejected, watch.sleep)
        try:
            return attempt(route, access_token)
        except UpstreamError as error:
            if error.code == "invalid_api_key" and credentials.kind == "oauth":
                if rejected or access_token == credentials.useless_token:
                    credentials.useless_token = access_token
                    raise UpstreamError(
                        "{}. {}.".format(error.message.rstrip("."), FREE_TIER_ENDED),
                        401,
                        error.code,
                        error.type,
                        request_id=error.request_id,
                        moves_on=True,
                    ) from error
                rejected = access_token
                continue
            if repairs and repair(error):
                repairs -= 1
                continue
            if error.code == "upstream_unreachable" and not is_last:
                # three attempts of 10 s would leave no time for the next provider
                raise
            pause = delay if error.retry_after is None else error.retry_after
            if (
                not error.retry
                or retries <= 0
                or pause > RETRY_DELAY_MOST
                or time.monotonic() + pause > deadline
            ):
                raise
            log.info("%s: %s; again in %.1f s", route.provider.name, error.message, pause)
        retries, delay = retries - 1, delay * 2
        watch.sleep(pause)


class ModelLists:
    """The live lists of models, asked for in the background and kept; any thread may ask.

    A list that is old is given out all the same while a new one is asked for, and one that cannot be had
    any more stays: a picker of models that is empty for a moment makes clients forget their choice.
    """

    def __init__(self, upstream: Upstream):
        self._upstream, self._lock = upstream, threading.Lock()
        self._lists: dict[tuple[str, str], list[str]] = {}
        self._asked: dict[tuple[str, str], float] = {}
        self._running: dict[tuple[str, str], threading.Thread] = {}

    def get(self, providers: list[Provider], seconds: float) -> list[list[str]]:
        """The list of each provider, empty where none is known that long after it was asked for; 0 asks nobody."""
        keys = [(provider.name, provider.host()) for provider in providers]
        if not seconds:
            return [self._lists.get(key, []) for key in keys]
        threads = [
            None if provider.family in UNLISTED_FAMILIES else self._refresh(provider, key)
            for provider, key in zip(providers, keys)
        ]
        for key, thread in zip(keys, threads):
            if thread is not None and key not in self._lists:
                thread.join(max(0.0, self._asked[key] + seconds - time.monotonic()))
        return [self._lists.get(key, []) for key in keys]

    def _refresh(self, provider: Provider, key: tuple[str, str]) -> threading.Thread | None:
        """The thread that asks for a list, begun if the one at hand is old; None when it is new enough."""
        with self._lock:
            if key in self._running:
                return self._running[key]
            if time.monotonic() - self._asked.get(key, float("-inf")) < MODELS_AGE:
                return None
            self._asked[key] = time.monotonic()
            thread = self._running[key] = threading.Thread(
                target=self._ask, args=(provider, key), daemon=True
            )
            thread.start()
            return thread

    def _ask(self, provider: Provider, key: tuple[str, str]) -> None:
        ids: list[str] = []
        try:
            ids = self._listed(provider)
        except ProxyError as error:
            log.debug("%s has no list of models: %s", provider.name, error.message)
        with self._lock:
            if ids:
                self._lists[key] = ids
            else:
                self._asked[key] -= MODELS_AGE - MODELS_AGE_FAILED
            del self._running[key]

    def _listed(self, provider: Provider) -> list[str]:
        access_token = provider.credentials.access_token()
        response = self._upstream.send(
            Route(provider, ""),
            "/models",
            None,
            access_token,
            Watch(timeout=MODELS_TIMEOUT),
            {"User-Agent": "qwen_proxy/" + __version__, "Accept": "application/json"},
        )
        try:
            listed = json.loads(response.read(MODELS_SIZE)) if response.status == 200 else None
        except (ValueError, RecursionError):
            listed = None
        finally:
            response.close()
        return [
            entry["id"]
            for entry in as_list(dig(listed, "data"))
            if isinstance(entry, dict) and isinstance(entry.get("id"), str) and entry["id"]
        ]


# ------------------------------------------------------------------------------------------------
# Event streams
# ------------------------------------------------------------------------------------------------
# https://html.spec.whatwg.org/multipage/server-sent-events.html, 'Interpreting an event stream'.


class Event(NamedTuple):
    """One event: its data, its name, and the HTTP status that DashScope hides in a comment line."""

    data: bytes
    name: str = ""
    status: int = 0


class EventDecoder:
    r"""Bytes in, events out; the bytes may be cut anywhere, also inside a character or a line end.

    >>> decoder = EventDecoder()
    >>> decoder.feed(b'data: a\r\ndata:b\r') + decoder.feed(b'\n\r\n: note\n\ndata: c')
    [Event(data=b'a\nb', name='', status=0)]
    >>> decoder.close()
    [Event(data=b'c', name='', status=0)]
    """

    def __init__(self) -> None:
        self._buffer, self._after_cr, self._is_first = bytearray(), False, True

    def feed(self, piece: bytes) -> list[Event]:
        """The events that are complete with this piece."""
        if self._after_cr and piece:
            piece, self._after_cr = piece[1:] if piece[:1] == b"\n" else piece, False
        if b"\r" in piece:
            self._after_cr = piece[-1:] == b"\r"
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        if not self._buffer and piece[-2:] == b"\n\n":
            return self._events(piece[:-2])
        searched = max(0, len(self._buffer) - 1)
        self._buffer += piece
        end = self._buffer.rfind(b"\n\n", searched)
        if end < 0:
            if len(self._buffer) > MAX_EVENT:
                raise UpstreamError("the upstream sent an event of more than %d bytes" % MAX_EVENT)
            return []
        complete = bytes(self._buffer[:end])
        del self._buffer[: end + 2]
        return self._events(complete)

    def close(self) -> list[Event]:
        """What the stream ended with, if its last blank line is missing."""
        rest, self._buffer = bytes(self._buffer), bytearray()
        return self._events(rest)

    def _events(self, blocks: bytes) -> list[Event]:
        if self._is_first and blocks:
            self._is_first = False
            blocks = blocks[3:] if blocks.startswith(b"\xef\xbb\xbf") else blocks
        return [event for event in map(parse_event, blocks.split(b"\n\n")) if event is not None]


def parse_event(block: bytes) -> Event | None:
    """The event in the lines between two blank ones; None where they hold no data."""
    if block.startswith(b"data:") and b"\n" not in block:
        return Event(block[6:] if block[5:6] == b" " else block[5:])
    found, name, status = [], "", 0
    for line in block.split(b"\n"):
        field, _, value = line.partition(b":")
        value = value[1:] if value[:1] == b" " else value
        if field == b"data":
            found.append(value)
        elif field == b"event":
            name = value.decode("utf-8", "replace")
        elif not field and value.startswith(b"HTTP_STATUS/") and value[12:15].isdigit():
            status = int(value[12:15])
        elif line[:1] == b"{":
            # an error without its 'data:' (upstreams behind gateways)
            found.append(line)
    return Event(b"\n".join(found), name, status) if found else None


def encode_event(data: bytes, name: str = "") -> bytes:
    """One event, ready to write; the data must hold no line end."""
    return (
        b"event: %s\ndata: %s\n\n" % (name.encode(), data) if name else b"data: " + data + b"\n\n"
    )


# never ': ping': Continue takes that for the end of the stream
KEEP_ALIVE = b": keep-alive\n\n"
DONE = b"[DONE]"


_SURROGATE = re.compile("[\ud800-\udfff]")
_JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def encode_json(value: Any) -> bytes:
    """JSON in UTF-8, unescaped: escapes would double Chinese text, and DashScope counts bytes as sent.

    Raises BadRequest for a number that JSON cannot hold, or nesting beyond what Python can write.
    """
    try:
        text = _JSON_ENCODER.encode(value)
    except (ValueError, RecursionError):
        raise BadRequest("a number is out of range, or the nesting is too deep") from None
    try:
        return text.encode()
    except UnicodeEncodeError:
        # half of a surrogate pair: somebody cut a string in an emoji
        return _SURROGATE.sub(lambda match: f"\\u{ord(match.group()):04x}", text).encode()


# ------------------------------------------------------------------------------------------------
# Requests
# ------------------------------------------------------------------------------------------------
# Pure: a client's request in, the upstream's request out. Whatever no rule below names passes
# unchanged.


class Context(NamedTuple):
    """What the rules may look at besides the body: where it goes, and what was asked about thinking."""

    family: str
    model: str
    facts: ModelFacts
    # generationConfig of the model's entry in settings.json
    config: dict
    # by the client or the entry
    thinking: Thinking
    # thinking, by the client's own words
    client_wants_it: bool = False

    @property
    def mode(self) -> str:
        """How this model thinks at this endpoint; see ModelFacts."""
        if self.config.get("thinkingMandatory") is True:
            return "always"
        # Qwen Code 0.24.4, Token Plan preset: thinking of 3.8-max cannot be switched off there.
        return (
            "always"
            if self.family == "token" and "qwen3.8-max" in self.model
            else self.facts.thinking
        )

    @property
    def speaks_qwen(self) -> bool:
        """Whether enable_thinking and its relatives are this endpoint's words for this model."""
        own = ("openrouter", "deepseek", "zai")
        return self.family in ALIBABA_FAMILIES or (
            self.family not in own and "qwen" in self.model.lower()
        )


class Thinking(NamedTuple):
    """What a client asked about thinking, in whichever of the spellings; None where it did not."""

    enabled: bool | None = None
    effort: str | None = None
    budget: int | None = None


THINKING_FIELDS = (
    "enable_thinking",
    "thinking_budget",
    "reasoning_effort",
    "reasoning",
    "thinking",
    "think",
)
LIMIT_FIELDS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
EFFORT_BUDGETS = {
    "low": 4096,
    "medium": 16_384,
    # Qwen's own tokens per level; above: the model's maximum
}


def asked_thinking(body: dict) -> Thinking:
    """Read enable_thinking, thinking_budget, reasoning_effort, reasoning, thinking, think, chat_template_kwargs.

    >>> asked_thinking({"reasoning": {"effort": "minimal"}}).enabled
    False
    """
    if not any(name in body for name in THINKING_FIELDS) and "chat_template_kwargs" not in body:
        return Thinking()
    reasoning = body.get("reasoning") if isinstance(body.get("reasoning"), dict) else {}
    thinking = body.get("thinking") if isinstance(body.get("thinking"), dict) else {}
    effort = body.get("reasoning_effort", reasoning.get("effort", body.get("think")))
    effort = effort.lower() if isinstance(effort, str) else None
    budget = next(
        (
            value
            for value in (
                body.get("thinking_budget"),
                thinking.get("budget_tokens"),
                reasoning.get("max_tokens"),
            )
            if isinstance(value, int) and not isinstance(value, bool)
        ),
        None,
    )
    enabled = next(
        (
            value
            for value in (
                body.get("enable_thinking"),
                reasoning.get("enabled"),
                body.get("think"),
                dig(body, "chat_template_kwargs", "enable_thinking"),
            )
            if isinstance(value, bool)
        ),
        None,
    )
    if enabled is None and isinstance(thinking.get("type"), str):
        enabled = thinking["type"] != "disabled"
    if enabled is None and effort is not None:
        enabled = effort not in ("none", "minimal")
    if enabled is None and budget is not None:
        enabled = budget > 0
    return Thinking(
        enabled,
        effort if effort not in ("none", "minimal") else None,
        budget if (budget or 0) > 0 else None,
    )


def check_chat_request(request: Any) -> None:
    """Raise BadRequest for what no upstream could make sense of, naming the field."""
    if not isinstance(request, dict):
        raise BadRequest(f"the body must be a JSON object, not {json_type(request)}")
    messages = request.get("messages")
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list of at least one message", param="messages")
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise BadRequest(
                "messages[%d] must be an object with a role" % index, param="messages.%d" % index
            )
        if message.get("content") is not None and not isinstance(message["content"], (str, list)):
            raise BadRequest(
                "the content of messages[%d] must be a string or a list of parts" % index,
                param="messages.%d.content" % index,
            )
        if not all(isinstance(part, dict) for part in as_list(message.get("content"))):
            raise BadRequest(
                "every part of messages[%d] must be an object" % index,
                param="messages.%d.content" % index,
            )
    for name, kinds in (
        ("stream", bool),
        ("tools", list),
        ("functions", list),
        ("stream_options", dict),
        ("response_format", dict),
    ):
        if request.get(name) is not None and not isinstance(request[name], kinds):
            raise BadRequest(
                "{} must be {}".format(
                    name, {bool: "true or false", list: "a list", dict: "an object"}[kinds]
                ),
                param=name,
            )


def with_extra_body(request: Any) -> Any:
    """The request with what stands in extra_body beside it: openai-python puts it there, others send it as written."""
    extra = dig(request, "extra_body")
    if not isinstance(extra, dict):
        return request
    log.debug("extra_body is merged: %s", ", ".join(extra))
    stated_fields = {
        name: value for name, value in request.items() if value is not None and name != "extra_body"
    }
    return {**extra, **stated_fields}


def entry_defaults(body: dict, context: Context) -> bool:
    """samplingParams and extra_body of the settings entry, where the client says nothing."""
    if not context.config:
        return False
    before = dict(body)
    given = {name: value for name, value in body.items() if value is not None}
    for name in ("samplingParams", "extra_body"):
        defaults = context.config.get(name)
        body.update(defaults if isinstance(defaults, dict) else {})
    if context.config.get("reasoning") is False:
        body["enable_thinking"] = False
    in_template = dig(given, "chat_template_kwargs", "enable_thinking")
    if in_template is not None or any(name in given for name in THINKING_FIELDS):
        for name in THINKING_FIELDS:
            body.pop(
                name,
                None,
                # what the client says of thinking replaces all that the entry says
            )
    if any(name in given for name in LIMIT_FIELDS):
        body.pop("max_tokens", None)
    body.update(given)
    return body != before


def without_nulls(body: dict, context: Context) -> bool:
    """No null that means "not set": at the top, in messages but for their content, in a JSON schema's frame."""
    changed = drop_nulls(body)
    for message in body["messages"] if "prompt" not in body else ():
        changed = drop_nulls(message, "content") or changed
    wanted = dig(body, "response_format", "json_schema")
    if isinstance(wanted, dict) and None in wanted.values():
        body["response_format"], changed = (
            {**body["response_format"], "json_schema": stated(wanted)},
            True,
        )
    return changed


def drop_nulls(value: dict, kept: str = "") -> bool:
    """In place: an object without its nulls but one; whether there were any."""
    nulls = [name for name, item in value.items() if item is None and name != kept]
    for name in nulls:
        del value[name]
    return bool(nulls)


def stated(value: Any) -> Any:
    """An object without its nulls, but for those that are values of a JSON Schema."""
    if not isinstance(value, dict):
        return value
    return {
        name: item
        for name, item in value.items()
        if item is not None or name in ("default", "const")
    }


CALL_PARTS = ("tool_use", "tool_result")


def parts_to_calls(body: dict, context: Context) -> bool:
    """Calls and results that are parts, as Anthropic has them and Cursor sends them, in OpenAI's places."""
    messages: list[dict] = []
    for message in body["messages"]:
        parts = [part for part in as_list(message.get("content")) if part.get("type") in CALL_PARTS]
        messages += with_calls(message, parts) if parts else [message]
    changed = [id(message) for message in messages] != [id(message) for message in body["messages"]]
    body["messages"] = messages
    return changed


def with_calls(message: dict, parts: list[dict]) -> list[dict]:
    """The messages for one that holds such parts: the results first, as they answer the turn before."""
    results = [
        {
            "role": "tool",
            "tool_call_id": part.get("tool_use_id"),
            "content": part.get("content") or "",
        }
        for part in parts
        if part["type"] == "tool_result"
    ]
    calls = as_list(message.get("tool_calls")) + [
        {
            "id": part.get("id"),
            "type": "function",
            "function": {
                "name": part.get("name"),
                "arguments": json.dumps(part.get("input") or {}, ensure_ascii=False),
            },
        }
        for part in parts
        if part["type"] == "tool_use"
    ]
    rest = [part for part in message["content"] if part.get("type") not in CALL_PARTS]
    if not rest and not calls:
        return results
    return [
        *results,
        {**message, "content": rest or "", **({"tool_calls": calls} if calls else {})},
    ]


def functions_to_tools(body: dict, context: Context) -> bool:
    """The deprecated functions and function_call, also in the history, as tools."""
    changed = False
    if "functions" in body:
        functions = body.pop("functions")
        body.setdefault(
            "tools", [{"type": "function", "function": function} for function in functions]
        )
        changed = True
    if "function_call" in body:
        choice = body.pop("function_call")
        body.setdefault(
            "tool_choice",
            {"type": "function", "function": choice} if isinstance(choice, dict) else choice,
        )
        changed = True
    calls = 0
    for message in body["messages"]:
        call = message.get("function_call")
        if (
            message["role"] == "assistant"
            and isinstance(call, dict)
            and not message.get("tool_calls")
        ):
            calls, changed = calls + 1, True
            message.pop("function_call")
            message["tool_calls"] = [
                {"id": "call_legacy_%d" % calls, "type": "function", "function": call}
            ]
        elif message["role"] == "function":
            changed = True
            message.update(role="tool", tool_call_id="call_legacy_%d" % calls)
    return changed


def developer_to_system(body: dict, context: Context) -> bool:
    """The role developer is called system by Qwen."""
    found = [message for message in body["messages"] if message["role"] == "developer"]
    for message in found:
        message["role"] = "system"
    return bool(found)


def text_of(content: Any) -> str:
    """The text in a message's content, be it a string or parts."""
    if isinstance(content, list):
        return "\n".join(
            part["text"]
            for part in content
            if isinstance(part, dict) and isinstance(part.get("text"), str)
        )
    return content if isinstance(content, str) else ""


def parts_of(content: Any) -> list[dict]:
    """A message's content as parts."""
    return (
        list(content)
        if isinstance(content, list)
        else [{"type": "text", "text": content}]
        if content
        else []
    )


def system_first(body: dict, context: Context) -> bool:
    """One system message, first, with the text of all; but what follows the last answer is the next thing to do."""
    messages = body["messages"]
    is_changed = system_last_to_user(messages)
    system = [message for message in messages if message["role"] == "system"]
    if len(system) == (1 if messages[0]["role"] == "system" else 0):
        return is_changed
    if any(isinstance(message.get("content"), list) for message in system):
        content: Any = [part for message in system for part in parts_of(message.get("content"))]
    else:
        content = "\n\n".join(message["content"] for message in system if message.get("content"))
    messages[:] = [{**system[0], "content": content}] + [
        message for message in messages if message["role"] != "system"
    ]
    return True


def system_last_to_user(messages: list[dict]) -> bool:
    """In place: system messages behind the last answer become the user's. SillyTavern asks so for the next reply."""
    place = len(messages)
    while place and messages[place - 1]["role"] == "system":
        place -= 1
    if place in (0, len(messages)) or messages[place - 1]["role"] != "assistant":
        return False
    messages[place:] = [{**message, "role": "user"} for message in messages[place:]]
    return True


def portal_system(body: dict, context: Context) -> bool:
    """The system message as parts, the first one with a cache_control marker."""
    messages = body["messages"]
    head = messages.pop(0) if messages[0]["role"] == "system" else {"role": "system", "content": ""}
    parts = parts_of(head.get("content")) or [{"type": "text", "text": ""}]
    is_marked = "cache_control" in parts[0]
    if not is_marked:
        parts[0] = {**parts[0], "cache_control": {"type": "ephemeral"}}
    messages.insert(0, {**head, "content": parts})
    return not is_marked


def paired_tool_messages(body: dict, context: Context) -> bool:
    """Every answer directly after its call, a stub for a call without an answer, no answer without a call."""
    messages = body["messages"]
    if not any(message["role"] == "tool" or message.get("tool_calls") for message in messages):
        return False
    answers, paired = answers_by_call(messages), []  # type: ignore[var-annotated]
    between = places_before_results(messages, {id(answer) for answer in answers.values()})
    # where the calls are that the results so far answer
    turn = -1
    for place, message in enumerate(messages):
        if message["role"] == "tool":
            continue
        if place in between and turn >= 0:
            paired.insert(turn, message)
            turn += 1
            continue
        turn = len(paired) if calls_of(message) else -1
        paired.append(message)
        for number, call in enumerate(calls_of(message)):
            paired.append(
                answers.get((place, number))
                or {
                    "role": "tool",
                    "tool_call_id": dig(call, "id"),
                    "content": "(no result: the call was interrupted)",
                }
            )
    if not paired:
        raise BadRequest(
            "messages holds nothing but answers to tool calls that are not there", param="messages"
        )
    changed = [id(message) for message in paired] != [id(message) for message in messages]
    messages[:] = paired
    return changed


def places_before_results(messages: list[dict], results: set[int]) -> set[int]:
    """Where the assistant speaks between results, as Jan has it: behind them it would have the last word."""
    places, follower = set(), ""
    for place in range(len(messages) - 1, -1, -1):
        if messages[place]["role"] != "assistant" or calls_of(messages[place]):
            follower = "tool" if id(messages[place]) in results else ""
        elif follower == "tool":
            places.add(place)
    return places


def calls_of(message: dict) -> list:
    """The tool calls of an assistant's message."""
    return message.get("tool_calls") or [] if message["role"] == "assistant" else []


def answers_by_call(messages: list[dict]) -> dict[tuple[int, int], dict]:
    """The answer to each call, by the places of its message and in it.

    Ids may occur again in later turns: an answer belongs to the nearest turn before it that waits for one of
    its id, and only without such a turn to any call of that id.
    """
    waiting: dict[str, list[tuple[int, int]]] = {}
    answers: dict[tuple[int, int], dict] = {}
    early: list[dict] = []
    for place, message in enumerate(messages):
        for number, call in enumerate(calls_of(message)):
            waiting.setdefault(str(dig(call, "id")), []).append((place, number))
        if message["role"] == "tool" and isinstance(message.get("tool_call_id"), str):
            calls = waiting.get(message["tool_call_id"])
            if calls:
                nearest = next(call for call in calls if call[0] == calls[-1][0])
                calls.remove(nearest)
                answers[nearest] = message
            else:
                early.append(message)
    for message in early:
        calls = waiting.get(message["tool_call_id"])
        if calls:
            answers[calls.pop(0)] = message
    return answers


def valid_tool_calls(body: dict, context: Context) -> bool:
    """Tool calls of the history with ids and with arguments that are JSON; no empty lists of them."""
    changed = with_call_ids(body["messages"])
    for message in body["messages"]:
        calls = message.get("tool_calls")
        if message["role"] != "assistant" or "tool_calls" not in message:
            continue
        if not isinstance(calls, list) or not calls:
            del message["tool_calls"]
            changed = True
            continue
        repaired = [valid_call(call) for call in calls]
        changed = changed or repaired != calls
        message["tool_calls"] = repaired
    return changed


def with_call_ids(messages: list[dict]) -> bool:
    """In place: ids for the calls that have none; answers without one belong to these calls in their order."""
    waiting: list[str] = []
    changed = False
    for place, message in enumerate(messages):
        calls = as_list(calls_of(message))
        waiting = [] if calls else waiting
        if any(isinstance(call, dict) and not call.get("id") for call in calls):
            ids = ["call_%d_%d" % (place, number) for number in range(len(calls))]
            waiting += [
                name
                for name, call in zip(ids, calls)
                if isinstance(call, dict) and not call.get("id")
            ]
            message["tool_calls"] = [
                call if not isinstance(call, dict) or call.get("id") else {**call, "id": name}
                for name, call in zip(ids, calls)
            ]
            changed = True
        if message["role"] == "tool" and not message.get("tool_call_id") and waiting:
            message["tool_call_id"], changed = waiting.pop(0), True
    return changed


def valid_call(call: Any) -> Any:
    """A tool call of the history whose arguments are the text of a JSON object."""
    arguments = dig(call, "function", "arguments")
    if isinstance(arguments, str) and arguments:
        try:
            json.loads(arguments)
            return call
        except (ValueError, RecursionError):
            arguments = json.dumps({"malformed_arguments": arguments}, ensure_ascii=False)
    elif isinstance(arguments, (dict, list)):
        arguments = json.dumps(arguments, ensure_ascii=False)
    else:
        arguments = "{}"
    if not isinstance(dig(call, "function"), dict):
        return call
    return {**call, "function": {**call["function"], "arguments": arguments}}


def content_present(body: dict, context: Context) -> bool:
    """Every message has content, if only an empty one."""
    missing = [message for message in body["messages"] if message.get("content") is None]
    for message in missing:
        message["content"] = ""
    return bool(missing)


def is_only_text(content: Any) -> bool:
    """Whether content is a list of nothing but text parts."""
    return isinstance(content, list) and all(
        isinstance(part, dict) and part.get("type") == "text" for part in content
    )


def flat_content(body: dict, context: Context) -> bool:
    """Text parts as one string: in answers, and wherever parts are lost or refused."""
    everywhere = (
        context.family == "deepseek" or "glm" in context.model.lower() and not body.get("tools")
    )
    changed = False
    for message in body["messages"]:
        content = message.get("content")
        if not is_only_text(content):
            continue
        is_marked = any(
            "cache_control" in part
            for part in content
            # a mark needs a part to sit on
        )
        if everywhere or message["role"] == "assistant" and not is_marked:
            message["content"], changed = text_of(content), True
    return changed


def media_out_of_tools(body: dict, context: Context) -> bool:
    """Images of a tool's answer go into a user message behind the answers."""
    messages: list[dict] = []
    media: list[dict] = []
    for message in body["messages"]:
        if message["role"] != "tool" and media:
            messages.append({"role": "user", "content": media})
            media = []
        content = message.get("content")
        if message["role"] == "tool" and isinstance(content, list):
            found = [
                part
                for part in content
                if isinstance(part, dict) and part.get("type") not in ("text", None)
            ]
            media = media + found
            if found:
                message["content"] = text_of(content) or "(see the next message)"
        messages.append(message)
    if media:
        messages.append({"role": "user", "content": media})
    changed = len(messages) != len(body["messages"])
    body["messages"][:] = messages
    return changed


def reasoning_sent_back(body: dict, context: Context) -> bool:
    """Thoughts that a client sends back are called reasoning_content; a model that never thinks gets none."""
    changed = False
    for message in body["messages"]:
        if message["role"] == "assistant" and isinstance(message.get("reasoning"), str):
            message.setdefault("reasoning_content", message["reasoning"])
            del message["reasoning"]
            changed = True
        if context.mode == "none" and message.pop("reasoning_content", None) is not None:
            changed = True
    return changed


def reasoning_required(body: dict, context: Context) -> bool:
    """Every assistant message has reasoning_content, if only an empty one."""
    missing = [
        message
        for message in body["messages"]
        if message["role"] == "assistant" and "reasoning_content" not in message
    ]
    for message in missing:
        message["reasoning_content"] = ""
    return bool(missing)


def few_cache_markers(body: dict, context: Context) -> bool:
    """Four cache_control markers at most: the first message's, which the portal wants, and the last three."""
    holders = [
        message["content"]
        for message in body["messages"]
        if isinstance(message.get("content"), list)
    ]
    holders.insert(1, as_list(body.get("tools")))
    marked = [
        part
        for holder in holders
        for part in holder
        if isinstance(part, dict) and "cache_control" in part
    ]
    surplus = {id(part) for part in (marked[1:-3] if len(marked) > 4 else ())}

    def thinned(parts: list) -> list:
        return [
            {name: value for name, value in part.items() if name != "cache_control"}
            if id(part) in surplus
            else part
            for part in parts
        ]

    if surplus and body.get("tools"):
        body["tools"] = thinned(body["tools"])
    for message in body["messages"] if surplus else ():
        if isinstance(message.get("content"), list):
            message["content"] = thinned(message["content"])
    return bool(surplus)


def max_tokens(body: dict, context: Context) -> bool:
    """One limit under its old name, the smallest if there are more, and no more than the model has."""
    before = {name: body[name] for name in LIMIT_FIELDS if name in body}
    asked = [
        value for value in before.values() if isinstance(value, int) and not isinstance(value, bool)
    ]
    if not asked:
        return False
    for name in before:
        del body[name]
    # Roo Code sends -1 for no limit
    limits = [value for value in asked if value > 0]
    if limits:
        body["max_tokens"] = min(limits + ([context.facts.output] if context.facts.output else []))
    return {name: body[name] for name in LIMIT_FIELDS if name in body} != before


def sampling_range(body: dict, context: Context) -> bool:
    """temperature below 2, top_p above 0."""
    changed = False
    if isinstance(body.get("temperature"), (int, float)) and body["temperature"] >= 2:
        body["temperature"], changed = 1.99, True
    if isinstance(body.get("top_p"), (int, float)) and body["top_p"] <= 0:
        del body["top_p"]
        changed = True
    return changed


def usable_tools(body: dict, context: Context) -> bool:
    """No empty list of tools and nothing that needs one; tools with parameters; tool_choice in OpenAI's shape."""
    if not body.get("tools"):
        dropped = [
            body.pop(name)
            for name in ("tools", "tool_choice", "parallel_tool_calls")
            if name in body
        ]
        return bool(dropped)
    repaired = [usable_tool(tool, context) for tool in body["tools"]]
    changed = repaired != body["tools"]
    body["tools"] = repaired
    choice = body.get("tool_choice")
    if (
        isinstance(choice, dict) and "function" not in choice
        # Anthropic's shapes, sent by some editors
    ):
        named = (
            {"type": "function", "function": {"name": choice.get("name")}}
            if choice.get("name")
            else None
        )
        body["tool_choice"] = named or {"any": "required", "none": "none"}.get(
            str(choice.get("type")), "auto"
        )
        return True
    return changed


def usable_tool(tool: Any, context: Context) -> Any:
    """A tool with parameters and without nulls; without `strict` where that is unknown."""
    schema = dig(tool, "input_schema") or dig(
        tool,
        "parameters",
        # Anthropic's shape, or that of /v1/responses
    )
    if isinstance(schema, dict) and "function" not in tool and isinstance(tool.get("name"), str):
        tool = {
            "type": "function",
            "cache_control": tool.get("cache_control"),
            "function": {
                "name": tool["name"],
                "description": tool.get("description"),
                "parameters": schema,
            },
        }
    function = dig(tool, "function")
    if not isinstance(function, dict):
        return tool
    kept = {
        name: value
        for name, value in function.items()
        if value is not None and (name != "strict" or context.family not in ALIBABA_FAMILIES)
    }
    kept.setdefault("parameters", {"type": "object", "properties": {}})
    if isinstance(dig(kept, "parameters", "properties"), dict):
        properties = {
            name: stated(value) for name, value in kept["parameters"]["properties"].items()
        }
        kept["parameters"] = {**stated(kept["parameters"]), "properties": properties}
    return {**stated(tool), "function": kept}


# Overview page of Model Studio's OpenAI compatibility: 'ignored'; object metadata and the rest are
# refused
# by models of other makers behind it (Qwen Code, dashscope.ts).
OPENAI_ONLY = (
    "logit_bias",
    "metadata",
    "prediction",
    "prompt_cache_key",
    "prompt_cache_retention",
    "safety_identifier",
    "service_tier",
    "store",
    "verbosity",
    "web_search_options",
)


def without_openai_only(body: dict, context: Context) -> bool:
    """Fields that only OpenAI itself knows are left out."""
    dropped = [body.pop(name) for name in OPENAI_ONLY if name in body]
    if not isinstance(body.get("user", ""), str):
        dropped.append(body.pop("user"))
    if body.get("n") == 1:
        dropped.append(body.pop("n"))
    if body.get("modalities") == ["text"]:
        dropped.append(body.pop("modalities"))
    return bool(dropped)


# Controls for other servers that clients offer for every server. What nobody here knows of passes,
# as a parameter
# that Qwen will have tomorrow.
FOREIGN_FIELDS = (
    # Ollama, as Open WebUI's advanced parameters and Jan name them
    "auto_compact",
    "ctx_len",
    "format",
    "keep_alive",
    "mirostat",
    "mirostat_eta",
    "mirostat_tau",
    "num_batch",
    "num_ctx",
    "num_gpu",
    "num_keep",
    "num_thread",
    "repeat_last_n",
    "use_mlock",
    "use_mmap",
    # llama.cpp, KoboldCpp, text-generation-webui, as SillyTavern names them
    "add_bos_token",
    "cache_prompt",
    "dry_allowed_length",
    "dry_base",
    "dry_multiplier",
    "dry_sequence_breakers",
    "min_p",
    "sampler_order",
    "tfs",
    "tfs_z",
    "top_a",
    "typical_p",
    "xtc_probability",
    "xtc_threshold",
    # OpenRouter and Mistral
    "include_reasoning",
    "models",
    "plugins",
    "provider",
    "route",
    "safe_prompt",
    "transforms",
    "usage",
)


def without_foreign_fields(body: dict, context: Context) -> bool:
    """Fields of other servers are left out, and the one that Qwen has too gets Qwen's name."""
    dropped = [body.pop(name) for name in FOREIGN_FIELDS if name in body]
    if "repeat_penalty" not in body:
        return bool(dropped)
    body.setdefault("repetition_penalty", body["repeat_penalty"])
    del body["repeat_penalty"]
    return True


def web_search(body: dict, context: Context) -> bool | str:
    """web_search_options asks for the search of the endpoint, where there is one."""
    if "web_search_options" not in body:
        return False
    if context.family not in ALIBABA_FAMILIES:
        return not body["web_search_options"] and not body.pop("web_search_options")
    if context.family != "dashscope":
        return "no web search, since this endpoint has none"
    body.setdefault("enable_search", True)
    return True


def qwen_thinking(body: dict, context: Context) -> bool:
    """What the client asked about thinking, in Qwen's words and as far as the model can."""
    asked, mode = context.thinking, context.mode
    before = {
        name: body[name] for name in THINKING_FIELDS + ("chat_template_kwargs",) if name in body
    }
    if not before:
        return False
    template = (
        body["chat_template_kwargs"] if isinstance(body.get("chat_template_kwargs"), dict) else {}
    )
    template = {name: value for name, value in template.items() if name != "enable_thinking"}
    for name in before:
        del body[name]
    if template:
        body["chat_template_kwargs"] = template
    if mode == "none" or asked.enabled is None:
        return True
    if not asked.enabled:
        if mode != "always":
            thinking_off(body, context)
    elif mode == "effort" and asked.budget is None:
        body["reasoning_effort"] = {"low": "low", "medium": "medium", "high": "high"}.get(
            asked.effort or "", "xhigh"
        )
    else:
        if mode != "always":
            body["enable_thinking"] = True
        budget = asked.budget or (
            EFFORT_BUDGETS.get(asked.effort or "") if mode != "unknown" else None
        )
        if budget:
            body["thinking_budget"] = budget
    return {
        name: body[name] for name in (*THINKING_FIELDS, "chat_template_kwargs") if name in body
    } != before


def thinking_off(body: dict, context: Context) -> None:
    """Switch thinking off: qwen3.8 by its effort, all others by enable_thinking."""
    for name in ("thinking_budget", "reasoning_effort", "enable_thinking"):
        body.pop(name, None)
    if context.mode == "effort":
        body["reasoning_effort"] = "none"
    else:
        body["enable_thinking"] = False


def other_thinking(body: dict, context: Context) -> bool:
    """The same in the words of OpenRouter, DeepSeek and Z.AI."""
    asked = context.thinking
    if asked.enabled is None:
        return False
    reasoning = body["reasoning"] if isinstance(body.get("reasoning"), dict) else {}
    for name in THINKING_FIELDS:
        body.pop(name, None)
    if context.family == "openrouter":
        kept = {
            name: value
            for name, value in reasoning.items()
            if name not in ("effort", "max_tokens", "enabled")
        }
        how = (
            {"effort": asked.effort}
            if asked.effort
            else {"max_tokens": asked.budget}
            if asked.budget
            else {"enabled": True}
        )
        body["reasoning"] = {**kept, **(how if asked.enabled else {"enabled": False})}
        return True
    if not asked.enabled:
        body["thinking"] = {"type": "disabled"}
    elif asked.effort:
        names = (
            {"low": "high", "medium": "high", "xhigh": "max"}
            if context.family == "deepseek"
            else {}
        )
        body["reasoning_effort"] = names.get(asked.effort, asked.effort)
    else:
        body["thinking"] = {"type": "enabled"}
    return True


def thinks(body: dict, context: Context) -> bool:
    """Whether the model will think about this body."""
    if (
        body.get("enable_thinking") is False
        or body.get("reasoning_effort") == "none"
        or context.mode == "none"
    ):
        return False
    return (
        bool(body.get("enable_thinking"))
        or "thinking_budget" in body
        or context.mode in ("on", "always", "effort")
    )


def can_stop_thinking(context: Context) -> bool:
    """Whether thinking is only a default here, not the model's nature or the client's wish."""
    return context.mode != "always" and not context.client_wants_it


def forced_tool(body: dict, context: Context) -> bool | str:
    """Model Studio, 'Function calling': while thinking, tool_choice is only auto or none."""
    choice = body.get("tool_choice")
    if not (choice == "required" or isinstance(choice, dict)) or not thinks(body, context):
        return False
    if can_stop_thinking(context):
        thinking_off(body, context)
        return "no thinking, since a tool call is forced"
    call_in_words(body)
    return "the tool call is asked for in words only, since the model thinks"


def call_in_words(body: dict) -> None:
    """A sentence instead of a tool_choice that forces a call; of a named tool nothing else is offered."""
    name = dig(body["tool_choice"], "function", "name")
    named = [
        tool
        for tool in body["tools"]
        if isinstance(name, str) and dig(tool, "function", "name") == name
    ]
    body["tools"], body["tool_choice"] = named or body["tools"], "auto"
    add_instruction(
        body,
        "Call %s now; do not answer in text."
        % ("the tool " + name if named else "one of the tools"),
    )


def wants_json(body: dict) -> bool:
    """Whether a request asks for nothing but JSON."""
    return dig(body, "response_format", "type") in ("json_object", "json_schema")


def json_output(body: dict, context: Context) -> bool | str:
    """Model Studio, 'Structured output': no JSON mode while thinking."""
    if not wants_json(body) or not thinks(body, context):
        return False
    if can_stop_thinking(context):
        thinking_off(body, context)
        return "no thinking, since JSON is asked for"
    add_instruction(body, schema_instruction(body.pop("response_format")))
    return "JSON is asked for in words only, since the model thinks"


def json_word(body: dict, context: Context) -> bool:
    """Refused otherwise: 'messages' must contain the word 'json' in some form."""
    if not wants_json(body):
        return False
    if any("json" in text_of(message.get("content")).lower() for message in body["messages"]):
        return False
    add_instruction(body, "Answer in JSON.")
    return True


def schema_instruction(response_format: dict) -> str:
    """The words that stand in for a response_format that cannot be sent."""
    schema = dig(response_format, "json_schema", "schema")
    words = "Answer with one JSON object only: no other text, no code fence."
    if schema is None:
        return words
    return words + " It must match this JSON Schema:\n" + json.dumps(schema, ensure_ascii=False)


def add_instruction(body: dict, text: str) -> None:
    """Append a sentence to the system message, or put one first."""
    messages = body["messages"]
    if not messages or messages[0]["role"] != "system":
        messages.insert(0, {"role": "system", "content": text})
        return
    content = messages[0].get("content")
    if isinstance(content, list):
        joined: Any = content + [{"type": "text", "text": text}]
    else:
        joined = (content or "") + "\n\n" + text
    messages[0] = {**messages[0], "content": joined}


def streamed(body: dict, context: Context) -> bool:
    """The upstream always streams and always counts."""
    options = body.get("stream_options")
    before = (body.get("stream"), options)
    body["stream"] = True
    kept = dict(options) if isinstance(options, dict) else {}
    kept.pop("include_obfuscation", None)
    body["stream_options"] = {**kept, "include_usage": True}
    return before != (True, body["stream_options"])


class Rule(NamedTuple):
    """One deliberate change: what it is called, where it applies, what does it, and why."""

    name: str
    apply: Callable[
        [dict, Context], bool | str
        # changes the body; says whether, or what was given up
    ]
    where: Callable[[Context], bool]
    source: str


def _anywhere(context: Context) -> bool:
    return True


def _alibaba(context: Context) -> bool:
    return context.family in ALIBABA_FAMILIES


# In this order. `where` gates a rule by the endpoint's or the model's family, never by one host's
# name.
RULES = tuple(
    Rule(*row)
    for row in (
        (
            "entry-defaults",
            entry_defaults,
            _anywhere,
            "Qwen Code, model-providers.md: samplingParams, extra_body",
        ),
        (
            "no-nulls",
            without_nulls,
            _anywhere,
            "pydantic-ai and LangChain JS send null for 'not set'",
        ),
        (
            "parts-to-calls",
            parts_to_calls,
            _anywhere,
            "Anthropic's messages, which Cursor sends to chat completions",
        ),
        (
            "legacy-functions",
            functions_to_tools,
            _anywhere,
            "OpenAI reference: functions, deprecated by tools",
        ),
        (
            "developer-role",
            developer_to_system,
            _anywhere,
            "DashScope 400: developer is not one of [...]",
        ),
        (
            "system-first",
            system_first,
            lambda c: _alibaba(c) or c.speaks_qwen,
            "400: System message must be at the beginning.",
        ),
        (
            "portal-system",
            portal_system,
            lambda c: c.family == "portal",
            "CLIProxyAPI 29dba0399, PR #2520, #2537",
        ),
        (
            "tool-calls",
            valid_tool_calls,
            _anywhere,
            "DashScope 400: function.arguments must be in JSON format",
        ),
        (
            "tool-pairs",
            paired_tool_messages,
            _anywhere,
            "DashScope 400, both ways: qwen-code #656, #2360",
        ),
        ("tool-media", media_out_of_tools, _alibaba, "Qwen Code, converter.ts: splitToolMedia"),
        (
            "content-present",
            content_present,
            _anywhere,
            "DashScope 400: Field required: input.messages.N.content",
        ),
        (
            "reasoning-name",
            reasoning_sent_back,
            lambda c: c.family != "openrouter",
            "Model Studio, 'Deep thinking'",
        ),
        (
            "reasoning-required",
            reasoning_required,
            lambda c: c.family == "deepseek",
            "DeepSeek API, thinking mode",
        ),
        (
            "flat-content",
            flat_content,
            lambda c: _alibaba(c) or c.family == "deepseek",
            "Model Studio, chat reference: an answer's content is a string; Qwen Code, dashscope.ts: glm loses parts",
        ),
        ("cache-markers", few_cache_markers, _alibaba, "Model Studio, 'Context cache': at most 4"),
        (
            "max-tokens",
            max_tokens,
            lambda c: c.family not in ("openrouter", "other") or c.speaks_qwen,
            "DashScope 400: Range of max_tokens should be [1, N]",
        ),
        (
            "sampling-range",
            sampling_range,
            _alibaba,
            "Model Studio, chat reference: temperature [0, 2), top_p (0, 1]",
        ),
        (
            "tools",
            usable_tools,
            _anywhere,
            "MiniMax 400: function parameters is empty; vLLM: null tool_choice",
        ),
        ("web-search", web_search, _anywhere, "Model Studio, chat reference: enable_search"),
        (
            "openai-only",
            without_openai_only,
            lambda c: _alibaba(c) or c.family == "modelscope",
            "Model Studio, OpenAI compatibility",
        ),
        (
            "foreign-fields",
            without_foreign_fields,
            _alibaba,
            "Open WebUI 0.12, SillyTavern 1.19, Jan 0.8: their settings",
        ),
        (
            "thinking",
            qwen_thinking,
            lambda c: _alibaba(c) or c.speaks_qwen and c.mode != "unknown",
            "Model Studio, 'Deep thinking'",
        ),
        (
            "thinking-words",
            other_thinking,
            lambda c: c.family in ("openrouter", "deepseek", "zai"),
            "each provider's reference",
        ),
        ("forced-tool", forced_tool, lambda c: c.speaks_qwen, "Model Studio, 'Function calling'"),
        ("json-output", json_output, lambda c: c.speaks_qwen, "Model Studio, 'Structured output'"),
        ("json-word", json_word, lambda c: c.speaks_qwen, "Model Studio, 'Structured output'"),
        ("stream", streamed, _anywhere, "one path for all: see iter_chunks"),
    )
)


@functools.lru_cache(maxsize=256)
def rules_for(family: str, model: str, thinking_mandatory: bool) -> list[Rule]:
    """The rules that apply at an endpoint to a model: no gate looks at the body."""
    context = Context(
        family, model, model_facts(model), {"thinkingMandatory": thinking_mandatory}, Thinking()
    )
    return [rule for rule in RULES if rule.where(context)]


def to_upstream_request(request: dict, route: Route) -> tuple[dict, dict[str, str]]:
    """The body for the upstream, and the rules that changed it. The request stays as it is.

    The rules are names, each with what the client does not get because of it, mostly nothing.
    """
    family, config = route.provider.family, route.provider.entries.get(route.model) or {}
    body = {
        **request,
        "model": route.model,
        "messages": [dict(message) for message in request["messages"]],
    }
    wants_thinking = bool(asked_thinking(request).enabled)
    context, fired = (
        Context(family, route.model, model_facts(route.model), config, Thinking(), wants_thinking),
        {},
    )
    for rule in rules_for(family, route.model, config.get("thinkingMandatory") is True):
        changed = rule.apply(body, context)
        if changed:
            fired[rule.name] = changed if isinstance(changed, str) else ""
        # now the body says all that is known of thinking
        if rule.name == "no-nulls":
            context = context._replace(thinking=asked_thinking(body))
    return body, fired


def check_text_request(request: Any) -> None:
    """Raise BadRequest for what is no request for a text completion."""
    if not isinstance(request, dict):
        raise BadRequest(f"the body must be a JSON object, not {json_type(request)}")
    if not isinstance(request.get("prompt"), (str, list)):
        raise BadRequest("prompt must be a string or a list", param="prompt")
    for name, kind, words in (
        ("stream", bool, "true or false"),
        ("stream_options", dict, "an object"),
    ):
        if request.get(name) is not None and not isinstance(request[name], kind):
            raise BadRequest(f"{name} must be {words}", param=name)


def fill_in_the_middle(body: dict, context: Context) -> bool:
    """prompt and suffix as one prompt with Qwen's marks."""
    if not isinstance(body.get("suffix"), str) or not isinstance(body["prompt"], str):
        return False
    body["prompt"] = "<|fim_prefix|>{}<|fim_suffix|>{}<|fim_middle|>".format(
        body["prompt"],
        body.pop("suffix"),
    )
    return True


TEXT_RULES = (
    *(
        rule
        for rule in RULES
        if rule.name
        in (
            "entry-defaults",
            "no-nulls",
            "max-tokens",
            "sampling-range",
            "openai-only",
            "foreign-fields",
            "stream",
        )
    ),
    Rule(
        "fill-in-the-middle",
        fill_in_the_middle,
        _alibaba,
        "Model Studio, 'Completions': there is no suffix parameter",
    ),
)


def to_upstream_text_request(request: dict, route: Route) -> tuple[dict, dict[str, str]]:
    """The same for a text completion."""
    family, config = route.provider.family, route.provider.entries.get(route.model) or {}
    context = Context(family, route.model, model_facts(route.model), config, Thinking())
    body = {**request, "model": route.model}
    return body, {
        rule.name: "" for rule in TEXT_RULES if rule.where(context) and rule.apply(body, context)
    }


def embedding_texts(request: Any) -> list[str]:
    """The texts of a request for embeddings; raises BadRequest that names what is wrong with them."""
    if not isinstance(request, dict):
        raise BadRequest(f"the body must be a JSON object, not {json_type(request)}")
    if not isinstance(request.get("model"), str) or not request["model"].strip():
        raise BadRequest("model must be named, such as text-embedding-v4", param="model")
    if request.get("encoding_format") not in (None, "float", "base64"):
        raise BadRequest("encoding_format must be float or base64", param="encoding_format")
    texts = [request["input"]] if isinstance(request.get("input"), str) else request.get("input")
    if not isinstance(texts, list) or not texts:
        raise BadRequest("input must be a string or a list of strings", param="input")
    if isinstance(texts[0], (int, list)):
        raise BadRequest(
            "token array input is not supported, since the tokens are another model's; send text (in "
            "LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))",
            param="input",
        )
    if len(texts) > MAX_EMBEDDING_INPUTS:
        raise BadRequest(
            "input may hold %d texts, not %d" % (MAX_EMBEDDING_INPUTS, len(texts)), param="input"
        )
    wrong = next(
        (index for index, text in enumerate(texts) if not isinstance(text, str) or not text), None
    )
    if wrong is not None:
        raise BadRequest(
            "input[%d] must be a string that is not empty" % wrong, param="input.%d" % wrong
        )
    return texts


def embedding_batch_size(route: Route) -> int:
    """How many texts a request to this route may hold."""
    if route.provider.family not in ALIBABA_FAMILIES and not route.model.lower().startswith(
        "text-embedding-v"
    ):
        # nobody else has models of Model Studio's names
        return MAX_EMBEDDING_INPUTS
    return next(
        size
        for pattern, size in EMBEDDING_BATCHES
        if fnmatch.fnmatchcase(route.model.lower(), pattern)
    )


def to_embedding_request(request: dict, texts: list[str], route: Route) -> dict:
    """The upstream's request for some of the texts: always floats, since Model Studio documents nothing else."""
    dropped = ("user",) if route.provider.family in ALIBABA_FAMILIES else ()
    body = {
        name: value for name, value in request.items() if value is not None and name not in dropped
    }
    return {**body, "model": route.model, "input": texts, "encoding_format": "float"}


def schema_to_prompt(body: dict, match: Any) -> str:
    """A JSON schema that was refused goes into the prompt."""
    wanted = body["response_format"]
    body["response_format"] = {"type": "json_object"}
    add_instruction(body, schema_instruction(wanted))
    return "with the JSON schema in words"


def set_max_tokens(body: dict, match: Any) -> str:
    """The limit that the refusal names."""
    body["max_tokens"] = int(match.group(1))
    return "with max_tokens %d" % body["max_tokens"]


def set_thinking_budget(body: dict, match: Any) -> str:
    """The limit that the refusal names."""
    body["thinking_budget"] = int(match.group(1))
    return "with thinking_budget %d" % body["thinking_budget"]


def drop_logprobs(body: dict, match: Any) -> str:
    """No log probabilities."""
    body.pop("logprobs", None)
    body.pop("top_logprobs", None)
    return "without log probabilities"


def think_on(body: dict, match: Any) -> str:
    """Thinking that cannot be switched off stays on."""
    body["enable_thinking"] = True
    return "with thinking"


def think_off(body: dict, match: Any) -> str:
    """A model that thinks by default, though nobody here knew."""
    body["enable_thinking"] = False
    return "without thinking"


def json_in_words(body: dict, match: Any) -> str:
    """Where the client wants thinking, JSON is asked for in words."""
    add_instruction(body, schema_instruction(body.pop("response_format")))
    return "with the JSON asked for in words only"


def tool_in_words(body: dict, match: Any) -> str:
    """A choice that was refused is left to the model."""
    call_in_words(body)
    return "with the tool call asked for in words only"


def _forces_tool(body: dict) -> bool:
    return bool(body.get("tools")) and body.get("tool_choice") not in (None, "auto", "none")


# What an upstream may refuse by name: the text of its 400, whether the body has it, and what to do
# about it.
REPAIRS: tuple[tuple[str, Callable[[dict], bool], Callable[[dict, Any], str]], ...] = (
    (
        r"[Rr]ange of max_tokens should be \[\d+, ?(\d+)\]",
        lambda body: "max_tokens" in body,
        set_max_tokens,
    ),
    (
        r"thinking_budget.*not greater than (\d+)",
        lambda body: "thinking_budget" in body,
        set_thinking_budget,
    ),
    (
        r"enable_thinking is true",
        lambda body: wants_json(body) and "enable_thinking" not in body,
        think_off,
    ),
    (
        r"enable_thinking is true",
        lambda body: wants_json(body) and body["enable_thinking"] is True,
        json_in_words,
    ),
    (
        r"json_schema|response_format",
        lambda body: dig(body, "response_format", "type") == "json_schema",
        schema_to_prompt,
    ),
    (r"logprobs", lambda body: "logprobs" in body or "top_logprobs" in body, drop_logprobs),
    (
        r"enable_thinking.*(restricted to True|must be True)",
        lambda body: body.get("enable_thinking") is False,
        think_on,
    ),
    (
        r'tool_choice.*\["none", "auto"\]',
        lambda body: _forces_tool(body) and "enable_thinking" not in body,
        think_off,
    ),
    (r"tool_choice", _forces_tool, tool_in_words),
)


# these need messages
IN_WORDS = (schema_to_prompt, json_in_words, tool_in_words)


def repair_request(body: dict, error: UpstreamError) -> str:
    """Take out of the body what the upstream has just refused by name; says how, or "" if there was no such thing."""
    for pattern, applies, repair in REPAIRS if error.status == 400 else ():
        match = re.search(pattern, error.message[:CLASSIFIED], re.S)
        if match and applies(body) and not ("prompt" in body and repair in IN_WORDS):
            before, how = dict(body), repair(body, match)
            # the same body would be refused again
            return how if body != before else ""
    return ""


# ------------------------------------------------------------------------------------------------
# Responses
# ------------------------------------------------------------------------------------------------
# Pure: the upstream's events in, the client's chunks out; a refusal's text in, an UpstreamError
# out.


class Refusal(NamedTuple):
    """What an upstream's refusal says, whichever of its shapes it has."""

    status: int
    message: str
    code: str = ""
    request_id: str | None = None
    param: str | None = None


class Verdict(NamedTuple):
    """What becomes of a refusal: conditions, then the answer. status 0 keeps the upstream's."""

    # () for any
    statuses: tuple[int, ...]
    # searched in 'code: message', ignoring case
    pattern: str
    status: int
    type: str
    # None keeps the upstream's
    code: str | None
    retry: bool = False
    moves_on: bool = False
    # () for any
    families: tuple[str, ...] = ()


# First match wins. Model Studio 'Error messages', Coding Plan FAQ, qwen-code issues; by text where
# the code
# lies: insufficient_quota and Throttling.AllocationQuota are mostly a limit per minute, that
# recovers.
CATALOGUE = tuple(
    Verdict(*row)
    for row in (
        (
            (),
            r"data_?inspection_?failed|inappropriate content",
            400,
            "invalid_request_error",
            "content_filter",
        ),
        (
            (),
            r"range of input length|maximum context length|context_length_exceeded",
            400,
            "invalid_request_error",
            "context_length_exceeded",
        ),
        (
            (),
            r"max bytes to request body|BadRequest\.TooLarge|entity too large|string value length|max data-uri",
            413,
            "invalid_request_error",
            "request_too_large",
        ),
        (
            (),
            r"arrearage|good standing|overdue|CommodityNotPurchased",
            429,
            "insufficient_quota",
            "insufficient_quota",
            False,
            True,
        ),
        (
            (),
            r"free allocated quota|free tier of the model|FreeTierOnly|(hour|week|month)\w* allocated quota|will reset at|"
            r"daily (quota|limit)|quota_exceeded",
            429,
            "insufficient_quota",
            "insufficient_quota",
            False,
            True,
        ),
        ((402,), r"", 429, "insufficient_quota", "insufficient_quota", False, True),
        (
            (403,),
            r"insufficient_quota",
            429,
            "insufficient_quota",
            "insufficient_quota",
            False,
            True,
        ),
        (
            (429,),
            r"insufficient_quota",
            429,
            "insufficient_quota",
            "insufficient_quota",
            False,
            True,
            ("portal",),
        ),
        ((), r"only available for coding agents", 403, "permission_error", "client_not_accepted"),
        (
            (500, 503, 0),
            r"ModelServingError|ModelUnavailable|too many requests",
            503,
            "server_error",
            None,
            True,
        ),
        ((429,), r"", 429, "rate_limit_error", "rate_limit_exceeded", True),
        (
            (),
            r"throttling|limit_?requests|limit_burst_rate|insufficient_quota|allocated quota exceeded|rate limit"
            r"|\b130[25]: ",
            429,
            "rate_limit_error",
            "rate_limit_exceeded",
            True,
        ),
        ((401,), r"", 401, "authentication_error", "invalid_api_key", False, True),
        (
            (403, 0),
            r"invalid.?api.?-?key|access token|token expired|session has expired|unauthorized",
            401,
            "authentication_error",
            "invalid_api_key",
            False,
            True,
        ),
        ((403,), r"", 403, "permission_error", None),
        ((0,), r"access_?denied|unpurchased", 403, "permission_error", None),
        (
            (404, 400, 0),
            r"model_?not_?found|model( \S+| '[^']*')?( does| is)?( currently)? not (exist|supported)"
            r"|unsupported model",
            404,
            "invalid_request_error",
            "model_not_found",
        ),
        ((404,), r"", 404, "invalid_request_error", None),
        ((413,), r"", 413, "invalid_request_error", "request_too_large"),
        ((504,), r"", 504, "upstream_timeout", None),
        ((), r"RequestTimeOut|stream timeout", 504, "upstream_timeout", None),
        ((502, 503, 529), r"", 503, "server_error", None, True, True),
        ((0,), r"invalid_?parameter|invalid_request", 400, "invalid_request_error", None),
        ((400, 405, 406, 408, 409, 411, 414, 415, 422), r"", 400, "invalid_request_error", None),
    )
)

# A way out, by the verdict's code and the endpoint's family; '' stands for every other family.
ADVICE = {
    (
        "invalid_api_key",
        "coding",
    ): "A Coding Plan key (sk-sp-...) works only at the host and region it was issued for, and only while the plan "
    "runs; compare --provider coding and coding-intl",
    (
        "invalid_api_key",
        "token",
    ): "A Token Plan key works only in its own region; compare --provider token-cn and token-intl",
    (
        "invalid_api_key",
        "dashscope",
    ): "A key works only in its own region, and plan keys (sk-sp-...) not at all here; compare --provider dashscope, "
    "dashscope-intl, dashscope-us and dashscope-hk",
    ("invalid_api_key", "portal"): "",
    ("invalid_api_key", ""): "Check the key and that it belongs to this base URL",
    (
        "client_not_accepted",
        "coding",
    ): "The Coding Plan accepts requests of interactive coding tools only and judges by their User-Agent, which is "
    "passed on as your client sent it",
    (
        "request_too_large",
        "dashscope",
    ): "Send less text or fewer images; the endpoint takes about 6 MiB of text",
}


def refusal_of(status: int, text: str) -> Refusal:
    """Read a refusal by its content, never by its type: JSON, JSON within SSE lines, or any text.

    >>> refusal_of(400, 'data: {"code":"InvalidParameter","message":"m","request_id":"r1"}')
    Refusal(status=400, message='m', code='InvalidParameter', request_id='r1', param=None)
    """
    stripped = text.strip().lstrip("\ufeff")
    if stripped[:1] not in ("{", "<"):
        events = [
            event
            for event in EventDecoder().feed(stripped.encode("utf-8", "replace") + b"\n\n")
            if event.data[:1] == b"{"
        ]
        if events:
            return refusal_of(events[0].status or status, events[0].data.decode("utf-8", "replace"))
    try:
        value = json.loads(stripped)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict):
        return refusal_in(status, value)
    # DashScope's own messages begin with <400>
    page = web_page(stripped)
    if page:
        return Refusal(status, f"a gateway answered with {page} instead of the API", "html")
    return Refusal(status, " ".join(shorten(stripped, 500).split()))


def refusal_in(status: int, value: dict) -> Refusal:
    """The refusal in a JSON object: OpenAI's shape, the native one, a bare string, or one within another."""
    error = value.get("error", value)
    if isinstance(error, str):
        code = value.get("code") or error
        error = {**value, "code": code} if "message" in value else {"message": error, "code": error}
    if not isinstance(error, dict):
        error = {}
    choices = value.get("choices")
    content = dig(choices[0] if isinstance(choices, list) and choices else None, "delta", "content")
    # error_finish: the text of the error is the content
    if isinstance(content, str) and content:
        return refusal_of(status, content)
    message = next(
        (
            item
            for item in (
                error.get("message"),
                error.get("detail"),
                value.get("detail"),
                value.get("message"),
            )
            if isinstance(item, str) and item
        ),
        "",
    )
    codes = [
        str(item)
        for item in (error.get("code"), error.get("type"))
        if isinstance(item, (str, int)) and item != ""
    ]
    code = next((code for code in codes if len(code) <= 60 and len(code.split()) == 1), "")
    request_id = next(
        (
            item
            for item in (value.get("request_id"), error.get("request_id"), value.get("traceId"))
            if isinstance(item, str)
        ),
        None,
    )
    param = error.get("param")
    if message.startswith(("{", "data:", "id:", "event:")):
        # JSON or a frame as the message
        inner = refusal_of(status, message)
        return inner._replace(request_id=request_id or inner.request_id, code=inner.code or code)
    return Refusal(
        status, message, code, request_id, shorten(param, 200) if isinstance(param, str) else None
    )


def to_upstream_error(
    refusal: Refusal, family: str, retry_after: float | None = None
) -> UpstreamError:
    """The error for the client: status, type and code of the catalogue, the upstream's message, advice."""
    text = (f"{refusal.code}: {refusal.message}")[:CLASSIFIED]
    matching = (
        row
        for row in CATALOGUE
        if (not row.statuses or refusal.status in row.statuses)
        and (not row.families or family in row.families)
        and re.search(row.pattern, text, re.I)
    )
    verdict = next(matching, Verdict((), "", 502, "upstream_error", None))
    if refusal.code == "html" and refusal.status not in RETRY_STATUSES:
        verdict = Verdict((), "", 502, "upstream_error", "upstream_html")
    code = verdict.code or refusal.code or None
    message = refusal.message or (
        "the upstream answered HTTP %d without a word" % refusal.status
        if refusal.status
        else "the upstream reported an error and said no word about it"
    )
    if refusal.status == 404 and not refusal.message:
        message = "the upstream knows no such path (HTTP 404, empty answer); check the base URL"
    advice = ADVICE.get((code or "", family), ADVICE.get((code or "", ""), ""))
    if refusal.status in range(300, 400):
        message = (
            "the upstream wants to redirect the request elsewhere, which is not followed with a key; "
            "check the base URL"
        )
    headers = []
    if verdict.status == 429 and verdict.retry:
        seconds = min(max(5 if retry_after is None else retry_after, 1), RETRY_AFTER_MOST)
        headers.append(("Retry-After", str(int(seconds))))
    elif verdict.status == 503 and retry_after is not None:
        headers.append(("Retry-After", str(int(min(max(retry_after, 1), RETRY_AFTER_MOST)))))
    if verdict.code == "insufficient_quota":
        headers.append(
            ("x-should-retry", "false")
            # openai-python and -node would retry a 429 otherwise
        )
    return UpstreamError(
        message + (". " + advice if advice else ""),
        verdict.status,
        code,
        verdict.type,
        refusal.param,
        refusal.request_id,
        headers,
        verdict.retry,
        retry_after,
        verdict.moves_on,
    )


def retry_after_of(headers: Any) -> float | None:
    """Seconds of retry-after-ms or Retry-After (RFC 9110 10.2.3); None without, or for what is neither."""
    for name, scale in (("retry-after-ms", 1000), ("retry-after", 1)):
        value = (headers.get(name) or "").strip()
        if re.match(r"\d{1,9}(\.\d+)?\Z", value):
            return float(value) / scale
    try:
        return max(0.0, parsedate_to_datetime(headers.get("retry-after")).timestamp() - time.time())
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


class Increments:
    """Makes increments of a text that may arrive cumulatively: each delta all of the text so far.

    Some Coding Plan paths do that (qwen-code #1184, #3279, PR #3896). An increment may start with the
    whole text so far as well: "ha" and then "haha" is the text "hahaha". The two are told apart by
    evidence: how many characters were repeated, delta by delta, while each delta extended the one before
    it. Only what both readings agree on is passed on until one of them is out: one delta that does not
    start with the delta before it proves increments for good; EVIDENCE repeated characters prove a
    cumulative stream, unless the text is one short unit over and over, which is what a model that
    laughs or draws a line really sends. A mere repeat of fewer characters is an increment, as to wait would
    make every answer of equal chunks late; a longer one speaks for neither. Undecidable are cumulative answers
    that end before that, and periodic ones: they are read as increments. What is read wrongly is an answer whose
    first increments each begin with all of the one before, as rows that grow ("1 2 3", "1 2 3 4 5 6", ...).
    """

    EVIDENCE = 24

    def __init__(self) -> None:
        # increments for good: feed() need not be asked any more
        self.is_settled = False
        self._is_cumulative = False
        self._joined = self._latest = ""
        self._sent = self._evidence = 0

    def feed(self, text: str) -> str:
        """The text to pass on now."""
        if self.is_settled or not text:
            return text
        if self._is_cumulative:
            return self._feed_cumulative(text)
        is_repeat = bool(self._latest) and text == self._latest
        if not text.startswith(self._latest) or is_repeat and self._is_increment(text):
            return self._settle(self._joined + text)
        self._evidence += 0 if is_repeat else len(self._latest)
        self._joined, self._latest = self._joined + text, text
        if self._evidence >= self.EVIDENCE and not is_periodic(text):
            self._is_cumulative = True
            fresh, self._sent = text[self._sent :], len(text)
            return fresh
        agreed = len(os.path.commonprefix([self._joined, text]))
        fresh, self._sent = self._joined[self._sent : agreed], max(agreed, self._sent)
        return fresh

    def close(self) -> str:
        """What was held back, when no more will come."""
        return "" if self.is_settled or self._is_cumulative else self._settle(self._joined)

    def _is_increment(self, repeat: str) -> bool:
        return len(repeat) < self.EVIDENCE or len(self._joined) > 2 * len(
            repeat
            # it is held two times at most
        )

    def _settle(self, joined: str) -> str:
        self.is_settled, self._joined, self._latest = True, "", ""
        return joined[self._sent :]

    def _feed_cumulative(self, text: str) -> str:
        if text.startswith(self._latest):
            fresh, self._latest = text[len(self._latest) :], text
            return fresh
        self._latest += text
        return text


def is_periodic(text: str) -> bool:
    """Whether a text is one unit of at most half its length over and over, the last perhaps cut.

    The unit is looked for in the beginning, as looking through a long text takes the square of its length.

    >>> is_periodic("hahah"), is_periodic("Hello, w")
    (True, False)
    """
    start = text[:LONGEST_START]
    width = next(
        (width for width in range(1, len(start) // 2 + 1) if start.startswith(start[width:])), 0
    )
    return width > 0 and text.startswith(text[width:])


THINK_TAGS = (("<think>", "</think>"), ("<thinking>", "</thinking>"))
CLOSING_TAGS = tuple(closing for _, closing in THINK_TAGS)
_FENCE = re.compile(r"\s*```[a-zA-Z0-9]*[ \t]*\n?")


class ContentFilter:
    """Takes out of the content what does not belong there, looking at its very beginning and end only.

    Thoughts that a server left in the content (<think>...</think> first, or the lone closing tag), and,
    where the client asked for JSON, the code fence around it. Such a word in the middle is the answer's.
    """

    def __init__(self, is_json: bool):
        self._is_json, self._held, self._closing, self._in_fence, self._took_tag = (
            is_json,
            "",
            "",
            False,
            False,
        )
        # nothing to look for any more: feed() need not be asked
        self.is_open = False

    def feed(self, text: str) -> tuple[str, str]:
        """(reasoning, content) to pass on now."""
        if self.is_open:
            return "", text
        self._held += text
        if self._closing:
            return self._feed_thoughts()
        if not self._in_fence and not self._starts():
            return "", ""
        if self._closing:
            return self._feed_thoughts()
        if self._in_fence:
            body = self._held.rstrip("` \t\r\n") if len(self._held) < LONGEST_START else self._held
            self._held = self._held[len(body) :]
            return "", body
        self.is_open = True
        text, self._held = self._held, ""
        return "", text.lstrip() if self._took_tag else text

    def close(self) -> tuple[str, str]:
        """(reasoning, content) that was held back, when no more will come."""
        held, self._held = self._held, ""
        if self._closing:
            return held, ""
        if self._in_fence:
            bare = held.rstrip()
            return "", bare[:-3].rstrip() if bare.endswith("```") else held
        return "", held.lstrip() if self._took_tag else held

    def _starts(self) -> bool:
        """Whether the beginning is known: a tag was taken off, a fence was, or it is plain."""
        start = self._held.lstrip()
        while start.startswith(CLOSING_TAGS):
            self._held, self._took_tag = start.partition(">")[2], True
            start = self._held.lstrip()
        for opening, closing in THINK_TAGS:
            if start.startswith(opening):
                self._closing, self._held, self._took_tag = (
                    closing,
                    start[len(opening) :].lstrip("\n"),
                    True,
                )
                return True
        if len(self._held) > LONGEST_START:
            return True
        tags = [tag for pair in THINK_TAGS for tag in pair] + (["```"] if self._is_json else [])
        if any(tag.startswith(start) for tag in tags):
            return False
        fence = _FENCE.match(self._held) if self._is_json else None
        if fence and fence.end() == len(self._held) and not self._held.endswith("\n"):
            # "```js": the word may go on
            return False
        if fence:
            self._in_fence, self._held = True, self._held[fence.end() :]
        return True

    def _feed_thoughts(self) -> tuple[str, str]:
        thoughts, tag, rest = self._held.partition(self._closing)
        if tag:
            self._closing, self._held = "", ""
            content = self.feed(rest)
            return thoughts + content[0], content[1]
        keep = next(
            (
                size
                for size in range(len(self._closing) - 1, 0, -1)
                if thoughts.endswith(self._closing[:size])
            ),
            0,
        )
        self._held = thoughts[len(thoughts) - keep :]
        return thoughts[: len(thoughts) - keep], ""


class LongText:
    """A text that grows piece by piece; joining it at each piece would take the square of its length.

    add() raises UpstreamError for one that grows beyond MAX_ANSWER.
    """

    def __init__(self) -> None:
        self._parts: list[str] = []
        self.size = 0

    def add(self, text: str) -> None:
        """Append a piece."""
        self._parts.append(text)
        self.size += len(text)
        if self.size > MAX_ANSWER:
            raise UpstreamError(
                "the upstream's answer goes on after %d characters; it is given up" % MAX_ANSWER
            )

    def __str__(self) -> str:
        if len(self._parts) > 1:
            self._parts = ["".join(self._parts)]
        return self._parts[0] if self._parts else ""


class ToolCall:
    """One tool call of an answer as it was passed on so far."""

    def __init__(self, number: Callable[[], int], upstream_index: Any, upstream_id: str):
        self.index, self.upstream_index, self.upstream_id, self._number = (
            -1,
            upstream_index,
            upstream_id,
            number,
        )
        self.id = upstream_id or "call_" + secrets.token_hex(12)
        self.name, self.arguments, self._held = "", LongText(), ""
        self._increments, self._repeats_name = Increments(), False

    def add(self, name: str, arguments: str) -> dict | None:
        """The delta to pass on now: id, type and name once and first, then nothing but arguments."""
        if arguments and self._is_all(name, arguments):
            # the whole call once more
            arguments = ""
        self._repeats_name = self._repeats_name or bool(name and self.name)
        fresh = self._held + self._increments.feed(arguments)
        is_first = not self.name and bool(name)
        self.name = self.name or name
        # arguments before the name: nobody can use them yet
        if not self.name:
            self._held = fresh
            return None
        self._held = ""
        self.arguments.add(fresh)
        if is_first:
            self.index = self._number()
            return {
                "index": self.index,
                "id": self.id,
                "type": "function",
                "function": {"name": self.name, "arguments": fresh},
            }
        return {"index": self.index, "function": {"arguments": fresh}} if fresh else None

    def is_followed_by(self, name: str, arguments: str) -> bool:
        """Whether a delta with this one's id is another call all the same: some give one id to all."""
        if not (name and self.name):
            return False
        return (
            name != self.name
            or bool(arguments.strip())
            and not self._is_all(name, arguments)
            and self.is_complete()
        )

    def is_followed_without_id_by(self, name: str, arguments: str) -> bool:
        """The same where there are no ids: a name again after whole arguments, unless it came with every delta."""
        if not (name and self.name) or self.upstream_id:
            return False
        return (
            name != self.name
            or self.is_complete()
            and (bool(arguments.strip()) or not self._repeats_name)
        )

    def close(self) -> dict | None:
        """The delta that completes it: what was held back, and {} for a call without arguments."""
        fresh = self._increments.close()
        if not (self.arguments.size or fresh):
            fresh = "{}"
        self.arguments.add(fresh)
        return (
            {"index": self.index, "function": {"arguments": fresh}} if fresh and self.name else None
        )

    def is_complete(self) -> bool:
        """Whether the arguments are whole JSON."""
        try:
            json.loads(str(self.arguments))
        except (ValueError, RecursionError):
            return False
        return True

    def _is_all(self, name: str, arguments: str) -> bool:
        """Whether these are all of the arguments once more, with the name perhaps in other blanks."""
        if len(arguments) == self.arguments.size and arguments == str(self.arguments):
            return self.is_complete()
        if not name or arguments.lstrip()[:1] != "{" or not self.is_complete():
            return False
        try:
            ours, theirs = json.loads(str(self.arguments)), json.loads(arguments)
            return json.dumps(ours, sort_keys=True) == json.dumps(
                theirs,
                sort_keys=True,
                # 1 is not true
            )
        except (ValueError, RecursionError):
            return False


class ToolCalls:
    """The tool calls of one choice, rebuilt from deltas of any shape.

    Seen from upstreams: no index, index from 1, one index for two calls, id "" or null or repeated or
    missing, name repeated, arguments null or an object or before the name. Out comes OpenAI's shape:
    index from 0 without holes, ids unique, one entry a delta.
    """

    def __init__(self) -> None:
        self.calls: list[ToolCall] = []
        self._number = (
            itertools.count().__next__
            # given out as names come, so that there are no holes
        )

    def feed(self, entries: Any) -> list[dict]:
        """The deltas to pass on for the tool_calls of one upstream delta."""
        deltas = []
        for entry in entries if isinstance(entries, list) else []:
            if not isinstance(entry, dict):
                continue
            function = entry.get("function") if isinstance(entry.get("function"), dict) else {}
            name = function.get("name") if isinstance(function.get("name"), str) else ""
            arguments = function.get("arguments")
            if not isinstance(arguments, str):
                arguments = "" if arguments is None else json.dumps(arguments, ensure_ascii=False)
            call_id = entry.get("id") if isinstance(entry.get("id"), str) else ""
            deltas.append(
                self._call_for(entry.get("index"), call_id, name, arguments).add(name, arguments)
            )
        return [delta for delta in deltas if delta]

    def is_whole(self) -> bool:
        """Whether the last call's arguments are whole as they came."""
        return bool(self.calls) and self.calls[-1].is_complete()

    def close(self) -> list[dict]:
        """The deltas that complete all calls."""
        return [delta for delta in (call.close() for call in self.calls) if delta]

    def _call_for(self, index: Any, call_id: str, name: str, arguments: str) -> ToolCall:
        same_index = (
            [call for call in self.calls if call.upstream_index == index]
            if index is not None
            else []
        )
        if call_id:
            for call in self.calls:
                if (
                    call.upstream_id == call_id
                    and (index is None or call.upstream_index in (index, None))
                    and not call.is_followed_by(name, arguments)
                ):
                    return call
            if same_index and not same_index[-1].upstream_id and not same_index[-1].name:
                # its id comes late: ours has not gone out yet
                return same_index[-1]
            return self._new(index, call_id)
        latest = same_index[-1] if same_index else None
        if (
            latest is None
            and self.calls
            and (index is None or not name and self.calls[-1].upstream_index is None)
        ):
            latest = self.calls[-1]
        if latest is None:
            return self._new(index, "")
        return self._new(index, "") if latest.is_followed_without_id_by(name, arguments) else latest

    def _new(self, index: Any, call_id: str) -> ToolCall:
        is_taken = any(call.id == call_id for call in self.calls)
        call = ToolCall(self._number, index, call_id)
        if is_taken:
            call.id = "call_" + secrets.token_hex(12)
        self.calls.append(call)
        return call


class ChoiceState:
    """What the translator remembers of one choice."""

    def __init__(self, is_json: bool):
        self.content, self.reasoning = Increments(), Increments()
        self.filter, self.tools = ContentFilter(is_json), ToolCalls()
        self.has_role = self.has_ended = False
        self.finish_reason: str | None = (
            # the upstream's; ours goes out at the end, as more may follow it
            None
        )
        self.finish_extra: dict = {}

    def passes_text(self) -> bool:
        """Whether content can go through as it is."""
        return (
            self.has_role
            and self.content.is_settled
            and self.filter.is_open
            and self.finish_reason is None
        )


KNOWN_DELTA = frozenset(
    {"role", "content", "reasoning_content", "reasoning", "tool_calls", "function_call"}
)
_CHUNKS = json.JSONDecoder(
    parse_constant=lambda name: None
    # a log probability of -Infinity is no JSON
)
Translated = List[
    Tuple[dict, Optional[bytes]]
    # chunks, each with the bytes that it came as if unchanged
]


_CONTENT = re.compile(rb'"content": ?"((?:[^"\\]|\\.)*)"')
# Without a repetition in a repetition, which takes exponential time for a text that is none.
_JSON_TEXT = re.compile(
    rb'[^"\\\x00-\x1f]*(?:\\(?:["\\/bfnrt]|u[0-9a-fA-F]{4})[^"\\\x00-\x1f]*)*\Z'
)


class Frame(NamedTuple):
    """What is around the text in a chunk that went through as it came; most chunks differ in nothing but the text."""

    before: bytes
    behind: bytes
    our_before: bytes
    our_behind: bytes
    index: int

    @classmethod
    def around(cls, theirs: bytes, ours: bytes, index: int) -> Frame | None:
        """The frame of a chunk as it came and as it went out; None where the place of the text is not certain."""
        found, found_ours = _CONTENT.search(theirs), _CONTENT.search(ours)
        if not found or not found_ours or theirs.count(b'"content"') != 1:
            return None
        return cls(
            theirs[: found.start(1)],
            theirs[found.end(1) :],
            ours[: found_ours.start(1)],
            ours[found_ours.end(1) :],
            index,
        )

    def text(self, data: bytes) -> bytes | None:
        """The text, as JSON has it, of a chunk that begins as this frame; None if it ends otherwise."""
        if not data.endswith(self.behind):
            return None
        text = data[len(self.before) : len(data) - len(self.behind)]
        return text if text and _JSON_TEXT.match(text) else None


def decode_chunk(data: bytes) -> dict:
    """The object in an event's data, which begins with its brace; raises ValueError, RecursionError."""
    text = data.decode("utf-8", "replace")
    chunk, end = _CHUNKS.raw_decode(text)
    if end < len(text) and text[end:].strip():
        raise ValueError("something follows the JSON")
    return chunk


def whole_delta(message: Any) -> dict:
    """A whole message as a delta: each of its tool calls is a call of its own, whatever ids they have."""
    if not isinstance(message, dict) or not isinstance(message.get("tool_calls"), list):
        return message if isinstance(message, dict) else {}
    return {
        **message,
        "tool_calls": [
            {"index": place, **call} if isinstance(call, dict) else call
            for place, call in enumerate(message["tool_calls"])
        ],
    }


class ChunkTranslator:
    """Upstream chunks in, chunks as OpenAI shapes them out, for one answer.

    Out come: the role in the first delta only; one id, created and model throughout; reasoning_content
    and content never in one delta; one tool call a delta; a finish chunk whose delta is empty; usage in
    one last chunk without choices, if the client asked for it. Raises UpstreamError for an error inside
    the stream and for an end that is none.
    """

    OBJECT = "chat.completion.chunk"

    def __init__(self, request: dict, route: Route):
        self.model, self.family = route.model, route.provider.family
        self.wants_usage = bool(dig(request, "stream_options", "include_usage"))
        self._is_legacy = bool(request.get("functions")) and not request.get("tools")
        self._is_json = wants_json(request)
        self._states: dict[int, ChoiceState] = {}
        self._id, self._created, self._their_model = "", 0, None
        self._model_bytes: list[tuple[bytes, bytes]] = []
        # else nobody asks for the bytes
        self._is_stream = bool(request.get("stream"))
        self._frame: Frame | None = None
        # an upstream whose every chunk differs in more is not worth more
        self._frames_to_try = 3
        self.usage: dict | None = None
        self.is_done = False

    def feed(self, event: Event) -> Translated:
        """The chunks for one event."""
        data = event.data
        if self._frame is not None and data.startswith(self._frame.before) and not event.name:
            text = self._frame.text(data)
            if text is not None:
                return self._same_frame(self._frame, text)
        if data[:1] in (b" ", b"\t"):
            data = data.lstrip()
        if data[:1] != b"{":
            return self._no_chunk(event)
        return self._chunk_in(event, data)

    def _no_chunk(self, event: Event) -> Translated:
        if event.data.strip() == DONE:
            self.is_done = True
        elif event.name == "error":
            raise to_upstream_error(
                refusal_of(event.status, event.data.decode("utf-8", "replace")), self.family
            )
        # a keep-alive in words
        return []

    def _same_frame(self, frame: Frame, text: bytes) -> Translated:
        """A chunk that differs from an earlier one in its text alone: four of five chunks of an answer."""
        content = json.loads(b'"%s"' % text) if b"\\" in text else text.decode("utf-8", "replace")
        chunk = self._chunk(
            [{"index": frame.index, "delta": {"content": content}, "finish_reason": None}]
        )
        return [(chunk, frame.our_before + text + frame.our_behind)]

    def _chunk_in(self, event: Event, data: bytes) -> Translated:
        try:
            chunk = decode_chunk(data)
        except (ValueError, RecursionError):
            raise UpstreamError(
                "the upstream sent a chunk that is not JSON, or was cut off in one; try again",
                code="upstream_cut",
            ) from None
        choices = chunk.get("choices")
        if (
            event.name == "error"
            or chunk.get("error")
            or (not choices and "message" in chunk and "code" in chunk)
        ):
            raise to_upstream_error(refusal_in(event.status, chunk), self.family)
        came_from = chunk.get("model")
        is_changed = self._envelope(chunk)
        if self._is_stream and not is_changed and came_from != self.model:
            data = self._with_model(data, came_from)
        if not isinstance(choices, list):
            return []
        translated: Translated = []
        for choice in choices:
            outputs = self._choice(choice) if isinstance(choice, dict) else []
            if outputs is None and len(choices) == 1:
                is_same = bool(data) and not is_changed and b"\n" not in event.data
                if is_same and self._frames_to_try > 0:
                    self._frames_to_try -= 1
                    self._frame = Frame.around(event.data, data, choice["index"])
                return [(chunk, data if is_same else None)]
            translated += [
                ({**chunk, "choices": [output]}, None)
                for output in ([choice] if outputs is None else outputs)
            ]
        return translated

    def is_finished(self) -> bool:
        """Whether every choice has its finish reason."""
        return bool(self._states) and all(
            state.finish_reason is not None for state in self._states.values()
        )

    def close(self) -> Translated:
        """The chunks that end the stream; raises UpstreamError when the upstream broke off."""
        if not self._states or not (self.is_done or self.is_finished()):
            raise UpstreamError(
                "the upstream ended its answer without a finish reason; try again"
                if self._states
                else "the upstream answered with an empty stream; try again",
                code="upstream_cut",
            )
        outputs = []
        for index, state in self._states.items():
            if (
                not state.has_ended
                # [DONE] without a reason: it is whole, and opencode loops without one
            ):
                outputs += self._finish(
                    index, state, state.finish_reason or "stop", state.finish_extra
                )
        chunks: Translated = [(self._chunk([output]), None) for output in outputs]
        if self.wants_usage and self.usage:
            chunks.append(({**self._chunk([]), "usage": self.usage}, None))
        return chunks

    def _chunk(self, choices: list[dict]) -> dict:
        return {
            "id": self._id,
            "object": self.OBJECT,
            "created": self._created,
            "model": self.model,
            "choices": choices,
        }

    def _envelope(self, chunk: dict) -> bool:
        """Make id, object, created and model the same in all chunks, and take the usage out."""
        if not self._id:
            self._id = as_text(chunk.get("id")) or "chatcmpl-" + secrets.token_hex(12)
            created = chunk.get("created")
            # NaN is neither
            is_time = isinstance(created, (int, float)) and 0 < created < 1e12
            self._created = int(created) if is_time else 1
        is_changed = False
        if chunk.get("usage") is not None:
            self.usage = clean_usage(chunk["usage"]) or self.usage
        if "usage" in chunk:
            is_changed = chunk.pop("usage") is not None
        if (
            chunk.get("id") != self._id
            or chunk.get("object") != self.OBJECT
            or chunk.get("created") != self._created
        ):
            chunk["id"], chunk["object"], chunk["created"] = self._id, self.OBJECT, self._created
            is_changed = True
        chunk["model"] = self.model
        return is_changed

    def _with_model(self, data: bytes, came_from: Any) -> bytes:
        """The bytes with our model in the place of the upstream's; b"" where that is not certain."""
        if came_from != self._their_model:
            self._their_model, name = came_from, encode_json(came_from)
            self._model_bytes = [
                (
                    b'"model":%s%s' % (space, name),
                    b'"model":%s%s' % (space, encode_json(self.model)),
                )
                for space in (b"", b" ")
            ]
        for theirs, ours in self._model_bytes if data.count(b'"model"') == 1 else ():
            if theirs in data:
                return data.replace(theirs, ours)
        return b""

    def _choice(self, choice: dict) -> list[dict] | None:
        """The choices for one upstream choice; None when it is right as it came."""
        index, state = self._state_of(choice)
        delta, finish_reason = choice.get("delta"), choice.get("finish_reason")
        if not isinstance(delta, dict):
            delta = whole_delta(choice.get("message"))
        if (
            len(delta) == 1
            and finish_reason is None
            and state.passes_text()
            and type(delta.get("content")) is str
            and type(choice.get("index")) is int
            and "finish_reason" in choice
            and "message" not in choice
        ):
            return None if delta["content"] else []
        if finish_reason == "error_finish":
            raise to_upstream_error(refusal_of(0, text_of(delta.get("content"))), self.family)
        extra = {
            name: value
            for name, value in choice.items()
            if name not in ("index", "delta", "message", "finish_reason") and value is not None
        }
        outputs = self._deltas(index, state, delta, extra)
        if isinstance(finish_reason, str) and finish_reason not in ("", "null"):
            # some upstreams send several
            if state.finish_reason in (None, "stop"):
                state.finish_reason = finish_reason
            state.finish_extra = {} if outputs else extra
        return outputs

    def _state_of(self, choice: dict) -> tuple[int, ChoiceState]:
        index = choice.get("index")
        index = index if type(index) is int else 0
        state = self._states.get(index)
        if state is None:
            state = self._states[index] = ChoiceState(self._is_json)
        return index, state

    def _deltas(self, index: int, state: ChoiceState, delta: dict, extra: dict) -> list[dict]:
        reasoning = delta.get("reasoning_content") or delta.get("reasoning")
        reasoning = state.reasoning.feed(reasoning) if isinstance(reasoning, str) else ""
        thoughts, content = state.filter.feed(state.content.feed(text_of(delta.get("content"))))
        entries = delta.get("tool_calls")
        if not entries and isinstance(delta.get("function_call"), dict):
            entries = [{"index": 0, "function": delta["function_call"]}]
        # what is held of the text comes before the call, not behind it
        if entries:
            held = [state.filter.feed(state.content.close()), state.filter.close()]
            thoughts, content = ("".join(texts) for texts in zip((thoughts, content), *held))
        deltas: list[dict] = []
        if reasoning or thoughts:
            deltas.append({"reasoning_content": reasoning + thoughts})
        others = {
            name: value
            for name, value in delta.items()
            if name not in KNOWN_DELTA and value is not None
        }
        if content or others:
            deltas.append({**({"content": content} if content else {}), **others})
        if entries:
            deltas += self._tool_deltas(state.tools.feed(entries))
        return self._outputs(index, state, deltas, extra, isinstance(delta.get("role"), str))

    def _tool_deltas(self, calls: list[dict]) -> list[dict]:
        if not self._is_legacy:
            return [{"tool_calls": [call]} for call in calls]
        return [{"function_call": call["function"]} for call in calls if call["index"] == 0]

    def _outputs(
        self, index: int, state: ChoiceState, deltas: list[dict], extra: dict, role_came: bool
    ) -> list[dict]:
        if not state.has_role and (deltas or role_came):
            first = deltas[0] if deltas else {}
            deltas[:1] = [
                {
                    "role": "assistant",
                    **(
                        {}
                        if "content" in first or "reasoning_content" in first
                        else {"content": ""}
                    ),
                    **first,
                }
            ]
            if "tool_calls" in first or "function_call" in first:
                deltas[0]["content"] = None
            state.has_role = True
        outputs = [{"index": index, "delta": delta, "finish_reason": None} for delta in deltas]
        if outputs:
            outputs[-1].update(extra)
        return outputs

    def _finish(
        self, index: int, state: ChoiceState, finish_reason: str, extra: dict
    ) -> list[dict]:
        """What was held back, then the finish chunk. Precedence: tool_calls, length, stop."""
        reasoning = state.reasoning.close()
        thoughts, content = state.filter.feed(state.content.close())
        last_thoughts, last_content = state.filter.close()
        held = [
            {"reasoning_content": reasoning + thoughts + last_thoughts},
            {"content": content + last_content},
        ]
        was_whole = state.tools.is_whole()
        deltas = [delta for delta in held if any(delta.values())] + self._tool_deltas(
            state.tools.close()
        )
        outputs = self._outputs(index, state, deltas, {}, True)
        if finish_reason in ("stop", "function_call", "tool_calls", "length"):
            finish_reason = self._reason(state.tools, finish_reason, was_whole)
        state.has_ended = True
        return outputs + [{"index": index, "delta": {}, "finish_reason": finish_reason, **extra}]

    def _reason(self, tools: ToolCalls, finish_reason: str, was_whole: bool) -> str:
        """tool_calls if there are whole calls; length if the last one is cut, whatever the upstream says of it."""
        called = [call for call in tools.calls if call.name]
        if not called:
            return "length" if finish_reason == "length" else "stop"
        if not called[-1].is_complete() or finish_reason == "length" and not was_whole:
            return "length"
        return "function_call" if self._is_legacy else "tool_calls"


class TextTranslator(ChunkTranslator):
    """The same for text completions: text instead of deltas, no roles, no calls."""

    OBJECT = "text_completion"

    def _choice(self, choice: dict) -> list[dict] | None:
        index, state = self._state_of(choice)
        text, finish_reason = text_of(choice.get("text")), choice.get("finish_reason")
        if finish_reason == "error_finish":
            raise to_upstream_error(refusal_of(0, text), self.family)
        if not isinstance(finish_reason, str) or finish_reason in ("", "null"):
            finish_reason = None
        if state.finish_reason is not None or not (text or finish_reason):
            return []
        state.finish_reason, state.has_ended = finish_reason, finish_reason is not None
        right = {
            "index": index,
            "text": text,
            "finish_reason": finish_reason,
            "logprobs": choice.get("logprobs"),
        }
        return None if choice == right else [{**choice, **right}]

    def _finish(
        self, index: int, state: ChoiceState, finish_reason: str, extra: dict
    ) -> list[dict]:
        state.has_ended = True
        return [{"index": index, "text": "", "finish_reason": finish_reason, "logprobs": None}]


def clean_usage(usage: Any) -> dict | None:
    """The usage with its three counts as integers; None for one that holds no count."""
    if not isinstance(usage, dict):
        return None
    counts = {
        name: int(usage[name])
        for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        if isinstance(usage.get(name), (int, float)) and abs(usage[name]) < 1e15
    }
    if not counts:
        return None
    prompt, completion = counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0)
    cleaned = {
        **{name: value for name, value in usage.items() if value is not None},
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": counts.get("total_tokens", prompt + completion),
    }
    if isinstance(usage.get("cached_tokens"), int):
        cleaned.setdefault("prompt_tokens_details", {"cached_tokens": usage["cached_tokens"]})
    return cleaned


def iter_chunks(pieces: Iterable[bytes], translator: Any) -> Iterator[Translated]:
    """The translated chunks of an answer, piece by piece; an empty list for a piece that gave none.

    The body is judged by its content, not by its Content-Type: a stream, one JSON object (an error, or a
    whole completion), or a web page with status 200.
    """
    decoder, head = EventDecoder(), b""
    pieces = iter(pieces)
    for piece in pieces:
        head = (head + piece).lstrip(b"\xef\xbb\xbf \r\n\t")
        if head:
            break
        yield []
    start = head[:1]
    if start in (b"{", b"<", b"["):
        yield translator.feed(Event(whole_answer(head, pieces, translator.family)))
        translator.is_done = (
            # JSON that can be read is whole, even if it names no finish reason
            True
        )
    else:
        for piece in itertools.chain([head], until_finished(pieces, translator)):
            yield from translated_events(decoder.feed(piece), translator)
        if not translator.is_done:
            yield from last_events(decoder, translator)
    yield translator.close()


def last_events(decoder: EventDecoder, translator: Any) -> Iterator[Translated]:
    """The chunks of an event without its blank line; one that is cut is no loss once the finish reason is there."""
    try:
        yield from translated_events(decoder.close(), translator)
    except UpstreamError as error:
        if error.code != "upstream_cut" or not translator.is_finished():
            raise


def separate_events(event: Event) -> list[Event]:
    """The events in one whose lines are JSON each and not together: some put no blank line between their events."""
    if b"\n" not in event.data:
        return [event]
    try:
        json.loads(event.data.decode("utf-8", "replace"))
        return [event]
    except (ValueError, RecursionError):
        return [event._replace(data=line) for line in event.data.split(b"\n")]


def translated_events(events: list[Event], translator: Any) -> Iterator[Translated]:
    """The chunks of some events, all in one; those before an error come out before it is raised."""
    chunks: Translated = []
    try:
        for event in itertools.chain.from_iterable(map(separate_events, events)):
            chunks += translator.feed(event)
    except UpstreamError:
        if chunks:
            yield chunks
        raise
    yield chunks


def until_finished(pieces: Iterator[bytes], translator: Any) -> Iterator[bytes]:
    """The pieces up to [DONE]; a connection that breaks once the finish reason is there has only ended."""
    try:
        while not translator.is_done:
            piece = next(pieces, b"")
            if not piece:
                return
            yield piece
    except UpstreamError:
        if not translator.is_finished():
            raise


def whole_answer(head: bytes, pieces: Iterable[bytes], family: str) -> bytes:
    """The JSON of an answer that is no stream; raises UpstreamError where it is none."""
    body = bytearray(head)
    for piece in pieces:
        body += piece
        if len(body) > MAX_EVENT:
            raise UpstreamError("the upstream sent an answer of more than %d bytes" % MAX_EVENT)
    text = bytes(body).decode("utf-8", "replace").strip("\ufeff \r\n\t")
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if isinstance(value, dict) and value.get("choices"):
        return text.encode()
    refusal = refusal_of(0, text)
    if not refusal.message:
        refusal = refusal._replace(
            message="the upstream answered with something that is no completion"
        )
    raise to_upstream_error(refusal, family)


class CompletionCollector:
    """Clean chunks in, the whole chat.completion out."""

    OBJECT = "chat.completion"

    def __init__(self) -> None:
        self._head: dict = {}
        self._head_size = 0
        self._choices: dict[int, dict] = {}

    def feed(self, chunk: dict) -> None:
        """Add one chunk."""
        if (
            len(chunk) > self._head_size
            # later chunks may name more than the first, seldom something else
        ):
            self._head_size = len(chunk)
            self._head.update(
                (name, value) for name, value in chunk.items() if name not in ("choices", "usage")
            )
        for part in chunk["choices"]:
            choice = self._choices.get(part["index"])
            if choice is None:
                choice = {
                    "index": part["index"],
                    "texts": {},
                    "message": {},
                    "calls": [],
                    "finish_reason": None,
                }
                self._choices[part["index"]] = choice
            self._add(choice, part)

    def _add(self, choice: dict, part: dict) -> None:
        for name, value in part["delta"].items():
            if name == "tool_calls":
                self._add_call(choice["calls"], value[0])
            elif name == "function_call":
                self._add_call(choice["calls"], {"index": 0, "function": value})
                choice["is_legacy"] = True
            elif isinstance(value, str) and name != "role":
                self._add_text(choice["texts"], name, value)
            elif isinstance(value, list) and isinstance(choice["message"].get(name, []), list):
                choice["message"].setdefault(name, []).extend(value)
            elif value is not None:
                choice["message"][name] = value
        if len(part) > 3 or part.get("finish_reason"):
            self._add_fields(choice, part)

    @staticmethod
    def _add_text(texts: dict[str, LongText], name: str, text: str) -> None:
        if name not in texts:
            texts[name] = LongText()
        texts[name].add(text)

    @staticmethod
    def _add_fields(choice: dict, part: dict) -> None:
        for name, value in part.items():
            if name == "logprobs" and isinstance(value, dict):
                for kind, values in value.items():
                    if isinstance(values, list):
                        choice.setdefault("logprobs", {}).setdefault(kind, []).extend(values)
            elif name not in ("index", "delta", "text") and value is not None:
                choice[name] = value

    @staticmethod
    def _add_call(calls: list[dict], delta: dict) -> None:
        if delta["index"] == len(calls):
            calls.append(
                {
                    "id": delta.get("id"),
                    "type": "function",
                    "function": {"name": "", "arguments": LongText()},
                }
            )
        function = calls[delta["index"]]["function"]
        function["name"] = function["name"] or delta["function"].get("name", "")
        function["arguments"].add(delta["function"].get("arguments", ""))

    def completion(self, usage: dict | None) -> dict:
        """The completion, with usage where the upstream gave it."""
        choices = [self._finished(self._choices[index]) for index in sorted(self._choices)]
        completion = {**self._head, "object": self.OBJECT, "choices": choices}
        return {**completion, "usage": usage} if usage else completion

    @staticmethod
    def _finished(choice: dict) -> dict:
        texts, calls = choice.pop("texts"), choice.pop("calls")
        message = {
            "role": "assistant",
            "content": None,
            **{name: str(text) for name, text in texts.items()},
            **choice["message"],
        }
        if not calls and message["content"] is None:
            message["content"] = ""
        if calls:
            message["content"] = message["content"] or None
            for call in calls:
                call["function"]["arguments"] = str(call["function"]["arguments"])
            if choice.pop("is_legacy", False):
                message["function_call"] = calls[0]["function"]
            else:
                message["tool_calls"] = calls
        return {
            "index": choice["index"],
            "message": message,
            "logprobs": None,
            **{name: value for name, value in choice.items() if name not in ("index", "message")},
        }


class TextCollector(CompletionCollector):
    """The same for text completions."""

    OBJECT = "text_completion"

    def _add(self, choice: dict, part: dict) -> None:
        self._add_text(choice["texts"], "text", part["text"])
        self._add_fields(choice, part)

    @staticmethod
    def _finished(choice: dict) -> dict:
        return {
            "index": choice["index"],
            "text": str(choice["texts"]["text"]),
            "logprobs": choice.get("logprobs"),
            "finish_reason": choice["finish_reason"],
        }


class Kind(NamedTuple):
    """What differs between chat completions and text completions on the one path of both."""

    path: str
    check: Callable[[Any], None]
    to_upstream: Callable[[dict, Route], tuple[dict, dict[str, str]]]
    translator: Callable[[dict, Route], Any]
    collector: Callable[[], Any]


CHAT = Kind(
    "/chat/completions",
    check_chat_request,
    to_upstream_request,
    ChunkTranslator,
    CompletionCollector,
)
TEXT = Kind(
    "/completions", check_text_request, to_upstream_text_request, TextTranslator, TextCollector
)


def vectors_of(body: bytes, count: int, family: str) -> tuple[list[list[float]], dict]:
    """The vectors of one answer of /embeddings, in the order of the texts, and its usage; raises UpstreamError."""
    text = body.decode("utf-8", "replace")
    try:
        answer = json.loads(text)
    except (ValueError, RecursionError):
        answer = None
    entries = dig(answer, "data")
    if not isinstance(entries, list):
        raise to_upstream_error(refusal_of(0, text), family)
    found = {
        entry["index"] if type(entry.get("index")) is int else place: entry.get("embedding")
        for place, entry in enumerate(entries)
        if isinstance(entry, dict)
    }
    vectors = [found.get(place) for place in range(count)]
    if len(entries) != count or not all(isinstance(vector, list) for vector in vectors):
        raise UpstreamError(
            "the upstream answered %d texts with %d embeddings; try again" % (count, len(entries))
        )
    usage = dig(answer, "usage")
    return vectors, usage if isinstance(usage, dict) else {}  # type: ignore[return-value]


def embeddings_answer(
    model: str, batches: list[tuple[list[list[float]], dict]], encoding_format: str | None
) -> dict:
    """The answer for the client: all batches in order, usage summed; base64 is little-endian float32."""
    vectors = [vector for batch, _ in batches for vector in batch]
    encode = base64_of if encoding_format == "base64" else list
    counts = [clean_usage(used) or {} for _, used in batches]
    usage = {
        name: sum(used.get(name, 0) for used in counts)
        for name in ("prompt_tokens", "total_tokens")
    }
    return {
        "object": "list",
        "model": model,
        "usage": usage,
        "data": [
            {"object": "embedding", "index": index, "embedding": encode(vector)}
            for index, vector in enumerate(vectors)
        ],
    }


def base64_of(vector: list[float]) -> str:
    """A vector as the OpenAI SDKs want it: openai-node reads floats as an empty vector."""
    try:
        return base64.b64encode(struct.pack("<%df" % len(vector), *vector)).decode()
    except (struct.error, OverflowError):
        raise UpstreamError("the upstream sent an embedding that is no list of numbers") from None


# ------------------------------------------------------------------------------------------------
# Responses API
# ------------------------------------------------------------------------------------------------
# Pure: a request to /v1/responses in, a chat request out; chat chunks in, events of a response out.
# OpenAI reference, Responses; no response is stored, so a request holds the whole conversation.

# before what encrypted_content carries for us to the next request
CARRIED = "qwen_proxy:"
COMPACTION = (
    "Summarise the conversation so far for somebody who goes on with it and sees nothing but your summary: "
    "the task, what was decided and found out, which files and commands matter, what is left to do."
)
RESPONSE_ONLY = frozenset(
    {
        "input",
        "instructions",
        "tools",
        "tool_choice",
        "reasoning",
        "text",
        "max_output_tokens",
        "previous_response_id",
        "store",
        "include",
        "truncation",
        "metadata",
        "prompt_cache_key",
        "client_metadata",
        "background",
        "conversation",
        "prompt",
        "max_tool_calls",
        "top_logprobs",
        "service_tier",
        "safety_identifier",
        "prompt_cache_retention",
        "stream_options",
        "context_management",
    }
)
IGNORED_ITEMS = frozenset({"web_search_call", "mcp_list_tools", "additional_tools"})


class ToolNames:
    """The names of a request's tools as Qwen is told them, and back: namespaces are flattened, custom tools noted."""

    def __init__(self) -> None:
        self.custom: set[str] = set()
        self._nested: dict[str, tuple[str, str]] = {}

    def flat(self, name: str, namespace: Any) -> str:
        """namespace__name, of at most the 64 characters that Model Studio allows."""
        if not isinstance(namespace, str) or not namespace:
            return name
        joined = f"{namespace}__{name}"
        if len(joined) > 64:
            joined = f"{joined[:55]}_{hashlib.sha256(joined.encode()).hexdigest()[:8]}"
        self._nested[joined] = (namespace, name)
        return joined

    def restored(self, flat: str) -> dict:
        """name, and namespace where it had one: Codex calls a flattened name unsupported."""
        if flat not in self._nested:
            return {"name": flat}
        namespace, name = self._nested[flat]
        return {"name": name, "namespace": namespace}


class ResponseRequest(NamedTuple):
    """A request to /v1/responses, taken apart."""

    # the chat request
    chat: dict
    # the request as it came
    asked: dict
    names: ToolNames
    # the client wants the conversation summarised, see COMPACTION
    is_compaction: bool
    # types of tools that have no counterpart
    skipped: list[str]


class ItemMemory:
    """The latest output items, in memory only: unless it is told `store: false`, the AI SDK sends an answer back as
    {"type": "item_reference", "id"} (@ai-sdk/openai, convertToOpenAIResponsesInput)."""

    def __init__(self, limit: int = MAX_ITEM_MEMORY):
        self._limit, self._size, self._lock = limit, 0, threading.Lock()
        self._items: collections.OrderedDict[tuple[str, str], bytes] = collections.OrderedDict()

    def keep(self, items: list[dict], owner: str = "") -> None:
        """Remember some items for whoever presented the key of that owner; the oldest give way to them."""
        with self._lock:
            for item in items:
                self._items[owner, item["id"]] = encoded = encode_json(item)
                self._size += len(encoded)
            while self._size > self._limit:
                self._size -= len(self._items.popitem(last=False)[1])

    def get(self, item_id: Any, owner: str = "") -> dict | None:
        """The owner's item of that id, if it is still here."""
        with self._lock:
            encoded = self._items.get((owner, item_id)) if isinstance(item_id, str) else None
        return json.loads(encoded) if encoded else None


def carried(text: str) -> str:
    """A text as encrypted_content: opaque to the client, read again by carried_text()."""
    return CARRIED + base64.b64encode(text.encode("utf-8", "replace")).decode()


def carried_text(value: Any) -> str:
    """The text in encrypted_content that carried() made; empty for somebody else's."""
    if not isinstance(value, str) or not value.startswith(CARRIED):
        return ""
    try:
        return base64.b64decode(value[len(CARRIED) :], validate=True).decode("utf-8", "replace")
    except ValueError:
        return ""


def to_chat_request(request: Any, memory: ItemMemory, owner: str = "") -> ResponseRequest:
    """The chat request for a request to /v1/responses; raises BadRequest for what is forgotten or cannot be meant."""
    if not isinstance(request, dict):
        raise BadRequest(f"the body must be a JSON object, not {json_type(request)}")
    if request.get("previous_response_id"):
        raise BadRequest(
            "nothing is stored here, so there is no previous response: send the whole conversation as "
            "input",
            code="previous_response_not_found",
            param="previous_response_id",
        )
    for name in ("background", "prompt", "conversation"):
        if request.get(name):
            raise BadRequest(f"{name} is not supported: nothing is stored here", param=name)
    names, skipped = ToolNames(), []  # type: ignore[var-annotated]
    items = request.get("input")
    items = [{"role": "user", "content": items}] if isinstance(items, str) else items
    if not isinstance(items, list) or not items:
        raise BadRequest("input must be a string or a list of items", param="input")
    seen: set[str] = set()
    items = [
        found
        for index, item in enumerate(items)
        for found in referred(item, index, memory, owner, seen)
    ]
    is_compaction = bool(items) and dig(items[-1], "type") == "compaction_trigger"
    chat = {
        name: value
        for name, value in request.items()
        if name not in RESPONSE_ONLY and value is not None
    }
    chat["messages"] = messages_of(request.get("instructions"), items, names)
    if is_compaction:
        chat["messages"].append({"role": "user", "content": COMPACTION})
    else:
        chat.update(chat_tools(request, names, skipped))
    chat.update(chat_options(request))
    return ResponseRequest(chat, request, names, is_compaction, skipped)


def referred(item: Any, index: int, memory: ItemMemory, owner: str, seen: set[str]) -> list[Any]:
    """The item that an item_reference stands for; thoughts that are forgotten are no loss, anything else is refused."""
    if dig(item, "type") != "item_reference":
        return [item]
    # else a small request could grow without limit
    if item.get("id") in seen:
        raise BadRequest(
            "input[%d] refers to an item a second time" % index, param="input.%d" % index
        )
    seen.add(as_text(item.get("id")))
    found = memory.get(item.get("id"), owner)
    if found is None and not as_text(item.get("id")).startswith("rs_"):
        raise BadRequest(
            "input[%d] is of type 'item_reference', and %r is not in memory here: send the item itself "
            "(AI SDK: providerOptions.openai.store = false)"
            % (index, shorten(str(item.get("id")), 60)),
            param="input.%d" % index,
        )
    return [found] if found else []


def chat_options(request: dict) -> dict:
    """max_output_tokens, reasoning and text.format in the words of chat completions."""
    options: dict = {}
    if request.get("max_output_tokens") is not None:
        options["max_tokens"] = request["max_output_tokens"]
    effort = dig(request, "reasoning", "effort")
    if isinstance(effort, str):
        options["reasoning_effort"] = effort
    text_format = dig(request, "text", "format")
    if dig(text_format, "type") == "json_schema":
        schema = {
            name: text_format[name]
            for name in ("name", "description", "schema", "strict")
            if text_format.get(name) is not None
        }
        options["response_format"] = {"type": "json_schema", "json_schema": schema}
    elif dig(text_format, "type") == "json_object":
        options["response_format"] = {"type": "json_object"}
    return options


def chat_tools(request: dict, names: ToolNames, skipped: list[str]) -> dict:
    """tools and tool_choice of a chat request."""
    tools, searches = [], False  # type: ignore[var-annotated]
    for tool in as_list(request.get("tools")):
        if str(dig(tool, "type")).startswith("web_search"):
            searches = True
        for namespace, inner in (
            [(tool.get("name"), each) for each in as_list(tool.get("tools"))]
            if dig(tool, "type") == "namespace"
            else [(None, tool)]
        ):
            function = chat_function(inner, namespace, names)
            if function:
                tools.append({"type": "function", "function": function})
            elif not str(dig(inner, "type")).startswith("web_search"):
                skipped.append(str(dig(inner, "type")))
    options: dict = {"tools": tools} if tools else {}
    if searches and request.get("tool_choice") != "none":
        options["web_search_options"] = {}
    choice = chat_tool_choice(request.get("tool_choice"), names, options)
    if tools and choice:
        options["tool_choice"] = choice
    return options


def chat_function(tool: Any, namespace: Any, names: ToolNames) -> dict | None:
    """The function of a chat tool for a tool of /v1/responses; None for one that only OpenAI runs."""
    name = dig(tool, "name")
    if not isinstance(name, str) or tool.get("type") not in ("function", "custom"):
        return None
    flat = names.flat(name, namespace)
    if tool["type"] == "custom":
        names.custom.add(flat)
        return {
            "name": flat,
            "description": tool.get("description") or "",
            "parameters": {
                "type": "object",
                "required": ["input"],
                "properties": {"input": {"type": "string", "description": custom_format(tool)}},
            },
        }
    function = {
        key: tool[key]
        for key in ("description", "parameters", "strict")
        if tool.get(key) is not None
    }
    return {"name": flat, **function}


def custom_format(tool: dict) -> str:
    """What the one string of a custom tool must look like, in words: the grammar itself cannot be enforced."""
    definition = dig(tool, "format", "definition")
    return (
        "It must match this grammar:\n" + definition
        if isinstance(definition, str)
        else "The input as it is."
    )


def chat_tool_choice(choice: Any, names: ToolNames, options: dict) -> Any:
    """tool_choice in the words of chat completions; allowed_tools keeps those tools only."""
    if not isinstance(choice, dict):
        return choice
    if choice.get("type") in ("function", "custom") and isinstance(choice.get("name"), str):
        return {
            "type": "function",
            "function": {"name": names.flat(choice["name"], choice.get("namespace"))},
        }
    if choice.get("type") == "allowed_tools" and isinstance(choice.get("tools"), list):
        allowed = [
            names.flat(as_text(dig(tool, "name")), dig(tool, "namespace"))
            for tool in choice["tools"]
        ]
        offered = options.get("tools", [])
        options["tools"] = [
            tool for tool in offered if tool["function"]["name"] in allowed
        ] or offered
        return choice.get("mode") or "auto"
    return "auto"


def messages_of(instructions: Any, items: list, names: ToolNames) -> list[dict]:
    """The messages of a conversation; raises BadRequest that names an item of no use."""
    messages: list[dict] = []
    if isinstance(instructions, str) and instructions:
        messages.append({"role": "system", "content": instructions})
    elif isinstance(instructions, list):
        messages += messages_of(None, instructions, names)
    for index, item in enumerate(items):
        if not isinstance(item, dict):
            raise BadRequest("input[%d] must be an object" % index, param="input.%d" % index)
        kind = as_text(item.get("type", "message"))
        add = ITEMS.get(kind)
        if add is not None:
            add(messages, item, names)
        elif kind not in IGNORED_ITEMS and kind != "compaction_trigger":
            raise BadRequest(
                "input[%d] is of type %r; it is not supported here" % (index, shorten(kind, 60)),
                param="input.%d" % index,
            )
    return [
        message
        for message in messages
        if message.get("content") or message.get("tool_calls") or message["role"] != "assistant"
    ]


def assistant_turn(messages: list[dict], is_text: bool = False) -> dict:
    """The assistant message that the next item of the same turn joins; a second text begins another one."""
    last = messages[-1] if messages else {}
    if last.get("role") == "assistant" and not (
        is_text and (last["content"] or last.get("tool_calls"))
    ):
        return last
    messages.append({"role": "assistant", "content": ""})
    return messages[-1]


def add_message(messages: list[dict], item: dict, names: ToolNames) -> None:
    """message"""
    role, content = item.get("role"), item.get("content")
    if role not in ("user", "assistant", "system", "developer"):
        raise BadRequest(
            f"a message of the input has the role {shorten(str(role), 60)!r}", param="input"
        )
    if role == "assistant":
        assistant_turn(messages, is_text=True)["content"] = chat_content(content)
    else:
        messages.append({"role": role, "content": chat_content(content)})


def chat_content(content: Any) -> Any:
    """A message's or an output's content in the words of chat completions: a string, if it is nothing but text."""
    if not isinstance(content, list):
        return "" if content is None else content
    parts = [chat_part(part) for part in content]
    return (
        "\n".join(part["text"] for part in parts)
        if all(part["type"] == "text" for part in parts)
        else parts
    )


def chat_part(part: Any) -> dict:
    """A part of a message's content in the words of chat completions."""
    kind = dig(part, "type")
    if kind in ("input_text", "output_text", "text", "summary_text", "reasoning_text"):
        return {"type": "text", "text": as_text(part.get("text"))}
    if kind == "refusal":
        return {"type": "text", "text": as_text(part.get("refusal"))}
    if kind == "input_image" and part.get("image_url"):
        url = (
            part["image_url"] if isinstance(part["image_url"], dict) else {"url": part["image_url"]}
        )
        return {
            "type": "image_url",
            "image_url": {**({"detail": part["detail"]} if part.get("detail") else {}), **url},
        }
    if kind == "input_file" and (part.get("file_data") or part.get("file_url")):
        return {
            "type": "file",
            "file": {
                name: part[name] for name in ("filename", "file_data", "file_url") if part.get(name)
            },
        }
    if kind == "input_audio":
        return {"type": "input_audio", "input_audio": part.get("input_audio")}
    raise BadRequest(
        f"a part of type {shorten(str(kind), 60)!r} cannot be sent; files and images must be in the request itself, since none "
        "are stored",
        param="input",
    )


def add_call(messages: list[dict], item: dict, names: ToolNames) -> None:
    """function_call, custom_tool_call"""
    name, arguments = (
        names.flat(as_text(item.get("name")), item.get("namespace")),
        item.get("arguments"),
    )
    if item["type"] == "custom_tool_call":
        arguments = json.dumps({"input": as_text(item.get("input"))}, ensure_ascii=False)
    assistant_turn(messages).setdefault("tool_calls", []).append(
        {
            "id": item.get("call_id") or item.get("id"),
            "type": "function",
            "function": {"name": name, "arguments": arguments},
        }
    )


def add_output(messages: list[dict], item: dict, names: ToolNames) -> None:
    """function_call_output, custom_tool_call_output"""
    content = chat_content(item.get("output"))
    if not isinstance(content, (str, list)):
        content = json.dumps(content, ensure_ascii=False)
    messages.append({"role": "tool", "tool_call_id": item.get("call_id"), "content": content})


def add_reasoning(messages: list[dict], item: dict, names: ToolNames) -> None:
    """reasoning"""
    parts = as_list(item.get("content")) or as_list(item.get("summary"))
    thoughts = carried_text(item.get("encrypted_content")) or text_of(parts)
    if thoughts:
        turn = assistant_turn(messages, is_text=True)
        turn["reasoning_content"] = turn.get("reasoning_content", "") + thoughts


def add_compaction(messages: list[dict], item: dict, names: ToolNames) -> None:
    """compaction, compaction_summary"""
    summary = carried_text(item.get("encrypted_content"))
    if summary:
        messages.append(
            {"role": "user", "content": "The conversation so far, in summary:\n\n" + summary}
        )


ITEMS: dict[str, Callable[[list[dict], dict, ToolNames], None]] = {
    "message": add_message,
    "function_call": add_call,
    "custom_tool_call": add_call,
    "function_call_output": add_output,
    "custom_tool_call_output": add_output,
    "reasoning": add_reasoning,
    "compaction": add_compaction,
    "compaction_summary": add_compaction,
}


class OutputItem:
    """One item of a response's output while it grows: `item` is what the client has been told of it."""

    def __init__(self, kind: str, prefix: str, index: int, **fields: Any):
        self.index, self.text, self.is_open = index, LongText(), True
        self.item = {"id": prefix + secrets.token_hex(12), "type": kind, **fields}
        self.place = {"item_id": self.item["id"], "output_index": index}


class ResponseEvents:
    """Chat chunks in, the events of one response out, in the order that all clients take.

    Thoughts go out as a reasoning summary, since openai-node fails on reasoning_text and Codex and the
    AI SDK do not show it. Calls are done at the end, as deltas for several of them may alternate.
    """

    def __init__(self, request: ResponseRequest, model: str, created: int):
        self._request, self._names = request, request.names
        self._id, self._model, self._created = "resp_" + secrets.token_hex(16), model, created
        self._number = itertools.count()
        self._items: list[OutputItem] = []
        # the text or the thoughts that go on
        self._open: OutputItem | None = None
        self._calls: dict[int, OutputItem] = {}
        self._finish_reason: str | None = None
        self._summary = LongText()
        self._keeps_thoughts = "reasoning.encrypted_content" in as_list(
            request.asked.get("include")
        )

    def start(self) -> list[dict]:
        """The first events."""
        return [self._event("response.created", response=self.response()), self.alive()]

    def alive(self) -> dict:
        """A sign of life: Codex takes no comment for one."""
        return self._event("response.in_progress", response=self.response())

    def feed(self, chunk: dict) -> list[dict]:
        """The events for a chunk."""
        events: list[dict] = []
        for choice in chunk["choices"][:1]:
            delta, self._finish_reason = (
                choice["delta"],
                choice["finish_reason"] or self._finish_reason,
            )
            if self._request.is_compaction:
                self._summary.add(delta.get("content") or "")
                continue
            if delta.get("reasoning_content"):
                events += self._thoughts(delta["reasoning_content"])
            if delta.get("content"):
                events += self._text(delta["content"])
            for call in delta.get("tool_calls") or []:
                events += self._call(call)
        return events

    def finish(self, usage: dict | None) -> list[dict]:
        """The events that end the response: whole, or incomplete for its length or a filter."""
        events = self._close()
        for call in self._calls.values():
            events += self._close_call(call)
        if self._request.is_compaction:
            events += self._compaction()
        status = (
            "completed" if self._finish_reason not in ("length", "content_filter") else "incomplete"
        )
        return [*events, self._event("response." + status, response=self.response(status, usage))]

    def fail(self, error: ProxyError) -> list[dict]:
        """The two events that end a response that broke off, as at OpenAI; the codes are those that Codex knows.

        Codex waits for response.failed; LangChain JS and with it n8n would take what came for whole without error,
        down to a tool call cut in its arguments.
        """
        known = ("context_length_exceeded", "insufficient_quota", "rate_limit_exceeded")
        failure = {
            "code": error.code if error.code in known else "server_error",
            "message": error.error_object()["message"],
        }
        if error.code == "rate_limit_exceeded":
            failure["message"] += ". Please try again in %ds." % max(1, int(error.retry_after or 5))
        return [
            self._event(
                "error", **failure, param=None, error={**failure, "type": error.type, "param": None}
            ),
            self._event("response.failed", response={**self.response("failed"), "error": failure}),
        ]

    def response(self, status: str = "in_progress", usage: dict | None = None) -> dict:
        """The response object as it is now."""
        asked = self._request.asked
        reason = "max_output_tokens" if self._finish_reason == "length" else self._finish_reason
        is_over = status != "in_progress"
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": reason} if status == "incomplete" else None,
            "instructions": asked.get("instructions"),
            "max_output_tokens": asked.get("max_output_tokens"),
            "max_tool_calls": None,
            "model": self._model,
            "output": [self._whole(item) for item in self._items] if is_over else [],
            "parallel_tool_calls": asked.get("parallel_tool_calls", True) is not False,
            "previous_response_id": None,
            "prompt_cache_key": asked.get("prompt_cache_key"),
            "reasoning": {
                "effort": dig(asked, "reasoning", "effort"),
                "summary": dig(asked, "reasoning", "summary"),
            },
            "service_tier": "default",
            "store": False,
            "temperature": asked.get("temperature"),
            "text": {
                "format": dig(asked, "text", "format") or {"type": "text"},
                "verbosity": dig(asked, "text", "verbosity") or "medium",
            },
            "tool_choice": asked.get("tool_choice") or "auto",
            "tools": asked.get("tools") or [],
            "top_logprobs": 0,
            "top_p": asked.get("top_p"),
            "truncation": asked.get("truncation") or "disabled",
            "usage": response_usage(usage),
            "user": asked.get("user"),
            "metadata": asked.get("metadata") or {},
        }

    def _event(self, kind: str, **fields: Any) -> dict:
        return {"type": kind, "sequence_number": next(self._number), **fields}

    def _begin(self, kind: str, prefix: str, **fields: Any) -> tuple[OutputItem, dict]:
        item = OutputItem(kind, prefix, len(self._items), **fields)
        self._items.append(item)
        return item, self._event(
            "response.output_item.added", output_index=item.index, item=dict(item.item)
        )

    def _done(self, item: OutputItem) -> dict:
        item.is_open = False
        return self._event(
            "response.output_item.done", output_index=item.index, item=self._whole(item)
        )

    def _thoughts(self, text: str) -> list[dict]:
        events: list[dict] = []
        if self._open is None or self._open.item["type"] != "reasoning":
            events = self._close()
            self._open, added = self._begin("reasoning", "rs_", summary=[])
            events += [
                added,
                self._event(
                    "response.reasoning_summary_part.added",
                    **self._open.place,
                    summary_index=0,
                    part={"type": "summary_text", "text": ""},
                ),
            ]
        self._open.text.add(text)
        return [
            *events,
            self._event(
                "response.reasoning_summary_text.delta",
                **self._open.place,
                summary_index=0,
                delta=text,
            ),
        ]

    def _text(self, text: str) -> list[dict]:
        events: list[dict] = []
        if self._open is None or self._open.item["type"] != "message":
            events = self._close()
            self._open, added = self._begin(
                "message", "msg_", status="in_progress", role="assistant", content=[]
            )
            events += [
                added,
                self._event(
                    "response.content_part.added",
                    **self._open.place,
                    content_index=0,
                    part=output_text(""),
                ),
            ]
        self._open.text.add(text)
        return [
            *events,
            self._event(
                "response.output_text.delta",
                **self._open.place,
                content_index=0,
                delta=text,
                logprobs=[],
            ),
        ]

    def _call(self, call: dict) -> list[dict]:
        events: list[dict] = []
        item = self._calls.get(call["index"])
        if item is None:
            events, flat = self._close(), call["function"]["name"]
            kind, prefix, field = (
                ("custom_tool_call", "ctc_", "input")
                if flat in self._names.custom
                else ("function_call", "fc_", "arguments")
            )
            fields = {
                "status": "in_progress",
                "call_id": call["id"],
                **self._names.restored(flat),
                field: "",
            }
            item, added = self._begin(kind, prefix, **fields)
            self._calls[call["index"]] = item
            events.append(added)
        arguments = call["function"].get("arguments") or ""
        item.text.add(arguments)
        if arguments and item.item["type"] == "function_call":
            events.append(
                self._event("response.function_call_arguments.delta", **item.place, delta=arguments)
            )
        return events

    def _close(self) -> list[dict]:
        """The events that end the text or the thoughts that go on."""
        item, self._open = self._open, None
        if item is None:
            return []
        text = str(item.text)
        if item.item["type"] == "reasoning":
            part = {"type": "summary_text", "text": text}
            return [
                self._event(
                    "response.reasoning_summary_text.done", **item.place, summary_index=0, text=text
                ),
                self._event(
                    "response.reasoning_summary_part.done", **item.place, summary_index=0, part=part
                ),
                self._done(item),
            ]
        return [
            self._event(
                "response.output_text.done", **item.place, content_index=0, text=text, logprobs=[]
            ),
            self._event(
                "response.content_part.done", **item.place, content_index=0, part=output_text(text)
            ),
            self._done(item),
        ]

    def _close_call(self, item: OutputItem) -> list[dict]:
        if item.item["type"] == "function_call":
            done = self._event(
                "response.function_call_arguments.done",
                **item.place,
                name=item.item["name"],
                arguments=str(item.text),
            )
            return [done, self._done(item)]
        text = custom_input(str(item.text))
        return [
            self._event("response.custom_tool_call_input.delta", **item.place, delta=text),
            self._event("response.custom_tool_call_input.done", **item.place, input=text),
            self._done(item),
        ]

    def _compaction(self) -> list[dict]:
        if not str(self._summary).strip():
            raise UpstreamError("the model gave no summary of the conversation; try again")
        item, added = self._begin(
            "compaction", "cmp_", encrypted_content=carried(str(self._summary))
        )
        return [added, self._done(item)]

    def _whole(self, output: OutputItem) -> dict:
        """An item with all that came so far; one that was cut says so."""
        kind, item, text = output.item["type"], output.item, str(output.text)
        status = (
            "in_progress"
            if output.is_open
            else "incomplete"
            if self._finish_reason == "length"
            else "completed"
        )
        if kind == "reasoning":
            kept = {"encrypted_content": carried(text)} if self._keeps_thoughts else {}
            return {**item, "summary": [{"type": "summary_text", "text": text}], **kept}
        if kind == "message":
            return {**item, "status": status, "content": [output_text(text)]}
        if kind == "function_call":
            return {**item, "status": status, "arguments": text}
        if kind == "custom_tool_call":
            return {**item, "status": status, "input": custom_input(text)}
        return dict(item)


def output_text(text: str) -> dict:
    """A text part of a message; the AI SDK and LangChain JS need its annotations."""
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def custom_input(arguments: str) -> str:
    """The one string that a custom tool is called with."""
    try:
        found = dig(json.loads(arguments), "input")
    except (ValueError, RecursionError):
        found = None
    return found if isinstance(found, str) else arguments


def response_usage(usage: dict | None) -> dict | None:
    """The usage in the words of /v1/responses."""
    if not usage:
        return None
    cached = dig(usage, "prompt_tokens_details", "cached_tokens")
    reasoning = dig(usage, "completion_tokens_details", "reasoning_tokens")
    return {
        "input_tokens": usage["prompt_tokens"],
        "input_tokens_details": {"cached_tokens": cached or 0},
        "output_tokens": usage["completion_tokens"],
        "output_tokens_details": {"reasoning_tokens": reasoning or 0},
        "total_tokens": usage["total_tokens"],
    }


# ------------------------------------------------------------------------------------------------
# Server
# ------------------------------------------------------------------------------------------------


class ServerOptions(NamedTuple):
    """What the command line or make_server() says about serving; see `--help`. Times are seconds."""

    host: str = "localhost"
    port: int = 8080
    api_keys: tuple[str, ...] = ()
    no_auth: bool = False
    allow_origins: tuple[str, ...] = ()
    allow_hosts: tuple[str, ...] = ()
    timeout: float = UPSTREAM_TIMEOUT
    retries: int = RETRIES
    max_connections: int = MAX_CONNECTIONS
    max_body: int = MAX_BODY_MIB * 1024 * 1024
    keep_alive: float = KEEP_ALIVE_INTERVAL
    grace: float = GRACE


def _no_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")


def _bounded_int(digits: str) -> int:
    if len(digits) > MAX_JSON_DIGITS:
        raise ValueError("a number has too many digits")
    return int(digits)


def _unique_pairs(pairs: list[tuple[str, Any]]) -> dict:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("a name occurs twice in one object")
    return value


_STRICT_JSON = json.JSONDecoder(
    parse_constant=_no_constant, parse_int=_bounded_int, object_pairs_hook=_unique_pairs
)


def parse_json(body: bytes) -> Any:
    """The JSON in a client's body; raises BadRequest that says what is wrong with it."""
    try:
        return _STRICT_JSON.decode(body.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise BadRequest("the body is not UTF-8", code="invalid_json") from None
    except RecursionError:
        raise BadRequest("the body is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise BadRequest(f"the body is not valid JSON: {error}", code="invalid_json") from None


def split_host(value: str) -> str:
    """The name in a Host header, in lower case and without the port.

    >>> split_host("[::1]:8080"), split_host("LocalHost:80")
    ('::1', 'localhost')
    """
    match = re.match(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]/\s@]*))(?::\d*)?\Z", value.strip().lower())
    return (match.group(1) or match.group(2)).rstrip(".") if match else ""


@functools.lru_cache(maxsize=256)
def is_loopback(name: str) -> bool:
    """Whether a host name or address can only mean this machine."""
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def listed(values: Iterable[str] | str) -> list[str]:
    """The values as a list; a string is one value, not one for each of its characters."""
    return [values] if isinstance(values, str) else list(values)


def checked_keys(keys: Iterable[str] | str, source: str = "--api-key") -> tuple[str, ...]:
    """The keys that clients may present, without blanks around them; raises ValueError for one that is none.

    An empty key is mostly a variable that was not set: to serve without a key then would open the door.
    """
    checked = []
    for key in listed(keys):
        key = key.strip() if isinstance(key, str) else ""
        if len(key) < 2 or not key.isprintable():
            raise ValueError(
                f"{source}: a key must have at least 2 characters, none of them a control character; "
                "is the variable that should hold it set?"
            )
        checked.append(key)
    return tuple(checked)


class AccessPolicy:
    """Who may use the server: which keys there are, whether one is needed, and whether a request may pass.

    Command line and make_server() come here; the constructor raises ValueError for options that would
    leave the door open. A page on the web reaches a server on loopback by DNS rebinding (stopped by Host) or by a plain
    cross-site request (stopped by Origin and Sec-Fetch-Site). Ollama's CVE-2024-28224 was the first.
    """

    def __init__(self, options: ServerOptions):
        self._hosts = {name.lower() for name in options.allow_hosts} | {
            "host.docker.internal",
            socket.gethostname().lower(),
            options.host.lower(),
        }
        self._origins = {
            re.sub(r"(?<![/:])/\Z", "", origin).lower() for origin in options.allow_origins
        }
        self._keys = [key.encode() for key in checked_keys(options.api_keys)]
        for key in options.api_keys:
            keep_secret(key.strip())
        # An address cannot be rebound; where the server is open to a network it is reached by one.
        self._any_address = not self.is_local(options.host)
        if self._any_address and not (self._keys or options.no_auth):
            raise ValueError(
                f"listening on {options.host or 'all addresses'} lets everybody on the network spend your quota: say "
                "--no-auth, or give a key, here a fresh one: python3 qwen_proxy.py --host "
                f"{options.host or '0.0.0.0'} --port {options.port} --api-key {secrets.token_hex(16)}"
            )

    @staticmethod
    def is_local(host: str) -> bool:
        """Whether only this machine can reach a server that listens there; a name may lead anywhere."""
        try:
            return host == "localhost" or ipaddress.ip_address(host).is_loopback
        except ValueError:
            return False

    def warnings(self) -> list[str]:
        """What the options open that a person may not have meant."""
        found = []
        if "null" in self._origins:
            found.append(
                "--allow-origin null lets every web page use this server: a sandboxed frame has that origin"
            )
        if "*" in self._origins and not self._keys:
            found.append("--allow-origin * without --api-key lets every web page use this server")
        return found

    def check_host(self, host: str | None, is_required: bool) -> None:
        """Raise ProxyError unless the Host header names this machine."""
        if host is None:
            if is_required:
                raise BadRequest("the Host header is missing")
            return
        name = split_host(host)
        if is_loopback(name) or name in self._hosts:
            return
        if self._any_address:
            with contextlib.suppress(ValueError):
                ipaddress.ip_address(name)
                return
        raise ProxyError(
            f"the Host header {shorten(host, 100)!r} does not name this machine; if it should, add --allow-host NAME",
            403,
            "host_not_allowed",
            "permission_error",
        )

    def allows_origin(self, origin: str) -> bool:
        """Whether pages of this origin may use the server."""
        return (
            "*" in self._origins
            or origin.lower() in self._origins
            or bool(LOCAL_ORIGINS.match(origin))
        )

    def check_key(self, headers: dict[str, str]) -> str:
        """The name of the key that is presented, '' where none is needed; raises ProxyError for a wrong one."""
        if not self._keys:
            return ""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        presented = [
            headers.get("x-api-key", ""),
            headers.get("api-key", ""),
            bearer if scheme.lower() == "bearer" else "",
        ]
        matches = [
            any(
                hmac.compare_digest(key, value.strip(" ").encode("latin-1", "replace"))
                for value in presented
            )
            for key in self._keys
        ]
        if not any(matches):
            raise ProxyError(
                "this server wants an API key: one of those given with --api-key, as "
                "'Authorization: Bearer KEY'",
                401,
                "invalid_api_key",
                "authentication_error",
                headers=[("WWW-Authenticate", "Bearer")],
            )
        return f"key {matches.index(True) + 1}"


class _DeadlineReader(io.RawIOBase):
    """Bytes from a client, none of them after the deadline: a byte a second must not hold a thread."""

    def __init__(self, connection: socket.socket):
        super().__init__()
        self._connection, self._readiness, self.deadline = connection, Readiness([connection]), 0.0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Bytes as soon as there are some; raises socket.timeout at the deadline."""
        while True:
            remaining = self.deadline - time.monotonic()
            if remaining <= 0 or not self._readiness.wait(remaining):
                raise socket.timeout("timed out")
            with contextlib.suppress(BlockingIOError):
                return self._connection.recv_into(buffer)


class Completion:
    """One request of a client on its way through the upstream: prepared, opened, read."""

    def __init__(
        self,
        proxy: ProxyServer,
        kind: Kind,
        request: dict,
        routes: list[Route],
        watch: Watch,
        user_agent: str,
    ):
        self._proxy, self._kind, self._request, self._routes, self._watch = (
            proxy,
            kind,
            request,
            routes,
            watch,
        )
        self._headers = {"Accept": "text/event-stream", "User-Agent": user_agent}
        self._body: dict = {}
        self._prepared_for: Route | None = None

    def open(self) -> Answer:
        """The answer, begun: whatever can still become an HTTP status has been raised."""
        return open_answer(
            self._routes, self._attempt, self._repair, self._watch, self._proxy.options.retries
        )

    def _attempt(self, route: Route, access_token: str) -> Answer:
        if self._prepared_for is not route:
            self._prepare(route)
        response = self._proxy.upstream.send(
            route,
            self._kind.path,
            encode_json(self._body),
            access_token,
            self._watch,
            self._headers,
        )
        try:
            if not 200 <= response.status < 300:
                raise refused(response, route)
            return Answer(
                response,
                route,
                self._kind.translator(self._request, route),
                self._kind.collector(),
                self._watch,
            )
        except BaseException:
            response.close()
            raise

    def _prepare(self, route: Route) -> None:
        refuse_unserved(self._kind.path, route)
        self._body, fired = self._kind.to_upstream(self._request, route)
        self._prepared_for = route
        for given_up in filter(None, fired.values()):
            log.info("%s: %s", route.model, given_up)
        if log.isEnabledFor(logging.DEBUG):
            log.debug(
                "rules: %s; to %s: %s",
                ", ".join(fired) or "none",
                route.provider.name,
                excerpt(self._body),
            )

    def _repair(self, error: UpstreamError) -> bool:
        how = repair_request(self._body, error)
        if how:
            log.info("refused: %s; repeated %s", error.message, how)
        return bool(how)


def refuse_unserved(path: str, route: Route) -> None:
    """Raise BadRequest where a provider is known not to have an endpoint, instead of its empty 404."""
    words = UNSERVED.get((path, route.provider.family))
    if words:
        raise BadRequest(words, code="unsupported_endpoint", moves_on=True)


class EmbeddingBatch:
    """Some texts of a request for embeddings on their way through the upstream."""

    def __init__(
        self, proxy: ProxyServer, request: dict, texts: list[str], watch: Watch, user_agent: str
    ):
        self._proxy, self._request, self._texts, self._watch = proxy, request, texts, watch
        self._headers = {"Accept": "application/json", "User-Agent": user_agent}
        self.route: Route | None = None

    def fetch(self, routes: list[Route]) -> tuple[list[list[float]], dict]:
        """Vectors and usage."""
        return open_answer(
            routes, self._attempt, lambda error: False, self._watch, self._proxy.options.retries
        )

    def _attempt(self, route: Route, access_token: str) -> tuple[list[list[float]], dict]:
        refuse_unserved("/embeddings", route)
        self.route, body = (
            route,
            encode_json(to_embedding_request(self._request, self._texts, route)),
        )
        response = self._proxy.upstream.send(
            route, "/embeddings", body, access_token, self._watch, self._headers
        )
        try:
            if not 200 <= response.status < 300:
                raise refused(response, route)
            return vectors_of(response.read(MAX_EVENT), len(self._texts), route.provider.family)
        finally:
            response.close()


def fetch_batches(
    batches: list[EmbeddingBatch], routes: list[Route], stop: Callable[[], None]
) -> list[tuple[list[list[float]], dict]]:
    """What all batches bring, in their order, a few of them at a time; stop() is called when one fails."""
    if len(batches) == 1:
        return [batches[0].fetch(routes)]
    with concurrent.futures.ThreadPoolExecutor(PARALLEL_BATCHES) as pool:
        futures = [pool.submit(batch.fetch, routes) for batch in batches]
        done, _ = concurrent.futures.wait(futures, return_when=concurrent.futures.FIRST_EXCEPTION)
        failures = [future.exception() for future in done if future.exception()]
        if failures:
            for future in futures:
                future.cancel()
            stop()
            raise failures[0]  # type: ignore[misc]
        return [future.result() for future in futures]


def refused(response: UpstreamResponse, route: Route) -> UpstreamError:
    """The error for an answer whose status is none of success."""
    text = response.read(MAX_ERROR_BODY).decode("utf-8", "replace")
    log.debug("HTTP %d from %s: %s", response.status, route.provider.name, shorten(text, 2000))
    refusal = refusal_of(response.status, text)
    if not refusal.request_id:
        refusal = refusal._replace(request_id=response.headers.get("x-request-id"))
    return to_upstream_error(refusal, route.provider.family, retry_after_of(response.headers))


class Answer:
    """An upstream's answer whose first chunk is there."""

    def __init__(
        self,
        response: UpstreamResponse,
        route: Route,
        translator: ChunkTranslator,
        collector: CompletionCollector,
        watch: Watch,
    ):
        self.response, self.route, self.translator, self._collector = (
            response,
            route,
            translator,
            collector,
        )
        self.request_id = response.headers.get("x-request-id")
        self._chunks, self._first = iter_chunks(response.pieces(), translator), []  # type: ignore[var-annotated]
        for translated in self._chunks:
            self._first = translated
            if translated:
                break
            watch.tick()

    def chunks(self) -> Iterator[Translated]:
        """All chunks, as they come; raises UpstreamError, ClientGone, ShuttingDown."""
        yield self._first
        yield from self._chunks

    def collected(self) -> dict:
        """The whole completion."""
        for translated in self.chunks():
            for chunk, _ in translated:
                if chunk["choices"]:
                    self._collector.feed(chunk)
        return self._collector.completion(self.translator.usage)


class ChunkForm:
    """How an answer is written to a client of chat or text completions: its chunks, then [DONE]."""

    def start(self) -> list[bytes]:
        """What goes out before the first chunk."""
        return []

    def alive(self) -> list[bytes]:
        """A sign of life while the upstream is silent."""
        return [KEEP_ALIVE]

    def events(self, translated: Translated) -> list[bytes]:
        """Some chunks."""
        return [encode_event(raw or encode_json(chunk)) for chunk, raw in translated]

    def end(self, usage: dict | None) -> list[bytes]:
        """After the last chunk."""
        return [encode_event(DONE)]

    def problem(self, error: ProxyError) -> list[bytes]:
        """The end of an answer that broke off; no [DONE], as it is not whole."""
        return [encode_event(encode_json(error.body()))]

    def whole(self, answer: Answer) -> dict:
        """The answer for a client that does not want it streamed."""
        return answer.collected()


class ResponseForm:
    """How an answer is written to a client of /v1/responses: as events with a name each."""

    def __init__(self, request: ResponseRequest, model: str, memory: ItemMemory, owner: str):
        self._events, self._owner = ResponseEvents(request, model, int(time.time())), owner
        self._memory = memory if request.asked.get("store") is not False else None
        self._has_started = False

    def start(self) -> list[bytes]:
        """response.created, once."""
        if self._has_started:
            return []
        self._has_started = True
        return self._encoded(self._events.start())

    def alive(self) -> list[bytes]:
        """A sign of life while the upstream is silent."""
        return self.start() or self._encoded([self._events.alive()])

    def events(self, translated: Translated) -> list[bytes]:
        """Some chunks."""
        return self._encoded(
            [event for chunk, _ in translated for event in self._events.feed(chunk)]
        )

    def end(self, usage: dict | None) -> list[bytes]:
        """After the last chunk."""
        return self._encoded(self._finished(usage))

    def problem(self, error: ProxyError) -> list[bytes]:
        """error and response.failed: two of four clients do not notice a stream that just ends."""
        return self.start() + self._encoded(self._events.fail(error))

    def whole(self, answer: Answer) -> dict:
        """The answer for a client that does not want it streamed."""
        for translated in answer.chunks():
            for chunk, _ in translated:
                self._events.feed(chunk)
        return self._finished(answer.translator.usage)[-1]["response"]

    def _finished(self, usage: dict | None) -> list[dict]:
        events = self._events.finish(usage)
        if self._memory:
            self._memory.keep(events[-1]["response"]["output"], self._owner)
        return events

    @staticmethod
    def _encoded(events: list[dict]) -> list[bytes]:
        return [encode_event(encode_json(event), event["type"]) for event in events]


def excerpt(value: Any, longest: int = 200) -> str:
    """A JSON value for the log, long strings cut."""

    def cut(item: Any) -> Any:
        if isinstance(item, str) and len(item) > longest:
            return f"{shorten(item, longest)}... ({len(item)} characters)"
        if isinstance(item, dict):
            return {name: cut(inner) for name, inner in item.items()}
        return [cut(inner) for inner in item] if isinstance(item, list) else item

    try:
        return json.dumps(cut(value), ensure_ascii=False)
    except RecursionError:
        return "(nested too deeply to show)"


# Path (without /v1), method: the method of Handler.
ROUTES = {
    "/chat/completions": {"POST": "post_chat_completions"},
    "/completions": {"POST": "post_completions"},
    "/embeddings": {"POST": "post_embeddings"},
    "/responses": {"POST": "post_responses", "GET": "get_responses"},
    "/models": {"GET": "get_models"},
    "/models/{id}": {"GET": "get_model"},
    "/health": {"GET": "get_health"},
    "/": {"GET": "get_root"},
}
WITHOUT_KEY = ("/health", "/")
_REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) ([\x21-\x7e]+) HTTP/(\d)\.(\d)\r\n\Z")
_HEADER_LINE = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)\r\n\Z")
_SINGLE = frozenset(
    {
        "content-length",
        "transfer-encoding",
        "host",
        "authorization",
        "origin",
        "content-type",
        "content-encoding",
    }
)
_CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})\r\n\Z")


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection of a client; http.server's loop over requests, with stricter parsing.

    The settings of the server are on self.server.proxy. A request is answered in one of three ways:
    _send_json, _send_stream, or _send_problem for every ProxyError.
    """

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True
    server: Listener

    # -- one request -----------------------------------------------------------------------------

    def setup(self) -> None:
        """Reading by deadline, not by socketserver's time per read."""
        super().setup()
        self.rfile.close()
        self.connection.setblocking(False)
        self._reader = _DeadlineReader(self.connection)
        self.rfile = io.BufferedReader(self._reader, 8192)  # type: ignore[assignment]
        self.proxy = self.server.proxy
        self.is_busy = False
        self.proxy.handlers.add(self)

    def finish(self) -> None:
        self.proxy.handlers.discard(self)
        with contextlib.suppress(OSError):
            super().finish()

    def handle_one_request(self) -> None:
        """Read one request and answer it; called by http.server as long as the connection is kept."""
        self._begin()
        try:
            self._reader.deadline = time.monotonic() + IDLE_TIMEOUT
            if not self.rfile.peek(1):  # type: ignore[attr-defined]
                self.close_connection = True
                return
            self.is_busy = True
            self._started = time.monotonic()
            self._reader.deadline = self._started + HEADER_TIMEOUT
            self.raw_requestline = self.rfile.readline(MAX_LINE + 1)
            self.parse_request()
            self._respond()
        except ProxyError as error:
            self.close_connection = True
            self._guarded(self._send_problem, error)
        except (OSError, ClientGone, ValueError) as error:
            # ValueError: a closed file, on shutdown
            self.close_connection = True
            if self.is_busy and isinstance(error, socket.timeout):
                self._guarded(
                    self._send_problem, BadRequest("the request did not arrive in time", 408)
                )
        finally:
            if self.is_busy:
                self._log_answer()
            self.is_busy = False
            self.close_connection = self.close_connection or self.proxy.is_stopping
            if self.close_connection and self._unread:
                self._linger()

    def _begin(self) -> None:
        self.close_connection, self.command, self.path, self.headers = True, "", "", {}  # type: ignore[assignment]
        self._form: ChunkForm | ResponseForm = ChunkForm()
        self.status, self._unread, self._is_chunked, self._length = 0, False, False, 0
        self._head_sent = self._is_http_1_0 = False
        self._cors: list[tuple[str, str]] = []
        self._note = self._owner = ""
        self._request_id = "req_{:024x}".format(
            random.getrandbits(96)
            # no secret; os.urandom is a system call
        )
        self._started = time.monotonic()

    def parse_request(self) -> bool:
        """Read request line and headers; raises BadRequest for whatever RFC 9112 calls malformed."""
        line = (
            self.raw_requestline
            if self.raw_requestline != b"\r\n"
            else self.rfile.readline(MAX_LINE + 1)
        )
        match = _REQUEST_LINE.match(line)
        if len(line) > MAX_LINE:
            raise BadRequest("the request line is too long", 414)
        if not match:
            raise BadRequest("the request line is malformed")
        self.command, self.path = match.group(1).decode(), match.group(2).decode()
        version = (int(match.group(3)), int(match.group(4)))
        if version not in ((1, 0), (1, 1)):
            raise BadRequest("only HTTP/1.0 and HTTP/1.1 are spoken here", 505)
        self._is_http_1_0 = version == (1, 0)
        self.headers = self._read_headers()  # type: ignore[assignment]
        self._check_framing()
        connection = self.headers.get("connection", "").lower()
        self.close_connection = "close" in connection or self._is_http_1_0
        return True

    def _read_headers(self) -> dict[str, str]:
        headers: dict[str, str] = {}
        size = 0
        for _ in range(MAX_HEADERS + 1):
            line = self.rfile.readline(MAX_LINE + 1)
            size += len(line)
            if size > MAX_HEAD:
                raise BadRequest("the headers are too long", 431)
            if line == b"\r\n":
                return headers
            match = _HEADER_LINE.match(line)
            if len(line) > MAX_LINE:
                raise BadRequest("a header line is too long", 431)
            # obs-fold, NUL, bare CR or LF, a space before the colon
            if not match:
                raise BadRequest("a header line is malformed")
            name, value = (
                match.group(1).decode().lower(),
                match.group(2).decode("latin-1").strip(" \t"),
            )
            if name in headers and name in _SINGLE:
                raise BadRequest(f"the header {name} occurs twice")
            headers[name] = headers[name] + ", " + value if name in headers else value
        raise BadRequest("there are more than %d headers" % MAX_HEADERS, 431)

    def _check_framing(self) -> None:
        """RFC 9112 6.3: one length, digits only, and never beside Transfer-Encoding."""
        length, coding = self.headers.get("content-length"), self.headers.get("transfer-encoding")
        if coding is not None:
            if length is not None or self._is_http_1_0:
                raise BadRequest("Transfer-Encoding beside Content-Length, or in HTTP/1.0")
            if coding.lower() != "chunked":
                raise BadRequest(
                    f"the transfer coding {shorten(coding, 40)!r} is not supported; use chunked"
                )
            self._is_chunked = self._unread = True
        elif length is not None:
            if not re.match(r"[0-9]{1,18}\Z", length):
                raise BadRequest("Content-Length must be digits")
            self._length = int(length)
            self._unread = self._length > 0

    def _respond(self) -> None:
        """The boundary of a request: whatever happens inside becomes an answer, or the end of the connection."""
        try:
            self._check_access()
            if self.command == "OPTIONS":
                return self._send_preflight()
            method, needs_key = self._route()
            if needs_key:
                self._owner = self.proxy.access.check_key(self.headers)  # type: ignore[arg-type]
            return method()
        except ProxyError as error:
            self._guarded(self._send_problem, error)
        except ShuttingDown:
            problem = ProxyError(
                "the server is stopping; try again in a moment",
                503,
                "shutting_down",
                "server_error",
                headers=[("Retry-After", "2")],
            )
            self.close_connection = True
            self._guarded(self._send_problem, problem)
        except (ClientGone, OSError) as error:
            self.close_connection, self.status = True, 499
            if isinstance(error, socket.timeout) and not self._head_sent and self._unread:
                self._guarded(
                    self._send_problem, BadRequest("the request did not arrive in time", 408)
                )
        except Exception as error:  # noqa: B902 - the one place: a fault of ours must not end in a traceback
            frame = error.__traceback__
            while frame and frame.tb_next:
                frame = frame.tb_next
            log.error(
                "%s in line %d: %s; please report this",
                type(error).__name__,
                frame.tb_lineno if frame else 0,
                shorten(str(error), 200),
            )
            for line in traceback.format_exc().splitlines():
                log.debug("%s", line)
            self.close_connection = True
            self._guarded(
                self._send_problem,
                ProxyError(
                    f"an internal error of qwen_proxy ({type(error).__name__}); its log says where"
                ),
            )
        return None

    def _guarded(self, send: Callable[..., None], *arguments: Any) -> None:
        """Run what writes a last word to a client that may be gone."""
        try:
            send(*arguments)
        except OSError:
            self.close_connection = True

    # -- access and routing ----------------------------------------------------------------------

    def _check_access(self) -> None:
        access, origin = self.proxy.access, self.headers.get("origin")
        access.check_host(self.headers.get("host"), not self._is_http_1_0)
        if origin is not None:
            if not access.allows_origin(origin):
                if origin == "null":
                    raise ProxyError(
                        "pages without an origin of their own (a file, a sandboxed frame) may not use this "
                        "server; serve the page over http on localhost",
                        403,
                        "origin_not_allowed",
                        "permission_error",
                    )
                raise ProxyError(
                    f"pages of {shorten(origin, 100)} may not use this server; if they should, start it with --allow-origin {shorten(origin, 100)}",
                    403,
                    "origin_not_allowed",
                    "permission_error",
                )
            self._cors = [
                ("Access-Control-Allow-Origin", origin),
                ("Vary", "Origin"),
                (
                    "Access-Control-Expose-Headers",
                    "x-request-id, retry-after, retry-after-ms, x-qwen-provider",
                ),
            ]
            if self.command == "POST" and not self._declares_json():
                raise BadRequest(
                    "a request from a web page must be declared as Content-Type: application/json",
                    415,
                )
        elif self.headers.get("sec-fetch-site") == "cross-site" and not self._is_harmless():
            raise ProxyError(
                "a request from another site, without an Origin that could be checked",
                403,
                "origin_not_allowed",
                "permission_error",
            )

    def _is_harmless(self) -> bool:
        """Whether a cross-site request without Origin is a visit by link, or of an app that has web security off.

        Browsers send Origin with every cross-site request in mode cors (Fetch, 'append a request Origin header');
        Chatbox and Cherry Studio have web security off.
        """
        mode = self.headers.get("sec-fetch-mode")
        return (
            mode == "cors"
            and (self.command != "POST" or self._declares_json())
            or mode == "navigate"
            and self.command == "GET"
        )

    def _declares_json(self) -> bool:
        return (
            self.headers.get("content-type", "").partition(";")[0].strip().lower()
            == "application/json"
        )

    def _send_preflight(self) -> None:
        headers = [("Allow", "GET, POST, OPTIONS")]
        if self._cors:
            headers = [
                ("Access-Control-Allow-Methods", "GET, POST, OPTIONS"),
                ("Access-Control-Max-Age", "600"),
                ("Access-Control-Allow-Origin", self.headers["origin"]),
                (
                    "Vary",
                    "Origin, Access-Control-Request-Headers, Access-Control-Request-Private-Network",
                ),
            ]
            self._cors = []
            wanted = self.headers.get("access-control-request-headers", "")
            # echoed: any fixed list of x-stainless-* names ages (ollama#3571)
            if wanted:
                headers.append(("Access-Control-Allow-Headers", wanted))
            if self.headers.get("access-control-request-private-network") == "true":
                headers.append(("Access-Control-Allow-Private-Network", "true"))
        self._send(204, headers, b"")

    def _route(self) -> tuple[Callable[[], None], bool]:
        """The method for path and command, and whether it needs a key; raises 400, 404, 405."""
        path = self.path.partition("?")[0]
        if not path.startswith("/"):
            raise BadRequest("the request target must be a path, such as /v1/chat/completions")
        path = "/" + path.lstrip(
            "/"
            # base URLs that end in a slash get another one: Jan asks for //models
        )
        if path == "/v1" or path.startswith("/v1/"):
            path = "/" + path[3:].lstrip("/")
        path = path.rstrip("/") or "/"
        self._model_id = (
            urllib.parse.unquote(path[len("/models/") :]) if path.startswith("/models/") else ""
        )
        if self._model_id:
            path = "/models/{id}"
        if path.startswith("/responses/"):
            raise BadRequest(
                "responses are not stored here (store is false): send the whole conversation as input",
                404,
                "response_not_found",
            )
        methods = ROUTES.get(path)
        if methods is None:
            known = ", ".join(
                f"{method} /v1{route}"
                for route, methods in ROUTES.items()
                for method in methods
                if route not in WITHOUT_KEY
            )
            raise BadRequest(
                "there is no {} here; there are: {}, GET /health".format(
                    shorten(self.path.partition("?")[0], 200), known
                ),
                404,
                "unknown_url",
            )
        command = "GET" if self.command == "HEAD" else self.command
        if command not in methods:
            raise BadRequest(
                "{} is not possible on this path; use {}".format(self.command, ", ".join(methods)),
                405,
                "method_not_allowed",
                headers=[("Allow", ", ".join([*methods, "OPTIONS"]))],
            )
        return getattr(self, methods[command]), path not in WITHOUT_KEY

    # -- reading the body ------------------------------------------------------------------------

    def _read_json(self) -> Any:
        return parse_json(self._decoded(self._read_body()))

    def _read_body(self) -> bytes:
        limit = self.proxy.options.max_body
        if self._length > limit:
            raise self._too_large()
        self._reader.deadline = time.monotonic() + BODY_TIMEOUT + self._length / BODY_RATE
        if self.headers.get("expect", "").lower() == "100-continue" and self._unread:
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        if self._is_chunked:
            body = self._read_chunked(limit)
        else:
            body = self.rfile.read(self._length)
            if len(body) < self._length:
                raise BadRequest("the body ended after %d of %d bytes" % (len(body), self._length))
        self._unread = False
        return body

    def _read_chunked(self, limit: int) -> bytes:
        """RFC 9112 7.1, without extensions and trailers: nobody needs them, and smugglers do."""
        body = bytearray()
        while True:
            match = _CHUNK_SIZE.match(self.rfile.readline(64))
            if not match:
                raise BadRequest("a chunk size is malformed")
            size = int(match.group(1), 16)
            if len(body) + size > limit:
                raise self._too_large()
            self._reader.deadline += size / BODY_RATE
            piece = self.rfile.read(size)
            if len(piece) < size or self.rfile.readline(3) != b"\r\n":
                raise BadRequest("a chunk is malformed, or a trailer follows")
            if not size:
                return bytes(body)
            body += piece

    def _decoded(self, body: bytes) -> bytes:
        coding = self.headers.get("content-encoding", "identity").lower()
        if coding in ("identity", ""):
            return body
        if coding not in ("gzip", "x-gzip", "deflate"):
            raise BadRequest(
                f"the content coding {shorten(coding, 40)!r} is not supported; send the body plain or as gzip",
                415,
            )
        limit = self.proxy.options.max_body
        try:
            decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)
            decoded = decoder.decompress(body, limit + 1)
        except zlib.error:
            raise BadRequest(f"the body is not valid {coding}") from None
        if len(decoded) > limit:
            raise self._too_large()
        if not decoder.eof:
            raise BadRequest(f"the {coding} body is cut off")
        return decoded

    def _too_large(self) -> BadRequest:
        self.close_connection = True
        return BadRequest(
            "the body is larger than %d MiB; --max-body allows more"
            % (self.proxy.options.max_body >> 20),
            413,
            "request_too_large",
        )

    def _drop_body(self) -> None:
        """Read the small body of a request that is refused, so that its connection can be used again."""
        is_small = self._is_chunked or self._length <= SMALL_BODY
        if not self._unread or not is_small or "expect" in self.headers or self.close_connection:
            return
        self._reader.deadline = time.monotonic() + DROP_TIMEOUT
        with contextlib.suppress(BadRequest, OSError):
            if self._is_chunked:
                self._read_chunked(SMALL_BODY)
                self._unread = False
            else:
                self._unread = len(self.rfile.read(self._length)) < self._length

    def _linger(self) -> None:
        """Take in some of a body that nobody wants: closing on unread bytes would reset the answer away."""
        with contextlib.suppress(OSError, ValueError):
            self.connection.shutdown(socket.SHUT_WR)
            self._reader.deadline, rest = time.monotonic() + 2, 4_000_000
            while rest > 0:
                piece = self.rfile.read1(PIECE)
                if not piece:
                    return
                rest -= len(piece)

    # -- answering -------------------------------------------------------------------------------

    def _send(self, status: int, headers: list[tuple[str, str]], body: bytes | None) -> None:
        """Write the head and, where it is known, the body, in one go; None starts a chunked body."""
        lines = ["HTTP/1.1 %d %s" % (status, http.client.responses.get(status, "Status"))]
        lines += ["{}: {}".format(*header) for header in headers + self._cors]
        lines.append("X-Request-Id: " + self._request_id)
        if body is None:
            lines.append("Connection: close" if self._is_http_1_0 else "Transfer-Encoding: chunked")
        elif status != 204:
            lines.append("Content-Length: %d" % len(body))
        if self._unread and body is not None:
            self._drop_body()
            self.close_connection = self.close_connection or self._unread
        if body is not None and self.close_connection:
            lines.append("Connection: close")
        self._head_sent, self.status = True, status
        # One line each, whatever a header's value holds, and nothing secret in them.
        text = public(
            "\r\n".join(line if line.isprintable() else public(line) for line in lines), keep="\r\n"
        )
        head = (text + "\r\n\r\n").encode("latin-1", "replace")
        self._write(head if self.command == "HEAD" else head + (body or b""))

    def _send_json(self, status: int, value: Any, headers: Iterable[tuple[str, str]] = ()) -> None:
        self._send(status, [("Content-Type", "application/json"), *headers], encode_json(value))

    def _send_problem(self, error: ProxyError) -> None:
        """An error: as an HTTP status while that is possible, else as the last event of the stream."""
        self._note = error.message
        self._adopt_request_id(error.request_id)
        if not self._head_sent:
            return self._send_json(error.status, error.body(), error.headers)
        self.status = error.status
        self._write_pieces(self._form.problem(error))
        # the body ends as it should: the connection can be used again
        return self._write_end()

    def _adopt_request_id(self, request_id: str | None) -> None:
        """Answer with the upstream's own handle, if it fits into a header."""
        if request_id and re.match(r"[\x21-\x7e]{1,200}\Z", request_id):
            self._request_id = request_id

    def _start_stream(self, headers: Iterable[tuple[str, str]] = ()) -> None:
        if not self._head_sent:
            self._send(
                200,
                [
                    ("Content-Type", "text/event-stream; charset=utf-8"),
                    ("Cache-Control", "no-cache"),
                    *headers,
                ],
                None,
            )

    def _sign_of_life(self, routes: list[Route]) -> None:
        # The head goes out with it, so that it names who will answer where nobody else can.
        self._start_stream(
            [("x-qwen-provider", routes[0].provider.name)] if len(routes) == 1 else ()
        )
        self._write_pieces(self._form.alive())

    def _write_pieces(self, pieces: list[bytes]) -> None:
        """Whole events of a stream, each a chunk of the body, as one write."""
        if pieces:
            if not self._is_http_1_0:
                pieces = [b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces]
            self._write(b"".join(pieces))

    def _write_end(self) -> None:
        if self._is_http_1_0:
            self.close_connection = True
        else:
            self._write(b"0\r\n\r\n")

    def _write(self, data: bytes) -> None:
        send_all(self.connection, data, self._wait_to_write)

    @staticmethod
    def _wait_to_write(connection: socket.socket) -> None:
        if not writable(connection, WRITE_TIMEOUT):
            raise socket.timeout("timed out")

    # -- the API ---------------------------------------------------------------------------------

    def post_chat_completions(self) -> None:
        request = self._read_json()
        if isinstance(request, dict) and "messages" not in request and "input" in request:
            # Cursor sends the body of a Responses request here and wants chunks back
            # (forum.cursor.com #159298).
            request = {
                **to_chat_request(request, self.proxy.items, self._owner).chat,
                "stream_options": {"include_usage": True},
            }
        self._complete(CHAT, request)

    def post_completions(self) -> None:
        self._complete(TEXT, self._read_json())

    def post_responses(self) -> None:
        """The Responses API in front of and behind the one path of all completions."""
        asked = to_chat_request(self._read_json(), self.proxy.items, self._owner)
        if asked.skipped:
            log.info(
                "left out, since only OpenAI runs them: tools of type %s",
                shorten(", ".join(sorted(set(asked.skipped))), 200),
            )
        self._form = ResponseForm(
            asked,
            self.proxy.routes(asked.chat.get("model"))[0].model,
            self.proxy.items,
            self._owner,
        )
        self._complete(CHAT, asked.chat)

    def get_responses(self) -> None:
        """Codex asks for a WebSocket first and falls back at once on 426, but only after six seconds on 404."""
        if "websocket" not in self.headers.get("upgrade", "").lower():
            raise BadRequest(
                "responses are not stored here; POST to /v1/responses",
                405,
                "method_not_allowed",
                headers=[("Allow", "POST, OPTIONS")],
            )
        raise BadRequest(
            "there are no WebSockets here; POST to /v1/responses",
            426,
            "upgrade_not_supported",
            headers=[("Upgrade", "HTTP/1.1")],
        )

    def _complete(self, kind: Kind, request: Any) -> None:
        """The one path of all completions, streamed and not."""
        request = with_extra_body(request)
        kind.check(request)
        options, is_stream = self.proxy.options, request.get("stream") is True
        routes = self.proxy.routes(request.get("model"))
        watch = Watch(
            self.connection,
            options.timeout,
            options.keep_alive,
            functools.partial(self._sign_of_life, routes) if is_stream else None,
        )
        with self.proxy.running(watch):
            answer = Completion(self.proxy, kind, request, routes, watch, self._user_agent()).open()
            try:
                self._note = f"{answer.route.model} via {answer.route.provider.name}"
                self._adopt_request_id(answer.request_id)
                if is_stream:
                    self._send_stream(answer, watch)
                else:
                    self._send_json(
                        200,
                        self._form.whole(answer),
                        [("x-qwen-provider", answer.route.provider.name)],
                    )
                usage = answer.translator.usage or {}
                self._note += ", {}+{} tokens".format(
                    usage.get("prompt_tokens", "?"),
                    usage.get("completion_tokens", "?"),
                )
                answer.response.drain()
            finally:
                answer.response.close()

    def _send_stream(self, answer: Answer, watch: Watch) -> None:
        form = self._form
        self._start_stream([("x-qwen-provider", answer.route.provider.name)])
        self._write_pieces(form.start())
        for translated in answer.chunks():
            self._write_pieces(form.events(translated))
            if translated:
                watch.heard()
            else:
                watch.tick()
        self._write_pieces(form.end(answer.translator.usage))
        self._write_end()

    def post_embeddings(self) -> None:
        """All texts in batches that the model takes, a few at a time, and one answer."""
        request = self._read_json()
        texts, routes = embedding_texts(request), self.proxy.routes(request["model"])
        size = min(embedding_batch_size(route) for route in routes)
        parts = [texts[start : start + size] for start in range(0, len(texts), size)]
        watches = [Watch(self.connection, self.proxy.options.timeout) for _ in parts]
        batches = [
            EmbeddingBatch(self.proxy, request, part, watch, self._user_agent())
            for part, watch in zip(parts, watches)
        ]
        with self.proxy.running(*watches):
            fetched = fetch_batches(batches, routes, lambda: [watch.stop() for watch in watches])
        route = batches[0].route or routes[0]
        answer = embeddings_answer(route.model, fetched, request.get("encoding_format"))
        self._note = "%s via %s, %d texts, %d tokens" % (
            route.model,
            route.provider.name,
            len(texts),
            answer["usage"]["total_tokens"],
        )
        self._send_json(200, answer, [("x-qwen-provider", route.provider.name)])

    def _user_agent(self) -> str:
        """The client's own name, then ours: the Coding Plan refuses requests without one, and we pose as nobody."""
        client = self.headers.get("user-agent", "")
        if not (client.isascii() and client.isprintable()):
            client = ""
        return (client[:200] + " qwen_proxy/" + __version__).strip()

    def get_models(self) -> None:
        self._send_json(200, {"object": "list", "data": self.proxy.models()})

    def get_model(self) -> None:
        found = next(
            (model for model in self.proxy.models() if model["id"] == self._model_id), None
        )
        if found is None:
            raise BadRequest(
                f"the model {shorten(self._model_id, 100)!r} is not among those of /v1/models",
                404,
                "model_not_found",
                param="model",
            )
        self._send_json(200, found)

    def get_health(self) -> None:
        self._send_json(200, self.proxy.health())

    def get_root(self) -> None:
        key = "one of --api-key" if self.proxy.options.api_keys else "anything"
        routes = ", ".join("/v1" + path for path in ROUTES if path not in WITHOUT_KEY) + ", /health"
        text = f"qwen_proxy {__version__}: Qwen's models as an OpenAI-compatible API.\n\nBase URL: {self.proxy.url}\nAPI key: {key}\nRoutes: {routes}\n"
        self._send(200, [("Content-Type", "text/plain; charset=utf-8")], text.encode())

    # -- the log ---------------------------------------------------------------------------------

    def _log_answer(self) -> None:
        attempt = self.headers.get("x-stainless-retry-count", "0")
        log.info(
            "%s %s %d %.2fs%s%s",
            self.command or "?",
            shorten(self.path.partition("?")[0], 100) or "?",
            self.status or 499,
            time.monotonic() - self._started,
            " " + shorten(self._note, 300) if self._note else "",
            f" (the client's attempt {attempt[:4]})" if attempt != "0" else "",
        )

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


def share_one_processor() -> None:
    """Keep this thread on the processor of all connections' threads, where the system offers that.

    CPython's lock lets only one of them run at a time. Spread over processors they hand it across, and
    sleep for it, at every system call: 16 clients cost 560 us a request and got 1600 a second; on one
    processor it is 370 us and 2600 a second, measured here. Other threads of the process stay free.
    """
    if not hasattr(os, "sched_setaffinity") or not getattr(sys, "_is_gil_enabled", lambda: True)():
        return
    with contextlib.suppress(OSError):
        processors = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {processors[os.getpid() % len(processors)]})


class Listener(http.server.ThreadingHTTPServer):
    """One listening socket; each connection has its thread."""

    daemon_threads = True
    request_queue_size = 1024
    # there it would let two programs share the port
    allow_reuse_address = os.name != "nt"
    # shutdown() takes that long at most
    poll_interval = 0.5

    def __init__(self, address: tuple[str, int], proxy: ProxyServer):
        self.proxy, self.address_family = (
            proxy,
            socket.AF_INET6 if ":" in address[0] else socket.AF_INET,
        )
        self._turned_away = threading.Semaphore(TURNED_AWAY)
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Bind without http.server's look-up of the machine's full name, which may take seconds."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        if self.allow_reuse_address:
            self.socket.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        self.socket.bind(self.server_address)
        self.server_address = self.socket.getsockname()
        self.server_name, self.server_port = self.server_address[0], self.server_address[1]

    def process_request(self, request: Any, client_address: Any) -> None:
        """A thread for the connection, or 503 when there are too many."""
        if len(self.proxy.handlers) < self.proxy.options.max_connections:
            return super().process_request(request, client_address)
        log.warning(
            "more than %d connections; one was turned away", self.proxy.options.max_connections
        )
        if self._turned_away.acquire(blocking=False):
            threading.Thread(target=self._turn_away, args=(request,), daemon=True).start()
        else:
            self.shutdown_request(request)
        return None

    def _turn_away(self, request: Any) -> None:
        try:
            body = encode_json(
                ProxyError(
                    "too many connections; try again in a moment",
                    503,
                    "too_many_connections",
                    "server_error",
                ).body()
            )
            with contextlib.suppress(OSError):
                request.settimeout(0.5)
                request.sendall(
                    b"HTTP/1.1 503 Service Unavailable\r\nContent-Type: application/json\r\n"
                    b"Retry-After: 1\r\nConnection: close\r\nContent-Length: %d\r\n\r\n%s"
                    % (len(body), body)
                )
                request.recv(
                    PIECE
                    # its request: closing on unread bytes would reset our answer away
                )
            self.shutdown_request(request)
        finally:
            self._turned_away.release()

    def process_request_thread(self, request: Any, client_address: Any) -> None:
        share_one_processor()
        super().process_request_thread(request, client_address)

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.error("a connection ended in %s", shorten(repr(sys.exc_info()[1]), 200))


class ProxyServer:
    """The running proxy: its listeners, and what the handlers share. See make_server()."""

    def __init__(self, catalogue: Catalogue, options: ServerOptions):
        self.catalogue, self.options, self.upstream = catalogue, options, Upstream()
        self.access, self.is_stopping = AccessPolicy(options), False
        self.handlers: set[Handler] = set()
        self.items = ItemMemory()
        for warning in self.access.warnings():
            log.warning("%s", warning)
        self._watches: set = set()
        self._lists = ModelLists(self.upstream)
        self._stopped = threading.Event()
        self._started, self._is_serving = time.time(), False
        self._listeners = self._listen()

    @property
    def port(self) -> int:
        """The port it listens on, also after --port 0."""
        return self._listeners[0].server_port

    @property
    def url(self) -> str:
        """The base URL for clients."""
        host = (
            "localhost"
            if self.options.host in ("localhost", "0.0.0.0", "::", "")
            else self.options.host
        )
        return "http://%s:%d/v1" % (f"[{host}]" if ":" in host else host, self.port)

    def _listen(self) -> list[Listener]:
        """One listener, or for localhost two: Node resolves that to ::1 first. Raises OSError."""
        if self.options.host != "localhost":
            return [Listener((self.options.host, self.options.port), self)]
        first = Listener(("127.0.0.1", self.options.port), self)
        try:
            return [first, Listener(("::1", first.server_port), self)]
        except OSError as error:
            # EADDRINUSE: Node would reach that other program
            if error.errno in (48, 98, 10048):
                first.server_close()
                if self.options.port:
                    raise
                return self._listen()
            return [first]

    def serve_forever(self) -> None:
        """Serve until shutdown() is called from another thread."""
        self._is_serving = True
        for listener in self._listeners[1:]:
            threading.Thread(
                target=listener.serve_forever, args=(listener.poll_interval,), daemon=True
            ).start()
        try:
            self._listeners[0].serve_forever(self._listeners[0].poll_interval)
        except BaseException:
            # Ctrl-C in a program that vendors this file
            self.shutdown()
            raise
        self._stopped.wait()

    def shutdown(self, grace: float | None = None) -> None:
        """Accept no more, let running answers end, tell the rest, close the ports: all within `grace` seconds."""
        self.is_stopping = True
        end = time.monotonic() + (self.options.grace if grace is None else grace)
        for listener in self._listeners:
            if self._is_serving:
                listener.shutdown()
            listener.server_close()
        for handler in [handler for handler in list(self.handlers) if not handler.is_busy]:
            with contextlib.suppress(OSError):
                handler.connection.shutdown(socket.SHUT_RDWR)
        self._wait_until_idle(end - LAST_WORDS)
        for watch in list(self._watches):
            watch.stop()
        self._wait_until_idle(max(end, time.monotonic() + LAST_WORDS) - LAST_WORDS / 2)
        self.upstream.close()
        LockFile.release_all()
        self._stopped.set()

    def _wait_until_idle(self, end: float) -> None:
        while time.monotonic() < end and any(handler.is_busy for handler in list(self.handlers)):
            time.sleep(0.02)

    @contextlib.contextmanager
    def running(self, *watches: Watch) -> Iterator[None]:
        """Counts an answer as running, with all that it waits for."""
        self._watches.update(watches)
        try:
            yield
        finally:
            self._watches.difference_update(watches)

    def models(self, seconds: float = MODELS_WAIT) -> list[dict]:
        """The objects of /v1/models, the active provider's first, after waiting at most that long for live lists.

        An id belongs to the first provider whose settings list it. Of the other providers, what only the
        live list names is there as `provider/model`: no request moves to another key without being told.
        """
        lists = self._lists.get(self.catalogue.current().providers, seconds)
        listing = self.catalogue.serving(lists).listing()
        return [self._model_object(name, route.model, route.provider) for name, route in listing]

    def routes(self, model: Any) -> list[Route]:
        """Where a model can be had, by the same list; it is asked for if all that is known leads to a problem."""
        providers = self.catalogue.current().providers
        routes = self.catalogue.routes(model, self._lists.get(providers, 0))
        if routes[0].provider.problem() and routes[0].provider is not providers[0]:
            routes = self.catalogue.routes(model, self._lists.get(providers, MODELS_WAIT))
        return routes

    def _model_object(self, name: str, model: str, provider: Provider) -> dict:
        facts, config = model_facts(model), provider.entries.get(model) or {}
        limits = {
            "context_length": config.get("contextWindowSize") or facts.context,
            "max_output_tokens": facts.output,
        }
        return {
            "id": name,
            "object": "model",
            "created": int(self._started),
            "owned_by": provider.name,
            **{key: value for key, value in limits.items() if value},
        }

    def health(self) -> dict:
        """The object of /health; nothing secret."""
        providers = self.catalogue.current().providers
        login = (
            providers[0].credentials.describe()
            if providers
            else {"type": None, "problem": "no login found"}
        )
        is_usable = bool(providers) and providers[0].problem() is None
        return {
            "status": "ok" if is_usable else "no_login",
            "version": __version__,
            "uptime_seconds": int(time.time() - self._started),
            "in_flight": len(self._watches),
            "login": {name: login.get(name) for name in ("type", "expires_at") if name in login},
        }


def make_server(
    host: str = "localhost",
    port: int = 8080,
    *,
    api_keys: Iterable[str] = (),
    no_auth: bool = False,
    allow_origins: Iterable[str] = (),
    allow_hosts: Iterable[str] = (),
    provider: str | None = None,
    base_url: str | None = None,
    model: str | None = None,
    aliases: dict[str, str] | None = None,
    failover: bool = False,
    qwen_home: str | None = None,
    timeout: float = UPSTREAM_TIMEOUT,
    retries: int = RETRIES,
    max_connections: int = MAX_CONNECTIONS,
    max_body_mib: int = MAX_BODY_MIB,
    keep_alive: float = KEEP_ALIVE_INTERVAL,
    grace: float = GRACE,
    environ: dict[str, str] | None = None,
) -> ProxyServer:
    """A server that is bound to its port and not yet running; the arguments are the options of `serve`.

    environ stands in for os.environ. Raises ValueError for a key that is none, or a host beyond loopback
    without a key; OSError when the port is taken.
    """
    options = ServerOptions(
        host,
        port,
        checked_keys(api_keys),
        no_auth,
        tuple(listed(allow_origins)),
        tuple(listed(allow_hosts)),
        timeout,
        retries,
        max_connections,
        max_body_mib * 1024 * 1024,
        keep_alive,
        grace,
    )
    AccessPolicy(options)
    catalogue = Catalogue(
        Options(provider, base_url, model, tuple((aliases or {}).items()), qwen_home, failover),
        environ,
    )
    return ProxyServer(catalogue, options)


# ------------------------------------------------------------------------------------------------
# Demo upstream
# ------------------------------------------------------------------------------------------------

DEMO_MODEL = "qwen-demo"
# between chunks: about the pace of a model
DEMO_PAUSE = 0.03


class DemoUpstream(http.server.BaseHTTPRequestHandler):
    """Stands in for Qwen's endpoint, so that every client can be tried without an account."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def do_GET(self) -> None:
        self._send_json(
            200,
            {
                "object": "list",
                "data": [{"id": DEMO_MODEL, "object": "model", "created": 1, "owned_by": "demo"}],
            },
        )

    def do_POST(self) -> None:
        """A chunk at a time, as a model would; a tool call where tools are offered."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.endswith("/chat/completions"):
            return self._send_json(
                404, {"error": {"message": "the demo answers chat only", "code": "not_in_demo"}}
            )
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        for data in demo_stream(request):
            event = encode_event(data)
            self.wfile.write(b"%x\r\n%s\r\n" % (len(event), event))
            time.sleep(DEMO_PAUSE)
        self.wfile.write(b"0\r\n\r\n")
        return None

    def _send_json(self, status: int, value: Any) -> None:
        body = encode_json(value)
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)


def demo_stream(request: dict) -> Iterator[bytes]:
    """The data of each event of an answer: some thoughts, then a tool call if tools are offered, else text."""
    tail, answered = (
        {"finish_reason": "stop"},
        any(message["role"] == "tool" for message in request["messages"]),
    )
    yield demo_chunk({"role": "assistant", "content": ""})
    for word in [
        "The",
        "user",
        "tries",
        "the",
        "demo,",
        "so",
        "I",
        "say",
        "that",
        "I",
        "am",
        "one.",
    ]:
        yield demo_chunk({"reasoning_content": word + " "})
    if request.get("tools") and not answered:
        function = request["tools"][0].get("function", {})
        arguments = json.dumps(demo_arguments(function.get("parameters", {})))
        yield demo_chunk(
            {
                "tool_calls": [
                    {
                        "index": 0,
                        "id": "call_demo",
                        "type": "function",
                        "function": {"name": function.get("name", "tool"), "arguments": ""},
                    }
                ]
            }
        )
        for start in range(0, len(arguments), 8):
            yield demo_chunk(
                {
                    "tool_calls": [
                        {
                            "index": 0,
                            "id": "",
                            "function": {"arguments": arguments[start : start + 8]},
                        }
                    ]
                }
            )
        tail = {"finish_reason": "tool_calls"}
    else:
        asked = text_of(request["messages"][-1].get("content"))[:200]
        said = "The tool answered" if answered else "You said"
        text = f"This is the demo of qwen_proxy, not a model. {said}: {asked}"
        for word in re.findall(r"\S+\s*", text):
            yield demo_chunk({"content": word})
    yield demo_chunk({}, **tail)
    size = len(json.dumps(request["messages"])) // 4
    yield demo_chunk(
        None, usage={"prompt_tokens": size, "completion_tokens": 40, "total_tokens": size + 40}
    )
    yield DONE


def demo_chunk(
    delta: dict | None, finish_reason: str | None = None, usage: dict | None = None
) -> bytes:
    """One chunk of the demo's answer."""
    choices = (
        [] if delta is None else [{"index": 0, "delta": delta, "finish_reason": finish_reason}]
    )
    return encode_json(
        {
            "id": "chatcmpl-demo",
            "object": "chat.completion.chunk",
            "created": int(time.time()),
            "model": DEMO_MODEL,
            "choices": choices,
            "usage": usage,
        }
    )


def demo_arguments(schema: dict) -> dict:
    """Arguments that fit a tool's parameters, as far as a demo needs it."""
    samples = {
        "string": "demo",
        "integer": 1,
        "number": 1.5,
        "boolean": True,
        "array": [],
        "object": {},
    }
    properties = schema.get("properties") if isinstance(schema.get("properties"), dict) else {}
    return {
        name: dig(part, "enum")[0]
        if dig(part, "enum")
        else samples.get(str(dig(part, "type")), "demo")
        for name, part in properties.items()
        if name in schema.get("required", properties)
    }


class DemoServer(http.server.ThreadingHTTPServer):
    """Runs the stand-in; that the proxy leaves in the middle of an answer is no error."""

    daemon_threads = True

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("demo: %s", sys.exc_info()[1])


def start_demo() -> str:
    """Start the stand-in on a free port of loopback; returns its base URL."""
    server = DemoServer(("127.0.0.1", 0), DemoUpstream)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return "http://127.0.0.1:%d/compatible-mode/v1" % server.server_port


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------


def build_parser() -> argparse.ArgumentParser:
    """The parser for all commands; `serve` is the default one."""
    parser = argparse.ArgumentParser(
        prog="qwen_proxy.py",
        usage="qwen_proxy.py [serve|login|status] [options]",
        description="Serve Qwen's models as an OpenAI-compatible API on localhost, with the login of the Qwen Code "
        "CLI.",
        formatter_class=lambda prog: argparse.HelpFormatter(prog, max_help_position=30, width=100),
    )
    parser.add_argument("--version", action="version", version="qwen_proxy " + __version__)
    add_serve_options(parser.add_argument_group("serve"))
    login = parser.add_argument_group("login and status")
    login.add_argument("--no-browser", action="store_true", help="login: print the address only")
    login.add_argument("--json", action="store_true", help="status: print JSON")
    return parser


def add_serve_options(group: Any) -> None:
    """One option a line; the README holds what --help prints."""
    add = group.add_argument
    add(
        "--host",
        default="localhost",
        help="where to listen (default: localhost, that is 127.0.0.1 and ::1)",
    )
    add("--port", type=int, default=8080, help="0 picks a free one (default: 8080)")
    add(
        "--api-key",
        action="append",
        default=[],
        metavar="KEY",
        help="what clients must present; may be repeated; also QWEN_PROXY_API_KEYS=KEY,KEY",
    )
    add("--no-auth", action="store_true", help="listen beyond localhost without a key")
    add(
        "--allow-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help="web pages that may use it, besides local ones; may be repeated; * for all",
    )
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="another name that the Host header may carry",
    )
    add(
        "--provider",
        metavar="NAME",
        help="instead of the CLI's active one: {}, oauth, or a host from settings.json".format(
            ", ".join(PRESETS)
        ),
    )
    add(
        "--base-url",
        metavar="URL",
        help="any OpenAI-compatible upstream, with the key in OPENAI_API_KEY",
    )
    add(
        "--model",
        metavar="ID",
        help="for requests that name none (default: the CLI's; also OPENAI_MODEL)",
    )
    add(
        "--alias",
        action="append",
        default=[],
        metavar="NAME=ID",
        help="another name for a model; gpt-*=ID is possible",
    )
    add(
        "--failover",
        action="store_true",
        help="when a provider is exhausted or down, try the next that lists the model",
    )
    add("--qwen-home", metavar="DIR", help="the CLI's folder (default: ~/.qwen; also QWEN_HOME)")
    add(
        "--timeout",
        type=float,
        default=UPSTREAM_TIMEOUT,
        metavar="SECONDS",
        help="longest silence of the upstream (default: 300)",
    )
    add(
        "--retries",
        type=int,
        default=RETRIES,
        metavar="N",
        help="before the first byte of an answer only (default: 2)",
    )
    add(
        "--max-connections",
        type=int,
        default=MAX_CONNECTIONS,
        metavar="N",
        help="the next one gets 503 (default: 1024)",
    )
    add(
        "--max-body",
        type=int,
        default=MAX_BODY_MIB,
        metavar="MIB",
        help="largest request (default: 64)",
    )
    add(
        "--grace",
        type=float,
        default=GRACE,
        metavar="SECONDS",
        help="from the first signal to the end, for running answers (default: 8)",
    )
    add(
        "--log-level",
        default="info",
        choices=["debug", "info", "warning", "error"],
        help="debug shows requests and answers, secrets masked (default: info)",
    )
    add(
        "--demo",
        action="store_true",
        help="a built-in stand-in answers instead of Qwen: no account needed",
    )


COMMANDS = ("serve", "login", "status")


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 when it failed, 2 when it could not start."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "serve"
    parser = build_parser()
    options = parser.parse_args(arguments)
    check_options(parser, options)
    with logged_to(sys.stderr, options.log_level.upper()), ended_by_signals():
        try:
            return {"serve": cmd_serve, "login": cmd_login, "status": cmd_status}[command](options)
        except KeyboardInterrupt:
            say("stopped")
            return 130


class LogQueue(logging.handlers.QueueHandler):
    """Hands lines to the thread that writes them; what does not fit is lost, since no request waits for a terminal."""

    def enqueue(self, record: logging.LogRecord) -> None:
        """Queue a record, if there is room."""
        with contextlib.suppress(queue.Full):
            self.queue.put_nowait(record)  # type: ignore[union-attr]

    def flush(self) -> None:
        """Wait until all is written, but no more than a second: a terminal may take nothing."""
        end = time.monotonic() + 1
        while self.queue.unfinished_tasks and time.monotonic() < end:  # type: ignore[union-attr]
            time.sleep(0.005)


@contextlib.contextmanager
def logged_to(stream: Any, level: str) -> Iterator[None]:
    """Writes the log to a stream from a thread of its own; whatever ends the program, the last lines too."""
    writer = logging.StreamHandler(stream)
    writer.setFormatter(logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%H:%M:%S"))
    handler = LogQueue(queue.Queue(LOG_MOST))  # type: ignore[arg-type]
    listener = logging.handlers.QueueListener(handler.queue, writer)
    root = logging.getLogger()
    before = root.level
    root.addHandler(handler)
    root.setLevel(level)
    listener.start()
    try:
        yield
    finally:
        handler.flush()
        root.removeHandler(handler)
        root.setLevel(before)
        if not handler.queue.unfinished_tasks:  # type: ignore[union-attr]
            listener.stop()


@contextlib.contextmanager
def ended_by_signals() -> Iterator[None]:
    """SIGTERM, SIGHUP and SIGBREAK end a command as Ctrl-C does, so that the CLI's lock does not stay behind."""

    def stop(number: int, frame: Any) -> None:
        raise KeyboardInterrupt

    with signal_handlers(stop):
        yield


@contextlib.contextmanager
def signal_handlers(stop: Callable[[int, Any], None]) -> Iterator[None]:
    """stop() for every signal that asks a program to end; one that is ignored, as by nohup, stays so."""
    numbers = [
        getattr(signal, name)
        for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
        if hasattr(signal, name)
    ]
    if threading.current_thread() is not threading.main_thread():
        numbers = []
    before = {number: signal.getsignal(number) for number in numbers}
    for number in numbers:
        if before[number] is not signal.SIG_IGN:
            signal.signal(number, stop)
    try:
        yield
    finally:
        for number in numbers:
            signal.signal(number, before[number] or signal.SIG_DFL)


def check_options(parser: argparse.ArgumentParser, options: Any) -> None:
    """Ends the program with a sentence and exit code 2 for a value that cannot be meant."""
    if not 0 <= options.port <= 65535:
        parser.error("--port must be between 0 and 65535")
    for name in ("timeout", "max_connections", "max_body", "grace"):
        if not getattr(options, name) > 0:
            parser.error("--{} must be more than 0".format(name.replace("_", "-")))
    if options.retries < 0:
        parser.error("--retries must not be negative")
    for alias in options.alias:
        if not all(alias.partition("=")):
            parser.error(f"--alias must be NAME=ID, not {alias!r}")
    fault = base_url_fault(options.base_url) if options.base_url else ""
    if fault:
        parser.error(f"--base-url {fault}; the key is read from OPENAI_API_KEY")


def say(*lines: str) -> None:
    """Lines for the person at the terminal; each stays one line, whatever it holds."""
    print("\n".join(map(public, lines)), file=sys.stderr, flush=True)


def provider_options(options: Any) -> dict:
    """The options that say which provider to use, as make_server() takes them."""
    return {
        "provider": options.provider,
        "base_url": options.base_url,
        "model": options.model,
        "qwen_home": options.qwen_home,
        "aliases": dict(alias.split("=", 1) for alias in options.alias),
        "failover": options.failover,
    }


def server_for(options: Any, keys: list[str]) -> ProxyServer:
    """The server that the options describe; raises what make_server() raises."""
    choice, environ = provider_options(options), None
    if options.demo:
        nowhere = os.path.join(tempfile.gettempdir(), "qwen_proxy-demo-" + secrets.token_hex(8))
        choice.update(
            base_url=start_demo(),
            provider=None,
            model=options.model or DEMO_MODEL,
            qwen_home=nowhere,
        )
        environ = {"OPENAI_API_KEY": "demo", "HOME": nowhere}
    return make_server(
        options.host,
        options.port,
        api_keys=keys,
        no_auth=options.no_auth,
        allow_origins=options.allow_origin,
        allow_hosts=options.allow_host,
        timeout=options.timeout,
        retries=options.retries,
        max_connections=options.max_connections,
        max_body_mib=options.max_body,
        grace=options.grace,
        environ=environ,
        **choice,
    )


def cmd_serve(options: Any) -> int:
    """Serve until a signal; running answers get some seconds then, a second signal ends at once."""
    try:
        keys = checked_keys(options.api_key)
        if "QWEN_PROXY_API_KEYS" in os.environ:
            keys += checked_keys(
                os.environ["QWEN_PROXY_API_KEYS"].split(","), "QWEN_PROXY_API_KEYS"
            )
        server = server_for(options, list(keys))
    except ValueError as error:
        say(str(error))
        return 2
    except OSError as error:
        say(
            "cannot listen on %s port %d: %s; choose another --port, or 0 for a free one"
            % (options.host, options.port, reason_of(error))
        )
        return 2
    with signal_handlers(functools.partial(stop_serving, server)):
        tune_process()
        say(*banner(server, options.demo, bool(keys)))
        server.serve_forever()
    if not last_words("stopped"):
        # the interpreter would wait for stderr at its end
        os._exit(0)
    return 0


def stop_serving(server: ProxyServer, number: int, frame: Any) -> None:
    """The first signal stops gently, the second one at once."""
    if server.is_stopping:
        LockFile.release_all()
        last_words("stopped at once")
        os._exit(1)
    server.is_stopping = True
    threading.Thread(target=server.shutdown).start()
    last_words(
        f"stopping within {server.options.grace:g} s, for running answers; a second signal ends at once"
    )


def last_words(text: str) -> bool:
    """Say it, and the log before it, within a second; False where nobody reads stderr and waiting would never end."""

    def speak() -> None:
        for handler in logging.getLogger().handlers:
            handler.flush()
        say(text)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    thread.join(1)
    return not thread.is_alive()


def tune_process() -> None:
    """What serves many streams better than Python's defaults; only here, where the process is ours.

    The collector need not look at modules, nor so often: 15 % of a small request, measured here. A stream
    takes two descriptors, and the usual soft limit of 1024 ends at 500 streams.
    """
    sys.setswitchinterval(SWITCH_INTERVAL)
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = (
        # no log line shows them,
        False
    )
    logging._srcfile = None  # type: ignore[attr-defined]    # nor who called; Python's Logging HOWTO, Optimization
    gc.freeze()
    gc.set_threshold(GC_THRESHOLD, 20, 20)
    with contextlib.suppress(ImportError, OSError, ValueError):
        # not on Windows
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        wanted = (
            4 * MAX_CONNECTIONS
            if hard == resource.RLIM_INFINITY
            else min(hard, 4 * MAX_CONNECTIONS)
        )
        if soft != resource.RLIM_INFINITY and soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def banner(server: ProxyServer, is_demo: bool, has_keys: bool) -> list[str]:
    """The lines with what a newcomer needs next."""
    discovery = server.catalogue.current()
    lines = [f"qwen_proxy {__version__} on {server.url}"]
    if is_demo:
        lines.append("provider  the built-in demo: no model, no account, no network")
    elif discovery.providers:
        active = discovery.providers[0]
        lines.append(f"provider  {active.name}, from {active.source}")
        if active.problem():
            lines.append(f"warning   {active.problem()}")
        elif active.credentials.kind == "oauth":
            lines.append("note      " + FREE_TIER_ENDED)
    elif discovery.problem:
        lines.append("warning   " + discovery.problem)
    else:
        lines.append(
            f"warning   no Qwen login on this machine: {LOGIN_AGAIN}, or start with --provider NAME and its key in the "
            "environment; until then requests get 401"
        )
    lines += ["note      " + note for note in discovery.notes]
    models = [model["id"] for model in server.models(0)]
    lines.append(
        "models    {}{}".format(
            ", ".join(models[:12]) or "unknown until there is a login",
            ", ..." if len(models) > 12 else "",
        )
    )
    key = "-H 'Authorization: Bearer YOUR_KEY' " if has_keys else ""
    body = json.dumps(
        {"model": discovery.model, "messages": [{"role": "user", "content": "Hello"}]}
    )
    lines.append(
        f"try       curl {server.url}/chat/completions {key}-H 'Content-Type: application/json' -d '{body}'"
    )
    return lines


def cmd_login(options: Any) -> int:
    """Device authorization in the browser; writes oauth_creds.json."""
    # here, since it costs every start 10 ms
    import webbrowser

    home = qwen_home(dict(os.environ), options.qwen_home)
    base, path = (
        CliSettings(home, dict(os.environ), home).oauth_base_url(),
        os.path.join(home, "oauth_creds.json"),
    )
    say(f"Note: {FREE_TIER_ENDED}.", "")
    try:
        device = request_device_code(base)
        say(
            f"Open this address and approve the log-in, within {device.expires_in / 60:.0f} minutes:",
            "",
            f"    {device.verification_uri}",
            "",
        )
        if device.user_code:
            say(f"The code it shows must be {device.user_code}.")
        if not options.no_browser:
            webbrowser.open(device.verification_uri)
        login = poll_for_login(base, device)
    except ProxyError as error:
        say("login failed: " + error.message)
        return 1
    credentials = OAuthCredentials(path, base)
    credentials.replace(login)
    if credentials.problem:
        say(f"logged in, but {path} cannot be written: {credentials.problem}")
        return 1
    say(
        f"Logged in; {path} holds the login, valid until it is refreshed {in_words(login.expires_at - time.time())}."
    )
    return 0


def in_words(seconds: float) -> str:
    """A span of time for a person.

    >>> in_words(3 * 3600 + 61), in_words(-90)
    ('in 3 h 1 min', '1 min ago')
    """
    minutes = int(abs(seconds)) // 60
    days, hours, minutes = minutes // 1440, minutes % 1440 // 60, minutes % 60
    words = (
        "%d d %d h" % (days, hours)
        if days
        else "%d h %d min" % (hours, minutes)
        if hours
        else "%d min" % minutes
    )
    return "in " + words if seconds >= 0 else words + " ago"


def cmd_status(options: Any) -> int:
    """Say what would be used; 0 only when a request could be served. Spends no quota."""
    choice = provider_options(options)
    try:
        catalogue = Catalogue(
            Options(
                choice["provider"], choice["base_url"], choice["model"], (), choice["qwen_home"]
            )
        )
    except ValueError as error:
        say(str(error))
        return 2
    facts = status_facts(catalogue, options.port)
    if options.json:
        print(public(json.dumps(facts, indent=2, ensure_ascii=False), keep="\n"))
    else:
        for name, value in facts.items():
            for index, line in enumerate(value if isinstance(value, list) else [value]):
                label = "" if index else name.replace("_", " ")
                print(public(f"{label:13} {line if isinstance(line, str) else json.dumps(line)}"))
    return 0 if facts["usable"] else 1


def status_facts(catalogue: Catalogue, port: int) -> dict:
    """What `status` prints, in its order."""
    discovery = catalogue.current()
    active = discovery.providers[0] if discovery.providers else None
    problem = (
        active.problem()
        if active
        else discovery.problem or f"no Qwen login on this machine: {LOGIN_AGAIN}"
    )
    facts: dict = {
        "version": __version__,
        "usable": problem is None,
        "problem": problem,
        "qwen_home": catalogue.home,
        "settings": discovery.settings_files,
        "notes": discovery.notes,
    }
    if active:
        described = active.describe()
        facts.update(
            provider=active.name,
            found_in=active.source,
            base_url=described["base_url"],
            family=active.family,
            models=[", ".join(described["models"]) or "whatever the upstream lists"],
            model=discovery.model,
        )
        facts["also_usable"] = [
            "{} ({})".format(other.name, other.problem() or "ready")
            for other in discovery.providers[1:]
        ]
        if active.credentials.kind == "oauth":
            facts.update(oauth_facts(active.credentials))
        if described["base_url"]:
            facts["clock"] = clock_words(described["base_url"])
    facts["forward_proxy"] = [
        "{}: {}".format(*item) for item in sorted(forward_proxies().items())
    ] or ["none"]
    facts["client"] = [
        "base URL http://localhost:%d/v1" % (port or 8080),
        "API key  anything, unless --api-key is given",
        f"model    {discovery.model}",
    ]
    return {name: value for name, value in facts.items() if value not in (None, [])}


def oauth_facts(credentials: OAuthCredentials) -> dict:
    """File, expiry, permissions and lock of an OAuth login, in words."""
    facts = {
        "login": "OAuth, " + credentials.path,
        "free_tier": f"ended on {FREE_TIER_END}: log-in works, chat answers 401",
    }
    with contextlib.suppress(CredentialError):
        left = credentials.login().expires_at - time.time()
        facts["expires"] = in_words(left) + (
            "" if left > REFRESH_MARGIN else ", refreshed at the next request"
        )
    with contextlib.suppress(OSError):
        mode = stat.S_IMODE(os.stat(credentials.path).st_mode)
        facts["permissions"] = "{:03o}{}".format(
            mode,
            ""
            if not mode & 0o077 or os.name == "nt"
            else ", others can read it: chmod 600 " + credentials.path,
        )
    try:
        age = (
            time.time()
            - os.stat(os.path.join(os.path.dirname(credentials.path), "oauth_creds.lock")).st_mtime
        )
        facts["lock"] = "held for %d s%s" % (
            age,
            ", stale: the next refresh breaks it" if age > LOCK_STALE else "",
        )
    except OSError:
        facts["lock"] = "free"
    return facts


def clock_words(base_url: str) -> str:
    """How this clock differs from the upstream's, by the Date of an answer to a request without a key."""
    host = host_of(base_url, with_port=True)
    try:
        request = urllib.request.Request(
            urllib.parse.urljoin(base_url, "/"),
            method="HEAD",
            headers={"User-Agent": "qwen_proxy/" + __version__},
        )
        with open_before(request, STATUS_TIMEOUT) as response:
            date = response.headers.get("Date")
        skew = time.time() - parsedate_to_datetime(date).timestamp()
    except (OSError, http.client.HTTPException, TypeError, ValueError) as error:
        reason = reason_of(error) if isinstance(error, OSError) else "no Date header"
        return f"unknown: {host} gave no time ({reason})"
    if abs(skew) < 10:
        return "right"
    return "%d s %s, so tokens expire at the wrong moment" % (
        abs(skew),
        "fast" if skew > 0 else "slow",
    )


if __name__ == "__main__":
    sys.exit(main())
