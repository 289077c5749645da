"""The one thread that owns the engine: it steps the scheduler while there is something to do."""

import logging
import threading

from subspec_jax.scheduler import Scheduler


class Worker(threading.Thread):
    """Runs from `start` to `stop`. It ends by itself only if a step fails, which is a fault; then
    no request waits for ever."""

    def __init__(self, scheduler: Scheduler):
        super().__init__(name="engine", daemon=True)
        self._scheduler, self._ended = scheduler, threading.Event()

    def run(self) -> None:
        try:
            while not self._ended.is_set():
                if not self._scheduler.step():
                    self._scheduler.wait(0.5)
        except BaseException:
            logging.exception("the engine's thread ended")
            self._scheduler.abandon("the engine failed; the server's log says where")

    def stop(self, seconds: float) -> bool:
        """Ends it behind the round that runs; whether it ended within so many seconds."""
        self._ended.set()
        self.join(seconds)
        return not self.is_alive()
