"""Celery's settings for the demo. The broker and the store are files in one folder."""

import os
from pathlib import Path

FOLDER = Path(os.environ["IMPORTER_FOLDER"])

broker_url = "filesystem://"
broker_transport_options = {
    "data_folder_in": str(FOLDER / "queue"),
    "data_folder_out": str(FOLDER / "queue"),
    "control_folder": str(FOLDER / "control"),
    "store_processed": True,
    "processed_folder": str(FOLDER / "processed"),
    "polling_interval": 0.2,
}
task_ignore_result = True
worker_enable_remote_control = False
beat_scheduler = "singleton"
beat_schedule = {"import-orders": {"task": "tasks.import_orders", "schedule": 1.0}}

singleton_store_url = f"sqlite:///{FOLDER / 'shop.db'}"
# Renew leases every second. A lease lives for two such intervals, so the lease of a dead host
# expires after 2 s (default: 8 s).
singleton_heartbeat_interval = 1
