"""What the authority has handed out: tokens, credentials, certificates. One SQLite file, one transaction a change."""

from __future__ import annotations

import os
import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from fleetune.edge.protocol.errors import AuthorityError
from fleetune.edge.protocol.identity.enrolment import Token
from fleetune.edge.protocol.identity.folder import check_private
from fleetune.edge.protocol.messages import encode

FILE = "ledger.sqlite3"

_SCHEMA = """
CREATE TABLE IF NOT EXISTS tokens (
    id TEXT PRIMARY KEY, device TEXT NOT NULL, token BLOB, expires REAL NOT NULL, used REAL, key TEXT
);
CREATE TABLE IF NOT EXISTS members (
    serial TEXT PRIMARY KEY, role TEXT NOT NULL, name TEXT NOT NULL, key TEXT NOT NULL,
    begins REAL NOT NULL, expires REAL NOT NULL, authority TEXT NOT NULL, revoked REAL
);
"""


@dataclass(frozen=True)
class MemberRow:
    """One credential, and the TLS certificate that came with it.

    Attributes:
        serial: Of the certificate, in hexadecimal; of a member without one, a number of its own.
        role: The member's role.
        name: Its name.
        key: Id of its signing key.
        begins: Unix time of issue.
        expires: Unix time until which it counts.
        authority: Id of the authority's key that has signed it.
        revoked: Unix time of its revocation, if it is revoked.
    """

    serial: str
    role: str
    name: str
    key: str
    begins: float
    expires: float
    authority: str
    revoked: float | None = None


@dataclass(frozen=True)
class TokenRow:
    """One token, without its secret.

    Attributes:
        id: Of the token.
        device: Whom it lets in.
        expires: Unix time until which it counts.
        used: Unix time of its use, if it was used.
        key: The public key that it was used for.
    """

    id: str
    device: str
    expires: float
    used: float | None
    key: str | None


class Ledger:
    """The file.

    Args:
        path: Created, for its owner alone, if it does not exist.

    Raises:
        AuthorityError: It is damaged.
        KeyExposedError: Others may read it, and the tokens in it.
    """

    def __init__(self, path: Path) -> None:
        os.close(os.open(path, os.O_CREAT | os.O_RDWR, 0o600))
        check_private(path)
        self._database = sqlite3.connect(path, isolation_level=None, timeout=10.0)
        try:
            self._database.executescript(_SCHEMA)
        except sqlite3.DatabaseError as error:
            self._database.close()
            raise AuthorityError(f"{path}: {error}", "restore the authority's folder from a backup") from error

    def close(self) -> None:
        """Close it."""
        self._database.close()

    @contextmanager
    def _change(self) -> Iterator[sqlite3.Connection]:
        """All of a change, or nothing; nobody else changes anything meanwhile."""
        self._database.execute("BEGIN IMMEDIATE")
        try:
            yield self._database
        except BaseException:
            self._database.execute("ROLLBACK")
            raise
        self._database.execute("COMMIT")

    @property
    def changes(self) -> int:
        """Differs after another process has changed something."""
        return int(self._database.execute("PRAGMA data_version").fetchone()[0])

    # --- tokens -------------------------------------------------------------------------------------------------

    def add_token(self, token: Token) -> None:
        """Remember a token, in place of those for the same device."""
        with self._change() as database:
            database.execute("DELETE FROM tokens WHERE device = ?", (token.device,))
            row = (token.id, token.device, encode(token), token.expires)
            database.execute("INSERT INTO tokens (id, device, token, expires) VALUES (?, ?, ?, ?)", row)

    def token(self, token_id: str) -> tuple[TokenRow, bytes] | None:
        """A token and its bytes, if it was handed out."""
        query = "SELECT id, device, expires, used, key, token FROM tokens WHERE id = ?"
        row = self._database.execute(query, (token_id,)).fetchone()
        return None if row is None else (TokenRow(*row[:5]), bytes(row[5]))

    def tokens(self) -> list[TokenRow]:
        """All of them."""
        query = "SELECT id, device, expires, used, key FROM tokens ORDER BY device"
        return [TokenRow(*row) for row in self._database.execute(query)]

    def use_token(self, token_id: str, key: str, now: float) -> bool:
        """Use a token for a key; False if it was used for another one. Of two at once, one succeeds."""
        with self._change() as database:
            database.execute("UPDATE tokens SET used = ?, key = ? WHERE id = ? AND used IS NULL", (now, key, token_id))
            row = database.execute("SELECT key FROM tokens WHERE id = ?", (token_id,)).fetchone()
        return row is not None and row[0] == key

    # --- members ------------------------------------------------------------------------------------------------

    def add_member(self, row: MemberRow) -> None:
        """Remember what was issued; what has long expired is let go."""
        with self._change() as database:
            database.execute("DELETE FROM members WHERE expires < ?", (row.begins - 30 * 86400,))
            database.execute(
                "INSERT INTO members VALUES (?, ?, ?, ?, ?, ?, ?, NULL)",
                (row.serial, row.role, row.name, row.key, row.begins, row.expires, row.authority),
            )

    def members(self) -> list[MemberRow]:
        """All of them, the oldest of each name first."""
        query = "SELECT * FROM members ORDER BY role, name, begins"
        return [MemberRow(*row) for row in self._database.execute(query)]

    def revoke(self, name: str, now: float) -> int:
        """Revoke all that was issued to a member, and its tokens; returns how many credentials that were."""
        with self._change() as database:
            # A used one, too: whoever has the key that it was used for would be let in with it again.
            database.execute("DELETE FROM tokens WHERE device = ?", (name,))
            query = "UPDATE members SET revoked = ? WHERE name = ? AND revoked IS NULL"
            return database.execute(query, (now, name)).rowcount
