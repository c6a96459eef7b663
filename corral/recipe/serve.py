"""`[serve]`: how `corral serve` offers a run's model. The flags of that command are made from this class."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import AfterValidator, Field

from corral.recipe.evaluate import EngineName
from corral.recipe.section import PathText, PositiveInt, Section

_ORIGIN = re.compile(r"https?://[^/\s*?#@]+")
_ROOT_PATH = re.compile(r"(/[A-Za-z0-9._~-]+)*")


def _check_database(url: str) -> str:
    """Raises: ValueError (the URL holds a password)."""
    if url == "none":
        return url
    try:
        parts = urlsplit(url)
        has_password = parts.password is not None or "password=" in parts.query
    except ValueError as error:
        raise ValueError(f"this is not the URL of a database: {error}") from None
    if has_password:
        raise ValueError(
            "a password does not belong here, where others may read it: give the whole URL in the environment variable "
            "CORRAL_DATABASE, or leave the password to PGPASSWORD or ~/.pgpass"
        )
    if not parts.scheme:
        raise ValueError(f"{url!r} is not the URL of a database: sqlite:///FILE, postgresql+psycopg://USER@HOST/NAME")
    return url


def _check_origin(origin: str) -> str:
    if not _ORIGIN.fullmatch(origin):
        raise ValueError(
            f"{origin!r} is not the origin of a page: give scheme, host and port if there is one, as in "
            "https://chat.example.org"
        )
    return origin


def _check_host(host: str) -> str:
    if not re.fullmatch(r"\*|(\*\.)?[A-Za-z0-9.:_-]+", host):
        raise ValueError(
            f"{host!r} is not the name of a host: chat.example.org, or *.example.org for all below it, or * for any"
        )
    return host


def _check_alias(alias: str) -> str:
    name, _, model = alias.partition("=")
    if not name.strip() or ("=" in alias and not model.strip()):
        raise ValueError(f"{alias!r} is neither NAME nor NAME=MODEL")
    return alias


def _check_root_path(path: str) -> str:
    if not _ROOT_PATH.fullmatch(path):
        raise ValueError(f"{path!r} is not the path of a server: begin it with / and end it without, as in /llm")
    return path


class Serve(Section):
    """How `corral serve RUN` offers the run's model. Each setting is also a flag of the command, and a flag comes before the
    recipe: `at_once` is `--at-once`, a list such as `alias` is a flag that can be repeated, and `--no-strict` sets
    `strict = false`. A command that names several models has only its flags. Keys and passwords are never written here."""

    host: str = "127.0.0.1"
    """The address to listen on. The default is this machine's own; another one, such as 0.0.0.0, can be reached from other
    machines, and needs an API key."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """The port; 0 takes any free one."""
    engine: EngineName | Literal["remote"] | None = None
    """The engine that computes answers; by default the best one for this machine."""
    url: tuple[str, ...] = ()
    """Endpoints that serve the models and compute in place of this machine: one, or several replicas."""
    name: Annotated[str, Field(min_length=1)] | None = None
    """The name that clients use for the model; by default the run's."""
    alias: tuple[Annotated[str, AfterValidator(_check_alias)], ...] = ()
    """Other names that clients may use: NAME for the only model, or NAME=MODEL, where MODEL is a name that is served, also the
    embedding model's. So a client with a fixed name works: `gpt-4o-mini`, `text-embedding-3-small=all-minilm-l6-v2`."""
    embeddings: bool = False
    """Also serve /v1/embeddings."""
    follow: bool = False
    """When the run is made again and promotes another model, serve that one, without ending running requests. For a while both
    are in memory."""
    adapters: PathText | None = None
    """The folder from which /v1/load_lora_adapter may load LoRA adapters while serving; without it, none can be loaded."""
    database: Annotated[str, AfterValidator(_check_database)] | None = None
    """The database of keys and conversations, as a URL without a password; `none` keeps neither. By default the environment
    variable CORRAL_DATABASE, else a SQLite file in ~/.local/share/corral."""
    insecure: bool = False
    """Allow an address that other machines can reach although there is no key."""
    cors: tuple[Annotated[str, AfterValidator(_check_origin)], ...] = ()
    """Origins whose pages may send requests, such as https://chat.example.org."""
    allowed_host: tuple[Annotated[str, AfterValidator(_check_host)], ...] = ()
    """Names by which clients may reach this server besides those of this machine, as their `Host` header has them: of a proxy,
    for example. `*.example.org` allows all names below it, and `*` any name."""
    root_path: Annotated[str, AfterValidator(_check_root_path)] = ""
    """The path under which a proxy offers this server, such as /llm."""
    at_once: PositiveInt = 128
    """Choices that are generated at once: a request with `n = 4`, or four prompts or candidates, counts as four, and one
    that has more choices than this runs alone."""
    waiting: Annotated[int, Field(ge=0)] = 512
    """Requests that may wait in the queue; more are refused with 503."""
    max_seconds: Annotated[float, Field(gt=0)] = 600
    """The longest a request may take, including the queue."""
    keep_alive: Annotated[float, Field(gt=0)] = 75
    """Seconds that an idle connection stays open; more than a proxy's, which may use it again."""
    strict: bool = False
    """Refuse fields of a request that this server does not know, false ones too (null is as left out). Otherwise they are
    ignored and, unless false, named."""
    log_level: Literal["debug", "info", "warning", "error"] = "info"
    """What is logged: info has a line for each request."""

    def with_flags(self, given: Mapping[str, Any]) -> Serve:
        """These settings, replaced by those that the command line gives. Raises: pydantic.ValidationError."""
        return Serve.model_validate(self.model_dump() | dict(given))

    def changes(self) -> dict[str, Any]:
        """The settings that are not the defaults."""
        return {name: value for name, value in self if value != Serve.model_fields[name].default}
