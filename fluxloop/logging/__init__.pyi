# Written by tests/write_stubs.py from the table in __init__.py, where the public names are.

from fluxloop.logging.backend import Backend as Backend
from fluxloop.logging.backend import log_to as log_to
from fluxloop.logging.loggables import Audio as Audio
from fluxloop.logging.loggables import Figure as Figure
from fluxloop.logging.loggables import File as File
from fluxloop.logging.loggables import Histogram as Histogram
from fluxloop.logging.loggables import HyperParameters as HyperParameters
from fluxloop.logging.loggables import Image as Image
from fluxloop.logging.loggables import Loggable as Loggable
from fluxloop.logging.loggables import Scalar as Scalar
from fluxloop.logging.loggables import Text as Text
from fluxloop.logging.memory import Memory as Memory
from fluxloop.logging.memory import Record as Record
from fluxloop.logging.mlflow import MLflow as MLflow
from fluxloop.logging.tensorboard import TensorBoard as TensorBoard
from fluxloop.logging.text_files import CSV as CSV
from fluxloop.logging.text_files import JSONL as JSONL
from fluxloop.logging.wandb import WandB as WandB
