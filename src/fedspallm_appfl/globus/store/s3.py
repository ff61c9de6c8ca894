"""Objects of a data store in an S3 bucket, or at an S3-compatible service.

Only the server has credentials. For every task it signs a link for each object that the client may read or write, valid for
that object, that verb and some time. A site needs no account and no S3 library, and cannot reach objects of others.
"""

import logging
from collections.abc import Iterable, Mapping
from contextlib import closing
from typing import Any
from urllib.parse import urlsplit

from fedspallm_appfl.globus.store.objects import PREFIX

LONGEST = 7 * 24 * 3600  # maximum lifetime of a link in seconds, by the definition of the signature
TRIES = 5
TIMEOUT = (30, 300)  # seconds to connect, and without a byte
FORBIDDEN, MISSING = 403, 404
VERBS = {"get": "get_object", "put": "put_object"}


class Bucket:
    """The server's side. boto3 finds credentials and region: environment, files, the machine's role."""

    def __init__(self, settings: Mapping[str, Any], run: str) -> None:
        self._bucket, self._run = str(settings["bucket"]), run
        self._client = _client(settings.get("url"))
        try:
            region = self._client.head_bucket(Bucket=self._bucket).get("BucketRegion")
        except self._client.exceptions.ClientError as error:
            if error.response["ResponseMetadata"]["HTTPStatusCode"] == MISSING:
                raise FileNotFoundError("there is no such bucket") from error
            raise
        if region and region != self._client.meta.region_name:  # a link is signed for one region
            self._client = _client(settings.get("url"), region)

    def put(self, name: str, data: bytes) -> None:
        """Place an object, in place of an earlier one of that name."""
        self._client.put_object(**self._where(name), Body=data)

    def get(self, name: str, most: int | None = None) -> bytes | None:
        """Read an object; of one that is too large, only the beginning; None if there is none."""
        try:
            with closing(self._client.get_object(**self._where(name))["Body"]) as body:
                return body.read(None if most is None else most + 1)
        except self._client.exceptions.NoSuchKey:
            return None

    def evict(self, name: str) -> None:
        """Remove an object if it is there."""
        self._client.delete_object(**self._where(name))

    def clear(self, names: Iterable[str]) -> None:
        """Remove all objects whose keys begin with the run's name, and no others."""
        listed = self._client.get_paginator("list_objects_v2")
        for page in listed.paginate(Bucket=self._bucket, Prefix=f"{PREFIX}/{self._run}/"):
            for found in page.get("Contents", ()):
                self._client.delete_object(Bucket=self._bucket, Key=found["Key"])

    def close(self) -> None:
        """Let go of the connections."""
        self._client.close()

    def links(self, reads: Iterable[str], writes: Iterable[str], seconds: float | None) -> dict[str, dict[str, str]]:
        """Links for a site.

        Args:
            reads: names of objects that it may read.
            writes: names of objects that it may write.
            seconds: how long they are valid; None for the maximum.

        Returns:
            `get` and `put`: name -> link. A valid link works like a credential.
        """
        until = LONGEST if seconds is None else min(LONGEST, int(seconds) + 1)
        return {
            verb: {
                name: self._client.generate_presigned_url(VERBS[verb], Params=self._where(name), ExpiresIn=until)
                for name in names
            }
            for verb, names in (("get", reads), ("put", writes))
        }

    def _where(self, name: str) -> dict[str, str]:
        return {"Bucket": self._bucket, "Key": f"{PREFIX}/{self._run}/{name}"}


class Links:
    """A site's side: reads and writes only objects that it has links for."""

    def __init__(self, links: Mapping[str, Mapping[str, str]]) -> None:
        import requests
        from requests.adapters import HTTPAdapter
        from urllib3.util import Retry

        retry = Retry(TRIES, backoff_factor=1, status_forcelist=(500, 502, 503, 504), raise_on_status=False)
        logging.getLogger("urllib3.connectionpool").addFilter(_without_links)  # it logs what it retries
        self._links = links
        self._session = requests.Session()
        self._session.auth = lambda request: request  # otherwise requests would send a password from ~/.netrc
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(max_retries=retry))

    def put(self, name: str, data: bytes) -> None:
        """Place an object, in place of an earlier one of that name."""
        self._ask("put", name, data)

    def get(self, name: str, most: int | None = None) -> bytes | None:
        """Read an object of the server, of any size; None if there is none."""
        return self._ask("get", name)

    def close(self) -> None:
        """Let go of the connections."""
        self._session.close()

    def _ask(self, verb: str, name: str, data: bytes | None = None) -> bytes | None:
        import requests

        link = self._links[verb].get(name)
        if link is None:
            raise PermissionError(f"the server gave no link to {verb} {name}")
        host = urlsplit(link).netloc
        try:
            answer = self._session.request(verb, link, data=data, timeout=TIMEOUT, allow_redirects=False)
        except requests.RequestException as error:  # its message holds the link, which is a secret
            raise ConnectionError(f"{type(error).__name__}: no answer from {host}") from None
        if verb == "get" and answer.status_code == MISSING:
            return None
        if not 200 <= answer.status_code < 300:  # noqa: PLR2004 - a redirection would lose the signature
            hint = "; has the link expired?" if answer.status_code == FORBIDDEN else ""
            raise ConnectionError(f"{host} answers {answer.status_code} {answer.reason}{hint}")
        return answer.content


def _without_links(record: logging.LogRecord) -> bool:
    """Whether a message may be logged: a link is a secret."""
    return "X-Amz-Signature" not in record.getMessage()


def _client(url: str | None, region: str | None = None) -> Any:
    import boto3
    from botocore.config import Config

    # Checksums only if S3 requires them: compatible services refuse the newer ones.
    plain = {"request_checksum_calculation": "when_required", "response_checksum_validation": "when_required"}
    config = Config(signature_version="s3v4", retries={"mode": "standard", "total_max_attempts": TRIES}, **plain)
    return boto3.client("s3", endpoint_url=url, region_name=region, config=config)
