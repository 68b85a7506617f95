"""Keys and values of the tokens so far, in memory that is allocated once.

transformers' own cache is a new tensor per layer and token, and every token is copied into it again. Here a layer has
room for the whole answer from the start. In two manners:

    growing     attention sees a view of exactly the tokens there are, as it would of transformers' cache: the same
                shapes, so the same bits. For the CPU, and for any step that Python runs.
    captured    attention sees the whole room, of which a mask hides the rest, and the place of a new token is read from
                a tensor: nothing depends on numbers that Python holds, as a CUDA graph needs it.

A prompt goes in in the growing manner; `capture` changes over.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor
from transformers import Cache, DynamicCache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

__all__ = ["Room", "make_cache"]


class Room(CacheLayerMixin):  # type: ignore[misc]
    """The keys and values of one attention layer.

    Args:
        capacity: tokens there is room for.
        window: how many of the last tokens are attended to, the new one included; None for all.

    Attributes:
        keys, values: [B, H, capacity, D]; None before the first tokens. A layer with a window keeps twice the window,
            and moves the last to the front when that is full.
    """

    is_compileable = False
    is_croppable = False

    keys: Tensor | None
    values: Tensor | None

    def __init__(self, capacity: int, window: int | None = None) -> None:
        super().__init__()
        self.window = self.sliding_window = window
        self.is_sliding = window is not None
        self._tokens, self._end = 0, 0  # seen in all, and where the last of them ends
        self._capacity = capacity
        self._place: Tensor | None = None

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        """Take [B, H, T, D] of new tokens; returns what they attend to."""
        if self.keys is None or self.values is None:
            self._allocate(key_states, value_states)
        assert self.keys is not None
        assert self.values is not None
        if self._place is not None:
            self.keys.index_copy_(2, self._place, key_states)
            self.values.index_copy_(2, self._place, value_states)
            return self.keys, self.values
        new, seen = key_states.shape[2], self._visible(key_states.shape[2])
        begin = self.advance(new)
        self.keys[:, :, begin : self._end] = key_states
        self.values[:, :, begin : self._end] = value_states
        return self.keys[:, :, self._end - seen : self._end], self.values[:, :, self._end - seen : self._end]

    def advance(self, tokens: int) -> int:
        """Count new tokens and make room for them; returns the place of the first, which the caller fills."""
        assert self.keys is not None
        assert self.values is not None
        seen = self._visible(tokens)
        if self._end + tokens > self.keys.shape[2]:
            self.keys, self.values = self._moved(self.keys, tokens), self._moved(self.values, tokens)
            self._end = seen - tokens
        begin, self._end = self._end, self._end + tokens
        self._tokens += tokens
        return begin

    def take_back(self, tokens: int) -> None:
        """Forget the last tokens; none that a window has dropped since comes back."""
        self._tokens -= tokens
        self._end -= tokens

    def capture(self, place: Tensor) -> None:
        """Change over: the one new token goes where `place` [1] says, and all of the room is seen.

        Raises:
            ValueError: there is not room for all tokens.
        """
        if self.keys is None or self._end != self._tokens or self.keys.shape[2] < self._capacity:
            raise ValueError("a layer of its cache has less room than for all tokens")
        self._place = place

    def release(self) -> None:
        """Change back; what was put in since is forgotten."""
        self._place = None

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """How many keys the next tokens will see, and which token the first of them is."""
        seen = self._visible(query_length)
        return seen, self._tokens + query_length - seen

    def get_seq_length(self) -> int:
        """Tokens so far; not counted any more once it is captured."""
        return self._tokens

    def get_max_length(self) -> int:
        """No bound that a mask has to know of."""
        return -1

    def get_max_cache_shape(self) -> int:
        """The same under the name that older versions ask for."""
        return -1

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Nothing: `update` allocates."""

    def _visible(self, new: int) -> int:
        """What `new` tokens attend to in all: those before the first of them within its window, and themselves."""
        before = self._tokens if self.window is None else min(self._tokens, self.window - 1)
        return before + new

    def _allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        slots = self._capacity if self.window is None else min(self._capacity, 2 * self.window)
        slots = max(slots, key_states.shape[2])
        self.keys = key_states.new_zeros((*key_states.shape[:2], slots, key_states.shape[3]))
        self.values = value_states.new_zeros((*value_states.shape[:2], slots, value_states.shape[3]))
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def _moved(self, old: Tensor, new: int) -> Tensor:
        """What is still seen at the front, with room behind it; in more memory where that is not enough."""
        kept = self._visible(new) - new
        last = old[:, :, self._end - kept : self._end].clone()
        slots = kept + new
        if slots > old.shape[2]:
            old = old.new_zeros((*old.shape[:2], slots + slots // 2, old.shape[3]))
        old[:, :, :kept] = last
        return old


def make_cache(model: Any, capacity: int, *, whole: bool = False) -> Cache | None:
    """A cache for a model's layers; None where one of them keeps something else than the keys and values of tokens.

    Args:
        model: of transformers.
        capacity: tokens there is room for.
        whole: keep all tokens also in layers with a window, as `Room.capture` needs it.
    """
    own = DynamicCache(config=model.config).layers
    kinds = [(type(layer), getattr(layer, "sliding_window", None)) for layer in own]
    if not kinds or any(kind not in (DynamicLayer, DynamicSlidingWindowLayer) for kind, _ in kinds):
        return None
    return Cache(layers=[_Whole(capacity, window) if whole else Room(capacity, window) for _, window in kinds])


class _Whole(Room):
    """The same with room for all tokens whatever the window."""

    def _allocate(self, key_states: Tensor, value_states: Tensor) -> None:
        window, self.window = self.window, None
        super()._allocate(key_states, value_states)
        self.window = window
