"""Files of a corpus at an address: `https://…`, `s3://…`, `hf://datasets/…`, whatever fsspec has a reader for.

An address is read like a file: in one pass, nothing is stored on this machine.  Folders and globs work where the
protocol can list; the web cannot.  What tells whether a file has changed is what its server says of it (fsspec's
`ukey`: version, ETag, time, size).  A read that fails, after fsspec's own retries, ends the command with the place;
what was prepared until then is kept, and the same command goes on from there.
"""

from __future__ import annotations

import hashlib
import io
from dataclasses import dataclass
from typing import Any, NoReturn
from urllib.parse import urlsplit

from engine.errors import OctantError, RequestError

WEB = ("http", "https")


class Disconnected(OctantError):
    """Reading at an address broke off.  Nothing is wrong with the data, so no option skips it."""


@dataclass(frozen=True)
class RemoteFile:
    """What is known before reading: where it is, what it is called there, its bytes (0: unknown) and its version."""

    address: str
    name: str
    num_bytes: int
    version: int


def is_remote(name: str) -> bool:
    """Whether it is an address."""
    return "://" in name


def remote_files(address: str) -> list[RemoteFile]:
    """The files that an address stands for: itself, what its folder holds, or what its glob matches.

    Raises:
        RequestError: nothing is there, it cannot be reached, or no installed package reads this protocol.
    """
    fsspec = _fsspec(address)
    try:
        system, path = fsspec.core.url_to_fs(address)
        files = [_file(system, found) for found in _matching(system, path, urlsplit(address).scheme)]
    except FileNotFoundError:
        raise RequestError(f"input {address} does not exist") from None
    except Exception as error:                               # of a network, of credentials, of a protocol's own package
        raise RequestError(f"input {address} cannot be reached: {_reason(error)}") from None
    return files


def open_remote(address: str) -> io.BufferedIOBase:
    """The file at an address, for reading.

    Raises:
        Disconnected: it cannot be opened; or later, reading broke off.
    """
    try:
        return _Named(_fsspec(address).open(address, "rb").open(), address)
    except RequestError:
        raise
    except Exception as error:
        raise Disconnected(f"{address} cannot be opened: {_reason(error)}") from None


class _Named(io.BufferedIOBase):
    """A remote file whose failures say which file it was."""

    def __init__(self, raw: Any, address: str) -> None:
        self._raw, self._address, self._position = raw, address, 0

    def read(self, size: int | None = -1, /) -> bytes:
        try:
            data = bytes(self._raw.read(-1 if size is None else size))
        except Exception as error:
            self._fail(error)
        self._position += len(data)
        return data

    def seek(self, offset: int, whence: int = 0, /) -> int:
        self._position = int(self._raw.seek(offset, whence))
        return self._position

    def tell(self) -> int:
        return self._position

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return bool(self._raw.seekable())

    def close(self) -> None:
        self._raw.close()
        super().close()

    def _fail(self, error: Exception) -> NoReturn:
        raise Disconnected(f"{self._address}: reading broke off at byte {self._position:,} ({_reason(error)}); the "
                           "same command goes on from what is finished") from None


def _matching(system: Any, path: str, protocol: str) -> list[str]:
    if protocol in WEB:
        return [path]
    if not system.isdir(path):
        globbed = any(mark in path for mark in "*?[")
        return [name for name in sorted(system.glob(path)) if "/." not in name] if globbed else [path]
    return [found for found in sorted(system.find(path))
            if not any(part[:1] in "_." for part in found.removeprefix(path).strip("/").split("/"))]


def _file(system: Any, path: str) -> RemoteFile:
    info = system.info(path)
    version = int.from_bytes(hashlib.sha256(str(system.ukey(path)).encode()).digest()[:7], "little")
    return RemoteFile(system.unstrip_protocol(path), urlsplit(path).path, int(info.get("size") or 0), version)


def _fsspec(address: str) -> Any:
    """The package, once it is certain that it can read this protocol."""
    protocol = address.partition("://")[0]
    try:
        import fsspec
    except ImportError:
        raise RequestError(f"input {address}: an address is read with the package fsspec: pip install 'octant[data]'") \
            from None
    if protocol not in fsspec.available_protocols():
        raise RequestError(f"input {address}: no package reads {protocol}://; known are https, s3, gs, hf and "
                           f"{len(fsspec.available_protocols()) - 4} more of fsspec's")
    try:
        fsspec.get_filesystem_class(protocol)
    except ImportError as error:
        raise RequestError(f"input {address}: {protocol}:// needs a package that is not installed: {error}") from None
    return fsspec


def _reason(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]:.300}" if text else type(error).__name__
