"""The page's own files: compressed for whoever takes that, and not sent again while they are the same."""

import gzip

import pytest
from flask import Flask
from flask.testing import FlaskClient

from web.pages import static_file

SCRIPT = "/static/js/chat/main.js"


@pytest.fixture
def client() -> FlaskClient:
    """Of an app that has its files, and nothing else."""
    app = Flask(__name__, static_folder=None)
    app.add_url_rule("/static/<path:filename>", view_func=static_file)
    return app.test_client()


@pytest.mark.parametrize("encodings", ["gzip", "br, gzip;q=0.5", "*"])
def test_compressed(client: FlaskClient, encodings: str) -> None:
    plain, zipped = client.get(SCRIPT), client.get(SCRIPT, headers={"Accept-Encoding": encodings})
    assert "Content-Encoding" not in plain.headers and zipped.headers["Content-Encoding"] == "gzip"
    assert gzip.decompress(zipped.data) == plain.data and len(zipped.data) < len(plain.data) / 2
    assert zipped.mimetype == plain.mimetype == "text/javascript"
    # A proxy keeps both, and a browser that has one of them does not learn that it is the other.
    assert "Accept-Encoding" in plain.headers["Vary"] and "Accept-Encoding" in zipped.headers["Vary"]
    assert plain.headers["ETag"] != zipped.headers["ETag"]
    again = client.get(SCRIPT, headers={"Accept-Encoding": encodings, "If-None-Match": zipped.headers["ETag"]})
    assert (again.status_code, again.data) == (304, b"")


@pytest.mark.parametrize("encodings", ["", "identity", "gzip;q=0", "br"])
def test_not_compressed(client: FlaskClient, encodings: str) -> None:
    response = client.get(SCRIPT, headers={"Accept-Encoding": encodings})
    assert "Content-Encoding" not in response.headers and b"import" in response.data
