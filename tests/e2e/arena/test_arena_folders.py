"""Models in folders that answer while people ask: apart from the browser, whose driver has an event loop."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from fourbit.errors import InputError
from fourbit.evaluate.arena.ballots import Showing
from fourbit.evaluate.arena.live import Live, Panel
from fourbit.evaluate.arena.pairs import PairSet
from fourbit.evaluate.arena.store import Store


@pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning")  # peft asks
def test_folders_answer_too(stories_model: Path, adapter: Path, tmp_path: Path) -> None:
    """A model, and an adapter that says which model it belongs to."""
    panel = Panel.load([Live("base", str(stories_model), None), Live("tuned", str(adapter), None)], max_tokens=12)
    with Store(tmp_path / "live.sqlite", make=True) as store:
        store.settle(PairSet(panel.names, live=True))
        store.add_raters(["anna"])

        async def ask() -> Showing:
            try:
                return await panel.ask(store, "anna", "Once upon a time")
            finally:
                await panel.close()

        showing = asyncio.run(ask())
        assert showing.question == "Once upon a time"
        assert showing.first != showing.second
        store.vote("anna", showing.ticket, "tie")
        assert set(store.votes()[0].systems) == {"base", "tuned"}


def test_an_adapter_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(InputError, match="does not say which model"):
        Panel.load([Live("a", str(tmp_path), None), Live("b", str(tmp_path), None)])
