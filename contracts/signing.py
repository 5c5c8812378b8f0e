"""Ed25519 signatures with keys in PEM files, the format of `openssl genpkey -algorithm ed25519`."""

import os
from pathlib import Path

from cryptography.exceptions import InvalidSignature, UnsupportedAlgorithm
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey
from cryptography.hazmat.primitives.serialization import (
    Encoding,
    NoEncryption,
    PrivateFormat,
    PublicFormat,
    load_pem_private_key,
    load_pem_public_key,
)

from mixfuse.contracts.bounded_json import open_regular
from mixfuse.contracts.errors import MixfuseError
from mixfuse.contracts.files import disk_errors, write_text

_MOST_BYTES = 1 << 16  # a key has some hundred


def generate(path: Path) -> Path:
    """Creates a key pair: the private key at `path`, readable by its owner only, and the public key beside it (`.pub`).

    Returns:
        The path of the public key.

    Raises:
        MixfuseError: Either file exists already, or cannot be written.
    """
    public = path.with_name(path.name + ".pub")
    for file in (path, public):
        if file.exists():
            raise MixfuseError(f"{file} exists already; a key is never overwritten, choose another name")
    key = Ed25519PrivateKey.generate()
    with disk_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "wb") as stream:
            stream.write(key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption()))
    write_text(public, _pem(key.public_key()))
    return public


def sign(message: bytes, key: Path) -> tuple[str, str]:
    """Signs with the private key in a PEM file.

    Returns:
        The public key and the signature, in hex.

    Raises:
        MixfuseError: The file is missing or not an unencrypted Ed25519 private key.
    """
    try:
        private = load_pem_private_key(_read(key), password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm):
        private = None
    if not isinstance(private, Ed25519PrivateKey):
        raise MixfuseError(f"{key} is no unencrypted Ed25519 private key; make one with: mixfuse adapter keygen FILE")
    return private.public_key().public_bytes_raw().hex(), private.sign(message).hex()


def public_key(source: bytes | Path) -> Ed25519PublicKey:
    """Reads a public key: PEM, from a file or as bytes.

    Raises:
        MixfuseError: The file is missing or not an Ed25519 public key.
    """
    try:
        key = load_pem_public_key(source if isinstance(source, bytes) else _read(source))
    except (ValueError, UnsupportedAlgorithm):
        key = None
    if not isinstance(key, Ed25519PublicKey):
        name = "the trusted key" if isinstance(source, bytes) else source
        raise MixfuseError(f"{name} is no Ed25519 public key (PEM); `mixfuse adapter keygen` writes one as FILE.pub")
    return key


def from_hex(key: str) -> Ed25519PublicKey:
    """A public key of 32 bytes, in hex."""
    return Ed25519PublicKey.from_public_bytes(bytes.fromhex(key))


def is_signed(message: bytes, signature: str, by: Ed25519PublicKey) -> bool:
    """Whether the key made this signature (in hex) of this message."""
    try:
        by.verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True


def _read(path: Path) -> bytes:
    try:
        with open_regular(Path(path)) as stream:
            return stream.read(_MOST_BYTES)
    except MixfuseError as error:
        raise MixfuseError(f"{path}: the key cannot be read: {str(error).removeprefix(f'{path}: ')}") from None


def _pem(key: Ed25519PublicKey) -> str:
    return key.public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo).decode()
