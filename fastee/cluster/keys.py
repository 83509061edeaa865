"""CURVE keys: what a node needs to prove who it is and to know who may talk to it."""

from __future__ import annotations

import os
import re
from pathlib import Path

import msgspec

from fastee.errors import ClusterError


class Keys(msgspec.Struct, frozen=True):
    """A CURVE key pair in Z85 (40 characters each); the secret one never leaves its machine."""

    public: str
    secret: str

    def __repr__(self) -> str:
        return f"Keys(public={self.public!r}, secret=...)"


_Z85 = "0123456789abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ.-:+=^!/*?&<>()[]{}@%$#"
_KEY = re.compile(f"[{re.escape(_Z85)}]{{40}}")


def raw_key(text: str) -> bytes:
    """Return the 32 bytes of a Z85 key; raises ``ValueError`` for anything else."""
    if not _KEY.fullmatch(text):
        raise ValueError(f"key: expected 40 characters of Z85, got {len(text)} characters")
    out = b""
    for at in range(0, 40, 5):
        value = 0
        for character in text[at : at + 5]:
            value = value * 85 + _Z85.index(character)
        if value >> 32:
            raise ValueError("key: not a Z85 key")
        out += value.to_bytes(4, "big")
    return out


def make_keys() -> Keys:
    """Return a new key pair."""
    from fastee import native
    from fastee.cluster.native_endpoint import libraries

    if not hasattr(native.core, "curve_keypair"):
        raise ClusterError(f"cluster: keys need the native part: {native.reason.get('_C', 'not on this system')}")
    try:
        return Keys(*native.core.curve_keypair(libraries()))
    except RuntimeError as error:
        raise ClusterError(str(error)) from None


def save_keys(keys: Keys, path: str | os.PathLike) -> None:
    """Write a key pair to a new file that only its owner may read; raises ``FileExistsError`` rather than replace one."""
    text = f'# A fastee node\'s keys. Keep this file on its machine; give the public key to the others.\npublic = "{keys.public}"\nsecret = "{keys.secret}"\n'
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def load_keys(path: str | os.PathLike) -> Keys:
    """Read what :func:`save_keys` wrote; raises ``ClusterError`` when others may read the file or it holds no keys."""
    mode = os.stat(path).st_mode
    if mode & 0o077:
        raise ClusterError(f"cluster: {os.fspath(path)} holds a secret key but its mode is {mode & 0o777:o}; run `chmod 600` on it")
    try:
        keys = msgspec.toml.decode(Path(path).read_bytes(), type=Keys)
        raw_key(keys.public), raw_key(keys.secret)
    except (msgspec.DecodeError, UnicodeError, ValueError) as error:
        raise ClusterError(f"cluster: {os.fspath(path)} holds no keys: {error}") from None
    return keys


def load_allowed(path: str | os.PathLike) -> dict[str, str]:
    """Read an allow-list, a TOML file of ``name = "public key"`` lines, and return public key -> name."""
    try:
        table = msgspec.toml.decode(Path(path).read_bytes(), type=dict[str, str])
        for key in table.values():
            raw_key(key)
    except (msgspec.DecodeError, UnicodeError, ValueError) as error:
        raise ClusterError(f"cluster: {os.fspath(path)} is no allow-list: {error}") from None
    return {key: name for name, key in table.items()}
