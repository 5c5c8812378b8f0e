"""Sessions of the page: an API key or the admin key becomes a cookie, and each form carries a token against forgery.

The cookie holds the key encrypted (Fernet): it is useless anywhere else and after its time. Its secret is in the
database: all workers and gateways that share the database share the sessions, and a key that is revoked ends them.
"""

import base64
import hmac
import json
import secrets
from dataclasses import dataclass
from typing import Any

from cryptography.fernet import Fernet, InvalidToken
from sqlalchemy import Connection, text

from mixfuse.contracts.database import Database

LASTS_S = 12 * 3600.0
"""A session ends after so many seconds."""

_SECRET = "session"  # noqa: S105 - its name


@dataclass(frozen=True)
class Session:
    """A visitor's session.

    Attributes:
        key: The API key or the admin key; "" without one.
        nonce: Random; the session's forms carry a token made from it.
    """

    key: str
    nonce: str

    @property
    def authorization(self) -> str | None:
        """The `Authorization` header that the API gets for this visitor."""
        return f"Bearer {self.key}" if self.key else None


class Sessions:
    """Makes and reads sessions.

    Args:
        secret: From `secret_of`.
    """

    def __init__(self, secret: bytes) -> None:
        self._secret, self._fernet = secret, Fernet(secret)
        # With a key of its own: nothing that is sealed can be taken for a session.
        self._sealing = Fernet(base64.urlsafe_b64encode(hmac.digest(secret, b"sealed", "sha256")))

    def new(self, key: str = "") -> Session:
        """Starts a session."""
        return Session(key, secrets.token_urlsafe(16))

    def cookie(self, session: Session) -> str:
        """Returns the cookie's value."""
        return self._fernet.encrypt(json.dumps([session.key, session.nonce]).encode()).decode()

    def read(self, cookie: str | None) -> Session | None:
        """Returns the session of a cookie; None if there is none, or it is not ours or has ended."""
        if not cookie:
            return None
        try:
            key, nonce = json.loads(self._fernet.decrypt(cookie.encode(), ttl=int(LASTS_S)))
        except (InvalidToken, UnicodeEncodeError):
            return None
        return Session(key, nonce)

    def seal(self, value: object) -> str:
        """Returns a value, as JSON, encrypted: a form can carry what its reader must not know."""
        return self._sealing.encrypt(json.dumps(value).encode()).decode()

    def unseal(self, sealed: str) -> Any:
        """Returns what `seal` was given; None if it is not ours or as old as a session may get."""
        try:
            return json.loads(self._sealing.decrypt(sealed.encode(), ttl=int(LASTS_S)))
        except (InvalidToken, UnicodeEncodeError):
            return None

    def token(self, session: Session) -> str:
        """Returns the token that the session's forms carry."""
        return hmac.digest(self._secret, session.nonce.encode(), "sha256").hex()

    def matches(self, session: Session, token: str) -> bool:
        """Whether a form's token is this session's."""
        return hmac.compare_digest(self.token(session).encode(), token.encode())


async def secret_of(database: Database) -> bytes:
    """Returns the secret of all sessions; the first call makes it."""

    def read(connection: Connection) -> str:
        made = Fernet.generate_key().decode()
        insert = text("INSERT INTO ui_secrets (name, value) VALUES (:name, :value) ON CONFLICT (name) DO NOTHING")
        connection.execute(insert, {"name": _SECRET, "value": made})
        found = connection.execute(text("SELECT value FROM ui_secrets WHERE name = :name"), {"name": _SECRET})
        return str(found.scalar_one())

    return (await database.run(read)).encode()
