"""Celery wiring, and nothing else: one process, one device, one engine.

Celery runs with the threads pool: a task thread waits for its image, encodes and uploads, while the engine's thread
owns the device.
"""

import argparse
import contextlib
import gc
import logging
import os
import socket
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import UUID, uuid4

from celery import Celery, signals
from celery.apps.worker import Worker as CeleryWorker
from celery.exceptions import SecurityWarning
from celery.worker import state

from pipeline.errors import PipelineError
from producer.jobs import schema
from producer.jobs.contract import TASK, Message
from producer.jobs.errors import FarmError, Unavailable
from producer.jobs.metrics import serve_metrics
from producer.jobs.queue import celery_app
from producer.jobs.settings import Settings, load_settings, told
from producer.jobs.storage import Storage
from producer.jobs.store import Store
from worker import celery_log
from worker.checkpoints import Checkpoints
from worker.device import Device, DrawingEngine, Watchdog
from worker.executor import Executor
from worker.held import Held
from worker.lease import Lease
from worker.metrics import Metrics
from worker.outages import Outages
from worker.previews import Previews
from worker.stopping import Stopping
from worker.supervisor import end_with_supervisor

if TYPE_CHECKING:
    from pipeline.model import Model

log = logging.getLogger("worker")

DEFAULT_MODEL = "AIDC-AI/Ovis-Image-7B"
EXIT_SETTINGS = 2
EXIT_UNAVAILABLE = 3
OTHER_THREADS = 6
"""That ask Postgres beside the tasks: heartbeat, claim check, urgent check, checkpoints, previews, the last acts."""
LOAD_LIMIT_S = 2 * 3600.0
"""A first start downloads some 20 GB and compiles, which a slow line and machine may take more than an hour for. What
a process that is ended here has downloaded is not lost; one that hung for ever would be."""
SAVING_S = 1.0
"""Between two checkpoints of an image in a worker that was told to stop."""
END_S = 0.5
"""For the engine's step, and for the last objects to be removed, when nothing waits for them any more."""
SWITCH_INTERVAL_S = 1e-4
"""So that busy Python in the task threads cannot starve the engine's thread (DESIGN.md has the measurement)."""


@dataclass(frozen=True)
class Drawer:
    """An engine, and the names under which it is known."""

    engine: DrawingEngine
    device: str
    model: str
    revision: str


def load_drawer(settings: Settings) -> Drawer:
    """Load the model of the settings onto its device. Raises: CheckpointError, DeviceError."""
    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(settings.data_dir.absolute() / "compiled"))
    import torch  # seconds to import: only after the settings proved right

    from pipeline.model import load_model

    device = settings.device or ("cuda" if torch.cuda.is_available() else "cpu")
    name = settings.model or (DEFAULT_MODEL if device.startswith("cuda") else "tiny")
    model = load_model(
        name,
        device=device,
        revision=settings.model_revision,
        offline=settings.offline,
        models_dir=settings.models_dir,
        fp8=settings.fp8,
        low_memory=settings.low_memory,
    )
    return Drawer(_engine(model, settings), str(model.device), model.name, model.revision)


def _engine(model: "Model", settings: Settings) -> DrawingEngine:
    """An engine for ``model`` that knows what a step may hold and takes. Raises: DeviceError."""
    from pipeline import budget
    from pipeline.engine import CAPACITY, Engine
    from pipeline.planner import SharedSteps
    from pipeline.transformer import PackedTransformer

    compiled = settings.compile and model.device.type == "cuda"
    if compiled:
        log.info("compiling the model: minutes, the first time; OVIS_COMPILE=0 goes without")
    transformer = PackedTransformer(model.transformer, model.modulations, compiled=compiled)
    measured = budget.measure(model, transformer, at_most=settings.step_tokens or budget.MOST_TOKENS)
    log.info("a step may have %d tokens", measured.tokens)
    planner = SharedSteps(measured.tokens, capacity=CAPACITY, cost=measured.cost)
    # A place for every task thread: what a worker has claimed is all before the planner, the most urgent first.
    return Engine(model, planner, CAPACITY + settings.upload_slots, transformer)


class Consumer(CeleryWorker):
    """Celery's worker, which tells ``on_stop`` before it waits for the tasks: after a signal or its own crash."""

    on_stop: Callable[[], None]

    def install_platform_tweaks(self, worker: Any) -> None:
        """Signals are ours: Celery's handlers end a threads pool with a NotImplementedError, and re-exec at SIGHUP."""

    def stop(self, in_sighandler: bool = False, exitcode: int | None = None) -> None:
        self.on_stop()
        super().stop(in_sighandler, exitcode)


class Worker:
    """One worker process: its lease, its device, and the Celery consumer that feeds them."""

    def __init__(self, settings: Settings, drawer: Drawer, store: Store, storage: Storage, metrics: Metrics) -> None:
        self.id = uuid4()
        self._settings = settings
        self._store = store
        self._outages = Outages()
        self._held = Held(settings.data_dir / "held", most_bytes=settings.held_mb * 1_000_000)
        self._checkpoints = Checkpoints(store, storage, self._outages, self._held)
        self._previews = Previews(store, storage, self._outages)
        self._device = Device(
            drawer.engine,
            step_limit_s=settings.step_limit_s,
            checkpoint_steps=settings.checkpoint_steps,
            on_checkpoint=self._checkpoints.take,
            on_preview=self._previews.take,
        )
        self._lease = Lease(
            store,
            self.id,
            _description(drawer, self._device.capacity),
            settings.durations,
            self._outages,
            progress=self._device.progress,
            speed=self._device.speed,
            on_lost=self._device.cancel,
            make_room=self._device.give_way,
        )
        self._executor = Executor(
            self.id,
            drawer.model,
            drawer.revision,
            store=store,
            storage=storage,
            device=self._device,
            lease=self._lease,
            checkpoints=self._checkpoints,
            previews=self._previews,
            held=self._held,
            outages=self._outages,
            metrics=metrics,
            durations=settings.durations,
        )
        self._app = self._wired(celery_app(settings.require("redis_url")))
        self._stopping = Stopping(
            deadline_s=settings.deadline_s,
            stop_consuming=_stop_consuming,
            drain=self._drain,
            last_acts=[self._give_back_all, self._executor.hold_drawn],
        )

    def run(self) -> int:
        """Consume until SIGTERM, SIGINT or SIGHUP; returns the exit code."""
        self._held.open()
        self._device.start()
        self._checkpoints.start()
        self._previews.start()
        self._lease.start()
        signals.setup_logging.connect(_keep_logging)
        celery_log.quieten(self._outages)
        consumer = self._consumer()
        self._stopping.listen()
        log.info("worker %s takes jobs, %d at once", self.id, self._device.capacity)
        try:
            consumer.start()
        finally:
            idle = self._device.stop(timeout_s=END_S)
            self._checkpoints.stop(timeout_s=END_S)
            self._previews.stop(timeout_s=END_S)
            self._lease.stop()
        log.info("worker %s has ended", self.id)
        if not idle:  # all is given back; the interpreter cannot end in order beside a thread that is in a library
            _exit(consumer.exitcode or 0)
        return int(consumer.exitcode or 0)

    def _wired(self, app: Celery) -> Celery:
        @app.task(name=TASK)
        def draw(job_id: str, claim: int) -> None:
            self._executor.execute(Message(UUID(job_id), claim))

        return app

    def _consumer(self) -> Consumer:
        consumer = Consumer(
            app=self._app,
            pool="threads",
            concurrency=self._device.capacity,
            hostname=f"{self.id}@%h",
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            quiet=True,
        )
        consumer.on_stop = self._stopping.begin
        return consumer

    def _drain(self) -> None:
        """Finish what fits in the grace time, then give the rest back; every step that was drawn is kept.

        Checkpoints at once and again and again, so that one who does not wait for the grace time kills little.
        """
        self._executor.drain()
        self._device.checkpoint()
        self._executor.hold_drawn()
        log.info("stopping: %.0f s to finish what is being drawn", self._settings.stop_grace_s)
        over_at = time.monotonic() + self._settings.stop_grace_s
        while (left_s := over_at - time.monotonic()) > 0:
            time.sleep(min(SAVING_S, left_s))
            self._device.checkpoint()
        self._executor.give_up(endings_s=2 * self._settings.give_back_s)  # before what is drained asks for its time
        self._device.drain()
        self._executor.hold_drawn()
        time.sleep(self._settings.give_back_s)
        self._device.abandon()

    def _give_back_all(self) -> None:
        """A claim that only lapsed would count as a death of its job's worker, which a healthy job may not survive."""
        with contextlib.suppress(Unavailable):
            self._store.give_back_all(self.id)


def _stop_consuming() -> None:
    """In a signal's handler. Celery looks at this once a second and between two messages."""
    state.should_stop = 0  # type: ignore[assignment]  # celery-types knows its first value alone


def _exit(code: int) -> NoReturn:
    logging.shutdown()
    os._exit(code)


def _keep_logging(**_signal: Any) -> None:
    """A receiver for ``setup_logging``: with one, Celery leaves the process's own logging as it is."""


def _description(drawer: Drawer, capacity: int) -> dict[str, Any]:
    return {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "device": drawer.device,
        "model": drawer.model,
        "revision": drawer.revision,
        "version": version("ovis-batch"),
        "capacity": capacity,
    }


def run(
    settings: Settings,
    load: Callable[[Settings], Drawer] = load_drawer,
    storage_at: Callable[[Settings], Storage] = Storage,
    store_at: Callable[..., Store] = Store.at,
) -> int:
    """Run one worker until it is told to stop; all but the settings is for benchmarks and tests to replace.

    Raises: FarmError, PipelineError: it cannot start, and the message says what to do.
    """
    database_url = settings.require("database_url")
    schema.check(database_url)
    storage = storage_at(settings)
    storage.ensure_bucket()
    metrics = Metrics()
    if settings.metrics_port is not None:  # before the model, whose loading takes minutes: a taken port is told at once
        port = serve_metrics(metrics.registry, settings.metrics_host, settings.metrics_port)
        log.info("metrics at http://%s:%d/metrics", settings.metrics_host, port)
    loading = Watchdog(LOAD_LIMIT_S)
    loading.alive()
    try:
        drawer = load(settings)
    finally:
        loading.stop()
    log.info("model %s at %s on %s", drawer.model, drawer.revision, drawer.device)
    store = store_at(database_url, connections=drawer.engine.capacity + OTHER_THREADS, ping=False)
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    gc.collect()
    gc.freeze()  # torch and the model are some million objects: no collection need look at them again
    warnings.filterwarnings("ignore", category=SecurityWarning)  # of running as root: no message can carry code here
    try:
        return Worker(settings, drawer, store, storage, metrics).run()
    finally:
        store.close()
        storage.close()


def main(arguments: list[str] | None = None) -> int:
    """``python -m worker.app [--device cuda:1]``: exit code 0 after SIGTERM.

    2 if it cannot start before a person has changed something, 3 if a server that it needs does not answer.
    """
    parser = argparse.ArgumentParser(prog="python -m worker.app", description="One worker process on one device.")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, …; default: OVIS_DEVICE, or cuda if there is one")
    parser.add_argument("--supervised", action="store_true", help="drain when the standard input ends")
    options = parser.parse_args(arguments)
    if options.supervised:
        end_with_supervisor(sys.stdin.fileno())
    device = options.device
    try:
        settings = load_settings(**({"device": device} if device else {}))
        logging.basicConfig(level=settings.log_level, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
        return run(settings)
    except (FarmError, PipelineError) as error:
        print(f"ovis-batch worker: {told(error)}", file=sys.stderr)
        return EXIT_UNAVAILABLE if isinstance(error, Unavailable) else EXIT_SETTINGS


if __name__ == "__main__":
    sys.exit(main())
