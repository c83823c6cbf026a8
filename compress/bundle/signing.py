"""Signatures of manifests with the user's own Ed25519 key, through the package cryptography."""

from pathlib import Path

from compress.catalog import missing_package
from compress.errors import ArtifactError

_HOW = "`openssl genpkey -algorithm ed25519 -out key.pem` makes one."


def sign(content: bytes, key_file: Path) -> bytes:
    """Return the 64 bytes of a signature, which depend only on key and content.

    Args:
        content: Bytes to sign.
        key_file: Private key in PEM form, not encrypted.

    Raises:
        PackageMissing: The package cryptography is not installed.
        ArtifactError: The key cannot be read, is encrypted, or is of another kind.
    """
    try:
        from cryptography.exceptions import UnsupportedAlgorithm  # an extra: most bundles are not signed
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise missing_package(["cryptography"], "--sign") from error
    try:
        key = load_pem_private_key(key_file.read_bytes(), password=None)
    except OSError as error:
        raise ArtifactError(f"Key '{key_file}' must be a readable file: {error.strerror or error}.") from error
    except TypeError as error:
        raise ArtifactError(
            f"Key '{key_file}' must not be encrypted.",
            hint=f"`openssl pkey -in {key_file} -out plain.pem` decrypts it.",
        ) from error
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ArtifactError(f"'{key_file}' must hold a private key in PEM form.", hint=_HOW) from error
    if not isinstance(key, Ed25519PrivateKey):
        kind = type(key).__name__.replace("PrivateKey", "").strip("_")
        raise ArtifactError(f"Key '{key_file}' must be an Ed25519 key, it is a key of {kind}.", hint=_HOW)
    return key.sign(content)
