"""What torch holds at any moment of some work."""

from __future__ import annotations

import gc


class LiveBytes:
    """The most bytes of tensors that this thread made and held at once, by torch's own profiler of memory."""

    def __enter__(self) -> LiveBytes:
        from torch.profiler import ProfilerActivity, profile

        gc.collect()
        self._profile = profile(activities=[ProfilerActivity.CPU], profile_memory=True)
        self._profile.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._profile.__exit__(None, None, None)
        held = most = 0
        changes = [e for e in self._profile.profiler.kineto_results.events() if e.name() == "[memory]"]
        for event in sorted(changes, key=lambda event: event.start_ns()):
            held += event.nbytes()
            most = max(most, held)
        self.most = most
