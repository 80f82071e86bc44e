"""How a learner is shown."""

from __future__ import annotations

from fluxloop.interfaces import RunLearner


class IsShown:
    """The methods of a learner that show it."""

    def __repr__(self: RunLearner) -> str:
        models = ", ".join(
            type(m).__name__ if name is None else f"{name}: {type(m).__name__}" for name, m in self.models.items()
        )
        return (
            f"Learner({models}; seed={self.seed}, {self.accelerator.device})\n"
            f"  data: {', '.join(vars(self.data)) or 'none'}\n"
            f"  callbacks: {' → '.join(self.callbacks.order) or 'none'}"
        )
