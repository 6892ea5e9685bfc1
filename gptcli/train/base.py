"""transformers' Trainer, imported without `datasets`, which it only asks whether the rows are one of its sets.

With pandas and pyarrow that is 45 MiB of memory and 0.3 s before the first step; our rows are a data set of torch's.
"""

from __future__ import annotations

from typing import Any

import transformers.utils

utils: Any = transformers.utils
_is_available = utils.is_datasets_available
utils.is_datasets_available = lambda: False
try:
    from transformers.trainer import TRAINER_STATE_NAME, Trainer
finally:
    utils.is_datasets_available = _is_available

__all__ = ["TRAINER_STATE_NAME", "Trainer"]
