"""The role table's record in both kinds of database: nothing is lost where two write at once."""

import asyncio
from pathlib import Path

import pytest

from mixfuse.app.roles_store import StoredRoles, roll_back
from mixfuse.contracts.database import opened
from mixfuse.contracts.errors import MixfuseError


async def test_of_changes_at_once_one_is_made_and_the_others_are_told(place: str) -> None:
    with opened(place) as one, opened(place) as two:
        stores = [StoredRoles(database, name) for database, name in ((one, "one"), (two, "two"))]
        for version in range(5):
            outcomes = await asyncio.gather(
                *(store.change("judge", version, f"rev{version}", Path("x"), "swap") for store in stores * 3),
                return_exceptions=True,
            )
            made = [outcome for outcome in outcomes if not isinstance(outcome, BaseException)]
            assert [entry.version for entry in made] == [version + 1]
            assert {getattr(outcome, "kind", None) for outcome in outcomes} == {None, "conflict"}
        assert [event.version for event in await stores[0].history("judge")] == [5, 4, 3, 2, 1]
        assert await stores[0].read() == await stores[1].read()


async def test_the_record_says_what_where_by_whom_and_what_is_before(place: str, tmp_path: Path) -> None:
    with opened(place) as database:
        store = StoredRoles(database, "one")
        assert await store.read() == {}
        await store.change("judge", 0, None, None, "config")
        await store.change("judge", 1, "aaa", tmp_path / "a", "swap")
        await store.note_refusal("judge", None, tmp_path / "b", "watch", "tampered with")
        await store.pin("judge", True)
        entry = (await store.read())["judge"]
        assert (entry.version, entry.revision, entry.directory, entry.pinned, entry.gateway) == (
            *(2, "aaa", str(tmp_path / "a"), True, "one"),
        )
        assert await store.has_served("judge", "aaa")
        assert not await store.has_served("judge", "bbb")
        assert roll_back(database, "judge", "two").revision is None
        assert (await store.read())["judge"].pinned
        events = [(event.why, event.outcome, event.old, event.new) for event in await store.history("judge", limit=3)]
        assert events == [
            ("rollback", "ok", "aaa", None),
            ("pin", "ok", "aaa", "aaa"),
            ("watch", "refused", "aaa", None),
        ]


async def test_a_role_nobody_recorded_is_named(place: str) -> None:
    with opened(place) as database:
        with pytest.raises(MixfuseError, match="does not know 'judge'"):
            await StoredRoles(database, "one").pin("judge", True)
        with pytest.raises(MixfuseError, match="does not know 'judge'"):
            roll_back(database, "judge", "one")
