"""An S3 service on 127.0.0.1, by moto; it checks neither who signs nor until when a link is good."""

from contextlib import contextmanager

import boto3
import requests
from moto.server import ThreadedMotoServer

BUCKET = "of-the-experiment"
REGION = "eu-central-1"  # not the one that boto3 takes if it is told nothing


@contextmanager
def s3_service():
    """Its address; it has one bucket."""
    service = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    service.start()
    try:
        host, port = service.get_host_and_port()
        url = f"http://{host}:{port}"
        requests.post(f"{url}/moto-api/reset", timeout=10)  # its buckets outlive it
        where = {"LocationConstraint": REGION}
        client(url).create_bucket(Bucket=BUCKET, CreateBucketConfiguration=where)
        yield url
    finally:
        service.stop()


def client(url):
    return boto3.client(
        "s3", endpoint_url=url, region_name=REGION, aws_access_key_id="server", aws_secret_access_key="secret"
    )


def keys(url):
    return sorted(found["Key"] for found in client(url).list_objects_v2(Bucket=BUCKET).get("Contents", ()))
