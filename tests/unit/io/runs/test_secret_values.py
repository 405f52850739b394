"""Which names of a config say that a value is a secret: by their words, however these are joined."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import TrainingArguments

from emloc_ray.config.keys import config_keys
from emloc_ray.io.runs.secret_values import (
    HIDDEN,
    hide_secrets,
    is_secret,
    is_secret_name,
    without_secret,
    without_secrets,
)
from emloc_ray.modeling.adapter_methods import fields_of_all

# Those of https://github.com/Yelp/detect-secrets/blob/master/detect_secrets/plugins/keyword.py, and of clouds and hubs.
SECRETS = str.split("""
apikey api_key appkey app_key authkey auth_key servicekey service_key applicationkey application_key accountkey account_key
dbkey db_key databasekey database_key clientkey client_key aws_secret_access_key db_pass password passwd pass pwd
private_key privatekey priv_key privkey secret secrete secreto keypass token contrasena
auth_token authtoken access_key accesskey access_key_id connection_string connectionstring bearer passphrase client_secret
clientsecret sas_token credential credentials creds authorization hf_token dbpassword signing_key refresh_token dsn
webhook_url webhook slack_webhook kubeconfig otp totp
""")
PLAIN = str.split("""
max_new_tokens num_tokens tokens tokenizer tokenizer_name pad_token pad_token_id eos_token bos_token image_token special_tokens
loss_on num_virtual_tokens num_calibration_tokens min_expert_tokens keep keys monkey keyboard passes pass_through forward_pass
author authors secretary passage compass path bypass public_key design signal assignment data_author connection string
grid_rsa valid_dsa hotpot url
""")
STYLES: dict[str, Callable[[list[str]], str]] = {
    "snake": "_".join,
    "kebab": "-".join,
    "upper": lambda words: "_".join(words).upper(),
    "camel": lambda words: words[0] + "".join(word.title() for word in words[1:]),
    "pascal": lambda words: "".join(word.title() for word in words),
    "dotted": ".".join,
}
before = st.lists(st.sampled_from(["my", "hub", "azure", "s3", "the", "prod", "github", "x2"]), max_size=2)
style = st.sampled_from(sorted(STYLES))


@given(st.sampled_from(SECRETS), before, style)
def test_names_of_secrets(name: str, prefix: list[str], style: str) -> None:
    written = STYLES[style]([*prefix, *name.split("_")])
    assert is_secret_name(written), written


@given(st.sampled_from(PLAIN), style)
def test_names_that_only_look_alike(name: str, style: str) -> None:
    written = STYLES[style](name.split("_"))
    assert not is_secret_name(written), written


@pytest.mark.parametrize(
    "name", ["authToken", "accessKey", "APIKey", "AWSSecretAccessKey", "HFToken", "apiKEY", "x-api-key"]
)
def test_names_as_other_tools_write_them(name: str) -> None:
    assert is_secret((name,), "value")
    assert without_secrets({"a": {name: ["value"]}}) == {"a": {name: [HIDDEN]}}
    assert without_secret(f"a.{name}=value") == f"a.{name}={HIDDEN}"


@pytest.mark.parametrize("name", ["id_rsa", "ssh_id_ed25519", "ID_ECDSA"])
def test_names_of_files_of_keys(name: str) -> None:
    assert is_secret_name(name)


def test_numbers_are_secrets_too() -> None:
    """YAML reads a password of digits as a number."""
    given = {"runtime_env": {"password": 20240131, "pins": {"apiKey": [1.5]}, "pip_check": False, "token": None}}
    shown = {"runtime_env": {"password": HIDDEN, "pins": {"apiKey": [HIDDEN]}, "pip_check": False, "token": None}}
    assert without_secrets(given) == shown
    assert without_secret("ray.runtime_env.password=20240131") == f"ray.runtime_env.password={HIDDEN}"
    for key in ("resources", "ratios", "rank_pattern", "alpha_pattern"):
        named = {key: {"key": 2, "token": 0.5, "layers.1.attention.key": 8}}
        assert without_secrets(named) == named
    assert is_secret(("resources", "key"), "text")


@pytest.mark.parametrize(
    ("url", "is_so"),
    [
        ("https://account.blob.core.windows.net/c/d?sv=2020&sig=abc%3D", True),
        ("https://account.blob.core.windows.net/c/d?sig=abc%3D", True),
        ("https://bucket.s3.amazonaws.com/d?X-Amz-Date=1&X-Amz-Signature=abc", True),
        ("https://storage.googleapis.com/b/d?X-Goog-Signature=abc", True),
        ("s3://bucket/d?region=x&secret_access_key=abc", True),
        ("https://example.org/d?design=x&signal=1", False),
    ],
)
def test_urls_that_let_in_whoever_reads_them(url: str, is_so: bool) -> None:
    assert is_secret(("run_name",), url) == is_so


TOKENS = [
    "hf_" + "aBcDeFgHiJkLmNoPqR" + "sTuVwXyZaBcDeFgH",  # in parts, for those who look for tokens in code
    "AKIA" + "ABCDEFGH234567IJ",
    "ghp_" + "0123456789abcdefghij" + "0123456789ABCDEF",
    "github_pat_" + "0123456789A" * 7 + "01234",
    "glpat-" + "0123456789abcdefghij",
    "AIza" + "0123456789_-abcde" * 2 + "x",
    "sk-" + "0123456789abcdef" * 3,
    "sk-proj-" + "0123456789_-abcdef" * 4,
    "sk-ant-api03-" + "0123456789_-abcdef" * 4,
    "xoxb-" + "0123456789-0123456789-abcdef",
    "eyJhbGciOiJIUzI1NiIsInR5cCI6" + "." + "eyJzdWIiOiIxMjM0NTY3ODkwIiwi" + "." + "SflKxwRJSMeKKF2QT4",
]


@pytest.mark.parametrize("token", TOKENS)
def test_a_token_is_hidden_whatever_it_is_called(token: str) -> None:
    assert without_secrets({"run_name": f"of {token}"}) == {"run_name": HIDDEN}
    assert without_secret(f"finetune.run_name={token}") == f"finetune.run_name={HIDDEN}"
    assert without_secret(token) == HIDDEN
    assert hide_secrets(f"401: {token}, which is none.") == f"401: {HIDDEN}, which is none."


def test_a_text_without_its_secrets() -> None:
    said = "GET https://me:word@host/a?sv=1&sig=aBc%3D&part=2 failed (https://host/b?x=1 https://me@host/, Bearer aBc.d-efgh)"
    shown = (
        f"GET https://{HIDDEN}@host/a?sv=1&sig={HIDDEN}&part=2 failed (https://host/b?x=1 https://{HIDDEN}@host/,"
        f" Bearer {HIDDEN})"
    )
    assert hide_secrets(said) == shown
    key = "-----BEGIN OPENSSH " + "PRIVATE KEY-----\nb3Bl\n"
    assert hide_secrets(f"it holds {key}") == f"it holds {HIDDEN}"


@pytest.mark.parametrize(
    "text",
    [
        "hf_hub_download",
        "hf:some/data@subset:train",
        "sk-learn-contrib-and-what-else-there-is-in-it",
        "eyes.and.ears",
        "someone@example.org",
        "s3://bucket/run?region=eu-west-1",
        "0123456789abcdef" * 4,
        "Authorization: Basic is not taken",
        "",
    ],
)
def test_what_is_no_token(text: str) -> None:
    assert not is_secret(("run_name",), text)
    assert hide_secrets(text) == without_secret(text) == text


def test_of_all_keys_that_a_config_takes_the_hub_s_tokens_alone_are_secrets() -> None:
    ours = {key.name for section in config_keys() for key in section.keys}
    theirs = {field.name for field in dataclasses.fields(TrainingArguments)}
    secret = {name for name in ours | theirs | set(fields_of_all()) if is_secret_name(name)}
    assert secret <= {"hub_token", "push_to_hub_token"}
    assert "hub_token" in secret
