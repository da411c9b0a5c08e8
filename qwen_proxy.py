#!/usr/bin/env python3
"""Qwen for every OpenAI client: one file, standard library only.

The login that the Qwen Code CLI keeps on this machine becomes an OpenAI-compatible API:

    python3 qwen_proxy.py --port 8080      then use http://localhost:8080/v1 with any key; a
                                           browser shows state and usage at http://localhost:8080
    python3 qwen_proxy.py --demo           a built-in stand-in answers, no account needed
    python3 qwen_proxy.py login            log in with the browser (writes oauth_creds.json)
    python3 qwen_proxy.py status           what would happen to a request now, and why
    python3 qwen_proxy.py usage            what was used: requests and tokens by day and plan window

What it touches
    reads     ~/.qwen/oauth_creds*.json, settings.json, trustedFolders.json and .env (QWEN_HOME
              moves them), ~/.env, the system settings of Qwen Code, .qwen/settings.json of a
              trusted working directory and the nearest .env in it or above
    writes    ~/.qwen/oauth_creds.json (mode 0600) after a log-in and when the access token is
              refreshed, and meanwhile ~/.qwen/oauth_creds.lock and a temporary file beside it;
              counts of what was used, ~/.qwen/qwen_proxy.sqlite3 with SQLite's own two files
              beside it (mode 0600; --usage-file moves it, --no-usage: none); nothing else
    connects  to chat.qwen.ai for log-in and refresh, and to the base URLs of the providers in use,
              over the forward proxy of the settings or environment if there is one
    listens   on 127.0.0.1 and ::1, port 8080, unless told otherwise

What it never does: telemetry, update checks, prompts on disk, running tools for the model, trying a
key at a host that it was not issued for, posing as another client, deleting a file of yours.

Start reading at Handler.serve, which is the life of a request:

    check_access        Host and Origin: 'Server'
    find_api            the key, and the class for the route: ChatRouteApi, TextApi, EmbeddingsApi,
                        ResponsesApi
    api.check           the body, as far as no upstream could make sense of it
    targets             provider and model, from the CLI's files: 'Providers'
    call.open           access token ('Credentials'), the request in Qwen's dialect ('Requests'),
                        repair, retry and failover, all before the first byte: 'Upstream'
    relay               bytes to events ('Event streams') to clean chunks ('Answers') to the
                        client; one thread does that for all answers: StreamLoop
    proxy.note          the log line and the counts: 'Ledger'

Each section uses only those above it; 'Event streams' to 'Responses API' do no I/O.

To vendor it, copy the file. Importing it starts nothing:

    import qwen_proxy
    with qwen_proxy.make_server(port=0) as server:   # arguments: see make_server
        print(server.url)                            # http://localhost:PORT/v1
"""

# An older Python stops at the first line that it cannot read, and shows it: these.
from __future__ import annotations  # qwen_proxy.py needs Python 3.8 or newer

import argparse
import atexit
import base64
import bisect
import collections
import concurrent.futures
import contextlib
import copy
import errno
import fnmatch
import functools
import gc
import hashlib
import html
import http.client
import http.server
import io
import ipaddress
import itertools
import json
import logging
import operator
import os
import queue
import random
import re
import secrets
import selectors
import signal
import socket
import socketserver
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
import zlib
from email.utils import formatdate, parsedate_to_datetime
from typing import AbstractSet, Any, Callable, Dict, Iterable, Iterator, Mapping, NamedTuple, Tuple

__version__: str = "1.0.0"  # qwen_proxy.py needs Python 3.8 or newer
__all__ = ["make_server", "ProxyServer", "ProxyError", "CredentialError", "UpstreamError", "main"]

log = logging.getLogger("qwen_proxy")

Json = Dict[str, Any]


# ------------------------------------------------------------------------------------------------
# Constants
# ------------------------------------------------------------------------------------------------
# Times are seconds and sizes are bytes unless the name says otherwise; no other section names a
# host. A limit that only one class has is that class's attribute, as in http.server.

# OAuth of the Qwen Code CLI: device authorization (RFC 8628) with PKCE (RFC 7636), public client.
# Qwen Code, packages/core/src/qwen/qwenOAuth2.ts.
OAUTH_BASE_URL = "https://chat.qwen.ai"
TOKEN_PATH = "/api/v1/oauth2/token"
CLIENT_ID = "f0304373b74a44d2b584a3fb70ca9e56"
# Where a login that names no resource_url is served.
PORTAL_RESOURCE_URL = "portal.qwen.ai"
# The one model id that an OAuth login serves.
OAUTH_MODEL = "coder-model"
# QwenLM/qwen-code PR #3291
FREE_TIER_END = "2026-04-15"
# Qwen Code 0.24.4, when nothing else names a model.
DEFAULT_MODEL = "qwen3.7-max"

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
# The hosts of Model Studio's workspaces, beside the shared ones above, which are the older way.
# Alibaba, 'Base URL overview', 2026-10-11.
WORKSPACE_HOST = re.compile(r"[\w-]+\.[\w-]+\.maas\.aliyuncs\.com\Z")


class Family(NamedTuple):
    """A kind of endpoint: how it is recognised, and all that is known of it.

    hosts: pattern of its host names; variable: of its key, which tells the family of an unknown
    host; traits: what the rules of 'Requests' look at; has_list: whether it is asked for its
    models; models: what it serves, where its list cannot be had; lacks: paths that it does not
    have, and the way out; advice: what to do about an error code.
    """

    name: str
    hosts: str = r"(?!)"
    variable: str = ""
    traits: frozenset[str] = frozenset()
    has_list: bool = True
    models: tuple[str, ...] = ()
    # For requests that name none, where nothing else does.
    default_model: str = DEFAULT_MODEL
    # Models that think whatever they are told.
    always_thinks: str = ""
    lacks: Mapping[str, str] = {}
    advice: Mapping[str, str] = {}


# The first match of the host counts, then the key's variable; a path with /compatible-mode/ is
# DashScope's (a company gateway, a fake). Traits: 'alibaba'; 'qwen', its words for thinking are
# Qwen's; 'limits', its models' max_tokens are those of MODELS; 'openai-only', refuses what only
# OpenAI knows; 'search', searches the web itself; 'open-list', lists its models without a key. A
# model whose id says Qwen brings 'qwen' and 'limits' along wherever no dialect of the family's own
# is known.
FAMILIES = {
    family.name: family
    for family in (
        Family(
            "coding",
            r"(^|\.)coding(-intl)?\.dashscope\.aliyuncs\.com$",
            "BAILIAN_CODING_PLAN_API_KEY",
            frozenset({"alibaba", "qwen", "limits", "openai-only"}),
            # Its /models answers here and there only (Coding Plan FAQ; hermes-agent #110993).
            models=(
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
            lacks={
                "/embeddings": "the Coding Plan has no embeddings; they need a standard key "
                "(--provider dashscope)",
                "/completions": "the Coding Plan has no text completions; use /v1/chat/completions",
            },
            advice={
                "invalid_api_key": "A Coding Plan key (sk-sp-...) works only at the host and "
                "region it was issued for, and only while the plan runs; compare --provider "
                "coding and coding-intl",
                "client_not_accepted": "The Coding Plan accepts requests of interactive coding "
                "tools only and judges by their User-Agent, which is passed on as your client "
                "sent it",
            },
        ),
        Family(
            "token",
            r"^token-plan\..*\.maas\.aliyuncs\.com$",
            "BAILIAN_TOKEN_PLAN_API_KEY",
            frozenset({"alibaba", "qwen", "limits", "openai-only"}),
            models=(
                "qwen3.7-plus",
                "qwen3.6-plus",
                "qwen3.7-max",
                "qwen3.8-max",
                "qwen3.6-flash",
                "qwen3.8-flash",
                "deepseek-v4-pro",
                "deepseek-v4-pro-0813",
                "deepseek-v4-flash-0731",
                "deepseek-v4.1-flash",
                "deepseek-v3.2",
                "kimi-k2.7-code",
                "kimi-k2.6",
                "kimi-k2.5",
                "glm-5.3",
                "glm-5.2",
                "glm-5.1",
                "glm-5",
                "MiniMax-M2.5",
            ),
            # Qwen Code 0.24.4, Token Plan preset.
            always_thinks="qwen3.8-max",
            advice={
                "invalid_api_key": "A Token Plan key works only in its own region; compare "
                "--provider token-cn and token-intl",
            },
        ),
        Family(
            "dashscope",
            r"(^|\.)dashscope(-intl|-us|-finance)?\.aliyuncs\.com$"
            r"|\.maas\.aliyuncs\.com$|\.(alibaba|aliyun)-inc\.com$|\.alicloudapi\.com$",
            "DASHSCOPE_API_KEY",
            frozenset({"alibaba", "qwen", "limits", "openai-only", "search"}),
            advice={
                "invalid_api_key": "A key works only in its own region, and plan keys "
                "(sk-sp-...) not at all here; compare --provider dashscope, dashscope-intl, "
                "dashscope-us, dashscope-hk and WORKSPACE.REGION.maas.aliyuncs.com",
                "request_too_large": "Send less text or fewer images; the endpoint takes about "
                "6 MiB of text",
            },
        ),
        Family(
            "portal",
            r"(^|\.)portal\.qwen\.ai$",
            traits=frozenset({"alibaba", "qwen", "limits", "openai-only"}),
            has_list=False,
            lacks={
                "/embeddings": "an OAuth login serves chat only; embeddings need a standard key "
                "(--provider dashscope)",
                "/completions": "an OAuth login serves chat only; use /v1/chat/completions",
            },
            advice={"invalid_api_key": ""},
        ),
        Family(
            "openrouter",
            r"(^|\.)openrouter\.ai$",
            "OPENROUTER_API_KEY",
            frozenset({"open-list"}),
            # Ids carry a vendor there.
            default_model="",
        ),
        Family(
            "modelscope",
            r"(^|\.)modelscope\.cn$",
            "MODELSCOPE_API_KEY",
            frozenset({"limits", "openai-only", "open-list"}),
            default_model="",
        ),
        Family("deepseek", r"(^|\.)deepseek\.com$", traits=frozenset({"limits"})),
        Family("zai", r"(^|\.)(z\.ai|bigmodel\.cn)$", traits=frozenset({"limits"})),
        Family("other"),
    )
}


class ModelFacts(NamedTuple):
    """What is known of a model: tokens of context and of output, and how it thinks.

    thinking is 'none', 'off' or 'on' (it can be switched, and is so by default), 'always', or
    'unknown'; sees: what it takes besides text, None where that is not known; dialect: how it is
    told about thinking, one of DIALECTS.
    """

    pattern: str
    context: int | None = None
    output: int | None = None
    thinking: str = "unknown"
    sees: str | None = None
    dialect: str = "qwen"


# First match of the id without its vendor prefix, in lower case. State of 2026-11: Qwen Code 0.24.4
# (tokenLimits.ts and its table of modalities), Model Studio 'Deep thinking' and model pages,
# models.dev.
MODELS = (
    ModelFacts("qwen3.8-flash*", 1_000_000, 131_072, "on", "image video", "qwen3.8"),
    ModelFacts("qwen3.8-*", 1_000_000, 131_072, "on", "image", "qwen3.8"),
    ModelFacts("coder-model", 1_000_000, 65_536, "on", "image video"),
    ModelFacts("qwen3.7-max*", 1_000_000, 65_536, "on", ""),
    ModelFacts("qwen3.[567]-omni*", None, None, "on", "image video audio"),
    ModelFacts("qwen3.[567]-*plus*", 1_000_000, 65_536, "on", "image video"),
    ModelFacts("qwen3.[567]-*flash*", 1_000_000, 65_536, "on", "image video"),
    ModelFacts("qwen3.[567]*", 1_000_000, 65_536, "on"),
    ModelFacts("qwen3-coder-next*", 262_144, 65_536, "none", ""),
    ModelFacts("qwen3-coder*", 1_000_000, 65_536, "none", ""),
    ModelFacts("qwen3-vl-*-thinking*", 262_144, 32_768, "always", "image video"),
    ModelFacts("qwen3-vl-*", 262_144, 32_768, "off", "image video"),
    ModelFacts("qwen3-omni*", 65_536, 16_384, "off", "image video audio"),
    ModelFacts("qwen3-max*", 262_144, 65_536, "off", ""),
    ModelFacts("qwen3-*-thinking*", 131_072, None, "always"),
    ModelFacts("qwen3-*", 131_072, None, "on"),
    # As Ollama names them.
    ModelFacts("qwen3:*", 131_072, None, "on"),
    ModelFacts("qwen-vl-max*", 131_072, 8_192, "none", "image video"),
    ModelFacts("qwen-vl*", 131_072, None, "none", "image video"),
    ModelFacts("qwen-turbo*", 1_000_000, 16_384, "off", ""),
    ModelFacts("qwen-plus*", 1_000_000, 32_768, "off", ""),
    ModelFacts("qwen-flash*", 1_000_000, 32_768, "off", ""),
    ModelFacts("qwq*", 131_072, None, "always", ""),
    ModelFacts("qvq*", 131_072, None, "always", "image video"),
    ModelFacts("kimi-k3*", 1_000_000, 131_072, "always", "image video", "low-high-max"),
    ModelFacts("kimi-k2.7-code*", 262_144, None, "always", "image video"),
    ModelFacts("kimi-k2.5*", 262_144, 32_768, "on", "image video"),
    ModelFacts("kimi-k2.6*", 262_144, None, "on", "image video"),
    ModelFacts("kimi-*", 262_144, None, "on"),
    ModelFacts("glm-*v*", None, None, "on"),
    ModelFacts("glm-5.3-flash*", 1_000_000, 131_072, "always", "image", "low-high-max"),
    ModelFacts("glm-5.3*", 1_000_000, 131_072, "always", "", "low-high-max"),
    ModelFacts("glm-5.[2-9]*", 1_000_000, 131_072, "on", ""),
    ModelFacts("glm-5*", 202_752, 131_072, "on", ""),
    ModelFacts("glm-4.7*", 202_752, 16_384, "on", ""),
    ModelFacts("deepseek-v4.1*", 1_000_000, 384_000, "on", "", "deepseek-v4.1"),
    ModelFacts("deepseek-v4-*-0813*", 1_000_000, 384_000, "on", "", "deepseek-v4.1"),
    ModelFacts("deepseek-v4*", 1_000_000, 384_000, "on", "", "deepseek-v4"),
    ModelFacts("deepseek-flash*", 1_000_000, 384_000, "on", "image", "deepseek-v4"),
    ModelFacts("deepseek-v3*", 131_072, None, "off", ""),
    ModelFacts("deepseek-r*", 131_072, 65_536, "always", ""),
    ModelFacts("minimax-m2.7*", 204_800, None, "always", ""),
    ModelFacts("minimax-m2.5*", 196_608, 65_536, "always", ""),
    ModelFacts("minimax-m3*", 1_000_000, None, "always", "image video"),
    ModelFacts("*"),
)


@functools.lru_cache(maxsize=256)
def model_facts(model: str) -> ModelFacts:
    """Return the row of MODELS for a model id; the last row, which knows nothing, for a new one."""
    name = model.rsplit("/", 1)[-1].lower()
    return next(row for row in MODELS if fnmatch.fnmatchcase(name, row.pattern))


# Limits that several sections share.

# Of a request line, a header line, a chunk size.
MAX_LINE = 65_536
# Of a refusal's body, and of the head of an answer.
MAX_ERROR_BODY = 262_144
# Of the CLI's settings and login files.
MAX_FILE = 4_194_304
# One event of a stream, or a whole answer that was not streamed.
MAX_EVENT = 64 * 1024 * 1024
# Characters of an error message that the patterns of ERROR_RULES and REPAIRS search.
MAX_ERROR_TEXT_SCANNED = 10_000
# Longest prefix buffered while looking for think tags, code fences or repetition.
MAX_PREFIX_SCANNED = 2000
# Read at most this much at once; 65,536 costs 20 KiB more a stream and is no faster.
PIECE = 16_384


class Options(NamedTuple):
    """The options of `serve`, which are the arguments of make_server(). Times are seconds."""

    host: str = "localhost"
    port: int = 8080
    api_key: tuple[str, ...] = ()
    no_auth: bool = False
    allow_origin: tuple[str, ...] = ()
    allow_host: tuple[str, ...] = ()
    provider: str | None = None
    base_url: str | None = None
    model: str | None = None
    alias: tuple[str, ...] = ()
    failover: bool = False
    qwen_home: str | None = None
    # Longest silence of the upstream.
    timeout: float = 300.0
    retries: int = 2
    # Windows has no more than select(), which takes 512 sockets.
    max_connections: int = 500 if os.name == "nt" else 1024
    # In MiB.
    max_body: int = 64
    # From the first signal to the end: docker kills after 10.
    grace: float = 8.0
    log_level: str = "info"
    usage_file: str | None = None
    no_usage: bool = False
    demo: bool = False


DEFAULTS = Options()


class Option(NamedTuple):
    """What --help says of an option; bounds: of a number, both included; choices: of a text.

    A number must be more than 0 unless its bounds say otherwise.
    """

    help: str
    metavar: str = ""
    bounds: tuple[float, float] = (1e-9, float("inf"))
    choices: tuple[str, ...] = ()


# The one table of options: parser, variables (QWEN_PROXY_<OPTION>), checks and README follow it. A
# default that is a list makes an option that may be repeated (and a variable with commas), a flag
# is one that is False.
OPTIONS = {
    "host": Option("where to listen (default: localhost, that is 127.0.0.1 and ::1)", "HOST"),
    "port": Option("0 picks a free one (default: 8080)", "PORT", (0, 65535)),
    "api_key": Option("what clients must present; may be repeated", "KEY"),
    "no_auth": Option("listen beyond localhost without a key"),
    "allow_origin": Option(
        "web pages that may use it, besides local ones; may be repeated; * for all", "ORIGIN"
    ),
    "allow_host": Option("another name that the Host header may carry", "NAME"),
    "provider": Option(
        f"instead of the CLI's active one: {', '.join(PRESETS)}, oauth, a host from "
        "settings.json, or WORKSPACE.REGION.maas.aliyuncs.com",
        "NAME",
    ),
    "base_url": Option("any OpenAI-compatible upstream, with the key in OPENAI_API_KEY", "URL"),
    "model": Option("for requests that name none (default: the CLI's; also OPENAI_MODEL)", "ID"),
    "alias": Option("another name for a model; gpt-*=ID is possible", "NAME=ID"),
    "failover": Option("when a provider is exhausted or down, try the next that lists the model"),
    "qwen_home": Option("the CLI's folder (default: ~/.qwen; also QWEN_HOME)", "DIR"),
    "timeout": Option("longest silence of the upstream (default: 300)", "SECONDS"),
    "retries": Option(
        "before the first byte of an answer only (default: 2)", "N", (0, float("inf"))
    ),
    "max_connections": Option("the next one gets 503 (default: 1024; on Windows 500)", "N"),
    "max_body": Option("largest request (default: 64)", "MIB"),
    "grace": Option(
        "from the first signal to the end, for running answers (default: 8)", "SECONDS"
    ),
    "log_level": Option(
        "debug shows requests and answers, secrets masked (default: info)",
        choices=("debug", "info", "warning", "error"),
    ),
    "usage_file": Option(
        "where counts are kept (default: qwen_proxy.sqlite3 in the CLI's folder)", "FILE"
    ),
    "no_usage": Option("keep counts in memory only"),
    "demo": Option("a built-in stand-in answers instead of Qwen: no account needed"),
}


# ------------------------------------------------------------------------------------------------
# Errors and small tools
# ------------------------------------------------------------------------------------------------


class ProxyError(Exception):
    """A failure that is told to the client: an HTTP status and OpenAI's error object.

        ProxyError
          +-- BadRequest        400  what the client sent cannot be served
          +-- CredentialError   401  there is no usable login
          +-- UpstreamError     502  the upstream refused, broke off or could not be reached

    status: of the answer; type, code, param: of the error object; request_id: the upstream's handle
    for its support; headers: more headers for the answer; retry: whether the same request may
    succeed in a moment; retry_after: seconds, where the upstream said so; moves_on: whether another
    provider may help.
    """

    status = 500
    type = "api_error"
    code: str | None = None
    retry = moves_on = False

    def __init__(
        self,
        message: str,
        status: int = 0,
        code: str | None = None,
        type: str | None = None,
        *,
        param: str | None = None,
        request_id: str | None = None,
        headers: Iterable[tuple[str, str]] = (),
        retry: bool = False,
        retry_after: float | None = None,
        moves_on: bool = False,
    ):
        super().__init__(message)
        self.message, self.param, self.request_id = message, param, request_id
        self.retry_after, self.headers = retry_after, list(headers)
        self.status, self.type, self.code = (
            status or self.status,
            type or self.type,
            code or self.code,
        )
        self.retry, self.moves_on = retry or self.retry, moves_on or self.moves_on

    def error_object(self) -> Json:
        """Return OpenAI's error object, as it may leave the program."""
        return {
            "message": public(self.message, keep="\n\t"),
            "type": self.type,
            "param": self.param and public(self.param),
            "code": self.code and public(self.code),
        }

    def body(self) -> Json:
        """Return the body of an error answer, with the upstream's request_id if there is one."""
        request_id = {"request_id": public(self.request_id)} if self.request_id else {}
        return {"error": self.error_object(), **request_id}


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
    """The client closed its connection and does not wait for the answer any more."""


class ShuttingDown(Exception):
    """The server stops, and the time for running answers is over."""


class Secrets:
    """The values that must not leave the program, in every form in which they travel.

    Any thread may add one. Values of fewer than 6 characters cannot be told from ordinary words and
    are not kept. Tokens that rotate give way to newer ones, so that a long run does not collect
    them.
    """

    # Neither JSON nor a URL has another spelling for these.
    PLAIN = re.compile(r"[\w.~-]*\Z", re.A)
    SHAPES = re.compile(
        r"(?<=://)[^/@\s]+(?=@)|\b(sk|ms)-[A-Za-z0-9_-]{8,}"
        r"|\beyJ[A-Za-z0-9_-]{10,}[A-Za-z0-9._-]*|(?<=Bearer )(?!YOUR_KEY)[^\s\"',]{6,}"
    )
    # Without one of these no shape matches.
    SIGNS = ("://", "sk-", "ms-", "eyJ", "Bearer ")
    BACKSLASH = r"(?:\\|%(?:25)*5c)"
    # A run of what base64 is made of, in URLs and in JSON too.
    BASE64 = re.compile(r"([\w+/=\\-]+)", re.A)
    # Names of settings whose values are secret, and those of headers that never are.
    NAMES = re.compile(r"key|token|secret|passw|auth(?!or(?!iz))|credential|cookie|session", re.I)
    PUBLIC_NAMES = frozenset(
        "selectedauthtype envkey http-referer referer x-openrouter-title x-title user-agent "
        "accept content-type".split()
    )

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # Of each value its forms, and whether they are base64; then those of all values.
        self._lasting: list[dict[str, bool]] = []
        self._rotating: collections.deque[dict[str, bool]] = collections.deque(maxlen=64)
        self._forms: dict[str, bool] = {}
        self._patterns: list[re.Pattern[str]] = []

    def add(self, value: Any, rotates: bool = False) -> None:
        """Hide this value from now on."""
        if not isinstance(value, str) or len(value) < 6 or value in self._forms:
            return
        with self._lock:
            if not self.PLAIN.match(value):
                patterns = [*self._patterns, self._pattern(value)]
                self._patterns = sorted(patterns, key=lambda pattern: -len(pattern.pattern))
            (self._rotating if rotates else self._lasting).append(self._forms_of(value))
            # The longest first: a secret that contains another one is masked whole.
            forms = itertools.chain(*(each.items() for each in (*self._lasting, *self._rotating)))
            self._forms = dict(sorted(forms, key=lambda form: -len(form[0])))

    def add_userinfo(self, url: str) -> None:
        """Hide user name and password of a URL, also those that a URL may not hold unquoted."""
        userinfo, at, _ = (url.partition("://")[2] or url).rpartition("@")
        if not at or ":" not in userinfo:
            return
        password = userinfo.partition(":")[2]
        # The pieces, too: one that holds / ? # or @ is read in part as a host.
        for part in (userinfo + "@", userinfo, password, *re.split("[/?#@]", password)):
            self.add(part)
            self.add(urllib.parse.unquote(part))

    def add_settings(self, value: Any, name: str = "", holder: str = "") -> None:
        """Hide what is secret in a JSON value of settings, by its name or the object it is in."""
        is_holder = name in ("customHeaders", "headers", "extra_body")
        for key, item in as_object(value).items():
            self.add_settings(item, key, name if is_holder else holder)
        for item in as_list(value):
            self.add_settings(item, name, holder)
        if name.lower() in self.PUBLIC_NAMES:
            return
        # A number of customHeaders is sent as text.
        text = json.dumps(value) if holder and is_number(value) else as_text(value)
        self.add_userinfo(text)
        is_long = len(text) >= 12 and len(text.split()) == 1
        is_held = holder in ("customHeaders", "headers") or holder == "extra_body" and is_long
        if is_held or self.NAMES.search(name):
            self.add(text)
            # What stands behind Bearer or Basic.
            self.add(text.partition(" ")[2])

    def mask(self, text: str) -> str:
        """Return the text without known secrets and without anything shaped like a key."""
        for pattern in self._patterns:
            text = pattern.sub("***", text)
        for form, is_encoded in self._forms.items():
            if is_encoded and form in text:
                # With all of the word that it is in, since that holds more of the secret.
                words = self.BASE64.split(text)
                text = "".join("***" if form in word else word for word in words)
            elif not is_encoded:
                text = text.replace(form, "***")
        has_sign = any(sign in text for sign in self.SIGNS)
        return self.SHAPES.sub("***", text) if has_sign else text

    @classmethod
    def _pattern(cls, value: str) -> re.Pattern[str]:
        r"""Return a pattern for the value in every spelling of JSON and of URLs, however nested.

        Each level of JSON has more backslashes, each level of URLs more %25.
        """
        parts: list[str] = []
        any_number, some = cls.BACKSLASH + "{0,16}", cls.BACKSLASH + "{1,16}"
        for char in value:
            literal = "[ +]" if char == " " else re.escape(char)
            octets = char.encode("utf-8", "surrogatepass")
            percent = "".join(f"%(?:25)*{octet:02x}" for octet in octets)
            escape = some.join(map(re.escape, re.split(r"\\+", json.dumps(char)[1:-1])))
            spellings = f"(?:{any_number}(?:{literal}|{percent})|{escape})"
            parts.append(literal if cls.PLAIN.match(char) else spellings)
        return re.compile("".join(parts), re.I)

    @staticmethod
    def _forms_of(value: str) -> dict[str, bool]:
        """Return the value, and True with what base64 makes of it behind any user name or scheme.

        That is the part that holds nothing but the value, for each of the three alignments.
        """
        data, forms = value.encode("utf-8", "replace"), {value: False}
        for before in range(3):
            encoded = base64.b64encode(bytes(before) + data).decode()
            encoded = encoded[(before * 4 + 2) // 3 : (before + len(data)) * 4 // 3]
            url_safe = encoded.replace("+", "-").replace("/", "_")
            forms.update(dict.fromkeys((encoded, url_safe, encoded.replace("/", "\\/")), True))
        return forms


SECRETS = Secrets()


def public(text: str, keep: str = "") -> str:
    """Return the text as it may leave the program: secrets masked, control characters visible.

    The one exit of what the program itself says: errors, header values, the log, the terminal; the
    characters of `keep` stay as they are. What a model answers does not pass here.

    >>> public("a\\x1b[31mb\\n"), public("a\\nb", keep="\\n")
    ('a\\\\x1b[31mb\\\\n', 'a\\nb')
    """
    text = SECRETS.mask(text)
    if text.isprintable():
        return text
    return "".join(
        char if char.isprintable() or char in keep else char.encode("unicode_escape").decode()
        for char in text
    )


def shorten(text: str, limit: int) -> str:
    """Cut the text to so many characters, after masking: a cut must not leave half a secret."""
    return SECRETS.mask(text)[:limit]


def _make_public(record: logging.LogRecord) -> bool:
    """Let nothing but public() lines into the log, so that no caller has to think of it."""
    record.msg, record.args = public(record.getMessage()), ()
    return True


log.addFilter(_make_public)


def loads(text: str | bytes, default: Any = None) -> Any:
    """Return the JSON value in a text, or the default where it is not JSON."""
    try:
        return json.loads(text if isinstance(text, str) else text.decode("utf-8", "replace"))
    except (ValueError, RecursionError):
        return default


_JSON_ENCODER = json.JSONEncoder(ensure_ascii=False, separators=(",", ":"), allow_nan=False)


def encode_json(value: Any, is_request: bool = False) -> bytes:
    """Return JSON in UTF-8, unescaped.

    Escapes would double Chinese text, and DashScope counts bytes as sent. For a number that JSON
    cannot hold, or nesting beyond what Python can write, raises BadRequest if the value is a
    client's request, else UpstreamError.
    """
    try:
        return _JSON_ENCODER.encode(value).encode()
    except UnicodeEncodeError:
        # Half of a surrogate pair: a string was cut in an emoji. Strict parsers refuse it.
        return re.sub("[\ud800-\udfff]", "\ufffd", _JSON_ENCODER.encode(value)).encode()
    except (ValueError, RecursionError):
        kind = BadRequest if is_request else UpstreamError
        whose = "the body" if is_request else "the upstream's answer"
        raise kind(
            f"{whose} holds a number that is out of range, or is nested too deeply"
        ) from None


def size_of_json(data: bytes) -> int:
    """Return about how many bytes JSON takes as Python's objects, without decoding it.

    >>> size_of_json(b'{"a": [1, 2]}')
    317
    """
    return len(data) + 192 * data.count(b"{") + 64 * data.count(b"[") + 48 * data.count(b",")


def as_object(value: Any) -> Json:
    """Return the value if it is an object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: Any) -> list[Any]:
    """Return the value if it is a list, else an empty one."""
    return value if isinstance(value, list) else []


def as_text(value: Any) -> str:
    """Return the value if it is a string, else an empty one."""
    return value if isinstance(value, str) else ""


_SWITCHES = {
    **dict.fromkeys(("true", "on", "yes", "1", "1.0", "enabled", "adaptive"), True),
    **dict.fromkeys(("false", "off", "no", "0", "0.0", "disabled"), False),
}


def as_switch(value: Any) -> bool | None:
    """Return true or false in whichever spelling clients have for it; None for anything else.

    >>> as_switch("False"), as_switch(1), as_switch("perhaps")
    (False, True, None)
    """
    return _SWITCHES.get(str(value).strip().lower())


def as_count(value: Any) -> int | None:
    """Return a whole number, also one as text or with a decimal point; None for anything else.

    >>> as_count("1024"), as_count(100.0), as_count("many"), as_count(True)
    (1024, 100, None, None)
    """
    number = as_decimal(value)
    return int(number) if number is not None and number % 1 == 0 else None


# Levels of thinking, from none to all.
EFFORTS = ("none", "minimal", "low", "medium", "high", "xhigh", "max")


def as_effort(value: Any) -> str | None:
    """Return a level of thinking in lower case; None for anything else."""
    effort = as_text(value).strip().lower()
    return effort if effort in EFFORTS else None


def as_decimal(value: Any) -> Any:
    """Return a number, also one as text; None for anything else.

    >>> as_decimal("0.5"), as_decimal("-Infinity")
    (0.5, None)
    """
    # Of many digits CPython before 3.11 makes a number in quadratic time.
    number = loads(value) if isinstance(value, str) and len(value) < 40 else value
    return number if is_number(number) and abs(number) < 2**64 else None


def is_number(value: Any) -> bool:
    """Return whether a JSON value is a number; True and False are none."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def dig(value: Any, *path: str) -> Any:
    """Return value[path[0]][path[1]]..., or None where a step is missing or no object."""
    for name in path:
        value = value.get(name) if isinstance(value, dict) else None
    return value


def stated(fields: Json) -> Json:
    """Return the fields that are not null."""
    return {name: value for name, value in fields.items() if value is not None}


def without_keys(value: Json, names: Iterable[str]) -> Json:
    """Return an object without some of its fields."""
    return {name: item for name, item in value.items() if name not in names}


def first_of(kind: type | tuple[type, ...], *values: Any) -> Any:
    """Return the first value that is of the kind and not empty, else None."""
    return next((value for value in values if isinstance(value, kind) and value), None)


def json_type(value: Any) -> str:
    """Return the name of a JSON value's type, with its article."""
    names = {dict: "an object", list: "a list", str: "a string", bool: "a boolean"}
    return "null" if value is None else names.get(type(value), "a number")


def text_of(content: Any) -> str:
    """Return the text in a message's content, be it a string or parts."""
    if isinstance(content, list):
        return "\n".join(part["text"] for part in content if isinstance(dig(part, "text"), str))
    return as_text(content)


def counted(number: int, noun: str) -> str:
    """Return a number of things.

    >>> counted(1, "request"), counted(2000, "request")
    ('1 request', '2,000 requests')
    """
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def host_of(url: str, with_port: bool = False) -> str:
    """Return the host of a URL without user name and password, empty where it has none."""
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        return (parts.netloc.rpartition("@")[2] if with_port else parts.hostname) or ""
    return ""


def base_url_fault(url: Any) -> str:
    """Return what is wrong with a base URL, as the end of a sentence; empty for a good one."""
    if not isinstance(url, str):
        return f"must be a string, not {json_type(url)}"
    if "@" in url.partition("://")[2].partition("/")[0]:
        return "must hold no user name and no password"
    with contextlib.suppress(ValueError):
        parts = urllib.parse.urlsplit(url)
        has_host = re.match(r"[\w.-]+\Z|[0-9a-f:.]+\Z", parts.hostname or "")
        is_clean = url.isascii() and url.isprintable() and " " not in url
        if has_host and is_clean and parts.port != 0 and parts.scheme in ("http", "https"):
            return ""
    return "must begin with http:// or https://, name a host, and be ASCII without blanks"


def web_page(text: str) -> str:
    """Return 'a web page', with its title, for text that is one; empty for other text."""
    if not re.match(r"<[!?a-zA-Z]", text):
        return ""
    title = re.search(r"<title[^>]*>(.*?)</title>", text[:MAX_ERROR_TEXT_SCANNED], re.S | re.I)
    words = " ".join(SECRETS.mask(title.group(1)).split()) if title else ""
    return f"a web page ('{shorten(words, 80)}')" if words else "a web page"


def reason_of(error: BaseException) -> str:
    """Return a few words for a failure, without Python's names for it."""
    if isinstance(error, urllib.error.URLError) and isinstance(error.reason, BaseException):
        error = error.reason
    reason, system = getattr(error, "reason", None), as_text(getattr(error, "strerror", None))
    # The first that applies and has a text counts.
    kinds = (
        (socket.timeout, "timed out"),
        (socket.gaierror, "the host name cannot be resolved"),
        (
            ssl.SSLCertVerificationError,
            f"its TLS certificate is not trusted ({getattr(error, 'verify_message', '')}); a "
            "private CA goes into SSL_CERT_FILE",
        ),
        (ssl.SSLError, f"TLS failed ({reason or 'connection closed'})"),
        (OSError, system[:1].lower() + system[1:]),
        (BaseException, str(reason or error)),
    )
    found = (words for kind, words in kinds if isinstance(error, kind) and words)
    return next(found, type(error).__name__)


def read_regular(path: str, errors: str = "strict") -> tuple[str, os.stat_result]:
    """Return text and status of a regular file.

    Raises OSError for anything else, so that a pipe is never waited for.
    """
    at_once = getattr(os, "O_NONBLOCK", 0)
    with open(path, "rb", opener=lambda name, flags: os.open(name, flags | at_once)) as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode):
            raise OSError(errno.EINVAL, "it is not a regular file", path)
        if status.st_size > MAX_FILE:
            raise OSError(errno.EFBIG, f"it is larger than {MAX_FILE} bytes", path)
        return file.read(MAX_FILE).decode("utf-8-sig", errors), status


def stamp_of(path: str) -> Any:
    """Return what changes when a file does; None where there is none."""
    with contextlib.suppress(OSError):
        status = os.stat(path)
        return status.st_mtime_ns, status.st_size, status.st_ino
    return None


# ------------------------------------------------------------------------------------------------
# Credentials
# ------------------------------------------------------------------------------------------------

FREE_TIER_ENDED = (
    f"Qwen's free OAuth tier ended on {FREE_TIER_END}: a login still works, but chat does not. "
    "Configure an API key in the CLI (run `qwen`, then /auth), or start with --provider NAME and "
    "its key in the environment"
)


class Login:
    """One state of oauth_creds.json. expires_at is in seconds; fields is the whole file."""

    # A token counts as expired this long before it is: the CLI's own margin.
    REFRESH_MARGIN = 30
    # What a header may hold.
    HEADER_TEXT = re.compile(r"[\x21-\x7e]+\Z")

    def __init__(self, fields: Any):
        """Check the JSON of oauth_creds.json; raises CredentialError that names what is wrong.

        Qwen Code, sharedTokenManager.ts: the three strings and expiry_date (ms) are required.
        """
        if not isinstance(fields, dict):
            raise CredentialError("it is not a JSON object")
        for name in ("access_token", "refresh_token", "token_type"):
            if not as_text(fields.get(name)):
                raise CredentialError(f"it has no {name}")
        self.fields = fields
        self.access_token = as_text(fields["access_token"])
        self.refresh_token = as_text(fields["refresh_token"])
        if not self.HEADER_TEXT.match(self.access_token):
            raise CredentialError("its access_token holds a character that no header may hold")
        expiry_date = fields.get("expiry_date", 0)
        if not is_number(expiry_date) or not 0 < expiry_date < 1e17:
            raise CredentialError("its expiry_date is not a time in milliseconds")
        self.expires_at = expiry_date / 1000
        SECRETS.add(self.access_token, rotates=True)
        SECRETS.add(self.refresh_token, rotates=True)
        named = fields.get("resource_url")
        url = PORTAL_RESOURCE_URL if named in (None, "") else named
        SECRETS.add_userinfo(str(url))
        self.base_url = self.base_url_of(as_text(url))
        fault = base_url_fault(self.base_url if isinstance(url, str) else url)
        if fault:
            raise CredentialError(f"its resource_url {fault}")

    @staticmethod
    def base_url_of(resource_url: str) -> str:
        """Return the base URL for a resource_url, as the CLI makes it.

        >>> Login.base_url_of("localhost")
        'https://localhost/v1'
        """
        url = resource_url if "://" in resource_url else "https://" + resource_url
        url = url.rstrip("/")
        return url if url.endswith("/v1") else url + "/v1"

    def is_fresh(self, rejected: str = "") -> bool:
        """Return whether the access token can be used now, and is not the rejected one."""
        is_expired = time.time() >= self.expires_at - self.REFRESH_MARGIN
        return not is_expired and self.access_token != rejected

    @classmethod
    def from_answer(cls, answer: Json, before: Json) -> Login:
        """Return the login after a token response (RFC 6749 5.1); other fields stay as before.

        Kept above all: the refresh token when the answer rotates none, and resource_url, whose loss
        makes the CLI fall back to a host that refuses the token. Raises UpstreamError for an answer
        without a new access token: the old one must not get a new expiry.
        """
        names = ("refresh_token", "token_type", "resource_url")
        texts = {name: as_text(answer.get(name)) for name in names}
        seconds = seconds_in(answer.get("expires_in"), 3600)
        fields = {
            "token_type": "Bearer",
            "resource_url": PORTAL_RESOURCE_URL,
            **before,
            **{name: text for name, text in texts.items() if cls.HEADER_TEXT.match(text)},
            "access_token": answer.get("access_token"),
            "expiry_date": int((time.time() + seconds) * 1000),
        }
        try:
            return cls(fields)
        except CredentialError as error:
            raise OAuthCredentials.refresh_failed(
                f"the token endpoint's answer is unusable: {error.message}"
            ) from None


def seconds_in(value: Any, default: float) -> float:
    """Return a span in seconds that an answer names; the default for what is none."""
    return float(value) if is_number(value) and 0 < value < 1e9 else default


class LockFile:
    """The CLI's own lock on oauth_creds.json: a file that exists while a process refreshes.

    Qwen Code, sharedTokenManager.ts: created exclusively with a random UUID in it (any text that
    no other process has will do); while it exists the others try again after 100 ms, each time half
    as long again, up to 2 s; one older than 35 s is renamed away. An flock would not keep the CLI
    out.
    """

    STALE = 35.0
    WAIT_FIRST, WAIT_FACTOR, WAIT_MOST = 0.1, 1.5, 2.0
    _held: set[LockFile] = set()

    def __init__(self, path: str, pause: Callable[[float], None] = time.sleep):
        self.path, self._owner, self._pause = path, secrets.token_hex(16), pause

    def __enter__(self) -> LockFile:
        wait, seen, seen_since = self.WAIT_FIRST, 0.0, time.monotonic()
        while not self._create():
            with contextlib.suppress(FileNotFoundError):
                mtime = os.lstat(self.path).st_mtime
                if mtime != seen:
                    seen, seen_since = mtime, time.monotonic()
                if self._is_stale(mtime, seen_since):
                    self._break(mtime)
                    continue
            self._pause(wait)
            wait = min(wait * self.WAIT_FACTOR, self.WAIT_MOST)
        LockFile._held.add(self)
        return self

    def __exit__(self, *_: object) -> None:
        """Remove the lock if it is still ours: a slow refresh may have lost it."""
        LockFile._held.discard(self)
        with contextlib.suppress(OSError):
            if read_regular(self.path, "replace")[0] == self._owner:
                os.unlink(self.path)

    @staticmethod
    def release_all() -> None:
        """Remove what we hold, at the end of the process.

        A CLI waits 29 s for a lock, but calls it stale only after 35.
        """
        for lock in list(LockFile._held):
            lock.__exit__()

    def _create(self) -> bool:
        try:
            with contextlib.suppress(FileExistsError), open(self.path, "x") as file:
                file.write(self._owner)
                return True
        except PermissionError:
            # On Windows another process may just be deleting it.
            if os.name != "nt" or not os.path.exists(self.path):
                raise
        return False

    def _is_stale(self, mtime: float, seen_since: float) -> bool:
        """Return whether the lock is too old, or was seen unchanged for long: clocks may jump."""
        is_old = time.time() - mtime > self.STALE
        if is_old:
            # A file server has a clock of its own.
            with tempfile.TemporaryFile(dir=os.path.dirname(self.path)) as probe:
                is_old = os.fstat(probe.fileno()).st_mtime - mtime > self.STALE
        return is_old or time.monotonic() - seen_since > self.STALE

    def _break(self, mtime: float) -> None:
        """Rename a stale lock away, and put back what turns out to be a new one; raises OSError."""
        away = f"{self.path}.stale.{secrets.token_hex(16)}"
        os.rename(self.path, away)
        with contextlib.suppress(OSError):
            if os.lstat(away).st_mtime != mtime:
                os.link(away, self.path)
        with contextlib.suppress(OSError):
            os.unlink(away)


atexit.register(LockFile.release_all)


class LoginFile:
    """How oauth_creds.json is written: by descriptor, and never through a link to something else.

    Whoever may write into the folder must not be able to turn the refresh to another file.
    """

    FLAGS = getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0) | getattr(os, "O_NONBLOCK", 0)
    # os.replace() fails so on a file that is mounted by itself, in another user's folder, or
    # across a mount.
    NOT_REPLACEABLE = frozenset({errno.EBUSY, errno.EACCES, errno.EPERM, errno.EROFS, errno.EXDEV})

    def __init__(self, path: str):
        self.path = path

    def write(self, text: str) -> None:
        """Write the file, mode 0600: atomically if it can be renamed over, else in place.

        The new mtime is always later than the old one: the CLI reloads only then (Qwen Code,
        sharedTokenManager.ts). Raises OSError.
        """
        self._sweep()
        path, data = self._target(), text.encode()
        before = os.lstat(path) if os.path.lexists(path) else None
        if before is None or not hasattr(os, "geteuid") or os.geteuid() in (0, before.st_uid):
            try:
                return self._replace(path, data, before)
            except OSError as error:
                if before is None or error.errno not in self.NOT_REPLACEABLE:
                    raise
        return self._overwrite(path, data, before)

    def why_not_saved(self) -> str:
        """Return why the file could not be written; empty where it can be, or does not exist."""
        try:
            path = self._target()
        except OSError as error:
            return reason_of(error)
        is_replaceable = os.access(os.path.dirname(path), os.W_OK | os.X_OK)
        is_writable = is_replaceable or os.access(path, os.W_OK)
        return "it is read-only" if os.path.exists(path) and not is_writable else ""

    def _sweep(self) -> None:
        """Remove temporary files that a killed refresh of ours has left; by the lock's holder."""
        folder, name = os.path.split(self.path)
        with contextlib.suppress(OSError):
            for found in fnmatch.filter(os.listdir(folder), f"{name}.qwen_proxy-*.tmp"):
                leftover = os.path.join(folder, found)
                status = os.lstat(leftover)
                if stat.S_ISREG(status.st_mode) and time.time() - status.st_mtime > LockFile.STALE:
                    os.unlink(leftover)

    def _target(self) -> str:
        """Return the path, or what a link leads to, if that is a login file of the same owner."""
        if not os.path.islink(self.path):
            return self.path
        target = os.path.realpath(self.path)
        try:
            text, status = read_regular(target)
            Login(loads(text))
        except (OSError, ValueError, CredentialError) as error:
            raise OSError(
                errno.EPERM,
                f"it is a link to {target}, which is no login file ({reason_of(error)})",
            ) from None
        if status.st_uid != os.lstat(self.path).st_uid:
            raise OSError(errno.EPERM, f"it is a link to {target}, which belongs to another user")
        return target

    def _replace(self, path: str, data: bytes, before: os.stat_result | None) -> None:
        temporary = f"{path}.qwen_proxy-{secrets.token_hex(6)}.tmp"
        handle = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL | self.FLAGS, 0o600)
        try:
            with os.fdopen(handle, "wb") as file:
                file.write(data)
                file.flush()
                if before and hasattr(os, "fchown") and before.st_uid != os.geteuid():
                    # Root must not take it away from its user.
                    os.fchown(handle, before.st_uid, before.st_gid)
                self._complete(handle, before)
            os.replace(temporary, path)
        finally:
            # It is there only if it could not be renamed.
            with contextlib.suppress(OSError):
                os.unlink(temporary)

    def _overwrite(self, path: str, data: bytes, before: os.stat_result | None) -> None:
        """Write over the old file; blanks make room first, so that it stays whole JSON."""
        with os.fdopen(os.open(path, os.O_WRONLY | self.FLAGS), "wb") as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode) or not before or before.st_ino != status.st_ino:
                raise OSError(errno.EPERM, "it was replaced meanwhile")
            file.seek(0, os.SEEK_END)
            file.write(b" " * (len(data) - status.st_size))
            file.flush()
            file.seek(0)
            file.write(data.ljust(status.st_size))
            file.truncate(len(data))
            self._complete(file.fileno(), before)

    @staticmethod
    def _complete(handle: int, before: os.stat_result | None) -> None:
        """Set the mode and an mtime later than before, and put all of it on the disk."""
        if os.name != "nt":
            # Not for another user's file that we may write.
            with contextlib.suppress(PermissionError):
                os.fchmod(handle, 0o600)
                earliest = before.st_mtime_ns + 1_000_000 if before else 0
                mtime = max(os.fstat(handle).st_mtime_ns, earliest)
                os.utime(handle, ns=(mtime, mtime))
        os.fsync(handle)


class DeadlineSocket(socket.socket):
    """A socket that receives nothing after its deadline, however slowly the bytes drip in."""

    deadline = float("inf")

    def keep_alive(self) -> None:
        """Let the system probe a silent connection, since the upstream may think for minutes.

        Gateways that forget one then keep it, and one that is lost ends after two minutes.
        TCP_KEEPALIVE is macOS's name for TCP_KEEPIDLE.
        """
        self.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        names = {"TCP_KEEPIDLE": 45, "TCP_KEEPALIVE": 45, "TCP_KEEPINTVL": 15, "TCP_KEEPCNT": 5}
        for name, value in names.items():
            # Each system has some of them.
            with contextlib.suppress(AttributeError, OSError):
                self.setsockopt(socket.IPPROTO_TCP, getattr(socket, name), value)

    def hurry(self) -> None:
        """Give the next call the time until the deadline; raises socket.timeout when it is over."""
        remaining = self.deadline - time.monotonic()
        if remaining <= 0:
            raise socket.timeout("timed out")
        self.settimeout(remaining)

    def recv_into(self, *arguments: Any) -> int:
        self.hurry()
        return super().recv_into(*arguments)


def connect_before(deadline: float, address: tuple[str, int], *_: Any, **__: Any) -> socket.socket:
    """Return a connection to the first address of a name that answers, in one time for all.

    The deadline also holds for what is received afterwards. Stands in for
    socket.create_connection(), which a connection of http.client calls.
    """
    failure = OSError("the host name has no address")
    for *kind, _name, place in socket.getaddrinfo(*address, type=socket.SOCK_STREAM):
        connection = DeadlineSocket(*kind)
        try:
            connection.keep_alive()
            connection.deadline = deadline
            connection.hurry()
            connection.connect(place)
            return connection
        except OSError as error:
            connection.close()
            failure = error
    raise failure


def tls_context() -> ssl.SSLContext:
    """Return a context that trusts the private CAs that the CLI and Python before 3.13 trust.

    Since then a CA without a key identifier is refused (python/cpython#138193).
    """
    context = ssl.create_default_context()
    context.verify_flags &= ~ssl.VERIFY_X509_STRICT
    return context


class DeadlineHandler(urllib.request.HTTPHandler, urllib.request.HTTPSHandler):
    """urllib's own connections, with one deadline for connect, head and body together."""

    def __init__(self, seconds: float):
        self._deadline, context = time.monotonic() + seconds, tls_context()
        # super() of a DeadlineSocket is an SSLSocket here.
        bases, timed = (DeadlineSocket, ssl.SSLSocket), {"deadline": self._deadline}
        context.sslsocket_class = type("DeadlineTLSSocket", bases, timed)
        super().__init__(context=context)

    def do_open(self, http_class: Any, req: urllib.request.Request, **arguments: Any) -> Any:
        def connection_to(host: str, **more: Any) -> Any:
            connection = http_class(host, **more)
            connection._create_connection = functools.partial(connect_before, self._deadline)
            return connection

        return super().do_open(connection_to, req, **arguments)


class Forwarding:
    """The forward proxy that all connections go over.

    url: empty for none; source: where it was named; exempt: hosts that are reached without it.
    """

    def __init__(self, variable: Callable[[str], str], stated: Any = None):
        """Take what the settings state, or else the variables; a scheme may be missing.

        One for both schemes, in the CLI's order.
        """
        names = ("HTTPS_PROXY", "https_proxy", "HTTP_PROXY", "http_proxy")
        named = [("proxy in settings.json", as_text(stated))]
        named += [(name, variable(name)) for name in names]
        self.source, url = next((each for each in named if each[1].strip()), ("", ""))
        SECRETS.add_userinfo(url.strip())
        scheme, _, rest = url.strip().rpartition("://")
        userinfo, at, host = rest.rpartition("@")
        # Passwords as URLs need them.
        quoted = urllib.parse.quote(userinfo, safe=":%", errors="replace")
        listed = re.split(r"[\s,]+", variable("no_proxy") or variable("NO_PROXY"))
        # *.name is .name, and .name is name, which includes what ends in it.
        self.exempt = [re.sub(r"^\*?\.", "", name.lower()) for name in listed if name]
        self.url = f"{scheme or 'http'}://{quoted}{at}{host}" if rest else ""

    def proxy_for(self, host: str) -> str:
        """Return the proxy for a host, with its port if it has one; empty for none."""
        host, name = host.lower(), host_of("//" + host)
        is_exempt = any(
            exempt == "*" or exempt in (host, name) or name.endswith("." + exempt)
            for exempt in self.exempt
        )
        return "" if is_exempt else self.url


DIRECT = Forwarding(lambda name: "")


class ForwardProxy(urllib.request.ProxyHandler):
    """urllib's way over a forward proxy; a proxy that speaks no HTTP is refused by name."""

    def __init__(self, forwarding: Forwarding):
        super().__init__(dict.fromkeys(("http", "https"), forwarding.url) if forwarding.url else {})
        self._forwarding = forwarding

    def proxy_open(self, request: Any, proxy: str, type: str) -> Any:
        """Send a request over the proxy, unless its host is exempt."""
        if not self._forwarding.proxy_for(request.host):
            return None
        if not proxy.lower().startswith(("http://", "https://")):
            scheme, host = proxy.partition("://")[0], host_of(proxy, with_port=True)
            there, kind = host_of("//" + request.host), scheme.rstrip("45ah").upper()
            raise UpstreamError(
                f"{self._forwarding.source} names a {kind} proxy ({scheme}://{host}), which is "
                f"not supported: name an HTTP proxy there, or {there} in NO_PROXY",
                code="proxy_not_supported",
            )
        return super().proxy_open(request, proxy, type)


def opener_over(
    forwarding: Forwarding, connections: urllib.request.BaseHandler
) -> urllib.request.OpenerDirector:
    """Return an opener over a forward proxy, if there is one.

    No redirects, since urllib would take our secrets along, and no errors raised: the caller judges
    both.
    """
    opener = urllib.request.OpenerDirector()
    for handler in (ForwardProxy(forwarding), connections, urllib.request.UnknownHandler()):
        opener.add_handler(handler)
    return opener


def open_before(
    request: urllib.request.Request, seconds: float, forwarding: Forwarding = DIRECT
) -> Any:
    """Return the response to a request of the log-in or of `status`, within a time.

    Raises OSError, http.client.HTTPException, and UpstreamError for a proxy that cannot be used.
    """
    return opener_over(forwarding, DeadlineHandler(seconds)).open(request, timeout=seconds)


def post_form(
    oauth_base_url: str,
    path: str,
    fields: dict[str, str],
    forwarding: Forwarding,
    headers: Mapping[str, str] | None = None,
) -> tuple[int, Json | None, str]:
    """POST a form to the identity host; returns status, JSON object or None, and a description.

    Raises UpstreamError when no answer came in time. Status and body are judged by the caller,
    since the host sits behind a firewall that answers HTML with any status, which is no verdict on
    anything. The body itself is never quoted, since a token may be in it.
    """
    url = oauth_base_url.rstrip("/") + path
    SECRETS.add_userinfo(url)
    fault = base_url_fault(url)
    if fault:
        raise UpstreamError(f"QWEN_OAUTH_BASE_URL {fault}", 500)
    form = urllib.parse.urlencode({"client_id": CLIENT_ID, **fields})
    own = {
        "Content-Type": "application/x-www-form-urlencoded",
        "Accept": "application/json",
        # Without a User-Agent of its own choice the host answers HTML (hermes-agent #7746).
        "User-Agent": f"qwen_proxy/{__version__}",
    }
    request = urllib.request.Request(url, form.encode("ascii"), {**(headers or {}), **own})
    try:
        with open_before(request, OAuthCredentials.TIMEOUT, forwarding) as response:
            status, body = response.getcode(), response.read(MAX_ERROR_BODY)
    except (OSError, http.client.HTTPException) as error:
        host = host_of(url, with_port=True)
        raise UpstreamError(f"no answer from {host}: {reason_of(error)}", retry=True) from error
    answer = loads(body)
    if not isinstance(answer, dict):
        page = web_page(body.decode("utf-8", "replace").strip())
        return status, None, page or f"{len(body)} bytes that are no JSON object"
    for name in ("access_token", "refresh_token", "id_token", "device_code"):
        SECRETS.add(answer.get(name), rotates=True)
    detail = first_of(str, answer.get("error_description"), answer.get("error"))
    return status, answer, shorten(detail or "a JSON object without an error", 120)


class OAuthCredentials:
    """The login in one oauth_creds.json, shared with the CLI and with other processes.

    Any number of threads may call it. The file is read again whenever it has changed, so a new
    login by the CLI counts at once; it is written only with a refreshed token.
    """

    # One attempt while holding the lock: a CLI before 0.24 breaks it after 10 s.
    TIMEOUT = 8.0
    # After a failure that may pass, the token endpoint is not asked for this long.
    PAUSE = 5.0
    # Before a login that could not be written is tried again.
    SAVE_PAUSE = 30.0
    LOGIN_AGAIN = "run `qwen` and then /auth, or `python3 qwen_proxy.py login`"

    def __init__(
        self, path: str, oauth_base_url: str = OAUTH_BASE_URL, forwarding: Forwarding = DIRECT
    ):
        self.path, self.problem = path, ""
        self._oauth_base_url, self._forwarding = oauth_base_url, forwarding
        self._refreshing, self._reading = threading.Lock(), threading.Lock()
        self._login: Login | None = None
        self._stamp = ()
        # When to try again what could not be written (monotonic); 0: nothing.
        self._save_again_at = 0.0
        # The refresh token that failed last, until when it is not tried again, and the error.
        self._failed = ("", 0.0, ProxyError(""))
        # A token that was refused although it had just been refreshed.
        self.rejected_token = ""

    def access_token(self, rejected: str = "", pause: Callable[[float], None] = time.sleep) -> str:
        """Return a token that is valid now and is not the rejected one.

        pause(seconds) is called while another thread or process refreshes; it may raise to give up.
        Raises CredentialError when a new login is needed, UpstreamError when a refresh may work
        later.
        """
        login, is_due = self.login(), 0 < self._save_again_at < time.monotonic()
        if login.is_fresh(rejected):
            if not is_due:
                return login.access_token
            # By this thread: the others need not wait for the lock.
            self._save_again_at = time.monotonic() + self.SAVE_PAUSE
        with self._locked(pause):
            login = self.login()
            if not login.is_fresh(rejected):
                login = self._refreshed(login)
            elif is_due and self._save_again_at:
                # Otherwise the file has changed, and holds a newer login.
                self.save(login)
        return login.access_token

    def login(self) -> Login:
        """Return the login as it is now: the file if it has changed, else the copy in memory.

        A file that cannot be read any more or is gone (the CLI deletes it when its own refresh is
        refused) does not end a login that is in memory. Raises CredentialError without a login.
        """
        with self._reading:
            stamp = stamp_of(self.path)
            if stamp != self._stamp:
                self._stamp = stamp
                try:
                    self._login = Login(loads(read_regular(self.path)[0]))
                    self.problem, self._save_again_at = "", 0.0
                except (OSError, UnicodeError, CredentialError) as error:
                    self.problem = reason_of(error)
                    if self._login:
                        log.warning(
                            "%s: %s; still using the login in memory", self.path, self.problem
                        )
            if self._login is None:
                raise CredentialError(
                    f"no usable login in {self.path}: {self.problem}; {self.LOGIN_AGAIN}"
                )
            return self._login

    def is_there(self) -> bool:
        """Return whether there is a file, or was one that is still in memory."""
        return self._login is not None or os.path.lexists(self.path)

    def base_url(self) -> str:
        """Return where this login is served."""
        return (self._login or self.login()).base_url

    def describe(self) -> Json:
        """Return facts for /health and status; nothing secret."""
        facts: Json = {"type": "oauth", "path": self.path, "problem": self.problem or None}
        with contextlib.suppress(CredentialError):
            facts["expires_at"] = int(self.login().expires_at)
        return facts

    def adopt(self, login: Login) -> None:
        """Use a login that no file holds yet, and write none."""
        self._login, self._stamp = login, stamp_of(self.path)

    def authorize(
        self,
        show: Callable[[DeviceAuthorization], None],
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        """Run device authorization to its end, and save the new login; raises ProxyError.

        show is called with what the user needs.
        """
        device = DeviceAuthorization(self._oauth_base_url, self._forwarding)
        show(device)
        self.replace(device.wait(sleep))
        if self.problem:
            raise CredentialError(f"{self.path} cannot be written: {self.problem}")

    def replace(self, login: Login) -> None:
        """Put a new login in place of the old one, under the CLI's lock."""
        with self._locked():
            self.save(login)

    def save(self, login: Login) -> None:
        """Write the login, by the holder of the lock; if that fails it stays in memory, logged."""
        with self._reading:
            self._login, self.problem, self._save_again_at = login, "", 0.0
            try:
                LoginFile(self.path).write(json.dumps(login.fields, indent=2))
            except OSError as error:
                self._save_again_at = time.monotonic() + self.SAVE_PAUSE
                self.problem = (
                    f"it could not be saved ({reason_of(error)}), the new token is kept in memory "
                    "only"
                )
                log.warning("%s: %s", self.path, self.problem)
            self._stamp = stamp_of(self.path)

    @contextlib.contextmanager
    def _locked(self, pause: Callable[[float], None] = time.sleep) -> Iterator[None]:
        """Keep out other threads, and by the CLI's lock other processes."""
        while not self._refreshing.acquire(timeout=LockFile.WAIT_FIRST):
            pause(0)
        with contextlib.ExitStack() as stack:
            stack.callback(self._refreshing.release)
            folder = os.path.dirname(self.path)
            try:
                os.makedirs(folder, mode=0o700, exist_ok=True)
                stack.enter_context(LockFile(os.path.join(folder, "oauth_creds.lock"), pause))
            except OSError as error:
                # A read-only folder: no process can write the file, so none needs the lock.
                log.warning(
                    "cannot create the lock in %s (%s); continuing without",
                    folder,
                    reason_of(error),
                )
            yield

    def _refreshed(self, login: Login) -> Login:
        """Return the login after a refresh, by the holder of the lock.

        Those who waited while one attempt failed share its outcome: to queue up would cost each of
        them another attempt.
        """
        token, until, failure = self._failed
        if token == login.refresh_token and time.monotonic() < until:
            # A copy: an exception that is raised again and again keeps all its frames.
            raise copy.copy(failure)
        try:
            return self._refresh(login)
        except ProxyError as error:
            # A refused one is dead until the file has another.
            pause = float("inf") if isinstance(error, CredentialError) else self.PAUSE
            self._failed = (login.refresh_token, time.monotonic() + pause, copy.copy(error))
            raise

    def _refresh(self, login: Login) -> Login:
        form = {"grant_type": "refresh_token", "refresh_token": login.refresh_token}
        status, answer, detail = post_form(self._oauth_base_url, TOKEN_PATH, form, self._forwarding)
        if status == 200 and answer and not answer.get("error"):
            refreshed = Login.from_answer(answer, login.fields)
            self.save(refreshed)
            minutes = (refreshed.expires_at - time.time()) / 60
            log.info("refreshed the access token, valid for %d min", minutes)
            return refreshed
        # Only JSON is a verdict (the firewall's HTML comes with any status), and only on this
        # refresh token.
        if status not in (400, 401) or answer is None:
            raise self.refresh_failed(
                f"the token endpoint answered {status} ({detail}); the login is kept and tried "
                "again"
            )
        current = self.login()
        if current.is_fresh(login.access_token):
            # Another process has written it meanwhile.
            return current
        log.warning("the token endpoint refused the refresh token: %s", detail)
        raise CredentialError(
            f"the login in {self.path} has expired and its refresh token was refused; "
            f"{self.LOGIN_AGAIN}"
        )

    @classmethod
    def refresh_failed(cls, message: str) -> UpstreamError:
        """Return the error for a refresh that may work in a moment."""
        headers = [("Retry-After", f"{cls.PAUSE:.0f}")]
        return UpstreamError(message, 503, "token_refresh_failed", retry=True, headers=headers)


class ApiKey:
    """A key from settings, environment or command line, bound to the base URL of its entry."""

    def __init__(self, value: str, source: str, problem: str = ""):
        self._value, self.source, self._problem = value, source, problem or key_fault(value, source)
        SECRETS.add(value)

    def access_token(self, rejected: str = "", pause: Callable[[float], None] = time.sleep) -> str:
        """Return the key; raises CredentialError when there is none, or its entry is wrong."""
        if self._problem:
            raise CredentialError(self._problem)
        return self._value

    def describe(self) -> Json:
        """Return facts for /health and status; nothing secret."""
        return {"type": "api-key", "source": self.source, "problem": self._problem or None}


def key_fault(value: str, source: str) -> str:
    """Return what does not belong to a key, as a sentence; empty for a good one."""
    SECRETS.add(value.strip("\"'").rpartition(" ")[2])
    faults = {
        "['\"]": "is in quotes, which are part of it there (docker --env-file keeps them): take "
        "them away",
        "(?i:bearer )": "begins with 'Bearer ': give the key alone",
        "[ -~]*[^ -~]": "holds a character that no key has: copy it again",
    }
    found = (fault for pattern, fault in faults.items() if re.match(pattern, value))
    return next((f"the key in {source} {fault}" for fault in found), "")


class DeviceAuthorization:
    """A log-in that waits for its user's approval in the browser (RFC 8628).

    verification_uri, user_code: where to approve it, and what the page must show; expires_in:
    seconds until it is too late.
    """

    PATH = "/api/v1/oauth2/device/code"
    GRANT = "urn:ietf:params:oauth:grant-type:device_code"
    SCOPE = "openid profile email model.completion"
    # RFC 8628 3.5; Qwen Code's first interval.
    FIRST_INTERVAL = 2.0
    # By the answer's error, or by its status.
    VERDICTS = {
        "access_denied": "the log-in was refused in the browser; run login again to start over",
        **dict.fromkeys(
            ("expired_token", 401), "the code has expired; run login again for a new one"
        ),
    }

    def __init__(self, oauth_base_url: str, forwarding: Forwarding = DIRECT):
        """Ask for a code (RFC 8628 3.1); raises UpstreamError when the host gives none."""
        # Here, since it costs every start 2 ms.
        import uuid

        # RFC 7636 4.1, 4.2.
        verifier = secrets.token_urlsafe(32)
        SECRETS.add(verifier)
        digest = hashlib.sha256(verifier.encode()).digest()
        form = {
            "scope": self.SCOPE,
            "code_challenge": base64.urlsafe_b64encode(digest).rstrip(b"=").decode(),
            "code_challenge_method": "S256",
        }
        headers = {"x-request-id": str(uuid.uuid4())}
        status, answer, detail = post_form(oauth_base_url, self.PATH, form, forwarding, headers)
        if not answer or not isinstance(answer.get("device_code"), str):
            raise UpstreamError(f"the device authorization endpoint answered {status}: {detail}")
        named = (answer.get("verification_uri_complete"), answer.get("verification_uri"))
        pages = [page for page in map(as_text, named) if self.is_page_of(oauth_base_url, page)]
        if not pages:
            raise UpstreamError(
                "the device authorization endpoint named no page of its own site for the approval"
            )
        self.verification_uri = pages[0]
        self.user_code = str(answer.get("user_code") or "")[:60]
        self.expires_in = seconds_in(answer.get("expires_in"), 900)
        poll = {
            "grant_type": self.GRANT,
            "device_code": answer["device_code"],
            "code_verifier": verifier,
        }
        self._poll = functools.partial(post_form, oauth_base_url, TOKEN_PATH, poll, forwarding)

    def wait(self, sleep: Callable[[float], None] = time.sleep) -> Login:
        """Return the login when the user has approved (RFC 8628 3.4).

        slow_down arrives as HTTP 429 here, not as RFC 8628's 400; a 200 with access_token null is
        'pending' (Qwen Code, qwenOAuth2.ts). Raises CredentialError when no approval will come.
        """
        interval, deadline = self.FIRST_INTERVAL, time.monotonic() + self.expires_in
        while time.monotonic() < deadline:
            sleep(interval)
            try:
                status, answer, detail = self._poll()
            except UpstreamError as error:
                # A network that comes and goes must not end the log-in.
                log.warning("%s", error)
                continue
            reason = dig(answer, "error")
            if status == 200 and answer is not None and not reason:
                if answer.get("access_token") is not None:
                    return Login.from_answer(answer, {})
            elif reason == "authorization_pending":
                interval = self.FIRST_INTERVAL
            elif reason == "slow_down":
                interval = min(interval * 1.5, 10.0)
            elif answer is not None or status < 500:
                verdict = self.VERDICTS.get(as_text(reason)) or self.VERDICTS.get(status)
                raise CredentialError(
                    verdict or f"the token endpoint answered {status}: {detail}; run login again"
                )
        minutes = f"{self.expires_in / 60:.0f} minutes"
        raise CredentialError(f"the log-in was not approved within {minutes}; run login again")

    @staticmethod
    def is_page_of(base_url: str, address: str) -> bool:
        """Return whether an address is a page of the same site; a browser would open anything.

        >>> DeviceAuthorization.is_page_of(OAUTH_BASE_URL, OAUTH_BASE_URL + "/authorize")
        True
        """
        if base_url_fault(address):
            return False
        ours, theirs = urllib.parse.urlsplit(base_url), urllib.parse.urlsplit(address)
        host, other = ours.hostname or "", theirs.hostname or ""
        is_address = host.replace(".", "").isdigit() or ":" in host
        # chat.qwen.ai is a page of qwen.ai, and so are its other names.
        site = host if is_address or host.count(".") < 2 else host.partition(".")[2]
        return (other == site or other.endswith("." + site)) and theirs.scheme == ours.scheme


# ------------------------------------------------------------------------------------------------
# Providers
# ------------------------------------------------------------------------------------------------


class Provider:
    """One base URL with the one credential that belongs to it, and what it is known to serve.

    name: for --provider, `provider/model` and x-qwen-provider; host: that of the base URL which
    settings or options name; oauth: its credentials if they are a login, None if they are a key;
    family: the kind of its endpoint; entries: model id -> generationConfig of settings.json;
    source: where all this was found; cooldown_until: another provider goes first until then
    (monotonic); refusal: why it could not serve the last request, for /health.
    """

    # How long a refusal counts that may pass, so that a probe lets requests in again.
    REFUSED = 60

    def __init__(
        self,
        name: str,
        base_url: str,
        credentials: OAuthCredentials | ApiKey,
        source: str,
        entries: dict[str, Json] | None = None,
        family: Family | None = None,
    ):
        self.name, self.credentials, self.source = name, credentials, source
        self.oauth = credentials if isinstance(credentials, OAuthCredentials) else None
        self.entries = entries or {}
        self.family = family or family_of(base_url)
        self.stated_url = base_url.rstrip("/")
        self.host = host_of(self.stated_url)
        # generationConfig of models without an entry.
        self.defaults: Json = {}
        self.cooldown_until = 0.0
        self.refusal: Json | None = None

    @property
    def base_url(self) -> str:
        """The base URL, '' if there is none; for an OAuth login that which its file names now."""
        return self.stated_url or (self.oauth.base_url() if self.oauth else "")

    def model_ids(self, listed: Iterable[str] = ()) -> list[str]:
        """Return the models that the provider is known to serve, none if only the upstream knows.

        Those of the settings come first; listed: its live list, which is better than any table.
        """
        return list(dict.fromkeys([*self.entries, *listed])) or list(self.family.models)

    def problem(self) -> str | None:
        """Return why the provider cannot be used; None when it can."""
        check = self.oauth.login if self.oauth else self.credentials.access_token
        try:
            check()
        except CredentialError as error:
            return error.message
        return None

    def note(self, error: ProxyError) -> None:
        """Remember a refusal, unless it was the request's own fault or a limit per minute."""
        if error.status == 401 or error.status >= 500 or error.code == "insufficient_quota":
            self.refusal = {
                "at": int(time.time()),
                "status": error.status,
                **error.error_object(),
            }

    def is_refusing(self) -> bool:
        """Return whether the next request is likely to be refused as the last one was."""
        if not self.refusal:
            return False
        is_lasting = self.refusal["status"] == 401 or self.refusal["code"] == "insufficient_quota"
        return is_lasting or bool(time.time() - self.refusal["at"] < self.REFUSED)

    def describe(self) -> Json:
        """Return facts for status; nothing secret."""
        problem = self.problem()
        return {
            "name": self.name,
            "family": self.family.name,
            # An OAuth login with a problem has none.
            "base_url": (self.stated_url if problem else self.base_url) or None,
            "source": self.source,
            "models": self.model_ids(),
            "login": self.credentials.describe(),
            "problem": problem,
        }


class Target(NamedTuple):
    """A provider and the model id to ask it for."""

    provider: Provider
    model: str

    @property
    def config(self) -> Json:
        """generationConfig of the model's entry in settings.json, or of models without one."""
        return self.provider.entries.get(self.model, self.provider.defaults)


def family_of(base_url: str, variable: str = "") -> Family:
    """Return the kind of an endpoint: by its host, else by the key's variable or the path."""
    host, families = host_of(base_url), FAMILIES.values()
    by_host = (family for family in families if re.search(family.hosts, host))
    by_variable = (family for family in families if variable and family.variable == variable)
    by_path = FAMILIES["dashscope" if "/compatible-mode/" in base_url + "/" else "other"]
    return next(itertools.chain(by_host, by_variable), by_path)


def qwen_home(environ: Mapping[str, str], option: str | None = None) -> str:
    """Return the folder of the CLI: --qwen-home, QWEN_HOME, ~/.qwen. Qwen Code, storage.ts."""
    home = environ.get("HOME") or os.path.expanduser("~")
    named = option or environ.get("QWEN_HOME")
    # Qwen Code reads QWEN_HOME from the home .env files too.
    for path in (os.path.join(home, ".qwen", ".env"), os.path.join(home, ".env")):
        with contextlib.suppress(OSError):
            named = named or parse_dotenv(read_regular(path, "replace")[0]).get("QWEN_HOME")
    if not named:
        return os.path.join(home if os.path.isabs(home) else tempfile.gettempdir(), ".qwen")
    if named == "~" or named.startswith(("~/", "~\\")):
        named = home + named[1:]
    return os.path.abspath(named)


def parse_dotenv(text: str) -> dict[str, str]:
    r"""Return NAME=value lines as the dotenv package reads them.

    >>> parse_dotenv('export A=1 # note\nB="x\\ny"') == {"A": "1", "B": "x\ny"}
    True
    """
    line = r"""(?mx) ^[ \t]*(?:export[ \t]+)?([\w.-]+)[ \t]*[=:][ \t]*
        (?: ("(?:\\.|[^"\\])*" | '[^']*' | `[^`]*`) | ([^#\r\n]*) )"""
    values = {}
    for name, quoted, bare in re.findall(line, text):
        value = quoted[1:-1] or bare.strip()
        if quoted.startswith('"'):
            value = value.replace("\\n", "\n").replace("\\r", "\r").replace('\\"', '"')
        values[name] = value
    return values


def parse_settings(text: str) -> Json:
    """Return the object in a settings.json, comments allowed; raises ValueError, RecursionError.

    >>> parse_settings('{"url": "http://x" /* why */ } // end')
    {'url': 'http://x'}
    """
    string_or_comment = r'(?s)("(?:\\.|[^"\\])*")|//[^\r\n]*|/\*.*?\*/'
    settings = json.loads(re.sub(string_or_comment, lambda match: match.group(1) or " ", text))
    if not isinstance(settings, dict):
        raise ValueError("it is not a JSON object")
    return settings


def expand_variables(value: Any, environ: Mapping[str, str]) -> Any:
    """Replace $NAME and ${NAME} in every string of a JSON value; unknown names stay."""

    def known(match: re.Match[str]) -> str:
        name = match.group(1) or match.group(2)
        # Qwen Code, settings.ts.
        is_kept = name.upper() in ("SESSION_ID", "QWEN_CODE_SESSION_ID")
        return match.group() if is_kept else environ.get(name, match.group())

    if isinstance(value, str):
        return re.sub(r"\$(?:(\w+)|\{(\w+)\})", known, value)
    if isinstance(value, dict):
        return {name: expand_variables(item, environ) for name, item in value.items()}
    if isinstance(value, list):
        return [expand_variables(item, environ) for item in value]
    return value


def merge(low: Json, high: Json) -> Json:
    """Return two settings objects merged in depth; the second one wins."""
    in_both = {
        name: merge(low[name], value)
        for name, value in high.items()
        if isinstance(value, dict) and isinstance(low.get(name), dict)
    }
    return {**low, **high, **in_both}


def current_form(settings: Json) -> Json:
    """Return one settings file's object as version 5 has it; what its version lacks is left out.

    Qwen Code, its migrations: a flat model and selectedAuthType count below version 2, a list of
    models within an object in version 5 or without one.
    """
    version, model = settings.get("$version"), settings.get("model")
    current = without_keys(settings, ("model",)) if isinstance(model, str) else settings
    if not isinstance(version, int) or version < 2:
        moved = {
            "security": {"auth": stated({"selectedType": settings.get("selectedAuthType")})},
            "advanced": stated({"excludedEnvVars": settings.get("excludedProjectEnvVars")}),
            "model": {"name": model} if isinstance(model, str) else {},
        }
        current = merge(moved, current)
    listed = as_object(settings.get("modelProviders"))
    unwrapped: Json = {
        kind: entries.get("models") if version in (None, 5) else []
        for kind, entries in listed.items()
        if isinstance(entries, dict)
    }
    return {**current, "modelProviders": {**listed, **unwrapped}} if listed else current


def layered(*layers: Mapping[str, Any]) -> dict[str, str]:
    """Return the variables of all layers; an empty value leaves its name to the next one.

    >>> layered({"A": "", "B": "1"}, {"A": "2", "B": "3"})
    {'A': '2', 'B': '1'}
    """
    merged: dict[str, str] = {}
    for layer in layers:
        for name, value in layer.items():
            if isinstance(value, str) and not merged.get(name):
                merged[name] = value
    return merged


class WatchedFiles:
    """The CLI's files in their last good state, and what they looked like when they were read.

    While the program runs, a file that cannot be read or parsed any more, is emptied or gone (an
    editor at work, a full disk) keeps its last good state, and a warning says so: another account
    must not silently stand in for the one that the file names.
    """

    def __init__(self) -> None:
        self._good: dict[str, Json] = {}
        self._warned: dict[str, str] = {}
        self._stamps: dict[str, Any] = {}

    def load(self, path: str, parse: Callable[[str], Json]) -> tuple[Json, str]:
        """Return what is in a file, or was when it was good, and '', or else why it is no good."""
        self._stamps[path] = stamp_of(path)
        good, fault = self._good.get(path), ""
        try:
            text, _ = read_regular(path, "replace")
            if good and not text.strip():
                raise ValueError("it is empty")
            self._good[path] = parse(text)
        except (OSError, ValueError, RecursionError) as error:
            is_absent = isinstance(error, FileNotFoundError) and not os.path.islink(path)
            fault = "" if is_absent and not good else reason_of(error)
        if path not in self._good:
            return {}, fault
        if fault and fault != self._warned.get(path):
            log.warning("%s: %s; what it said before still counts", path, fault)
        elif self._warned.get(path) and not fault:
            log.info("%s can be read again", path)
        self._warned[path] = fault
        return self._good[path], ""

    def exists(self, path: str) -> bool:
        """Return whether there is such a file, or was one that was good; watch for it."""
        self._stamps[path] = stamp_of(path)
        return os.path.lexists(path) or path in self._good

    def has_changed(self) -> bool:
        """Return whether a file that was asked for does not look as it did then."""
        return any(stamp_of(path) != stamp for path, stamp in self._stamps.items())


class CliSettings:
    """What the CLI's settings files, .env files and the environment say together.

    Qwen Code, settings.ts: system defaults < user < project < system for the files; the
    environment, then .env files, then settings.env for variables. Files of the working directory
    and above count only where trustedFolders.json trusts the folder that holds them: a cloned
    repository must not be able to send a key to its own host.
    """

    FOLDERS = {
        "darwin": "/Library/Application Support/QwenCode",
        "win32": "C:\\ProgramData\\qwen-code",
    }

    def __init__(
        self,
        home: str,
        environ: Mapping[str, str],
        folder: str,
        files: WatchedFiles | None = None,
    ):
        self.home, self.environ, self._files = home, environ, files or WatchedFiles()
        self.files: list[str] = []
        self.notes: list[str] = []
        self._faults: dict[str, str] = {}
        self._user_home = environ.get("HOME") or os.path.expanduser("~")
        # The user's own .env files, the most important first, and those of the CLI among them.
        of_cli = [os.path.join(home, ".env"), os.path.join(self._user_home, ".qwen", ".env")]
        paths = dict.fromkeys([*of_cli, os.path.join(self._user_home, ".env")])
        found = {path: self._load(path, parse_dotenv) for path in paths}
        self._own = layered(*found.values())
        self._of_cli = layered(*(found[path] for path in of_cli))
        self.values: Json = {}
        # security.auth of the file that holds the key: another file must not move it.
        self._stored: Json = {}
        # Names that a project's .env does not set: those of all files together.
        self._excluded: list[Any] = []
        self.problem = ""
        self._read_settings(folder)
        self.variables = layered(self._project_variables(folder), self._own)
        known = {**self.variables, **environ}
        of_settings = expand_variables(as_object(self.values.get("env")), known)
        self.variables = layered(self.variables, of_settings)
        known = layered(environ, self.variables)
        self.values = expand_variables(self.values, known)
        self._stored = expand_variables(self._stored, known)
        SECRETS.add_settings(self.values)
        SECRETS.add_settings(self.variables)
        self.forwarding = Forwarding(self.variable, self.values.get("proxy"))
        # For what has none of its own, by the name of each.
        self.base_urls = {
            "OPENAI_BASE_URL": self.variable("OPENAI_BASE_URL"),
            "security.auth.baseUrl in settings.json": dig(
                self.values, "security", "auth", "baseUrl"
            ),
        }

    def variable(self, name: str) -> str:
        """Return a variable without blanks around it; '' when it is unset or empty."""
        return (self.environ.get(name) or self.variables.get(name) or "").strip()

    def key(self, variable: str, base_url: str) -> ApiKey:
        """Return the key in a variable; without one, an ApiKey that says so when it is asked.

        security.auth.apiKey stands in for OPENAI_API_KEY, unless it was stored for another base
        URL.
        """
        value, own = self.variable(variable), as_text(self._stored.get("baseUrl")).strip()
        if variable == "OPENAI_API_KEY" and own.rstrip("/") in ("", base_url.rstrip("/")):
            stored = as_text(self._stored.get("apiKey")).strip()
            if stored and not value:
                return ApiKey(stored, "security.auth.apiKey in settings.json")
        problem = (
            f"the variable {variable} is not set; set it in the environment, in ~/.qwen/.env, or "
            "run `qwen` and then /auth"
        )
        return ApiKey(value, variable, "" if value else problem)

    def login_at(self, path: str) -> OAuthCredentials:
        """Return the login in a file. Its host gets the refresh token: no project may move it."""
        host = layered(self.environ, self._of_cli).get("QWEN_OAUTH_BASE_URL") or OAUTH_BASE_URL
        return OAuthCredentials(path, host, self.forwarding)

    def config(self, entry: Json) -> Json:
        """Return an entry's generationConfig with the reasoning that the CLI would ask for.

        profile: how its endpoint spells that. Qwen Code, docs/users/configuration/model-providers.
        """
        config = dict(as_object(entry.get("generationConfig")))
        reasoning = config.pop(
            "reasoning", dig(self.values, "model", "generationConfig", "reasoning")
        )
        effort = as_effort(dig(self.values, "model", "reasoningEffort"))
        if effort == "none" and not config.get("thinkingMandatory"):
            reasoning = False
        elif effort and reasoning is not False:
            reasoning = {**as_object(reasoning), "effort": effort}
        profile = as_object(dig(entry, "capabilities", "reasoning"))
        if "samplingParams" in config and not profile:
            reasoning = None
        return {**config, **stated({"reasoning": reasoning, "profile": profile or None})}

    def _project_variables(self, folder: str) -> Json:
        """Return what the nearest .env of the working directory or above says.

        Both that directory and the folder that holds the file must be trusted. The names that the
        settings exclude count in .qwen/.env only.
        """
        below, above, user_home = "", folder, os.path.realpath(self._user_home)
        while above != below and os.path.realpath(above) != user_home:
            of_cli, plain = os.path.join(above, ".qwen", ".env"), os.path.join(above, ".env")
            for path, excluded in (
                (of_cli, []),
                (plain, self._excluded or ["DEBUG", "DEBUG_MODE"]),
            ):
                if self._counts(above, path) and self._is_trusted(folder):
                    return without_keys(self._load(path, parse_dotenv), excluded)
            below, above = above, os.path.dirname(above)
        return {}

    def _read_settings(self, folder: str) -> None:
        system = self.environ.get("QWEN_CODE_SYSTEM_SETTINGS_PATH") or os.path.join(
            self.FOLDERS.get(sys.platform, "/etc/qwen-code"), "settings.json"
        )
        defaults = self.environ.get("QWEN_CODE_SYSTEM_DEFAULTS_PATH") or os.path.join(
            os.path.dirname(system), "system-defaults.json"
        )
        project = os.path.join(folder, ".qwen", "settings.json")
        trusted = [project] if self._counts(folder, project) else []
        for path in [defaults, os.path.join(self.home, "settings.json"), *trusted, system]:
            settings = current_form(self._load(path, parse_settings))
            auth = as_object(dig(settings, "security", "auth"))
            self._stored = auth if auth.get("apiKey") else self._stored
            self.values = merge(self.values, settings)
            excluded = dig(settings, "advanced", "excludedEnvVars")
            self._excluded += [excluded] if isinstance(excluded, str) else as_list(excluded)
            if path in self._faults and path not in trusted and not self.problem:
                # Here the CLI stops.
                ways_out = "mend it, or start with --provider NAME"
                self.problem = f"{path} cannot be used: {self._faults[path]}; {ways_out}"

    def _load(self, path: str, parse: Callable[[str], Json]) -> Json:
        found, fault = self._files.load(path, parse)
        if fault and path not in self._faults:
            self._faults[path] = fault
            self.notes.append(f"{path} is ignored: {fault}")
        elif found and path not in self.files:
            self.files.append(path)
        return found

    def _counts(self, folder: str, path: str) -> bool:
        """Return whether there is such a file, not the user's own, in a trusted folder."""
        own = {
            os.path.realpath(os.path.join(base, name))
            for base in (self.home, os.path.join(self._user_home, ".qwen"), self._user_home)
            for name in (".env", "settings.json")
        }
        if not self._files.exists(path) or os.path.realpath(path) in own:
            return False
        is_trusted = self._is_trusted(folder)
        if not is_trusted:
            self.notes.append(
                f"not read, since trustedFolders.json does not trust its folder: {path}"
            )
        return is_trusted

    def _is_trusted(self, folder: str) -> bool:
        """Return whether a folder is trusted: the most specific rule decides.

        Qwen Code, trustedFolders.ts. Of two rules for one folder DO_NOT_TRUST counts.
        """
        named = layered(self.environ, self._own).get("QWEN_CODE_TRUSTED_FOLDERS_PATH")
        path = named or os.path.join(self.home, "trustedFolders.json")
        # Folders in the path of each rule that fits, and whether it is one that denies.
        fitting = [(0, True)]
        for rule, level in self._load(path, parse_settings).items():
            if level in ("TRUST_FOLDER", "TRUST_PARENT", "DO_NOT_TRUST"):
                root = os.path.dirname(rule.rstrip(os.sep)) if level == "TRUST_PARENT" else rule
                for prefix, place in itertools.product(spellings(root), spellings(folder)):
                    if place.startswith(prefix):
                        fitting.append((prefix.count(os.sep), level == "DO_NOT_TRUST"))
        return not max(fitting)[1]


def spellings(path: str) -> set[str]:
    """Return a folder's path without `..`, with its links and without, and os.sep at its end."""
    paths = (os.path.abspath(path), os.path.realpath(path))
    return {os.path.normcase(each).rstrip(os.sep) + os.sep for each in paths}


def name_at(base_url: str) -> str:
    """Return the name of a provider at a base URL: that of its preset, else the host."""
    names = {url: name for name, (url, _) in PRESETS.items()}
    return names.get(base_url.rstrip("/")) or host_of(base_url, with_port=True)


def keyed_provider(
    settings: CliSettings, where: str, name: str, base_url: str, variable: str
) -> Provider:
    """Return a provider with the key of a variable; where: what names it."""
    key, family = settings.key(variable, base_url), family_of(base_url, variable)
    return Provider(name, base_url, key, f"{where}, {variable}", family=family)


def unusable_provider(where: str, problem: str) -> Provider:
    """Return a provider that has nothing but a problem; where: what was meant to name it."""
    return Provider("unnamed", "", ApiKey("", where, problem), where)


class SettingsProviders:
    """The providers of modelProviders: one for each base URL and key variable, in file order."""

    FLAGS = ("voiceOnly", "imageOnly", "realtimeOnly")
    # Kinds of providers that have no OpenAI-compatible endpoint here.
    OTHERS = ("anthropic", "gemini", "vertex-ai", "qwen-oauth")

    def __init__(self, settings: CliSettings):
        self._settings = settings
        # What is there and cannot be used, with its field.
        self.notes: list[str] = []
        self.providers: dict[tuple[str, str], Provider] = {}
        # Of a model id, and of one at a base URL, the provider of the first entry, which counts
        # for the CLI; it may be one that is not read.
        self.first: dict[tuple[str, str], Provider] = {}
        protocols = as_object(dig(settings.values, "providerProtocol"))
        kinds = settings.values.get("modelProviders", {})
        if not isinstance(kinds, dict):
            self.notes.append("modelProviders in settings.json must be an object")
        for kind, entries in as_object(kinds).items():
            where, protocol = f"modelProviders.{kind}", protocols.get(kind, kind)
            if protocol == "openai" and isinstance(entries, list):
                for index, entry in enumerate(entries):
                    self._read(stated(as_object(entry)), f"{where}[{index}] in settings.json")
            elif protocol == "openai":
                self.notes.append(f"{where} in settings.json must be a list of models")
            elif protocol not in self.OTHERS:
                fault = f"providerProtocol.{kind} must be openai"
                self.notes.append(f"{where} in settings.json is not read: {fault}")

    def _read(self, entry: Json, where: str) -> None:
        model, wire = as_text(entry.get("id")), entry.get("wireApi", "chat-completions")
        flag = next((flag for flag in self.FLAGS if entry.get(flag)), "")
        faults = (
            (not model, "its id must be a string"),
            (flag, f"{flag} is no chat model"),
            (wire != "chat-completions", f"wireApi {shorten(str(wire), 40)} is not spoken here"),
        )
        fault = next((words for is_wrong, words in faults if is_wrong), "")
        base_url, problem = self._base_url(entry)
        if fault:
            self.notes.append(f"{where} is not read: {fault}")
            provider = unusable_provider(where, f"{where}: {fault}")
        else:
            provider = self._provider(entry, where, base_url, problem)
        provider.entries.setdefault(model, self._settings.config(entry))
        self.first.setdefault((model, base_url), provider)
        self.first.setdefault((model, ""), provider)

    def _provider(self, entry: Json, where: str, base_url: str, problem: str) -> Provider:
        """Return the provider that an entry belongs to; key and base URL come from it alone.

        The CLI would fall back from an unset envKey to OPENAI_API_KEY, and so send one company's
        key to another; here a variable that is not set stays an error with its name in it. Nor does
        anything wrong or missing get a default host.
        """
        variable = as_text(entry.get("envKey", "OPENAI_API_KEY")).strip()
        problem = problem if variable else "envKey must be the name of a variable"
        key = (where if problem else base_url, variable)
        if key not in self.providers:
            made = (
                unusable_provider(where, f"{where}: {problem}")
                if problem
                else keyed_provider(self._settings, where, name_at(base_url), base_url, variable)
            )
            taken = [other.name.split("#")[0] for other in self.providers.values()].count(made.name)
            made.name += f"#{taken + 1}" if taken else ""
            self.providers[key] = made
        return self.providers[key]

    def _base_url(self, entry: Json) -> tuple[str, str]:
        """Return an entry's base URL and '', or what it says and why that is none."""
        urls = {"baseUrl": entry.get("baseUrl"), **self._settings.base_urls}
        for name, url in urls.items():
            if url and str(url).strip():
                base_url = url.strip().rstrip("/") if isinstance(url, str) else url
                fault = base_url_fault(base_url)
                return str(base_url), f"{name} {fault}" if fault else ""
        return "", "baseUrl is missing, and no host is guessed for a key"


def environment_provider(settings: CliSettings, base_url: Any, source: str) -> Provider:
    """Return a provider at a base URL from the command line or environment, with its key.

    That is OPENAI_API_KEY, the deprecated security.auth.apiKey, or the variable of a plan, if the
    base URL is on that plan's host.
    """
    base_url = base_url.strip() if isinstance(base_url, str) else base_url
    fault = base_url_fault(base_url)
    if fault:
        return unusable_provider(source, f"{source} {fault}")
    plans = {host_of(url): name for url, name in PRESETS.values()}
    names = ("OPENAI_API_KEY", plans.get(host_of(base_url, with_port=True), ""))
    variable = next(filter(settings.variable, names), "OPENAI_API_KEY")
    return Provider(name_at(base_url), base_url, settings.key(variable, base_url), source)


def login_names(folder: str) -> tuple[list[str], str]:
    """Return the names of the login files in a folder, and why it cannot be searched."""
    try:
        return sorted(fnmatch.filter(os.listdir(folder), "oauth_creds*.json")), ""
    except OSError as error:
        return [], "" if isinstance(error, FileNotFoundError) else reason_of(error)


def oauth_providers(settings: CliSettings, known: dict[str, OAuthCredentials]) -> list[Provider]:
    """Return a provider for oauth_creds.json and for every oauth_creds*.json beside it."""
    names, fault = login_names(settings.home)
    if fault:
        settings.notes.append(f"{settings.home} cannot be searched for logins: {fault}")
    providers = []
    for name in dict.fromkeys(["oauth_creds.json", *names]):
        path, portal = os.path.join(settings.home, name), FAMILIES["portal"]
        login = known.setdefault(path, settings.login_at(path))
        suffix = name[len("oauth_creds") : -len(".json")].strip("._-")
        label = f"oauth-{suffix}" if suffix else "oauth"
        providers.append(Provider(label, "", login, path, {OAUTH_MODEL: {}}, portal))
    return providers


class Discovery:
    """Everything that can be used on this machine, the active provider first.

    model: for requests that name none; is_chosen: whether an option names the active provider;
    notes: what a person should know, such as skipped files; problem: settings that cannot be read,
    as nothing stands in for what they may name; advice: what to do as long as there is no provider.
    """

    # The kind of login that variables stand for, if all of them are set.
    KINDS = (
        ("openai", ("OPENAI_API_KEY", "OPENAI_BASE_URL", "OPENAI_MODEL")),
        ("openai", ("OPENAI_API_KEY", "OPENAI_BASE_URL", "QWEN_MODEL")),
        ("anthropic", ("ANTHROPIC_API_KEY", "ANTHROPIC_BASE_URL", "ANTHROPIC_MODEL")),
        ("gemini", ("GEMINI_API_KEY", "GEMINI_MODEL")),
    )
    NO_LOGIN = (
        "no Qwen login on this machine. With a key: DASHSCOPE_API_KEY=YOUR_KEY python3 "
        "qwen_proxy.py --provider dashscope-intl (--help names the other providers and their "
        "variables). Or run `qwen` and then /auth, where an API key can be set up. `python3 "
        f"qwen_proxy.py login` comes last: that free tier ended on {FREE_TIER_END}, and chat is "
        "refused"
    )

    def __init__(self, options: Options, settings: CliSettings, known: dict[str, OAuthCredentials]):
        self._options, self._settings = options, settings
        self.settings_files, self.notes = settings.files, settings.notes
        self.is_chosen = bool(options.provider or options.base_url)
        self.problem = "" if self.is_chosen else settings.problem
        self._wanted, self._wanted_at = self._wanted_model()
        listed = SettingsProviders(settings)
        self._listed, self._first = list(listed.providers.values()), listed.first
        self._oauth = oauth_providers(settings, known)
        self.advice = self.problem or "; ".join(listed.notes) or self.NO_LOGIN
        # The first that applies names the active provider, or says why there can be none.
        rules = (
            self._by_option,
            self._by_kind,
            self._by_entry,
            self._by_environment,
            self._by_first_entry,
            self._by_lone_key,
        )
        try:
            found = filter(None, (rule() for rule in rules))
            active = None if self.problem else next(found, None)
        except CredentialError as error:
            active, self.advice = None, error.message
        self.notes += listed.notes
        self.model = self._default_model(active)
        # None is chosen in the place of one that was meant.
        self.providers = [active, *self._others(active)] if active else []
        common = {"generationConfig": dig(settings.values, "model", "generationConfig")}
        for provider in self.providers:
            provider.defaults = settings.config(common)
            reason = provider.oauth and LoginFile(provider.oauth.path).why_not_saved()
            if reason:
                self.notes.append(
                    f"{provider.source} cannot be saved ({reason}): a refreshed token stays in "
                    "memory only, and after a restart the login is dead, for the CLI too"
                )

    def summary(self) -> str:
        """Return what would be used, in one line for the log."""
        if not self.providers:
            return self.advice
        active, *others = self.providers
        names = ", ".join(sorted(other.name for other in others))
        besides = f"; besides {names}" if names else ""
        return f"{self.model or 'no model'} via {active.name} ({active.source}){besides}"

    def _by_option(self) -> Provider | None:
        if self._options.base_url:
            return environment_provider(self._settings, self._options.base_url, "--base-url")
        name, found = self._options.provider, self._listed + self._oauth
        if not name:
            return None
        for provider in found:
            if name in (provider.name, provider.host):
                return provider
        if name in PRESETS or WORKSPACE_HOST.match(name):
            return self._preset(name)
        known = sorted({*PRESETS, "oauth", *(provider.name for provider in found)})
        raise CredentialError(f"there is no provider {name!r}; known are {', '.join(known)}")

    def _preset(self, name: str) -> Provider:
        """Return the provider of a preset or at a workspace's host."""
        workspace = f"https://{name}/compatible-mode/v1"
        preset = PRESETS.get(name) or (workspace, family_of(workspace).variable)
        return keyed_provider(self._settings, f"--provider {name}", name, *preset)

    def _by_kind(self) -> Provider | None:
        """Return the OAuth login if that is the kind of login that the CLI uses.

        The kind is selected, or guessed from the environment. Raises CredentialError for one that
        is neither that nor a key for an OpenAI-compatible endpoint.
        """
        auth = as_object(dig(self._settings.values, "security", "auth"))
        set_kinds = (kind for kind, names in self.KINDS if all(map(self._settings.variable, names)))
        kind, enforced = auth.get("selectedType") or next(set_kinds, None), auth.get("enforcedType")
        way_out = "choose another one with --provider NAME"
        if enforced and enforced != kind:
            raise CredentialError(
                f"security.auth.enforcedType in settings.json allows {shorten(str(enforced), 40)} "
                f"only, and the CLI is set to {shorten(str(kind or 'nothing'), 40)}; {way_out}"
            )
        if kind and kind not in ("openai", "qwen-oauth"):
            raise CredentialError(
                f"the CLI is set to {shorten(str(kind), 40)} (security.auth.selectedType in "
                "settings.json, or the environment), which has no OpenAI-compatible endpoint here; "
                f"{way_out}"
            )
        own = self._oauth[0]
        is_there = own.oauth and own.oauth.is_there()
        return own if kind == "qwen-oauth" or kind is None and is_there else None

    def _by_entry(self) -> Provider | None:
        """Return the provider of the entry with the wanted id: that at model.baseUrl, or the first.

        It is never another one because that cannot be used. Qwen Code, its model resolver.
        """
        if not self._wanted:
            return None
        at_url = self._first.get((self._wanted, self._wanted_at))
        return at_url or self._first.get((self._wanted, ""))

    def _by_environment(self) -> Provider | None:
        for source, url in self._settings.base_urls.items():
            if url not in (None, ""):
                return environment_provider(self._settings, url, source)
        # The CLI would send this key for such a model to a host that it guesses.
        has_key = self._settings.variable("OPENAI_API_KEY")
        return self._by_lone_key() if self._wanted and has_key and self._listed else None

    def _by_first_entry(self) -> Provider | None:
        """Return the first entry, or that of the CLI's default model if none is named.

        It is never another one because that has no key.
        """
        default = None if self._wanted else self._first.get((DEFAULT_MODEL, ""))
        return default or next(iter(self._listed), None)

    def _by_lone_key(self) -> Provider | None:
        """Return the provider of the only key in the environment, if its host is certain."""
        variable = self._settings.variable
        variables = sorted({name for _, name in PRESETS.values() if variable(name)})
        fitting = [name for name, (_, key) in PRESETS.items() if key in variables]
        if len(fitting) == 1:
            return self._preset(fitting[0])
        if variables:
            choices = " or ".join(f"--provider {name}" for name in fitting)
            raise CredentialError(
                f"{' and '.join(variables)} is set, but the key works on more than one host, and "
                f"the proxy does not guess: start with python3 qwen_proxy.py {choices}"
            )
        if variable("OPENAI_API_KEY"):
            raise CredentialError(
                "OPENAI_API_KEY is set, but not its host; add --base-url URL or OPENAI_BASE_URL"
            )
        return None

    def _wanted_model(self) -> tuple[str, str]:
        """Return the model that the CLI would use, and the base URL that settings.json has for it.

        Of two entries with one id it tells which is meant.
        """
        option, variable = self._options.model, self._settings.variable
        stored = as_object(self._settings.values.get("model"))
        name = re.sub(r"^\$runtime\|[^|]*\|", "", as_text(stored.get("name")))
        base_url = as_text(stored.get("baseUrl")).rstrip("/") if name and not option else ""
        named = option or name or variable("OPENAI_MODEL") or variable("QWEN_MODEL")
        return named, base_url

    def _default_model(self, active: Provider | None) -> str:
        wanted = self._wanted
        if active is None or self._options.model:
            return wanted or DEFAULT_MODEL
        if active.oauth:
            # Qwen Code: any other name falls back to it.
            return OAUTH_MODEL
        if active in self._listed and wanted not in active.entries:
            # The first entry's own; see _by_first_entry().
            wanted = DEFAULT_MODEL if not wanted and DEFAULT_MODEL in active.entries else ""
        return wanted or next(iter(active.model_ids()), active.family.default_model)

    def _others(self, active: Provider) -> list[Provider]:
        present = [each for each in self._oauth if each.oauth and each.oauth.is_there()]
        others = [provider for provider in self._listed + present if provider is not active]
        for provider in others:
            # --base-url at the host of an entry: another key, and so another name.
            if provider.name == active.name:
                provider.name += "#settings"
        return others


class Serving:
    """Who serves which model: the one list that /v1/models shows and that requests follow.

    A model belongs to the provider whose settings list it, since that is whose key the CLI would
    use; then to the active provider, if its own list names it. One that cannot be used is passed
    over where another has the model, but never the active one for a model of its own, nor one that
    was named.
    """

    def __init__(self, discovery: Discovery, lists: list[list[str]]):
        self._providers, self._is_chosen = discovery.providers, discovery.is_chosen
        # The settings may have changed since the lists were asked for.
        padded = itertools.chain(lists, itertools.repeat([]))
        # Ids in their order; as keys, since each request looks for one.
        self._known = [
            dict.fromkeys(provider.model_ids(listed))
            for provider, listed in zip(discovery.providers, padded)
        ]
        if self._known and not self._known[0] and discovery.model:
            self._known[0] = dict.fromkeys([discovery.model])

    def targets(self, model: str) -> list[Target]:
        """Return where a model is asked for, best first; never empty if there is a provider.

        An id that is not listed as it is counts without regard to case.
        """
        model = self._spelled(model)
        ranks = sorted((self._rank(place, model), place) for place in range(len(self._providers)))
        places = [place for rank, place in ranks if rank < 9]
        if not places or self._is_chosen and model not in self._known[0]:
            for provider in self._providers:
                if model.startswith(provider.name + "/"):
                    return [Target(provider, model[len(provider.name) + 1 :])]
        return [Target(self._providers[place], model) for place in places or [0]]

    def _spelled(self, model: str) -> str:
        """Return a model as the lists spell it, if they do."""
        if any(model in known for known in self._known):
            return model
        listed = itertools.chain.from_iterable(self._known)
        return next((name for name in listed if name.lower() == model.lower()), model)

    def listing(self) -> list[tuple[str, Target]]:
        """Return each model under the id that leads to it.

        That is `provider/model` where the plain id leads to another provider.
        """
        listed = []
        for provider, models in zip(self._providers, self._known):
            for model in models:
                is_first = self.targets(model)[0].provider is provider
                name = model if is_first else f"{provider.name}/{model}"
                listed.append((name, Target(provider, model)))
        return listed

    def _rank(self, place: int, model: str) -> int:
        """Return how good a provider is for a model, 0 the best; 9: it is not known to have it."""
        provider = self._providers[place]
        if place == 0 and (self._is_chosen or model in provider.entries):
            return 0
        if model in provider.entries:
            return 3 if provider.problem() else 1
        return 2 if place == 0 and model in self._known[0] else 9


class Providers:
    """The discovery, made anew when a file behind it changes; any thread may ask.

    Raises ValueError for --provider with a name that is unknown at the start.
    """

    MAX_MODEL_ID = 512
    # Look at the disk no more often.
    INTERVAL = 1.0

    def __init__(
        self,
        options: Options,
        environ: Mapping[str, str] | None = None,
        is_read_only: bool = False,
    ):
        self.options = options
        self._environ = dict(os.environ if environ is None else environ)
        self._known: dict[str, OAuthCredentials] = {}
        self._lock, self._checked, self._files = threading.Lock(), 0.0, WatchedFiles()
        self.aliases = [alias.partition("=")[::2] for alias in options.alias]
        self.home = qwen_home(self._environ, options.qwen_home)
        try:
            self._folder = os.getcwd()
        except OSError:
            # It was deleted. The home is no project.
            self._folder = self._environ.get("HOME") or os.path.expanduser("~")
        self._seed_login(is_read_only)
        self._discovery = self._discover()
        if options.provider and not self._discovery.providers:
            raise ValueError(self._discovery.advice)
        # The latest Serving, and what it was made from.
        self._serving: tuple[Any, Any] = (None, None)

    def current(self) -> Discovery:
        """Return the discovery as of now."""
        with self._lock:
            if time.monotonic() - self._checked > self.INTERVAL:
                self._checked = time.monotonic()
                if self._files.has_changed() or login_names(self.home)[0] != self._logins:
                    before, self._discovery = self._discovery.summary(), self._discover()
                    if self._discovery.summary() != before:
                        log.info("the settings were read again: %s", self._discovery.summary())
            return self._discovery

    def own_login(self) -> OAuthCredentials:
        """Return the login in oauth_creds.json, which may not be there yet."""
        return self._known[os.path.join(self.home, "oauth_creds.json")]

    def serving(self, lists: list[list[str]]) -> Serving:
        """Return who serves which model now; lists are the live ones, in the providers' order.

        It is the same object until the settings or one of the lists are others.
        """
        made_from, (before, serving) = (self.current(), lists), self._serving
        if made_from != before:
            serving = Serving(*made_from)
            self._serving = (made_from, serving)
        return serving  # type: ignore[no-any-return]

    def targets(self, model: Any, lists: list[list[str]] | None = None) -> list[Target]:
        """Return where a model can be had, best first: all with --failover, else only one.

        Several OAuth logins stand in for each other in any case, since that costs nothing. Raises
        BadRequest for a model that is no string, CredentialError when there is no login at all.
        """
        discovery = self.current()
        wanted = self._wanted(model) or discovery.model
        if discovery.problem:
            raise ProxyError(
                discovery.problem,
                503,
                "settings_unreadable",
                "server_error",
                headers=[("x-should-retry", "false")],
            )
        if not discovery.providers:
            raise CredentialError(". ".join([discovery.advice, *discovery.notes]))
        if not wanted:
            raise BadRequest(
                "the request names no model: name one of /v1/models, or start with --model ID",
                param="model",
            )
        targets = self.serving(lists or []).targets(wanted)
        if self.options.failover:
            return targets
        if targets[0].provider.oauth:
            return [target for target in targets if target.provider.oauth]
        return targets[:1]

    def _wanted(self, model: Any) -> str:
        """Return the model that a request means, after the aliases; empty if it names none."""
        if model is not None and not isinstance(model, str):
            raise BadRequest("model must be a string", param="model")
        name = (model or "").strip()
        if len(name) > self.MAX_MODEL_ID:
            raise BadRequest(f"model is longer than {self.MAX_MODEL_ID} characters", param="model")
        aliases = (meant for alias, meant in self.aliases if fnmatch.fnmatchcase(name, alias))
        return next(aliases, name)

    def _discover(self) -> Discovery:
        # Login files come and go.
        self._logins, _ = login_names(self.home)
        settings = CliSettings(self.home, self._environ, self._folder, self._files)
        self.forwarding = settings.forwarding
        return Discovery(self.options, settings, self._known)

    def _seed_login(self, is_read_only: bool) -> None:
        """Write QWEN_CLI_AUTH, the JSON of oauth_creds.json, where there is no such file.

        It is for containers.
        """
        seed, path = self._environ.get("QWEN_CLI_AUTH"), os.path.join(self.home, "oauth_creds.json")
        if not seed or os.path.lexists(path):
            return
        try:
            own = CliSettings(self.home, self._environ, self._folder).login_at(path)
            use = own.adopt if is_read_only else own.replace
            use(Login(loads(seed)))
            self._known[path] = own
        except CredentialError as error:
            log.warning("QWEN_CLI_AUTH is ignored: %s", error.message)


# ------------------------------------------------------------------------------------------------
# Upstream
# ------------------------------------------------------------------------------------------------


def selector_of(connection: socket.socket, event: int) -> Any:
    """Return a selector for whether a socket can be read, or takes bytes."""
    # select() fails from descriptor 1024 on; poll() is not there on Windows.
    selector = getattr(selectors, "PollSelector", selectors.SelectSelector)()
    selector.register(connection.fileno(), event)
    return selector


def send_some(connection: socket.socket, data: Any) -> Any:
    """Send what a socket that does not block takes now of bytes or a memoryview; returns the rest.

    Sockets with a timeout cost one more system call for each send, and a stream is little else.
    """
    try:
        sent = connection.send(data)
    except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
        sent = 0
    return memoryview(data)[sent:] if sent < len(data) else b""


def peek(connection: socket.socket) -> bytes | None:
    """Return a byte that has arrived, nothing at the end, None while nothing has."""
    try:
        # Not SSLSocket's recv, which takes no flags.
        return socket.socket.recv(connection, 1, socket.MSG_PEEK)
    except BlockingIOError:
        return None
    except OSError:
        return b""


class Waiter:
    """Waits for the upstream of one request, and looks at what else may end it.

    However ready the upstream is, the others are looked at by the clock: the client, which may have
    left (then the upstream is dropped, also before the first token), the sign of life that is due
    to it, the progress, and the server, which may stop. All waits raise ClientGone, ShuttingDown,
    and UpstreamError (504).

    Others say what has happened: last_sign, when the client was sent something; last_progress, when
    the upstream sent more than signs of life; is_stopping ends the wait at its next look.
    """

    # Look at the others this often.
    LOOK = 0.25
    # Bytes that bring nothing, such as comments, may come this many times as long as silence lasts.
    PATIENCE = 10
    # A streaming client is sent something at least this often.
    HEARTBEAT = 15

    def __init__(
        self,
        client: socket.socket | None = None,
        timeout: float = DEFAULTS.timeout,
        heartbeat: Callable[[], None] | None = None,
    ):
        self._client, self.timeout, self._heartbeat = client, timeout, heartbeat
        self.is_stopping = False
        self.last_sign = self.last_progress = time.monotonic()
        self._next_look = self.last_sign + self.LOOK

    def wait(self, upstream: socket.socket, event: int = selectors.EVENT_READ) -> None:
        """Return when the upstream can be read, or takes bytes."""
        deadline, selector = time.monotonic() + self.timeout, selector_of(upstream, event)
        while not selector.select(self._pause(deadline)):
            if time.monotonic() >= deadline:
                raise self.silence(
                    "sent nothing" if event == selectors.EVENT_READ else "taken nothing"
                )

    def sleep(self, seconds: float) -> None:
        """Wait before another attempt."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            time.sleep(self._pause(end))

    def silence(self, what: str = "sent nothing", times: float = 1) -> UpstreamError:
        """Return the error for an upstream that has been silent for too long."""
        return UpstreamError(
            f"the upstream has {what} for {self.timeout * times:g} s; try again, or allow more "
            "with --timeout",
            504,
            "upstream_timeout",
        )

    def look(self) -> None:
        """Look at the shutdown, the client, the progress, and the sign of life that may be due."""
        now = time.monotonic()
        self._next_look = now + self.LOOK
        if self.is_stopping:
            raise ShuttingDown
        ahead = peek(self._client) if self._client else None
        if ahead == b"":
            raise ClientGone
        if ahead:
            # It has sent its next request: no end can be seen behind that.
            self._client = None
        if now - self.last_progress > self.timeout * self.PATIENCE:
            raise self.silence("sent bytes but no answer", self.PATIENCE)
        if self._heartbeat and now - self.last_sign >= self.HEARTBEAT * 0.99:
            try:
                self._heartbeat()
            except OSError:
                # Never as an error of what is waited for, such as the lock.
                raise ClientGone from None

    def _pause(self, deadline: float) -> float:
        """Return the seconds until the deadline or the next look, after the one that is due."""
        now = time.monotonic()
        if now >= self._next_look or self.is_stopping:
            self.look()
        return max(0.0, min(deadline, self._next_look) - now)


class BodyDecoder:
    """Takes the framing off a response's body, as it comes (RFC 9112 6.3).

    That is chunked, of a known length, or up to the end of the connection.

    >>> decoder = BodyDecoder(200, {"transfer-encoding": "chunked"})
    >>> decoder.feed(b"3\\r\\nabc\\r\\n2\\r"), decoder.feed(b"\\nde\\r\\n0\\r\\n\\r\\n")
    (b'abc', b'de')
    >>> decoder.is_done
    True
    """

    # The same length twice is allowed, RFC 9110 8.6.
    _LENGTH = re.compile(r"\s*(\d{1,18})\s*(,\s*\1\s*)*\Z", re.A)

    def __init__(self, status: int, headers: Mapping[str, str]):
        self._is_chunked = "chunked" in headers.get("transfer-encoding", "").lower()
        known = self._LENGTH.match(headers.get("content-length", ""))
        self._left = int(known.group(1)) if known and not self._is_chunked else 0
        self.ends_with_connection = not (known or self._is_chunked)
        # What is not decoded yet: a part of a line, or what follows the body.
        self.rest, self._is_last, self._trailers = b"", False, 0
        has_body = self._is_chunked or self._left or self.ends_with_connection
        self.is_done = status in (204, 304) or not has_body

    def feed(self, received: bytes) -> bytes:
        """Return the content in what was received, which is nothing when the connection ends.

        Raises ValueError for a bad chunk size, and for an end in the middle of the body.
        """
        if self.ends_with_connection:
            self.is_done = not received
            return received
        if not received:
            raise ValueError("connection closed")
        if self._is_chunked:
            return self._dechunked(self.rest + received)
        content, self.rest = received[: self._left], received[self._left :]
        self._left -= len(content)
        self.is_done = not self._left
        return content

    def _dechunked(self, received: bytes) -> bytes:
        found, at = [], 0
        while at < len(received) and not self.is_done:
            if not self._left:
                end = received.find(b"\n", at)
                if end < 0:
                    break
                line, at = received[at:end].strip(), end + 1
                if self._is_last:
                    # A trailer, or the empty line behind them.
                    self.is_done, self._trailers = not line, self._trailers + len(line)
                elif line:
                    # The size of a chunk, and not the empty end of the one before.
                    self._left = int(line.partition(b";")[0], 16)
                    self._is_last = not self._left
            if self._left < 0:
                raise ValueError("a negative chunk size")
            if self._left:
                found.append(received[at : at + self._left])
                self._left, at = self._left - len(found[-1]), at + len(found[-1])
                # Skips the CRLF after the data, saving one loop iteration.
                at += 2 if received.startswith(b"\r\n", at) else 0
        self.rest = received[at:]
        if not self.is_done and len(self.rest) + self._trailers > MAX_LINE:
            raise ValueError(f"{'trailers' if self._is_last else 'a chunk size'} without an end")
        return b"".join(found)


class UpstreamResponse:
    """A response of the upstream: status, headers, and the body in pieces as they arrive.

    It never blocks inside recv: a TLS record without data must not hide a client that leaves.
    """

    DRAIN_TIMEOUT = 0.25
    # Of compressed content at once.
    MAX_INFLATED = 65_536
    _HEAD_END = re.compile(rb"\r?\n\r?\n")
    _STATUS_LINE = re.compile(rb"HTTP/1\.(\d) +([1-9]\d\d)\b.*\n")

    def __init__(
        self, source: socket.socket, waiter: Waiter, keep: Callable[[socket.socket], None]
    ):
        # The socket that the body comes from.
        self.source, self._waiter, self._keep = source, waiter, keep
        # What has come and is not decoded yet, and what is decoded and not unpacked yet.
        self.received = self._packed = b""
        self._is_full = self._is_kept = False
        self._inflater: Any = None
        # Until begin() has read the head.
        self.status = 0
        self.headers: dict[str, str] = {}

    def begin(self, request: bytes) -> None:
        """Send a request and read the head of its answer: then status and headers are there.

        Raises OSError, http.client.HTTPException, and what a Waiter raises.
        """
        # It may have refused and closed already: 413.
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):
            rest = send_some(self.source, request)
            while rest:
                self._waiter.wait(self.source, selectors.EVENT_WRITE)
                rest = send_some(self.source, rest)
        line, end = self._read_head()
        lines = io.BytesIO(self.received[line.end() : end])
        # Not HTTPResponse, which looks for much that is not needed here.
        for name, value in http.client.parse_headers(lines).items():
            lower = name.lower()
            before = self.headers.get(lower)
            self.headers[lower] = value if before is None else f"{before}, {value}"
        self.status, self.received = int(line.group(2)), self.received[end:]
        self._coding = self.headers.get("content-encoding", "").strip().lower()
        self._body = BodyDecoder(self.status, self.headers)
        self._closes = (
            line.group(1) == b"0"
            or "close" in self.headers.get("connection", "").lower()
            or self._body.ends_with_connection
        )

    def _read_head(self) -> tuple[re.Match[bytes], int]:
        """Receive the head; returns the status line, and where the head ends."""
        start = 0
        while True:
            end = self._HEAD_END.search(self.received, start)
            if end:
                line = self._STATUS_LINE.match(self.received, start)
                if not line:
                    raise http.client.HTTPException("what it sent is no HTTP/1.1")
                if not line.group(2).startswith(b"1"):
                    return line, end.end()
                # 100 Continue, 103 Early Hints: the response is still to come.
                start = end.end()
                continue
            self._waiter.wait(self.source)
            piece = self._receive()
            if piece == b"" or len(self.received) > MAX_ERROR_BODY:
                raise http.client.RemoteDisconnected("it closed the connection")
            self.received += piece or b""

    def _receive(self) -> bytes | None:
        """Return what has arrived, nothing at the end, None while nothing has; raises OSError."""
        self._is_full = False
        try:
            received = self.source.recv(PIECE)
        except (BlockingIOError, ssl.SSLWantReadError, ssl.SSLWantWriteError):
            return None
        # Of TLS no more than one record is read at once.
        self._is_full = len(received) == PIECE or isinstance(self.source, ssl.SSLSocket)
        return received

    @property
    def may_have_more(self) -> bool:
        """True if there may be more to receive at once."""
        return self._is_full or self._is_ready()

    def _is_ready(self) -> bool:
        """Return whether bytes that have come are not decoded yet, or no more will come."""
        return self._body.is_done or bool(self.received or self._packed)

    def wait(self) -> None:
        """Return when there may be something to receive; raises what a Waiter raises."""
        # Not for what is left of a TLS record: none is longer than a PIECE.
        if not self._is_ready():
            self._waiter.wait(self.source)

    def receive_now(self) -> bytes | None:
        """Return the content that has arrived, nothing at the end of the body, None before that.

        Raises UpstreamError when the connection breaks.
        """
        content: bytes | None = b""
        try:
            if not (self._packed or self._body.is_done):
                arrived, self.received = self.received or self._receive(), b""
                content = None if arrived is None else self._body.feed(arrived)
                content = content or (b"" if self._body.is_done else None)
        except (OSError, ValueError) as error:
            raise UpstreamError(
                "the upstream broke off in the middle of its answer "
                f"({reason_of(error)}); try again",
                code="upstream_cut",
            ) from error
        is_plain = self._coding in ("", "identity")
        return content if is_plain or content is None else self._unpacked(content)

    def _unpacked(self, packed: bytes) -> bytes | None:
        """Return the next content in what was compressed, nothing at the end, None before that."""
        if self._coding not in ("gzip", "x-gzip", "deflate"):
            coding = shorten(self._coding, 40)
            raise UpstreamError(
                f"the upstream, or a gateway before it, compresses its answer as {coding!r} "
                "although it was asked not to; only gzip and deflate are understood"
            )
        packed = self._packed or packed
        if self._inflater is None:
            # With the head of zlib, as RFC 9110 8.4.1.2 has it, or bare.
            is_bare = self._coding == "deflate" and packed[:1] and packed[0] & 15 != 8
            self._inflater = zlib.decompressobj(-zlib.MAX_WBITS if is_bare else zlib.MAX_WBITS | 32)
        try:
            content = self._inflater.decompress(packed, self.MAX_INFLATED)
        except zlib.error:
            raise UpstreamError(
                f"the upstream's answer is said to be {self._coding}, and is not; try again",
                code="upstream_cut",
            ) from None
        self._packed = self._inflater.unconsumed_tail or self._inflater.unused_data
        if self._inflater.eof:
            # Another member may follow (RFC 1952 2.2).
            self._inflater = None
        return content or (None if packed else b"")

    def read(self, limit: int) -> bytes:
        """Return the body up to a limit, or what arrived before the connection broke, and close."""
        body, piece = bytearray(), None
        with contextlib.closing(self), contextlib.suppress(UpstreamError):
            while piece != b"" and len(body) <= limit:
                self.wait()
                piece = self.receive_now()
                body += piece or b""
        return bytes(body[:limit])

    def close(self) -> None:
        """End the response: keep the connection if the body is at its end, else close it."""
        if self._closes or not self._body.is_done or self.received or self._body.rest:
            self.source.close()
        elif not self._is_kept:
            self._is_kept = True
            self._keep(self.source)

    def drain(self) -> None:
        """Read what little may follow the end of the stream, so that the connection can be kept."""
        deadline = time.monotonic() + self.DRAIN_TIMEOUT
        with contextlib.suppress(UpstreamError):
            while not self._body.is_done and time.monotonic() < deadline:
                if self.receive_now() is None:
                    selector_of(self.source, selectors.EVENT_READ).select(
                        deadline - time.monotonic()
                    )


class Upstream(urllib.request.AbstractHTTPHandler):
    """Sends requests to providers, over the forward proxy where one is named.

    It is urllib's hook for opening connections, which here are kept and used again. A kept one that
    turns out dead before it gave one byte is replaced once; a new one that fails is an error.
    """

    CONNECT_TIMEOUT = 10
    # Kept open to each upstream, and for how long: shorter than any gateway's idle limit we know.
    IDLE, IDLE_AGE = 64, 30.0
    _HEADER_NAME = re.compile(r"[A-Za-z0-9!#$%&'*+.^_`|~-]+\Z")
    # What is printable in Latin-1.
    _HEADER_VALUE = re.compile("[\x20-\x7e\xa1-\xac\xae-\xff]*\\Z")

    def __init__(self, forwarding: Forwarding = DIRECT) -> None:
        super().__init__()
        self._opener = opener_over(forwarding, self)
        # The connections that are kept to each upstream, and since when.
        self._idle: dict[Any, list[tuple[socket.socket, float]]] = collections.defaultdict(list)

    def send(
        self,
        target: Target,
        path: str,
        body: bytes | None,
        access_token: str,
        waiter: Waiter,
        headers: Mapping[str, str],
    ) -> UpstreamResponse:
        """POST a body (GET without one) to a path below the provider's base URL."""
        own = {"Authorization": f"Bearer {access_token}", **headers, **self.custom_headers(target)}
        # It is an http or https URL with a host: base_url_fault() has looked at it.
        request: Any = urllib.request.Request(target.provider.base_url + path, body, own)
        request.waiter = waiter
        try:
            response: UpstreamResponse = self._opener.open(request, timeout=waiter.timeout)
            return response
        except ValueError as error:
            # Of _head_of(); UnicodeError is one.
            raise UpstreamError(
                f"the request to {target.provider.name} cannot be sent: the key or a header holds "
                "a character that HTTP does not allow",
                500,
            ) from error

    @classmethod
    def custom_headers(cls, target: Target) -> dict[str, str]:
        """Return customHeaders of the model's entry in settings.json, without what is no header.

        Numbers and switches are text there, as in the CLI.
        """
        texts = {
            name: (value if isinstance(value, str) else json.dumps(value)).strip()
            for name, value in as_object(target.config.get("customHeaders")).items()
            if isinstance(value, (str, int, float))
            and cls._HEADER_NAME.match(name)
            and name.lower() not in ("host", "content-type")
        }
        return {name: text for name, text in texts.items() if cls._HEADER_VALUE.match(text)}

    def http_open(self, request: Any) -> UpstreamResponse:
        """Return the response to a request, over a kept connection or a new one."""
        key = (request.type, request.host, request._tunnel_host)
        keep, kept = functools.partial(self._keep, key), self._take(key)
        while True:
            connection = kept or self._connect(request)
            response = UpstreamResponse(connection, request.waiter, keep)
            try:
                response.begin(self._head_of(request) + (request.data or b""))
                return response
            except (OSError, http.client.HTTPException) as error:
                if not kept or response.received:
                    raise UpstreamError(
                        f"{request.host} gave no answer ({reason_of(error)}); try again",
                        code="upstream_cut",
                        moves_on=not response.received,
                    ) from error
                log.debug("a kept connection to %s was dead", request.host)
                kept = None
            finally:
                if not response.status:
                    connection.close()

    https_open = http_open
    http_request = https_request = urllib.request.AbstractHTTPHandler.do_request_

    def _keep(self, key: Any, connection: socket.socket) -> None:
        """Keep a connection whose response was read to its end."""
        idle = self._idle[key]
        if len(idle) < self.IDLE:
            idle.append((connection, time.monotonic()))
        else:
            connection.close()

    def close(self) -> None:
        """Close the connections that are kept."""
        for connection, _ in itertools.chain(*self._idle.values()):
            connection.close()

    def _take(self, key: Any) -> socket.socket | None:
        """Return a kept connection on which nothing can be read: that would be its end."""
        while True:
            try:
                connection, since = self._idle[key].pop()
            except IndexError:
                return None
            if time.monotonic() - since < self.IDLE_AGE and peek(connection) is None:
                return connection
            connection.close()

    @functools.cached_property
    def _context(self) -> ssl.SSLContext:
        """What is trusted: loading it takes 20 ms, so once, and not at start."""
        try:
            return tls_context()
        except OSError as error:
            # SSLError is one: SSL_CERT_FILE or SSLKEYLOGFILE name nothing good.
            raise UpstreamError(
                f"TLS cannot be set up ({reason_of(error)}); check SSL_CERT_FILE", 500
            ) from error

    def _connect(self, request: Any) -> socket.socket:
        try:
            if request.type == "https":
                connection: Any = http.client.HTTPSConnection(request.host, context=self._context)
            else:
                connection = http.client.HTTPConnection(request.host)
            deadline = time.monotonic() + min(request.timeout, self.CONNECT_TIMEOUT)
            connection._create_connection = functools.partial(connect_before, deadline)
            if request._tunnel_host:
                secret = request.get_header("Proxy-authorization")
                headers = {"Proxy-Authorization": secret} if secret else {}
                connection.set_tunnel(request._tunnel_host, headers=headers)
            connection.connect()
            connected: socket.socket = connection.sock
            connected.setblocking(False)
            return connected
        except (OSError, UnicodeError, http.client.HTTPException) as error:
            raise UpstreamError(
                f"{request._tunnel_host or request.host} cannot be reached: {reason_of(error)}",
                code="upstream_unreachable",
                retry=not isinstance(error, (ssl.SSLError, http.client.HTTPException)),
                moves_on=True,
            ) from error

    @staticmethod
    def _head_of(request: Any) -> bytes:
        """Return request line and headers; raises ValueError for a character that ends a line."""
        headers = {**request.headers, **request.unredirected_hdrs, "Accept-encoding": "identity"}
        if request._tunnel_host:
            # Behind a tunnel the request is the upstream's.
            headers.pop("Proxy-authorization", None)
        lines = [f"{request.get_method()} {request.selector} HTTP/1.1"]
        lines += [f"{name.title()}: {value}" for name, value in headers.items()]
        if not all(map(str.isprintable, lines)):
            raise ValueError("a line end in the request's head")
        return ("\r\n".join(lines) + "\r\n\r\n").encode("latin-1")


class Answer:
    """An upstream's answer: its response, and the decoder that makes chunks of the bytes.

    The chunks of a piece are kept until it is decoded, and those of the first one until deliver()
    names a writer.
    """

    # Bytes that are kept until they are whole, and then translated in one long step.
    HEAVY = 262_144

    def __init__(self, response: UpstreamResponse, target: Target, decoder: Any, waiter: Waiter):
        self.response, self.target, self.decoder, self.waiter = response, target, decoder, waiter
        # The answer has begun with the first one: until then an error is an HTTP status.
        self.chunks: list[tuple[Any, Any]] = []
        decoder.sink = self.chunks.append
        self._feed: Callable[[Any, Any], None] | None = None
        # An error behind chunks that have not been delivered yet.
        self._failure: UpstreamError | None = None
        # is_heavy: the next step may take long.
        self.is_over = self.is_heavy = False
        # Bytes that have come since the last chunk.
        self._kept = 0

    def deliver(self, feed: Callable[[Any, Any], None]) -> None:
        """Give the chunks that are there, and all that follow, to a writer."""
        self._feed = feed
        for chunk, raw in self.chunks:
            feed(chunk, raw)
        self.chunks.clear()
        if self._failure:
            raise self._failure

    def pump(self) -> None:
        """Push what has arrived through; raises what receive_now() and the decoder raise."""
        try:
            piece = self.response.receive_now()
        except UpstreamError:
            # A connection that breaks once the finish reason is there has only ended.
            if not self.decoder.is_finished():
                raise
            piece = b""
        if piece is None:
            return
        try:
            self.decoder.feed(piece)
            if not piece or self.decoder.is_done:
                self.is_over = True
                self.decoder.close()
        except UpstreamError as error:
            if not self.chunks:
                raise
            self._failure = error
        self._kept = 0 if self.chunks else self._kept + len(piece)
        self.is_heavy = self._kept > self.HEAVY
        if self.chunks:
            self.waiter.last_progress = time.monotonic()
            if self._feed:
                self.deliver(self._feed)


class Call:
    """One request to the upstream and the attempts made for it.

    All that happens here is before the first byte of an answer: one refresh after a 401, some
    repairs of a refused body, some retries, and the next provider. api is one of the classes that
    ENDPOINTS lists; notes are what was given up or repaired, for the log; answers are those that
    began, moved are the targets that another one stood in for, with what they answered, and target
    is the last one that was tried.
    """

    # A body may be repaired this often: one reason for a refusal may hide another.
    MAX_REPAIRS = 2
    RETRY_DELAY = 0.5
    # A Retry-After beyond this is the client's to wait for.
    LONGEST_DELAY = 10
    # No retry and no failover begins later than this: clients have timeouts, too.
    DEADLINE = 30
    # A provider that another one stood in for comes last for so long.
    COOLDOWN = 60

    def __init__(
        self,
        upstream: Upstream,
        api: Any,
        request: Json,
        waiter: Waiter,
        retries: int = DEFAULTS.retries,
        user_agent: str = "",
    ):
        self._upstream, self._api, self._request = upstream, api, request
        self.waiter, self._retries = waiter, retries
        self._headers = {
            "Content-Type": "application/json",
            "Accept": api.accept,
            "User-Agent": user_agent,
        }
        self._body: Json = {}
        self.notes: list[str] = []
        self.target: Target | None = None
        self.answers: list[Answer] = []
        self.moved: dict[Target | None, int] = {}

    def close(self) -> None:
        """Close the responses."""
        for answer in self.answers:
            answer.response.close()

    def open(self, targets: list[Target]) -> Answer:
        """Return the first answer that one of the targets gives, begun.

        Whatever can still become an HTTP status has been raised then.
        """
        now = time.monotonic()
        targets = sorted(targets, key=lambda target: target.provider.cooldown_until > now)
        deadline = now + self.DEADLINE
        while True:
            target = self.target = targets.pop(0)
            provider = target.provider
            try:
                answer = self._open_on(target, deadline, is_last=not targets)
                provider.refusal = None
                return answer
            except ProxyError as error:
                provider.note(error)
                if not targets or not error.moves_on or time.monotonic() > deadline:
                    raise
                self.moved[target], rest = error.status, ""
                if not isinstance(error, BadRequest):
                    provider.cooldown_until = time.monotonic() + self.COOLDOWN
                    rest = f"it rests for {self.COOLDOWN} s, "
                following = targets[0].provider.name
                log.warning("%s: %s; %strying %s", provider.name, error.message, rest, following)

    def _open_on(self, target: Target, deadline: float, is_last: bool) -> Answer:
        credentials, rejected = target.provider.credentials, ""
        access_token = credentials.access_token(pause=self.waiter.sleep)
        self._prepare(target)
        retries, repairs, delay = self._retries, self.MAX_REPAIRS, self.RETRY_DELAY
        while True:
            try:
                answer = self._attempt(target, access_token)
                while not (answer.chunks or answer.is_over):
                    answer.response.wait()
                    answer.pump()
                return answer
            except UpstreamError as error:
                self.close()
                if error.code == "invalid_api_key" and isinstance(credentials, OAuthCredentials):
                    token = self._refreshed(credentials, access_token, rejected, error)
                    access_token, rejected = token, access_token
                    continue
                how = self._api.repair(self._body, error) if repairs else ""
                if how:
                    log.info("upstream rejected the request (%s); retrying %s", error.message, how)
                    self.notes.append(how)
                    repairs -= 1
                    continue
                if error.code == "upstream_unreachable" and not is_last:
                    # Three attempts of 10 s would leave no time for the next provider.
                    raise
                pause = delay if error.retry_after is None else error.retry_after
                longest = min(self.LONGEST_DELAY, deadline - time.monotonic())
                if not error.retry or retries <= 0 or pause > longest:
                    raise
                log.info("%s: %s; again in %.1f s", target.provider.name, error.message, pause)
            retries, delay = retries - 1, delay * 2
            self.waiter.sleep(pause)

    def _refreshed(
        self, credentials: OAuthCredentials, access_token: str, rejected: str, error: UpstreamError
    ) -> str:
        """Return a token for a refused one; raises if that was new: no refresh would help."""
        if not rejected and access_token != credentials.rejected_token:
            return credentials.access_token(access_token, self.waiter.sleep)
        credentials.rejected_token = access_token
        raise UpstreamError(
            f"{error.message.rstrip('.')}. {FREE_TIER_ENDED}.",
            401,
            error.code,
            error.type,
            request_id=error.request_id,
            moves_on=True,
        ) from error

    def _attempt(self, target: Target, access_token: str) -> Answer:
        body = encode_json(self._body, is_request=True)
        response = self._upstream.send(
            target, self._api.path, body, access_token, self.waiter, self._headers
        )
        if not 200 <= response.status < 300:
            text = response.read(MAX_ERROR_BODY).decode("utf-8", "replace")
            log.debug(
                "HTTP %d from %s: %s", response.status, target.provider.name, shorten(text, 2000)
            )
            raise self._api.refusal(response.status, text, response.headers, target)
        decoder = self._api.decoder(self._request, target)
        self.answers.append(Answer(response, target, decoder, self.waiter))
        return self.answers[-1]

    def _prepare(self, target: Target) -> None:
        lack = target.provider.family.lacks.get(self._api.path)
        if lack:
            raise BadRequest(lack, code="unsupported_endpoint", moves_on=True)
        self._body, fired = self._api.to_upstream(self._request, target)
        for given_up in filter(None, fired.values()):
            self.notes.append(given_up)
            log.info("%s: %s", target.model, given_up)
        if log.isEnabledFor(logging.DEBUG):
            rules, text = ", ".join(fired) or "none", excerpt(self._body)
            log.debug("rules: %s; to %s: %s", rules, target.provider.name, text)


def excerpt(value: Any, longest: int = 200) -> str:
    """Return a JSON value for the log, long strings cut."""

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


class ModelLists:
    """The live lists of models, asked for in the background and kept; any thread may ask.

    A list that is old is given out all the same while a new one is asked for, and one that cannot
    be had any more stays: a picker of models that is empty for a moment makes clients forget their
    choice.
    """

    # A list is asked for again after so long, and sooner if there was none to be had.
    AGE, AGE_FAILED = 300.0, 30.0
    # GET /v1/models waits no longer for one: LibreChat gives it 5 s, Claude Code 3.
    WAIT = 0.8
    # What such a request itself may take; Qwen Code's own limits.
    TIMEOUT, SIZE = 5.0, 1_048_576

    def __init__(self, upstream: Upstream):
        self._upstream, self._lock = upstream, threading.Lock()
        self._executor = concurrent.futures.ThreadPoolExecutor(4)
        self._lists: dict[tuple[str, str], list[str]] = {}
        # The latest request for each list, and when the next one is due.
        self._asked: dict[tuple[str, str], concurrent.futures.Future[None]] = {}
        self._due: dict[tuple[str, str], float] = {}
        self._waiters: set[Waiter] = set()

    def get(self, providers: list[Provider], seconds: float) -> list[list[str]]:
        """Return the list of each provider, after at most so long; with 0 no upstream is asked."""
        keys = [(provider.name, provider.host) for provider in providers]
        if seconds:
            with self._lock, contextlib.suppress(RuntimeError):
                for provider, key in zip(providers, keys):
                    if provider.family.has_list and time.monotonic() >= self._due.get(key, 0.0):
                        self._due[key] = time.monotonic() + self.AGE
                        self._asked[key] = self._executor.submit(self._ask, provider, key)
            missing = [key for key in keys if key in self._asked and not self._lists.get(key)]
            concurrent.futures.wait([self._asked[key] for key in missing], seconds)
        # Always one object: what is made from lists is made again when one of them is another.
        return [self._lists.setdefault(key, []) for key in keys]

    def close(self) -> None:
        """End the requests that are running."""
        for waiter in list(self._waiters):
            waiter.is_stopping = True
        self._executor.shutdown(wait=False)

    def _ask(self, provider: Provider, key: tuple[str, str]) -> None:
        target, waiter, answer = Target(provider, ""), Waiter(timeout=self.TIMEOUT), None
        headers = {"User-Agent": f"qwen_proxy/{__version__}", "Accept": "application/json"}
        self._waiters.add(waiter)
        try:
            token = provider.credentials.access_token()
            response = self._upstream.send(target, "/models", None, token, waiter, headers)
            body = response.read(self.SIZE)
            answer = loads(body) if response.status == 200 else None
        except (ProxyError, ShuttingDown) as error:
            log.debug("%s has no list of models: %s", provider.name, error)
        finally:
            self._waiters.discard(waiter)
        ids = (as_text(dig(entry, "id")) for entry in as_list(dig(answer, "data")))
        listed = list(filter(None, ids))
        if listed:
            self._lists[key] = listed
        else:
            self._due[key] = time.monotonic() + self.AGE_FAILED


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
    r"""Bytes in, events out; the bytes may be cut anywhere, also in a character or a line end.

    A byte order mark at their beginning is taken off before. A blank line brings out what a stream
    ends with if its last one is missing.

    >>> decoder = EventDecoder()
    >>> decoder.feed(b'data: a\r\ndata:b\r') + decoder.feed(b'\n\r\n: note\n\ndata: c')
    [Event(data=b'a\nb', name='', status=0)]
    >>> decoder.feed(b'\n\n')
    [Event(data=b'c', name='', status=0)]
    """

    def __init__(self) -> None:
        self._buffer, self._after_cr = bytearray(), False

    def feed(self, piece: bytes) -> list[Event]:
        """Return the events that are complete with this piece."""
        if self._after_cr and piece:
            self._after_cr = False
            piece = piece[1:] if piece[:1] == b"\n" else piece
        if b"\r" in piece:
            self._after_cr = piece[-1:] == b"\r"
            piece = piece.replace(b"\r\n", b"\n").replace(b"\r", b"\n")
        blocks = piece[:-2]
        if self._buffer or piece[-2:] != b"\n\n":
            self._buffer += piece
            end = self._buffer.rfind(b"\n\n", -len(piece) - 1)
            if end < 0:
                if len(self._buffer) <= MAX_EVENT:
                    return []
                raise UpstreamError(f"the upstream sent an event of more than {MAX_EVENT} bytes")
            blocks = bytes(self._buffer[:end])
            del self._buffer[: end + 2]
        return list(filter(None, map(self._parse, blocks.split(b"\n\n"))))

    @staticmethod
    def _parse(block: bytes) -> Event | None:
        """Return the event in the lines between two blank ones; None where they hold no data."""
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
                # An error without its 'data:' (upstreams behind gateways).
                found.append(line)
        return Event(b"\n".join(found), name, status) if found else None


def encode_event(data: bytes, name: str = "") -> bytes:
    """Return one event, ready to write; the data must hold no line end."""
    if name:
        return b"event: %s\ndata: %s\n\n" % (name.encode(), data)
    return b"data: " + data + b"\n\n"


DONE = b"[DONE]"


# ------------------------------------------------------------------------------------------------
# Requests
# ------------------------------------------------------------------------------------------------
# Pure: a client's request in, the upstream's request out. What no rule names passes unchanged.


# Where a request says whether to think, how hard, and with how many tokens, and how each is read;
# the first that can be read counts.
THINKING_SPELLINGS: tuple[tuple[Callable[[Any], Any], str], ...] = (
    (
        as_switch,
        "enable_thinking reasoning.enabled think thinking reasoning "
        "chat_template_kwargs.enable_thinking thinking.type",
    ),
    (as_effort, "reasoning_effort reasoning.effort think chat_template_kwargs.reasoning_effort"),
    (
        as_count,
        "thinking_budget thinking.budget_tokens reasoning.max_tokens reasoning.budget_tokens "
        "chat_template_kwargs.thinking_budget",
    ),
)
THINKING_FIELDS = {path.split(".")[0] for _, paths in THINKING_SPELLINGS for path in paths.split()}


class Thinking(NamedTuple):
    """What a request says about thinking, in whichever of the spellings; None where it does not.

    fields: those of THINKING_FIELDS that were understood, but for chat_template_kwargs, which may
    say more.
    """

    enabled: bool | None = None
    effort: str | None = None
    budget: int | None = None
    fields: frozenset[str] = frozenset()

    @classmethod
    def read(cls, body: Json) -> Thinking:
        """Read all of THINKING_FIELDS.

        >>> Thinking.read({"reasoning": {"effort": "minimal"}}).enabled
        False
        """
        if body.keys().isdisjoint(THINKING_FIELDS):
            return cls()
        found = [
            stated({path: reader(dig(body, *path.split("."))) for path in paths.split()})
            for reader, paths in THINKING_SPELLINGS
        ]
        fields = {path.partition(".")[0] for values in found for path in values}
        enabled, effort, budget = (next(iter(values.values()), None) for values in found)
        level = None if effort in ("none", "minimal") else effort
        if enabled is None and (effort or budget is not None):
            # A budget of -1 is as much as the model likes.
            enabled = bool(level) if effort else budget != 0
        tokens = max(budget or 0, 0) or None
        return cls(enabled, level, tokens, frozenset(fields - {"chat_template_kwargs"}))


class Dialect(NamedTuple):
    """How a kind of endpoint or model is told about thinking; as Qwen is where nothing is said.

    off, on: what to set; efforts: its levels by the client's names, other names as they are, '' for
    none at all, or None where it has no levels; budget: the field for a number of tokens, which
    wins over the effort; budgets: tokens for a level, where it has no levels; is_nested: all
    of it stands in 'reasoning', as the client may have it; is_default: it is told to think where
    the request says nothing. Fields of an object have a dot.
    """

    off: Json = {"enable_thinking": False}
    on: Json = {"enable_thinking": True}
    efforts: Mapping[str, str] | None = None
    budget: str = "thinking_budget"
    budgets: Mapping[str, int] = {}
    is_nested: bool = False
    is_default: bool = False


# By the family of the endpoint where that has its own fields, else by the model (see ModelFacts);
# 'own ...' at hosts that are not Alibaba's. Model Studio, 'Deep thinking': tokens per level; above,
# the model's maximum. DeepSeek's and Z.AI's reference: reasoning_effort. Levels of models: Qwen
# Code 0.24.4, models.dev, QwenLM/Qwen3.8 #217.
DIALECTS = {
    "deepseek": Dialect(
        off={"thinking": {"type": "disabled"}},
        on={"thinking": {"type": "enabled"}},
        efforts={"low": "high", "medium": "high", "xhigh": "max"},
        budget="",
    ),
    "zai": Dialect(
        off={"thinking": {"type": "disabled"}},
        on={"thinking": {"type": "enabled"}},
        efforts={},
        budget="",
    ),
    "openrouter": Dialect(
        off={"reasoning.enabled": False},
        on={"reasoning.enabled": True},
        efforts={},
        budget="reasoning.max_tokens",
        is_nested=True,
    ),
    "qwen": Dialect(budgets={"low": 4096, "medium": 16_384}),
    "unknown": Dialect(efforts={}),
    "qwen3.8": Dialect(
        off={"reasoning_effort": "none"}, on={}, efforts={"": "xhigh", "max": "xhigh"}
    ),
    "own qwen3.8": Dialect(efforts={"high": "xhigh", "max": "xhigh"}),
    "deepseek-v4": Dialect(efforts={"low": "high", "medium": "high", "xhigh": "max"}, budget=""),
    "deepseek-v4.1": Dialect(efforts={"medium": "high", "xhigh": "max"}, budget=""),
    "low-high-max": Dialect(off={}, on={}, efforts={"medium": "high", "xhigh": "max"}, budget=""),
    "effort": Dialect(off={"reasoning_effort": "none"}, on={}, efforts={}, budget=""),
    "switch": Dialect(is_default=True),
    "template": Dialect(
        off={"chat_template_kwargs.enable_thinking": False},
        on={"chat_template_kwargs.enable_thinking": True},
        budget="",
        is_default=True,
    ),
}


@functools.lru_cache(maxsize=256)
def traits_of(family: str, model: str) -> frozenset[str]:
    """Return what the rules look at: the family's name and traits, and what the model brings.

    'thoughts': a message with tool calls needs its thoughts back (Kimi and DeepSeek, thinking
    mode); 'strings': content is never a list.
    """
    of_qwen = frozenset() if family in DIALECTS else frozenset({"qwen", "limits"})
    # By a word in its id.
    brought = {
        "qwen": of_qwen,
        "coder-model": of_qwen,
        "qwen-long": {"strings"},
        "kimi": {"thoughts"},
        "deepseek": {"thoughts"},
    }
    found = [traits for word, traits in brought.items() if word in model.lower()]
    return FAMILIES[family].traits.union({family}, *found)


class History:
    """The messages of a request, put right in one pass.

    In goes what clients keep of a conversation; out come results directly behind their calls, a
    stub for a call without a result, no result without a call, calls as they are sent, with ids and
    with arguments that are JSON, and media where the endpoint takes them.
    """

    STUB = "(no result: the call was interrupted)"
    # Half of an emoji, or a whole one that is escaped.
    HALF_OF_PAIR = re.compile(r"\\ud[89a-f]", re.I)

    def __init__(self, shapes: ToolShapes, splits_media: bool):
        self._shapes, self._splits_media = shapes, splits_media
        # Each message but the results, with the results of its calls behind it.
        self._turns: list[list[Json]] = []
        # What the assistant said last, a list for each message, and where it goes if a result
        # follows.
        self._said: list[list[Json]] = []
        self._before: list[Json] = []
        # By call id: the turns and places of calls that wait for a result; the last one is next.
        self._waiting: dict[str, list[tuple[list[Json], int]]] = {}
        # Ids for the calls of the latest turn that came without one.
        self._unnamed: collections.deque[str] = collections.deque()
        # The results of each call id that has one: Codex's notify() sends more for a call.
        self._answered: dict[str, list[Json]] = {}
        # Results without a call.
        self.lost = 0

    def repaired(self, messages: list[Json]) -> list[Json]:
        """Return the messages, put right; raises BadRequest if none is left."""
        for message in itertools.chain(*map(self._unpacked, messages)):
            if message["role"] in ("tool", "function"):
                self._add_result({**message, "role": "tool"})
            elif message["role"] == "assistant":
                self._add_answer(message)
            else:
                self._said, self._before = [], [message]
                self._turns.append(self._before)
        if not self._turns:
            raise BadRequest(
                "messages contains only tool results; the assistant message with the matching "
                "tool_calls is missing",
                param="messages",
            )
        for first, *more in self._answered.values():
            content = first.get("content")
            # A repeated one adds nothing.
            others = [each.get("content") for each in more if each.get("content") != content]
            first["content"] = joined([content, *others], "\n") if others else content
        return [each for turn in self._turns for each in [*turn, *self._media_in(turn)]]

    @staticmethod
    def _unpacked(message: Json) -> list[Json]:
        """Return copies of a message, with calls and results that are parts in OpenAI's places.

        Anthropic has them as parts, and Cursor sends them so. Results come first, as they belong to
        the turn before.
        """
        content = as_list(message.get("content"))
        results = [
            {
                "role": "tool",
                "tool_call_id": part.get("tool_use_id"),
                "content": part.get("content") or "",
            }
            for part in content
            if part.get("type") == "tool_result"
        ]
        calls = [
            {
                "id": part.get("id"),
                "type": "function",
                "function": {
                    "name": part.get("name"),
                    "arguments": json.dumps(part.get("input") or {}, ensure_ascii=False),
                },
            }
            for part in content
            if part.get("type") == "tool_use"
        ]
        if not results and not calls:
            return [dict(message)]
        rest = [part for part in content if part.get("type") not in ("tool_use", "tool_result")]
        calls = as_list(message.get("tool_calls")) + calls
        turn = {**message, "content": rest or "", **({"tool_calls": calls} if calls else {})}
        return [*results, turn] if rest or calls else results

    def _add_answer(self, message: Json) -> None:
        """Add a message of the assistant, with its calls; function_call is the older name."""
        place, turn, calls = len(self._turns), [message], as_list(message.pop("tool_calls", None))
        if not calls and isinstance(message.get("function_call"), dict):
            calls = [{"type": "function", "function": message.pop("function_call")}]
        if not calls:
            self._turns.append(turn)
            self._said.append(turn)
            return
        self._said, self._before = [], []
        self._turns += [self._before, turn]
        self._unnamed.clear()
        calls = [self._valid_call(call, f"call_{place}_{at}") for at, call in enumerate(calls)]
        message["tool_calls"] = calls
        turn += [
            {"role": "tool", "tool_call_id": dig(call, "id"), "content": self.STUB}
            for call in calls
        ]
        # The first call of an id that occurs again gets the first result.
        for at in reversed(range(1, len(turn))):
            self._waiting.setdefault(str(turn[at]["tool_call_id"]), []).append((turn, at))

    def _valid_call(self, call: Any, new_id: str) -> Any:
        """Return a call with an id, and with arguments that are the text of a JSON object."""
        call = self._shapes.call(call)
        if isinstance(call, dict) and not call.get("id"):
            call = {**call, "id": new_id}
            self._unnamed.append(new_id)
        function = dig(call, "function")
        if not isinstance(function, dict):
            return call
        value = arguments = function.get("arguments")
        text = as_text(arguments)
        if isinstance(loads(text), dict) and not self.HALF_OF_PAIR.search(text):
            return call
        # Encoded twice: the text of a text.
        while isinstance(value, str) and loads(value, value) != value:
            value = loads(value)
        if value in (None, ""):
            value = {}
        if not isinstance(value, dict):
            value = {"malformed_arguments": arguments}
        return {**call, "function": {**function, "arguments": encode_json(value).decode()}}

    def _add_result(self, message: Json) -> None:
        """Add a result, of the next call of its id; ids may occur again in later turns."""
        if not message.get("tool_call_id") and self._unnamed:
            message["tool_call_id"] = self._unnamed.popleft()
        call_id = as_text(message.get("tool_call_id"))
        if self._waiting.get(call_id):
            turn, at = self._waiting[call_id].pop()
            turn[at] = message
            # The assistant speaks between results, as Jan has it: behind them it would have the
            # last word.
            self._before += [said.pop() for said in self._said]
            self._said = []
            self._answered[call_id] = [message]
        elif call_id in self._answered:
            self._answered[call_id].append(message)
        else:
            self.lost += 1

    def _media_in(self, turn: list[Json]) -> list[Json]:
        """Take the media out of the results of a turn, into a message of the user if any."""
        media = []
        for result in turn if self._splits_media else ():
            parts = as_list(result.get("content")) if result["role"] == "tool" else []
            found = [part for part in parts if dig(part, "type") not in ("text", None)]
            if found:
                result["content"] = text_of(parts) or "(see the next message)"
                media += found
        return [{"role": "user", "content": media}] if media else []


class ToolShapes:
    """How the tools of a request go to the upstream, and how calls of them come back.

    Custom tools, with free text for an argument, are functions with one string upstream; reserved
    names are changed, and `strict` is left out where it is unknown.
    """

    # Names that a tool may have at Alibaba's, where 'search' is reserved. Model Studio, 'Function
    # calling'.
    LEGAL = re.compile(r"(?!search\Z)[A-Za-z0-9_-]{1,64}\Z")

    def __init__(self, request: Json, traits: frozenset[str]):
        tools = [*as_list(request.get("tools")), *as_list(request.get("functions"))]
        names = {name_of(tool) for tool in tools} - {""}
        # By name: the envelope of a custom tool, 'custom' (OpenAI) or 'function' (Cursor, flat).
        self.custom = {
            name_of(tool): "custom" if dig(tool, "custom") else "function"
            for tool in as_list(request.get("tools"))
            if self._is_custom(tool) and name_of(tool)
        }
        self._is_alibaba = "alibaba" in traits
        self._sent: dict[str, str] = {}
        for name in sorted(names) if self._is_alibaba else ():
            if not self.LEGAL.match(name):
                plain = re.sub(r"[^A-Za-z0-9_-]", "_", name)[:50]
                # Thousands of names may be cut to the same.
                digest = hashlib.sha256(name.encode("utf-8", "replace")).hexdigest()[:12]
                is_free = f"{plain}_tool" not in names
                self._sent[name] = f"{plain}_tool" if is_free else f"{plain}_{digest}"
                names.add(self._sent[name])
        # The client's names for tools that have another one upstream.
        self.original = {sent: name for name, sent in self._sent.items()}

    def tool(self, tool: Any) -> Any:
        """Return a tool as it is sent: a function, with parameters and without nulls."""
        if self._is_custom(tool):
            tool = self._function_of(as_object(tool.get("custom", tool)))
        elif isinstance(dig(tool, "name"), str) and "function" not in tool:
            # Anthropic's shape, or that of /v1/responses.
            tool = {
                "type": "function",
                "cache_control": tool.get("cache_control"),
                "function": {
                    "name": tool["name"],
                    "description": tool.get("description"),
                    "parameters": tool.get("input_schema") or tool.get("parameters"),
                },
            }
        function = dig(tool, "function")
        if not isinstance(function, dict):
            return tool
        kept = stated(without_keys(function, ("strict",) if self._is_alibaba else ()))
        kept["parameters"] = self._schema(kept.get("parameters"))
        return self._renamed({**without_nulls(tool), "function": kept})

    def call(self, call: Any) -> Any:
        """Return a call in the history as it is sent: that of a function."""
        function = dig(call, "function")
        if dig(call, "type") == "custom":
            custom = as_object(call.get("custom") or function or call)
            text = custom.get("input", custom.get("arguments"))
        elif as_text(dig(function, "name")) in self.custom:
            custom, text = function, custom_input(function.get("arguments"))
        else:
            return self._renamed(call)
        arguments = json.dumps({"input": "" if text is None else text}, ensure_ascii=False)
        return self._renamed(
            {
                "id": call.get("id"),
                "type": "function",
                "function": {"name": custom.get("name"), "arguments": arguments},
            }
        )

    def choice(self, choice: Json) -> Any:
        """Return the choice of a tool as it is sent; some editors have Anthropic's shapes."""
        if name_of(choice):
            return self._renamed({"type": "function", "function": {"name": name_of(choice)}})
        return {"any": "required", "none": "none"}.get(str(choice.get("type")), "auto")

    def _renamed(self, named: Any) -> Any:
        function = dig(named, "function")
        name = as_text(dig(function, "name"))
        sent = self._sent.get(name, name)
        return named if sent == name else {**named, "function": {**function, "name": sent}}

    @staticmethod
    def _is_custom(tool: Any) -> bool:
        """Return whether a tool takes free text; Anthropic calls one with a schema so, too."""
        return dig(tool, "type") == "custom" and "input_schema" not in tool

    @staticmethod
    def _function_of(custom: Json) -> Json:
        """Return the function for a custom tool; a grammar cannot be enforced, only asked for."""
        grammar = dig(custom, "format", "grammar") or custom.get("format")
        definition = as_text(dig(grammar, "definition"))
        rule = f"It must match this grammar:\n{definition}" if definition else "The input as it is."
        return {
            "type": "function",
            "function": {
                "name": custom.get("name"),
                "description": custom.get("description") or "",
                "parameters": {
                    "type": "object",
                    "required": ["input"],
                    "properties": {"input": {"type": "string", "description": rule}},
                },
            },
        }

    @staticmethod
    def _schema(parameters: Any) -> Json:
        """Return the schema of a function's parameters: that of an object, with properties."""
        parameters = loads(parameters) if isinstance(parameters, str) else parameters
        schema = as_object(without_nulls(parameters))
        properties = schema.get("properties")
        has_properties = isinstance(properties, dict)
        if not has_properties and schema.get("type", "object") != "object":
            schema = {}
        # A reference or a choice of schemas has no properties of its own.
        if has_properties or not schema.keys() & {"$ref", "allOf", "anyOf", "oneOf"}:
            named = {name: without_nulls(each) for name, each in as_object(properties).items()}
            schema = {"type": "object", **schema, "properties": named}
        return schema


def name_of(tool: Any) -> str:
    """Return the name in a tool, or in a choice of one, of any shape; empty where it has none."""
    return as_text(
        dig(tool, "function", "name") or dig(tool, "custom", "name") or dig(tool, "name")
    )


def custom_input(arguments: Any) -> Any:
    """Return the one string that a custom tool is called with, or what is there instead of it."""
    value = loads(arguments) if isinstance(arguments, str) else arguments
    found = "" if value == {} else dig(value, "input")
    return found if isinstance(found, str) else arguments


class Rewrite:
    """One request on its way into the upstream's dialect.

    Its public methods, but for run(), are the rules of RULES. A rule replaces fields of self.body,
    or returns what goes in the place of one item there; what the fields hold is the client's, and
    never changed. What the client does not get because of a rule goes into self.notes.
    """

    LIMITS = ("max_tokens", "max_completion_tokens", "max_output_tokens")
    # Overview page of Model Studio's OpenAI compatibility: 'ignored'; object metadata and the rest
    # are refused by models of other makers behind it (Qwen Code, dashscope.ts).
    OPENAI_ONLY = frozenset(
        "logit_bias metadata prediction prompt_cache_key prompt_cache_retention safety_identifier "
        "service_tier store verbosity web_search_options".split()
    )
    # Open WebUI sends custom parameters as text.
    READERS: dict[str, Callable[[Any], Any]] = {
        **dict.fromkeys(
            "temperature top_p presence_penalty frequency_penalty repetition_penalty "
            "repeat_penalty".split(),
            as_decimal,
        ),
        **dict.fromkeys("top_k seed n top_logprobs".split(), as_count),
        **dict.fromkeys(
            "logprobs parallel_tool_calls enable_search preserve_thinking tool_stream".split(),
            as_switch,
        ),
    }
    # The dialects of the profiles that an entry's capabilities.reasoning names. Qwen Code 0.24.4.
    PROFILES: Mapping[str, str] = {
        "openai-effort": "effort",
        "dashscope-effort": "effort",
        "openai-reasoning": "openrouter",
        "deepseek-openai": "zai",
        "dashscope-thinking": "switch",
        "qwen-chat-template": "template",
    }
    # What these values mean to OpenAI is what happens here anyway.
    MEANT: Mapping[str, tuple[Any, ...]] = {
        "n": (1,),
        "modalities": (["text"],),
        "store": (False,),
        "service_tier": ("auto",),
        "tools": ([],),
        "tool_choice": ("auto", "none"),
        "parallel_tool_calls": (True,),
    }
    # By the type of a part: what the model must take.
    MEDIA: Mapping[str, str] = {
        "image_url": "image",
        "video_url": "video",
        "video": "video",
        "input_audio": "audio",
        "audio_url": "audio",
        "file": "file",
    }
    # A refusal of what the model cannot take: what it is, and the way out.
    UNSEEN: Mapping[str, str] = {
        "image": "an image, which {model} cannot see; choose a model that does, such as "
        "qwen3.7-plus",
        "video": "a video, which {model} cannot see; choose a model that does, such as "
        "qwen3.7-plus",
        "audio": "sound, which {model} cannot hear; choose a model that does, such as "
        "qwen3-omni-flash",
        "file": "a file, which {model} cannot read; send its text instead, or its pages as images "
        "to a model that sees them, such as qwen3.7-plus",
    }
    # Controls for other servers that clients offer for every server. Unknown ones pass, as a
    # parameter that Qwen will have tomorrow does.
    FOREIGN = frozenset(
        # Ollama, as Open WebUI's advanced parameters and Jan name them.
        "auto_compact ctx_len format keep_alive mirostat mirostat_eta mirostat_tau num_batch "
        "num_ctx num_gpu num_keep num_thread repeat_last_n use_mlock use_mmap "
        # llama.cpp, KoboldCpp, text-generation-webui, as SillyTavern names them.
        "add_bos_token cache_prompt dry_allowed_length dry_base dry_multiplier "
        "dry_sequence_breakers min_p sampler_order tfs tfs_z top_a typical_p xtc_probability "
        "xtc_threshold "
        # OpenRouter and Mistral.
        "include_reasoning models plugins provider route safe_prompt transforms usage".split()
    )

    def __init__(self, request: Json, target: Target):
        self.body = {**request, "model": target.model}
        self.family, self.model = target.provider.family, target.model
        self.config, self.traits = target.config, traits_of(self.family.name, target.model)
        self.shapes, self.facts = ToolShapes(request, self.traits), model_facts(target.model)
        self.profile = as_object(self.config.get("profile"))
        always = self.family.always_thinks
        is_always = (
            self.config.get("thinkingMandatory")
            or self.profile.get("canDisable") is False
            or (always and always in target.model)
        )
        self.mode = "always" if is_always else self.facts.thinking
        self.dialect = DIALECTS.get(self._dialect_name())
        # What the client said; what only the settings entry says goes out as it is written there.
        self.given = stated(request)
        self.entry_thinking = Thinking()
        self.notes: list[str] = []

    def run(self, api: str) -> tuple[Json, dict[str, str]]:
        """Return the body, and the rules that changed it, each with what it gave up."""
        fired: dict[str, str] = {}
        for rule in rules_for(api, self.traits):
            if rule.needs and self.body.keys().isdisjoint(rule.needs):
                continue
            before, self.notes = dict(self.body), []
            if rule.each:
                self.body = mapped(self.body, rule.each, functools.partial(rule.apply, self))
            else:
                rule.apply(self)
            if self.body != before:
                fired[rule.name] = "; ".join(self.notes)
        return self.body, fired

    # -- defaults, and what means nothing --------------------------------------------------------

    def entry_defaults(self) -> None:
        """samplingParams and extra_body of the settings entry, where the client says nothing."""
        if not self.config:
            return
        sampling, extra = (as_object(self.config.get(x)) for x in ("samplingParams", "extra_body"))
        given, entry = self.body, {**sampling, **extra}
        said, reasoning = Thinking.read(entry), self.config.get("reasoning")
        if Thinking.read(given).enabled is not None:
            # What the client says of thinking replaces all that the entry says.
            entry = self._with_open_template(without_keys(entry, said.fields))
        elif said.enabled is None and self.dialect:
            self.entry_thinking = Thinking.read({"reasoning": reasoning})
        elif said.enabled is None and isinstance(reasoning, dict) and "messages" in given:
            # As it stands there, where nothing is known of the endpoint's words.
            level = "xhigh" if reasoning.get("effort") == "max" else reasoning.get("effort")
            entry["reasoning"] = stated({**reasoning, "effort": level})
        if any(name in given for name in self.LIMITS):
            entry.pop("max_tokens", None)
        self.body = {**given, **entry, **without_keys(given, ("model",))}

    def no_nulls(self) -> None:
        """No null that means 'not set', at the top and in a JSON schema's frame."""
        self.body = stated(self.body)
        wanted = dig(self.body, "response_format", "json_schema")
        if wanted is not None:
            put(self.body, "response_format.json_schema", without_nulls(wanted))

    # -- messages --------------------------------------------------------------------------------

    def message_shapes(self, message: Json) -> Json:
        """Roles, parts and thoughts as chat completions have them; content, but no nulls."""
        content = as_list(message.get("content"))
        thoughts = [as_text(p.get("thinking")) for p in content if p.get("type") == "thinking"]
        parts = [chat_part(part) for part in content if part.get("type") != "thinking"]
        shaped = {**stated(message), "content": parts or as_text(message.get("content"))}
        if message["role"] == "developer":
            shaped["role"] = "system"
        if message["role"] == "assistant":
            if thoughts:
                shaped.setdefault("reasoning_content", "".join(thoughts))
            if isinstance(message.get("reasoning"), str) and "openrouter" not in self.traits:
                shaped.setdefault("reasoning_content", shaped.pop("reasoning"))
        return shaped

    def unseen_media(self) -> None:
        """Media that the model cannot take: refused in the user's latest question.

        A word stands for them elsewhere, as in Qwen Code, so that a conversation can go on.
        """
        unseen = [
            (place, self._unseen_kind(part))
            for place, message in enumerate(self.body["messages"])
            for part in as_list(message.get("content"))
            if self._unseen_kind(part)
        ]
        if not unseen:
            return
        asked = latest_question(self.body["messages"])
        for place, kind in reversed(unseen):
            if place in asked:
                what = self.UNSEEN[kind].format(model=self.model)
                raise BadRequest(
                    f"messages[{place}] holds {what}", param=f"messages.{place}.content"
                )
        leave_out_media(self.body, self._unseen_kind)
        self.notes.append(f"left out: {counted(len(unseen), 'media part')} of earlier messages")

    def _unseen_kind(self, part: Json) -> str:
        """Return what a part is that the model cannot take, one of UNSEEN; empty for others."""
        kind = self.MEDIA.get(as_text(part.get("type")), "")
        return "" if self.facts.sees is None or kind in self.facts.sees.split() else kind

    def audio_data(self, part: Json) -> Json:
        """Sound is input_audio with a URL; OpenAI has bare base64."""
        audio = as_object(part.get("input_audio"))
        if part.get("type") == "audio_url":
            audio = {"data": dig(part, "audio_url", "url") or part.get("audio_url")}
        data = audio.get("data")
        if not isinstance(data, str):
            return part
        data = data if re.match(r"(?i)(data|https?|oss|file):", data) else f"data:;base64,{data}"
        return {
            **without_keys(part, ("audio_url",)),
            "type": "input_audio",
            "input_audio": {**audio, "data": data},
        }

    def system_first(self) -> None:
        """One system message, first, with the text of all of them, and one of the user behind it.

        System messages behind the last answer become the user's: SillyTavern asks so for the next
        reply. So does the last one where nothing else is there. A conversation that the assistant
        opens begins with a short message of the user.
        """
        messages = self.body["messages"]
        spoken = [at for at, message in enumerate(messages) if message["role"] != "system"]
        if not spoken or messages[spoken[-1]]["role"] == "assistant":
            place = spoken[-1] + 1 if spoken else len(messages) - 1
            messages = messages[:place] + [{**each, "role": "user"} for each in messages[place:]]
        system = [message for message in messages if message["role"] == "system"]
        rest = [message for message in messages if message["role"] != "system"]
        if not any(message["role"] == "user" for message in rest):
            rest.insert(0, {"role": "user", "content": "Please begin."})
        if system:
            content = joined([message.get("content") for message in system], "\n\n")
            rest.insert(0, {**system[0], "content": content})
        self.body["messages"] = rest

    def portal_system(self) -> None:
        """The system message as parts, the first one with a cache_control marker."""
        system, *rest = with_system(self.body["messages"])
        parts = parts_of(system.get("content")) or [{"type": "text", "text": ""}]
        parts[0] = {"cache_control": {"type": "ephemeral"}, **parts[0]}
        self.body["messages"] = [{**system, "content": parts}, *rest]

    def history(self) -> None:
        """Ids, pairs, media and order of calls and results, also of those that are parts."""
        history = History(self.shapes, "alibaba" in self.traits)
        self.body["messages"] = history.repaired(self.body["messages"])
        if history.lost:
            self.notes.append(f"left out: {counted(history.lost, 'tool result')} without a call")

    def no_thoughts(self) -> None:
        """Thoughts that come back are left out where a model has none; OpenRouter takes them."""
        if self.mode == "none" and "openrouter" not in self.traits:
            dropped = sum(bool(each.get("reasoning_content")) for each in self.body["messages"])
            self.body["messages"] = [
                without_keys(each, ("reasoning_content",)) for each in self.body["messages"]
            ]
            if dropped:
                self.notes.append(f"without the thoughts of {counted(dropped, 'earlier answer')}")

    def reasoning_required(self, message: Json) -> Json:
        """Thoughts that the client did not keep are replaced by a word for them, where needed.

        That is with tool calls; at DeepSeek's own host in every message of the assistant.
        """
        if "deepseek" in self.traits and message["role"] == "assistant":
            return {**message, "reasoning_content": message.get("reasoning_content") or ""}
        return with_thoughts(message)

    def flat_content(self, message: Json) -> Json:
        """Text parts as one string: of the assistant, and wherever parts are lost or refused."""
        is_lossy = "glm" in self.model.lower() and not self.body.get("tools")
        is_flat = is_lossy or not self.traits.isdisjoint({"deepseek", "strings"})
        if not is_flat and message["role"] == "assistant":
            # A mark needs a part to sit on.
            parts = map(as_object, as_list(message.get("content")))
            is_flat = not any("cache_control" in part for part in parts)
        return with_flat_content(message) if is_flat else message

    def cache_markers(self) -> None:
        """Four cache_control markers at most: the first message's, and the last three.

        The portal wants the first one.
        """
        first, *rest = [as_list(message.get("content")) for message in self.body["messages"]]
        parts = itertools.chain(first, as_list(self.body.get("tools")), *rest)
        marked = [id(part) for part in parts if "cache_control" in as_object(part)]
        surplus = set(marked[1:-3])
        for path in ("tools", "messages.content") if surplus else ():
            self.body = mapped(
                self.body,
                path,
                lambda part: (
                    without_keys(part, ("cache_control",)) if id(part) in surplus else part
                ),
            )

    # -- parameters ------------------------------------------------------------------------------

    def max_tokens(self) -> None:
        """One limit under its old name, the smallest of them, and no more than the model has."""
        asked = stated({name: as_count(self.body.get(name)) for name in self.LIMITS})
        self.body = without_keys(self.body, asked)
        # Roo Code sends -1 for no limit.
        limits = [value for value in asked.values() if value > 0]
        if limits:
            self.body["max_tokens"] = min(filter(None, [*limits, self.facts.output]))

    def spellings(self) -> None:
        """Numbers and switches that came in another spelling, where it is clear."""
        found = {
            name: self.READERS[name](value)
            for name, value in self.body.items()
            if name in self.READERS and type(value) in (str, float)
        }
        self.body.update(stated(found))

    def sampling_range(self) -> None:
        """temperature below 2, top_p above 0."""
        temperature, top_p = self.body.get("temperature"), self.body.get("top_p")
        if isinstance(temperature, (int, float)) and temperature >= 2:
            self.body["temperature"] = 1.99
        if isinstance(top_p, (int, float)) and top_p <= 0:
            self._leave_out({"top_p"})

    def _leave_out(self, names: AbstractSet[str]) -> None:
        """Drop fields; the notes name those that ask for something that does not happen here."""
        dropped = sorted(names & self.body.keys())
        missed = [name for name in dropped if self.body[name] not in self.MEANT.get(name, ())]
        self.body = without_keys(self.body, dropped)
        if missed:
            self.notes.append(f"left out: {', '.join(missed)}")

    def legacy_functions(self) -> None:
        """The deprecated functions and function_call, as tools and tool_choice."""
        functions, choice = self.body.pop("functions", None), self.body.pop("function_call", None)
        if functions and not self.body.get("tools"):
            self.body["tools"] = [{"type": "function", "function": each} for each in functions]
        if choice is not None:
            self.body.setdefault("tool_choice", choice)

    def tools(self) -> None:
        """Tools and tool_choice as the endpoint takes them, and no empty list of tools."""
        if not self.body.get("tools"):
            self._leave_out({"tools", "tool_choice", "parallel_tool_calls"})
            return
        is_strict = any(dig(tool, "function", "strict") for tool in self.body["tools"])
        if is_strict and "alibaba" in self.traits:
            self.notes.append("left out: strict of tools")
        choice = as_object(self.body.get("tool_choice"))
        if choice.get("type") == "allowed_tools" and "function" not in choice:
            allowed = as_object(choice.get("allowed_tools", choice))
            names = {name_of(tool) for tool in as_list(allowed.get("tools"))}
            offered = [tool for tool in self.body["tools"] if name_of(tool) in names]
            self.body["tools"] = offered or self.body["tools"]
            self.body["tool_choice"] = allowed.get("mode") or "auto"
        elif choice:
            self.body["tool_choice"] = self.shapes.choice(choice)
        self.body = mapped(self.body, "tools", self.shapes.tool)

    def web_search(self) -> None:
        """web_search_options asks for the search of the endpoint, where there is one."""
        is_alibaba = "alibaba" in self.traits
        if self.body["web_search_options"] and not is_alibaba:
            return
        del self.body["web_search_options"]
        if "search" in self.traits:
            self.body.setdefault("enable_search", True)
        elif is_alibaba:
            self.notes.append("no web search, since this endpoint has none")

    def openai_only(self) -> None:
        """Fields that only OpenAI itself knows are left out."""
        defaults = [name for name in ("n", "modalities") if self.body.get(name) in self.MEANT[name]]
        user = [] if isinstance(self.body.get("user", ""), str) else ["user"]
        self._leave_out(self.OPENAI_ONLY.union(defaults, user))

    def foreign_fields(self) -> None:
        """Fields of other servers are left out; the one that Qwen has too gets Qwen's name."""
        self._leave_out(self.FOREIGN)
        if "repeat_penalty" in self.body:
            self.body.setdefault("repetition_penalty", self.body.pop("repeat_penalty"))

    def fill_in_the_middle(self) -> None:
        """prompt and suffix as one prompt with Qwen's marks."""
        prompt, suffix = self.body["prompt"], self.body["suffix"]
        if isinstance(suffix, str) and isinstance(prompt, str):
            del self.body["suffix"]
            self.body["prompt"] = f"<|fim_prefix|>{prompt}<|fim_suffix|>{suffix}<|fim_middle|>"

    def stream(self) -> None:
        """The upstream always streams and always counts."""
        options = without_keys(as_object(self.body.get("stream_options")), ("include_obfuscation",))
        self.body.update(stream=True, stream_options={**options, "include_usage": True})

    # -- thinking --------------------------------------------------------------------------------

    def thinking(self) -> None:
        """What the client asked about thinking, in the endpoint's words and as far as it can."""
        if not self.dialect:
            return
        asked = Thinking.read(without_keys(self.body, self.body.keys() - self.given.keys()))
        kept = {"reasoning"} if self.dialect.is_nested else set()
        self.body = without_keys(self.body, asked.fields - kept)
        if "alibaba" in self.traits and "chat_template_kwargs" in self.body:
            self.body = self._with_open_template(self.body)
        if asked.enabled is None:
            asked = self.entry_thinking
        default = as_effort(self.profile.get("defaultEffort"))
        is_on = default or self.dialect.is_default
        if is_on and (asked.enabled is None or self.mode == "always" and not asked.enabled):
            asked = Thinking(True, default)
        if asked.enabled is not None:
            self._ask(asked, self.dialect)

    def _dialect_name(self) -> str:
        """Return which of DIALECTS the model is told in; empty where nothing is known of it."""
        name, family = self.facts.dialect, self.family.name
        profile = as_text(self.profile.get("profile"))
        if profile in self.PROFILES or family in DIALECTS:
            return self.PROFILES.get(profile, family)
        if "alibaba" in self.traits:
            return "unknown" if self.mode == "unknown" else name
        if "qwen" not in self.traits or self.mode == "unknown":
            return ""
        return f"own {name}" if f"own {name}" in DIALECTS else name

    def _with_open_template(self, body: Json) -> Json:
        """Return a body with chat_template_kwargs that say nothing of thinking, if any."""
        template = dict(as_object(body.get("chat_template_kwargs")))
        opened = without_keys(body, ("chat_template_kwargs",))
        if "preserve_thinking" in template and "alibaba" in self.traits:
            opened.setdefault("preserve_thinking", template.pop("preserve_thinking"))
        template = without_keys(template, Thinking.read(template).fields)
        return {**opened, "chat_template_kwargs": template} if template else opened

    def _ask(self, asked: Thinking, dialect: Dialect) -> None:
        effort, levels = asked.effort or "", dialect.efforts
        budget = asked.budget or dialect.budgets.get(effort)
        level = "" if levels is None else self._nearest(levels.get(effort, effort))
        # Each of OpenRouter's fields switches thinking on by itself.
        switch = {} if dialect.is_nested else dialect.on
        if self.mode == "none":
            if asked.enabled:
                self.notes.append(f"no thinking, since {self.model} does not")
        elif not asked.enabled and self.mode == "always":
            self.notes.append(f"thinking stays on, since {self.model} always thinks")
        elif not asked.enabled:
            self._set(dialect.off)
        elif budget and dialect.budget:
            self._set({**switch, dialect.budget: budget})
        elif level:
            name = "reasoning.effort" if dialect.is_nested else "reasoning_effort"
            self._set({**switch, name: level})
        else:
            self._set(dialect.on)
            if budget:
                self.notes.append(f"no limit on thinking, since {self.model} knows none")

    def _set(self, fields: Json) -> None:
        """Set fields about thinking; the switch also where servers of one's own look for it."""
        if self.mode == "always":
            fields = without_keys(fields, ("enable_thinking",))
        if "enable_thinking" in fields and "alibaba" not in self.traits and not self.profile:
            fields = {**fields, "chat_template_kwargs.enable_thinking": fields["enable_thinking"]}
        for path, value in fields.items():
            put(self.body, path, value)

    def _nearest(self, level: str) -> str:
        """Return a level, or of those that the settings list for the model the nearest one."""
        listed = [each for each in as_list(self.profile.get("efforts")) if each in EFFORTS]
        if level not in EFFORTS or not listed or level in listed:
            return level
        wanted = EFFORTS.index(level) + 0.1
        return str(min(listed, key=lambda each: abs(EFFORTS.index(each) - wanted)))

    def _thinks(self) -> bool:
        """Return whether the model will think about this body."""
        if self.mode in ("none", "always"):
            return self.mode == "always"
        asked = Thinking.read(self.body).enabled
        return self.mode == "on" if asked is None else asked

    def thinking_clash(self) -> None:
        """No forced call and no JSON mode while thinking.

        Thinking is switched off if it is only a default; else the prompt asks for what was wanted.
        """
        is_wanted = self.mode == "always" or Thinking.read(self.given).enabled
        for is_asked, name, cause, ask in (
            (forces_call, "tool_choice", "a tool call is forced", ask_for_call),
            (wants_json, "response_format", "JSON is asked for", ask_for_json),
        ):
            if not is_asked(self.body) or not self._thinks():
                continue
            if is_wanted:
                ask(self.body)
                self.notes.append(
                    f"{name} is replaced by an instruction in the prompt, since the model thinks"
                )
            else:
                names = ("thinking_budget", "reasoning_effort", "enable_thinking")
                self.body = without_keys(self.body, names)
                self._set((self.dialect or DIALECTS["qwen"]).off)
                self.notes.append(f"no thinking, since {cause}")

    def json_word(self) -> None:
        """Messages that ask for JSON hold that word."""
        texts = (text_of(message.get("content")) for message in self.body["messages"])
        if wants_json(self.body) and not any("json" in text.lower() for text in texts):
            add_instruction(self.body, "Answer in JSON.")


def mapped(value: Any, path: str, change: Callable[[Any], Any]) -> Any:
    """Return the value with what `change` makes of each item, where a path leads over lists.

    >>> mapped({"a": [{"b": [1, 2]}, {}]}, "a.b", str)
    {'a': [{'b': ['1', '2']}, {}]}
    """
    name, _, rest = path.partition(".")
    items = dig(value, name)
    if not isinstance(items, list):
        return value
    return {**value, name: [mapped(item, rest, change) if rest else change(item) for item in items]}


def without_nulls(value: Any) -> Any:
    """Return an object without its nulls, but for those that are values in a JSON Schema."""
    if not isinstance(value, dict):
        return value
    values = ("default", "const")
    return {name: item for name, item in value.items() if item is not None or name in values}


def joined(contents: list[Any], separator: str) -> Any:
    """Return the contents of messages as one: as parts if one of them is."""
    if any(isinstance(content, list) for content in contents):
        return [part for content in contents for part in parts_of(content)]
    return separator.join(filter(None, map(as_text, contents)))


def put(body: Json, path: str, value: Any) -> None:
    """Set a field of a request, or one of an object in it."""
    name, _, inner = path.partition(".")
    body[name] = {**as_object(body.get(name)), inner: value} if inner else value


def with_thoughts(message: Json) -> Json:
    """Return the message; one with tool calls gets a word for thoughts that were not kept."""
    is_call = message["role"] == "assistant" and message.get("tool_calls")
    is_missing = is_call and not message.get("reasoning_content")
    # Kimi takes an empty text for none.
    return {**message, "reasoning_content": "(not kept)"} if is_missing else message


def with_flat_content(message: Json) -> Json:
    """Return the message, with one string for parts that are nothing but text."""
    content = message.get("content")
    is_text = isinstance(content, list) and all(dig(part, "type") == "text" for part in content)
    return {**message, "content": text_of(content)} if is_text else message


def chat_part(part: Json) -> Json:
    """Return a part of a message as chat completions have it; as it is where it is unknown.

    Those of the Responses API and of Anthropic's messages stand in histories that clients keep.
    """
    kind = as_text(part.get("type"))
    if kind in ("input_text", "output_text", "summary_text", "reasoning_text", "refusal"):
        text = as_text(part.get("refusal" if kind == "refusal" else "text"))
        return stated({"type": "text", "text": text, "cache_control": part.get("cache_control")})
    if kind in ("image", "input_image"):
        return image_part(part)
    if kind == "input_file" and (part.get("file_data") or part.get("file_url")):
        names = ("filename", "file_data", "file_url")
        return {"type": "file", "file": {name: part[name] for name in names if part.get(name)}}
    return part


def image_part(part: Json) -> Json:
    """Return an image of the Responses API or Anthropic's as chat completions have it."""
    image, source = part.get("image_url"), part.get("source")
    if isinstance(source, dict):
        data = f"data:{source.get('media_type')};base64,{source.get('data')}"
        image = source.get("url") or data
    if not image:
        return part
    image = image if isinstance(image, dict) else {"url": image}
    detail = part.get("detail") or None
    return {"type": "image_url", "image_url": stated({"detail": detail, **image})}


def latest_question(messages: list[Json]) -> range:
    """Return the places of the user's latest message and of the user's messages just before it."""
    places = (place for place, message in enumerate(messages) if message["role"] == "user")
    first = last = max(places, default=-1)
    while first > 0 and messages[first - 1]["role"] == "user":
        first -= 1
    return range(first, last + 1)


def leave_out_media(
    body: Json, is_refused: Callable[[Any], Any] = lambda part: dig(part, "type") != "text"
) -> None:
    """Put a word in the place of media that are refused, but not in the user's latest question."""
    asked = latest_question(body["messages"])
    word = {"type": "text", "text": "(left out: the model cannot take it)"}
    body["messages"] = [
        message
        if place in asked
        else mapped(message, "content", lambda part: word if is_refused(part) else part)
        for place, message in enumerate(body["messages"])
    ]


def parts_of(content: Any) -> list[Json]:
    """Return a message's content as parts."""
    if isinstance(content, list):
        return list(content)
    return [{"type": "text", "text": content}] if content else []


def wants_json(body: Json, types: tuple[str, ...] = ("json_object", "json_schema")) -> bool:
    """Return whether a request asks for nothing but JSON, in one of these ways."""
    return dig(body, "response_format", "type") in types


def with_system(messages: list[Json]) -> list[Json]:
    """Return the messages, with an empty system message in front if there is none."""
    is_there = messages[0]["role"] == "system"
    return messages if is_there else [{"role": "system", "content": ""}, *messages]


def add_instruction(body: Json, text: str) -> None:
    """Append a sentence to the system message, or put one first."""
    system, *rest = with_system(body["messages"])
    body["messages"] = [{**system, "content": joined([system["content"], text], "\n\n")}, *rest]


def forces_call(body: Json) -> bool:
    """Return whether a request leaves the model no choice but to call a tool."""
    return bool(body.get("tools")) and (body.get("tool_choice") or "auto") not in ("auto", "none")


def ask_for_call(body: Json) -> None:
    """Replace a tool_choice that forces a call by a sentence; offer nothing but a named tool."""
    name = name_of(body["tool_choice"])
    named = [tool for tool in body["tools"] if name and name_of(tool) == name]
    body["tools"], body["tool_choice"] = named or body["tools"], "auto"
    which = f"the tool {name}" if named else "one of the tools"
    add_instruction(body, f"Call {which} now; do not answer in text.")


def ask_for_json(body: Json) -> None:
    """Replace a response_format that cannot be sent by a sentence."""
    schema = dig(body.pop("response_format"), "json_schema", "schema")
    words = "Answer with one JSON object only: no other text, no code fence."
    if schema is not None:
        words += f" It must match this JSON Schema:\n{json.dumps(schema, ensure_ascii=False)}"
    add_instruction(body, words)


class Rule(NamedTuple):
    """One deliberate change: its name, what does it, why, and where.

    each: the path to the items that `apply` takes, and returns what goes in their place, where it
    does not change the body itself; needs: fields, one of which the body must have; where: words
    for traits or families, one of which must be there (none: everywhere); apis: words for the kinds
    of request.
    """

    name: str
    apply: Callable[..., Any]
    source: str
    each: str = ""
    needs: AbstractSet[str] = frozenset()
    where: str = ""
    apis: str = "chat"


# In this order: nulls and defaults first, thinking behind what the client and the entry say of it.
RULES = (
    Rule(
        "no-nulls",
        Rewrite.no_nulls,
        "pydantic-ai and LangChain JS send null for 'not set'",
        apis="chat text",
    ),
    Rule(
        "entry-defaults",
        Rewrite.entry_defaults,
        "Qwen Code, model-providers.md: samplingParams, extra_body",
        apis="chat text",
    ),
    Rule(
        "spellings",
        Rewrite.spellings,
        "open-webui #16682: custom parameters as text",
        needs=Rewrite.READERS.keys(),
        apis="chat text",
    ),
    Rule(
        "message-shapes",
        Rewrite.message_shapes,
        "OpenAI reference, Responses and refusals; Anthropic reference, Messages; DashScope 400: "
        "developer is not one of [...], Field required: input.messages.N.content",
        each="messages",
    ),
    Rule(
        "unseen-media",
        Rewrite.unseen_media,
        "Model Studio, model pages; Qwen Code 0.24.4, its table of modalities",
        where="alibaba",
    ),
    Rule(
        "audio-data",
        Rewrite.audio_data,
        "Model Studio, 'Omni': input_audio.data is a URL or a data URL",
        each="messages.content",
        where="alibaba",
    ),
    Rule(
        "legacy-functions",
        Rewrite.legacy_functions,
        "OpenAI reference: functions, deprecated by tools",
        needs={"functions", "function_call"},
    ),
    Rule(
        "tools",
        Rewrite.tools,
        "OpenAI reference, custom tools; MiniMax 400: function parameters is empty; vLLM: null "
        "tool_choice; DashScope 400: Tool names are not allowed to be [search]",
        needs={"tools", "tool_choice", "parallel_tool_calls"},
    ),
    Rule(
        "history",
        Rewrite.history,
        "DashScope 400: qwen-code #656, #2360, arguments must be JSON; Qwen Code, converter.ts; "
        "Anthropic's messages, which Cursor sends to chat completions",
    ),
    Rule(
        "system-first",
        Rewrite.system_first,
        "400: System message must be at the beginning; DashScope 400: The input messages do not "
        "contain elements with the role of user.",
        where="qwen",
    ),
    Rule(
        "portal-system",
        Rewrite.portal_system,
        "CLIProxyAPI 29dba0399, PR #2520, #2537",
        where="portal",
    ),
    Rule(
        "no-thoughts",
        Rewrite.no_thoughts,
        "Model Studio, 'Deep thinking'",
    ),
    Rule(
        "reasoning-required",
        Rewrite.reasoning_required,
        "DeepSeek API, thinking mode; Kimi 400: reasoning_content is missing in assistant tool "
        "call message",
        each="messages",
        where="deepseek thoughts",
    ),
    Rule(
        "flat-content",
        Rewrite.flat_content,
        "Model Studio, chat reference: an assistant's content is a string; Qwen Code, "
        "dashscope.ts: glm loses parts",
        each="messages",
        where="alibaba deepseek strings",
    ),
    Rule(
        "cache-markers",
        Rewrite.cache_markers,
        "Model Studio, 'Context cache': at most 4",
        where="alibaba",
    ),
    Rule(
        "max-tokens",
        Rewrite.max_tokens,
        "DashScope 400: Range of max_tokens should be [1, N]",
        needs=frozenset(Rewrite.LIMITS),
        where="limits",
        apis="chat text",
    ),
    Rule(
        "sampling-range",
        Rewrite.sampling_range,
        "Model Studio, chat reference: temperature [0, 2), top_p (0, 1]",
        needs={"temperature", "top_p"},
        where="alibaba",
        apis="chat text",
    ),
    Rule(
        "web-search",
        Rewrite.web_search,
        "Model Studio, chat reference: enable_search",
        needs={"web_search_options"},
    ),
    Rule(
        "openai-only",
        Rewrite.openai_only,
        "Model Studio, OpenAI compatibility",
        needs=Rewrite.OPENAI_ONLY | {"n", "modalities", "user"},
        where="openai-only",
        apis="chat text",
    ),
    Rule(
        "foreign-fields",
        Rewrite.foreign_fields,
        "Open WebUI 0.12, SillyTavern 1.19, Jan 0.8: their settings",
        needs=Rewrite.FOREIGN | {"repeat_penalty"},
        where="alibaba",
        apis="chat text",
    ),
    Rule(
        "thinking",
        Rewrite.thinking,
        "Model Studio, 'Deep thinking', and each provider's reference",
    ),
    Rule(
        "thinking-clash",
        Rewrite.thinking_clash,
        "Model Studio, 'Function calling', 'Structured output'",
        needs={"tool_choice", "response_format"},
        where="qwen",
    ),
    Rule(
        "json-word",
        Rewrite.json_word,
        "DashScope 400: 'messages' must contain the word 'json' in some form",
        needs={"response_format"},
        where="qwen",
    ),
    Rule("stream", Rewrite.stream, "one path for all: see relay", apis="chat text"),
    Rule(
        "fill-in-the-middle",
        Rewrite.fill_in_the_middle,
        "Model Studio, 'Completions': there is no suffix parameter",
        needs={"suffix"},
        where="alibaba",
        apis="text",
    ),
)


@functools.lru_cache(maxsize=256)
def rules_for(api: str, traits: frozenset[str]) -> tuple[Rule, ...]:
    """Return the rules for a kind of request at an endpoint."""
    return tuple(
        rule
        for rule in RULES
        if api in rule.apis.split() and (not rule.where or traits & set(rule.where.split()))
    )


class Repair(NamedTuple):
    """What to do about a refusal by name: in the text of a 400, if the body has what it names.

    pattern: a group with the name of a field holds the number for it; how: for the log; when: what
    the body must ask for; unasked: not if it asks for thinking, or the model always thinks; each:
    what goes in the place of each message; then: a change that needs messages (bool: none); sets:
    what to set, None to leave a field out.
    """

    pattern: str
    how: str
    when: Callable[[Json], bool] = bool
    unasked: bool = False
    each: Callable[[Json], Json] | None = None
    then: Callable[[Json], object] = bool
    sets: Json = {}


_THOUGHTS_WANTED = r"reasoning_content.{0,60}(is missing|must be)|missing.{0,40}reasoning_content"
REPAIRS = (
    Repair(
        r"[Rr]ange of max_tokens should be \[\d+, ?(?P<max_tokens>\d+)\]",
        "with max_tokens {max_tokens}",
    ),
    Repair(
        r"thinking_budget.*not greater than (?P<thinking_budget>\d+)",
        "with thinking_budget {thinking_budget}",
    ),
    Repair(
        r"enable_thinking is true",
        "without thinking",
        when=wants_json,
        unasked=True,
        sets={"enable_thinking": False},
    ),
    Repair(
        r"enable_thinking is true",
        "with the JSON asked for by prompt",
        when=wants_json,
        then=ask_for_json,
    ),
    Repair(
        r"json_schema|response_format",
        "with the JSON schema in the prompt",
        when=functools.partial(wants_json, types=("json_schema",)),
        then=ask_for_json,
        sets={"response_format": {"type": "json_object"}},
    ),
    Repair(
        r"logprobs",
        "without log probabilities",
        sets={"logprobs": None, "top_logprobs": None},
    ),
    Repair(
        rf"[Pp]refill is incompatible with enable_thinking|{_THOUGHTS_WANTED}",
        "without thinking",
        unasked=True,
        then=functools.partial(put, path="chat_template_kwargs.enable_thinking", value=False),
        sets={"enable_thinking": False},
    ),
    Repair(
        _THOUGHTS_WANTED,
        "with a word for thoughts that were not kept",
        each=with_thoughts,
    ),
    Repair(
        r"(valid|be a) string.{0,40}content|content.{0,40} (must|should) be a string"
        r"|item type in content",
        "with text parts joined",
        each=with_flat_content,
    ),
    Repair(
        r"item type in content|(image|audio|video)\w*( input)?( is| are)? not supported"
        r"|Supported values are: 'text'",
        "without media of earlier messages",
        then=leave_out_media,
    ),
    Repair(
        r"enable_thinking.*(restricted to True|must be True)",
        "with thinking",
        sets={"enable_thinking": True},
    ),
    Repair(
        r'tool_choice.*\["none", "auto"\]',
        "without thinking",
        when=forces_call,
        unasked=True,
        sets={"enable_thinking": False},
    ),
    Repair(
        r"tool_choice",
        "with the tool call asked for by prompt",
        when=forces_call,
        then=ask_for_call,
    ),
)


def repair_request(body: Json, error: UpstreamError) -> str:
    """Take out of the body what the upstream has just refused by name.

    Returns how, or "" if there was no such thing.
    """
    is_always = model_facts(as_text(body.get("model"))).thinking == "always"
    is_asked = is_always or Thinking.read(body).enabled is not None
    for repair in REPAIRS if error.status == 400 else ():
        match = re.search(repair.pattern, error.message[:MAX_ERROR_TEXT_SCANNED], re.S)
        has_place = repair.then is bool or "messages" in body
        if not match or not has_place or not repair.when(body) or (repair.unasked and is_asked):
            continue
        before, limits = dict(body), match.groupdict()
        for name in limits.keys() & body.keys():
            body[name] = as_count(limits[name])
        if repair.each:
            body.update(mapped(body, "messages", repair.each))
        repair.then(body)
        body.update(repair.sets)
        for name in repair.sets.keys() - stated(repair.sets):
            del body[name]
        # Otherwise the same body would be refused again.
        if body != before:
            return repair.how.format(**limits)
    return ""


def check_object(value: Any, **fields: type) -> Json:
    """Return a request that is an object; these fields are of these types, if they are there.

    What is in extra_body goes beside it: openai-python puts it there, other clients send it as it
    is written. `stream` may be spelled as clients like. Raises BadRequest that names what is wrong.
    """
    if not isinstance(value, dict):
        raise BadRequest(f"the body must be a JSON object, not {json_type(value)}")
    extra = value.get("extra_body")
    if isinstance(extra, dict):
        log.debug("extra_body is merged: %s", ", ".join(extra))
        value = {**extra, **stated(without_keys(value, ("extra_body",)))}
    request = {**value, **stated({"stream": as_switch(value.get("stream"))})}
    words = {bool: "true or false", list: "a list", dict: "an object"}
    for name, kind in fields.items():
        if request.get(name) is not None and not isinstance(request[name], kind):
            raise BadRequest(f"{name} must be {words[kind]}", param=name)
    return request


def check_messages(messages: Any) -> None:
    """Raise BadRequest for messages that no upstream could make sense of."""
    if not isinstance(messages, list) or not messages:
        raise BadRequest("messages must be a list of at least one message", param="messages")
    for index, message in enumerate(messages):
        if not isinstance(dig(message, "role"), str):
            raise BadRequest(
                f"messages[{index}] must be an object with a role", param=f"messages.{index}"
            )
        content, where = message.get("content"), f"messages.{index}.content"
        if content is not None and not isinstance(content, (str, list)):
            raise BadRequest(
                f"the content of messages[{index}] must be a string or a list of parts", param=where
            )
        if not all(isinstance(part, dict) for part in as_list(content)):
            raise BadRequest(f"every part of messages[{index}] must be an object", param=where)


# ------------------------------------------------------------------------------------------------
# Answers
# ------------------------------------------------------------------------------------------------
# Pure: the upstream's bytes in, clean chunks out; a refusal's text in, an UpstreamError out.


class Refusal(NamedTuple):
    """What an upstream's refusal says, whichever of its shapes it has."""

    status: int
    message: str
    code: str = ""
    request_id: str | None = None
    param: str | None = None

    @classmethod
    def read(cls, status: int, text: str) -> Refusal:
        """Read a refusal by its content, never by its type: JSON, JSON in SSE lines, any text.

        >>> Refusal.read(400, 'data: {"code":"InvalidParameter","message":"m"}').message
        'm'
        """
        stripped = text.strip().lstrip("\ufeff")
        if stripped[:1] not in ("{", "<"):
            for event in EventDecoder().feed(stripped.encode("utf-8", "replace") + b"\n\n"):
                if event.data[:1] == b"{":
                    return cls.read(event.status or status, event.data.decode("utf-8", "replace"))
        value = loads(stripped)
        if isinstance(value, dict):
            return cls.of(status, value)
        # DashScope's own messages begin with <400>, which is no web page.
        page = web_page(stripped)
        if page:
            # One with these comes from a gateway that is busy, and is judged by its status.
            code = "html" if status in (429, 502, 503, 529) else "upstream_html"
            return cls(status, f"a gateway answered with {page} instead of the API", code)
        return cls(status, " ".join(shorten(stripped, 500).split()))

    @classmethod
    def of(cls, status: int, value: Json) -> Refusal:
        """Read a JSON object: OpenAI's shape, the native one, a string, or one within another."""
        choice = next(iter(as_list(value.get("choices"))), None)
        contents = (dig(choice, name, "content") for name in ("delta", "message"))
        text = text_of(first_of((str, list), dig(choice, "text"), *contents))
        if text:
            # error_finish: the text of the error is the content.
            return cls.read(status, text)
        error = value.get("error", value)
        if isinstance(error, str):
            error = {"message": error, **value, "code": value.get("code") or error}
        error = as_object(error)
        message = (
            first_of(
                str,
                error.get("message"),
                error.get("detail"),
                value.get("detail"),
                value.get("message"),
            )
            or ""
        )
        codes = (error.get("code"), error.get("type"))
        names = [str(code) for code in codes if isinstance(code, (str, int))]
        # No status, and no message, which has blanks.
        code = next((name for name in names if re.fullmatch(r"(?![45]\d\d\Z)\S{1,60}", name)), "")
        request_id = first_of(
            str, value.get("request_id"), error.get("request_id"), value.get("traceId")
        )
        if message.startswith(("{", "data:", "id:", "event:")):
            # JSON or a frame as the message.
            inner = cls.read(status, message)
            request_id = request_id or inner.request_id
            return inner._replace(request_id=request_id, code=inner.code or code)
        param = shorten(as_text(error.get("param")), 200) or None
        return cls(status, message, code, request_id, param)


class ErrorRule(NamedTuple):
    """What becomes of a refusal: conditions, then the kind of error."""

    # Empty: any.
    statuses: tuple[int, ...] | range
    # Searched in 'code: message', ignoring case.
    pattern: str
    # Of ERROR_KINDS.
    kind: str
    # None: the kind's, or else the upstream's.
    code: str | None = None
    # Empty: any.
    families: tuple[str, ...] = ()
    # In place of the upstream's.
    message: str = ""


# How the client and the other providers are told.
ERROR_KINDS: dict[str, Json] = {
    "request": {"status": 400, "type": "invalid_request_error"},
    "name": {"status": 404, "type": "invalid_request_error"},
    "size": {"status": 413, "type": "invalid_request_error", "code": "request_too_large"},
    "key": {
        "status": 401,
        "type": "authentication_error",
        "code": "invalid_api_key",
        "moves_on": True,
    },
    "permission": {"status": 403, "type": "permission_error"},
    "quota": {
        "status": 429,
        "type": "insufficient_quota",
        "code": "insufficient_quota",
        "moves_on": True,
        # openai-python and -node would retry a 429 otherwise.
        "headers": (("x-should-retry", "false"),),
    },
    "rate": {
        "status": 429,
        "type": "rate_limit_error",
        "code": "rate_limit_exceeded",
        "retry": True,
    },
    "load": {"status": 503, "type": "server_error", "retry": True},
    "gateway": {"status": 503, "type": "server_error", "retry": True, "moves_on": True},
    "timeout": {"status": 504, "type": "upstream_timeout"},
    "fault": {"status": 502, "type": "upstream_error"},
}
# First match wins. Model Studio 'Error messages', Coding Plan FAQ, qwen-code issues; by text where
# the code lies: insufficient_quota and Throttling.AllocationQuota are mostly a limit per minute,
# that recovers.
ERROR_RULES = (
    ErrorRule(
        range(300, 400),
        r"",
        "fault",
        message="the upstream wants to redirect the request elsewhere, which is not followed with "
        "a key; check the base URL",
    ),
    ErrorRule((), r"^upstream_html: ", "fault"),
    ErrorRule((), r"data_?inspection_?failed|inappropriate content", "request", "content_filter"),
    ErrorRule((), r"max_(completion_)?tokens\W.{0,60}too large", "request"),
    ErrorRule(
        (),
        r"range of input length|context_length_exceeded|exceed_context_size"
        r"|(input|prompt) (length|is)[^.]{0,40} (exceeds|too long)"
        r"|(maximum|model's|available|greater than the) (context|model) (length|size|window)"
        r"|longer than the (model's |maximum )*(context|model) length|max context length"
        r"|context the overflows|model token limit|context limit|number of tokens allowed"
        r"|context (length|size|window) (has been )?exceeded",
        "request",
        "context_length_exceeded",
    ),
    ErrorRule(
        (),
        r"max bytes to request body|BadRequest\.TooLarge|entity too large|string value length"
        r"|max data-uri",
        "size",
    ),
    ErrorRule((), r"arrearage|good standing|overdue|CommodityNotPurchased", "quota"),
    ErrorRule(
        (),
        r"free allocated quota|free tier of the model|FreeTierOnly"
        r"|(hour|week|month)\w* allocated quota|will reset at|daily (quota|limit)|quota_exceeded",
        "quota",
    ),
    ErrorRule((), r"(image|audio|video) input is not supported", "request"),
    ErrorRule((402,), r"", "quota"),
    ErrorRule((403,), r"insufficient_quota", "quota"),
    ErrorRule((429,), r"insufficient_quota", "quota", families=("portal",)),
    ErrorRule((), r"only available for coding agents", "permission", "client_not_accepted"),
    ErrorRule((500, 503, 0), r"ModelServingError|ModelUnavailable|too many requests", "load"),
    ErrorRule((429,), r"", "rate"),
    ErrorRule(
        (),
        r"throttling|limit_?requests|limit_burst_rate|insufficient_quota"
        r"|allocated quota exceeded|rate limit|\b130[25]: ",
        "rate",
    ),
    ErrorRule((401,), r"", "key"),
    ErrorRule(
        (403, 0),
        r"invalid.?api.?-?key|access token|token expired|session has expired|unauthorized",
        "key",
    ),
    ErrorRule((403,), r"", "permission"),
    ErrorRule((0,), r"access_?denied|unpurchased", "permission"),
    ErrorRule(
        (404, 400, 0),
        r"model_?not_?found|model( \S+| '[^']*')?( does| is)?( currently)? not (exist|supported)"
        r"|unsupported model",
        "name",
        "model_not_found",
    ),
    ErrorRule(
        (404,),
        r"^\S*: \Z",
        "name",
        message="the upstream knows no such path (HTTP 404, empty answer); check the base URL",
    ),
    ErrorRule((404,), r"", "name"),
    ErrorRule((413,), r"", "size"),
    ErrorRule((504,), r"", "timeout"),
    ErrorRule((), r"RequestTimeOut|stream timeout", "timeout"),
    ErrorRule((502, 503, 529), r"", "gateway"),
    ErrorRule((0,), r"invalid_?parameter|invalid_request", "request"),
    ErrorRule((400, 405, 406, 408, 409, 411, 414, 415, 422), r"", "request"),
    ErrorRule((), r"", "fault"),
)


def error_rule_for(refusal: Refusal, family: Family) -> ErrorRule:
    """Return the first of ERROR_RULES that matches."""
    text = f"{refusal.code}: {refusal.message}"[:MAX_ERROR_TEXT_SCANNED]
    return next(
        rule
        for rule in ERROR_RULES
        if (not rule.statuses or refusal.status in rule.statuses)
        and (not rule.families or family.name in rule.families)
        and re.search(rule.pattern, text, re.I)
    )


def to_upstream_error(
    refusal: Refusal, family: Family, headers: Mapping[str, str] = {}
) -> UpstreamError:
    """Return the error for the client, with advice."""
    rule = error_rule_for(refusal, family)
    kind = ERROR_KINDS[rule.kind]
    code = rule.code or kind.get("code", refusal.code)
    silence = (
        f"returned HTTP {refusal.status} with an empty body"
        if refusal.status
        else "gave neither a completion nor an error message"
    )
    message = rule.message or refusal.message or f"the upstream {silence}"
    advice = {
        "invalid_api_key": "Check the key and that it belongs to this base URL",
        "model_not_found": "/v1/models lists those that there are; --alias 'gpt-*=ID' leads names "
        "that a client has built in to one of them",
        **family.advice,
    }.get(code)
    retry_after = retry_after_of(headers)
    error = UpstreamError(
        f"{message.rstrip('.')}. {advice}" if advice else message,
        **{**kind, "code": code},
        param=refusal.param,
        request_id=refusal.request_id or headers.get("x-request-id"),
        retry_after=retry_after,
    )
    if error.status == 429 and error.retry or error.status == 503 and retry_after is not None:
        seconds = max(5 if retry_after is None else retry_after, 1)
        # openai-node sleeps any Retry-After, openai-python none above 60.
        error.headers.append(("Retry-After", str(int(min(seconds, 60)))))
    return error


def retry_after_of(headers: Mapping[str, str]) -> float | None:
    """Return the seconds of retry-after-ms or Retry-After (RFC 9110 10.2.3), None without."""
    for name, scale in (("retry-after-ms", 1000), ("retry-after", 1)):
        value = (headers.get(name) or "").strip()
        if re.match(r"\d{1,9}(\.\d+)?\Z", value):
            return float(value) / scale
    try:
        date = parsedate_to_datetime(headers.get("retry-after", ""))
        return max(0.0, date.timestamp() - time.time())
    except (TypeError, ValueError, IndexError, OverflowError):
        return None


class Increments:
    """Makes increments of a text that may arrive cumulatively: each delta all of the text so far.

    Some Coding Plan paths do that (qwen-code #1184, #3279, PR #3896). An increment may start with
    the whole text so far as well: "ha" and then "haha" is the text "hahaha". The two are told apart
    by evidence: how many characters were repeated, delta by delta, while each delta extended the
    one before it. Only what both readings agree on is passed on until one of them is ruled out. One
    delta that does not start with the delta before it proves increments for good; EVIDENCE repeated
    characters prove a cumulative stream, unless the text is one short unit over and over, which is
    what a model that laughs or draws a line really sends. A mere repeat of fewer characters is an
    increment, as to wait would make every answer of equal chunks late. Undecidable are cumulative
    answers that end before that, and periodic ones: they are read as increments. What is read
    wrongly is an answer whose first increments each begin with all of the one before, as rows that
    grow ("1 2 3", "1 2 3 4 5 6", ...).
    """

    EVIDENCE = 24

    def __init__(self) -> None:
        # Increments for good: feed() need not be asked any more.
        self.is_settled = False
        self._is_cumulative = False
        self._joined = self._latest = ""
        self._sent = self._evidence = 0

    def feed(self, text: str) -> str:
        """Return the text to pass on now."""
        if self.is_settled or not text:
            return text
        if self._is_cumulative:
            fresh = text[len(self._latest) :] if text.startswith(self._latest) else text
            self._latest += fresh
            return fresh
        is_repeat = text == self._latest
        # A longer repeat is kept back two times at most.
        is_kept = len(text) >= self.EVIDENCE and len(self._joined) <= 2 * len(text)
        if not text.startswith(self._latest) or is_repeat and not is_kept:
            return self._settle(self._joined + text)
        self._evidence += 0 if is_repeat else len(self._latest)
        self._joined, self._latest = self._joined + text, text
        if self._evidence >= self.EVIDENCE and not self.is_periodic(text):
            self._is_cumulative = True
            return text[self._sent :]
        agreed = len(os.path.commonprefix([self._joined, text]))
        fresh, self._sent = self._joined[self._sent : agreed], max(agreed, self._sent)
        return fresh

    def close(self) -> str:
        """Return what was kept back, when no more will come."""
        return "" if self._is_cumulative else self._settle(self._joined)

    def _settle(self, joined: str) -> str:
        self.is_settled, self._joined, self._latest = True, "", ""
        return joined[self._sent :]

    @staticmethod
    def is_periodic(text: str) -> bool:
        """Return whether a text is one unit of at most half its length over and over.

        The last one may be cut. The unit is looked for in the beginning, as looking through a long
        text takes the square of its length.

        >>> Increments.is_periodic("hahah"), Increments.is_periodic("Hello, w")
        (True, False)
        """
        start = text[:MAX_PREFIX_SCANNED]
        widths = range(1, len(start) // 2 + 1)
        width = next((width for width in widths if start.startswith(start[width:])), 0)
        return width > 0 and text.startswith(text[width:])


class ContentFilter:
    """Takes out of the content what does not belong there, at its very beginning and end.

    That is thoughts that a server left in the content (<think>...</think> first, or the lone
    closing tag), and, where the client asked for JSON, the code fence around it. Such a word in the
    middle is the answer's.
    """

    TAGS = ("<think>", "</think>", "<thinking>", "</thinking>")
    # Of thoughts; what follows is plain, whatever it looks like.
    MAX_BLOCKS = 100
    # Closing tags, then one that opens.
    _THINK = re.compile(r"(?:\s*</think(?:ing)?>)*(?:\s*<(think(?:ing)?)>\n*)?")
    _FENCE = re.compile(r"\s*```[a-zA-Z0-9]*[ \t]*\n?")

    def __init__(self, is_json: bool):
        self._is_json, self._kept, self._closing, self._blocks = is_json, "", "", 0
        self._in_fence = self._took_tag = False
        # All passes as it is from now on: feed() need not be asked.
        self.is_plain = False

    def feed(self, text: str) -> tuple[str, str]:
        """Return (reasoning, content) to pass on now."""
        if self.is_plain:
            return "", text
        self._kept += text
        if not (self._closing or self._in_fence or self._starts()):
            return "", ""
        if self._closing:
            return self._feed_thoughts()
        if self._in_fence:
            is_short = len(self._kept) < MAX_PREFIX_SCANNED
            body = self._kept.rstrip("` \t\r\n") if is_short else self._kept
            self._kept = self._kept[len(body) :]
            return "", body
        self.is_plain = True
        text, self._kept = self._kept, ""
        return "", text.lstrip() if self._took_tag else text

    def close(self, text: str) -> tuple[str, str]:
        """Return (reasoning, content) up to the last piece: no more will come, or a tool call."""
        thoughts, content = self.feed(text)
        kept, self._kept = self._kept, ""
        if self._closing:
            return thoughts + kept, content
        if self._in_fence:
            bare = kept.rstrip()
            kept = bare[:-3].rstrip() if bare.endswith("```") else kept
        elif self._took_tag:
            kept = kept.lstrip()
        return thoughts, content + kept

    def _starts(self) -> bool:
        """Return whether the beginning is known: a tag or a fence was taken off, or it is plain."""
        found = self._THINK.match(self._kept)
        if found and found.end():
            self._kept, self._took_tag = self._kept[found.end() :], True
            self._closing = f"</{found.group(1)}>" if found.group(1) else ""
        if self._closing or len(self._kept) > MAX_PREFIX_SCANNED:
            return True
        start = self._kept.lstrip()
        tags = (*self.TAGS, "```") if self._is_json else self.TAGS
        fence = self._FENCE.match(self._kept) if self._is_json else None
        # "```js": the word may go on.
        may_go_on = fence and fence.end() == len(self._kept) and not self._kept.endswith("\n")
        if may_go_on or any(tag.startswith(start) for tag in tags):
            return False
        if fence:
            self._in_fence, self._kept = True, self._kept[fence.end() :]
        return True

    def _feed_thoughts(self) -> tuple[str, str]:
        thoughts, tag, rest = self._kept.partition(self._closing)
        if tag:
            self._closing, self._kept, self._blocks = "", "", self._blocks + 1
            self.is_plain = self._blocks == self.MAX_BLOCKS
            more, content = self.feed(rest)
            return thoughts + more, content
        # The tag may have begun.
        end = thoughts.rfind("<")
        if end < 0 or not self._closing.startswith(thoughts[end:]):
            end = len(thoughts)
        self._kept = thoughts[end:]
        return thoughts[:end], ""


class Budget:
    """What one answer may keep to its end, in bytes, whatever it is made of.

    Both methods raise UpstreamError beyond the limit. Streamed chunks are not kept.
    """

    LIMIT = 128 * 1024 * 1024

    def __init__(self, limit: int | None = None) -> None:
        self._limit = self._left = self.LIMIT if limit is None else limit

    def take(self, value: Any) -> None:
        """Count a value that is kept."""
        if isinstance(value, str):
            self.count(len(value))
        elif isinstance(value, (list, dict)):
            self.count(size_of_json(encode_json(value)))

    def count(self, size: int) -> None:
        """Count so many bytes."""
        self._left -= size
        if self._left < 0:
            raise UpstreamError(
                f"the answer takes more than {self._limit >> 20} MiB of memory and was aborted; "
                "ask for less at once"
            )


class LongText:
    """A text that grows piece by piece; joining it at each piece would take quadratic time."""

    def __init__(self, budget: Budget) -> None:
        self._parts: list[str] = []
        self._budget, self.size = budget, 0

    def add(self, text: str) -> None:
        """Append a piece."""
        self._parts.append(text)
        self.size += len(text)
        self._budget.count(len(text))

    def __str__(self) -> str:
        self._parts = ["".join(self._parts)]
        return self._parts[0]


class JsonText(LongText):
    """A growing JSON text that knows when it is whole, in time linear in its length.

    It is parsed only when its brackets are balanced, and never again once it is broken.
    """

    # A backslash at the end belongs to what comes next.
    _TOKENS = re.compile(r'\\.?|["{}\[\]]', re.S)
    _DEPTHS = {"{": 1, "[": 1, "}": -1, "]": -1}

    def __init__(self, budget: Budget) -> None:
        super().__init__(budget)
        self._depth, self._in_string, self._carry = 0, False, ""
        # Of the text of that size.
        self._value: Any = ...
        self._parsed_size = -1

    def add(self, text: str) -> None:
        """Append a piece."""
        super().add(text)
        tokens = self._TOKENS.findall(self._carry + text)
        self._carry = tokens.pop() if tokens and tokens[-1] == "\\" else ""
        for token in tokens:
            if token == '"':
                self._in_string = not self._in_string
            elif not self._in_string:
                self._depth += self._DEPTHS.get(token, 0)

    def value(self) -> Any:
        """Return the value, or ... as long as the text is not whole JSON."""
        if self._depth or self._in_string or self._carry:
            return ...
        is_broken = self._value is ... and self._parsed_size > MAX_PREFIX_SCANNED
        if self._parsed_size != self.size and not is_broken:
            self._value, self._parsed_size = loads(str(self), ...), self.size
        return self._value

    def is_whole(self) -> bool:
        """Return whether it is whole JSON."""
        return self.value() is not ...


class ToolCall:
    """One tool call of an answer: what has arrived, and what of that was not passed on yet."""

    MAX_NAME = 256
    # Arguments that say nothing, and what may become such.
    EMPTY = re.compile(r'\{\s*\}|\[\s*\]|""|null')
    MAY_BE_EMPTY = re.compile(r'(\{\s*\}?|\[\s*\]?|""?|n|nu|nul|null)?')
    # Bytes of memory besides its arguments, about.
    COST = 2048

    def __init__(self, shapes: ToolShapes, budget: Budget):
        self._shapes = shapes
        self.upstream_index: int | None = None
        self.id, self.upstream_id, self.name = "call_" + secrets.token_hex(12), "", ""
        # Known with the name, so that the calls that a client is told of have no holes.
        self.index = -1
        self.arguments, self._increments = JsonText(budget), Increments()
        self._kept, self._repeats_name = "", False
        # What the client does not know yet of the arguments, and whether it knows of the call.
        self._untold: list[str] = []
        self._is_told = self._is_closed = False
        budget.count(self.COST)

    def add(self, name: str, arguments: str) -> None:
        """Take one of its deltas."""
        if self._is_closed or self._is_all(name, arguments):
            # The whole call once more.
            arguments = ""
        self._repeats_name = self._repeats_name or bool(name and self.name)
        self.name = self.name or name
        fresh = self._increments.feed(arguments)
        # Some send {} first and then the arguments.
        if self._kept and not (self._has_none() and fresh.lstrip()[:1] == "{"):
            fresh = self._kept + fresh
        # Arguments before the name are of no use to the client yet.
        is_vague = not self.arguments.size and self.MAY_BE_EMPTY.fullmatch(fresh.strip())
        self._kept, fresh = (fresh, "") if is_vague or not self.name else ("", fresh)
        self.arguments.add(fresh)
        self._untold.append(fresh)

    def close(self) -> None:
        """Take its end: what was kept back counts now, and no arguments are {}."""
        kept, self._kept = "" if self._has_none() else self._kept, ""
        fresh = kept + self._increments.close()
        if not (self.arguments.size or fresh.strip()):
            fresh = "{}"
        self.arguments.add(fresh)
        self._untold.append(fresh)
        self._is_closed = True

    def told(self) -> list[Json]:
        """Return the delta for what is new since the last one; id, type and name come once."""
        name = self._shapes.original.get(self.name, self.name)
        envelope = self._shapes.custom.get(name)
        kind = envelope or "function"
        text, self._untold = "".join(self._untold), []
        if envelope:
            # What a custom tool is called with is known at the end.
            text = custom_input(str(self.arguments)) if self._is_closed else ""
        content = {"input" if kind == "custom" else "arguments": text}
        if self._is_told:
            return [{"index": self.index, kind: content}] if text else []
        self._is_told = True
        return [{"index": self.index, "id": self.id, "type": kind, kind: {"name": name, **content}}]

    def is_whole(self) -> bool:
        """Return whether its arguments are whole as they came."""
        return self._has_none() or self.arguments.is_whole()

    def _has_none(self) -> bool:
        return self.EMPTY.fullmatch(self._kept.strip()) is not None

    def is_followed_by(self, index: int | None, call_id: str, name: str, arguments: str) -> bool:
        """Return whether a delta with this call's id, or without one, starts a new call.

        Some repeat one id; without any, a name again after whole arguments is a new call, unless it
        came with every delta.
        """
        is_elsewhere = index not in (None, self.upstream_index) and not call_id
        if is_elsewhere and (name or self.upstream_index is not None):
            return True
        if not (name and self.name) or self.upstream_id and not call_id:
            return False
        if name != self.name:
            return True
        has_arguments = bool(arguments.strip())
        if not call_id:
            return (has_arguments or not self._repeats_name) and self.is_whole()
        return has_arguments and self.arguments.is_whole() and not self._is_all(name, arguments)

    def _is_all(self, name: str, arguments: str) -> bool:
        """Return whether these are all of the arguments once more, perhaps in other blanks."""
        if len(arguments) == self.arguments.size and arguments == str(self.arguments):
            return self.arguments.is_whole()
        ours = self.arguments.value() if name and arguments.lstrip()[:1] == "{" else None
        if not isinstance(ours, dict) or len(arguments) < len(ours):
            return False
        theirs = loads(arguments)
        # To Python 1 == True; in JSON they differ.
        return theirs == ours and json.dumps(ours, sort_keys=True) == json.dumps(
            theirs, sort_keys=True
        )


class ToolCalls:
    """The tool calls of one choice, rebuilt from deltas of any shape.

    Seen from upstreams: no index, index from 1, one index for two calls, id "" or null or repeated
    or missing, name repeated, arguments null or an object or before the name. Out comes OpenAI's
    shape: index from 0 without holes, ids unique, one entry a delta, one call after the other:
    LlamaIndex loses calls whose deltas alternate. is_legacy: the first of them as function_call,
    for a client that sent functions.
    """

    def __init__(self, shapes: ToolShapes, budget: Budget, is_legacy: bool) -> None:
        self._shapes, self._budget, self.is_legacy = shapes, budget, is_legacy
        # Those that the client gets to know, by index, and how many of them it knows whole.
        self.named: list[ToolCall] = []
        self._done = 0
        # The latest of each id and index; of each id; of each index; of all.
        self._latest: dict[tuple[str, int | None], ToolCall] = {}

    def feed(self, entries: Any) -> list[Json]:
        """Return the deltas to pass on now, with the tool_calls of one upstream delta."""
        for entry in map(as_object, as_list(entries)):
            function = as_object(entry.get("function"))
            name = as_text(function.get("name"))[: ToolCall.MAX_NAME]
            arguments = function.get("arguments")
            if not isinstance(arguments, str):
                arguments = "" if arguments is None else json.dumps(arguments, ensure_ascii=False)
            call_id = as_text(entry.get("id"))
            call_id = call_id if len(call_id) <= ToolCall.MAX_NAME else ""
            index = entry.get("index")
            index = index if type(index) is int and 0 <= index < 100_000 else None
            call = self._call_for(index, call_id, name, arguments)
            call.add(name, arguments)
            if call.name and call.index < 0:
                call.index = len(self.named)
                self.named.append(call)
        return self.told()

    def told(self, is_end: bool = False) -> list[Json]:
        """Return the deltas that can go out: those of a call when the one before it is whole."""
        calls, is_done = [], True
        while is_done and self._done < len(self.named):
            call = self.named[self._done]
            is_done = is_end or call is not self.named[-1] and call.arguments.is_whole()
            if is_done:
                call.close()
                self._done += 1
            calls += call.told()
        if self.is_legacy:
            return [{"function_call": call["function"]} for call in calls if call["index"] == 0]
        return [{"tool_calls": [call]} for call in calls]

    def _call_for(self, index: int | None, call_id: str, name: str, arguments: str) -> ToolCall:
        """Return the call that a delta belongs to."""
        call = self._latest.get((call_id, index)) or self._latest.get((call_id, None))
        if call and not call.is_followed_by(index, call_id, name, arguments):
            return call
        # Its id, name and index may come late: ours have not gone out yet.
        call = self._latest.get(("", index)) or self._latest.get(("", None))
        if not call or call.upstream_id or call.name or call.upstream_index not in (None, index):
            call = ToolCall(self._shapes, self._budget)
        call.upstream_id, call.upstream_index = call_id, index
        if call_id and (call_id, None) not in self._latest:
            # Two calls of one id have two at the client.
            call.id = call_id
        for key in ((call_id, index), (call_id, None), ("", index), ("", None)):
            self._latest[key] = call
        return call


class ChatChoice:
    """One choice of an answer: what the upstream has of it in, the choices of clean chunks out."""

    # Fields of a choice and of a delta that are read; others pass as they are.
    KNOWN = frozenset({"index", "delta", "message", "finish_reason"})
    KNOWN_DELTA = frozenset({"role", "content", "reasoning_content", "reasoning", "tool_calls"})

    def __init__(
        self, shapes: ToolShapes, budget: Budget, index: int, is_json: bool, is_legacy: bool
    ):
        self._reasoning, self._text, self._content = (
            Increments(),
            Increments(),
            ContentFilter(is_json),
        )
        self._tools = ToolCalls(shapes, budget, is_legacy)
        self._index, self._has_role = index, False
        # The upstream's; ours goes out at the end, as more may follow it.
        self.finish_reason: str | None = None

    def feed(self, choice: Json) -> list[Json]:
        """Return the choices to pass on now: the same object where it is right as it came."""
        delta: Any = choice.get("delta")
        if self._is_plain_text(choice, delta):
            return [choice] if delta["content"] else []
        if not isinstance(delta, dict):
            whole = as_object(choice.get("message"))
            calls = enumerate(map(as_object, as_list(whole.get("tool_calls"))))
            # Each call of a whole message is one of its own.
            entries = [{"index": place, **call} for place, call in calls]
            delta = {**whole, "tool_calls": entries}
        others = {} if choice.keys() <= self.KNOWN else stated(without_keys(choice, self.KNOWN))
        deltas = self._deltas(delta) or ([{}] if others else [])
        outputs = self._outputs(deltas, isinstance(delta.get("role"), str))
        if others:
            outputs[-1].update(others)
        reason = choice.get("finish_reason")
        # Some upstreams send several.
        if as_text(reason) not in ("", "null") and self.finish_reason in (None, "stop"):
            self.finish_reason = reason
        return outputs

    def close(self) -> list[Json]:
        """Return what was kept back, then the choice that finishes this one."""
        thoughts, content = self._content.close(self._text.close())
        kept = {"reasoning_content": self._reasoning.close() + thoughts, "content": content}
        deltas: list[Json] = [{name: text} for name, text in kept.items() if text]
        was_whole = all(call.is_whole() for call in self._tools.named[-1:])
        outputs = self._outputs(deltas + self._tools.told(is_end=True), True)
        # [DONE] without a reason: it is whole, and opencode loops without one.
        reason = self.finish_reason or "stop"
        if reason in ("stop", "function_call", "tool_calls", "length"):
            reason = self._reason(reason, was_whole)
        return [*outputs, {"index": self._index, "delta": {}, "finish_reason": reason}]

    def _is_plain_text(self, choice: Json, delta: Any) -> bool:
        """Return whether a choice is nothing but text that needs no look: four chunks of five."""
        return (
            type(delta) is dict
            and len(delta) == 1
            and type(delta.get("content")) is str
            and type(choice.get("index")) is int
            and choice["index"] == self._index
            and choice.get("finish_reason", "") is None
            and "message" not in choice
            and self._has_role
            and self.finish_reason is None
            and self._content.is_plain
            and self._text.is_settled
        )

    def _deltas(self, delta: Json) -> list[Json]:
        """Return the clean deltas for one of the upstream's."""
        reasoning = self._reasoning.feed(
            as_text(delta.get("reasoning_content") or delta.get("reasoning"))
        )
        text, calls = text_of(delta.get("content")), delta.get("tool_calls")
        thoughts, content = self._content.feed(self._text.feed(text)) if text else ("", "")
        if calls:
            # What is kept back of the text comes before the call, not behind it.
            last_thoughts, last_content = self._content.close(self._text.close())
            thoughts, content = thoughts + last_thoughts, content + last_content
        thoughts = reasoning + thoughts
        deltas: list[Json] = [{"reasoning_content": thoughts}] if thoughts else []
        rest: Json = {"content": content} if content else {}
        for name, value in delta.items():
            if name not in self.KNOWN_DELTA and value is not None:
                rest[name] = value
        if rest:
            deltas.append(rest)
        return deltas + self._tools.feed(calls) if calls else deltas

    def _outputs(self, deltas: list[Json], role_came: bool) -> list[Json]:
        """Return a choice for each delta, the role in the first."""
        if not self._has_role and (deltas or role_came):
            first = deltas[0] if deltas else {}
            is_call = bool(first.keys() & {"tool_calls", "function_call"})
            content = {} if "reasoning_content" in first else {"content": None if is_call else ""}
            deltas[:1] = [{"role": "assistant", **content, **first}]
            self._has_role = True
        return [{"index": self._index, "delta": delta, "finish_reason": None} for delta in deltas]

    def _reason(self, reason: str, was_whole: bool) -> str:
        """Return tool_calls if there are whole calls; length if the last one is cut."""
        called = self._tools.named
        if not called:
            return "length" if reason == "length" else "stop"
        are_whole = all(call.arguments.is_whole() for call in called)
        if not are_whole or reason == "length" and not was_whole:
            return "length"
        return "function_call" if self._tools.is_legacy else "tool_calls"


class TextChoice(ChatChoice):
    """The ChatChoice of text completions: text instead of deltas, no roles, no calls."""

    def feed(self, choice: Json) -> list[Json]:
        """Return the choices to pass on now: the same object where it is right as it came."""
        text, reason = text_of(choice.get("text")), choice.get("finish_reason")
        reason = reason if as_text(reason) not in ("", "null") else None
        if self.finish_reason is not None or not (text or reason):
            return []
        self.finish_reason = reason
        right = {
            "index": self._index,
            "text": text,
            "finish_reason": reason,
            "logprobs": choice.get("logprobs"),
        }
        return [choice if choice == right else {**choice, **right}]

    def close(self) -> list[Json]:
        """Return the choice that finishes this one, unless the upstream's did."""
        last = {"index": self._index, "text": "", "finish_reason": "stop", "logprobs": None}
        return [last] if self.finish_reason is None else []


class ChatDecoder:
    """The bytes of an answer in, chunks as OpenAI shapes them out, into `sink`.

    With each goes the data of the event that it came as, where that is still right, else None. The
    body is judged by its content, not by its Content-Type: a stream, one JSON object (an error, or
    a whole completion), or a web page with status 200. Out come: the role in the first delta only;
    one id, created and model throughout; reasoning_content and content never in one delta; one tool
    call a delta; a finish chunk whose delta is empty; usage in one last chunk without choices, if
    the client asked for it. Raises UpstreamError for an error inside the stream and for an end that
    is none.
    """

    OBJECT = "chat.completion.chunk"
    CHOICE = ChatChoice
    MAX_ID = 200
    # Of a choice; OpenAI's n is 128 at most.
    MAX_INDEX = 1024
    BLANK = b"\xef\xbb\xbf \r\n\t"
    # A log probability of -Infinity is no JSON.
    _DECODER = json.JSONDecoder(parse_constant=lambda name: None)
    _MODEL = re.compile(rb'("model": ?)"([^"\\]*)"')

    def __init__(self, request: Json, target: Target):
        self.sink: Callable[[tuple[Json, bytes | None]], None]
        self.usage: Json | None = None
        # The stream has said that it is over.
        self.is_done = False
        self._events, self._has_begun = EventDecoder(), False
        # The answer that is no stream.
        self._whole: bytearray | None = None
        self._family, self._model = target.provider.family, target.model
        self._model_json = encode_json(target.model)
        self._wants_usage = bool(dig(request, "stream_options", "include_usage"))
        # Otherwise the bytes are of no use.
        self._is_stream = bool(request.get("stream"))
        # By index, and what makes one.
        self._choices: dict[int, ChatChoice] = {}
        self._new_choice = functools.partial(
            self.CHOICE,
            ToolShapes(request, traits_of(self._family.name, self._model)),
            Budget(),
            is_json=wants_json(request),
            is_legacy=bool(request.get("functions")) and not request.get("tools"),
        )
        # Of the first chunk: the id, object and created of all.
        self._head: Json = {}
        # Fields of events that brought nothing else, for the next chunk.
        self._extra: Json = {}
        # The last event was nothing but the usage, which comes after everything.
        self._is_counted = False

    def feed(self, piece: bytes) -> None:
        """Take the next piece of the body."""
        if not self._has_begun:
            piece = piece.lstrip(self.BLANK)
            self._has_begun = bool(piece)
            if piece[:1] in (b"{", b"<", b"["):
                self._whole = bytearray()
        if self._whole is None:
            for event in self._events.feed(piece):
                self._feed_event(event)
            return
        self._whole += piece
        if len(self._whole) > MAX_EVENT:
            raise UpstreamError(f"the upstream sent an answer of more than {MAX_EVENT} bytes")

    def is_finished(self) -> bool:
        """Return whether every choice has its finish reason."""
        reasons = [choice.finish_reason for choice in self._choices.values()]
        return bool(reasons) and (self._is_counted or None not in reasons)

    def close(self) -> None:
        """Take the end of the body; raises UpstreamError when the upstream broke off."""
        if not self.is_done:
            self._feed_rest()
        if not self._choices or not (self.is_done or self.is_finished()):
            fault = (
                "ended its answer without a finish reason"
                if self._choices
                else "answered with an empty stream"
            )
            raise UpstreamError(f"the upstream {fault}; try again", code="upstream_cut")
        for choice in self._choices.values():
            for output in choice.close():
                self._send(self._chunk([output]))
        if self._wants_usage and self.usage:
            self._send({**self._chunk([]), "usage": self.usage})
        elif self._extra and not self._is_stream:
            self._send(self._chunk([]))

    def _feed_rest(self) -> None:
        """Translate what has no blank line behind it: the last event, or all of one JSON."""
        if self._whole is not None:
            text = self._whole.decode("utf-8", "replace").strip("\ufeff \r\n\t")
            if not dig(loads(text), "choices"):
                raise to_upstream_error(Refusal.read(0, text), self._family)
            self._feed_event(Event(text.encode()))
            # JSON that can be read is whole, even if it names no finish reason.
            self.is_done = True
            return
        try:
            for event in self._events.feed(b"\n\n"):
                self._feed_event(event)
        except UpstreamError as error:
            # An event that is cut is no loss once the finish reason is there.
            if error.code != "upstream_cut" or not self.is_finished():
                raise

    def _feed_event(self, event: Event) -> None:
        data = event.data.lstrip(b" \t")
        if b"\n" in data and loads(data) is None:
            # Some upstreams put no blank line between their events.
            for line in event.data.split(b"\n"):
                self._feed_event(event._replace(data=line))
        elif data[:1] == b"{":
            self._feed_chunk(event, data)
        elif data.strip() == DONE:
            self.is_done = True
        elif event.name == "error":
            text = event.data.decode("utf-8", "replace")
            raise to_upstream_error(Refusal.read(event.status, text), self._family)

    def _feed_chunk(self, event: Event, data: bytes) -> None:
        chunk: Json = self._decoded(data)
        choices = chunk.get("choices")
        is_native_error = not choices and "message" in chunk and "code" in chunk
        if event.name == "error" or chunk.get("error") or is_native_error:
            raise to_upstream_error(Refusal.of(event.status, chunk), self._family)
        came_from = chunk.get("model")
        self._is_counted = not choices and bool(chunk.get("usage"))
        is_changed = self._envelop(chunk)
        if self._is_stream and not is_changed and came_from != self._model:
            data = self._with_model(data, came_from)
        # Half of an emoji cannot go out as it came.
        is_same = bool(data) and not is_changed and b"\n" not in event.data and b"\\ud" not in data
        self._send_choices(chunk, as_list(choices), data if is_same else None)

    def _send_choices(self, chunk: Json, choices: list[Any], data: bytes | None) -> None:
        envelope = chunk
        for choice in choices:
            outputs = self._choice(choice) if isinstance(choice, dict) else []
            if len(choices) == 1 and outputs and outputs[0] is choice:
                self._send(chunk, data)
                return
            for output in outputs:
                self._send({**envelope, "choices": [output]})
                # What else is in the event goes out once, not with each of its choices.
                envelope = self._chunk([])
        if envelope is chunk and len(chunk) > 5:
            self._extra.update(without_keys(stated(chunk), self._chunk([])))

    def _choice(self, upstream: Json) -> list[Json]:
        """Return the choices to pass on for one of the upstream's."""
        if upstream.get("finish_reason") == "error_finish":
            raise to_upstream_error(Refusal.of(0, {"choices": [upstream]}), self._family)
        index = upstream.get("index")
        index = index if type(index) is int and 0 <= index < self.MAX_INDEX else 0
        if index not in self._choices:
            self._choices[index] = self._new_choice(index)
        return self._choices[index].feed(upstream)

    def _send(self, chunk: Json, data: bytes | None = None) -> None:
        """Pass a chunk on, with what is left of events before it."""
        if self._extra:
            chunk, data, self._extra = {**self._extra, **chunk}, None, {}
        self.sink((chunk, data))

    def _decoded(self, data: bytes) -> Any:
        """Return the object in the bytes, which begin with a brace."""
        text = data.decode("utf-8", "replace")
        try:
            chunk, end = self._DECODER.raw_decode(text)
            if end == len(text) or not text[end:].strip():
                return chunk
        except (ValueError, RecursionError):
            pass
        raise UpstreamError(
            "the upstream sent a chunk that is not JSON, or was cut off in one; try again",
            code="upstream_cut",
        )

    def _chunk(self, choices: list[Json]) -> Json:
        return {**self._head, "model": self._model, "choices": choices}

    def _envelop(self, chunk: Json) -> bool:
        """Make id, object, created and model the same in all chunks, and take the usage out.

        Returns whether more than the model was changed.
        """
        if not self._head:
            chunk_id = as_text(chunk.get("id"))[: self.MAX_ID]
            created = as_decimal(chunk.get("created")) or 0
            self._head = {
                "id": chunk_id or "chatcmpl-" + secrets.token_hex(12),
                "object": self.OBJECT,
                "created": int(created) if 0 < created < 1e12 else 1,
            }
        usage = chunk.pop("usage", None)
        if usage is not None:
            self.usage = clean_usage(usage) or self.usage
        is_changed = usage is not None or not self._head.items() <= chunk.items()
        if is_changed:
            chunk.update(self._head)
        chunk["model"] = self._model
        return is_changed

    def _with_model(self, data: bytes, came_from: Any) -> bytes:
        """Return the bytes with our model for the upstream's; b"" where that is not certain."""
        found = self._MODEL.search(data) if data.count(b'"model"') == 1 else None
        if found is None or found.group(2).decode("utf-8", "replace") != came_from:
            return b""
        return data[: found.end(1)] + self._model_json + data[found.end() :]


class TextDecoder(ChatDecoder):
    """The ChatDecoder of text completions."""

    OBJECT = "text_completion"
    CHOICE = TextChoice


def clean_usage(usage: Any) -> Json | None:
    """Return the usage with its three counts as integers; None for one that holds no count."""
    usage = as_object(usage)
    counts = {
        name: int(usage[name])
        for name in ("prompt_tokens", "completion_tokens", "total_tokens")
        if isinstance(usage.get(name), (int, float)) and abs(usage[name]) < 1e15
    }
    if not counts:
        return None
    prompt, completion = counts.get("prompt_tokens", 0), counts.get("completion_tokens", 0)
    cleaned = {
        **stated(usage),
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": counts.get("total_tokens", prompt + completion),
    }
    if isinstance(usage.get("cached_tokens"), int):
        cleaned.setdefault("prompt_tokens_details", {"cached_tokens": usage["cached_tokens"]})
    return cleaned


class CompletionCollector:
    """Clean chunks in, the whole completion out, of chat or of text."""

    # Bytes of memory of a field besides its name and value, about.
    FIELD_COST = 256
    # Strings within objects that come in pieces, as all of a delta itself do.
    GROWING = frozenset({"data", "transcript", "arguments", "input"})

    def __init__(self) -> None:
        self._head: Json = {}
        self._budget = Budget()
        self._choices: dict[int, Json] = {}
        # Where the texts are that grow: the object that each is in, and its name there.
        self._texts: list[tuple[Json, str]] = []

    def feed(self, chunk: Json) -> None:
        """Add one chunk."""
        # Most envelopes hold nothing that the first one did not.
        if len(chunk) > 5 or not self._head:
            for name, value in chunk.items():
                if name not in ("choices", "usage") and self._head.get(name, self) != value:
                    self._keep(self._head, name, value)
        for part in chunk["choices"]:
            index = part["index"]
            if index not in self._choices:
                is_chat = chunk["object"] == ChatDecoder.OBJECT
                self._choices[index] = (
                    {"message": {"role": "assistant", "content": None}} if is_chat else {}
                )
            self._add(self._choices[index], part)

    def completion(self, usage: Json | None) -> Json:
        """Return the completion, with usage where the upstream gave it."""
        for fields, name in self._texts:
            fields[name] = str(fields[name])
        choices = [
            {"index": index, "logprobs": None, **choice}
            for index, choice in sorted(self._choices.items())
        ]
        for message in [choice["message"] for choice in choices if "message" in choice]:
            is_call = "tool_calls" in message or "function_call" in message
            message["content"] = message["content"] or (None if is_call else "")
        name = self._head["object"].replace(".chunk", "")
        completion = {**self._head, "object": name, "choices": choices}
        return {**completion, "usage": usage} if usage else completion

    def _add(self, choice: Json, part: Json) -> None:
        if "message" in choice:
            for name, value in part["delta"].items():
                if name == "tool_calls":
                    self._add_call(choice["message"].setdefault(name, []), value[0])
                else:
                    self._merge(choice["message"], name, value)
        else:
            self._merge(choice, "text", part["text"])
        if len(part) > 3 or part["finish_reason"]:
            for name, value in part.items():
                if name not in ("index", "delta", "text", "message"):
                    self._merge(choice, name, value, 1)

    def _add_call(self, calls: list[Json], delta: Json) -> None:
        if delta["index"] == len(calls):
            calls.append({})
        for name, value in delta.items():
            if name != "index":
                self._merge(calls[delta["index"]], name, value, 1)

    def _merge(self, kept: Json, name: str, value: Any, depth: int = 0) -> None:
        """Add a field to those that came before, at the top of a delta or in an object in it."""
        if isinstance(value, str) and (not depth or name in self.GROWING):
            if not isinstance(kept.get(name), LongText):
                self._keep(kept, name, LongText(self._budget))
                self._texts.append((kept, name))
            kept[name].add(value)
        elif isinstance(value, dict) and depth < 4 and isinstance(kept.get(name, {}), dict):
            inner = kept.setdefault(name, {})
            for each, item in value.items():
                self._merge(inner, each, item, depth + 1)
        elif isinstance(value, list) and isinstance(kept.get(name, []), list):
            self._budget.take(value)
            kept.setdefault(name, []).extend(value)
        elif value is not None or name not in kept:
            self._keep(kept, name, value)

    def _keep(self, fields: dict[str, Any], name: str, value: Any) -> None:
        if name not in fields:
            self._budget.count(len(name) + self.FIELD_COST)
        self._budget.take(value)
        fields[name] = value


class Writer:
    """Writes an answer to the client; this one to a client of chat or text completions, streamed.

    What it writes is kept until flush(); out is the exchange, which knows the framing.
    """

    is_stream = True

    def __init__(self, out: Any):
        self._out = out
        self._pieces: list[bytes] = []

    def start(self) -> None:
        """Write what goes out before the first chunk."""

    def feed(self, chunk: Json, raw: bytes | None) -> None:
        """Write one chunk, as it came if it is given so."""
        self._pieces.append(encode_event(raw or encode_json(chunk)))

    def heartbeat(self) -> None:
        """Write a sign of life while the upstream is silent."""
        # Never ': ping': Continue takes that for the end of the stream.
        self._out.write_events([b": keep-alive\n\n"])

    def close(self, usage: Json | None) -> None:
        """Write the end."""
        self._pieces.append(encode_event(DONE))
        self.flush(is_last=True)

    def error(self, error: ProxyError) -> None:
        """Write the end of an answer that broke off; no [DONE], as it is not whole."""
        self._pieces.append(encode_event(encode_json(error.body())))
        self.flush(is_last=True)

    def flush(self, is_last: bool = False) -> None:
        """Send what was written, as one write; the last one ends the body."""
        if self._pieces or is_last:
            pieces, self._pieces = self._pieces, []
            self._out.write_events(pieces, is_last)


class CollectingWriter(Writer):
    """Writes an answer as one JSON object at its end."""

    is_stream = False

    def __init__(self, out: Any):
        super().__init__(out)
        self._collector = CompletionCollector()

    def feed(self, chunk: Json, raw: bytes | None) -> None:
        """Collect one chunk."""
        self._collector.feed(chunk)

    def close(self, usage: Json | None) -> None:
        """Write the whole answer."""
        self._out.send_json(200, self._collector.completion(usage))


class ChatApi:
    """POST /v1/chat/completions.

    Each API has the same methods: check() a client's body, to_upstream() its translation, repair()
    of that after a refusal, refusal() as an error, decoder() from bytes to chunks, writer() from
    chunks to the client. One object serves one request.
    """

    path = "/chat/completions"
    accept = "text/event-stream"
    name = "chat"
    decoder: Any = ChatDecoder
    repair = staticmethod(repair_request)

    def __init__(self, memory: Any = None, owner: str = ""):
        self._memory, self._owner = memory, owner

    def check(self, body: Any) -> Json:
        """Return the request in a client's body; raises BadRequest."""
        request = check_object(
            body,
            stream=bool,
            tools=list,
            functions=list,
            stream_options=dict,
            response_format=dict,
        )
        check_messages(request.get("messages"))
        return request

    def to_upstream(self, request: Json, target: Target) -> tuple[Json, dict[str, str]]:
        """Return the body for the upstream, and the rules that changed it; see Rewrite.run()."""
        return Rewrite(request, target).run(self.name)

    @staticmethod
    def refusal(
        status: int, text: str, headers: Mapping[str, str], target: Target
    ) -> UpstreamError:
        """Return the error for an answer whose status is none of success."""
        return to_upstream_error(Refusal.read(status, text), target.provider.family, headers)

    @staticmethod
    def split(request: Json, targets: list[Target]) -> list[Json]:
        """Return the requests to the upstream that a client's request takes, mostly one."""
        return [request]

    def writer(self, request: Json, out: Any, target: Target) -> Any:
        """Return what writes the answer to the client."""
        is_stream = request.get("stream") is True
        return Writer(out) if is_stream else CollectingWriter(out)


class TextApi(ChatApi):
    """POST /v1/completions."""

    path = "/completions"
    name = "text"
    decoder = TextDecoder

    def check(self, body: Any) -> Json:
        """Return the request in a client's body; raises BadRequest."""
        request = check_object(body, stream=bool, stream_options=dict)
        if not isinstance(request.get("prompt"), (str, list)):
            raise BadRequest("prompt must be a string or a list", param="prompt")
        return request


# ------------------------------------------------------------------------------------------------
# Embeddings
# ------------------------------------------------------------------------------------------------


class EmbeddingsDecoder:
    """The bytes of one answer of /embeddings in; out, at the end, (vectors, usage) into `sink`."""

    is_done = False

    def __init__(self, count: int, family: Family, budget: Budget):
        self.sink: Callable[[tuple[list[Any], Json]], None]
        self.usage: Json | None = None
        self._body, self._count, self._family, self._budget = bytearray(), count, family, budget

    def is_finished(self) -> bool:
        """Return whether nothing is missing if the connection breaks now."""
        return False

    def feed(self, piece: bytes) -> None:
        """Take the next piece of the body."""
        self._body += piece
        # Counted as it comes: the body must not grow, nor be read as JSON, beyond the budget.
        self._budget.count(size_of_json(piece))

    def close(self) -> None:
        """Take the end of the body; the vectors go out in the order of the texts."""
        text = self._body.decode("utf-8", "replace")
        answer = loads(text)
        entries = dig(answer, "data")
        if not isinstance(entries, list):
            raise to_upstream_error(Refusal.read(0, text), self._family)
        vectors: list[Any] = [None] * self._count
        for place, entry in enumerate(entries):
            index = dig(entry, "index")
            index = index if type(index) is int else place
            if 0 <= index < self._count:
                vectors[index] = dig(entry, "embedding")
        if len(entries) != self._count or not all(isinstance(vector, list) for vector in vectors):
            found = f"{self._count} texts with {len(entries)} embeddings"
            raise UpstreamError(f"the upstream answered {found}; try again")
        self.usage = clean_usage(dig(answer, "usage"))
        self.sink((vectors, self.usage or {}))


class EmbeddingsWriter(Writer):
    """Writes all batches as one answer, in the order in which they are fed, usage summed."""

    is_stream = False

    def __init__(self, out: Any, model: str, is_base64: bool):
        super().__init__(out)
        self._model, self._encode = model, self._base64_of if is_base64 else list
        self._batches: list[tuple[list[Any], Json]] = []

    def feed(self, vectors: Any, usage: Any) -> None:
        """Keep one batch."""
        self._batches.append((vectors, usage))

    def close(self, usage: Json | None) -> None:
        """Write the whole answer."""
        names = ("prompt_tokens", "total_tokens")
        answer = {
            "object": "list",
            "model": self._model,
            "usage": {name: sum(used.get(name, 0) for _, used in self._batches) for name in names},
            "data": [
                {"object": "embedding", "index": index, "embedding": self._encode(vector)}
                for index, vector in enumerate(
                    vector for vectors, _ in self._batches for vector in vectors
                )
            ],
        }
        self._out.send_json(200, answer)

    @staticmethod
    def _base64_of(vector: list[float]) -> str:
        """Return a vector as the OpenAI SDKs want it: little-endian float32."""
        try:
            return base64.b64encode(struct.pack(f"<{len(vector)}f", *vector)).decode()
        except (struct.error, OverflowError):
            raise UpstreamError(
                "the upstream sent an embedding that is no list of numbers"
            ) from None


class EmbeddingsApi(ChatApi):
    """POST /v1/embeddings: any number of texts, split into what the model takes at once."""

    path = "/embeddings"
    accept = "application/json"
    name = "embeddings"
    # OpenAI reference, embeddings.
    MAX_INPUTS = 2048
    # Texts in one request at Alibaba's, and wherever its models are: no other maker has models of
    # these names. Model Studio, 'Text embedding'; langchain4j #1140 for v1 and v2.
    MAX_BATCH = 10
    BATCHES = (
        ("text-embedding-v[12]*", 25),
        ("text-embedding-v*", MAX_BATCH),
        ("qwen3.7-text-embedding*", 20),
    )

    def check(self, body: Any) -> Json:
        """Return the request in a client's body; raises BadRequest that names what is wrong."""
        request = check_object(body)
        # 2048 vectors of 2048 numbers are 280 MiB.
        self._budget = Budget(3 * Budget.LIMIT)
        given = request.get("input")
        texts = [given] if isinstance(given, str) else as_list(given)
        odd = next((at for at, text in enumerate(texts) if not as_text(text)), None)
        # Whether it is wrong, where, what must be said of it.
        problems = (
            (
                not as_text(request.get("model")).strip(),
                "model",
                "model must be named, such as text-embedding-v4",
            ),
            (
                request.get("encoding_format") not in (None, "float", "base64"),
                "encoding_format",
                "encoding_format must be float or base64",
            ),
            (not texts, "input", "input must be a string or a list of strings"),
            (
                isinstance(next(iter(texts), None), (int, list)),
                "input",
                "token array input is not supported, since the tokens are another model's; send "
                "text (in LangChain: OpenAIEmbeddings(check_embedding_ctx_length=False))",
            ),
            (
                len(texts) > self.MAX_INPUTS,
                "input",
                f"input may hold {self.MAX_INPUTS} texts, not {len(texts)}",
            ),
            (odd is not None, f"input.{odd}", f"input[{odd}] must be a string that is not empty"),
        )
        for is_wrong, param, message in problems:
            if is_wrong:
                raise BadRequest(message, param=param)
        return {**request, "input": texts}

    @staticmethod
    def split(request: Json, targets: list[Target]) -> list[Json]:
        """Return a request for each batch that all of the targets take."""
        texts, size = request["input"], min(map(EmbeddingsApi.batch_size, targets))
        starts = range(0, len(texts), size)
        return [{**request, "input": texts[start : start + size]} for start in starts]

    @classmethod
    def batch_size(cls, target: Target) -> int:
        """Return how many texts a request to this target may hold."""
        model, is_alibaba = target.model.lower(), "alibaba" in target.provider.family.traits
        sizes = (size for pattern, size in cls.BATCHES if fnmatch.fnmatchcase(model, pattern))
        return next(sizes, cls.MAX_BATCH if is_alibaba else cls.MAX_INPUTS)

    def to_upstream(self, request: Json, target: Target) -> tuple[Json, dict[str, str]]:
        """Return the body: always floats, since Model Studio documents nothing else."""
        user = None if "alibaba" in target.provider.family.traits else request.get("user")
        body = {**request, "user": user, "model": target.model, "encoding_format": "float"}
        return stated(body), {}

    def decoder(self, request: Json, target: Target) -> EmbeddingsDecoder:
        """Return what takes the bytes of an answer."""
        return EmbeddingsDecoder(len(request["input"]), target.provider.family, self._budget)

    def writer(self, request: Json, out: Any, target: Target) -> EmbeddingsWriter:
        """Return what writes the answer to the client."""
        return EmbeddingsWriter(out, target.model, request.get("encoding_format") == "base64")


# ------------------------------------------------------------------------------------------------
# Responses API
# ------------------------------------------------------------------------------------------------
# Pure: a request to /v1/responses in, a chat request out; chat chunks in, events of a response out.
# OpenAI reference, Responses. What is remembered is what came from client and model, before any
# rule for Qwen.

FORGETS = "This server keeps the latest responses in memory and forgets them when it restarts."


class ResponseMemory:
    """The latest responses, in memory only, for whoever presents the same key.

    An item that several responses share is there once, such as the beginning of a conversation. The
    oldest responses give way. An item of an output is found by its id, too: unless it is told
    `store: false`, the AI SDK sends an answer back as {"type": "item_reference", "id": ...}
    (@ai-sdk/openai, convertToOpenAIResponsesInput).
    """

    LIMIT = 67_108_864
    # Bytes of memory of an item besides its JSON, and of one more use of it, about.
    ITEM_COST, USE_COST = 512, 8
    # So many times the limit may one conversation take when it is decoded.
    DECODED = 4

    def __init__(self, limit: int = LIMIT):
        self.size, self._limit, self._lock = 0, limit, threading.RLock()
        # By id and owner, the JSON of a response without its output, of its output, and of what the
        # model was given.
        self._responses: collections.OrderedDict[tuple[str, str], tuple[list[bytes], ...]] = (
            collections.OrderedDict()
        )
        # The JSON of an item: the one object that stands for it, and how often it is used.
        self._items: dict[bytes, list[Any]] = {}
        self._by_id: dict[tuple[str, str], bytes] = {}

    def keep(self, response: Json, context: list[Json], owner: str = "") -> None:
        """Remember a response to the items of its context."""
        parts = ([{**response, "output": []}], response["output"], context)
        encoded = [[*map(encode_json, part)] for part in parts]
        # Items that are alike are here once, but each is decoded again for the next request.
        if sum(map(size_of_json, encoded[-1])) > self.DECODED * self._limit:
            return
        with self._lock:
            stored = tuple([*map(self._use, part)] for part in encoded)
            self._responses[response["id"], owner] = stored
            for item, kept in zip(response["output"], stored[1]):
                self._by_id[item["id"], owner] = kept
            while self.size > self._limit:
                self.delete(*next(iter(self._responses)))

    def get(self, response_id: str, owner: str = "") -> tuple[Json, list[Json]] | None:
        """Return the owner's response of that id, and the items that the model was given for it."""
        stored = self._responses.get((response_id, owner))
        if stored is None:
            return None
        (response,), output, context = ([*map(json.loads, part)] for part in stored)
        return {**response, "output": output}, context

    def item(self, item_id: str, owner: str = "") -> Json | None:
        """Return the owner's item of that id, of the output of a response that is still here."""
        encoded = self._by_id.get((item_id, owner))
        return as_object(json.loads(encoded)) if encoded else None

    def delete(self, response_id: str, owner: str = "") -> bool:
        """Forget a response; returns whether it was here."""
        with self._lock:
            head, output, context = self._responses.pop((response_id, owner), ([], [], []))
            for encoded in output:
                self._by_id.pop((as_text(json.loads(encoded).get("id")), owner), None)
            for encoded in (*head, *output, *context):
                entry = self._items[encoded]
                entry[1] -= 1
                self.size -= self.USE_COST
                if not entry[1]:
                    del self._items[encoded]
                    self.size -= len(encoded) + self.ITEM_COST
            return bool(head)

    def _use(self, encoded: bytes) -> bytes:
        """Count one more use of an item; returns the object that stands for it."""
        entry = self._items.setdefault(encoded, [encoded, 0])
        self.size += self.USE_COST + (0 if entry[1] else len(encoded) + self.ITEM_COST)
        entry[1] += 1
        return bytes(entry[0])


def listed_items(items: list[Json]) -> list[Json]:
    """Return items of an input as OpenAI lists them, each with an id, type, parts and status."""
    listed: dict[str, Json] = {}
    for place, item in enumerate(items):
        whole = {"type": "message", "status": "completed", **stated(item)}
        content = whole.get("content")
        if isinstance(content, str):
            kind = "output_text" if whole.get("role") == "assistant" else "input_text"
            whole["content"] = [{"type": kind, "text": content}]
        # A page begins after an id: an item that was sent twice is listed under two.
        own = as_text(whole.get("id"))
        item_id = own if own and own not in listed else f"item_{place}"
        listed[item_id] = {**whole, "id": item_id}
    return [*listed.values()]


class ResponseTools:
    """The tools of a request to /v1/responses as Qwen is told them.

    Namespaces are flattened. offered: tools of the chat request, and told: what a call tells of its
    tool, both by the name that Qwen calls; others: types of tools that are no functions.
    """

    # Model Studio, 'Function calling'.
    LONGEST = 64
    # Of the two kinds of tools that a client runs, which chat completions have, too: the type of a
    # call, and the fields of the tool.
    KINDS = {
        "function": ("function_call", ("description", "parameters", "strict")),
        "custom": ("custom_tool_call", ("description", "format")),
    }

    def __init__(self, tools: Any):
        self.offered: dict[str, Json] = {}
        self.told: dict[str, Json] = {}
        self.others: list[str] = []
        self.add(tools)

    def add(self, tools: Any) -> None:
        """Offer the tools of a list, and of the namespaces in it; the last one of a name counts."""
        for tool in map(as_object, as_list(tools)):
            kind, name = str(tool.get("type")), tool.get("name")
            if kind == "namespace" and "namespace" not in tool:
                inner = map(as_object, as_list(tool.get("tools")))
                self.add([{**each, "namespace": as_text(name)} for each in inner])
            elif kind in self.KINDS and isinstance(name, str):
                flat = self.flat(tool)
                call, names = self.KINDS[kind]
                shown = {"name": flat, **stated({each: tool.get(each) for each in names})}
                self.offered[flat] = (
                    {"type": kind, **shown} if kind == "custom" else {"type": kind, kind: shown}
                )
                self.told[flat] = self.call_of(tool, call)
            elif kind == "tool_search" and tool.get("execution") == "client":
                # Codex has its deferred tools found by this one, those of MCP among them.
                self.add([{**tool, "type": "function", "name": kind}])
                self.told[kind] = {"type": "tool_search_call"}
            else:
                self.others.append(kind)

    @staticmethod
    def call_of(named: Json, kind: str = "function_call") -> Json:
        """Return what a call tells of its tool: Codex takes a flattened name for unknown."""
        space = as_text(named.get("namespace")) or None
        return stated({"type": kind, "name": named.get("name"), "namespace": space})

    @classmethod
    def flat(cls, named: Any) -> str:
        """Return the name that Qwen is told for a tool, a call or a choice of one.

        That is namespace__name, cut to the length that is allowed, where there is a namespace.
        """
        name, space = as_text(dig(named, "name")), as_text(dig(named, "namespace"))
        flat = f"{space}__{name}" if space else name
        if not space or len(flat) <= cls.LONGEST:
            return flat
        digest = hashlib.sha256(flat.encode("utf-8", "replace")).hexdigest()
        return f"{flat[: cls.LONGEST - 9]}_{digest[:8]}"

    def fields(self, choice: Any) -> Json:
        """Return tools, tool_choice and web_search_options of the chat request, some null."""
        searches = choice != "none" and any(kind.startswith("web_search") for kind in self.others)
        return {
            "tools": list(self.offered.values()) or None,
            "tool_choice": (self._chosen(choice) or None) if self.offered else None,
            "web_search_options": {} if searches else None,
        }

    def _chosen(self, choice: Any) -> Any:
        """Return tool_choice as chat completions have it."""
        if not isinstance(choice, dict):
            return choice
        if choice.get("type") == "allowed_tools":
            tools = as_list(choice.get("tools"))
            return {**choice, "tools": [{"name": self.flat(tool)} for tool in tools]}
        is_named = as_text(choice.get("type")) in self.KINDS and as_text(choice.get("name"))
        named = {"type": "function", "function": {"name": self.flat(choice)}}
        return named if is_named else "auto"


class ResponseRequest:
    """A request to /v1/responses, and the chat request for it.

    asked: the request as it came; items: of the whole conversation; chat: the chat request; tools:
    those that it offers; is_compaction: the client wants the conversation summarised. Raises
    BadRequest for what is forgotten or cannot be meant.
    """

    COMPACTION = (
        "Summarise the conversation so far for another assistant, who continues it and sees "
        "nothing but your summary: the task, what was decided and found out, which files and "
        "commands matter, what is left to do."
    )
    # Before the text that encrypted_content carries for us to the next request.
    CARRIED = "qwen_proxy:"
    # Fields without a counterpart, and what of theirs means nothing.
    LOST: Mapping[str, tuple[Any, ...]] = {
        "context_management": (None, []),
        "max_tool_calls": (None,),
        "service_tier": (None, "auto", "default"),
        "top_logprobs": (None, 0),
        "truncation": (None, "disabled"),
    }
    # Fields that chat completions do not have, or have in another shape.
    ONLY_HERE = LOST.keys() | frozenset(
        "input instructions tools tool_choice reasoning text max_output_tokens "
        "previous_response_id store include metadata prompt_cache_key client_metadata "
        "background conversation prompt safety_identifier prompt_cache_retention "
        "stream_options".split()
    )

    def __init__(self, request: Any, memory: ResponseMemory, owner: str = ""):
        self.asked: Json = check_object(request, stream=bool)
        self.tools = ResponseTools(self.asked.get("tools"))
        self.items = self._read_items(memory, owner)
        last = self.items[-1] if self.items else None
        self.is_compaction = dig(last, "type") == "compaction_trigger"
        messages = self._read_messages(self.items)
        if self.is_compaction:
            messages.append({"role": "user", "content": self.COMPACTION})
        self.chat = stated(
            {
                **without_keys(self.asked, self.ONLY_HERE),
                "messages": messages,
                **self._options(),
            }
        )

    def given_up(self) -> str:
        """Return what of the request has no counterpart, for the log."""
        lost = [name for name, nothing in self.LOST.items() if self.asked.get(name) not in nothing]
        kinds = {kind for kind in self.tools.others if not kind.startswith("web_search")}
        lost += [f"tools of type {kind}" for kind in sorted(kinds)]
        return f"left out: {shorten(', '.join(lost), 200)}" if lost else ""

    def _read_items(self, memory: ResponseMemory, owner: str) -> list[Any]:
        """Return the items of the conversation: of the previous response, then of the input."""
        for name in ("background", "prompt", "conversation"):
            if self.asked.get(name):
                raise BadRequest(
                    f"{name} is not supported: this server keeps responses in memory only",
                    param=name,
                )
        items, previous = self.asked.get("input"), self.asked.get("previous_response_id")
        items = [{"role": "user", "content": items}] if isinstance(items, str) else items
        items = [] if items is None and previous else items
        if not isinstance(items, list) or not (items or previous):
            message = "input must be a string or a list of at least one item"
            raise BadRequest(message, param="input")
        found = memory.get(as_text(previous), owner) if previous else ({"output": []}, [])
        if found is None:
            raise BadRequest(
                f"Previous response with id '{shorten(str(previous), 60)}' not found. {FORGETS}",
                code="previous_response_not_found",
                param="previous_response_id",
            )
        response, context = found
        own = self._resolved(items, functools.partial(memory.item, owner=owner))
        return [*context, *response["output"], *own]

    @staticmethod
    def _resolved(items: list[Any], remembered: Callable[[str], Json | None]) -> list[Any]:
        """Return the items with those that item_references stand for.

        Thoughts that are forgotten are no loss, anything else is refused.
        """
        resolved, seen = [], set()
        for index, item in enumerate(items):
            # The type of a reference may be left out.
            kind, is_bare = dig(item, "type"), as_object(item).keys() - {"type"} == {"id"}
            if kind != "item_reference" and not (kind is None and is_bare):
                resolved.append(item)
                continue
            item_id, where = as_text(item.get("id")), f"input.{index}"
            if item_id in seen:
                # Otherwise a small request could grow without limit.
                raise BadRequest(f"input[{index}] refers to an item a second time", param=where)
            seen.add(item_id)
            found = remembered(item_id)
            if not found and not item_id.startswith("rs_"):
                raise BadRequest(
                    f"input[{index}] is of type 'item_reference', and {shorten(item_id, 60)!r} is "
                    "not in memory here: send the item itself (AI SDK: providerOptions.openai."
                    "store = false)",
                    param=where,
                )
            resolved += [found] if found else []
        return resolved

    def _read_messages(self, items: list[Any]) -> list[Json]:
        """Return the messages that the instructions and the items make together."""
        rules = self.asked.get("instructions")
        messages = [{"role": "system", "content": rules}] if as_text(rules) else []
        items = [*as_list(rules), *items]
        # What comes before the client's own is not counted.
        own = len(as_list(self.asked.get("input")))
        for index, item in enumerate(items, own - len(items)):
            kind = item.get("type", "message") if isinstance(item, dict) else json_type(item)
            if as_text(kind) not in self.ITEMS:
                raise BadRequest(
                    f"input[{index}] is of type {shorten(str(kind), 60)!r}; no such item is "
                    "supported here",
                    param=f"input.{index}",
                )
            to_message = self.ITEMS[kind]
            message = to_message(self, item) if to_message else None
            if message:
                self._join(messages, message)
        for message in messages:
            if "reasoning_content" in message:
                message["reasoning_content"] = "".join(message["reasoning_content"])
        return [
            message
            for message in messages
            if message["content"] or message.get("tool_calls") or message["role"] != "assistant"
        ]

    @staticmethod
    def _join(messages: list[Json], message: Json) -> None:
        """Add a message; the items of one turn of the assistant become one message.

        A second text begins another one.
        """
        last = messages[-1] if messages else {}
        is_taken = "tool_calls" not in message and (last.get("content") or last.get("tool_calls"))
        if not message["role"] == last.get("role") == "assistant" or is_taken:
            messages.append(message)
            return
        last["content"] = message["content"] or last["content"]
        for name in {"tool_calls", "reasoning_content"} & message.keys():
            last.setdefault(name, []).extend(message[name])

    # -- the message for an item -----------------------------------------------------------------

    def _message(self, item: Json) -> Json:
        role, content = item.get("role"), self._content(item.get("content"))
        if role not in ("user", "assistant", "system", "developer"):
            raise BadRequest(
                f"a message of the input has the role {shorten(str(role), 60)!r}", param="input"
            )
        return {"role": role, "content": content}

    def _call(self, item: Json) -> Json:
        if item["type"] == "tool_search_call":
            item = {**item, "name": "tool_search"}
        name = self.tools.flat(item)
        # Codex has tools that it offers no more, such as those that are left to its search by now.
        self.tools.told.setdefault(name, self.tools.call_of(item))
        if item["type"] == "custom_tool_call":
            call = {"type": "custom", "name": name, "input": item.get("input")}
        else:
            function = {"name": name, "arguments": item.get("arguments")}
            call = {"type": "function", "function": function}
        call["id"] = item.get("call_id") or item.get("id")
        return {"role": "assistant", "content": "", "tool_calls": [call]}

    def _output(self, item: Json) -> Json:
        content = self._content(item.get("output"))
        if not isinstance(content, (str, list)):
            content = json.dumps(content, ensure_ascii=False)
        return {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}

    def _more_tools(self, item: Json) -> Json | None:
        """Offer the tools of an item: Codex has them all in one (openai/codex #27946).

        Those that the client found in a search are named to the model.
        """
        found = ResponseTools(item.get("tools"))
        self.tools.add(item.get("tools"))
        content = f"Found, and can be called now: {', '.join(found.offered) or 'nothing'}"
        message = {"role": "tool", "tool_call_id": item.get("call_id"), "content": content}
        return message if item["type"] == "tool_search_output" else None

    def _reasoning(self, item: Json) -> Json | None:
        parts = as_list(item.get("content")) or as_list(item.get("summary"))
        thoughts = self._carried(item) or text_of(parts)
        # A list, since any number of items may belong to one message.
        message = {"role": "assistant", "content": "", "reasoning_content": [thoughts]}
        return message if thoughts else None

    def _compaction(self, item: Json) -> Json | None:
        summary = self._carried(item)
        content = f"The conversation so far, in summary:\n\n{summary}"
        return {"role": "user", "content": content} if summary else None

    def _carried(self, item: Json) -> str:
        """Return the text that encrypted_content carries; empty for what another server made."""
        before, _, text = as_text(item.get("encrypted_content")).partition(self.CARRIED)
        return "" if before else text

    # None: the model cannot use it.
    ITEMS: Mapping[str, Callable[[ResponseRequest, Json], Json | None] | None] = {
        "message": _message,
        "function_call": _call,
        "custom_tool_call": _call,
        "tool_search_call": _call,
        "tool_search_output": _more_tools,
        "configuration_update": None,
        "function_call_output": _output,
        "custom_tool_call_output": _output,
        "reasoning": _reasoning,
        "compaction": _compaction,
        "compaction_summary": _compaction,
        "additional_tools": _more_tools,
        "web_search_call": None,
        "mcp_list_tools": None,
        "compaction_trigger": None,
    }

    @staticmethod
    def _content(content: Any) -> Any:
        """Return content as chat completions have it: a string, if it is nothing but text."""
        if not isinstance(content, list):
            return "" if content is None else content
        parts = [chat_part(as_object(part)) for part in content]
        kinds = [part.get("type") for part in parts]
        odd = [str(kind) for kind in kinds if kind not in ("text", *Rewrite.MEDIA)]
        if odd:
            raise BadRequest(
                f"a part of type {shorten(odd[0], 60)!r} cannot be sent; files and images must be "
                "in the request itself, since none are stored",
                param="input",
            )
        return parts if set(kinds) - {"text"} else text_of(parts)

    def _options(self) -> Json:
        """Return tools, length, effort and format as chat completions have them."""
        effort = dig(self.asked, "reasoning", "effort")
        # OpenRouter's shapes.
        switch = {name: dig(self.asked, "reasoning", name) for name in ("enabled", "max_tokens")}
        wanted = as_object(dig(self.asked, "text", "format"))
        schema = stated(without_keys(wanted, ("type",)))
        formats = {
            "json_object": {"type": "json_object"},
            "json_schema": {"type": "json_schema", "json_schema": schema},
        }
        return stated(
            {
                "max_tokens": self.asked.get("max_output_tokens"),
                "reasoning_effort": effort if isinstance(effort, str) else None,
                "reasoning": stated(switch) or None,
                "response_format": formats.get(as_text(wanted.get("type"))),
                **({} if self.is_compaction else self.tools.fields(self.asked.get("tool_choice"))),
            }
        )


def fill(template: Any, values: Json) -> Any:
    """Return a copy of a JSON value in which each string that is a name of the values is replaced.

    >>> fill({"part": ["$text", 0]}, {"$text": "Hi"})
    {'part': ['Hi', 0]}
    """
    if isinstance(template, dict):
        return {name: fill(value, values) for name, value in template.items()}
    if isinstance(template, list):
        return [fill(value, values) for value in template]
    return values.get(template, template)


class OutputItem:
    """One item of a response's output while it grows; item is what the client was told of it."""

    SUMMARY = {"type": "summary_text", "text": "$text"}
    # The AI SDK and LangChain JS need its annotations.
    TEXT = {"type": "output_text", "text": "$text", "annotations": [], "logprobs": []}
    CALL = {"status": "in_progress", "call_id": "", "name": ""}
    # How items of one type are told: the prefix of their ids, their fields at first, those that are
    # different when they are whole, and by their names the events around their text: when the item
    # is added, for each piece, and when all is there. See fill() for $text and the like. Thoughts
    # go out as a reasoning summary, since openai-node fails on reasoning_text, and Codex and the AI
    # SDK do not show it. The input of a custom tool is known at its end, since it comes in JSON.
    KINDS: Mapping[str, Json] = {
        "reasoning": {
            "prefix": "rs_",
            "first": {"summary": []},
            "whole": {"summary": [SUMMARY]},
            "added": {"reasoning_summary_part.added": {"summary_index": 0, "part": SUMMARY}},
            "piece": {"reasoning_summary_text.delta": {"summary_index": 0, "delta": "$text"}},
            "done": {
                "reasoning_summary_text.done": {"summary_index": 0, "text": "$text"},
                "reasoning_summary_part.done": {"summary_index": 0, "part": SUMMARY},
            },
        },
        "message": {
            "prefix": "msg_",
            "first": {"status": "in_progress", "role": "assistant", "content": []},
            "whole": {"status": "$status", "content": [TEXT]},
            "added": {"content_part.added": {"content_index": 0, "part": TEXT}},
            "piece": {"output_text.delta": {"content_index": 0, "delta": "$text", "logprobs": []}},
            "done": {
                "output_text.done": {"content_index": 0, "text": "$text", "logprobs": []},
                "content_part.done": {"content_index": 0, "part": TEXT},
            },
        },
        "function_call": {
            "prefix": "fc_",
            "first": {**CALL, "arguments": ""},
            "whole": {"status": "$status", "arguments": "$text"},
            "piece": {"function_call_arguments.delta": {"delta": "$text"}},
            "done": {"function_call_arguments.done": {"name": "$name", "arguments": "$text"}},
        },
        "custom_tool_call": {
            "prefix": "ctc_",
            "first": {**CALL, "input": ""},
            "whole": {"status": "$status", "input": "$text"},
            "done": {
                "custom_tool_call_input.delta": {"delta": "$text"},
                "custom_tool_call_input.done": {"input": "$text"},
            },
        },
        "tool_search_call": {
            "prefix": "tsc_",
            "first": {
                "status": "in_progress",
                "call_id": "",
                "execution": "client",
                "arguments": {},
            },
            "whole": {"status": "$status", "arguments": "$object"},
        },
        "compaction": {"prefix": "cmp_", "first": {"encrypted_content": ""}, "whole": {}},
    }

    def __init__(self, index: int, budget: Budget, fields: Json):
        self.index, self.text = index, LongText(budget)
        self.kind = self.KINDS[fields["type"]]
        item_id = self.kind["prefix"] + secrets.token_hex(12)
        self.item = {"id": item_id, "type": fields["type"], **self.kind["first"], **fields}


class ResponsesWriter(Writer):
    """Writes an answer to a client of /v1/responses: as events, or as one object at its end.

    The events come in the order that all clients take: one item is done before the next begins.
    """

    # Types of items, and the field of a delta that each comes in; those of a compaction.
    TEXTS = (("reasoning", "reasoning_content"), ("message", "content"))
    SUMMARY = (("compaction", "content"),)
    # Error codes that Codex knows.
    CODES = ("context_length_exceeded", "insufficient_quota", "rate_limit_exceeded")
    # What a response repeats of its request, and what it says where that has none. Every field of
    # OpenAI's schema is there: the types of some clients demand fields that others never read.
    REPEATED: Mapping[str, Any] = {
        "frequency_penalty": 0.0,
        "instructions": None,
        "max_output_tokens": None,
        "metadata": {},
        "parallel_tool_calls": True,
        "presence_penalty": 0.0,
        "previous_response_id": None,
        "prompt_cache_key": None,
        "prompt_cache_retention": None,
        "safety_identifier": None,
        "store": True,
        "temperature": 1.0,
        "tool_choice": "auto",
        "tools": [],
        "top_p": 1.0,
        "truncation": "disabled",
        "user": None,
    }
    # Open Responses demands these of a function.
    FUNCTION: Mapping[str, Any] = dict.fromkeys(("description", "parameters", "strict"))
    # What only OpenAI has.
    NULL = (
        "access_programs conversation image input_transformations max_tool_calls moderation "
        "prompt prompt_cache_diagnostics prompt_cache_options tool_usage"
    ).split()

    def __init__(self, out: Any, request: ResponseRequest, model: str, keep: Any):
        super().__init__(out)
        self.is_stream = request.asked.get("stream") is True
        self._request, self._model, self._keep = request, model, keep
        self._id, self._created = "resp_" + secrets.token_hex(16), int(time.time())
        self._budget, self._number = Budget(), 0
        self._items: list[OutputItem] = []
        # What the last one is while it grows: text or thoughts by their type, a call by its index.
        self._open: Any = None
        # Text and thoughts, by their types, that came in the middle of a call: they go behind it.
        self._late: list[tuple[str, str]] = []
        self._finish_reason: str | None = None

    def start(self) -> None:
        """Write the first events, once."""
        if not self._number:
            self._emit("response.created", response=self._response())
            self._emit("response.in_progress", response=self._response())

    def heartbeat(self) -> None:
        """Write a sign of life while the upstream is silent; Codex takes no comment for one."""
        self.start()
        self._emit("response.in_progress", response=self._response())
        self.flush()

    def feed(self, chunk: Json, raw: bytes | None) -> None:
        """Write the events for one chunk."""
        is_summary = self._request.is_compaction
        for choice in chunk["choices"][:1]:
            delta = choice["delta"]
            self._finish_reason = choice["finish_reason"] or self._finish_reason
            for kind, field in self.SUMMARY if is_summary else self.TEXTS:
                if delta.get(field):
                    self._add_text(kind, delta[field])
            for call in [] if is_summary else delta.get("tool_calls") or []:
                name, arguments = map(call["function"].get, ("name", "arguments"))
                told = self._request.tools.told.get(name, {"type": "function_call", "name": name})
                if call["index"] != self._open:
                    self._add_late()
                self._add(call["index"], {"call_id": call.get("id"), **told}, arguments or "")

    def close(self, usage: Json | None) -> None:
        """Write the end, whole or cut by its length or a filter, and remember the output."""
        if self._request.is_compaction and not any(str(item.text).strip() for item in self._items):
            raise UpstreamError("the model gave no summary of the conversation; try again")
        self._add_late()
        self._end()
        is_cut = self._finish_reason in ("length", "content_filter")
        self._finish(self._response("incomplete" if is_cut else "completed", usage))

    def error(self, error: ProxyError) -> None:
        """Write the two events that end a response that broke off, as at OpenAI.

        Codex waits for response.failed; LangChain JS and with it n8n would take what came for whole
        without error, down to a tool call cut in its arguments.
        """
        self.start()
        code = error.code if error.code in self.CODES else "server_error"
        message = error.error_object()["message"]
        if code == "rate_limit_exceeded":
            seconds = max(1, int(error.retry_after or 5))
            message = f"{message.rstrip('.')}. Please try again in {seconds}s."
        failure = {"code": code, "message": message}
        inner = {**failure, "type": error.type, "param": None}
        self._emit("error", **failure, param=None, error=inner)
        self._finish({**self._response("failed"), "error": failure})

    def _finish(self, response: Json) -> None:
        """Remember the response, and write it: as the last event, or as all there is."""
        if response["store"] is not False:
            self._keep(response)
        if not self.is_stream:
            self._out.send_json(200, response)
            return
        self._emit(f"response.{response['status']}", response=response)
        self.flush(is_last=True)

    def _response(self, status: str = "in_progress", usage: Json | None = None) -> Json:
        """Return the response object as it is now."""
        asked = self._request.asked
        prompt = as_object(dig(usage, "prompt_tokens_details"))
        reasoning = dig(usage, "completion_tokens_details", "reasoning_tokens")
        counts = usage and {
            "input_tokens": usage["prompt_tokens"],
            "input_tokens_details": {
                "cached_tokens": prompt.get("cached_tokens") or 0,
                "cache_write_tokens": prompt.get("cache_creation_input_tokens") or 0,
            },
            "output_tokens": usage["completion_tokens"],
            "output_tokens_details": {"reasoning_tokens": reasoning or 0},
            "total_tokens": usage["total_tokens"],
        }
        reason = "max_output_tokens" if self._finish_reason == "length" else self._finish_reason
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created,
            "completed_at": int(time.time()) if status == "completed" else None,
            "status": status,
            "background": False,
            "error": None,
            "incomplete_details": {"reason": reason} if status == "incomplete" else None,
            "model": self._model,
            "output": [] if status == "in_progress" else list(map(self._whole, self._items)),
            "reasoning": {name: dig(asked, "reasoning", name) for name in ("effort", "summary")},
            "service_tier": "default",
            "text": {
                "format": dig(asked, "text", "format") or {"type": "text"},
                "verbosity": dig(asked, "text", "verbosity") or "medium",
            },
            "top_logprobs": 0,
            "usage": counts,
            **dict.fromkeys(self.NULL),
            **self.REPEATED,
            **stated({name: asked.get(name) for name in self.REPEATED}),
            "tools": [
                {**self.FUNCTION, **tool} if dig(tool, "type") == "function" else tool
                for tool in as_list(asked.get("tools"))
            ],
        }

    def _whole(self, item: OutputItem) -> Json:
        """Return an item with all that came so far; one that was cut says so."""
        text = str(item.text)
        status = "incomplete" if self._finish_reason == "length" else "completed"
        is_open = self._open is not None and item is self._items[-1]
        values = {"$text": text, "$status": "in_progress" if is_open else status}
        values["$object"] = loads(text, {}) if item.item["type"] == "tool_search_call" else {}
        whole = {**item.item, **fill(item.kind["whole"], values)}
        included = as_list(self._request.asked.get("include"))
        is_wanted = whole["type"] == "reasoning" and "reasoning.encrypted_content" in included
        if is_wanted or whole["type"] == "compaction":
            whole["encrypted_content"] = ResponseRequest.CARRIED + text
        return whole

    # -- the items of the output -----------------------------------------------------------------

    def _add_text(self, kind: str, text: str) -> None:
        """Add a piece of text or thoughts, or keep it while a call is not whole."""
        is_call = isinstance(self._open, int)
        if self._late or is_call and loads(str(self._items[-1].text)) is None:
            self._budget.count(len(text))
            self._late.append((kind, text))
        else:
            self._add(kind, {"type": kind}, text)

    def _add_late(self) -> None:
        late, self._late = self._late, []
        for kind, text in late:
            self._add(kind, {"type": kind}, text)

    def _add(self, key: Any, fields: Json, text: str) -> None:
        """Add a piece of text to the open item of that key, or begin one, which ends the last."""
        if key != self._open:
            self._end()
            self._open, item = key, OutputItem(len(self._items), self._budget, fields)
            self._items.append(item)
            self._emit("response.output_item.added", output_index=item.index, item=item.item)
            self._tell(item, "added", "")
        self._items[-1].text.add(text)
        if text:
            self._tell(self._items[-1], "piece", text)

    def _end(self) -> None:
        """Write the events that complete the last item, if it is open."""
        if self._open is None:
            return
        self._open, item = None, self._items[-1]
        self._tell(item, "done", str(item.text))
        self._emit("response.output_item.done", output_index=item.index, item=self._whole(item))

    def _tell(self, item: OutputItem, moment: str, text: str) -> None:
        """Write the events about the text of an item at a moment of its kind."""
        values = {"$text": text, "$name": item.item.get("name")}
        for kind, fields in item.kind.get(moment, {}).items():
            told = {"item_id": item.item["id"], "output_index": item.index, **fill(fields, values)}
            self._emit(f"response.{kind}", **told)

    def _emit(self, kind: str, **fields: Any) -> None:
        if self.is_stream:
            event = {"type": kind, "sequence_number": self._number, **fields}
            self._pieces.append(encode_event(encode_json(event), kind))
            self._number += 1


class ResponsesApi(ChatApi):
    """POST /v1/responses: a translation in front of and behind the chat API."""

    def check(self, body: Any) -> Json:
        """Return the chat request for a request to /v1/responses; raises BadRequest."""
        self._request = ResponseRequest(body, self._memory, self._owner)
        return super().check(self._request.chat)

    def to_upstream(self, request: Json, target: Target) -> tuple[Json, dict[str, str]]:
        """Return the body for the upstream, and the rules that changed it; see Rewrite.run()."""
        body, fired = super().to_upstream(request, target)
        return body, {**fired, "responses": self._request.given_up()}

    def writer(self, request: Json, out: Any, target: Target) -> Writer:
        """Return what writes the answer to the client."""
        keep = functools.partial(self._memory.keep, context=self._request.items, owner=self._owner)
        return ResponsesWriter(out, self._request, target.model, keep)


class ChatRouteApi(ChatApi):
    """POST /v1/chat/completions, also with the body of a Responses request.

    Cursor sends that here and wants chunks back (forum.cursor.com #159298).
    """

    def check(self, body: Any) -> Json:
        """Return the chat request; raises BadRequest."""
        if isinstance(body, dict) and "messages" not in body and "input" in body:
            chat = ResponseRequest(body, self._memory, self._owner).chat
            return super().check({**chat, "stream_options": {"include_usage": True}})
        return super().check(body)


# ------------------------------------------------------------------------------------------------
# Ledger
# ------------------------------------------------------------------------------------------------


def tokens_of(usage: Json | None) -> tuple[int, ...]:
    """Return input, cached, output and reasoning tokens of a usage object.

    >>> tokens_of({"prompt_tokens": 9, "prompt_tokens_details": {"cached_tokens": 4}})
    (9, 4, 0, 0)
    """
    counts = (
        dig(usage, "prompt_tokens"),
        dig(usage, "prompt_tokens_details", "cached_tokens"),
        dig(usage, "completion_tokens"),
        dig(usage, "completion_tokens_details", "reasoning_tokens"),
    )
    # More than a thousand million is no count, and the sums must fit into 64 bits.
    return tuple(int(count) if is_number(count) and 0 < count < 1e9 else 0 for count in counts)


@functools.lru_cache(maxsize=256)
def product_of(user_agent: str) -> str:
    """Return the name of the program that a User-Agent begins with.

    >>> product_of("codex_cli_rs/0.56.0 (Linux)"), product_of("")
    ('codex_cli_rs', 'unknown')
    """
    match = re.match(r"[!#$%&'*+.^_`|~0-9A-Za-z-]{1,40}", user_agent)
    return public(match.group()) if match else "unknown"


def counts_path(options: Options, environ: Mapping[str, str]) -> str:
    """Return where counts are kept: as the option says, else in the CLI's folder."""
    home = qwen_home(environ, options.qwen_home)
    return options.usage_file or os.path.join(home, "qwen_proxy.sqlite3")


# What `usage` and /usage can group by.
GROUPS = {
    "day": "date(bucket, 'unixepoch', 'localtime')",
    "model": "model",
    "provider": "provider",
    "client": "client",
}


class CountsFile:
    """The SQLite file of counts: buckets of ten minutes, and of days once they are old.

    It has one table, with a row for each combination of KEYS. Several processes may write to it.
    """

    # 'qwnp', in the header of the file.
    APPLICATION_ID, VERSION = 0x71776E70, 1
    KEYS = ("bucket", "route", "provider", "model", "client", "outcome")
    TOKENS = ("input_tokens", "cached_tokens", "output_tokens", "reasoning_tokens")
    SUMS = ("requests", *TOKENS, "first_ms", "whole_ms")
    # Seconds, and days.
    BUCKET, DAY, KEEP = 600, 86_400, 90
    # Wait so long for another process that writes; only the writing thread and readers do.
    BUSY = 2.0
    TABLE = (
        f"TABLE IF NOT EXISTS buckets ({', '.join(KEYS + SUMS)}, "
        f"PRIMARY KEY ({', '.join(KEYS)})) WITHOUT ROWID"
    )
    # In one statement, so that it sees one state: another process may be making the table now.
    LOOK = (
        "SELECT (SELECT application_id FROM pragma_application_id), "
        "(SELECT user_version FROM pragma_user_version), count(*) FROM main.sqlite_master"
    )
    ADD = (
        f"INSERT INTO buckets VALUES ({', '.join('?' * len(KEYS + SUMS))}) "
        f"ON CONFLICT ({', '.join(KEYS)}) DO UPDATE SET "
        + ", ".join(f"{name} = {name} + excluded.{name}" for name in SUMS)
    )
    # The first second of a day here: so many days after that of a time, or before it.
    MIDNIGHT = (
        "CAST(strftime('%s', date(:now, 'unixepoch', 'localtime', :days || ' days'), 'utc') "
        "AS INTEGER)"
    )
    # Noon, so that a day stays the same one in most other time zones.
    MERGE = (
        "DROP TABLE IF EXISTS temp.old",
        "CREATE TEMP TABLE old AS SELECT CAST(strftime('%s', date(bucket, 'unixepoch', "
        "'localtime') || ' 12:00', 'utc') AS INTEGER) AS day, "
        f"{', '.join(KEYS[1:])}, {', '.join(f'sum({name})' for name in SUMS)} FROM buckets "
        f"WHERE bucket < {MIDNIGHT} GROUP BY day, {', '.join(KEYS[1:])}",
        f"DELETE FROM buckets WHERE bucket < {MIDNIGHT}",
        "INSERT INTO buckets SELECT * FROM old",
    )

    # What is shown of a group. A client that left, 499, is no error.
    MEASURES = {
        "requests": "sum(requests)",
        **{name: f"sum({name})" for name in TOKENS},
        "errors": "sum(requests * (outcome >= 400 AND outcome <> 499))",
        "tokens_per_second": "round(1000.0 * sum(output_tokens * (outcome < 400)) / "
        "sum((whole_ms - first_ms) * (outcome < 400)), 1)",
    }
    # The spans of time that plans are sold by.
    WINDOWS = {"last 5 hours": 5 * 3600, "7 days": 7 * DAY, "30 days": 30 * DAY}

    def __init__(self, path: str = ""):
        self.path, self._next_merge = path, 0.0

    def add(self, rows: Iterable[tuple[Any, ...]]) -> None:
        """Add rows of KEYS and SUMS; raises sqlite3.Error and others, and adds none then."""
        os.makedirs(os.path.dirname(os.path.abspath(self.path)), 0o700, exist_ok=True)
        # SQLite would follow the umask.
        with contextlib.suppress(FileExistsError):
            os.close(os.open(self.path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        # Opened for each write, which takes a millisecond: the file may be deleted meanwhile.
        with contextlib.closing(self._open(self.path)) as connection:
            self._prepare(connection)
            # SQLite waits for no other process with this: the next opening does it then.
            with contextlib.suppress(connection.OperationalError):
                connection.execute("PRAGMA journal_mode = WAL")
            # With WAL the program's end loses nothing so, that of the machine the last moments.
            connection.execute("PRAGMA synchronous = NORMAL")
            connection.execute("BEGIN IMMEDIATE")
            if time.monotonic() > self._next_merge:
                self._merge(connection)
            connection.executemany(self.ADD, rows)
            connection.execute("COMMIT")

    def _prepare(self, connection: Any) -> None:
        """Make the table if the file is new; raises ValueError for one that is not ours."""
        if self._is_empty(connection):
            connection.executescript(
                f"BEGIN IMMEDIATE; CREATE {self.TABLE}; PRAGMA user_version = {self.VERSION}; "
                f"PRAGMA application_id = {self.APPLICATION_ID}; COMMIT"
            )
        # A table with other columns ends here, before anything is changed.
        connection.execute("SELECT max(bucket) FROM buckets")

    def _open(self, path: str) -> Any:
        """Return a connection to a file or to memory; raises ValueError for a pipe and the like."""
        # Here, since it costs every start some milliseconds, and some Pythons have none.
        import sqlite3

        # SQLite would wait for a pipe.
        if os.path.lexists(path) and not os.path.isfile(path):
            raise ValueError("it is not a regular file")
        return sqlite3.connect(path, timeout=self.BUSY, isolation_level=None)

    def _is_empty(self, connection: Any) -> bool:
        """Return whether nothing is in a file yet; raises ValueError for one that is not ours."""
        number, version, tables = connection.execute(self.LOOK).fetchone()
        if (tables or version) and number != self.APPLICATION_ID:
            raise ValueError("it is another program's")
        if version > self.VERSION:
            raise ValueError("a newer qwen_proxy has written it")
        return not tables

    def _merge(self, connection: Any) -> None:
        """Merge old buckets into days.

        Old by the newest bucket, too: a clock that is years ahead must not merge this week.
        """
        newest = connection.execute("SELECT max(bucket) FROM buckets").fetchone()[0] or 0
        values = {"now": min(newest, time.time()), "days": -self.KEEP}
        for statement in self.MERGE:
            connection.execute(statement, values)
        self._next_merge = time.monotonic() + self.DAY

    def read(self, by: Iterable[str], days: int, rows: Iterable[tuple[Any, ...]] = ()) -> Json:
        """Return the counts of the file, if there is one, and of rows that are not in it yet.

        groups are those of the last days, today included; windows those of each provider in
        WINDOWS. Raises ValueError for a file that is not ours, sqlite3.Error, ImportError.
        """
        # Not read-only, which cannot read what a program left that was killed while it wrote.
        path = self.path if os.path.exists(self.path) else ":memory:"
        with contextlib.closing(self._open(path)) as connection:
            in_file = [] if self._is_empty(connection) else ["main.buckets"]
            # A temporary table hides the file's of the same name.
            connection.execute(f"CREATE TEMP {self.TABLE}")
            connection.executemany(self.ADD, rows)
            tables = " UNION ALL SELECT * FROM ".join(["temp.buckets", *in_file])
            connection.execute(f"CREATE TEMP VIEW counts AS SELECT * FROM {tables}")

            def select(names: Iterable[str], where: str, **values: float) -> list[Json]:
                columns = {**{name: GROUPS[name] for name in names}, **self.MEASURES}
                keys = ", ".join(GROUPS[name] for name in names)
                sql = f"SELECT {', '.join(columns.values())} FROM counts WHERE {where}"
                found = connection.execute(f"{sql} GROUP BY {keys} ORDER BY {keys}", values)
                return [dict(zip(columns, row)) for row in found]

            now = time.time()
            windows = [
                {"provider": row["provider"], "window": window, **row}
                for window, seconds in self.WINDOWS.items()
                # A bucket that only reaches into the window counts: better too early than too late.
                for row in select(
                    ["provider"],
                    "bucket > :start AND bucket <= :now AND provider <> ''",
                    start=now - seconds - self.BUCKET,
                    now=now,
                )
            ]
            return {
                "groups": select(by, f"bucket >= {self.MIDNIGHT}", now=now, days=1 - days),
                "windows": sorted(windows, key=lambda row: str(row["provider"])),
            }


class Rows(Dict[Any, Tuple[Any, ...]]):
    """Rows of counts by their keys."""

    def add(self, key: Any, counts: tuple[Any, ...]) -> None:
        """Add counts to the row of a key."""
        row = self.get(key)
        self[key] = tuple(map(operator.add, row, counts)) if row else counts


class Ledger:
    """Counts what requests used: since the start in memory, over time in a file; never a text.

    Any thread adds; one thread writes, so that no request waits for the disk. What cannot be
    written stays in memory.
    """

    # What asks a model; other routes are counted since the start only.
    ROUTES = frozenset(
        f"POST {path}"
        for path in ("/chat/completions", "/completions", "/embeddings", "/responses")
    )
    # What the totals in memory count.
    SUMS = (*CountsFile.SUMS, "errors")
    # Between looks for what is to be written, and after a write that failed.
    PAUSE, RETRY = 1.0, 30.0
    # Names come from outside: so many of a kind, then 'other'; their length.
    MOST_NAMES, MAX_NAME = 200, 100
    # That are not in the file; the oldest give way.
    MOST_ROWS = 50_000
    HISTOGRAMS = {
        "first_ms": ("first_byte_seconds", "Time to the first byte of the answer."),
        "whole_ms": ("duration_seconds", "Time to the end of the answer."),
    }
    # Of the histograms, in seconds.
    BOUNDS = (0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
    LABELS = ("route", "provider", "model", "status", "le")

    def __init__(self, path: str | None = None):
        self.path, self.problem = path, ""
        self._lock, self._file_lock = threading.Lock(), threading.Lock()
        # Of the file's KEYS: its SUMS.
        self._pending = Rows()
        # Of route, provider, model and class of status: SUMS. And of these, the name of a span and
        # the place of the next bound: how many there were.
        self._totals = Rows()
        self._spans: collections.Counter[Any] = collections.Counter()
        self._names: list[dict[str, str]] = [{}, {}, {}]
        self._file, self._end = CountsFile(path or ""), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        if path:
            self._thread.start()

    def add(
        self,
        route: str,
        names: tuple[str, str, str],
        outcome: int,
        tokens: tuple[int, ...] = (0, 0, 0, 0),
        spans: tuple[float | None, ...] = (None, None),
    ) -> None:
        """Count a request.

        names are those of the provider, the model and the client; spans are the seconds to the
        first byte of the answer and to its end, None where there was none.
        """
        bucket = int(time.time()) // CountsFile.BUCKET * CountsFile.BUCKET
        sums = (1, *tokens, *[round(1000 * (seconds or 0)) for seconds in spans])
        with self._lock:
            provider, model, client = map(self._bounded, self._names, names)
            key = route, provider, model, f"{outcome // 100}xx"
            self._totals.add(key, (*sums, outcome >= 400 and outcome != 499))
            for name, seconds in zip(self.HISTOGRAMS, spans):
                if seconds is not None:
                    self._spans[key, name, bisect.bisect_left(self.BOUNDS, seconds)] += 1
            if route in self.ROUTES:
                self._pending.add((bucket, route, provider, model, client, outcome), sums)
                if len(self._pending) > self.MOST_ROWS:
                    del self._pending[next(iter(self._pending))]

    def _bounded(self, known: dict[str, str], name: str) -> str:
        if name not in known and len(known) >= self.MOST_NAMES:
            return "other"
        return known.get(name) or known.setdefault(name, public(shorten(name, self.MAX_NAME)))

    # -- the file --------------------------------------------------------------------------------

    def close(self, seconds: float) -> None:
        """Write what is still to be written, if it takes no longer than so many seconds."""
        self._end.set()
        if self.path:
            self._thread.join(seconds)

    def _run(self) -> None:
        is_last = False
        while not is_last:
            is_last = self._end.wait(self.RETRY if self.problem else self.PAUSE)
            if self._pending:
                self._write()

    def _write(self) -> None:
        with self._file_lock:
            with self._lock:
                pending, self._pending = self._pending, Rows()
            try:
                self._file.add([(*key, *sums) for key, sums in pending.items()])
                self.problem = ""
            except Exception as error:
                with self._lock:
                    for key, sums in pending.items():
                        self._pending.add(key, sums)
                if not self.problem:
                    log.warning("%s: %s; usage is counted in memory", self.path, reason_of(error))
                self.problem = reason_of(error)

    # -- what is told ----------------------------------------------------------------------------

    def report(self, by: Iterable[str] = ("day",), days: int = 30) -> Json:
        """Return the object of /usage."""
        counts: Json = {}
        problem = self.problem
        # Not in the middle of a write: a count would be in both places, or in none.
        with self._file_lock:
            with self._lock:
                rows = [(*key, *sums) for key, sums in self._pending.items()]
            # What is in memory is told, too, if the file cannot be read.
            for file in (self._file, CountsFile()):
                try:
                    counts = counts or file.read(by, days, rows)
                except Exception as error:
                    problem = problem or reason_of(error)
        return {
            "file": self.path,
            "problem": problem or None,
            "days": days,
            "since_start": self.since_start(),
            "groups": [],
            "windows": [],
            **counts,
        }

    def since_start(self) -> Json:
        """Return the sums since the start."""
        with self._lock:
            rows = [row for (route, *_), row in self._totals.items() if route in self.ROUTES]
        sums = dict(zip(self.SUMS, map(sum, zip(*rows))))
        return {name: sums.get(name, 0) for name in ("requests", *CountsFile.TOKENS, "errors")}

    def summary(self) -> str:
        """Return the sums since the start as the last words of the program."""
        sums = self.since_start()
        return (
            f"{counted(sums['requests'], 'request')}, "
            f"{sums['input_tokens']:,}+{sums['output_tokens']:,} "
            f"tokens ({sums['cached_tokens']:,} cached), {counted(sums['errors'], 'error')}"
        )

    def metrics(self, gauges: Iterable[tuple[str, str, float]]) -> str:
        """Return the text of /metrics; gauges are name, help and value."""
        with self._lock:
            requests, spans = sorted(self._totals.items()), self._spans.copy()
        tokens = Rows()
        for (_, provider, model, _), row in requests:
            tokens.add((provider, model), row[1:5])
        metrics = [
            self.metric(
                "requests_total",
                "counter",
                "Requests, one for each provider that was asked.",
                self.LABELS,
                [("", key, row[0]) for key, row in requests],
            ),
            self.metric(
                "tokens_total",
                "counter",
                "Tokens as the upstream counts them; cached is in input, reasoning in output.",
                ("provider", "model", "kind"),
                [
                    ("", (*key, name.partition("_")[0]), count)
                    for key, row in tokens.items()
                    for name, count in zip(CountsFile.TOKENS, row)
                    if any(row)
                ],
            ),
        ]
        for span, (name, text) in self.HISTOGRAMS.items():
            samples = self._histogram(requests, spans, span)
            metrics.append(self.metric(name, "histogram", text, self.LABELS, samples))
        metrics += [
            self.metric(name, "gauge", text, (), [("", (), value)]) for name, text, value in gauges
        ]
        return "".join(metrics)

    def _histogram(
        self, rows: list[tuple[Any, Any]], spans: Mapping[Any, int], name: str
    ) -> Iterator[tuple[str, tuple[Any, ...], float]]:
        for key, row in rows:
            count = 0
            for place, bound in enumerate((*self.BOUNDS, "+Inf")):
                count += spans[key, name, place]
                yield "_bucket", (*key, bound), count
            yield "_sum", key, row[self.SUMS.index(name)] / 1000
            yield "_count", key, count

    @staticmethod
    def metric(
        name: str,
        kind: str,
        text: str,
        labels: tuple[str, ...],
        samples: Iterable[tuple[str, tuple[Any, ...], float]],
    ) -> str:
        """Return a metric in Prometheus' text format; samples are suffix, labels, value.

        >>> Ledger.metric("n", "gauge", "Help.", ("a",), [("", ('x"y',), 1)]).splitlines()[-1]
        'qwen_proxy_n{a="x\\\\"y"} 1'
        """
        lines = [f"# HELP qwen_proxy_{name} {text}", f"# TYPE qwen_proxy_{name} {kind}"]
        for suffix, values, value in samples:
            escaped = (str(each).replace("\\", "\\\\").replace('"', '\\"') for each in values)
            inner = ",".join(f'{label}="{each}"' for label, each in zip(labels, escaped))
            lines.append(f"qwen_proxy_{name}{suffix}{f'{{{inner}}}' if inner else ''} {value}")
        return "\n".join([*lines, ""])


# ------------------------------------------------------------------------------------------------
# Page
# ------------------------------------------------------------------------------------------------
# It stands before 'Server', which sends it and starts its log-in. What comes from outside becomes
# text in it, never HTML: that is why its script makes every element itself.

PAGE = r"""<!doctype html>
<html lang="en"><head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Qwen proxy</title><link rel="icon" href="data:,">
<style nonce="{nonce}">
* { box-sizing: border-box; margin: 0; } .loading .later { visibility: hidden; }
:root {
  color-scheme: light dark; --back: light-dark(#f6f6f8, #121216); --card: light-dark(#fff, #1a1a20);
  --text: light-dark(#1d1d24, #e9e9ee); --dim: light-dark(#5b5b68, #a4a4b1);
  --line: light-dark(#e1e1e8, #2d2d36); --edge: light-dark(#83838f, #757582);
  --accent: light-dark(#5346c4, #aaa0fc); --on-accent: light-dark(#fff, #15131f);
  --soft: light-dark(#f0eefb, #232133); --bad: light-dark(#b3261e, #ff9d94);
}
[hidden], .plain .live, body:not(.plain) .unscripted { display: none !important; }
body { background: var(--back); color: var(--text); overflow-wrap: anywhere; }
body { font: 15px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums; }
header, main { max-width: 1280px; margin: 0 auto; padding: 16px 20px; }
header { display: flex; justify-content: space-between; }
main { display: grid; grid-template: auto / repeat(2, minmax(0, 1fr)); gap: 16px; padding-top: 0; }
section { grid-column: 1 / -1; padding: 18px 20px; border: 1px solid var(--line); }
section { border-radius: 10px; background: var(--card); }
header span, label, dt, th, summary, small, .dim { color: var(--dim); font-size: 13px; }
h1 { font-size: 22px; } h2 { margin-bottom: 10px; font-size: 16px; }
button, .button, input, textarea {
  padding: 6px 12px; border: 1px solid var(--edge); border-radius: 7px;
  background: var(--card); color: var(--text); font: inherit; text-decoration: none;
}
button, .button, summary { cursor: pointer; font-size: 14px; }
button:hover { border-color: var(--accent); } pre, #answer, details { margin-top: 10px; }
.main, [aria-pressed=true] { background: var(--accent); color: var(--on-accent); }
:focus-visible { outline: 2px solid var(--accent); outline-offset: 2px; }
textarea { width: 100%; min-height: 78px; resize: vertical; }
pre, .mono { font: 13px/1.55 ui-monospace, Menlo, Consolas, monospace; }
pre, .box { padding: 12px 14px; border-radius: 7px; background: var(--soft); }
pre, #answer, #thoughts, #problem { white-space: pre-wrap; }
.row { display: flex; flex-flow: wrap; gap: 8px; align-items: center; margin-top: 10px; }
.box { margin-top: 14px; } .row input, .fields input { flex: 1 1 110px; min-width: 0; }
.fields { display: grid; grid-template: auto / auto 1fr auto; gap: 8px; align-items: center; }
.sign { display: inline-block; width: 11px; height: 11px; margin-right: 10px; border-radius: 50%; }
.sign, i { background: var(--accent); } .wrong .sign { border-radius: 2px; background: var(--bad); }
.bad, .wrong #problem { color: var(--bad); } #problem::first-letter { text-transform: uppercase; }
pre + .copy, #problem + .copy { margin-top: 8px; } #problem:empty + .copy { display: none; }
#facts { display: flex; flex-wrap: wrap; gap: 10px 40px; margin-top: 12px; }
#code { font-size: 22px; letter-spacing: 2px; } .day:hover, .day:focus { background: var(--soft); }
#snippet { min-height: 146px; } #answer { min-height: 48px; } #activity-box { max-height: 220px; }
#days { display: flex; gap: 4px; } .day { flex: 1; min-width: 0; text-align: center; }
.bar { display: flex; flex-flow: column-reverse; height: 120px; box-shadow: 0 1px var(--edge); }
td i { display: inline-block; width: 10px; height: 10px; margin-right: 8px; border-radius: 2px; }
.shade1 { opacity: .7; } .shade2 { opacity: .5; } .shade3 { opacity: .34; } .shade4 { opacity: .2; }
#windows { margin: 10px 0 22px; } td small { display: block; } i { margin-top: 1px; }
table { width: 100%; border-collapse: collapse; table-layout: fixed; }
td, th { padding: 6px 12px 6px 0; border-bottom: 1px solid var(--line); vertical-align: top; }
th { font-weight: 500; text-align: left; } td:last-child, th:last-child { padding-right: 2px; }
.number { width: 70px; text-align: right; overflow-wrap: normal; } .when { width: 104px; }
.wide { width: 30%; } .scroll { overflow: auto; max-height: 420px; margin-top: 8px; }
td button, ::file-selector-button { padding: 0 4px 0 0; border: 0; background: none; }
td button, ::file-selector-button, .on { color: var(--accent); font: inherit; text-align: left; }
@media (min-width: 1150px) { #connect, #try, #usage, #models { grid-column: auto; } }
@media (max-width: 640px) {
  header, main { padding-left: 10px; padding-right: 10px; } section { padding: 14px 12px; }
  .less, #activity thead { display: none; } .number { width: 62px; padding-right: 6px; }
  #activity tr { display: grid; grid-template-columns: 88px 1fr 1fr; padding: 5px 0; }
  #activity td { width: auto; padding: 0 8px 0 0; border: 0; text-align: left; }
  #activity td:last-child { grid-column: span 2; }
}
</style>
</head><body class="plain">
<header><strong>Qwen proxy</strong><span id="server">{server}</span></header>
<main>
<section id="state" class="{mood}" aria-labelledby="verdict">
  <h1><span class="sign"></span><span id="verdict" role="status">{verdict}</span></h1>
  <p id="problem" class="copied">{problem}</p>
  <form id="key-form" class="box live" {no_key}>
    <label for="key">API key: one that the server was started with. It stays in this tab.</label>
    <p class="row"><input type="password" id="key" autocomplete="off" required>
      <button class="main">Use this key</button></p></form>
  <dl id="facts">{facts}</dl>
  <details id="login" class="live" hidden><summary>Log in with a Qwen account</summary>
    <div class="box"><p id="login-text" role="status"></p>
      <p id="login-code" class="row" hidden><span class="dim">Code</span>
        <b id="code" class="mono copied"></b>
        <a id="link" class="button main" target="_blank" rel="noopener">Open the page</a></p>
      <p class="row"><button id="login-start">Connect</button></p></div></details>
  <p class="unscripted box">With JavaScript this page also shows usage, requests and models.</p>
</section>
<section id="connect" class="live" aria-label="Connect a client">
  <h2>Connect a client</h2>
  <div class="fields">
    <label for="base">Base URL</label><input id="base" class="mono copied" readonly>
    <label for="client-key">API key</label><input id="client-key" class="mono copied" readonly>
    <label for="model">Model</label>
    <input id="model" class="mono copied" list="model-ids" spellcheck="false" autocomplete="off">
  </div>
  <div class="row" id="clients" role="group" aria-label="Client"></div>
  <pre tabindex="0" id="snippet" class="copied"></pre><datalist id="model-ids"></datalist>
</section>
<section id="usage" class="live later" aria-label="Usage, in tokens a day">
  <h2>Usage, in tokens a day</h2>
  <div id="days"></div><p class="dim" id="day"></p>
  <div id="windows"></div><div id="usage-box" class="scroll" tabindex="0"></div>
</section>
<section id="activity" class="live later" aria-label="Requests">
  <h2>Requests</h2>
  <div id="activity-box" class="scroll" tabindex="0" role="region" aria-label="Requests"></div>
</section>
<section id="try" class="live later" aria-label="Try it">
  <h2>Try it</h2>
  <form id="try-form">
    <label for="prompt">Message to <span id="try-model"></span></label>
    <textarea id="prompt" required>Say hello, and what you can do.</textarea>
    <p class="row"><label for="image">Image</label><input type="file" id="image" accept="image/*">
      <button type="reset">Clear</button> <button class="main" id="send">Send</button></p></form>
  <details><summary>Thoughts</summary><div id="thoughts" class="dim"></div></details>
  <div id="answer"></div><p class="dim" id="outcome" role="status">&nbsp;</p>
  <details><summary>The request as curl</summary>
    <pre tabindex="0" id="curl" class="copied"></pre></details>
</section>
<section id="models" class="live later" aria-label="Models">
  <h2>Models</h2>
  <p class="row"><label for="filter">Filter</label><input type="search" id="filter">
    <span class="dim" id="model-count" role="status"></span></p>
  <div id="model-box" class="scroll" tabindex="0" role="region" aria-label="Models"></div>
</section>
</main>
<script nonce="{nonce}">
const $ = (id) => document.getElementById(id);
// Where the browser reached the program: also behind a path prefix, and at /v1.
const root = location.origin + location.pathname.replace(/\/*$/, "/");
const base = root.replace(/\/v1\/$/, "/") + "v1";
const count = (value) => value.toLocaleString();
const short = new Intl.NumberFormat([], {notation: "compact", maximumFractionDigits: 1}).format;
let state, models = [], image = "", client = "curl", sending, timer, usageOf = 0, modelsOf, loginOf;
// With --api-key the server sends the page with the form for it open.
const needsKey = !$("key-form").hidden, setKey = (key) => sessionStorage.setItem("key", key);

// Returns an element. What comes from outside becomes text in it, never HTML.
function make(tag, className, ...children) {
  const element = Object.assign(document.createElement(tag), {className});
  element.append(...children);
  return element;
}

// Fills a box with a table; its columns are "Title.class.class|...", a row is a list of cells.
function fill(box, titles, rows, none) {
  const columns = titles.split("|").map((title) => title.split("."));
  const cells = (tag, row) => make("tr", "", ...row.map((value, place) =>
    make(tag, columns[place].slice(1).join(" "), value ?? "")));
  const head = make("thead", "", cells("th", columns.map(([title]) => title)));
  const body = make("tbody", "", ...rows.map((row) => cells("td", row)));
  box.replaceChildren(rows.length ? make("table", "", head, body) : make("p", "dim", none));
}

async function ask(path, body, signal) {
  const key = sessionStorage.getItem("key"), headers = {"Content-Type": "application/json"};
  if (key) headers.Authorization = `Bearer ${key}`;
  const options = body ? {method: "POST", body: JSON.stringify(body)} : {};
  const response = await fetch(root + path, {...options, headers, signal, cache: "no-store"});
  if (response.ok) return response;
  const answer = await response.json().catch(() => null);
  const message = answer?.error?.message || `the program answered ${response.status}`;
  throw Object.assign(new Error(message), {status: response.status});
}

function span(seconds) {
  const minutes = Math.floor(seconds / 60), hours = Math.floor(minutes / 60);
  if (hours < 1) return minutes < 1 ? `${Math.max(0, Math.round(seconds))} s` : `${minutes} min`;
  return hours < 48 ? `${hours} h ${minutes % 60} min` : `${Math.floor(hours / 24)} days`;
}

const json = async (...request) => (await ask(...request)).json();
const isUsable = () => state.status === "ok";
const until = (time) => time - Date.now() / 1000;
const local = (time, how) => new Date(1000 * time).toLocaleString([], how);

for (const element of document.querySelectorAll(".copied")) {
  const button = make("button", "copy", "Copy");
  button.onclick = () => {
    element.select ? element.select() : getSelection().selectAllChildren(element);
    // The clipboard API is not there for a page over http from another machine; this is.
    button.textContent = document.execCommand("copy") ? "Copied" : "Press Ctrl+C";
    setTimeout(() => { button.textContent = "Copy"; }, 1500);
  };
  element.after(button);
}

// ---- State and log-in ----
function showState() {
  const end = state.login.expires_at, left = until(end), facts = {...state.facts};
  const clock = local(end, {weekday: "short", hour: "numeric", minute: "2-digit"});
  if (end) facts.Login += left > 0 ? `, until ${clock} (${span(left)})` : ", expired";
  $("state").className = isUsable() ? "" : "wrong";
  $("verdict").textContent = state.verdict;
  $("server").textContent = `version ${state.version}, up ${span(state.uptime_seconds)}`;
  $("problem").textContent = state.problem;
  $("facts").replaceChildren(...Object.entries(facts).map(
    ([name, text]) => make("div", "", make("dt", "", name), make("dd", "", text))));
  showLogin(state.device);
}

function showLogin({phase, message, address, code, expires_at: end}) {
  const texts = {
    none: `${isUsable() ? "You have a login that works. " : ""}${state.login_note}.`,
    starting: "Asking Qwen for a code ...",
    waiting: `Open the page and approve, if it shows this code. It expires in ${span(until(end))}.`,
    done: `Logged in: ${message}.`,
    failed: `The log-in failed: ${message}.`,
  };
  $("login").hidden = !state.can_login;
  if (loginOf !== phase + state.status) $("login").open = phase !== "none" || !isUsable();
  loginOf = phase + state.status;
  $("login-text").textContent = texts[phase];
  $("login-code").hidden = phase !== "waiting";
  $("code").textContent = code || "";
  if (/^https?:/.test(address)) $("link").href = address;
  $("login-start").hidden = phase === "starting" || phase === "waiting";
  $("login-start").textContent = isUsable() ? "Log in anew" : "Connect";
}

$("login-start").onclick = () => json("login", {}).then(showLogin).then(poll)
  .catch(({message}) => showLogin({phase: "failed", message}));
$("key-form").onsubmit = () => { setKey($("key").value.trim()); poll(); return false; };

// ---- Connect a client ----
const quote = JSON.stringify;
const shell = (text) => `'${text.replaceAll("'", "'\\''")}'`;

function curl(body) {
  const key = needsKey ? "  -H 'Authorization: Bearer YOUR_KEY' \\\n" : "";
  return `curl ${shell(base + "/chat/completions")} \\\n${key}`
    + `  -H 'Content-Type: application/json' \\\n  -d ${shell(quote(body))}`;
}

const CLIENTS = {
  curl: (model) => curl({model, messages: [{role: "user", content: "Hello"}]}),
  "openai-python": (model, key) => `from openai import OpenAI

client = OpenAI(base_url=${quote(base)}, api_key=${quote(key)})
messages = [{"role": "user", "content": "Hello"}]
answer = client.chat.completions.create(model=${quote(model)}, messages=messages)
print(answer.choices[0].message.content)`,
  Codex: (model, key) => `# ~/.codex/config.toml
model = ${quote(model)}
model_provider = "qwen"

[model_providers.qwen]
name = "Qwen"
base_url = ${quote(base)}
wire_api = "responses"${key === "any" ? "" : '\nenv_key = "QWEN_PROXY_KEY"'}`,
  "Open WebUI": (model, key) => `Admin Settings, Connections, OpenAI API, +\n
URL        ${base}
in Docker  ${base.replace(/\/\/(localhost|127[\d.]+|\[::1\])/, "//host.docker.internal")}
Key        ${key}`,
  Cline: (model, key) => `Settings, API Provider: OpenAI Compatible\n
Base URL   ${base}
API Key    ${key}
Model ID   ${model}`,
  aider: (model, key) => `OPENAI_API_BASE=${shell(base)} OPENAI_API_KEY=${shell(key)} \\
  aider --model ${shell("openai/" + model)}`,
};

function showSnippets() {
  const model = $("model").value, key = needsKey ? "YOUR_KEY" : "any";
  for (const button of $("clients").children) button.ariaPressed = button.textContent === client;
  $("client-key").value = key;
  $("try-model").textContent = model;
  $("snippet").textContent = CLIENTS[client](model, key);
  $("curl").textContent = curl(request());
}

for (const name of Object.keys(CLIENTS)) {
  const button = $("clients").appendChild(make("button", "", name));
  button.onclick = () => { client = name; showSnippets(); };
}

// ---- Usage and requests ----
const DAYS = 14, WINDOWS = ["last 5 hours", "7 days", "30 days"];
const total = (rows, name) => rows.reduce((sum, row) => sum + row[name], 0);
const tokens = (rows) => total(rows, "input_tokens") + total(rows, "output_tokens");

function showUsage({groups, windows}) {
  const of = (model) => groups.filter((row) => row.model === model);
  const noon = (day) => new Date(`${day}T12:00`).getTime();
  // The server's clock may be a day ahead of this one.
  const last = new Date(Math.max(Date.now(), ...groups.map((row) => noon(row.day)))).setHours(12);
  const days = [...Array(DAYS).keys()].reverse().map((back) =>
    new Date(last - back * 24 * 3600e3).toLocaleDateString("sv"));
  const names = [...new Set(groups.map((row) => row.model))];
  names.sort((one, other) => tokens(of(other)) - tokens(of(one)));
  const perDay = days.map((day) => groups.filter((row) => row.day === day));
  const most = Math.max(1, ...perDay.map(tokens));
  const key = (place) => make("i", `shade${Math.min(place, 4)}`);
  $("days").replaceChildren(...days.map((day, at) => {
    const date = new Date(noon(day)).toLocaleDateString([], {dateStyle: "full"});
    const asked = count(total(perDay[at], "requests")), bar = make("div", "bar");
    const item = make("div", "day", bar, make("small", "", +day.slice(8)));
    names.forEach((name, place) => {
      const part = key(place), used = perDay[at].filter((row) => row.model === name);
      part.style.height = `${118 * tokens(used) / most}px`;
      if (tokens(used)) bar.append(part);
    });
    const ariaLabel = `${date}: requests ${asked}, tokens ${short(tokens(perDay[at]))}`;
    const tell = item.onfocus = item.onmouseenter = () => { $("day").textContent = ariaLabel; };
    tell();
    return Object.assign(item, {role: "img", ariaLabel, tabIndex: 0});
  }));
  const providers = [...new Set(windows.map((row) => row.provider))];
  const shown = providers.map((provider) => [provider, ...WINDOWS.map((name) => {
    const rows = windows.filter((row) => row.provider === provider && row.window === name);
    const small = make("small", "", short(tokens(rows)));
    return make("span", "", count(total(rows, "requests")), small);
  })]);
  fill($("windows"), `Requests, tokens|${WINDOWS.join(".number|")}.number`, shown, "");
  $("days").hidden = $("day").hidden = !groups.length;
  const fields = ["requests", "errors", "input_tokens", "cached_tokens", "output_tokens"];
  const lines = names.map((name, place) => [make("span", "", key(place), name || "none"),
    ...fields.map((field, at) => (at < 2 ? count : short)(total(of(name), field)))]);
  fill($("usage-box"), "Model|Requests.number|Errors.number.less|In.number|Cached.number.less|"
    + "Out.number", lines, "Nothing was asked yet.");
}

function showActivity() {
  const rows = [...state.running, ...state.latest].map((row) => {
    const seconds = row.seconds - row.first;
    const started = make("time", "", `${span(-until(row.started_at))} ago`);
    const hasSpeed = row.first && row.output_tokens && seconds > 0.05;
    const style = !row.status ? "on" : row.status >= 400 ? "bad" : "";
    const first = row.first ? `${row.first.toFixed(2)} s` : "";
    started.title = local(row.started_at);
    return [started, row.client, row.model || "default", first, `${row.seconds.toFixed(1)} s`,
      hasSpeed ? (row.output_tokens / seconds).toFixed() : "",
      make("span", style, `${row.status || "running"} ${row.remarks}`)];
  });
  fill($("activity-box"), "Started.when|Client|Model|First.number.less|Time.number|"
    + "Tokens/s.number.less|Status.wide", rows, "None yet. Connect a client, or try it below.");
}

// ---- Try it ----
function request() {
  const text = $("prompt").value, part = {type: "image_url", image_url: {url: image}};
  const content = image ? [{type: "text", text}, part] : text;
  const messages = [{role: "user", content}], model = $("model").value;
  return {model, messages, stream: true, stream_options: {include_usage: true}};
}

// Calls back with each event of a stream.
async function readEvents(response, each) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  for (let rest = "", piece; !(piece = await reader.read()).done;) {
    const lines = (rest + piece.value).split("\n");
    rest = lines.pop();
    for (const line of lines) if (line.startsWith("data: {")) each(JSON.parse(line.slice(6)));
  }
}

async function send() {
  const started = performance.now(), seconds = () => (performance.now() - started) / 1000;
  const say = (textContent, className) => Object.assign($("outcome"), {textContent, className});
  let first = 0, used = null, end = "";
  sending = new AbortController();
  $("send").textContent = "Stop";
  $("answer").textContent = $("thoughts").textContent = "";
  say("Waiting for the first word ...", "dim");
  setTimeout(poll, 100);
  try {
    await readEvents(await ask("chat/completions", request(), sending.signal), (chunk) => {
      if (chunk.error) throw new Error(chunk.error.message);
      const {delta = {}, finish_reason: reason} = chunk.choices?.[0] || {};
      first ||= seconds();
      used = chunk.usage || used;
      end = reason || end;
      $("thoughts").append(delta.reasoning_content || "");
      $("answer").append(delta.content || "");
      say(delta.content ? "Answering ..." : "Thinking ...", "dim");
    });
    const speed = (used?.completion_tokens / (seconds() - first) || 0).toFixed();
    const cut = end === "length" ? " Cut off at the limit of tokens." : "";
    say(`First word after ${first.toFixed(2)} s, ${speed} tokens/s.${cut}`, "dim");
  } catch (error) {
    if (error.name === "AbortError") say(`Stopped after ${seconds().toFixed(1)} s.`, "dim");
    else say(error.message, "bad");
  }
  sending = null;
  $("send").textContent = "Send";
  poll();
}

$("try-form").onsubmit = () => { sending ? sending.abort() : send(); return false; };
$("try-form").onreset = () => { image = ""; setTimeout(showSnippets); };
$("image").onchange = ({target: {files}}) => {
  const reader = new FileReader();
  image = "";
  reader.onload = () => { image = reader.result; showSnippets(); };
  if (files.length) reader.readAsDataURL(files[0]);
};

// ---- Models, and what keeps the page up to date ----
function showModels() {
  const wanted = $("filter").value.toLowerCase(), size = (value) => value ? short(value) : "";
  const found = models.filter((one) => `${one.id} ${one.owned_by}`.toLowerCase().includes(wanted));
  $("model-count").textContent = `${count(found.length)} of ${count(models.length)}`;
  const rows = found.slice(0, 300).map((one) => {
    const button = make("button", "", one.id);
    button.onclick = () => { $("model").value = one.id; showSnippets(); };
    return [button, one.owned_by, size(one.context_length), size(one.max_output_tokens)];
  });
  fill($("model-box"), "Model|Provider|Context.number|Output.number.less", rows,
    models.length ? "No model fits." : "None are known yet.");
  $("model-ids").replaceChildren(...models.slice(0, 300).map((one) => new Option("", one.id)));
}

// Nothing is asked for while the page is hidden, and little while nothing happens.
async function poll() {
  if (document.hidden || needsKey && !sessionStorage.getItem("key")) return;
  try {
    state = await json("status");
    $("key-form").hidden = true;
    $("model").defaultValue = state.model;
    for (const show of [showState, showActivity, showSnippets]) show();
    const latest = state.latest[0]?.id;
    if (usageOf !== latest) showUsage(await json(`usage?by=day,model&days=${DAYS}`));
    usageOf = latest;
    document.body.className = "";
    const source = quote([state.facts, state.status]);
    if (modelsOf !== source) {
      models = (await json("models")).data;
      modelsOf = source;
      showModels();
    }
  } catch (error) {
    $("state").className = "wrong";
    $("key-form").hidden = error.status !== 401;
    $("verdict").textContent = error.status === 401 ? "A key is needed" : "No answer";
    $("problem").textContent = error.status ? error.message
      : "The program does not answer. Is it still running? This page keeps trying.";
  }
  const isBusy = state && (state.running.length || /start|wait/.test(state.device.phase));
  clearTimeout(timer);
  timer = setTimeout(poll, isBusy ? 1500 : 10000);
}

document.body.className = "loading";
$("base").value = base;
$("filter").oninput = showModels;
$("model").oninput = $("prompt").oninput = showSnippets;
document.addEventListener("visibilitychange", poll);
showSnippets();
poll();
</script>
</body></html>
"""
PAGE_HEADERS = (
    ("Content-Type", "text/html; charset=utf-8"),
    (
        "Content-Security-Policy",
        "default-src 'none'; script-src 'nonce-{nonce}'; style-src 'nonce-{nonce}'; "
        "connect-src 'self'; img-src data:; base-uri 'none'; form-action 'none'; "
        "frame-ancestors 'none'",
    ),
    ("X-Frame-Options", "DENY"),
    ("X-Content-Type-Options", "nosniff"),
    ("Referrer-Policy", "no-referrer"),
    ("Cache-Control", "no-store"),
    ("Vary", "Accept"),
)


def page_for(status: Json, facts: Mapping[str, str], nonce: str, has_keys: bool) -> str:
    """Return the page with the facts for a reader without JavaScript; every text is escaped."""
    values = {
        "nonce": nonce,
        "server": f"version {__version__}",
        "mood": "" if status["status"] == "ok" else "wrong",
        "verdict": status["verdict"],
        "problem": "" if has_keys else html.escape(status["problem"]),
        "no_key": "" if has_keys else "hidden",
        "facts": "".join(
            f"<div{' class=unscripted' if name in ('Base URL', 'API key') else ''}>"
            f"<dt>{name}</dt><dd>{html.escape(text)}</dd></div>"
            for name, text in facts.items()
        ),
    }
    # In one go: what looks like a name in braces in a text is not filled in again.
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), PAGE)


class DeviceLogin:
    """The log-in that the page starts: device authorization in a thread.

    state: its phase (none, starting, waiting, done, failed), and what belongs to that.
    """

    def __init__(self, stopped: threading.Event):
        self._stopped, self._lock = stopped, threading.Lock()
        self.state: Json = {"phase": "none"}

    def start(self, credentials: OAuthCredentials) -> Json:
        """Start a log-in, unless one is running; returns its state."""
        with self._lock:
            if self.state["phase"] in ("starting", "waiting"):
                return self.state
            self.state = state = {"phase": "starting"}
            threading.Thread(target=self._run, args=(credentials,), daemon=True).start()
            return state

    def _run(self, credentials: OAuthCredentials) -> None:
        try:
            credentials.authorize(self._show, self._sleep)
            self.state = {"phase": "done", "message": public(f"{credentials.path} holds the login")}
        except Exception as error:
            # What is no ProxyError has no message.
            self.state = {
                "phase": "failed",
                "message": public(getattr(error, "message", "") or reason_of(error)),
            }

    def _show(self, device: DeviceAuthorization) -> None:
        self.state = {
            "phase": "waiting",
            "address": device.verification_uri,
            "code": device.user_code,
            "expires_at": int(time.time() + device.expires_in),
        }

    def _sleep(self, seconds: float) -> None:
        if self._stopped.wait(seconds):
            raise ShuttingDown


# ------------------------------------------------------------------------------------------------
# Server
# ------------------------------------------------------------------------------------------------


class StrictDecoder(json.JSONDecoder):
    """Decodes a client's JSON: no constants that JSON lacks, no endless numbers."""

    # Of one number: CPython before 3.11 takes quadratic time for more.
    MAX_DIGITS = 1000

    def __init__(self) -> None:
        super().__init__(parse_constant=self._constant, parse_int=self._int)

    @staticmethod
    def _constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    @classmethod
    def _int(cls, digits: str) -> int:
        if len(digits) > cls.MAX_DIGITS:
            raise ValueError("a number has too many digits")
        return int(digits)


# Made once: to make one takes as long as to decode a small body.
STRICT_DECODER = StrictDecoder()


def parse_json(body: bytes) -> Any:
    """Return the JSON in a client's body; raises BadRequest that says what is wrong with it."""
    try:
        return STRICT_DECODER.decode(body.decode("utf-8-sig"))
    except UnicodeDecodeError:
        message = "the body is not UTF-8"
    except RecursionError:
        message = "the body is nested too deeply"
    except ValueError as error:
        message = f"the body is not valid JSON: {error}"
    raise BadRequest(message, code="invalid_json")


@functools.lru_cache(maxsize=256)
def is_loopback(name: str) -> bool:
    """Return whether a host name or address can only mean this machine."""
    with contextlib.suppress(ValueError):
        return ipaddress.ip_address(name).is_loopback
    return name == "localhost" or name.endswith(".localhost")


def checked_keys(keys: Iterable[str], source: str = "--api-key") -> tuple[str, ...]:
    """Return the keys that clients may present, without blanks around them.

    An empty key is mostly a variable that was not set: to serve without a key then would open the
    door. Raises ValueError for one that is no key.
    """
    checked = []
    for stated in keys:
        key = stated.strip() if isinstance(stated, str) else ""
        fault = key_fault(key, source)
        if len(key) < 2 or not key.isprintable():
            fault = (
                f"{source}: a key must have at least 2 characters, none of them a control "
                "character; is the variable that should hold it set?"
            )
        if fault:
            raise ValueError(fault)
        SECRETS.add(key)
        checked.append(key)
    return tuple(checked)


def host_name(stated: str) -> str:
    """Return the host in a name, an address or a URL, as a Host header is compared with it.

    Raises ValueError for what names none.

    >>> host_name("https://Box.:8443/v1"), host_name("[::1]:80"), host_name("::1")
    ('box', '::1', '::1')
    """
    text = stated.strip()
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(text.strip("[]")))
    name = host_of(text if "://" in text else f"//{text}").rstrip(".")
    if not re.match(r"[\w.-]+\Z|[0-9a-f:.]+\Z", name, re.A):
        raise ValueError(f"--allow-host takes the name of one host, not {stated!r}")
    return name


def listening_host(stated: str) -> str:
    """Return an address or name to listen on, without brackets; raises ValueError."""
    host = stated.strip().strip("[]")
    with contextlib.suppress(ValueError):
        return str(ipaddress.ip_address(host)) if "%" not in host else host
    if re.search(r"[\s:/*]", host):
        raise ValueError(f"--host takes an address or a name, without a port, not {stated!r}")
    return host


class AccessPolicy:
    """Who may use the server: which keys there are, whether one is needed, who may pass.

    The constructor raises ValueError for options that would leave the door open, and warns of what
    a person may not have meant. A page on the web reaches a server on loopback by DNS rebinding
    (stopped by Host) or by a plain cross-site request (stopped by Origin and Sec-Fetch-Site).
    Ollama's CVE-2024-28224 was the first.
    """

    LOCAL_ORIGINS = re.compile(
        r"(https?://(localhost|127\.\d+\.\d+\.\d+|\[::1\]|tauri\.localhost)(:\d+)?"
        r"|(app|tauri|vscode-webview|vscode-file)://.*)\Z",
        re.I,
    )
    EXPOSED = "x-request-id, retry-after, retry-after-ms, x-qwen-provider"
    _HOST = re.compile(r"(?:\[([0-9a-f:.]+)\]|([^:\[\]/\s@]*))(?::\d*)?\Z")

    def __init__(self, options: Options):
        self._hosts = {
            "host.docker.internal",
            socket.gethostname().lower(),
            options.host.lower(),
            *options.allow_host,
        }
        self._origins = {
            re.sub(r"(?<![/:])/\Z", "", origin).lower() for origin in options.allow_origin
        }
        self._keys = [key.encode() for key in options.api_key]
        # An address cannot be rebound; where the server is open to a network it is reached by one.
        # A name may lead anywhere.
        self._any_address = options.host.endswith(".localhost") or not is_loopback(options.host)
        if self._any_address and not (self._keys or options.no_auth):
            raise ValueError(
                f"listening on {options.host or 'all addresses'} lets everybody on the network "
                "spend your quota: say --no-auth, or give a key, here a fresh one: python3 "
                f"qwen_proxy.py --host {options.host or '0.0.0.0'} --port {options.port} "
                f"--api-key {secrets.token_hex(16)}"
            )
        if "null" in self._origins:
            log.warning(
                "--allow-origin null lets every web page use this server: a sandboxed frame has "
                "that origin"
            )
        if "*" in self._origins and not self._keys:
            log.warning("--allow-origin * without --api-key lets every web page use this server")

    def check_host(self, headers: Mapping[str, str]) -> None:
        """Raise ProxyError unless the Host header, if there is one, names this machine.

        A page that rebinds a name does not know a key: with one, any name will do.
        """
        host = headers.get("host")
        if host is None or self._keys and self._place_of_key(headers):
            return
        match = self._HOST.match(host.strip().lower())
        name = (match.group(1) or match.group(2)).rstrip(".") if match else ""
        if is_loopback(name) or name in self._hosts:
            return
        if self._any_address:
            with contextlib.suppress(ValueError):
                ipaddress.ip_address(name)
                return
        raise ProxyError(
            f"the Host header {shorten(host, 100)!r} does not name this machine; if it should, "
            f"start with --allow-host {shorten(name, 100) or 'NAME'}"
            f"{', or send a key of --api-key' if self._keys else ''}",
            403,
            "host_not_allowed",
            "permission_error",
        )

    def check_origin(self, method: str, headers: Mapping[str, str]) -> list[tuple[str, str]]:
        """Return the CORS headers for the answer; raises ProxyError for a foreign page."""
        origin = headers.get("origin")
        if origin is None and headers.get("sec-fetch-site") == "cross-site":
            mode = headers.get("sec-fetch-mode")
            is_visit = mode == "navigate" and method == "GET"
            # Browsers send Origin in mode cors (Fetch, 'append a request Origin header'); Chatbox
            # and Cherry Studio have web security off.
            is_app = mode == "cors" and (method != "POST" or self.declares_json(headers))
            if not (is_visit or is_app):
                raise ProxyError(
                    "cross-site request without an Origin header was refused; call from a local "
                    "page, or start with --allow-origin ORIGIN and send Origin",
                    403,
                    "origin_not_allowed",
                    "permission_error",
                )
        if origin is None:
            return []
        is_allowed = (
            "*" in self._origins or origin.lower() in self._origins or self.is_own_page(headers)
        )
        if not is_allowed and not self.LOCAL_ORIGINS.match(origin):
            name = shorten(origin, 100)
            message = (
                "pages without an origin of their own (a file, a sandboxed frame) may not use this "
                "server; serve the page over http on localhost"
                if origin == "null"
                else f"pages of {name} may not use this server; if they should, start it with "
                f"--allow-origin {name}"
            )
            raise ProxyError(message, 403, "origin_not_allowed", "permission_error")
        return [
            ("Access-Control-Allow-Origin", origin),
            ("Vary", "Origin"),
            ("Access-Control-Expose-Headers", self.EXPOSED),
        ]

    @staticmethod
    def origin_of(headers: Mapping[str, str]) -> str:
        """Return the scheme and host that a request came by, that of a web server in front."""
        scheme = headers.get("x-forwarded-proto", "http").partition(",")[0].strip()
        return f"{scheme}://{headers.get('host', '')}".lower()

    def is_own_page(self, headers: Mapping[str, str]) -> bool:
        """Return whether a request comes from a page of this very server, however it is reached."""
        is_same = headers.get("sec-fetch-site", "same-origin") == "same-origin"
        return is_same and headers.get("origin", "").lower() == self.origin_of(headers)

    def check_page(self, headers: Mapping[str, str]) -> None:
        """Raise ProxyError unless a request comes from a page of this very server.

        Another page of this machine could log it in to a stranger's account and read along.
        """
        if not self.is_own_page(headers):
            raise ProxyError(
                "only the page of this server may do this; open it in a browser",
                403,
                "origin_not_allowed",
                "permission_error",
            )

    @staticmethod
    def declares_json(headers: Mapping[str, str]) -> bool:
        """Return whether a body is declared as JSON."""
        content_type = headers.get("content-type", "").partition(";")[0]
        return content_type.strip().lower() == "application/json"

    def check_key(self, headers: Mapping[str, str]) -> str:
        """Return the name of the key that is presented, '' where none is needed.

        Raises ProxyError for a wrong one.
        """
        if not self._keys:
            return ""
        place = self._place_of_key(headers)
        if not place:
            raise ProxyError(
                "this server wants an API key: one of those given with --api-key, as "
                "'Authorization: Bearer KEY'",
                401,
                "invalid_api_key",
                "authentication_error",
                headers=[("WWW-Authenticate", "Bearer")],
            )
        return f"key {place}"

    def _place_of_key(self, headers: Mapping[str, str]) -> int:
        """Return which key is presented, counted from 1; 0 for none."""
        scheme, _, bearer = headers.get("authorization", "").partition(" ")
        presented = [
            headers.get("x-api-key", ""),
            headers.get("api-key", ""),
            bearer if scheme.lower() == "bearer" else "",
        ]
        values = [value.strip(" ").encode("latin-1", "replace") for value in presented]
        # All of them, in constant time.
        matches = [
            any([secrets.compare_digest(key, value) for value in values])  # noqa: C419
            for key in self._keys
        ]
        return matches.index(True) + 1 if any(matches) else 0


class ClientReader(io.RawIOBase):
    """Bytes from a client, none after the deadline: a byte a second must not occupy a thread.

    Where a rate is set, bytes that come move the deadline.
    """

    def __init__(self, connection: socket.socket):
        super().__init__()
        self._connection, self.deadline, self.rate = connection, 0.0, 0
        # One for all waits: making it takes longer than they do, mostly.
        self._selector = selector_of(connection, selectors.EVENT_READ)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        """Return bytes as soon as there are some; raises BadRequest (408) at the deadline."""
        while True:
            remaining = self.deadline - time.monotonic()
            if remaining <= 0 or not self._selector.select(remaining):
                raise BadRequest("the request did not arrive in time", 408)
            with contextlib.suppress(BlockingIOError):
                received = self._connection.recv_into(buffer)
                self.deadline += received / self.rate if self.rate else 0
                return received


class Exchange:
    """One request of a client, from its head to its log line.

    What came: method, path, headers, key; when: started, began (the first byte of the answer),
    ended; where it went: model (as asked for), target, outcomes (of every target that was asked);
    what was answered: status, tokens (by target), error, notes. The log line, the ledger and the
    page are made from it. It knows the framing of both directions (RFC 9112).
    """

    # A client's connection between requests, and one too many before its first; from the first byte
    # of a request to the end of its headers; for the body, and one second more for so many bytes of
    # it that have come.
    IDLE_TIMEOUT, SURPLUS_TIMEOUT, HEADER_TIMEOUT = 75.0, 5.0, 20.0
    BODY_TIMEOUT, BODY_RATE = 60.0, 65_536
    # A client that takes nothing for this long has left.
    WRITE_TIMEOUT = 60.0
    MAX_HEADERS, MAX_HEAD = 100, 262_144
    # The body of a refused request is read and dropped up to this, if it comes within a second, so
    # that the connection can be used again.
    SMALL_BODY, DROP_TIMEOUT = 65_536, 1.0
    # nginx would hold a stream back, and others compress it: each would send it in one piece.
    STREAM_HEADERS = (
        ("Content-Type", "text/event-stream; charset=utf-8"),
        ("Cache-Control", "no-cache, no-transform"),
        ("X-Accel-Buffering", "no"),
    )
    # Headers that may occur once.
    SINGLE = frozenset(
        "content-length transfer-encoding host authorization origin content-type "
        "content-encoding".split()
    )
    _REQUEST_LINE = re.compile(rb"([A-Z]{1,16}) ([\x21-\x7e]+) HTTP/(\d\.\d)\r\n\Z")
    _HEADER = re.compile(rb"([!#$%&'*+.^_`|~0-9A-Za-z-]+):([^\x00-\x08\x0a-\x1f\x7f]*)\r\n\Z")
    _CHUNK_SIZE = re.compile(rb"([0-9A-Fa-f]{1,15})([ \t]*;[\t\x20-\x7e]*|)\r\n\Z")
    _ABSOLUTE = re.compile(r"https?://([^/?#@]+)(/.*|)\Z", re.I)
    # Base URLs that end in a slash get another one: Jan asks for //models.
    _BASE = re.compile(r"\A/+(v1(/+|\Z))?")
    # The id of a model may hold slashes.
    _WITH_ID = re.compile(r"/models/(.+)|/responses/([^/]+)(?:/input_items)?")

    def __init__(self, connection: socket.socket, rfile: Any, max_body: int):
        self.connection, self._rfile, self._reader = connection, rfile, rfile.raw
        self._max_body = max_body
        self.method = self.path = self._query = self.key = self.model = ""
        # The path as ENDPOINTS has it, and the id in it.
        self.route = self.id = ""
        self.headers: dict[str, str] = {}
        self.started = self.ended = time.monotonic()
        self.began: float | None = None
        self.closes = True
        self.is_busy = self.is_on_loop = self._is_http_1_0 = self.is_unread = False
        # status: none until the head of the answer is sent.
        self._length = self.status = 0
        # No secret, and os.urandom is a system call.
        self._request_id = f"req_{random.getrandbits(96):024x}"
        self.cors: list[tuple[str, str]] = []
        self.writer: Any = None
        # There while the upstream is asked.
        self.waiter: Waiter | None = None
        # What the client did not take yet.
        self.unsent: Any = b""
        self.target: Target | None = None
        self.outcomes: dict[Target | None, int] = {}
        self.tokens: dict[Target | None, tuple[int, ...]] = {}
        self.error: ProxyError | None = None
        self.notes: list[str] = []

    # -- the request -----------------------------------------------------------------------------

    def read_head(self, is_surplus: bool = False) -> bool:
        """Read request line and headers; returns False when the client has closed instead.

        Raises BadRequest for what RFC 9112 calls malformed, OSError.
        """
        idle = self.SURPLUS_TIMEOUT if is_surplus else self.IDLE_TIMEOUT
        self._reader.rate, self._reader.deadline = 0, time.monotonic() + idle
        if not self._rfile.peek(1):
            return False
        self.is_busy, self.started = True, time.monotonic()
        self._reader.deadline = self.started + self.HEADER_TIMEOUT
        line = self._rfile.readline(MAX_LINE + 1)
        line = self._rfile.readline(MAX_LINE + 1) if line == b"\r\n" else line
        match = self._REQUEST_LINE.match(line)
        if len(line) > MAX_LINE:
            raise BadRequest("the request line is too long", 414)
        if line.startswith(b"\x16\x03"):
            raise BadRequest("TLS on a plain port: the base URL begins with http://, not https://")
        if not match:
            raise BadRequest("the request line is malformed")
        self.method, target, version = map(bytes.decode, match.groups())
        self.path, _, self._query = target.partition("?")
        if version not in ("1.0", "1.1"):
            raise BadRequest("unsupported HTTP version; use HTTP/1.1", 505)
        self._is_http_1_0 = version == "1.0"
        self._read_headers(self.headers, self.MAX_HEAD)
        self._check_framing()
        if not (self._is_http_1_0 or "host" in self.headers):
            raise BadRequest("the Host header is missing")
        absolute = self._ABSOLUTE.match(self.path)
        if absolute:
            # RFC 9112 3.2.2: such a target counts, whatever Host says.
            self.headers["host"], rest = absolute.groups()
            self.path = "/" + rest.lstrip("/")
        # RFC 9112 3.2.4: OPTIONS * asks about the server as a whole.
        if not self.path.startswith(("/", "*")):
            raise BadRequest("the request target must be a path, such as /v1/chat/completions")
        self._find_route()
        self.closes = self._is_http_1_0 or "close" in self.headers.get("connection", "").lower()
        return True

    def _read_headers(self, headers: dict[str, str], limit: int) -> None:
        size = 0
        for _ in range(self.MAX_HEADERS + 1):
            line = self._rfile.readline(MAX_LINE + 1)
            size += len(line)
            if size > limit:
                raise BadRequest("the headers are too long", 431)
            if line == b"\r\n":
                return
            match = self._HEADER.match(line)
            if not match and len(line) > MAX_LINE:
                raise BadRequest("a header line is too long", 431)
            if not match:
                # obs-fold, NUL, bare CR or LF, a space before the colon.
                raise BadRequest("a header line is malformed")
            name, value = match.groups()
            name, value = name.decode().lower(), value.decode("latin-1").strip(" \t")
            if name in headers and name in self.SINGLE:
                raise BadRequest(f"the header {name} occurs twice")
            headers[name] = f"{headers[name]}, {value}" if name in headers else value
        raise BadRequest(f"there are more than {self.MAX_HEADERS} headers", 431)

    def _check_framing(self) -> None:
        """Check the framing (RFC 9112 6.3): one length, in digits, without Transfer-Encoding."""
        length, coding = self.headers.get("content-length"), self.headers.get("transfer-encoding")
        if coding is not None:
            if length is not None or self._is_http_1_0:
                raise BadRequest("Transfer-Encoding beside Content-Length, or in HTTP/1.0")
            if coding.lower() != "chunked":
                raise BadRequest(
                    f"the transfer coding {shorten(coding, 40)!r} is not supported; use chunked"
                )
            self.is_unread = True
        elif length is not None:
            if not re.match(r"[0-9]{1,18}\Z", length):
                raise BadRequest("Content-Length must be digits")
            self._length = int(length)
            self.is_unread = self._length > 0

    def _find_route(self) -> None:
        """Take /v1 off the path, what clients get wrong in a base URL, and the id."""
        self.route = self._BASE.sub("/", self.path).rstrip("/") or "/"
        match = self._WITH_ID.fullmatch(self.route)
        if match:
            start, end = match.span(match.lastindex or 0)
            self.id = urllib.parse.unquote(self.route[start:end])
            self.route = f"{self.route[:start]}{{id}}{self.route[end:]}"

    def query(self, name: str) -> str:
        """Return a parameter of the query; empty for one that is not there."""
        return dict(urllib.parse.parse_qsl(self._query)).get(name, "")

    def read_json(self) -> Any:
        """Return the JSON of the body; raises BadRequest."""
        packed = self._read_body(self._max_body, self.BODY_TIMEOUT, self.BODY_RATE)
        body = self._decoded(packed)
        # 64 MiB of empty lists would become 1.3 GiB.
        if size_of_json(body) > max(8 * self._max_body, 64 << 20):
            raise BadRequest("the body holds too many values", 413, "request_too_large")
        return parse_json(body)

    def _read_body(self, limit: int, seconds: float, rate: int) -> bytes:
        if self._length > limit:
            raise self._too_large()
        self._reader.rate, self._reader.deadline = rate, time.monotonic() + seconds
        if self.headers.get("expect", "").lower() == "100-continue" and self.is_unread:
            self._write(b"HTTP/1.1 100 Continue\r\n\r\n")
        # Where a broken body ends, and the next request begins, is not known (RFC 9112 9.2).
        closes, self.closes = self.closes, True
        if "transfer-encoding" in self.headers:
            body = self._read_chunked(limit)
        else:
            body = self._rfile.read(self._length)
            if len(body) < self._length:
                raise BadRequest(f"the body ended after {len(body)} of {self._length} bytes")
        self.is_unread, self.closes = False, closes
        return body

    def _read_chunked(self, limit: int) -> bytes:
        """Return a chunked body (RFC 9112 7.1) without its extensions and trailers."""
        body, spare = bytearray(), MAX_LINE
        while spare > 0:
            line = self._rfile.readline(spare)
            match = self._CHUNK_SIZE.match(line)
            if not match:
                raise BadRequest("a chunk size is malformed")
            size, spare = int(match.group(1), 16), spare - len(match.group(2))
            if not size:
                # The trailers are dropped.
                self._read_headers({}, spare)
                return bytes(body)
            if len(body) + size > limit:
                raise self._too_large()
            piece = self._rfile.read(size)
            if len(piece) < size or self._rfile.readline(3) != b"\r\n":
                raise BadRequest("a chunk is malformed")
            body += piece
        raise BadRequest("the chunk extensions are too long")

    def _decoded(self, body: bytes) -> bytes:
        coding = self.headers.get("content-encoding", "identity").lower()
        if coding in ("identity", ""):
            return body
        if coding not in ("gzip", "x-gzip", "deflate"):
            raise BadRequest(
                f"the content coding {shorten(coding, 40)!r} is not supported; send it plain or as "
                "gzip",
                415,
            )
        try:
            decoder = zlib.decompressobj(zlib.MAX_WBITS | 32)
            decoded = decoder.decompress(body, self._max_body + 1)
        except zlib.error:
            raise BadRequest(f"the body is not valid {coding}") from None
        if len(decoded) > self._max_body:
            raise self._too_large()
        if not decoder.eof:
            raise BadRequest(f"the {coding} body is cut off")
        return decoded

    def _too_large(self) -> BadRequest:
        message = f"the body is larger than {self._max_body >> 20} MiB; --max-body allows more"
        return BadRequest(message, 413, "request_too_large")

    def _drop_body(self) -> None:
        """Read a small body, so that the connection can be used again."""
        if "expect" not in self.headers and not self.closes:
            with contextlib.suppress(BadRequest, OSError):
                self._read_body(self.SMALL_BODY, self.DROP_TIMEOUT, 0)
        self.closes = self.closes or self.is_unread

    def linger(self) -> None:
        """Take in some of a refused body: closing on unread bytes resets the answer away."""
        with contextlib.suppress(BadRequest, OSError):
            self.connection.shutdown(socket.SHUT_WR)
            self._reader.rate, self._reader.deadline = 0, time.monotonic() + 2
            while self._rfile.read1(PIECE):
                pass

    # -- the answer ------------------------------------------------------------------------------

    def begin(self, answer: Answer) -> None:
        """Note who answers, and when."""
        self.target, self.began = answer.target, time.monotonic()
        self._adopt_request_id(answer.response.headers.get("x-request-id"))
        if self.writer.is_stream:
            self.writer.start()

    def send(self, status: int, headers: Iterable[tuple[str, str]], body: bytes | None) -> None:
        """Write the head and, where it is known, the body; None starts a chunked body."""
        lines = [f"HTTP/1.1 {status} {http.client.responses.get(status, 'Status')}"]
        lines += [f"{name}: {value}" for name, value in (*headers, *self.cors)]
        if self.target and not self.error:
            lines.append(f"x-qwen-provider: {self.target.provider.name}")
        lines += [f"Date: {self._http_date(int(time.time()))}", f"X-Request-Id: {self._request_id}"]
        if self.is_unread and body is not None:
            self._drop_body()
        if body is not None:
            lines += [f"Content-Length: {len(body)}"] if status != 204 else []
        elif not self._is_http_1_0:
            lines.append("Transfer-Encoding: chunked")
        if self.closes:
            lines.append("Connection: close")
        self.status = status
        # One line each, whatever a header's value holds, and nothing secret in them.
        lines = lines if "".join(lines).isprintable() else [*map(public, lines)]
        head = (SECRETS.mask("\r\n".join(lines)) + "\r\n\r\n").encode("latin-1", "replace")
        if body is None:
            # The first events go out with it, as one write.
            self.unsent = head
        else:
            self._write(head if self.method == "HEAD" else head + body)

    def send_json(self, status: int, value: Any, headers: Iterable[tuple[str, str]] = ()) -> None:
        """Send a JSON value."""
        self.send(status, [("Content-Type", "application/json"), *headers], encode_json(value))

    def write_events(self, events: list[bytes], is_last: bool = False) -> None:
        """Send whole events of a stream, each a chunk of the body, as one write.

        The head goes out with the first ones. Behind the last ones the body ends as it should, so
        that the connection can be used again.
        """
        if not self.status:
            self.send(200, self.STREAM_HEADERS, None)
        if not self._is_http_1_0:
            events = [b"%x\r\n%s\r\n" % (len(event), event) for event in events]
            events += [b"0\r\n\r\n"] if is_last else []
        self._write(b"".join(events))
        if self.waiter:
            self.waiter.last_sign = time.monotonic()

    def tally(self, calls: list[Call]) -> None:
        """Close the calls and note what they came to, however they ended."""
        self.target = self.target or calls[0].target
        for call in calls:
            self.notes += call.notes
            self.outcomes.update(call.moved)
            for answer in call.answers:
                self.outcomes.setdefault(answer.target, 200)
                if answer.decoder.usage:
                    before = self.tokens.get(answer.target, (0, 0, 0, 0))
                    used = tokens_of(answer.decoder.usage)
                    self.tokens[answer.target] = tuple(map(operator.add, before, used))
            call.close()

    def fail(self, error: BaseException) -> None:
        """Tell the client of a failure, if it is still there; raises OSError.

        That is an HTTP status while that is possible, else the last event of the stream.
        """
        self.closes = self.closes or not isinstance(error, ProxyError)
        if isinstance(error, ShuttingDown):
            error = ProxyError(
                "the server is stopping; try again in a moment",
                503,
                "shutting_down",
                "server_error",
                headers=[("Retry-After", "2")],
            )
        elif isinstance(error, (ClientGone, OSError)) or not self.is_busy:
            self.status = 499
            when = "while it waited for the first byte" if self.target else "before it was served"
            if self.began is not None:
                when = f"{time.monotonic() - self.began:.1f} s after the first byte"
            self.notes.append(f"the client left {when}")
            return
        elif not isinstance(error, ProxyError):
            error = fault_of_ours(error)
        self.error = error
        self._adopt_request_id(error.request_id)
        if not self.status:
            self.send_json(error.status, error.body(), error.headers)
        else:
            self.status = error.status
            self.writer.error(error)

    def log_line(self) -> str:
        """Return the line for the log."""
        target, attempt = self.target, self.headers.get("x-stainless-retry-count", "0")
        words = [
            self.method or "?",
            shorten(self.path, 100) or "?",
            str(self.status),
            f"{shorten(target.model, 100)} via {target.provider.name}" if target else "",
            f"{self.ended - self.started:.2f}s",
            "" if self.began is None else f"first {self.began - self.started:.2f}s",
            self._tokens_text() if self.tokens else "",
            self.client,
            f"(the client's attempt {attempt[:4]})" if attempt != "0" else "",
        ]
        remarks = shorten(self._remarks(), 300)
        return " ".join(filter(None, words)) + (f": {remarks}" if remarks else "")

    def _remarks(self) -> str:
        faults = [self.error.message] if self.error else []
        return "; ".join(dict.fromkeys([*faults, *self.notes]))

    def facts(self) -> Json:
        """Return what the page shows of the exchange; nothing that client or model said."""
        seconds = time.monotonic() - self.started
        return {
            "id": self._request_id,
            "started_at": round(time.time() - seconds, 1),
            "client": self.client,
            "model": public(self.target.model if self.target else self.model)[:100],
            "status": self.status,
            "first": self.began and round(self.began - self.started, 3),
            "seconds": round(seconds, 3),
            "output_tokens": sum(tokens[2] for tokens in list(self.tokens.values())),
            "remarks": public(self._remarks())[:200],
        }

    def _tokens_text(self) -> str:
        given, cached, made, thoughts = map(sum, zip(*self.tokens.values()))
        parts = [(cached, "cached"), (thoughts, "thoughts")]
        details = ", ".join(f"{count} {name}" for count, name in parts if count)
        seconds = self.ended - (self.began or self.started)
        # An answer that came at once has no speed.
        speed = f" {made / seconds:.0f}/s" if made and seconds > 0.05 else ""
        return f"{given}+{made} tokens{f' ({details})' if details else ''}{speed}"

    @property
    def client(self) -> str:
        """The client's program, and which key it has."""
        product = product_of(self.headers.get("user-agent", ""))
        return f"{product} ({self.key})" if self.key else product

    def counted_route(self) -> str:
        """Return the route that the request counts for; 'other' for an unknown one."""
        is_known = self.method in ENDPOINTS.get(self.route, {})
        return f"{self.method} {self.route}" if is_known else "other"

    def count(self, ledger: Ledger, route: str) -> None:
        """Count the request: once for each provider that was asked."""
        first = None if self.began is None else self.began - self.started
        for target, outcome in {**self.outcomes, self.target: self.status}.items():
            names = (target.provider.name, target.model) if target else ("", "")
            tokens = self.tokens.get(target, (0, 0, 0, 0))
            spans = (first, self.ended - self.started) if target is self.target else (None, None)
            ledger.add(route, (*names, self.client), outcome, tokens, spans)

    def user_agent(self) -> str:
        """Return the client's own name, then ours.

        The Coding Plan refuses requests without one, and we pose as no other program.
        """
        client = self.headers.get("user-agent", "")
        client = client if client.isascii() and client.isprintable() else ""
        return f"{client[:200]} qwen_proxy/{__version__}".strip()

    @staticmethod
    @functools.lru_cache(maxsize=1)
    def _http_date(second: int) -> str:
        """Return a time as the header Date has it; made once for all answers of a second."""
        return formatdate(second, usegmt=True)

    def _adopt_request_id(self, request_id: str | None) -> None:
        """Answer with the upstream's own handle, if it fits into a header."""
        if request_id and re.match(r"[\x21-\x7e]{1,200}\Z", request_id):
            self._request_id = request_id

    def _write(self, data: bytes) -> None:
        """Send all of the data; while the loop moves the stream, what the client takes at once."""
        data = bytes(self.unsent) + data if self.unsent else data
        self.unsent = send_some(self.connection, data)
        while self.unsent and not self.is_on_loop:
            if not selector_of(self.connection, selectors.EVENT_WRITE).select(self.WRITE_TIMEOUT):
                raise socket.timeout("timed out")
            self.unsent = send_some(self.connection, self.unsent)


def fault_of_ours(error: BaseException) -> ProxyError:
    """Log a fault of this program, and return the error for the client."""
    name, text = type(error).__name__, shorten(str(error), 200)
    lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__)]
    log.error("%s in line %s: %s; please report this", name, lines[-1] if lines else 0, text)
    trace = "".join(traceback.format_exception(type(error), error, error.__traceback__))
    for line in trace.splitlines():
        log.debug("%s", line)
    return ProxyError(f"an internal error of qwen_proxy ({name}); its log says where")


class Stream:
    """An answer on its way to the client, from its first chunk to its last."""

    def __init__(self, answer: Answer, exchange: Exchange):
        self.answer, self.exchange, self.waiter = answer, exchange, answer.waiter
        # The socket that is waited for: the upstream's, or the client's while that is behind.
        self.awaited: socket.socket | None = None
        self.error: Exception | None = None
        self.is_over = threading.Event()
        self.moved = time.monotonic()

    def move(self) -> None:
        """Push what has arrived through; nothing more while the client does not keep up."""
        self.moved, exchange = time.monotonic(), self.exchange
        if exchange.unsent:
            exchange.unsent = send_some(exchange.connection, exchange.unsent)
        if not exchange.unsent:
            self.answer.pump()
            exchange.writer.flush()

    def look(self) -> None:
        """Look at what the clock decides; raises what a Waiter raises, OSError."""
        silence = time.monotonic() - self.moved
        if self.exchange.unsent and silence > self.exchange.WRITE_TIMEOUT:
            raise socket.timeout("timed out")
        if not self.exchange.unsent and silence > self.waiter.timeout:
            raise self.waiter.silence()
        self.waiter.look()


class StreamLoop:
    """Moves the pieces of all answers in one thread, while their connections' threads sleep.

    An answer is little work and much waiting: with a thread that is woken for each piece, 1000
    streams of 10 pieces a second fill a processor, and new clients wait seconds for their first
    byte. What the clock decides is looked at here for all of them at once.
    """

    # At least so long from one turn to the next: pieces that are moved together cost less.
    TURN = 0.002

    def __init__(self) -> None:
        self._selector = selectors.DefaultSelector()
        self._streams: set[Stream] = set()
        # New ones, and those that need not wait.
        self._ready: collections.deque[Stream] = collections.deque()
        self._next_turn, self._next_look, self._is_closed = 0.0, 0.0, False
        self._woken, self._waker = socket.socketpair()
        self._woken.setblocking(False)
        self._waker.setblocking(False)
        self._selector.register(self._woken, selectors.EVENT_READ)
        threading.Thread(target=self._run, daemon=True).start()

    def carry(self, stream: Stream) -> None:
        """Return when a stream is over, or too heavy for the loop; raises what ended it."""
        stream.exchange.is_on_loop = True
        self._ready.append(stream)
        self._wake()
        if self._is_closed:
            # The loop may have looked at the new ones for the last time already.
            stream.error = stream.error or ShuttingDown()
            stream.is_over.set()
        stream.is_over.wait()
        stream.exchange.is_on_loop = False
        if stream.error:
            try:
                raise stream.error
            finally:
                # It leads back to the stream, which would wait for the garbage collector.
                stream.error = None

    def close(self) -> None:
        """End the loop, and with ShuttingDown the streams that it still has."""
        self._is_closed = True
        self._wake()

    def _wake(self) -> None:
        # A full socket wakes the loop as well; a closed one says that it has ended.
        with contextlib.suppress(OSError):
            self._waker.send(b"!")

    def _run(self) -> None:
        share_one_processor()
        while not self._is_closed:
            try:
                self._turn()
            except Exception as error:
                # The loop must not end: all later streams would wait for it.
                self._end_all(fault_of_ours(error))
        self._end_all(ShuttingDown())
        for each in (self._selector, self._woken, self._waker):
            each.close()

    def _turn(self) -> None:
        pause: float | None = 0.0
        if not self._ready:
            time.sleep(max(0.0, self._next_turn - time.monotonic()))
            pause = self._next_look - time.monotonic() if self._streams else None
        arrived = self._selector.select(pause)
        self._next_turn = time.monotonic() + self.TURN
        due = {key.data for key, _ in arrived}
        while self._ready:
            due.add(self._ready.popleft())
        if None in due:
            self._woken.recv(PIECE)
        for stream in due - {None}:
            self._advance(stream, stream.move)
        if time.monotonic() >= self._next_look:
            self._next_look = time.monotonic() + Waiter.LOOK
            for stream in list(self._streams):
                self._advance(stream, stream.look)

    def _advance(self, stream: Stream, step: Callable[[], None]) -> None:
        """Take a step of a stream, if it is not over; what fails ends it."""
        if stream.is_over.is_set():
            return
        try:
            step()
            if stream.answer.is_over or stream.answer.is_heavy:
                self._end(stream)
                return
            self._await(stream)
            if stream.answer.response.may_have_more and not stream.exchange.unsent:
                self._ready.append(stream)
        except Exception as error:
            self._end(stream, error)

    def _await(self, stream: Stream) -> None:
        """Wait for the slower side of a stream."""
        awaited, event = stream.answer.response.source, selectors.EVENT_READ
        if stream.exchange.unsent:
            awaited, event = stream.exchange.connection, selectors.EVENT_WRITE
        if awaited is stream.awaited:
            return
        self._streams.add(stream)
        before, stream.awaited = stream.awaited, None
        if before:
            self._selector.unregister(before)
        self._selector.register(awaited, event, stream)
        stream.awaited, stream.moved = awaited, time.monotonic()

    def _end(self, stream: Stream, error: Exception | None = None) -> None:
        self._streams.discard(stream)
        if stream.awaited:
            self._selector.unregister(stream.awaited)
        stream.awaited, stream.error = None, error
        stream.is_over.set()

    def _end_all(self, error: Exception) -> None:
        for stream in {*self._streams, *self._ready}:
            self._end(stream, error)


def open_all(calls: list[Call], targets: list[Target]) -> list[Answer]:
    """Open all calls, a few of them at a time; when one fails, the others end."""
    if len(calls) == 1:
        return [calls[0].open(targets)]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        futures = [pool.submit(call.open, targets) for call in calls]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except Exception:
            for future in futures:
                future.cancel()
            calls[0].waiter.is_stopping = True
            raise
        return [future.result() for future in futures]


def relay(answer: Answer, exchange: Exchange, loop: StreamLoop) -> None:
    """Push an answer through to the client, piece by piece as it comes.

    With --log-level debug the log shows the whole, but for embeddings.
    """
    is_shown = log.isEnabledFor(logging.DEBUG) and isinstance(answer.decoder, ChatDecoder)
    feed, collector = exchange.writer.feed, CompletionCollector()

    def feed_both(chunk: Json, raw: bytes | None) -> None:
        collector.feed(chunk)
        feed(chunk, raw)

    try:
        answer.deliver(feed_both if is_shown else feed)
    finally:
        # An error behind the first chunks comes behind them in the stream, too.
        exchange.writer.flush()
    while not answer.is_over:
        if answer.is_heavy:
            # In its own thread, since it would hold up the other streams.
            answer.response.wait()
            answer.pump()
            exchange.writer.flush()
        else:
            loop.carry(Stream(answer, exchange))
    if is_shown:
        log.debug("answer: %s", excerpt(collector.completion(answer.decoder.usage)))


# Path (without /v1), method: the class of an API, or the method of Handler.
ENDPOINTS: dict[str, dict[str, type[ChatApi] | str]] = {
    "/chat/completions": {"POST": ChatRouteApi},
    "/completions": {"POST": TextApi},
    "/embeddings": {"POST": EmbeddingsApi},
    "/responses": {"POST": ResponsesApi},
    "/responses/{id}": {"GET": "get_response", "DELETE": "delete_response"},
    "/responses/{id}/input_items": {"GET": "get_input_items"},
    "/models": {"GET": "get_models"},
    "/models/{id}": {"GET": "get_model"},
    "/usage": {"GET": "get_usage"},
    "/metrics": {"GET": "get_metrics"},
    "/status": {"GET": "get_status"},
    "/login": {"POST": "post_login"},
    "/health": {"GET": "get_health"},
    "/favicon.ico": {"GET": "get_icon"},
    "/": {"GET": "get_root"},
}


class Handler(http.server.BaseHTTPRequestHandler):
    """One connection of a client; http.server's loop over requests, with stricter parsing."""

    disable_nagle_algorithm = True
    server: Listener
    WITHOUT_KEY = ("/health", "/favicon.ico", "/")
    # The page's own are not for clients.
    UNLISTED = (*WITHOUT_KEY, "/status", "/login")

    def setup(self) -> None:
        """Read by deadline, not by socketserver's time per read."""
        super().setup()
        self.rfile.close()
        self.connection.setblocking(False)
        self.rfile = io.BufferedReader(ClientReader(self.connection), 8192)
        self.proxy = self.server.proxy
        self._is_surplus = len(self.proxy.exchanges) >= self.proxy.options.max_connections
        share_one_processor()

    def handle_one_request(self) -> None:
        """Read one request and answer it: the only boundary for exceptions.

        http.server calls it as long as the connection is kept.
        """
        exchange = Exchange(self.connection, self.rfile, self.proxy.options.max_body << 20)
        self.proxy.exchanges.add(exchange)
        try:
            if exchange.read_head(self._is_surplus):
                if log.isEnabledFor(logging.DEBUG):
                    log.debug("%s %s from %s", exchange.method, exchange.path, exchange.client)
                self.serve(exchange)
        except Exception as error:
            try:
                exchange.fail(error)
            except OSError:
                exchange.closes = True
        finally:
            if exchange.is_busy:
                self.proxy.note(exchange)
            # They lead back to the exchange, which would wait for the garbage collector.
            exchange.is_busy, exchange.writer, exchange.waiter = False, None, None
            self.close_connection = exchange.closes or self.proxy.is_stopping
            if exchange.is_unread:
                exchange.linger()
            self.proxy.exchanges.discard(exchange)

    def serve(self, exchange: Exchange) -> None:
        """Answer one request; every request takes this way."""
        self.check_access(exchange)
        api = self.find_api(exchange)
        if api is None:
            return
        request = api.check(exchange.read_json())
        exchange.model = as_text(request.get("model"))
        targets = self.proxy.targets(request.get("model"))
        exchange.writer = api.writer(request, exchange, targets[0])
        calls = self.proxy.calls(exchange, api, request, targets)
        try:
            answers = open_all(calls, targets)
            exchange.begin(answers[0])
            for answer in answers:
                relay(answer, exchange, self.proxy.streams)
            exchange.writer.close(answers[0].decoder.usage)
            for answer in answers:
                answer.response.drain()
        finally:
            exchange.tally(calls)

    def check_access(self, exchange: Exchange) -> None:
        """Raise ProxyError for what may not pass: a Host, a web page, one connection too many."""
        access, headers = self.proxy.access, exchange.headers
        access.check_host(headers)
        exchange.cors = access.check_origin(exchange.method, headers)
        if exchange.cors and exchange.method == "POST" and not access.declares_json(headers):
            raise BadRequest(
                "a request from a web page must be declared as Content-Type: application/json", 415
            )
        if self._is_surplus:
            exchange.closes = True
            raise ProxyError(
                "too many connections; try again in a moment",
                503,
                "too_many_connections",
                "server_error",
                headers=[("Retry-After", "1")],
            )

    def find_api(self, exchange: Exchange) -> ChatApi | None:
        """Return the API for a request; None for one that is answered already.

        Raises ProxyError: 404, 405, 401.
        """
        if exchange.method == "OPTIONS":
            self.send_preflight(exchange)
            return None
        methods = ENDPOINTS.get(exchange.route)
        method = "GET" if exchange.method == "HEAD" else exchange.method
        if methods is None or method == "POST" and exchange.id and method not in methods:
            raise self._unknown_route(exchange)
        if method not in methods:
            if method == "GET" and "websocket" in exchange.headers.get("upgrade", "").lower():
                # Codex asks so for /v1/responses first. On 426 it falls back at once, on 404 only
                # after six seconds.
                raise BadRequest(
                    f"there are no WebSockets here; POST to /v1{exchange.route}",
                    426,
                    "upgrade_not_supported",
                    headers=[("Upgrade", "HTTP/1.1")],
                )
            others = ", ".join(methods)
            raise BadRequest(
                f"method {exchange.method} is not allowed on this route; use {others}",
                405,
                "method_not_allowed",
                headers=[("Allow", f"{others}, OPTIONS")],
            )
        if exchange.route not in self.WITHOUT_KEY:
            exchange.key = self.proxy.access.check_key(exchange.headers)
        endpoint = methods[method]
        if isinstance(endpoint, str):
            getattr(self, endpoint)(exchange)
            return None
        return endpoint(self.proxy.memory, exchange.key)

    def _unknown_route(self, exchange: Exchange) -> BadRequest:
        known = ", ".join(
            f"{method} /v1{route}"
            for route, methods in ENDPOINTS.items()
            for method in methods
            if route not in self.UNLISTED
        )
        path = shorten(exchange.path, 200)
        return BadRequest(
            f"unknown route {path}. Available routes: {known}, GET /health", 404, "unknown_url"
        )

    @staticmethod
    def send_preflight(exchange: Exchange) -> None:
        """Answer OPTIONS: which methods there are, and to a page all that it asks for."""
        methods = "GET, POST, DELETE, OPTIONS"
        headers = [("Allow", methods)]
        if exchange.cors:
            # Echoed: any fixed list of x-stainless-* names ages (ollama#3571).
            wanted = exchange.headers.get("access-control-request-headers", "")
            is_private = exchange.headers.get("access-control-request-private-network") == "true"
            headers = [
                ("Access-Control-Allow-Methods", methods),
                ("Access-Control-Max-Age", "600"),
                ("Vary", "Access-Control-Request-Headers, Access-Control-Request-Private-Network"),
                *([("Access-Control-Allow-Headers", wanted)] if wanted else []),
                *([("Access-Control-Allow-Private-Network", "true")] if is_private else []),
            ]
        exchange.send(204, headers, b"")

    def get_response(self, exchange: Exchange) -> None:
        """Answer GET /v1/responses/{id}."""
        if as_switch(exchange.query("stream")):
            raise BadRequest(
                "a response that is stored is not streamed here; ask without stream=true",
                param="stream",
            )
        exchange.send_json(200, self._stored(exchange)[0])

    def delete_response(self, exchange: Exchange) -> None:
        """Answer DELETE /v1/responses/{id}."""
        self._stored(exchange)
        self.proxy.memory.delete(exchange.id, exchange.key)
        exchange.send_json(200, {"id": exchange.id, "object": "response", "deleted": True})

    def get_input_items(self, exchange: Exchange) -> None:
        """Answer GET /v1/responses/{id}/input_items, a page of them, the latest first."""
        items = listed_items(self._stored(exchange)[1])
        limit, after = as_count(exchange.query("limit") or 20), exchange.query("after")
        order = exchange.query("order") or "desc"
        if limit is None or not 1 <= limit <= 100:
            raise BadRequest("limit must be between 1 and 100", param="limit")
        if order not in ("asc", "desc"):
            raise BadRequest("order must be asc or desc", param="order")
        items = items[::-1] if order == "desc" else items
        ids = [item["id"] for item in items]
        if after and after not in ids:
            raise BadRequest(f"there is no item {shorten(after, 60)!r}", param="after")
        start = ids.index(after) + 1 if after else 0
        page = items[start : start + limit]
        exchange.send_json(
            200,
            {
                "object": "list",
                "data": page,
                "first_id": page[0]["id"] if page else None,
                "last_id": page[-1]["id"] if page else None,
                "has_more": start + limit < len(items),
            },
        )

    def _stored(self, exchange: Exchange) -> tuple[Json, list[Json]]:
        found = self.proxy.memory.get(exchange.id, exchange.key)
        if found is None:
            raise BadRequest(
                f"Response with id '{shorten(exchange.id, 60)}' not found. {FORGETS}",
                404,
                "response_not_found",
            )
        return found

    def get_models(self, exchange: Exchange) -> None:
        """Answer GET /v1/models."""
        exchange.send_json(200, {"object": "list", "data": self.proxy.models()})

    def get_model(self, exchange: Exchange) -> None:
        """Answer GET /v1/models/{id}."""
        found = self.proxy.model(exchange.id)
        if found is None:
            raise BadRequest(
                f"the model {shorten(exchange.id, 100)!r} is not among those of /v1/models",
                404,
                "model_not_found",
                param="model",
            )
        exchange.send_json(200, found)

    def get_health(self, exchange: Exchange) -> None:
        """Answer GET /health: 503 while nothing can be served."""
        health = self.proxy.health()
        reason = dig(health, "last_refusal", "message") or health["status"]
        exchange.notes += [str(reason)] if health["status"] != "ok" else []
        exchange.send_json(200 if health["status"] == "ok" else 503, health)

    def get_icon(self, exchange: Exchange) -> None:
        """Answer a browser's GET /favicon.ico: there is none."""
        exchange.send(204, [], b"")

    def get_usage(self, exchange: Exchange) -> None:
        """Answer GET /usage, with ?by= and ?days= as the options of the command."""
        by = list(dict.fromkeys((exchange.query("by") or "day").split(",")))
        days = exchange.query("days") or "30"
        if not set(by) <= set(GROUPS) or not re.match(r"[1-9][0-9]{0,3}\Z", days):
            raise BadRequest(
                f"by must be some of {', '.join(GROUPS)}, with commas between; days a number from "
                "1 to 9999"
            )
        exchange.send_json(200, self.proxy.ledger.report(by, int(days)))

    def get_metrics(self, exchange: Exchange) -> None:
        """Answer GET /metrics."""
        exchange.send(
            200,
            [("Content-Type", "text/plain; version=0.0.4; charset=utf-8")],
            self.proxy.ledger.metrics(self.proxy.gauges()).encode(),
        )

    def get_root(self, exchange: Exchange) -> None:
        """Answer GET /: the page for a browser, a short text for others."""
        headers, status = exchange.headers, self.proxy.status()
        has_keys, origin = bool(self.proxy.options.api_key), AccessPolicy.origin_of(headers)
        facts = {
            "Base URL": f"{origin}/v1" if "host" in headers else self.proxy.url,
            "API key": "one of --api-key" if has_keys else "anything",
            # Who has no key yet learns no more than from /health.
            **({} if has_keys else status["facts"]),
        }
        if "text/html" in headers.get("accept", ""):
            nonce = secrets.token_urlsafe(16)
            exchange.send(
                200,
                [(name, value.replace("{nonce}", nonce)) for name, value in PAGE_HEADERS],
                page_for(status, facts, nonce, has_keys).encode(),
            )
            return
        routes = [f"/v1{route}" for route in ENDPOINTS if route not in self.UNLISTED]
        lines = [
            f"qwen_proxy {__version__}: Qwen's models as an OpenAI-compatible API.\n",
            f"State: {status['verdict']}",
            *([] if has_keys else status["problem"].splitlines()),
            *(f"{name}: {text}" for name, text in facts.items()),
            f"Routes: {', '.join(routes)}, /health\n",
        ]
        exchange.send(
            200,
            [("Content-Type", "text/plain; charset=utf-8"), ("Vary", "Accept")],
            "\n".join(lines).encode(),
        )

    def get_status(self, exchange: Exchange) -> None:
        """Answer GET /status, which the page asks for every few seconds.

        The code of a log-in is in it, so it is for this page only, or for none.
        """
        if "origin" in exchange.headers:
            self.proxy.access.check_page(exchange.headers)
        exchange.send_json(200, self.proxy.status(), [("Cache-Control", "no-store")])

    def post_login(self, exchange: Exchange) -> None:
        """Answer POST /login: start the device log-in."""
        self.proxy.access.check_page(exchange.headers)
        exchange.read_json()
        exchange.send_json(200, self.proxy.device_login.start(self.proxy.providers.own_login()))


class Listener(http.server.ThreadingHTTPServer):
    """One listening socket; each connection has its thread."""

    request_queue_size = 1024
    # On Windows it would let two programs share the port.
    allow_reuse_address = os.name != "nt"
    # Above the limit of connections, so many at a time are told why; the others are just closed.
    MAX_REJECTIONS = 8
    # Whether share_one_processor() binds threads: only where the process is ours.
    shares_processor = False

    def __init__(self, address: tuple[str, int], proxy: ProxyServer):
        self.proxy = proxy
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, Handler)

    def server_bind(self) -> None:
        """Bind to the address; :: is every address of this machine, those of IPv4 too."""
        if self.address_family == socket.AF_INET6:
            self.socket.setsockopt(
                socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, self.server_address[0] != "::"
            )
        # Not http.server's, which looks up the full name of the host: that may take seconds.
        socketserver.TCPServer.server_bind(self)

    def get_request(self) -> tuple[socket.socket, Any]:
        """Accept a connection; with no descriptor left, pause instead of trying at once again."""
        try:
            return super().get_request()
        except OSError as error:
            if error.errno in (errno.EMFILE, errno.ENFILE):
                time.sleep(0.1)
            raise

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Return whether the connection gets a thread; it is closed if there are far too many."""
        limit = self.proxy.options.max_connections + self.MAX_REJECTIONS
        is_within = len(self.proxy.exchanges) < limit
        if not is_within:
            log.warning("%d connections; one more was closed", limit)
        return is_within

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.error("a connection ended in %s", shorten(repr(sys.exc_info()[1]), 200))


def share_one_processor() -> None:
    """Keep this thread on the processor of all that serve, in a process that is ours.

    CPython's lock lets only one of them run at a time. Spread over processors they hand it across,
    and sleep for it, at every system call: a request of 16 clients then costs a third more, and
    the pieces of 1000 streams come up to 0.1 s late in place of 0.01 s, measured here.
    """
    has_lock = getattr(sys, "_is_gil_enabled", lambda: True)()
    if Listener.shares_processor and has_lock and hasattr(os, "sched_setaffinity"):
        with contextlib.suppress(OSError):
            processors = sorted(os.sched_getaffinity(0))
            os.sched_setaffinity(0, {processors[os.getpid() % len(processors)]})


def local_url(host: str, port: int) -> str:
    """Return the URL, without a path, of a server that listens there, or everywhere."""
    name = "localhost" if host in ("0.0.0.0", "::", "") else host
    return f"http://{f'[{name}]' if ':' in name else name}:{port}"


class ProxyServer:
    """The running proxy: its listeners, and what the handlers share. See make_server()."""

    # Of the grace, for what running streams are told and the last log lines.
    LAST_WORDS = 1.5
    # What the page and browsers ask for by themselves has no line in the log.
    QUIET = ("GET /status", "GET /usage", "GET /favicon.ico")
    VERDICTS = {"ok": "Ready", "refused": "Refused", "no_login": "Not ready"}

    def __init__(self, options: Options, environ: Mapping[str, str] | None = None):
        self.options, self.access = options, AccessPolicy(options)
        self.providers = Providers(options, environ)
        self.upstream = Upstream(self.providers.forwarding)
        self.is_stopping = False
        # One for each connection; those that are no request yet are not busy.
        self.exchanges: set[Exchange] = set()
        self.memory = ResponseMemory()
        self._lists = ModelLists(self.upstream)
        # The objects of /v1/models, and what they were made from.
        self._models: tuple[Any, list[Json]] = (None, [])
        self._listed: set[Target] = set()
        self._stopped = threading.Event()
        self.device_login = DeviceLogin(self._stopped)
        # What the page shows of requests that are over.
        self._latest: collections.deque[Json] = collections.deque(maxlen=20)
        self._started, self._is_serving = time.time(), False
        try:
            self._listeners = self._listen()
        except OSError as error:
            is_about_port = error.errno in (errno.EADDRINUSE, errno.EACCES, 10013, 10048)
            ways_out = "another --port, or 0 for a free one" if is_about_port else "another --host"
            raise OSError(
                error.errno,
                f"cannot listen on {options.host or 'all addresses'} port {options.port}: "
                f"{reason_of(error)}; choose {ways_out}",
            ) from error
        # Last, since their threads would outlive a port that is taken.
        self.streams = StreamLoop()
        self.ledger = Ledger(options.usage_file)

    @property
    def port(self) -> int:
        """The port it listens on, also after --port 0."""
        return int(self._listeners[0].server_address[1])

    @property
    def url(self) -> str:
        """The base URL for clients."""
        return local_url(self.options.host, self.port) + "/v1"

    def _listen(self) -> list[Listener]:
        """Return one listener, or for localhost two: Node resolves that to ::1 first."""
        host, port = self.options.host, self.options.port
        if host != "localhost":
            return [Listener((host, port), self)]
        first = Listener(("127.0.0.1", port), self)
        try:
            return [first, Listener(("::1", first.server_address[1]), self)]
        except OSError as error:
            # Node would reach that other program. 10048 is WSAEADDRINUSE.
            if error.errno not in (errno.EADDRINUSE, 10048):
                return [first]
            first.server_close()
            if port:
                raise
            return self._listen()

    def __enter__(self) -> ProxyServer:
        """Serve in threads of its own, until the with statement ends.

        Raises RuntimeError for a server that was stopped.
        """
        if self.is_stopping:
            raise RuntimeError("a server that was stopped cannot start again; make another one")
        self._is_serving = True
        for listener in self._listeners:
            threading.Thread(target=listener.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        if not self._stopped.is_set():
            self.shutdown()

    def serve_forever(self) -> None:
        """Serve until Ctrl-C, or until shutdown() is called from another thread."""
        # A signal may have come before.
        if not self.is_stopping:
            with self:
                # On Windows no signal ends a wait that has no limit.
                while not self._stopped.wait(0.5):
                    pass

    def shutdown(self, grace: float | None = None) -> None:
        """Accept no more, let running answers end, tell the rest, close the ports.

        All of it takes `grace` seconds at most.
        """
        self.is_stopping = True
        end = time.monotonic() + (self.options.grace if grace is None else grace)
        for listener in self._listeners:
            # Wakes it on Linux; elsewhere it takes up to half a second to notice.
            with contextlib.suppress(OSError):
                listener.socket.shutdown(socket.SHUT_RDWR)
            if self._is_serving:
                listener.shutdown()
            listener.server_close()
        for exchange in list(self.exchanges):
            if not exchange.is_busy:
                with contextlib.suppress(OSError):
                    exchange.connection.shutdown(socket.SHUT_RDWR)
        self._wait_until_idle(end - self.LAST_WORDS)
        for waiter in self._waiters():
            waiter.is_stopping = True
        half = self.LAST_WORDS / 2
        self._wait_until_idle(max(end - half, time.monotonic() + half))
        self.streams.close()
        self._lists.close()
        self.upstream.close()
        self.ledger.close(max(0.5, end - time.monotonic()))
        self._stopped.set()

    def _waiters(self) -> list[Waiter]:
        """Return what waits for the upstream now."""
        return [*filter(None, [exchange.waiter for exchange in list(self.exchanges)])]

    def _wait_until_idle(self, end: float) -> None:
        while time.monotonic() < end and any(each.is_busy for each in list(self.exchanges)):
            time.sleep(0.02)

    def calls(
        self, exchange: Exchange, api: ChatApi, request: Json, targets: list[Target]
    ) -> list[Call]:
        """Return the calls to the upstream that a request takes, which wait as one."""
        heartbeat = exchange.writer.heartbeat if exchange.writer.is_stream else None
        waiter = Waiter(exchange.connection, self.options.timeout, heartbeat)
        exchange.waiter = waiter
        # Only now, or the stop could miss the waiter.
        if self.is_stopping:
            raise ShuttingDown
        # Named by a sign of life before the answer, if that is sure.
        exchange.target = targets[0] if len(targets) == 1 else None
        return [
            Call(self.upstream, api, part, waiter, self.options.retries, exchange.user_agent())
            for part in api.split(request, targets)
        ]

    def note(self, exchange: Exchange) -> None:
        """Write the log line of an exchange that is over, and count it."""
        exchange.ended, exchange.status = time.monotonic(), exchange.status or 499
        route = exchange.counted_route()
        level = logging.DEBUG if route in self.QUIET else logging.INFO
        if exchange.status >= 400 and exchange.status != 499:
            # An error of ours, or one that the client feels.
            is_ours = exchange.status == 500 and type(exchange.error) is ProxyError
            level = logging.ERROR if is_ours else logging.WARNING
        if log.isEnabledFor(level):
            log.log(level, "%s", exchange.log_line())
        exchange.count(self.ledger, route)
        if route in Ledger.ROUTES:
            self._latest.appendleft(exchange.facts())

    def targets(self, model: Any) -> list[Target]:
        """Return where a model can be had, by the list that /v1/models shows.

        The live lists are asked for if all that is known leads to a problem.
        """
        providers = self.providers.current().providers
        targets = self.providers.targets(model, self._lists.get(providers, 0))
        first = targets[0].provider
        if first is not providers[0] and first.problem():
            targets = self.providers.targets(model, self._lists.get(providers, self._lists.WAIT))
        return targets

    def models(self, seconds: float = ModelLists.WAIT) -> list[Json]:
        """Return the objects of /v1/models, the active provider's first.

        Live lists are waited for at most that long.
        """
        discovery = self.providers.current()
        lists = self._lists.get(discovery.providers, seconds)
        serving = self.providers.serving(lists)
        # Made once for each state of the lists: one of thousands of models takes its time.
        if serving is not self._models[0]:
            listing = dict(serving.listing())
            for name, model in self.providers.aliases if discovery.providers else ():
                if not re.search(r"[*?\[]", name):
                    listing[name] = serving.targets(model)[0]
            models = [self._model_object(name, target) for name, target in listing.items()]
            self._models = (serving, models)
            self._listed = set(listing.values())
        return self._models[1]

    def model(self, name: str) -> Json | None:
        """Return the object for whatever model a request may name; None for one that is unknown."""
        found = next((model for model in self.models() if model["id"] == name), None)
        if found is None and self._listed:
            target = self.targets(name)[0]
            found = self._model_object(name, target) if target in self._listed else None
        return found

    def _model_object(self, name: str, target: Target) -> Json:
        facts = model_facts(target.model)
        model = {
            "id": name,
            "object": "model",
            "created": int(self._started),
            "owned_by": target.provider.name,
            "context_length": target.config.get("contextWindowSize") or facts.context,
            "max_output_tokens": facts.output,
        }
        return stated(model)

    def health(self) -> Json:
        """Return the object of /health; nothing secret."""
        asked: list[Provider] = []
        with contextlib.suppress(ProxyError):
            asked = [target.provider for target in self.providers.targets(None)]
        login = asked[0].credentials.describe() if asked else {"type": None}
        usable = [provider for provider in asked if provider.problem() is None]
        status = "refused" if usable else "no_login"
        status = "ok" if any(not provider.is_refusing() for provider in usable) else status
        return {
            "status": status,
            "version": __version__,
            "uptime_seconds": int(time.time() - self._started),
            "in_flight": len(self._waiters()),
            "login": {name: login[name] for name in ("type", "expires_at") if name in login},
            "last_refusal": next(filter(None, (provider.refusal for provider in asked)), None),
        }

    def status(self) -> Json:
        """Return the object of /status, which the page shows; nothing secret."""
        options, discovery, health = self.options, self.providers.current(), self.health()
        active = discovery.providers[0] if discovery.providers else None
        faults = [
            active.problem() if active else discovery.advice,
            dig(health, "last_refusal", "message"),
        ]
        problem = None if health["status"] == "ok" else next(filter(None, faults), None)
        kind = health["login"]["type"]
        notes = [problem, *discovery.notes, FREE_TIER_ENDED if kind == "oauth" else None]
        facts = {
            "Provider": f"{active.name}, from {active.source}" if active else "none",
            "Login": {"oauth": "Qwen account", "api-key": "API key"}.get(kind, "none"),
            "Default model": discovery.model,
            **({"Provider": "the built-in demo", "Login": "none needed"} if options.demo else {}),
        }
        running = [
            {**exchange.facts(), "status": None}
            for exchange in list(self.exchanges)
            if exchange.is_busy and exchange.counted_route() in Ledger.ROUTES
        ]
        return {
            **health,
            "verdict": self.VERDICTS[health["status"]],
            "problem": "\n".join(public(note) for note in dict.fromkeys(notes) if note),
            "facts": {name: public(text) for name, text in facts.items()},
            "model": public(discovery.model),
            "can_login": not options.base_url and options.provider in (None, "oauth"),
            "login_note": FREE_TIER_ENDED.partition(". ")[0],
            "device": self.device_login.state,
            "running": sorted(running, key=operator.itemgetter("started_at"), reverse=True),
            "latest": list(self._latest),
        }

    def gauges(self) -> list[tuple[str, str, float]]:
        """Return what /metrics shows of this moment: name, help, value."""
        expiry = self.health()["login"].get("expires_at")
        rows = [
            ("in_flight", "Requests that wait for the upstream.", len(self._waiters())),
            ("start_time_seconds", "When the server started.", round(self._started, 3)),
            ("login_expiry_timestamp_seconds", "When the access token expires.", expiry),
        ]
        return rows if expiry else rows[:-1]


def option_fault(name: str, value: Any) -> str:
    """Return what is wrong with the value of an option, as the end of a sentence; else empty."""
    default, (_, _, (least, most), choices) = Options._field_defaults[name], OPTIONS[name]
    bounds = "must be more than 0" if 0 < least < 1 else "must not be negative"
    bounds = f"must be between {least} and {most}" if most < 1e9 else bounds
    is_within = is_number(value) and least <= value <= most
    is_text = value is None or isinstance(value, str)
    # By what the default is: what the value is not, and what to say of it.
    faults = (
        (isinstance(default, bool) and not isinstance(value, bool), "must be true or false"),
        ((default is None or isinstance(default, str)) and not is_text, "must be a string"),
        (type(default) is int and type(value) is not int, "must be a whole number"),
        (is_number(default) and not is_number(value), "must be a number"),
        (is_number(default) and not is_within, bounds),
        (choices and value not in choices, f"must be one of {', '.join(choices)}"),
    )
    return next((text for is_wrong, text in faults if is_wrong), "")


def checked_options(values: Mapping[str, Any]) -> Options:
    """Return the options with these values, the others as by default.

    Raises ValueError that names an option whose value cannot be meant.
    """
    lists = {
        # A string is one value, not one for each of its characters.
        name: (value,) if isinstance(value, str) else tuple(value)
        for name, value in values.items()
        if isinstance(Options._field_defaults[name], tuple)
    }
    options = Options(**{**values, **lists})
    for name in OPTIONS:
        fault = option_fault(name, getattr(options, name))
        if fault:
            raise ValueError(f"--{name.replace('_', '-')} {fault}")
    for alias in options.alias:
        if not all(alias.partition("=")):
            raise ValueError(f"--alias must be NAME=ID, not {alias!r}")
    fault = base_url_fault(options.base_url) if options.base_url else ""
    if fault:
        raise ValueError(f"--base-url {fault}; the key is read from OPENAI_API_KEY")
    return options._replace(
        host=listening_host(options.host),
        allow_host=tuple(map(host_name, options.allow_host)),
        api_key=checked_keys(options.api_key),
    )


# ------------------------------------------------------------------------------------------------
# Demo upstream
# ------------------------------------------------------------------------------------------------

DEMO_MODEL = "qwen-demo"


class DemoUpstream(http.server.BaseHTTPRequestHandler):
    """Stands in for Qwen's endpoint, so that every client can be tried without an account."""

    disable_nagle_algorithm = True
    # Between chunks: about the pace of a model.
    PAUSE = 0.03

    def do_POST(self) -> None:
        """Answer a chunk at a time, as a model would."""
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if not self.path.endswith("/chat/completions"):
            error = b'{"error": {"message": "the demo answers chat only", "code": "not_in_demo"}}'
            self._send(404, "application/json", error)
            return
        common = {"id": "chatcmpl-demo", "created": int(time.time()), "model": DEMO_MODEL}
        # The proxy may leave in the middle of an answer.
        with contextlib.suppress(OSError):
            self._send(200, "text/event-stream")
            for chunk in self._chunks(request):
                self.wfile.write(encode_event(encode_json({**common, **chunk})))
                time.sleep(self.PAUSE)
            self.wfile.write(encode_event(DONE))

    def _send(self, status: int, content_type: str, body: bytes = b"") -> None:
        """Send the head and the body, or its beginning: its end is that of the connection."""
        self.send_response(status)
        self.send_header("Content-Type", content_type)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    @classmethod
    def start(cls) -> str:
        """Start the stand-in on a free port of loopback; returns its base URL."""
        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), cls)
        threading.Thread(target=server.serve_forever, daemon=True).start()
        return f"http://127.0.0.1:{server.server_port}/compatible-mode/v1"

    def _chunks(self, request: Json) -> Iterator[Json]:
        """Yield the chunks of an answer of the demo, each with what is its own.

        First come some thoughts, then a tool call if tools are offered, else text.
        """
        messages, tools = request["messages"], as_list(request.get("tools"))
        has_result = any(message["role"] == "tool" for message in messages)
        calls = bool(tools) and not has_result
        deltas: list[Json] = [
            {"reasoning_content": f"{word} "}
            for word in "The user tries the demo, so I say that I am one.".split()
        ]
        if calls:
            function = as_object(dig(tools[0], "function"))
            arguments = json.dumps(self._arguments(as_object(function.get("parameters"))))
            first = {"name": function.get("name", "tool"), "arguments": ""}
            pieces = [{"arguments": piece} for piece in re.findall(".{1,8}", arguments)]
            call = {"index": 0, "id": "call_demo", "type": "function"}
            deltas += [{"tool_calls": [{**call, "function": each}]} for each in (first, *pieces)]
        else:
            asked = text_of(messages[-1].get("content"))[:200]
            said = "The tool answered" if has_result else "You said"
            text = f"This is the demo of qwen_proxy, not a model. {said}: {asked}"
            deltas += [{"content": word} for word in re.findall(r"\S+\s*", text)]
        for delta in deltas:
            yield {"choices": [{"index": 0, "delta": delta}]}
        reason = "tool_calls" if calls else "stop"
        size = len(json.dumps(messages)) // 4
        yield {
            "choices": [{"index": 0, "delta": {}, "finish_reason": reason}],
            "usage": {"prompt_tokens": size, "completion_tokens": 40, "total_tokens": size + 40},
        }

    def _arguments(self, schema: Json) -> Json:
        """Return arguments that fit a tool's parameters, as far as a demo needs it."""
        samples: Json = {"integer": 1, "number": 1.5, "boolean": True, "array": [], "object": {}}
        properties = as_object(schema.get("properties"))
        required = as_list(schema.get("required", list(properties)))
        return {
            name: [*as_list(dig(part, "enum")), samples.get(str(dig(part, "type")), "demo")][0]
            for name, part in properties.items()
            if name in required
        }


# ------------------------------------------------------------------------------------------------
# Command line
# ------------------------------------------------------------------------------------------------

HELP = """\
commands:
  serve                       listen on --port and answer (the default)
  login                       log in with the browser; only for the OAuth tier that has ended
  status                      what would happen to a request now, and why; spends no quota
  usage                       what was used: requests and tokens by day and plan window

examples:
  DASHSCOPE_API_KEY=YOUR_KEY python3 qwen_proxy.py --provider dashscope-intl
  python3 qwen_proxy.py --port 8081 --alias 'gpt-*=qwen3.7-plus'

--provider, and the variable for its key:
{keys}

Each option of serve can be given as a variable, too: QWEN_PROXY_PORT=8080,
QWEN_PROXY_API_KEYS=KEY,KEY.
"""


def build_parser() -> argparse.ArgumentParser:
    """Return the parser for all commands; `serve` is the default one."""
    parser = argparse.ArgumentParser(
        prog="qwen_proxy.py",
        usage="qwen_proxy.py [serve|login|status|usage] [options]",
        description="Serve Qwen's models as an OpenAI-compatible API on localhost, with the login "
        "of the Qwen Code CLI.",
        epilog=HELP.format(
            keys="\n".join(f"  {name:15} {key}" for name, (_, key) in PRESETS.items())
        ),
        formatter_class=lambda prog: argparse.RawDescriptionHelpFormatter(prog, 2, 30, 100),
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"qwen_proxy {__version__}")
    group = parser.add_argument_group("serve")
    for name, option in OPTIONS.items():
        default, flag = Options._field_defaults[name], "--" + name.replace("_", "-")
        settings: Json = {"metavar": option.metavar or None, "choices": option.choices or None}
        if default is False:
            settings = {"action": "store_true"}
        elif isinstance(default, tuple):
            settings["action"] = "append"
        elif is_number(default):
            settings["type"] = type(default)
        # A default is only set by checked_options().
        group.add_argument(flag, help=option.help, default=None, **settings)
    others = parser.add_argument_group("login, status and usage")
    others.add_argument("--no-browser", action="store_true", help="login: print the address only")
    others.add_argument("--json", action="store_true", help="status, usage: print JSON")
    others.add_argument("--offline", action="store_true", help="status: connect to nothing")
    others.add_argument(
        "--days",
        type=int,
        metavar="N",
        default=30,
        help="usage: how far back, today included (default: 30)",
    )
    others.add_argument(
        "--by",
        choices=tuple(GROUPS),
        default="day",
        help="usage: what a line counts (default: day)",
    )
    return parser


def with_variables(given: Json, environ: Mapping[str, str]) -> Json:
    """Return the options of the command line, and behind them those of QWEN_PROXY_* variables.

    The command line overrides what has one value; of what may be repeated its own come first.
    Raises ValueError for a variable that cannot be meant, with its name.
    """
    options = dict(given)
    readers = {bool: as_switch, int: as_decimal, float: as_decimal}
    for name, default in Options._field_defaults.items():
        variable = f"QWEN_PROXY_{name.upper()}"
        if isinstance(default, tuple):
            variables = [each for each in (variable, variable + "S") if each in environ]
            parts = [part.strip() for each in variables for part in environ[each].split(",")]
            # An empty key is refused: to serve without one would open the door.
            value: Any = [part for part in parts if part or name == "api_key"]
            options[name] = [*options.get(name, ()), *value]
            variable = " and ".join(variables)
        elif name in options or not environ.get(variable):
            continue
        else:
            value = options[name] = readers.get(type(default), str)(environ[variable])
        try:
            checked_options({name: value})
        except ValueError as error:
            raise ValueError(f"{variable}: {error}") from None
    return options


def main(argv: list[str] | None = None) -> int:
    """Run a command; returns its exit code: 0, 1 when it failed, 2 when it could not start."""
    if sys.version_info < (3, 8):  # noqa: UP036
        say("qwen_proxy.py needs Python 3.8 or newer")
        return 2
    for output in (sys.stdout, sys.stderr):
        if isinstance(output, io.TextIOWrapper):
            # A terminal that cannot show a character is no reason to say nothing.
            output.reconfigure(errors="backslashreplace")
    arguments = list(sys.argv[1:] if argv is None else argv)
    command = arguments.pop(0) if arguments and arguments[0] in COMMANDS else "serve"
    parser = build_parser()
    try:
        parsed, unknown = parser.parse_known_args(arguments)
        if unknown:
            raise ValueError(unknown_word(unknown[0], list(vars(parsed))))
        given = stated({name: getattr(parsed, name) for name in OPTIONS})
        options = checked_options(with_variables(given, os.environ))
    except ValueError as error:
        parser.error(public(str(error)))
    # SIGTERM ends a command as Ctrl-C does, so that the CLI's lock does not stay behind.
    interrupted = signal_handlers(signal.default_int_handler)
    with logged_to(sys.stderr, options.log_level.upper()), interrupted:
        try:
            return COMMANDS[command](options, parsed)
        except KeyboardInterrupt:
            say("stopped")
            return 130


def unknown_word(word: str, options: list[str]) -> str:
    """Return what is wrong with a word of the command line, and what may have been meant."""
    # Here, since only this needs it.
    import difflib

    if word in COMMANDS:
        return f"the command comes first: qwen_proxy.py {word} [options]"
    flags = ["--" + name.replace("_", "-") for name in [*options, "help", "version"]]
    is_flag = word.startswith("-")
    kind, known = ("option", flags) if is_flag else ("command", [*COMMANDS, "--help"])
    near = difflib.get_close_matches(word.partition("=")[0], known, 1)
    meant = f"did you mean {near[0]}?" if near else "see --help"
    return f"there is no {kind} {word}; {meant}"


class LogWriter(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes the log from a thread of its own, the lines of one moment together.

    Each time that thread wakes, all threads contend for the interpreter. What does not fit is lost,
    since no request waits for a terminal.
    """

    MOST, PAUSE = 10_000, 0.05

    def __init__(self, stream: Any):
        super().__init__(stream)
        self.setFormatter(
            logging.Formatter("%(asctime)s %(levelname).1s %(message)s", "%Y-%m-%d %H:%M:%S")
        )
        self.lines: queue.Queue[Any] = queue.Queue(self.MOST)
        threading.Thread(target=self._write, daemon=True).start()

    def handle(self, record: logging.LogRecord) -> bool:
        """Queue a record, if there is room."""
        with contextlib.suppress(queue.Full):
            self.lines.put_nowait(record)
        return True

    def drain(self) -> bool:
        """Return whether all is written, after a second at most: a terminal may take nothing."""
        end = time.monotonic() + 1
        while self.lines.unfinished_tasks and time.monotonic() < end:
            time.sleep(0.005)
        return not self.lines.unfinished_tasks

    def _write(self) -> None:
        while True:
            if self.lines.empty():
                share_one_processor()
                time.sleep(self.PAUSE)
            record = self.lines.get()
            if record is None:
                return
            self.emit(record)
            self.lines.task_done()


@contextlib.contextmanager
def logged_to(stream: Any, level: str) -> Iterator[None]:
    """Write the log to a stream; whatever ends the program, all of it."""
    writer, root = LogWriter(stream), logging.getLogger()
    before = root.level
    root.addHandler(writer)
    root.setLevel(level)
    try:
        yield
    finally:
        is_written = writer.drain()
        root.removeHandler(writer)
        root.setLevel(before)
        if is_written:
            # Ends the thread.
            writer.lines.put(None)


@contextlib.contextmanager
def signal_handlers(stop: Callable[[int, Any], None]) -> Iterator[None]:
    """Call stop() for every signal that asks a program to end.

    One that is ignored, as by nohup, stays so.
    """
    names = ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK")
    is_main = threading.current_thread() is threading.main_thread()
    before = {
        number: signal.signal(number, stop)
        for number in signal.Signals
        if is_main and number.name in names and signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler or signal.SIG_DFL)


def say(*lines: str) -> None:
    """Print lines for the person at the terminal; each stays one line, whatever it holds."""
    # A terminal that is closed is no reason to stop serving.
    with contextlib.suppress(OSError, ValueError):
        print("\n".join(map(public, lines)), file=sys.stderr, flush=True)


def server_for(options: Options, environ: Mapping[str, str] | None = None) -> ProxyServer:
    """Return the server that the options describe; raises ValueError, and OSError."""
    if not options.demo:
        return ProxyServer(options, environ)
    home = os.path.join(tempfile.gettempdir(), f"qwen_proxy-demo-{secrets.token_hex(8)}")
    options = options._replace(
        base_url=DemoUpstream.start(),
        provider=None,
        model=options.model or DEMO_MODEL,
        qwen_home=home,
        usage_file=None,
    )
    return ProxyServer(options, {"OPENAI_API_KEY": "demo", "HOME": home})


def make_server(
    host: str = "localhost",
    port: int = 8080,
    *,
    api_key: Iterable[str] | str = (),
    no_auth: bool = False,
    allow_origin: Iterable[str] | str = (),
    allow_host: Iterable[str] | str = (),
    provider: str | None = None,
    base_url: str | None = None,
    model: str | None = None,
    alias: Iterable[str] | str = (),
    failover: bool = False,
    qwen_home: str | None = None,
    timeout: float = DEFAULTS.timeout,
    retries: int = DEFAULTS.retries,
    max_connections: int = DEFAULTS.max_connections,
    max_body: int = DEFAULTS.max_body,
    grace: float = DEFAULTS.grace,
    usage_file: str | None = None,
    demo: bool = False,
    environ: Mapping[str, str] | None = None,
) -> ProxyServer:
    """Return a server that is bound to its port and not yet running.

    `with make_server(port=0) as server:` runs it in a thread and ends it; serve_forever() and
    shutdown() do so by hand. server.url is the base URL for clients. The log goes to the logger
    'qwen_proxy'. The arguments are the options of `serve`:

        host, port        where to listen; 'localhost' is 127.0.0.1 and ::1, port 0 a free one
        api_key           what clients must present, one or several
        no_auth           listen beyond localhost without a key
        allow_origin      web pages that may use it, besides local ones
        allow_host        more names that the Host header may carry
        provider          instead of the CLI's active one: a name that --help lists
        base_url          any OpenAI-compatible upstream, with the key in OPENAI_API_KEY
        model, alias      for requests that name none; 'NAME=ID', other names for models
        failover          when a provider is exhausted or down, try the next that lists the model
        qwen_home         the CLI's folder
        timeout, retries  seconds that the upstream may be silent; before its first byte only
        max_connections   the next one gets 503
        max_body          MiB of the largest request
        grace             seconds from shutdown() to the end, for running answers
        usage_file        where counts are kept; in memory only without one
        demo, environ     a built-in stand-in for Qwen; what stands in for os.environ

    Raises ValueError for a value that cannot be meant, and OSError when the port is taken.
    """
    values = {name: value for name, value in locals().items() if name in OPTIONS}
    return server_for(checked_options(values), environ)


def cmd_serve(options: Options, _: argparse.Namespace) -> int:
    """Serve until a signal; running answers get some seconds then, a second signal ends at once."""
    is_kept = not (options.no_usage or options.demo)
    path = counts_path(options, os.environ) if is_kept else None
    # Before the threads start that are to share a processor.
    tune_process()
    try:
        server = server_for(options._replace(usage_file=path))
    except (OSError, ValueError) as error:
        say(reason_of(error))
        return 2
    with signal_handlers(functools.partial(stop_serving, server)):
        say(*banner(server))
        server.serve_forever()
    if not last_words(f"stopped after {server.ledger.summary()}"):
        # The interpreter would wait for stderr at its end.
        LockFile.release_all()
        os._exit(0)
    return 0


def stop_serving(server: ProxyServer, number: int, frame: Any) -> None:
    """Stop gently at the first signal, at once at the second one."""
    if server.is_stopping:
        last_words("stopped at once")
        # Last of all: until then a request may take the lock.
        LockFile.release_all()
        os._exit(1)
    server.is_stopping = True
    threading.Thread(target=server.shutdown).start()
    last_words(
        f"stopping within {server.options.grace:g} s, for running answers; a second signal ends at "
        "once"
    )


def last_words(text: str) -> bool:
    """Say a text, and the log before it, within a second.

    Returns False where stderr is not read, and waiting would never end.
    """
    writers = [each for each in logging.getLogger().handlers if isinstance(each, LogWriter)]

    def speak() -> None:
        for writer in writers:
            writer.drain()
        say(text)

    thread = threading.Thread(target=speak, daemon=True)
    thread.start()
    thread.join(1)
    # A short text may still fit into a pipe that is too full for a line of the log.
    return not thread.is_alive() and not any(writer.lines.unfinished_tasks for writer in writers)


def tune_process() -> None:
    """Set what serves many streams better than Python's defaults, in a process that is ours.

    The collector need not look at modules, nor so often: 15 % of a small request, measured here. A
    stream takes two descriptors, and the usual soft limit of 1024 ends at 500 streams.
    """
    Listener.shares_processor = True
    # No log line shows them, nor who called; Python's Logging HOWTO, Optimization.
    logging.logThreads = logging.logProcesses = logging.logMultiprocessing = False
    vars(logging)["_srcfile"] = None
    gc.freeze()
    gc.set_threshold(20_000, 20, 20)
    with contextlib.suppress(ImportError, OSError, ValueError):
        # Not on Windows.
        import resource

        soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
        # No limit is a negative number here, a large one there.
        enough = 4 * DEFAULTS.max_connections
        wanted = hard if 0 <= hard < enough else enough
        if 0 <= soft < wanted:
            resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def banner(server: ProxyServer) -> list[str]:
    """Return the lines with what a newcomer needs next."""
    status, models = server.status(), [model["id"] for model in server.models(0)]
    label = "note" if status["status"] == "ok" else "warning"
    shown = ", ".join(models[:12]) or "unknown until there is a login"
    key = "-H 'Authorization: Bearer YOUR_KEY' " if server.options.api_key else ""
    message = {"role": "user", "content": "Hello"}
    body = json.dumps({"model": status["model"], "messages": [message]})
    curl = f"curl {server.url}/chat/completions {key}-H 'Content-Type: application/json'"
    return [
        f"qwen_proxy {__version__} on {server.url}",
        f"provider  {status['facts']['Provider']}",
        *(f"{label:9} {line}" for line in status["problem"].splitlines()),
        f"models    {shown}{', ...' if len(models) > 12 else ''}",
        f"try       {curl} -d '{body}'",
    ]


def cmd_login(options: Options, parsed: argparse.Namespace) -> int:
    """Run device authorization in the browser; writes oauth_creds.json."""
    # Here, since it costs every start 10 ms.
    import webbrowser

    home = qwen_home(os.environ, options.qwen_home)
    settings = CliSettings(home, os.environ, home)
    credentials = settings.login_at(os.path.join(home, "oauth_creds.json"))

    def show(device: DeviceAuthorization) -> None:
        minutes = f"{device.expires_in / 60:.0f} minutes"
        say(f"Open this address and approve the log-in, within {minutes}:", "")
        say(f"    {device.verification_uri}", "")
        if device.user_code:
            say(f"The code it shows must be {device.user_code}.")
        if not parsed.no_browser:
            webbrowser.open(device.verification_uri)

    say(f"Note: {FREE_TIER_ENDED}.", "")
    try:
        credentials.authorize(show)
        when = span_of(credentials.login().expires_at - time.time())
    except ProxyError as error:
        say(f"login failed: {error.message}")
        return 1
    say(f"Logged in; {credentials.path} holds the login, valid until it is refreshed {when}.")
    return 0


def span_of(seconds: float) -> str:
    """Return a span of time for a person.

    >>> span_of(3 * 3600 + 61), span_of(-90)
    ('in 3 h 1 min', '1 min ago')
    """
    hours, minutes = divmod(int(abs(seconds)) // 60, 60)
    words = f"{hours} h {minutes} min" if hours else f"{minutes} min"
    if hours >= 24:
        words = f"{hours // 24} d {hours % 24} h"
    return f"in {words}" if seconds >= 0 else f"{words} ago"


def cmd_status(options: Options, parsed: argparse.Namespace) -> int:
    """Say what would happen to a request now; returns 0 only for 'ok'. Spends no quota."""
    try:
        providers = Providers(options, is_read_only=True)
    except ValueError as error:
        say(str(error))
        return 2
    facts = status_facts(providers, parsed.offline)
    tell(json.dumps(facts, indent=2) if parsed.json else "\n".join(status_lines(facts)))
    return 0 if facts["status"] == "ok" else 1


def tell(text: str) -> None:
    """Print the output of a command; a reader that stops early, such as `head`, is no error."""
    try:
        print(public(text, keep="\n"), flush=True)
    except OSError:
        # The interpreter would try once more at its end.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def cmd_usage(options: Options, parsed: argparse.Namespace) -> int:
    """Print what was used, from the file, whether a server runs or not."""
    path, by, days = counts_path(options, os.environ), parsed.by, parsed.days
    if days < 1:
        say("--days must be at least 1")
        return 2
    try:
        counts = CountsFile(path).read([by], days)
    except Exception as error:
        say(f"{path} cannot be read: {reason_of(error)}")
        return 1
    if parsed.json:
        tell(json.dumps({"file": path, "days": days, **counts}, indent=2))
        return 0
    if not counts["groups"]:
        tell(f"no requests were counted in {counted(days, 'day')}; counts are kept in {path}")
        return 0
    windows = usage_table(("provider", "window"), counts["windows"])
    tell("\n".join(usage_table((by,), counts["groups"]) + windows))
    return 0


def usage_table(names: tuple[str, ...], rows: list[Json]) -> list[str]:
    """Return the lines of a table, with an empty one at its end; names are the columns of text."""
    columns = {
        "requests": "requests",
        "input_tokens": "tokens in",
        "cached_tokens": "cached",
        "output_tokens": "out",
        "errors": "errors",
        "tokens_per_second": "tokens/s",
    }
    lines = [[*names, *columns.values()]]
    for row in rows:
        texts = [public(row[name] or "none") for name in names]
        lines.append(texts + [f"{row[name] or 0:,.0f}" for name in columns])
    widths = [max(map(len, cells)) for cells in zip(*lines)]
    sides = ["<"] * len(names) + [">"] * len(columns)
    template = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths))
    return [template.format(*line).rstrip() for line in lines] + [""]


def status_facts(providers: Providers, is_offline: bool) -> Json:
    """Return what `status` knows, as data."""
    discovery = providers.current()
    facts: Json = {
        "version": __version__,
        "status": "no",
        "problem": discovery.advice,
        "qwen_home": providers.home,
        "settings": discovery.settings_files,
        "notes": discovery.notes,
        "model": discovery.model,
        "provider": None,
        "others": [
            {"name": other.name, "problem": other.problem()} for other in discovery.providers[1:]
        ],
        "forward_proxy": None,
        "server": {} if is_offline else server_facts(providers.options),
    }
    for active in discovery.providers[:1]:
        forwarding = providers.forwarding
        status, problem = checked_provider(active, discovery.model, is_offline, forwarding)
        described = active.describe()
        facts.update(status=status, problem=problem or None, provider=described)
        if active.oauth:
            with contextlib.suppress(OSError):
                mode = stat.S_IMODE(os.stat(active.oauth.path).st_mode)
                described["login"]["mode"] = f"{mode:03o}"
        host = host_of(described["base_url"] or "", with_port=True)
        facts["forward_proxy"] = host and forwarding.proxy_for(host) or None
    return facts


# For what `status` asks an upstream, and a server on this machine.
STATUS_TIMEOUT, SERVER_TIMEOUT = 3.0, 1.0


def checked_provider(
    provider: Provider, model: str, is_offline: bool, forwarding: Forwarding
) -> tuple[str, str]:
    """Return ok, no, or not checked, and why.

    A login is refreshed if that is due, and the upstream is asked for its models with the key:
    neither costs quota.
    """
    problem, oauth = provider.problem(), provider.oauth
    if problem:
        return "no", problem
    if is_offline:
        return "not checked", "--offline connects to nothing"
    if oauth and not os.path.lexists(oauth.path):
        return "not checked", f"QWEN_CLI_AUTH is written to {oauth.path} at the start"
    try:
        headers = {
            "Authorization": f"Bearer {provider.credentials.access_token()}",
            **Upstream.custom_headers(Target(provider, model)),
            "User-Agent": f"qwen_proxy/{__version__}",
        }
        request = urllib.request.Request(provider.base_url + "/models", headers=headers)
        with open_before(request, STATUS_TIMEOUT, forwarding) as response:
            text = response.read(ModelLists.SIZE).decode("utf-8", "replace")
            return judged(provider, model, response.getcode(), text)
    except ProxyError as error:
        return "no", error.message
    except (OSError, http.client.HTTPException, ValueError) as error:
        host = host_of(provider.base_url, with_port=True)
        return "no", f"{host} cannot be asked: {reason_of(error)}"


def judged(provider: Provider, model: str, status: int, text: str) -> tuple[str, str]:
    """Return what the answer to a question for the models says of a request, and why."""
    family, refusal = provider.family, Refusal.read(status, text)
    is_refused = status in (401, 403, *range(300, 400)) or status >= 500
    if provider.oauth:
        return "no" if is_refused else "not checked", FREE_TIER_ENDED
    if is_refused:
        return "no", to_upstream_error(refusal, family).message
    listed = [dig(entry, "id") for entry in as_list(dig(loads(text), "data"))]
    if status != 200 or not family.has_list or "open-list" in family.traits:
        words = "its list of models proves nothing" if status == 200 else f"HTTP {status}"
        return "not checked", f"only a request would tell, and cost quota ({words})"
    if model not in listed:
        return "not checked", f"the upstream does not list the model {model}"
    return "ok", ""


def server_facts(options: Options) -> Json:
    """Return whether a server answers on the port, and what it says of itself."""
    url = local_url(options.host, options.port)
    facts: Json = {"url": f"{url}/v1", "answers": False, "health": None}
    with contextlib.suppress(OSError, http.client.HTTPException, ValueError):
        with open_before(urllib.request.Request(url + "/health"), SERVER_TIMEOUT) as response:
            facts["answers"], health = True, loads(response.read(MAX_LINE))
        facts["health"] = health if dig(health, "version") and dig(health, "login") else None
    return facts


def status_lines(facts: Json) -> list[str]:
    """Return the lines of `status`, each behind a label."""
    provider, server = as_object(facts["provider"]), facts["server"]
    words: Json = {
        "status": facts["status"] + (f": {facts['problem']}" if facts["problem"] else ""),
        "version": facts["version"],
        "qwen home": facts["qwen_home"],
        "settings": facts["settings"],
        "note": facts["notes"],
    }
    if provider:
        words["provider"] = f"{provider['name']} ({provider['family']}), from {provider['source']}"
        words["base URL"] = provider["base_url"] or "none"
        words["login"] = login_lines(provider["login"], facts["status"] != "no")
        words["models"] = ", ".join(provider["models"]) or "whatever the upstream lists"
    words["model"] = facts["model"]
    words["also usable"] = [
        f"{other['name']} ({other['problem'] or 'ready'})" for other in facts["others"]
    ]
    words["forward proxy"] = facts["forward_proxy"] or "none"
    if server:
        url, health = server["url"], as_object(server["health"])
        said = f"{health.get('status')}, {health.get('in_flight')} requests in flight"
        who = f"qwen_proxy {health.get('version')}: {said}" if health else "another program"
        words["server"] = f"{url} is {who}" if server["answers"] else f"nothing answers at {url}"
    lines = []
    for label, value in words.items():
        for place, line in enumerate(value if isinstance(value, list) else [value]):
            lines.append(f"{'' if place else label:13} {public(line)}")
    return lines


def login_lines(login: Json, is_good: bool) -> list[str]:
    """Return what is to be said of a login: where it is, until when, and permissions."""
    if "path" not in login:
        return [f"key in {login['source']}"]
    lines = [f"OAuth, {login['path']}"]
    if "expires_at" in login:
        left = login["expires_at"] - time.time()
        lines.append(
            f"expires {span_of(left)}"
            + (
                ", refreshed at the next request"
                if left <= Login.REFRESH_MARGIN and is_good
                else ""
            )
        )
    mode = login.get("mode", "0")
    if int(mode, 8) & 0o077 and os.name != "nt":
        lines.append(f"permissions {mode}, others can read it: chmod 600 {login['path']}")
    return lines


COMMANDS = {"serve": cmd_serve, "login": cmd_login, "status": cmd_status, "usage": cmd_usage}

if __name__ == "__main__":
    sys.exit(main())
