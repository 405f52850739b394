"""obstore's clients of S3, Google Cloud Storage and Azure Blob Storage, by URI; one a bucket in each process.

A URI's options follow a ``?``; credentials never do: they come from the environment, the machine's role or, on S3, from what
boto3 finds where it is installed (profiles, SSO). https://developmentseed.org/obstore/latest/authentication/
"""

import functools
import os
from datetime import timedelta
from importlib.util import find_spec
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, parse_qsl, unquote, urlsplit

from obstore.exceptions import BaseError
from obstore.store import AzureStore, GCSStore, S3Store

from emloc_ray.errors import ConfigError
from emloc_ray.text import one_line

_OPTIONS = {
    "s3": {"region", "scheme", "endpoint_override", "anonymous", "force_virtual_addressing"},
    "gs": {"anonymous"},
    "az": {"account_name", "endpoint", "use_emulator", "anonymous"},
}
_ALIASES = {"s3a": "s3", "gcs": "gs", "abfs": "az", "abfss": "az", "azure": "az"}
# What the names of options that carry a secret hold, at any of the stores.
_SECRET_OPTIONS = ("key", "secret", "token", "password", "sig")
Client = S3Store | GCSStore | AzureStore


def open_client(uri: str, key: str, timeout_s: float, attempts: int, pause_s: float) -> tuple[Client, str]:
    """The client of the bucket that a URI names, which tries each request so often, and the path in it, without the slashes
    around it; ``pause_s``: before the second try. Raises ConfigError, naming the config's ``key``, where the URI holds
    credentials or names no store."""
    try:
        parts = urlsplit(uri)
        options = dict(parse_qsl(parts.query))
        secret = any(word in option.lower() for option in options for word in _SECRET_OPTIONS)
        if parts.fragment:
            raise ValueError("a # is no part of a name: write it as %23")
        if parts.username or parts.password or secret:
            raise ConfigError(
                f"{key} holds credentials: leave them out, and give them to the nodes as their environment."
            )
        scheme, path = _checked(parts, options), unquote(parts.path).strip("/")
        if path and {"", ".", ".."}.intersection(path.split("/")):
            raise ValueError("a name in its path is empty, . or ..")
        client = _client(scheme, parts.netloc, tuple(sorted(options.items())), timeout_s, attempts, pause_s)
    except (BaseError, ValueError) as error:
        detail = one_line(error)
        raise ConfigError(
            f"{key} {uri.partition('?')[0]} is no place that obstore can open ({detail}): name another."
        ) from error
    return client, path


def _checked(parts: SplitResult, options: dict[str, str]) -> str:
    scheme = _ALIASES.get(parts.scheme, parts.scheme)
    if scheme not in _OPTIONS:
        raise ValueError(f"{parts.scheme}:// is none of {', '.join(f'{known}://' for known in _OPTIONS)}")
    if not parts.netloc:
        raise ValueError("it names no bucket")
    unknown = options.keys() - _OPTIONS[scheme]
    if unknown:
        raise ValueError(f"unknown option {min(unknown)}; there are {', '.join(sorted(_OPTIONS[scheme]))}")
    return scheme


@functools.lru_cache(maxsize=64)
def _client(
    scheme: str, bucket: str, options: tuple[tuple[str, str], ...], timeout_s: float, attempts: int, pause_s: float
) -> Client:
    given = dict(options)
    backoff = {"init_backoff": timedelta(seconds=pause_s), "max_backoff": timedelta(seconds=15), "base": 2}
    common: dict[str, Any] = {
        "retry_config": {
            "max_retries": attempts - 1,
            "backoff": backoff,
            "retry_timeout": timedelta(seconds=timeout_s),
        },
        "client_options": {
            "timeout": timedelta(seconds=timeout_s),
            "connect_timeout": timedelta(seconds=5),
            "allow_http": True,
        },
    }
    config: Any = {"skip_signature": True} if given.get("anonymous") == "true" else {}
    if scheme == "gs":
        return GCSStore(bucket, config=config, **common)
    if scheme == "az":
        config |= {name: given[name] for name in ("account_name", "endpoint") if name in given}
        if given.get("use_emulator") == "true":
            config["use_emulator"] = True
        return AzureStore(bucket, config=config, **common)
    if "endpoint_override" in given:
        endpoint = given["endpoint_override"]
        config["endpoint"] = endpoint if "://" in endpoint else f"{given.get('scheme', 'https')}://{endpoint}"
    if given.get("force_virtual_addressing") == "true":
        config["virtual_hosted_style_request"] = True
    if "region" in given:
        config["region"] = given["region"]
    provider = None if "skip_signature" in config else _profile()
    return S3Store(bucket, config=config, **common, **({} if provider is None else {"credential_provider": provider}))


def _profile() -> Any:
    """boto3's credentials where this user has profiles and no keys in the environment; obstore itself reads no profiles."""
    if "AWS_ACCESS_KEY_ID" in os.environ or not ("AWS_PROFILE" in os.environ or Path("~/.aws").expanduser().is_dir()):
        return None
    if find_spec("boto3") is None:
        if "AWS_PROFILE" in os.environ:
            raise ConfigError("AWS_PROFILE names a profile, which needs boto3: pip install 'emloc-ray[s3]'.")
        return None
    from obstore.auth.boto3 import Boto3CredentialProvider

    try:
        return Boto3CredentialProvider()
    except ValueError:  # boto3 finds none either
        return None
