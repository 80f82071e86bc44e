"""Add, find, replace and remove the callbacks of a learner."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, TypeVar, cast

from fluxloop.callback import Callback
from fluxloop.errors import CallbackTypeError, describe
from fluxloop.order.runner import Callbacks

C = TypeVar("C", bound=Callback)


class HasCallbacks:
    """The methods of a learner that change its callbacks: each proves their order anew.

    Attributes:
        callbacks: The callbacks in their proved order.
    """

    callbacks: Callbacks

    def add_callback(self, callback: Callback) -> None:
        """Add a callback; takes effect at the next event.

        Raises:
            CallbackError: The callbacks would have no order; nothing is changed.
        """
        self.callbacks.set([*self.callbacks.given(), callback])

    def get_callback(self, cls: type[C]) -> C | None:
        """Return the callback of a class (unwrapped), or None."""
        return cast("C | None", self.callbacks.get(_class(cls)))

    def replace_callback(self, callback: Callback) -> Callback | None:
        """Put a callback in the place of the one of its type, or add it; return the replaced one, or None.

        Raises:
            CallbackError: The callbacks would have no order; nothing is changed.
        """
        if not isinstance(callback, Callback):
            self.callbacks.set([*self.callbacks.given(), callback])  # raises, and says what was expected
        kind = type(callback.unwrapped)
        # One of the class, or of a class that it extends: a Recorder of the user's own replaces the default one
        old = self.callbacks.get(kind) or next(
            (c for c in self.callbacks if isinstance(callback.unwrapped, type(c))), None
        )
        self.callbacks.set([*(c for c in self.callbacks.given() if c.unwrapped is not old), callback])
        return old

    def remove_callback(self, cls: type[C]) -> C | None:
        """Remove the callback of a class; return it, or None.

        Raises:
            CallbackError: Another callback needs what it provides; nothing is changed.
        """
        old = self.callbacks.get(_class(cls))
        if old is not None:
            self.callbacks.set([c for c in self.callbacks.given() if c.unwrapped is not old])
        return cast("C | None", old)

    def set_callbacks(self, callbacks: Iterable[Callback]) -> None:
        """Put these callbacks in the place of all, default ones included.

        Raises:
            CallbackError: They have no order; nothing is changed.
        """
        self.callbacks.set(listed(callbacks))


def listed(callbacks: Any) -> list[Any]:
    """List callbacks that were given together.

    Raises:
        CallbackTypeError: A single one, or nothing that can be listed.
    """
    if isinstance(callbacks, (Callback, type)):
        raise CallbackTypeError(f"callbacks={describe(callbacks)} was given; expected several: callbacks=[...]")
    try:
        return list(callbacks)
    except TypeError as error:
        raise CallbackTypeError(
            f"callbacks={describe(callbacks)} was given; expected several: callbacks=[...]"
        ) from error


def _class(cls: object) -> Any:
    """Return a class of callbacks.

    Raises:
        CallbackTypeError: It is none.
    """
    if not (isinstance(cls, type) and issubclass(cls, Callback)):
        raise CallbackTypeError(f"{describe(cls)} was given; expected the class of a callback, e.g. Recorder")
    return cls
