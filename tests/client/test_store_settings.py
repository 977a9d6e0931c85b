"""What S3 is told, from variables as people set them, forget them and copy them."""

import pytest

from batch_client.errors import CredentialsError, UsageError
from batch_client.store_settings import plain_http, s3_config

KEYS = {"AWS_ACCESS_KEY_ID": "AKIA", "AWS_SECRET_ACCESS_KEY": "a/b+c="}


@pytest.mark.parametrize(("environ", "wanted"), [
    ({}, {"region": "us-east-1"}),
    ({"AWS_REGION": "", "AWS_DEFAULT_REGION": "eu-west-1"}, {"region": "eu-west-1"}),
    ({"AWS_REGION": "eu-north-1", "AWS_DEFAULT_REGION": "eu-west-1"}, {"region": "eu-north-1"}),
    ({"AWS_ENDPOINT_URL": "http://127.0.0.1:9000"}, {"region": "us-east-1", "endpoint": "http://127.0.0.1:9000"}),
    ({"AWS_ENDPOINT_URL_S3": "https://a/x", "AWS_ENDPOINT_URL": "http://b"},
     {"region": "us-east-1", "endpoint": "https://a/x"}),
    ({"AWS_ENDPOINT": "http://c:1"}, {"region": "us-east-1", "endpoint": "http://c:1"}),
    ({"AWS_ENDPOINT_URL": "", "AWS_REGION": "eu-west-1"},
     {"region": "eu-west-1", "endpoint": "https://s3.eu-west-1.amazonaws.com"}),
])
def test_a_variable_that_is_empty_counts_as_none(environ, wanted):
    assert s3_config({**KEYS, **environ}, anonymous=False) == wanted
    assert s3_config({**KEYS, **environ}, anonymous=True) == {**wanted, "skip_signature": True}


@pytest.mark.parametrize("value", ["127.0.0.1:9000", "localhost:9000", "http://", "http://a b", "ftp://a", "s3://bucket",
                                   "http://user:secret@host:1\n"])
@pytest.mark.parametrize("name", ["AWS_ENDPOINT_URL_S3", "AWS_ENDPOINT_URL", "AWS_ENDPOINT"])
def test_an_endpoint_that_is_no_url_is_named_by_its_variable(name, value):
    with pytest.raises(UsageError, match=f"^{name} is no URL of a server: wanted one such as http") as error:
        s3_config({**KEYS, name: value}, anonymous=False)
    assert "secret" not in str(error.value)


@pytest.mark.parametrize("name", ["AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN"])
@pytest.mark.parametrize("value", ["hunter2\n", "hun ter2", "hunter2\u00e9", ""])
def test_credentials_that_no_request_can_carry_are_named_and_not_shown(name, value):
    environ = {**KEYS, name: value}
    wanted = f"^{name} is empty, or has white space or other signs .* or unset it$"
    with pytest.raises(CredentialsError, match=wanted) as error:
        s3_config(environ, anonymous=False)
    assert "hun" not in str(error.value)
    assert s3_config(environ, anonymous=True)["skip_signature"]  # they are not sent


@pytest.mark.parametrize("name", ["AWS_REGION", "AWS_DEFAULT_REGION"])
def test_a_region_that_no_request_can_carry_is_said(name):
    with pytest.raises(UsageError, match=r"^the region in AWS_REGION or AWS_DEFAULT_REGION has white space"):
        s3_config({**KEYS, name: "eu-west-1\n"}, anonymous=False)


def test_an_empty_endpoint_is_refused_where_the_bucket_is_in_the_host():
    with pytest.raises(UsageError, match=r"^AWS_ENDPOINT_URL is empty: unset it$"):
        s3_config({**KEYS, "AWS_ENDPOINT_URL": "", "AWS_VIRTUAL_HOSTED_STYLE_REQUEST": "true"}, anonymous=False)


def test_only_an_endpoint_that_somebody_has_named_so_goes_without_tls():
    assert not plain_http({**KEYS, "AWS_ENDPOINT_URL": "https://host"})
    assert plain_http({"AWS_ENDPOINT_URL": "http://host"})
    assert plain_http({"AZURE_STORAGE_ENDPOINT": "http://host"})
