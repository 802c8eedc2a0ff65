"""Celery wiring, and nothing else: one process, one device, one engine.

Celery runs with the threads pool: a task thread waits for its image, encodes and uploads, while the engine's thread
owns the device. Each job keeps its own acknowledgement, given late.
"""

import argparse
import gc
import logging
import os
import socket
import sys
import threading
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from importlib.metadata import version
from typing import TYPE_CHECKING, Any, NoReturn
from uuid import UUID, uuid4

from celery import Celery, signals
from celery.exceptions import SecurityWarning

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
from worker.device import Device, DrawingEngine
from worker.executor import Executor
from worker.held import Held
from worker.lease import Lease
from worker.metrics import Metrics
from worker.outages import Outages
from worker.supervisor import end_with_supervisor

if TYPE_CHECKING:
    from pipeline.model import Model

log = logging.getLogger("worker")

DEFAULT_MODEL = "AIDC-AI/Ovis-Image-7B"
EXIT_SETTINGS = 2
EXIT_UNAVAILABLE = 3
EXIT_DEADLINE = 75
OTHER_THREADS = 3
"""That ask Postgres beside the tasks: heartbeat, claim check, checkpoints."""
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


class Worker:
    """One worker process: its lease, its device, and the Celery consumer that feeds them."""

    def __init__(self, settings: Settings, drawer: Drawer, store: Store, storage: Storage, metrics: Metrics) -> None:
        self.id = uuid4()
        self._grace_s = settings.stop_grace_s
        self._outages = Outages()
        self._held = Held(settings.data_dir / "held", most_bytes=settings.held_mb * 1_000_000)
        self._checkpoints = Checkpoints(store, storage, self._outages, self._held)
        self._device = Device(
            drawer.engine,
            step_limit_s=settings.step_limit_s,
            checkpoint_steps=settings.checkpoint_steps,
            on_checkpoint=self._checkpoints.take,
        )
        self._lease = Lease(
            store,
            self.id,
            _description(drawer, self._device.capacity),
            settings.durations,
            self._outages,
            drawing=self._drawing,
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
            held=self._held,
            outages=self._outages,
            metrics=metrics,
            durations=settings.durations,
        )
        self._app = self._wired(celery_app(settings.require("redis_url")))

    def run(self) -> int:
        """Consume until SIGTERM or SIGINT; returns the exit code."""
        self._held.open()
        self._device.start()
        self._checkpoints.start()
        self._lease.start()
        signals.setup_logging.connect(_keep_logging)
        celery_log.quieten(self._outages)
        signals.worker_shutting_down.connect(self._begin_draining)
        consumer = self._app.Worker(
            pool="threads",
            concurrency=self._device.capacity,
            hostname=f"{self.id}@%h",
            without_gossip=True,
            without_mingle=True,
            without_heartbeat=True,
            quiet=True,
        )
        log.info("worker %s takes jobs, %d at once", self.id, self._device.capacity)
        try:
            consumer.start()
        finally:
            idle = self._device.stop(timeout_s=END_S)
            self._checkpoints.stop(timeout_s=END_S)
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

    def _begin_draining(self, **_signal: Any) -> None:
        """Celery has stopped consuming: finish what fits in the grace time, then give the rest back.

        It calls this in a signal's handler, which must not wait for a lock.
        """
        log.info("stopping: %.0f s to finish what is being drawn", self._grace_s)
        self._executor.drain()
        self._device.checkpoint()  # at once, so that one who does not wait for the grace time kills little
        for act in (self._give_back, self._end_in_time):
            threading.Thread(target=act, name="deadline", daemon=True).start()

    def _give_back(self) -> None:
        pause = threading.Event()
        pause.wait(self._grace_s)
        self._device.drain()
        self._executor.give_up()
        pause.wait(self._grace_s / 4 + 0.5)
        self._device.abandon()

    def _end_in_time(self) -> None:
        threading.Event().wait(1.5 * self._grace_s + 2)
        log.critical("the pool still waits after its grace time: the process ends, its leases lapse")
        _exit(EXIT_DEADLINE)

    def _drawing(self) -> list[dict[str, Any]]:
        return [
            {"job": str(message.job_id), "step": done.done, "steps": done.of}
            for message, done in self._device.progress().items()
            if isinstance(message, Message)
        ]


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
    drawer = load(settings)
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
