"""Which values of a config nobody should read in a run's files, and configs and commands without them."""

import functools
import json
import re
from collections.abc import Iterator
from typing import Any

HIDDEN = "(hidden)"
_ENVIRONMENT = "env_vars"
# Sections whose keys name hardware, or layers: their numbers are no secrets.
_COUNTS = {"resources", "ratios", "rank_pattern", "alpha_pattern"}
# A user, whose token may stand alone; and the names of a URL's options, which may be keys or signatures, as of Azure's SAS.
_SECRET_USER = re.compile(r"(?<=http://)[^/\s@]+@|(?<=https://)[^/\s@]+@|(?<=://)[^/\s@]+:[^/\s@]+@", re.IGNORECASE)
_OPTION = re.compile(r"(?<=[?&])([^=&#\s]+)=([^&#\s\"'<>]*)")
# Tokens that tell what they are, of those in https://github.com/gitleaks/gitleaks/blob/master/config/gitleaks.toml: of hubs, of
# clouds, of OpenAI, Anthropic and Slack, a JSON web token, and the begin of a private key.
_TOKEN = re.compile(
    r"\b(hf_[A-Za-z]{34}|api_org_[A-Za-z]{34}|gh[pousr]_[A-Za-z0-9]{36}|github_pat_\w{82}|glpat-[\w-]{20}"
    r"|(AKIA|ASIA|ABIA|ACCA)[A-Z2-7]{16}|AIza[\w-]{35}|LTAI[A-Za-z0-9]{20}"
    r"|sk-(ant|proj|svcacct|admin)-[\w-]{40,}|sk-[A-Za-z0-9]{40,}|xox[abeprs]-[0-9]{10,13}-[\w-]{10,}"
    r"|ey[A-Za-z0-9]{17,}\.ey[\w/\\-]{17,}\.[\w/\\-]{10,}={0,2})"
    r"|-----BEGIN[ A-Z0-9_-]{0,100}PRIVATE KEY.*",
    re.DOTALL,
)
_BEARER = re.compile(r"\b(Bearer|Authorization: Basic) +[\w.~+/-]{8,}=*")
# The words of https://github.com/Yelp/detect-secrets/blob/master/detect_secrets/plugins/keyword.py and of the rule
# generic-api-key in https://github.com/gitleaks/gitleaks/blob/master/config/gitleaks.toml, and what clouds call theirs.
_SECRET_WORD = re.compile(
    r"\w*(password|passwd|pwd|passphrase|passcode|secret|credential)s?|secrete|secreto|contrase[nñ]a|creds?|bearer|authorization"
    r"|keypass|dsn|jwt|cookie|kubeconfig|[ht]?otp|webhook(s|ur[il])?"
)
_SECRET_LAST = {"token", "key", "pass", "auth", "pat", "sas", "sig", "signature"}
_SECRET_PAIR = re.compile(
    r"(api|app|application|auth|access|private|priv|secret|service|account|client|shared|storage|master|signing|encryption"
    r"|database|db|ssh|subscription)keys?|(auth|oauth|access|refresh|session|bearer|api|sas|security)tokens?"
    r"|connection(string|str)|connstr|dbpass|(^|ssh)id(rsa|dsa|ecdsa|ed25519)$"
)
_NO_SECRET_BEFORE = {  # what says that a token or a key is of a text, of a table or for all to see
    "token": {
        "pad",
        "eos",
        "bos",
        "unk",
        "sep",
        "cls",
        "mask",
        "image",
        "video",
        "audio",
        "special",
        "boi",
        "eoi",
        "stop",
    },
    "key": {"public", "primary", "foreign", "sort", "prng"},
    "pass": {"forward", "backward"},
}
_WORD_ENDS = re.compile(r"(?<=[a-z0-9])(?=[A-Z])|(?<=[A-Z])(?=[A-Z][a-z])|[\W_]+")


def leaves(value: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """The single values in a config, each with the keys that lead to it."""
    if isinstance(value, dict):
        for key, item in value.items():
            yield from leaves(item, (*path, str(key)))
    elif isinstance(value, list):
        for item in value:
            yield from leaves(item, path)
    else:
        yield path, value


def is_variable(path: tuple[str, ...]) -> bool:
    """Whether a value is an environment variable's, which may be a secret whatever its name."""
    return _ENVIRONMENT in path


def is_secret(path: tuple[str, ...], value: Any) -> bool:
    """Whether the keys that lead to a text or a number say that it is a token, a key or a password, or it looks like one, or
    is a URL that holds one. A number of Ray's resources or a layer's rank is none, whatever that is called."""
    if isinstance(value, str):
        options = [name for name, _ in _OPTION.findall(value)] if "://" in value else []
        shown = _TOKEN.search(value) or _SECRET_USER.search(value)
        return value != "" and (shown is not None or any(map(is_secret_name, (*path, *options))))
    is_number = isinstance(value, int | float) and not isinstance(value, bool)
    return is_number and _COUNTS.isdisjoint(path) and any(map(is_secret_name, path))


@functools.cache
def is_secret_name(name: str) -> bool:
    """Whether the words of a key, in snake_case, camelCase or kebab-case, say that it holds a secret."""
    words = [word.lower() for word in _WORD_ENDS.split(name) if word]
    if any(_SECRET_WORD.fullmatch(word) for word in words) or _SECRET_PAIR.search("".join(words)):
        return True
    before, last = [None, None, *words][-2:]
    return last in _SECRET_LAST and before not in _NO_SECRET_BEFORE.get(last, ())


def without_secrets(value: Any, path: tuple[str, ...] = ()) -> Any:
    """A config with :data:`HIDDEN` for its secrets and for the values of environment variables."""
    if isinstance(value, dict):
        return {key: without_secrets(item, (*path, str(key))) for key, item in value.items()}
    if isinstance(value, list):
        return [without_secrets(item, path) for item in value]
    return HIDDEN if (is_variable(path) and value) or is_secret(path, value) else value


def without_secret(word: str) -> str:
    """A word of a command line; of ``key.path=value``, the value as :func:`without_secrets` shows it."""
    from emloc_ray.io.formats.yaml_text import read_yaml  # the GPU's benchmark does without ruamel.yaml

    key, equals, text = word.partition("=")
    if not equals:
        return hide_secrets(word)
    try:
        value = read_yaml(text)
    except ValueError:
        value = text
    shown = without_secrets(value, tuple(key.split(".")))
    if shown == value:
        return word
    return f"{key}={shown if isinstance(shown, str) else json.dumps(shown, ensure_ascii=False, default=str)}"


def hide_secrets(text: str) -> str:
    """A text, such as an error's, with :data:`HIDDEN` for what looks like a token, and for what is secret in its URLs."""
    text = _SECRET_USER.sub(f"{HIDDEN}@", _BEARER.sub(rf"\1 {HIDDEN}", _TOKEN.sub(HIDDEN, text)))
    if "://" not in text:
        return text
    return _OPTION.sub(lambda option: f"{option[1]}={HIDDEN}" if is_secret_name(option[1]) else option[0], text)
