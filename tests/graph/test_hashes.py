"""What a rewritten model says of its input."""

from __future__ import annotations

import hashlib

import pytest
from ffnfold.graph import hashes
from ffnfold.graph.hashes import InputHash


def entries(path):
    found = InputHash(path, [])
    try:
        return found.entries()
    finally:
        found.close()


def test_a_file_is_known_by_its_sha256(tmp_path):
    path = tmp_path / "model.onnx"
    path.write_bytes(b"0123456789")
    assert entries(path) == {"input_sha256": hashlib.sha256(b"0123456789").hexdigest()}


@pytest.mark.parametrize("content", [b"0123456789", b"01234567"])
def test_a_large_one_by_those_of_its_pieces(tmp_path, monkeypatch, content):
    monkeypatch.setattr(hashes, "_PIECE", 4)
    path = tmp_path / "model.onnx"
    path.write_bytes(content)
    pieces = [hashlib.sha256(content[start:start + 4]).digest() for start in range(0, len(content), 4)]
    assert entries(path) == {"input_pieces_sha256": hashlib.sha256(b"".join(pieces)).hexdigest()}
