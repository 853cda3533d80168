"""The page's own files: compressed for whoever takes that, and not sent again while they are the same."""

import gzip

import pytest

from app import create_app
from config import Settings

SCRIPT = "/static/js/chat/main.js"


@pytest.mark.parametrize("encodings", ["gzip", "br, gzip;q=0.5", "*"])
def test_compressed(encodings: str) -> None:
    client = create_app(Settings()).test_client()
    plain, zipped = client.get(SCRIPT), client.get(SCRIPT, headers={"Accept-Encoding": encodings})
    assert "Content-Encoding" not in plain.headers and zipped.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(zipped.data) == plain.data and len(zipped.data) < len(plain.data) / 2
    assert zipped.mimetype == plain.mimetype == "text/javascript"
    # A proxy keeps both, and a browser that has one of them is not told that it is the other.
    assert "Accept-Encoding" in plain.headers["Vary"] and "Accept-Encoding" in zipped.headers["Vary"]
    assert plain.headers["ETag"] != zipped.headers["ETag"]
    again = client.get(SCRIPT, headers={"Accept-Encoding": encodings, "If-None-Match": zipped.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


@pytest.mark.parametrize("encodings", ["", "identity", "gzip;q=0", "br"])
def test_not_compressed(encodings: str) -> None:
    response = create_app(Settings()).test_client().get(SCRIPT, headers={"Accept-Encoding": encodings})
    assert "Content-Encoding" not in response.headers and b"import" in response.data
