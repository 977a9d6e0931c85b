"""What a store is told, from the variables that people have for it: what obstore does not read itself, or takes for
something that it is not.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from batch_client.errors import CredentialsError, UsageError, in_one_line

__all__ = ["plain_http", "s3_config"]

# In the order in which they count; obstore reads the last two itself, an empty one too.
_S3_ENDPOINTS = ("AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT")
_ENDPOINTS = (*_S3_ENDPOINTS, "AZURE_STORAGE_ENDPOINT", "AZURE_ENDPOINT")
_S3_SECRETS = ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN")
_REGION = "us-east-1"


def plain_http(environ: Mapping[str, str]) -> bool:
    """Whether an endpoint may be asked without TLS: one that somebody has named so."""
    return any(environ.get(name, "").startswith("http://") for name in _ENDPOINTS)


def s3_config(environ: Mapping[str, str], *, anonymous: bool) -> dict[str, Any]:
    """Endpoint, region and credentials of S3, as obstore's `S3Config`; an endpoint or a region that is empty counts as
    none.

    Raises UsageError for an endpoint or a region that is none, CredentialsError for credentials that can't be read or
    sent.
    """
    config: dict[str, Any] = {"region": _REGION}
    if anonymous:
        config["skip_signature"] = True
    elif environ.get("AWS_PROFILE"):
        config |= _profile_config(environ["AWS_PROFILE"])
    else:
        _require_whole_secrets(environ)
    if region := environ.get("AWS_REGION") or environ.get("AWS_DEFAULT_REGION"):
        if not re.fullmatch("[!-~]+", region):
            raise UsageError("the region in AWS_REGION or AWS_DEFAULT_REGION has white space or other signs in it: "
                             "wanted one such as eu-west-1")
        config["region"] = region
    if endpoint := _endpoint(environ):
        config["endpoint"] = endpoint
    elif empty := [name for name in _S3_ENDPOINTS if name in environ]:
        if environ.get("AWS_VIRTUAL_HOSTED_STYLE_REQUEST"):
            raise UsageError(f"{empty[0]} is empty: unset it")  # what would take its place has the bucket in it
        config["endpoint"] = f"https://s3.{config['region']}.amazonaws.com"  # obstore's own, where it reads none
    return config


def _endpoint(environ: Mapping[str, str]) -> str:
    name = next((name for name in _S3_ENDPOINTS if environ.get(name)), "")
    endpoint = environ.get(name, "")
    if endpoint and not re.fullmatch(r"https?://[^\s/?#]+(/[^\s?#]*)?", endpoint):
        # It may have a password, and is not shown.
        raise UsageError(f"{name} is no URL of a server: wanted one such as http://127.0.0.1:9000")
    return endpoint


def _require_whole_secrets(environ: Mapping[str, str]) -> None:
    for name in _S3_SECRETS:
        if not re.fullmatch("[!-~]+", environ.get(name, "unset")):
            raise CredentialsError(f"{name} is empty, or has white space or other signs in it, such as a line break at "
                                   "its end: wanted the key alone, or unset it")


def _profile_config(profile: str) -> dict[str, Any]:
    """Credentials and region of an AWS profile."""
    # obstore does not read AWS profiles; boto3 knows profiles, roles and single sign-on.
    try:
        import boto3  # noqa: PLC0415 - an optional dependency, wanted only here
        from botocore.exceptions import BotoCoreError  # noqa: PLC0415 - comes with boto3
        from obstore.auth.boto3 import Boto3CredentialProvider  # noqa: PLC0415 - needs boto3
    except ImportError as error:
        raise CredentialsError(f'AWS_PROFILE is {profile!r} and boto3 is not here to read it: '
                               'pip install "batch-client[aws]", or unset it') from error
    try:
        session = boto3.Session(profile_name=profile)
        known = {} if session.region_name is None else {"region": session.region_name}
        return {"credential_provider": Boto3CredentialProvider(session), **known}
    except (BotoCoreError, ValueError) as error:
        raise CredentialsError(f"AWS_PROFILE {profile!r}: {in_one_line(error)}") from error
