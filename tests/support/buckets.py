"""Buckets of the S3 server that everybody may read."""

import json

import boto3

from batch_client.demo.objectstore import REGION


def create_public(server, name):
    """Create bucket `name` of a SeaweedServer, or find it there, listed and read without credentials."""
    server.create_bucket(name)
    client = boto3.client("s3", endpoint_url=server.endpoint_url, region_name=REGION,
                          aws_access_key_id=server.access_key, aws_secret_access_key=server.secret_key)
    client.put_bucket_policy(Bucket=name, Policy=json.dumps({"Version": "2012-10-17", "Statement": [{
        "Effect": "Allow",
        "Principal": "*",
        "Action": ["s3:GetObject", "s3:ListBucket"],
        "Resource": [f"arn:aws:s3:::{name}", f"arn:aws:s3:::{name}/*"],
    }]}))
