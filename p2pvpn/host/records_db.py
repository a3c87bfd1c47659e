"""The hub's records on disk: one SQLite file in WAL mode, written by a thread of its own.

What the store hands over is merged under a lock and written as one transaction, so a slow disk makes batches larger,
never the event loop slower, and never more than one row per record waits. A crash loses the last moments, which the
neighbours still have. The file is a cache of what peers publish again within minutes: if it is damaged or of another
layout, it is moved aside, with its name in the log, and the hub starts empty.
"""

from __future__ import annotations

import logging
import sqlite3
import threading
from collections.abc import Sequence
from contextlib import closing, suppress
from pathlib import Path

from p2pvpn.dht.records import Kind
from p2pvpn.dht.storage import SLOT_BYTES, Row

LAYOUT = 1
"""PRAGMA user_version of the table below."""
BUSY_S = 5.0
"""How long to wait for another process (a backup, say) that holds the file."""
CLOSE_S = 10.0
"""How long `close` waits for the disk."""

_SCHEMA = """
    CREATE TABLE IF NOT EXISTS records (
        slot BLOB PRIMARY KEY, kind INTEGER NOT NULL, sequence INTEGER NOT NULL, expires INTEGER NOT NULL,
        raw BLOB NOT NULL
    ) WITHOUT ROWID
"""
_log = logging.getLogger(__name__)


class DamagedFileError(sqlite3.DatabaseError):
    """A file that SQLite reads but that is not as we left it."""


class RecordsDb:
    """A `Backend` of `dht.storage`. One process at a time uses the file."""

    def __init__(self, path: Path) -> None:
        """Open or create `path`. Raises OSError or sqlite3.Error when even an empty file cannot be made there."""
        self.path = path
        self._database = self._open()
        self._changed = threading.Condition()
        self._waiting: dict[bytes, Row | None] = {}
        self._writing = False
        self._closed = False
        self._failures = 0
        self._writer = threading.Thread(target=self._write_all, name=f"records of {path.name}", daemon=True)
        self._writer.start()

    def load(self) -> list[Row]:
        """Every row that is whole; a damaged file is moved aside and gives none. Raises sqlite3.Error."""
        with self._changed:
            self._wait_until_written()
            try:
                found = self._database.execute("SELECT slot, kind, sequence, expires, raw FROM records").fetchall()
            except sqlite3.DatabaseError as problem:
                if not _is_damage(problem):
                    raise
                self._database.close()
                self._move_aside(problem)
                self._database = self._open()
                return []
        return [Row(slot, Kind(kind), *rest) for slot, kind, *rest in found if _is_whole(slot, kind, *rest)]

    def write(self, puts: Sequence[Row], deletes: Sequence[bytes]) -> None:
        """Make one batch lasting, soon: all of it or nothing. After `close` it is ignored."""
        with self._changed:
            if self._closed:
                return
            self._waiting.update((row.slot, row) for row in puts)
            self._waiting.update((slot, None) for slot in deletes)
            self._changed.notify_all()

    def drain(self) -> None:
        """Wait until everything handed over so far is on disk, or has failed to get there."""
        with self._changed:
            self._wait_until_written()

    def close(self) -> None:
        """Write what waits, and close the file."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()
        self._writer.join(CLOSE_S)
        if self._writer.is_alive():
            _log.error("%s: the disk does not finish; the last records are lost", self.path)
            return
        self._database.close()

    def _wait_until_written(self) -> None:
        self._changed.wait_for(lambda: not self._waiting and not self._writing)

    def _write_all(self) -> None:
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._waiting or self._closed)
                if not self._waiting:
                    return
                batch, self._waiting = self._waiting, {}
                self._writing = True
            try:
                self._commit(batch)
                self._failures = 0
            except sqlite3.Error as problem:
                self._failures += 1
                if self._failures & (self._failures - 1) == 0:
                    _log.error("%s: %d records were not written: %s", self.path, len(batch), problem)
            finally:
                with self._changed:
                    self._writing = False
                    self._changed.notify_all()

    def _commit(self, batch: dict[bytes, Row | None]) -> None:
        puts = [
            (row.slot, int(row.kind), row.sequence, row.expires, row.raw) for row in batch.values() if row is not None
        ]
        with self._database:
            self._database.executemany("REPLACE INTO records VALUES (?, ?, ?, ?, ?)", puts)
            deletes = [(slot,) for slot, row in batch.items() if row is None]
            self._database.executemany("DELETE FROM records WHERE slot = ?", deletes)

    def _open(self) -> sqlite3.Connection:
        try:
            return _connect(self.path)
        except sqlite3.DatabaseError as problem:
            if not _is_damage(problem):
                raise
            self._move_aside(problem)
            return _connect(self.path)

    def _move_aside(self, problem: sqlite3.DatabaseError) -> None:
        number = 1
        while (aside := self.path.with_name(f"{self.path.name}.damaged-{number}")).exists():
            number += 1
        if self.path.exists():
            self.path.rename(aside)
        for suffix in ("-wal", "-shm"):
            with suppress(FileNotFoundError):
                self.path.with_name(self.path.name + suffix).unlink()
        _log.error("%s is damaged (%s): it is now %s, and the hub starts without records", self.path, problem, aside)


def _connect(path: Path) -> sqlite3.Connection:
    """Raises sqlite3.DatabaseError for a file that is damaged or of another layout."""
    database = sqlite3.connect(path, timeout=BUSY_S, check_same_thread=False)
    try:
        database.execute("PRAGMA journal_mode = WAL")
        database.execute("PRAGMA synchronous = NORMAL")
        with closing(database.execute("PRAGMA quick_check(1)")) as check:
            verdict = check.fetchone()
        if verdict != ("ok",):
            raise DamagedFileError(f"quick_check: {verdict}")
        (layout,) = database.execute("PRAGMA user_version").fetchone()
        if layout not in (0, LAYOUT):
            raise DamagedFileError(f"layout {layout}")
        with database:
            database.execute(_SCHEMA)
            database.execute(f"PRAGMA user_version = {LAYOUT}")
    except BaseException:
        database.close()
        raise
    return database


def _is_damage(problem: sqlite3.DatabaseError) -> bool:
    """Whether the file is at fault: a full disk or a lock is not."""
    code = getattr(problem, "sqlite_errorcode", 0) & 0xFF
    return isinstance(problem, DamagedFileError) or code in (sqlite3.SQLITE_CORRUPT, sqlite3.SQLITE_NOTADB)


def _is_whole(slot: object, kind: object, sequence: object, expires: object, raw: object) -> bool:
    return (
        type(slot) is bytes
        and len(slot) == SLOT_BYTES
        and kind in list(Kind)
        and type(sequence) is int
        and type(expires) is int
        and type(raw) is bytes
    )
