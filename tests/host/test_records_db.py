"""Records on disk: what was committed is there again, whatever happened to the process or the file."""

from __future__ import annotations

import os
import signal
import sqlite3
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from p2pvpn.core.ids import NetworkId, PeerId
from p2pvpn.dht import records
from p2pvpn.dht.records import Kind, LocatorBody
from p2pvpn.dht.storage import RecordStore, Row
from p2pvpn.host.records_db import RecordsDb


def row(number: int, sequence: int = 1, raw: bytes = b"record") -> Row:
    return Row(number.to_bytes(40, "big"), Kind.LOCATOR, sequence, 1_800_000_600, raw)


@pytest.fixture
def path(tmp_path: Path) -> Iterator[Path]:
    return tmp_path / "records.db"


def contents(path: Path) -> dict[bytes, Row]:
    database = RecordsDb(path)
    try:
        return {row.slot: row for row in database.load()}
    finally:
        database.close()


def test_rows_come_back_as_they_were_replaced_and_deleted(path: Path) -> None:
    database = RecordsDb(path)
    database.write([row(1), row(2), row(3)], [])
    database.drain()
    database.write([row(2, sequence=9, raw=b"newer")], [row(3).slot, row(77).slot])
    database.close()
    assert contents(path) == {row(1).slot: row(1), row(2).slot: row(2, sequence=9, raw=b"newer")}


def test_a_store_finds_its_records_again(path: Path) -> None:
    raw = records.build(
        NetworkId(bytes(32)),
        PeerId(bytes(20)),
        LocatorBody((), ()),
        sequence=1,
        expires=600,
        sign=lambda data: b"signed",
        certificate=b"leaf",
    )
    record = records.parse_untrusted(raw)
    store = RecordStore(RecordsDb(path))
    store.put(record, records.key_of(record), 0)
    store.close()
    again = RecordStore(RecordsDb(path))
    for _ in again.load(lambda row: again.put(records.parse_untrusted(row.raw), row.key, 0)):
        pass
    assert [found.raw for found in again.find(records.key_of(record), 0)] == [raw]
    again.close()


def test_what_is_written_after_the_close_is_ignored(path: Path) -> None:
    database = RecordsDb(path)
    database.close()
    database.write([row(1)], [])
    assert contents(path) == {}


def test_reading_waits_for_what_was_handed_over(path: Path) -> None:
    database = RecordsDb(path)
    database.write([row(number) for number in range(2000)], [])
    assert len(database.load()) == 2000
    database.close()


@pytest.mark.parametrize("damage", ["garbage", "cut", "pages", "layout"])
def test_a_damaged_file_is_moved_aside_and_the_hub_starts_empty(
    path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    database = RecordsDb(path)
    database.write([row(number, raw=bytes(900)) for number in range(200)], [])
    database.close()
    content = bytearray(path.read_bytes())
    if damage == "garbage":
        content = bytearray(b"this is no database, whatever it says" * 500)
    elif damage == "cut":
        content = content[: len(content) // 2 + 77]
    elif damage == "pages":
        content[4096:] = bytes(len(content) - 4096)
    path.write_bytes(content)
    if damage == "layout":
        with sqlite3.connect(path) as other:
            other.execute("PRAGMA user_version = 99")
        other.close()
    assert contents(path) == {}
    assert path.with_name("records.db.damaged-1").read_bytes()[:64] == bytes(content[:64]) or damage == "layout"
    assert "starts without records" in caplog.text
    database = RecordsDb(path)
    database.write([row(5)], [])
    database.close()
    assert contents(path) == {row(5).slot: row(5)}


def test_a_place_where_nothing_can_be_written_is_an_error_and_moves_nothing(tmp_path: Path) -> None:
    with pytest.raises(sqlite3.OperationalError):
        RecordsDb(tmp_path / "missing" / "records.db")


def test_rows_that_make_no_sense_are_left_out(path: Path) -> None:
    database = RecordsDb(path)
    database.write([row(1)], [])
    database.close()
    with sqlite3.connect(path) as other:
        other.execute("INSERT INTO records VALUES (x'00', 1, 1, 1, x'00')")
        other.execute("INSERT INTO records VALUES (zeroblob(40), 99, 1, 1, x'00')")
        other.execute("INSERT INTO records VALUES (x'" + "ff" * 40 + "', 1, 'one', 1, x'00')")
    other.close()
    assert contents(path) == {row(1).slot: row(1)}


def test_a_write_that_fails_is_told_of_and_later_ones_succeed(path: Path, caplog: pytest.LogCaptureFixture) -> None:
    database = RecordsDb(path)
    database.drain()
    with sqlite3.connect(path) as other:
        other.execute("ALTER TABLE records RENAME TO hidden")
    database.write([row(1)], [])
    database.drain()
    assert "1 records were not written" in caplog.text
    with other:
        other.execute("ALTER TABLE hidden RENAME TO records")
    other.close()
    database.write([row(2)], [])
    database.close()
    assert set(contents(path)) == {row(2).slot}


_WRITER = """
import sys
from pathlib import Path
from p2pvpn.dht.records import Kind
from p2pvpn.dht.storage import Row
from p2pvpn.host.records_db import RecordsDb
database = RecordsDb(Path(sys.argv[1]))
for sequence in range(1, 1_000_000):
    rows = [Row(n.to_bytes(40, "big"), Kind.LOCATOR, sequence, 1_800_000_600, b"record") for n in range(50)]
    database.write(rows, [])
    database.drain()
    print(sequence, flush=True)
"""


def test_a_process_killed_in_between_loses_no_batch_that_was_done_and_halves_none(path: Path) -> None:
    for after in (3, 40, 111):
        path.unlink(missing_ok=True)
        writer = subprocess.Popen([sys.executable, "-c", _WRITER, str(path)], stdout=subprocess.PIPE, text=True)
        assert writer.stdout is not None
        done = 0
        while done < after:
            done = int(writer.stdout.readline())
        os.kill(writer.pid, signal.SIGKILL)
        writer.wait()
        done = max([done, *(int(line) for line in writer.stdout.read().split())])
        writer.stdout.close()
        rows = contents(path)
        assert len(rows) == 50
        (sequence,) = {found.sequence for found in rows.values()}
        assert done <= sequence <= done + 1
